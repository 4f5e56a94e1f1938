//! EFI GUIDs (UEFI 2.10, appendix A): 16 bytes, the first three fields little-endian.

use core::fmt;

/// A GUID as it lies in memory.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(transparent)]
pub struct Guid(pub [u8; 16]);

impl Guid {
    /// From the fields of the usual notation `aaaaaaaa-bbbb-cccc-dddd-dddddddddddd`.
    pub const fn new(a: u32, b: u16, c: u16, d: [u8; 8]) -> Self {
        let (a, b, c) = (a.to_le_bytes(), b.to_le_bytes(), c.to_le_bytes());
        Self([a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], d[0], d[1], d[2], d[3], d[4], d[5], d[6], d[7]])
    }
    /// Reads 16 bytes at `offset`.
    pub fn read(data: &[u8], offset: usize) -> Option<Self> {
        crate::bytes::array(data, offset).map(Self)
    }
}

impl fmt::Display for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let b = &self.0;
        let (a, c, d) = (
            u32::from_le_bytes([b[0], b[1], b[2], b[3]]),
            u16::from_le_bytes([b[4], b[5]]),
            u16::from_le_bytes([b[6], b[7]]),
        );
        write!(f, "{a:08x}-{c:04x}-{d:04x}-{:02x}{:02x}-", b[8], b[9])?;
        b[10..].iter().try_for_each(|x| write!(f, "{x:02x}"))
    }
}
impl fmt::Debug for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// `EFI_GLOBAL_VARIABLE`.
pub const GLOBAL_VARIABLE: Guid = Guid::new(0x8be4df61, 0x93ca, 0x11d2, [0xaa, 0x0d, 0, 0xe0, 0x98, 3, 0x2b, 0x8c]);
/// `EFI_IMAGE_SECURITY_DATABASE_GUID` (db, dbx, dbt, dbr).
pub const IMAGE_SECURITY_DATABASE: Guid =
    Guid::new(0xd719b2cb, 0x3d3a, 0x4596, [0xa3, 0xbc, 0xda, 0xd0, 0x0e, 0x67, 0x65, 0x6f]);
/// `EFI_CERT_SHA256_GUID`.
pub const CERT_SHA256: Guid = Guid::new(0xc1c41626, 0x504c, 0x4092, [0xac, 0xa9, 0x41, 0xf9, 0x36, 0x93, 0x43, 0x28]);
/// `EFI_CERT_SHA384_GUID`.
pub const CERT_SHA384: Guid = Guid::new(0xff3e5307, 0x9fd0, 0x48c9, [0x85, 0xf1, 0x8a, 0xd5, 0x6c, 0x70, 0x1e, 0x01]);
/// `EFI_CERT_SHA512_GUID`.
pub const CERT_SHA512: Guid = Guid::new(0x093e0fae, 0xa6c4, 0x4f50, [0x9f, 0x1b, 0xd4, 0x1e, 0x2b, 0x89, 0xc1, 0x9a]);
/// `EFI_CERT_X509_GUID`.
pub const CERT_X509: Guid = Guid::new(0xa5c059a1, 0x94e4, 0x4aa7, [0x87, 0xb5, 0xab, 0x15, 0x5c, 0x2b, 0xf0, 0x72]);
/// `EFI_CERT_X509_SHA256_GUID` (hash of the to-be-signed part of a certificate, with a revocation time).
pub const CERT_X509_SHA256: Guid =
    Guid::new(0x3bd2a492, 0x96c0, 0x4079, [0xb4, 0x20, 0xfc, 0xf9, 0x8e, 0xf1, 0x03, 0xed]);
/// `EFI_CERT_X509_SHA384_GUID`.
pub const CERT_X509_SHA384: Guid =
    Guid::new(0x7076876e, 0x80c2, 0x4ee6, [0xaa, 0xd2, 0x28, 0xb3, 0x49, 0xa6, 0x86, 0x5b]);
/// `EFI_CERT_X509_SHA512_GUID`.
pub const CERT_X509_SHA512: Guid =
    Guid::new(0x446dbf63, 0x2502, 0x4cda, [0xbc, 0xfa, 0x24, 0x65, 0xd2, 0xb0, 0xfe, 0x9d]);
/// `EFI_CERT_TYPE_PKCS7_GUID`.
pub const CERT_TYPE_PKCS7: Guid =
    Guid::new(0x4aafd29d, 0x68df, 0x49ee, [0x8a, 0xa9, 0x34, 0x7d, 0x37, 0x56, 0x65, 0xa7]);

#[cfg(test)]
mod tests {
    use std::string::ToString;
    #[test]
    fn text_form() {
        assert_eq!(super::GLOBAL_VARIABLE.to_string(), "8be4df61-93ca-11d2-aa0d-00e098032b8c");
    }
}
