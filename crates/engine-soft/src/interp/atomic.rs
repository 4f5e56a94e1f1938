//! XCHG, XADD, CMPXCHG, CMPXCHG8B/16B, and what LOCK means where host atomics cannot be used.

use super::host::{self, Arith};
use super::op::*;
use crate::segmentation::Want;
use crate::vp::{Exec, Fault, SoftVp};
use std::sync::PoisonError;
use x86::regs::{gpr, rflags};

/// Runs a read-modify-write that host atomics cannot do (devices, operands that cross pages, pages with tracked code) in
/// mutual exclusion with every other such access of the partition.
pub fn with_bus_lock<R>(vp: &mut SoftVp, f: impl FnOnce(&mut SoftVp) -> Exec<R>) -> Exec<R> {
    let partition = vp.partition.clone();
    let _bus = partition.bus_lock.lock().unwrap_or_else(PoisonError::into_inner);
    f(vp)
}

/// `xchg r, r`
pub fn xchg_rr<T: Arith>(vp: &mut SoftVp, op: &Op) -> Exec {
    let (a, b) = (get::<T>(vp, op.a), get::<T>(vp, op.b));
    set(vp, op.a, b);
    set(vp, op.b, a);
    Ok(())
}

/// `xchg m, r`: always locked.
pub fn xchg_mr<T: Arith>(vp: &mut SoftVp, op: &Op) -> Exec {
    let b = get::<T>(vp, op.a);
    let old = match place(vp, op, 0, T::BYTES)? {
        // SAFETY: `place` says that the operand lies in mapped, writable guest memory.
        Place::Host(p) => unsafe { T::xchg(p, b) },
        slow => with_bus_lock(vp, |vp| {
            let a = place_read::<T>(vp, slow)?;
            place_write(vp, slow, b)?;
            Ok(a)
        })?,
    };
    set(vp, op.a, old);
    Ok(())
}

/// `xadd r, r`
pub fn xadd_rr<T: Arith>(vp: &mut SoftVp, op: &Op) -> Exec {
    let (a, b) = (get::<T>(vp, op.a), get::<T>(vp, op.b));
    let (sum, f) = T::add(a, b, 0);
    set(vp, op.b, a);
    set(vp, op.a, sum);
    set_status(vp, f);
    Ok(())
}

/// `xadd m, r`: done locked always, which is one of the ways in which the unlocked form may behave.
pub fn xadd_mr<T: Arith>(vp: &mut SoftVp, op: &Op) -> Exec {
    let b = get::<T>(vp, op.a);
    let (old, f) = match place(vp, op, 0, T::BYTES)? {
        // SAFETY: `place` says that the operand lies in mapped, writable guest memory.
        Place::Host(p) => unsafe { T::lock_xadd(p, b) },
        slow => with_bus_lock(vp, |vp| {
            let a = place_read::<T>(vp, slow)?;
            let (r, f) = T::add(a, b, 0);
            place_write(vp, slow, r)?;
            Ok((a, f))
        })?,
    };
    set(vp, op.a, old);
    set_status(vp, f);
    Ok(())
}

/// `cmpxchg r, r`
pub fn cmpxchg_rr<T: Arith>(vp: &mut SoftVp, op: &Op) -> Exec {
    let dest = get::<T>(vp, op.a);
    let acc = get::<T>(vp, 0);
    let (_, f) = T::sub(acc, dest, 0);
    if f & rflags::ZF != 0 {
        let new = get::<T>(vp, op.b);
        set(vp, op.a, new);
    } else {
        // The accumulator is only written here. Intel's processors write a 32-bit destination back unchanged, which clears
        // its upper half; AMD's do not (measured).
        set(vp, 0, dest);
        if T::BYTES == 4 && vp.features.is_intel() {
            let dest = get::<T>(vp, op.a);
            set(vp, op.a, dest);
        }
    }
    set_status(vp, f);
    Ok(())
}

/// `cmpxchg m, r`: done locked always.
pub fn cmpxchg_mr<T: Arith>(vp: &mut SoftVp, op: &Op) -> Exec {
    let new = get::<T>(vp, op.a);
    let acc = get::<T>(vp, 0);
    let (old, f) = match place(vp, op, 0, T::BYTES)? {
        // SAFETY: `place` says that the operand lies in mapped, writable guest memory.
        Place::Host(p) => unsafe { T::lock_cmpxchg(p, acc, new) },
        slow => with_bus_lock(vp, |vp| {
            let old = place_read::<T>(vp, slow)?;
            let (_, f) = T::sub(acc, old, 0);
            place_write(vp, slow, if f & rflags::ZF != 0 { new } else { old })?;
            Ok((old, f))
        })?,
    };
    if f & rflags::ZF == 0 {
        set(vp, 0, old);
    }
    set_status(vp, f);
    Ok(())
}

fn set_zf(vp: &mut SoftVp, zf: bool) {
    set_flags(vp, rflags::ZF, if zf { rflags::ZF } else { 0 });
}

/// CMPXCHG8B.
pub fn cmpxchg8b(vp: &mut SoftVp, op: &Op) -> Exec {
    let pair = |vp: &SoftVp, high: usize, low: usize| vp.s.gprs[high] << 32 | vp.s.gprs[low] & 0xffff_ffff;
    let expected = pair(vp, gpr::RDX, gpr::RAX);
    let new = pair(vp, gpr::RCX, gpr::RBX);
    let (old, zf) = match place(vp, op, 0, 8)? {
        // SAFETY: `place` says that the operand lies in mapped, writable guest memory.
        Place::Host(p) => unsafe { host::lock_cmpxchg8(p, expected, new) },
        slow => with_bus_lock(vp, |vp| {
            let old = place_read::<u64>(vp, slow)?;
            place_write(vp, slow, if old == expected { new } else { old })?;
            Ok((old, old == expected))
        })?,
    };
    if !zf {
        set::<u32>(vp, 0, old as u32);
        set::<u32>(vp, gpr::RDX as u8 * 8, (old >> 32) as u32);
    }
    set_zf(vp, zf);
    Ok(())
}

/// CMPXCHG16B: the operand must be aligned.
pub fn cmpxchg16b(vp: &mut SoftVp, op: &Op) -> Exec {
    // In 64-bit mode alignment comes before the canonical form.
    let plain = field(vp, op.seg.into()).wrapping_add(offset(vp, op) & mask(op.addr));
    if op.flags & flag::LONG != 0 && plain & 15 != 0 {
        return Err(Fault::GP0);
    }
    let la = linear(vp, op, 0, 16, Want::Write)?;
    if la & 15 != 0 {
        return Err(Fault::GP0);
    }
    let expected = (vp.s.gprs[gpr::RAX], vp.s.gprs[gpr::RDX]);
    let new = (vp.s.gprs[gpr::RBX], vp.s.gprs[gpr::RCX]);
    let (old, zf) = match vp.rmw_target(la, 16)? {
        // SAFETY: the operand lies in mapped, writable guest memory and is aligned (host pages are aligned as the guest's).
        crate::mmu::RmwTarget::Host(p) => unsafe { host::lock_cmpxchg16(p, expected, new) },
        crate::mmu::RmwTarget::Slow => with_bus_lock(vp, |vp| {
            let mut bytes = [0; 16];
            vp.read_bytes(la, &mut bytes)?;
            let v = u128::from_le_bytes(bytes);
            let old = (v as u64, (v >> 64) as u64);
            let to = if old == expected { new } else { old };
            vp.write_bytes(la, &(u128::from(to.1) << 64 | u128::from(to.0)).to_le_bytes())?;
            Ok((old, old == expected))
        })?,
    };
    if !zf {
        vp.s.gprs[gpr::RAX] = old.0;
        vp.s.gprs[gpr::RDX] = old.1;
    }
    set_zf(vp, zf);
    Ok(())
}
