//! The real-time clock and its CMOS memory (MC146818).
//!
//! Source: Motorola MC146818 data sheet (ADI-1031), "Address map" and "Registers A-D"; the century byte (0x32) and the memory
//! size bytes follow the PC's CMOS map (PIIX4 290562, section 4.2.5, and common BIOS practice).
//!
//! While the partition runs, the clock counts along the partition's [`Clock`], so it agrees with the guest's other
//! timers. Whenever the partition starts (first start, after a pause, after a restore) it is set to the host's time
//! plus whatever offset the guest has set: like a clock on a battery, it has counted on meanwhile.

use crate::device::{Device, DeviceError, PortIo, Request, SavedState, split_read, split_write};
use crate::line::Line;
use crate::lock;
use crate::timer::{Timer, TimerService, TimerTarget};
use partition::Clock;
use serde::{Deserialize, Serialize};
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, Weak};
use std::time::{SystemTime, UNIX_EPOCH};

const VERSION: u32 = 1;
const SECOND: i64 = 1_000_000_000;
/// Update in progress is set this long before the second changes (data sheet, table 6: 244 µs).
const UPDATE_WARNING: i64 = 244_000;
/// Alarms are looked for in at most this many past seconds.
const CATCH_UP_SECONDS: i64 = 86_400;

/// CMOS addresses.
mod at {
    pub const SECONDS: u8 = 0;
    pub const SECONDS_ALARM: u8 = 1;
    pub const MINUTES: u8 = 2;
    pub const MINUTES_ALARM: u8 = 3;
    pub const HOURS: u8 = 4;
    pub const HOURS_ALARM: u8 = 5;
    pub const WEEKDAY: u8 = 6;
    pub const DAY: u8 = 7;
    pub const MONTH: u8 = 8;
    pub const YEAR: u8 = 9;
    pub const A: u8 = 10;
    pub const B: u8 = 11;
    pub const C: u8 = 12;
    pub const D: u8 = 13;
    pub const CENTURY: u8 = 0x32;
}

mod a {
    pub const UPDATE_IN_PROGRESS: u8 = 0x80;
    pub const DIVIDER: u8 = 0x70;
    pub const RATE: u8 = 0x0f;
    /// 32.768 kHz, 1024 Hz: what a PC's firmware sets.
    pub const RESET: u8 = 0x26;
}

mod b {
    pub const SET: u8 = 0x80;
    pub const PERIODIC: u8 = 0x40;
    pub const ALARM: u8 = 0x20;
    pub const UPDATE: u8 = 0x10;
    pub const SQUARE_WAVE: u8 = 0x08;
    pub const BINARY: u8 = 0x04;
    pub const HOURS_24: u8 = 0x02;
}

mod c {
    pub const IRQ: u8 = 0x80;
    pub const PERIODIC: u8 = 0x40;
    pub const ALARM: u8 = 0x20;
    pub const UPDATE: u8 = 0x10;
}

/// Date and time as the clock counts them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Calendar {
    year: i64,
    month: u8,
    day: u8,
    /// 1 is Sunday.
    weekday: u8,
    hour: u8,
    minute: u8,
    second: u8,
}

/// Days from 1970-01-01 to the first of a month of the Gregorian calendar.
fn days_before(year: i64, month: u8) -> i64 {
    // Counted in years that begin in March, so that the leap day is the last.
    let shifted = if month <= 2 { year - 1 } else { year };
    let month = (i64::from(month) + 9) % 12;
    let days = 365 * shifted + shifted.div_euclid(4) - shifted.div_euclid(100) + shifted.div_euclid(400);
    // 719468 days lie between 0000-03-01 and 1970-01-01.
    days + (153 * month + 2) / 5 - 719_468
}

fn calendar(unix_seconds: i64) -> Calendar {
    let (days, second) = (unix_seconds.div_euclid(86_400), unix_seconds.rem_euclid(86_400));
    let mut year = 1970 + days.div_euclid(366);
    while days_before(year + 1, 1) <= days {
        year += 1;
    }
    let month = (1..=12).rev().find(|m| days_before(year, *m) <= days).unwrap_or(1);
    Calendar {
        year,
        month,
        day: (days - days_before(year, month) + 1) as u8,
        // 1970-01-01 was a Thursday.
        weekday: ((days + 4).rem_euclid(7) + 1) as u8,
        hour: (second / 3600) as u8,
        minute: (second / 60 % 60) as u8,
        second: (second % 60) as u8,
    }
}

fn unix_seconds(c: &Calendar) -> i64 {
    let days = days_before(c.year, c.month.clamp(1, 12)) + i64::from(c.day.clamp(1, 31)) - 1;
    days * 86_400 + i64::from(c.hour) * 3600 + i64::from(c.minute) * 60 + i64::from(c.second)
}

/// Host time in nanoseconds since 1970.
fn host_time() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX / 2)
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    index: u8,
    extended_index: u8,
    /// 128 bytes and 128 more at ports 0x72/0x73. The clock's own bytes are here only while SET stops the clock; the
    /// alarm bytes always are.
    ram: Vec<u8>,
    control_a: u8,
    control_b: u8,
    flags: u8,
    /// Guest time minus host time, ns: what the guest has set the clock to.
    offset: i64,
    /// Guest time minus the partition clock's ns.
    base: i64,
    /// Guest time up to which flags have been raised.
    seen: i64,
}

impl State {
    fn new(ram: Vec<u8>, now_host: i64, clock_ns: i64) -> Self {
        let base = now_host.saturating_sub(clock_ns);
        Self {
            index: 0,
            extended_index: 0,
            ram,
            control_a: a::RESET,
            control_b: b::HOURS_24,
            flags: 0,
            offset: 0,
            base,
            seen: now_host,
        }
    }

    /// The clock counts: neither stopped by SET nor held in reset by the divider.
    fn counting(&self) -> bool {
        self.control_b & b::SET == 0 && self.control_a & a::DIVIDER == 0x20
    }

    fn encode(&self, value: u8) -> u8 {
        if self.control_b & b::BINARY != 0 { value } else { ((value / 10) << 4) | (value % 10) }
    }

    fn decode(&self, raw: u8) -> u8 {
        if self.control_b & b::BINARY != 0 { raw } else { (raw >> 4) * 10 + (raw & 15) }
    }

    fn encode_hour(&self, hour: u8) -> u8 {
        if self.control_b & b::HOURS_24 != 0 {
            return self.encode(hour);
        }
        let twelve = if hour % 12 == 0 { 12 } else { hour % 12 };
        self.encode(twelve) | if hour >= 12 { 0x80 } else { 0 }
    }

    fn decode_hour(&self, raw: u8) -> u8 {
        if self.control_b & b::HOURS_24 != 0 {
            return self.decode(raw);
        }
        self.decode(raw & 0x7f) % 12 + if raw & 0x80 != 0 { 12 } else { 0 }
    }

    /// The clock's bytes for a time.
    fn show(&self, time: i64) -> [(u8, u8); 8] {
        let t = calendar(time.div_euclid(SECOND));
        [
            (at::SECONDS, self.encode(t.second)),
            (at::MINUTES, self.encode(t.minute)),
            (at::HOURS, self.encode_hour(t.hour)),
            (at::WEEKDAY, self.encode(t.weekday)),
            (at::DAY, self.encode(t.day)),
            (at::MONTH, self.encode(t.month)),
            (at::YEAR, self.encode(t.year.rem_euclid(100) as u8)),
            (at::CENTURY, self.encode(t.year.div_euclid(100).clamp(0, 99) as u8)),
        ]
    }

    fn byte(&self, index: u8) -> u8 {
        self.ram.get(usize::from(index)).copied().unwrap_or(0xff)
    }

    /// The time that the clock's bytes in RAM say.
    fn shown(&self) -> i64 {
        let value = |index| self.decode(self.byte(index));
        unix_seconds(&Calendar {
            // The difference of any two times that can be set must fit into 64 bits of nanoseconds, 292 years.
            year: (i64::from(value(at::CENTURY)) * 100 + i64::from(value(at::YEAR) % 100)).clamp(1950, 2200),
            month: value(at::MONTH),
            day: value(at::DAY),
            weekday: 1,
            hour: self.decode_hour(self.byte(at::HOURS)).min(23),
            minute: value(at::MINUTES).min(59),
            second: value(at::SECONDS).min(59),
        })
    }

    fn alarm_matches(&self, second: i64) -> bool {
        let of_day = second.rem_euclid(86_400);
        let (h, m, s) = ((of_day / 3600) as u8, (of_day / 60 % 60) as u8, (of_day % 60) as u8);
        // A byte with the two highest bits set matches always.
        let field = |index: u8, value: u8| self.byte(index) & 0xc0 == 0xc0 || self.byte(index) == value;
        field(at::SECONDS_ALARM, self.encode(s))
            && field(at::MINUTES_ALARM, self.encode(m))
            && field(at::HOURS_ALARM, self.encode_hour(h))
    }

    /// Period of the periodic interrupt in units of 1/32768 s; `None` if it is off.
    fn period(&self) -> Option<i64> {
        match self.control_a & a::RATE {
            0 => None,
            // The two fastest rates of the 32 kHz time base are those of rates 8 and 9.
            rate @ 1..=2 => Some(1 << (rate + 6)),
            rate => Some(1 << (rate - 1)),
        }
    }

    fn raise(&mut self, now: i64) {
        let seen = std::mem::replace(&mut self.seen, now);
        if !self.counting() || now <= seen {
            return;
        }
        let (from, to) = (seen.div_euclid(SECOND), now.div_euclid(SECOND));
        if to > from {
            self.flags |= c::UPDATE;
            let first = (from + 1).max(to - CATCH_UP_SECONDS + 1);
            if (first..=to).any(|second| self.alarm_matches(second)) {
                self.flags |= c::ALARM;
            }
        }
        if let Some(period) = self.period()
            && periods(seen, period) != periods(now, period)
        {
            self.flags |= c::PERIODIC;
        }
    }

    fn interrupting(&self) -> bool {
        // Flags and enables have the same bits.
        self.flags & self.control_b & (b::PERIODIC | b::ALARM | b::UPDATE) != 0
    }

    /// Guest time of the next event that may interrupt.
    fn next_event(&self, now: i64) -> Option<i64> {
        if !self.counting() {
            return None;
        }
        let second =
            (self.control_b & (b::UPDATE | b::ALARM) != 0).then(|| (now.div_euclid(SECOND) + 1).saturating_mul(SECOND));
        let period = match self.period() {
            Some(period) if self.control_b & b::PERIODIC != 0 && self.flags & c::PERIODIC == 0 => {
                let next = i128::from(periods(now, period) + 1) * i128::from(period) * i128::from(SECOND);
                Some((next / 32_768) as i64 + 1)
            }
            _ => None,
        };
        second.into_iter().chain(period).min()
    }

    fn read(&self, index: u8, now: i64) -> u8 {
        let clock_byte = matches!(index, 0..=9 | at::CENTURY) && !matches!(index, 1 | 3 | 5);
        match index {
            at::A => {
                let warning = now.rem_euclid(SECOND) >= SECOND - UPDATE_WARNING;
                self.control_a | if warning && self.counting() { a::UPDATE_IN_PROGRESS } else { 0 }
            }
            at::B => self.control_b,
            at::C => self.flags | if self.interrupting() { c::IRQ } else { 0 },
            // Valid RAM and time.
            at::D => 0x80,
            _ if clock_byte && self.counting() => {
                self.show(now).iter().find(|(i, _)| *i == index).map_or(0xff, |(_, v)| *v)
            }
            _ => self.byte(index),
        }
    }

    fn write(&mut self, index: u8, value: u8, now: i64, clock_ns: i64) {
        let was_counting = self.counting();
        match index {
            at::A => self.control_a = value & !a::UPDATE_IN_PROGRESS,
            // SET clears the update interrupt enable (data sheet, "Register B").
            at::B => self.control_b = if value & b::SET != 0 { value & !b::UPDATE } else { value },
            at::C | at::D => {}
            _ => {
                let clock_byte = matches!(index, 0 | 2 | 4 | 6..=9 | at::CENTURY);
                if clock_byte && was_counting {
                    // A byte written while the clock runs takes effect at once.
                    self.freeze(now);
                    self.put(index, value);
                    self.set_time(self.shown() * SECOND + now.rem_euclid(SECOND), now, clock_ns);
                } else {
                    self.put(index, value);
                }
            }
        }
        match (was_counting, self.counting()) {
            (true, false) => self.freeze(now),
            // The divider chain begins at half a second when it is let go (data sheet, "Divider control"); SET alone
            // does not touch it.
            (false, true) => self.set_time(self.shown() * SECOND + now.rem_euclid(SECOND), now, clock_ns),
            _ => {}
        }
    }

    fn put(&mut self, index: u8, value: u8) {
        if let Some(byte) = self.ram.get_mut(usize::from(index)) {
            *byte = value;
        }
    }

    fn freeze(&mut self, now: i64) {
        for (index, value) in self.show(now) {
            self.put(index, value);
        }
    }

    fn set_time(&mut self, time: i64, now: i64, clock_ns: i64) {
        self.offset = self.offset.saturating_add(time.saturating_sub(now));
        self.base = time.saturating_sub(clock_ns);
        self.seen = time;
    }
}

/// Whole periods since 1970.
fn periods(time: i64, period: i64) -> i64 {
    (i128::from(time) * 32_768 / (i128::from(period) * i128::from(SECOND))) as i64
}

/// What the CMOS memory tells firmware about RAM.
#[derive(Clone, Copy, Debug)]
pub struct CmosMemory {
    /// Bytes of RAM from address 0 to the 32-bit hole.
    pub low: u64,
    /// Bytes of RAM above 4 GiB.
    pub high: u64,
}

impl CmosMemory {
    fn contents(self) -> Vec<u8> {
        let mut ram = vec![0; 256];
        let mut put = |at: usize, value: u64, bytes: usize| {
            ram[at..at + bytes].copy_from_slice(&value.to_le_bytes()[..bytes]);
        };
        // KiB of base memory; KiB from 1 MiB, at most 64 MiB (twice); 64 KiB units from 16 MiB; 64 KiB units from 4 GiB.
        put(0x15, 640, 2);
        let extended = (self.low.saturating_sub(1 << 20) >> 10).min(0xffff);
        put(0x17, extended, 2);
        put(0x30, extended, 2);
        put(0x34, (self.low.saturating_sub(16 << 20) >> 16).min(0xffff), 2);
        put(0x5b, (self.high >> 16).min(0xff_ffff), 3);
        ram
    }
}

/// The clock.
pub struct Rtc {
    clock: Arc<Clock>,
    state: Mutex<State>,
    timer: Timer,
    irq: Line,
    /// Tests set the host's time.
    host_time: fn() -> i64,
}

impl Rtc {
    /// A clock that shows the host's time (UTC) and drives `irq`.
    pub fn new(memory: CmosMemory, timers: &TimerService, irq: Line) -> Arc<Self> {
        Self::with_host_time(memory, timers, irq, host_time)
    }

    fn with_host_time(memory: CmosMemory, timers: &TimerService, irq: Line, host_time: fn() -> i64) -> Arc<Self> {
        let clock = timers.clock().clone();
        let state = State::new(memory.contents(), host_time(), clock.nanoseconds() as i64);
        let rtc = Arc::new(Self { clock, state: Mutex::new(state), timer: timers.timer(), irq, host_time });
        let target: Arc<dyn TimerTarget> = rtc.clone();
        rtc.timer.connect(Arc::downgrade(&target) as Weak<dyn TimerTarget>);
        rtc
    }

    /// Calls `f` with the state, guest time and partition time, both in ns.
    fn with<R>(&self, f: impl FnOnce(&mut State, i64, i64) -> R) -> R {
        let result = {
            let mut state = lock(&self.state);
            let clock_ns = i64::try_from(self.clock.nanoseconds()).unwrap_or(i64::MAX);
            let now = state.base.saturating_add(clock_ns);
            state.raise(now);
            let result = f(&mut state, now, clock_ns);
            self.irq.set(state.interrupting());
            let now = state.base.saturating_add(clock_ns);
            let deadline = state.next_event(now).map(|at| {
                let ns = at.saturating_sub(state.base).max(0);
                self.clock.tsc_at_100ns(ns.unsigned_abs().div_ceil(100))
            });
            self.timer.set(deadline);
            result
        };
        self.irq.deliver();
        result
    }
}

impl TimerTarget for Rtc {
    fn expired(&self) {
        self.with(|_, _, _| {});
    }
}

impl PortIo for Rtc {
    fn port_ranges(&self) -> Vec<RangeInclusive<u16>> {
        vec![0x70..=0x73]
    }

    fn port_read(&self, port: u16, data: &mut [u8]) {
        self.with(|s, now, _| {
            split_read(port, data, |port| match port {
                0x71 => {
                    let value = s.read(s.index, now);
                    if s.index == at::C {
                        s.flags = 0;
                    }
                    value
                }
                0x72 => s.extended_index,
                0x73 => s.ram.get(128 + usize::from(s.extended_index & 0x7f)).copied().unwrap_or(0xff),
                // The index cannot be read back.
                _ => 0xff,
            });
        });
    }

    fn port_write(&self, port: u16, data: &[u8]) {
        self.with(|s, now, clock_ns| {
            split_write(port, data, |port, value| match port {
                // Bit 7 masks NMIs, of which this board has none.
                0x70 => s.index = value & 0x7f,
                0x71 => s.write(s.index, value, now, clock_ns),
                0x72 => s.extended_index = value & 0x7f,
                0x73 => {
                    let index = 128 + usize::from(s.extended_index & 0x7f);
                    if let Some(byte) = s.ram.get_mut(index) {
                        *byte = value;
                    }
                }
                _ => {}
            });
        });
    }
}

impl Device for Rtc {
    fn name(&self) -> &str {
        "rtc"
    }

    fn ports(&self) -> Option<&dyn PortIo> {
        Some(self)
    }

    fn request(&self, request: Request<'_>) -> Result<(), DeviceError> {
        match request {
            Request::Start => {
                {
                    let mut s = lock(&self.state);
                    let now = (self.host_time)().saturating_add(s.offset);
                    s.base = now.saturating_sub(i64::try_from(self.clock.nanoseconds()).unwrap_or(i64::MAX));
                }
                self.with(|_, _, _| {});
            }
            Request::Stop => {}
            // RESET clears interrupt enables and flags; time, alarm and memory are on the battery.
            Request::Reset => self.with(|s, _, _| {
                s.control_b &= !(b::PERIODIC | b::ALARM | b::UPDATE | b::SQUARE_WAVE);
                s.flags = 0;
                s.index = 0;
                s.extended_index = 0;
            }),
            Request::Save(place) => *place = Some(SavedState::new(VERSION, &*lock(&self.state))?),
            Request::Restore(saved) => {
                let new: State = saved.get(VERSION)?;
                // Beyond the years that the guest can set (`State::shown`).
                let sane =
                    [new.offset, new.base, new.seen].iter().all(|t| t.unsigned_abs() < 8_000_000_000_000_000_000);
                if new.ram.len() != 256 || new.index > 0x7f || new.extended_index > 0x7f || !sane {
                    return Err(DeviceError::BadState("RTC register out of range".into()));
                }
                let level = new.interrupting();
                *lock(&self.state) = new;
                self.irq.prime(level);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 2024-02-28 23:59:58 UTC, a Wednesday.
    const THEN: i64 = 1_709_164_798 * SECOND;

    fn bench() -> (Arc<Clock>, Arc<TimerService>, Arc<Rtc>) {
        let clock = Arc::new(Clock::new());
        let timers = TimerService::manual(clock.clone());
        let memory = CmosMemory { low: 3 << 30, high: 5 << 30 };
        let rtc = Rtc::with_host_time(memory, &timers, Line::disconnected(), || THEN);
        rtc.request(Request::Start).unwrap();
        (clock, timers, rtc)
    }
    fn read(rtc: &Rtc, index: u8) -> u8 {
        rtc.port_write(0x70, &[index]);
        let mut data = [0];
        rtc.port_read(0x71, &mut data);
        data[0]
    }
    fn write(rtc: &Rtc, index: u8, value: u8) {
        rtc.port_write(0x70, &[index, value]);
    }
    fn to(clock: &Clock, timers: &TimerService, micros: u64) {
        clock.set(clock.tsc_at_100ns(micros * 10));
        timers.run_due(1000);
    }
    fn shown(rtc: &Rtc) -> [u8; 8] {
        [0x32, 9, 8, 7, 6, 4, 2, 0].map(|i| read(rtc, i))
    }

    #[test]
    fn calendar_agrees_with_known_dates() {
        for (unix, y, m, d, w) in [
            (0, 1970, 1, 1, 5),
            (951_782_400, 2000, 2, 29, 3),
            (1_709_164_800, 2024, 2, 29, 5),
            (4_102_444_799, 2099, 12, 31, 5),
            (4_107_542_400, 2100, 3, 1, 2),
        ] {
            let c = calendar(unix);
            assert_eq!((c.year, c.month, c.day, c.weekday), (y, m, d, w), "{unix}");
            assert_eq!(unix_seconds(&c), unix);
        }
        for unix in (0..5_000_000_000i64).step_by(7_654_321) {
            assert_eq!(unix_seconds(&calendar(unix)), unix);
        }
    }

    #[test]
    fn counts_in_every_format() {
        let (clock, timers, rtc) = bench();
        assert_eq!(shown(&rtc), [0x20, 0x24, 0x02, 0x28, 4, 0x23, 0x59, 0x58]);
        write(&rtc, 11, 0x06);
        assert_eq!(shown(&rtc), [20, 24, 2, 28, 4, 23, 59, 58]);
        write(&rtc, 11, 0x00);
        assert_eq!(read(&rtc, 4), 0x91, "11 pm");
        to(&clock, &timers, 2_000_001);
        assert_eq!(read(&rtc, 4), 0x12, "12 am");
        write(&rtc, 11, 0x02);
        assert_eq!(shown(&rtc), [0x20, 0x24, 0x02, 0x29, 5, 0, 0, 0]);
        assert_eq!(read(&rtc, 10), 0x26);
        to(&clock, &timers, 2_999_800);
        assert_eq!(read(&rtc, 10), 0xa6, "update in progress");
    }

    #[test]
    fn set_by_the_guest_and_kept() {
        let (clock, timers, rtc) = bench();
        write(&rtc, 11, 0x82);
        for (index, value) in [(0x32, 0x19), (9, 0x99), (8, 0x12), (7, 0x31), (4, 0x23), (2, 0x59), (0, 0x59)] {
            write(&rtc, index, value);
        }
        to(&clock, &timers, 10_000_000);
        assert_eq!(read(&rtc, 0), 0x59, "stopped");
        write(&rtc, 11, 0x02);
        to(&clock, &timers, 11_000_000);
        assert_eq!(shown(&rtc), [0x20, 0x00, 0x01, 0x01, 7, 0, 0, 0]);
        // The clock of the partition stands still for the host's sake; the offset to host time is what is kept.
        let mut saved = None;
        rtc.request(Request::Save(&mut saved)).unwrap();
        let (_, _, other) = bench();
        other.request(Request::Restore(&saved.unwrap())).unwrap();
        other.request(Request::Start).unwrap();
        // Host time stood at THEN in both; 11 s of partition time have not passed there.
        assert_eq!(shown(&other)[..2], [0x19, 0x99]);
    }

    #[test]
    fn absurd_years_keep_the_state_sound() {
        let (_, _, rtc) = bench();
        for century in [0x00, 0x99, 0x17, 0x99, 0xff, 0x00] {
            write(&rtc, 0x32, century);
            let mut saved = None;
            rtc.request(Request::Save(&mut saved)).unwrap();
            bench().2.request(Request::Restore(&saved.unwrap())).unwrap();
        }
        assert_eq!(read(&rtc, 0x32), 0x19, "the earliest century that it counts in");
    }

    #[test]
    fn update_alarm_and_periodic_interrupts() {
        let (clock, timers, rtc) = bench();
        read(&rtc, 12);
        write(&rtc, 1, 0x00);
        write(&rtc, 3, 0x00);
        write(&rtc, 5, 0xc0);
        write(&rtc, 11, 0x22);
        to(&clock, &timers, 1_500_000);
        assert!(!rtc.irq.level());
        to(&clock, &timers, 2_000_001);
        assert!(rtc.irq.level());
        assert_eq!(read(&rtc, 12), 0xf0, "the periodic flag is set whether or not it interrupts");
        assert!(!rtc.irq.level());
        assert_eq!(read(&rtc, 12), 0);
        write(&rtc, 11, 0x12);
        to(&clock, &timers, 3_000_001);
        assert!(rtc.irq.level());
        assert_eq!(read(&rtc, 12) & 0x90, 0x90);
        // 1024 Hz: one interrupt for each reading of C.
        write(&rtc, 11, 0x42);
        let mut count = 0;
        for ms in 3001..4000 {
            to(&clock, &timers, ms * 1000 + 1);
            if rtc.irq.level() {
                count += 1;
                assert_eq!(read(&rtc, 12) & 0xc0, 0xc0);
            }
        }
        assert!((990..=1000).contains(&count), "{count} interrupts in a second");
        write(&rtc, 11, 0x02);
        assert!(timers.next_deadline().is_none());
    }

    #[test]
    fn memory_sizes() {
        let (_, _, rtc) = bench();
        let word = |at: u8| u16::from_le_bytes([read(&rtc, at), read(&rtc, at + 1)]);
        assert_eq!((word(0x15), word(0x17), word(0x30)), (640, 0xffff, 0xffff));
        assert_eq!(u64::from(word(0x34)) << 16, (3 << 30) - (16 << 20));
        let high = u64::from(word(0x5b)) | u64::from(read(&rtc, 0x5d)) << 16;
        assert_eq!(high << 16, 5 << 30);
        rtc.port_write(0x72, &[0x85]);
        rtc.port_write(0x73, &[7]);
        let mut data = [0];
        rtc.port_read(0x73, &mut data);
        assert_eq!(data, [7]);
        assert_eq!(read(&rtc, 5), 0, "the two banks are apart");
    }
}
