//! The translator against the interpreter: random instruction sequences, with the same registers and memory, must end
//! in the same state.

mod common;
// Not a part of `common`, which the tests of another engine take as well.
#[path = "common/compare.rs"]
mod compare;

use common::{Bench, CODE, DATA};
use compare::{Ended, Rng, Sequence, bench};
use iced_x86::{Decoder, DecoderOptions, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register};
use partition::{Gpa, TranslateMode};
use viridian_engine_soft::features::Features;
use viridian_engine_soft::partition_impl::SoftEngine;
use viridian_engine_soft::translate::classify::{self, Kind};
use x86::cpuid::CpuModel;
use x86::regs::{gpr, rflags};

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

/// A random sequence of `count` instructions (with short forward branches).
fn sequence(random: &mut Rng, count: usize, features: &Features) -> Sequence {
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
    Sequence::ended(bytes, text, undefined)
}

/// Executes 64-bit code from the state that `seed` says.
fn run(b: &mut Bench, code: &[u8], at: u64, seed: u64) -> Ended {
    let mut random = Rng::new(seed);
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
    compare::scramble(&mut state, &mut random);
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

#[test]
fn random_sequences_end_alike() {
    let model = CpuModel::by_name("x86-64-v3").unwrap();
    let features = Features::from_table(&model.table(0, 1, 1_000_000_000));
    let make = |random: &mut Rng, case: u64| {
        let most = match case {
            _ if case % 4 == 0 => 64,
            _ if case % 64 == 1 => 300,
            _ => 12,
        };
        let count = 1 + random.below(most) as usize;
        ("64-bit code", sequence(random, count, &features))
    };
    let (cases, faults) = compare::compare(3000, CODE, make, |b, _, code, at, seed| run(b, code, at, seed));
    assert!(faults < cases / 2, "{faults} of {cases} sequences ended in a fault: they test too little");
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

/// Puts the four pages of data in reverse order: what follows a page in the host's memory is not what follows it for the guest, so
/// an access that leaves its page unchecked shows.
fn reverse_pages(b: &Bench) {
    const TABLE: u64 = 0xb_0000;
    for page in 0..512u64 {
        let at = page << 12;
        let to = if (DATA..DATA + 0x4000).contains(&at) { 2 * DATA + 0x3000 - at } else { at };
        b.memory.write(Gpa(TABLE + 8 * page), &(to | 7).to_le_bytes()).unwrap();
    }
    b.memory.write(Gpa(common::PD), &(TABLE | 7).to_le_bytes()).unwrap();
}

/// Indices that the code itself bounds (masks, zero extensions, shifts), off bases whose reach may cross a page: loads, stores, and
/// what changes a register between the bound and its use, in straight code and in loops of up to a hundred instructions.
#[test]
fn bounded_indices_end_alike() {
    use iced_x86::code_asm::*;
    let wide = [rax, rdx, rdi, rbp, r8, r11, r13, r15];
    let narrow = [eax, edx, edi, ebp, r8d, r11d, r13d, r15d];
    let words = [ax, dx, di, bp, r8w, r11w, r13w, r15w];
    let bytes = [al, dl, dil, bpl, r8b, r11b, r13b, r15b];
    let bases = [rbx, rsi, r12, r9, r10, rsp];
    let make = |random: &mut Rng, _| {
        let mut a = CodeAssembler::new(64).unwrap();
        let mut again = a.create_label();
        let looped = random.below(2) == 0;
        // (Near a page's end, or anywhere.)
        for base in bases {
            let near = DATA + 0x2000 - random.below(0x140);
            let at = if random.below(2) == 0 { near } else { DATA + 0x1100 + random.below(0x800) };
            a.mov(base, at & !if random.below(2) == 0 { 7 } else { 0 }).unwrap();
        }
        a.mov(ecx, 1 + random.below(6) as i32).unwrap();
        a.set_label(&mut again).unwrap();
        for _ in 0..1 + random.below(if looped { 36 } else { 24 }) {
            let mut pick = || random.below(8) as usize;
            let (x, y) = (pick(), pick());
            match random.below(10) {
                0..3 => a.and(narrow[x], random.below(64) as i32),
                3 => a.and(wide[x], random.below(64) as i32),
                4 => a.movzx(narrow[x], bytes[y]),
                5 => a.shr(narrow[x], 24 + random.below(8) as u32),
                6 => a.mov(narrow[x], narrow[y]),
                7 => a.and(narrow[x], narrow[y]),
                // Bounds that hold no longer, or never did.
                8 => match random.below(8) {
                    0 => a.mov(bytes[x], random.below(64) as i32),
                    1 => a.and(words[x], 0x3f),
                    2 => a.add(narrow[x], 0x33),
                    3 => a.movsx(wide[x], bytes[y]),
                    4 => a.and(wide[x], -2),
                    5 => a.xchg(wide[x], wide[y]),
                    6 => a.shr(wide[x], 60u32),
                    _ => a.xadd(narrow[x], narrow[y]),
                },
                _ => a.nop(),
            }
            .unwrap();
            // Registers without a bound are made small here, in a way that shows none, so that addresses stay in the data.
            let unshown = |a: &mut CodeAssembler| {
                a.rol(wide[x], 8u32)?;
                a.mov(words[x], 0x0101)?;
                a.mov(bytes[x], 0x2e)?;
                a.movsx(narrow[x], bytes[x])
            };
            let mut register = x;
            match random.below(6) {
                0 => unshown(&mut a).unwrap(),
                1 => a.movzx(narrow[x], bytes[x]).unwrap(),
                _ => {
                    register = y;
                    a.and(narrow[y], 31).unwrap();
                }
            }
            let base = bases[random.below(6) as usize];
            let d = random.below(96) as i32 - 32;
            let index = wide[register];
            let place = match random.below(4) {
                0 => base + index,
                1 => base + index * 2,
                2 => base + index * 4,
                _ if base == rsp => base + index,
                _ => index + base,
            } + d;
            let z = random.below(8) as usize;
            match random.below(9) {
                0 => a.mov(wide[z], qword_ptr(place)),
                1 => a.add(narrow[z], dword_ptr(place)),
                2 => a.mov(dword_ptr(place), narrow[z]),
                3 => a.xor(byte_ptr(place), bytes[z]),
                4 => a.mov(wide[z], qword_ptr(base + d)),
                5 => a.mov(qword_ptr(base + d), wide[z]),
                6 => a.inc(word_ptr(place)),
                7 => a.push(qword_ptr(place)).and_then(|()| a.pop(wide[z])),
                _ => a.cmp(bytes[z], byte_ptr(place)).and_then(|()| a.adc(narrow[z], 1)),
            }
            .unwrap();
        }
        if looped {
            a.dec(ecx).unwrap();
            a.jnz(again).unwrap();
        }
        let code = a.assemble(CODE).unwrap();
        let text = Decoder::with_ip(64, &code, 0, DecoderOptions::NONE).iter().map(|i| i.to_string()).collect();
        ("bounded indices", Sequence::ended(code, text, 0))
    };
    let (_, faults) = compare::compare(1500, CODE, make, |b, _, code, at, seed| {
        reverse_pages(b);
        run(b, code, at, seed)
    });
    assert_eq!(faults, 0);
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
    let (mut on, mut off) = (bench(TranslateMode::On), bench(TranslateMode::Off));
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
                let (exit, t, _) = run(&mut on, &code, at, seed);
                let (_, i, _) = run(&mut off, &code, at, seed);
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
