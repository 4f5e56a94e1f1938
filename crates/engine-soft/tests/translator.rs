//! The translator against the interpreter: random instruction sequences, with the same registers and memory, must end
//! in the same state.

mod common;

use common::{Bench, CODE, DATA, RAM};
use iced_x86::{Decoder, DecoderOptions, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register};
use partition::{DirectMode, EngineOptions, Gpa, GuestMemory, TranslateMode};
use viridian_engine_soft::features::Features;
use viridian_engine_soft::partition_impl::SoftEngine;
use viridian_engine_soft::translate::classify::{self, Kind};
use x86::cpuid::CpuModel;
use x86::regs::{cr4, gpr, rflags};
use x86::xsave::legacy;

/// xorshift: the sequence is the same in every run with the same seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 11) % n
    }
}

/// Registers that hold pointers into the data, and small indices: instructions must not write them.
const POINTERS: [usize; 5] = [gpr::RBX, gpr::RSI, gpr::R12, gpr::R9, gpr::R10];
const INDICES: [usize; 2] = [gpr::R11, gpr::R13];

fn acceptable(i: &Instruction, kind: Kind, info: &mut InstructionInfoFactory) -> bool {
    if !matches!(kind, Kind::Plain | Kind::Vector(_) | Kind::Lea | Kind::Push | Kind::Pop | Kind::Interpret) {
        return false;
    }
    if matches!(
        i.mnemonic(),
        Mnemonic::Rdtsc
            | Mnemonic::Rdtscp
            | Mnemonic::Rdpid
            | Mnemonic::In
            | Mnemonic::Out
            | Mnemonic::Cpuid
            | Mnemonic::Rdrand
            | Mnemonic::Rdseed
            | Mnemonic::Rdmsr
            | Mnemonic::Swapgs
            | Mnemonic::Wrfsbase
            | Mnemonic::Wrgsbase
            | Mnemonic::Std
            | Mnemonic::Enter
            | Mnemonic::Stac
            | Mnemonic::Clac
            | Mnemonic::Cmpxchg8b
            | Mnemonic::Fnstenv
            | Mnemonic::Fnsave
            | Mnemonic::Fxsave
            | Mnemonic::Fxsave64
            | Mnemonic::Xsave
            | Mnemonic::Xsave64
            | Mnemonic::Xsavec
            | Mnemonic::Xsavec64
            | Mnemonic::Xsaveopt
            | Mnemonic::Xsaveopt64
            | Mnemonic::Xsaves
            | Mnemonic::Xsaves64
            | Mnemonic::Cmpxchg16b
            | Mnemonic::Pause
    ) || i.mnemonic() == Mnemonic::Leave
        || i.mnemonic() == Mnemonic::Cmpxchg && i.op0_kind() == OpKind::Register
        || i.mnemonic() == Mnemonic::Bswap && i.op0_register().size() == 2
    {
        return false;
    }
    for n in 0..i.op_count() {
        match i.op_kind(n) {
            OpKind::Memory => {
                let (b, x) = (i.memory_base(), i.memory_index());
                let small = (i.memory_displacement64() as i64).abs() < 128;
                let base = b.is_gpr64() && (POINTERS.contains(&b.number()) || b == Register::RSP);
                let index = x == Register::None || x.is_gpr64() && INDICES.contains(&x.number());
                if !(small && base && index) && kind != Kind::Lea || i.segment_prefix() != Register::None {
                    return false;
                }
            }
            OpKind::Register if kind == Kind::Interpret && i.op_register(n).is_segment_register() => return false,
            OpKind::MemorySegDI
            | OpKind::MemorySegEDI
            | OpKind::MemorySegRDI
            | OpKind::MemorySegSI
            | OpKind::MemorySegESI
            | OpKind::MemorySegRSI
            | OpKind::MemoryESDI
            | OpKind::MemoryESEDI
            | OpKind::MemoryESRDI => return false,
            _ => {}
        }
    }
    let stack = matches!(kind, Kind::Push | Kind::Pop);
    info.info(i).used_registers().iter().all(|r| {
        let written = !matches!(r.access(), OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess);
        let full = r.register().full_register();
        !(written
            && full.is_gpr64()
            && (POINTERS.contains(&full.number())
                || INDICES.contains(&full.number())
                || full == Register::RSP && !(stack && i.op0_register() != Register::RSP)))
    })
}

/// A random sequence of `count` instructions (with short forward branches), and the text of each.
fn sequence(random: &mut Random, count: usize, features: &Features) -> (Vec<u8>, Vec<String>, u64) {
    let mut info = InstructionInfoFactory::new();
    let (mut bytes, mut text) = (Vec::new(), Vec::new());
    // Flags that the manual calls undefined at this point (iced's bits): the two may leave them differently.
    let mut undefined = 0;
    while text.len() < count {
        let mut candidate = [0u8; 15];
        for b in &mut candidate {
            *b = random.next() as u8;
        }
        // Real code is full of these.
        match random.below(12) {
            0 => candidate[0] = 0x48 | candidate[0] & 7,
            1 => candidate[0] = 0x0f,
            2 => (candidate[0], candidate[1]) = (0x66, 0x0f),
            3 => candidate[0] = 0xc5,
            4 => {
                (candidate[0], candidate[1]) =
                    (0x40 | candidate[0] & 15, [0x8b, 0x89, 0x01, 0x03, 0x3b, 0x85][random.below(6) as usize])
            }
            6 => {
                (candidate[0], candidate[1]) = (
                    0x40 | candidate[0] & 15,
                    [0xc1, 0xd1, 0xd3, 0x8d, 0x8d, 0xf7, 0xff, 0x63, 0x81, 0x83, 0x69, 0x6b][random.below(12) as usize],
                );
            }
            7 => (candidate[0], candidate[1]) = (0x40 | candidate[0] & 15, 0x0f),
            8 => {
                (candidate[0], candidate[1], candidate[2]) =
                    (0xc4, 0xe0 & candidate[1] | (2 + candidate[1] % 2), candidate[2])
            }
            5 => (candidate[0], candidate[1], candidate[2]) = (0x48, 0x83, 0xc0 | candidate[2] & 0x3f),
            _ => {}
        }
        let mut decoder = Decoder::with_ip(64, &candidate, 0, DecoderOptions::NONE);
        let i = decoder.decode();
        if i.is_invalid() {
            continue;
        }
        let kind = classify::kind(&i, features);
        if !acceptable(&i, kind, &mut info) {
            continue;
        }
        if i.rflags_read() & undefined != 0 || i.mnemonic() == Mnemonic::Pushfq && undefined != 0 {
            continue;
        }
        let overwritten = i.rflags_written() | i.rflags_cleared() | i.rflags_set();
        let mut after = undefined & !overwritten | i.rflags_undefined();
        if undefined == 0 && random.below(6) == 0 {
            bytes.extend_from_slice(&[0x70 | random.below(16) as u8, i.len() as u8]);
            text.push("jcc over".into());
            after |= undefined;
        }
        undefined = after;
        bytes.extend_from_slice(&candidate[..i.len()]);
        text.push(format!("{i}    {:02x?}", &candidate[..i.len()]));
    }
    // out 0xf4, al; pushfq; hlt
    bytes.extend_from_slice(&[0xe6, 0xf4, 0x9c, 0xf4]);
    let bits = [rflags::OF, rflags::SF, rflags::ZF, rflags::AF, rflags::CF, rflags::PF];
    let mask = (0..6).filter(|n| undefined >> n & 1 != 0).fold(0, |m, n| m | bits[n]);
    (bytes, text, mask)
}

struct Side {
    bench: Bench,
}

impl Side {
    fn new(translate: TranslateMode) -> Self {
        let memory = GuestMemory::with_ram(RAM, 0xc000_0000..1 << 32, false).unwrap();
        let options = EngineOptions { translate, code_cache_bytes: 8 << 20, direct: DirectMode::Off };
        let bench = Bench::with_options(&SoftEngine::new(), "x86-64-v3", 1, memory, options);
        bench.clock.start();
        Self { bench }
    }

    fn run(&mut self, code: &[u8], at: u64, seed: u64) -> (partition::RunExit, partition::VpState, Vec<u8>) {
        let b = &mut self.bench;
        let mut random = Random(seed);
        let mut state = b.long_state(0, at);
        for n in 0..16 {
            if n == gpr::RSP {
                continue;
            }
            state.gprs[n] = if POINTERS.contains(&n) {
                DATA + 0x400 + random.below(0x800)
            } else if INDICES.contains(&n) {
                random.below(64)
            } else if random.below(2) == 0 {
                random.next()
            } else {
                random.below(256)
            };
        }
        state.gprs[gpr::RSP] = DATA + 0x3000;
        state.rflags |= random.next() & rflags::STATUS;
        state.cr4 |= cr4::OSXSAVE;
        state.xcr0 = 7;
        for byte in &mut state.xsave[legacy::XMM0..legacy::XMM0 + 256] {
            *byte = random.next() as u8;
        }
        for byte in &mut state.xsave[x86::xsave::AVX_OFFSET..] {
            *byte = random.next() as u8;
        }
        state.xsave[512] = 7;
        let data: Vec<u8> = (0..0x4000).map(|_| random.next() as u8).collect();
        b.memory.write(Gpa(DATA), &data).unwrap();
        b.memory.write(Gpa(at), code).unwrap();
        b.vps[0].set_state(&state).unwrap();
        let board = b.board.clone();
        let exit = b.vps[0].run(&*board).unwrap();
        let state = b.vps[0].state().unwrap();
        let mut after = vec![0; 0x4000];
        b.memory.read(Gpa(DATA), &mut after).unwrap();
        (exit, state, after)
    }
}

fn compare(cases: u64, seed: u64) {
    let model = CpuModel::by_name("x86-64-v3").unwrap();
    let features = Features::from_table(&model.table(0, 1, 1_000_000_000));
    let mut random = Random(seed);
    let (mut on, mut off) = (Side::new(TranslateMode::On), Side::new(TranslateMode::Off));
    let mut at = CODE;
    let mut faults = 0;
    for case in 0..cases {
        let count = 1 + random.below(if case % 4 == 0 {
            64
        } else if case % 64 == 1 {
            300
        } else {
            12
        }) as usize;
        let (code, text, undefined) = sequence(&mut random, count, &features);
        let data_seed = random.next() | 1;
        let (exit_t, mut t, memory_t) = on.run(&code, at, data_seed);
        let (exit_i, mut i, memory_i) = off.run(&code, at, data_seed);
        // Status flags that the program would overwrite are not kept exact at a fault.
        if exit_i != partition::RunExit::Kicked {
            faults += 1;
            t.rflags &= !rflags::STATUS;
            i.rflags &= !rflags::STATUS;
        }
        for s in [&mut t, &mut i] {
            s.rflags &= !undefined;
            // The last x87 instruction's pointers are kept by the interpreter only.
            s.xsave[legacy::FOP..legacy::MXCSR].fill(0);
            s.xsave[512..576].fill(0);
        }
        let same = exit_t == exit_i
            && t.gprs == i.gprs
            && t.rip == i.rip
            && t.rflags == i.rflags
            && t.xsave == i.xsave
            && memory_t == memory_i;
        if !same {
            println!("case {case}, seed {seed:#x}: translator {exit_t:?}, interpreter {exit_i:?}");
            for line in &text {
                println!("  {line}");
            }
            println!("rip    {:#x} {:#x} (code at {at:#x})", t.rip, i.rip);
            println!("rflags {:#x} {:#x}", t.rflags, i.rflags);
            for n in 0..16 {
                if t.gprs[n] != i.gprs[n] {
                    println!("gpr {n}: {:#x} {:#x}", t.gprs[n], i.gprs[n]);
                }
            }
            for n in (0..t.xsave.len()).filter(|n| t.xsave[*n] != i.xsave[*n]).take(8) {
                println!("xsave byte {n}: {:#x} {:#x}", t.xsave[n], i.xsave[n]);
            }
            for n in (0..memory_t.len()).filter(|n| memory_t[*n] != memory_i[*n]).take(8) {
                println!("memory {n:#x}: {:#x} {:#x}", memory_t[n], memory_i[n]);
            }
            panic!("the translator and the interpreter differ");
        }
        at = CODE + (at - CODE + code.len() as u64 + random.below(64)) % 0x1_0000;
    }
    assert!(faults < cases / 2, "{faults} of {cases} sequences ended in a fault: they test too little");
}

#[test]
fn random_sequences_end_alike() {
    let cases = std::env::var("VIRIDIAN_DIFF_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(3000);
    let seed = std::env::var("VIRIDIAN_DIFF_SEED").ok().and_then(|n| n.parse().ok()).unwrap_or(0x1234_5678_9abc_def1);
    compare(cases, seed);
}

/// Many pushes of memory on a stack that crosses a page: no check of theirs succeeds as a group, and each has two of its own.
/// (systemd sets up a service's name spaces with such a call.) The block without groups was given up, and the one with groups
/// was entered again, for ever.
#[test]
fn many_pushes_across_a_page() {
    use iced_x86::code_asm::*;
    let mut bench = Bench::new(&SoftEngine::new(), "x86-64-v3", 1);
    let numbers: Vec<u8> = (0..40u64).flat_map(|n| (0x1111 * n).to_le_bytes()).collect();
    bench.memory.write(Gpa(DATA), &numbers).unwrap();
    bench.code(CODE, |a| {
        a.mov(rbx, DATA).unwrap();
        a.mov(rsp, DATA + 0x3040).unwrap();
        for n in 0..40 {
            a.push(qword_ptr(rbx + 8 * n)).unwrap();
        }
        a.out(0xf4, al).unwrap();
        a.hlt().unwrap();
    });
    bench.start_at(CODE);
    bench.run(std::time::Duration::from_secs(20));
    for n in 0..40 {
        assert_eq!(bench.read_u64(DATA + 0x3040 - 8 * (n + 1)), 0x1111 * n, "push {n}");
    }
}

/// A loop whose two addresses move, up and down, over pages, at offsets that are not multiples of the size.
#[test]
fn loops_move_over_pages() {
    use iced_x86::code_asm::*;
    const WORDS: u64 = 1500;
    for (shift, step) in [(0, 8), (3, 8), (0, -8), (5, -8)] {
        let mut bench = Bench::new(&SoftEngine::new(), "x86-64-v3", 1);
        let bytes: Vec<u8> = (0..WORDS * 8 + 64).map(|n| (n * 7 + n / 251) as u8).collect();
        bench.memory.write(Gpa(DATA), &bytes).unwrap();
        let to = DATA + 0x8000 + shift;
        let (first, first_to) =
            if step > 0 { (DATA + shift, to) } else { (DATA + shift + 8 * (WORDS - 1), to + 8 * (WORDS - 1)) };
        bench.code(CODE, |a| {
            let mut again = a.create_label();
            a.mov(rsi, first).unwrap();
            a.mov(rdi, first_to).unwrap();
            a.mov(ecx, WORDS as i32).unwrap();
            a.set_label(&mut again).unwrap();
            a.mov(rax, qword_ptr(rsi)).unwrap();
            a.add(rsi, step).unwrap();
            a.mov(qword_ptr(rdi), rax).unwrap();
            a.add(rdi, step).unwrap();
            a.dec(ecx).unwrap();
            a.jnz(again).unwrap();
            a.out(0xf4, al).unwrap();
            a.hlt().unwrap();
        });
        bench.start_at(CODE);
        bench.run(std::time::Duration::from_secs(20));
        let (from, len) = (shift as usize, 8 * WORDS as usize);
        let mut copy = vec![0; len];
        bench.memory.read(Gpa(to), &mut copy).unwrap();
        assert!(copy == bytes[from..from + len], "shift {shift}, step {step}");
    }
}

/// Status flags that the program overwrites before it reads them are in the frame of a fault that comes before.
#[test]
fn flags_at_a_fault() {
    use iced_x86::code_asm::*;
    type Emit = fn(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>;
    let producers: [Emit; 16] = [
        |a| a.cmp(rax, rcx),
        |a| a.cmp(r9d, 0x7fff),
        |a| a.cmp(dl, cl),
        |a| a.test(r15, r10),
        |a| a.test(ax, 0x55),
        |a| a.add(rax, rcx),
        |a| a.add(r11b, dl),
        |a| a.add(edi, 0x1234_5678),
        |a| a.sub(rdx, -5),
        |a| a.sub(r15w, ax),
        |a| a.sub(rsp, 0x40),
        |a| a.and(rax, qword_ptr(rsi)),
        |a| a.or(r11d, ecx),
        |a| a.xor(dl, al),
        |a| a.xor(ecx, ecx),
        |a| a.sub(ecx, ecx),
    ];
    let (mut on, mut off) = (Side::new(TranslateMode::On), Side::new(TranslateMode::Off));
    let mut seen = 0;
    for (n, producer) in producers.iter().enumerate() {
        for seed in 1..20 {
            for single in [false, true] {
                let mut a = CodeAssembler::new(64).unwrap();
                a.mov(r14, 5u64 << 32).unwrap();
                producer(&mut a).unwrap();
                // The first check destroys the flags, the second one fails: on its own, or as a group.
                a.mov(rbp, qword_ptr(rbx)).unwrap();
                a.mov(rbp, qword_ptr(r14)).unwrap();
                if !single {
                    a.mov(r8, qword_ptr(r14 + 8)).unwrap();
                }
                a.cmp(rbp, r8).unwrap();
                a.hlt().unwrap();
                let at = CODE + 0x1000 * n as u64 + if single { 0x100 } else { 0 };
                let code = a.assemble(at).unwrap();
                let (exit, t, _) = on.run(&code, at, seed);
                let (_, i, _) = off.run(&code, at, seed);
                assert_eq!(exit, partition::RunExit::TripleFault);
                // AF is undefined behind logical operations.
                let mask = if matches!(n, 3 | 4 | 11..=14) { !rflags::AF } else { !0 };
                assert_eq!(t.rflags & mask, i.rflags & mask, "producer {n}, seed {seed}, single {single}");
                assert_eq!((t.rip, t.gprs), (i.rip, i.gprs));
                seen |= t.rflags;
            }
        }
    }
    assert_eq!(seen & rflags::STATUS, rflags::STATUS, "some flag was never set: the test shows too little");
}
