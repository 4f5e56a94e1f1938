//! CLI, STI, PUSHF, POPF, CLAC, STAC, with the virtual-interrupt rules of VME and PVI (SDM volume 3, section 20.3.3).

use crate::interp::{Handler, Insn};
use crate::vp::{Exec, Fault, SoftVp};
use iced_x86::{Code, Instruction};
use x86::regs::{cr4, rflags};

/// The handler of an instruction that this module executes.
pub fn handler(i: &Instruction) -> Option<Handler> {
    use Code::*;
    Some(match i.code() {
        Cli => cli,
        Sti => sti,
        Pushfw | Pushfd | Pushfq => pushf,
        Popfw | Popfd | Popfq => popf,
        Clac => |vp, _| alignment_flag(vp, false),
        Stac => |vp, _| alignment_flag(vp, true),
        _ => return None,
    })
}

/// Which flag CLI and STI change now.
fn interrupt_flag(vp: &SoftVp) -> Exec<u64> {
    if vp.s.cpl <= vp.iopl() && !vp.v86() || vp.v86() && vp.iopl() == 3 {
        return Ok(rflags::IF);
    }
    let virtual_interrupts =
        if vp.v86() { vp.s.cr4 & cr4::VME != 0 } else { vp.s.cpl == 3 && vp.s.cr4 & cr4::PVI != 0 };
    if virtual_interrupts { Ok(rflags::VIF) } else { Err(Fault::GP0) }
}

fn cli(vp: &mut SoftVp, _: &Insn) -> Exec {
    let flag = interrupt_flag(vp)?;
    vp.s.rflags &= !flag;
    Ok(())
}

fn sti(vp: &mut SoftVp, _: &Insn) -> Exec {
    let flag = interrupt_flag(vp)?;
    if flag == rflags::VIF {
        if vp.s.rflags & rflags::VIP != 0 {
            return Err(Fault::GP0);
        }
        vp.s.rflags |= rflags::VIF;
        return Ok(());
    }
    if vp.s.rflags & rflags::IF == 0 {
        vp.set_flags_masked(rflags::IF, rflags::IF);
        vp.set_shadow(false);
    }
    Ok(())
}

fn size_of(code: Code) -> usize {
    match code {
        Code::Pushfw | Code::Popfw => 2,
        Code::Pushfd | Code::Popfd => 4,
        _ => 8,
    }
}

fn pushf(vp: &mut SoftVp, i: &Insn) -> Exec {
    let size = size_of(i.iced.code());
    let mut image = vp.s.rflags & !(rflags::VM | rflags::RF);
    if vp.v86() && vp.iopl() < 3 {
        if vp.s.cr4 & cr4::VME == 0 || size != 2 {
            return Err(Fault::GP0);
        }
        image = (image & !rflags::IF) | rflags::IOPL;
        if image & rflags::VIF != 0 {
            image |= rflags::IF;
        }
    }
    vp.push(image, size)
}

fn popf(vp: &mut SoftVp, i: &Insn) -> Exec {
    let size = size_of(i.iced.code());
    let v86 = vp.v86();
    let vme = v86 && vp.iopl() < 3;
    if vme && (vp.s.cr4 & cr4::VME == 0 || size != 2) {
        return Err(Fault::GP0);
    }
    let value = vp.pop(size)?;
    if vme {
        if value & rflags::TF != 0 || (value & rflags::IF != 0 && vp.s.rflags & rflags::VIP != 0) {
            return Err(Fault::GP0);
        }
        vp.commit_rsp(size as u64);
        let virtual_if = if value & rflags::IF != 0 { rflags::VIF } else { 0 };
        let mask = rflags::STATUS | rflags::DF | rflags::NT | rflags::VIF;
        vp.set_flags_masked((value & !rflags::VIF) | virtual_if, mask);
        return Ok(());
    }
    vp.commit_rsp(size as u64);
    let mut mask = vp.flags_mask(size) & !rflags::RF;
    if v86 {
        mask = (mask | rflags::IF) & !rflags::IOPL;
    }
    // RF always ends up clear, which it is while instructions execute.
    vp.set_flags_masked(value, mask);
    Ok(())
}

fn alignment_flag(vp: &mut SoftVp, on: bool) -> Exec {
    if vp.s.cpl != 0 || !vp.protected() {
        return Err(Fault::UD);
    }
    vp.set_flags_masked(if on { rflags::AC } else { 0 }, rflags::AC);
    Ok(())
}
