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

fn soft() -> Result<Box<dyn Engine>, EngineError> {
    Ok(Box::new(SoftEngine))
}

fn kvm() -> Result<Box<dyn Engine>, EngineError> {
    Ok(Box::new(KvmEngine::new()?))
}
