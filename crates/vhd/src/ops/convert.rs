//! Converting, compacting and moving: operations that write a new file and give it its name when it is complete.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::Progress;
use super::copy::{What, copy};
use super::create::{self, CreateOptions, write_structures};
use super::replace::NewFile;
use crate::disk::{Disk, Io, OpenOptions};
use crate::error::{Error, Result};
use crate::image::{self, ChainOptions, DiskType, Facts, Format, ParentLink};
use crate::storage::{Lock, OsFile, Storage};
use crate::vhdx::header::HeaderState;

/// Converts an image (with its parents, if it has any) into a new one. The options' size of 0 means the source's; a
/// larger one grows the disk. User metadata is kept from VHDX to VHDX.
pub fn convert(
    source: &Path,
    source_format: Option<Format>,
    target: &Path,
    options: &CreateOptions,
    progress: Progress<'_>,
) -> Result<()> {
    if options.disk_type == DiskType::Differencing {
        return Err(Error::Parameter("a conversion makes an image without a parent".into()));
    }
    if target.exists() {
        let source = std::io::ErrorKind::AlreadyExists.into();
        return Err(Error::Io { path: target.to_path_buf(), what: "create", source });
    }
    let open = OpenOptions { format: source_format, io: Io::Blocking, ..OpenOptions::default() };
    let source = Disk::open(source, &open)?;
    let facts = source.facts.clone();
    let mut o = options.clone();
    if o.size == 0 {
        o.size = source.size();
    }
    if o.size < source.size() {
        return Err(Error::Parameter(format!(
            "{} bytes are less than the source's {}; shrink the source first",
            o.size,
            source.size()
        )));
    }
    if o.logical_sector_size == 0 {
        // An ISO's 2048 exists nowhere else.
        o.logical_sector_size = if facts.logical_sector == 4096 { 4096 } else { 512 };
    }
    if o.format == Format::Vhd && facts.logical_sector == 4096 {
        return Err(Error::Parameter("a VHD has sectors of 512 bytes, the source has 4096; use VHDX".into()));
    }
    let new = NewFile::create(target)?;
    write_structures(&*new.storage, target, &o, None, facts.extra)?;
    let out = disk_over(new.storage.clone(), o.format)?;
    copy(&source, &out, source.size(), What::Content, progress)?;
    out.close()?;
    new.commit(false)
}

/// A disk over one file, without its parents.
fn disk_over(storage: Arc<dyn Storage>, format: Format) -> Result<Disk> {
    let path = storage.path().to_path_buf();
    Disk::from_images(vec![image::open(storage, format, true)?], vec![path], Io::Blocking)
}

/// What changes when an image is written anew.
#[derive(Debug, Clone, Default)]
pub(crate) struct Rebuild {
    /// A new size.
    pub size: Option<u64>,
    /// A new parent.
    pub parent: Option<PathBuf>,
}

/// Writes an image anew without what it does not need. Its identity stays, so that children go on.
pub fn compact(path: &Path, format: Option<Format>, progress: Progress<'_>) -> Result<()> {
    rebuild(path, format, &Rebuild::default(), progress)
}

pub(crate) fn rebuild(path: &Path, format: Option<Format>, change: &Rebuild, progress: Progress<'_>) -> Result<()> {
    // The lock keeps everybody out until the new file has the name.
    let storage: Arc<dyn Storage> = Arc::new(OsFile::open(path, true, None, Lock::Exclusive)?);
    let format = match format {
        Some(f) => f,
        None => Format::detect(path, &*storage)?,
    };
    // For writing, so that a log is replayed.
    let old = Disk::from_images(vec![image::open(storage, format, true)?], vec![path.to_path_buf()], Io::Blocking)?;
    let facts = old.facts.clone();
    if facts.disk_type == DiskType::Fixed && change.size.is_none() {
        return Err(Error::Parameter("a fixed image has nothing to give back; convert it to a dynamic one".into()));
    }
    let new = NewFile::create(path)?;
    let size = change.size.unwrap_or(old.size());
    let o = CreateOptions {
        format,
        disk_type: facts.disk_type,
        size,
        block_size: facts.block_size,
        logical_sector_size: facts.logical_sector,
        physical_sector_size: facts.physical_sector,
        parent: None,
        absolute_only: false,
    };
    match (&facts.link, &change.parent) {
        (None, Some(_)) => return Err(Error::Parameter("the image has no parent that could be another".into())),
        (Some(_), Some(p)) => {
            let chain = image::open_chain(
                p,
                &ChainOptions { write: false, direct: false, format: Some(format), lock: Lock::Shared, files: None },
            )?;
            let parent = &chain.images[0].facts;
            write_structures(&*new.storage, path, &o, Some((p, parent)), facts.extra.clone())?;
        }
        (Some(link), None) => write_linked(&*new.storage, &o, &facts, link)?,
        (None, None) => write_structures(&*new.storage, path, &o, None, facts.extra.clone())?,
    }
    let what = if facts.link.is_some() { What::Layer } else { What::Content };
    let out = disk_over(new.storage.clone(), format)?;
    copy(&old, &out, size.min(old.size()), what, progress)?;
    out.close()?;
    keep_identity(&*new.storage, &facts)?;
    if let Ok(meta) = std::fs::metadata(path) {
        let _ = std::fs::set_permissions(new.path(), meta.permissions());
    }
    old.close()?;
    new.commit(true)
}

/// The structures of a differencing image whose link stays as it is.
fn write_linked(storage: &dyn Storage, o: &CreateOptions, facts: &Facts, link: &ParentLink) -> Result<()> {
    match link {
        ParentLink::Vhdx(locator) => crate::vhdx::create::create(
            storage,
            &crate::vhdx::create::NewVhdx {
                size: o.size,
                block_size: o.block_size,
                logical_sector: o.logical_sector_size,
                physical_sector: o.physical_sector_size,
                fixed: false,
                parent: Some(locator.clone()),
                disk_id: facts.disk_id,
                data_write_guid: facts.link_id,
                extra: facts.extra.clone(),
            },
        ),
        ParentLink::Vhd(r) => {
            let path = |v: &[String]| v.first().cloned();
            let parent = crate::vhd::NewParent {
                id: r.id,
                time_stamp: r.time_stamp,
                name: r.name.clone(),
                relative: path(&r.relative).filter(|p| *p != r.name),
                absolute: path(&r.absolute).unwrap_or_default(),
            };
            crate::vhd::create(
                storage,
                &crate::vhd::NewVhd {
                    size: o.size,
                    kind: crate::format::vhd::TYPE_DIFFERENCING,
                    block_size: o.block_size,
                    id: facts.disk_id,
                    parent: Some(parent),
                },
            )
        }
    }
}

/// Gives a rebuilt image the identity of the old one, which its children and its guest know.
fn keep_identity(storage: &dyn Storage, facts: &Facts) -> Result<()> {
    match facts.format {
        Format::Vhdx => {
            let mut header = HeaderState::read(storage)?;
            header.update(storage, |h| h.data_write_guid = facts.link_id.into())?;
            crate::vhdx::set_disk_id(storage, facts.disk_id)
        }
        Format::Vhd => crate::vhd::set_id(storage, facts.disk_id),
        Format::Raw | Format::Iso => Ok(()),
    }
}

/// Names another parent. Unless `ignore_identity`, it must be the image that the child was made from.
pub fn reparent(child: &Path, format: Option<Format>, parent: &Path, ignore_identity: bool) -> Result<()> {
    let storage: Arc<dyn Storage> = Arc::new(OsFile::open(child, true, None, Lock::Exclusive)?);
    let format = match format {
        Some(f) => f,
        None => Format::detect(child, &*storage)?,
    };
    let facts = image::open(storage.clone(), format, true)?.facts;
    let link = facts
        .link
        .as_ref()
        .ok_or_else(|| Error::Parameter(format!("{} is not a differencing image", child.display())))?;
    let options = ChainOptions { write: false, direct: false, format: Some(format), lock: Lock::Shared, files: None };
    let chain = image::open_chain(parent, &options)?;
    let same = |p: &Path| p.canonicalize().ok();
    if chain.paths.iter().any(|p| same(p) == same(child)) {
        return Err(Error::Parent {
            child: child.to_path_buf(),
            detail: format!("{} is a child of it: the chain would be a loop", parent.display()),
        });
    }
    let p = &chain.images[0].facts;
    if !ignore_identity {
        image::check_link(child, parent, link, &facts, p)?;
    }
    if p.logical_sector != facts.logical_sector {
        return Err(Error::Parameter(format!(
            "sectors of {} bytes over sectors of {}",
            facts.logical_sector, p.logical_sector
        )));
    }
    if format == Format::Vhdx {
        let locator = create::link_vhdx(child, parent, p, false)?;
        return crate::vhdx::set_parent_locator(storage, &locator.encode()?);
    }
    drop(storage);
    // A VHD has no log: a header that was being changed when power failed would be the end of it.
    let change = Rebuild { parent: Some(parent.to_path_buf()), size: None };
    rebuild(child, Some(format), &change, &mut |_, _| true)
}
