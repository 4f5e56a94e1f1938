//! # viridian: the command line
//!
//! One file per noun: each has its arguments and a function that carries them out and says the exit status.
//!
//! | status | meaning |
//! | --- | --- |
//! | 0 | done; for `run`: the guest powered off, was saved, or the user left |
//! | 1 | the guest or the host failed |
//! | 2 | the arguments, or files that they name, are of no use |
//! | 3 | there is no such VM |
//! | 4 | the VM's state, or its guest, does not allow it |
//! | 5 | it takes too long, or somebody else is at it |
//! | 128 + n | ended by signal n |
//!
//! It may use: `vmms`, `worker`, `vhd`, and what their configurations are made of. It must never know: devices, engines
//! (but whether there are any: `host`).
#![forbid(unsafe_code)]

mod connect;
mod failure;
mod guest;
mod host;
mod options;
mod progress;
mod run;
mod screen;
mod shell;
mod table;
mod vhd;
mod vm;
mod worker_process;

use clap::{Args, Parser, Subcommand};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

/// Hyper-V's virtualization platform for Linux hosts.
#[derive(Parser)]
#[command(
    name = "viridian",
    version,
    max_term_width = 100,
    after_help = "\
A first VM: `viridian vhd new disk.vhdx 20G`, `viridian vm new demo --disk disk.vhdx --dvd installer.iso`,\n\
`viridian vm start demo`, `viridian vm connect demo`.\n\n\
Exit status: 0 done, 1 the guest or the host failed, 2 arguments or files of no use, 3 no such VM, 4 the VM's state\n\
does not allow it, 5 it takes too long."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Make, start, stop, change and remove virtual machines.
    Vm(Box<vm::Args>),
    /// Ask something of a running guest: status, data exchange, shutdown, backup, file copy.
    Guest(guest::Args),
    /// Write what a generation 2 machine shows as a PNG.
    Screenshot(screen::ScreenshotArgs),
    /// Type on a machine's keyboard.
    Type(screen::TypeArgs),
    /// Make, look at and change virtual hard disks.
    Vhd(vhd::Args),
    /// What this host offers.
    Host(host::Args),
    /// Boot one machine of no inventory with its serial port on this terminal.
    Run(Box<run::Args>),
    /// Print shell completions.
    Completions(shell::CompletionArgs),
    /// Write manual pages, one for each command.
    Man(shell::ManArgs),
    /// The process that runs one VM; `vm start` starts it.
    #[command(hide = true)]
    Worker(worker_process::Args),
}

/// Where the VMs are.
#[derive(Args, Clone)]
struct StoreArgs {
    /// Folder of the VMs [default: /var/lib/viridian for root, viridian in the XDG data folder for others]
    #[arg(long, value_name = "DIR", env = "VIRIDIAN_STORE", hide_env_values = true, global = true)]
    store: Option<PathBuf>,
}

impl StoreArgs {
    fn open(&self) -> Result<vmms::Store, failure::Failure> {
        let root = match &self.store {
            Some(root) => root.clone(),
            None => vmms::Store::usual()?,
        };
        Ok(vmms::Store::at(&root)?)
    }
}

fn main() -> ExitCode {
    let started = Instant::now();
    let cli = Cli::parse();
    // A worker has nobody to look on: it says more.
    let usual = if matches!(cli.command, Command::Worker(_)) { "info" } else { "warn" };
    let filter = tracing_subscriber::EnvFilter::try_from_env("VIRIDIAN_LOG").unwrap_or_else(|_| usual.into());
    let colour = std::io::IsTerminal::is_terminal(&std::io::stderr());
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(colour).with_writer(std::io::stderr).init();
    match cli.command {
        Command::Vm(args) => failure::report(vm::run(*args)),
        Command::Guest(args) => failure::report(guest::run(args)),
        Command::Screenshot(args) => failure::report(screen::screenshot(&args)),
        Command::Type(args) => failure::report(screen::type_keys(args)),
        Command::Vhd(args) => vhd::run(args),
        Command::Host(args) => failure::report(host::run(&args)),
        Command::Run(args) => run::run(*args, started),
        Command::Completions(args) => failure::report(shell::completions(&args)),
        Command::Man(args) => failure::report(shell::man(&args)),
        Command::Worker(args) => worker_process::run(&args, started),
    }
}
