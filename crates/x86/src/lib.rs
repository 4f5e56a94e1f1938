//! # x86: the facts of the processor
//!
//! Register names and bits, descriptor and page-table formats, MSR numbers, exception vectors, the XSAVE layout and
//! the processor models (CPUID tables) that Viridian offers to guests. Facts only: nothing in this crate executes or
//! emulates anything.
//!
//! It may use: `serde` (its types are part of saved state) and `core`/`std`.
//! It must never know: engines, guest memory, machines, devices.
//!
//! Sources: Intel 64 and IA-32 Architectures Software Developer's Manual (SDM), AMD64 Architecture Programmer's
//! Manual (APM). Where the two differ, the item says so.
#![forbid(unsafe_code)]

pub mod cpuid;
pub mod exception;
pub mod msr;
pub mod paging;
pub mod regs;
pub mod segment;
pub mod xsave;
