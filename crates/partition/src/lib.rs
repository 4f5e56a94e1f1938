//! # partition: the contract between the machine and the engine
//!
//! A *partition* is guest memory plus virtual processors (VPs). An *engine* (`engine-soft`, `engine-kvm`) executes the
//! VPs; the *machine* owns devices and decides what the guest sees. This crate holds what both sides agree on:
//!
//! * [`GuestMemory`]: guest physical memory, what maps where, and who has written to it ([`memory`]);
//! * [`Engine`], [`Partition`], [`Vp`]: what the machine asks of an engine ([`engine`]);
//! * [`VpExits`]: what the engine asks of the machine while a VP runs ([`exits`]);
//! * [`VpState`]: the complete, engine-neutral, serialisable state of a VP ([`state`]);
//! * [`Clock`]: the one source of time of a partition ([`clock`]).
//!
//! ## How a VP runs
//! The machine gives each VP a host thread and calls [`Vp::run`] in a loop. While the VP runs, everything that the
//! guest does to a device arrives as a synchronous call on [`VpExits`], on the VP's own thread: port I/O, MMIO,
//! intercepted MSRs, hypercalls, end-of-interrupt. `run` returns only when the VP must stop: because of
//! [`Partition::kick`], a triple fault, or an error of the engine. HLT is waited out inside `run` (a kick ends it).
//!
//! It may use: `x86`, the host's memory calls. It must never know: which engines or devices exist.

pub mod clock;
pub mod engine;
pub mod exits;
pub mod memory;
pub mod state;

pub use clock::{Clock, Ticks100ns};
pub use engine::{
    Abilities, DirectMode, DirtyPages, Engine, EngineError, EngineOptions, EngineStats, Msi, Partition,
    PartitionConfig, RunExit, TlbFlush, TranslateMode, Vp, VpIndex, VpSet,
};
pub use exits::{HypercallContext, HypercallOutcome, MsrOutcome, VpExits};
pub use memory::{Access, Gpa, GuestMemory, HostPage, MemoryBlock, MemoryError, MemoryObserver, PinnedRange};
pub use state::{Activity, LapicState, PendingEvents, PendingException, VpState};
