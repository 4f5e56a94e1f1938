//! Addition, logic, shifts, multiplication and division.

use super::host::{self, Arith};
use super::op::*;
use crate::vp::{Exec, Fault, SoftVp};
use x86::regs::{gpr, rflags};

/// An operation of two operands.
pub trait Binary {
    /// The result is written (not CMP, TEST).
    const WRITES: bool = true;
    /// Result and status flags.
    fn run<T: Arith>(a: T, b: T, cf: u64) -> (T, u64);
    /// The same on shared memory; returns the flags.
    ///
    /// # Safety
    /// As [`Arith::lock_add`].
    unsafe fn locked<T: Arith>(p: *mut u8, b: T, cf: u64) -> u64;
}
macro_rules! binaries {
    ($($name:ident, $f:ident, $lock:ident;)*) => {$(
        #[doc = stringify!($name)]
        pub struct $name;
        impl Binary for $name {
            #[inline(always)]
            fn run<T: Arith>(a: T, b: T, cf: u64) -> (T, u64) { T::$f(a, b, cf) }
            #[inline(always)]
            unsafe fn locked<T: Arith>(p: *mut u8, b: T, cf: u64) -> u64 {
                // SAFETY: the caller's promise.
                unsafe { T::$lock(p, b, cf) }
            }
        }
    )*};
}
binaries! {
    Add, add, lock_add; Or, or, lock_or; Adc, adc, lock_adc; Sbb, sbb, lock_sbb;
    And, and, lock_and; Sub, sub, lock_sub; Xor, xor, lock_xor;
}
/// CMP
pub struct Cmp;
impl Binary for Cmp {
    const WRITES: bool = false;
    #[inline(always)]
    fn run<T: Arith>(a: T, b: T, cf: u64) -> (T, u64) {
        T::sub(a, b, cf)
    }
    unsafe fn locked<T: Arith>(_: *mut u8, _: T, _: u64) -> u64 {
        0
    }
}
/// TEST
pub struct Test;
impl Binary for Test {
    const WRITES: bool = false;
    #[inline(always)]
    fn run<T: Arith>(a: T, b: T, cf: u64) -> (T, u64) {
        T::and(a, b, cf)
    }
    unsafe fn locked<T: Arith>(_: *mut u8, _: T, _: u64) -> u64 {
        0
    }
}

/// `op r, r`
pub fn rr<O: Binary, T: Arith>(vp: &mut SoftVp, op: &Op) -> Exec {
    let (r, f) = O::run(get::<T>(vp, op.a), get::<T>(vp, op.b), vp.s.rflags);
    if O::WRITES {
        set(vp, op.a, r);
    }
    set_status(vp, f);
    Ok(())
}
/// `op r, imm`
pub fn ri<O: Binary, T: Arith>(vp: &mut SoftVp, op: &Op) -> Exec {
    let (r, f) = O::run(get::<T>(vp, op.a), T::from_u64(op.imm), vp.s.rflags);
    if O::WRITES {
        set(vp, op.a, r);
    }
    set_status(vp, f);
    Ok(())
}
/// `op r, m`
pub fn rm<O: Binary, T: Arith>(vp: &mut SoftVp, op: &Op) -> Exec {
    let b = load::<T>(vp, op)?;
    let (r, f) = O::run(get::<T>(vp, op.a), b, vp.s.rflags);
    if O::WRITES {
        set(vp, op.a, r);
    }
    set_status(vp, f);
    Ok(())
}
#[inline(always)]
fn to_memory<O: Binary, T: Arith>(vp: &mut SoftVp, op: &Op, b: T) -> Exec {
    let f = if O::WRITES {
        let place = place(vp, op, 0, T::BYTES)?;
        let a = place_read::<T>(vp, place)?;
        let (r, f) = O::run(a, b, vp.s.rflags);
        place_write(vp, place, r)?;
        f
    } else {
        let a = load::<T>(vp, op)?;
        O::run(a, b, vp.s.rflags).1
    };
    set_status(vp, f);
    Ok(())
}
/// `op m, r`
pub fn mr<O: Binary, T: Arith>(vp: &mut SoftVp, op: &Op) -> Exec {
    let b = get::<T>(vp, op.a);
    to_memory::<O, T>(vp, op, b)
}
/// `op m, imm`
pub fn mi<O: Binary, T: Arith>(vp: &mut SoftVp, op: &Op) -> Exec {
    to_memory::<O, T>(vp, op, T::from_u64(op.imm))
}
/// `lock op m, r` and `lock op m, imm` (with `flag::REP` standing for the immediate form; see `lower`).
pub fn lock<O: Binary, T: Arith, const IMM: bool>(vp: &mut SoftVp, op: &Op) -> Exec {
    let b = if IMM { T::from_u64(op.imm) } else { get::<T>(vp, op.a) };
    let cf = vp.s.rflags;
    let f = match place(vp, op, 0, T::BYTES)? {
        // SAFETY: `place` says that the operand lies in mapped, writable guest memory.
        Place::Host(p) => unsafe { O::locked::<T>(p, b, cf) },
        slow => super::atomic::with_bus_lock(vp, |vp| {
            let a = place_read::<T>(vp, slow)?;
            let (r, f) = O::run(a, b, cf);
            place_write(vp, slow, r)?;
            Ok(f)
        })?,
    };
    set_status(vp, f);
    Ok(())
}

/// An operation of one operand.
pub trait Unary {
    /// Flags that it writes.
    const FLAGS: u64 = rflags::STATUS;
    /// Result and flags.
    fn run<T: Arith>(a: T) -> (T, u64);
    /// The same on shared memory.
    ///
    /// # Safety
    /// As [`Arith::lock_add`].
    unsafe fn locked<T: Arith>(p: *mut u8) -> u64;
}
macro_rules! unaries {
    ($($name:ident, $f:ident, $lock:ident, $flags:expr;)*) => {$(
        #[doc = stringify!($name)]
        pub struct $name;
        impl Unary for $name {
            const FLAGS: u64 = $flags;
            #[inline(always)]
            fn run<T: Arith>(a: T) -> (T, u64) { T::$f(a) }
            #[inline(always)]
            unsafe fn locked<T: Arith>(p: *mut u8) -> u64 {
                // SAFETY: the caller's promise.
                unsafe { T::$lock(p) }
            }
        }
    )*};
}
unaries! {
    Inc, inc, lock_inc, rflags::STATUS & !rflags::CF;
    Dec, dec, lock_dec, rflags::STATUS & !rflags::CF;
    Neg, neg, lock_neg, rflags::STATUS;
}
/// NOT
pub struct Not;
impl Unary for Not {
    const FLAGS: u64 = 0;
    #[inline(always)]
    fn run<T: Arith>(a: T) -> (T, u64) {
        (T::from_u64(!a.to_u64()), 0)
    }
    #[inline(always)]
    unsafe fn locked<T: Arith>(p: *mut u8) -> u64 {
        // SAFETY: the caller's promise.
        unsafe { T::lock_not(p) }
        0
    }
}
/// `op r`
pub fn un_r<O: Unary, T: Arith>(vp: &mut SoftVp, op: &Op) -> Exec {
    let (r, f) = O::run(get::<T>(vp, op.a));
    set(vp, op.a, r);
    set_flags(vp, O::FLAGS, f);
    Ok(())
}
/// `op m`
pub fn un_m<O: Unary, T: Arith>(vp: &mut SoftVp, op: &Op) -> Exec {
    let place = place(vp, op, 0, T::BYTES)?;
    let a = place_read::<T>(vp, place)?;
    let (r, f) = O::run(a);
    place_write(vp, place, r)?;
    set_flags(vp, O::FLAGS, f);
    Ok(())
}
/// `lock op m`
pub fn un_lock<O: Unary, T: Arith>(vp: &mut SoftVp, op: &Op) -> Exec {
    let f = match place(vp, op, 0, T::BYTES)? {
        // SAFETY: `place` says that the operand lies in mapped, writable guest memory.
        Place::Host(p) => unsafe { O::locked::<T>(p) },
        slow => super::atomic::with_bus_lock(vp, |vp| {
            let a = place_read::<T>(vp, slow)?;
            let (r, f) = O::run(a);
            place_write(vp, slow, r)?;
            Ok(f)
        })?,
    };
    set_flags(vp, O::FLAGS, f);
    Ok(())
}

/// A shift or rotation.
pub trait Shift {
    /// Flags that it writes.
    const FLAGS: u64 = rflags::STATUS;
    /// By 1 to 63 (the count as the host's instruction takes it).
    fn run<T: Arith>(a: T, n: u8, cf: u64) -> (T, u64);
}
macro_rules! shifts {
    ($($name:ident, $f:ident, $flags:expr;)*) => {$(
        #[doc = stringify!($name)]
        pub struct $name;
        impl Shift for $name {
            const FLAGS: u64 = $flags;
            #[inline(always)]
            fn run<T: Arith>(a: T, n: u8, cf: u64) -> (T, u64) { T::$f(a, n, cf) }
        }
    )*};
}
const ROTATE: u64 = rflags::CF | rflags::OF;
shifts! {
    Rol, rol, ROTATE; Ror, ror, ROTATE; Rcl, rcl, ROTATE; Rcr, rcr, ROTATE;
    Shl, shl, rflags::STATUS; Shr, shr, rflags::STATUS; Sar, sar, rflags::STATUS;
}
/// Count, masked as the processor masks it (SDM volume 2, SAL/SAR/SHL/SHR).
#[inline(always)]
fn count<T: Arith, const CL: bool>(vp: &SoftVp, op: &Op) -> u8 {
    let n = if CL { vp.s.gprs[gpr::RCX] as u8 } else { op.imm as u8 };
    n & if T::BYTES == 8 { 63 } else { 31 }
}
/// `op r, n`
pub fn sh_r<O: Shift, T: Arith, const CL: bool>(vp: &mut SoftVp, op: &Op) -> Exec {
    let n = count::<T, CL>(vp, op);
    let a = get::<T>(vp, op.a);
    if n == 0 {
        // Nothing changes, but a 32-bit destination is still written (its upper half becomes zero).
        set(vp, op.a, a);
        return Ok(());
    }
    let (r, f) = O::run(a, n, vp.s.rflags);
    set(vp, op.a, r);
    set_flags(vp, O::FLAGS, f);
    Ok(())
}
/// `op m, n`
pub fn sh_m<O: Shift, T: Arith, const CL: bool>(vp: &mut SoftVp, op: &Op) -> Exec {
    let n = count::<T, CL>(vp, op);
    let place = place(vp, op, 0, T::BYTES)?;
    let a = place_read::<T>(vp, place)?;
    if n == 0 {
        return Ok(());
    }
    let (r, f) = O::run(a, n, vp.s.rflags);
    place_write(vp, place, r)?;
    set_flags(vp, O::FLAGS, f);
    Ok(())
}

/// SHLD and SHRD: `imm` is the count unless `CL`; the destination is memory if `op.size & 0x80`.
pub fn double_shift<const LEFT: bool, const CL: bool>(vp: &mut SoftVp, op: &Op) -> Exec {
    let size = op.size & 0xf;
    let memory = op.size & 0x80 != 0;
    let n = if CL { vp.s.gprs[gpr::RCX] as u8 } else { op.imm as u8 } & if size == 8 { 63 } else { 31 };
    let b = get_sized(vp, op.b, size);
    let place = if memory { Some(place(vp, op, 0, size.into())?) } else { None };
    let a = match place {
        Some(place) => place_read_sized(vp, place, size)?,
        None => get_sized(vp, op.a, size),
    };
    let (r, f) = if n == 0 {
        (a, None)
    } else {
        let (r, f) = match (size, LEFT) {
            (2, true) => widen(host::shld16(a as u16, b as u16, n)),
            (2, false) => widen(host::shrd16(a as u16, b as u16, n)),
            (4, true) => widen(host::shld32(a as u32, b as u32, n)),
            (4, false) => widen(host::shrd32(a as u32, b as u32, n)),
            (_, true) => host::shld64(a, b, n),
            (_, false) => host::shrd64(a, b, n),
        };
        (r, Some(f))
    };
    match place {
        Some(place) if n != 0 => place_write_sized(vp, place, size, r)?,
        Some(_) => {}
        None => set_sized(vp, op.a, size, r),
    }
    if let Some(f) = f {
        set_status(vp, f);
    }
    Ok(())
}

/// Zero-extends a result.
#[inline(always)]
pub fn widen<T: Int>((r, f): (T, u64)) -> (u64, u64) {
    (r.to_u64(), f)
}

#[inline(always)]
fn source<T: Int, const MEM: bool>(vp: &mut SoftVp, op: &Op) -> Exec<T> {
    if MEM { load::<T>(vp, op) } else { Ok(get::<T>(vp, op.b)) }
}

/// MUL and one-operand IMUL.
pub fn mul<T: Arith, const SIGNED: bool, const MEM: bool>(vp: &mut SoftVp, op: &Op) -> Exec {
    let b = source::<T, MEM>(vp, op)?;
    let a = get::<T>(vp, 0);
    let (low, high, f) = if SIGNED { T::imul(a, b) } else { T::mul(a, b) };
    if T::BYTES == 1 {
        set::<u16>(vp, 0, (low.to_u64() | high.to_u64() << 8) as u16);
    } else {
        set(vp, 0, low);
        set(vp, gpr::RDX as u8 * 8, high);
    }
    set_status(vp, f);
    Ok(())
}

/// IMUL with two and three operands.
pub fn imul<T: Arith, const MEM: bool, const IMM: bool>(vp: &mut SoftVp, op: &Op) -> Exec {
    let b = source::<T, MEM>(vp, op)?;
    let a = if IMM { T::from_u64(op.imm) } else { get::<T>(vp, op.a) };
    let (low, _, f) = T::imul(a, b);
    set(vp, op.a, low);
    set_status(vp, f);
    Ok(())
}

/// DIV and IDIV. The flags, all undefined, stay as they are.
pub fn div<T: Arith, const SIGNED: bool, const MEM: bool>(vp: &mut SoftVp, op: &Op) -> Exec {
    let d = source::<T, MEM>(vp, op)?;
    let bits = T::BYTES * 8;
    let (low, high) = if T::BYTES == 1 {
        let ax = get::<u16>(vp, 0);
        (u64::from(ax & 0xff), u64::from(ax >> 8))
    } else {
        (get::<T>(vp, 0).to_u64(), get::<T>(vp, gpr::RDX as u8 * 8).to_u64())
    };
    if d.to_u64() == 0 {
        return Err(Fault::DE);
    }
    let (q, r) = if SIGNED {
        if T::BYTES == 8 {
            let n = (u128::from(high) << 64 | u128::from(low)) as i128;
            let d = i128::from(d.sext() as i64);
            let q = n.checked_div(d).ok_or(Fault::DE)?;
            let fits = i64::try_from(q).map_err(|_| Fault::DE)?;
            (fits as u64, (n % d) as u64)
        } else {
            // Sign-extends the double-width dividend.
            let shift = 64 - 2 * bits;
            let n = (((high << bits | low) << shift) as i64) >> shift;
            let d = d.sext() as i64;
            let q = n.checked_div(d).ok_or(Fault::DE)?;
            if T::from_u64(q as u64).sext() as i64 != q {
                return Err(Fault::DE);
            }
            (q as u64, (n % d) as u64)
        }
    } else if high >= d.to_u64() {
        return Err(Fault::DE);
    } else if T::BYTES == 8 {
        if high == 0 {
            (low / d.to_u64(), low % d.to_u64())
        } else {
            let n = u128::from(high) << 64 | u128::from(low);
            let d = u128::from(d.to_u64());
            ((n / d) as u64, (n % d) as u64)
        }
    } else {
        let n = high << bits | low;
        (n / d.to_u64(), n % d.to_u64())
    };
    if T::BYTES == 1 {
        set::<u16>(vp, 0, (q & 0xff | (r & 0xff) << 8) as u16);
    } else {
        set(vp, 0, T::from_u64(q));
        set(vp, gpr::RDX as u8 * 8, T::from_u64(r));
    }
    Ok(())
}

/// MULX: `a` is the high destination, `size` the low one's offset; no flags.
pub fn mulx<T: Arith, const MEM: bool>(vp: &mut SoftVp, op: &Op) -> Exec {
    let b = source::<T, MEM>(vp, op)?;
    let (low, high, _) = T::mul(get::<T>(vp, gpr::RDX as u8 * 8), b);
    // If both destinations are one register, it gets the high half.
    set(vp, op.size, low);
    set(vp, op.a, high);
    Ok(())
}

/// ADCX (`CARRY`) and ADOX.
pub fn adx<T: Arith, const CARRY: bool, const MEM: bool>(vp: &mut SoftVp, op: &Op) -> Exec {
    let which = if CARRY { rflags::CF } else { rflags::OF };
    let b = source::<T, MEM>(vp, op)?;
    let (r, f) = T::adc(get::<T>(vp, op.a), b, u64::from(vp.s.rflags & which != 0));
    set(vp, op.a, r);
    set_flags(vp, which, if f & rflags::CF != 0 { which } else { 0 });
    Ok(())
}
