//! Hyper-V's interface for guests as a [`GuestInterface`] of the machine: `tlfs`, VMBus and the synthetic devices on it.

use crate::exits::GuestInterface;
use crate::layout::io;
use crate::machine::Base;
use chipset::{DeviceError, PowerSink, SavedState, Timer, TimerService, TimerTarget};
use partition::{Abilities, HypercallContext, HypercallOutcome, MsrOutcome, Partition, VpIndex};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::sync::{Arc, OnceLock, Weak};
pub use tlfs::CrashReport;
use tlfs::{HvConfig, HvHost, HvPartition, HvState, TimerId};
use vmbus::{VmBus, VmBusConfig, VmBusState};
use vsp::SyntheticDevice;
use x86::cpuid::{APIC_TIMER_HZ, CpuidTable};
use x86::msr;

const VERSION: u32 = 1;
/// Synthetic timers of a VP (TLFS 6.0b, section 12.3).
const TIMERS: usize = 4;

/// The machine's side of an [`HvPartition`].
pub struct HyperV {
    hv: Arc<HvPartition>,
    bus: VmBus,
    devices: Vec<Arc<dyn SyntheticDevice>>,
    host: Arc<Host>,
    /// Kept alive here; the timer service knows them weakly.
    _expiries: Vec<Arc<dyn TimerTarget>>,
}

#[derive(Serialize, Deserialize)]
struct State {
    partition: HvState,
    bus: VmBusState,
    devices: BTreeMap<String, SavedState>,
}

#[derive(Default)]
struct Host {
    power: OnceLock<Arc<dyn PowerSink>>,
    crash: OnceLock<Box<dyn Fn(&CrashReport) + Send + Sync>>,
}

impl HvHost for Host {
    fn reset(&self, _vp: VpIndex) {
        if let Some(power) = self.power.get() {
            power.reset();
        }
    }
    // `tlfs` passes only a few reports of a boot on, so that the guest cannot fill the log.
    fn crashed(&self, report: CrashReport) {
        if let Some(listener) = self.crash.get() {
            listener(&report);
        }
        let text = report.message.unwrap_or_default();
        tracing::error!(vp = report.vp, parameters = ?report.parameters, "the guest has crashed: {}", text.trim_end());
    }
}

/// The synthetic timers of all VPs, four a VP.
struct Timers(Vec<Timer>);

impl tlfs::TimerService for Timers {
    fn arm(&self, timer: TimerId, tsc_deadline: Option<u64>) {
        if let Some(timer) = self.0.get(timer.vp as usize * TIMERS + usize::from(timer.timer)) {
            timer.set(tsc_deadline);
        }
    }
}

struct Expiry {
    hv: Weak<HvPartition>,
    timer: TimerId,
}

impl TimerTarget for Expiry {
    fn expired(&self) {
        if let Some(hv) = self.hv.upgrade() {
            hv.timer_expired(self.timer);
        }
    }
}

impl HyperV {
    /// The interface of a machine with this memory, clock and timer service, on an engine with these abilities.
    /// `cpu_signature` is CPUID.1:EAX. The devices are offered on VMBus.
    pub fn new(
        base: &Base,
        processors: u32,
        cpu_signature: u32,
        abilities: Abilities,
        devices: Vec<Arc<dyn SyntheticDevice>>,
    ) -> std::io::Result<Arc<Self>> {
        let host = Arc::new(Host::default());
        let service: &TimerService = &base.timers;
        let timers = Arc::new(Timers((0..processors as usize * TIMERS).map(|_| service.timer()).collect()));
        let hv = HvPartition::new(HvConfig {
            vp_count: processors,
            memory: base.memory.clone(),
            clock: base.clock.clone(),
            abilities,
            hypercall_port: io::HYPERCALL,
            apic_frequency_hz: APIC_TIMER_HZ,
            cpu_signature,
            host: host.clone(),
            timers: timers.clone(),
        });
        let mut expiries: Vec<Arc<dyn TimerTarget>> = Vec::new();
        for (i, timer) in timers.0.iter().enumerate() {
            let id = TimerId { vp: (i / TIMERS) as VpIndex, timer: (i % TIMERS) as u8 };
            let expiry: Arc<dyn TimerTarget> = Arc::new(Expiry { hv: Arc::downgrade(&hv), timer: id });
            timer.connect(Arc::downgrade(&expiry));
            expiries.push(expiry);
        }
        let bus = VmBus::new(VmBusConfig {
            vp_count: processors,
            memory: base.memory.clone(),
            synic: hv.clone(),
            newest: vmbus::protocol::Version::V5_3,
        })?;
        for device in &devices {
            if !bus.offer(device.clone()) {
                return Err(std::io::Error::other(format!("device {} is on the bus twice", device.name())));
            }
        }
        Ok(Arc::new(Self { hv, bus, devices, host, _expiries: expiries }))
    }

    /// VMBus.
    pub fn bus(&self) -> &VmBus {
        &self.bus
    }

    /// Hears of crashes that the guest reports, on a VP's thread; must not block. Only the first listener counts.
    pub fn on_crash(&self, listener: Box<dyn Fn(&CrashReport) + Send + Sync>) {
        let _ = self.host.crash.set(listener);
    }

    /// For those who talk to the guest through SynIC (VMBus).
    pub fn partition(&self) -> &Arc<HvPartition> {
        &self.hv
    }
}

impl GuestInterface for HyperV {
    fn msr_ranges(&self) -> Vec<RangeInclusive<u32>> {
        std::iter::once(msr::HV_FIRST..=msr::HV_LAST).collect()
    }

    fn hypercall_port(&self) -> Option<u8> {
        Some(io::HYPERCALL)
    }

    fn extend_cpuid(&self, table: &mut CpuidTable, abilities: Abilities) {
        tlfs::cpuid::add_to(table, abilities);
    }

    fn attach(&self, partition: &Arc<dyn Partition>, power: &Arc<dyn PowerSink>) {
        self.hv.attach(partition.clone());
        let _ = self.host.power.set(power.clone());
    }

    fn msr_read(&self, vp: VpIndex, msr: u32) -> MsrOutcome {
        self.hv.msr_read(vp, msr)
    }

    fn msr_write(&self, vp: VpIndex, msr: u32, value: u64) -> MsrOutcome {
        self.hv.msr_write(vp, msr, value)
    }

    fn hypercall(&self, vp: VpIndex, context: &mut dyn HypercallContext) -> HypercallOutcome {
        self.hv.hypercall(vp, context)
    }

    fn start(&self) {
        self.bus.resume();
        self.devices.iter().for_each(|d| d.started());
    }

    fn stop(&self) {
        self.bus.pause();
    }

    fn reset(&self) {
        // Channels were paused with the machine; closing them ends their threads.
        self.bus.reset();
        self.hv.reset();
        self.devices.iter().for_each(|d| d.reset());
    }

    fn save(&self) -> Result<SavedState, DeviceError> {
        let mut devices = BTreeMap::new();
        for device in &self.devices {
            let value = device.save().map_err(DeviceError::Save)?;
            devices.insert(device.name().to_string(), SavedState { version: device.state_version(), value });
        }
        SavedState::new(VERSION, &State { partition: self.hv.save(), bus: self.bus.save(), devices })
    }

    fn restore(&self, saved: &SavedState) -> Result<(), DeviceError> {
        let state: State = saved.get(VERSION)?;
        for device in &self.devices {
            // A device that was added since the save starts anew.
            let Some(saved) = state.devices.get(device.name()) else { continue };
            let known = device.state_version();
            if saved.version != known {
                return Err(DeviceError::Version { found: saved.version, known });
            }
            device.restore(&saved.value).map_err(|e| DeviceError::BadState(format!("{}: {e}", device.name())))?;
        }
        self.hv.restore(&state.partition).map_err(|e| DeviceError::BadState(e.to_string()))?;
        self.bus.restore(&state.bus).map_err(|e| DeviceError::BadState(e.to_string()))
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let mut counters = self.hv.counters().snapshot();
        counters.extend(self.devices.iter().flat_map(|d| d.counters()));
        counters
    }
}
