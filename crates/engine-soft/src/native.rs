//! x87, MMX, SSE, AVX, FMA, F16C, AES, PCLMULQDQ and SHA: executed by the host's own unit.
//!
//! No semantics are written down here. Each distinct instruction becomes, once, a *stub*: the same instruction with its
//! memory operand replaced by `[host register]`, followed by `ret`. Executing it means: check what the architecture
//! checks first (#UD, #NM, alignment, the operand's page), read the operand into a bounce buffer, load the guest's
//! registers, call the stub, store the registers, write the buffer back. Results, flags and exceptions (an unmasked one
//! arrives as SIGFPE, with the destination unchanged) are therefore the hardware's.
//!
//! Written by hand are only the forms whose memory operand is not one piece: masked moves and gathers ([`masked`]), and
//! saving and restoring of state ([`crate::xstate`]).

pub mod masked;
pub mod operand;
pub mod thunk;

use crate::interp::{Handler, Insn};
use crate::segmentation::Want;
use crate::translate::code_memory::CodeMemory;
use crate::vp::{CodeSize, Exec, Fault, SoftVp, XsaveArea};
use crate::xstate;
use iced_x86::{CpuidFeature, Encoder, EncodingKind, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register};
use std::cell::RefCell;
use std::collections::HashMap;
pub use thunk::{host_components, take_signal};
use x86::regs::{cr0, cr4, gpr, rflags, xcr0};
use x86::{exception, xsave};

/// Which unit executes an instruction, as far as #UD and #NM are concerned (SDM volume 3, section 2.5 and table 9-3;
/// volume 2, section 2.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// x87.
    X87,
    /// MMX registers (aliased on x87).
    Mmx,
    /// Legacy-encoded SSE: needs CR4.OSFXSR.
    Sse,
    /// VEX-encoded: needs CR4.OSXSAVE and XCR0.
    Avx,
}

/// The unit of an instruction; `None` if it is not for this module.
pub fn unit(i: &iced_x86::Instruction) -> Option<Unit> {
    use CpuidFeature as F;
    // Conversions from memory to a general register name no vector register, and are the unit's work all the same.
    let converts = matches!(
        i.mnemonic(),
        Mnemonic::Cvtss2si
            | Mnemonic::Cvtsd2si
            | Mnemonic::Cvttss2si
            | Mnemonic::Cvttsd2si
            | Mnemonic::Vcvtss2si
            | Mnemonic::Vcvtsd2si
            | Mnemonic::Vcvttss2si
            | Mnemonic::Vcvttsd2si
    );
    let vector = converts
        || (0..i.op_count()).any(|n| {
            i.op_kind(n) == OpKind::Register && {
                let r = i.op_register(n);
                r.is_xmm() || r.is_ymm() || r.is_mm()
            }
        });
    match i.encoding() {
        EncodingKind::VEX => {
            let vector = vector || matches!(i.mnemonic(), Mnemonic::Vzeroupper | Mnemonic::Vzeroall);
            // The mask instructions of AVX-512 are VEX-encoded too; no model offers them.
            let offered = i.cpuid_features().iter().all(|f| {
                matches!(
                    f,
                    F::AVX | F::AVX2 | F::FMA | F::F16C | F::AES | F::PCLMULQDQ | F::VAES | F::VPCLMULQDQ | F::GFNI
                )
            });
            (vector && offered).then_some(Unit::Avx)
        }
        EncodingKind::Legacy => {
            let features = i.cpuid_features();
            let has = |list: &[F]| features.iter().any(|f| list.contains(f));
            if has(&[F::FPU, F::FPU287, F::FPU387]) || i.mnemonic() == Mnemonic::Wait {
                return Some(Unit::X87);
            }
            if i.mnemonic() == Mnemonic::Emms {
                return Some(Unit::Mmx);
            }
            let mm = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Register && i.op_register(n).is_mm());
            if mm && has(&[F::MMX, F::SSE, F::SSE2, F::SSSE3]) {
                return Some(Unit::Mmx);
            }
            let offered = has(&[
                F::SSE,
                F::SSE2,
                F::SSE3,
                F::SSSE3,
                F::SSE4_1,
                F::SSE4_2,
                F::SSE4A,
                F::AES,
                F::PCLMULQDQ,
                F::SHA,
                F::GFNI,
            ]);
            (vector && offered).then_some(Unit::Sse)
        }
        _ => None,
    }
}

/// What executes this instruction, if it belongs here.
pub fn handler(i: &iced_x86::Instruction) -> Option<Handler> {
    if let Some(handler) = masked::handler(i) {
        return Some(handler);
    }
    if xstate::handler(i).is_some() {
        return None;
    }
    match i.mnemonic() {
        // Every encoding of the fences (the low three bits of ModRM are ignored).
        Mnemonic::Lfence | Mnemonic::Mfence | Mnemonic::Sfence => return Some(fence),
        Mnemonic::Movnti => return Some(store_non_temporal),
        _ => {}
    }
    unit(i).map(|_| execute as Handler)
}

fn fence(_: &mut SoftVp, _: &Insn) -> Exec {
    std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    Ok(())
}

/// MOVNTI: a store; its weak order is not observable as anything but a stronger one.
fn store_non_temporal(vp: &mut SoftVp, insn: &Insn) -> Exec {
    let register = insn.iced.op1_register();
    let address = operand::linear(vp, insn, register.size(), Want::Write)?;
    let value = vp.s.gprs[register.number()];
    if register.size() == 8 { vp.write_u64(address, value) } else { vp.write_u32(address, value as u32) }
}

/// Raises #UD or #NM where the unit may not be used now.
pub fn check_available(vp: &SoftVp, unit: Unit) -> Exec {
    let s = &vp.s;
    match unit {
        Unit::X87 => {
            if s.cr0 & (cr0::EM | cr0::TS) != 0 {
                return Err(Fault::NM);
            }
        }
        Unit::Mmx | Unit::Sse => {
            if s.cr0 & cr0::EM != 0 || unit == Unit::Sse && s.cr4 & cr4::OSFXSR == 0 {
                return Err(Fault::UD);
            }
            if s.cr0 & cr0::TS != 0 {
                return Err(Fault::NM);
            }
        }
        Unit::Avx => {
            let both = xcr0::SSE | xcr0::AVX;
            let enabled = s.cr0 & cr0::PE != 0
                && s.rflags & rflags::VM == 0
                && s.cr4 & cr4::OSXSAVE != 0
                && s.xcr0 & both == both;
            if !enabled {
                return Err(Fault::UD);
            }
            if s.cr0 & cr0::TS != 0 {
                return Err(Fault::NM);
            }
        }
    }
    Ok(())
}

/// A memory operand of a stub.
#[derive(Clone, Copy)]
struct Memory {
    size: usize,
    read: bool,
    write: bool,
    /// The operand must be aligned to its size.
    aligned: bool,
    /// Host register that holds the bounce buffer's address.
    register: usize,
}

/// A generated stub and what is to be done around it.
#[derive(Clone, Copy)]
struct Stub {
    code: *const u8,
    unit: Unit,
    memory: Option<Memory>,
    /// Host register that stands in for a guest's RSP operand.
    rsp: Option<usize>,
    /// x87 only: raises pending exceptions first.
    waits: bool,
    /// x87 only: sets the last-instruction pointers.
    sets_pointers: bool,
    /// Registers other than vector ones may be written.
    writes_gpr: bool,
}

/// Most stubs before all are dropped: a guest makes new encodings at will, but only so many are kept.
const MAX_STUBS: usize = 16384;
const STUB_SIZE: usize = 16;

/// The stubs of one host thread.
struct Stubs {
    memory: Option<CodeMemory>,
    by_bytes: HashMap<[u8; 16], Stub>,
    info: InstructionInfoFactory,
}

thread_local! {
    static STUBS: RefCell<Stubs> = RefCell::new(Stubs {
        memory: None, by_bytes: HashMap::new(), info: InstructionInfoFactory::new(),
    });
}

impl Stubs {
    fn get(&mut self, insn: &Insn, size: CodeSize) -> Exec<Stub> {
        let mut key = [0; 16];
        key[..insn.iced.len()].copy_from_slice(&insn.bytes[..insn.iced.len()]);
        key[15] = size as u8;
        if let Some(stub) = self.by_bytes.get(&key) {
            return Ok(*stub);
        }
        let stub = self.make(insn)?;
        self.by_bytes.insert(key, stub);
        Ok(stub)
    }

    /// Generates a stub. An instruction that the host cannot encode or does not have does not exist for the guest
    /// either: #UD.
    fn make(&mut self, insn: &Insn) -> Exec<Stub> {
        crate::signals::install();
        let i = &insn.iced;
        let unit = unit(i).ok_or(Fault::UD)?;
        if unit == Unit::Avx && host_components() & xcr0::AVX == 0 {
            return Err(Fault::UD);
        }
        let mut copy = *i;
        // General registers that the instruction names, explicitly or not.
        let mut used = 1u16 << gpr::RSP;
        let mut writes_gpr = false;
        for r in self.info.info(i).used_registers() {
            let full = r.register().full_register();
            if full.is_gpr64() {
                used |= 1 << full.number();
                writes_gpr |= !matches!(r.access(), OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess);
            }
        }
        let mut free = (0..16).rev().filter(move |n| used >> n & 1 == 0);
        let mut rsp = None;
        let mut memory = None;
        for n in 0..i.op_count() {
            match i.op_kind(n) {
                OpKind::Register if i.op_register(n).full_register() == Register::RSP => {
                    let other = match rsp {
                        Some(other) => other,
                        None => free.next().ok_or(Fault::UD)?,
                    };
                    rsp = Some(other);
                    copy.set_op_register(n, same_size(i.op_register(n), other));
                }
                OpKind::Memory => {
                    let register = free.next().ok_or(Fault::UD)?;
                    let access = self.info.info(i).op_access(n);
                    let size = i.memory_size().size();
                    if size == 0 || size > 64 {
                        return Err(Fault::UD);
                    }
                    memory = Some(Memory {
                        size,
                        read: !matches!(access, OpAccess::Write),
                        write: !matches!(access, OpAccess::Read | OpAccess::CondRead),
                        aligned: needs_alignment(i, unit, size),
                        register,
                    });
                    copy.set_memory_base(Register::RAX + register as u32);
                    copy.set_memory_index(Register::None);
                    copy.set_memory_index_scale(1);
                    copy.set_memory_displacement64(0);
                    copy.set_memory_displ_size(0);
                }
                _ => {}
            }
        }
        copy.set_segment_prefix(Register::None);
        let mut encoder = Encoder::new(64);
        if encoder.encode(&copy, 0).is_err() {
            tracing::debug!(instruction = %i, "cannot be re-encoded for the host");
            return Err(Fault::UD);
        }
        let mut code = encoder.take_buffer();
        code.push(0xc3);
        if self.memory.is_none() {
            let memory = CodeMemory::new(MAX_STUBS * STUB_SIZE).map_err(|error| {
                tracing::error!(%error, "the host gives no executable memory; vector instructions are #UD");
                Fault::UD
            })?;
            self.memory = Some(memory);
        }
        if self.by_bytes.len() == MAX_STUBS {
            self.by_bytes.clear();
        }
        let memory_of_code = self.memory.as_mut().ok_or(Fault::UD)?;
        let at = self.by_bytes.len() * STUB_SIZE;
        if code.len() > STUB_SIZE || !memory_of_code.put(at, &code) {
            return Err(Fault::UD);
        }
        let control = matches!(
            i.mnemonic(),
            Mnemonic::Fnclex
                | Mnemonic::Fninit
                | Mnemonic::Fnstcw
                | Mnemonic::Fnstsw
                | Mnemonic::Fldcw
                | Mnemonic::Wait
                | Mnemonic::Fdisi
                | Mnemonic::Feni
                | Mnemonic::Fndisi
                | Mnemonic::Fneni
                | Mnemonic::Fnsetpm
        );
        let no_wait = control && !matches!(i.mnemonic(), Mnemonic::Fldcw | Mnemonic::Wait);
        Ok(Stub {
            code: memory_of_code.exec(at),
            unit,
            memory,
            rsp,
            waits: matches!(unit, Unit::X87 | Unit::Mmx) && !no_wait,
            sets_pointers: unit == Unit::X87 && !control,
            writes_gpr,
        })
    }
}

/// The register of number `number` with the size of `like`.
fn same_size(like: Register, number: usize) -> Register {
    let base = match like.size() {
        8 => Register::RAX,
        4 => Register::EAX,
        _ => Register::AX,
    };
    base + number as u32
}

/// Does a misaligned memory operand raise #GP? Legacy SSE: every full 16-byte operand but those of the unaligned moves
/// and the string compares; VEX: only the explicitly aligned moves (SDM volume 2, section 2.4, exception types 1, 2, 4).
fn needs_alignment(i: &iced_x86::Instruction, unit: Unit, size: usize) -> bool {
    use Mnemonic as M;
    match unit {
        Unit::Sse => {
            size == 16
                && !matches!(
                    i.mnemonic(),
                    M::Movups
                        | M::Movupd
                        | M::Movdqu
                        | M::Lddqu
                        | M::Pcmpestri
                        | M::Pcmpestrm
                        | M::Pcmpistri
                        | M::Pcmpistrm
                        | M::Pcmpestri64
                        | M::Pcmpestrm64
                )
                && !(is_sha(i) && host_is_amd())
        }
        Unit::Avx => matches!(
            i.mnemonic(),
            M::Vmovaps | M::Vmovapd | M::Vmovdqa | M::Vmovntps | M::Vmovntpd | M::Vmovntdq | M::Vmovntdqa
        ),
        // CVTPD2PI and CVTTPD2PI.
        Unit::Mmx => size == 16,
        Unit::X87 => false,
    }
}

fn is_sha(i: &iced_x86::Instruction) -> bool {
    i.cpuid_features().contains(&CpuidFeature::SHA)
}

/// AMD's SHA instructions take misaligned operands (measured; Intel's are of exception type 4, which does not).
fn host_is_amd() -> bool {
    x86::cpuid::host_cpuid(0, 0).ebx == u32::from_le_bytes(*b"Auth")
}

/// FSW.ES: an unmasked x87 exception is pending.
const FSW_ES: u16 = 1 << 7;

/// Executes an instruction through its stub.
fn execute(vp: &mut SoftVp, insn: &Insn) -> Exec {
    let stub = STUBS.with_borrow_mut(|stubs| stubs.get(insn, vp.s.code_size))?;
    if insn.iced.mnemonic() == Mnemonic::Wait {
        if vp.s.cr0 & (cr0::MP | cr0::TS) == cr0::MP | cr0::TS {
            return Err(Fault::NM);
        }
    } else {
        check_available(vp, stub.unit)?;
    }
    let fsw = xstate::get_u16(&vp.s.xsave, xsave::legacy::FSW);
    if stub.waits && fsw & FSW_ES != 0 {
        return Err(Fault::Exception { vector: exception::MF, error: 0 });
    }
    let mut buffer = Buffer([0; 64]);
    let mut address = 0;
    if let Some(m) = &stub.memory {
        let want = if m.write { Want::Write } else { Want::Read };
        if m.aligned && vp.s.code_size == CodeSize::Bits64 {
            // Alignment comes before the canonical form.
            let (segment, offset) = operand::effective_address(vp, insn);
            if vp.s.segments[segment].base.wrapping_add(offset) & (m.size as u64 - 1) != 0
                && (segment >= x86::segment::sreg::FS || offset & (m.size as u64 - 1) != 0)
            {
                return Err(Fault::GP0);
            }
        }
        address = operand::linear(vp, insn, m.size, want)?;
        if m.aligned && address & (m.size as u64 - 1) != 0 {
            return Err(Fault::GP0);
        }
        if m.write {
            vp.probe_write(address, m.size)?;
        }
        if m.read {
            vp.read_bytes(address, &mut buffer.0[..m.size])?;
        }
    }
    let pointers = xstate::pointers(&vp.s.xsave);
    let mut context = thunk::Context::new(&mut vp.s.xsave, stub.code);
    context.gprs = vp.s.gprs;
    context.rflags = vp.s.rflags & rflags::STATUS | rflags::FIXED;
    if let Some(m) = &stub.memory {
        context.gprs[m.register] = &raw mut buffer as u64;
    }
    if let Some(other) = stub.rsp {
        context.gprs[other] = vp.s.gprs[gpr::RSP];
    }
    // SAFETY: `make` produced the stub: one instruction, whose only memory operand is the buffer above (at least as
    // large as any operand), that cannot name RSP; the image is the VP's own and kept valid by `xstate`.
    unsafe { context.run() };
    xstate::set_pointers(&mut vp.s.xsave, pointers);
    if context.fault != 0 {
        return Err(raised(vp, stub.unit, context.fault));
    }
    if let Some(m) = &stub.memory
        && m.write
        && !(stub.unit == Unit::X87 && store_was_suppressed(&vp.s.xsave, fsw))
    {
        vp.write_bytes(address, &buffer.0[..m.size])?;
    }
    if stub.writes_gpr {
        for n in 0..16 {
            if n != gpr::RSP && stub.rsp != Some(n) && stub.memory.is_none_or(|m| m.register != n) {
                vp.s.gprs[n] = context.gprs[n];
            }
        }
        if let Some(other) = stub.rsp {
            vp.s.gprs[gpr::RSP] = context.gprs[other];
        }
    }
    vp.s.rflags = vp.s.rflags & !rflags::STATUS | context.rflags & rflags::STATUS;
    if stub.sets_pointers {
        let opcode = fop(&insn.bytes[..insn.iced.len()]);
        let data = stub.memory.map(|_| operand::effective_address(vp, insn).1);
        let p = xstate::Pointers { fip: vp.s.rip, fdp: data.unwrap_or(pointers.fdp), fop: opcode };
        xstate::set_pointers(&mut vp.s.xsave, p);
    }
    Ok(())
}

/// Room for one memory operand.
#[repr(C, align(64))]
struct Buffer([u8; 64]);

/// The fault that a signal in a stub stands for.
fn raised(vp: &SoftVp, unit: Unit, signal: u64) -> Fault {
    if signal != libc::SIGFPE as u64 {
        return Fault::UD;
    }
    let vector = match unit {
        // An x87 exception that waits is found before an MMX instruction runs: this is one of a conversion.
        Unit::X87 => exception::MF,
        // SDM volume 3, section 2.5: without OSXMMEXCPT an unmasked SIMD exception is #UD.
        _ if vp.s.cr4 & cr4::OSXMMEXCPT == 0 => exception::UD,
        _ => exception::XM,
    };
    Fault::Exception { vector, error: 0 }
}

/// Did an x87 store leave its destination alone, because of an unmasked invalid, overflow or underflow exception (SDM
/// volume 1, sections 8.5.1, 8.5.4, 8.5.5)? An unmasked precision exception is raised after the store.
fn store_was_suppressed(image: &XsaveArea, fsw_before: u16) -> bool {
    const INVALID_OVERFLOW_UNDERFLOW: u16 = 0x19;
    let fsw = xstate::get_u16(image, xsave::legacy::FSW);
    let fcw = xstate::get_u16(image, xsave::legacy::FCW);
    fsw & FSW_ES != 0 && fsw_before & FSW_ES == 0 && fsw & !fcw & INVALID_OVERFLOW_UNDERFLOW != 0
}

/// The last-opcode register's value: 11 bits, the low 3 of the first opcode byte and the second (SDM volume 1, 8.1.9).
fn fop(bytes: &[u8]) -> u16 {
    let escape = bytes.iter().position(|b| b & 0xf8 == 0xd8);
    match escape {
        Some(at) if at + 1 < bytes.len() => u16::from(bytes[at] & 7) << 8 | u16::from(bytes[at + 1]),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions};

    /// Found by a Debian busybox: its awk reads a number with exactly this instruction.
    #[test]
    fn conversions_from_memory_belong_here() {
        for bytes in [
            &[0xf2, 0x48, 0x0f, 0x2c, 0x44, 0x24, 0x20][..], // cvttsd2si rax, [rsp+0x20]
            &[0xf3, 0x0f, 0x2d, 0x07],                       // cvtss2si eax, [rdi]
        ] {
            let i = Decoder::new(64, bytes, DecoderOptions::NONE).decode();
            assert_eq!(unit(&i), Some(Unit::Sse), "{i}");
        }
        let i = Decoder::new(64, &[0xc5, 0xfb, 0x2c, 0x07], DecoderOptions::NONE).decode(); // vcvttsd2si eax, [rdi]
        assert_eq!(unit(&i), Some(Unit::Avx), "{i}");
        let i = Decoder::new(64, &[0x0f, 0xc3, 0x07], DecoderOptions::NONE).decode(); // movnti is a plain store
        assert_eq!(unit(&i), None, "{i}");
    }
}
