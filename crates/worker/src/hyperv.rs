//! Hyper-V's interface of a running machine: its synthetic devices, from the configuration.

use crate::run::WorkerError;
use crate::screen::Screen;
use machine::hyperv::HyperV;
use machine::machine::Base;
use machine::{MachineConfig, StorageUnit, UnitKind};
use partition::Abilities;
use scsi::{DiskConfig, ScsiDisk, ScsiDvd};
use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use vhd::{Disk, OpenOptions};
use vsp::SyntheticDevice;
use vsp::filecopy::FileCopy;
use vsp::heartbeat::Heartbeat;
use vsp::keyboard::Keyboard;
use vsp::kvp::Kvp;
use vsp::shutdown::Shutdown;
use vsp::storage::{StorageController, Unit};
use vsp::timesync::TimeSync;
use vsp::vss::Vss;

/// Controllers of a machine.
const MOST_CONTROLLERS: u32 = 4;

/// The devices that the host talks to while the machine runs.
pub struct Devices {
    /// The interface itself.
    pub interface: Arc<HyperV>,
    /// Controllers by number.
    pub storage: BTreeMap<u32, Arc<StorageController>>,
    /// Heartbeat.
    pub heartbeat: Arc<Heartbeat>,
    /// Shutdown.
    pub shutdown: Arc<Shutdown>,
    /// Data exchange.
    pub kvp: Arc<Kvp>,
    /// Backup.
    pub vss: Arc<Vss>,
    /// File copy.
    pub file_copy: Arc<FileCopy>,
    /// Keyboard.
    pub keyboard: Arc<Keyboard>,
    /// What is seen, if the machine has a screen.
    pub screen: Option<Screen>,
}

/// Images that somebody else has opened, by path.
pub type Given = Vec<(PathBuf, File)>;

/// Opens an image, from the files that were given if it is among them.
pub fn open(path: &Path, write: bool, given: Given) -> Result<Arc<Disk>, WorkerError> {
    let files = (!given.is_empty()).then(|| Arc::new(given));
    let options = OpenOptions { write, files, ..OpenOptions::default() };
    Disk::open(path, &options).map(Arc::new).map_err(|e| WorkerError::Setup(e.to_string()))
}

/// Opens a unit's image.
pub fn unit(config: &StorageUnit, given: Given) -> Result<Unit, WorkerError> {
    match (config.kind, &config.image) {
        (UnitKind::Disk, Some(path)) => {
            Ok(Unit::Disk(Arc::new(ScsiDisk::new(open(path, true, given)?, DiskConfig::default()))))
        }
        (UnitKind::Disk, None) => Err(WorkerError::Setup("a disk needs an image".into())),
        (UnitKind::Dvd, path) => {
            let medium = path.as_ref().map(|path| open(path, false, given)).transpose()?;
            Ok(Unit::Dvd(Arc::new(ScsiDvd::new(medium))))
        }
    }
}

impl Devices {
    /// Makes the interface and all devices.
    pub fn new(
        config: &MachineConfig,
        base: &Base,
        abilities: Abilities,
        cpu_signature: u32,
    ) -> Result<Self, WorkerError> {
        // The first controller is always there: units can be added to it later.
        let mut storage = BTreeMap::from([(0, StorageController::new(0, config.processors))]);
        for unit_config in &config.storage {
            let number = unit_config.controller;
            if number >= MOST_CONTROLLERS {
                return Err(WorkerError::Setup(format!("SCSI controller {number}: there are 0 to 3")));
            }
            let controller = storage.entry(number).or_insert_with(|| StorageController::new(number, config.processors));
            controller
                .attach(unit_config.lun, unit(unit_config, Given::new())?)
                .map_err(|e| WorkerError::Setup(format!("SCSI controller {number}: {e}")))?;
        }
        let (heartbeat, shutdown) = (Heartbeat::new(), Shutdown::new());
        let (kvp, vss, file_copy) = (Kvp::new(), Vss::new(), FileCopy::new());
        let keyboard = Keyboard::new();
        let clock = base.clock.clone();
        let time_sync = TimeSync::new(Box::new(move || clock.reference_time()));
        let mut devices: Vec<Arc<dyn SyntheticDevice>> = Vec::new();
        devices.extend(storage.values().map(|c| c.clone() as Arc<dyn SyntheticDevice>));
        devices.extend([heartbeat.clone() as Arc<dyn SyntheticDevice>, shutdown.clone(), time_sync]);
        devices.push(keyboard.clone());
        devices.extend([kvp.clone() as Arc<dyn SyntheticDevice>, vss.clone(), file_copy.clone()]);
        let interface = HyperV::new(base, config.processors, cpu_signature, abilities, devices)
            .map_err(|source| WorkerError::Host { what: "preparing VMBus", source })?;
        Ok(Self { interface, storage, heartbeat, shutdown, kvp, vss, file_copy, keyboard, screen: None })
    }
}
