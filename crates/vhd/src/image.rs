//! From a file to a layer of an open disk: which format it is, what it says about itself, where its parent is.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use uuid::Uuid;

use crate::error::{Error, Result, Structure};
use crate::format::{vhd as vhd_fmt, vhdx as vhdx_fmt};
use crate::state::cache::Cache;
use crate::state::map::{Block, BlockMap, Flavor};
use crate::state::space::{Run, Space, UNIT};
use crate::state::writer::{VhdWriter, VhdxWriter, Writer};
use crate::state::{Kind, Layer};
use crate::storage::{Lock, OsFile, Storage};
use crate::vhd::{self, VhdFile};
use crate::vhdx::locator::ParentLocator;
use crate::vhdx::metadata::Item;
use crate::vhdx::region::Range;
use crate::vhdx::{self, VhdxFile};

/// The format of an image file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// VHDX (MS-VHDX).
    Vhdx,
    /// VHD, which others call VPC.
    Vhd,
    /// The disk's bytes as they are.
    Raw,
    /// An optical disc's 2048-byte sectors, read-only.
    Iso,
}

impl Format {
    /// The format that a file's name promises. Images are never taken for raw by their content: a guest could write
    /// another format's signature to its raw disk and so name any file of the host as its parent.
    pub fn from_name(path: &Path) -> Option<Self> {
        let ext = path.extension()?.to_str()?.to_ascii_lowercase();
        Some(match ext.as_str() {
            "vhdx" | "avhdx" => Self::Vhdx,
            "vhd" | "avhd" | "vpc" => Self::Vhd,
            "iso" => Self::Iso,
            "raw" | "img" | "bin" | "vfd" | "flp" => Self::Raw,
            _ => return None,
        })
    }

    /// The format of an existing file: by its name, or, if that says nothing, by its signature (never raw).
    pub(crate) fn detect(path: &Path, storage: &dyn Storage) -> Result<Self> {
        if let Some(f) = Self::from_name(path) {
            return Ok(f);
        }
        if vhdx::probe(storage) {
            return Ok(Self::Vhdx);
        }
        if vhd::probe(storage) {
            return Ok(Self::Vhd);
        }
        Err(Error::Parameter(format!(
            "{}: neither the name (.vhdx, .vhd, .iso, .img, .raw) nor the content says which format this is; name it",
            path.display()
        )))
    }
}

impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Vhdx => "VHDX",
            Self::Vhd => "VHD",
            Self::Raw => "raw",
            Self::Iso => "ISO",
        })
    }
}

/// Whether blocks are allocated at once, on demand, or over a parent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskType {
    /// All space is allocated when the image is made.
    Fixed,
    /// Blocks are allocated when they are written.
    Dynamic,
    /// Only what differs from the parent is here.
    Differencing,
}

impl std::fmt::Display for DiskType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Fixed => "fixed",
            Self::Dynamic => "dynamic",
            Self::Differencing => "differencing",
        })
    }
}

/// How a child names its parent.
#[derive(Debug, Clone)]
pub(crate) enum ParentLink {
    Vhdx(ParentLocator),
    Vhd(vhd::ParentRef),
}

/// What an image says about itself.
#[derive(Debug, Clone)]
pub(crate) struct Facts {
    pub format: Format,
    pub disk_type: DiskType,
    pub size: u64,
    pub block_size: u32,
    pub logical_sector: u32,
    pub physical_sector: u32,
    /// SCSI page 83 identity; VHD's unique id.
    pub disk_id: Uuid,
    /// What a child's locator must say.
    pub link_id: Uuid,
    pub link: Option<ParentLink>,
    pub extra: Vec<Item>,
    /// The file's log held updates when it was opened.
    pub log_replayed: bool,
}

/// An image ready to be a layer.
pub(crate) struct Image {
    pub layer: Layer,
    pub writer: Writer,
    pub facts: Facts,
}

/// 32 MiB of 4 KiB pages: the BAT of 64 TiB in 32 MiB blocks is 16 MiB.
const VHDX_CACHE_PAGES: usize = 8192;
/// 8 MiB of 512-byte pages: twice the BAT of the largest VHD.
const VHD_CACHE_PAGES: usize = 16384;

/// Opens one file as an image.
pub(crate) fn open(storage: Arc<dyn Storage>, format: Format, write: bool) -> Result<Image> {
    match format {
        Format::Vhdx => open_vhdx(storage, write),
        Format::Vhd => open_vhd(storage, write),
        Format::Raw => open_flat(storage, write, Format::Raw, 512),
        Format::Iso => open_flat(storage, false, Format::Iso, 2048),
    }
}

fn open_flat(storage: Arc<dyn Storage>, write: bool, format: Format, sector: u32) -> Result<Image> {
    let length = storage.length().map_err(Error::io(storage.path(), "read the length"))?;
    let size = length / u64::from(sector) * u64::from(sector);
    if size == 0 {
        return Err(Error::malformed(Structure::File, format!("{length} bytes hold no sector of {sector}")));
    }
    let direct = storage.direct_alignment();
    Ok(Image {
        layer: Layer { kind: Kind::Flat { length: size }, size, cache: Cache::new(0), direct, storage },
        writer: if write { Writer::Flat } else { Writer::None },
        facts: Facts {
            format,
            disk_type: DiskType::Fixed,
            size,
            block_size: 0,
            logical_sector: sector,
            physical_sector: sector,
            disk_id: Uuid::nil(),
            link_id: Uuid::nil(),
            link: None,
            extra: Vec::new(),
            log_replayed: false,
        },
    })
}

fn open_vhdx(storage: Arc<dyn Storage>, write: bool) -> Result<Image> {
    let file = VhdxFile::open(storage, write)?;
    let m = &file.meta;
    let map = vhdx_map(&file);
    let mut cache = Cache::new(VHDX_CACHE_PAGES);
    for (at, page) in &file.overlay {
        cache.insert(at >> 12, page.clone());
        cache.hold(at >> 12);
    }
    let writer = if write {
        let space = scan_vhdx(&*file.storage, &map, &file.regions.reserved)?;
        Writer::Vhdx(Box::new(VhdxWriter::new(file.header.clone(), space, file.file_length, file.regions.log)))
    } else {
        Writer::None
    };
    let facts = Facts {
        format: Format::Vhdx,
        disk_type: match (&m.parent, m.fixed) {
            (Some(_), _) => DiskType::Differencing,
            (None, true) => DiskType::Fixed,
            (None, false) => DiskType::Dynamic,
        },
        size: m.size,
        block_size: m.block_size,
        logical_sector: m.logical_sector,
        physical_sector: m.physical_sector,
        disk_id: m.disk_id,
        link_id: file.header.data_write_guid(),
        link: m.parent.clone().map(ParentLink::Vhdx),
        extra: m.extra.clone(),
        log_replayed: file.replayed,
    };
    let size = m.size;
    let direct = file.storage.direct_alignment();
    Ok(Image { layer: Layer { storage: file.storage, kind: Kind::Blocks(map), size, cache, direct }, writer, facts })
}

/// The block map of a VHDX.
pub(crate) fn vhdx_map(file: &VhdxFile) -> BlockMap {
    let m = &file.meta;
    BlockMap {
        flavor: Flavor::Vhdx { chunk_shift: m.chunk_ratio().trailing_zeros() },
        bat_offset: file.regions.bat.offset,
        blocks: m.blocks(),
        block_shift: m.block_size.trailing_zeros(),
        sector_shift: m.logical_sector.trailing_zeros(),
        has_parent: m.parent.is_some(),
        fixed: m.fixed,
        reserved: file.regions.reserved.clone(),
        file_end: file.file_length,
        page_shift: 12,
    }
}

/// Goes through the BAT, skipping its holes, and gives every entry that is not zero to `visit` as
/// (is a sector bitmap, number of block or chunk, raw entry).
pub(crate) fn walk_vhdx(
    storage: &dyn Storage,
    map: &BlockMap,
    mut visit: impl FnMut(bool, u64, u64) -> Result<()>,
) -> Result<()> {
    let Flavor::Vhdx { chunk_shift } = map.flavor else { return Ok(()) };
    let ratio = 1u64 << chunk_shift;
    let last = if map.has_parent {
        map.bitmap_entry_at(map.blocks - 1, chunk_shift) + 8
    } else {
        map.entry_at(map.blocks - 1) + 8
    };
    let io = |e| Error::io(storage.path(), "read the BAT")(e);
    let mut buf = vec![0; 1 << 20];
    let mut at = map.bat_offset;
    while at < last {
        let Some((start, end)) = storage.next_data(at).map_err(io)? else { break };
        let start = (start & !7).max(at);
        if start >= last {
            break;
        }
        let len = (end.next_multiple_of(8).min(last) - start).min(buf.len() as u64);
        let part = &mut buf[..len as usize];
        storage.read_at(part, start).map_err(io)?;
        for (i, raw) in part.as_chunks::<8>().0.iter().enumerate() {
            let raw = u64::from_le_bytes(*raw);
            if raw == 0 {
                continue;
            }
            let index = (start - map.bat_offset) / 8 + i as u64;
            let (chunk, inside) = (index / (ratio + 1), index % (ratio + 1));
            if inside == ratio {
                visit(true, chunk, raw)?;
            } else if chunk * ratio + inside < map.blocks {
                visit(false, chunk * ratio + inside, raw)?;
            }
        }
        at = start + len;
    }
    Ok(())
}

/// Checks one entry and, if it has a place in the file, gives that.
pub(crate) fn place_of(map: &BlockMap, bitmap: bool, raw: u64) -> std::result::Result<Option<Run>, String> {
    let (state, offset) = (raw & vhdx_fmt::BAT_STATE_MASK, raw & vhdx_fmt::BAT_OFFSET_MASK);
    let run = |len: u64| Run { start: offset / UNIT, count: len / UNIT };
    if bitmap {
        return match state {
            vhdx_fmt::BLOCK_NOT_PRESENT => Ok(None),
            vhdx_fmt::BLOCK_FULLY_PRESENT if !map.has_parent => Err("a sector bitmap without a parent".into()),
            vhdx_fmt::BLOCK_FULLY_PRESENT if map.placeable(offset, UNIT) => Ok(Some(run(UNIT))),
            vhdx_fmt::BLOCK_FULLY_PRESENT => Err(format!("a sector bitmap at {offset:#x}, outside of the data")),
            s => Err(format!("state {s} of a sector bitmap")),
        };
    }
    match map.decode(raw) {
        Ok(Block::Full(o) | Block::Partial(o)) if o == offset => Ok(Some(run(map.block_size()))),
        Ok(_) => Ok(None),
        Err(_) if state == 4 || state == 5 => Err(format!("unknown state {state}")),
        Err(_) if state == vhdx_fmt::BLOCK_PARTIALLY_PRESENT && !map.has_parent => {
            Err("partially present without a parent".into())
        }
        Err(_) => Err(format!("at {offset:#x}, outside of the file's data")),
    }
}

/// Finds which space is taken; refuses entries that lie outside or share space.
fn scan_vhdx(storage: &dyn Storage, map: &BlockMap, reserved: &[Range]) -> Result<Space> {
    let mut space = Space::default();
    for r in reserved {
        // Regions were checked for overlaps when they were read.
        let _ = space.take(Run { start: r.offset / UNIT, count: r.length / UNIT });
    }
    walk_vhdx(storage, map, |bitmap, n, raw| {
        let bad = |why: String| {
            let what = if bitmap { "sector bitmap of chunk" } else { "block" };
            Error::malformed(Structure::Bat, format!("{what} {n}: {why}"))
        };
        if let Some(run) = place_of(map, bitmap, raw).map_err(bad)? {
            space.take(run).map_err(|u| bad(format!("shares the space at {:#x} with another block", u * UNIT)))?;
        }
        Ok(())
    })?;
    space.find_holes();
    Ok(space)
}

fn open_vhd(storage: Arc<dyn Storage>, write: bool) -> Result<Image> {
    let file = VhdFile::open(storage)?;
    let f = &file.footer;
    let size = f.current_size.get();
    let id = Uuid::from_bytes(f.unique_id);
    let mut facts = Facts {
        format: Format::Vhd,
        disk_type: DiskType::Fixed,
        size,
        block_size: 0,
        logical_sector: 512,
        physical_sector: 512,
        disk_id: id,
        link_id: id,
        link: None,
        extra: Vec::new(),
        log_replayed: false,
    };
    let direct = file.storage.direct_alignment();
    let Some(d) = &file.dynamic else {
        let kind = Kind::Flat { length: size };
        let layer = Layer { storage: file.storage, kind, size, cache: Cache::new(0), direct };
        return Ok(Image { layer, writer: if write { Writer::Flat } else { Writer::None }, facts });
    };
    let map = vhd_map(&file, d);
    facts.block_size = d.header.block_size.get();
    facts.disk_type = if d.parent.is_some() { DiskType::Differencing } else { DiskType::Dynamic };
    facts.link = d.parent.clone().map(ParentLink::Vhd);
    let writer = if write {
        let next = scan_vhd(&*file.storage, &map)?;
        let mut footer = file.footer.clone();
        let footer = Box::new(vhd::seal_footer(&mut footer));
        Writer::Vhd(Box::new(VhdWriter { footer, started: false, next, pool_end: file.footer_at }))
    } else {
        Writer::None
    };
    let layer =
        Layer { storage: file.storage, kind: Kind::Blocks(map), size, cache: Cache::new(VHD_CACHE_PAGES), direct };
    Ok(Image { layer, writer, facts })
}

/// The block map of a dynamic or differencing VHD.
pub(crate) fn vhd_map(file: &VhdFile, d: &vhd::Dynamic) -> BlockMap {
    let block = u64::from(d.header.block_size.get());
    BlockMap {
        flavor: Flavor::Vhd { bitmap_bytes: (block / vhd_fmt::SECTOR).div_ceil(8).next_multiple_of(512) },
        bat_offset: d.header.table_offset.get(),
        blocks: file.footer.current_size.get().div_ceil(block),
        block_shift: block.trailing_zeros(),
        sector_shift: 9,
        has_parent: d.parent.is_some(),
        fixed: false,
        reserved: d.reserved.clone(),
        file_end: file.footer_at,
        page_shift: 9,
    }
}

/// Goes through the BAT of a VHD and gives every used entry to `visit` as (block, raw entry).
pub(crate) fn walk_vhd(
    storage: &dyn Storage,
    map: &BlockMap,
    mut visit: impl FnMut(u64, u32) -> Result<()>,
) -> Result<()> {
    let mut buf = vec![0; 1 << 20];
    let total = map.blocks * 4;
    let mut at = 0;
    while at < total {
        let len = (total - at).min(buf.len() as u64);
        let part = &mut buf[..len as usize];
        storage.read_at(part, map.bat_offset + at).map_err(Error::io(storage.path(), "read the BAT"))?;
        for (i, raw) in part.as_chunks::<4>().0.iter().enumerate() {
            let raw = u32::from_be_bytes(*raw);
            if raw != vhd_fmt::BAT_UNUSED {
                visit(at / 4 + i as u64, raw)?;
            }
        }
        at += len;
    }
    Ok(())
}

/// Checks the BAT and finds the end of the data.
fn scan_vhd(storage: &dyn Storage, map: &BlockMap) -> Result<u64> {
    let Flavor::Vhd { bitmap_bytes } = map.flavor else { return Ok(0) };
    let step = (bitmap_bytes + map.block_size()) / vhd_fmt::SECTOR;
    let mut starts = Vec::new();
    walk_vhd(storage, map, |block, raw| {
        map.decode(u64::from(raw)).map_err(|_| {
            Error::malformed(Structure::Bat, format!("block {block}: at sector {raw}, outside of the file's data"))
        })?;
        starts.push(raw);
        Ok(())
    })?;
    starts.sort_unstable();
    if let Some(w) = starts.windows(2).find(|w| u64::from(w[1]) < u64::from(w[0]) + step) {
        return Err(Error::malformed(Structure::Bat, format!("the blocks at sectors {} and {} overlap", w[0], w[1])));
    }
    let regions = map.reserved.iter().map(Range::end).max().unwrap_or(0);
    let blocks = starts.last().map_or(0, |&s| (u64::from(s) + step) * vhd_fmt::SECTOR);
    Ok(regions.max(blocks).next_multiple_of(vhd_fmt::SECTOR))
}

/// How a chain of images is opened.
#[derive(Debug, Clone)]
pub(crate) struct ChainOptions {
    pub write: bool,
    pub direct: bool,
    pub format: Option<Format>,
    pub lock: Lock,
    pub files: Option<Arc<Vec<(PathBuf, std::fs::File)>>>,
}

/// More layers than anybody keeps; a loop is found before.
const MAX_CHAIN: usize = 256;

/// An opened chain, the child first.
pub(crate) struct Chain {
    pub images: Vec<Image>,
    pub paths: Vec<PathBuf>,
}

/// Opens an image and all its parents.
pub(crate) fn open_chain(path: &Path, o: &ChainOptions) -> Result<Chain> {
    let storage = open_file(path, o.format, o.write, o, o.lock)?;
    let format = match o.format {
        Some(f) => f,
        None => Format::detect(path, &*storage)?,
    };
    let mut chain = Chain { images: vec![open(storage, format, o.write)?], paths: vec![path.to_path_buf()] };
    let lock = if o.lock == Lock::None { Lock::None } else { Lock::Shared };
    let mut seen = vec![identity(path, o)?];
    while let Some(link) = chain.images.last().and_then(|i| i.facts.link.clone()) {
        let child = chain.paths.last().cloned().unwrap_or_default();
        let bad = |detail: String| Error::Parent { child: child.clone(), detail };
        if chain.images.len() == MAX_CHAIN {
            return Err(bad(format!("the chain has more than {MAX_CHAIN} images")));
        }
        let parent = find_parent(&child, &link, o)?;
        let id = identity(&parent, o)?;
        if seen.contains(&id) {
            return Err(bad(format!("{} is already in the chain: the chain is a loop", parent.display())));
        }
        seen.push(id);
        let format = match &link {
            ParentLink::Vhdx(_) => Format::Vhdx,
            ParentLink::Vhd(_) => Format::Vhd,
        };
        let storage: Arc<dyn Storage> = open_file(&parent, Some(format), false, o, lock).map_err(|e| match e {
            Error::Parent { .. } => e,
            e => bad(e.to_string()),
        })?;
        let image = open(storage, format, false).map_err(|e| bad(format!("{}: {e}", parent.display())))?;
        let facts = &chain.images.last().expect("the child").facts;
        if is_merged(&link, facts, &image.facts) {
            // Nothing hides that parent wrongly, but a write would give the child a new identity.
            if o.write && chain.images.len() == 1 {
                return Err(bad(format!(
                    "merging it into {} was interrupted after the last byte; merge it again, or use that image",
                    parent.display()
                )));
            }
        } else {
            check_link(&child, &parent, &link, facts, &image.facts)?;
        }
        chain.images.push(image);
        chain.paths.push(parent);
    }
    Ok(chain)
}

fn open_file(
    path: &Path,
    format: Option<Format>,
    write: bool,
    o: &ChainOptions,
    lock: Lock,
) -> Result<Arc<dyn Storage>> {
    if let Some(file) = given(path, o) {
        return Ok(Arc::new(OsFile::from_file(file, path, lock)?));
    }
    // Which sector size direct I/O must allow is known only after reading: 512 always does.
    let sector = match format.or_else(|| Format::from_name(path)) {
        Some(Format::Iso) => 2048,
        _ => 512,
    };
    Ok(Arc::new(OsFile::open(path, write, o.direct.then_some(sector), lock)?))
}

/// The file that somebody else has opened at `path`. The path itself may be out of this process's reach.
fn given<'a>(path: &Path, o: &'a ChainOptions) -> Option<&'a std::fs::File> {
    let files = o.files.as_deref()?;
    files.iter().find(|(known, _)| known == path).map(|(_, file)| file)
}

fn identity(path: &Path, o: &ChainOptions) -> Result<(u64, u64)> {
    use std::os::unix::fs::MetadataExt;
    let m = given(path, o).map_or_else(|| std::fs::metadata(path), std::fs::File::metadata);
    let m = m.map_err(Error::io(path, "stat"))?;
    Ok((m.dev(), m.ino()))
}

/// The paths where a link says that the parent may be, best first.
pub(crate) fn candidates(child: &Path, link: &ParentLink) -> Vec<PathBuf> {
    let dir = child.parent().unwrap_or(Path::new(""));
    let (relative, absolute): (Vec<String>, Vec<String>) = match link {
        ParentLink::Vhdx(l) => {
            let get = |k| l.get(k).map(str::to_string);
            (get("relative_path").into_iter().collect(), get("absolute_win32_path").into_iter().collect())
        }
        ParentLink::Vhd(r) => (r.relative.clone(), r.absolute.clone()),
    };
    let mut out = Vec::new();
    for r in relative.iter().filter(|r| !r.is_empty()) {
        out.push(dir.join(r));
        // As Windows writes them: `.\base.vhdx`.
        out.push(dir.join(r.replace('\\', "/")));
    }
    for a in absolute.iter().filter(|a| !a.is_empty()) {
        out.push(PathBuf::from(a));
        // A Windows path means nothing here, but its last part may lie beside the child.
        if let Some(name) = a.rsplit('\\').next().filter(|n| n.len() < a.len() && !n.is_empty()) {
            out.push(dir.join(name));
        }
    }
    out.dedup();
    out
}

fn find_parent(child: &Path, link: &ParentLink, o: &ChainOptions) -> Result<PathBuf> {
    let tried = candidates(child, link);
    tried.iter().find(|p| given(p, o).is_some() || p.is_file()).cloned().ok_or_else(|| Error::Parent {
        child: child.to_path_buf(),
        detail: format!(
            "not found at {}; use `viridian vhd reparent`",
            tried.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(", ")
        ),
    })
}

/// Whether the parent is what the child showed: the last step of a merge gives it the child's identity, before the child
/// is removed.
pub(crate) fn is_merged(link: &ParentLink, child: &Facts, parent: &Facts) -> bool {
    matches!(link, ParentLink::Vhdx(_)) && child.link_id == parent.link_id
}

/// Checks that `parent` is the image that `child` was made from.
pub(crate) fn check_link(child: &Path, parent_path: &Path, link: &ParentLink, c: &Facts, p: &Facts) -> Result<()> {
    let bad = |detail: String| Err(Error::Parent { child: child.to_path_buf(), detail });
    let matches = match link {
        ParentLink::Vhdx(l) => l.linkages().contains(&p.link_id),
        ParentLink::Vhd(r) => r.id == p.link_id,
    };
    if !matches {
        return bad(format!(
            "{} has changed since the differencing image was made (identity {}); the child would show wrong data",
            parent_path.display(),
            p.link_id
        ));
    }
    if c.logical_sector != p.logical_sector {
        return bad(format!("sectors of {} bytes over sectors of {}", c.logical_sector, p.logical_sector));
    }
    Ok(())
}
