//! # vmbus-protocol: wire formats of VMBus
//!
//! Channel messages, the control page of a ring, packet headers and the GUIDs of synthetic devices: plain structures
//! with size assertions, no logic. `no_std`, so that firmware drivers share them with the host.
//!
//! It may use: `zerocopy`. It must never know: who sends or receives.
//!
//! Sources of the facts: Linux `include/linux/hyperv.h`, `drivers/hv/hyperv_vmbus.h`.
#![no_std]
#![forbid(unsafe_code)]

pub mod class;
pub mod guid;
pub mod message;
pub mod ring;
pub mod service;
pub mod storage;

pub use guid::Guid;

/// A VMBus version: major in the upper half, minor in the lower.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version(pub u32);

impl Version {
    const fn of(major: u16, minor: u16) -> Self {
        Self((major as u32) << 16 | minor as u32)
    }
    /// Windows Server 2008.
    pub const V0_13: Self = Self::of(0, 13);
    /// Windows 7, Server 2008 R2: offers say which connection and whether the interrupt is dedicated.
    pub const V1_1: Self = Self::of(1, 1);
    /// Windows 8, Server 2012: sub-channels, interrupts on any VP.
    pub const V2_4: Self = Self::of(2, 4);
    /// Windows 8.1, Server 2012 R2: unload.
    pub const V3_0: Self = Self::of(3, 0);
    /// Windows 10, Server 2016.
    pub const V4_0: Self = Self::of(4, 0);
    /// Changes of the target VP.
    pub const V4_1: Self = Self::of(4, 1);
    /// Server 2019: the guest says which SINT; no interrupt page.
    pub const V5_0: Self = Self::of(5, 0);
    /// Minor step.
    pub const V5_1: Self = Self::of(5, 1);
    /// Isolated guests.
    pub const V5_2: Self = Self::of(5, 2);
    /// Server 2022: changes of the target VP are acknowledged.
    pub const V5_3: Self = Self::of(5, 3);
    /// All, ascending.
    pub const ALL: [Self; 10] = [
        Self::V0_13,
        Self::V1_1,
        Self::V2_4,
        Self::V3_0,
        Self::V4_0,
        Self::V4_1,
        Self::V5_0,
        Self::V5_1,
        Self::V5_2,
        Self::V5_3,
    ];
}

impl core::fmt::Display for Version {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{}.{}", self.0 >> 16, self.0 & 0xffff)
    }
}

/// Connection of channel messages up to version 4.1.
pub const MESSAGE_CONNECTION: u32 = 1;
/// Connection of channel messages from version 5.0 on.
pub const MESSAGE_CONNECTION_5: u32 = 4;
/// Connection of the events that the interrupt page explains (channels without a dedicated interrupt).
pub const EVENT_CONNECTION: u32 = 2;
/// `HV_MESSAGE_TYPE` of channel messages.
pub const MESSAGE_TYPE: u32 = 1;
/// SINT that guests use for VMBus where they do not choose.
pub const DEFAULT_SINT: u8 = 2;
/// Channel numbers (relids) are 1 to 2047: flag 0 of the event page means "look at the interrupt page".
pub const MAX_RELID: u32 = 2047;
/// Bytes of user-defined data in offers and open requests.
pub const USER_DATA: usize = 120;
/// A page of the protocol.
pub const PAGE: usize = 4096;
