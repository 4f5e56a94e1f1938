//! VHDX structures (MS-VHDX: Virtual Hard Disk v2 File Format). All integers are little-endian, GUIDs in their
//! mixed-endian Windows layout.

use uuid::{Uuid, uuid};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// One mebibyte: the alignment of every region and block.
pub const MIB: u64 = 1 << 20;
/// `vhdxfile`, signature of the file type identifier (2.2.1).
pub const FILE_SIGNATURE: [u8; 8] = *b"vhdxfile";
/// Offsets of the two headers (2.2).
pub const HEADER_OFFSETS: [u64; 2] = [64 << 10, 128 << 10];
/// Size of a header's checksummed structure (2.2.2).
pub const HEADER_SIZE: usize = 4096;
/// Offsets of the two region tables (2.2).
pub const REGION_TABLE_OFFSETS: [u64; 2] = [192 << 10, 256 << 10];
/// Size of a region table (2.2.3).
pub const REGION_TABLE_SIZE: usize = 64 << 10;
/// Most entries of a region table (2.2.3.1) and of a metadata table (2.6.1.1).
pub const MAX_TABLE_ENTRIES: u32 = 2047;
/// Size of the metadata table (2.6.1).
pub const METADATA_TABLE_SIZE: usize = 64 << 10;
/// Log sector: entries are multiples of it and aligned to it (2.3.1).
pub const LOG_SECTOR: usize = 4096;
/// Largest virtual disk (2.6.2.2).
pub const MAX_DISK_SIZE: u64 = 64 << 40;
/// Sectors whose bits fill one sector bitmap block (2.5.2).
pub const SECTORS_PER_CHUNK: u64 = 1 << 23;

/// Region: block allocation table.
pub const REGION_BAT: Uuid = uuid!("2dc27766-f623-4200-9d64-115e9bfd4a08");
/// Region: metadata.
pub const REGION_METADATA: Uuid = uuid!("8b7ca206-4790-4b9a-b8fe-575f050f886e");
/// Metadata item: file parameters.
pub const ITEM_FILE_PARAMETERS: Uuid = uuid!("caa16737-fa36-4d43-b3b6-33f0aa44e76b");
/// Metadata item: virtual disk size.
pub const ITEM_VIRTUAL_DISK_SIZE: Uuid = uuid!("2fa54224-cd1b-4876-b211-5dbed83bf4b8");
/// Metadata item: virtual disk id (SCSI page 83 identity).
pub const ITEM_VIRTUAL_DISK_ID: Uuid = uuid!("beca12ab-b2e6-4523-93ef-c309e000c746");
/// Metadata item: logical sector size.
pub const ITEM_LOGICAL_SECTOR_SIZE: Uuid = uuid!("8141bf1d-a96f-4709-ba47-f233a8faab5f");
/// Metadata item: physical sector size.
pub const ITEM_PHYSICAL_SECTOR_SIZE: Uuid = uuid!("cda348c7-445d-4471-9cc9-e9885251c556");
/// Metadata item: parent locator.
pub const ITEM_PARENT_LOCATOR: Uuid = uuid!("a8d35f2d-b30b-454d-abf7-d3d84834ab0c");
/// Type of a parent locator that names a VHDX (2.6.2.6.3).
pub const LOCATOR_TYPE_VHDX: Uuid = uuid!("b04aefb7-d19e-4a81-b789-25b8e9445913");

/// A GUID as it is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Default)]
#[repr(transparent)]
pub struct Guid(pub [u8; 16]);

impl From<Uuid> for Guid {
    fn from(u: Uuid) -> Self {
        Self(u.to_bytes_le())
    }
}
impl From<Guid> for Uuid {
    fn from(g: Guid) -> Self {
        Uuid::from_bytes_le(g.0)
    }
}

/// File type identifier (2.2.1).
#[derive(Debug, Clone, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct FileTypeIdentifier {
    /// `vhdxfile`.
    pub signature: [u8; 8],
    /// UTF-16LE name of the creator, for diagnosis only.
    pub creator: [U16; 256],
}

/// Header (2.2.2); the rest of its 4 KiB is zero and is part of the checksum.
#[derive(Debug, Clone, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Header {
    /// `head`.
    pub signature: [u8; 4],
    /// CRC-32C over the 4 KiB with this field zero.
    pub checksum: U32,
    /// The header with the higher number is the current one.
    pub sequence_number: U64,
    /// Changes when the file is first written after it was opened.
    pub file_write_guid: Guid,
    /// Changes when the data that a guest sees may change.
    pub data_write_guid: Guid,
    /// Id of the log's entries; zero if the log is empty.
    pub log_guid: Guid,
    /// Must be 0 if the log is not empty.
    pub log_version: U16,
    /// Must be 1.
    pub version: U16,
    /// Multiple of 1 MiB.
    pub log_length: U32,
    /// Multiple of 1 MiB.
    pub log_offset: U64,
}

/// Region table header (2.2.3.1).
#[derive(Debug, Clone, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RegionTableHeader {
    /// `regi`.
    pub signature: [u8; 4],
    /// CRC-32C over the 64 KiB with this field zero.
    pub checksum: U32,
    /// At most 2047.
    pub entry_count: U32,
    /// Zero.
    pub reserved: U32,
}

/// Region table entry (2.2.3.2).
#[derive(Debug, Clone, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RegionTableEntry {
    /// What the region is.
    pub guid: Guid,
    /// Multiple of 1 MiB, at least 1 MiB.
    pub file_offset: U64,
    /// Multiple of 1 MiB.
    pub length: U32,
    /// Bit 0: an implementation that does not know this region must refuse the file.
    pub required: U32,
}

/// Log entry header (2.3.1.1).
#[derive(Debug, Clone, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct LogEntryHeader {
    /// `loge`.
    pub signature: [u8; 4],
    /// CRC-32C over the whole entry with this field zero.
    pub checksum: U32,
    /// Multiple of 4 KiB.
    pub entry_length: U32,
    /// Offset in the log of the oldest entry of the sequence that this entry ends.
    pub tail: U32,
    /// Greater than zero; consecutive within a sequence.
    pub sequence_number: U64,
    /// Number of descriptors that follow.
    pub descriptor_count: U32,
    /// Zero.
    pub reserved: U32,
    /// The header's log id when the entry was written.
    pub log_guid: Guid,
    /// The file had at least this size on stable storage when the entry was written.
    pub flushed_file_offset: U64,
    /// All allocated structures fit into this size; replay extends the file to it.
    pub last_file_offset: U64,
}

/// Log descriptor, zero or data (2.3.1.2, 2.3.1.3): both have the same shape.
#[derive(Debug, Clone, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct LogDescriptor {
    /// `zero` or `desc`.
    pub signature: [u8; 4],
    /// Data: the last 4 bytes of the updated 4 KiB. Zero descriptor: reserved.
    pub trailing_bytes: [u8; 4],
    /// Data: the first 8 bytes of the updated 4 KiB. Zero descriptor: the length to zero, a multiple of 4 KiB.
    pub leading_bytes: [u8; 8],
    /// Where the update goes, a multiple of 4 KiB.
    pub file_offset: U64,
    /// Equal to the entry's.
    pub sequence_number: U64,
}

/// Log data sector (2.3.1.4).
#[derive(Debug, Clone, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct LogDataSector {
    /// `data`.
    pub signature: [u8; 4],
    /// High half of the entry's sequence number.
    pub sequence_high: U32,
    /// Bytes 8..4092 of the update.
    pub data: [u8; 4084],
    /// Low half of the entry's sequence number.
    pub sequence_low: U32,
}

/// Metadata table header (2.6.1.1).
#[derive(Debug, Clone, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct MetadataTableHeader {
    /// `metadata`.
    pub signature: [u8; 8],
    /// Zero.
    pub reserved: U16,
    /// At most 2047.
    pub entry_count: U16,
    /// Zero.
    pub reserved2: [U32; 5],
}

/// Metadata table entry (2.6.1.2).
#[derive(Debug, Clone, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct MetadataTableEntry {
    /// What the item is.
    pub item_id: Guid,
    /// From the start of the metadata region, at least 64 KiB; zero if the item is empty.
    pub offset: U32,
    /// At most 1 MiB.
    pub length: U32,
    /// [`METADATA_IS_USER`] and so on.
    pub flags: U32,
    /// Zero.
    pub reserved: U32,
}

/// The item belongs to the user, not to the system.
pub const METADATA_IS_USER: u32 = 1;
/// The item describes the virtual disk, not the file.
pub const METADATA_IS_VIRTUAL_DISK: u32 = 2;
/// An implementation that does not know this item must refuse the file.
pub const METADATA_IS_REQUIRED: u32 = 4;

/// File parameters item (2.6.2.1).
#[derive(Debug, Clone, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct FileParameters {
    /// Power of two, 1 MiB to 256 MiB.
    pub block_size: U32,
    /// [`LEAVE_BLOCKS_ALLOCATED`], [`HAS_PARENT`].
    pub flags: U32,
}

/// The image is fixed.
pub const LEAVE_BLOCKS_ALLOCATED: u32 = 1;
/// The image is differencing.
pub const HAS_PARENT: u32 = 2;

/// Parent locator header (2.6.2.6.1).
#[derive(Debug, Clone, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct ParentLocatorHeader {
    /// [`LOCATOR_TYPE_VHDX`].
    pub locator_type: Guid,
    /// Zero.
    pub reserved: U16,
    /// Number of entries that follow.
    pub key_value_count: U16,
}

/// Parent locator entry (2.6.2.6.2). Offsets are from the start of the item, lengths in bytes of UTF-16LE.
#[derive(Debug, Clone, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct ParentLocatorEntry {
    /// Offset of the key.
    pub key_offset: U32,
    /// Offset of the value.
    pub value_offset: U32,
    /// Length of the key.
    pub key_length: U16,
    /// Length of the value.
    pub value_length: U16,
}

/// BAT entry (2.5.1): state in bits 0..=2, file offset in MiB in bits 20..=63.
pub const BAT_STATE_MASK: u64 = 7;
/// Bits 20..=63 as a byte offset.
pub const BAT_OFFSET_MASK: u64 = !(MIB - 1);
/// Payload block: not in this file (read the parent; zero if there is none).
pub const BLOCK_NOT_PRESENT: u64 = 0;
/// Payload block: contents undefined.
pub const BLOCK_UNDEFINED: u64 = 1;
/// Payload block: all zero.
pub const BLOCK_ZERO: u64 = 2;
/// Payload block: unmapped by the guest.
pub const BLOCK_UNMAPPED: u64 = 3;
/// Payload block, or sector bitmap block: in the file.
pub const BLOCK_FULLY_PRESENT: u64 = 6;
/// Payload block: the sector bitmap says which sectors are in the file.
pub const BLOCK_PARTIALLY_PRESENT: u64 = 7;

const _: () = {
    assert!(size_of::<FileTypeIdentifier>() == 520);
    assert!(size_of::<Header>() == 80);
    assert!(size_of::<RegionTableHeader>() == 16);
    assert!(size_of::<RegionTableEntry>() == 32);
    assert!(size_of::<LogEntryHeader>() == 64);
    assert!(size_of::<LogDescriptor>() == 32);
    assert!(size_of::<LogDataSector>() == 4096);
    assert!(size_of::<MetadataTableHeader>() == 32);
    assert!(size_of::<MetadataTableEntry>() == 32);
    assert!(size_of::<FileParameters>() == 8);
    assert!(size_of::<ParentLocatorHeader>() == 20);
    assert!(size_of::<ParentLocatorEntry>() == 12);
};
