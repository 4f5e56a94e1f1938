//! A running machine under observation: its serial output as it comes, a time limit, and what it cost the host.

use anyhow::{Context, Result};
use rustix::fs::{Mode, OFlags};
use rustix::process::Pid;
pub use rustix::process::Signal;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, tcgetattr};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

/// One process with its standard output (the serial line) and error captured.
pub struct Session {
    child: Child,
    chunks: Receiver<Vec<u8>>,
    log: Option<File>,
    started: Instant,
    text: String,
    unfinished: Vec<u8>,
}

/// Why [`Session::wait_for`] returned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The watcher was satisfied.
    Seen,
    /// The process closed its output.
    Ended,
    /// The time is up.
    TimedOut,
}

/// What a process has used of the host so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// Time since the start.
    pub wall: Duration,
    /// Processor time, user and system, of all threads. Resolution 10 ms.
    pub cpu: Duration,
    /// Resident memory outside the guest's RAM, bytes.
    pub overhead: u64,
}

impl Session {
    /// Starts a command. Everything that it prints goes to `log` as well.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(mut command: Command, log: Option<&Path>, with_input: bool) -> Result<Self> {
        let log = match log {
            Some(path) => {
                fs::create_dir_all(path.parent().context("a log has a folder")?)?;
                Some(File::create(path).with_context(|| format!("cannot write {}", path.display()))?)
            }
            None => None,
        };
        command.stdin(if with_input { Stdio::piped() } else { Stdio::null() });
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let started = Instant::now();
        let mut child =
            command.spawn().with_context(|| format!("cannot start {}", command.get_program().to_string_lossy()))?;
        let (sender, chunks) = channel();
        let stdout: Box<dyn Read + Send> = Box::new(child.stdout.take().expect("piped above"));
        let stderr: Box<dyn Read + Send> = Box::new(child.stderr.take().expect("piped above"));
        for mut pipe in [stdout, stderr] {
            let sender = sender.clone();
            thread::spawn(move || {
                let mut buffer = [0; 4096];
                while let Ok(count @ 1..) = pipe.read(&mut buffer) {
                    if sender.send(buffer[..count].to_vec()).is_err() {
                        break;
                    }
                }
            });
        }
        Ok(Self { child, chunks, log, started, text: String::new(), unfinished: Vec::new() })
    }

    /// Starts a command on a terminal of its own, as a person would have it.
    ///
    /// # Errors
    /// When it cannot be started or the host gives no terminal.
    pub fn on_terminal(mut command: Command, log: &Path) -> Result<(Self, Terminal)> {
        fs::create_dir_all(log.parent().context("a log has a folder")?)?;
        let log = Some(File::create(log)?);
        let (terminal, mut master) = Terminal::open().context("cannot open a pseudo-terminal")?;
        let end = || terminal.user_end.try_clone().map(Stdio::from);
        command.stdin(end()?).stdout(end()?).stderr(end()?);
        let started = Instant::now();
        let child =
            command.spawn().with_context(|| format!("cannot start {}", command.get_program().to_string_lossy()))?;
        let (sender, chunks) = channel();
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = master.read(&mut buffer) {
                if sender.send(buffer[..count].to_vec()).is_err() {
                    break;
                }
            }
        });
        Ok((Self { child, chunks, log, started, text: String::new(), unfinished: Vec::new() }, terminal))
    }

    /// Sends the process a signal.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        // The child has not been waited for, so the number is still its own.
        rustix::process::kill_process(Pid::from_child(&self.child), signal).context("cannot signal the process")
    }

    /// Reads output until `seen` says of the text so far that it is enough.
    ///
    /// # Errors
    /// When the log cannot be written.
    pub fn wait_for(&mut self, limit: Duration, mut seen: impl FnMut(&str) -> bool) -> Result<Event> {
        let deadline = Instant::now() + limit;
        loop {
            if seen(&self.text) {
                return Ok(Event::Seen);
            }
            match self.chunks.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(chunk) => self.take(&chunk)?,
                Err(RecvTimeoutError::Timeout) => return Ok(Event::TimedOut),
                Err(RecvTimeoutError::Disconnected) => return Ok(Event::Ended),
            }
        }
    }

    /// Bytes may be anything and may come in the middle of a character.
    fn take(&mut self, chunk: &[u8]) -> Result<()> {
        if let Some(log) = &mut self.log {
            log.write_all(chunk)?;
        }
        self.unfinished.extend_from_slice(chunk);
        let whole = match std::str::from_utf8(&self.unfinished) {
            Err(e) if e.error_len().is_none() => e.valid_up_to(),
            _ => self.unfinished.len(),
        };
        let rest = self.unfinished.split_off(whole);
        self.text.push_str(&String::from_utf8_lossy(&self.unfinished));
        self.unfinished = rest;
        Ok(())
    }

    /// The process's number.
    pub fn process(&self) -> u32 {
        self.child.id()
    }

    /// All output so far.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The guest's keyboard: the process's standard input. Give it back by dropping it.
    pub fn input(&mut self) -> Option<ChildStdin> {
        self.child.stdin.take()
    }

    /// What the process has used so far. `memory_mib` is the guest's RAM, which is not counted as overhead.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn usage(&self, memory_mib: u32) -> Result<Usage> {
        let pid = self.child.id();
        let wall = self.started.elapsed();
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).context("the process has ended")?;
        let mut cpu = cpu_time(&stat).context("unexpected format of /proc/PID/stat")?;
        for child in children(pid) {
            let stat = fs::read_to_string(format!("/proc/{child}/stat")).unwrap_or_default();
            cpu += cpu_time(&stat).unwrap_or_default();
        }
        let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap_or_default();
        Ok(Usage { wall, cpu, overhead: resident_outside(&smaps, u64::from(memory_mib) << 20) })
    }

    /// Waits for the process's end and says its status; kills it when it has not ended in time.
    ///
    /// # Errors
    /// When the process cannot be waited for.
    pub fn finish(&mut self, limit: Duration) -> Result<Option<ExitStatus>> {
        let deadline = Instant::now() + limit;
        loop {
            // A terminal's output does not end with the process: both are asked.
            let event = self.wait_for(Duration::from_millis(20), |_| false)?;
            if let Some(status) = self.child.try_wait()? {
                while let Ok(chunk) = self.chunks.recv_timeout(Duration::from_millis(50)) {
                    self.take(&chunk)?;
                }
                return Ok(Some(status));
            }
            if Instant::now() >= deadline {
                self.kill();
                return Ok(None);
            }
            if event == Event::Ended {
                thread::sleep(Duration::from_millis(5));
            }
        }
    }

    /// Ends the process.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The terminal of a [`Session::on_terminal`].
pub struct Terminal {
    user_end: OwnedFd,
    keyboard: File,
}

impl Terminal {
    fn open() -> Result<(Self, File)> {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY)?;
        grantpt(&master)?;
        unlockpt(&master)?;
        let name = ptsname(&master, Vec::new())?;
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let user_end = rustix::fs::open(name.as_c_str(), flags, Mode::empty())?;
        let keyboard = File::from(master.try_clone()?);
        Ok((Self { user_end, keyboard }, File::from(master)))
    }

    /// Types bytes.
    ///
    /// # Errors
    /// When nobody has the terminal any more.
    pub fn type_bytes(&mut self, bytes: &[u8]) -> Result<()> {
        self.keyboard.write_all(bytes).context("cannot type")
    }

    /// The terminal's settings in words, for comparing.
    ///
    /// # Errors
    /// When the terminal is gone.
    pub fn settings(&self) -> Result<String> {
        Ok(format!("{:?}", tcgetattr(&self.user_end)?))
    }

    /// Whether keys go to the program one by one, without echo.
    ///
    /// # Errors
    /// When the terminal is gone.
    pub fn is_raw(&self) -> Result<bool> {
        Ok(!tcgetattr(&self.user_end)?.local_modes.intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG))
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The living children of a process: those of a worker execute guest code for it.
fn children(process: u32) -> Vec<u32> {
    let Ok(all) = fs::read_dir("/proc") else { return Vec::new() };
    all.filter_map(|entry| {
        let pid = entry.ok()?.file_name().to_str()?.parse().ok()?;
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // Behind the name: state and parent.
        let parent: u32 = stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()?;
        (parent == process).then_some(pid)
    })
    .collect()
}

/// Processor time of the living threads of a process and of its children, in nanoseconds' resolution; nothing when it is gone.
pub fn thread_time(process: u32) -> Duration {
    let of = |process: u32| -> u64 {
        let Ok(threads) = fs::read_dir(format!("/proc/{process}/task")) else { return 0 };
        threads
            .filter_map(|t| fs::read_to_string(t.ok()?.path().join("schedstat")).ok())
            .filter_map(|text| text.split_whitespace().next()?.parse::<u64>().ok())
            .sum()
    };
    Duration::from_nanos(std::iter::once(process).chain(children(process)).map(of).sum())
}

/// Fields 14 and 15 of `/proc/PID/stat` (proc(5)): user and system time in ticks of 10 ms.
pub fn cpu_time(stat: &str) -> Option<Duration> {
    // The program's name, field 2, may have spaces; it ends with the last parenthesis.
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(Duration::from_millis((user + system) * 10))
}

/// Resident bytes of all mappings except guest RAM, which is known by its size: a mapping of at least half of it.
fn resident_outside(smaps: &str, ram: u64) -> u64 {
    let mut total = 0;
    let mut size = 0;
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let key = words.next().unwrap_or_default();
        let kib = || words.next().and_then(|w| w.parse::<u64>().ok()).unwrap_or(0) << 10;
        match key {
            "Size:" => size = { kib }(),
            "Rss:" if size < ram / 2 => total += { kib }(),
            _ => {}
        }
    }
    total
}

/// Resident bytes of a process beside guest RAM: its own, and those of the program's and the libraries' files, which all
/// processes of the program share. Generated code is mapped twice, once to write and once to execute it, and is one and the
/// same memory: it counts once.
///
/// # Errors
/// When the process is gone.
pub fn resident_beside(pid: u64, ram: u64) -> Result<(u64, u64)> {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).context("the process has ended")?;
    let files = part_of(&smaps, |heading| heading.contains(" /") && !heading.contains("memfd:"));
    let second = part_of(&smaps, |heading| heading.contains("r-xs") && heading.contains("memfd:viridian-code"));
    let files = resident_outside(&files, ram);
    Ok((resident_outside(&smaps, ram) - resident_outside(&second, ram) - files, files))
}

/// The mappings of `smaps` whose first line is wanted.
fn part_of(smaps: &str, wanted: impl Fn(&str) -> bool) -> String {
    let mut taken = String::new();
    let mut take = false;
    for line in smaps.lines() {
        // A mapping's first line begins with its addresses, the others with a word and a colon.
        if line.split(' ').next().is_some_and(|word| word.contains('-')) {
            take = wanted(line);
        }
        if take {
            taken.push_str(line);
            taken.push('\n');
        }
    }
    taken
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proc_stat() {
        let stat = "77 (a b) c) S 1 77 77 0 -1 4194560 100 0 0 0 250 31 0 0 20 0 4 0 1 1 1";
        assert_eq!(cpu_time(stat), Some(Duration::from_millis(2810)));
        assert_eq!(cpu_time("77 (x)"), None);
    }

    #[test]
    fn overhead_leaves_guest_memory_out() {
        let smaps = "7f00-7f10 rw-p\nSize:  524288 kB\nRss:  400000 kB\n7f20-7f30 r-xp\nSize:  200 kB\nRss:  100 kB\n";
        assert_eq!(resident_outside(smaps, 512 << 20), 100 << 10);
    }

    #[test]
    fn output_and_status() {
        let mut command = Command::new("sh");
        command.args(["-c", "printf 'one\\ntw'; printf 'o\\n\\303\\244'; read x; echo got $x; exit 3"]);
        let mut session = Session::start(command, None, true).unwrap();
        assert_eq!(session.wait_for(Duration::from_secs(10), |t| t.ends_with("two\nä")).unwrap(), Event::Seen);
        session.input().unwrap().write_all(b"42\n").unwrap();
        assert_eq!(session.finish(Duration::from_secs(10)).unwrap().and_then(|s| s.code()), Some(3));
        assert!(session.text().ends_with("got 42\n"));
    }

    #[test]
    fn time_limit() {
        let mut command = Command::new("sleep");
        command.arg("60");
        let mut session = Session::start(command, None, false).unwrap();
        assert_eq!(session.wait_for(Duration::from_millis(50), |_| false).unwrap(), Event::TimedOut);
        assert_eq!(session.finish(Duration::from_millis(50)).unwrap(), None);
    }
}
