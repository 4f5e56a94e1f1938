//! CPUID feature bits by name: where each one is (SDM volume 2, "CPUID"; APM volume 3, appendix E).

use super::{CpuidResult, CpuidTable};

/// A register that CPUID returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reg {
    /// EAX.
    Eax,
    /// EBX.
    Ebx,
    /// ECX.
    Ecx,
    /// EDX.
    Edx,
}

impl CpuidResult {
    /// One register.
    pub const fn reg(&self, reg: Reg) -> u32 {
        match reg {
            Reg::Eax => self.eax,
            Reg::Ebx => self.ebx,
            Reg::Ecx => self.ecx,
            Reg::Edx => self.edx,
        }
    }
    /// One register, to change.
    pub const fn reg_mut(&mut self, reg: Reg) -> &mut u32 {
        match reg {
            Reg::Eax => &mut self.eax,
            Reg::Ebx => &mut self.ebx,
            Reg::Ecx => &mut self.ecx,
            Reg::Edx => &mut self.edx,
        }
    }
}

/// A feature bit: its name as Linux and the manuals write it, and its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bit {
    /// Name.
    pub name: &'static str,
    /// Leaf.
    pub leaf: u32,
    /// Subleaf (0 for leaves without).
    pub subleaf: u32,
    /// Register.
    pub reg: Reg,
    /// Bit number.
    pub bit: u32,
}

impl Bit {
    const fn new(name: &'static str, leaf: u32, subleaf: u32, reg: Reg, bit: u32) -> Self {
        Self { name, leaf, subleaf, reg, bit }
    }
    /// Is it set in this table?
    pub fn in_table(&self, table: &CpuidTable) -> bool {
        table.get(self.leaf, self.subleaf).reg(self.reg) >> self.bit & 1 != 0
    }
}

macro_rules! bits {
    ($($name:ident = $leaf:literal . $sub:literal $reg:ident $bit:literal;)*) => {
        $(#[doc = concat!("CPUID ", stringify!($leaf), ".", stringify!($sub), " ", stringify!($reg), " bit ", stringify!($bit), ".")]
        pub const $name: Bit = Bit::new(stringify!($name), $leaf, $sub, Reg::$reg, $bit);)*
        /// Every bit that this module names.
        pub const ALL: &[Bit] = &[$($name),*];
    };
}

bits! {
    SSE3 = 1 . 0 Ecx 0;
    PCLMULQDQ = 1 . 0 Ecx 1;
    MONITOR = 1 . 0 Ecx 3;
    SSSE3 = 1 . 0 Ecx 9;
    FMA = 1 . 0 Ecx 12;
    CX16 = 1 . 0 Ecx 13;
    PCID = 1 . 0 Ecx 17;
    SSE4_1 = 1 . 0 Ecx 19;
    SSE4_2 = 1 . 0 Ecx 20;
    X2APIC = 1 . 0 Ecx 21;
    MOVBE = 1 . 0 Ecx 22;
    POPCNT = 1 . 0 Ecx 23;
    TSC_DEADLINE = 1 . 0 Ecx 24;
    AES = 1 . 0 Ecx 25;
    XSAVE = 1 . 0 Ecx 26;
    OSXSAVE = 1 . 0 Ecx 27;
    AVX = 1 . 0 Ecx 28;
    F16C = 1 . 0 Ecx 29;
    RDRAND = 1 . 0 Ecx 30;
    HYPERVISOR = 1 . 0 Ecx 31;
    FPU = 1 . 0 Edx 0;
    VME = 1 . 0 Edx 1;
    DE = 1 . 0 Edx 2;
    PSE = 1 . 0 Edx 3;
    TSC = 1 . 0 Edx 4;
    MSR = 1 . 0 Edx 5;
    PAE = 1 . 0 Edx 6;
    MCE = 1 . 0 Edx 7;
    CX8 = 1 . 0 Edx 8;
    APIC = 1 . 0 Edx 9;
    SEP = 1 . 0 Edx 11;
    MTRR = 1 . 0 Edx 12;
    PGE = 1 . 0 Edx 13;
    MCA = 1 . 0 Edx 14;
    CMOV = 1 . 0 Edx 15;
    PAT = 1 . 0 Edx 16;
    PSE36 = 1 . 0 Edx 17;
    CLFSH = 1 . 0 Edx 19;
    MMX = 1 . 0 Edx 23;
    FXSR = 1 . 0 Edx 24;
    SSE = 1 . 0 Edx 25;
    SSE2 = 1 . 0 Edx 26;
    HTT = 1 . 0 Edx 28;
    ARAT = 6 . 0 Eax 2;
    FSGSBASE = 7 . 0 Ebx 0;
    TSC_ADJUST = 7 . 0 Ebx 1;
    BMI1 = 7 . 0 Ebx 3;
    AVX2 = 7 . 0 Ebx 5;
    FDP_EXCPTN_ONLY = 7 . 0 Ebx 6;
    SMEP = 7 . 0 Ebx 7;
    BMI2 = 7 . 0 Ebx 8;
    ERMS = 7 . 0 Ebx 9;
    INVPCID = 7 . 0 Ebx 10;
    ZERO_FCS_FDS = 7 . 0 Ebx 13;
    RDSEED = 7 . 0 Ebx 18;
    ADX = 7 . 0 Ebx 19;
    SMAP = 7 . 0 Ebx 20;
    CLFLUSHOPT = 7 . 0 Ebx 23;
    CLWB = 7 . 0 Ebx 24;
    SHA = 7 . 0 Ebx 29;
    UMIP = 7 . 0 Ecx 2;
    PKU = 7 . 0 Ecx 3;
    OSPKE = 7 . 0 Ecx 4;
    GFNI = 7 . 0 Ecx 8;
    VAES = 7 . 0 Ecx 9;
    VPCLMULQDQ = 7 . 0 Ecx 10;
    LA57 = 7 . 0 Ecx 16;
    RDPID = 7 . 0 Ecx 22;
    FSRM = 7 . 0 Edx 4;
    SPEC_CTRL = 7 . 0 Edx 26;
    INTEL_STIBP = 7 . 0 Edx 27;
    ARCH_CAPABILITIES = 7 . 0 Edx 29;
    INTEL_SSBD = 7 . 0 Edx 31;
    BHI_CTRL = 7 . 2 Edx 4;
    XSAVEOPT = 0xd . 1 Eax 0;
    XSAVEC = 0xd . 1 Eax 1;
    XGETBV1 = 0xd . 1 Eax 2;
    XSAVES = 0xd . 1 Eax 3;
    LAHF_LM = 0x8000_0001 . 0 Ecx 0;
    CMP_LEGACY = 0x8000_0001 . 0 Ecx 1;
    SVM = 0x8000_0001 . 0 Ecx 2;
    CR8_LEGACY = 0x8000_0001 . 0 Ecx 4;
    LZCNT = 0x8000_0001 . 0 Ecx 5;
    SSE4A = 0x8000_0001 . 0 Ecx 6;
    PREFETCHW = 0x8000_0001 . 0 Ecx 8;
    TOPOEXT = 0x8000_0001 . 0 Ecx 22;
    SYSCALL = 0x8000_0001 . 0 Edx 11;
    NX = 0x8000_0001 . 0 Edx 20;
    MMXEXT = 0x8000_0001 . 0 Edx 22;
    FFXSR = 0x8000_0001 . 0 Edx 25;
    GBPAGES = 0x8000_0001 . 0 Edx 26;
    RDTSCP = 0x8000_0001 . 0 Edx 27;
    LM = 0x8000_0001 . 0 Edx 29;
    INVARIANT_TSC = 0x8000_0007 . 0 Edx 8;
    CLZERO = 0x8000_0008 . 0 Ebx 0;
    XSAVEERPTR = 0x8000_0008 . 0 Ebx 2;
    WBNOINVD = 0x8000_0008 . 0 Ebx 9;
    AMD_IBPB = 0x8000_0008 . 0 Ebx 12;
    AMD_IBRS = 0x8000_0008 . 0 Ebx 14;
    AMD_STIBP = 0x8000_0008 . 0 Ebx 15;
    AMD_SSBD = 0x8000_0008 . 0 Ebx 24;
    AMD_SSB_NO = 0x8000_0008 . 0 Ebx 26;
    AMD_BTC_NO = 0x8000_0008 . 0 Ebx 29;
    LFENCE_SERIALIZING = 0x8000_0021 . 0 Eax 2;
    NULL_SEL_CLR_BASE = 0x8000_0021 . 0 Eax 6;
    AUTOIBRS = 0x8000_0021 . 0 Eax 8;
    SRSO_NO = 0x8000_0021 . 0 Eax 29;
    TSA_SQ_NO = 0x8000_0021 . 0 Ecx 1;
    TSA_L1_NO = 0x8000_0021 . 0 Ecx 2;
}
