//! Where messages and events of the guest go (TLFS chapter 11: ports and connections).

use partition::VpIndex;
use std::collections::HashMap;
use std::sync::{Arc, RwLock};

/// A port cannot take the message now; the guest gets `HV_STATUS_INSUFFICIENT_BUFFERS` and tries again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the port's queue is full")]
pub struct PortFull;

/// Takes messages that the guest posts (`HvCallPostMessage`). Called on the VP's thread: must not block.
pub trait MessagePort: Send + Sync {
    /// One message; the payload has at most 240 bytes.
    fn post(&self, vp: VpIndex, message_type: u32, payload: &[u8]) -> Result<(), PortFull>;
}

/// Takes events that the guest signals (`HvCallSignalEvent`). Called on the VP's thread: must not block.
pub trait EventPort: Send + Sync {
    /// The event with this flag number.
    fn signal(&self, flag: u16);
}

/// Connections by their id (24 bits).
#[derive(Default)]
pub(crate) struct Ports {
    messages: RwLock<HashMap<u32, Arc<dyn MessagePort>>>,
    events: RwLock<HashMap<u32, (Arc<dyn EventPort>, u16)>>,
}

impl Ports {
    pub(crate) fn message(&self, connection: u32) -> Option<Arc<dyn MessagePort>> {
        self.messages.read().unwrap_or_else(|e| e.into_inner()).get(&connection).cloned()
    }

    pub(crate) fn event(&self, connection: u32) -> Option<(Arc<dyn EventPort>, u16)> {
        self.events.read().unwrap_or_else(|e| e.into_inner()).get(&connection).cloned()
    }

    pub(crate) fn set_message(&self, connection: u32, port: Option<Arc<dyn MessagePort>>) {
        let mut map = self.messages.write().unwrap_or_else(|e| e.into_inner());
        match port {
            Some(port) => map.insert(connection, port),
            None => map.remove(&connection),
        };
    }

    pub(crate) fn set_event(&self, connection: u32, port: Option<(Arc<dyn EventPort>, u16)>) {
        let mut map = self.events.write().unwrap_or_else(|e| e.into_inner());
        match port {
            Some(port) => map.insert(connection, port),
            None => map.remove(&connection),
        };
    }
}
