//! Rings and packets.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Offsets in the control page of a ring.
#[allow(missing_docs)]
pub mod control {
    pub const WRITE_INDEX: u64 = 0;
    pub const READ_INDEX: u64 = 4;
    pub const INTERRUPT_MASK: u64 = 8;
    pub const PENDING_SEND_SIZE: u64 = 12;
    pub const FEATURE_BITS: u64 = 64;
    /// Feature bit: the pending send size is used.
    pub const FEATURE_PENDING_SEND_SIZE: u32 = 1;
}

/// Behind every packet: where it began, shifted by 32.
pub const TRAILER: usize = 8;

/// Packet types.
#[allow(missing_docs)]
pub mod packet {
    pub const IN_BAND: u16 = 6;
    pub const TRANSFER_PAGES: u16 = 7;
    pub const GPA_DIRECT: u16 = 9;
    pub const CANCEL: u16 = 0xa;
    pub const COMPLETION: u16 = 0xb;
    /// Flag: the sender wants a completion.
    pub const FLAG_COMPLETION_REQUESTED: u16 = 1;
}

/// Start of every packet. Lengths are in units of 8 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct PacketHeader {
    /// See [`packet`].
    pub kind: u16,
    /// Where the payload begins.
    pub offset8: u16,
    /// Header and payload.
    pub len8: u16,
    /// Flags.
    pub flags: u16,
    /// Comes back in the completion.
    pub transaction_id: u64,
}
const _: () = assert!(core::mem::size_of::<PacketHeader>() == 16);

/// Header of a message in a pipe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct PipeHeader {
    /// 1: data; 2: partial data; 3: set-up; 4: raw.
    pub kind: u32,
    /// Bytes that follow.
    pub len: u32,
}
const _: () = assert!(core::mem::size_of::<PipeHeader>() == 8);
