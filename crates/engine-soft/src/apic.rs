//! The local APIC (SDM volume 3, chapter 10).

use std::sync::atomic::{AtomicU64, Ordering};

/// A VP's local APIC.
pub struct Lapic {
    base: AtomicU64,
}

impl Lapic {
    /// `IA32_APIC_BASE`.
    pub fn base(&self) -> u64 {
        self.base.load(Ordering::Relaxed)
    }
}
