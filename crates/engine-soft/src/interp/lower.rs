//! From a decoded instruction to its compact form.

use super::op::*;
use super::{alu, atomic, bits, branch, data, misc, string};
use crate::features::Features;
use crate::vp::CodeSize;
use iced_x86::{Code, ConditionCode, FlowControl, Instruction, Mnemonic, OpKind, Register};
use x86::regs::rflags;

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

/// Condition number as in the low four bits of the opcode.
fn condition_number(i: &Instruction) -> Option<u8> {
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
struct Form<'a> {
    i: &'a Instruction,
    code: CodeSize,
    op: Op,
}

impl Form<'_> {
    fn kind(&self, n: u32) -> OpKind {
        if n < self.i.op_count() { self.i.op_kind(n) } else { OpKind::FarBranch32 }
    }
    fn is_memory(&self, n: u32) -> bool {
        self.kind(n) == OpKind::Memory
    }
    fn is_register(&self, n: u32) -> bool {
        self.kind(n) == OpKind::Register
    }
    /// Offset of a register operand.
    fn register(&self, n: u32) -> Option<u8> {
        if !self.is_register(n) {
            return None;
        }
        register_offset(self.i.op_register(n))
    }
    /// Size of a register or memory operand in bytes.
    fn size(&self, n: u32) -> u8 {
        if self.is_register(n) { self.i.op_register(n).size() as u8 } else { self.i.memory_size().size() as u8 }
    }
    fn is_immediate(&self, n: u32) -> bool {
        n < self.i.op_count() && self.i.try_immediate(n).is_ok()
    }
    fn memory(&mut self) -> Option<()> {
        set_memory(&mut self.op, self.i, self.code)
    }
    /// Destination register in `a`, source register in `b` or memory: returns whether it is memory.
    fn register_and_source(&mut self, source: u32) -> Option<bool> {
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
    fn set(&mut self, run: OpFn) -> Option<()> {
        self.op.run = run;
        Some(())
    }
    fn long(&self) -> bool {
        self.code == CodeSize::Bits64
    }

    fn binary<O: alu::Binary>(&mut self) -> Option<()> {
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

    fn unary<O: alu::Unary>(&mut self) -> Option<()> {
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

    fn shift<O: alu::Shift>(&mut self) -> Option<()> {
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
    fn one_source(&mut self) -> Option<(u8, bool)> {
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

    fn mov(&mut self) -> Option<()> {
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

    fn extend(&mut self, signed: bool) -> Option<()> {
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
    fn branch_size(&self) -> u8 {
        match self.kind(0) {
            OpKind::NearBranch16 => 2,
            OpKind::NearBranch32 => 4,
            OpKind::NearBranch64 => 8,
            _ => self.size(0),
        }
    }
    /// Fills in displacement and size of a relative branch; returns whether it is 64-bit.
    fn relative(&mut self) -> Option<bool> {
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

    fn push(&mut self) -> Option<()> {
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
    fn pop(&mut self) -> Option<()> {
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

    fn bit_test(&mut self, kind: u8) -> Option<()> {
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

    fn double_shift(&mut self, left: bool) -> Option<()> {
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
    fn ternary(&mut self, register_first: bool) -> Option<bool> {
        let (register, source) = if register_first { (1, 2) } else { (2, 1) };
        let memory = self.register_and_source(source)?;
        self.op.size = self.size(0);
        self.op.imm = self.register(register)?.into();
        Some(memory)
    }

    /// String instructions: element and address size from the operands' kinds.
    fn string(&mut self, size: u8, run: OpFn) -> Option<()> {
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

/// The compact form of a general-purpose instruction; `None` if another module executes it.
///
/// `i` is decoded at IP 0, passed [`Features::allows`], and is not an invalid instruction.
pub fn lower(i: &Instruction, code: CodeSize, features: &Features) -> Option<Op> {
    use Mnemonic as M;
    let mut f = Form { i, code, op: bare(misc::undefined, i, code) };
    let long = f.long();
    match i.mnemonic() {
        M::Add => f.binary::<alu::Add>()?,
        M::Or => f.binary::<alu::Or>()?,
        M::Adc => f.binary::<alu::Adc>()?,
        M::Sbb => f.binary::<alu::Sbb>()?,
        M::And => f.binary::<alu::And>()?,
        M::Sub => f.binary::<alu::Sub>()?,
        M::Xor => f.binary::<alu::Xor>()?,
        M::Cmp => f.binary::<alu::Cmp>()?,
        M::Test => f.binary::<alu::Test>()?,
        M::Inc => f.unary::<alu::Inc>()?,
        M::Dec => f.unary::<alu::Dec>()?,
        M::Neg => f.unary::<alu::Neg>()?,
        M::Not => f.unary::<alu::Not>()?,
        M::Rol => f.shift::<alu::Rol>()?,
        M::Ror => f.shift::<alu::Ror>()?,
        M::Rcl => f.shift::<alu::Rcl>()?,
        M::Rcr => f.shift::<alu::Rcr>()?,
        M::Shl | M::Sal => f.shift::<alu::Shl>()?,
        M::Shr => f.shift::<alu::Shr>()?,
        M::Sar => f.shift::<alu::Sar>()?,
        M::Shld => f.double_shift(true)?,
        M::Shrd => f.double_shift(false)?,
        M::Mul => {
            let (size, memory) = f.one_source()?;
            f.set(by_bool!(memory, MEM => by_size!(size, T => alu::mul::<T, false, MEM>)))?;
        }
        M::Imul if i.op_count() == 1 => {
            let (size, memory) = f.one_source()?;
            f.set(by_bool!(memory, MEM => by_size!(size, T => alu::mul::<T, true, MEM>)))?;
        }
        M::Imul => {
            let imm = i.op_count() == 3;
            let memory = f.register_and_source(1)?;
            let size = f.size(0);
            f.op.size = size;
            if imm {
                f.op.imm = i.immediate(2);
            }
            f.set(by_bool!(imm, IMM => by_bool!(memory, MEM => by_size!(size, T => alu::imul::<T, MEM, IMM>))))?;
        }
        M::Div => {
            let (size, memory) = f.one_source()?;
            f.set(by_bool!(memory, MEM => by_size!(size, T => alu::div::<T, false, MEM>)))?;
        }
        M::Idiv => {
            let (size, memory) = f.one_source()?;
            f.set(by_bool!(memory, MEM => by_size!(size, T => alu::div::<T, true, MEM>)))?;
        }
        M::Mulx => {
            // Destinations: high, low; then the source.
            f.op.a = f.register(0)?;
            let low = f.register(1)?;
            let size = f.size(0);
            let memory = f.is_memory(2);
            if memory {
                f.memory()?;
            } else {
                f.op.b = f.register(2)?;
            }
            f.op.size = low;
            f.set(by_bool!(memory, MEM => by_size!(size, T => alu::mulx::<T, MEM>)))?;
        }
        M::Adcx | M::Adox => {
            let memory = f.register_and_source(1)?;
            let size = f.size(0);
            let carry = i.mnemonic() == M::Adcx;
            f.set(by_bool!(carry, C => by_bool!(memory, MEM => by_size!(size, T => alu::adx::<T, C, MEM>))))?;
        }

        M::Mov => f.mov()?,
        M::Movzx => f.extend(false)?,
        M::Movsx | M::Movsxd => match (f.size(0), f.size(1)) {
            // MOVSXD to a 16-bit register is a move; AMD reads 32 bits of memory for it (measured).
            (2, 2 | 4) if i.mnemonic() == M::Movsxd => {
                let memory = f.register_and_source(1)?;
                f.op.size = 2;
                f.set(match memory {
                    true if features.is_intel() => data::mov_rm::<u16>,
                    true => data::movzx::<u16, u32, true>,
                    false => data::mov_rr::<u16>,
                })?;
            }
            _ => f.extend(true)?,
        },
        M::Lea => {
            f.op.a = f.register(0)?;
            f.memory()?;
            let size = f.size(0);
            f.set(by_size!(size, T => data::lea::<T>))?;
        }
        M::Xchg => {
            f.op.size = f.size(0);
            let size = f.op.size;
            match (f.is_memory(0), f.is_memory(1)) {
                (true, _) => {
                    f.memory()?;
                    f.op.a = f.register(1)?;
                    f.set(by_size!(size, T => atomic::xchg_mr::<T>))?;
                }
                (_, true) => {
                    f.memory()?;
                    f.op.a = f.register(0)?;
                    f.set(by_size!(size, T => atomic::xchg_mr::<T>))?;
                }
                _ => {
                    f.op.a = f.register(0)?;
                    f.op.b = f.register(1)?;
                    f.set(by_size!(size, T => atomic::xchg_rr::<T>))?;
                }
            }
        }
        M::Xadd | M::Cmpxchg => {
            f.op.size = f.size(0);
            let size = f.op.size;
            let memory = f.is_memory(0);
            if memory {
                f.memory()?;
                f.op.a = f.register(1)?;
            } else {
                f.op.a = f.register(0)?;
                f.op.b = f.register(1)?;
            }
            let run = match (i.mnemonic(), memory) {
                (M::Xadd, true) => by_size!(size, T => atomic::xadd_mr::<T>),
                (M::Xadd, false) => by_size!(size, T => atomic::xadd_rr::<T>),
                (_, true) => by_size!(size, T => atomic::cmpxchg_mr::<T>),
                (_, false) => by_size!(size, T => atomic::cmpxchg_rr::<T>),
            };
            f.set(run)?;
        }
        M::Cmpxchg8b => {
            f.memory()?;
            f.set(atomic::cmpxchg8b)?;
        }
        M::Cmpxchg16b => {
            f.memory()?;
            f.set(atomic::cmpxchg16b)?;
        }
        M::Bswap => {
            f.op.a = f.register(0)?;
            f.op.size = f.size(0);
            f.set(data::bswap)?;
        }
        M::Movbe => {
            let store = f.is_memory(0);
            f.op.a = f.register(if store { 1 } else { 0 })?;
            f.memory()?;
            let size = f.size(if store { 1 } else { 0 });
            f.set(by_bool!(store, S => by_size!(size, T => data::movbe::<T, S>)))?;
        }
        M::Cbw => {
            f.op.size = 2;
            f.set(data::cbw)?;
        }
        M::Cwde => {
            f.op.size = 4;
            f.set(data::cbw)?;
        }
        M::Cdqe => {
            f.op.size = 8;
            f.set(data::cbw)?;
        }
        M::Cwd => {
            f.op.size = 2;
            f.set(data::cwd)?;
        }
        M::Cdq => {
            f.op.size = 4;
            f.set(data::cwd)?;
        }
        M::Cqo => {
            f.op.size = 8;
            f.set(data::cwd)?;
        }
        M::Xlatb => {
            // Base register and AL as index; the base's size is the address size.
            let addr = i.memory_base().size() as u8;
            set_segment(&mut f.op, sreg_number(i.memory_segment()), code, addr);
            f.set(data::xlat)?;
        }
        M::Lahf => f.set(data::lahf)?,
        M::Sahf => f.set(data::sahf)?,
        M::Clc | M::Stc | M::Cmc | M::Cld | M::Std => {
            (f.op.imm, f.op.a) = match i.mnemonic() {
                M::Clc => (rflags::CF, 0),
                M::Stc => (rflags::CF, 1),
                M::Cmc => (rflags::CF, 2),
                M::Cld => (rflags::DF, 0),
                _ => (rflags::DF, 1),
            };
            f.set(data::flag_bit)?;
        }
        M::Salc => f.set(data::salc)?,
        M::Push => f.push()?,
        M::Pop => f.pop()?,
        M::Pusha | M::Pushad => {
            f.op.size = if i.mnemonic() == M::Pusha { 2 } else { 4 };
            f.set(data::pusha)?;
        }
        M::Popa | M::Popad => {
            f.op.size = if i.mnemonic() == M::Popa { 2 } else { 4 };
            f.set(data::popa)?;
        }
        M::Enter => {
            f.op.size = match i.code() {
                Code::Enterw_imm16_imm8 => 2,
                Code::Enterd_imm16_imm8 => 4,
                _ => 8,
            };
            f.op.imm = i.immediate16().into();
            f.op.b = i.immediate8_2nd();
            f.set(data::enter)?;
        }
        M::Leave => {
            f.op.size = match i.code() {
                Code::Leavew => 2,
                Code::Leaved => 4,
                _ => 8,
            };
            let wide = long && f.op.size == 8;
            f.set(if wide { data::leave64 } else { data::leave })?;
        }
        M::Lds | M::Les | M::Lfs | M::Lgs | M::Lss => {
            f.op.a = f.register(0)?;
            f.op.size = f.size(0);
            f.memory()?;
            let seg = match i.mnemonic() {
                M::Lds => Register::DS,
                M::Les => Register::ES,
                M::Lfs => Register::FS,
                M::Lgs => Register::GS,
                _ => Register::SS,
            };
            f.op.b = sreg_number(seg) as u8;
            f.set(data::load_far_pointer)?;
        }

        M::Jmp if i.flow_control() == FlowControl::UnconditionalBranch && i.is_jmp_short_or_near() => {
            let wide = f.relative()?;
            f.set(by_bool!(wide, L => branch::jmp::<L>))?;
        }
        M::Call if i.is_call_near() => {
            let wide = f.relative()?;
            f.set(by_bool!(wide, L => branch::call::<L>))?;
        }
        M::Jmp | M::Call if i.is_jmp_near_indirect() || i.is_call_near_indirect() => {
            f.op.flags |= flag::END;
            f.op.size = f.size(0);
            let memory = f.is_memory(0);
            if memory {
                f.memory()?;
            } else {
                f.op.a = f.register(0)?;
            }
            let wide = long && f.op.size == 8;
            let call = i.is_call_near_indirect();
            let run = match call {
                false => by_bool!(wide, L => by_bool!(memory, MEM => branch::jmp_indirect::<L, MEM>)),
                true => by_bool!(wide, L => by_bool!(memory, MEM => branch::call_indirect::<L, MEM>)),
            };
            f.set(run)?;
        }
        M::Ret => {
            f.op.flags |= flag::END;
            f.op.size = match i.code() {
                Code::Retnw | Code::Retnw_imm16 => 2,
                Code::Retnd | Code::Retnd_imm16 => 4,
                Code::Retnq | Code::Retnq_imm16 => 8,
                _ => return None,
            };
            if i.op_count() > 0 {
                f.op.imm = i.immediate16().into();
            }
            let wide = long && f.op.size == 8;
            f.set(by_bool!(wide, L => branch::ret::<L>))?;
        }
        M::Loop | M::Loope | M::Loopne | M::Jcxz | M::Jecxz | M::Jrcxz => {
            f.relative()?;
            f.op.addr = loop_counter_size(i)?;
            let run: OpFn = match i.mnemonic() {
                M::Loop => branch::loop_on::<0>,
                M::Loope => branch::loop_on::<1>,
                M::Loopne => branch::loop_on::<2>,
                _ => branch::loop_on::<3>,
            };
            f.set(run)?;
        }
        _ if i.is_jcc_short_or_near() => {
            let wide = f.relative()?;
            let cc = condition_number(i)?;
            f.set(by_bool!(wide, L => by_condition!(cc, CC => branch::jcc::<CC, L>)))?;
        }
        _ if is_cmov(i) => {
            let memory = f.register_and_source(1)?;
            let size = f.size(0);
            let cc = condition_number(i)?;
            f.set(match (size, memory) {
                (2, false) => by_condition!(cc, CC => data::cmov::<u16, CC, false>),
                (2, true) => by_condition!(cc, CC => data::cmov::<u16, CC, true>),
                (4, false) => by_condition!(cc, CC => data::cmov::<u32, CC, false>),
                (4, true) => by_condition!(cc, CC => data::cmov::<u32, CC, true>),
                (8, false) => by_condition!(cc, CC => data::cmov::<u64, CC, false>),
                (8, true) => by_condition!(cc, CC => data::cmov::<u64, CC, true>),
                _ => return None,
            })?;
        }
        _ if is_setcc(i) => {
            let memory = f.is_memory(0);
            let cc = condition_number(i)?;
            if memory {
                f.memory()?;
            } else {
                f.op.a = f.register(0)?;
            }
            f.set(by_bool!(memory, MEM => by_condition!(cc, CC => data::setcc::<CC, MEM>)))?;
        }

        M::Bt => f.bit_test(0)?,
        M::Bts => f.bit_test(1)?,
        M::Btr => f.bit_test(2)?,
        M::Btc => f.bit_test(3)?,
        M::Bsf | M::Bsr | M::Tzcnt | M::Lzcnt | M::Popcnt => {
            let memory = f.register_and_source(1)?;
            f.op.size = f.size(0);
            let kind = match i.mnemonic() {
                M::Bsf => 0,
                M::Bsr => 1,
                M::Tzcnt if features.bmi1() => 2,
                M::Tzcnt => 0,
                M::Lzcnt if features.lzcnt() => 3,
                M::Lzcnt => 1,
                _ => 4,
            };
            let run = match kind {
                0 => by_bool!(memory, MEM => bits::scan::<0, MEM>),
                1 => by_bool!(memory, MEM => bits::scan::<1, MEM>),
                2 => by_bool!(memory, MEM => bits::scan::<2, MEM>),
                3 => by_bool!(memory, MEM => bits::scan::<3, MEM>),
                _ => by_bool!(memory, MEM => bits::scan::<4, MEM>),
            };
            f.set(run)?;
        }
        M::Blsr | M::Blsi | M::Blsmsk => {
            let memory = f.register_and_source(1)?;
            let run = match i.mnemonic() {
                M::Blsr => by_bool!(memory, MEM => bits::bls::<0, MEM>),
                M::Blsi => by_bool!(memory, MEM => bits::bls::<1, MEM>),
                _ => by_bool!(memory, MEM => bits::bls::<2, MEM>),
            };
            f.set(run)?;
        }
        M::Andn | M::Pdep | M::Pext => {
            let memory = f.ternary(true)?;
            let run = match i.mnemonic() {
                M::Andn => by_bool!(memory, MEM => bits::ternary::<0, MEM>),
                M::Pdep => by_bool!(memory, MEM => bits::ternary::<3, MEM>),
                _ => by_bool!(memory, MEM => bits::ternary::<4, MEM>),
            };
            f.set(run)?;
        }
        M::Bzhi | M::Bextr | M::Shlx | M::Shrx | M::Sarx => {
            let memory = f.ternary(false)?;
            let run = match i.mnemonic() {
                M::Bzhi => by_bool!(memory, MEM => bits::ternary::<1, MEM>),
                M::Bextr => by_bool!(memory, MEM => bits::ternary::<2, MEM>),
                M::Shlx => by_bool!(memory, MEM => bits::ternary::<5, MEM>),
                M::Shrx => by_bool!(memory, MEM => bits::ternary::<6, MEM>),
                _ => by_bool!(memory, MEM => bits::ternary::<7, MEM>),
            };
            f.set(run)?;
        }
        M::Rorx => {
            let memory = f.register_and_source(1)?;
            f.op.imm = i.immediate(2);
            f.set(by_bool!(memory, MEM => bits::rorx::<MEM>))?;
        }
        M::Crc32 => {
            let memory = f.register_and_source(1)?;
            f.set(by_bool!(memory, MEM => bits::crc32::<MEM>))?;
        }
        M::Rdrand | M::Rdseed => {
            f.op.a = f.register(0)?;
            f.op.size = f.size(0);
            let seed = i.mnemonic() == M::Rdseed;
            f.set(by_bool!(seed, S => bits::random::<S>))?;
        }

        M::Daa => f.set(misc::daa::<false>)?,
        M::Das => f.set(misc::daa::<true>)?,
        M::Aaa => f.set(misc::aaa::<false>)?,
        M::Aas => f.set(misc::aaa::<true>)?,
        M::Aam => {
            f.op.imm = i.immediate8().into();
            f.set(misc::aam)?;
        }
        M::Aad => {
            f.op.imm = i.immediate8().into();
            f.set(misc::aad)?;
        }
        M::Bound => {
            f.op.a = f.register(0)?;
            f.op.size = f.size(0);
            f.memory()?;
            f.set(misc::bound)?;
        }
        M::Ud0 | M::Ud1 | M::Ud2 => {
            f.op.flags |= flag::END;
            f.set(misc::undefined)?;
        }
        M::Lfence | M::Mfence | M::Sfence => f.set(data::fence)?,
        M::Movnti => {
            f.op.a = f.register(1)?;
            f.memory()?;
            let size = f.size(1);
            f.set(by_size!(size, T => data::mov_mr::<T>))?;
        }
        // AMD's PREFETCH group needs a memory operand (APM volume 3, PREFETCH).
        M::Reservednop
            if !features.is_intel()
                && f.is_register(0)
                && matches!(
                    i.code(),
                    Code::Reservednop_rm16_r16_0F0D | Code::Reservednop_rm32_r32_0F0D | Code::Reservednop_rm64_r64_0F0D
                ) =>
        {
            f.op.flags |= flag::END;
            f.set(misc::undefined)?;
        }
        M::Nop
        | M::Pause
        | M::Reservednop
        | M::Endbr32
        | M::Endbr64
        | M::Rdsspd
        | M::Rdsspq
        | M::Prefetch
        | M::Prefetchw
        | M::Prefetchwt1
        | M::Prefetcht0
        | M::Prefetcht1
        | M::Prefetcht2
        | M::Prefetchnta
        | M::Prefetchit0
        | M::Prefetchit1
        | M::Cldemote => {
            // MONITORing and hints only; the address of a prefetch is not even translated.
            if i.mnemonic() == M::Pause {
                f.op.flags |= flag::END;
                f.set(data::pause)?;
            } else {
                f.set(data::nop)?;
            }
        }

        M::Movsb if !has_vector(i) => f.string(1, string::movs::<u8>)?,
        M::Movsw => f.string(2, string::movs::<u16>)?,
        M::Movsd if !has_vector(i) => f.string(4, string::movs::<u32>)?,
        M::Movsq => f.string(8, string::movs::<u64>)?,
        M::Stosb => f.string(1, string::stos::<u8>)?,
        M::Stosw => f.string(2, string::stos::<u16>)?,
        M::Stosd => f.string(4, string::stos::<u32>)?,
        M::Stosq => f.string(8, string::stos::<u64>)?,
        M::Lodsb => f.string(1, string::lods::<u8>)?,
        M::Lodsw => f.string(2, string::lods::<u16>)?,
        M::Lodsd => f.string(4, string::lods::<u32>)?,
        M::Lodsq => f.string(8, string::lods::<u64>)?,
        M::Scasb => f.string(1, string::scas::<u8>)?,
        M::Scasw => f.string(2, string::scas::<u16>)?,
        M::Scasd => f.string(4, string::scas::<u32>)?,
        M::Scasq => f.string(8, string::scas::<u64>)?,
        M::Cmpsb => f.string(1, string::cmps::<u8>)?,
        M::Cmpsw => f.string(2, string::cmps::<u16>)?,
        M::Cmpsd if !has_vector(i) => f.string(4, string::cmps::<u32>)?,
        M::Cmpsq => f.string(8, string::cmps::<u64>)?,
        M::Insb => f.string(1, string::ins::<u8>)?,
        M::Insw => f.string(2, string::ins::<u16>)?,
        M::Insd => f.string(4, string::ins::<u32>)?,
        M::Outsb => f.string(1, string::outs::<u8>)?,
        M::Outsw => f.string(2, string::outs::<u16>)?,
        M::Outsd => f.string(4, string::outs::<u32>)?,
        _ => return None,
    }
    Some(f.op)
}

fn has_vector(i: &Instruction) -> bool {
    (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Register && i.op_register(n).is_xmm())
}

fn is_cmov(i: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        i.mnemonic(),
        M::Cmova
            | M::Cmovae
            | M::Cmovb
            | M::Cmovbe
            | M::Cmove
            | M::Cmovg
            | M::Cmovge
            | M::Cmovl
            | M::Cmovle
            | M::Cmovne
            | M::Cmovno
            | M::Cmovnp
            | M::Cmovns
            | M::Cmovo
            | M::Cmovp
            | M::Cmovs
    )
}

fn is_setcc(i: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        i.mnemonic(),
        M::Seta
            | M::Setae
            | M::Setb
            | M::Setbe
            | M::Sete
            | M::Setg
            | M::Setge
            | M::Setl
            | M::Setle
            | M::Setne
            | M::Setno
            | M::Setnp
            | M::Setns
            | M::Seto
            | M::Setp
            | M::Sets
    )
}

/// Width of the counter of LOOP and JCXZ, which is the address size.
fn loop_counter_size(i: &Instruction) -> Option<u8> {
    use Code as C;
    Some(match i.code() {
        C::Loop_rel8_16_CX
        | C::Loop_rel8_32_CX
        | C::Loope_rel8_16_CX
        | C::Loope_rel8_32_CX
        | C::Loopne_rel8_16_CX
        | C::Loopne_rel8_32_CX
        | C::Jcxz_rel8_16
        | C::Jcxz_rel8_32 => 2,
        C::Loop_rel8_16_ECX
        | C::Loop_rel8_32_ECX
        | C::Loop_rel8_64_ECX
        | C::Loope_rel8_16_ECX
        | C::Loope_rel8_32_ECX
        | C::Loope_rel8_64_ECX
        | C::Loopne_rel8_16_ECX
        | C::Loopne_rel8_32_ECX
        | C::Loopne_rel8_64_ECX
        | C::Jecxz_rel8_16
        | C::Jecxz_rel8_32
        | C::Jecxz_rel8_64 => 4,
        C::Loop_rel8_16_RCX
        | C::Loop_rel8_64_RCX
        | C::Loope_rel8_16_RCX
        | C::Loope_rel8_64_RCX
        | C::Loopne_rel8_16_RCX
        | C::Loopne_rel8_64_RCX
        | C::Jrcxz_rel8_16
        | C::Jrcxz_rel8_64 => 8,
        _ => return None,
    })
}
