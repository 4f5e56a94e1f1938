//! Interrupt lines between devices.
//!
//! A device changes the level of its line while it holds its own lock ([`Line::set`] is one atomic operation and calls
//! nobody), and passes the change on after it has let go of the lock ([`Line::deliver`]). Two threads that do this at
//! the same time cannot deliver in the wrong order: whoever is delivering already takes the other's change with it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// The receiving end of a line.
pub trait LineSink: Send + Sync {
    /// The line's level has changed (or it went down and up again: then it is called twice).
    fn set_level(&self, high: bool);
}

impl<F: Fn(bool) + Send + Sync> LineSink for F {
    fn set_level(&self, high: bool) {
        self(high);
    }
}

/// Runs a piece of work on one thread at a time without ever waiting: a thread that finds the work being done leaves
/// its request behind, and the worker goes round once more.
#[derive(Default)]
pub(crate) struct Combiner(AtomicU32);

impl Combiner {
    pub(crate) fn run(&self, mut work: impl FnMut()) {
        if self.0.fetch_add(1, Ordering::AcqRel) > 0 {
            return;
        }
        loop {
            let seen = self.0.load(Ordering::Acquire);
            work();
            if self.0.compare_exchange(seen, 0, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                return;
            }
        }
    }
}

/// A device's interrupt output.
///
/// Bit 0 of the state is the level, the other bits count rising edges, so that a pulse is not lost if the line is low
/// again when it is delivered.
#[derive(Default)]
pub struct Line {
    state: AtomicU32,
    delivered: AtomicU32,
    combiner: Combiner,
    sinks: Vec<Arc<dyn LineSink>>,
}

impl Line {
    /// A low line that leads to all these sinks.
    pub fn new(sinks: Vec<Arc<dyn LineSink>>) -> Self {
        Self { sinks, ..Self::default() }
    }

    /// A line that leads nowhere.
    pub fn disconnected() -> Self {
        Self::default()
    }

    /// Sets the level. May be called with the device's lock held: it calls nobody.
    pub fn set(&self, high: bool) {
        let _ = self.state.fetch_update(Ordering::AcqRel, Ordering::Relaxed, |state| match (state & 1 != 0, high) {
            (false, true) => Some((state & !1).wrapping_add(2) | 1),
            (true, false) => Some(state & !1),
            _ => None,
        });
    }

    /// A pulse: up and down again.
    pub fn pulse(&self) {
        self.set(true);
        self.set(false);
    }

    /// The level.
    pub fn level(&self) -> bool {
        self.state.load(Ordering::Acquire) & 1 != 0
    }

    /// Passes changes on. Must be called with no device lock held.
    pub fn deliver(&self) {
        if self.state.load(Ordering::Acquire) == self.delivered.load(Ordering::Acquire) {
            return;
        }
        self.combiner.run(|| {
            let (now, before) = (self.state.load(Ordering::Acquire), self.delivered.load(Ordering::Relaxed));
            if now == before {
                return;
            }
            let rose = now >> 1 != before >> 1;
            for sink in &self.sinks {
                if rose {
                    if before & 1 != 0 {
                        sink.set_level(false);
                    }
                    sink.set_level(true);
                }
                if now & 1 == 0 {
                    sink.set_level(false);
                }
            }
            self.delivered.store(now, Ordering::Release);
        });
    }

    /// Sets the level without telling the sinks: they have the same level in their own saved state (restore).
    pub fn prime(&self, high: bool) {
        self.set(high);
        self.delivered.store(self.state.load(Ordering::Acquire), Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    fn recorder() -> (Arc<Mutex<Vec<bool>>>, Line) {
        let log = Arc::new(Mutex::new(Vec::new()));
        let sink = log.clone();
        (log, Line::new(vec![Arc::new(move |high: bool| sink.lock().unwrap().push(high))]))
    }

    #[test]
    fn pulses_survive_late_delivery() {
        let (log, line) = recorder();
        line.pulse();
        line.deliver();
        line.deliver();
        assert_eq!(*log.lock().unwrap(), [true, false]);
        line.set(true);
        line.deliver();
        line.set(false);
        line.set(true);
        line.deliver();
        assert_eq!(*log.lock().unwrap(), [true, false, true, false, true]);
        line.prime(false);
        line.deliver();
        assert_eq!(log.lock().unwrap().len(), 5, "a primed level is not delivered");
    }

    #[test]
    fn concurrent_delivery_ends_at_the_last_level() {
        let (log, line) = recorder();
        let device = Mutex::new(0u32);
        std::thread::scope(|s| {
            for _ in 0..4 {
                s.spawn(|| {
                    for _ in 0..2000 {
                        {
                            let mut state = device.lock().unwrap();
                            *state += 1;
                            line.set(*state % 3 == 0);
                        }
                        line.deliver();
                    }
                });
            }
        });
        assert_eq!(*log.lock().unwrap().last().unwrap(), line.level());
        assert_eq!(line.level(), 8000 % 3 == 0);
    }
}
