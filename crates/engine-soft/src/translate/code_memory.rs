//! Memory for generated code: one memfd, mapped twice. The writable mapping is never executable and the executable one
//! never writable (W^X), and no call changes protections while VPs run.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// A region of generated code.
pub struct CodeMemory {
    write: *mut u8,
    exec: *const u8,
    len: usize,
    /// Pieces of [`HUGE`] bytes that have been asked to become huge pages.
    asked: Vec<bool>,
}

/// Bytes of a huge page.
const HUGE: usize = 2 << 20;
/// A piece becomes a huge page when code reaches this offset in it: small guests do not pay for whole ones.
const WORTH_A_HUGE_PAGE: usize = 256 << 10;

// SAFETY: two plain mappings; who writes where is decided by the owner (`&mut` or a lock around it).
unsafe impl Send for CodeMemory {}
// SAFETY: as above.
unsafe impl Sync for CodeMemory {}

impl CodeMemory {
    /// Maps `len` bytes (rounded up to 2 MiB if larger than that, else to 4 KiB). Fails with the host's reason where
    /// executable memory files are forbidden (`vm.memfd_noexec`, SELinux `execmem`).
    pub fn new(len: usize) -> io::Result<Self> {
        let unit = if len >= HUGE { HUGE } else { 4096 };
        let len = len.next_multiple_of(unit);
        // SAFETY: constant terminated name. MFD_EXEC (0x10) is refused by kernels before 6.3, which is tried second.
        let fd = unsafe {
            let raw = libc::memfd_create(c"viridian-code".as_ptr(), libc::MFD_CLOEXEC | 0x10);
            let raw = if raw < 0 { libc::memfd_create(c"viridian-code".as_ptr(), libc::MFD_CLOEXEC) } else { raw };
            if raw < 0 {
                return Err(io::Error::last_os_error());
            }
            OwnedFd::from_raw_fd(raw)
        };
        // SAFETY: a valid descriptor.
        if unsafe { libc::ftruncate(fd.as_raw_fd(), len as libc::off_t) } < 0 {
            return Err(io::Error::last_os_error());
        }
        let write = map(&fd, len, unit, libc::PROT_READ | libc::PROT_WRITE)?;
        let exec = match map(&fd, len, unit, libc::PROT_READ | libc::PROT_EXEC) {
            Ok(exec) => exec,
            Err(error) => {
                // SAFETY: the mapping just made.
                unsafe { libc::munmap(write.cast(), len) };
                return Err(error);
            }
        };
        Ok(Self { write, exec, len, asked: vec![false; len / HUGE] })
    }

    /// Bytes.
    #[allow(clippy::len_without_is_empty)] // never empty
    pub fn len(&self) -> usize {
        self.len
    }

    /// Executable address of an offset.
    pub fn exec(&self, offset: usize) -> *const u8 {
        debug_assert!(offset <= self.len);
        self.exec.wrapping_add(offset)
    }

    /// Writable address of an offset.
    pub fn writable(&self, offset: usize) -> *mut u8 {
        debug_assert!(offset <= self.len);
        self.write.wrapping_add(offset)
    }

    /// Gives the host back what lies behind the first `keep` bytes; it reads as zeros then.
    pub fn discard(&mut self, keep: usize) {
        let from = keep.next_multiple_of(4096).min(self.len);
        if from < self.len {
            // SAFETY: inside our own shared mapping; `&mut self` excludes writers, and the owner executes nothing there any
            // more. A host that cannot do it keeps the memory, which is only a loss.
            unsafe { libc::madvise(self.write.add(from).cast(), self.len - from, libc::MADV_REMOVE) };
        }
    }

    /// Copies code in; false if it does not fit.
    pub fn put(&mut self, offset: usize, code: &[u8]) -> bool {
        if offset.checked_add(code.len()).is_none_or(|end| end > self.len) {
            return false;
        }
        // SAFETY: the range was checked against the mapping; `&mut self` excludes other writers.
        unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), self.write.add(offset), code.len()) };
        if offset % HUGE >= WORTH_A_HUGE_PAGE
            && let Some(asked) = self.asked.get_mut(offset / HUGE)
            && !std::mem::replace(asked, true)
        {
            self.make_huge(offset / HUGE * HUGE);
        }
        true
    }

    /// Makes a piece a huge page in both mappings: code that is spread over many small ones misses the processor's
    /// instruction TLB all the time, which is dear where the host is itself a guest. Where the host refuses (kernels before
    /// 6.1), it stays as it is.
    #[cold]
    fn make_huge(&self, offset: usize) {
        const MADV_COLLAPSE: i32 = 25;
        for at in [self.write.cast_const(), self.exec] {
            // SAFETY: advice about a piece of our own mappings; the contents stay.
            unsafe { libc::madvise(at.add(offset).cast_mut().cast(), HUGE, MADV_COLLAPSE) };
        }
    }
}

impl Drop for CodeMemory {
    fn drop(&mut self) {
        // SAFETY: both mappings are ours, and nobody executes in them any more: the owner outlives the VPs' threads.
        unsafe {
            libc::munmap(self.write.cast(), self.len);
            libc::munmap(self.exec.cast_mut().cast(), self.len);
        }
    }
}

/// Maps the whole file at an address that is a multiple of `align`.
fn map(fd: &OwnedFd, len: usize, align: usize, protection: i32) -> io::Result<*mut u8> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a fresh reservation; the file is mapped over an aligned part of it and the rest is given back.
    unsafe {
        let base = libc::mmap(std::ptr::null_mut(), len + align, libc::PROT_NONE, flags, -1, 0);
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = (base as usize).next_multiple_of(align);
        let at = libc::mmap(start as *mut _, len, protection, libc::MAP_SHARED | libc::MAP_FIXED, fd.as_raw_fd(), 0);
        if at == libc::MAP_FAILED {
            let error = io::Error::last_os_error();
            libc::munmap(base, len + align);
            return Err(error);
        }
        let head = start - base as usize;
        if head > 0 {
            libc::munmap(base, head);
        }
        if align > head {
            libc::munmap((start + len) as *mut _, align - head);
        }
        libc::madvise(at, len, libc::MADV_HUGEPAGE);
        Ok(at.cast())
    }
}
