//! Opening `/dev/kvm` and making partitions.

use crate::partition::KvmPartition;
use crate::{cpuid, sys};
use kvm_bindings::{
    CpuId, KVM_CAP_DISABLE_QUIRKS2, KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_SYNC_REGS, KVM_CAP_X2APIC_API,
    KVM_CAP_X86_MSR_FILTER, KVM_CAP_X86_USER_SPACE_MSR, KVM_MAX_CPUID_ENTRIES,
};
use kvm_ioctls::Kvm;
use partition::{Abilities, Engine, EngineError, Partition, PartitionConfig};
use std::sync::Arc;
use x86::cpuid::CpuidTable;

/// What partitions of this engine can do. The local APIC is the kernel's: no part of it can be used or changed while a
/// VP runs.
pub(crate) const ABILITIES: Abilities =
    Abilities { remote_tlb_flush: false, doorbells: true, auto_eoi: false, apic_access: false };

/// The engine.
pub struct KvmEngine {
    kvm: Kvm,
}

/// Should `--engine auto` choose KVM: does the processor report VT-x or AMD-V, and can `/dev/kvm` be opened? A KVM that is
/// not backed by them is emulated by somebody else, and slower than the software processor.
pub fn kvm_is_usable() -> bool {
    let flags = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    has_virtualization(&flags) && std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok()
}

fn has_virtualization(cpuinfo: &str) -> bool {
    cpuinfo
        .lines()
        .filter(|l| l.starts_with("flags"))
        .any(|l| l.split_ascii_whitespace().any(|w| w == "vmx" || w == "svm"))
}

impl KvmEngine {
    /// Opens KVM and checks that it can do what the contract needs.
    pub fn new() -> Result<Self, EngineError> {
        let unavailable = |reason: String| EngineError::Unavailable { engine: "kvm", reason };
        let kvm = Kvm::new().map_err(|e| {
            let reason = match e.errno() {
                libc::ENOENT => "there is no /dev/kvm: load the kernel module kvm_intel or kvm_amd".to_owned(),
                libc::EACCES | libc::EPERM => {
                    "/dev/kvm may not be opened: add the user to the group that owns it (usually kvm)".to_owned()
                }
                _ => format!("/dev/kvm cannot be opened: {e}"),
            };
            unavailable(format!("{reason}, or use --engine soft"))
        })?;
        if kvm.get_api_version() != 12 {
            return Err(unavailable(format!("its API has version {}, not 12", kvm.get_api_version())));
        }
        for (name, cap) in [
            ("split irqchip", KVM_CAP_SPLIT_IRQCHIP),
            ("x2APIC API", KVM_CAP_X2APIC_API),
            ("MSR filter", KVM_CAP_X86_MSR_FILTER),
            ("user-space MSRs", KVM_CAP_X86_USER_SPACE_MSR),
            ("synced registers", KVM_CAP_SYNC_REGS),
            ("disabling of quirks", KVM_CAP_DISABLE_QUIRKS2),
        ] {
            if kvm.check_extension_raw(cap.into()) <= 0 {
                return Err(unavailable(format!("this host's KVM lacks '{name}' (Linux 5.17 and newer have it)")));
            }
        }
        sys::install_kick_handler()
            .map_err(|source| EngineError::Host { call: "installing the kick signal", source })?;
        Ok(Self { kvm })
    }

    /// The part of a model's table that this KVM can give: for a KVM that can give no named model (an emulated one), and
    /// for tests. A machine made with it cannot be moved to another host.
    pub fn offered_part(&self, table: &CpuidTable) -> Result<CpuidTable, EngineError> {
        let supported = self.supported()?;
        Ok(cpuid::offered_part(table, &supported))
    }

    fn supported(&self) -> Result<CpuId, EngineError> {
        self.kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(sys::host("KVM_GET_SUPPORTED_CPUID"))
    }
}

impl Engine for KvmEngine {
    fn name(&self) -> &'static str {
        "kvm"
    }
    fn abilities(&self) -> Abilities {
        ABILITIES
    }
    fn create(&self, config: PartitionConfig) -> Result<Arc<dyn Partition>, EngineError> {
        Ok(KvmPartition::new(&self.kvm, &self.supported()?, config)?)
    }
}

#[cfg(test)]
mod tests {
    use super::has_virtualization;

    #[test]
    fn flags_are_words() {
        assert!(has_virtualization("processor: 0\nflags\t\t: fpu vmx sse\n"));
        assert!(has_virtualization("flags\t\t: fpu svm\n"));
        assert!(!has_virtualization("flags\t\t: fpu vmxnet svmx\nbugs : svm\n"));
        assert!(!has_virtualization(""));
    }
}
