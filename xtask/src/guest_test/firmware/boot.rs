//! The boot manager: what is tried first, what follows a failure, and the watchdog. The loader is a program of our own
//! (`firmware/conformance/src/loader.rs`), which says on the serial line which one it is, and ends.

use super::super::Bench;
use super::machine::{Machine, fat_disk};
use super::programs::DEFAULT;
use anyhow::{Context, Result, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path that is not UTF-8")
}

/// A disk whose loaders say `says`.
fn disk(bench: &Bench, folder: &Path, program: &Path, says: &str, loaders: &[&str]) -> Result<PathBuf> {
    let (image, note) = (folder.join(format!("{says}.img")), folder.join(format!("{says}.txt")));
    fs::write(&note, says)?;
    let mut files = vec![(note.as_path(), "say")];
    files.extend(loaders.iter().map(|l| (program, *l)));
    fat_disk(bench, &image, 8, &files)?;
    Ok(image)
}

/// What the loaders have said, in order.
fn said(machine: &Machine) -> Vec<String> {
    machine.text().lines().filter_map(|l| l.trim().strip_prefix("SAYS ")).map(str::to_owned).collect()
}

/// Boot options against `--boot`, `--boot-failure wait`, the watchdog.
pub fn order(bench: &Bench, folder: &Path) -> Result<()> {
    let program = crate::efi::conformance()?;
    let first = disk(bench, folder, &program, "order", &[DEFAULT, "OTHER.EFI", "THIRD.EFI"])?;
    let second = disk(bench, folder, &program, "second", &[DEFAULT])?;
    let state = folder.join("state");
    let run = |name: &str, more: &[&str]| -> Result<Vec<String>> {
        let disks = ["--memory", "128M", "--secure-boot", "off", "--disk", text(&first)?, "--disk", text(&second)?];
        let mut machine =
            Machine::start(bench, folder, name, &[&disks[..], &["--state", text(&state)?], more].concat())?;
        machine.expect("could not boot an operating system")?;
        machine.powered_off()?;
        Ok(said(&machine))
    };
    const BY_DEFAULT: [&str; 2] = ["order \\EFI\\BOOT\\BOOTX64.EFI", "second \\EFI\\BOOT\\BOOTX64.EFI"];
    const OTHER: &str = "order \\OTHER.EFI";
    let new = run("new", &[])?;
    ensure!(new == BY_DEFAULT, "without boot options: {new:?}");
    // The first run has made a boot option.
    let option = run("option", &[])?;
    ensure!(option == [&[OTHER], &BY_DEFAULT[..]].concat(), "with a boot option: {option:?}");
    let disks = run("disk", &["--boot", "disk"])?;
    ensure!(disks == [&BY_DEFAULT[..], &[OTHER], &BY_DEFAULT].concat(), "--boot disk: {disks:?}");
    let file = run("file", &["--boot", "\\THIRD.EFI"])?;
    let third = "order \\THIRD.EFI";
    ensure!(file == [&[third, OTHER], &BY_DEFAULT[..]].concat(), "--boot FILE: {file:?}");
    // No drive holds a medium: what remains are the boot options.
    let dvd = run("dvd", &["--boot", "dvd"])?;
    ensure!(dvd == option, "--boot dvd without a DVD: {dvd:?}");
    waits(bench, folder, &second)?;
    from_file(bench, folder, &second)?;
    bites(bench, folder, &program)
}

/// `--firmware FILE`: our own firmware in the layout of Hyper-V's, whose security core only jumps to it; and files that are none.
fn from_file(bench: &Bench, folder: &Path, disk: &Path) -> Result<()> {
    const SIZE: usize = 6 << 20;
    const SEC_VOLUME: usize = 0x5e_0000;
    const BASE: usize = 0x10_0000;
    let crate::vm::Contender::Viridian { binary, .. } = bench.contender else { anyhow::bail!("only Viridian") };
    let profile = binary.parent().context("the program lies in a folder")?;
    let mut image = fs::read(newest_image(profile)?)?;
    image.resize(SIZE, 0);
    // A volume header, and behind it one file of the type "security core" with one section, a TE image.
    let (header, file, section, te) = (56, 24, 4, 40);
    let entry = SEC_VOLUME + header + file + section + te;
    // jmp to the firmware's first byte, which lies at BASE: the jump's end is 5 bytes behind its own place.
    let jump = -(entry as i64 + 5) as i32;
    let mut put =
        |at: usize, bytes: &[u8]| image[SEC_VOLUME + at..SEC_VOLUME + at + bytes.len()].copy_from_slice(bytes);
    put(32, &((SIZE - SEC_VOLUME) as u64).to_le_bytes());
    put(40, b"_FVH");
    put(48, &(header as u16).to_le_bytes());
    let words = [(SIZE - SEC_VOLUME) as u32 as u64, u64::from(u32::from_le_bytes(*b"_FVH")), header as u64];
    let sum = words.iter().flat_map(|w| [w & 0xffff, w >> 16 & 0xffff]).fold(0u16, |s, w| s.wrapping_add(w as u16));
    put(50, &0u16.wrapping_sub(sum).to_le_bytes());
    let body = te + 5;
    put(header + 18, &[3]);
    put(header + 20, &[(file + section + body) as u8]);
    put(header + file, &[(section + body) as u8, 0, 0, 0x12]);
    put(header + file + section, b"VZ\x64\x86\x01\x0b\0\0");
    // The entry in the numbers of a TE image of which nothing was stripped: right behind its header of 40 bytes.
    put(header + file + section + te, &[&[0xe9][..], &jump.to_le_bytes()].concat());
    ensure!(entry as i64 + 5 + i64::from(jump) == 0 && BASE == 1 << 20, "the jump leads elsewhere");
    let firmware = folder.join("firmware.fd");
    fs::write(&firmware, &image)?;
    let arguments = ["--memory", "128M", "--secure-boot", "off", "--disk", text(disk)?, "--firmware"];
    let mut machine = Machine::start(bench, folder, "file-image", &[&arguments[..], &[text(&firmware)?]].concat())?;
    machine.expect("SAYS second").context("a firmware from a file")?;
    machine.powered_off()?;

    image[SEC_VOLUME + 40] = 0;
    fs::write(&firmware, &image)?;
    for (name, file, why) in [
        ("no-volume", text(&firmware)?, "there is no firmware volume"),
        ("short", text(disk)?, "a firmware image of Hyper-V's layout (MSVM.fd) has"),
        ("absent", "/nowhere/MSVM.fd", "/nowhere/MSVM.fd"),
    ] {
        let mut machine = Machine::start(bench, folder, name, &[&arguments[..], &[file]].concat())?;
        machine.expect(why).with_context(|| format!("--firmware {file}"))?;
    }
    Ok(())
}

/// The flat image of our firmware that the build of the program under test has made.
fn newest_image(profile: &Path) -> Result<PathBuf> {
    let images = fs::read_dir(profile.join("build"))?
        .filter_map(|e| Some(e.ok()?.path().join("out/firmware.bin")))
        .filter_map(|p| Some((p.metadata().ok()?.modified().ok()?, p)));
    Ok(images.max().context("the build has left no firmware image")?.1)
}

/// When nothing boots, the machine waits, and a key begins anew.
fn waits(bench: &Bench, folder: &Path, disk: &Path) -> Result<()> {
    let arguments = ["--memory", "128M", "--secure-boot", "off", "--boot-failure", "wait", "--disk", text(disk)?];
    let mut machine = Machine::start(bench, folder, "wait", &arguments)?;
    machine.expect("SAYS second")?;
    machine.expect("Press any key to try again")?;
    std::thread::sleep(Duration::from_millis(500));
    ensure!(said(&machine).len() == 1, "nobody has pressed a key: {:?}", said(&machine));
    machine.type_serial(" ")?;
    machine.expect("SAYS second").context("after a key on the serial line")?;
    machine.expect("Press any key to try again")?;
    machine.press(&["enter"])?;
    machine.expect("SAYS second").context("after a key on the synthetic keyboard")?;
    Ok(())
}

/// A loader that sets the watchdog and hangs is reset, and the boot manager starts it again.
fn bites(bench: &Bench, folder: &Path, program: &Path) -> Result<()> {
    let (image, note) = (folder.join("watchdog.img"), folder.join("watchdog.txt"));
    fs::write(&note, "x")?;
    fat_disk(bench, &image, 8, &[(program, DEFAULT), (&note, "watchdog")])?;
    let arguments = ["--memory", "128M", "--secure-boot", "off", "--disk", text(&image)?];
    let mut machine = Machine::start(bench, folder, "watchdog", &arguments)?;
    machine.expect("WATCHDOG-ARMED")?;
    let between = machine.expect("WATCHDOG-ARMED").context("after the watchdog's two seconds")?;
    ensure!(!between.contains("WATCHDOG-ASLEEP"), "the watchdog has not bitten");
    Ok(())
}
