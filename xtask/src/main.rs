//! `cargo xtask`: everything that a developer or a newcomer types: `demo`, `test`, `bench`, `guests`.
//!
//! This crate may use every tool of the host (apt, cargo, the `viridian` binary); no crate of the product may use it.
//! It never looks inside `viridian`: it starts the program as a user does and reads what it prints.
#![forbid(unsafe_code)]

mod guests;
mod initramfs;

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
    Guests(GuestsArgs),
    Initramfs(InitramfsArgs),
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
    let mut contents = initramfs::Contents { modules: args.modules, ..Default::default() };
    for program in &args.program {
        let (tool, path) = program.split_once(':').context("--program expects TOOL:PATH")?;
        contents.programs.push((tool.to_owned(), path.to_owned()));
    }
    let mut needed = vec![args.kernel.as_str(), "busybox"];
    needed.extend(contents.programs.iter().map(|(tool, _)| tool.as_str()));
    guests.ensure(&needed)?;
    let kernel = guests.kernel(&args.kernel)?;
    eprintln!("kernel {} and its image:", kernel.version);
    println!("{}", kernel.image.display());
    println!("{}", initramfs::build(&guests, &kernel, &contents)?.display());
    Ok(ExitCode::SUCCESS)
}
