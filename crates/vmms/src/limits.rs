//! The host's processors for a worker: its control group (cgroup v2), and which processors execute which VP.

use crate::config::{Affinity, AffinityRule, Processor};
use std::path::{Path, PathBuf};
use uuid::Uuid;

/// Where the one hierarchy of cgroup v2 is.
pub const CGROUPS: &str = "/sys/fs/cgroup";
/// `cpu.max` counts in periods of this many microseconds.
const PERIOD: u64 = 100_000;

/// The calling process's control group, as `/proc/self/cgroup` says it (the line of the v2 hierarchy).
pub fn own_group(text: &str) -> Option<&str> {
    text.lines().find_map(|line| line.strip_prefix("0::/"))
}

/// Moves the calling process into a control group of its own with the weight and cap of `processor`, below `root` (where
/// cgroup v2 is mounted). Nothing is done when neither is asked for.
///
/// # Errors
/// In words for people: what is missing on this host.
pub fn apply(root: &Path, own: Option<&str>, id: Uuid, processor: &Processor) -> Result<Option<PathBuf>, String> {
    let usual = Processor::default();
    if processor.weight == usual.weight && processor.cap == usual.cap {
        return Ok(None);
    }
    if !root.join("cgroup.controllers").is_file() {
        return Err(format!("there is no cgroup v2 hierarchy at {}", root.display()));
    }
    let own = own.ok_or("this process is in no cgroup v2 group")?;
    let group = root.join(own);
    // A group that has processes may have no groups below it with controllers, so a sibling is tried first.
    let parents = [group.parent().filter(|p| p.starts_with(root)).map(Path::to_path_buf), Some(group.clone())];
    let mut reasons = Vec::new();
    for parent in parents.into_iter().flatten() {
        match below(&parent, id, processor) {
            Ok(path) => return Ok(Some(path)),
            Err(why) => reasons.push(why),
        }
    }
    Err(reasons.join("; "))
}

fn below(parent: &Path, id: Uuid, processor: &Processor) -> Result<PathBuf, String> {
    let enabled = parent.join("cgroup.subtree_control");
    let has_cpu = |text: &str| text.split_whitespace().any(|c| c == "cpu");
    if !std::fs::read_to_string(&enabled).is_ok_and(|t| has_cpu(&t)) {
        std::fs::write(&enabled, "+cpu").map_err(|e| format!("{}: {e}", enabled.display()))?;
        if !std::fs::read_to_string(&enabled).is_ok_and(|t| has_cpu(&t)) {
            return Err(format!("{}: no controller for processors there", parent.display()));
        }
    }
    let group = parent.join(name_of(id));
    match std::fs::create_dir(&group) {
        Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => return Err(format!("{}: {e}", group.display())),
        _ => {}
    }
    let put = |name: &str, value: String| {
        let path = group.join(name);
        std::fs::write(&path, value).map_err(|e| format!("{}: {e}", path.display()))
    };
    let filled = put("cpu.weight", processor.weight.to_string())
        .and_then(|()| put("cpu.max", quota(processor)))
        .and_then(|()| put("cgroup.procs", std::process::id().to_string()));
    if filled.is_err() {
        let _ = std::fs::remove_dir(&group);
    }
    filled.map(|()| group)
}

/// The value of `cpu.max`.
fn quota(processor: &Processor) -> String {
    match processor.cap {
        100 => format!("max {PERIOD}"),
        cap => format!("{} {PERIOD}", PERIOD * u64::from(cap) * u64::from(processor.count) / 100),
    }
}

/// Removes the group of the VM's worker, which has ended. `false`: it is still there, as it stays while a process is in it.
/// (What is not named as such a group is left alone, whatever a file says.)
pub fn remove(group: &Path, id: Uuid) -> bool {
    let named = group.file_name().is_some_and(|name| name == name_of(id).as_str());
    let gone = |e: std::io::Error| e.kind() == std::io::ErrorKind::NotFound;
    !named || std::fs::remove_dir(group).map_or_else(gone, |()| true)
}

fn name_of(id: Uuid) -> String {
    format!("viridian-{id}")
}

/// The host's processors for the VPs: VP `i` has the `i`-th, in turn. Empty where the scheduler chooses. `available` are
/// those that this process may use.
///
/// # Errors
/// When a processor is asked for that may not be used.
pub fn affinity(processor: &Processor, id: Uuid, available: &[usize]) -> Result<Vec<usize>, String> {
    match &processor.affinity {
        Affinity::Rule(AffinityRule::None) => Ok(Vec::new()),
        Affinity::Rule(AffinityRule::OneCorePerVp) if available.is_empty() => Ok(Vec::new()),
        // VMs begin at different processors, so that they do not all crowd on the first.
        Affinity::Rule(AffinityRule::OneCorePerVp) => {
            let first = id.as_u128() as usize % available.len();
            Ok((0..available.len()).map(|i| available[(first + i) % available.len()]).collect())
        }
        Affinity::Processors(list) => match list.iter().find(|n| !available.contains(n)) {
            Some(n) => Err(format!("the host's processor {n} may not be used here; there are {available:?}")),
            None => Ok(list.clone()),
        },
    }
}

/// The host's processors that this process may use.
pub fn available() -> Vec<usize> {
    rustix::thread::sched_getaffinity(None)
        .map(|set| (0..1024).filter(|n| set.is_set(*n)).collect())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder that looks like a cgroup v2 hierarchy: files are there when they are written.
    fn hierarchy(controllers: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("cgroup.controllers"), controllers).unwrap();
        std::fs::create_dir_all(dir.path().join("user/session")).unwrap();
        std::fs::write(dir.path().join("user/cgroup.subtree_control"), controllers).unwrap();
        dir
    }

    #[test]
    fn weight_and_cap() {
        let dir = hierarchy("cpu memory");
        let id = Uuid::new_v4();
        let own = own_group("1:name=systemd:/x\n0::/user/session\n");
        assert_eq!(own, Some("user/session"));
        let processor = Processor { count: 2, weight: 50, cap: 25, ..Processor::default() };
        let group = apply(dir.path(), own, id, &processor).unwrap().unwrap();
        assert_eq!(group, dir.path().join(format!("user/viridian-{id}")));
        let read = |name: &str| std::fs::read_to_string(group.join(name)).unwrap();
        assert_eq!((read("cpu.weight"), read("cpu.max")), ("50".into(), "50000 100000".into()));
        assert_eq!(read("cgroup.procs"), std::process::id().to_string());
        // The files of a real hierarchy do not keep a folder from being removed.
        assert!(!remove(&group, id), "something is in it");
        assert!(remove(&group, Uuid::new_v4()) && group.exists(), "another VM's group");
        std::fs::remove_dir_all(&group).unwrap();
        std::fs::create_dir(&group).unwrap();
        assert!(remove(&group, id) && !group.exists());
        assert!(remove(&group, id), "it is gone");
        let only_weight = Processor { weight: 200, ..Processor::default() };
        assert!(quota(&only_weight).starts_with("max "));
    }

    #[test]
    fn what_a_host_has_not() {
        let dir = tempfile::tempdir().unwrap();
        let capped = Processor { cap: 50, ..Processor::default() };
        let id = Uuid::new_v4();
        assert!(apply(dir.path(), Some("a"), id, &capped).unwrap_err().contains("no cgroup v2"));
        assert_eq!(apply(dir.path(), Some("a"), id, &Processor::default()), Ok(None), "nothing was asked for");
        let dir = hierarchy("memory");
        assert!(apply(dir.path(), own_group("0::/user/session"), id, &capped).is_err());
    }

    #[test]
    fn one_core_per_vp() {
        let rule = |affinity| Processor { affinity, ..Processor::default() };
        let one = rule(Affinity::Rule(AffinityRule::OneCorePerVp));
        let list = affinity(&one, Uuid::from_u128(5), &[2, 4, 6]).unwrap();
        assert_eq!(list, [6, 2, 4]);
        assert_eq!(affinity(&rule(Affinity::Processors(vec![4, 2])), Uuid::nil(), &[2, 4]), Ok(vec![4, 2]));
        assert!(affinity(&rule(Affinity::Processors(vec![9])), Uuid::nil(), &[2, 4]).is_err());
        assert_eq!(affinity(&Processor::default(), Uuid::nil(), &[2, 4]), Ok(vec![]));
    }
}
