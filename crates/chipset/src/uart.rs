//! The 16550A serial port.
//!
//! Source: National Semiconductor PC16550D data sheet (TL/C/8652), sections 6 to 8.9. Bytes pass at once whatever the baud rate
//! says, except that the receiver's character time-out is timed with it: drivers rely on that interrupt for the last
//! bytes of a burst. On a PC the interrupt is gated by OUT2.

use crate::device::{Device, DeviceError, PortIo, Request, SavedState, split_read, split_write};
use crate::line::Line;
use crate::lock;
use crate::serial::{SerialBackend, SerialReceiver};
use crate::timer::{Timer, TimerService, TimerTarget};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, Weak};

const VERSION: u32 = 1;
const FIFO: usize = 16;
/// Bytes that the outside has sent and the receiver has no room for yet: they wait on the wire, so to say.
const WIRE: usize = 4096;

mod ier {
    pub const RECEIVED: u8 = 1;
    pub const TRANSMITTER_EMPTY: u8 = 2;
    pub const LINE_STATUS: u8 = 4;
    pub const MODEM_STATUS: u8 = 8;
    pub const ALL: u8 = 15;
}

mod iir {
    pub const NONE: u8 = 1;
    pub const LINE_STATUS: u8 = 6;
    pub const RECEIVED: u8 = 4;
    pub const TIMEOUT: u8 = 12;
    pub const TRANSMITTER_EMPTY: u8 = 2;
    pub const MODEM_STATUS: u8 = 0;
    pub const FIFO_ENABLED: u8 = 0xc0;
}

mod fcr {
    pub const ENABLE: u8 = 1;
    pub const CLEAR_RECEIVER: u8 = 2;
    pub const KEPT: u8 = 0xc9;
}

mod lcr {
    pub const BREAK: u8 = 0x40;
    pub const DLAB: u8 = 0x80;
}

mod mcr {
    pub const DTR: u8 = 1;
    pub const RTS: u8 = 2;
    pub const OUT1: u8 = 4;
    pub const OUT2: u8 = 8;
    pub const LOOPBACK: u8 = 16;
    pub const ALL: u8 = 31;
}

mod lsr {
    pub const DATA_READY: u8 = 1;
    pub const OVERRUN: u8 = 2;
    pub const BREAK: u8 = 16;
    pub const HOLDING_EMPTY: u8 = 32;
    pub const TRANSMITTER_EMPTY: u8 = 64;
    pub const FIFO_ERROR: u8 = 128;
    pub const ERRORS: u8 = 0x1e;
}

mod msr {
    pub const DELTA_CTS: u8 = 1;
    pub const DELTA_DSR: u8 = 2;
    pub const RING_ENDED: u8 = 4;
    pub const DELTA_DCD: u8 = 8;
    pub const CTS: u8 = 16;
    pub const DSR: u8 = 32;
    pub const RI: u8 = 64;
    pub const DCD: u8 = 128;
    pub const DELTAS: u8 = 15;
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    ier: u8,
    fcr: u8,
    lcr: u8,
    mcr: u8,
    /// Error bits that wait to be read; the other bits are computed.
    errors: u8,
    /// CTS, DSR, RI, DCD as the outside drives them, and the deltas.
    msr: u8,
    scratch: u8,
    divisor: u16,
    /// Received bytes with the error bits of each.
    fifo: VecDeque<(u8, u8)>,
    wire: VecDeque<(u8, u8)>,
    /// The transmitter-empty interrupt waits.
    empty_pending: bool,
    /// The character time-out interrupt waits.
    timeout_pending: bool,
    /// Guest TSC at which the time-out comes.
    timeout_at: Option<u64>,
    /// The backend had no room: this byte is still in the transmitter.
    transmitting: Option<u8>,
}

impl State {
    fn new(connected: bool) -> Self {
        Self {
            ier: 0,
            fcr: 0,
            lcr: 0,
            mcr: 0,
            errors: 0,
            msr: if connected { msr::CTS | msr::DSR | msr::DCD } else { 0 },
            scratch: 0,
            // 9600 baud; a reset leaves the divisor undefined.
            divisor: 12,
            fifo: VecDeque::new(),
            wire: VecDeque::new(),
            empty_pending: false,
            timeout_pending: false,
            timeout_at: None,
            transmitting: None,
        }
    }

    fn fifo_enabled(&self) -> bool {
        self.fcr & fcr::ENABLE != 0
    }

    fn capacity(&self) -> usize {
        if self.fifo_enabled() { FIFO } else { 1 }
    }

    fn trigger(&self) -> usize {
        match self.fcr >> 6 {
            _ if !self.fifo_enabled() => 1,
            0 => 1,
            1 => 4,
            2 => 8,
            _ => 14,
        }
    }

    /// Takes what waits on the wire; says whether the receiver has something new.
    fn refill(&mut self) -> bool {
        let mut new = false;
        while self.fifo.len() < self.capacity()
            && let Some(entry) = self.wire.pop_front()
        {
            self.errors |= entry.1;
            self.fifo.push_back(entry);
            new = true;
        }
        new
    }

    fn interrupt(&self) -> u8 {
        let on = |bit: u8| self.ier & bit != 0;
        if on(ier::LINE_STATUS) && self.errors != 0 {
            iir::LINE_STATUS
        } else if on(ier::RECEIVED) && self.fifo.len() >= self.trigger() {
            iir::RECEIVED
        } else if on(ier::RECEIVED) && self.timeout_pending && !self.fifo.is_empty() {
            iir::TIMEOUT
        } else if on(ier::TRANSMITTER_EMPTY) && self.empty_pending {
            iir::TRANSMITTER_EMPTY
        } else if on(ier::MODEM_STATUS) && self.msr & msr::DELTAS != 0 {
            iir::MODEM_STATUS
        } else {
            iir::NONE
        }
    }

    fn line(&self) -> bool {
        self.interrupt() != iir::NONE && self.mcr & (mcr::OUT2 | mcr::LOOPBACK) == mcr::OUT2
    }

    fn line_status(&self) -> u8 {
        let mut value = self.errors;
        if !self.fifo.is_empty() {
            value |= lsr::DATA_READY;
        }
        if self.fifo_enabled() && self.fifo.iter().any(|(_, errors)| *errors != 0) {
            value |= lsr::FIFO_ERROR;
        }
        if self.transmitting.is_none() {
            value |= lsr::HOLDING_EMPTY | lsr::TRANSMITTER_EMPTY;
        }
        value
    }

    /// Changes the modem input lines and notes what has changed.
    fn set_modem(&mut self, lines: u8) {
        let changed = (self.msr ^ lines) & 0xf0;
        let mut deltas = 0;
        if changed & msr::CTS != 0 {
            deltas |= msr::DELTA_CTS;
        }
        if changed & msr::DSR != 0 {
            deltas |= msr::DELTA_DSR;
        }
        if changed & msr::RI != 0 && lines & msr::RI == 0 {
            deltas |= msr::RING_ENDED;
        }
        if changed & msr::DCD != 0 {
            deltas |= msr::DELTA_DCD;
        }
        self.msr = lines & 0xf0 | self.msr & msr::DELTAS | deltas;
    }

    /// The modem inputs in loopback: the outputs, crosswise.
    fn looped_modem(mcr: u8) -> u8 {
        let map = [(mcr::RTS, msr::CTS), (mcr::DTR, msr::DSR), (mcr::OUT1, msr::RI), (mcr::OUT2, msr::DCD)];
        map.iter().filter(|(out, _)| mcr & out != 0).map(|(_, line)| line).sum()
    }
}

/// A serial port.
pub struct Uart {
    name: String,
    base: u16,
    timers: Arc<TimerService>,
    state: Mutex<State>,
    timer: Timer,
    irq: Line,
    backend: Arc<dyn SerialBackend>,
}

impl Uart {
    /// A port named `name` ("com1") at port `base`, whose other end is `backend`.
    pub fn new(
        name: &str,
        base: u16,
        timers: &Arc<TimerService>,
        irq: Line,
        backend: Arc<dyn SerialBackend>,
    ) -> Arc<Self> {
        let uart = Arc::new(Self {
            name: name.into(),
            base,
            timers: timers.clone(),
            state: Mutex::new(State::new(backend.connected())),
            timer: timers.timer(),
            irq,
            backend: backend.clone(),
        });
        let target: Arc<dyn TimerTarget> = uart.clone();
        uart.timer.connect(Arc::downgrade(&target) as Weak<dyn TimerTarget>);
        let receiver: Arc<dyn SerialReceiver> = uart.clone();
        backend.attach(Arc::downgrade(&receiver));
        uart
    }

    fn with<R>(&self, f: impl FnOnce(&mut State) -> R) -> R {
        let result = {
            let mut state = lock(&self.state);
            let result = f(&mut state);
            if state.refill() {
                self.restart_timeout(&mut state);
            }
            self.irq.set(state.line());
            self.timer.set(state.timeout_at);
            result
        };
        self.irq.deliver();
        result
    }

    /// The time-out runs while the FIFO holds less than the trigger level and nobody touches it (data sheet, 8.4).
    fn restart_timeout(&self, state: &mut State) {
        state.timeout_pending = false;
        let waiting = state.fifo_enabled() && !state.fifo.is_empty() && state.fifo.len() < state.trigger();
        state.timeout_at = waiting.then(|| {
            // Four characters of ten bits at 115200 / divisor baud, in 100 ns units.
            let bits_100ns = u64::from(state.divisor.max(1)) * 10_000_000 / 115_200;
            let clock = self.timers.clock();
            clock.tsc_at_100ns(clock.reference_time() + 40 * bits_100ns)
        });
    }

    fn read(&self, s: &mut State, offset: u16) -> u8 {
        match offset {
            0 | 1 if s.lcr & lcr::DLAB != 0 => s.divisor.to_le_bytes()[usize::from(offset)],
            0 => {
                let byte = s.fifo.pop_front().map_or(0, |(byte, _)| byte);
                self.restart_timeout(s);
                byte
            }
            1 => s.ier,
            2 => {
                let value = s.interrupt();
                if value == iir::TRANSMITTER_EMPTY {
                    s.empty_pending = false;
                }
                value | if s.fifo_enabled() { iir::FIFO_ENABLED } else { 0 }
            }
            3 => s.lcr,
            4 => s.mcr,
            5 => {
                let value = s.line_status();
                s.errors = 0;
                value
            }
            6 => {
                let value = s.msr;
                s.msr &= !msr::DELTAS;
                if s.mcr & mcr::LOOPBACK != 0 {
                    return Self::looped(s) | value & msr::DELTAS;
                }
                value
            }
            7 => s.scratch,
            _ => 0xff,
        }
    }

    fn looped(s: &State) -> u8 {
        State::looped_modem(s.mcr)
    }

    fn write(&self, s: &mut State, offset: u16, value: u8) {
        match offset {
            0 if s.lcr & lcr::DLAB != 0 => s.divisor = s.divisor & 0xff00 | u16::from(value),
            1 if s.lcr & lcr::DLAB != 0 => s.divisor = s.divisor & 0xff | u16::from(value) << 8,
            0 => self.transmit(s, value),
            1 => {
                let risen = value & !s.ier;
                s.ier = value & ier::ALL;
                // Enabling the interrupt while the transmitter is empty raises it (data sheet, 8.6).
                if risen & ier::TRANSMITTER_EMPTY != 0 && s.transmitting.is_none() {
                    s.empty_pending = true;
                }
            }
            2 => {
                if (value ^ s.fcr) & fcr::ENABLE != 0 || value & fcr::CLEAR_RECEIVER != 0 {
                    s.fifo.clear();
                    s.timeout_pending = false;
                    s.timeout_at = None;
                }
                s.fcr = if value & fcr::ENABLE != 0 { value & fcr::KEPT } else { 0 };
            }
            3 => {
                if value & !s.lcr & lcr::BREAK != 0 && s.mcr & mcr::LOOPBACK == 0 {
                    self.backend.send_break();
                }
                s.lcr = value;
            }
            4 => {
                let before = s.mcr;
                s.mcr = value & mcr::ALL;
                // In loopback the modem inputs are the outputs; the deltas follow them.
                if (before | s.mcr) & mcr::LOOPBACK != 0 {
                    let outside = s.msr & 0xf0;
                    let seen = |m: u8| if m & mcr::LOOPBACK != 0 { State::looped_modem(m) } else { outside };
                    s.msr = seen(before) | s.msr & msr::DELTAS;
                    s.set_modem(seen(s.mcr));
                    s.msr = outside | s.msr & msr::DELTAS;
                }
            }
            7 => s.scratch = value,
            _ => {}
        }
    }

    fn transmit(&self, s: &mut State, byte: u8) {
        s.empty_pending = false;
        if s.mcr & mcr::LOOPBACK != 0 {
            if s.fifo.len() < s.capacity() {
                s.fifo.push_back((byte, 0));
                self.restart_timeout(s);
            } else {
                s.errors |= lsr::OVERRUN;
            }
            s.empty_pending = true;
        } else if s.transmitting.is_some() {
            // Written although the holding register was full: the byte is lost, as on the chip.
        } else if self.backend.transmit(byte) {
            s.empty_pending = true;
        } else {
            s.transmitting = Some(byte);
        }
    }
}

impl SerialReceiver for Uart {
    fn receive(&self, data: &[u8]) -> usize {
        self.with(|s| {
            if s.mcr & mcr::LOOPBACK != 0 {
                // The input pin is disconnected.
                return data.len();
            }
            let taken = data.len().min(WIRE.saturating_sub(s.wire.len()));
            s.wire.extend(data[..taken].iter().map(|byte| (*byte, 0)));
            taken
        })
    }

    fn receive_break(&self) {
        self.with(|s| {
            if s.mcr & mcr::LOOPBACK == 0 && s.wire.len() < WIRE {
                s.wire.push_back((0, lsr::BREAK));
            }
        });
    }

    fn transmit_ready(&self) {
        self.with(|s| {
            if let Some(byte) = s.transmitting
                && self.backend.transmit(byte)
            {
                s.transmitting = None;
                s.empty_pending = true;
            }
        });
    }

    fn connection(&self, connected: bool) {
        self.with(|s| s.set_modem(if connected { msr::CTS | msr::DSR | msr::DCD } else { 0 }));
    }
}

impl TimerTarget for Uart {
    fn expired(&self) {
        self.with(|s| {
            if s.timeout_at.is_some_and(|at| at <= self.timers.clock().tsc()) {
                s.timeout_at = None;
                s.timeout_pending = true;
            }
        });
    }
}

impl PortIo for Uart {
    fn port_ranges(&self) -> Vec<RangeInclusive<u16>> {
        vec![self.base..=self.base + 7]
    }

    fn port_read(&self, port: u16, data: &mut [u8]) {
        self.with(|s| split_read(port.wrapping_sub(self.base), data, |offset| self.read(s, offset)));
    }

    fn port_write(&self, port: u16, data: &[u8]) {
        self.with(|s| split_write(port.wrapping_sub(self.base), data, |offset, value| self.write(s, offset, value)));
    }
}

impl Device for Uart {
    fn name(&self) -> &str {
        &self.name
    }

    fn ports(&self) -> Option<&dyn PortIo> {
        Some(self)
    }

    fn request(&self, request: Request<'_>) -> Result<(), DeviceError> {
        match request {
            Request::Start | Request::Stop => {}
            Request::Reset => self.with(|s| {
                // What is on the wire stays there, and the other side stays connected.
                let wire = std::mem::take(&mut s.wire);
                *s = State { wire, ..State::new(self.backend.connected()) };
            }),
            Request::Save(place) => *place = Some(SavedState::new(VERSION, &*lock(&self.state))?),
            Request::Restore(saved) => {
                let mut new: State = saved.get(VERSION)?;
                if new.fifo.len() > FIFO || new.wire.len() > WIRE || new.errors & !lsr::ERRORS != 0 {
                    return Err(DeviceError::BadState("serial port register out of range".into()));
                }
                let level = new.line();
                self.irq.prime(level);
                // Who is at the other end now is this process's business.
                new.set_modem(State::new(self.backend.connected()).msr);
                *lock(&self.state) = new;
                self.with(|_| {});
                self.transmit_ready();
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::serial::MemoryBackend;
    use partition::Clock;

    struct Bench {
        clock: Arc<Clock>,
        timers: Arc<TimerService>,
        backend: Arc<MemoryBackend>,
        uart: Arc<Uart>,
    }
    fn bench() -> Bench {
        let clock = Arc::new(Clock::new());
        let timers = TimerService::manual(clock.clone());
        let backend = MemoryBackend::new(64);
        let uart = Uart::new("com1", 0x3f8, &timers, Line::disconnected(), backend.clone());
        Bench { clock, timers, backend, uart }
    }
    impl Bench {
        fn inb(&self, offset: u16) -> u8 {
            let mut data = [0];
            self.uart.port_read(0x3f8 + offset, &mut data);
            data[0]
        }
        fn out(&self, offset: u16, value: u8) {
            self.uart.port_write(0x3f8 + offset, &[value]);
        }
        fn irq(&self) -> bool {
            self.uart.irq.level()
        }
    }

    #[test]
    fn transmits_and_interrupts_when_empty() {
        let b = bench();
        b.out(4, 8);
        b.out(1, 2);
        assert!(b.irq());
        assert_eq!(b.inb(2), 2);
        assert!(!b.irq(), "reading IIR clears it");
        b.out(0, b'x');
        assert!(b.irq());
        assert_eq!(b.backend.take(), b"x");
        b.out(4, 0);
        assert!(!b.irq(), "gated by OUT2");
    }

    #[test]
    fn a_full_backend_holds_the_transmitter() {
        let b = bench();
        for byte in 0..65u8 {
            b.out(0, byte);
        }
        assert_eq!(b.inb(5) & 0x60, 0);
        assert_eq!(b.backend.take().len(), 64);
        b.uart.transmit_ready();
        assert_eq!((b.inb(5) & 0x60, b.backend.take()), (0x60, vec![64]));
    }

    #[test]
    fn fifo_trigger_and_time_out() {
        let b = bench();
        b.out(3, 0x83);
        b.out(0, 1);
        b.out(1, 0);
        assert_eq!((b.inb(0), b.inb(1)), (1, 0));
        b.out(3, 3);
        b.out(2, 0xc1);
        b.out(4, 8);
        b.out(1, 5);
        assert_eq!(b.uart.receive(&[7; 13]), 13);
        assert_eq!((b.irq(), b.inb(5) & 1), (false, 1));
        b.clock.set(b.clock.tsc_at_100ns(3300));
        b.timers.run_due(10);
        assert!(!b.irq());
        b.clock.set(b.clock.tsc_at_100ns(3500));
        b.timers.run_due(10);
        assert_eq!((b.irq(), b.inb(2)), (true, 0xcc));
        b.inb(0);
        assert_eq!(b.inb(2), 0xc1, "reading restarts the time-out");
        b.uart.receive(&[8; 100]);
        assert_eq!(b.inb(2), 0xc4);
        let mut count = 0;
        while b.inb(5) & 1 != 0 {
            b.inb(0);
            count += 1;
        }
        assert_eq!(count, 112, "the wire refills the FIFO");
        assert_eq!(b.uart.receive(&vec![0; 2 * WIRE]), WIRE);
    }

    #[test]
    fn loopback_modem_lines_and_break() {
        let b = bench();
        assert_eq!(b.inb(6), 0xb0);
        b.out(4, 0x1a);
        assert_eq!(b.inb(6) & 0xf0, 0x90, "RTS and OUT2 show as CTS and DCD");
        b.out(0, 0x5a);
        assert_eq!((b.inb(5) & 1, b.inb(0)), (1, 0x5a));
        assert!(b.backend.take().is_empty());
        b.out(4, 8);
        b.inb(6);
        b.out(1, 0xc);
        b.uart.connection(false);
        assert_eq!((b.irq(), b.inb(2)), (true, 0));
        assert_eq!(b.inb(6), 0x0b);
        b.uart.receive_break();
        assert_eq!(b.inb(2), 6);
        assert_eq!(b.inb(5) & 0x11, 0x11);
        assert_eq!((b.inb(0), b.inb(5) & 0x11), (0, 0));
        b.out(7, 0xa5);
        assert_eq!(b.inb(7), 0xa5);
    }

    #[test]
    fn state_round_trip() {
        let b = bench();
        b.out(2, 1);
        b.out(4, 8);
        b.out(1, 1);
        b.uart.receive(&[1; 40]);
        let mut saved = None;
        b.uart.request(Request::Save(&mut saved)).unwrap();
        let saved = saved.unwrap();
        let c = bench();
        c.uart.request(Request::Restore(&saved)).unwrap();
        assert!(c.irq());
        assert_eq!((0..40).map(|_| c.inb(0)).collect::<Vec<_>>(), [1; 40]);
        let mut bad: State = saved.get(VERSION).unwrap();
        bad.fifo = (0..17).map(|_| (0, 0)).collect();
        assert!(c.uart.request(Request::Restore(&SavedState::new(VERSION, &bad).unwrap())).is_err());
    }
}
