//! The frame of integration services: a pipe channel, version negotiation, transactions.
//!
//! Each service is an [`Ic`] with its own bodies. Its thread negotiates when the guest opens the channel, sends what the
//! host asks ([`Ic::call`]) one at a time, and hands the answers back.

use crate::pump::Pump;
use crate::{SyntheticDevice, from_value, lock, to_value};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use thiserror::Error;
use vmbus::protocol::message::{PIPE_MODE_MESSAGE, offer_flags};
use vmbus::protocol::ring::{PipeHeader, packet};
use vmbus::protocol::service::{MessageHeader, ServiceVersion, flags, kind, status};
use vmbus::protocol::{Guid, USER_DATA};
use vmbus::{Channel, ChannelDevice, Next, OfferKey, OfferParams, OpenRefused};
use zerocopy::{FromBytes, IntoBytes};

/// A version.
pub const fn v(major: u16, minor: u16) -> ServiceVersion {
    ServiceVersion { major, minor }
}

/// Framework versions, ascending.
const FRAMEWORKS: [ServiceVersion; 2] = [v(1, 0), v(3, 0)];
/// Calls of the host that may wait.
const MOST_CALLS: usize = 64;
/// Bytes in front of a body.
const FRONT: usize = size_of::<PipeHeader>() + size_of::<MessageHeader>();
/// Kind of a pipe message: data.
const PIPE_DATA: u32 = 1;

/// What a service is.
pub struct Definition {
    /// Device name.
    pub name: &'static str,
    /// Class.
    pub class: Guid,
    /// Instance.
    pub instance: Guid,
    /// Type of its messages.
    pub kind: u16,
    /// Versions, ascending.
    pub versions: &'static [ServiceVersion],
}

/// Why a service did not do what it was asked.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ServiceError {
    /// The guest has no driver for it, or its daemon does not run.
    #[error("the guest does not offer '{0}': it has no driver for it, or its daemon does not run")]
    NotConnected(&'static str),
    /// No answer in time.
    #[error("the guest did not answer '{0}' in {1} seconds")]
    Timeout(&'static str, u64),
    /// The guest refused.
    #[error("the guest refused: {}", hresult(*.0))]
    Refused(u32),
    /// The guest's answer makes no sense.
    #[error("the guest's answer is malformed: {0}")]
    Malformed(&'static str),
    /// The host's own side.
    #[error("{0}")]
    Host(String),
}

fn hresult(code: u32) -> String {
    let text = match code {
        status::FAIL => "it failed",
        status::NO_MORE => "there is no such entry",
        status::NOT_SUPPORTED => "not supported",
        status::INVALID_ARGUMENT => "invalid argument",
        status::ALREADY_EXISTS => "it exists already",
        status::DISK_FULL => "its disk is full",
        status::NOT_FOUND => "not found",
        other => return format!("code {other:#010x}"),
    };
    format!("{text} ({code:#010x})")
}

/// What a service sends by itself.
pub trait Periodic: Send + Sync {
    /// The next message's body, and when to ask again. `first` after the negotiation and after the machine has started
    /// or gone on.
    fn next(&self, version: ServiceVersion, first: bool) -> (Option<Vec<u8>>, Duration);
    /// The guest's answer to such a message.
    fn answered(&self, body: &[u8]);
    /// The channel is closed.
    fn closed(&self) {}
}

struct Call {
    body: Vec<u8>,
    answer: SyncSender<Result<Vec<u8>, ServiceError>>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Agreed {
    framework: (u16, u16),
    version: (u16, u16),
}

#[derive(Default)]
struct Inner {
    agreed: Option<Agreed>,
    calls: VecDeque<Call>,
    /// The call that the guest works on, with its transaction.
    current: Option<(u8, SyncSender<Result<Vec<u8>, ServiceError>>)>,
    transaction: u8,
    /// The answer to the call that the guest worked on when the machine was saved.
    restored: Option<Receiver<Result<Vec<u8>, ServiceError>>>,
    /// The machine has started or gone on: time may have passed.
    started: bool,
}

impl Inner {
    fn fail_all(&mut self, error: &ServiceError) {
        let waiting = self.calls.drain(..).map(|c| c.answer).chain(self.current.take().map(|c| c.1));
        for answer in waiting {
            // The caller may have given up.
            let _ = answer.try_send(Err(error.clone()));
        }
    }
}

/// A service's device.
pub struct Ic {
    definition: &'static Definition,
    inner: Arc<Mutex<Inner>>,
    pump: Pump,
    periodic: Option<Arc<dyn Periodic>>,
}

#[derive(Serialize, Deserialize)]
struct State {
    agreed: Option<Agreed>,
    transaction: u8,
    /// The transaction of a call that the guest works on. Its caller is gone after a restore, but the guest must have
    /// answered before it may be asked something else.
    current: Option<u8>,
}

impl Ic {
    pub(crate) fn new(definition: &'static Definition, periodic: Option<Arc<dyn Periodic>>) -> Arc<Self> {
        Arc::new(Self { definition, inner: Arc::default(), pump: Pump::default(), periodic })
    }

    /// The version that the guest has agreed to; `None`: not connected.
    pub fn version(&self) -> Option<ServiceVersion> {
        lock(&self.inner).agreed.map(|a| v(a.version.0, a.version.1))
    }

    /// Sends a request and waits for the answer: its body. Time during which the machine stands still does not count.
    pub fn call(&self, body: Vec<u8>, timeout: Duration) -> Result<Vec<u8>, ServiceError> {
        let name = self.definition.name;
        let (answer, result) = sync_channel(1);
        let channel = {
            let mut inner = lock(&self.inner);
            let (Some(channel), Some(_)) = (self.pump.channel(), inner.agreed) else {
                return Err(ServiceError::NotConnected(name));
            };
            if inner.calls.len() >= MOST_CALLS {
                return Err(ServiceError::Host(format!("{MOST_CALLS} requests wait for the guest's '{name}' already")));
            }
            inner.calls.push_back(Call { body, answer });
            channel.wake();
            channel
        };
        let mut left = timeout;
        loop {
            let slice = left.min(Duration::from_millis(100));
            match result.recv_timeout(slice) {
                Ok(answer) => return answer,
                Err(RecvTimeoutError::Disconnected) => return Err(ServiceError::NotConnected(name)),
                Err(RecvTimeoutError::Timeout) if channel.is_paused() => {}
                Err(RecvTimeoutError::Timeout) => left -= slice,
            }
            if left.is_zero() {
                return Err(ServiceError::Timeout(name, timeout.as_secs()));
            }
        }
    }
}

impl Ic {
    /// The answer to the call that was in flight when the machine was saved, for whoever carries it on; once.
    pub(crate) fn restored_call(&self) -> Option<Receiver<Result<Vec<u8>, ServiceError>>> {
        lock(&self.inner).restored.take()
    }

    /// Whether the guest works on a call, or one waits for it.
    pub(crate) fn is_busy(&self) -> bool {
        let inner = lock(&self.inner);
        inner.current.is_some() || !inner.calls.is_empty()
    }
}

/// A message: pipe header, service header, body.
fn message(header: MessageHeader, body: &[u8]) -> Vec<u8> {
    let mut header = header;
    header.size = body.len() as u16;
    let pipe = PipeHeader { kind: PIPE_DATA, len: (size_of::<MessageHeader>() + body.len()) as u32 };
    [pipe.as_bytes(), header.as_bytes(), body].concat()
}

impl Ic {
    /// The thread of the channel.
    fn serve(inner: &Mutex<Inner>, definition: &Definition, periodic: Option<&dyn Periodic>, channel: &Channel) {
        if !channel.is_restored() {
            Self::negotiate(definition, channel);
        }
        let mut due: Option<Instant> = None;
        loop {
            match channel.next(due) {
                Next::Packet(packet) => Self::received(inner, definition, periodic, channel, &packet.payload),
                Next::Woken | Next::Timeout => {}
                Next::Closed => break,
            }
            Self::send_call(inner, definition, channel);
            if let Some(periodic) = periodic {
                due = Self::send_periodic(inner, definition, periodic, channel, due);
            }
        }
        if let Some(periodic) = periodic {
            periodic.closed();
        }
        let mut inner = lock(inner);
        inner.agreed = None;
        inner.fail_all(&ServiceError::NotConnected(definition.name));
    }

    fn negotiate(definition: &Definition, channel: &Channel) {
        let mut body = Vec::new();
        body.extend((FRAMEWORKS.len() as u16).to_le_bytes());
        body.extend((definition.versions.len() as u16).to_le_bytes());
        body.extend([0; 4]);
        for version in FRAMEWORKS.iter().chain(definition.versions) {
            body.extend(version.as_bytes());
        }
        let header = MessageHeader {
            framework: FRAMEWORKS[0],
            kind: kind::NEGOTIATE,
            version: v(0, 0),
            size: 0,
            status: status::OK,
            transaction_id: 0,
            flags: flags::TRANSACTION | flags::REQUEST,
            reserved: 0,
        };
        // A channel that is closed at once says so to the thread.
        let _ = channel.send(packet::IN_BAND, 0, 0, &message(header, &body));
    }

    fn received(
        inner: &Mutex<Inner>,
        definition: &Definition,
        periodic: Option<&dyn Periodic>,
        channel: &Channel,
        payload: &[u8],
    ) {
        let Ok((pipe, rest)) = PipeHeader::read_from_prefix(payload) else { return };
        let Ok((header, body)) = MessageHeader::read_from_prefix(rest) else { return };
        if pipe.kind != PIPE_DATA || header.flags & flags::RESPONSE == 0 {
            return;
        }
        let body = &body[..body.len().min(usize::from(header.size))];
        let mut state = lock(inner);
        if header.kind == kind::NEGOTIATE {
            state.agreed = Self::agreement(definition, body);
            state.started = true;
            match state.agreed {
                Some(a) => tracing::info!(service = definition.name, version = ?a.version, "the guest is connected"),
                None => tracing::warn!(service = definition.name, "the guest knows none of our versions"),
            }
            drop(state);
            channel.wake();
            return;
        }
        if header.kind != definition.kind {
            return;
        }
        match state.current.take() {
            Some((id, answer)) if id == header.transaction_id => {
                let result = match header.status {
                    status::OK => Ok(body.to_vec()),
                    code => Err(ServiceError::Refused(code)),
                };
                let _ = answer.try_send(result);
            }
            // The answer to something else.
            other => {
                state.current = other;
                drop(state);
                if let Some(periodic) = periodic {
                    periodic.answered(body);
                }
            }
        }
    }

    /// The guest's choice: one framework version and one of the service.
    fn agreement(definition: &Definition, body: &[u8]) -> Option<Agreed> {
        let half = |at: usize| Some(u16::from_le_bytes([*body.get(at)?, *body.get(at + 1)?]));
        if half(0)? != 1 || half(2)? != 1 {
            return None;
        }
        let framework = (half(8)?, half(10)?);
        let version = (half(12)?, half(14)?);
        let offered =
            FRAMEWORKS.contains(&v(framework.0, framework.1)) && definition.versions.contains(&v(version.0, version.1));
        offered.then_some(Agreed { framework, version })
    }

    fn send(state: &mut Inner, definition: &Definition, channel: &Channel, body: &[u8]) -> Option<u8> {
        let agreed = state.agreed?;
        state.transaction = state.transaction.wrapping_add(1);
        let header = MessageHeader {
            framework: v(agreed.framework.0, agreed.framework.1),
            kind: definition.kind,
            version: v(agreed.version.0, agreed.version.1),
            size: 0,
            status: status::OK,
            transaction_id: state.transaction,
            flags: flags::TRANSACTION | flags::REQUEST,
            reserved: 0,
        };
        channel.send(packet::IN_BAND, 0, u64::from(state.transaction), &message(header, body)).ok()?;
        Some(state.transaction)
    }

    fn send_call(inner: &Mutex<Inner>, definition: &Definition, channel: &Channel) {
        let mut state = lock(inner);
        if state.current.is_some() || state.agreed.is_none() {
            return;
        }
        if let Some(call) = state.calls.pop_front() {
            match Self::send(&mut state, definition, channel, &call.body) {
                Some(id) => state.current = Some((id, call.answer)),
                None => drop(call.answer.try_send(Err(ServiceError::NotConnected(definition.name)))),
            }
        }
    }

    fn send_periodic(
        inner: &Mutex<Inner>,
        definition: &Definition,
        periodic: &dyn Periodic,
        channel: &Channel,
        due: Option<Instant>,
    ) -> Option<Instant> {
        let mut state = lock(inner);
        let agreed = state.agreed?;
        let first = std::mem::take(&mut state.started);
        let now = Instant::now();
        if !first && due.is_some_and(|due| due > now) {
            return due;
        }
        let (body, interval) = periodic.next(v(agreed.version.0, agreed.version.1), first || due.is_none());
        if let Some(body) = body {
            Self::send(&mut state, definition, channel, &body);
        }
        Some(now + interval)
    }
}

impl ChannelDevice for Ic {
    fn offer(&self) -> OfferParams {
        let mut user_data = [0; USER_DATA];
        user_data[..4].copy_from_slice(&PIPE_MODE_MESSAGE.to_le_bytes());
        OfferParams {
            key: OfferKey { class: self.definition.class, instance: self.definition.instance, sub_channel: 0 },
            flags: offer_flags::ENUMERATE | offer_flags::NAMED_PIPE,
            mmio_megabytes: 0,
            user_data,
            monitored: false,
        }
    }

    fn opened(&self, channel: Arc<Channel>) -> Result<(), OpenRefused> {
        let (inner, definition) = (self.inner.clone(), self.definition);
        let periodic = self.periodic.clone();
        {
            let mut state = lock(&self.inner);
            if !channel.is_restored() {
                state.agreed = None;
            }
            state.started = true;
        }
        self.pump.start(definition.name, channel, move |channel| {
            Self::serve(&inner, definition, periodic.as_deref(), channel);
        })
    }

    fn closed(&self, _: u16) {
        self.pump.stop();
    }
}

impl SyntheticDevice for Ic {
    fn name(&self) -> &str {
        self.definition.name
    }
    fn save(&self) -> Result<ciborium::Value, String> {
        let inner = lock(&self.inner);
        let current = inner.current.as_ref().map(|c| c.0);
        to_value(&State { agreed: inner.agreed, transaction: inner.transaction, current })
    }
    fn restore(&self, state: &ciborium::Value) -> Result<(), String> {
        let state: State = from_value(state)?;
        let mut inner = lock(&self.inner);
        inner.agreed = state.agreed;
        inner.transaction = state.transaction;
        if let Some(id) = state.current {
            let (answer, result) = sync_channel(1);
            inner.current = Some((id, answer));
            inner.restored = Some(result);
        }
        Ok(())
    }
    fn started(&self) {
        lock(&self.inner).started = true;
        if let Some(channel) = self.pump.channel() {
            channel.wake();
        }
    }
}

/// Puts a service behind the traits that the machine knows.
macro_rules! service {
    ($name:ident) => {
        impl vmbus::ChannelDevice for $name {
            fn offer(&self) -> vmbus::OfferParams {
                self.ic.offer()
            }
            fn opened(&self, channel: std::sync::Arc<vmbus::Channel>) -> Result<(), vmbus::OpenRefused> {
                self.ic.opened(channel)
            }
            fn closed(&self, sub_channel: u16) {
                self.ic.closed(sub_channel);
            }
        }
        impl crate::SyntheticDevice for $name {
            fn name(&self) -> &str {
                self.ic.name()
            }
            fn save(&self) -> Result<ciborium::Value, String> {
                self.ic.save()
            }
            fn restore(&self, state: &ciborium::Value) -> Result<(), String> {
                self.ic.restore(state)
            }
            fn started(&self) {
                self.ic.started();
            }
        }
    };
}
pub(crate) use service;

/// Bytes in front of a body, for the size of rings.
pub const HEADER_BYTES: usize = FRONT;

/// UTF-16 little-endian with a final zero, in a field of `field` bytes. `None`: too long.
pub(crate) fn utf16(text: &str, field: usize) -> Option<Vec<u8>> {
    let mut bytes: Vec<u8> = text.encode_utf16().flat_map(u16::to_le_bytes).collect();
    bytes.extend([0, 0]);
    (bytes.len() <= field).then_some(bytes)
}

/// Text from a field of UTF-16 that ends with a zero or with the field.
pub(crate) fn text(bytes: &[u8]) -> String {
    let units = bytes.as_chunks::<2>().0.iter().map(|c| u16::from_le_bytes(*c)).take_while(|u| *u != 0);
    char::decode_utf16(units).map(|c| c.unwrap_or(char::REPLACEMENT_CHARACTER)).collect()
}
