//! Where the system instructions and the MMU meet MSRs, the local APIC and the partition.

use crate::vp::{Exec, SoftVp};
use partition::Gpa;

impl SoftVp {
    pub(crate) fn msr_read(&mut self, msr: u32) -> Exec<u64> {
        self.read_msr(msr)
    }
    pub(crate) fn msr_write(&mut self, msr: u32, value: u64) -> Exec {
        self.write_msr(msr, value)
    }
    /// The local APIC's task priority register; CR8 is its bits 4 to 7.
    pub(crate) fn task_priority(&self) -> u32 {
        self.apic.tpr()
    }
    pub(crate) fn set_task_priority(&mut self, value: u32) {
        self.apic.set_tpr(value & 0xff);
    }
    /// An OUT imm8, AL to this port is a hypercall.
    pub(crate) fn hypercall_port(&self) -> Option<u8> {
        self.partition.hypercall_port
    }
    /// Tells the partition that bytes of a page with tracked code were written.
    pub(crate) fn code_page_written(&mut self, gpa: u64, len: usize) {
        self.partition.code_written(gpa, len as u64);
    }
    /// A read of the local APIC's register page.
    pub(crate) fn apic_page_read(&mut self, offset: u32, data: &mut [u8]) {
        self.apic.mmio_read(offset, data);
    }
    /// A write to the local APIC's register page.
    pub(crate) fn apic_page_write(&mut self, offset: u32, data: &[u8]) {
        self.apic.mmio_write(&self.partition.apics, self.exits(), offset, data);
    }
    /// Signals the doorbell at a physical address, if there is one.
    pub(crate) fn ring_doorbell(&mut self, gpa: u64, data: &[u8]) -> bool {
        self.partition.ring(Gpa(gpa), data)
    }
}
