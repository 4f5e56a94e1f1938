//! The interpreter: decoded instructions, operands, dispatch, and the general-purpose instructions (in submodules).
//!
//! An instruction is decoded once (kept in [`crate::code::DecodeCache`] by physical page). General-purpose instructions
//! become a compact operation of their own; everything else becomes an [`Insn`] whose handler is called with the VP and
//! the `Insn`. Rules for handlers:
//! * `vp.s.next_rip` already holds the address behind the instruction; branches overwrite it (after their checks).
//! * A handler that returns `Err` has changed nothing that the architecture does not say is changed: it checks and reads
//!   everything first, and writes registers last. Memory is written before registers.
//! * `iced` is decoded at IP 0 (decoded instructions are keyed by physical page): a RIP-relative displacement or a near
//!   branch target in it is relative to the *start* of the instruction, modulo 2^64. [`SoftVp::effective_address`] adds
//!   `s.rip`.

use crate::vp::{Exec, SoftVp};
use iced_x86::Instruction;

/// Executes one decoded instruction.
pub type Handler = fn(&mut SoftVp, &Insn) -> Exec;

/// A decoded instruction.
#[derive(Clone, Copy)]
pub struct Insn {
    /// What to call.
    pub handler: Handler,
    /// As decoded, at IP 0.
    pub iced: Instruction,
    /// Bytes as fetched (the first `iced.len()` are valid).
    pub bytes: [u8; 15],
}

/// Executes one instruction with everything that belongs to its boundaries: pending debug exceptions, instruction
/// breakpoints, single step, RF, the interrupt shadow; delivers the exception if it raises one.
pub fn step(vp: &mut SoftVp) {
    let _ = vp;
}

/// Executes until [`crate::vp::attention`] has a bit other than CODE (which it handles and clears itself), the VP is
/// not [`partition::Activity::Running`] any more, or one instruction after it was entered with BOUNDARY set.
pub fn run(vp: &mut SoftVp) {
    step(vp);
}

/// Recomputes [`crate::vp::attention::BOUNDARY`] from TF, RF, shadows, pending debug exceptions and DR7. To be called
/// after changing any of them other than by executing instructions (loading a state).
pub fn update_boundary(vp: &mut SoftVp) {
    let _ = vp;
}
