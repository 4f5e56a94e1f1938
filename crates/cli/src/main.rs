//! # viridian: the command line
//!
//! One file per noun: each has its arguments and a function that carries them out and says the exit status.
//!
//! | status | meaning |
//! | --- | --- |
//! | 0 | done; for `run`: the guest powered off, was saved, or the user left |
//! | 1 | the guest or the host failed |
//! | 2 | the arguments, or files that they name, are of no use |
//! | 128 + n | ended by signal n |
//!
//! It may use: `worker`, and what later commands need. It must never know: devices, engines.
#![forbid(unsafe_code)]

mod guest;
mod run;
mod size;
mod vhd;

use clap::{Parser, Subcommand};
use std::process::ExitCode;
use std::time::Instant;

/// Hyper-V's virtualization platform for Linux hosts.
#[derive(Parser)]
#[command(name = "viridian", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Boot a Linux kernel in a virtual machine with its serial port on this terminal.
    Run(Box<run::Args>),
    /// Ask something of a running guest: status, data exchange, shutdown, backup, file copy.
    Guest(guest::Args),
    /// Make, look at and change virtual hard disks.
    Vhd(vhd::Args),
}

fn main() -> ExitCode {
    let started = Instant::now();
    let cli = Cli::parse();
    let filter = tracing_subscriber::EnvFilter::try_from_env("VIRIDIAN_LOG").unwrap_or_else(|_| "warn".into());
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    match cli.command {
        Command::Run(args) => run::run(*args, started),
        Command::Guest(args) => guest::run(args),
        Command::Vhd(args) => vhd::run(args),
    }
}
