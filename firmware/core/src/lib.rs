//! # uefi-core: the pure parts of Viridian's UEFI
//!
//! Everything of the firmware that needs no machine: the PE loader, Secure Boot ([`secure`]), variables, partition tables,
//! file systems, device paths. The firmware proper (`firmware/uefi`) links it for the guest; the host tests and fuzzes
//! the same code.
//!
//! It may use: `core`, `alloc`, `no_std` libraries for cryptography and ASN.1. It must never know: how a disk is read, where
//! memory is, which protocols exist. Everything that it is given is hostile.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod block;
pub mod bytes;
pub mod devpath;
pub mod fat;
pub mod guid;
pub mod hii;
pub mod iso9660;
pub mod partition;
pub mod pe;
pub mod secure;
pub mod variables;
