//! `cargo xtask`: everything that a developer or a newcomer types: `demo`, `test`, `bench`, `guests`.
//!
//! This crate may use every tool of the host (apt, cargo, the `viridian` binary); no crate of the product may use it.
//! It never looks inside `viridian`: it starts the program as a user does and reads what it prints.
#![forbid(unsafe_code)]

mod bench;
mod demo;
mod efi;
mod guest_test;
mod guests;
mod initramfs;
mod session;
mod test;
mod trees;
mod vm;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Viridian's developer commands")]
struct Cli {
    #[command(subcommand)]
    command: Xtask,
}

#[derive(Subcommand)]
enum Xtask {
    Demo(DemoArgs),
    Test(TestArgs),
    Bench(BenchArgs),
    Guests(GuestsArgs),
    Initramfs(InitramfsArgs),
}

/// From nothing to a generation 2 Debian with Secure Boot, in one command.
///
/// Builds, fetches, makes a Debian disk, makes the VM `demo` with it, starts it, shows its boot as a timeline, asks it
/// through its integration services, runs a command in it, and shuts it down. The VM is kept in target/demo.
#[derive(clap::Args)]
struct DemoArgs {
    /// Engine that executes the guest: soft, kvm or auto
    #[arg(long, default_value = "auto")]
    engine: String,
    /// Leave the VM running
    #[arg(long)]
    keep: bool,
}

/// Check the format, run lints, unit and property tests, then boot real guests.
///
/// Ends with the line `N passed, N failed`. Serial logs of failed guest tests are kept in target/test-logs.
#[derive(clap::Args)]
struct TestArgs {
    /// Only steps and guest tests whose name contains PATTERN
    #[arg(long, value_name = "PATTERN")]
    only: Option<String>,
    /// Leave guest tests out
    #[arg(long)]
    no_guests: bool,
    /// Show the steps and guest tests, and run none
    #[arg(long)]
    list: bool,
    /// Engine for guest tests
    #[arg(long, default_value = "soft")]
    engine: String,
    /// Run guest tests on another program (qemu), to tell its faults from ours
    #[arg(long, hide = true)]
    contender: Option<String>,
    /// Include the tests that take long
    #[arg(long)]
    long: bool,
    /// Duration of the long stress test in seconds
    #[arg(long, default_value_t = 60)]
    stress_seconds: u32,
    /// Duration of each fuzz target in seconds (two run at a time); 0 leaves the step out [default: 60, from seeds that
    /// are always the same]
    #[arg(long, value_name = "SECONDS")]
    fuzz_seconds: Option<u32>,
    /// Seed of all tests that make up their input. Without it they start from the same seeds each time, with --long (and
    /// fuzz targets with --fuzz-seconds) from a new one, which is printed
    #[arg(long)]
    seed: Option<u64>,
    /// Run guest tests on the optimised binary, and fuzz targets optimised, with all checks
    #[arg(long)]
    release: bool,
    /// Multiply time limits, for slow or busy machines
    #[arg(long, default_value_t = 1)]
    patience: u32,
}

/// Measure Viridian against QEMU's code generator (TCG) on this machine.
#[derive(clap::Args)]
struct BenchArgs {
    #[command(subcommand)]
    what: BenchWhat,
}

#[derive(Subcommand)]
enum BenchWhat {
    Boot(BenchBootArgs),
    Cpu(BenchCpuArgs),
    Disk(BenchDiskArgs),
    Firmware(BenchFirmwareArgs),
    Smp(BenchSmpArgs),
}

/// A parallel compilation on one virtual processor and on several.
#[derive(clap::Args)]
struct BenchSmpArgs {
    /// Rounds; the median counts
    #[arg(long, default_value_t = 3)]
    runs: u32,
    /// Kernel of the catalogue
    #[arg(long, default_value = "bookworm-cloud")]
    kernel: String,
    /// Engine
    #[arg(long, default_value = "soft")]
    engine: String,
    /// Virtual processors of the larger machine
    #[arg(long, default_value_t = 2)]
    processors: u32,
    /// Compilations
    #[arg(long, default_value_t = 8)]
    compilations: u32,
    /// Guest memory in MiB
    #[arg(long, default_value_t = 1024)]
    memory: u32,
}

/// From power-on to shim and to the kernel, against OVMF on QEMU with the same disk.
#[derive(clap::Args)]
struct BenchFirmwareArgs {
    /// Rounds; the median counts
    #[arg(long, default_value_t = 5)]
    runs: u32,
    /// Disk of the catalogue
    #[arg(long, default_value = "debian-12-disk")]
    disk: String,
}

/// Virtual disks: conversions and streams of requests, against qemu-img; fio in guests, against QEMU.
#[derive(clap::Args)]
struct BenchDiskArgs {
    /// Rounds; the median counts
    #[arg(long, default_value_t = 5)]
    runs: u32,
    /// Folder for the images [default: bench-disk in the target folder]
    #[arg(long)]
    folder: Option<PathBuf>,
    /// MiB of random data in the image that is converted
    #[arg(long, default_value_t = 512)]
    data: u64,
    /// Requests in a stream
    #[arg(long, default_value_t = 40_000)]
    count: u64,
    /// Cache modes of the streams, for both
    #[arg(long, value_delimiter = ',', default_value = "writeback,none", value_parser = ["none", "writeback"])]
    cache: Vec<String>,
    /// Kernel of the catalogue for the guests that run fio; none leaves them out
    #[arg(long, default_value = "bookworm-cloud")]
    kernel: String,
}

/// Small loops and real programs: native, under QEMU and under Viridian, the same files everywhere.
#[derive(clap::Args)]
struct BenchCpuArgs {
    /// Rounds; the median counts
    #[arg(long, default_value_t = 5)]
    runs: u32,
    /// Kernel of the catalogue
    #[arg(long, default_value = "bookworm-cloud")]
    kernel: String,
    /// Contenders in order: qemu or an engine (the bare machine always takes part)
    #[arg(long, value_delimiter = ',', default_value = "qemu,soft")]
    contenders: Vec<String>,
    /// Parts: micro, programs or both
    #[arg(long, value_delimiter = ',', default_value = "micro,programs,programs32", value_parser = ["micro", "programs", "programs32"])]
    parts: Vec<String>,
    /// Only these programs, by name
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Guest memory in MiB
    #[arg(long, default_value_t = 1024)]
    memory: u32,
}

/// Processor time from the start to the guest's init, same kernel and image for all.
#[derive(clap::Args)]
struct BenchBootArgs {
    /// Rounds; the median counts
    #[arg(long, default_value_t = 5)]
    runs: u32,
    /// Kernel of the catalogue
    #[arg(long, default_value = "bookworm-cloud")]
    kernel: String,
    /// Contenders in order, the first is the yardstick: qemu or an engine
    #[arg(long, value_delimiter = ',', default_value = "qemu,soft")]
    contenders: Vec<String>,
    /// Virtual processors
    #[arg(long, default_value_t = 1)]
    processors: u32,
    /// Guest memory in MiB
    #[arg(long, default_value_t = 512)]
    memory: u32,
}

/// Fetch guest kernels and tools from Debian's packages.
///
/// They go to target/guests (or to the folder that VIRIDIAN_GUESTS_DIR names, which several checkouts may share):
/// kernels/NAME/{vmlinuz,config,version,modules/} and tools/NAME/. The machine's own apt sources say where Debian's
/// archive is; nothing on the host changes and no root is needed.
#[derive(clap::Args)]
struct GuestsArgs {
    /// What to fetch (see --list); without a name, what demo, test and bench boot need
    names: Vec<String>,
    /// Show what can be fetched and what is there
    #[arg(long)]
    list: bool,
    /// Ask the archive for newer versions of what is there
    #[arg(long)]
    refresh: bool,
    /// Remove images, which are rebuilt on demand, and trees that are no longer in the catalogue
    #[arg(long)]
    prune: bool,
}

/// Build an initramfs for a fetched kernel and print the paths of both.
///
/// The image boots to a busybox shell, or runs tests/guest/NAME.sh with viridian.test=NAME (arguments:
/// viridian.args=A,B), or a script with viridian.run=BASE64; viridian.after=poweroff|reboot|shell says what follows.
#[derive(clap::Args)]
struct InitramfsArgs {
    /// Kernel of the catalogue
    #[arg(default_value = "bookworm-cloud")]
    kernel: String,
    /// Modules to load at start, comma-separated (what they depend on is added)
    #[arg(long, value_delimiter = ',')]
    modules: Vec<String>,
    /// Programs to add with their libraries, as TOOL:PATH (stress-ng:usr/bin/stress-ng)
    #[arg(long)]
    program: Vec<String>,
}

/// The folder of the workspace's `Cargo.toml`.
fn workspace_root() -> PathBuf {
    let mut dir = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    dir.pop();
    dir
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<ExitCode> {
    match cli.command {
        Xtask::Demo(args) => demo::run(&args.engine, args.keep),
        Xtask::Test(args) => test::run(&test::Options {
            contender: args.contender.unwrap_or(args.engine),
            only: args.only,
            no_guests: args.no_guests,
            list: args.list,
            long: args.long,
            stress_seconds: args.stress_seconds,
            fuzz_seconds: args.fuzz_seconds,
            seed: args.seed,
            release: args.release,
            patience: args.patience,
        }),
        Xtask::Bench(BenchArgs { what: BenchWhat::Boot(args) }) => bench_boot(args),
        Xtask::Bench(BenchArgs { what: BenchWhat::Cpu(args) }) => bench_cpu(args),
        Xtask::Bench(BenchArgs { what: BenchWhat::Disk(args) }) => bench::disk::run(&bench::disk::Options {
            runs: args.runs.max(1),
            folder: args.folder.unwrap_or_else(|| workspace_root().join("target/bench-disk")),
            data_mib: args.data.max(1),
            count: args.count.max(1),
            caches: args.cache,
            kernel: (args.kernel != "none").then_some(args.kernel),
        }),
        Xtask::Bench(BenchArgs { what: BenchWhat::Firmware(args) }) => {
            bench::firmware::run(&bench::firmware::Options { runs: args.runs.max(1), disk: args.disk })
        }
        Xtask::Bench(BenchArgs { what: BenchWhat::Smp(args) }) => bench::smp::run(&bench::smp::Options {
            runs: args.runs.max(1),
            contender: vm::Contender::by_name(&args.engine, &guests::Guests::locate(), true)?,
            kernel: args.kernel,
            processors: args.processors.max(1),
            compilations: args.compilations.max(1),
            memory_mib: args.memory,
        }),
        Xtask::Guests(args) => run_guests(&args),
        Xtask::Initramfs(args) => run_initramfs(args),
    }
}

fn run_guests(args: &GuestsArgs) -> Result<ExitCode> {
    let guests = guests::Guests::locate();
    if args.prune {
        guests::prune(&guests)?;
        return Ok(ExitCode::SUCCESS);
    }
    if args.list {
        for item in guests::CATALOGUE {
            let state = if guests.is_current(item) { "fetched" } else { "-" };
            println!("{:18} {state:8} {}", item.name, item.about);
        }
        println!("folder: {}", guests.root().display());
        return Ok(ExitCode::SUCCESS);
    }
    let names: Vec<&str> =
        if args.names.is_empty() { guests::DEFAULT.to_vec() } else { args.names.iter().map(String::as_str).collect() };
    guests.fetch(&names, args.refresh)?;
    println!("{} ready in {}", names.join(", "), guests.root().display());
    Ok(ExitCode::SUCCESS)
}

fn run_initramfs(args: InitramfsArgs) -> Result<ExitCode> {
    let guests = guests::Guests::locate();
    let busybox = guests::busybox_for(&args.kernel);
    let mut contents = initramfs::Contents { modules: args.modules, busybox, ..Default::default() };
    for program in &args.program {
        let (tool, path) = program.split_once(':').context("--program expects TOOL:PATH")?;
        contents.programs.push((tool.to_owned(), path.to_owned()));
    }
    let mut needed = vec![args.kernel.as_str(), "busybox", busybox];
    needed.extend(contents.programs.iter().map(|(tool, _)| tool.as_str()));
    guests.ensure(&needed)?;
    let kernel = guests.kernel(&args.kernel)?;
    eprintln!("kernel {} and its image:", kernel.version);
    println!("{}", kernel.image.display());
    println!("{}", initramfs::build(&guests, &kernel, &contents)?.display());
    Ok(ExitCode::SUCCESS)
}

fn bench_boot(args: BenchBootArgs) -> Result<ExitCode> {
    let guests = guests::Guests::locate();
    let contenders = contenders(&args.contenders, &guests)?;
    bench::boot::run(&bench::boot::Options {
        runs: args.runs.max(1),
        kernel: args.kernel,
        contenders,
        processors: args.processors,
        memory_mib: args.memory,
    })
}

fn bench_cpu(args: BenchCpuArgs) -> Result<ExitCode> {
    let guests = guests::Guests::locate();
    let contenders = contenders(&args.contenders, &guests)?;
    bench::cpu::run(&bench::cpu::Options {
        runs: args.runs.max(1),
        kernel: args.kernel,
        contenders,
        parts: args.parts,
        only: args.only,
        memory_mib: args.memory,
    })
}

fn contenders(names: &[String], guests: &guests::Guests) -> Result<Vec<vm::Contender>> {
    names.iter().map(|name| vm::Contender::by_name(name, guests, true)).collect()
}
