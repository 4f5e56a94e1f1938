//! Synthetic timers (TLFS chapter 12): four a VP, one-shot or periodic, by message or by a direct interrupt.

use crate::defs::{FIRST_VALID_VECTOR, MESSAGE_TIMER_EXPIRED, Message, stimer};
use crate::hv::{Counters, HvPartition, TimerId};
use crate::synic::{Actions, VpSynic};
use partition::{Ticks100ns, VpIndex};
use serde::{Deserialize, Serialize};

/// A periodic timer interrupts at most every 50 µs, however short the period that the guest asks for: a guest must not
/// keep a host thread busy.
const SHORTEST_PERIOD: Ticks100ns = 500;

/// How much a periodic timer that is not lazy may lag behind before the rest is forgotten: one second.
const MOST_LAG: Ticks100ns = 10_000_000;

/// One timer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Timer {
    pub(crate) config: u64,
    pub(crate) count: u64,
    /// When it expires next, in reference time, if it runs.
    next: Option<Ticks100ns>,
    /// The expiration whose message could not be delivered yet.
    waiting: Option<Ticks100ns>,
}

impl Timer {
    fn enabled(&self) -> bool {
        self.config & stimer::ENABLE != 0
    }
    fn direct(&self) -> bool {
        self.config & stimer::DIRECT != 0
    }
    fn periodic(&self) -> bool {
        self.config & stimer::PERIODIC != 0
    }
    fn sint(&self) -> usize {
        (self.config >> stimer::SINT_SHIFT & 0xf) as usize
    }
    fn vector(&self) -> u8 {
        (self.config >> stimer::VECTOR_SHIFT) as u8
    }

    /// A timer that could never deliver cannot be enabled.
    fn drop_impossible_enable(&mut self) {
        let bad = if self.direct() { self.vector() < FIRST_VALID_VECTOR } else { self.sint() == 0 };
        if bad || self.count == 0 {
            self.config &= !stimer::ENABLE;
        }
    }
}

impl VpSynic {
    /// Writes a timer's configuration. `false`: reserved bits are set.
    pub(crate) fn write_timer_config(
        &mut self,
        hv: &HvPartition,
        id: TimerId,
        value: u64,
        actions: &mut Actions,
    ) -> bool {
        if value & !stimer::VALID != 0 {
            return false;
        }
        let timer = &mut self.timers[usize::from(id.timer)];
        timer.config = value;
        // An enabled timer with a count of zero stays disabled until a count is written (auto-enable or not).
        timer.drop_impossible_enable();
        self.restart(hv, id, actions);
        true
    }

    /// Writes a timer's count: an absolute time (one-shot) or a period.
    pub(crate) fn write_timer_count(&mut self, hv: &HvPartition, id: TimerId, value: u64, actions: &mut Actions) {
        let timer = &mut self.timers[usize::from(id.timer)];
        tracing::trace!(count = value, now = hv.time.now(), config = format_args!("{:#x}", timer.config), "timer");
        timer.count = value;
        if value == 0 {
            timer.config &= !stimer::ENABLE;
        } else if timer.config & stimer::AUTO_ENABLE != 0 {
            timer.config |= stimer::ENABLE;
        }
        timer.drop_impossible_enable();
        self.restart(hv, id, actions);
    }

    fn restart(&mut self, hv: &HvPartition, id: TimerId, actions: &mut Actions) {
        let now = hv.time.now();
        let timer = &mut self.timers[usize::from(id.timer)];
        timer.waiting = None;
        timer.next = timer.enabled().then(|| match timer.periodic() {
            true => now.saturating_add(timer.count.max(SHORTEST_PERIOD)),
            false => timer.count,
        });
        self.run_timer(hv, id, actions);
    }

    pub(crate) fn timer_expired(&mut self, hv: &HvPartition, id: TimerId, actions: &mut Actions) {
        if usize::from(id.timer) < self.timers.len() {
            self.run_timer(hv, id, actions);
        }
    }

    /// Expires the timer if its time has come, and arms the service for its next time.
    fn run_timer(&mut self, hv: &HvPartition, id: TimerId, actions: &mut Actions) {
        let now = hv.time.now();
        let timer = &mut self.timers[usize::from(id.timer)];
        let due = timer.next.filter(|next| *next <= now && timer.waiting.is_none());
        if let Some(due) = due {
            Counters::count(&hv.counters().timer_expirations);
            if timer.periodic() {
                timer.next = Some(next_period(timer, due, now));
            } else {
                timer.next = None;
                timer.config &= !stimer::ENABLE;
            }
            if timer.direct() {
                actions.vectors.push(timer.vector());
            } else {
                timer.waiting = Some(due);
                let sint = timer.sint();
                self.deliver(hv, sint, actions);
            }
        }
        let deadline = self.timer_deadline(id);
        hv.config.timers.arm(id, deadline.map(|time| hv.time.tsc_at(time)));
    }

    /// When the timer service is to wake us for a timer.
    pub(crate) fn timer_deadline(&self, id: TimerId) -> Option<Ticks100ns> {
        // While a message waits for its slot, the end-of-message goes on with the timer: no need to be woken.
        let timer = &self.timers[usize::from(id.timer)];
        if timer.waiting.is_some() { None } else { timer.next }
    }

    /// The timer whose message waits for this SINT's slot, if any; the earliest first.
    pub(crate) fn waiting_timer(&self, sint: usize) -> Option<u8> {
        (0u8..)
            .zip(&self.timers)
            .filter(|(_, t)| !t.direct() && t.sint() == sint)
            .filter_map(|(i, t)| t.waiting.map(|at| (at, i)))
            .min()
            .map(|(_, i)| i)
    }

    /// The message of a waiting timer, which then no longer waits (TLFS section 12.3.3).
    pub(crate) fn take_timer_message(&mut self, hv: &HvPartition, index: u8) -> Message {
        let now = hv.time.now();
        let timer = &mut self.timers[usize::from(index)];
        let expired = timer.waiting.take().unwrap_or(now);
        let mut payload = vec![0; 24];
        payload[0] = index;
        payload[8..16].copy_from_slice(&expired.to_le_bytes());
        payload[16..24].copy_from_slice(&now.to_le_bytes());
        Message { message_type: MESSAGE_TIMER_EXPIRED, sender: 0, payload }
    }

    /// After an end-of-message: timers that stood still because of a waiting message go on.
    pub(crate) fn resume_timers(&mut self, hv: &HvPartition, vp: VpIndex, actions: &mut Actions) {
        for timer in 0..self.timers.len() as u8 {
            if self.timers[usize::from(timer)].next.is_some() {
                self.run_timer(hv, TimerId { vp, timer }, actions);
            }
        }
    }
}

/// When a periodic timer that was due at `due` expires next (TLFS section 12.2.2): a lazy one skips what it missed;
/// another catches up, at half its period.
fn next_period(timer: &Timer, due: Ticks100ns, now: Ticks100ns) -> Ticks100ns {
    let period = timer.count.max(SHORTEST_PERIOD);
    let next = due.saturating_add(period);
    if next > now {
        return next;
    }
    let lazy = timer.config & stimer::LAZY != 0;
    if lazy || now - next > MOST_LAG {
        let missed = (now - next) / period + 1;
        return next.saturating_add(missed.saturating_mul(period));
    }
    next.max(now.saturating_add((period / 2).max(SHORTEST_PERIOD)))
}
