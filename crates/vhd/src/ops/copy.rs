//! Copying a disk's content into another, with several threads, leaving out what is zero.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use super::Progress;
use crate::buffer::IoBuffer;
use crate::disk::Disk;
use crate::error::{Error, RequestError, Result};
use crate::state::{Extent, RequestKind};

/// What is copied at once. Small enough to stay in a processor's cache between reading and writing.
const CHUNK: u64 = 256 << 10;
/// Zeros are looked for in this unit.
const GRAIN: usize = 4096;
/// More threads than this only wait for each other.
const MAX_THREADS: usize = 8;

/// Which part of the source's content is copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum What {
    /// The disk: zeros need not be written, because the target is new and empty.
    Content,
    /// What one image of a chain holds: its zeros hide something in a parent and are written as zeros.
    Layer,
}

struct Cursor<'a> {
    source: &'a Disk,
    next: Mutex<u64>,
    end: u64,
    done: AtomicU64,
    stop: AtomicBool,
}

enum Piece {
    Data(u64, u64),
    Zero(u64, u64),
}

impl Cursor<'_> {
    /// The next piece that has to be looked at.
    fn take(&self, what: What) -> std::result::Result<Option<Piece>, RequestError> {
        let mut next = self.next.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        while *next < self.end && !self.stop.load(Ordering::Relaxed) {
            let (extent, n) = self.source.extent(*next)?;
            let n = n.min(self.end - *next);
            let at = *next;
            match extent {
                Extent::Data => {
                    // Pieces end at multiples, so that the target's blocks are written in order.
                    let n = n.min(CHUNK - at % CHUNK);
                    *next += n;
                    return Ok(Some(Piece::Data(at, n)));
                }
                Extent::Zero if what == What::Layer => {
                    *next += n;
                    return Ok(Some(Piece::Zero(at, n)));
                }
                Extent::Zero | Extent::Absent => {
                    *next += n;
                    self.done.fetch_add(n, Ordering::Relaxed);
                }
            }
        }
        Ok(None)
    }
}

/// Copies `0..end` of `source`, which is no larger than `target`. Both should be open with [`Io::Blocking`](crate::Io).
pub(crate) fn copy(source: &Disk, target: &Disk, end: u64, what: What, progress: Progress<'_>) -> Result<()> {
    let cursor = Cursor { source, next: Mutex::new(0), end, done: AtomicU64::new(0), stop: AtomicBool::new(false) };
    let threads = std::thread::available_parallelism().map_or(2, usize::from).clamp(1, MAX_THREADS);
    let running = AtomicU64::new(threads as u64);
    let failure: Mutex<Option<RequestError>> = Mutex::new(None);
    let cancelled = std::thread::scope(|s| {
        for _ in 0..threads {
            s.spawn(|| {
                if let Err(e) = work(&cursor, target, what) {
                    failure.lock().unwrap_or_else(std::sync::PoisonError::into_inner).get_or_insert(e);
                    cursor.stop.store(true, Ordering::Relaxed);
                }
                running.fetch_sub(1, Ordering::Release);
            });
        }
        let mut cancelled = false;
        let mut pause = 1;
        while running.load(Ordering::Acquire) > 0 {
            std::thread::sleep(Duration::from_millis(pause));
            pause = (pause * 2).min(50);
            if !cancelled && !progress(cursor.done.load(Ordering::Relaxed).min(end), end) {
                cancelled = true;
                cursor.stop.store(true, Ordering::Relaxed);
            }
        }
        cancelled
    });
    if let Some(e) = failure.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner) {
        return Err(e.into());
    }
    // A small copy may be over before it was asked the first time.
    if cancelled || !progress(end, end) {
        return Err(Error::Cancelled);
    }
    Ok(())
}

fn work(cursor: &Cursor<'_>, target: &Disk, what: What) -> std::result::Result<(), RequestError> {
    let mut buffer = Some(IoBuffer::aligned(CHUNK as usize));
    while let Some(piece) = cursor.take(what)? {
        let n = match piece {
            Piece::Zero(at, n) => {
                target.call(RequestKind::WriteZeroes, at, n, None).result?;
                n
            }
            Piece::Data(at, n) => {
                let mut b = buffer.take().unwrap_or_else(|| IoBuffer::aligned(CHUNK as usize));
                b.set_len(n as usize);
                let c = cursor.source.call(RequestKind::Read, at, n, Some(b));
                c.result?;
                let b = c.buffer.ok_or(RequestError::Closed)?;
                buffer = Some(write_data(target, at, n, b, what)?);
                n
            }
        };
        cursor.done.fetch_add(n, Ordering::Relaxed);
    }
    Ok(())
}

/// Writes the parts of a chunk that are not zero.
fn write_data(
    target: &Disk,
    at: u64,
    n: u64,
    buffer: IoBuffer,
    what: What,
) -> std::result::Result<IoBuffer, RequestError> {
    let data = &buffer.as_slice().ok_or(RequestError::Closed)?[..n as usize];
    let runs = runs(data);
    if let [(_, _, false)] = runs[..] {
        let c = target.call(RequestKind::Write { fua: false }, at, n, Some(buffer));
        c.result?;
        return c.buffer.ok_or(RequestError::Closed);
    }
    for (from, len, zero) in runs {
        let offset = at + from as u64;
        if !zero {
            let part = IoBuffer::from_vec(data[from..from + len].to_vec());
            target.call(RequestKind::Write { fua: false }, offset, len as u64, Some(part)).result?;
        } else if what == What::Layer {
            target.call(RequestKind::WriteZeroes, offset, len as u64, None).result?;
        }
    }
    Ok(buffer)
}

/// Splits data into runs of (start, length, all zero), in grains.
fn runs(data: &[u8]) -> Vec<(usize, usize, bool)> {
    let mut out: Vec<(usize, usize, bool)> = Vec::new();
    for (i, grain) in data.chunks(GRAIN).enumerate() {
        let zero = is_zero(grain);
        match out.last_mut() {
            Some((_, len, z)) if *z == zero => *len += grain.len(),
            _ => out.push((i * GRAIN, grain.len(), zero)),
        }
    }
    out
}

fn is_zero(b: &[u8]) -> bool {
    // Most data shows itself in its first bytes; whole words are compared by what the compiler makes of this.
    if b.iter().take(16).any(|&x| x != 0) {
        return false;
    }
    let (words, rest) = b.as_chunks::<64>();
    words.iter().all(|w| w.iter().fold(0, |a, &x| a | x) == 0) && rest.iter().all(|&x| x == 0)
}

#[cfg(test)]
mod tests {
    use super::runs;

    #[test]
    fn zeros_are_found_in_grains() {
        let mut d = vec![0; 20480];
        d[4096] = 1;
        d[8191] = 1;
        d[20479] = 9;
        assert_eq!(runs(&d), [(0, 4096, true), (4096, 4096, false), (8192, 8192, true), (16384, 4096, false)]);
        assert_eq!(runs(&d[..512]), [(0, 512, true)]);
    }
}
