//! 16- and 32-bit code: from instructions to host code, where it is not what 64-bit code becomes.
//!
//! The check of a group turns the lowest offset into a linear address (comparing with the segment's end and adding its base
//! unless it is flat), and leaves the *host address* of that byte in R11: each access of the group is then one instruction
//! with a constant displacement. An addend would not do, because guest addresses wrap at 4 GiB or 64 KiB and host addresses
//! do not.

use super::classify::{self, Kind};
use super::emit::{A, Asm, B, C, RAX, RCX, SP, cc};
use super::kernel;
use super::legacy;
use super::lower::{Cold, Holds, Lower, host, jit};
use super::memory::{Miss, Then, segment_base};
use super::plan::{Access, Base, Expression, Plan, SegmentBase};
use super::raw::{Place, Raw};
use crate::mmu::tlb::TlbEntry;
use crate::vp::VpBlock;
use iced_x86::{Instruction, Mnemonic, OpCodeOperandKind, OpKind, Register};
use std::mem::{offset_of, size_of};
use x86::regs::rflags;
use x86::segment::Segment;

/// Host RSI, for instructions that cannot name a scratch register.
const RSI: u8 = 6;
/// Host RBP.
const RBP: u8 = 5;

/// `mov reg, [base + disp]` of 2 (zero-extended) or 4 bytes.
fn load(h: &mut Asm, size: usize, to: u8, base: u8, disp: i32) {
    if size == 2 {
        h.bs(&[0x40 | (to >> 3) << 2 | base >> 3, 0x0f, 0xb7]); // movzx r32, m16
    } else {
        h.bs(&[0x40 | (to >> 3) << 2 | base >> 3, 0x8b]);
    }
    h.operand(to, base, disp);
}

/// `mov [base + disp], reg` of 2 or 4 bytes.
fn store(h: &mut Asm, size: usize, from: u8, base: u8, disp: i32) {
    if size == 2 {
        h.b(0x66);
    }
    h.bs(&[0x40 | (from >> 3) << 2 | base >> 3, 0x89]);
    h.operand(from, base, disp);
}

/// `movzx reg32, reg16`.
fn zero_extend_word(h: &mut Asm, to: u8, from: u8) {
    h.bs(&[0x40 | (to >> 3) << 2 | from >> 3, 0x0f, 0xb7, 0xc0 | (to & 7) << 3 | from & 7]);
}

/// `mov to32, from32`, or of the low 16 bits.
fn move_sized(h: &mut Asm, size: usize, to: u8, from: u8) {
    if size == 2 {
        h.b(0x66);
    }
    h.bs(&[0x40 | (from >> 3) << 2 | to >> 3, 0x89, 0xc0 | (from & 7) << 3 | to & 7]);
}

/// Takes an instruction of 16- or 32-bit code apart, as one of 64-bit code.
fn take_apart(bytes: &[u8], i: &Instruction, big: bool) -> Option<Raw> {
    let shape = classify::shape(i);
    let code = i.op_code();
    let kinds = code.op_kinds();
    let mut raw = Raw::parse_legacy(bytes, shape.modrm, big)?;
    if raw.map == 0 && raw.vex.is_none() {
        match raw.opcode {
            // INC and DEC
            0x40..=0x4f => {
                raw.modrm = Some(0xc0 | (raw.opcode & 8) | raw.opcode & 7);
                raw.opcode = 0xff;
            }
            0x82 => raw.opcode = 0x80,
            0xa0..=0xa3 => {
                // MOV of the accumulator with an address: the other form, with ModRM.
                raw.opcode = [0x8a, 0x8b, 0x88, 0x89][usize::from(raw.opcode & 3)];
                raw.modrm = Some(5);
                raw.imm_len = 0;
            }
            _ => {}
        }
    }
    if raw.vex.is_some() {
        // Ignored outside 64-bit mode: W where a general register or its memory is concerned, and the fourth bits of registers.
        let general = shape.reg || shape.rm || shape.vvvv;
        raw.rex &= if general { 0x46 } else { 0x4e };
        raw.vex = raw.vex.map(|v| v & 0x7f | 0x40);
        let in_immediate = |k: &OpCodeOperandKind| matches!(k, OpCodeOperandKind::xmm_is4 | OpCodeOperandKind::ymm_is4);
        if kinds.iter().any(in_immediate) && raw.imm_len > 0 {
            raw.imm[usize::from(raw.imm_len) - 1] &= 0x7f;
        }
    } else if code.mandatory_prefix() != iced_x86::MandatoryPrefix::P66 {
        match code.operand_size() {
            16 => raw.p66 = true,
            32 => raw.p66 = false,
            _ => {}
        }
    }
    Some(raw)
}

impl Lower<'_> {
    /// Loads a register with the offset `expression + displacement` in its segment, truncated. May destroy nothing else.
    fn offset_into(&mut self, to: u8, e: &Expression, displacement: i64) {
        let h = &mut self.hot;
        // Sums are modulo 2^32, or 2^16.
        let d = displacement as i32;
        let base = match e.base {
            Base::Register(r) => host(r),
            _ => None,
        };
        let index = e.index.and_then(|(r, scale)| host(r).map(|r| (r, scale)));
        match (base, index) {
            (None, None) => h.mov_imm(to, if e.word { u64::from(d as u16) } else { u64::from(d as u32) }),
            (base, index) => {
                let (x, scale) = index.unwrap_or((4, 1));
                h.lea(false, to, base, x, scale, d);
                if e.word {
                    zero_extend_word(h, to, to);
                }
            }
        }
    }

    /// From an offset in A to a linear address in A. Gives the jump that is taken if the segment ends before `span` bytes.
    /// Destroys B and the flags.
    fn segment_check(&mut self, e: &Expression, span: i64) -> Option<u64> {
        let h = &mut self.hot;
        match e.segment {
            SegmentBase::Limited(seg) => {
                let ends = if e.word { jit!(ends16) } else { jit!(ends) };
                h.lea(true, B, Some(A), 4, 1, span as i32);
                h.gs(true, 0x3b, B, ends + 8 * usize::from(seg));
                let outside = h.jcc(cc::A, 0);
                h.load_gs(B, segment_base(usize::from(seg)));
                h.lea(false, A, Some(A), B, 1, 0);
                Some(outside)
            }
            _ if e.word => {
                h.alu_imm(true, 7, A, 0x1_0000 - span as i32);
                Some(h.jcc(cc::A, 0))
            }
            _ => None,
        }
    }

    /// [`Lower::check_group`].
    pub(super) fn check_segmented(&mut self, plan: &Plan, number: usize, at: &Instruction) {
        let g = &plan.groups[number];
        let keep = self.before_clobber();
        self.offset_into(A, &g.expression, g.low);
        if keep {
            Self::keep_flags(&mut self.hot);
        }
        let outside = self.segment_check(&g.expression, g.span);
        let retry = self.hot.here();
        let from = Self::compare(&mut self.hot, self.bmi2, g.span, g.write, true);
        self.hot.load(C, B, offset_of!(TlbEntry, addend) as i32);
        let found = self.hot.here();
        if keep {
            Self::restore_flags(&mut self.hot);
        }
        let body = (self.hot.bytes.len(), 0);
        self.hot.lea(true, C, Some(C), A, 1, 0);
        if let Some(slot) = g.slot {
            self.hot.store_gs(C, jit!(addends) + 8 * slot);
        }
        self.current = number;
        self.forget();
        let single = g.is_single();
        let then = if single {
            let i = &plan.steps[g.first].i;
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
        if single {
            self.open_misses.push(self.cold.len());
        }
        let (span, write) = (g.span as u32, g.write);
        self.cold.push(Cold::Miss(Miss {
            from,
            outside,
            retry,
            found,
            address: None,
            span,
            write,
            keep,
            moved: None,
            recall: None,
            then,
        }));
    }

    /// The host's operand for an access.
    fn pointer(&mut self, plan: &Plan, access: &Access) -> i32 {
        self.addend(plan, access.group);
        // Within a group's reach.
        (access.relative - plan.groups[access.group].relative) as i32
    }

    /// Turns an address into a host address in A, or goes the slow way. For system instructions. `upwards`: only if DF is clear.
    fn check_one(&mut self, e: &Expression, displacement: i64, size: usize, write: bool, upwards: bool) {
        let keep = self.before_clobber();
        self.offset_into(A, e, displacement);
        if keep {
            Self::keep_flags(&mut self.hot);
        }
        let downwards = upwards.then(|| {
            let h = &mut self.hot;
            h.bs(&[0x65, 0xf6, 0x04, 0x25]); // test byte gs:[rflags + 1], DF
            h.d(offset_of!(VpBlock, rflags) as u32 + 1);
            h.b((rflags::DF >> 8) as u8);
            h.jcc(cc::NE, 0)
        });
        let outside = self.segment_check(e, size as i64);
        let from = Self::compare(&mut self.hot, self.bmi2, size as i64, write, true);
        self.forget();
        self.hot.op_mem(0x03, A, B, offset_of!(TlbEntry, addend) as i32);
        if keep {
            Self::restore_flags(&mut self.hot);
        }
        self.slow.extend(downwards.into_iter().chain(outside).map(|at| (at, keep)));
        self.slow.push((from, keep));
        self.current = usize::MAX;
    }

    /// The linear address of the memory operand of a system instruction in A: in a flat segment.
    pub(super) fn flat_address(&mut self, i: &Instruction) {
        if let Some(facts) = self.origin.facts {
            let (e, displacement) = legacy::expression_of(i, &facts);
            self.offset_into(A, &e, displacement);
            self.forget();
        }
    }

    /// An instruction of 16- or 32-bit code, if it is not translated as in 64-bit code.
    pub(super) fn segmented(&mut self, plan: &Plan, n: usize) -> bool {
        let (i, kind) = (&plan.steps[n].i, plan.steps[n].kind);
        let size = legacy::stack_size(i);
        match kind {
            Kind::Plain | Kind::Vector(_) => self.native_segmented(plan, n),
            Kind::Lea => self.lea_segmented(i),
            Kind::Push => self.push_segmented(plan, n),
            Kind::Pop => {
                let d = self.pointer(plan, &plan.accesses_of(n)[0]);
                let to = host(number(i.op0_register())).unwrap_or(A);
                if size == 2 {
                    self.hot.bs(&[0x66, 0x41 | (to >> 3) << 2, 0x8b]);
                    self.hot.operand(to, C, d);
                } else {
                    load(&mut self.hot, size, to, C, d);
                }
                if to != SP {
                    self.move_stack(size as i32);
                }
            }
            Kind::Leave => {
                let d = self.pointer(plan, &plan.accesses_of(n)[0]);
                self.hot.lea(false, SP, Some(RBP), 4, 1, 4);
                load(&mut self.hot, 4, RBP, C, d);
            }
            Kind::Ret => {
                let d = self.pointer(plan, &plan.accesses_of(n)[0]);
                load(&mut self.hot, size, A, C, d);
                self.check_target(i, size);
                let extra = if i.op_count() == 1 { i32::from(i.immediate16()) } else { 0 };
                self.move_stack(size as i32 + extra);
                self.hot.b(0xc3);
            }
            Kind::Loop => self.loop_segmented(i),
            _ => return false,
        }
        true
    }

    /// Adds to the stack pointer, and keeps the flags. The upper 16 bits of a 16-bit one stay.
    fn move_stack(&mut self, by: i32) {
        if !self.origin.facts.is_some_and(|f| f.stack32) {
            self.hot.b(0x66);
        }
        self.hot.lea(false, SP, Some(SP), 4, 1, by);
    }

    /// The target of a branch is in A: leaves the instruction to the interpreter if it lies outside the code segment.
    fn check_target(&mut self, i: &Instruction, size: usize) {
        let Some(facts) = self.origin.facts else { return };
        let limit = if size == 2 { 0xffff } else { u32::MAX };
        if facts.code_limit >= limit {
            return;
        }
        let keep = self.before_clobber();
        if keep {
            Self::keep_flags(&mut self.hot);
        }
        self.hot.alu_imm(false, 7, A, facts.code_limit as i32);
        let from = self.hot.jcc(cc::A, 0);
        if keep {
            Self::restore_flags(&mut self.hot);
        }
        // Nothing of the block can follow, wherever the exception leads.
        let (rip, len) = (i.ip(), i.len() as u8);
        self.cold.push(Cold::Interpret { from: vec![(from, keep)], rip, len, light: true, resume: 0, recall: None });
    }

    /// A = target of an indirect branch.
    pub(super) fn segmented_target(&mut self, plan: &Plan, n: usize) {
        use iced_x86::Code;
        let i = &plan.steps[n].i;
        let size = if matches!(i.code(), Code::Jmp_rm16 | Code::Call_rm16) { 2 } else { 4 };
        if i.op0_kind() == OpKind::Register {
            let from = host(number(i.op0_register())).unwrap_or(A);
            if size == 2 { zero_extend_word(&mut self.hot, A, from) } else { move_sized(&mut self.hot, 4, A, from) }
        } else {
            let d = self.pointer(plan, &plan.accesses_of(n)[0]);
            load(&mut self.hot, size, A, C, d);
        }
        self.check_target(i, size);
        self.forget();
    }

    /// Stores the return address and pushes its complement, as 64-bit code does.
    pub(super) fn push_return_segmented(&mut self, plan: &Plan, n: usize) {
        let Some(stack) = plan.accesses_of(n).last() else { return };
        let size = legacy::stack_size(&plan.steps[n].i);
        let d = self.pointer(plan, stack);
        // One of 16 bits is only pushed where it is not larger.
        self.code_address(B, plan.steps[n].i.next_ip());
        store(&mut self.hot, size, B, C, d);
        self.move_stack(-(size as i32));
        self.hot.bs(&[0x49, 0xf7, 0xd2]); // not r10
        self.hot.bs(&[0x41, 0x52]); // push r10
    }

    fn push_segmented(&mut self, plan: &Plan, n: usize) {
        let i = &plan.steps[n].i;
        let size = legacy::stack_size(i);
        let accesses = plan.accesses_of(n);
        let Some(stack) = accesses.last() else { return };
        match i.op0_kind() {
            OpKind::Register if i.op0_register().is_segment_register() => {
                let d = self.pointer(plan, stack);
                let selector = offset_of!(VpBlock, segments)
                    + size_of::<Segment>() * i.op0_register().number()
                    + offset_of!(Segment, selector);
                self.hot.bs(&[0x65, 0x44, 0x0f, 0xb7, 0x14, 0x25]); // movzx r10d, word gs:[selector]
                self.hot.d(selector as u32);
                self.b = Holds::Nothing;
                store(&mut self.hot, size, B, C, d);
            }
            OpKind::Register => {
                let d = self.pointer(plan, stack);
                let from = host(number(i.op0_register())).unwrap_or(A);
                store(&mut self.hot, size, from, C, d);
            }
            OpKind::Memory => {
                let d = self.pointer(plan, &accesses[0]);
                load(&mut self.hot, size, B, C, d);
                self.b = Holds::Nothing;
                let d = self.pointer(plan, stack);
                store(&mut self.hot, size, B, C, d);
            }
            _ => {
                let d = self.pointer(plan, stack);
                let value = i.immediate(0);
                if size == 2 {
                    self.hot.b(0x66);
                }
                self.hot.bs(&[0x41, 0xc7]);
                self.hot.operand(0, C, d);
                self.hot.bs(&(value as u32).to_le_bytes()[..size]);
            }
        }
        self.move_stack(-(size as i32));
    }

    fn lea_segmented(&mut self, i: &Instruction) {
        let Some(facts) = self.origin.facts else { return };
        let (e, displacement) = legacy::expression_of(i, &facts);
        let to = host(number(i.op0_register())).unwrap_or(A);
        if i.op0_register().size() == 4 {
            self.offset_into(to, &e, displacement);
        } else {
            self.offset_into(A, &e, displacement);
            move_sized(&mut self.hot, 2, to, A);
            self.a = Holds::Nothing;
        }
    }

    /// The instruction itself, on host operands.
    fn native_segmented(&mut self, plan: &Plan, n: usize) {
        let (i, kind) = (&plan.steps[n].i, plan.steps[n].kind);
        let big = self.origin.facts.is_some_and(|f| f.big);
        let bytes = self.bytes(i).to_vec();
        let Some(mut raw) = take_apart(&bytes, i, big) else {
            self.call_interpreter(i);
            self.current = usize::MAX;
            self.forget();
            return;
        };
        let access = plan.accesses_of(n).first().copied();
        let stack = legacy::names_stack_pointer(i);
        let old = raw.map == 0 && matches!(bytes.iter().find(|b| !is_prefix(**b)), Some(0x40..=0x4f | 0x82));
        if access.is_none() && big && !stack && !old && raw.vex.is_none() {
            self.site(i, kind);
            self.hot.bs(&bytes);
            return;
        }
        let shape = classify::shape(i);
        if stack {
            // No byte register is named beside it, so number 4 is the stack pointer wherever it stands.
            let was_opcode = raw.opcode == 0xff && old;
            if shape.reg && raw.reg() == 4 {
                raw.set_reg(SP);
            }
            if shape.opcode && !was_opcode && raw.opcode_reg() == 4 {
                raw.set_opcode_reg(SP);
            }
            if shape.vvvv && raw.vvvv() == 4 {
                raw.set_vvvv(SP);
            }
        }
        let Some(access) = access else {
            let rm = raw.rm();
            let rm = if stack && (shape.rm || old && raw.opcode == 0xff) && rm == 4 { SP } else { rm };
            self.site(i, kind);
            raw.emit(&mut self.hot.bytes, Place::Register(rm));
            return;
        };
        let d = self.pointer(plan, &access);
        if legacy::names_high(i) {
            // AH, CH, DH and BH do not go with the prefix that R11 needs.
            self.hot.bs(&[0x49, 0x87, 0xf3]); // xchg r11, rsi
            raw.emit(&mut self.hot.bytes, Place::Based(RSI, d));
            self.hot.bs(&[0x49, 0x87, 0xf3]);
            return;
        }
        self.site(i, kind);
        raw.emit(&mut self.hot.bytes, Place::Based(C, d));
    }

    /// LOOP and its relatives, which leave the flags alone: the host's own with ECX.
    fn loop_segmented(&mut self, i: &Instruction) {
        let opcode = match i.mnemonic() {
            Mnemonic::Loop => 0xe2,
            Mnemonic::Loope => 0xe1,
            Mnemonic::Loopne => 0xe0,
            _ => 0xe3,
        };
        let word = {
            use iced_x86::Code::*;
            matches!(
                i.code(),
                Loop_rel8_16_CX
                    | Loop_rel8_32_CX
                    | Loope_rel8_16_CX
                    | Loope_rel8_32_CX
                    | Loopne_rel8_16_CX
                    | Loopne_rel8_32_CX
                    | Jcxz_rel8_16
                    | Jcxz_rel8_32
            )
        };
        let jumps_on_zero = opcode == 0xe3;
        // With a 16-bit counter the upper half waits in A.
        let finish = |h: &mut Asm| {
            if word && !jumps_on_zero {
                move_sized(h, 2, A, RCX);
            }
            if word {
                h.mov(RCX, A);
            }
        };
        if word {
            self.forget();
            self.hot.mov(A, RCX);
            zero_extend_word(&mut self.hot, RCX, RCX);
        }
        self.hot.b(0x67);
        let taken = self.hot.short(opcode);
        finish(&mut self.hot);
        let over = self.hot.jmp(0);
        self.hot.close(taken);
        finish(&mut self.hot);
        let target = i.near_branch_target();
        if self.inside(target) {
            if target <= i.ip() {
                self.poll(target, self.taken != 0);
            }
            self.jump_inside(target);
        } else {
            self.leave_page(target, false, target <= i.ip());
        }
        let here = self.hot.here();
        self.hot.patch(over, here);
        self.forget();
    }

    /// LODS, STOS, MOVS, SCAS and CMPS of one element, upwards.
    pub(super) fn element(&mut self, i: &Instruction) {
        let Some(facts) = self.origin.facts else { return };
        let size = i.memory_size().size();
        let (source, destination) = legacy::string_expressions(i, &facts);
        let writes = matches!(i.op0_kind(), OpKind::MemoryESDI | OpKind::MemoryESEDI);
        if let Some(e) = &source {
            self.check_one(e, 0, size, false, true);
            if destination.is_some() {
                self.hot.store_gs(A, jit!(temporary));
            }
        }
        if let Some(e) = &destination {
            self.check_one(e, 0, size, writes, source.is_none());
        }
        let h = &mut self.hot;
        let sized = |h: &mut Asm, op: u8, reg: u8, base: u8| {
            if size == 2 {
                h.b(0x66);
            }
            h.bs(&[0x40 | (reg >> 3) << 2 | base >> 3, op | u8::from(size != 1)]);
            h.operand(reg, base, 0);
        };
        // MOV to and from memory, CMP with memory.
        const LOAD: u8 = 0x8a;
        const STORE: u8 = 0x88;
        const COMPARE: u8 = 0x3a;
        match i.mnemonic() {
            Mnemonic::Lodsb | Mnemonic::Lodsw | Mnemonic::Lodsd => sized(h, LOAD, RAX, A),
            Mnemonic::Stosb | Mnemonic::Stosw | Mnemonic::Stosd => sized(h, STORE, RAX, A),
            Mnemonic::Scasb | Mnemonic::Scasw | Mnemonic::Scasd => sized(h, COMPARE, RAX, A),
            mnemonic => {
                h.load_gs(B, jit!(temporary));
                sized(h, LOAD, C, B);
                let moves = matches!(mnemonic, Mnemonic::Movsb | Mnemonic::Movsw | Mnemonic::Movsd);
                sized(h, if moves { STORE } else { COMPARE }, C, A);
            }
        }
        for e in [source, destination].into_iter().flatten() {
            if let Base::Register(r) = e.base {
                if e.word {
                    self.hot.b(0x66);
                }
                self.hot.lea(false, r, Some(r), 4, 1, size as i32);
            }
        }
    }

    /// PUSHF and PUSHFD. What follows may read the flags: they are in the host's register and stay there.
    pub(super) fn pushf_segmented(&mut self, i: &Instruction) {
        let Some(facts) = self.origin.facts else { return };
        let size = legacy::stack_size(i);
        self.check_one(&legacy::stack(&facts), -(size as i64), size, true, false);
        let h = &mut self.hot;
        h.pushf();
        h.bs(&[0x41, 0x5a]); // pop r10
        let keep = self.before_clobber();
        let h = &mut self.hot;
        if keep {
            Self::keep_flags(h);
        }
        h.alu_imm(false, 4, B, rflags::STATUS as i32);
        h.load_gs(C, offset_of!(VpBlock, rflags));
        h.alu_imm(true, 4, C, !((rflags::STATUS | rflags::VM | rflags::RF) as i32));
        h.bs(&[0x4d, 0x09, 0xda]); // or r10, r11
        store(h, size, B, A, 0);
        if keep {
            Self::restore_flags(h);
        }
        self.move_stack(-(size as i32));
    }

    /// POPF and POPFD at level 0: only the status flags and IF change, or it goes the slow way.
    pub(super) fn popf_segmented(&mut self, i: &Instruction) {
        let Some(facts) = self.origin.facts else { return };
        let size = legacy::stack_size(i);
        self.check_one(&legacy::stack(&facts), 0, size, false, false);
        // All flags are overwritten: nothing to keep.
        let h = &mut self.hot;
        load(h, size, B, A, 0);
        h.load_gs(C, offset_of!(VpBlock, rflags));
        h.mov(A, C);
        h.bs(&[0x4d, 0x31, 0xd3]); // xor r11, r10
        let other = rflags::TF | rflags::DF | rflags::NT | rflags::IOPL;
        let other = if size == 2 { other } else { other | rflags::AC | rflags::ID };
        h.bs(&[0x41, 0xf7, 0xc3]); // test r11d, imm32
        h.d(other as u32);
        let different = h.jcc(cc::NE, 0);
        let waits = Self::anything_waits(h);
        h.alu_imm(true, 4, A, !(rflags::IF as i32));
        h.mov(C, B);
        h.alu_imm(false, 4, C, rflags::IF as i32);
        h.bs(&[0x4d, 0x09, 0xd9]); // or r9, r11
        h.store_gs(A, offset_of!(VpBlock, rflags));
        // The stack pointer moves without touching the flags.
        self.move_stack(size as i32);
        Self::flags_from_b(&mut self.hot);
        self.slow.push((different, false));
        self.slow.push((waits, false));
    }

    /// The host's status flags from RFLAGS in B.
    pub(super) fn flags_from_b(h: &mut Asm) {
        h.store_gs(RAX, jit!(rax));
        h.bs(&[0x44, 0x89, 0xd0]); // mov eax, r10d
        h.bs(&[0x41, 0xc1, 0xea, 11]); // shr r10d, 11
        h.bs(&[0x41, 0x83, 0xe2, 1]); // and r10d, 1
        h.bs(&[0x88, 0xc4]); // mov ah, al
        h.bs(&[0x41, 0x80, 0xc2, 0x7f]); // add r10b, 0x7f: OF
        h.b(0x9e); // sahf
        h.load_gs(RAX, jit!(rax));
    }
}

fn is_prefix(b: u8) -> bool {
    matches!(b, 0x26 | 0x2e | 0x36 | 0x3e | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3)
}

fn number(r: Register) -> u8 {
    super::lower::number(r)
}
