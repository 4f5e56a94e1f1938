//! Reading, checking and writing the VHDX structures around the payload: headers, regions, metadata, log.

pub(crate) mod create;
pub(crate) mod header;
pub(crate) mod locator;
pub(crate) mod log;
pub(crate) mod metadata;
pub(crate) mod region;

use std::sync::Arc;

use uuid::Uuid;

use crate::error::{Error, Result, Structure};
use crate::format::vhdx as fmt;
use crate::storage::{Overlay, Storage};
use header::HeaderState;
use metadata::Metadata;
use region::Regions;

/// A VHDX whose headers, log, regions and metadata have been read and found right.
pub(crate) struct VhdxFile {
    /// The file; with the log's pages laid over it if the log could not be replayed (read-only).
    pub storage: Arc<dyn Storage>,
    pub header: HeaderState,
    pub regions: Regions,
    pub meta: Metadata,
    pub file_length: u64,
    /// The log held something that was replayed (or overlaid).
    pub replayed: bool,
    /// Pages that lie over the file.
    pub overlay: Vec<(u64, Box<[u8]>)>,
}

/// Whether the file begins as a VHDX does.
pub(crate) fn probe(storage: &dyn Storage) -> bool {
    let mut sig = [0; 8];
    storage.read_at(&mut sig, 0).is_ok() && sig == fmt::FILE_SIGNATURE
}

impl VhdxFile {
    /// Reads a file. With `write`, a log is replayed into it.
    pub fn open(storage: Arc<dyn Storage>, write: bool) -> Result<Self> {
        let io = |what| Error::io(storage.path(), what);
        if !probe(&*storage) {
            return Err(Error::malformed(Structure::File, "the file does not begin with `vhdxfile`"));
        }
        let mut header = HeaderState::read(&*storage)?;
        let mut overlay = Vec::new();
        let mut replayed = false;
        let mut view: Arc<dyn Storage> = storage.clone();
        if !header.log_guid().is_nil() {
            let plan = log::plan(&*storage, &header)?;
            replayed = !plan.is_empty();
            if write {
                plan.apply(&*storage)?;
                header.update(&*storage, |h| h.log_guid = Uuid::nil().into())?;
            } else if replayed {
                let length = plan.last_file_offset.max(storage.length().map_err(io("read the length"))?);
                let pages = plan.into_pages(&*storage)?;
                overlay = pages.iter().map(|(k, v)| (*k, v.clone())).collect();
                view = Arc::new(Overlay { inner: storage.clone(), pages, length });
            }
        }
        let file_length = view.length().map_err(io("read the length"))?;
        let regions = Regions::read(&*view, &header, file_length)?;
        let meta = Metadata::read(&*view, regions.metadata)?;
        let needed = meta.bat_entries() * 8;
        if needed > regions.bat.length {
            return Err(Error::malformed(
                Structure::Bat,
                format!(
                    "a disk of {} bytes needs {needed} bytes of BAT, the region has {}",
                    meta.size, regions.bat.length
                ),
            ));
        }
        Ok(Self { storage: view, header, regions, meta, file_length, replayed, overlay })
    }
}

/// Changes pages of a closed image all at once: through the log, which is empty before and after. Each page is a
/// multiple of 4 KiB in the file, 4 KiB long; the file must already have `length` bytes, durably.
pub(crate) fn transact(
    storage: &dyn Storage,
    header: &mut HeaderState,
    pages: &[(u64, Vec<u8>)],
    length: u64,
    data_changes: bool,
) -> Result<()> {
    let io = |e| Error::io(storage.path(), "change the image's metadata")(e);
    let guid = Uuid::new_v4();
    header.update(storage, |h| {
        h.file_write_guid = Uuid::new_v4().into();
        if data_changes {
            h.data_write_guid = Uuid::new_v4().into();
        }
        h.log_guid = guid.into();
    })?;
    let info = log::EntryInfo { sequence: 1, tail: 0, guid, flushed_file_offset: length, last_file_offset: length };
    let mut entry = vec![0; log::entry_length(pages.len())];
    if entry.len() as u64 > u64::from(header.header.log_length.get()) {
        return Err(Error::Unsupported(format!("a change of {} pages does not fit into the log", pages.len())));
    }
    let list: Vec<(u64, &[u8])> = pages.iter().map(|(at, p)| (*at, &p[..])).collect();
    log::encode_entry(&info, list.into_iter(), &mut entry);
    storage.write_at(&entry, header.header.log_offset.get()).and_then(|()| storage.sync()).map_err(io)?;
    for (at, page) in pages {
        storage.write_at(page, *at).map_err(io)?;
    }
    storage.sync().map_err(io)?;
    header.update(storage, |h| h.log_guid = Uuid::nil().into())
}

/// Changes the disk's identity in a closed image that nobody else sees yet.
pub(crate) fn set_disk_id(storage: &dyn Storage, id: Uuid) -> Result<()> {
    let header = HeaderState::read(storage)?;
    let io = |e| Error::io(storage.path(), "write the disk's identity")(e);
    let regions = Regions::read(storage, &header, storage.length().map_err(io)?)?;
    let meta = Metadata::read(storage, regions.metadata)?;
    storage.write_at(&id.to_bytes_le(), meta.disk_id_at).and_then(|()| storage.sync()).map_err(io)
}

/// Changes the parent locator of a closed image.
pub(crate) fn set_parent_locator(storage: Arc<dyn Storage>, item: &[u8]) -> Result<()> {
    let mut file = VhdxFile::open(storage.clone(), true)?;
    let page = metadata::replace_item(&*storage, file.regions.metadata, fmt::ITEM_PARENT_LOCATOR, item)?;
    transact(&*storage, &mut file.header, &[page], file.file_length, false)
}
