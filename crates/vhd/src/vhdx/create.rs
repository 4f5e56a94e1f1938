//! Laying out a new VHDX.

use uuid::Uuid;

use super::header::encode as encode_header;
use super::metadata::{self, Item, Metadata};
use super::region::encode_table;
use crate::error::{Error, Result};
use crate::format::vhdx as fmt;
use crate::storage::Storage;
use crate::vhdx::locator::ParentLocator;

/// What a new VHDX shall be. The parameters have been checked by [`validate`].
#[derive(Debug, Clone)]
pub(crate) struct NewVhdx {
    pub size: u64,
    pub block_size: u32,
    pub logical_sector: u32,
    pub physical_sector: u32,
    pub fixed: bool,
    pub parent: Option<ParentLocator>,
    pub disk_id: Uuid,
    pub data_write_guid: Uuid,
    pub extra: Vec<Item>,
}

/// Checks what a caller asks for.
pub(crate) fn validate(n: &NewVhdx) -> Result<()> {
    let bad = |m: String| Err(Error::Parameter(m));
    if !n.block_size.is_power_of_two() || !(1 << 20..=256 << 20).contains(&n.block_size) {
        return bad(format!("block size {}: a VHDX takes powers of two from 1 MiB to 256 MiB", n.block_size));
    }
    for s in [n.logical_sector, n.physical_sector] {
        if s != 512 && s != 4096 {
            return bad(format!("sector size {s}: a VHDX takes 512 and 4096"));
        }
    }
    if n.size == 0 || n.size > fmt::MAX_DISK_SIZE || !n.size.is_multiple_of(u64::from(n.logical_sector)) {
        return bad(format!("size {}: a VHDX takes multiples of {} bytes up to 64 TiB", n.size, n.logical_sector));
    }
    Ok(())
}

/// Log sizes: Hyper-V's for most; larger where commits have many pages (sector bitmaps, BATs of huge disks).
fn log_length(n: &NewVhdx, bat_entries: u64) -> u64 {
    if n.parent.is_some() || bat_entries > 1 << 16 { 4 << 20 } else { 1 << 20 }
}

/// Writes all structures into an empty file and makes them durable.
pub(crate) fn create(storage: &dyn Storage, n: &NewVhdx) -> Result<()> {
    validate(n)?;
    let meta = Metadata {
        block_size: n.block_size,
        fixed: n.fixed,
        size: n.size,
        disk_id: n.disk_id,
        logical_sector: n.logical_sector,
        physical_sector: n.physical_sector,
        parent: n.parent.clone(),
        extra: n.extra.clone(),
        size_at: 0,
        disk_id_at: 0,
    };
    let region = metadata::encode(&meta)?;
    let entries = meta.bat_entries();
    let log = (fmt::MIB, log_length(n, entries));
    let metadata_at = (log.0 + log.1, region.len() as u64);
    let bat_at = (metadata_at.0 + metadata_at.1, (entries * 8).next_multiple_of(fmt::MIB));
    let data = bat_at.0 + bat_at.1;
    let blocks = if n.fixed { meta.blocks() } else { 0 };
    let io = |e| Error::io(storage.path(), "create the image")(e);
    storage.set_length(data + blocks * u64::from(n.block_size)).map_err(io)?;

    let mut id = [0u8; 520];
    id[..8].copy_from_slice(&fmt::FILE_SIGNATURE);
    let creator = concat!("Viridian ", env!("CARGO_PKG_VERSION"));
    for (i, u) in creator.encode_utf16().take(255).enumerate() {
        id[8 + i * 2..10 + i * 2].copy_from_slice(&u.to_le_bytes());
    }
    storage.write_at(&id, 0).map_err(io)?;
    let table = encode_table(&[
        fmt::RegionTableEntry {
            guid: fmt::REGION_BAT.into(),
            file_offset: bat_at.0.into(),
            length: (bat_at.1 as u32).into(),
            required: 1.into(),
        },
        fmt::RegionTableEntry {
            guid: fmt::REGION_METADATA.into(),
            file_offset: metadata_at.0.into(),
            length: (metadata_at.1 as u32).into(),
            required: 1.into(),
        },
    ]);
    for at in fmt::REGION_TABLE_OFFSETS {
        storage.write_at(&table, at).map_err(io)?;
    }
    storage.write_at(&region, metadata_at.0).map_err(io)?;
    if n.fixed {
        write_fixed_bat(storage, &meta, bat_at.0, data).map_err(io)?;
    }
    for (i, at) in fmt::HEADER_OFFSETS.into_iter().enumerate() {
        let mut h = fmt::Header {
            signature: *b"head",
            checksum: 0.into(),
            sequence_number: (i as u64 + 1).into(),
            file_write_guid: Uuid::new_v4().into(),
            data_write_guid: n.data_write_guid.into(),
            log_guid: Uuid::nil().into(),
            log_version: 0.into(),
            version: 1.into(),
            log_length: (log.1 as u32).into(),
            log_offset: log.0.into(),
        };
        storage.write_at(&encode_header(&mut h), at).map_err(io)?;
    }
    storage.sync().map_err(io)
}

/// Every block is present, one after the other.
fn write_fixed_bat(storage: &dyn Storage, meta: &Metadata, bat: u64, data: u64) -> std::io::Result<()> {
    let ratio = meta.chunk_ratio();
    let mut buf = Vec::with_capacity(1 << 20);
    let mut at = bat;
    for b in 0..meta.blocks() {
        if b != 0 && b % ratio == 0 {
            buf.extend_from_slice(&[0; 8]);
        }
        let entry = (data + b * u64::from(meta.block_size)) | fmt::BLOCK_FULLY_PRESENT;
        buf.extend_from_slice(&entry.to_le_bytes());
        if buf.len() >= 1 << 20 {
            storage.write_at(&buf, at)?;
            at += buf.len() as u64;
            buf.clear();
        }
    }
    storage.write_at(&buf, at)
}
