//! Numbers of the interface: MSRs, hypercall codes, statuses, message layout.

/// Synthetic MSRs (TLFS appendix F).
#[allow(missing_docs)]
pub mod msr {
    pub const GUEST_OS_ID: u32 = 0x4000_0000;
    pub const HYPERCALL: u32 = 0x4000_0001;
    pub const VP_INDEX: u32 = 0x4000_0002;
    pub const RESET: u32 = 0x4000_0003;
    pub const VP_RUNTIME: u32 = 0x4000_0010;
    pub const TIME_REF_COUNT: u32 = 0x4000_0020;
    pub const REFERENCE_TSC: u32 = 0x4000_0021;
    pub const TSC_FREQUENCY: u32 = 0x4000_0022;
    pub const APIC_FREQUENCY: u32 = 0x4000_0023;
    pub const EOI: u32 = 0x4000_0070;
    pub const ICR: u32 = 0x4000_0071;
    pub const TPR: u32 = 0x4000_0072;
    pub const VP_ASSIST_PAGE: u32 = 0x4000_0073;
    pub const SCONTROL: u32 = 0x4000_0080;
    pub const SVERSION: u32 = 0x4000_0081;
    pub const SIEFP: u32 = 0x4000_0082;
    pub const SIMP: u32 = 0x4000_0083;
    pub const EOM: u32 = 0x4000_0084;
    pub const SINT0: u32 = 0x4000_0090;
    pub const SINT15: u32 = 0x4000_009f;
    /// Four pairs of configuration and count.
    pub const STIMER0_CONFIG: u32 = 0x4000_00b0;
    pub const STIMER3_COUNT: u32 = 0x4000_00b7;
    pub const GUEST_IDLE: u32 = 0x4000_00f0;
    pub const CRASH_P0: u32 = 0x4000_0100;
    pub const CRASH_P4: u32 = 0x4000_0104;
    pub const CRASH_CTL: u32 = 0x4000_0105;
}

/// Hypercall codes (TLFS appendix A).
#[allow(missing_docs)]
pub mod call {
    pub const FLUSH_VIRTUAL_ADDRESS_SPACE: u16 = 0x0002;
    pub const FLUSH_VIRTUAL_ADDRESS_LIST: u16 = 0x0003;
    pub const NOTIFY_LONG_SPIN_WAIT: u16 = 0x0008;
    pub const SEND_SYNTHETIC_CLUSTER_IPI: u16 = 0x000b;
    pub const FLUSH_VIRTUAL_ADDRESS_SPACE_EX: u16 = 0x0013;
    pub const FLUSH_VIRTUAL_ADDRESS_LIST_EX: u16 = 0x0014;
    pub const SEND_SYNTHETIC_CLUSTER_IPI_EX: u16 = 0x0015;
    pub const POST_MESSAGE: u16 = 0x005c;
    pub const SIGNAL_EVENT: u16 = 0x005d;
    pub const START_VIRTUAL_PROCESSOR: u16 = 0x0099;
    pub const GET_VP_INDEX_FROM_APIC_ID: u16 = 0x009a;
    pub const QUERY_EXTENDED_CAPABILITIES: u16 = 0x8001;
}

/// Result of a hypercall (TLFS appendix B).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
#[allow(missing_docs)]
pub enum HvStatus {
    Success = 0x0000,
    InvalidHypercallCode = 0x0002,
    InvalidHypercallInput = 0x0003,
    InvalidAlignment = 0x0004,
    InvalidParameter = 0x0005,
    AccessDenied = 0x0006,
    InvalidPartitionState = 0x0007,
    InsufficientMemory = 0x000b,
    InvalidPartitionId = 0x000d,
    InvalidVpIndex = 0x000e,
    InvalidPortId = 0x0011,
    InvalidConnectionId = 0x0012,
    InsufficientBuffers = 0x0013,
    InvalidVpState = 0x0015,
    InvalidRegisterValue = 0x0050,
}

/// `HV_PARTITION_ID_SELF`.
pub const PARTITION_ID_SELF: u64 = u64::MAX;
/// `HV_VP_INDEX_SELF`.
pub const VP_INDEX_SELF: u32 = 0xffff_fffe;
/// Synthetic interrupt sources of a VP.
pub const SINT_COUNT: usize = 16;
/// Synthetic timers of a VP.
pub const TIMER_COUNT: usize = 4;
/// Event flags of a SINT.
pub const EVENT_FLAG_COUNT: u16 = 2048;
/// Lowest vector that a synthetic interrupt may have.
pub const FIRST_VALID_VECTOR: u8 = 16;
/// Bytes of a message slot.
pub const MESSAGE_SIZE: usize = 256;
/// Most bytes of a message's payload.
pub const MESSAGE_PAYLOAD: usize = 240;
/// `HvMessageTypeTimerExpired`.
pub const MESSAGE_TIMER_EXPIRED: u32 = 0x8000_0010;
/// Message types with this bit are the hypervisor's own.
pub const MESSAGE_TYPE_HYPERVISOR: u32 = 0x8000_0000;

/// Page enable bit of HYPERCALL, REFERENCE_TSC, VP_ASSIST_PAGE, SIMP, SIEFP.
pub const PAGE_ENABLE: u64 = 1;
/// Address bits of the same registers.
pub const PAGE_ADDRESS: u64 = !0xfff;
/// HYPERCALL cannot change any more until reset.
pub const HYPERCALL_LOCKED: u64 = 2;

/// SINT register bits (TLFS section 11.8.3).
#[allow(missing_docs)]
pub mod sint {
    pub const VECTOR: u64 = 0xff;
    pub const MASKED: u64 = 1 << 16;
    pub const AUTO_EOI: u64 = 1 << 17;
    pub const POLLING: u64 = 1 << 18;
    pub const RESET: u64 = MASKED;
}

/// Synthetic timer configuration bits (TLFS section 12.3.1).
#[allow(missing_docs)]
pub mod stimer {
    pub const ENABLE: u64 = 1;
    pub const PERIODIC: u64 = 1 << 1;
    pub const LAZY: u64 = 1 << 2;
    pub const AUTO_ENABLE: u64 = 1 << 3;
    pub const VECTOR_SHIFT: u32 = 4;
    pub const DIRECT: u64 = 1 << 12;
    pub const SINT_SHIFT: u32 = 16;
    /// Bits that have a meaning.
    pub const VALID: u64 = 0xf_1fff;
}

/// Crash control bits (TLFS section 10.6).
#[allow(missing_docs)]
pub mod crash {
    pub const NOTIFY: u64 = 1 << 63;
    /// P3 and P4 are the address and length of a text.
    pub const MESSAGE: u64 = 1 << 62;
}

/// A SynIC message without its header's bookkeeping.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Message {
    /// `HV_MESSAGE_TYPE`; 1 is a VMBus channel message.
    pub message_type: u32,
    /// Port (or sender) in the header.
    pub sender: u64,
    /// At most [`MESSAGE_PAYLOAD`] bytes.
    pub payload: Vec<u8>,
}
