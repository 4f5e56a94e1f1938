//! Backup (VSS): freezing and thawing the guest's file systems.

use crate::ic::{Definition, Ic, ServiceError, service, v};
use std::sync::Arc;
use std::time::Duration;
use vmbus::protocol::class;
use vmbus::protocol::service::kind;

static DEFINITION: Definition = Definition {
    name: "vss",
    class: class::VSS,
    instance: class::VSS_INSTANCE,
    kind: kind::VSS,
    versions: &[v(1, 0), v(3, 0), v(4, 0), v(5, 0), v(6, 0), v(7, 0)],
};

const OP_HOT_BACKUP: u8 = 2;
const OP_FREEZE: u8 = 5;
const OP_THAW: u8 = 6;
/// Guests give up after 15 minutes (`VSS_FREEZE_TIMEOUT`).
const FREEZE_TIMEOUT: Duration = Duration::from_secs(15 * 60);
const TIMEOUT: Duration = Duration::from_secs(30);

/// The service.
pub struct Vss {
    pub(crate) ic: Arc<Ic>,
}

impl Vss {
    /// The service, not connected.
    pub fn new() -> Arc<Self> {
        Arc::new(Self { ic: Ic::new(&DEFINITION, None) })
    }

    fn call(&self, operation: u8, timeout: Duration) -> Result<Vec<u8>, ServiceError> {
        let mut body = vec![0; 12];
        body[0] = operation;
        self.ic.call(body, timeout)
    }

    /// Freezes the guest's file systems: what they hold is on the disks, and nothing changes until the thaw.
    pub fn freeze(&self) -> Result<(), ServiceError> {
        // Is the guest ready for a backup at all?
        self.call(OP_HOT_BACKUP, TIMEOUT)?;
        self.call(OP_FREEZE, FREEZE_TIMEOUT).map(|_| ())
    }

    /// Thaws them.
    pub fn thaw(&self) -> Result<(), ServiceError> {
        self.call(OP_THAW, TIMEOUT).map(|_| ())
    }

    /// Is the guest's daemon there?
    pub fn is_connected(&self) -> bool {
        self.ic.version().is_some()
    }
}

service!(Vss);
