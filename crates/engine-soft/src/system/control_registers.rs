//! MOV to and from control and debug registers, LMSW, SMSW, CLTS (SDM volume 3, sections 2.5 and 17.2).

use super::{check_umip, get_register, read_rm16, set_register};
use crate::interp::{Handler, Insn};
use crate::native::operand;
use crate::segmentation::Want;
use crate::vp::{Exec, Fault, SoftVp};
use iced_x86::{Code, Instruction, OpKind};
use x86::regs::{cr0, cr4, dr6, dr7, efer};
use x86::segment::{attr, sreg};

/// The handler of an instruction that this module executes.
pub fn handler(i: &Instruction) -> Option<Handler> {
    use Code::*;
    Some(match i.code() {
        Mov_r32_cr | Mov_r64_cr => mov_from_cr,
        Mov_cr_r32 | Mov_cr_r64 => mov_to_cr,
        Mov_r32_dr | Mov_r64_dr => mov_from_dr,
        Mov_dr_r32 | Mov_dr_r64 => mov_to_dr,
        Lmsw_rm16 | Lmsw_r32m16 | Lmsw_r64m16 => lmsw,
        Smsw_rm16 | Smsw_r32m16 | Smsw_r64m16 => smsw,
        Clts => clts,
        _ => return None,
    })
}

fn mov_from_cr(vp: &mut SoftVp, i: &Insn) -> Exec {
    vp.require_cpl0()?;
    let value = match i.iced.op1_register().number() {
        0 => vp.s.cr0,
        2 => vp.s.cr2,
        3 => vp.s.cr3,
        4 => vp.s.cr4,
        8 => vp.read_cr8(),
        _ => return Err(Fault::UD),
    };
    set_register(vp, i.iced.op0_register(), value);
    Ok(())
}

fn mov_to_cr(vp: &mut SoftVp, i: &Insn) -> Exec {
    vp.require_cpl0()?;
    let value = get_register(vp, i.iced.op1_register());
    match i.iced.op0_register().number() {
        0 => vp.write_cr0(value),
        2 => {
            vp.s.cr2 = value;
            Ok(())
        }
        3 => vp.write_cr3(value),
        4 => vp.write_cr4(value),
        8 => vp.write_cr8(value),
        _ => Err(Fault::UD),
    }
}

/// DR4 and DR5 are DR6 and DR7 unless CR4.DE is set (SDM volume 3, section 17.2.2).
fn debug_register(vp: &SoftVp, number: usize) -> Exec<usize> {
    match number {
        4 | 5 if vp.s.cr4 & cr4::DE != 0 => Err(Fault::UD),
        4 | 5 => Ok(number + 2),
        0..=7 => Ok(number),
        _ => Err(Fault::UD),
    }
}

/// DR7.GD makes every access to a debug register a debug exception before the instruction.
fn check_general_detect(vp: &mut SoftVp) -> Exec {
    if vp.s.dr7 & dr7::GD != 0 {
        vp.s.pending_debug |= dr6::BD;
        return Err(Fault::Exception { vector: x86::exception::DB, error: 0 });
    }
    Ok(())
}

fn mov_from_dr(vp: &mut SoftVp, i: &Insn) -> Exec {
    let number = debug_register(vp, i.iced.op1_register().number())?;
    vp.require_cpl0()?;
    check_general_detect(vp)?;
    let value = match number {
        6 => vp.s.dr6,
        7 => vp.s.dr7,
        n => vp.s.dr[n],
    };
    set_register(vp, i.iced.op0_register(), value);
    Ok(())
}

fn mov_to_dr(vp: &mut SoftVp, i: &Insn) -> Exec {
    let number = debug_register(vp, i.iced.op0_register().number())?;
    vp.require_cpl0()?;
    check_general_detect(vp)?;
    let value = get_register(vp, i.iced.op1_register());
    if number >= 6 && value >> 32 != 0 {
        return Err(Fault::GP0);
    }
    match number {
        6 => vp.s.dr6 = (value & 0xe00f) | dr6::RESET,
        7 => vp.s.dr7 = (value & 0xffff_2bff) | dr7::RESET,
        n => vp.s.dr[n] = value,
    }
    vp.watchpoints_changed();
    vp.update_boundary();
    Ok(())
}

fn lmsw(vp: &mut SoftVp, i: &Insn) -> Exec {
    vp.require_cpl0()?;
    let value = u64::from(read_rm16(vp, i, 0)?);
    let low = cr0::PE | cr0::MP | cr0::EM | cr0::TS;
    // PE can be set but not cleared.
    vp.write_cr0((vp.s.cr0 & !low) | (value & low) | (vp.s.cr0 & cr0::PE))
}

fn smsw(vp: &mut SoftVp, i: &Insn) -> Exec {
    check_umip(vp)?;
    let value = vp.s.cr0;
    if i.iced.op0_kind() == OpKind::Register {
        set_register(vp, i.iced.op0_register(), value);
        return Ok(());
    }
    let la = operand::linear(vp, i, 2, Want::Write)?;
    vp.write_u16(la, value as u16)
}

fn clts(vp: &mut SoftVp, _: &Insn) -> Exec {
    vp.require_cpl0()?;
    vp.s.cr0 &= !cr0::TS;
    Ok(())
}

/// Bits of CR0 that exist.
const CR0_BITS: u64 =
    cr0::PE | cr0::MP | cr0::EM | cr0::TS | cr0::ET | cr0::NE | cr0::WP | cr0::AM | cr0::NW | cr0::CD | cr0::PG;

impl SoftVp {
    /// MOV to CR0 and LMSW.
    pub fn write_cr0(&mut self, value: u64) -> Exec {
        if value >> 32 != 0 || value & (cr0::NW | cr0::CD) == cr0::NW || value & (cr0::PG | cr0::PE) == cr0::PG {
            return Err(Fault::GP0);
        }
        let new = (value & CR0_BITS) | cr0::ET;
        let old = self.s.cr0;
        let enabling = new & !old & cr0::PG != 0;
        let disabling = old & !new & cr0::PG != 0;
        let mut efer = self.s.efer;
        if enabling && efer & efer::LME != 0 {
            if self.s.cr4 & cr4::PAE == 0 || self.s.segments[sreg::CS].attr & attr::L != 0 {
                return Err(Fault::GP0);
            }
            efer |= efer::LMA;
        }
        if disabling {
            if self.mode64() || self.s.cr4 & cr4::PCIDE != 0 {
                return Err(Fault::GP0);
            }
            efer &= !efer::LMA;
        }
        let pae = self.s.cr4 & cr4::PAE != 0 && efer & efer::LMA == 0;
        if new & cr0::PG != 0 && pae && (old ^ new) & (cr0::PG | cr0::CD | cr0::NW) != 0 {
            self.reload_pdptrs()?;
        }
        self.s.cr0 = new;
        self.s.efer = efer;
        if (old ^ new) & (cr0::PG | cr0::PE | cr0::WP) != 0 {
            self.paging_changed();
        }
        if (old ^ new) & (cr0::PG | cr0::PE | cr0::AM) != 0 {
            self.mode_changed();
        }
        Ok(())
    }

    /// MOV to CR3.
    pub fn write_cr3(&mut self, value: u64) -> Exec {
        let mut checked = value;
        if self.s.cr4 & cr4::PCIDE != 0 {
            checked &= !(1 << 63);
        }
        if self.long_mode() && checked >> self.features.maxphyaddr() != 0 {
            return Err(Fault::GP0);
        }
        self.load_cr3(value)
    }

    /// MOV to CR4.
    pub fn write_cr4(&mut self, value: u64) -> Exec {
        let old = self.s.cr4;
        let changed = old ^ value;
        if value & !self.features.cr4_mask() != 0 {
            return Err(Fault::GP0);
        }
        if self.long_mode() && value & cr4::PAE == 0 {
            return Err(Fault::GP0);
        }
        if changed & value & cr4::PCIDE != 0 && (!self.long_mode() || self.s.cr3 & 0xfff != 0) {
            return Err(Fault::GP0);
        }
        const PAGING: u64 = cr4::PSE | cr4::PAE | cr4::PGE | cr4::PCIDE | cr4::SMEP | cr4::SMAP;
        let pdptrs = cr4::PSE | cr4::PAE | cr4::PGE | cr4::SMEP;
        if self.s.cr0 & cr0::PG != 0 && !self.long_mode() && value & cr4::PAE != 0 && changed & pdptrs != 0 {
            self.reload_pdptrs()?;
        }
        self.s.cr4 = value;
        if changed & PAGING != 0 {
            self.paging_changed();
        }
        Ok(())
    }

    /// CR8: the task priority.
    fn read_cr8(&self) -> u64 {
        u64::from(self.task_priority()) >> 4 & 0xf
    }

    fn write_cr8(&mut self, value: u64) -> Exec {
        if value & !0xf != 0 {
            return Err(Fault::GP0);
        }
        self.set_task_priority((value as u32) << 4);
        Ok(())
    }
}
