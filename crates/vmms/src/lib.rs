//! # vmms: virtual machine management
//!
//! The inventory on disk and the life cycle of machines; a library (its service comes later), of which the command line is
//! the first user. docs/management.md is its reference.
//!
//! * [`config`]: what a VM is, as a TOML file that people may read and edit; [`name`], [`size`]: names and sizes;
//! * [`store`]: the folder of all VMs; [`index`]: what makes listing a thousand of them quick; [`vm`]: one of them;
//! * [`events`]: what happened to a VM; [`time`]: when;
//! * [`lifecycle`]: states, starting, stopping; [`record`]: which worker runs a VM, and what became of it;
//! * [`launch`]: the worker process's beginning; [`limits`]: the host's processors for it;
//! * [`atomic`]: files that are whole at any moment, and locks.
//!
//! A file is always replaced, never changed in place, and a folder gets its name when it is complete: whoever is killed
//! at any moment leaves the old or the new.
//!
//! It may use: `worker` (the control socket's client, and running a machine), `machine` (configuration), `vhd`, `bios`
//! (templates). It must never know: devices, engines, command lines.
#![forbid(unsafe_code)]

pub mod atomic;
pub mod config;
pub mod error;
pub mod events;
pub mod index;
pub mod launch;
pub mod lifecycle;
pub mod limits;
pub mod name;
pub mod record;
pub mod size;
pub mod store;
pub mod time;
pub mod vm;

pub use config::VmConfig;
pub use error::{Error, Result};
pub use store::Store;
pub use vm::Vm;
