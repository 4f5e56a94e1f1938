//! To be written.
pub struct DecodeCache {}
