//! Where the system instructions meet MSRs, the local APIC and the partition.

use crate::vp::{Exec, Fault, SoftVp};

impl SoftVp {
    pub(crate) fn msr_read(&mut self, _msr: u32) -> Exec<u64> {
        Err(Fault::GP0)
    }
    pub(crate) fn msr_write(&mut self, _msr: u32, _value: u64) -> Exec {
        Err(Fault::GP0)
    }
    pub(crate) fn task_priority(&self) -> u32 {
        0
    }
    pub(crate) fn set_task_priority(&mut self, _value: u32) {}
    pub(crate) fn hypercall_port(&self) -> Option<u8> {
        None
    }
    /// Tells the partition that bytes of a page with tracked code were written.
    pub(crate) fn code_page_written(&mut self, _gpa: u64, _len: usize) {}

    pub(crate) fn apic_page_read(&mut self, _offset: u32, data: &mut [u8]) {
        data.fill(0xff);
    }

    pub(crate) fn apic_page_write(&mut self, _offset: u32, _data: &[u8]) {}

    /// Signals the doorbell at a physical address, if there is one.
    pub(crate) fn ring_doorbell(&mut self, _gpa: u64, _data: &[u8]) -> bool {
        false
    }
}
