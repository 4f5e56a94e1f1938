//! What a worker gives up before guest code runs.
//!
//! A guest that broke out of its machine would have the worker's rights. So the worker keeps few:
//!
//! 1. [`confine`], while the process has one thread: no new privileges, no core dumps, few descriptors, namespaces of its
//!    own (user, network, IPC, host name), no capabilities, and (Landlock) only its own files;
//! 2. [`filter`], when everything is prepared and before the guest's first instruction: the system calls of an
//!    allow-list for all threads; then [`filter_vp`] on each VP's thread, a much shorter list, and [`filter_writer`] on
//!    the thread that writes the firmware's variables for them.
//!
//! What the host refuses is not silently left out: both say what is in force and what is missing.

mod calls;
mod files;
mod namespaces;

use crate::control::schema::Sandbox;
use rustix::process::{Resource, Rlimit, setrlimit};
use std::path::PathBuf;

/// The files that a worker may open.
#[derive(Clone, Debug, Default)]
pub struct Files {
    /// For reading.
    pub read: Vec<PathBuf>,
    /// For reading and writing; of a folder, everything in it, with creating, renaming and removing.
    pub write: Vec<PathBuf>,
    /// Folders in which files are written anew and renamed, but not read.
    pub replace: Vec<PathBuf>,
    /// Folders in which sockets are made and removed.
    pub sockets: Vec<PathBuf>,
}

/// Descriptors that a worker may have: disks of long chains, clients, event descriptors of channels.
const MOST_DESCRIPTORS: u64 = 4096;

/// Notes a measure.
fn note(report: &mut Sandbox, what: &str, result: Result<(), String>) {
    match result {
        Ok(()) => report.applied.push(what.into()),
        Err(why) => report.missing.push(format!("{what}: {why}")),
    }
}

/// First step. The process must have only one thread.
pub fn confine(files: &Files) -> Sandbox {
    let mut report = Sandbox::default();
    let text = |e: rustix::io::Errno| e.to_string();
    note(&mut report, "no-new-privileges", rustix::thread::set_no_new_privs(true).map_err(text));
    let limit = |resource, value: u64| {
        let hard = rustix::process::getrlimit(resource).maximum.map_or(value, |m| m.min(value));
        setrlimit(resource, Rlimit { current: Some(hard), maximum: Some(hard) }).map_err(text)
    };
    let limits = limit(Resource::Core, 0).and_then(|()| limit(Resource::Nofile, MOST_DESCRIPTORS));
    note(&mut report, "resource-limits", limits);
    namespaces::leave(&mut report);
    note(&mut report, "landlock", files::restrict(files));
    report
}

/// Second step, for all threads. Afterwards only what [`filter_vp`] takes away changes. `processes`: the engine has VPs
/// that execute guest code in processes of their own, which exist already.
pub fn filter(report: &mut Sandbox, processes: bool) {
    note(report, "seccomp", calls::restrict_process(processes));
}

/// Second step for the thread of a VP; `processes` as for [`filter`].
///
/// # Errors
/// When the host refuses.
pub fn filter_vp(processes: bool) -> Result<(), String> {
    calls::restrict_vp(processes)
}

/// Second step for the thread that replaces files for VPs, after [`filter`].
///
/// # Errors
/// When the host refuses.
pub fn filter_writer() -> Result<(), String> {
    calls::restrict_writer()
}
