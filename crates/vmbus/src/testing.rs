//! A synthetic interrupt controller and a guest in pure Rust, for tests of devices: it negotiates, opens, sends and
//! receives as Linux does.
#![allow(missing_docs, clippy::unwrap_used, reason = "test code: what fails panics")]

use crate::bus::*;
use partition::{Gpa, GuestMemory, VpIndex};
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tlfs::{EventPort, MessagePort};
use vmbus_protocol::message::{self as msg, Header, kind};
use vmbus_protocol::ring::{PacketHeader, control};
use vmbus_protocol::{PAGE, USER_DATA, Version};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

#[derive(Default)]
pub struct Wires {
    pub messages: VecDeque<(VpIndex, u8, Vec<u8>)>,
    pub events: Vec<(VpIndex, u8, u16)>,
    pub message_ports: HashMap<u32, Arc<dyn MessagePort>>,
    pub event_ports: HashMap<u32, Arc<dyn EventPort>>,
}

#[derive(Default)]
pub struct FakeSynic {
    pub wires: Mutex<Wires>,
    pub changed: Condvar,
}

impl FakeSynic {
    /// What is wired; whether a test that held it has failed does not matter to those that clean up after it.
    pub fn wires(&self) -> MutexGuard<'_, Wires> {
        self.wires.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Synic for FakeSynic {
    fn post_message(&self, vp: VpIndex, sint: u8, payload: Vec<u8>) -> bool {
        assert!(payload.len() <= 240);
        self.wires().messages.push_back((vp, sint, payload));
        self.changed.notify_all();
        true
    }
    fn clear_messages(&self, vp: VpIndex, sint: u8) {
        self.wires().messages.retain(|m| (m.0, m.1) != (vp, sint));
    }
    fn signal_event(&self, vp: VpIndex, sint: u8, flag: u16) -> bool {
        self.wires().events.push((vp, sint, flag));
        self.changed.notify_all();
        true
    }
    fn set_message_port(&self, connection: u32, port: Option<Arc<dyn MessagePort>>) {
        let ports = &mut self.wires().message_ports;
        match port {
            Some(port) => ports.insert(connection, port),
            None => ports.remove(&connection),
        };
    }
    fn set_event_port(&self, connection: u32, port: Option<(Arc<dyn EventPort>, u16)>) {
        let ports = &mut self.wires().event_ports;
        match port {
            Some((port, _)) => ports.insert(connection, port),
            None => ports.remove(&connection),
        };
    }
}

/// The guest's end of a channel.
pub struct Vsc {
    pub relid: u32,
    pub connection: u32,
    /// First page of the ring buffer; each ring has a control page and `pages - 1` of data.
    pub base: u64,
    pub pages: u64,
}

pub struct Guest {
    pub memory: Arc<GuestMemory>,
    pub synic: Arc<FakeSynic>,
    pub next_page: u64,
    pub next_gpadl: u32,
}

pub const WAIT: Duration = Duration::from_secs(10);

impl Guest {
    pub fn post(&self, message: &(impl IntoBytes + Immutable)) {
        self.post_bytes(message.as_bytes());
    }
    pub fn post_bytes(&self, bytes: &[u8]) {
        let port = self.synic.wires().message_ports[&4].clone();
        while port.post(0, 1, bytes).is_err() {
            std::thread::yield_now();
        }
    }
    pub fn message(&self) -> Vec<u8> {
        let mut wires = self.synic.wires();
        // In slices: a process that is stopped for a while has not waited.
        for _ in 0..100 {
            if let Some(message) = wires.messages.pop_front() {
                return message.2;
            }
            let waited = self.synic.changed.wait_timeout_while(wires, WAIT / 100, |w| w.messages.is_empty());
            wires = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        drop(wires);
        panic!("no message came");
    }
    pub fn expect<T: FromBytes + KnownLayout + Immutable>(&self, kind: u32) -> T {
        let message = self.message();
        assert_eq!({ Header::read_from_prefix(&message).unwrap().0.kind }, kind);
        T::read_from_prefix(&message).unwrap().0
    }
    pub fn connect(&self, version: Version) -> u8 {
        self.post(&msg::InitiateContact {
            header: Header::new(kind::INITIATE_CONTACT),
            version: version.0,
            target_vp: 0,
            interrupt_page_or_sint: if version >= Version::V5_0 { 2 } else { 0x1000 },
            monitor_page1: 0x2000,
            monitor_page2: 0x3000,
        });
        self.expect::<msg::VersionResponse>(kind::VERSION_RESPONSE).supported
    }
    pub fn offers(&self) -> Vec<msg::Offer> {
        self.post(&Header::new(kind::REQUEST_OFFERS));
        let mut offers = Vec::new();
        loop {
            let message = self.message();
            match Header::read_from_prefix(&message).unwrap().0.kind {
                kind::OFFER => offers.push(msg::Offer::read_from_prefix(&message).unwrap().0),
                kind::ALL_OFFERS_DELIVERED => return offers,
                other => panic!("message {other} among the offers"),
            }
        }
    }
    /// Makes a GPADL of contiguous pages in as many messages as it takes.
    pub fn gpadl(&mut self, relid: u32, first: u64, pages: u64) -> (u32, u32) {
        let id = self.next_gpadl;
        self.next_gpadl += 1;
        let mut ranges = msg::GpaRange { byte_count: (pages * 4096) as u32, byte_offset: 0 }.as_bytes().to_vec();
        (first..first + pages).for_each(|p| ranges.extend(p.to_le_bytes()));
        let header = msg::GpadlHeader {
            header: Header::new(kind::GPADL_HEADER),
            relid,
            gpadl: id,
            range_bytes: ranges.len() as u16,
            range_count: 1,
        };
        let (head, rest) = ranges.split_at(ranges.len().min(216));
        self.post_bytes(&[header.as_bytes(), head].concat());
        for (number, part) in rest.chunks(224).enumerate() {
            let body = msg::GpadlBody { header: Header::new(kind::GPADL_BODY), number: number as u32, gpadl: id };
            self.post_bytes(&[body.as_bytes(), part].concat());
        }
        (id, self.expect::<msg::GpadlCreated>(kind::GPADL_CREATED).status)
    }
    pub fn open(&mut self, offer: &msg::Offer, pages: u64) -> Vsc {
        let base = self.next_page;
        self.next_page += 2 * pages;
        self.memory.fill(Gpa(base * 4096), 0, 2 * pages * 4096).unwrap();
        let (gpadl, status) = self.gpadl(offer.relid, base, 2 * pages);
        assert_eq!(status, 0);
        assert_eq!(self.open_raw(offer.relid, gpadl, pages as u32, 0), 0);
        Vsc { relid: offer.relid, connection: offer.connection_id, base, pages }
    }
    pub fn open_raw(&self, relid: u32, ring_gpadl: u32, downstream_page: u32, target_vp: u32) -> u32 {
        self.post(&msg::Open {
            header: Header::new(kind::OPEN),
            relid,
            open_id: 99,
            ring_gpadl,
            target_vp,
            downstream_page,
            user_data: [3; USER_DATA],
        });
        let result: msg::OpenResult = self.expect(kind::OPEN_RESULT);
        assert_eq!({ result.open_id }, 99);
        result.status
    }
    pub fn signal(&self, connection: u32) {
        let port = self.synic.wires().event_ports.get(&connection).cloned();
        if let Some(port) = port {
            port.signal(0);
        }
    }
    pub fn field(&self, vsc: &Vsc, down: bool, field: u64) -> Gpa {
        Gpa((vsc.base + if down { vsc.pages } else { 0 }) * 4096 + field)
    }
    pub fn load(&self, vsc: &Vsc, down: bool, field: u64) -> u32 {
        self.memory.load_u32(self.field(vsc, down, field), Ordering::SeqCst).unwrap()
    }
    pub fn store(&self, vsc: &Vsc, down: bool, field: u64, value: u32) {
        self.memory.store_u32(self.field(vsc, down, field), value, Ordering::SeqCst).unwrap();
    }
    /// Writes raw bytes at an index of a ring, with wrap.
    pub fn copy(&self, vsc: &Vsc, at: u32, bytes: &[u8]) {
        let size = (vsc.pages as usize - 1) * PAGE;
        let mut at = at as usize % size;
        let mut rest = bytes;
        while !rest.is_empty() {
            let (now, later) = rest.split_at(rest.len().min(size - at));
            self.memory.write(self.field(vsc, false, (PAGE + at) as u64), now).unwrap();
            (at, rest) = (0, later);
        }
    }
    /// Sends a packet as Linux does: `false` if the ring is full.
    pub fn send(&self, vsc: &Vsc, kind: u16, flags: u16, id: u64, extra: &[u8], payload: &[u8]) -> bool {
        let size = ((vsc.pages - 1) * 4096) as u32;
        let len = 16 + extra.len() + payload.len().next_multiple_of(8);
        let index = |field| self.load(vsc, false, field) % size;
        // Within the ring, whatever has been written over the indices.
        let (write, read) = (index(control::WRITE_INDEX), index(control::READ_INDEX));
        let free = size - (write + size - read) % size;
        if free as usize <= len + 8 {
            return false;
        }
        let header = PacketHeader {
            kind,
            offset8: ((16 + extra.len()) / 8) as u16,
            len8: (len / 8) as u16,
            flags,
            transaction_id: id,
        };
        let mut bytes = [header.as_bytes(), extra, payload].concat();
        bytes.resize(len, 0);
        bytes.extend((u64::from(write) << 32).to_le_bytes());
        self.copy(vsc, write, &bytes);
        self.store(vsc, false, control::WRITE_INDEX, (write + bytes.len() as u32) % size);
        if self.load(vsc, false, control::INTERRUPT_MASK) == 0 && self.load(vsc, false, control::READ_INDEX) == write {
            self.signal(vsc.connection);
        }
        true
    }
    pub fn try_receive(&self, vsc: &Vsc) -> Option<(PacketHeader, Vec<u8>)> {
        let size = ((vsc.pages - 1) * 4096) as u32;
        let (write, read) = (self.load(vsc, true, control::WRITE_INDEX), self.load(vsc, true, control::READ_INDEX));
        if write == read {
            return None;
        }
        let byte = |at: u32| {
            let mut b = [0];
            self.memory.read(self.field(vsc, true, u64::from(4096 + at % size)), &mut b).unwrap();
            b[0]
        };
        let head: Vec<u8> = (0..16).map(|i| byte(read + i)).collect();
        let header = PacketHeader::read_from_bytes(&head).unwrap();
        let len = u32::from(header.len8) * 8;
        let payload = (16..len).map(|i| byte(read + i)).collect();
        let trailer: Vec<u8> = (len..len + 8).map(|i| byte(read + i)).collect();
        assert_eq!(trailer, (u64::from(read) << 32).to_le_bytes(), "the trailer says where the packet began");
        let read = (read + len + 8) % size;
        self.store(vsc, true, control::READ_INDEX, read);
        let wanted = self.load(vsc, true, control::PENDING_SEND_SIZE);
        // The write index once more: the host may have filled the ring meanwhile.
        let free = size - (self.load(vsc, true, control::WRITE_INDEX) + size - read) % size;
        if wanted != 0 && free - (len + 8) <= wanted && free > wanted {
            self.signal(vsc.connection);
        }
        Some((header, payload))
    }
    /// Takes everything that the host has sent, without a look at it.
    pub fn drain(&self, vsc: &Vsc) {
        let sent = self.load(vsc, true, control::WRITE_INDEX);
        self.store(vsc, true, control::READ_INDEX, sent);
        self.signal(vsc.connection);
    }
    pub fn receive(&self, vsc: &Vsc) -> (PacketHeader, Vec<u8>) {
        // Counted in turns, as above: a process that is stopped has not waited.
        const TURN: Duration = Duration::from_micros(50);
        for _ in 0..WAIT.as_micros() / TURN.as_micros() {
            if let Some(packet) = self.try_receive(vsc) {
                return packet;
            }
            std::thread::sleep(TURN);
        }
        let ring = |down| [0, 4, 8, 12].map(|field| self.load(vsc, down, field));
        panic!("no packet came; up: {:?}, down: {:?}", ring(false), ring(true));
    }
    pub fn take_events(&self) -> Vec<(VpIndex, u8, u16)> {
        std::mem::take(&mut self.synic.wires().events)
    }
}

pub fn world() -> (VmBus, Guest) {
    let memory = GuestMemory::with_ram(16 << 20, 0xc000_0000..1 << 32, false).unwrap();
    world_with(memory)
}

pub fn world_with(memory: Arc<GuestMemory>) -> (VmBus, Guest) {
    let synic = Arc::new(FakeSynic::default());
    let bus =
        VmBus::new(VmBusConfig { vp_count: 2, memory: memory.clone(), synic: synic.clone(), newest: Version::V5_3 })
            .unwrap();
    (bus, Guest { memory, synic, next_page: 0x100, next_gpadl: 0xe1e10 })
}
