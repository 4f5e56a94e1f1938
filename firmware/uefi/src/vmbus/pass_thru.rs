//! Extended SCSI Pass Thru (UEFI 2.10, section 15.7): commands of programs for the units of a synthetic controller.
//!
//! A controller has one target, 0, with its units as LUNs. Operations are done when the call returns; an event that is given is
//! signaled then.

use super::storage::{self, Data, MAX_TRANSFER, ScsiError};
use crate::image::bytes_of;
use crate::tables::{self, DEVICE_PATH, leak};
use crate::{event, handle};
use alloc::vec::Vec;
use core::ffi::c_void;
use core::ptr::null_mut;
use core::slice;
use r_efi::efi::{self, Status};
use r_efi::protocols::device_path;
use uefi_core::devpath::DevicePath;
use uefi_core::guid::Guid;
use vmbus_protocol::storage::srb;

/// `EFI_EXT_SCSI_PASS_THRU_PROTOCOL_GUID`.
const PASS_THRU: Guid = Guid::new(0x143b7632, 0xb81b, 0x4cb7, [0xab, 0xd3, 0xb6, 0x25, 0xa5, 0xb9, 0xbf, 0xfe]);
/// `TARGET_MAX_BYTES`.
const TARGET_BYTES: usize = 16;
/// Longest command block.
const MAX_CDB: u8 = 16;

/// `EFI_EXT_SCSI_PASS_THRU_MODE`: physical and logical units can be reached.
#[repr(C)]
struct Mode {
    adapter_id: u32,
    attributes: u32,
    io_align: u32,
}

/// Host adapter statuses of a packet.
mod adapter {
    pub const OK: u8 = 0x00;
    pub const OTHER: u8 = 0x7f;
}

/// `EFI_EXT_SCSI_PASS_THRU_SCSI_REQUEST_PACKET`.
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

/// The protocol, with what stands behind it after its last field.
#[repr(C)]
struct PassThru {
    mode: *mut Mode,
    pass_thru: unsafe extern "efiapi" fn(*mut Self, *mut u8, u64, *mut Packet, efi::Event) -> Status,
    get_next_target_lun: unsafe extern "efiapi" fn(*mut Self, *mut *mut u8, *mut u64) -> Status,
    build_device_path: unsafe extern "efiapi" fn(*mut Self, *mut u8, u64, *mut *mut device_path::Protocol) -> Status,
    get_target_lun: unsafe extern "efiapi" fn(*mut Self, *mut device_path::Protocol, *mut *mut u8, *mut u64) -> Status,
    reset_channel: unsafe extern "efiapi" fn(*mut Self) -> Status,
    reset_target_lun: unsafe extern "efiapi" fn(*mut Self, *mut u8, u64) -> Status,
    get_next_target: unsafe extern "efiapi" fn(*mut Self, *mut *mut u8) -> Status,
    controller: usize,
    units: Vec<u8>,
}

/// Makes the controller's handle.
pub fn install(controller: usize, path: &DevicePath, units: &[u8]) {
    let mode = leak(Mode { adapter_id: controller as u32, attributes: 3, io_align: 0 });
    let p = leak(PassThru {
        mode,
        pass_thru,
        get_next_target_lun,
        build_device_path,
        get_target_lun,
        reset_channel,
        reset_target_lun,
        get_next_target,
        controller,
        units: units.to_vec(),
    });
    let Ok(h) = handle::install(null_mut(), &DEVICE_PATH, bytes_of(path)) else { return };
    let _ = handle::install(h, &PASS_THRU, p.cast());
}

/// A target that a caller passes.
///
/// # Safety
/// `p` is null or points at a target's bytes.
unsafe fn target(p: *const u8) -> Option<[u8; TARGET_BYTES]> {
    // SAFETY: the caller's promise.
    (!p.is_null()).then(|| unsafe { p.cast::<[u8; TARGET_BYTES]>().read_unaligned() })
}

impl PassThru {
    /// The unit that a target and LUN name.
    ///
    /// # Safety
    /// As [`target`].
    unsafe fn unit(&self, t: *const u8, lun: u64) -> Option<u8> {
        // SAFETY: the caller's promise.
        let t = unsafe { target(t) }?;
        let known = self.units.iter().copied().find(|u| u64::from(*u) == lun);
        known.filter(|_| t == [0; TARGET_BYTES])
    }
}

unsafe extern "efiapi" fn pass_thru(
    this: *mut PassThru,
    t: *mut u8,
    lun: u64,
    packet: *mut Packet,
    done: efi::Event,
) -> Status {
    if packet.is_null() {
        return Status::INVALID_PARAMETER;
    }
    // SAFETY: called through the protocol, with a packet and a target.
    let (this, p) = unsafe { (&*this, &mut *packet) };
    // SAFETY: as above.
    let Some(unit) = (unsafe { this.unit(t, lun) }) else { return Status::INVALID_PARAMETER };
    let (data, buffer, len) = match p.direction {
        0 => (Data::In, p.in_data, p.in_length),
        1 => (Data::Out, p.out_data, p.out_length),
        2 => return Status::UNSUPPORTED,
        _ => return Status::INVALID_PARAMETER,
    };
    if p.cdb.is_null() || p.cdb_length == 0 || len != 0 && buffer.is_null() || p.sense_length != 0 && p.sense.is_null()
    {
        return Status::INVALID_PARAMETER;
    }
    if p.cdb_length > MAX_CDB {
        return Status::UNSUPPORTED;
    }
    if len as usize > MAX_TRANSFER {
        // Told how much would go, the caller can split.
        *(if data == Data::In { &mut p.in_length } else { &mut p.out_length }) = MAX_TRANSFER as u32;
        return Status::BAD_BUFFER_SIZE;
    }
    let mut cdb = [0; MAX_CDB as usize];
    let cdb = &mut cdb[..usize::from(p.cdb_length)];
    // SAFETY: the packet's command block has as many bytes as it says.
    cdb.copy_from_slice(unsafe { slice::from_raw_parts(p.cdb.cast(), cdb.len()) });
    let data = if len == 0 { Data::None } else { data };
    let outcome = storage::execute(this.controller, unit, cdb, data, buffer.cast(), len as usize);
    let status = match outcome {
        Ok(o) => {
            *(if p.direction == 0 { &mut p.in_length } else { &mut p.out_length }) = o.transferred;
            p.target_status = o.status;
            let n = if o.status == 2 { o.sense_length.min(usize::from(p.sense_length)) } else { 0 };
            // SAFETY: the packet's sense buffer has as many bytes as it says.
            unsafe { p.sense.cast::<u8>().copy_from(o.sense.as_ptr(), n) };
            p.sense_length = n as u8;
            let carried_out = o.srb == srb::SUCCESS || o.status != 0;
            p.adapter_status = if carried_out { adapter::OK } else { adapter::OTHER };
            // The target's own refusal stands in its status; the command was carried out.
            if carried_out { Status::SUCCESS } else { Status::DEVICE_ERROR }
        }
        Err(e) => {
            (p.adapter_status, p.target_status, p.sense_length) = (adapter::OTHER, 0, 0);
            if matches!(e, ScsiError::NoUnit) { Status::NOT_FOUND } else { Status::DEVICE_ERROR }
        }
    };
    if status == Status::SUCCESS && !done.is_null() {
        let _ = event::signal(done);
    }
    status
}

unsafe extern "efiapi" fn get_next_target_lun(this: *mut PassThru, t: *mut *mut u8, lun: *mut u64) -> Status {
    if t.is_null() || lun.is_null() {
        return Status::INVALID_PARAMETER;
    }
    // SAFETY: called through the protocol; the pointers are not null, and the target's is to a target.
    unsafe {
        let (this, at) = (&*this, t.read_unaligned());
        let next = match target(at) {
            Some(t) if t == [0xff; TARGET_BYTES] => this.units.first(),
            Some(_) => match this.unit(at, lun.read_unaligned()) {
                Some(now) => this.units.iter().find(|u| **u > now),
                None => return Status::INVALID_PARAMETER,
            },
            None => return Status::INVALID_PARAMETER,
        };
        let Some(next) = next else { return Status::NOT_FOUND };
        at.write_bytes(0, TARGET_BYTES);
        lun.write_unaligned(u64::from(*next));
    }
    Status::SUCCESS
}

unsafe extern "efiapi" fn get_next_target(this: *mut PassThru, t: *mut *mut u8) -> Status {
    if t.is_null() {
        return Status::INVALID_PARAMETER;
    }
    // SAFETY: as `get_next_target_lun`.
    unsafe {
        let at = t.read_unaligned();
        match target(at) {
            Some(t) if t == [0xff; TARGET_BYTES] && !(*this).units.is_empty() => {
                at.write_bytes(0, TARGET_BYTES);
                Status::SUCCESS
            }
            Some(t) if t == [0xff; TARGET_BYTES] || t == [0; TARGET_BYTES] => Status::NOT_FOUND,
            _ => Status::INVALID_PARAMETER,
        }
    }
}

unsafe extern "efiapi" fn build_device_path(
    this: *mut PassThru,
    t: *mut u8,
    lun: u64,
    out: *mut *mut device_path::Protocol,
) -> Status {
    if out.is_null() || t.is_null() {
        return Status::INVALID_PARAMETER;
    }
    // SAFETY: called through the protocol, with a target.
    let Some(unit) = (unsafe { (*this).unit(t, lun) }) else { return Status::NOT_FOUND };
    // One node, without an end (the caller appends it).
    let node = DevicePath::new().scsi(0, u16::from(unit)).to_bytes();
    match tables::to_pool(&node[..node.len() - 4]) {
        Ok(p) => crate::image::give(out, p.cast()),
        Err(s) => s,
    }
}

unsafe extern "efiapi" fn get_target_lun(
    this: *mut PassThru,
    node: *mut device_path::Protocol,
    t: *mut *mut u8,
    lun: *mut u64,
) -> Status {
    // SAFETY: called through the protocol; a node begins with its type and length.
    unsafe {
        if node.is_null() || t.is_null() || t.read_unaligned().is_null() || lun.is_null() {
            return Status::INVALID_PARAMETER;
        }
        let n = node.cast::<u8>();
        if (*n, *n.add(1), *n.add(2), *n.add(3)) != (3, 2, 8, 0) {
            return Status::UNSUPPORTED;
        }
        let word = |at: usize| u16::from_le_bytes([*n.add(at), *n.add(at + 1)]);
        let known = (*this).units.iter().any(|u| u16::from(*u) == word(6));
        if word(4) != 0 || !known {
            return Status::NOT_FOUND;
        }
        t.read_unaligned().write_bytes(0, TARGET_BYTES);
        lun.write_unaligned(u64::from(word(6)));
    }
    Status::SUCCESS
}

// The synthetic controller has no reset that a guest could ask for while it is at work.
unsafe extern "efiapi" fn reset_channel(_: *mut PassThru) -> Status {
    Status::UNSUPPORTED
}
unsafe extern "efiapi" fn reset_target_lun(this: *mut PassThru, t: *mut u8, lun: u64) -> Status {
    // SAFETY: called through the protocol, with a target.
    let known = unsafe { (*this).unit(t, lun) }.is_some();
    if known { Status::UNSUPPORTED } else { Status::INVALID_PARAMETER }
}
