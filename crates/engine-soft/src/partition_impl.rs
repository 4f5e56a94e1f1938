//! The partition of the software engine: what its VPs share, and how they ask things of each other.

use crate::apic::{ApicBus, Lapic, Offered, event};
use crate::code::CodeGenerations;
use crate::features::Features;
use crate::timers::Timers;
use crate::translate::verify::Turns;
use crate::vp::{SoftVp, attention};
use crate::wake::{Waker, futex_wait, futex_wake};
use partition::memory::page_flags;
use partition::{
    Abilities, Clock, DirectMode, DirtyPages, Engine, EngineError, EngineOptions, EngineStats, Gpa, GuestMemory,
    MemoryObserver, Msi, Partition, PartitionConfig, TlbFlush, TranslateMode, Vp, VpIndex, VpSet, VpState,
};
use std::collections::HashMap;
use std::ops::RangeInclusive;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, RwLock, Weak};
use std::time::Duration;
use x86::cpuid::CpuidTable;
use x86::paging::PAGE_SIZE;

/// The software engine.
#[derive(Clone, Copy, Debug, Default)]
pub struct SoftEngine;

impl SoftEngine {
    /// The engine; it needs nothing from the host.
    pub fn new() -> Self {
        Self
    }
}

const ABILITIES: Abilities = Abilities { remote_tlb_flush: true, doorbells: true, auto_eoi: true, apic_access: true };

impl Engine for SoftEngine {
    fn name(&self) -> &'static str {
        "soft"
    }
    fn abilities(&self) -> Abilities {
        ABILITIES
    }
    fn uses_processes(&self, options: &EngineOptions) -> bool {
        options.direct != DirectMode::Off && options.translate == TranslateMode::On
    }
    fn create(&self, config: PartitionConfig) -> Result<Arc<dyn Partition>, EngineError> {
        crate::rest::keep_tables_apart();
        Ok(SoftPartition::new(config)?)
    }
}

/// What one VP asks of others (through [`SoftPartition::request`]).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Drop all translations.
    FlushAll,
    /// Drop all translations but global ones.
    FlushNonGlobal,
    /// Drop one address space's translations (a CR3 value).
    FlushAddressSpace(u64),
    /// Drop ranges in every address space: first address, number of pages.
    FlushRanges(Arc<[(u64, u64)]>),
    /// Drop cached write permissions for the physical page with this address.
    DropWrite(u64),
    /// Drop all cached write permissions.
    DropAllWrites,
    /// The mappings of physical memory have changed.
    MappingsChanged,
}

/// Above this many pages a flush of ranges becomes a flush of everything.
const MAX_RANGE_PAGES: u64 = 64;

#[derive(Default)]
struct Mailbox {
    requests: Vec<Request>,
    /// Requests ever posted.
    posted: u64,
}

/// What other threads know of a VP.
pub struct VpShared {
    /// Attention and sleep.
    pub waker: Arc<Waker>,
    /// Its local APIC.
    pub apic: Arc<Lapic>,
    mailbox: Mutex<Mailbox>,
    /// Requests processed.
    processed: AtomicU64,
    /// Changes with `processed`; requesters wait on it.
    progress: AtomicU32,
    taken: AtomicBool,
    /// State to start with, from [`Partition::start_vp`].
    start: Mutex<Option<Box<VpState>>>,
    /// The VP waits for SIPI (as far as others can know).
    pub(crate) waiting: AtomicBool,
    /// Host TSC ticks spent in guest code.
    pub(crate) runtime: AtomicU64,
    /// Host TSC when guest code was entered; 0: not inside.
    pub(crate) entered: AtomicU64,
    /// Guest instructions, brought up to date now and then.
    pub(crate) instructions: AtomicU64,
    pub(crate) exits: AtomicU64,
    pub(crate) interrupts: AtomicU64,
    pub(crate) halts: AtomicU64,
    /// Host TSC ticks in exits.
    pub(crate) exit_ticks: AtomicU64,
    pub(crate) counts: crate::stats::Published,
}

/// A partition of the software engine.
pub struct SoftPartition {
    /// Guest memory.
    pub memory: Arc<GuestMemory>,
    /// The clock.
    pub clock: Arc<Clock>,
    /// CPUID tables, by VP.
    pub cpuid: Vec<CpuidTable>,
    /// MSRs that the machine answers.
    pub msr_exits: Vec<RangeInclusive<u32>>,
    /// OUT to this port is a hypercall.
    pub hypercall_port: Option<u8>,
    /// Options.
    pub options: EngineOptions,
    /// Change counters of code pages.
    pub code_generations: CodeGenerations,
    /// Code pages that were written, oldest first, after a number of forgotten ones.
    pub(crate) changed_code: Mutex<(u64, Vec<u64>)>,
    /// Held around a locked read-modify-write that cannot be one host instruction.
    pub bus_lock: Mutex<()>,
    /// With [`partition::TranslateMode::Verify`] one VP executes at a time.
    pub(crate) turns: Turns,
    /// Local APICs.
    pub apics: ApicBus,
    /// The timer thread.
    pub timers: Arc<Timers>,
    vps: Box<[VpShared]>,
    /// Pages for which a drop of write permissions is under way, and how many there are.
    arming: Mutex<HashMap<u64, u32>>,
    arming_count: AtomicUsize,
    doorbells: RwLock<HashMap<u64, OwnedFd>>,
    any_doorbells: AtomicBool,
    me: Weak<SoftPartition>,
}

/// The memory's ear. It does not keep the partition alive.
struct Observer(Weak<SoftPartition>);

impl MemoryObserver for Observer {
    fn mapping_changed(&self, gpa: Gpa, len: u64) {
        if let Some(p) = self.0.upgrade() {
            p.mapping_changed(gpa, len);
        }
    }
    fn code_written(&self, gpa: Gpa, len: u64) {
        if let Some(p) = self.0.upgrade() {
            p.code_written(gpa.0, len);
        }
    }
    fn dirty_reset(&self) {
        if let Some(p) = self.0.upgrade() {
            p.request(current_vp(&p), p.all_vps(), &Request::DropAllWrites);
        }
    }
}

thread_local! {
    /// The VP whose thread this is, while it runs: the partition's address and the number.
    static CURRENT: std::cell::Cell<Option<(usize, VpIndex)>> = const { std::cell::Cell::new(None) };
}

/// The VP of `partition` that the calling thread runs, if it runs one.
pub(crate) fn current_vp(partition: &SoftPartition) -> Option<VpIndex> {
    CURRENT.get().filter(|(p, _)| *p == std::ptr::from_ref(partition).addr()).map(|(_, vp)| vp)
}

/// Declares which VP the calling thread runs; returns what was declared before.
pub(crate) fn set_current(vp: Option<(usize, VpIndex)>) -> Option<(usize, VpIndex)> {
    CURRENT.replace(vp)
}

impl SoftPartition {
    /// Makes a partition; VPs are in the reset state.
    pub fn new(config: PartitionConfig) -> Result<Arc<Self>, EngineError> {
        let count = config.vp_count;
        if count == 0 || count > partition::engine::MAX_VPS {
            return Err(EngineError::Config(format!(
                "{count} VPs were asked for; there can be 1 to {}",
                partition::engine::MAX_VPS
            )));
        }
        if config.cpuid.len() != count as usize {
            return Err(EngineError::Config(format!(
                "there are {} CPUID tables for {count} VPs; one for each is needed",
                config.cpuid.len()
            )));
        }
        // What the host's own units execute must be there: a restored machine may come from a better host.
        let missing = x86::cpuid::lacking_on_host(&config.cpuid[0]);
        if !missing.is_empty() {
            let reason = format!("this host's processor lacks {}, which the processor model has", missing.join(", "));
            return Err(EngineError::Unavailable { engine: "soft", reason });
        }
        let wakers: Vec<_> = (0..count).map(|_| Arc::new(Waker::new())).collect();
        let timers = Arc::new(Timers::new(config.clock.clone(), &wakers));
        let mut lapics = Vec::new();
        let mut vps = Vec::new();
        for (index, waker) in (0..count).zip(&wakers) {
            let model = Features::from_table(&config.cpuid[index as usize]);
            let offered = Offered { x2apic: model.x2apic(), tsc_deadline: model.tsc_deadline() };
            let apic = Arc::new(Lapic::new(index, offered, config.clock.clone(), waker.clone(), timers.clone()));
            lapics.push(apic.clone());
            vps.push(VpShared {
                waker: waker.clone(),
                apic,
                mailbox: Mutex::new(Mailbox::default()),
                processed: AtomicU64::new(0),
                progress: AtomicU32::new(0),
                taken: AtomicBool::new(false),
                start: Mutex::new(None),
                waiting: AtomicBool::new(index != 0),
                runtime: AtomicU64::new(0),
                entered: AtomicU64::new(0),
                instructions: AtomicU64::new(0),
                exits: AtomicU64::new(0),
                interrupts: AtomicU64::new(0),
                halts: AtomicU64::new(0),
                exit_ticks: AtomicU64::new(0),
                counts: crate::stats::Published::default(),
            });
        }
        let memory = config.memory.clone();
        let partition = Arc::new_cyclic(|me: &Weak<Self>| Self {
            memory: config.memory,
            clock: config.clock,
            cpuid: config.cpuid,
            msr_exits: config.msr_exits,
            hypercall_port: config.hypercall_port,
            options: config.options,
            code_generations: CodeGenerations::new(),
            changed_code: Mutex::new((0, Vec::new())),
            bus_lock: Mutex::new(()),
            turns: Turns::default(),
            apics: ApicBus::new(lapics.into_boxed_slice()),
            timers,
            vps: vps.into_boxed_slice(),
            arming: Mutex::new(HashMap::new()),
            arming_count: AtomicUsize::new(0),
            doorbells: RwLock::new(HashMap::new()),
            any_doorbells: AtomicBool::new(false),
            me: me.clone(),
        });
        memory.add_observer(Arc::new(Observer(partition.me.clone())));
        Ok(partition)
    }

    /// Number of VPs.
    pub fn vp_count(&self) -> u32 {
        self.vps.len() as u32
    }

    /// Every VP.
    pub fn all_vps(&self) -> VpSet {
        VpSet(u64::MAX >> (64 - self.vps.len()))
    }

    /// What is shared of a VP.
    ///
    /// # Panics
    /// If there is no such VP: callers have the number from a VP of this partition.
    pub fn shared(&self, vp: VpIndex) -> &VpShared {
        &self.vps[vp as usize]
    }

    fn known(&self, vp: VpIndex) -> Option<&VpShared> {
        self.vps.get(vp as usize)
    }

    /// Is this MSR the machine's?
    pub fn msr_is_machines(&self, msr: u32) -> bool {
        self.msr_exits.iter().any(|range| range.contains(&msr))
    }

    // ---- requests ------------------------------------------------------------------------------------------------

    /// Has every VP in `targets` do something before it executes its next guest instruction, and waits until each has
    /// or is outside guest code. `from` is the VP whose thread calls: while it waits it counts as outside, so that two
    /// that wait for each other do not; its own copy (if it is among the targets) is done at its next boundary.
    ///
    /// The caller must not go on using host addresses that it looked up before.
    pub fn request(&self, from: Option<VpIndex>, targets: VpSet, request: &Request) {
        let mut posted = [0u64; 64];
        for vp in targets.iter() {
            let Some(target) = self.known(vp) else { continue };
            {
                let mut mailbox = target.mailbox.lock().unwrap_or_else(|e| e.into_inner());
                // What the last request in the box covers anyway is not added; it waits for that one.
                if mailbox.requests.last() != Some(request) {
                    mailbox.requests.push(request.clone());
                }
                mailbox.posted += 1;
                posted[vp as usize] = mailbox.posted;
            }
            target.waker.raise(attention::REQUEST);
        }
        let me = from.and_then(|vp| self.known(vp));
        let was_inside = me.is_some_and(|me| me.waker.set_inside(false));
        for vp in targets.iter().filter(|vp| Some(*vp) != from) {
            if let Some(target) = self.known(vp) {
                self.wait_for(target, posted[vp as usize]);
            }
        }
        if let Some(me) = me {
            me.waker.set_inside(was_inside);
        }
    }

    fn wait_for(&self, target: &VpShared, posted: u64) {
        let mut tries = 0;
        loop {
            let progress = target.progress.load(Ordering::SeqCst);
            if target.processed.load(Ordering::SeqCst) >= posted || !target.waker.is_inside() {
                return;
            }
            tries += 1;
            if tries < 200 {
                std::hint::spin_loop();
            } else {
                // The target may leave guest code without touching its mailbox, so the wait is short.
                futex_wait(&target.progress, progress, Some(Duration::from_micros(100)));
            }
        }
    }

    /// A VP does what others have asked of it. Called at a boundary, on its own thread.
    pub fn process_requests(vp: &mut SoftVp) {
        let partition = vp.partition.clone();
        let shared = partition.shared(vp.index);
        let (requests, posted) = {
            let mut mailbox = shared.mailbox.lock().unwrap_or_else(|e| e.into_inner());
            (std::mem::take(&mut mailbox.requests), mailbox.posted)
        };
        for request in &requests {
            match request {
                Request::FlushAll => vp.flush_tlb_all(),
                // Which PCID an address space has here is not known: every one without global pages.
                Request::FlushNonGlobal | Request::FlushAddressSpace(_) => vp.flush_tlb_non_global(),
                Request::FlushRanges(ranges) => {
                    for &(start, pages) in ranges.iter() {
                        for page in 0..pages {
                            vp.invlpg(start.wrapping_add(page * PAGE_SIZE));
                        }
                    }
                }
                Request::DropWrite(gpa) => vp.drop_write_permission(*gpa),
                Request::DropAllWrites => vp.drop_all_write_permissions(),
                Request::MappingsChanged => vp.mappings_changed(),
            }
        }
        shared.processed.store(posted, Ordering::SeqCst);
        shared.progress.fetch_add(1, Ordering::SeqCst);
        futex_wake(&shared.progress);
    }

    // ---- code pages ----------------------------------------------------------------------------------------------

    /// From now on writes to the page (number: address divided by 4096) are noticed. Returns the generation to keep with
    /// what is derived from the page's bytes, which the caller reads after this call: a write that comes in between has
    /// changed the generation by then.
    pub fn track_code(&self, gpa_page: u64) -> u32 {
        let generation = self.code_generations.get(gpa_page);
        let gpa = Gpa(gpa_page * PAGE_SIZE);
        let old = self.memory.with_page(gpa, |page| page.flags.fetch_or(page_flags::CODE, Ordering::SeqCst));
        let Some(old) = old else { return generation };
        let first = old & page_flags::CODE == 0 && old & page_flags::WRITE_CACHED != 0;
        // Somebody else has set the flag, but VPs may still hold write permissions until its request is done.
        let second = self.arming_count.load(Ordering::SeqCst) != 0
            && self.arming.lock().unwrap_or_else(|e| e.into_inner()).contains_key(&gpa_page);
        if first || second {
            self.arm(gpa_page, gpa);
        }
        generation
    }

    fn arm(&self, gpa_page: u64, gpa: Gpa) {
        let lock = || self.arming.lock().unwrap_or_else(|e| e.into_inner());
        self.arming_count.fetch_add(1, Ordering::SeqCst);
        *lock().entry(gpa_page).or_insert(0) += 1;
        self.memory.with_page(gpa, |page| page.flags.fetch_and(!page_flags::WRITE_CACHED, Ordering::SeqCst));
        let from = current_vp(self);
        self.request(from, self.all_vps(), &Request::DropWrite(gpa.0));
        let mut arming = lock();
        if let Some(n) = arming.get_mut(&gpa_page) {
            *n -= 1;
            if *n == 0 {
                arming.remove(&gpa_page);
            }
        }
        self.arming_count.fetch_sub(1, Ordering::SeqCst);
    }

    /// Bytes of tracked pages have been written: whatever was derived from them is stale from now on.
    pub fn code_written(&self, gpa: u64, len: u64) {
        if len == 0 {
            return;
        }
        for page in gpa / PAGE_SIZE..=gpa.saturating_add(len - 1) / PAGE_SIZE {
            // The next user tracks the page again; until then writes to it are free.
            self.memory.with_page(Gpa(page * PAGE_SIZE), |p| p.flags.fetch_and(!page_flags::CODE, Ordering::SeqCst));
            self.code_generations.bump(page);
            let mut log = self.changed_code.lock().unwrap_or_else(|e| e.into_inner());
            if log.1.len() >= 8192 {
                log.0 += log.1.len() as u64;
                log.1.clear();
            }
            log.1.push(page);
        }
        for vp in &self.vps {
            vp.waker.raise(attention::CODE);
        }
    }

    fn mapping_changed(&self, gpa: Gpa, len: u64) {
        // More pages than counters would only bump the same counters again.
        let pages = (len / PAGE_SIZE).min(1 << 16);
        for page in 0..pages {
            self.code_generations.bump(gpa.0 / PAGE_SIZE + page);
        }
        {
            // Too many to name: whoever reads the log finds that it has missed some.
            let mut log = self.changed_code.lock().unwrap_or_else(|e| e.into_inner());
            log.0 += log.1.len() as u64 + 1;
            log.1.clear();
        }
        for vp in &self.vps {
            vp.waker.raise(attention::CODE);
        }
        self.request(current_vp(self), self.all_vps(), &Request::MappingsChanged);
    }

    // ---- doorbells -----------------------------------------------------------------------------------------------

    /// Signals the doorbell at this address, if there is one.
    pub fn ring(&self, gpa: Gpa, data: &[u8]) -> bool {
        if data.len() != 4 || !self.any_doorbells.load(Ordering::Relaxed) {
            return false;
        }
        let doorbells = self.doorbells.read().unwrap_or_else(|e| e.into_inner());
        let Some(event) = doorbells.get(&gpa.0) else { return false };
        let one = 1u64;
        // SAFETY: writes 8 bytes from a live variable to a descriptor that we own. A full counter (EAGAIN) means that
        // the event is signalled already.
        unsafe { libc::write(event.as_raw_fd(), std::ptr::from_ref(&one).cast(), 8) };
        true
    }

    /// Takes the state that [`Partition::start_vp`] left for a VP.
    pub(crate) fn take_start(&self, vp: VpIndex) -> Option<Box<VpState>> {
        self.shared(vp).start.lock().unwrap_or_else(|e| e.into_inner()).take()
    }
}

impl Partition for SoftPartition {
    fn abilities(&self) -> Abilities {
        ABILITIES
    }

    fn take_vp(&self, index: VpIndex) -> Result<Box<dyn Vp>, EngineError> {
        let me = self.me.upgrade().ok_or_else(|| EngineError::Config("the partition is going away".into()))?;
        let shared =
            self.known(index).ok_or_else(|| EngineError::Config(format!("there is no VP {index} in the partition")))?;
        if shared.taken.swap(true, Ordering::SeqCst) {
            return Err(EngineError::Config(format!("VP {index} has been taken already")));
        }
        Ok(Box::new(SoftVp::new(me, index)))
    }

    fn kick(&self, vp: VpIndex) {
        if let Some(vp) = self.known(vp) {
            vp.waker.raise(attention::KICK);
        }
    }

    fn signal_msi(&self, msi: Msi) {
        self.apics.deliver_msi(msi);
    }

    fn set_extint(&self, asserted: bool) {
        self.vps[0].apic.set_extint(asserted);
    }

    fn nmi(&self, vp: VpIndex) {
        if let Some(vp) = self.known(vp) {
            vp.apic.signal(event::NMI);
        }
    }

    fn init(&self, vp: VpIndex) {
        if let Some(vp) = self.known(vp) {
            vp.apic.signal(event::INIT);
        }
    }

    fn sipi(&self, vp: VpIndex, vector: u8) {
        if let Some(vp) = self.known(vp) {
            vp.apic.signal_sipi(vector);
        }
    }

    fn start_vp(&self, vp: VpIndex, state: Box<VpState>) -> Result<(), EngineError> {
        let shared = self.known(vp).ok_or_else(|| EngineError::State(format!("there is no VP {vp}")))?;
        if !shared.waiting.swap(false, Ordering::SeqCst) {
            return Err(EngineError::State(format!("VP {vp} does not wait to be started")));
        }
        *shared.start.lock().unwrap_or_else(|e| e.into_inner()) = Some(state);
        shared.waker.raise(attention::INTERRUPT);
        Ok(())
    }

    fn set_ioapic_routes(&self, _routes: &[Option<Msi>]) {
        // Every EOI is seen here.
    }

    fn flush_tlb(&self, from: Option<VpIndex>, targets: VpSet, what: TlbFlush<'_>) {
        let request = match what {
            TlbFlush::All => Request::FlushAll,
            TlbFlush::NonGlobal => Request::FlushNonGlobal,
            TlbFlush::AddressSpace(cr3) => Request::FlushAddressSpace(cr3),
            TlbFlush::Ranges(ranges) => {
                let pages = ranges.iter().fold(0u64, |sum, r| sum.saturating_add(r.1));
                if pages > MAX_RANGE_PAGES { Request::FlushAll } else { Request::FlushRanges(ranges.into()) }
            }
        };
        self.request(from, VpSet(targets.0 & self.all_vps().0), &request);
    }

    fn set_auto_eoi(&self, vp: VpIndex, vectors: [u64; 4]) {
        if let Some(vp) = self.known(vp) {
            vp.apic.set_auto_eoi(vectors);
        }
    }

    fn apic_read(&self, vp: VpIndex, register: u32) -> u64 {
        self.known(vp).map_or(0, |vp| vp.apic.read_any(register))
    }

    fn apic_write(&self, vp: VpIndex, register: u32, value: u64) {
        if let Some(shared) = self.known(vp) {
            crate::run::with_exits(|exits| shared.apic.write_any(&self.apics, exits, register, value));
        }
    }

    fn register_doorbell(&self, gpa: Gpa, event: BorrowedFd<'_>) -> Result<(), EngineError> {
        let event = event
            .try_clone_to_owned()
            .map_err(|source| EngineError::Host { call: "duplicate a doorbell's descriptor", source })?;
        self.doorbells.write().unwrap_or_else(|e| e.into_inner()).insert(gpa.0, event);
        self.any_doorbells.store(true, Ordering::SeqCst);
        Ok(())
    }

    fn track_dirty(&self, on: bool) -> Result<(), EngineError> {
        self.memory.set_dirty_tracking(on);
        Ok(())
    }

    fn take_dirty(&self, gpa: Gpa, pages: u64) -> Result<DirtyPages, EngineError> {
        Ok(self.memory.take_dirty(gpa, pages))
    }

    fn vp_runtime(&self, vp: VpIndex) -> partition::Ticks100ns {
        let Some(vp) = self.known(vp) else { return 0 };
        let entered = vp.entered.load(Ordering::Relaxed);
        let running = if entered == 0 { 0 } else { partition::clock::host_tsc().saturating_sub(entered) };
        self.clock.tsc_to_100ns(vp.runtime.load(Ordering::Relaxed) + running)
    }

    fn stats(&self) -> EngineStats {
        let sum = |f: fn(&VpShared) -> &AtomicU64| self.vps.iter().map(|vp| f(vp).load(Ordering::Relaxed)).sum();
        let mut counters = vec![
            ("exits", sum(|vp| &vp.exits)),
            ("interrupts", sum(|vp| &vp.interrupts)),
            ("halts", sum(|vp| &vp.halts)),
        ];
        counters.extend(crate::stats::report(self.vps.iter().map(|vp| &vp.counts), sum(|vp| &vp.runtime)));
        EngineStats { instructions: sum(|vp| &vp.instructions), counters }
    }
}
