//! The bus: the state machine, its devices, and the thread that works off what the guest says.

use crate::channel::{Channel, ChannelRequests, ChannelSetup, Signals};
use crate::gpadl::PageList;
use crate::ring::RingError;
use crate::server::{
    OfferKey, OfferParams, OpenRequest, Output, RestoreError, SIGNAL_CONNECTION_BASE, Server, ServerState,
};
use partition::{Gpa, GuestMemory, VpIndex};
use serde::{Deserialize, Serialize};
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, RwLock, RwLockWriteGuard, Weak};
use std::thread::JoinHandle;
use tlfs::{EventPort, HvPartition, Message, MessagePort, PortFull};
use vmbus_protocol::{
    EVENT_CONNECTION, Guid, MAX_RELID, MESSAGE_CONNECTION, MESSAGE_CONNECTION_5, MESSAGE_TYPE, Version,
};

/// What the bus needs of SynIC.
pub trait Synic: Send + Sync {
    /// Sends a channel message to a VP's SINT. `false`: the guest does not take its messages.
    fn post_message(&self, vp: VpIndex, sint: u8, payload: Vec<u8>) -> bool;
    /// Forgets messages that the guest has not taken.
    fn clear_messages(&self, vp: VpIndex, sint: u8);
    /// Sets an event flag.
    fn signal_event(&self, vp: VpIndex, sint: u8, flag: u16) -> bool;
    /// Connects what the guest posts to.
    fn set_message_port(&self, connection: u32, port: Option<Arc<dyn MessagePort>>);
    /// Connects what the guest signals.
    fn set_event_port(&self, connection: u32, port: Option<(Arc<dyn EventPort>, u16)>);
}

impl Synic for HvPartition {
    fn post_message(&self, vp: VpIndex, sint: u8, payload: Vec<u8>) -> bool {
        let message = Message { message_type: MESSAGE_TYPE, sender: u64::from(MESSAGE_CONNECTION), payload };
        HvPartition::post_message(self, vp, sint, message).is_ok()
    }
    fn clear_messages(&self, vp: VpIndex, sint: u8) {
        HvPartition::clear_messages(self, vp, sint);
    }
    fn signal_event(&self, vp: VpIndex, sint: u8, flag: u16) -> bool {
        HvPartition::signal_event(self, vp, sint, flag)
    }
    fn set_message_port(&self, connection: u32, port: Option<Arc<dyn MessagePort>>) {
        HvPartition::set_message_port(self, connection, port);
    }
    fn set_event_port(&self, connection: u32, port: Option<(Arc<dyn EventPort>, u16)>) {
        HvPartition::set_event_port(self, connection, port);
    }
}

/// The device cannot take the channel.
#[derive(Debug, thiserror::Error)]
#[error("the device refuses the channel: {0}")]
pub struct OpenRefused(pub String);

/// A device on the bus. Methods are called with the bus's lock held: they must not call the bus.
pub trait ChannelDevice: Send + Sync {
    /// What is offered (the primary channel's parameters; sub-channels differ in their number only).
    fn offer(&self) -> OfferParams;
    /// The guest has opened a channel. The device gives it a thread that calls [`Channel::next`] until
    /// [`crate::Next::Closed`].
    fn opened(&self, channel: Arc<Channel>) -> Result<(), OpenRefused>;
    /// The channel is closed: when this returns, the device uses nothing of it any more (its thread has ended).
    fn closed(&self, sub_channel: u16);
    /// A GPADL goes away: when this returns, the device does not use its pages any more.
    fn gpadl_gone(&self, id: u32) {
        let _ = id;
    }
}

/// What a bus is made from.
pub struct VmBusConfig {
    /// VPs of the partition.
    pub vp_count: u32,
    /// Guest memory.
    pub memory: Arc<GuestMemory>,
    /// SynIC.
    pub synic: Arc<dyn Synic>,
    /// Newest version to negotiate.
    pub newest: Version,
}

/// Saved state of the bus and its open channels.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmBusState {
    server: ServerState,
    /// Packets that waited for room, by relid.
    backlog: Vec<(u32, Vec<Vec<u8>>)>,
}

/// Messages of the guest that may wait.
const QUEUE_LIMIT: usize = 256;
/// Sub-channels that a device may have.
const MOST_SUB_CHANNELS: u16 = 64;

enum Command {
    Guest(Vec<u8>),
    Failed(u32),
    SubChannels(u32, u16),
    Stop,
}

#[derive(Default)]
struct Queue {
    commands: Mutex<VecDeque<Command>>,
    /// The worker has nothing to do and nothing in hand.
    idle: Mutex<bool>,
    changed: Condvar,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, VecDeque<Command>> {
        self.commands.lock().unwrap_or_else(|e| e.into_inner())
    }
    fn push(&self, command: Command) {
        self.lock().push_back(command);
        self.changed.notify_all();
    }
}

/// The ear for channel messages.
struct MessageEar(Arc<Queue>);
impl MessagePort for MessageEar {
    fn post(&self, _: VpIndex, message_type: u32, payload: &[u8]) -> Result<(), PortFull> {
        if message_type != MESSAGE_TYPE {
            return Ok(());
        }
        let mut commands = self.0.lock();
        if commands.len() >= QUEUE_LIMIT {
            return Err(PortFull);
        }
        commands.push_back(Command::Guest(payload.to_vec()));
        self.0.changed.notify_all();
        Ok(())
    }
}

/// Signals of guests without dedicated interrupts: the second half of the interrupt page says which channel.
struct LegacyEar {
    memory: Arc<GuestMemory>,
    page: AtomicU64,
    signals: RwLock<HashMap<u32, Arc<Signals>>>,
}
impl LegacyEar {
    fn signal_all(&self, base: u64, words: u64) {
        let signals = self.signals.read().unwrap_or_else(|e| e.into_inner());
        for word in 0..words {
            let Ok(bits) = self.memory.fetch_and_u64(Gpa(base) + word * 8, 0) else { return };
            for bit in (0..64).filter(|b| bits >> b & 1 != 0) {
                if let Some(s) = signals.get(&((word * 64) as u32 + bit)) {
                    s.signal();
                }
            }
        }
    }
}
impl EventPort for LegacyEar {
    fn signal(&self, _: u16) {
        let page = self.page.load(Ordering::Acquire);
        if page != 0 {
            self.signal_all(page + 2048, u64::from(MAX_RELID).div_ceil(64));
        }
    }
}

struct Core {
    server: Server,
    /// Device and sub-channel number, by relid.
    devices: HashMap<u32, (Arc<dyn ChannelDevice>, u16)>,
    channels: HashMap<u32, Arc<Channel>>,
}

struct Inner {
    config: VmBusConfig,
    queue: Arc<Queue>,
    legacy: Arc<LegacyEar>,
    core: Mutex<Core>,
    /// Complete GPADLs by channel and number, for devices' threads.
    gpadls: RwLock<HashMap<(u32, u32), PageList>>,
}

/// The bus. Dropping it closes all channels.
pub struct VmBus {
    inner: Arc<Inner>,
    worker: Option<JoinHandle<()>>,
}

/// The channels' way back to the bus.
///
/// A device's thread calls them while the bus may wait for that very thread, with its lock held: none takes that lock.
struct Requests(Weak<Inner>);
impl ChannelRequests for Requests {
    fn failed(&self, relid: u32, error: &RingError) {
        tracing::warn!(relid, %error, "the guest has broken a channel's rings; the channel is closed");
        if let Some(inner) = self.0.upgrade() {
            inner.queue.push(Command::Failed(relid));
        }
    }
    fn sub_channels(&self, relid: u32, count: u16) {
        if let Some(inner) = self.0.upgrade() {
            inner.queue.push(Command::SubChannels(relid, count.min(MOST_SUB_CHANNELS)));
        }
    }
    fn gpadl(&self, relid: u32, id: u32) -> Option<PageList> {
        self.0.upgrade()?.gpadls.read().unwrap_or_else(|e| e.into_inner()).get(&(relid, id)).cloned()
    }
}

impl Inner {
    fn core(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn gpadls(&self) -> RwLockWriteGuard<'_, HashMap<(u32, u32), PageList>> {
        self.gpadls.write().unwrap_or_else(|e| e.into_inner())
    }

    /// Does what the state machine wants done.
    fn run_outputs(self: &Arc<Self>, core: &mut Core) {
        while let Some(output) = core.server.next_output() {
            match output {
                Output::Message { vp, sint, payload } => {
                    if !self.config.synic.post_message(vp, sint, payload) {
                        tracing::warn!(vp, sint, "the guest does not take its VMBus messages");
                    }
                }
                Output::ClearMessages { vp, sint } => {
                    self.config.synic.clear_messages(vp, sint);
                    self.legacy.page.store(core.server.interrupt_page().unwrap_or(0), Ordering::Release);
                }
                Output::Open(relid, request) => {
                    let opened = self.open(core, relid, &request, false, Vec::new());
                    if let Err(error) = &opened {
                        tracing::warn!(relid, %error, "a channel cannot be opened");
                    }
                    core.server.opened(relid, opened.is_ok());
                }
                Output::Close(relid) => self.close(core, relid),
                Output::Target(relid, vp) => {
                    if let Some(channel) = core.channels.get(&relid) {
                        channel.set_target_vp(vp);
                    }
                }
                Output::GpadlReady(relid, id) => {
                    if let Some(list) = core.server.gpadl(relid, id) {
                        self.gpadls().insert((relid, id), list.clone());
                    }
                }
                Output::GpadlGone(relid, id) => {
                    self.gpadls().remove(&(relid, id));
                    if let Some((device, _)) = core.devices.get(&relid) {
                        device.gpadl_gone(id);
                    }
                }
                Output::Forget(relid) => {
                    core.devices.remove(&relid);
                }
            }
        }
    }

    fn open(
        self: &Arc<Self>,
        core: &mut Core,
        relid: u32,
        request: &OpenRequest,
        restored: bool,
        backlog: Vec<Vec<u8>>,
    ) -> Result<(), OpenRefused> {
        let (device, sub_channel) = core.devices.get(&relid).ok_or_else(|| OpenRefused("no device".into()))?;
        let setup = ChannelSetup {
            relid,
            sub_channel: *sub_channel,
            version: core.server.version().unwrap_or(Version::V0_13),
            sint: core.server.sint(),
            interrupt_page: core.server.interrupt_page(),
            restored,
            backlog,
            requests: Arc::new(Requests(Arc::downgrade(self))),
        };
        let channel = Channel::new(setup, request, self.config.memory.clone(), self.config.synic.clone())
            .map_err(|e| OpenRefused(e.to_string()))?;
        // The port first: a signal that comes before the device's thread is kept.
        let connection = SIGNAL_CONNECTION_BASE + relid;
        self.config.synic.set_event_port(connection, Some((channel.signals.clone(), 1)));
        self.legacy.signals.write().unwrap_or_else(|e| e.into_inner()).insert(relid, channel.signals.clone());
        core.channels.insert(relid, channel.clone());
        if let Err(error) = device.opened(channel) {
            self.disconnect(core, relid);
            return Err(error);
        }
        Ok(())
    }

    fn disconnect(&self, core: &mut Core, relid: u32) {
        self.config.synic.set_event_port(SIGNAL_CONNECTION_BASE + relid, None);
        self.legacy.signals.write().unwrap_or_else(|e| e.into_inner()).remove(&relid);
        core.channels.remove(&relid);
    }

    fn close(&self, core: &mut Core, relid: u32) {
        let Some(channel) = core.channels.get(&relid).cloned() else { return };
        channel.close();
        if let Some((device, sub_channel)) = core.devices.get(&relid) {
            device.closed(*sub_channel);
        }
        self.disconnect(core, relid);
    }

    fn offer(self: &Arc<Self>, core: &mut Core, device: &Arc<dyn ChannelDevice>, sub_channel: u16) -> bool {
        let mut params = device.offer();
        params.key.sub_channel = sub_channel;
        let Some(relid) = core.server.offer(params) else { return false };
        core.devices.insert(relid, (device.clone(), sub_channel));
        self.run_outputs(core);
        true
    }

    fn work(self: &Arc<Self>) {
        loop {
            let command = {
                let mut commands = self.queue.lock();
                loop {
                    *self.queue.idle.lock().unwrap_or_else(|e| e.into_inner()) = commands.is_empty();
                    match commands.pop_front() {
                        Some(command) => break command,
                        None => {
                            self.queue.changed.notify_all();
                            commands = self.queue.changed.wait(commands).unwrap_or_else(|e| e.into_inner());
                        }
                    }
                }
            };
            let mut core = self.core();
            match command {
                Command::Guest(payload) => core.server.message(&payload),
                Command::Failed(relid) => core.server.fail(relid),
                Command::SubChannels(relid, count) => {
                    if let Some((device, 0)) = core.devices.get(&relid).map(|(d, s)| (d.clone(), *s)) {
                        for sub in 1..=count {
                            self.offer(&mut core, &device, sub);
                        }
                    }
                }
                Command::Stop => return,
            }
            self.run_outputs(&mut core);
        }
    }

    /// Waits until everything that was said so far is worked off.
    fn settle(&self) {
        let mut commands = self.queue.lock();
        while !commands.is_empty() || !*self.queue.idle.lock().unwrap_or_else(|e| e.into_inner()) {
            commands = self.queue.changed.wait(commands).unwrap_or_else(|e| e.into_inner());
        }
    }
}

impl VmBus {
    /// A bus with nothing on it; the guest can connect at once.
    pub fn new(config: VmBusConfig) -> std::io::Result<Self> {
        let queue = Arc::new(Queue::default());
        let legacy =
            Arc::new(LegacyEar { memory: config.memory.clone(), page: AtomicU64::new(0), signals: RwLock::default() });
        for connection in [MESSAGE_CONNECTION, MESSAGE_CONNECTION_5] {
            config.synic.set_message_port(connection, Some(Arc::new(MessageEar(queue.clone()))));
        }
        config.synic.set_event_port(EVENT_CONNECTION, Some((legacy.clone(), 1)));
        let core = Core {
            server: Server::new(config.vp_count, config.newest),
            devices: HashMap::new(),
            channels: HashMap::new(),
        };
        let inner = Arc::new(Inner { config, queue, legacy, core: Mutex::new(core), gpadls: RwLock::default() });
        let worker = inner.clone();
        let worker = std::thread::Builder::new().name("vmbus".into()).spawn(move || worker.work())?;
        Ok(Self { inner, worker: Some(worker) })
    }

    /// Puts a device on the bus (hot add, if the guest has connected). `false`: its class and instance are there
    /// already, or the bus is full.
    pub fn offer(&self, device: Arc<dyn ChannelDevice>) -> bool {
        let mut core = self.inner.core();
        self.inner.offer(&mut core, &device, 0)
    }

    /// Takes a device off the bus (hot remove): its channels are closed, the guest is told.
    pub fn rescind(&self, class: Guid, instance: Guid) {
        let mut core = self.inner.core();
        if let Some(relid) = core.server.relid(&OfferKey { class, instance, sub_channel: 0 }) {
            core.server.rescind(relid);
            self.inner.run_outputs(&mut core);
        }
    }

    /// The version that the guest has negotiated.
    pub fn version(&self) -> Option<Version> {
        self.inner.core().server.version()
    }

    /// Channels that are open.
    pub fn open_channels(&self) -> usize {
        self.inner.core().channels.len()
    }

    /// Passes on what the guest has noted in the monitor page, for channels that were offered as monitored. The machine
    /// calls it as often as the latency that it wants.
    pub fn poll_monitor(&self) {
        let core = self.inner.core();
        let Some(page) = core.server.monitor_page() else { return };
        for group in 0..4u64 {
            // The lower half of each trigger group: one pending bit a monitor id.
            let word = Gpa(page) + 8 + group * 8;
            let Ok(bits) = self.inner.config.memory.fetch_and_u64(word, !0xffff_ffff) else { return };
            for bit in (0..32u64).filter(|b| bits >> b & 1 != 0) {
                let relid = core.server.monitored((group * 32 + bit) as u8);
                if let Some(channel) = relid.and_then(|r| core.channels.get(&r)) {
                    channel.signals.signal();
                }
            }
        }
    }

    /// Waits until all messages that the guest has sent are worked off.
    pub fn settle(&self) {
        self.inner.settle();
    }

    /// Stops all channels: when it returns, no device's thread touches the guest. VPs must not run.
    pub fn pause(&self) {
        self.inner.settle();
        let channels: Vec<_> = self.inner.core().channels.values().cloned().collect();
        channels.iter().for_each(|c| c.pause());
    }

    /// Goes on after [`VmBus::pause`].
    pub fn resume(&self) {
        let channels: Vec<_> = self.inner.core().channels.values().cloned().collect();
        channels.iter().for_each(|c| c.resume());
    }

    /// Reset of the machine: everything is closed, offers stay. VPs must not run.
    pub fn reset(&self) {
        self.inner.queue.lock().retain(|c| !matches!(c, Command::Guest(_)));
        self.inner.settle();
        let mut core = self.inner.core();
        core.server.reset();
        self.inner.run_outputs(&mut core);
        self.inner.legacy.page.store(0, Ordering::Release);
    }

    /// The state of a paused bus.
    pub fn save(&self) -> VmBusState {
        let core = self.inner.core();
        let mut backlog: Vec<_> =
            core.channels.iter().map(|(r, c)| (*r, c.backlog())).filter(|(_, b)| !b.is_empty()).collect();
        backlog.sort_by_key(|(relid, _)| *relid);
        VmBusState { server: core.server.save(), backlog }
    }

    /// Loads a state. The devices of the saved machine must have been offered, and have their own states, already.
    /// Channels that were open are opened, paused; [`VmBus::resume`] starts them.
    pub fn restore(&self, state: &VmBusState) -> Result<(), RestoreError> {
        let mut core = self.inner.core();
        let core = &mut *core;
        let primaries: Vec<_> = core.devices.values().map(|(d, _)| (d.offer(), d.clone())).collect();
        let same = |a: &OfferKey, b: &OfferKey| a.class == b.class && a.instance == b.instance;
        let open = core.server.restore(&state.server, |key| {
            let (params, _) = primaries.iter().find(|(p, _)| same(&p.key, key))?;
            let mut params = params.clone();
            params.key.sub_channel = key.sub_channel;
            Some(params)
        })?;
        core.devices.clear();
        for relid in 1..=MAX_RELID {
            if let Some(key) = core.server.key(relid)
                && let Some((_, device)) = primaries.iter().find(|(p, _)| same(&p.key, &key))
            {
                core.devices.insert(relid, (device.clone(), key.sub_channel));
            }
        }
        self.inner.legacy.page.store(core.server.interrupt_page().unwrap_or(0), Ordering::Release);
        self.inner.run_outputs(core);
        for (relid, request) in open {
            let backlog = state.backlog.iter().find(|(r, _)| *r == relid).map(|(_, b)| b.clone());
            let backlog = backlog.unwrap_or_default();
            if let Err(error) = self.inner.open(core, relid, &request, true, backlog) {
                tracing::warn!(relid, %error, "a saved channel cannot be opened");
                return Err(RestoreError::Damaged("a channel that was open cannot be opened"));
            }
        }
        Ok(())
    }
}

impl Drop for VmBus {
    fn drop(&mut self) {
        self.inner.queue.push(Command::Stop);
        if let Some(worker) = self.worker.take() {
            // The worker cannot panic on anything that a guest says; if it did, its message was printed already.
            let _ = worker.join();
        }
        let synic = &self.inner.config.synic;
        for connection in [MESSAGE_CONNECTION, MESSAGE_CONNECTION_5] {
            synic.set_message_port(connection, None);
        }
        synic.set_event_port(EVENT_CONNECTION, None);
        let mut core = self.inner.core();
        core.server.reset();
        self.inner.run_outputs(&mut core);
    }
}
