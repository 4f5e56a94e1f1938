//! States of a VM and the ways between them, from the side of a command.

use crate::atomic;
use crate::config::VmConfig;
use crate::error::{Error, Result};
use crate::limits;
use crate::record::Record;
use crate::vm::Vm;
use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use worker::control::Client;
use worker::control::client::ClientError;
use worker::control::schema::{self, State};

/// A worker's log that is larger than this is put aside at the next start.
const MOST_LOG: u64 = 1 << 20;
/// How long a worker may take to say how it is before it is stopped.
const ASKED: Duration = Duration::from_secs(10);
/// How long a worker that says it ends may take to be gone.
const END_TIME: Duration = Duration::from_secs(30);

/// How a VM is.
#[derive(Clone, Debug)]
pub struct Status {
    /// State.
    pub state: State,
    /// Its worker, if it has one.
    pub record: Option<Record>,
    /// What the worker says of the machine.
    pub machine: Option<schema::Machine>,
    /// Something that its owner should know: a worker that died, or that does not answer.
    pub trouble: Option<String>,
}

/// How a VM is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The guest shuts itself down.
    ShutDown {
        /// Without asking its applications.
        force: bool,
    },
    /// As if the plug were pulled. Throws away a saved state.
    TurnOff,
    /// The state is kept in a file.
    Save,
}

/// How the worker tells the command that started it what came of it: one line of JSON.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Birth {
    /// The guest runs.
    Running {
        /// From its saved state.
        restored: bool,
    },
    /// It does not.
    Failed(String),
}

impl Vm {
    /// A client of its worker.
    pub fn client(&self) -> Client {
        Client::new(self.socket_path())
    }

    fn state_without_worker(&self) -> State {
        if self.state_path().is_file() { State::Saved } else { State::Off }
    }

    /// How it is. A worker that does not answer within `patience` is said to hang; one that has died is noticed here, and
    /// its death goes to the event log.
    pub fn status(&self, patience: Duration) -> Status {
        let Some(record) = Record::read(self) else {
            self.remove_group();
            return Status { state: self.state_without_worker(), record: None, machine: None, trouble: None };
        };
        if !atomic::is_held(&self.worker_lock_path()) {
            // Its own end removes the record before the lock.
            if Record::read(self).is_none() {
                return Status { state: self.state_without_worker(), record: None, machine: None, trouble: None };
            }
            let (_, message) = record.obituary();
            // A command that is starting it holds the lock, and deals with what was before.
            if let Ok(Some(lock)) = self.try_lock() {
                self.bury();
                drop(lock);
                self.remove_group();
            }
            return Status { state: self.state_without_worker(), record: None, machine: None, trouble: Some(message) };
        }
        match self.client().patience(patience).machine() {
            Ok(machine) => Status { state: machine.state, record: Some(record), machine: Some(machine), trouble: None },
            Err(ClientError::Hangs { seconds }) => {
                let trouble = format!("its worker (process {}) does not answer within {seconds} s", record.pid);
                Status { state: State::Running, record: Some(record), machine: None, trouble: Some(trouble) }
            }
            // Not yet, or no longer.
            Err(_) => Status { state: State::Starting, record: Some(record), machine: None, trouble: None },
        }
    }

    /// Notes the death of a worker, with the VM's lock held.
    fn bury(&self) {
        let Some(record) = Record::read(self) else { return };
        if atomic::is_held(&self.worker_lock_path()) {
            return;
        }
        let (event, message) = record.obituary();
        self.events().note(event, &message);
        let _ = std::fs::remove_file(self.socket_path());
        let _ = std::fs::remove_file(self.partial_state_path());
        let _ = std::fs::remove_file(self.record_path());
    }

    /// Removes the control group of a worker that has ended, if it had one.
    fn remove_group(&self) {
        let path = self.group_path();
        let Ok(bytes) = std::fs::read(&path) else { return };
        // A command that is starting the VM holds the lock: its worker has the group again.
        let Ok(Some(_lock)) = self.try_lock() else { return };
        let group = Path::new(std::ffi::OsStr::from_bytes(&bytes));
        if !atomic::is_held(&self.worker_lock_path()) && limits::remove(group, self.id()) {
            let _ = std::fs::remove_file(&path);
        }
    }

    /// An error that says that the state does not allow something.
    pub fn wrong_state(&self, state: State, advice: &str) -> Error {
        Error::State { name: self.label(), state, advice: advice.into() }
    }

    /// Starts it: a worker process of `program`, in a session of its own. Returns when the guest runs; says whether it
    /// goes on from a saved state.
    ///
    /// # Errors
    /// When it runs already, or cannot start.
    pub fn start(&self, program: &Path, limit: Duration) -> Result<bool> {
        let _lock = self.lock()?;
        self.bury();
        let config = self.load()?;
        let Some(held) = self.take_worker_lock()? else {
            return Err(self.wrong_state(self.status(Duration::from_secs(2)).state, "it has been started already"));
        };
        self.check_files(&config)?;
        let log = self.open_log()?;
        Record::begin().write(self)?;
        let result = self.spawn(program, held.into_file(), log).and_then(|pipe| self.await_birth(pipe, limit));
        if let Err(error) = &result
            && !matches!(error, Error::Timeout(_))
            && !atomic::is_held(&self.worker_lock_path())
        {
            // The worker has said why, or could not be made at all: there is nothing else to tell.
            self.events().note("start-failed", &error.to_string());
            let _ = std::fs::remove_file(self.record_path());
        }
        result
    }

    /// The lock that a worker holds, or `None` if one does.
    fn take_worker_lock(&self) -> Result<Option<atomic::Lock>> {
        // Somebody who only looks holds it for an instant; so does a worker on its last steps.
        let until = Instant::now() + Duration::from_millis(500);
        loop {
            let lock = atomic::try_lock(&self.worker_lock_path())?;
            if lock.is_some() || Instant::now() > until || Record::read(self).is_some_and(|r| r.is_alive()) {
                return Ok(lock);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Files that are missing or foreign are better said here than by a process in the background.
    fn check_files(&self, config: &VmConfig) -> Result<()> {
        if self.state_path().is_file() {
            return Ok(());
        }
        for unit in config.storage() {
            if let Some(image) = &unit.image {
                chain(image)?;
            }
        }
        if let Some(kernel) = &config.kernel {
            for file in std::iter::once(&kernel.image).chain(&kernel.initrd) {
                File::open(file).map_err(Error::io(file, "open the kernel or its initial RAM disk"))?;
            }
        }
        Ok(())
    }

    fn open_log(&self) -> Result<File> {
        let path = self.log_path();
        if std::fs::metadata(&path).is_ok_and(|m| m.len() > MOST_LOG) {
            let _ = std::fs::rename(&path, self.folder().join("worker.1.log"));
        }
        File::options().append(true).create(true).mode(0o600).open(&path).map_err(Error::io(&path, "open the log"))
    }

    fn spawn(&self, program: &Path, lock: File, log: File) -> Result<std::process::ChildStdout> {
        let mut child = Command::new(program)
            .arg0("viridian-worker")
            .arg("worker")
            .arg("--store")
            .arg(self.store().root())
            .arg(self.id().to_string())
            // The lock goes over to the worker: there is no moment at which nobody holds it.
            .stdin(lock)
            .stdout(Stdio::piped())
            .stderr(log)
            .current_dir(self.folder())
            .spawn()
            .map_err(Error::io(program, "start a worker from"))?;
        let pipe = child.stdout.take();
        // Whoever outlives the worker (the demo, a test) reaps it.
        let _ = std::thread::Builder::new().name("reaper".into()).spawn(move || child.wait());
        pipe.ok_or_else(|| Error::Start { name: self.label(), reason: "its output cannot be read".into() })
    }

    fn await_birth(&self, pipe: std::process::ChildStdout, limit: Duration) -> Result<bool> {
        let (sender, lines) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let mut line = String::new();
            let _ = BufReader::new(pipe).read_line(&mut line);
            let _ = sender.send(line);
        });
        let name = self.label();
        let Ok(line) = lines.recv_timeout(limit) else {
            return Err(Error::Timeout(format!(
                "'{name}' is still starting after {} s: `viridian vm show` tells how it goes on",
                limit.as_secs()
            )));
        };
        match serde_json::from_str(&line) {
            Ok(Birth::Running { restored }) => Ok(restored),
            Ok(Birth::Failed(reason)) => {
                self.await_end(Duration::from_secs(2));
                Err(Error::Start { name, reason })
            }
            Err(_) => {
                let reason = format!("its worker died; {} says more", self.log_path().display());
                // It has not let go of the lock until it is gone altogether.
                self.await_end(Duration::from_secs(2));
                Err(Error::Start { name, reason })
            }
        }
    }

    /// Waits until no worker runs; says whether that came to be.
    pub fn await_end(&self, limit: Duration) -> bool {
        let until = Instant::now() + limit;
        while atomic::is_held(&self.worker_lock_path()) {
            if Instant::now() > until {
                return false;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        true
    }

    /// Stops it, and waits for its end, at most `limit`.
    ///
    /// # Errors
    /// When its state does not allow it, the guest does not do it, or not in time.
    pub fn stop(&self, how: Stop, limit: Duration) -> Result<()> {
        let status = self.status(ASKED);
        match (status.state, how) {
            (State::Saved, Stop::TurnOff) if status.record.is_none() => return self.discard_state(),
            (state @ (State::Off | State::Saved), _) if status.record.is_none() => {
                return Err(self.wrong_state(state, "there is nothing to stop"));
            }
            _ => {}
        }
        let client = self.client();
        match how {
            Stop::TurnOff => {
                // One that has just kept somebody waiting is not asked again.
                let asked = match &status.trouble {
                    Some(_) => Err(ClientError::Hangs { seconds: ASKED.as_secs() }),
                    None => client.order("turn-off"),
                };
                // Anything but silence means that it is on its way out already.
                if let Err(error @ ClientError::Hangs { .. }) = asked {
                    self.kill(status.record.as_ref(), &error)?;
                }
                if !self.await_end(END_TIME) {
                    let error = ClientError::Hangs { seconds: END_TIME.as_secs() };
                    self.kill(Record::read(self).as_ref(), &error)?;
                }
            }
            Stop::Save => {
                let answer = client.save();
                // A worker that has saved its machine ends, and on a loaded host its answer may come too late.
                if !matches!(answer, Err(ClientError::Ended)) {
                    answer?;
                }
                if !self.await_end(limit) {
                    return Err(self.still_runs(limit, "it is being saved"));
                }
                if !self.state_path().is_file() {
                    return Err(ClientError::Ended.into());
                }
            }
            Stop::ShutDown { force } => {
                self.ask_guest(schema::Shutdown { restart: false, force })?;
                if !self.await_end(limit) {
                    return Err(self.still_runs(limit, "the guest was asked to shut down; --turn-off does not ask"));
                }
            }
        }
        Ok(())
    }

    fn still_runs(&self, limit: Duration, what: &str) -> Error {
        Error::Timeout(format!("'{}' still runs after {} s: {what}", self.label(), limit.as_secs()))
    }

    /// Asks the guest to shut down or to restart, through its integration service.
    ///
    /// # Errors
    /// When it has none (yet), or refuses.
    pub fn ask_guest(&self, how: schema::Shutdown) -> Result<()> {
        let client = self.client();
        let connected = client.guest().map(|g| g.shutdown);
        if matches!(connected, Ok(false)) {
            let advice = "the guest's shutdown service is not connected (hv_utils in Linux): wait until it has booted, \
                          shut it down from inside, or use `vm stop --turn-off` or `--save`";
            return Err(self.wrong_state(self.status(Duration::from_secs(2)).state, advice));
        }
        Ok(client.shutdown(how)?)
    }

    /// Ends a worker that does not obey.
    fn kill(&self, record: Option<&Record>, why: &ClientError) -> Result<()> {
        let Some(record) = record.filter(|r| r.is_alive()) else {
            // It went by itself in the meantime.
            return if atomic::is_held(&self.worker_lock_path()) {
                Err(Error::Timeout(format!("'{}': {why}, and its process is not known", self.label())))
            } else {
                Ok(())
            };
        };
        let pid = i32::try_from(record.pid).ok().and_then(Pid::from_raw);
        let killed = pid.map_or(Err(rustix::io::Errno::SRCH), |pid| kill_process(pid, Signal::KILL));
        killed.map_err(|e| Error::Timeout(format!("'{}': {why}, and it cannot be killed: {e}", self.label())))?;
        let _lock = self.lock()?;
        self.await_end(END_TIME);
        self.events().note("killed", &format!("the worker (process {}) was killed: {why}", record.pid));
        let _ = std::fs::remove_file(self.socket_path());
        let _ = std::fs::remove_file(self.record_path());
        Ok(())
    }

    fn discard_state(&self) -> Result<()> {
        let _lock = self.lock()?;
        let path = self.state_path();
        std::fs::remove_file(&path).map_err(Error::io(&path, "remove the saved state"))?;
        self.events().note("state-discarded", "the saved state was thrown away");
        Ok(())
    }

    /// Says no unless it is off.
    ///
    /// # Errors
    /// [`Error::State`]
    pub fn must_be_off(&self, what: &str) -> Result<()> {
        let state = self.status(Duration::from_secs(5)).state;
        match state {
            State::Off => Ok(()),
            State::Saved => Err(self.wrong_state(
                state,
                &format!("{what} while a state is saved: start it and shut it down, or discard the state with `vm stop --turn-off`"),
            )),
            _ => Err(self.wrong_state(state, &format!("{what} while it is off: stop it first"))),
        }
    }

    /// Removes it with everything in its folder. Images elsewhere stay; those in its folder go with `disks` only.
    ///
    /// # Errors
    /// When it runs, or has images in its folder that nobody said should go.
    pub fn remove(&self, disks: bool) -> Result<()> {
        let lock = self.lock()?;
        self.bury();
        let status = self.status(Duration::from_secs(5));
        if !matches!(status.state, State::Off | State::Saved) || status.record.is_some() {
            return Err(self.wrong_state(status.state, "a VM can be removed when it is off: stop it first"));
        }
        let has_disks = std::fs::read_dir(self.disks_folder()).is_ok_and(|mut d| d.next().is_some());
        if has_disks && !disks {
            return Err(self.wrong_state(
                status.state,
                &format!(
                    "{} holds its disks: move them away, or remove them too with --disks",
                    self.disks_folder().display()
                ),
            ));
        }
        let Some(_worker) = self.take_worker_lock()? else {
            return Err(self.wrong_state(State::Starting, "it was just started: stop it first"));
        };
        drop(lock);
        self.store().remove(self)
    }
}

/// An image and its parents, all of them there and of use.
pub fn chain(image: &Path) -> Result<Vec<PathBuf>> {
    let look = vhd::OpenOptions { lock: Some(vhd::Lock::None), io: vhd::Io::Blocking, ..Default::default() };
    let disk = vhd::Disk::open(image, &look).map_err(|e| (image, e))?;
    Ok(std::iter::once(image.to_path_buf()).chain(disk.info().parents.iter().cloned()).collect())
}
