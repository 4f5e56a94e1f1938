//! CPUID tables of the machine's VPs.

use crate::machine::MachineError;
use x86::cpuid::{CpuModel, CpuidTable};

/// One table a VP, for a model by name (`x86-64-v2`, `x86-64-v3`, `host`).
pub fn tables(model: &str, processors: u32, tsc_hz: u64) -> Result<Vec<CpuidTable>, MachineError> {
    let model = CpuModel::by_name(model).map_err(|e| MachineError::Config(e.to_string()))?;
    Ok((0..processors).map(|vp| model.table(vp, processors, tsc_hz)).collect())
}
