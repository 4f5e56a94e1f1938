//! The partition: what reaches VPs from outside.

use crate::engine::ABILITIES;
use crate::run::KvmVp;
use crate::slots::Slots;
use crate::{cpuid, sys};
use kvm_bindings::{
    CpuId, KVM_CAP_DISABLE_QUIRKS2, KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X2APIC_API, KVM_CAP_X86_USER_SPACE_MSR,
    KVM_IRQ_ROUTING_MSI, KVM_MSR_EXIT_REASON_FILTER, KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK,
    KVM_X2APIC_API_USE_32BIT_IDS, KVM_X86_QUIRK_FIX_HYPERCALL_INSN, KVM_X86_QUIRK_LINT0_REENABLED,
    KVM_X86_QUIRK_OUT_7E_INC_RIP, KvmIrqRouting, kvm_enable_cap, kvm_irq_routing_entry, kvm_msi,
};
use kvm_ioctls::{Kvm, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VcpuFd, VmFd};
use partition::{
    Abilities, Clock, DirtyPages, EngineError, EngineStats, Gpa, GuestMemory, MemoryObserver, Msi, Partition,
    PartitionConfig, Ticks100ns, TlbFlush, Vp, VpIndex, VpSet, VpState,
};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};

/// Pins of the machine's I/O APIC.
const IOAPIC_PINS: usize = 24;
/// Where Intel processors without unrestricted guest mode keep KVM's helpers: inside the 32-bit hole, below the ROM.
const TSS_ADDRESS: usize = 0xfffb_d000;
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;
/// Most MSRs in one range of the filter (a bitmap of 0x600 bytes).
const FILTER_RANGE: u32 = 0x600 * 8;

/// The thread that runs a VP, while it does.
pub(crate) struct Running {
    pub thread: libc::pthread_t,
    /// `immediate_exit` of the VP's `kvm_run`.
    pub immediate_exit: NonNull<AtomicU8>,
    /// Its processor-time clock.
    pub cpu_clock: libc::clockid_t,
    /// What that clock said when `run` began, in nanoseconds.
    pub cpu_start: u64,
}

// SAFETY: the pointer is to an atomic in a mapping that lives as long as the VP, which removes this first.
unsafe impl Send for Running {}

/// What other threads know of a VP.
pub(crate) struct Shared {
    /// The vCPU before it is taken.
    fd: Mutex<Option<VcpuFd>>,
    pub running: Mutex<Option<Running>>,
    /// `run` is to return.
    pub kicked: AtomicBool,
    /// State to start with.
    pub start: Mutex<Option<Box<VpState>>>,
    /// Waits to be started, as far as known.
    pub waiting: AtomicBool,
    /// Nanoseconds of processor time of finished runs.
    pub runtime_ns: AtomicU64,
    pub exits: AtomicU64,
}

/// A partition on KVM.
pub struct KvmPartition {
    pub(crate) vm: VmFd,
    pub(crate) memory: Arc<GuestMemory>,
    pub(crate) clock: Arc<Clock>,
    pub(crate) hypercall_port: Option<u8>,
    pub(crate) msr_list: Vec<u32>,
    pub(crate) cpuid: Vec<CpuId>,
    pub(crate) signatures: Vec<u32>,
    slots: Mutex<Slots>,
    shared: Box<[Shared]>,
    /// Level of the PIC's output.
    pub(crate) extint: AtomicBool,
    me: Weak<KvmPartition>,
}

struct Observer(Weak<KvmPartition>);

impl MemoryObserver for Observer {
    fn mapping_changed(&self, gpa: Gpa, len: u64) {
        if let Some(p) = self.0.upgrade()
            && let Err(error) = p.lock_slots().update(&p.vm, &p.memory)
        {
            tracing::error!(%gpa, len, %error, "KVM does not take the new memory mapping");
        }
    }
    fn code_written(&self, _: Gpa, _: u64) {
        // The processor watches its own instruction cache.
    }
    fn dirty_reset(&self) {
        // KVM write-protects pages as it reports them.
    }
}

fn enable(vm: &VmFd, call: &'static str, cap: u32, argument: u64) -> Result<(), EngineError> {
    let mut request = kvm_enable_cap { cap, ..Default::default() };
    request.args[0] = argument;
    vm.enable_cap(&request).map_err(sys::host(call))
}

impl KvmPartition {
    pub(crate) fn new(kvm: &Kvm, supported: &CpuId, config: PartitionConfig) -> Result<Arc<Self>, EngineError> {
        let count = config.vp_count;
        if count == 0 || count > partition::engine::MAX_VPS || config.cpuid.len() != count as usize {
            return Err(EngineError::Config(format!(
                "{count} VPs with {} CPUID tables were asked for; there can be 1 to {} VPs, each with its table",
                config.cpuid.len(),
                partition::engine::MAX_VPS
            )));
        }
        let cpuid = config.cpuid.iter().map(|t| cpuid::to_kvm(t, supported)).collect::<Result<Vec<_>, _>>()?;
        let vm = kvm.create_vm().map_err(sys::host("KVM_CREATE_VM"))?;
        // Only Intel needs these two, and some other KVMs refuse them.
        let _ = vm.set_identity_map_address(IDENTITY_MAP_ADDRESS);
        let _ = vm.set_tss_address(TSS_ADDRESS);
        let quirks = KVM_X86_QUIRK_LINT0_REENABLED | KVM_X86_QUIRK_OUT_7E_INC_RIP | KVM_X86_QUIRK_FIX_HYPERCALL_INSN;
        let known = kvm.check_extension_raw(KVM_CAP_DISABLE_QUIRKS2.into()) as u32;
        enable(&vm, "disabling KVM's quirks", KVM_CAP_DISABLE_QUIRKS2, (quirks & known).into())?;
        enable(&vm, "KVM_CAP_SPLIT_IRQCHIP", KVM_CAP_SPLIT_IRQCHIP, IOAPIC_PINS as u64)?;
        let x2apic = KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK;
        enable(&vm, "KVM_CAP_X2APIC_API", KVM_CAP_X2APIC_API, x2apic.into())?;
        enable(&vm, "KVM_CAP_X86_USER_SPACE_MSR", KVM_CAP_X86_USER_SPACE_MSR, KVM_MSR_EXIT_REASON_FILTER.into())?;
        set_filter(&vm, &config)?;
        let msr_list = kvm.get_msr_index_list().map_err(sys::host("KVM_GET_MSR_INDEX_LIST"))?.as_slice().to_vec();
        let mut shared = Vec::new();
        for (index, cpuid) in (0..count).zip(&cpuid) {
            let fd = vm.create_vcpu(index.into()).map_err(sys::host("KVM_CREATE_VCPU"))?;
            fd.set_cpuid2(cpuid).map_err(sys::host("KVM_SET_CPUID2"))?;
            shared.push(Shared {
                fd: Mutex::new(Some(fd)),
                running: Mutex::new(None),
                kicked: AtomicBool::new(false),
                start: Mutex::new(None),
                waiting: AtomicBool::new(index != 0),
                runtime_ns: AtomicU64::new(0),
                exits: AtomicU64::new(0),
            });
        }
        let memory = config.memory.clone();
        let signatures = config.cpuid.iter().map(|t| t.get(1, 0).eax).collect();
        let partition = Arc::new_cyclic(|me: &Weak<Self>| Self {
            vm,
            memory: config.memory,
            clock: config.clock,
            hypercall_port: config.hypercall_port,
            msr_list,
            cpuid,
            signatures,
            slots: Mutex::new(Slots::default()),
            shared: shared.into_boxed_slice(),
            extint: AtomicBool::new(false),
            me: me.clone(),
        });
        memory.add_observer(Arc::new(Observer(partition.me.clone())));
        partition.lock_slots().update(&partition.vm, &memory)?;
        Ok(partition)
    }

    fn lock_slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// What is shared of a VP that exists.
    pub(crate) fn shared(&self, vp: VpIndex) -> &Shared {
        &self.shared[vp as usize]
    }

    fn known(&self, vp: VpIndex) -> Option<&Shared> {
        self.shared.get(vp as usize)
    }

    /// Has the VP's thread come out of `KVM_RUN` and look around.
    fn interrupt(&self, shared: &Shared) {
        let running = shared.running.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(r) = &*running {
            // SAFETY: the VP removes `running` under this lock before its `kvm_run` goes away and before its thread ends.
            unsafe {
                r.immediate_exit.as_ref().store(1, Ordering::SeqCst);
                libc::pthread_kill(r.thread, sys::kick_signal());
            }
        }
    }

    /// Sends an interrupt message with a delivery mode and vector to one VP. KVM takes NMI, INIT and start-up as MSIs.
    fn send(&self, vp: VpIndex, delivery_mode: u32, vector: u8) {
        let msi = Msi::fixed(vp, vector);
        self.signal_msi(Msi { data: msi.data | delivery_mode << 8, ..msi });
    }
}

fn set_filter(vm: &VmFd, config: &PartitionConfig) -> Result<(), EngineError> {
    // A clear bit denies, and a denied access is an exit.
    let zeros = vec![0u8; FILTER_RANGE as usize / 8];
    let mut ranges = Vec::new();
    for range in &config.msr_exits {
        let (mut base, last) = (*range.start(), *range.end());
        while base <= last {
            let msr_count = (last - base).saturating_add(1).min(FILTER_RANGE);
            let flags = MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE;
            ranges.push(MsrFilterRange { flags, base, msr_count, bitmap: &zeros });
            match base.checked_add(msr_count) {
                Some(next) => base = next,
                None => break,
            }
        }
    }
    if ranges.is_empty() {
        return Ok(());
    }
    vm.set_msr_filter(MsrFilterDefaultAction::ALLOW, &ranges).map_err(sys::host("KVM_X86_SET_MSR_FILTER"))
}

impl Partition for KvmPartition {
    fn abilities(&self) -> Abilities {
        ABILITIES
    }

    fn take_vp(&self, index: VpIndex) -> Result<Box<dyn Vp>, EngineError> {
        let me = self.me.upgrade().ok_or_else(|| EngineError::Config("the partition is going away".into()))?;
        let shared =
            self.known(index).ok_or_else(|| EngineError::Config(format!("there is no VP {index} in the partition")))?;
        let fd = shared.fd.lock().unwrap_or_else(|e| e.into_inner()).take();
        let fd = fd.ok_or_else(|| EngineError::Config(format!("VP {index} has been taken already")))?;
        Ok(Box::new(KvmVp::new(me, index, fd)?))
    }

    fn kick(&self, vp: VpIndex) {
        if let Some(shared) = self.known(vp) {
            shared.kicked.store(true, Ordering::SeqCst);
            self.interrupt(shared);
        }
    }

    fn signal_msi(&self, msi: Msi) {
        let request = kvm_msi {
            address_lo: msi.address as u32,
            address_hi: (msi.address >> 32) as u32,
            data: msi.data,
            ..Default::default()
        };
        if let Err(error) = self.vm.signal_msi(request) {
            tracing::debug!(?msi, %error, "KVM does not take the interrupt message");
        }
    }

    fn set_extint(&self, asserted: bool) {
        if !self.extint.swap(asserted, Ordering::SeqCst) && asserted {
            self.interrupt(&self.shared[0]);
        }
    }

    fn nmi(&self, vp: VpIndex) {
        self.send(vp, 4, 0);
    }

    fn init(&self, vp: VpIndex) {
        self.send(vp, 5, 0);
    }

    fn sipi(&self, vp: VpIndex, vector: u8) {
        self.send(vp, 6, vector);
    }

    fn start_vp(&self, vp: VpIndex, state: Box<VpState>) -> Result<(), EngineError> {
        let shared = self.known(vp).ok_or_else(|| EngineError::State(format!("there is no VP {vp}")))?;
        if !shared.waiting.swap(false, Ordering::SeqCst) {
            return Err(EngineError::State(format!("VP {vp} does not wait to be started")));
        }
        *shared.start.lock().unwrap_or_else(|e| e.into_inner()) = Some(state);
        self.interrupt(shared);
        Ok(())
    }

    fn set_ioapic_routes(&self, routes: &[Option<Msi>]) {
        let mut entries = Vec::new();
        for (gsi, msi) in routes.iter().take(IOAPIC_PINS).enumerate() {
            if let Some(msi) = msi {
                let mut entry =
                    kvm_irq_routing_entry { gsi: gsi as u32, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
                entry.u.msi.address_lo = msi.address as u32;
                entry.u.msi.address_hi = (msi.address >> 32) as u32;
                entry.u.msi.data = msi.data;
                entries.push(entry);
            }
        }
        match KvmIrqRouting::from_entries(&entries) {
            Ok(table) => {
                if let Err(error) = self.vm.set_gsi_routing(&table) {
                    tracing::warn!(%error, "KVM does not take the I/O APIC's routes");
                }
            }
            Err(error) => tracing::warn!(?error, "the I/O APIC's routes do not fit"),
        }
    }

    fn flush_tlb(&self, _: Option<VpIndex>, _: VpSet, _: TlbFlush<'_>) {}

    fn set_auto_eoi(&self, _: VpIndex, _: [u64; 4]) {}

    fn register_doorbell(&self, gpa: Gpa, event: BorrowedFd<'_>) -> Result<(), EngineError> {
        sys::doorbell(&self.vm, gpa.0, event.as_raw_fd())
            .map_err(|source| EngineError::Host { call: "KVM_IOEVENTFD", source })
    }

    fn track_dirty(&self, on: bool) -> Result<(), EngineError> {
        self.memory.set_dirty_tracking(on);
        self.lock_slots().set_logging(&self.vm, on)
    }

    fn take_dirty(&self, gpa: Gpa, pages: u64) -> Result<DirtyPages, EngineError> {
        // What devices have written is in the flags of guest memory.
        let mut dirty = self.memory.take_dirty(gpa, pages);
        self.lock_slots().take_dirty(&self.vm, gpa.0, pages, &mut dirty.bits)?;
        Ok(dirty)
    }

    fn vp_runtime(&self, vp: VpIndex) -> Ticks100ns {
        let Some(shared) = self.known(vp) else { return 0 };
        let running = shared.running.lock().unwrap_or_else(|e| e.into_inner());
        let live = running.as_ref().map_or(0, |r| cpu_time(r.cpu_clock).saturating_sub(r.cpu_start));
        (shared.runtime_ns.load(Ordering::Relaxed) + live) / 100
    }

    fn stats(&self) -> EngineStats {
        let exits = self.shared.iter().map(|s| s.exits.load(Ordering::Relaxed)).sum();
        EngineStats { instructions: 0, counters: vec![("exits", exits)] }
    }
}

/// What a thread's processor-time clock says, in nanoseconds.
pub(crate) fn cpu_time(clock: libc::clockid_t) -> u64 {
    // SAFETY: writes to a local variable; an unknown clock is an error and leaves zeros.
    let mut time: libc::timespec = unsafe { std::mem::zeroed() };
    // SAFETY: as above.
    unsafe { libc::clock_gettime(clock, &mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}
