//! Random accesses to every device: nothing panics, nothing takes long, and whatever state results can be saved,
//! restored, and saved again to the same.
//!
//! Runs for 2 s, or `VIRIDIAN_FUZZ_SECONDS`; see the crate `fuzzing`.

use fuzzing::{Effort, Rng};
use partition::{Clock, Msi};
use std::sync::Arc;
use std::time::Duration;
use viridian_chipset::debug_port::{DebugPort, DebugSink};
use viridian_chipset::i8042::I8042;
use viridian_chipset::ioapic::{DEFAULT_BASE, IoApic, MessageSink};
use viridian_chipset::pic::Pic;
use viridian_chipset::pit::Pit;
use viridian_chipset::pm::PowerManagement;
use viridian_chipset::reset::{A20Gate, ResetControl};
use viridian_chipset::rtc::{CmosMemory, Rtc};
use viridian_chipset::serial::{MemoryBackend, SerialReceiver};
use viridian_chipset::uart::Uart;
use viridian_chipset::{Device, Line, PowerSink, Request, SavedState, TimerService};

struct Nobody;
impl PowerSink for Nobody {
    fn power_off(&self) {}
    fn reset(&self) {}
}
impl MessageSink for Nobody {
    fn signal_msi(&self, msi: Msi) {
        assert_eq!(msi.address >> 20, 0xfee, "{msi:?}");
        assert!(msi.data < 0x1_0000, "{msi:?}");
    }
    fn set_routes(&self, routes: &[Option<Msi>]) {
        assert_eq!(routes.len(), 24);
    }
}
impl DebugSink for Nobody {
    fn byte(&self, _: u8) {}
}

struct Bench {
    clock: Arc<Clock>,
    timers: Arc<TimerService>,
    devices: Vec<Arc<dyn Device>>,
    pic: Arc<Pic>,
    ioapic: Arc<IoApic>,
    uart: Arc<Uart>,
    backend: Arc<MemoryBackend>,
}

fn bench() -> Bench {
    let clock = Arc::new(Clock::new());
    let timers = TimerService::manual(clock.clone());
    let pic = Pic::new(Line::disconnected());
    let ioapic = IoApic::new(DEFAULT_BASE, Arc::new(Nobody));
    let line = |irq: u8| Line::new(vec![pic.input(irq), ioapic.input(irq)]);
    let power: Arc<dyn PowerSink> = Arc::new(Nobody);
    let a20 = A20Gate::new();
    let backend = MemoryBackend::new(100);
    let uart = Uart::new("com1", 0x3f8, &timers, line(4), backend.clone());
    let devices: Vec<Arc<dyn Device>> = vec![
        pic.clone(),
        ioapic.clone(),
        Pit::new(&timers, line(0)),
        Rtc::new(CmosMemory { low: 1 << 30, high: 0 }, &timers, line(8)),
        uart.clone(),
        I8042::new(line(1), line(12), a20.clone(), power.clone()),
        ResetControl::new(a20, power.clone()),
        PowerManagement::new(0x400, true, &timers, line(9), power.clone()),
        DebugPort::new(0xe9, Arc::new(Nobody)),
    ];
    Bench { clock, timers, devices, pic, ioapic, uart, backend }
}

fn save(bench: &Bench) -> Vec<SavedState> {
    let one = |device: &Arc<dyn Device>| {
        let mut place = None;
        device.request(Request::Save(&mut place)).unwrap();
        place.unwrap()
    };
    bench.devices.iter().map(one).collect()
}

fn access(device: &dyn Device, random: &mut Rng) {
    let mut data = random.next().to_le_bytes();
    if random.below(4) == 0 {
        // Registers like small numbers better.
        data[0] &= 0x1f;
    }
    if let Some(ports) = device.ports() {
        let ranges = ports.port_ranges();
        let range = &ranges[random.below(ranges.len() as u64) as usize];
        let port = range.start() + random.below(u64::from(range.end() - range.start()) + 1) as u16;
        let data = &mut data[..[1, 1, 1, 2, 4][random.below(5) as usize]];
        if random.below(2) == 0 { ports.port_read(port, data) } else { ports.port_write(port, data) }
    }
    if let Some(mmio) = device.mmio() {
        let range = mmio.mmio_ranges()[0].clone();
        let offset = match random.below(4) {
            0 => random.below(range.end - range.start),
            _ => [0, 0x10, 0x40, 0x11][random.below(4) as usize],
        };
        let len = 1 + random.below(8 - offset % 8) as usize;
        let gpa = range.start + offset;
        if random.below(2) == 0 { mmio.mmio_read(gpa, &mut data[..len]) } else { mmio.mmio_write(gpa, &data[..len]) }
    }
}

fn round(random: &mut Rng) {
    let bench = bench();
    for device in &bench.devices {
        device.request(Request::Start).unwrap();
    }
    for step in 0..2000u32 {
        let effort = Effort::begin();
        access(&*bench.devices[random.below(bench.devices.len() as u64) as usize], random);
        match random.below(40) {
            0 => {
                // Time passes: a little, or a lot.
                let span = 1u64 << random.below(44);
                bench.clock.set(bench.clock.tsc().saturating_add(random.below(span)).min(1 << 60));
                bench.timers.run_due(200);
            }
            1 => drop(bench.pic.acknowledge()),
            2 => bench.ioapic.eoi(random.next() as u8),
            3 => drop(bench.uart.receive(&random.next().to_le_bytes())),
            4 => bench.uart.receive_break(),
            5 => bench.uart.connection(random.below(2) == 0),
            6 => {
                bench.backend.take();
                bench.uart.transmit_ready();
            }
            7 if step % 50 == 0 => {
                let device = &bench.devices[random.below(bench.devices.len() as u64) as usize];
                device.request(Request::Reset).unwrap();
            }
            _ => {}
        }
        // An endless loop is what this finds.
        assert!(effort.spent() < Duration::from_secs(2), "step {step} took {:?}", effort.spent());
    }
    // The other end of the serial port is not part of the state: it must be the same in both.
    bench.backend.take();
    bench.uart.transmit_ready();
    bench.uart.connection(true);
    let before = save(&bench);
    let other = self::bench();
    other.clock.set(bench.clock.tsc());
    for (device, state) in other.devices.iter().zip(&before) {
        device.request(Request::Restore(state)).unwrap_or_else(|e| panic!("{}: {e}", device.name()));
    }
    for ((device, before), after) in other.devices.iter().zip(&before).zip(save(&other)) {
        assert!(*before == after, "{}: {before:?} became {after:?}", device.name());
    }
}

#[test]
fn random_accesses() {
    fuzzing::rounds("chipset", Duration::from_secs(2), round);
}

/// Turns bytes of a saved state over: it is refused, or the device goes on with it; it never panics.
#[test]
fn damaged_states() {
    let bench = bench();
    let mut random = Rng::new(7);
    for _ in 0..2000 {
        access(&*bench.devices[random.below(bench.devices.len() as u64) as usize], &mut random);
    }
    for (index, state) in save(&bench).iter().enumerate() {
        let mut bytes = Vec::new();
        ciborium::into_writer(&state.value, &mut bytes).unwrap();
        for _ in 0..500 {
            let mut bad = bytes.clone();
            let at = random.below(bad.len() as u64) as usize;
            bad[at] = random.next() as u8;
            let Ok(value) = ciborium::from_reader::<ciborium::Value, _>(bad.as_slice()) else { continue };
            let other = self::bench();
            let device = &other.devices[index];
            if device.request(Request::Restore(&SavedState { version: state.version, value })).is_ok() {
                device.request(Request::Start).unwrap();
                for _ in 0..20 {
                    access(&**device, &mut random);
                }
                other.clock.set(1 << 40);
                other.timers.run_due(100);
            }
        }
    }
}
