//! SCSI targets: a disk (SBC-3) and a DVD drive (MMC-6) over the virtual disks of `vhd`.
//!
//! **What it is for.** Executing command descriptor blocks. A target is a function of (CDB, data buffer) to (status,
//! sense, data), asynchronous where the medium is involved. The synthetic SCSI controller and ATAPI use the same
//! targets; the transport (which LUN is where, REPORT LUNS, queues) is theirs.
//!
//! **What it may use.** `vhd`.
//!
//! **What it must never know.** VMBus, IDE, virtual machines.
//!
//! Everything in a CDB or parameter list is a guest's claim: every length is checked against the buffer, every range
//! against the medium, and nothing is allocated by a guest's number without a bound.
#![forbid(unsafe_code)]

pub mod protocol;

mod cdb;
mod disk;
mod dvd;
mod target;

pub use cdb::Cdb;
pub use disk::{DiskConfig, DiskState, ScsiDisk};
pub use dvd::{DvdState, EjectError, ScsiDvd};
pub use target::{Done, Initiator, Request, Response, Target, report_luns};
