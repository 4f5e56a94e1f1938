//! Every instruction form of the model: which are compared, which are not and why, and how to make an instance of one.

use crate::native::{BASE16, CODE, DATA, Mode, READ_ONLY};
use crate::random::Random;
use iced_x86::{Code, Encoder, Instruction, Mnemonic, OpCodeOperandKind as K, OpKind, Register};
use viridian_engine_soft::code::CodeReader;
use viridian_engine_soft::features::Features;
use viridian_engine_soft::vp::CodeSize;

/// Why a form of the model is not compared with the host.
pub fn excluded(code: Code) -> Option<&'static str> {
    use Mnemonic as M;
    let name = format!("{code:?}");
    if name.starts_with("Mov_Sreg") || name.starts_with("Pop") && name.len() <= 8 && name.ends_with('S') {
        return Some("loads a segment from the host's own tables");
    }
    Some(match code.mnemonic() {
        M::Syscall | M::Sysenter | M::Int | M::Int1 | M::Int3 | M::Into => "would call the host's kernel",
        M::Cpuid | M::Rdtsc | M::Rdtscp | M::Rdpmc | M::Rdpid | M::Xgetbv => {
            "reads what the host has and the guest not"
        }
        M::Rdrand | M::Rdseed => "random by definition",
        M::Rdfsbase | M::Rdgsbase | M::Wrfsbase | M::Wrgsbase => "FS and GS are the tester's own",
        M::Sgdt | M::Sidt | M::Sldt | M::Str | M::Smsw => "the host's kernel emulates it (UMIP)",
        M::Verr | M::Verw | M::Lar | M::Lsl => "reads the host's descriptor tables",
        M::Lds | M::Les | M::Lfs | M::Lgs | M::Lss => "loads a segment from the host's own tables",
        M::Retf | M::Iret | M::Iretd | M::Iretq => "loads a segment from the host's own tables",
        M::Jmp | M::Call if name.contains("_m16") || name.contains("ptr") => {
            "loads a segment from the host's own tables"
        }
        M::Vmcall | M::Vmmcall | M::Vmgexit => "would call the host's hypervisor",
        M::Monitor | M::Mwait => "depends on a control bit of the host",
        _ => return None,
    })
}

/// Operands that have been placed in memory or registers of an instance, as far as the states must be made for them.
#[derive(Clone, Default)]
pub struct Needs {
    /// The explicit memory operand: base, index, scale, displacement as in the instruction.
    pub memory: Option<(Register, Register, u32, u64)>,
    /// Index vector of a gather: register number, bytes of an element.
    pub vsib: Option<(usize, usize)>,
    /// RSI, RDI, RBX address memory.
    pub implicit: bool,
}

/// An encoded instruction.
pub struct Instance {
    pub instruction: Instruction,
    pub bytes: Vec<u8>,
    pub needs: Needs,
}

fn gpr(r: &mut Random, size: usize, limit: u64) -> Register {
    use Register as R;
    let n = r.below(limit) as usize;
    match size {
        // With a REX prefix AH to BH cannot be encoded; the encoder refuses, and the caller tries again.
        1 if r.below(4) == 0 => [R::AH, R::CH, R::DH, R::BH][r.below(4) as usize],
        1 if limit == 8 => [R::AL, R::CL, R::DL, R::BL][r.below(4) as usize],
        1 => [
            R::AL,
            R::CL,
            R::DL,
            R::BL,
            R::SPL,
            R::BPL,
            R::SIL,
            R::DIL,
            R::R8L,
            R::R9L,
            R::R10L,
            R::R11L,
            R::R12L,
            R::R13L,
            R::R14L,
            R::R15L,
        ][n],
        2 => R::AX + n as u32,
        4 => R::EAX + n as u32,
        _ => R::RAX + n as u32,
    }
}

/// Makes a random instance of a form, in 64-bit code or 32- or 16-bit code. `None`: not encodable so.
pub fn instance(code: Code, mode: Mode, features: &Features, r: &mut Random) -> Option<Instance> {
    let info = code.op_code();
    let bits = mode.bits();
    if !info.is_instruction() || !info.is_available_in_mode(bits) {
        return None;
    }
    let regs = if mode == Mode::Long { 16 } else { 8 };
    let mut i = Instruction::default();
    i.set_code(code);
    let mut needs = Needs::default();
    for n in 0..info.op_count() {
        let kind = info.op_kind(n);
        let register = |i: &mut Instruction, r: Register| {
            i.set_op_kind(n, OpKind::Register);
            i.set_op_register(n, r);
        };
        let mut memory = |i: &mut Instruction, r: &mut Random, vsib: Option<Register>| {
            i.set_op_kind(n, OpKind::Memory);
            address(i, r, mode, vsib);
            needs.memory = Some((i.memory_base(), i.memory_index(), i.memory_index_scale(), i.memory_displacement64()));
        };
        let either = r.below(2) == 0;
        let small = r.below(regs) as u32;
        match kind {
            K::mem_offs | K::mem | K::mem_mib => memory(&mut i, r, None),
            K::mem_vsib32x | K::mem_vsib64x | K::mem_vsib32y | K::mem_vsib64y => {
                let wide = matches!(kind, K::mem_vsib32y | K::mem_vsib64y);
                let index = if wide { Register::YMM0 } else { Register::XMM0 } + small;
                memory(&mut i, r, Some(index));
                let element = if matches!(kind, K::mem_vsib32x | K::mem_vsib32y) { 4 } else { 8 };
                needs.vsib = Some((small as usize, element));
            }
            K::r8_or_mem
            | K::r16_or_mem
            | K::r32_or_mem
            | K::r64_or_mem
            | K::mm_or_mem
            | K::xmm_or_mem
            | K::ymm_or_mem
                if either =>
            {
                memory(&mut i, r, None);
            }
            K::r8_or_mem | K::r8_reg | K::r8_opcode => register(&mut i, gpr(r, 1, regs)),
            K::r16_or_mem | K::r16_reg | K::r16_rm | K::r16_opcode => register(&mut i, gpr(r, 2, regs)),
            K::r32_or_mem | K::r32_reg | K::r32_rm | K::r32_opcode | K::r32_vvvv => register(&mut i, gpr(r, 4, regs)),
            K::r64_or_mem | K::r64_reg | K::r64_rm | K::r64_opcode | K::r64_vvvv => register(&mut i, gpr(r, 8, regs)),
            K::r16_reg_mem | K::r32_reg_mem | K::r64_reg_mem => return None,
            K::mm_or_mem | K::mm_reg | K::mm_rm => register(&mut i, Register::MM0 + small % 8),
            K::xmm_or_mem | K::xmm_reg | K::xmm_rm | K::xmm_vvvv | K::xmm_is4 | K::xmm_is5 => {
                register(&mut i, Register::XMM0 + small);
            }
            K::ymm_or_mem | K::ymm_reg | K::ymm_rm | K::ymm_vvvv | K::ymm_is4 | K::ymm_is5 => {
                register(&mut i, Register::YMM0 + small);
            }
            K::seg_reg => register(&mut i, Register::ES + r.below(6) as u32),
            K::cr_reg => register(&mut i, [Register::CR0, Register::CR3, Register::CR4][r.below(3) as usize]),
            K::dr_reg => register(&mut i, Register::DR0 + r.below(8) as u32),
            K::es => register(&mut i, Register::ES),
            K::cs => register(&mut i, Register::CS),
            K::ss => register(&mut i, Register::SS),
            K::ds => register(&mut i, Register::DS),
            K::fs => register(&mut i, Register::FS),
            K::gs => register(&mut i, Register::GS),
            K::al => register(&mut i, Register::AL),
            K::cl => register(&mut i, Register::CL),
            K::ax => register(&mut i, Register::AX),
            K::dx => register(&mut i, Register::DX),
            K::eax => register(&mut i, Register::EAX),
            K::rax => register(&mut i, Register::RAX),
            K::st0 => register(&mut i, Register::ST0),
            K::sti_opcode => register(&mut i, Register::ST0 + r.below(8) as u32),
            K::imm4_m2z | K::imm8 => {
                let second = (0..n).any(|k| i.op_kind(k) == OpKind::Immediate16 || i.op_kind(k) == OpKind::Immediate8);
                let v = r.small_immediate();
                if second {
                    i.set_op_kind(n, OpKind::Immediate8_2nd);
                    i.set_immediate8_2nd(v);
                } else {
                    i.set_op_kind(n, OpKind::Immediate8);
                    i.set_immediate8(v);
                }
            }
            K::imm8_const_1 => {
                i.set_op_kind(n, OpKind::Immediate8);
                i.set_immediate8(1);
            }
            K::imm8sex16 => {
                i.set_op_kind(n, OpKind::Immediate8to16);
                i.set_immediate8to16(r.next() as i8 as i16);
            }
            K::imm8sex32 => {
                i.set_op_kind(n, OpKind::Immediate8to32);
                i.set_immediate8to32(r.next() as i8 as i32);
            }
            K::imm8sex64 => {
                i.set_op_kind(n, OpKind::Immediate8to64);
                i.set_immediate8to64(r.next() as i8 as i64);
            }
            K::imm16 => {
                i.set_op_kind(n, OpKind::Immediate16);
                // Frames and releases of the stack stay near it.
                i.set_immediate16(if r.below(2) == 0 { r.below(64) as u16 } else { r.value() as u16 });
            }
            K::imm32 => {
                i.set_op_kind(n, OpKind::Immediate32);
                i.set_immediate32(r.value() as u32);
            }
            K::imm32sex64 => {
                i.set_op_kind(n, OpKind::Immediate32to64);
                i.set_immediate32to64(r.value() as i32 as i64);
            }
            K::imm64 => {
                i.set_op_kind(n, OpKind::Immediate64);
                i.set_immediate64(r.value());
            }
            K::seg_rSI => {
                needs.implicit = true;
                i.set_op_kind(n, pick(mode, OpKind::MemorySegRSI, OpKind::MemorySegESI, OpKind::MemorySegSI));
            }
            K::es_rDI => {
                needs.implicit = true;
                i.set_op_kind(n, pick(mode, OpKind::MemoryESRDI, OpKind::MemoryESEDI, OpKind::MemoryESDI));
            }
            K::seg_rDI => {
                needs.implicit = true;
                i.set_op_kind(n, pick(mode, OpKind::MemorySegRDI, OpKind::MemorySegEDI, OpKind::MemorySegDI));
            }
            K::seg_rBX_al => {
                needs.implicit = true;
                i.set_op_kind(n, OpKind::Memory);
                i.set_memory_base(pick(mode, Register::RBX, Register::EBX, Register::BX));
                i.set_memory_index(Register::AL);
                i.set_memory_index_scale(1);
            }
            K::br16_1 | K::br32_1 | K::br64_1 | K::br16_2 | K::br32_4 | K::br64_4 => {
                let target = mode.start() + 20 + r.below(60);
                match kind {
                    K::br16_1 | K::br16_2 => {
                        i.set_op_kind(n, OpKind::NearBranch16);
                        i.set_near_branch16(target as u16);
                    }
                    K::br32_1 | K::br32_4 => {
                        i.set_op_kind(n, OpKind::NearBranch32);
                        i.set_near_branch32(target as u32);
                    }
                    _ => {
                        i.set_op_kind(n, OpKind::NearBranch64);
                        i.set_near_branch64(target);
                    }
                }
            }
            _ => return None,
        }
    }
    if crate::is_xsave(code.mnemonic())
        && [i.memory_base(), i.memory_index()]
            .iter()
            .any(|r| matches!(r.full_register(), Register::RAX | Register::RDX))
    {
        // They say which components, and the host has more than the models.
        return None;
    }
    if matches!(code.mnemonic(), Mnemonic::Maskmovq | Mnemonic::Maskmovdqu | Mnemonic::Vmaskmovdqu) {
        needs.implicit = true;
    }
    if needs.memory.is_some() && i.op0_kind() == OpKind::Memory && info.can_use_lock_prefix() && r.below(3) == 0 {
        i.set_has_lock_prefix(true);
    }
    match r.below(3) {
        0 if info.can_use_rep_prefix() => i.set_has_rep_prefix(true),
        1 if info.can_use_repne_prefix() => i.set_has_repne_prefix(true),
        _ => {}
    }
    let mut encoder = Encoder::new(bits);
    encoder.encode(&i, mode.start()).ok()?;
    let bytes = encoder.take_buffer();
    // What the decoder makes of it must be this form: some are only other names.
    let size = pick(mode, CodeSize::Bits64, CodeSize::Bits32, CodeSize::Bits16);
    let mut padded = bytes.clone();
    padded.resize(15, 0xcc);
    let decoded = CodeReader::new(&padded, size, features).decode()?;
    if decoded.undefined || decoded.iced.code() != code {
        return None;
    }
    Some(Instance { instruction: i, bytes, needs })
}

/// Is the form one of the model's at all?
pub fn offered(code: Code, features: &Features) -> bool {
    let info = code.op_code();
    let mut i = Instruction::default();
    i.set_code(code);
    info.is_instruction() && (info.mode64() || info.mode32()) && features.allows(&i)
}

/// A random address form. States are made so that it falls into the data (`State` generation reads [`Needs`]).
fn address(i: &mut Instruction, r: &mut Random, mode: Mode, vsib: Option<Register>) {
    let compatibility = mode != Mode::Long;
    let (first, count) = if compatibility { (Register::EAX, 8) } else { (Register::RAX, 16) };
    let any = |r: &mut Random| first + r.below(count) as u32;
    i.set_memory_displ_size(if compatibility { 4 } else { 8 });
    let place = DATA + r.below(READ_ONLY - DATA - 64) - if mode == Mode::Compat16 { BASE16 } else { 0 };
    if mode == Mode::Compat16 && vsib.is_none() && r.below(4) != 0 {
        address16(i, r);
        return;
    }
    if let Some(index) = vsib {
        i.set_memory_base(any(r));
        i.set_memory_index(index);
        i.set_memory_index_scale(1 << r.below(4));
        i.set_memory_displacement64(r.below(64));
        return;
    }
    match r.below(8) {
        // Absolute.
        0 => i.set_memory_displacement64(place),
        // RIP-relative.
        1 if !compatibility => {
            i.set_memory_base(Register::RIP);
            i.set_memory_displacement64(place);
        }
        2 | 3 => {
            i.set_memory_base(any(r));
            let index = any(r);
            if index != Register::RSP && index != Register::ESP {
                i.set_memory_index(index);
                i.set_memory_index_scale(1 << r.below(4));
            }
            i.set_memory_displacement64(displacement(r, compatibility));
        }
        4 => {
            i.set_memory_base(any(r));
        }
        _ => {
            i.set_memory_base(any(r));
            i.set_memory_displacement64(displacement(r, compatibility));
        }
    }
    if i.memory_base() == Register::None || i.memory_base() == Register::RIP {
        return;
    }
    if i.memory_displacement64() == 0 && i.memory_index() == Register::None {
        // Some bases need a displacement; the encoder adds it if there is room for one.
        i.set_memory_displ_size(1);
    }
}

/// One of the address forms of 16-bit code.
fn address16(i: &mut Instruction, r: &mut Random) {
    use Register as R;
    let forms = [
        (R::BX, R::SI),
        (R::BX, R::DI),
        (R::BP, R::SI),
        (R::BP, R::DI),
        (R::SI, R::None),
        (R::DI, R::None),
        (R::BP, R::None),
        (R::BX, R::None),
        (R::None, R::None),
    ];
    let (base, index) = forms[r.below(9) as usize];
    i.set_memory_base(base);
    i.set_memory_index(index);
    i.set_memory_displ_size(2);
    i.set_memory_displacement64(match r.below(3) {
        0 => u64::from(r.next() as i8 as u16),
        1 => DATA - BASE16 + r.below(READ_ONLY - DATA - 64),
        _ => u64::from(r.next() as u16),
    });
}

/// By mode: for 64-, 32- and 16-bit code.
fn pick<T>(mode: Mode, long: T, wide: T, small: T) -> T {
    match mode {
        Mode::Long => long,
        Mode::Compat32 => wide,
        Mode::Compat16 => small,
    }
}

fn displacement(r: &mut Random, compatibility: bool) -> u64 {
    let d = match r.below(3) {
        0 => i64::from(r.next() as i8),
        1 => i64::from(r.next() as i32 >> 8),
        _ => i64::from(r.next() as i32),
    };
    if compatibility { u64::from(d as u32) } else { d as u64 }
}

const _: () = assert!(CODE > READ_ONLY);
