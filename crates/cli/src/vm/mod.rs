//! `viridian vm`: the VMs of the inventory.
//!
//! * [`new`]: making one; [`show`]: `list`, `show`, `events`; [`state`]: starting, stopping and what is between;
//! * [`set`]: the configuration; [`storage`]: disks and DVDs; [`target`]: which machine is meant.

mod new;
mod set;
mod show;
mod state;
mod storage;
pub mod target;

use crate::StoreArgs;
use crate::failure::Outcome;
use clap::{Args as ClapArgs, Subcommand};

/// Arguments.
#[derive(ClapArgs)]
pub struct Args {
    #[command(flatten)]
    store: StoreArgs,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Make a VM
    New(Box<new::Args>),
    /// List the VMs with their states
    List(show::ListArgs),
    /// Show all of a VM: configuration, state, guest
    Show(show::ShowArgs),
    /// Change a VM's configuration
    Set(Box<set::Args>),
    /// Start a VM, from its saved state if it has one
    Start(state::StartArgs),
    /// Stop a VM: the guest shuts down; or turn it off; or save its state
    Stop(state::StopArgs),
    /// Let a VM stand still; its memory stays
    Pause(state::NameArgs),
    /// Let a paused VM go on
    Resume(state::NameArgs),
    /// Restart a VM: the guest restarts itself; or the reset button
    Restart(state::RestartArgs),
    /// The VM's serial console on this terminal; Ctrl-] leaves, and the VM runs on
    Connect(state::ConnectArgs),
    /// Remove a VM that is off
    Remove(state::RemoveArgs),
    /// Give a VM another name
    Rename(state::RenameArgs),
    /// Show what happened to a VM
    Events(show::EventArgs),
    /// Add, remove and change disks, of a running VM too
    #[command(subcommand)]
    Disk(storage::DiskCommand),
    /// Insert and eject discs, of a running VM too
    #[command(subcommand)]
    Dvd(storage::DvdCommand),
    /// Show and change the firmware
    #[command(subcommand)]
    Firmware(set::FirmwareCommand),
    /// Show and change the virtual processors
    #[command(subcommand)]
    Processor(set::ProcessorCommand),
    /// Show and change the memory
    #[command(subcommand)]
    Memory(set::MemoryCommand),
}

/// Carries the command out.
pub fn run(args: Args) -> Outcome {
    let store = args.store.open()?;
    match args.command {
        Command::New(a) => new::run(&store, *a),
        Command::List(a) => show::list(&store, &a),
        Command::Show(a) => show::show(&store, &a),
        Command::Set(a) => set::run(&store, *a),
        Command::Start(a) => state::start(&store, &a),
        Command::Stop(a) => state::stop(&store, &a),
        Command::Pause(a) => state::order(&store, &a, "pause"),
        Command::Resume(a) => state::order(&store, &a, "resume"),
        Command::Restart(a) => state::restart(&store, &a),
        Command::Connect(a) => state::connect(&store, &a),
        Command::Remove(a) => state::remove(&store, &a),
        Command::Rename(a) => state::rename(&store, &a),
        Command::Events(a) => show::events(&store, &a),
        Command::Disk(c) => storage::disk(&store, c),
        Command::Dvd(c) => storage::dvd(&store, c),
        Command::Firmware(c) => set::firmware(&store, c),
        Command::Processor(c) => set::processor(&store, c),
        Command::Memory(c) => set::memory(&store, c),
    }
}
