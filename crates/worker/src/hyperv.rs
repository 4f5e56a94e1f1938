//! Hyper-V's interface of a running machine: its synthetic devices, from the configuration.

use crate::run::WorkerError;
use crate::screen::Screen;
use crate::units::{Given, Units};
use machine::MachineConfig;
use machine::hyperv::HyperV;
use machine::machine::Base;
use partition::Abilities;
use std::sync::Arc;
use vsp::SyntheticDevice;
use vsp::filecopy::FileCopy;
use vsp::heartbeat::Heartbeat;
use vsp::keyboard::Keyboard;
use vsp::kvp::Kvp;
use vsp::shutdown::Shutdown;
use vsp::timesync::TimeSync;
use vsp::vss::Vss;

/// The devices that the host talks to while the machine runs.
pub struct Devices {
    /// The interface itself.
    pub interface: Arc<HyperV>,
    /// Disks and drives.
    pub units: Units,
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

impl Devices {
    /// Makes the interface and all devices; `images` as for [`Units::new`].
    pub fn new(
        config: &MachineConfig,
        images: Vec<Given>,
        base: &Base,
        abilities: Abilities,
        cpu_signature: u32,
    ) -> Result<Self, WorkerError> {
        let units = Units::new(&config.storage, images, config.processors).map_err(WorkerError::Setup)?;
        let (heartbeat, shutdown) = (Heartbeat::new(), Shutdown::new());
        let (kvp, vss, file_copy) = (Kvp::new(), Vss::new(), FileCopy::new());
        let keyboard = Keyboard::new();
        let clock = base.clock.clone();
        let time_sync = TimeSync::new(Box::new(move || clock.reference_time()));
        let mut devices: Vec<Arc<dyn SyntheticDevice>> = Vec::new();
        devices.extend(units.controllers().map(|c| c.clone() as Arc<dyn SyntheticDevice>));
        devices.extend([heartbeat.clone() as Arc<dyn SyntheticDevice>, shutdown.clone(), time_sync]);
        devices.push(keyboard.clone());
        devices.extend([kvp.clone() as Arc<dyn SyntheticDevice>, vss.clone(), file_copy.device()]);
        let interface = HyperV::new(base, config.processors, cpu_signature, abilities, devices)
            .map_err(|source| WorkerError::Host { what: "preparing VMBus", source })?;
        Ok(Self { interface, units, heartbeat, shutdown, kvp, vss, file_copy, keyboard, screen: None })
    }
}
