//! Bootable systems: Debian on a GPT disk with its signed boot chain, and an installer-style DVD.
//!
//! Nothing here needs root or a loop device: `mmdebstrap` makes the root file system as a tar, `mke2fs -d` makes ext4 of
//! it, mtools fills the EFI system partition, and the partition table is written here. Builders come from the guests
//! folder and run with their own libraries; of the machine only apt and dpkg are used.
//!
//! A finished image is kept by its recipe (packages, scripts and layout): a changed recipe builds it anew.

mod dvd;
mod gpt;
mod ordinary;
mod root;

use super::sources::HostSources;
use super::{Guests, Item, Kind, spinner};
use crate::trees;
use crate::vm::build_viridian;
use anyhow::{Context, Result, bail};
use gpt::Partition;
use sha2::{Digest, Sha256};
use std::fs::{self, File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::Command;

const MIB: u64 = 1 << 20;
/// The EFI system partition: boot loaders and room for a few more EFI programs.
const ESP_MIB: u64 = 64;
/// The root file system; most of it is empty and takes no space in a dynamic VHDX.
const ROOT_MIB: u64 = 1400;

/// GRUB's configuration beside it on the EFI system partition, as Debian's grub-install writes it.
const ESP_GRUB_CFG: &str =
    "search.fs_uuid ROOT-UUID root\nset prefix=($root)'/boot/grub'\nconfigfile $prefix/grub.cfg\n";

/// Tools that building an item takes.
pub fn needs(item: &Item) -> &'static [&'static str] {
    match (item.kind, item.suite) {
        (Kind::Disk, "trixie") => &["mmdebstrap", "fakeroot", "mke2fs", "disk-tools", "shim-signed-13", "grub-efi-13"],
        (Kind::Disk, _) => &["mmdebstrap", "fakeroot", "mke2fs", "disk-tools", "shim-signed", "grub-efi"],
        (Kind::Dvd, _) => &["disk-tools", "shim-signed", "grub-efi", "bookworm-cloud", "busybox"],
        _ => &[],
    }
}

/// One line that changes when the image must be built anew.
pub fn recipe(item: &Item) -> String {
    let mut hash = Sha256::new();
    for part in [root::RECIPE, ESP_GRUB_CFG, dvd::GRUB_CFG, include_str!("mod.rs"), include_str!("dvd.rs")] {
        hash.update(part);
    }
    let digest: String = hash.finalize()[..8].iter().map(|b| format!("{b:02x}")).collect();
    format!("{:?} {} {} {digest}", item.kind, item.suite, item.packages.join(","))
}

/// Builds an image and puts it where [`Guests::image`] says.
///
/// # Errors
/// When a builder fails, with its last lines, or when the folder cannot be written.
pub fn build(guests: &Guests, item: &Item, sources: &HostSources) -> Result<()> {
    let work = guests.root().join(format!("new-{}", item.name));
    let _ = fs::remove_dir_all(&work);
    fs::create_dir_all(&work).with_context(|| format!("cannot create {}", work.display()))?;
    let target = guests.image(item.name);
    fs::create_dir_all(target.parent().context("images have a folder")?)?;
    let made = match item.kind {
        Kind::Dvd => dvd::build(guests, &work)?,
        _ => build_disk(guests, item, sources, &work)?,
    };
    fs::rename(&made, &target).with_context(|| format!("cannot replace {}", target.display()))?;
    let size = fs::metadata(&target)?.len();
    let _ = fs::remove_dir_all(&work);
    println!("{:16} {}, {} MiB", item.name, target.display(), size / MIB);
    Ok(())
}

fn build_disk(guests: &Guests, item: &Item, sources: &HostSources, work: &Path) -> Result<PathBuf> {
    let bar = spinner(format!("{}: mmdebstrap makes the root file system (about a minute)", item.name));
    let tar = root::make_tar(guests, item, sources, work)?;
    bar.set_message(format!("{}: file systems and partition table", item.name));
    let uuid = root_uuid(item);
    let disk = work.join("disk.raw");
    let (esp_first, root_first) = (MIB, MIB + ESP_MIB * MIB);
    let size = root_first + ROOT_MIB * MIB + MIB;
    File::create(&disk)?.set_len(size)?;

    let root_image = work.join("root.img");
    File::create(&root_image)?.set_len(ROOT_MIB * MIB)?;
    run(tool(guests, "mke2fs", "sbin/mke2fs")
        .env("MKE2FS_CONFIG", "/dev/null")
        .args(["-q", "-F", "-t", "ext4", "-b", "4096", "-I", "256", "-L", "root", "-U", &uuid, "-m", "1"])
        // An initialised journal and inode tables: the guest's first mount has nothing to do in the background.
        .args(["-O", "extent,64bit,dir_index,has_journal,sparse_super,large_file,filetype,metadata_csum"])
        .args(["-E", "lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0"])
        .arg("-d")
        .arg(&tar)
        .arg(&root_image))?;
    let esp_image = work.join("esp.img");
    esp(guests, item, &uuid, &esp_image)?;
    copy_into(&esp_image, &disk, esp_first)?;
    copy_into(&root_image, &disk, root_first)?;
    gpt::write(
        &disk,
        gpt::unique(item.name, "disk"),
        &[
            Partition {
                kind: gpt::TYPE_ESP,
                unique: gpt::unique(item.name, "esp"),
                first: esp_first,
                bytes: ESP_MIB * MIB,
                name: "EFI System Partition",
            },
            Partition {
                kind: gpt::TYPE_LINUX_ROOT,
                unique: gpt::unique(item.name, "root"),
                first: root_first,
                bytes: ROOT_MIB * MIB,
                name: "root",
            },
        ],
    )?;
    bar.set_message(format!("{}: writing the VHDX", item.name));
    let made = work.join("disk.vhdx");
    run(Command::new(build_viridian(false)?).args(["vhd", "convert", "--block-size", "2M"]).arg(&disk).arg(&made))?;
    bar.finish_and_clear();
    Ok(made)
}

/// The boot loaders as Debian lays them out: shim under the vendor's name and as removable-media path, GRUB, the fallback
/// program that makes the boot entry, and MOK manager.
fn esp(guests: &Guests, item: &Item, uuid: &str, image: &Path) -> Result<()> {
    let [shim, grub] =
        if item.suite == "trixie" { ["shim-signed-13", "grub-efi-13"] } else { ["shim-signed", "grub-efi"] };
    let shim = guests.tool(shim).join("usr/lib/shim");
    let grub = guests.tool(grub).join("usr/lib/grub/x86_64-efi-signed");
    let fat = Fat::format(guests, image, ESP_MIB, "ESP")?;
    for folder in ["EFI", "EFI/BOOT", "EFI/debian"] {
        fat.folder(folder)?;
    }
    fat.file(&shim.join("shimx64.efi.signed"), "EFI/BOOT/BOOTX64.EFI")?;
    fat.file(&shim.join("fbx64.efi.signed"), "EFI/BOOT/fbx64.efi")?;
    fat.file(&shim.join("mmx64.efi.signed"), "EFI/BOOT/mmx64.efi")?;
    fat.file(&shim.join("shimx64.efi.signed"), "EFI/debian/shimx64.efi")?;
    fat.file(&shim.join("fbx64.efi.signed"), "EFI/debian/fbx64.efi")?;
    fat.file(&shim.join("mmx64.efi.signed"), "EFI/debian/mmx64.efi")?;
    fat.file(&grub.join("grubx64.efi.signed"), "EFI/debian/grubx64.efi")?;
    // Text for the fallback program is UCS-2 with a byte-order mark.
    let entry = "\u{feff}shimx64.efi,debian,,This is the boot entry for debian\n";
    let entry: Vec<u8> = entry.encode_utf16().flat_map(u16::to_le_bytes).collect();
    fat.bytes(&entry, "EFI/debian/BOOTX64.CSV")?;
    fat.bytes(ESP_GRUB_CFG.replace("ROOT-UUID", uuid).as_bytes(), "EFI/debian/grub.cfg")
}

/// The root file system's UUID, the same in every build of an item.
pub fn root_uuid(item: &Item) -> String {
    let b = gpt::unique(item.name, "file system");
    let hex: String = b.iter().map(|b| format!("{b:02x}")).collect();
    format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

/// A FAT file system in an image, filled with mtools.
pub struct Fat<'a> {
    guests: &'a Guests,
    image: &'a Path,
}

impl<'a> Fat<'a> {
    /// Makes an empty one: FAT32 from 33 MiB on, FAT16 below.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn format(guests: &'a Guests, image: &'a Path, mib: u64, label: &str) -> Result<Self> {
        File::create(image).with_context(|| format!("cannot write {}", image.display()))?.set_len(mib * MIB)?;
        let bits = if mib > 33 { "32" } else { "16" };
        run(tool(guests, "disk-tools", "sbin/mkfs.fat")
            .args(["-F", bits, "-s", "1", "-n", label, "-i", "56495249"])
            .arg(image))?;
        Ok(Self { guests, image })
    }

    fn mtools(&self, program: &str) -> Command {
        let mut command = tool(self.guests, "disk-tools", "usr/bin/mtools");
        command.args(["-c", program]).env("MTOOLSRC", "/dev/null").env("MTOOLS_SKIP_CHECK", "1");
        command.arg("-i").arg(self.image);
        command
    }

    /// Makes a folder.
    ///
    /// # Errors
    /// When it exists already.
    pub fn folder(&self, path: &str) -> Result<()> {
        run(self.mtools("mmd").arg(format!("::/{path}")))
    }

    /// Copies a file of the host.
    ///
    /// # Errors
    /// When it is missing or does not fit.
    pub fn file(&self, source: &Path, path: &str) -> Result<()> {
        run(self.mtools("mcopy").args(["-o", "-m"]).arg(source).arg(format!("::/{path}")))
    }

    /// Writes a file with these contents.
    ///
    /// # Errors
    /// When it does not fit.
    pub fn bytes(&self, contents: &[u8], path: &str) -> Result<()> {
        let temporary = self.image.with_extension("content");
        fs::write(&temporary, contents)?;
        let result = self.file(&temporary, path);
        let _ = fs::remove_file(&temporary);
        result
    }
}

/// A program of a fetched tree, run by the tree's own loader with its own libraries.
pub fn tool(guests: &Guests, name: &str, program: &str) -> Command {
    let mut command = trees::program(&guests.tool(name), program);
    command.env("LC_ALL", "C");
    command
}

/// Runs a builder; what it says is only shown when it fails.
///
/// # Errors
/// With the last lines of what it said.
pub fn run(command: &mut Command) -> Result<()> {
    let output = command.stdin(std::process::Stdio::null()).output();
    let output = output.with_context(|| format!("cannot run {}", command.get_program().to_string_lossy()))?;
    if output.status.success() {
        return Ok(());
    }
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().filter(|l| !l.trim().is_empty()).collect();
    let program = command.get_args().map(|a| a.to_string_lossy()).find(|a| a.starts_with('/') && !a.contains(':'));
    bail!(
        "{} failed ({}): {}",
        program.unwrap_or_default(),
        output.status,
        lines[lines.len().saturating_sub(6)..].join(" | ")
    )
}

/// Copies a sparse image into a disk at an offset; blocks of zeros stay holes.
fn copy_into(source: &Path, disk: &Path, offset: u64) -> Result<()> {
    use std::io::{Read, Write};
    let mut source = File::open(source)?;
    let mut disk = OpenOptions::new().write(true).open(disk)?;
    let mut buffer = vec![0; 256 << 10];
    let mut at = offset;
    loop {
        let count = source.read(&mut buffer)?;
        if count == 0 {
            return Ok(());
        }
        if buffer[..count].iter().any(|b| *b != 0) {
            disk.seek(SeekFrom::Start(at))?;
            disk.write_all(&buffer[..count])?;
        }
        at += count as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guests::CATALOGUE;

    #[test]
    fn builders_are_tools_of_the_catalogue() {
        for item in CATALOGUE {
            for name in needs(item) {
                let builder = CATALOGUE.iter().find(|i| i.name == *name).unwrap();
                assert!(!matches!(builder.kind, Kind::Disk | Kind::Dvd), "{name}");
            }
        }
    }

    #[test]
    fn systems_differ_and_stay_the_same() {
        let disk = |name: &str| CATALOGUE.iter().find(|i| i.name == name).unwrap();
        assert_ne!(root_uuid(disk("debian-12-disk")), root_uuid(disk("debian-13-disk")));
        assert_eq!(root_uuid(disk("debian-12-disk")), root_uuid(disk("debian-12-disk")));
        assert_ne!(recipe(disk("debian-12-disk")), recipe(disk("debian-13-disk")));
        assert!(!recipe(disk("debian-12-disk")).contains('\n'));
    }
}
