//! What the translator does with each instruction.

use super::kernel::System;
use crate::features::Features;
use crate::native::{self, Unit};
use iced_x86::Register;
use iced_x86::{Code, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpCodeOperandKind, OpKind};
use std::cell::RefCell;

/// How an instruction is translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The same instruction on host operands.
    Plain,
    /// The same, after the vector state has been loaded. `true`: needs AVX enabled.
    Vector(bool),
    /// Nothing.
    Nop,
    /// LEA.
    Lea,
    /// PUSH of 64 bits.
    Push,
    /// POP of 64 bits into a register.
    Pop,
    /// LEAVE.
    Leave,
    /// CALL rel.
    Call,
    /// JMP rel.
    Jmp,
    /// Jcc rel.
    Jcc,
    /// LOOP, LOOPE, LOOPNE, JCXZ or JECXZ in 16- or 32-bit code.
    Loop,
    /// RET.
    Ret,
    /// JMP r/m.
    JmpIndirect,
    /// CALL r/m.
    CallIndirect,
    /// Executed by the interpreter, then the block goes on.
    Interpret,
    /// A system instruction, in line. May change privilege data of memory accesses (STAC, WRFSBASE): no check is valid
    /// across it.
    System(System),
    /// The block ends here; the interpreter executes it.
    Stop,
}

/// What an instruction's encoding says about its operands.
#[derive(Clone, Copy, Debug, Default)]
pub struct Shape {
    /// ModRM.reg is a general register.
    pub reg: bool,
    /// ModRM.rm, if a register, is a general one.
    pub rm: bool,
    /// The opcode holds a general register.
    pub opcode: bool,
    /// VEX.vvvv is a general register.
    pub vvvv: bool,
    /// There is a ModRM byte.
    pub modrm: bool,
    /// The memory operand is written.
    pub writes_memory: bool,
    /// Operand 0, if a register, is not read before it is wholly overwritten.
    pub op0_write_only: bool,
    /// Operand 0 is not written.
    pub op0_read_only: bool,
    /// An operand other than 0 is written.
    pub others_written: bool,
}

thread_local! {
    static SHAPES: RefCell<Vec<Option<Shape>>> = RefCell::new(vec![None; 8192]);
}

/// The shape of an instruction's code (computed once for each code).
pub fn shape(i: &Instruction) -> Shape {
    let code = i.code() as usize;
    SHAPES.with_borrow_mut(|shapes| match shapes[code] {
        Some(shape) => shape,
        None => {
            let shape = make_shape(i);
            shapes[code] = Some(shape);
            shape
        }
    })
}

fn make_shape(i: &Instruction) -> Shape {
    use OpCodeOperandKind as K;
    let code = i.op_code();
    let mut info = InstructionInfoFactory::new();
    let info = info.info(i);
    let mut s = Shape { op0_read_only: true, ..Shape::default() };
    for n in 0..code.op_count() {
        let access = info.op_access(n);
        let writes =
            matches!(access, OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite);
        match code.op_kind(n) {
            K::r8_or_mem | K::r16_or_mem | K::r32_or_mem | K::r64_or_mem => {
                s.rm = true;
                s.modrm = true;
            }
            K::r16_rm | K::r32_rm | K::r64_rm => {
                s.rm = true;
                s.modrm = true;
            }
            K::r8_reg | K::r16_reg | K::r32_reg | K::r64_reg => {
                s.reg = true;
                s.modrm = true;
            }
            K::r8_opcode | K::r16_opcode | K::r32_opcode | K::r64_opcode => s.opcode = true,
            K::r32_vvvv | K::r64_vvvv => s.vvvv = true,
            K::mem
            | K::mm_or_mem
            | K::xmm_or_mem
            | K::ymm_or_mem
            | K::mm_reg
            | K::mm_rm
            | K::xmm_reg
            | K::xmm_rm
            | K::ymm_reg
            | K::ymm_rm => s.modrm = true,
            _ => {}
        }
        if n == 0 {
            s.op0_read_only = !writes;
            // Not by the access that the decoder's library reports: it depends on the operands (XOR of a register with itself
            // only writes), and the shape is kept for all instances.
            s.op0_write_only = access == OpAccess::Write
                && matches!(
                    i.mnemonic(),
                    Mnemonic::Mov | Mnemonic::Movzx | Mnemonic::Movsx | Mnemonic::Movsxd | Mnemonic::Rorx
                );
        } else {
            s.others_written |= writes;
        }
    }
    // Whether the memory operand is written does not depend on which operand it is in this instance: codes with a
    // register-or-memory operand have the same access for both.
    for n in 0..i.op_count() {
        let memory = matches!(
            code.op_kind(n),
            K::mem
                | K::r8_or_mem
                | K::r16_or_mem
                | K::r32_or_mem
                | K::r64_or_mem
                | K::mm_or_mem
                | K::xmm_or_mem
                | K::ymm_or_mem
                | K::mem_offs
        );
        if memory {
            s.writes_memory |= !matches!(
                info.op_access(n),
                OpAccess::Read | OpAccess::CondRead | OpAccess::None | OpAccess::NoMemAccess
            );
        }
    }
    s
}

/// Is the register AH, CH, DH or BH?
pub fn is_high8(r: Register) -> bool {
    matches!(r, Register::AH | Register::CH | Register::DH | Register::BH)
}

/// Decides about an instruction of 64-bit code.
pub fn kind(i: &Instruction, features: &Features) -> Kind {
    if i.is_invalid() || !features.allows(i) {
        return Kind::Stop;
    }
    match i.flow_control() {
        FlowControl::Next => {}
        FlowControl::UnconditionalBranch => {
            return if i.op0_kind() == OpKind::NearBranch64 { Kind::Jmp } else { Kind::Stop };
        }
        FlowControl::ConditionalBranch => {
            return if i.is_jcc_short_or_near() && i.op0_kind() == OpKind::NearBranch64 {
                Kind::Jcc
            } else {
                Kind::Stop
            };
        }
        FlowControl::Call => {
            return if i.op0_kind() == OpKind::NearBranch64 { Kind::Call } else { Kind::Stop };
        }
        FlowControl::Return => {
            return if matches!(i.code(), Code::Retnq | Code::Retnq_imm16) { Kind::Ret } else { Kind::Stop };
        }
        FlowControl::IndirectBranch => {
            return if i.code() == Code::Jmp_rm64 { Kind::JmpIndirect } else { Kind::Stop };
        }
        FlowControl::IndirectCall => {
            return if i.code() == Code::Call_rm64 && i.op0_register() != Register::RSP {
                Kind::CallIndirect
            } else {
                Kind::Stop
            };
        }
        _ => return Kind::Stop,
    }
    next(i, false)
}

/// An instruction that does not branch, once [`Features`] allow it. `legacy`: of 16- or 32-bit code.
pub(super) fn next(i: &Instruction, legacy: bool) -> Kind {
    use Mnemonic as M;
    // A memory operand next to AH..BH cannot be re-encoded: the address is in a register that needs REX.
    let memory = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory);
    let odd = (0..i.op_count()).any(|n| match i.op_kind(n) {
        OpKind::Register => !legacy && memory && is_high8(i.op_register(n)) || i.op_register(n).is_segment_register(),
        OpKind::Memory => {
            i.is_vsib() || i.memory_size().size() == 0 && i.mnemonic() != M::Lea && i.mnemonic() != M::Nop
        }
        OpKind::Immediate8
        | OpKind::Immediate8_2nd
        | OpKind::Immediate16
        | OpKind::Immediate32
        | OpKind::Immediate64
        | OpKind::Immediate8to16
        | OpKind::Immediate8to32
        | OpKind::Immediate8to64
        | OpKind::Immediate32to64 => false,
        _ => true,
    });
    // Only registers that the guest may touch natively: anything else (control, debug, mask, bounds) is interpreted.
    let foreign = (0..i.op_count()).any(|n| {
        i.op_kind(n) == OpKind::Register && {
            let r = i.op_register(n);
            !(r.is_gpr() || r.is_xmm() || r.is_ymm() || r.is_mm() || r.is_st() || r.is_segment_register())
        }
    });
    if foreign {
        return Kind::Stop;
    }
    let moffs = i.op_code().op_kinds().contains(&OpCodeOperandKind::mem_offs);
    if moffs && !legacy {
        return Kind::Interpret;
    }
    match i.mnemonic() {
        M::Nop
        | M::Endbr64
        | M::Endbr32
        | M::Prefetcht0
        | M::Prefetcht1
        | M::Prefetcht2
        | M::Prefetchnta
        | M::Prefetchw
        | M::Prefetchwt1
        | M::Reservednop => return Kind::Nop,
        M::Push => {
            return match i.code() {
                Code::Push_r64 | Code::Pushq_imm32 | Code::Pushq_imm8 | Code::Push_rm64 => Kind::Push,
                _ => Kind::Interpret,
            };
        }
        M::Pop => {
            return match i.code() {
                Code::Pop_r64 => Kind::Pop,
                Code::Pop_rm64 if i.op0_kind() == OpKind::Register => Kind::Interpret,
                Code::Pop_rm64 | Code::Pop_rm16 | Code::Pop_r16 => Kind::Interpret,
                _ => Kind::Stop,
            };
        }
        M::Leave => return if i.code() == Code::Leaveq { Kind::Leave } else { Kind::Interpret },
        // Interpreted without ending the block: nothing but general registers, flags and memory changes, or what
        // changes is looked at again by translated code each time (segment bases, the TLB in use).
        M::Movsb
        | M::Movsw
        | M::Movsd
        | M::Movsq
        | M::Stosb
        | M::Stosw
        | M::Stosd
        | M::Stosq
        | M::Lodsb
        | M::Lodsw
        | M::Lodsd
        | M::Lodsq
        | M::Scasb
        | M::Scasw
        | M::Scasd
        | M::Scasq
        | M::Cmpsb
        | M::Cmpsw
        | M::Cmpsd
        | M::Cmpsq
            if odd =>
        {
            return Kind::Interpret;
        }
        M::Rdtsc
        | M::Rdtscp
        | M::Rdpid
        | M::Cpuid
        | M::Rdmsr
        | M::Cld
        | M::Std
        | M::Pushfq
        | M::Popfq
        | M::Sti
        | M::Wrmsr
        | M::In
        | M::Out
        | M::Stac
        | M::Clac
        | M::Swapgs
        | M::Rdfsbase
        | M::Rdgsbase
        | M::Wrfsbase
        | M::Wrgsbase
        | M::Xgetbv
        | M::Verr
        | M::Verw
        | M::Lsl
        | M::Lar
        | M::Sgdt
        | M::Sidt
        | M::Sldt
        | M::Str
        | M::Smsw
        | M::Rdrand
        | M::Rdseed
        | M::Cli
        | M::Xlatb
        | M::Fxsave
        | M::Fxsave64
        | M::Fxrstor
        | M::Fxrstor64
        | M::Xsave
        | M::Xsave64
        | M::Xsavec
        | M::Xsavec64
        | M::Xsaveopt
        | M::Xsaveopt64
        | M::Xsaves
        | M::Xsaves64
        | M::Xrstor
        | M::Xrstor64
        | M::Xrstors
        | M::Xrstors64
        | M::Clflush
        | M::Clflushopt
        | M::Clwb
        | M::Maskmovq
        | M::Maskmovdqu
        | M::Vmaskmovdqu
        | M::Vmaskmovps
        | M::Vmaskmovpd
        | M::Vpmaskmovd
        | M::Vpmaskmovq
        | M::Ldmxcsr
        | M::Stmxcsr
        | M::Vldmxcsr
        | M::Vstmxcsr
        | M::Fnstenv
        | M::Fldenv
        | M::Fnsave
        | M::Frstor
        | M::Enter => return Kind::Interpret,
        _ => {}
    }
    if i.is_vsib() {
        return Kind::Interpret;
    }
    if let Some(unit) = native::unit(i) {
        return if odd && i.mnemonic() != M::Wait { Kind::Interpret } else { Kind::Vector(unit == Unit::Avx) };
    }
    if i.mnemonic() == M::Mov
        && (0..2).any(|n| i.op_kind(n) == OpKind::Register && i.op_register(n).is_segment_register())
    {
        // Reading a segment register changes nothing; loading one may.
        return if i.op1_register().is_segment_register() { Kind::Interpret } else { Kind::Stop };
    }
    if odd {
        return if memory && is_plain(i.mnemonic()) { Kind::Interpret } else { Kind::Stop };
    }
    match i.mnemonic() {
        M::Lea => {
            if i.op0_register().size() == 2 {
                Kind::Interpret
            } else {
                Kind::Lea
            }
        }
        // The host reads four bytes, the decoder says two: the check must cover what is read.
        M::Movsxd if memory && i.code() == Code::Movsxd_r16_rm16 => Kind::Interpret,
        // With a register operand the bit offset reaches beyond the memory operand.
        M::Bt | M::Bts | M::Btr | M::Btc if memory && i.op1_kind() == OpKind::Register => Kind::Interpret,
        m if is_plain(m) => Kind::Plain,
        _ => Kind::Stop,
    }
}

/// Instructions on general registers and memory whose native execution in ring 3 is their definition.
fn is_plain(m: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        m,
        M::Mov
            | M::Movzx
            | M::Movsx
            | M::Movsxd
            | M::Lea
            | M::Add
            | M::Sub
            | M::Adc
            | M::Sbb
            | M::And
            | M::Or
            | M::Xor
            | M::Cmp
            | M::Test
            | M::Inc
            | M::Dec
            | M::Neg
            | M::Not
            | M::Shl
            | M::Sal
            | M::Shr
            | M::Sar
            | M::Rol
            | M::Ror
            | M::Rcl
            | M::Rcr
            | M::Shld
            | M::Shrd
            | M::Imul
            | M::Mul
            | M::Div
            | M::Idiv
            | M::Cmova
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
            | M::Seta
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
            | M::Bt
            | M::Bts
            | M::Btr
            | M::Btc
            | M::Bsf
            | M::Bsr
            | M::Tzcnt
            | M::Lzcnt
            | M::Popcnt
            | M::Bswap
            | M::Cbw
            | M::Cwde
            | M::Cdqe
            | M::Cwd
            | M::Cdq
            | M::Cqo
            | M::Xchg
            | M::Xadd
            | M::Cmpxchg
            | M::Cmpxchg8b
            | M::Cmpxchg16b
            | M::Andn
            | M::Bextr
            | M::Blsi
            | M::Blsr
            | M::Blsmsk
            | M::Bzhi
            | M::Mulx
            | M::Pdep
            | M::Pext
            | M::Rorx
            | M::Sarx
            | M::Shlx
            | M::Shrx
            | M::Adcx
            | M::Adox
            | M::Movbe
            | M::Crc32
            | M::Movnti
            | M::Pause
            | M::Lfence
            | M::Mfence
            | M::Sfence
            | M::Clc
            | M::Stc
            | M::Cmc
            | M::Lahf
            | M::Sahf
    )
}

/// May the instruction, executed natively, raise a signal (#DE, #XM, #MF, #GP for alignment, #UD)?
pub fn may_signal(i: &Instruction, kind: Kind) -> bool {
    matches!(kind, Kind::Vector(_)) || matches!(i.mnemonic(), Mnemonic::Div | Mnemonic::Idiv | Mnemonic::Cmpxchg16b)
}
