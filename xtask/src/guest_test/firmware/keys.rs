//! A user's own keys: made with openssl, enrolled by a template, used by sbsign and sign-efi-sig-list.

use crate::guests::Guests;
use crate::guests::disk::{run, tool};
use anyhow::Result;
use std::fs;
use std::path::{Path, PathBuf};

const CONFIG: &str =
    "[req]\ndistinguished_name = name\nx509_extensions = v3\n[name]\n[v3]\nbasicConstraints = CA:TRUE\n";

/// A key pair with a self-signed certificate.
pub struct Key {
    key: PathBuf,
    /// PEM.
    pub certificate: PathBuf,
}

impl Key {
    /// Makes one.
    pub fn new(guests: &Guests, folder: &Path, name: &str) -> Result<Self> {
        let made = Self { key: folder.join(format!("{name}.key")), certificate: folder.join(format!("{name}.pem")) };
        let config = folder.join("openssl.cnf");
        fs::write(&config, CONFIG)?;
        run(tool(guests, "efitools", "usr/bin/openssl")
            .args(["req", "-new", "-x509", "-newkey", "rsa:2048", "-nodes", "-sha256", "-days", "3650"])
            .arg("-config")
            .arg(&config)
            .args(["-subj", &format!("/CN=Viridian test {name}/")])
            .arg("-keyout")
            .arg(&made.key)
            .arg("-out")
            .arg(&made.certificate))?;
        Ok(made)
    }

    /// Signs an image.
    pub fn sign(&self, guests: &Guests, image: &Path, signed: &Path) -> Result<()> {
        run(tool(guests, "efitools", "usr/bin/sbsign")
            .arg("--key")
            .arg(&self.key)
            .arg("--cert")
            .arg(&self.certificate)
            .arg("--output")
            .arg(signed)
            .arg(image))
    }

    /// An update of dbx with an image's hash, signed by this key.
    pub fn forbid(&self, guests: &Guests, image: &Path, update: &Path) -> Result<()> {
        let list = update.with_extension("esl");
        run(tool(guests, "efitools", "usr/bin/hash-to-efi-sig-list").arg(image).arg(&list))?;
        // `-a`: an appending write, as dbx updates are.
        run(tool(guests, "efitools", "usr/bin/sign-efi-sig-list")
            .arg("-a")
            .args(["-t", "2026-01-01 00:00:00"])
            .arg("-k")
            .arg(&self.key)
            .arg("-c")
            .arg(&self.certificate)
            .arg("dbx")
            .arg(&list)
            .arg(update))
    }
}

/// A template: own certificates first, then Microsoft's for third-party loaders (which the product has with it).
pub fn template(file: &Path, own: &[&Key]) -> Result<()> {
    let mut text = String::new();
    for key in own {
        text.push_str(&fs::read_to_string(&key.certificate)?);
    }
    let certificates = crate::workspace_root().join("crates/bios/certs");
    for name in ["ms-uefi-2011.pem", "ms-uefi-2023.pem"] {
        text.push_str(&fs::read_to_string(certificates.join(name))?);
    }
    Ok(fs::write(file, text)?)
}
