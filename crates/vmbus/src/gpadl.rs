//! Lists of guest pages: GPADLs and ranges in packets.

use partition::{Gpa, GuestMemory, MemoryError};
use serde::{Deserialize, Serialize};
use vmbus_protocol::PAGE;

/// Guest pages that are contiguous for the protocol but not in guest memory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageList {
    /// Page numbers.
    pub pages: Vec<u64>,
}

/// A buffer in guest memory: bytes inside a page list.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GpaRange {
    /// Bytes before the buffer in the first page.
    pub offset: u32,
    /// Bytes.
    pub len: u32,
    /// The pages: enough for offset and length.
    pub list: PageList,
}

/// Why bytes are not a list of ranges.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BadRanges(pub &'static str);

impl PageList {
    /// Bytes.
    pub fn len(&self) -> u64 {
        (self.pages.len() * PAGE) as u64
    }

    /// Has it no page?
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    /// Calls `f` with (address, bytes) for each physically contiguous part of a range. The range must be inside.
    pub fn extents(
        &self,
        offset: u64,
        len: u64,
        mut f: impl FnMut(Gpa, usize) -> Result<(), MemoryError>,
    ) -> Result<(), MemoryError> {
        let outside = || MemoryError::NotMapped { gpa: Gpa(offset), len, needed: "inside the guest's page list" };
        if offset.checked_add(len).is_none_or(|end| end > self.len()) {
            return Err(outside());
        }
        let (mut at, mut left) = (offset, len);
        while left > 0 {
            let mut index = (at / PAGE as u64) as usize;
            let inside = at % PAGE as u64;
            let first = self.pages[index];
            let mut run = PAGE as u64 - inside;
            while run < left && self.pages.get(index + 1) == Some(&first.wrapping_add(run.div_ceil(PAGE as u64))) {
                index += 1;
                run += PAGE as u64;
            }
            let run = run.min(left);
            // A page number from the guest may be anything; an address that wraps is not mapped.
            let gpa = first.checked_mul(PAGE as u64).ok_or_else(outside)?;
            f(Gpa(gpa) + inside, run as usize)?;
            at += run;
            left -= run;
        }
        Ok(())
    }

    /// Copies bytes out.
    pub fn read(&self, memory: &GuestMemory, offset: u64, data: &mut [u8]) -> Result<(), MemoryError> {
        let mut done = 0;
        self.extents(offset, data.len() as u64, |gpa, len| {
            memory.read(gpa, &mut data[done..done + len])?;
            done += len;
            Ok(())
        })
    }

    /// Copies bytes in.
    pub fn write(&self, memory: &GuestMemory, offset: u64, data: &[u8]) -> Result<(), MemoryError> {
        let mut done = 0;
        self.extents(offset, data.len() as u64, |gpa, len| {
            memory.write(gpa, &data[done..done + len])?;
            done += len;
            Ok(())
        })
    }

    /// Address of an aligned cell that does not cross a page.
    pub fn address(&self, offset: u64) -> Option<Gpa> {
        let page = *self.pages.get(usize::try_from(offset / PAGE as u64).ok()?)?;
        Some(Gpa(page.checked_mul(PAGE as u64)?) + offset % PAGE as u64)
    }
}

impl GpaRange {
    /// Copies bytes out.
    pub fn read(&self, memory: &GuestMemory, offset: u64, data: &mut [u8]) -> Result<(), MemoryError> {
        self.check(offset, data.len())?;
        self.list.read(memory, u64::from(self.offset) + offset, data)
    }

    /// Copies bytes in.
    pub fn write(&self, memory: &GuestMemory, offset: u64, data: &[u8]) -> Result<(), MemoryError> {
        self.check(offset, data.len())?;
        self.list.write(memory, u64::from(self.offset) + offset, data)
    }

    /// The physically contiguous parts of the buffer.
    pub fn extents(&self) -> Result<Vec<(Gpa, usize)>, MemoryError> {
        let mut parts = Vec::new();
        self.list.extents(u64::from(self.offset), u64::from(self.len), |gpa, len| {
            parts.push((gpa, len));
            Ok(())
        })?;
        Ok(parts)
    }

    fn check(&self, offset: u64, len: usize) -> Result<(), MemoryError> {
        if offset.checked_add(len as u64).is_none_or(|end| end > u64::from(self.len)) {
            return Err(MemoryError::NotMapped {
                gpa: Gpa(offset),
                len: len as u64,
                needed: "inside the buffer that the guest gave",
            });
        }
        Ok(())
    }
}

/// Decodes `count` ranges (byte count, offset in the first page, page numbers).
pub fn parse_ranges(mut bytes: &[u8], count: usize) -> Result<Vec<GpaRange>, BadRanges> {
    // Each range has at least its header, so that the loop and the allocations are bounded by the bytes.
    let mut ranges = Vec::new();
    for _ in 0..count {
        let (header, rest) = bytes.split_at_checked(8).ok_or(BadRanges("a range's header is missing"))?;
        let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let (len, offset) = (word(0), word(4));
        if offset as usize >= PAGE {
            return Err(BadRanges("a range begins behind its first page"));
        }
        let pages = (u64::from(offset) + u64::from(len)).div_ceil(PAGE as u64) as usize;
        let (list, rest) = rest
            .split_at_checked(pages.checked_mul(8).ok_or(BadRanges("a range is too long"))?)
            .ok_or(BadRanges("page numbers are missing"))?;
        let pages = list.as_chunks::<8>().0.iter().map(|p| u64::from_le_bytes(*p)).collect();
        ranges.push(GpaRange { offset, len, list: PageList { pages } });
        bytes = rest;
    }
    Ok(ranges)
}
