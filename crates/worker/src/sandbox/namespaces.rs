//! Namespaces of the worker's own, and no capabilities.

use super::note;
use crate::control::schema::Sandbox;
use nix::sched::{CloneFlags, unshare};
use rustix::thread::{CapabilitySet, CapabilitySets};

/// Leaves the host's namespaces. In a user namespace of its own a process has nobody else's rights, not even root's: the
/// user that it is stays the only one that its namespace knows.
pub fn leave(report: &mut Sandbox) {
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    // No network but what is handed over, no IPC objects, no host name.
    let others = CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS;
    let result = unshare(CloneFlags::CLONE_NEWUSER | others).map_err(|e| e.to_string()).and_then(|()| {
        // Identity first: without a mapping the process would be nobody, and own none of its files.
        let write = |file: &str, text: String| {
            std::fs::write(format!("/proc/self/{file}"), text).map_err(|e| format!("{file}: {e}"))
        };
        write("uid_map", format!("{uid} {uid} 1"))?;
        write("setgroups", "deny".into())?;
        write("gid_map", format!("{gid} {gid} 1"))
    });
    note(report, "user-namespace", result);
    let none = CapabilitySet::empty();
    let sets = CapabilitySets { effective: none, permitted: none, inheritable: none };
    note(report, "no-capabilities", rustix::thread::set_capabilities(None, sets).map_err(|e| e.to_string()));
}
