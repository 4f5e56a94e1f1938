//! To be written.
use crate::interp::Handler;

/// The handler of an instruction that this module executes.
pub fn handler(_i: &iced_x86::Instruction) -> Option<Handler> {
    None
}
