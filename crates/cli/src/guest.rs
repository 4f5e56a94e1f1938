//! `viridian guest`: what the host can ask of a running guest.

use clap::{Args as ClapArgs, Subcommand};
use machine::{StorageUnit, UnitKind};
use std::path::PathBuf;
use std::process::ExitCode;
use worker::control::{self, Answer, Request};

/// Arguments.
#[derive(ClapArgs)]
pub struct Args {
    /// The machine's name (`viridian run --name`), or the path of its control socket
    name: String,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Heartbeat, VMBus, and which services the guest has
    Status,
    /// Lists key-value pairs, or gives the guest one
    Kvp {
        /// Which pool to list: auto (the guest of itself), guest (its programs), external (what the host gave)
        #[arg(long, default_value = "auto")]
        pool: String,
        /// Give the guest KEY=VALUE
        #[arg(long, value_name = "KEY=VALUE", conflicts_with = "delete")]
        set: Option<String>,
        /// Take a pair back
        #[arg(long, value_name = "KEY")]
        delete: Option<String>,
    },
    /// Shuts the guest down
    Shutdown {
        /// Restart it
        #[arg(long)]
        restart: bool,
        /// Without asking its applications
        #[arg(long)]
        force: bool,
    },
    /// Freezes the guest's file systems for a backup
    Freeze,
    /// Thaws them
    Thaw,
    /// Copies a file into the guest
    Copy {
        /// File of the host
        source: PathBuf,
        /// Path in the guest: /directory/name
        target: String,
        /// Replace an existing file
        #[arg(long)]
        overwrite: bool,
        /// Make missing directories
        #[arg(long)]
        create_path: bool,
    },
    /// Adds a disk or drive
    Attach {
        /// Image; for a drive it may be left out
        image: Option<PathBuf>,
        /// Unit
        #[arg(long, value_parser = clap::value_parser!(u8).range(0..64))]
        lun: u8,
        /// Controller
        #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..4))]
        controller: u32,
        /// A DVD drive
        #[arg(long)]
        dvd: bool,
    },
    /// Removes a disk or drive
    Detach {
        /// Unit
        #[arg(long, value_parser = clap::value_parser!(u8).range(0..64))]
        lun: u8,
        /// Controller
        #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..4))]
        controller: u32,
    },
}

/// Carries the command out.
pub fn run(args: Args) -> ExitCode {
    let request = match request(args.command) {
        Ok(request) => request,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::from(2);
        }
    };
    let path = control::socket_path(&args.name);
    match control::ask(&path, &request) {
        Ok(Answer::Done) => ExitCode::SUCCESS,
        Ok(Answer::Pairs(pairs)) => {
            let width = pairs.iter().map(|(key, _)| key.len()).max().unwrap_or(0);
            pairs.iter().for_each(|(key, value)| println!("{key:width$}  {value}"));
            ExitCode::SUCCESS
        }
        Ok(Answer::Error(error)) => {
            eprintln!("error: {error}");
            ExitCode::from(1)
        }
        Err(error) => {
            eprintln!("error: {}: {error} (is the machine running with --name?)", path.display());
            ExitCode::from(2)
        }
    }
}

fn absolute(path: PathBuf) -> Result<PathBuf, String> {
    std::path::absolute(&path).map_err(|e| format!("{}: {e}", path.display()))
}

fn request(command: Command) -> Result<Request, String> {
    Ok(match command {
        Command::Status => Request::Status,
        Command::Kvp { set: Some(pair), .. } => {
            let (key, value) = pair.split_once('=').ok_or("--set takes KEY=VALUE")?;
            Request::KvpSet { key: key.into(), value: value.into() }
        }
        Command::Kvp { delete: Some(key), .. } => Request::KvpDelete { key },
        Command::Kvp { pool, .. } => Request::KvpList { pool },
        Command::Shutdown { restart, force } => Request::Shutdown { restart, force },
        Command::Freeze => Request::Freeze,
        Command::Thaw => Request::Thaw,
        Command::Copy { source, target, overwrite, create_path } => {
            Request::Copy { source: absolute(source)?, target, overwrite, create_path }
        }
        Command::Attach { image, lun, controller, dvd } => {
            let kind = if dvd { UnitKind::Dvd } else { UnitKind::Disk };
            let image = image.map(absolute).transpose()?;
            Request::Attach { unit: StorageUnit { controller, lun, kind, image } }
        }
        Command::Detach { lun, controller } => Request::Detach { controller, lun },
    })
}
