//! X.509 certificates, as far as signature chains need them (RFC 5280).
//!
//! Certificates are kept as the bytes that were signed: they are parsed, never encoded again.

use super::hash::HashAlgorithm;
use alloc::vec::Vec;
use der::asn1::{AnyRef, BitStringRef, ObjectIdentifier, UintRef};
use der::{Decode, Reader, SliceReader, Tag, TagNumber, Tagged};
use rsa::{BigUint, Pkcs1v15Sign, RsaPublicKey};
use sha2::{Sha256, Sha384, Sha512};

/// Largest RSA modulus in bits.
const MAX_RSA_BITS: usize = 8192;

const RSA_ENCRYPTION: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.1");
const SHA256_RSA: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.11");
const SHA384_RSA: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.12");
const SHA512_RSA: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.13");
const EC_PUBLIC_KEY: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.2.1");
const P256: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.3.1.7");
const P384: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.132.0.34");
const ECDSA_SHA256: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.4.3.2");
const ECDSA_SHA384: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.4.3.3");
const ECDSA_SHA512: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.4.3.4");
const COMMON_NAME: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.4.3");

/// An AlgorithmIdentifier: the object identifier and the raw parameters.
#[derive(Clone, Copy, Debug)]
pub struct Algorithm<'a> {
    /// Which.
    pub oid: ObjectIdentifier,
    /// Parameters, if any.
    pub parameters: Option<AnyRef<'a>>,
}

impl<'a> Algorithm<'a> {
    /// Reads one.
    pub fn read<R: Reader<'a>>(reader: &mut R) -> der::Result<Self> {
        reader.sequence(|r| {
            let oid = r.decode()?;
            let parameters = if r.is_finished() { None } else { Some(r.decode()?) };
            while !r.is_finished() {
                r.tlv_bytes()?;
            }
            Ok(Self { oid, parameters })
        })
    }

    /// The digest that a combined signature algorithm names.
    fn signature_hash(&self) -> Option<HashAlgorithm> {
        match self.oid {
            SHA256_RSA | ECDSA_SHA256 => Some(HashAlgorithm::Sha256),
            SHA384_RSA | ECDSA_SHA384 => Some(HashAlgorithm::Sha384),
            SHA512_RSA | ECDSA_SHA512 => Some(HashAlgorithm::Sha512),
            _ => None,
        }
    }
}

/// A certificate.
#[derive(Clone, Copy, Debug)]
pub struct Certificate<'a> {
    /// The whole certificate.
    pub raw: &'a [u8],
    /// The to-be-signed part, with its header.
    pub tbs: &'a [u8],
    /// Serial number's content bytes.
    pub serial: &'a [u8],
    /// Issuer name, with its header.
    pub issuer: &'a [u8],
    /// Subject name, with its header.
    pub subject: &'a [u8],
    /// Subject key identifier, if the certificate says one.
    pub subject_key_id: Option<&'a [u8]>,
    key_algorithm: Algorithm<'a>,
    key: &'a [u8],
    signature_algorithm: Algorithm<'a>,
    signature: &'a [u8],
}

const SUBJECT_KEY_ID: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.29.14");

fn context(number: u8) -> Tag {
    Tag::ContextSpecific { constructed: true, number: TagNumber::new(number) }
}

impl<'a> Certificate<'a> {
    /// Parses a certificate; bytes behind it are an error.
    pub fn parse(raw: &'a [u8]) -> der::Result<Self> {
        let mut reader = SliceReader::new(raw)?;
        let certificate = Self::read(&mut reader)?;
        reader.finish(certificate)
    }

    /// Reads a certificate from a reader.
    pub fn read<R: Reader<'a>>(reader: &mut R) -> der::Result<Self> {
        let raw = reader.tlv_bytes()?;
        SliceReader::new(raw)?.sequence(|r| {
            let tbs = r.tlv_bytes()?;
            let signature_algorithm = Algorithm::read(r)?;
            let signature = BitStringRef::decode(r)?.raw_bytes();
            let mut c = Self {
                raw,
                tbs,
                serial: &[],
                issuer: &[],
                subject: &[],
                subject_key_id: None,
                key_algorithm: signature_algorithm,
                key: &[],
                signature_algorithm,
                signature,
            };
            SliceReader::new(tbs)?.sequence(|t| {
                if t.peek_tag()? == context(0) {
                    t.tlv_bytes()?; // version
                }
                let serial = t.tlv_bytes()?;
                c.serial = AnyRef::from_der(serial)?.value();
                Algorithm::read(t)?;
                c.issuer = t.tlv_bytes()?;
                t.tlv_bytes()?; // validity: deliberately not looked at
                c.subject = t.tlv_bytes()?;
                t.sequence(|k| {
                    c.key_algorithm = Algorithm::read(k)?;
                    c.key = BitStringRef::decode(k)?.raw_bytes();
                    Ok(())
                })?;
                while !t.is_finished() {
                    let any = AnyRef::decode(t)?;
                    if any.tag() == context(3) {
                        c.subject_key_id = subject_key_id(any.value())?;
                    }
                }
                Ok(())
            })?;
            Ok(c)
        })
    }

    /// Checks a signature over `message` that was made with this certificate's key. `algorithm` is what the signature
    /// says of itself; `hash` is the digest that goes with it where the algorithm alone does not say.
    pub fn verifies(
        &self,
        message: &[u8],
        algorithm: &Algorithm<'_>,
        hash: Option<HashAlgorithm>,
        signature: &[u8],
    ) -> bool {
        let Some(hash) = algorithm.signature_hash().or(hash) else { return false };
        let digest = hash.digest(message);
        match (self.key_algorithm.oid, algorithm.oid) {
            (RSA_ENCRYPTION, RSA_ENCRYPTION | SHA256_RSA | SHA384_RSA | SHA512_RSA) => {
                let Some(key) = rsa_key(self.key) else { return false };
                let scheme = match hash {
                    HashAlgorithm::Sha256 => Pkcs1v15Sign::new::<Sha256>(),
                    HashAlgorithm::Sha384 => Pkcs1v15Sign::new::<Sha384>(),
                    HashAlgorithm::Sha512 => Pkcs1v15Sign::new::<Sha512>(),
                };
                key.verify(scheme, &digest, signature).is_ok()
            }
            (EC_PUBLIC_KEY, EC_PUBLIC_KEY | ECDSA_SHA256 | ECDSA_SHA384 | ECDSA_SHA512) => {
                self.verifies_ecdsa(&digest, signature).unwrap_or(false)
            }
            _ => false,
        }
    }

    fn verifies_ecdsa(&self, digest: &[u8], signature: &[u8]) -> Option<bool> {
        use ecdsa::signature::hazmat::PrehashVerifier;
        let curve: ObjectIdentifier = self.key_algorithm.parameters?.decode_as().ok()?;
        Some(match curve {
            P256 => {
                let key = p256::ecdsa::VerifyingKey::from_sec1_bytes(self.key).ok()?;
                key.verify_prehash(digest, &p256::ecdsa::Signature::from_der(signature).ok()?).is_ok()
            }
            P384 => {
                let key = p384::ecdsa::VerifyingKey::from_sec1_bytes(self.key).ok()?;
                key.verify_prehash(digest, &p384::ecdsa::Signature::from_der(signature).ok()?).is_ok()
            }
            _ => return None,
        })
    }

    /// Was this certificate signed by the key of `issuer`?
    pub fn issued_by(&self, issuer: &Certificate<'_>) -> bool {
        self.issuer == issuer.subject && issuer.verifies(self.tbs, &self.signature_algorithm, None, self.signature)
    }

    /// The subject's common name, content bytes.
    pub fn common_name(&self) -> Option<&'a [u8]> {
        let mut reader = SliceReader::new(self.subject).ok()?;
        let mut found = None;
        let _ = reader.sequence(|r| {
            while !r.is_finished() {
                let set = AnyRef::decode(r)?;
                let mut inner = SliceReader::new(set.value())?;
                while !inner.is_finished() {
                    inner.sequence(|a| {
                        let oid: ObjectIdentifier = a.decode()?;
                        let value: AnyRef<'a> = a.decode()?;
                        if oid == COMMON_NAME {
                            found = Some(value.value());
                        }
                        Ok(())
                    })?;
                }
            }
            Ok(())
        });
        found
    }
}

/// Finds the subject key identifier in the value of the extensions field.
fn subject_key_id(extensions: &[u8]) -> der::Result<Option<&[u8]>> {
    let mut found = None;
    SliceReader::new(extensions)?.sequence(|list| {
        while !list.is_finished() {
            list.sequence(|e| {
                let oid: ObjectIdentifier = e.decode()?;
                if e.peek_tag()? == Tag::Boolean {
                    e.tlv_bytes()?;
                }
                let value: AnyRef<'_> = e.decode()?;
                if oid == SUBJECT_KEY_ID {
                    // An OCTET STRING inside the extension's OCTET STRING.
                    found = AnyRef::from_der(value.value()).ok().map(|id| id.value());
                }
                Ok(())
            })?;
        }
        Ok(())
    })?;
    Ok(found)
}

fn rsa_key(pkcs1: &[u8]) -> Option<RsaPublicKey> {
    let mut reader = SliceReader::new(pkcs1).ok()?;
    let (n, e) = reader
        .sequence(|r| {
            let n: UintRef<'_> = r.decode()?;
            let e: UintRef<'_> = r.decode()?;
            Ok((n.as_bytes(), e.as_bytes()))
        })
        .ok()?;
    if n.len() > MAX_RSA_BITS / 8 || e.len() > 5 {
        return None;
    }
    RsaPublicKey::new_with_max_size(BigUint::from_bytes_be(n), BigUint::from_bytes_be(e), MAX_RSA_BITS).ok()
}

/// Builds the chain from `leaf` to a certificate that `trusted` accepts, through `bag`; returns the chain, leaf first,
/// trusted certificate last. Certificates are compared by name and checked by signature. `trusted` is asked for every
/// certificate of the chain and for every issuer that `anchors` gives.
pub fn chain<'a>(
    leaf: Certificate<'a>,
    bag: &[Certificate<'a>],
    anchors: &[Certificate<'a>],
) -> Option<Vec<Certificate<'a>>> {
    const MAX_DEPTH: usize = 8;
    let mut chain = Vec::new();
    let mut current = leaf;
    loop {
        chain.push(current);
        if anchors.iter().any(|a| a.raw == current.raw) {
            return Some(chain);
        }
        if let Some(anchor) = anchors.iter().find(|a| current.issued_by(a)) {
            chain.push(*anchor);
            return Some(chain);
        }
        if chain.len() >= MAX_DEPTH {
            return None;
        }
        let next = bag.iter().find(|c| !chain.iter().any(|seen| seen.raw == c.raw) && current.issued_by(c))?;
        current = *next;
    }
}
