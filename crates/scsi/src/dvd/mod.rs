//! The DVD drive: MMC-6 as Linux, Windows and firmware use it.

mod mmc;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, MutexGuard};

use serde::{Deserialize, Serialize};
use vhd::{Completion, Disk, IoBuffer, RequestKind};

use crate::cdb::Cdb;
use crate::protocol::{Sense, op};
use crate::target::{Done, Request, Response, Target, data_in, data_out, report_luns};

/// Bytes in a sector of a disc.
pub(crate) const SECTOR: u64 = 2048;

/// Media events of GET EVENT STATUS NOTIFICATION (MMC-6 6.6.2.3.5).
mod event {
    pub const NONE: u8 = 0;
    pub const EJECT_REQUEST: u8 = 1;
    pub const NEW_MEDIA: u8 = 2;
    pub const MEDIA_REMOVAL: u8 = 3;
}

/// What of a drive is saved with a VM; the medium is named by the VM's configuration.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DvdState {
    /// Version of this structure.
    pub version: u32,
    tray_open: bool,
    /// The guest has locked the tray.
    prevented: bool,
    attentions: Vec<Sense>,
    event: u8,
    medium: bool,
}

const STATE_VERSION: u32 = 1;

/// Why the host cannot take the disc out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EjectError {
    /// The guest has locked the tray; it has been asked to let go. Ejecting by force is possible.
    #[error("the guest has locked the drive and was asked to release it; try again, or force it")]
    Locked,
    /// There is a disc already.
    #[error("there is a disc in the drive; eject it first")]
    Occupied,
}

struct Inner {
    state: Mutex<State>,
}

struct State {
    saved: DvdState,
    medium: Option<Arc<Disk>>,
}

/// A DVD drive, with or without a disc.
pub struct ScsiDvd {
    inner: Arc<Inner>,
}

impl ScsiDvd {
    /// A drive that has just been powered on.
    pub fn new(medium: Option<Arc<Disk>>) -> Self {
        let saved = DvdState {
            version: STATE_VERSION,
            tray_open: false,
            prevented: false,
            attentions: Vec::new(),
            event: if medium.is_some() { event::NEW_MEDIA } else { event::NONE },
            medium: medium.is_some(),
        };
        Self { inner: Arc::new(Inner { state: Mutex::new(State { saved, medium }) }) }
    }

    /// Puts a disc in and closes the tray.
    pub fn insert(&self, medium: Arc<Disk>) -> Result<(), EjectError> {
        let mut s = self.inner.lock();
        if s.medium.is_some() {
            return Err(EjectError::Occupied);
        }
        s.medium = Some(medium);
        s.saved.tray_open = false;
        s.saved.event = event::NEW_MEDIA;
        s.attention(Sense::MEDIUM_MAY_HAVE_CHANGED);
        Ok(())
    }

    /// Takes the disc out. Without `force` a locked tray stays shut, and the guest is told that somebody pressed the
    /// button.
    pub fn eject(&self, force: bool) -> Result<Option<Arc<Disk>>, EjectError> {
        let mut s = self.inner.lock();
        if s.saved.prevented && s.medium.is_some() {
            if !force {
                s.saved.event = event::EJECT_REQUEST;
                return Err(EjectError::Locked);
            }
            s.saved.prevented = false;
        }
        Ok(s.remove())
    }

    /// Whether there is a disc.
    pub fn has_medium(&self) -> bool {
        self.inner.lock().medium.is_some()
    }

    /// The state for saving. Commands must have ended.
    pub fn save(&self) -> DvdState {
        let s = self.inner.lock();
        DvdState { medium: s.medium.is_some(), ..s.saved.clone() }
    }

    /// Takes a saved state; the disc is whatever the drive was made with. A disc that came or went in between is
    /// noticed by the guest as if it had been changed while the VM ran.
    pub fn restore(&self, state: DvdState) -> Result<(), String> {
        if state.version != STATE_VERSION {
            return Err(format!("DVD drive state of version {}, expected {STATE_VERSION}", state.version));
        }
        let mut s = self.inner.lock();
        let now = s.medium.is_some();
        s.saved = state;
        if now != s.saved.medium {
            s.saved.event = if now { event::NEW_MEDIA } else { event::MEDIA_REMOVAL };
            s.saved.medium = now;
            if now {
                s.saved.tray_open = false;
                s.attention(Sense::MEDIUM_MAY_HAVE_CHANGED);
            }
        }
        Ok(())
    }
}

impl Target for ScsiDvd {
    fn execute(&self, request: Request, done: Done) {
        self.inner.execute(request, done);
    }

    fn reset(&self) {
        let mut s = self.inner.lock();
        s.saved.prevented = false;
        s.saved.attentions.clear();
        s.attention(Sense::POWER_ON_OR_RESET);
    }
}

impl State {
    fn attention(&mut self, sense: Sense) {
        if !self.saved.attentions.contains(&sense) && self.saved.attentions.len() < 8 {
            self.saved.attentions.push(sense);
        }
    }

    fn remove(&mut self) -> Option<Arc<Disk>> {
        self.saved.tray_open = true;
        let old = self.medium.take();
        if old.is_some() {
            self.saved.event = event::MEDIA_REMOVAL;
        }
        old
    }

    fn ready(&self) -> Result<&Arc<Disk>, Sense> {
        self.medium.as_ref().ok_or(if self.saved.tray_open {
            Sense::MEDIUM_NOT_PRESENT_OPEN
        } else {
            Sense::MEDIUM_NOT_PRESENT_CLOSED
        })
    }

    fn blocks(&self) -> Result<u32, Sense> {
        let disk = self.ready()?;
        // MMC counts blocks in 32 bits; a larger file shows its beginning.
        Ok(u32::try_from(disk.size() / SECTOR).unwrap_or(u32::MAX))
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn execute(&self, r: Request, done: Done) {
        let Request { cdb, data, .. } = r;
        if let Err(sense) = self.admit(&cdb) {
            return done(Response::check(sense, data));
        }
        match cdb.opcode() {
            op::READ_6 | op::READ_10 | op::READ_12 | op::READ_16 => self.read(&cdb, data, done),
            op::READ_CD => self.read_cd(&cdb, data, done),
            _ => {
                let response = self.immediate(&cdb, data);
                done(response);
            }
        }
    }

    fn admit(&self, cdb: &Cdb) -> Result<(), Sense> {
        cdb.check()?;
        let mut s = self.lock();
        // SAM-5 5.14 and MMC-6 4.1.6.1: these leave a unit attention standing.
        let exempt = matches!(
            cdb.opcode(),
            op::INQUIRY
                | op::REPORT_LUNS
                | op::REQUEST_SENSE
                | op::GET_CONFIGURATION
                | op::GET_EVENT_STATUS_NOTIFICATION
        );
        if !exempt && !s.saved.attentions.is_empty() {
            return Err(s.saved.attentions.remove(0));
        }
        Ok(())
    }

    fn immediate(&self, cdb: &Cdb, data: Option<IoBuffer>) -> Response {
        let ready = || self.lock().ready().map(|_| ());
        let nothing = |r: Result<(), Sense>| r.map(|()| (Vec::new(), 0));
        let answer = match cdb.opcode() {
            op::TEST_UNIT_READY => nothing(ready()),
            op::REQUEST_SENSE => {
                let mut s = self.lock();
                let waiting = (!s.saved.attentions.is_empty()).then(|| s.saved.attentions.remove(0));
                let sense = waiting.or(s.ready().err()).unwrap_or(Sense::NONE);
                let b = if cdb.u8(1) & 1 != 0 { sense.to_descriptor().to_vec() } else { sense.to_fixed().to_vec() };
                Ok((b, usize::from(cdb.u8(4))))
            }
            op::INQUIRY => inquiry(cdb).map(|b| (b, usize::from(cdb.u16(3)))),
            op::REPORT_LUNS if cdb.u8(2) <= 2 => Ok((report_luns(&[0]), cdb.u32(6) as usize)),
            op::START_STOP_UNIT => nothing(self.start_stop(cdb)),
            op::PREVENT_ALLOW_MEDIUM_REMOVAL => {
                // Persistent prevention (bit 1) is for changers.
                if cdb.u8(4) & 2 != 0 {
                    Err(Sense::INVALID_FIELD_IN_CDB)
                } else {
                    self.lock().saved.prevented = cdb.u8(4) & 1 != 0;
                    nothing(Ok(()))
                }
            }
            op::READ_CAPACITY_10 => self.lock().blocks().map(|n| {
                let mut b = n.saturating_sub(1).to_be_bytes().to_vec();
                b.extend_from_slice(&(SECTOR as u32).to_be_bytes());
                (b, 8)
            }),
            op::SEEK_10 => nothing(
                self.lock().blocks().and_then(|n| if cdb.u32(2) < n { Ok(()) } else { Err(Sense::LBA_OUT_OF_RANGE) }),
            ),
            op::SET_CD_SPEED | op::SYNCHRONIZE_CACHE_10 => nothing(Ok(())),
            op::VERIFY_10 => nothing(self.range(cdb).map(|_| ())),
            op::READ_TOC_PMA_ATIP => {
                self.lock().blocks().and_then(|n| mmc::toc(cdb, n)).map(|b| (b, usize::from(cdb.u16(7))))
            }
            op::GET_CONFIGURATION => {
                let blocks = self.lock().blocks().ok();
                mmc::configuration(cdb, blocks).map(|b| (b, usize::from(cdb.u16(7))))
            }
            op::GET_EVENT_STATUS_NOTIFICATION => self.event_status(cdb).map(|b| (b, usize::from(cdb.u16(7)))),
            op::READ_DISC_INFORMATION => {
                let known = if cdb.u8(1) & 7 == 0 { Ok(()) } else { Err(Sense::INVALID_FIELD_IN_CDB) };
                known.and(ready()).map(|()| (mmc::disc_information(), usize::from(cdb.u16(7))))
            }
            op::READ_TRACK_INFORMATION => {
                self.lock().blocks().and_then(|n| mmc::track_information(cdb, n)).map(|b| (b, usize::from(cdb.u16(7))))
            }
            op::READ_DVD_STRUCTURE => {
                self.lock().blocks().and_then(|n| mmc::dvd_structure(cdb, n)).map(|b| (b, usize::from(cdb.u16(8))))
            }
            op::MECHANISM_STATUS => {
                let s = self.lock();
                let door = u8::from(s.saved.tray_open) << 4;
                Ok((vec![0, door, 0, 0, 0, 0, 0, 0], usize::from(cdb.u16(8))))
            }
            op::MODE_SENSE_6 | op::MODE_SENSE_10 => {
                let n = if cdb.opcode() == op::MODE_SENSE_6 { usize::from(cdb.u8(4)) } else { usize::from(cdb.u16(7)) };
                mmc::mode_sense(cdb, self.lock().saved.prevented).map(|b| (b, n))
            }
            op::MODE_SELECT_6 | op::MODE_SELECT_10 => {
                let six = cdb.opcode() == op::MODE_SELECT_6;
                let len = if six { usize::from(cdb.u8(4)) } else { usize::from(cdb.u16(7)) };
                let r = data_out(data.as_ref(), len, 4096).and_then(|l| mmc::mode_select(cdb, &l));
                return match r {
                    Ok(()) => Response::good(data, len),
                    Err(e) => Response::check(e, data),
                };
            }
            op::REPORT_LUNS => Err(Sense::INVALID_FIELD_IN_CDB),
            _ => Err(Sense::INVALID_OPCODE),
        };
        match answer {
            Ok((bytes, allocation)) => data_in(data, allocation, &bytes),
            Err(sense) => Response::check(sense, data),
        }
    }

    /// START STOP UNIT (MMC-6 6.42): spin, eject, load.
    fn start_stop(&self, cdb: &Cdb) -> Result<(), Sense> {
        let (load_eject, start) = (cdb.u8(4) & 2 != 0, cdb.u8(4) & 1 != 0);
        let mut s = self.lock();
        if cdb.u8(4) >> 4 != 0 {
            return Ok(()); // power conditions
        }
        match (load_eject, start) {
            (true, false) if s.saved.prevented && s.medium.is_some() => Err(Sense::MEDIUM_REMOVAL_PREVENTED),
            (true, false) => {
                s.remove();
                Ok(())
            }
            (true, true) => {
                s.saved.tray_open = false;
                Ok(())
            }
            (false, true) => s.ready().map(|_| ()),
            (false, false) => Ok(()),
        }
    }

    /// GET EVENT STATUS NOTIFICATION (MMC-6 6.6): media events by polling.
    fn event_status(&self, cdb: &Cdb) -> Result<Vec<u8>, Sense> {
        const MEDIA: u8 = 1 << 4;
        // Asynchronous notification is not offered.
        if cdb.u8(1) & 1 == 0 {
            return Err(Sense::INVALID_FIELD_IN_CDB);
        }
        if cdb.u8(4) & MEDIA == 0 {
            return Ok(vec![0, 2, 0x80, MEDIA]);
        }
        let mut s = self.lock();
        // An event is told once, and only if there is room to tell it.
        let code = if cdb.u16(7) > 4 { std::mem::replace(&mut s.saved.event, event::NONE) } else { s.saved.event };
        let status = u8::from(s.saved.tray_open) | u8::from(s.medium.is_some()) << 1;
        Ok(vec![0, 6, 4, MEDIA, code, status, 0, 0])
    }

    fn range(&self, cdb: &Cdb) -> Result<(Arc<Disk>, u64, u64), Sense> {
        let (lba, count) = cdb.range();
        self.span(lba, u64::from(count))
    }

    fn span(&self, lba: u64, count: u64) -> Result<(Arc<Disk>, u64, u64), Sense> {
        let s = self.lock();
        let blocks = u64::from(s.blocks()?);
        let disk = s.ready()?.clone();
        match lba.checked_add(count) {
            Some(end) if end <= blocks => Ok((disk, lba * SECTOR, count * SECTOR)),
            _ => Err(Sense::LBA_OUT_OF_RANGE),
        }
    }

    fn read(&self, cdb: &Cdb, data: Option<IoBuffer>, done: Done) {
        match self.range(cdb) {
            Ok((disk, offset, len)) => transfer(&disk, offset, len, data, done),
            Err(e) => done(Response::check(e, data)),
        }
    }

    /// READ CD (MMC-6 6.19), user data of mode 1 sectors only.
    fn read_cd(&self, cdb: &Cdb, data: Option<IoBuffer>, done: Done) {
        let kind = cdb.u8(1) >> 2 & 7;
        let range = self.span(u64::from(cdb.u32(2)), u64::from(cdb.u24(6)));
        let main = cdb.u8(9) & 0xf8;
        match range {
            Err(e) => done(Response::check(e, data)),
            Ok(_) if kind != 0 && kind != 2 => done(Response::check(Sense::ILLEGAL_MODE_FOR_THIS_TRACK, data)),
            Ok(_) if main == 0 => done(Response::good(data, 0)),
            // Headers, sync and error correction bytes are not in an image.
            Ok(_) if main != 0x10 || cdb.u8(9) & 6 != 0 || cdb.u8(10) & 7 != 0 => {
                done(Response::check(Sense::INVALID_FIELD_IN_CDB, data));
            }
            Ok((disk, offset, len)) => transfer(&disk, offset, len, data, done),
        }
    }
}

fn transfer(disk: &Arc<Disk>, offset: u64, len: u64, data: Option<IoBuffer>, done: Done) {
    if len == 0 {
        return done(Response::good(data, 0));
    }
    let mut buffer = match data {
        Some(b) if b.capacity() as u64 >= len => b,
        other => return done(Response::check(Sense::INVALID_FIELD_IN_CDB, other)),
    };
    buffer.set_len(len as usize);
    // The disc stays open until the read has ended, even if it is ejected meanwhile.
    let held = disk.clone();
    let finish = move |c: Completion| {
        let response = match c.result {
            Ok(()) => Response::good(c.buffer, len as usize),
            Err(_) => Response::check(Sense::UNRECOVERED_READ_ERROR, c.buffer),
        };
        done(response);
        drop(held);
    };
    disk.submit(RequestKind::Read, offset, len, Some(buffer), Box::new(finish));
}

/// INQUIRY (SPC-4 6.6) with the pages that Windows asks for.
fn inquiry(cdb: &Cdb) -> Result<Vec<u8>, Sense> {
    let (evpd, page) = (cdb.u8(1) & 1 != 0, cdb.u8(2));
    if cdb.u8(1) & 2 != 0 || (!evpd && page != 0) {
        return Err(Sense::INVALID_FIELD_IN_CDB);
    }
    if evpd {
        return match page {
            0x00 => Ok(vec![5, 0, 0, 2, 0x00, 0x83]),
            0x83 => {
                let mut b = vec![5, 0x83, 0, 28, 0x02, 0x01, 0, 24];
                b.extend_from_slice(b"Msft    Virtual DVD-ROM ");
                Ok(b)
            }
            _ => Err(Sense::INVALID_FIELD_IN_CDB),
        };
    }
    let mut b = vec![0u8; 36];
    b[0] = 5; // CD/DVD
    b[1] = 0x80; // removable
    b[2] = 5; // SPC-3
    b[3] = 2;
    b[4] = 31;
    b[8..16].copy_from_slice(b"Msft    ");
    b[16..32].copy_from_slice(b"Virtual DVD-ROM ");
    b[32..36].copy_from_slice(b"1.0 ");
    Ok(b)
}
