//! The CPUID leaves of the hypervisor (TLFS chapter 2).

use partition::Abilities;
use x86::cpuid::{CpuidResult, CpuidTable};

/// Partition privileges and features in leaf 0x4000_0003.
#[allow(missing_docs)]
pub mod privilege {
    // EAX
    pub const VP_RUNTIME: u32 = 1 << 0;
    pub const REFERENCE_COUNTER: u32 = 1 << 1;
    pub const SYNIC: u32 = 1 << 2;
    pub const SYNTHETIC_TIMERS: u32 = 1 << 3;
    pub const APIC: u32 = 1 << 4;
    pub const HYPERCALL: u32 = 1 << 5;
    pub const VP_INDEX: u32 = 1 << 6;
    pub const RESET: u32 = 1 << 7;
    pub const REFERENCE_TSC: u32 = 1 << 9;
    pub const GUEST_IDLE: u32 = 1 << 10;
    pub const FREQUENCY: u32 = 1 << 11;
    // EBX
    pub const POST_MESSAGES: u32 = 1 << 4;
    pub const SIGNAL_EVENTS: u32 = 1 << 5;
    pub const EXTENDED_HYPERCALLS: u32 = 1 << 20;
    pub const START_VP: u32 = 1 << 21;
    // EDX
    pub const XMM_INPUT: u32 = 1 << 4;
    pub const GUEST_IDLE_STATE: u32 = 1 << 5;
    pub const FREQUENCY_MSRS: u32 = 1 << 8;
    pub const CRASH_MSRS: u32 = 1 << 10;
    pub const XMM_OUTPUT: u32 = 1 << 15;
    pub const DIRECT_TIMERS: u32 = 1 << 19;
}

/// Recommendations in leaf 0x4000_0004, EAX.
#[allow(missing_docs)]
pub mod recommend {
    pub const REMOTE_FLUSH: u32 = 1 << 2;
    pub const RELAXED_TIMING: u32 = 1 << 5;
    pub const DEPRECATE_AUTO_EOI: u32 = 1 << 9;
    pub const CLUSTER_IPI: u32 = 1 << 10;
    pub const EX_PROCESSOR_MASKS: u32 = 1 << 11;
}

/// Version that leaf 0x4000_0002 reports: that of Windows Server 2022, the first with VMBus 5.3.
pub const VERSION: (u16, u16, u32) = (10, 0, 20348);

/// The leaves, in ascending order. With `abilities` of the engine, privileges and recommendations say exactly what
/// works.
pub fn leaves(abilities: Abilities) -> Vec<(u32, CpuidResult)> {
    use {privilege as p, recommend as r};
    let text = |eax, s: &[u8; 12]| {
        let word = |i: usize| u32::from_le_bytes([s[i], s[i + 1], s[i + 2], s[i + 3]]);
        CpuidResult { eax, ebx: word(0), ecx: word(4), edx: word(8) }
    };
    let when = |on: bool, bit: u32| if on { bit } else { 0 };
    let (major, minor, build) = VERSION;
    vec![
        (0x4000_0000, text(0x4000_000a, b"Microsoft Hv")),
        // "Hv#1"
        (0x4000_0001, CpuidResult { eax: 0x3123_7648, ..Default::default() }),
        (0x4000_0002, CpuidResult { eax: build, ebx: u32::from(major) << 16 | u32::from(minor), ecx: 0, edx: 0 }),
        (
            0x4000_0003,
            CpuidResult {
                eax: p::VP_RUNTIME
                    | p::REFERENCE_COUNTER
                    | p::SYNIC
                    | p::SYNTHETIC_TIMERS
                    | when(abilities.apic_access, p::APIC)
                    | p::HYPERCALL
                    | p::VP_INDEX
                    | p::RESET
                    | p::REFERENCE_TSC
                    | p::GUEST_IDLE
                    | p::FREQUENCY,
                ebx: p::POST_MESSAGES | p::SIGNAL_EVENTS | p::EXTENDED_HYPERCALLS | p::START_VP,
                ecx: 0,
                edx: p::XMM_INPUT
                    | p::GUEST_IDLE_STATE
                    | p::FREQUENCY_MSRS
                    | p::CRASH_MSRS
                    | p::XMM_OUTPUT
                    | p::DIRECT_TIMERS,
            },
        ),
        (
            0x4000_0004,
            CpuidResult {
                // The synthetic APIC registers are not recommended: on no engine of ours are they faster than x2APIC.
                eax: when(abilities.remote_tlb_flush, r::REMOTE_FLUSH)
                    | r::RELAXED_TIMING
                    | r::DEPRECATE_AUTO_EOI
                    | r::CLUSTER_IPI
                    | r::EX_PROCESSOR_MASKS,
                // Spins before HvCallNotifyLongSpinWait.
                ebx: 0xfff,
                ecx: 0,
                edx: 0,
            },
        ),
        // Most virtual processors, most logical processors, interrupt vectors for remapping.
        (0x4000_0005, CpuidResult { eax: partition::engine::MAX_VPS, ebx: partition::engine::MAX_VPS, ecx: 0, edx: 0 }),
        // Hardware features, CPU management, SVM, nesting: none is used or offered.
        (0x4000_0006, CpuidResult::default()),
        (0x4000_0007, CpuidResult::default()),
        (0x4000_0008, CpuidResult::default()),
        (0x4000_0009, CpuidResult::default()),
        (0x4000_000a, CpuidResult::default()),
        (0x4000_0080, text(0x4000_0082, b"Microsoft VS")),
        // "VS#1"
        (0x4000_0081, CpuidResult { eax: 0x3123_5356, ..Default::default() }),
        (0x4000_0082, CpuidResult::default()),
    ]
}

/// Adds the leaves to a VP's table and sets "hypervisor present" in leaf 1 (ECX bit 31).
pub fn add_to(table: &mut CpuidTable, abilities: Abilities) {
    let mut one = table.get(1, 0);
    one.ecx |= 1 << 31;
    table.set(1, None, one);
    for (leaf, result) in leaves(abilities) {
        table.set(leaf, None, result);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_finds_hyper_v() {
        let mut table = CpuidTable::default();
        table.set(1, None, CpuidResult { eax: 7, ..Default::default() });
        add_to(&mut table, Abilities::default());
        assert_eq!(table.get(1, 0), CpuidResult { eax: 7, ecx: 1 << 31, ..Default::default() });
        let l = table.get(0x4000_0000, 0);
        let name: Vec<u8> = [l.ebx, l.ecx, l.edx].iter().flat_map(|w| w.to_le_bytes()).collect();
        assert_eq!(name, b"Microsoft Hv");
        assert_eq!(table.get(0x4000_0001, 0).eax.to_le_bytes(), *b"Hv#1");
        assert_eq!(table.get(0x4000_0081, 0).eax.to_le_bytes(), *b"VS#1");
    }

    #[test]
    fn offers_depend_on_the_engine() {
        let get = |a, leaf| leaves(a).into_iter().find(|(l, _)| *l == leaf).unwrap().1.eax;
        let none = Abilities::default();
        let all = Abilities { remote_tlb_flush: true, apic_access: true, ..none };
        assert_eq!(get(none, 0x4000_0004) & recommend::REMOTE_FLUSH, 0);
        assert_ne!(get(all, 0x4000_0004) & recommend::REMOTE_FLUSH, 0);
        assert_eq!(get(none, 0x4000_0003) & privilege::APIC, 0);
        assert_ne!(get(all, 0x4000_0003) & privilege::APIC, 0);
    }
}
