//! Model-specific register numbers (SDM volume 4; APM volume 2, appendix A).
#![allow(missing_docs)]

pub const TSC: u32 = 0x10;
pub const PLATFORM_ID: u32 = 0x17;
pub const APIC_BASE: u32 = 0x1b;
pub const FEATURE_CONTROL: u32 = 0x3a;
pub const TSC_ADJUST: u32 = 0x3b;
pub const SPEC_CTRL: u32 = 0x48;
pub const PRED_CMD: u32 = 0x49;
pub const BIOS_SIGN_ID: u32 = 0x8b;
pub const MTRRCAP: u32 = 0xfe;
pub const ARCH_CAPABILITIES: u32 = 0x10a;
pub const FLUSH_CMD: u32 = 0x10b;
pub const SYSENTER_CS: u32 = 0x174;
pub const SYSENTER_ESP: u32 = 0x175;
pub const SYSENTER_EIP: u32 = 0x176;
pub const MCG_CAP: u32 = 0x179;
pub const MCG_STATUS: u32 = 0x17a;
pub const MCG_CTL: u32 = 0x17b;
pub const PERF_STATUS: u32 = 0x198;
pub const MISC_ENABLE: u32 = 0x1a0;
pub const DEBUGCTL: u32 = 0x1d9;
/// First of the variable-range MTRR pairs (base, mask).
pub const MTRR_PHYS_BASE0: u32 = 0x200;
/// Number of variable-range MTRRs that every model offers (MTRRCAP.VCNT).
pub const MTRR_VARIABLE_COUNT: u32 = 8;
pub const MTRR_FIX64K_00000: u32 = 0x250;
pub const MTRR_FIX16K_80000: u32 = 0x258;
pub const MTRR_FIX16K_A0000: u32 = 0x259;
pub const MTRR_FIX4K_C0000: u32 = 0x268;
pub const PAT: u32 = 0x277;
pub const MTRR_DEF_TYPE: u32 = 0x2ff;
pub const MC0_CTL: u32 = 0x400;
pub const TSC_DEADLINE: u32 = 0x6e0;
/// First x2APIC register; register r of the APIC page is at X2APIC_BASE + r / 16.
pub const X2APIC_BASE: u32 = 0x800;
pub const X2APIC_LAST: u32 = 0x8ff;
pub const XSS: u32 = 0xda0;
pub const EFER: u32 = 0xc000_0080;
pub const STAR: u32 = 0xc000_0081;
pub const LSTAR: u32 = 0xc000_0082;
pub const CSTAR: u32 = 0xc000_0083;
pub const FMASK: u32 = 0xc000_0084;
pub const FS_BASE: u32 = 0xc000_0100;
pub const GS_BASE: u32 = 0xc000_0101;
pub const KERNEL_GS_BASE: u32 = 0xc000_0102;
pub const TSC_AUX: u32 = 0xc000_0103;
/// AMD: SYSCFG.
pub const SYSCFG: u32 = 0xc001_0010;
/// AMD: hardware configuration register.
pub const HWCR: u32 = 0xc001_0015;
/// AMD: northbridge configuration.
pub const NB_CFG: u32 = 0xc001_001f;
/// AMD: OS-visible workaround length and status.
pub const OSVW_ID_LENGTH: u32 = 0xc001_0140;
pub const OSVW_STATUS: u32 = 0xc001_0141;
/// AMD: patch level and decode configuration.
pub const DE_CFG: u32 = 0xc001_1029;

/// First and last of the synthetic MSRs that TLFS defines.
pub const HV_FIRST: u32 = 0x4000_0000;
pub const HV_LAST: u32 = 0x4000_1fff;

/// APIC_BASE bits (SDM volume 3, section 10.4.4).
pub mod apic_base {
    pub const BSP: u64 = 1 << 8;
    pub const X2APIC_ENABLE: u64 = 1 << 10;
    pub const ENABLE: u64 = 1 << 11;
    /// Physical address after reset.
    pub const DEFAULT: u64 = 0xfee0_0000;
}

/// PAT after reset (SDM volume 3, section 11.12.4).
pub const PAT_RESET: u64 = 0x0007_0406_0007_0406;
