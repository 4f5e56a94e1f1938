//! Drivers: what carries out the file operations that the state machine wants.

pub(crate) mod threads;
pub(crate) mod uring;

use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use crate::state::{Core, Done, Op};
use crate::storage::Storage;

/// The state machine and what drives it.
pub(crate) struct Shared {
    core: Mutex<Core>,
    /// Told whenever the disk may have become idle.
    idle: Condvar,
    driver: Driver,
}

pub(crate) enum Driver {
    Uring(Box<uring::Uring>),
    Threads(threads::Threads),
    /// Whoever submits a request carries out its operations himself.
    Blocking(Files),
}

impl Shared {
    pub fn new(core: Core, driver: Driver) -> Self {
        Self { core: Mutex::new(core), idle: Condvar::new(), driver }
    }

    pub fn driver(&self) -> &Driver {
        &self.driver
    }

    pub fn lock(&self) -> MutexGuard<'_, Core> {
        // A panic while the lock was held is a defect of ours; going on with the state is no worse than stopping here.
        self.core.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Hands new operations to the driver, then, without the lock, tells finished requests.
    pub fn pump(&self, mut core: MutexGuard<'_, Core>) {
        if let Driver::Blocking(files) = &self.driver {
            return self.pump_blocking(core, files);
        }
        let ops = std::mem::take(&mut core.out);
        let done = std::mem::take(&mut core.done);
        let submit = !ops.is_empty();
        match &self.driver {
            // The submission queue has one writer at a time because the core is locked.
            Driver::Uring(u) => u.push(ops),
            Driver::Threads(t) => t.push(ops),
            Driver::Blocking(_) => {}
        }
        if core.is_idle() {
            self.idle.notify_all();
        }
        drop(core);
        if let (true, Driver::Uring(u)) = (submit, &self.driver) {
            u.submit();
        }
        for Done(callback, completion) in done {
            callback(completion);
        }
    }

    fn pump_blocking<'a>(&'a self, mut core: MutexGuard<'a, Core>, files: &Files) {
        loop {
            let ops = std::mem::take(&mut core.out);
            let done = std::mem::take(&mut core.done);
            if ops.is_empty() && done.is_empty() {
                if core.is_idle() {
                    self.idle.notify_all();
                }
                return;
            }
            drop(core);
            for Done(callback, completion) in done {
                callback(completion);
            }
            let results: Vec<_> = ops.iter().map(|op| (op.id, threads::perform(&*files[op.layer], op))).collect();
            core = self.lock();
            for (id, result) in results {
                core.complete(id, result);
            }
        }
    }

    /// Waits until nothing is in flight.
    pub fn wait_idle(&self) -> MutexGuard<'_, Core> {
        let mut core = self.lock();
        while !core.is_idle() {
            core = self.idle.wait(core).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
        core
    }
}

/// The files of the layers, for a driver.
pub(crate) type Files = Vec<Arc<dyn Storage>>;

pub(crate) type Ops = Vec<Op>;
