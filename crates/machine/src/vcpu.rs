//! VP threads: each owns its [`Vp`] and runs, stops and shows state on command.

use crate::exits::Exits;
use partition::{EngineError, Partition, RunExit, Vp, VpIndex, VpState};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex};

/// Why a VP stopped by itself.
#[derive(Debug)]
pub enum VpStop {
    /// Triple fault.
    TripleFault(VpIndex),
    /// The engine failed.
    Failed(EngineError),
}

enum Command {
    Run,
    Save(Sender<Result<VpState, EngineError>>),
    Load(Box<VpState>, Sender<Result<(), EngineError>>),
}

/// Stops all VPs of a partition, from any thread.
pub struct Stopper {
    /// VPs leave `run` at the next kick.
    flag: AtomicBool,
    partition: Arc<dyn Partition>,
    count: u32,
}

impl Stopper {
    /// A stopper for a partition of `count` VPs, which do not run yet.
    pub fn new(partition: Arc<dyn Partition>, count: u32) -> Arc<Self> {
        Arc::new(Self { flag: AtomicBool::new(true), partition, count })
    }

    /// Asks all VPs to stop; does not wait. May be called from a VP's thread, whose VP then stops before its next
    /// instruction.
    pub fn request(&self) {
        self.flag.store(true, Ordering::SeqCst);
        for vp in 0..self.count {
            self.partition.kick(vp);
        }
    }
}

/// Shared by the VP threads.
struct Shared {
    stopper: Arc<Stopper>,
    /// Number of VPs between the command to run and their return.
    running: Mutex<u32>,
    changed: Condvar,
    exits: Arc<Exits>,
    report: Box<dyn Fn(VpStop) + Send + Sync>,
    /// Called on each VP's thread before it executes guest code for the first time.
    started: Option<VpStarted>,
}

/// Hears of each VP, on its thread, before it executes guest code for the first time.
pub type VpStarted = Arc<dyn Fn(VpIndex) + Send + Sync>;

/// All VPs of a machine.
pub struct Vcpus {
    shared: Arc<Shared>,
    threads: Vec<(Sender<Command>, std::thread::JoinHandle<()>)>,
}

/// The thread of a VP is gone: it has panicked outside of anything that is caught.
fn gone(vp: usize) -> EngineError {
    EngineError::Internal { vp: vp as VpIndex, what: "its thread has ended".into() }
}

impl Vcpus {
    /// Takes all VPs and makes their threads, and waits until each has prepared itself ([`Vp::prepare`]). `report` is called on a VP's thread when it stops by itself.
    pub fn new(
        stopper: Arc<Stopper>,
        exits: Arc<Exits>,
        report: Box<dyn Fn(VpStop) + Send + Sync>,
        started: Option<VpStarted>,
    ) -> Result<Self, EngineError> {
        let shared = Arc::new(Shared {
            stopper: stopper.clone(),
            running: Mutex::new(0),
            changed: Condvar::new(),
            exits,
            report,
            started,
        });
        let mut threads = Vec::new();
        let (prepared, all_prepared) = channel();
        for index in 0..stopper.count {
            let vp = stopper.partition.take_vp(index)?;
            let (sender, commands) = channel();
            let (shared, prepared) = (shared.clone(), prepared.clone());
            let thread = std::thread::Builder::new()
                .name(format!("vp{index}"))
                .spawn(move || serve(vp, prepared, &commands, &shared))
                .map_err(|source| EngineError::Host { call: "creating a VP thread", source })?;
            threads.push((sender, thread));
        }
        // Until each has said so, or ended.
        drop(prepared);
        if all_prepared.iter().count() < threads.len() {
            return Err(EngineError::Internal { vp: 0, what: "a VP's thread has ended before it was prepared".into() });
        }
        Ok(Self { shared, threads })
    }

    /// Stops all VPs and waits until they have. Not to be called from a VP's thread.
    pub fn stop(&self) {
        self.shared.stopper.request();
        let mut running = self.shared.running.lock().unwrap_or_else(|e| e.into_inner());
        while *running > 0 {
            running = self.shared.changed.wait(running).unwrap_or_else(|e| e.into_inner());
        }
    }

    /// Runs all VPs.
    pub fn run(&self) -> Result<(), EngineError> {
        self.shared.stopper.flag.store(false, Ordering::SeqCst);
        *self.shared.running.lock().unwrap_or_else(|e| e.into_inner()) += self.threads.len() as u32;
        for (vp, (sender, _)) in self.threads.iter().enumerate() {
            sender.send(Command::Run).map_err(|_| gone(vp))?;
        }
        Ok(())
    }

    /// A stopped VP's state.
    pub fn state(&self, vp: usize) -> Result<VpState, EngineError> {
        let (reply, answer) = channel();
        self.threads[vp].0.send(Command::Save(reply)).map_err(|_| gone(vp))?;
        answer.recv().map_err(|_| gone(vp))?
    }

    /// Loads a stopped VP's state.
    pub fn set_state(&self, vp: usize, state: VpState) -> Result<(), EngineError> {
        let (reply, answer) = channel();
        self.threads[vp].0.send(Command::Load(Box::new(state), reply)).map_err(|_| gone(vp))?;
        answer.recv().map_err(|_| gone(vp))?
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.shared.stopper.request();
        for (sender, thread) in self.threads.drain(..) {
            drop(sender);
            let _ = thread.join();
        }
    }
}

fn serve(mut vp: Box<dyn Vp>, prepared: Sender<()>, commands: &Receiver<Command>, shared: &Shared) {
    vp.prepare();
    let _ = prepared.send(());
    drop(prepared);
    let mut started = shared.started.clone();
    while let Ok(command) = commands.recv() {
        match command {
            Command::Run => {
                if let Some(started) = started.take() {
                    started(vp.index());
                }
                if let Some(stop) = run(&mut *vp, shared) {
                    (shared.report)(stop);
                }
                *shared.running.lock().unwrap_or_else(|e| e.into_inner()) -= 1;
                shared.changed.notify_all();
            }
            // A receiver that has gone away does not need the answer.
            Command::Save(reply) => drop(reply.send(vp.state())),
            Command::Load(state, reply) => drop(reply.send(vp.set_state(&state))),
        }
    }
}

fn run(vp: &mut dyn Vp, shared: &Shared) -> Option<VpStop> {
    while !shared.stopper.flag.load(Ordering::SeqCst) {
        // A defect of an engine or a device must end in a message and a restored terminal, not in a VP that is silently
        // missing.
        match catch_unwind(AssertUnwindSafe(|| vp.run(&*shared.exits))) {
            Ok(Ok(RunExit::Kicked)) => {}
            Ok(Ok(RunExit::TripleFault)) => return Some(VpStop::TripleFault(vp.index())),
            Ok(Err(error)) => return Some(VpStop::Failed(error)),
            Err(panic) => {
                let what = panic
                    .downcast_ref::<String>()
                    .cloned()
                    .or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string))
                    .unwrap_or_else(|| "unknown panic".into());
                return Some(VpStop::Failed(EngineError::Internal { vp: vp.index(), what }));
            }
        }
    }
    None
}
