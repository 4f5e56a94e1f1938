//! Linear accesses: the fast path over the TLB, the slow path over the page walk.

use super::phys::{PhysPage, copy_from_guest, copy_to_guest};
use super::tlb::{Fill, TlbEntry, slot_of};
use super::walk::Intent;
use super::{AC0, Class, RmwTarget, crosses};
use crate::translate::memory::Filled;
use crate::vp::{Exec, SoftVp};
use partition::memory::page_flags;
use std::sync::atomic::Ordering;
use x86::paging::{PAGE_MASK, PAGE_SIZE};
use x86::regs::efer;

/// Lets a load or store of guest memory be one host instruction whatever the alignment.
#[repr(C, packed)]
#[derive(Clone, Copy)]
struct Unaligned<T>(T);

/// Where a translated access goes.
#[derive(Clone, Copy)]
struct Target {
    gpa: u64,
    /// Mapped memory; `None`: local APIC or machine.
    page: Option<PhysPage>,
}

/// Integers that the guest reads and writes in one access.
pub trait Cell: Copy {
    /// From the low bytes of a little-endian value.
    fn from_u64(value: u64) -> Self;
    /// Zero-extended.
    fn to_u64(self) -> u64;
}
macro_rules! cell {
    ($($t:ty),*) => {$(
        impl Cell for $t {
            #[inline(always)]
            fn from_u64(value: u64) -> Self { value as $t }
            #[inline(always)]
            fn to_u64(self) -> u64 { u64::from(self) }
        }
    )*};
}
cell!(u8, u16, u32, u64);

macro_rules! accessors {
    ($($t:ty, $read:ident, $write:ident, $read_sys:ident, $write_sys:ident;)*) => {$(
        /// Reads at the current privilege.
        #[inline(always)]
        pub fn $read(&mut self, la: u64) -> Exec<$t> {
            self.read_cell::<$t>(la)
        }
        /// Writes at the current privilege.
        #[inline(always)]
        pub fn $write(&mut self, la: u64, value: $t) -> Exec {
            self.write_cell::<$t>(la, value)
        }
        /// Reads as an implicit supervisor access.
        pub fn $read_sys(&mut self, la: u64) -> Exec<$t> {
            let slots = self.s.tlb.system;
            self.read_in(slots, la, Class::Supervisor)
        }
        /// Writes as an implicit supervisor access.
        pub fn $write_sys(&mut self, la: u64, value: $t) -> Exec {
            let slots = self.s.tlb.system;
            self.write_in(slots, la, value, Class::Supervisor)
        }
    )*};
}

impl SoftVp {
    accessors! {
        u8, read_u8, write_u8, read_sys_u8, write_sys_u8;
        u16, read_u16, write_u16, read_sys_u16, write_sys_u16;
        u32, read_u32, write_u32, read_sys_u32, write_sys_u32;
        u64, read_u64, write_u64, read_sys_u64, write_sys_u64;
    }

    /// The slot of an address in the set that `slots` starts.
    #[inline(always)]
    fn slot(slots: *mut TlbEntry, la: u64) -> *const TlbEntry {
        slots.wrapping_add(slot_of(la))
    }

    #[inline(always)]
    fn read_cell<T: Cell>(&mut self, la: u64) -> Exec<T> {
        let e = Self::slot(self.s.tlb.data, la);
        // SAFETY: `tlb.data` points to a set of `SLOTS` entries owned by `self.mmu` (`select_tlb`). On a hit the whole
        // access lies in a page of live guest memory.
        unsafe {
            if la.wrapping_sub((*e).tag_r) <= PAGE_SIZE - size_of::<T>() as u64 {
                let host = la.wrapping_add((*e).addend) as *const Unaligned<T>;
                return Ok(host.read_volatile().0);
            }
        }
        self.read_slow(la, size_of::<T>(), None).map(T::from_u64)
    }

    #[inline(always)]
    fn write_cell<T: Cell>(&mut self, la: u64, value: T) -> Exec {
        let e = Self::slot(self.s.tlb.data, la);
        // SAFETY: as in `read_cell`; a write tag is only set for RAM that may be written without further ado.
        unsafe {
            if la.wrapping_sub((*e).tag_w) <= PAGE_SIZE - size_of::<T>() as u64 {
                let host = la.wrapping_add((*e).addend) as *mut Unaligned<T>;
                host.write_volatile(Unaligned(value));
                return Ok(());
            }
        }
        self.write_slow(la, value.to_u64(), size_of::<T>(), None)
    }

    fn read_in<T: Cell>(&mut self, slots: *mut TlbEntry, la: u64, class: Class) -> Exec<T> {
        let e = Self::slot(slots, la);
        // SAFETY: as in `read_cell`.
        unsafe {
            if la.wrapping_sub((*e).tag_r) <= PAGE_SIZE - size_of::<T>() as u64 {
                let host = la.wrapping_add((*e).addend) as *const Unaligned<T>;
                return Ok(host.read_volatile().0);
            }
        }
        self.read_slow(la, size_of::<T>(), Some(class)).map(T::from_u64)
    }

    fn write_in<T: Cell>(&mut self, slots: *mut TlbEntry, la: u64, value: T, class: Class) -> Exec {
        let e = Self::slot(slots, la);
        // SAFETY: as in `write_cell`.
        unsafe {
            if la.wrapping_sub((*e).tag_w) <= PAGE_SIZE - size_of::<T>() as u64 {
                let host = la.wrapping_add((*e).addend) as *mut Unaligned<T>;
                host.write_volatile(Unaligned(value));
                return Ok(());
            }
        }
        self.write_slow(la, value.to_u64(), size_of::<T>(), Some(class))
    }

    /// A read that missed. `class`: an implicit access of that class; `None`: an explicit access.
    #[cold]
    #[inline(never)]
    pub(crate) fn read_slow(&mut self, la: u64, size: usize, class: Option<Class>) -> Exec<u64> {
        let mut bytes = [0u8; 8];
        self.read_bytes_as(la, &mut bytes[..size], class)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// A write that missed.
    #[cold]
    #[inline(never)]
    pub(crate) fn write_slow(&mut self, la: u64, value: u64, size: usize, class: Option<Class>) -> Exec {
        self.write_bytes_as(la, &value.to_le_bytes()[..size], class)
    }

    /// Reads up to 4096 bytes at the current privilege. Every page is checked before the first byte moves.
    pub fn read_bytes(&mut self, la: u64, data: &mut [u8]) -> Exec {
        self.read_bytes_as(la, data, None)
    }

    /// Writes up to 4096 bytes at the current privilege. Every page is checked before the first byte moves.
    pub fn write_bytes(&mut self, la: u64, data: &[u8]) -> Exec {
        self.write_bytes_as(la, data, None)
    }

    /// Reads up to 4096 bytes as an implicit supervisor access.
    pub fn read_sys_bytes(&mut self, la: u64, data: &mut [u8]) -> Exec {
        self.read_bytes_as(la, data, Some(Class::Supervisor))
    }

    /// Writes up to 4096 bytes as an implicit supervisor access.
    pub fn write_sys_bytes(&mut self, la: u64, data: &[u8]) -> Exec {
        self.write_bytes_as(la, data, Some(Class::Supervisor))
    }

    fn read_bytes_as(&mut self, la: u64, data: &mut [u8], class: Option<Class>) -> Exec {
        let (first, rest) = self.translate_range(la, data.len(), Intent::Read, class)?;
        let (head, tail) = data.split_at_mut(first.1);
        self.target_read(first.0, head);
        if let Some(second) = rest {
            self.target_read(second, tail);
        }
        Ok(())
    }

    fn write_bytes_as(&mut self, la: u64, data: &[u8], class: Option<Class>) -> Exec {
        let (first, rest) = self.translate_range(la, data.len(), Intent::Write, class)?;
        let (head, tail) = data.split_at(first.1);
        self.target_write(first.0, head);
        if let Some(second) = rest {
            self.target_write(second, tail);
        }
        Ok(())
    }

    /// Would a read succeed?
    pub fn probe_read(&mut self, la: u64, len: usize) -> Exec {
        self.translate_range(la, len, Intent::Read, None).map(drop)
    }

    /// Would a write succeed?
    pub fn probe_write(&mut self, la: u64, len: usize) -> Exec {
        self.translate_range(la, len, Intent::Write, None).map(drop)
    }

    /// As [`SoftVp::probe_write`], for an implicit supervisor access.
    pub fn probe_sys_write(&mut self, la: u64, len: usize) -> Exec {
        self.translate_range(la, len, Intent::Write, Some(Class::Supervisor)).map(drop)
    }

    /// Makes the TLB set in use hit for an access of `len` bytes, or finds another way for translated code, if it can without more
    /// than setting A bits. `copy`: a copy of the operand will do. `certain`: the access follows at once, so D bits may be set too.
    pub(crate) fn fill_for(&mut self, la: u64, len: u16, write: bool, copy: bool, certain: bool) -> Filled {
        if self.alignment_checked() {
            return Filled::No;
        }
        let len = usize::from(len);
        let class = self.access_class();
        let intent = if write && certain { Intent::Write } else { Intent::Read };
        if !crosses(la, len) {
            return if self.addend_of(la, len, write, intent, class).is_some() { Filled::Hit } else { Filled::No };
        }
        let head = (PAGE_SIZE - (la & PAGE_MASK)) as usize;
        let next = self.wrap_linear((la & !PAGE_MASK).wrapping_add(PAGE_SIZE));
        let Some(first) = self.addend_of(la, head, write, Intent::Read, class) else { return Filled::No };
        let Some(second) = self.addend_of(next, len - head, write, Intent::Read, class) else { return Filled::No };
        if first == second {
            self.s.jit.addend = first;
            return Filled::Addend;
        }
        let at = (la & 63) as usize;
        if !copy || at + len > self.s.jit.copy.0.len() {
            return Filled::No;
        }
        let mut bytes = [0u8; 64];
        let Some(operand) = bytes.get_mut(..len) else { return Filled::No };
        let (low, high) = operand.split_at_mut(head);
        // SAFETY: both pages are in the TLB: live guest memory; neither piece leaves its page.
        unsafe {
            copy_from_guest(la.wrapping_add(first) as *const u8, low);
            copy_from_guest(next.wrapping_add(second) as *const u8, high);
        }
        let copy = &mut self.s.jit.copy.0;
        copy[at..at + len].copy_from_slice(operand);
        self.s.jit.addend = (copy.as_ptr() as u64).wrapping_add(at as u64).wrapping_sub(la);
        self.s.jit.copied = [la, len as u64];
        if write { Filled::Copy } else { Filled::Addend }
    }

    /// The addend for an access inside a page, in the TLB set in use; fills it if need be.
    fn addend_of(&mut self, la: u64, len: usize, write: bool, intent: Intent, class: Class) -> Option<u64> {
        for filled in [false, true] {
            let entry = self.mmu.set(class).entry(la);
            let tag = if write { entry.tag_w } else { entry.tag_r };
            if la.wrapping_sub(tag) <= PAGE_SIZE - len as u64 {
                return Some(entry.addend);
            }
            if filled || self.translate(la, intent, class).is_err() {
                break;
            }
        }
        None
    }

    /// Writes the copy back that [`SoftVp::fill_for`] has made.
    pub(crate) fn put_back(&mut self) {
        let [la, len] = self.s.jit.copied;
        let at = (la & 63) as usize;
        let copy = self.s.jit.copy.0;
        let Some(bytes) = copy.get(at..at + len as usize) else { return };
        let head = (PAGE_SIZE - (la & PAGE_MASK)) as usize;
        let next = self.wrap_linear((la & !PAGE_MASK).wrapping_add(PAGE_SIZE));
        let class = self.access_class();
        let first = self.addend_of(la, head, true, Intent::Read, class);
        let second = self.addend_of(next, bytes.len() - head, true, Intent::Read, class);
        // Both pages were found writable, and nothing has happened since.
        debug_assert!(first.is_some() && second.is_some());
        if let (Some(first), Some(second)) = (first, second) {
            // SAFETY: as in `fill_for`, for writing.
            unsafe {
                copy_to_guest(la.wrapping_add(first) as *mut u8, &bytes[..head]);
                copy_to_guest(next.wrapping_add(second) as *mut u8, &bytes[head..]);
            }
        }
    }

    /// Translates every page of a range (at most two): the first target with its length, and the second.
    fn translate_range(
        &mut self,
        la: u64,
        len: usize,
        intent: Intent,
        class: Option<Class>,
    ) -> Exec<((Target, usize), Option<Target>)> {
        debug_assert!(len <= PAGE_SIZE as usize);
        let aligned = !matches!(len, 2 | 4 | 8) || la & (len as u64 - 1) == 0;
        if class.is_none() && !aligned && self.alignment_checked() {
            return Err(AC0);
        }
        let who = class.unwrap_or_else(|| self.access_class());
        let first = self.translate(la, intent, who)?;
        let mut head = len;
        let mut rest = None;
        if crosses(la, len) {
            head = (PAGE_SIZE - (la & PAGE_MASK)) as usize;
            let next = self.wrap_linear((la & !PAGE_MASK).wrapping_add(PAGE_SIZE));
            rest = Some(self.translate(next, intent, who)?);
        }
        if class.is_none() {
            self.check_watchpoints(la, len, intent == Intent::Write);
        }
        Ok(((first, head), rest))
    }

    /// Linear addresses have 32 bits outside long mode.
    #[inline]
    pub(crate) fn wrap_linear(&self, la: u64) -> u64 {
        if self.s.efer & efer::LMA == 0 { la & 0xffff_ffff } else { la }
    }

    /// Walks the page tables for a data access and enters the result where it may be used again.
    fn translate(&mut self, la: u64, intent: Intent, class: Class) -> Exec<Target> {
        self.mmu.walks += 1;
        let walked = self.walk(la, intent, class)?;
        let page = self.phys_page(walked.gpa);
        // Not by an execution that will be taken back: it may have written the page tables.
        if let Some(page) = page.filter(|_| !self.is_watched(la) && self.mmu.dry.is_none()) {
            let fill = Fill {
                page: la & !PAGE_MASK,
                gpa: walked.gpa & !PAGE_MASK,
                host: page.host,
                write: walked.write && self.may_cache_write(&page),
                global: walked.global,
                shift: walked.shift,
            };
            self.mmu.set(class).fill(&fill);
        }
        Ok(Target { gpa: walked.gpa, page })
    }

    fn target_read(&mut self, target: Target, data: &mut [u8]) {
        match target.page {
            // SAFETY: the page is mapped, and the caller has split the range at the page's end.
            Some(page) => unsafe {
                copy_from_guest(page.host.wrapping_add((target.gpa & PAGE_MASK) as usize), data);
            },
            None => self.device_read(target.gpa, data),
        }
    }

    fn target_write(&mut self, target: Target, data: &[u8]) {
        match target.page {
            Some(page) if page.writable => {
                if !self.dry_write(&page, target.gpa, data.len()) {
                    return;
                }
                // SAFETY: as in `target_read`.
                unsafe { copy_to_guest(page.host.wrapping_add((target.gpa & PAGE_MASK) as usize), data) };
                self.ram_written(&page, target.gpa, data.len());
            }
            _ => self.device_write(target.gpa, data),
        }
    }

    /// Before a write to RAM: may it be made? Not if it would have to be taken back and cannot be.
    fn dry_write(&mut self, page: &PhysPage, gpa: u64, len: usize) -> bool {
        let Some(log) = &mut self.mmu.dry else { return true };
        if page.flags().load(Ordering::SeqCst) & page_flags::CODE != 0 {
            log.stopped = true;
            return false;
        }
        // SAFETY: the page is mapped, and the write ends inside it.
        unsafe { log.keep(page.host.wrapping_add((gpa & PAGE_MASK) as usize), len) };
        true
    }

    /// How to read, modify and write `size` bytes. The write permission is checked here.
    #[inline]
    pub fn rmw_target(&mut self, la: u64, size: usize) -> Exec<RmwTarget> {
        let e = Self::slot(self.s.tlb.data, la);
        // SAFETY: as in `read_cell`.
        unsafe {
            if la.wrapping_sub((*e).tag_w) <= PAGE_SIZE - size as u64 {
                return Ok(RmwTarget::Host(la.wrapping_add((*e).addend) as *mut u8));
            }
        }
        self.rmw_target_slow(la, size)
    }

    #[cold]
    fn rmw_target_slow(&mut self, la: u64, size: usize) -> Exec<RmwTarget> {
        let ((target, _), rest) = self.translate_range(la, size, Intent::Write, None)?;
        Ok(match self.plain(la, target, true) {
            Some(host) if rest.is_none() => {
                if let Some(log) = &mut self.mmu.dry {
                    // SAFETY: the operand lies in one page of guest memory.
                    unsafe { log.keep(host, size) };
                }
                RmwTarget::Host(host)
            }
            _ => RmwTarget::Slow,
        })
    }

    /// The host address of a translated access, if it may be done there directly.
    fn plain(&self, la: u64, target: Target, write: bool) -> Option<*mut u8> {
        let page = target.page.filter(|p| !write || self.may_cache_write(p))?;
        (!self.is_watched(la)).then(|| page.host.wrapping_add((target.gpa & PAGE_MASK) as usize))
    }

    /// The plain RAM from `la` to the end of its page, at most `max` bytes: `None` for a device, a page with tracked code
    /// (on a write), ROM (on a write) or an armed data breakpoint.
    #[inline]
    pub fn host_run(&mut self, la: u64, write: bool, max: usize) -> Exec<Option<(*mut u8, usize)>> {
        let len = max.min((PAGE_SIZE - (la & PAGE_MASK)) as usize);
        let e = Self::slot(self.s.tlb.data, la);
        // SAFETY: as in `read_cell`.
        let (tag, addend) = unsafe { (if write { (*e).tag_w } else { (*e).tag_r }, (*e).addend) };
        if la.wrapping_sub(tag) < PAGE_SIZE {
            return Ok(Some((la.wrapping_add(addend) as *mut u8, len)));
        }
        if self.alignment_checked() || self.mmu.dry.is_some() {
            // Element by element, so that each is checked (or can be taken back).
            return Ok(None);
        }
        let intent = if write { Intent::Write } else { Intent::Read };
        let class = self.access_class();
        let target = self.translate(la, intent, class)?;
        Ok(self.plain(la, target, write).map(|host| (host, len)))
    }
}
