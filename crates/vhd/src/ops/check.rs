//! Checking an image: everything that opening refuses, plus what opening tolerates.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, Result, Structure};
use crate::format::{vhd as vhd_fmt, vhdx as vhdx_fmt};
use crate::image::{self, ChainOptions, Format};
use crate::state::map::{Block, Flavor};
use crate::state::space::{Run, Space, UNIT};
use crate::storage::{Lock, OsFile, Storage};
use crate::vhd::VhdFile;
use crate::vhdx::VhdxFile;

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Worth knowing; nothing is lost.
    Note,
    /// Something spare is damaged; the data is not.
    Warning,
    /// Data is lost or wrong, or the image cannot be used.
    Error,
}

/// Something that was found.
#[derive(Debug, Clone)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// Where it is.
    pub structure: Structure,
    /// What it is.
    pub detail: String,
}

/// The result of a check.
#[derive(Debug, Clone, Default)]
pub struct CheckReport {
    /// Findings, at most [`MAX_FINDINGS`].
    pub findings: Vec<Finding>,
    /// Findings beyond that.
    pub more: u64,
    /// Errors among all findings.
    pub errors: u64,
    /// Blocks that are in the file.
    pub allocated_blocks: u64,
    /// Blocks of the disk.
    pub total_blocks: u64,
    /// Bytes of the file that nothing refers to.
    pub leaked_bytes: u64,
    /// The log holds updates that the next opening for writing replays.
    pub log_pending: bool,
}

/// Findings that are kept.
pub const MAX_FINDINGS: usize = 100;

impl CheckReport {
    /// Whether nothing is wrong.
    pub fn is_clean(&self) -> bool {
        self.errors == 0
    }

    fn add(&mut self, severity: Severity, structure: Structure, detail: impl Into<String>) {
        self.errors += u64::from(severity == Severity::Error);
        if self.findings.len() < MAX_FINDINGS {
            self.findings.push(Finding { severity, structure, detail: detail.into() });
        } else {
            self.more += 1;
        }
    }

    fn refused(&mut self, e: &Error) {
        let structure = if let Error::Malformed { structure, .. } = e { *structure } else { Structure::File };
        self.add(Severity::Error, structure, e.to_string());
    }
}

/// Checks an image and that its parents are there and are the right ones. Only reading fails; what is wrong with the
/// image is in the report.
pub fn check(path: &Path, format: Option<Format>) -> Result<CheckReport> {
    let storage: Arc<dyn Storage> = Arc::new(OsFile::open(path, false, None, Lock::Shared)?);
    let format = match format {
        Some(f) => f,
        None => Format::detect(path, &*storage)?,
    };
    let mut report = check_storage(storage, format)?;
    if report.is_clean() {
        let options =
            ChainOptions { write: false, direct: false, format: Some(format), lock: Lock::Shared, files: None };
        if let Err(e) = image::open_chain(path, &options) {
            report.refused(&e);
        }
    }
    Ok(report)
}

/// Checks one file, without its parents.
pub(crate) fn check_storage(storage: Arc<dyn Storage>, format: Format) -> Result<CheckReport> {
    let mut report = CheckReport::default();
    let result = match format {
        Format::Vhdx => check_vhdx(storage, &mut report),
        Format::Vhd => check_vhd(storage, &mut report),
        Format::Raw | Format::Iso => image::open(storage, format, false).map(|_| ()),
    };
    match result {
        Err(e @ Error::Io { .. }) => return Err(e),
        Err(e) => report.refused(&e),
        Ok(()) => {}
    }
    Ok(report)
}

fn check_vhdx(storage: Arc<dyn Storage>, report: &mut CheckReport) -> Result<()> {
    let file = VhdxFile::open(storage, false)?;
    if file.header.valid < 2 {
        report.add(Severity::Warning, Structure::Header, "only one of the two headers is valid");
    }
    if file.regions.valid_tables < 2 {
        report.add(Severity::Warning, Structure::RegionTable, "only one of the two region tables is valid");
    }
    if file.replayed {
        report.log_pending = true;
        report.add(Severity::Note, Structure::Log, "it holds updates; the next opening for writing replays them");
    }
    let map = image::vhdx_map(&file);
    let Flavor::Vhdx { chunk_shift } = map.flavor else { return Ok(()) };
    report.total_blocks = map.blocks;
    let mut space = Space::default();
    let mut used = 0;
    for r in &file.regions.reserved {
        let run = Run { start: r.offset / UNIT, count: r.length / UNIT };
        used += run.count;
        let _ = space.take(run);
    }
    // Chunks with partially present blocks need their bitmaps. The BAT is walked in order, a chunk's bitmap entry last.
    let mut partial_in = None;
    let mut lonely = Vec::new();
    image::walk_vhdx(&*file.storage, &map, |bitmap, n, raw| {
        let what = if bitmap { format!("sector bitmap of chunk {n}") } else { format!("block {n}") };
        match image::place_of(&map, bitmap, raw) {
            Err(why) => report.add(Severity::Error, Structure::Bat, format!("{what}: {why}")),
            Ok(None) => {}
            Ok(Some(run)) => {
                report.allocated_blocks += u64::from(!bitmap);
                used += run.count;
                if let Err(u) = space.take(run) {
                    let shared = format!("{what} shares the space at {:#x} with another block", u * UNIT);
                    report.add(Severity::Error, Structure::Bat, shared);
                }
            }
        }
        if !bitmap && matches!(map.decode(raw), Ok(Block::Partial(_))) {
            let chunk = n >> chunk_shift;
            if partial_in.is_some_and(|c| c != chunk) {
                lonely.extend(partial_in);
            }
            partial_in = Some(chunk);
        }
        if bitmap && partial_in == Some(n) && raw & vhdx_fmt::BAT_STATE_MASK == vhdx_fmt::BLOCK_FULLY_PRESENT {
            partial_in = None;
        }
        Ok(())
    })?;
    lonely.extend(partial_in);
    for chunk in lonely {
        report.add(
            Severity::Error,
            Structure::SectorBitmap,
            format!("chunk {chunk} has partially present blocks but no sector bitmap"),
        );
    }
    report.leaked_bytes = (file.file_length / UNIT).saturating_sub(used) * UNIT;
    if report.leaked_bytes != 0 && report.is_clean() {
        let detail = format!("{} bytes of the file are not in use; compacting gives them back", report.leaked_bytes);
        report.add(Severity::Note, Structure::File, detail);
    }
    Ok(())
}

fn check_vhd(storage: Arc<dyn Storage>, report: &mut CheckReport) -> Result<()> {
    let file = VhdFile::open(storage)?;
    let Some(d) = &file.dynamic else { return Ok(()) };
    if !file.footer_intact {
        report.add(
            Severity::Warning,
            Structure::Footer,
            "the one at the end is damaged; the copy at the start is right",
        );
    }
    let mut copy = [0; 512];
    let _ = file.storage.read_at(&mut copy, 0);
    if file.footer_intact && copy[..8] != vhd_fmt::FOOTER_COOKIE {
        report.add(Severity::Warning, Structure::Footer, "the copy at the start is damaged");
    }
    let map = image::vhd_map(&file, d);
    let Flavor::Vhd { bitmap_bytes } = map.flavor else { return Ok(()) };
    report.total_blocks = map.blocks;
    let mut starts = Vec::new();
    image::walk_vhd(&*file.storage, &map, |block, raw| {
        report.allocated_blocks += 1;
        if map.decode(u64::from(raw)).is_err() {
            let detail = format!("block {block}: at sector {raw}, outside of the file's data");
            report.add(Severity::Error, Structure::Bat, detail);
        } else {
            starts.push((raw, block));
        }
        Ok(())
    })?;
    starts.sort_unstable();
    let step = (bitmap_bytes + map.block_size()) / vhd_fmt::SECTOR;
    for w in starts.windows(2) {
        if u64::from(w[1].0) < u64::from(w[0].0) + step {
            report.add(Severity::Error, Structure::Bat, format!("blocks {} and {} share space", w[0].1, w[1].1));
        }
    }
    let regions: u64 = map.reserved.iter().map(|r| r.length.next_multiple_of(512)).sum();
    let blocks = starts.len() as u64 * step * vhd_fmt::SECTOR;
    // Up to a page before each block is alignment.
    let slack = starts.len() as u64 * 4096;
    report.leaked_bytes = file.footer_at.saturating_sub(regions + blocks);
    if report.leaked_bytes <= slack {
        report.leaked_bytes = 0;
    }
    Ok(())
}

/// What `viridian vhd info` shows.
#[derive(Debug, Clone)]
pub struct ImageInfo {
    /// The file.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
    /// Fixed, dynamic, differencing.
    pub disk_type: image::DiskType,
    /// The disk's size in bytes.
    pub size: u64,
    /// The file's length in bytes.
    pub file_size: u64,
    /// Bytes that the file takes on the host.
    pub allocated: u64,
    /// Bytes in a block; 0 if the format has none.
    pub block_size: u32,
    /// Bytes in a logical sector.
    pub logical_sector_size: u32,
    /// Bytes in a physical sector.
    pub physical_sector_size: u32,
    /// The disk's identity.
    pub disk_id: uuid::Uuid,
    /// What children remember of this image.
    pub link_id: uuid::Uuid,
    /// Where the parent should be, best first.
    pub parent_candidates: Vec<PathBuf>,
    /// Somebody has the image open for writing.
    pub in_use: bool,
    /// The log holds updates that have not been replayed.
    pub log_pending: bool,
}

/// Looks at one image file, in use or not, without its parents.
pub fn info(path: &Path, format: Option<Format>) -> Result<ImageInfo> {
    let (file, in_use) = match OsFile::open(path, false, None, Lock::Shared) {
        Err(Error::InUse { .. }) => (OsFile::open(path, false, None, Lock::None)?, true),
        other => (other?, false),
    };
    let storage: Arc<dyn Storage> = Arc::new(file);
    let format = match format {
        Some(f) => f,
        None => Format::detect(path, &*storage)?,
    };
    let io = |e| Error::io(path, "stat")(e);
    let (file_size, allocated) = (storage.length().map_err(io)?, storage.allocated().map_err(io)?);
    let facts = image::open(storage, format, false)?.facts;
    Ok(ImageInfo {
        path: path.to_path_buf(),
        format,
        disk_type: facts.disk_type,
        size: facts.size,
        file_size,
        allocated,
        block_size: facts.block_size,
        logical_sector_size: facts.logical_sector,
        physical_sector_size: facts.physical_sector,
        disk_id: facts.disk_id,
        link_id: facts.link_id,
        parent_candidates: facts.link.as_ref().map(|l| image::candidates(path, l)).unwrap_or_default(),
        in_use,
        log_pending: facts.log_replayed,
    })
}
