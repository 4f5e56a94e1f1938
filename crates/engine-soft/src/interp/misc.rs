//! Decimal adjustment, BOUND, undefined instructions.

use super::op::*;
use crate::vp::{Exec, Fault, SoftVp};
use x86::regs::rflags;

fn result_flags(value: u8) -> u64 {
    let mut f = 0;
    if value == 0 {
        f |= rflags::ZF;
    }
    if value & 0x80 != 0 {
        f |= rflags::SF;
    }
    if value.count_ones() % 2 == 0 {
        f |= rflags::PF;
    }
    f
}

/// DAA and DAS (SDM volume 2). OF, undefined, is cleared.
pub fn daa<const SUB: bool>(vp: &mut SoftVp, _: &Op) -> Exec {
    let old = get::<u8>(vp, 0);
    let cf = vp.s.rflags & rflags::CF != 0;
    let af = vp.s.rflags & rflags::AF != 0;
    let mut al = old;
    let mut f = 0;
    if old & 0xf > 9 || af {
        al = if SUB { al.wrapping_sub(6) } else { al.wrapping_add(6) };
        f |= rflags::AF;
        // DAS: the borrow of this step counts too.
        if SUB && old < 6 {
            f |= rflags::CF;
        }
    }
    if old > 0x99 || cf {
        al = if SUB { al.wrapping_sub(0x60) } else { al.wrapping_add(0x60) };
        f |= rflags::CF;
    }
    set(vp, 0, al);
    set_status(vp, f | result_flags(al));
    Ok(())
}

/// AAA and AAS. The undefined flags are those of the result in AL.
pub fn aaa<const SUB: bool>(vp: &mut SoftVp, _: &Op) -> Exec {
    let ax = get::<u16>(vp, 0);
    let adjust = ax & 0xf > 9 || vp.s.rflags & rflags::AF != 0;
    let new = match (adjust, SUB) {
        (false, _) => ax,
        (true, false) => ax.wrapping_add(0x106),
        (true, true) => ax.wrapping_sub(0x106),
    } & 0xff0f;
    set(vp, 0, new);
    let carry = if adjust { rflags::CF | rflags::AF } else { 0 };
    set_status(vp, carry | result_flags(new as u8));
    Ok(())
}

/// AAM; the base is in `imm`.
pub fn aam(vp: &mut SoftVp, op: &Op) -> Exec {
    let base = op.imm as u8;
    let al = get::<u8>(vp, 0);
    let (Some(high), Some(low)) = (al.checked_div(base), al.checked_rem(base)) else { return Err(Fault::DE) };
    set::<u16>(vp, 0, u16::from(high) << 8 | u16::from(low));
    set_status(vp, result_flags(low));
    Ok(())
}

/// AAD; the base is in `imm`.
pub fn aad(vp: &mut SoftVp, op: &Op) -> Exec {
    let ax = get::<u16>(vp, 0);
    let al = (ax as u8).wrapping_add(((ax >> 8) as u8).wrapping_mul(op.imm as u8));
    set::<u16>(vp, 0, al.into());
    set_status(vp, result_flags(al));
    Ok(())
}

/// BOUND.
pub fn bound(vp: &mut SoftVp, op: &Op) -> Exec {
    let size = usize::from(op.size);
    let la = linear(vp, op, 0, 2 * size, crate::segmentation::Want::Read)?;
    let mut bytes = [0; 8];
    vp.read_bytes(la, &mut bytes[..2 * size])?;
    let (low, high, index) = if size == 2 {
        let word = |n: usize| i32::from(i16::from_le_bytes([bytes[n], bytes[n + 1]]));
        (word(0), word(2), i32::from(get::<u16>(vp, op.a) as i16))
    } else {
        let dword = |n: usize| i32::from_le_bytes([bytes[n], bytes[n + 1], bytes[n + 2], bytes[n + 3]]);
        (dword(0), dword(4), get::<u32>(vp, op.a) as i32)
    };
    if index < low || index > high {
        return Err(Fault::Exception { vector: x86::exception::BR, error: 0 });
    }
    Ok(())
}

/// Always #UD (UD0, UD1, UD2 and everything that the model does not have).
pub fn undefined(_: &mut SoftVp, _: &Op) -> Exec {
    Err(Fault::UD)
}
