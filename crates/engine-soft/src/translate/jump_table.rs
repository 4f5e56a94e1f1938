//! The table through which translated code finds the targets of indirect and page-crossing jumps.
//!
//! Direct-mapped by low bits of RIP. There is one for each TLB set that code is fetched through, and it is
//! flushed with it: an entry says that RIP translates to the page that the block was made from, and that this privilege
//! level may execute it.

use super::lower::{INDEX_SHIFT, JUMP_SLOTS};
use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};

/// Bytes of the longest instruction.
const LONGEST: u64 = 15;

/// A slot, as translated code reads it.
#[repr(C)]
#[derive(Clone, Copy)]
struct Slot {
    /// The complement of RIP: so translated code compares without destroying flags.
    not_rip: u64,
    host: u64,
}

/// The table. Fresh zeroed memory is empty but for the last slot: the RIP whose complement is 0 belongs there.
pub struct JumpTable {
    slots: *mut Slot,
    local: Vec<u16>,
    global: Vec<u16>,
    /// Filter of the pages that have entries.
    pages: Box<[u64; PAGE_BITS / 64]>,
}

// SAFETY: owns its memory; used by one thread at a time.
unsafe impl Send for JumpTable {}

/// The slot of a target.
fn slot_of(rip: u64) -> u16 {
    (rip >> INDEX_SHIFT) as u16
}

/// What an empty slot holds: the complement of an address of another slot.
fn empty(slot: u16) -> u64 {
    if slot == u16::MAX { u64::MAX } else { 0 }
}

fn layout() -> Layout {
    Layout::array::<Slot>(JUMP_SLOTS).unwrap_or(Layout::new::<Slot>())
}

/// Bits of the filter: a kernel has some thousand pages with targets, and INVLPG of another page should not hit.
const PAGE_BITS: usize = 1 << 16;

/// Word and bit of a page in the filter.
fn page_bit(rip: u64) -> (usize, u64) {
    let hash = (rip >> 12).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 48;
    ((hash >> 6) as usize, 1 << (hash & 63))
}

impl JumpTable {
    /// An empty table.
    pub fn new() -> Self {
        // SAFETY: the layout is not empty.
        let slots = unsafe { alloc_zeroed(layout()) }.cast::<Slot>();
        if slots.is_null() {
            handle_alloc_error(layout());
        }
        // SAFETY: the last slot is inside.
        unsafe { (*slots.add(JUMP_SLOTS - 1)).not_rip = empty(u16::MAX) };
        Self { slots, local: Vec::new(), global: Vec::new(), pages: Box::new([0; PAGE_BITS / 64]) }
    }

    /// Address of slot 0.
    pub fn base(&self) -> u64 {
        self.slots as u64
    }

    /// Enters a target. A global one survives [`JumpTable::flush_local`].
    pub fn insert(&mut self, rip: u64, host: u64, global: bool) {
        let slot = slot_of(rip);
        // SAFETY: the table has a slot for each 16-bit number.
        unsafe { *self.slots.add(usize::from(slot)) = Slot { not_rip: !rip, host } };
        if global {
            self.global.push(slot);
        } else {
            self.local.push(slot);
        }
        let (word, bit) = page_bit(rip);
        self.pages[word] |= bit;
        if self.local.len() + self.global.len() > 4 * JUMP_SLOTS {
            self.flush_all();
        }
    }

    /// The host address for a RIP.
    pub fn get(&self, rip: u64) -> Option<u64> {
        // SAFETY: as in `insert`.
        let slot = unsafe { *self.slots.add(usize::from(slot_of(rip))) };
        (slot.not_rip == !rip).then_some(slot.host)
    }

    fn clear(&mut self, slot: u16) {
        // SAFETY: as in `insert`.
        unsafe { (*self.slots.add(usize::from(slot))).not_rip = empty(slot) };
    }

    /// Drops what was not entered as global. (A global entry whose slot was used by another one before may go too.)
    pub fn flush_local(&mut self) {
        for slot in std::mem::take(&mut self.local) {
            self.clear(slot);
        }
    }

    /// Drops everything.
    pub fn flush_all(&mut self) {
        if self.local.is_empty() && self.global.is_empty() {
            return;
        }
        self.flush_local();
        for slot in std::mem::take(&mut self.global) {
            self.clear(slot);
        }
        self.pages.fill(0);
    }

    /// Drops what lies in this address's page, or goes on there.
    pub fn invalidate(&mut self, la: u64) {
        // A page's targets have neighbouring slots.
        let first = la & !0xfff;
        let whole = if self.may_hold(first) { 0x1000 } else { 0 };
        let before = if self.may_hold(first.wrapping_sub(1)) { LONGEST - 1 } else { 0 };
        let mut rip = first.wrapping_sub(before);
        while rip != first.wrapping_add(whole) {
            if self.get(rip).is_some() {
                self.clear(slot_of(rip));
            }
            rip = rip.wrapping_add(1);
        }
    }

    fn may_hold(&self, rip: u64) -> bool {
        let (word, bit) = page_bit(rip);
        self.pages[word] & bit != 0
    }
}

impl Default for JumpTable {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for JumpTable {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout in `new`.
        unsafe { dealloc(self.slots.cast(), layout()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_what_was_entered_until_it_is_flushed() {
        let mut t = JumpTable::new();
        assert_eq!((t.get(0), t.get(1), t.get(0x10000)), (None, None, None));
        t.insert(0x7fff_1234_5678, 10, false);
        t.insert(0xffff_ffff_8100_0000, 11, true);
        assert_eq!(t.get(0x7fff_1234_5678), Some(10));
        assert_eq!(t.get(0x5678), None);
        t.flush_local();
        assert_eq!(t.get(0x7fff_1234_5678), None);
        assert_eq!(t.get(0xffff_ffff_8100_0000), Some(11));
        t.invalidate(0xffff_ffff_8100_0fff);
        assert_eq!(t.get(0xffff_ffff_8100_0000), None);
        assert_eq!(t.get(u64::MAX), None);
        t.insert(0, 12, false);
        t.insert(u64::MAX, 13, false);
        assert_eq!((t.get(0), t.get(u64::MAX)), (Some(12), Some(13)));
        t.flush_all();
        assert_eq!((t.get(0), t.get(u64::MAX)), (None, None));
    }
}
