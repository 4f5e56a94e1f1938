//! The index: what listing shows of each VM, so that a thousand files need not be read for it.
//!
//! It is a cache and no more. An entry counts only as long as the file that it was made from is the same (size, time,
//! number on its file system); without an index, or with a damaged one, the files are read.

use crate::atomic;
use crate::config::VmConfig;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};
use uuid::Uuid;

/// Version of the file; another one is thrown away.
const VERSION: u32 = 1;
/// A file that was changed this short a time before it was read may be changed again without looking different.
const TOO_FRESH_NS: i128 = 100_000_000;

/// Which state of a file an entry was made from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stamp {
    size: u64,
    time: i128,
    number: u64,
}

impl Stamp {
    /// Of a file.
    pub fn of(metadata: &std::fs::Metadata) -> Self {
        let time = i128::from(metadata.mtime()) * 1_000_000_000 + i128::from(metadata.mtime_nsec());
        Self { size: metadata.len(), time, number: metadata.ino() }
    }

    fn is_fresh(&self) -> bool {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as i128);
        (now - self.time).abs() < TOO_FRESH_NS
    }
}

/// What a list shows of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Summary {
    /// Identity.
    pub id: Uuid,
    /// Name.
    pub name: String,
    /// Generation.
    pub generation: u32,
    /// Virtual processors.
    pub processors: u32,
    /// RAM in bytes.
    pub memory_bytes: u64,
}

impl Summary {
    /// Of a VM.
    pub fn of(config: &VmConfig) -> Self {
        Self {
            id: config.id,
            name: config.name.clone(),
            generation: config.generation,
            processors: config.processor.count,
            memory_bytes: config.memory.size.0,
        }
    }
}

#[derive(Serialize, Deserialize)]
struct Form {
    version: u32,
    vms: Vec<(Stamp, Summary)>,
}

/// The index in memory.
#[derive(Debug, Default)]
pub struct Index {
    entries: HashMap<Uuid, (Stamp, Summary)>,
    changed: bool,
}

impl Index {
    /// Reads it; a missing or damaged one is empty.
    pub fn read(path: &Path) -> Self {
        let form: Option<Form> = std::fs::read(path).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
        let vms = form.filter(|f| f.version == VERSION).map(|f| f.vms).unwrap_or_default();
        Self { entries: vms.into_iter().map(|(stamp, vm)| (vm.id, (stamp, vm))).collect(), changed: false }
    }

    /// The summary of a VM whose file has this stamp.
    pub fn get(&self, id: Uuid, stamp: Stamp) -> Option<&Summary> {
        self.entries.get(&id).filter(|(s, _)| *s == stamp).map(|(_, vm)| vm)
    }

    /// Notes a summary that was just made.
    pub fn put(&mut self, stamp: Stamp, summary: Summary) {
        if !stamp.is_fresh() {
            self.entries.insert(summary.id, (stamp, summary));
            self.changed = true;
        }
    }

    /// Forgets all but these.
    pub fn keep(&mut self, ids: &[Uuid]) {
        if self.entries.len() > ids.len() {
            let ids: std::collections::HashSet<_> = ids.iter().collect();
            self.entries.retain(|id, _| ids.contains(id));
            self.changed = true;
        }
    }

    /// Writes it if it has changed. A store that cannot be written has none, which costs time only.
    pub fn write(self, path: &Path) {
        if self.changed {
            let form = Form { version: VERSION, vms: self.entries.into_values().collect() };
            if let Ok(bytes) = serde_json::to_vec(&form) {
                let _ = atomic::write(path, &bytes, false);
            }
        }
    }
}
