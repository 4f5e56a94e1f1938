//! Quality of service for a disk: a maximum that is kept, and a minimum whose absence is told.
//!
//! I/O operations are counted in units of 8 KiB, as Hyper-V counts them: a request of 20 KiB is three.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Weak};
use std::time::{Duration, Instant};

use crate::buffer::IoBuffer;
use crate::driver::Shared;
use crate::error::{Error, Result};
use crate::state::{Callback, RequestKind};

/// Bytes of a normalised I/O operation.
pub const NORMAL_IO: u64 = 8192;
/// What may pass at once after a pause, as time at the maximum rate.
const BURST: Duration = Duration::from_millis(100);
/// The span over which the minimum is judged.
const WINDOW: Duration = Duration::from_secs(1);

/// Told that a disk with requests waiting all the time has been given less than its minimum.
pub type MinimumAlert = Box<dyn Fn(QosAlert) + Send + Sync>;

/// What a [`MinimumAlert`] tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QosAlert {
    /// The minimum that was asked for, in normalised operations a second.
    pub wanted: u32,
    /// What the disk did.
    pub got: u32,
}

/// Limits of a disk, in normalised operations a second.
#[derive(Default)]
pub struct Qos {
    /// No more than this.
    pub maximum: Option<u32>,
    /// Less than this is an alert.
    pub minimum: Option<(u32, MinimumAlert)>,
}

type Waiting = (RequestKind, u64, u64, Option<IoBuffer>, Callback);

struct State {
    limits: Qos,
    /// When the next operation is due (the virtual scheduling algorithm of a leaky bucket).
    due: Instant,
    queue: VecDeque<Waiting>,
    window_start: Instant,
    served: u64,
    outstanding: u64,
    /// Requests were outstanding during the whole window.
    busy: bool,
    stop: bool,
}

pub(crate) struct Gate {
    state: Mutex<State>,
    wake: Condvar,
}

/// Normalised operations of a request; flushes are free.
fn cost(kind: RequestKind, len: u64) -> u64 {
    match kind {
        RequestKind::Read | RequestKind::Write { .. } => len.div_ceil(NORMAL_IO).max(1),
        RequestKind::Flush | RequestKind::Unmap | RequestKind::WriteZeroes => 0,
    }
}

impl State {
    /// Takes a request's share; `Err` says when to try again.
    fn take(&mut self, cost: u64, now: Instant) -> std::result::Result<(), Instant> {
        let Some(max) = self.limits.maximum else { return Ok(()) };
        if cost == 0 {
            return Ok(());
        }
        let due = self.due.max(now.checked_sub(BURST).unwrap_or(now));
        if due > now {
            return Err(due);
        }
        let nanos = cost.saturating_mul(1_000_000_000) / u64::from(max.max(1));
        self.due = due + Duration::from_nanos(nanos);
        Ok(())
    }

    /// Ends the window if it is over, and says what to tell.
    fn judge(&mut self, now: Instant) -> Option<QosAlert> {
        let span = now.saturating_duration_since(self.window_start);
        if span < WINDOW {
            return None;
        }
        let got = (self.served as f64 / span.as_secs_f64()) as u32;
        let busy = std::mem::replace(&mut self.busy, self.outstanding > 0);
        (self.window_start, self.served) = (now, 0);
        let wanted = self.limits.minimum.as_ref()?.0;
        (busy && got < wanted).then_some(QosAlert { wanted, got })
    }
}

impl Gate {
    /// A gate in front of a disk, with a thread that lets waiting requests through.
    pub fn start(shared: &Arc<Shared>, limits: Qos) -> Result<Arc<Self>> {
        if limits.maximum == Some(0) {
            return Err(Error::Parameter("a maximum of 0 operations a second would stop the disk".into()));
        }
        let now = Instant::now();
        let state = State {
            limits,
            due: now,
            queue: VecDeque::new(),
            window_start: now,
            served: 0,
            outstanding: 0,
            busy: false,
            stop: false,
        };
        let gate = Arc::new(Self { state: Mutex::new(state), wake: Condvar::new() });
        let (me, shared) = (gate.clone(), Arc::downgrade(shared));
        std::thread::Builder::new()
            .name("vhd-qos".into())
            .spawn(move || me.run(&shared))
            .map_err(Error::io(std::path::Path::new("vhd-qos"), "start a thread"))?;
        Ok(gate)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Lets a request through now, or keeps it (and returns nothing) until it is due.
    pub fn admit(self: &Arc<Self>, (kind, offset, len, buffer, done): Waiting) -> Option<Waiting> {
        let cost = cost(kind, len);
        let me = self.clone();
        let counted: Callback = Box::new(move |c| {
            me.ended(cost);
            done(c);
        });
        let mut s = self.lock();
        s.outstanding += 1;
        if s.outstanding == 1 {
            s.busy = false;
        }
        let request = (kind, offset, len, buffer, counted);
        if s.stop || cost == 0 || (s.queue.is_empty() && s.take(cost, Instant::now()).is_ok()) {
            return Some(request);
        }
        s.queue.push_back(request);
        self.wake.notify_one();
        None
    }

    fn ended(&self, cost: u64) {
        let mut s = self.lock();
        s.outstanding -= 1;
        s.served += cost;
        if s.outstanding == 0 {
            s.busy = false;
        }
    }

    fn run(self: Arc<Self>, shared: &Weak<Shared>) {
        let mut s = self.lock();
        loop {
            let now = Instant::now();
            if let Some(alert) = s.judge(now)
                && let Some((_, tell)) = &s.limits.minimum
            {
                tell(alert);
            }
            let mut ready = Vec::new();
            let mut pause = WINDOW;
            while let Some(first) = s.queue.front() {
                let cost = cost(first.0, first.2);
                match if s.stop { Ok(()) } else { s.take(cost, now) } {
                    Ok(()) => ready.extend(s.queue.pop_front()),
                    Err(at) => {
                        pause = at.saturating_duration_since(now).min(WINDOW);
                        break;
                    }
                }
            }
            let stop = s.stop;
            if !ready.is_empty() {
                drop(s);
                if let Some(shared) = shared.upgrade() {
                    let mut core = shared.lock();
                    for (kind, offset, len, buffer, done) in ready {
                        core.submit(kind, offset, len, buffer, done);
                    }
                    shared.pump(core);
                }
                s = self.lock();
                continue;
            }
            if stop {
                return;
            }
            s = self
                .wake
                .wait_timeout(s, pause.max(Duration::from_micros(50)))
                .map_or_else(|e| e.into_inner().0, |r| r.0);
        }
    }

    /// Lets everything through from now on and ends the thread.
    pub fn stop(&self, shared: &Shared) {
        let mut s = self.lock();
        s.stop = true;
        let waiting = std::mem::take(&mut s.queue);
        drop(s);
        self.wake.notify_all();
        let mut core = shared.lock();
        for (kind, offset, len, buffer, done) in waiting {
            core.submit(kind, offset, len, buffer, done);
        }
        shared.pump(core);
    }
}
