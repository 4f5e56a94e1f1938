//! Near branches.
//!
//! `imm` is the displacement from the next instruction, `size` the operand size.

use super::data::{condition, push64, top64};
use super::op::*;
use crate::vp::{Exec, Fault, SoftVp};
use x86::paging::is_canonical;
use x86::regs::{gpr, rflags};

/// Sets the target of a branch with 64-bit operand size.
#[inline(always)]
fn jump64(vp: &mut SoftVp, target: u64) -> Exec {
    if !is_canonical(target) {
        return Err(Fault::GP0);
    }
    vp.s.next_rip = target;
    Ok(())
}

#[inline(always)]
fn relative<const LONG: bool>(vp: &mut SoftVp, op: &Op) -> Exec {
    let target = vp.s.next_rip.wrapping_add(op.imm);
    if LONG { jump64(vp, target) } else { vp.jump_near(target, op.size.into()) }
}

/// Jcc.
pub fn jcc<const CC: u8, const LONG: bool>(vp: &mut SoftVp, op: &Op) -> Exec {
    if condition::<CC>(vp) { relative::<LONG>(vp, op) } else { Ok(()) }
}
/// `jmp rel`
pub fn jmp<const LONG: bool>(vp: &mut SoftVp, op: &Op) -> Exec {
    relative::<LONG>(vp, op)
}
/// `call rel`
pub fn call<const LONG: bool>(vp: &mut SoftVp, op: &Op) -> Exec {
    let back = vp.s.next_rip;
    let target = back.wrapping_add(op.imm);
    call_to::<LONG>(vp, op, back, target)
}
#[inline(always)]
fn call_to<const LONG: bool>(vp: &mut SoftVp, op: &Op, back: u64, target: u64) -> Exec {
    if LONG {
        if !is_canonical(target) {
            // The stack is looked at first.
            let la = vp.stack_linear(-8, 8, crate::segmentation::Want::Write)?;
            vp.probe_write(la, 8)?;
        }
        jump64(vp, target)?;
        push64(vp, back)
    } else {
        if let Err(fault) = vp.jump_near(target, op.size.into()) {
            // As above.
            let la = vp.stack_linear(-i64::from(op.size), op.size.into(), crate::segmentation::Want::Write)?;
            vp.probe_write(la, op.size.into())?;
            return Err(fault);
        }
        vp.push(back, op.size.into())
    }
}
#[inline(always)]
fn target<const MEM: bool>(vp: &mut SoftVp, op: &Op) -> Exec<u64> {
    if MEM { load_sized(vp, op, op.size) } else { Ok(get_sized(vp, op.a, op.size)) }
}
/// `jmp r/m`
pub fn jmp_indirect<const LONG: bool, const MEM: bool>(vp: &mut SoftVp, op: &Op) -> Exec {
    let target = target::<MEM>(vp, op)?;
    if LONG { jump64(vp, target) } else { vp.jump_near(target, op.size.into()) }
}
/// `call r/m`
pub fn call_indirect<const LONG: bool, const MEM: bool>(vp: &mut SoftVp, op: &Op) -> Exec {
    let target = target::<MEM>(vp, op)?;
    let back = vp.s.next_rip;
    call_to::<LONG>(vp, op, back, target)
}
/// RET; `imm` is the number of bytes to release.
pub fn ret<const LONG: bool>(vp: &mut SoftVp, op: &Op) -> Exec {
    if LONG {
        let target = top64(vp)?;
        jump64(vp, target)?;
        vp.s.gprs[gpr::RSP] = vp.s.gprs[gpr::RSP].wrapping_add(8 + op.imm);
    } else {
        let target = vp.pop(op.size.into())?;
        vp.jump_near(target, op.size.into())?;
        vp.commit_rsp(u64::from(op.size) + op.imm);
    }
    Ok(())
}

/// LOOP (`KIND` 0), LOOPE (1), LOOPNE (2), JCXZ (3); the counter is as wide as the address size.
pub fn loop_on<const KIND: u8>(vp: &mut SoftVp, op: &Op) -> Exec {
    const RCX: u8 = gpr::RCX as u8 * 8;
    let mut n = get_sized(vp, RCX, op.addr);
    let zf = vp.s.rflags & rflags::ZF != 0;
    let taken = if KIND == 3 {
        n == 0
    } else {
        n = n.wrapping_sub(1) & mask(op.addr);
        n != 0
            && match KIND {
                1 => zf,
                2 => !zf,
                _ => true,
            }
    };
    if taken {
        if op.flags & flag::LONG != 0 && op.size == 8 {
            relative::<true>(vp, op)?;
        } else {
            relative::<false>(vp, op)?;
        }
    }
    if KIND != 3 {
        set_sized(vp, RCX, op.addr, n);
    }
    Ok(())
}
