//! The decode cache: pre-digested instructions, by physical page, offset and code size, and how it learns that code
//! has changed.

use std::sync::atomic::{AtomicU32, Ordering};

/// Number of counters; pages share a counter by the low bits of their number, which only costs a needless re-decoding.
const GENERATIONS: usize = 1 << 16;

/// A change counter for each physical page that holds code, one table a partition.
///
/// Protocol. A cache of something derived from code bytes calls [`crate::partition_impl::SoftPartition::track_code`],
/// then reads the page's generation, then the bytes, and keeps the generation with what it derived. Whoever writes to a
/// tracked page calls `SoftPartition::code_written`, which [bumps](Self::bump) the generation and then sets
/// [`crate::vp::attention::CODE`] for every VP. Seeing CODE (or entering a page), a cache compares generations.
pub struct CodeGenerations(Box<[AtomicU32]>);

impl CodeGenerations {
    /// All zero.
    pub fn new() -> Self {
        Self((0..GENERATIONS).map(|_| AtomicU32::new(0)).collect())
    }
    /// The counter of a page (`gpa_page` is the address divided by 4096).
    #[inline]
    pub fn of(&self, gpa_page: u64) -> &AtomicU32 {
        &self.0[gpa_page as usize % GENERATIONS]
    }
    /// The present generation.
    #[inline]
    pub fn get(&self, gpa_page: u64) -> u32 {
        self.of(gpa_page).load(Ordering::Acquire)
    }
    /// The page has been (or is about to be) written: everything derived from it is stale.
    pub fn bump(&self, gpa_page: u64) {
        self.of(gpa_page).fetch_add(1, Ordering::AcqRel);
    }
}

impl Default for CodeGenerations {
    fn default() -> Self {
        Self::new()
    }
}

/// A VP's decoded instructions.
#[derive(Default)]
pub struct DecodeCache {}

impl DecodeCache {
    /// Empty.
    pub fn new() -> Self {
        Self::default()
    }
}
