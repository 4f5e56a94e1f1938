//! Authenticated writes (UEFI 2.10, section 8.2.2): `EFI_VARIABLE_AUTHENTICATION_2`, the variables of Secure Boot and who
//! may write them, and private authenticated variables.

use super::attribute::*;
use super::{Key, Variable, VariableError, VariableStore, wide};
use crate::bytes::{array, slice, u16_at, u32_at};
use crate::guid::{CERT_TYPE_PKCS7, CERT_X509, GLOBAL_VARIABLE, Guid, IMAGE_SECURITY_DATABASE};
use crate::secure::hash::HashAlgorithm;
use crate::secure::pkcs7::SignedData;
use crate::secure::sigdb;
use crate::secure::x509::{self, Certificate};
use alloc::vec::Vec;

/// `EFI_TIME` of an authenticated write, in an order that compares as time does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct AuthTime {
    /// Year.
    pub year: u16,
    /// Month, day, hour, minute, second.
    pub rest: [u8; 5],
}

impl AuthTime {
    /// Reads an `EFI_TIME` (16 bytes) whose fields beyond seconds are zero, as the specification demands here.
    fn read(data: &[u8]) -> Option<Self> {
        let raw: [u8; 16] = array(data, 0)?;
        // Pad1, Nanosecond, TimeZone, Daylight, Pad2.
        if raw[7..].iter().any(|b| *b != 0) {
            return None;
        }
        Some(Self { year: u16_at(&raw, 0)?, rest: [raw[2], raw[3], raw[4], raw[5], raw[6]] })
    }
    /// The `EFI_TIME`.
    pub fn to_bytes(self) -> [u8; 16] {
        let mut out = [0; 16];
        out[..2].copy_from_slice(&self.year.to_le_bytes());
        out[2..7].copy_from_slice(&self.rest);
        out
    }
}

/// The variables of Secure Boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SecureName {
    /// Platform key.
    Pk,
    /// Key exchange keys.
    Kek,
    /// db, dbx, dbt, dbr.
    Database,
}

impl SecureName {
    /// Is it one of them?
    pub fn of(name: &[u16], vendor: Guid) -> Option<Self> {
        let is = |text: &str| name.iter().copied().eq(text.encode_utf16());
        match vendor {
            GLOBAL_VARIABLE if is("PK") => Some(Self::Pk),
            GLOBAL_VARIABLE if is("KEK") => Some(Self::Kek),
            IMAGE_SECURITY_DATABASE if ["db", "dbx", "dbt", "dbr"].into_iter().any(is) => Some(Self::Database),
            _ => None,
        }
    }
}

/// An authenticated payload, taken apart.
struct Payload<'a> {
    time: AuthTime,
    time_bytes: [u8; 16],
    signature: &'a [u8],
    content: &'a [u8],
}

impl<'a> Payload<'a> {
    fn parse(data: &'a [u8]) -> Option<Self> {
        let time_bytes = array(data, 0)?;
        let time = AuthTime::read(data)?;
        let len = u32_at(data, 16)? as usize;
        // wRevision 2.0, WIN_CERT_TYPE_EFI_GUID, PKCS7.
        if u16_at(data, 20)? != 0x200 || u16_at(data, 22)? != 0xef1 || Guid::read(data, 24)? != CERT_TYPE_PKCS7 {
            return None;
        }
        let signature = slice(data, 40, len.checked_sub(24)?)?;
        Some(Self { time, time_bytes, signature, content: &data[16 + len..] })
    }

    /// What the signature covers: name (no terminator), vendor, attributes, time, content.
    fn message(&self, key: &Key, attributes: u32) -> Vec<u8> {
        let mut m: Vec<u8> = key.1.iter().flat_map(|c| c.to_le_bytes()).collect();
        m.extend(key.0.0);
        m.extend(attributes.to_le_bytes());
        m.extend(self.time_bytes);
        m.extend_from_slice(self.content);
        m
    }
}

impl VariableStore {
    pub(super) fn set_authenticated(
        &mut self,
        key: Key,
        secure: Option<SecureName>,
        attributes: u32,
        data: &[u8],
    ) -> Result<(), VariableError> {
        use VariableError::*;
        const SECURE: u32 = NON_VOLATILE | BOOTSERVICE_ACCESS | RUNTIME_ACCESS | TIME_BASED_AUTHENTICATED_WRITE_ACCESS;
        let append = attributes & APPEND_WRITE != 0;
        let kept = attributes & !APPEND_WRITE;
        if secure.is_some() && kept != SECURE {
            return Err(InvalidParameter);
        }
        let old = self.variables.get(&key).cloned();
        if old.as_ref().is_some_and(|v| v.attributes != kept) {
            return Err(InvalidParameter);
        }
        if kept & (BOOTSERVICE_ACCESS | RUNTIME_ACCESS) == 0 {
            return Err(InvalidParameter);
        }
        let payload = Payload::parse(data).ok_or(SecurityViolation)?;
        // An append may be older than what is there (several parties append to dbx); a replacement must be newer.
        if !append && old.as_ref().is_some_and(|v| payload.time <= v.time) {
            return Err(SecurityViolation);
        }
        let message = payload.message(&key, attributes);
        let mut writer = None;
        match secure {
            Some(kind) => self.authorise_secure(kind, &payload, &message)?,
            None => {
                let id = private_writer(&payload, &message).ok_or(SecurityViolation)?;
                match old.as_ref().map(|v| v.writer) {
                    None => {}
                    Some(Some(owner)) if owner == id => {}
                    Some(_) => return Err(SecurityViolation),
                }
                writer = Some(id);
            }
        }
        if let Some(kind) = secure {
            check_format(kind, payload.content)?;
        }
        if payload.content.is_empty() {
            if append {
                return Ok(());
            }
            self.variables.remove(&key).ok_or(NotFound)?;
            self.mode_changed(secure);
            return Ok(());
        }
        let value = match &old {
            Some(v) if append && secure.is_some() => sigdb::append(&v.data, payload.content),
            Some(v) if append => [&v.data[..], payload.content].concat(),
            _ => payload.content.to_vec(),
        };
        let time = old.map_or(payload.time, |v| v.time.max(payload.time));
        self.store(key, Variable { attributes: kept, data: value, time, writer })?;
        self.mode_changed(secure);
        Ok(())
    }

    /// Enrolling or removing the platform key changes SetupMode at once; SecureBoot only at the next reset.
    fn mode_changed(&mut self, secure: Option<SecureName>) {
        if secure == Some(SecureName::Pk) {
            let setup = self.setup_mode();
            self.put("SetupMode", BOOTSERVICE_ACCESS | RUNTIME_ACCESS, &[u8::from(setup)]);
        }
    }

    /// Who may write Secure Boot's variables (UEFI 2.10, section 32.3): in setup mode everybody, but a platform key must be
    /// signed by itself; else PK signs PK and KEK, and PK or KEK sign the databases.
    fn authorise_secure(&self, kind: SecureName, payload: &Payload<'_>, message: &[u8]) -> Result<(), VariableError> {
        let denied = VariableError::SecurityViolation;
        let setup = self.setup_mode();
        if setup && kind != SecureName::Pk {
            return Ok(());
        }
        let value = |name: &str| self.variables.get(&(GLOBAL_VARIABLE, wide(name))).map_or(&[][..], |v| &v.data);
        let mut anchors: Vec<Certificate<'_>> = Vec::new();
        match kind {
            SecureName::Pk if setup => anchors.extend(sigdb::certificates(payload.content)),
            SecureName::Pk | SecureName::Kek => anchors.extend(sigdb::certificates(value("PK"))),
            SecureName::Database => {
                anchors.extend(sigdb::certificates(value("KEK")));
                anchors.extend(sigdb::certificates(value("PK")));
            }
        }
        let signed = SignedData::parse(payload.signature).map_err(|_| denied)?;
        // The signer's certificate may be left out when it is the anchor itself.
        let candidates: Vec<Certificate<'_>> = match signed.signer_certificate() {
            Some(c) => [c].to_vec(),
            None => anchors.clone(),
        };
        let good = candidates.iter().any(|signer| {
            signed.verifies(message, signer) && x509::chain(*signer, &signed.certificates, &anchors).is_some()
        });
        if good { Ok(()) } else { Err(denied) }
    }
}

/// PK holds one certificate; the others are lists of signatures.
fn check_format(kind: SecureName, content: &[u8]) -> Result<(), VariableError> {
    if !sigdb::is_valid(content) {
        return Err(VariableError::InvalidParameter);
    }
    if kind == SecureName::Pk && !content.is_empty() {
        let mut entries = sigdb::entries(content);
        let one = entries.next().is_some_and(|e| e.kind == CERT_X509 && Certificate::parse(e.data).is_ok());
        if !one || entries.next().is_some() {
            return Err(VariableError::InvalidParameter);
        }
    }
    Ok(())
}

/// Checks a private variable's signature in itself and returns what identifies its writer: the SHA-256 of the signer's
/// common name and of the top certificate's to-be-signed part (UEFI 2.10, section 8.2.2).
fn private_writer(payload: &Payload<'_>, message: &[u8]) -> Option<[u8; 32]> {
    let signed = SignedData::parse(payload.signature).ok()?;
    let signer = signed.signer_certificate()?;
    if !signed.verifies(message, &signer) {
        return None;
    }
    // Climb as far as the certificates that came along reach.
    let mut top = signer;
    for _ in 0..8 {
        match signed.certificates.iter().find(|c| c.raw != top.raw && top.issued_by(c)) {
            Some(next) => top = *next,
            None => break,
        }
    }
    let digest = HashAlgorithm::Sha256.digest_parts(&[signer.common_name()?, top.tbs]);
    digest.try_into().ok()
}
