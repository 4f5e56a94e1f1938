//! Signature databases: lists of certificates and hashes (UEFI 2.10, section 32.4.1).

use super::hash::HashAlgorithm;
use super::x509::Certificate;
use crate::bytes::{slice, u32_at};
use crate::guid::{self, Guid};
use alloc::vec::Vec;

/// Bytes of `EFI_SIGNATURE_LIST` before its header and entries.
const LIST_HEADER: usize = 28;

/// One entry of a database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Signature<'a> {
    /// Kind of data (`SignatureType` of its list).
    pub kind: Guid,
    /// Who put it there.
    pub owner: Guid,
    /// A certificate, or a hash (with a time for the `X509_SHA` kinds).
    pub data: &'a [u8],
}

/// Is the whole value a well-formed sequence of lists? A database that is not may not be written.
pub fn is_valid(database: &[u8]) -> bool {
    let mut lists = Lists { rest: database };
    lists.by_ref().for_each(drop);
    lists.rest.is_empty()
}

/// All entries, as far as the value is well-formed.
pub fn entries(database: &[u8]) -> impl Iterator<Item = Signature<'_>> {
    Lists { rest: database }.flat_map(|list| {
        list.body
            .chunks_exact(list.entry)
            .filter_map(move |e| Some(Signature { kind: list.kind, owner: Guid::read(e, 0)?, data: e.get(16..)? }))
    })
}

struct List<'a> {
    kind: Guid,
    entry: usize,
    body: &'a [u8],
}

struct Lists<'a> {
    rest: &'a [u8],
}

impl<'a> Iterator for Lists<'a> {
    type Item = List<'a>;
    fn next(&mut self) -> Option<List<'a>> {
        let kind = Guid::read(self.rest, 0)?;
        let size = u32_at(self.rest, 16)? as usize;
        let header = u32_at(self.rest, 20)? as usize;
        let entry = u32_at(self.rest, 24)? as usize;
        let start = LIST_HEADER.checked_add(header)?;
        let body = slice(self.rest, start, size.checked_sub(start)?)?;
        if entry <= 16 || body.is_empty() || body.len() % entry != 0 {
            return None;
        }
        self.rest = &self.rest[size..];
        Some(List { kind, entry, body })
    }
}

/// The X.509 certificates of a database; entries that do not parse are passed over.
pub fn certificates(database: &[u8]) -> Vec<Certificate<'_>> {
    entries(database).filter(|e| e.kind == guid::CERT_X509).filter_map(|e| Certificate::parse(e.data).ok()).collect()
}

/// The kinds of image hashes, with their algorithm.
pub const IMAGE_HASHES: [(Guid, HashAlgorithm); 3] = [
    (guid::CERT_SHA256, HashAlgorithm::Sha256),
    (guid::CERT_SHA384, HashAlgorithm::Sha384),
    (guid::CERT_SHA512, HashAlgorithm::Sha512),
];

/// Does a forbidden-signature database name this certificate: itself, or the hash of its to-be-signed part? Revocation
/// times are taken as "always" (no trusted time, see the page of [`super`]).
pub fn forbids(database: &[u8], certificate: &Certificate<'_>) -> bool {
    const TBS_HASHES: [(Guid, HashAlgorithm, usize); 3] = [
        (guid::CERT_X509_SHA256, HashAlgorithm::Sha256, 32),
        (guid::CERT_X509_SHA384, HashAlgorithm::Sha384, 48),
        (guid::CERT_X509_SHA512, HashAlgorithm::Sha512, 64),
    ];
    let mut digests: [Option<Vec<u8>>; 3] = [None, None, None];
    entries(database).any(|e| {
        if e.kind == guid::CERT_X509 {
            return e.data == certificate.raw;
        }
        let Some(i) = TBS_HASHES.iter().position(|(kind, ..)| *kind == e.kind) else { return false };
        let digest = digests[i].get_or_insert_with(|| TBS_HASHES[i].1.digest(certificate.tbs));
        e.data.get(..TBS_HASHES[i].2) == Some(&digest[..])
    })
}

/// Appends the entries of `new` that `old` does not hold yet (`EFI_VARIABLE_APPEND_WRITE` on a database: UEFI 2.10,
/// section 8.2.2 asks that duplicates are dropped). Both must be valid.
pub fn append(old: &[u8], new: &[u8]) -> Vec<u8> {
    let mut out = old.to_vec();
    for list in (Lists { rest: new }) {
        let known: Vec<Signature<'_>> = entries(old).filter(|e| e.kind == list.kind).collect();
        let fresh: Vec<&[u8]> = list
            .body
            .chunks_exact(list.entry)
            .filter(|e| !known.iter().any(|k| k.owner.0 == e[..16] && k.data == &e[16..]))
            .collect();
        if fresh.is_empty() {
            continue;
        }
        let size = LIST_HEADER + fresh.len() * list.entry;
        out.extend(list.kind.0);
        out.extend((size as u32).to_le_bytes());
        out.extend(0u32.to_le_bytes());
        out.extend((list.entry as u32).to_le_bytes());
        fresh.iter().for_each(|e| out.extend_from_slice(e));
    }
    out
}

/// Builds a list of one kind with entries of one size.
pub fn list(kind: Guid, owner: Guid, items: &[&[u8]]) -> Vec<u8> {
    let len = items.first().map_or(0, |i| i.len());
    let mut out = Vec::new();
    let entry = 16 + len;
    let same: Vec<&&[u8]> = items.iter().filter(|i| i.len() == len).collect();
    out.extend(kind.0);
    out.extend(((LIST_HEADER + same.len() * entry) as u32).to_le_bytes());
    out.extend(0u32.to_le_bytes());
    out.extend((entry as u32).to_le_bytes());
    for item in same {
        out.extend(owner.0);
        out.extend_from_slice(item);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn append_drops_duplicates() {
        let a = list(guid::CERT_SHA256, Guid::default(), &[&[1; 32], &[2; 32]]);
        let b = list(guid::CERT_SHA256, Guid::default(), &[&[2; 32], &[3; 32]]);
        let both = append(&a, &b);
        assert!(is_valid(&both));
        let hashes: Vec<u8> = entries(&both).map(|e| e.data[0]).collect();
        assert_eq!(hashes, [1, 2, 3]);
        assert_eq!(append(&both, &b), both);
    }

    #[test]
    fn truncated_lists_are_invalid() {
        let a = list(guid::CERT_SHA256, Guid::default(), &[&[1; 32], &[2; 32]]);
        assert!(is_valid(&a) && is_valid(&[]));
        for cut in 1..a.len() {
            assert!(!is_valid(&a[..cut]), "cut at {cut}");
        }
    }
}
