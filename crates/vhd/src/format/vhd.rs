//! VHD structures (Microsoft's "Virtual Hard Disk Image Format Specification", version 1.0). All integers are
//! big-endian.

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Sector: every address in a VHD counts these.
pub const SECTOR: u64 = 512;
/// `conectix`, the footer's cookie.
pub const FOOTER_COOKIE: [u8; 8] = *b"conectix";
/// `cxsparse`, the dynamic disk header's cookie.
pub const DYNAMIC_COOKIE: [u8; 8] = *b"cxsparse";
/// Largest disk: 2040 GiB, because BAT entries are 32-bit sector numbers.
pub const MAX_DISK_SIZE: u64 = 2040 << 30;
/// Default block size.
pub const DEFAULT_BLOCK_SIZE: u32 = 2 << 20;
/// BAT entry of a block that is not in the file.
pub const BAT_UNUSED: u32 = u32::MAX;
/// Seconds from the Unix epoch to the VHD epoch, 2000-01-01 00:00 UTC.
pub const EPOCH_OFFSET: u64 = 946_684_800;
/// File format version 1.0 of footer and dynamic header.
pub const VERSION: u32 = 0x0001_0000;
/// Features: the reserved bit that is always set.
pub const FEATURES_RESERVED: u32 = 2;
/// Disk type: fixed.
pub const TYPE_FIXED: u32 = 2;
/// Disk type: dynamic.
pub const TYPE_DYNAMIC: u32 = 3;
/// Disk type: differencing.
pub const TYPE_DIFFERENCING: u32 = 4;
/// Parent locator platform: relative path, UTF-16LE.
pub const PLATFORM_W2RU: [u8; 4] = *b"W2ru";
/// Parent locator platform: absolute path, UTF-16LE.
pub const PLATFORM_W2KU: [u8; 4] = *b"W2ku";
/// Parent locator platform: file URL, UTF-8.
pub const PLATFORM_MACX: [u8; 4] = *b"MacX";

/// Cylinders, heads and sectors per track.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Geometry {
    /// Cylinders.
    pub cylinders: U16,
    /// Heads.
    pub heads: u8,
    /// Sectors per track.
    pub sectors_per_track: u8,
}

/// Footer, "Hard Disk Footer Format".
#[derive(Debug, Clone, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Footer {
    /// `conectix`.
    pub cookie: [u8; 8],
    /// [`FEATURES_RESERVED`], bit 0 temporary.
    pub features: U32,
    /// [`VERSION`].
    pub version: U32,
    /// Offset of the dynamic disk header; all ones in a fixed disk.
    pub data_offset: U64,
    /// Creation time in seconds since 2000-01-01 UTC.
    pub time_stamp: U32,
    /// Which program made the file.
    pub creator_application: [u8; 4],
    /// Its version.
    pub creator_version: U32,
    /// `Wi2k` or `Mac `.
    pub creator_host_os: [u8; 4],
    /// Size in bytes when it was created.
    pub original_size: U64,
    /// Size in bytes now.
    pub current_size: U64,
    /// Geometry for BIOS and ATA.
    pub geometry: Geometry,
    /// [`TYPE_FIXED`], [`TYPE_DYNAMIC`], [`TYPE_DIFFERENCING`].
    pub disk_type: U32,
    /// One's complement of the sum of all bytes, without this field.
    pub checksum: U32,
    /// Identity, by which children know their parent.
    pub unique_id: [u8; 16],
    /// 1 if the machine was in saved state.
    pub saved_state: u8,
    /// Zero.
    pub reserved: [u8; 427],
}

/// Parent locator entry of the dynamic disk header.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct ParentLocator {
    /// How the data is to be read.
    pub platform_code: [u8; 4],
    /// Space reserved, in sectors by the specification, in bytes by some writers.
    pub platform_data_space: U32,
    /// Length in bytes.
    pub platform_data_length: U32,
    /// Zero.
    pub reserved: U32,
    /// Absolute file offset.
    pub platform_data_offset: U64,
}

/// Dynamic disk header.
#[derive(Debug, Clone, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct DynamicHeader {
    /// `cxsparse`.
    pub cookie: [u8; 8],
    /// All ones.
    pub data_offset: U64,
    /// Absolute offset of the BAT.
    pub table_offset: U64,
    /// [`VERSION`].
    pub header_version: U32,
    /// Entries of the BAT.
    pub max_table_entries: U32,
    /// Power of two, without the sector bitmap.
    pub block_size: U32,
    /// One's complement of the sum of all bytes, without this field.
    pub checksum: U32,
    /// The parent's [`Footer::unique_id`].
    pub parent_unique_id: [u8; 16],
    /// The parent's modification time.
    pub parent_time_stamp: U32,
    /// Zero.
    pub reserved: U32,
    /// The parent's file name, UTF-16BE.
    pub parent_unicode_name: [U16; 256],
    /// Up to eight ways to find the parent.
    pub parent_locators: [ParentLocator; 8],
    /// Zero.
    pub reserved2: [u8; 256],
}

const _: () = {
    assert!(size_of::<Geometry>() == 4);
    assert!(size_of::<Footer>() == 512);
    assert!(size_of::<ParentLocator>() == 24);
    assert!(size_of::<DynamicHeader>() == 1024);
};
