//! `viridian vm disk` and `viridian vm dvd`: of a VM that is off in its configuration, of one that runs in both. The
//! worker may open no files but its own: images are opened here and handed over.

use super::target::{Target, absolute};
use crate::failure::{Failure, Outcome, print_json};
use crate::table;
use clap::{Args as ClapArgs, Subcommand};
use machine::{IoLimits, StorageUnit, UnitKind};
use std::path::{Path, PathBuf};
use vmms::config::{Disk, Drive, VmConfig};
use vmms::{Store, Vm};
use worker::control::Client;
use worker::control::schema::{Place, State, Unit};

/// `vm disk`.
#[derive(Subcommand)]
pub enum DiskCommand {
    /// Add a disk
    Add(AddArgs),
    /// Remove a disk or a drive; its image stays
    Remove(PlaceArgs),
    /// Give a disk another image, while the VM is off
    Set {
        #[command(flatten)]
        place: PlaceArgs,
        /// The image
        image: PathBuf,
    },
    /// List the disks and drives of a machine that runs: sizes, discs, limits and alerts
    List {
        /// The VM, or a machine of `viridian run --name`
        name: String,
        /// Answer in JSON
        #[arg(long)]
        json: bool,
    },
    /// Change a disk's size while the VM runs (`viridian vhd resize` does it while it is off)
    Resize {
        #[command(flatten)]
        place: PlaceArgs,
        /// The new size: a number with K, M, G or T
        #[arg(value_parser = vmms::size::parse)]
        size: u64,
    },
    /// Limit a disk's operations; limits that are not given are none
    Limit {
        #[command(flatten)]
        place: PlaceArgs,
        #[command(flatten)]
        limits: LimitArgs,
    },
}

/// Arguments of `add`.
#[derive(ClapArgs)]
pub struct AddArgs {
    /// The VM, or a machine of `viridian run --name`
    name: String,
    /// The image; a drive may be empty
    image: Option<PathBuf>,
    /// Unit [default: the first that is free]
    #[arg(long, value_parser = clap::value_parser!(u8).range(0..64))]
    lun: Option<u8>,
    /// Controller
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..4))]
    controller: u32,
    /// Add a DVD drive
    #[arg(long)]
    dvd: bool,
    #[command(flatten)]
    limits: LimitArgs,
}

/// Limits of a disk, in operations of 8 KiB a second.
#[derive(ClapArgs)]
pub struct LimitArgs {
    /// Fewer than this, while requests wait, is an alert: `viridian vm disk list` shows it
    #[arg(long, value_name = "IOPS", value_parser = clap::value_parser!(u32).range(1..))]
    minimum: Option<u32>,
    /// No more than this
    #[arg(long, value_name = "IOPS", value_parser = clap::value_parser!(u32).range(1..))]
    maximum: Option<u32>,
}

impl LimitArgs {
    fn get(&self) -> IoLimits {
        IoLimits { minimum: self.minimum, maximum: self.maximum }
    }
}

/// Which unit of which machine.
#[derive(ClapArgs)]
pub struct PlaceArgs {
    /// The VM, or a machine of `viridian run --name`
    name: String,
    /// Unit
    #[arg(long, value_parser = clap::value_parser!(u8).range(0..64))]
    lun: u8,
    /// Controller
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..4))]
    controller: u32,
}

/// `vm dvd`.
#[derive(Subcommand)]
pub enum DvdCommand {
    /// Put a disc into a drive
    Insert {
        #[command(flatten)]
        drive: DriveArgs,
        /// The image
        image: PathBuf,
    },
    /// Take the disc out
    Eject {
        #[command(flatten)]
        drive: DriveArgs,
        /// Even if the guest has locked the tray
        #[arg(long)]
        force: bool,
    },
}

/// Which drive.
#[derive(ClapArgs)]
pub struct DriveArgs {
    /// The VM, or a machine of `viridian run --name`
    name: String,
    /// Unit [default: the only drive]
    #[arg(long, value_parser = clap::value_parser!(u8).range(0..64))]
    lun: Option<u8>,
    /// Controller
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..4))]
    controller: u32,
}

/// Who must be told of a change: the configuration, the running machine, or both.
struct Both {
    vm: Option<Vm>,
    client: Option<Client>,
}

impl Both {
    fn find(store: &Store, name: &str) -> Result<Self, Failure> {
        match Target::find(store, name)? {
            Target::Machine(client) => Ok(Self { vm: None, client: Some(client) }),
            Target::Vm(vm) => {
                let status = vm.status(std::time::Duration::from_secs(5));
                if status.state == State::Saved {
                    let advice = "disks and discs cannot change while a state is saved: start it, or discard the state \
                                  with `vm stop --turn-off`";
                    return Err(vm.wrong_state(status.state, advice).into());
                }
                if let Some(trouble) = &status.trouble {
                    eprintln!("note: {trouble}");
                }
                let client = status.record.is_some().then(|| vm.client());
                Ok(Self { vm: Some(vm), client })
            }
        }
    }

    /// Units in use: of the configuration, and of the machine.
    fn units(&self) -> Result<Vec<(u32, u8, UnitKind)>, Failure> {
        let mut units = Vec::new();
        if let Some(vm) = &self.vm {
            units.extend(vm.load()?.storage().iter().map(|u| (u.controller, u.lun, u.kind)));
        }
        if let Some(client) = &self.client {
            units.extend(client.storage()?.iter().map(|u| (u.controller, u.lun, u.kind)));
        }
        Ok(units)
    }

    /// Changes the machine, then the configuration; if that fails, the machine back.
    fn change(
        &self,
        live: impl FnOnce(&Client) -> Result<(), Failure>,
        back: impl FnOnce(&Client),
        kept: impl FnOnce(&mut VmConfig) -> Result<(), vmms::Error>,
        what: &str,
    ) -> Outcome {
        if let Some(client) = &self.client {
            live(client)?;
        }
        let Some(vm) = &self.vm else { return Ok(()) };
        if let Err(error) = vm.change(kept) {
            if let Some(client) = &self.client {
                back(client);
            }
            return Err(error.into());
        }
        vm.events().note("storage-changed", what);
        Ok(())
    }
}

/// Opens an image and its parents.
fn open(image: &Path, write: bool) -> Result<Vec<(PathBuf, std::fs::File)>, vmms::Error> {
    worker::control::client::open_images(image, write).map_err(|e| (image, e).into())
}

/// `vm disk`.
pub fn disk(store: &Store, command: DiskCommand) -> Outcome {
    match command {
        DiskCommand::Add(args) => add(store, args),
        DiskCommand::Remove(args) => remove(store, &args),
        DiskCommand::Set { place, image } => set(store, &place, image),
        DiskCommand::List { name, json } => list(store, &name, json),
        DiskCommand::Resize { place, size } => resize(store, &place, size),
        DiskCommand::Limit { place, limits } => limit(store, &place, limits.get()),
    }
}

/// Limits in words, behind something else; nothing if there are none.
pub fn limits_text(limits: &IoLimits) -> String {
    let iops = |text: &str, value: Option<u32>| value.map(|v| format!(", {text} {v} IOPS")).unwrap_or_default();
    iops("at least", limits.minimum) + &iops("at most", limits.maximum)
}

fn list(store: &Store, name: &str, json: bool) -> Outcome {
    let client = Target::find(store, name)?.client()?;
    let units = client.storage()?;
    if json {
        return print_json(&units);
    }
    let line = |u: &Unit| {
        let what = match (u.kind, u.size) {
            (UnitKind::Disk, size) => format!("disk, {} bytes", size.unwrap_or(0)),
            (UnitKind::Dvd, _) => format!("DVD drive, {}", if u.medium { "with a disc" } else { "empty" }),
        };
        let limits = limits_text(&u.limits);
        let alert = u.alert.map(|a| format!("; alert: {} IOPS, {} s below the minimum", a.got, a.count));
        (format!("{}:{}", u.controller, u.lun), what + &limits + &alert.unwrap_or_default())
    };
    table::print_pairs(&units.iter().map(line).collect::<Vec<_>>());
    Ok(())
}

fn resize(store: &Store, args: &PlaceArgs, size: u64) -> Outcome {
    let client = Target::find(store, &args.name)?.client()?;
    Ok(client.resize(Place { controller: args.controller, lun: args.lun }, size)?)
}

fn limit(store: &Store, args: &PlaceArgs, limits: IoLimits) -> Outcome {
    let both = Both::find(store, &args.name)?;
    let place = Place { controller: args.controller, lun: args.lun };
    both.change(
        |client| Ok(client.limit(place, limits)?),
        |_| {},
        |config| {
            let disk = config.disks.iter_mut().find(|d| (d.controller, d.lun) == (place.controller, place.lun));
            let none =
                || vmms::Error::Config(format!("controller {} has no disk at unit {}", place.controller, place.lun));
            disk.ok_or_else(none)?.limits = limits;
            Ok(())
        },
        &format!("unit {} of controller {} has new limits", place.lun, place.controller),
    )
}

fn add(store: &Store, args: AddArgs) -> Outcome {
    let both = Both::find(store, &args.name)?;
    let image = args.image.map(absolute).transpose()?;
    let kind = if args.dvd { UnitKind::Dvd } else { UnitKind::Disk };
    if image.is_none() && kind == UnitKind::Disk {
        return Err(Failure::usage("a disk needs an image (`viridian vhd new` makes one)"));
    }
    let units = both.units()?;
    let taken = |lun: u8| units.iter().any(|u| (u.0, u.1) == (args.controller, lun));
    let lun = match args.lun {
        Some(lun) if taken(lun) => {
            return Err(Failure::usage(format!(
                "unit {lun} of controller {} is taken: choose another",
                args.controller
            )));
        }
        Some(lun) => lun,
        None => (0..vmms::config::UNITS)
            .find(|lun| !taken(*lun))
            .ok_or_else(|| Failure::usage(format!("controller {} has no free unit", args.controller)))?,
    };
    if let Some(image) = &image {
        vmms::lifecycle::chain(image)?;
    }
    let (controller, limits) = (args.controller, args.limits.get());
    let unit = StorageUnit { controller, lun, kind, image: image.clone(), limits };
    let shown = image.as_ref().map_or("an empty drive".into(), |i| i.display().to_string());
    both.change(
        |client| {
            let write = kind == UnitKind::Disk;
            let files = image.as_ref().map(|i| open(i, write)).transpose()?.unwrap_or_default();
            Ok(client.attach(unit, files)?)
        },
        |client| drop(client.detach(Place { controller, lun })),
        |config| {
            match (kind, &image) {
                (UnitKind::Disk, Some(image)) => {
                    config.disks.push(Disk { controller, lun, image: image.clone(), limits })
                }
                _ => config.drives.push(Drive { controller, lun, image: image.clone() }),
            }
            Ok(())
        },
        &format!("{shown} is unit {lun} of controller {controller} now"),
    )?;
    println!("{controller}:{lun}");
    Ok(())
}

fn remove(store: &Store, args: &PlaceArgs) -> Outcome {
    let both = Both::find(store, &args.name)?;
    let place = Place { controller: args.controller, lun: args.lun };
    let known = both.units()?.iter().any(|u| (u.0, u.1) == (place.controller, place.lun));
    if !known {
        return Err(Failure::usage(format!("controller {} has no unit {}", place.controller, place.lun)));
    }
    both.change(
        |client| Ok(client.detach(place)?),
        |_| {},
        |config| {
            config.disks.retain(|d| (d.controller, d.lun) != (place.controller, place.lun));
            config.drives.retain(|d| (d.controller, d.lun) != (place.controller, place.lun));
            Ok(())
        },
        &format!("unit {} of controller {} was removed", place.lun, place.controller),
    )
}

fn set(store: &Store, args: &PlaceArgs, image: PathBuf) -> Outcome {
    let image = absolute(image)?;
    vmms::lifecycle::chain(&image)?;
    let vm = store.find(&args.name)?;
    vm.must_be_off("a disk's image can be changed")?;
    vm.change(|config| {
        let disk = config.disks.iter_mut().find(|d| (d.controller, d.lun) == (args.controller, args.lun));
        let none = || vmms::Error::Config(format!("controller {} has no disk at unit {}", args.controller, args.lun));
        disk.ok_or_else(none)?.image.clone_from(&image);
        Ok(())
    })?;
    vm.events().note(
        "storage-changed",
        &format!("unit {} of controller {} is {} now", args.lun, args.controller, image.display()),
    );
    Ok(())
}

/// `vm dvd`.
pub fn dvd(store: &Store, command: DvdCommand) -> Outcome {
    match command {
        DvdCommand::Insert { drive, image } => {
            let image = absolute(image)?;
            vmms::lifecycle::chain(&image)?;
            let both = Both::find(store, &drive.name)?;
            let place = the_drive(&both, &drive)?;
            let live = |client: &Client| insert(client, place, &image);
            both.change(
                live,
                |client| drop(client.eject(place, true)),
                |config| disc(config, place, Some(&image)),
                &format!("{} is in the drive {}:{}", image.display(), place.controller, place.lun),
            )
        }
        DvdCommand::Eject { drive, force } => {
            let both = Both::find(store, &drive.name)?;
            let place = the_drive(&both, &drive)?;
            both.change(
                |client| Ok(client.eject(place, force)?),
                |_| {},
                |config| disc(config, place, None),
                &format!("the drive {}:{} is empty", place.controller, place.lun),
            )
        }
    }
}

fn insert(client: &Client, place: Place, image: &Path) -> Outcome {
    Ok(client.insert(place, image, open(image, false)?)?)
}

fn disc(config: &mut VmConfig, place: Place, image: Option<&Path>) -> Result<(), vmms::Error> {
    let drive = config.drives.iter_mut().find(|d| (d.controller, d.lun) == (place.controller, place.lun));
    let none = || vmms::Error::Config(format!("controller {} has no drive at unit {}", place.controller, place.lun));
    let drive = drive.ok_or_else(none)?;
    drive.image = image.map(Path::to_path_buf);
    Ok(())
}

fn the_drive(both: &Both, args: &DriveArgs) -> Result<Place, Failure> {
    if let Some(lun) = args.lun {
        return Ok(Place { controller: args.controller, lun });
    }
    let mut drives: Vec<(u32, u8)> =
        both.units()?.iter().filter(|u| u.2 == UnitKind::Dvd).map(|u| (u.0, u.1)).collect();
    drives.sort_unstable();
    drives.dedup();
    match drives.as_slice() {
        [(controller, lun)] => Ok(Place { controller: *controller, lun: *lun }),
        [] => Err(Failure::usage("there is no DVD drive: `viridian vm disk add NAME --dvd` adds one")),
        _ => Err(Failure::usage("there are several DVD drives: say which with --lun and --controller")),
    }
}
