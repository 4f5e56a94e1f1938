//! # machine: a machine from a configuration
//!
//! Puts memory, an engine's partition, devices and firmware tables together, loads what the guest boots, runs the VPs on
//! their threads, and saves and restores the whole.
//!
//! * [`config`]: what a machine is made from; [`layout`]: where things are in its address space;
//! * [`board`]: which devices it has; [`acpi`], [`smbios`]: the tables that describe them;
//! * [`boot`]: loaders (Linux bzImage, PVH, ELF, flat images) and the state in which a VP enters them;
//! * [`bus`], [`exits`]: the way of an access from a VP to its device; [`hyperv`]: Hyper-V's interface and VMBus;
//! * [`vcpu`]: VP threads; [`machine`]: run, pause, reset; [`save`]: the state file.
//!
//! It may use: `chipset`, `tlfs`, `vmbus`, `vsp`, `partition`, `x86`. It must never know: which engine runs, terminals, signals, command
//! lines.
#![forbid(unsafe_code)]

pub mod acpi;
pub mod board;
pub mod boot;
pub mod bus;
pub mod config;
pub mod dump;
pub mod exits;
pub mod hyperv;
pub mod layout;
pub mod machine;
pub mod processor;
pub mod save;
pub mod smbios;
pub mod vcpu;

pub use config::{BootSource, IoLimits, MachineConfig, StorageUnit, UnitKind};
pub use exits::GuestInterface;
pub use machine::{Event, Machine, MachineError, Serial};
