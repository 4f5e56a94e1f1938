//! A write-only port for test programs: every byte goes to a sink.
//!
//! Two conventions exist for such a port: 0xE9 (Bochs), whose reads return 0xE9 so that software can find it, and 0x402.

use crate::device::{Device, DeviceError, PortIo, Request, SavedState};
use std::ops::RangeInclusive;
use std::sync::Arc;

/// Takes the bytes that a guest writes. It must bound what it keeps.
pub trait DebugSink: Send + Sync {
    /// One byte.
    fn byte(&self, byte: u8);
}

/// The port.
pub struct DebugPort {
    name: String,
    port: u16,
    sink: Arc<dyn DebugSink>,
}

impl DebugPort {
    /// A debug port at `port`.
    pub fn new(port: u16, sink: Arc<dyn DebugSink>) -> Arc<Self> {
        Arc::new(Self { name: format!("debug-{port:x}"), port, sink })
    }
}

impl PortIo for DebugPort {
    fn port_ranges(&self) -> Vec<RangeInclusive<u16>> {
        vec![self.port..=self.port]
    }

    fn port_read(&self, _port: u16, data: &mut [u8]) {
        data.fill(0xff);
        data[0] = 0xe9;
    }

    fn port_write(&self, _port: u16, data: &[u8]) {
        self.sink.byte(data[0]);
    }
}

impl Device for DebugPort {
    fn name(&self) -> &str {
        &self.name
    }

    fn ports(&self) -> Option<&dyn PortIo> {
        Some(self)
    }

    fn request(&self, request: Request<'_>) -> Result<(), DeviceError> {
        match request {
            Request::Start | Request::Stop | Request::Reset => {}
            Request::Save(place) => *place = Some(SavedState::new(1, &())?),
            Request::Restore(saved) => saved.get::<()>(1)?,
        }
        Ok(())
    }
}
