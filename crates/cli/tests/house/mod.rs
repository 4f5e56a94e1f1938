//! An inventory of a test's own, and what is done with it.

// Not every test does everything.
#![allow(dead_code)]

use crate::common::{image, out, power_off, print};
use iced_x86::code_asm::*;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// A store in a temporary folder, with the guests that tests start. Whatever still runs at the end is ended.
pub struct House {
    pub dir: tempfile::TempDir,
}

/// What a command said.
pub struct Said {
    pub status: i32,
    pub out: String,
    pub errors: String,
}

impl House {
    pub fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn store(&self) -> PathBuf {
        self.path("store")
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_viridian"));
        command.args(arguments).env("VIRIDIAN_STORE", self.store()).stdin(Stdio::null());
        command
    }

    pub fn say(&self, arguments: &[&str]) -> Said {
        let output = self.command(arguments).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let status = output.status.code().expect("an exit status");
        let said = Said { status, out: text(&output.stdout), errors: text(&output.stderr) };
        assert!(!said.errors.contains("panicked"), "{arguments:?}: {}", said.errors);
        said
    }

    /// A command that must work.
    #[track_caller]
    pub fn good(&self, arguments: &[&str]) -> String {
        let said = self.say(arguments);
        assert_eq!(said.status, 0, "{arguments:?}: {}{}", said.out, said.errors);
        said.out
    }

    /// A command that must fail with this status, in one clear line that holds this text.
    #[track_caller]
    pub fn bad(&self, arguments: &[&str], status: i32, text: &str) {
        let shown: Vec<String> = arguments.iter().map(|a| a.chars().take(40).collect()).collect();
        let said = self.say(arguments);
        assert_eq!(said.status, status, "{shown:?}: {}{}", said.out, said.errors);
        assert!(said.errors.contains(text), "{shown:?}: '{text}' is not in: {}", said.errors);
        assert!(said.errors.starts_with("error: "), "{shown:?}: {}", said.errors);
        assert!(said.errors.lines().all(|l| l.len() < 600), "{shown:?}: {}", said.errors);
        assert!(!said.errors.contains('\u{1b}'), "{shown:?} passes escapes on: {:?}", said.errors);
    }

    #[track_caller]
    pub fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.good(arguments)).unwrap()
    }

    #[track_caller]
    pub fn state(&self, name: &str) -> String {
        self.json(&["vm", "show", name, "--json"])["state"].as_str().unwrap().to_owned()
    }

    pub fn worker(&self, name: &str) -> i32 {
        self.json(&["vm", "show", name, "--json"])["worker"]["pid"].as_i64().unwrap() as i32
    }

    pub fn folder(&self, name: &str) -> PathBuf {
        self.json(&["vm", "show", name, "--json"])["folder"].as_str().unwrap().into()
    }

    pub fn events(&self, name: &str) -> Vec<String> {
        let events = self.json(&["vm", "events", name, "--json"]);
        events.as_array().unwrap().iter().map(|e| e["event"].as_str().unwrap().to_owned()).collect()
    }

    /// Makes a VM with this guest.
    pub fn make(&self, name: &str, guest: &Path) {
        let guest = guest.to_str().unwrap();
        self.good(&["vm", "new", name, "--kernel", guest, "--memory", "16M", "--engine", "soft"]);
    }

    /// Types into the console and waits for an answer; a connection that comes late sees what was before.
    #[track_caller]
    pub fn talk(&self, name: &str, typed: &str, answer: &str) {
        let mut child = self
            .command(&["vm", "connect", name])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        child.stdin.as_mut().unwrap().write_all(typed.as_bytes()).unwrap();
        let mut stdout = child.stdout.take().unwrap();
        let (sender, bytes) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 256];
            while let Ok(count @ 1..) = stdout.read(&mut buffer) {
                let _ = sender.send(buffer[..count].to_vec());
            }
        });
        let mut seen = String::new();
        let until = Instant::now() + Duration::from_secs(60);
        while !seen.contains(answer) {
            let left = until.saturating_duration_since(Instant::now());
            let Ok(more) = bytes.recv_timeout(left) else { panic!("no '{answer}' in {seen:?}") };
            seen.push_str(&String::from_utf8_lossy(&more));
        }
        let _ = child.kill();
        let _ = child.wait();
    }
}

impl Drop for House {
    fn drop(&mut self) {
        for process in std::fs::read_dir(self.store().join("vms")).into_iter().flatten().flatten() {
            let record = std::fs::read(process.path().join("state/worker.json")).unwrap_or_default();
            let pid = serde_json::from_slice::<Value>(&record).ok().and_then(|r| r["pid"].as_i64()).unwrap_or(0);
            if pid > 1 {
                signal(pid as i32, Signal::KILL);
            }
        }
    }
}

pub fn signal(pid: i32, which: Signal) {
    let _ = kill_process(Pid::from_raw(pid).unwrap(), which);
}

/// Prints "up"; answers each byte with a letter, that of how many it has had: A, B, C. Ends on 'q'.
pub fn counter(dir: &Path) -> PathBuf {
    image(dir, "counter", |a| {
        let (mut top, mut done) = (a.create_label(), a.create_label());
        print(a, "up\n")?;
        a.mov(ebx, b'A' as u32)?;
        a.set_label(&mut top)?;
        a.mov(edx, 0x3fd)?;
        a.in_(al, dx)?;
        a.test(al, 1)?;
        a.je(top)?;
        a.mov(edx, 0x3f8)?;
        a.in_(al, dx)?;
        a.cmp(al, b'q' as i32)?;
        a.je(done)?;
        a.mov(eax, ebx)?;
        a.out(dx, al)?;
        a.inc(ebx)?;
        a.jmp(top)?;
        a.set_label(&mut done)?;
        out(a, 0x3f8, b'!'.into())?;
        power_off(a)
    })
}
