//! The I/O APIC.
//!
//! Source: Intel 82093AA data sheet (290566), with the version 0x20 additions of the ICH family (EOI register; Intel 631xESB
//! and ICH5 data sheets, "I/O APIC registers"). Interrupts leave as messages for the local APICs
//! ([`partition::Partition::signal_msi`]).

use crate::device::{Device, DeviceError, MmioIo, Request, SavedState, to_u64};
use crate::line::{Combiner, LineSink};
use crate::lock;
use partition::Msi;
use serde::{Deserialize, Serialize};
use std::ops::Range;
use std::sync::{Arc, Mutex};

/// Inputs.
pub const PINS: usize = 24;
/// Where a PC has it.
pub const DEFAULT_BASE: u64 = 0xfec0_0000;
/// Bytes of its register window.
pub const SIZE: u64 = 0x1000;
const VERSION: u32 = 1;

mod reg {
    pub const INDEX: u64 = 0x00;
    pub const WINDOW: u64 = 0x10;
    pub const EOI: u64 = 0x40;
    pub const ID: u8 = 0;
    pub const VERSION: u8 = 1;
    pub const ARBITRATION: u8 = 2;
    pub const REDIRECTION: u8 = 0x10;
}

/// Version 0x20 with 24 entries.
const VERSION_VALUE: u32 = 0x20 | (PINS as u32 - 1) << 16;

/// Bits of a redirection table entry (82093AA, section 3.2.4).
mod entry {
    pub const VECTOR: u64 = 0xff;
    pub const DELIVERY_MODE_SHIFT: u32 = 8;
    pub const LOGICAL: u64 = 1 << 11;
    pub const DELIVERY_STATUS: u64 = 1 << 12;
    pub const ACTIVE_LOW: u64 = 1 << 13;
    pub const REMOTE_IRR: u64 = 1 << 14;
    pub const LEVEL: u64 = 1 << 15;
    pub const MASKED: u64 = 1 << 16;
    pub const DESTINATION_SHIFT: u32 = 56;
    pub const READ_ONLY: u64 = DELIVERY_STATUS | REMOTE_IRR;
    pub const WRITABLE: u64 = 0xff << DESTINATION_SHIFT | 0x1_ffff & !READ_ONLY;
    pub const RESET: u64 = MASKED;
}

/// Delivery modes whose interrupts can be level-triggered and are ended by an EOI (fixed, lowest priority).
fn has_eoi(entry: u64) -> bool {
    entry & entry::LEVEL != 0 && (entry >> entry::DELIVERY_MODE_SHIFT) & 7 <= 1
}

fn message(entry: u64) -> Msi {
    let destination = entry >> entry::DESTINATION_SHIFT;
    let logical = u64::from(entry & entry::LOGICAL != 0);
    // Redirection hint for lowest priority, as an MSI of that mode has it (SDM volume 3, section 10.11.1).
    let lowest = u64::from((entry >> entry::DELIVERY_MODE_SHIFT) & 7 == 1);
    let level = (entry & entry::LEVEL) as u32;
    Msi {
        address: 0xfee0_0000 | destination << 12 | lowest << 3 | logical << 2,
        // Vector and delivery mode have the same place in both; level-triggered messages assert.
        data: (entry & 0x7ff) as u32 | level | level >> 1,
    }
}

/// The engine's side of the I/O APIC.
pub trait MessageSink: Send + Sync {
    /// Sends an interrupt message.
    fn signal_msi(&self, msi: Msi);
    /// Tells the level-triggered pins with their messages.
    fn set_routes(&self, routes: &[Option<Msi>]);
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    index: u8,
    id: u8,
    /// Levels of the inputs, a set bit is asserted whatever the polarity (which is the board's to know).
    lines: u32,
    /// Edge-triggered requests that came while the pin was masked are lost, as on the chip; those that wait for nothing
    /// are sent at once. So there is no request register besides the levels.
    entries: [u64; PINS],
}

impl State {
    fn new(id: u8) -> Self {
        Self { index: 0, id, lines: 0, entries: [entry::RESET; PINS] }
    }

    /// Looks at a pin after a change; `edge` says that it has just risen. Returns the message to send.
    fn evaluate(&mut self, pin: usize, edge: bool) -> Option<Msi> {
        let e = &mut self.entries[pin];
        if *e & entry::MASKED != 0 {
            return None;
        }
        if has_eoi(*e) {
            if self.lines & 1 << pin == 0 || *e & entry::REMOTE_IRR != 0 {
                return None;
            }
            *e |= entry::REMOTE_IRR;
            Some(message(*e))
        } else {
            edge.then(|| message(*e))
        }
    }

    fn set_line(&mut self, pin: usize, high: bool) -> Option<Msi> {
        let rose = high && self.lines & 1 << pin == 0;
        if high {
            self.lines |= 1 << pin;
        } else {
            self.lines &= !(1 << pin);
        }
        self.evaluate(pin, rose)
    }

    fn eoi(&mut self, vector: u8, out: &mut Vec<Msi>) {
        for pin in 0..PINS {
            let e = self.entries[pin];
            if has_eoi(e) && e & entry::REMOTE_IRR != 0 && e & entry::VECTOR == u64::from(vector) {
                self.entries[pin] &= !entry::REMOTE_IRR;
                out.extend(self.evaluate(pin, false));
            }
        }
    }

    fn read(&self) -> u32 {
        match self.index {
            reg::ID | reg::ARBITRATION => u32::from(self.id) << 24,
            reg::VERSION => VERSION_VALUE,
            index => match self.entries.get(usize::from(index.wrapping_sub(reg::REDIRECTION) / 2)) {
                Some(e) if index >= reg::REDIRECTION => (e >> (32 * (index & 1))) as u32,
                _ => 0xffff_ffff,
            },
        }
    }

    /// Writes the register that the index selects; says whether routes may have changed.
    fn write(&mut self, value: u32, out: &mut Vec<Msi>) -> bool {
        if self.index == reg::ID {
            self.id = (value >> 24) as u8 & 0xf;
            return false;
        }
        let pin = usize::from(self.index.wrapping_sub(reg::REDIRECTION) / 2);
        if self.index < reg::REDIRECTION || pin >= PINS {
            return false;
        }
        let old = self.entries[pin];
        let wanted = if self.index & 1 == 0 {
            old & 0xffff_ffff_0000_0000 | u64::from(value)
        } else {
            old & 0xffff_ffff | u64::from(value) << 32
        };
        let mut new = wanted & entry::WRITABLE | old & entry::READ_ONLY;
        // An edge-triggered pin has no remote IRR: software clears a stuck one by switching to edge and back.
        if !has_eoi(new) {
            new &= !entry::REMOTE_IRR;
        }
        self.entries[pin] = new;
        out.extend(self.evaluate(pin, false));
        true
    }

    fn routes(&self) -> [Option<Msi>; PINS] {
        self.entries.map(|e| {
            let live = e & entry::MASKED == 0 || e & entry::REMOTE_IRR != 0;
            (has_eoi(e) && live).then(|| message(e))
        })
    }
}

/// The I/O APIC.
pub struct IoApic {
    base: u64,
    state: Mutex<State>,
    sink: Arc<dyn MessageSink>,
    /// Keeps two route changes from reaching the engine in the wrong order.
    routes: Combiner,
}

impl IoApic {
    /// An I/O APIC with its register window at `base`.
    pub fn new(base: u64, sink: Arc<dyn MessageSink>) -> Arc<Self> {
        Arc::new(Self { base, state: Mutex::new(State::new(0)), sink, routes: Combiner::default() })
    }

    /// An end for a device's line.
    pub fn input(self: &Arc<Self>, pin: u8) -> Arc<dyn LineSink> {
        let ioapic = self.clone();
        Arc::new(move |high: bool| ioapic.set_input(pin, high))
    }

    /// Sets the level of an input.
    pub fn set_input(&self, pin: u8, high: bool) {
        if usize::from(pin) >= PINS {
            return;
        }
        let msi = lock(&self.state).set_line(usize::from(pin), high);
        if let Some(msi) = msi {
            self.sink.signal_msi(msi);
        }
    }

    /// The vector of an input that is not masked.
    pub fn vector_of(&self, pin: u8) -> Option<u8> {
        let state = lock(&self.state);
        let entry = state.entries.get(usize::from(pin))?;
        (entry & entry::MASKED == 0).then_some((entry & entry::VECTOR) as u8)
    }

    /// A local APIC has broadcast the end of a level-triggered interrupt.
    pub fn eoi(&self, vector: u8) {
        let mut out = Vec::new();
        lock(&self.state).eoi(vector, &mut out);
        self.send(out);
    }

    fn send(&self, messages: Vec<Msi>) {
        for msi in messages {
            self.sink.signal_msi(msi);
        }
    }

    fn publish_routes(&self) {
        self.routes.run(|| {
            let routes = lock(&self.state).routes();
            self.sink.set_routes(&routes);
        });
    }
}

impl MmioIo for IoApic {
    fn mmio_ranges(&self) -> Vec<Range<u64>> {
        std::iter::once(self.base..self.base + SIZE).collect()
    }

    fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        let offset = gpa.wrapping_sub(self.base);
        let state = lock(&self.state);
        let value = match offset & !3 {
            reg::INDEX => u32::from(state.index),
            reg::WINDOW => state.read(),
            reg::EOI => 0,
            _ => 0xffff_ffff,
        };
        let bytes = value.to_le_bytes();
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = bytes.get((offset & 3) as usize + i).copied().unwrap_or(0xff);
        }
    }

    fn mmio_write(&self, gpa: u64, data: &[u8]) {
        let value = to_u64(data) as u32;
        let mut out = Vec::new();
        let changed = {
            let mut state = lock(&self.state);
            match gpa.wrapping_sub(self.base) {
                reg::INDEX => {
                    state.index = value as u8;
                    false
                }
                // The data sheet allows dword accesses only.
                reg::WINDOW if data.len() >= 4 => state.write(value, &mut out),
                reg::EOI => {
                    state.eoi(value as u8, &mut out);
                    false
                }
                _ => false,
            }
        };
        // The engine must know of a level-triggered vector before the first interrupt with it.
        if changed {
            self.publish_routes();
        }
        self.send(out);
    }
}

impl Device for IoApic {
    fn name(&self) -> &str {
        "ioapic"
    }

    fn mmio(&self) -> Option<&dyn MmioIo> {
        Some(self)
    }

    fn request(&self, request: Request<'_>) -> Result<(), DeviceError> {
        match request {
            Request::Start | Request::Stop => {}
            Request::Reset => {
                let mut state = lock(&self.state);
                let lines = state.lines;
                *state = State { lines, ..State::new(0) };
                drop(state);
                self.publish_routes();
            }
            Request::Save(place) => *place = Some(SavedState::new(VERSION, &*lock(&self.state))?),
            Request::Restore(saved) => {
                let new: State = saved.get(VERSION)?;
                let allowed = entry::WRITABLE | entry::REMOTE_IRR;
                if new.lines >> PINS != 0 || new.id > 15 || new.entries.iter().any(|e| e & !allowed != 0) {
                    return Err(DeviceError::BadState("I/O APIC register out of range".into()));
                }
                *lock(&self.state) = new;
                self.publish_routes();
            }
        }
        Ok(())
    }
}

/// The polarity bit is kept for the guest to read back; devices drive their lines asserted-high whatever it says.
const _: () = assert!(entry::ACTIVE_LOW & entry::WRITABLE != 0);

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Bus {
        sent: Mutex<Vec<Msi>>,
        routes: Mutex<Vec<Option<Msi>>>,
    }
    impl MessageSink for Bus {
        fn signal_msi(&self, msi: Msi) {
            self.sent.lock().unwrap().push(msi);
        }
        fn set_routes(&self, routes: &[Option<Msi>]) {
            *self.routes.lock().unwrap() = routes.to_vec();
        }
    }
    impl Bus {
        fn take(&self) -> Vec<Msi> {
            std::mem::take(&mut self.sent.lock().unwrap())
        }
    }
    fn made() -> (Arc<Bus>, Arc<IoApic>) {
        let bus = Arc::new(Bus::default());
        (bus.clone(), IoApic::new(DEFAULT_BASE, bus))
    }
    fn write(a: &IoApic, index: u8, value: u32) {
        a.mmio_write(DEFAULT_BASE, &[index]);
        a.mmio_write(DEFAULT_BASE + 0x10, &value.to_le_bytes());
    }
    fn read(a: &IoApic, index: u8) -> u32 {
        a.mmio_write(DEFAULT_BASE, &u32::from(index).to_le_bytes());
        let mut data = [0; 4];
        a.mmio_read(DEFAULT_BASE + 0x10, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn registers() {
        let (_, a) = made();
        assert_eq!(read(&a, 1), 0x0017_0020);
        write(&a, 0, 0xffff_ffff);
        assert_eq!(read(&a, 0), 0x0f00_0000);
        assert_eq!(read(&a, 0x10), 0x1_0000);
        write(&a, 0x3f, 0xffff_ffff);
        write(&a, 0x3e, 0xffff_ffff);
        assert_eq!((read(&a, 0x3e), read(&a, 0x3f)), (0x1_afff, 0xff00_0000));
        assert_eq!(read(&a, 0x40), 0xffff_ffff);
        assert_eq!(read(&a, 0x0f), 0xffff_ffff);
    }

    #[test]
    fn edges() {
        let (bus, a) = made();
        write(&a, 0x14, 0x0931);
        write(&a, 0x15, 0x0300_0000);
        a.set_input(2, true);
        a.set_input(2, true);
        assert_eq!(bus.take(), [Msi { address: 0xfee0_300c, data: 0x131 }], "logical, lowest priority, once an edge");
        a.set_input(2, false);
        write(&a, 0x14, 0x1_0931);
        a.set_input(2, true);
        write(&a, 0x14, 0x0931);
        assert!(bus.take().is_empty(), "an edge on a masked pin is lost");
        assert!(bus.routes.lock().unwrap().iter().all(Option::is_none));
    }

    #[test]
    fn levels() {
        let (bus, a) = made();
        a.set_input(9, true);
        write(&a, 0x23, 0x0100_0000);
        write(&a, 0x22, 0xa045);
        let msi = Msi { address: 0xfee0_1000, data: 0xc045 };
        assert_eq!(bus.take(), [msi], "an asserted level is sent on unmasking");
        assert_eq!(bus.routes.lock().unwrap()[9], Some(msi));
        assert_eq!(read(&a, 0x22), 0xe045, "remote IRR");
        a.set_input(9, false);
        a.set_input(9, true);
        assert!(bus.take().is_empty(), "not again before the EOI");
        a.eoi(0x46);
        assert!(bus.take().is_empty());
        a.eoi(0x45);
        assert_eq!(bus.take(), [msi]);
        a.set_input(9, false);
        a.mmio_write(DEFAULT_BASE + 0x40, &0x45u32.to_le_bytes());
        assert_eq!(read(&a, 0x22), 0xa045);
        assert!(bus.take().is_empty());
        a.set_input(9, true);
        write(&a, 0x22, 0x1_2045);
        assert_eq!(read(&a, 0x22), 0x1_2045, "switching to edge clears remote IRR");
    }

    #[test]
    fn state_round_trip() {
        let (_, a) = made();
        a.set_input(9, true);
        write(&a, 0x22, 0x8045);
        let mut saved = None;
        a.request(Request::Save(&mut saved)).unwrap();
        let (bus, b) = made();
        b.request(Request::Restore(saved.as_ref().unwrap())).unwrap();
        assert_eq!(*lock(&a.state), *lock(&b.state));
        assert!(bus.routes.lock().unwrap()[9].is_some());
        assert!(bus.take().is_empty(), "an interrupt in flight is not sent twice");
        let bad = State { lines: 1 << 30, ..State::new(0) };
        assert!(b.request(Request::Restore(&SavedState::new(1, &bad).unwrap())).is_err());
    }
}
