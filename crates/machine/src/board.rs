//! The board: which devices a machine has and how they are wired.
//!
//! A direct-booted machine has the usual ones of a PC. A generation 2 machine has none of the legacy devices (PIC, PIT,
//! i8042): what remains is the I/O APIC, the RTC, COM ports, the PM block and reset, and its firmware's BiosDevice.
//!
//! ISA interrupt n is wired to input n of the PIC pair and to input n of the I/O APIC, except the PIT, which is on I/O
//! APIC input 2.

use crate::layout::{self, io};
use crate::machine::Serial;
use chipset::debug_port::{DebugPort, DebugSink};
use chipset::i8042::I8042;
use chipset::ioapic::{self, IoApic, MessageSink};
use chipset::pic::Pic;
use chipset::pit::Pit;
use chipset::pm::PowerManagement;
use chipset::reset::{A20Gate, ResetControl};
use chipset::rtc::{CmosMemory, Rtc};
use chipset::serial::{NullBackend, SerialBackend};
use chipset::uart::Uart;
use chipset::{Device, Line, PowerSink, TimerService};
use partition::{Msi, Partition};
use std::sync::Arc;

/// Sends the I/O APIC's messages to the engine.
struct Messages(Arc<dyn Partition>);

impl MessageSink for Messages {
    fn signal_msi(&self, msi: Msi) {
        self.0.signal_msi(msi);
    }
    fn set_routes(&self, routes: &[Option<Msi>]) {
        self.0.set_ioapic_routes(routes);
    }
}

/// The devices.
pub struct Board {
    /// All of them, interrupt controllers first: the order in which they start.
    pub devices: Vec<Arc<dyn Device>>,
    /// Interrupt controllers, which VPs reach in other ways than by address too.
    pub pic: Arc<Pic>,
    /// See `pic`.
    pub ioapic: Arc<IoApic>,
    /// The PIT, where there is one: it is told when its interrupts are taken.
    pub pit: Option<Arc<Pit>>,
    /// For the power button.
    pub pm: Arc<PowerManagement>,
}

impl Board {
    /// Makes the board. With `generation2` it has none of the legacy devices, but the given ones.
    pub fn new(
        partition: &Arc<dyn Partition>,
        timers: &Arc<TimerService>,
        power: &Arc<dyn PowerSink>,
        ram_bytes: u64,
        serial: Serial,
        debug: Option<Arc<dyn DebugSink>>,
        generation2: Option<Vec<Arc<dyn Device>>>,
    ) -> Self {
        let engine = partition.clone();
        let intr = Line::new(vec![Arc::new(move |high: bool| engine.set_extint(high))]);
        let pic = Pic::new(intr);
        let ioapic = IoApic::new(ioapic::DEFAULT_BASE, Arc::new(Messages(partition.clone())));
        let isa = |irq: u8| {
            let pin = if irq == 0 { io::PIT_PIN } else { irq };
            Line::new(vec![pic.input(irq), ioapic.input(pin)])
        };
        let low = ram_bytes.min(layout::HOLE.start);
        let memory = CmosMemory { low, high: ram_bytes - low };
        let a20 = A20Gate::new();
        let pm = PowerManagement::new(io::PM, true, timers, isa(io::SCI), power.clone());
        let plug = |backend: Option<Arc<dyn SerialBackend>>| backend.unwrap_or_else(|| Arc::new(NullBackend));
        let mut devices: Vec<Arc<dyn Device>> = vec![ioapic.clone()];
        let mut pit = None;
        if generation2.is_none() {
            devices.insert(0, pic.clone());
            let timer = Pit::new(timers, isa(0));
            devices.push(timer.clone());
            pit = Some(timer);
            devices.push(I8042::new(isa(1), isa(12), a20.clone(), power.clone()));
        }
        devices.push(Rtc::new(memory, timers, isa(8)));
        devices.push(Uart::new("com1", io::COM1.0, timers, isa(io::COM1.1), plug(serial.com1)));
        devices.push(Uart::new("com2", io::COM2.0, timers, isa(io::COM2.1), plug(serial.com2)));
        devices.push(ResetControl::new(a20, power.clone()));
        devices.push(pm.clone());
        devices.extend(generation2.into_iter().flatten());
        if let Some(sink) = debug {
            devices.push(DebugPort::new(io::DEBUG, sink));
        }
        Self { devices, pic, ioapic, pit, pm }
    }
}
