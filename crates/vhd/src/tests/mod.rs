//! Tests of the whole: random operations against a model, power cuts, hostile files.

mod hostile;
mod interop;
mod limits;
mod model;
mod ops;
mod powercut;
mod sim;

use std::path::PathBuf;

/// xorshift64*: enough for tests, and a failure names its seed.
pub(crate) struct Rng(pub u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    pub fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 11) % n
    }
    pub fn fill(&mut self, buf: &mut [u8]) {
        for c in buf.chunks_mut(8) {
            let v = self.next().to_le_bytes();
            c.copy_from_slice(&v[..c.len()]);
        }
    }
}

pub(crate) fn dir() -> (tempfile::TempDir, impl Fn(&str) -> PathBuf) {
    let d = tempfile::tempdir().expect("a temporary directory");
    let p = d.path().to_path_buf();
    (d, move |name: &str| p.join(name))
}
