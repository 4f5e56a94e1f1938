//! To be written.
pub struct SoftPartition {}
