//! The region tables (MS-VHDX 2.2.3).

use uuid::Uuid;
use zerocopy::{FromBytes, IntoBytes};

use super::header::{HeaderState, checksum};
use crate::error::{Error, Result, Structure};
use crate::format::vhdx as fmt;
use crate::storage::Storage;

/// A range of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Range {
    pub offset: u64,
    pub length: u64,
}

impl Range {
    pub fn end(&self) -> u64 {
        self.offset + self.length
    }
    pub fn overlaps(&self, offset: u64, length: u64) -> bool {
        offset < self.end() && self.offset < offset.saturating_add(length)
    }
}

/// Where everything is that is not payload.
#[derive(Debug, Clone)]
pub(crate) struct Regions {
    pub bat: Range,
    pub metadata: Range,
    pub log: Range,
    /// Everything above, the header section and regions that we do not know: no block may lie there.
    pub reserved: Vec<Range>,
    /// The table's entries as they are, for writing it again.
    pub entries: Vec<fmt::RegionTableEntry>,
    /// How many of the two tables are valid.
    pub valid_tables: usize,
}

/// Logs above this are refused: Hyper-V makes 1 MiB, others a few.
pub(crate) const MAX_LOG: u64 = 64 << 20;

impl Regions {
    pub fn read(storage: &dyn Storage, header: &HeaderState, file_length: u64) -> Result<Self> {
        let mut good: Option<Vec<fmt::RegionTableEntry>> = None;
        let mut valid_tables = 0;
        let mut problems = Vec::new();
        for (i, &at) in fmt::REGION_TABLE_OFFSETS.iter().enumerate() {
            let mut buf = vec![0; fmt::REGION_TABLE_SIZE];
            if let Err(e) = storage.read_at(&mut buf, at) {
                if e.kind() != std::io::ErrorKind::UnexpectedEof {
                    return Err(Error::io(storage.path(), "read the region table")(e));
                }
                problems.push(format!("table {}: the file ends before it", i + 1));
                continue;
            }
            match parse_table(&buf) {
                Ok(entries) => {
                    valid_tables += 1;
                    good.get_or_insert(entries);
                }
                Err(e) => problems.push(format!("table {}: {e}", i + 1)),
            }
        }
        let entries = good.ok_or_else(|| Error::malformed(Structure::RegionTable, problems.join("; ")))?;
        let log = log_range(header, file_length)?;
        let mut reserved = vec![Range { offset: 0, length: fmt::MIB }, log];
        let (mut bat, mut metadata) = (None, None);
        for e in &entries {
            let guid: Uuid = e.guid.into();
            let range = Range { offset: e.file_offset.get(), length: u64::from(e.length.get()) };
            check_range(range, file_length)
                .map_err(|m| Error::malformed(Structure::RegionTable, format!("region {guid}: {m}")))?;
            if let Some(other) = reserved.iter().find(|r| r.overlaps(range.offset, range.length)) {
                return Err(Error::malformed(
                    Structure::RegionTable,
                    format!("region {guid} at {:#x} overlaps what is at {:#x}", range.offset, other.offset),
                ));
            }
            reserved.push(range);
            let slot = match guid {
                fmt::REGION_BAT => &mut bat,
                fmt::REGION_METADATA => &mut metadata,
                _ if e.required.get() & 1 != 0 => {
                    return Err(Error::Unsupported(format!("the file needs region {guid}, which is unknown here")));
                }
                _ => continue,
            };
            if slot.replace(range).is_some() {
                return Err(Error::malformed(Structure::RegionTable, format!("region {guid} is there twice")));
            }
        }
        let need = |r: Option<Range>, what| {
            r.ok_or_else(|| Error::malformed(Structure::RegionTable, format!("there is no {what} region")))
        };
        Ok(Self { bat: need(bat, "BAT")?, metadata: need(metadata, "metadata")?, log, reserved, entries, valid_tables })
    }
}

/// The log's place, from the header.
pub(crate) fn log_range(header: &HeaderState, file_length: u64) -> Result<Range> {
    let log = Range { offset: header.header.log_offset.get(), length: u64::from(header.header.log_length.get()) };
    check_range(log, file_length).map_err(|m| Error::malformed(Structure::Header, format!("log: {m}")))?;
    if log.length > MAX_LOG {
        return Err(Error::Unsupported(format!("a log of {} bytes; at most {MAX_LOG} are taken", log.length)));
    }
    Ok(log)
}

fn check_range(r: Range, file_length: u64) -> std::result::Result<(), String> {
    if !r.offset.is_multiple_of(fmt::MIB) || !r.length.is_multiple_of(fmt::MIB) || r.offset < fmt::MIB || r.length == 0
    {
        return Err(format!("offset {:#x}, length {:#x}: not multiples of 1 MiB from 1 MiB on", r.offset, r.length));
    }
    match r.offset.checked_add(r.length) {
        Some(end) if end <= file_length => Ok(()),
        _ => Err(format!("offset {:#x}, length {:#x} is not inside the file of {file_length:#x}", r.offset, r.length)),
    }
}

fn parse_table(buf: &[u8]) -> std::result::Result<Vec<fmt::RegionTableEntry>, String> {
    let (h, rest) = fmt::RegionTableHeader::read_from_prefix(buf).map_err(|_| "too short".to_string())?;
    if h.signature != *b"regi" {
        return Err("no `regi` signature".into());
    }
    let sum = checksum(buf, 4);
    if sum != h.checksum.get() {
        return Err(format!("checksum {:#010x}, computed {sum:#010x}", h.checksum));
    }
    let n = h.entry_count.get();
    if n > fmt::MAX_TABLE_ENTRIES {
        return Err(format!("{n} entries, at most {} are allowed", fmt::MAX_TABLE_ENTRIES));
    }
    let (entries, _) = <[fmt::RegionTableEntry]>::ref_from_prefix_with_elems(rest, n as usize)
        .map_err(|_| "entries run out of the table".to_string())?;
    Ok(entries.to_vec())
}

/// The 64 KiB of a region table, with its checksum.
pub(crate) fn encode_table(entries: &[fmt::RegionTableEntry]) -> Vec<u8> {
    let h = fmt::RegionTableHeader {
        signature: *b"regi",
        checksum: 0.into(),
        entry_count: (entries.len() as u32).into(),
        reserved: 0.into(),
    };
    let mut buf = Vec::with_capacity(fmt::REGION_TABLE_SIZE);
    buf.extend_from_slice(h.as_bytes());
    buf.extend_from_slice(entries.as_bytes());
    buf.resize(fmt::REGION_TABLE_SIZE, 0);
    let sum = crc32c::crc32c(&buf);
    buf[4..8].copy_from_slice(&sum.to_le_bytes());
    buf
}
