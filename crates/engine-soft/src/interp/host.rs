//! Integer arithmetic by the host's own instructions, so that every flag, the undefined ones too, is the hardware's.
//!
//! Flags come back by LAHF and SETO (two cheap instructions; PUSHFQ costs several times as much): AH holds SF, ZF, AF, PF
//! and CF at their places in RFLAGS, AL holds OF. [`status`] makes RFLAGS bits of that.

use super::op::Int;
use std::arch::asm;

/// RFLAGS status bits from what LAHF and SETO AL left in AX.
#[inline(always)]
pub fn status(ax: u32) -> u64 {
    u64::from((ax >> 8) & 0xd5 | (ax & 1) << 11)
}

/// Integers that the host can calculate with. Each function returns the result and the status flags.
#[allow(missing_docs)]
pub trait Arith: Int {
    fn add(a: Self, b: Self, cf: u64) -> (Self, u64);
    fn or(a: Self, b: Self, cf: u64) -> (Self, u64);
    fn adc(a: Self, b: Self, cf: u64) -> (Self, u64);
    fn sbb(a: Self, b: Self, cf: u64) -> (Self, u64);
    fn and(a: Self, b: Self, cf: u64) -> (Self, u64);
    fn sub(a: Self, b: Self, cf: u64) -> (Self, u64);
    fn xor(a: Self, b: Self, cf: u64) -> (Self, u64);
    fn inc(a: Self) -> (Self, u64);
    fn dec(a: Self) -> (Self, u64);
    fn neg(a: Self) -> (Self, u64);
    /// Shifts take a count from 1 to 63 and the carry flag.
    fn rol(a: Self, n: u8, cf: u64) -> (Self, u64);
    fn ror(a: Self, n: u8, cf: u64) -> (Self, u64);
    fn rcl(a: Self, n: u8, cf: u64) -> (Self, u64);
    fn rcr(a: Self, n: u8, cf: u64) -> (Self, u64);
    fn shl(a: Self, n: u8, cf: u64) -> (Self, u64);
    fn shr(a: Self, n: u8, cf: u64) -> (Self, u64);
    fn sar(a: Self, n: u8, cf: u64) -> (Self, u64);
    /// Low half, high half, flags.
    fn mul(a: Self, b: Self) -> (Self, Self, u64);
    fn imul(a: Self, b: Self) -> (Self, Self, u64);
    /// `LOCK op [p], b`.
    ///
    /// # Safety
    /// `p` must be valid for reads and writes of the operand, which may be shared with other threads.
    unsafe fn lock_add(p: *mut u8, b: Self, cf: u64) -> u64;
    /// # Safety
    /// As [`Arith::lock_add`].
    unsafe fn lock_or(p: *mut u8, b: Self, cf: u64) -> u64;
    /// # Safety
    /// As [`Arith::lock_add`].
    unsafe fn lock_adc(p: *mut u8, b: Self, cf: u64) -> u64;
    /// # Safety
    /// As [`Arith::lock_add`].
    unsafe fn lock_sbb(p: *mut u8, b: Self, cf: u64) -> u64;
    /// # Safety
    /// As [`Arith::lock_add`].
    unsafe fn lock_and(p: *mut u8, b: Self, cf: u64) -> u64;
    /// # Safety
    /// As [`Arith::lock_add`].
    unsafe fn lock_sub(p: *mut u8, b: Self, cf: u64) -> u64;
    /// # Safety
    /// As [`Arith::lock_add`].
    unsafe fn lock_xor(p: *mut u8, b: Self, cf: u64) -> u64;
    /// # Safety
    /// As [`Arith::lock_add`].
    unsafe fn lock_inc(p: *mut u8) -> u64;
    /// # Safety
    /// As [`Arith::lock_add`].
    unsafe fn lock_dec(p: *mut u8) -> u64;
    /// # Safety
    /// As [`Arith::lock_add`].
    unsafe fn lock_neg(p: *mut u8) -> u64;
    /// # Safety
    /// As [`Arith::lock_add`].
    unsafe fn lock_not(p: *mut u8);
    /// Exchanges; returns the old value.
    /// # Safety
    /// As [`Arith::lock_add`].
    unsafe fn xchg(p: *mut u8, b: Self) -> Self;
    /// `LOCK XADD`: the old value and the flags.
    /// # Safety
    /// As [`Arith::lock_add`].
    unsafe fn lock_xadd(p: *mut u8, b: Self) -> (Self, u64);
    /// `LOCK CMPXCHG`: the old value and the flags.
    /// # Safety
    /// As [`Arith::lock_add`].
    unsafe fn lock_cmpxchg(p: *mut u8, old: Self, new: Self) -> (Self, u64);
}

macro_rules! binary {
    ($name:ident, $ins:literal, $t:ty, $class:ident, $m:literal) => {
        #[inline(always)]
        fn $name(mut a: $t, b: $t, _cf: u64) -> ($t, u64) {
            let ax: u32;
            // SAFETY: arithmetic on registers only.
            unsafe {
                asm!(
                    concat!($ins, " {a", $m, "}, {b", $m, "}"),
                    "lahf",
                    "seto al",
                    a = inout($class) a,
                    b = in($class) b,
                    out("eax") ax,
                    options(pure, nomem, nostack)
                );
            }
            (a, status(ax))
        }
    };
}
macro_rules! binary_carry {
    ($name:ident, $ins:literal, $t:ty, $class:ident, $m:literal) => {
        #[inline(always)]
        fn $name(mut a: $t, b: $t, cf: u64) -> ($t, u64) {
            let ax: u32;
            // SAFETY: arithmetic on registers only.
            unsafe {
                asm!(
                    "bt {cf:e}, 0",
                    concat!($ins, " {a", $m, "}, {b", $m, "}"),
                    "lahf",
                    "seto al",
                    cf = in(reg) cf as u32,
                    a = inout($class) a,
                    b = in($class) b,
                    out("eax") ax,
                    options(pure, nomem, nostack)
                );
            }
            (a, status(ax))
        }
    };
}
macro_rules! unary {
    ($name:ident, $ins:literal, $t:ty, $class:ident, $m:literal) => {
        #[inline(always)]
        fn $name(mut a: $t) -> ($t, u64) {
            let ax: u32;
            // SAFETY: arithmetic on registers only.
            unsafe {
                asm!(
                    concat!($ins, " {a", $m, "}"),
                    "lahf",
                    "seto al",
                    a = inout($class) a,
                    out("eax") ax,
                    options(pure, nomem, nostack)
                );
            }
            (a, status(ax))
        }
    };
}
macro_rules! shift {
    ($name:ident, $ins:literal, $t:ty, $class:ident, $m:literal) => {
        #[inline(always)]
        fn $name(mut a: $t, n: u8, cf: u64) -> ($t, u64) {
            let ax: u32;
            // SAFETY: arithmetic on registers only.
            unsafe {
                asm!(
                    "bt {cf:e}, 0",
                    concat!($ins, " {a", $m, "}, cl"),
                    "lahf",
                    "seto al",
                    cf = in(reg) cf as u32,
                    a = inout($class) a,
                    in("cl") n,
                    out("eax") ax,
                    options(pure, nomem, nostack)
                );
            }
            (a, status(ax))
        }
    };
}
macro_rules! lock_binary {
    ($name:ident, $ins:literal, $t:ty, $class:ident, $m:literal, $ptr:literal) => {
        #[inline(always)]
        unsafe fn $name(p: *mut u8, b: $t, cf: u64) -> u64 {
            let ax: u32;
            // SAFETY: the caller's promise about `p`.
            unsafe {
                asm!(
                    "bt {cf:e}, 0",
                    concat!("lock ", $ins, " ", $ptr, " ptr [{p}], {b", $m, "}"),
                    "lahf",
                    "seto al",
                    cf = in(reg) cf as u32,
                    p = in(reg) p,
                    b = in($class) b,
                    out("eax") ax,
                    options(nostack)
                );
            }
            status(ax)
        }
    };
}
macro_rules! lock_unary {
    ($name:ident, $ins:literal, $ptr:literal) => {
        #[inline(always)]
        unsafe fn $name(p: *mut u8) -> u64 {
            let ax: u32;
            // SAFETY: the caller's promise about `p`.
            unsafe {
                asm!(
                    concat!("lock ", $ins, " ", $ptr, " ptr [{p}]"),
                    "lahf",
                    "seto al",
                    p = in(reg) p,
                    out("eax") ax,
                    options(nostack)
                );
            }
            status(ax)
        }
    };
}

macro_rules! arith {
    ($t:ty, $class:ident, $m:literal, $ptr:literal, $acc:literal, { $($mul:tt)* }) => {
        impl Arith for $t {
            binary!(add, "add", $t, $class, $m);
            binary!(or, "or", $t, $class, $m);
            binary!(and, "and", $t, $class, $m);
            binary!(sub, "sub", $t, $class, $m);
            binary!(xor, "xor", $t, $class, $m);
            binary_carry!(adc, "adc", $t, $class, $m);
            binary_carry!(sbb, "sbb", $t, $class, $m);
            unary!(inc, "inc", $t, $class, $m);
            unary!(dec, "dec", $t, $class, $m);
            unary!(neg, "neg", $t, $class, $m);
            shift!(rol, "rol", $t, $class, $m);
            shift!(ror, "ror", $t, $class, $m);
            shift!(rcl, "rcl", $t, $class, $m);
            shift!(rcr, "rcr", $t, $class, $m);
            shift!(shl, "shl", $t, $class, $m);
            shift!(shr, "shr", $t, $class, $m);
            shift!(sar, "sar", $t, $class, $m);
            lock_binary!(lock_add, "add", $t, $class, $m, $ptr);
            lock_binary!(lock_or, "or", $t, $class, $m, $ptr);
            lock_binary!(lock_and, "and", $t, $class, $m, $ptr);
            lock_binary!(lock_sub, "sub", $t, $class, $m, $ptr);
            lock_binary!(lock_xor, "xor", $t, $class, $m, $ptr);
            lock_binary!(lock_adc, "adc", $t, $class, $m, $ptr);
            lock_binary!(lock_sbb, "sbb", $t, $class, $m, $ptr);
            lock_unary!(lock_inc, "inc", $ptr);
            lock_unary!(lock_dec, "dec", $ptr);
            lock_unary!(lock_neg, "neg", $ptr);
            #[inline(always)]
            unsafe fn lock_not(p: *mut u8) {
                // SAFETY: the caller's promise about `p`.
                unsafe {
                    asm!(
                        concat!("lock not ", $ptr, " ptr [{p}]"),
                        p = in(reg) p,
                        options(nostack, preserves_flags)
                    );
                }
            }
            #[inline(always)]
            unsafe fn xchg(p: *mut u8, mut b: $t) -> $t {
                // SAFETY: the caller's promise about `p`.
                unsafe {
                    asm!(
                        concat!("xchg ", $ptr, " ptr [{p}], {b", $m, "}"),
                        p = in(reg) p,
                        b = inout($class) b,
                        options(nostack, preserves_flags)
                    );
                }
                b
            }
            #[inline(always)]
            unsafe fn lock_xadd(p: *mut u8, mut b: $t) -> ($t, u64) {
                let ax: u32;
                // SAFETY: the caller's promise about `p`.
                unsafe {
                    asm!(
                        concat!("lock xadd ", $ptr, " ptr [{p}], {b", $m, "}"),
                        "lahf",
                        "seto al",
                        p = in(reg) p,
                        b = inout($class) b,
                        out("eax") ax,
                        options(nostack)
                    );
                }
                (b, status(ax))
            }
            #[inline(always)]
            unsafe fn lock_cmpxchg(p: *mut u8, old: $t, new: $t) -> ($t, u64) {
                let ax: u64;
                let seen: u64;
                // SAFETY: the caller's promise about `p`.
                unsafe {
                    asm!(
                        concat!("lock cmpxchg ", $ptr, " ptr [{p}], {new", $m, "}"),
                        "mov {seen}, rax",
                        "lahf",
                        "seto al",
                        p = in(reg) p,
                        new = in($class) new,
                        seen = out(reg) seen,
                        inout("rax") old.to_u64() => ax,
                        options(nostack)
                    );
                }
                (seen as $t, status(ax as u32))
            }
            $($mul)*
        }
    };
}

macro_rules! wide_mul {
    ($name:ident, $ins:literal, $t:ty, $m:literal) => {
        #[inline(always)]
        fn $name(a: $t, b: $t) -> ($t, $t, u64) {
            let ax: u64;
            let (low, high): (u64, u64);
            // SAFETY: arithmetic on registers only.
            unsafe {
                asm!(
                    concat!($ins, " {b", $m, "}"),
                    "mov {low}, rax",
                    "lahf",
                    "seto al",
                    b = in(reg) b,
                    low = out(reg) low,
                    inout("rax") a.to_u64() => ax,
                    out("rdx") high,
                    options(pure, nomem, nostack)
                );
            }
            (low as $t, high as $t, status(ax as u32))
        }
    };
}
macro_rules! byte_mul {
    ($name:ident, $ins:literal) => {
        #[inline(always)]
        fn $name(a: u8, b: u8) -> (u8, u8, u64) {
            let ax: u64;
            let low: u64;
            // SAFETY: arithmetic on registers only.
            unsafe {
                asm!(
                    concat!($ins, " {b}"),
                    "mov {low}, rax",
                    "lahf",
                    "seto al",
                    b = in(reg_byte) b,
                    low = out(reg) low,
                    inout("rax") u64::from(a) => ax,
                    options(pure, nomem, nostack)
                );
            }
            (low as u8, (low >> 8) as u8, status(ax as u32))
        }
    };
}

arith!(u8, reg_byte, "", "byte", "al", {
    byte_mul!(mul, "mul");
    byte_mul!(imul, "imul");
});
arith!(u16, reg, ":x", "word", "ax", {
    wide_mul!(mul, "mul", u16, ":x");
    wide_mul!(imul, "imul", u16, ":x");
});
arith!(u32, reg, ":e", "dword", "eax", {
    wide_mul!(mul, "mul", u32, ":e");
    wide_mul!(imul, "imul", u32, ":e");
});
arith!(u64, reg, ":r", "qword", "rax", {
    wide_mul!(mul, "mul", u64, ":r");
    wide_mul!(imul, "imul", u64, ":r");
});

macro_rules! double_shift {
    ($name:ident, $ins:literal, $t:ty, $m:literal) => {
        /// Double shift; returns the result and the status flags.
        #[inline]
        pub fn $name(mut a: $t, b: $t, n: u8) -> ($t, u64) {
            let ax: u32;
            // SAFETY: arithmetic on registers only.
            unsafe {
                asm!(
                    concat!($ins, " {a", $m, "}, {b", $m, "}, cl"),
                    "lahf",
                    "seto al",
                    a = inout(reg) a,
                    b = in(reg) b,
                    in("cl") n,
                    out("eax") ax,
                    options(pure, nomem, nostack)
                );
            }
            (a, status(ax))
        }
    };
}
double_shift!(shld16, "shld", u16, ":x");
double_shift!(shld32, "shld", u32, ":e");
double_shift!(shld64, "shld", u64, ":r");
double_shift!(shrd16, "shrd", u16, ":x");
double_shift!(shrd32, "shrd", u32, ":e");
double_shift!(shrd64, "shrd", u64, ":r");

macro_rules! scan {
    ($($name:ident, $ins:literal, $t:ty, $m:literal;)*) => {$(
        /// One source, one result. The destination comes in as `d` (BSF and BSR leave it on a zero source).
        ///
        /// Must only be called if the host has the instruction: every model is a subset of the host's features.
        #[inline]
        pub fn $name(mut d: $t, a: $t) -> ($t, u64) {
            let ax: u32;
            // SAFETY: arithmetic on registers only.
            unsafe {
                asm!(
                    concat!($ins, " {d", $m, "}, {a", $m, "}"),
                    "lahf",
                    "seto al",
                    d = inout(reg) d,
                    a = in(reg) a,
                    out("eax") ax,
                    options(pure, nomem, nostack)
                );
            }
            (d, status(ax))
        }
    )*};
}
scan! {
    bsf16, "bsf", u16, ":x"; bsf32, "bsf", u32, ":e"; bsf64, "bsf", u64, ":r";
    bsr16, "bsr", u16, ":x"; bsr32, "bsr", u32, ":e"; bsr64, "bsr", u64, ":r";
    tzcnt16, "tzcnt", u16, ":x"; tzcnt32, "tzcnt", u32, ":e"; tzcnt64, "tzcnt", u64, ":r";
    lzcnt16, "lzcnt", u16, ":x"; lzcnt32, "lzcnt", u32, ":e"; lzcnt64, "lzcnt", u64, ":r";
    popcnt16, "popcnt", u16, ":x"; popcnt32, "popcnt", u32, ":e"; popcnt64, "popcnt", u64, ":r";
    blsr32, "blsr", u32, ":e"; blsr64, "blsr", u64, ":r";
    blsi32, "blsi", u32, ":e"; blsi64, "blsi", u64, ":r";
    blsmsk32, "blsmsk", u32, ":e"; blsmsk64, "blsmsk", u64, ":r";
}

macro_rules! ternary {
    ($($name:ident, $ins:literal, $t:ty, $m:literal;)*) => {$(
        /// Two sources, one result (VEX-encoded); see the scans about the host's features.
        #[inline]
        pub fn $name(a: $t, b: $t) -> ($t, u64) {
            let ax: u32;
            let d: $t;
            // SAFETY: arithmetic on registers only.
            unsafe {
                asm!(
                    concat!($ins, " {d", $m, "}, {a", $m, "}, {b", $m, "}"),
                    "lahf",
                    "seto al",
                    d = out(reg) d,
                    a = in(reg) a,
                    b = in(reg) b,
                    out("eax") ax,
                    options(pure, nomem, nostack)
                );
            }
            (d, status(ax))
        }
    )*};
}
ternary! {
    andn32, "andn", u32, ":e"; andn64, "andn", u64, ":r";
    bzhi32, "bzhi", u32, ":e"; bzhi64, "bzhi", u64, ":r";
    bextr32, "bextr", u32, ":e"; bextr64, "bextr", u64, ":r";
    pdep32, "pdep", u32, ":e"; pdep64, "pdep", u64, ":r";
    pext32, "pext", u32, ":e"; pext64, "pext", u64, ":r";
}

/// `LOCK CMPXCHG8B`: the old value and ZF.
///
/// # Safety
/// `p` must be valid for reads and writes of 8 bytes, which may be shared with other threads.
pub unsafe fn lock_cmpxchg8(p: *mut u8, old: u64, new: u64) -> (u64, bool) {
    // SAFETY: the caller's promise.
    let (seen, flags) = unsafe { <u64 as Arith>::lock_cmpxchg(p, old, new) };
    (seen, flags & x86::regs::rflags::ZF != 0)
}

/// `LOCK CMPXCHG16B`: the old value and ZF.
///
/// # Safety
/// `p` must be valid for reads and writes of 16 bytes and 16-byte aligned.
pub unsafe fn lock_cmpxchg16(p: *mut u8, old: (u64, u64), new: (u64, u64)) -> ((u64, u64), bool) {
    let (mut low, mut high) = old;
    let zf: u8;
    // SAFETY: the caller's promise. RBX cannot be named as an operand, so it is exchanged around the instruction.
    unsafe {
        asm!(
            "xchg rsi, rbx",
            "lock cmpxchg16b xmmword ptr [rdi]",
            "mov rbx, rsi",
            "sete r8b",
            in("rdi") p,
            inout("rsi") new.0 => _,
            out("r8b") zf,
            inout("rax") low,
            inout("rdx") high,
            in("rcx") new.1,
            options(nostack)
        );
    }
    ((low, high), zf != 0)
}

/// Accumulates CRC-32C (the CRC32 instruction) over the low `size` bytes of `value`. The host must have SSE4.2, as every
/// model that offers the instruction requires.
pub fn crc32(crc: u32, value: u64, size: u8) -> u32 {
    let mut crc = u64::from(crc);
    // SAFETY: arithmetic on registers only.
    unsafe {
        match size {
            1 => {
                asm!("crc32 {c:e}, {v}", c = inout(reg) crc, v = in(reg_byte) value as u8, options(pure, nomem, nostack))
            }
            2 => {
                asm!("crc32 {c:e}, {v:x}", c = inout(reg) crc, v = in(reg) value as u16, options(pure, nomem, nostack))
            }
            4 => {
                asm!("crc32 {c:e}, {v:e}", c = inout(reg) crc, v = in(reg) value as u32, options(pure, nomem, nostack))
            }
            _ => asm!("crc32 {c:r}, {v:r}", c = inout(reg) crc, v = in(reg) value, options(pure, nomem, nostack)),
        }
    }
    crc as u32
}
