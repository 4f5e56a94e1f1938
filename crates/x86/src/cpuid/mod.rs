//! CPUID tables, feature bits by name, and the processor models that guests can be given.

pub mod bits;
mod model;

pub use model::{
    APIC_TIMER_HZ, ARCH_CAPABILITIES, CpuModel, LINEAR_ADDRESS_BITS, ModelError, PHYSICAL_ADDRESS_BITS, Vendor,
    host_cpuid, lacking_on_host,
};

use serde::{Deserialize, Serialize};

/// The four registers that CPUID returns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuidResult {
    /// EAX.
    pub eax: u32,
    /// EBX.
    pub ebx: u32,
    /// ECX.
    pub ecx: u32,
    /// EDX.
    pub edx: u32,
}

/// One leaf (and subleaf, where the leaf has them).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuidEntry {
    /// EAX on input.
    pub leaf: u32,
    /// ECX on input; `None` if the leaf ignores it.
    pub subleaf: Option<u32>,
    /// What is returned.
    pub result: CpuidResult,
}

/// What CPUID answers on one VP. Bits that depend on the VP's state (OSXSAVE, the XSAVE size for the current XCR0, the
/// APIC enable bit) are the engine's to fill in.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuidTable {
    /// Entries, ascending by leaf and subleaf.
    pub entries: Vec<CpuidEntry>,
}

impl CpuidTable {
    /// Looks a leaf up as the processor does: an unknown leaf above the basic or extended maximum returns the highest
    /// basic leaf on Intel and zeros on AMD; Viridian answers zeros, as AMD does and every guest accepts.
    pub fn get(&self, leaf: u32, subleaf: u32) -> CpuidResult {
        self.entries
            .iter()
            .find(|e| e.leaf == leaf && e.subleaf.is_none_or(|s| s == subleaf))
            .map(|e| e.result)
            .unwrap_or_default()
    }

    /// Adds or replaces an entry.
    pub fn set(&mut self, leaf: u32, subleaf: Option<u32>, result: CpuidResult) {
        let key = (leaf, subleaf);
        match self.entries.binary_search_by_key(&key, |e| (e.leaf, e.subleaf)) {
            Ok(i) => self.entries[i].result = result,
            Err(i) => self.entries.insert(i, CpuidEntry { leaf, subleaf, result }),
        }
    }
}
