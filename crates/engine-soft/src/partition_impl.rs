//! To be written.
use std::sync::Mutex;
/// X
pub struct SoftPartition {
    /// x
    pub code_generations: crate::code::CodeGenerations,
    /// x
    pub bus_lock: Mutex<()>,
    /// x
    pub hypercall_port: Option<u8>,
}
impl SoftPartition {
    /// x
    pub fn track_code(&self, p: u64) -> u32 { self.code_generations.get(p) }
    /// x
    pub fn process_requests(_vp: &mut crate::vp::SoftVp) {}
}
