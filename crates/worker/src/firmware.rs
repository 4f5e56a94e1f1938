//! The firmware of a generation 2 machine: its variables, Secure Boot, and what it tells its host.

use crate::run::WorkerError;
use crate::sandbox;
use bios::device::{BiosConfig, BiosDevice, FirmwareEvents, SecureBootEvent};
use bios::nvram::{self, Nvram};
use bios::templates::Template;
use machine::machine::Base;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Sender, channel};

/// Options of the firmware.
#[derive(Clone, Debug)]
pub struct FirmwareOptions {
    /// File of the variables; without one they live as long as the process.
    pub variables: Option<PathBuf>,
    /// Keys of a machine that has no variables yet.
    pub template: Template,
    /// Is Secure Boot on?
    pub secure_boot: bool,
}

impl Default for FirmwareOptions {
    fn default() -> Self {
        Self { variables: None, template: Template::default(), secure_boot: true }
    }
}

/// Most lines of the firmware's log that are kept in one run: a guest must not fill the host's log.
const MOST_LINES: u32 = 1000;

/// Passes what the firmware says to the log, and the watchdog's bite to the run loop.
struct Log {
    lines: AtomicU32,
    expired: Box<dyn Fn() + Send + Sync>,
}

impl FirmwareEvents for Log {
    fn secure_boot(&self, event: SecureBootEvent) {
        if self.lines.fetch_add(1, Ordering::Relaxed) < MOST_LINES {
            tracing::warn!("Secure Boot refused an image: {event:?}");
        }
    }
    fn boot_finalized(&self) {
        tracing::debug!("the operating system has taken over from the firmware");
    }
    fn log(&self, line: &str) {
        if self.lines.fetch_add(1, Ordering::Relaxed) < MOST_LINES {
            let clean: String = line.chars().map(|c| if c.is_control() { '?' } else { c }).collect();
            tracing::info!("firmware: {clean}");
        }
    }
    fn watchdog_expired(&self) {
        tracing::warn!("the firmware's watchdog has run out: the machine is reset");
        (self.expired)();
    }
}

/// A file to be written, and where the answer goes.
type Request = (PathBuf, Vec<u8>, Sender<std::io::Result<()>>);

/// Writes variables on a thread of its own: VPs, whose thread the guest's change arrives on, may not open files.
fn writer(confined: bool) -> std::io::Result<nvram::Save> {
    let (sender, requests) = channel::<Request>();
    std::thread::Builder::new().name("variables".into()).spawn(move || {
        crate::run::leave_signals_to_others();
        let mut unfiltered = confined;
        for (path, bytes, answer) in requests {
            // Not earlier: the filters of the whole process come first, and guests make requests only after that.
            if std::mem::take(&mut unfiltered)
                && let Err(error) = sandbox::filter_writer()
            {
                tracing::warn!("seccomp for the thread that writes variables: {error}");
            }
            // Whoever asked waits for the answer.
            let _ = answer.send(nvram::save(&path, bytes));
        }
    })?;
    let gone = || std::io::Error::other("the thread that writes variables has ended");
    Ok(Box::new(move |path, bytes| {
        let (answer, result) = channel();
        sender.send((path.into(), bytes, answer)).map_err(|_| gone())?;
        result.recv().map_err(|_| gone())?
    }))
}

/// Makes the BiosDevice. `expired` is called when the watchdog runs out (see [`BiosDevice::poll_watchdog`]). In a
/// `confined` process the thread that writes variables confines itself further.
pub fn device(
    options: &FirmwareOptions,
    confined: bool,
    base: &Base,
    expired: Box<dyn Fn() + Send + Sync>,
) -> Result<Arc<BiosDevice>, WorkerError> {
    let setup = |e: &dyn std::fmt::Display| WorkerError::Setup(e.to_string());
    let mut nvram = match &options.variables {
        Some(path) => Nvram::open(path).map_err(|e| setup(&e))?,
        None => Nvram::volatile(),
    };
    // A machine without any variable is new: it gets the template's keys. A machine whose keys the user has removed stays
    // in setup mode.
    if nvram.store().iter().next().is_none() {
        nvram.change(|store| options.template.apply(store)).map_err(|e| setup(&e))?.map_err(|e| setup(&e))?;
    }
    if options.variables.is_some() {
        let writer = writer(confined);
        nvram.save_by(writer.map_err(|source| WorkerError::Host { what: "a thread for variables", source })?);
    }
    let mut generation_id = [0; 16];
    generation_id.copy_from_slice(uuid::Uuid::new_v4().as_bytes());
    Ok(BiosDevice::new(BiosConfig {
        memory: base.memory.clone(),
        clock: base.clock.clone(),
        nvram,
        secure_boot: options.secure_boot,
        generation_id,
        events: Arc::new(Log { lines: AtomicU32::new(0), expired }),
    }))
}
