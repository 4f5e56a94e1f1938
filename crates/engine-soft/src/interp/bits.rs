//! Bit tests, scans, BMI1 and BMI2, POPCNT, CRC32.

use super::alu::widen;
use super::host;
use super::op::*;
use crate::vp::{Exec, SoftVp};
use x86::regs::rflags;

/// What a bit test does with the bit.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum BitOp {
    /// BT
    Test,
    /// BTS
    Set,
    /// BTR
    Reset,
    /// BTC
    Complement,
}

fn changed(kind: u8, value: u64, bit: u64) -> u64 {
    match kind {
        0 => value,
        1 => value | bit,
        2 => value & !bit,
        _ => value ^ bit,
    }
}

fn set_cf(vp: &mut SoftVp, on: bool) {
    set_flags(vp, rflags::CF, on.into());
}

/// BT* on a register: `KIND` as in [`BitOp`]; the bit number is in a register (`b`) or, with `IMM`, immediate.
pub fn bt_r<const KIND: u8, const IMM: bool>(vp: &mut SoftVp, op: &Op) -> Exec {
    let n = if IMM { op.imm } else { get_sized(vp, op.b, op.size) } & (u64::from(op.size) * 8 - 1);
    let v = get_sized(vp, op.a, op.size);
    if KIND != 0 {
        set_sized(vp, op.a, op.size, changed(KIND, v, 1 << n));
    }
    set_cf(vp, v >> n & 1 != 0);
    Ok(())
}

/// BT* on memory. With a register the bit number is signed and reaches beyond the operand.
pub fn bt_m<const KIND: u8, const IMM: bool>(vp: &mut SoftVp, op: &Op) -> Exec {
    let bits = u64::from(op.size) * 8;
    let (n, displacement) = if IMM {
        (op.imm & (bits - 1), 0)
    } else {
        let raw = get_sized(vp, op.a, op.size);
        let signed = match op.size {
            2 => (raw as u16).sext(),
            4 => (raw as u32).sext(),
            _ => raw,
        } as i64;
        let shift = bits.trailing_zeros();
        (raw & (bits - 1), (signed >> shift).wrapping_mul(op.size.into()) as u64)
    };
    let bit = 1u64 << n;
    let size = usize::from(op.size);
    if KIND == 0 {
        let la = linear(vp, op, displacement, size, crate::segmentation::Want::Read)?;
        let v = read_linear(vp, la, size)?;
        set_cf(vp, v & bit != 0);
        return Ok(());
    }
    let place = place(vp, op, displacement, size)?;
    let old = match place {
        Place::Host(p) if op.flags & flag::LOCK != 0 => {
            // SAFETY: `place` says that the operand lies in mapped, writable guest memory.
            unsafe { locked(p, op.size, KIND, bit) }
        }
        Place::Host(_) => {
            let v = place_read_sized(vp, place, op.size)?;
            place_write_sized(vp, place, op.size, changed(KIND, v, bit))?;
            v
        }
        Place::Linear(_) => super::atomic::with_bus_lock(vp, |vp| {
            let v = place_read_sized(vp, place, op.size)?;
            place_write_sized(vp, place, op.size, changed(KIND, v, bit))?;
            Ok(v)
        })?,
    };
    set_cf(vp, old & bit != 0);
    Ok(())
}

/// A locked change of one bit; returns a value whose bit `bit` is the old one.
///
/// # Safety
/// `p` must be valid for reads and writes of the operand.
unsafe fn locked(p: *mut u8, size: u8, kind: u8, bit: u64) -> u64 {
    use super::host::Arith;
    macro_rules! exchange {
        ($t:ty) => {{
            // SAFETY: the caller's promise; alignment does not matter to `lock_cmpxchg`.
            unsafe {
                let mut old = p.cast::<$t>().read_unaligned();
                loop {
                    let (seen, f) = <$t>::lock_cmpxchg(p, old, changed(kind, old.into(), bit) as $t);
                    if f & rflags::ZF != 0 {
                        return old.into();
                    }
                    old = seen;
                }
            }
        }};
    }
    match size {
        2 => exchange!(u16),
        4 => exchange!(u32),
        _ => exchange!(u64),
    }
}

#[inline(always)]
fn source<const MEM: bool>(vp: &mut SoftVp, op: &Op) -> Exec<u64> {
    if MEM { load_sized(vp, op, op.size) } else { Ok(get_sized(vp, op.b, op.size)) }
}

/// BSF (`KIND` 0), BSR (1), TZCNT (2), LZCNT (3), POPCNT (4). Undefined flags are the host's.
pub fn scan<const KIND: u8, const MEM: bool>(vp: &mut SoftVp, op: &Op) -> Exec {
    let v = source::<MEM>(vp, op)?;
    let d = get_sized(vp, op.a, op.size);
    let (r, f) = match (KIND, op.size) {
        (0, 2) => widen(host::bsf16(d as u16, v as u16)),
        (0, 4) => widen(host::bsf32(d as u32, v as u32)),
        (0, _) => host::bsf64(d, v),
        (1, 2) => widen(host::bsr16(d as u16, v as u16)),
        (1, 4) => widen(host::bsr32(d as u32, v as u32)),
        (1, _) => host::bsr64(d, v),
        (2, 2) => widen(host::tzcnt16(0, v as u16)),
        (2, 4) => widen(host::tzcnt32(0, v as u32)),
        (2, _) => host::tzcnt64(0, v),
        (3, 2) => widen(host::lzcnt16(0, v as u16)),
        (3, 4) => widen(host::lzcnt32(0, v as u32)),
        (3, _) => host::lzcnt64(0, v),
        (_, 2) => widen(host::popcnt16(0, v as u16)),
        (_, 4) => widen(host::popcnt32(0, v as u32)),
        (_, _) => host::popcnt64(0, v),
    };
    if KIND < 2 && v == 0 && op.size == 4 {
        // A 32-bit BSF or BSR of zero leaves the whole destination alone (APM volume 3, BSF).
    } else {
        set_sized(vp, op.a, op.size, r);
    }
    set_status(vp, f);
    Ok(())
}

/// BLSR (`KIND` 0), BLSI (1), BLSMSK (2): `a` is the destination.
pub fn bls<const KIND: u8, const MEM: bool>(vp: &mut SoftVp, op: &Op) -> Exec {
    let v = source::<MEM>(vp, op)?;
    let (r, f) = match (KIND, op.size) {
        (0, 4) => widen(host::blsr32(0, v as u32)),
        (0, _) => host::blsr64(0, v),
        (1, 4) => widen(host::blsi32(0, v as u32)),
        (1, _) => host::blsi64(0, v),
        (_, 4) => widen(host::blsmsk32(0, v as u32)),
        (_, _) => host::blsmsk64(0, v),
    };
    set_sized(vp, op.a, op.size, r);
    set_status(vp, f);
    Ok(())
}

/// Three-operand forms: destination `a`, a register whose offset is in `imm`, and a register (`b`) or memory source.
/// ANDN (`KIND` 0: register, source), BZHI (1: source, register), BEXTR (2), PDEP (3: register, source), PEXT (4), SHLX
/// (5: source, register), SHRX (6), SARX (7).
pub fn ternary<const KIND: u8, const MEM: bool>(vp: &mut SoftVp, op: &Op) -> Exec {
    let s = source::<MEM>(vp, op)?;
    let r = get_sized(vp, op.imm as u8, op.size);
    let count = r & (u64::from(op.size) * 8 - 1);
    let (v, f) = match (KIND, op.size) {
        (0, 4) => widen(host::andn32(r as u32, s as u32)),
        (0, _) => host::andn64(r, s),
        (1, 4) => widen(host::bzhi32(s as u32, r as u32)),
        (1, _) => host::bzhi64(s, r),
        (2, 4) => widen(host::bextr32(s as u32, r as u32)),
        (2, _) => host::bextr64(s, r),
        (3, 4) => widen(host::pdep32(r as u32, s as u32)),
        (3, _) => host::pdep64(r, s),
        (4, 4) => widen(host::pext32(r as u32, s as u32)),
        (4, _) => host::pext64(r, s),
        (5, _) => (s << count, 0),
        (6, _) => (s >> count, 0),
        (_, 4) => (((s as i32) >> count) as u32 as u64, 0),
        (_, _) => (((s as i64) >> count) as u64, 0),
    };
    set_sized(vp, op.a, op.size, v);
    if KIND < 3 {
        set_status(vp, f);
    }
    Ok(())
}

/// RORX: count in `imm`.
pub fn rorx<const MEM: bool>(vp: &mut SoftVp, op: &Op) -> Exec {
    let v = source::<MEM>(vp, op)?;
    let r = if op.size == 4 {
        u64::from((v as u32).rotate_right(op.imm as u32 & 31))
    } else {
        v.rotate_right(op.imm as u32 & 63)
    };
    set_sized(vp, op.a, op.size, r);
    Ok(())
}

/// CRC32: `size` is the source's; the destination is 32 bits, zero-extended.
pub fn crc32<const MEM: bool>(vp: &mut SoftVp, op: &Op) -> Exec {
    let v = source::<MEM>(vp, op)?;
    let r = host::crc32(get::<u32>(vp, op.a), v, op.size);
    set(vp, op.a, r);
    Ok(())
}

/// RDRAND and RDSEED, from the host's generator (through the kernel, which mixes it with other sources);
/// CF says whether there is a number.
pub fn random<const SEED: bool>(vp: &mut SoftVp, op: &Op) -> Exec {
    let mut bytes = [0u8; 8];
    // SAFETY: a buffer of our own, with its length.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), libc::GRND_NONBLOCK) };
    let ok = got == 8;
    let v = if ok { u64::from_le_bytes(bytes) } else { 0 };
    set_sized(vp, op.a, op.size, v & mask(op.size));
    set_status(vp, if ok { rflags::CF } else { 0 });
    Ok(())
}
