//! Disk images for guests: a root file system and discs. The tools are those of the catalogue's `disk-tools`.

use super::cpio::Archive;
use super::{Contents, add_base, add_contents, add_tests};
use crate::guests::Guests;
use crate::trees;
use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// MiB that a root file system has beside its contents.
const ROOM_MIB: u64 = 128;

/// A command of `disk-tools`.
pub fn tool(guests: &Guests, path: &str) -> Command {
    let tree = guests.tool("disk-tools");
    let mut command = trees::program(&tree, path);
    command.env("MKE2FS_CONFIG", tree.join("etc/mke2fs.conf"));
    command.stdin(Stdio::null());
    command
}

/// Runs a command that must succeed, and gives its standard output.
///
/// # Errors
/// With what it said.
pub fn must(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("cannot run {command:?}"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
        bail!("{command:?} ended with {}: {}", output.status, said.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Builds a raw image with an ext4 root file system of these contents (modules are the initramfs's), or finds it.
///
/// # Errors
/// When something that goes into it is missing.
pub fn root(guests: &Guests, contents: &Contents) -> Result<PathBuf> {
    let mut archive = Archive::default();
    add_base(&mut archive, guests, contents)?;
    add_tests(&mut archive)?;
    add_contents(&mut archive, guests, contents)?;
    archive.file("lib/viridian/modules.list", 0o644, "");
    archive.file("lib/viridian/root", 0o644, "");
    let mut bytes = Vec::new();
    archive.write(&mut bytes)?;
    let name: String = Sha256::digest(&bytes)[..12].iter().map(|b| format!("{b:02x}")).collect();
    let dir = guests.root().join("initramfs");
    let path = dir.join(format!("{name}.ext4.img"));
    if path.exists() {
        return Ok(path);
    }
    fs::create_dir_all(&dir)?;
    let tree = tempfile::tempdir_in(&dir)?;
    archive.write_tree(tree.path())?;
    let temporary = dir.join(format!("{name}.{}", std::process::id()));
    let size = format!("{}M", (bytes.len() as u64 >> 20) + ROOM_MIB);
    let options = ["-q", "-t", "ext4", "-F", "-E", "root_owner=0:0", "-d"];
    must(tool(guests, "sbin/mke2fs").args(options).arg(tree.path()).arg(&temporary).arg(size))?;
    fs::rename(&temporary, &path)?;
    Ok(path)
}

/// Makes a disc with one file, `/NAME`, of this content.
///
/// # Errors
/// When the tool fails.
pub fn disc(guests: &Guests, path: &Path, name: &str, content: &[u8]) -> Result<()> {
    let tree = tempfile::tempdir()?;
    fs::write(tree.path().join(name), content)?;
    let _ = fs::remove_file(path);
    let options = ["-as", "mkisofs", "-quiet", "-R", "-V", "VIRIDIAN", "-o"];
    must(tool(guests, "usr/bin/xorriso").args(options).arg(path).arg(tree.path()))?;
    Ok(())
}
