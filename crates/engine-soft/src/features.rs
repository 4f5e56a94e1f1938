//! What the processor model offers: which instructions exist, which control bits may be set, what CPUID answers.

use crate::vp::SoftVp;
use iced_x86::{CpuidFeature, Instruction, Mnemonic};
use x86::cpuid::bits::{self, Bit};
use x86::cpuid::{CpuidResult, CpuidTable, Vendor};
use x86::regs::{cr4, efer, xcr0};
use x86::{msr, xsave};

/// Number of words in a set of `CpuidFeature`s.
const WORDS: usize = 4;

/// The processor model in the form in which the engine asks about it.
#[derive(Clone, Debug)]
pub struct Features {
    table: CpuidTable,
    vendor: Vendor,
    /// One bit for each `iced_x86::CpuidFeature` that is offered.
    isa: [u64; WORDS],
    maxphyaddr: u32,
    cr4_mask: u64,
    efer_mask: u64,
    xcr0_mask: u64,
    nx: bool,
    pcid: bool,
    gbpages: bool,
    lzcnt: bool,
    bmi1: bool,
}

macro_rules! queries {
    ($($name:ident = $bit:ident;)*) => {
        $(#[doc = concat!("Does the model have ", stringify!($bit), "?")]
        pub fn $name(&self) -> bool { self.has(&bits::$bit) })*
    };
}

impl Features {
    /// The model that a CPUID table describes.
    pub fn from_table(table: &CpuidTable) -> Self {
        let has = |b: &Bit| b.in_table(table);
        let mut isa = [0u64; WORDS];
        for (feature, bit) in FEATURE_BITS {
            if bit.as_ref().is_none_or(has) {
                let n = *feature as usize;
                isa[n / 64] |= 1 << (n % 64);
            }
        }
        let mut cr4_mask = cr4::TSD | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::PCE;
        for (bit, mask) in [
            (bits::VME, cr4::VME | cr4::PVI),
            (bits::DE, cr4::DE),
            (bits::PSE, cr4::PSE),
            (bits::PAE, cr4::PAE),
            (bits::MCE, cr4::MCE),
            (bits::PGE, cr4::PGE),
            (bits::UMIP, cr4::UMIP),
            (bits::FSGSBASE, cr4::FSGSBASE),
            (bits::PCID, cr4::PCIDE),
            (bits::XSAVE, cr4::OSXSAVE),
            (bits::SMEP, cr4::SMEP),
            (bits::SMAP, cr4::SMAP),
            (bits::PKU, cr4::PKE),
        ] {
            if has(&bit) {
                cr4_mask |= mask;
            }
        }
        let mut efer_mask = 0;
        for (bit, mask) in [
            (bits::SYSCALL, efer::SCE),
            (bits::LM, efer::LME | efer::LMA),
            (bits::NX, efer::NXE),
            (bits::FFXSR, efer::FFXSR),
            (bits::AUTOIBRS, efer::AIBRSE),
        ] {
            if has(&bit) {
                efer_mask |= mask;
            }
        }
        let sizes = table.get(0x8000_0008, 0).eax & 0xff;
        Self {
            vendor: Vendor::of(table),
            isa,
            maxphyaddr: if sizes == 0 { 36 } else { sizes.clamp(32, 52) },
            cr4_mask,
            efer_mask,
            xcr0_mask: if has(&bits::XSAVE) { u64::from(table.get(0xd, 0).eax) } else { 0 },
            nx: has(&bits::NX),
            pcid: has(&bits::PCID),
            gbpages: has(&bits::GBPAGES),
            lzcnt: has(&bits::LZCNT),
            bmi1: has(&bits::BMI1),
            table: table.clone(),
        }
    }

    /// Is the instruction part of the model? If not, it is #UD, whatever its operands.
    ///
    /// Encodings that a processor without the feature executes as something else are allowed: TZCNT and LZCNT (which
    /// are then BSF and BSR: see [`Features::bmi1`], [`Features::lzcnt`]), WBNOINVD (WBINVD), hints (ENDBR, RDSSP,
    /// PREFETCHW, CLDEMOTE: no operation).
    pub fn allows(&self, i: &Instruction) -> bool {
        match i.mnemonic() {
            Mnemonic::Tzcnt
            | Mnemonic::Lzcnt
            | Mnemonic::Wbnoinvd
            | Mnemonic::Endbr32
            | Mnemonic::Endbr64
            | Mnemonic::Rdsspd
            | Mnemonic::Rdsspq
            | Mnemonic::Prefetchw
            | Mnemonic::Prefetch
            | Mnemonic::Prefetchwt1
            | Mnemonic::Prefetchit0
            | Mnemonic::Prefetchit1
            | Mnemonic::Cldemote
            | Mnemonic::Reservednop => return true,
            // Without SSE's own bit, AMD's MMX extensions bring these.
            Mnemonic::INVALID => return false,
            _ => {}
        }
        i.cpuid_features().iter().all(|f| {
            let n = *f as usize;
            self.isa.get(n / 64).is_some_and(|w| w >> (n % 64) & 1 != 0)
        })
    }

    /// Does the model have this feature?
    pub fn has(&self, bit: &Bit) -> bool {
        bit.in_table(&self.table)
    }

    /// The table that the model was made from.
    pub fn table(&self) -> &CpuidTable {
        &self.table
    }
    /// Whose processor it is. It decides about SYSENTER and SYSCALL outside 64-bit mode, and about MSRs.
    pub fn vendor(&self) -> Vendor {
        self.vendor
    }
    /// Is it an Intel processor?
    pub fn is_intel(&self) -> bool {
        self.vendor == Vendor::Intel
    }
    /// Bits of a guest physical address (MAXPHYADDR).
    pub fn maxphyaddr(&self) -> u32 {
        self.maxphyaddr
    }
    /// Physical-address bits of a page-table entry that must be zero (bits MAXPHYADDR to 51).
    pub fn reserved_pa_bits(&self) -> u64 {
        ((1 << 52) - 1) & !((1 << self.maxphyaddr) - 1)
    }
    /// Bits of CR4 that may be set.
    pub fn cr4_mask(&self) -> u64 {
        self.cr4_mask
    }
    /// Bits of EFER that may be set (LMA among them: writes leave it alone).
    pub fn efer_mask(&self) -> u64 {
        self.efer_mask
    }
    /// Bits of XCR0 that may be set; 0 without XSAVE.
    pub fn xcr0_mask(&self) -> u64 {
        self.xcr0_mask
    }
    /// Is `value` allowed in XCR0 (SDM volume 1, section 13.3)?
    pub fn xcr0_valid(&self, value: u64) -> bool {
        value & !self.xcr0_mask == 0 && value & xcr0::X87 != 0 && (value & xcr0::AVX == 0 || value & xcr0::SSE != 0)
    }
    /// NX?
    pub fn nx(&self) -> bool {
        self.nx
    }
    /// PCID?
    pub fn pcid(&self) -> bool {
        self.pcid
    }
    /// 1 GiB pages?
    pub fn gbpages(&self) -> bool {
        self.gbpages
    }
    /// LZCNT? Without it the encoding is BSR.
    pub fn lzcnt(&self) -> bool {
        self.lzcnt
    }
    /// BMI1? Without it the encoding of TZCNT is BSF.
    pub fn bmi1(&self) -> bool {
        self.bmi1
    }
    queries! {
        smep = SMEP;
        smap = SMAP;
        umip = UMIP;
        fsgsbase = FSGSBASE;
        invpcid = INVPCID;
        vme = VME;
        pse36 = PSE36;
        xsave = XSAVE;
        xsaveopt = XSAVEOPT;
        xsavec = XSAVEC;
        xsaves = XSAVES;
        xgetbv1 = XGETBV1;
        avx = AVX;
        x2apic = X2APIC;
        tsc_deadline = TSC_DEADLINE;
        tsc_adjust = TSC_ADJUST;
        rdtscp = RDTSCP;
        rdpid = RDPID;
        syscall = SYSCALL;
        long_mode = LM;
        autoibrs = AUTOIBRS;
    }
}

/// CPUID on a VP, with the bits that depend on its state (SDM volume 2, "CPUID"; volume 1, section 13.2).
pub fn cpuid(vp: &SoftVp, leaf: u32, subleaf: u32) -> CpuidResult {
    let mut r = vp.features.table.get(leaf, subleaf);
    let mut dynamic = |bit: &Bit, on: bool| {
        if bit.leaf == leaf && bit.subleaf == subleaf {
            let mask = 1 << bit.bit;
            let reg = r.reg_mut(bit.reg);
            *reg = if on { *reg | mask } else { *reg & !mask };
        }
    };
    match leaf {
        1 => {
            // Leaf 1 ignores the subleaf; `dynamic` must not.
            let apic = vp.apic.base() & msr::apic_base::ENABLE != 0;
            let r = &mut r;
            let osxsave = vp.s.cr4 & cr4::OSXSAVE != 0;
            r.ecx = r.ecx & !(1 << bits::OSXSAVE.bit) | u32::from(osxsave) << bits::OSXSAVE.bit;
            r.edx = r.edx & !(1 << bits::APIC.bit) | u32::from(apic) << bits::APIC.bit;
        }
        7 => dynamic(&bits::OSPKE, vp.s.cr4 & cr4::PKE != 0),
        0xd if vp.features.xsave() => match subleaf {
            0 => r.ebx = xsave_size(vp.s.xcr0) as u32,
            // XSAVEC and XSAVES: compacted; the supervisor mask is empty, and AVX follows the header either way.
            1 => r.ebx = xsave_size(vp.s.xcr0) as u32,
            _ => {}
        },
        0x8000_0001 if !vp.features.is_intel() => {
            let apic = u32::from(vp.apic.base() & msr::apic_base::ENABLE != 0);
            r.edx = r.edx & !(1 << 9) | apic << 9;
        }
        // AMD: SYSCALL is reported always; Intel: only in 64-bit mode.
        0x8000_0001 if vp.s.code_size != crate::vp::CodeSize::Bits64 => r.edx &= !(1 << bits::SYSCALL.bit),
        _ => {}
    }
    r
}

/// Bytes of an XSAVE area for the components in `mask` (x87 and SSE are always part of the legacy region).
pub fn xsave_size(mask: u64) -> usize {
    if mask & xcr0::AVX != 0 { xsave::AREA_SIZE } else { xsave::HEADER_OFFSET + xsave::HEADER_SIZE }
}

/// Which CPUID bit stands for each of the decoder's features; `None`: every processor that Viridian offers has it.
/// Features that are not listed are never offered.
#[rustfmt::skip]
const FEATURE_BITS: &[(CpuidFeature, Option<Bit>)] = &[
    (CpuidFeature::INTEL8086, None),
    (CpuidFeature::INTEL186, None),
    (CpuidFeature::INTEL286, None),
    (CpuidFeature::INTEL386, None),
    (CpuidFeature::INTEL486, None),
    (CpuidFeature::X64, Some(bits::LM)),
    (CpuidFeature::CPUID, None),
    (CpuidFeature::FPU, Some(bits::FPU)),
    (CpuidFeature::FPU287, Some(bits::FPU)),
    (CpuidFeature::FPU387, Some(bits::FPU)),
    (CpuidFeature::PAUSE, None),
    (CpuidFeature::MULTIBYTENOP, None),
    (CpuidFeature::RDPMC, None),
    (CpuidFeature::MSR, Some(bits::MSR)),
    (CpuidFeature::TSC, Some(bits::TSC)),
    (CpuidFeature::CX8, Some(bits::CX8)),
    (CpuidFeature::CMOV, Some(bits::CMOV)),
    (CpuidFeature::SEP, Some(bits::SEP)),
    (CpuidFeature::CLFSH, Some(bits::CLFSH)),
    (CpuidFeature::FXSR, Some(bits::FXSR)),
    (CpuidFeature::MMX, Some(bits::MMX)),
    (CpuidFeature::SSE, Some(bits::SSE)),
    (CpuidFeature::SSE2, Some(bits::SSE2)),
    (CpuidFeature::SSE3, Some(bits::SSE3)),
    (CpuidFeature::SSSE3, Some(bits::SSSE3)),
    (CpuidFeature::SSE4_1, Some(bits::SSE4_1)),
    (CpuidFeature::SSE4_2, Some(bits::SSE4_2)),
    (CpuidFeature::SSE4A, Some(bits::SSE4A)),
    (CpuidFeature::POPCNT, Some(bits::POPCNT)),
    (CpuidFeature::CMPXCHG16B, Some(bits::CX16)),
    (CpuidFeature::MONITOR, Some(bits::MONITOR)),
    (CpuidFeature::PCLMULQDQ, Some(bits::PCLMULQDQ)),
    (CpuidFeature::AES, Some(bits::AES)),
    (CpuidFeature::AVX, Some(bits::AVX)),
    (CpuidFeature::AVX2, Some(bits::AVX2)),
    (CpuidFeature::FMA, Some(bits::FMA)),
    (CpuidFeature::F16C, Some(bits::F16C)),
    (CpuidFeature::BMI1, Some(bits::BMI1)),
    (CpuidFeature::BMI2, Some(bits::BMI2)),
    (CpuidFeature::ADX, Some(bits::ADX)),
    (CpuidFeature::MOVBE, Some(bits::MOVBE)),
    (CpuidFeature::SHA, Some(bits::SHA)),
    (CpuidFeature::VAES, Some(bits::VAES)),
    (CpuidFeature::VPCLMULQDQ, Some(bits::VPCLMULQDQ)),
    (CpuidFeature::GFNI, Some(bits::GFNI)),
    (CpuidFeature::RDRAND, Some(bits::RDRAND)),
    (CpuidFeature::RDSEED, Some(bits::RDSEED)),
    (CpuidFeature::XSAVE, Some(bits::XSAVE)),
    (CpuidFeature::XSAVEOPT, Some(bits::XSAVEOPT)),
    (CpuidFeature::XSAVEC, Some(bits::XSAVEC)),
    (CpuidFeature::XSAVES, Some(bits::XSAVES)),
    (CpuidFeature::FSGSBASE, Some(bits::FSGSBASE)),
    (CpuidFeature::INVPCID, Some(bits::INVPCID)),
    (CpuidFeature::SMAP, Some(bits::SMAP)),
    (CpuidFeature::CLFLUSHOPT, Some(bits::CLFLUSHOPT)),
    (CpuidFeature::CLWB, Some(bits::CLWB)),
    (CpuidFeature::RDPID, Some(bits::RDPID)),
    (CpuidFeature::RDTSCP, Some(bits::RDTSCP)),
    (CpuidFeature::SYSCALL, Some(bits::SYSCALL)),
    // VMCALL and VMMCALL reach the system handlers, which decide (hypercalls, or #UD).
    (CpuidFeature::CLZERO, Some(bits::CLZERO)),
];

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions};
    use x86::cpuid::CpuModel;

    fn decode(bytes: &[u8]) -> Instruction {
        Decoder::new(64, bytes, DecoderOptions::NONE).decode()
    }

    #[test]
    fn v2_lacks_what_v3_adds() {
        let v2 = Features::from_table(&CpuModel::by_name("x86-64-v2").unwrap().table(0, 1, 2_000_000_000));
        let andn = decode(&[0xc4, 0xe2, 0x78, 0xf2, 0xc1]);
        let vpaddd = decode(&[0xc5, 0xfd, 0xfe, 0xc1]);
        let paddd = decode(&[0x66, 0x0f, 0xfe, 0xc1]);
        let tzcnt = decode(&[0xf3, 0x0f, 0xbc, 0xc1]);
        let zmm = decode(&[0x62, 0xf1, 0x7d, 0x48, 0xfe, 0xc1]);
        let vmcall = decode(&[0x0f, 0x01, 0xc1]);
        assert!(!v2.allows(&andn) && !v2.allows(&vpaddd) && !v2.allows(&zmm) && !v2.allows(&vmcall));
        assert!(v2.allows(&paddd) && v2.allows(&tzcnt));
        assert_eq!(v2.cr4_mask() & cr4::OSXSAVE, 0);
        if let Ok(v3) = CpuModel::by_name("x86-64-v3") {
            let v3 = Features::from_table(&v3.table(0, 1, 2_000_000_000));
            assert!(v3.allows(&andn) && v3.allows(&vpaddd) && !v3.allows(&zmm));
            assert!(v3.xcr0_valid(7) && v3.xcr0_valid(1) && !v3.xcr0_valid(5) && !v3.xcr0_valid(2));
        }
    }
}
