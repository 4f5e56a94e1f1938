//! Memory operands: the inline TLB check of a group of accesses, and operands behind it.
//!
//! The check, flags dead: `lea r9,[lowest]; rorx r10,r9,7; and r10d,mask; add r10,gs:[tlb]; sub r9,[r10+tag];
//! cmp r9,4096-span; ja miss; mov r11,[r10+addend]`. Then each access of the group is the guest's instruction with R11
//! added to its address. The read or write tag of the TLB set in use makes permission, presence, A and D bits, code pages,
//! watchpoints, MMIO and the page's end one comparison.
//!
//! In a loop of one block, a group whose address moves by a constant is compared with the page of the round before:
//! `lea r9,[lowest]; sub r9,gs:[page]; cmp r9,4096-span; ja miss; mov r11,gs:[addend]`; its miss looks at the TLB first.
//!
//! A miss asks Rust to fill the slot and tries again. What cannot be filled (a fault, a device, a page's end) is left to the
//! interpreter: at once if the check stands right before its only access, else in a translation without groups.

use super::classify::Kind;
use super::emit::{A, Asm, B, C, SP, cc};
use super::kernel;
use super::lower::{Cold, Exit, Holds, Lower, gpr, host, jit};
use super::plan::{self, Access, Base, Expression, Plan, SegmentBase, Shape};
use super::raw::Place;
use super::recall::Recall;
use crate::mmu::TlbPointers;
use crate::mmu::tlb::{SLOTS, TlbEntry};
use crate::vp::VpBlock;
use iced_x86::{Instruction, Mnemonic};
use std::mem::{offset_of, size_of};
use x86::paging::PAGE_SIZE;
use x86::segment::{Segment, sreg};

/// What is done when a check fails.
pub(super) struct Miss {
    /// Displacement of the jump to here.
    pub(super) from: u64,
    /// That of the jump here because the segment ends before: nothing can be filled.
    pub(super) outside: Option<u64>,
    /// Behind the computation of the address, which is in A.
    pub(super) retry: u64,
    /// Where C holds the addend.
    pub(super) found: u64,
    /// The address must be computed again: it was destroyed.
    pub(super) address: Option<(Expression, i64)>,
    /// Bytes covered.
    pub(super) span: u32,
    /// Is it a check for writing?
    pub(super) write: bool,
    /// The flags are in RAX.
    pub(super) keep: bool,
    /// Slot of a moving group: the TLB is still to be looked at.
    pub(super) moved: Option<usize>,
    /// How to make them again, if they are destroyed.
    pub(super) recall: Option<Recall>,
    /// What follows if nothing can be filled.
    pub(super) then: Then,
}

/// What came of an attempt to make an access possible.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Filled {
    /// Nothing: the interpreter is to find out why.
    No = 0,
    /// The check succeeds now.
    Hit = 1,
    /// The check cannot succeed, because the access reaches into the next page, but [`super::JitState::addend`] leads to both
    /// pages, or to a copy that is only read.
    Addend = 2,
    /// It leads to a copy that is to be written back.
    Copy = 3,
}

pub(super) enum Then {
    /// The interpreter executes this instruction, and the block goes on at `resume` (0: it is left). `body`: its code behind the
    /// check, as offsets in the hot code, if that may be executed on a copy of the operand.
    Interpret { rip: u64, len: u8, light: bool, resume: u64, body: Option<(usize, usize)> },
    /// A block without groups from this offset on.
    Single(u16),
}

impl Lower<'_> {
    /// Loads a register with `expression + displacement`; may destroy A and B. The segment's base is added.
    pub(super) fn linear_address(h: &mut Asm, to: u8, e: &Expression, displacement: i64) {
        let base = match e.base {
            Base::Zero => None,
            Base::Page => {
                h.load_gs(A, jit!(page));
                Some(A)
            }
            Base::Register(r) => Some(host(r).unwrap_or_else(|| {
                h.load_gs(A, gpr(r));
                A
            })),
        };
        let index = e.index.map(|(r, scale)| {
            (
                host(r).unwrap_or_else(|| {
                    h.load_gs(B, gpr(r));
                    B
                }),
                scale,
            )
        });
        match (base, index, i32::try_from(displacement)) {
            (None, None, _) => {
                h.mov_imm(to, if e.narrow { displacement as u32 as u64 } else { displacement as u64 });
            }
            (Some(b), None, Ok(0)) if !e.narrow => {
                if b != to {
                    h.mov(to, b);
                }
            }
            (base, index, Ok(d)) => {
                let (x, scale) = index.unwrap_or((4, 1));
                h.lea(!e.narrow, to, base, x, scale, d);
            }
            (base, index, Err(_)) => {
                // Only a constant that grew beyond 32 bits by moving a check.
                let (x, scale) = index.unwrap_or((4, 1));
                h.lea(true, A, base, x, scale, 0);
                h.mov_imm(B, displacement as u64);
                h.lea(!e.narrow, to, Some(A), B, 1, 0);
            }
        }
        let seg = match e.segment {
            // (A segment with a limit is not of 64-bit code: see [`super::segmented`].)
            SegmentBase::Flat | SegmentBase::Limited(_) => return,
            SegmentBase::Fs => sreg::FS,
            SegmentBase::Gs => sreg::GS,
        };
        h.load_gs(B, segment_base(seg));
        h.lea(true, to, Some(to), B, 1, 0);
    }

    /// [`Lower::linear_address`] in the hot code, with what A and B hold.
    pub(super) fn linear(&mut self, to: u8, e: &Expression, displacement: i64) {
        Self::linear_address(&mut self.hot, to, e, displacement);
        self.forget();
    }

    /// Loads A with the linear address of the memory operand. For system instructions.
    pub(super) fn address(&mut self, i: &Instruction) {
        if self.origin.facts.is_some() {
            return self.flat_address(i);
        }
        let (expression, displacement) = plan::expression_of(i, self.origin.page);
        self.linear(A, &expression, displacement);
    }

    /// The check of a group, before instruction `at`.
    pub(super) fn check_group(&mut self, plan: &Plan, number: usize, at: &Instruction) {
        if self.origin.facts.is_some() {
            return self.check_segmented(plan, number, at);
        }
        let g = &plan.groups[number];
        let keep = self.before_clobber();
        // In the loop a moving group is compared with the page of the round before.
        let moved = g.slot.filter(|_| g.moving.is_some() && self.inner != 0);
        let low = g.moving.filter(|_| moved.is_none()).unwrap_or(g.low);
        self.linear(A, &g.expression, low);
        if keep {
            Self::keep_flags(&mut self.hot);
        }
        let retry = self.hot.here();
        // The address is needed again if the flags are in RAX, or if the only access follows and would compute it anew.
        let single = g.is_single();
        let preserve = keep || g.expression.direct(host).is_none();
        let h = &mut self.hot;
        let from = match moved {
            Some(slot) => {
                let from = Self::compare_page(h, g.span, preserve, |h, difference| {
                    h.gs(true, 0x2b, difference, jit!(tags) + 8 * slot);
                });
                h.load_gs(C, jit!(addends) + 8 * slot);
                from
            }
            None => {
                let from = Self::compare(h, self.bmi2, g.span, g.write, preserve);
                h.load(C, B, offset_of!(TlbEntry, addend) as i32);
                from
            }
        };
        let found = self.hot.here();
        if keep {
            Self::restore_flags(&mut self.hot);
        }
        if let Some(slot) = g.slot.filter(|_| moved.is_none()) {
            self.hot.store_gs(C, jit!(addends) + 8 * slot);
            if g.moving.is_some() {
                self.hot.load(B, B, tag_of(g.write));
                self.hot.store_gs(B, jit!(tags) + 8 * slot);
            }
        }
        self.current = number;
        if preserve {
            self.a = Holds::Sum(number, g.relative);
        }
        let then = if single {
            let i = &plan.steps[g.first].i;
            let body = (self.hot.bytes.len(), 0);
            let locked = i.has_lock_prefix() || i.mnemonic() == Mnemonic::Xchg;
            let plain = matches!(plan.steps[g.first].kind, Kind::Plain | Kind::Vector(_)) && !locked;
            Then::Interpret {
                rip: i.ip(),
                len: i.len() as u8,
                light: !kernel::touches_vector(i),
                resume: 0,
                body: plain.then_some(body),
            }
        } else {
            Then::Single(self.origin.offset(at.ip()) as u16)
        };
        let miss = Miss {
            from,
            outside: None,
            retry,
            found,
            address: (!preserve).then_some((g.expression, low)),
            span: g.span as u32,
            write: g.write,
            keep,
            moved,
            recall: self.recall,
            then,
        };
        if single {
            self.open_misses.push(self.cold.len());
        }
        self.cold.push(Cold::Miss(miss));
    }

    /// Behind an instruction: where blocks go on whose single accesses the interpreter has executed. 0: nowhere.
    pub(super) fn close_misses(&mut self, resume: u64) {
        for at in std::mem::take(&mut self.open_misses) {
            if let Some(Cold::Miss(Miss { then: Then::Interpret { resume: to, body, .. }, .. })) = self.cold.get_mut(at)
            {
                *to = resume;
                if let Some(body) = body {
                    body.1 = self.hot.bytes.len();
                }
            }
        }
    }

    /// Compares the address in A with the tag of its slot, whose address is then in B. Gives the displacement of the jump
    /// that is taken on a miss. Destroys A, or C if A is to be preserved.
    pub(super) fn compare(h: &mut Asm, bmi2: bool, span: i64, write: bool, preserve: bool) -> u64 {
        if bmi2 {
            h.rorx(B, A, 7);
        } else {
            h.mov(B, A);
            h.bs(&[0x49, 0xc1, 0xea, 7]); // shr r10, 7
        }
        const { assert!(size_of::<TlbEntry>() == 32) };
        h.alu_imm(false, 4, B, ((SLOTS - 1) << 5) as i32);
        h.gs(true, 0x03, B, offset_of!(VpBlock, tlb) + offset_of!(TlbPointers, data));
        Self::compare_page(h, span, preserve, |h, difference| h.op_mem(0x2b, difference, B, tag_of(write)))
    }

    /// Compares the address in A with a page that `subtract` takes from it. As [`Lower::compare`].
    fn compare_page(h: &mut Asm, span: i64, preserve: bool, subtract: impl FnOnce(&mut Asm, u8)) -> u64 {
        let difference = if preserve {
            h.mov(C, A);
            C
        } else {
            A
        };
        subtract(h, difference);
        h.alu_imm(true, 7, difference, 4096 - span as i32);
        h.jcc(cc::A, 0)
    }

    /// Cold: a check failed.
    pub(super) fn miss(&mut self, c: &mut Asm, miss: Miss, first_exit: u32, exits: &mut Vec<Exit>) {
        self.hot.patch(miss.from, c.here());
        let address = |c: &mut Asm| {
            if let Some((expression, low)) = &miss.address {
                Self::linear_address(c, A, expression, *low);
            }
        };
        address(c);
        let mut retry = miss.retry;
        if let Some(slot) = miss.moved {
            retry = c.here();
            let from = Self::compare(c, self.bmi2, i64::from(miss.span), miss.write, miss.address.is_none());
            c.load(C, B, offset_of!(TlbEntry, addend) as i32);
            c.store_gs(C, jit!(addends) + 8 * slot);
            c.load(B, B, tag_of(miss.write));
            c.store_gs(B, jit!(tags) + 8 * slot);
            c.jmp(miss.found);
            let here = c.here();
            c.patch(from, here);
            address(c);
        }
        let (copy, single) = match miss.then {
            Then::Interpret { body, .. } => (body.is_some(), true),
            Then::Single(_) => (false, false),
        };
        // What reaches into the next page cannot be filled, and a group is not worth a closer look. The check of a group may
        // stand before a test of its pointer: a null pointer (or an error number in its place) comes here often.
        let mut futile = Vec::new();
        if !single {
            c.lea(true, B, Some(A), 4, 1, PAGE_SIZE as i32);
            c.alu_imm(true, 7, B, 2 * PAGE_SIZE as i32);
            futile.push(c.jcc(cc::B, 0));
        }
        if !single && miss.span > 1 {
            c.bs(&[0x45, 0x89, 0xca]); // mov r10d, r9d
            c.alu_imm(false, 4, B, 0xfff);
            c.alu_imm(false, 7, B, 4096 - miss.span as i32);
            futile.push(c.jcc(cc::A, 0));
        }
        let wanted =
            u64::from(miss.span) | u64::from(miss.write) << 16 | u64::from(copy) << 17 | u64::from(single) << 18;
        c.mov_imm(B, wanted);
        c.call(self.thunks.fill);
        const { assert!(Filled::Hit as u8 == 1 && Filled::Addend as u8 == 2 && Filled::Copy as u8 == 3) };
        let decrement = |c: &mut Asm| c.bs(&[0x49, 0xff, 0xca]); // dec r10
        decrement(c);
        c.jcc(cc::E, retry);
        if single {
            decrement(c);
            c.jcc(cc::E, miss.found);
        }
        let copied = match miss.then {
            Then::Interpret { body: Some(body), resume, .. } if miss.write => {
                decrement(c);
                Some((c.jcc(cc::E, 0), body, resume))
            }
            _ => None,
        };
        let here = c.here();
        for at in futile {
            c.patch(at, here);
        }
        if let Some(at) = miss.outside {
            self.hot.patch(at, c.here());
        }
        if miss.keep {
            Self::restore_flags(c);
        } else if let Some(recall) = miss.recall {
            recall.emit(c);
        }
        match miss.then {
            Then::Interpret { rip, len, light, resume, .. } => {
                self.interpret_and_resume(c, rip, len, light, resume);
            }
            Then::Single(offset) => {
                let patch = c.jmp(0);
                let stub = c.here();
                c.patch(patch, stub);
                Self::exit_stub(c, self.thunks, patch, offset, Shape::Single, first_exit, exits);
            }
        }
        if let Some((from, (start, end), resume)) = copied {
            // The instruction on the copy; then the copy goes back.
            let here = c.here();
            c.patch(from, here);
            if miss.keep {
                Self::restore_flags(c);
            }
            let (hot, here) = (self.hot.base + start as u64, c.here());
            self.copy_sites(hot, self.hot.base + end as u64, here);
            c.bs(&self.hot.bytes[start..end]);
            c.call(self.thunks.put_back);
            c.jmp(resume);
        }
    }

    /// Makes sure that C holds a group's addend.
    pub(super) fn addend(&mut self, plan: &Plan, group: usize) {
        if self.current != group {
            let slot = plan.groups[group].slot.unwrap_or_default();
            debug_assert!(plan.groups[group].slot.is_some(), "a group without a slot has lost its addend");
            self.hot.load_gs(C, jit!(addends) + 8 * slot);
            self.current = group;
        }
    }

    /// The host's operand for an access. `fold`: so that both B and C are free ([`Place::Memory`]); otherwise B is, and A
    /// is unless it is named.
    pub(super) fn place(&mut self, plan: &Plan, access: &Access, fold: bool) -> Place {
        let e = &access.expression;
        self.addend(plan, access.group);
        let place = match (e.direct(host), &access.operand) {
            (_, Some(operand)) => {
                self.linear(A, operand, access.displacement);
                Place::Indexed(A, C, 0)
            }
            (Some(base), None) => Place::Indexed(base, C, access.displacement as i32),
            (None, None) => {
                let from = match self.a {
                    Holds::Sum(group, from) if group == access.group => from,
                    _ => {
                        self.linear(A, e, access.displacement);
                        self.a = Holds::Sum(access.group, access.relative);
                        access.relative
                    }
                };
                // Within a group's reach.
                Place::Indexed(A, C, (access.relative - from) as i32)
            }
        };
        match place {
            Place::Indexed(base, index, displacement) if fold => {
                self.hot.lea(true, A, Some(base), index, 1, displacement);
                self.current = usize::MAX;
                self.a = Holds::Nothing;
                Place::Memory(A)
            }
            place => place,
        }
    }

    /// Loads 64 bits from an operand.
    pub(super) fn load_place(&mut self, to: u8, place: Place) {
        match place {
            Place::Indexed(base, index, displacement) => self.hot.load_indexed(to, base, index, displacement),
            Place::Memory(base) => self.hot.load(to, base, 0),
            Place::Based(base, displacement) => self.hot.load(to, base, displacement),
            Place::Register(_) => unreachable!("an access is a place in guest memory"),
        }
    }

    /// Turns the linear address in A into a host address, or goes the slow way. For system instructions.
    pub(super) fn check(&mut self, size: usize, write: bool) {
        let keep = self.before_clobber();
        if keep {
            Self::keep_flags(&mut self.hot);
        }
        let from = Self::compare(&mut self.hot, self.bmi2, size as i64, write, true);
        self.forget();
        self.hot.op_mem(0x03, A, B, offset_of!(TlbEntry, addend) as i32);
        if keep {
            Self::restore_flags(&mut self.hot);
        }
        self.slow.push((from, keep));
        self.current = usize::MAX;
    }

    /// A = host address of the 8 bytes below RSP, checked for writing.
    pub(super) fn push_place(&mut self) {
        self.hot.lea(true, A, Some(SP), 4, 1, -8);
        self.check(8, true);
    }
}

/// Offset of a slot's tag for reading or writing.
fn tag_of(write: bool) -> i32 {
    let tag = if write { offset_of!(TlbEntry, tag_w) } else { offset_of!(TlbEntry, tag_r) };
    tag as i32
}

/// Offset of a segment's base in the VP block.
pub(super) fn segment_base(seg: usize) -> usize {
    offset_of!(VpBlock, segments) + size_of::<Segment>() * seg + offset_of!(Segment, base)
}
