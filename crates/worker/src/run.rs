//! The run loop.

use crate::control::Control;
use crate::engines::{self, EngineChoice};
use crate::firmware::{self, FirmwareOptions};
use crate::hyperv::Devices;
use crate::serial::{Plugged, SerialTarget};
use crate::stats;
use machine::machine::{Base, Parts};
use machine::save::{self, Header};
use machine::{BootSource, Event, GuestInterface, Machine, MachineConfig, MachineError, Serial};
use partition::{EngineError, EngineOptions};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2};
use std::fs::File;
use std::io::{BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};
use thiserror::Error;

/// How the machine begins.
#[derive(Clone, Debug)]
pub enum Start {
    /// It boots.
    Boot(MachineConfig),
    /// It goes on from a state file.
    Restore(PathBuf),
}

/// What to run, and how.
#[derive(Clone, Debug)]
pub struct RunOptions {
    /// How the machine begins.
    pub start: Start,
    /// Engine.
    pub engine: EngineChoice,
    /// Its options.
    pub engine_options: EngineOptions,
    /// The firmware of a generation 2 machine.
    pub firmware: FirmwareOptions,
    /// COM1.
    pub serial: SerialTarget,
    /// Control socket (with Hyper-V's interface only).
    pub control: Option<PathBuf>,
    /// Where SIGUSR1 saves the machine.
    pub save: Option<PathBuf>,
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
enum Wake {
    Machine(Event),
    Signal(i32),
    Escape,
}

/// Runs a machine to its end.
pub fn run(options: &RunOptions) -> Result<Outcome, WorkerError> {
    let (sender, wakes) = channel();
    // Before anything that a signal should undo.
    catch_signals(sender.clone())?;
    let (config, restore) = match &options.start {
        Start::Boot(config) => (config.clone(), None),
        Start::Restore(path) => {
            let (header, file) = open_state(path)?;
            (header.config.clone(), Some((path, header, file)))
        }
    };
    check_host_memory(config.memory_bytes)?;
    let base = Base::new(&config).map_err(WorkerError::Machine)?;
    let cpuid = machine::processor::tables(&config.cpu_model, config.processors, base.clock.tsc_frequency_hz())
        .map_err(|e| WorkerError::Setup(format!("--cpu-model: {e}")))?;
    let phase = |what: &str| tracing::debug!("{what} after {:.1} ms", options.started.elapsed().as_secs_f64() * 1e3);
    phase("memory and processor model");
    let engine = engines::choose(options.engine).map_err(WorkerError::Engine)?;
    let mut plugged = Plugged::new(&options.serial)
        .map_err(|source| WorkerError::Serial { target: options.serial.to_string(), source })?;
    let devices = match config.hyperv {
        true => {
            let signature = cpuid.first().map_or(0, |t| t.get(1, 0).eax);
            Some(Arc::new(Devices::new(&config, &base, engine.abilities(), signature)?))
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
        BootSource::Firmware { .. } => vec![firmware::device(&options.firmware, &base)?],
        _ => Vec::new(),
    };
    let events = sender.clone();
    let parts = Parts {
        engine: &*engine,
        options: options.engine_options,
        cpuid,
        serial: Serial { com1: Some(plugged.backend.clone()), com2: None },
        debug: None,
        generation2,
        guest_interface: devices.as_ref().map(|d| d.interface.clone() as Arc<dyn GuestInterface>),
        base: Some(base),
        // A run loop that has gone away does not need the event.
        events: Arc::new(move |event| drop(events.send(Wake::Machine(event)))),
    };
    let machine = Machine::new(config, parts).map_err(WorkerError::Machine)?;
    match restore {
        Some((path, header, file)) => {
            machine.restore(&header, file).map_err(|source| WorkerError::State { path: path.clone(), source })?
        }
        None => machine.boot().map_err(WorkerError::Machine)?,
    }
    phase("guest loaded");
    plugged
        .start(move || drop(sender.send(Wake::Escape)))
        .map_err(|source| WorkerError::Host { what: "preparing the terminal", source })?;

    let startup = options.started.elapsed();
    let begun = Instant::now();
    machine.resume().map_err(WorkerError::Failed)?;
    let control = match (&options.control, &devices) {
        (Some(path), Some(devices)) => Some(
            Control::start(path, devices.clone())
                .map_err(|e| WorkerError::Setup(format!("control socket {}: {e}", path.display())))?,
        ),
        (Some(_), None) => return Err(WorkerError::Setup("--name needs --hyperv on".into())),
        (None, _) => None,
    };
    let result = serve(&machine, &wakes, options);
    drop(control);
    let stopped = machine.pause().map_err(WorkerError::Failed);
    plugged.backend.flush(Duration::from_secs(2));
    // The terminal comes back before anything else is printed on it.
    drop(plugged);
    if options.stats {
        let report = stats::report(&machine, startup, begun.elapsed());
        let _ = std::io::stderr().write_all(report.as_bytes());
    }
    result.and_then(|outcome| stopped.map(|()| outcome))
}

fn serve(machine: &Machine, wakes: &Receiver<Wake>, options: &RunOptions) -> Result<Outcome, WorkerError> {
    loop {
        let Ok(wake) = wakes.recv() else { return Ok(Outcome::Left) };
        match wake {
            Wake::Machine(Event::PowerOff) => return Ok(Outcome::PoweredOff),
            Wake::Machine(Event::Reset) => {
                machine.pause().map_err(WorkerError::Failed)?;
                // Other VPs may have asked for the same reset before they stopped.
                let mut later = Vec::new();
                while let Ok(wake) = wakes.try_recv() {
                    if !matches!(wake, Wake::Machine(Event::Reset | Event::TripleFault(_))) {
                        later.push(wake);
                    }
                }
                machine.reset().map_err(WorkerError::Failed)?;
                machine.resume().map_err(WorkerError::Failed)?;
                for wake in later {
                    if let Some(outcome) = outside(machine, wake, options)? {
                        return Ok(outcome);
                    }
                }
            }
            Wake::Machine(Event::TripleFault(vp)) => {
                machine.pause().map_err(WorkerError::Failed)?;
                let state = machine.describe_vp(vp).map_err(WorkerError::Failed)?;
                return Err(WorkerError::TripleFault { vp, state });
            }
            Wake::Machine(Event::EngineFailed(error)) => return Err(WorkerError::Failed(error.into())),
            wake => {
                if let Some(outcome) = outside(machine, wake, options)? {
                    return Ok(outcome);
                }
            }
        }
    }
}

/// What comes from outside of the machine; and power-off, which ends it in any case.
fn outside(machine: &Machine, wake: Wake, options: &RunOptions) -> Result<Option<Outcome>, WorkerError> {
    match wake {
        Wake::Escape => Ok(Some(Outcome::Left)),
        Wake::Signal(SIGUSR2) => {
            machine.press_power_button();
            Ok(None)
        }
        Wake::Signal(SIGUSR1) => {
            let Some(path) = &options.save else {
                tracing::warn!("SIGUSR1 came, but no file to save the machine to was given (--save)");
                return Ok(None);
            };
            machine.pause().map_err(WorkerError::Failed)?;
            save_to(machine, path)?;
            Ok(Some(Outcome::Saved))
        }
        Wake::Signal(signal) => Ok(Some(Outcome::Signal(signal))),
        Wake::Machine(Event::PowerOff) => Ok(Some(Outcome::PoweredOff)),
        Wake::Machine(Event::EngineFailed(error)) => Err(WorkerError::Failed(error.into())),
        Wake::Machine(_) => Ok(None),
    }
}

/// Saves a paused machine; the file appears complete or not at all.
fn save_to(machine: &Machine, path: &Path) -> Result<(), WorkerError> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    let failed = |source: MachineError| WorkerError::State { path: path.into(), source };
    let io = |source: std::io::Error| failed(MachineError::Save(source.into()));
    let file = File::create(&partial).map_err(io)?;
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

fn open_state(path: &Path) -> Result<(Header, BufReader<File>), WorkerError> {
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

fn catch_signals(sender: Sender<Wake>) -> Result<(), WorkerError> {
    let host = |source| WorkerError::Host { what: "catching signals", source };
    let signals = [SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2];
    let mut signals = signal_hook::iterator::Signals::new(signals).map_err(host)?;
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
