//! `viridian worker`: what `vm start` starts. Not for people.

use clap::Args as ClapArgs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

/// Arguments.
#[derive(ClapArgs)]
pub struct Args {
    /// The inventory
    #[arg(long)]
    store: PathBuf,
    /// The VM
    id: String,
}

/// Runs the VM to its end.
pub fn run(args: &Args, started: Instant) -> ExitCode {
    ExitCode::from(vmms::launch::worker_main(&args.store, &args.id, started))
}
