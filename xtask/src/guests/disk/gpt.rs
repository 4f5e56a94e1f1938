//! Writes a GUID partition table (UEFI 2.10, section 5.3): protective MBR, both headers, both arrays.

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// A GUID as it lies on disk.
pub type Guid = [u8; 16];

/// EFI system partition, c12a7328-f81f-11d2-ba4b-00a0c93ec93b.
pub const TYPE_ESP: Guid =
    [0x28, 0x73, 0x2a, 0xc1, 0x1f, 0xf8, 0xd2, 0x11, 0xba, 0x4b, 0x00, 0xa0, 0xc9, 0x3e, 0xc9, 0x3b];
/// Linux root for x86-64, 4f68bce3-e8cd-4db1-96e7-fbcaf984b709 (discoverable partitions specification).
pub const TYPE_LINUX_ROOT: Guid =
    [0xe3, 0xbc, 0x68, 0x4f, 0xcd, 0xe8, 0xb1, 0x4d, 0x96, 0xe7, 0xfb, 0xca, 0xf9, 0x84, 0xb7, 0x09];

const SECTOR: u64 = 512;
const ENTRIES: u32 = 128;
const ENTRY: u32 = 128;

/// One partition.
pub struct Partition {
    /// Type.
    pub kind: Guid,
    /// Its own GUID.
    pub unique: Guid,
    /// Offset in bytes.
    pub first: u64,
    /// Length in bytes.
    pub bytes: u64,
    /// Name, at most 36 characters.
    pub name: &'static str,
}

/// A GUID that is the same in every build: version 8 (free form) of RFC 9562.
pub fn unique(system: &str, part: &str) -> Guid {
    let mut guid = [0; 16];
    guid.copy_from_slice(&Sha256::digest(format!("viridian {system} {part}"))[..16]);
    guid[7] = guid[7] & 0x0f | 0x80;
    guid[8] = guid[8] & 0x3f | 0x80;
    guid
}

/// Writes the tables of a disk of 512-byte sectors, over the file's whole length.
///
/// # Errors
/// When the file cannot be written.
pub fn write(disk: &Path, unique: Guid, partitions: &[Partition]) -> Result<()> {
    let file = OpenOptions::new().write(true).open(disk).with_context(|| format!("cannot write {}", disk.display()))?;
    let sectors = file.metadata()?.len() / SECTOR;
    let mut array = vec![0; (ENTRIES * ENTRY) as usize];
    for (entry, partition) in array.chunks_exact_mut(ENTRY as usize).zip(partitions) {
        entry[..16].copy_from_slice(&partition.kind);
        entry[16..32].copy_from_slice(&partition.unique);
        entry[32..40].copy_from_slice(&(partition.first / SECTOR).to_le_bytes());
        entry[40..48].copy_from_slice(&((partition.first + partition.bytes) / SECTOR - 1).to_le_bytes());
        for (to, unit) in entry[56..].chunks_exact_mut(2).zip(partition.name.encode_utf16()) {
            to.copy_from_slice(&unit.to_le_bytes());
        }
    }
    let array_sectors = array.len() as u64 / SECTOR;
    let usable = (2 + array_sectors)..(sectors - 1 - array_sectors);
    let header = |this: u64, other: u64, array_at: u64| {
        let mut h = Vec::with_capacity(92);
        h.extend(b"EFI PART");
        h.extend(0x0001_0000u32.to_le_bytes());
        h.extend(92u32.to_le_bytes());
        h.extend([0; 8]);
        for value in [this, other, usable.start, usable.end - 1] {
            h.extend(value.to_le_bytes());
        }
        h.extend(unique);
        h.extend(array_at.to_le_bytes());
        for value in [ENTRIES, ENTRY, crc(&array)] {
            h.extend(value.to_le_bytes());
        }
        let sum = crc(&h).to_le_bytes();
        h[16..20].copy_from_slice(&sum);
        h
    };
    // The protective MBR: one partition of type 0xEE over the whole disk.
    let mut mbr = [0; 512];
    mbr[446..462].copy_from_slice(&[0, 0, 2, 0, 0xee, 0xff, 0xff, 0xff, 1, 0, 0, 0, 0, 0, 0, 0]);
    mbr[458..462].copy_from_slice(&u32::try_from(sectors - 1).unwrap_or(u32::MAX).to_le_bytes());
    mbr[510..].copy_from_slice(&[0x55, 0xaa]);
    file.write_all_at(&mbr, 0)?;
    file.write_all_at(&header(1, sectors - 1, 2), SECTOR)?;
    file.write_all_at(&array, 2 * SECTOR)?;
    file.write_all_at(&array, usable.end * SECTOR)?;
    file.write_all_at(&header(sectors - 1, 1, usable.end), (sectors - 1) * SECTOR)?;
    Ok(())
}

fn crc(bytes: &[u8]) -> u32 {
    let mut crc = flate2::Crc::new();
    crc.update(bytes);
    crc.sum()
}
