//! Which engine runs the machine.

use engine_soft::partition_impl::SoftEngine;
use partition::{Engine, EngineError};
use x86::cpuid::host_cpuid;

/// As the user says it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EngineChoice {
    /// KVM where the processor has VT-x or AMD-V, the software processor elsewhere.
    #[default]
    Auto,
    /// The software processor.
    Soft,
    /// KVM.
    Kvm,
}

/// Does the processor have VT-x or AMD-V? A `/dev/kvm` without them is emulated by somebody else and slower than the
/// software processor.
fn has_hardware() -> bool {
    let vmx = host_cpuid(1, 0).ecx & 1 << 5 != 0;
    let svm = host_cpuid(0x8000_0000, 0).eax >= 0x8000_0001 && host_cpuid(0x8000_0001, 0).ecx & 1 << 2 != 0;
    vmx || svm
}

/// The engine that was asked for.
pub fn choose(choice: EngineChoice) -> Result<Box<dyn Engine>, EngineError> {
    match choice {
        EngineChoice::Soft => soft(),
        EngineChoice::Kvm => kvm(),
        EngineChoice::Auto if has_hardware() && std::path::Path::new("/dev/kvm").exists() => kvm().or_else(|_| soft()),
        EngineChoice::Auto => soft(),
    }
}

fn soft() -> Result<Box<dyn Engine>, EngineError> {
    Ok(Box::new(SoftEngine))
}

fn kvm() -> Result<Box<dyn Engine>, EngineError> {
    Err(EngineError::Unavailable { engine: "kvm", reason: "this build does not contain it; use --engine soft".into() })
}
