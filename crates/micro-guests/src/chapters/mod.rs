//! The micro-guests, one module a chapter of the manual.

pub mod control;
pub mod debug;
pub mod legacy;
pub mod paging;
pub mod self_modifying;
pub mod strings;
pub mod system;

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use partition::Engine;

/// A micro-guest: panics with a message if the engine did not do what the manual says.
pub type MicroGuest = fn(&dyn Engine);

/// Every micro-guest by name.
pub fn all() -> Vec<(&'static str, MicroGuest)> {
    [paging::ALL, control::ALL, legacy::ALL, debug::ALL, self_modifying::ALL, strings::ALL, system::ALL].concat()
}

/// Reports EAX.
pub(crate) fn report(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.out(u32::from(crate::RESULT_PORT), eax)
}

/// Ends the guest.
pub(crate) fn finish(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut here = a.create_label();
    a.out(u32::from(crate::EXIT_PORT), al)?;
    // The kick may be seen a little later.
    a.set_label(&mut here)?;
    a.jmp(here)
}

/// 64-bit code: the next fault goes on at `label`.
pub(crate) fn resume_at(a: &mut CodeAssembler, label: CodeLabel) -> Result<(), IcedError> {
    a.lea(rax, ptr(label))?;
    a.mov(qword_ptr(crate::layout::RESUME), rax)
}
