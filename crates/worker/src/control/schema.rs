//! What goes over the control socket. Every type here is part of the interface that docs/control.md describes.

use machine::{IoLimits, StorageUnit, UnitKind};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Version of the interface: the first part of every path.
pub const VERSION: &str = "v1";

/// State of a virtual machine, with Hyper-V's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Nothing runs and nothing is saved.
    Off,
    /// The worker prepares the machine.
    Starting,
    /// The guest runs.
    Running,
    /// The guest stands still and keeps its memory.
    Paused,
    /// The guest was asked to shut down.
    Stopping,
    /// The state is being written.
    Saving,
    /// The state is in a file; starting goes on from it.
    Saved,
}

impl State {
    /// As people read it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Off => "Off",
            Self::Starting => "Starting",
            Self::Running => "Running",
            Self::Paused => "Paused",
            Self::Stopping => "Stopping",
            Self::Saving => "Saving",
            Self::Saved => "Saved",
        }
    }
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

/// `GET /v1/machine`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// Its state.
    pub state: State,
    /// Process id of the worker, in the worker's own view.
    pub pid: u32,
    /// Engine that executes it: `soft` or `kvm`.
    pub engine: String,
    /// Processor model.
    pub cpu_model: String,
    /// Virtual processors.
    pub processors: u32,
    /// RAM in bytes.
    pub memory_bytes: u64,
    /// Seconds that the guest has run: its clock, which stands while it is paused.
    pub uptime_seconds: f64,
    /// Seconds that its virtual processors have executed guest code, added up.
    pub processor_seconds: f64,
    /// Has the machine Hyper-V's interface, and so the resources below `/v1/guest`?
    pub hyperv: bool,
    /// Can the serial console be had here?
    pub console: bool,
    /// What confines the worker.
    pub sandbox: Sandbox,
}

/// What confines a worker, and what could not be applied on this host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sandbox {
    /// Measures in force.
    pub applied: Vec<String>,
    /// Measures that this host refused, with the reason.
    pub missing: Vec<String>,
}

/// `GET /v1/guest`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Guest {
    /// Guest OS identity as the guest told it (TLFS 2.6), 0 if it did not.
    pub os_id: u64,
    /// Version of VMBus that the guest speaks.
    pub vmbus: Option<String>,
    /// Open channels.
    pub channels: u64,
    /// Heartbeat.
    pub heartbeat: Heartbeat,
    /// Has the guest a driver for the synthetic keyboard?
    #[serde(default)]
    pub keyboard: bool,
    /// Is the shutdown service connected?
    pub shutdown: bool,
    /// Data exchange?
    pub kvp: bool,
    /// Backup?
    pub vss: bool,
    /// File copy?
    pub file_copy: bool,
}

/// `GET /v1/screen`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Screenshot {
    /// What the guest shows: a PNG in Base64.
    pub png: String,
}

/// `POST /v1/keyboard`: types the text, then presses the keys.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Keys {
    /// Text for a US keyboard; a line feed is the Enter key.
    #[serde(default)]
    pub text: String,
    /// Keys and combinations by name, such as `f2` and `ctrl-alt-delete`.
    #[serde(default)]
    pub keys: Vec<String>,
}

/// State of the heartbeat.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Heartbeat {
    /// The guest has not answered yet.
    NoContact,
    /// The guest answers.
    Ok,
    /// The guest has answered and does no longer.
    LostCommunication,
}

impl Heartbeat {
    /// As people read it.
    pub fn name(self) -> &'static str {
        match self {
            Self::NoContact => "no contact",
            Self::Ok => "ok",
            Self::LostCommunication => "lost communication",
        }
    }
}

/// A key and its value.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pair {
    /// Key.
    pub key: String,
    /// Value.
    pub value: String,
}

/// `POST /v1/guest/kvp/delete`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Key {
    /// Key.
    pub key: String,
}

/// `POST /v1/guest/shutdown`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shutdown {
    /// Restart instead of switching off.
    #[serde(default)]
    pub restart: bool,
    /// Without asking applications.
    #[serde(default)]
    pub force: bool,
}

/// `POST /v1/guest/copy`; the file comes along with the request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Copy {
    /// Path in the guest.
    pub target: String,
    /// Replace an existing file.
    #[serde(default)]
    pub overwrite: bool,
    /// Make missing directories.
    #[serde(default)]
    pub create_path: bool,
}

/// Images that come along with a request: the files, in the order of the paths.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Images {
    /// Absolute path of the image and then of each parent.
    pub paths: Vec<PathBuf>,
}

/// `POST /v1/storage/attach`: adds a disk or a drive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attach {
    /// Where and what.
    pub unit: StorageUnit,
    /// Files passed along.
    #[serde(default)]
    pub files: Images,
}

/// `POST /v1/storage/detach`: removes a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Place {
    /// Controller.
    pub controller: u32,
    /// Unit.
    pub lun: u8,
}

/// `POST /v1/storage/insert`: puts a disc into a drive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Insert {
    /// The drive.
    pub drive: Place,
    /// The image.
    pub image: PathBuf,
    /// Files passed along.
    #[serde(default)]
    pub files: Images,
}

/// `POST /v1/storage/eject`: takes the disc out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Eject {
    /// The drive.
    pub drive: Place,
    /// Even if the guest has locked the tray.
    #[serde(default)]
    pub force: bool,
}

/// One unit in the answer to `GET /v1/storage`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unit {
    /// Controller.
    pub controller: u32,
    /// Unit.
    pub lun: u8,
    /// Disk or drive.
    pub kind: UnitKind,
    /// For a drive: whether there is a disc in it.
    pub medium: bool,
    /// For a disk: its size in bytes.
    #[serde(default)]
    pub size: Option<u64>,
    /// For a disk: its limits.
    #[serde(default)]
    pub limits: IoLimits,
    /// The disk has had less than its minimum since the limits were set.
    #[serde(default)]
    pub alert: Option<LimitAlert>,
}

/// A disk's minimum was missed, with requests waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LimitAlert {
    /// Operations of 8 KiB in the second that was looked at last.
    pub got: u32,
    /// How many seconds were below the minimum.
    pub count: u64,
}

/// `POST /v1/storage/resize`: changes a disk's size while the guest uses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Resize {
    /// The disk.
    pub disk: Place,
    /// The new size in bytes. Smaller than its content is refused.
    pub size: u64,
}

/// `POST /v1/storage/limit`: limits a disk; limits of before no longer count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limit {
    /// The disk.
    pub disk: Place,
    /// Its limits.
    pub limits: IoLimits,
}

/// The body of every answer that is not a success.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// One sentence for people: what is wrong and, where it helps, what to do.
    pub error: String,
}
