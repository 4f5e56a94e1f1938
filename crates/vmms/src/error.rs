//! What goes wrong, in words that say what to do.

use std::path::{Path, PathBuf};
use thiserror::Error;
use worker::control::client::ClientError;
use worker::control::schema::State;

/// The result of most functions here.
pub type Result<T> = std::result::Result<T, Error>;

/// An error.
#[derive(Debug, Error)]
pub enum Error {
    /// The host refused a file operation.
    #[error("{}: cannot {what}: {source}{}", .path.display(), hint(.source))]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What was tried, as "write the configuration".
        what: &'static str,
        /// What the host said.
        source: std::io::Error,
    },
    /// A file of the inventory is not what it should be.
    #[error("{}:{line}: {reason}; mend the file, or remove the VM's folder", .path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Line, from 1; 0 if there is none to blame.
        line: usize,
        /// What is wrong.
        reason: String,
    },
    /// There is no such VM.
    #[error("there is no VM '{name}'{hint}")]
    NoSuchVm {
        /// As it was asked for, shortened.
        name: String,
        /// What might have been meant.
        hint: String,
    },
    /// Another VM has the name.
    #[error("there is a VM '{0}' already: choose another name, or `viridian vm remove` it")]
    NameTaken(String),
    /// A name that no VM may have.
    #[error("{0}")]
    BadName(String),
    /// A configuration that cannot be.
    #[error("{0}")]
    Config(String),
    /// An image of no use.
    #[error("{0}")]
    Image(String),
    /// Somebody else is at it.
    #[error("another command is changing {0}; try again when it has ended")]
    Busy(String),
    /// The VM's state does not allow it.
    #[error("'{name}' is {state}: {advice}")]
    State {
        /// The VM.
        name: String,
        /// Its state.
        state: State,
        /// What to do.
        advice: String,
    },
    /// The worker does not do it.
    #[error("{0}")]
    Worker(#[from] ClientError),
    /// The worker could not start the machine.
    #[error("'{name}' could not start: {reason}")]
    Start {
        /// The VM.
        name: String,
        /// Why, and where more is said.
        reason: String,
    },
    /// It takes too long.
    #[error("{0}")]
    Timeout(String),
}

/// What to do about an error of the host.
fn hint(error: &std::io::Error) -> &'static str {
    use std::io::ErrorKind;
    match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => "; free some space there, nothing was changed",
        ErrorKind::ReadOnlyFilesystem => "; the store is on a read-only file system (choose another with --store)",
        ErrorKind::PermissionDenied => {
            "; choose a store of your own with --store, or become the user that owns this one"
        }
        _ => "",
    }
}

impl From<(&Path, vhd::Error)> for Error {
    fn from((path, error): (&Path, vhd::Error)) -> Self {
        Self::Image(worker::units::image_error(path, &error))
    }
}

impl Error {
    /// A closure for `map_err`.
    pub(crate) fn io<'a>(path: &'a Path, what: &'static str) -> impl FnOnce(std::io::Error) -> Self + 'a {
        move |source| Self::Io { path: path.into(), what, source }
    }

    /// Exit status of a command that fails so.
    pub fn status(&self) -> u8 {
        match self {
            Self::Io { .. } | Self::Start { .. } => 1,
            Self::Worker(ClientError::Refused(_)) | Self::State { .. } => 4,
            Self::Worker(ClientError::Hangs { .. }) | Self::Timeout(_) | Self::Busy(_) => 5,
            Self::Worker(_) => 1,
            Self::NoSuchVm { .. } => 3,
            Self::Damaged { .. } | Self::NameTaken(_) | Self::BadName(_) | Self::Config(_) | Self::Image(_) => 2,
        }
    }
}

/// A text as part of a message: not longer than a line, and without what a terminal would obey.
pub fn shortened(text: &str) -> String {
    let clean: String = text.chars().take(60).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect();
    if text.chars().count() > 60 { format!("{clean}…") } else { clean }
}
