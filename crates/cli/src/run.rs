//! `viridian run`: one machine, in this process, on this terminal.

use crate::options::{EngineArg, OnOff};
use bios::templates::Template;
use clap::{Args as ClapArgs, ValueEnum};
use machine::{BootSource, IoLimits, MachineConfig, StorageUnit, UnitKind};
use partition::{DirectMode, EngineOptions, TranslateMode};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;
use vmms::size;
use worker::firmware::FirmwareOptions;
use worker::sandbox::Files;
use worker::{Outcome, RunOptions, SerialTarget, Start};
use x86::cpuid::CpuModel;

/// Arguments.
#[derive(ClapArgs)]
#[command(after_help = "\
The guest's serial port is on this terminal; Ctrl-] leaves and ends the machine.\n\
The program ends with status 0 when the guest powers off; a guest's reset boots it again.\n\
Signals: SIGUSR1 saves (--save), SIGUSR2 presses the power button, SIGINT and SIGTERM end the machine.")]
pub struct Args {
    /// Linux kernel (bzImage, or vmlinux with a PVH entry), or another 64-bit ELF image
    ///
    /// Without a kernel the machine is one of generation 2: its UEFI boots from --disk and --dvd
    #[arg(long, value_name = "FILE", required_unless_present_any = ["restore", "disk", "dvd"])]
    kernel: Option<PathBuf>,
    /// Initial RAM disk
    #[arg(long, value_name = "FILE", requires = "kernel")]
    initrd: Option<PathBuf>,
    /// Kernel command line
    #[arg(long, value_name = "TEXT", default_value = "console=ttyS0")]
    append: String,
    /// RAM: a number with M or G (without a letter: MiB)
    #[arg(long, value_name = "SIZE", default_value = "1G", value_parser = size::memory)]
    memory: u64,
    /// Number of virtual processors
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    processors: u32,
    /// What executes the guest; auto is KVM where the processor has VT-x or AMD-V
    #[arg(long, value_enum, default_value_t = EngineArg::Auto)]
    engine: EngineArg,
    /// Processor model [default: x86-64-v3, or x86-64-v2 on an older host]
    #[arg(long, value_name = "NAME", value_parser = clap::builder::PossibleValuesParser::new(CpuModel::NAMES))]
    cpu_model: Option<String>,
    /// Where the serial port leads: stdio, file:PATH or unix:PATH
    #[arg(long, value_name = "TARGET", default_value = "stdio")]
    serial: SerialTarget,
    /// Translation of guest code (engine soft): on, off (interpret everything), verify (both, and compare: slow, for tests)
    #[arg(long, value_enum, default_value_t = TranslateArg::On)]
    translate: TranslateArg,
    /// Direct execution of the guest's 64-bit user code, in processes of its own (engine soft, with --translate on): off, on (what
    /// computes for long, at the processor's own speed), always (whatever can be, pay or not: for tests)
    #[arg(long, value_enum, default_value_t = DirectArg::On)]
    direct: DirectArg,
    /// Disk image (VHDX, VHD, raw) on the synthetic SCSI controller; may be given several times
    #[arg(long, value_name = "FILE", conflicts_with = "restore")]
    disk: Vec<PathBuf>,
    /// DVD image on the synthetic SCSI controller; an empty name is an empty drive
    #[arg(long, value_name = "FILE", conflicts_with = "restore")]
    dvd: Vec<PathBuf>,
    /// Hyper-V's interface for the guest: CPUID, MSRs, hypercalls, VMBus [default: on with --disk or --dvd]
    #[arg(long, value_enum)]
    hyperv: Option<OnOff>,
    /// Name of the machine, for `viridian guest NAME`; or the path of its control socket
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Secure Boot of a generation 2 machine
    #[arg(long, value_enum, default_value_t = OnOff::On, conflicts_with = "kernel")]
    secure_boot: OnOff,
    /// Keys of a new generation 2 machine: microsoft, windows, uefi-ca, none, or a file of PEM certificates
    #[arg(long, value_name = "NAME", default_value = "microsoft", conflicts_with = "kernel")]
    secure_boot_template: Template,
    /// Generation of the machine: 2 is UEFI with devices on VMBus only (generation 1 comes later) [default: 2 without --kernel]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..=2), conflicts_with = "kernel")]
    generation: Option<u32>,
    /// What a generation 2 machine tries before its boot options in this run: disk, dvd, or a file's path (\EFI\...)
    #[arg(long, value_name = "WHAT", value_parser = boot_first, conflicts_with_all = ["kernel", "restore"])]
    boot: Option<String>,
    /// Firmware of a generation 2 machine instead of Viridian's own: an image in the layout of Hyper-V's (MSVM.fd)
    #[arg(long, value_name = "FILE", conflicts_with_all = ["kernel", "restore"])]
    firmware: Option<PathBuf>,
    /// When a generation 2 machine can boot nothing: power off, or wait for a key
    #[arg(long, value_enum, default_value_t = BootFailure::PowerOff, conflicts_with = "kernel")]
    boot_failure: BootFailure,
    /// Folder that keeps a generation 2 machine's state (the firmware's variables); made when it is missing
    #[arg(long, value_name = "DIR", conflicts_with_all = ["kernel", "variables"])]
    state: Option<PathBuf>,
    /// File that keeps the firmware's variables [default: they are lost at the end]
    #[arg(long, value_name = "FILE", conflicts_with = "kernel")]
    variables: Option<PathBuf>,
    /// Confine the process before guest code runs: off is for those who look for a fault of Viridian's
    ///
    /// Files named with --save and --variables are replaced by renaming: a confined process may write to their folders
    #[arg(long, value_enum, default_value_t = OnOff::On)]
    sandbox: OnOff,
    /// Print counters to standard error at the end
    #[arg(long)]
    stats: bool,
    /// Go on with a machine from this file, which --save has written
    #[arg(long, value_name = "FILE", conflicts_with_all = ["kernel", "initrd"])]
    restore: Option<PathBuf>,
    /// On SIGUSR1, save the machine to this file and end
    #[arg(long, value_name = "FILE")]
    save: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum BootFailure {
    PowerOff,
    Wait,
}

/// `disk`, `dvd`, or a path with backslashes from the root of a file system.
fn boot_first(text: &str) -> Result<String, String> {
    match text {
        "disk" | "dvd" => Ok(text.into()),
        path if path.starts_with(['\\', '/']) && path.len() <= 255 => Ok(path.replace('/', "\\")),
        _ => Err("expected disk, dvd, or a path such as \\EFI\\debian\\grubx64.efi".into()),
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum DirectArg {
    Off,
    On,
    Always,
}

#[derive(Clone, Copy, ValueEnum)]
enum TranslateArg {
    On,
    Off,
    Verify,
}

/// Carries the command out. `started` is when the program started.
pub fn run(args: Args, started: Instant) -> ExitCode {
    // Disks and drives take the units of controller 0 in the order in which they were given: disks first.
    let disks = args.disk.into_iter().map(|path| (UnitKind::Disk, Some(path)));
    let drives = args.dvd.into_iter().map(|path| (UnitKind::Dvd, (!path.as_os_str().is_empty()).then_some(path)));
    let storage: Vec<StorageUnit> = disks
        .chain(drives)
        .zip(0u8..)
        .map(|((kind, image), lun)| StorageUnit { controller: 0, lun, kind, image, limits: IoLimits::default() })
        .collect();
    let start = match (args.kernel, args.restore) {
        (Some(kernel), _) => Start::Boot(MachineConfig {
            memory_bytes: args.memory,
            processors: args.processors,
            cpu_model: args.cpu_model.unwrap_or_else(vmms::config::default_model),
            hyperv: args.hyperv.map_or(!storage.is_empty(), OnOff::is_on),
            boot: BootSource::Kernel { kernel, initrd: args.initrd, command_line: args.append },
            storage,
        }),
        (None, Some(file)) => Start::Restore { file, storage: None },
        (None, None) => Start::Boot(MachineConfig {
            memory_bytes: args.memory,
            processors: args.processors,
            cpu_model: args.cpu_model.unwrap_or_else(vmms::config::default_model),
            hyperv: args.hyperv.is_none_or(OnOff::is_on),
            boot: BootSource::Firmware {
                name: "This machine".into(),
                pause_after_failure: args.boot_failure == BootFailure::Wait,
                first: args.boot,
                image: args.firmware,
            },
            storage,
        }),
    };
    let variables = match args.state {
        Some(folder) => {
            if let Err(error) = std::fs::create_dir_all(&folder) {
                return fail(&format!("--state {}: {error}", folder.display()), 2);
            }
            Some(folder.join("firmware-variables"))
        }
        None => args.variables,
    };
    let control = args.name.as_deref().map(worker::control::socket_path);
    let confine = match args.sandbox {
        OnOff::On => match files(&start, &args.secure_boot_template) {
            Ok(mut files) => {
                let folder =
                    |path: &Path| path.parent().filter(|f| !f.as_os_str().is_empty()).unwrap_or(Path::new(".")).into();
                files.read.extend(variables.clone());
                files.replace.extend(variables.iter().chain(&args.save).map(|path| folder(path)));
                files.sockets.extend(control.as_deref().map(folder));
                match &args.serial {
                    SerialTarget::Stdio => {}
                    SerialTarget::Unix(path) => files.sockets.push(folder(path)),
                    SerialTarget::File(path) => {
                        // Its name is made here; what is wrong with it is said where it is opened.
                        let _ = File::options().append(true).create(true).open(path);
                        files.write.push(path.clone());
                    }
                }
                Some(files)
            }
            Err(message) => return fail(&message, 2),
        },
        OnOff::Off => None,
    };
    let direct = match args.direct {
        DirectArg::Off => DirectMode::Off,
        DirectArg::On => DirectMode::On,
        DirectArg::Always => DirectMode::Always,
    };
    let translate = match args.translate {
        TranslateArg::On => TranslateMode::On,
        TranslateArg::Off => TranslateMode::Off,
        TranslateArg::Verify => TranslateMode::Verify,
    };
    let options = RunOptions {
        start,
        engine: args.engine.into(),
        engine_options: EngineOptions { translate, direct, ..EngineOptions::default() },
        firmware: FirmwareOptions {
            variables,
            template: args.secure_boot_template,
            secure_boot: args.secure_boot.is_on(),
        },
        serial: args.serial,
        control,
        save: args.save,
        console: false,
        confine,
        affinity: Vec::new(),
        reserve_memory: false,
        observer: None,
        stats: args.stats,
        started,
    };
    match worker::run(&options) {
        Ok(Outcome::PoweredOff | Outcome::Left | Outcome::Saved | Outcome::TurnedOff) => ExitCode::SUCCESS,
        Ok(Outcome::Signal(signal)) => ExitCode::from(128u8.saturating_add(signal.unsigned_abs().min(127) as u8)),
        Err(error) => fail(&error.to_string(), if error.is_setup() { 2 } else { 1 }),
    }
}

/// What the machine opens.
fn files(start: &Start, template: &Template) -> Result<Files, String> {
    let (saved, state) = match start {
        Start::Boot(config) => (config.clone(), None),
        Start::Restore { file, .. } => (worker::saved_config(file).map_err(|e| e.to_string())?, Some(file.clone())),
    };
    let mut files = vmms::launch::files_of(&saved, template).map_err(|e| e.to_string())?;
    files.read.extend(state);
    Ok(files)
}

fn fail(message: &str, status: u8) -> ExitCode {
    eprintln!("error: {message}");
    ExitCode::from(status)
}
