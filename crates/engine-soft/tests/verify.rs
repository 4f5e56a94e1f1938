//! `--translate verify` itself: it finds a mistranslation, and it is silent where there is none, on two VPs and with code
//! that changes under them.

mod common;

use common::{Bench, Board, CODE, DATA, PORT_DONE};
use iced_x86::code_asm::*;
use partition::{Clock, DirectMode, EngineOptions, Gpa, GuestMemory, PartitionConfig, TranslateMode, Vp};
use std::sync::Arc;
use std::time::Duration;
use viridian_engine_soft::partition_impl::{SoftEngine, SoftPartition};
use viridian_engine_soft::vp::SoftVp;
use x86::cpuid::CpuModel;

const VERIFY: EngineOptions =
    EngineOptions { translate: TranslateMode::Verify, code_cache_bytes: 8 << 20, direct: DirectMode::Off };

fn done(a: &mut CodeAssembler) {
    a.mov(al, 1).unwrap();
    a.mov(dx, u32::from(PORT_DONE)).unwrap();
    a.out(dx, al).unwrap();
    a.hlt().unwrap();
}

/// A loop with an addition, a store and a branch, executed by one VP. What `run` returns.
fn addition(sabotage: bool) -> Result<partition::RunExit, partition::EngineError> {
    let bench = Bench::new(&SoftEngine::new(), "x86-64-v2", 1);
    bench.code(CODE, |a| {
        let mut again = a.create_label();
        a.mov(ecx, 100).unwrap();
        a.xor(eax, eax).unwrap();
        a.mov(rsi, DATA).unwrap();
        a.set_label(&mut again).unwrap();
        a.add(rax, rcx).unwrap();
        a.mov(qword_ptr(rsi), rax).unwrap();
        a.dec(ecx).unwrap();
        a.jnz(again).unwrap();
        a.hlt().unwrap();
    });
    let model = CpuModel::by_name("x86-64-v2").unwrap();
    let config = PartitionConfig {
        vp_count: 1,
        memory: bench.memory.clone(),
        clock: Arc::new(Clock::new()),
        cpuid: vec![model.table(0, 1, 1_000_000_000)],
        msr_exits: Vec::new(),
        hypercall_port: None,
        options: VERIFY,
    };
    let partition = SoftPartition::new(config).unwrap();
    let mut vp = SoftVp::new(partition.clone(), 0);
    vp.set_state(&bench.long_state(0, CODE)).unwrap();
    vp.s.jit.sabotage = u64::from(sabotage);
    let kick = {
        let partition = partition.clone();
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(200));
            partition::Partition::kick(&*partition, 0);
        })
    };
    let exit = vp.run(&Board::default());
    kick.join().unwrap();
    if exit.is_ok() {
        assert_eq!(bench.read_u64(DATA), 5050);
        assert!(vp.verify.counts[0] >= 100, "{:?}", vp.verify.counts);
    }
    exit
}

#[test]
fn a_mistranslation_is_found() {
    let error = addition(true).expect_err("an addition was translated as a subtraction").to_string();
    assert!(error.contains("rax") && error.contains("translated"), "{error}");
}

#[test]
fn a_right_translation_is_not_blamed() {
    addition(false).unwrap();
}

/// Two VPs count with LOCK in one place and each in its own, through pushes, calls and branches.
#[test]
fn two_processors_agree() {
    let memory = GuestMemory::with_ram(common::RAM, 0xc000_0000..1 << 32, false).unwrap();
    let mut b = Bench::with_options(&SoftEngine::new(), "x86-64-v2", 2, memory, VERIFY);
    const ROUNDS: i32 = 3000;
    for vp in 0..2u64 {
        let at = CODE + vp * 0x1000;
        b.code(at, |a| {
            let mut again = a.create_label();
            let mut function = a.create_label();
            a.mov(ecx, ROUNDS).unwrap();
            a.mov(rsi, DATA).unwrap();
            a.set_label(&mut again).unwrap();
            a.push(rcx).unwrap();
            a.call(function).unwrap();
            a.pop(rcx).unwrap();
            a.dec(ecx).unwrap();
            a.jnz(again).unwrap();
            a.lock().inc(dword_ptr(rsi + 64)).unwrap();
            if vp == 0 {
                let mut wait = a.create_label();
                a.set_label(&mut wait).unwrap();
                a.pause().unwrap();
                a.cmp(dword_ptr(rsi + 64), 2).unwrap();
                a.jne(wait).unwrap();
                done(a);
            } else {
                let mut forever = a.create_label();
                a.set_label(&mut forever).unwrap();
                a.pause().unwrap();
                a.jmp(forever).unwrap();
            }
            a.set_label(&mut function).unwrap();
            a.lock().inc(dword_ptr(rsi)).unwrap();
            a.add(dword_ptr(rsi + 8 + 8 * vp as i32), ecx).unwrap();
            a.ret().unwrap();
        });
        let state = b.long_state(vp as u32, at);
        b.vps[vp as usize].set_state(&state).unwrap();
    }
    assert_eq!(b.run(Duration::from_secs(60)), 1);
    let counted: u32 = b.memory.read_plain(Gpa(DATA)).unwrap();
    assert_eq!(counted, 2 * ROUNDS as u32);
}

/// Each VP rewrites an instruction that the other executes, and its own, over and over: `mov eax, imm32; ret` whose
/// immediate always has four equal bytes, written at once. Nobody may ever see anything else.
fn rewriting(mode: TranslateMode, rounds: i32) {
    let memory = GuestMemory::with_ram(common::RAM, 0xc000_0000..1 << 32, false).unwrap();
    let options = EngineOptions { translate: mode, code_cache_bytes: 8 << 20, direct: DirectMode::Off };
    let mut b = Bench::with_options(&SoftEngine::new(), "x86-64-v2", 2, memory, options);
    // The immediate at an aligned place: f: nop * 3, mov eax, imm32.
    for f in [CODE + 0x4000, CODE + 0x4040] {
        b.memory.write(Gpa(f), &[0x90, 0x90, 0x90, 0xb8, 0, 0, 0, 0, 0xc3]).unwrap();
    }
    for vp in 0..2u64 {
        let at = CODE + vp * 0x1000;
        let (mine, other) = (CODE + 0x4000 + 0x40 * vp, CODE + 0x4040 - 0x40 * vp);
        b.code(at, |a| {
            let mut again = a.create_label();
            let mut bad = a.create_label();
            let mut end = a.create_label();
            a.mov(ecx, rounds).unwrap();
            a.mov(rsi, DATA).unwrap();
            a.set_label(&mut again).unwrap();
            a.imul_3(edx, ecx, 0x0101_0101).unwrap();
            for place in [other, mine] {
                a.mov(ebx, place as u32).unwrap();
                a.movzx(r8d, dl).unwrap();
                a.imul_3(r8d, r8d, 0x0101_0101).unwrap();
                a.mov(dword_ptr(rbx + 4), r8d).unwrap();
                a.call(rbx).unwrap();
                a.movzx(r8d, al).unwrap();
                a.imul_3(r8d, r8d, 0x0101_0101).unwrap();
                a.cmp(r8d, eax).unwrap();
                a.jne(bad).unwrap();
            }
            a.dec(ecx).unwrap();
            a.jnz(again).unwrap();
            a.jmp(end).unwrap();
            a.set_label(&mut bad).unwrap();
            a.lock().inc(dword_ptr(rsi + 4)).unwrap();
            a.set_label(&mut end).unwrap();
            a.lock().inc(dword_ptr(rsi)).unwrap();
            let mut wait = a.create_label();
            a.set_label(&mut wait).unwrap();
            a.pause().unwrap();
            a.cmp(dword_ptr(rsi), 2).unwrap();
            a.jne(wait).unwrap();
            if vp == 0 {
                done(a);
            }
            let mut forever = a.create_label();
            a.set_label(&mut forever).unwrap();
            a.pause().unwrap();
            a.jmp(forever).unwrap();
        });
        let state = b.long_state(vp as u32, at);
        b.vps[vp as usize].set_state(&state).unwrap();
    }
    assert_eq!(b.run(Duration::from_secs(100)), 1);
    assert_eq!(b.read_u64(DATA), 2, "half-written instructions were executed ({mode:?})");
}

#[test]
fn code_that_two_processors_rewrite() {
    for (mode, rounds) in [(TranslateMode::On, 3000), (TranslateMode::Off, 3000), (TranslateMode::Verify, 500)] {
        rewriting(mode, rounds);
    }
}
