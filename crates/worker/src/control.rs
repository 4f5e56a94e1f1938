//! The control socket of a running machine: one JSON request a line, one JSON answer a line.
//!
//! Only the user who runs the machine can reach it (the socket's directory is theirs alone).

use crate::hyperv::{Devices, unit};
use machine::StorageUnit;
use serde::{Deserialize, Serialize};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use vsp::filecopy::CopyOptions;
use vsp::heartbeat::Status as Heartbeat;
use vsp::kvp::Pool;
use vsp::shutdown::ShutdownKind;

/// Longest request.
const MOST_BYTES: u64 = 64 << 10;
/// Clients at once.
const MOST_CLIENTS: usize = 16;

/// What a client may ask.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case")]
pub enum Request {
    /// What is known of the guest.
    Status,
    /// The pairs of a pool (external, guest, auto).
    KvpList {
        /// The pool.
        pool: String,
    },
    /// Gives the guest a pair.
    KvpSet {
        /// Key.
        key: String,
        /// Value.
        value: String,
    },
    /// Takes a pair back.
    KvpDelete {
        /// Key.
        key: String,
    },
    /// Shuts the guest down, or restarts it.
    Shutdown {
        /// Restart.
        restart: bool,
        /// Without asking applications.
        force: bool,
    },
    /// Freezes the file systems.
    Freeze,
    /// Thaws them.
    Thaw,
    /// Copies a file of the host into the guest.
    Copy {
        /// The host's file, an absolute path.
        source: PathBuf,
        /// Path in the guest.
        target: String,
        /// Replace an existing file.
        overwrite: bool,
        /// Make missing directories.
        create_path: bool,
    },
    /// Adds a disk or drive while the guest runs.
    Attach {
        /// Where and what.
        unit: StorageUnit,
    },
    /// Removes a disk or drive.
    Detach {
        /// Controller.
        controller: u32,
        /// Unit.
        lun: u8,
    },
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// Done.
    Done,
    /// Names and values.
    Pairs(Vec<(String, String)>),
    /// It did not work.
    Error(String),
}

/// Where the socket of a machine with this name is; a name with a slash is a path.
pub fn socket_path(name: &str) -> PathBuf {
    if name.contains('/') {
        return name.into();
    }
    let base = std::env::var_os("XDG_RUNTIME_DIR").map_or_else(
        || std::env::temp_dir().join(format!("viridian-{}", rustix::process::getuid().as_raw())),
        |dir| PathBuf::from(dir).join("viridian"),
    );
    base.join(format!("{name}.sock"))
}

/// The socket, which goes away with this.
pub struct Control {
    path: PathBuf,
}

impl Control {
    /// Listens.
    pub fn start(path: &Path, devices: Arc<Devices>) -> std::io::Result<Self> {
        if let Some(directory) = path.parent().filter(|d| !d.as_os_str().is_empty() && !d.exists()) {
            std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        }
        // A socket that nobody listens on is left from a machine that was killed.
        if path.exists() {
            if UnixStream::connect(path).is_ok() {
                return Err(std::io::Error::other(format!("a machine listens on {} already", path.display())));
            }
            std::fs::remove_file(path)?;
        }
        let listener = UnixListener::bind(path)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
        let clients = Arc::new(AtomicUsize::new(0));
        std::thread::Builder::new().name("control".into()).spawn(move || {
            for stream in listener.incoming().flatten() {
                if clients.fetch_add(1, Ordering::SeqCst) >= MOST_CLIENTS {
                    clients.fetch_sub(1, Ordering::SeqCst);
                    continue;
                }
                let (devices, counter) = (devices.clone(), clients.clone());
                let served = std::thread::Builder::new().name("control-client".into()).spawn(move || {
                    serve(&stream, &devices);
                    counter.fetch_sub(1, Ordering::SeqCst);
                });
                if served.is_err() {
                    clients.fetch_sub(1, Ordering::SeqCst);
                }
            }
        })?;
        Ok(Self { path: path.into() })
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        // Nothing can be done if somebody else has removed it.
        let _ = std::fs::remove_file(&self.path);
    }
}

fn serve(stream: &UnixStream, devices: &Devices) {
    let mut reader = BufReader::new(stream);
    loop {
        let mut line = String::new();
        match reader.by_ref().take(MOST_BYTES).read_line(&mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        let answer = match serde_json::from_str(&line) {
            Ok(request) => answer(devices, request).unwrap_or_else(Answer::Error),
            Err(error) => Answer::Error(format!("this is not a request: {error}")),
        };
        let Ok(mut text) = serde_json::to_string(&answer) else { return };
        text.push('\n');
        if (&*stream).write_all(text.as_bytes()).is_err() {
            return;
        }
    }
}

/// Sends one request and waits for its answer.
pub fn ask(path: &Path, request: &Request) -> std::io::Result<Answer> {
    let mut stream = UnixStream::connect(path)?;
    let mut text = serde_json::to_string(request)?;
    text.push('\n');
    stream.write_all(text.as_bytes())?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    if line.is_empty() {
        return Err(std::io::Error::other("the machine has ended"));
    }
    Ok(serde_json::from_str(&line)?)
}

fn answer(devices: &Devices, request: Request) -> Result<Answer, String> {
    let done = |result: Result<(), vsp::ic::ServiceError>| result.map(|()| Answer::Done).map_err(|e| e.to_string());
    match request {
        Request::Status => Ok(Answer::Pairs(status(devices))),
        Request::KvpList { pool } => {
            let pool = match pool.as_str() {
                "external" => Pool::External,
                "guest" => Pool::Guest,
                "auto" => Pool::Auto,
                other => return Err(format!("there is no pool '{other}': external, guest and auto are there")),
            };
            devices.kvp.pairs(pool).map(Answer::Pairs).map_err(|e| e.to_string())
        }
        Request::KvpSet { key, value } => done(devices.kvp.set(&key, &value)),
        Request::KvpDelete { key } => done(devices.kvp.delete(&key)),
        Request::Shutdown { restart, force } => {
            let what = if restart { ShutdownKind::Restart } else { ShutdownKind::PowerOff };
            done(devices.shutdown.request(what, force, "Requested by the host"))
        }
        Request::Freeze => done(devices.vss.freeze()),
        Request::Thaw => done(devices.vss.thaw()),
        Request::Copy { source, target, overwrite, create_path } => {
            let file = std::fs::File::open(&source).map_err(|e| format!("{}: {e}", source.display()))?;
            let size = file.metadata().map_err(|e| format!("{}: {e}", source.display()))?.len();
            let (directory, name) =
                target.rsplit_once('/').ok_or("the guest's path must be absolute: /directory/name")?;
            let directory = if directory.is_empty() { "/" } else { directory };
            let options = CopyOptions { overwrite, create_path };
            done(devices.file_copy.copy(&mut BufReader::new(file), size, directory, name, options, &mut |_| {}))
        }
        Request::Attach { unit: config } => {
            let controller = devices.storage.get(&config.controller);
            let controller = controller.ok_or(format!("there is no SCSI controller {}", config.controller))?;
            let unit = unit(&config).map_err(|e| e.to_string())?;
            controller.attach(config.lun, unit).map(|()| Answer::Done).map_err(|e| e.to_string())
        }
        Request::Detach { controller, lun } => {
            let found = devices.storage.get(&controller).and_then(|c| c.detach(lun));
            found.map(|_| Answer::Done).ok_or(format!("controller {controller} has no unit {lun}"))
        }
    }
}

fn status(devices: &Devices) -> Vec<(String, String)> {
    let yes = |on: bool| if on { "connected" } else { "not connected" }.to_string();
    let heartbeat = match devices.heartbeat.status() {
        Heartbeat::NoContact => "no contact",
        Heartbeat::Ok => "ok",
        Heartbeat::LostCommunication => "lost communication",
    };
    let bus = devices.interface.bus();
    let version = bus.version().map_or("not connected".to_string(), |v| v.to_string());
    vec![
        ("guest-os-id".into(), format!("{:#x}", devices.interface.partition().guest_os_id())),
        ("vmbus".into(), version),
        ("channels".into(), bus.open_channels().to_string()),
        ("heartbeat".into(), heartbeat.into()),
        ("shutdown".into(), yes(devices.shutdown.is_connected())),
        ("kvp".into(), yes(devices.kvp.is_connected())),
        ("vss".into(), yes(devices.vss.is_connected())),
        ("file-copy".into(), yes(devices.file_copy.is_connected())),
    ]
}
