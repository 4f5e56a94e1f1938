//! A generation 2 machine under test: its serial line as a conversation.

use super::super::{Bench, is_fatal};
use crate::guests::disk::Fat;
use crate::session::{Event, Session};
use crate::vm::Contender;
use anyhow::{Context, Result, bail, ensure};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command};
use std::time::Duration;

/// A running machine.
pub struct Machine {
    session: Session,
    keyboard: ChildStdin,
    /// Up to where the serial line's text was looked at.
    seen: usize,
    limit: Duration,
    socket: PathBuf,
    binary: PathBuf,
}

impl Machine {
    /// Starts one; its log is `NAME.log` in the folder.
    pub fn start(bench: &Bench, folder: &Path, name: &str, arguments: &[&str]) -> Result<Self> {
        let Contender::Viridian { binary, engine, options } = bench.contender else {
            bail!("only Viridian has this firmware")
        };
        let socket = folder.join(format!("{name}.sock"));
        let mut command = Command::new(binary);
        command.arg("run").args(["--engine", engine]).args(options).args(arguments).arg("--name").arg(&socket);
        let mut session = Session::start(command, Some(&folder.join(format!("{name}.log"))), true)?;
        let keyboard = session.input().context("input was asked for")?;
        let limit = Duration::from_secs(120 * u64::from(bench.patience));
        Ok(Self { session, keyboard, seen: 0, limit, socket, binary: binary.clone() })
    }

    /// Waits for a text behind everything that was looked at; gives what stands before it.
    pub fn expect(&mut self, text: &str) -> Result<String> {
        self.expect_within(text, self.limit)
    }

    /// As [`Machine::expect`], with a time limit of its own.
    pub fn expect_within(&mut self, text: &str, limit: Duration) -> Result<String> {
        let seen = self.seen;
        let event = self.session.wait_for(limit, |t| t[seen..].contains(text) || is_fatal(t))?;
        let all = self.session.text();
        match all[seen..].find(text) {
            Some(at) => {
                let before = all[seen..seen + at].to_owned();
                self.seen = seen + at + text.len();
                Ok(before)
            }
            None => {
                let last = all.lines().rev().map(str::trim).find(|l| !l.is_empty()).unwrap_or("(nothing)");
                let last: String = last.chars().filter(|c| !c.is_control()).take(200).collect();
                let why = match event {
                    Event::Ended => "the program ended",
                    Event::TimedOut => "it did not come in time",
                    Event::Seen => "the guest has crashed",
                };
                bail!("{why} before {text:?}; last line: {last}")
            }
        }
    }

    /// Types on the serial line.
    pub fn type_serial(&mut self, text: &str) -> Result<()> {
        self.keyboard.write_all(text.as_bytes()).context("cannot type")
    }

    /// Runs a command in the guest's shell: its output and its status.
    pub fn shell(&mut self, command: &str) -> Result<(String, u32)> {
        // The echo of what is typed does not contain the mark.
        self.type_serial(&format!("{command}; echo mark-$((40 + 2))-$?-\n"))?;
        let output = self.expect("mark-42-")?;
        let status = self.expect("-")?.parse().context("no status of the command")?;
        // What was typed comes back first, after the prompt.
        let output = output.rsplit_once("-$?-").map_or("", |(_, rest)| rest).replace('\r', "");
        Ok((output, status))
    }

    /// Runs a command that must succeed.
    pub fn must(&mut self, command: &str) -> Result<String> {
        let (output, status) = self.shell(command)?;
        ensure!(status == 0, "in the guest `{command}` ended with status {status}: {}", output.trim());
        Ok(output)
    }

    /// Everything that the serial line has shown.
    pub fn text(&self) -> &str {
        self.session.text()
    }

    /// Types on the synthetic keyboard.
    pub fn press(&self, keys: &[&str]) -> Result<()> {
        let mut command = Command::new(&self.binary);
        command.arg("type").arg(&self.socket);
        for key in keys {
            command.args(["--key", key]);
        }
        let output = command.output()?;
        ensure!(output.status.success(), "viridian type: {}", String::from_utf8_lossy(&output.stderr).trim());
        Ok(())
    }

    /// A picture of the screen.
    pub fn picture(&self, file: &Path) -> Result<Vec<u8>> {
        let output = Command::new(&self.binary).arg("screenshot").arg(&self.socket).arg(file).output()?;
        ensure!(output.status.success(), "viridian screenshot: {}", String::from_utf8_lossy(&output.stderr).trim());
        Ok(std::fs::read(file)?)
    }

    /// Waits until the guest has powered the machine off.
    pub fn powered_off(&mut self) -> Result<()> {
        let status = self.session.finish(self.limit)?.context("the machine still runs")?;
        ensure!(status.success(), "power-off ended the program with {status}");
        Ok(())
    }
}

/// A disk of one FAT file system with these files.
pub fn fat_disk(bench: &Bench, image: &Path, mib: u64, files: &[(&Path, &str)]) -> Result<()> {
    let fat = Fat::format(bench.guests, image, mib, "TEST")?;
    let mut made: Vec<String> = Vec::new();
    for (source, path) in files {
        let folders: Vec<&str> = path.split('/').collect();
        for depth in 1..folders.len() {
            let folder = folders[..depth].join("/");
            if !made.contains(&folder) {
                fat.folder(&folder)?;
                made.push(folder);
            }
        }
        fat.file(source, path)?;
    }
    Ok(())
}
