//! The synthetic SCSI controller (storvsp): up to 64 units on one controller, sub-channels with a thread each.
//!
//! The way of a command: the channel's thread reads the packet, pins the guest's buffers and hands the command to the
//! unit's target; the target's completion, on whatever thread, writes the answer to the ring. Payloads are not copied
//! here.

use crate::{SyntheticDevice, from_value, lock, to_value};
use partition::{Gpa, GuestMemory};
use scsi::protocol::{Sense, Status};
use scsi::{Cdb, DiskState, DvdState, Request, Response, ScsiDisk, ScsiDvd, Target};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use vhd::IoBuffer;
use vmbus::protocol::message::offer_flags;
use vmbus::protocol::ring::packet;
use vmbus::protocol::storage::{
    ChannelProperties, OLD_PACKET_BYTES, PACKET_BYTES, PROPERTY_MULTI_CHANNEL, PacketHeader, SENSE_BYTES, ScsiRequest,
    operation, srb, status, version,
};
use vmbus::protocol::{Guid, USER_DATA, class};
use vmbus::{Channel, ChannelDevice, GpaRange, Next, OfferKey, OfferParams, OpenRefused, Packet};
use zerocopy::{FromBytes, IntoBytes};

/// Units of a controller.
pub const MOST_UNITS: u8 = 64;
/// Bytes of one command that the guest is told.
const MAX_TRANSFER: u32 = 256 << 10;
/// Bytes of one command that are accepted.
const ACCEPTED_TRANSFER: u32 = 8 << 20;
/// Commands of one channel that may be in flight.
const QUEUE_DEPTH: usize = 1024;
/// Standard INQUIRY data of a unit that is not there: peripheral qualifier 3, device type 1Fh (SPC-4, 6.6.2).
const ABSENT_INQUIRY: [u8; 36] = {
    let mut data = [0; 36];
    data[0] = 0x7f;
    data[4] = 31;
    data
};

/// A unit.
#[derive(Clone)]
pub enum Unit {
    /// A disk.
    Disk(Arc<ScsiDisk>),
    /// A DVD drive.
    Dvd(Arc<ScsiDvd>),
}

impl Unit {
    fn target(&self) -> &dyn Target {
        match self {
            Self::Disk(disk) => &**disk,
            Self::Dvd(dvd) => &**dvd,
        }
    }
}

/// A LUN is occupied, or beyond the controller's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unit {0} is occupied or not one of the controller's 64")]
pub struct BadLun(pub u8);

#[derive(Serialize, Deserialize)]
enum UnitState {
    Disk(Box<DiskState>),
    Dvd(DvdState),
}

#[derive(Clone, Copy, Default, Serialize, Deserialize)]
struct Negotiated {
    version: u16,
    initialized: bool,
}

#[derive(Serialize, Deserialize)]
struct State {
    negotiated: Negotiated,
    units: BTreeMap<u8, UnitState>,
}

#[derive(Default)]
struct Counters {
    commands: AtomicU64,
    sub_channel_commands: AtomicU64,
}

/// What channels share.
struct Shared {
    sub_channels: u16,
    negotiated: Mutex<Negotiated>,
    units: Mutex<BTreeMap<u8, Unit>>,
    counters: Counters,
}

/// A controller.
pub struct StorageController {
    name: String,
    instance: Guid,
    shared: Arc<Shared>,
    channels: Mutex<HashMap<u16, (Arc<Channel>, JoinHandle<()>)>>,
}

impl StorageController {
    /// A controller without units. `number` (0 to 3) makes its name and its instance GUID; a guest with `vp_count` VPs
    /// may ask for a channel for each.
    pub fn new(number: u32, vp_count: u32) -> Arc<Self> {
        Arc::new(Self {
            name: format!("scsi{number}"),
            instance: Guid::new(0x5669_7264, 0x5343, number as u16, 0x8000_0053_4353_4900 | u64::from(number)),
            shared: Arc::new(Shared {
                sub_channels: vp_count.saturating_sub(1).min(63) as u16,
                negotiated: Mutex::default(),
                units: Mutex::default(),
                counters: Counters::default(),
            }),
            channels: Mutex::default(),
        })
    }

    /// Its instance.
    pub fn instance(&self) -> Guid {
        self.instance
    }

    /// Adds a unit; a guest that runs is told.
    pub fn attach(&self, lun: u8, unit: Unit) -> Result<(), BadLun> {
        let mut units = lock(&self.shared.units);
        if lun >= MOST_UNITS || units.contains_key(&lun) {
            return Err(BadLun(lun));
        }
        units.insert(lun, unit);
        drop(units);
        self.announce();
        Ok(())
    }

    /// Removes a unit; commands that it executes end as they do. A guest that runs is told.
    pub fn detach(&self, lun: u8) -> Option<Unit> {
        let unit = lock(&self.shared.units).remove(&lun);
        if unit.is_some() {
            self.announce();
        }
        unit
    }

    /// A unit.
    pub fn unit(&self, lun: u8) -> Option<Unit> {
        lock(&self.shared.units).get(&lun).cloned()
    }

    /// Tells the guest to look at its units again.
    pub fn announce(&self) {
        if !lock(&self.shared.negotiated).initialized {
            return;
        }
        if let Some((channel, _)) = lock(&self.channels).get(&0) {
            let header = PacketHeader { operation: operation::ENUMERATE_BUS, flags: 0, status: 0 };
            let mut bytes = [0; PACKET_BYTES];
            bytes[..12].copy_from_slice(header.as_bytes());
            // A channel that is closing does not need to know.
            let _ = channel.send_in_band(0, &bytes);
        }
    }
}

impl ChannelDevice for StorageController {
    fn offer(&self) -> OfferParams {
        OfferParams {
            key: OfferKey { class: class::SCSI, instance: self.instance, sub_channel: 0 },
            flags: offer_flags::ENUMERATE,
            mmio_megabytes: 0,
            user_data: [0; USER_DATA],
            monitored: false,
        }
    }

    fn opened(&self, channel: Arc<Channel>) -> Result<(), OpenRefused> {
        let sub = channel.sub_channel();
        if sub == 0 && !channel.is_restored() {
            *lock(&self.shared.negotiated) = Negotiated::default();
        }
        let (shared, mine) = (self.shared.clone(), channel.clone());
        let thread = std::thread::Builder::new()
            .name(format!("{}.{sub}", self.name))
            .spawn(move || serve(&shared, &mine))
            .map_err(|e| OpenRefused(e.to_string()))?;
        lock(&self.channels).insert(sub, (channel, thread));
        Ok(())
    }

    fn closed(&self, sub: u16) {
        // The lock is not held while the thread ends.
        let channel = lock(&self.channels).remove(&sub);
        if let Some((_, thread)) = channel {
            let _ = thread.join();
        }
    }
}

impl SyntheticDevice for StorageController {
    fn name(&self) -> &str {
        &self.name
    }

    fn save(&self) -> Result<ciborium::Value, String> {
        let units = lock(&self.shared.units);
        let units = units.iter().map(|(lun, unit)| {
            let state = match unit {
                Unit::Disk(disk) => UnitState::Disk(Box::new(disk.save())),
                Unit::Dvd(dvd) => UnitState::Dvd(dvd.save()),
            };
            (*lun, state)
        });
        to_value(&State { negotiated: *lock(&self.shared.negotiated), units: units.collect() })
    }

    fn restore(&self, state: &ciborium::Value) -> Result<(), String> {
        let state: State = from_value(state)?;
        let units = lock(&self.shared.units);
        for (lun, saved) in state.units {
            match (units.get(&lun), saved) {
                (Some(Unit::Disk(disk)), UnitState::Disk(saved)) => disk.restore(*saved)?,
                (Some(Unit::Dvd(dvd)), UnitState::Dvd(saved)) => dvd.restore(saved)?,
                _ => return Err(format!("unit {lun} of the saved machine is missing or of another kind")),
            }
        }
        *lock(&self.shared.negotiated) = state.negotiated;
        Ok(())
    }

    fn reset(&self) {
        *lock(&self.shared.negotiated) = Negotiated::default();
        lock(&self.shared.units).values().for_each(|unit| unit.target().reset());
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let c = &self.shared.counters;
        vec![
            ("scsi_commands", c.commands.load(Ordering::Relaxed)),
            ("scsi_sub_channel_commands", c.sub_channel_commands.load(Ordering::Relaxed)),
        ]
    }
}

/// The thread of a channel.
fn serve(shared: &Arc<Shared>, channel: &Arc<Channel>) {
    loop {
        match channel.next(None) {
            Next::Packet(packet) => handle(shared, channel, packet),
            Next::Woken | Next::Timeout => {}
            Next::Closed => break,
        }
    }
    // Completions use the channel; they are over when this thread has ended.
    channel.finish();
}

/// Where the answer to a packet goes.
struct Answer {
    channel: Arc<Channel>,
    transaction_id: u64,
    wanted: bool,
    /// As long as the guest's packet.
    bytes: usize,
}

impl Answer {
    fn send(&self, status: u32, payload: &[u8]) {
        if !self.wanted {
            return;
        }
        let mut bytes = [0; PACKET_BYTES];
        let header = PacketHeader { operation: operation::COMPLETE_IO, flags: 0, status };
        bytes[..12].copy_from_slice(header.as_bytes());
        let len = payload.len().min(PACKET_BYTES - 12);
        bytes[12..12 + len].copy_from_slice(&payload[..len]);
        // A channel that was closed meanwhile has nobody who waits.
        let _ = self.channel.complete(self.transaction_id, &bytes[..self.bytes]);
    }
}

fn handle(shared: &Arc<Shared>, channel: &Arc<Channel>, packet: Packet) {
    if !matches!(packet.kind, packet::IN_BAND | packet::GPA_DIRECT) {
        return;
    }
    let mut bytes = [0; PACKET_BYTES];
    let len = packet.payload.len().min(PACKET_BYTES);
    bytes[..len].copy_from_slice(&packet.payload[..len]);
    let answer = Answer {
        channel: channel.clone(),
        transaction_id: packet.transaction_id,
        wanted: packet.wants_completion,
        bytes: if len < PACKET_BYTES { OLD_PACKET_BYTES } else { PACKET_BYTES },
    };
    let (Ok((header, payload)), true) = (PacketHeader::read_from_prefix(&bytes), len >= 12) else {
        return answer.send(status::INVALID_PARAMETER, &[]);
    };
    let primary = channel.sub_channel() == 0;
    match header.operation {
        operation::EXECUTE_SRB => {
            if !lock(&shared.negotiated).initialized {
                return answer.send(status::INVALID_DEVICE_STATE, payload);
            }
            let Ok((request, _)) = ScsiRequest::read_from_prefix(payload) else { return };
            shared.counters.commands.fetch_add(1, Ordering::Relaxed);
            if !primary {
                shared.counters.sub_channel_commands.fetch_add(1, Ordering::Relaxed);
            }
            execute(shared, answer, request, &packet.ranges);
        }
        operation::RESET_LUN | operation::RESET_ADAPTER | operation::RESET_BUS => {
            let units: Vec<Unit> = lock(&shared.units).values().cloned().collect();
            units.iter().for_each(|unit| unit.target().reset());
            answer.send(status::SUCCESS, payload);
        }
        // The rest sets the controller up, on its first channel.
        _ if !primary => answer.send(status::INVALID_DEVICE_STATE, payload),
        operation::BEGIN_INITIALIZATION => {
            *lock(&shared.negotiated) = Negotiated::default();
            answer.send(status::SUCCESS, &[]);
        }
        operation::QUERY_PROTOCOL_VERSION => {
            let wanted = u16::from_le_bytes([bytes[12], bytes[13]]);
            if version::ALL.contains(&wanted) {
                lock(&shared.negotiated).version = wanted;
                answer.send(status::SUCCESS, payload);
            } else {
                answer.send(status::REVISION_MISMATCH, payload);
            }
        }
        operation::QUERY_PROPERTIES => {
            let multi = lock(&shared.negotiated).version >= version::V5_1 && shared.sub_channels > 0;
            let properties = ChannelProperties {
                reserved: 0,
                max_sub_channels: if multi { shared.sub_channels } else { 0 },
                reserved1: 0,
                flags: if multi { PROPERTY_MULTI_CHANNEL } else { 0 },
                max_transfer_bytes: MAX_TRANSFER,
                reserved2: 0,
            };
            answer.send(status::SUCCESS, properties.as_bytes());
        }
        operation::END_INITIALIZATION => {
            let mut negotiated = lock(&shared.negotiated);
            let ready = negotiated.version != 0;
            negotiated.initialized = ready;
            drop(negotiated);
            answer.send(if ready { status::SUCCESS } else { status::INVALID_DEVICE_STATE }, &[]);
        }
        operation::CREATE_SUB_CHANNELS => {
            let count = u16::from_le_bytes([bytes[12], bytes[13]]);
            let negotiated = *lock(&shared.negotiated);
            if negotiated.initialized && negotiated.version >= version::V5_1 && count <= shared.sub_channels {
                answer.send(status::SUCCESS, &[]);
                channel.offer_sub_channels(count);
            } else {
                answer.send(status::INVALID_PARAMETER, &[]);
            }
        }
        _ => answer.send(status::INVALID_PARAMETER, payload),
    }
}

/// A command on its way through a target.
struct Command {
    answer: Answer,
    request: ScsiRequest,
    /// What the host writes into.
    written: Vec<(Gpa, usize)>,
    memory: Arc<GuestMemory>,
}

impl Command {
    fn end(mut self, srb_status: u8, response: Option<&Response>) {
        self.request.srb_status = srb_status;
        self.request.scsi_status = response.map_or(0, |r| r.status as u8);
        self.request.transfer_length = response.map_or(0, |r| r.transferred as u32);
        self.request.sense_length = 0;
        self.request.cdb_or_sense = [0; SENSE_BYTES];
        if let Some(sense) = response.and_then(|r| r.sense) {
            let fixed: [u8; 18] = Sense::to_fixed(sense);
            self.request.cdb_or_sense[..18].copy_from_slice(&fixed);
            self.request.sense_length = 18;
        }
        for (gpa, len) in &self.written {
            self.memory.io_done(*gpa, *len as u64);
        }
        self.answer.send(status::SUCCESS, self.request.as_bytes());
    }

    fn complete(self, response: &Response) {
        let srb_status = match response.status {
            Status::Good => srb::SUCCESS,
            Status::CheckCondition if response.sense.is_some() => srb::ERROR | srb::AUTOSENSE_VALID,
            _ => srb::ERROR,
        };
        self.end(srb_status, Some(response));
    }

    /// Ends with these bytes as data-in, cut to what the guest has room for.
    fn complete_with(self, ranges: &[GpaRange], allocation: usize, data: &[u8]) {
        let room = ranges.first().map_or(0, |r| r.len as usize).min(self.request.transfer_length as usize);
        let len = data.len().min(allocation).min(room);
        // A buffer that is not memory gets nothing, and the guest is told so.
        let good = len == 0 || ranges[0].write(&self.memory, 0, &data[..len]).is_ok();
        let response = Response { status: Status::Good, sense: None, transferred: len, data: None };
        if good { self.complete(&response) } else { self.end(srb::INVALID_REQUEST, None) }
    }
}

fn execute(shared: &Arc<Shared>, answer: Answer, request: ScsiRequest, ranges: &[GpaRange]) {
    let channel = answer.channel.clone();
    let memory = channel.memory().clone();
    let mut command = Command { answer, request, written: Vec::new(), memory: memory.clone() };
    let cdb_len = usize::from(request.cdb_length);
    if cdb_len == 0 || cdb_len > 16 {
        return command.end(srb::INVALID_REQUEST, None);
    }
    let cdb = Cdb::new(&request.cdb_or_sense[..cdb_len]);
    let here = request.path == 0 && request.target == 0;
    if cdb.opcode() == scsi::protocol::op::REPORT_LUNS {
        // Other paths and targets have no units: Linux asks them all, and logs what is not an answer.
        let luns: Vec<u8> = if here { lock(&shared.units).keys().copied().collect() } else { Vec::new() };
        return command.complete_with(ranges, cdb.u32(6) as usize, &scsi::report_luns(&luns));
    }
    let unit = if here { lock(&shared.units).get(&request.lun).cloned() } else { None };
    let Some(unit) = unit else {
        if cdb.opcode() == scsi::protocol::op::INQUIRY {
            return command.complete_with(ranges, usize::from(cdb.u16(3)), &ABSENT_INQUIRY);
        }
        return command.end(srb::INVALID_LUN, None);
    };
    let to_guest = request.data_in != srb::DATA_OUT;
    let data = match pin(&memory, ranges, request.transfer_length, to_guest) {
        Ok((data, extents)) => {
            if to_guest {
                command.written = extents;
            }
            data
        }
        Err(reason) => {
            tracing::debug!(reason, "a SCSI command's buffer is refused");
            return command.end(srb::INVALID_REQUEST, None);
        }
    };
    let work = channel.begin_work(QUEUE_DEPTH);
    unit.target().execute(
        Request { cdb, data, initiator: 0 },
        Box::new(move |response| {
            command.complete(&response);
            // The guest's memory is no longer pinned, and the channel no longer used.
            drop(response);
            drop(channel);
            drop(work);
        }),
    );
}

/// Pins a command's buffer, cut to the transfer length.
fn pin(
    memory: &GuestMemory,
    ranges: &[GpaRange],
    transfer: u32,
    write: bool,
) -> Result<(Option<IoBuffer>, Vec<(Gpa, usize)>), &'static str> {
    let [range] = ranges else {
        return if ranges.is_empty() { Ok((None, Vec::new())) } else { Err("more than one buffer") };
    };
    let mut left = transfer.min(range.len) as usize;
    if left == 0 {
        return Ok((None, Vec::new()));
    }
    if left > ACCEPTED_TRANSFER as usize {
        return Err("longer than 8 MiB");
    }
    let mut extents = range.extents().map_err(|_| "outside its pages")?;
    let mut pinned = Vec::with_capacity(extents.len());
    extents.retain_mut(|(_, len)| {
        *len = (*len).min(left);
        left -= *len;
        *len > 0
    });
    for (gpa, len) in &extents {
        pinned.extend(memory.pin(*gpa, *len as u64, write).map_err(|_| "not in guest memory")?);
    }
    Ok((Some(IoBuffer::from_guest(pinned)), extents))
}
