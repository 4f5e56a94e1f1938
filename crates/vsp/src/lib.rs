//! # vsp: synthetic devices, the host's ends of VMBus channels
//!
//! * [`storage`]: the synthetic SCSI controller (storvsp), over the targets of `scsi`;
//! * [`keyboard`]: the synthetic keyboard;
//! * [`ic`]: the frame of integration services, and on it [`heartbeat`], [`shutdown`], [`timesync`], [`kvp`], [`vss`],
//!   [`filecopy`]. Their host side is an API that blocks until the guest answers.
//!
//! It may use: `vmbus`, `scsi`, `vhd`, `partition`. It must never know: machines, engines, command lines.
#![forbid(unsafe_code)]

pub mod filecopy;
pub mod heartbeat;
pub mod ic;
pub mod keyboard;
pub mod kvp;
mod pump;
pub mod shutdown;
pub mod storage;
pub mod timesync;
pub mod vss;

use serde::Serialize;
use serde::de::DeserializeOwned;
use vmbus::ChannelDevice;

/// A device on the bus, with what the machine asks of devices.
pub trait SyntheticDevice: ChannelDevice {
    /// Name, unique in its machine; it names the device in saved state.
    fn name(&self) -> &str;
    /// Version of the saved state.
    fn state_version(&self) -> u32 {
        1
    }
    /// The state. The bus is paused.
    fn save(&self) -> Result<ciborium::Value, String>;
    /// Takes over a state, before channels are opened.
    fn restore(&self, state: &ciborium::Value) -> Result<(), String>;
    /// The machine runs, or goes on after a pause or a restore.
    fn started(&self) {}
    /// Reset of the machine; channels are closed already.
    fn reset(&self) {}
    /// Named counters.
    fn counters(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }
}

pub(crate) fn to_value(state: &impl Serialize) -> Result<ciborium::Value, String> {
    ciborium::Value::serialized(state).map_err(|e| e.to_string())
}

pub(crate) fn from_value<T: DeserializeOwned>(value: &ciborium::Value) -> Result<T, String> {
    value.deserialized().map_err(|e| e.to_string())
}

pub(crate) fn lock<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}
