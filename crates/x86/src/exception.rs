//! Exception vectors (SDM volume 3, section 6.3, table 6-1).

/// An architectural exception vector.
pub type Vector = u8;

/// Divide error.
pub const DE: Vector = 0;
/// Debug.
pub const DB: Vector = 1;
/// Non-maskable interrupt.
pub const NMI: Vector = 2;
/// Breakpoint (INT3).
pub const BP: Vector = 3;
/// Overflow (INTO).
pub const OF: Vector = 4;
/// BOUND range exceeded.
pub const BR: Vector = 5;
/// Invalid opcode.
pub const UD: Vector = 6;
/// Device not available.
pub const NM: Vector = 7;
/// Double fault.
pub const DF: Vector = 8;
/// Invalid TSS.
pub const TS: Vector = 10;
/// Segment not present.
pub const NP: Vector = 11;
/// Stack-segment fault.
pub const SS: Vector = 12;
/// General protection.
pub const GP: Vector = 13;
/// Page fault.
pub const PF: Vector = 14;
/// x87 floating-point error.
pub const MF: Vector = 16;
/// Alignment check.
pub const AC: Vector = 17;
/// Machine check.
pub const MC: Vector = 18;
/// SIMD floating-point exception.
pub const XM: Vector = 19;

/// Does this exception push an error code (SDM volume 3, table 6-1)?
pub const fn has_error_code(vector: Vector) -> bool {
    matches!(vector, DF | TS | NP | SS | GP | PF | AC)
}

/// Page-fault error-code bits (SDM volume 3, section 4.7).
pub mod pf {
    /// The fault was a protection violation on a present page.
    pub const PRESENT: u32 = 1 << 0;
    /// The access was a write.
    pub const WRITE: u32 = 1 << 1;
    /// The access was made in user mode.
    pub const USER: u32 = 1 << 2;
    /// A reserved bit was set in a paging-structure entry.
    pub const RSVD: u32 = 1 << 3;
    /// The access was an instruction fetch (only reported with NXE or SMEP).
    pub const FETCH: u32 = 1 << 4;
}
