//! The partition's timer thread: it raises [`attention::TIMER`] of VPs whose APIC timer is due. A VP that sleeps in HLT
//! waits for its own deadline instead and needs no help.

use crate::vp::attention;
use crate::wake::{Waker, exact_timers, futex_wait, futex_wake};
use partition::{Clock, VpIndex};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

/// No deadline.
pub const NEVER: u64 = u64::MAX;

struct Shared {
    /// A deadline for each VP, in ticks of the partition's clock.
    deadlines: Box<[AtomicU64]>,
    wakers: Box<[Arc<Waker>]>,
    clock: Arc<Clock>,
    /// Changes when the thread must look again.
    sequence: AtomicU32,
    /// The deadline that the thread sleeps until.
    next_wake: AtomicU64,
    stop: AtomicBool,
}

/// Timers of a partition's VPs.
pub struct Timers {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
    started: AtomicBool,
}

impl Timers {
    /// No timer is set; the thread starts with the first one.
    pub fn new(clock: Arc<Clock>, wakers: &[Arc<Waker>]) -> Self {
        let shared = Shared {
            deadlines: wakers.iter().map(|_| AtomicU64::new(NEVER)).collect(),
            wakers: wakers.into(),
            clock,
            sequence: AtomicU32::new(0),
            next_wake: AtomicU64::new(NEVER),
            stop: AtomicBool::new(false),
        };
        Self { shared: Arc::new(shared), thread: Mutex::new(None), started: AtomicBool::new(false) }
    }

    /// Sets or clears ([`NEVER`]) the deadline of a VP.
    pub fn set(&self, vp: VpIndex, deadline: u64) {
        self.shared.deadlines[vp as usize].store(deadline, Ordering::SeqCst);
        if deadline < self.shared.next_wake.load(Ordering::SeqCst) {
            self.notify();
        }
    }

    /// The thread looks again: the clock may have been started.
    pub fn notify(&self) {
        if !self.started.swap(true, Ordering::SeqCst) {
            let shared = self.shared.clone();
            let spawned = std::thread::Builder::new().name("vp-timers".into()).spawn(move || shared.run());
            match spawned {
                Ok(handle) => *self.thread.lock().unwrap_or_else(|e| e.into_inner()) = Some(handle),
                Err(error) => {
                    tracing::error!(%error, "the timer thread of the partition cannot be started");
                    self.started.store(false, Ordering::SeqCst);
                }
            }
        }
        self.shared.sequence.fetch_add(1, Ordering::SeqCst);
        futex_wake(&self.shared.sequence);
    }
}

impl Drop for Timers {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.sequence.fetch_add(1, Ordering::SeqCst);
        futex_wake(&self.shared.sequence);
        let handle = self.thread.lock().unwrap_or_else(|e| e.into_inner()).take();
        if let Some(handle) = handle {
            // A panic of the thread has been reported by then; there is nothing to add.
            let _ = handle.join();
        }
    }
}

impl Shared {
    fn run(&self) {
        exact_timers();
        while !self.stop.load(Ordering::SeqCst) {
            let sequence = self.sequence.load(Ordering::SeqCst);
            let next = self.expire();
            self.next_wake.store(next, Ordering::SeqCst);
            // A deadline that was set while `next_wake` still had its old value has not been notified.
            if self.earliest() < next {
                continue;
            }
            let timeout = if next == NEVER { None } else { Some(self.clock.until_tsc(next)) };
            // A stopped clock says "never"; whoever starts it has VPs notify.
            let timeout = timeout.filter(|t| *t < Duration::from_secs(1 << 30));
            if timeout != Some(Duration::ZERO) {
                futex_wait(&self.sequence, sequence, timeout);
            }
        }
    }

    fn earliest(&self) -> u64 {
        self.deadlines.iter().map(|d| d.load(Ordering::SeqCst)).min().unwrap_or(NEVER)
    }

    /// Raises what is due; returns the earliest deadline that is left.
    fn expire(&self) -> u64 {
        let now = self.clock.tsc();
        let mut next = NEVER;
        for (deadline, waker) in self.deadlines.iter().zip(&self.wakers) {
            let due = deadline.load(Ordering::SeqCst);
            if due > now {
                next = next.min(due);
            } else if deadline.compare_exchange(due, NEVER, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
                waker.raise(attention::TIMER);
            } else {
                next = 0;
            }
        }
        next
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    #[test]
    fn due_timers_raise_attention() {
        let clock = Arc::new(Clock::new());
        clock.start();
        let waker = Arc::new(Waker::new());
        let word = AtomicU32::new(0);
        // SAFETY: detached below.
        unsafe { waker.attach(&word) };
        let timers = Timers::new(clock.clone(), std::slice::from_ref(&waker));
        let per_ms = clock.tsc_frequency_hz() / 1000;
        for ms in [20u64, 1] {
            let start = Instant::now();
            timers.set(0, clock.tsc() + ms * per_ms);
            while word.load(Ordering::SeqCst) == 0 && start.elapsed() < Duration::from_secs(5) {
                std::thread::sleep(Duration::from_micros(100));
            }
            assert_eq!(word.swap(0, Ordering::SeqCst), attention::TIMER);
            assert!(start.elapsed() >= Duration::from_millis(ms), "early: {:?}", start.elapsed());
        }
        waker.detach();
    }
}
