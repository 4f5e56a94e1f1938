//! # vmbus: the host's end of VMBus
//!
//! * [`server`]: the protocol of channel messages as a state machine without I/O: negotiation, offers and rescinds,
//!   GPADLs, open, close, unload.
//! * [`ring`]: one ring in guest memory: single-read, bounds-checked.
//! * [`channel`]: an open channel as a device's thread sees it: blocking reads and writes of packets.
//! * [`bus`]: ties them to SynIC and to devices ([`ChannelDevice`]); a thread of its own works off the guest's messages.
//!
//! The way of a signal from the guest: `HvCallSignalEvent` on the VP's thread -> [`tlfs::EventPort`] of the channel ->
//! the device's thread is unparked. No lock of the bus or the device is taken on the VP's thread.
//!
//! A guest that lies in a ring (indices, lengths) loses its channel: the device's thread gets
//! [`channel::Next::Closed`] and nothing else happens.
//!
//! It may use: `partition` (guest memory), `tlfs`, `vmbus-protocol`. It must never know: what devices do.
#![forbid(unsafe_code)]

pub mod bus;
pub mod channel;
pub mod gpadl;
pub mod ring;
pub mod server;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
#[cfg(test)]
mod tests;

pub use bus::{ChannelDevice, OpenRefused, Synic, VmBus, VmBusConfig, VmBusState};
pub use channel::{Channel, ChannelError, Next, Packet, Work};
pub use gpadl::{GpaRange, PageList};
pub use server::{OfferKey, OfferParams};
pub use vmbus_protocol as protocol;
