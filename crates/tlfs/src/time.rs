//! Reference time: the counter MSR and the reference TSC page (TLFS section 12.7).
//!
//! Both are computed with the page's own formula, so that they agree to the tick:
//! `time = ((tsc * scale) >> 64) + offset`.

use partition::{Clock, Ticks100ns};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

/// Reference time of a partition.
pub(crate) struct TimeBase {
    clock: Arc<Clock>,
    scale: u64,
    /// Zero until the partition is restored on a host whose TSC has another frequency.
    offset: AtomicI64,
    /// Never zero (which would tell the guest not to use the page).
    sequence: AtomicU64,
}

/// Contents of the reference TSC page: sequence, reserved, scale, offset.
pub(crate) type TscPage = [u8; 24];

impl TimeBase {
    pub(crate) fn new(clock: Arc<Clock>) -> Self {
        let frequency = u128::from(clock.tsc_frequency_hz().max(10_000_001));
        // The frequency is above 10 MHz on every x86-64 processor, so the scale fits 64 bits.
        let scale = u64::try_from((10_000_000u128 << 64) / frequency).unwrap_or(u64::MAX);
        Self { clock, scale, offset: AtomicI64::new(0), sequence: AtomicU64::new(1) }
    }

    fn at_tsc(&self, tsc: u64) -> Ticks100ns {
        let scaled = (u128::from(tsc) * u128::from(self.scale)) >> 64;
        (scaled as u64).wrapping_add_signed(self.offset.load(Ordering::Acquire))
    }

    pub(crate) fn now(&self) -> Ticks100ns {
        self.at_tsc(self.clock.tsc())
    }

    /// The first guest TSC value at which reference time is `time` or later.
    pub(crate) fn tsc_at(&self, time: Ticks100ns) -> u64 {
        let time = i128::from(time) - i128::from(self.offset.load(Ordering::Acquire));
        let Ok(time) = u64::try_from(time.max(0)) else { return u64::MAX };
        u64::try_from((u128::from(time) << 64).div_ceil(u128::from(self.scale))).unwrap_or(u64::MAX)
    }

    pub(crate) fn frequency_hz(&self) -> u64 {
        self.clock.tsc_frequency_hz()
    }

    pub(crate) fn page(&self) -> TscPage {
        let mut page = [0; 24];
        page[..4].copy_from_slice(&(self.sequence.load(Ordering::Acquire) as u32).to_le_bytes());
        page[8..16].copy_from_slice(&self.scale.to_le_bytes());
        page[16..].copy_from_slice(&self.offset.load(Ordering::Acquire).to_le_bytes());
        page
    }

    /// (Reference time, sequence) for saving.
    pub(crate) fn save(&self) -> (Ticks100ns, u32) {
        (self.now(), self.sequence.load(Ordering::Acquire) as u32)
    }

    /// Makes reference time go on from `time` at the clock's present TSC.
    pub(crate) fn restore(&self, time: Ticks100ns, sequence: u32) {
        let scaled = ((u128::from(self.clock.tsc()) * u128::from(self.scale)) >> 64) as u64;
        self.offset.store(time.wrapping_sub(scaled) as i64, Ordering::Release);
        // 0 and 0xffff_ffff both tell guests that the page is not valid.
        let next = if sequence >= u32::MAX - 1 { 1 } else { sequence + 1 };
        self.sequence.store(u64::from(next), Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_formula_and_clock_agree() {
        let clock = Arc::new(Clock::new());
        let base = TimeBase::new(clock.clone());
        for tsc in [0u64, 1, 1 << 32, 1 << 50, 123_456_789_012_345] {
            clock.set(tsc);
            let (page, exact) = (base.now(), clock.reference_time());
            assert!(exact - page <= 1, "at {tsc}: {page} against {exact}");
        }
    }

    #[test]
    fn deadlines_are_the_first_tick() {
        let clock = Arc::new(Clock::new());
        let base = TimeBase::new(clock);
        for time in [0u64, 1, 7, 10_000_000, 1 << 40] {
            let tsc = base.tsc_at(time);
            assert!(base.at_tsc(tsc) >= time);
            assert!(tsc == 0 || base.at_tsc(tsc - 1) < time);
        }
        base.restore(50_000, 1);
        let tsc = base.tsc_at(60_000);
        assert!(base.at_tsc(tsc) >= 60_000 && base.at_tsc(tsc - 1) < 60_000);
        assert_eq!(base.tsc_at(3), 0, "a time that has passed before the restore");
    }

    #[test]
    fn goes_on_after_restore() {
        let clock = Arc::new(Clock::new());
        clock.set(1_000_000_000_000);
        let old = TimeBase::new(clock);
        let (time, sequence) = old.save();
        let other = Arc::new(Clock::new());
        other.set(55);
        let new = TimeBase::new(other);
        new.restore(time, sequence);
        assert_eq!(new.now(), time);
        assert_ne!(new.page()[..4], old.page()[..4], "the guest must see that the page has changed");
        new.restore(time, u32::MAX - 1);
        assert_eq!(new.page()[..4], [1, 0, 0, 0], "sequence skips the two invalid values");
    }
}
