//! Synthetic SCSI (facts: Linux `drivers/scsi/storvsc_drv.c`): disks and DVDs of a controller.

use super::channel::Channel;
use super::pass_thru;
use crate::cell::Global;
use crate::{arch, disk, log};
use alloc::vec;
use alloc::vec::Vec;
use vmbus_protocol::message::Offer;
use vmbus_protocol::ring::packet;
use vmbus_protocol::storage::{PacketHeader, ScsiRequest, operation, srb, version};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

/// Bytes of a vstor packet as sent: the same for all operations.
const PACKET: usize = 64;
/// How long an operation may take, in 100 ns units.
const PATIENCE: u64 = 300_000_000;
/// Largest transfer in one request.
pub const MAX_TRANSFER: usize = 256 << 10;

struct Controller {
    channel: Channel,
    next: u64,
    old: bool,
}

static CONTROLLERS: Global<Vec<Controller>> = Global::new(Vec::new());

/// Result of a SCSI command.
#[derive(Debug)]
pub enum ScsiError {
    /// CHECK CONDITION: sense key and ASC.
    Sense(u8, u8),
    /// The unit is not there.
    NoUnit,
    /// Something else.
    Failed,
}

/// Direction of data.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Data {
    None,
    In,
    Out,
}

impl Controller {
    /// Sends a packet and waits for its completion.
    fn transact(&mut self, payload: &[u8], buffer: u64, len: u32) -> Option<Vec<u8>> {
        let id = self.next;
        self.next += 1;
        let end = arch::now() + PATIENCE;
        while !self.channel.send_with_buffer(id, payload, buffer, len) {
            if arch::now() > end {
                return None;
            }
            core::hint::spin_loop();
        }
        while arch::now() < end {
            match self.channel.receive() {
                Some(p) if p.kind == packet::COMPLETION && p.transaction == id => return Some(p.payload),
                // Notices (a bus to enumerate, a device removed) are looked at when the next boot option is tried.
                Some(_) => {}
                None => core::hint::spin_loop(),
            }
        }
        log!("storage: the host has not answered");
        None
    }

    fn operation(&mut self, operation: u32, data: &[u8]) -> bool {
        let mut m = vec![0; PACKET];
        m[..12].copy_from_slice(PacketHeader { operation, flags: 1, status: 0 }.as_bytes());
        m[12..12 + data.len()].copy_from_slice(data);
        let answer = self.transact(&m, 0, 0);
        answer.is_some_and(|a| PacketHeader::read_from_prefix(&a).is_ok_and(|(h, _)| h.status == 0))
    }

    fn initialise(&mut self) -> bool {
        if !self.operation(operation::BEGIN_INITIALIZATION, &[]) {
            return false;
        }
        let found = version::ALL.iter().rev().find(|v| {
            let d = [v.to_le_bytes(), [0, 0]].concat();
            self.operation(operation::QUERY_PROTOCOL_VERSION, &d)
        });
        let Some(found) = found else { return false };
        self.old = *found < version::V5_1;
        self.operation(operation::QUERY_PROPERTIES, &[]) && self.operation(operation::END_INITIALIZATION, &[])
    }

    /// Executes a command and tells what the host says of it; nothing if it does not answer.
    fn execute(&mut self, lun: u8, cdb: &[u8], data: Data, buffer: u64, len: u32) -> Option<Outcome> {
        let mut r = ScsiRequest::new_zeroed();
        r.length = if self.old { 0x24 } else { 0x34 };
        r.lun = lun;
        r.cdb_length = cdb.len() as u8;
        r.sense_length = 20;
        r.data_in = match data {
            Data::In => srb::DATA_IN,
            Data::Out => srb::DATA_OUT,
            Data::None => srb::DATA_UNKNOWN,
        };
        r.transfer_length = len;
        r.cdb_or_sense[..cdb.len()].copy_from_slice(cdb);
        // SRB_FLAGS: disable synchronous transfer (8), data in (0x40) or out (0x80).
        r.srb_flags = 8 | match data {
            Data::In => 0x40,
            Data::Out => 0x80,
            Data::None => 0,
        };
        r.timeout = 60;
        let mut m = Vec::with_capacity(PACKET);
        m.extend_from_slice(PacketHeader { operation: operation::EXECUTE_SRB, flags: 1, status: 0 }.as_bytes());
        m.extend_from_slice(r.as_bytes());
        let answer = self.transact(&m, buffer, len)?;
        let (_, rest) = PacketHeader::read_from_prefix(&answer).ok()?;
        // An old host's request is shorter.
        let mut full = [0u8; 0x34];
        let n = rest.len().min(0x34);
        full[..n].copy_from_slice(&rest[..n]);
        let a = ScsiRequest::read_from_bytes(&full).ok()?;
        Some(Outcome {
            transferred: a.transfer_length.min(len),
            srb: a.srb_status & 0x3f,
            status: a.scsi_status,
            sense: a.cdb_or_sense,
            sense_length: usize::from(a.sense_length).min(a.cdb_or_sense.len()),
        })
    }

    fn command(&mut self, lun: u8, cdb: &[u8], data: Data, buffer: u64, len: u32) -> Result<u32, ScsiError> {
        let a = self.execute(lun, cdb, data, buffer, len).ok_or(ScsiError::Failed)?;
        match (a.srb, a.status) {
            (srb::SUCCESS, 0) => Ok(a.transferred),
            (srb::INVALID_LUN, _) => Err(ScsiError::NoUnit),
            (_, 2) => Err(ScsiError::Sense(a.sense[2] & 15, a.sense[12])),
            _ => Err(ScsiError::Failed),
        }
    }
}

/// What became of a command.
pub struct Outcome {
    /// Bytes of data that were transferred.
    pub transferred: u32,
    /// SRB status without its flags.
    pub srb: u8,
    /// SCSI status: 2 is CHECK CONDITION.
    pub status: u8,
    /// Sense data, if there is any.
    pub sense: [u8; 20],
    /// How many bytes of it there are.
    pub sense_length: usize,
}

/// Executes a command for whoever wants the whole answer.
pub fn execute(
    controller: usize,
    lun: u8,
    cdb: &[u8],
    data: Data,
    buffer: *mut u8,
    len: usize,
) -> Result<Outcome, ScsiError> {
    CONTROLLERS.with(|all| {
        let c = all.get_mut(controller).ok_or(ScsiError::NoUnit)?;
        c.execute(lun, cdb, data, buffer as u64, len as u32).ok_or(ScsiError::Failed)
    })
}

/// Executes a command on a unit of a controller.
pub fn command(
    controller: usize,
    lun: u8,
    cdb: &[u8],
    data: Data,
    buffer: *mut u8,
    len: usize,
) -> Result<u32, ScsiError> {
    CONTROLLERS.with(|all| {
        let c = all.get_mut(controller).ok_or(ScsiError::NoUnit)?;
        c.command(lun, cdb, data, buffer as u64, len as u32)
    })
}

/// Starts a controller and finds its units.
pub fn start(offer: &Offer) {
    let Some(channel) = Channel::open(offer) else {
        log!("storage: the channel cannot be opened");
        return;
    };
    let mut c = Controller { channel, next: 1, old: false };
    if !c.initialise() {
        log!("storage: the host accepts no protocol version");
        return;
    }
    let index = CONTROLLERS.with(|all| {
        all.push(c);
        all.len() - 1
    });
    let path = super::device_path(offer);
    let found = units(index);
    pass_thru::install(index, &path, &found);
    for lun in found {
        disk::add(ScsiUnit { controller: index, lun }, &path.clone().scsi(0, u16::from(lun)));
    }
}

/// A unit of a controller.
#[derive(Clone, Copy)]
pub struct ScsiUnit {
    pub controller: usize,
    pub lun: u8,
}

impl ScsiUnit {
    /// Executes a command with a buffer.
    pub fn command(&self, cdb: &[u8], data: Data, buffer: &mut [u8]) -> Result<usize, ScsiError> {
        command(self.controller, self.lun, cdb, data, buffer.as_mut_ptr(), buffer.len()).map(|n| n as usize)
    }
}

fn units(controller: usize) -> Vec<u8> {
    // REPORT LUNS, to unit 0; a host without a unit 0 may not answer it.
    let mut list = vec![0u8; 8 + 64 * 8];
    let len = list.len() as u32;
    let mut cdb = [0u8; 12];
    cdb[0] = 0xa0;
    cdb[6..10].copy_from_slice(&len.to_be_bytes());
    let unit = ScsiUnit { controller, lun: 0 };
    if unit.command(&cdb, Data::In, &mut list).is_ok() {
        let n = u32::from_be_bytes([list[0], list[1], list[2], list[3]]) as usize / 8;
        return list[8..].chunks_exact(8).take(n).filter(|l| l[0] == 0 && l[1] < 64).map(|l| l[1]).collect();
    }
    (0..64)
        .filter(|lun| {
            let mut d = [0u8; 36];
            let r = ScsiUnit { controller, lun: *lun }.command(&[0x12, 0, 0, 0, 36, 0], Data::In, &mut d);
            r.is_ok() && d[0] >> 5 == 0
        })
        .collect()
}

/// Forgets the controllers: their memory is the operating system's now.
pub fn stop() {
    CONTROLLERS.with(Vec::clear);
}
