//! Landlock: the files that may be opened, and no others. Files that are open already, or are handed over, stay usable.

use super::Files;
use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetStatus, Scope,
};
use std::path::Path;

/// What the runtime library and the machine read of the host.
const OF_THE_HOST: &[&str] =
    &["/proc/self", "/proc/meminfo", "/proc/cpuinfo", "/proc/sys/vm/overcommit_memory", "/sys/devices/system/cpu"];

pub fn restrict(files: &Files) -> Result<(), String> {
    let abi = ABI::V6;
    let text = |e: landlock::RulesetError| e.to_string();
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(abi))
        .and_then(|r| r.handle_access(AccessNet::from_all(abi)))
        .and_then(|r| r.scope(Scope::from_all(abi)))
        .and_then(Ruleset::create)
        .map_err(text)?;
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let write = read | AccessFs::WriteFile | AccessFs::Truncate | AccessFs::MakeReg | AccessFs::RemoveFile;
    let device = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::IoctlDev;
    let of_the_host = OF_THE_HOST.iter().map(|p| (Path::new(*p), read));
    let own = files.read.iter().map(|p| (p.as_path(), read)).chain(files.write.iter().map(|p| (p.as_path(), write)));
    let replace = AccessFs::MakeReg | AccessFs::RemoveFile | AccessFs::WriteFile | AccessFs::Truncate;
    let sockets = AccessFs::MakeSock | AccessFs::RemoveFile;
    // Opening a folder is reading it: so that a rename in it can be made durable.
    let replaced = files.replace.iter().map(|p| (p.as_path(), replace | AccessFs::ReadDir));
    let plugged = files.sockets.iter().map(|p| (p.as_path(), sockets));
    let own = own.chain(replaced).chain(plugged);
    for (path, access) in of_the_host.chain(own).chain([(Path::new("/dev/kvm"), device)]) {
        // A file that is not there is somebody else's error, reported where it is opened.
        let (Ok(file), Ok(metadata)) = (PathFd::new(path), path.metadata()) else { continue };
        let access: BitFlags<AccessFs> = if metadata.is_dir() { access } else { access & AccessFs::from_file(abi) };
        rules = rules.add_rule(PathBeneath::new(file, access)).map_err(text)?;
    }
    let status = rules.restrict_self().map_err(text)?;
    match status.ruleset {
        RulesetStatus::FullyEnforced => Ok(()),
        RulesetStatus::PartiallyEnforced => {
            tracing::info!("this kernel's Landlock is older than what is asked of it; what it knows is in force");
            Ok(())
        }
        RulesetStatus::NotEnforced => {
            Err("this kernel has no Landlock, or it is off (lsm= on its command line)".into())
        }
    }
}
