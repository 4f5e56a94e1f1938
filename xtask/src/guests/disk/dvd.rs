//! An installer-style DVD: ISO 9660 with an El Torito EFI image that holds the signed loaders; GRUB then reads kernel and
//! initial RAM disk from the ISO itself.

use super::{Fat, MIB, run, tool};
use crate::guests::Guests;
use crate::initramfs::{self, Contents};
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};

/// Debian's GRUB for CDs looks for `/.disk/info` and then reads `/boot/grub/grub.cfg`. The initial RAM disk runs the test
/// script `tests/guest/dvd.sh`.
pub const GRUB_CFG: &str = "set timeout=0\nmenuentry 'Install' {\n    linux /install.amd/vmlinuz console=ttyS0,115200 \
                            viridian.test=dvd\n    initrd /install.amd/initrd.gz\n}\n";
/// Modules that find the DVD.
const MODULES: &[&str] = &["hv_vmbus", "hv_storvsc", "sr_mod", "isofs", "efivarfs"];

/// Builds the image below `work`.
///
/// # Errors
/// When a builder fails.
pub fn build(guests: &Guests, work: &Path) -> Result<PathBuf> {
    let tree = work.join("tree");
    for folder in [".disk", "boot/grub", "install.amd", "EFI/boot"] {
        fs::create_dir_all(tree.join(folder))?;
    }
    let kernel = guests.kernel("bookworm-cloud")?;
    let contents = Contents { modules: MODULES.iter().map(|m| (*m).to_owned()).collect(), ..Contents::default() };
    let initrd = initramfs::build(guests, &kernel, &contents)?;
    fs::write(tree.join(".disk/info"), "Viridian test DVD, Debian's signed boot chain\n")?;
    fs::write(tree.join("boot/grub/grub.cfg"), GRUB_CFG)?;
    fs::copy(&kernel.image, tree.join("install.amd/vmlinuz"))?;
    fs::copy(initrd, tree.join("install.amd/initrd.gz"))?;

    let shim = guests.tool("shim-signed").join("usr/lib/shim");
    let grub = guests.tool("grub-efi").join("usr/lib/grub/x86_64-efi-signed");
    let loaders = [
        (shim.join("shimx64.efi.signed"), "bootx64.efi"),
        (shim.join("mmx64.efi.signed"), "mmx64.efi"),
        (grub.join("gcdx64.efi.signed"), "grubx64.efi"),
    ];
    let image = tree.join("boot/grub/efi.img");
    let fat = Fat::format(guests, &image, 8, "EFI")?;
    fat.folder("efi")?;
    fat.folder("efi/boot")?;
    for (source, name) in &loaders {
        fat.file(source, &format!("efi/boot/{name}"))?;
        fs::copy(source, tree.join("EFI/boot").join(name))
            .with_context(|| format!("cannot copy {}", source.display()))?;
    }
    debug_assert!(fs::metadata(&image)?.len() == 8 * MIB);
    let made = work.join("dvd.iso");
    run(tool(guests, "disk-tools", "usr/bin/xorriso")
        .args(["-as", "mkisofs", "-quiet", "-r", "-J", "-joliet-long", "-V", "VIRIDIAN_DVD"])
        .args(["-e", "boot/grub/efi.img", "-no-emul-boot", "-o"])
        .arg(&made)
        .arg(&tree))?;
    Ok(made)
}
