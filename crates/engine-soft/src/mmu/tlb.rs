//! The software TLB: tables that turn a linear address into a host address without asking who accesses it.
//!
//! There is one [`TlbSet`] for each kind of access (supervisor, supervisor with EFLAGS.AC, user), so that a hit needs no
//! permission check. A set is direct-mapped by the linear page number. Hit test, the same in Rust and in translated
//! code: `la - tag <= 4096 - size`, unsigned; it refuses accesses that leave the page too. Host address: `la + addend`.
//!
//! An empty slot holds a tag that no address of that slot can hit: zero everywhere, except in slot 0, where page 0
//! would hit a zero tag (there it is [`EMPTY_SLOT0`]). So fresh zeroed memory is an empty set, and an idle VP's sets cost
//! nothing. Flushing costs as much as was filled: a log names the filled slots.

use crate::direct::mirror::Mirror;
use crate::translate::jump_table::JumpTable;
use std::alloc::{Layout, alloc_zeroed, handle_alloc_error};
use std::ops::{Index, IndexMut};
use x86::paging::PAGE_MASK;

/// Slots of a set.
pub const SLOTS: usize = 16384;
/// Tag of slot 0 when it is empty: page 1, which lives in slot 1.
const EMPTY_SLOT0: u64 = 0x1000;

/// One slot. Translated code reads the first three fields.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct TlbEntry {
    /// Linear page that may be read, or an impossible one.
    pub tag_r: u64,
    /// Linear page that may be written, or an impossible one. Only set when the page-table entry's D bit is, and the
    /// page holds no tracked code.
    pub tag_w: u64,
    /// Host address minus linear address.
    pub addend: u64,
    /// Physical page address, and in the low bits the flags below.
    info: u64,
}

/// The slot is in the log of non-global fills.
const LOGGED_LOCAL: u64 = 1;
/// The slot is in the log of global fills.
const LOGGED_GLOBAL: u64 = 2;
/// The entry is global.
const GLOBAL: u64 = 4;

/// Which slot holds a linear address.
#[inline(always)]
pub const fn slot_of(la: u64) -> usize {
    (la >> 12) as usize & (SLOTS - 1)
}

const fn empty_tag(slot: usize) -> u64 {
    if slot == 0 { EMPTY_SLOT0 } else { 0 }
}

/// Slots allocated as zeroed pages of their own, so that the host gives memory only for what is used.
struct Slots(Box<[TlbEntry; SLOTS]>);

impl Slots {
    fn new() -> Self {
        let layout = Layout::new::<[TlbEntry; SLOTS]>();
        // SAFETY: the layout is not empty; all-zero bytes are a valid array of integers; the allocation is made with
        // the layout that Box frees it with.
        let mut slots = unsafe {
            let p = alloc_zeroed(layout).cast::<[TlbEntry; SLOTS]>();
            if p.is_null() {
                handle_alloc_error(layout);
            }
            Box::from_raw(p)
        };
        slots[0].tag_r = EMPTY_SLOT0;
        slots[0].tag_w = EMPTY_SLOT0;
        Self(slots)
    }
}

impl Index<usize> for Slots {
    type Output = TlbEntry;
    #[inline(always)]
    fn index(&self, slot: usize) -> &TlbEntry {
        &self.0[slot]
    }
}
impl IndexMut<usize> for Slots {
    #[inline(always)]
    fn index_mut(&mut self, slot: usize) -> &mut TlbEntry {
        &mut self.0[slot]
    }
}

/// What a page walk found, as far as the TLB keeps it.
#[derive(Clone, Copy, Debug)]
pub struct Fill {
    /// Linear page.
    pub page: u64,
    /// Physical page.
    pub gpa: u64,
    /// Host address of the page.
    pub host: *mut u8,
    /// Set the write tag too.
    pub write: bool,
    /// Survives [`TlbSet::flush_local`].
    pub global: bool,
    /// log2 of the guest's page size.
    pub shift: u32,
}

/// Slots of the instruction side.
const CODE_SLOTS: usize = 1024;

#[derive(Clone, Copy, Default)]
struct CodeEntry {
    page: u64,
    gpa: u64,
    host: u64,
    /// The set's epoch (of its kind) at which the entry was made; 0: never.
    epoch: u64,
    global: bool,
}

/// A data-side table with its instruction side.
pub struct TlbSet {
    slots: Slots,
    local: Vec<u16>,
    global: Vec<u16>,
    /// Filters of the 4 MiB and 1 GiB regions that have entries from large pages.
    large: Regions,
    huge: Regions,
    code: Box<[CodeEntry]>,
    /// Instruction-side entries of other epochs are empty: epochs of local and of global entries.
    code_epochs: [u64; 2],
    /// Filters of the 4 MiB and 1 GiB regions that instructions were fetched from through large pages.
    code_large: Regions,
    code_huge: Regions,
    /// Where translated code finds jump targets; flushed with the instruction side.
    pub jumps: JumpTable,
    /// The same for 16- and 32-bit code.
    pub offset_jumps: Option<Box<OffsetJumps>>,
    /// What a process has mapped that executes this address space directly.
    pub mirror: Option<Box<Mirror>>,
}

/// A filter of region numbers: says of some that are not there that they may be, never the reverse. INVLPG of a user
/// page must not find every large page of the kernel in its way, so it is larger than the few hundred regions of a guest.
#[derive(Clone)]
struct Regions {
    bits: [u64; 64],
    any: bool,
}

impl Regions {
    const fn new() -> Self {
        Self { bits: [0; 64], any: false }
    }
    fn place(region: u64) -> (usize, u64) {
        let hash = region.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 52;
        ((hash >> 6) as usize, 1 << (hash & 63))
    }
    fn add(&mut self, region: u64) {
        let (word, bit) = Self::place(region);
        self.bits[word] |= bit;
        self.any = true;
    }
    fn may_have(&self, region: u64) -> bool {
        let (word, bit) = Self::place(region);
        self.bits[word] & bit != 0
    }
    fn clear(&mut self) {
        if self.any {
            *self = Self::new();
        }
    }
}

const LARGE_SHIFT: u32 = 22;
const HUGE_SHIFT: u32 = 30;

/// A jump table whose addresses are offsets in a code segment.
pub struct OffsetJumps {
    jumps: JumpTable,
    /// The mode that it was made for ([`crate::translate::cache::Key::mode`]).
    mode: u64,
    /// The segment begins at 0: offsets are linear addresses.
    linear: bool,
}

impl TlbSet {
    /// An empty set.
    pub fn new() -> Self {
        Self {
            slots: Slots::new(),
            local: Vec::new(),
            global: Vec::new(),
            large: Regions::new(),
            huge: Regions::new(),
            code: vec![CodeEntry::default(); CODE_SLOTS].into_boxed_slice(),
            code_epochs: [1; 2],
            code_large: Regions::new(),
            code_huge: Regions::new(),
            jumps: JumpTable::new(),
            offset_jumps: None,
            mirror: None,
        }
    }

    /// Address of the first slot, for [`super::TlbPointers`].
    pub fn base(&mut self) -> *mut TlbEntry {
        self.slots.0.as_mut_ptr()
    }

    /// The slot for an address.
    #[inline(always)]
    pub fn entry(&self, la: u64) -> &TlbEntry {
        &self.slots[slot_of(la)]
    }

    /// Enters a translation for reading (and writing).
    pub fn fill(&mut self, f: &Fill) {
        let slot = slot_of(f.page);
        let e = &mut self.slots[slot];
        let mut flags = e.info & (LOGGED_LOCAL | LOGGED_GLOBAL);
        if f.global {
            if flags & LOGGED_GLOBAL == 0 {
                flags |= LOGGED_GLOBAL;
                self.global.push(slot as u16);
            }
            flags |= GLOBAL;
        } else if flags & LOGGED_LOCAL == 0 {
            flags |= LOGGED_LOCAL;
            self.local.push(slot as u16);
        }
        *e = TlbEntry {
            tag_r: f.page,
            tag_w: if f.write { f.page } else { empty_tag(slot) },
            addend: (f.host as u64).wrapping_sub(f.page),
            info: f.gpa | flags,
        };
        if f.shift == HUGE_SHIFT {
            self.huge.add(f.page >> HUGE_SHIFT);
        } else if f.shift > 12 {
            self.large.add(f.page >> LARGE_SHIFT);
        }
    }

    fn clear(&mut self, slot: usize) {
        let e = &mut self.slots[slot];
        e.tag_r = empty_tag(slot);
        e.tag_w = empty_tag(slot);
    }

    /// Drops every entry that is not global.
    pub fn flush_local(&mut self) {
        for i in 0..self.local.len() {
            let slot = usize::from(self.local[i]);
            self.slots[slot].info &= !LOGGED_LOCAL;
            if self.slots[slot].info & GLOBAL == 0 {
                self.clear(slot);
            }
        }
        self.local.clear();
        self.code_epochs[0] += 1;
        self.jumps.flush_local();
        if let Some(mirror) = &mut self.mirror {
            mirror.clear();
        }
        if let Some(offset) = &mut self.offset_jumps {
            offset.jumps.flush_local();
        }
    }

    /// Drops every entry.
    pub fn flush_all(&mut self) {
        for log in [std::mem::take(&mut self.local), std::mem::take(&mut self.global)] {
            for &slot in &log {
                let slot = usize::from(slot);
                self.slots[slot].info = 0;
                self.clear(slot);
            }
        }
        self.large.clear();
        self.huge.clear();
        self.flush_code();
        self.flush_jumps();
        if let Some(mirror) = &mut self.mirror {
            mirror.clear();
        }
    }

    /// Empties the jump tables.
    pub fn flush_jumps(&mut self) {
        self.jumps.flush_all();
        if let Some(offset) = &mut self.offset_jumps {
            offset.jumps.flush_all();
        }
    }

    /// The jump table for a mode of 16- or 32-bit code. One mode's targets are another's garbage.
    pub fn offset_jumps(&mut self, mode: u64, linear: bool) -> &mut JumpTable {
        let offset = self
            .offset_jumps
            .get_or_insert_with(|| Box::new(OffsetJumps { jumps: JumpTable::of_offsets(), mode, linear }));
        if offset.mode != mode {
            offset.jumps.flush_all();
            (offset.mode, offset.linear) = (mode, linear);
        }
        &mut offset.jumps
    }

    /// Drops the instruction side.
    pub fn flush_code(&mut self) {
        self.code_epochs = self.code_epochs.map(|e| e + 1);
        self.code_large.clear();
        self.code_huge.clear();
    }

    /// Drops what may translate this address: its slot, and every slot that may belong to the same large page.
    pub fn invalidate(&mut self, la: u64) {
        let page = la & !PAGE_MASK;
        if let Some(mirror) = &mut self.mirror {
            mirror.invalidate(la);
        }
        if self.huge.may_have(la >> HUGE_SHIFT) {
            for slot in 0..SLOTS {
                if self.slots[slot].tag_r >> HUGE_SHIFT == la >> HUGE_SHIFT {
                    self.clear(slot);
                }
            }
        } else if self.large.may_have(la >> LARGE_SHIFT) {
            let first = slot_of(la) & !0x3ff;
            for slot in first..first + 0x400 {
                if self.slots[slot].tag_r >> LARGE_SHIFT == la >> LARGE_SHIFT {
                    self.clear(slot);
                }
            }
        }
        let slot = slot_of(la);
        if self.slots[slot].tag_r == page {
            self.clear(slot);
        }
        if self.code_large.may_have(la >> LARGE_SHIFT) || self.code_huge.may_have(la >> HUGE_SHIFT) {
            self.flush_code();
            self.flush_jumps();
        } else {
            self.jumps.invalidate(la);
            match &mut self.offset_jumps {
                Some(offset) if offset.linear => offset.jumps.invalidate(la),
                Some(offset) => offset.jumps.flush_all(),
                None => {}
            }
            let e = &mut self.code[(la >> 12) as usize & (CODE_SLOTS - 1)];
            if e.page == page {
                e.epoch = 0;
            }
        }
    }

    /// Drops write tags of one physical page (`Some`) or of all.
    pub fn drop_write(&mut self, gpa_page: Option<u64>) {
        if let Some(mirror) = &mut self.mirror {
            mirror.drop_write(gpa_page);
        }
        for log in [&self.local, &self.global] {
            for &slot in log {
                let slot = usize::from(slot);
                let e = &mut self.slots[slot];
                if gpa_page.is_none_or(|gpa| e.info & !PAGE_MASK == gpa) {
                    e.tag_w = empty_tag(slot);
                }
            }
        }
    }

    /// Looks the instruction side up: physical page and host address (null: not plain memory).
    #[inline]
    pub fn code_lookup(&self, page: u64) -> Option<(u64, *mut u8)> {
        let e = &self.code[(page >> 12) as usize & (CODE_SLOTS - 1)];
        (e.page == page && e.epoch == self.code_epochs[usize::from(e.global)]).then_some((e.gpa, e.host as *mut u8))
    }

    /// Is the page's entry on the instruction side that of a global page?
    pub fn code_is_global(&self, page: u64) -> bool {
        let e = &self.code[(page >> 12) as usize & (CODE_SLOTS - 1)];
        e.page == page && e.global && e.epoch == self.code_epochs[1]
    }

    /// Enters an instruction page.
    pub fn code_fill(&mut self, page: u64, gpa: u64, host: *mut u8, shift: u32, global: bool) {
        if shift == HUGE_SHIFT {
            self.code_huge.add(page >> HUGE_SHIFT);
        } else if shift > 12 {
            self.code_large.add(page >> LARGE_SHIFT);
        }
        self.code[(page >> 12) as usize & (CODE_SLOTS - 1)] =
            CodeEntry { page, gpa, host: host as u64, epoch: self.code_epochs[usize::from(global)], global };
    }
}

impl Default for TlbSet {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fill(page: u64, gpa: u64, write: bool, global: bool, shift: u32) -> Fill {
        Fill { page, gpa, host: 0x7000_0000_0000 as *mut u8, write, global, shift }
    }
    fn hits_r(set: &TlbSet, la: u64, size: u64) -> bool {
        la.wrapping_sub(set.entry(la).tag_r) <= 4096 - size
    }
    fn hits_w(set: &TlbSet, la: u64, size: u64) -> bool {
        la.wrapping_sub(set.entry(la).tag_w) <= 4096 - size
    }

    #[test]
    fn an_empty_set_hits_nothing() {
        let set = TlbSet::new();
        for slot in 0..SLOTS as u64 {
            for la in [slot << 12, (slot << 12) + 0xfff, 0xffff_ffff_fc00_0000 + (slot << 12)] {
                assert!(!hits_r(&set, la, 1) && !hits_w(&set, la, 1), "{la:#x}");
            }
        }
    }

    #[test]
    fn hits_inside_the_page_only() {
        let mut set = TlbSet::new();
        for page in [0u64, 0x5000, 0xffff_ffff_ffff_f000] {
            set.fill(&fill(page, 0x1000, false, false, 12));
            assert!(hits_r(&set, page, 8) && hits_r(&set, page + 0xff8, 8));
            assert!(!hits_r(&set, page + 0xff9, 8), "crosses");
            assert!(!hits_w(&set, page, 1), "read only");
            assert!(!hits_r(&set, page.wrapping_add((SLOTS as u64) << 12), 1), "other page of the slot");
            set.invalidate(page + 5);
            assert!(!hits_r(&set, page, 1));
        }
    }

    #[test]
    fn global_entries_survive_a_local_flush_whatever_was_there_before() {
        let mut set = TlbSet::new();
        set.fill(&fill(0x4000, 0, true, false, 12));
        set.fill(&fill(0x4000, 0, true, true, 12));
        set.fill(&fill(0x6000, 0, true, true, 12));
        set.fill(&fill(0x6000, 0, true, false, 12));
        set.flush_local();
        assert!(hits_w(&set, 0x4000, 1));
        assert!(!hits_w(&set, 0x6000, 1));
        set.fill(&fill(0x6000, 0, true, false, 12));
        set.flush_local();
        assert!(!hits_w(&set, 0x6000, 1), "logged again after the flush");
        set.flush_all();
        assert!(!hits_w(&set, 0x4000, 1));
    }

    #[test]
    fn large_pages_are_invalidated_as_a_whole() {
        let mut set = TlbSet::new();
        for page in [0x40_0000u64, 0x40_3000, 0x5f_f000] {
            set.fill(&fill(page, page, true, true, 21));
        }
        set.fill(&fill(0x123_4000, 0, true, true, 12));
        set.invalidate(0x48_8888);
        for page in [0x40_0000u64, 0x40_3000, 0x5f_f000] {
            assert!(!hits_r(&set, page, 1), "{page:#x}");
        }
        assert!(hits_r(&set, 0x123_4000, 1));
        set.fill(&fill(1 << 30, 0, true, true, 30));
        set.invalidate((1 << 30) + 0x1234_5678);
        assert!(!hits_r(&set, 1 << 30, 1));
    }

    #[test]
    fn write_permissions_go_by_physical_page() {
        let mut set = TlbSet::new();
        set.fill(&fill(0x1000, 0xa000, true, false, 12));
        set.fill(&fill(0x2000, 0xa000, true, true, 12));
        set.fill(&fill(0x3000, 0xb000, true, true, 12));
        set.drop_write(Some(0xa000));
        assert!(!hits_w(&set, 0x1000, 1) && !hits_w(&set, 0x2000, 1) && hits_w(&set, 0x3000, 1));
        assert!(hits_r(&set, 0x1000, 1));
        set.drop_write(None);
        assert!(!hits_w(&set, 0x3000, 1));
    }

    #[test]
    fn instruction_side() {
        let mut set = TlbSet::new();
        assert!(set.code_lookup(0).is_none());
        set.code_fill(0x1000, 0x9000, std::ptr::null_mut(), 12, false);
        set.code_fill(0x2000, 0xa000, std::ptr::null_mut(), 12, true);
        set.flush_local();
        assert!(set.code_lookup(0x1000).is_none() && set.code_lookup(0x2000).is_some());
        set.flush_all();
        assert!(set.code_lookup(0x2000).is_none());
        set.code_fill(0x1000, 0x9000, std::ptr::null_mut(), 12, false);
        assert_eq!(set.code_lookup(0x1000).map(|c| c.0), Some(0x9000));
        set.invalidate(0x1008);
        assert!(set.code_lookup(0x1000).is_none());
        set.code_fill(0x1000, 0x9000, std::ptr::null_mut(), 21, true);
        set.invalidate(0x5000);
        assert!(set.code_lookup(0x1000).is_none());
    }
}
