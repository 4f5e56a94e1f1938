//! What can go wrong, in words that say what was expected, what came and what to do.

use std::io;
use std::path::{Path, PathBuf};

/// The structure of an image file that was found to be wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Structure {
    /// VHDX header (MS-VHDX 2.2.2).
    Header,
    /// VHDX region table (MS-VHDX 2.2.3).
    RegionTable,
    /// VHDX log (MS-VHDX 2.3).
    Log,
    /// Block allocation table, of VHDX or VHD.
    Bat,
    /// VHDX metadata region (MS-VHDX 2.6).
    Metadata,
    /// Sector bitmap of a differencing image.
    SectorBitmap,
    /// Parent locator of a differencing image.
    ParentLocator,
    /// VHD footer.
    Footer,
    /// VHD dynamic disk header.
    DynamicHeader,
    /// The file as a whole (its length, its place in a chain).
    File,
}

impl std::fmt::Display for Structure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Header => "header",
            Self::RegionTable => "region table",
            Self::Log => "log",
            Self::Bat => "block allocation table",
            Self::Metadata => "metadata",
            Self::SectorBitmap => "sector bitmap",
            Self::ParentLocator => "parent locator",
            Self::Footer => "footer",
            Self::DynamicHeader => "dynamic disk header",
            Self::File => "file",
        })
    }
}

/// An operation on an image failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host refused an operation on a file.
    #[error("{}: cannot {what}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The operation, as "read the header".
        what: &'static str,
        /// The host's answer.
        source: io::Error,
    },
    /// Somebody else holds the image.
    #[error("{}: the image is in use by another process (a running VM?); stop it or close the image first", path.display())]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// A structure in the file breaks its specification.
    #[error("malformed {structure}: {detail}")]
    Malformed {
        /// Which structure.
        structure: Structure,
        /// Expected and found.
        detail: String,
    },
    /// The file is valid but needs something that is not implemented here.
    #[error("unsupported: {0}")]
    Unsupported(String),
    /// A parameter of the call is out of range.
    #[error("invalid parameter: {0}")]
    Parameter(String),
    /// A parent of a differencing image is missing or is not the one that the child was made from.
    #[error("parent of {}: {detail}", child.display())]
    Parent {
        /// The child image.
        child: PathBuf,
        /// What is wrong with its parent.
        detail: String,
    },
    /// The image must be repaired before it can be used this way.
    #[error("{}: {detail}", path.display())]
    NeedsRepair {
        /// The file.
        path: PathBuf,
        /// What has to be repaired and how.
        detail: String,
    },
    /// The caller's progress function asked to stop.
    #[error("cancelled; the image is as it was before")]
    Cancelled,
    /// A request to an open disk failed.
    #[error(transparent)]
    Request(#[from] RequestError),
}

/// This crate's result.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn malformed(structure: Structure, detail: impl Into<String>) -> Self {
        Self::Malformed { structure, detail: detail.into() }
    }
    pub(crate) fn io(path: &Path, what: &'static str) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io { path, what, source }
    }
}

/// Why a request to an open [`Disk`](crate::Disk) failed. Small and `Copy`: SCSI turns it into sense data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// The host's I/O failed with this `errno`.
    #[error("host I/O error: {}", io::Error::from_raw_os_error(*.0))]
    Io(i32),
    /// No space is left on the host for a new block.
    #[error("the host's file system is full; free some space and retry")]
    NoSpace,
    /// The range is not inside the disk.
    #[error("the range is beyond the end of the disk")]
    OutOfRange,
    /// Offset or length is not a multiple of the logical sector size, or the buffer has another length than the range.
    #[error("offset or length is not a multiple of the sector size, or does not fit the buffer")]
    Misaligned,
    /// The disk is open for reading only.
    #[error("the disk is read-only")]
    ReadOnly,
    /// The image's metadata for this range breaks the specification.
    #[error("the image's metadata for this range is malformed; run `viridian vhd check`")]
    Malformed,
    /// An earlier metadata write failed, so that the image no longer takes writes.
    #[error("writes are refused because an earlier metadata write failed; close and check the image")]
    Failed,
    /// The disk is being closed.
    #[error("the disk is closed")]
    Closed,
}

impl RequestError {
    pub(crate) fn from_io(e: &io::Error) -> Self {
        match e.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => Self::NoSpace,
            Some(n) => Self::Io(n),
            None => Self::Io(libc::EIO),
        }
    }
}
