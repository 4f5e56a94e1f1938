//! `cargo xtask`: demo, test, bench, guests.
#![forbid(unsafe_code)]
fn main() {}
