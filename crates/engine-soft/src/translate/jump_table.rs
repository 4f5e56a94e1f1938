//! The tables through which translated code finds the targets of indirect and page-crossing jumps.
//!
//! The *slots* are direct-mapped by low bits of RIP. The *links* have one slot for each direct jump to another page, by its number:
//! no two jumps share one, and those of neighbouring code lie side by side. There is a pair of tables for each TLB set that code is
//! fetched through, and they are flushed with it: an entry says that RIP translates to the page that the block was made
//! from, and that this privilege level may execute it.

use super::lower::{INDEX_SHIFT, JUMP_SLOTS, LINKS};
use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;

/// Bytes of the longest instruction.
const LONGEST: u64 = 15;

/// A slot, as translated code reads it.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Slot {
    /// The complement of RIP (so translated code compares without destroying flags), or what [`mark`] makes of it.
    mark: u64,
    host: u64,
}

/// Added to the comparison with a link of 64-bit code. It is not a multiple of the page's size, and larger than whatever wants
/// attention: so an empty link is that of no jump, even if the bits that want attention are added.
pub const LINK_BIAS: u64 = 0x800;

/// What a link of 64-bit code to `rip` holds. A link is for one offset in the page: the page says it all.
fn mark(rip: u64) -> u64 {
    LINK_BIAS.wrapping_sub(rip & !0xfff)
}

/// Slots in memory of their own: fresh zeros, which cost nothing until they are written.
struct Slots {
    first: NonNull<Slot>,
    len: usize,
}

// SAFETY: owns its memory.
unsafe impl Send for Slots {}

impl Slots {
    fn new(len: usize) -> Self {
        let layout = Self::layout(len);
        // SAFETY: the layout is not empty.
        let first = NonNull::new(unsafe { alloc_zeroed(layout) }.cast::<Slot>());
        Self { first: first.unwrap_or_else(|| handle_alloc_error(layout)), len }
    }

    fn layout(len: usize) -> Layout {
        Layout::array::<Slot>(len).unwrap_or(Layout::new::<Slot>())
    }

    fn get(&self, n: usize) -> Slot {
        assert!(n < self.len);
        // SAFETY: inside the allocation; zeros are a valid slot.
        unsafe { *self.first.as_ptr().add(n) }
    }

    fn set(&mut self, n: usize, slot: Slot) {
        assert!(n < self.len);
        // SAFETY: inside the allocation.
        unsafe { *self.first.as_ptr().add(n) = slot }
    }
}

impl Drop for Slots {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout in `new`.
        unsafe { dealloc(self.first.as_ptr().cast(), Self::layout(self.len)) };
    }
}

/// What was entered, for flushing in proportion to it.
#[derive(Clone, Copy)]
enum Entered {
    Slot(u16),
    Link(u32),
}

/// The tables. Fresh zeroed memory is empty but for the last slot: the RIP whose complement is 0 belongs there. (Jumps to such
/// a RIP have no link outside 64-bit mode.)
pub struct JumpTable {
    slots: Slots,
    links: Slots,
    /// The links are of 16- and 32-bit code: they hold the complement of RIP, which there is not of one offset in its page.
    exact: bool,
    local: Vec<Entered>,
    global: Vec<Entered>,
    /// The links that are entered and where they lead, by their target's page.
    by_page: Vec<Vec<(u32, u64)>>,
    /// Filter of the pages that have entries.
    pages: Box<[u64; PAGE_BITS / 64]>,
}

/// The slot of a target.
fn slot_of(rip: u64) -> u16 {
    (rip >> INDEX_SHIFT) as u16
}

/// What an empty slot holds: the complement of an address of another slot.
fn empty(slot: u16) -> u64 {
    if slot == u16::MAX { u64::MAX } else { 0 }
}

/// Bits of the filter: a kernel has some thousand pages with targets, and INVLPG of another page should not hit.
const PAGE_BITS: usize = 1 << 16;

/// Word and bit of a page in the filter.
fn page_bit(rip: u64) -> (usize, u64) {
    let hash = (rip >> 12).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 48;
    ((hash >> 6) as usize, 1 << (hash & 63))
}

/// Lists of [`JumpTable::by_page`].
const PAGE_LISTS: usize = 1 << 10;

/// Which of them a page's links are in.
fn list_of(rip: u64) -> usize {
    page_bit(rip).0 & (PAGE_LISTS - 1)
}

impl JumpTable {
    /// Empty tables for 64-bit code.
    pub fn new() -> Self {
        Self::with(false)
    }

    /// Empty tables for 16- and 32-bit code.
    pub fn of_offsets() -> Self {
        Self::with(true)
    }

    fn with(exact: bool) -> Self {
        let mut table = Self {
            slots: Slots::new(JUMP_SLOTS),
            links: Slots::new(LINKS),
            exact,
            local: Vec::new(),
            global: Vec::new(),
            by_page: Vec::new(),
            pages: Box::new([0; PAGE_BITS / 64]),
        };
        table.clear(u16::MAX);
        table
    }

    /// Address of slot 0.
    pub fn slots(&self) -> u64 {
        self.slots.first.as_ptr() as u64
    }

    /// Address of link 0.
    pub fn links(&self) -> u64 {
        self.links.first.as_ptr() as u64
    }

    /// Enters a target. A global one survives [`JumpTable::flush_local`].
    pub fn insert(&mut self, rip: u64, host: u64, global: bool) {
        let slot = slot_of(rip);
        self.slots.set(usize::from(slot), Slot { mark: !rip, host });
        self.enter(Entered::Slot(slot), rip, global);
    }

    /// Enters the target of a direct jump, by the number of its link.
    pub fn link(&mut self, link: u32, rip: u64, host: u64, global: bool) {
        let mark = if self.exact { !rip } else { mark(rip) };
        // A link that compares equal while it is empty must not be: see the type.
        if link as usize >= LINKS || mark == 0 {
            return;
        }
        self.by_page.resize_with(PAGE_LISTS, Vec::new);
        self.unlink(link);
        self.links.set(link as usize, Slot { mark, host });
        self.by_page[list_of(rip)].push((link, rip));
        self.enter(Entered::Link(link), rip, global);
    }

    fn enter(&mut self, what: Entered, rip: u64, global: bool) {
        if global {
            self.global.push(what)
        } else {
            self.local.push(what)
        }
        let (word, bit) = page_bit(rip);
        self.pages[word] |= bit;
        if self.local.len() + self.global.len() > 4 * JUMP_SLOTS {
            self.flush_all();
        }
    }

    /// The host address for a RIP.
    pub fn get(&self, rip: u64) -> Option<u64> {
        let slot = self.slots.get(usize::from(slot_of(rip)));
        (slot.mark == !rip).then_some(slot.host)
    }

    fn clear(&mut self, slot: u16) {
        self.slots.set(usize::from(slot), Slot { mark: empty(slot), host: 0 });
    }

    fn remove(&mut self, what: Entered) {
        match what {
            Entered::Slot(slot) => self.clear(slot),
            Entered::Link(link) => self.unlink(link),
        }
    }

    /// Empties a link, and takes it from its page's list.
    fn unlink(&mut self, link: u32) {
        let slot = self.links.get(link as usize);
        if slot.host != 0 {
            self.links.set(link as usize, Slot::default());
            let page = if self.exact { !slot.mark } else { LINK_BIAS.wrapping_sub(slot.mark) };
            let list = &mut self.by_page[list_of(page)];
            if let Some(at) = list.iter().position(|l| l.0 == link) {
                list.swap_remove(at);
            }
        }
    }

    /// Drops what was not entered as global. (A global entry whose slot was used by another one before may go too.)
    pub fn flush_local(&mut self) {
        for what in std::mem::take(&mut self.local) {
            self.remove(what);
        }
    }

    /// Drops everything.
    pub fn flush_all(&mut self) {
        if self.local.is_empty() && self.global.is_empty() {
            return;
        }
        for what in std::mem::take(&mut self.global) {
            self.remove(what);
        }
        self.flush_local();
        self.pages.fill(0);
    }

    /// Drops what lies in this address's page, or goes on there.
    pub fn invalidate(&mut self, la: u64) {
        // A page's targets have neighbouring slots.
        let first = la & !0xfff;
        let (whole, before) = (self.may_hold(first), self.may_hold(first.wrapping_sub(1)));
        let from = first.wrapping_sub(if before { LONGEST - 1 } else { 0 });
        let to = first.wrapping_add(if whole { 0x1000 } else { 0 });
        let mut rip = from;
        while rip != to {
            if self.get(rip).is_some() {
                self.clear(slot_of(rip));
            }
            rip = rip.wrapping_add(1);
        }
        if from == to || self.by_page.is_empty() {
            return;
        }
        for list in [list_of(first), list_of(first.wrapping_sub(1))] {
            let goes = |(_, rip): &(u32, u64)| rip.wrapping_sub(from) < to.wrapping_sub(from);
            let going: Vec<_> = self.by_page[list].iter().copied().filter(goes).collect();
            for (link, _) in going {
                self.unlink(link);
            }
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

    #[test]
    fn a_link_holds_until_its_page_is_invalidated() {
        for t in [JumpTable::new(), JumpTable::of_offsets()] {
            check_links(t);
        }
    }

    fn check_links(mut t: JumpTable) {
        let get = |t: &JumpTable, link: usize| {
            let slot = t.links.get(link);
            let entry = t.by_page.iter().flatten().find(|l| l.0 == link as u32);
            assert_eq!(entry.is_some(), slot.host != 0, "lists and links agree");
            entry.map(|(_, rip)| (*rip, slot.host))
        };
        t.link(3, 0x7fff_1234_5678, 10, false);
        t.link(4, 0xffff_ffff_8100_0ff8, 11, true);
        t.link(5, 0xffff_ffff_8100_1000, 12, true);
        t.link(6, u64::MAX, 13, false);
        t.link(LINKS as u32, 1, 14, false);
        assert_eq!(get(&t, 3), Some((0x7fff_1234_5678, 10)));
        // Outside 64-bit mode, where there is no such RIP, its link would look empty.
        assert_eq!(get(&t, 6), (!t.exact).then_some((u64::MAX, 13)));
        // What begins 8 bytes before a page may go on there.
        t.invalidate(0xffff_ffff_8100_1abc);
        assert_eq!((get(&t, 4), get(&t, 5)), (None, None));
        t.link(5, 0xffff_ffff_8100_1000, 15, true);
        t.flush_local();
        assert_eq!((get(&t, 3), get(&t, 5)), (None, Some((0xffff_ffff_8100_1000, 15))));
        // A link is in one list only, however often it is entered again.
        for n in 0..100 {
            t.link(3, 0x7fff_1234_5678 + 0x1000 * (n % 3), 10, false);
            if n % 2 == 0 {
                t.flush_local();
            }
        }
        assert_eq!(t.by_page.iter().map(Vec::len).sum::<usize>(), 2);
        t.flush_all();
        assert_eq!(get(&t, 5), None);
        assert!(t.by_page.iter().all(Vec::is_empty));
    }
}
