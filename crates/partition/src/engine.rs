//! What the machine asks of an engine.

use crate::exits::VpExits;
use crate::{Clock, GuestMemory, VpState};
use std::ops::RangeInclusive;
use std::sync::Arc;
use thiserror::Error;
use x86::cpuid::CpuidTable;

/// Number of a virtual processor, from 0. It is the VP's initial APIC id too.
pub type VpIndex = u32;

/// Most VPs of a partition.
pub const MAX_VPS: u32 = 64;

/// A message-signalled interrupt (SDM volume 3, section 10.11).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Msi {
    /// Address, 0xFEExxxxx; bits 32-63 hold destination id bits 8-31 as in x2APIC interrupt remapping of KVM.
    pub address: u64,
    /// Data: vector, delivery mode, level, trigger mode.
    pub data: u32,
}

impl Msi {
    /// A fixed, edge-triggered interrupt `vector` for the one VP with this APIC id.
    pub fn fixed(apic_id: u32, vector: u8) -> Self {
        let address = 0xfee0_0000 | u64::from(apic_id & 0xff) << 12 | u64::from(apic_id & !0xff) << 32;
        Self { address, data: u32::from(vector) }
    }
}

/// A set of VPs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VpSet(pub u64);

impl VpSet {
    /// Is the VP in the set?
    pub fn contains(self, vp: VpIndex) -> bool {
        vp < MAX_VPS && self.0 >> vp & 1 != 0
    }
    /// The set with one more VP.
    #[must_use]
    pub fn with(self, vp: VpIndex) -> Self {
        Self(self.0 | 1u64.checked_shl(vp).unwrap_or(0))
    }
    /// The VPs in ascending order.
    pub fn iter(self) -> impl Iterator<Item = VpIndex> {
        (0..MAX_VPS).filter(move |vp| self.contains(*vp))
    }
}

/// What a remote TLB flush covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlbFlush<'a> {
    /// Everything, global pages too.
    All,
    /// Everything except global pages.
    NonGlobal,
    /// One address space (CR3 value, any PCID bits ignored), global pages not included.
    AddressSpace(u64),
    /// Ranges in every address space: first page address, number of pages.
    Ranges(&'a [(u64, u64)]),
}

/// How `engine-soft` uses its translator.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TranslateMode {
    /// Translate; interpret only what cannot be translated.
    #[default]
    On,
    /// Interpret everything.
    Off,
    /// Translate, and run every block in the interpreter too and compare (for tests).
    Verify,
}

/// Whether 64-bit user code of the guest is executed directly.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DirectMode {
    /// Never.
    Off,
    /// Where it seems to pay.
    #[default]
    On,
    /// Wherever it is possible, whether it pays or not (for tests).
    Always,
}

/// Options that only some engines have; the others ignore them.
#[derive(Clone, Copy, Debug)]
pub struct EngineOptions {
    /// Translator mode.
    pub translate: TranslateMode,
    /// Bound of the code cache of all VPs together, in bytes. Memory is only taken as code is made: a compiler's run makes about
    /// 80 MiB on each VP that executes it, and a cache that is too small is emptied over and over.
    pub code_cache_bytes: usize,
    /// Execute 64-bit user code of the guest directly, in processes of its own, where the host allows it
    /// ([`Engine::uses_processes`]).
    pub direct: DirectMode,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self { translate: TranslateMode::default(), code_cache_bytes: 256 << 20, direct: DirectMode::default() }
    }
}

/// What a partition is made from.
pub struct PartitionConfig {
    /// Number of VPs, 1 to [`MAX_VPS`].
    pub vp_count: u32,
    /// Guest physical memory. The engine registers itself as its observer.
    pub memory: Arc<GuestMemory>,
    /// The partition's clock.
    pub clock: Arc<Clock>,
    /// What CPUID answers, one table a VP (topology leaves differ). The table is also the processor model: an
    /// instruction whose feature bit is clear is #UD.
    pub cpuid: Vec<CpuidTable>,
    /// MSRs that the machine answers ([`VpExits::msr_read`], [`VpExits::msr_write`]).
    pub msr_exits: Vec<RangeInclusive<u32>>,
    /// A one-byte OUT to this port (with an immediate port number) is a hypercall ([`VpExits::hypercall`]).
    pub hypercall_port: Option<u8>,
    /// Options of the engine.
    pub options: EngineOptions,
}

/// What an engine can do beyond the contract's minimum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Abilities {
    /// [`Partition::flush_tlb`] works.
    pub remote_tlb_flush: bool,
    /// [`Partition::register_doorbell`] works.
    pub doorbells: bool,
    /// [`Partition::set_auto_eoi`] works.
    pub auto_eoi: bool,
    /// [`Partition::apic_read`] and [`Partition::apic_write`] work.
    pub apic_access: bool,
}

/// Counters of an engine; a counter that it does not keep is zero.
#[derive(Clone, Debug, Default)]
pub struct EngineStats {
    /// Guest instructions executed, as far as counted.
    pub instructions: u64,
    /// Named counters in the order in which they should be shown.
    pub counters: Vec<(&'static str, u64)>,
}

/// Dirty pages of a range, one bit a 4 KiB page, bit 0 of word 0 is the first page.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DirtyPages {
    /// The bits.
    pub bits: Vec<u64>,
}

/// Why an engine cannot do what it was asked.
#[derive(Debug, Error)]
pub enum EngineError {
    /// The host cannot run this engine.
    #[error("engine '{engine}' cannot run here: {reason}")]
    Unavailable {
        /// Engine name.
        engine: &'static str,
        /// What is missing and what to do.
        reason: String,
    },
    /// A configuration that no engine accepts.
    #[error("bad partition configuration: {0}")]
    Config(String),
    /// A state that cannot be loaded.
    #[error("processor state cannot be loaded: {0}")]
    State(String),
    /// The host refused a call.
    #[error("{call}: {source}")]
    Host {
        /// Which call.
        call: &'static str,
        /// What the host said.
        source: std::io::Error,
    },
    /// The engine found that it cannot go on; a defect of the engine.
    #[error("engine failure on VP {vp}: {what}")]
    Internal {
        /// The VP.
        vp: VpIndex,
        /// What happened, with the VP's place.
        what: String,
    },
}

/// Why [`Vp::run`] returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunExit {
    /// [`Partition::kick`].
    Kicked,
    /// A triple fault: the VP is in shutdown. The machine resets or ends.
    TripleFault,
}

/// Makes partitions.
pub trait Engine: Send + Sync {
    /// Name, as in `--engine`.
    fn name(&self) -> &'static str;
    /// What its partitions can do: the same as [`Partition::abilities`], known before CPUID tables are made.
    fn abilities(&self) -> Abilities {
        Abilities::default()
    }
    /// Do its VPs execute guest code in processes of their own, with these options? Then they make them in [`Vp::prepare`];
    /// the guest's memory must be shared ([`crate::MemoryBlock::new`]); and the VPs' threads go on needing `ptrace` (to
    /// resume them, and to read and write their registers), `wait4`, `sched_setaffinity`, and all threads
    /// `pidfd_send_signal`.
    fn uses_processes(&self, options: &EngineOptions) -> bool {
        let _ = options;
        false
    }
    /// Makes a partition. VPs start in the reset state.
    fn create(&self, config: PartitionConfig) -> Result<Arc<dyn Partition>, EngineError>;
}

/// A partition of some engine. All methods may be called from any thread at any moment.
pub trait Partition: Send + Sync {
    /// What this engine can do.
    fn abilities(&self) -> Abilities;
    /// Takes the VP with this index; each can be taken once. The caller gives it a thread.
    fn take_vp(&self, index: VpIndex) -> Result<Box<dyn Vp>, EngineError>;
    /// Makes [`Vp::run`] of this VP return [`RunExit::Kicked`] soon; if it is not running, the next `run` returns at
    /// once. Kicks do not add up.
    fn kick(&self, vp: VpIndex);
    /// Delivers an MSI to the local APICs.
    fn signal_msi(&self, msi: Msi);
    /// Level of the PIC pair's INTR output, which is wired to LINT0 of VP 0 (and reaches it when its APIC is disabled
    /// or its LVT says ExtINT).
    fn set_extint(&self, asserted: bool);
    /// Non-maskable interrupt.
    fn nmi(&self, vp: VpIndex);
    /// INIT signal.
    fn init(&self, vp: VpIndex);
    /// Start-up signal: the VP, if it waits for it, starts in real mode at `vector << 12`.
    fn sipi(&self, vp: VpIndex, vector: u8);
    /// Gives a VP that waits for SIPI a complete state and starts it (TLFS `HvCallStartVirtualProcessor`).
    fn start_vp(&self, vp: VpIndex, state: Box<VpState>) -> Result<(), EngineError>;
    /// Tells which I/O APIC pins are level-triggered with which vector, so that [`VpExits::eoi`] is called for them.
    /// Called on every change of the redirection table. Engines that see every EOI may ignore it.
    fn set_ioapic_routes(&self, routes: &[Option<Msi>]);
    /// Flushes TLBs of other VPs. Returns when none of them uses an old translation any more. `from` is the VP whose
    /// thread calls, if it is one. Only with [`Abilities::remote_tlb_flush`].
    fn flush_tlb(&self, from: Option<VpIndex>, targets: VpSet, what: TlbFlush<'_>);
    /// Vectors whose interrupts are acknowledged by the APIC itself as soon as they are delivered (SynIC auto-EOI).
    /// Only with [`Abilities::auto_eoi`].
    fn set_auto_eoi(&self, vp: VpIndex, vectors: [u64; 4]);
    /// Reads a register of the VP's own local APIC, by its x2APIC number (offset in the register page divided by 16;
    /// the interrupt command register 0x30 has 64 bits in x2APIC format), whatever mode the APIC is in. To be called on
    /// the VP's own thread, inside an exit. Only with [`Abilities::apic_access`].
    fn apic_read(&self, vp: VpIndex, register: u32) -> u64 {
        let _ = (vp, register);
        0
    }
    /// Writes a register of the VP's own local APIC, with all effects (a write to 0x0b is an end of interrupt); see
    /// [`Partition::apic_read`].
    fn apic_write(&self, vp: VpIndex, register: u32, value: u64) {
        let _ = (vp, register, value);
    }
    /// A write of 4 bytes to `gpa` signals the event and causes no exit. Only with [`Abilities::doorbells`].
    fn register_doorbell(&self, gpa: crate::Gpa, event: std::os::fd::BorrowedFd<'_>) -> Result<(), EngineError>;
    /// Starts or stops recording which pages are written. Starting clears the record.
    fn track_dirty(&self, on: bool) -> Result<(), EngineError>;
    /// Takes the record of written pages of a range (page-aligned) and clears it, including writes by devices.
    fn take_dirty(&self, gpa: crate::Gpa, pages: u64) -> Result<DirtyPages, EngineError>;
    /// Time that the VP has executed guest code, in 100 ns units.
    fn vp_runtime(&self, vp: VpIndex) -> crate::Ticks100ns;
    /// Counters.
    fn stats(&self) -> EngineStats;
}

/// A virtual processor. It belongs to one thread at a time.
pub trait Vp: Send {
    /// Its number.
    fn index(&self) -> VpIndex;
    /// Makes what must be made on the VP's own thread before the process is confined (see [`Engine::uses_processes`]).
    /// Called once, before everything else.
    fn prepare(&mut self) {}
    /// Executes guest code until there is a reason to stop.
    fn run(&mut self, exits: &dyn VpExits) -> Result<RunExit, EngineError>;
    /// The VP's complete state. The VP must not be running.
    fn state(&mut self) -> Result<VpState, EngineError>;
    /// Loads a complete state.
    fn set_state(&mut self, state: &VpState) -> Result<(), EngineError>;
}
