//! 16- and 32-bit code: what each instruction is to the translator, which memory it accesses, and what it does to registers.
//!
//! The order of work is that of 64-bit code ([`super::classify`], [`super::plan`]); what is different is collected here.
//! The upper halves of the eight registers are zero all the while ([`SoftVp::sync_facts`](crate::vp::SoftVp)), so a register
//! is its own zero-extended offset.

use super::classify::{self, Kind};
use super::facts::Facts;
use super::kernel::{Mode, System};
use super::plan::{Access, Base, Expression, SegmentBase, Value, Values, number, written};
use crate::features::Features;
use crate::vp::VpBlock;
use iced_x86::{Code, EncodingKind, FlowControl, Instruction, Mnemonic, OpKind, Register};
use std::mem::offset_of;
use x86::segment::sreg;

/// Bytes that an instruction which uses the stack pushes or pops: its operand size.
pub fn stack_size(i: &Instruction) -> usize {
    use Code::*;
    match i.code() {
        Pushw_ES | Pushw_CS | Pushw_SS | Pushw_DS | Pushw_FS | Pushw_GS => 2,
        Retnw | Retnw_imm16 | Call_rel16 | Call_rm16 | Leavew | Push_r16 | Push_rm16 | Push_imm16 | Pushw_imm8
        | Pop_r16 | Pop_rm16 | Pushfw | Popfw | Pushaw | Popaw => 2,
        _ => 4,
    }
}

/// Is it a near branch whose target is known to lie inside the code segment?
fn near(i: &Instruction, facts: &Facts) -> bool {
    match i.op0_kind() {
        OpKind::NearBranch32 if facts.code_is_flat() => true,
        OpKind::NearBranch32 | OpKind::NearBranch16 if !facts.code_is_flat() => {
            i.near_branch_target() <= u64::from(facts.code_limit)
        }
        _ => false,
    }
}

/// Decides about an instruction of 16- or 32-bit code.
pub fn kind(i: &Instruction, features: &Features, facts: &Facts) -> Kind {
    if i.is_invalid() || !features.allows(i) {
        return Kind::Stop;
    }
    // Real and virtual-8086 mode do not know VEX.
    if i.encoding() != EncodingKind::Legacy && !(facts.protected && i.encoding() == EncodingKind::VEX) {
        return Kind::Stop;
    }
    // A return address of 16 bits is known only where blocks know theirs.
    let returns = stack_size(i) == 4 || !facts.code_is_flat() && i.next_ip() <= 0xffff;
    match i.flow_control() {
        FlowControl::Next => next(i, facts),
        FlowControl::UnconditionalBranch if near(i, facts) => Kind::Jmp,
        FlowControl::ConditionalBranch if near(i, facts) => {
            if i.is_jcc_short_or_near() {
                Kind::Jcc
            } else {
                Kind::Loop
            }
        }
        FlowControl::Call if near(i, facts) && returns => Kind::Call,
        FlowControl::Return => match i.code() {
            Code::Retnd | Code::Retnd_imm16 | Code::Retnw | Code::Retnw_imm16 => Kind::Ret,
            _ => Kind::Stop,
        },
        FlowControl::IndirectBranch if matches!(i.code(), Code::Jmp_rm32 | Code::Jmp_rm16) => Kind::JmpIndirect,
        FlowControl::IndirectCall if matches!(i.code(), Code::Call_rm32 | Code::Call_rm16) && returns => {
            let stack = matches!(i.op0_register(), Register::ESP | Register::SP) && i.op0_kind() == OpKind::Register;
            if stack { Kind::Stop } else { Kind::CallIndirect }
        }
        _ => Kind::Stop,
    }
}

/// An instruction that does not branch.
fn next(i: &Instruction, facts: &Facts) -> Kind {
    use Mnemonic as M;
    let memory = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory);
    // Segments that only the interpreter may say something about: a write through CS.
    let odd_segment = memory && facts.protected && i.memory_segment() == Register::CS;
    match i.mnemonic() {
        M::Push => {
            return match i.code() {
                Code::Pushd_ES | Code::Pushd_CS | Code::Pushd_SS | Code::Pushd_DS | Code::Pushd_FS | Code::Pushd_GS => {
                    Kind::Push
                }
                Code::Pushw_ES | Code::Pushw_CS | Code::Pushw_SS | Code::Pushw_DS | Code::Pushw_FS | Code::Pushw_GS => {
                    Kind::Push
                }
                Code::Push_r32
                | Code::Push_r16
                | Code::Push_rm32
                | Code::Push_rm16
                | Code::Pushd_imm32
                | Code::Pushd_imm8
                | Code::Push_imm16
                | Code::Pushw_imm8 => Kind::Push,
                _ => Kind::Interpret,
            };
        }
        M::Pop => {
            return match i.code() {
                Code::Pop_r32 => Kind::Pop,
                Code::Pop_r16 if i.op0_register() != Register::SP => Kind::Pop,
                _ => Kind::Interpret,
            };
        }
        M::Leave => return if facts.stack32 && i.code() == Code::Leaved { Kind::Leave } else { Kind::Interpret },
        // They change general registers, flags, memory and segment registers at most: whether the facts still hold is
        // looked at behind each.
        M::Pusha
        | M::Pushad
        | M::Popa
        | M::Popad
        | M::Pushf
        | M::Pushfd
        | M::Popf
        | M::Popfd
        | M::Aaa
        | M::Aas
        | M::Aad
        | M::Aam
        | M::Daa
        | M::Das
        | M::Salc
        | M::Arpl
        | M::Bound
        | M::Lds
        | M::Les
        | M::Lss
        | M::Lfs
        | M::Lgs
        | M::Lgdt
        | M::Lidt
        | M::Lldt => return Kind::Interpret,
        M::Mov if (0..2).any(|n| i.op_kind(n) == OpKind::Register && i.op_register(n).is_segment_register()) => {
            return Kind::Interpret;
        }
        M::Bswap if i.op0_register().size() == 2 => return Kind::Interpret,
        M::Lea => return Kind::Lea,
        _ => {}
    }
    let usual = classify::next(i, true);
    match usual {
        Kind::Plain | Kind::Vector(_) if odd_segment && classify::shape(i).writes_memory => Kind::Interpret,
        // The stack pointer needs REX, which AH, CH, DH and BH do not go with.
        Kind::Plain if names_stack_pointer(i) && names_high(i) => Kind::Interpret,
        Kind::Plain if memory && names_high(i) && i.memory_size().size() != 1 => Kind::Interpret,
        kind => kind,
    }
}

fn registers(i: &Instruction) -> impl Iterator<Item = Register> + '_ {
    (0..i.op_count()).filter(|n| i.op_kind(*n) == OpKind::Register).map(|n| i.op_register(n))
}

/// Is SP or ESP an operand?
pub fn names_stack_pointer(i: &Instruction) -> bool {
    registers(i).any(|r| matches!(r, Register::ESP | Register::SP))
}

/// Is AH, CH, DH or BH an operand?
pub fn names_high(i: &Instruction) -> bool {
    registers(i).any(classify::is_high8)
}

/// Replaces the kind of a system instruction that can be lowered in line in this mode.
pub fn refine(i: &Instruction, kind: Kind, mode: &Mode, facts: &Facts, bmi2: bool) -> Kind {
    use Code::*;
    if !matches!(kind, Kind::Interpret | Kind::Stop) {
        return kind;
    }
    let repeated = i.has_rep_prefix() || i.has_repne_prefix();
    let system = match i.code() {
        Pushfd | Pushfw if facts.protected || mode.kernel => System::Pushf,
        Rdtsc if bmi2 && mode.may_read_tsc() => System::Rdtsc,
        Rdtscp if bmi2 && mode.may_read_tsc() => System::Rdtscp,
        Lodsb_AL_m8 | Lodsw_AX_m16 | Lodsd_EAX_m32 | Scasb_AL_m8 | Scasw_AX_m16 | Scasd_EAX_m32 | Cmpsb_m8_m8
        | Cmpsw_m16_m16 | Cmpsd_m32_m32
            if !repeated =>
        {
            System::Element
        }
        Stosb_m8_AL | Stosw_m16_AX | Stosd_m32_EAX | Movsb_m8_m8 | Movsw_m16_m16 | Movsd_m32_m32 => {
            match if repeated { string(i, facts) } else { Some(System::Element) } {
                Some(system) => system,
                None => return kind,
            }
        }
        Bt_rm32_r32 | Bts_rm32_r32 | Btr_rm32_r32 | Btc_rm32_r32 if i.op0_kind() == OpKind::Memory => {
            let (e, _) = expression_of(i, facts);
            let writes = i.code() != Bt_rm32_r32;
            let plain = e.segment == SegmentBase::Flat && !e.word && !(writes && i.memory_segment() == Register::CS);
            if !plain {
                return kind;
            }
            System::BitString(false)
        }
        Cli if mode.kernel => System::Cli,
        Sti if mode.kernel => System::Sti,
        Popfd | Popfw if mode.kernel => System::Popf,
        Stac if mode.kernel && facts.protected => System::Stac,
        Clac if mode.kernel && facts.protected => System::Clac,
        Mov_r32_cr if mode.kernel => match i.op1_register() {
            Register::CR0 => System::ReadControl(offset_of!(VpBlock, cr0) as u16),
            Register::CR2 => System::ReadControl(offset_of!(VpBlock, cr2) as u16),
            Register::CR3 => System::ReadControl(offset_of!(VpBlock, cr3) as u16),
            Register::CR4 => System::ReadControl(offset_of!(VpBlock, cr4) as u16),
            _ => return kind,
        },
        _ => return kind,
    };
    Kind::System(system)
}

/// REP STOS and REP MOVS with 32-bit addresses in flat segments.
fn string(i: &Instruction, facts: &Facts) -> Option<System> {
    if !(i.has_rep_prefix() || i.has_repne_prefix()) || i.op0_kind() != OpKind::MemoryESEDI || !facts.is_flat(sreg::ES)
    {
        return None;
    }
    let size = i.memory_size().size().trailing_zeros() as u8;
    match i.op1_kind() {
        OpKind::MemorySegESI if facts.is_flat(segment_number(i.memory_segment())) => Some(System::RepMovs(size)),
        OpKind::Register => Some(System::RepStos(size)),
        _ => None,
    }
}

/// Number of a segment register.
fn segment_number(r: Register) -> usize {
    match r {
        Register::ES => sreg::ES,
        Register::CS => sreg::CS,
        Register::SS => sreg::SS,
        Register::FS => sreg::FS,
        Register::GS => sreg::GS,
        _ => sreg::DS,
    }
}

fn segment(seg: usize, facts: &Facts) -> SegmentBase {
    if facts.is_flat(seg) { SegmentBase::Flat } else { SegmentBase::Limited(seg as u8) }
}

/// Of a stack access through ESP or SP.
pub fn stack(facts: &Facts) -> Expression {
    Expression { segment: segment(sreg::SS, facts), narrow: true, word: !facts.stack32, ..Expression::STACK }
}

/// The address of the memory operand: an offset in its segment.
pub fn expression_of(i: &Instruction, facts: &Facts) -> (Expression, i64) {
    let (base, index) = (i.memory_base(), i.memory_index());
    let word = match (base, index) {
        (Register::None, Register::None) => i.memory_displ_size() == 2,
        (Register::None, x) => x.size() == 2,
        (b, _) => b.size() == 2,
    };
    let displacement = i.memory_displacement64();
    let displacement = if word { i64::from(displacement as i16) } else { i64::from(displacement as i32) };
    let e = Expression {
        base: if base == Register::None { Base::Zero } else { Base::Register(number(base)) },
        index: (index != Register::None).then(|| (number(index), i.memory_index_scale() as u8)),
        segment: segment(segment_number(i.memory_segment()), facts),
        narrow: true,
        word,
    };
    (e, displacement)
}

/// The addresses that a string instruction reads through SI or ESI, and reads or writes through DI or EDI.
pub fn string_expressions(i: &Instruction, facts: &Facts) -> (Option<Expression>, Option<Expression>) {
    let through = |register, seg, word| Expression {
        base: Base::Register(register),
        index: None,
        segment: segment(seg, facts),
        narrow: true,
        word,
    };
    let (mut source, mut destination) = (None, None);
    for n in 0..i.op_count() {
        match i.op_kind(n) {
            OpKind::MemorySegESI => source = Some(through(6, segment_number(i.memory_segment()), false)),
            OpKind::MemorySegSI => source = Some(through(6, segment_number(i.memory_segment()), true)),
            OpKind::MemoryESEDI => destination = Some(through(7, sreg::ES, false)),
            OpKind::MemoryESDI => destination = Some(through(7, sreg::ES, true)),
            _ => {}
        }
    }
    (source, destination)
}

/// What an instruction accesses.
pub fn accesses_of(i: &Instruction, kind: Kind, facts: &Facts, mut f: impl FnMut(Access)) {
    let access = |expression, displacement, size: usize, write| Access {
        expression,
        operand: None,
        displacement,
        size: size as u32,
        write,
        group: 0,
        relative: 0,
    };
    let size = stack_size(i);
    let push = access(stack(facts), -(size as i64), size, true);
    let memory = |size, write| {
        let (expression, displacement) = expression_of(i, facts);
        access(expression, displacement, size, write)
    };
    match kind {
        Kind::Plain | Kind::Vector(_) if (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory) => {
            f(memory(i.memory_size().size(), classify::shape(i).writes_memory));
        }
        Kind::Push => {
            if i.op0_kind() == OpKind::Memory {
                f(memory(size, false));
            }
            f(push);
        }
        Kind::Pop | Kind::Ret => f(access(stack(facts), 0, size, false)),
        Kind::Leave => f(access(Expression { base: Base::Register(5), ..stack(facts) }, 0, size, false)),
        Kind::Call => f(push),
        Kind::JmpIndirect | Kind::CallIndirect => {
            if i.op0_kind() == OpKind::Memory {
                f(memory(if matches!(i.code(), Code::Jmp_rm16 | Code::Call_rm16) { 2 } else { 4 }, false));
            }
            if kind == Kind::CallIndirect {
                f(push);
            }
        }
        _ => {}
    }
}

/// What an instruction does to the values of registers. The low 16 bits of register n are value n + 8.
pub(super) fn step_values(i: &Instruction, kind: Kind, facts: &Facts, values: &mut Values, next_version: &mut u32) {
    let mut fresh = |v: &mut Value| {
        *v = Value { version: *next_version, delta: 0 };
        *next_version += 1;
    };
    let mut both = |values: &mut Values, r: usize| {
        fresh(&mut values[r]);
        fresh(&mut values[r + 8]);
    };
    match kind {
        Kind::Push | Kind::Call | Kind::CallIndirect => {
            step_stack(facts, values, next_version, -(stack_size(i) as i64))
        }
        Kind::Pop => {
            both(values, usize::from(number(i.op0_register())));
            if !matches!(i.op0_register(), Register::ESP | Register::SP) {
                step_stack(facts, values, next_version, stack_size(i) as i64);
            }
        }
        Kind::Ret => both(values, 4),
        Kind::Leave => {
            both(values, 4);
            both(values, 5);
        }
        Kind::Loop => both(values, 1),
        Kind::Plain | Kind::Vector(_) | Kind::Lea => {
            if let Some((register, delta)) = constant_step(i) {
                for r in [register, register + 8] {
                    let v = &mut values[r];
                    v.delta = v.delta.wrapping_add(delta);
                    if v.delta.abs() >= 1 << 28 {
                        fresh(v);
                    }
                }
                return;
            }
            if matches!(i.code(), Code::Mov_r32_rm32 | Code::Mov_rm32_r32)
                && i.op0_kind() == OpKind::Register
                && i.op1_kind() == OpKind::Register
            {
                let (to, from) = (usize::from(number(i.op0_register())), usize::from(number(i.op1_register())));
                values[to] = values[from];
                values[to + 8] = values[from + 8];
                return;
            }
            let mut mask = if kind == Kind::Lea { 1 << number(i.op0_register()) } else { written(i) };
            mask &= 0xff;
            for r in 0..8 {
                if mask & 1 << r != 0 {
                    both(values, r);
                }
            }
        }
        _ => {}
    }
}

/// The stack pointer has moved by a constant. A 16-bit one may have wrapped, of which the other 16 bits know nothing.
fn step_stack(facts: &Facts, values: &mut Values, next_version: &mut u32, delta: i64) {
    values[4 + 8].delta += delta;
    if facts.stack32 {
        values[4].delta += delta;
    } else {
        values[4] = Value { version: *next_version, delta: 0 };
        *next_version += 1;
    }
}

/// A 32-bit register to which the instruction adds a constant.
fn constant_step(i: &Instruction) -> Option<(usize, i64)> {
    use Mnemonic as M;
    if i.op0_kind() != OpKind::Register || i.op0_register().size() != 4 || !i.op0_register().is_gpr() {
        return None;
    }
    let register = usize::from(number(i.op0_register()));
    let immediate = || match i.op1_kind() {
        OpKind::Immediate8to32 | OpKind::Immediate32 => Some(i64::from(i.immediate(1) as i32)),
        _ => None,
    };
    match i.mnemonic() {
        M::Add => Some((register, immediate()?)),
        M::Sub => Some((register, -immediate()?)),
        M::Inc => Some((register, 1)),
        M::Dec => Some((register, -1)),
        M::Lea if i.memory_base() == i.op0_register() && i.memory_index() == Register::None => {
            Some((register, i64::from(i.memory_displacement64() as i32)))
        }
        _ => None,
    }
}
