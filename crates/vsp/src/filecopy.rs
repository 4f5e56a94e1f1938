//! Guest file copy: a file from the host into the guest.
//!
//! A copy outlives its process: the saved state holds what is left to be sent, and a restored machine goes on with it
//! by itself. (The file cannot be opened anew: a worker in its sandbox opens nothing, it is given files.)

use crate::ic::{Definition, Ic, ServiceError, utf16, v};
use crate::{SyntheticDevice, from_value, lock, to_value};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use vmbus::protocol::class;
use vmbus::protocol::service::kind;
use vmbus::{Channel, ChannelDevice, OfferParams, OpenRefused};

static DEFINITION: Definition = Definition {
    name: "filecopy",
    class: class::FILE_COPY,
    instance: class::FILE_COPY_INSTANCE,
    kind: kind::FILE_COPY,
    versions: &[v(1, 0), v(1, 1)],
};

const OP_START: u32 = 0;
const OP_WRITE: u32 = 1;
const OP_COMPLETE: u32 = 2;
const OP_CANCEL: u32 = 3;
/// Operation and two service GUIDs.
const HEADER: usize = 36;
/// Bytes of a path: 260 UTF-16 units.
const PATH_BYTES: usize = 520;
/// Bytes of a fragment.
const FRAGMENT: usize = 6 * 1024;
const FLAG_OVERWRITE: u32 = 1;
const FLAG_CREATE_PATH: u32 = 2;
const TIMEOUT: Duration = Duration::from_secs(30);

/// Most that is left of a copy when it is saved; a longer one is given up by the restored machine.
const MOST_SAVED: u64 = 64 << 20;

/// The service.
pub struct FileCopy {
    ic: Arc<Ic>,
    /// The copy that is under way.
    job: Mutex<Option<(Job, Arc<Source>)>>,
    /// A copy that a restored machine has to go on with.
    restored: Mutex<Option<(Job, Arc<Source>)>>,
}

/// Where the bytes come from.
enum Source {
    File(File),
    /// What was left at the time of saving, from this offset on.
    Rest(u64, Vec<u8>),
    /// Too much was left.
    Lost,
}

impl Source {
    fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<(), ServiceError> {
        match self {
            Self::File(file) => file
                .read_exact_at(bytes, offset)
                .map_err(|e| ServiceError::Host(format!("reading the file that is copied: {e}"))),
            Self::Rest(from, rest) => {
                let at = offset.checked_sub(*from).and_then(|at| usize::try_from(at).ok());
                let part = at.and_then(|at| rest.get(at..)?.get(..bytes.len()));
                let part = part.ok_or_else(|| ServiceError::Host("the saved rest of the file is too short".into()))?;
                bytes.copy_from_slice(part);
                Ok(())
            }
            Self::Lost => Err(ServiceError::Host(format!(
                "more than {} MiB of the file were left when the machine was saved: copy it again",
                MOST_SAVED >> 20
            ))),
        }
    }
}

/// How a file is copied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CopyOptions {
    /// Replace a file that exists.
    pub overwrite: bool,
    /// Make missing directories.
    pub create_path: bool,
}

/// What a copy does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Step {
    /// Asks the guest to make the file.
    Start,
    /// Sends the fragment at this offset.
    Write(u64),
    /// Says that this was all.
    Complete,
}

/// A copy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Job {
    size: u64,
    /// The body of the start request.
    start: Vec<u8>,
    step: Step,
}

#[derive(Serialize, Deserialize)]
struct State {
    ic: ciborium::Value,
    job: Option<Job>,
    /// Bytes that are left to be sent; null if they are too many.
    rest: ciborium::Value,
}

impl Job {
    /// The step after this one.
    fn advance(&mut self) -> bool {
        let after = |offset: u64| if offset < self.size { Step::Write(offset) } else { Step::Complete };
        self.step = match self.step {
            Step::Start => after(0),
            Step::Write(offset) => after(offset + FRAGMENT as u64),
            Step::Complete => return false,
        };
        true
    }

    /// Bytes that have arrived.
    fn arrived(&self) -> u64 {
        match self.step {
            Step::Start => 0,
            Step::Write(offset) => offset,
            Step::Complete => self.size,
        }
    }

    /// The request of this step.
    fn request(&self, source: &Source) -> Result<Vec<u8>, ServiceError> {
        let offset = match self.step {
            Step::Start => return Ok(self.start.clone()),
            Step::Complete => return Ok(request(OP_COMPLETE, HEADER)),
            Step::Write(offset) => offset,
        };
        let len = (self.size - offset).min(FRAGMENT as u64) as usize;
        // Header, padding, offset, size, data.
        let mut body = request(OP_WRITE, HEADER + 4 + 8 + 4 + FRAGMENT);
        body[HEADER + 4..HEADER + 12].copy_from_slice(&offset.to_le_bytes());
        body[HEADER + 12..HEADER + 16].copy_from_slice(&(len as u32).to_le_bytes());
        source.read(offset, &mut body[HEADER + 16..HEADER + 16 + len])?;
        Ok(body)
    }
}

fn request(operation: u32, len: usize) -> Vec<u8> {
    let mut body = vec![0; len];
    body[..4].copy_from_slice(&operation.to_le_bytes());
    body
}

impl FileCopy {
    /// The service, not connected.
    pub fn new() -> Arc<Self> {
        Arc::new(Self { ic: Ic::new(&DEFINITION, None), job: Mutex::default(), restored: Mutex::default() })
    }

    /// Copies `size` bytes of a file of the host to the file `name` in the guest's directory `directory`. `progress`
    /// hears how many bytes have arrived. One copy at a time.
    pub fn copy(
        &self,
        source: File,
        size: u64,
        directory: &str,
        name: &str,
        options: CopyOptions,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(), ServiceError> {
        let field = |text: &str| {
            utf16(text, PATH_BYTES).ok_or_else(|| ServiceError::Host(format!("'{text}' is longer than 259 characters")))
        };
        // Linux's daemon puts directory and name together as they are, and makes a directory for each slash.
        let directory = if directory.ends_with('/') { directory.to_string() } else { format!("{directory}/") };
        let (name, directory) = (field(name)?, field(&directory)?);
        let mut start = request(OP_START, HEADER + 2 * PATH_BYTES + 12);
        start[HEADER..HEADER + name.len()].copy_from_slice(&name);
        let at = HEADER + PATH_BYTES;
        start[at..at + directory.len()].copy_from_slice(&directory);
        let flags =
            if options.overwrite { FLAG_OVERWRITE } else { 0 } | if options.create_path { FLAG_CREATE_PATH } else { 0 };
        let at = HEADER + 2 * PATH_BYTES;
        start[at..at + 4].copy_from_slice(&flags.to_le_bytes());
        start[at + 4..at + 12].copy_from_slice(&size.to_le_bytes());
        let (job, source) = (Job { size, start, step: Step::Start }, Arc::new(Source::File(source)));
        {
            let mut current = lock(&self.job);
            if current.is_some() {
                return Err(ServiceError::Host("a file is being copied into the guest already".into()));
            }
            *current = Some((job.clone(), source.clone()));
        }
        self.carry_on(job, &source, progress)
    }

    /// Does the steps that are left.
    fn carry_on(&self, mut job: Job, source: &Arc<Source>, progress: &mut dyn FnMut(u64)) -> Result<(), ServiceError> {
        let result = loop {
            let done = job.request(source).and_then(|body| self.ic.call(body, TIMEOUT));
            if let Err(error) = done {
                // A file that the guest would not make need not be given up.
                if job.step != Step::Start {
                    let _ = self.ic.call(request(OP_CANCEL, HEADER), TIMEOUT);
                }
                break Err(error);
            }
            if !job.advance() {
                break Ok(());
            }
            *lock(&self.job) = Some((job.clone(), source.clone()));
            progress(job.arrived());
        };
        *lock(&self.job) = None;
        result
    }

    /// Goes on with a copy of before the machine was saved.
    fn resume(&self, mut job: Job, source: &Arc<Source>) -> Result<(), ServiceError> {
        // The guest may owe the answer to the step that it was in.
        if let Some(result) = self.ic.restored_call() {
            let answered = result.recv_timeout(TIMEOUT);
            answered.unwrap_or(Err(ServiceError::Timeout(DEFINITION.name, TIMEOUT.as_secs())))?;
            if !job.advance() {
                return Ok(());
            }
        }
        self.carry_on(job, source, &mut |_| {})
    }

    /// What is left to be sent, for saving.
    fn rest(&self, job: &Job, source: &Source) -> ciborium::Value {
        let from = job.arrived();
        let len = job.size - from;
        let mut bytes = vec![0; usize::try_from(len.min(MOST_SAVED)).unwrap_or(0)];
        if len > MOST_SAVED || source.read(from, &mut bytes).is_err() {
            tracing::warn!(bytes = len, "the copy of a file into the guest cannot be saved with the machine");
            return ciborium::Value::Null;
        }
        ciborium::Value::Bytes(bytes)
    }

    /// Is the guest's daemon there?
    pub fn is_connected(&self) -> bool {
        self.ic.version().is_some()
    }

    /// This service as a device, which can start threads of its own.
    pub fn device(self: &Arc<Self>) -> Arc<dyn SyntheticDevice> {
        Arc::new(Device(self.clone()))
    }
}

/// The service on the bus.
struct Device(Arc<FileCopy>);

impl ChannelDevice for Device {
    fn offer(&self) -> OfferParams {
        self.0.ic.offer()
    }
    fn opened(&self, channel: Arc<Channel>) -> Result<(), OpenRefused> {
        self.0.ic.opened(channel)
    }
    fn closed(&self, sub_channel: u16) {
        self.0.ic.closed(sub_channel);
    }
}

/// How long saving waits for a copy to be between two steps or inside one.
const SETTLE: Duration = Duration::from_millis(500);

impl SyntheticDevice for Device {
    fn name(&self) -> &str {
        self.0.ic.name()
    }

    fn state_version(&self) -> u32 {
        2
    }

    fn save(&self) -> Result<ciborium::Value, String> {
        // The channel stands still, but the thread that copies may have taken an answer and not yet asked for the next
        // step. Until it has, the job says less than the guest knows.
        let began = Instant::now();
        while lock(&self.0.job).is_some() && !self.0.ic.is_busy() && began.elapsed() < SETTLE {
            std::thread::sleep(Duration::from_millis(1));
        }
        let current = lock(&self.0.job).clone();
        let rest = current.as_ref().map_or(ciborium::Value::Null, |(job, source)| self.0.rest(job, source));
        to_value(&State { ic: self.0.ic.save()?, job: current.map(|c| c.0), rest })
    }

    fn restore(&self, state: &ciborium::Value) -> Result<(), String> {
        let state: State = from_value(state)?;
        self.0.ic.restore(&state.ic)?;
        if let Some(job) = state.job {
            if job.arrived() > job.size {
                return Err(format!("{} of {} bytes have arrived", job.arrived(), job.size));
            }
            let source = Arc::new(match state.rest {
                ciborium::Value::Bytes(bytes) => Source::Rest(job.arrived(), bytes),
                _ => Source::Lost,
            });
            *lock(&self.0.job) = Some((job.clone(), source.clone()));
            *lock(&self.0.restored) = Some((job, source));
        }
        Ok(())
    }

    fn started(&self) {
        self.0.ic.started();
        let Some((job, source)) = lock(&self.0.restored).take() else { return };
        let service = self.0.clone();
        let resumed = std::thread::Builder::new().name("filecopy-resume".into()).spawn(move || {
            let result = service.resume(job, &source);
            *lock(&service.job) = None;
            match result {
                Ok(()) => tracing::info!("the copy that was under way when the machine was saved is complete"),
                Err(error) => tracing::warn!(%error, "the copy that was under way when the machine was saved failed"),
            }
        });
        if let Err(error) = resumed {
            tracing::warn!(%error, "the copy that was under way when the machine was saved cannot go on");
            *lock(&self.0.job) = None;
        }
    }

    fn reset(&self) {
        *lock(&self.0.restored) = None;
    }
}
