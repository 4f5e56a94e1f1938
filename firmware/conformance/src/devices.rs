//! EXT SCSI Pass Thru, Serial I/O, Memory Attribute (UEFI 2.10, sections 15.7, 12.8 and 37.8).

use crate::env::{bs, free, handles, locate, protocol};
use crate::report::{check, equal, holds, s::*, skip};
use core::ffi::c_void;
use core::ptr::null_mut;
use r_efi::efi::{self, Event, Guid, Handle, Status};
use r_efi::protocols::device_path::{self, Protocol as Path};
use r_efi::protocols::memory_attribute;

pub unsafe fn run() {
    scsi();
    serial();
    attributes();
}

type Target = [u8; 16];

#[repr(C)]
struct Packet {
    timeout: u64,
    in_data: *mut c_void,
    out_data: *mut c_void,
    sense: *mut c_void,
    cdb: *mut c_void,
    in_length: u32,
    out_length: u32,
    cdb_length: u8,
    direction: u8,
    adapter_status: u8,
    target_status: u8,
    sense_length: u8,
}

#[repr(C)]
struct Mode {
    adapter_id: u32,
    attributes: u32,
    io_align: u32,
}

#[repr(C)]
struct PassThru {
    mode: *mut Mode,
    pass_thru: unsafe extern "efiapi" fn(*mut PassThru, *mut u8, u64, *mut Packet, Event) -> Status,
    get_next_target_lun: unsafe extern "efiapi" fn(*mut PassThru, *mut *mut u8, *mut u64) -> Status,
    build_device_path: unsafe extern "efiapi" fn(*mut PassThru, *mut u8, u64, *mut *mut Path) -> Status,
    get_target_lun: unsafe extern "efiapi" fn(*mut PassThru, *mut Path, *mut *mut u8, *mut u64) -> Status,
    reset_channel: unsafe extern "efiapi" fn(*mut PassThru) -> Status,
    reset_target_lun: unsafe extern "efiapi" fn(*mut PassThru, *mut u8, u64) -> Status,
    get_next_target: unsafe extern "efiapi" fn(*mut PassThru, *mut *mut u8) -> Status,
}

const PASS_THRU: Guid =
    Guid::from_fields(0x143b_7632, 0xb81b, 0x4cb7, 0xab, 0xd3, &[0xb6, 0x25, 0xa5, 0xb9, 0xbf, 0xfe]);

/// A packet that reads `data` with `cdb`.
fn reads(cdb: &mut [u8], data: &mut [u8], sense: &mut [u8; 18]) -> Packet {
    Packet {
        timeout: 50_000_000,
        in_data: data.as_mut_ptr().cast(),
        out_data: null_mut(),
        sense: sense.as_mut_ptr().cast(),
        cdb: cdb.as_mut_ptr().cast(),
        in_length: data.len() as u32,
        out_length: 0,
        cdb_length: cdb.len() as u8,
        direction: 0,
        adapter_status: 0xff,
        target_status: 0xff,
        sense_length: 18,
    }
}

unsafe fn scsi() {
    let p: *mut PassThru = locate(&PASS_THRU);
    if p.is_null() {
        return skip("ExtScsiPassThru", "not offered");
    }
    holds("ExtScsiPassThru/attributes", (*(*p).mode).attributes & 3 != 0);
    let mut target: Target = [0xff; 16];
    let (mut at, mut lun) = (target.as_mut_ptr(), 0);
    let next = (*p).get_next_target_lun;
    check("ExtScsiPassThru.GetNextTargetLun/first", &[OK], next(p, &mut at, &mut lun));
    let first = (target, lun);
    let mut units = 1;
    let mut status = OK;
    // Some firmwares list every number that a unit could have.
    while units < 100_000 {
        status = next(p, &mut at, &mut lun);
        if status != OK {
            break;
        }
        units += 1;
    }
    check("ExtScsiPassThru.GetNextTargetLun/ends", &[NOT_FOUND], status);
    holds("ExtScsiPassThru.GetNextTargetLun/two-disks", units >= 2);
    let mut strange: Target = [0x77; 16];
    let (mut at, mut n) = (strange.as_mut_ptr(), 99);
    check("ExtScsiPassThru.GetNextTargetLun/not-one-of-them", &[INVALID], next(p, &mut at, &mut n));
    let mut none: Target = [0xff; 16];
    let mut at = none.as_mut_ptr();
    check("ExtScsiPassThru.GetNextTarget/first", &[OK], ((*p).get_next_target)(p, &mut at));
    let mut at = strange.as_mut_ptr();
    check("ExtScsiPassThru.GetNextTarget/not-one-of-them", &[INVALID], ((*p).get_next_target)(p, &mut at));

    let (mut target, lun) = first;
    commands(p, target.as_mut_ptr(), lun);
    scsi_paths(p, target.as_mut_ptr(), lun);
    check("ExtScsiPassThru.ResetChannel/good", &[OK, UNSUPPORTED], ((*p).reset_channel)(p));
    let s = ((*p).reset_target_lun)(p, target.as_mut_ptr(), lun);
    check("ExtScsiPassThru.ResetTargetLun/good", &[OK, UNSUPPORTED], s);
}

unsafe fn commands(p: *mut PassThru, target: *mut u8, lun: u64) {
    let f = (*p).pass_thru;
    let (mut data, mut sense) = ([0u8; 512], [0u8; 18]);
    // A unit attention of power-on may come first.
    let mut ready = [0u8; 6];
    for _ in 0..4 {
        let mut k = reads(&mut ready, &mut [], &mut sense);
        if f(p, target, lun, &mut k, null_mut()) == OK && k.target_status == 0 {
            break;
        }
    }
    let mut inquiry = [0x12, 0, 0, 0, 36, 0];
    let mut k = reads(&mut inquiry, &mut data[..36], &mut sense);
    check("ExtScsiPassThru.PassThru/inquiry", &[OK], f(p, target, lun, &mut k, null_mut()));
    holds("ExtScsiPassThru.PassThru/statuses", k.adapter_status == 0 && k.target_status == 0);
    holds("ExtScsiPassThru.PassThru/transferred", k.in_length == 36 && data[0] == 0);
    let mut capacity = [0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let mut k = reads(&mut capacity, &mut data[..8], &mut sense);
    check("ExtScsiPassThru.PassThru/capacity", &[OK], f(p, target, lun, &mut k, null_mut()));
    equal(
        "ExtScsiPassThru.PassThru/block-size",
        512,
        u64::from(u32::from_be_bytes([data[4], data[5], data[6], data[7]])),
    );
    let mut read = [0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0];
    let mut k = reads(&mut read, &mut data, &mut sense);
    check("ExtScsiPassThru.PassThru/read", &[OK], f(p, target, lun, &mut k, null_mut()));
    // Beyond the end: the command is carried out, and its status says what is wrong.
    let mut beyond = [0x28, 0, 0x7f, 0xff, 0xff, 0xff, 0, 0, 1, 0];
    let mut k = reads(&mut beyond, &mut data, &mut sense);
    let s = f(p, target, lun, &mut k, null_mut());
    check("ExtScsiPassThru.PassThru/check-condition", &[OK, DEVICE], s);
    equal("ExtScsiPassThru.PassThru/target-status", 2, u64::from(k.target_status));
    holds("ExtScsiPassThru.PassThru/sense", k.sense_length >= 14 && sense[2] & 15 == 5 && sense[12] == 0x21);

    let mut k = reads(&mut inquiry, &mut data[..36], &mut sense);
    k.direction = 3;
    check("ExtScsiPassThru.PassThru/unknown-direction", &[INVALID], f(p, target, lun, &mut k, null_mut()));
    let mut k = reads(&mut inquiry, &mut data[..36], &mut sense);
    k.cdb_length = 0;
    check("ExtScsiPassThru.PassThru/no-command", &[INVALID], f(p, target, lun, &mut k, null_mut()));
    let mut k = reads(&mut inquiry, &mut data[..36], &mut sense);
    k.in_data = null_mut();
    check("ExtScsiPassThru.PassThru/no-buffer", &[INVALID], f(p, target, lun, &mut k, null_mut()));
    let mut k = reads(&mut inquiry, &mut data[..36], &mut sense);
    let mut strange: Target = [0x77; 16];
    let s = f(p, strange.as_mut_ptr(), lun, &mut k, null_mut());
    check("ExtScsiPassThru.PassThru/no-such-target", &[INVALID, TIMEOUT], s);
    let mut k = reads(&mut inquiry, &mut data[..36], &mut sense);
    k.in_length = 64 << 20;
    let s = f(p, target, lun, &mut k, null_mut());
    check("ExtScsiPassThru.PassThru/too-long", &[BAD_SIZE], s);
    holds("ExtScsiPassThru.PassThru/longest-told", k.in_length > 0 && k.in_length < 64 << 20);
}

unsafe fn scsi_paths(p: *mut PassThru, target: *mut u8, lun: u64) {
    let mut path = null_mut();
    let build = (*p).build_device_path;
    check("ExtScsiPassThru.BuildDevicePath/good", &[OK], build(p, target, lun, &mut path));
    check("ExtScsiPassThru.BuildDevicePath/null", &[INVALID], build(p, target, lun, null_mut()));
    let mut strange: Target = [0x77; 16];
    let mut other = null_mut();
    let s = build(p, strange.as_mut_ptr(), lun, &mut other);
    check("ExtScsiPassThru.BuildDevicePath/no-such-target", &[NOT_FOUND], s);
    let mut found: Target = [0; 16];
    let (mut at, mut n) = (found.as_mut_ptr(), 99);
    let get = (*p).get_target_lun;
    check("ExtScsiPassThru.GetTargetLun/good", &[OK], get(p, path, &mut at, &mut n));
    holds("ExtScsiPassThru.GetTargetLun/same", n == lun && found[0] == *target);
    check("ExtScsiPassThru.GetTargetLun/null-path", &[INVALID], get(p, null_mut(), &mut at, &mut n));
    check("ExtScsiPassThru.GetTargetLun/null-target", &[INVALID], get(p, path, null_mut(), &mut n));
    check("ExtScsiPassThru.GetTargetLun/null-lun", &[INVALID], get(p, path, &mut at, null_mut()));
    let end: [u8; 4] = [0x7f, 0xff, 4, 0];
    let s = get(p, end.as_ptr().cast_mut().cast(), &mut at, &mut n);
    check("ExtScsiPassThru.GetTargetLun/other-node", &[UNSUPPORTED], s);
    free(path);
}

#[repr(C)]
struct SerialMode {
    control_mask: u32,
    timeout: u32,
    baud_rate: u64,
    fifo_depth: u32,
    data_bits: u32,
    parity: u32,
    stop_bits: u32,
}
#[repr(C)]
struct SerialIo {
    revision: u32,
    reset: unsafe extern "efiapi" fn(*mut SerialIo) -> Status,
    set_attributes: unsafe extern "efiapi" fn(*mut SerialIo, u64, u32, u32, u32, u8, u32) -> Status,
    set_control: unsafe extern "efiapi" fn(*mut SerialIo, u32) -> Status,
    get_control: unsafe extern "efiapi" fn(*mut SerialIo, *mut u32) -> Status,
    write: unsafe extern "efiapi" fn(*mut SerialIo, *mut usize, *mut c_void) -> Status,
    read: unsafe extern "efiapi" fn(*mut SerialIo, *mut usize, *mut c_void) -> Status,
    mode: *mut SerialMode,
}
const SERIAL_IO: Guid =
    Guid::from_fields(0xbb25_cf6f, 0xf1d4, 0x11d2, 0x9a, 0x0c, &[0x00, 0x90, 0x27, 0x3f, 0xc1, 0xfd]);

unsafe fn serial() {
    let (all, list) = handles(&SERIAL_IO);
    let first: Option<Handle> = all.first().copied();
    free(list);
    let Some(h) = first else { return skip("SerialIo", "not offered") };
    let p: *mut SerialIo = protocol(h, &SERIAL_IO);
    holds("SerialIo/revision", (*p).revision >= 0x1_0000);
    let path: *mut u8 = protocol(h, &device_path::PROTOCOL_GUID);
    holds("SerialIo/device-path", !path.is_null());
    let m = &*(*p).mode;
    holds("SerialIo/mode", m.baud_rate >= 9600 && (5..=8).contains(&m.data_bits));
    check("SerialIo.Reset/good", &[OK], ((*p).reset)(p));
    let set = (*p).set_attributes;
    check("SerialIo.SetAttributes/defaults", &[OK], set(p, 0, 0, 0, 0, 0, 0));
    check("SerialIo.SetAttributes/good", &[OK], set(p, 115_200, 1, 1_000_000, 1, 8, 1));
    holds(
        "SerialIo.SetAttributes/in-mode",
        m.baud_rate == 115_200 && m.data_bits == 8 && m.parity == 1 && m.stop_bits == 1,
    );
    check("SerialIo.SetAttributes/data-bits", &[INVALID], set(p, 115_200, 1, 1_000_000, 1, 9, 1));
    check("SerialIo.SetAttributes/parity", &[INVALID], set(p, 115_200, 1, 1_000_000, 9, 8, 1));
    check("SerialIo.SetAttributes/stop-bits", &[INVALID], set(p, 115_200, 1, 1_000_000, 1, 8, 9));
    check("SerialIo.SetAttributes/too-fast", &[INVALID], set(p, 1_000_000_000, 1, 1_000_000, 1, 8, 1));
    let mut bits = 0;
    check("SerialIo.GetControl/good", &[OK], ((*p).get_control)(p, &mut bits));
    holds("SerialIo.GetControl/output-empty", bits & 0x200 != 0);
    // Data terminal ready and request to send.
    check("SerialIo.SetControl/good", &[OK], ((*p).set_control)(p, 3));
    check("SerialIo.SetControl/input-bits", &[UNSUPPORTED], ((*p).set_control)(p, 0x10));
    check("SerialIo.SetControl/unknown", &[UNSUPPORTED], ((*p).set_control)(p, 0x8000_0000));
    let mut text = *b"\r\nserial-io-was-here\r\n";
    let mut n = text.len();
    check("SerialIo.Write/good", &[OK], ((*p).write)(p, &mut n, text.as_mut_ptr().cast()));
    equal("SerialIo.Write/all", text.len() as u64, n as u64);
    let mut nothing = 0;
    check("SerialIo.Write/nothing", &[OK], ((*p).write)(p, &mut nothing, null_mut()));
    loopback(p);
    let _ = set(p, 115_200, 1, 20_000, 1, 8, 1);
    let mut n = 1;
    check("SerialIo.Read/nothing-comes", &[TIMEOUT], ((*p).read)(p, &mut n, text.as_mut_ptr().cast()));
    equal("SerialIo.Read/none", 0, n as u64);
}

/// What is written comes back. Nothing else may look at the line meanwhile: neither a console's timer nor the transcript.
unsafe fn loopback(p: *mut SerialIo) {
    let old = (bs().raise_tpl)(16);
    let on = ((*p).set_control)(p, 0x1003);
    let mut bits = 0;
    let _ = ((*p).get_control)(p, &mut bits);
    let mut sent = *b"loop";
    let mut n = 4;
    let wrote = ((*p).write)(p, &mut n, sent.as_mut_ptr().cast());
    let mut back = [0u8; 4];
    let mut m = 4;
    let read = ((*p).read)(p, &mut m, back.as_mut_ptr().cast());
    let off = ((*p).set_control)(p, 3);
    (bs().restore_tpl)(old);
    check("SerialIo.SetControl/loopback", &[OK, UNSUPPORTED], on);
    check("SerialIo.SetControl/no-loopback", &[OK], off);
    holds("SerialIo.GetControl/loopback", on != OK || bits & 0x1000 != 0);
    holds("SerialIo.Read/what-was-written", on != OK || (wrote == OK && read == OK && m == 4 && back == sent));
}

unsafe fn attributes() {
    let p: *mut memory_attribute::Protocol = locate(&memory_attribute::PROTOCOL_GUID);
    if p.is_null() {
        return skip("MemoryAttribute", "not offered");
    }
    let mut at = 0;
    let _ = (bs().allocate_pages)(efi::ALLOCATE_ANY_PAGES, efi::LOADER_DATA, 4, &mut at);
    let (get, set, clear) = ((*p).get_memory_attributes, (*p).set_memory_attributes, (*p).clear_memory_attributes);
    let (ro, xp, rp) = (efi::MEMORY_RO, efi::MEMORY_XP, efi::MEMORY_RP);
    let mut a = 0;
    // Whatever protects fresh memory is taken away first.
    let _ = clear(p, at, 0x4000, ro | xp | rp);
    check("MemoryAttribute.Get/good", &[OK], get(p, at, 0x4000, &mut a));
    equal("MemoryAttribute.Get/none", 0, a);
    check("MemoryAttribute.Set/read-only", &[OK], set(p, at + 0x1000, 0x1000, ro | xp));
    check("MemoryAttribute.Get/set", &[OK], get(p, at + 0x1000, 0x1000, &mut a));
    equal("MemoryAttribute.Get/read-only-no-execute", ro | xp, a);
    check("MemoryAttribute.Get/not-the-same", &[NO_MAPPING], get(p, at, 0x4000, &mut a));
    check("MemoryAttribute.Get/beside", &[OK], get(p, at + 0x2000, 0x2000, &mut a));
    equal("MemoryAttribute.Get/beside-is-free", 0, a);
    check("MemoryAttribute.Clear/one", &[OK], clear(p, at + 0x1000, 0x1000, ro));
    let _ = get(p, at + 0x1000, 0x1000, &mut a);
    equal("MemoryAttribute.Clear/other-stays", xp, a);
    ((at + 0x1000) as *mut u64).write_volatile(42);
    equal("MemoryAttribute.Clear/writable", 42, ((at + 0x1000) as *const u64).read_volatile());
    check("MemoryAttribute.Set/read-protect", &[OK], set(p, at + 0x3000, 0x1000, rp));
    let _ = get(p, at + 0x3000, 0x1000, &mut a);
    equal("MemoryAttribute.Get/read-protected", rp, a);
    check("MemoryAttribute.Clear/all", &[OK], clear(p, at, 0x4000, ro | xp | rp));
    let _ = get(p, at, 0x4000, &mut a);
    equal("MemoryAttribute.Clear/all-gone", 0, a);
    check("MemoryAttribute.Get/nothing", &[INVALID], get(p, at, 0, &mut a));
    check("MemoryAttribute.Get/null", &[INVALID], get(p, at, 0x1000, null_mut()));
    check("MemoryAttribute.Get/unaligned", &[UNSUPPORTED], get(p, at + 8, 0x1000, &mut a));
    check("MemoryAttribute.Get/odd-length", &[UNSUPPORTED], get(p, at, 0x800, &mut a));
    check("MemoryAttribute.Set/nothing", &[INVALID], set(p, at, 0, ro));
    check("MemoryAttribute.Set/no-attribute", &[INVALID], set(p, at, 0x1000, 0));
    check("MemoryAttribute.Set/other-attribute", &[INVALID], set(p, at, 0x1000, efi::MEMORY_WB));
    check("MemoryAttribute.Set/unaligned", &[UNSUPPORTED], set(p, at + 8, 0x1000, ro));
    check("MemoryAttribute.Set/odd-length", &[UNSUPPORTED], set(p, at, 0x800, ro));
    check("MemoryAttribute.Clear/nothing", &[INVALID], clear(p, at, 0, ro));
    check("MemoryAttribute.Clear/no-attribute", &[INVALID], clear(p, at, 0x1000, 0));
    check("MemoryAttribute.Clear/other-attribute", &[INVALID], clear(p, at, 0x1000, efi::MEMORY_UC));
    check("MemoryAttribute.Clear/unaligned", &[UNSUPPORTED], clear(p, at + 8, 0x1000, ro));
    // Whoever gets a page next finds it as memory is.
    let _ = set(p, at, 0x1000, ro | xp);
    check("MemoryAttribute.FreePages/protected", &[OK], (bs().free_pages)(at, 4));
    let mut same = at;
    let got = (bs().allocate_pages)(efi::ALLOCATE_ADDRESS, efi::LOADER_DATA, 4, &mut same);
    check("MemoryAttribute.AllocatePages/was-protected", &[OK], got);
    let _ = get(p, at, 0x4000, &mut a);
    equal("MemoryAttribute.Get/after-free", 0, a);
    let _ = (bs().free_pages)(at, 4);
}
