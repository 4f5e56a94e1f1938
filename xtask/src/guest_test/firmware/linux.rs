//! Debian through its signed chain.

use super::super::Bench;
use super::keys::{Key, template};
use super::machine::Machine;
use anyhow::{Context, Result, ensure};
use std::path::{Path, PathBuf};
use std::process::Command;

/// A differencing image, so that the built disk stays as it is.
fn own_disk(bench: &Bench, folder: &Path, system: &str) -> Result<PathBuf> {
    let crate::vm::Contender::Viridian { binary, .. } = bench.contender else { anyhow::bail!("only Viridian") };
    let disk = folder.join(format!("{system}.vhdx"));
    let parent = bench.guests.image(system);
    let output = Command::new(binary).args(["vhd", "new"]).arg(&disk).arg("--parent").arg(parent).output()?;
    ensure!(output.status.success(), "viridian vhd new: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(disk)
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path that is not UTF-8")
}

/// What holds in every guest that has come up under Secure Boot.
fn check_secure(machine: &mut Machine, processors: u32) -> Result<()> {
    let log = machine.must("dmesg")?;
    for line in ["Secure boot enabled", "Kernel is locked down from EFI Secure Boot"] {
        ensure!(log.contains(line), "the guest's log does not say \"{line}\"");
    }
    let bad = ["ACPI Error", "ACPI Warning", "ACPI BIOS Error", "ACPI Exception", "BUG:", "WARNING:", "Couldn't parse"];
    if let Some(line) = log.lines().find(|l| bad.iter().any(|b| l.contains(b))) {
        anyhow::bail!("the guest's log says: {}", line.trim());
    }
    let state = machine.must("mokutil --sb-state")?;
    ensure!(state.contains("SecureBoot enabled"), "mokutil says: {}", state.trim());
    let count = machine.must("nproc")?;
    ensure!(count.trim() == processors.to_string(), "{} processors instead of {processors}", count.trim());
    Ok(())
}

/// Debian 12: Secure Boot's state, boot entries, dbx; all of it again after power-off, with 4 VPs.
pub fn debian_12(bench: &Bench, folder: &Path) -> Result<()> {
    let disk = own_disk(bench, folder, "debian-12-disk")?;
    let key = Key::new(bench.guests, folder, "kek")?;
    let stranger = Key::new(bench.guests, folder, "stranger")?;
    let keys = folder.join("template.pem");
    template(&keys, &[&key])?;
    let image = bench.guests.tool("efitools").join("usr/lib/efitools/x86_64-linux-gnu/HelloWorld.efi");
    key.forbid(bench.guests, &image, &folder.join("dbx.auth"))?;
    stranger.forbid(bench.guests, &image, &folder.join("stranger.auth"))?;
    // The updates reach the guest on a disk without a file system.
    let updates = folder.join("updates.raw");
    let mut tar = Vec::new();
    for name in ["dbx.auth", "stranger.auth"] {
        let mut data = std::fs::read(folder.join(name))?;
        ensure!(data.len() <= 8192, "an update of dbx has {} bytes", data.len());
        let len = data.len() as u32;
        data.resize(8192, 0);
        data[8188..].copy_from_slice(&len.to_le_bytes());
        tar.extend(data);
    }
    tar.resize(1 << 20, 0);
    std::fs::write(&updates, tar)?;
    let state = folder.join("state");
    let arguments = |processors: &'static str| {
        Ok::<_, anyhow::Error>([
            "--disk",
            text(&disk)?,
            "--disk",
            text(&updates)?,
            "--generation",
            "2",
            "--state",
            text(&state)?,
            "--secure-boot-template",
            text(&keys)?,
            "--memory",
            "1G",
            "--processors",
            processors,
        ])
    };

    let mut machine = Machine::start(bench, folder, "first", &arguments("1")?)?;
    machine.expect("debian-12:~#")?;
    check_secure(&mut machine, 1)?;
    let list = machine.must("efibootmgr")?;
    ensure!(list.contains("debian"), "shim's fallback has made no boot entry: {list}");
    machine.must("efibootmgr -q -c -d /dev/sda -p 1 -L Second -l '\\EFI\\debian\\shimx64.efi'")?;
    let list = machine.must("efibootmgr")?;
    ensure!(list.contains("BootOrder: 0001,0000") && list.contains("Second"), "after adding an entry: {list}");
    machine.must("efibootmgr -q -o 0000,0001 && efibootmgr -q -n 0001")?;
    // An update is the value with its authentication; the attributes go before it: NV, BS, RT, time-based, append.
    let write = |name: &str, block: u32| {
        format!(
            "f=/sys/firmware/efi/efivars/dbx-d719b2cb-3d3a-4596-a3bc-dad00e67656f; chattr -i $f 2>/dev/null; \
             n=$(dd if=/dev/sdb bs=1 skip=$(({block} * 8192 + 8188)) count=4 2>/dev/null | od -An -tu4 | tr -d ' '); \
             {{ printf '\\x67\\0\\0\\0'; dd if=/dev/sdb bs=8192 skip={block} count=1 2>/dev/null | head -c $n; }} > /tmp/{name}; \
             dd if=/tmp/{name} of=$f bs=64k 2>&1"
        )
    };
    let (output, status) = machine.shell(&write("stranger", 1))?;
    ensure!(status != 0, "an update of dbx by a stranger was taken: {output}");
    let (output, status) = machine
        .shell("printf '\\x67\\0\\0\\0unsigned' | dd of=/sys/firmware/efi/efivars/dbx-d719b2cb-3d3a-4596-a3bc-dad00e67656f bs=64k 2>&1")?;
    ensure!(status != 0, "an unsigned update of dbx was taken: {output}");
    machine.must(&write("dbx", 0))?;
    let size = machine.must("stat -c %s /sys/firmware/efi/efivars/dbx-d719b2cb-3d3a-4596-a3bc-dad00e67656f")?;
    ensure!(size.trim() == (4 + 28 + 48).to_string(), "dbx has {} bytes", size.trim());
    machine.must("systemctl is-active hv-kvp-daemon")?;
    machine.type_serial("poweroff\n")?;
    machine.powered_off()?;

    let mut machine = Machine::start(bench, folder, "second", &arguments("4")?)?;
    machine.expect("debian-12:~#")?;
    check_secure(&mut machine, 4)?;
    let list = machine.must("efibootmgr")?;
    for want in ["BootCurrent: 0001", "BootOrder: 0000,0001", "Second"] {
        ensure!(list.contains(want), "after power-off efibootmgr does not list \"{want}\": {list}");
    }
    ensure!(!list.contains("BootNext"), "BootNext was not used up: {list}");
    machine.must("stat /sys/firmware/efi/efivars/dbx-d719b2cb-3d3a-4596-a3bc-dad00e67656f")?;
    machine.must("efibootmgr -q -b 0001 -B")?;
    machine.type_serial("poweroff\n")?;
    machine.powered_off()
}

/// Debian 13's chain.
pub fn debian_13(bench: &Bench, folder: &Path) -> Result<()> {
    let disk = own_disk(bench, folder, "debian-13-disk")?;
    let arguments = ["--disk", text(&disk)?, "--memory", "1G", "--processors", "2"];
    let mut machine = Machine::start(bench, folder, "trixie", &arguments)?;
    machine.expect("debian-13:~#")?;
    check_secure(&mut machine, 2)?;
    let list = machine.must("efibootmgr")?;
    ensure!(list.contains("debian"), "shim's fallback has made no boot entry: {list}");
    machine.type_serial("poweroff\n")?;
    machine.powered_off()
}

/// The DVD: its script has a verdict of its own.
pub fn dvd(bench: &Bench, folder: &Path) -> Result<()> {
    let image = bench.guests.image("debian-12-dvd");
    // A disk that would be booted first, if the DVD were not asked for.
    let disk = own_disk(bench, folder, "debian-12-disk")?;
    let arguments = ["--disk", text(&disk)?, "--dvd", text(&image)?, "--boot", "dvd", "--memory", "512M"];
    let mut machine = Machine::start(bench, folder, "dvd", &arguments)?;
    machine.expect("VIRIDIAN-VERDICT: ")?;
    let verdict = machine.expect("\n")?;
    ensure!(verdict.starts_with("PASS"), "the guest says {}", verdict.trim());
    machine.powered_off()
}
