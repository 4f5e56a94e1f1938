//! Guest physical memory: what is mapped where, access by devices, and who has written to it.
//!
//! Host memory comes in [`MemoryBlock`]s, which are mapped at guest physical addresses with rights. A block lives as
//! long as the [`GuestMemory`] that it was mapped into, even after it is unmapped there: a VP or a device that still
//! holds a host address writes into memory that the guest no longer sees, never into foreign memory.
//!
//! Every page of a block has a byte of flags: whether an engine has translated code from it, and whether it was
//! written since the last time somebody asked. Writes through this module honour both. Engines that write through host
//! pointers ([`HostPage`]) must do it themselves.
//!
//! Guest memory is shared with running VPs, so bytes may change under a reader. All accesses here are copies: nothing
//! hands out a reference into guest memory.

use std::collections::HashMap;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, RwLock};
use thiserror::Error;
use x86::paging::{LARGE_PAGE_SIZE, PAGE_SIZE};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// A guest physical address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, serde::Serialize, serde::Deserialize)]
pub struct Gpa(pub u64);

impl std::fmt::Debug for Gpa {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}
impl std::fmt::Display for Gpa {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}
impl std::ops::Add<u64> for Gpa {
    type Output = Gpa;
    fn add(self, bytes: u64) -> Gpa {
        Gpa(self.0.wrapping_add(bytes))
    }
}

/// End of the guest physical address space that can be mapped (1 TiB).
pub const GPA_LIMIT: u64 = 1 << 40;

/// What the guest may do with a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read, write, execute.
    Ram,
    /// Read and execute; a write is an exit ([`crate::VpExits::mmio_write`]).
    Rom,
}

/// What goes wrong with guest memory.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// An access outside mapped memory (or a write to ROM).
    #[error("guest physical range {gpa} + {len:#x} is not {needed}")]
    NotMapped {
        /// First address.
        gpa: Gpa,
        /// Bytes.
        len: u64,
        /// "mapped" or "writable".
        needed: &'static str,
    },
    /// An atomic access that is not naturally aligned.
    #[error("guest physical address {0} is not aligned for an atomic access")]
    Unaligned(Gpa),
    /// A mapping that overlaps another, is not page-aligned or exceeds the address space.
    #[error("cannot map {len:#x} bytes at {gpa}: {reason}")]
    BadMapping {
        /// First address.
        gpa: Gpa,
        /// Bytes.
        len: u64,
        /// Why.
        reason: &'static str,
    },
    /// The host cannot give memory.
    #[error("the host cannot give {len:#x} bytes of memory for the guest: {source}")]
    Host {
        /// Bytes.
        len: u64,
        /// What it said.
        source: std::io::Error,
    },
}

/// `MADV_POPULATE_WRITE` of Linux 5.14 (asm-generic/mman-common.h).
const MADV_POPULATE_WRITE: i32 = 23;

/// Flags of a page (see [`HostPage::flags`]).
pub mod page_flags {
    /// The engine holds translations of code on this page: it must be told of writes.
    pub const CODE: u8 = 1;
    /// Written since dirty tracking was started or the record was last taken.
    pub const DIRTY: u8 = 2;
    /// Some VP of the engine may hold a cached write permission for this page.
    pub const WRITE_CACHED: u8 = 4;
}

/// A piece of host memory that can be mapped into a guest.
pub struct MemoryBlock {
    ptr: *mut u8,
    len: usize,
    fd: Option<OwnedFd>,
    flags: Box<[AtomicU8]>,
    /// Of a shared block: which of its 2 MiB pieces the host has been asked to make large pages.
    large: Box<[AtomicU8]>,
    /// How often in a row it has refused.
    refusals: AtomicU8,
}

/// `MADV_COLLAPSE` (asm-generic/mman-common.h; Linux 6.1).
const MADV_COLLAPSE: i32 = 25;
/// Refusals in a row after which the host is not asked again.
const MOST_REFUSALS: u8 = 8;

// SAFETY: the block is plain memory; all access to it goes through copies or atomics (module page), which are allowed
// from any thread.
unsafe impl Send for MemoryBlock {}
// SAFETY: as above.
unsafe impl Sync for MemoryBlock {}

impl MemoryBlock {
    /// Allocates zeroed memory, a multiple of 4 KiB. With `shared`, it is a memfd that other processes can map.
    /// Memory is given by the host on first touch, in 2 MiB pages where it can.
    pub fn new(len: u64, shared: bool) -> Result<Arc<Self>, MemoryError> {
        let host = |source| MemoryError::Host { len, source };
        if len == 0 || len % PAGE_SIZE != 0 || len > GPA_LIMIT {
            return Err(MemoryError::BadMapping { gpa: Gpa(0), len, reason: "not a multiple of 4 KiB up to 1 TiB" });
        }
        let size = usize::try_from(len).map_err(|_| host(std::io::ErrorKind::OutOfMemory.into()))?;
        let fd = if shared { Some(memfd(len).map_err(host)?) } else { None };
        // Over-reserve, then map at a 2 MiB boundary inside: huge pages need an aligned address.
        let slack = if len >= LARGE_PAGE_SIZE { LARGE_PAGE_SIZE as usize } else { 0 };
        // SAFETY: a fresh reservation at an address of the kernel's choice; nothing else is touched.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size + slack,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(host(std::io::Error::last_os_error()));
        }
        let start = (base as usize).next_multiple_of(slack.max(PAGE_SIZE as usize));
        let (kind, raw) = match &fd {
            Some(fd) => (libc::MAP_SHARED, fd.as_raw_fd()),
            None => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1),
        };
        // SAFETY: [start, start + size) lies inside the reservation made above, which is ours alone.
        let ptr = unsafe {
            libc::mmap(
                start as *mut libc::c_void,
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                kind | libc::MAP_FIXED | libc::MAP_NORESERVE,
                raw,
                0,
            )
        };
        if ptr == libc::MAP_FAILED {
            let error = std::io::Error::last_os_error();
            // SAFETY: the reservation made above; nobody else knows it.
            unsafe { libc::munmap(base, size + slack) };
            return Err(host(error));
        }
        // SAFETY: the two ends of the reservation that the block does not use; empty ranges are skipped.
        unsafe {
            let head = start - base as usize;
            if head > 0 {
                libc::munmap(base, head);
            }
            let tail = slack - head;
            if tail > 0 {
                libc::munmap((start + size) as *mut libc::c_void, tail);
            }
            // Advice only: a host without huge pages ignores it.
            libc::madvise(ptr, size, libc::MADV_HUGEPAGE);
            // A core dump of the worker must not contain the guest.
            libc::madvise(ptr, size, libc::MADV_DONTDUMP);
        }
        let pages = size / PAGE_SIZE as usize;
        let flags = (0..pages).map(|_| AtomicU8::new(0)).collect();
        let pieces = if fd.is_some() { size / LARGE_PAGE_SIZE as usize } else { 0 };
        let large = (0..pieces).map(|_| AtomicU8::new(0)).collect();
        Ok(Arc::new(Self { ptr: ptr.cast(), len: size, fd, flags, large, refusals: AtomicU8::new(0) }))
    }

    /// Bytes.
    #[allow(clippy::len_without_is_empty)] // a block is never empty
    pub fn len(&self) -> u64 {
        self.len as u64
    }

    /// The memfd behind a shared block.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.fd.as_ref().map(std::os::fd::AsFd::as_fd)
    }

    /// A VP uses this page (by its number). Private memory gets 2 MiB pages from the host by itself, when it is first touched;
    /// shared memory does not on most hosts (`/sys/kernel/mm/transparent_hugepage/shmem_enabled` is "never"), which costs
    /// a fifth of the speed of large programs. But a process may ask for each large page. For engines.
    #[inline]
    pub fn used(&self, page: usize) {
        let piece = page / (LARGE_PAGE_SIZE / PAGE_SIZE) as usize;
        if self.large.get(piece).is_some_and(|p| p.load(Ordering::Relaxed) == 0) {
            self.make_large(piece);
        }
    }

    #[cold]
    fn make_large(&self, piece: usize) {
        if self.large[piece].swap(1, Ordering::Relaxed) != 0 || self.refusals.load(Ordering::Relaxed) >= MOST_REFUSALS {
            return;
        }
        let at = self.ptr.wrapping_add(piece * LARGE_PAGE_SIZE as usize);
        // SAFETY: the piece lies inside the block: `large` has one element for each that does. Reading one byte gives the host
        // something to begin with; a large page has the contents that the small ones had.
        let refused = unsafe {
            at.read_volatile();
            libc::madvise(at.cast(), LARGE_PAGE_SIZE as usize, MADV_COLLAPSE) != 0
        };
        if refused {
            self.refusals.fetch_add(1, Ordering::Relaxed);
        } else {
            self.refusals.store(0, Ordering::Relaxed);
        }
    }

    /// Host address of the first byte. For engines.
    pub fn as_ptr(&self) -> *mut u8 {
        self.ptr
    }

    /// The flags of its pages ([`page_flags`]). For engines.
    pub fn flags(&self) -> &[AtomicU8] {
        &self.flags
    }

    /// Copies bytes out, whatever maps the block. `None` if the range is not inside it.
    pub fn read(&self, offset: u64, data: &mut [u8]) -> Option<()> {
        let at = self.at(offset, data.len())?;
        // SAFETY: `at` checked that the range lies inside the block.
        unsafe { copy_from(at, data) };
        Some(())
    }

    /// Copies bytes in, whatever maps the block, with no regard to tracking (for loading before the guest runs, and for
    /// ROM). `None` if the range is not inside it.
    pub fn write(&self, offset: u64, data: &[u8]) -> Option<()> {
        let at = self.at(offset, data.len())?;
        // SAFETY: `at` checked that the range lies inside the block.
        unsafe { copy_to(at, data) };
        Some(())
    }

    fn at(&self, offset: u64, len: usize) -> Option<*mut u8> {
        let offset = usize::try_from(offset).ok()?;
        (offset.checked_add(len)? <= self.len).then(|| self.ptr.wrapping_add(offset))
    }
}

impl Drop for MemoryBlock {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and no pointer outlives the Arc (module page).
        unsafe { libc::munmap(self.ptr.cast(), self.len) };
    }
}

impl std::fmt::Debug for MemoryBlock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "MemoryBlock({:#x} bytes)", self.len)
    }
}

fn memfd(len: u64) -> std::io::Result<OwnedFd> {
    // SAFETY: a constant, terminated name; the result is checked.
    let raw = unsafe { libc::memfd_create(c"viridian-guest".as_ptr(), libc::MFD_CLOEXEC) };
    if raw < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: `raw` is a fresh descriptor that nobody else owns.
    let fd = unsafe { OwnedFd::from_raw_fd(raw) };
    // SAFETY: a valid descriptor; the result is checked.
    if unsafe { libc::ftruncate(fd.as_raw_fd(), len as libc::off_t) } < 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(fd)
}

/// Copies from guest memory, with single accesses for aligned 1, 2, 4 and 8 bytes (a device ring's index must never be
/// seen half-written).
///
/// # Safety
/// `from .. from + to.len()` must be inside a live block.
unsafe fn copy_from(from: *const u8, to: &mut [u8]) {
    // SAFETY: the caller's promise; alignment is checked in each arm.
    unsafe {
        match to.len() {
            1 => to[0] = from.read_volatile(),
            2 if from.cast::<u16>().is_aligned() => {
                to.copy_from_slice(&from.cast::<u16>().read_volatile().to_ne_bytes());
            }
            4 if from.cast::<u32>().is_aligned() => {
                to.copy_from_slice(&from.cast::<u32>().read_volatile().to_ne_bytes());
            }
            8 if from.cast::<u64>().is_aligned() => {
                to.copy_from_slice(&from.cast::<u64>().read_volatile().to_ne_bytes());
            }
            len => std::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), len),
        }
    }
}

/// Copies to guest memory; see [`copy_from`].
///
/// # Safety
/// `to .. to + from.len()` must be inside a live block.
unsafe fn copy_to(to: *mut u8, from: &[u8]) {
    // SAFETY: the caller's promise; alignment is checked in each arm; array lengths equal the matched length.
    unsafe {
        match from.len() {
            1 => to.write_volatile(from[0]),
            2 if to.cast::<u16>().is_aligned() => {
                to.cast::<u16>().write_volatile(u16::from_ne_bytes([from[0], from[1]]));
            }
            4 if to.cast::<u32>().is_aligned() => {
                to.cast::<u32>().write_volatile(u32::from_ne_bytes([from[0], from[1], from[2], from[3]]));
            }
            8 if to.cast::<u64>().is_aligned() => {
                let mut bytes = [0; 8];
                bytes.copy_from_slice(from);
                to.cast::<u64>().write_volatile(u64::from_ne_bytes(bytes));
            }
            len => std::ptr::copy_nonoverlapping(from.as_ptr(), to, len),
        }
    }
}

/// One mapping of a block.
#[derive(Clone, Debug)]
pub struct Mapping {
    /// First guest physical address.
    pub gpa: Gpa,
    /// Bytes.
    pub len: u64,
    /// Rights.
    pub access: Access,
    /// The memory.
    pub block: Arc<MemoryBlock>,
    /// Where in the block the mapping starts.
    pub offset: u64,
}

impl Mapping {
    /// The guest physical addresses.
    pub fn range(&self) -> Range<u64> {
        self.gpa.0..self.gpa.0 + self.len
    }
}

/// An engine's ear for changes of guest memory that it did not make itself.
pub trait MemoryObserver: Send + Sync {
    /// Mappings in this range have changed. When the call returns, no VP uses the old ones.
    fn mapping_changed(&self, gpa: Gpa, len: u64);
    /// A page whose [`page_flags::CODE`] flag is set was (or is about to be) written. When the call returns, no VP will
    /// start to execute a translation of the old bytes.
    fn code_written(&self, gpa: Gpa, len: u64);
    /// Dirty tracking was switched on or off, or the record of a range was taken: write permissions that engines have
    /// cached must be dropped, so that the next write to each page is seen.
    fn dirty_reset(&self);
}

/// A page as an engine sees it.
#[derive(Clone, Copy, Debug)]
pub struct HostPage<'a> {
    /// Host address of the page's first byte.
    pub ptr: *mut u8,
    /// Rights.
    pub access: Access,
    /// The page's flags ([`page_flags`]). An engine sets CODE before it reads code for translation, and DIRTY before it
    /// caches a write permission while [`GuestMemory::dirty_tracking`] is on.
    pub flags: &'a AtomicU8,
}

/// A part of guest memory for host I/O (`readv`, `io_uring`): the address stays valid as long as this lives.
#[derive(Clone, Debug)]
pub struct PinnedRange {
    block: Arc<MemoryBlock>,
    offset: usize,
    len: usize,
}

impl PinnedRange {
    /// For `readv`/`writev`-like calls. The memory stays mapped while `self` lives; the guest may change it at any time.
    pub fn as_iovec(&self) -> libc::iovec {
        libc::iovec { iov_base: self.block.ptr.wrapping_add(self.offset).cast(), iov_len: self.len }
    }
    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }
    /// Is it empty?
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
    /// A part of it; `None` if it is not inside.
    pub fn slice(&self, offset: usize, len: usize) -> Option<Self> {
        (offset.checked_add(len)? <= self.len).then(|| Self {
            block: self.block.clone(),
            offset: self.offset + offset,
            len,
        })
    }
    /// Copies bytes out. `None` if the range is not inside.
    pub fn read(&self, offset: usize, data: &mut [u8]) -> Option<()> {
        (offset.checked_add(data.len())? <= self.len).then_some(())?;
        self.block.read((self.offset + offset) as u64, data)
    }
    /// Copies bytes in. The range must have been pinned for writing. `None` if the range is not inside.
    pub fn write(&self, offset: usize, data: &[u8]) -> Option<()> {
        (offset.checked_add(data.len())? <= self.len).then_some(())?;
        self.block.write((self.offset + offset) as u64, data)
    }
}

#[derive(Default)]
struct Map {
    /// Sorted by address, without overlap.
    mappings: Vec<Mapping>,
    /// Every block ever mapped, by address, so that none is freed while a VP may hold its address.
    blocks: HashMap<usize, Arc<MemoryBlock>>,
}

impl Map {
    fn find(&self, gpa: u64) -> Option<&Mapping> {
        let i = self.mappings.partition_point(|m| m.gpa.0 <= gpa).checked_sub(1)?;
        let m = &self.mappings[i];
        (gpa - m.gpa.0 < m.len).then_some(m)
    }
}

/// A partition's guest physical memory.
#[derive(Default)]
pub struct GuestMemory {
    map: RwLock<Map>,
    observers: RwLock<Vec<Arc<dyn MemoryObserver>>>,
    dirty_tracking: AtomicBool,
}

/// What a piece-wise walk over a range hands to its closure.
struct Piece<'a> {
    mapping: &'a Mapping,
    /// Offset in the mapping's block.
    offset: u64,
    /// Offset in the whole range.
    done: usize,
    len: usize,
}

impl GuestMemory {
    /// Memory with nothing mapped.
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    /// Memory with RAM as a PC has it: below `hole` and, what does not fit there, from 4 GiB on. One block.
    pub fn with_ram(bytes: u64, hole: Range<u64>, shared: bool) -> Result<Arc<Self>, MemoryError> {
        let memory = Self::new();
        let block = MemoryBlock::new(bytes, shared)?;
        let low = bytes.min(hole.start);
        memory.map(Gpa(0), low, block.clone(), 0, Access::Ram)?;
        if bytes > low {
            memory.map(Gpa(hole.end), bytes - low, block, low, Access::Ram)?;
        }
        Ok(memory)
    }

    /// Registers an engine.
    pub fn add_observer(&self, observer: Arc<dyn MemoryObserver>) {
        self.observers.write().unwrap_or_else(|e| e.into_inner()).push(observer);
    }

    fn observe(&self, f: impl Fn(&dyn MemoryObserver)) {
        for observer in self.observers.read().unwrap_or_else(|e| e.into_inner()).iter() {
            f(&**observer);
        }
    }

    /// Maps part of a block. The range must be page-aligned and free.
    pub fn map(
        &self,
        gpa: Gpa,
        len: u64,
        block: Arc<MemoryBlock>,
        offset: u64,
        access: Access,
    ) -> Result<(), MemoryError> {
        let bad = |reason| MemoryError::BadMapping { gpa, len, reason };
        if len == 0 || (gpa.0 | len | offset) % PAGE_SIZE != 0 {
            return Err(bad("address, length and offset must be multiples of 4 KiB"));
        }
        if gpa.0.checked_add(len).is_none_or(|end| end > GPA_LIMIT) {
            return Err(bad("beyond the 1 TiB guest physical address space"));
        }
        if offset.checked_add(len).is_none_or(|end| end > block.len()) {
            return Err(bad("beyond the end of the memory block"));
        }
        {
            let mut map = self.map.write().unwrap_or_else(|e| e.into_inner());
            let i = map.mappings.partition_point(|m| m.gpa.0 < gpa.0);
            let before = i.checked_sub(1).map(|i| map.mappings[i].range().end);
            let after = map.mappings.get(i).map(|m| m.gpa.0);
            if before.is_some_and(|end| end > gpa.0) || after.is_some_and(|start| start < gpa.0 + len) {
                return Err(bad("overlaps another mapping"));
            }
            map.blocks.insert(block.ptr as usize, block.clone());
            map.mappings.insert(i, Mapping { gpa, len, access, block, offset });
        }
        self.observe(|o| o.mapping_changed(gpa, len));
        Ok(())
    }

    /// Unmaps a page-aligned range; mappings that reach over its ends are cut. Parts that are not mapped stay so.
    pub fn unmap(&self, gpa: Gpa, len: u64) -> Result<(), MemoryError> {
        if (gpa.0 | len) % PAGE_SIZE != 0 || gpa.0.checked_add(len).is_none_or(|end| end > GPA_LIMIT) {
            return Err(MemoryError::BadMapping { gpa, len, reason: "not a page-aligned range below 1 TiB" });
        }
        let (start, end) = (gpa.0, gpa.0 + len);
        {
            let mut map = self.map.write().unwrap_or_else(|e| e.into_inner());
            let mut kept = Vec::with_capacity(map.mappings.len() + 1);
            for m in map.mappings.drain(..) {
                let range = m.range();
                if range.start < start {
                    kept.push(Mapping { len: range.end.min(start) - range.start, ..m.clone() });
                }
                if range.end > end {
                    let from = range.start.max(end);
                    kept.push(Mapping {
                        gpa: Gpa(from),
                        len: range.end - from,
                        offset: m.offset + (from - range.start),
                        ..m
                    });
                }
            }
            kept.retain(|m| m.len > 0);
            map.mappings = kept;
        }
        self.observe(|o| o.mapping_changed(gpa, len));
        Ok(())
    }

    /// All mappings, by ascending address.
    pub fn mappings(&self) -> Vec<Mapping> {
        self.map.read().unwrap_or_else(|e| e.into_inner()).mappings.clone()
    }

    /// Takes all memory from the host now, instead of page by page when it is first touched.
    ///
    /// # Errors
    /// When the host has not enough.
    pub fn populate(&self) -> Result<(), MemoryError> {
        for m in self.mappings() {
            let len = m.len;
            let at = m.block.ptr.wrapping_add(m.offset as usize);
            // SAFETY: the range lies inside the block (checked when it was mapped); populating changes no contents.
            if unsafe { libc::madvise(at.cast(), len as usize, MADV_POPULATE_WRITE) } != 0 {
                return Err(MemoryError::Host { len, source: std::io::Error::last_os_error() });
            }
        }
        Ok(())
    }

    /// Bytes of RAM.
    pub fn ram_bytes(&self) -> u64 {
        self.mappings().iter().filter(|m| m.access == Access::Ram).map(|m| m.len).sum()
    }

    /// Calls `f` with the page that holds `gpa`, if it is mapped. For engines: the pointer stays valid as long as this
    /// object, but the mapping may change ([`MemoryObserver::mapping_changed`]).
    pub fn with_page<R>(&self, gpa: Gpa, f: impl FnOnce(HostPage<'_>) -> R) -> Option<R> {
        let map = self.map.read().unwrap_or_else(|e| e.into_inner());
        let m = map.find(gpa.0)?;
        let page = (m.offset + (gpa.0 - m.gpa.0)) as usize / PAGE_SIZE as usize;
        let ptr = m.block.ptr.wrapping_add(page * PAGE_SIZE as usize);
        Some(f(HostPage { ptr, access: m.access, flags: &m.block.flags[page] }))
    }

    /// Is the whole range mapped with these rights (ROM asks for any)?
    pub fn is_mapped(&self, gpa: Gpa, len: u64, access: Access) -> bool {
        usize::try_from(len).is_ok_and(|len| self.pieces(gpa, len, access == Access::Ram, |_| {}).is_ok())
    }

    fn pieces(&self, gpa: Gpa, len: usize, write: bool, mut f: impl FnMut(Piece<'_>)) -> Result<(), MemoryError> {
        let needed = if write { "writable" } else { "mapped" };
        let fail = || MemoryError::NotMapped { gpa, len: len as u64, needed };
        gpa.0.checked_add(len as u64).ok_or_else(fail)?;
        let map = self.map.read().unwrap_or_else(|e| e.into_inner());
        // Checked as a whole first: an access that fails has no partial effect.
        for act in [false, true] {
            let mut done = 0;
            while done < len {
                let at = gpa.0 + done as u64;
                let mapping = map.find(at).filter(|m| !write || m.access == Access::Ram).ok_or_else(fail)?;
                let inside = at - mapping.gpa.0;
                let piece = ((mapping.len - inside) as usize).min(len - done);
                if act {
                    f(Piece { mapping, offset: mapping.offset + inside, done, len: piece });
                }
                done += piece;
            }
        }
        Ok(())
    }

    /// Copies bytes out of guest memory.
    pub fn read(&self, gpa: Gpa, data: &mut [u8]) -> Result<(), MemoryError> {
        self.pieces(gpa, data.len(), false, |p| {
            // SAFETY: the piece lies inside its mapping and so inside its block.
            unsafe {
                copy_from(p.mapping.block.ptr.wrapping_add(p.offset as usize), &mut data[p.done..p.done + p.len]);
            }
        })
    }

    /// Copies bytes into guest RAM, with tracking.
    pub fn write(&self, gpa: Gpa, data: &[u8]) -> Result<(), MemoryError> {
        let mut code = false;
        self.pieces(gpa, data.len(), true, |p| {
            // SAFETY: the piece lies inside its mapping and so inside its block.
            unsafe { copy_to(p.mapping.block.ptr.wrapping_add(p.offset as usize), &data[p.done..p.done + p.len]) };
            code |= self.mark(&p);
        })?;
        if code {
            self.observe(|o| o.code_written(gpa, data.len() as u64));
        }
        Ok(())
    }

    /// Marks the pages of a piece dirty where that is asked for; says whether one of them holds translated code.
    fn mark(&self, p: &Piece<'_>) -> bool {
        if p.len == 0 {
            return false;
        }
        // Store, then look at the flag: an engine sets the flag, then reads the code. One of the two sees the other.
        std::sync::atomic::fence(Ordering::SeqCst);
        let dirty = self.dirty_tracking.load(Ordering::Relaxed);
        let pages = p.offset as usize / PAGE_SIZE as usize..=(p.offset as usize + p.len - 1) / PAGE_SIZE as usize;
        let mut code = false;
        for flags in &p.mapping.block.flags[pages] {
            if dirty {
                flags.fetch_or(page_flags::DIRTY, Ordering::Relaxed);
            }
            code |= flags.load(Ordering::Relaxed) & page_flags::CODE != 0;
        }
        code
    }

    /// Reads a plain structure.
    pub fn read_plain<T: FromBytes + IntoBytes>(&self, gpa: Gpa) -> Result<T, MemoryError> {
        let mut value = T::new_zeroed();
        self.read(gpa, value.as_mut_bytes())?;
        Ok(value)
    }

    /// Writes a plain structure.
    pub fn write_plain<T: IntoBytes + Immutable>(&self, gpa: Gpa, value: &T) -> Result<(), MemoryError> {
        self.write(gpa, value.as_bytes())
    }

    /// Fills a range with one byte.
    pub fn fill(&self, gpa: Gpa, byte: u8, len: u64) -> Result<(), MemoryError> {
        let mut code = false;
        let len = usize::try_from(len).map_err(|_| MemoryError::NotMapped { gpa, len, needed: "writable" })?;
        self.pieces(gpa, len, true, |p| {
            // SAFETY: the piece lies inside its mapping and so inside its block.
            unsafe { std::ptr::write_bytes(p.mapping.block.ptr.wrapping_add(p.offset as usize), byte, p.len) };
            code |= self.mark(&p);
        })?;
        if code {
            self.observe(|o| o.code_written(gpa, len as u64));
        }
        Ok(())
    }

    /// Calls `f` with the host address of an aligned atomic cell.
    fn atomic<R>(&self, gpa: Gpa, size: usize, write: bool, f: impl Fn(*mut u8) -> R) -> Result<R, MemoryError> {
        if gpa.0 % size as u64 != 0 {
            return Err(MemoryError::Unaligned(gpa));
        }
        let (mut result, mut code) = (None, false);
        self.pieces(gpa, size, write, |p| {
            result = Some(f(p.mapping.block.ptr.wrapping_add(p.offset as usize)));
            code |= write && self.mark(&p);
        })?;
        if code {
            self.observe(|o| o.code_written(gpa, size as u64));
        }
        result.ok_or(MemoryError::Unaligned(gpa))
    }

    /// Atomic load of 32 bits.
    pub fn load_u32(&self, gpa: Gpa, order: Ordering) -> Result<u32, MemoryError> {
        // SAFETY: `atomic` gives an aligned address inside a live block.
        self.atomic(gpa, 4, false, |p| unsafe { AtomicU32::from_ptr(p.cast()) }.load(order))
    }

    /// Atomic store of 32 bits.
    pub fn store_u32(&self, gpa: Gpa, value: u32, order: Ordering) -> Result<(), MemoryError> {
        // SAFETY: as in `load_u32`.
        self.atomic(gpa, 4, true, |p| unsafe { AtomicU32::from_ptr(p.cast()) }.store(value, order))
    }

    /// Atomic load of 64 bits.
    pub fn load_u64(&self, gpa: Gpa, order: Ordering) -> Result<u64, MemoryError> {
        // SAFETY: as in `load_u32`.
        self.atomic(gpa, 8, false, |p| unsafe { AtomicU64::from_ptr(p.cast()) }.load(order))
    }

    /// Atomic OR of 64 bits (event flags); returns the old value.
    pub fn fetch_or_u64(&self, gpa: Gpa, bits: u64) -> Result<u64, MemoryError> {
        // SAFETY: as in `load_u32`.
        self.atomic(gpa, 8, true, |p| unsafe { AtomicU64::from_ptr(p.cast()) }.fetch_or(bits, Ordering::SeqCst))
    }

    /// Atomic AND of 64 bits; returns the old value.
    pub fn fetch_and_u64(&self, gpa: Gpa, bits: u64) -> Result<u64, MemoryError> {
        // SAFETY: as in `load_u32`.
        self.atomic(gpa, 8, true, |p| unsafe { AtomicU64::from_ptr(p.cast()) }.fetch_and(bits, Ordering::SeqCst))
    }

    /// Atomic OR of 16 bits; returns the old value.
    pub fn fetch_or_u16(&self, gpa: Gpa, bits: u16) -> Result<u16, MemoryError> {
        // SAFETY: as in `load_u32`.
        self.atomic(gpa, 2, true, |p| unsafe { AtomicU16::from_ptr(p.cast()) }.fetch_or(bits, Ordering::SeqCst))
    }

    /// Atomic compare-and-exchange of 32 bits; `Ok(Err(actual))` if the value was another.
    pub fn compare_exchange_u32(&self, gpa: Gpa, old: u32, new: u32) -> Result<Result<u32, u32>, MemoryError> {
        self.atomic(gpa, 4, true, |p| {
            // SAFETY: as in `load_u32`.
            unsafe { AtomicU32::from_ptr(p.cast()) }.compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst)
        })
    }

    /// Pins a range for host I/O, one piece a mapping. With `write`, the pages count as written now, and translated
    /// code on them is dropped now; call [`GuestMemory::io_done`] after the host has written.
    pub fn pin(&self, gpa: Gpa, len: u64, write: bool) -> Result<Vec<PinnedRange>, MemoryError> {
        let size = usize::try_from(len).map_err(|_| MemoryError::NotMapped { gpa, len, needed: "mapped" })?;
        let mut ranges = Vec::new();
        self.pieces(gpa, size, write, |p| {
            ranges.push(PinnedRange { block: p.mapping.block.clone(), offset: p.offset as usize, len: p.len });
        })?;
        Ok(ranges)
    }

    /// The host has written into a pinned range: marks the pages dirty and drops translated code.
    pub fn io_done(&self, gpa: Gpa, len: u64) {
        let mut code = false;
        let Ok(size) = usize::try_from(len) else { return };
        // A range that was unmapped meanwhile needs neither.
        let _ = self.pieces(gpa, size, true, |p| code |= self.mark(&p));
        if code {
            self.observe(|o| o.code_written(gpa, len));
        }
    }

    /// Is dirty tracking on?
    pub fn dirty_tracking(&self) -> bool {
        self.dirty_tracking.load(Ordering::Relaxed)
    }

    /// Switches dirty tracking. Switching on clears all dirty flags. Called by engines
    /// ([`crate::Partition::track_dirty`]).
    pub fn set_dirty_tracking(&self, on: bool) {
        self.dirty_tracking.store(on, Ordering::SeqCst);
        if on {
            for m in self.mappings() {
                for flags in &m.block.flags {
                    flags.fetch_and(!page_flags::DIRTY, Ordering::Relaxed);
                }
            }
        }
        self.observe(|o| o.dirty_reset());
    }

    /// Takes and clears the dirty flags of a page-aligned range; pages that are not mapped are clean.
    pub fn take_dirty(&self, gpa: Gpa, pages: u64) -> crate::DirtyPages {
        let mut bits = vec![0u64; usize::try_from(pages.div_ceil(64)).unwrap_or(0)];
        {
            let map = self.map.read().unwrap_or_else(|e| e.into_inner());
            for page in 0..pages {
                let at = gpa.0 + page * PAGE_SIZE;
                if let Some(m) = map.find(at) {
                    let index = ((m.offset + (at - m.gpa.0)) / PAGE_SIZE) as usize;
                    let flags = &m.block.flags[index];
                    if flags.load(Ordering::Relaxed) & page_flags::DIRTY != 0 {
                        flags.fetch_and(!page_flags::DIRTY, Ordering::Relaxed);
                        bits[(page / 64) as usize] |= 1 << (page % 64);
                    }
                }
            }
        }
        // Only now do engines drop their cached write permissions: a write through one of them between the two steps is
        // on a page that is reported here, and its bytes are there before the caller reads them.
        self.observe(|o| o.dirty_reset());
        crate::DirtyPages { bits }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_cuts_and_refuses() {
        let memory = GuestMemory::with_ram(64 << 20, 0xc000_0000..1 << 32, true).unwrap();
        assert_eq!(memory.ram_bytes(), 64 << 20);
        memory.write(Gpa(0x1ffe), &[1, 2, 3, 4]).unwrap();
        let mut back = [0; 4];
        memory.read(Gpa(0x1ffe), &mut back).unwrap();
        assert_eq!(back, [1, 2, 3, 4]);
        assert!(memory.write(Gpa((64 << 20) - 2), &[0; 4]).is_err(), "the end of RAM is checked");
        assert!(memory.read(Gpa(u64::MAX - 1), &mut back).is_err(), "address overflow is checked");
        let rom = MemoryBlock::new(0x1000, false).unwrap();
        assert!(memory.map(Gpa(0x3000), 0x1000, rom.clone(), 0, Access::Rom).is_err(), "overlap is refused");
        memory.unmap(Gpa(0x3000), 0x1000).unwrap();
        assert!(memory.read(Gpa(0x3000), &mut back).is_err());
        memory.map(Gpa(0x3000), 0x1000, rom, 0, Access::Rom).unwrap();
        assert!(memory.write(Gpa(0x3000), &[1]).is_err(), "ROM is not writable");
        memory.read(Gpa(0x2ffe), &mut back).unwrap();
        assert_eq!(memory.mappings().len(), 3);
    }

    #[test]
    fn high_memory_goes_above_the_hole() {
        let memory = GuestMemory::with_ram(5 << 30, 0xc000_0000..1 << 32, false).unwrap();
        let ranges: Vec<_> = memory.mappings().iter().map(Mapping::range).collect();
        assert_eq!(ranges, [0..0xc000_0000, 1 << 32..(1 << 32) + (2 << 30)]);
    }

    #[test]
    fn dirty_pages_are_recorded_once() {
        let memory = GuestMemory::with_ram(1 << 20, 0xc000_0000..1 << 32, false).unwrap();
        memory.write(Gpa(0), &[1]).unwrap();
        memory.set_dirty_tracking(true);
        memory.write(Gpa(0x1fff), &[1, 2]).unwrap();
        assert_eq!(memory.take_dirty(Gpa(0), 4).bits, [0b110]);
        assert_eq!(memory.take_dirty(Gpa(0), 4).bits, [0]);
    }

    #[test]
    fn device_writes_to_code_are_reported() {
        struct Ear(std::sync::Mutex<Vec<(Gpa, u64)>>);
        impl MemoryObserver for Ear {
            fn mapping_changed(&self, _: Gpa, _: u64) {}
            fn code_written(&self, gpa: Gpa, len: u64) {
                self.0.lock().unwrap().push((gpa, len));
            }
            fn dirty_reset(&self) {}
        }
        let memory = GuestMemory::with_ram(1 << 20, 0xc000_0000..1 << 32, false).unwrap();
        let ear = Arc::new(Ear(Default::default()));
        memory.add_observer(ear.clone());
        memory.with_page(Gpa(0x2000), |p| p.flags.fetch_or(page_flags::CODE, Ordering::Relaxed));
        memory.write(Gpa(0x1000), &[0; 16]).unwrap();
        memory.write(Gpa(0x1ff8), &[0; 16]).unwrap();
        assert_eq!(*ear.0.lock().unwrap(), [(Gpa(0x1ff8), 16)]);
    }
}
