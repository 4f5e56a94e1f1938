//! Random bytes as code, in every mode, from random states: whatever a guest executes, the engine neither panics nor hangs nor
//! touches host memory outside guest RAM.
//!
//! Runs for `VIRIDIAN_FUZZ_SECONDS` (default 5), and at least one round, from `VIRIDIAN_FUZZ_SEED` (default 1) on; each further
//! round has the next seed, and starts with the memory that the one before has left. Host memory is
//! watched by pages without access on both sides of guest RAM (a stray access is a SIGSEGV that ends the test) and by
//! patterns behind the mapped part of the block.

use fuzzing::Effort;
use partition::{
    Access, Clock, DirectMode, EngineOptions, Gpa, GuestMemory, MemoryBlock, PartitionConfig, TranslateMode,
};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use viridian_engine_soft::interp;
use viridian_engine_soft::partition_impl::SoftPartition;
use viridian_engine_soft::vp::{SoftVp, attention};
use x86::cpuid::CpuModel;
use x86::regs::{cr0, cr4, dr7, efer, rflags};
use x86::segment::{Segment, TableRegister, attr, sreg};

const RAM: u64 = 2 << 20;
const GUARD: u64 = 64 << 10;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }
    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
    fn chance(&mut self, one_in: u64) -> bool {
        self.below(one_in) == 0
    }
    /// A register value: often an address inside RAM.
    fn value(&mut self) -> u64 {
        match self.below(6) {
            0 => self.next(),
            1 => self.next() & 0xffff,
            2 => self.next() as i32 as i64 as u64,
            3 => self.below(64),
            _ => self.below(RAM + 0x2000),
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Mode {
    Real,
    V86,
    Protected16,
    Protected32,
    Paged32,
    Pae,
    Compatibility,
    Long,
}

const MODES: [Mode; 8] = [
    Mode::Real,
    Mode::V86,
    Mode::Protected16,
    Mode::Protected32,
    Mode::Paged32,
    Mode::Pae,
    Mode::Compatibility,
    Mode::Long,
];

fn flat(r: &mut Random, code: bool, size: u32, dpl: u32) -> Segment {
    let kind = if code { attr::TYPE_CODE } else { 0 } | attr::TYPE_WRITABLE | attr::TYPE_ACCESSED;
    let small = r.chance(4);
    Segment {
        base: if small { r.below(RAM) & !0xf } else { 0 },
        limit: if small { r.below(0x10000) as u32 } else { 0xffff_ffff },
        attr: attr::P | attr::S | attr::G | dpl << attr::DPL_SHIFT | kind | size,
        selector: (8 * (1 + r.below(7)) as u16) | dpl as u16,
    }
}

/// Page tables at 0x1000, random but mostly pointing into RAM.
fn tables(memory: &GuestMemory, r: &mut Random, wide: bool, levels: u64) {
    for level in 0..levels {
        let mut page = vec![0u8; 0x1000];
        for at in (0..0x1000).step_by(if wide { 8 } else { 4 }) {
            let next = if level + 1 < levels { 0x2000 + level * 0x1000 } else { r.below(RAM) & !0xfff };
            let mut entry = next | 0x27 | if r.chance(4) { r.next() & 0xf9f } else { 0x40 };
            if level == 0 && levels == 3 {
                entry = next | 1;
            }
            if r.chance(64) {
                entry = r.next();
            }
            if wide {
                page[at..at + 8].copy_from_slice(&entry.to_le_bytes());
            } else {
                page[at..at + 4].copy_from_slice(&(entry as u32).to_le_bytes());
            }
        }
        memory.write(Gpa(0x1000 + level * 0x1000), &page).expect("RAM");
    }
}

fn set_up(vp: &mut SoftVp, memory: &GuestMemory, mode: Mode, r: &mut Random) {
    // Code and data: random bytes, with real opcodes more often than chance would have them.
    let mut page = vec![0u8; 0x8000];
    for chunk in page.chunks_mut(8) {
        chunk.copy_from_slice(&r.next().to_le_bytes());
        if r.chance(3) {
            chunk[0] = [0x0f, 0x66, 0xf3, 0xf2, 0xf0, 0xc5, 0xc4, 0x48, 0xa4, 0xaa, 0xff, 0xcf, 0x8e, 0xea]
                [r.below(14) as usize];
        }
    }
    memory.write(Gpa(0x10_0000), &page).expect("RAM");
    memory.write(Gpa(0x8000), &page[..0x4000]).expect("RAM");
    let s = &mut *vp.s;
    for g in &mut s.gprs {
        *g = r.value();
    }
    s.rflags = rflags::FIXED | r.next() & (rflags::STATUS | rflags::DF | rflags::IF);
    if r.chance(8) {
        s.rflags |= r.next() & (rflags::TF | rflags::NT | rflags::AC | rflags::IOPL | rflags::RF);
    }
    s.cr0 = cr0::ET | cr0::NE | r.next() & (cr0::MP | cr0::WP | cr0::AM) | if r.chance(8) { cr0::TS } else { 0 };
    s.cr4 = (cr4::OSFXSR
        | cr4::OSXMMEXCPT
        | cr4::OSXSAVE
        | r.next() & (cr4::SMEP | cr4::SMAP | cr4::UMIP | cr4::FSGSBASE | cr4::PGE | cr4::PCIDE | cr4::VME | cr4::TSD))
        & vp.features.cr4_mask();
    s.cr4 &= !cr4::PCIDE;
    s.efer = efer::SCE | efer::NXE;
    s.xcr0 = 7 & vp.features.xcr0_mask() | 1;
    s.cr3 = 0x1000;
    s.gdtr = TableRegister { base: r.below(RAM), limit: r.next() as u16 };
    s.idtr = TableRegister { base: r.below(RAM), limit: r.next() as u16 };
    s.tr = Segment { base: r.below(RAM), limit: r.below(0x3000) as u32, attr: attr::P | 0xb, selector: 0x28 };
    s.ldtr = Segment { base: r.below(RAM), limit: 0xff, attr: attr::P | 2, selector: 0x30 };
    s.dr7 = dr7::RESET | if r.chance(8) { r.next() & 0xffff_03ff } else { 0 };
    for n in 0..4 {
        s.dr[n] = r.value();
    }
    s.nmi_masked = false;
    s.interrupt_shadow = false;
    s.mov_ss_shadow = false;
    s.pending_debug = 0;
    for b in &mut s.xsave.0[..416] {
        *b = r.next() as u8;
    }
    s.xsave.0[24..32].copy_from_slice(&(0x1f80u64 | 0xffff << 32).to_le_bytes());
    s.xsave.0[512..576].fill(0);
    s.xsave.0[512] = 3;
    let ring = if r.chance(2) { 3 } else { 0 };
    let size = |big: bool| if big { attr::DB } else { 0 };
    let (code, data) = match mode {
        Mode::Real | Mode::V86 => {
            for seg in 0..6 {
                s.segments[seg] = SoftVp::v86_segment((r.below(0xc00) & !0xf) as u16);
            }
            s.segments[sreg::CS] = SoftVp::v86_segment(0x800);
            (None, 0)
        }
        Mode::Protected16 => (Some((0, ring)), ring),
        Mode::Protected32 | Mode::Paged32 | Mode::Pae | Mode::Compatibility => (Some((size(true), ring)), ring),
        Mode::Long => (Some((attr::L, ring)), ring),
    };
    if let Some((size, dpl)) = code {
        for seg in 0..6 {
            s.segments[seg] = flat(r, false, attr::DB, data);
        }
        s.segments[sreg::CS] = flat(r, true, size, dpl);
        s.segments[sreg::SS].attr = attr::P | attr::S | attr::G | data << attr::DPL_SHIFT | 3 | attr::DB;
        if r.chance(8) {
            let seg = [sreg::ES, sreg::DS, sreg::FS, sreg::GS][r.below(4) as usize];
            s.segments[seg] = Segment { attr: attr::UNUSABLE, ..Segment::default() };
        }
    }
    match mode {
        Mode::Real => s.cr0 &= !cr0::PE,
        Mode::V86 => {
            s.cr0 |= cr0::PE;
            s.rflags |= rflags::VM;
        }
        Mode::Protected16 | Mode::Protected32 => s.cr0 |= cr0::PE,
        Mode::Paged32 => {
            s.cr0 |= cr0::PE | cr0::PG;
            s.cr4 |= cr4::PSE;
            tables(memory, r, false, 2);
        }
        Mode::Pae => {
            s.cr0 |= cr0::PE | cr0::PG;
            s.cr4 |= cr4::PAE;
            tables(memory, r, true, 3);
        }
        Mode::Compatibility | Mode::Long => {
            s.cr0 |= cr0::PE | cr0::PG;
            s.cr4 |= cr4::PAE;
            s.efer |= efer::LME | efer::LMA;
            tables(memory, r, true, 4);
        }
    }
    s.rip = match mode {
        Mode::Real | Mode::V86 => r.below(0x4000),
        _ => match r.below(4) {
            0 => 0x8000 + r.below(0x4000),
            1 => r.value(),
            _ => 0x10_0000 + r.below(0x8000),
        },
    };
    s.next_rip = s.rip;
    vp.activity = partition::Activity::Running;
    vp.pending_exception = None;
    vp.pending_interrupt = None;
    if matches!(mode, Mode::Pae) {
        let _ = vp.reload_pdptrs();
    }
    vp.state_loaded();
    vp.flush_tlb_all();
}

fn env(name: &str) -> Option<u64> {
    let v = std::env::var(name).ok()?;
    Some(v.strip_prefix("0x").map_or_else(|| v.parse(), |h| u64::from_str_radix(h, 16)).expect("a number"))
}

#[test]
fn random_code_harms_nobody() {
    fuzz(TranslateMode::Off);
}

#[test]
fn random_code_translated_harms_nobody() {
    fuzz(TranslateMode::On);
}

#[test]
fn random_code_translated_does_what_the_interpreter_does() {
    fuzz(TranslateMode::Verify);
}

fn fuzz(translate: TranslateMode) {
    // RAM is the middle of a block; what is on its sides must stay as it is.
    let block = MemoryBlock::new(RAM + 2 * GUARD, false).expect("memory");
    let memory = GuestMemory::new();
    memory.map(Gpa(0), RAM, block.clone(), GUARD, Access::Ram).expect("a mapping");
    memory.map(Gpa(0x20_0000), 0x1000, block.clone(), 0, Access::Rom).expect("a mapping");
    let pattern = vec![0xa5u8; GUARD as usize];
    block.write(0, &pattern).expect("inside");
    block.write(RAM + GUARD, &pattern).expect("inside");

    let model = CpuModel::by_name("host").expect("the host's model");
    let config = PartitionConfig {
        vp_count: 1,
        memory: memory.clone(),
        clock: Arc::new(Clock::new()),
        cpuid: vec![model.table(0, 1, 1_000_000_000)],
        msr_exits: Vec::new(),
        hypercall_port: Some(0x5c),
        options: EngineOptions { translate, code_cache_bytes: 8 << 20, direct: DirectMode::Off },
    };
    let partition = SoftPartition::new(config).expect("a partition");
    let mut vp = SoftVp::new(partition, 0);

    let limit = Duration::from_secs(env("VIRIDIAN_FUZZ_SECONDS").unwrap_or(5));
    let first = env("VIRIDIAN_FUZZ_SEED").unwrap_or(1);
    println!("first seed {first:#x}");
    let start = Instant::now();
    let mut rounds = 0u64;
    let mut instructions = 0u64;
    while rounds == 0 || start.elapsed() < limit {
        let seed = first.wrapping_add(rounds);
        let mut r = Random(seed);
        let mode = MODES[r.below(MODES.len() as u64) as usize];
        let label = format!("seed {seed:#x} (first seed {first:#x}), mode {mode:?}");
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            set_up(&mut vp, &memory, mode, &mut r);
            let before = vp.s.instructions;
            let effort = Effort::begin();
            for step in 0..300u32 {
                let bits = vp.s.attention.load(Ordering::Relaxed);
                if bits & attention::REQUEST != 0 {
                    vp.s.attention.fetch_and(!attention::REQUEST, Ordering::Relaxed);
                    SoftPartition::process_requests(&mut vp);
                }
                if vp.activity != partition::Activity::Running {
                    break;
                }
                // One instruction at a time, and in blocks: a raised KICK makes `run` return after the first boundary.
                if step % 2 == 0 {
                    interp::step(&mut vp);
                } else {
                    vp.s.attention.fetch_and(!attention::KICK, Ordering::Relaxed);
                    run_some(&mut vp, translate);
                    if let Some(difference) = vp.verify.difference.take() {
                        panic!("{difference}");
                    }
                }
            }
            vp.s.attention.fetch_and(!attention::KICK, Ordering::Relaxed);
            assert!(effort.spent() < Duration::from_secs(10), "300 steps took {:?}", effort.spent());
            vp.s.instructions - before
        }));
        match outcome {
            Ok(n) => instructions += n,
            Err(_) => panic!("{label}: the engine panicked (see above)"),
        }
        let mut side = vec![0u8; GUARD as usize];
        if rounds % 64 == 0 || limit.is_zero() {
            for at in [0, RAM + GUARD] {
                block.read(at, &mut side).expect("inside");
                assert!(side == pattern, "{label}: memory outside guest RAM was written (block offset {at:#x})");
            }
        }
        rounds += 1;
    }
    println!("{rounds} states, {instructions} instructions");
    assert!(instructions > rounds || limit.is_zero(), "{instructions} instructions in {rounds} rounds");
}

/// Runs blocks for a short while: another thread's kick would be a race; a timer of our own is not needed because random
/// code raises an exception sooner or later, and a loop is ended by this thread.
fn run_some(vp: &mut SoftVp, translate: TranslateMode) {
    struct Kick(*const std::sync::atomic::AtomicU32);
    // SAFETY: the word lives in the VP, which outlives the thread (joined below).
    unsafe impl Send for Kick {}
    if vp.s.instructions % 8 != 0 {
        // Mostly without a thread: the attention bit is set first, and `run` returns at once; a step does the work.
        interp::step(vp);
        return;
    }
    let kick = Kick(&raw const vp.s.attention);
    let thread = std::thread::spawn(move || {
        let kick = kick;
        std::thread::sleep(Duration::from_micros(50));
        // SAFETY: see above.
        unsafe { &*kick.0 }.fetch_or(attention::KICK, Ordering::SeqCst);
    });
    while vp.s.attention.load(Ordering::Relaxed) & (attention::KICK | attention::REQUEST) == 0
        && vp.activity == partition::Activity::Running
    {
        match translate {
            TranslateMode::Off => interp::run(vp),
            TranslateMode::On => viridian_engine_soft::translate::run::run(vp),
            TranslateMode::Verify => viridian_engine_soft::translate::verify::run(vp),
        }
    }
    thread.join().expect("the kicker");
}
