//! COM1, a 16550A at 0x3F8.

use crate::arch::{in8, out8};
use core::sync::atomic::{AtomicBool, Ordering};

const BASE: u16 = 0x3f8;
static PRESENT: AtomicBool = AtomicBool::new(false);

/// Registers. While bit 7 of the line control is set, the first two are the divisor.
pub mod register {
    pub const DATA: u16 = 0;
    pub const DIVISOR_LOW: u16 = 0;
    pub const INTERRUPT_ENABLE: u16 = 1;
    pub const DIVISOR_HIGH: u16 = 1;
    pub const FIFO_CONTROL: u16 = 2;
    pub const LINE_CONTROL: u16 = 3;
    pub const MODEM_CONTROL: u16 = 4;
    pub const LINE_STATUS: u16 = 5;
    pub const MODEM_STATUS: u16 = 6;
    pub const SCRATCH: u16 = 7;
}

pub fn put(register: u16, value: u8) {
    out8(BASE + register, value);
}

pub fn get(register: u16) -> u8 {
    in8(BASE + register)
}

/// Sets 115200 8N1 if the machine has a COM1.
pub fn init(enabled: bool) {
    if !enabled {
        return;
    }
    // The scratch register tells whether a port is there.
    put(register::SCRATCH, 0x5a);
    if get(register::SCRATCH) != 0x5a {
        return;
    }
    put(register::INTERRUPT_ENABLE, 0);
    put(register::LINE_CONTROL, 0x80);
    put(register::DIVISOR_LOW, 1);
    put(register::DIVISOR_HIGH, 0);
    put(register::LINE_CONTROL, 3);
    put(register::FIFO_CONTROL, 0xc7);
    put(register::MODEM_CONTROL, 3);
    PRESENT.store(true, Ordering::Relaxed);
}

/// Is there a COM1?
pub fn present() -> bool {
    PRESENT.load(Ordering::Relaxed)
}

/// Sends a byte; gives up if the port does not take it.
pub fn send(byte: u8) {
    if !present() {
        return;
    }
    for _ in 0..1_000_000 {
        if get(register::LINE_STATUS) & 0x20 != 0 {
            break;
        }
        core::hint::spin_loop();
    }
    put(register::DATA, byte);
}

/// Takes a byte that has arrived.
pub fn receive() -> Option<u8> {
    (present() && get(register::LINE_STATUS) & 1 != 0).then(|| get(register::DATA))
}
