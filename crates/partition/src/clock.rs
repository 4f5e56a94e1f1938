//! The one clock of a partition.
//!
//! Everything that tells or counts time for a guest (TSC, APIC timer, PIT, RTC, PM timer, Hyper-V reference time) is
//! derived from this object, so that pausing, saving, restoring and moving a VM keeps all of them honest: they stop
//! together and go on together.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// A span of time, or a time since power-on, in units of 100 ns (the unit of Hyper-V's reference time).
pub type Ticks100ns = u64;

/// Time of a partition. It counts in guest TSC ticks since power-on; other units are computed from those.
///
/// The guest's TSC runs at the host's own rate if the host's TSC is invariant: `guest_tsc = host_tsc + offset`.
pub struct Clock {
    frequency_hz: u64,
    /// Guest TSC minus host TSC while running.
    offset: AtomicU64,
    running: AtomicBool,
    /// Guest TSC at which the clock stands while it is stopped.
    stopped_at: Mutex<u64>,
}

impl Clock {
    /// A stopped clock at time 0 with the host's TSC frequency.
    pub fn new() -> Self {
        Self {
            frequency_hz: host_tsc_frequency(),
            offset: AtomicU64::new(0),
            running: AtomicBool::new(false),
            stopped_at: Mutex::new(0),
        }
    }

    /// Frequency of the guest's TSC in Hz.
    pub fn tsc_frequency_hz(&self) -> u64 {
        self.frequency_hz
    }

    /// Does it run?
    #[inline]
    pub fn is_running(&self) -> bool {
        self.running.load(Ordering::Acquire)
    }

    /// Starts or resumes.
    pub fn start(&self) {
        let at = self.stopped_at.lock().unwrap_or_else(|e| e.into_inner());
        if !self.running.load(Ordering::Acquire) {
            self.offset.store(at.wrapping_sub(host_tsc()), Ordering::Release);
            self.running.store(true, Ordering::Release);
        }
    }

    /// Stops: [`Clock::tsc`] stands still until [`Clock::start`]. To be called when all VPs have stopped.
    pub fn stop(&self) {
        let mut at = self.stopped_at.lock().unwrap_or_else(|e| e.into_inner());
        if self.running.load(Ordering::Acquire) {
            *at = host_tsc().wrapping_add(self.offset.load(Ordering::Acquire));
            self.running.store(false, Ordering::Release);
        }
    }

    /// Sets the time of a stopped clock, in guest TSC ticks since power-on (restore).
    pub fn set(&self, tsc: u64) {
        let mut at = self.stopped_at.lock().unwrap_or_else(|e| e.into_inner());
        *at = tsc;
        if self.running.load(Ordering::Acquire) {
            self.offset.store(tsc.wrapping_sub(host_tsc()), Ordering::Release);
        }
    }

    /// Guest TSC ticks since power-on.
    #[inline]
    pub fn tsc(&self) -> u64 {
        if self.running.load(Ordering::Acquire) {
            host_tsc().wrapping_add(self.offset.load(Ordering::Acquire))
        } else {
            *self.stopped_at.lock().unwrap_or_else(|e| e.into_inner())
        }
    }

    /// Guest TSC minus host TSC, for engines that read the host's counter directly. Valid while the clock runs.
    pub fn tsc_offset(&self) -> u64 {
        self.offset.load(Ordering::Acquire)
    }

    /// Reference time: 100 ns units since power-on.
    pub fn reference_time(&self) -> Ticks100ns {
        self.tsc_to_100ns(self.tsc())
    }

    /// Nanoseconds since power-on.
    pub fn nanoseconds(&self) -> u64 {
        scale(self.tsc(), 1_000_000_000, self.frequency_hz)
    }

    /// Converts guest TSC ticks to 100 ns units.
    pub fn tsc_to_100ns(&self, tsc: u64) -> Ticks100ns {
        scale(tsc, 10_000_000, self.frequency_hz)
    }

    /// The guest TSC value at a reference time (rounded up, so that waiting for it does not end early).
    pub fn tsc_at_100ns(&self, time: Ticks100ns) -> u64 {
        let ticks = (u128::from(time) * u128::from(self.frequency_hz)).div_ceil(10_000_000);
        u64::try_from(ticks).unwrap_or(u64::MAX)
    }

    /// How long, in host time, until the guest's TSC reaches `tsc`; zero if it has. A stopped clock never gets there.
    pub fn until_tsc(&self, tsc: u64) -> Duration {
        if !self.running.load(Ordering::Acquire) {
            return Duration::MAX;
        }
        let ticks = tsc.saturating_sub(self.tsc());
        Duration::from_nanos(scale(ticks, 1_000_000_000, self.frequency_hz))
    }
}

impl Default for Clock {
    fn default() -> Self {
        Self::new()
    }
}

fn scale(value: u64, numerator: u64, denominator: u64) -> u64 {
    u64::try_from(u128::from(value) * u128::from(numerator) / u128::from(denominator)).unwrap_or(u64::MAX)
}

/// The host's time-stamp counter.
#[inline]
pub fn host_tsc() -> u64 {
    // SAFETY: RDTSC exists on every x86-64 processor and has no side effect; Linux does not set CR4.TSD for processes
    // that did not ask for it.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Frequency of the host's TSC in Hz: from CPUID (0x15, or a hypervisor's timing leaf 0x4000_0010) or, where neither
/// says, measured once against CLOCK_MONOTONIC.
pub fn host_tsc_frequency() -> u64 {
    static FREQUENCY: std::sync::OnceLock<u64> = std::sync::OnceLock::new();
    *FREQUENCY.get_or_init(|| cpuid_tsc_frequency().unwrap_or_else(measure_tsc_frequency))
}

fn cpuid_tsc_frequency() -> Option<u64> {
    use core::arch::x86_64::__cpuid;
    if __cpuid(0).eax >= 0x15 {
        let l = __cpuid(0x15);
        if l.eax != 0 && l.ebx != 0 && l.ecx != 0 {
            return Some(u64::from(l.ecx) * u64::from(l.ebx) / u64::from(l.eax));
        }
    }
    if __cpuid(1).ecx & (1 << 31) != 0 && __cpuid(0x4000_0000).eax >= 0x4000_0010 {
        let khz = __cpuid(0x4000_0010).eax;
        if khz != 0 {
            return Some(u64::from(khz) * 1000);
        }
    }
    None
}

fn measure_tsc_frequency() -> u64 {
    // The best of three short runs: a preemption inside a run makes it long, never short.
    let mut best: Option<(u64, u64)> = None;
    for _ in 0..3 {
        let (start, tsc) = (std::time::Instant::now(), host_tsc());
        while start.elapsed() < Duration::from_millis(3) {
            std::hint::spin_loop();
        }
        let (ticks, nanos) = (host_tsc() - tsc, start.elapsed().as_nanos() as u64);
        if best.is_none_or(|(_, n)| nanos < n) {
            best = Some((ticks, nanos));
        }
    }
    let (ticks, nanos) = best.unwrap_or((1, 1));
    // Rounded to 10 kHz: that is finer than the measurement.
    (scale(ticks, 1_000_000_000, nanos) + 5_000) / 10_000 * 10_000
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stops_and_goes_on() {
        let clock = Clock::new();
        assert_eq!(clock.tsc(), 0);
        clock.start();
        std::thread::sleep(Duration::from_millis(20));
        clock.stop();
        let stood = clock.tsc();
        assert!(clock.tsc_to_100ns(stood) >= 150_000, "20 ms passed, the clock says {stood} ticks");
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(clock.tsc(), stood);
        clock.start();
        assert!(clock.tsc() >= stood);
    }

    #[test]
    fn reference_time_round_trip() {
        let clock = Clock::new();
        for time in [0u64, 1, 10_000_000, 12_345_678_901] {
            let back = clock.tsc_to_100ns(clock.tsc_at_100ns(time));
            assert!(back >= time && back <= time + 1, "{time} came back as {back}");
        }
    }
}
