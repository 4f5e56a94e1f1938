//! The model's CPUID tables against what this KVM supports.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use partition::EngineError;
use x86::cpuid::bits::{self, Bit, Reg};
use x86::cpuid::{CpuidResult, CpuidTable};

/// Bits that KVM fills in itself or that describe the machine and not the processor: not looked up.
const NOT_KVMS: &[Bit] = &[
    bits::HYPERVISOR,
    bits::OSXSAVE,
    bits::OSPKE,
    bits::APIC,
    bits::HTT,
    bits::CMP_LEGACY,
    bits::TOPOEXT,
    bits::ARAT,
    bits::X2APIC,
    bits::TSC_DEADLINE,
    bits::INVARIANT_TSC,
    bits::MCE,
    bits::MCA,
    bits::MTRR,
    bits::TSC_ADJUST,
];

/// What the model says about speculation defects is true of the software processor; here it is the host's processor that
/// executes, so these are offered only where KVM says so.
const HOSTS_TRUTH: &[Bit] = &[
    bits::SPEC_CTRL,
    bits::ARCH_CAPABILITIES,
    bits::BHI_CTRL,
    bits::INTEL_STIBP,
    bits::INTEL_SSBD,
    bits::AMD_IBPB,
    bits::AMD_IBRS,
    bits::AMD_STIBP,
    bits::AMD_SSBD,
    bits::AMD_SSB_NO,
    bits::AMD_BTC_NO,
    bits::LFENCE_SERIALIZING,
    bits::NULL_SEL_CLR_BASE,
    bits::AUTOIBRS,
    bits::SRSO_NO,
    bits::TSA_SQ_NO,
    bits::TSA_L1_NO,
];

fn supports(supported: &CpuId, bit: &Bit) -> bool {
    supported.as_slice().iter().filter(|e| e.function == bit.leaf && e.index == bit.subleaf).any(|e| {
        let value = match bit.reg {
            Reg::Eax => e.eax,
            Reg::Ebx => e.ebx,
            Reg::Ecx => e.ecx,
            Reg::Edx => e.edx,
        };
        value >> bit.bit & 1 != 0
    })
}

/// The table in KVM's form. Fails if the model has a feature that this KVM cannot give.
pub fn to_kvm(table: &CpuidTable, supported: &CpuId) -> Result<CpuId, EngineError> {
    let mut missing = Vec::new();
    let mut cleared = Vec::new();
    for bit in bits::ALL.iter().filter(|b| b.in_table(table)) {
        if NOT_KVMS.contains(bit) || supports(supported, bit) {
            continue;
        }
        if HOSTS_TRUTH.contains(bit) {
            cleared.push(bit);
        } else {
            missing.push(bit.name);
        }
    }
    if !missing.is_empty() {
        return Err(EngineError::Unavailable {
            engine: "kvm",
            reason: format!(
                "this host's KVM does not offer {}, which the processor model has; choose another --cpu-model or \
                 --engine soft",
                missing.join(", ")
            ),
        });
    }
    let entries: Vec<_> = table
        .entries
        .iter()
        .map(|e| {
            let subleaf = e.subleaf.unwrap_or(0);
            let mut result = e.result;
            for bit in cleared.iter().filter(|b| b.leaf == e.leaf && b.subleaf == subleaf) {
                *result.reg_mut(bit.reg) &= !(1 << bit.bit);
            }
            entry(e.leaf, e.subleaf, result)
        })
        .collect();
    CpuId::from_entries(&entries)
        .map_err(|e| EngineError::Config(format!("a CPUID table with {} entries: {e:?}", entries.len())))
}

/// The table without the features that this KVM does not have.
pub fn offered_part(table: &CpuidTable, supported: &CpuId) -> CpuidTable {
    let mut part = table.clone();
    for bit in bits::ALL.iter().filter(|b| b.in_table(table)) {
        if !NOT_KVMS.contains(bit) && !supports(supported, bit) {
            for e in part.entries.iter_mut().filter(|e| e.leaf == bit.leaf && e.subleaf.unwrap_or(0) == bit.subleaf) {
                *e.result.reg_mut(bit.reg) &= !(1 << bit.bit);
            }
        }
    }
    part
}

fn entry(leaf: u32, subleaf: Option<u32>, r: CpuidResult) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 {
        function: leaf,
        index: subleaf.unwrap_or(0),
        flags: if subleaf.is_some() { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 },
        eax: r.eax,
        ebx: r.ebx,
        ecx: r.ecx,
        edx: r.edx,
        ..Default::default()
    }
}
