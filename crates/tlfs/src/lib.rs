//! # tlfs: Hyper-V's interface for guests
//!
//! What makes a partition a Hyper-V partition: the CPUID leaves from 0x4000_0000, the synthetic MSRs, the hypercall
//! page and its hypercalls, the synthetic interrupt controller (SynIC) with its timers, and reference time. It is the
//! same on every engine: synthetic MSRs arrive as MSR exits, and the hypercall page that we place holds an OUT to a
//! reserved port, which arrives as a hypercall exit.
//!
//! The machine makes one [`HvPartition`], asks it for CPUID leaves ([`cpuid::leaves`]), hands it the
//! [`partition::Partition`] and forwards the exits ([`HvPartition::msr_read`], [`HvPartition::msr_write`],
//! [`HvPartition::hypercall`]). Whoever talks to the guest through SynIC (VMBus) registers ports for what the guest
//! sends ([`MessagePort`], [`EventPort`]) and sends with [`HvPartition::post_message`] and
//! [`HvPartition::signal_event`].
//!
//! Overlay pages (hypercall page, reference TSC page, SIMP, SIEFP; TLFS section 5.2.1) are written into the guest's own
//! page at the address that it gives. The difference from a true overlay is that the page's former content does not
//! come back when the register is disabled; no guest relies on that.
//!
//! It may use: `partition`, `x86`. It must never know: which engine runs, VMBus, devices.
//!
//! Source of everything here, where nothing else is named: Microsoft Hypervisor Top-Level Functional Specification
//! (TLFS), version 6.0b and the web edition. Sections are those of 6.0b.
#![forbid(unsafe_code)]

mod calls;
pub mod cpuid;
pub mod defs;
mod hv;
mod hypercall;
mod msrs;
mod ports;
mod state;
mod synic;
#[cfg(test)]
mod tests;
mod time;
mod timers;
mod vpset;

pub use defs::{HvStatus, Message};
pub use hv::{Counters, CrashReport, HvConfig, HvHost, HvPartition, TimerId, TimerService};
pub use ports::{EventPort, MessagePort, PortFull};
pub use state::{HvRestoreError, HvState};
pub use synic::QueueFull;
