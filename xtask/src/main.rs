//! `cargo xtask`: everything that a developer or a newcomer types: `demo`, `test`, `bench`, `guests`.
//!
//! This crate may use every tool of the host (apt, cargo, the `viridian` binary); no crate of the product may use it.
//! It never looks inside `viridian`: it starts the program as a user does and reads what it prints.
#![forbid(unsafe_code)]

mod guests;

use anyhow::Result;
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
