//! A machine: made, run, paused, reset, saved, restored.

use crate::acpi;
use crate::board::Board;
use crate::boot::{self, BootError, BootFiles};
use crate::bus::{Bus, DeviceCounts};
use crate::config::{BootSource, MEMORY_BYTES, MachineConfig, StorageUnit};
use crate::dump;
use crate::exits::{Exits, GuestInterface};
use crate::layout;
use crate::save::{self, Header, SaveError};
use crate::smbios;
use crate::vcpu::{Stopper, Vcpus, VpStarted, VpStop};
use chipset::debug_port::DebugSink;
use chipset::pm::PowerManagement;
use chipset::serial::SerialBackend;
use chipset::{DeviceError, PowerSink, Request, TimerService};
use partition::engine::MAX_VPS;
use partition::{
    Access, Clock, Engine, EngineError, EngineOptions, EngineStats, Gpa, GuestMemory, MemoryBlock, MemoryError,
    Partition, PartitionConfig, VpIndex, VpState,
};
use std::io::{Read, Write};
use std::sync::{Arc, Mutex};
use thiserror::Error;
use x86::cpuid::CpuidTable;
use x86::msr;

/// What plugs into a machine's serial ports.
#[derive(Default)]
pub struct Serial {
    /// COM1.
    pub com1: Option<Arc<dyn SerialBackend>>,
    /// COM2.
    pub com2: Option<Arc<dyn SerialBackend>>,
}

/// What a machine tells its owner. After each of these the VPs stop; [`Machine::pause`] waits for it.
#[derive(Debug)]
pub enum Event {
    /// The guest has switched itself off.
    PowerOff,
    /// The guest asks for a reset.
    Reset,
    /// A VP is in shutdown after a triple fault.
    TripleFault(VpIndex),
    /// The engine failed.
    EngineFailed(EngineError),
}

/// Why a machine cannot be made, run, saved or restored.
#[derive(Debug, Error)]
pub enum MachineError {
    /// A value of the configuration.
    #[error("{0}")]
    Config(String),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The guest's image.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The engine.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// A device.
    #[error("device '{name}': {source}")]
    Device {
        /// Which.
        name: String,
        /// What.
        source: DeviceError,
    },
    /// The state file.
    #[error(transparent)]
    Save(#[from] SaveError),
    /// The host.
    #[error("{what}: {source}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// What the host said.
        source: std::io::Error,
    },
}

/// What a machine is made from besides its configuration.
pub struct Parts<'a> {
    /// Executes its VPs.
    pub engine: &'a dyn Engine,
    /// Its options.
    pub options: EngineOptions,
    /// CPUID tables, one a VP ([`crate::processor::tables`]), without the leaves of the guest interface.
    pub cpuid: Vec<CpuidTable>,
    /// Serial ports.
    pub serial: Serial,
    /// Debug port for test programs.
    pub debug: Option<Arc<dyn DebugSink>>,
    /// Hyper-V's interface, or another.
    pub guest_interface: Option<Arc<dyn GuestInterface>>,
    /// For [`BootSource::Firmware`]: the devices of a generation 2 board beyond the usual ones (the BiosDevice).
    pub generation2: Vec<Arc<dyn chipset::Device>>,
    /// The partition's memory, clock and timers, if the caller needed them before (a guest interface does).
    pub base: Option<Base>,
    /// Files to boot from that are open already.
    pub boot: BootFiles,
    /// Called on each VP's thread before it executes guest code for the first time.
    pub vp_started: Option<VpStarted>,
    /// Hears events, on VP threads; must not block.
    pub events: Arc<dyn Fn(Event) + Send + Sync>,
}

/// Memory, clock and timers: what exists before the partition.
#[derive(Clone)]
pub struct Base {
    /// Guest memory.
    pub memory: Arc<GuestMemory>,
    /// The clock.
    pub clock: Arc<Clock>,
    /// Timers that follow the clock.
    pub timers: Arc<TimerService>,
}

impl Base {
    /// What a machine with this configuration begins with. `shared`: the memory is a file that other processes can map
    /// ([`Engine::uses_processes`]).
    pub fn new(config: &MachineConfig, shared: bool) -> Result<Self, MachineError> {
        check(config)?;
        let memory = GuestMemory::with_ram(config.memory_bytes, layout::HOLE, shared)?;
        memory.unmap(Gpa(layout::VGA.start), layout::VGA.end - layout::VGA.start)?;
        if matches!(config.boot, BootSource::Firmware { .. }) {
            let screen = MemoryBlock::new(layout::frame_buffer::SIZE, false)?;
            memory.map(Gpa(layout::frame_buffer::BASE), layout::frame_buffer::SIZE, screen, 0, Access::Ram)?;
        }
        let clock = Arc::new(Clock::new());
        let timers = TimerService::new(clock.clone())
            .map_err(|source| MachineError::Host { what: "creating the timer thread", source })?;
        Ok(Self { memory, clock, timers })
    }
}

fn check(config: &MachineConfig) -> Result<(), MachineError> {
    if !MEMORY_BYTES.contains(&config.memory_bytes) || config.memory_bytes % (1 << 20) != 0 {
        return Err(MachineError::Config(format!(
            "memory size {} is not a whole number of MiB from 2 MiB to 1023 GiB",
            config.memory_bytes
        )));
    }
    if !(1..=MAX_VPS).contains(&config.processors) {
        return Err(MachineError::Config(format!(
            "{} processors: from 1 to {MAX_VPS} are possible",
            config.processors
        )));
    }
    Ok(())
}

/// Passes what the guest wants of the machine's power to the owner, and stops the VPs.
pub struct PowerSwitch {
    stopper: Arc<Stopper>,
    events: Arc<dyn Fn(Event) + Send + Sync>,
}

impl PowerSwitch {
    fn raise(&self, event: Event) {
        self.stopper.request();
        (self.events)(event);
    }
}

impl PowerSink for PowerSwitch {
    fn power_off(&self) {
        self.raise(Event::PowerOff);
    }
    fn reset(&self) {
        self.raise(Event::Reset);
    }
}

/// A machine. Its owner calls it from one thread at a time.
pub struct Machine {
    config: MachineConfig,
    boot_files: BootFiles,
    /// The units that a restored machine begins with, if they are no longer those of `config`.
    storage: Mutex<Option<Vec<StorageUnit>>>,
    memory: Arc<GuestMemory>,
    clock: Arc<Clock>,
    timers: Arc<TimerService>,
    partition: Arc<dyn Partition>,
    exits: Arc<Exits>,
    pm: Arc<PowerManagement>,
    cpuid: Vec<CpuidTable>,
    tables: acpi::Tables,
    running: Mutex<bool>,
    // The last field: VP threads end before the rest goes.
    vcpus: Vcpus,
}

impl Machine {
    /// Makes a stopped machine with nothing loaded: [`Machine::boot`] or [`Machine::restore`] must follow.
    pub fn new(config: MachineConfig, parts: Parts<'_>) -> Result<Self, MachineError> {
        check(&config)?;
        let shared = parts.engine.uses_processes(&parts.options);
        let base = parts.base.map_or_else(|| Base::new(&config, shared), Ok)?;
        let mut cpuid = parts.cpuid;
        if let Some(interface) = &parts.guest_interface {
            for table in &mut cpuid {
                interface.extend_cpuid(table, parts.engine.abilities());
            }
        }
        let partition = parts.engine.create(PartitionConfig {
            vp_count: config.processors,
            memory: base.memory.clone(),
            clock: base.clock.clone(),
            cpuid: cpuid.clone(),
            msr_exits: parts.guest_interface.as_ref().map(|g| g.msr_ranges()).unwrap_or_default(),
            hypercall_port: parts.guest_interface.as_ref().and_then(|g| g.hypercall_port()),
            options: parts.options,
        })?;
        let timers = base.timers;
        let stopper = Stopper::new(partition.clone(), config.processors);
        let switch = Arc::new(PowerSwitch { stopper: stopper.clone(), events: parts.events });
        let power: Arc<dyn PowerSink> = switch.clone();
        if let Some(interface) = &parts.guest_interface {
            interface.attach(&partition, &power);
        }
        let generation2 = matches!(config.boot, BootSource::Firmware { .. });
        let extra = generation2.then_some(parts.generation2);
        let board = Board::new(&partition, &timers, &power, config.memory_bytes, parts.serial, parts.debug, extra);
        let bus = Bus::new(board.devices).map_err(|e| MachineError::Config(e.to_string()))?;
        let exits = Arc::new(Exits {
            bus,
            pic: board.pic,
            ioapic: board.ioapic,
            pit: board.pit,
            guest_interface: parts.guest_interface,
        });
        let report = Box::new(move |stop| {
            switch.raise(match stop {
                VpStop::TripleFault(vp) => Event::TripleFault(vp),
                VpStop::Failed(error) => Event::EngineFailed(error),
            });
        });
        let vcpus = Vcpus::new(stopper, exits.clone(), report, parts.vp_started)?;
        Ok(Self {
            tables: acpi::tables(config.processors, config.hyperv),
            config,
            boot_files: parts.boot,
            storage: Mutex::new(None),
            memory: base.memory,
            clock: base.clock,
            timers,
            partition,
            exits,
            pm: board.pm,
            cpuid,
            running: Mutex::new(false),
            vcpus,
        })
    }

    /// The configuration.
    pub fn config(&self) -> &MachineConfig {
        &self.config
    }

    /// Notes which units the machine has now: [`Machine::save`] puts them into the saved configuration.
    pub fn set_storage(&self, units: Vec<StorageUnit>) {
        *self.storage.lock().unwrap_or_else(|e| e.into_inner()) = Some(units);
    }

    /// Guest memory.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// The clock.
    pub fn clock(&self) -> &Arc<Clock> {
        &self.clock
    }

    /// The partition.
    pub fn partition(&self) -> &Arc<dyn Partition> {
        &self.partition
    }

    fn request(&self, name: &str, device: &dyn chipset::Device, request: Request<'_>) -> Result<(), MachineError> {
        device.request(request).map_err(|source| MachineError::Device { name: name.into(), source })
    }

    /// Loads firmware tables and the guest's image, and sets all VPs to their start. The machine must be stopped.
    pub fn boot(&self) -> Result<(), MachineError> {
        // UEFI makes its own tables, from its configuration blob.
        if !matches!(self.config.boot, BootSource::Firmware { .. }) {
            self.tables.write(&self.memory)?;
            smbios::write(&self.memory, self.config.memory_bytes)?;
        }
        for vp in 0..self.config.processors {
            let signature = self.cpuid[vp as usize].get(1, 0).eax;
            let mut state = VpState::reset(vp, signature);
            // A reset does not set the partition's clock back, and the TSC must agree with it: a guest computes Hyper-V's
            // reference time from its TSC and arms timers in it, which would all lie in the past.
            state.set_msr(msr::TSC, self.clock.tsc());
            if matches!(self.config.boot, BootSource::Kernel { .. }) {
                as_firmware_leaves(&mut state, vp == 0);
            }
            if vp == 0 {
                state = boot::load(&self.config, &self.boot_files, &self.memory, self.tables.rsdp, state)?;
            }
            self.vcpus.set_state(vp as usize, state)?;
        }
        Ok(())
    }

    /// Runs, or goes on.
    pub fn resume(&self) -> Result<(), MachineError> {
        let mut running = self.running.lock().unwrap_or_else(|e| e.into_inner());
        if !*running {
            // Interrupt controllers first, so that they hear the others.
            for device in self.exits.bus.devices() {
                self.request(device.name(), &**device, Request::Start)?;
            }
            self.clock.start();
            self.timers.start();
            if let Some(interface) = &self.exits.guest_interface {
                interface.start();
            }
            self.vcpus.run()?;
            *running = true;
        }
        Ok(())
    }

    /// Stops VPs, timers, clock and devices, and waits until all have stopped.
    pub fn pause(&self) -> Result<(), MachineError> {
        let mut running = self.running.lock().unwrap_or_else(|e| e.into_inner());
        if *running {
            self.vcpus.stop();
            // Its requests in flight end while everything that they may need still runs.
            if let Some(interface) = &self.exits.guest_interface {
                interface.stop();
            }
            self.timers.stop();
            self.clock.stop();
            for device in self.exits.bus.devices().iter().rev() {
                self.request(device.name(), &**device, Request::Stop)?;
            }
            *running = false;
        }
        Ok(())
    }

    /// Hardware reset of a paused machine, and boot.
    pub fn reset(&self) -> Result<(), MachineError> {
        for device in self.exits.bus.devices().iter().rev() {
            self.request(device.name(), &**device, Request::Reset)?;
        }
        if let Some(interface) = &self.exits.guest_interface {
            interface.reset();
        }
        self.boot()
    }

    /// Saves a paused machine.
    pub fn save(&self, out: impl Write) -> Result<(), MachineError> {
        let mut devices = std::collections::BTreeMap::new();
        for device in self.exits.bus.devices() {
            let mut place = None;
            self.request(device.name(), &**device, Request::Save(&mut place))?;
            if let Some(state) = place {
                devices.insert(device.name().to_string(), state);
            }
        }
        let vps = (0..self.config.processors as usize).map(|vp| self.vcpus.state(vp)).collect::<Result<_, _>>()?;
        let interface = self.exits.guest_interface.as_ref().map(|g| g.save()).transpose();
        let mut config = self.config.clone();
        if let Some(units) = &*self.storage.lock().unwrap_or_else(|e| e.into_inner()) {
            config.storage.clone_from(units);
        }
        let header = Header {
            config,
            cpuid: self.cpuid.clone(),
            tsc: self.clock.tsc(),
            tsc_hz: self.clock.tsc_frequency_hz(),
            vps,
            devices,
            guest_interface: interface
                .map_err(|source| MachineError::Device { name: "guest interface".into(), source })?,
        };
        Ok(save::write(out, &header, &self.memory)?)
    }

    /// Restores into a machine that was made with `header.config` and has not run. `input` is where
    /// [`save::read_header`] has left it.
    pub fn restore(&self, header: &Header, input: impl Read) -> Result<(), MachineError> {
        let damaged = |what: String| MachineError::Save(SaveError::Damaged(what));
        let (ours, theirs) = (self.clock.tsc_frequency_hz(), header.tsc_hz);
        // A frequency that is measured, not told, differs a little from process to process.
        if ours.abs_diff(theirs) > ours / 1000 {
            return Err(MachineError::Config(format!(
                "the machine was saved on a host with a TSC of {theirs} Hz and cannot go on here, at {ours} Hz"
            )));
        }
        if header.vps.len() != self.config.processors as usize {
            return Err(damaged(format!(
                "{} processor states for {} processors",
                header.vps.len(),
                self.config.processors
            )));
        }
        if model(&header.cpuid) != model(&self.cpuid) {
            return Err(MachineError::Config(format!(
                "the processor model '{}' is not the same here as where the machine was saved",
                self.config.cpu_model
            )));
        }
        save::read_memory(input, &self.memory)?;
        self.clock.set(header.tsc);
        for device in self.exits.bus.devices() {
            let state = header.devices.get(device.name());
            let state = state.ok_or_else(|| damaged(format!("no state of device '{}'", device.name())))?;
            self.request(device.name(), &**device, Request::Restore(state))?;
        }
        match (&self.exits.guest_interface, &header.guest_interface) {
            (Some(interface), Some(state)) => interface
                .restore(state)
                .map_err(|source| MachineError::Device { name: "guest interface".into(), source })?,
            (None, None) => {}
            _ => return Err(damaged("the state of the guest interface is missing or unexpected".into())),
        }
        for (vp, state) in header.vps.iter().enumerate() {
            self.vcpus.set_state(vp, state.clone())?;
        }
        Ok(())
    }

    /// Presses the power button.
    pub fn press_power_button(&self) {
        self.pm.press_power_button();
    }

    /// A paused VP's state.
    pub fn vp_state(&self, vp: VpIndex) -> Result<VpState, MachineError> {
        Ok(self.vcpus.state(vp as usize)?)
    }

    /// A paused VP's state in words.
    pub fn describe_vp(&self, vp: VpIndex) -> Result<String, MachineError> {
        Ok(dump::vp_state(vp, &self.vp_state(vp)?, &self.memory))
    }

    /// The engine's counters.
    pub fn engine_stats(&self) -> EngineStats {
        self.partition.stats()
    }

    /// How often devices were accessed.
    pub fn device_counts(&self) -> Vec<DeviceCounts> {
        self.exits.bus.counts()
    }

    /// Counters of the guest interface.
    pub fn interface_counters(&self) -> Vec<(&'static str, u64)> {
        self.exits.guest_interface.as_ref().map(|g| g.counters()).unwrap_or_default()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Nothing may call back into devices that are going away.
        let _ = self.pause();
        self.timers.stop();
    }
}

/// What firmware has done before it starts an operating system: memory is cached (MTRRs on, write-back by default), and
/// the interrupts of the PIC pair reach the first processor through its local APIC ("virtual wire mode",
/// MultiProcessor Specification 1.4, section 3.6.2.2): kernels that use no APIC rely on it.
fn as_firmware_leaves(state: &mut VpState, first: bool) {
    const SPURIOUS: usize = 0xf0;
    const LINT0: usize = 0x350;
    const LINT1: usize = 0x360;
    state.set_msr(msr::MTRR_DEF_TYPE, 0x806);
    if first {
        // Enabled with spurious vector 0xff; LINT0 is ExtINT, LINT1 is NMI.
        for (register, value) in [(SPURIOUS, 0x1ffu32), (LINT0, 0x700), (LINT1, 0x400)] {
            state.lapic.regs[register..register + 4].copy_from_slice(&value.to_le_bytes());
        }
    }
}

/// CPUID without the leaf that tells the TSC's frequency, which may be measured.
fn model(tables: &[CpuidTable]) -> Vec<CpuidTable> {
    let mut tables = tables.to_vec();
    for table in &mut tables {
        table.entries.retain(|e| !matches!(e.leaf, 0x15 | 0x16 | 0x4000_0010));
    }
    tables
}
