//! On-disk structures exactly as their specifications give them: plain types, size assertions, no logic.

pub mod vhd;
pub mod vhdx;
