//! The 8042 keyboard controller of a board with nothing plugged in.
//!
//! Source: PS/2 Hardware Interface Technical Reference, "Keyboard and Auxiliary Device Controller" (IBM, 1990). Both
//! device connectors are empty: a byte sent to a device times out (response 0xFE with the time-out bit), which is what
//! lets a driver's probe end at once. Software uses the controller to reset the machine and to open A20.

use crate::device::{Device, DeviceError, PortIo, PowerSink, Request, SavedState};
use crate::line::Line;
use crate::lock;
use crate::reset::A20Gate;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex};

const VERSION: u32 = 1;
/// Responses that can wait; a guest that reads none of them loses the newer ones.
const QUEUE: usize = 16;

/// Status register, port 0x64.
mod status {
    pub const OUTPUT_FULL: u8 = 1 << 0;
    pub const SYSTEM: u8 = 1 << 2;
    pub const COMMAND: u8 = 1 << 3;
    /// The keyboard lock is open.
    pub const UNLOCKED: u8 = 1 << 4;
    pub const FROM_AUX: u8 = 1 << 5;
    pub const TIMEOUT: u8 = 1 << 6;
}

/// Command byte, RAM location 0.
mod command_byte {
    pub const KEYBOARD_INTERRUPT: u8 = 1 << 0;
    pub const AUX_INTERRUPT: u8 = 1 << 1;
    pub const SYSTEM: u8 = 1 << 2;
    pub const KEYBOARD_DISABLED: u8 = 1 << 4;
    pub const AUX_DISABLED: u8 = 1 << 5;
    pub const TRANSLATE: u8 = 1 << 6;
}

/// A byte that waits in the output buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Response {
    byte: u8,
    aux: bool,
    timeout: bool,
}

impl Response {
    fn keyboard(byte: u8) -> Self {
        Self { byte, aux: false, timeout: false }
    }
}

/// What the next byte at port 0x60 belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Pending {
    /// The keyboard.
    Keyboard,
    Ram(u8),
    OutputPort,
    /// 0xD2 and 0xD3: the byte comes back as if a device had sent it.
    Echo {
        aux: bool,
    },
    Aux,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    ram: [u8; 32],
    output: VecDeque<Response>,
    /// Last byte read, returned again while the buffer is empty.
    last: u8,
    last_was_command: bool,
    pending: Pending,
}

impl State {
    fn new() -> Self {
        let mut ram = [0; 32];
        ram[0] = command_byte::KEYBOARD_DISABLED | command_byte::AUX_DISABLED | command_byte::TRANSLATE;
        Self { ram, output: VecDeque::new(), last: 0, last_was_command: false, pending: Pending::Keyboard }
    }

    fn push(&mut self, response: Response) {
        if self.output.len() < QUEUE {
            self.output.push_back(response);
        }
    }

    fn status(&self) -> u8 {
        let mut value = status::UNLOCKED | self.ram[0] & status::SYSTEM;
        if self.last_was_command {
            value |= status::COMMAND;
        }
        if let Some(front) = self.output.front() {
            value |= status::OUTPUT_FULL;
            value |= if front.aux { status::FROM_AUX } else { 0 };
            value |= if front.timeout { status::TIMEOUT } else { 0 };
        }
        value
    }

    fn interrupts(&self) -> (bool, bool) {
        match self.output.front() {
            Some(r) if r.aux => (false, self.ram[0] & command_byte::AUX_INTERRUPT != 0),
            Some(_) => (self.ram[0] & command_byte::KEYBOARD_INTERRUPT != 0, false),
            None => (false, false),
        }
    }
}

/// The controller.
pub struct I8042 {
    state: Mutex<State>,
    irq1: Line,
    irq12: Line,
    a20: Arc<A20Gate>,
    power: Arc<dyn PowerSink>,
}

impl I8042 {
    /// A controller with its two interrupt lines.
    pub fn new(irq1: Line, irq12: Line, a20: Arc<A20Gate>, power: Arc<dyn PowerSink>) -> Arc<Self> {
        Arc::new(Self { state: Mutex::new(State::new()), irq1, irq12, a20, power })
    }

    fn with<R>(&self, f: impl FnOnce(&mut State) -> R) -> R {
        let result = {
            let mut state = lock(&self.state);
            let result = f(&mut state);
            let (keyboard, aux) = state.interrupts();
            self.irq1.set(keyboard);
            self.irq12.set(aux);
            result
        };
        self.irq1.deliver();
        self.irq12.deliver();
        result
    }

    fn output_port(&self, state: &State) -> u8 {
        let (keyboard, aux) = state.interrupts();
        // Bit 0 is the reset line (active low), bits 6 and 7 are the clock and data lines at rest.
        0xc1 | u8::from(self.a20.is_open()) << 1 | u8::from(keyboard) << 4 | u8::from(aux) << 5
    }

    /// Carries out a command; says whether the machine is to be reset.
    fn command(&self, s: &mut State, command: u8) -> bool {
        s.last_was_command = true;
        s.pending = Pending::Keyboard;
        match command {
            0x20..=0x3f => s.push(Response::keyboard(s.ram[usize::from(command & 31)])),
            0x60..=0x7f => s.pending = Pending::Ram(command & 31),
            0xa7 => s.ram[0] |= command_byte::AUX_DISABLED,
            0xa8 => s.ram[0] &= !command_byte::AUX_DISABLED,
            // Interface tests: no fault on the lines of either connector.
            0xa9 | 0xab => s.push(Response::keyboard(0)),
            0xaa => {
                s.output.clear();
                s.ram[0] |= command_byte::SYSTEM;
                s.push(Response::keyboard(0x55));
            }
            0xad => s.ram[0] |= command_byte::KEYBOARD_DISABLED,
            0xae => s.ram[0] &= !command_byte::KEYBOARD_DISABLED,
            // Input port: keyboard not inhibited.
            0xc0 => s.push(Response::keyboard(0x80)),
            0xd0 => {
                let value = self.output_port(s);
                s.push(Response::keyboard(value));
            }
            0xd1 => s.pending = Pending::OutputPort,
            0xd2 => s.pending = Pending::Echo { aux: false },
            0xd3 => s.pending = Pending::Echo { aux: true },
            0xd4 => s.pending = Pending::Aux,
            // Test inputs: both clock lines low.
            0xe0 => s.push(Response::keyboard(0)),
            // Pulses the output port's low bits that are zero in the command; bit 0 is the reset line.
            0xf0..=0xff => return command & 1 == 0,
            _ => {}
        }
        false
    }

    fn data(&self, s: &mut State, value: u8) -> bool {
        s.last_was_command = false;
        match std::mem::replace(&mut s.pending, Pending::Keyboard) {
            Pending::Keyboard => {
                // Sending to the keyboard enables its interface.
                s.ram[0] &= !command_byte::KEYBOARD_DISABLED;
                s.push(Response { byte: 0xfe, aux: false, timeout: true });
            }
            Pending::Aux => s.push(Response { byte: 0xfe, aux: true, timeout: true }),
            Pending::Ram(index) => s.ram[usize::from(index & 31)] = value,
            Pending::Echo { aux } => s.push(Response { byte: value, aux, timeout: false }),
            Pending::OutputPort => {
                self.a20.set(value & 2 != 0);
                return value & 1 == 0;
            }
        }
        false
    }
}

impl PortIo for I8042 {
    fn port_ranges(&self) -> Vec<RangeInclusive<u16>> {
        vec![0x60..=0x60, 0x64..=0x64]
    }

    fn port_read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        data[0] = self.with(|s| {
            if port == 0x64 {
                return s.status();
            }
            if let Some(response) = s.output.pop_front() {
                s.last = response.byte;
            }
            s.last
        });
    }

    fn port_write(&self, port: u16, data: &[u8]) {
        let reset = self.with(|s| if port == 0x64 { self.command(s, data[0]) } else { self.data(s, data[0]) });
        if reset {
            self.power.reset();
        }
    }
}

impl Device for I8042 {
    fn name(&self) -> &str {
        "i8042"
    }

    fn ports(&self) -> Option<&dyn PortIo> {
        Some(self)
    }

    fn request(&self, request: Request<'_>) -> Result<(), DeviceError> {
        match request {
            Request::Start | Request::Stop => {}
            Request::Reset => self.with(|s| *s = State::new()),
            Request::Save(place) => *place = Some(SavedState::new(VERSION, &*lock(&self.state))?),
            Request::Restore(saved) => {
                let new: State = saved.get(VERSION)?;
                if new.output.len() > QUEUE {
                    return Err(DeviceError::BadState("keyboard controller queue too long".into()));
                }
                let (keyboard, aux) = new.interrupts();
                *lock(&self.state) = new;
                self.irq1.prime(keyboard);
                self.irq12.prime(aux);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[derive(Default)]
    struct Power(AtomicU32);
    impl PowerSink for Power {
        fn power_off(&self) {}
        fn reset(&self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }
    fn made() -> (Arc<Power>, Arc<I8042>) {
        let power = Arc::new(Power::default());
        (power.clone(), I8042::new(Line::disconnected(), Line::disconnected(), A20Gate::new(), power))
    }
    fn inb(k: &I8042, port: u16) -> u8 {
        let mut data = [0];
        k.port_read(port, &mut data);
        data[0]
    }

    #[test]
    fn self_test_and_absent_devices() {
        let (_, k) = made();
        assert_eq!(inb(&k, 0x64), 0x10);
        k.port_write(0x64, &[0xaa]);
        assert_eq!(inb(&k, 0x64), 0x1d);
        assert_eq!(inb(&k, 0x60), 0x55);
        assert_eq!(inb(&k, 0x64) & 1, 0);
        k.port_write(0x64, &[0x60]);
        k.port_write(0x60, &[0x47]);
        k.port_write(0x64, &[0x20]);
        assert!(k.irq1.level());
        assert_eq!(inb(&k, 0x60), 0x47);
        assert!(!k.irq1.level());
        k.port_write(0x60, &[0xf2]);
        assert_eq!(inb(&k, 0x64) & 0x61, 0x41, "time-out from the keyboard");
        assert_eq!(inb(&k, 0x60), 0xfe);
        k.port_write(0x64, &[0xd4]);
        k.port_write(0x60, &[0xf2]);
        assert_eq!(inb(&k, 0x64) & 0x61, 0x61);
        assert!(k.irq12.level());
        assert_eq!(inb(&k, 0x60), 0xfe);
    }

    #[test]
    fn reset_and_a20() {
        let (power, k) = made();
        k.port_write(0x64, &[0xff]);
        assert_eq!(power.0.load(Ordering::SeqCst), 0, "no line is pulsed");
        k.port_write(0x64, &[0xfe]);
        assert_eq!(power.0.load(Ordering::SeqCst), 1);
        k.port_write(0x64, &[0xd1]);
        k.port_write(0x60, &[0xdd]);
        k.port_write(0x64, &[0xd0]);
        assert_eq!(inb(&k, 0x60) & 2, 0);
        k.port_write(0x64, &[0xd1]);
        k.port_write(0x60, &[0xfe]);
        assert_eq!(power.0.load(Ordering::SeqCst), 2);
    }

    #[test]
    fn the_queue_is_bounded() {
        let (_, k) = made();
        for _ in 0..1000 {
            k.port_write(0x60, &[0]);
        }
        assert_eq!(lock(&k.state).output.len(), QUEUE);
        let mut saved = None;
        k.request(Request::Save(&mut saved)).unwrap();
        let saved = saved.unwrap();
        made().1.request(Request::Restore(&saved)).unwrap();
        let mut bad: State = saved.get(VERSION).unwrap();
        bad.output.push_back(Response::keyboard(1));
        assert!(k.request(Request::Restore(&SavedState::new(VERSION, &bad).unwrap())).is_err());
    }
}
