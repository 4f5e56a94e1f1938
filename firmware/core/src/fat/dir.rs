//! Directories: entries, short and long names.

use super::{FatError, FatResult, FatVolume};
use crate::block::{BlockDevice, read_bytes, write_bytes};
use crate::bytes::{u16_at, u32_at};
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

/// Attribute bits of a directory entry.
pub mod attribute {
    #![allow(missing_docs)]
    pub const READ_ONLY: u8 = 1;
    pub const HIDDEN: u8 = 2;
    pub const SYSTEM: u8 = 4;
    pub const VOLUME_ID: u8 = 8;
    pub const DIRECTORY: u8 = 0x10;
    pub const ARCHIVE: u8 = 0x20;
    pub const LONG_NAME: u8 = 0xf;
}

/// Longest long name in UTF-16 units.
const MAX_NAME: usize = 255;
/// Largest directory (section 6.4: 2 MiB).
const MAX_DIRECTORY: usize = 2 << 20;

/// Date and time as FAT packs them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FatTime {
    /// Bits 15-9 years since 1980, 8-5 month, 4-0 day.
    pub date: u16,
    /// Bits 15-11 hours, 10-5 minutes, 4-0 half seconds.
    pub time: u16,
}

impl FatTime {
    /// Packs a date and time; years that FAT cannot say become the nearest that it can.
    pub fn new(year: u16, month: u8, day: u8, hour: u8, minute: u8, second: u8) -> Self {
        let year = year.clamp(1980, 2107) - 1980;
        Self {
            date: year << 9 | u16::from(month & 15) << 5 | u16::from(day & 31),
            time: u16::from(hour & 31) << 11 | u16::from(minute & 63) << 5 | u16::from(second.min(59) / 2),
        }
    }
}

/// Which directory: the root, or the one that starts at a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Directory {
    /// Root directory.
    Root,
    /// First cluster.
    At(u32),
}

/// A file or directory, as its directory entry describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Long name if there is one, else the short one.
    pub name: String,
    /// Attributes, see [`attribute`].
    pub attributes: u8,
    /// First cluster; 0 for an empty file (and for `..` to the root).
    pub first: u32,
    /// Bytes; 0 for directories.
    pub size: u32,
    /// Created.
    pub created: FatTime,
    /// Last read (date only).
    pub accessed: FatTime,
    /// Last written.
    pub modified: FatTime,
    /// The directory that holds it.
    pub(super) parent: Directory,
    /// Slots of its entry: first (of the long name) and the short entry itself.
    pub(super) slots: (usize, usize),
}

impl Node {
    /// Is it a directory?
    pub fn is_directory(&self) -> bool {
        self.attributes & attribute::DIRECTORY != 0
    }
    /// The directory that it is.
    pub fn as_directory(&self) -> FatResult<Directory> {
        match self.is_directory() {
            true if self.first == 0 => Ok(Directory::Root),
            true => Ok(Directory::At(self.first)),
            false => Err(FatError::WrongKind),
        }
    }
}

impl<D: BlockDevice> FatVolume<D> {
    /// Device offsets of a directory's pieces: offset and bytes.
    fn pieces(&mut self, directory: Directory) -> FatResult<Vec<(u64, u64)>> {
        let first = match directory {
            Directory::Root if self.root_cluster == 0 => return Ok(vec![(self.root_offset, self.root_size)]),
            Directory::Root => self.root_cluster,
            Directory::At(first) => first,
        };
        let size = self.cluster_size;
        self.chain(first)?.into_iter().map(|c| Ok((self.cluster_offset(c)?, size))).collect()
    }

    fn directory_bytes(&mut self, directory: Directory) -> FatResult<Vec<u8>> {
        let mut all = Vec::new();
        for (offset, len) in self.pieces(directory)? {
            if all.len() >= MAX_DIRECTORY {
                break;
            }
            let at = all.len();
            all.resize(at + len as usize, 0);
            read_bytes(&mut self.device, offset, &mut all[at..])?;
        }
        Ok(all)
    }

    /// Writes one 32-byte slot.
    pub(super) fn write_slot(&mut self, directory: Directory, slot: usize, entry: &[u8]) -> FatResult<()> {
        let mut at = slot as u64 * 32;
        for (offset, len) in self.pieces(directory)? {
            if at < len {
                return Ok(write_bytes(&mut self.device, offset + at, entry)?);
            }
            at -= len;
        }
        Err(FatError::Corrupt("a directory entry is outside its directory"))
    }

    pub(super) fn read_slot(&mut self, directory: Directory, slot: usize) -> FatResult<[u8; 32]> {
        let mut at = slot as u64 * 32;
        for (offset, len) in self.pieces(directory)? {
            if at < len {
                let mut e = [0; 32];
                read_bytes(&mut self.device, offset + at, &mut e)?;
                return Ok(e);
            }
            at -= len;
        }
        Err(FatError::Corrupt("a directory entry is outside its directory"))
    }

    /// Entries of a directory, `.` and `..` included (the root has none), volume labels not.
    pub fn read_directory(&mut self, directory: Directory) -> FatResult<Vec<Node>> {
        let data = self.directory_bytes(directory)?;
        let mut found = Vec::new();
        let mut long = LongName::default();
        for (slot, e) in data.chunks_exact(32).enumerate() {
            match e[0] {
                0 => break,
                0xe5 => long.clear(),
                _ if e[11] & 0x3f == attribute::LONG_NAME => long.push(e, slot),
                _ if e[11] & attribute::VOLUME_ID != 0 => long.clear(),
                _ => {
                    let (first_slot, name) = long.take(e).unwrap_or_else(|| (slot, short_name(e)));
                    found.push(node(e, name, directory, (first_slot, slot)));
                }
            }
        }
        Ok(found)
    }

    /// Volume label, if the root directory has one.
    pub fn label(&mut self) -> FatResult<Option<String>> {
        let data = self.directory_bytes(Directory::Root)?;
        let found = data
            .chunks_exact(32)
            .take_while(|e| e[0] != 0)
            .find(|e| e[0] != 0xe5 && e[11] & 0x3f != attribute::LONG_NAME && e[11] & attribute::VOLUME_ID != 0);
        Ok(found.map(|e| e[..11].iter().map(|b| char::from(*b)).collect::<String>().trim_end().into()))
    }

    /// Finds a name in a directory, without regard to case.
    pub fn lookup(&mut self, directory: Directory, name: &str) -> FatResult<Node> {
        let entries = self.read_directory(directory)?;
        entries.into_iter().find(|n| same_name(&n.name, name)).ok_or(FatError::NotFound)
    }

    /// Creates an empty file or directory.
    pub fn create(&mut self, directory: Directory, name: &str, attributes: u8, now: FatTime) -> FatResult<Node> {
        let units = check_name(name)?;
        let existing = self.directory_bytes(directory)?;
        if self.read_directory(directory)?.iter().any(|n| same_name(&n.name, name)) {
            return Err(FatError::Exists);
        }
        let (short, needs_long) = make_short(name, &existing);
        let long_slots = if needs_long { units.len().div_ceil(13) } else { 0 };
        let slot = self.free_slots(directory, &existing, long_slots + 1)?;
        let mut e = [0u8; 32];
        e[..11].copy_from_slice(&short);
        e[11] = attributes & 0x37;
        for (at, value) in [(14, now.time), (16, now.date), (18, now.date), (22, now.time), (24, now.date)] {
            e[at..at + 2].copy_from_slice(&value.to_le_bytes());
        }
        let is_directory = attributes & attribute::DIRECTORY != 0;
        if is_directory {
            let first = self.allocate(None, true)?;
            set_first(&mut e, first);
            let mut dots = [0u8; 64];
            dots[..32].copy_from_slice(&e);
            dots[..11].copy_from_slice(b".          ");
            dots[32..].copy_from_slice(&e);
            dots[32..43].copy_from_slice(b"..         ");
            // The root directory is cluster 0 in "..", on FAT32 too.
            let up = match directory {
                Directory::Root => 0,
                Directory::At(c) => c,
            };
            set_first(&mut dots[32..], up);
            let offset = self.cluster_offset(first)?;
            write_bytes(&mut self.device, offset, &dots)?;
        }
        // The long name first and the short entry last: until that is written, nothing refers to the file.
        let sum = checksum(&short);
        for i in 0..long_slots {
            let entry = long_entry(&units, long_slots - i, i == 0, sum);
            self.write_slot(directory, slot + i, &entry)?;
        }
        self.write_slot(directory, slot + long_slots, &e)?;
        Ok(node(&e, String::from(name), directory, (slot, slot + long_slots)))
    }

    /// First of `count` free slots in a row; the directory grows if it must.
    fn free_slots(&mut self, directory: Directory, data: &[u8], count: usize) -> FatResult<usize> {
        let (mut run, mut ended) = (0, false);
        for (slot, e) in data.chunks_exact(32).enumerate() {
            ended |= e[0] == 0;
            run = if ended || e[0] == 0xe5 { run + 1 } else { 0 };
            if run == count {
                return Ok(slot + 1 - count);
            }
        }
        let first = match directory {
            Directory::Root if self.root_cluster == 0 => return Err(FatError::Full),
            Directory::Root => self.root_cluster,
            Directory::At(c) => c,
        };
        let slots = data.len() / 32;
        let mut last = *self.chain(first)?.last().ok_or(FatError::Corrupt("a directory has no clusters"))?;
        let mut have = run;
        while have < count {
            if data.len() >= MAX_DIRECTORY {
                return Err(FatError::Full);
            }
            last = self.allocate(Some(last), true)?;
            have += self.cluster_size as usize / 32;
        }
        Ok(slots - run)
    }

    /// Deletes a file, or a directory that is empty.
    pub fn remove(&mut self, node: &Node) -> FatResult<()> {
        if node.attributes & attribute::READ_ONLY != 0 {
            return Err(FatError::ReadOnly);
        }
        if node.is_directory() {
            let inside = self.read_directory(node.as_directory()?)?;
            if inside.iter().any(|n| n.name != "." && n.name != "..") {
                return Err(FatError::NotEmpty);
            }
        }
        self.unlink(node)?;
        self.release(node.first)
    }

    fn unlink(&mut self, node: &Node) -> FatResult<()> {
        for slot in node.slots.0..=node.slots.1 {
            let mut e = self.read_slot(node.parent, slot)?;
            e[0] = 0xe5;
            self.write_slot(node.parent, slot, &e)?;
        }
        Ok(())
    }

    /// Gives a file another name in its directory; contents, attributes and times stay.
    pub fn rename(&mut self, node: &mut Node, name: &str) -> FatResult<()> {
        if self.lookup(node.parent, name).is_ok_and(|other| other.slots != node.slots) {
            return Err(FatError::Exists);
        }
        let old = node.clone();
        let keep = self.read_slot(old.parent, old.slots.1)?;
        self.unlink(&old)?;
        let mut new = self.create(old.parent, name, 0, FatTime::default())?;
        let mut e = self.read_slot(new.parent, new.slots.1)?;
        e[11..].copy_from_slice(&keep[11..]);
        self.write_slot(new.parent, new.slots.1, &e)?;
        core::mem::swap(&mut new.slots, &mut node.slots);
        node.name = new.name;
        Ok(())
    }

    /// Writes a node's attributes, times, first cluster and size back to its entry.
    pub fn update(&mut self, node: &Node) -> FatResult<()> {
        let mut e = self.read_slot(node.parent, node.slots.1)?;
        e[11] = e[11] & !0x27 | node.attributes & 0x27;
        let fields = [
            (14, node.created.time),
            (16, node.created.date),
            (18, node.accessed.date),
            (22, node.modified.time),
            (24, node.modified.date),
        ];
        for (at, value) in fields {
            e[at..at + 2].copy_from_slice(&value.to_le_bytes());
        }
        set_first(&mut e, node.first);
        e[28..32].copy_from_slice(&node.size.to_le_bytes());
        self.write_slot(node.parent, node.slots.1, &e)
    }

    /// Finds a path with `\` or `/` between components; `None` is the root itself.
    pub fn find(&mut self, path: &str) -> FatResult<Option<Node>> {
        let mut current: Option<Node> = None;
        for part in path.split(['\\', '/']).filter(|p| !p.is_empty() && *p != ".") {
            let directory = current.as_ref().map_or(Ok(Directory::Root), Node::as_directory)?;
            current = match (part, directory) {
                ("..", Directory::Root) => None,
                _ => Some(self.lookup(directory, part)?).filter(|n| !(part == ".." && n.first == 0)),
            };
        }
        Ok(current)
    }
}

/// Names are equal without regard to case (ASCII and, by simple mapping, other scripts).
fn same_name(a: &str, b: &str) -> bool {
    a.chars().flat_map(char::to_uppercase).eq(b.chars().flat_map(char::to_uppercase))
}

fn check_name(name: &str) -> FatResult<Vec<u16>> {
    let units: Vec<u16> = name.encode_utf16().collect();
    let bad = |c: char| c < ' ' || "\"*/:<>?\\|".contains(c);
    if units.is_empty() || units.len() > MAX_NAME || name.chars().any(bad) || matches!(name, "." | "..") {
        return Err(FatError::BadName);
    }
    if name.ends_with(['.', ' ']) {
        return Err(FatError::BadName);
    }
    Ok(units)
}

fn node(e: &[u8], name: String, parent: Directory, slots: (usize, usize)) -> Node {
    let f = |at| u16_at(e, at).unwrap_or(0);
    Node {
        name,
        attributes: e[11],
        first: u32::from(f(20)) << 16 | u32::from(f(26)),
        size: u32_at(e, 28).unwrap_or(0),
        created: FatTime { date: f(16), time: f(14) },
        accessed: FatTime { date: f(18), time: 0 },
        modified: FatTime { date: f(24), time: f(22) },
        parent,
        slots,
    }
}

fn set_first(e: &mut [u8], first: u32) {
    e[20..22].copy_from_slice(&((first >> 16) as u16).to_le_bytes());
    e[26..28].copy_from_slice(&(first as u16).to_le_bytes());
}

/// A short name as text; the case bits that Windows NT keeps in byte 12 are honoured.
fn short_name(e: &[u8]) -> String {
    let part = |range: core::ops::Range<usize>, lower: bool| -> String {
        let text: String = e[range]
            .iter()
            .enumerate()
            // 0x05 stands for 0xE5, which would mean "deleted".
            .map(|(i, b)| if i == 0 && *b == 5 { 0xe5 } else { *b })
            .map(char::from)
            .collect();
        let text = text.trim_end();
        if lower { text.to_ascii_lowercase() } else { String::from(text) }
    };
    let (base, ext) = (part(0..8, e[12] & 8 != 0), part(8..11, e[12] & 0x10 != 0));
    if ext.is_empty() { base } else { base + "." + &ext }
}

/// Checksum of a short name, which ties long entries to it.
fn checksum(short: &[u8]) -> u8 {
    short[..11].iter().fold(0u8, |s, b| s.rotate_right(1).wrapping_add(*b))
}

const LONG_FIELDS: [usize; 13] = [1, 3, 5, 7, 9, 14, 16, 18, 20, 22, 24, 28, 30];

fn long_entry(units: &[u16], order: usize, last: bool, sum: u8) -> [u8; 32] {
    let mut e = [0u8; 32];
    e[0] = order as u8 | if last { 0x40 } else { 0 };
    e[11] = attribute::LONG_NAME;
    e[13] = sum;
    for (i, at) in LONG_FIELDS.into_iter().enumerate() {
        // One terminator, then padding of all ones.
        let unit = match (order - 1) * 13 + i {
            n if n < units.len() => units[n],
            n if n == units.len() => 0,
            _ => 0xffff,
        };
        e[at..at + 2].copy_from_slice(&unit.to_le_bytes());
    }
    e
}

/// Collects the entries of a long name, which come last part first.
#[derive(Default)]
struct LongName {
    units: Vec<u16>,
    expect: u8,
    sum: u8,
    first_slot: usize,
}

impl LongName {
    fn clear(&mut self) {
        self.units.clear();
        self.expect = 0;
    }

    fn push(&mut self, e: &[u8], slot: usize) {
        let order = e[0] & 0x1f;
        if e[0] & 0x40 != 0 && (1..=20).contains(&order) {
            self.units = vec![0xffff; usize::from(order) * 13];
            self.sum = e[13];
            self.first_slot = slot;
        } else if self.units.is_empty() || order == 0 || order != self.expect || e[13] != self.sum {
            return self.clear();
        }
        for (i, at) in LONG_FIELDS.into_iter().enumerate() {
            self.units[(usize::from(order) - 1) * 13 + i] = u16_at(e, at).unwrap_or(0);
        }
        self.expect = order - 1;
        if self.expect == 0 && order != 1 {
            self.clear();
        }
    }

    /// The name, if it is complete and belongs to this short entry.
    fn take(&mut self, short: &[u8]) -> Option<(usize, String)> {
        let units = core::mem::take(&mut self.units);
        let complete = !units.is_empty() && self.expect == 0 && self.sum == checksum(short);
        self.expect = 0;
        if !complete {
            return None;
        }
        let len = units.iter().position(|u| *u == 0 || *u == 0xffff).unwrap_or(units.len());
        let name: String = char::decode_utf16(units[..len].iter().copied()).map(|c| c.unwrap_or('\u{fffd}')).collect();
        Some((self.first_slot, name))
    }
}

/// Makes a short name that no entry of the directory has; says whether a long name is needed beside it.
fn make_short(name: &str, directory: &[u8]) -> ([u8; 11], bool) {
    let (base, ext) = match name.rfind('.') {
        Some(at) if at > 0 => (&name[..at], &name[at + 1..]),
        _ => (name, ""),
    };
    let mut lossy = false;
    let mut clean = |text: &str, max: usize| -> Vec<u8> {
        let mut out = Vec::new();
        for c in text.chars() {
            let c = c.to_ascii_uppercase();
            if c == ' ' || c == '.' {
                lossy = true;
            } else if out.len() == max {
                lossy = true;
                break;
            } else if c.is_ascii_alphanumeric() || "!#$%&'()-@^_`{}~".contains(c) {
                out.push(c as u8);
            } else {
                lossy = true;
                out.push(b'_');
            }
        }
        out
    };
    let (mut base8, ext3) = (clean(base, 8), clean(ext, 3));
    if base8.is_empty() {
        base8.push(b'_');
        lossy = true;
    }
    let pack = |base: &[u8]| {
        let mut out = [b' '; 11];
        out[..base.len()].copy_from_slice(base);
        out[8..8 + ext3.len()].copy_from_slice(&ext3);
        out
    };
    let taken = |short: &[u8; 11]| directory.chunks_exact(32).take_while(|e| e[0] != 0).any(|e| e[..11] == short[..]);
    let plain = pack(&base8);
    let lower = name.chars().any(|c| c.is_lowercase());
    if !lossy && !taken(&plain) {
        return (plain, lower);
    }
    for n in 1..1_000_000u32 {
        let tail = alloc::format!("~{n}");
        let keep = base8.len().min(8 - tail.len());
        let short = pack(&[&base8[..keep], tail.as_bytes()].concat());
        if !taken(&short) {
            return (short, true);
        }
    }
    (plain, true)
}
