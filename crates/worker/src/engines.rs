//! Which engine runs the machine.

use engine_kvm::{KvmEngine, kvm_is_usable};
use engine_soft::partition_impl::SoftEngine;
use partition::{Engine, EngineError};

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

/// The engine that was asked for.
pub fn choose(choice: EngineChoice) -> Result<Box<dyn Engine>, EngineError> {
    match choice {
        EngineChoice::Soft => soft(),
        EngineChoice::Kvm => kvm(),
        // A `/dev/kvm` without VT-x or AMD-V is emulated by somebody else and slower than the software processor.
        EngineChoice::Auto if kvm_is_usable() => kvm().or_else(|_| soft()),
        EngineChoice::Auto => soft(),
    }
}

/// Which engine `auto` chooses on this host, and why KVM is or is not it.
pub fn describe() -> (&'static str, String) {
    let processor = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flag = |f: &str| processor.lines().any(|l| l.starts_with("flags") && l.split_whitespace().any(|w| w == f));
    let extension = if flag("vmx") {
        Some("VT-x")
    } else if flag("svm") {
        Some("AMD-V")
    } else {
        None
    };
    let device = std::path::Path::new("/dev/kvm").exists();
    match (extension, KvmEngine::new()) {
        (Some(name), Ok(_)) => ("kvm", format!("used: the processor has {name}")),
        (Some(name), Err(e)) => ("soft", format!("not used: the processor has {name}, but {e}")),
        (None, _) if device => {
            let why = "not used: the processor shows neither VT-x nor AMD-V, so that /dev/kvm is emulated by somebody else \
                       and slower than the software processor";
            ("soft", why.into())
        }
        (None, _) => {
            let why = "not used: the processor shows neither VT-x nor AMD-V (they may be off in the firmware's setup, or \
                       this host is itself a VM)";
            ("soft", why.into())
        }
    }
}

fn soft() -> Result<Box<dyn Engine>, EngineError> {
    Ok(Box::new(SoftEngine))
}

fn kvm() -> Result<Box<dyn Engine>, EngineError> {
    Ok(Box::new(KvmEngine::new()?))
}
