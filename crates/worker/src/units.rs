//! The disks and DVD drives of a machine, while it runs: added, removed, resized, limited, their discs changed.

use crate::control::schema;
use machine::{IoLimits, StorageUnit, UnitKind};
use scsi::{DiskConfig, ScsiDisk, ScsiDvd};
use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use vhd::{Disk, OpenOptions, Qos, QosAlert};
use vsp::storage::{StorageController, Unit};

/// Controllers of a machine.
const MOST_CONTROLLERS: u32 = 4;

/// Where a unit is: controller and LUN.
type Place = (u32, u8);

/// Alerts of a disk that has not had its minimum.
#[derive(Clone, Copy)]
struct Alerts {
    count: u64,
    last: QosAlert,
}

/// The units and their controllers. Its methods may be called from any thread; each says in words what went wrong.
pub struct Units {
    controllers: BTreeMap<u32, Arc<StorageController>>,
    list: Mutex<Vec<StorageUnit>>,
    alerts: Arc<Mutex<BTreeMap<Place, Alerts>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

/// What is wrong with an image, with its path, which not every error names.
pub fn image_error(path: &Path, error: &vhd::Error) -> String {
    let (text, path) = (error.to_string(), path.display().to_string());
    if text.contains(&path) { text } else { format!("{path}: {text}") }
}

/// Images that somebody else has opened, by path.
pub type Given = Vec<(PathBuf, File)>;

/// Opens an image, from the files that were given if it is among them.
fn open(path: &Path, write: bool, given: Given) -> Result<Arc<Disk>, String> {
    let files = (!given.is_empty()).then(|| Arc::new(given));
    let options = OpenOptions { write, files, ..OpenOptions::default() };
    Disk::open(path, &options).map(Arc::new).map_err(|e| image_error(path, &e))
}

impl Units {
    /// Opens the images of a machine's configuration, those of `given` where there are some (one for each unit, in the same
    /// order). The first controller is always there: units can be added to it later.
    pub fn new(config: &[StorageUnit], given: Vec<Given>, processors: u32) -> Result<Self, String> {
        let mut controllers = BTreeMap::from([(0, StorageController::new(0, processors))]);
        for unit in config {
            if unit.controller >= MOST_CONTROLLERS {
                return Err(format!("SCSI controller {}: there are 0 to 3", unit.controller));
            }
            controllers.entry(unit.controller).or_insert_with(|| StorageController::new(unit.controller, processors));
        }
        let units = Self { controllers, list: Mutex::default(), alerts: Arc::default() };
        let given = given.into_iter().chain(std::iter::repeat_with(Given::new));
        config.iter().zip(given).try_for_each(|(unit, images)| units.attach(unit.clone(), images))?;
        Ok(units)
    }

    /// The controllers.
    pub fn controllers(&self) -> impl Iterator<Item = &Arc<StorageController>> {
        self.controllers.values()
    }

    /// The units that there are now.
    pub fn list(&self) -> Vec<StorageUnit> {
        lock(&self.list).clone()
    }

    fn controller(&self, number: u32) -> Result<&Arc<StorageController>, String> {
        self.controllers.get(&number).ok_or(format!("there is no SCSI controller {number}"))
    }

    fn unit(&self, (controller, lun): Place) -> Result<Unit, String> {
        self.controller(controller)?.unit(lun).ok_or(format!("controller {controller} has no unit {lun}"))
    }

    fn disk(&self, place: Place) -> Result<Arc<ScsiDisk>, String> {
        match self.unit(place)? {
            Unit::Disk(disk) => Ok(disk),
            Unit::Dvd(_) => Err(format!("unit {} of controller {} is a DVD drive", place.1, place.0)),
        }
    }

    /// Changes what is known of a unit.
    fn note(&self, place: Place, change: impl FnOnce(&mut StorageUnit)) {
        if let Some(unit) = lock(&self.list).iter_mut().find(|u| (u.controller, u.lun) == place) {
            change(unit);
        }
    }

    /// Opens an image and adds the unit.
    pub fn attach(&self, unit: StorageUnit, given: Given) -> Result<(), String> {
        let controller = self.controller(unit.controller)?;
        // Held from the look to the change, so that two requests for one place do not both succeed.
        let mut list = lock(&self.list);
        if controller.unit(unit.lun).is_some() {
            return Err(format!("unit {} of controller {} is occupied", unit.lun, unit.controller));
        }
        let made = match (unit.kind, &unit.image) {
            (UnitKind::Disk, Some(path)) => {
                let disk = Arc::new(ScsiDisk::new(open(path, true, given)?, DiskConfig::default()));
                self.set_limits((unit.controller, unit.lun), &disk, unit.limits)?;
                Unit::Disk(disk)
            }
            (UnitKind::Disk, None) => return Err("a disk needs an image".into()),
            (UnitKind::Dvd, path) => {
                let medium = path.as_ref().map(|path| open(path, false, given)).transpose()?;
                Unit::Dvd(Arc::new(ScsiDvd::new(medium)))
            }
        };
        controller.attach(unit.lun, made).map_err(|e| format!("SCSI controller {}: {e}", unit.controller))?;
        list.push(unit);
        Ok(())
    }

    /// Makes all that the guest has written durable. To it, a state that is saved, or a machine that is turned off, is no
    /// power cut: what was in a write cache must still be there.
    pub fn flush(&self) -> Result<(), String> {
        let mut result = Ok(());
        for unit in self.list() {
            if let Ok(disk) = self.disk((unit.controller, unit.lun)) {
                let flushed = disk.disk().flush();
                let place = || format!("unit {} of controller {}", unit.lun, unit.controller);
                result =
                    result.and(flushed.map_err(|e| format!("{}: its writes cannot be made durable: {e}", place())));
            }
        }
        result
    }

    /// Removes a unit.
    pub fn detach(&self, controller: u32, lun: u8) -> Result<(), String> {
        let mut list = lock(&self.list);
        self.controller(controller)?.detach(lun).ok_or(format!("controller {controller} has no unit {lun}"))?;
        list.retain(|u| (u.controller, u.lun) != (controller, lun));
        lock(&self.alerts).remove(&(controller, lun));
        Ok(())
    }

    fn drive(&self, place: Place) -> Result<Arc<ScsiDvd>, String> {
        match self.unit(place)? {
            Unit::Dvd(drive) => Ok(drive),
            Unit::Disk(_) => Err(format!("unit {} of controller {} is a disk, not a DVD drive", place.1, place.0)),
        }
    }

    /// Puts a disc into a drive.
    pub fn insert(&self, controller: u32, lun: u8, image: PathBuf, given: Given) -> Result<(), String> {
        let drive = self.drive((controller, lun))?;
        drive.insert(open(&image, false, given)?).map_err(|e| e.to_string())?;
        self.note((controller, lun), |unit| unit.image = Some(image));
        Ok(())
    }

    /// Takes the disc out; by force even if the guest has locked the tray.
    pub fn eject(&self, controller: u32, lun: u8, force: bool) -> Result<(), String> {
        let ejected = self.drive((controller, lun))?.eject(force).map_err(|e| e.to_string())?;
        // The guest may have ejected it before.
        self.note((controller, lun), |unit| unit.image = None);
        ejected.map(drop).ok_or("the drive is empty".into())
    }

    /// Changes a disk's size; a guest that runs is told.
    pub fn resize(&self, controller: u32, lun: u8, size: u64) -> Result<(), String> {
        self.disk((controller, lun))?.disk().resize(size, false).map_err(|e| e.to_string())?;
        // The unit attention waits for the next command: this brings the guest to send one.
        self.controller(controller)?.announce();
        Ok(())
    }

    /// Limits a disk.
    pub fn limit(&self, controller: u32, lun: u8, limits: IoLimits) -> Result<(), String> {
        let place = (controller, lun);
        let disk = self.disk(place)?;
        self.set_limits(place, &disk, limits)?;
        self.note(place, |unit| unit.limits = limits);
        Ok(())
    }

    fn set_limits(&self, place: Place, disk: &ScsiDisk, limits: IoLimits) -> Result<(), String> {
        lock(&self.alerts).remove(&place);
        let alerts = self.alerts.clone();
        let tell = move |alert: QosAlert| {
            let mut alerts = lock(&alerts);
            let entry = alerts.entry(place).or_insert(Alerts { count: 0, last: alert });
            *entry = Alerts { count: entry.count + 1, last: alert };
            // Once, not every second for as long as it lasts.
            if entry.count == 1 {
                let (wanted, got) = (alert.wanted, alert.got);
                tracing::warn!(controller = place.0, lun = place.1, wanted, got, "a disk has not had its minimum");
            }
        };
        let minimum = limits.minimum.map(|wanted| (wanted, Box::new(tell) as vhd::MinimumAlert));
        disk.disk().set_qos(Qos { maximum: limits.maximum, minimum }).map_err(|e| e.to_string())
    }

    /// What each unit is now.
    pub fn describe(&self) -> Vec<schema::Unit> {
        let alerts = lock(&self.alerts).clone();
        let one = |unit: &StorageUnit| {
            let place = (unit.controller, unit.lun);
            let (size, medium) = match self.unit(place) {
                Ok(Unit::Disk(disk)) => (Some(disk.disk().size()), true),
                Ok(Unit::Dvd(drive)) => (None, drive.has_medium()),
                // Removed between the two looks.
                Err(_) => return None,
            };
            let alert = alerts.get(&place).map(|a| schema::LimitAlert { got: a.last.got, count: a.count });
            let (controller, lun) = place;
            Some(schema::Unit { controller, lun, kind: unit.kind, medium, size, limits: unit.limits, alert })
        };
        self.list().iter().filter_map(one).collect()
    }
}
