//! storvsp: the protocol of synthetic SCSI (source of the facts: Linux `drivers/scsi/storvsc_drv.c`).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Operations.
#[allow(missing_docs)]
pub mod operation {
    pub const COMPLETE_IO: u32 = 1;
    pub const REMOVE_DEVICE: u32 = 2;
    pub const EXECUTE_SRB: u32 = 3;
    pub const RESET_LUN: u32 = 4;
    pub const RESET_ADAPTER: u32 = 5;
    pub const RESET_BUS: u32 = 6;
    pub const BEGIN_INITIALIZATION: u32 = 7;
    pub const END_INITIALIZATION: u32 = 8;
    pub const QUERY_PROTOCOL_VERSION: u32 = 9;
    pub const QUERY_PROPERTIES: u32 = 10;
    pub const ENUMERATE_BUS: u32 = 11;
    pub const CREATE_SUB_CHANNELS: u32 = 13;
}

/// Protocol versions: major in the upper byte.
#[allow(missing_docs)]
pub mod version {
    pub const V2_0: u16 = 0x0200;
    pub const V4_2: u16 = 0x0402;
    pub const V5_1: u16 = 0x0501;
    pub const V6_0: u16 = 0x0600;
    pub const V6_2: u16 = 0x0602;
    pub const ALL: [u16; 5] = [V2_0, V4_2, V5_1, V6_0, V6_2];
}

/// SRB status.
#[allow(missing_docs)]
pub mod srb {
    pub const SUCCESS: u8 = 0x01;
    pub const ABORTED: u8 = 0x02;
    pub const ERROR: u8 = 0x04;
    pub const INVALID_REQUEST: u8 = 0x06;
    pub const INVALID_LUN: u8 = 0x20;
    pub const AUTOSENSE_VALID: u8 = 0x80;
    /// `data_in`: the guest writes.
    pub const DATA_OUT: u8 = 0;
    /// `data_in`: the guest reads.
    pub const DATA_IN: u8 = 1;
    /// `data_in`: no data, or the guest does not know.
    pub const DATA_UNKNOWN: u8 = 2;
}

/// Status of a packet (NTSTATUS).
#[allow(missing_docs)]
pub mod status {
    pub const SUCCESS: u32 = 0;
    pub const REVISION_MISMATCH: u32 = 0xc000_0059;
    pub const INVALID_PARAMETER: u32 = 0xc000_000d;
    pub const INVALID_DEVICE_STATE: u32 = 0xc000_0184;
}

/// Property flag: sub-channels are possible.
pub const PROPERTY_MULTI_CHANNEL: u32 = 1;
/// Bytes of a CDB.
pub const CDB_BYTES: usize = 16;
/// Bytes of sense data.
pub const SENSE_BYTES: usize = 20;

/// Start of every packet; 0x34 bytes of payload follow (0x24 before version 5.1).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct PacketHeader {
    /// See [`operation`].
    pub operation: u32,
    /// Bit 0: a completion is wanted.
    pub flags: u32,
    /// NTSTATUS of the answer.
    pub status: u32,
}
const _: () = assert!(core::mem::size_of::<PacketHeader>() == 12);

/// A SCSI request.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[allow(missing_docs)]
pub struct ScsiRequest {
    pub length: u16,
    pub srb_status: u8,
    pub scsi_status: u8,
    pub port: u8,
    pub path: u8,
    pub target: u8,
    pub lun: u8,
    pub cdb_length: u8,
    pub sense_length: u8,
    pub data_in: u8,
    pub reserved: u8,
    pub transfer_length: u32,
    /// CDB in requests, sense data in answers.
    pub cdb_or_sense: [u8; SENSE_BYTES],
    /// From version 5.1 on.
    pub reserved2: u16,
    pub queue_tag: u8,
    pub queue_action: u8,
    pub srb_flags: u32,
    pub timeout: u32,
    pub queue_sort_key: u32,
}
const _: () = assert!(core::mem::size_of::<ScsiRequest>() == 0x34);

/// Answer to a query of properties.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[allow(missing_docs)]
pub struct ChannelProperties {
    pub reserved: u32,
    pub max_sub_channels: u16,
    pub reserved1: u16,
    pub flags: u32,
    pub max_transfer_bytes: u32,
    pub reserved2: u64,
}
const _: () = assert!(core::mem::size_of::<ChannelProperties>() == 24);

/// Bytes of a packet from version 5.1 on.
pub const PACKET_BYTES: usize = 12 + 0x34;
/// Bytes of a packet before version 5.1.
pub const OLD_PACKET_BYTES: usize = 12 + 0x24;
