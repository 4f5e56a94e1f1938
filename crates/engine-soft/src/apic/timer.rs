//! The APIC timer (SDM volume 3, section 10.5.4): one-shot, periodic, TSC-deadline.

use super::{Lapic, bit, reg};
use crate::timers::NEVER;
use crate::vp::attention;
use std::sync::atomic::Ordering;
use x86::cpuid::APIC_TIMER_HZ;

/// LVT timer modes (bits 17 and 18).
pub(super) const TIMER_ONE_SHOT: u32 = 0;
pub(super) const TIMER_PERIODIC: u32 = 1;
pub(super) const TIMER_DEADLINE: u32 = 2;

/// The shortest period, in nanoseconds: a guest that asks for less hangs itself, but its VP still looks up.
const MIN_PERIOD_NS: u64 = 20_000;

#[derive(Clone, Copy, Debug)]
pub(super) struct Timer {
    /// When it fires next, in ticks of the partition's clock.
    pub(super) deadline: u64,
    /// Clock ticks between two interrupts; 0 if it is not periodic.
    pub(super) period: u64,
}

impl Lapic {
    pub(super) fn timer_mode(&self) -> u32 {
        self.get(reg::LVT_TIMER) >> 17 & 3
    }

    /// SDM volume 3, figure 10-10.
    fn divisor(&self) -> u64 {
        let code = self.get(reg::DIVIDE);
        let n = code & 3 | code >> 1 & 4;
        if n == 7 { 1 } else { 2 << n }
    }

    fn count_to_clock(&self, count: u64) -> u64 {
        let ticks = u128::from(count) * u128::from(self.divisor()) * u128::from(self.clock.tsc_frequency_hz());
        u64::try_from(ticks / u128::from(APIC_TIMER_HZ)).unwrap_or(u64::MAX)
    }

    fn clock_to_count(&self, ticks: u64) -> u32 {
        let count = u128::from(ticks) * u128::from(APIC_TIMER_HZ)
            / (u128::from(self.clock.tsc_frequency_hz().max(1)) * u128::from(self.divisor()));
        u32::try_from(count).unwrap_or(u32::MAX)
    }

    fn arm(&self, timer: &mut Timer, deadline: u64) {
        timer.deadline = deadline;
        self.timers.set(self.index, deadline);
    }

    pub(super) fn write_initial_count(&self, value: u32) {
        if self.timer_mode() == TIMER_DEADLINE {
            return;
        }
        self.put(reg::INITIAL_COUNT, value);
        self.start_count(value);
    }

    /// Starts counting down from `count`.
    pub(super) fn start_count(&self, count: u32) {
        let mut timer = self.timer();
        if count == 0 {
            timer.period = 0;
            return self.arm(&mut timer, NEVER);
        }
        timer.period = self.period();
        let deadline = self.clock.tsc().saturating_add(self.count_to_clock(u64::from(count)));
        self.arm(&mut timer, deadline);
    }

    fn period(&self) -> u64 {
        if self.timer_mode() != TIMER_PERIODIC {
            return 0;
        }
        let least = u128::from(self.clock.tsc_frequency_hz()) * u128::from(MIN_PERIOD_NS) / 1_000_000_000;
        self.count_to_clock(u64::from(self.get(reg::INITIAL_COUNT))).max(least as u64).max(1)
    }

    pub(super) fn restart_count(&self) {
        if self.timer_mode() != TIMER_DEADLINE && self.timer().deadline != NEVER {
            self.start_count(self.get(reg::INITIAL_COUNT));
        }
    }

    pub(super) fn timer_mode_changed(&self, old: u32, new: u32) {
        let mut timer = self.timer();
        if old == TIMER_DEADLINE || new == TIMER_DEADLINE {
            self.tsc_deadline.store(0, Ordering::SeqCst);
            timer.period = 0;
            self.arm(&mut timer, NEVER);
            self.put(reg::INITIAL_COUNT, 0);
        } else {
            timer.period = self.period();
        }
    }

    pub(super) fn current_count(&self) -> u32 {
        if self.timer_mode() == TIMER_DEADLINE {
            return 0;
        }
        let timer = *self.timer();
        if timer.deadline == NEVER {
            return 0;
        }
        let now = self.clock.tsc();
        let mut deadline = timer.deadline;
        if deadline <= now && timer.period != 0 {
            deadline += timer.period * ((now - deadline) / timer.period + 1);
        }
        self.clock_to_count(deadline.saturating_sub(now))
    }

    /// `IA32_TSC_DEADLINE`.
    pub fn tsc_deadline(&self) -> u64 {
        self.tsc_deadline.load(Ordering::SeqCst)
    }

    /// Writes `IA32_TSC_DEADLINE` (SDM volume 3, section 10.5.4.1): ignored unless the timer is in that mode.
    pub fn set_tsc_deadline(&self, value: u64) {
        if self.timer_mode() != TIMER_DEADLINE {
            return;
        }
        let mut timer = self.timer();
        self.tsc_deadline.store(value, Ordering::SeqCst);
        let deadline = self.deadline_on_clock(value);
        self.arm(&mut timer, deadline);
        if deadline <= self.clock.tsc() {
            self.waker.raise(attention::TIMER);
        }
    }

    /// A VP-TSC deadline in the partition's clock.
    fn deadline_on_clock(&self, value: u64) -> u64 {
        if value == 0 {
            return NEVER;
        }
        let delta = self.tsc_delta.load(Ordering::SeqCst) as i64;
        let at = i128::from(value) - i128::from(delta);
        u64::try_from(at.clamp(0, i128::from(NEVER - 1))).unwrap_or(0)
    }

    /// The VP's TSC minus the partition's clock.
    pub fn tsc_delta(&self) -> u64 {
        self.tsc_delta.load(Ordering::SeqCst)
    }

    /// The guest has written its TSC (or TSC_ADJUST).
    pub fn set_tsc_delta(&self, delta: u64) {
        self.tsc_delta.store(delta, Ordering::SeqCst);
        let value = self.tsc_deadline();
        if value != 0 {
            self.set_tsc_deadline(value);
        }
    }

    /// The VP's own thread looks whether the timer is due. Sets the timer thread's deadline again.
    pub fn check_timer(&self) {
        let mut timer = self.timer();
        let now = self.clock.tsc();
        if timer.deadline > now {
            self.timers.set(self.index, timer.deadline);
            return;
        }
        let next = if timer.period != 0 {
            timer.deadline.saturating_add(timer.period.saturating_mul((now - timer.deadline) / timer.period + 1))
        } else {
            self.tsc_deadline.store(0, Ordering::SeqCst);
            NEVER
        };
        self.arm(&mut timer, next);
        drop(timer);
        let lvt = self.get(reg::LVT_TIMER);
        if lvt & bit::MASKED == 0 {
            self.accept(lvt as u8, false);
        }
    }

    /// When the timer fires next ([`NEVER`]: not armed). A sleeping VP waits for it itself: the timer thread forgets it
    /// until [`Lapic::check_timer`].
    pub fn take_deadline(&self) -> u64 {
        let timer = self.timer();
        self.timers.set(self.index, NEVER);
        timer.deadline
    }
}
