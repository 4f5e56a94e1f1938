//! The few system calls that the standard library does not offer.

use std::ffi::{c_char, c_int, c_long, c_void};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

unsafe extern "C" {
    fn syscall(number: c_long, ...) -> c_long;
    fn fork() -> c_int;
    fn _exit(status: c_int) -> !;
    fn waitpid(pid: c_int, status: *mut c_int, options: c_int) -> c_int;
    fn execv(path: *const c_char, argv: *const *const c_char) -> c_int;
    fn pipe(ends: *mut c_int) -> c_int;
    fn read(fd: c_int, buffer: *mut c_void, count: usize) -> isize;
    fn write(fd: c_int, buffer: *const c_void, count: usize) -> isize;
    fn close(fd: c_int) -> c_int;
    fn mmap(
        address: *mut c_void,
        length: usize,
        protection: c_int,
        flags: c_int,
        fd: c_int,
        offset: i64,
    ) -> *mut c_void;
    fn munmap(address: *mut c_void, length: usize) -> c_int;
    fn getrusage(who: c_int, usage: *mut Rusage) -> c_int;
}

/// `struct rusage` of getrusage(2): two times, then 14 counters.
#[repr(C)]
struct Rusage {
    user: [i64; 2],
    system: [i64; 2],
    rest: [i64; 14],
}

/// Number of getppid(2) on x86-64.
const SYS_GETPPID: c_long = 110;
/// Number of sched_setaffinity(2) on x86-64.
const SYS_SCHED_SETAFFINITY: c_long = 203;
/// Number of futex(2) on x86-64.
const SYS_FUTEX: c_long = 202;
/// `PROT_READ | PROT_WRITE`.
const READ_WRITE: c_int = 3;
/// `MAP_PRIVATE | MAP_ANONYMOUS`.
const PRIVATE_ANONYMOUS: c_int = 0x22;
/// `MAP_SHARED | MAP_ANONYMOUS`.
const SHARED_ANONYMOUS: c_int = 0x21;

/// getppid(2), without any caching by the library.
pub fn parent() -> u64 {
    // SAFETY: getppid takes no arguments and changes nothing.
    unsafe { syscall(SYS_GETPPID) as u64 }
}

/// Keeps this process and its children on the first processor.
pub fn stay_on_first_processor() {
    let mask: u64 = 1;
    // SAFETY: the mask is 8 bytes long, as the call says.
    unsafe { syscall(SYS_SCHED_SETAFFINITY, 0_i64, 8_i64, &raw const mask) };
}

/// Processor time of all children waited for.
pub fn children_time() -> Duration {
    let mut usage = Rusage { user: [0; 2], system: [0; 2], rest: [0; 14] };
    const RUSAGE_CHILDREN: c_int = -1;
    // SAFETY: the structure has the layout and size of getrusage(2).
    unsafe { getrusage(RUSAGE_CHILDREN, &mut usage) };
    Duration::from_micros((usage.user[1] + usage.system[1]) as u64)
        + Duration::from_secs((usage.user[0] + usage.system[0]) as u64)
}

/// Runs `body` in a child process, which then ends.
pub fn child(body: impl FnOnce()) -> c_int {
    // SAFETY: this program has one thread, so the child may do everything that the parent may.
    match unsafe { fork() } {
        0 => {
            body();
            // SAFETY: ends the child without running the parent's exit handlers.
            unsafe { _exit(0) }
        }
        pid => pid,
    }
}

/// Waits for a child.
pub fn wait(pid: c_int) {
    let mut status = 0;
    // SAFETY: the status is a valid integer.
    unsafe { waitpid(pid, &mut status, 0) };
}

/// Replaces this process by this program with `--child`. Returns only on failure.
pub fn execute_self() {
    let path = c"/proc/self/exe";
    let argv = [path.as_ptr(), c"--child".as_ptr(), std::ptr::null()];
    // SAFETY: path and arguments are C strings, the list ends with a null pointer.
    unsafe { execv(path.as_ptr(), argv.as_ptr()) };
}

/// A pipe of bytes.
pub struct Pipe {
    ends: [c_int; 2],
}

impl Pipe {
    /// Opens a pipe.
    pub fn open() -> Self {
        let mut ends = [0; 2];
        // SAFETY: pipe writes two integers.
        assert_eq!(unsafe { pipe(ends.as_mut_ptr()) }, 0, "cannot open a pipe");
        Self { ends }
    }

    /// Sends one byte.
    pub fn send(&self) {
        let byte = 7_u8;
        // SAFETY: one byte is read from a byte.
        unsafe { write(self.ends[1], (&raw const byte).cast(), 1) };
    }

    /// Waits for one byte; `false` at the pipe's end.
    pub fn receive(&self) -> bool {
        let mut byte = 0_u8;
        // SAFETY: one byte is written to a byte.
        unsafe { read(self.ends[0], (&raw mut byte).cast(), 1) == 1 }
    }

    /// Closes one end: 0 to read, 1 to write.
    pub fn close_end(&self, end: usize) {
        // SAFETY: the descriptor is this pipe's own.
        unsafe { close(self.ends[end]) };
    }
}

/// Whose turn it is: a word of memory shared with child processes, waited for by futex(2).
pub struct Turn {
    word: *const AtomicU32,
}

impl Turn {
    /// A turn of number 0.
    pub fn new() -> Self {
        // SAFETY: as for a private mapping, see `Mapping::new`.
        let address = unsafe { mmap(std::ptr::null_mut(), 4096, READ_WRITE, SHARED_ANONYMOUS, -1, 0) };
        assert!(address as isize != -1, "cannot map a page");
        Self { word: address.cast() }
    }

    fn word(&self) -> &AtomicU32 {
        // SAFETY: the mapping lives as long as this value, is aligned to a page and starts as zero.
        unsafe { &*self.word }
    }

    /// Sets the turn and wakes whoever waits.
    pub fn give(&self, to: u32) {
        self.word().store(to, Ordering::SeqCst);
        // SAFETY: FUTEX_WAKE (1) of one waiter looks only at the word's address.
        unsafe { syscall(SYS_FUTEX, self.word, 1_i64, 1_i64) };
    }

    /// Sleeps until the turn is `own`.
    pub fn wait_for(&self, own: u32) {
        loop {
            let now = self.word().load(Ordering::SeqCst);
            if now == own {
                return;
            }
            // SAFETY: FUTEX_WAIT (0) reads the word and sleeps while it still has this value; no time limit.
            unsafe { syscall(SYS_FUTEX, self.word, 0_i64, i64::from(now), 0_i64) };
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        // SAFETY: this is the page that `new` mapped; nothing borrows it any more.
        unsafe { munmap(self.word.cast_mut().cast(), 4096) };
    }
}

/// Anonymous private memory.
pub struct Mapping {
    address: *mut u8,
    length: usize,
}

impl Mapping {
    /// Maps memory, untouched.
    pub fn new(length: usize) -> Self {
        // SAFETY: a new anonymous mapping at an address of the kernel's choice touches nothing that exists.
        let address = unsafe { mmap(std::ptr::null_mut(), length, READ_WRITE, PRIVATE_ANONYMOUS, -1, 0) };
        assert!(address as isize != -1, "cannot map {length} bytes");
        Self { address: address.cast(), length }
    }

    /// Writes one byte to each page.
    pub fn touch(&mut self) -> u64 {
        let mut offset = 0;
        while offset < self.length {
            // SAFETY: the offset is inside the mapping, which is writable and ours alone.
            unsafe { self.address.add(offset).write_volatile(1) };
            offset += 4096;
        }
        (self.length / 4096) as u64
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this is the whole mapping that `new` made; nothing borrows it any more.
        unsafe { munmap(self.address.cast(), self.length) };
    }
}
