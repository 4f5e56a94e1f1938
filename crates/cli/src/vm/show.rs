//! `viridian vm list`, `show` and `events`.

use super::{set, storage};
use crate::failure::{Failure, Outcome, print_json};
use crate::table;
use clap::Args as ClapArgs;
use serde_json::json;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use vmms::lifecycle::Status;
use vmms::store::Entry;
use vmms::{Store, size};

/// How long a worker may take to answer.
const PATIENCE: Duration = Duration::from_secs(2);
/// Workers that are asked at the same time.
const AT_ONCE: usize = 16;

/// Arguments of `list`.
#[derive(ClapArgs)]
pub struct ListArgs {
    /// Answer in JSON
    #[arg(long)]
    json: bool,
}

/// The states of all VMs. Those without a worker cost a look at their folder; the others are asked, several at once.
fn statuses(entries: &[Entry]) -> Vec<Status> {
    let running = entries.iter().filter(|e| vmms::record::Record::read(&e.vm).is_some()).count();
    if running < 2 {
        return entries.iter().map(|e| e.vm.status(PATIENCE)).collect();
    }
    let next = AtomicUsize::new(0);
    let found = Mutex::new(entries.iter().map(|_| None).collect::<Vec<_>>());
    std::thread::scope(|scope| {
        for _ in 0..running.min(AT_ONCE) {
            scope.spawn(|| {
                loop {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    let Some(entry) = entries.get(at) else { return };
                    let status = entry.vm.status(PATIENCE);
                    found.lock().unwrap_or_else(|e| e.into_inner())[at] = Some(status);
                }
            });
        }
    });
    let found = found.into_inner().unwrap_or_else(|e| e.into_inner());
    found.into_iter().zip(entries).map(|(status, e)| status.unwrap_or_else(|| e.vm.status(PATIENCE))).collect()
}

/// `vm list`.
pub fn list(store: &Store, args: &ListArgs) -> Outcome {
    let entries = store.list()?;
    let statuses = statuses(&entries);
    let (mut rows, mut values, mut damaged) = (Vec::new(), Vec::new(), Vec::new());
    for (entry, status) in entries.iter().zip(&statuses) {
        let machine = status.machine.as_ref();
        match &entry.summary {
            Ok(s) => {
                rows.push(vec![
                    s.name.clone(),
                    status.state.to_string(),
                    s.processors.to_string(),
                    size::show(s.memory_bytes),
                    machine.map_or_else(String::new, |m| table::duration(m.uptime_seconds)),
                    s.generation.to_string(),
                    s.id.to_string(),
                ]);
                values.push(json!({
                    "id": s.id, "name": s.name, "generation": s.generation, "processors": s.processors,
                    "memory_bytes": s.memory_bytes, "state": status.state, "trouble": status.trouble,
                    "pid": status.record.as_ref().map(|r| r.pid),
                    "uptime_seconds": machine.map(|m| m.uptime_seconds),
                }));
            }
            Err(error) => {
                damaged.push(error.to_string());
                values.push(json!({ "id": entry.vm.id(), "error": error.to_string(), "state": status.state }));
            }
        }
        if let Some(trouble) = &status.trouble {
            let name = entry.summary.as_ref().map_or_else(|_| entry.vm.id().to_string(), |s| s.name.clone());
            eprintln!("note: '{name}': {trouble}");
        }
    }
    if args.json {
        print_json(&values)?;
    } else if rows.is_empty() && damaged.is_empty() {
        println!("There are no VMs in {}; `viridian vm new` makes one.", store.root().display());
    } else {
        table::print(&["NAME", "STATE", "CPUS", "MEMORY", "UPTIME", "GEN", "ID"], &rows, 0);
    }
    for error in &damaged {
        eprintln!("error: {error}");
    }
    match damaged.len() {
        0 => Ok(()),
        n => Err(Failure::usage(format!("{n} of {} VMs cannot be read", entries.len()))),
    }
}

/// Arguments of `show`.
#[derive(ClapArgs)]
pub struct ShowArgs {
    /// The VM
    name: String,
    /// Answer in JSON
    #[arg(long)]
    json: bool,
}

/// `vm show`.
pub fn show(store: &Store, args: &ShowArgs) -> Outcome {
    let vm = store.find(&args.name)?;
    let config = vm.load()?;
    let status = vm.status(Duration::from_secs(5));
    let guest = status.machine.as_ref().filter(|m| m.hyperv).and_then(|_| vm.client().guest().ok());
    if args.json {
        let mut value = set::described(&vm)?;
        if let Some(fields) = value.as_object_mut() {
            fields.insert("state".into(), json!(status.state));
            fields.insert("trouble".into(), json!(status.trouble));
            fields.insert("worker".into(), json!(status.record));
            fields.insert("machine".into(), json!(status.machine));
            fields.insert("guest".into(), json!(guest));
        }
        return print_json(&value);
    }
    let mut pairs: Vec<(String, String)> = Vec::new();
    let mut pair = |name: &str, value: String| pairs.push((name.into(), value));
    pair("Name", config.name.clone());
    pair("ID", config.id.to_string());
    pair("State", status.state.to_string());
    if let Some(trouble) = &status.trouble {
        pair("Trouble", trouble.clone());
    }
    if let Some(m) = &status.machine {
        pair("Uptime", table::duration(m.uptime_seconds));
        pair("Engine", m.engine.clone());
        pair("Processor time", table::duration(m.processor_seconds));
        pair("Confined by", m.sandbox.applied.join(", "));
        if !m.sandbox.missing.is_empty() {
            pair("Not confined by", m.sandbox.missing.join("; "));
        }
    }
    if let Some(record) = &status.record {
        pair("Worker", format!("process {}, since {}", record.pid, record.since));
        if !record.unlimited.is_empty() {
            pair("Not in force", record.unlimited.join("; "));
        }
    }
    if let Some(g) = &guest {
        pair("Heartbeat", g.heartbeat.name().into());
        let services =
            [("shutdown", g.shutdown), ("data exchange", g.kvp), ("backup", g.vss), ("file copy", g.file_copy)];
        let names: Vec<&str> = services.iter().filter(|(_, on)| *on).map(|(name, _)| *name).collect();
        pair("Guest services", if names.is_empty() { "none connected".into() } else { names.join(", ") });
    }
    pair("Generation", config.generation.to_string());
    if let Some(kernel) = &config.kernel {
        pair("Kernel", kernel.image.display().to_string());
        if let Some(initrd) = &kernel.initrd {
            pair("Initial RAM disk", initrd.display().to_string());
        }
        pair("Command line", kernel.command_line.clone());
    }
    pairs.extend(set::processor_pairs(&config));
    pairs.extend(set::memory_pairs(&config));
    pairs.extend(set::firmware_pairs(&vm, &config));
    for disk in &config.disks {
        let what = disk.image.display().to_string() + &storage::limits_text(&disk.limits);
        pairs.push((format!("Disk {}:{}", disk.controller, disk.lun), what));
    }
    for drive in &config.drives {
        let disc = drive.image.as_ref().map_or("(empty)".into(), |i| i.display().to_string());
        pairs.push((format!("DVD {}:{}", drive.controller, drive.lun), disc));
    }
    let mut pair = |name: &str, value: String| pairs.push((name.into(), value));
    if !config.notes.is_empty() {
        pair("Notes", config.notes.clone());
    }
    pair("Created", config.created.clone());
    pair("Folder", vm.folder().display().to_string());
    table::print_pairs(&pairs);
    Ok(())
}

/// Arguments of `events`.
#[derive(ClapArgs)]
pub struct EventArgs {
    /// The VM
    name: String,
    /// The last events only
    #[arg(long, value_name = "N")]
    last: Option<usize>,
    /// Answer in JSON
    #[arg(long)]
    json: bool,
}

/// `vm events`.
pub fn events(store: &Store, args: &EventArgs) -> Outcome {
    let vm = store.find(&args.name)?;
    // Notices what has happened to its worker.
    let _ = vm.status(PATIENCE);
    let (events, bad) = vm.events().read()?;
    let events = &events[events.len().saturating_sub(args.last.unwrap_or(usize::MAX))..];
    if args.json {
        return print_json(&events);
    }
    let row = |e: &vmms::events::Event| {
        vec![e.time.clone(), e.event.clone(), e.message.lines().next().unwrap_or("").to_string()]
    };
    table::print(&["TIME", "EVENT", "MESSAGE"], &events.iter().map(row).collect::<Vec<_>>(), 2);
    if bad > 0 {
        eprintln!("note: {bad} lines of the log cannot be read");
    }
    Ok(())
}
