//! Guests whose scripts ask the host for things: a line `VIRIDIAN-HOST: WORD ARGUMENTS` on the serial line is carried
//! out here, and `ok ANSWER` or what went wrong is typed back (`host` in `xtask/src/initramfs/run.sh`).

use super::cases::Boot;
use super::{Bench, expect_seen, is_fatal};
use crate::session::{Session, Signal};
use crate::vm::{Contender, Vm};
use anyhow::{Context, Result, bail, ensure};
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command};
use std::time::{Duration, Instant, SystemTime};

/// What a scenario has to work with.
pub struct Stage<'a> {
    /// Kernels, tools, the program under test.
    pub bench: &'a Bench<'a>,
    /// The case.
    pub boot: &'a Boot,
    /// The machine.
    pub vm: &'a Vm,
    /// The log.
    pub log: &'a Path,
    /// For the whole scenario.
    pub limit: Duration,
}

impl Stage<'_> {
    fn program(&self) -> Result<(&Path, &str)> {
        match self.bench.contender {
            Contender::Viridian { binary, engine, .. } => Ok((binary, engine)),
            Contender::Qemu { .. } => bail!("only Viridian has these"),
        }
    }

    /// The engine under test.
    ///
    /// # Errors
    /// When it is another program.
    pub fn engine(&self) -> Result<&str> {
        Ok(self.program()?.1)
    }

    /// A command of the program under test.
    ///
    /// # Errors
    /// When it is another program.
    pub fn viridian(&self, arguments: &[&str]) -> Result<Command> {
        let mut command = Command::new(self.program()?.0);
        command.args(arguments);
        Ok(command)
    }

    /// Makes a dynamic VHDX.
    ///
    /// # Errors
    /// When that fails.
    pub fn new_disk(&self, path: &Path, size: &str, block: &str) -> Result<()> {
        let _ = std::fs::remove_file(path);
        let mut command = self.viridian(&["vhd", "new", "--block-size", block])?;
        crate::initramfs::disks::must(command.arg(path).arg(size))?;
        Ok(())
    }

    /// A file beside the log, which goes away with it.
    pub fn file(&self, extension: &str) -> PathBuf {
        self.log.with_extension(extension)
    }
}

/// A running guest.
pub struct Hosted<'a> {
    stage: &'a Stage<'a>,
    session: Session,
    keyboard: ChildStdin,
    /// Where the output begins that was not looked at.
    at: usize,
    deadline: Instant,
    processes: u32,
    /// When the guest last asked for a tick.
    pub tick: Option<SystemTime>,
}

enum Asked {
    Host(String),
    Verdict(String),
}

impl<'a> Hosted<'a> {
    /// Boots the guest with these further arguments of `viridian run`.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn boot(stage: &'a Stage<'a>, arguments: &[String]) -> Result<Self> {
        let mut command = stage.bench.contender.command(stage.vm);
        command.args(arguments);
        Self::start(stage, command, stage.log)
    }

    fn start(stage: &'a Stage<'a>, mut command: Command, log: &Path) -> Result<Self> {
        command.arg("--stats").arg("--name").arg(stage.file("sock"));
        let mut session = Session::start(command, Some(log), true)?;
        let keyboard = session.input().context("input was asked for")?;
        Ok(Self { stage, session, keyboard, at: 0, deadline: Instant::now() + stage.limit, processes: 1, tick: None })
    }

    /// The process under observation.
    pub fn session(&mut self) -> &mut Session {
        &mut self.session
    }

    /// `viridian guest` with these arguments; what it prints.
    ///
    /// # Errors
    /// When it fails, with what it said.
    pub fn guest(&self, arguments: &[&str]) -> Result<String> {
        crate::initramfs::disks::must(&mut self.guest_command(arguments)?)
    }

    /// The same as a command.
    ///
    /// # Errors
    /// When the program under test is not Viridian.
    pub fn guest_command(&self, arguments: &[&str]) -> Result<Command> {
        let mut command = self.stage.viridian(&["guest"])?;
        command.arg(self.stage.file("sock")).args(arguments);
        Ok(command)
    }

    /// `viridian vm` with these words, the machine, and these arguments.
    ///
    /// # Errors
    /// When it fails, with what it said.
    pub fn vm(&self, words: &[&str], arguments: &[&str]) -> Result<String> {
        let mut command = self.stage.viridian(&["vm"])?;
        command.args(words).arg(self.stage.file("sock")).args(arguments);
        crate::initramfs::disks::must(&mut command)
    }

    /// Saves the machine, which ends its process, and goes on with it in another after a while.
    ///
    /// # Errors
    /// Says at which step it failed.
    pub fn save_and_restore(&mut self, pause: Duration) -> Result<()> {
        let state = self.stage.file("state");
        self.session.signal(Signal::USR1)?;
        let status = self.session.finish(Duration::from_secs(120))?.context("saving took more than 120 s")?;
        ensure!(status.success(), "saving ended the program with {status}");
        std::thread::sleep(pause);
        let Contender::Viridian { binary, engine, options } = self.stage.bench.contender else { bail!("not Viridian") };
        let mut command = Command::new(binary);
        command.args(["run", "--engine", engine]).args(options).arg("--restore").arg(&state);
        self.processes += 1;
        let log = self.stage.file(&format!("{}.log", self.processes));
        let next = Self::start(self.stage, command, &log)?;
        (self.session, self.keyboard, self.at) = (next.session, next.keyboard, 0);
        Ok(())
    }

    /// The machine stands still for this time.
    ///
    /// # Errors
    /// When the control socket refuses.
    pub fn pause(&self, time: Duration) -> Result<()> {
        self.order("pause")?;
        std::thread::sleep(time);
        self.order("resume")
    }

    /// `POST /v1/machine/ORDER` on the control socket (docs/control.md).
    fn order(&self, order: &str) -> Result<()> {
        let path = self.stage.file("sock");
        let mut stream = UnixStream::connect(&path).with_context(|| format!("cannot reach {}", path.display()))?;
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        let head = format!("POST /v1/machine/{order} HTTP/1.1\r\nHost: viridian\r\nConnection: close\r\n");
        stream
            .write_all(format!("{head}Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{{}}").as_bytes())?;
        let mut answer = [0; 12];
        stream.read_exact(&mut answer).context("no answer on the control socket")?;
        ensure!(answer.starts_with(b"HTTP/1.1 2"), "{order}: {}", String::from_utf8_lossy(&answer));
        Ok(())
    }

    fn next(&mut self) -> Result<Asked> {
        loop {
            let at = self.at;
            let left = self.deadline.saturating_duration_since(Instant::now());
            let event = self.session.wait_for(left, |t| t[at..].contains('\n') || is_fatal(t))?;
            expect_seen(event, self.stage.limit, self.session.text(), "the guest's next words")?;
            let rest = &self.session.text()[at..];
            // A panic's text may have no end of line yet: the next turn waits for it.
            let Some(end) = rest.find('\n') else { continue };
            let line = rest[..end].trim_end().to_owned();
            self.at += end + 1;
            if let Some((_, asked)) = line.split_once("VIRIDIAN-HOST: ") {
                return Ok(Asked::Host(asked.to_owned()));
            }
            if let Some((_, verdict)) = line.split_once("VIRIDIAN-VERDICT: ") {
                return Ok(Asked::Verdict(verdict.to_owned()));
            }
            ensure!(!line.contains("VIRIDIAN-MODULE: FAIL"), "{line}");
        }
    }

    /// Does what the guest asks until its verdict, which must be PASS.
    ///
    /// # Errors
    /// When it is not, or does not come.
    pub fn serve(&mut self, mut act: impl FnMut(&mut Self, &[&str]) -> Result<String>) -> Result<()> {
        loop {
            match self.next()? {
                Asked::Verdict(verdict) => {
                    ensure!(verdict.starts_with("PASS"), "the guest says {verdict}");
                    return Ok(());
                }
                Asked::Host(asked) => {
                    let words: Vec<&str> = asked.split_whitespace().collect();
                    let answer = match act(self, &words) {
                        Ok(answer) => format!("ok {answer}"),
                        Err(error) => format!("{error:#}"),
                    };
                    let line: String = answer.chars().filter(|c| !c.is_control()).take(300).collect();
                    self.keyboard.write_all(format!("{}\n", line.trim_end()).as_bytes()).context("cannot type")?;
                }
            }
        }
    }

    /// The guest ends the program with status 0 in this time; then its counters have reached these values.
    ///
    /// # Errors
    /// Says what was not so.
    pub fn end(mut self, limit: Duration) -> Result<()> {
        let status = self.session.finish(limit)?;
        let status = status.with_context(|| format!("the program still ran after {} s", limit.as_secs()))?;
        ensure!(status.success(), "the program ended with {status}, expected status 0");
        check_counters(self.session.text(), self.stage.boot.counters)?;
        for process in 2..=self.processes {
            let _ = std::fs::remove_file(self.stage.file(&format!("{process}.log")));
        }
        Ok(())
    }
}

/// Counters of `--stats` that must have reached these values.
///
/// # Errors
/// Says which has not.
pub fn check_counters(text: &str, wanted: &[(&str, u64)]) -> Result<()> {
    for (name, least) in wanted {
        let line = text.lines().rev().find(|l| l.trim_start().starts_with(name));
        let value: u64 = line
            .and_then(|l| l.split_whitespace().nth(1)?.parse().ok())
            .with_context(|| format!("--stats has no counter {name}"))?;
        ensure!(value >= *least, "the counter {name} is {value}, expected at least {least}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters() {
        let text = "vp 0: executed\n  flush_hypercalls        22\n  halts 3\n";
        assert!(check_counters(text, &[("flush_hypercalls", 22), ("halts", 1)]).is_ok());
        assert!(check_counters(text, &[("flush_hypercalls", 23)]).is_err());
        assert!(check_counters(text, &[("absent", 0)]).is_err());
    }
}
