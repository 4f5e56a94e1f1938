//! The parent locator (MS-VHDX 2.6.2.6): how a differencing image names its parent.

use uuid::Uuid;
use zerocopy::{FromBytes, IntoBytes};

use crate::error::{Error, Result, Structure};
use crate::format::vhdx as fmt;

/// Keys and values in the order in which they were found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct ParentLocator {
    pub pairs: Vec<(String, String)>,
}

/// More than anybody writes (Hyper-V writes four or five).
const MAX_PAIRS: u16 = 64;

impl ParentLocator {
    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.pairs.iter().find(|(k, _)| k == key).map(|(_, v)| v.as_str())
    }

    /// A locator for a parent with this DataWriteGuid.
    pub fn new(linkage: Uuid, relative: Option<&str>, absolute: &str) -> Self {
        let mut pairs = vec![("parent_linkage".to_string(), linkage.braced().to_string())];
        if let Some(r) = relative {
            pairs.push(("relative_path".into(), r.into()));
        }
        pairs.push(("absolute_win32_path".into(), absolute.into()));
        Self { pairs }
    }

    /// The DataWriteGuids that the parent may have.
    pub fn linkages(&self) -> Vec<Uuid> {
        ["parent_linkage", "parent_linkage2"]
            .iter()
            .filter_map(|k| self.get(k))
            .filter_map(|v| Uuid::parse_str(v.trim()).ok())
            .collect()
    }

    pub fn parse(item: &[u8]) -> Result<Self> {
        let bad = |m: &str| Error::malformed(Structure::ParentLocator, m);
        let (h, rest) = fmt::ParentLocatorHeader::ref_from_prefix(item).map_err(|_| bad("too short"))?;
        let kind: Uuid = h.locator_type.into();
        if kind != fmt::LOCATOR_TYPE_VHDX {
            return Err(Error::Unsupported(format!("parent locator of type {kind}: expected a VHDX parent")));
        }
        if h.key_value_count.get() > MAX_PAIRS {
            return Err(bad("more than 64 keys"));
        }
        let n = usize::from(h.key_value_count.get());
        let (entries, _) = <[fmt::ParentLocatorEntry]>::ref_from_prefix_with_elems(rest, n)
            .map_err(|_| bad("its entries run out of the item"))?;
        let text = |offset: u32, length: u16| -> Result<String> {
            let (o, l) = (offset as usize, usize::from(length));
            let bytes = item.get(o..o + l).ok_or_else(|| bad("a key or value lies outside of the item"))?;
            utf16le(bytes).ok_or_else(|| bad("a key or value is not UTF-16"))
        };
        let mut pairs: Vec<(String, String)> = Vec::with_capacity(n);
        for e in entries {
            let key = text(e.key_offset.get(), e.key_length.get())?;
            if pairs.iter().any(|(k, _)| *k == key) {
                return Err(bad("a key is there twice"));
            }
            pairs.push((key, text(e.value_offset.get(), e.value_length.get())?));
        }
        let locator = Self { pairs };
        if locator.linkages().is_empty() {
            return Err(bad("no parent_linkage with a GUID"));
        }
        Ok(locator)
    }

    pub fn encode(&self) -> Result<Vec<u8>> {
        let head = fmt::ParentLocatorHeader {
            locator_type: fmt::LOCATOR_TYPE_VHDX.into(),
            reserved: 0.into(),
            key_value_count: (self.pairs.len() as u16).into(),
        };
        let mut out = head.as_bytes().to_vec();
        let mut strings = Vec::new();
        let base = out.len() + self.pairs.len() * size_of::<fmt::ParentLocatorEntry>();
        let mut put = |s: &str| -> Result<(u32, u16)> {
            let at = base + strings.len();
            strings.extend(s.encode_utf16().flat_map(u16::to_le_bytes));
            let len = u16::try_from(base + strings.len() - at)
                .map_err(|_| Error::Parameter("a path of a parent is longer than 32767 characters".into()))?;
            Ok((at as u32, len))
        };
        for (k, v) in &self.pairs {
            let (ko, kl) = put(k)?;
            let (vo, vl) = put(v)?;
            let e = fmt::ParentLocatorEntry {
                key_offset: ko.into(),
                value_offset: vo.into(),
                key_length: kl.into(),
                value_length: vl.into(),
            };
            out.extend_from_slice(e.as_bytes());
        }
        out.extend_from_slice(&strings);
        Ok(out)
    }
}

/// Text from UTF-16LE bytes, without a trailing NUL.
pub(crate) fn utf16le(bytes: &[u8]) -> Option<String> {
    let (units, rest) = bytes.as_chunks::<2>();
    if !rest.is_empty() {
        return None;
    }
    let units: Vec<u16> = units.iter().map(|c| u16::from_le_bytes(*c)).collect();
    let s = String::from_utf16(&units).ok()?;
    Some(s.trim_end_matches('\0').to_string())
}
