//! Random accesses to MSRs and to the local APIC, and random states to load: nothing panics, hangs or leaves the
//! processor in a state that it would refuse itself.
#![allow(missing_docs)]

use partition::{Clock, EngineOptions, GuestMemory, PartitionConfig};
use std::sync::Arc;
use viridian_engine_soft::partition_impl::SoftPartition;
use viridian_engine_soft::vp::SoftVp;
use x86::cpuid::CpuModel;

/// A small generator, so that a failure can be repeated from its printed seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
    /// Values that tend to be at the edges.
    fn value(&mut self) -> u64 {
        match self.below(6) {
            0 => 0,
            1 => 1 << self.below(64),
            2 => u64::MAX,
            3 => self.below(0x1000),
            4 => self.next() & 0xffff_ffff,
            _ => self.next(),
        }
    }
}

fn vps(model: &str, count: u32, vendor: &'static [u8; 4]) -> (Arc<Clock>, Vec<SoftVp>) {
    let host = move |leaf, sub| {
        let mut r = x86::cpuid::host_cpuid(leaf, sub);
        if leaf == 0 {
            r.ebx = u32::from_le_bytes(*vendor);
        }
        r
    };
    let clock = Arc::new(Clock::new());
    let model = CpuModel::by_name_on(model, host).unwrap();
    let config = PartitionConfig {
        vp_count: count,
        memory: GuestMemory::with_ram(1 << 20, 0xc000_0000..1 << 32, false).unwrap(),
        clock: clock.clone(),
        cpuid: (0..count).map(|n| model.table(n, count, clock.tsc_frequency_hz())).collect(),
        msr_exits: vec![0x4000_0000..=0x4000_1fff],
        hypercall_port: None,
        options: EngineOptions::default(),
    };
    let partition = SoftPartition::new(config).unwrap();
    let vps = (0..count).map(|n| SoftVp::new(partition.clone(), n)).collect();
    (clock, vps)
}

const MSRS: &[u32] = &[
    0x10,
    0x17,
    0x1b,
    0x3a,
    0x3b,
    0x48,
    0x49,
    0x8b,
    0xfe,
    0x10a,
    0x10b,
    0x174,
    0x175,
    0x176,
    0x179,
    0x17a,
    0x198,
    0x1a0,
    0x1d9,
    0x1db,
    0x200,
    0x20f,
    0x210,
    0x250,
    0x258,
    0x268,
    0x277,
    0x2ff,
    0x400,
    0x6e0,
    0xda0,
    0x4000_0002,
    0xc000_0080,
    0xc000_0081,
    0xc000_0082,
    0xc000_0084,
    0xc000_0100,
    0xc000_0102,
    0xc000_0103,
    0xc001_0010,
    0xc001_0015,
    0xc001_1029,
];

#[test]
fn random_registers() {
    let seed: u64 =
        std::env::var("VIRIDIAN_SEED").map_or(0x5eed_0001, |s| s.parse().expect("VIRIDIAN_SEED is a number"));
    println!("seed {seed} (VIRIDIAN_SEED repeats it)");
    for vendor in [b"Genu", b"Auth"] {
        let mut random = Random(seed);
        let (clock, mut vps) = vps("x86-64-v2", 3, vendor);
        clock.start();
        for step in 0..200_000u32 {
            let who = random.below(3) as usize;
            let vp = &mut vps[who];
            match random.below(8) {
                0 | 1 => {
                    let msr = match random.below(4) {
                        0 => 0x800 + random.below(0x100) as u32,
                        1 => random.next() as u32,
                        _ => MSRS[random.below(MSRS.len() as u64) as usize],
                    };
                    let value = random.value();
                    if vp.write_msr(msr, value).is_ok() {
                        let _ = vp.read_msr(msr);
                    }
                }
                2 => {
                    let _ = vp.read_msr(MSRS[random.below(MSRS.len() as u64) as usize]);
                }
                3 | 4 => {
                    let data = random.value().to_le_bytes();
                    let len = [1, 2, 4, 8][random.below(4) as usize];
                    vp.write_phys(0xfee0_0000 + random.below(0x1000), &data[..len]);
                }
                5 => {
                    let mut data = [0; 8];
                    vp.read_phys(0xfee0_0000 + random.below(0x1000), &mut data[..4]);
                }
                6 => {
                    let msi =
                        partition::Msi { address: 0xfee0_0000 | random.below(1 << 20), data: random.next() as u32 };
                    vp.partition.apics.deliver_msi(msi);
                    vp.apic.check_timer();
                    if let Some(vector) = vp.apic.pending_vector() {
                        vp.apic.acknowledge(vector);
                    }
                }
                _ => {
                    let leaf = random.value() as u32;
                    viridian_engine_soft::features::cpuid(vp, leaf, random.below(8) as u32);
                }
            }
            if step % 1000 == 0 {
                // Whatever it is in now, it can be saved and loaded again.
                let state = vp.save_state();
                vp.load_state(&state).unwrap_or_else(|e| panic!("step {step}: {e}"));
            }
        }
    }
}

#[test]
fn random_states() {
    let mut random = Random(0x5eed_0002);
    let (clock, mut vps) = vps("x86-64-v2", 1, b"Auth");
    clock.start();
    let vp = &mut vps[0];
    let good = vp.save_state();
    let mut refused = 0;
    for _ in 0..2_000 {
        let mut state = good.clone();
        for _ in 0..1 + random.below(4) {
            match random.below(14) {
                0 => state.cr0 = random.value(),
                1 => state.cr3 = random.value(),
                2 => state.cr4 = random.value(),
                3 => state.efer = random.value(),
                4 => state.rip = random.value(),
                5 => state.rflags = random.value(),
                6 => state.xsave.truncate(random.below(900) as usize),
                7 => state.lapic.regs.truncate(random.below(1100) as usize),
                8 => {
                    let at = random.below(state.lapic.regs.len().max(1) as u64) as usize;
                    if let Some(b) = state.lapic.regs.get_mut(at) {
                        *b = random.next() as u8;
                    }
                }
                9 => state.lapic.base = random.value(),
                10 => state.msrs.push((MSRS[random.below(MSRS.len() as u64) as usize], random.value())),
                11 => state.segments[random.below(6) as usize].attr = random.next() as u32,
                12 => state.dr7 = random.value(),
                _ => state.xcr0 = random.value(),
            }
        }
        match vp.load_state(&state) {
            Ok(()) => drop(vp.save_state()),
            Err(_) => refused += 1,
        }
    }
    assert!(refused > 100, "only {refused} of 2000 damaged states were refused");
    vp.load_state(&good).unwrap();
}
