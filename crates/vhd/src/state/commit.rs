//! Commits: how dirty metadata becomes durable. One *round* is under way at a time; it serves the flushes that waited
//! when it began.
//!
//! VHDX, nothing dirty: sync.
//! VHDX, dirty: [sync, if sector bitmaps are among the pages: a bit may be durable only after its data] → log entry →
//! sync → flushes complete → updates in place. The next round's sync makes the updates durable and frees the log entry.
//! VHD: sync (data and bitmaps' space first) → updates in place → sync → flushes complete.

use super::map::BlockMap;
use super::writer::Writer;
use super::{Core, Kind, OpKind, Purpose, ReqId, iovec};
use crate::buffer::AlignedBuf;
use crate::error::RequestError;
use crate::vhdx::log::{EntryInfo, encode_entry, entry_length};

/// The pages that a round commits.
pub(crate) struct Job {
    waiters: Vec<ReqId>,
    pages: Vec<u64>,
    /// The pages' content, one after the other.
    content: Option<AlignedBuf>,
    /// The log entry; alive while it is written.
    entry: Option<AlignedBuf>,
    left: usize,
    error: Option<RequestError>,
}

pub(crate) enum Round {
    Idle,
    /// Sync before anything else.
    PreSync(Job),
    LogWrite(Job),
    /// The sync after which the flushes are done.
    FinalSync(Job),
    /// Updates in place.
    Apply(Job),
}

impl Core {
    /// Begins a round if one is wanted and none is under way.
    pub(super) fn try_round(&mut self) {
        if !matches!(self.round, Round::Idle) {
            return;
        }
        let pressed = !self.budget_waiters.is_empty() && self.is_dirty();
        if self.flush_queue.is_empty() && !pressed {
            return;
        }
        let waiters = std::mem::take(&mut self.flush_queue);
        if self.failed {
            for id in waiters {
                self.fail(id, RequestError::Failed);
            }
            for id in std::mem::take(&mut self.budget_waiters) {
                self.process(id);
            }
            return;
        }
        let dirty = self.layers[0].cache.snapshot();
        let mut bitmaps = false;
        let mut content = None;
        if let Some((_, first, _)) = dirty.first() {
            let size = first.len();
            let mut buf = AlignedBuf::zeroed(size * dirty.len());
            for (i, (_, data, bitmap)) in dirty.iter().enumerate() {
                buf[i * size..(i + 1) * size].copy_from_slice(data);
                bitmaps |= bitmap;
            }
            content = Some(buf);
        }
        let pages: Vec<u64> = dirty.into_iter().map(|d| d.0).collect();
        let job = Job { waiters, pages, content, entry: None, left: 0, error: None };
        let vhdx = if let Writer::Vhdx(w) = &mut self.writer {
            w.space.committing.append(&mut w.space.freed);
            true
        } else {
            false
        };
        if job.pages.is_empty() {
            self.round = Round::FinalSync(job);
            self.issue_sync();
        } else if vhdx && !bitmaps {
            self.write_log(job);
        } else {
            self.round = Round::PreSync(job);
            self.issue_sync();
        }
        // The dirty pages have been taken: there is room again.
        for id in std::mem::take(&mut self.budget_waiters) {
            self.process(id);
        }
    }

    fn issue_sync(&mut self) {
        if let Writer::Vhdx(w) = &mut self.writer {
            w.length_at_sync = w.file_length;
            w.space.syncing.append(&mut w.space.punched);
        }
        self.issue(Purpose::Sync, 0, OpKind::Sync, 0, 0, Vec::new());
    }

    fn write_log(&mut self, mut job: Job) {
        let Writer::Vhdx(w) = &mut self.writer else { return };
        let length = entry_length(job.pages.len());
        let mut entry = AlignedBuf::zeroed(length);
        let info = EntryInfo {
            sequence: w.sequence,
            tail: w.live.front().copied().unwrap_or(w.head),
            guid: w.header.log_guid(),
            flushed_file_offset: w.durable_length,
            last_file_offset: w.file_length,
        };
        let content: &[u8] = job.content.as_deref().unwrap_or(&[]);
        encode_entry(
            &info,
            job.pages.iter().zip(content.chunks(4096)).map(|(&n, c)| (n << 12, c)).collect::<Vec<_>>().into_iter(),
            &mut entry,
        );
        // The log is circular: an entry may go on at its start.
        let first = (length as u64).min(w.log.length - w.head);
        let mut parts = vec![(w.log.offset + w.head, 0usize, first as usize)];
        if first < length as u64 {
            parts.push((w.log.offset, first as usize, length - first as usize));
        }
        w.live.push_back(w.head);
        w.sequence += 1;
        w.head = (w.head + length as u64) % w.log.length;
        let ptr = entry.as_ptr();
        job.entry = Some(entry);
        job.left = parts.len();
        self.round = Round::LogWrite(job);
        for (offset, from, len) in parts {
            let iov = vec![iovec(ptr.wrapping_add(from), len)];
            self.issue(Purpose::Log, 0, OpKind::Write, offset, len as u64, iov);
        }
    }

    pub(super) fn log_done(&mut self, result: std::io::Result<()>) {
        let Round::LogWrite(mut job) = std::mem::replace(&mut self.round, Round::Idle) else { return };
        job.left -= 1;
        if let Err(e) = result {
            job.error.get_or_insert(RequestError::from_io(&e));
        }
        if job.left > 0 {
            self.round = Round::LogWrite(job);
        } else if let Some(e) = job.error {
            self.round_failed(job, e);
        } else {
            job.entry = None;
            self.round = Round::FinalSync(job);
            self.issue_sync();
        }
    }

    pub(super) fn sync_done(&mut self, result: std::io::Result<()>) {
        let round = std::mem::replace(&mut self.round, Round::Idle);
        if let Err(e) = result {
            // After a failed fsync nobody knows what is on the disk (the kernel drops the dirty state): stop writing.
            match round {
                Round::PreSync(job) | Round::FinalSync(job) => self.round_failed(job, RequestError::from_io(&e)),
                _ => {}
            }
            return;
        }
        let in_log = matches!(&round, Round::FinalSync(j) if !j.pages.is_empty());
        if let Writer::Vhdx(w) = &mut self.writer {
            w.durable_length = w.length_at_sync;
            for run in std::mem::take(&mut w.space.syncing) {
                w.space.make_clean(run);
            }
            // Updates of every entry but the one just logged were in place before this sync began.
            while w.live.len() > usize::from(in_log) {
                w.live.pop_front();
            }
        }
        match round {
            Round::PreSync(job) if matches!(self.writer, Writer::Vhdx(_)) => self.write_log(job),
            Round::PreSync(job) => self.apply(job),
            Round::FinalSync(mut job) => {
                for id in std::mem::take(&mut job.waiters) {
                    self.finish(id);
                }
                if let Writer::Vhdx(w) = &mut self.writer {
                    let epoch = self.epoch;
                    w.space.draining.extend(w.space.committing.drain(..).map(|r| (epoch, r)));
                    self.epoch += 1;
                    self.pump_space();
                    if job.pages.is_empty() { self.end_round(job) } else { self.apply(job) }
                } else {
                    self.end_round(job);
                }
            }
            _ => {}
        }
    }

    /// Writes the pages to their places, neighbours together.
    fn apply(&mut self, mut job: Job) {
        let shift = match &self.layers[0].kind {
            Kind::Blocks(BlockMap { page_shift, .. }) => *page_shift,
            Kind::Flat { .. } => 12,
        };
        let ptr = job.content.as_ref().map_or(std::ptr::null_mut(), AlignedBuf::as_ptr);
        let mut parts: Vec<(u64, usize, usize)> = Vec::new();
        for (i, &page) in job.pages.iter().enumerate() {
            match parts.last_mut() {
                Some((first, _, count)) if *first + *count as u64 == page && *count < 256 => *count += 1,
                _ => parts.push((page, i, 1)),
            }
        }
        job.left = parts.len();
        self.round = Round::Apply(job);
        for (page, index, count) in parts {
            let len = count << shift;
            let iov = vec![iovec(ptr.wrapping_add(index << shift), len)];
            self.issue(Purpose::Apply, 0, OpKind::Write, page << shift, len as u64, iov);
        }
    }

    pub(super) fn apply_done(&mut self, result: std::io::Result<()>) {
        let Round::Apply(mut job) = std::mem::replace(&mut self.round, Round::Idle) else { return };
        job.left -= 1;
        if let Err(e) = result {
            job.error.get_or_insert(RequestError::from_io(&e));
        }
        if job.left > 0 {
            self.round = Round::Apply(job);
        } else if let Some(e) = job.error {
            self.round_failed(job, e);
        } else if matches!(self.writer, Writer::Vhdx(_)) {
            self.end_round(job);
        } else {
            self.round = Round::FinalSync(job);
            self.issue_sync();
        }
    }

    fn end_round(&mut self, job: Job) {
        for page in job.pages {
            self.layers[0].cache.release(page);
        }
        self.round = Round::Idle;
        self.try_round();
    }

    /// A step of a round failed: the image takes no more writes. The pages stay held, so reads go on seeing them.
    fn round_failed(&mut self, mut job: Job, e: RequestError) {
        tracing::error!(error = %e, image = %self.layers[0].storage.path().display(), "a metadata write failed");
        self.failed = true;
        for id in std::mem::take(&mut job.waiters) {
            self.fail(id, e);
        }
        self.round = Round::Idle;
        for id in std::mem::take(&mut self.budget_waiters) {
            self.process(id);
        }
        self.try_round();
    }
}
