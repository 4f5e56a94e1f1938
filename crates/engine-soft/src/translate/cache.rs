//! Translated blocks: where they are, who jumps to them, and when they go.

use super::code_memory::CodeMemory;
use super::facts::Facts;
use super::lower::{Exit, Location, Lowered, Site};
use super::plan::Shape;
use super::shadow::ShadowStack;
use super::thunks::{self, Thunks};
use super::verify::Planned;
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hash, Hasher};
use std::io;

/// A quick hash for keys that are addresses.
#[derive(Default)]
pub struct AddressHasher(u64);

impl Hasher for AddressHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for b in bytes {
            self.write_u64(u64::from(*b));
        }
    }
    fn write_u64(&mut self, value: u64) {
        self.0 = (self.0.rotate_left(5) ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 ^= self.0 >> 29;
    }
}

type AddressMap<K, V> = HashMap<K, V, BuildHasherDefault<AddressHasher>>;

/// What a block was translated from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Key {
    /// Physical address of its first byte.
    pub gpa: u64,
    /// Physical page that its only instruction goes on in; 0: none.
    pub next: u64,
    /// How its accesses are checked.
    pub shape: Shape,
    /// Linear page, where that matters ([`super::verify`]); else 0. For code in a segment that is not flat: RIP of its page's
    /// first byte, and bit 32.
    pub linear: u64,
    /// Privilege level 0 (else 3).
    pub kernel: bool,
    /// Number of the [`Facts`] of 16- or 32-bit code; 0: 64-bit code.
    pub mode: u16,
}

// All in one word: the lookup is on the way of every jump that the table misses.
impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let kind = u64::from(self.shape == Shape::Single) << 62 | u64::from(self.kernel) << 63;
        let mode = u64::from(self.mode) << 46;
        state.write_u64(self.gpa ^ kind ^ mode ^ self.next.rotate_left(17) ^ self.linear.rotate_left(31));
    }
}

struct Block {
    key: Key,
    entry: u64,
    table_entry: u64,
    /// Exits of other blocks that are patched to this one.
    incoming: Vec<u32>,
    alive: bool,
    path: std::sync::Arc<[Planned]>,
}

struct ExitRecord {
    exit: Exit,
    block: u32,
}

/// A copy of a page of code, with a few bytes of what follows.
pub struct PageCopy {
    /// Physical page and generation.
    pub of: (u64, u32),
    /// Its bytes.
    pub bytes: Box<[u8; 4096 + 16]>,
}

/// A physical page with blocks.
struct CodePage {
    generation: u32,
    blocks: Vec<u32>,
}

/// A VP's translator.
pub struct Translator {
    memory: CodeMemory,
    /// Return addresses of translated code.
    pub shadow: ShadowStack,
    /// The fixed pieces.
    pub thunks: Thunks,
    /// Where the next hot and cold code goes, and the ends of the pieces of memory in use for them.
    hot: usize,
    hot_end: usize,
    cold: usize,
    cold_end: usize,
    /// First byte that is in no piece yet.
    free: usize,
    /// Bytes of a piece.
    piece: usize,
    blocks: Vec<Block>,
    by_key: AddressMap<Key, u32>,
    pages: AddressMap<u64, CodePage>,
    exits: Vec<ExitRecord>,
    /// Links that blocks have.
    links: u32,
    sites: Vec<Site>,
    cold_sites: Vec<Site>,
    copy: PageCopy,
    /// The facts that blocks were made for, by [`Key::mode`] less 1.
    modes: Vec<Facts>,
    /// How much of the partition's log of changed code pages has been seen.
    pub log_seen: u64,
    /// Blocks translated, instructions in them, flushes of everything, blocks dropped because code changed.
    pub stats: [u64; 4],
}

/// Room that one block may need at most in each area.
pub(super) const BLOCK_ROOM: usize = 32 << 10;
/// Most numbers of [`Facts`]: a guest with more keeps making new ones.
const MODES: usize = 256;

impl Translator {
    /// A translator with a code cache of `bytes`. Fails where the host gives no executable memory.
    pub fn new(bytes: usize, helpers: thunks::Helpers) -> io::Result<Self> {
        let mut memory = CodeMemory::new(bytes.max(1 << 20))?;
        let (code, thunks) = thunks::build(memory.exec(0) as u64, helpers);
        if !memory.put(0, &code) {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        // Hot and cold code take pieces as they need them: nobody knows beforehand how they share the memory.
        let piece = (memory.len() / 16).clamp(4 * BLOCK_ROOM, 2 << 20);
        let mut translator = Self {
            shadow: ShadowStack::new(thunks.unpaired)?,
            memory,
            thunks,
            hot: 0,
            hot_end: 0,
            cold: 0,
            cold_end: 0,
            free: 0,
            piece,
            blocks: Vec::new(),
            by_key: AddressMap::default(),
            pages: AddressMap::default(),
            exits: Vec::new(),
            links: 0,
            sites: Vec::new(),
            cold_sites: Vec::new(),
            copy: PageCopy { of: (u64::MAX, 0), bytes: Box::new([0; 4096 + 16]) },
            modes: Vec::new(),
            log_seen: 0,
            stats: [0; 4],
        };
        translator.start();
        Ok(translator)
    }

    /// The block for a key.
    pub fn find(&self, key: Key) -> Option<u32> {
        self.by_key.get(&key).copied()
    }

    /// The first pieces, of an empty cache.
    fn start(&mut self) {
        self.hot = self.thunks.len.next_multiple_of(64);
        self.hot_end = self.piece;
        self.cold = self.piece;
        self.cold_end = 2 * self.piece;
        self.free = 2 * self.piece;
    }

    /// Makes room for one more block; false if there is none.
    pub fn make_room(&mut self) -> bool {
        for (at, end) in [(&mut self.hot, &mut self.hot_end), (&mut self.cold, &mut self.cold_end)] {
            if *at + BLOCK_ROOM <= *end {
                continue;
            }
            if self.free + self.piece > self.memory.len() {
                return false;
            }
            // Pieces are taken in ascending order, so that signal sites stay sorted.
            (*at, *end) = (self.free, self.free + self.piece);
            self.free += self.piece;
        }
        true
    }

    /// The page that was translated from last, as it was: neighbouring blocks are often made one after the other.
    pub fn page_copy(&mut self) -> &mut PageCopy {
        &mut self.copy
    }

    /// Where the next block goes.
    pub fn next(&self) -> Location {
        Location {
            hot: self.memory.exec(self.hot) as u64,
            cold: self.memory.exec(self.cold) as u64,
            exit: self.exits.len() as u32,
            link: self.links,
        }
    }

    /// Is it an address in the code memory? Async-signal-safe.
    pub fn contains(&self, at: u64) -> bool {
        at.wrapping_sub(self.memory.exec(0) as u64) < self.memory.len() as u64
    }

    /// Enters a block that was lowered for [`Translator::next`]. `None` if it is too large.
    /// `generations`: of its page and of the one that it goes on in.
    pub fn insert(&mut self, key: Key, generations: [u32; 2], lowered: Lowered) -> Option<u32> {
        let Lowered { hot, cold, entry, table_entry, exits, links, sites, cold_sites, count, path } = lowered;
        if hot.bytes.len() > BLOCK_ROOM || cold.bytes.len() > BLOCK_ROOM {
            return None;
        }
        if !self.memory.put(self.hot, &hot.bytes) || !self.memory.put(self.cold, &cold.bytes) {
            return None;
        }
        self.hot = (self.hot + hot.bytes.len()).next_multiple_of(16);
        self.cold += cold.bytes.len();
        let id = self.blocks.len() as u32;
        self.exits.extend(exits.into_iter().map(|exit| ExitRecord { exit, block: id }));
        self.links = links;
        self.sites.extend(sites);
        self.cold_sites.extend(cold_sites);
        self.blocks.push(Block {
            key,
            entry,
            table_entry,
            incoming: Vec::new(),
            alive: true,
            path: path.into_iter().map(Planned::new).collect(),
        });
        self.by_key.insert(key, id);
        let pages = [key.gpa >> 12, key.next >> 12];
        for (page, generation) in pages.into_iter().zip(generations).take(1 + usize::from(key.next != 0)) {
            self.pages.entry(page).or_insert(CodePage { generation, blocks: Vec::new() }).blocks.push(id);
        }
        self.stats[0] += 1;
        self.stats[1] += u64::from(count);
        Some(id)
    }

    /// Entry with the flags in the host's register.
    pub fn entry(&self, block: u32) -> u64 {
        self.blocks[block as usize].entry
    }
    /// The instructions that a block executes (kept for [`super::verify`] only).
    pub fn path(&self, block: u32) -> std::sync::Arc<[Planned]> {
        self.blocks[block as usize].path.clone()
    }
    /// Entry through the jump table.
    pub fn table_entry(&self, block: u32) -> u64 {
        self.blocks[block as usize].table_entry
    }

    /// Does the block go on in another page?
    pub fn goes_on(&self, block: u32) -> bool {
        self.blocks[block as usize].key.next != 0
    }

    /// Target of a direct exit: offset in the page, and what kind of block.
    pub fn exit_target(&self, exit: u64) -> Option<(u16, Shape)> {
        self.exits.get(exit as usize).map(|e| (e.exit.target, e.exit.shape))
    }

    /// Makes a direct exit jump straight to a block.
    pub fn chain(&mut self, exit: u64, block: u32) {
        let Some(e) = self.exits.get(exit as usize) else { return };
        let (from, to) = (&self.blocks[e.block as usize], &self.blocks[block as usize]);
        // Both on one physical page, and so at one linear page: the jump stays right as long as both live.
        let expected = Key { gpa: from.key.gpa & !0xfff | u64::from(e.exit.target), shape: e.exit.shape, ..from.key };
        // (A block that goes on in the next page is not among them: `expected` does not.)
        if !from.alive || !to.alive || to.key != expected || from.key.next != 0 {
            return;
        }
        let (patch, entry) = (e.exit.patch, to.entry);
        self.patch(patch, entry);
        self.blocks[block as usize].incoming.push(exit as u32);
    }

    fn patch(&self, at: u64, target: u64) {
        let offset = (at - self.memory.exec(0) as u64) as usize;
        let rel = target.wrapping_sub(at + 4) as u32;
        debug_assert!(offset + 4 <= self.memory.len());
        // SAFETY: `at` is the address of a displacement in a block, which lies inside the memory. This thread is the only
        // one that executes it, and it is not executing it now.
        unsafe { self.memory.writable(offset).cast::<u32>().write_unaligned(rel) };
    }

    /// The generation that a page's blocks were made from.
    pub fn page_generation(&self, gpa_page: u64) -> Option<u32> {
        self.pages.get(&gpa_page).map(|p| p.generation)
    }

    /// Pages with blocks, and their generations.
    pub fn changed_pages(&self, now: impl Fn(u64) -> u32) -> Vec<u64> {
        self.pages.iter().filter(|(page, p)| now(**page) != p.generation).map(|(page, _)| *page).collect()
    }

    /// Drops a page's blocks. The caller flushes the jump tables.
    pub fn drop_page(&mut self, gpa_page: u64) {
        let Some(page) = self.pages.remove(&gpa_page) else { return };
        for id in page.blocks {
            let block = &mut self.blocks[id as usize];
            if !block.alive {
                continue; // the other page of a block has gone before
            }
            block.alive = false;
            self.by_key.remove(&block.key);
            self.stats[3] += 1;
            for exit in std::mem::take(&mut block.incoming) {
                let e = &self.exits[exit as usize];
                self.patch(e.exit.patch, e.exit.stub);
            }
        }
    }

    /// The number of facts that blocks are made for. `None`: there are too many, everything is to be flushed first.
    pub fn mode(&mut self, facts: &Facts) -> Option<u16> {
        if let Some(at) = self.modes.iter().position(|f| f == facts) {
            return Some(at as u16 + 1);
        }
        if self.modes.len() >= MODES {
            return None;
        }
        self.modes.push(*facts);
        Some(self.modes.len() as u16)
    }

    /// Makes the numbers of facts free, with everything that was made for them.
    pub fn forget_modes(&mut self) {
        self.flush();
        self.modes.clear();
    }

    /// Drops everything. The caller flushes the jump tables.
    pub fn flush(&mut self) {
        self.blocks.clear();
        self.by_key.clear();
        self.pages.clear();
        self.exits.clear();
        self.links = 0;
        self.sites.clear();
        self.cold_sites.clear();
        self.start();
        self.stats[2] += 1;
    }

    /// Bytes that it holds beyond what an empty one does.
    pub fn held(&self) -> usize {
        // Of the pieces that were taken, what is not left of the two last ones.
        let left = (self.hot_end - self.hot) + (self.cold_end - self.cold);
        let code = self.free - left - self.thunks.len;
        code + self.blocks.len() * (size_of::<Block>() + size_of::<Key>() * 2)
            + self.exits.len() * size_of::<ExitRecord>()
    }

    /// As [`Translator::flush`], and gives the memory back to the host. The caller flushes the jump tables.
    pub fn release(&mut self) {
        self.flush();
        (self.blocks, self.exits) = (Vec::new(), Vec::new());
        (self.sites, self.cold_sites) = (Vec::new(), Vec::new());
        (self.by_key, self.pages) = (AddressMap::default(), AddressMap::default());
        self.memory.discard(self.thunks.len);
    }

    /// The signal site at a host address. Async-signal-safe.
    pub fn site(&self, at: u64) -> Option<&Site> {
        let find = |sites: &'_ [Site]| sites.binary_search_by_key(&at, |s| s.at).ok();
        find(&self.sites).map(|i| &self.sites[i]).or_else(|| find(&self.cold_sites).map(|i| &self.cold_sites[i]))
    }
}
