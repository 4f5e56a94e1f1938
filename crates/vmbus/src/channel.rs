//! An open channel as a device's thread sees it.

use crate::bus::Synic;
use crate::gpadl::{GpaRange, PageList, parse_ranges};
use crate::ring::{Incoming, Outgoing, RingError, Written};
use crate::server::OpenRequest;
use partition::{Gpa, GuestMemory};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock};
use std::thread::Thread;
use std::time::Instant;
use vmbus_protocol::ring::{PacketHeader, packet};
use vmbus_protocol::{USER_DATA, Version};
use zerocopy::IntoBytes;

/// A packet from the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    /// See [`packet`].
    pub kind: u16,
    /// The guest waits for a completion with this packet's transaction id.
    pub wants_completion: bool,
    /// Comes back in the completion.
    pub transaction_id: u64,
    /// Buffers in guest memory (GPA-direct packets).
    pub ranges: Vec<GpaRange>,
    /// What the device's protocol says. Padded to 8 bytes.
    pub payload: Vec<u8>,
}

/// What a device's thread is to do.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    /// A packet came.
    Packet(Packet),
    /// [`Channel::wake`] was called.
    Woken,
    /// The deadline has passed.
    Timeout,
    /// The channel is no more: the thread ends.
    Closed,
}

/// The channel cannot be used any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChannelError {
    /// It is closed, or the guest has broken its rings.
    #[error("the channel is closed")]
    Closed,
    /// No packet of this length fits the ring.
    #[error("a packet of {len} bytes does not fit the guest's ring of {capacity}")]
    TooLong {
        /// Bytes of the packet.
        len: usize,
        /// Most bytes.
        capacity: usize,
    },
}

/// What wakes the device's thread. Setting it takes no lock.
#[derive(Default)]
pub(crate) struct Signals {
    /// The guest has signalled.
    pending: AtomicBool,
    /// The host wants the thread's attention.
    woken: AtomicBool,
    closed: AtomicBool,
    paused: AtomicBool,
    /// Requests of the device that are in flight.
    work: AtomicUsize,
    waiter: OnceLock<Thread>,
    /// The thread stands still because of `paused`, or has ended.
    parked: Mutex<bool>,
    changed: Condvar,
}

impl Signals {
    pub(crate) fn signal(&self) {
        self.pending.store(true, Ordering::SeqCst);
        self.unpark();
    }

    fn unpark(&self) {
        if let Some(thread) = self.waiter.get() {
            thread.unpark();
        }
    }

    fn parked(&self) -> MutexGuard<'_, bool> {
        self.parked.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Waits until at most `left` requests are in flight.
    fn wait_for_work(&self, left: usize) -> MutexGuard<'_, bool> {
        let mut guard = self.parked();
        while self.work.load(Ordering::SeqCst) > left {
            guard = self.changed.wait(guard).unwrap_or_else(|e| e.into_inner());
        }
        guard
    }

    /// The device's thread stands still here while the channel is paused.
    fn gate(&self) {
        if !self.paused.load(Ordering::SeqCst) {
            return;
        }
        let mut parked = self.wait_for_work(0);
        *parked = true;
        self.changed.notify_all();
        while self.paused.load(Ordering::SeqCst) && !self.closed.load(Ordering::SeqCst) {
            parked = self.changed.wait(parked).unwrap_or_else(|e| e.into_inner());
        }
        *parked = false;
    }
}

/// A request that a device works on while its thread goes on. The channel is not paused before all have been dropped,
/// and a device's thread waits for them before it ends ([`Channel::finish`]).
pub struct Work(Arc<Signals>);

impl Drop for Work {
    fn drop(&mut self) {
        // Under the lock, so that a waiter does not miss it.
        let guard = self.0.parked();
        self.0.work.fetch_sub(1, Ordering::SeqCst);
        drop(guard);
        self.0.changed.notify_all();
    }
}

impl tlfs::EventPort for Signals {
    fn signal(&self, _: u16) {
        Signals::signal(self);
    }
}

struct Rings {
    incoming: Incoming,
    outgoing: Outgoing,
    /// The guest was told not to signal, because we look anyway.
    masked: bool,
    /// Packets that did not fit. While there are any, no packet of the guest is taken: so their number is bounded by
    /// what the device sends for one.
    backlog: VecDeque<Vec<u8>>,
}

/// How a channel is named and reached.
pub(crate) struct ChannelSetup {
    pub(crate) relid: u32,
    pub(crate) sub_channel: u16,
    pub(crate) version: Version,
    pub(crate) sint: u8,
    /// Interrupt page of guests before version 2.4.
    pub(crate) interrupt_page: Option<u64>,
    pub(crate) restored: bool,
    pub(crate) backlog: Vec<Vec<u8>>,
    pub(crate) requests: Arc<dyn ChannelRequests>,
}

/// What a channel asks of the bus.
pub(crate) trait ChannelRequests: Send + Sync {
    /// The guest broke its rings.
    fn failed(&self, relid: u32, error: &RingError);
    /// Offer this many sub-channels (numbers 1 to `count`) of the device of channel `relid`.
    fn sub_channels(&self, relid: u32, count: u16);
    /// Pages of a GPADL.
    fn gpadl(&self, relid: u32, id: u32) -> Option<PageList>;
}

/// An open channel. One thread of the device calls [`Channel::next`]; other methods may be called from any thread.
pub struct Channel {
    setup: ChannelSetup,
    memory: Arc<GuestMemory>,
    synic: Arc<dyn Synic>,
    target_vp: AtomicU32,
    user_data: [u8; USER_DATA],
    pub(crate) signals: Arc<Signals>,
    rings: Mutex<Rings>,
}

impl Channel {
    pub(crate) fn new(
        mut setup: ChannelSetup,
        request: &OpenRequest,
        memory: Arc<GuestMemory>,
        synic: Arc<dyn Synic>,
    ) -> Result<Arc<Self>, RingError> {
        let downstream = request.downstream_page as usize;
        let pages = &request.ring.pages;
        let (up, down) = pages.split_at_checked(downstream).ok_or(RingError::TooSmall)?;
        let mut incoming = Incoming::new(memory.clone(), up)?;
        // A restored ring may say "do not signal" from before the save.
        incoming.set_interrupt_mask(false)?;
        let rings = Rings {
            incoming,
            outgoing: Outgoing::new(memory.clone(), down)?,
            masked: false,
            backlog: std::mem::take(&mut setup.backlog).into(),
        };
        // A restored channel stands still until the machine goes on. What the guest has written before the save it will
        // not signal again: the ring is looked at first anyway.
        let signals = Signals { paused: AtomicBool::new(setup.restored), ..Signals::default() };
        Ok(Arc::new(Self {
            setup,
            memory,
            synic,
            target_vp: AtomicU32::new(request.target_vp),
            user_data: request.user_data,
            signals: Arc::new(signals),
            rings: Mutex::new(rings),
        }))
    }

    /// 0 for the primary channel.
    pub fn sub_channel(&self) -> u16 {
        self.setup.sub_channel
    }

    /// Whether it stands still, with the machine.
    pub fn is_paused(&self) -> bool {
        self.signals.paused.load(Ordering::SeqCst)
    }

    /// Was it open when the machine was saved, and is it now again? The guest does not negotiate anew then.
    pub fn is_restored(&self) -> bool {
        self.setup.restored
    }

    /// What the guest gave with its open request.
    pub fn user_data(&self) -> &[u8; USER_DATA] {
        &self.user_data
    }

    /// Guest memory.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// VP that the channel interrupts.
    pub fn target_vp(&self) -> u32 {
        self.target_vp.load(Ordering::Relaxed)
    }

    pub(crate) fn set_target_vp(&self, vp: u32) {
        self.target_vp.store(vp, Ordering::Relaxed);
        // An interrupt that the old VP has not taken would be lost.
        self.signal_guest();
    }

    /// Pages of a GPADL that the guest made for this channel (a device's receive buffer).
    pub fn gpadl(&self, id: u32) -> Option<PageList> {
        self.setup.requests.gpadl(self.setup.relid, id)
    }

    /// Offers sub-channels 1 to `count` of this device.
    pub fn offer_sub_channels(&self, count: u16) {
        self.setup.requests.sub_channels(self.setup.relid, count);
    }

    fn rings(&self) -> MutexGuard<'_, Rings> {
        self.rings.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Makes [`Channel::next`] return [`Next::Woken`].
    pub fn wake(&self) {
        self.signals.woken.store(true, Ordering::SeqCst);
        self.signals.unpark();
    }

    /// Is the channel closed or broken?
    pub fn is_closed(&self) -> bool {
        self.signals.closed.load(Ordering::SeqCst)
    }

    /// Ends the channel: the device's thread gets [`Next::Closed`].
    pub(crate) fn close(&self) {
        self.signals.closed.store(true, Ordering::SeqCst);
        drop(self.signals.parked());
        self.signals.changed.notify_all();
        self.signals.unpark();
    }

    /// Begins a request that ends on another thread, when what is returned is dropped. Waits while `most` are in flight.
    pub fn begin_work(&self, most: usize) -> Work {
        drop(self.signals.wait_for_work(most.saturating_sub(1)));
        self.signals.work.fetch_add(1, Ordering::SeqCst);
        Work(self.signals.clone())
    }

    /// Waits until no request is in flight. To be called at the end of a device's thread.
    pub fn finish(&self) {
        drop(self.signals.wait_for_work(0));
    }

    /// Stops the device's thread at its next call of [`Channel::next`], and waits for that.
    pub(crate) fn pause(&self) {
        self.signals.paused.store(true, Ordering::SeqCst);
        self.signals.unpark();
        // A thread that has not begun to wait will stand still when it does; one that never comes has not started.
        let mut parked = self.signals.parked();
        while !*parked && !self.is_closed() {
            parked = self.signals.changed.wait(parked).unwrap_or_else(|e| e.into_inner());
        }
    }

    pub(crate) fn resume(&self) {
        self.signals.paused.store(false, Ordering::SeqCst);
        drop(self.signals.parked());
        self.signals.changed.notify_all();
    }

    /// Packets that wait for room (to be saved).
    pub(crate) fn backlog(&self) -> Vec<Vec<u8>> {
        self.rings().backlog.iter().cloned().collect()
    }

    fn signal_guest(&self) {
        let (setup, vp) = (&self.setup, self.target_vp());
        if setup.version >= Version::V2_4 {
            self.synic.signal_event(vp, setup.sint, setup.relid as u16);
        } else if let Some(page) = setup.interrupt_page {
            // The first half of the interrupt page holds the flags from host to guest.
            let word = Gpa(page) + u64::from(setup.relid / 64 * 8);
            if self.memory.fetch_or_u64(word, 1 << (setup.relid % 64)).is_ok() {
                self.synic.signal_event(vp, setup.sint, 0);
            }
        }
    }

    fn fail(&self, error: &RingError) -> ChannelError {
        if !self.signals.closed.swap(true, Ordering::SeqCst) {
            self.setup.requests.failed(self.setup.relid, error);
        }
        drop(self.signals.parked());
        self.signals.changed.notify_all();
        ChannelError::Closed
    }

    /// Waits for the next thing to do. Only the device's thread of this channel calls it.
    pub fn next(&self, deadline: Option<Instant>) -> Next {
        let signals = &self.signals;
        signals.waiter.get_or_init(std::thread::current);
        loop {
            signals.gate();
            if self.is_closed() {
                return Next::Closed;
            }
            signals.pending.store(false, Ordering::SeqCst);
            match self.take() {
                Ok(Some(packet)) => return Next::Packet(packet),
                Ok(None) => {}
                Err(error) => {
                    self.fail(&error);
                    return Next::Closed;
                }
            }
            if signals.woken.swap(false, Ordering::SeqCst) {
                return Next::Woken;
            }
            let ready = || {
                signals.pending.load(Ordering::SeqCst)
                    || signals.woken.load(Ordering::SeqCst)
                    || signals.paused.load(Ordering::SeqCst)
                    || signals.closed.load(Ordering::SeqCst)
            };
            // A spurious end of the wait is harmless: the ring is looked at again.
            match deadline {
                None if !ready() => std::thread::park(),
                Some(at) if !ready() => {
                    let now = Instant::now();
                    if now >= at {
                        return Next::Timeout;
                    }
                    std::thread::park_timeout(at - now);
                }
                _ => {}
            }
        }
    }

    /// The next packet, if there is one and no answer waits for room.
    fn take(&self) -> Result<Option<Packet>, RingError> {
        let mut rings = self.rings();
        let rings = &mut *rings;
        while let Some(waiting) = rings.backlog.front() {
            match rings.outgoing.put(&[waiting])? {
                Written::Done { signal } => {
                    rings.backlog.pop_front();
                    if signal {
                        self.signal_guest();
                    }
                }
                Written::Full => {
                    // The guest signals when it has made room: it must not be told to be silent.
                    if rings.masked {
                        rings.masked = false;
                        rings.incoming.set_interrupt_mask(false)?;
                    }
                    return Ok(None);
                }
            }
        }
        loop {
            if let Some((header, body, signal)) = rings.incoming.take()? {
                if signal {
                    self.signal_guest();
                }
                if !rings.masked {
                    rings.masked = true;
                    rings.incoming.set_interrupt_mask(true)?;
                }
                return decode(&header, body).map(Some);
            }
            if !rings.masked {
                return Ok(None);
            }
            rings.masked = false;
            rings.incoming.set_interrupt_mask(false)?;
            if rings.incoming.is_empty()? {
                return Ok(None);
            }
        }
    }

    /// Sends a packet. It never waits: what does not fit is sent when there is room, before the guest's next packet is
    /// taken.
    pub fn send(&self, kind: u16, flags: u16, transaction_id: u64, payload: &[u8]) -> Result<(), ChannelError> {
        if self.is_closed() {
            return Err(ChannelError::Closed);
        }
        let mut rings = self.rings();
        let len = size_of::<PacketHeader>() + payload.len().next_multiple_of(8);
        let capacity = rings.outgoing.capacity().min(usize::from(u16::MAX) * 8);
        if len > capacity {
            return Err(ChannelError::TooLong { len, capacity });
        }
        let header = PacketHeader {
            kind,
            offset8: (size_of::<PacketHeader>() / 8) as u16,
            len8: (len / 8) as u16,
            flags,
            transaction_id,
        };
        let padding = [0u8; 8];
        let parts = [header.as_bytes(), payload, &padding[..payload.len().next_multiple_of(8) - payload.len()]];
        // Order is kept: behind packets that wait, this one waits too.
        let written = if rings.backlog.is_empty() { rings.outgoing.put(&parts) } else { Ok(Written::Full) };
        match written {
            Ok(Written::Done { signal }) => {
                drop(rings);
                if signal {
                    self.signal_guest();
                }
                Ok(())
            }
            Ok(Written::Full) => {
                rings.backlog.push_back(parts.concat());
                drop(rings);
                // Another thread's packet: the device's thread must wait for the room.
                self.signals.signal();
                Ok(())
            }
            Err(error) => {
                drop(rings);
                Err(self.fail(&error))
            }
        }
    }

    /// Sends an in-band packet that wants no completion.
    pub fn send_in_band(&self, transaction_id: u64, payload: &[u8]) -> Result<(), ChannelError> {
        self.send(packet::IN_BAND, 0, transaction_id, payload)
    }

    /// Completes a packet of the guest.
    pub fn complete(&self, transaction_id: u64, payload: &[u8]) -> Result<(), ChannelError> {
        self.send(packet::COMPLETION, 0, transaction_id, payload)
    }
}

fn decode(header: &PacketHeader, body: Vec<u8>) -> Result<Packet, RingError> {
    let front = size_of::<PacketHeader>();
    // The ring has checked that the offset is inside the packet and behind the header.
    let offset = usize::from(header.offset8) * 8 - front;
    let (extra, payload) = body.split_at(offset);
    let ranges = if header.kind == packet::GPA_DIRECT {
        let bad = || RingError::Packet { len: body.len() + front, offset, available: body.len() + front };
        let (count, ranges) = extra.get(4..).and_then(|e| e.split_at_checked(4)).ok_or_else(bad)?;
        let count = u32::from_le_bytes([count[0], count[1], count[2], count[3]]) as usize;
        parse_ranges(ranges, count).map_err(|_| bad())?
    } else {
        Vec::new()
    };
    Ok(Packet {
        kind: header.kind,
        wants_completion: header.flags & packet::FLAG_COMPLETION_REQUESTED != 0,
        transaction_id: header.transaction_id,
        ranges,
        payload: payload.to_vec(),
    })
}
