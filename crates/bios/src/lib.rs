//! # bios: the host's side of the generation 2 firmware
//!
//! The firmware of a generation 2 VM talks to its host through one device, the BiosDevice: an address and a data port, and
//! structures in guest memory. The contract is the one that the public headers of Hyper-V's own generation 2 firmware
//! define (mu_msvm, `BiosInterface.h`), so that either firmware runs on this host, and Viridian's firmware elsewhere.
//!
//! * [`device`]: the ports and what each selector does;
//! * [`firmware`]: Viridian's own firmware image;
//! * [`volume`]: an image in a file instead, in the layout of Hyper-V's;
//! * [`nvram`]: UEFI variables: the rules are `uefi_core`'s, here is the in-memory protocol and the file;
//! * [`blob`]: the configuration blob that the firmware finds in memory when it starts;
//! * [`templates`]: which keys a new VM's Secure Boot databases hold.
//!
//! It may use: `chipset` (the device framework), `partition` (guest memory), `uefi-core` (rules of variables and signatures).
//! It must never know: engines, machines, how the firmware works inside.
#![forbid(unsafe_code)]

pub mod blob;
pub mod device;
pub mod firmware;
pub mod nvram;
pub mod templates;
pub mod volume;
