//! Serial I/O (UEFI 2.10, section 12.8) on COM1, which the console uses too: what a program reads here the console does not get.

use super::serial::{self, get, put, register};
use crate::cell::Global;
use crate::image::bytes_of;
use crate::tables::{DEVICE_PATH, leak};
use crate::{arch, handle};
use core::ffi::c_void;
use core::ptr::null_mut;
use r_efi::efi::{self, Status};
use uefi_core::devpath::{DevicePath, text};
use uefi_core::guid::Guid;

/// `EFI_SERIAL_IO_PROTOCOL_GUID`.
const SERIAL_IO: Guid = Guid::new(0xbb25cf6f, 0xf1d4, 0x11d2, [0x9a, 0x0c, 0x00, 0x90, 0x27, 0x3f, 0xc1, 0xfd]);
/// Fastest rate: the divisor's clock of a PC's 16550A.
const CLOCK: u64 = 115_200;
const FIFO: u32 = 16;
/// Microseconds.
const DEFAULT_TIMEOUT: u32 = 1_000_000;

/// Control bits.
mod control {
    pub const DATA_TERMINAL_READY: u32 = 0x0001;
    pub const REQUEST_TO_SEND: u32 = 0x0002;
    pub const CLEAR_TO_SEND: u32 = 0x0010;
    pub const DATA_SET_READY: u32 = 0x0020;
    pub const RING_INDICATE: u32 = 0x0040;
    pub const CARRIER_DETECT: u32 = 0x0080;
    pub const INPUT_BUFFER_EMPTY: u32 = 0x0100;
    pub const OUTPUT_BUFFER_EMPTY: u32 = 0x0200;
    pub const HARDWARE_LOOPBACK: u32 = 0x1000;
    /// What a caller may set.
    pub const SETTABLE: u32 = DATA_TERMINAL_READY | REQUEST_TO_SEND | HARDWARE_LOOPBACK;
}

/// `EFI_SERIAL_IO_MODE`.
#[repr(C)]
struct Mode {
    control_mask: u32,
    timeout: u32,
    baud_rate: u64,
    receive_fifo_depth: u32,
    data_bits: u32,
    parity: u32,
    stop_bits: u32,
}

#[repr(C)]
struct SerialIo {
    revision: u32,
    reset: unsafe extern "efiapi" fn(*mut Self) -> Status,
    set_attributes: unsafe extern "efiapi" fn(*mut Self, u64, u32, u32, u32, u8, u32) -> Status,
    set_control: unsafe extern "efiapi" fn(*mut Self, u32) -> Status,
    get_control: unsafe extern "efiapi" fn(*mut Self, *mut u32) -> Status,
    write: unsafe extern "efiapi" fn(*mut Self, *mut usize, *mut c_void) -> Status,
    read: unsafe extern "efiapi" fn(*mut Self, *mut usize, *mut c_void) -> Status,
    mode: *mut Mode,
}

/// The handle, and the device path that is installed on it: it tells the line's attributes.
static PLACE: Global<(usize, usize)> = Global::new((0, 0));

/// Makes the protocol if the machine has a COM1.
pub fn init() {
    if !serial::present() {
        return;
    }
    let mode = leak(Mode {
        control_mask: control::SETTABLE
            | control::CLEAR_TO_SEND
            | control::DATA_SET_READY
            | control::RING_INDICATE
            | control::CARRIER_DETECT
            | control::INPUT_BUFFER_EMPTY
            | control::OUTPUT_BUFFER_EMPTY,
        timeout: DEFAULT_TIMEOUT,
        baud_rate: CLOCK,
        receive_fifo_depth: FIFO,
        data_bits: 8,
        parity: 1,
        stop_bits: 1,
    });
    let p = leak(SerialIo { revision: 0x1_0000, reset, set_attributes, set_control, get_control, write, read, mode });
    // SAFETY: leaked above.
    let path = bytes_of(&path(unsafe { &*mode }));
    let Ok(h) = handle::install(null_mut(), &DEVICE_PATH, path) else { return };
    let _ = handle::install(h, &SERIAL_IO, p.cast());
    PLACE.with(|place| *place = (h as usize, path as usize));
}

/// COM1 of the board, and the line as it is set.
fn path(mode: &Mode) -> DevicePath {
    let port = text::from_text("Serial(0x0)").unwrap_or_default();
    let mut d = [0; 15];
    d[4..12].copy_from_slice(&mode.baud_rate.to_le_bytes());
    (d[12], d[13], d[14]) = (mode.data_bits as u8, mode.parity as u8, mode.stop_bits as u8);
    port.with(3, 14, &d)
}

/// Programs the line as the mode says.
fn program(mode: &Mode) {
    let divisor = (CLOCK / mode.baud_rate.max(1)).clamp(1, 0xffff) as u16;
    // Data bits; two stop bits (1.5 with five data bits); parity enable, even, stick.
    let parity = match mode.parity {
        2 => 0x18,
        3 => 0x08,
        4 => 0x28,
        5 => 0x38,
        _ => 0,
    };
    let line = (mode.data_bits - 5) as u8 | if mode.stop_bits > 1 { 4 } else { 0 } | parity;
    let on = arch::interrupts_off();
    put(register::LINE_CONTROL, line | 0x80);
    put(register::DIVISOR_LOW, divisor as u8);
    put(register::DIVISOR_HIGH, (divisor >> 8) as u8);
    put(register::LINE_CONTROL, line);
    arch::interrupts_restore(on);
}

unsafe extern "efiapi" fn reset(this: *mut SerialIo) -> Status {
    // Both FIFOs on and empty, then the line as it was set.
    put(register::FIFO_CONTROL, 0xc7);
    // SAFETY: called through the protocol.
    program(unsafe { &*(*this).mode });
    put(register::MODEM_CONTROL, 3);
    Status::SUCCESS
}

unsafe extern "efiapi" fn set_attributes(
    this: *mut SerialIo,
    baud_rate: u64,
    fifo_depth: u32,
    timeout: u32,
    parity: u32,
    data_bits: u8,
    stop_bits: u32,
) -> Status {
    let or = |value: u32, default: u32| if value == 0 { default } else { value };
    let (data_bits, parity, stop_bits) = (or(data_bits.into(), 8), or(parity, 1), or(stop_bits, 1));
    let baud_rate = if baud_rate == 0 { CLOCK } else { baud_rate };
    let half = stop_bits == 2;
    let valid = (2..=CLOCK).contains(&baud_rate)
        && (5..=8).contains(&data_bits)
        && (1..=5).contains(&parity)
        && (1..=3).contains(&stop_bits)
        && (stop_bits == 1 || half == (data_bits == 5))
        && fifo_depth <= FIFO;
    if !valid {
        return Status::INVALID_PARAMETER;
    }
    // SAFETY: called through the protocol.
    let mode = unsafe { &mut *(*this).mode };
    // The rate that the divisor gives: the next lower one that the port has.
    mode.baud_rate = CLOCK / CLOCK.div_ceil(baud_rate);
    (mode.data_bits, mode.parity, mode.stop_bits) = (data_bits, parity, stop_bits);
    mode.receive_fifo_depth = or(fifo_depth, FIFO);
    mode.timeout = or(timeout, DEFAULT_TIMEOUT);
    program(mode);
    // Those who follow the device path are told by its reinstallation.
    let (h, old) = PLACE.with(|p| *p);
    let new = path(mode);
    let same = crate::tables::path(old as *const _).is_some_and(|p| p.to_bytes() == new.to_bytes());
    if !same {
        let new = bytes_of(&new);
        if handle::reinstall(h as efi::Handle, &DEVICE_PATH, old as *mut c_void, new).is_ok() {
            PLACE.with(|p| p.1 = new as usize);
        }
    }
    Status::SUCCESS
}

unsafe extern "efiapi" fn set_control(_: *mut SerialIo, bits: u32) -> Status {
    if bits & !control::SETTABLE != 0 {
        return Status::UNSUPPORTED;
    }
    let mut value = get(register::MODEM_CONTROL) & !0x13;
    for (bit, mask) in
        [(control::DATA_TERMINAL_READY, 1), (control::REQUEST_TO_SEND, 2), (control::HARDWARE_LOOPBACK, 0x10)]
    {
        if bits & bit != 0 {
            value |= mask;
        }
    }
    put(register::MODEM_CONTROL, value);
    Status::SUCCESS
}

unsafe extern "efiapi" fn get_control(_: *mut SerialIo, out: *mut u32) -> Status {
    let (modem, status, line) = (get(register::MODEM_CONTROL), get(register::MODEM_STATUS), get(register::LINE_STATUS));
    let mut bits = 0;
    for (on, bit) in [
        (modem & 1 != 0, control::DATA_TERMINAL_READY),
        (modem & 2 != 0, control::REQUEST_TO_SEND),
        (modem & 0x10 != 0, control::HARDWARE_LOOPBACK),
        (status & 0x10 != 0, control::CLEAR_TO_SEND),
        (status & 0x20 != 0, control::DATA_SET_READY),
        (status & 0x40 != 0, control::RING_INDICATE),
        (status & 0x80 != 0, control::CARRIER_DETECT),
        (line & 1 == 0, control::INPUT_BUFFER_EMPTY),
        (line & 0x40 != 0, control::OUTPUT_BUFFER_EMPTY),
    ] {
        if on {
            bits |= bit;
        }
    }
    crate::image::give(out, bits)
}

/// Waits until the line's status has a bit, at most as long as the mode says for a character.
fn wait(mode: &Mode, bit: u8) -> bool {
    let end = arch::now() + u64::from(mode.timeout) * 10;
    loop {
        if get(register::LINE_STATUS) & bit != 0 {
            return true;
        }
        if arch::now() >= end {
            return false;
        }
        core::hint::spin_loop();
    }
}

unsafe extern "efiapi" fn write(this: *mut SerialIo, size: *mut usize, data: *mut c_void) -> Status {
    if size.is_null() {
        return Status::INVALID_PARAMETER;
    }
    // SAFETY: called through the protocol; the caller passes `*size` bytes.
    unsafe {
        let n = size.read_unaligned();
        if n != 0 && data.is_null() {
            return Status::INVALID_PARAMETER;
        }
        for i in 0..n {
            if !wait(&*(*this).mode, 0x20) {
                size.write_unaligned(i);
                return Status::TIMEOUT;
            }
            put(register::DATA, *data.cast::<u8>().add(i));
        }
    }
    Status::SUCCESS
}

unsafe extern "efiapi" fn read(this: *mut SerialIo, size: *mut usize, data: *mut c_void) -> Status {
    if size.is_null() {
        return Status::INVALID_PARAMETER;
    }
    // SAFETY: as `write`.
    unsafe {
        let n = size.read_unaligned();
        if n != 0 && data.is_null() {
            return Status::INVALID_PARAMETER;
        }
        for i in 0..n {
            if !wait(&*(*this).mode, 1) {
                size.write_unaligned(i);
                return Status::TIMEOUT;
            }
            data.cast::<u8>().add(i).write(get(register::DATA));
        }
    }
    Status::SUCCESS
}
