//! [`VpState`] from KVM's pieces and back.

use crate::run::{KvmVp, gpr_field};
use crate::sys::host;
use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_SIPI_RECEIVED,
    KVM_MP_STATE_UNINITIALIZED, KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_SHADOW,
    KVM_VCPUEVENT_VALID_SIPI_VECTOR, KVM_X86_SHADOW_INT_MOV_SS, KVM_X86_SHADOW_INT_STI, Msrs, kvm_debugregs,
    kvm_dtable, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs, kvm_vcpu_events,
    kvm_xcrs, kvm_xsave,
};
use partition::{Activity, EngineError, Gpa, LapicState, PendingEvents, PendingException, VpState};
use std::sync::atomic::Ordering;
use x86::regs::{cr0, cr4, efer, rflags};
use x86::segment::{Segment, TableRegister, attr, sreg};
use x86::{msr, xsave};

fn from_segment(s: &kvm_segment) -> Segment {
    let attr = u32::from(s.type_)
        | u32::from(s.s) << 4
        | u32::from(s.dpl) << attr::DPL_SHIFT
        | u32::from(s.present) << 7
        | u32::from(s.avl) << 12
        | u32::from(s.l) << 13
        | u32::from(s.db) << 14
        | u32::from(s.g) << 15
        | if s.unusable != 0 { attr::UNUSABLE } else { 0 };
    Segment { base: s.base, limit: s.limit, attr, selector: s.selector }
}

fn to_segment(s: &Segment) -> kvm_segment {
    let bit = |n: u32| (s.attr >> n & 1) as u8;
    kvm_segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        type_: (s.attr & attr::TYPE) as u8,
        present: bit(7),
        dpl: s.dpl(),
        db: bit(14),
        s: bit(4),
        l: bit(13),
        g: bit(15),
        avl: bit(12),
        unusable: u8::from(!s.usable()),
        padding: 0,
    }
}

/// MSRs that are fields of `VpState`, or part of its APIC.
const ELSEWHERE: &[u32] = &[msr::APIC_BASE, msr::EFER, msr::FS_BASE, msr::GS_BASE, msr::TSC_DEADLINE];

/// MSRs that belong to a saved state, as far as KVM lists them.
fn belongs(number: u32) -> bool {
    matches!(
        number,
        msr::TSC
            | msr::TSC_ADJUST
            | msr::SPEC_CTRL
            | msr::BIOS_SIGN_ID
            | msr::SYSENTER_CS..=msr::SYSENTER_EIP
            | msr::MCG_STATUS
            | msr::MISC_ENABLE
            | msr::DEBUGCTL
            | msr::MTRR_PHYS_BASE0..=0x20f
            | msr::MTRR_FIX64K_00000
            | msr::MTRR_FIX16K_80000
            | msr::MTRR_FIX16K_A0000
            | 0x268..=0x26f
            | msr::PAT
            | msr::MTRR_DEF_TYPE
            | msr::XSS
            | msr::STAR..=msr::FMASK
            | msr::KERNEL_GS_BASE
            | msr::TSC_AUX
            | msr::HWCR
            | msr::DE_CFG
    )
}

/// KVM does not list these, but has them.
const UNLISTED: &[u32] = &[
    msr::PAT,
    msr::MTRR_DEF_TYPE,
    msr::MTRR_FIX64K_00000,
    msr::MTRR_FIX16K_80000,
    msr::MTRR_FIX16K_A0000,
    0x268,
    0x269,
    0x26a,
    0x26b,
    0x26c,
    0x26d,
    0x26e,
    0x26f,
];

impl KvmVp {
    pub(crate) fn get_msr(&self, number: u32) -> Option<u64> {
        let mut list = Msrs::from_entries(&[kvm_msr_entry { index: number, ..Default::default() }]).ok()?;
        (self.fd.get_msrs(&mut list).ok()? == 1).then(|| list.as_slice()[0].data)
    }

    /// Says whether KVM took it: it reports failure only by a short count.
    pub(crate) fn set_msr(&self, number: u32, data: u64) -> bool {
        Msrs::from_entries(&[kvm_msr_entry { index: number, data, ..Default::default() }])
            .is_ok_and(|list| matches!(self.fd.set_msrs(&list), Ok(1)))
    }

    /// The complete state. The VP is outside `KVM_RUN`, with its last instruction completed.
    pub(crate) fn save(&mut self) -> Result<VpState, EngineError> {
        let fd = &self.fd;
        // First, because it makes KVM act upon INIT and SIPI.
        let mp = fd.get_mp_state().map_err(host("KVM_GET_MP_STATE"))?.mp_state;
        let mut regs = fd.get_regs().map_err(host("KVM_GET_REGS"))?;
        let sregs = fd.get_sregs().map_err(host("KVM_GET_SREGS"))?;
        let debug = fd.get_debug_regs().map_err(host("KVM_GET_DEBUGREGS"))?;
        let events = fd.get_vcpu_events().map_err(host("KVM_GET_VCPU_EVENTS"))?;
        let lapic = fd.get_lapic().map_err(host("KVM_GET_LAPIC"))?;
        let xcrs = fd.get_xcrs().map_err(host("KVM_GET_XCRS"))?;
        let fpu = fd.get_xsave().map_err(host("KVM_GET_XSAVE"))?;
        let mut area: Vec<u8> = fpu.region.iter().flat_map(|w| w.to_le_bytes()).take(xsave::AREA_SIZE).collect();
        area[xsave::HEADER_OFFSET] &= 7;
        area[xsave::HEADER_OFFSET + 1..xsave::AVX_OFFSET].fill(0);
        area[xsave::legacy::MXCSR_MASK..xsave::legacy::MXCSR_MASK + 4]
            .copy_from_slice(&xsave::MXCSR_MASK.to_le_bytes());
        self.note_tsc();
        let msrs = self.save_msrs();
        let gprs = std::array::from_fn(|n| *gpr_field(&mut regs, n));
        let e = &events;
        let sti = u32::from(e.interrupt.shadow) & KVM_X86_SHADOW_INT_STI != 0;
        let mov_ss = u32::from(e.interrupt.shadow) & KVM_X86_SHADOW_INT_MOV_SS != 0;
        let pending = PendingEvents {
            exception: (e.exception.injected != 0 || e.exception.pending != 0).then_some(PendingException {
                vector: e.exception.nr,
                error_code: (e.exception.has_error_code != 0).then_some(e.exception.error_code),
            }),
            // A software interrupt in flight is executed again: RIP is still at its instruction.
            interrupt: (e.interrupt.injected != 0 && e.interrupt.soft == 0).then_some(e.interrupt.nr),
            nmi_pending: e.nmi.pending != 0 || e.nmi.injected != 0,
            nmi_masked: e.nmi.masked != 0 && e.nmi.injected == 0,
            interrupt_shadow: sti || mov_ss,
            mov_ss_shadow: mov_ss,
            debug: 0,
            init: e.smi.latched_init != 0,
            sipi: (mp == KVM_MP_STATE_SIPI_RECEIVED).then_some(e.sipi_vector as u8),
        };
        let activity = match mp {
            KVM_MP_STATE_HALTED => Activity::Halted,
            KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED | KVM_MP_STATE_SIPI_RECEIVED => {
                Activity::WaitForSipi
            }
            _ => Activity::Running,
        };
        let table = |t: &kvm_dtable| TableRegister { base: t.base, limit: t.limit };
        let segments = [&sregs.es, &sregs.cs, &sregs.ss, &sregs.ds, &sregs.fs, &sregs.gs].map(from_segment);
        Ok(VpState {
            gprs,
            rip: regs.rip,
            rflags: regs.rflags & rflags::ALL | rflags::FIXED,
            segments,
            ldtr: from_segment(&sregs.ldt),
            tr: from_segment(&sregs.tr),
            gdtr: table(&sregs.gdt),
            idtr: table(&sregs.idt),
            cr0: sregs.cr0,
            cr2: sregs.cr2,
            cr3: sregs.cr3,
            cr4: sregs.cr4,
            efer: sregs.efer,
            xcr0: if xcrs.nr_xcrs > 0 { xcrs.xcrs[0].value & 7 } else { 1 },
            dr: debug.db,
            dr6: debug.dr6,
            dr7: debug.dr7,
            pdptrs: self.pdptrs(&sregs),
            msrs,
            xsave: area,
            lapic: LapicState {
                regs: lapic.regs.iter().map(|b| b.cast_unsigned()).collect(),
                base: sregs.apic_base,
                tsc_deadline: self.get_msr(msr::TSC_DEADLINE).unwrap_or(0),
            },
            pending,
            activity,
        })
    }

    /// PAE's page-directory pointers: KVM reads them from memory again when a state is loaded, and so does this.
    fn pdptrs(&self, sregs: &kvm_sregs) -> [u64; 4] {
        let pae = sregs.cr0 & cr0::PG != 0 && sregs.cr4 & cr4::PAE != 0 && sregs.efer & efer::LMA == 0;
        if !pae {
            return [0; 4];
        }
        let at = |n: u64| self.partition.memory.read_plain(Gpa((sregs.cr3 & 0xffff_ffe0) + 8 * n)).unwrap_or(0);
        [0, 1, 2, 3].map(at)
    }

    fn save_msrs(&self) -> Vec<(u32, u64)> {
        let mut numbers: Vec<u32> = self
            .partition
            .msr_list
            .iter()
            .chain(UNLISTED)
            .chain(&[msr::TSC])
            .copied()
            .filter(|n| belongs(*n))
            .collect();
        numbers.extend(msr::MTRR_PHYS_BASE0..msr::MTRR_PHYS_BASE0 + 2 * msr::MTRR_VARIABLE_COUNT);
        numbers.sort_unstable();
        numbers.dedup();
        let mut list: Vec<_> = numbers.into_iter().filter_map(|n| Some((n, self.get_msr(n)?))).collect();
        for (number, value) in &mut list {
            if *number == msr::TSC {
                *value = self.partition.clock.tsc().wrapping_add(self.tsc_delta);
            }
        }
        list
    }

    /// Loads a complete state.
    pub(crate) fn load(&mut self, state: &VpState) -> Result<(), EngineError> {
        if state.xsave.len() < xsave::LEGACY_SIZE || state.lapic.regs.len() != LapicState::SIZE {
            return Err(EngineError::State(format!(
                "the XSAVE area has {} bytes and the APIC page {}; {} and {} are expected",
                state.xsave.len(),
                state.lapic.regs.len(),
                xsave::AREA_SIZE,
                LapicState::SIZE
            )));
        }
        // Out of every waiting state first: KVM refuses some combinations otherwise.
        let runnable = kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE };
        self.fd.set_mp_state(runnable).map_err(host("KVM_SET_MP_STATE"))?;
        self.load_system_registers(state)?;
        let mut regs = kvm_regs { rip: state.rip, rflags: state.rflags | rflags::FIXED, ..Default::default() };
        for (n, value) in state.gprs.iter().enumerate() {
            *gpr_field(&mut regs, n) = *value;
        }
        self.fd.set_regs(&regs).map_err(host("KVM_SET_REGS"))?;
        self.load_vectors(state)?;
        let debug =
            kvm_debugregs { db: state.dr, dr6: state.dr6 | state.pending.debug, dr7: state.dr7, ..Default::default() };
        self.fd.set_debug_regs(&debug).map_err(host("KVM_SET_DEBUGREGS"))?;
        for &(number, value) in &state.msrs {
            if number == msr::TSC || ELSEWHERE.contains(&number) {
                continue;
            }
            // Writing TSC_ADJUST moves the TSC, which is set as a whole afterwards.
            if !self.set_msr(number, value) && value != 0 {
                tracing::debug!(msr = number, value, "KVM does not take this MSR of the saved state");
            }
        }
        let tsc = state.msr(msr::TSC).unwrap_or_else(|| self.partition.clock.tsc());
        self.replace_tsc(tsc);
        let mut lapic = kvm_lapic_state::default();
        for (to, from) in lapic.regs.iter_mut().zip(&state.lapic.regs) {
            *to = from.cast_signed();
        }
        self.fd.set_lapic(&lapic).map_err(host("KVM_SET_LAPIC"))?;
        if state.lapic.tsc_deadline != 0 {
            self.set_msr(msr::TSC_DEADLINE, state.lapic.tsc_deadline);
        }
        self.load_events(state)
    }

    fn load_system_registers(&mut self, state: &VpState) -> Result<(), EngineError> {
        let mut sregs = self.fd.get_sregs().map_err(host("KVM_GET_SREGS"))?;
        let s = &state.segments;
        sregs.es = to_segment(&s[sreg::ES]);
        sregs.cs = to_segment(&s[sreg::CS]);
        sregs.ss = to_segment(&s[sreg::SS]);
        sregs.ds = to_segment(&s[sreg::DS]);
        sregs.fs = to_segment(&s[sreg::FS]);
        sregs.gs = to_segment(&s[sreg::GS]);
        sregs.ldt = to_segment(&state.ldtr);
        sregs.tr = to_segment(&state.tr);
        sregs.gdt = kvm_dtable { base: state.gdtr.base, limit: state.gdtr.limit, ..Default::default() };
        sregs.idt = kvm_dtable { base: state.idtr.base, limit: state.idtr.limit, ..Default::default() };
        sregs.cr0 = state.cr0;
        sregs.cr2 = state.cr2;
        sregs.cr3 = state.cr3;
        sregs.cr4 = state.cr4;
        sregs.cr8 = u64::from(state.lapic.regs[0x80] >> 4);
        sregs.efer = state.efer;
        sregs.apic_base = state.lapic.base;
        sregs.interrupt_bitmap = [0; 4];
        self.fd.set_sregs(&sregs).map_err(|e| match e.errno() {
            libc::EINVAL => EngineError::State(format!(
                "KVM refuses CR0 {:#x}, CR4 {:#x}, EFER {:#x}: the processor that they were saved on has features that \
                 this host's KVM lacks",
                state.cr0, state.cr4, state.efer
            )),
            _ => host("KVM_SET_SREGS")(e),
        })
    }

    fn load_vectors(&mut self, state: &VpState) -> Result<(), EngineError> {
        if self.cpuid_has_xsave() {
            let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
            xcrs.xcrs[0].value = if state.xcr0 == 0 { 1 } else { state.xcr0 };
            self.fd.set_xcrs(&xcrs).map_err(host("KVM_SET_XCRS"))?;
        }
        let mut area = state.xsave.clone();
        area.resize(4096, 0);
        area[xsave::HEADER_OFFSET] &= 7;
        area[xsave::HEADER_OFFSET + 1..xsave::AVX_OFFSET].fill(0);
        let mut image = kvm_xsave::default();
        for (word, bytes) in image.region.iter_mut().zip(area.chunks_exact(4)) {
            *word = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        }
        // SAFETY: components beyond the 4 KiB image exist only if dynamically enabled ones (AMX) were asked for by this
        // process, which never does.
        unsafe { self.fd.set_xsave(&image) }.map_err(host("KVM_SET_XSAVE"))
    }

    fn cpuid_has_xsave(&self) -> bool {
        self.partition.cpuid[self.index as usize].as_slice().iter().any(|e| e.function == 1 && e.ecx >> 26 & 1 != 0)
    }

    fn load_events(&mut self, state: &VpState) -> Result<(), EngineError> {
        let p = &state.pending;
        let mut e = kvm_vcpu_events::default();
        let debug = (p.debug != 0).then_some(PendingException { vector: x86::exception::DB, error_code: None });
        if let Some(x) = p.exception.or(debug) {
            e.exception.injected = 1;
            e.exception.nr = x.vector;
            e.exception.has_error_code = u8::from(x.error_code.is_some());
            e.exception.error_code = x.error_code.unwrap_or(0);
        }
        if let Some(vector) = p.interrupt {
            e.interrupt.injected = 1;
            e.interrupt.nr = vector;
        }
        let shadow = if p.mov_ss_shadow {
            KVM_X86_SHADOW_INT_MOV_SS
        } else if p.interrupt_shadow {
            KVM_X86_SHADOW_INT_STI
        } else {
            0
        };
        e.interrupt.shadow = shadow as u8;
        e.nmi.pending = u8::from(p.nmi_pending);
        e.nmi.masked = u8::from(p.nmi_masked);
        e.sipi_vector = p.sipi.unwrap_or(0).into();
        e.flags = KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW | KVM_VCPUEVENT_VALID_SIPI_VECTOR;
        self.fd.set_vcpu_events(&e).map_err(host("KVM_SET_VCPU_EVENTS"))?;
        let mp_state = match state.activity {
            Activity::Halted => KVM_MP_STATE_HALTED,
            Activity::WaitForSipi if p.sipi.is_some() => KVM_MP_STATE_SIPI_RECEIVED,
            Activity::WaitForSipi if p.init || self.index == 0 => KVM_MP_STATE_INIT_RECEIVED,
            Activity::WaitForSipi => KVM_MP_STATE_INIT_RECEIVED,
            Activity::Running | Activity::Shutdown => KVM_MP_STATE_RUNNABLE,
        };
        self.fd.set_mp_state(kvm_mp_state { mp_state }).map_err(host("KVM_SET_MP_STATE"))?;
        let waits = state.activity == Activity::WaitForSipi;
        self.partition.shared(self.index).waiting.store(waits, Ordering::SeqCst);
        Ok(())
    }
}
