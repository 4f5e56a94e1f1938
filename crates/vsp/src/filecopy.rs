//! Guest file copy: a file from the host into the guest.

use crate::ic::{Definition, Ic, ServiceError, service, utf16, v};
use std::io::Read;
use std::sync::Arc;
use std::time::Duration;
use vmbus::protocol::class;
use vmbus::protocol::service::kind;

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

/// The service.
pub struct FileCopy {
    pub(crate) ic: Arc<Ic>,
}

/// How a file is copied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CopyOptions {
    /// Replace a file that exists.
    pub overwrite: bool,
    /// Make missing directories.
    pub create_path: bool,
}

fn request(operation: u32, len: usize) -> Vec<u8> {
    let mut body = vec![0; len];
    body[..4].copy_from_slice(&operation.to_le_bytes());
    body
}

impl FileCopy {
    /// The service, not connected.
    pub fn new() -> Arc<Self> {
        Arc::new(Self { ic: Ic::new(&DEFINITION, None) })
    }

    /// Copies `size` bytes from `source` to the file `name` in the guest's directory `directory`. `progress` hears how
    /// many bytes have arrived.
    pub fn copy(
        &self,
        source: &mut dyn Read,
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
        let mut body = request(OP_START, HEADER + 2 * PATH_BYTES + 12);
        body[HEADER..HEADER + name.len()].copy_from_slice(&name);
        let at = HEADER + PATH_BYTES;
        body[at..at + directory.len()].copy_from_slice(&directory);
        let flags =
            if options.overwrite { FLAG_OVERWRITE } else { 0 } | if options.create_path { FLAG_CREATE_PATH } else { 0 };
        let at = HEADER + 2 * PATH_BYTES;
        body[at..at + 4].copy_from_slice(&flags.to_le_bytes());
        body[at + 4..at + 12].copy_from_slice(&size.to_le_bytes());
        self.ic.call(body, TIMEOUT)?;
        let result = self.fragments(source, size, progress);
        let last = if result.is_ok() { OP_COMPLETE } else { OP_CANCEL };
        let ended = self.ic.call(request(last, HEADER), TIMEOUT).map(|_| ());
        result.and(ended)
    }

    fn fragments(&self, source: &mut dyn Read, size: u64, progress: &mut dyn FnMut(u64)) -> Result<(), ServiceError> {
        let mut offset = 0;
        while offset < size {
            let len = (size - offset).min(FRAGMENT as u64) as usize;
            // Header, padding, offset, size, data.
            let mut body = request(OP_WRITE, HEADER + 4 + 8 + 4 + FRAGMENT);
            body[HEADER + 4..HEADER + 12].copy_from_slice(&offset.to_le_bytes());
            body[HEADER + 12..HEADER + 16].copy_from_slice(&(len as u32).to_le_bytes());
            source
                .read_exact(&mut body[HEADER + 16..HEADER + 16 + len])
                .map_err(|e| ServiceError::Host(format!("reading the file: {e}")))?;
            self.ic.call(body, TIMEOUT)?;
            offset += len as u64;
            progress(offset);
        }
        Ok(())
    }

    /// Is the guest's daemon there?
    pub fn is_connected(&self) -> bool {
        self.ic.version().is_some()
    }
}

service!(FileCopy);
