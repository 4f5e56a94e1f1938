//! Operands: for each kind of them that instructions share, how they go into the compact form, and which function
//! executes it.

use super::op::*;
use super::{alu, bits, data};
use crate::vp::CodeSize;
use iced_x86::{Code, ConditionCode, Instruction, OpKind, Register};

/// Picks a function by operand size in bytes.
macro_rules! by_size {
    ($size:expr, $t:ident => $f:expr) => {
        match $size {
            1 => {
                type $t = u8;
                $f as OpFn
            }
            2 => {
                type $t = u16;
                $f as OpFn
            }
            4 => {
                type $t = u32;
                $f as OpFn
            }
            8 => {
                type $t = u64;
                $f as OpFn
            }
            _ => return None,
        }
    };
}
/// Picks a function by a run-time bool.
macro_rules! by_bool {
    ($b:expr, $c:ident => $f:expr) => {
        if $b {
            const $c: bool = true;
            $f as OpFn
        } else {
            const $c: bool = false;
            $f as OpFn
        }
    };
}
/// Picks a function by condition code.
macro_rules! by_condition {
    ($cc:expr, $c:ident => $f:expr) => {
        by_condition!(@ $cc, $c, $f, 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15)
    };
    (@ $cc:expr, $c:ident, $f:expr, $($n:literal)*) => {
        match $cc {
            $($n => {
                const $c: u8 = $n;
                $f as OpFn
            })*
            _ => return None,
        }
    };
}

pub(super) use {by_bool, by_condition, by_size};

/// Condition number as in the low four bits of the opcode.
pub(super) fn condition_number(i: &Instruction) -> Option<u8> {
    Some(match i.condition_code() {
        ConditionCode::o => 0,
        ConditionCode::no => 1,
        ConditionCode::b => 2,
        ConditionCode::ae => 3,
        ConditionCode::e => 4,
        ConditionCode::ne => 5,
        ConditionCode::be => 6,
        ConditionCode::a => 7,
        ConditionCode::s => 8,
        ConditionCode::ns => 9,
        ConditionCode::p => 10,
        ConditionCode::np => 11,
        ConditionCode::l => 12,
        ConditionCode::ge => 13,
        ConditionCode::le => 14,
        ConditionCode::g => 15,
        ConditionCode::None => return None,
    })
}

/// Everything that the rules below look at.
pub(super) struct Form<'a> {
    pub i: &'a Instruction,
    pub code: CodeSize,
    pub op: Op,
}

impl Form<'_> {
    pub fn kind(&self, n: u32) -> OpKind {
        if n < self.i.op_count() { self.i.op_kind(n) } else { OpKind::FarBranch32 }
    }
    pub fn is_memory(&self, n: u32) -> bool {
        self.kind(n) == OpKind::Memory
    }
    pub fn is_register(&self, n: u32) -> bool {
        self.kind(n) == OpKind::Register
    }
    /// Offset of a register operand.
    pub fn register(&self, n: u32) -> Option<u8> {
        if !self.is_register(n) {
            return None;
        }
        register_offset(self.i.op_register(n))
    }
    /// Size of a register or memory operand in bytes.
    pub fn size(&self, n: u32) -> u8 {
        if self.is_register(n) { self.i.op_register(n).size() as u8 } else { self.i.memory_size().size() as u8 }
    }
    pub fn is_immediate(&self, n: u32) -> bool {
        n < self.i.op_count() && self.i.try_immediate(n).is_ok()
    }
    pub fn memory(&mut self) -> Option<()> {
        set_memory(&mut self.op, self.i, self.code)
    }
    /// Destination register in `a`, source register in `b` or memory: returns whether it is memory.
    pub fn register_and_source(&mut self, source: u32) -> Option<bool> {
        self.op.a = self.register(0)?;
        self.op.size = self.size(source);
        if self.is_memory(source) {
            self.memory()?;
            Some(true)
        } else {
            self.op.b = self.register(source)?;
            Some(false)
        }
    }
    pub fn set(&mut self, run: OpFn) -> Option<()> {
        self.op.run = run;
        Some(())
    }
    pub fn long(&self) -> bool {
        self.code == CodeSize::Bits64
    }

    pub fn binary<O: alu::Binary>(&mut self) -> Option<()> {
        self.op.size = self.size(0);
        let size = self.op.size;
        let locked = self.op.flags & flag::LOCK != 0;
        if self.is_memory(0) {
            self.memory()?;
            if self.is_immediate(1) {
                self.op.imm = self.i.immediate(1);
                return if locked {
                    self.set(by_size!(size, T => alu::lock::<O, T, true>))
                } else {
                    self.set(by_size!(size, T => alu::mi::<O, T>))
                };
            }
            self.op.a = self.register(1)?;
            return if locked {
                self.set(by_size!(size, T => alu::lock::<O, T, false>))
            } else {
                self.set(by_size!(size, T => alu::mr::<O, T>))
            };
        }
        self.op.a = self.register(0)?;
        if self.is_memory(1) {
            self.memory()?;
            self.set(by_size!(size, T => alu::rm::<O, T>))
        } else if self.is_immediate(1) {
            self.op.imm = self.i.immediate(1);
            self.set(by_size!(size, T => alu::ri::<O, T>))
        } else {
            self.op.b = self.register(1)?;
            self.set(by_size!(size, T => alu::rr::<O, T>))
        }
    }

    pub fn unary<O: alu::Unary>(&mut self) -> Option<()> {
        self.op.size = self.size(0);
        let size = self.op.size;
        if self.is_memory(0) {
            self.memory()?;
            return if self.op.flags & flag::LOCK != 0 {
                self.set(by_size!(size, T => alu::un_lock::<O, T>))
            } else {
                self.set(by_size!(size, T => alu::un_m::<O, T>))
            };
        }
        self.op.a = self.register(0)?;
        self.set(by_size!(size, T => alu::un_r::<O, T>))
    }

    pub fn shift<O: alu::Shift>(&mut self) -> Option<()> {
        self.op.size = self.size(0);
        let size = self.op.size;
        let cl = !self.is_immediate(1);
        if !cl {
            self.op.imm = self.i.immediate(1);
        }
        if self.is_memory(0) {
            self.memory()?;
            self.set(by_bool!(cl, CL => by_size!(size, T => alu::sh_m::<O, T, CL>)))
        } else {
            self.op.a = self.register(0)?;
            self.set(by_bool!(cl, CL => by_size!(size, T => alu::sh_r::<O, T, CL>)))
        }
    }

    /// MUL, IMUL, DIV, IDIV with one operand: source in `b` or memory.
    pub fn one_source(&mut self) -> Option<(u8, bool)> {
        let size = self.size(0);
        self.op.size = size;
        if self.is_memory(0) {
            self.memory()?;
            Some((size, true))
        } else {
            self.op.b = self.register(0)?;
            Some((size, false))
        }
    }

    pub fn mov(&mut self) -> Option<()> {
        let i = self.i;
        let segment = |r: Register| r.is_segment_register();
        if self.is_register(0) && segment(i.op0_register()) {
            self.op.b = sreg_number(i.op0_register()) as u8;
            return if self.is_memory(1) {
                self.memory()?;
                self.set(data::mov_to_sreg::<true>)
            } else {
                self.op.a = self.register(1)?;
                self.set(data::mov_to_sreg::<false>)
            };
        }
        if self.is_register(1) && segment(i.op1_register()) {
            self.op.b = sreg_number(i.op1_register()) as u8;
            self.op.size = self.size(0);
            return if self.is_memory(0) {
                self.memory()?;
                self.set(data::mov_from_sreg::<true>)
            } else {
                self.op.a = self.register(0)?;
                self.set(data::mov_from_sreg::<false>)
            };
        }
        let size = self.size(0);
        self.op.size = size;
        // Accumulator and absolute address: the address may have 64 bits.
        if matches!(
            i.code(),
            Code::Mov_AL_moffs8 | Code::Mov_AX_moffs16 | Code::Mov_EAX_moffs32 | Code::Mov_RAX_moffs64
        ) || matches!(
            i.code(),
            Code::Mov_moffs8_AL | Code::Mov_moffs16_AX | Code::Mov_moffs32_EAX | Code::Mov_moffs64_RAX
        ) {
            let store = self.is_memory(0);
            let size = self.size(if store { 1 } else { 0 });
            let addr = address_size(i, self.code);
            set_segment(&mut self.op, sreg_number(i.memory_segment()), self.code, addr);
            self.op.imm = i.memory_displacement64();
            self.op.size = size;
            return self.set(by_bool!(store, S => by_size!(size, T => data::mov_absolute::<T, S>)));
        }
        if self.is_memory(0) {
            self.memory()?;
            return if self.is_immediate(1) {
                self.op.imm = i.immediate(1);
                self.set(by_size!(size, T => data::mov_mi::<T>))
            } else {
                self.op.a = self.register(1)?;
                self.set(by_size!(size, T => data::mov_mr::<T>))
            };
        }
        // Control and debug registers are not here (`register` refuses them).
        self.op.a = self.register(0)?;
        if self.is_memory(1) {
            self.memory()?;
            self.set(by_size!(size, T => data::mov_rm::<T>))
        } else if self.is_immediate(1) {
            self.op.imm = i.immediate(1);
            self.set(by_size!(size, T => data::mov_ri::<T>))
        } else {
            self.op.b = self.register(1)?;
            self.set(by_size!(size, T => data::mov_rr::<T>))
        }
    }

    pub fn extend(&mut self, signed: bool) -> Option<()> {
        let d = self.size(0);
        let s = self.size(1);
        let memory = self.register_and_source(1)?;
        macro_rules! pick {
            ($(($dn:literal, $d:ty, $sn:literal, $s:ty))*) => {
                match (d, s, signed, memory) {
                    $(
                        ($dn, $sn, false, false) => data::movzx::<$d, $s, false> as OpFn,
                        ($dn, $sn, false, true) => data::movzx::<$d, $s, true> as OpFn,
                        ($dn, $sn, true, false) => data::movsx::<$d, $s, false> as OpFn,
                        ($dn, $sn, true, true) => data::movsx::<$d, $s, true> as OpFn,
                    )*
                    _ => return None,
                }
            };
        }
        let run = pick!((2, u16, 1, u8)(4, u32, 1, u8)(8, u64, 1, u8)(2, u16, 2, u16)(4, u32, 2, u16)(8, u64, 2, u16)(
            4, u32, 4, u32
        )(8, u64, 4, u32));
        self.set(run)
    }

    /// Operand size of a near branch, from its code.
    pub fn branch_size(&self) -> u8 {
        match self.kind(0) {
            OpKind::NearBranch16 => 2,
            OpKind::NearBranch32 => 4,
            OpKind::NearBranch64 => 8,
            _ => self.size(0),
        }
    }
    /// Fills in displacement and size of a relative branch; returns whether it is 64-bit.
    pub fn relative(&mut self) -> Option<bool> {
        self.op.flags |= flag::END;
        self.op.size = self.branch_size();
        // Decoded at IP 0: the target is relative to the instruction's start.
        let (target, bits) = match self.kind(0) {
            OpKind::NearBranch16 => (u64::from(self.i.near_branch16()), 48),
            OpKind::NearBranch32 => (u64::from(self.i.near_branch32()), 32),
            OpKind::NearBranch64 => (self.i.near_branch64(), 0),
            _ => return None,
        };
        let relative = target.wrapping_sub(self.i.len() as u64);
        self.op.imm = ((relative << bits) as i64 >> bits) as u64;
        Some(self.op.size == 8)
    }

    pub fn push(&mut self) -> Option<()> {
        let i = self.i;
        // The stack pointer's change says the operand size.
        let size = i.stack_pointer_increment().unsigned_abs() as u8;
        self.op.size = size;
        if self.is_immediate(0) {
            self.op.imm = i.immediate(0);
            return self.set(if self.long() && size == 8 { data::push_i64 } else { data::push_i });
        }
        if self.is_memory(0) {
            self.memory()?;
            return self.set(data::push_m);
        }
        let r = i.op0_register();
        if r.is_segment_register() {
            self.op.b = sreg_number(r) as u8;
            return self.set(data::push_sreg);
        }
        self.op.a = self.register(0)?;
        self.set(if self.long() && size == 8 { data::push_r64 } else { data::push_r })
    }
    pub fn pop(&mut self) -> Option<()> {
        let i = self.i;
        let size = i.stack_pointer_increment().unsigned_abs() as u8;
        self.op.size = size;
        if self.is_memory(0) {
            self.memory()?;
            return self.set(data::pop_m);
        }
        let r = i.op0_register();
        if r.is_segment_register() {
            self.op.b = sreg_number(r) as u8;
            return self.set(data::pop_sreg);
        }
        self.op.a = self.register(0)?;
        self.set(if self.long() && size == 8 { data::pop_r64 } else { data::pop_r })
    }

    pub fn bit_test(&mut self, kind: u8) -> Option<()> {
        let imm = self.is_immediate(1);
        self.op.size = self.size(0);
        let memory = self.is_memory(0);
        if memory {
            self.memory()?;
        } else {
            self.op.a = self.register(0)?;
        }
        if imm {
            self.op.imm = self.i.immediate(1);
        } else if memory {
            self.op.a = self.register(1)?;
        } else {
            self.op.b = self.register(1)?;
        }
        macro_rules! pick {
            ($($k:literal)*) => {
                match (kind, memory, imm) {
                    $(
                        ($k, false, false) => bits::bt_r::<$k, false> as OpFn,
                        ($k, false, true) => bits::bt_r::<$k, true> as OpFn,
                        ($k, true, false) => bits::bt_m::<$k, false> as OpFn,
                        ($k, true, true) => bits::bt_m::<$k, true> as OpFn,
                    )*
                    _ => return None,
                }
            };
        }
        self.set(pick!(0 1 2 3))
    }

    pub fn double_shift(&mut self, left: bool) -> Option<()> {
        self.op.size = self.size(0);
        if self.is_memory(0) {
            self.memory()?;
            self.op.size |= 0x80;
        } else {
            self.op.a = self.register(0)?;
        }
        self.op.b = self.register(1)?;
        let cl = !self.is_immediate(2);
        if !cl {
            self.op.imm = self.i.immediate(2);
        }
        self.set(by_bool!(left, L => by_bool!(cl, CL => alu::double_shift::<L, CL>)))
    }

    /// VEX forms `dest, register, source` (`register_first`) and `dest, source, register`.
    pub fn ternary(&mut self, register_first: bool) -> Option<bool> {
        let (register, source) = if register_first { (1, 2) } else { (2, 1) };
        let memory = self.register_and_source(source)?;
        self.op.size = self.size(0);
        self.op.imm = self.register(register)?.into();
        Some(memory)
    }

    /// String instructions: element and address size from the operands' kinds.
    pub fn string(&mut self, size: u8, run: OpFn) -> Option<()> {
        use OpKind as K;
        for n in 0..self.i.op_count() {
            let addr = match self.kind(n) {
                K::MemorySegSI | K::MemorySegDI | K::MemoryESDI => 2,
                K::MemorySegESI | K::MemorySegEDI | K::MemoryESEDI => 4,
                K::MemorySegRSI | K::MemorySegRDI | K::MemoryESRDI => 8,
                _ => continue,
            };
            let seg = match self.kind(n) {
                K::MemoryESDI | K::MemoryESEDI | K::MemoryESRDI if self.op.addr != 0 => continue,
                K::MemoryESDI | K::MemoryESEDI | K::MemoryESRDI => Register::ES,
                _ => self.i.memory_segment(),
            };
            set_segment(&mut self.op, sreg_number(seg), self.code, addr);
        }
        self.op.size = size;
        self.set(run)
    }
}
