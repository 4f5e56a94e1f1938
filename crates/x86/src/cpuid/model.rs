//! Processor models: the CPUID tables that guests see.
//!
//! A model is a fixed list of features under a name, so that a saved VM restores on every host that offers the same
//! name. Only what executes on the host's own units (SIMD and its friends) depends on the host, and a host that lacks
//! one of a model's features cannot offer the model. The vendor is the host's, because guests choose code by vendor
//! (SYSCALL against SYSENTER in compatibility mode, microcode loaders) and because KVM cannot offer another one.
//!
//! A software processor has none of the speculation defects that guests work around at some cost, and the tables say
//! so: on Intel through `IA32_ARCH_CAPABILITIES` ([`ARCH_CAPABILITIES`]), on AMD through the *_NO bits and automatic IBRS.
//! What Linux 6.1 and 6.12 make of these bits is judged by their boot messages ("Mitigation: Enhanced / Automatic IBRS",
//! no retpolines, no page-table isolation).

use super::bits::{self, Bit};
use super::{CpuidResult, CpuidTable};
use crate::xsave;
use serde::{Deserialize, Serialize};

/// Who makes the processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Vendor {
    /// "GenuineIntel".
    Intel,
    /// "AuthenticAMD" (and "HygonGenuine", which is presented as AMD).
    Amd,
}

impl Vendor {
    /// From leaf 0 of a table. Anything that is not Intel counts as AMD.
    pub fn of(table: &CpuidTable) -> Self {
        if table.get(0, 0).ebx == u32::from_le_bytes(*b"Genu") { Vendor::Intel } else { Vendor::Amd }
    }
    /// EBX, EDX, ECX of leaf 0.
    const fn string(self) -> [u32; 3] {
        let s: &[u8; 12] = match self {
            Vendor::Intel => b"GenuineIntel",
            Vendor::Amd => b"AuthenticAMD",
        };
        [
            u32::from_le_bytes([s[0], s[1], s[2], s[3]]),
            u32::from_le_bytes([s[4], s[5], s[6], s[7]]),
            u32::from_le_bytes([s[8], s[9], s[10], s[11]]),
        ]
    }
    /// CPUID.1:EAX. Intel: family 6 model 0x8f (Sapphire Rapids); AMD: family 0x19 model 0x11 (Genoa). Both are the
    /// oldest whose own defects are all covered by a bit that says "not affected".
    const fn signature(self) -> u32 {
        match self {
            Vendor::Intel => 0x000806f8,
            Vendor::Amd => 0x00a10f11,
        }
    }
}

/// Frequency in Hz of the local APIC timer before its divider, and of the crystal that leaf 0x15 reports. It is what
/// KVM's in-kernel APIC has (one tick a nanosecond), so that both engines agree.
pub const APIC_TIMER_HZ: u64 = 1_000_000_000;

/// Bits of the guest physical address (leaf 0x8000_0008); guest memory ends at 1 TiB.
pub const PHYSICAL_ADDRESS_BITS: u32 = 40;
/// Bits of the linear address.
pub const LINEAR_ADDRESS_BITS: u32 = 48;

/// `IA32_ARCH_CAPABILITIES` of Intel models (SDM volume 4, table 2-2): RDCL_NO, IBRS_ALL, SKIP_L1DFL_VMENTRY, SSB_NO,
/// MDS_NO, IF_PSCHANGE_MC_NO, TAA_NO, SBDR_SSDP_NO, FBSDP_NO, PSDP_NO, BHI_NO, PBRSB_NO, GDS_NO, RFDS_NO, ITS_NO.
pub const ARCH_CAPABILITIES: u64 = 1
    | 1 << 1
    | 1 << 3
    | 1 << 4
    | 1 << 5
    | 1 << 6
    | 1 << 8
    | 1 << 13
    | 1 << 14
    | 1 << 15
    | 1 << 20
    | 1 << 24
    | 1 << 26
    | 1 << 27
    | 1 << 62;

/// Why there is no such model.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ModelError {
    /// An unknown name.
    #[error("no processor model '{0}'; there are x86-64-v2, x86-64-v3 and host")]
    Unknown(String),
    /// The host cannot offer it.
    #[error("this host's processor lacks {missing}, which the model {model} needs; choose another --cpu-model")]
    HostLacks {
        /// The model.
        model: &'static str,
        /// Names of the features.
        missing: String,
    },
}

/// What every model has and the engines execute by themselves.
const SYSTEM: &[Bit] = &[
    bits::FPU,
    bits::DE,
    bits::PSE,
    bits::TSC,
    bits::MSR,
    bits::PAE,
    bits::MCE,
    bits::CX8,
    bits::APIC,
    bits::SEP,
    bits::MTRR,
    bits::PGE,
    bits::MCA,
    bits::CMOV,
    bits::PAT,
    bits::PSE36,
    bits::CLFSH,
    bits::FXSR,
    bits::PCID,
    bits::X2APIC,
    bits::TSC_DEADLINE,
    bits::HYPERVISOR,
    bits::ARAT,
    bits::FSGSBASE,
    bits::TSC_ADJUST,
    bits::SMEP,
    bits::ERMS,
    bits::INVPCID,
    bits::SMAP,
    bits::CLFLUSHOPT,
    bits::UMIP,
    bits::FSRM,
    bits::LAHF_LM,
    bits::PREFETCHW,
    bits::SYSCALL,
    bits::NX,
    bits::GBPAGES,
    bits::RDTSCP,
    bits::LM,
    bits::INVARIANT_TSC,
    bits::CX16,
];

/// Executed on the host's own units: x86-64-v2.
const NATIVE_V2: &[Bit] =
    &[bits::MMX, bits::SSE, bits::SSE2, bits::SSE3, bits::SSSE3, bits::SSE4_1, bits::SSE4_2, bits::POPCNT];

/// Executed on the host's own units: what x86-64-v3 adds.
const NATIVE_V3: &[Bit] =
    &[bits::PCLMULQDQ, bits::FMA, bits::AES, bits::AVX, bits::F16C, bits::AVX2, bits::BMI1, bits::BMI2, bits::LZCNT];

/// Done by the engines themselves, but absent from v2 machines.
const EMULATED_V3: &[Bit] = &[
    bits::MOVBE,
    bits::XSAVE,
    bits::XSAVEOPT,
    bits::XSAVEC,
    bits::XGETBV1,
    bits::XSAVES,
    bits::RDRAND,
    bits::RDSEED,
    bits::ADX,
    bits::RDPID,
    bits::CLWB,
];

/// `host` adds these where the host has them.
const NATIVE_HOST: &[Bit] = &[bits::SHA, bits::VAES, bits::VPCLMULQDQ, bits::GFNI];

/// Features of `table` that only the host's own units can execute and that this host lacks, by name.
pub fn lacking_on_host(table: &CpuidTable) -> Vec<&'static str> {
    let native = NATIVE_V2.iter().chain(NATIVE_V3).chain(NATIVE_HOST);
    let on_host = |b: &Bit| host_cpuid(b.leaf, b.subleaf).reg(b.reg) >> b.bit & 1 != 0;
    native.filter(|b| b.in_table(table) && !on_host(b)).map(|b| b.name).collect()
}

/// Answers CPUID on the host.
pub fn host_cpuid(leaf: u32, subleaf: u32) -> CpuidResult {
    let max = core::arch::x86_64::__cpuid(leaf & 0x8000_0000).eax;
    if leaf > max {
        return CpuidResult::default();
    }
    let r = core::arch::x86_64::__cpuid_count(leaf, subleaf);
    CpuidResult { eax: r.eax, ebx: r.ebx, ecx: r.ecx, edx: r.edx }
}

/// A processor model, made for this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuModel {
    name: &'static str,
    vendor: Vendor,
    features: Vec<Bit>,
}

impl CpuModel {
    /// The names, for help texts.
    pub const NAMES: &'static [&'static str] = &["x86-64-v2", "x86-64-v3", "host"];

    /// The model with this name, if this host can offer it.
    pub fn by_name(name: &str) -> Result<Self, ModelError> {
        Self::by_name_on(name, host_cpuid)
    }

    /// As [`CpuModel::by_name`], for a host that answers CPUID so.
    pub fn by_name_on(name: &str, host: impl Fn(u32, u32) -> CpuidResult) -> Result<Self, ModelError> {
        let name = *Self::NAMES.iter().find(|n| **n == name).ok_or_else(|| ModelError::Unknown(name.to_owned()))?;
        let vendor = if host(0, 0).ebx == u32::from_le_bytes(*b"Genu") { Vendor::Intel } else { Vendor::Amd };
        let on_host = |b: &Bit| host(b.leaf, b.subleaf).reg(b.reg) >> b.bit & 1 != 0;
        let mut features = SYSTEM.to_vec();
        let mut needed = NATIVE_V2.to_vec();
        match name {
            "x86-64-v2" => {}
            "x86-64-v3" => {
                needed.extend_from_slice(NATIVE_V3);
                features.extend_from_slice(EMULATED_V3);
            }
            _ => {
                // AVX state is the host's to save: without it nothing that is VEX-encoded can be offered.
                if on_host(&bits::AVX) {
                    features.extend_from_slice(EMULATED_V3);
                    let mut own = [NATIVE_V3, NATIVE_HOST].concat();
                    own.retain(on_host);
                    features.extend(own);
                }
            }
        }
        let missing: Vec<_> = needed.iter().filter(|b| !on_host(b)).map(|b| b.name).collect();
        if !missing.is_empty() {
            return Err(ModelError::HostLacks { model: name, missing: missing.join(", ") });
        }
        features.append(&mut needed);
        match vendor {
            // Linux does not look at BHI_NO; with the control bit it needs no clearing sequence at every system call.
            Vendor::Intel => features.extend([bits::ARCH_CAPABILITIES, bits::SPEC_CTRL, bits::BHI_CTRL]),
            Vendor::Amd => features.extend([
                bits::CR8_LEGACY,
                bits::MMXEXT,
                bits::TOPOEXT,
                bits::AMD_SSB_NO,
                bits::AMD_BTC_NO,
                bits::LFENCE_SERIALIZING,
                bits::NULL_SEL_CLR_BASE,
                bits::AUTOIBRS,
                bits::SRSO_NO,
                bits::TSA_SQ_NO,
                bits::TSA_L1_NO,
            ]),
        }
        // How the host's x87 unit keeps its pointers is visible in every FXSAVE image, and only there.
        if name == "host" {
            features.extend([bits::FDP_EXCPTN_ONLY, bits::ZERO_FCS_FDS].iter().filter(|b| on_host(b)));
        }
        Ok(Self { name, vendor, features })
    }

    /// Its name.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// The vendor that guests see.
    pub fn vendor(&self) -> Vendor {
        self.vendor
    }

    /// The features.
    pub fn features(&self) -> &[Bit] {
        &self.features
    }

    /// CPUID.1:EAX, which a processor has in EDX after reset.
    pub fn signature(&self) -> u32 {
        self.vendor.signature()
    }

    /// What CPUID answers on the VP with this APIC id, of `vp_count` VPs (one socket, one thread a core), with a TSC of
    /// `tsc_hz`.
    pub fn table(&self, apic_id: u32, vp_count: u32, tsc_hz: u64) -> CpuidTable {
        let mut t = CpuidTable::default();
        let amd = self.vendor == Vendor::Amd;
        let max_leaf = if amd { 0x16 } else { 0x1f };
        let [ebx, edx, ecx] = self.vendor.string();
        t.set(0, None, CpuidResult { eax: max_leaf, ebx, ecx, edx });
        t.set(
            1,
            None,
            CpuidResult {
                eax: self.signature(),
                // CLFLUSH line of 64 bytes, room for vp_count APIC ids, initial APIC id.
                ebx: apic_id << 24 | vp_count.next_power_of_two().min(255) << 16 | 8 << 8,
                ..Default::default()
            },
        );
        t.set(6, None, CpuidResult::default());
        let subleaves = if amd { 0 } else { 2 };
        for subleaf in 0..=subleaves {
            let eax = if subleaf == 0 { subleaves } else { 0 };
            t.set(7, Some(subleaf), CpuidResult { eax, ..Default::default() });
        }
        self.topology(&mut t, apic_id, vp_count);
        self.caches(&mut t, vp_count);
        self.frequency(&mut t, tsc_hz);
        self.extended(&mut t, apic_id, vp_count);
        if self.features.contains(&bits::XSAVE) {
            xsave_leaves(&mut t);
        }
        for bit in &self.features {
            set_bit(&mut t, bit);
        }
        if vp_count > 1 {
            set_bit(&mut t, &bits::HTT);
            if amd {
                set_bit(&mut t, &bits::CMP_LEGACY);
            }
        }
        if amd {
            // APM volume 3, E.4.1: AMD repeats these of leaf 1 EDX in leaf 0x8000_0001 EDX.
            const SHARED: u32 = 0x0183_f3ff;
            let low = t.get(1, 0).edx & SHARED;
            let mut r = t.get(0x8000_0001, 0);
            r.edx |= low;
            t.set(0x8000_0001, None, r);
        }
        t
    }

    fn topology(&self, t: &mut CpuidTable, apic_id: u32, vp_count: u32) {
        let shift = vp_count.next_power_of_two().trailing_zeros();
        // SDM volume 2, leaf 0xB: level type 1 is SMT, 2 is core; 0 ends the list.
        let leaves: &[u32] = if self.vendor == Vendor::Intel { &[0xb, 0x1f] } else { &[0xb] };
        for &leaf in leaves {
            t.set(leaf, Some(0), CpuidResult { eax: 0, ebx: 1, ecx: 1 << 8, edx: apic_id });
            t.set(leaf, Some(1), CpuidResult { eax: shift, ebx: vp_count, ecx: 2 << 8 | 1, edx: apic_id });
            t.set(leaf, Some(2), CpuidResult { eax: 0, ebx: 0, ecx: 2, edx: apic_id });
        }
    }

    /// 32 KiB L1 instruction and data, 1 MiB L2 a core, 16 MiB L3 shared by all.
    fn caches(&self, t: &mut CpuidTable, vp_count: u32) {
        // SDM volume 2, leaf 4, and APM volume 3, leaf 0x8000_001D, share one layout: EAX type, level, self-initialising,
        // sharing; EBX ways, partitions, line size; ECX sets.
        let amd = self.vendor == Vendor::Amd;
        let cores = vp_count.next_power_of_two() - 1;
        let entry = |kind: u32, level: u32, ways: u32, sets: u32, sharing: u32| CpuidResult {
            eax: kind | level << 5 | 1 << 8 | sharing << 14 | if amd { 0 } else { cores.min(63) << 26 },
            ebx: 63 | (ways - 1) << 22,
            ecx: sets - 1,
            edx: 0,
        };
        let list =
            [entry(1, 1, 8, 64, 0), entry(2, 1, 8, 64, 0), entry(3, 2, 16, 1024, 0), entry(3, 3, 16, 16384, cores)];
        let leaf = if amd { 0x8000_001d } else { 4 };
        for (i, e) in list.into_iter().enumerate() {
            t.set(leaf, Some(i as u32), e);
        }
        if amd {
            // APM volume 3, E.4.4: L1 line, lines per tag, associativity, KiB; E.4.5: L2 (8: 16 ways) and L3 in 512 KiB.
            let l1 = 32 << 24 | 8 << 16 | 1 << 8 | 64;
            let tlb = 0xff40_ff40;
            t.set(0x8000_0005, None, CpuidResult { eax: tlb, ebx: tlb, ecx: l1, edx: l1 });
            let l2 = 1024 << 16 | 8 << 12 | 1 << 8 | 64;
            let l3 = 32 << 18 | 8 << 12 | 1 << 8 | 64;
            t.set(0x8000_0006, None, CpuidResult { eax: 0, ebx: 0x4200_4200, ecx: l2, edx: l3 });
        } else {
            // Leaf 2: "see leaf 4" (0xff), 64-byte prefetching; leaf 0x8000_0006 is read by old kernels.
            t.set(2, None, CpuidResult { eax: 0x00fe_ff01, ebx: 0xf0, ecx: 0, edx: 0 });
            t.set(0x8000_0006, None, CpuidResult { ecx: 1024 << 16 | 8 << 12 | 64, ..Default::default() });
        }
    }

    fn frequency(&self, t: &mut CpuidTable, tsc_hz: u64) {
        // Leaf 0x15: TSC = crystal * EBX / EAX. Linux multiplies the crystal in kHz by EBX in 32 bits, so that EBX is kept
        // small; the best fraction under that bound is off by less than 1 part in a million.
        let most = u64::from(u32::MAX) / (APIC_TIMER_HZ / 1000);
        let (n, d) = best_fraction(tsc_hz, APIC_TIMER_HZ, most);
        t.set(0x15, None, CpuidResult { eax: d as u32, ebx: n as u32, ecx: APIC_TIMER_HZ as u32, edx: 0 });
        let mhz = (tsc_hz / 1_000_000).min(0xffff) as u32;
        t.set(0x16, None, CpuidResult { eax: mhz, ebx: mhz, ecx: 100, edx: 0 });
    }

    fn extended(&self, t: &mut CpuidTable, apic_id: u32, vp_count: u32) {
        let amd = self.vendor == Vendor::Amd;
        let [ebx, edx, ecx] = if amd { self.vendor.string() } else { [0; 3] };
        let max = if amd { 0x8000_0021 } else { 0x8000_0008 };
        t.set(0x8000_0000, None, CpuidResult { eax: max, ebx, ecx, edx });
        let eax = if amd { self.signature() } else { 0 };
        t.set(0x8000_0001, None, CpuidResult { eax, ..Default::default() });
        let mut brand = [0u8; 48];
        let text = format!("Viridian Virtual Processor ({})", self.name);
        brand[..text.len().min(47)].copy_from_slice(&text.as_bytes()[..text.len().min(47)]);
        for (i, chunk) in brand.chunks_exact(16).enumerate() {
            let word = |n: usize| u32::from_le_bytes([chunk[n], chunk[n + 1], chunk[n + 2], chunk[n + 3]]);
            let r = CpuidResult { eax: word(0), ebx: word(4), ecx: word(8), edx: word(12) };
            t.set(0x8000_0002 + i as u32, None, r);
        }
        t.set(0x8000_0007, None, CpuidResult::default());
        let shift = vp_count.next_power_of_two().trailing_zeros();
        let ecx = if amd { (vp_count - 1) | shift << 12 } else { 0 };
        let eax = PHYSICAL_ADDRESS_BITS | LINEAR_ADDRESS_BITS << 8;
        t.set(0x8000_0008, None, CpuidResult { eax, ebx: 0, ecx, edx: 0 });
        if amd {
            t.set(0x8000_001e, None, CpuidResult { eax: apic_id, ebx: apic_id & 0xff, ecx: 0, edx: 0 });
            t.set(0x8000_0021, None, CpuidResult::default());
        }
    }
}

fn set_bit(t: &mut CpuidTable, bit: &Bit) {
    let indexed = matches!(bit.leaf, 4 | 7 | 0xb | 0xd | 0x1f | 0x8000_001d);
    let mut r = t.get(bit.leaf, bit.subleaf);
    *r.reg_mut(bit.reg) |= 1 << bit.bit;
    t.set(bit.leaf, indexed.then_some(bit.subleaf), r);
}

/// Leaf 0xD (SDM volume 1, section 13.2) for x87, SSE and AVX. EBX of subleaves 0 and 1 depends on XCR0; the engine
/// fills it in.
fn xsave_leaves(t: &mut CpuidTable) {
    let all = xsave::AREA_SIZE as u32;
    t.set(0xd, Some(0), CpuidResult { eax: 7, ebx: all, ecx: all, edx: 0 });
    t.set(0xd, Some(1), CpuidResult { eax: 0, ebx: all, ecx: 0, edx: 0 });
    let avx = CpuidResult { eax: xsave::AVX_SIZE as u32, ebx: xsave::AVX_OFFSET as u32, ecx: 0, edx: 0 };
    t.set(0xd, Some(2), avx);
}

/// The fraction nearest to `n / d` whose numerator is at most `most`: the last convergent of the continued fraction that
/// fits, or the best intermediate one behind it.
fn best_fraction(n: u64, d: u64, most: u64) -> (u64, u64) {
    let (mut n, mut d) = (n, d.max(1));
    let (mut p0, mut q0, mut p1, mut q1) = (0u64, 1u64, 1u64, 0u64);
    while d != 0 {
        let digit = n / d;
        if p1 != 0 && digit > (most - p0) / p1 {
            // At least half of the digit gives a better approximation than leaving it out.
            let part = (most - p0) / p1;
            if part * 2 > digit {
                (p1, q1) = (part * p1 + p0, part * q1 + q0);
            }
            break;
        }
        (p0, q0, p1, q1) = (p1, q1, digit * p1 + p0, digit * q1 + q0);
        (n, d) = (d, n % d);
    }
    (p1.max(1), q1.max(1))
}
