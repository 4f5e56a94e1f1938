//! `viridian guest`: what the host can ask of a running guest.

use crate::StoreArgs;
use crate::failure::{Failure, Outcome, print_json};
use crate::table;
use crate::vm::target::Target;
use clap::{Args as ClapArgs, Subcommand};
use std::path::PathBuf;
use worker::control::schema;

/// Arguments.
#[derive(ClapArgs)]
pub struct Args {
    #[command(flatten)]
    store: StoreArgs,
    /// The VM; or a machine of `viridian run --name`; or the path of a control socket
    name: String,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Heartbeat, VMBus, and which services the guest has
    Status {
        /// Answer in JSON
        #[arg(long)]
        json: bool,
    },
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
        /// Answer in JSON
        #[arg(long)]
        json: bool,
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
}

/// Carries the command out.
pub fn run(args: Args) -> Outcome {
    let client = Target::find(&args.store.open()?, &args.name)?.client()?;
    match args.command {
        Command::Status { json } => {
            let guest = client.guest()?;
            if json {
                return print_json(&guest);
            }
            table::print_pairs(&describe(&guest));
            Ok(())
        }
        Command::Kvp { set: Some(pair), .. } => {
            let (key, value) = pair.split_once('=').ok_or_else(|| Failure::usage("--set takes KEY=VALUE"))?;
            Ok(client.kvp_set(key, value)?)
        }
        Command::Kvp { delete: Some(key), .. } => Ok(client.kvp_delete(&key)?),
        Command::Kvp { pool, json, .. } => {
            if !["auto", "guest", "external"].contains(&pool.as_str()) {
                return Err(Failure::usage(format!("there is no pool '{pool}': external, guest and auto are there")));
            }
            let pairs = client.kvp(&pool)?;
            if json {
                return print_json(&pairs);
            }
            table::print_pairs(&pairs.into_iter().map(|p| (p.key, p.value)).collect::<Vec<_>>());
            Ok(())
        }
        Command::Shutdown { restart, force } => Ok(client.shutdown(schema::Shutdown { restart, force })?),
        Command::Freeze => Ok(client.backup("freeze")?),
        Command::Thaw => Ok(client.backup("thaw")?),
        Command::Copy { source, target, overwrite, create_path } => {
            let file = std::fs::File::open(&source);
            let file = file.map_err(|e| Failure::usage(format!("{}: {e}", source.display())))?;
            Ok(client.copy(file, &schema::Copy { target, overwrite, create_path })?)
        }
    }
}

fn describe(guest: &schema::Guest) -> Vec<(String, String)> {
    let yes = |on: bool| if on { "connected" } else { "not connected" }.to_string();
    vec![
        ("guest-os-id".into(), format!("{:#x}", guest.os_id)),
        ("vmbus".into(), guest.vmbus.clone().unwrap_or_else(|| "not connected".into())),
        ("channels".into(), guest.channels.to_string()),
        ("heartbeat".into(), guest.heartbeat.name().into()),
        ("shutdown".into(), yes(guest.shutdown)),
        ("kvp".into(), yes(guest.kvp)),
        ("vss".into(), yes(guest.vss)),
        ("keyboard".into(), yes(guest.keyboard)),
        ("file-copy".into(), yes(guest.file_copy)),
    ]
}
