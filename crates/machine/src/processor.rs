//! CPUID tables of the machine's VPs.

use crate::machine::MachineError;
use x86::cpuid::CpuidTable;

/// One table a VP for a model by name.
pub fn tables(model: &str, processors: u32, tsc_hz: u64) -> Result<Vec<CpuidTable>, MachineError> {
    let _ = (processors, tsc_hz);
    Err(MachineError::Config(format!("unknown processor model '{model}'")))
}
