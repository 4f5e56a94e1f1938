//! Privileged and system instructions (SDM volume 2; volume 3, chapters 2 and 5), one submodule a subject.

pub mod control_registers;
pub mod descriptors;
pub mod flags;
pub mod io;

use crate::features;
use crate::interp::{Handler, Insn};
use crate::native::operand;
use crate::segmentation::Want;
use crate::vp::{Exec, Fault, SoftVp};
use iced_x86::{Code, Instruction, OpKind, Register};
use std::sync::atomic::Ordering;
use x86::paging::is_canonical;
use x86::regs::gpr::{RAX, RBX, RCX, RDX};
use x86::regs::{cr4, rflags, xcr0};
use x86::segment::sreg;

/// The handler of an instruction that this module executes.
pub fn handler(i: &Instruction) -> Option<Handler> {
    use Code::*;
    Some(match i.code() {
        Cpuid => cpuid,
        Rdmsr => rdmsr,
        Wrmsr => wrmsr,
        Rdtsc => rdtsc,
        Rdtscp => rdtscp,
        Rdpid_r32 | Rdpid_r64 => rdpid,
        Rdpmc => rdpmc,
        Hlt => hlt,
        Monitorw | Monitord | Monitorq => monitor,
        Mwait => mwait,
        Invd | Wbinvd | Wbnoinvd => |vp, _| vp.require_cpl0(),
        Clflush_m8 | Clflushopt_m8 | Clwb_m8 => cache_line,
        Lfence | Mfence | Sfence => |_, _| {
            std::sync::atomic::fence(Ordering::SeqCst);
            Ok(())
        },
        Rdfsbase_r32 | Rdfsbase_r64 | Rdgsbase_r32 | Rdgsbase_r64 => read_base,
        Wrfsbase_r32 | Wrfsbase_r64 | Wrgsbase_r32 | Wrgsbase_r64 => write_base,
        Xgetbv => xgetbv,
        Xsetbv => xsetbv,
        _ => {
            return control_registers::handler(i)
                .or_else(|| descriptors::handler(i))
                .or_else(|| flags::handler(i))
                .or_else(|| io::handler(i));
        }
    })
}

impl SoftVp {
    /// Is the model's vendor AMD (or one that follows it)?
    pub fn vendor_is_amd(&self) -> bool {
        !self.features.is_intel()
    }

    /// #GP(0) unless the privilege level is 0.
    pub(crate) fn require_cpl0(&self) -> Exec {
        if self.s.cpl == 0 { Ok(()) } else { Err(Fault::GP0) }
    }

    /// Writes EDX:EAX, clearing the upper halves.
    fn set_edx_eax(&mut self, value: u64) {
        self.s.gprs[RAX] = value & 0xffff_ffff;
        self.s.gprs[RDX] = value >> 32;
    }

    fn edx_eax(&self) -> u64 {
        (self.s.gprs[RAX] & 0xffff_ffff) | self.s.gprs[RDX] << 32
    }

    /// The guest's TSC now.
    pub fn read_tsc(&self) -> u64 {
        partition::clock::host_tsc().wrapping_add(self.s.tsc_offset)
    }

    fn check_tsc(&self) -> Exec {
        if self.s.cr4 & cr4::TSD != 0 && self.s.cpl != 0 { Err(Fault::GP0) } else { Ok(()) }
    }
}

/// Writes a general-purpose register operand of 2, 4 or 8 bytes (4 clears the upper half).
pub(crate) fn set_register(vp: &mut SoftVp, register: Register, value: u64) {
    let gpr = &mut vp.s.gprs[register.number()];
    match register.size() {
        8 => *gpr = value,
        4 => *gpr = value & 0xffff_ffff,
        _ => *gpr = (*gpr & !0xffff) | (value & 0xffff),
    }
}

/// Reads a general-purpose register operand of 2, 4 or 8 bytes.
pub(crate) fn get_register(vp: &SoftVp, register: Register) -> u64 {
    let value = vp.s.gprs[register.number()];
    match register.size() {
        8 => value,
        4 => value & 0xffff_ffff,
        _ => value & 0xffff,
    }
}

/// Reads an r/m16 operand (a register of any width: its low 16 bits).
pub(crate) fn read_rm16(vp: &mut SoftVp, i: &Insn, op: u32) -> Exec<u16> {
    if i.iced.op_kind(op) == OpKind::Register {
        return Ok(get_register(vp, i.iced.op_register(op)) as u16);
    }
    let la = operand::linear(vp, i, 2, Want::Read)?;
    vp.read_u16(la)
}

fn cpuid(vp: &mut SoftVp, _: &Insn) -> Exec {
    let (leaf, subleaf) = (vp.s.gprs[RAX] as u32, vp.s.gprs[RCX] as u32);
    let r = features::cpuid(vp, leaf, subleaf);
    vp.s.gprs[RAX] = u64::from(r.eax);
    vp.s.gprs[RBX] = u64::from(r.ebx);
    vp.s.gprs[RCX] = u64::from(r.ecx);
    vp.s.gprs[RDX] = u64::from(r.edx);
    Ok(())
}

fn rdmsr(vp: &mut SoftVp, _: &Insn) -> Exec {
    vp.require_cpl0()?;
    let value = vp.msr_read(vp.s.gprs[RCX] as u32)?;
    vp.set_edx_eax(value);
    Ok(())
}

fn wrmsr(vp: &mut SoftVp, _: &Insn) -> Exec {
    vp.require_cpl0()?;
    vp.msr_write(vp.s.gprs[RCX] as u32, vp.edx_eax())
}

fn rdtsc(vp: &mut SoftVp, _: &Insn) -> Exec {
    vp.check_tsc()?;
    vp.set_edx_eax(vp.read_tsc());
    Ok(())
}

fn rdtscp(vp: &mut SoftVp, _: &Insn) -> Exec {
    vp.check_tsc()?;
    vp.set_edx_eax(vp.read_tsc());
    vp.s.gprs[RCX] = vp.s.tsc_aux & 0xffff_ffff;
    Ok(())
}

fn rdpid(vp: &mut SoftVp, i: &Insn) -> Exec {
    let register = i.iced.op0_register();
    vp.s.gprs[register.number()] = vp.s.tsc_aux & 0xffff_ffff;
    Ok(())
}

/// The models have no performance counters: every counter number is out of range.
fn rdpmc(_: &mut SoftVp, _: &Insn) -> Exec {
    Err(Fault::GP0)
}

fn hlt(vp: &mut SoftVp, _: &Insn) -> Exec {
    vp.require_cpl0()?;
    vp.halt();
    Ok(())
}

/// MONITOR: the address is checked like a read; extensions in ECX are not offered.
fn monitor(vp: &mut SoftVp, i: &Insn) -> Exec {
    if vp.s.cpl != 0 {
        return Err(Fault::UD);
    }
    if vp.s.gprs[RCX] as u32 != 0 {
        return Err(Fault::GP0);
    }
    let prefix = i.iced.segment_prefix();
    let seg = if prefix == Register::None { sreg::DS } else { prefix.number() };
    let address = match i.iced.code() {
        Code::Monitorw => vp.s.gprs[RAX] & 0xffff,
        Code::Monitord => vp.s.gprs[RAX] & 0xffff_ffff,
        _ => vp.s.gprs[RAX],
    };
    let la = vp.seg_linear(seg, address, 1, Want::Read)?;
    vp.probe_read(la, 1)
}

/// MWAIT: may end for any reason, so it ends at once, after letting others run.
fn mwait(vp: &mut SoftVp, _: &Insn) -> Exec {
    if vp.s.cpl != 0 {
        return Err(Fault::UD);
    }
    if vp.s.gprs[RCX] as u32 & !1 != 0 {
        return Err(Fault::GP0);
    }
    std::thread::yield_now();
    Ok(())
}

/// CLFLUSH and its relatives: checked like a byte read; the host's caches are coherent, so there is nothing to do.
fn cache_line(vp: &mut SoftVp, i: &Insn) -> Exec {
    let la = operand::linear(vp, i, 1, Want::Read)?;
    vp.probe_read(la, 1)
}

fn base_register(i: &Insn) -> usize {
    use Code::*;
    match i.iced.code() {
        Rdfsbase_r32 | Rdfsbase_r64 | Wrfsbase_r32 | Wrfsbase_r64 => sreg::FS,
        _ => sreg::GS,
    }
}

fn read_base(vp: &mut SoftVp, i: &Insn) -> Exec {
    if vp.s.cr4 & cr4::FSGSBASE == 0 {
        return Err(Fault::UD);
    }
    let value = vp.s.segments[base_register(i)].base;
    set_register(vp, i.iced.op0_register(), value);
    Ok(())
}

fn write_base(vp: &mut SoftVp, i: &Insn) -> Exec {
    if vp.s.cr4 & cr4::FSGSBASE == 0 {
        return Err(Fault::UD);
    }
    let value = get_register(vp, i.iced.op0_register());
    if !is_canonical(value) {
        return Err(Fault::GP0);
    }
    vp.s.segments[base_register(i)].base = value;
    Ok(())
}

fn xgetbv(vp: &mut SoftVp, _: &Insn) -> Exec {
    if vp.s.cr4 & cr4::OSXSAVE == 0 {
        return Err(Fault::UD);
    }
    let value = match vp.s.gprs[RCX] as u32 {
        0 => vp.s.xcr0,
        // XINUSE: any superset of what is not in its initial state may be reported.
        1 if vp.features.has(&x86::cpuid::bits::XGETBV1) => vp.s.xcr0 & (xcr0::X87 | xcr0::SSE | xcr0::AVX),
        _ => return Err(Fault::GP0),
    };
    vp.set_edx_eax(value);
    Ok(())
}

fn xsetbv(vp: &mut SoftVp, _: &Insn) -> Exec {
    if vp.s.cr4 & cr4::OSXSAVE == 0 {
        return Err(Fault::UD);
    }
    vp.require_cpl0()?;
    let value = vp.edx_eax();
    if vp.s.gprs[RCX] as u32 != 0 || !vp.features.xcr0_valid(value) {
        return Err(Fault::GP0);
    }
    vp.s.xcr0 = value;
    Ok(())
}

/// Virtual-8086 mode and real mode have no selectors: instructions about them are #UD there.
fn require_protected(vp: &SoftVp) -> Exec {
    if vp.protected() { Ok(()) } else { Err(Fault::UD) }
}

/// User-mode instruction prevention (SDM volume 3, section 2.5, CR4.UMIP).
fn check_umip(vp: &SoftVp) -> Exec {
    if vp.s.cr4 & cr4::UMIP != 0 && vp.s.cpl != 0 { Err(Fault::GP0) } else { Ok(()) }
}

/// Sets or clears ZF.
fn set_zf(vp: &mut SoftVp, on: bool) {
    vp.s.rflags = (vp.s.rflags & !rflags::ZF) | if on { rflags::ZF } else { 0 };
}
