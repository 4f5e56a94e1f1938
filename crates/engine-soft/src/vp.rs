//! The state of a VP as the software processor holds it.
//!
//! [`VpBlock`] is the part that translated code addresses (through the host's GS base): plain, `repr(C)`, in memory of
//! its own. [`SoftVp`] is the VP itself: the block plus everything that only Rust code touches.

use crate::{apic, code, features, mmu, partition_impl};
use partition::{VpExits, VpIndex};
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use x86::segment::{Segment, TableRegister};

/// A fault or trap that an instruction raised, before delivery. Small, because every memory access may return one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A fault-class exception at the current instruction: RIP is left on it.
    Exception {
        /// Vector ([`x86::exception`]).
        vector: u8,
        /// Error code, for vectors that have one.
        error: u32,
    },
    /// #PF, with the linear address for CR2.
    Page {
        /// Linear address.
        address: u64,
        /// Error code ([`x86::exception::pf`]).
        error: u32,
    },
    /// Not a fault of the guest: the instruction must be executed again from the start, after the run loop has looked
    /// at [`VpBlock::attention`] (a code page changed under it, an interruptible string instruction is to be
    /// interrupted with its registers already up to date, ...).
    Restart,
}

impl Fault {
    /// #UD.
    pub const UD: Fault = Fault::Exception { vector: x86::exception::UD, error: 0 };
    /// #NM.
    pub const NM: Fault = Fault::Exception { vector: x86::exception::NM, error: 0 };
    /// #DE.
    pub const DE: Fault = Fault::Exception { vector: x86::exception::DE, error: 0 };
    /// #GP(0).
    pub const GP0: Fault = Fault::gp(0);
    /// #SS(0).
    pub const SS0: Fault = Fault::ss(0);
    /// #GP(error).
    pub const fn gp(error: u32) -> Self {
        Fault::Exception { vector: x86::exception::GP, error }
    }
    /// #SS(error).
    pub const fn ss(error: u32) -> Self {
        Fault::Exception { vector: x86::exception::SS, error }
    }
    /// #NP(error).
    pub const fn np(error: u32) -> Self {
        Fault::Exception { vector: x86::exception::NP, error }
    }
    /// #TS(error).
    pub const fn ts(error: u32) -> Self {
        Fault::Exception { vector: x86::exception::TS, error }
    }
}

/// Result of executing (part of) an instruction.
pub type Exec<T = ()> = Result<T, Fault>;

/// Reasons to look up from executing, in [`VpBlock::attention`]. Set by any thread, cleared by the VP's own.
pub mod attention {
    /// [`partition::Partition::kick`].
    pub const KICK: u32 = 1 << 0;
    /// The local APIC may have an interrupt to deliver (or EXTINT, NMI, INIT, SIPI changed).
    pub const INTERRUPT: u32 = 1 << 1;
    /// A request waits in the VP's mailbox (TLB flush, dropping of write permissions); see `partition_impl`.
    pub const REQUEST: u32 = 1 << 2;
    /// Code that this VP may be executing has changed: leave the current block.
    pub const CODE: u32 = 1 << 3;
    /// A VP-timer deadline may have passed.
    pub const TIMER: u32 = 1 << 4;
    /// Something that only the next instruction boundary cares about: TF, an interrupt shadow, armed breakpoints, RF
    /// (set and cleared by the VP's own thread only).
    pub const BOUNDARY: u32 = 1 << 5;
    /// All of them.
    pub const ALL: u32 = (1 << 6) - 1;
}

/// Processor mode, as it matters to decoding and code caching.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum CodeSize {
    /// CS.D = 0.
    Bits16 = 0,
    /// CS.D = 1, or compatibility mode with D = 1.
    Bits32 = 1,
    /// 64-bit mode.
    Bits64 = 2,
}

/// The x87, SSE and AVX registers: an XSAVE area in the standard format ([`x86::xsave`]). Authoritative whenever Rust
/// code runs.
#[repr(C, align(64))]
pub struct XsaveArea(pub [u8; x86::xsave::AREA_SIZE]);

/// The part of a VP's state that translated code addresses. Field order is hot first; offsets are taken with
/// `offset_of!`, never written down.
#[repr(C, align(64))]
pub struct VpBlock {
    /// General-purpose registers.
    pub gprs: [u64; 16],
    /// RIP of the instruction that is being (or will next be) executed. Always the full linear-in-segment offset.
    pub rip: u64,
    /// Where execution goes on if the current instruction completes. Set to `rip + length` before a handler runs;
    /// branches change it.
    pub next_rip: u64,
    /// Always zero: stands in for an absent base, index or segment base in pre-digested operands.
    pub zero: u64,
    /// All RFLAGS bits, architectural.
    pub rflags: u64,
    /// See [`attention`].
    pub attention: AtomicU32,
    /// Not zero: an interrupt waits for IF, the shadow or the NMI mask ([`SoftVp::interrupts_unblocked`]).
    pub window: u32,
    /// Current privilege level (0 to 3). SS.DPL is kept equal to it, CS.RPL too.
    pub cpl: u8,
    /// Size of the current code segment.
    pub code_size: CodeSize,
    /// Segment registers ([`x86::segment::sreg`]).
    pub segments: [Segment; 6],
    /// LDTR.
    pub ldtr: Segment,
    /// TR.
    pub tr: Segment,
    /// GDTR.
    pub gdtr: TableRegister,
    /// IDTR.
    pub idtr: TableRegister,
    /// Control registers.
    pub cr0: u64,
    /// Page-fault address.
    pub cr2: u64,
    /// Page-table base.
    pub cr3: u64,
    /// Control register 4.
    pub cr4: u64,
    /// EFER, with LMA.
    pub efer: u64,
    /// XCR0.
    pub xcr0: u64,
    /// DR0 to DR3.
    pub dr: [u64; 4],
    /// DR6.
    pub dr6: u64,
    /// DR7.
    pub dr7: u64,
    /// PAE page-directory pointers (only without long mode).
    pub pdptrs: [u64; 4],
    /// STAR.
    pub star: u64,
    /// LSTAR.
    pub lstar: u64,
    /// CSTAR.
    pub cstar: u64,
    /// FMASK.
    pub fmask: u64,
    /// KERNEL_GS_BASE.
    pub kernel_gs_base: u64,
    /// SYSENTER_CS, ESP, EIP.
    pub sysenter: [u64; 3],
    /// TSC_AUX.
    pub tsc_aux: u64,
    /// Guest TSC minus host TSC, including TSC_ADJUST and guest writes to the TSC.
    pub tsc_offset: u64,
    /// Interrupts are held back for one more boundary (STI, MOV SS); see [`SoftVp::set_shadow`].
    pub interrupt_shadow: bool,
    /// The shadow is that of MOV SS: debug exceptions and NMIs are held back too.
    pub mov_ss_shadow: bool,
    /// NMIs are held back until IRET.
    pub nmi_masked: bool,
    /// Pending debug exception bits for DR6.
    pub pending_debug: u64,
    /// Vector registers.
    pub xsave: XsaveArea,
    /// Instructions executed (counted where counting is cheap: by the interpreter one by one, by translated code per block).
    pub instructions: u64,
    /// Pointers to the TLB sets in use; laid out by [`mmu`].
    pub tlb: mmu::TlbPointers,
    /// The translator's own.
    pub jit: crate::translate::JitState,
}

/// A virtual processor of the software engine.
pub struct SoftVp {
    /// What translated code sees.
    pub s: Box<VpBlock>,
    /// Number and initial APIC id.
    pub index: VpIndex,
    /// Soft MMU: TLB sets and their owners.
    pub mmu: mmu::Mmu,
    /// Local APIC, shared with other VPs' threads that send to it.
    pub apic: Arc<apic::Lapic>,
    /// What the processor model offers.
    pub features: features::Features,
    /// MSRs that have no place in [`VpBlock`].
    pub msrs: crate::msrs::MsrFile,
    /// Decoded instructions.
    pub decoded: code::DecodeCache,
    /// Translated code; `None` until first used and while it executes.
    pub translator: Option<Box<crate::translate::Translator>>,
    /// The host gives no executable memory.
    pub translator_refused: bool,
    /// Direct execution: made by [`partition::Vp::prepare`], to be used on its thread. `None`: not wanted, or the host does not
    /// allow it.
    pub direct: Option<Box<crate::direct::Direct>>,
    /// Whether the VP is at rest.
    pub watch: crate::rest::Watch,
    /// The partition.
    pub partition: Arc<partition_impl::SoftPartition>,
    /// The machine, while [`partition::Vp::run`] is on the stack.
    pub(crate) exits: Option<*const dyn VpExits>,
    /// Halted, waiting for SIPI, in shutdown.
    pub activity: partition::Activity,
    /// An exception raised by event delivery or loaded with the state, to be delivered before the next instruction.
    pub pending_exception: Option<partition::PendingException>,
    /// An interrupt acknowledged but not delivered.
    pub pending_interrupt: Option<u8>,
    /// Counters.
    pub counts: crate::stats::Counts,
    /// What [`crate::translate::verify`] keeps.
    pub verify: crate::translate::verify::Verify,
    /// What the run loop remembers.
    pub run: crate::run::RunState,
}

// SAFETY: `exits` is only set while `run` is on the stack of the one thread that owns the VP, and `VpExits` is
// `Send + Sync`; to the processes only the thread that has made them can do anything (the kernel knows their tracer), another
// gets errors; everything else is owned or shared through `Arc` of `Sync` types.
unsafe impl Send for SoftVp {}

impl SoftVp {
    /// The machine's side. Only while running.
    #[inline]
    pub fn exits(&self) -> &dyn VpExits {
        match self.exits {
            // SAFETY: `run` stores a pointer to a reference that it holds for as long as it is on the stack, and
            // clears it before it returns.
            Some(exits) => unsafe { &*exits },
            None => &NoExits,
        }
    }
}

/// Stands in where no machine is attached (tests of single instructions): everything reads as all ones.
pub(crate) struct NoExits;

impl VpExits for NoExits {
    fn io_read(&self, _: VpIndex, _: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn io_write(&self, _: VpIndex, _: u16, _: &[u8]) {}
    fn mmio_read(&self, _: VpIndex, _: partition::Gpa, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _: VpIndex, _: partition::Gpa, _: &[u8]) {}
    fn msr_read(&self, _: VpIndex, _: u32) -> partition::MsrOutcome {
        partition::MsrOutcome::Fault
    }
    fn msr_write(&self, _: VpIndex, _: u32, _: u64) -> partition::MsrOutcome {
        partition::MsrOutcome::Fault
    }
    fn hypercall(&self, _: VpIndex, _: &mut dyn partition::HypercallContext) -> partition::HypercallOutcome {
        partition::HypercallOutcome::InvalidOpcode
    }
    fn eoi(&self, _: VpIndex, _: u8) {}
    fn acknowledge_extint(&self, _: VpIndex) -> Option<u8> {
        None
    }
}
