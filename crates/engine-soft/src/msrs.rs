//! To be written.
pub struct MsrFile {}
