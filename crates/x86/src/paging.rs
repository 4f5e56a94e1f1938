//! Paging-structure entry bits and page sizes (SDM volume 3, chapter 4).
#![allow(missing_docs)]

pub const P: u64 = 1 << 0;
pub const RW: u64 = 1 << 1;
pub const US: u64 = 1 << 2;
pub const PWT: u64 = 1 << 3;
pub const PCD: u64 = 1 << 4;
pub const A: u64 = 1 << 5;
pub const D: u64 = 1 << 6;
/// Page size (PDE, PDPTE).
pub const PS: u64 = 1 << 7;
pub const G: u64 = 1 << 8;
pub const NX: u64 = 1 << 63;

pub const PAGE_SHIFT: u32 = 12;
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;
pub const PAGE_MASK: u64 = PAGE_SIZE - 1;
pub const LARGE_PAGE_SIZE: u64 = 1 << 21;
pub const HUGE_PAGE_SIZE: u64 = 1 << 30;

/// Is a 48-bit linear address canonical (bits 47 to 63 all equal)?
#[inline]
pub const fn is_canonical(la: u64) -> bool {
    (((la as i64) << 16) >> 16) as u64 == la
}
