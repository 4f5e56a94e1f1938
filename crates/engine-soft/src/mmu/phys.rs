//! Guest physical memory as the MMU sees it: a private copy of the mappings, and accesses that are not plain RAM.

use crate::vp::SoftVp;
use partition::memory::{Mapping, page_flags};
use partition::{Access, Gpa, GuestMemory};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering, fence};
use x86::paging::{PAGE_MASK, PAGE_SIZE};

/// A page of mapped memory.
#[derive(Clone, Copy)]
pub struct PhysPage {
    /// Host address of the page.
    pub host: *mut u8,
    /// RAM (as opposed to ROM).
    pub writable: bool,
    flags: *const AtomicU8,
}

impl PhysPage {
    /// The page's flags ([`page_flags`]).
    #[inline]
    pub fn flags(&self) -> &AtomicU8 {
        // SAFETY: the pointer comes from a live block of a mapping that the `PhysMap` held, and `GuestMemory` keeps
        // every block that was ever mapped alive as long as itself; `Mmu` owns a reference to it.
        unsafe { &*self.flags }
    }
}

/// The mappings, copied so that a look-up takes no lock. Renewed when the partition says that they changed.
pub struct PhysMap {
    memory: Arc<GuestMemory>,
    mappings: Vec<Mapping>,
    /// Where the last look-up ended: most go to the same mapping.
    last: usize,
}

impl PhysMap {
    /// A copy of the present mappings.
    pub fn new(memory: Arc<GuestMemory>) -> Self {
        let mappings = memory.mappings();
        Self { memory, mappings, last: 0 }
    }

    /// The memory behind it.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Copies the mappings again.
    pub fn reload(&mut self) {
        self.mappings = self.memory.mappings();
        self.last = 0;
    }

    /// The block of RAM that holds `gpa` (its address), and the offset there.
    pub fn block_of(&mut self, gpa: u64) -> Option<(usize, u64)> {
        self.page(gpa).filter(|p| p.writable)?;
        let m = &self.mappings[self.last];
        Some((Arc::as_ptr(&m.block).addr(), m.offset + (gpa - m.gpa.0)))
    }

    /// The mapped page that holds `gpa`.
    #[inline]
    pub fn page(&mut self, gpa: u64) -> Option<PhysPage> {
        let inside = |m: &Mapping| gpa.wrapping_sub(m.gpa.0) < m.len;
        if !self.mappings.get(self.last).is_some_and(inside) {
            self.last = self.mappings.partition_point(|m| m.gpa.0 <= gpa).checked_sub(1)?;
        }
        let m = self.mappings.get(self.last).filter(|m| inside(m))?;
        let page = ((m.offset + (gpa - m.gpa.0)) / PAGE_SIZE) as usize;
        m.block.used(page);
        Some(PhysPage {
            host: m.block.as_ptr().wrapping_add(page * PAGE_SIZE as usize),
            writable: m.access == Access::Ram,
            flags: &raw const m.block.flags()[page],
        })
    }
}

/// Copies from guest memory; naturally aligned 2, 4 and 8 bytes in one access.
///
/// # Safety
/// `from .. from + to.len()` must be inside a mapped block.
pub(super) unsafe fn copy_from_guest(from: *const u8, to: &mut [u8]) {
    // SAFETY: the caller's promise; the sizes match in every arm.
    unsafe {
        match to.len() {
            1 => to[0] = from.read_volatile(),
            2 if from.addr() & 1 == 0 => to.copy_from_slice(&from.cast::<u16>().read_volatile().to_le_bytes()),
            4 if from.addr() & 3 == 0 => to.copy_from_slice(&from.cast::<u32>().read_volatile().to_le_bytes()),
            8 if from.addr() & 7 == 0 => to.copy_from_slice(&from.cast::<u64>().read_volatile().to_le_bytes()),
            len => std::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), len),
        }
    }
}

/// Copies to guest memory; naturally aligned 2, 4 and 8 bytes in one access.
///
/// # Safety
/// `to .. to + from.len()` must be inside a mapped block.
pub(super) unsafe fn copy_to_guest(to: *mut u8, from: &[u8]) {
    let mut value = [0u8; 8];
    if from.len() <= 8 {
        value[..from.len()].copy_from_slice(from);
    }
    let value = u64::from_le_bytes(value);
    // SAFETY: the caller's promise; the sizes match in every arm.
    unsafe {
        match from.len() {
            1 => to.write_volatile(from[0]),
            2 if to.addr() & 1 == 0 => to.cast::<u16>().write_volatile(value as u16),
            4 if to.addr() & 3 == 0 => to.cast::<u32>().write_volatile(value as u32),
            8 if to.addr() & 7 == 0 => to.cast::<u64>().write_volatile(value),
            len => std::ptr::copy_nonoverlapping(from.as_ptr(), to, len),
        }
    }
}

/// Splits a range into naturally aligned pieces of at most 8 bytes, as a device sees it: (offset, length) for each.
fn device_pieces(gpa: u64, len: usize) -> impl Iterator<Item = (usize, usize)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done >= len {
            return None;
        }
        let align = 1usize << (gpa + done as u64).trailing_zeros().min(3);
        let mut size = align;
        while size > len - done {
            size /= 2;
        }
        let piece = (done, size);
        done += size;
        Some(piece)
    })
}

impl SoftVp {
    /// The plain memory behind a physical page, unless the local APIC claims it.
    #[inline]
    pub(super) fn phys_page(&mut self, gpa: u64) -> Option<PhysPage> {
        if gpa & !PAGE_MASK == self.mmu.apic_page { None } else { self.mmu.phys.page(gpa) }
    }

    /// May a process map this page, which `la` translates to? `Some`: it may, for writing too or not.
    pub(crate) fn plain_page(&mut self, la: u64, gpa: u64, write: bool) -> Option<bool> {
        if self.is_watched(la) {
            return None;
        }
        let page = self.phys_page(gpa).filter(|p| p.writable)?;
        Some(write && self.may_cache_write(&page))
    }

    /// Reads guest physical memory; what is not mapped is read from the local APIC or the machine.
    pub fn read_phys(&mut self, gpa: u64, data: &mut [u8]) {
        let mut done = 0;
        while done < data.len() {
            let at = gpa.wrapping_add(done as u64);
            let len = (data.len() - done).min((PAGE_SIZE - (at & PAGE_MASK)) as usize);
            let piece = &mut data[done..done + len];
            match self.phys_page(at) {
                // SAFETY: the page is mapped and the piece ends inside it.
                Some(page) => unsafe { copy_from_guest(page.host.wrapping_add((at & PAGE_MASK) as usize), piece) },
                None => self.device_read(at, piece),
            }
            done += len;
        }
    }

    /// Writes guest physical memory; what is not mapped as RAM is written to the local APIC or the machine.
    pub fn write_phys(&mut self, gpa: u64, data: &[u8]) {
        let mut done = 0;
        while done < data.len() {
            let at = gpa.wrapping_add(done as u64);
            let len = (data.len() - done).min((PAGE_SIZE - (at & PAGE_MASK)) as usize);
            let piece = &data[done..done + len];
            match self.phys_page(at) {
                Some(page) if page.writable => {
                    // SAFETY: the page is mapped and the piece ends inside it.
                    unsafe { copy_to_guest(page.host.wrapping_add((at & PAGE_MASK) as usize), piece) };
                    self.ram_written(&page, at, len);
                }
                _ => self.device_write(at, piece),
            }
            done += len;
        }
    }

    /// After a write through a host pointer that was not obtained from a write tag: dirty and code tracking.
    #[inline]
    pub(super) fn ram_written(&mut self, page: &PhysPage, gpa: u64, len: usize) {
        // Store, then look: whoever tracks code sets the flag, then reads the code. One of the two sees the other.
        fence(Ordering::SeqCst);
        if self.mmu.phys.memory().dirty_tracking() {
            page.flags().fetch_or(page_flags::DIRTY, Ordering::Relaxed);
        }
        if page.flags().load(Ordering::Relaxed) & page_flags::CODE != 0 {
            self.code_page_written(gpa, len);
        }
    }

    /// May this page be entered in the TLB for writing? Records what others must know about cached permissions.
    pub(super) fn may_cache_write(&self, page: &PhysPage) -> bool {
        if !page.writable {
            return false;
        }
        let dirty = if self.mmu.phys.memory().dirty_tracking() { page_flags::DIRTY } else { 0 };
        let needed = page_flags::WRITE_CACHED | dirty;
        let flags = page.flags().load(Ordering::SeqCst);
        if flags & page_flags::CODE != 0 {
            return false;
        }
        flags & needed == needed || page.flags().fetch_or(needed, Ordering::SeqCst) & page_flags::CODE == 0
    }

    /// A read of something that is not memory; within one page.
    pub(super) fn device_read(&mut self, gpa: u64, data: &mut [u8]) {
        if let Some(log) = &mut self.mmu.dry {
            log.stopped = true;
            data.fill(0);
            return;
        }
        if gpa & !PAGE_MASK == self.mmu.apic_page {
            self.apic_page_read((gpa & PAGE_MASK) as u32, data);
            return;
        }
        for (at, len) in device_pieces(gpa, data.len()) {
            self.exits().mmio_read(self.index, Gpa(gpa + at as u64), &mut data[at..at + len]);
        }
    }

    /// A write to something that is not RAM; within one page.
    pub(super) fn device_write(&mut self, gpa: u64, data: &[u8]) {
        if let Some(log) = &mut self.mmu.dry {
            log.stopped = true;
            return;
        }
        if gpa & !PAGE_MASK == self.mmu.apic_page {
            self.apic_page_write((gpa & PAGE_MASK) as u32, data);
            return;
        }
        for (at, len) in device_pieces(gpa, data.len()) {
            let (gpa, piece) = (gpa + at as u64, &data[at..at + len]);
            if !self.ring_doorbell(gpa, piece) {
                self.exits().mmio_write(self.index, Gpa(gpa), piece);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_accesses_are_aligned_pieces() {
        let pieces = |gpa, len| device_pieces(gpa, len).collect::<Vec<_>>();
        assert_eq!(pieces(0x1000, 8), [(0, 8)]);
        assert_eq!(pieces(0x1004, 8), [(0, 4), (4, 4)]);
        assert_eq!(pieces(0x1001, 4), [(0, 1), (1, 2), (3, 1)]);
        assert_eq!(pieces(0x1008, 32), [(0, 8), (8, 8), (16, 8), (24, 8)]);
        assert_eq!(pieces(0x1000, 3), [(0, 2), (2, 1)]);
    }
}
