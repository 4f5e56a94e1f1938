//! Growing and shrinking, of closed images and of disks in use.

use std::path::Path;
use std::sync::Arc;

use zerocopy::IntoBytes;

use super::Progress;
use super::convert::{Rebuild, rebuild};
use crate::disk::{Disk, Io, OpenOptions};
use crate::error::{Error, RequestError, Result};
use crate::format::{vhd as vhd_fmt, vhdx as fmt};
use crate::image::{self, DiskType, Format};
use crate::state::Extent;
use crate::state::map::{Block, Flavor};
use crate::storage::Storage;
use crate::vhd::{self, VhdFile};
use crate::vhdx::metadata::bat_entries;
use crate::vhdx::region::encode_table;
use crate::vhdx::{VhdxFile, transact};

impl Disk {
    /// Changes the size while the disk is in use. Shrinking is refused below [`Disk::minimum_size`] unless `force`.
    pub fn resize(&self, size: u64, force: bool) -> Result<()> {
        let sector = u64::from(self.info().logical_sector_size);
        if size == 0 || size % sector != 0 {
            return Err(Error::Parameter(format!("size {size}: expected a multiple of {sector} bytes")));
        }
        if size < self.size() && !force {
            let least = self.minimum_size()?;
            if size < least {
                return Err(Error::Parameter(format!(
                    "{size} bytes would cut off data: the smallest safe size is {least} bytes"
                )));
            }
        }
        if size == self.size() {
            return Ok(());
        }
        let format = self.info().format;
        self.with_closed_image(|storage| resize_file(storage, format, size, true))
    }

    /// The smallest size that loses nothing: the end of the last partition, or without partitions of the last data.
    pub fn minimum_size(&self) -> std::result::Result<u64, RequestError> {
        let sector = u64::from(self.info().logical_sector_size);
        let size = self.size();
        let mut first = vec![0; (2 * sector).min(size) as usize];
        self.read_at(0, &mut first)?;
        if let Some(end) = self.partitions_end(&first, sector)? {
            return Ok(end.min(size).max(sector));
        }
        let (mut pos, mut last) = (0, sector);
        while pos < size {
            let (extent, n) = self.extent(pos)?;
            if extent == Extent::Data {
                last = pos + n;
            }
            pos += n;
        }
        Ok(last.next_multiple_of(sector).min(size))
    }

    /// The end of the last partition of an MBR or GPT disk.
    fn partitions_end(&self, first: &[u8], sector: u64) -> std::result::Result<Option<u64>, RequestError> {
        if first.len() < 512 || first[510..512] != [0x55, 0xaa] {
            return Ok(None);
        }
        let (mut end, mut protective, mut any) = (0u64, false, false);
        for e in first[446..510].as_chunks::<16>().0 {
            let (start, count) = (le32(&e[8..]), le32(&e[12..]));
            protective |= e[4] == 0xee;
            if e[4] != 0 && count != 0 {
                any = true;
                end = end.max((u64::from(start) + u64::from(count)) * sector);
            }
        }
        let at = sector as usize;
        if !protective || first.len() < at + 92 || &first[at..at + 8] != b"EFI PART" {
            return Ok(any.then_some(end));
        }
        // UEFI 2.10, 5.3.2: the partition array, with the backup of it and of the header behind the last partition.
        let h = &first[at..];
        let (array, count, len) = (le64(&h[72..]), u64::from(le32(&h[80..])), u64::from(le32(&h[84..])));
        if !(128..=4096).contains(&len) || count > 1024 {
            return Ok(None);
        }
        let bytes = (count * len).next_multiple_of(sector);
        let Some(offset) = array.checked_mul(sector).filter(|o| o.saturating_add(bytes) <= self.size()) else {
            return Ok(None);
        };
        let mut table = vec![0; bytes as usize];
        self.read_at(offset, &mut table)?;
        end = (le64(&h[40..])).saturating_mul(sector).min(self.size());
        for e in table[..(count * len) as usize].chunks(len as usize) {
            if e[..16] != [0; 16] {
                end = end.max(le64(&e[40..]).saturating_add(1).saturating_mul(sector));
            }
        }
        Ok(Some(end.saturating_add(bytes + sector)))
    }
}

fn le32(b: &[u8]) -> u32 {
    u32::from_le_bytes([b[0], b[1], b[2], b[3]])
}

fn le64(b: &[u8]) -> u64 {
    u64::from(le32(b)) | u64::from(le32(&b[4..])) << 32
}

/// Changes the size of an image that nobody has open. A dynamic VHD is written anew.
pub fn resize(path: &Path, format: Option<Format>, size: u64, force: bool, progress: Progress<'_>) -> Result<()> {
    let open = OpenOptions { write: true, format, io: Io::Blocking, ..OpenOptions::default() };
    let disk = Disk::open(path, &open)?;
    let info = disk.info();
    if info.format != Format::Vhd || info.disk_type == DiskType::Fixed {
        disk.resize(size, force)?;
        disk.close()?;
        progress(1, 1);
        return Ok(());
    }
    if size % vhd_fmt::SECTOR != 0 || size == 0 {
        return Err(Error::Parameter(format!("size {size}: expected a multiple of 512 bytes")));
    }
    if size < disk.size() && !force {
        let least = disk.minimum_size()?;
        if size < least {
            return Err(Error::Parameter(format!(
                "{size} bytes would cut off data: the smallest safe size is {least} bytes"
            )));
        }
    }
    disk.close()?;
    rebuild(path, Some(Format::Vhd), &Rebuild { size: Some(size), parent: None }, progress)
}

/// The smallest safe size of an image that nobody has open.
pub fn minimum_size(path: &Path, format: Option<Format>) -> Result<u64> {
    let disk = Disk::open(path, &OpenOptions { format, io: Io::Blocking, ..OpenOptions::default() })?;
    Ok(disk.minimum_size()?)
}

/// Changes the size of a closed image in place. `new_identity` says that children made before no longer fit.
pub(crate) fn resize_file(storage: Arc<dyn Storage>, format: Format, size: u64, new_identity: bool) -> Result<()> {
    match format {
        Format::Vhdx => resize_vhdx(storage, size, new_identity),
        Format::Vhd => resize_fixed_vhd(storage, size),
        Format::Raw => {
            storage.set_length(size).and_then(|()| storage.sync()).map_err(Error::io(storage.path(), "set the length"))
        }
        Format::Iso => Err(RequestError::ReadOnly.into()),
    }
}

/// The size is one metadata item, changed through the log; everything it depends on is made durable before, everything
/// that depends on it is cleared after or when it is needed again.
fn resize_vhdx(storage: Arc<dyn Storage>, size: u64, new_identity: bool) -> Result<()> {
    if size > fmt::MAX_DISK_SIZE {
        return Err(Error::Parameter(format!("{size} bytes: a VHDX holds at most 64 TiB")));
    }
    let mut file = VhdxFile::open(storage.clone(), true)?;
    let io = |e| Error::io(storage.path(), "resize the image")(e);
    let (old, m) = (file.meta.size, &file.meta);
    let block = u64::from(m.block_size);
    let (old_blocks, new_blocks) = (old.div_ceil(block), size.div_ceil(block));
    let mut pages: Vec<(u64, Vec<u8>)> = Vec::new();
    let mut length = file.file_length.next_multiple_of(fmt::MIB);
    if size > old {
        clear_last_block(&*storage, &file)?;
        let entries = bat_entries(new_blocks, m.chunk_ratio(), m.parent.is_some());
        let mut bat = file.regions.bat;
        let map = image::vhdx_map(&file);
        let Flavor::Vhdx { chunk_shift } = map.flavor else { return Err(RequestError::Malformed.into()) };
        if entries * 8 > bat.length {
            bat.offset = length;
            bat.length = (entries * 8).next_multiple_of(fmt::MIB);
            length += bat.length;
            storage.set_length(length).map_err(io)?;
            move_bat(&*storage, file.regions.bat.offset, bat.offset, m.bat_entries() * 8).map_err(io)?;
            let mut table = file.regions.entries.clone();
            for e in &mut table {
                if uuid::Uuid::from(e.guid) == fmt::REGION_BAT {
                    e.file_offset = bat.offset.into();
                    e.length = (bat.length as u32).into();
                }
            }
            let bytes = encode_table(&table);
            // Only pages with entries differ; the rest of a table is zero.
            let used = (16 + table.as_bytes().len()).next_multiple_of(4096);
            for at in fmt::REGION_TABLE_OFFSETS {
                pages.extend((0..used).step_by(4096).map(|o| (at + o as u64, bytes[o..o + 4096].to_vec())));
            }
        } else {
            // Entries beyond the old end may hold anything; a sector bitmap's entry among them is in use.
            let mut map = map.clone();
            map.bat_offset = bat.offset;
            let last_bitmap = map.bitmap_entry_at(old_blocks - 1, chunk_shift);
            let (from, to) = (map.entry_at(old_blocks), bat.offset + entries * 8);
            for (a, b) in [(from, last_bitmap.max(from).min(to)), ((last_bitmap + 8).max(from), to)] {
                zero(&*storage, a, b).map_err(io)?;
            }
        }
        if m.fixed {
            let start = length;
            length += (new_blocks - old_blocks) * block;
            storage.set_length(length).map_err(io)?;
            for (i, b) in (old_blocks..new_blocks).enumerate() {
                let at = bat.offset + (b + (b >> chunk_shift)) * 8;
                let entry = (start + i as u64 * block) | fmt::BLOCK_FULLY_PRESENT;
                storage.write_at(&entry.to_le_bytes(), at).map_err(io)?;
            }
        }
        storage.sync().map_err(io)?;
    }
    let at = file.meta.size_at & !4095;
    let mut page = vec![0; 4096];
    storage.read_at(&mut page, at).map_err(io)?;
    let inside = (file.meta.size_at - at) as usize;
    if inside + 8 > 4096 {
        return Err(Error::Unsupported("the size item crosses a page; convert the image to a new file".into()));
    }
    page[inside..inside + 8].copy_from_slice(&size.to_le_bytes());
    pages.push((at, page));
    transact(&*storage, &mut file.header, &pages, length, new_identity)
}

/// What lies behind the end in the last block must read as zeros once the disk has grown over it.
fn clear_last_block(storage: &dyn Storage, file: &VhdxFile) -> Result<()> {
    let map = image::vhdx_map(file);
    let block = map.block_size();
    let inside = file.meta.size % block;
    if inside == 0 {
        return Ok(());
    }
    let io = |e| Error::io(storage.path(), "clear the last block")(e);
    let mut raw = [0; 8];
    storage.read_at(&mut raw, map.entry_at(map.blocks - 1)).map_err(io)?;
    if let Block::Full(at) | Block::Partial(at) = map.decode(u64::from_le_bytes(raw))? {
        storage.punch(at + inside, block - inside).map_err(io)?;
    }
    Ok(())
}

fn move_bat(storage: &dyn Storage, from: u64, to: u64, len: u64) -> std::io::Result<()> {
    let mut at = 0;
    let mut buf = vec![0; 1 << 20];
    while at < len {
        let n = (len - at).min(1 << 20) as usize;
        storage.read_at(&mut buf[..n], from + at)?;
        if buf[..n].iter().any(|&b| b != 0) {
            storage.write_at(&buf[..n], to + at)?;
        }
        at += n as u64;
    }
    Ok(())
}

fn zero(storage: &dyn Storage, from: u64, to: u64) -> std::io::Result<()> {
    if from < to { storage.punch(from, to - from) } else { Ok(()) }
}

fn resize_fixed_vhd(storage: Arc<dyn Storage>, size: u64) -> Result<()> {
    let file = VhdFile::open(storage.clone())?;
    if file.dynamic.is_some() {
        return Err(Error::Unsupported(
            "a dynamic VHD cannot be resized in use; stop the VM, or convert the image to VHDX".into(),
        ));
    }
    if size > vhd_fmt::MAX_DISK_SIZE {
        return Err(Error::Parameter(format!("{size} bytes: a VHD holds at most 2040 GiB")));
    }
    let io = |e| Error::io(storage.path(), "resize the image")(e);
    let mut footer = file.footer.clone();
    footer.current_size = size.into();
    footer.geometry = vhd::geometry(size);
    let bytes = vhd::seal_footer(&mut footer);
    // The file always ends with a footer: growing adds one behind and then clears the old one; shrinking writes one
    // at the new end and then cuts.
    storage.write_at(&bytes, size).and_then(|()| storage.sync()).map_err(io)?;
    if size > file.footer_at {
        storage.write_at(&[0; 512], file.footer_at).map_err(io)?;
    } else {
        storage.set_length(size + 512).map_err(io)?;
    }
    storage.sync().map_err(io)
}
