//! `bench firmware`: from power-on to shim, and through shim and GRUB to the kernel's entry, against OVMF on QEMU with the
//! same disk, Secure Boot on for both.

use super::Samples;
use super::table::{Table, figure};
use crate::guests::Guests;
use crate::session::{Event, Session, Usage};
use crate::trees;
use crate::vm::build_viridian;
use anyhow::{Context, Result, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

/// What is measured.
pub struct Options {
    /// Rounds.
    pub runs: u32,
    /// A disk of the catalogue.
    pub disk: String,
}

/// The kernel's EFI stub says this first, on whatever console the firmware has.
const KERNEL_ENTRY: &str = "EFI stub: ";
/// Our firmware logs this right before it starts a loader's first instruction.
const SHIM_ENTRY: &str = "boot: starting ";
const LIMIT: Duration = Duration::from_secs(120);
const MEMORY_MIB: u32 = 1024;

#[derive(Default)]
struct Figures {
    shim_wall: Samples,
    shim_cpu: Samples,
    kernel_wall: Samples,
    kernel_cpu: Samples,
}

/// Measures and prints the table.
///
/// # Errors
/// When a contender does not come to the kernel.
pub fn run(options: &Options) -> Result<ExitCode> {
    let guests = Guests::locate();
    guests.ensure(&[options.disk.as_str(), "qemu", "ovmf"])?;
    let viridian = build_viridian(true)?;
    let folder = crate::workspace_root().join("target/bench-firmware");
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder)?;
    let image = firmware_bytes()?;
    println!(
        "from power-on: {}, Secure Boot on, 1 processor, {MEMORY_MIB} MiB, {} interleaved rounds",
        options.disk, options.runs
    );
    println!("firmware image: {:.2} MiB (limit 1.5)", image as f64 / f64::from(1 << 20));
    let (mut ours, mut theirs) = (Figures::default(), Figures::default());
    for round in 1..=options.runs {
        let (shim, kernel) = viridian_once(&guests, &viridian, &options.disk, &folder)?;
        ours.shim_wall.add(shim.wall.as_secs_f64() * 1e3);
        ours.shim_cpu.add(shim.cpu.as_secs_f64() * 1e3);
        add(&mut ours, kernel);
        let other = qemu_once(&guests, &options.disk, &folder)?;
        add(&mut theirs, other);
        eprintln!(
            "  round {round}: soft {:.2} s, qemu-tcg {:.2} s processor time to the kernel",
            kernel.cpu.as_secs_f64(),
            other.cpu.as_secs_f64()
        );
    }
    let mut table = Table::new([
        "",
        "shim wall ms",
        "shim cpu ms",
        "kernel wall s",
        "kernel cpu s",
        "least",
        "greatest",
        "cpu ratio",
    ]);
    let yardstick = theirs.kernel_cpu.median();
    for (name, f) in [("soft", &ours), ("qemu-tcg + OVMF", &theirs)] {
        table.row([
            name.to_owned(),
            figure(f.shim_wall.median()),
            figure(f.shim_cpu.median()),
            figure(f.kernel_wall.median()),
            figure(f.kernel_cpu.median()),
            figure(f.kernel_cpu.least()),
            figure(f.kernel_cpu.greatest()),
            figure(f.kernel_cpu.median().zip(yardstick).map(|(own, other)| own / other)),
        ]);
    }
    print!("{}", table.render());
    let _ = fs::remove_dir_all(&folder);
    Ok(ExitCode::SUCCESS)
}

fn add(figures: &mut Figures, usage: Usage) {
    figures.kernel_wall.add(usage.wall.as_secs_f64());
    figures.kernel_cpu.add(usage.cpu.as_secs_f64());
}

/// Bytes of the firmware's image as it is embedded: loadable segments of the ELF file that the build script has made.
fn firmware_bytes() -> Result<u64> {
    let target =
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| crate::workspace_root().join("target"), PathBuf::from);
    let newest = fs::read_dir(target.join("release/build"))?
        .filter_map(|e| Some(e.ok()?.path().join("out")))
        .filter_map(|out| fs::read_dir(out).ok())
        .flatten()
        .filter_map(|e| e.ok())
        .filter(|e| e.file_name() == "firmware.bin")
        .filter_map(|e| e.metadata().ok().filter(|m| m.is_file()))
        .max_by_key(|m| m.modified().ok());
    newest.map(|m| m.len()).context("the build has left no firmware image")
}

fn viridian_once(guests: &Guests, binary: &Path, system: &str, folder: &Path) -> Result<(Usage, Usage)> {
    let disk = folder.join("own.vhdx");
    let _ = fs::remove_file(&disk);
    let made =
        Command::new(binary).args(["vhd", "new"]).arg(&disk).arg("--parent").arg(guests.image(system)).output()?;
    ensure!(made.status.success(), "viridian vhd new: {}", String::from_utf8_lossy(&made.stderr).trim());
    let mut command = Command::new(binary);
    command.env("VIRIDIAN_LOG", "viridian_worker=info").args(["run", "--engine", "soft", "--disk"]).arg(&disk);
    command.args(["--memory", &format!("{MEMORY_MIB}M")]);
    let mut session = Session::start(command, Some(&folder.join("viridian.log")), true)?;
    let shim = until(&mut session, SHIM_ENTRY)?;
    let kernel = until(&mut session, KERNEL_ENTRY)?;
    Ok((shim, kernel))
}

fn qemu_once(guests: &Guests, system: &str, folder: &Path) -> Result<Usage> {
    let tree = guests.tool("qemu");
    let ovmf = guests.tool("ovmf").join("usr/share/OVMF");
    let variables = folder.join("variables.fd");
    fs::copy(ovmf.join("OVMF_VARS_4M.ms.fd"), &variables)?;
    let mut command = trees::qemu(&tree, "qemu-system-x86_64");
    command.args(["-accel", "tcg", "-cpu", "max", "-machine", "q35,smm=on", "-nic", "none", "-nographic", "-smp", "1"]);
    command.args(["-global", "driver=cfi.pflash01,property=secure,value=on", "-m", &MEMORY_MIB.to_string()]);
    let code = ovmf.join("OVMF_CODE_4M.secboot.fd");
    command.arg("-drive").arg(format!("if=pflash,format=raw,unit=0,readonly=on,file={}", code.display()));
    command.arg("-drive").arg(format!("if=pflash,format=raw,unit=1,file={}", variables.display()));
    let image = guests.image(system);
    command.arg("-drive").arg(format!("file={},format=vhdx,if=virtio,snapshot=on", image.display()));
    let mut session = Session::start(command, Some(&folder.join("qemu.log")), true)?;
    until(&mut session, KERNEL_ENTRY)
}

fn until(session: &mut Session, text: &str) -> Result<Usage> {
    let event = session.wait_for(LIMIT, |t| t.contains(text))?;
    ensure!(event == Event::Seen, "no \"{text}\"; the output is in target/bench-firmware");
    session.usage(MEMORY_MIB)
}
