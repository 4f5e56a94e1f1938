//! Descriptor tables, LDTR and TR, access-rights instructions, INVLPG and INVPCID.

use super::{check_umip, get_register, read_rm16, require_protected, set_register, set_zf};
use crate::interp::{Handler, Insn};
use crate::native::operand;
use crate::segmentation::{Descriptor, Want, is_null, selector_error};
use crate::vp::{CodeSize, Exec, Fault, SoftVp};
use iced_x86::{Code, Instruction, OpKind};
use x86::paging::is_canonical;
use x86::regs::cr4;
use x86::segment::{Segment, TableRegister, attr};

/// The handler of an instruction that this module executes.
pub fn handler(i: &Instruction) -> Option<Handler> {
    use Code::*;
    Some(match i.code() {
        Lgdt_m1632_16 | Lgdt_m1632 | Lgdt_m1664 => |vp, i| {
            vp.s.gdtr = read_table(vp, i)?;
            Ok(())
        },
        Lidt_m1632_16 | Lidt_m1632 | Lidt_m1664 => |vp, i| {
            vp.s.idtr = read_table(vp, i)?;
            Ok(())
        },
        Sgdt_m1632_16 | Sgdt_m1632 | Sgdt_m1664 => |vp, i| store_table(vp, i, vp.s.gdtr),
        Sidt_m1632_16 | Sidt_m1632 | Sidt_m1664 => |vp, i| store_table(vp, i, vp.s.idtr),
        Lldt_rm16 | Lldt_r32m16 | Lldt_r64m16 => lldt,
        Ltr_rm16 | Ltr_r32m16 | Ltr_r64m16 => ltr,
        Sldt_rm16 | Sldt_r32m16 | Sldt_r64m16 => |vp, i| store_selector(vp, i, vp.s.ldtr.selector),
        Str_rm16 | Str_r32m16 | Str_r64m16 => |vp, i| store_selector(vp, i, vp.s.tr.selector),
        Lar_r16_rm16 | Lar_r32_r32m16 | Lar_r64_r64m16 => lar,
        Lsl_r16_rm16 | Lsl_r32_r32m16 | Lsl_r64_r64m16 => lsl,
        Verr_rm16 | Verr_r32m16 | Verr_r64m16 => |vp, i| verify(vp, i, false),
        Verw_rm16 | Verw_r32m16 | Verw_r64m16 => |vp, i| verify(vp, i, true),
        Arpl_rm16_r16 | Arpl_r32m16_r32 => arpl,
        Invlpg_m => invlpg,
        Invpcid_r32_m128 | Invpcid_r64_m128 => invpcid,
        _ => return None,
    })
}

/// LGDT and LIDT: limit and base from memory.
fn read_table(vp: &mut SoftVp, i: &Insn) -> Exec<TableRegister> {
    use Code::*;
    vp.require_cpl0()?;
    let wide = matches!(i.iced.code(), Lgdt_m1664 | Lidt_m1664);
    let size = if wide { 10 } else { 6 };
    let la = operand::linear(vp, i, size, Want::Read)?;
    let mut bytes = [0u8; 10];
    vp.read_bytes(la, &mut bytes[..size])?;
    let limit = u16::from_le_bytes([bytes[0], bytes[1]]);
    let mut base = [0u8; 8];
    base.copy_from_slice(&bytes[2..10]);
    let mut base = u64::from_le_bytes(base);
    if matches!(i.iced.code(), Lgdt_m1632_16 | Lidt_m1632_16) {
        base &= 0xff_ffff;
    }
    if wide && !is_canonical(base) {
        return Err(Fault::GP0);
    }
    Ok(TableRegister { base, limit })
}

fn store_table(vp: &mut SoftVp, i: &Insn, table: TableRegister) -> Exec {
    check_umip(vp)?;
    let size = if vp.s.code_size == CodeSize::Bits64 { 10 } else { 6 };
    let mut bytes = [0u8; 10];
    bytes[..2].copy_from_slice(&table.limit.to_le_bytes());
    bytes[2..].copy_from_slice(&table.base.to_le_bytes());
    let la = operand::linear(vp, i, size, Want::Write)?;
    vp.write_bytes(la, &bytes[..size])
}

fn store_selector(vp: &mut SoftVp, i: &Insn, selector: u16) -> Exec {
    require_protected(vp)?;
    check_umip(vp)?;
    if i.iced.op0_kind() == OpKind::Register {
        set_register(vp, i.iced.op0_register(), u64::from(selector));
        return Ok(());
    }
    let la = operand::linear(vp, i, 2, Want::Write)?;
    vp.write_u16(la, selector)
}

/// A system descriptor from the GDT, for LLDT and LTR.
fn gdt_system(vp: &mut SoftVp, selector: u16, accepted: impl Fn(u32) -> bool) -> Exec<Descriptor> {
    let error = selector_error(selector);
    if selector & 4 != 0 {
        return Err(Fault::gp(error));
    }
    let mut d = vp.read_descriptor(selector, Fault::gp)?;
    if !d.system_type().is_some_and(accepted) {
        return Err(Fault::gp(error));
    }
    if !d.present() {
        return Err(Fault::np(error));
    }
    if vp.long_mode() {
        d.segment.base |= vp.read_descriptor_high(&d, Fault::gp)?;
        if !is_canonical(d.segment.base) {
            return Err(Fault::gp(error));
        }
    }
    Ok(d)
}

const LDT: u32 = 2;
const TSS_BUSY: u32 = 2;

fn lldt(vp: &mut SoftVp, i: &Insn) -> Exec {
    require_protected(vp)?;
    vp.require_cpl0()?;
    let selector = read_rm16(vp, i, 0)?;
    vp.s.ldtr = if is_null(selector) {
        Segment { selector, attr: attr::UNUSABLE, ..vp.s.ldtr }
    } else {
        gdt_system(vp, selector, |kind| kind == LDT)?.segment
    };
    Ok(())
}

fn ltr(vp: &mut SoftVp, i: &Insn) -> Exec {
    require_protected(vp)?;
    vp.require_cpl0()?;
    let selector = read_rm16(vp, i, 0)?;
    if is_null(selector) {
        return Err(Fault::GP0);
    }
    let long = vp.long_mode();
    let mut d = gdt_system(vp, selector, |kind| kind == 9 || (kind == 1 && !long))?;
    d.segment.attr |= TSS_BUSY;
    vp.write_sys_u8(d.address.wrapping_add(5), (d.segment.attr & 0xff) as u8)?;
    vp.s.tr = d.segment;
    Ok(())
}

/// The descriptor that LAR, LSL, VERR and VERW look at, if the program may see it.
fn visible(vp: &mut SoftVp, i: &Insn, op: u32) -> Exec<Option<Descriptor>> {
    require_protected(vp)?;
    let selector = read_rm16(vp, i, op)?;
    if is_null(selector) || vp.descriptor_address(selector).is_none() {
        return Ok(None);
    }
    let d = vp.read_descriptor(selector, Fault::gp)?;
    let privileged = d.is_conforming() || (d.dpl() >= vp.s.cpl && d.dpl() >= (selector & 3) as u8);
    Ok(privileged.then_some(d))
}

fn lar(vp: &mut SoftVp, i: &Insn) -> Exec {
    let long = vp.long_mode();
    let found = visible(vp, i, 1)?.filter(|d| match d.system_type() {
        None | Some(2 | 9 | 11 | 12) => true,
        Some(1 | 3 | 4 | 5) => !long,
        _ => false,
    });
    set_zf(vp, found.is_some());
    if let Some(d) = found {
        set_register(vp, i.iced.op0_register(), d.raw >> 32 & 0x00ff_ff00);
    }
    Ok(())
}

fn lsl(vp: &mut SoftVp, i: &Insn) -> Exec {
    let long = vp.long_mode();
    let found = visible(vp, i, 1)?.filter(|d| match d.system_type() {
        None | Some(2 | 9 | 11) => true,
        Some(1 | 3) => !long,
        _ => false,
    });
    set_zf(vp, found.is_some());
    if let Some(d) = found {
        set_register(vp, i.iced.op0_register(), u64::from(d.segment.limit));
    }
    Ok(())
}

fn verify(vp: &mut SoftVp, i: &Insn, write: bool) -> Exec {
    let fits = visible(vp, i, 0)?.is_some_and(|d| {
        if write {
            d.is_data() && d.attr() & attr::TYPE_WRITABLE != 0
        } else {
            d.is_data() || (d.is_code() && d.attr() & attr::TYPE_READABLE != 0)
        }
    });
    set_zf(vp, fits);
    Ok(())
}

fn arpl(vp: &mut SoftVp, i: &Insn) -> Exec {
    require_protected(vp)?;
    let source = get_register(vp, i.iced.op1_register()) as u16 & 3;
    if i.iced.op0_kind() == OpKind::Register {
        let register = i.iced.op0_register();
        let selector = get_register(vp, register) as u16;
        let adjust = selector & 3 < source;
        if adjust {
            let gpr = &mut vp.s.gprs[register.number()];
            *gpr = (*gpr & !3) | u64::from(source);
        }
        set_zf(vp, adjust);
        return Ok(());
    }
    let la = operand::linear(vp, i, 2, Want::Write)?;
    // The destination is written only if it changes, so that a page that cannot be written is no fault otherwise.
    let selector = vp.read_u16(la)?;
    let adjust = selector & 3 < source;
    if adjust {
        vp.write_u16(la, (selector & !3) | source)?;
    }
    set_zf(vp, adjust);
    Ok(())
}

/// INVLPG: no segment limit and no canonical check apply.
fn invlpg(vp: &mut SoftVp, i: &Insn) -> Exec {
    vp.require_cpl0()?;
    let (seg, offset) = operand::effective_address(vp, i);
    let base = if vp.mode64() && seg < x86::segment::sreg::FS { 0 } else { vp.s.segments[seg].base };
    let la = vp.wrap_linear(base.wrapping_add(offset));
    vp.invlpg(la);
    Ok(())
}

fn invpcid(vp: &mut SoftVp, i: &Insn) -> Exec {
    if vp.v86() {
        return Err(Fault::GP0);
    }
    vp.require_cpl0()?;
    let kind = get_register(vp, i.iced.op0_register());
    let la = operand::linear(vp, i, 16, Want::Read)?;
    let mut bytes = [0u8; 16];
    vp.read_bytes(la, &mut bytes)?;
    let descriptor = u128::from_le_bytes(bytes);
    let (pcid, address) = (descriptor as u64, (descriptor >> 64) as u64);
    if kind > 3 || pcid >> 12 != 0 {
        return Err(Fault::GP0);
    }
    if kind < 2 && vp.s.cr4 & cr4::PCIDE == 0 && pcid != 0 {
        return Err(Fault::GP0);
    }
    match kind {
        0 if !is_canonical(address) => return Err(Fault::GP0),
        0 => vp.invalidate_pcid_address(pcid as u16, address),
        1 => vp.invalidate_pcid(pcid as u16),
        2 => vp.flush_tlb_all(),
        _ => vp.flush_tlb_non_global(),
    }
    Ok(())
}
