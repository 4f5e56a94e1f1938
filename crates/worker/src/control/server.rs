//! The worker's side of the control socket: which path does what.

use super::http::{self, HttpError, Reader, Request};
use super::schema::{self, State};
use crate::console::Console;
use crate::hyperv::Devices;
use crate::reporter::Reporter;
use crate::run::Order;
use crate::screen;
use base64::Engine as _;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use vsp::filecopy::CopyOptions;
use vsp::kvp::Pool;
use vsp::shutdown::ShutdownKind;

/// Clients at once.
const MOST_CLIENTS: usize = 32;
/// How long a client may take to read an answer.
const WRITE_TIME: Duration = Duration::from_secs(10);

/// What the server speaks for.
pub struct Context {
    /// Hyper-V's devices, if the machine has them.
    pub devices: Option<Arc<Devices>>,
    /// The serial console, if it is here.
    pub console: Option<Arc<Console>>,
    /// The run loop.
    pub reporter: Arc<Reporter>,
}

/// The socket, which goes away with this.
pub struct Control {
    path: PathBuf,
    clients: Arc<AtomicUsize>,
}

/// An address for a socket whose path may be longer than the 107 bytes that an address holds: through the descriptor of
/// its folder.
pub(super) fn short_address(path: &Path) -> std::io::Result<(File, PathBuf)> {
    let folder = path.parent().filter(|f| !f.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let name = path.file_name().ok_or_else(|| std::io::Error::other("the path of a socket has no name"))?;
    let folder = File::open(folder)?;
    let fd = std::os::fd::AsRawFd::as_raw_fd(&folder);
    Ok((folder, PathBuf::from(format!("/proc/self/fd/{fd}")).join(name)))
}

impl Control {
    /// Makes the socket. Clients can connect from now on; they are served after [`Control::serve`].
    ///
    /// # Errors
    /// When somebody listens there already, or the host refuses.
    pub fn bind(path: &Path) -> std::io::Result<(Self, UnixListener)> {
        if let Some(directory) = path.parent().filter(|d| !d.as_os_str().is_empty() && !d.exists()) {
            std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        }
        let (_folder, address) = short_address(path)?;
        // A socket that nobody listens on is left from a machine that was killed.
        if path.symlink_metadata().is_ok() {
            if UnixStream::connect(&address).is_ok() {
                return Err(std::io::Error::other("a machine listens there already"));
            }
            std::fs::remove_file(path)?;
        }
        let listener = UnixListener::bind(&address)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
        Ok((Self { path: path.into(), clients: Arc::default() }, listener))
    }

    /// Serves clients, each on a thread of its own.
    ///
    /// # Errors
    /// When the host gives no thread.
    pub fn serve(&self, listener: UnixListener, context: Arc<Context>) -> std::io::Result<()> {
        let clients = self.clients.clone();
        std::thread::Builder::new().name("control".into()).spawn(move || {
            for stream in listener.incoming() {
                let Ok(stream) = stream else {
                    // Out of descriptors, for example: later, without a busy loop.
                    std::thread::sleep(Duration::from_millis(100));
                    continue;
                };
                let _ = stream.set_write_timeout(Some(WRITE_TIME));
                if clients.fetch_add(1, Ordering::SeqCst) >= MOST_CLIENTS {
                    clients.fetch_sub(1, Ordering::SeqCst);
                    let _ = answer_problem(&stream, 503, "too many clients are connected to this machine");
                    continue;
                }
                let (context, counter) = (context.clone(), clients.clone());
                let served = std::thread::Builder::new().name("control-client".into()).spawn(move || {
                    serve(&stream, &context);
                    counter.fetch_sub(1, Ordering::SeqCst);
                });
                if served.is_err() {
                    clients.fetch_sub(1, Ordering::SeqCst);
                }
            }
        })?;
        Ok(())
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        // Nothing can be done if somebody else has removed it.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// An answer other than success.
struct Refusal {
    status: u16,
    error: String,
}

impl Refusal {
    fn new(status: u16, error: impl Into<String>) -> Self {
        Self { status, error: error.into() }
    }
}

/// What is wrong with the state of things, not with the request.
fn conflict(error: impl std::fmt::Display) -> Refusal {
    Refusal::new(409, error.to_string())
}

fn answer_problem(stream: &UnixStream, status: u16, error: &str) -> std::io::Result<()> {
    let body = serde_json::to_vec(&schema::Problem { error: error.into() })?;
    http::write_answer(stream, status, &body)
}

fn serve(stream: &UnixStream, context: &Context) {
    let mut reader = Reader::new(stream);
    loop {
        let request = match reader.request() {
            Ok(request) => request,
            Err(HttpError::Closed | HttpError::Io(_)) => return,
            Err(error) => {
                let status = if matches!(error, HttpError::TooLarge(_)) { 413 } else { 400 };
                // A stranger's connection is not worth more than one answer.
                let _ = answer_problem(stream, status, &error.to_string());
                return;
            }
        };
        if request.path == "/v1/console" && request.method == "GET" {
            return console(stream, &mut reader, &request, context);
        }
        let close = request.close;
        let written = match route(request, context) {
            Ok(body) => http::write_answer(stream, 200, &body),
            Err(refusal) => answer_problem(stream, refusal.status, &refusal.error),
        };
        if written.is_err() || close {
            return;
        }
    }
}

/// Hands the connection over to the serial console.
fn console(stream: &UnixStream, reader: &mut Reader<'_>, request: &Request, context: &Context) {
    let Some(console) = &context.console else {
        let _ = answer_problem(stream, 409, "this machine's serial port leads elsewhere (viridian run --serial)");
        return;
    };
    if request.upgrade.as_deref() != Some("viridian-console") {
        let _ = answer_problem(stream, 400, "the console needs `Upgrade: viridian-console`");
        return;
    }
    let history = request.query != "history=0";
    if http::write_upgrade(stream, "viridian-console").is_err() {
        return;
    }
    let typed = reader.take_rest();
    // A client that does not read is skipped over, not waited for; but it may idle.
    let _ = stream.set_read_timeout(None);
    console.serve(stream, &typed, history);
}

fn json<T: Serialize>(value: &T) -> Result<Vec<u8>, Refusal> {
    serde_json::to_vec(value).map_err(|e| Refusal::new(500, e.to_string()))
}

fn body<T: DeserializeOwned>(request: &Request) -> Result<T, Refusal> {
    let bytes: &[u8] = if request.body.is_empty() { b"{}" } else { &request.body };
    serde_json::from_slice(bytes).map_err(|e| Refusal::new(400, format!("the body is not what is expected here: {e}")))
}

/// The body of an answer that says only that it is done.
fn done<E: std::fmt::Display>(result: Result<(), E>) -> Result<Vec<u8>, Refusal> {
    result.map(|()| b"{}".to_vec()).map_err(conflict)
}

fn route(mut request: Request, context: &Context) -> Result<Vec<u8>, Refusal> {
    let path = request.path.clone();
    let Some(path) = path.strip_prefix("/v1/") else {
        return Err(Refusal::new(404, format!("there is no '{path}'; this interface begins with /v1/")));
    };
    let order = |order| done(context.reporter.order(order));
    match (request.method.as_str(), path) {
        ("GET", "machine") => json(&context.reporter.describe(context)),
        ("POST", "machine/pause") => order(Order::Pause),
        ("POST", "machine/resume") => order(Order::Resume),
        ("POST", "machine/save") => order(Order::Save),
        ("POST", "machine/turn-off") => order(Order::TurnOff),
        ("POST", "machine/reset") => order(Order::Reset),
        ("POST", "machine/power-button") => order(Order::PowerButton),
        ("GET", "screen") => {
            let screen = context.devices.as_ref().and_then(|d| d.screen.as_ref());
            let screen = screen.ok_or_else(|| conflict("this machine has no screen: only generation 2 has one"))?;
            let png = screen.png().ok_or_else(|| conflict("the guest's screen cannot be read"))?;
            json(&schema::Screenshot { png: base64::engine::general_purpose::STANDARD.encode(png) })
        }
        ("POST", "keyboard") => {
            let keys: schema::Keys = body(&request)?;
            let strokes = screen::strokes(&keys.text, &keys.keys).map_err(|e| Refusal::new(400, e.to_string()))?;
            let devices = context.devices.as_ref();
            let devices = devices.ok_or_else(|| conflict("this machine has no Hyper-V interface (--hyperv on)"))?;
            done(devices.keyboard.send(&strokes))
        }
        (method, path) if path.starts_with("guest") || path.starts_with("storage") => {
            let devices = context.devices.as_ref();
            let devices = devices.ok_or_else(|| conflict("this machine has no Hyper-V interface (--hyperv on)"))?;
            match path {
                _ if path.starts_with("guest") => guest(method, path, &request, devices, context),
                _ => {
                    let files = std::mem::take(&mut request.files);
                    storage(method, path, &request, files, devices)
                }
            }
        }
        (method, path) => Err(unknown(method, path, &["machine", "console", "screen", "keyboard"])),
    }
}

fn unknown(method: &str, path: &str, known: &[&str]) -> Refusal {
    const POSTED: &[&str] = &["pause", "resume", "save", "turn-off", "reset", "power-button"];
    let exists = known.contains(&path) || path.strip_prefix("machine/").is_some_and(|p| POSTED.contains(&p));
    match exists {
        true => Refusal::new(405, format!("{method} means nothing for /v1/{path}")),
        false => Refusal::new(404, format!("there is no /v1/{path}; docs/control.md lists what there is")),
    }
}

fn guest(
    method: &str,
    path: &str,
    request: &Request,
    devices: &Devices,
    context: &Context,
) -> Result<Vec<u8>, Refusal> {
    match (method, path) {
        ("GET", "guest") => json(&describe_guest(devices)),
        ("GET", "guest/kvp") => {
            let pool = match request.query.as_str() {
                "pool=external" => Pool::External,
                "pool=guest" => Pool::Guest,
                "" | "pool=auto" => Pool::Auto,
                other => {
                    return Err(Refusal::new(400, format!("there is no '{other}': pool=external, guest or auto")));
                }
            };
            let pairs = devices.kvp.pairs(pool).map_err(conflict)?;
            json(&pairs.into_iter().map(|(key, value)| schema::Pair { key, value }).collect::<Vec<_>>())
        }
        ("POST", "guest/kvp") => {
            let pair: schema::Pair = body(request)?;
            done(devices.kvp.set(&pair.key, &pair.value))
        }
        ("POST", "guest/kvp/delete") => {
            let key: schema::Key = body(request)?;
            done(devices.kvp.delete(&key.key))
        }
        ("POST", "guest/shutdown") => {
            let how: schema::Shutdown = body(request)?;
            context.reporter.must_be(State::Running, "shut down")?;
            let what = if how.restart { ShutdownKind::Restart } else { ShutdownKind::PowerOff };
            devices.shutdown.request(what, how.force, "Requested by the host").map_err(conflict)?;
            context.reporter.shutdown_requested(how.restart);
            Ok(b"{}".to_vec())
        }
        ("POST", "guest/freeze") => done(devices.vss.freeze()),
        ("POST", "guest/thaw") => done(devices.vss.thaw()),
        ("POST", "guest/copy") => {
            let what: schema::Copy = body(request)?;
            let [file] = request.files.as_slice() else {
                return Err(Refusal::new(400, "the file to copy must come along with the request (SCM_RIGHTS)"));
            };
            let file = File::from(file.try_clone().map_err(|e| Refusal::new(500, e.to_string()))?);
            copy_file(devices, file, &what)
        }
        (method, path) => Err(unknown(method, path, &["guest", "guest/kvp", "guest/kvp/delete", "guest/shutdown"])),
    }
}

fn copy_file(devices: &Devices, file: File, what: &schema::Copy) -> Result<Vec<u8>, Refusal> {
    let metadata = file.metadata().map_err(|e| Refusal::new(400, e.to_string()))?;
    if !metadata.is_file() {
        return Err(Refusal::new(400, "only a regular file can be copied into the guest"));
    }
    let bad = || Refusal::new(400, "the guest's path must be absolute: /directory/name");
    let (directory, name) = what.target.rsplit_once('/').ok_or_else(bad)?;
    let directory = if directory.is_empty() { "/" } else { directory };
    let options = CopyOptions { overwrite: what.overwrite, create_path: what.create_path };
    done(devices.file_copy.copy(file, metadata.len(), directory, name, options, &mut |_| {}))
}

fn describe_guest(devices: &Devices) -> schema::Guest {
    use vsp::heartbeat::Status;
    let bus = devices.interface.bus();
    schema::Guest {
        os_id: devices.interface.partition().guest_os_id(),
        vmbus: bus.version().map(|v| v.to_string()),
        channels: bus.open_channels() as u64,
        heartbeat: match devices.heartbeat.status() {
            Status::NoContact => schema::Heartbeat::NoContact,
            Status::Ok => schema::Heartbeat::Ok,
            Status::LostCommunication => schema::Heartbeat::LostCommunication,
        },
        keyboard: devices.keyboard.is_connected(),
        shutdown: devices.shutdown.is_connected(),
        kvp: devices.kvp.is_connected(),
        vss: devices.vss.is_connected(),
        file_copy: devices.file_copy.is_connected(),
    }
}

/// The files of a request with the paths that it names for them.
fn given(images: schema::Images, files: Vec<OwnedFd>) -> Result<Vec<(PathBuf, File)>, Refusal> {
    if images.paths.len() != files.len() {
        let error = format!("{} paths were named and {} files came along", images.paths.len(), files.len());
        return Err(Refusal::new(400, error));
    }
    Ok(images.paths.into_iter().zip(files.into_iter().map(File::from)).collect())
}

fn storage(
    method: &str,
    path: &str,
    request: &Request,
    files: Vec<OwnedFd>,
    devices: &Devices,
) -> Result<Vec<u8>, Refusal> {
    let units = &devices.units;
    match (method, path) {
        ("GET", "storage") => json(&units.describe()),
        ("POST", "storage/attach") => {
            let what: schema::Attach = body(request)?;
            done(units.attach(what.unit, given(what.files, files)?))
        }
        ("POST", "storage/detach") => {
            let place: schema::Place = body(request)?;
            done(units.detach(place.controller, place.lun))
        }
        ("POST", "storage/insert") => {
            let what: schema::Insert = body(request)?;
            done(units.insert(what.drive.controller, what.drive.lun, what.image, given(what.files, files)?))
        }
        ("POST", "storage/eject") => {
            let what: schema::Eject = body(request)?;
            done(units.eject(what.drive.controller, what.drive.lun, what.force))
        }
        ("POST", "storage/resize") => {
            let what: schema::Resize = body(request)?;
            done(units.resize(what.disk.controller, what.disk.lun, what.size))
        }
        ("POST", "storage/limit") => {
            let what: schema::Limit = body(request)?;
            done(units.limit(what.disk.controller, what.disk.lun, what.limits))
        }
        (method, path) => Err(unknown(method, path, &["storage", "storage/attach", "storage/detach"])),
    }
}

impl From<String> for Refusal {
    fn from(error: String) -> Self {
        Self { status: 409, error }
    }
}
