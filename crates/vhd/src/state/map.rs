//! From disk offsets to file offsets: the block maps of VHDX and VHD, read and changed through the page cache.

use super::cache::Cache;
use crate::error::RequestError;
use crate::format::{vhd, vhdx};
use crate::vhdx::region::Range;

/// Which format's BAT and bitmaps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flavor {
    /// log2 of the chunk ratio.
    Vhdx { chunk_shift: u32 },
    /// Bytes of the sector bitmap before each block.
    Vhd { bitmap_bytes: u64 },
}

/// A block map.
#[derive(Debug, Clone)]
pub(crate) struct BlockMap {
    pub flavor: Flavor,
    pub bat_offset: u64,
    /// Payload blocks that the BAT has entries for.
    pub blocks: u64,
    pub block_shift: u32,
    /// log2 of the unit of the sector bitmaps.
    pub sector_shift: u32,
    pub has_parent: bool,
    /// Blocks are never given up.
    pub fixed: bool,
    /// No block may lie here.
    pub reserved: Vec<Range>,
    /// No block may lie beyond.
    pub file_end: u64,
    pub page_shift: u32,
}

/// Where a block is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Block {
    /// In the parent; zero if there is none.
    Absent,
    Zero,
    Full(u64),
    /// Some sectors are here, the others in the parent.
    Partial(u64),
}

/// Why a lookup cannot answer now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stop {
    /// This page must be read first.
    Miss(u64),
    Fail(RequestError),
}

impl From<RequestError> for Stop {
    fn from(e: RequestError) -> Self {
        Self::Fail(e)
    }
}

impl BlockMap {
    pub fn block_size(&self) -> u64 {
        1 << self.block_shift
    }

    pub fn page_of(&self, file_offset: u64) -> (u64, usize) {
        (file_offset >> self.page_shift, (file_offset & ((1 << self.page_shift) - 1)) as usize)
    }

    /// File offset of a payload block's BAT entry.
    pub fn entry_at(&self, block: u64) -> u64 {
        match self.flavor {
            Flavor::Vhdx { chunk_shift } => self.bat_offset + (block + (block >> chunk_shift)) * 8,
            Flavor::Vhd { .. } => self.bat_offset + block * 4,
        }
    }

    /// File offset of the BAT entry of the sector bitmap block of a payload block (VHDX).
    pub fn bitmap_entry_at(&self, block: u64, chunk_shift: u32) -> u64 {
        let chunk = block >> chunk_shift;
        self.bat_offset + (((chunk + 1) << chunk_shift) + chunk) * 8
    }

    pub fn read_u64(&self, cache: &mut Cache, at: u64) -> Result<u64, Stop> {
        let (page, off) = self.page_of(at);
        let p = cache.get(page).ok_or(Stop::Miss(page))?;
        Ok(u64::from_le_bytes(p.data[off..off + 8].try_into().expect("eight bytes")))
    }

    fn read_u32_be(&self, cache: &mut Cache, at: u64) -> Result<u32, Stop> {
        let (page, off) = self.page_of(at);
        let p = cache.get(page).ok_or(Stop::Miss(page))?;
        Ok(u32::from_be_bytes(p.data[off..off + 4].try_into().expect("four bytes")))
    }

    /// Whether a range of the file may hold a block.
    pub fn placeable(&self, offset: u64, length: u64) -> bool {
        offset.checked_add(length).is_some_and(|end| end <= self.file_end)
            && !self.reserved.iter().any(|r| r.overlaps(offset, length))
    }

    /// What a raw entry says about a block.
    pub fn decode(&self, raw: u64) -> Result<Block, RequestError> {
        match self.flavor {
            Flavor::Vhdx { .. } => {
                let offset = raw & vhdx::BAT_OFFSET_MASK;
                match raw & vhdx::BAT_STATE_MASK {
                    vhdx::BLOCK_NOT_PRESENT => Ok(Block::Absent),
                    vhdx::BLOCK_UNDEFINED | vhdx::BLOCK_ZERO | vhdx::BLOCK_UNMAPPED => Ok(Block::Zero),
                    state @ (vhdx::BLOCK_FULLY_PRESENT | vhdx::BLOCK_PARTIALLY_PRESENT) => {
                        if !self.placeable(offset, self.block_size()) {
                            return Err(RequestError::Malformed);
                        }
                        match state {
                            vhdx::BLOCK_FULLY_PRESENT => Ok(Block::Full(offset)),
                            _ if self.has_parent => Ok(Block::Partial(offset)),
                            _ => Err(RequestError::Malformed),
                        }
                    }
                    _ => Err(RequestError::Malformed),
                }
            }
            Flavor::Vhd { bitmap_bytes } => {
                if raw == u64::from(vhd::BAT_UNUSED) {
                    return Ok(Block::Absent);
                }
                let offset = raw * vhd::SECTOR;
                if !self.placeable(offset, bitmap_bytes + self.block_size()) {
                    return Err(RequestError::Malformed);
                }
                let data = offset + bitmap_bytes;
                Ok(if self.has_parent { Block::Partial(data) } else { Block::Full(data) })
            }
        }
    }

    pub fn block(&self, cache: &mut Cache, block: u64) -> Result<Block, Stop> {
        if block >= self.blocks {
            return Err(Stop::Fail(RequestError::OutOfRange));
        }
        let at = self.entry_at(block);
        let raw = match self.flavor {
            Flavor::Vhdx { .. } => self.read_u64(cache, at)?,
            Flavor::Vhd { .. } => u64::from(self.read_u32_be(cache, at)?),
        };
        Ok(self.decode(raw)?)
    }

    /// File offset of the byte with the first bit of a partially present block's bitmap.
    pub fn bitmap_base(&self, cache: &mut Cache, block: u64, data: u64) -> Result<u64, Stop> {
        match self.flavor {
            Flavor::Vhdx { chunk_shift } => {
                let raw = self.read_u64(cache, self.bitmap_entry_at(block, chunk_shift))?;
                let offset = raw & vhdx::BAT_OFFSET_MASK;
                if raw & vhdx::BAT_STATE_MASK != vhdx::BLOCK_FULLY_PRESENT || !self.placeable(offset, vhdx::MIB) {
                    return Err(Stop::Fail(RequestError::Malformed));
                }
                let in_chunk = block & ((1 << chunk_shift) - 1);
                Ok(offset + (in_chunk << (self.block_shift - self.sector_shift)) / 8)
            }
            Flavor::Vhd { bitmap_bytes } => Ok(data - bitmap_bytes),
        }
    }

    /// The bitmap's bit of a sector: byte in the file, mask in the byte. VHDX counts from the low bit, VHD from the high.
    pub fn bit(&self, base: u64, sector: u64) -> (u64, u8) {
        let mask = match self.flavor {
            Flavor::Vhdx { .. } => 1 << (sector % 8),
            Flavor::Vhd { .. } => 0x80 >> (sector % 8),
        };
        (base + sector / 8, mask)
    }

    /// Whether a sector of a partial block is here, and how many sectors from it on (at most `max`) are the same.
    pub fn present(&self, cache: &mut Cache, base: u64, sector: u64, max: u64) -> Result<(bool, u64), Stop> {
        let (at, mask) = self.bit(base, sector);
        let (page, off) = self.page_of(at);
        let p = cache.get(page).ok_or(Stop::Miss(page))?;
        let first = p.data[off] & mask != 0;
        let whole = if first { 0xff } else { 0 };
        let mut n = 1;
        while n < max {
            let (b, m) = self.bit(base, sector + n);
            let (pg, o) = self.page_of(b);
            if pg != page {
                break;
            }
            if (sector + n).is_multiple_of(8) && p.data[o] == whole {
                n += 8;
                continue;
            }
            if (p.data[o] & m != 0) != first {
                break;
            }
            n += 1;
        }
        Ok((first, n.min(max)))
    }

    /// Sectors from `sector` on whose bits are in the same page.
    pub fn sectors_in_page(&self, base: u64, sector: u64) -> u64 {
        let (at, _) = self.bit(base, sector);
        let (_, off) = self.page_of(at);
        ((1 << self.page_shift) - off as u64) * 8 - sector % 8
    }

    /// Sets or clears bits that lie in one page, which is in the cache.
    pub fn set_bits(&self, cache: &mut Cache, base: u64, sector: u64, count: u64, value: bool) {
        let (page, _) = self.page_of(self.bit(base, sector).0);
        let page_base = page << self.page_shift;
        let Some(data) = cache.modify(page, true) else { return };
        let mut s = sector;
        let end = sector + count;
        while s < end {
            let (at, mask) = self.bit(base, s);
            let byte = &mut data[(at - page_base) as usize];
            if s.is_multiple_of(8) && end - s >= 8 {
                *byte = if value { 0xff } else { 0 };
                s += 8;
                continue;
            }
            if value {
                *byte |= mask
            } else {
                *byte &= !mask
            }
            s += 1;
        }
    }

    /// Writes a payload block's BAT entry; its page is in the cache.
    pub fn set_block(&self, cache: &mut Cache, block: u64, to: Block) {
        let (page, off) = self.page_of(self.entry_at(block));
        match self.flavor {
            Flavor::Vhdx { .. } => {
                let raw = match to {
                    Block::Absent => vhdx::BLOCK_NOT_PRESENT,
                    Block::Zero => vhdx::BLOCK_ZERO,
                    Block::Full(o) => o | vhdx::BLOCK_FULLY_PRESENT,
                    Block::Partial(o) => o | vhdx::BLOCK_PARTIALLY_PRESENT,
                };
                if let Some(d) = cache.modify(page, false) {
                    d[off..off + 8].copy_from_slice(&raw.to_le_bytes());
                }
            }
            Flavor::Vhd { bitmap_bytes } => {
                let raw = match to {
                    Block::Absent | Block::Zero => vhd::BAT_UNUSED,
                    Block::Full(o) | Block::Partial(o) => ((o - bitmap_bytes) / vhd::SECTOR) as u32,
                };
                if let Some(d) = cache.modify(page, false) {
                    d[off..off + 4].copy_from_slice(&raw.to_be_bytes());
                }
            }
        }
    }

    /// Writes a sector bitmap block's BAT entry (VHDX); its page is in the cache.
    pub fn set_bitmap_block(&self, cache: &mut Cache, at: u64, offset: u64) {
        let (page, off) = self.page_of(at);
        if let Some(d) = cache.modify(page, false) {
            d[off..off + 8].copy_from_slice(&(offset | vhdx::BLOCK_FULLY_PRESENT).to_le_bytes());
        }
    }
}
