//! The XSAVE area in the standard format (SDM volume 1, section 13.4), for the state components that Viridian's models
//! offer: x87, SSE, AVX. AVX-512, AMX and PKRU are never offered.

/// Bytes of the legacy region (FXSAVE image).
pub const LEGACY_SIZE: usize = 512;
/// Offset and size of the XSAVE header.
pub const HEADER_OFFSET: usize = 512;
/// Bytes of the XSAVE header: XSTATE_BV, XCOMP_BV, 48 reserved bytes.
pub const HEADER_SIZE: usize = 64;
/// Offset of the AVX state (upper halves of YMM0-15) in the standard format. The same on every known processor
/// (CPUID 0xD.2:EBX), and fixed by the models.
pub const AVX_OFFSET: usize = 576;
/// Bytes of the AVX state.
pub const AVX_SIZE: usize = 256;
/// Bytes of the whole standard-format area for x87, SSE and AVX.
pub const AREA_SIZE: usize = AVX_OFFSET + AVX_SIZE;

/// Offsets inside the legacy region (SDM volume 1, table 10-2).
pub mod legacy {
    #![allow(missing_docs)]
    pub const FCW: usize = 0;
    pub const FSW: usize = 2;
    pub const FTW: usize = 4;
    pub const FOP: usize = 6;
    pub const FIP: usize = 8;
    pub const FDP: usize = 16;
    pub const MXCSR: usize = 24;
    pub const MXCSR_MASK: usize = 28;
    pub const ST0: usize = 32;
    pub const XMM0: usize = 160;
}

/// x87 control word after FNINIT and reset in an XSAVE sense.
pub const FCW_INIT: u16 = 0x37f;
/// MXCSR after reset.
pub const MXCSR_INIT: u32 = 0x1f80;
/// MXCSR bits that exist on every processor with SSE2 and DAZ.
pub const MXCSR_MASK: u32 = 0xffff;
