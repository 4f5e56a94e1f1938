//! The file layer: everything that the crate does to a file on the host goes through [`Storage`] (synchronously) or,
//! for requests of an open disk, through a driver that works on the same file's descriptor.
//!
//! Having it as a trait is what makes the power-cut tests possible: they put a recorder in its place.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};

/// A file that holds an image.
///
/// The contract for crash safety: what was written (or punched, or resized) before a `sync` that returned success
/// survives a power cut; of anything later, any subset of 512-byte sectors may survive.
pub trait Storage: Send + Sync {
    /// Fills `buf` from `offset`; fails with `UnexpectedEof` if the file ends before.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;
    /// Writes all of `buf` at `offset`, extending the file if needed.
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()>;
    /// Makes everything before durable, the file's length too.
    fn sync(&self) -> io::Result<()>;
    /// The file's length in bytes.
    fn length(&self) -> io::Result<u64>;
    /// Truncates or extends (with zeros).
    fn set_length(&self, length: u64) -> io::Result<()>;
    /// Makes a range read as zeros and gives its space back if the host can; never changes the length.
    fn punch(&self, offset: u64, length: u64) -> io::Result<()>;
    /// The first range at or after `offset` that may hold data (not a hole): `(start, end)`; `None` if only holes follow.
    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>>;
    /// Bytes that the file takes on the host.
    fn allocated(&self) -> io::Result<u64>;
    /// The descriptor on which a driver does asynchronous I/O, if the file is a real one.
    fn fd(&self) -> Option<RawFd>;
    /// Alignment that direct I/O on [`fd`](Self::fd) needs; `None` if it is buffered.
    fn direct_alignment(&self) -> Option<DirectAlignment>;
    /// Where the file is, for messages.
    fn path(&self) -> &Path;
}

/// What direct I/O demands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DirectAlignment {
    /// Of memory addresses, in bytes.
    pub memory: usize,
    /// Of file offsets and lengths, in bytes.
    pub offset: u64,
}

/// Which lock is taken on an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lock {
    /// Nobody else may have it open: for writing.
    Exclusive,
    /// Others may read it too: parents, sources of a conversion.
    Shared,
    /// Look without asking: only for information about an image in use.
    None,
}

/// A file of the host.
#[derive(Debug)]
pub struct OsFile {
    file: File,
    direct: Option<(File, DirectAlignment)>,
    path: PathBuf,
}

impl OsFile {
    /// Opens an existing file. `direct` asks for direct I/O, which is given only where the host can do it at
    /// `sector` granularity or finer (so that no request ever needs read-modify-write).
    pub fn open(path: &Path, write: bool, direct: Option<u32>, lock: Lock) -> Result<Self> {
        use std::os::unix::fs::FileTypeExt;
        // O_NONBLOCK: a path out of an image may name a FIFO, and opening that must not wait.
        let file = File::options()
            .read(true)
            .write(write)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .map_err(Error::io(path, "open"))?;
        let kind = file.metadata().map_err(Error::io(path, "stat"))?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(Error::Parameter(format!("{} is neither a file nor a block device", path.display())));
        }
        Self::finish(file, path, write, direct, lock)
    }

    /// Takes a file that somebody else has opened at `path`.
    pub fn from_file(file: &File, path: &Path, lock: Lock) -> Result<Self> {
        use std::os::unix::fs::FileTypeExt;
        let file = file.try_clone().map_err(Error::io(path, "take over"))?;
        let kind = file.metadata().map_err(Error::io(path, "stat"))?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(Error::Parameter(format!("{} is neither a file nor a block device", path.display())));
        }
        Self::finish(file, path, false, None, lock)
    }

    /// Creates a new file, which must not exist.
    pub fn create(path: &Path) -> Result<Self> {
        let file =
            File::options().read(true).write(true).create_new(true).open(path).map_err(Error::io(path, "create"))?;
        Self::finish(file, path, true, None, Lock::Exclusive)
    }

    fn finish(file: File, path: &Path, write: bool, direct: Option<u32>, lock: Lock) -> Result<Self> {
        lock_file(&file, path, lock)?;
        let direct = direct.and_then(|sector| open_direct(path, &file, write, sector));
        Ok(Self { file, direct, path: path.to_path_buf() })
    }
}

fn lock_file(file: &File, path: &Path, lock: Lock) -> Result<()> {
    let how = match lock {
        Lock::Exclusive => libc::LOCK_EX,
        Lock::Shared => libc::LOCK_SH,
        Lock::None => return Ok(()),
    };
    let began = Instant::now();
    loop {
        // SAFETY: flock takes no pointers; the descriptor is open for as long as `file` lives.
        if unsafe { libc::flock(file.as_raw_fd(), how | libc::LOCK_NB) } == 0 {
            return Ok(());
        }
        let e = io::Error::last_os_error();
        match e.raw_os_error() {
            Some(libc::EWOULDBLOCK | libc::EINTR) if began.elapsed() < LOCK_PATIENCE => {
                std::thread::sleep(Duration::from_millis(10));
            }
            Some(libc::EWOULDBLOCK) => return Err(Error::InUse { path: path.to_path_buf() }),
            // A file system without locks: the user keeps order himself.
            Some(libc::ENOLCK | libc::EOPNOTSUPP | libc::ENOSYS) => return Ok(()),
            _ => return Err(Error::Io { path: path.to_path_buf(), what: "lock", source: e }),
        }
    }
}

/// How long a lock is waited for: the kernel takes the io_uring of a killed process apart in the background, and its
/// files are closed, and their locks gone, only after that.
const LOCK_PATIENCE: Duration = Duration::from_millis(500);

/// A second descriptor with O_DIRECT on the same file, if the host offers it finely enough.
fn open_direct(path: &Path, file: &File, write: bool, sector: u32) -> Option<(File, DirectAlignment)> {
    use std::os::unix::fs::MetadataExt;
    let direct = File::options().read(true).write(write).custom_flags(libc::O_DIRECT).open(path).ok()?;
    // The path may have been replaced since `file` was opened: both must be the same file.
    let (a, b) = (file.metadata().ok()?, direct.metadata().ok()?);
    if (a.dev(), a.ino()) != (b.dev(), b.ino()) {
        return None;
    }
    // SAFETY: all-zero is a valid `statx`; the kernel fills it.
    let mut stx: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the path is an empty C string (AT_EMPTY_PATH), `stx` is valid for writes.
    let rc = unsafe { libc::statx(direct.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, STATX_DIOALIGN, &mut stx) };
    if rc != 0 || stx.stx_mask & STATX_DIOALIGN == 0 || stx.stx_dio_offset_align == 0 {
        return None;
    }
    let align = DirectAlignment {
        memory: (stx.stx_dio_mem_align as usize).max(1),
        offset: u64::from(stx.stx_dio_offset_align),
    };
    (align.offset <= u64::from(sector)).then_some((direct, align))
}

/// `STATX_DIOALIGN` of Linux 6.1 (include/uapi/linux/stat.h).
const STATX_DIOALIGN: u32 = 0x2000;

impl Storage for OsFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(buf, offset)
    }
    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }
    fn length(&self) -> io::Result<u64> {
        use std::io::{Seek, SeekFrom};
        // A block device has no length in its metadata; seeking works for both, and nothing here uses the position.
        (&self.file).seek(SeekFrom::End(0))
    }
    fn set_length(&self, length: u64) -> io::Result<()> {
        self.file.set_len(length)
    }
    fn punch(&self, offset: u64, length: u64) -> io::Result<()> {
        if length == 0 {
            return Ok(());
        }
        let off = |v: u64| libc::off_t::try_from(v).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG));
        for mode in [libc::FALLOC_FL_PUNCH_HOLE, libc::FALLOC_FL_ZERO_RANGE] {
            // SAFETY: no pointers; the descriptor is open.
            let rc = unsafe {
                libc::fallocate(self.file.as_raw_fd(), mode | libc::FALLOC_FL_KEEP_SIZE, off(offset)?, off(length)?)
            };
            if rc == 0 {
                return Ok(());
            }
            let e = io::Error::last_os_error();
            match e.raw_os_error() {
                Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV | libc::EINVAL) => {}
                _ => return Err(e),
            }
        }
        // The host can do neither: write the zeros, within the present length only.
        let end = (offset + length).min(self.length()?);
        let zeros = vec![0u8; 1 << 20];
        let mut at = offset;
        while at < end {
            let n = (end - at).min(zeros.len() as u64);
            self.file.write_all_at(&zeros[..n as usize], at)?;
            at += n;
        }
        Ok(())
    }
    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        let length = self.length()?;
        if offset >= length {
            return Ok(None);
        }
        let seek = |from: u64, whence| {
            // SAFETY: no pointers; the descriptor is open.
            let r = unsafe { libc::lseek(self.file.as_raw_fd(), from as libc::off_t, whence) };
            if r < 0 { Err(io::Error::last_os_error()) } else { Ok(r as u64) }
        };
        let start = match seek(offset, libc::SEEK_DATA) {
            Ok(s) => s,
            Err(e) if e.raw_os_error() == Some(libc::ENXIO) => return Ok(None),
            // A file system that knows no holes: all of it may be data.
            Err(_) => return Ok(Some((offset, length))),
        };
        let end = seek(start, libc::SEEK_HOLE).unwrap_or(length);
        Ok(Some((start, end.max(start + 1))))
    }
    fn allocated(&self) -> io::Result<u64> {
        use std::os::unix::fs::MetadataExt;
        Ok(self.file.metadata()?.blocks() * 512)
    }
    fn fd(&self) -> Option<RawFd> {
        Some(self.direct.as_ref().map_or(&self.file, |(f, _)| f).as_raw_fd())
    }
    fn direct_alignment(&self) -> Option<DirectAlignment> {
        self.direct.as_ref().map(|(_, a)| *a)
    }
    fn path(&self) -> &Path {
        &self.path
    }
}

/// A file with some 4 KiB pages and zeroed ranges laid over it: how a read-only image with a log is read without
/// touching it.
pub(crate) struct Overlay {
    pub inner: std::sync::Arc<dyn Storage>,
    pub pages: std::collections::BTreeMap<u64, Box<[u8]>>,
    pub length: u64,
}

impl Storage for Overlay {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let end = offset.checked_add(buf.len() as u64).ok_or(io::ErrorKind::UnexpectedEof)?;
        if end > self.length {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let inner = self.inner.length()?;
        let in_file = (inner.max(offset).min(end) - offset) as usize;
        self.inner.read_at(&mut buf[..in_file], offset)?;
        buf[in_file..].fill(0);
        for (&at, page) in self.pages.range(offset.saturating_sub(4095)..end) {
            let (from, to) = (at.max(offset), (at + 4096).min(end));
            if from < to {
                buf[(from - offset) as usize..(to - offset) as usize]
                    .copy_from_slice(&page[(from - at) as usize..(to - at) as usize]);
            }
        }
        Ok(())
    }
    fn write_at(&self, _: &[u8], _: u64) -> io::Result<()> {
        Err(io::ErrorKind::PermissionDenied.into())
    }
    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
    fn length(&self) -> io::Result<u64> {
        Ok(self.length)
    }
    fn set_length(&self, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::PermissionDenied.into())
    }
    fn punch(&self, _: u64, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::PermissionDenied.into())
    }
    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        Ok((offset < self.length).then_some((offset, self.length)))
    }
    fn allocated(&self) -> io::Result<u64> {
        self.inner.allocated()
    }
    fn fd(&self) -> Option<RawFd> {
        self.inner.fd()
    }
    fn direct_alignment(&self) -> Option<DirectAlignment> {
        self.inner.direct_alignment()
    }
    fn path(&self) -> &Path {
        self.inner.path()
    }
}
