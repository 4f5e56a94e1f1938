//! Which image may run (UEFI 2.10, section 32.5.3.3 and 32.6).
//!
//! An image runs if neither its digest nor any certificate of any of its signatures is in dbx, and if its digest is in db or
//! one of its signatures leads to a certificate in db.

use super::hash::HashAlgorithm;
use super::pkcs7::SignedData;
use super::{sigdb, x509};
use crate::bytes::{slice, u16_at, u32_at};
use crate::guid::{CERT_TYPE_PKCS7, Guid};
use crate::pe::PeImage;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;
use der::asn1::{AnyRef, ObjectIdentifier, OctetStringRef};
use der::{Decode, Reader, SliceReader};

const SPC_INDIRECT_DATA: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.4.1.311.2.1.4");
/// Most signatures of an image that are looked at.
const MAX_SIGNATURES: usize = 16;

/// Why an image may run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Allowed {
    /// Its digest is in db.
    Hash,
    /// A signature leads to a certificate in db; its subject's common name.
    Certificate(String),
}

/// Why an image may not run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refused {
    /// Its digest is in dbx.
    HashForbidden,
    /// A certificate of one of its signatures is in dbx; its common name.
    CertificateForbidden(String),
    /// It has no signature, and its digest is not in db.
    Unsigned,
    /// Its signatures are good but no certificate of db stands behind them; the first signer's common name.
    UnknownSigner(String),
    /// Its signature does not fit its bytes.
    BadSignature,
    /// Its certificate table is damaged.
    BadCertificateTable,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::HashForbidden => write!(f, "its hash is in the forbidden signatures (dbx)"),
            Self::CertificateForbidden(name) => write!(f, "its signer '{name}' is in the forbidden signatures (dbx)"),
            Self::Unsigned => write!(f, "it is not signed, and its hash is not in the allowed signatures (db)"),
            Self::UnknownSigner(name) => write!(f, "its signer '{name}' is not in the allowed signatures (db)"),
            Self::BadSignature => write!(f, "its signature does not match its contents: the file was changed"),
            Self::BadCertificateTable => write!(f, "its certificate table is damaged"),
        }
    }
}

/// Authenticode digest of an image.
pub fn digest(image: &PeImage<'_>, hash: HashAlgorithm) -> Option<Vec<u8>> {
    use sha2::{Digest, Sha256, Sha384, Sha512};
    fn over<D: Digest + sha2::digest::Update>(image: &PeImage<'_>) -> Option<Vec<u8>> {
        let mut digest = D::new();
        authenticode::authenticode_digest(image, &mut digest).ok()?;
        Some(digest.finalize().to_vec())
    }
    match hash {
        HashAlgorithm::Sha256 => over::<Sha256>(image),
        HashAlgorithm::Sha384 => over::<Sha384>(image),
        HashAlgorithm::Sha512 => over::<Sha512>(image),
    }
}

/// Applies the rule of the module page.
pub fn check(image: &PeImage<'_>, db: &[u8], dbx: &[u8]) -> Result<Allowed, Refused> {
    // Digests are computed once each, and only those that are asked for.
    let mut digests: [Option<Vec<u8>>; 3] = [None, None, None];
    let mut in_database = |database: &[u8]| {
        sigdb::entries(database).any(|e| {
            let Some(i) = sigdb::IMAGE_HASHES.iter().position(|(kind, _)| *kind == e.kind) else { return false };
            let d = digests[i].get_or_insert_with(|| digest(image, sigdb::IMAGE_HASHES[i].1).unwrap_or_default());
            !d.is_empty() && e.data == &d[..]
        })
    };
    if in_database(dbx) {
        return Err(Refused::HashForbidden);
    }
    let hash_allowed = in_database(db);
    let anchors = sigdb::certificates(db);
    let mut allowed = None;
    let mut refused = Refused::Unsigned;
    for bytes in signatures(image).map_err(|()| Refused::BadCertificateTable)? {
        match check_signature(image, bytes, &anchors, dbx) {
            Ok(by) => allowed = allowed.or(Some(by)),
            // A signature in dbx refuses the image whatever else it carries.
            Err(why @ Refused::CertificateForbidden(_)) => return Err(why),
            Err(why) => refused = why,
        }
    }
    if hash_allowed {
        return Ok(Allowed::Hash);
    }
    allowed.ok_or(refused)
}

fn name_of(certificate: &x509::Certificate<'_>) -> String {
    let name = certificate.common_name().unwrap_or(b"(unnamed)");
    // Printable ASCII only: the name goes to a screen and to logs.
    name.iter().take(64).map(|b| if (0x20..0x7f).contains(b) { char::from(*b) } else { '?' }).collect()
}

fn check_signature(
    image: &PeImage<'_>,
    bytes: &[u8],
    anchors: &[x509::Certificate<'_>],
    dbx: &[u8],
) -> Result<Allowed, Refused> {
    let signed = SignedData::parse(bytes).map_err(|_| Refused::BadSignature)?;
    // Every certificate that the signature carries counts, whether or not it is in the chain: it cannot be left out to
    // escape dbx, because the signer's is always needed.
    if let Some(c) = signed.certificates.iter().find(|c| sigdb::forbids(dbx, c)) {
        return Err(Refused::CertificateForbidden(name_of(c)));
    }
    let content = signed.content.filter(|_| signed.content_type == SPC_INDIRECT_DATA).ok_or(Refused::BadSignature)?;
    let (hash, expected) = indirect_data(content).map_err(|_| Refused::BadSignature)?;
    if digest(image, hash).as_deref() != Some(expected) {
        return Err(Refused::BadSignature);
    }
    let signer = signed.signer_certificate().ok_or(Refused::BadSignature)?;
    if !signed.verifies(content, &signer) {
        return Err(Refused::BadSignature);
    }
    let chain =
        x509::chain(signer, &signed.certificates, anchors).ok_or_else(|| Refused::UnknownSigner(name_of(&signer)))?;
    // The anchor itself may be in dbx too.
    if let Some(c) = chain.iter().find(|c| sigdb::forbids(dbx, c)) {
        return Err(Refused::CertificateForbidden(name_of(c)));
    }
    Ok(Allowed::Certificate(chain.last().map(name_of).unwrap_or_default()))
}

/// Digest algorithm and digest in an SpcIndirectDataContent's content bytes (Authenticode specification).
fn indirect_data(content: &[u8]) -> der::Result<(HashAlgorithm, &[u8])> {
    let mut reader = SliceReader::new(content)?;
    AnyRef::decode(&mut reader)?; // SpcAttributeTypeAndOptionalValue
    reader.sequence(|d| {
        let algorithm = x509::Algorithm::read(d)?;
        let hash = HashAlgorithm::from_oid(&algorithm.oid).ok_or(der::ErrorKind::Failed)?;
        Ok((hash, OctetStringRef::decode(d)?.as_bytes()))
    })
}

/// The PKCS#7 signatures in an image's certificate table (PE/COFF, "The Attribute Certificate Table"; UEFI 2.10,
/// section 32.5.3.1). Other kinds of entries are passed over.
fn signatures<'a>(image: &PeImage<'a>) -> Result<Vec<&'a [u8]>, ()> {
    let Some(mut table) = image.certificate_table() else { return Ok(Vec::new()) };
    let mut found = Vec::new();
    while table.len() >= 8 && found.len() < MAX_SIGNATURES {
        let len = u32_at(table, 0).ok_or(())? as usize;
        let body = slice(table, 8, len.checked_sub(8).ok_or(())?).ok_or(())?;
        match u16_at(table, 6).ok_or(())? {
            // WIN_CERT_TYPE_PKCS_SIGNED_DATA
            0x0002 => found.push(body),
            // WIN_CERT_TYPE_EFI_GUID
            0x0ef1 if Guid::read(body, 0) == Some(CERT_TYPE_PKCS7) => found.push(&body[16..]),
            _ => {}
        }
        table = table.get(len.next_multiple_of(8)..).unwrap_or_default();
    }
    Ok(found)
}
