//! Model-specific registers (SDM volume 4; APM volume 2, appendix A). What does not exist in the model is #GP(0).

use crate::apic::Denied;
use crate::features::Features;
use crate::vp::{Exec, Fault, SoftVp};
use partition::MsrOutcome;
use x86::cpuid::{Vendor, bits};
use x86::msr;
use x86::paging::is_canonical;
use x86::regs::{cr0, efer};

/// Fixed-range MTRRs, in the order in which [`MsrFile`] keeps them.
const FIXED_MTRRS: [u32; 11] = [
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

const MTRR_PHYS_LAST: u32 = msr::MTRR_PHYS_BASE0 + 2 * msr::MTRR_VARIABLE_COUNT - 1;
/// MTRRCAP: variable ranges, fixed ranges, write-combining.
const MTRRCAP: u64 = msr::MTRR_VARIABLE_COUNT as u64 | 1 << 8 | 1 << 10;

/// MISC_ENABLE bits that are there and cannot be changed: no branch trace storage, no PEBS.
const MISC_ENABLE_FIXED: u64 = 1 << 11 | 1 << 12;
/// MISC_ENABLE bits that may be written: fast strings, enhanced SpeedStep, limit CPUID, XTPR, XD disable.
const MISC_ENABLE_WRITABLE: u64 = 1 | 1 << 16 | 1 << 22 | 1 << 23 | 1 << 34;

/// HWCR: the TSC counts at the P0 frequency (Linux warns if it does not).
const HWCR_TSC_FREQ_SEL: u64 = 1 << 24;
/// DE_CFG: LFENCE serialises (APM volume 2, section 3.2.9).
const DE_CFG_LFENCE: u64 = 1 << 1;

/// Intel: reported microcode revision; high, so that nobody thinks it old.
const MICROCODE_INTEL: u64 = 0xffff_ffff << 32;
const MICROCODE_AMD: u64 = 0x0a10_11ff;

/// AMD registers that exist, keep what is written and mean nothing here (numbers from APM volume 2, appendix A, and the
/// processor programming references): SYSCFG, NB_CFG, INT_PENDING_MSG, DC_CFG, BU_CFG2, LS_CFG, TOP_MEM, TOP_MEM2,
/// TSEG address, TSEG mask.
const AMD_PLAIN: [u32; 10] = [
    msr::SYSCFG,
    msr::NB_CFG,
    0xc001_0055,
    0xc001_1022,
    0xc001_102a,
    0xc001_1020,
    0xc001_001a,
    0xc001_001d,
    0xc001_0112,
    0xc001_0113,
];

/// MSRs that have no place in [`crate::vp::VpBlock`].
#[derive(Clone, Debug)]
pub struct MsrFile {
    vendor: Vendor,
    tsc_adjust: u64,
    misc_enable: u64,
    microcode: u64,
    spec_ctrl: u64,
    pat: u64,
    mtrr_variable: [u64; 2 * msr::MTRR_VARIABLE_COUNT as usize],
    mtrr_fixed: [u64; FIXED_MTRRS.len()],
    mtrr_def_type: u64,
    mcg_status: u64,
    debugctl: u64,
    hwcr: u64,
    de_cfg: u64,
    amd_plain: [u64; AMD_PLAIN.len()],
}

impl MsrFile {
    /// Values after reset.
    pub fn new(features: &Features) -> Self {
        let vendor = features.vendor();
        Self {
            vendor,
            tsc_adjust: 0,
            misc_enable: MISC_ENABLE_FIXED | 1,
            microcode: if vendor == Vendor::Intel { MICROCODE_INTEL } else { MICROCODE_AMD },
            spec_ctrl: 0,
            pat: msr::PAT_RESET,
            mtrr_variable: [0; 2 * msr::MTRR_VARIABLE_COUNT as usize],
            mtrr_fixed: [0; FIXED_MTRRS.len()],
            mtrr_def_type: 0,
            mcg_status: 0,
            debugctl: 0,
            hwcr: HWCR_TSC_FREQ_SEL,
            de_cfg: DE_CFG_LFENCE,
            amd_plain: [0; AMD_PLAIN.len()],
        }
    }

    /// PAT.
    pub fn pat(&self) -> u64 {
        self.pat
    }

    /// DEBUGCTL (bit 1: single-step on branches).
    pub fn debugctl(&self) -> u64 {
        self.debugctl
    }
}

/// Is every byte a memory type that a fixed MTRR may have (SDM volume 3, table 11-8)?
fn mtrr_types(value: u64) -> bool {
    value.to_le_bytes().iter().all(|t| matches!(t, 0 | 1 | 4 | 5 | 6))
}

/// Is every byte a memory type that PAT may have (table 11-10)?
fn pat_types(value: u64) -> bool {
    value.to_le_bytes().iter().all(|t| matches!(t, 0 | 1 | 4..=7))
}

fn canonical(value: u64) -> Exec<u64> {
    if is_canonical(value) { Ok(value) } else { Err(Fault::GP0) }
}

fn only(value: u64, allowed: u64) -> Exec<u64> {
    if value & !allowed == 0 { Ok(value) } else { Err(Fault::GP0) }
}

impl From<Denied> for Fault {
    fn from(_: Denied) -> Self {
        Fault::GP0
    }
}

impl SoftVp {
    /// RDMSR, after the privilege check.
    pub fn read_msr(&mut self, number: u32) -> Exec<u64> {
        if self.partition.msr_is_machines(number) {
            return match self.exits().msr_read(self.index, number) {
                MsrOutcome::Value(value) => Ok(value),
                MsrOutcome::ValueThenIdle(value) => {
                    self.idle_for_any();
                    Ok(value)
                }
                MsrOutcome::Fault => Err(Fault::GP0),
            };
        }
        self.read_own_msr(number)
    }

    /// WRMSR, after the privilege check.
    pub fn write_msr(&mut self, number: u32, value: u64) -> Exec {
        if self.partition.msr_is_machines(number) {
            return match self.exits().msr_write(self.index, number, value) {
                MsrOutcome::Value(_) => Ok(()),
                MsrOutcome::ValueThenIdle(_) => {
                    self.idle_for_any();
                    Ok(())
                }
                MsrOutcome::Fault => Err(Fault::GP0),
            };
        }
        self.write_own_msr(number, value)
    }

    fn read_own_msr(&mut self, number: u32) -> Exec<u64> {
        let f = &self.features;
        let (m, s) = (&self.msrs, &self.s);
        let intel = m.vendor == Vendor::Intel;
        Ok(match number {
            msr::TSC => self.tsc(),
            msr::APIC_BASE => self.apic.base(),
            msr::TSC_ADJUST if f.tsc_adjust() => m.tsc_adjust,
            msr::BIOS_SIGN_ID => m.microcode,
            msr::MTRRCAP => MTRRCAP,
            msr::SYSENTER_CS => s.sysenter[0],
            msr::SYSENTER_ESP => s.sysenter[1],
            msr::SYSENTER_EIP => s.sysenter[2],
            // No banks, no control register.
            msr::MCG_CAP => 0,
            msr::MCG_STATUS => m.mcg_status,
            msr::DEBUGCTL => m.debugctl,
            // Last-branch records: none was taken.
            0x1db..=0x1de => 0,
            msr::MTRR_PHYS_BASE0..=MTRR_PHYS_LAST => m.mtrr_variable[(number - msr::MTRR_PHYS_BASE0) as usize],
            msr::PAT => m.pat,
            msr::MTRR_DEF_TYPE => m.mtrr_def_type,
            msr::TSC_DEADLINE if f.tsc_deadline() => self.apic.tsc_deadline(),
            msr::X2APIC_BASE..=msr::X2APIC_LAST => return Ok(self.apic.x2apic_read(number - msr::X2APIC_BASE)?),
            msr::XSS if f.xsaves() => 0,
            msr::EFER => s.efer,
            msr::STAR => s.star,
            msr::LSTAR => s.lstar,
            msr::CSTAR => s.cstar,
            msr::FMASK => s.fmask,
            msr::FS_BASE => s.segments[x86::segment::sreg::FS].base,
            msr::GS_BASE => s.segments[x86::segment::sreg::GS].base,
            msr::KERNEL_GS_BASE => s.kernel_gs_base,
            msr::TSC_AUX if f.rdtscp() || f.rdpid() => s.tsc_aux,
            msr::SPEC_CTRL if f.has(&bits::SPEC_CTRL) || f.has(&bits::AMD_IBRS) => m.spec_ctrl,
            msr::ARCH_CAPABILITIES if f.has(&bits::ARCH_CAPABILITIES) => x86::cpuid::ARCH_CAPABILITIES,
            msr::PLATFORM_ID if intel => 0,
            msr::PERF_STATUS if intel => 0,
            msr::MISC_ENABLE if intel => m.misc_enable,
            msr::HWCR if !intel => m.hwcr,
            msr::DE_CFG if !intel => m.de_cfg,
            _ => {
                if let Some(i) = FIXED_MTRRS.iter().position(|n| *n == number) {
                    m.mtrr_fixed[i]
                } else if let Some(i) = AMD_PLAIN.iter().position(|n| *n == number && !intel) {
                    m.amd_plain[i]
                } else {
                    return Err(Fault::GP0);
                }
            }
        })
    }

    fn write_own_msr(&mut self, number: u32, value: u64) -> Exec {
        let intel = self.msrs.vendor == Vendor::Intel;
        match number {
            msr::TSC => {
                let delta = value.wrapping_sub(self.tsc());
                self.msrs.tsc_adjust = self.msrs.tsc_adjust.wrapping_add(delta);
                self.shift_tsc(delta);
            }
            msr::TSC_ADJUST if self.features.tsc_adjust() => {
                let delta = value.wrapping_sub(self.msrs.tsc_adjust);
                self.msrs.tsc_adjust = value;
                self.shift_tsc(delta);
            }
            msr::APIC_BASE => {
                self.apic.set_base(value, self.features.maxphyaddr())?;
                self.set_apic_page(self.apic.mmio_page());
            }
            // Microcode loaders write zero before they read the revision.
            msr::BIOS_SIGN_ID => {}
            msr::SYSENTER_CS => self.s.sysenter[0] = value & 0xffff_ffff,
            msr::SYSENTER_ESP => self.s.sysenter[1] = canonical(value)?,
            msr::SYSENTER_EIP => self.s.sysenter[2] = canonical(value)?,
            msr::MCG_STATUS => self.msrs.mcg_status = only(value, 0)?,
            msr::DEBUGCTL => self.msrs.debugctl = only(value, 3)?,
            msr::MTRR_PHYS_BASE0..=MTRR_PHYS_LAST => {
                let i = number - msr::MTRR_PHYS_BASE0;
                let address = ((1u64 << self.features.maxphyaddr()) - 1) & !0xfff;
                let low = if i % 2 == 0 { 0xff } else { 1 << 11 };
                let value = only(value, address | low)?;
                if i % 2 == 0 && !mtrr_types(value & 0xff) {
                    return Err(Fault::GP0);
                }
                self.msrs.mtrr_variable[i as usize] = value;
            }
            msr::PAT => {
                if !pat_types(value) {
                    return Err(Fault::GP0);
                }
                self.msrs.pat = value;
            }
            msr::MTRR_DEF_TYPE => {
                if !mtrr_types(value & 0xff) {
                    return Err(Fault::GP0);
                }
                self.msrs.mtrr_def_type = only(value, 0xcff)?;
            }
            msr::TSC_DEADLINE if self.features.tsc_deadline() => self.apic.set_tsc_deadline(value),
            msr::X2APIC_BASE..=msr::X2APIC_LAST => {
                let partition = self.partition.clone();
                self.apic.x2apic_write(&partition.apics, self.exits(), number - msr::X2APIC_BASE, value)?;
            }
            msr::XSS if self.features.xsaves() => {
                only(value, 0)?;
            }
            msr::EFER => self.write_efer(value)?,
            msr::STAR => self.s.star = value,
            msr::LSTAR => self.s.lstar = canonical(value)?,
            msr::CSTAR => self.s.cstar = canonical(value)?,
            msr::FMASK => self.s.fmask = only(value, 0xffff_ffff)?,
            msr::FS_BASE => self.s.segments[x86::segment::sreg::FS].base = canonical(value)?,
            msr::GS_BASE => self.s.segments[x86::segment::sreg::GS].base = canonical(value)?,
            msr::KERNEL_GS_BASE => self.s.kernel_gs_base = canonical(value)?,
            msr::TSC_AUX if self.features.rdtscp() || self.features.rdpid() => {
                self.s.tsc_aux = only(value, 0xffff_ffff)?;
            }
            msr::SPEC_CTRL if self.features.has(&bits::SPEC_CTRL) || self.features.has(&bits::AMD_IBRS) => {
                let stibp = self.features.has(&bits::INTEL_STIBP) || self.features.has(&bits::AMD_STIBP);
                let ssbd = self.features.has(&bits::INTEL_SSBD) || self.features.has(&bits::AMD_SSBD);
                // BHI_DIS_S: without indirect-branch history there is nothing to disable.
                let bhi = self.features.has(&bits::BHI_CTRL);
                let allowed = 1 | u64::from(stibp) << 1 | u64::from(ssbd) << 2 | u64::from(bhi) << 10;
                self.msrs.spec_ctrl = only(value, allowed)?;
            }
            msr::PRED_CMD if self.features.has(&bits::SPEC_CTRL) || self.features.has(&bits::AMD_IBPB) => {
                only(value, 1)?;
            }
            msr::MISC_ENABLE if intel => {
                self.msrs.misc_enable = only(value & !MISC_ENABLE_FIXED, MISC_ENABLE_WRITABLE)? | MISC_ENABLE_FIXED;
            }
            msr::PERF_STATUS if intel => {}
            msr::HWCR if !intel => self.msrs.hwcr = value & 0xffff_ffff | HWCR_TSC_FREQ_SEL,
            msr::DE_CFG if !intel => self.msrs.de_cfg = value | DE_CFG_LFENCE,
            _ => {
                if let Some(i) = FIXED_MTRRS.iter().position(|n| *n == number) {
                    if !mtrr_types(value) {
                        return Err(Fault::GP0);
                    }
                    self.msrs.mtrr_fixed[i] = value;
                } else if let Some(i) = AMD_PLAIN.iter().position(|n| *n == number && !intel) {
                    self.msrs.amd_plain[i] = value;
                } else {
                    return Err(Fault::GP0);
                }
            }
        }
        Ok(())
    }

    fn shift_tsc(&mut self, delta: u64) {
        self.apic.set_tsc_delta(self.apic.tsc_delta().wrapping_add(delta));
        self.refresh_tsc();
    }

    /// EFER (SDM volume 3, section 2.2.1): LMA is the processor's, LME cannot change while paging is on.
    fn write_efer(&mut self, value: u64) -> Exec {
        only(value, self.features.efer_mask())?;
        let old = self.s.efer;
        if self.s.cr0 & cr0::PG != 0 && (old ^ value) & efer::LME != 0 {
            return Err(Fault::GP0);
        }
        self.s.efer = value & !efer::LMA | old & efer::LMA;
        if (old ^ self.s.efer) & efer::NXE != 0 {
            self.flush_tlb_all();
        }
        self.mode_changed();
        Ok(())
    }

    /// The MSRs of a saved state, ascending by number.
    pub(crate) fn save_msrs(&mut self) -> Vec<(u32, u64)> {
        let mut list = Vec::with_capacity(STATE_MSRS.len() + 40);
        let fixed = FIXED_MTRRS.iter().chain(&AMD_PLAIN);
        let numbers = STATE_MSRS.iter().chain(fixed).copied().chain(msr::MTRR_PHYS_BASE0..=MTRR_PHYS_LAST);
        for number in numbers {
            if let Ok(value) = self.read_own_msr(number) {
                list.push((number, value));
            }
        }
        list.sort_unstable();
        list
    }

    /// Loads the MSRs of a saved state; what it does not name gets its reset value. Registers that this model does not
    /// have are ignored: an engine may save more than another one has.
    pub(crate) fn load_msrs(&mut self, list: &[(u32, u64)]) {
        self.msrs = MsrFile::new(&self.features);
        let s = &mut *self.s;
        (s.star, s.lstar, s.cstar, s.fmask, s.kernel_gs_base, s.tsc_aux) = (0, 0, 0, 0, 0, 0);
        s.sysenter = [0; 3];
        let value_of = |number| list.iter().find(|(n, _)| *n == number).map(|(_, v)| *v);
        // The TSC's value when the state was taken, against the partition's clock, which stands at that moment.
        let tsc = value_of(msr::TSC).unwrap_or_else(|| self.partition.clock.tsc());
        self.apic.set_tsc_delta(tsc.wrapping_sub(self.partition.clock.tsc()));
        for &(number, value) in list {
            match number {
                msr::TSC | msr::APIC_BASE | msr::TSC_DEADLINE | msr::EFER | msr::FS_BASE | msr::GS_BASE => {}
                msr::TSC_ADJUST => self.msrs.tsc_adjust = value,
                msr::BIOS_SIGN_ID => self.msrs.microcode = value,
                msr::X2APIC_BASE..=msr::X2APIC_LAST => {}
                _ => {
                    if self.write_own_msr(number, value).is_err() && value != 0 {
                        tracing::debug!(msr = number, value, "an MSR of the saved state does not exist here");
                    }
                }
            }
        }
    }
}

/// MSRs of a saved state, besides the MTRRs and AMD's plain ones.
const STATE_MSRS: &[u32] = &[
    msr::TSC,
    msr::TSC_ADJUST,
    msr::SPEC_CTRL,
    msr::BIOS_SIGN_ID,
    msr::SYSENTER_CS,
    msr::SYSENTER_ESP,
    msr::SYSENTER_EIP,
    msr::MCG_STATUS,
    msr::MISC_ENABLE,
    msr::DEBUGCTL,
    msr::PAT,
    msr::MTRR_DEF_TYPE,
    msr::XSS,
    msr::STAR,
    msr::LSTAR,
    msr::CSTAR,
    msr::FMASK,
    msr::KERNEL_GS_BASE,
    msr::TSC_AUX,
    msr::HWCR,
    msr::DE_CFG,
];
