//! What is done to whole images: making, looking, checking, changing their form.

pub mod bench;
pub mod check;
pub mod convert;
pub(crate) mod copy;
pub mod create;
pub mod merge;
pub(crate) mod replace;
pub mod resize;

/// Told how far a long operation is: bytes done of bytes in all. Returning false cancels it.
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64) -> bool;
