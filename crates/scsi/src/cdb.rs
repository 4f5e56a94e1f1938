//! Command descriptor blocks.

use crate::protocol::{Sense, op};

/// A CDB of up to 16 bytes; what is missing reads as zero, but [`Cdb::check`] refuses a CDB that is too short for its
/// operation code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cdb {
    bytes: [u8; 16],
    len: u8,
}

impl Cdb {
    /// Takes up to 16 bytes; longer CDBs are cut (none is used here).
    pub fn new(b: &[u8]) -> Self {
        let mut bytes = [0; 16];
        let len = b.len().min(16);
        bytes[..len].copy_from_slice(&b[..len]);
        Self { bytes, len: len as u8 }
    }

    /// Operation code.
    pub fn opcode(&self) -> u8 {
        self.bytes[0]
    }

    /// Service action, for operation codes that have one.
    pub fn service_action(&self) -> u8 {
        self.bytes[1] & 0x1f
    }

    /// A byte.
    pub fn u8(&self, at: usize) -> u8 {
        self.bytes[at]
    }

    /// Two bytes, big-endian.
    pub fn u16(&self, at: usize) -> u16 {
        u16::from_be_bytes([self.bytes[at], self.bytes[at + 1]])
    }

    /// Three bytes, big-endian.
    pub fn u24(&self, at: usize) -> u32 {
        u32::from_be_bytes([0, self.bytes[at], self.bytes[at + 1], self.bytes[at + 2]])
    }

    /// Four bytes, big-endian.
    pub fn u32(&self, at: usize) -> u32 {
        u32::from_be_bytes([self.bytes[at], self.bytes[at + 1], self.bytes[at + 2], self.bytes[at + 3]])
    }

    /// Eight bytes, big-endian.
    pub fn u64(&self, at: usize) -> u64 {
        u64::from(self.u32(at)) << 32 | u64::from(self.u32(at + 4))
    }

    /// Bytes that a CDB with this operation code has (SPC-4 4.2.5.1: by the group code).
    pub fn expected_len(opcode: u8) -> Option<u8> {
        match opcode >> 5 {
            0 => Some(6),
            1 | 2 => Some(10),
            4 => Some(16),
            5 => Some(12),
            _ => None,
        }
    }

    /// Whether the CDB is as long as it must be and asks for no NACA, which no target here offers.
    pub fn check(&self) -> Result<(), Sense> {
        let expected = Self::expected_len(self.opcode()).ok_or(Sense::INVALID_OPCODE)?;
        if self.len < expected {
            return Err(Sense::INVALID_FIELD_IN_CDB);
        }
        // MMC puts vendor bits where SPC has the control byte only in READ CD; there too bit 2 is reserved.
        if self.bytes[usize::from(expected) - 1] & 4 != 0 {
            return Err(Sense::INVALID_FIELD_IN_CDB);
        }
        Ok(())
    }

    /// First block and number of blocks of a command that reads, writes or verifies.
    pub fn range(&self) -> (u64, u32) {
        match self.opcode() {
            op::READ_6 | op::WRITE_6 => {
                // SBC-3 5.8: 21 bits of address; a length of zero means 256.
                let n = u32::from(self.u8(4));
                (u64::from(self.u24(1) & 0x1f_ffff), if n == 0 { 256 } else { n })
            }
            o => match o >> 5 {
                1 | 2 => (u64::from(self.u32(2)), u32::from(self.u16(7))),
                5 => (u64::from(self.u32(2)), self.u32(6)),
                _ => (self.u64(2), self.u32(10)),
            },
        }
    }
}
