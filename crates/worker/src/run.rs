//! The run loop.

use crate::console::Console;
use crate::control::schema::State;
use crate::control::{Context, Control};
use crate::engines::{self, EngineChoice};
use crate::firmware::{self, FirmwareOptions};
use crate::hyperv::Devices;
use crate::opened::{Opened, Reach};
pub use crate::reporter::Reporter;
use crate::sandbox;
use crate::screen::Screen;
use crate::serial::{Plugged, SerialTarget};
use crate::stats;
use bios::device::BiosDevice;
use chipset::serial::SerialBackend;
use machine::hyperv::CrashReport;
use machine::machine::{Base, Parts};
use machine::save::{self, Header};
use machine::vcpu::VpStarted;
use machine::{BootSource, Event, GuestInterface, Machine, MachineConfig, MachineError, Serial, StorageUnit};
use nix::sys::signal::{SigSet, Signal};
use partition::{EngineError, EngineOptions};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2};
use std::fs::File;
use std::io::{BufReader, BufWriter, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};
use thiserror::Error;

/// How the machine begins.
#[derive(Clone, Debug)]
pub enum Start {
    /// It boots.
    Boot(MachineConfig),
    /// It goes on from a state file.
    Restore {
        /// The file.
        file: PathBuf,
        /// Its disks and drives, where they are no longer those that the machine was made with.
        storage: Option<Vec<StorageUnit>>,
    },
}

/// Something that happened to a machine, for its event log.
#[derive(Debug)]
pub enum Note<'a> {
    /// The worker has confined itself.
    Confined(&'a crate::control::schema::Sandbox),
    /// The guest runs.
    Running {
        /// It goes on from a saved state.
        restored: bool,
        /// Engine.
        engine: &'a str,
    },
    /// It stands still.
    Paused,
    /// It goes on.
    Resumed,
    /// The host has asked the guest to shut down.
    ShutdownRequested {
        /// To restart, rather.
        restart: bool,
    },
    /// It was reset.
    Reset {
        /// By the host, not by itself.
        by_host: bool,
    },
    /// The guest's operating system reports that it has crashed.
    GuestCrashed(&'a CrashReport),
    /// A state could not be written; the machine runs on.
    SaveFailed(&'a str),
}

/// Hears what happens to a machine. Called on any thread; must not block for long.
pub trait Observer: Send + Sync {
    /// It has happened.
    fn note(&self, note: &Note<'_>);
}

/// What a client may order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Stand still.
    Pause,
    /// Go on.
    Resume,
    /// Write the state and end.
    Save,
    /// End at once.
    TurnOff,
    /// The reset button.
    Reset,
    /// The power button.
    PowerButton,
}

/// What to run, and how.
#[derive(Clone)]
pub struct RunOptions {
    /// How the machine begins.
    pub start: Start,
    /// Engine.
    pub engine: EngineChoice,
    /// Its options.
    pub engine_options: EngineOptions,
    /// The firmware of a generation 2 machine.
    pub firmware: FirmwareOptions,
    /// COM1, unless there is a console.
    pub serial: SerialTarget,
    /// COM1 is the console of the control socket.
    pub console: bool,
    /// Control socket.
    pub control: Option<PathBuf>,
    /// Where SIGUSR1, and an order to save, write the machine.
    pub save: Option<PathBuf>,
    /// The worker confines itself to these files, and to the system calls that it needs.
    pub confine: Option<sandbox::Files>,
    /// Processors of the host, one for each VP in turn; without any, the host's scheduler chooses.
    pub affinity: Vec<usize>,
    /// All of the guest's memory is taken from the host before it starts.
    pub reserve_memory: bool,
    /// Hears what happens.
    pub observer: Option<Arc<dyn Observer>>,
    /// Print counters to standard error at the end.
    pub stats: bool,
    /// When the program started, for the statistics.
    pub started: Instant,
}

/// How the machine ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The guest switched itself off.
    PoweredOff,
    /// The user left with the escape key.
    Left,
    /// The machine was saved.
    Saved,
    /// A client turned it off.
    TurnedOff,
    /// A signal ended it.
    Signal(i32),
}

/// Why a machine cannot run, or ended badly.
#[derive(Debug, Error)]
pub enum WorkerError {
    /// Something that was asked for cannot be had: the user's to change.
    #[error("{0}")]
    Setup(String),
    /// The serial port's other end.
    #[error("--serial {target}: {source}")]
    Serial {
        /// As the user said it.
        target: String,
        /// What the host said.
        source: std::io::Error,
    },
    /// A state file.
    #[error("{}: {source}", .path.display())]
    State {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: MachineError,
    },
    /// The machine cannot be made or loaded.
    #[error(transparent)]
    Machine(MachineError),
    /// The engine cannot be used here.
    #[error("--engine: {0}")]
    Engine(EngineError),
    /// The guest has crashed its processor.
    #[error("triple fault: the guest's processor {vp} has shut down\n{state}")]
    TripleFault {
        /// The VP.
        vp: u32,
        /// Its state in words.
        state: String,
    },
    /// The machine failed while it ran.
    #[error("the machine cannot go on: {0}")]
    Failed(MachineError),
    /// The host failed.
    #[error("{what}: {source}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// What the host said.
        source: std::io::Error,
    },
}

impl WorkerError {
    /// Did it fail before the guest ran, by something that the user can change?
    pub fn is_setup(&self) -> bool {
        !matches!(self, Self::TripleFault { .. } | Self::Failed(_) | Self::Host { .. })
    }
}

/// What the run loop waits for.
pub(crate) enum Wake {
    Machine(Event),
    Signal(i32),
    Escape,
    /// The guest's operating system says so.
    Crashed(CrashReport),
    Order(Order, Sender<Result<(), String>>),
}

/// Runs a machine to its end.
///
/// # Errors
/// When it cannot be made, or has ended badly.
pub fn run(options: &RunOptions) -> Result<Outcome, WorkerError> {
    let (sender, wakes) = channel();
    let reporter = Reporter::new(sender.clone(), options.observer.clone());
    let control = options.control.as_deref().map(|path| {
        Control::bind(path).map_err(|e| WorkerError::Setup(format!("control socket {}: {e}", path.display())))
    });
    let (control, listener) = control.transpose()?.unzip();
    let opened = Opened::new(&options.start, options.confine.is_some())?;
    // While the process has one thread.
    let mut confined = match &options.confine {
        Some(files) => {
            let reach = Reach::now(files, &opened);
            let report = sandbox::confine(files);
            reach.is_kept()?;
            Some(report)
        }
        None => None,
    };
    // Before anything that a signal should undo.
    catch_signals(sender.clone())?;
    let prepared = prepare(options, opened, &reporter, sender)?;
    let Prepared { machine, mut plugged, console, devices, bios, engine, processes, restored } = prepared;
    if let Some(confined) = &mut confined {
        sandbox::filter(confined, processes);
        reporter.confined(confined);
    }
    let startup = options.started.elapsed();
    let begun = Instant::now();
    machine.resume().map_err(WorkerError::Failed)?;
    reporter.set(State::Running);
    if let (Some(control), Some(listener)) = (&control, listener) {
        let context =
            Arc::new(Context { devices: devices.clone(), console: console.clone(), reporter: reporter.clone() });
        let served = control.serve(listener, context);
        served.map_err(|source| WorkerError::Host { what: "serving the control socket", source })?;
    }
    reporter.note(&Note::Running { restored, engine });
    let mut run_loop = RunLoop {
        machine: &machine,
        devices: devices.as_deref(),
        wakes: &wakes,
        bios: bios.as_deref(),
        options,
        reporter: &reporter,
        paused: false,
    };
    let result = run_loop.serve();
    drop(control);
    let stopped = machine.pause().map_err(WorkerError::Failed);
    if let Some(Err(error)) = devices.as_ref().map(|d| d.units.flush()) {
        tracing::error!("{error}");
    }
    if let Some(plugged) = &plugged {
        plugged.backend.flush(Duration::from_secs(2));
    }
    if let Some(console) = console {
        console.end(Duration::from_secs(2));
    }
    // The terminal comes back before anything else is printed on it.
    plugged.take();
    if options.stats {
        let report = stats::report(&machine, startup, begun.elapsed());
        let _ = std::io::stderr().write_all(report.as_bytes());
    }
    result.and_then(|outcome| stopped.map(|()| outcome))
}

/// A machine that is ready to run.
struct Prepared {
    machine: Machine,
    plugged: Option<Plugged>,
    console: Option<Arc<Console>>,
    devices: Option<Arc<Devices>>,
    bios: Option<Arc<BiosDevice>>,
    engine: &'static str,
    /// The engine uses processes of its own.
    processes: bool,
    restored: bool,
}

fn prepare(
    options: &RunOptions,
    opened: Opened,
    reporter: &Arc<Reporter>,
    sender: Sender<Wake>,
) -> Result<Prepared, WorkerError> {
    let Opened { config, restore, images, boot } = opened;
    check_host_memory(config.memory_bytes)?;
    let engine = engines::choose(options.engine).map_err(WorkerError::Engine)?;
    let processes = engine.uses_processes(&options.engine_options);
    let base = Base::new(&config, processes).map_err(WorkerError::Machine)?;
    if options.reserve_memory {
        base.memory.populate().map_err(|e| WorkerError::Setup(format!("reserving memory: {e}")))?;
    }
    let cpuid = machine::processor::tables(&config.cpu_model, config.processors, base.clock.tsc_frequency_hz())
        .map_err(|e| WorkerError::Setup(format!("--cpu-model: {e}")))?;
    let phase = |what: &str| tracing::debug!("{what} after {:.1} ms", options.started.elapsed().as_secs_f64() * 1e3);
    phase("memory and processor model");
    let console = options.console.then(Console::new);
    let mut plugged = match &console {
        Some(_) => None,
        None => Some(
            Plugged::new(&options.serial)
                .map_err(|source| WorkerError::Serial { target: options.serial.to_string(), source })?,
        ),
    };
    let mut devices = match config.hyperv {
        true => {
            let signature = cpuid.first().map_or(0, |t| t.get(1, 0).eax);
            Some(Devices::new(&config, images, &base, engine.abilities(), signature)?)
        }
        false if !config.storage.is_empty() => {
            return Err(WorkerError::Setup("--disk and --dvd are on VMBus and need --hyperv on".into()));
        }
        false => None,
    };
    let generation2 = match config.boot {
        BootSource::Firmware { .. } if !config.hyperv => {
            return Err(WorkerError::Setup("a generation 2 machine needs --hyperv on".into()));
        }
        BootSource::Firmware { .. } => {
            let events = sender.clone();
            let expired = Box::new(move || drop(events.send(Wake::Machine(Event::Reset))));
            Some(firmware::device(&options.firmware, options.confine.is_some(), &base, expired)?)
        }
        _ => None,
    };
    if let (Some(devices), Some(bios)) = (&mut devices, &generation2) {
        devices.screen = Some(Screen::new(base.memory.clone(), bios.clone()));
    }
    let devices = devices.map(Arc::new);
    if let Some(devices) = &devices {
        // Not from the VP's thread, which may not open an event log.
        let events = sender.clone();
        devices.interface.on_crash(Box::new(move |report| drop(events.send(Wake::Crashed(report.clone())))));
    }
    let bios = generation2.clone();
    let events = sender.clone();
    let com1 = match (&console, &plugged) {
        (Some(console), _) => Some(console.clone() as Arc<dyn SerialBackend>),
        (None, Some(plugged)) => Some(plugged.backend.clone()),
        (None, None) => None,
    };
    let parts = Parts {
        engine: &*engine,
        options: options.engine_options,
        cpuid,
        serial: Serial { com1, com2: None },
        debug: None,
        generation2: generation2.map(|bios| bios as Arc<dyn chipset::Device>).into_iter().collect(),
        guest_interface: devices.as_ref().map(|d| d.interface.clone() as Arc<dyn GuestInterface>),
        base: Some(base),
        boot,
        vp_started: vp_started(options, processes),
        // A run loop that has gone away does not need the event.
        events: Arc::new(move |event| drop(events.send(Wake::Machine(event)))),
    };
    let machine = Machine::new(config, parts).map_err(WorkerError::Machine)?;
    let restored = restore.is_some();
    match restore {
        Some((path, header, file)) => {
            machine.restore(&header, file).map_err(|source| WorkerError::State { path, source })?
        }
        None => machine.boot().map_err(WorkerError::Machine)?,
    }
    phase("guest loaded");
    if let Some(plugged) = &mut plugged {
        plugged
            .start(move || drop(sender.send(Wake::Escape)))
            .map_err(|source| WorkerError::Host { what: "preparing the terminal", source })?;
    }
    reporter.made(engine.name(), &machine);
    Ok(Prepared { machine, plugged, console, devices, bios, engine: engine.name(), processes, restored })
}

/// What each VP's thread does before it executes guest code: it goes to its processor of the host, and gives up system
/// calls.
fn vp_started(options: &RunOptions, processes: bool) -> Option<VpStarted> {
    let (affinity, confine) = (options.affinity.clone(), options.confine.is_some());
    Some(Arc::new(move |vp| {
        if !affinity.is_empty() {
            let processor = affinity[vp as usize % affinity.len()];
            let mut set = rustix::thread::CpuSet::new();
            set.set(processor);
            if let Err(error) = rustix::thread::sched_setaffinity(None, &set) {
                tracing::warn!("virtual processor {vp} cannot be bound to the host's processor {processor}: {error}");
            }
        }
        leave_signals_to_others();
        if confine && let Err(error) = sandbox::filter_vp(processes) {
            tracing::warn!("seccomp for virtual processor {vp}: {error}");
        }
    }))
}

/// Waits for what happens, and does what it asks for.
struct RunLoop<'a> {
    machine: &'a Machine,
    devices: Option<&'a Devices>,
    wakes: &'a Receiver<Wake>,
    /// Generation 2: whose watchdog counts seconds.
    bios: Option<&'a BiosDevice>,
    options: &'a RunOptions,
    reporter: &'a Reporter,
    paused: bool,
}

impl RunLoop<'_> {
    fn serve(&mut self) -> Result<Outcome, WorkerError> {
        loop {
            let Some(wake) = self.next() else { return Ok(Outcome::Left) };
            match wake {
                Wake::Machine(Event::Reset) => {
                    if let Some(outcome) = self.reset(false)? {
                        return Ok(outcome);
                    }
                }
                Wake::Machine(Event::TripleFault(vp)) => {
                    self.machine.pause().map_err(WorkerError::Failed)?;
                    let state = self.machine.describe_vp(vp).map_err(WorkerError::Failed)?;
                    return Err(WorkerError::TripleFault { vp, state });
                }
                wake => {
                    if let Some(outcome) = self.outside(wake)? {
                        return Ok(outcome);
                    }
                }
            }
        }
    }

    /// What happens next; nothing if nobody is left to whom it could happen.
    fn next(&self) -> Option<Wake> {
        let Some(bios) = self.bios else { return self.wakes.recv().ok() };
        loop {
            bios.poll_watchdog();
            match self.wakes.recv_timeout(Duration::from_secs(1)) {
                Ok(wake) => return Some(wake),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return None,
            }
        }
    }

    /// Resets the machine, and it runs.
    fn reset(&mut self, by_host: bool) -> Result<Option<Outcome>, WorkerError> {
        self.machine.pause().map_err(WorkerError::Failed)?;
        // Other VPs may have asked for the same reset before they stopped.
        let mut later = Vec::new();
        while let Ok(wake) = self.wakes.try_recv() {
            if !matches!(wake, Wake::Machine(Event::Reset | Event::TripleFault(_))) {
                later.push(wake);
            }
        }
        self.machine.reset().map_err(WorkerError::Failed)?;
        self.machine.resume().map_err(WorkerError::Failed)?;
        self.paused = false;
        self.reporter.set(State::Running);
        self.reporter.note(&Note::Reset { by_host });
        for wake in later {
            if let Some(outcome) = self.outside(wake)? {
                return Ok(Some(outcome));
            }
        }
        Ok(None)
    }

    /// What comes from outside of the machine; and power-off, which ends it in any case.
    fn outside(&mut self, wake: Wake) -> Result<Option<Outcome>, WorkerError> {
        match wake {
            Wake::Escape => Ok(Some(Outcome::Left)),
            Wake::Crashed(report) => {
                self.reporter.note(&Note::GuestCrashed(&report));
                Ok(None)
            }
            Wake::Signal(SIGUSR2) => {
                self.machine.press_power_button();
                Ok(None)
            }
            Wake::Signal(SIGUSR1) => {
                let Some(path) = &self.options.save else {
                    tracing::warn!("SIGUSR1 came, but no file to save the machine to was given (--save)");
                    return Ok(None);
                };
                self.machine.pause().map_err(WorkerError::Failed)?;
                self.note_units();
                save_to(self.machine, path)?;
                Ok(Some(Outcome::Saved))
            }
            Wake::Signal(signal) => Ok(Some(Outcome::Signal(signal))),
            Wake::Machine(Event::PowerOff) => Ok(Some(Outcome::PoweredOff)),
            Wake::Machine(Event::EngineFailed(error)) => Err(WorkerError::Failed(error.into())),
            Wake::Machine(_) => Ok(None),
            Wake::Order(order, reply) => self.obey(order, &reply),
        }
    }

    /// Carries an order out and answers.
    fn obey(&mut self, order: Order, reply: &Sender<Result<(), String>>) -> Result<Option<Outcome>, WorkerError> {
        // A client that has gone away needs no answer.
        let answer = |result| drop(reply.send(result));
        match order {
            Order::TurnOff => {
                answer(Ok(()));
                Ok(Some(Outcome::TurnedOff))
            }
            Order::Reset => {
                let outcome = self.reset(true);
                answer(outcome.as_ref().map(|_| ()).map_err(ToString::to_string));
                outcome
            }
            Order::PowerButton if self.paused => {
                answer(Err("the machine is paused: resume it first".into()));
                Ok(None)
            }
            Order::PowerButton => {
                self.machine.press_power_button();
                answer(Ok(()));
                Ok(None)
            }
            Order::Pause if self.paused => {
                answer(Err("the machine is paused already".into()));
                Ok(None)
            }
            Order::Pause => {
                self.machine.pause().map_err(WorkerError::Failed)?;
                self.paused = true;
                self.reporter.set(State::Paused);
                self.reporter.note(&Note::Paused);
                answer(Ok(()));
                Ok(None)
            }
            Order::Resume if !self.paused => {
                answer(Err("the machine is not paused".into()));
                Ok(None)
            }
            Order::Resume => {
                self.machine.resume().map_err(WorkerError::Failed)?;
                self.paused = false;
                self.reporter.set(State::Running);
                self.reporter.note(&Note::Resumed);
                answer(Ok(()));
                Ok(None)
            }
            Order::Save => self.save(answer),
        }
    }

    /// A restored machine begins with the units that there are now.
    fn note_units(&self) {
        if let Some(devices) = self.devices {
            self.machine.set_storage(devices.units.list());
        }
    }

    /// Writes the state. If that fails (a full disk), the machine is what it was before.
    fn save(&mut self, answer: impl FnOnce(Result<(), String>)) -> Result<Option<Outcome>, WorkerError> {
        let Some(path) = &self.options.save else {
            answer(Err("this machine was started without a file to save it to (viridian run --save)".into()));
            return Ok(None);
        };
        self.machine.pause().map_err(WorkerError::Failed)?;
        self.note_units();
        self.reporter.set(State::Saving);
        let flushed = self.devices.map_or(Ok(()), |d| d.units.flush());
        let saved = flushed.and_then(|()| save_to(self.machine, path).map_err(|e| e.to_string()));
        if let Err(text) = saved {
            self.reporter.note(&Note::SaveFailed(&text));
            if self.paused {
                self.reporter.set(State::Paused);
            } else {
                self.machine.resume().map_err(WorkerError::Failed)?;
                self.reporter.set(State::Running);
            }
            answer(Err(format!("the machine could not be saved and goes on: {text}")));
            return Ok(None);
        }
        self.reporter.set(State::Saved);
        answer(Ok(()));
        Ok(Some(Outcome::Saved))
    }
}

/// Saves a paused machine; the file appears complete or not at all.
fn save_to(machine: &Machine, path: &Path) -> Result<(), WorkerError> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    let failed = |source: MachineError| WorkerError::State { path: path.into(), source };
    let io = |source: std::io::Error| failed(MachineError::Save(source.into()));
    let mut creating = File::options();
    // It holds the guest's memory.
    let file = creating.write(true).create(true).truncate(true).mode(0o600).open(&partial).map_err(io)?;
    let mut writer = BufWriter::with_capacity(1 << 20, file);
    let written = machine.save(&mut writer).map_err(failed);
    let result = written.and_then(|()| {
        writer.flush().map_err(io)?;
        writer.get_ref().sync_all().map_err(io)?;
        std::fs::rename(&partial, path).map_err(io)
    });
    if result.is_err() {
        let _ = std::fs::remove_file(&partial);
    }
    result
}

/// The configuration of a saved machine.
///
/// # Errors
/// When the file is no saved machine.
pub fn saved_config(path: &Path) -> Result<MachineConfig, WorkerError> {
    open_state(path).map(|(header, _)| header.config)
}

pub(crate) fn open_state(path: &Path) -> Result<(Header, BufReader<File>), WorkerError> {
    let failed = |source: save::SaveError| WorkerError::State { path: path.into(), source: source.into() };
    let file = File::open(path).map_err(|e| failed(e.into()))?;
    let mut reader = BufReader::with_capacity(1 << 20, file);
    let header = save::read_header(&mut reader).map_err(failed)?;
    Ok((header, reader))
}

/// A guest whose memory the host can never give would be killed at some later moment: better said now.
fn check_host_memory(bytes: u64) -> Result<(), WorkerError> {
    let Ok(text) = std::fs::read_to_string("/proc/meminfo") else { return Ok(()) };
    let kib = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()
    };
    let (Some(total), Some(swap)) = (kib("MemTotal:"), kib("SwapTotal:")) else { return Ok(()) };
    if bytes / 1024 > total + swap {
        return Err(WorkerError::Setup(format!(
            "the host cannot give {} MiB of memory, it has {} MiB: choose a smaller --memory",
            bytes >> 20,
            (total + swap) >> 10
        )));
    }
    Ok(())
}

/// What the run loop hears of.
const SIGNALS: [i32; 6] = [SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2];

/// The kernel gives a process's signal to any thread that takes it, and the handler then writes to a socket. A thread that
/// may not do that would lose the signal: so it takes none, and the threads that it makes do not either.
pub(crate) fn leave_signals_to_others() {
    let set: SigSet = SIGNALS.iter().filter_map(|s| Signal::try_from(*s).ok()).collect();
    if let Err(error) = set.thread_block() {
        tracing::warn!("signals stay with a thread that cannot report them: {error}");
    }
}

fn catch_signals(sender: Sender<Wake>) -> Result<(), WorkerError> {
    let host = |source| WorkerError::Host { what: "catching signals", source };
    let mut signals = signal_hook::iterator::Signals::new(SIGNALS).map_err(host)?;
    let thread = std::thread::Builder::new().name("signals".into());
    thread
        .spawn(move || {
            for signal in signals.forever() {
                if sender.send(Wake::Signal(signal)).is_err() {
                    return;
                }
            }
        })
        .map_err(host)?;
    Ok(())
}
