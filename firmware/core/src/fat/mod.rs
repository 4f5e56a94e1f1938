//! FAT12, FAT16 and FAT32, read and write, with long names (Microsoft "FAT: General Overview of On-Disk Format", 1.03;
//! UEFI 2.10, section 13.3).
//!
//! [`FatVolume`] is the volume: boot sector, allocation table, free space. [`dir`] holds directories and names,
//! [`file`] reading and writing of contents. Everything on the medium is hostile: cluster numbers are checked where they
//! are used, and no chain is followed further than the volume has clusters.

pub mod dir;
pub mod file;

use crate::block::{BlockDevice, BlockError, read_bytes, write_bytes};
use crate::bytes::{u16_at, u32_at};
use alloc::vec;
use alloc::vec::Vec;
use core::fmt;

/// What goes wrong on a FAT volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FatError {
    /// The device failed.
    Block(BlockError),
    /// The volume's structures contradict each other; names which.
    Corrupt(&'static str),
    /// No such file.
    NotFound,
    /// It exists already.
    Exists,
    /// A file where a directory is needed, or the other way round.
    WrongKind,
    /// The volume is full (or the root directory of FAT12/16 is).
    Full,
    /// The file is marked read-only.
    ReadOnly,
    /// A directory that is to be deleted is not empty.
    NotEmpty,
    /// A name that FAT cannot hold.
    BadName,
}

impl From<BlockError> for FatError {
    fn from(e: BlockError) -> Self {
        Self::Block(e)
    }
}

impl fmt::Display for FatError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Block(e) => write!(f, "{e}"),
            Self::Corrupt(what) => write!(f, "the FAT file system is damaged: {what}"),
            Self::NotFound => f.write_str("not found"),
            Self::Exists => f.write_str("exists already"),
            Self::WrongKind => f.write_str("not of the kind asked for (file or directory)"),
            Self::Full => f.write_str("the volume is full"),
            Self::ReadOnly => f.write_str("the file is read-only"),
            Self::NotEmpty => f.write_str("the directory is not empty"),
            Self::BadName => f.write_str("not a name that FAT can hold"),
        }
    }
}

/// Result of a FAT operation.
pub type FatResult<T> = Result<T, FatError>;

/// Width of an allocation table entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FatKind {
    /// 12 bits.
    Fat12,
    /// 16 bits.
    Fat16,
    /// 28 of 32 bits.
    Fat32,
}

/// A mounted volume.
#[derive(Debug)]
pub struct FatVolume<D> {
    device: D,
    kind: FatKind,
    cluster_size: u64,
    /// Byte offset of the first table, bytes of one table, number of tables.
    table: u64,
    table_size: u64,
    tables: u64,
    /// FAT12/16: byte offset and size of the root directory. FAT32: its first cluster.
    root_offset: u64,
    root_size: u64,
    root_cluster: u32,
    data: u64,
    /// Clusters are numbered 2 to `clusters + 1`.
    clusters: u32,
    /// The whole first table, read at the first use and written through.
    cache: Vec<u8>,
    cached: Vec<bool>,
    next_free: u32,
    free: Option<u32>,
    serial: u32,
}

/// Bytes of the table that are read at once.
const TABLE_CHUNK: usize = 4096;

impl<D: BlockDevice> FatVolume<D> {
    /// Mounts; `None` if the device holds no FAT file system.
    pub fn mount(mut device: D) -> FatResult<Result<Self, D>> {
        let mut b = vec![0; device.block_size().max(512)];
        if device.block_count() == 0 {
            return Ok(Err(device));
        }
        let n = device.block_size();
        device.read_blocks(0, &mut b[..n])?;
        match Self::geometry(&b, &device) {
            Some(make) => Ok(Ok(make(device))),
            None => Ok(Err(device)),
        }
    }

    fn geometry(b: &[u8], device: &D) -> Option<impl FnOnce(D) -> Self + use<D>> {
        if u16_at(b, 510)? != 0xaa55 || !matches!(b[0], 0xeb | 0xe9) {
            return None;
        }
        let sector = u64::from(u16_at(b, 11)?);
        let per_cluster = u64::from(b[13]);
        let reserved = u64::from(u16_at(b, 14)?);
        let tables = u64::from(b[16]);
        let root_entries = u64::from(u16_at(b, 17)?);
        let total = match u16_at(b, 19)? {
            0 => u64::from(u32_at(b, 32)?),
            n => u64::from(n),
        };
        let table_sectors = match u16_at(b, 22)? {
            0 => u64::from(u32_at(b, 36)?),
            n => u64::from(n),
        };
        let valid = sector.is_power_of_two()
            && (512..=4096).contains(&sector)
            && per_cluster.is_power_of_two()
            && reserved > 0
            && (1..=4).contains(&tables)
            && table_sectors > 0
            && total * sector <= device.block_count().checked_mul(device.block_size() as u64)?;
        if !valid {
            return None;
        }
        let root_size = root_entries * 32;
        let root_offset = (reserved + tables * table_sectors) * sector;
        let data = root_offset + root_size.next_multiple_of(sector);
        let clusters = (total * sector).checked_sub(data)? / (per_cluster * sector);
        // The number of clusters alone says which FAT it is (section 3.5 of the specification).
        let kind = match clusters {
            0..4085 => FatKind::Fat12,
            4085..65525 => FatKind::Fat16,
            _ => FatKind::Fat32,
        };
        let bits = match kind {
            FatKind::Fat12 => 12,
            FatKind::Fat16 => 16,
            FatKind::Fat32 => 32,
        };
        let table_size = table_sectors * sector;
        let clusters = clusters.min(table_size * 8 / bits - 2).min(0x0fff_fff5) as u32;
        let fat32 = kind == FatKind::Fat32;
        if fat32 && root_entries != 0 || !fat32 && root_entries == 0 || clusters == 0 {
            return None;
        }
        let root_cluster = if fat32 { u32_at(b, 44)? } else { 0 };
        let serial = u32_at(b, if fat32 { 67 } else { 39 })?;
        Some(move |device| Self {
            device,
            kind,
            cluster_size: per_cluster * sector,
            table: reserved * sector,
            table_size,
            tables,
            root_offset,
            root_size,
            root_cluster,
            data,
            clusters,
            cache: Vec::new(),
            cached: Vec::new(),
            next_free: 2,
            free: None,
            serial,
        })
    }

    /// Which FAT it is.
    pub fn kind(&self) -> FatKind {
        self.kind
    }
    /// Volume serial number.
    pub fn serial(&self) -> u32 {
        self.serial
    }
    /// Bytes of a cluster.
    pub fn cluster_size(&self) -> u64 {
        self.cluster_size
    }
    /// Bytes that files can use in all.
    pub fn size(&self) -> u64 {
        u64::from(self.clusters) * self.cluster_size
    }
    /// The device.
    pub fn device(&mut self) -> &mut D {
        &mut self.device
    }
    /// Gives the device back.
    pub fn unmount(self) -> D {
        self.device
    }

    /// Bytes that are free. Counts once, then keeps count.
    pub fn free_bytes(&mut self) -> FatResult<u64> {
        if self.free.is_none() {
            let mut n = 0;
            for c in 2..self.clusters + 2 {
                n += u32::from(self.entry(c)? == 0);
            }
            self.free = Some(n);
        }
        Ok(u64::from(self.free.unwrap_or(0)) * self.cluster_size)
    }

    /// Makes everything written durable.
    pub fn flush(&mut self) -> FatResult<()> {
        Ok(self.device.flush()?)
    }

    fn check(&self, cluster: u32) -> FatResult<()> {
        if (2..self.clusters + 2).contains(&cluster) {
            Ok(())
        } else {
            Err(FatError::Corrupt("a cluster number is out of range"))
        }
    }

    /// Byte offset of a cluster on the device.
    fn cluster_offset(&self, cluster: u32) -> FatResult<u64> {
        self.check(cluster)?;
        Ok(self.data + u64::from(cluster - 2) * self.cluster_size)
    }

    /// Makes sure that the table's bytes `at .. at + 4` are cached.
    fn load(&mut self, at: usize) -> FatResult<()> {
        if self.cache.is_empty() {
            self.cache = vec![0; (self.table_size as usize).next_multiple_of(TABLE_CHUNK) + 4];
            self.cached = vec![false; self.cache.len() / TABLE_CHUNK + 1];
        }
        for chunk in at / TABLE_CHUNK..=(at + 3) / TABLE_CHUNK {
            if !self.cached[chunk] {
                let start = chunk * TABLE_CHUNK;
                let len = TABLE_CHUNK.min((self.table_size as usize).saturating_sub(start));
                read_bytes(&mut self.device, self.table + start as u64, &mut self.cache[start..start + len])?;
                self.cached[chunk] = true;
            }
        }
        Ok(())
    }

    /// Table entry of a cluster: 0 free, a cluster number, or `END` and above.
    fn entry(&mut self, cluster: u32) -> FatResult<u32> {
        self.check(cluster)?;
        let c = cluster as usize;
        Ok(match self.kind {
            FatKind::Fat12 => {
                let at = c + c / 2;
                self.load(at)?;
                let raw = u16_at(&self.cache, at).unwrap_or(0);
                let v = u32::from(if c % 2 == 0 { raw & 0xfff } else { raw >> 4 });
                if v >= 0xff8 { END } else { v }
            }
            FatKind::Fat16 => {
                self.load(c * 2)?;
                let v = u32::from(u16_at(&self.cache, c * 2).unwrap_or(0));
                if v >= 0xfff8 { END } else { v }
            }
            FatKind::Fat32 => {
                self.load(c * 4)?;
                let v = u32_at(&self.cache, c * 4).unwrap_or(0) & 0x0fff_ffff;
                if v >= 0x0fff_fff8 { END } else { v }
            }
        })
    }

    fn set_entry(&mut self, cluster: u32, value: u32) -> FatResult<()> {
        let old = self.entry(cluster)?; // loads and checks
        let c = cluster as usize;
        let (at, len) = match self.kind {
            FatKind::Fat12 => {
                let at = c + c / 2;
                let raw = u16_at(&self.cache, at).unwrap_or(0);
                let v = (value & 0xfff) as u16;
                let new = if c % 2 == 0 { raw & 0xf000 | v } else { raw & 0xf | v << 4 };
                self.cache[at..at + 2].copy_from_slice(&new.to_le_bytes());
                (at, 2)
            }
            FatKind::Fat16 => {
                self.cache[c * 2..c * 2 + 2].copy_from_slice(&(value as u16).to_le_bytes());
                (c * 2, 2)
            }
            FatKind::Fat32 => {
                let kept = u32_at(&self.cache, c * 4).unwrap_or(0) & 0xf000_0000;
                self.cache[c * 4..c * 4 + 4].copy_from_slice(&(kept | value & 0x0fff_ffff).to_le_bytes());
                (c * 4, 4)
            }
        };
        for t in 0..self.tables {
            let offset = self.table + t * self.table_size + at as u64;
            write_bytes(&mut self.device, offset, &self.cache[at..at + len])?;
        }
        if let Some(free) = &mut self.free {
            *free = match (old, value) {
                (0, v) if v != 0 => free.saturating_sub(1),
                (o, 0) if o != 0 => *free + 1,
                _ => *free,
            };
        }
        Ok(())
    }

    /// The cluster behind this one; `None` at the end of the chain.
    fn next(&mut self, cluster: u32) -> FatResult<Option<u32>> {
        match self.entry(cluster)? {
            END => Ok(None),
            0 | 1 => Err(FatError::Corrupt("a chain leads to a free cluster")),
            next => self.check(next).map(|()| Some(next)),
        }
    }

    /// All clusters of a chain, bounded by the number of clusters that exist.
    fn chain(&mut self, first: u32) -> FatResult<Vec<u32>> {
        let mut chain = Vec::new();
        let mut at = Some(first).filter(|c| *c != 0);
        while let Some(c) = at {
            if chain.len() >= self.clusters as usize {
                return Err(FatError::Corrupt("a chain loops"));
            }
            chain.push(c);
            at = self.next(c)?;
        }
        Ok(chain)
    }

    /// Takes a free cluster as the end of a chain; `after` (if any) is made to lead to it. The cluster is zeroed if asked.
    fn allocate(&mut self, after: Option<u32>, zero: bool) -> FatResult<u32> {
        let total = self.clusters;
        let start = self.next_free;
        for i in 0..total {
            let c = 2 + (start - 2 + i) % total;
            if self.entry(c)? == 0 {
                if zero {
                    let zeros = vec![0; self.cluster_size as usize];
                    let offset = self.cluster_offset(c)?;
                    write_bytes(&mut self.device, offset, &zeros)?;
                }
                self.set_entry(c, END)?;
                if let Some(before) = after {
                    self.set_entry(before, c)?;
                }
                self.next_free = 2 + (c - 1) % total;
                return Ok(c);
            }
        }
        Err(FatError::Full)
    }

    /// Frees a chain.
    fn release(&mut self, first: u32) -> FatResult<()> {
        for c in self.chain(first)? {
            self.set_entry(c, 0)?;
        }
        Ok(())
    }
}

/// End of a chain, in the width of FAT32.
const END: u32 = 0x0fff_ffff;

#[cfg(test)]
mod tests;
