//! A stream of equal requests, timed: what `qemu-img bench` does, with the same options, so that the two can be paired.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::buffer::IoBuffer;
use crate::disk::{Disk, Io, OpenOptions};
use crate::error::{Error, Result};
use crate::image::Format;
use crate::state::{Callback, RequestKind};

/// What to measure.
#[derive(Debug, Clone)]
pub struct BenchOptions {
    /// The image's format; without it, the name decides.
    pub format: Option<Format>,
    /// Requests in all.
    pub count: u64,
    /// Requests at a time.
    pub depth: usize,
    /// Bytes in a request.
    pub size: u64,
    /// Bytes from one request's start to the next one's; it wraps around at the disk's end. 0 means the size.
    pub step: u64,
    /// Offset of the first request.
    pub offset: u64,
    /// Write, with the bytes that `qemu-img bench` writes.
    pub write: bool,
    /// Go around the page cache.
    pub direct: bool,
    /// The way of I/O: [`Io::Inline`] is `qemu-img`'s way, one thread that does everything.
    pub io: Io,
}

/// Runs the stream and returns how long it took, from the first request to the last completion.
pub fn bench(path: &Path, o: &BenchOptions) -> Result<Duration> {
    let open = OpenOptions { write: o.write, direct: o.direct, format: o.format, io: o.io, ..OpenOptions::default() };
    let disk = Disk::open(path, &open)?;
    let step = if o.step == 0 { o.size } else { o.step };
    if o.size == 0 || o.size > disk.size() || o.depth == 0 || o.depth > 4096 || o.count == 0 {
        return Err(Error::Parameter("size, depth or count does not fit the image".into()));
    }
    if o.direct && !disk.info().direct {
        return Err(Error::Unsupported("the host's file system offers no direct I/O for this image".into()));
    }
    let kind = if o.write { RequestKind::Write { fua: false } } else { RequestKind::Read };
    let finished: Arc<Mutex<Vec<_>>> = Arc::default();
    let (tell, told) = std::sync::mpsc::channel();
    let started = Instant::now();
    let mut free: Vec<IoBuffer> = (0..o.depth).map(|_| filled(o.size as usize)).collect();
    let (mut at, mut sent, mut ended) = (o.offset, 0, 0);
    while ended < o.count {
        let batch: Vec<_> = free
            .drain(..)
            .take((o.count - sent) as usize)
            .map(|b| {
                if at > disk.size() - o.size {
                    at %= disk.size() - o.size;
                    at = at / 512 * 512;
                }
                let offset = at;
                at += step;
                let (finished, tell) = (finished.clone(), tell.clone());
                let done: Callback = if o.io == Io::Inline {
                    Box::new(move |c| finished.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(c))
                } else {
                    Box::new(move |c| drop(tell.send(c)))
                };
                (kind, offset, o.size, Some(b), done)
            })
            .collect();
        sent += batch.len() as u64;
        disk.submit_all(batch);
        if o.io == Io::Inline {
            disk.drive(true);
            finished_into(&finished, &mut free, &mut ended)?;
        } else {
            let first = told.recv().map_err(|_| Error::Request(crate::RequestError::Closed))?;
            for c in std::iter::once(first).chain(told.try_iter()) {
                c.result?;
                ended += 1;
                free.extend(c.buffer);
            }
        }
    }
    let took = started.elapsed();
    disk.close()?;
    Ok(took)
}

fn finished_into(
    finished: &Mutex<Vec<crate::Completion>>,
    free: &mut Vec<IoBuffer>,
    ended: &mut u64,
) -> std::result::Result<(), crate::RequestError> {
    for c in finished.lock().unwrap_or_else(std::sync::PoisonError::into_inner).drain(..) {
        c.result?;
        *ended += 1;
        free.extend(c.buffer);
    }
    Ok(())
}

fn filled(len: usize) -> IoBuffer {
    let mut b = IoBuffer::aligned(len);
    if let Some(s) = b.as_mut_slice() {
        s.fill(0xa5);
    }
    b
}
