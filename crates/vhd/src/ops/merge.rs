//! Merging a differencing image into its parent.

use std::path::Path;
use std::sync::Arc;

use super::Progress;
use super::copy::{What, copy};
use super::resize::resize_file;
use crate::disk::{Disk, Io};
use crate::error::{Error, Result};
use crate::image::{self, ChainOptions, DiskType, Format, ParentLink};
use crate::state::writer::Writer;
use crate::storage::{Lock, OsFile, Storage};
use crate::vhdx::header::HeaderState;

/// Merges `child` into its parent, which then holds what the child showed, and removes the child.
///
/// Interrupted at any moment, the child still shows the same: as long as it is there it hides what has been merged
/// already, and merging again goes on. The last step gives the parent the child's identity, so that the child's own
/// children fit it (after `reparent`) and other children of the parent, which would now show wrong data, do not.
pub fn merge(child: &Path, format: Option<Format>, progress: Progress<'_>) -> Result<()> {
    let o = ChainOptions { write: true, direct: false, format, lock: Lock::Exclusive, files: None };
    // Opening the whole chain checks every link; only the child's file stays open.
    let mut chain = match image::open_chain(child, &o) {
        Err(Error::Parent { .. }) if already_merged(child, format)? => return remove(child),
        other => other?,
    };
    if chain.images.len() < 2 {
        return Err(Error::Parameter(format!("{} is not a differencing image", child.display())));
    }
    let parent_path = chain.paths[1].clone();
    let mut images = chain.images.drain(..);
    let (Some(child_image), Some(parent_image)) = (images.next(), images.next()) else {
        return Err(Error::Parameter("the chain ended while it was read".into()));
    };
    let (facts, parent_facts) = (child_image.facts.clone(), parent_image.facts.clone());
    drop((parent_image, images));
    let format = facts.format;
    let source = Disk::from_images(vec![child_image], vec![child.to_path_buf()], Io::Blocking)?;
    let storage: Arc<dyn Storage> = Arc::new(OsFile::open(&parent_path, true, None, Lock::Exclusive)?);
    if facts.size > parent_facts.size && format == Format::Vhd && parent_facts.disk_type != DiskType::Fixed {
        return Err(Error::Parameter(format!(
            "the parent has {} bytes, the child {}; resize the parent first",
            parent_facts.size, facts.size
        )));
    }
    merge_into(&source, storage, progress)?;
    source.close()?;
    remove(child)
}

/// Merges a child that is open without its parents into its parent's file.
pub(crate) fn merge_into(source: &Disk, storage: Arc<dyn Storage>, progress: Progress<'_>) -> Result<()> {
    let facts = &source.facts;
    let mut top = image::open(storage.clone(), facts.format, true)?;
    if facts.size > top.facts.size {
        drop(top);
        resize_file(storage.clone(), facts.format, facts.size, false)?;
        top = image::open(storage.clone(), facts.format, true)?;
    }
    // Until the end the parent must go on being the one that the child was made from.
    if let Writer::Vhdx(w) = &mut top.writer {
        w.keep_data_guid = true;
    }
    let target = Disk::from_images(vec![top], vec![storage.path().to_path_buf()], Io::Blocking)?;
    copy(source, &target, facts.size, What::Layer, progress)?;
    target.close()?;
    if facts.format == Format::Vhdx {
        let mut header = HeaderState::read(&*storage)?;
        header.update(&*storage, |h| h.data_write_guid = facts.link_id.into())?;
    }
    Ok(())
}

/// Whether the parent has the child's identity: the merge was interrupted after its last step.
fn already_merged(child: &Path, format: Option<Format>) -> Result<bool> {
    let storage = Arc::new(OsFile::open(child, false, None, Lock::Shared)?);
    let format = match format {
        Some(f) => f,
        None => Format::detect(child, &*storage)?,
    };
    if format != Format::Vhdx {
        return Ok(false);
    }
    let facts = image::open(storage, format, false)?.facts;
    let Some(link @ ParentLink::Vhdx(_)) = &facts.link else { return Ok(false) };
    let Some(parent) = image::candidates(child, link).into_iter().find(|p| p.is_file()) else { return Ok(false) };
    let storage = Arc::new(OsFile::open(&parent, false, None, Lock::Shared)?);
    Ok(image::open(storage, format, false).is_ok_and(|p| p.facts.link_id == facts.link_id))
}

fn remove(child: &Path) -> Result<()> {
    std::fs::remove_file(child).map_err(Error::io(child, "remove the merged image"))?;
    super::replace::sync_directory(child)
}
