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

/// What the models have beyond the levels that they are named after, and older hosts lack: left out there, with a note.
/// Guests look before they use any of it; a machine that was saved with more is refused when its state is loaded, if it
/// uses one that shows in a control register.
const LEFT_OUT: &[Bit] = &[
    bits::PCID,
    bits::INVPCID,
    bits::SMEP,
    bits::SMAP,
    bits::UMIP,
    bits::FSGSBASE,
    bits::ERMS,
    bits::FSRM,
    bits::CLFLUSHOPT,
    bits::CLWB,
    bits::RDPID,
    bits::RDTSCP,
    bits::RDRAND,
    bits::RDSEED,
    bits::ADX,
    bits::GBPAGES,
    bits::PREFETCHW,
    bits::XSAVEOPT,
    bits::XSAVEC,
    bits::XGETBV1,
    bits::XSAVES,
    bits::MMXEXT,
    bits::CR8_LEGACY,
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
    let mut missing: Vec<&str> = Vec::new();
    let mut cleared = Vec::new();
    for bit in bits::ALL.iter().filter(|b| b.in_table(table)) {
        if NOT_KVMS.contains(bit) || supports(supported, bit) {
            continue;
        }
        if HOSTS_TRUTH.contains(bit) {
            cleared.push(bit);
        } else if LEFT_OUT.contains(bit) {
            tracing::info!(feature = bit.name, "this host's KVM does not have it: the processor model goes without");
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

#[cfg(test)]
mod tests {
    use super::*;
    use x86::cpuid::CpuModel;

    /// A host that supports exactly `table` without these.
    fn host_without(table: &CpuidTable, lacking: &[Bit]) -> CpuId {
        let mut have = table.clone();
        for bit in lacking {
            for e in have.entries.iter_mut().filter(|e| e.leaf == bit.leaf && e.subleaf.unwrap_or(0) == bit.subleaf) {
                *e.result.reg_mut(bit.reg) &= !(1 << bit.bit);
            }
        }
        let entries: Vec<_> = have.entries.iter().map(|e| entry(e.leaf, e.subleaf, e.result)).collect();
        CpuId::from_entries(&entries).unwrap()
    }

    #[test]
    fn the_level_is_needed_and_the_rest_is_left_out() {
        let table = CpuModel::by_name("x86-64-v2").unwrap().table(0, 1, 2_000_000_000);
        let of = |id: &CpuId, leaf: u32| id.as_slice().iter().find(|e| e.function == leaf && e.index == 0).copied();
        let full = to_kvm(&table, &host_without(&table, &[])).unwrap();
        assert_eq!(of(&full, 1).unwrap().ecx, table.get(1, 0).ecx);
        let older = to_kvm(&table, &host_without(&table, &[bits::PCID, bits::FSRM])).unwrap();
        assert_eq!(of(&older, 1).unwrap().ecx, table.get(1, 0).ecx & !(1 << bits::PCID.bit));
        assert_eq!(of(&older, 7).unwrap().edx & 1 << bits::FSRM.bit, 0);
        let error = to_kvm(&table, &host_without(&table, &[bits::SSE4_2])).unwrap_err();
        assert!(error.to_string().contains("SSE4_2"), "{error}");
    }
}
