//! Direct execution: 64-bit user code of the guest, executed by the host's processor in user mode as it is.

pub mod process;
pub mod screen;

use crate::vp::SoftVp;
use partition::{Engine, MemoryBlock};
use process::{Process, Tsc};
use std::sync::Arc;

/// Processes of a VP: so many address spaces of the guest can be kept at a time.
const PROCESSES: usize = 2;

/// What a VP has for direct execution; nothing where that is not wanted or not possible.
#[derive(Default)]
pub struct Processes {
    /// Each with nothing mapped.
    pub free: Vec<Process>,
    /// Which memory [`process::MapOp::Map`]'s blocks are.
    pub blocks: Vec<Arc<MemoryBlock>>,
}

impl SoftVp {
    /// Makes the processes.
    pub(crate) fn prepare_direct(&mut self) {
        if !crate::partition_impl::SoftEngine.uses_processes(&self.partition.options) {
            return;
        }
        let mut blocks: Vec<Arc<MemoryBlock>> = Vec::new();
        for mapping in self.partition.memory.mappings() {
            if mapping.block.fd().is_some() && !blocks.iter().any(|b| Arc::ptr_eq(b, &mapping.block)) {
                blocks.push(mapping.block);
            }
        }
        let fds: Vec<_> = blocks.iter().filter_map(|b| b.fd()).collect();
        if fds.is_empty() {
            return;
        }
        match (0..PROCESSES).map(|_| Process::spawn(&fds, Tsc::Host)).collect() {
            Ok(free) => self.processes = Processes { free, blocks },
            Err(error) => tracing::info!("VP {}: no direct execution: {error}", self.index),
        }
    }
}
