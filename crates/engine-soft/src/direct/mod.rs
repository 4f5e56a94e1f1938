//! Direct execution: 64-bit user code of the guest, executed by the host's processor in user mode as it is.

pub mod process;
pub mod screen;
