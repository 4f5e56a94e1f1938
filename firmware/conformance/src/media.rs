//! Block I/O, Block I/O 2, Disk I/O (UEFI 2.10, sections 13.7 to 13.10) on a disk that is for it: its first block begins with
//! `VIRIDIAN-SCRATCH`.

use crate::env::{bs, free, handles, protocol};
use crate::report::{check, equal, holds, s::*, skip};
use core::ffi::c_void;
use core::ptr::null_mut;
use r_efi::efi::{self, Boolean, Guid, Handle, Status};
use r_efi::protocols::block_io::{self, PROTOCOL_GUID as BLOCK_IO};
use r_efi::protocols::disk_io;

const BLOCK_IO2: Guid =
    Guid::from_fields(0xa77b_2472, 0xe282, 0x4e9f, 0xa2, 0x45, &[0xc2, 0xc0, 0xe2, 0x7b, 0xbc, 0xc1]);

#[repr(C)]
struct Token {
    event: efi::Event,
    status: Status,
}
#[repr(C)]
struct BlockIo2 {
    media: *mut block_io::Media,
    reset: unsafe extern "efiapi" fn(*mut BlockIo2, Boolean) -> Status,
    read: unsafe extern "efiapi" fn(*mut BlockIo2, u32, u64, *mut Token, usize, *mut c_void) -> Status,
    write: unsafe extern "efiapi" fn(*mut BlockIo2, u32, u64, *mut Token, usize, *mut c_void) -> Status,
    flush: unsafe extern "efiapi" fn(*mut BlockIo2, *mut Token) -> Status,
}

#[repr(C, align(4096))]
struct Buffer([u8; 8192]);
static mut BUFFER: Buffer = Buffer([0; 8192]);
static mut OTHER: Buffer = Buffer([0; 8192]);

fn buffer() -> *mut u8 {
    (&raw mut BUFFER).cast()
}
fn other() -> *mut u8 {
    (&raw mut OTHER).cast()
}

/// The disk for it.
pub unsafe fn scratch() -> Option<Handle> {
    let (all, list) = handles(&BLOCK_IO);
    let found = all.iter().copied().find(|h| {
        let p: *mut block_io::Protocol = protocol(*h, &BLOCK_IO);
        let m = (*p).media;
        let size = (*m).block_size as usize;
        (*m).media_present
            && !(*m).logical_partition
            && size <= 4096
            && ((*p).read_blocks)(p, (*m).media_id, 0, size, buffer().cast()) == OK
            && core::slice::from_raw_parts(buffer(), 16) == b"VIRIDIAN-SCRATCH"
    });
    free(list);
    found
}

pub unsafe fn run() {
    let Some(h) = scratch() else { return holds("BlockIo/scratch-disk", false) };
    blocks(h);
    blocks_2(h);
    bytes(h);
}

unsafe fn blocks(h: Handle) {
    let p: *mut block_io::Protocol = protocol(h, &BLOCK_IO);
    let m = &*(*p).media;
    holds("BlockIo/revision", (*p).revision >= 0x1_0000);
    holds("BlockIo/media", m.media_present && !m.read_only && !m.removable_media && m.block_size == 512);
    equal("BlockIo/last-block", (4 << 20) / 512 - 1, m.last_block);
    let (id, last) = (m.media_id, m.last_block);
    let b: *mut c_void = buffer().cast();
    let read = (*p).read_blocks;
    check("BlockIo.ReadBlocks/good", &[OK], read(p, id, 0, 1024, b));
    check("BlockIo.ReadBlocks/nothing", &[OK], read(p, id, 0, 0, b));
    check("BlockIo.ReadBlocks/last", &[OK], read(p, id, last, 512, b));
    check("BlockIo.ReadBlocks/other-medium", &[CHANGED], read(p, id.wrapping_add(7), 0, 512, b));
    check("BlockIo.ReadBlocks/half-a-block", &[BAD_SIZE], read(p, id, 0, 700, b));
    check("BlockIo.ReadBlocks/beyond", &[INVALID], read(p, id, last + 1, 512, b));
    check("BlockIo.ReadBlocks/over-the-end", &[INVALID], read(p, id, last, 1024, b));
    check("BlockIo.ReadBlocks/far-beyond", &[INVALID], read(p, id, u64::MAX, 512, b));
    check("BlockIo.ReadBlocks/null", &[INVALID], read(p, id, 0, 512, null_mut()));

    let write = (*p).write_blocks;
    (0..2048).for_each(|i| buffer().add(i).write(i as u8 ^ 0x5a));
    check("BlockIo.WriteBlocks/good", &[OK], write(p, id, 8, 2048, b));
    check("BlockIo.FlushBlocks/good", &[OK], ((*p).flush_blocks)(p));
    other().write_bytes(0, 2048);
    let _ = read(p, id, 8, 2048, other().cast());
    holds("BlockIo.WriteBlocks/written", (0..2048).all(|i| *other().add(i) == i as u8 ^ 0x5a));
    check("BlockIo.WriteBlocks/other-medium", &[CHANGED], write(p, id.wrapping_add(7), 8, 512, b));
    check("BlockIo.WriteBlocks/half-a-block", &[BAD_SIZE], write(p, id, 8, 100, b));
    check("BlockIo.WriteBlocks/beyond", &[INVALID], write(p, id, last + 1, 512, b));
    check("BlockIo.WriteBlocks/null", &[INVALID], write(p, id, 8, 512, null_mut()));
    check("BlockIo.Reset/good", &[OK], ((*p).reset)(p, Boolean::FALSE));
}

unsafe fn blocks_2(h: Handle) {
    let p: *mut BlockIo2 = protocol(h, &BLOCK_IO2);
    if p.is_null() {
        return skip("BlockIo2", "not offered for this disk");
    }
    let (id, last) = ((*(*p).media).media_id, (*(*p).media).last_block);
    let b: *mut c_void = buffer().cast();
    check("BlockIo2.ReadBlocksEx/no-token", &[OK], ((*p).read)(p, id, 8, null_mut(), 512, b));
    let mut event = null_mut();
    let _ = (bs().create_event)(0, 0, None, null_mut(), &mut event);
    let mut t = Token { event, status: NOT_READY };
    buffer().write_bytes(0, 2048);
    check("BlockIo2.ReadBlocksEx/token", &[OK], ((*p).read)(p, id, 8, &mut t, 2048, b));
    let mut i = 0;
    let _ = (bs().wait_for_event)(1, &mut event, &mut i);
    check("BlockIo2.ReadBlocksEx/token-status", &[OK], t.status);
    holds("BlockIo2.ReadBlocksEx/read", (0..2048).all(|i| *buffer().add(i) == i as u8 ^ 0x5a));
    check("BlockIo2.ReadBlocksEx/other-medium", &[CHANGED], ((*p).read)(p, id.wrapping_add(7), 8, &mut t, 512, b));
    check("BlockIo2.ReadBlocksEx/half-a-block", &[BAD_SIZE], ((*p).read)(p, id, 8, &mut t, 100, b));
    check("BlockIo2.ReadBlocksEx/beyond", &[INVALID], ((*p).read)(p, id, last + 1, &mut t, 512, b));
    check("BlockIo2.ReadBlocksEx/null", &[INVALID], ((*p).read)(p, id, 8, &mut t, 512, null_mut()));
    t.status = NOT_READY;
    check("BlockIo2.WriteBlocksEx/token", &[OK], ((*p).write)(p, id, 16, &mut t, 512, b));
    let _ = (bs().wait_for_event)(1, &mut event, &mut i);
    check("BlockIo2.WriteBlocksEx/token-status", &[OK], t.status);
    check("BlockIo2.FlushBlocksEx/no-token", &[OK], ((*p).flush)(p, null_mut()));
    t.status = NOT_READY;
    check("BlockIo2.FlushBlocksEx/token", &[OK], ((*p).flush)(p, &mut t));
    let _ = (bs().wait_for_event)(1, &mut event, &mut i);
    check("BlockIo2.FlushBlocksEx/token-status", &[OK], t.status);
    check("BlockIo2.Reset/good", &[OK], ((*p).reset)(p, Boolean::FALSE));
    let _ = (bs().close_event)(event);
}

unsafe fn bytes(h: Handle) {
    let p: *mut disk_io::Protocol = protocol(h, &disk_io::PROTOCOL_GUID);
    let io: *mut block_io::Protocol = protocol(h, &BLOCK_IO);
    holds("DiskIo/there", !p.is_null());
    let id = (*(*io).media).media_id;
    let size = 4u64 << 20;
    let b: *mut c_void = buffer().cast();
    let read = (*p).read_disk;
    check("DiskIo.ReadDisk/good", &[OK], read(p, id, 3, 13, b));
    holds("DiskIo.ReadDisk/read", core::slice::from_raw_parts(buffer(), 13) == b"IDIAN-SCRATCH");
    check("DiskIo.ReadDisk/over-a-block", &[OK], read(p, id, 8 * 512 + 500, 600, b));
    holds("DiskIo.ReadDisk/across", (0..600).all(|i| *buffer().add(i) == (500 + i) as u8 ^ 0x5a));
    check("DiskIo.ReadDisk/last-byte", &[OK], read(p, id, size - 1, 1, b));
    check("DiskIo.ReadDisk/beyond", &[INVALID], read(p, id, size, 1, b));
    check("DiskIo.ReadDisk/over-the-end", &[INVALID], read(p, id, size - 1, 2, b));
    check("DiskIo.ReadDisk/other-medium", &[CHANGED], read(p, id.wrapping_add(7), 0, 16, b));
    let write = (*p).write_disk;
    buffer().write_bytes(0xc3, 700);
    check("DiskIo.WriteDisk/good", &[OK], write(p, id, 20 * 512 + 100, 700, b));
    let _ = read(p, id, 20 * 512, 1536, other().cast());
    let inside = |i: usize| (100..800).contains(&i);
    holds("DiskIo.WriteDisk/only-those", (0..1536).all(|i| (*other().add(i) == 0xc3) == inside(i)));
    check("DiskIo.WriteDisk/beyond", &[INVALID], write(p, id, size, 1, b));
    check("DiskIo.WriteDisk/other-medium", &[CHANGED], write(p, id.wrapping_add(7), 0, 16, b));
}
