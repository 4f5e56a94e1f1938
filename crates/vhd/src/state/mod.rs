//! The heart of an open disk: a state machine without I/O of its own. It takes requests and the results of file
//! operations, and says which file operations come next. Drivers (io_uring, threads) carry these out; the power-cut
//! tests put a simulated host in their place.
//!
//! How writes become durable: payload goes to its place at once; BAT and bitmap changes stay in the page cache until a
//! flush (or until there are too many), and then go out as one commit: for VHDX one log entry, for VHD writes in place.
//! See [`commit`] for the order of things.

pub(crate) mod cache;
mod commit;
pub(crate) mod map;
pub(crate) mod space;
mod write;
pub(crate) mod writer;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::Arc;

use crate::buffer::{AlignedBuf, IoBuffer};
use crate::error::RequestError;
use crate::storage::{DirectAlignment, Storage};
use cache::Cache;
use commit::Round;
use map::{Block, BlockMap, Stop};
use writer::Writer;

/// What a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RequestKind {
    /// Read into the buffer.
    Read,
    /// Write from the buffer; with `fua` it is durable when it completes.
    Write {
        /// Force unit access.
        fua: bool,
    },
    /// Make every write that has completed durable.
    Flush,
    /// The range's content is no longer needed. Advisory.
    Unmap,
    /// The range shall read as zeros.
    WriteZeroes,
}

/// The end of a request.
#[derive(Debug)]
pub struct Completion {
    /// How it went.
    pub result: Result<(), RequestError>,
    /// The request's buffer.
    pub buffer: Option<IoBuffer>,
}

/// Called once when a request has ended, on whichever thread noticed; must not block.
pub type Callback = Box<dyn FnOnce(Completion) + Send>;

pub(crate) struct Layer {
    pub storage: Arc<dyn Storage>,
    pub kind: Kind,
    /// Size of the virtual disk at this layer.
    pub size: u64,
    pub cache: Cache,
    pub direct: Option<DirectAlignment>,
}

pub(crate) enum Kind {
    /// Disk offset is file offset; the file has this many bytes of the disk, the rest is zero.
    Flat {
        length: u64,
    },
    Blocks(BlockMap),
}

pub(crate) type ReqId = usize;

struct Req {
    kind: RequestKind,
    start: u64,
    /// Everything before this has been issued.
    pos: u64,
    end: u64,
    outstanding: u32,
    /// Waits for a page or for a commit; it will be processed again.
    parked: bool,
    error: Option<RequestError>,
    buffer: Option<IoBuffer>,
    done: Option<Callback>,
}

/// Bits to set when a write to a partially present block has completed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BitSet {
    pub block: u64,
    pub base: u64,
    pub sector: u64,
    pub count: u64,
    pub page: u64,
}

pub(crate) enum Purpose {
    Part { req: ReqId, bits: Option<BitSet>, epoch: u64, bounce: Option<(AlignedBuf, usize)> },
    Page { page: u64, buf: AlignedBuf },
    Sync,
    Log,
    Apply,
    Clean { run: space::Run },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OpKind {
    Read,
    Write,
    Sync,
    Punch,
}

struct OpState {
    purpose: Purpose,
    layer: usize,
    kind: OpKind,
    offset: u64,
    len: u64,
    iov: Vec<libc::iovec>,
}

/// A file operation for a driver. The memory that it points to stays valid until the operation is completed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Op {
    pub id: usize,
    pub layer: usize,
    pub kind: OpKind,
    pub offset: u64,
    pub len: u64,
    pub memory: Memory,
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum Memory {
    None,
    One(*mut u8, usize),
    Many(*const libc::iovec, usize),
}

// SAFETY: the pointers are to memory owned by the request or operation in the core, which outlives the operation.
unsafe impl Send for Op {}

/// A slab: ids are indexes and are reused.
struct Slab<T> {
    items: Vec<Option<T>>,
    free: Vec<usize>,
}

impl<T> Slab<T> {
    fn new() -> Self {
        Self { items: Vec::new(), free: Vec::new() }
    }
    fn insert(&mut self, t: T) -> usize {
        if let Some(i) = self.free.pop() {
            self.items[i] = Some(t);
            return i;
        }
        self.items.push(Some(t));
        self.items.len() - 1
    }
    fn get(&mut self, i: usize) -> &mut T {
        self.items[i].as_mut().expect("a live id")
    }
    fn remove(&mut self, i: usize) -> T {
        let t = self.items[i].take().expect("a live id");
        self.free.push(i);
        t
    }
    fn len(&self) -> usize {
        self.items.len() - self.free.len()
    }
}

/// A finished request, to be told outside of the lock.
pub(crate) struct Done(pub Callback, pub Completion);

pub(crate) struct Core {
    pub layers: Vec<Layer>,
    pub writer: Writer,
    pub sector: u32,
    /// An earlier metadata write failed.
    pub failed: bool,
    pub held: bool,
    held_queue: VecDeque<ReqId>,
    reqs: Slab<Req>,
    ops: Slab<OpState>,
    /// Operations for the driver.
    pub out: Vec<Op>,
    /// Finished requests for the caller.
    pub done: Vec<Done>,
    page_waiters: HashMap<(usize, u64), Vec<ReqId>>,
    budget_waiters: Vec<ReqId>,
    flush_queue: Vec<ReqId>,
    round: Round,
    /// Operations in flight by the epoch in which they were issued.
    epochs: VecDeque<(u64, u64)>,
    epoch: u64,
    cleaning: usize,
}

// SAFETY: the raw pointers inside (iovec) are to memory that the core owns (requests, operations).
unsafe impl Send for Core {}

impl Core {
    pub fn new(layers: Vec<Layer>, writer: Writer, sector: u32) -> Self {
        Self {
            layers,
            writer,
            sector,
            failed: false,
            held: false,
            held_queue: VecDeque::new(),
            reqs: Slab::new(),
            ops: Slab::new(),
            out: Vec::new(),
            done: Vec::new(),
            page_waiters: HashMap::new(),
            budget_waiters: Vec::new(),
            flush_queue: Vec::new(),
            round: Round::Idle,
            epochs: VecDeque::new(),
            epoch: 0,
            cleaning: 0,
        }
    }

    pub fn size(&self) -> u64 {
        self.layers[0].size
    }

    /// Nothing is in flight (held requests do not count).
    pub fn is_idle(&self) -> bool {
        self.reqs.len() == self.held_queue.len() && self.ops.len() == 0 && matches!(self.round, Round::Idle)
    }

    /// Whether metadata waits for a commit.
    pub fn is_dirty(&self) -> bool {
        !self.layers[0].cache.dirty.is_empty()
    }

    pub fn submit(&mut self, kind: RequestKind, offset: u64, len: u64, buffer: Option<IoBuffer>, done: Callback) {
        let verdict = self.validate(kind, offset, len, buffer.as_ref());
        if let Err(e) = verdict {
            self.done.push(Done(done, Completion { result: Err(e), buffer }));
            return;
        }
        let (start, end) = if kind == RequestKind::Flush { (0, 0) } else { (offset, offset + len) };
        let req =
            Req { kind, start, pos: start, end, outstanding: 0, parked: false, error: None, buffer, done: Some(done) };
        let id = self.reqs.insert(req);
        if self.held {
            self.held_queue.push_back(id);
            return;
        }
        self.process(id);
    }

    fn validate(&self, kind: RequestKind, offset: u64, len: u64, buf: Option<&IoBuffer>) -> Result<(), RequestError> {
        if kind == RequestKind::Flush {
            return Ok(());
        }
        let sector = u64::from(self.sector);
        if !offset.is_multiple_of(sector) || !len.is_multiple_of(sector) {
            return Err(RequestError::Misaligned);
        }
        if offset.checked_add(len).is_none_or(|end| end > self.size()) {
            return Err(RequestError::OutOfRange);
        }
        match kind {
            RequestKind::Read | RequestKind::Write { .. } if buf.is_none_or(|b| b.len() as u64 != len) => {
                return Err(RequestError::Misaligned);
            }
            _ => {}
        }
        if kind != RequestKind::Read {
            if matches!(self.writer, Writer::None) {
                return Err(RequestError::ReadOnly);
            }
            if self.failed {
                return Err(RequestError::Failed);
            }
        }
        Ok(())
    }

    /// A flush that goes through although requests are held.
    pub fn flush_held(&mut self, done: Callback) {
        let held = std::mem::replace(&mut self.held, false);
        self.submit(RequestKind::Flush, 0, 0, None, done);
        self.held = held;
    }

    /// What is at a disk offset, and for how many bytes from it on, for long operations that copy images. Pages are
    /// read on the spot.
    pub fn extent(&mut self, pos: u64) -> std::result::Result<(Extent, u64), RequestError> {
        let max = self.size() - pos;
        loop {
            match resolve(&mut self.layers, pos, max) {
                Ok((Place::Absent, n)) => return Ok((Extent::Absent, n)),
                Ok((Place::Zero, n)) => return Ok((Extent::Zero, n)),
                Ok((Place::File(layer, offset), n)) => {
                    // Holes in the file are zeros, too.
                    let next = self.layers[layer].storage.next_data(offset).unwrap_or(Some((offset, offset + n)));
                    return Ok(match next {
                        Some((start, end)) if start <= offset => (Extent::Data, n.min(end - offset)),
                        Some((start, _)) => (Extent::Zero, n.min(start - offset)),
                        None => (Extent::Zero, n),
                    });
                }
                Err((layer, Stop::Miss(page))) => {
                    let l = &mut self.layers[layer];
                    let Kind::Blocks(map) = &l.kind else { return Err(RequestError::Malformed) };
                    let mut data = vec![0; 1 << map.page_shift].into_boxed_slice();
                    l.storage.read_at(&mut data, page << map.page_shift).map_err(|e| RequestError::from_io(&e))?;
                    l.cache.insert(page, data);
                }
                Err((_, Stop::Fail(e))) => return Err(e),
            }
        }
    }

    /// Lets held requests go on.
    pub fn release(&mut self) {
        self.held = false;
        while let Some(id) = self.held_queue.pop_front() {
            let r = self.reqs.get(id);
            let (kind, start, len) = (r.kind, r.start, r.end - r.start);
            // The disk may have been resized while they waited.
            if kind != RequestKind::Flush && start + len > self.size() {
                let r = self.reqs.get(id);
                r.error = Some(RequestError::OutOfRange);
                r.pos = r.end;
                self.maybe_finish(id);
                continue;
            }
            self.process(id);
        }
    }

    /// Issues as much of a request as can be.
    fn process(&mut self, id: ReqId) {
        self.reqs.get(id).parked = false;
        match self.reqs.get(id).kind {
            RequestKind::Read => self.process_read(id),
            RequestKind::Write { .. } | RequestKind::Unmap | RequestKind::WriteZeroes => self.process_write(id),
            RequestKind::Flush => {
                if matches!(self.writer, Writer::None) {
                    self.maybe_finish(id);
                } else {
                    self.flush_queue.push(id);
                    self.try_round();
                }
            }
        }
    }

    fn process_read(&mut self, id: ReqId) {
        loop {
            let r = self.reqs.get(id);
            let (pos, end, start) = (r.pos, r.end, r.start);
            if pos == end {
                break;
            }
            match resolve(&mut self.layers, pos, end - pos) {
                Ok((place, n)) => {
                    let at = (pos - start) as usize;
                    match place {
                        Place::Absent | Place::Zero => {
                            if let Some(b) = &self.reqs.get(id).buffer {
                                b.fill_zero(at, n as usize);
                            }
                        }
                        Place::File(layer, offset) => self.issue_part(id, OpKind::Read, layer, offset, at, n, None),
                    }
                    self.reqs.get(id).pos = pos + n;
                }
                Err((layer, Stop::Miss(page))) => return self.park_on_page(id, layer, page),
                Err((_, Stop::Fail(e))) => {
                    let r = self.reqs.get(id);
                    r.error.get_or_insert(e);
                    r.pos = end;
                }
            }
        }
        self.maybe_finish(id);
    }

    fn park_on_page(&mut self, id: ReqId, layer: usize, page: u64) {
        self.reqs.get(id).parked = true;
        let waiters = self.page_waiters.entry((layer, page)).or_default();
        waiters.push(id);
        if waiters.len() > 1 {
            return;
        }
        let Kind::Blocks(map) = &self.layers[layer].kind else { return };
        let size = 1usize << map.page_shift;
        let offset = page << map.page_shift;
        let buf = AlignedBuf::zeroed(size);
        let ptr = buf.as_ptr();
        self.issue(Purpose::Page { page, buf }, layer, OpKind::Read, offset, size as u64, vec![iovec(ptr, size)]);
    }

    /// Issues one piece of a request's data.
    fn issue_part(
        &mut self,
        req: ReqId,
        kind: OpKind,
        layer: usize,
        offset: u64,
        at: usize,
        len: u64,
        bits: Option<BitSet>,
    ) {
        let r = self.reqs.get(req);
        r.outstanding += 1;
        let mut iov = Vec::new();
        if let (Some(b), OpKind::Read | OpKind::Write) = (&r.buffer, kind) {
            b.for_range(at, len as usize, |p, n| iov.push(iovec(p, n)));
        }
        let mut bounce = None;
        if let Some(align) = self.layers[layer].direct {
            let odd = iov.iter().any(|v| {
                !(v.iov_base as usize).is_multiple_of(align.memory) || !(v.iov_len as u64).is_multiple_of(align.offset)
            });
            if odd {
                let mut buf = AlignedBuf::zeroed(len as usize);
                if kind == OpKind::Write
                    && let Some(b) = &self.reqs.get(req).buffer
                {
                    b.read(at, &mut buf);
                }
                iov = vec![iovec(buf.as_ptr(), len as usize)];
                bounce = Some((buf, at));
            }
        }
        let epoch = self.epoch;
        if layer == 0 {
            match self.epochs.back_mut() {
                Some((e, n)) if *e == epoch => *n += 1,
                _ => self.epochs.push_back((epoch, 1)),
            }
        }
        self.issue(Purpose::Part { req, bits, epoch, bounce }, layer, kind, offset, len, iov);
    }

    fn issue(&mut self, purpose: Purpose, layer: usize, kind: OpKind, offset: u64, len: u64, iov: Vec<libc::iovec>) {
        let id = self.ops.insert(OpState { purpose, layer, kind, offset, len, iov });
        self.emit(id);
    }

    fn emit(&mut self, id: usize) {
        let o = self.ops.get(id);
        let memory = match &o.iov[..] {
            [] => Memory::None,
            [v] => Memory::One(v.iov_base.cast(), v.iov_len),
            many => Memory::Many(many.as_ptr(), many.len().min(MAX_IOV)),
        };
        self.out.push(Op { id, layer: o.layer, kind: o.kind, offset: o.offset, len: o.len, memory });
    }

    /// Takes the result of an operation: bytes done, or the error.
    pub fn complete(&mut self, id: usize, result: io::Result<u64>) {
        let o = self.ops.get(id);
        let result = match (o.kind, result) {
            (_, Err(e)) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) => return self.emit(id),
            (OpKind::Read | OpKind::Write, Ok(n)) if n < o.len => {
                if n == 0 {
                    // The file ends here. A read sees zeros; a write that makes no progress never will.
                    if o.kind == OpKind::Write {
                        Err(io::Error::from_raw_os_error(libc::EIO))
                    } else {
                        for v in &o.iov {
                            // SAFETY: memory of a live operation, valid for writes.
                            unsafe { std::ptr::write_bytes(v.iov_base.cast::<u8>(), 0, v.iov_len) };
                        }
                        Ok(())
                    }
                } else {
                    advance(&mut o.iov, n as usize);
                    o.offset += n;
                    o.len -= n;
                    return self.emit(id);
                }
            }
            (OpKind::Punch, Err(e)) if unsupported(&e) => {
                let (layer, offset, len) = (o.layer, o.offset, o.len);
                self.layers[layer].storage.punch(offset, len)
            }
            (_, Ok(_)) => Ok(()),
            (_, Err(e)) => Err(e),
        };
        let o = self.ops.remove(id);
        match o.purpose {
            Purpose::Part { req, bits, epoch, bounce } => {
                if let (Some((buf, at)), OpKind::Read, Ok(())) = (&bounce, o.kind, &result)
                    && let Some(b) = &mut self.reqs.get(req).buffer
                {
                    b.write(*at, buf);
                }
                self.part_done(req, o.layer, bits, epoch, result);
            }
            Purpose::Page { page, buf } => self.page_done(o.layer, page, buf, result),
            Purpose::Sync => self.sync_done(result),
            Purpose::Log => self.log_done(result),
            Purpose::Apply => self.apply_done(result),
            Purpose::Clean { run } => self.clean_done(run, result),
        }
    }

    fn part_done(&mut self, req: ReqId, layer: usize, bits: Option<BitSet>, epoch: u64, result: io::Result<()>) {
        if layer == 0 {
            if let Some(e) = self.epochs.iter_mut().find(|e| e.0 == epoch) {
                e.1 -= 1;
            }
            while self.epochs.front().is_some_and(|e| e.1 == 0) {
                self.epochs.pop_front();
            }
            self.pump_space();
        }
        if let Some(b) = bits {
            self.layers[0].cache.unreserve(b.page);
            if result.is_ok() {
                self.set_present(b);
            }
        }
        let r = self.reqs.get(req);
        r.outstanding -= 1;
        if let Err(e) = result {
            r.error.get_or_insert(RequestError::from_io(&e));
        }
        self.maybe_finish(req);
        if !self.budget_waiters.is_empty() {
            self.try_round();
        }
    }

    fn page_done(&mut self, layer: usize, page: u64, buf: AlignedBuf, result: io::Result<()>) {
        let waiters = self.page_waiters.remove(&(layer, page)).unwrap_or_default();
        match result {
            Ok(()) => {
                // Somebody may have made the page meanwhile (a new bitmap); his is newer.
                if !self.layers[layer].cache.contains(page) {
                    self.layers[layer].cache.insert(page, buf.as_ref().into());
                }
                for id in waiters {
                    self.process(id);
                }
            }
            Err(e) => {
                for id in waiters {
                    let r = self.reqs.get(id);
                    r.parked = false;
                    r.error.get_or_insert(RequestError::from_io(&e));
                    r.pos = r.end;
                    self.maybe_finish(id);
                }
            }
        }
    }

    /// Ends a request if nothing of it is left.
    fn maybe_finish(&mut self, id: ReqId) {
        let r = self.reqs.get(id);
        if r.pos != r.end || r.outstanding != 0 || r.parked {
            return;
        }
        if r.error.is_none() && r.kind == (RequestKind::Write { fua: true }) {
            r.kind = RequestKind::Flush;
            self.flush_queue.push(id);
            return self.try_round();
        }
        self.finish(id);
    }

    fn finish(&mut self, id: ReqId) {
        let mut r = self.reqs.remove(id);
        let result = r.error.map_or(Ok(()), Err);
        if let Some(done) = r.done.take() {
            self.done.push(Done(done, Completion { result, buffer: r.buffer }));
        }
    }

    fn fail(&mut self, id: ReqId, e: RequestError) {
        self.reqs.get(id).error.get_or_insert(e);
        self.finish(id);
    }
}

/// What a range of a disk holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Extent {
    /// Nothing in any of the open images; zeros if there is no parent that is not open.
    Absent,
    /// Zeros.
    Zero,
    /// Perhaps something.
    Data,
}

/// Where a range of a disk is.
enum Place {
    /// In none of the layers.
    Absent,
    Zero,
    /// In this layer's file, from this offset on.
    File(usize, u64),
}

/// Where the data at a disk offset is, and for how many bytes (at most `max`) that holds.
fn resolve(layers: &mut [Layer], pos: u64, max: u64) -> Result<(Place, u64), (usize, Stop)> {
    let mut max = max;
    for (i, layer) in layers.iter_mut().enumerate() {
        if pos >= layer.size {
            // A parent that is smaller than its child: zeros beyond.
            return Ok((Place::Zero, max));
        }
        max = max.min(layer.size - pos);
        match &layer.kind {
            Kind::Flat { length } => {
                return Ok(if pos >= *length {
                    (Place::Zero, max)
                } else {
                    (Place::File(i, pos), max.min(*length - pos))
                });
            }
            Kind::Blocks(map) => {
                let block = pos >> map.block_shift;
                let inside = pos & (map.block_size() - 1);
                max = max.min(map.block_size() - inside);
                let stop = |s| (i, s);
                match map.block(&mut layer.cache, block).map_err(stop)? {
                    Block::Absent if map.has_parent => {}
                    Block::Absent => return Ok((Place::Absent, max)),
                    Block::Zero => return Ok((Place::Zero, max)),
                    Block::Full(at) => return Ok((Place::File(i, at + inside), max)),
                    Block::Partial(at) => {
                        let base = map.bitmap_base(&mut layer.cache, block, at).map_err(stop)?;
                        let sector = inside >> map.sector_shift;
                        // The child's sectors may be smaller than the bitmap's unit never: both are the image's own.
                        let sectors = max.div_ceil(1 << map.sector_shift);
                        let (here, n) = map.present(&mut layer.cache, base, sector, sectors).map_err(stop)?;
                        let into = inside & ((1 << map.sector_shift) - 1);
                        max = max.min((n << map.sector_shift) - into);
                        if here {
                            return Ok((Place::File(i, at + inside), max));
                        }
                    }
                }
            }
        }
    }
    Ok((Place::Absent, max))
}

/// Linux takes at most 1024 segments in one call (UIO_MAXIOV).
const MAX_IOV: usize = 1024;

fn iovec(ptr: *mut u8, len: usize) -> libc::iovec {
    libc::iovec { iov_base: ptr.cast(), iov_len: len }
}

/// Removes the first `n` bytes of a scatter list.
fn advance(iov: &mut Vec<libc::iovec>, mut n: usize) {
    while let Some(v) = iov.first_mut() {
        if n < v.iov_len {
            v.iov_base = v.iov_base.cast::<u8>().wrapping_add(n).cast();
            v.iov_len -= n;
            return;
        }
        n -= v.iov_len;
        iov.remove(0);
    }
}

fn unsupported(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV | libc::EINVAL))
}
