//! What the engine asks of the machine while a VP runs.
//!
//! All calls are made on the thread of the VP that caused them, with no lock of the engine held. They must not block
//! for long: the guest instruction that caused them waits. A call may use every method of [`crate::Partition`],
//! including [`crate::Partition::kick`] on its own VP, which then takes effect before the next guest instruction.

use crate::{Gpa, VpIndex};

/// Answer to an access to an intercepted model-specific register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MsrOutcome {
    /// Done. For a read this is the value; a write ignores it.
    Value(u64),
    /// Done, and the VP then idles as after HLT with interrupts considered enabled (TLFS `HV_X64_MSR_GUEST_IDLE`).
    ValueThenIdle(u64),
    /// The register does not exist or the value is not allowed: the guest gets #GP(0).
    Fault,
}

/// What the engine does after a hypercall.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HypercallOutcome {
    /// Continue after the instruction.
    Complete,
    /// Take pending interrupts, then execute the same instruction again (a rep hypercall that made partial progress,
    /// TLFS section 3.4).
    Restart,
    /// The hypercall was made from a place that may not make it: #UD (TLFS section 3.5).
    InvalidOpcode,
}

/// The caller's registers, as the hypercall interface uses them (TLFS sections 3.7 to 3.10).
pub trait HypercallContext {
    /// General-purpose register by its number ([`x86::regs::gpr`]).
    fn gpr(&self, number: usize) -> u64;
    /// Writes a general-purpose register (all 64 bits).
    fn set_gpr(&mut self, number: usize, value: u64);
    /// XMM register 0 to 15.
    fn xmm(&mut self, number: usize) -> u128;
    /// Writes XMM register 0 to 15.
    fn set_xmm(&mut self, number: usize, value: u128);
    /// Is the caller in 64-bit mode (CS.L set and EFER.LMA)?
    fn is_64bit(&self) -> bool;
    /// Current privilege level of the caller.
    fn cpl(&self) -> u8;
    /// Is the caller in protected mode?
    fn is_protected(&self) -> bool;
}

/// The machine's side of a running VP. See the module page for the rules that all methods share.
pub trait VpExits: Send + Sync {
    /// IN and INS: fill `data` (1, 2 or 4 bytes) from `port`. An absent port reads as all ones.
    fn io_read(&self, vp: VpIndex, port: u16, data: &mut [u8]);
    /// OUT and OUTS: `data` has 1, 2 or 4 bytes.
    fn io_write(&self, vp: VpIndex, port: u16, data: &[u8]);
    /// A read of guest physical memory that is not mapped: 1 to 8 bytes that do not cross an 8-byte boundary.
    /// Unclaimed addresses read as all ones.
    fn mmio_read(&self, vp: VpIndex, gpa: Gpa, data: &mut [u8]);
    /// A write to guest physical memory that is not mapped or is mapped read-only. Same sizes as reads.
    fn mmio_write(&self, vp: VpIndex, gpa: Gpa, data: &[u8]);
    /// RDMSR of a register in [`crate::PartitionConfig::msr_exits`].
    fn msr_read(&self, vp: VpIndex, msr: u32) -> MsrOutcome;
    /// WRMSR of a register in [`crate::PartitionConfig::msr_exits`].
    fn msr_write(&self, vp: VpIndex, msr: u32, value: u64) -> MsrOutcome;
    /// The instruction of the hypercall page was executed (an OUT to [`crate::PartitionConfig::hypercall_port`]).
    fn hypercall(&self, vp: VpIndex, context: &mut dyn HypercallContext) -> HypercallOutcome;
    /// The local APIC finished a level-triggered interrupt with this vector and broadcasts it to the I/O APICs.
    fn eoi(&self, vp: VpIndex, vector: u8);
    /// The VP takes the external interrupt that [`crate::Partition::set_extint`] announced: the INTA cycle of the PIC
    /// pair. Returns the vector; `None` if the line has fallen meanwhile (the VP then takes no interrupt).
    fn acknowledge_extint(&self, vp: VpIndex) -> Option<u8>;
    /// The VP has begun to handle an interrupt with this vector. Engines that cannot tell do not call it.
    fn interrupt_taken(&self, _vp: VpIndex, _vector: u8) {}
}
