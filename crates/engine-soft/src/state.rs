//! A VP's making, and its complete state in and out ([`VpState`]).

use crate::apic::event;
use crate::features::Features;
use crate::msrs::MsrFile;
use crate::partition_impl::SoftPartition;
use crate::run::RunState;
use crate::vp::{SoftVp, VpBlock, attention};
use crate::{code, mmu, xstate};
use partition::clock::host_tsc;
use partition::{Activity, EngineError, PendingEvents, VpIndex, VpState};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use x86::paging::is_canonical;
use x86::regs::{cr0, cr4, dr6, dr7, efer, rflags};
use x86::segment::{Segment, attr, sreg};
use x86::xsave;

impl SoftVp {
    /// A VP in the reset state.
    ///
    /// # Panics
    /// If the partition has no VP with this number.
    pub fn new(partition: Arc<SoftPartition>, index: VpIndex) -> Self {
        let features = Features::from_table(&partition.cpuid[index as usize]);
        let model = mmu::MmuModel { physical_bits: features.maxphyaddr(), gib_pages: features.gbpages() };
        let mut block = zeroed_block();
        block.tlb = mmu::TlbPointers::default();
        block.jit = crate::translate::JitState::default();
        let apic = partition.shared(index).apic.clone();
        let mut vp = Self {
            s: block,
            index,
            mmu: mmu::Mmu::new(partition.memory.clone(), model),
            apic,
            msrs: MsrFile::new(&features),
            features,
            decoded: code::DecodeCache::new(),
            translator: None,
            translator_refused: false,
            direct: None,
            watch: crate::rest::Watch::default(),
            exits: None,
            activity: Activity::Running,
            pending_exception: None,
            pending_interrupt: None,
            counts: crate::stats::Counts::default(),
            verify: crate::translate::verify::Verify::default(),
            run: RunState::default(),
            partition,
        };
        let signature = vp.features.table().get(1, 0).eax;
        let state = VpState::reset(index, signature);
        // Events that were sent before the VP was taken stay.
        vp.load_registers(&state);
        vp.activity = state.activity;
        vp.mappings_changed();
        vp.state_loaded();
        vp.set_apic_page(vp.apic.mmio_page());
        let shared = vp.partition.shared(index);
        // SAFETY: the word lives in the box until the VP is dropped, which detaches it first.
        unsafe { shared.waker.attach(&vp.s.attention) };
        vp
    }

    /// Guest TSC minus host TSC, after the clock or the guest's own offset changed.
    pub(crate) fn refresh_tsc(&mut self) {
        let now = self.partition.clock.tsc();
        self.s.tsc_offset = now.wrapping_sub(host_tsc()).wrapping_add(self.apic.tsc_delta());
        if self.partition.clock.is_running() {
            self.s.tsc_offset = self.partition.clock.tsc_offset().wrapping_add(self.apic.tsc_delta());
        }
    }

    /// The guest's TSC.
    #[inline]
    pub fn tsc(&self) -> u64 {
        if self.partition.clock.is_running() {
            host_tsc().wrapping_add(self.s.tsc_offset)
        } else {
            self.partition.clock.tsc().wrapping_add(self.apic.tsc_delta())
        }
    }

    /// Everything but the local APIC's registers and events, and what is derived.
    fn load_registers(&mut self, state: &VpState) {
        let s = &mut *self.s;
        s.gprs = state.gprs;
        s.rip = state.rip;
        s.next_rip = state.rip;
        s.rflags = state.rflags & rflags::ALL | rflags::FIXED;
        s.segments = state.segments;
        s.ldtr = state.ldtr;
        s.tr = state.tr;
        s.gdtr = state.gdtr;
        s.idtr = state.idtr;
        s.cr0 = state.cr0;
        s.cr2 = state.cr2;
        s.cr3 = state.cr3;
        s.cr4 = state.cr4;
        s.efer = state.efer;
        s.xcr0 = if state.xcr0 == 0 { 1 } else { state.xcr0 };
        s.dr = state.dr;
        s.dr6 = state.dr6;
        s.dr7 = state.dr7;
        s.pdptrs = state.pdptrs;
        s.xsave = xstate::import(&state.xsave);
        s.interrupt_shadow = state.pending.interrupt_shadow || state.pending.mov_ss_shadow;
        s.mov_ss_shadow = state.pending.mov_ss_shadow;
        s.nmi_masked = state.pending.nmi_masked;
        s.pending_debug = state.pending.debug;
        self.load_msrs(&state.msrs);
        self.pending_exception = state.pending.exception;
        self.pending_interrupt = state.pending.interrupt;
        self.run = RunState::default();
    }

    /// Loads a complete state.
    pub fn load_state(&mut self, state: &VpState) -> Result<(), EngineError> {
        self.check_state(state)?;
        self.load_registers(state);
        self.activity = state.activity;
        self.apic.load(&state.lapic);
        let pending = &state.pending;
        self.apic.set_events(pending.nmi_pending, pending.init, pending.sipi);
        self.partition.shared(self.index).waiting.store(state.activity == Activity::WaitForSipi, Ordering::SeqCst);
        self.refresh_tsc();
        self.state_loaded();
        self.set_apic_page(self.apic.mmio_page());
        self.s.attention.fetch_or(attention::INTERRUPT | attention::CODE, Ordering::SeqCst);
        Ok(())
    }

    /// The complete state.
    pub fn save_state(&mut self) -> VpState {
        let msrs = self.save_msrs();
        let s = &*self.s;
        let events = self.apic.events();
        let pending = PendingEvents {
            exception: self.pending_exception,
            interrupt: self.pending_interrupt,
            nmi_pending: events & event::NMI != 0,
            nmi_masked: s.nmi_masked,
            interrupt_shadow: s.interrupt_shadow,
            mov_ss_shadow: s.mov_ss_shadow,
            debug: s.pending_debug,
            init: events & event::INIT != 0,
            sipi: (events & event::SIPI != 0).then_some((events >> 8) as u8),
        };
        VpState {
            gprs: s.gprs,
            rip: s.rip,
            rflags: s.rflags,
            segments: s.segments,
            ldtr: s.ldtr,
            tr: s.tr,
            gdtr: s.gdtr,
            idtr: s.idtr,
            cr0: s.cr0,
            cr2: s.cr2,
            cr3: s.cr3,
            cr4: s.cr4,
            efer: s.efer,
            xcr0: s.xcr0,
            dr: s.dr,
            dr6: s.dr6,
            dr7: s.dr7,
            pdptrs: s.pdptrs,
            msrs,
            xsave: xstate::export(&s.xsave),
            lapic: self.apic.state(),
            pending,
            activity: self.activity,
        }
    }

    /// Refuses what no processor of this model can be in; such a state would break the engine's own assumptions.
    fn check_state(&self, state: &VpState) -> Result<(), EngineError> {
        let bad = |what: String| Err(EngineError::State(what));
        if state.cr4 & !self.features.cr4_mask() != 0 {
            return bad(format!("CR4 {:#x} has bits that the processor model lacks", state.cr4));
        }
        if state.efer & !(self.features.efer_mask() | efer::LMA) != 0 {
            return bad(format!("EFER {:#x} has bits that the processor model lacks", state.efer));
        }
        let long = state.efer & efer::LME != 0 && state.cr0 & cr0::PG != 0;
        if (state.efer & efer::LMA != 0) != long {
            return bad(format!("EFER {:#x} and CR0 {:#x} disagree about long mode", state.efer, state.cr0));
        }
        if state.cr0 & cr0::PG != 0 && state.cr0 & cr0::PE == 0 {
            return bad(format!("CR0 {:#x} has paging without protection", state.cr0));
        }
        if long && state.cr4 & cr4::PAE == 0 {
            return bad("long mode without CR4.PAE".into());
        }
        if state.xcr0 != 0 && self.features.xsave() && !self.features.xcr0_valid(state.xcr0) {
            return bad(format!("XCR0 {:#x} is not one that the processor model allows", state.xcr0));
        }
        if state.xsave.len() < xsave::LEGACY_SIZE {
            return bad(format!("the XSAVE area has {} bytes; {} are needed", state.xsave.len(), xsave::AREA_SIZE));
        }
        if state.lapic.regs.len() != partition::LapicState::SIZE {
            return bad(format!("the APIC page has {} bytes, not 1024", state.lapic.regs.len()));
        }
        if !is_canonical(state.rip) && long {
            return bad(format!("RIP {:#x} is not canonical", state.rip));
        }
        if !self.features.x2apic() && state.lapic.base & x86::msr::apic_base::X2APIC_ENABLE != 0 {
            return bad("x2APIC mode, which the processor model lacks".into());
        }
        Ok(())
    }

    /// INIT: the registers go to their reset values, except those that the architecture keeps (SDM volume 3, table 9-1:
    /// the caching bits of CR0, x87 and vector registers, MSRs, TSC). The boot processor starts again, others wait.
    pub(crate) fn init_reset(&mut self) {
        let signature = self.features.table().get(1, 0).eax;
        let reset = VpState::reset(self.index, signature);
        let s = &mut *self.s;
        s.gprs = reset.gprs;
        s.rip = reset.rip;
        s.next_rip = reset.rip;
        s.rflags = reset.rflags;
        s.segments = reset.segments;
        s.ldtr = reset.ldtr;
        s.tr = reset.tr;
        s.gdtr = reset.gdtr;
        s.idtr = reset.idtr;
        s.cr0 = s.cr0 & (cr0::CD | cr0::NW) | cr0::ET;
        s.cr2 = 0;
        s.cr3 = 0;
        s.cr4 = 0;
        s.efer = 0;
        s.dr = [0; 4];
        s.dr6 = dr6::RESET;
        s.dr7 = dr7::RESET;
        s.interrupt_shadow = false;
        s.mov_ss_shadow = false;
        s.nmi_masked = false;
        s.pending_debug = 0;
        self.pending_exception = None;
        self.pending_interrupt = None;
        self.apic.init_reset();
        let boot = self.apic.base() & x86::msr::apic_base::BSP != 0;
        self.set_activity(if boot { Activity::Running } else { Activity::WaitForSipi });
        self.state_loaded();
    }

    /// A start-up IPI: real mode at `vector << 12`.
    pub(crate) fn start_up(&mut self, vector: u8) {
        let selector = u16::from(vector) << 8;
        self.s.segments[sreg::CS] =
            Segment { base: u64::from(selector) << 4, limit: 0xffff, attr: attr::P | attr::S | 0xb, selector };
        self.s.rip = 0;
        self.s.next_rip = 0;
        self.set_activity(Activity::Running);
        self.state_loaded();
    }

    /// Changes what the VP does, also as others see it.
    pub(crate) fn set_activity(&mut self, activity: Activity) {
        self.activity = activity;
        self.partition.shared(self.index).waiting.store(activity == Activity::WaitForSipi, Ordering::SeqCst);
    }
}

/// A block of zeros.
fn zeroed_block() -> Box<VpBlock> {
    let layout = std::alloc::Layout::new::<VpBlock>();
    // SAFETY: the layout is that of a `VpBlock`, which is not zero-sized, and all-zero bytes are a valid `VpBlock`:
    // integers, bools, atomics, null pointers, `CodeSize::Bits16`. The box frees it with the same layout.
    unsafe {
        let block = std::alloc::alloc_zeroed(layout).cast::<VpBlock>();
        if block.is_null() {
            std::alloc::handle_alloc_error(layout);
        }
        Box::from_raw(block)
    }
}

impl Drop for SoftVp {
    fn drop(&mut self) {
        self.partition.shared(self.index).waker.detach();
    }
}
