//! What a device is: the buses it answers, and the requests it obeys.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::ops::{Range, RangeInclusive};
use thiserror::Error;

/// A device of the machine.
pub trait Device: Send + Sync {
    /// Name of this instance, unique in its machine ("pic", "com1"). It names the device in saved state and in
    /// statistics, so it must stay the same from one version to the next.
    fn name(&self) -> &str;

    /// The port bus side, if the device answers ports.
    fn ports(&self) -> Option<&dyn PortIo> {
        None
    }

    /// The memory bus side, if the device answers physical addresses.
    fn mmio(&self) -> Option<&dyn MmioIo> {
        None
    }

    /// Obeys a request. The machine sends requests from one thread at a time; see [`Request`] for the order.
    fn request(&self, request: Request<'_>) -> Result<(), DeviceError>;
}

/// A device on the port bus. Calls come from the thread of any VP at any time, several at once.
pub trait PortIo: Send + Sync {
    /// The ports that it answers. The ranges do not change while the device exists.
    fn port_ranges(&self) -> Vec<RangeInclusive<u16>>;
    /// IN: 1, 2 or 4 bytes from `port`, which is in a claimed range (its last byte may be beyond the range's end).
    fn port_read(&self, port: u16, data: &mut [u8]);
    /// OUT: 1, 2 or 4 bytes.
    fn port_write(&self, port: u16, data: &[u8]);
}

/// A device on the memory bus. Calls come from the thread of any VP at any time, several at once.
pub trait MmioIo: Send + Sync {
    /// The physical addresses that it answers. The ranges do not change while the device exists.
    fn mmio_ranges(&self) -> Vec<Range<u64>>;
    /// A read of 1 to 8 bytes that does not cross an 8-byte boundary.
    fn mmio_read(&self, gpa: u64, data: &mut [u8]);
    /// A write of 1 to 8 bytes that does not cross an 8-byte boundary.
    fn mmio_write(&self, gpa: u64, data: &[u8]);
}

/// What the machine asks of a device.
///
/// A device is made stopped. The order is always: `Restore`? `Start` (accesses, time passes) `Stop` (`Save` | `Reset` |
/// `Restore`)* `Start` ... The machine sends `Stop` when no VP runs and the clock stands, to the devices that raise
/// interrupts before those that receive them; `Start` goes the other way, before the clock and the VPs start.
pub enum Request<'a> {
    /// The partition is about to run.
    Start,
    /// The partition has stopped: when this returns, the device has no host activity in flight that could change its
    /// state or the guest's memory.
    Stop,
    /// Hardware reset: the state that the device has after power-on, except what a battery keeps.
    Reset,
    /// Writes the complete state to the place given.
    Save(&'a mut Option<SavedState>),
    /// Takes over a saved state. On an error the device may be left in any consistent state; the machine is discarded.
    Restore(&'a SavedState),
}

/// A device's saved state: the version of its type, and the value.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SavedState {
    /// Version of the device's state type, from 1.
    pub version: u32,
    /// The value.
    pub value: ciborium::Value,
}

impl SavedState {
    /// Wraps a device's state.
    pub fn new<T: Serialize>(version: u32, state: &T) -> Result<Self, DeviceError> {
        let value = ciborium::Value::serialized(state).map_err(|e| DeviceError::Save(e.to_string()))?;
        Ok(Self { version, value })
    }

    /// The device's state, if it has the version that the device knows.
    pub fn get<T: DeserializeOwned>(&self, version: u32) -> Result<T, DeviceError> {
        if self.version != version {
            return Err(DeviceError::Version { found: self.version, known: version });
        }
        self.value.deserialized().map_err(|e| DeviceError::BadState(e.to_string()))
    }
}

/// Why a device cannot do what it was asked.
#[derive(Debug, Error)]
pub enum DeviceError {
    /// The state's version is not this device's.
    #[error("saved state has version {found}, this program knows version {known}")]
    Version {
        /// Version in the state.
        found: u32,
        /// Version that the device knows.
        known: u32,
    },
    /// The state contradicts itself or is malformed.
    #[error("saved state is not valid: {0}")]
    BadState(String),
    /// The state cannot be represented.
    #[error("state cannot be saved: {0}")]
    Save(String),
}

/// Where devices send what the guest asked of the machine's power. Called with no device lock held, on the thread of
/// the VP that asked; it must not wait for that VP.
pub trait PowerSink: Send + Sync {
    /// The guest asked for S5 (soft off).
    fn power_off(&self);
    /// The guest asked for a hardware reset.
    fn reset(&self);
}

/// Reads a little-endian value of 1 to 8 bytes; missing bytes are zero.
pub(crate) fn to_u64(data: &[u8]) -> u64 {
    data.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// Reads byte registers for an access of any size: the bus splits it into bytes at ascending ports.
pub(crate) fn split_read(port: u16, data: &mut [u8], mut read: impl FnMut(u16) -> u8) {
    for (i, byte) in data.iter_mut().enumerate() {
        *byte = read(port.wrapping_add(i as u16));
    }
}

/// Writes byte registers for an access of any size.
pub(crate) fn split_write(port: u16, data: &[u8], mut write: impl FnMut(u16, u8)) {
    for (i, byte) in data.iter().enumerate() {
        write(port.wrapping_add(i as u16), *byte);
    }
}
