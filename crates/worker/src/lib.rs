//! # worker: the process that runs one virtual machine
//!
//! Chooses the engine, plugs the serial port into the terminal, a file or a socket, makes the machine, and then waits: for
//! what the guest does (power off, reset, triple fault), for signals, and for the key that leaves.
//!
//! | signal | what it does |
//! | --- | --- |
//! | SIGINT, SIGTERM, SIGHUP, SIGQUIT | ends the machine at once; status 128 + the signal's number |
//! | SIGUSR1 | saves the machine to the file that was given for it, and ends with status 0 |
//! | SIGUSR2 | presses the power button |
//!
//! Clients talk to it through its control socket ([`control`]). It confines itself before guest code runs ([`sandbox`]).
//!
//! It may use: `machine`, `chipset` (serial backends), the engines. It must never know: command lines, inventories.
#![forbid(unsafe_code)]

pub mod console;
pub mod control;
pub mod engines;
pub mod firmware;
pub mod hyperv;
mod opened;
pub mod reporter;
pub mod run;
pub mod sandbox;
pub mod screen;
pub mod serial;
pub mod stats;
pub mod terminal;
pub mod units;

pub use engines::EngineChoice;
pub use run::{Note, Observer, Order, Outcome, RunOptions, Start, WorkerError, run, saved_config};
pub use serial::SerialTarget;
