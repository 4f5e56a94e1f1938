//! # chipset: the emulated devices of a PC
//!
//! Interrupt controllers, timers, the real-time clock, serial ports, power management and reset: what a guest expects
//! to find at fixed ports and addresses. A device declares only the buses that it answers ([`Device::ports`],
//! [`Device::mmio`]), is made from a configuration, and obeys one request interface ([`Request`]): start, stop, reset,
//! save, restore.
//!
//! ## Rules that every device here keeps
//! * **One lock per device, and no lock held across a call into another device.** A device changes its own state and
//!   the wanted level of its interrupt lines ([`Line::set`]) under its lock, then lets go of it, then delivers the
//!   lines ([`Line::deliver`]).
//! * **Guest data is hostile.** Every access of every size at every claimed address returns in bounded time and never
//!   panics. Sizes and offsets that the real device does not decode read as all ones and are ignored when written.
//! * **All time is the partition's** ([`partition::Clock`]), through one [`TimerService`].
//! * **Saved state is the device's own versioned type** ([`SavedState`]), validated when it is loaded: a state file is
//!   as hostile as a guest.
//!
//! It may use: `partition` (clock, interrupts). It must never know: engines, machines, firmware tables, other crates'
//! devices.
#![forbid(unsafe_code)]

pub mod backlog;
pub mod debug_port;
pub mod device;
pub mod i8042;
pub mod ioapic;
pub mod line;
pub mod pic;
pub mod pit;
pub mod pm;
pub mod reset;
pub mod rtc;
pub mod serial;
pub mod timer;
pub mod uart;

pub use device::{Device, DeviceError, MmioIo, PortIo, PowerSink, Request, SavedState};
pub use line::{Line, LineSink};
pub use timer::{Timer, TimerService, TimerTarget};

use std::sync::{Mutex, MutexGuard};

/// Locks a mutex whether or not a thread has panicked while holding it: device state is kept consistent at every
/// statement that can panic (there should be none), and a worker that still runs must still be able to save.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

/// `value * numerator / denominator` without overflow in between; the largest value if the result does not fit.
pub(crate) fn scale(value: u64, numerator: u64, denominator: u64) -> u64 {
    u64::try_from(u128::from(value) * u128::from(numerator) / u128::from(denominator.max(1))).unwrap_or(u64::MAX)
}
