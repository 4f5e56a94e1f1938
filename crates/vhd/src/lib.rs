//! Disk images: VHDX, VHD, raw and ISO files as virtual disks.
//!
//! **What it is for.** Opening images (differencing chains too) as a [`Disk`] that takes asynchronous requests from many
//! threads; making, checking, resizing, converting, compacting and merging images. A power cut at any moment leaves an
//! image that opens and holds everything that was flushed.
//!
//! **What it may use.** The host's files (`std`, `libc`, `io-uring`), and `partition`'s pinned memory as a place to read
//! into and write from.
//!
//! **What it must never know.** SCSI, VMBus, virtual machines.
//!
//! The way of a write: [`Disk::submit`] → `state` (which block, which place in the file, what metadata changes) →
//! `driver` (io_uring or threads) → the completion's callback. How metadata becomes durable is told in `state::commit`.
//! Everything in a file is hostile until it has been checked; checks are where the structure is read (`vhdx`, `vhd`).

pub mod format;

mod buffer;
mod disk;
mod driver;
mod error;
mod image;
mod ops;
mod qos;
mod state;
mod storage;
#[cfg(test)]
mod tests;
mod vhd;
mod vhdx;

pub use buffer::{AlignedBuf, IoBuffer};
pub use disk::{Disk, DiskInfo, Io, OpenOptions};
pub use error::{Error, RequestError, Result, Structure};
pub use image::{DiskType, Format};
pub use ops::Progress;
pub use ops::bench::{BenchOptions, bench};
pub use ops::check::{CheckReport, Finding, ImageInfo, Severity, check, info};
pub use ops::convert::{compact, convert, reparent};
pub use ops::create::{CreateOptions, create};
pub use ops::merge::merge;
pub use ops::resize::{minimum_size, resize};
pub use qos::{MinimumAlert, NORMAL_IO, Qos, QosAlert};
pub use state::{Callback, Completion, RequestKind};
pub use storage::Lock;
