//! Which worker runs a VM, and what became of it.
//!
//! Two files in the VM's folder say it. `worker.lock` is locked by the worker for as long as it lives, so that the kernel
//! itself knows whether it does, whatever process ids say. `worker.json` says who it is; the worker removes it at its
//! end. A record without a lock is of a worker that has died, or of another boot of the host.

use crate::atomic;
use crate::error::Result;
use crate::vm::Vm;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// A worker.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Process id; 0 before the worker has written it.
    pub pid: u32,
    /// When the process started, in ticks since the host's boot (`/proc/PID/stat`, field 22): a process with the same id
    /// and another start is a stranger.
    pub start_ticks: u64,
    /// Which boot of the host.
    pub boot_id: String,
    /// When it was started, RFC 3339.
    pub since: String,
    /// Its control group.
    pub cgroup: Option<PathBuf>,
    /// What limits could not be applied.
    pub unlimited: Vec<String>,
}

/// The host's boot.
pub fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").map(|s| s.trim().to_owned()).unwrap_or_default()
}

/// When a process started, in ticks since boot; `None` if there is none, or it is a corpse.
pub fn start_ticks(pid: u32) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything, spaces and parentheses too.
    let mut fields = text.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?;
    if matches!(state, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

impl Record {
    /// Of a worker that is to be started.
    pub fn begin() -> Self {
        Self { boot_id: boot_id(), since: crate::time::now(), ..Self::default() }
    }

    /// The record of a VM, if it has one. One that cannot be read says nothing, but that there was a worker.
    pub fn read(vm: &Vm) -> Option<Self> {
        let bytes = std::fs::read(vm.record_path()).ok()?;
        Some(serde_json::from_slice(&bytes).unwrap_or_default())
    }

    /// Writes it.
    pub fn write(&self, vm: &Vm) -> Result<()> {
        let bytes = serde_json::to_vec(self).unwrap_or_default();
        atomic::write(&vm.record_path(), &bytes, false)
    }

    /// Is the process that this says still there?
    pub fn is_alive(&self) -> bool {
        self.pid != 0 && self.boot_id == boot_id() && start_ticks(self.pid) == Some(self.start_ticks)
    }

    /// What became of a worker that is no longer there.
    pub fn obituary(&self) -> (&'static str, String) {
        let who = if self.pid == 0 { "the worker".to_owned() } else { format!("the worker (process {})", self.pid) };
        if self.boot_id.is_empty() || self.boot_id == boot_id() {
            ("worker-died", format!("{who} died without saying why: it was killed, or it failed (see worker.log)"))
        } else {
            ("host-restarted", format!("the host was restarted while {who} ran"))
        }
    }
}
