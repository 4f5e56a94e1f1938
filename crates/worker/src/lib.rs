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
//! It may use: `machine`, `chipset` (serial backends), the engines. It must never know: command lines, inventories.
#![forbid(unsafe_code)]

pub mod control;
pub mod engines;
pub mod firmware;
pub mod hyperv;
pub mod run;
pub mod serial;
pub mod stats;
pub mod terminal;

pub use engines::EngineChoice;
pub use run::{Outcome, RunOptions, Start, WorkerError, run};
pub use serial::SerialTarget;
