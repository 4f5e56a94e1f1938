//! Initramfs images: static busybox, the modules that a test needs, programs of Debian's packages, and an `/init` that
//! runs a script and prints its verdict.
//!
//! An image is named after its contents (SHA-256 of the uncompressed archive), so an image that is there is right.

pub mod cpio;
pub mod disks;
mod modules;
mod programs;

use crate::guests::{Guests, Kernel};
use anyhow::{Context, Result, bail};
use cpio::{Archive, Node};
use modules::Modules;
use sha2::{Digest, Sha256};
use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

const INIT: &str = include_str!("init.sh");
/// Runs a test script and prints its verdict; also used on the host, by `bench cpu`.
pub const RUN: &str = include_str!("run.sh");

/// What goes into an image beside busybox and `/init`.
#[derive(Clone, Debug, Default)]
pub struct Contents {
    /// Modules, loaded by `/init` in this order, each after what it depends on.
    pub modules: Vec<String>,
    /// Programs with their libraries: tool of the catalogue, path in its tree.
    pub programs: Vec<(String, String)>,
    /// Folders with all that is in them: tool of the catalogue, path in its tree.
    pub folders: Vec<(String, String)>,
    /// Folder of the image below which programs and folders go; the root when empty.
    pub under: String,
    /// A program of the host with its libraries, as `usr/bin/viridian` of the image.
    pub nested: Option<PathBuf>,
    /// Files of our own: path, permission bits, contents.
    pub files: Vec<(String, u32, Vec<u8>)>,
    /// Tool of the catalogue that the shell and the small commands come from; empty: `busybox`.
    pub busybox: &'static str,
    /// Leave the archive uncompressed: large images unpack faster in the guest.
    pub uncompressed: bool,
}

/// Builds the image, or finds it.
///
/// # Errors
/// When something that goes into it is missing.
pub fn build(guests: &Guests, kernel: &Kernel, contents: &Contents) -> Result<PathBuf> {
    let mut archive = Archive::default();
    add_base(&mut archive, guests, contents)?;
    add_tests(&mut archive)?;
    add_modules(&mut archive, kernel, contents)?;
    add_contents(&mut archive, guests, contents)?;
    store(guests, &archive, contents.uncompressed)
}

fn add_modules(archive: &mut Archive, kernel: &Kernel, contents: &Contents) -> Result<()> {
    let mut list = String::new();
    if !contents.modules.is_empty() {
        for module in Modules::open(&kernel.modules)?
            .closure(&contents.modules)
            .with_context(|| format!("kernel {}", kernel.name))?
        {
            writeln!(list, "{}", module.file_name)?;
            archive.file(&format!("lib/viridian/modules/{}", module.file_name), 0o644, module.data);
        }
    }
    archive.file("lib/viridian/modules.list", 0o644, list);
    Ok(())
}

fn add_contents(archive: &mut Archive, guests: &Guests, contents: &Contents) -> Result<()> {
    for (tool, path) in &contents.folders {
        programs::add_folder(archive, &contents.under, &guests.tool(tool), path)?;
    }
    for (tool, path) in &contents.programs {
        programs::add_program(archive, &contents.under, &guests.tool(tool), path)?;
    }
    if let Some(path) = &contents.nested {
        let path = path.canonicalize().with_context(|| format!("cannot find {}", path.display()))?;
        let inside = path.strip_prefix("/").ok().and_then(Path::to_str).context("a program with a path of text")?;
        programs::add_program(archive, "", Path::new("/"), inside)?;
        archive.link("usr/bin/viridian", &format!("/{inside}"));
    }
    for (path, mode, data) in &contents.files {
        archive.file(path, *mode, data.clone());
    }
    Ok(())
}

fn add_base(archive: &mut Archive, guests: &Guests, contents: &Contents) -> Result<()> {
    let tool = if contents.busybox.is_empty() { "busybox" } else { contents.busybox };
    let data = guests.tool(tool).join("bin/busybox");
    let data = fs::read(&data).with_context(|| format!("cannot read {}", data.display()))?;
    let busybox = guests.tool("busybox").join("bin/busybox");
    archive.file("bin/busybox", 0o755, data);
    // The program runs on the host as well, and knows its own commands. (One of 32 bits may not: it has the same.)
    let output = Command::new(&busybox).arg("--list").output().context("cannot run the fetched busybox")?;
    if !output.status.success() {
        bail!("{} --list failed", busybox.display());
    }
    for applet in String::from_utf8_lossy(&output.stdout).lines().filter(|a| *a != "busybox" && !a.is_empty()) {
        archive.link(&format!("bin/{applet}"), "busybox");
    }
    for dir in ["dev", "proc", "sys", "run", "tmp", "root", "etc", "sbin", "mnt"] {
        archive.add(dir, Node::Directory);
    }
    archive.add("dev/console", Node::Character { major: 5, minor: 1 });
    archive.add("dev/null", Node::Character { major: 1, minor: 3 });
    archive.file("etc/passwd", 0o644, "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n");
    archive.file("etc/group", 0o644, "root:x:0:\nnogroup:x:65534:\n");
    archive.file("etc/hosts", 0o644, "127.0.0.1 localhost\n127.0.1.1 viridian\n");
    archive.file(
        "etc/profile",
        0o644,
        "PS1='viridian:\\w# '\nalias poweroff='poweroff -f' reboot='reboot -f' halt='halt -f'\n",
    );
    archive.file("init", 0o755, INIT);
    // What the kernel runs when the host asks for a shutdown or a restart (the driver's orderly_poweroff).
    for (name, command) in [("poweroff", "poweroff"), ("reboot", "reboot")] {
        let text =
            format!("#!/bin/sh\necho VIRIDIAN-NOTE: /sbin/{name} > /dev/console\nsync\nexec busybox {command} -f\n");
        archive.file(&format!("sbin/{name}"), 0o755, text);
    }
    archive.file("lib/viridian/run.sh", 0o644, RUN);
    Ok(())
}

/// Every script of `tests/guest` is in every image: they are small, and one image serves many tests.
fn add_tests(archive: &mut Archive) -> Result<()> {
    let dir = crate::workspace_root().join("tests/guest");
    for entry in fs::read_dir(&dir).with_context(|| format!("cannot read {}", dir.display()))? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "sh") {
            let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            archive.file(&format!("tests/{name}"), 0o755, fs::read(&path)?);
        }
    }
    Ok(())
}

fn store(guests: &Guests, archive: &Archive, uncompressed: bool) -> Result<PathBuf> {
    let mut bytes = Vec::new();
    archive.write(&mut bytes)?;
    let mut name = String::new();
    for byte in &Sha256::digest(&bytes)[..12] {
        write!(name, "{byte:02x}")?;
    }
    name.push_str(if uncompressed { ".cpio" } else { ".cpio.gz" });
    let dir = guests.root().join("initramfs");
    let path = dir.join(&name);
    if path.exists() {
        return Ok(path);
    }
    fs::create_dir_all(&dir)?;
    if !uncompressed {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        encoder.write_all(&bytes)?;
        bytes = encoder.finish()?;
    }
    // Another process may build the same image: write aside, then rename.
    let temporary = dir.join(format!("{name}.{}", std::process::id()));
    fs::write(&temporary, bytes).with_context(|| format!("cannot write {}", temporary.display()))?;
    fs::rename(&temporary, &path)?;
    Ok(path)
}
