//! The side of those who ask a worker something.

use super::http::{self, HttpError, Reader};
use super::schema::{self, VERSION};
use super::server::short_address;
use base64::Engine as _;
use machine::{IoLimits, StorageUnit};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;
use thiserror::Error;

/// Answers that need no work in the guest.
const SOON: Duration = Duration::from_secs(10);
/// Answers that wait for requests in flight.
const PAUSE: Duration = Duration::from_secs(60);
/// Answers that wait for the guest, or for a disk.
const LONG: Duration = Duration::from_secs(600);

/// Why nothing came of a request.
#[derive(Debug, Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error("no machine answers at {}: {source}", .path.display())]
    Unreachable {
        /// The socket.
        path: PathBuf,
        /// What the host said.
        source: std::io::Error,
    },
    /// The worker has taken the request and does not answer.
    #[error("the worker does not answer within {seconds} s; if it stays so, end it with `vm stop --turn-off`")]
    Hangs {
        /// How long was waited.
        seconds: u64,
    },
    /// The connection broke.
    #[error("the machine has ended before it answered")]
    Ended,
    /// The answer is no answer.
    #[error("the worker's answer makes no sense: {0}")]
    Nonsense(String),
    /// The worker says no.
    #[error("{0}")]
    Refused(String),
}

/// A way to a worker.
#[derive(Clone, Debug)]
pub struct Client {
    path: PathBuf,
    soon: Duration,
}

impl Client {
    /// A client of the socket at `path`; connects at each request.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), soon: SOON }
    }

    /// Waits at most this long for an answer that needs no work in the guest.
    #[must_use]
    pub fn patience(mut self, soon: Duration) -> Self {
        self.soon = soon;
        self
    }

    /// The socket.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn connect(&self) -> Result<UnixStream, ClientError> {
        let failed = |source| ClientError::Unreachable { path: self.path.clone(), source };
        let (_folder, address) = short_address(&self.path).map_err(failed)?;
        let stream = UnixStream::connect(address).map_err(failed)?;
        stream.set_write_timeout(Some(self.soon)).map_err(failed)?;
        Ok(stream)
    }

    fn send<T: DeserializeOwned>(
        &self,
        method: &str,
        path: &str,
        body: &impl Serialize,
        files: &[File],
        limit: Duration,
    ) -> Result<T, ClientError> {
        let stream = self.connect()?;
        let body = serde_json::to_vec(body).map_err(|e| ClientError::Nonsense(e.to_string()))?;
        let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        let target = format!("/{VERSION}/{path}");
        http::write_request(&stream, method, &target, None, &body, &files).map_err(|e| broken(e.into(), limit))?;
        let answer = Reader::new(&stream).answer(limit).map_err(|e| broken(e, limit))?;
        if answer.status == 200 {
            return serde_json::from_slice(&answer.body).map_err(|e| ClientError::Nonsense(e.to_string()));
        }
        match serde_json::from_slice::<schema::Problem>(&answer.body) {
            Ok(problem) => Err(ClientError::Refused(problem.error)),
            Err(_) => Err(ClientError::Nonsense(format!("status {} without a reason", answer.status))),
        }
    }

    fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.send("GET", path, &serde_json::json!({}), &[], self.soon)
    }

    fn post(&self, path: &str, body: &impl Serialize, files: &[File], limit: Duration) -> Result<(), ClientError> {
        self.send::<serde_json::Value>("POST", path, body, files, limit).map(drop)
    }

    /// The machine.
    ///
    /// # Errors
    /// [`ClientError`], as all methods.
    pub fn machine(&self) -> Result<schema::Machine, ClientError> {
        self.get("machine")
    }

    /// `pause`, `resume`, `turn-off`, `reset` or `power-button`.
    ///
    /// # Errors
    /// When the machine's state does not allow it.
    pub fn order(&self, order: &str) -> Result<(), ClientError> {
        let limit = match order {
            "turn-off" => self.soon,
            // Requests in flight end first.
            "pause" | "resume" | "reset" | "power-button" => PAUSE,
            _ => LONG,
        };
        self.post(&format!("machine/{order}"), &serde_json::json!({}), &[], limit)
    }

    /// Saves the machine, which ends its worker.
    ///
    /// # Errors
    /// When it cannot be saved; then it runs on.
    pub fn save(&self) -> Result<(), ClientError> {
        self.order("save")
    }

    /// What is known of the guest.
    ///
    /// # Errors
    /// [`ClientError`]
    pub fn guest(&self) -> Result<schema::Guest, ClientError> {
        self.get("guest")
    }

    /// What the guest shows, as a PNG.
    ///
    /// # Errors
    /// When the machine has no screen.
    pub fn screenshot(&self) -> Result<Vec<u8>, ClientError> {
        let answer: schema::Screenshot = self.get("screen")?;
        base64::engine::general_purpose::STANDARD.decode(answer.png).map_err(|e| ClientError::Nonsense(e.to_string()))
    }

    /// Types on the guest's keyboard.
    ///
    /// # Errors
    /// When a key does not exist, or the guest has no driver for the keyboard.
    pub fn type_keys(&self, keys: &schema::Keys) -> Result<(), ClientError> {
        self.post("keyboard", keys, &[], self.soon)
    }

    /// The pairs of a pool: `external`, `guest` or `auto`.
    ///
    /// # Errors
    /// When the guest has no data exchange.
    pub fn kvp(&self, pool: &str) -> Result<Vec<schema::Pair>, ClientError> {
        self.send("GET", &format!("guest/kvp?pool={pool}"), &serde_json::json!({}), &[], LONG)
    }

    /// Gives the guest a pair.
    ///
    /// # Errors
    /// When the guest does not take it.
    pub fn kvp_set(&self, key: &str, value: &str) -> Result<(), ClientError> {
        self.post("guest/kvp", &schema::Pair { key: key.into(), value: value.into() }, &[], LONG)
    }

    /// Takes a pair back.
    ///
    /// # Errors
    /// When there is none.
    pub fn kvp_delete(&self, key: &str) -> Result<(), ClientError> {
        self.post("guest/kvp/delete", &schema::Key { key: key.into() }, &[], LONG)
    }

    /// Asks the guest to shut down or to restart.
    ///
    /// # Errors
    /// When it has no shutdown service, or refuses.
    pub fn shutdown(&self, how: schema::Shutdown) -> Result<(), ClientError> {
        self.post("guest/shutdown", &how, &[], LONG)
    }

    /// `freeze` or `thaw`.
    ///
    /// # Errors
    /// When the guest has no backup service, or refuses.
    pub fn backup(&self, what: &str) -> Result<(), ClientError> {
        self.post(&format!("guest/{what}"), &serde_json::json!({}), &[], LONG)
    }

    /// Copies a file into the guest.
    ///
    /// # Errors
    /// When the guest has no file copy service, or refuses.
    pub fn copy(&self, source: File, what: &schema::Copy) -> Result<(), ClientError> {
        self.post("guest/copy", what, &[source], LONG)
    }

    /// The units of all controllers.
    ///
    /// # Errors
    /// [`ClientError`]
    pub fn storage(&self) -> Result<Vec<schema::Unit>, ClientError> {
        self.get("storage")
    }

    /// Adds a disk or drive; `files` are its image and the image's parents ([`open_images`]).
    ///
    /// # Errors
    /// When the place is taken or the image of no use.
    pub fn attach(&self, unit: StorageUnit, files: Vec<(PathBuf, File)>) -> Result<(), ClientError> {
        let (paths, files): (Vec<_>, Vec<_>) = files.into_iter().unzip();
        self.post("storage/attach", &schema::Attach { unit, files: schema::Images { paths } }, &files, LONG)
    }

    /// Removes a disk or drive.
    ///
    /// # Errors
    /// When there is none.
    pub fn detach(&self, place: schema::Place) -> Result<(), ClientError> {
        self.post("storage/detach", &place, &[], LONG)
    }

    /// Puts a disc into a drive.
    ///
    /// # Errors
    /// When there is one in it, or the image is of no use.
    pub fn insert(&self, drive: schema::Place, image: &Path, files: Vec<(PathBuf, File)>) -> Result<(), ClientError> {
        let (paths, files): (Vec<_>, Vec<_>) = files.into_iter().unzip();
        let what = schema::Insert { drive, image: image.into(), files: schema::Images { paths } };
        self.post("storage/insert", &what, &files, LONG)
    }

    /// Takes the disc out.
    ///
    /// # Errors
    /// When the guest has locked the tray, or there is no disc.
    pub fn eject(&self, drive: schema::Place, force: bool) -> Result<(), ClientError> {
        self.post("storage/eject", &schema::Eject { drive, force }, &[], LONG)
    }

    /// Changes a disk's size while the guest uses it.
    ///
    /// # Errors
    /// When the size is not possible, or too small for what the disk holds.
    pub fn resize(&self, disk: schema::Place, size: u64) -> Result<(), ClientError> {
        self.post("storage/resize", &schema::Resize { disk, size }, &[], LONG)
    }

    /// Limits a disk.
    ///
    /// # Errors
    /// When there is no such disk.
    pub fn limit(&self, disk: schema::Place, limits: IoLimits) -> Result<(), ClientError> {
        self.post("storage/limit", &schema::Limit { disk, limits }, &[], LONG)
    }

    /// The serial console: a connection whose bytes are the port's, and what has come with the answer. With `history`,
    /// it begins with what the guest has written before.
    ///
    /// # Errors
    /// When the port leads elsewhere.
    pub fn console(&self, history: bool) -> Result<(UnixStream, Vec<u8>), ClientError> {
        let stream = self.connect()?;
        let target = format!("/{VERSION}/console?history={}", u8::from(history));
        let limit = self.soon;
        http::write_request(&stream, "GET", &target, Some("viridian-console"), b"", &[])
            .map_err(|e| broken(e.into(), limit))?;
        let answer = Reader::new(&stream).answer(limit).map_err(|e| broken(e, limit))?;
        if answer.status == 101 {
            stream.set_read_timeout(None).map_err(|e| broken(e.into(), limit))?;
            stream.set_write_timeout(None).map_err(|e| broken(e.into(), limit))?;
            return Ok((stream, answer.rest));
        }
        match serde_json::from_slice::<schema::Problem>(&answer.body) {
            Ok(problem) => Err(ClientError::Refused(problem.error)),
            Err(_) => Err(ClientError::Nonsense(format!("status {} without a reason", answer.status))),
        }
    }
}

fn broken(error: HttpError, limit: Duration) -> ClientError {
    use std::io::ErrorKind::{BrokenPipe, ConnectionReset, TimedOut, WouldBlock};
    match error {
        HttpError::Io(e) if matches!(e.kind(), TimedOut | WouldBlock) => {
            ClientError::Hangs { seconds: limit.as_secs() }
        }
        HttpError::Io(e) if matches!(e.kind(), BrokenPipe | ConnectionReset) => ClientError::Ended,
        HttpError::Closed => ClientError::Ended,
        other => ClientError::Nonsense(other.to_string()),
    }
}

/// Opens an image and its parents for a worker that may not open them itself. The worker takes the locks.
///
/// # Errors
/// When one cannot be opened, or the chain is broken.
pub fn open_images(image: &Path, write: bool) -> Result<Vec<(PathBuf, File)>, vhd::Error> {
    let look = vhd::OpenOptions { lock: Some(vhd::Lock::None), io: vhd::Io::Blocking, ..Default::default() };
    let parents = vhd::Disk::open(image, &look)?.info().parents.clone();
    let read_only = vhd::Format::from_name(image) == Some(vhd::Format::Iso);
    let open = |path: PathBuf, write: bool| match File::options().read(true).write(write).open(&path) {
        Ok(file) => Ok((path, file)),
        Err(source) => Err(vhd::Error::Io { path, what: "open", source }),
    };
    let child = open(image.to_path_buf(), write && !read_only);
    std::iter::once(child).chain(parents.into_iter().map(|p| open(p, false))).collect()
}
