//! The log (MS-VHDX 2.3): finding what must be replayed, replaying it, and building new entries.

use std::collections::BTreeMap;

use uuid::Uuid;
use zerocopy::{FromBytes, IntoBytes};

use super::header::{HeaderState, checksum};
use super::region::{Range, log_range};
use crate::error::{Error, Result, Structure};
use crate::format::vhdx as fmt;
use crate::storage::Storage;

const SECTOR: usize = fmt::LOG_SECTOR;
/// No image is larger: 64 TiB of payload, its bitmaps, BAT and slack.
pub(crate) const MAX_FILE: u64 = 80 << 40;

/// A valid entry found in the log.
#[derive(Debug, Clone, Copy)]
struct Entry {
    offset: usize,
    length: usize,
    sequence: u64,
    tail: usize,
}

/// The updates of the active sequence, in order.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    updates: Vec<Update>,
    pub last_file_offset: u64,
}

#[derive(Debug)]
enum Update {
    Zero { offset: u64, length: u64 },
    Data { offset: u64, page: Box<[u8]> },
}

/// Finds the active sequence (2.3.2) and what it updates.
pub(crate) fn plan(storage: &dyn Storage, header: &HeaderState) -> Result<Plan> {
    let file_length = storage.length().map_err(Error::io(storage.path(), "read the length"))?;
    let range = log_range(header, file_length)?;
    let mut log = vec![0; range.length as usize];
    storage.read_at(&mut log, range.offset).map_err(Error::io(storage.path(), "read the log"))?;
    let entries = find_entries(&log, header.log_guid())?;
    if entries.is_empty() {
        // The header was marked but power failed before the first entry: there is nothing to replay.
        return Ok(Plan::default());
    }
    // The newest entry whose sequence is complete down to its tail ends the active sequence.
    let mut heads: Vec<Entry> = entries.values().copied().collect();
    heads.sort_unstable_by_key(|e| std::cmp::Reverse(e.sequence));
    let mut steps = 0;
    for head in &heads {
        let mut chain = Vec::new();
        let mut at = head.tail;
        loop {
            steps += 1;
            let Some(e) = entries.get(&at) else { break };
            if chain.last().is_some_and(|p: &Entry| p.sequence + 1 != e.sequence) || chain.len() > entries.len() {
                break;
            }
            chain.push(*e);
            if e.offset == head.offset {
                return build(&log, &chain, range, file_length);
            }
            at = (e.offset + e.length) % log.len();
        }
        if steps > 1 << 20 {
            break;
        }
    }
    Err(Error::malformed(Structure::Log, "there are entries, but no complete sequence of them"))
}

/// All entries of this log id whose checksums are right, by offset.
fn find_entries(log: &[u8], guid: Uuid) -> Result<BTreeMap<usize, Entry>> {
    let mut found = BTreeMap::new();
    // Overlapping claims make checking quadratic; an honest log needs one pass over its bytes, plus torn entries.
    let mut budget = log.len().saturating_mul(16).saturating_add(64 << 20);
    let mut at = 0;
    while at < log.len() {
        match parse_entry(log, at, guid, &mut budget)? {
            Some(e) => {
                found.insert(at, e);
                at += e.length;
            }
            None => at += SECTOR,
        }
    }
    Ok(found)
}

fn parse_entry(log: &[u8], at: usize, guid: Uuid, budget: &mut usize) -> Result<Option<Entry>> {
    let Ok((h, _)) = fmt::LogEntryHeader::ref_from_prefix(&log[at..]) else { return Ok(None) };
    let length = h.entry_length.get() as usize;
    let tail = h.tail.get() as usize;
    let plausible = h.signature == *b"loge"
        && Uuid::from(h.log_guid) == guid
        && length != 0
        && length.is_multiple_of(SECTOR)
        && length <= log.len()
        && tail.is_multiple_of(SECTOR)
        && tail < log.len()
        && h.sequence_number.get() != 0
        && h.sequence_number.get() != u64::MAX
        && descriptor_sectors(h.descriptor_count.get() as usize).is_some_and(|n| n * SECTOR <= length);
    if !plausible {
        return Ok(None);
    }
    *budget = budget.checked_sub(length).ok_or_else(|| {
        Error::malformed(Structure::Log, "its entries overlap so often that they cannot all be checked")
    })?;
    let bytes = circular(log, at, length);
    if checksum(&bytes, 4) != h.checksum.get() {
        return Ok(None);
    }
    Ok(Some(Entry { offset: at, length, sequence: h.sequence_number.get(), tail }))
}

/// A copy of `length` bytes from `at` on, which may wrap around.
fn circular(log: &[u8], at: usize, length: usize) -> Vec<u8> {
    let first = length.min(log.len() - at);
    let mut out = Vec::with_capacity(length);
    out.extend_from_slice(&log[at..at + first]);
    out.extend_from_slice(&log[..length - first]);
    out
}

/// Sectors that header and descriptors take.
fn descriptor_sectors(count: usize) -> Option<usize> {
    Some((count.checked_mul(32)?.checked_add(64)?).div_ceil(SECTOR))
}

fn build(log: &[u8], chain: &[Entry], range: Range, file_length: u64) -> Result<Plan> {
    let mut plan = Plan { last_file_offset: file_length, ..Plan::default() };
    let bad = |m: String| Error::malformed(Structure::Log, m);
    let (mut flushed, mut last) = (0, 0);
    for e in chain {
        let bytes = circular(log, e.offset, e.length);
        let (h, _) = fmt::LogEntryHeader::ref_from_prefix(&bytes).map_err(|_| bad("a short entry".into()))?;
        (flushed, last) = (h.flushed_file_offset.get(), h.last_file_offset.get());
        if last > MAX_FILE {
            return Err(bad(format!("entry {} wants a file of {last:#x} bytes", e.sequence)));
        }
        plan.last_file_offset = plan.last_file_offset.max(last);
        let count = h.descriptor_count.get() as usize;
        let mut sector = descriptor_sectors(count).unwrap_or(usize::MAX);
        for i in 0..count {
            let at = 64 + i * 32;
            let d = bytes
                .get(at..at + 32)
                .and_then(|b| fmt::LogDescriptor::read_from_bytes(b).ok())
                .ok_or_else(|| bad(format!("entry {}: descriptors run out of it", e.sequence)))?;
            if d.sequence_number.get() != e.sequence {
                return Err(bad(format!("entry {}: descriptor of entry {}", e.sequence, d.sequence_number)));
            }
            let offset = d.file_offset.get();
            let length = match &d.signature {
                b"zero" => u64::from_le_bytes(d.leading_bytes),
                b"desc" => SECTOR as u64,
                _ => return Err(bad(format!("entry {}: unknown descriptor", e.sequence))),
            };
            let end = offset.checked_add(length).filter(|&end| end <= plan.last_file_offset);
            if offset % SECTOR as u64 != 0
                || length % SECTOR as u64 != 0
                || offset < fmt::REGION_TABLE_OFFSETS[0]
                || end.is_none()
                || range.overlaps(offset, length)
            {
                return Err(bad(format!("entry {}: update of {length:#x} bytes at {offset:#x}", e.sequence)));
            }
            if d.signature == *b"zero" {
                plan.updates.push(Update::Zero { offset, length });
                continue;
            }
            let data = bytes
                .get(sector * SECTOR..(sector + 1) * SECTOR)
                .and_then(|b| fmt::LogDataSector::ref_from_bytes(b).ok())
                .ok_or_else(|| bad(format!("entry {}: data sectors run out of it", e.sequence)))?;
            sector += 1;
            let sequence = u64::from(data.sequence_high.get()) << 32 | u64::from(data.sequence_low.get());
            if data.signature != *b"data" || sequence != e.sequence {
                return Err(bad(format!("entry {}: a data sector is torn", e.sequence)));
            }
            let mut page = Vec::with_capacity(SECTOR);
            page.extend_from_slice(&d.leading_bytes);
            page.extend_from_slice(&data.data);
            page.extend_from_slice(&d.trailing_bytes);
            plan.updates.push(Update::Data { offset, page: page.into() });
        }
    }
    if flushed > file_length {
        return Err(bad(format!(
            "the file has been truncated: {file_length:#x} bytes, but had {flushed:#x} when logged"
        )));
    }
    let _ = last;
    Ok(plan)
}

impl Plan {
    pub fn is_empty(&self) -> bool {
        self.updates.is_empty()
    }

    /// Writes the updates to the file and makes them durable.
    pub fn apply(&self, storage: &dyn Storage) -> Result<()> {
        if self.is_empty() {
            return Ok(());
        }
        let io = |e| Error::io(storage.path(), "replay the log")(e);
        if storage.length().map_err(io)? < self.last_file_offset {
            storage.set_length(self.last_file_offset).map_err(io)?;
        }
        for u in &self.updates {
            match u {
                Update::Zero { offset, length } => storage.punch(*offset, *length),
                Update::Data { offset, page } => storage.write_at(page, *offset),
            }
            .map_err(io)?;
        }
        storage.sync().map_err(io)
    }

    /// The updates as pages to lay over the file.
    pub fn into_pages(self, storage: &dyn Storage) -> Result<BTreeMap<u64, Box<[u8]>>> {
        let mut pages = BTreeMap::new();
        let mut zeros = 0;
        for u in self.updates {
            match u {
                Update::Data { offset, page } => {
                    pages.insert(offset, page);
                }
                Update::Zero { offset, length } => {
                    zeros += length;
                    if zeros > super::region::MAX_LOG {
                        return Err(Error::NeedsRepair {
                            path: storage.path().to_path_buf(),
                            detail: "the log zeroes much of the file; open it for writing once, to replay it".into(),
                        });
                    }
                    for at in (offset..offset + length).step_by(SECTOR) {
                        pages.insert(at, vec![0; SECTOR].into());
                    }
                }
            }
        }
        Ok(pages)
    }
}

/// The bytes that an entry with this many updated pages takes.
pub(crate) fn entry_length(pages: usize) -> usize {
    ((64 + pages * 32).div_ceil(SECTOR) + pages) * SECTOR
}

/// What an entry says besides its updates.
pub(crate) struct EntryInfo {
    pub sequence: u64,
    pub tail: u64,
    pub guid: Uuid,
    pub flushed_file_offset: u64,
    pub last_file_offset: u64,
}

/// Writes an entry into `out`, which is zero and has [`entry_length`] bytes. Pages are (file offset, 4096 bytes).
pub(crate) fn encode_entry<'a>(
    info: &EntryInfo,
    pages: impl ExactSizeIterator<Item = (u64, &'a [u8])>,
    out: &mut [u8],
) {
    let count = pages.len();
    assert_eq!(out.len(), entry_length(count), "the caller sizes the entry");
    let first = (64 + count * 32).div_ceil(SECTOR);
    let (high, low) = ((info.sequence >> 32) as u32, info.sequence as u32);
    for (i, (offset, page)) in pages.enumerate() {
        let mut d = fmt::LogDescriptor {
            signature: *b"desc",
            trailing_bytes: [0; 4],
            leading_bytes: [0; 8],
            file_offset: offset.into(),
            sequence_number: info.sequence.into(),
        };
        d.leading_bytes.copy_from_slice(&page[..8]);
        d.trailing_bytes.copy_from_slice(&page[4092..4096]);
        out[64 + i * 32..96 + i * 32].copy_from_slice(d.as_bytes());
        let s = &mut out[(first + i) * SECTOR..(first + i + 1) * SECTOR];
        s[..4].copy_from_slice(b"data");
        s[4..8].copy_from_slice(&high.to_le_bytes());
        s[8..4092].copy_from_slice(&page[8..4092]);
        s[4092..].copy_from_slice(&low.to_le_bytes());
    }
    let h = fmt::LogEntryHeader {
        signature: *b"loge",
        checksum: 0.into(),
        entry_length: (out.len() as u32).into(),
        tail: (info.tail as u32).into(),
        sequence_number: info.sequence.into(),
        descriptor_count: (count as u32).into(),
        reserved: 0.into(),
        log_guid: info.guid.into(),
        flushed_file_offset: info.flushed_file_offset.into(),
        last_file_offset: info.last_file_offset.into(),
    };
    out[..64].copy_from_slice(h.as_bytes());
    let sum = crc32c::crc32c(out);
    out[4..8].copy_from_slice(&sum.to_le_bytes());
}
