//! System calls without the C library: for use between fork and the end of the child's own code, where nothing may
//! allocate, lock or rely on a thread's state, and for ptrace, whose wrapper is variadic.

use std::io;

/// Makes a system call; gives what the kernel gives (an error as `-errno`).
///
/// # Safety
/// As the call.
#[inline(always)]
pub(super) unsafe fn raw(number: i64, arguments: [u64; 6]) -> i64 {
    let [a, b, c, d, e, f] = arguments;
    let result: i64;
    // SAFETY: the kernel's convention; what the call does with memory is the caller's to know.
    unsafe {
        std::arch::asm!(
            "syscall",
            inlateout("rax") number => result,
            in("rdi") a, in("rsi") b, in("rdx") c, in("r10") d, in("r8") e, in("r9") f,
            lateout("rcx") _, lateout("r11") _,
            options(nostack),
        );
    }
    result
}

/// Makes a system call.
///
/// # Safety
/// As the call.
pub(super) unsafe fn call(number: i64, arguments: [u64; 6]) -> io::Result<u64> {
    // SAFETY: the caller's promise.
    let result = unsafe { raw(number, arguments) };
    match result {
        -4095..0 => Err(io::Error::from_raw_os_error(-result as i32)),
        _ => Ok(result as u64),
    }
}

/// A ptrace request with a small number as its data.
pub(super) fn ptrace_number(request: libc::c_uint, pid: i32, data: u64) -> io::Result<()> {
    // SAFETY: these requests do not use `data` as an address.
    unsafe { call(libc::SYS_ptrace, [request.into(), pid as u64, 0, data, 0, 0]) }.map(drop)
}

/// A ptrace request with an address as its data.
///
/// # Safety
/// `data` must be what the request writes to or reads from.
pub(super) unsafe fn ptrace<T>(request: libc::c_uint, pid: i32, address: u64, data: *mut T) -> io::Result<u64> {
    // SAFETY: the caller's promise.
    unsafe { call(libc::SYS_ptrace, [request.into(), pid as u64, address, data as u64, 0, 0]) }
}
