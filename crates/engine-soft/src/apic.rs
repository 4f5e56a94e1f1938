//! To be written.
pub struct Lapic {}
