//! Control flow: jumps, calls and returns.
//!
//! Jumps inside the page are chained by patching. A direct jump to another page has a *link*, a slot of its own in a table
//! that goes with the address space and says where that target is there. Everything else goes through the jump table. Both
//! sequences leave the flags alone, because nothing is known of who reads them at the target.
//!
//! Calls and returns are paired on a stack of the translator's own (the host's RSP points into it): a call pushes the
//! complement of the return address and makes a host call; a return loads its target and makes a host return, behind
//! which the call's own code compares the two. The host predicts both. If they differ (a context switch, `longjmp`) the
//! stack is emptied and the jump table decides.

use super::emit::{A, Asm, B, C, RCX, SP, cc};
use super::jump_table::LINK_BIAS;
use super::lower::{Cold, Lower, gpr, host, jit};
use super::lower::{INDEX_SHIFT, JUMP_SLOTS, LINKS};
use super::plan::{Plan, Shape};
use super::thunks::Thunks;
use crate::vp::{VpBlock, attention};
use iced_x86::{Instruction, OpKind};
use std::mem::offset_of;

/// A jump by a link, for its cold part.
pub(super) struct Link {
    /// Displacement of the jump to there.
    pub from: u64,
    /// Its number.
    number: u32,
    /// Behind the call, if it is one.
    behind: Option<u64>,
}

impl Lower<'_> {
    /// A = target of an indirect branch.
    pub(super) fn branch_target(&mut self, plan: &Plan, n: usize) {
        if self.origin.facts.is_some() {
            return self.segmented_target(plan, n);
        }
        let i = &plan.steps[n].i;
        if i.op0_kind() == OpKind::Register {
            let r = i.op0_register().number() as u8;
            match host(r) {
                Some(h) => self.hot.mov(A, h),
                None => self.hot.load_gs(A, gpr(r)),
            }
        } else {
            let place = self.place(plan, &plan.accesses_of(n)[0], false);
            self.load_place(A, place);
        }
    }

    pub(super) fn jcc(&mut self, i: &Instruction) {
        let target = i.near_branch_target();
        let condition = encoded_condition(self.bytes(i));
        let backward = target <= i.ip();
        if !self.inside(target) {
            let from = self.hot.jcc(condition, 0);
            self.cold.push(Cold::Jump { from, target, poll: backward });
        } else if !backward {
            let from = self.hot.jcc(condition, 0);
            self.cold.push(Cold::Exit { from, target: self.origin.offset(target) as u16, shape: Shape::Grouped });
        } else {
            let over = self.hot.short(0x70 | condition ^ 1);
            self.poll(target, self.taken != 0);
            self.jump_inside(target);
            self.hot.close(over);
        }
    }

    /// Jumps to a target in the page.
    pub(super) fn jump_inside(&mut self, target: u64) {
        if target == self.origin.rip && self.loops {
            self.hot.jmp(self.inner);
        } else {
            let from = self.hot.jmp(0);
            self.cold.push(Cold::Exit { from, target: self.origin.offset(target) as u16, shape: Shape::Grouped });
        }
    }

    /// Leaves towards `target` if somebody wants attention. `keep`: the flags.
    pub(super) fn poll(&mut self, target: u64, keep: bool) {
        let attention = offset_of!(VpBlock, attention);
        if keep {
            self.hot.mov(A, RCX);
            self.hot.load_gs32(RCX, attention);
            let none = self.hot.short(0xe3); // jrcxz
            let from = self.hot.jmp(0);
            self.cold.push(Cold::Poll { from, target, swapped: true });
            self.hot.close(none);
            self.hot.mov(RCX, A);
        } else {
            self.hot.cmp_gs32(attention, 0);
            let from = self.hot.jcc(cc::NE, 0);
            self.cold.push(Cold::Poll { from, target, swapped: false });
        }
    }

    /// Leaves the block for a known target.
    pub(super) fn direct_exit(&mut self, target: u64, backward: bool) {
        if self.inside(target) {
            if backward {
                self.poll(target, self.need.hard != 0);
            }
            self.jump_inside(target);
        } else {
            self.leave_page(target, false, backward);
        }
    }

    /// Jumps (or calls) to an address in another page. `poll`: unless somebody wants attention.
    pub(super) fn leave_page(&mut self, target: u64, call: bool, poll: bool) {
        self.code_address(A, target);
        self.link_jump(target, call, poll);
    }

    /// The same with the address in A.
    fn link_jump(&mut self, target: u64, call: bool, poll: bool) {
        let mut h = std::mem::take(&mut self.hot);
        let link = self.emit_link_jump(&mut h, target, call, poll);
        self.hot = h;
        self.cold.extend(link.map(Cold::Link));
    }

    /// [`Lower::link_jump`] anywhere; the caller places what the jump at [`Link::from`] leads to. `None`: it goes through the
    /// jump table.
    pub(super) fn emit_link_jump(&mut self, h: &mut Asm, target: u64, call: bool, polls: bool) -> Option<Link> {
        // Outside 64-bit mode a page of code need not start at a multiple of the page's size, and an empty link is that of the
        // last address there is.
        let wide = self.origin.facts.is_none();
        if self.link as usize >= LINKS || !wide && target & 0xfff == 0xfff {
            if polls && call {
                poll_call(h, self.thunks);
            } else if polls {
                poll_table(h, self.thunks);
            }
            table_jump(h, self.thunks, call);
            return None;
        }
        let number = self.link;
        self.link += 1;
        let slot = 16 * number as i32;
        if polls && !wide {
            if call {
                poll_call(h, self.thunks);
            } else {
                poll_table(h, self.thunks);
            }
        }
        let polls = polls && wide;
        let less = if wide { (target & 0xfff) as i32 + LINK_BIAS as i32 } else { -1 };
        h.mov(B, RCX);
        if polls {
            // One comparison for both: a link is for one offset in the page, so that targets differ by a multiple of the page's
            // size, and attention is less.
            const { assert!((attention::ALL as u64) < LINK_BIAS) };
            h.load_gs32(RCX, offset_of!(VpBlock, attention));
            h.lea(true, RCX, Some(RCX), A, 1, -less);
            h.load_gs(C, jit!(links));
            h.load(C, C, slot);
            h.lea(true, RCX, Some(RCX), C, 1, 0);
        } else {
            h.load_gs(C, jit!(links));
            h.load(RCX, C, slot);
            h.lea(true, RCX, Some(RCX), A, 1, -less);
        }
        let hit = h.short(0xe3); // jrcxz
        let from = h.jmp(0);
        h.close(hit);
        h.mov(RCX, B);
        if polls {
            h.load_gs(C, jit!(links));
        }
        h.bs(&[0x41, 0xff, if call { 0x93 } else { 0xa3 }]); // call or jmp [r11 + slot + 8]
        h.d(slot as u32 + 8);
        Some(Link { from, number, behind: call.then(|| h.here()) })
    }

    /// Stores the return address and pushes its complement: see the module.
    fn push_return(&mut self, plan: &Plan, n: usize) {
        if self.origin.facts.is_some() {
            return self.push_return_segmented(plan, n);
        }
        let Some(stack) = plan.accesses_of(n).last() else { return };
        self.addend(plan, stack.group);
        self.code_address(B, plan.steps[n].i.next_ip());
        self.hot.store_indexed(B, SP, C, -8);
        self.hot.lea(true, SP, Some(SP), 4, 1, -8);
        self.hot.bs(&[0x49, 0xf7, 0xd2]); // not r10
        self.hot.bs(&[0x41, 0x52]); // push r10
    }

    pub(super) fn call(&mut self, plan: &Plan, n: usize) {
        let i = &plan.steps[n].i;
        let target = i.near_branch_target();
        let backward = target <= i.ip();
        if self.inside(target) {
            if backward {
                // Before anything has happened: the call itself is executed again.
                self.poll(i.ip(), self.need.hard != 0);
            }
            self.push_return(plan, n);
            self.hot.b(0xe8);
            let from = self.hot.relative(0);
            self.cold.push(Cold::Exit { from, target: self.origin.offset(target) as u16, shape: Shape::Grouped });
        } else {
            self.push_return(plan, n);
            self.leave_page(target, true, backward);
        }
        self.returned(i.next_ip());
    }

    pub(super) fn call_indirect(&mut self, plan: &Plan, n: usize) {
        let i = &plan.steps[n].i;
        self.branch_target(plan, n);
        self.hot.store_gs(A, jit!(temporary));
        self.push_return(plan, n);
        self.hot.load_gs(A, jit!(temporary));
        poll_call(&mut self.hot, self.thunks);
        table_jump(&mut self.hot, self.thunks, true);
        self.returned(i.next_ip());
    }

    pub(super) fn ret(&mut self, plan: &Plan, n: usize) {
        let i = &plan.steps[n].i;
        self.addend(plan, plan.accesses_of(n)[0].group);
        self.hot.load_indexed(A, SP, C, 0);
        let extra = if i.op_count() == 1 { i32::from(i.immediate16()) } else { 0 };
        self.hot.lea(true, SP, Some(SP), 4, 1, 8 + extra);
        self.hot.b(0xc3);
    }

    /// Where a paired return comes to, with its target in A.
    fn returned(&mut self, next: u64) {
        let inside = self.inside(next);
        let offset = self.origin.offset(next) as i32;
        let wide = self.origin.facts.is_none();
        let h = &mut self.hot;
        h.mov(C, RCX);
        h.b(0x59); // pop rcx
        h.lea(true, RCX, Some(RCX), A, 1, 1);
        let same = h.short(0xe3); // jrcxz
        h.mov(RCX, C);
        h.jmp(self.thunks.unpaired);
        h.close(same);
        h.mov(RCX, C);
        if inside {
            h.lea(wide, B, Some(A), 4, 1, -offset);
            h.store_gs(B, jit!(page));
            let from = self.hot.jmp(0);
            self.cold.push(Cold::Exit { from, target: self.origin.offset(next) as u16, shape: Shape::Grouped });
        } else {
            self.link_jump(next, false, false);
        }
    }
}

/// Leaves with the target in A if somebody wants attention. Keeps the flags.
pub(super) fn poll_table(h: &mut Asm, thunks: &Thunks) {
    poll(h, |h| {
        h.jmp(thunks.exit_table);
    });
}

/// The same before a call whose return address has been pushed: the host's call is made up for.
fn poll_call(h: &mut Asm, thunks: &Thunks) {
    poll(h, |h| {
        // As the call would: push the address behind the table jump. It is not known yet; the stack is emptied instead.
        h.bs(&[0x65, 0x48, 0x8b, 0x24, 0x25]); // mov rsp, gs:[shadow_top]
        h.d(jit!(shadow_top) as u32);
        h.jmp(thunks.exit_table);
    });
}

/// Cold: a link was not entered, or somebody wants attention.
pub(super) fn link_missed(c: &mut Asm, thunks: &Thunks, link: &Link) {
    c.mov(RCX, B);
    if let Some(behind) = link.behind {
        // push what the call would push
        c.bs(&[0x4c, 0x8d, 0x15]); // lea r10, [rip + disp]
        c.relative(behind);
        c.bs(&[0x41, 0x52]); // push r10
    }
    c.mov_imm(B, u64::from(link.number));
    c.jmp(thunks.exit_link);
}

fn poll(h: &mut Asm, leave: impl FnOnce(&mut Asm)) {
    h.mov(B, RCX);
    h.load_gs32(RCX, offset_of!(VpBlock, attention));
    let none = h.short(0xe3); // jrcxz
    h.mov(RCX, B);
    leave(h);
    h.close(none);
    h.mov(RCX, B);
}

/// Jumps (or calls) through the jump table to the target in A, or exits. Keeps the flags.
pub(super) fn table_jump(h: &mut Asm, thunks: &Thunks, call: bool) {
    const { assert!(JUMP_SLOTS == 1 << 16 && INDEX_SHIFT == 2) };
    if thunks.bmi2 {
        h.rorx(B, A, INDEX_SHIFT);
    } else {
        // No shift that keeps the flags: the slower form.
        h.mov(B, A);
        h.bs(&[0x9c, 0x49, 0xc1, 0xea, INDEX_SHIFT, 0x9d]); // pushfq; shr r10, 2; popfq
    }
    h.bs(&[0x45, 0x0f, 0xb7, 0xd2]); // movzx r10d, r10w
    h.load_gs(C, jit!(jump_table));
    h.lea(true, B, Some(B), B, 1, 0);
    h.lea(true, C, Some(C), B, 8, 0);
    h.mov(B, RCX);
    h.load(RCX, C, 0);
    h.lea(true, RCX, Some(RCX), A, 1, 1);
    let hit = h.short(0xe3); // jrcxz
    h.mov(RCX, B);
    let behind = if call {
        // push what the call below would push
        h.bs(&[0x4c, 0x8d, 0x15]); // lea r10, [rip + disp]
        let at = h.relative(0);
        h.bs(&[0x41, 0x52]); // push r10
        Some(at)
    } else {
        None
    };
    h.jmp(thunks.exit_table);
    h.close(hit);
    h.mov(RCX, B);
    h.bs(&[0x41, 0xff, if call { 0x53 } else { 0x63 }, 8]); // call or jmp [r11 + 8]
    if let Some(at) = behind {
        let here = h.here();
        h.patch(at, here);
    }
}

/// Condition of a Jcc from its bytes.
fn encoded_condition(bytes: &[u8]) -> u8 {
    match bytes.iter().position(|b| *b == 0x0f) {
        Some(at) if bytes.get(at + 1).is_some_and(|b| b & 0xf0 == 0x80) => bytes[at + 1] & 15,
        _ => bytes.iter().find(|b| *b & 0xf0 == 0x70).map_or(0, |b| b & 15),
    }
}
