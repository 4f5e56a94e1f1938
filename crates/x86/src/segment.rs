//! Segment registers, descriptors and their access rights (SDM volume 3, chapters 3 and 5).

use serde::{Deserialize, Serialize};

/// Segment register numbers, in the order of instruction encoding.
pub mod sreg {
    #![allow(missing_docs)]
    pub const ES: usize = 0;
    pub const CS: usize = 1;
    pub const SS: usize = 2;
    pub const DS: usize = 3;
    pub const FS: usize = 4;
    pub const GS: usize = 5;
}

/// Access rights of a segment in the layout of a descriptor's bits 40-55 (bits 8-11, limit 19:16, are zero): the
/// layout that VMX and KVM use too (SDM volume 3, table 24-2), plus `UNUSABLE` in bit 16.
pub mod attr {
    #![allow(missing_docs)]
    /// Four type bits.
    pub const TYPE: u32 = 0xf;
    /// Accessed (code and data).
    pub const TYPE_ACCESSED: u32 = 1;
    /// Writable (data) or readable (code).
    pub const TYPE_WRITABLE: u32 = 2;
    pub const TYPE_READABLE: u32 = 2;
    /// Expand-down (data) or conforming (code).
    pub const TYPE_EXPAND_DOWN: u32 = 4;
    pub const TYPE_CONFORMING: u32 = 4;
    /// Code segment.
    pub const TYPE_CODE: u32 = 8;
    /// Code or data (as opposed to system).
    pub const S: u32 = 1 << 4;
    pub const DPL_SHIFT: u32 = 5;
    pub const DPL: u32 = 3 << DPL_SHIFT;
    pub const P: u32 = 1 << 7;
    pub const AVL: u32 = 1 << 12;
    pub const L: u32 = 1 << 13;
    /// Default operation size (code), big (stack).
    pub const DB: u32 = 1 << 14;
    pub const G: u32 = 1 << 15;
    /// Loaded with a null selector, or LDTR/TR without a table: any use faults.
    pub const UNUSABLE: u32 = 1 << 16;
}

/// A segment register: the visible selector and the hidden part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[repr(C)]
pub struct Segment {
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes, inclusive, after scaling by granularity.
    pub limit: u32,
    /// Access rights, see [`attr`].
    pub attr: u32,
    /// Selector.
    pub selector: u16,
}

impl Segment {
    /// A real-mode segment: base is the selector times 16, limit 64 KiB, accessed read/write data.
    pub const fn real(selector: u16) -> Self {
        Self { base: (selector as u64) << 4, limit: 0xffff, attr: attr::P | attr::S | 0x3, selector }
    }
    /// Descriptor privilege level.
    pub const fn dpl(&self) -> u8 {
        ((self.attr & attr::DPL) >> attr::DPL_SHIFT) as u8
    }
    /// Is the register usable (not loaded with a null selector)?
    pub const fn usable(&self) -> bool {
        self.attr & attr::UNUSABLE == 0
    }
    /// The register that an 8-byte descriptor describes (code, data, and 32-bit system descriptors; for 16-byte system
    /// descriptors the caller adds base bits 32-63).
    pub const fn from_descriptor(selector: u16, d: u64) -> Self {
        let base = ((d >> 16) & 0xff_ffff) | ((d >> 56) << 24);
        let raw = ((d & 0xffff) | ((d >> 32) & 0xf_0000)) as u32;
        let attr = ((d >> 40) & 0xf0ff) as u32;
        let limit = if attr & attr::G != 0 { (raw << 12) | 0xfff } else { raw };
        Self { base, limit, attr, selector }
    }
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[repr(C)]
pub struct TableRegister {
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes, inclusive.
    pub limit: u16,
}
