//! The run loop of a VP: attention, events in the architecture's order, sleep, and calls to the machine.

use crate::apic::event;
use crate::exception;
use crate::interp;
use crate::partition_impl::{SoftPartition, set_current};
use crate::rest::at_rest;
use crate::stats::Count;
use crate::timers::NEVER;
use crate::vp::{Fault, NoExits, SoftVp, attention};
use crate::wake::exact_timers;
use partition::clock::host_tsc;
use partition::{
    Activity, EngineError, Gpa, HypercallContext, HypercallOutcome, MsrOutcome, RunExit, TranslateMode, Vp, VpExits,
    VpIndex, VpState,
};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use x86::exception::has_error_code;
use x86::regs::rflags;

/// What the run loop remembers between instructions.
#[derive(Debug, Default)]
pub struct RunState {
    /// Idle by the guest-idle MSR: any interrupt ends it, even with IF clear.
    idle_any: bool,
    /// PAUSE instructions since the last yield.
    pauses: u32,
    /// Calls from translated code.
    pub(crate) calls: u32,
    /// A panic that must not unwind through translated code.
    pub(crate) panic: Option<Box<dyn std::any::Any + Send>>,
    /// System calls by SYSCALL and exceptions in ring 3.
    pub(crate) user_exits: u64,
    /// Where direct execution met a fault that the guest sees to (CR3, address): it will want the page.
    pub(crate) direct_fault: Option<(u64, u64)>,
    /// What translated code may rely on ([`crate::translate::facts`]).
    pub(crate) facts: Option<crate::translate::facts::Facts>,
}

/// How long the guest-idle MSR lasts at most while the local APIC accepts no interrupts: a VP that starts waits for a
/// lock before it has enabled its APIC, and the interrupt that is to wake it is dropped. Waking early is allowed (TLFS
/// section 10.1.4).
const DEAF_IDLE: Duration = Duration::from_millis(1);

/// PAUSEs of a spinning VP before it gives its host processor to another thread.
const PAUSES_BEFORE_YIELD: u32 = 64;

impl Vp for SoftVp {
    fn index(&self) -> VpIndex {
        self.index
    }

    fn prepare(&mut self) {
        self.prepare_direct();
    }

    fn run(&mut self, exits: &dyn VpExits) -> Result<RunExit, EngineError> {
        exact_timers();
        let partition = self.partition.clone();
        let shim = Shim { inner: exits, partition: partition.clone(), index: self.index };
        let attached = Attached::new(self, &shim, exits);
        self.refresh_tsc();
        self.apic.check_timer();
        partition.timers.notify();
        let result = catch_unwind(AssertUnwindSafe(|| self.run_loop()));
        self.leave();
        self.exits = None;
        drop(attached);
        self.publish();
        if let Some(what) = self.verify.difference.take() {
            return Err(EngineError::Internal { vp: self.index, what });
        }
        result.map_err(|panic| {
            let text = panic
                .downcast_ref::<String>()
                .map(String::as_str)
                .or_else(|| panic.downcast_ref::<&str>().copied())
                .unwrap_or("no message");
            let place = format!("at {:#x}:{:#x}", self.s.segments[x86::segment::sreg::CS].selector, self.s.rip);
            EngineError::Internal { vp: self.index, what: format!("{text}, {place}") }
        })
    }

    fn state(&mut self) -> Result<VpState, EngineError> {
        Ok(self.save_state())
    }

    fn set_state(&mut self, state: &VpState) -> Result<(), EngineError> {
        self.load_state(state)
    }
}

impl SoftVp {
    fn run_loop(&mut self) -> RunExit {
        self.enter();
        loop {
            if self.verify.difference.is_some() {
                return RunExit::Kicked;
            }
            let bits = self.s.attention.load(Ordering::SeqCst);
            let look = bits & !(attention::BOUNDARY | attention::CODE) != 0 || self.s.window != 0;
            if look && let Some(exit) = self.look_up() {
                return exit;
            }
            match self.activity {
                Activity::Running => {
                    self.deliver_loaded();
                    match self.partition.options.translate {
                        TranslateMode::Off => interp::run(self),
                        TranslateMode::On => crate::translate::run::run(self),
                        TranslateMode::Verify => crate::translate::verify::run(self),
                    }
                }
                Activity::Halted if self.s.pending_debug != 0 => self.set_activity(Activity::Running),
                Activity::Halted | Activity::WaitForSipi => self.idle(),
                Activity::Shutdown => return RunExit::TripleFault,
            }
        }
    }

    /// From here on translations may be in use: requests of others wait for this VP.
    fn enter(&mut self) {
        let shared = self.partition.shared(self.index);
        shared.waker.set_inside(true);
        shared.entered.store(host_tsc() | 1, Ordering::Relaxed);
    }

    fn leave(&mut self) {
        let partition = self.partition.clone();
        let shared = partition.shared(self.index);
        shared.waker.set_inside(false);
        let entered = shared.entered.swap(0, Ordering::Relaxed);
        if entered != 0 {
            shared.runtime.fetch_add(host_tsc().saturating_sub(entered), Ordering::Relaxed);
        }
        // A requester that waits for this VP need not wait out its time.
        self.publish();
    }

    fn publish(&mut self) {
        if let Some(t) = &self.translator {
            for (what, n) in
                [Count::Blocks, Count::Translated, Count::CacheFlushes, Count::Dropped].into_iter().zip(t.stats)
            {
                self.counts.set(what, n);
            }
        }
        self.counts.set(Count::Walks, self.mmu.walks);
        let exit_ticks = self.partition.shared(self.index).exit_ticks.load(Ordering::Relaxed);
        self.counts.set(Count::ExitTicks, exit_ticks);
        for (what, n) in
            [Count::Verified, Count::Unverified, Count::Retried, Count::FlagsLost].into_iter().zip(self.verify.counts)
        {
            self.counts.set(what, n);
        }
        let shared = self.partition.shared(self.index);
        shared.instructions.store(self.s.instructions, Ordering::Relaxed);
        shared.counts.store(&self.counts);
    }

    /// Sees to everything that other threads have raised. `Some`: `run` returns.
    fn look_up(&mut self) -> Option<RunExit> {
        const MINE: u32 = attention::KICK | attention::INTERRUPT | attention::REQUEST | attention::TIMER;
        let bits = self.s.attention.fetch_and(!MINE, Ordering::SeqCst);
        if bits & attention::REQUEST != 0 {
            SoftPartition::process_requests(self);
        }
        if bits & attention::KICK != 0 {
            self.s.attention.fetch_or(bits & (attention::INTERRUPT | attention::TIMER), Ordering::SeqCst);
            // A triple fault raises the bit too, to stop the interpreter.
            let down = self.activity == Activity::Shutdown;
            return Some(if down { RunExit::TripleFault } else { RunExit::Kicked });
        }
        if bits & attention::TIMER != 0 {
            self.apic.check_timer();
        }
        self.s.window = 0;
        self.take_events();
        None
    }

    /// INIT, start-up, NMI and interrupts, in the architecture's order (SDM volume 3, table 6-2).
    fn take_events(&mut self) {
        if self.activity == Activity::WaitForSipi
            && let Some(state) = self.partition.take_start(self.index)
        {
            self.start_with(&state);
            return;
        }
        let events = self.apic.events();
        if events & event::INIT != 0 {
            self.apic.take_event(event::INIT);
            self.init_reset();
        }
        if events & event::SIPI != 0
            && let Some(vector) = self.apic.take_sipi()
            && self.activity == Activity::WaitForSipi
        {
            self.start_up(vector);
        }
        if !matches!(self.activity, Activity::Running | Activity::Halted) {
            return;
        }
        if self.pending_exception.is_some() || self.pending_interrupt.is_some() {
            // They come first, and what their delivery does decides about the rest.
            self.deliver_loaded();
            self.s.attention.fetch_or(attention::INTERRUPT, Ordering::SeqCst);
            return;
        }
        // A debug trap of the last instruction comes before interrupts; the interpreter delivers it at this boundary.
        if self.s.pending_debug != 0 && !self.s.mov_ss_shadow {
            self.s.window = 1;
            return;
        }
        if events & event::NMI != 0 {
            if self.s.nmi_masked || self.s.mov_ss_shadow {
                self.s.window = 1;
            } else {
                self.apic.take_event(event::NMI);
                self.set_activity(Activity::Running);
                exception::deliver_nmi(self);
                self.s.attention.fetch_or(attention::INTERRUPT, Ordering::SeqCst);
                return;
            }
        }
        self.take_interrupt();
    }

    fn take_interrupt(&mut self) {
        let extint = self.index == 0 && self.apic.extint_pending();
        if self.activity == Activity::Halted && self.run.idle_any && (extint || self.apic.is_requested()) {
            self.run.idle_any = false;
            self.set_activity(Activity::Running);
        }
        let vector = self.apic.pending_vector();
        if !extint && vector.is_none() {
            return;
        }
        if self.s.rflags & rflags::IF == 0 || self.s.interrupt_shadow {
            self.s.window = 1;
            return;
        }
        let vector = if extint {
            match self.exits().acknowledge_extint(self.index) {
                Some(vector) => vector,
                None => return,
            }
        } else if let Some(vector) = vector {
            self.apic.acknowledge(vector);
            vector
        } else {
            return;
        };
        self.run.idle_any = false;
        self.set_activity(Activity::Running);
        self.direct_interrupted();
        self.partition.shared(self.index).interrupts.fetch_add(1, Ordering::Relaxed);
        exception::deliver_interrupt(self, vector);
        self.exits().interrupt_taken(self.index, vector);
        // Look again before the handler's first instruction: another one may wait for IF now.
        self.s.attention.fetch_or(attention::INTERRUPT, Ordering::SeqCst);
    }

    /// Starts with a complete state ([`partition::Partition::start_vp`]).
    fn start_with(&mut self, state: &VpState) {
        let mut state = state.clone();
        // The caller gives registers; the APIC is the VP's own.
        state.lapic = self.apic.state();
        state.activity = Activity::Running;
        if let Err(error) = self.load_state(&state) {
            tracing::warn!(vp = self.index, %error, "a VP was not started: its state is not valid");
            self.set_activity(Activity::WaitForSipi);
        }
    }

    /// Delivers what a loaded state had in flight.
    fn deliver_loaded(&mut self) {
        if self.pending_exception.is_none() && self.pending_interrupt.is_none() {
            return;
        }
        if self.activity == Activity::Halted {
            self.set_activity(Activity::Running);
        }
        if let Some(e) = self.pending_exception.take() {
            let error = e.error_code.unwrap_or(0);
            let fault = if e.vector == x86::exception::PF {
                Fault::Page { address: self.s.cr2, error }
            } else if has_error_code(e.vector) || e.error_code.is_none() {
                Fault::Exception { vector: e.vector, error }
            } else {
                return;
            };
            exception::deliver(self, fault);
        } else if let Some(vector) = self.pending_interrupt.take() {
            exception::deliver_interrupt(self, vector);
        }
    }

    /// Sleeps until something happens. Called at a boundary, halted or waiting for a start.
    fn idle(&mut self) {
        // What concerns only the next instruction must not keep the VP awake, and must not be lost.
        const LATER: u32 = attention::BOUNDARY | attention::CODE;
        let later = self.s.attention.fetch_and(!LATER, Ordering::SeqCst) & LATER;
        self.leave();
        let partition = self.partition.clone();
        let shared = partition.shared(self.index);
        let deadline = self.apic.take_deadline();
        let timeout = match deadline {
            NEVER => None,
            at => Some(partition.clock.until_tsc(at)).filter(|t| *t < Duration::from_secs(1 << 30)),
        };
        // No interrupt would end this: the guest looks again soon whether what it waits for has come.
        let deaf = self.run.idle_any && !self.apic.accepts();
        let looks = [timeout, at_rest(self), deaf.then_some(DEAF_IDLE)];
        let timeout = looks.into_iter().flatten().min();
        if timeout != Some(Duration::ZERO) {
            shared.halts.fetch_add(1, Ordering::Relaxed);
            shared.waker.sleep(&self.s.attention, timeout);
        }
        self.s.attention.fetch_or(later, Ordering::SeqCst);
        self.enter();
        if deaf {
            self.run.idle_any = false;
            self.set_activity(Activity::Running);
        }
        self.apic.check_timer();
    }

    /// RFLAGS.IF has become one, or the NMI mask was lifted: what waited for that is looked at before the next
    /// instruction. Called by every instruction that can do it (STI, POPF, IRET, SYSRET, a task switch).
    #[inline]
    pub fn interrupts_unblocked(&mut self) {
        if self.s.window != 0 {
            self.s.attention.fetch_or(attention::INTERRUPT, Ordering::SeqCst);
        }
    }

    /// PAUSE: the guest spins. Now and then another thread gets this host processor: it may run the VP that this one
    /// waits for.
    #[inline]
    pub fn spin_hint(&mut self) {
        self.run.pauses += 1;
        if self.run.pauses >= PAUSES_BEFORE_YIELD {
            self.run.pauses = 0;
            std::thread::yield_now();
        }
    }

    /// HLT (after its privilege check): the VP waits for an interrupt.
    pub fn halt(&mut self) {
        self.set_activity(Activity::Halted);
    }

    /// The guest-idle MSR: as HLT, but any interrupt ends it, even with interrupts disabled or by priority held back.
    pub(crate) fn idle_for_any(&mut self) {
        self.run.idle_any = true;
        self.set_activity(Activity::Halted);
        self.s.attention.fetch_or(attention::INTERRUPT, Ordering::SeqCst);
    }
}

/// Between the VP and the machine: a VP that is in the machine's hands counts as outside guest code, so that a device
/// which it waits for may ask things of all VPs.
struct Shim<'a> {
    inner: &'a dyn VpExits,
    partition: Arc<SoftPartition>,
    index: VpIndex,
}

/// The VP is outside while this lives.
struct Outside<'a> {
    shim: &'a Shim<'a>,
    was_inside: bool,
    begun: u64,
}

impl Shim<'_> {
    fn outside(&self) -> Outside<'_> {
        let shared = self.partition.shared(self.index);
        shared.exits.fetch_add(1, Ordering::Relaxed);
        Outside { shim: self, was_inside: shared.waker.set_inside(false), begun: host_tsc() }
    }
}

impl Drop for Outside<'_> {
    fn drop(&mut self) {
        let shared = self.shim.partition.shared(self.shim.index);
        shared.waker.set_inside(self.was_inside);
        shared.exit_ticks.fetch_add(host_tsc().wrapping_sub(self.begun), Ordering::Relaxed);
    }
}

impl VpExits for Shim<'_> {
    fn io_read(&self, vp: VpIndex, port: u16, data: &mut [u8]) {
        let _outside = self.outside();
        self.inner.io_read(vp, port, data);
    }
    fn io_write(&self, vp: VpIndex, port: u16, data: &[u8]) {
        let _outside = self.outside();
        self.inner.io_write(vp, port, data);
    }
    fn mmio_read(&self, vp: VpIndex, gpa: Gpa, data: &mut [u8]) {
        let _outside = self.outside();
        self.inner.mmio_read(vp, gpa, data);
    }
    fn mmio_write(&self, vp: VpIndex, gpa: Gpa, data: &[u8]) {
        let _outside = self.outside();
        self.inner.mmio_write(vp, gpa, data);
    }
    fn msr_read(&self, vp: VpIndex, msr: u32) -> MsrOutcome {
        let _outside = self.outside();
        self.inner.msr_read(vp, msr)
    }
    fn msr_write(&self, vp: VpIndex, msr: u32, value: u64) -> MsrOutcome {
        let _outside = self.outside();
        self.inner.msr_write(vp, msr, value)
    }
    fn hypercall(&self, vp: VpIndex, context: &mut dyn HypercallContext) -> HypercallOutcome {
        let _outside = self.outside();
        self.inner.hypercall(vp, context)
    }
    fn eoi(&self, vp: VpIndex, vector: u8) {
        let _outside = self.outside();
        self.inner.eoi(vp, vector);
    }
    fn acknowledge_extint(&self, vp: VpIndex) -> Option<u8> {
        let _outside = self.outside();
        self.inner.acknowledge_extint(vp)
    }
    fn interrupt_taken(&self, vp: VpIndex, vector: u8) {
        // No exit of the guest's: it asks nothing of other VPs.
        self.inner.interrupt_taken(vp, vector);
    }
}

thread_local! {
    /// The machine's side of the VP that runs on this thread.
    static EXITS: std::cell::Cell<Option<*const dyn VpExits>> = const { std::cell::Cell::new(None) };
}

/// Calls `f` with the machine's side of the VP that runs on this thread (or one that does nothing).
pub(crate) fn with_exits(f: impl FnOnce(&dyn VpExits)) {
    match EXITS.get() {
        // SAFETY: set by `Attached`, which clears it before the reference that it was made from ends.
        Some(exits) => f(unsafe { &*exits }),
        None => f(&NoExits),
    }
}

/// Declares for as long as it lives which VP runs on this thread.
struct Attached {
    vp: Option<(usize, VpIndex)>,
    exits: Option<*const dyn VpExits>,
}

impl Attached {
    fn new(vp: &mut SoftVp, shim: &Shim<'_>, exits: &dyn VpExits) -> Self {
        let shim: *const (dyn VpExits + '_) = shim;
        let exits: *const (dyn VpExits + '_) = exits;
        // SAFETY: only the lifetime is erased. `Vp::run` clears both before the references end: `vp.exits` itself, and
        // `EXITS` by dropping this (also when the loop panics, which it catches).
        let (shim, exits) = unsafe {
            (
                std::mem::transmute::<*const (dyn VpExits + '_), *const dyn VpExits>(shim),
                std::mem::transmute::<*const (dyn VpExits + '_), *const dyn VpExits>(exits),
            )
        };
        vp.exits = Some(shim);
        let place = Arc::as_ptr(&vp.partition).addr();
        Self { vp: set_current(Some((place, vp.index))), exits: EXITS.replace(Some(exits)) }
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        set_current(self.vp);
        EXITS.set(self.exits);
    }
}
