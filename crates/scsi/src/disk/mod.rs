//! The disk: SBC-3 as Linux and Windows use it.

mod inquiry;
mod mode;
mod opcodes;
mod reservation;
mod rw;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use serde::{Deserialize, Serialize};
use vhd::{Disk, IoBuffer};

use crate::cdb::Cdb;
use crate::protocol::{Sense, op};
use crate::target::{Done, Initiator, Request, Response, Target, data_in, data_out, report_luns};
use reservation::Reservations;

/// How a disk presents itself.
#[derive(Debug, Clone)]
pub struct DiskConfig {
    /// INQUIRY's vendor, eight characters.
    pub vendor: [u8; 8],
    /// INQUIRY's product, sixteen characters.
    pub product: [u8; 16],
    /// INQUIRY's revision, four characters.
    pub revision: [u8; 4],
}

impl Default for DiskConfig {
    /// As Hyper-V's disks are named.
    fn default() -> Self {
        Self { vendor: *b"Msft    ", product: *b"Virtual Disk    ", revision: *b"1.0 " }
    }
}

/// What of a disk target is saved with a VM.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DiskState {
    /// Version of this structure.
    pub version: u32,
    /// Write cache enabled (mode page 08h).
    write_cache: bool,
    /// Sense data in descriptor format (mode page 0Ah, D_SENSE).
    descriptor_sense: bool,
    /// Not stopped by START STOP UNIT.
    started: bool,
    /// The size that the initiators know.
    known_size: u64,
    /// Unit attentions that wait, by initiator.
    attentions: BTreeMap<Initiator, Vec<Sense>>,
    reservations: Reservations,
}

/// Version of [`DiskState`].
const STATE_VERSION: u32 = 1;
/// Unit attentions kept for one initiator; older ones give way to a reset's.
const MAX_ATTENTIONS: usize = 8;
/// Initiators known to a unit: nodes of a cluster, not guests' whims; transports number them.
const MAX_INITIATORS: usize = 64;

pub(crate) struct Inner {
    disk: Arc<Disk>,
    config: DiskConfig,
    state: Mutex<DiskState>,
}

/// A SCSI disk over a virtual disk.
pub struct ScsiDisk {
    inner: Arc<Inner>,
}

impl ScsiDisk {
    /// A disk that has just been powered on.
    pub fn new(disk: Arc<Disk>, config: DiskConfig) -> Self {
        let state = DiskState {
            version: STATE_VERSION,
            write_cache: true,
            descriptor_sense: false,
            started: true,
            known_size: disk.size(),
            attentions: BTreeMap::new(),
            reservations: Reservations::default(),
        };
        Self { inner: Arc::new(Inner { disk, config, state: Mutex::new(state) }) }
    }

    /// The medium.
    pub fn disk(&self) -> &Arc<Disk> {
        &self.inner.disk
    }

    /// The state for saving. Commands must have ended.
    pub fn save(&self) -> DiskState {
        self.inner.lock().clone()
    }

    /// Takes a saved state; refuses another version's.
    pub fn restore(&self, state: DiskState) -> Result<(), String> {
        if state.version != STATE_VERSION {
            return Err(format!("SCSI disk state of version {}, expected {STATE_VERSION}", state.version));
        }
        *self.inner.lock() = state;
        Ok(())
    }

    /// Whether sense data is to be given in descriptor format (the guest chose it with mode page 0Ah).
    pub fn descriptor_sense(&self) -> bool {
        self.inner.lock().descriptor_sense
    }
}

impl Target for ScsiDisk {
    fn execute(&self, request: Request, done: Done) {
        self.inner.clone().execute(request, done);
    }

    fn reset(&self) {
        let mut s = self.inner.lock();
        s.started = true;
        s.attention_for_all(Sense::POWER_ON_OR_RESET, None);
    }
}

impl DiskState {
    fn know(&mut self, initiator: Initiator) {
        if self.attentions.len() < MAX_INITIATORS {
            self.attentions.entry(initiator).or_default();
        }
    }

    /// Establishes a unit attention for every initiator but one.
    fn attention_for_all(&mut self, sense: Sense, but: Option<Initiator>) {
        for (&i, list) in &mut self.attentions {
            if Some(i) != but {
                push_attention(list, sense);
            }
        }
    }

    fn attention_for(&mut self, initiator: Initiator, sense: Sense) {
        if let Some(list) = self.attentions.get_mut(&initiator) {
            push_attention(list, sense);
        }
    }
}

fn push_attention(list: &mut Vec<Sense>, sense: Sense) {
    if sense == Sense::POWER_ON_OR_RESET {
        list.clear();
    }
    if !list.contains(&sense) && list.len() < MAX_ATTENTIONS {
        list.push(sense);
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, DiskState> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn sector(&self) -> u64 {
        u64::from(self.disk.info().logical_sector_size)
    }

    fn blocks(&self) -> u64 {
        self.disk.size() / self.sector()
    }

    /// Checks that come before a command is looked at: unit attention, reservations.
    fn admit(&self, cdb: &Cdb, initiator: Initiator) -> Result<(), Refusal> {
        cdb.check().map_err(Refusal::Check)?;
        let mut s = self.lock();
        s.know(initiator);
        let size = self.disk.size();
        if s.known_size != size {
            s.known_size = size;
            s.attention_for_all(Sense::CAPACITY_DATA_HAS_CHANGED, None);
        }
        // SAM-5 5.14: these are executed in spite of a unit attention.
        let exempt = matches!(cdb.opcode(), op::INQUIRY | op::REPORT_LUNS | op::REQUEST_SENSE);
        if !exempt && let Some(list) = s.attentions.get_mut(&initiator).filter(|l| !l.is_empty()) {
            return Err(Refusal::Check(list.remove(0)));
        }
        if !s.reservations.allows(initiator, cdb) {
            return Err(Refusal::Conflict);
        }
        if !s.started && needs_medium(cdb.opcode()) {
            return Err(Refusal::Check(Sense::STOPPED));
        }
        Ok(())
    }

    fn execute(self: Arc<Self>, r: Request, done: Done) {
        match self.admit(&r.cdb, r.initiator) {
            Ok(()) => {}
            Err(Refusal::Check(sense)) => return done(Response::check(sense, r.data)),
            Err(Refusal::Conflict) => return done(Response::conflict(r.data)),
        }
        match r.cdb.opcode() {
            op::READ_6 | op::READ_10 | op::READ_12 | op::READ_16 => self.read(r, done),
            op::WRITE_6 | op::WRITE_10 | op::WRITE_12 | op::WRITE_16 => self.write(r, done),
            op::WRITE_AND_VERIFY_10 | op::WRITE_AND_VERIFY_12 | op::WRITE_AND_VERIFY_16 => {
                self.write_and_verify(r, done);
            }
            op::VERIFY_10 | op::VERIFY_12 | op::VERIFY_16 => self.verify(r, done),
            op::SYNCHRONIZE_CACHE_10 | op::SYNCHRONIZE_CACHE_16 => self.synchronize_cache(r, done),
            op::UNMAP => self.unmap(r, done),
            op::WRITE_SAME_10 | op::WRITE_SAME_16 => self.write_same(r, done),
            op::START_STOP_UNIT => self.start_stop(r, done),
            _ => {
                let Request { cdb, data, initiator } = r;
                done(self.immediate(&cdb, data, initiator));
            }
        }
    }

    /// Commands that need no medium access.
    fn immediate(&self, cdb: &Cdb, data: Option<IoBuffer>, initiator: Initiator) -> Response {
        let answer = match cdb.opcode() {
            op::TEST_UNIT_READY | op::SEND_DIAGNOSTIC | op::PREVENT_ALLOW_MEDIUM_REMOVAL => {
                // The medium is fixed; a default self-test (SPC-4 6.42) has nothing to find.
                if cdb.opcode() == op::SEND_DIAGNOSTIC && (cdb.u8(1) & 0xe3 != 0 || cdb.u16(3) != 0) {
                    Err(Sense::INVALID_FIELD_IN_CDB)
                } else {
                    return Response::good(data, 0);
                }
            }
            op::REQUEST_SENSE => {
                let mut s = self.lock();
                let sense = match s.attentions.get_mut(&initiator) {
                    Some(l) if !l.is_empty() => l.remove(0),
                    _ => Sense::NONE,
                };
                let bytes = if cdb.u8(1) & 1 != 0 { sense.to_descriptor().to_vec() } else { sense.to_fixed().to_vec() };
                Ok((bytes, usize::from(cdb.u8(4))))
            }
            op::INQUIRY => self.inquiry(cdb).map(|b| (b, usize::from(cdb.u16(3)))),
            op::MODE_SENSE_6 => self.mode_sense(cdb).map(|b| (b, usize::from(cdb.u8(4)))),
            op::MODE_SENSE_10 => self.mode_sense(cdb).map(|b| (b, usize::from(cdb.u16(7)))),
            op::MODE_SELECT_6 | op::MODE_SELECT_10 => {
                let six = cdb.opcode() == op::MODE_SELECT_6;
                let len = if six { usize::from(cdb.u8(4)) } else { usize::from(cdb.u16(7)) };
                let done = data_out(data.as_ref(), len, 4096).and_then(|list| self.mode_select(cdb, &list, initiator));
                return finish_out(done, data, len);
            }
            op::READ_CAPACITY_10 => self.read_capacity_10(cdb).map(|b| (b, 8)),
            op::SERVICE_ACTION_IN_16 if cdb.service_action() == op::SA_READ_CAPACITY_16 => {
                Ok((self.read_capacity_16(), cdb.u32(10) as usize))
            }
            op::MAINTENANCE_IN if cdb.service_action() == op::SA_REPORT_SUPPORTED_OPCODES => {
                opcodes::report(cdb).map(|b| (b, cdb.u32(6) as usize))
            }
            // Transports with more units answer themselves; alone, a unit knows only of itself.
            op::REPORT_LUNS => {
                if cdb.u8(2) > 2 {
                    Err(Sense::INVALID_FIELD_IN_CDB)
                } else {
                    Ok((report_luns(&[0]), cdb.u32(6) as usize))
                }
            }
            op::PERSISTENT_RESERVE_IN => self.lock().reservations.reserve_in(cdb).map(|b| (b, usize::from(cdb.u16(7)))),
            op::PERSISTENT_RESERVE_OUT => {
                let len = cdb.u32(5) as usize;
                let list = match data_out(data.as_ref(), len, 4096) {
                    Ok(l) => l,
                    Err(e) => return Response::check(e, data),
                };
                return match reservation::reserve_out(&mut self.lock(), cdb, &list, initiator) {
                    Ok(()) => Response::good(data, len),
                    Err(reservation::Refused::Sense(e)) => Response::check(e, data),
                    Err(reservation::Refused::Conflict) => Response::conflict(data),
                };
            }
            op::SERVICE_ACTION_IN_16 | op::MAINTENANCE_IN => Err(Sense::INVALID_FIELD_IN_CDB),
            _ => Err(Sense::INVALID_OPCODE),
        };
        match answer {
            Ok((bytes, allocation)) => data_in(data, allocation, &bytes),
            Err(sense) => Response::check(sense, data),
        }
    }

    /// START STOP UNIT (SBC-3 5.20): stopping flushes.
    fn start_stop(self: Arc<Self>, r: Request, done: Done) {
        let condition = r.cdb.u8(4) >> 4;
        let (load_eject, start) = (r.cdb.u8(4) & 2 != 0, r.cdb.u8(4) & 1 != 0);
        if load_eject || condition > 3 {
            return done(Response::check(Sense::INVALID_FIELD_IN_CDB, r.data));
        }
        if condition != 0 {
            // Power conditions change nothing here.
            return done(Response::good(r.data, 0));
        }
        self.lock().started = start;
        if start || r.cdb.u8(4) & 4 != 0 {
            return done(Response::good(r.data, 0));
        }
        self.flush(r.data, 0, done);
    }
}

fn finish_out(result: Result<(), Sense>, data: Option<IoBuffer>, len: usize) -> Response {
    match result {
        Ok(()) => Response::good(data, len),
        Err(e) => Response::check(e, data),
    }
}

enum Refusal {
    Check(Sense),
    Conflict,
}

/// Commands that a stopped unit does not execute.
fn needs_medium(opcode: u8) -> bool {
    !matches!(
        opcode,
        op::INQUIRY
            | op::REPORT_LUNS
            | op::REQUEST_SENSE
            | op::START_STOP_UNIT
            | op::MODE_SENSE_6
            | op::MODE_SENSE_10
            | op::MAINTENANCE_IN
            | op::PERSISTENT_RESERVE_IN
            | op::PERSISTENT_RESERVE_OUT
            | op::PREVENT_ALLOW_MEDIUM_REMOVAL
    )
}
