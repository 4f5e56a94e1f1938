//! What the run loop and the control socket share: the state of things, and the way of an order to the run loop.

use crate::control::Context;
use crate::control::schema::{self, Sandbox, State};
use crate::run::{Note, Observer, Order, Wake};
use machine::Machine;
use partition::{Clock, Partition};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

/// A guest that was asked to shut down and does not is called running again after this time.
const STOPPING_TIME: Duration = Duration::from_secs(300);

struct Board {
    state: State,
    stopping: Option<Instant>,
    sandbox: Sandbox,
}

/// What does not change while the machine lives.
struct Facts {
    engine: &'static str,
    cpu_model: String,
    processors: u32,
    memory_bytes: u64,
    clock: Arc<Clock>,
    partition: Arc<dyn Partition>,
}

/// Knows the state, tells the observer, passes orders on.
pub struct Reporter {
    board: Mutex<Board>,
    facts: OnceLock<Facts>,
    wakes: Mutex<Sender<Wake>>,
    observer: Option<Arc<dyn Observer>>,
}

impl Reporter {
    /// For a machine that is being prepared.
    pub(crate) fn new(wakes: Sender<Wake>, observer: Option<Arc<dyn Observer>>) -> Arc<Self> {
        let board = Board { state: State::Starting, stopping: None, sandbox: Sandbox::default() };
        Arc::new(Self { board: Mutex::new(board), facts: OnceLock::new(), wakes: Mutex::new(wakes), observer })
    }

    fn board(&self) -> MutexGuard<'_, Board> {
        self.board.lock().unwrap_or_else(|e| e.into_inner())
    }

    pub(crate) fn made(&self, engine: &'static str, machine: &Machine) {
        let config = machine.config();
        let _ = self.facts.set(Facts {
            engine,
            cpu_model: config.cpu_model.clone(),
            processors: config.processors,
            memory_bytes: config.memory_bytes,
            clock: machine.clock().clone(),
            partition: machine.partition().clone(),
        });
    }

    pub(crate) fn confined(&self, sandbox: &Sandbox) {
        self.board().sandbox = sandbox.clone();
        self.note(&Note::Confined(sandbox));
    }

    /// Tells the observer.
    pub(crate) fn note(&self, note: &Note<'_>) {
        if let Some(observer) = &self.observer {
            observer.note(note);
        }
    }

    pub(crate) fn set(&self, state: State) {
        let mut board = self.board();
        board.state = state;
        board.stopping = None;
    }

    /// The state now.
    pub fn state(&self) -> State {
        let board = self.board();
        match board.stopping {
            Some(since) if board.state == State::Running && since.elapsed() < STOPPING_TIME => State::Stopping,
            _ => board.state,
        }
    }

    /// Says no when the machine is in another state.
    ///
    /// # Errors
    /// In words for people.
    pub fn must_be(&self, state: State, what: &str) -> Result<(), String> {
        let now = self.board().state;
        if now == state {
            return Ok(());
        }
        let hint = if now == State::Paused { ": resume it first" } else { "" };
        Err(format!("the machine is {}, and only a {} one can be {what}{hint}", lower(now), lower(state)))
    }

    pub(crate) fn shutdown_requested(&self, restart: bool) {
        if !restart {
            self.board().stopping = Some(Instant::now());
        }
        self.note(&Note::ShutdownRequested { restart });
    }

    /// Passes an order to the run loop and waits until it is carried out.
    ///
    /// # Errors
    /// When the state does not allow it, it failed, or the machine has ended.
    pub fn order(&self, order: Order) -> Result<(), String> {
        let (reply, answer) = channel();
        let sender = self.wakes.lock().unwrap_or_else(|e| e.into_inner()).clone();
        let ended = || "the machine has ended".to_string();
        sender.send(Wake::Order(order, reply)).map_err(|_| ended())?;
        answer.recv().map_err(|_| ended())?
    }

    /// For `GET /v1/machine`.
    pub fn describe(&self, context: &Context) -> schema::Machine {
        let state = self.state();
        let sandbox = self.board().sandbox.clone();
        let facts = self.facts.get();
        schema::Machine {
            state,
            pid: std::process::id(),
            engine: facts.map_or("", |f| f.engine).into(),
            cpu_model: facts.map(|f| f.cpu_model.clone()).unwrap_or_default(),
            processors: facts.map_or(0, |f| f.processors),
            memory_bytes: facts.map_or(0, |f| f.memory_bytes),
            uptime_seconds: facts.map_or(0.0, |f| f.clock.nanoseconds() as f64 / 1e9),
            processor_seconds: facts
                .map_or(0.0, |f| (0..f.processors).map(|vp| f.partition.vp_runtime(vp) as f64 / 1e7).sum()),
            hyperv: context.devices.is_some(),
            console: context.console.is_some(),
            sandbox,
        }
    }
}

fn lower(state: State) -> String {
    state.name().to_lowercase()
}
