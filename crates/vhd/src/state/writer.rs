//! What a writable image needs beyond its map: headers to mark, space to hand out, a log to write.

use std::collections::VecDeque;

use uuid::Uuid;

use super::space::{Space, UNIT};
use crate::error::{Error, RequestError, Result};
use crate::format::vhd;
use crate::storage::Storage;
use crate::vhdx::header::HeaderState;
use crate::vhdx::log::{MAX_FILE, entry_length};
use crate::vhdx::region::Range;

pub(crate) enum Writer {
    /// Open for reading only.
    None,
    /// Every byte has its place already: raw, fixed VHD.
    Flat,
    Vhdx(Box<VhdxWriter>),
    Vhd(Box<VhdWriter>),
}

/// The file grows in steps of this, so that not every new block changes its length. Closing cuts it.
const GROWTH: u64 = 64 << 20;

pub(crate) struct VhdxWriter {
    pub header: HeaderState,
    pub space: Space,
    pub file_length: u64,
    /// The length that a sync has made durable.
    pub durable_length: u64,
    /// The length when the sync under way was issued.
    pub length_at_sync: u64,
    pub started: bool,
    pub log: Range,
    /// Where the next log entry goes, from the start of the log.
    pub head: u64,
    pub sequence: u64,
    /// Offsets of the entries whose updates are not yet durable in place.
    pub live: VecDeque<u64>,
    /// Writing does not change what children know this image by: while one of them is being merged into it.
    pub keep_data_guid: bool,
}

pub(crate) struct VhdWriter {
    /// The footer as it is written at the end of the file.
    pub footer: Box<[u8; 512]>,
    pub started: bool,
    /// Where the next block goes.
    pub next: u64,
    /// Where the footer is; everything from `next` to here is durably zero.
    pub pool_end: u64,
}

impl VhdxWriter {
    pub fn new(header: HeaderState, space: Space, file_length: u64, log: Range) -> Self {
        Self {
            header,
            space,
            file_length,
            durable_length: file_length,
            length_at_sync: file_length,
            started: false,
            log,
            head: 0,
            sequence: 1,
            live: VecDeque::new(),
            keep_data_guid: false,
        }
    }

    fn start(&mut self, storage: &dyn Storage) -> Result<()> {
        // Whatever lies beyond the last block is a leftover of unknown content: cut it, so that extending gives zeros.
        let end = self.space.tail * UNIT;
        if self.file_length != end {
            storage.set_length(end).map_err(Error::io(storage.path(), "set the length"))?;
            self.file_length = end;
        }
        let keep = self.keep_data_guid;
        self.header.update(storage, |h| {
            h.file_write_guid = Uuid::new_v4().into();
            if !keep {
                h.data_write_guid = Uuid::new_v4().into();
            }
            h.log_guid = Uuid::new_v4().into();
        })?;
        self.durable_length = end;
        (self.head, self.sequence) = (0, 1);
        self.live.clear();
        self.started = true;
        Ok(())
    }

    fn allocate(&mut self, storage: &dyn Storage, bytes: u64) -> std::result::Result<u64, RequestError> {
        let units = bytes.div_ceil(UNIT);
        if let Some(run) = self.space.take_clean(units) {
            return Ok(run.start * UNIT);
        }
        let (start, end) = (self.space.tail * UNIT, (self.space.tail + units) * UNIT);
        if end > MAX_FILE {
            return Err(RequestError::NoSpace);
        }
        if end > self.file_length {
            let length = end.max(self.file_length + GROWTH);
            storage.set_length(length).map_err(|e| RequestError::from_io(&e))?;
            self.file_length = length;
        }
        self.space.take_tail(units);
        Ok(start)
    }

    fn close(&mut self, storage: &dyn Storage, failed: bool) -> Result<()> {
        if !self.started || failed {
            // After a failure the log stays, so that the next opening replays it.
            return Ok(());
        }
        let io = |e| Error::io(storage.path(), "close the image")(e);
        storage.sync().map_err(io)?;
        self.header.update(storage, |h| h.log_guid = Uuid::nil().into())?;
        let end = self.space.end();
        self.space.cut(end);
        storage.set_length(end * UNIT).and_then(|()| storage.sync()).map_err(io)?;
        self.file_length = end * UNIT;
        self.started = false;
        Ok(())
    }
}

impl VhdWriter {
    fn start(&mut self, storage: &dyn Storage) -> Result<()> {
        self.settle(storage)?;
        self.started = true;
        Ok(())
    }

    /// Puts the footer right behind the last block and cuts the file there.
    fn settle(&mut self, storage: &dyn Storage) -> Result<()> {
        let end = self.next.next_multiple_of(vhd::SECTOR);
        storage
            .write_at(&self.footer[..], end)
            .and_then(|()| storage.sync())
            .and_then(|()| storage.set_length(end + vhd::SECTOR))
            .and_then(|()| storage.sync())
            .map_err(Error::io(storage.path(), "write the footer"))?;
        (self.next, self.pool_end) = (end, end);
        Ok(())
    }

    /// Space for a sector bitmap and a block, placed so that the block's data is 4 KiB aligned.
    fn allocate(&mut self, storage: &dyn Storage, bytes: u64) -> std::result::Result<u64, RequestError> {
        let bitmap = bytes % 4096;
        let start = (self.next + bitmap).next_multiple_of(4096) - bitmap;
        let end = start + bytes;
        if end / vhd::SECTOR >= u64::from(u32::MAX) {
            return Err(RequestError::NoSpace);
        }
        if end > self.pool_end {
            let to = end.max(self.pool_end + GROWTH).next_multiple_of(vhd::SECTOR);
            // The new footer is durable before the old one goes; the copy at the file's start covers what is between.
            storage
                .write_at(&self.footer[..], to)
                .and_then(|()| storage.sync())
                .and_then(|()| storage.write_at(&[0; 512], self.pool_end))
                .and_then(|()| storage.sync())
                .map_err(|e| RequestError::from_io(&e))?;
            self.pool_end = to;
        }
        self.next = end;
        Ok(start)
    }
}

impl Writer {
    /// To be called before anything in the file is changed.
    pub fn start(&mut self, storage: &dyn Storage) -> Result<()> {
        match self {
            Self::Vhdx(w) if !w.started => w.start(storage),
            Self::Vhd(w) if !w.started => w.start(storage),
            _ => Ok(()),
        }
    }

    /// Durably zero space.
    pub fn allocate(&mut self, storage: &dyn Storage, bytes: u64) -> std::result::Result<u64, RequestError> {
        match self {
            Self::Vhdx(w) => w.allocate(storage, bytes),
            Self::Vhd(w) => w.allocate(storage, bytes),
            Self::None | Self::Flat => Err(RequestError::Malformed),
        }
    }

    pub fn file_length(&self) -> u64 {
        match self {
            Self::Vhdx(w) => w.file_length,
            Self::Vhd(w) => w.pool_end,
            Self::None | Self::Flat => 0,
        }
    }

    /// How many pages a commit may take.
    pub fn commit_limit(&self) -> usize {
        match self {
            Self::Vhdx(w) => log_pages(w.log.length),
            _ => 4096,
        }
    }

    /// Leaves the file closed and tidy. Nothing may be in flight or dirty.
    pub fn close(&mut self, storage: &dyn Storage, failed: bool) -> Result<()> {
        match self {
            Self::Vhdx(w) => w.close(storage, failed),
            Self::Vhd(w) if w.started && !failed => {
                w.settle(storage)?;
                w.started = false;
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

/// Pages in a log entry that takes a quarter of the log. Two entries are protected at any time (the last durable one
/// and the one before, whose updates the last one's sync made durable), so a quarter always finds room.
pub(crate) fn log_pages(log_length: u64) -> usize {
    let quarter = (log_length / 4) as usize;
    let mut pages = (quarter / 4096).min(4096);
    while entry_length(pages) > quarter {
        pages -= 1;
    }
    pages
}
