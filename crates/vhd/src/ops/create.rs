//! Making new images.

use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::replace::NewFile;
use crate::error::{Error, Result};
use crate::format::vhd as vhd_fmt;
use crate::image::{self, ChainOptions, DiskType, Facts, Format};
use crate::storage::{Lock, Storage};
use crate::vhd::{self, NewParent, NewVhd};
use crate::vhdx::create::NewVhdx;
use crate::vhdx::locator::ParentLocator;
use crate::vhdx::{self};

/// What a new image shall be. Zero means the format's default.
#[derive(Debug, Clone)]
pub struct CreateOptions {
    /// The format; ISO images cannot be made.
    pub format: Format,
    /// Fixed, dynamic, differencing.
    pub disk_type: DiskType,
    /// Size in bytes; of a differencing image 0 means the parent's.
    pub size: u64,
    /// Block size in bytes.
    pub block_size: u32,
    /// Logical sector size: 512 or 4096.
    pub logical_sector_size: u32,
    /// Physical sector size: 512 or 4096.
    pub physical_sector_size: u32,
    /// The parent of a differencing image.
    pub parent: Option<PathBuf>,
    /// Write absolute paths to the parent only, not a relative one.
    pub absolute_only: bool,
}

impl CreateOptions {
    /// A dynamic VHDX of `size` bytes.
    pub fn dynamic_vhdx(size: u64) -> Self {
        Self {
            format: Format::Vhdx,
            disk_type: DiskType::Dynamic,
            size,
            block_size: 0,
            logical_sector_size: 0,
            physical_sector_size: 0,
            parent: None,
            absolute_only: false,
        }
    }
}

/// Default block sizes of Hyper-V: 32 MiB for dynamic images, 2 MiB for differencing ones.
pub(crate) const DYNAMIC_BLOCK: u32 = 32 << 20;
const DIFFERENCING_BLOCK: u32 = 2 << 20;

/// Makes a new image, which must not exist.
pub fn create(path: &Path, o: &CreateOptions) -> Result<()> {
    if path.exists() {
        return Err(Error::Io {
            path: path.to_path_buf(),
            what: "create",
            source: std::io::ErrorKind::AlreadyExists.into(),
        });
    }
    let parent = match (&o.parent, o.disk_type) {
        (Some(p), DiskType::Differencing) => {
            let options =
                ChainOptions { write: false, direct: false, format: Some(o.format), lock: Lock::Shared, files: None };
            let chain = image::open_chain(p, &options)?;
            Some((p.clone(), chain.images[0].facts.clone()))
        }
        (None, DiskType::Differencing) => {
            return Err(Error::Parameter("a differencing image needs a parent".into()));
        }
        (Some(_), _) => return Err(Error::Parameter("only a differencing image has a parent".into())),
        (None, _) => None,
    };
    let new = NewFile::create(path)?;
    write_structures(&*new.storage, path, o, parent.as_ref().map(|(p, f)| (p.as_path(), f)), Vec::new())?;
    new.commit(false)
}

/// Writes an empty image into an empty file that will be at `path`.
pub(crate) fn write_structures(
    storage: &dyn Storage,
    path: &Path,
    o: &CreateOptions,
    parent: Option<(&Path, &Facts)>,
    extra: Vec<crate::vhdx::metadata::Item>,
) -> Result<()> {
    let or = |v: u32, default: u32| if v == 0 { default } else { v };
    let facts = parent.map(|p| p.1);
    let size = if o.size == 0 { facts.map_or(0, |f| f.size) } else { o.size };
    match o.format {
        Format::Vhdx => vhdx::create::create(
            storage,
            &NewVhdx {
                size,
                block_size: or(o.block_size, if parent.is_some() { DIFFERENCING_BLOCK } else { DYNAMIC_BLOCK }),
                logical_sector: or(o.logical_sector_size, facts.map_or(512, |f| f.logical_sector)),
                physical_sector: or(o.physical_sector_size, facts.map_or(4096, |f| f.physical_sector)),
                fixed: o.disk_type == DiskType::Fixed,
                parent: parent.map(|(p, f)| link_vhdx(path, p, f, o.absolute_only)).transpose()?,
                // A differencing image is the same disk to a guest.
                disk_id: facts.map_or_else(Uuid::new_v4, |f| f.disk_id),
                data_write_guid: Uuid::new_v4(),
                extra,
            },
        ),
        Format::Vhd => {
            if or(o.logical_sector_size, 512) != 512 || or(o.physical_sector_size, 512) != 512 {
                return Err(Error::Parameter("a VHD has sectors of 512 bytes; use VHDX for 4096".into()));
            }
            let parent = parent.map(|(p, f)| link_vhd(path, p, f, o.absolute_only)).transpose()?;
            let kind = match o.disk_type {
                DiskType::Fixed => vhd_fmt::TYPE_FIXED,
                DiskType::Dynamic => vhd_fmt::TYPE_DYNAMIC,
                DiskType::Differencing => vhd_fmt::TYPE_DIFFERENCING,
            };
            let block_size = or(o.block_size, vhd_fmt::DEFAULT_BLOCK_SIZE);
            vhd::create(storage, &NewVhd { size, kind, block_size, id: Uuid::new_v4(), parent })
        }
        Format::Raw => {
            if size == 0 || size % 512 != 0 {
                return Err(Error::Parameter(format!("size {size}: a raw disk takes multiples of 512 bytes")));
            }
            storage.set_length(size).and_then(|()| storage.sync()).map_err(Error::io(storage.path(), "set the length"))
        }
        Format::Iso => Err(Error::Parameter("ISO images are made by other tools".into())),
    }
}

/// The locator by which a child at `child` finds `parent`.
pub(crate) fn link_vhdx(child: &Path, parent: &Path, facts: &Facts, absolute_only: bool) -> Result<ParentLocator> {
    let (relative, absolute) = paths(child, parent)?;
    Ok(ParentLocator::new(facts.link_id, relative.as_deref().filter(|_| !absolute_only), &absolute))
}

pub(crate) fn link_vhd(child: &Path, parent: &Path, facts: &Facts, absolute_only: bool) -> Result<NewParent> {
    use std::os::unix::fs::MetadataExt;
    let (relative, absolute) = paths(child, parent)?;
    let modified = std::fs::metadata(parent).map_err(Error::io(parent, "stat"))?.mtime();
    Ok(NewParent {
        id: facts.link_id,
        time_stamp: u64::try_from(modified).unwrap_or(0).saturating_sub(vhd_fmt::EPOCH_OFFSET) as u32,
        name: parent.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        relative: relative.filter(|_| !absolute_only),
        absolute,
    })
}

/// The parent's path from the child's directory (if they share one) and from the root.
fn paths(child: &Path, parent: &Path) -> Result<(Option<String>, String)> {
    let text = |p: &Path| {
        p.to_str()
            .map(str::to_string)
            .ok_or_else(|| Error::Parameter(format!("{} is not a UTF-8 path; a locator cannot hold it", p.display())))
    };
    let parent = parent.canonicalize().map_err(Error::io(parent, "find"))?;
    let dir = match child.parent() {
        Some(d) if !d.as_os_str().is_empty() => d,
        _ => Path::new("."),
    };
    let dir = dir.canonicalize().map_err(Error::io(dir, "find"))?;
    let (a, b): (Vec<_>, Vec<_>) = (dir.components().collect(), parent.components().collect());
    let common = a.iter().zip(&b).take_while(|(x, y)| x == y).count();
    let mut relative = PathBuf::new();
    for _ in common..a.len() {
        relative.push("..");
    }
    relative.extend(&b[common..]);
    Ok((Some(text(&relative)?), text(&parent)?))
}
