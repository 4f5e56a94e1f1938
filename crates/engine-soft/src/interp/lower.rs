//! From a decoded instruction to its compact form.

use super::form::{Form, by_bool, by_condition, by_size, condition_number};
use super::op::*;
use super::{alu, atomic, bits, branch, data, misc, string};
use crate::features::Features;
use crate::vp::CodeSize;
use iced_x86::{Code, FlowControl, Instruction, Mnemonic, OpKind, Register};
use x86::regs::rflags;

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
