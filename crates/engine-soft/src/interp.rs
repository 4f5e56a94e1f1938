//! The interpreter: decoded instructions, operands, dispatch, and the general-purpose instructions (in submodules).
//!
//! An instruction is decoded once into an [`Insn`] (kept in [`crate::code::DecodeCache`] by physical page) whose handler
//! is called with the VP and the `Insn`. Rules for handlers:
//! * `vp.s.next_rip` already holds the address behind the instruction; branches overwrite it (after their checks).
//! * A handler that returns `Err` has changed nothing that the architecture does not say is changed: it checks and reads
//!   everything first, and writes registers last. Memory is written before registers.
//! * RIP-relative operands use `next_rip`'s decoded value (iced gives the absolute displacement at decode time; decoded
//!   instructions are keyed by physical page, so it is stored relative to the instruction instead).

use crate::vp::{Exec, SoftVp};
use iced_x86::Instruction;

/// Executes one decoded instruction.
pub type Handler = fn(&mut SoftVp, &Insn) -> Exec;

/// A decoded instruction.
#[derive(Clone, Copy)]
pub struct Insn {
    /// What to call.
    pub handler: Handler,
    /// As decoded, at a made-up IP equal to its offset in the page.
    pub iced: Instruction,
    /// Bytes as fetched (the first `iced.len()` are valid).
    pub bytes: [u8; 15],
}
