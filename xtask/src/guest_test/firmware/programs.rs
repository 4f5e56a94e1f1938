//! EFI programs: refused under Secure Boot, each with its reason, and at work without it.

use super::super::Bench;
use super::keys::{Key, template};
use super::machine::{Machine, fat_disk};
use crate::initramfs::{self, Contents};
use anyhow::{Context, Result, ensure};
use std::fs;
use std::path::{Path, PathBuf};

/// Where the removable-media path leads.
pub const DEFAULT: &str = "EFI/BOOT/BOOTX64.EFI";

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path that is not UTF-8")
}

/// Unsigned programs of Debian's packages.
fn unsigned(bench: &Bench) -> Result<Vec<(String, PathBuf)>> {
    let tool = |name: &str| bench.guests.tool(name);
    let mut programs = vec![
        ("shell".to_owned(), tool("efi-shell").join("usr/share/efi-shell-x64/shellx64.efi")),
        ("memtest".to_owned(), tool("memtest86").join("boot/memtest86+x64.efi")),
        ("ipxe".to_owned(), tool("ipxe").join("boot/ipxe.efi")),
        ("systemd-boot".to_owned(), tool("systemd-boot").join("usr/lib/systemd/boot/efi/systemd-bootx64.efi")),
    ];
    for entry in fs::read_dir(tool("efitools").join("usr/lib/efitools/x86_64-linux-gnu"))? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "efi") {
            let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            programs.push((name, path));
        }
    }
    programs.sort();
    Ok(programs)
}

/// A copy with one byte changed.
fn changed(source: &Path, at: usize, target: &Path) -> Result<()> {
    let mut bytes = fs::read(source)?;
    *bytes.get_mut(at).with_context(|| format!("{} has no byte {at:#x}", source.display()))? ^= 0x10;
    Ok(fs::write(target, bytes)?)
}

/// Offsets in a signed image: the stack's reserve in the header, code, and inside the first certificate.
fn places(image: &Path) -> Result<[usize; 3]> {
    let bytes = fs::read(image)?;
    let word = |at: usize| bytes.get(at..at + 4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]) as usize);
    let pe = word(0x3c).context("not a PE image")?;
    let table = word(pe + 24 + 112 + 32).context("not a PE image")?;
    // The digest of the image stands at the beginning of the signature: 0x40 is inside of it.
    Ok([pe + 24 + 72, 0x2000, table + 0x58])
}

/// Every image is the loader of a disk of its own; the boot manager tries all and says why each was refused.
pub fn refusals(bench: &Bench, folder: &Path) -> Result<()> {
    let mine = Key::new(bench.guests, folder, "mine")?;
    let stranger = Key::new(bench.guests, folder, "stranger")?;
    let keys = folder.join("template.pem");
    template(&keys, &[&mine])?;
    let hello = bench.guests.tool("efitools").join("usr/lib/efitools/x86_64-linux-gnu/HelloWorld.efi");
    let shim = bench.guests.tool("shim-signed").join("usr/lib/shim/shimx64.efi.signed");
    let grub = bench.guests.tool("grub-efi").join("usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed");

    // (name, image, what the reason must contain)
    let mut images: Vec<(String, PathBuf, &str)> =
        unsigned(bench)?.into_iter().map(|(name, path)| (name, path, "not signed")).collect();
    let by_stranger = folder.join("stranger.efi");
    stranger.sign(bench.guests, &hello, &by_stranger)?;
    images.push(("by-stranger".into(), by_stranger, "Viridian test stranger"));
    images.push(("grub".into(), grub, "Debian"));
    let accepted = folder.join("mine.efi");
    mine.sign(bench.guests, &hello, &accepted)?;
    for (name, image) in [("mine", &accepted), ("shim", &shim)] {
        for (place, at) in ["header", "code", "certificate"].iter().zip(places(image)?) {
            let broken = folder.join(format!("{name}-{place}.efi"));
            changed(image, at, &broken)?;
            // Of shim's two signatures the second is whole when the first is damaged.
            if (name, *place) != ("shim", "certificate") {
                images.push((format!("{name}-{place}"), broken, "signature"));
            }
        }
    }
    let mut disks = Vec::new();
    for (name, path, _) in &images {
        let disk = folder.join(format!("disk-{name}.img"));
        fat_disk(bench, &disk, 8, &[(path, DEFAULT)])?;
        disks.push(disk);
    }
    let mut arguments = vec!["--memory", "256M", "--secure-boot-template", text(&keys)?];
    for disk in &disks {
        arguments.extend(["--disk", text(disk)?]);
    }
    let mut machine = Machine::start(bench, folder, "refused", &arguments)?;
    machine.expect("could not boot an operating system")?;
    machine.powered_off()?;
    let summary = machine.text().split("could not boot an operating system").nth(1).unwrap_or_default().to_owned();
    // Every attempt has its number, its disk and its reason.
    let reasons: Vec<&str> = summary.split("Secure Boot refused").skip(1).collect();
    ensure!(reasons.len() == images.len(), "{} of {} images were refused: {summary}", reasons.len(), images.len());
    for ((name, _, want), reason) in images.iter().zip(&reasons) {
        let reason = reason.replace(['\r', '\n'], "");
        ensure!(reason.contains(want), "{name} must be refused because of \"{want}\", the screen says:{reason}");
    }

    // The same program, signed with a key of the template, runs; and unsigned without Secure Boot.
    for (name, image, more) in [
        ("accepted", &accepted, &["--secure-boot-template", text(&keys)?][..]),
        ("off", &hello, &["--secure-boot", "off"]),
    ] {
        let disk = folder.join(format!("{name}.img"));
        fat_disk(bench, &disk, 8, &[(image, DEFAULT)])?;
        let mut arguments = vec!["--memory", "256M", "--disk", text(&disk)?];
        arguments.extend(more);
        let mut machine = Machine::start(bench, folder, name, &arguments)?;
        machine.expect("execute an unsigned binary").with_context(|| format!("the program, {name}"))?;
        machine.type_serial("\r")?;
        machine.expect("ended without booting")?;
        machine.powered_off()?;
    }
    Ok(())
}

/// What the shell runs by itself.
const SCRIPT: &str = "@echo -off\r\nmap -r\r\nfs0:\r\necho written-by-the-shell > fs0:\\written.txt\r\ntype fs0:\\written.txt\r\n\
                      set answer 42\r\necho answer-%answer%\r\nls fs0:\\\r\ndrivers\r\nmemmap\r\ndmpstore SecureBoot\r\nreset -s\r\n";

/// The programs at work with Secure Boot off.
pub fn work(bench: &Bench, folder: &Path) -> Result<()> {
    let program = |name: &str| -> Result<PathBuf> {
        unsigned(bench)?.into_iter().find(|p| p.0 == name).map(|p| p.1).with_context(|| format!("no {name}"))
    };
    let disk = |name: &str| folder.join(format!("{name}.img"));
    let start = |name: &str| -> Result<Machine> {
        let image = disk(name);
        Machine::start(bench, folder, name, &["--memory", "512M", "--secure-boot", "off", "--disk", text(&image)?])
    };

    let script = folder.join("startup.nsh");
    fs::write(&script, SCRIPT)?;
    fat_disk(bench, &disk("shell"), 8, &[(&program("shell")?, DEFAULT), (&script, "startup.nsh")])?;
    let mut machine = start("shell")?;
    for want in ["written-by-the-shell", "answer-42", "written.txt", "RT_Code"] {
        machine.expect(want).context("the shell's script")?;
    }
    machine.powered_off()?;

    fat_disk(bench, &disk("KeyTool"), 8, &[(&program("KeyTool")?, DEFAULT)])?;
    let mut machine = start("KeyTool")?;
    machine.expect("KeyTool main menu")?;
    machine.expect("Exit")?;
    // The same menu is on the screen, and the synthetic keyboard moves its bar and leaves it.
    let before = machine.picture(&folder.join("keytool-1.png"))?;
    machine.press(&["down", "down", "down"])?;
    std::thread::sleep(std::time::Duration::from_secs(1));
    let after = machine.picture(&folder.join("keytool-2.png"))?;
    ensure!(before != after, "the screen has not changed with the keys");
    machine.press(&["enter"])?;
    machine.expect("could not boot an operating system").context("KeyTool's Exit")?;
    machine.powered_off()?;

    fat_disk(bench, &disk("ipxe"), 8, &[(&program("ipxe")?, DEFAULT)])?;
    let mut machine = start("ipxe")?;
    machine.expect("Press Ctrl-B")?;
    machine.type_serial("\x02")?;
    machine.expect("iPXE>")?;
    machine.type_serial("echo answer-${buildarch}\r")?;
    machine.expect("answer-x86_64")?;
    drop(machine);

    let kernel = bench.guests.kernel("bookworm-cloud")?;
    let initrd = initramfs::build(bench.guests, &kernel, &Contents::default())?;
    let (loader, entry) = (folder.join("loader.conf"), folder.join("entry.conf"));
    fs::write(&loader, "timeout 30\n")?;
    // The script is `check true`.
    fs::write(
        &entry,
        "title Small Linux\nlinux /vmlinuz\ninitrd /initrd.gz\noptions console=ttyS0 quiet viridian.run=Y2hlY2sgdHJ1ZQo=\n",
    )?;
    let files: [(&Path, &str); 5] = [
        (&program("systemd-boot")?, DEFAULT),
        (&loader, "loader/loader.conf"),
        (&entry, "loader/entries/small.conf"),
        (&kernel.image, "vmlinuz"),
        (&initrd, "initrd.gz"),
    ];
    fat_disk(bench, &disk("systemd-boot"), 64, &files)?;
    let mut machine = start("systemd-boot")?;
    machine.expect("Small Linux")?;
    machine.expect("Boot in")?;
    machine.type_serial("\r")?;
    machine.expect("VIRIDIAN-VERDICT: PASS")?;
    machine.powered_off()
}

/// The programs signed with a key of the user's own, whose certificate is in the template: Secure Boot lets them run, and keeps
/// to its rule for what they load.
pub fn signed(bench: &Bench, folder: &Path) -> Result<()> {
    let mine = Key::new(bench.guests, folder, "mine")?;
    let keys = folder.join("template.pem");
    template(&keys, &[&mine])?;
    let programs = unsigned(bench)?;
    let signed = |name: &str| -> Result<PathBuf> {
        let (_, source) = programs.iter().find(|p| p.0 == name).with_context(|| format!("no {name}"))?;
        let target = folder.join(format!("{name}.efi"));
        mine.sign(bench.guests, source, &target)?;
        Ok(target)
    };
    let start = |name: &str, files: &[(&Path, &str)]| -> Result<Machine> {
        let disk = folder.join(format!("{name}.img"));
        fat_disk(bench, &disk, 16, files)?;
        let arguments = ["--memory", "256M", "--secure-boot-template", text(&keys)?, "--disk", text(&disk)?];
        Machine::start(bench, folder, name, &arguments)
    };

    let script = folder.join("startup.nsh");
    fs::write(&script, "fs0:\\hello.efi\r\n")?;
    let hello = &programs.iter().find(|p| p.0 == "HelloWorld").context("no HelloWorld")?.1;
    let files: [(&Path, &str); 4] = [
        (&signed("shell")?, DEFAULT),
        (&script, "startup.nsh"),
        (hello, "hello.efi"),
        (&signed("memtest")?, "memtest.efi"),
    ];
    let mut machine = start("shell", &files)?;
    machine.expect("Security Violation").context("an unsigned program from a signed shell")?;
    machine.expect("Shell>")?;
    machine.type_serial("fs0:\\memtest.efi console=ttyS0,115200\r")?;
    machine.expect("Memtest86+ v").context("signed memtest86+")?;
    drop(machine);

    let mut machine = start("KeyTool", &[(&signed("KeyTool")?, DEFAULT)])?;
    machine.expect("KeyTool main menu").context("signed KeyTool")?;
    drop(machine);
    let mut machine = start("ipxe", &[(&signed("ipxe")?, DEFAULT)])?;
    machine.expect("Press Ctrl-B").context("signed iPXE")?;
    drop(machine);
    let loader = folder.join("loader.conf");
    fs::write(&loader, "timeout 30\n")?;
    let entry = folder.join("entry.conf");
    fs::write(&entry, "title Small Linux\nlinux /vmlinuz\n")?;
    let nothing = folder.join("vmlinuz");
    fs::write(&nothing, "not a kernel")?;
    let files: [(&Path, &str); 4] = [
        (&signed("systemd-boot")?, DEFAULT),
        (&loader, "loader/loader.conf"),
        (&entry, "loader/entries/small.conf"),
        (&nothing, "vmlinuz"),
    ];
    let mut machine = start("systemd-boot", &files)?;
    machine.expect("Small Linux").context("signed systemd-boot")?;
    Ok(())
}

/// A pass of memtest86+ on 256 MiB, seen on its serial console.
pub fn memtest(bench: &Bench, folder: &Path) -> Result<()> {
    let script = folder.join("startup.nsh");
    fs::write(&script, "fs0:\\memtest.efi console=ttyS0,115200\r\n")?;
    let disk = folder.join("memtest.img");
    let shell = bench.guests.tool("efi-shell").join("usr/share/efi-shell-x64/shellx64.efi");
    let memtest = bench.guests.tool("memtest86").join("boot/memtest86+x64.efi");
    fat_disk(bench, &disk, 8, &[(&shell, DEFAULT), (&script, "startup.nsh"), (&memtest, "memtest.efi")])?;
    let arguments = ["--memory", "256M", "--secure-boot", "off", "--disk", text(&disk)?];
    let mut machine = Machine::start(bench, folder, "memtest", &arguments)?;
    machine.expect("Memtest86")?;
    // About four minutes on a quiet host, of which the bit fade test alone only waits for most.
    let limit = std::time::Duration::from_secs(900 * u64::from(bench.patience));
    machine.expect_within("Pass:  1        Errors: 0 ", limit)?;
    let errors = machine.text().split("Errors: ").skip(1).any(|rest| !rest.starts_with("0 "));
    ensure!(!errors, "memtest86+ has counted errors");
    Ok(())
}
