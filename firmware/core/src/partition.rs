//! Partition tables: GPT (UEFI 2.10, section 5.3), MBR (section 5.2), and El Torito's boot images (section 13.3.2.1).

use crate::block::{BlockDevice, BlockError, read_bytes};
use crate::bytes::{slice, u16_at, u32_at, u64_at};
use crate::guid::Guid;
use alloc::vec;
use alloc::vec::Vec;

/// EFI System Partition.
pub const TYPE_ESP: Guid = Guid::new(0xc12a7328, 0xf81f, 0x11d2, [0xba, 0x4b, 0, 0xa0, 0xc9, 0x3e, 0xc9, 0x3b]);
/// Most GPT entries that are read (the usual number is 128).
const MAX_ENTRIES: u32 = 1024;
/// Most logical partitions of an MBR that are followed.
const MAX_LOGICAL: usize = 64;

/// How a partition is identified in a device path (UEFI 2.10, section 10.3.5.1, table 10.49).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Identity {
    /// GPT: the entry's unique GUID.
    Gpt {
        /// Partition type.
        kind: Guid,
        /// Unique partition GUID.
        unique: Guid,
    },
    /// MBR: the disk's signature and the partition's type byte.
    Mbr {
        /// Disk signature.
        disk: u32,
        /// Type.
        kind: u8,
    },
    /// El Torito: number of the boot catalog's entry.
    ElTorito {
        /// Entry, from 0.
        entry: u32,
    },
}

/// A partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Partition {
    /// Number as device paths count, from 1.
    pub number: u32,
    /// First block of the device.
    pub first: u64,
    /// Number of blocks.
    pub blocks: u64,
    /// Identity.
    pub identity: Identity,
}

impl Partition {
    /// Is it an EFI System Partition (or El Torito boot image, which counts as one)?
    pub fn is_esp(&self) -> bool {
        match self.identity {
            Identity::Gpt { kind, .. } => kind == TYPE_ESP,
            Identity::Mbr { kind, .. } => kind == 0xef,
            Identity::ElTorito { .. } => true,
        }
    }
}

/// Reads whichever table the device has: GPT (primary, else backup), MBR, El Torito. No table is no partitions.
pub fn scan<D: BlockDevice + ?Sized>(device: &mut D) -> Result<Vec<Partition>, BlockError> {
    let (size, count) = (device.block_size(), device.block_count());
    if count < 2 || !(512..=4096).contains(&size) {
        return Ok(Vec::new());
    }
    let mut mbr = vec![0; size];
    device.read_blocks(0, &mut mbr)?;
    if let Some(found) = gpt(device, 1)? {
        return Ok(found);
    }
    // A backup without a protective MBR is a leftover of an older life of the disk.
    if is_protective(&mbr)
        && let Some(found) = gpt(device, count - 1)?
    {
        return Ok(found);
    }
    // A hybrid ISO image carries an MBR for sticks; on a 2048-byte medium its catalog is meant.
    if size == 2048
        && let found @ [_, ..] = &el_torito(device)?[..]
    {
        return Ok(found.to_vec());
    }
    let found = mbr_partitions(device, &mbr)?;
    if found.is_empty() { el_torito(device) } else { Ok(found) }
}

fn is_protective(mbr: &[u8]) -> bool {
    u16_at(mbr, 510) == Some(0xaa55) && (0..4).any(|i| mbr[446 + i * 16 + 4] == 0xee)
}

/// CRC-32 as GPT uses it (ISO 3309, polynomial 0xEDB88320 reflected).
pub fn crc32(data: &[u8]) -> u32 {
    let mut crc = !0u32;
    for byte in data {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg());
        }
    }
    !crc
}

/// Reads the GPT whose header is at `lba`; `None` if there is no valid one.
fn gpt<D: BlockDevice + ?Sized>(device: &mut D, lba: u64) -> Result<Option<Vec<Partition>>, BlockError> {
    let size = device.block_size();
    let mut h = vec![0; size];
    device.read_blocks(lba, &mut h)?;
    let last = device.block_count() - 1;
    Ok((|| {
        let header_size = u32_at(&h, 12)? as usize;
        if h.get(..8)? != b"EFI PART" || !(92..=size).contains(&header_size) || u64_at(&h, 24)? != lba {
            return None;
        }
        let crc = u32_at(&h, 16)?;
        h[16..20].fill(0);
        if crc32(&h[..header_size]) != crc {
            return None;
        }
        let (first, end) = (u64_at(&h, 40)?, u64_at(&h, 48)?);
        let (table, entries, entry) = (u64_at(&h, 72)?, u32_at(&h, 80)?, u32_at(&h, 84)? as usize);
        if first > end || end > last || entries > MAX_ENTRIES || !(128..=4096).contains(&entry) || entry % 8 != 0 {
            return None;
        }
        let mut raw = vec![0; entries as usize * entry];
        if table > last || raw.len() as u64 > (last - table + 1) * size as u64 {
            return None;
        }
        read_bytes(device, table * size as u64, &mut raw).ok()?;
        if crc32(&raw) != u32_at(&h, 88)? {
            return None;
        }
        let mut found = Vec::new();
        for (i, e) in raw.chunks_exact(entry).enumerate() {
            let (kind, unique) = (Guid::read(e, 0)?, Guid::read(e, 16)?);
            let (start, stop) = (u64_at(e, 32)?, u64_at(e, 40)?);
            if kind != Guid::default() && start >= first && start <= stop && stop <= end {
                found.push(Partition {
                    number: i as u32 + 1,
                    first: start,
                    blocks: stop - start + 1,
                    identity: Identity::Gpt { kind, unique },
                });
            }
        }
        Some(found)
    })())
}

fn mbr_partitions<D: BlockDevice + ?Sized>(device: &mut D, mbr: &[u8]) -> Result<Vec<Partition>, BlockError> {
    let mut found = Vec::new();
    if u16_at(mbr, 510) != Some(0xaa55) {
        return Ok(found);
    }
    let disk = u32_at(mbr, 440).unwrap_or(0);
    let count = device.block_count();
    let entry = |sector: &[u8], i: usize| {
        let e = slice(sector, 446 + i * 16, 16)?;
        Some((e[0], e[4], u64::from(u32_at(e, 8)?), u64::from(u32_at(e, 12)?)))
    };
    // A boot sector of a file system has code here: real entries have 0x00 or 0x80 as their first byte.
    if (0..4).filter_map(|i| entry(mbr, i)).any(|(boot, ..)| boot & 0x7f != 0) {
        return Ok(found);
    }
    let mut extended = None;
    for i in 0..4 {
        let Some((_, kind, first, blocks)) = entry(mbr, i) else { continue };
        match kind {
            0 | 0xee => {}
            0x05 | 0x0f | 0x85 => extended = Some(first),
            _ if blocks > 0 && first > 0 && first + blocks <= count => {
                found.push(Partition { number: i as u32 + 1, first, blocks, identity: Identity::Mbr { disk, kind } })
            }
            _ => {}
        }
    }
    // Logical partitions: a chain of boot records inside the extended one.
    if let Some(base) = extended {
        let (mut at, mut number) = (base, 5);
        for _ in 0..MAX_LOGICAL {
            let mut sector = vec![0; device.block_size()];
            if at >= count || device.read_blocks(at, &mut sector).is_err() || u16_at(&sector, 510) != Some(0xaa55) {
                break;
            }
            if let Some((_, kind, first, blocks)) = entry(&sector, 0)
                && kind != 0
                && blocks > 0
                && at + first + blocks <= count
            {
                let identity = Identity::Mbr { disk, kind };
                found.push(Partition { number, first: at + first, blocks, identity });
                number += 1;
            }
            match entry(&sector, 1) {
                Some((_, 0x05 | 0x0f | 0x85, next, _)) if base + next > at => at = base + next,
                _ => break,
            }
        }
    }
    Ok(found)
}

/// Boot images of an El Torito catalog ("El Torito" specification 1.0, sections 2 to 4): the default entry and those of the
/// section with platform 0xEF.
fn el_torito<D: BlockDevice + ?Sized>(device: &mut D) -> Result<Vec<Partition>, BlockError> {
    let mut found = Vec::new();
    let size = device.block_size() as u64;
    let bytes = device.block_count().saturating_mul(size);
    let mut sector = vec![0; 2048];
    // The boot record volume descriptor is at sector 17.
    if bytes < 18 * 2048 || read_bytes(device, 17 * 2048, &mut sector).is_err() {
        return Ok(found);
    }
    if sector[0] != 0 || &sector[1..6] != b"CD001" || !sector[7..39].starts_with(b"EL TORITO SPECIFICATION") {
        return Ok(found);
    }
    let catalog = u64::from(u32_at(&sector, 71).unwrap_or(0)) * 2048;
    if catalog == 0 || catalog + 2048 > bytes {
        return Ok(found);
    }
    read_bytes(device, catalog, &mut sector)?;
    let sum = (0..16).fold(0u16, |s, i| s.wrapping_add(u16_at(&sector, i * 2).unwrap_or(0)));
    if sector[0] != 1 || sum != 0 || u16_at(&sector, 30) != Some(0xaa55) {
        return Ok(found);
    }
    let mut efi = sector[1] == 0xef;
    let mut index = 0;
    for at in (32..2048).step_by(32) {
        let e = &sector[at..at + 32];
        match e[0] {
            0x88 | 0x00 if at == 32 || e[0] == 0x88 => {
                let first = u64::from(u32_at(e, 8).unwrap_or(0)) * 2048;
                // Counted in 512-byte sectors; 0 and 1 mean "to the end" (images made for EFI are larger than 32 MiB at times).
                let sectors = u64::from(u16_at(e, 6).unwrap_or(0));
                let len = if sectors <= 1 { bytes.saturating_sub(first) } else { sectors * 512 };
                if efi && first >= 18 * 2048 && first < bytes {
                    let blocks = len.min(bytes - first) / size;
                    let identity = Identity::ElTorito { entry: index };
                    found.push(Partition { number: index + 1, first: first / size, blocks, identity });
                }
                index += 1;
            }
            0x90 | 0x91 => efi = e[1] == 0xef,
            _ => break,
        }
    }
    Ok(found)
}
