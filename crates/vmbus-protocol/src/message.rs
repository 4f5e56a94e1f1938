//! Channel messages: payloads of SynIC messages on SINT 2 and of `HvCallPostMessage`.

use crate::{Guid, USER_DATA};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Message types.
#[allow(missing_docs)]
pub mod kind {
    pub const OFFER: u32 = 1;
    pub const RESCIND: u32 = 2;
    pub const REQUEST_OFFERS: u32 = 3;
    pub const ALL_OFFERS_DELIVERED: u32 = 4;
    pub const OPEN: u32 = 5;
    pub const OPEN_RESULT: u32 = 6;
    pub const CLOSE: u32 = 7;
    pub const GPADL_HEADER: u32 = 8;
    pub const GPADL_BODY: u32 = 9;
    pub const GPADL_CREATED: u32 = 10;
    pub const GPADL_TEARDOWN: u32 = 11;
    pub const GPADL_TORNDOWN: u32 = 12;
    pub const RELID_RELEASED: u32 = 13;
    pub const INITIATE_CONTACT: u32 = 14;
    pub const VERSION_RESPONSE: u32 = 15;
    pub const UNLOAD: u32 = 16;
    pub const UNLOAD_RESPONSE: u32 = 17;
    pub const TL_CONNECT_REQUEST: u32 = 21;
    pub const MODIFY: u32 = 22;
    pub const TL_CONNECT_RESULT: u32 = 23;
    pub const MODIFY_RESPONSE: u32 = 24;
}

/// Flags of an offer.
#[allow(missing_docs)]
pub mod offer_flags {
    pub const ENUMERATE: u16 = 1;
    pub const NAMED_PIPE: u16 = 0x10;
    pub const TLNPI: u16 = 0x2000;
}

/// Pipe mode in the first dword of an offer's user data: messages.
pub const PIPE_MODE_MESSAGE: u32 = 4;

/// Status in results: success.
pub const STATUS_SUCCESS: u32 = 0;
/// Status in results: failure (NTSTATUS `STATUS_UNSUCCESSFUL`).
pub const STATUS_UNSUCCESSFUL: u32 = 0xc000_0001;
/// Status in results: nobody listens (NTSTATUS `STATUS_CONNECTION_REFUSED`).
pub const STATUS_CONNECTION_REFUSED: u32 = 0xc000_0236;

macro_rules! wire {
    ($(#[$doc:meta])* $name:ident, $size:literal, { $($(#[$fdoc:meta])* $field:ident: $type:ty),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
        #[repr(C, packed)]
        #[allow(missing_docs)]
        pub struct $name { $($(#[$fdoc])* pub $field: $type),* }
        const _: () = assert!(core::mem::size_of::<$name>() == $size);
    };
}

wire!(/// Start of every message.
    Header, 8, { kind: u32, padding: u32 });
wire!(/// Offer of a channel.
    Offer, 196, {
    header: Header,
    class: Guid,
    instance: Guid,
    reserved: [u64; 2],
    flags: u16,
    /// MMIO that the device wants, in MiB.
    mmio_megabytes: u16,
    user_data: [u8; USER_DATA],
    sub_channel_index: u16,
    reserved2: u16,
    relid: u32,
    monitor_id: u8,
    /// Bit 0: `monitor_id` is valid.
    monitor_allocated: u8,
    /// Bit 0 (from version 1.1): signals of the guest need not go through the interrupt page.
    dedicated_interrupt: u16,
    /// For `HvCallSignalEvent` (from version 1.1).
    connection_id: u32,
});
wire!(/// Rescind, close, relid released: a channel number.
    Relid, 12, { header: Header, relid: u32 });
wire!(/// Request to open a channel.
    Open, 148, {
    header: Header,
    relid: u32,
    open_id: u32,
    ring_gpadl: u32,
    target_vp: u32,
    /// First page of the ring from host to guest in the GPADL.
    downstream_page: u32,
    user_data: [u8; USER_DATA],
});
wire!(/// Result of an open request.
    OpenResult, 20, { header: Header, relid: u32, open_id: u32, status: u32 });
wire!(/// First part of a GPADL; the ranges follow.
    GpadlHeader, 20, {
    header: Header,
    relid: u32,
    gpadl: u32,
    /// Bytes of all ranges.
    range_bytes: u16,
    range_count: u16,
});
wire!(/// Further part of a GPADL; page numbers follow.
    GpadlBody, 16, { header: Header, number: u32, gpadl: u32 });
wire!(/// A range in a GPADL or GPA-direct packet; page numbers follow.
    GpaRange, 8, { byte_count: u32, byte_offset: u32 });
wire!(/// Result of making a GPADL.
    GpadlCreated, 20, { header: Header, relid: u32, gpadl: u32, status: u32 });
wire!(/// Request to tear a GPADL down.
    GpadlTeardown, 16, { header: Header, relid: u32, gpadl: u32 });
wire!(/// A GPADL is no longer in use.
    GpadlTorndown, 12, { header: Header, gpadl: u32 });
wire!(/// First message of a guest.
    InitiateContact, 40, {
    header: Header,
    version: u32,
    target_vp: u32,
    /// Up to 4.1: address of the interrupt page. From 5.0: SINT in the lowest byte.
    interrupt_page_or_sint: u64,
    /// Host to guest.
    monitor_page1: u64,
    /// Guest to host.
    monitor_page2: u64,
});
wire!(/// Answer to [`InitiateContact`].
    VersionResponse, 16, {
    header: Header,
    supported: u8,
    /// 0: success.
    connection_state: u8,
    padding: u16,
    /// Connection for further messages (from 5.0).
    connection_id: u32,
});
wire!(/// Guest connects to a Hyper-V socket of the host.
    TlConnectRequest, 40, { header: Header, endpoint: Guid, service: Guid });
wire!(/// Answer to [`TlConnectRequest`] if refused.
    TlConnectResult, 44, { header: Header, endpoint: Guid, service: Guid, status: u32 });
wire!(/// Other target VP for a channel's interrupts.
    Modify, 16, { header: Header, relid: u32, target_vp: u32 });
wire!(/// Acknowledges [`Modify`] (from 5.3).
    ModifyResponse, 16, { header: Header, relid: u32, status: u32 });

impl Header {
    /// With this type.
    pub const fn new(kind: u32) -> Self {
        Self { kind, padding: 0 }
    }
}
