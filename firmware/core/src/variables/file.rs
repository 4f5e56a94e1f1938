//! The non-volatile variables as bytes, for whoever keeps them in a file.
//!
//! Layout, little-endian: magic `VIRNVRAM`, version u32, count u32, the records, SHA-256 of all before it. A record is
//! vendor (16), attributes u32, time (`EFI_TIME`, 16), writer flag u8 and, if 1, 32 bytes, name length in UTF-16 units
//! u32, data length u32, name, data.

use super::attribute::NON_VOLATILE;
use super::auth::AuthTime;
use super::{Quota, Variable, VariableStore};
use crate::bytes::{array, slice, u16_at, u32_at};
use crate::guid::Guid;
use crate::secure::hash::HashAlgorithm;
use alloc::vec::Vec;

const MAGIC: &[u8; 8] = b"VIRNVRAM";
const VERSION: u32 = 1;

/// Why bytes are not a variable store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileError {
    /// They do not start with the magic.
    NotAStore,
    /// A version that this code does not know.
    Version(u32),
    /// The checksum is wrong: the file was damaged.
    Checksum,
    /// A record contradicts itself although the checksum is right.
    Malformed,
}

impl core::fmt::Display for FileError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::NotAStore => write!(f, "not a Viridian variable store"),
            Self::Version(v) => write!(f, "variable store of version {v}, this program knows version {VERSION}"),
            Self::Checksum => write!(f, "variable store is damaged (checksum)"),
            Self::Malformed => write!(f, "variable store is damaged (records)"),
        }
    }
}

/// Writes all non-volatile variables.
pub fn encode(store: &VariableStore) -> Vec<u8> {
    encode_where(store, |v| v.attributes & NON_VOLATILE != 0)
}

/// Writes all variables, for the saved state of a running machine.
pub fn encode_all(store: &VariableStore) -> Vec<u8> {
    encode_where(store, |_| true)
}

fn encode_where(store: &VariableStore, keep: impl Fn(&Variable) -> bool) -> Vec<u8> {
    let records: Vec<_> = store.iter().filter(|(_, _, v)| keep(v)).collect();
    let mut out = Vec::new();
    out.extend(MAGIC);
    out.extend(VERSION.to_le_bytes());
    out.extend((records.len() as u32).to_le_bytes());
    for (vendor, name, v) in records {
        out.extend(vendor.0);
        out.extend(v.attributes.to_le_bytes());
        out.extend(v.time.to_bytes());
        out.push(u8::from(v.writer.is_some()));
        out.extend(v.writer.iter().flatten());
        out.extend((name.len() as u32).to_le_bytes());
        out.extend((v.data.len() as u32).to_le_bytes());
        out.extend(name.iter().flat_map(|c| c.to_le_bytes()));
        out.extend_from_slice(&v.data);
    }
    let sum = HashAlgorithm::Sha256.digest(&out);
    out.extend(sum);
    out
}

/// Reads what [`encode`] wrote. The store is as before power-on: call [`VariableStore::reset`].
pub fn decode(bytes: &[u8], quota: Quota) -> Result<VariableStore, FileError> {
    if bytes.get(..8) != Some(MAGIC) {
        return Err(FileError::NotAStore);
    }
    match u32_at(bytes, 8) {
        Some(VERSION) => {}
        other => return Err(FileError::Version(other.unwrap_or(0))),
    }
    let (body, sum) = bytes.split_at_checked(bytes.len().saturating_sub(32)).ok_or(FileError::Checksum)?;
    if HashAlgorithm::Sha256.digest(body) != sum {
        return Err(FileError::Checksum);
    }
    let mut store = VariableStore::new(quota);
    let mut at = 16;
    for _ in 0..u32_at(body, 12).ok_or(FileError::Malformed)? {
        at = record(body, at, &mut store).ok_or(FileError::Malformed)?;
    }
    if at == body.len() { Ok(store) } else { Err(FileError::Malformed) }
}

fn record(body: &[u8], mut at: usize, store: &mut VariableStore) -> Option<usize> {
    let vendor = Guid::read(body, at)?;
    let attributes = u32_at(body, at + 16)?;
    let raw = slice(body, at + 20, 16)?;
    let time = AuthTime { year: u16_at(raw, 0)?, rest: array(raw, 2)? };
    let has_writer = *body.get(at + 36)? == 1;
    at += 37;
    let writer = if has_writer { Some(array::<32>(body, at)?) } else { None };
    at += if has_writer { 32 } else { 0 };
    let name_len = u32_at(body, at)? as usize;
    let data_len = u32_at(body, at + 4)? as usize;
    let name_bytes = slice(body, at + 8, name_len.checked_mul(2)?)?;
    let name: Vec<u16> = name_bytes.chunks_exact(2).map(|c| u16::from_le_bytes([c[0], c[1]])).collect();
    at += 8 + name_bytes.len();
    let data = slice(body, at, data_len)?.to_vec();
    store.store((vendor, name), Variable { attributes, data, time, writer }).ok()?;
    Some(at + data_len)
}
