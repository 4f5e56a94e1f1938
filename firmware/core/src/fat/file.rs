//! Contents of files.

use super::dir::{FatTime, Node, attribute};
use super::{FatError, FatResult, FatVolume};
use crate::block::{BlockDevice, read_bytes, write_bytes};
use alloc::vec;
use alloc::vec::Vec;

/// The clusters of an open file, as far as they are known. Keep one with every open file: without it each access walks
/// the chain from its start.
#[derive(Clone, Debug, Default)]
pub struct Extents {
    clusters: Vec<u32>,
    complete: bool,
}

impl Extents {
    /// To be called when the file was changed through another handle.
    pub fn forget(&mut self) {
        *self = Self::default();
    }
}

impl<D: BlockDevice> FatVolume<D> {
    /// Makes cluster number `index` of the file known; `None` if the chain is shorter.
    fn nth(&mut self, node: &Node, extents: &mut Extents, index: usize) -> FatResult<Option<u32>> {
        if extents.clusters.is_empty() && node.first != 0 {
            self.check(node.first)?;
            extents.clusters.push(node.first);
        }
        extents.complete |= node.first == 0;
        while extents.clusters.len() <= index && !extents.complete {
            if extents.clusters.len() > self.clusters as usize {
                return Err(FatError::Corrupt("a chain loops"));
            }
            let last = extents.clusters[extents.clusters.len() - 1];
            match self.next(last)? {
                Some(next) => extents.clusters.push(next),
                None => extents.complete = true,
            }
        }
        Ok(extents.clusters.get(index).copied())
    }

    /// Longest run of neighbouring clusters from `index` on that covers at most `want` bytes from `inside` on: its
    /// device offset and bytes.
    fn run(&mut self, node: &Node, extents: &mut Extents, offset: u64, want: usize) -> FatResult<Option<(u64, usize)>> {
        let (index, inside) = ((offset / self.cluster_size) as usize, offset % self.cluster_size);
        let Some(first) = self.nth(node, extents, index)? else { return Ok(None) };
        let mut bytes = self.cluster_size - inside;
        let mut n = 1;
        while bytes < want as u64 && self.nth(node, extents, index + n)? == Some(first + n as u32) {
            bytes += self.cluster_size;
            n += 1;
        }
        Ok(Some((self.cluster_offset(first)? + inside, bytes.min(want as u64) as usize)))
    }

    /// Reads from a file; returns how many bytes there were.
    pub fn read(&mut self, node: &Node, extents: &mut Extents, offset: u64, data: &mut [u8]) -> FatResult<usize> {
        let left = u64::from(node.size).saturating_sub(offset);
        let total = usize::try_from(left).unwrap_or(usize::MAX).min(data.len());
        let mut done = 0;
        while done < total {
            let (at, len) = self
                .run(node, extents, offset + done as u64, total - done)?
                .ok_or(FatError::Corrupt("a file is longer than its chain"))?;
            read_bytes(&mut self.device, at, &mut data[done..done + len])?;
            done += len;
        }
        Ok(total)
    }

    /// Writes to a file, which grows as needed; a gap is filled with zeros. Updates the directory entry.
    pub fn write(
        &mut self,
        node: &mut Node,
        extents: &mut Extents,
        offset: u64,
        data: &[u8],
        now: FatTime,
    ) -> FatResult<()> {
        if node.is_directory() {
            return Err(FatError::WrongKind);
        }
        if node.attributes & attribute::READ_ONLY != 0 {
            return Err(FatError::ReadOnly);
        }
        let end = offset.checked_add(data.len() as u64).filter(|e| *e <= u64::from(u32::MAX)).ok_or(FatError::Full)?;
        if offset > u64::from(node.size) {
            self.set_size(node, extents, offset, now)?;
        }
        self.grow_to(node, extents, end)?;
        let mut done = 0;
        while done < data.len() {
            let (at, len) = self
                .run(node, extents, offset + done as u64, data.len() - done)?
                .ok_or(FatError::Corrupt("a file is longer than its chain"))?;
            write_bytes(&mut self.device, at, &data[done..done + len])?;
            done += len;
        }
        node.size = node.size.max(end as u32);
        node.modified = now;
        node.accessed.date = now.date;
        node.attributes |= attribute::ARCHIVE;
        self.update(node)
    }

    /// Gives the chain enough clusters for `bytes`. On a full volume what was added is taken back.
    fn grow_to(&mut self, node: &mut Node, extents: &mut Extents, bytes: u64) -> FatResult<()> {
        let need = bytes.div_ceil(self.cluster_size) as usize;
        self.nth(node, extents, usize::MAX - 1)?;
        let had = extents.clusters.len();
        while extents.clusters.len() < need {
            match self.allocate(extents.clusters.last().copied(), false) {
                Ok(c) => {
                    if extents.clusters.is_empty() {
                        node.first = c;
                    }
                    extents.clusters.push(c);
                    extents.complete = true;
                }
                Err(e) => {
                    self.cut(node, extents, had)?;
                    return Err(e);
                }
            }
        }
        Ok(())
    }

    /// Cuts the chain to `keep` clusters.
    fn cut(&mut self, node: &mut Node, extents: &mut Extents, keep: usize) -> FatResult<()> {
        self.nth(node, extents, usize::MAX - 1)?;
        if extents.clusters.len() <= keep {
            return Ok(());
        }
        let rest = extents.clusters.split_off(keep);
        match extents.clusters.last() {
            Some(last) => self.set_entry(*last, super::END)?,
            None => node.first = 0,
        }
        rest.into_iter().try_for_each(|c| self.set_entry(c, 0))
    }

    /// Sets a file's size: cuts it, or extends it with zeros.
    pub fn set_size(&mut self, node: &mut Node, extents: &mut Extents, size: u64, now: FatTime) -> FatResult<()> {
        if node.is_directory() {
            return Err(FatError::WrongKind);
        }
        let new = u32::try_from(size).map_err(|_| FatError::Full)?;
        if new < node.size {
            node.size = new;
            // The entry first: a crash in between leaves lost clusters, never a file that reaches into freed ones.
            self.update(node)?;
            self.cut(node, extents, size.div_ceil(self.cluster_size) as usize)?;
        } else {
            self.grow_to(node, extents, size)?;
            let zeros = vec![0; self.cluster_size as usize];
            let mut at = u64::from(node.size);
            while at < size {
                let want = zeros.len().min((size - at) as usize);
                let (offset, len) =
                    self.run(node, extents, at, want)?.ok_or(FatError::Corrupt("a file is longer than its chain"))?;
                write_bytes(&mut self.device, offset, &zeros[..len])?;
                at += len as u64;
            }
            node.size = new;
        }
        node.modified = now;
        self.update(node)
    }
}
