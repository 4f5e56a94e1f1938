//! [`HvPartition`]: the object that the machine plugs in, and what it asks of the machine.

use crate::defs::{Message, SINT_COUNT};
use crate::ports::{EventPort, MessagePort, Ports};
use crate::state::Global;
use crate::synic::{Actions, QueueFull, VpSynic};
use crate::time::TimeBase;
use partition::{Abilities, Clock, GuestMemory, Msi, Partition, Ticks100ns, VpIndex, VpSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

/// A synthetic timer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TimerId {
    /// Its VP.
    pub vp: VpIndex,
    /// 0 to 3.
    pub timer: u8,
}

/// Wakes us when a timer's time has come. Derived from the partition's [`Clock`] by the machine.
pub trait TimerService: Send + Sync {
    /// Arranges for [`HvPartition::timer_expired`] to be called, on any thread, when the guest's TSC (as
    /// [`Clock::tsc`] counts) has reached the deadline; `None` cancels. Replaces what was arranged for this timer.
    /// Must not call back before it returns. Being called too early or without need is harmless.
    fn arm(&self, timer: TimerId, tsc_deadline: Option<u64>);
}

/// The guest has crashed and said so (TLFS section 10.6).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CrashReport {
    /// The VP that reported.
    pub vp: VpIndex,
    /// The five parameters; their meaning is the guest's (Linux: error code, RIP, RAX, ...).
    pub parameters: [u64; 5],
    /// The guest's text (the tail of its log), if it gave one: at most 4 KiB, control characters replaced.
    pub message: Option<String>,
}

/// What the guest asks of the machine. Called on a VP's thread with no lock held.
pub trait HvHost: Send + Sync {
    /// The guest asked for a reset of the partition (`HV_X64_MSR_RESET`). The machine resets it soon after.
    fn reset(&self, vp: VpIndex);
    /// The guest has crashed. It may go on (Linux dumps its memory and then resets).
    fn crashed(&self, report: CrashReport);
}

/// What an [`HvPartition`] is made from.
pub struct HvConfig {
    /// Number of VPs, 1 to 64.
    pub vp_count: u32,
    /// Guest memory.
    pub memory: Arc<GuestMemory>,
    /// The partition's clock.
    pub clock: Arc<Clock>,
    /// Abilities of the engine: the same as were given to [`crate::cpuid::leaves`].
    pub abilities: Abilities,
    /// Port of [`partition::PartitionConfig::hypercall_port`].
    pub hypercall_port: u8,
    /// Frequency of the local APIC's timer in Hz, before its divider.
    pub apic_frequency_hz: u64,
    /// CPUID.1:EAX, which a VP that a hypercall starts finds in EDX.
    pub cpu_signature: u32,
    /// The machine.
    pub host: Arc<dyn HvHost>,
    /// Timers.
    pub timers: Arc<dyn TimerService>,
}

macro_rules! counters {
    ($($name:ident),*) => {
        /// How often guests have used what.
        #[derive(Default)]
        #[allow(missing_docs)]
        pub struct Counters { $(pub $name: AtomicU64),* }
        impl Counters {
            /// Names and values, in a fixed order.
            pub fn snapshot(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name.load(Ordering::Relaxed))),*]
            }
        }
    };
}
counters!(
    hypercalls,
    flush_hypercalls,
    ipi_hypercalls,
    messages_from_guest,
    events_from_guest,
    messages_to_guest,
    events_to_guest,
    timer_expirations,
    start_vp_hypercalls
);

impl Counters {
    pub(crate) fn count(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

/// Hyper-V's interface of one partition. All methods may be called from any thread.
pub struct HvPartition {
    pub(crate) config: HvConfig,
    pub(crate) time: TimeBase,
    partition: OnceLock<Arc<dyn Partition>>,
    pub(crate) global: Mutex<Global>,
    vps: Vec<Mutex<VpSynic>>,
    pub(crate) ports: Ports,
    counters: Counters,
}

impl HvPartition {
    /// In the state after power-on. [`HvPartition::attach`] must follow before a VP runs.
    pub fn new(config: HvConfig) -> Arc<Self> {
        let vps = (0..config.vp_count).map(|_| Mutex::new(VpSynic::default())).collect();
        Arc::new(Self {
            time: TimeBase::new(config.clock.clone()),
            config,
            partition: OnceLock::new(),
            global: Mutex::default(),
            vps,
            ports: Ports::default(),
            counters: Counters::default(),
        })
    }

    /// Hands over the engine's partition. Only the first call has an effect.
    pub fn attach(&self, partition: Arc<dyn Partition>) {
        let _ = self.partition.set(partition);
    }

    pub(crate) fn partition(&self) -> Option<&dyn Partition> {
        self.partition.get().map(|p| &**p)
    }

    /// Number of VPs.
    pub fn vp_count(&self) -> u32 {
        self.config.vp_count
    }

    /// The VPs that exist.
    pub(crate) fn all_vps(&self) -> VpSet {
        (0..self.config.vp_count).fold(VpSet::default(), VpSet::with)
    }

    /// Counters.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Reference time, as the guest reads it.
    pub fn reference_time(&self) -> Ticks100ns {
        self.time.now()
    }

    /// What the guest has written to `HV_X64_MSR_GUEST_OS_ID` (0: nothing yet).
    pub fn guest_os_id(&self) -> u64 {
        self.global().guest_os_id
    }

    pub(crate) fn global(&self) -> MutexGuard<'_, Global> {
        self.global.lock().unwrap_or_else(|e| e.into_inner())
    }

    pub(crate) fn vp_state(&self, vp: VpIndex) -> Option<MutexGuard<'_, VpSynic>> {
        Some(self.vps.get(vp as usize)?.lock().unwrap_or_else(|e| e.into_inner()))
    }

    /// Runs `f` on a VP's SynIC, then does what it asks of the engine, with the lock released.
    pub(crate) fn with_synic<R>(&self, vp: VpIndex, f: impl FnOnce(&mut VpSynic, &mut Actions) -> R) -> Option<R> {
        let mut actions = Actions::default();
        let result = f(&mut *self.vp_state(vp)?, &mut actions);
        self.interrupt(vp, &actions);
        Some(result)
    }

    fn interrupt(&self, vp: VpIndex, actions: &Actions) {
        if let Some(partition) = self.partition() {
            if let Some(vectors) = actions.auto_eoi {
                partition.set_auto_eoi(vp, vectors);
            }
            for vector in &actions.vectors {
                partition.signal_msi(Msi::fixed(vp, *vector));
            }
        }
    }

    /// Connects a message port: the guest reaches it with `HvCallPostMessage` on this connection id. `None` removes.
    pub fn set_message_port(&self, connection: u32, port: Option<Arc<dyn MessagePort>>) {
        self.ports.set_message(connection, port);
    }

    /// Connects an event port with a number of flags: the guest reaches it with `HvCallSignalEvent`. `None` removes.
    pub fn set_event_port(&self, connection: u32, port: Option<(Arc<dyn EventPort>, u16)>) {
        self.ports.set_event(connection, port);
    }

    /// Sends a message to a VP's SINT. It is delivered in order as soon as the slot is free (no polling: the guest's
    /// end-of-message brings the next).
    pub fn post_message(&self, vp: VpIndex, sint: u8, message: Message) -> Result<(), QueueFull> {
        Counters::count(&self.counters.messages_to_guest);
        self.with_synic(vp, |synic, actions| synic.post(self, sint, message, actions)).unwrap_or(Err(QueueFull))
    }

    /// Forgets the messages that wait for a VP's SINT.
    pub fn clear_messages(&self, vp: VpIndex, sint: u8) {
        self.with_synic(vp, |synic, _| {
            if let Some(queue) = synic.queues.get_mut(usize::from(sint)) {
                queue.clear();
            }
        });
    }

    /// Sets an event flag of a VP's SINT and interrupts the VP if the flag was clear. Says whether it was delivered (it
    /// is not while the guest has no event-flags page).
    pub fn signal_event(&self, vp: VpIndex, sint: u8, flag: u16) -> bool {
        Counters::count(&self.counters.events_to_guest);
        self.with_synic(vp, |synic, actions| synic.signal(self, sint, flag, actions)).unwrap_or(false)
    }

    /// The time of a timer has come (or not: that is checked).
    pub fn timer_expired(&self, timer: TimerId) {
        self.with_synic(timer.vp, |synic, actions| synic.timer_expired(self, timer, actions));
    }

    /// Back to the state after power-on (reset of the machine). Ports stay. VPs must not run.
    pub fn reset(&self) {
        *self.global() = Global::default();
        for vp in 0..self.config.vp_count {
            let Some(mut synic) = self.vp_state(vp) else { continue };
            *synic = VpSynic::default();
            for timer in 0..crate::defs::TIMER_COUNT as u8 {
                self.config.timers.arm(TimerId { vp, timer }, None);
            }
            drop(synic);
            if self.config.abilities.auto_eoi
                && let Some(partition) = self.partition()
            {
                partition.set_auto_eoi(vp, [0; 4]);
            }
        }
    }

    pub(crate) fn valid_sint(sint: u8) -> bool {
        usize::from(sint) < SINT_COUNT
    }
}
