//! The metadata region (MS-VHDX 2.6): a table and the items that it points to.

use uuid::Uuid;
use zerocopy::{FromBytes, IntoBytes};

use super::locator::ParentLocator;
use super::region::Range;
use crate::error::{Error, Result, Structure};
use crate::format::vhdx as fmt;
use crate::storage::Storage;

/// An item that is not one of ours: the user's, or the system's but not required. Kept through conversions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Item {
    pub id: Uuid,
    pub flags: u32,
    pub data: Vec<u8>,
}

/// What the metadata region says.
#[derive(Debug, Clone)]
pub(crate) struct Metadata {
    pub block_size: u32,
    pub fixed: bool,
    pub size: u64,
    pub disk_id: Uuid,
    pub logical_sector: u32,
    pub physical_sector: u32,
    pub parent: Option<ParentLocator>,
    pub extra: Vec<Item>,
    /// File offset of the virtual disk size item, which resizing changes in place (through the log).
    pub size_at: u64,
    /// File offset of the virtual disk id item.
    pub disk_id_at: u64,
}

/// All extra items together may take this much memory.
const MAX_EXTRA: u64 = 32 << 20;

impl Metadata {
    /// Payload blocks.
    pub fn blocks(&self) -> u64 {
        self.size.div_ceil(u64::from(self.block_size))
    }
    /// Payload blocks that share a sector bitmap block (2.5: chunk ratio).
    pub fn chunk_ratio(&self) -> u64 {
        fmt::SECTORS_PER_CHUNK * u64::from(self.logical_sector) / u64::from(self.block_size)
    }
    /// Entries of the BAT, with those of sector bitmap blocks (2.5).
    pub fn bat_entries(&self) -> u64 {
        bat_entries(self.blocks(), self.chunk_ratio(), self.parent.is_some())
    }

    pub fn read(storage: &dyn Storage, region: Range) -> Result<Self> {
        let bad = |m: String| Error::malformed(Structure::Metadata, m);
        let mut table = vec![0; fmt::METADATA_TABLE_SIZE];
        storage.read_at(&mut table, region.offset).map_err(Error::io(storage.path(), "read the metadata table"))?;
        let (h, rest) =
            fmt::MetadataTableHeader::ref_from_prefix(&table).map_err(|_| bad("the table is too short".into()))?;
        if h.signature != *b"metadata" {
            return Err(bad("no `metadata` signature".into()));
        }
        let n = u32::from(h.entry_count.get());
        if n > fmt::MAX_TABLE_ENTRIES {
            return Err(bad(format!("{n} entries, at most {} are allowed", fmt::MAX_TABLE_ENTRIES)));
        }
        let (entries, _) = <[fmt::MetadataTableEntry]>::ref_from_prefix_with_elems(rest, n as usize)
            .map_err(|_| bad("entries run out of the table".into()))?;
        let mut items = Items::default();
        let mut used: Vec<(u64, u64)> = Vec::new();
        let mut seen = std::collections::HashSet::new();
        let mut extra_bytes = 0;
        for e in entries {
            let id: Uuid = e.item_id.into();
            let user = e.flags.get() & fmt::METADATA_IS_USER;
            if !seen.insert((id, user)) {
                return Err(bad(format!("item {id} is there twice")));
            }
            let (offset, length) = (u64::from(e.offset.get()), u64::from(e.length.get()));
            if length != 0 {
                if offset < fmt::METADATA_TABLE_SIZE as u64 || length > fmt::MIB || offset + length > region.length {
                    return Err(bad(format!("item {id}: offset {offset:#x}, length {length:#x} is not in the region")));
                }
                used.push((offset, offset + length));
            } else if offset != 0 {
                return Err(bad(format!("item {id}: empty, but with offset {offset:#x}")));
            }
            let known = user == 0 && KNOWN.contains(&id);
            if !known {
                if e.flags.get() & fmt::METADATA_IS_REQUIRED != 0 {
                    return Err(Error::Unsupported(format!(
                        "the file needs metadata item {id}, which is unknown here"
                    )));
                }
                extra_bytes += length;
                if extra_bytes > MAX_EXTRA {
                    return Err(Error::Unsupported(format!("more than {MAX_EXTRA} bytes of unknown metadata")));
                }
            }
            let mut data = vec![0; length as usize];
            storage
                .read_at(&mut data, region.offset + offset)
                .map_err(Error::io(storage.path(), "read a metadata item"))?;
            let item = Item { id, flags: e.flags.get(), data };
            if known { items.put(item, region.offset + offset) } else { items.extra.push(item) }
        }
        used.sort_unstable();
        if used.windows(2).any(|w| w[0].1 > w[1].0) {
            return Err(bad("items overlap".into()));
        }
        items.finish()
    }
}

/// Entries of a BAT (MS-VHDX 2.5).
pub(crate) fn bat_entries(blocks: u64, chunk_ratio: u64, differencing: bool) -> u64 {
    if differencing {
        blocks.div_ceil(chunk_ratio) * (chunk_ratio + 1)
    } else {
        blocks + blocks.saturating_sub(1) / chunk_ratio
    }
}

const KNOWN: [Uuid; 6] = [
    fmt::ITEM_FILE_PARAMETERS,
    fmt::ITEM_VIRTUAL_DISK_SIZE,
    fmt::ITEM_VIRTUAL_DISK_ID,
    fmt::ITEM_LOGICAL_SECTOR_SIZE,
    fmt::ITEM_PHYSICAL_SECTOR_SIZE,
    fmt::ITEM_PARENT_LOCATOR,
];

#[derive(Default)]
struct Items {
    known: Vec<(Item, u64)>,
    extra: Vec<Item>,
}

impl Items {
    fn put(&mut self, item: Item, at: u64) {
        self.known.push((item, at));
    }

    fn get(&self, id: Uuid, what: &str, len: usize) -> Result<(&[u8], u64)> {
        let (item, at) =
            self.known.iter().find(|(i, _)| i.id == id).ok_or_else(|| {
                Error::malformed(Structure::Metadata, format!("the required item \"{what}\" is missing"))
            })?;
        if item.data.len() != len {
            return Err(Error::malformed(
                Structure::Metadata,
                format!("the item \"{what}\" has {} bytes, expected {len}", item.data.len()),
            ));
        }
        Ok((&item.data, *at))
    }

    fn get_u32(&self, id: Uuid, what: &str) -> Result<u32> {
        let (d, _) = self.get(id, what, 4)?;
        Ok(u32::from_le_bytes([d[0], d[1], d[2], d[3]]))
    }

    fn finish(self) -> Result<Metadata> {
        let bad = |m: String| Err(Error::malformed(Structure::Metadata, m));
        let (params, _) = self.get(fmt::ITEM_FILE_PARAMETERS, "file parameters", 8)?;
        let block_size = u32::from_le_bytes([params[0], params[1], params[2], params[3]]);
        let flags = u32::from_le_bytes([params[4], params[5], params[6], params[7]]);
        if !block_size.is_power_of_two() || !(1 << 20..=256 << 20).contains(&block_size) {
            return bad(format!("block size {block_size}: expected a power of two from 1 MiB to 256 MiB"));
        }
        let logical_sector = self.get_u32(fmt::ITEM_LOGICAL_SECTOR_SIZE, "logical sector size")?;
        let physical_sector = self.get_u32(fmt::ITEM_PHYSICAL_SECTOR_SIZE, "physical sector size")?;
        for (s, what) in [(logical_sector, "logical"), (physical_sector, "physical")] {
            if s != 512 && s != 4096 {
                return bad(format!("{what} sector size {s}: expected 512 or 4096"));
            }
        }
        let (size, size_at) = self.get(fmt::ITEM_VIRTUAL_DISK_SIZE, "virtual disk size", 8)?;
        let size = u64::from_le_bytes(size.try_into().expect("eight bytes"));
        if size == 0 || size > fmt::MAX_DISK_SIZE || size % u64::from(logical_sector) != 0 {
            return bad(format!("disk size {size}: expected a multiple of {logical_sector} up to 64 TiB"));
        }
        let (id, disk_id_at) = self.get(fmt::ITEM_VIRTUAL_DISK_ID, "virtual disk id", 16)?;
        let disk_id = Uuid::from_bytes_le(id.try_into().expect("sixteen bytes"));
        let parent = if flags & fmt::HAS_PARENT != 0 {
            let found = self.known.iter().find(|(i, _)| i.id == fmt::ITEM_PARENT_LOCATOR);
            let Some((item, _)) = found else {
                return bad("a differencing image without a parent locator".into());
            };
            Some(ParentLocator::parse(&item.data)?)
        } else {
            None
        };
        let fixed = flags & fmt::LEAVE_BLOCKS_ALLOCATED != 0;
        Ok(Metadata {
            block_size,
            fixed,
            size,
            disk_id,
            logical_sector,
            physical_sector,
            parent,
            size_at,
            disk_id_at,
            extra: self.extra,
        })
    }
}

/// Puts other data into an item without touching what is there: writes it to free space of the region, durably, and
/// gives the 4 KiB of the table that must be changed for it to count, with their file offset.
pub(crate) fn replace_item(storage: &dyn Storage, region: Range, id: Uuid, data: &[u8]) -> Result<(u64, Vec<u8>)> {
    let io = |e| Error::io(storage.path(), "write a metadata item")(e);
    let mut table = vec![0; fmt::METADATA_TABLE_SIZE];
    storage.read_at(&mut table, region.offset).map_err(io)?;
    let count = usize::from(u16::from_le_bytes([table[10], table[11]]));
    let entry = |i: usize| fmt::MetadataTableEntry::read_from_bytes(&table[32 + i * 32..64 + i * 32]);
    let mut used = Vec::new();
    let mut found = None;
    for i in 0..count {
        let Ok(e) = entry(i) else { continue };
        if Uuid::from(e.item_id) == id && e.flags.get() & fmt::METADATA_IS_USER == 0 {
            found = Some((i, e.clone()));
        }
        used.push((u64::from(e.offset.get()), u64::from(e.offset.get()) + u64::from(e.length.get())));
    }
    let Some((index, mut e)) = found else {
        return Err(Error::malformed(Structure::Metadata, format!("there is no item {id}")));
    };
    used.sort_unstable();
    let mut at = fmt::METADATA_TABLE_SIZE as u64;
    for (start, end) in used {
        if at + data.len() as u64 <= start {
            break;
        }
        at = at.max(end.next_multiple_of(8));
    }
    if at + data.len() as u64 > region.length {
        return Err(Error::Unsupported("the metadata region is full; convert the image to a new file".into()));
    }
    storage.write_at(data, region.offset + at).and_then(|()| storage.sync()).map_err(io)?;
    e.offset = (at as u32).into();
    e.length = (data.len() as u32).into();
    table[32 + index * 32..64 + index * 32].copy_from_slice(e.as_bytes());
    let page = (32 + index * 32) / 4096 * 4096;
    Ok((region.offset + page as u64, table[page..page + 4096].to_vec()))
}

/// Writes a whole metadata region (1 MiB) for a new file.
pub(crate) fn encode(m: &Metadata) -> Result<Vec<u8>> {
    let mut items: Vec<Item> = Vec::new();
    let virt = fmt::METADATA_IS_REQUIRED | fmt::METADATA_IS_VIRTUAL_DISK;
    let mut put = |id, flags, data: &[u8]| items.push(Item { id, flags, data: data.to_vec() });
    let flags =
        if m.fixed { fmt::LEAVE_BLOCKS_ALLOCATED } else { 0 } | if m.parent.is_some() { fmt::HAS_PARENT } else { 0 };
    let params = fmt::FileParameters { block_size: m.block_size.into(), flags: flags.into() };
    put(fmt::ITEM_FILE_PARAMETERS, fmt::METADATA_IS_REQUIRED, params.as_bytes());
    put(fmt::ITEM_VIRTUAL_DISK_SIZE, virt, &m.size.to_le_bytes());
    put(fmt::ITEM_VIRTUAL_DISK_ID, virt, &m.disk_id.to_bytes_le());
    put(fmt::ITEM_LOGICAL_SECTOR_SIZE, virt, &m.logical_sector.to_le_bytes());
    put(fmt::ITEM_PHYSICAL_SECTOR_SIZE, virt, &m.physical_sector.to_le_bytes());
    if let Some(p) = &m.parent {
        put(fmt::ITEM_PARENT_LOCATOR, fmt::METADATA_IS_REQUIRED, &p.encode()?);
    }
    items.extend(m.extra.iter().cloned());
    if items.len() > fmt::MAX_TABLE_ENTRIES as usize {
        return Err(Error::Parameter(format!(
            "{} metadata items; at most {} fit",
            items.len(),
            fmt::MAX_TABLE_ENTRIES
        )));
    }
    let total: usize = items.iter().map(|i| i.data.len().next_multiple_of(8)).sum();
    let len = (fmt::METADATA_TABLE_SIZE + total).next_multiple_of(fmt::MIB as usize);
    let mut out = vec![0; len];
    let h = fmt::MetadataTableHeader {
        signature: *b"metadata",
        reserved: 0.into(),
        entry_count: (items.len() as u16).into(),
        reserved2: [0.into(); 5],
    };
    out[..32].copy_from_slice(h.as_bytes());
    let mut at = fmt::METADATA_TABLE_SIZE;
    for (i, item) in items.iter().enumerate() {
        let e = fmt::MetadataTableEntry {
            item_id: item.id.into(),
            offset: if item.data.is_empty() { 0 } else { at as u32 }.into(),
            length: (item.data.len() as u32).into(),
            flags: item.flags.into(),
            reserved: 0.into(),
        };
        out[32 + i * 32..64 + i * 32].copy_from_slice(e.as_bytes());
        out[at..at + item.data.len()].copy_from_slice(&item.data);
        at += item.data.len().next_multiple_of(8);
    }
    Ok(out)
}
