//! The machine's answers to a running VP.

use crate::bus::Bus;
use crate::layout::io;
use chipset::ioapic::IoApic;
use chipset::pic::Pic;
use chipset::pit::Pit;
use chipset::{DeviceError, PowerSink, SavedState};
use partition::{Abilities, Gpa, HypercallContext, HypercallOutcome, MsrOutcome, Partition, VpExits, VpIndex};
use std::ops::RangeInclusive;
use std::sync::Arc;
use x86::cpuid::CpuidTable;

/// A paravirtual interface that the machine offers to its guest: CPUID leaves, model-specific registers, hypercalls.
///
/// It is made before the partition (which is made from its CPUID leaves) and gets it with
/// [`GuestInterface::attach`] before the first VP runs. MSR and hypercall methods are called on VP threads, the others
/// while the machine is stopped.
pub trait GuestInterface: Send + Sync {
    /// Registers that it answers.
    fn msr_ranges(&self) -> Vec<RangeInclusive<u32>>;
    /// Port whose OUT is a hypercall.
    fn hypercall_port(&self) -> Option<u8>;
    /// Adds its leaves to a VP's table.
    fn extend_cpuid(&self, table: &mut CpuidTable, abilities: Abilities);
    /// The partition exists now, and so does the power switch.
    fn attach(&self, partition: &Arc<dyn Partition>, power: &Arc<dyn PowerSink>);
    /// RDMSR.
    fn msr_read(&self, vp: VpIndex, msr: u32) -> MsrOutcome;
    /// WRMSR.
    fn msr_write(&self, vp: VpIndex, msr: u32, value: u64) -> MsrOutcome;
    /// Hypercall.
    fn hypercall(&self, vp: VpIndex, context: &mut dyn HypercallContext) -> HypercallOutcome;
    /// The partition is about to run, or to go on.
    fn start(&self) {}
    /// The partition has stopped: when this returns, nothing of this changes the guest's memory.
    fn stop(&self) {}
    /// Hardware reset, while stopped.
    fn reset(&self);
    /// Its complete state.
    fn save(&self) -> Result<SavedState, DeviceError>;
    /// Takes over a saved state.
    fn restore(&self, saved: &SavedState) -> Result<(), DeviceError>;
    /// Named counters.
    fn counters(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }
}

/// Everything that a VP can reach.
pub struct Exits {
    /// Devices by address.
    pub bus: Bus,
    pub(crate) pic: Arc<Pic>,
    pub(crate) ioapic: Arc<IoApic>,
    pub(crate) pit: Option<Arc<Pit>>,
    pub(crate) guest_interface: Option<Arc<dyn GuestInterface>>,
}

impl VpExits for Exits {
    fn io_read(&self, _vp: VpIndex, port: u16, data: &mut [u8]) {
        self.bus.port_read(port, data);
    }

    fn io_write(&self, _vp: VpIndex, port: u16, data: &[u8]) {
        self.bus.port_write(port, data);
    }

    fn mmio_read(&self, _vp: VpIndex, gpa: Gpa, data: &mut [u8]) {
        self.bus.mmio_read(gpa.0, data);
    }

    fn mmio_write(&self, _vp: VpIndex, gpa: Gpa, data: &[u8]) {
        self.bus.mmio_write(gpa.0, data);
    }

    fn msr_read(&self, vp: VpIndex, msr: u32) -> MsrOutcome {
        self.guest_interface.as_ref().map_or(MsrOutcome::Fault, |g| g.msr_read(vp, msr))
    }

    fn msr_write(&self, vp: VpIndex, msr: u32, value: u64) -> MsrOutcome {
        self.guest_interface.as_ref().map_or(MsrOutcome::Fault, |g| g.msr_write(vp, msr, value))
    }

    fn hypercall(&self, vp: VpIndex, context: &mut dyn HypercallContext) -> HypercallOutcome {
        self.guest_interface.as_ref().map_or(HypercallOutcome::InvalidOpcode, |g| g.hypercall(vp, context))
    }

    fn eoi(&self, _vp: VpIndex, vector: u8) {
        self.ioapic.eoi(vector);
    }

    fn acknowledge_extint(&self, _vp: VpIndex) -> Option<u8> {
        self.pic.acknowledge()
    }

    fn interrupt_taken(&self, _vp: VpIndex, vector: u8) {
        if let Some(pit) = &self.pit
            && (self.ioapic.vector_of(io::PIT_PIN) == Some(vector) || self.pic.vector_of(0) == Some(vector))
        {
            pit.interrupt_taken();
        }
    }
}
