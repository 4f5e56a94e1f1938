//! Block devices: disks and DVDs of the SCSI controllers and their partitions, as Block I/O, Block I/O 2 and Disk I/O
//! (UEFI 2.10, sections 13.7 to 13.10).

use crate::cell::Global;
use crate::tables::{DEVICE_PATH, leak, result};
use crate::vmbus::storage::{Data, MAX_TRANSFER, ScsiError, ScsiUnit};
use crate::{event, fs, handle, image, log};
use alloc::vec::Vec;
use core::ffi::c_void;
use core::ptr::null_mut;
use core::slice;
use r_efi::efi::{self, Boolean, Status};
use r_efi::protocols::{block_io, disk_io};
use uefi_core::block::{BlockDevice, BlockError};
use uefi_core::devpath::DevicePath;
use uefi_core::guid::Guid;
use uefi_core::partition::{self, Partition};

/// `EFI_BLOCK_IO_PROTOCOL_GUID`.
pub const BLOCK_IO: Guid = Guid::new(0x964e5b21, 0x6459, 0x11d2, [0x8e, 0x39, 0, 0xa0, 0xc9, 0x69, 0x72, 0x3b]);
/// `EFI_BLOCK_IO2_PROTOCOL_GUID`.
const BLOCK_IO2: Guid = Guid::new(0xa77b2472, 0xe282, 0x4e9f, [0xa2, 0x45, 0xc2, 0xc0, 0xe2, 0x7b, 0xbc, 0xc1]);
/// `EFI_DISK_IO_PROTOCOL_GUID`.
const DISK_IO: Guid = Guid::new(0xce345171, 0xba0b, 0x11d2, [0x8e, 0x4f, 0, 0xa0, 0xc9, 0x69, 0x72, 0x3b]);

/// A disk, or a part of one.
#[derive(Clone)]
pub struct Volume {
    unit: ScsiUnit,
    block: usize,
    /// First block on the unit, number of blocks.
    first: u64,
    blocks: u64,
    read_only: bool,
    removable: bool,
}

impl Volume {
    /// Reads the capacity; `None` if the unit has no medium or is no disk.
    fn probe(unit: ScsiUnit) -> Option<Self> {
        let mut inquiry = [0u8; 36];
        unit.command(&[0x12, 0, 0, 0, 36, 0], Data::In, &mut inquiry).ok()?;
        let kind = inquiry[0] & 0x1f;
        if inquiry[0] >> 5 != 0 || !matches!(kind, 0 | 5) {
            return None;
        }
        // A unit attention or two may wait; then the unit is ready or has no medium.
        let ready = (0..10).any(|_| match unit.command(&[0; 6], Data::None, &mut []) {
            Ok(_) => true,
            Err(ScsiError::Sense(2, 0x3a)) => false,
            Err(_) => {
                crate::arch::stall(1000);
                false
            }
        });
        if !ready {
            return None;
        }
        let (last, block) = Self::capacity(unit)?;
        let mut v = Self { unit, block, first: 0, blocks: last + 1, read_only: kind == 5, removable: kind == 5 };
        if !v.read_only {
            // MODE SENSE (6), all pages: bit 7 of the device-specific parameter is write protection.
            let mut mode = [0u8; 64];
            if unit.command(&[0x1a, 0, 0x3f, 0, 64, 0], Data::In, &mut mode).is_ok() {
                v.read_only = mode[2] & 0x80 != 0;
            }
        }
        Some(v)
    }

    fn capacity(unit: ScsiUnit) -> Option<(u64, usize)> {
        let be32 = |d: &[u8]| u32::from_be_bytes([d[0], d[1], d[2], d[3]]);
        let mut d = [0u8; 8];
        unit.command(&[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], Data::In, &mut d).ok()?;
        let (mut last, mut block) = (u64::from(be32(&d)), be32(&d[4..]) as usize);
        if last == u64::from(u32::MAX) {
            let mut d = [0u8; 32];
            let cdb = [0x9e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 32, 0, 0];
            unit.command(&cdb, Data::In, &mut d).ok()?;
            last = u64::from(be32(&d)) << 32 | u64::from(be32(&d[4..]));
            block = be32(&d[8..]) as usize;
        }
        matches!(block, 512 | 2048 | 4096).then_some((last, block))
    }

    fn part(&self, p: &Partition) -> Self {
        Self { first: self.first + p.first, blocks: p.blocks, ..self.clone() }
    }

    fn check(&self, lba: u64, len: usize) -> Result<(), BlockError> {
        let n = (len / self.block) as u64;
        if len % self.block == 0 && lba.checked_add(n).is_some_and(|e| e <= self.blocks) {
            Ok(())
        } else {
            Err(BlockError::OutOfRange)
        }
    }

    fn transfer(&self, lba: u64, data: *mut u8, len: usize, write: bool) -> Result<(), BlockError> {
        self.check(lba, len)?;
        let mut done = 0;
        while done < len {
            let n = (len - done).min(MAX_TRANSFER);
            let at = self.first + lba + (done / self.block) as u64;
            let mut cdb = [0u8; 16];
            cdb[0] = if write { 0x8a } else { 0x88 };
            cdb[2..10].copy_from_slice(&at.to_be_bytes());
            cdb[10..14].copy_from_slice(&((n / self.block) as u32).to_be_bytes());
            // DVDs know the ten-byte form only... and twelve: READ(12).
            let ten = self.removable;
            if ten {
                cdb = [0; 16];
                cdb[0] = 0x28;
                cdb[2..6].copy_from_slice(&(at as u32).to_be_bytes());
                cdb[7..9].copy_from_slice(&((n / self.block) as u16).to_be_bytes());
            }
            let cdb = if ten { &cdb[..10] } else { &cdb[..] };
            let way = if write { Data::Out } else { Data::In };
            let mut tries = 0;
            loop {
                // SAFETY: the caller's buffer has `len` bytes, of which [done, done + n) is a part.
                let r = crate::vmbus::storage::command(
                    self.unit.controller,
                    self.unit.lun,
                    cdb,
                    way,
                    unsafe { data.add(done) },
                    n,
                );
                match r {
                    Ok(_) => break,
                    // Unit attention: something happened; ask again, unless it was the medium.
                    Err(ScsiError::Sense(6, 0x28)) if self.removable => return Err(BlockError::MediaChanged),
                    Err(ScsiError::Sense(6, ..)) if tries < 3 => tries += 1,
                    Err(ScsiError::Sense(2, 0x3a)) => return Err(BlockError::NoMedia),
                    Err(ScsiError::Sense(7, ..)) => return Err(BlockError::WriteProtected),
                    Err(_) => return Err(BlockError::Device),
                }
            }
            done += n;
        }
        Ok(())
    }
}

impl BlockDevice for Volume {
    fn block_size(&self) -> usize {
        self.block
    }
    fn block_count(&self) -> u64 {
        self.blocks
    }
    fn read_blocks(&mut self, lba: u64, data: &mut [u8]) -> Result<(), BlockError> {
        self.transfer(lba, data.as_mut_ptr(), data.len(), false)
    }
    fn write_blocks(&mut self, lba: u64, data: &[u8]) -> Result<(), BlockError> {
        if self.read_only {
            return Err(BlockError::WriteProtected);
        }
        self.transfer(lba, data.as_ptr().cast_mut(), data.len(), true)
    }
    fn flush(&mut self) -> Result<(), BlockError> {
        if self.read_only {
            return Ok(());
        }
        self.unit
            .command(&[0x35, 0, 0, 0, 0, 0, 0, 0, 0, 0], Data::None, &mut [])
            .map(drop)
            .map_err(|_| BlockError::Device)
    }
}

pub fn status(e: BlockError) -> Status {
    match e {
        BlockError::Device => Status::DEVICE_ERROR,
        BlockError::MediaChanged => Status::MEDIA_CHANGED,
        BlockError::NoMedia => Status::NO_MEDIA,
        BlockError::WriteProtected => Status::WRITE_PROTECTED,
        BlockError::OutOfRange => Status::INVALID_PARAMETER,
    }
}

/// Block I/O with what stands behind it. The protocol is the first field: its address is the structure's.
#[repr(C)]
struct BlockDev {
    io: block_io::Protocol,
    io2: BlockIo2,
    disk: disk_io::Protocol,
    media: block_io::Media,
    volume: Volume,
}

#[repr(C)]
struct Token {
    event: efi::Event,
    status: Status,
}

/// `EFI_BLOCK_IO2_PROTOCOL`. Operations are done when the call returns; the event is signaled then.
#[repr(C)]
struct BlockIo2 {
    media: *const block_io::Media,
    reset: unsafe extern "efiapi" fn(*mut BlockIo2, Boolean) -> Status,
    read: unsafe extern "efiapi" fn(*mut BlockIo2, u32, u64, *mut Token, usize, *mut c_void) -> Status,
    write: unsafe extern "efiapi" fn(*mut BlockIo2, u32, u64, *mut Token, usize, *const c_void) -> Status,
    flush: unsafe extern "efiapi" fn(*mut BlockIo2, *mut Token) -> Status,
}

/// Disks and partitions in the order in which they were found.
pub struct Found {
    pub handle: efi::Handle,
    pub path: DevicePath,
    pub partition: Option<Partition>,
    pub removable: bool,
}

static FOUND: Global<Vec<Found>> = Global::new(Vec::new());

/// Calls `f` with everything that was found.
pub fn found<R>(f: impl FnOnce(&[Found]) -> R) -> R {
    // A copy: `f` may call out.
    let list = FOUND.with(|all| {
        let copy = |d: &Found| Found {
            handle: d.handle,
            path: d.path.clone(),
            partition: d.partition,
            removable: d.removable,
        };
        all.iter().map(copy).collect::<Vec<_>>()
    });
    f(&list)
}

/// Adds a unit: the whole, and its partitions.
pub fn add(unit: ScsiUnit, path: &DevicePath) {
    let Some(volume) = Volume::probe(unit) else { return };
    install(&volume, path, None);
    let partitions = partition::scan(&mut volume.clone()).unwrap_or_default();
    for p in &partitions {
        install(&volume.part(p), &path.clone().partition(p), Some(*p));
    }
    // A file system without a partition table (a "superfloppy", or a plain ISO).
    if partitions.is_empty() {
        log!("disk {}: no partitions", unit.lun);
    }
}

fn install(volume: &Volume, path: &DevicePath, part: Option<Partition>) {
    let media = block_io::Media {
        media_id: 1,
        removable_media: volume.removable,
        media_present: true,
        logical_partition: part.is_some(),
        read_only: volume.read_only,
        write_caching: !volume.read_only,
        block_size: volume.block as u32,
        io_align: 0,
        last_block: volume.blocks - 1,
        lowest_aligned_lba: 0,
        logical_blocks_per_physical_block: 1,
        optimal_transfer_length_granularity: 0,
    };
    let d = leak(BlockDev {
        io: block_io::Protocol {
            revision: 0x0002_001f,
            media: core::ptr::null(),
            reset,
            read_blocks,
            write_blocks,
            flush_blocks,
        },
        io2: BlockIo2 { media: core::ptr::null(), reset: reset2, read: read2, write: write2, flush: flush2 },
        disk: disk_io::Protocol { revision: 0x10000, read_disk, write_disk },
        media,
        volume: volume.clone(),
    });
    // SAFETY: leaked above; nobody else knows it yet.
    unsafe {
        (*d).io.media = &raw const (*d).media;
        (*d).io2.media = &raw const (*d).media;
    }
    let Ok(h) = handle::install(null_mut(), &DEVICE_PATH, image::bytes_of(path)) else { return };
    let _ = handle::install(h, &BLOCK_IO, d.cast());
    // SAFETY: fields of the leaked structure.
    unsafe {
        let _ = handle::install(h, &BLOCK_IO2, (&raw mut (*d).io2).cast());
        let _ = handle::install(h, &DISK_IO, (&raw mut (*d).disk).cast());
    }
    if let Some(p) = &part
        && p.is_esp()
        && matches!(p.identity, partition::Identity::Gpt { .. })
    {
        // The type GUID is installed as a tag on system partitions (UEFI 2.10, section 13.3.3).
        let _ = handle::install(h, &partition::TYPE_ESP, null_mut());
    }
    FOUND.with(|all| {
        all.push(Found { handle: h, path: path.clone(), partition: part, removable: volume.removable });
    });
    fs::mount(h, volume.clone());
}

/// ExitBootServices: nothing is cached here.
pub fn stop() {
    FOUND.with(Vec::clear);
}

/// The structure behind a Block I/O protocol.
///
/// # Safety
/// `p` came from [`install`].
unsafe fn device<'a>(p: *mut block_io::Protocol) -> &'a mut BlockDev {
    // SAFETY: the protocol is the first field of the structure, which lives for ever.
    unsafe { &mut *p.cast() }
}

unsafe extern "efiapi" fn reset(_: *mut block_io::Protocol, _: Boolean) -> Status {
    Status::SUCCESS
}

/// The checks that the specification asks for, in its order.
fn check(d: &BlockDev, id: u32, lba: u64, size: usize, buffer: *const c_void) -> Result<(), Status> {
    if id != d.media.media_id {
        return Err(Status::MEDIA_CHANGED);
    }
    if size == 0 {
        return Ok(());
    }
    if buffer.is_null() {
        return Err(Status::INVALID_PARAMETER);
    }
    if size % d.volume.block != 0 {
        return Err(Status::BAD_BUFFER_SIZE);
    }
    d.volume.check(lba, size).map_err(status)
}

unsafe extern "efiapi" fn read_blocks(
    p: *mut block_io::Protocol,
    id: u32,
    lba: u64,
    size: usize,
    buffer: *mut c_void,
) -> Status {
    // SAFETY: called through the protocol.
    let d = unsafe { device(p) };
    let r = check(d, id, lba, size, buffer);
    result(r.and_then(|()| d.volume.transfer(lba, buffer.cast(), size, false).map_err(status)))
}
unsafe extern "efiapi" fn write_blocks(
    p: *mut block_io::Protocol,
    id: u32,
    lba: u64,
    size: usize,
    buffer: *mut c_void,
) -> Status {
    // SAFETY: called through the protocol.
    let d = unsafe { device(p) };
    if d.volume.read_only {
        return Status::WRITE_PROTECTED;
    }
    let r = check(d, id, lba, size, buffer);
    result(r.and_then(|()| d.volume.transfer(lba, buffer.cast(), size, true).map_err(status)))
}
unsafe extern "efiapi" fn flush_blocks(p: *mut block_io::Protocol) -> Status {
    // SAFETY: called through the protocol.
    result(unsafe { device(p) }.volume.flush().map_err(status))
}

/// The structure behind a Block I/O 2 protocol.
///
/// # Safety
/// `p` came from [`install`].
unsafe fn device2<'a>(p: *mut BlockIo2) -> &'a mut BlockDev {
    // SAFETY: the protocol is a field of the structure, which lives for ever.
    unsafe { &mut *p.byte_sub(core::mem::offset_of!(BlockDev, io2)).cast() }
}

/// Ends an operation: through its token if it has an event, else by the status.
fn complete(token: *mut Token, s: Status) -> Status {
    if token.is_null() {
        return s;
    }
    // SAFETY: the caller passes a token.
    unsafe {
        if (*token).event.is_null() {
            return s;
        }
        (*token).status = s;
        let _ = event::signal((*token).event);
    }
    Status::SUCCESS
}
unsafe extern "efiapi" fn reset2(_: *mut BlockIo2, _: Boolean) -> Status {
    Status::SUCCESS
}
unsafe extern "efiapi" fn read2(
    p: *mut BlockIo2,
    id: u32,
    lba: u64,
    t: *mut Token,
    size: usize,
    b: *mut c_void,
) -> Status {
    // SAFETY: called through the protocol.
    let d = unsafe { device2(p) };
    match check(d, id, lba, size, b) {
        Ok(()) => complete(t, result(d.volume.transfer(lba, b.cast(), size, false).map_err(status))),
        Err(s) => s,
    }
}
unsafe extern "efiapi" fn write2(
    p: *mut BlockIo2,
    id: u32,
    lba: u64,
    t: *mut Token,
    size: usize,
    b: *const c_void,
) -> Status {
    // SAFETY: called through the protocol.
    let d = unsafe { device2(p) };
    if d.volume.read_only {
        return Status::WRITE_PROTECTED;
    }
    match check(d, id, lba, size, b) {
        Ok(()) => complete(t, result(d.volume.transfer(lba, b.cast_mut().cast(), size, true).map_err(status))),
        Err(s) => s,
    }
}
unsafe extern "efiapi" fn flush2(p: *mut BlockIo2, t: *mut Token) -> Status {
    // SAFETY: called through the protocol.
    let d = unsafe { device2(p) };
    complete(t, result(d.volume.flush().map_err(status)))
}

/// The structure behind a Disk I/O protocol.
///
/// # Safety
/// `p` came from [`install`].
unsafe fn device_disk<'a>(p: *mut disk_io::Protocol) -> &'a mut BlockDev {
    // SAFETY: the protocol is a field of the structure, which lives for ever.
    unsafe { &mut *p.byte_sub(core::mem::offset_of!(BlockDev, disk)).cast() }
}
fn disk_range(d: &BlockDev, id: u32, offset: u64, size: usize) -> Result<(), Status> {
    if id != d.media.media_id {
        return Err(Status::MEDIA_CHANGED);
    }
    let end = offset.checked_add(size as u64).ok_or(Status::INVALID_PARAMETER)?;
    if end > d.volume.blocks * d.volume.block as u64 { Err(Status::INVALID_PARAMETER) } else { Ok(()) }
}
unsafe extern "efiapi" fn read_disk(
    p: *mut disk_io::Protocol,
    id: u32,
    offset: u64,
    size: usize,
    b: *mut c_void,
) -> Status {
    // SAFETY: called through the protocol; the caller passes `size` bytes.
    let (d, data) = unsafe { (device_disk(p), slice::from_raw_parts_mut(b.cast::<u8>(), size)) };
    let r = disk_range(d, id, offset, size);
    result(r.and_then(|()| uefi_core::block::read_bytes(&mut d.volume, offset, data).map_err(status)))
}
unsafe extern "efiapi" fn write_disk(
    p: *mut disk_io::Protocol,
    id: u32,
    offset: u64,
    size: usize,
    b: *mut c_void,
) -> Status {
    // SAFETY: called through the protocol; the caller passes `size` bytes.
    let (d, data) = unsafe { (device_disk(p), slice::from_raw_parts(b.cast::<u8>(), size)) };
    let r = disk_range(d, id, offset, size);
    result(r.and_then(|()| uefi_core::block::write_bytes(&mut d.volume, offset, data).map_err(status)))
}
