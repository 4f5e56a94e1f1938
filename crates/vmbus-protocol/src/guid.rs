//! GUIDs as they are on the wire.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// A GUID in wire order: the first three fields little-endian.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(transparent)]
pub struct Guid(pub [u8; 16]);

impl Guid {
    /// From its text fields: `12345678-1234-1234-1234-123456789abc` is `new(0x12345678, 0x1234, 0x1234,
    /// 0x1234_123456789abc)`.
    pub const fn new(d1: u32, d2: u16, d3: u16, d4: u64) -> Self {
        let (a, b, c, d) = (d1.to_le_bytes(), d2.to_le_bytes(), d3.to_le_bytes(), d4.to_be_bytes());
        Self([a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], d[0], d[1], d[2], d[3], d[4], d[5], d[6], d[7]])
    }
}

impl core::fmt::Display for Guid {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let b = &self.0;
        write!(f, "{:08x}-", u32::from_le_bytes([b[0], b[1], b[2], b[3]]))?;
        write!(f, "{:04x}-{:04x}-", u16::from_le_bytes([b[4], b[5]]), u16::from_le_bytes([b[6], b[7]]))?;
        write!(f, "{:02x}{:02x}-", b[8], b[9])?;
        b[10..].iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl core::fmt::Debug for Guid {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        core::fmt::Display::fmt(self, f)
    }
}
