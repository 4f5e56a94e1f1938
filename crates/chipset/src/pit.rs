//! The 8254 programmable interval timer and the system control port 0x61.
//!
//! Source: Intel 8254 data sheet (231164), sections "Mode Definitions" and "Counter Read Operations"; port 0x61 is PIIX4's
//! NMI status and control register (290562, section 4.2.6.1). Channel 0 drives IRQ 0, channel 1 nothing, channel 2 the
//! speaker; only channel 2's gate can be changed.
//!
//! A counter is not stepped: its value and its output are computed from the tick at which counting began. One tick is
//! 88/105 µs (a third of the colour burst frequency, 1.193182 MHz).

use crate::backlog::Backlog;
use crate::device::{Device, DeviceError, PortIo, Request, SavedState, split_read, split_write};
use crate::line::Line;
use crate::timer::{Timer, TimerService, TimerTarget};
use crate::{lock, scale};
use partition::Clock;
use serde::{Deserialize, Serialize};
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, Weak};

/// Ticks in [`TICK_SECONDS`] seconds.
const TICKS: u64 = 105_000_000;
const TICK_SECONDS: u64 = 88;
/// Half a period of the memory refresh request that port 0x61 shows: 15 µs.
const REFRESH_TICKS: u64 = 18;
/// Channel 0 interrupts at most this often (50 µs), so that a guest cannot keep a host thread busy with a count of 2.
const MIN_INTERVAL: u64 = 60;
const VERSION: u32 = 1;

fn ticks(clock: &Clock) -> u64 {
    scale(clock.tsc(), TICKS, TICK_SECONDS.saturating_mul(clock.tsc_frequency_hz()))
}

fn tsc_at(clock: &Clock, tick: u64) -> u64 {
    scale(tick, TICK_SECONDS.saturating_mul(clock.tsc_frequency_hz()), TICKS).saturating_add(1)
}

/// How a count is transferred (control word bits 4 and 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Transfer {
    Low,
    High,
    Both,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Channel {
    /// 0 to 5.
    mode: u8,
    bcd: bool,
    transfer: Transfer,
    gate: bool,
    /// Current count, 1 to 65536; what the guest wrote, with 0 as the largest.
    count: u32,
    /// Tick at which the current count was loaded; `None` before that.
    start: Option<u64>,
    /// Elapsed ticks while the gate holds counting (modes 0 and 4).
    held: Option<u64>,
    /// A count that is loaded at the end of the current period (modes 2 and 3): when, and which.
    next: Option<(u64, u32)>,
    /// A new count was written and is not loaded yet (status bit 6).
    null_count: bool,
    /// Low byte of a count whose high byte is still to come.
    write_low: Option<u8>,
    /// The next read of an unlatched count returns the high byte.
    read_high: bool,
    latched_count: Option<u16>,
    latched_status: Option<u8>,
}

impl Channel {
    fn new(gate: bool) -> Self {
        Self {
            mode: 0,
            bcd: false,
            transfer: Transfer::Both,
            gate,
            count: 0x1_0000,
            start: None,
            held: None,
            next: None,
            null_count: true,
            write_low: None,
            read_high: false,
            latched_count: None,
            latched_status: None,
        }
    }

    fn periodic(&self) -> bool {
        matches!(self.mode, 2 | 3)
    }

    /// Started by the gate's rising edge.
    fn triggered(&self) -> bool {
        matches!(self.mode, 1 | 5)
    }

    /// The counter wraps at this value.
    fn modulus(&self) -> u64 {
        if self.bcd { 10_000 } else { 0x1_0000 }
    }

    /// Loads the count that waits for the end of a period, if that has come.
    fn advance(&mut self, now: u64) {
        if let Some((at, count)) = self.next
            && at <= now
        {
            self.start = Some(at);
            self.count = count;
            self.next = None;
            self.null_count = false;
        }
    }

    /// Ticks since the count was loaded; `None` if nothing counts.
    fn elapsed(&self, now: u64) -> Option<u64> {
        self.held.or_else(|| self.start.map(|start| now.saturating_sub(start)))
    }

    fn output(&self, now: u64) -> bool {
        let n = u64::from(self.count);
        let Some(e) = self.elapsed(now) else { return self.mode != 0 };
        match self.mode {
            0 | 1 => e >= n,
            2 => !self.gate || e % n != n - 1,
            3 => !self.gate || e % n < n.div_ceil(2),
            _ => e != n,
        }
    }

    fn counter(&self, now: u64) -> u16 {
        let (n, modulus) = (u64::from(self.count), self.modulus());
        let e = self.elapsed(now).unwrap_or(0);
        let value = match self.mode {
            2 => n - e % n,
            3 => {
                // Counts by two, twice a period; an odd count is loaded less one.
                let (e, half) = (e % n, n.div_ceil(2));
                (n & !1) - 2 * (if e < half { e } else { e - half })
            }
            _ => (n + modulus - e % modulus) % modulus,
        } % modulus;
        if self.bcd { to_bcd(value as u16) } else { value as u16 }
    }

    /// The first tick after `after` at which the output rises.
    fn next_rise(&self, after: u64) -> Option<u64> {
        let (start, n) = (self.start?, u64::from(self.count));
        if self.held.is_some() || (self.periodic() && !self.gate) {
            return None;
        }
        let once = |at: u64| (at > after).then_some(at);
        match self.mode {
            0 | 1 => once(start.saturating_add(n)),
            2 | 3 => {
                let periods = after.saturating_sub(start) / n + 1;
                Some(start.saturating_add(periods.saturating_mul(n)))
            }
            _ => once(start.saturating_add(n + 1)),
        }
    }

    fn control(&mut self, value: u8) {
        let transfer = match (value >> 4) & 3 {
            1 => Transfer::Low,
            2 => Transfer::High,
            _ => Transfer::Both,
        };
        let mode = match (value >> 1) & 7 {
            mode @ 0..=5 => mode,
            mode => mode - 4,
        };
        *self = Self { mode, transfer, bcd: value & 1 != 0, ..Self::new(self.gate) };
        self.count = self.modulus() as u32;
    }

    fn write(&mut self, value: u8, now: u64) {
        let raw = match (self.transfer, self.write_low) {
            (Transfer::Low, _) => u16::from(value),
            (Transfer::High, _) => u16::from(value) << 8,
            (Transfer::Both, None) => {
                self.write_low = Some(value);
                if self.mode == 0 {
                    // The first byte stops counting; the output is low.
                    self.start = None;
                    self.held = None;
                }
                return;
            }
            (Transfer::Both, Some(low)) => u16::from_le_bytes([low, value]),
        };
        self.write_low = None;
        let count = u64::from(if self.bcd { from_bcd(raw) } else { raw });
        let count = if count == 0 { self.modulus() } else { count } as u32;
        self.null_count = true;
        if self.triggered() {
            // Loaded by the next trigger.
            self.next = Some((u64::MAX, count));
        } else if self.periodic() && self.start.is_some() && self.gate {
            let end = self.next_rise(now).unwrap_or(now);
            self.next = Some((end, count));
        } else {
            self.load(count, now);
        }
    }

    fn load(&mut self, count: u32, now: u64) {
        self.count = count;
        self.start = Some(now);
        self.next = None;
        self.null_count = false;
        self.held = (!self.gate && matches!(self.mode, 0 | 4)).then_some(0);
    }

    fn set_gate(&mut self, gate: bool, now: u64) {
        if self.gate == gate {
            return;
        }
        match self.mode {
            0 | 4 if gate => {
                if let Some(held) = self.held.take() {
                    self.start = Some(now.saturating_sub(held));
                }
            }
            0 | 4 => self.held = self.start.map(|start| now.saturating_sub(start)),
            _ if gate => {
                // Modes 1 and 5 are triggered, 2 and 3 start again.
                let waiting = self.next.map(|(_, count)| count);
                if let Some(count) = waiting.or_else(|| self.start.map(|_| self.count)) {
                    self.count = count;
                    self.start = Some(now);
                    self.next = None;
                    self.null_count = false;
                }
            }
            _ => {}
        }
        self.gate = gate;
    }

    fn latch_count(&mut self, now: u64) {
        if self.latched_count.is_none() {
            self.latched_count = Some(self.counter(now));
            self.read_high = false;
        }
    }

    fn latch_status(&mut self, now: u64) {
        if self.latched_status.is_none() {
            let transfer = match self.transfer {
                Transfer::Low => 1,
                Transfer::High => 2,
                Transfer::Both => 3,
            };
            self.latched_status = Some(
                u8::from(self.output(now)) << 7
                    | u8::from(self.null_count) << 6
                    | transfer << 4
                    | self.mode << 1
                    | u8::from(self.bcd),
            );
        }
    }

    fn read(&mut self, now: u64) -> u8 {
        if let Some(status) = self.latched_status.take() {
            return status;
        }
        let [low, high] = self.latched_count.unwrap_or_else(|| self.counter(now)).to_le_bytes();
        let (byte, done) = match self.transfer {
            Transfer::Low => (low, true),
            Transfer::High => (high, true),
            Transfer::Both => {
                self.read_high = !self.read_high;
                (if self.read_high { low } else { high }, !self.read_high)
            }
        };
        if done {
            self.latched_count = None;
        }
        byte
    }

    fn valid(&self) -> bool {
        let count = |count: u32| count >= 1 && u64::from(count) <= self.modulus();
        self.mode <= 5 && count(self.count) && self.next.is_none_or(|(_, next)| count(next))
    }
}

fn to_bcd(value: u16) -> u16 {
    (0..4).fold(0, |bcd, digit| bcd | (value / 10u16.pow(digit) % 10) << (4 * digit))
}

fn from_bcd(bcd: u16) -> u16 {
    // A digit above 9 is undefined on the chip; here it counts with its value, within the range.
    (0..4).fold(0u32, |value, digit| value + u32::from(bcd >> (4 * digit) & 15) * 10u32.pow(digit)).min(9999) as u16
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    channels: [Channel; 3],
    /// Port 0x61 bits 0 to 3 (gate 2, speaker data, two check enables).
    control: u8,
    /// Tick up to which channel 0's output edges have been delivered.
    seen: u64,
}

impl State {
    fn new(now: u64) -> Self {
        Self { channels: [Channel::new(true), Channel::new(true), Channel::new(false)], control: 0, seen: now }
    }
}

/// The timer.
pub struct Pit {
    clock: Arc<Clock>,
    state: Mutex<State>,
    /// Not part of the saved state: what a restored guest has missed is as if it had never been due.
    backlog: Mutex<Backlog>,
    timer: Timer,
    irq: Line,
}

impl Pit {
    /// A timer whose channel 0 drives `irq`.
    pub fn new(timers: &TimerService, irq: Line) -> Arc<Self> {
        let clock = timers.clock().clone();
        let state = Mutex::new(State::new(ticks(&clock)));
        let pit = Arc::new(Self { clock, state, backlog: Mutex::default(), timer: timers.timer(), irq });
        let target: Arc<dyn TimerTarget> = pit.clone();
        pit.timer.connect(Arc::downgrade(&target) as Weak<dyn TimerTarget>);
        pit
    }

    fn with<R>(&self, f: impl FnOnce(&mut State, u64) -> R) -> R {
        let result = {
            let mut state = lock(&self.state);
            let now = ticks(&self.clock);
            self.catch_up(&mut state, now);
            let result = f(&mut state, now);
            self.irq.set(state.channels[0].output(now));
            let next = state.channels[0].next_rise(now).map(|at| at.max(now + MIN_INTERVAL));
            self.timer.set(next.map(|at| tsc_at(&self.clock, at)));
            result
        };
        self.irq.deliver();
        result
    }

    /// The guest has taken an interrupt of this timer. Only called where the engine can tell.
    pub fn interrupt_taken(&self) {
        if lock(&self.backlog).taken() {
            self.with(|_, _| {
                self.irq.set(false);
                self.irq.set(true);
            });
        }
    }

    /// Brings the line and the counters to `now`. Several missed edges are one, because an edge-triggered input has one
    /// latch; the others wait in the backlog.
    fn catch_up(&self, state: &mut State, now: u64) {
        let seen = std::mem::replace(&mut state.seen, now);
        let channel = &state.channels[0];
        if let Some(at) = channel.next_rise(seen).filter(|at| *at <= now) {
            if channel.periodic() {
                lock(&self.backlog).came((now - at) / u64::from(channel.count) + 1);
            }
            self.irq.set(false);
            self.irq.set(true);
        }
        for channel in &mut state.channels {
            channel.advance(now);
        }
    }
}

impl TimerTarget for Pit {
    fn expired(&self) {
        self.with(|_, _| {});
    }
}

impl PortIo for Pit {
    fn port_ranges(&self) -> Vec<RangeInclusive<u16>> {
        vec![0x40..=0x43, 0x61..=0x61]
    }

    fn port_read(&self, port: u16, data: &mut [u8]) {
        self.with(|s, now| {
            split_read(port, data, |port| match port {
                0x40..=0x42 => s.channels[usize::from(port & 3)].read(now),
                0x61 => {
                    let refresh = (now / REFRESH_TICKS) as u8 & 1;
                    s.control | refresh << 4 | u8::from(s.channels[2].output(now)) << 5
                }
                _ => 0xff,
            });
        });
    }

    fn port_write(&self, port: u16, data: &[u8]) {
        self.with(|s, now| {
            split_write(port, data, |port, value| match port {
                0x40..=0x42 => s.channels[usize::from(port & 3)].write(value, now),
                0x43 if value >> 6 == 3 => {
                    for (i, channel) in s.channels.iter_mut().enumerate() {
                        if value & 2 << i != 0 {
                            if value & 0x20 == 0 {
                                channel.latch_count(now);
                            }
                            if value & 0x10 == 0 {
                                channel.latch_status(now);
                            }
                        }
                    }
                }
                0x43 => {
                    let channel = &mut s.channels[usize::from(value >> 6)];
                    if value & 0x30 == 0 {
                        channel.latch_count(now);
                    } else {
                        channel.control(value);
                        if value >> 6 == 0 {
                            *lock(&self.backlog) = Backlog::default();
                        }
                    }
                }
                0x61 => {
                    s.control = value & 0xf;
                    s.channels[2].set_gate(value & 1 != 0, now);
                }
                _ => {}
            });
        });
    }
}

impl Device for Pit {
    fn name(&self) -> &str {
        "pit"
    }

    fn ports(&self) -> Option<&dyn PortIo> {
        Some(self)
    }

    fn request(&self, request: Request<'_>) -> Result<(), DeviceError> {
        match request {
            Request::Start => self.with(|_, _| {}),
            Request::Stop => {}
            Request::Reset => {
                *lock(&self.backlog) = Backlog::default();
                self.with(|s, now| *s = State::new(now));
            }
            Request::Save(place) => *place = Some(SavedState::new(VERSION, &*lock(&self.state))?),
            Request::Restore(saved) => {
                let new: State = saved.get(VERSION)?;
                if new.control > 15 || !new.channels.iter().all(Channel::valid) {
                    return Err(DeviceError::BadState("PIT register out of range".into()));
                }
                let level = new.channels[0].output(new.seen);
                *lock(&self.state) = new;
                *lock(&self.backlog) = Backlog::default();
                self.irq.prime(level);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    struct Bench {
        clock: Arc<Clock>,
        timers: Arc<TimerService>,
        pit: Arc<Pit>,
        rises: Arc<AtomicU32>,
    }
    fn bench() -> Bench {
        let clock = Arc::new(Clock::new());
        let timers = TimerService::manual(clock.clone());
        let rises = Arc::new(AtomicU32::new(0));
        let counter = rises.clone();
        let irq = Line::new(vec![Arc::new(move |high: bool| {
            counter.fetch_add(u32::from(high), Ordering::SeqCst);
        })]);
        let pit = Pit::new(&timers, irq);
        Bench { clock, timers, pit, rises }
    }
    impl Bench {
        fn to(&self, tick: u64) {
            self.clock.set(tsc_at(&self.clock, tick));
            self.timers.run_due(100);
        }
        fn out(&self, port: u16, value: u8) {
            self.pit.port_write(port, &[value]);
        }
        fn inb(&self, port: u16) -> u8 {
            let mut data = [0];
            self.pit.port_read(port, &mut data);
            data[0]
        }
        fn count(&self, channel: u8) -> u16 {
            self.out(0x43, channel << 6);
            let port = 0x40 + u16::from(channel);
            u16::from_le_bytes([self.inb(port), self.inb(port)])
        }
        fn rises(&self) -> u32 {
            self.rises.swap(0, Ordering::SeqCst)
        }
    }

    #[test]
    fn missed_periods_follow_where_somebody_says_that_interrupts_are_taken() {
        let b = bench();
        for (port, value) in [(0x43, 0x34), (0x40, 0xe8), (0x40, 0x03)] {
            b.out(port, value);
        }
        b.to(1000);
        b.pit.interrupt_taken();
        b.rises();
        b.to(4500);
        assert_eq!(b.rises(), 1);
        let follow = (0..4).map(|_| {
            b.pit.interrupt_taken();
            b.rises()
        });
        assert_eq!(follow.collect::<Vec<_>>(), [1, 1, 0, 0]);
    }

    #[test]
    fn rate_generator_interrupts_each_period() {
        let b = bench();
        b.out(0x43, 0x34);
        b.rises();
        b.out(0x40, 0xe8);
        b.out(0x40, 0x03);
        assert_eq!(b.count(0), 1000);
        b.to(400);
        assert_eq!(b.count(0), 600);
        b.to(999);
        assert_eq!(b.rises(), 0);
        b.to(1000);
        assert_eq!(b.rises(), 1);
        for period in 2..10 {
            b.to(period * 1000);
        }
        assert_eq!(b.rises(), 8);
        b.to(50_500);
        assert_eq!(b.rises(), 1, "missed edges are one");
        // A new count begins with the next period.
        b.out(0x40, 0xd0);
        b.out(0x40, 0x07);
        assert_eq!(b.count(0), 500);
        b.to(51_000);
        assert_eq!((b.count(0), b.rises()), (2000, 1));
        b.to(52_999);
        assert_eq!(b.rises(), 0);
        b.to(53_000);
        assert_eq!(b.rises(), 1);
    }

    #[test]
    fn one_shot_on_channel_two_with_gate() {
        let b = bench();
        b.out(0x61, 0);
        b.out(0x43, 0xb0);
        b.out(0x42, 100);
        b.out(0x42, 0);
        b.to(500);
        assert_eq!((b.inb(0x61) & 0x20, b.count(2)), (0, 100), "held by the gate");
        b.out(0x61, 1);
        b.to(599);
        assert_eq!(b.inb(0x61) & 0x20, 0);
        b.to(600);
        assert_eq!(b.inb(0x61) & 0x21, 0x21);
        b.to(601);
        assert_eq!(b.count(2), 0xffff, "the counter goes on");
        // Mode 1: the gate triggers.
        b.out(0x61, 0);
        b.out(0x43, 0x92);
        b.out(0x42, 50);
        assert_eq!(b.inb(0x61) & 0x20, 0x20);
        b.out(0x61, 1);
        assert_eq!(b.inb(0x61) & 0x20, 0);
        b.to(651);
        assert_eq!(b.inb(0x61) & 0x20, 0x20);
    }

    #[test]
    fn square_wave_and_strobe() {
        let b = bench();
        b.out(0x61, 1);
        b.out(0x43, 0xb6);
        b.out(0x42, 5);
        b.out(0x42, 0);
        let wave: Vec<u8> = (0..10)
            .map(|t| {
                b.to(t);
                b.inb(0x61) >> 5 & 1
            })
            .collect();
        assert_eq!(wave, [1, 1, 1, 0, 0, 1, 1, 1, 0, 0]);
        b.to(100);
        b.out(0x43, 0x98);
        b.out(0x42, 3);
        let wave: Vec<u8> = (100..106)
            .map(|t| {
                b.to(t);
                b.inb(0x61) >> 5 & 1
            })
            .collect();
        assert_eq!(wave, [1, 1, 1, 0, 1, 1]);
    }

    #[test]
    fn read_back_and_bcd() {
        let b = bench();
        b.out(0x43, 0x35);
        b.out(0x43, 0xe2);
        assert_eq!(b.inb(0x40), 0xf5, "status: output high, null count, both bytes, mode 2, BCD");
        b.out(0x40, 0x00);
        b.out(0x40, 0x10);
        b.to(1);
        b.out(0x43, 0xc2);
        b.to(500);
        assert_eq!(b.inb(0x40), 0xb5);
        assert_eq!([b.inb(0x40), b.inb(0x40)], [0x99, 0x09], "latched before");
        assert_eq!(b.count(0), 0x0500);
        // Single-byte transfers.
        b.out(0x43, 0x14);
        b.out(0x40, 77);
        assert_eq!(b.inb(0x40), 77);
        b.out(0x43, 0x24);
        b.out(0x40, 1);
        assert_eq!(b.inb(0x40), 1);
    }

    #[test]
    fn fast_counts_do_not_flood() {
        let b = bench();
        b.out(0x43, 0x14);
        b.out(0x40, 2);
        let first = b.timers.next_deadline().unwrap();
        assert!(first >= tsc_at(&b.clock, MIN_INTERVAL));
    }

    #[test]
    fn goes_on_after_restore() {
        let b = bench();
        b.out(0x43, 0x34);
        b.out(0x40, 0xe8);
        b.out(0x40, 0x03);
        b.to(2500);
        let mut saved = None;
        b.pit.request(Request::Stop).unwrap();
        b.pit.request(Request::Save(&mut saved)).unwrap();
        let saved = saved.unwrap();
        let c = bench();
        c.clock.set(b.clock.tsc());
        c.pit.request(Request::Restore(&saved)).unwrap();
        c.pit.request(Request::Start).unwrap();
        assert_eq!((c.count(0), c.rises()), (500, 0));
        c.to(3000);
        assert_eq!(c.rises(), 1);
        let mut bad: State = saved.get(VERSION).unwrap();
        bad.channels[1].count = 0;
        assert!(c.pit.request(Request::Restore(&SavedState::new(VERSION, &bad).unwrap())).is_err());
    }
}
