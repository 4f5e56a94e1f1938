//! Secure Boot templates: which keys the databases of a new VM hold.
//!
//! Hyper-V's names: "Microsoft Windows" and "Microsoft UEFI Certificate Authority". The default here is both, as on PCs. The
//! certificates are Microsoft's public trust anchors (uefi.org's and Microsoft's published Secure Boot objects); their
//! SHA-256 fingerprints are asserted in this module's tests. The 2011 ones expired in 2026 and stay: firmware does not
//! look at validity dates, and what they signed must still boot.

use base64ct::{Base64, Encoding};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use thiserror::Error;
use uefi_core::guid::{CERT_SHA256, CERT_X509, GLOBAL_VARIABLE, Guid, IMAGE_SECURITY_DATABASE};
use uefi_core::secure::{sigdb, x509};
use uefi_core::variables::{VariableError, VariableStore, attribute};

/// `SignatureOwner` of Microsoft's entries.
const MICROSOFT: Guid = Guid::new(0x77fa9abd, 0x0359, 0x4d32, [0xbd, 0x60, 0x28, 0xf4, 0xe7, 0x8f, 0x78, 0x4b]);
/// `SignatureOwner` of keys that the user gave.
const VIRIDIAN: Guid = Guid::new(0x5d2e6b1c, 0x41f0, 0x4c37, [0x9a, 0x6e, 0x0f, 0x1b, 0x7c, 0x55, 0xd8, 0x21]);

const PK: &str = include_str!("../certs/ms-oem-pk-2023.pem");
const KEK_2011: &str = include_str!("../certs/ms-kek-2011.pem");
const KEK_2023: &str = include_str!("../certs/ms-kek-2023.pem");
const WINDOWS_2011: &str = include_str!("../certs/windows-2011.pem");
const WINDOWS_2023: &str = include_str!("../certs/windows-2023.pem");
const UEFI_2011: &str = include_str!("../certs/ms-uefi-2011.pem");
const UEFI_2023: &str = include_str!("../certs/ms-uefi-2023.pem");
/// Largest key file that is read.
const MAX_KEY_FILE: u64 = 1 << 20;

/// A template.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Template {
    /// Windows and third-party boot loaders (shim): the default.
    #[default]
    Microsoft,
    /// Windows only.
    Windows,
    /// Third-party boot loaders only.
    UefiCa,
    /// No keys: the machine starts in setup mode.
    None,
    /// A file of the user's own keys: PEM certificates; the first is PK, and all are KEK and db. A line
    /// `sha256: HEX` adds an image's digest to db.
    File(PathBuf),
}

impl FromStr for Template {
    type Err = TemplateError;
    fn from_str(text: &str) -> Result<Self, TemplateError> {
        Ok(match text {
            "microsoft" => Self::Microsoft,
            "windows" => Self::Windows,
            "uefi-ca" => Self::UefiCa,
            "none" => Self::None,
            path if path.contains(['/', '.']) => Self::File(path.into()),
            other => return Err(TemplateError::Unknown(other.into())),
        })
    }
}

impl std::fmt::Display for Template {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Microsoft => f.write_str("microsoft"),
            Self::Windows => f.write_str("windows"),
            Self::UefiCa => f.write_str("uefi-ca"),
            Self::None => f.write_str("none"),
            Self::File(path) => write!(f, "{}", path.display()),
        }
    }
}

/// Why a template cannot be applied.
#[derive(Debug, Error)]
pub enum TemplateError {
    /// No such name.
    #[error("unknown Secure Boot template '{0}': expected microsoft, windows, uefi-ca, none, or a file of keys")]
    Unknown(String),
    /// The file cannot be read.
    #[error("Secure Boot keys {path}: {source}")]
    Io {
        /// Which file.
        path: PathBuf,
        /// What the host said.
        source: std::io::Error,
    },
    /// The file holds something else.
    #[error("Secure Boot keys {path}: {why}")]
    Content {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        why: &'static str,
    },
    /// The variables do not take the keys.
    #[error("the keys do not fit into the firmware's variables")]
    Store,
}

/// Values of the four Secure Boot variables.
struct Keys {
    pk: Vec<u8>,
    kek: Vec<u8>,
    db: Vec<u8>,
}

impl Template {
    fn keys(&self) -> Result<Option<Keys>, TemplateError> {
        let windows = [WINDOWS_2011, WINDOWS_2023];
        let uefi = [UEFI_2011, UEFI_2023];
        let db: Vec<&str> = match self {
            Self::Microsoft => [windows, uefi].concat(),
            Self::Windows => windows.to_vec(),
            Self::UefiCa => uefi.to_vec(),
            Self::None => return Ok(None),
            Self::File(path) => return user_keys(path).map(Some),
        };
        let lists = |pems: &[&str]| pems.iter().flat_map(|p| certificate_list(&built_in(p), MICROSOFT)).collect();
        Ok(Some(Keys { pk: lists(&[PK]), kek: lists(&[KEK_2011, KEK_2023]), db: lists(&db) }))
    }

    /// Writes the template's keys into a store, replacing what was there.
    pub fn apply(&self, store: &mut VariableStore) -> Result<(), TemplateError> {
        const SECURE: u32 = attribute::NON_VOLATILE
            | attribute::BOOTSERVICE_ACCESS
            | attribute::RUNTIME_ACCESS
            | attribute::TIME_BASED_AUTHENTICATED_WRITE_ACCESS;
        let keys = self.keys()?.unwrap_or(Keys { pk: vec![], kek: vec![], db: vec![] });
        let all = [
            ("db", IMAGE_SECURITY_DATABASE, keys.db),
            ("dbx", IMAGE_SECURITY_DATABASE, vec![]),
            ("KEK", GLOBAL_VARIABLE, keys.kek),
            ("PK", GLOBAL_VARIABLE, keys.pk),
        ];
        for (name, vendor, value) in all {
            store.set_internal(name, vendor, SECURE, &value).map_err(|_: VariableError| TemplateError::Store)?;
        }
        Ok(())
    }
}

/// A certificate that is part of this program.
fn built_in(pem: &str) -> Vec<u8> {
    pem_blocks(pem).next().flatten().unwrap_or_default()
}

/// The DER of every certificate in a PEM text; `None` for a block that is not base64.
fn pem_blocks(text: &str) -> impl Iterator<Item = Option<Vec<u8>>> {
    text.split("-----BEGIN CERTIFICATE-----").skip(1).map(|rest| {
        let body = rest.split("-----END CERTIFICATE-----").next()?;
        let compact: String = body.chars().filter(|c| !c.is_whitespace()).collect();
        Base64::decode_vec(&compact).ok()
    })
}

fn certificate_list(der: &[u8], owner: Guid) -> Vec<u8> {
    sigdb::list(CERT_X509, owner, &[der])
}

fn user_keys(path: &Path) -> Result<Keys, TemplateError> {
    let bad = |why| TemplateError::Content { path: path.to_owned(), why };
    let io = |source| TemplateError::Io { path: path.to_owned(), source };
    if std::fs::metadata(path).map_err(io)?.len() > MAX_KEY_FILE {
        return Err(bad("larger than 1 MiB: not a file of PEM certificates"));
    }
    let text = String::from_utf8(std::fs::read(path).map_err(io)?).map_err(|_| bad("not text: expected PEM"))?;
    let mut certificates = Vec::new();
    for der in pem_blocks(&text) {
        let der = der.ok_or(bad("a certificate is not valid base64"))?;
        x509::Certificate::parse(&der).map_err(|_| bad("a certificate is not valid X.509"))?;
        certificates.push(der);
    }
    let first = certificates.first().ok_or(bad("holds no PEM certificate"))?;
    let pk = certificate_list(first, VIRIDIAN);
    let all: Vec<u8> = certificates.iter().flat_map(|c| certificate_list(c, VIRIDIAN)).collect();
    let mut db = all.clone();
    for line in text.lines().filter_map(|l| l.trim().strip_prefix("sha256:")) {
        let digits = line.trim();
        let digest: Option<Vec<u8>> = (digits.len() == 64 && digits.is_ascii())
            .then(|| (0..32).map(|i| u8::from_str_radix(&digits[i * 2..i * 2 + 2], 16).ok()).collect())
            .flatten();
        let digest = digest.ok_or(bad("a 'sha256:' line does not hold 64 hexadecimal digits"))?;
        db.extend(sigdb::list(CERT_SHA256, VIRIDIAN, &[&digest]));
    }
    Ok(Keys { pk, kek: all, db })
}

#[cfg(test)]
mod tests {
    use super::*;
    use uefi_core::secure::hash::HashAlgorithm;
    use uefi_core::variables::Quota;

    #[test]
    fn built_in_certificates_are_what_microsoft_published() {
        let expected = [
            (PK, "2f569e8edaf9657d"),
            (KEK_2011, "a1117f516a32cefc"),
            (KEK_2023, "3cd3f0309edae228"),
            (WINDOWS_2011, "e8e95f0733a55e8b"),
            (WINDOWS_2023, "076f1fea90ac2915"),
            (UEFI_2011, "48e99b991f57fc52"),
            (UEFI_2023, "f6124e34125bee3f"),
        ];
        for (pem, fingerprint) in expected {
            let der = built_in(pem);
            x509::Certificate::parse(&der).unwrap();
            let digest: String = HashAlgorithm::Sha256.digest(&der)[..8].iter().map(|b| format!("{b:02x}")).collect();
            assert_eq!(digest, fingerprint);
        }
    }

    #[test]
    fn templates_put_the_machine_in_user_mode() {
        let mut store = VariableStore::new(Quota::default());
        for (template, anchors) in
            [(Template::Microsoft, 4), (Template::Windows, 2), (Template::UefiCa, 2), (Template::None, 0)]
        {
            template.apply(&mut store).unwrap();
            store.reset(true);
            assert_eq!(store.setup_mode(), anchors == 0);
            assert_eq!(store.secure_boot(), anchors != 0);
            assert_eq!(sigdb::certificates(store.database("db")).len(), anchors);
        }
    }

    #[test]
    fn user_files_are_checked() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keys.pem");
        let apply = |text: &str| {
            std::fs::write(&path, text).unwrap();
            let mut store = VariableStore::new(Quota::default());
            Template::File(path.clone()).apply(&mut store).map(|()| sigdb::entries(store.database("db")).count())
        };
        let digest = "ab".repeat(32);
        assert_eq!(apply(&format!("{UEFI_2023}\n{UEFI_2011}\nsha256: {digest}\n")).unwrap(), 3);
        assert!(apply("nothing").unwrap_err().to_string().contains("no PEM certificate"));
        assert!(apply("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----").is_err());
        assert!(apply(&format!("{UEFI_2011}\nsha256: 12")).unwrap_err().to_string().contains("64 hexadecimal"));
        assert!("windoze".parse::<Template>().is_err());
    }
}
