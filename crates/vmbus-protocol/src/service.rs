//! Integration services: the frame that all share (source of the facts: Linux `include/linux/hyperv.h`,
//! `include/uapi/linux/hyperv.h`).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// A version of the framework or of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ServiceVersion {
    /// Major.
    pub major: u16,
    /// Minor.
    pub minor: u16,
}

/// Message types.
#[allow(missing_docs)]
pub mod kind {
    pub const NEGOTIATE: u16 = 0;
    pub const HEARTBEAT: u16 = 1;
    pub const KVP: u16 = 2;
    pub const SHUTDOWN: u16 = 3;
    pub const TIME_SYNC: u16 = 4;
    pub const VSS: u16 = 5;
    pub const FILE_COPY: u16 = 7;
}

/// Flags of a message.
#[allow(missing_docs)]
pub mod flags {
    pub const TRANSACTION: u8 = 1;
    pub const REQUEST: u8 = 2;
    pub const RESPONSE: u8 = 4;
}

/// Status of an answer (HRESULT).
#[allow(missing_docs)]
pub mod status {
    pub const OK: u32 = 0;
    pub const FAIL: u32 = 0x8000_4005;
    pub const NO_MORE: u32 = 0x8007_0103;
    pub const NOT_SUPPORTED: u32 = 0x8007_0032;
    pub const INVALID_ARGUMENT: u32 = 0x8007_0057;
    pub const ALREADY_EXISTS: u32 = 0x8007_0050;
    pub const DISK_FULL: u32 = 0x8007_0070;
    pub const NOT_FOUND: u32 = 0x8004_1002;
}

/// Start of every message, behind the pipe header.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[allow(missing_docs)]
pub struct MessageHeader {
    pub framework: ServiceVersion,
    pub kind: u16,
    pub version: ServiceVersion,
    pub size: u16,
    pub status: u32,
    pub transaction_id: u8,
    pub flags: u8,
    pub reserved: u16,
}
const _: () = assert!(core::mem::size_of::<MessageHeader>() == 20);
