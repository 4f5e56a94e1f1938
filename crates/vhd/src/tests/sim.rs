//! A host that remembers every write and can lose power: any subset of sectors (512 bytes, or the disk's own 4096) written since the last sync
//! may survive, in any order.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::RawFd;
use std::path::Path;
use std::sync::{Arc, Mutex};

use super::Rng;
use crate::storage::{DirectAlignment, Storage};

#[derive(Debug, Clone)]
pub(super) enum Entry {
    Write {
        offset: u64,
        data: Vec<u8>,
    },
    Length(u64),
    Punch {
        offset: u64,
        length: u64,
    },
    /// Everything before this index is durable from here on.
    Sync {
        covers: usize,
    },
}

/// A file's content, by pages.
#[derive(Clone, Default)]
pub(super) struct Content {
    pages: BTreeMap<u64, Arc<[u8; 4096]>>,
    pub length: u64,
}

impl Content {
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        let mut at = 0;
        while at < data.len() {
            let pos = offset + at as u64;
            let inside = (pos % 4096) as usize;
            let n = (4096 - inside).min(data.len() - at);
            let page = self.pages.entry(pos / 4096).or_insert_with(|| Arc::new([0; 4096]));
            Arc::make_mut(page)[inside..inside + n].copy_from_slice(&data[at..at + n]);
            at += n;
        }
        self.length = self.length.max(offset + data.len() as u64);
    }

    pub fn read(&self, offset: u64, buf: &mut [u8]) {
        buf.fill(0);
        let end = offset + buf.len() as u64;
        for (n, page) in self.pages.range(offset / 4096..end.div_ceil(4096)) {
            let start = n * 4096;
            let (from, to) = (start.max(offset), (start + 4096).min(end));
            buf[(from - offset) as usize..(to - offset) as usize]
                .copy_from_slice(&page[(from - start) as usize..(to - start) as usize]);
        }
    }

    fn zero(&mut self, offset: u64, length: u64) {
        let end = offset + length;
        for n in self.pages.range(offset / 4096..end.div_ceil(4096)).map(|(n, _)| *n).collect::<Vec<_>>() {
            let start = n * 4096;
            let (from, to) = (start.max(offset), (start + 4096).min(end));
            if to - from == 4096 {
                self.pages.remove(&n);
            } else if let Some(p) = self.pages.get_mut(&n) {
                Arc::make_mut(p)[(from - start) as usize..(to - start) as usize].fill(0);
            }
        }
    }

    pub fn set_length(&mut self, length: u64) {
        if length < self.length {
            self.zero(length, self.length - length);
        }
        self.length = length;
    }

    pub fn apply(&mut self, e: &Entry) {
        match e {
            Entry::Write { offset, data } => self.write(*offset, data),
            Entry::Length(l) => self.set_length(*l),
            Entry::Punch { offset, length } => {
                let end = (offset + length).min(self.length);
                self.zero(*offset, end.saturating_sub(*offset));
            }
            Entry::Sync { .. } => {}
        }
    }

    /// Applies what a power cut may leave of an entry.
    fn apply_torn(&mut self, e: &Entry, rng: &mut Rng, keep: u64, unit: u64) {
        let kept = |rng: &mut Rng| rng.below(100) < keep;
        match e {
            Entry::Write { offset, data } => {
                // A whole write is kept or lost more often than it is torn.
                let (whole, all) = (rng.below(2) == 0, kept(rng));
                let mut at = 0;
                while at < data.len() {
                    let pos = offset + at as u64;
                    let n = ((unit - pos % unit) as usize).min(data.len() - at);
                    let keep_it = if whole { all } else { kept(rng) };
                    // What lies beyond the length that survived is not seen.
                    if keep_it && (pos + n as u64 <= self.length || (pos <= self.length && rng.below(2) == 0)) {
                        self.write(pos, &data[at..at + n]);
                    }
                    at += n;
                }
            }
            Entry::Length(l) => {
                if kept(rng) {
                    self.set_length(*l);
                }
            }
            Entry::Punch { offset, length } => {
                let end = (offset + length).min(self.length);
                let mut pos = *offset;
                while pos < end {
                    let n = (65536 - pos % 65536).min(end - pos);
                    if kept(rng) {
                        self.zero(pos, n);
                    }
                    pos += n;
                }
            }
            Entry::Sync { .. } => {}
        }
    }
}

pub(super) struct State {
    pub now: Content,
    pub base: Content,
    pub journal: Vec<Entry>,
}

/// The simulated file.
pub(super) struct SimFile(pub Mutex<State>);

impl SimFile {
    pub fn new(content: Content) -> Arc<Self> {
        Arc::new(Self(Mutex::new(State { now: content.clone(), base: content, journal: Vec::new() })))
    }

    pub fn journal_len(&self) -> usize {
        self.0.lock().unwrap().journal.len()
    }

    fn record(&self, e: Entry) {
        let mut s = self.0.lock().unwrap();
        s.now.apply(&e);
        s.journal.push(e);
    }

    /// A sync that was issued when the journal had `covers` entries is complete.
    pub fn sync_from(&self, covers: usize) {
        self.record(Entry::Sync { covers });
    }

    pub fn now(&self) -> Content {
        self.0.lock().unwrap().now.clone()
    }

    /// What the file may hold, torn at multiples of `unit`, after power was lost when the journal had `cut` entries.
    pub fn crash(&self, cut: usize, rng: &mut Rng, unit: u64) -> Content {
        let s = self.0.lock().unwrap();
        let mut durable = 0;
        for e in &s.journal[..cut] {
            if let Entry::Sync { covers } = e {
                durable = durable.max(*covers);
            }
        }
        let mut c = s.base.clone();
        for e in &s.journal[..durable] {
            c.apply(e);
        }
        // Sometimes nearly everything survives, sometimes nearly nothing.
        let keep = [2, 20, 50, 80, 98][rng.below(5) as usize];
        let mut tail: Vec<&Entry> = s.journal[durable..cut].iter().collect();
        if rng.below(2) == 0 {
            // Writes reach the disk in any order; only the last to the same sector must win, which neighbours in the
            // journal that do not overlap cannot tell. Swap such neighbours.
            for i in 1..tail.len() {
                if rng.below(2) == 0 && disjoint(tail[i - 1], tail[i]) {
                    tail.swap(i - 1, i);
                }
            }
        }
        for e in tail {
            c.apply_torn(e, rng, keep, unit);
        }
        c
    }
}

fn disjoint(a: &Entry, b: &Entry) -> bool {
    match (a, b) {
        (Entry::Write { offset: x, data: d }, Entry::Write { offset: y, data: e }) => {
            x + d.len() as u64 <= *y || y + e.len() as u64 <= *x
        }
        _ => false,
    }
}

impl Storage for SimFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let s = self.0.lock().unwrap();
        if offset + buf.len() as u64 > s.now.length {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        s.now.read(offset, buf);
        Ok(())
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.record(Entry::Write { offset, data: buf.to_vec() });
        Ok(())
    }
    fn sync(&self) -> io::Result<()> {
        let covers = self.journal_len();
        self.sync_from(covers);
        Ok(())
    }
    fn length(&self) -> io::Result<u64> {
        Ok(self.0.lock().unwrap().now.length)
    }
    fn set_length(&self, length: u64) -> io::Result<()> {
        self.record(Entry::Length(length));
        Ok(())
    }
    fn punch(&self, offset: u64, length: u64) -> io::Result<()> {
        self.record(Entry::Punch { offset, length });
        Ok(())
    }
    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        let s = self.0.lock().unwrap();
        let found = s.now.pages.range(offset / 4096..).next().map(|(n, _)| *n);
        Ok(found.map(|n| ((n * 4096).max(offset), (n + 1) * 4096)))
    }
    fn allocated(&self) -> io::Result<u64> {
        Ok(self.0.lock().unwrap().now.pages.len() as u64 * 4096)
    }
    fn fd(&self) -> Option<RawFd> {
        None
    }
    fn direct_alignment(&self) -> Option<DirectAlignment> {
        None
    }
    fn path(&self) -> &Path {
        Path::new("simulated")
    }
}
