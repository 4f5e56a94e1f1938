//! Read-only ISO 9660 with Joliet names (ECMA-119; Joliet specification).
//!
//! Directories are walked by extent. A directory of a hostile image cannot loop the reader: every lookup goes down one
//! path component at a time, and a directory's size is bounded.

use crate::block::{BlockDevice, BlockError, read_bytes};
use crate::bytes::u32_at;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

const SECTOR: u64 = 2048;
/// Largest directory that is read.
const MAX_DIRECTORY: u32 = 4 << 20;

/// A file or directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Name, without a version number.
    pub name: String,
    /// Is it a directory?
    pub directory: bool,
    /// First logical block (2048 bytes).
    pub extent: u32,
    /// Bytes.
    pub size: u32,
}

/// An ISO 9660 volume.
#[derive(Clone, Debug)]
pub struct IsoVolume {
    root: Entry,
    joliet: bool,
    /// Volume identifier.
    pub label: String,
}

impl IsoVolume {
    /// Finds the volume descriptors; `None` if the medium has none.
    pub fn open<D: BlockDevice + ?Sized>(device: &mut D) -> Result<Option<Self>, BlockError> {
        let bytes = device.block_count().saturating_mul(device.block_size() as u64);
        let mut best: Option<Self> = None;
        for sector in 16..32u64 {
            if (sector + 1) * SECTOR > bytes {
                break;
            }
            let mut d = vec![0; SECTOR as usize];
            read_bytes(device, sector * SECTOR, &mut d)?;
            if &d[1..6] != b"CD001" || d[0] == 255 {
                break;
            }
            // A supplementary descriptor with UCS-2 escape sequences is Joliet's.
            let joliet = d[0] == 2 && matches!(&d[88..91], b"%/@" | b"%/C" | b"%/E");
            if d[0] == 1 || joliet {
                let root = Entry {
                    name: String::new(),
                    directory: true,
                    extent: u32_at(&d, 156 + 2).unwrap_or(0),
                    size: u32_at(&d, 156 + 10).unwrap_or(0),
                };
                let label = text(&d[40..72], joliet);
                best = Some(Self { root, joliet, label });
                if joliet {
                    break;
                }
            }
        }
        Ok(best)
    }

    /// The root directory.
    pub fn root(&self) -> &Entry {
        &self.root
    }

    /// Entries of a directory, without `.` and `..`.
    pub fn read_directory<D: BlockDevice + ?Sized>(
        &self,
        device: &mut D,
        directory: &Entry,
    ) -> Result<Vec<Entry>, BlockError> {
        let mut data = vec![0; directory.size.min(MAX_DIRECTORY) as usize];
        read_bytes(device, u64::from(directory.extent) * SECTOR, &mut data)?;
        let mut found = Vec::new();
        let mut at = 0;
        while at < data.len() {
            let len = usize::from(data[at]);
            if len == 0 {
                // Records do not cross sectors: the rest of this one is padding.
                at = (at / SECTOR as usize + 1) * SECTOR as usize;
                continue;
            }
            let Some(r) = data.get(at..at + len).filter(|r| r.len() >= 34) else { break };
            at += len;
            let name_len = usize::from(r[32]);
            let Some(raw) = r.get(33..33 + name_len) else { break };
            // Multi-extent files (flag 0x80) are larger than 4 GiB; firmware has no use for them.
            if matches!(raw, [0] | [1]) || r[25] & 0x80 != 0 {
                continue;
            }
            found.push(Entry {
                name: text(raw, self.joliet),
                directory: r[25] & 2 != 0,
                extent: u32_at(r, 2).unwrap_or(0),
                size: u32_at(r, 10).unwrap_or(0),
            });
        }
        Ok(found)
    }

    /// Finds a path with `\` or `/` between components, without regard to case.
    pub fn find<D: BlockDevice + ?Sized>(&self, device: &mut D, path: &str) -> Result<Option<Entry>, BlockError> {
        let mut current = self.root.clone();
        for part in path.split(['\\', '/']).filter(|p| !p.is_empty() && *p != ".") {
            if !current.directory {
                return Ok(None);
            }
            let entries = self.read_directory(device, &current)?;
            match entries.into_iter().find(|e| e.name.eq_ignore_ascii_case(part)) {
                Some(entry) => current = entry,
                None => return Ok(None),
            }
        }
        Ok(Some(current))
    }

    /// Reads from a file; returns how many bytes there were.
    pub fn read<D: BlockDevice + ?Sized>(
        &self,
        device: &mut D,
        file: &Entry,
        offset: u64,
        data: &mut [u8],
    ) -> Result<usize, BlockError> {
        let left = u64::from(file.size).saturating_sub(offset);
        let n = usize::try_from(left).unwrap_or(usize::MAX).min(data.len());
        read_bytes(device, u64::from(file.extent) * SECTOR + offset, &mut data[..n])?;
        Ok(n)
    }
}

/// A name or label: UCS-2 big-endian with Joliet, else ASCII; version number, final dot and padding removed.
fn text(raw: &[u8], joliet: bool) -> String {
    let full: String = if joliet {
        let units = raw.chunks_exact(2).map(|c| u16::from_be_bytes([c[0], c[1]]));
        char::decode_utf16(units).map(|c| c.unwrap_or('\u{fffd}')).collect()
    } else {
        raw.iter().map(|b| char::from(*b)).collect()
    };
    let name = full.split(';').next().unwrap_or("").trim_end_matches([' ', '\0']);
    String::from(name.strip_suffix('.').unwrap_or(name))
}
