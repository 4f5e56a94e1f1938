//! The beginning and the end of a worker process: from the VM's configuration to a running machine, and what the event
//! log says of its end.

use crate::config::{Engine, VmConfig};
use crate::error::{Error, Result};
use crate::events::EventLog;
use crate::lifecycle::{Birth, chain};
use crate::limits;
use crate::record::{Record, start_ticks};
use crate::store::Store;
use crate::vm::Vm;
use bios::templates::{Template, TemplateError};
use machine::{BootSource, MachineConfig, UnitKind};
use partition::EngineOptions;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Instant;
use worker::firmware::FirmwareOptions;
use worker::sandbox::Files;
use worker::{EngineChoice, Note, Observer, Outcome, RunOptions, SerialTarget, Start, WorkerError};

/// Runs the VM with this id as its worker. Standard input is the lock that the worker holds, standard output leads to
/// the command that started it, standard error is the log. Returns the process's exit status.
pub fn worker_main(store: &Path, id: &str, started: Instant) -> u8 {
    let vm = match Store::at(store).and_then(|s| s.find(id)) {
        Ok(vm) => vm,
        Err(error) => {
            tell(&Birth::Failed(error.to_string()));
            return 1;
        }
    };
    // Its own session: neither the terminal nor its owner's departure ends it.
    let _ = rustix::process::setsid();
    let log = Log::new(&vm);
    let result = prepare(&vm, &log, started).and_then(|options| worker::run(&options).map_err(End::Workers));
    let status = log.end(result);
    let _ = std::fs::remove_file(vm.record_path());
    status
}

/// An error before the machine ran, or the worker's own.
enum End {
    Ours(Error),
    Workers(WorkerError),
}

impl From<Error> for End {
    fn from(error: Error) -> Self {
        Self::Ours(error)
    }
}

fn tell(birth: &Birth) {
    if let Ok(line) = serde_json::to_string(birth) {
        // Whoever asked may have gone away.
        let _ = writeln!(std::io::stdout(), "{line}");
        let _ = std::io::stdout().flush();
    }
}

/// Writes the event log, and answers the command that started the worker.
struct Log {
    events: EventLog,
    state: PathBuf,
    /// Opened before the worker confines itself; standard output becomes it when the command has its answer.
    nowhere: Mutex<Option<File>>,
    running: AtomicBool,
    asked: AtomicBool,
}

impl Log {
    fn new(vm: &Vm) -> Arc<Self> {
        Arc::new(Self {
            events: vm.events(),
            state: vm.state_path(),
            nowhere: Mutex::new(File::options().write(true).open("/dev/null").ok()),
            running: AtomicBool::new(false),
            asked: AtomicBool::new(false),
        })
    }

    /// Records how the worker ends.
    fn end(&self, result: std::result::Result<Outcome, End>) -> u8 {
        let note = |event: &str, message: &str| self.events.note(event, message);
        match result {
            Ok(Outcome::PoweredOff) if self.asked.load(Ordering::SeqCst) => {
                note("stopped", "the guest shut down, as the host had asked");
            }
            Ok(Outcome::PoweredOff) => note("stopped", "the guest switched itself off"),
            Ok(Outcome::TurnedOff) => note("turned-off", "the host turned it off"),
            Ok(Outcome::Saved) => note("saved", "its state was saved"),
            Ok(Outcome::Left) => note("stopped", "the worker was told to leave"),
            Ok(Outcome::Signal(signal)) => note("stopped", &format!("signal {signal} ended the worker")),
            Err(end) => {
                let text = match &end {
                    End::Ours(error) => error.to_string(),
                    End::Workers(error) => error.to_string(),
                };
                if self.running.load(Ordering::SeqCst) {
                    tracing::error!("{text}");
                    let crashed = matches!(end, End::Workers(WorkerError::TripleFault { .. }));
                    note(if crashed { "guest-crashed" } else { "failed" }, &text);
                } else {
                    tracing::error!("could not start: {text}");
                    tell(&Birth::Failed(text));
                }
                return 1;
            }
        }
        0
    }
}

impl Observer for Log {
    fn note(&self, note: &Note<'_>) {
        match note {
            Note::Confined(sandbox) => {
                tracing::info!("in force: {}", sandbox.applied.join(", "));
                if !sandbox.missing.is_empty() {
                    let missing = sandbox.missing.join("; ");
                    self.events.note("sandbox-incomplete", &format!("this host has not: {missing}"));
                }
            }
            Note::Running { restored, engine } => {
                self.running.store(true, Ordering::SeqCst);
                if *restored {
                    // From here on the state is the past.
                    let _ = std::fs::remove_file(&self.state);
                    self.events.note("restored", &format!("goes on from its saved state, on {engine}"));
                } else {
                    self.events.note("started", &format!("started on {engine}"));
                }
                tell(&Birth::Running { restored: *restored });
                if let Some(nowhere) = self.nowhere.lock().unwrap_or_else(PoisonError::into_inner).take() {
                    let _ = rustix::stdio::dup2_stdout(&nowhere);
                }
            }
            Note::Paused => self.events.note("paused", "paused"),
            Note::Resumed => self.events.note("resumed", "goes on"),
            Note::ShutdownRequested { restart } => {
                self.asked.store(!restart, Ordering::SeqCst);
                let what = if *restart { "restart" } else { "shut down" };
                self.events.note("shutdown-requested", &format!("the host asked the guest to {what}"));
            }
            Note::Reset { by_host } => {
                self.asked.store(false, Ordering::SeqCst);
                self.events.note("reset", if *by_host { "the host reset it" } else { "the guest reset itself" });
            }
            Note::GuestCrashed(report) => {
                let text = report.message.as_deref().unwrap_or("").trim_end();
                let message = format!("the guest reports a crash: parameters {:x?} {text}", report.parameters);
                self.events.note("guest-crashed", message.trim_end());
            }
            Note::SaveFailed(why) => self.events.note("save-failed", why),
        }
    }
}

fn prepare(vm: &Vm, log: &Arc<Log>, started: Instant) -> std::result::Result<RunOptions, End> {
    let config = vm.load()?;
    let mut record = Record::read(vm).unwrap_or_else(Record::begin);
    record.pid = std::process::id();
    record.start_ticks = start_ticks(record.pid).unwrap_or(0);
    let own = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    match limits::apply(Path::new(limits::CGROUPS), limits::own_group(&own), vm.id(), &config.processor) {
        Ok(group) => {
            if let Some(group) = &group {
                // Without it the group would only stay for longer.
                let _ = crate::atomic::write(&vm.group_path(), group.as_os_str().as_encoded_bytes(), false);
            }
            record.cgroup = group;
        }
        Err(why) => {
            log.events.note("limits-missing", &format!("processor weight and cap are not in force: {why}"));
            record.unlimited.push(format!("processor weight and cap: {why}"));
        }
    }
    record.write(vm)?;
    let affinity = limits::affinity(&config.processor, vm.id(), &limits::available()).map_err(Error::Config)?;
    Ok(options(vm, &config, log, affinity, started)?)
}

/// What a machine opens: its disks with their parents, its discs, its kernel, its keys.
///
/// # Errors
/// When an image is missing or of no use.
pub fn files_of(config: &MachineConfig, template: &Template) -> Result<Files> {
    let mut files = Files::default();
    for unit in &config.storage {
        let Some(image) = &unit.image else { continue };
        let mut images = chain(image)?.into_iter();
        match unit.kind {
            UnitKind::Disk => files.write.extend(images.next()),
            UnitKind::Dvd => files.read.extend(images.next()),
        }
        files.read.extend(images);
    }
    if let BootSource::Kernel { kernel, initrd, .. } = &config.boot {
        files.read.push(kernel.clone());
        files.read.extend(initrd.clone());
    }
    if let BootSource::Firmware { image, .. } = &config.boot {
        files.read.extend(image.clone());
    }
    if let Template::File(path) = template {
        files.read.push(path.clone());
    }
    Ok(files)
}

fn options(vm: &Vm, config: &VmConfig, log: &Arc<Log>, affinity: Vec<usize>, started: Instant) -> Result<RunOptions> {
    let template = config.firmware.template.parse();
    let template: Template = template.map_err(|e: TemplateError| Error::Config(e.to_string()))?;
    let mut files = files_of(&config.machine(), &template)?;
    files.write.push(vm.state_folder());
    let start = if vm.state_path().is_file() {
        Start::Restore { file: vm.state_path(), storage: Some(config.storage()) }
    } else {
        Start::Boot(config.machine())
    };
    Ok(RunOptions {
        start,
        engine: match config.engine {
            Engine::Auto => EngineChoice::Auto,
            Engine::Soft => EngineChoice::Soft,
            Engine::Kvm => EngineChoice::Kvm,
        },
        engine_options: EngineOptions::default(),
        firmware: FirmwareOptions {
            variables: Some(vm.variables_path()),
            template,
            secure_boot: config.firmware.secure_boot,
        },
        serial: SerialTarget::Stdio,
        console: true,
        control: Some(vm.socket_path()),
        save: Some(vm.state_path()),
        confine: Some(files),
        affinity,
        reserve_memory: config.memory.reserve,
        observer: Some(log.clone()),
        stats: false,
        started,
    })
}
