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
    bites(bench, folder, &program)
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
