//! Requests that change the disk: finding or making a place for a write, unmapping, writing zeros.

use super::map::{Block, Flavor, Stop};
use super::space::{Run, UNIT};
use super::writer::Writer;
use super::{BitSet, Core, Kind, OpKind, Purpose, ReqId, RequestKind};
use crate::error::RequestError;
use crate::format::vhdx as fmt;

/// Why a write cannot go on now.
enum Halt {
    Stop(Stop),
    /// Too many dirty pages: after the next commit.
    Budget,
}

impl From<Stop> for Halt {
    fn from(s: Stop) -> Self {
        Self::Stop(s)
    }
}

impl From<RequestError> for Halt {
    fn from(e: RequestError) -> Self {
        Self::Stop(Stop::Fail(e))
    }
}

/// What to do with the next piece of a request.
enum Step {
    /// Do this operation on the file, then set these bits.
    Io { kind: OpKind, offset: u64, len: u64, bits: Option<BitSet> },
    /// Nothing to be done for this many bytes.
    Skip(u64),
}

impl Core {
    pub(super) fn process_write(&mut self, id: ReqId) {
        loop {
            let r = self.reqs.get(id);
            let (kind, start, pos, end) = (r.kind, r.start, r.pos, r.end);
            if pos == end {
                break;
            }
            let step = if self.failed {
                Err(RequestError::Failed.into())
            } else if let Err(e) = self.start_writing() {
                Err(e.into())
            } else if matches!(kind, RequestKind::Write { .. }) {
                self.place(pos, end - pos)
            } else {
                self.discard(pos, end - pos, kind == RequestKind::WriteZeroes)
            };
            let n = match step {
                Ok(Step::Io { kind, offset, len, bits }) => {
                    self.issue_part(id, kind, 0, offset, (pos - start) as usize, len, bits);
                    len
                }
                Ok(Step::Skip(n)) => n,
                Err(Halt::Stop(Stop::Miss(page))) => return self.park_on_page(id, 0, page),
                Err(Halt::Budget) => {
                    self.reqs.get(id).parked = true;
                    self.budget_waiters.push(id);
                    return self.try_round();
                }
                Err(Halt::Stop(Stop::Fail(e))) => {
                    self.reqs.get(id).error.get_or_insert(e);
                    end - pos
                }
            };
            self.reqs.get(id).pos = pos + n;
        }
        self.maybe_finish(id);
    }

    /// Before the first change since opening: says in the file that it is being written.
    fn start_writing(&mut self) -> Result<(), RequestError> {
        let storage = &self.layers[0].storage;
        self.writer.start(&**storage).map_err(|e| {
            tracing::warn!(error = %e, "cannot begin to write to an image");
            self.failed = true;
            RequestError::Failed
        })
    }

    fn budget(&self, pages: usize) -> Result<(), Halt> {
        let c = &self.layers[0].cache;
        if c.dirty.len() + c.reserved + pages > self.writer.commit_limit() { Err(Halt::Budget) } else { Ok(()) }
    }

    /// Finds the place for a write at `pos`, making one if there is none.
    fn place(&mut self, pos: u64, max: u64) -> Result<Step, Halt> {
        let Kind::Blocks(map) = &self.layers[0].kind else {
            return Ok(Step::Io { kind: OpKind::Write, offset: pos, len: max, bits: None });
        };
        let (block, inside) = (pos >> map.block_shift, pos & (map.block_size() - 1));
        let len = max.min(map.block_size() - inside);
        loop {
            let layer = &mut self.layers[0];
            let Kind::Blocks(map) = &layer.kind else { return Err(RequestError::Malformed.into()) };
            match map.block(&mut layer.cache, block)? {
                Block::Full(at) => {
                    return Ok(Step::Io { kind: OpKind::Write, offset: at + inside, len, bits: None });
                }
                Block::Partial(at) => {
                    let (len, bits) = self.reserve_bits(block, at, inside, len)?;
                    return Ok(Step::Io { kind: OpKind::Write, offset: at + inside, len, bits: Some(bits) });
                }
                Block::Absent if map.has_parent => self.allocate_partial(block)?,
                Block::Absent | Block::Zero => self.allocate_full(block)?,
            }
        }
    }

    /// Reserves the bitmap page for a write to a partially present block; cuts the write to what the page covers.
    fn reserve_bits(&mut self, block: u64, at: u64, inside: u64, len: u64) -> Result<(u64, BitSet), Halt> {
        let layer = &mut self.layers[0];
        let Kind::Blocks(map) = &layer.kind else { return Err(RequestError::Malformed.into()) };
        let base = map.bitmap_base(&mut layer.cache, block, at)?;
        let sector = inside >> map.sector_shift;
        let count = (len >> map.sector_shift).min(map.sectors_in_page(base, sector));
        let len = count << map.sector_shift;
        let (page, _) = map.page_of(map.bit(base, sector).0);
        if !layer.cache.contains(page) {
            return Err(Stop::Miss(page).into());
        }
        if layer.cache.costs(page) {
            self.budget(1)?;
        }
        self.layers[0].cache.reserve(page);
        Ok((len, BitSet { block, base, sector, count, page }))
    }

    /// A write to a partially present block is complete: its sectors are now here.
    pub(super) fn set_present(&mut self, b: BitSet) {
        let layer = &mut self.layers[0];
        let Kind::Blocks(map) = &layer.kind else { return };
        // The block may have been unmapped (and its place given up) while the write was in flight.
        if !matches!(map.block(&mut layer.cache, b.block), Ok(Block::Partial(_))) {
            return;
        }
        map.set_bits(&mut layer.cache, b.base, b.sector, b.count, true);
    }

    /// Gives a block that reads as zeros a place of its own.
    fn allocate_full(&mut self, block: u64) -> Result<(), Halt> {
        let layer = &self.layers[0];
        let Kind::Blocks(map) = &layer.kind else { return Err(RequestError::Malformed.into()) };
        let (page, _) = map.page_of(map.entry_at(block));
        let cost = usize::from(layer.cache.costs(page));
        match map.flavor {
            Flavor::Vhdx { .. } => {
                self.budget(cost)?;
                let at = self.allocate(map.block_size())?;
                let layer = &mut self.layers[0];
                if let Kind::Blocks(map) = &mut layer.kind {
                    map.set_block(&mut layer.cache, block, Block::Full(at));
                }
            }
            Flavor::Vhd { bitmap_bytes } => {
                self.budget(cost + (bitmap_bytes >> map.page_shift) as usize)?;
                let at = self.allocate(bitmap_bytes + map.block_size())?;
                // Every sector of a dynamic disk's block counts as present: the new block is zero anyway.
                self.new_bitmap(at, bitmap_bytes, Some(0xff));
                let layer = &mut self.layers[0];
                if let Kind::Blocks(map) = &mut layer.kind {
                    map.set_block(&mut layer.cache, block, Block::Full(at + bitmap_bytes));
                }
            }
        }
        Ok(())
    }

    /// Puts the pages of a bitmap in durably zero space into the cache, zero (not dirty) or filled (dirty).
    fn new_bitmap(&mut self, at: u64, bytes: u64, fill: Option<u8>) {
        let layer = &mut self.layers[0];
        let Kind::Blocks(map) = &layer.kind else { return };
        let size = 1u64 << map.page_shift;
        for off in (at..at + bytes).step_by(size as usize) {
            let page = off >> map.page_shift;
            layer.cache.insert(page, vec![0; size as usize].into());
            if let Some(f) = fill
                && let Some(d) = layer.cache.modify(page, false)
            {
                d.fill(f);
            }
        }
    }

    /// Gives a block of a differencing image a place of its own, with no sector in it yet.
    fn allocate_partial(&mut self, block: u64) -> Result<(), Halt> {
        let layer = &mut self.layers[0];
        let Kind::Blocks(map) = &layer.kind else { return Err(RequestError::Malformed.into()) };
        let (entry_page, _) = map.page_of(map.entry_at(block));
        let block_size = map.block_size();
        match map.flavor {
            Flavor::Vhd { bitmap_bytes } => {
                self.budget(usize::from(self.layers[0].cache.costs(entry_page)))?;
                let at = self.allocate(bitmap_bytes + block_size)?;
                self.new_bitmap(at, bitmap_bytes, None);
                let layer = &mut self.layers[0];
                if let Kind::Blocks(map) = &layer.kind {
                    map.set_block(&mut layer.cache, block, Block::Partial(at + bitmap_bytes));
                }
            }
            Flavor::Vhdx { chunk_shift } => {
                let bitmap_entry = map.bitmap_entry_at(block, chunk_shift);
                let raw = map.read_u64(&mut layer.cache, bitmap_entry)?;
                let have = raw & fmt::BAT_STATE_MASK == fmt::BLOCK_FULLY_PRESENT;
                let sectors = block_size >> map.sector_shift;
                let in_chunk = block & ((1 << chunk_shift) - 1);
                let bits_at = (in_chunk * sectors) / 8;
                let pages = (sectors / 8).div_ceil(4096).max(1) as usize;
                if !have {
                    let (bp, _) = map.page_of(bitmap_entry);
                    let cost = usize::from(layer.cache.costs(bp)) + usize::from(layer.cache.costs(entry_page));
                    self.budget(cost + pages)?;
                    let bitmap = self.allocate(fmt::MIB)?;
                    self.new_bitmap((bitmap + bits_at) & !4095, (pages * 4096) as u64, None);
                    let layer = &mut self.layers[0];
                    if let Kind::Blocks(map) = &layer.kind {
                        map.set_bitmap_block(&mut layer.cache, bitmap_entry, bitmap);
                    }
                }
                let layer = &mut self.layers[0];
                let Kind::Blocks(map) = &layer.kind else { return Err(RequestError::Malformed.into()) };
                let base = map.bitmap_base(&mut layer.cache, block, 0)?;
                // Bits from an earlier life of the block must go. All their pages are needed before anything changes.
                let mut stale = Vec::new();
                let mut s = 0;
                while s < sectors {
                    let n = map.sectors_in_page(base, s).min(sectors - s);
                    let (page, _) = map.page_of(map.bit(base, s).0);
                    let mut at = s;
                    while at < s + n {
                        let (here, m) = map.present(&mut layer.cache, base, at, s + n - at)?;
                        if here {
                            stale.push((s, n, page));
                            break;
                        }
                        at += m;
                    }
                    s += n;
                }
                let cost = stale.iter().filter(|x| layer.cache.costs(x.2)).count()
                    + usize::from(layer.cache.costs(entry_page));
                self.budget(cost)?;
                let at = self.allocate(block_size)?;
                let layer = &mut self.layers[0];
                let Kind::Blocks(map) = &layer.kind else { return Err(RequestError::Malformed.into()) };
                for (s, n, _) in stale {
                    map.set_bits(&mut layer.cache, base, s, n, false);
                }
                map.set_block(&mut layer.cache, block, Block::Partial(at));
            }
        }
        Ok(())
    }

    /// Durably zero space in the file.
    fn allocate(&mut self, bytes: u64) -> Result<u64, RequestError> {
        let layer = &mut self.layers[0];
        let at = self.writer.allocate(&*layer.storage, bytes)?;
        if let Kind::Blocks(map) = &mut layer.kind {
            map.file_end = self.writer.file_length().max(map.file_end);
        }
        self.pump_space();
        Ok(at)
    }

    /// The next piece of an unmap (`must` false) or of writing zeros.
    fn discard(&mut self, pos: u64, max: u64, must: bool) -> Result<Step, Halt> {
        let size = self.size();
        let layer = &mut self.layers[0];
        let Kind::Blocks(map) = &layer.kind else {
            return Ok(Step::Io { kind: OpKind::Punch, offset: pos, len: max, bits: None });
        };
        let (block, inside) = (pos >> map.block_shift, pos & (map.block_size() - 1));
        let len = max.min(map.block_size() - inside);
        let whole = inside == 0 && (len == map.block_size() || pos + len == size);
        let can_free = !map.fixed && matches!(map.flavor, Flavor::Vhdx { .. });
        let has_parent = map.has_parent;
        let found = map.block(&mut layer.cache, block)?;
        if map.fixed && !must {
            return Ok(Step::Skip(len));
        }
        match found {
            Block::Zero => return Ok(Step::Skip(len)),
            Block::Absent if !has_parent => return Ok(Step::Skip(len)),
            Block::Absent if !must && !whole => return Ok(Step::Skip(len)),
            _ => {}
        }
        if whole && can_free {
            let (page, _) = map.page_of(map.entry_at(block));
            let cost = usize::from(layer.cache.costs(page));
            let units = map.block_size() / UNIT;
            self.budget(cost)?;
            let layer = &mut self.layers[0];
            if let Kind::Blocks(map) = &layer.kind {
                map.set_block(&mut layer.cache, block, Block::Zero);
            }
            if let (Block::Full(at) | Block::Partial(at), Writer::Vhdx(w)) = (found, &mut self.writer) {
                w.space.freed.push(Run { start: at / UNIT, count: units });
            }
            return Ok(Step::Skip(len));
        }
        match found {
            Block::Full(at) => Ok(Step::Io { kind: OpKind::Punch, offset: at + inside, len, bits: None }),
            Block::Partial(at) => {
                let (len, bits) = self.reserve_bits(block, at, inside, len)?;
                Ok(Step::Io { kind: OpKind::Punch, offset: at + inside, len, bits: Some(bits) })
            }
            // VHD cannot say "zero" in its BAT: a block of its own hides the parent.
            Block::Absent | Block::Zero => {
                self.allocate_partial(block)?;
                self.discard(pos, max, must)
            }
        }
    }

    /// Moves given-up space along: punches what no request can touch any more.
    pub(super) fn pump_space(&mut self) {
        let oldest = self.epochs.front().map_or(self.epoch, |e| e.0);
        let Writer::Vhdx(w) = &mut self.writer else { return };
        let mut runs = Vec::new();
        while self.cleaning + runs.len() < 4 {
            match w.space.draining.front() {
                Some(&(epoch, run)) if epoch < oldest => {
                    w.space.draining.pop_front();
                    runs.push(run);
                }
                _ => break,
            }
        }
        if self.cleaning + runs.len() == 0
            && w.started
            && w.space.punched.len() < 64
            && let Some(run) = w.space.unclean.pop_front()
        {
            let now = Run { start: run.start, count: run.count.min(1024) };
            if run.count > now.count {
                w.space.unclean.push_front(Run { start: now.start + now.count, count: run.count - now.count });
            }
            runs.push(now);
        }
        for run in runs {
            self.cleaning += 1;
            self.issue(Purpose::Clean { run }, 0, OpKind::Punch, run.start * UNIT, run.count * UNIT, Vec::new());
        }
    }

    pub(super) fn clean_done(&mut self, run: Run, result: std::io::Result<()>) {
        self.cleaning -= 1;
        if let Writer::Vhdx(w) = &mut self.writer {
            // If the host could not zero it, the space is lost until the image is compacted; that is safe.
            if result.is_ok() {
                w.space.punched.push(run);
            }
        }
        self.pump_space();
    }
}
