//! Shutdown: the host asks the guest to shut down or restart.

use crate::ic::{Definition, Ic, ServiceError, service, v};
use std::sync::Arc;
use std::time::Duration;
use vmbus::protocol::class;
use vmbus::protocol::service::kind;

static DEFINITION: Definition = Definition {
    name: "shutdown",
    class: class::SHUTDOWN,
    instance: class::SHUTDOWN_INSTANCE,
    kind: kind::SHUTDOWN,
    versions: &[v(1, 0), v(3, 0), v(3, 1), v(3, 2)],
};

/// Bytes of the text that a guest may show.
const MESSAGE_BYTES: usize = 2048;
/// Reason code: other, planned (`SHTDN_REASON_FLAG_PLANNED`).
const REASON_PLANNED: u32 = 0x8000_0000;

/// What the guest is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShutdownKind {
    /// Power off.
    PowerOff,
    /// Restart.
    Restart,
    /// Hibernate (version 3.2 and guests that can).
    Hibernate,
}

/// The service.
pub struct Shutdown {
    pub(crate) ic: Arc<Ic>,
}

impl Shutdown {
    /// The service, not connected.
    pub fn new() -> Arc<Self> {
        Arc::new(Self { ic: Ic::new(&DEFINITION, None) })
    }

    /// Asks the guest; it has begun when this returns. `force`: applications are not asked. `message` is cut to what
    /// fits.
    pub fn request(&self, what: ShutdownKind, force: bool, message: &str) -> Result<(), ServiceError> {
        let flags = u32::from(force)
            | match what {
                ShutdownKind::PowerOff => 0,
                ShutdownKind::Restart => 2,
                ShutdownKind::Hibernate => 4,
            };
        let mut body = Vec::with_capacity(12 + MESSAGE_BYTES);
        body.extend(REASON_PLANNED.to_le_bytes());
        body.extend(0u32.to_le_bytes());
        body.extend(flags.to_le_bytes());
        let text: Vec<u8> = message.encode_utf16().take(MESSAGE_BYTES / 2 - 1).flat_map(u16::to_le_bytes).collect();
        body.extend(text);
        body.resize(12 + MESSAGE_BYTES, 0);
        self.ic.call(body, Duration::from_secs(30)).map(|_| ())
    }

    /// Is the guest's driver there?
    pub fn is_connected(&self) -> bool {
        self.ic.version().is_some()
    }
}

service!(Shutdown);
