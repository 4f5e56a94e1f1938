//! To be written.
/// Set pointers.
#[repr(C)]
#[derive(Default)]
pub struct TlbPointers { }
/// The MMU.
pub struct Mmu { }
