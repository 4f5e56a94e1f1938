//! Tests of the whole: random operations against a model, power cuts, hostile files.

mod hostile;
mod interop;
mod limits;
mod model;
mod ops;
mod powercut;
mod sim;

pub(crate) use fuzzing::Rng;
use std::path::PathBuf;

pub(crate) fn dir() -> (tempfile::TempDir, impl Fn(&str) -> PathBuf) {
    let d = tempfile::tempdir().expect("a temporary directory");
    let p = d.path().to_path_buf();
    (d, move |name: &str| p.join(name))
}
