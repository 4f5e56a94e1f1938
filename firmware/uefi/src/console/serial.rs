//! COM1, a 16550A at 0x3F8.

use crate::arch::{in8, out8};
use core::sync::atomic::{AtomicBool, Ordering};

pub const BASE: u16 = 0x3f8;
static PRESENT: AtomicBool = AtomicBool::new(false);

/// Sets 115200 8N1 if the machine has a COM1.
pub fn init(enabled: bool) {
    if !enabled {
        return;
    }
    // The scratch register tells whether a port is there.
    out8(BASE + 7, 0x5a);
    if in8(BASE + 7) != 0x5a {
        return;
    }
    out8(BASE + 1, 0);
    out8(BASE + 3, 0x80);
    out8(BASE, 1);
    out8(BASE + 1, 0);
    out8(BASE + 3, 3);
    out8(BASE + 2, 0xc7);
    out8(BASE + 4, 3);
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
        if in8(BASE + 5) & 0x20 != 0 {
            break;
        }
        core::hint::spin_loop();
    }
    out8(BASE, byte);
}

/// Takes a byte that has arrived.
pub fn receive() -> Option<u8> {
    (present() && in8(BASE + 5) & 1 != 0).then(|| in8(BASE))
}
