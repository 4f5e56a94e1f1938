//! PKCS#7 signed data (RFC 2315, RFC 5652), as Authenticode and authenticated variables use it.

use super::hash::HashAlgorithm;
use super::x509::{Algorithm, Certificate};
use alloc::vec::Vec;
use der::asn1::{AnyRef, ObjectIdentifier, OctetStringRef};
use der::{Decode, Reader, SliceReader, Tag, TagNumber, Tagged};

const SIGNED_DATA: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.7.2");
const MESSAGE_DIGEST: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.9.4");
const CONTENT_TYPE: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.9.3");
/// Most certificates that are looked at in one signature.
const MAX_CERTIFICATES: usize = 16;

/// Signed data with its one signer.
#[derive(Clone, Debug)]
pub struct SignedData<'a> {
    /// Type of the signed content.
    pub content_type: ObjectIdentifier,
    /// The content's value bytes (without its own header), if it is inside.
    pub content: Option<&'a [u8]>,
    /// Certificates that came with it.
    pub certificates: Vec<Certificate<'a>>,
    /// Digest algorithm of the signer.
    pub hash: HashAlgorithm,
    signer: Signer<'a>,
}

#[derive(Clone, Debug)]
struct Signer<'a> {
    issuer: Option<&'a [u8]>,
    serial: &'a [u8],
    key_id: Option<&'a [u8]>,
    /// The signed attributes' content bytes (the header that was signed is a SET's).
    attributes: Option<&'a [u8]>,
    algorithm: Algorithm<'a>,
    signature: &'a [u8],
}

fn context(number: u8, constructed: bool) -> Tag {
    Tag::ContextSpecific { constructed, number: TagNumber::new(number) }
}

fn other() -> der::Error {
    der::ErrorKind::Failed.into()
}

impl<'a> SignedData<'a> {
    /// Parses a ContentInfo that holds SignedData, or a bare SignedData (authenticated variables may leave the wrapper
    /// out: UEFI 2.10, section 8.2.2). Bytes behind the structure are padding and ignored.
    pub fn parse(bytes: &'a [u8]) -> der::Result<Self> {
        let mut reader = SliceReader::new(bytes)?;
        let outer = AnyRef::from_der(reader.tlv_bytes()?)?;
        if outer.tag() != Tag::Sequence {
            return Err(other());
        }
        let mut inner = SliceReader::new(outer.value())?;
        if inner.peek_tag()? != Tag::ObjectIdentifier {
            return Self::body(&mut inner);
        }
        let kind: ObjectIdentifier = inner.decode()?;
        if kind != SIGNED_DATA {
            return Err(other());
        }
        let wrapped = AnyRef::decode(&mut inner)?;
        if wrapped.tag() != context(0, true) {
            return Err(other());
        }
        let body = AnyRef::from_der(wrapped.value())?;
        if body.tag() != Tag::Sequence {
            return Err(other());
        }
        Self::body(&mut SliceReader::new(body.value())?)
    }

    fn body(r: &mut SliceReader<'a>) -> der::Result<Self> {
        r.tlv_bytes()?; // version: 1 or 3, nothing depends on it
        r.tlv_bytes()?; // the set of digest algorithms: the signer says which
        let (content_type, content) = r.sequence(|c| {
            let kind: ObjectIdentifier = c.decode()?;
            let content = if c.is_finished() {
                None
            } else {
                let explicit = AnyRef::decode(c)?;
                Some(AnyRef::from_der(explicit.value())?.value())
            };
            Ok((kind, content))
        })?;
        let mut certificates = Vec::new();
        let mut signer = None;
        while !r.is_finished() {
            let field = AnyRef::decode(r)?;
            if field.tag() == context(0, true) {
                let mut list = SliceReader::new(field.value())?;
                while !list.is_finished() && certificates.len() < MAX_CERTIFICATES {
                    // Other kinds of certificates than X.509 are tagged; they are passed over.
                    if list.peek_tag()? == Tag::Sequence {
                        certificates.push(Certificate::read(&mut list)?);
                    } else {
                        list.tlv_bytes()?;
                    }
                }
            } else if field.tag() == Tag::Set {
                let mut list = SliceReader::new(field.value())?;
                signer = Some(Signer::read(&mut list)?);
                if !list.is_finished() {
                    return Err(other()); // exactly one signer
                }
            }
        }
        let (signer, hash) = signer.ok_or_else(other)?;
        Ok(Self { content_type, content, certificates, hash, signer })
    }

    /// The signer's certificate, if it came with the signature.
    pub fn signer_certificate(&self) -> Option<Certificate<'a>> {
        self.certificates.iter().copied().find(|c| match self.signer.issuer {
            Some(issuer) => c.issuer == issuer && c.serial == self.signer.serial,
            None => self.signer.key_id.is_some() && c.subject_key_id == self.signer.key_id,
        })
    }

    /// Checks the signature over `content` with the key of `certificate`: the signed attributes, if there are any, hold
    /// the content's type and digest, and the signature covers them.
    pub fn verifies(&self, content: &[u8], certificate: &Certificate<'_>) -> bool {
        let Some(attributes) = self.signer.attributes else {
            return certificate.verifies(content, &self.signer.algorithm, Some(self.hash), self.signer.signature);
        };
        if !self.attributes_match(attributes, &self.hash.digest(content)) {
            return false;
        }
        // RFC 5652, section 5.4: the digest is over the attributes with a SET header in place of the implicit tag.
        let Some(message) = with_set_header(attributes) else { return false };
        certificate.verifies(&message, &self.signer.algorithm, Some(self.hash), self.signer.signature)
    }

    fn attributes_match(&self, attributes: &[u8], digest: &[u8]) -> bool {
        let (mut type_ok, mut digest_ok) = (None, None);
        let mut walk = || -> der::Result<()> {
            let mut list = SliceReader::new(attributes)?;
            while !list.is_finished() {
                list.sequence(|a| {
                    let kind: ObjectIdentifier = a.decode()?;
                    let values = AnyRef::decode(a)?.value();
                    if kind == CONTENT_TYPE {
                        type_ok = Some(ObjectIdentifier::from_der(values)? == self.content_type);
                    } else if kind == MESSAGE_DIGEST {
                        digest_ok = Some(OctetStringRef::from_der(values)?.as_bytes() == digest);
                    }
                    Ok(())
                })?;
            }
            Ok(())
        };
        walk().is_ok() && type_ok.unwrap_or(false) && digest_ok.unwrap_or(false)
    }
}

fn with_set_header(content: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(content.len() + 6);
    out.push(0x31);
    let len = content.len();
    match len {
        0..=0x7f => out.push(len as u8),
        0x80..=0xff => out.extend([0x81, len as u8]),
        0x100..=0xffff => out.extend([0x82, (len >> 8) as u8, len as u8]),
        _ => return None,
    }
    out.extend_from_slice(content);
    Some(out)
}

impl<'a> Signer<'a> {
    fn read(list: &mut SliceReader<'a>) -> der::Result<(Self, HashAlgorithm)> {
        list.sequence(|r| {
            r.tlv_bytes()?; // version
            let (mut issuer, mut serial, mut key_id) = (None, &[][..], None);
            if r.peek_tag()? == Tag::Sequence {
                r.sequence(|s| {
                    issuer = Some(s.tlv_bytes()?);
                    serial = AnyRef::decode(s)?.value();
                    Ok(())
                })?;
            } else {
                key_id = Some(AnyRef::decode(r)?.value());
            }
            let digest = Algorithm::read(r)?;
            let hash = HashAlgorithm::from_oid(&digest.oid).ok_or_else(other)?;
            let attributes = if r.peek_tag()? == context(0, true) { Some(AnyRef::decode(r)?.value()) } else { None };
            let algorithm = Algorithm::read(r)?;
            let signature = OctetStringRef::decode(r)?.as_bytes();
            while !r.is_finished() {
                r.tlv_bytes()?; // unsigned attributes: time stamps and nested signatures are not looked at
            }
            Ok((Self { issuer, serial, key_id, attributes, algorithm, signature }, hash))
        })
    }
}
