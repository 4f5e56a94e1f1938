//! Metadata pages (BAT, sector bitmaps) in memory: a bounded cache that knows which pages must not leave it.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasherDefault, Hasher};

/// Page numbers are small integers: one multiplication spreads them well enough.
#[derive(Default)]
pub(crate) struct PageHasher(u64);

impl Hasher for PageHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for &b in bytes {
            self.write_u64(u64::from(b));
        }
    }
    fn write_u64(&mut self, n: u64) {
        let h = (self.0 ^ n).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = h ^ (h >> 32);
    }
}

pub(crate) struct Page {
    pub data: Box<[u8]>,
    pub dirty: bool,
    /// Writes in flight that will dirty the page when they complete.
    pub reserved: u32,
    /// The page's last committed content is not yet in its place (or never will be: an overlay).
    pub held: u32,
    touched: bool,
    /// Holds sector bitmap bits, whose data must be durable before they are.
    pub bitmap: bool,
}

/// The pages of one image file.
pub(crate) struct Cache {
    pages: HashMap<u64, Page, BuildHasherDefault<PageHasher>>,
    /// Pages in the order of their arrival, for a second-chance eviction.
    order: VecDeque<u64>,
    capacity: usize,
    pub dirty: Vec<u64>,
    /// Pages with `reserved` > 0 that are not dirty.
    pub reserved: usize,
}

impl Cache {
    pub fn new(capacity: usize) -> Self {
        Self { pages: HashMap::default(), order: VecDeque::new(), capacity, dirty: Vec::new(), reserved: 0 }
    }

    pub fn get(&mut self, n: u64) -> Option<&Page> {
        let p = self.pages.get_mut(&n)?;
        p.touched = true;
        Some(p)
    }

    /// Whether the page is there, without touching it.
    pub fn contains(&self, n: u64) -> bool {
        self.pages.contains_key(&n)
    }

    /// Whether dirtying this page would add to the pages that the next commit takes.
    pub fn costs(&self, n: u64) -> bool {
        self.pages.get(&n).is_none_or(|p| !p.dirty && p.reserved == 0)
    }

    pub fn insert(&mut self, n: u64, data: Box<[u8]>) {
        while self.pages.len() >= self.capacity && self.evict() {}
        self.pages.insert(n, Page { data, dirty: false, reserved: 0, held: 0, touched: true, bitmap: false });
        self.order.push_back(n);
    }

    /// Drops one page that nobody needs; false if there is none within a bounded search.
    fn evict(&mut self) -> bool {
        for _ in 0..self.order.len().min(4096) {
            let Some(n) = self.order.pop_front() else { return false };
            let Some(p) = self.pages.get_mut(&n) else { continue };
            if p.dirty || p.reserved != 0 || p.held != 0 || p.touched {
                p.touched = false;
                self.order.push_back(n);
                continue;
            }
            self.pages.remove(&n);
            return true;
        }
        false
    }

    /// The page for changing; it becomes dirty.
    pub fn modify(&mut self, n: u64, bitmap: bool) -> Option<&mut [u8]> {
        let p = self.pages.get_mut(&n)?;
        if !p.dirty {
            p.dirty = true;
            self.dirty.push(n);
            if p.reserved > 0 {
                self.reserved -= 1;
            }
        }
        p.bitmap |= bitmap;
        p.touched = true;
        Some(&mut p.data)
    }

    pub fn reserve(&mut self, n: u64) {
        if let Some(p) = self.pages.get_mut(&n) {
            if p.reserved == 0 && !p.dirty {
                self.reserved += 1;
            }
            p.reserved += 1;
        }
    }

    pub fn unreserve(&mut self, n: u64) {
        if let Some(p) = self.pages.get_mut(&n) {
            p.reserved -= 1;
            if p.reserved == 0 && !p.dirty {
                self.reserved -= 1;
            }
        }
    }

    /// Takes the dirty pages' contents for a commit; they are clean afterwards, but held.
    pub fn snapshot(&mut self) -> Vec<(u64, Box<[u8]>, bool)> {
        let mut list = std::mem::take(&mut self.dirty);
        list.sort_unstable();
        list.into_iter()
            .filter_map(|n| {
                let p = self.pages.get_mut(&n)?;
                p.dirty = false;
                p.held += 1;
                if p.reserved > 0 {
                    self.reserved += 1;
                }
                let bitmap = std::mem::take(&mut p.bitmap);
                Some((n, p.data.clone(), bitmap))
            })
            .collect()
    }

    pub fn hold(&mut self, n: u64) {
        if let Some(p) = self.pages.get_mut(&n) {
            p.held += 1;
        }
    }

    pub fn release(&mut self, n: u64) {
        if let Some(p) = self.pages.get_mut(&n) {
            p.held -= 1;
        }
    }
}
