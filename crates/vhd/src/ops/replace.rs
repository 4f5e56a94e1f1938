//! A new file that takes its name only when it is complete: whoever looks sees the old file or the new one.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use uuid::Uuid;

use crate::error::{Error, Result};
use crate::storage::{OsFile, Storage};

/// A file under a temporary name beside its final place; removed unless [`NewFile::commit`] is called.
pub(crate) struct NewFile {
    pub storage: Arc<OsFile>,
    temporary: PathBuf,
    target: PathBuf,
    done: bool,
}

impl NewFile {
    pub fn create(target: &Path) -> Result<Self> {
        let name = target
            .file_name()
            .ok_or_else(|| Error::Parameter(format!("{} names no file", target.display())))?
            .to_string_lossy();
        let temporary = target.with_file_name(format!(".{name}.{}.new", Uuid::new_v4().simple()));
        let storage = Arc::new(OsFile::create(&temporary)?);
        Ok(Self { storage, temporary, target: target.to_path_buf(), done: false })
    }

    pub fn path(&self) -> &Path {
        &self.temporary
    }

    /// Makes the file durable and gives it its name. With `replace` false an existing file is left alone.
    pub fn commit(mut self, replace: bool) -> Result<()> {
        self.storage.sync().map_err(Error::io(&self.temporary, "sync"))?;
        if replace {
            std::fs::rename(&self.temporary, &self.target)
                .map_err(Error::io(&self.target, "rename the new file to"))?;
        } else {
            // A hard link, unlike rename, refuses an existing name.
            match std::fs::hard_link(&self.temporary, &self.target) {
                Ok(()) => {
                    let _ = std::fs::remove_file(&self.temporary);
                }
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {
                    return Err(Error::io(&self.target, "create")(e));
                }
                // A file system without hard links.
                Err(_) if !self.target.exists() => std::fs::rename(&self.temporary, &self.target)
                    .map_err(Error::io(&self.target, "rename the new file to"))?,
                Err(e) => return Err(Error::io(&self.target, "create")(e)),
            }
        }
        self.done = true;
        sync_directory(&self.target)
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if !self.done {
            let _ = std::fs::remove_file(&self.temporary);
        }
    }
}

/// Makes a rename durable.
pub(crate) fn sync_directory(file: &Path) -> Result<()> {
    let dir = match file.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    };
    std::fs::File::open(dir).and_then(|d| d.sync_all()).map_err(Error::io(dir, "sync the directory"))
}
