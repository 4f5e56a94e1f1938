//! The timer service: one host thread that calls devices when the partition's clock reaches a time.
//!
//! Deadlines are guest TSC values ([`Clock::tsc`]), so they stop and go on with the clock. A device owns a [`Timer`] and
//! sets it to its next event; when the time comes, [`TimerTarget::expired`] is called with no lock held. A timer that
//! is set to the past expires as soon as possible; setting it again replaces the deadline.

use crate::lock;
use partition::Clock;
use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::time::Duration;

/// Who is called when a timer expires.
pub trait TimerTarget: Send + Sync {
    /// The deadline has been reached. Called on the timer thread with no lock held; it may set timers.
    fn expired(&self);
}

#[derive(Default)]
struct Slot {
    deadline: Option<u64>,
    target: Option<Weak<dyn TimerTarget>>,
}

#[derive(Default)]
struct Queue {
    slots: Vec<Slot>,
    /// (deadline, slot), ascending.
    order: BTreeSet<(u64, usize)>,
    running: bool,
    /// A callback is being executed.
    calling: bool,
    ended: bool,
}

impl Queue {
    fn set(&mut self, slot: usize, deadline: Option<u64>) {
        if let Some(old) = self.slots[slot].deadline.take() {
            self.order.remove(&(old, slot));
        }
        if let Some(new) = deadline {
            self.order.insert((new, slot));
        }
        self.slots[slot].deadline = deadline;
    }

    /// Takes the first timer that is due.
    fn take_due(&mut self, now: u64) -> Option<Arc<dyn TimerTarget>> {
        while let Some((deadline, slot)) = self.order.first().copied() {
            if deadline > now {
                return None;
            }
            self.set(slot, None);
            if let Some(target) = self.slots[slot].target.as_ref().and_then(Weak::upgrade) {
                return Some(target);
            }
        }
        None
    }
}

struct Shared {
    clock: Arc<Clock>,
    queue: Mutex<Queue>,
    /// Something changed for the thread.
    wake: Condvar,
    /// The thread has finished a callback.
    idle: Condvar,
}

/// The service. It ends its thread when it is dropped.
pub struct TimerService {
    shared: Arc<Shared>,
    thread: Mutex<Option<std::thread::JoinHandle<()>>>,
}

/// A device's timer.
pub struct Timer {
    shared: Arc<Shared>,
    slot: usize,
}

impl TimerService {
    /// A stopped service with its thread.
    pub fn new(clock: Arc<Clock>) -> std::io::Result<Arc<Self>> {
        let service = Self::manual(clock);
        let shared = service.shared.clone();
        let thread = std::thread::Builder::new().name("timers".into()).spawn(move || serve(&shared))?;
        *lock(&service.thread) = Some(thread);
        Ok(service)
    }

    /// A service without a thread: expired timers are called by [`TimerService::run_due`]. For tests, which move a
    /// stopped clock by hand.
    pub fn manual(clock: Arc<Clock>) -> Arc<Self> {
        let shared = Shared { clock, queue: Mutex::default(), wake: Condvar::new(), idle: Condvar::new() };
        Arc::new(Self { shared: Arc::new(shared), thread: Mutex::default() })
    }

    /// The clock that deadlines refer to.
    pub fn clock(&self) -> &Arc<Clock> {
        &self.shared.clock
    }

    /// Makes a timer. It is not set and calls nobody before [`Timer::connect`].
    pub fn timer(&self) -> Timer {
        let mut queue = lock(&self.shared.queue);
        queue.slots.push(Slot::default());
        Timer { shared: self.shared.clone(), slot: queue.slots.len() - 1 }
    }

    /// Lets timers expire. To be called after the clock was started.
    pub fn start(&self) {
        lock(&self.shared.queue).running = true;
        self.shared.wake.notify_all();
    }

    /// Stops expiry; when it returns, no callback is being executed. Deadlines stay. Not to be called by a callback.
    pub fn stop(&self) {
        let mut queue = lock(&self.shared.queue);
        queue.running = false;
        while queue.calling {
            queue = self.shared.idle.wait(queue).unwrap_or_else(|e| e.into_inner());
        }
    }

    /// Calls everybody whose time has come, in order, on this thread; says how many there were. At most `limit` calls.
    pub fn run_due(&self, limit: usize) -> usize {
        for count in 0..limit {
            let due = lock(&self.shared.queue).take_due(self.shared.clock.tsc());
            match due {
                Some(target) => target.expired(),
                None => return count,
            }
        }
        limit
    }

    /// The earliest deadline.
    pub fn next_deadline(&self) -> Option<u64> {
        lock(&self.shared.queue).order.first().map(|(deadline, _)| *deadline)
    }
}

impl Drop for TimerService {
    fn drop(&mut self) {
        lock(&self.shared.queue).ended = true;
        self.shared.wake.notify_all();
        if let Some(thread) = lock(&self.thread).take() {
            // The last reference may go away on the timer thread itself, which then ends by its own.
            if thread.thread().id() != std::thread::current().id() {
                let _ = thread.join();
            }
        }
    }
}

impl Timer {
    /// Says whom to call.
    pub fn connect(&self, target: Weak<dyn TimerTarget>) {
        lock(&self.shared.queue).slots[self.slot].target = Some(target);
    }

    /// Sets the deadline in guest TSC ticks, or clears it. May be called with a device lock held.
    pub fn set(&self, deadline: Option<u64>) {
        let mut queue = lock(&self.shared.queue);
        if queue.slots[self.slot].deadline == deadline {
            return;
        }
        let first = queue.order.first().copied();
        queue.set(self.slot, deadline);
        // The thread needs to know only if it now has to wake earlier.
        if queue.order.first().copied() < first || first.is_none() {
            drop(queue);
            self.shared.wake.notify_all();
        }
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        let mut queue = lock(&self.shared.queue);
        queue.set(self.slot, None);
        queue.slots[self.slot].target = None;
    }
}

fn serve(shared: &Shared) {
    let mut queue = lock(&shared.queue);
    while !queue.ended {
        if queue.running
            && let Some(target) = queue.take_due(shared.clock.tsc())
        {
            queue.calling = true;
            drop(queue);
            // A defect of one device must not stop the others' time, nor leave `stop` waiting for ever.
            if catch_unwind(AssertUnwindSafe(|| target.expired())).is_err() {
                tracing::error!("a device panicked in its timer");
            }
            drop(target);
            queue = lock(&shared.queue);
            queue.calling = false;
            shared.idle.notify_all();
            continue;
        }
        // A day is as good as forever: waking for nothing does no harm, and the addition below cannot overflow.
        let wait = match queue.order.first() {
            Some((deadline, _)) if queue.running => shared.clock.until_tsc(*deadline),
            _ => Duration::MAX,
        };
        let wait = wait.min(Duration::from_secs(86_400));
        queue = shared.wake.wait_timeout(queue, wait).unwrap_or_else(|e| e.into_inner()).0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    struct Count(AtomicU32);
    impl TimerTarget for Count {
        fn expired(&self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn expires_in_order_and_only_while_running() {
        let clock = Arc::new(Clock::new());
        let service = TimerService::new(clock.clone()).unwrap();
        let count = Arc::new(Count(AtomicU32::new(0)));
        let timer = service.timer();
        let target: Weak<dyn TimerTarget> = Arc::downgrade(&(count.clone() as Arc<dyn TimerTarget>));
        timer.connect(target);
        timer.set(Some(clock.tsc_at_100ns(50_000)));
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(count.0.load(Ordering::SeqCst), 0, "the clock stands");
        clock.start();
        service.start();
        let until = std::time::Instant::now() + Duration::from_secs(5);
        while count.0.load(Ordering::SeqCst) == 0 && std::time::Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(count.0.load(Ordering::SeqCst), 1);
        assert!(clock.reference_time() >= 50_000, "not early");
        service.stop();
        timer.set(Some(0));
        std::thread::sleep(Duration::from_millis(10));
        assert_eq!(count.0.load(Ordering::SeqCst), 1, "stopped");
    }

    #[test]
    fn a_panic_in_a_timer_does_not_stop_time() {
        struct Broken;
        impl TimerTarget for Broken {
            fn expired(&self) {
                panic!("on purpose");
            }
        }
        let clock = Arc::new(Clock::new());
        let service = TimerService::new(clock.clone()).unwrap();
        let (broken, count): (Arc<dyn TimerTarget>, _) = (Arc::new(Broken), Arc::new(Count(AtomicU32::new(0))));
        let timers = [service.timer(), service.timer()];
        timers[0].connect(Arc::downgrade(&broken));
        timers[1].connect(Arc::downgrade(&(count.clone() as Arc<dyn TimerTarget>)));
        timers[0].set(Some(0));
        timers[1].set(Some(1));
        clock.start();
        service.start();
        let until = std::time::Instant::now() + Duration::from_secs(5);
        while count.0.load(Ordering::SeqCst) == 0 && std::time::Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
        service.stop();
        assert_eq!(count.0.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn manual_service_runs_what_is_due() {
        let clock = Arc::new(Clock::new());
        let service = TimerService::manual(clock.clone());
        let count = Arc::new(Count(AtomicU32::new(0)));
        let timers: Vec<_> = (0..3).map(|_| service.timer()).collect();
        for (i, timer) in timers.iter().enumerate() {
            timer.connect(Arc::downgrade(&(count.clone() as Arc<dyn TimerTarget>)));
            timer.set(Some(100 * (i as u64 + 1)));
        }
        clock.set(200);
        assert_eq!(service.run_due(10), 2);
        assert_eq!(service.next_deadline(), Some(300));
        drop(timers);
        assert_eq!(service.next_deadline(), None);
    }
}
