//! Reading, checking and writing the VHD structures around the payload: footer, dynamic header, parent locators.

use std::sync::Arc;

use uuid::Uuid;
use zerocopy::{FromBytes, IntoBytes};

use crate::error::{Error, Result, Structure};
use crate::format::vhd as fmt;
use crate::storage::Storage;
use crate::vhdx::locator::utf16le;
use crate::vhdx::region::Range;

/// A VHD whose structures have been read and found right.
pub(crate) struct VhdFile {
    pub storage: Arc<dyn Storage>,
    pub footer: fmt::Footer,
    pub dynamic: Option<Dynamic>,
    /// Where the footer at the end is; the file's length if only the copy at the start is right.
    pub footer_at: u64,
    /// The footer at the end was right.
    pub footer_intact: bool,
}

/// What a dynamic or differencing VHD has besides.
pub(crate) struct Dynamic {
    pub header: fmt::DynamicHeader,
    pub parent: Option<ParentRef>,
    /// Where blocks may not be.
    pub reserved: Vec<Range>,
}

/// How a differencing VHD names its parent.
#[derive(Debug, Clone)]
pub(crate) struct ParentRef {
    pub id: Uuid,
    pub relative: Vec<String>,
    pub absolute: Vec<String>,
    pub time_stamp: u32,
    pub name: String,
}

/// One's complement of the sum of all bytes but the checksum's (which are at `field`).
pub(crate) fn checksum(bytes: &[u8], field: usize) -> u32 {
    let sum = |b: &[u8]| b.iter().fold(0u32, |s, &x| s.wrapping_add(u32::from(x)));
    !(sum(bytes).wrapping_sub(sum(&bytes[field..field + 4])))
}

const FOOTER_CHECKSUM: usize = 64;
const HEADER_CHECKSUM: usize = 36;

/// The footer with its checksum.
pub(crate) fn seal_footer(f: &mut fmt::Footer) -> [u8; 512] {
    f.checksum = checksum(f.as_bytes(), FOOTER_CHECKSUM).into();
    f.as_bytes().try_into().expect("a footer has 512 bytes")
}

/// The dynamic header with its checksum.
pub(crate) fn seal_header(h: &mut fmt::DynamicHeader) {
    h.checksum = checksum(h.as_bytes(), HEADER_CHECKSUM).into();
}

fn read_footer(storage: &dyn Storage, at: u64) -> Result<std::result::Result<fmt::Footer, String>> {
    let mut buf = [0; 512];
    if let Err(e) = storage.read_at(&mut buf, at) {
        if e.kind() == std::io::ErrorKind::UnexpectedEof {
            return Ok(Err("the file is too short".into()));
        }
        return Err(Error::io(storage.path(), "read the footer")(e));
    }
    let f = fmt::Footer::read_from_bytes(&buf).expect("a footer has 512 bytes");
    if f.cookie != fmt::FOOTER_COOKIE {
        return Ok(Err("no `conectix` cookie".into()));
    }
    let sum = checksum(&buf, FOOTER_CHECKSUM);
    if sum != f.checksum.get() {
        return Ok(Err(format!("checksum {:#010x}, computed {sum:#010x}", f.checksum)));
    }
    Ok(Ok(f))
}

/// Whether the file ends or begins as a VHD does.
pub(crate) fn probe(storage: &dyn Storage) -> bool {
    let at_end = storage.length().unwrap_or(0).saturating_sub(512);
    [0, at_end].into_iter().any(|at| matches!(read_footer(storage, at), Ok(Ok(_))))
}

impl VhdFile {
    pub fn open(storage: Arc<dyn Storage>) -> Result<Self> {
        let bad = |m: String| Error::malformed(Structure::Footer, m);
        let length = storage.length().map_err(Error::io(storage.path(), "read the length"))?;
        if length < 512 {
            return Err(bad(format!("a file of {length} bytes is too short")));
        }
        let end = length - 512;
        let (footer, footer_at, footer_intact) = match read_footer(&*storage, end)? {
            Ok(f) => (f, end, true),
            Err(at_end) => match read_footer(&*storage, 0)? {
                // Dynamic images have a copy at the start.
                Ok(f) if f.disk_type.get() != fmt::TYPE_FIXED => (f, length, false),
                _ => return Err(bad(at_end)),
            },
        };
        if footer.version.get() >> 16 != fmt::VERSION >> 16 {
            return Err(Error::Unsupported(format!("VHD version {:#x}, expected {:#x}", footer.version, fmt::VERSION)));
        }
        let size = footer.current_size.get();
        if size == 0 || size % fmt::SECTOR != 0 || size > fmt::MAX_DISK_SIZE {
            return Err(bad(format!("disk size {size}: expected a multiple of 512 up to 2040 GiB")));
        }
        let kind = footer.disk_type.get();
        let dynamic = match kind {
            fmt::TYPE_FIXED => {
                if size > footer_at {
                    return Err(bad(format!("a fixed disk of {size} bytes in a file of {length}")));
                }
                None
            }
            fmt::TYPE_DYNAMIC | fmt::TYPE_DIFFERENCING => Some(read_dynamic(&*storage, &footer, length)?),
            t => return Err(Error::Unsupported(format!("VHD disk type {t}, expected 2, 3 or 4"))),
        };
        Ok(Self { storage, footer, dynamic, footer_at, footer_intact })
    }
}

fn read_dynamic(storage: &dyn Storage, footer: &fmt::Footer, length: u64) -> Result<Dynamic> {
    let bad = |m: String| Error::malformed(Structure::DynamicHeader, m);
    let header_at = footer.data_offset.get();
    let inside = |at: u64, len: u64| at.checked_add(len).is_some_and(|e| e <= length);
    if !header_at.is_multiple_of(fmt::SECTOR) || header_at < 512 || !inside(header_at, 1024) {
        return Err(bad(format!("it should be at {header_at:#x}, which is not in the file")));
    }
    let mut buf = [0; 1024];
    storage.read_at(&mut buf, header_at).map_err(Error::io(storage.path(), "read the dynamic header"))?;
    let header = fmt::DynamicHeader::read_from_bytes(&buf).expect("a dynamic header has 1024 bytes");
    if header.cookie != fmt::DYNAMIC_COOKIE {
        return Err(bad("no `cxsparse` cookie".into()));
    }
    let sum = checksum(&buf, HEADER_CHECKSUM);
    if sum != header.checksum.get() {
        return Err(bad(format!("checksum {:#010x}, computed {sum:#010x}", header.checksum)));
    }
    let block = header.block_size.get();
    if !block.is_power_of_two() || !(64 << 10..=256 << 20).contains(&block) {
        return Err(Error::Unsupported(format!("VHD block size {block}: expected a power of two, 64 KiB to 256 MiB")));
    }
    let needed = footer.current_size.get().div_ceil(u64::from(block));
    let entries = u64::from(header.max_table_entries.get());
    if entries < needed {
        return Err(bad(format!("{entries} BAT entries, the disk needs {needed}")));
    }
    let table_at = header.table_offset.get();
    if table_at % fmt::SECTOR != 0 || table_at < 512 || !inside(table_at, needed * 4) {
        return Err(bad(format!("the BAT of {entries} entries at {table_at:#x} is not in the file")));
    }
    let mut reserved = vec![
        Range { offset: 0, length: 512 },
        Range { offset: header_at, length: 1024 },
        Range { offset: table_at, length: (needed * 4).next_multiple_of(512) },
    ];
    if reserved[1].overlaps(table_at, reserved[2].length) {
        return Err(bad("the BAT overlaps the header".into()));
    }
    let mut parent = None;
    if footer.disk_type.get() == fmt::TYPE_DIFFERENCING {
        let mut p = ParentRef {
            id: Uuid::from_bytes(header.parent_unique_id),
            relative: Vec::new(),
            absolute: Vec::new(),
            time_stamp: header.parent_time_stamp.get(),
            name: String::new(),
        };
        for l in &header.parent_locators {
            if l.platform_code == [0; 4] {
                continue;
            }
            let (at, len) = (l.platform_data_offset.get(), u64::from(l.platform_data_length.get()));
            if len > 64 << 10 || !inside(at, len) {
                return Err(Error::malformed(Structure::ParentLocator, format!("{len} bytes at {at:#x}")));
            }
            let mut data = vec![0; len as usize];
            storage.read_at(&mut data, at).map_err(Error::io(storage.path(), "read a parent locator"))?;
            reserved.push(Range { offset: at, length: len });
            match l.platform_code {
                fmt::PLATFORM_W2RU => p.relative.extend(utf16le(&data)),
                fmt::PLATFORM_W2KU => p.absolute.extend(utf16le(&data)),
                fmt::PLATFORM_MACX => {
                    let url = String::from_utf8_lossy(&data);
                    p.absolute.extend(url.trim_end_matches('\0').strip_prefix("file://").map(str::to_string));
                }
                _ => {}
            }
        }
        let name: Vec<u16> = header.parent_unicode_name.iter().map(|u| u.get()).take_while(|&u| u != 0).collect();
        if let Ok(name) = String::from_utf16(&name)
            && !name.is_empty()
        {
            p.relative.push(name);
        }
        parent = Some(p);
    }
    Ok(Dynamic { header, parent, reserved })
}

/// Cylinders, heads, sectors per track for a size ("CHS Calculation" in the specification's appendix).
pub(crate) fn geometry(size: u64) -> fmt::Geometry {
    let total = (size / fmt::SECTOR).min(65535 * 16 * 255);
    let (mut spt, mut heads, mut per_head);
    if total >= 65535 * 16 * 63 {
        (spt, heads) = (255, 16);
        per_head = total / spt;
    } else {
        spt = 17;
        per_head = total / spt;
        heads = per_head.div_ceil(1024).max(4);
        if per_head >= heads * 1024 || heads > 16 {
            (spt, heads) = (31, 16);
            per_head = total / spt;
        }
        if per_head >= heads * 1024 {
            (spt, heads) = (63, 16);
            per_head = total / spt;
        }
    }
    fmt::Geometry { cylinders: ((per_head / heads) as u16).into(), heads: heads as u8, sectors_per_track: spt as u8 }
}

/// What a new VHD shall be.
#[derive(Debug, Clone)]
pub(crate) struct NewVhd {
    pub size: u64,
    pub kind: u32,
    pub block_size: u32,
    pub id: Uuid,
    pub parent: Option<NewParent>,
}

/// The parent of a new differencing VHD.
#[derive(Debug, Clone)]
pub(crate) struct NewParent {
    pub id: Uuid,
    pub time_stamp: u32,
    pub name: String,
    pub relative: Option<String>,
    pub absolute: String,
}

fn now() -> u32 {
    let unix = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs());
    unix.saturating_sub(fmt::EPOCH_OFFSET) as u32
}

/// Writes all structures into an empty file and makes them durable.
pub(crate) fn create(storage: &dyn Storage, n: &NewVhd) -> Result<()> {
    if n.size == 0 || n.size > fmt::MAX_DISK_SIZE || !n.size.is_multiple_of(fmt::SECTOR) {
        return Err(Error::Parameter(format!("size {}: a VHD takes multiples of 512 bytes up to 2040 GiB", n.size)));
    }
    if !n.block_size.is_power_of_two() || !(64 << 10..=256 << 20).contains(&n.block_size) {
        return Err(Error::Parameter(format!(
            "block size {}: expected a power of two, 64 KiB to 256 MiB",
            n.block_size
        )));
    }
    let io = |e| Error::io(storage.path(), "create the image")(e);
    let fixed = n.kind == fmt::TYPE_FIXED;
    let mut footer = fmt::Footer {
        cookie: fmt::FOOTER_COOKIE,
        features: fmt::FEATURES_RESERVED.into(),
        version: fmt::VERSION.into(),
        data_offset: if fixed { u64::MAX } else { 512 }.into(),
        time_stamp: now().into(),
        // As Hyper-V writes it: readers decide by it whether size or geometry counts.
        creator_application: *b"win ",
        creator_version: 0x000a_0000.into(),
        creator_host_os: *b"Wi2k",
        original_size: n.size.into(),
        current_size: n.size.into(),
        geometry: geometry(n.size),
        disk_type: n.kind.into(),
        checksum: 0.into(),
        unique_id: *n.id.as_bytes(),
        saved_state: 0,
        reserved: [0; 427],
    };
    let footer_bytes = seal_footer(&mut footer);
    if fixed {
        storage.set_length(n.size + 512).map_err(io)?;
        storage.write_at(&footer_bytes, n.size).map_err(io)?;
        return storage.sync().map_err(io);
    }
    let entries = n.size.div_ceil(u64::from(n.block_size));
    let (header_at, mut locator_at) = (512u64, 1536u64);
    let mut header = fmt::DynamicHeader::new_zeroed_header();
    header.max_table_entries = (entries as u32).into();
    header.block_size = n.block_size.into();
    let mut locators = Vec::new();
    if let Some(p) = &n.parent {
        header.parent_unique_id = *p.id.as_bytes();
        header.parent_time_stamp = p.time_stamp.into();
        for (slot, u) in header.parent_unicode_name.iter_mut().zip(p.name.encode_utf16().take(255)) {
            *slot = u.into();
        }
        let utf16 = |s: &str| s.encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<u8>>();
        let mut list = vec![(fmt::PLATFORM_W2KU, utf16(&p.absolute))];
        if let Some(r) = &p.relative {
            list.push((fmt::PLATFORM_W2RU, utf16(r)));
        }
        for (slot, (code, data)) in header.parent_locators.iter_mut().zip(list) {
            let space = data.len().next_multiple_of(512) as u64;
            *slot = fmt::ParentLocator {
                platform_code: code,
                platform_data_space: (space as u32).into(),
                platform_data_length: (data.len() as u32).into(),
                reserved: 0.into(),
                platform_data_offset: locator_at.into(),
            };
            locators.push((locator_at, data));
            locator_at += space;
        }
    }
    let table_at = locator_at;
    header.table_offset = table_at.into();
    seal_header(&mut header);
    let table_len = (entries * 4).next_multiple_of(512);
    let end = table_at + table_len;
    storage.write_at(&footer_bytes, 0).map_err(io)?;
    storage.write_at(header.as_bytes(), header_at).map_err(io)?;
    for (at, data) in locators {
        storage.write_at(&data, at).map_err(io)?;
    }
    let unused = vec![0xff; 1 << 20];
    let mut at = table_at;
    while at < end {
        let len = (end - at).min(unused.len() as u64);
        storage.write_at(&unused[..len as usize], at).map_err(io)?;
        at += len;
    }
    storage.write_at(&footer_bytes, end).map_err(io)?;
    storage.sync().map_err(io)
}

/// Changes the identity of a closed image that nobody else sees yet.
pub(crate) fn set_id(storage: &dyn Storage, id: Uuid) -> Result<()> {
    let io = |e| Error::io(storage.path(), "write the footer")(e);
    let length = storage.length().map_err(io)?;
    let mut footer =
        read_footer(storage, length.saturating_sub(512))?.map_err(|m| Error::malformed(Structure::Footer, m))?;
    footer.unique_id = *id.as_bytes();
    let bytes = seal_footer(&mut footer);
    storage.write_at(&bytes, length - 512).map_err(io)?;
    if footer.disk_type.get() != fmt::TYPE_FIXED {
        storage.write_at(&bytes, 0).map_err(io)?;
    }
    storage.sync().map_err(io)
}

impl fmt::DynamicHeader {
    fn new_zeroed_header() -> Self {
        let mut h: Self = zerocopy::FromZeros::new_zeroed();
        h.cookie = fmt::DYNAMIC_COOKIE;
        h.data_offset = u64::MAX.into();
        h.header_version = fmt::VERSION.into();
        h
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values of the specification's algorithm, worked out by hand at its turning points.
    #[test]
    fn geometry_follows_the_appendix() {
        let chs = |size: u64| {
            let g = geometry(size);
            (g.cylinders.get(), g.heads, g.sectors_per_track)
        };
        assert_eq!(chs(1 << 20), (30, 4, 17));
        assert_eq!(chs(100 << 20), (1003, 12, 17));
        assert_eq!(chs(1 << 30), (2080, 16, 63));
        assert_eq!(chs(2040 << 30), (65535, 16, 255));
    }
}
