//! Heartbeat: the host asks every two seconds, the guest answers with the next number.

use crate::ic::{Definition, Ic, Periodic, service, v};
use crate::lock;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use vmbus::protocol::class;
use vmbus::protocol::service::{ServiceVersion, kind};

static DEFINITION: Definition = Definition {
    name: "heartbeat",
    class: class::HEARTBEAT,
    instance: class::HEARTBEAT_INSTANCE,
    kind: kind::HEARTBEAT,
    versions: &[v(1, 0), v(3, 0)],
};

const INTERVAL: Duration = Duration::from_secs(2);
/// Without an answer for so long, contact is lost.
const LOST: Duration = Duration::from_secs(10);

/// What is known of the guest's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// No driver in the guest.
    NoContact,
    /// It answers.
    Ok,
    /// It has answered, but no longer does.
    LostCommunication,
}

#[derive(Default)]
struct Beats {
    sent: u64,
    connected: bool,
    answered: Option<Instant>,
}

/// The service.
pub struct Heartbeat {
    pub(crate) ic: Arc<Ic>,
    beats: Arc<Mutex<Beats>>,
}

struct Beat(Arc<Mutex<Beats>>);

impl Periodic for Beat {
    fn next(&self, _: ServiceVersion, first: bool) -> (Option<Vec<u8>>, Duration) {
        let mut beats = lock(&self.0);
        if first {
            // A pause is not the guest's silence.
            beats.connected = true;
            beats.answered = Some(Instant::now());
        }
        beats.sent += 1;
        let mut body = vec![0; 40];
        body[..8].copy_from_slice(&beats.sent.to_le_bytes());
        (Some(body), INTERVAL)
    }
    fn answered(&self, body: &[u8]) {
        let mut beats = lock(&self.0);
        if let Some(number) = body.first_chunk::<8>().map(|b| u64::from_le_bytes(*b))
            && number == beats.sent + 1
        {
            beats.sent = number;
            beats.answered = Some(Instant::now());
        }
    }
    fn closed(&self) {
        *lock(&self.0) = Beats::default();
    }
}

impl Heartbeat {
    /// The service, not connected.
    pub fn new() -> Arc<Self> {
        let beats = Arc::new(Mutex::new(Beats::default()));
        let ic = Ic::new(&DEFINITION, Some(Arc::new(Beat(beats.clone()))));
        Arc::new(Self { ic, beats })
    }

    /// Is the guest alive?
    pub fn status(&self) -> Status {
        let beats = lock(&self.beats);
        match beats.answered {
            _ if !beats.connected => Status::NoContact,
            Some(at) if at.elapsed() < LOST => Status::Ok,
            _ => Status::LostCommunication,
        }
    }
}

service!(Heartbeat);
