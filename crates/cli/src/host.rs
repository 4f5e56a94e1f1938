//! `viridian host`: what this host offers.

use crate::StoreArgs;
use crate::failure::{Outcome, print_json};
use crate::table;
use clap::{Args as ClapArgs, Subcommand};
use serde::Serialize;
use x86::cpuid::CpuModel;

/// Arguments.
#[derive(ClapArgs)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    store: StoreArgs,
}

#[derive(Subcommand)]
enum Command {
    /// Engine, processor models, limits, and why KVM is or is not used
    Show {
        /// Answer in JSON
        #[arg(long)]
        json: bool,
    },
}

#[derive(Serialize)]
struct Host {
    version: &'static str,
    engine: &'static str,
    kvm: String,
    processor_models: Vec<ModelState>,
    default_processor_model: String,
    processors: usize,
    memory_bytes: Option<u64>,
    most_virtual_processors: u32,
    most_memory_bytes: u64,
    cgroup_v2: String,
    sandbox: Vec<String>,
    store: Option<String>,
    virtual_machines: Option<usize>,
}

#[derive(Serialize)]
struct ModelState {
    name: &'static str,
    /// `None`: it can be had.
    missing: Option<String>,
}

/// Carries the command out.
pub fn run(args: &Args) -> Outcome {
    let Command::Show { json } = args.command;
    let host = look(args);
    if json {
        return print_json(&host);
    }
    let models: Vec<String> = host
        .processor_models
        .iter()
        .map(|m| m.missing.as_ref().map_or_else(|| m.name.to_string(), |why| format!("{} (no: {why})", m.name)))
        .collect();
    let pair = |name: &str, value: String| (name.to_string(), value);
    let mut pairs = vec![
        pair("Version", host.version.into()),
        pair("Engine", host.engine.into()),
        pair("KVM", host.kvm),
        pair("Processor models", models.join(", ")),
        pair("Default model", host.default_processor_model),
        pair("Host processors", host.processors.to_string()),
        pair("Host memory", host.memory_bytes.map_or("unknown".into(), |b| format!("{} MiB", b >> 20))),
        pair("Most processors", format!("{} a VM", host.most_virtual_processors)),
        pair("Most memory", format!("{} GiB a VM", host.most_memory_bytes >> 30)),
        pair("Weight and cap", host.cgroup_v2),
        pair("Sandbox", host.sandbox.join(", ")),
    ];
    pairs.extend(host.store.map(|s| pair("Store", s)));
    pairs.extend(host.virtual_machines.map(|n| pair("VMs", n.to_string())));
    table::print_pairs(&pairs);
    Ok(())
}

fn look(args: &Args) -> Host {
    let (engine, kvm) = worker::engines::describe();
    let models = CpuModel::NAMES
        .iter()
        .map(|name| ModelState { name, missing: CpuModel::by_name(name).err().map(|e| e.to_string()) });
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total = meminfo.lines().find_map(|l| l.strip_prefix("MemTotal:"));
    let kib: Option<u64> = total.and_then(|t| t.split_whitespace().next()?.parse().ok());
    let store = args.store.open().ok();
    Host {
        version: env!("CARGO_PKG_VERSION"),
        engine,
        kvm,
        processor_models: models.collect(),
        default_processor_model: vmms::config::default_model(),
        processors: vmms::limits::available().len(),
        memory_bytes: kib.map(|k| k << 10),
        most_virtual_processors: partition::engine::MAX_VPS,
        most_memory_bytes: *machine::config::MEMORY_BYTES.end(),
        cgroup_v2: cgroup_in_words(),
        sandbox: kernel_abilities(),
        virtual_machines: store.as_ref().and_then(|s| s.list().ok()).map(|l| l.len()),
        store: store.map(|s| s.root().display().to_string()),
    }
}

fn cgroup_in_words() -> String {
    let root = std::path::Path::new(vmms::limits::CGROUPS);
    let Ok(controllers) = std::fs::read_to_string(root.join("cgroup.controllers")) else {
        return "not available: no cgroup v2 hierarchy is mounted at /sys/fs/cgroup".into();
    };
    if !controllers.split_whitespace().any(|c| c == "cpu") {
        return "not available: cgroup v2 has no controller for processors here".into();
    }
    let own = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let group = root.join(vmms::limits::own_group(&own).unwrap_or_default());
    let writable = |p: &std::path::Path| rustix::fs::access(p, rustix::fs::Access::WRITE_OK).is_ok();
    if writable(&group) || group.parent().is_some_and(writable) {
        "available (cgroup v2)".into()
    } else {
        format!("not available: {} is not yours to write (systemd-run --user --scope -p Delegate=yes)", group.display())
    }
}

/// What of the sandbox this kernel knows.
fn kernel_abilities() -> Vec<String> {
    let yes = |name: &str, there: bool| format!("{name}{}", if there { "" } else { " (missing)" });
    let namespaces = std::fs::read_to_string("/proc/sys/user/max_user_namespaces").unwrap_or_default();
    let lsm = std::fs::read_to_string("/sys/kernel/security/lsm");
    let mut abilities = vec![
        yes("seccomp", std::path::Path::new("/proc/sys/kernel/seccomp/actions_avail").exists()),
        yes("user namespaces", namespaces.trim().parse::<u64>().is_ok_and(|n| n > 0)),
    ];
    abilities.push(match lsm {
        Ok(list) => yes("Landlock", list.split(',').any(|l| l.trim() == "landlock")),
        Err(_) => "Landlock (unknown: securityfs is not mounted)".into(),
    });
    abilities
}
