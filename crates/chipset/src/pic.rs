//! The pair of 8259A programmable interrupt controllers.
//!
//! Source: Intel 8259A data sheet (order 231468), sections "Initialization Command Words" and "Operation Command Words";
//! the edge/level control registers are those of the PIIX4 (290562, section 4.2.4). The slave is cascaded on the
//! master's input 2. The pair's INTR output is a [`Line`]; the processor's INTA cycles are [`Pic::acknowledge`].

use crate::device::{Device, DeviceError, PortIo, Request, SavedState, split_read, split_write};
use crate::line::{Line, LineSink};
use crate::lock;
use serde::{Deserialize, Serialize};
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex};

/// The master's input to which the slave is cascaded.
const CASCADE: u8 = 2;
/// Inputs that may be level-triggered (PIIX4: not 0, 1, 2, 8 and 13).
const ELCR_MASK: [u8; 2] = [0xf8, 0xde];
const VERSION: u32 = 1;

/// What the next write to the odd port is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
enum Expect {
    /// OCW1, the mask.
    #[default]
    Mask,
    Icw2,
    Icw3,
    Icw4,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Chip {
    /// Interrupt request register.
    irr: u8,
    /// In-service register.
    isr: u8,
    /// Interrupt mask register.
    imr: u8,
    /// Levels of the inputs.
    lines: u8,
    /// Edge/level control: a set bit is level-triggered.
    elcr: u8,
    /// Vector of input 0 (ICW2).
    base: u8,
    expect: Expect,
    /// ICW1 announced an ICW4.
    icw4_needed: bool,
    /// ICW1 said single: no ICW3 follows.
    single: bool,
    /// Reads of the even port return ISR, not IRR (OCW3).
    read_isr: bool,
    /// The next read is a poll (OCW3).
    poll: bool,
    special_mask: bool,
    auto_eoi: bool,
    rotate_on_auto_eoi: bool,
    special_fully_nested: bool,
    /// The input with the lowest priority, 0 to 7.
    lowest: u8,
}

impl Chip {
    fn new() -> Self {
        Self {
            irr: 0,
            isr: 0,
            imr: 0xff,
            lines: 0,
            elcr: 0,
            base: 0,
            expect: Expect::Mask,
            icw4_needed: false,
            single: false,
            read_isr: false,
            poll: false,
            special_mask: false,
            auto_eoi: false,
            rotate_on_auto_eoi: false,
            special_fully_nested: false,
            lowest: 7,
        }
    }

    /// Inputs from the highest priority to the lowest.
    fn by_priority(&self) -> impl Iterator<Item = u8> + use<> {
        let lowest = self.lowest;
        (1..=8).map(move |i| (lowest + i) & 7)
    }

    /// The input that INT is raised for, if any. `master` because only there the special fully nested mode matters.
    fn pending(&self, master: bool) -> Option<u8> {
        let requests = self.irr & !self.imr;
        let mut in_service = self.isr;
        if self.special_mask {
            in_service &= !self.imr;
        }
        if self.special_fully_nested && master {
            // The slave's own priorities decide between interrupts from the same slave.
            in_service &= !(1 << CASCADE);
        }
        for input in self.by_priority() {
            // In service first: a request does not interrupt its own kind.
            if in_service & 1 << input != 0 {
                return None;
            }
            if requests & 1 << input != 0 {
                return Some(input);
            }
        }
        None
    }

    fn set_line(&mut self, input: u8, high: bool) {
        let bit = 1 << input;
        let was = self.lines & bit != 0;
        if high {
            self.lines |= bit;
            if !was || self.elcr & bit != 0 {
                self.irr |= bit;
            }
        } else {
            self.lines &= !bit;
            if self.elcr & bit != 0 {
                self.irr &= !bit;
            }
        }
    }

    /// INTA or poll: takes the interrupt into service.
    fn take(&mut self, input: u8) {
        let bit = 1 << input;
        if self.elcr & bit == 0 {
            self.irr &= !bit;
        }
        if !self.auto_eoi {
            self.isr |= bit;
        } else if self.rotate_on_auto_eoi {
            self.lowest = input;
        }
    }

    fn end(&mut self, input: Option<u8>, rotate: bool) {
        // The non-specific form ends the highest in service, except those that special mask mode has put aside.
        let visible = if self.special_mask { self.isr & !self.imr } else { self.isr };
        let Some(input) = input.or_else(|| self.by_priority().find(|i| visible & 1 << i != 0)) else { return };
        self.isr &= !(1 << input);
        if rotate {
            self.lowest = input;
        }
    }

    fn write_even(&mut self, value: u8) {
        if value & 0x10 != 0 {
            // ICW1
            let (lines, elcr) = (self.lines, self.elcr);
            *self = Self { lines, elcr, imr: 0, base: self.base, ..Self::new() };
            self.irr = lines & elcr;
            self.single = value & 2 != 0;
            self.icw4_needed = value & 1 != 0;
            self.expect = Expect::Icw2;
        } else if value & 0x08 != 0 {
            // OCW3
            match value & 3 {
                2 => self.read_isr = false,
                3 => self.read_isr = true,
                _ => {}
            }
            if value & 0x40 != 0 {
                self.special_mask = value & 0x20 != 0;
            }
            self.poll = value & 4 != 0;
        } else {
            // OCW2
            let level = value & 7;
            match value >> 5 {
                0b000 => self.rotate_on_auto_eoi = false,
                0b100 => self.rotate_on_auto_eoi = true,
                0b001 => self.end(None, false),
                0b101 => self.end(None, true),
                0b011 => self.end(Some(level), false),
                0b111 => self.end(Some(level), true),
                0b110 => self.lowest = level,
                _ => {}
            }
        }
    }

    fn write_odd(&mut self, value: u8) {
        match self.expect {
            Expect::Mask => self.imr = value,
            Expect::Icw2 => {
                self.base = value & 0xf8;
                self.expect = match (self.single, self.icw4_needed) {
                    (false, _) => Expect::Icw3,
                    (true, true) => Expect::Icw4,
                    (true, false) => Expect::Mask,
                };
            }
            // ICW3 says how the pair is cascaded; the board's wiring does not depend on it.
            Expect::Icw3 => self.expect = if self.icw4_needed { Expect::Icw4 } else { Expect::Mask },
            Expect::Icw4 => {
                self.auto_eoi = value & 2 != 0;
                self.special_fully_nested = value & 0x10 != 0;
                self.expect = Expect::Mask;
            }
        }
    }

    fn read(&mut self, odd: bool, master: bool) -> u8 {
        if std::mem::take(&mut self.poll) {
            return match self.pending(master) {
                Some(input) => {
                    self.take(input);
                    0x80 | input
                }
                None => 0,
            };
        }
        match (odd, self.read_isr) {
            (true, _) => self.imr,
            (false, true) => self.isr,
            (false, false) => self.irr,
        }
    }

    fn valid(&self) -> bool {
        self.lowest < 8 && self.base & 7 == 0
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct State {
    /// Master, slave.
    chips: [Chip; 2],
}

impl State {
    fn new() -> Self {
        Self { chips: [Chip::new(), Chip::new()] }
    }

    /// Carries the slave's output to the master and returns the master's.
    fn settle(&mut self) -> bool {
        let bit = 1 << CASCADE;
        if self.chips[1].pending(false).is_some() {
            self.chips[0].irr |= bit;
        } else {
            self.chips[0].irr &= !bit;
        }
        self.chips[0].pending(true).is_some()
    }
}

/// The pair.
pub struct Pic {
    state: Mutex<State>,
    intr: Line,
}

impl Pic {
    /// A pair whose INTR output is `intr`.
    pub fn new(intr: Line) -> Arc<Self> {
        Arc::new(Self { state: Mutex::new(State::new()), intr })
    }

    fn with<R>(&self, f: impl FnOnce(&mut State) -> R) -> R {
        let result = {
            let mut state = lock(&self.state);
            let result = f(&mut state);
            self.intr.set(state.settle());
            result
        };
        self.intr.deliver();
        result
    }

    /// Sets the level of an input, 0 to 15. Input 2 is the cascade and is ignored.
    pub fn set_input(&self, irq: u8, high: bool) {
        if irq < 16 && irq != CASCADE {
            self.with(|s| s.chips[usize::from(irq / 8)].set_line(irq & 7, high));
        }
    }

    /// An end for a device's line.
    pub fn input(self: &Arc<Self>, irq: u8) -> Arc<dyn LineSink> {
        let pic = self.clone();
        Arc::new(move |high: bool| pic.set_input(irq, high))
    }

    /// The vector of an input of the master that is not masked.
    pub fn vector_of(&self, irq: u8) -> Option<u8> {
        let state = lock(&self.state);
        let chip = &state.chips[0];
        (irq < 8 && chip.imr >> irq & 1 == 0).then_some(chip.base | irq)
    }

    /// The INTA cycles: the vector of the interrupt that the processor takes. `None` if INTR has fallen meanwhile.
    pub fn acknowledge(&self) -> Option<u8> {
        self.with(|s| {
            s.settle();
            let input = s.chips[0].pending(true)?;
            s.chips[0].take(input);
            if input != CASCADE {
                return Some(s.chips[0].base | input);
            }
            // `settle` has just seen the slave's request, so the slave has one.
            let input = s.chips[1].pending(false)?;
            s.chips[1].take(input);
            Some(s.chips[1].base | input)
        })
    }
}

impl PortIo for Pic {
    fn port_ranges(&self) -> Vec<RangeInclusive<u16>> {
        vec![0x20..=0x21, 0xa0..=0xa1, 0x4d0..=0x4d1]
    }

    fn port_read(&self, port: u16, data: &mut [u8]) {
        self.with(|s| {
            split_read(port, data, |port| match port {
                0x20 | 0x21 | 0xa0 | 0xa1 => {
                    let chip = usize::from(port >> 7);
                    s.settle();
                    s.chips[chip].read(port & 1 != 0, chip == 0)
                }
                0x4d0 | 0x4d1 => s.chips[usize::from(port & 1)].elcr,
                _ => 0xff,
            });
        });
    }

    fn port_write(&self, port: u16, data: &[u8]) {
        self.with(|s| {
            split_write(port, data, |port, value| match port {
                0x20 | 0xa0 => s.chips[usize::from(port >> 7)].write_even(value),
                0x21 | 0xa1 => s.chips[usize::from(port >> 7)].write_odd(value),
                0x4d0 | 0x4d1 => {
                    let i = usize::from(port & 1);
                    s.chips[i].elcr = value & ELCR_MASK[i];
                }
                _ => {}
            });
        });
    }
}

impl Device for Pic {
    fn name(&self) -> &str {
        "pic"
    }

    fn ports(&self) -> Option<&dyn PortIo> {
        Some(self)
    }

    fn request(&self, request: Request<'_>) -> Result<(), DeviceError> {
        match request {
            Request::Start | Request::Stop => {}
            Request::Reset => self.with(|s| {
                // The inputs are the devices'; they change them when they are reset themselves.
                let lines = [s.chips[0].lines, s.chips[1].lines];
                *s = State::new();
                s.chips[0].lines = lines[0];
                s.chips[1].lines = lines[1];
            }),
            Request::Save(place) => *place = Some(SavedState::new(VERSION, &*lock(&self.state))?),
            Request::Restore(saved) => {
                let mut new: State = saved.get(VERSION)?;
                if !new.chips.iter().all(Chip::valid) {
                    return Err(DeviceError::BadState("PIC register out of range".into()));
                }
                // The engine has the pin's level from here, not from its own state: it is delivered again.
                self.intr.prime(false);
                let level = new.settle();
                *lock(&self.state) = new;
                self.intr.set(level);
                self.intr.deliver();
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(pic: &Pic, port: u16, value: u8) {
        pic.port_write(port, &[value]);
    }
    fn read(pic: &Pic, port: u16) -> u8 {
        let mut data = [0];
        pic.port_read(port, &mut data);
        data[0]
    }
    /// Initialises as a PC does: vectors 0x30 and 0x38, all inputs open.
    fn pair(icw4: u8) -> Arc<Pic> {
        let pic = Pic::new(Line::disconnected());
        for (base, vector, icw3) in [(0x20, 0x30, 4), (0xa0, 0x38, 2)] {
            for (port, value) in [(base, 0x11), (base + 1, vector), (base + 1, icw3), (base + 1, icw4), (base + 1, 0)] {
                write(&pic, port, value);
            }
        }
        pic
    }

    #[test]
    fn fixed_priorities_nest() {
        let pic = pair(1);
        pic.set_input(4, true);
        assert!(pic.intr.level());
        assert_eq!(pic.acknowledge(), Some(0x34));
        assert!(!pic.intr.level());
        pic.set_input(6, true);
        assert!(!pic.intr.level(), "lower priority waits for the EOI");
        pic.set_input(1, true);
        assert_eq!(pic.acknowledge(), Some(0x31), "higher priority interrupts");
        write(&pic, 0x20, 0x0b);
        assert_eq!(read(&pic, 0x20), 0x12, "ISR");
        write(&pic, 0x20, 0x20);
        assert_eq!(read(&pic, 0x20), 0x10, "non-specific EOI ends the highest");
        write(&pic, 0x20, 0x64);
        assert_eq!(pic.acknowledge(), Some(0x36));
        assert_eq!(pic.acknowledge(), None, "nothing left: the line has fallen");
    }

    #[test]
    fn cascade_and_spurious() {
        let pic = pair(1);
        pic.set_input(12, true);
        assert_eq!(pic.acknowledge(), Some(0x3c));
        write(&pic, 0x20, 0x0b);
        write(&pic, 0xa0, 0x0b);
        assert_eq!((read(&pic, 0x20), read(&pic, 0xa0)), (4, 0x10));
        pic.set_input(8, true);
        assert!(!pic.intr.level(), "the master does not nest the same slave");
        write(&pic, 0xa0, 0x20);
        write(&pic, 0x20, 0x20);
        assert_eq!(pic.acknowledge(), Some(0x38));
    }

    #[test]
    fn special_fully_nested_lets_the_slave_interrupt_itself() {
        let pic = pair(0x11);
        pic.set_input(12, true);
        assert_eq!(pic.acknowledge(), Some(0x3c));
        pic.set_input(8, true);
        assert_eq!(pic.acknowledge(), Some(0x38));
    }

    #[test]
    fn rotation() {
        let pic = pair(1);
        pic.set_input(0, true);
        assert_eq!(pic.acknowledge(), Some(0x30));
        write(&pic, 0x20, 0xa0);
        // Input 0 now has the lowest priority.
        pic.set_input(0, false);
        pic.set_input(0, true);
        pic.set_input(7, true);
        assert_eq!(pic.acknowledge(), Some(0x37));
        write(&pic, 0x20, 0x20);
        assert_eq!(pic.acknowledge(), Some(0x30));
        write(&pic, 0x20, 0xe0);
        write(&pic, 0x20, 0xc3);
        pic.set_input(3, true);
        pic.set_input(4, true);
        assert_eq!(pic.acknowledge(), Some(0x34), "set priority: 3 is lowest");
    }

    #[test]
    fn automatic_end_of_interrupt_with_rotation() {
        let pic = pair(3);
        write(&pic, 0x20, 0x80);
        pic.set_input(0, true);
        pic.set_input(1, true);
        assert_eq!(pic.acknowledge(), Some(0x30));
        pic.set_input(0, false);
        pic.set_input(0, true);
        assert_eq!(pic.acknowledge(), Some(0x31));
        assert_eq!(pic.acknowledge(), Some(0x30));
    }

    #[test]
    fn special_mask_mode() {
        let pic = pair(1);
        pic.set_input(1, true);
        assert_eq!(pic.acknowledge(), Some(0x31));
        write(&pic, 0x21, 2);
        pic.set_input(5, true);
        assert!(!pic.intr.level());
        write(&pic, 0x20, 0x68);
        assert_eq!(pic.acknowledge(), Some(0x35), "the masked one in service no longer inhibits");
        write(&pic, 0x20, 0x20);
        write(&pic, 0x20, 0x0b);
        assert_eq!(read(&pic, 0x20), 2, "non-specific EOI passes over the masked one");
    }

    #[test]
    fn poll_and_level() {
        let pic = pair(1);
        write(&pic, 0x4d0, 0xff);
        assert_eq!(read(&pic, 0x4d0), 0xf8);
        pic.set_input(5, true);
        write(&pic, 0x20, 0x0c);
        assert_eq!(read(&pic, 0x20), 0x85);
        write(&pic, 0x20, 0x20);
        assert_eq!(pic.acknowledge(), Some(0x35), "a level request stays");
        write(&pic, 0x20, 0x20);
        pic.set_input(5, false);
        assert_eq!(pic.acknowledge(), None);
        write(&pic, 0x20, 0x0c);
        assert_eq!(read(&pic, 0x20), 0);
    }

    #[test]
    fn saved_state_is_checked() {
        let pic = pair(1);
        pic.set_input(3, true);
        let mut saved = None;
        pic.request(Request::Save(&mut saved)).unwrap();
        let saved = saved.unwrap();
        let other = Pic::new(Line::disconnected());
        other.request(Request::Restore(&saved)).unwrap();
        assert!(other.intr.level());
        assert_eq!(other.acknowledge(), Some(0x33));
        let mut bad: State = saved.get(VERSION).unwrap();
        bad.chips[0].lowest = 8;
        assert!(other.request(Request::Restore(&SavedState::new(VERSION, &bad).unwrap())).is_err());
        assert!(other.request(Request::Restore(&SavedState { version: 9, ..saved })).is_err());
    }
}
