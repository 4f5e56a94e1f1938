//! # console: what a person sees and types
//!
//! * [`picture`]: the linear frame buffer as a PNG;
//! * [`keys`]: text and names of keys as the scan codes of a PC keyboard.
//!
//! Pure functions. It may use: `flate2`. It must never know: machines, devices, sockets.
#![forbid(unsafe_code)]

pub mod keys;
pub mod picture;
