//! The translator against the interpreter: the loop that runs random sequences on both, from the same state, and compares
//! how they end.

use crate::common::{Bench, PORT_DONE, RAM};
pub use fuzzing::Rng;
use partition::{DirectMode, EngineOptions, GuestMemory, RunExit, TranslateMode, VpState};
use std::fmt::Debug;
use viridian_engine_soft::partition_impl::SoftEngine;
use x86::regs::rflags;
use x86::xsave::legacy;

/// One VP with this way of execution.
pub fn bench(translate: TranslateMode) -> Bench {
    let memory = GuestMemory::with_ram(RAM, 0xc000_0000..1 << 32, false).unwrap();
    let options = EngineOptions { translate, code_cache_bytes: 8 << 20, direct: DirectMode::Off };
    let bench = Bench::with_options(&SoftEngine::new(), "x86-64-v3", 1, memory, options);
    bench.clock.start();
    bench
}

/// Code, each of its instructions in words, and status flags that the manual leaves undefined at its end.
pub struct Sequence {
    pub code: Vec<u8>,
    pub text: Vec<String>,
    pub undefined: u64,
}

impl Sequence {
    /// `code` with what ends it: `out 0xf4, al; pushf; hlt`. `undefined` has iced's bits.
    pub fn ended(mut code: Vec<u8>, text: Vec<String>, undefined: u32) -> Self {
        code.extend_from_slice(&[0xe6, PORT_DONE as u8, 0x9c, 0xf4]);
        let bits = [rflags::OF, rflags::SF, rflags::ZF, rflags::AF, rflags::CF, rflags::PF];
        let undefined = (0..6).filter(|n| undefined >> n & 1 != 0).fold(0, |mask, n| mask | bits[n]);
        Self { code, text, undefined }
    }
}

/// Any vector registers and status flags, with all of x86-64-v3's state enabled.
pub fn scramble(state: &mut VpState, random: &mut Rng) {
    state.rflags |= random.next() & rflags::STATUS;
    state.cr4 |= x86::regs::cr4::OSXSAVE;
    state.xcr0 = 7;
    for range in [legacy::XMM0..legacy::XMM0 + 256, x86::xsave::AVX_OFFSET..state.xsave.len()] {
        for byte in &mut state.xsave[range] {
            *byte = random.next() as u8;
        }
    }
    state.xsave[512] = 7;
}

/// How a sequence ended: why, the state, and memory that it may have changed.
pub type Ended = (RunExit, VpState, Vec<u8>);

/// A number in the environment.
fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    let parsed = text.strip_prefix("0x").map_or_else(|| text.parse(), |hex| u64::from_str_radix(hex, 16));
    Some(parsed.unwrap_or_else(|_| panic!("{name}={text} is not a number")))
}

/// Compares `cases` sequences (or `VIRIDIAN_DIFF_CASES`, from `VIRIDIAN_DIFF_SEED`), in memory from `first` on. `make` gives
/// the mode and the sequence of a case; `run` executes it at an address, from the state that a seed says. Gives the number
/// of cases, and of those that ended in a fault.
pub fn compare<M: Copy + Debug>(
    cases: u64,
    first: u64,
    mut make: impl FnMut(&mut Rng, u64) -> (M, Sequence),
    mut run: impl FnMut(&mut Bench, M, &[u8], u64, u64) -> Ended,
) -> (u64, u64) {
    let cases = number("VIRIDIAN_DIFF_CASES").unwrap_or(cases);
    let seed = number("VIRIDIAN_DIFF_SEED").unwrap_or(0x1234_5678_9abc_def1);
    let mut random = Rng::new(seed);
    let (mut on, mut off) = (bench(TranslateMode::On), bench(TranslateMode::Off));
    let mut at = first;
    let mut faults = 0;
    for case in 0..cases {
        let (mode, sequence) = make(&mut random, case);
        let data_seed = random.next() | 1;
        let mut translated = run(&mut on, mode, &sequence.code, at, data_seed);
        let mut interpreted = run(&mut off, mode, &sequence.code, at, data_seed);
        let mut ignored = sequence.undefined;
        // Status flags that the program would overwrite are not kept exact at a fault.
        if interpreted.0 != RunExit::Kicked {
            faults += 1;
            ignored |= rflags::STATUS;
        }
        for (_, state, _) in [&mut translated, &mut interpreted] {
            state.rflags &= !ignored;
            // The last x87 instruction's pointers are kept by the interpreter only.
            state.xsave[legacy::FOP..legacy::MXCSR].fill(0);
            state.xsave[512..576].fill(0);
        }
        if !same(&translated, &interpreted) {
            println!("case {case}, seed {seed:#x}, {mode:?}, code at {at:#x}: translator, interpreter:");
            show(&sequence.text, &translated, &interpreted);
            panic!("the translator and the interpreter differ");
        }
        at = first + (at - first + sequence.code.len() as u64 + random.below(64)) % 0x1_0000;
    }
    (cases, faults)
}

fn same((exit_t, t, memory_t): &Ended, (exit_i, i, memory_i): &Ended) -> bool {
    exit_t == exit_i
        && t.gprs == i.gprs
        && t.rip == i.rip
        && t.rflags == i.rflags
        && t.segments == i.segments
        && t.xsave == i.xsave
        && memory_t == memory_i
}

fn show(text: &[String], (exit_t, t, memory_t): &Ended, (exit_i, i, memory_i): &Ended) {
    for line in text {
        println!("  {line}");
    }
    println!("exit   {exit_t:?} {exit_i:?}");
    println!("rip    {:#x} {:#x}", t.rip, i.rip);
    println!("rflags {:#x} {:#x}", t.rflags, i.rflags);
    for n in (0..16).filter(|n| t.gprs[*n] != i.gprs[*n]) {
        println!("gpr {n}: {:#x} {:#x}", t.gprs[n], i.gprs[n]);
    }
    for n in (0..t.segments.len()).filter(|n| t.segments[*n] != i.segments[*n]) {
        println!("segment {n}: {:x?} {:x?}", t.segments[n], i.segments[n]);
    }
    for n in (0..t.xsave.len()).filter(|n| t.xsave[*n] != i.xsave[*n]).take(8) {
        println!("xsave byte {n}: {:#x} {:#x}", t.xsave[n], i.xsave[n]);
    }
    for n in (0..memory_t.len()).filter(|n| memory_t[*n] != memory_i[*n]).take(8) {
        println!("memory byte {n:#x}: {:#x} {:#x}", memory_t[n], memory_i[n]);
    }
}
