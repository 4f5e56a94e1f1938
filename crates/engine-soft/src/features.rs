//! To be written.
pub struct Features {}
