//! The configuration blob (see `crates/bios/src/blob.rs`, which writes it).

use alloc::string::String;
use core::slice;
use uefi_core::bytes::{u32_at, u64_at};

/// Where the blob is.
pub const BLOB: u64 = 0x70_9000;
/// Largest blob.
const MAX_BLOB: u32 = 0x20_0000;

/// Record types: those of them that the firmware reads.
pub mod kind {
    pub const MEMORY_MAP: u32 = 0x03;
    pub const FLAGS: u32 = 0x12;
    pub const ACPI_TABLE: u32 = 0x16;
    pub const SMBIOS: u32 = 0x5600_0002;
    pub const FRAME_BUFFER: u32 = 0x5600_0000;
    pub const NAME: u32 = 0x5600_0001;
    pub const BOOT_FIRST: u32 = 0x5600_0003;
}

/// Flags of [`kind::FLAGS`]: those that the firmware heeds.
pub mod flags {
    pub const SERIAL: u64 = 1 << 0;
    pub const PAUSE_AFTER_BOOT_FAILURE: u64 = 1 << 1;
}

/// Bytes of the blob, rounded up to pages.
pub fn blob_pages() -> u64 {
    u64::from(blob().len() as u32).div_ceil(4096)
}

fn blob() -> &'static [u8] {
    // SAFETY: the host put the blob there before the firmware started; the pages are reserved in the memory map, and
    // nobody writes them. The first record is in the first page.
    let head = unsafe { slice::from_raw_parts(BLOB as *const u8, 16) };
    let len = u32_at(head, 12).unwrap_or(0).clamp(16, MAX_BLOB) as usize;
    // SAFETY: as above, for the size that the host says.
    unsafe { slice::from_raw_parts(BLOB as *const u8, len) }
}

/// The data of all records of a type.
pub fn records(kind: u32) -> impl Iterator<Item = &'static [u8]> {
    let mut rest = blob();
    core::iter::from_fn(move || {
        loop {
            let len = u32_at(rest, 4)? as usize;
            let (record, tail) = rest.split_at_checked(len)?;
            if len < 8 {
                return None;
            }
            rest = tail;
            if u32_at(record, 0) == Some(kind) {
                return Some(&record[8..]);
            }
        }
    })
}

/// Data of the first record of a type.
pub fn record(kind: u32) -> Option<&'static [u8]> {
    records(kind).next()
}

/// The flags.
pub fn flags() -> u64 {
    record(kind::FLAGS).and_then(|d| u64_at(d, 0)).unwrap_or(0)
}

/// Memory ranges: address, bytes, flags (bit 0: reserved).
pub fn memory_ranges() -> impl Iterator<Item = (u64, u64, u32)> {
    let map = record(kind::MEMORY_MAP).unwrap_or(&[]);
    map.chunks_exact(24).filter_map(|r| Some((u64_at(r, 0)?, u64_at(r, 8)?, u32_at(r, 16)?))).filter(|r| r.1 != 0)
}

/// A record that holds a terminated string.
pub fn text(kind: u32) -> Option<String> {
    let d = record(kind)?;
    let end = d.iter().position(|b| *b == 0).unwrap_or(d.len());
    Some(String::from_utf8_lossy(&d[..end]).into_owned())
}
