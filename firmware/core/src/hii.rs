//! Package lists of the Human Interface Infrastructure (UEFI 2.10, section 33.3): strings are understood, other packages
//! are kept as they came.

use crate::bytes::{slice, u16_at, u32_at};
use crate::guid::Guid;
use alloc::collections::BTreeMap;
use alloc::string::String;
use alloc::vec::Vec;

/// Package types (section 33.3.1.2).
pub mod kind {
    /// Wildcard for searches.
    pub const ALL: u8 = 0x00;
    /// Strings.
    pub const STRINGS: u8 = 0x04;
    /// End of a list.
    pub const END: u8 = 0xdf;
}

/// Bytes of a package list's header: GUID and length.
const LIST_HEADER: usize = 20;
/// Bytes of a string package's header before the language.
const STRING_HEADER: usize = 46;
/// Most bytes of a list.
pub const MAX_LIST: usize = 4 << 20;
/// Most strings of a language: identifiers are 16 bits.
const MAX_ID: u16 = 0xffff;

/// Strings of one language.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Language {
    /// RFC 4646 name, such as `en-US`.
    pub name: String,
    /// The rest of the header: language window and the string that names the language.
    header: [u8; 34],
    strings: BTreeMap<u16, Vec<u16>>,
}

/// A package list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackageList {
    /// Its GUID.
    pub guid: Guid,
    /// Languages in the order of their packages.
    pub languages: Vec<Language>,
    /// Other packages: type and all bytes with the header.
    pub others: Vec<(u8, Vec<u8>)>,
}

/// Why a string is not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoString {
    /// No such string in any language.
    NotFound,
    /// It exists, but not in this language.
    Language,
}

impl PackageList {
    /// Reads a list; `None` if it is damaged.
    pub fn parse(data: &[u8]) -> Option<Self> {
        let len = u32_at(data, 16)? as usize;
        let data = data.get(..len).filter(|d| d.len() >= LIST_HEADER && d.len() <= MAX_LIST)?;
        let mut list = Self { guid: Guid::read(data, 0)?, languages: Vec::new(), others: Vec::new() };
        let mut at = LIST_HEADER;
        while at < data.len() {
            let header = u32_at(data, at)?;
            let (size, kind) = (header as usize & 0xff_ffff, (header >> 24) as u8);
            let package = slice(data, at, size).filter(|p| p.len() >= 4)?;
            match kind {
                kind::END => return Some(list),
                kind::STRINGS => list.languages.push(Language::parse(package)?),
                _ => list.others.push((kind, package.to_vec())),
            }
            at += size;
        }
        // The end must be marked.
        None
    }

    /// The list as bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = self.guid.0.to_vec();
        out.extend([0; 4]);
        self.languages.iter().for_each(|l| l.encode(&mut out));
        self.others.iter().for_each(|(_, bytes)| out.extend_from_slice(bytes));
        out.extend((u32::from(kind::END) << 24 | 4).to_le_bytes());
        let len = (out.len() as u32).to_le_bytes();
        out[16..20].copy_from_slice(&len);
        out
    }

    /// Types of its packages, each once for a package.
    pub fn kinds(&self) -> impl Iterator<Item = u8> {
        self.languages.iter().map(|_| kind::STRINGS).chain(self.others.iter().map(|o| o.0))
    }

    fn language(&mut self, name: &str) -> Option<&mut Language> {
        self.languages.iter_mut().find(|l| l.name.eq_ignore_ascii_case(name))
    }

    /// A string in a language.
    ///
    /// # Errors
    /// Whether it is missing at all or in this language.
    pub fn string(&self, language: &str, id: u16) -> Result<&[u16], NoString> {
        let of = |l: &'_ Language| l.strings.contains_key(&id);
        match self.languages.iter().find(|l| l.name.eq_ignore_ascii_case(language)).and_then(|l| l.strings.get(&id)) {
            Some(s) => Ok(s),
            None if self.languages.iter().any(of) => Err(NoString::Language),
            None => Err(NoString::NotFound),
        }
    }

    /// Adds a string in a language (which is made if it is new) and says its identifier; `None` if all are taken.
    pub fn add(&mut self, language: &str, text: &[u16]) -> Option<u16> {
        let last = self.languages.iter().filter_map(|l| l.strings.keys().next_back().copied()).max().unwrap_or(1);
        let id = last.checked_add(1).filter(|id| *id < MAX_ID)?;
        if self.language(language).is_none() {
            let mut strings = BTreeMap::new();
            strings.insert(1, language.encode_utf16().collect());
            let mut header = [0; 34];
            header[32] = 1;
            self.languages.push(Language { name: language.into(), header, strings });
        }
        self.language(language)?.strings.insert(id, text.to_vec());
        Some(id)
    }

    /// Replaces a string that exists in a language; `false` if it does not.
    pub fn replace(&mut self, language: &str, id: u16, text: &[u16]) -> bool {
        match self.language(language).and_then(|l| l.strings.get_mut(&id)) {
            Some(s) => {
                *s = text.to_vec();
                true
            }
            None => false,
        }
    }
}

impl Language {
    fn parse(package: &[u8]) -> Option<Self> {
        let header_size = u32_at(package, 4)? as usize;
        let strings_at = u32_at(package, 8)? as usize;
        let name = package.get(STRING_HEADER..header_size)?;
        let name = &name[..name.iter().position(|b| *b == 0)?];
        let name = core::str::from_utf8(name).ok().filter(|n| n.is_ascii())?;
        let mut header = [0; 34];
        header.copy_from_slice(package.get(12..STRING_HEADER)?);
        Some(Self { name: name.into(), header, strings: strings(package.get(strings_at..)?)? })
    }

    fn encode(&self, out: &mut Vec<u8>) {
        let start = out.len();
        let header_size = (STRING_HEADER + self.name.len() + 1) as u32;
        out.extend([0; 4]);
        out.extend(header_size.to_le_bytes());
        out.extend(header_size.to_le_bytes());
        out.extend(self.header);
        out.extend(self.name.bytes().chain([0]));
        let mut next = 1u16;
        for (id, text) in &self.strings {
            if *id != next {
                out.push(block::SKIP2);
                out.extend((id - next).to_le_bytes());
            }
            out.push(block::STRING_UCS2);
            text.iter().chain(&[0]).for_each(|u| out.extend(u.to_le_bytes()));
            next = id.saturating_add(1);
        }
        out.push(block::END);
        let size = (out.len() - start) as u32 | u32::from(kind::STRINGS) << 24;
        out[start..start + 4].copy_from_slice(&size.to_le_bytes());
    }
}

/// Types of blocks of string information (section 33.3.6.2).
mod block {
    pub const END: u8 = 0x00;
    pub const STRING_SCSU: u8 = 0x10;
    pub const STRING_SCSU_FONT: u8 = 0x11;
    pub const STRINGS_SCSU: u8 = 0x12;
    pub const STRINGS_SCSU_FONT: u8 = 0x13;
    pub const STRING_UCS2: u8 = 0x14;
    pub const STRING_UCS2_FONT: u8 = 0x15;
    pub const STRINGS_UCS2: u8 = 0x16;
    pub const STRINGS_UCS2_FONT: u8 = 0x17;
    pub const DUPLICATE: u8 = 0x20;
    pub const SKIP2: u8 = 0x21;
    pub const SKIP1: u8 = 0x22;
    pub const EXT1: u8 = 0x30;
    pub const EXT2: u8 = 0x31;
    pub const EXT4: u8 = 0x32;
}

/// The strings of a package, by identifier.
fn strings(d: &[u8]) -> Option<BTreeMap<u16, Vec<u16>>> {
    let mut found: BTreeMap<u16, Vec<u16>> = BTreeMap::new();
    let mut id = 1u16;
    let mut at = 0;
    loop {
        let kind = *d.get(at)?;
        // Where the texts begin, how many there are, and whether they are in bytes.
        let (start, count, narrow) = match kind {
            block::END => return Some(found),
            block::STRING_SCSU => (at + 1, 1, true),
            block::STRING_SCSU_FONT => (at + 2, 1, true),
            block::STRINGS_SCSU => (at + 3, u16_at(d, at + 1)?, true),
            block::STRINGS_SCSU_FONT => (at + 4, u16_at(d, at + 2)?, true),
            block::STRING_UCS2 => (at + 1, 1, false),
            block::STRING_UCS2_FONT => (at + 2, 1, false),
            block::STRINGS_UCS2 => (at + 3, u16_at(d, at + 1)?, false),
            block::STRINGS_UCS2_FONT => (at + 4, u16_at(d, at + 2)?, false),
            block::DUPLICATE => {
                let same = found.get(&u16_at(d, at + 1)?)?.clone();
                found.insert(id, same);
                id = id.checked_add(1)?;
                at += 3;
                continue;
            }
            block::SKIP2 => {
                id = id.checked_add(u16_at(d, at + 1)?)?;
                at += 3;
                continue;
            }
            block::SKIP1 => {
                id = id.checked_add(u16::from(*d.get(at + 1)?))?;
                at += 2;
                continue;
            }
            block::EXT1 | block::EXT2 | block::EXT4 => {
                let len = match kind {
                    block::EXT1 => usize::from(*d.get(at + 2)?),
                    block::EXT2 => usize::from(u16_at(d, at + 2)?),
                    _ => u32_at(d, at + 2)? as usize,
                };
                // The length has the header in it; fonts and the like are not our strings.
                at = at.checked_add(len).filter(|_| len >= 3)?;
                continue;
            }
            _ => return None,
        };
        at = start;
        for _ in 0..count {
            let mut text = Vec::new();
            loop {
                let unit = if narrow { u16::from(*d.get(at)?) } else { u16_at(d, at)? };
                at += if narrow { 1 } else { 2 };
                if unit == 0 {
                    break;
                }
                text.push(unit);
            }
            found.insert(id, text);
            id = id.checked_add(1)?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec;

    fn wide(text: &str) -> Vec<u16> {
        text.encode_utf16().collect()
    }

    fn list(blocks: &[u8]) -> Vec<u8> {
        let name = b"en-US\0";
        let header = (STRING_HEADER + name.len()) as u32;
        let mut package = ((header + blocks.len() as u32) | 4 << 24).to_le_bytes().to_vec();
        package.extend(header.to_le_bytes());
        package.extend(header.to_le_bytes());
        package.extend([0; 34]);
        package.extend(name);
        package.extend(blocks);
        let mut all = vec![7; 16];
        all.extend((LIST_HEADER as u32 + package.len() as u32 + 4).to_le_bytes());
        all.extend(package);
        all.extend([4, 0, 0, 0xdf]);
        all
    }

    #[test]
    fn every_kind_of_block() {
        let blocks = [
            &[0x10][..],
            b"one\0",
            &[0x22, 2, 0x14],
            &[b'4', 0, 0, 0],
            &[0x16, 2, 0, b'5', 0, 0, 0, b'6', 0, 0, 0],
            &[0x20, 1, 0, 0x21, 1, 0],
            &[0x31, 0x40, 6, 0, 9, 9, 0x13, 1, 2, 0],
            b"nine\0ten\0",
            &[0x17, 1, 1, 0, b'x', 0, 0, 0, 0],
        ]
        .concat();
        let parsed = PackageList::parse(&list(&blocks)).unwrap();
        let get = |id| parsed.string("en-us", id).map(String::from_utf16_lossy);
        for (id, text) in [(1, "one"), (4, "4"), (5, "5"), (6, "6"), (7, "one"), (9, "nine"), (10, "ten"), (11, "x")] {
            assert_eq!(get(id).unwrap(), text);
        }
        assert_eq!(get(2), Err(NoString::NotFound));
        assert_eq!(parsed.string("fr", 1), Err(NoString::Language));
        assert_eq!(PackageList::parse(&parsed.encode()).unwrap(), parsed, "written and read again");
    }

    #[test]
    fn strings_are_added_and_replaced() {
        let mut l = PackageList::parse(&list(&[0x10, b'a', 0, 0])).unwrap();
        assert_eq!(l.add("en-US", &wide("b")), Some(2));
        assert_eq!(l.add("fr", &wide("c")), Some(3));
        assert!(l.replace("en-US", 2, &wide("bb")) && !l.replace("en-US", 3, &wide("no")));
        let again = PackageList::parse(&l.encode()).unwrap();
        assert_eq!(again.string("en-US", 2).unwrap(), wide("bb"));
        assert_eq!(again.string("fr", 3).unwrap(), wide("c"));
        assert_eq!(again.languages.len(), 2);
    }

    #[test]
    fn damage_is_refused() {
        let good = list(&[0x14, b'a', 0, 0, 0, 0]);
        assert!(PackageList::parse(&good).is_some());
        for len in 0..good.len() {
            assert!(PackageList::parse(&good[..len]).is_none(), "{len} bytes");
        }
        for blocks in
            [&[0x99, 0][..], &[0x20, 5, 0, 0], &[0x10, b'a'], &[0x21, 0xff, 0xff, 0x21, 0xff, 0xff, 0], &[0x30, 0, 0]]
        {
            assert!(PackageList::parse(&list(blocks)).is_none(), "{blocks:x?}");
        }
    }
}
