//! What a process that executes an address space directly has mapped, and what must change before it goes on.
//!
//! A mirror is a TLB: it holds translations that the guest's page tables gave once, and loses them when the guest flushes
//! them. It belongs to the [`crate::mmu::tlb::TlbSet`] of the address space, which passes every flush on. Changes are
//! collected and made before the process executes again.

use std::collections::HashMap;
use x86::paging::PAGE_SIZE;

/// What guest code may do with a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rights {
    /// Read.
    Read,
    /// Read and write.
    Write,
    /// Read and execute. Never together with writing: what is written is not what was looked through.
    Execute,
}

/// A change of what is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// These pages (linear address, bytes) are guest memory from this physical address on.
    Map {
        /// Linear address.
        at: u64,
        /// Bytes.
        len: u64,
        /// Guest physical address.
        gpa: u64,
        /// What may be done with them.
        rights: Rights,
    },
    /// These pages are not there.
    Unmap {
        /// Linear address.
        at: u64,
        /// Bytes.
        len: u64,
    },
    /// No page is there.
    UnmapAll,
}

#[derive(Clone, Copy)]
struct Mapped {
    gpa: u64,
    rights: Rights,
    /// log2 of the guest's page size.
    shift: u32,
}

/// Pages that a mirror holds at most: a process may have 65,530 mappings (`vm.max_map_count`), and scattered pages are one
/// each.
const MOST: usize = 48_000;

/// The mirror of an address space.
pub struct Mirror {
    /// By linear page number.
    pages: HashMap<u64, Mapped>,
    /// Linear page numbers by guest physical page number.
    at: HashMap<u64, Vec<u64>>,
    /// Executable pages: guest physical page numbers and their generations.
    code: HashMap<u64, u32>,
    pending: Vec<Change>,
    /// Some page is part of a larger one of the guest's.
    large: bool,
    /// How far the log of changed code has been seen.
    pub log_seen: u64,
}

impl Default for Mirror {
    fn default() -> Self {
        Self::new()
    }
}

impl Mirror {
    /// Of a process that may have anything mapped.
    pub fn new() -> Self {
        Self {
            pages: HashMap::new(),
            at: HashMap::new(),
            code: HashMap::new(),
            pending: vec![Change::UnmapAll],
            large: false,
            log_seen: 0,
        }
    }

    /// Number of pages.
    pub fn len(&self) -> usize {
        self.pages.len()
    }

    /// Is nothing mapped?
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    /// What may be done with the page of an address.
    pub fn rights(&self, la: u64) -> Option<Rights> {
        self.pages.get(&(la >> 12)).map(|m| m.rights)
    }

    /// Nothing is mapped any more.
    pub fn clear(&mut self) {
        if self.pages.is_empty() && self.pending.is_empty() {
            return;
        }
        self.pages.clear();
        self.at.clear();
        self.code.clear();
        self.large = false;
        self.pending.clear();
        self.pending.push(Change::UnmapAll);
    }

    /// Maps a page. `generation`: of its code, for executable ones.
    pub fn map(&mut self, la: u64, gpa: u64, rights: Rights, shift: u32, generation: Option<u32>) {
        if self.pages.len() >= MOST {
            self.clear();
        }
        let (page, gpa) = (la >> 12, gpa >> 12);
        if let Some(old) = self.pages.insert(page, Mapped { gpa, rights, shift }) {
            if old.gpa != gpa {
                self.forget(page, old.gpa);
                self.at.entry(gpa).or_default().push(page);
            }
        } else {
            self.at.entry(gpa).or_default().push(page);
        }
        if let Some(generation) = generation {
            self.code.insert(gpa, generation);
        }
        self.large |= shift > 12;
        let (at, gpa) = (page * PAGE_SIZE, gpa * PAGE_SIZE);
        if let Some(Change::Map { at: a, len, gpa: g, rights: r }) = self.pending.last_mut()
            && *a + *len == at
            && *g + *len == gpa
            && *r == rights
        {
            *len += PAGE_SIZE;
            return;
        }
        self.pending.push(Change::Map { at, len: PAGE_SIZE, gpa, rights });
    }

    fn forget(&mut self, page: u64, gpa: u64) {
        if let Some(pages) = self.at.get_mut(&gpa) {
            pages.retain(|p| *p != page);
            if pages.is_empty() {
                self.at.remove(&gpa);
                self.code.remove(&gpa);
            }
        }
    }

    fn remove(&mut self, page: u64) {
        let Some(old) = self.pages.remove(&page) else { return };
        self.forget(page, old.gpa);
        let at = page * PAGE_SIZE;
        if let Some(Change::Unmap { at: a, len }) = self.pending.last_mut()
            && *a + *len == at
        {
            *len += PAGE_SIZE;
            return;
        }
        self.pending.push(Change::Unmap { at, len: PAGE_SIZE });
    }

    /// The guest invalidates an address, and with it the whole of a large page.
    pub fn invalidate(&mut self, la: u64) {
        if self.large {
            match self.pages.get(&(la >> 12)).map(|m| m.shift) {
                Some(12) => {}
                // The page may be part of a large one of which another part is mapped.
                Some(21) | None => {
                    let first = la >> 21 << 9;
                    for page in first..first + 512 {
                        if self.pages.get(&page).is_some_and(|m| m.shift > 12) {
                            self.remove(page);
                        }
                    }
                    if self.pages.values().any(|m| m.shift > 21) {
                        self.clear();
                    }
                }
                Some(_) => return self.clear(),
            }
        }
        self.remove(la >> 12);
    }

    /// Takes the write permission of one physical page (`Some`), or of all.
    pub fn drop_write(&mut self, gpa: Option<u64>) {
        let Some(gpa) = gpa else { return self.clear() };
        let Some(pages) = self.at.get(&(gpa >> 12)) else { return };
        for page in pages.clone() {
            if self.pages.get(&page).is_some_and(|m| m.rights == Rights::Write) {
                self.remove(page);
            }
        }
    }

    /// Unmaps the executable pages whose code is no longer that of their generation.
    pub fn drop_changed(&mut self, generation: impl Fn(u64) -> u32) {
        let changed: Vec<u64> =
            self.code.iter().filter(|(gpa, g)| generation(**gpa) != **g).map(|(gpa, _)| *gpa).collect();
        for gpa in changed {
            self.code.remove(&gpa);
            for page in self.at.get(&gpa).cloned().unwrap_or_default() {
                if self.pages.get(&page).is_some_and(|m| m.rights == Rights::Execute) {
                    self.remove(page);
                }
            }
        }
    }

    /// Changes that have not been made yet, in order.
    pub fn pending(&self) -> &[Change] {
        &self.pending
    }

    /// They have been made.
    pub fn made(&mut self) {
        self.pending.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fresh() -> Mirror {
        let mut m = Mirror::new();
        assert_eq!(m.pending(), [Change::UnmapAll]);
        m.made();
        m
    }

    #[test]
    fn adjacent_pages_are_one_change() {
        let mut m = fresh();
        for n in 0..3 {
            m.map(0x10000 + n * 4096, 0x5000 + n * 4096, Rights::Write, 12, None);
        }
        m.map(0x13000, 0x8000, Rights::Read, 12, None);
        m.map(0x14000, 0xa000, Rights::Read, 12, None);
        let map = |at, len, gpa, rights| Change::Map { at, len, gpa, rights };
        assert_eq!(
            m.pending(),
            [
                map(0x10000, 0x3000, 0x5000, Rights::Write),
                map(0x13000, 0x1000, 0x8000, Rights::Read),
                map(0x14000, 0x1000, 0xa000, Rights::Read)
            ]
        );
        m.made();
        m.invalidate(0x11fff);
        assert_eq!(m.pending(), [Change::Unmap { at: 0x11000, len: 4096 }]);
        assert_eq!((m.rights(0x11000), m.rights(0x10000)), (None, Some(Rights::Write)));
        m.clear();
        assert_eq!(m.pending(), [Change::UnmapAll]);
        assert!(m.is_empty());
    }

    #[test]
    fn write_permissions_go_by_physical_page() {
        let mut m = fresh();
        m.map(0x1000, 0xa000, Rights::Write, 12, None);
        m.map(0x2000, 0xa000, Rights::Read, 12, None);
        m.map(0x3000, 0xb000, Rights::Write, 12, None);
        m.drop_write(Some(0xa000));
        assert_eq!(
            (m.rights(0x1000), m.rights(0x2000), m.rights(0x3000)),
            (None, Some(Rights::Read), Some(Rights::Write))
        );
        m.drop_write(None);
        assert_eq!(m.rights(0x3000), None);
    }

    #[test]
    fn a_large_page_goes_as_a_whole() {
        let mut m = fresh();
        m.map(0x20_0000, 0x40_0000, Rights::Write, 21, None);
        m.map(0x20_5000, 0x40_5000, Rights::Write, 21, None);
        m.map(0x60_0000, 0x9000, Rights::Write, 12, None);
        m.invalidate(0x3f_f000);
        assert_eq!(m.len(), 1);
        m.map(0x8000_0000, 0x4000_0000, Rights::Write, 30, None);
        m.invalidate(0xbfff_f000);
        assert!(m.is_empty());
    }

    #[test]
    fn changed_code_is_unmapped() {
        let mut m = fresh();
        m.map(0x1000, 0xa000, Rights::Execute, 12, Some(3));
        m.map(0x5000, 0xa000, Rights::Read, 12, None);
        m.map(0x2000, 0xb000, Rights::Execute, 12, Some(4));
        m.made();
        m.drop_changed(|gpa| if gpa == 0xa { 5 } else { 4 });
        assert_eq!(m.pending(), [Change::Unmap { at: 0x1000, len: 4096 }]);
        assert_eq!((m.rights(0x5000), m.rights(0x2000)), (Some(Rights::Read), Some(Rights::Execute)));
    }

    #[test]
    fn a_page_may_move_and_the_number_is_bounded() {
        let mut m = fresh();
        m.map(0x1000, 0xa000, Rights::Write, 12, None);
        m.map(0x1000, 0xb000, Rights::Write, 12, None);
        m.drop_write(Some(0xa000));
        assert_eq!(m.rights(0x1000), Some(Rights::Write));
        m.drop_write(Some(0xb000));
        assert_eq!(m.rights(0x1000), None);
        for n in 0..2 * MOST as u64 {
            m.map(n << 13, n << 12, Rights::Read, 12, None);
            assert!(m.len() <= MOST);
        }
    }
}
