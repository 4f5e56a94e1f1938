//! Files that are whole at any moment, and locks.

use crate::error::{Error, Result};
use rustix::fs::{FlockOperation, flock};
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How long a command waits for another one.
const LOCK_TIME: Duration = Duration::from_secs(10);

/// Replaces a file: at any moment it is the old one or the new one, whole. `durable` waits until it survives a power cut.
pub fn write(path: &Path, bytes: &[u8], durable: bool) -> Result<()> {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let partial = path.with_file_name(format!(".{name}.{}.{number}.tmp", std::process::id()));
    let io = |source| Error::Io { path: path.into(), what: "write the file", source };
    let written = File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&partial)
        .and_then(|mut file| {
            file.write_all(bytes)?;
            if durable { file.sync_all() } else { Ok(()) }
        })
        .and_then(|()| std::fs::rename(&partial, path));
    if written.is_err() {
        let _ = std::fs::remove_file(&partial);
    }
    written.map_err(io)?;
    if durable { sync_folder(path.parent().unwrap_or(Path::new("."))) } else { Ok(()) }
}

/// Makes new names in a folder survive a power cut.
pub fn sync_folder(folder: &Path) -> Result<()> {
    File::open(folder).and_then(|f| f.sync_all()).map_err(Error::io(folder, "sync the folder"))
}

/// A lock on a file, until it is dropped. The kernel gives it back when its holder dies.
#[derive(Debug)]
pub struct Lock {
    file: File,
}

impl Lock {
    /// The locked file: a process that inherits it holds the lock too.
    pub fn into_file(self) -> File {
        self.file
    }
}

fn open(path: &Path) -> Result<File> {
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    options.open(path).map_err(Error::io(path, "open the lock"))
}

/// Takes a lock; waits for another command, which holds it for a moment only. `whose` is said when it takes too long.
pub fn lock(path: &Path, whose: &str) -> Result<Lock> {
    let until = Instant::now() + LOCK_TIME;
    loop {
        if let Some(lock) = try_lock(path)? {
            return Ok(lock);
        }
        if Instant::now() >= until {
            return Err(Error::Busy(whose.into()));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Takes a lock if nobody holds it.
pub fn try_lock(path: &Path) -> Result<Option<Lock>> {
    let file = open(path)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(Lock { file })),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(e) => Err(Error::Io { path: path.into(), what: "lock the file", source: e.into() }),
    }
}

/// Does anybody hold the lock? Changes nothing: a file that cannot be opened is not held.
pub fn is_held(path: &Path) -> bool {
    let Ok(file) = File::open(path) else { return false };
    // A shared lock hinders nobody who only looks.
    matches!(flock(&file, FlockOperation::NonBlockingLockShared), Err(rustix::io::Errno::WOULDBLOCK))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locks() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        assert!(!is_held(&path));
        let lock = lock(&path, "x").unwrap();
        assert!(is_held(&path) && try_lock(&path).unwrap().is_none());
        drop(lock);
        assert!(!is_held(&path) && try_lock(&path).unwrap().is_some());
    }

    #[test]
    fn a_write_that_fails_leaves_the_old_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        write(&path, b"old", true).unwrap();
        // A folder in the way: the rename fails.
        let blocked = dir.path().join("d");
        std::fs::create_dir_all(blocked.join("x")).unwrap();
        assert!(write(&blocked, b"new", true).is_err());
        write(&path, b"new", true).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2, "nothing partial stays");
    }
}
