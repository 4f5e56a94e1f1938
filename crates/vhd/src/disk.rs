//! An open disk.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, RwLock, mpsc};
use std::thread::JoinHandle;

use uuid::Uuid;

use crate::buffer::IoBuffer;
use crate::driver::threads::Threads;
use crate::driver::uring::Uring;
use crate::driver::{Driver, Shared, threads, uring};
use crate::error::{Error, RequestError, Result};
use crate::image::{self, ChainOptions, DiskType, Facts, Format, Image, open_chain};
use crate::qos::{Gate, Qos};
use crate::state::{Callback, Completion, Core, Extent, RequestKind};
use crate::storage::{Lock, Storage};

/// Which way requests reach the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Io {
    /// io_uring, or threads where it is refused. `VIRIDIAN_VHD_IO=uring` or `=threads` in the environment decides it.
    #[default]
    Auto,
    /// io_uring or an error.
    Uring,
    /// A pool of threads.
    Threads,
    /// io_uring without a thread of its own: only the thread that opened the disk may use it, and must call
    /// [`Disk::drive`] for anything to complete. For benchmarks and bulk work.
    Inline,
    /// The calling thread does the I/O itself and [`Disk::submit`] returns when it is done. For work in bulk by
    /// several threads.
    Blocking,
}

/// How to open a disk.
#[derive(Debug, Clone, Default)]
pub struct OpenOptions {
    /// Open for writing.
    pub write: bool,
    /// Go around the host's page cache where the host can do it for every request.
    pub direct: bool,
    /// The format; without it, the file's name decides.
    pub format: Option<Format>,
    /// The way of I/O.
    pub io: Io,
    /// The lock; without it, exclusive for writing and shared for reading.
    pub lock: Option<Lock>,
    /// Files that somebody else has opened, by the path that the chain knows them by: they are taken instead of being
    /// opened, by a process that may not open them itself.
    pub files: Option<Arc<Vec<(PathBuf, std::fs::File)>>>,
}

/// What an open disk is.
#[derive(Debug, Clone)]
pub struct DiskInfo {
    /// The image.
    pub path: PathBuf,
    /// Its parents, the nearest first.
    pub parents: Vec<PathBuf>,
    /// Its format.
    pub format: Format,
    /// Fixed, dynamic or differencing.
    pub disk_type: DiskType,
    /// Bytes in a logical sector: the unit of requests.
    pub logical_sector_size: u32,
    /// Bytes in a physical sector.
    pub physical_sector_size: u32,
    /// Bytes in a block of the image; 0 if it has none.
    pub block_size: u32,
    /// The disk's identity (SCSI page 83).
    pub disk_id: Uuid,
    /// Open for reading only.
    pub read_only: bool,
    /// Unmapping may give space back.
    pub can_unmap: bool,
    /// Unmapped ranges read as zeros.
    pub unmap_zeroes: bool,
    /// The image went around the page cache.
    pub direct: bool,
    /// Which way of I/O is in use.
    pub io: Io,
}

/// A virtual disk. Requests may be submitted from any thread; dropping it flushes and closes the image.
pub struct Disk {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    info: DiskInfo,
    pub(crate) facts: Facts,
    size: AtomicU64,
    closed: bool,
    gate: RwLock<Option<Arc<Gate>>>,
}

impl Disk {
    /// Opens an image and its parents.
    pub fn open(path: &Path, options: &OpenOptions) -> Result<Self> {
        let write = options.write && options.format.or_else(|| Format::from_name(path)) != Some(Format::Iso);
        let lock = options.lock.unwrap_or(if write { Lock::Exclusive } else { Lock::Shared });
        let files = options.files.clone();
        let chain_options = ChainOptions { write, direct: options.direct, format: options.format, lock, files };
        let chain = open_chain(path, &chain_options)?;
        Self::from_images(chain.images, chain.paths, options.io)
    }

    pub(crate) fn from_images(images: Vec<Image>, paths: Vec<PathBuf>, io: Io) -> Result<Self> {
        let mut layers = Vec::new();
        let (mut writer, mut facts) = (None, None);
        for i in images {
            layers.push(i.layer);
            writer.get_or_insert(i.writer);
            facts.get_or_insert(i.facts);
        }
        let (Some(writer), Some(facts)) = (writer, facts) else {
            return Err(Error::Parameter("a disk needs an image".into()));
        };
        let files: Vec<_> = layers.iter().map(|l| l.storage.clone()).collect();
        let (driver, io) = make_driver(files, io)?;
        let read_only = matches!(writer, crate::state::writer::Writer::None);
        let growing = facts.disk_type != DiskType::Fixed;
        let info = DiskInfo {
            path: paths.first().cloned().unwrap_or_default(),
            parents: paths.get(1..).unwrap_or_default().to_vec(),
            format: facts.format,
            disk_type: facts.disk_type,
            logical_sector_size: facts.logical_sector,
            physical_sector_size: facts.physical_sector,
            block_size: facts.block_size,
            disk_id: facts.disk_id,
            read_only,
            can_unmap: !read_only && (growing || facts.format == Format::Raw),
            unmap_zeroes: facts.disk_type == DiskType::Dynamic || facts.format == Format::Raw,
            direct: layers[0].direct.is_some(),
            io,
        };
        let size = AtomicU64::new(facts.size);
        let shared = Arc::new(Shared::new(Core::new(layers, writer, facts.logical_sector), driver));
        let threads = match (shared.driver(), io) {
            (_, Io::Inline) | (Driver::Blocking(_), _) => Ok(Vec::new()),
            (Driver::Uring(_), _) => uring::start(shared.clone()).map(|t| vec![t]),
            (Driver::Threads(_), _) => threads::start(&shared),
        }
        .map_err(Error::io(&info.path, "start an I/O thread"))?;
        Ok(Self { shared, threads, info, facts, size, closed: false, gate: RwLock::new(None) })
    }

    /// What the disk is.
    pub fn info(&self) -> &DiskInfo {
        &self.info
    }

    /// The disk's size in bytes; resizing changes it.
    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// Submits a request. `buffer` is needed for reads and writes and has exactly `len` bytes; offset and length are
    /// multiples of the logical sector. `done` is called exactly once, perhaps before this returns.
    pub fn submit(&self, kind: RequestKind, offset: u64, len: u64, buffer: Option<IoBuffer>, done: Callback) {
        self.submit_all(std::iter::once((kind, offset, len, buffer, done)));
    }

    fn gate(&self) -> Option<Arc<Gate>> {
        self.gate.read().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }

    /// Sets limits; those before no longer count. Not for [`Io::Inline`] and [`Io::Blocking`], whose callers drive the
    /// disk themselves.
    pub fn set_qos(&self, limits: Qos) -> Result<()> {
        if matches!(self.info.io, Io::Inline | Io::Blocking) {
            return Err(Error::Parameter("a disk that its caller drives has no limits".into()));
        }
        let new = if limits.maximum.is_some() || limits.minimum.is_some() {
            Some(Gate::start(&self.shared, limits)?)
        } else {
            None
        };
        let old = std::mem::replace(&mut *self.gate.write().unwrap_or_else(std::sync::PoisonError::into_inner), new);
        if let Some(g) = old {
            g.stop(&self.shared);
        }
        Ok(())
    }

    /// Submits several requests at once, with one call to the host.
    pub fn submit_all(&self, requests: impl IntoIterator<Item = (RequestKind, u64, u64, Option<IoBuffer>, Callback)>) {
        let gate = self.gate();
        let mut core = self.shared.lock();
        for request in requests {
            let admitted = match &gate {
                Some(g) => g.admit(request),
                None => Some(request),
            };
            if let Some((kind, offset, len, buffer, done)) = admitted {
                core.submit(kind, offset, len, buffer, done);
            }
        }
        self.shared.pump(core);
    }

    /// [`Io::Inline`]: carries things on; with `wait`, until at least one host operation has ended.
    pub fn drive(&self, wait: bool) {
        if let Driver::Uring(u) = self.shared.driver()
            && self.info.io == Io::Inline
        {
            u.reap(&self.shared, wait);
        }
    }

    pub(crate) fn call(&self, kind: RequestKind, offset: u64, len: u64, buffer: Option<IoBuffer>) -> Completion {
        let (tx, rx) = mpsc::sync_channel(1);
        let tell: Callback = Box::new(move |c| {
            let _ = tx.send(c);
        });
        self.submit(kind, offset, len, buffer, tell);
        if self.info.io == Io::Inline {
            loop {
                match rx.try_recv() {
                    Ok(c) => return c,
                    Err(_) => self.drive(true),
                }
            }
        }
        rx.recv().unwrap_or(Completion { result: Err(RequestError::Closed), buffer: None })
    }

    /// Reads and waits.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> std::result::Result<(), RequestError> {
        let c = self.call(RequestKind::Read, offset, buf.len() as u64, Some(IoBuffer::aligned(buf.len())));
        c.result?;
        if let Some(b) = c.buffer {
            b.read(0, buf);
        }
        Ok(())
    }

    /// Writes and waits.
    pub fn write_at(&self, offset: u64, data: &[u8]) -> std::result::Result<(), RequestError> {
        let mut b = IoBuffer::aligned(data.len());
        b.write(0, data);
        self.call(RequestKind::Write { fua: false }, offset, data.len() as u64, Some(b)).result
    }

    /// Makes everything written durable and waits.
    pub fn flush(&self) -> std::result::Result<(), RequestError> {
        self.call(RequestKind::Flush, 0, 0, None).result
    }

    /// Unmaps and waits.
    pub fn unmap(&self, offset: u64, len: u64) -> std::result::Result<(), RequestError> {
        self.call(RequestKind::Unmap, offset, len, None).result
    }

    /// Writes zeros and waits.
    pub fn write_zeroes(&self, offset: u64, len: u64) -> std::result::Result<(), RequestError> {
        self.call(RequestKind::WriteZeroes, offset, len, None).result
    }

    /// What is at a disk offset, and for how many bytes.
    pub(crate) fn extent(&self, pos: u64) -> std::result::Result<(Extent, u64), RequestError> {
        self.shared.lock().extent(pos)
    }

    /// Stops the disk for a moment, with everything durable and the image closed, and lets `change` work on its file;
    /// opens the image again afterwards, whether `change` succeeded or not. Requests wait meanwhile.
    pub(crate) fn with_closed_image(&self, change: impl FnOnce(Arc<dyn Storage>) -> Result<()>) -> Result<()> {
        if self.info.read_only {
            return Err(RequestError::ReadOnly.into());
        }
        self.shared.lock().held = true;
        let result = self.change_closed(change);
        let mut core = self.shared.lock();
        self.size.store(core.size(), Ordering::Release);
        core.release();
        self.shared.pump(core);
        result
    }

    fn change_closed(&self, change: impl FnOnce(Arc<dyn Storage>) -> Result<()>) -> Result<()> {
        drop(self.wait_idle());
        let (tx, rx) = mpsc::sync_channel(1);
        let mut core = self.shared.lock();
        core.flush_held(Box::new(move |c| {
            let _ = tx.send(c.result);
        }));
        self.shared.pump(core);
        drop(self.wait_idle());
        rx.recv().unwrap_or(Err(RequestError::Closed))?;
        let mut core = self.wait_idle();
        let storage = core.layers[0].storage.clone();
        if core.failed {
            return Err(RequestError::Failed.into());
        }
        core.writer.close(&*storage, false)?;
        let changed = change(storage.clone());
        match image::open(storage, self.info.format, true) {
            Ok(i) => {
                core.layers[0] = i.layer;
                core.writer = i.writer;
            }
            Err(e) => {
                core.failed = true;
                return Err(e);
            }
        }
        changed
    }

    fn wait_idle(&self) -> std::sync::MutexGuard<'_, Core> {
        if let (Driver::Uring(u), Io::Inline) = (self.shared.driver(), self.info.io) {
            while !self.shared.lock().is_idle() {
                u.reap(&self.shared, true);
            }
        }
        self.shared.wait_idle()
    }

    /// Flushes, closes the image tidily and says how that went.
    pub fn close(mut self) -> Result<()> {
        self.shut()
    }

    fn shut(&mut self) -> Result<()> {
        let threads = std::mem::take(&mut self.threads);
        if std::mem::replace(&mut self.closed, true) {
            return Ok(());
        }
        let (shared, inline) = (self.shared.clone(), self.info.io == Io::Inline);
        if let Some(g) = self.gate.write().unwrap_or_else(std::sync::PoisonError::into_inner).take() {
            g.stop(&shared);
        }
        let read_only = self.info.read_only;
        let me = std::thread::current().id();
        if threads.iter().any(|t| t.thread().id() == me) {
            // The last owner was a completion on our own I/O thread, which must live on for the disk to be closed.
            let path = self.info.path.clone();
            let close = move || {
                if let Err(e) = shut(&shared, threads, inline, read_only) {
                    tracing::error!(error = %e, image = %path.display(), "closing a disk failed");
                }
            };
            return std::thread::Builder::new()
                .name("vhd-close".into())
                .spawn(close)
                .map(|_| ())
                .map_err(Error::io(&self.info.path, "start a thread to close"));
        }
        shut(&shared, threads, inline, read_only)
    }
}

fn shut(shared: &Arc<Shared>, threads: Vec<JoinHandle<()>>, inline: bool, read_only: bool) -> Result<()> {
    let (tx, rx) = mpsc::sync_channel(1);
    let tell: Callback = Box::new(move |c| {
        let _ = tx.send(c.result);
    });
    let mut core = shared.lock();
    core.submit(RequestKind::Flush, 0, 0, None, tell);
    shared.pump(core);
    let inline_ring = match shared.driver() {
        Driver::Uring(u) if inline => Some(u),
        _ => None,
    };
    if let Some(u) = inline_ring {
        while !shared.lock().is_idle() {
            u.reap(shared, true);
        }
    }
    let flushed = rx.recv().unwrap_or(Err(RequestError::Closed));
    let mut core = shared.wait_idle();
    let Core { writer, layers, failed, .. } = &mut *core;
    let closed = writer.close(&*layers[0].storage, *failed || flushed.is_err());
    drop(core);
    match shared.driver() {
        Driver::Uring(_) if inline => {}
        Driver::Uring(u) => u.stop(shared),
        Driver::Threads(t) => t.stop(),
        Driver::Blocking(_) => {}
    }
    for t in threads {
        let _ = t.join();
    }
    if !read_only {
        flushed?;
    }
    closed
}

impl Drop for Disk {
    fn drop(&mut self) {
        if let Err(e) = self.shut() {
            tracing::error!(error = %e, image = %self.info.path.display(), "closing a disk failed");
        }
    }
}

fn make_driver(files: crate::driver::Files, io: Io) -> Result<(Driver, Io)> {
    let path = files.first().map(|f| f.path().to_path_buf()).unwrap_or_default();
    let wanted = match (io, std::env::var("VIRIDIAN_VHD_IO").as_deref()) {
        (Io::Auto, Ok("threads")) => Io::Threads,
        (Io::Auto, Ok("uring")) => Io::Uring,
        (io, _) => io,
    };
    if wanted == Io::Blocking {
        return Ok((Driver::Blocking(files), wanted));
    }
    if wanted == Io::Threads {
        return Ok((Driver::Threads(Threads::new(files)), Io::Threads));
    }
    match Uring::new(files.clone(), wanted == Io::Inline) {
        Ok(u) => Ok((Driver::Uring(Box::new(u)), if wanted == Io::Inline { Io::Inline } else { Io::Uring })),
        Err(e) if wanted == Io::Auto => {
            tracing::info!(error = %e, "io_uring is not available; disks use threads");
            Ok((Driver::Threads(Threads::new(files)), Io::Threads))
        }
        Err(e) => Err(Error::io(&path, "set up io_uring for")(e)),
    }
}
