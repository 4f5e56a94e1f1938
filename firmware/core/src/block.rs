//! What the partition and file system code reads and writes: numbered blocks of one size.

use alloc::vec;
use alloc::vec::Vec;
use core::fmt;

/// A block could not be read or written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockError {
    /// The device failed.
    Device,
    /// The medium was changed or removed.
    MediaChanged,
    /// There is no medium.
    NoMedia,
    /// The device cannot be written.
    WriteProtected,
    /// Beyond the end of the device.
    OutOfRange,
}

impl fmt::Display for BlockError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Device => "the device failed",
            Self::MediaChanged => "the medium was changed",
            Self::NoMedia => "there is no medium",
            Self::WriteProtected => "the device is write-protected",
            Self::OutOfRange => "beyond the end of the device",
        })
    }
}

/// A device or partition.
pub trait BlockDevice {
    /// Bytes of a block: 512, 2048 or 4096.
    fn block_size(&self) -> usize;
    /// Number of blocks.
    fn block_count(&self) -> u64;
    /// Reads whole blocks; `data` is a multiple of the block size.
    fn read_blocks(&mut self, lba: u64, data: &mut [u8]) -> Result<(), BlockError>;
    /// Writes whole blocks.
    fn write_blocks(&mut self, lba: u64, data: &[u8]) -> Result<(), BlockError>;
    /// Makes written blocks durable.
    fn flush(&mut self) -> Result<(), BlockError>;
}

/// Reads bytes at any offset.
pub fn read_bytes<D: BlockDevice + ?Sized>(device: &mut D, offset: u64, data: &mut [u8]) -> Result<(), BlockError> {
    let size = device.block_size();
    let mut done = 0;
    while done < data.len() {
        let at = offset + done as u64;
        let (lba, inside) = (at / size as u64, (at % size as u64) as usize);
        let left = data.len() - done;
        if inside == 0 && left >= size {
            let whole = left / size * size;
            device.read_blocks(lba, &mut data[done..done + whole])?;
            done += whole;
        } else {
            let mut block = vec![0; size];
            device.read_blocks(lba, &mut block)?;
            let n = (size - inside).min(left);
            data[done..done + n].copy_from_slice(&block[inside..inside + n]);
            done += n;
        }
    }
    Ok(())
}

/// Writes bytes at any offset, reading the blocks at the ends first where they are partly kept.
pub fn write_bytes<D: BlockDevice + ?Sized>(device: &mut D, offset: u64, data: &[u8]) -> Result<(), BlockError> {
    let size = device.block_size();
    let mut done = 0;
    while done < data.len() {
        let at = offset + done as u64;
        let (lba, inside) = (at / size as u64, (at % size as u64) as usize);
        let left = data.len() - done;
        if inside == 0 && left >= size {
            let whole = left / size * size;
            device.write_blocks(lba, &data[done..done + whole])?;
            done += whole;
        } else {
            let mut block = vec![0; size];
            device.read_blocks(lba, &mut block)?;
            let n = (size - inside).min(left);
            block[inside..inside + n].copy_from_slice(&data[done..done + n]);
            device.write_blocks(lba, &block)?;
            done += n;
        }
    }
    Ok(())
}

/// A block device in memory: RAM disks and tests.
#[derive(Clone, Debug)]
pub struct MemoryDisk {
    /// The bytes.
    pub data: Vec<u8>,
    /// Bytes of a block.
    pub block: usize,
}

impl BlockDevice for MemoryDisk {
    fn block_size(&self) -> usize {
        self.block
    }
    fn block_count(&self) -> u64 {
        (self.data.len() / self.block) as u64
    }
    fn read_blocks(&mut self, lba: u64, data: &mut [u8]) -> Result<(), BlockError> {
        let at = usize::try_from(lba).ok().and_then(|l| l.checked_mul(self.block)).ok_or(BlockError::OutOfRange)?;
        data.copy_from_slice(crate::bytes::slice(&self.data, at, data.len()).ok_or(BlockError::OutOfRange)?);
        Ok(())
    }
    fn write_blocks(&mut self, lba: u64, data: &[u8]) -> Result<(), BlockError> {
        let at = usize::try_from(lba).ok().and_then(|l| l.checked_mul(self.block)).ok_or(BlockError::OutOfRange)?;
        let end = at.checked_add(data.len()).ok_or(BlockError::OutOfRange)?;
        self.data.get_mut(at..end).ok_or(BlockError::OutOfRange)?.copy_from_slice(data);
        Ok(())
    }
    fn flush(&mut self) -> Result<(), BlockError> {
        Ok(())
    }
}
