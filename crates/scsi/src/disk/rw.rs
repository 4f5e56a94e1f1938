//! Commands that touch the medium.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use vhd::{Completion, IoBuffer, RequestError, RequestKind};

use super::Inner;
use super::inquiry::{MAX_UNMAP_DESCRIPTORS, MAX_WRITE_SAME};
use crate::cdb::Cdb;
use crate::protocol::{Sense, op};
use crate::target::{Done, Request, Response, data_out};

/// What a failed request means to a guest.
fn sense_of(e: RequestError, write: bool) -> Sense {
    match e {
        RequestError::NoSpace => Sense::SPACE_ALLOCATION_FAILED,
        RequestError::ReadOnly => Sense::WRITE_PROTECTED,
        RequestError::OutOfRange => Sense::LBA_OUT_OF_RANGE,
        RequestError::Misaligned | RequestError::Closed => Sense::INTERNAL_TARGET_FAILURE,
        RequestError::Io(_) | RequestError::Malformed | RequestError::Failed if write => Sense::WRITE_ERROR,
        RequestError::Io(_) | RequestError::Malformed | RequestError::Failed => Sense::UNRECOVERED_READ_ERROR,
    }
}

/// Bytes that BYTCHK=1 of VERIFY may compare in one command.
const MAX_COMPARE: usize = 32 << 20;

/// FUA, DPO and protection bits of READ and WRITE (SBC-3 5.7): true if the data must be durable.
fn fua(cdb: &Cdb) -> Result<bool, Sense> {
    if matches!(cdb.opcode(), op::READ_6 | op::WRITE_6) {
        return Ok(false);
    }
    // RDPROTECT/WRPROTECT: the medium has no protection information.
    if cdb.u8(1) & 0xe0 != 0 {
        return Err(Sense::INVALID_FIELD_IN_CDB);
    }
    Ok(cdb.u8(1) & 8 != 0)
}

impl Inner {
    /// The byte range of a command, checked against the medium.
    fn range(&self, cdb: &Cdb) -> Result<(u64, u64), Sense> {
        let (lba, count) = cdb.range();
        self.span(lba, u64::from(count))
    }

    fn span(&self, lba: u64, count: u64) -> Result<(u64, u64), Sense> {
        let blocks = self.blocks();
        match lba.checked_add(count) {
            // An empty range may begin at the very end, not beyond (SBC-3 4.6).
            Some(end) if end <= blocks => Ok((lba * self.sector(), count * self.sector())),
            _ => Err(Sense::LBA_OUT_OF_RANGE),
        }
    }

    /// Cuts the buffer to what the command moves.
    fn fit(data: Option<IoBuffer>, len: u64) -> Result<IoBuffer, (Sense, Option<IoBuffer>)> {
        match data {
            Some(mut b) if b.capacity() as u64 >= len => {
                b.set_len(len as usize);
                Ok(b)
            }
            other => Err((Sense::INVALID_FIELD_IN_CDB, other)),
        }
    }

    pub(super) fn read(self: Arc<Self>, r: Request, done: Done) {
        let checked = fua(&r.cdb).and_then(|_| self.range(&r.cdb));
        let (offset, len) = match checked {
            Ok(x) => x,
            Err(e) => return done(Response::check(e, r.data)),
        };
        if len == 0 {
            return done(Response::good(r.data, 0));
        }
        let buffer = match Self::fit(r.data, len) {
            Ok(b) => b,
            Err((e, d)) => return done(Response::check(e, d)),
        };
        let finish = move |c: Completion| {
            done(match c.result {
                Ok(()) => Response::good(c.buffer, len as usize),
                Err(e) => Response::check(sense_of(e, false), c.buffer),
            });
        };
        self.disk.submit(RequestKind::Read, offset, len, Some(buffer), Box::new(finish));
    }

    pub(super) fn write(self: Arc<Self>, r: Request, done: Done) {
        let checked = self.writable().and_then(|()| fua(&r.cdb)).and_then(|f| self.range(&r.cdb).map(|x| (f, x)));
        let (fua, (offset, len)) = match checked {
            Ok(x) => x,
            Err(e) => return done(Response::check(e, r.data)),
        };
        self.write_range(offset, len, fua, r.data, done);
    }

    fn writable(&self) -> Result<(), Sense> {
        if self.disk.info().read_only { Err(Sense::WRITE_PROTECTED) } else { Ok(()) }
    }

    fn write_range(self: Arc<Self>, offset: u64, len: u64, fua: bool, data: Option<IoBuffer>, done: Done) {
        if len == 0 {
            return done(Response::good(data, 0));
        }
        let buffer = match Self::fit(data, len) {
            Ok(b) => b,
            Err((e, d)) => return done(Response::check(e, d)),
        };
        // With the write cache switched off every write is durable before its status.
        let fua = fua || !self.lock().write_cache;
        let finish = move |c: Completion| {
            done(match c.result {
                Ok(()) => Response::good(c.buffer, len as usize),
                Err(e) => Response::check(sense_of(e, true), c.buffer),
            });
        };
        self.disk.submit(RequestKind::Write { fua }, offset, len, Some(buffer), Box::new(finish));
    }

    /// WRITE AND VERIFY: durable, then, if asked, compared.
    pub(super) fn write_and_verify(self: Arc<Self>, r: Request, done: Done) {
        let cdb = r.cdb;
        let checked = self.writable().and_then(|()| bytchk(&cdb)).and_then(|b| self.range(&cdb).map(|x| (b, x)));
        let (compare, (offset, len)) = match checked {
            Ok((3, _)) => return done(Response::check(Sense::INVALID_FIELD_IN_CDB, r.data)),
            Ok((check, x)) => (check == 1, x),
            Err(e) => return done(Response::check(e, r.data)),
        };
        let me = self.clone();
        let then: Done = Box::new(move |written| {
            if !compare || written.sense.is_some() || len == 0 {
                return done(written);
            }
            me.compare(offset, len, written.data, 1, done);
        });
        self.write_range(offset, len, true, r.data, then);
    }

    pub(super) fn verify(self: Arc<Self>, r: Request, done: Done) {
        let checked = bytchk(&r.cdb).and_then(|b| self.range(&r.cdb).map(|x| (b, x)));
        match checked {
            Err(e) => done(Response::check(e, r.data)),
            // The medium is checked by the host; there is nothing to compare.
            Ok((0, _)) | Ok((_, (_, 0))) => done(Response::good(r.data, 0)),
            Ok((mode, (offset, len))) => self.compare(offset, len, r.data, mode, done),
        }
    }

    /// Compares the data-out buffer with the medium: all of it (mode 1), or one block with each (mode 3).
    fn compare(self: Arc<Self>, offset: u64, len: u64, data: Option<IoBuffer>, mode: u8, done: Done) {
        let sector = self.sector();
        let out_len = if mode == 3 { sector } else { len };
        if len > MAX_COMPARE as u64 {
            return done(Response::check(Sense::INVALID_FIELD_IN_CDB, data));
        }
        let expected = match data_out(data.as_ref(), out_len as usize, MAX_COMPARE) {
            Ok(v) => v,
            Err(_) => return done(Response::check(Sense::INVALID_FIELD_IN_CDB, data)),
        };
        let finish = move |c: Completion| {
            if let Err(e) = c.result {
                return done(Response::check(sense_of(e, false), data));
            }
            let medium = c.buffer.map(IoBuffer::into_vec).unwrap_or_default();
            let same = medium.chunks(expected.len()).all(|m| m == &expected[..m.len()]);
            done(if same { Response::good(data, expected.len()) } else { Response::check(Sense::MISCOMPARE, data) });
        };
        let buffer = IoBuffer::aligned(len as usize);
        self.disk.submit(RequestKind::Read, offset, len, Some(buffer), Box::new(finish));
    }

    pub(super) fn synchronize_cache(self: Arc<Self>, r: Request, done: Done) {
        // Zero blocks means to the end; the range only has to exist (SBC-3 5.22).
        if let Err(e) = self.range(&r.cdb) {
            return done(Response::check(e, r.data));
        }
        self.flush(r.data, 0, done);
    }

    pub(super) fn flush(self: Arc<Self>, data: Option<IoBuffer>, transferred: usize, done: Done) {
        let finish = move |c: Completion| {
            done(match c.result {
                Ok(()) => Response::good(data, transferred),
                Err(e) => Response::check(sense_of(e, true), data),
            });
        };
        self.disk.submit(RequestKind::Flush, 0, 0, None, Box::new(finish));
    }

    /// UNMAP (SBC-3 5.28).
    pub(super) fn unmap(self: Arc<Self>, r: Request, done: Done) {
        let cdb = r.cdb;
        let len = usize::from(cdb.u16(7));
        let ranges = match self.unmap_ranges(&cdb, len, r.data.as_ref()) {
            Ok(x) => x,
            Err(e) => return done(Response::check(e, r.data)),
        };
        if ranges.is_empty() {
            return done(Response::good(r.data, len));
        }
        let join = Join::new(ranges.len(), r.data, len, done);
        let requests: Vec<_> = ranges
            .into_iter()
            .map(|(offset, n)| {
                let join = join.clone();
                let part: vhd::Callback = Box::new(move |c| join.part(c.result));
                (RequestKind::Unmap, offset, n, None, part)
            })
            .collect();
        self.disk.submit_all(requests);
    }

    fn unmap_ranges(&self, cdb: &Cdb, len: usize, data: Option<&IoBuffer>) -> Result<Vec<(u64, u64)>, Sense> {
        if !self.disk.info().can_unmap && !self.disk.info().read_only {
            return Err(Sense::INVALID_OPCODE);
        }
        self.writable()?;
        // ANCHOR is not offered (VPD page B2h).
        if cdb.u8(1) & 1 != 0 {
            return Err(Sense::INVALID_FIELD_IN_CDB);
        }
        if len == 0 {
            return Ok(Vec::new());
        }
        let list = data_out(data, len, 8 + MAX_UNMAP_DESCRIPTORS as usize * 16 + 4096)?;
        if list.len() < 8 {
            return Err(Sense::PARAMETER_LIST_LENGTH_ERROR);
        }
        let described = usize::from(u16::from_be_bytes([list[2], list[3]]));
        // Descriptors that are cut off by the list's end are ignored, as partial ones are (SBC-3 5.28.2).
        let descriptors = &list[8..list.len().min(8 + described)];
        let (whole, _) = descriptors.as_chunks::<16>();
        if whole.len() > MAX_UNMAP_DESCRIPTORS as usize {
            return Err(Sense::INVALID_FIELD_IN_PARAMETER_LIST);
        }
        let mut ranges = Vec::new();
        for d in whole {
            let d = Cdb::new(d);
            let (offset, n) = self.span(d.u64(0), u64::from(d.u32(8)))?;
            if n != 0 {
                ranges.push((offset, n));
            }
        }
        Ok(ranges)
    }

    /// WRITE SAME (SBC-3 5.44, 5.45).
    pub(super) fn write_same(self: Arc<Self>, r: Request, done: Done) {
        match self.write_same_plan(&r) {
            Err(e) => done(Response::check(e, r.data)),
            Ok(Same { kind: Some(kind), offset, len, out, .. }) => {
                let data = r.data;
                let finish = move |c: Completion| {
                    done(match c.result {
                        Ok(()) => Response::good(data, out),
                        Err(e) => Response::check(sense_of(e, true), data),
                    });
                };
                self.disk.submit(kind, offset, len, None, Box::new(finish));
            }
            Ok(Same { offset, len, block, out, .. }) => {
                // A pattern: its buffer is repeated in a chunk, and the chunks are written one after the other.
                let chunk = (1 << 20).min(len as usize);
                let pattern = block.iter().copied().cycle().take(chunk).collect();
                let fua = !self.lock().write_cache;
                self.write_pattern(offset, len, fua, pattern, r.data, out, done);
            }
        }
    }

    fn write_same_plan(&self, r: &Request) -> Result<Same, Sense> {
        let cdb = &r.cdb;
        self.writable()?;
        let sector = self.sector() as usize;
        let (unmap, anchor) = (cdb.u8(1) & 8 != 0, cdb.u8(1) & 0x10 != 0);
        let no_data = cdb.opcode() == op::WRITE_SAME_16 && cdb.u8(1) & 1 != 0;
        if anchor || cdb.u8(1) & 0xe6 != 0 || (unmap && !self.disk.info().can_unmap) {
            return Err(Sense::INVALID_FIELD_IN_CDB);
        }
        let (lba, count) = cdb.range();
        // WSNZ in VPD page B0h: zero blocks does not mean "to the end".
        if count == 0 {
            return Err(Sense::INVALID_FIELD_IN_CDB);
        }
        let (offset, len) = self.span(lba, u64::from(count))?;
        let block = if no_data {
            vec![0; sector]
        } else {
            data_out(r.data.as_ref(), sector, sector).map_err(|_| Sense::INVALID_FIELD_IN_CDB)?
        };
        let out = if no_data { 0 } else { sector };
        let zero = block.iter().all(|&b| b == 0);
        let kind = zero.then_some(RequestKind::WriteZeroes);
        if kind.is_none() && u64::from(count) > MAX_WRITE_SAME {
            return Err(Sense::INVALID_FIELD_IN_CDB);
        }
        Ok(Same { kind, offset, len, block, out })
    }

    fn write_pattern(
        self: Arc<Self>,
        offset: u64,
        left: u64,
        fua: bool,
        pattern: Vec<u8>,
        data: Option<IoBuffer>,
        out: usize,
        done: Done,
    ) {
        let n = left.min(pattern.len() as u64);
        let mut buffer = IoBuffer::from_vec(pattern);
        buffer.set_len(n as usize);
        let me = self.clone();
        let finish = move |c: Completion| match c.result {
            Err(e) => done(Response::check(sense_of(e, true), data)),
            Ok(()) if n == left => done(Response::good(data, out)),
            Ok(()) => {
                let pattern = c.buffer.map(IoBuffer::into_vec).unwrap_or_default();
                me.write_pattern(offset + n, left - n, fua, pattern, data, out, done);
            }
        };
        self.disk.submit(RequestKind::Write { fua }, offset, n, Some(buffer), Box::new(finish));
    }
}

/// What a WRITE SAME comes to.
struct Same {
    /// Zeros, which the image can write without data.
    kind: Option<RequestKind>,
    offset: u64,
    len: u64,
    block: Vec<u8>,
    out: usize,
}

/// BYTCHK of VERIFY and WRITE AND VERIFY (SBC-3 5.33): 0, 1 or 3.
fn bytchk(cdb: &Cdb) -> Result<u8, Sense> {
    let mode = cdb.u8(1) >> 1 & 3;
    if cdb.u8(1) & 0xe0 != 0 || mode == 2 {
        return Err(Sense::INVALID_FIELD_IN_CDB);
    }
    Ok(mode)
}

/// Several requests that end as one command.
struct Join {
    left: AtomicUsize,
    end: Mutex<Option<(Option<IoBuffer>, Done)>>,
    error: Mutex<Option<RequestError>>,
    transferred: usize,
}

impl Join {
    fn new(parts: usize, data: Option<IoBuffer>, transferred: usize, done: Done) -> Arc<Self> {
        Arc::new(Self {
            left: AtomicUsize::new(parts),
            end: Mutex::new(Some((data, done))),
            error: Mutex::new(None),
            transferred,
        })
    }

    fn part(&self, result: Result<(), RequestError>) {
        if let Err(e) = result {
            self.error.lock().unwrap_or_else(std::sync::PoisonError::into_inner).get_or_insert(e);
        }
        if self.left.fetch_sub(1, Ordering::AcqRel) != 1 {
            return;
        }
        let end = self.end.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        let error = *self.error.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some((data, done)) = end {
            done(match error {
                None => Response::good(data, self.transferred),
                Some(e) => Response::check(sense_of(e, true), data),
            });
        }
    }
}
