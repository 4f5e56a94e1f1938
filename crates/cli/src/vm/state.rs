//! Starting, stopping, and what is between; removing and renaming.

use super::target::Target;
use crate::connect;
use crate::failure::{Failure, Outcome};
use crate::progress;
use clap::Args as ClapArgs;
use std::time::Duration;
use vmms::lifecycle::Stop;
use vmms::{Store, Vm};
use worker::control::schema::{Shutdown, State};

/// Arguments of `start`.
#[derive(ClapArgs)]
pub struct StartArgs {
    /// The VMs
    #[arg(required = true)]
    names: Vec<String>,
    /// Show the serial console at once, from the first byte
    #[arg(long)]
    connect: bool,
    /// Seconds that the start may take
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    timeout: u64,
}

/// Arguments of `stop`.
#[derive(ClapArgs)]
pub struct StopArgs {
    /// The VMs
    #[arg(required = true)]
    names: Vec<String>,
    /// As if the plug were pulled; of a VM whose state is saved: throw the state away
    #[arg(long, conflicts_with = "save")]
    turn_off: bool,
    /// Keep memory and devices in a file; the next start goes on from there
    #[arg(long)]
    save: bool,
    /// The guest shuts down without asking its applications
    #[arg(long, conflicts_with_all = ["turn_off", "save"])]
    force: bool,
    /// Seconds that the guest has for it
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    timeout: u64,
}

/// Arguments of commands that need no more than names.
#[derive(ClapArgs)]
pub struct NameArgs {
    /// The VMs
    #[arg(required = true)]
    names: Vec<String>,
}

/// Arguments of `restart`.
#[derive(ClapArgs)]
pub struct RestartArgs {
    /// The VM
    name: String,
    /// The reset button: the guest is not asked
    #[arg(long)]
    reset: bool,
    /// The guest restarts without asking its applications
    #[arg(long, conflicts_with = "reset")]
    force: bool,
}

/// Arguments of `connect`.
#[derive(ClapArgs)]
pub struct ConnectArgs {
    /// The VM
    name: String,
    /// Only what comes from now on
    #[arg(long)]
    no_history: bool,
}

/// Arguments of `remove`.
#[derive(ClapArgs)]
pub struct RemoveArgs {
    /// The VMs
    #[arg(required = true)]
    names: Vec<String>,
    /// The images in the VM's own folder too; images elsewhere always stay
    #[arg(long)]
    disks: bool,
}

/// Arguments of `rename`.
#[derive(ClapArgs)]
pub struct RenameArgs {
    /// The VM
    name: String,
    /// Its new name
    new_name: String,
}

/// Does something with each of several VMs; one that fails does not keep the others from it.
fn each(store: &Store, names: &[String], act: impl Fn(&Vm) -> Outcome) -> Outcome {
    let mut last = Ok(());
    for name in names {
        let result = store.find(name).map_err(Failure::from).and_then(|vm| act(&vm));
        if let (Err(earlier), true) = (&last, result.is_err()) {
            let earlier: &Failure = earlier;
            eprintln!("error: {}", earlier.message);
        }
        if result.is_err() {
            last = result;
        }
    }
    last
}

/// `vm start`.
pub fn start(store: &Store, args: &StartArgs) -> Outcome {
    let program = std::env::current_exe().map_err(|e| Failure::host(format!("this program's own path: {e}")))?;
    if args.connect && args.names.len() > 1 {
        return Err(Failure::usage("--connect shows one VM"));
    }
    each(store, &args.names, |vm| {
        let limit = Duration::from_secs(args.timeout);
        let restored = progress::waited(format!("Starting '{}'", vm.label()), limit, || vm.start(&program, limit))?;
        let how = if restored { " from its saved state" } else { "" };
        eprintln!("'{}' runs{how}.", vm.label());
        if args.connect { connect::vm(vm, true) } else { Ok(()) }
    })
}

/// `vm stop`.
pub fn stop(store: &Store, args: &StopArgs) -> Outcome {
    let how = match (args.turn_off, args.save) {
        (true, _) => Stop::TurnOff,
        (_, true) => Stop::Save,
        _ => Stop::ShutDown { force: args.force },
    };
    each(store, &args.names, |vm| {
        let limit = Duration::from_secs(args.timeout);
        let stop = || vm.stop(how, limit);
        let label = vm.label();
        match how {
            Stop::TurnOff => stop(),
            Stop::ShutDown { .. } => progress::waited(format!("Waiting for the guest of '{label}'"), limit, stop),
            Stop::Save => {
                let most = vm.load().map_or(0, |config| config.memory.size.0);
                progress::written(format!("Saving '{label}'"), &vm.partial_state_path(), most, stop)
            }
        }?;
        let status = vm.status(Duration::from_secs(2));
        eprintln!("'{}' is {}.", vm.label(), status.state);
        Ok(())
    })
}

/// `vm pause` and `vm resume`.
pub fn order(store: &Store, args: &NameArgs, order: &str) -> Outcome {
    each(store, &args.names, |vm| Ok(Target::Vm(vm.clone()).client()?.order(order)?))
}

/// `vm restart`.
pub fn restart(store: &Store, args: &RestartArgs) -> Outcome {
    let vm = store.find(&args.name)?;
    let client = Target::Vm(vm.clone()).client()?;
    if args.reset {
        return Ok(client.order("reset")?);
    }
    Ok(vm.ask_guest(Shutdown { restart: true, force: args.force })?)
}

/// `vm connect`.
pub fn connect(store: &Store, args: &ConnectArgs) -> Outcome {
    connect::vm(&store.find(&args.name)?, !args.no_history)
}

/// `vm remove`.
pub fn remove(store: &Store, args: &RemoveArgs) -> Outcome {
    each(store, &args.names, |vm| Ok(vm.remove(args.disks)?))
}

/// `vm rename`.
pub fn rename(store: &Store, args: &RenameArgs) -> Outcome {
    let vm = store.find(&args.name)?;
    vm.rename(&args.new_name)?;
    if vm.status(Duration::from_secs(2)).state == State::Running && vm.load()?.kernel.is_none() {
        eprintln!("note: the guest's firmware shows the new name from the next start on");
    }
    Ok(())
}
