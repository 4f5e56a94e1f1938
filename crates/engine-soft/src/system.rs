//! To be written.
use crate::interp::Handler;

/// The handler of an instruction that this module executes.
pub fn handler(_i: &iced_x86::Instruction) -> Option<Handler> {
    None
}
use crate::vp::{Exec, SoftVp};
impl SoftVp {
    /// Is the model's vendor AMD (or Hygon)?
    pub fn vendor_is_amd(&self) -> bool {
        true
    }
    /// May the program access `size` bytes of I/O ports at `port` (IOPL, TSS bitmap)? #GP(0) if not.
    pub fn check_io(&mut self, _port: u16, _size: usize) -> Exec {
        Ok(())
    }
}
