//! The stack of return addresses that translated code calls and returns on.
//!
//! It holds nothing of the guest's state: only predictions, which the code behind a call checks. An overflow runs into a guard
//! page, and the signal handler empties the stack.

use std::io;

/// Bytes that can be pushed.
const SIZE: usize = 64 << 10;
/// Guard below them: more than any single sequence of pushes can jump over.
const GUARD: usize = 16 << 10;

/// Memory for return addresses.
pub struct ShadowStack {
    base: *mut u8,
}

// SAFETY: plain memory of its own; used by one thread at a time.
unsafe impl Send for ShadowStack {}

impl ShadowStack {
    /// An empty stack; a return that finds it empty goes to the code at `unpaired`.
    ///
    /// # Errors
    /// When the host has no memory.
    pub fn new(unpaired: u64) -> io::Result<Self> {
        // SAFETY: a new mapping; its lower part is then made inaccessible.
        let base = unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            let base = libc::mmap(std::ptr::null_mut(), SIZE + GUARD, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
            if base == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
            let stack = Self { base: base.cast() };
            if libc::mprotect(base, GUARD, libc::PROT_NONE) < 0 {
                return Err(io::Error::last_os_error());
            }
            (stack.top() as *mut u64).write(unpaired);
            stack
        };
        Ok(base)
    }

    /// RSP of the empty stack. It points to the address of the code for returns without a call.
    pub fn top(&self) -> u64 {
        self.base as u64 + (SIZE + GUARD - 64) as u64
    }

    /// Is the address in the guard? Async-signal-safe.
    pub fn guards(&self, address: u64) -> bool {
        address.wrapping_sub(self.base as u64) < GUARD as u64
    }
}

impl Drop for ShadowStack {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`; nobody executes on it any more.
        unsafe { libc::munmap(self.base.cast(), SIZE + GUARD) };
    }
}
