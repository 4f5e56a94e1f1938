//! `cargo xtask demo`: from nothing to a generation 2 Debian with Secure Boot, as a person would do it with the command
//! line.

use crate::guests::Guests;
use crate::session::{Event, Session};
use crate::vm::build_viridian;
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

/// The VM's name.
const NAME: &str = "demo";
/// The disk that it boots from.
const DISK: &str = "debian-12-disk";
/// How long a stage of the boot may take.
const LIMIT: Duration = Duration::from_secs(180);
/// What is typed at the guest's shell, and what its answer ends with.
const COMMAND: &str = "uname -srm; nproc; grep MemTotal /proc/meminfo; dmesg | grep secureboot; cut -d. -f1 /proc/uptime; echo answer-$((6 * 7))\n";
const LAST_OF_ANSWER: &str = "answer-42";

/// Stages of the boot: what each is called, and what shows on the serial line when it ends.
const STAGES: &[(&str, &[&str])] = &[
    ("shim", &["Welcome to GRUB!"]),
    ("GRUB", &["EFI stub:", "Linux version"]),
    ("kernel", &["Run /init as init process", "systemd[1]:"]),
    ("user space", &["login: root", "debian-12:~#"]),
];

/// The command line under a store of the demo's own.
struct Viridian {
    binary: PathBuf,
    store: PathBuf,
}

impl Viridian {
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.binary);
        command.args(arguments).arg("--store").arg(&self.store).stdin(Stdio::null());
        command
    }

    /// Shows a command as it would be typed, runs it, and takes what it prints.
    fn run(&self, arguments: &[&str]) -> Result<String> {
        println!("$ viridian {}", arguments.join(" "));
        self.quietly(arguments)
    }

    fn quietly(&self, arguments: &[&str]) -> Result<String> {
        let output = self.command(arguments).output().context("cannot run viridian")?;
        if !output.status.success() {
            bail!("viridian {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn json(&self, arguments: &[&str]) -> Result<Value> {
        serde_json::from_str(&self.quietly(arguments)?).context("viridian's JSON cannot be read")
    }
}

/// Runs the demo. With `keep`, the VM runs on.
///
/// # Errors
/// When something cannot be built or fetched, or the guest does not do what it should.
pub fn run(engine: &str, keep: bool) -> Result<ExitCode> {
    let begun = Instant::now();
    println!("Building viridian ...");
    let binary = build_viridian(false)?;
    println!("Fetching packages and making the Debian disk (only what is not there yet) ...");
    let guests = Guests::locate();
    guests.ensure(&[DISK])?;
    let store = crate::workspace_root().join("target/demo");
    let viridian = Viridian { binary, store };
    println!("Ready after {:.1} s.\n", begun.elapsed().as_secs_f64());
    let result = show(&viridian, &guests, engine, keep);
    if result.is_err() {
        // Nothing of a demo that failed runs on; what is left says why.
        let _ = viridian.quietly(&["vm", "stop", NAME, "--turn-off"]);
    }
    result?;
    println!("\nThe whole took {:.1} s.", begun.elapsed().as_secs_f64());
    Ok(ExitCode::SUCCESS)
}

fn show(viridian: &Viridian, guests: &Guests, engine: &str, keep: bool) -> Result<()> {
    remove_last(viridian)?;
    // The guest writes into an image of its own over the one that was made.
    let disk = viridian.store.join("demo.vhdx");
    let _ = std::fs::remove_file(&disk);
    std::fs::create_dir_all(&viridian.store)?;
    let (image, disk_text) = (guests.image(DISK).display().to_string(), disk.display().to_string());
    println!("$ viridian vhd new {disk_text} --parent {image}");
    let made = Command::new(&viridian.binary).args(["vhd", "new", &disk_text, "--parent", &image]).status()?;
    ensure!(made.success(), "viridian vhd new ended with {made}");
    viridian.run(&[
        "vm",
        "new",
        NAME,
        "--disk",
        &disk_text,
        "--processors",
        "2",
        "--memory",
        "1G",
        "--secure-boot",
        "on",
        "--engine",
        engine,
    ])?;
    let started = Instant::now();
    viridian.run(&["vm", "start", NAME])?;
    println!("\n      from      time");
    let mut console = Session::start(viridian.command(&["vm", "connect", NAME]), None, true)?;
    let mut keyboard = console.input().context("the console takes input")?;
    timeline(viridian, &mut console, started)?;

    println!("\n$ viridian guest {NAME} status");
    let status = heartbeat(viridian)?;
    for key in ["heartbeat", "vmbus", "shutdown", "kvp", "vss", "file_copy"] {
        println!("  {key:10} {}", status[key].to_string().trim_matches('"'));
    }
    println!("$ viridian guest {NAME} kvp");
    for pair in facts(viridian)? {
        println!("  {:28} {}", pair.0, pair.1);
    }
    println!("\nTyped into the serial console: {}", COMMAND.trim());
    let before = console.text().len();
    keyboard.write_all(COMMAND.as_bytes()).context("the console is gone")?;
    let event = console.wait_for(LIMIT, |text| text[before..].lines().any(|l| l.trim() == LAST_OF_ANSWER))?;
    ensure!(event == Event::Seen, "the guest's shell did not answer within {} s", LIMIT.as_secs());
    // The shell has echoed the line, perhaps more than once: the answer follows the last.
    let lines: Vec<&str> = console.text()[before..].lines().map(str::trim).collect();
    let echo = lines.iter().rposition(|l| l.contains("$((6 * 7))")).map_or(0, |at| at + 1);
    for line in lines[echo..].iter().take_while(|l| **l != LAST_OF_ANSWER) {
        println!("  {}", without_escapes(line));
    }
    println!();
    if keep {
        console.kill();
        println!("'{NAME}' runs on. Go on by hand:");
    } else {
        let stopping = Instant::now();
        viridian.run(&["vm", "stop", NAME])?;
        println!("  shut down by its integration service in {:.1} s", stopping.elapsed().as_secs_f64());
        console.finish(Duration::from_secs(10))?.context("the console did not end with the machine")?;
        let last = viridian.json(&["vm", "events", NAME, "--last", "1", "--json"])?;
        ensure!(last[0]["event"] == "stopped", "the last event is {}", last[0]);
        println!("\nGo on by hand:");
    }
    let shown = viridian.binary.strip_prefix(crate::workspace_root()).unwrap_or(&viridian.binary);
    println!("  export VIRIDIAN_STORE={}", viridian.store.display());
    if !keep {
        println!("  {} vm start {NAME}", shown.display());
    }
    println!("  {} vm connect {NAME}     # Ctrl-] leaves; root needs no password", shown.display());
    println!("  {} vm list; {0} vm show {NAME}; {0} vm --help", shown.display());
    println!("  {} vm stop {NAME} && {0} vm remove {NAME}", shown.display());
    Ok(())
}

/// The VM of an earlier demo goes.
fn remove_last(viridian: &Viridian) -> Result<()> {
    let Ok(old) = viridian.json(&["vm", "show", NAME, "--json"]) else { return Ok(()) };
    if old["state"] != "off" {
        viridian.run(&["vm", "stop", NAME, "--turn-off"])?;
    }
    viridian.run(&["vm", "remove", NAME])?;
    Ok(())
}

/// Follows the boot, and prints when each stage began and how long it took.
fn timeline(viridian: &Viridian, console: &mut Session, started: Instant) -> Result<()> {
    let folder = viridian.json(&["vm", "show", NAME, "--json"])?["folder"].as_str().map(PathBuf::from);
    let log = folder.context("the VM has a folder")?.join("worker.log");
    let mut from = Duration::ZERO;
    let mut stage = |name: &str, until: Duration| {
        let took = until.saturating_sub(from);
        println!("  {:7.2} s {:7.2} s  {name}", from.as_secs_f64(), took.as_secs_f64());
        let _ = std::io::stdout().flush();
        from = until;
    };
    // What the firmware does before it hands over shows in the worker's log only.
    while !boot_was_begun(&log) {
        ensure!(started.elapsed() < LIMIT, "the firmware starts no boot loader within {} s", LIMIT.as_secs());
        let event = console.wait_for(Duration::from_millis(5), |_| false)?;
        ensure!(event != Event::Ended, "the machine ended in its firmware: {}", log.display());
    }
    stage("firmware", started.elapsed());
    for (name, marks) in STAGES {
        let event = console.wait_for(LIMIT, |text| marks.iter().any(|mark| text.contains(mark)))?;
        ensure!(event == Event::Seen, "the boot did not come beyond {name}; last line: {}", last_line(console.text()));
        stage(name, started.elapsed());
    }
    println!("  {:7.2} s            a shell", started.elapsed().as_secs_f64());
    Ok(())
}

fn boot_was_begun(log: &Path) -> bool {
    std::fs::read_to_string(log).is_ok_and(|text| text.contains("firmware: boot: starting"))
}

fn last_line(text: &str) -> String {
    text.lines().rev().map(str::trim).find(|l| !l.is_empty()).map(without_escapes).unwrap_or_default()
}

/// Text without the sequences by which a terminal is told colours and places.
fn without_escapes(line: &str) -> String {
    let mut clean = String::new();
    let mut rest = line.chars().peekable();
    while let Some(c) = rest.next() {
        match c {
            '\u{1b}' if rest.peek() == Some(&'[') => {
                rest.next();
                while rest.next().is_some_and(|c| !('@'..='~').contains(&c)) {}
            }
            c if c.is_control() => {}
            c => clean.push(c),
        }
    }
    clean
}

/// Waits until the guest's heartbeat is there, and its data exchange.
fn heartbeat(viridian: &Viridian) -> Result<Value> {
    let until = Instant::now() + LIMIT;
    loop {
        let status = viridian.json(&["guest", NAME, "status", "--json"])?;
        if status["heartbeat"] == "ok" && status["kvp"] == true {
            return Ok(status);
        }
        ensure!(Instant::now() < until, "no heartbeat and data exchange within {} s: {status}", LIMIT.as_secs());
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// What the guest says of itself.
fn facts(viridian: &Viridian) -> Result<Vec<(String, String)>> {
    let pairs = viridian.json(&["guest", NAME, "kvp", "--json"])?;
    let pairs = pairs.as_array().context("the guest's pairs are a list")?;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let found: Vec<_> =
        pairs.iter().map(|p| (text(&p["key"]), text(&p["value"]))).filter(|p| !p.1.is_empty()).collect();
    let has = |key: &str| found.iter().any(|(k, _)| k == key);
    ensure!(has("OSName") && has("FullyQualifiedDomainName"), "the guest does not say its system's name: {found:?}");
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes() {
        assert_eq!(without_escapes("\u{1b}[2J\u{1b}[0;32mOK\u{1b}[0m \u{7}x\u{1b}"), "OK x");
    }
}
