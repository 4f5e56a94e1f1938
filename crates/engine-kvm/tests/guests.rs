//! Tiny guests on KVM, and states that go from one engine to the other. Skipped, with a message, where there is no
//! `/dev/kvm`. The KVM of a test machine may be an emulated one, so that every guest executes only a few hundred
//! instructions.
#![allow(missing_docs)]

#[path = "../../engine-soft/tests/common/mod.rs"]
mod common;

use common::*;
use engine_soft::partition_impl::SoftEngine;
use iced_x86::code_asm::*;
use partition::{Engine, EngineError, Gpa, Msi};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::time::Duration;
use viridian_engine_kvm::KvmEngine;
use x86::cpuid::CpuModel;
use x86::paging::PAGE_SIZE;

const LIMIT: Duration = Duration::from_secs(30);
const APIC: u64 = 0xfee0_0000;

/// The engine, or `None` with a message.
fn kvm() -> Option<KvmEngine> {
    match KvmEngine::new() {
        Ok(engine) => Some(engine),
        Err(error @ EngineError::Unavailable { .. }) => {
            eprintln!("skipped: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

macro_rules! kvm_or_skip {
    () => {
        match kvm() {
            Some(engine) => engine,
            None => return,
        }
    };
}

/// A bench whose processor model is the part of x86-64-v2 that this KVM has: an emulated one has little.
fn bench(engine: &dyn Engine, vps: u32) -> Bench {
    let model = CpuModel::by_name("x86-64-v2").unwrap();
    let hz = partition::Clock::new().tsc_frequency_hz();
    let kvm = KvmEngine::new().unwrap();
    let tables = (0..vps).map(|n| kvm.offered_part(&model.table(n, vps, hz)).unwrap()).collect();
    let memory = partition::GuestMemory::with_ram(RAM, 0xc000_0000..1 << 32, false).unwrap();
    Bench::with_tables(engine, tables, memory)
}

fn apic_write(a: &mut CodeAssembler, register: u64, value: u32) {
    a.mov(rbx, APIC + register).unwrap();
    a.mov(dword_ptr(rbx), value).unwrap();
}

fn log(a: &mut CodeAssembler, value: u32) {
    a.mov(eax, value).unwrap();
    a.mov(dx, u32::from(PORT_LOG)).unwrap();
    a.out(dx, eax).unwrap();
}

fn done(a: &mut CodeAssembler, value: u32) {
    a.mov(eax, value).unwrap();
    a.mov(dx, u32::from(PORT_DONE)).unwrap();
    a.out(dx, eax).unwrap();
    let mut forever = a.create_label();
    a.set_label(&mut forever).unwrap();
    a.hlt().unwrap();
    a.jmp(forever).unwrap();
}

fn counting_handler(b: &Bench, vector: u8, at: u64, slot: u64) {
    b.code(at, |a| {
        a.push(rax).unwrap();
        a.push(rbx).unwrap();
        a.mov(rax, DATA + 8 * slot).unwrap();
        a.inc(qword_ptr(rax)).unwrap();
        apic_write(a, 0xb0, 0);
        a.pop(rbx).unwrap();
        a.pop(rax).unwrap();
        a.iretq().unwrap();
    });
    b.gate(vector, at);
}

#[test]
fn ports_memory_and_msrs_come_out() {
    let engine = kvm_or_skip!();
    let mut b = bench(&engine, 1);
    b.code(CODE, |a| {
        log(a, 7);
        // MMIO in the hole.
        a.mov(rbx, 0xe000_0010u64).unwrap();
        a.mov(eax, dword_ptr(rbx)).unwrap();
        a.mov(dx, u32::from(PORT_LOG)).unwrap();
        a.out(dx, eax).unwrap();
        a.mov(dword_ptr(rbx), 0x55).unwrap();
        // Synthetic MSRs.
        a.mov(ecx, 0x4000_0002u32).unwrap();
        a.rdmsr().unwrap();
        a.mov(dx, u32::from(PORT_LOG)).unwrap();
        a.out(dx, eax).unwrap();
        a.mov(ecx, 0x4000_0010u32).unwrap();
        a.mov(eax, 0x99).unwrap();
        a.xor(edx, edx).unwrap();
        a.wrmsr().unwrap();
        done(a, 1);
    });
    b.start_at(CODE);
    assert_eq!(b.run(LIMIT), 1);
    assert_eq!(b.log(), [7, 0xe000_0010 ^ 0x5a5a_5a5a, 0x9abc_def0]);
    assert_eq!(*b.board.mmio.lock().unwrap(), [(0xe000_0010, 4, false), (0xe000_0010, 0x55, true)]);
    assert_eq!(*b.board.msrs.lock().unwrap(), [(0x4000_0010, 0x99)]);
}

#[test]
fn hypercalls() {
    let engine = kvm_or_skip!();
    let mut b = bench(&engine, 1);
    b.code(CODE + 0x1000, |a| done(a, 0x6666));
    b.gate(6, CODE + 0x1000);
    b.code(CODE, |a| {
        a.mov(ecx, 1).unwrap();
        a.mov(edx, 9).unwrap();
        a.mov(rbx, DATA).unwrap();
        a.movdqu(xmm1, xmmword_ptr(rbx)).unwrap();
        a.out(u32::from(PORT_HYPERCALL), al).unwrap();
        a.mov(dx, u32::from(PORT_LOG)).unwrap();
        a.out(dx, eax).unwrap();
        a.movdqu(xmmword_ptr(rbx), xmm0).unwrap();
        a.mov(eax, dword_ptr(rbx)).unwrap();
        a.out(dx, eax).unwrap();
        a.mov(ecx, 2).unwrap();
        a.out(u32::from(PORT_HYPERCALL), al).unwrap();
        // An unknown one: #UD, with RIP on the instruction.
        a.mov(ecx, 3).unwrap();
        a.out(u32::from(PORT_HYPERCALL), al).unwrap();
        done(a, 1);
    });
    b.memory.write_plain(Gpa(DATA), &37u64).unwrap();
    b.start_at(CODE);
    assert_eq!(b.run(LIMIT), 0x6666);
    assert_eq!(b.log(), [10, 42]);
    assert_eq!(b.board.hypercalls.load(Ordering::SeqCst), 7);
}

#[test]
fn msi_and_extint_wake_a_halted_vp() {
    let engine = kvm_or_skip!();
    let mut b = bench(&engine, 1);
    counting_handler(&b, 0x61, CODE + 0x1000, 0);
    counting_handler(&b, 0x38, CODE + 0x1100, 1);
    b.code(CODE, |a| {
        apic_write(a, 0xf0, 0x1ff);
        apic_write(a, 0x350, 0x700);
        a.sti().unwrap();
        log(a, 1);
        a.hlt().unwrap();
        log(a, 2);
        a.hlt().unwrap();
        done(a, 1);
    });
    b.start_at(CODE);
    let (partition, board) = (b.partition.clone(), b.board.clone());
    let thread = std::thread::spawn(move || {
        let wait = |n| {
            while board.log.lock().unwrap().len() < n && !board.finished.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(1));
            }
            std::thread::sleep(Duration::from_millis(100));
        };
        wait(1);
        partition.signal_msi(Msi::fixed(0, 0x61));
        wait(2);
        board.extint.store(0x38, Ordering::SeqCst);
        partition.set_extint(true);
    });
    assert_eq!(b.run(LIMIT), 1);
    thread.join().unwrap();
    assert_eq!((b.read_u64(DATA), b.read_u64(DATA + 8)), (1, 1));
}

#[test]
fn a_doorbell_signals_without_an_exit() {
    let engine = kvm_or_skip!();
    let mut b = bench(&engine, 1);
    // SAFETY: a fresh descriptor that nobody else owns.
    let event = unsafe { OwnedFd::from_raw_fd(libc_eventfd()) };
    b.partition.register_doorbell(Gpa(0xe000_0040), event.as_fd()).unwrap();
    b.code(CODE, |a| {
        a.mov(rbx, 0xe000_0040u64).unwrap();
        a.mov(dword_ptr(rbx), 0x12345).unwrap();
        a.mov(dword_ptr(rbx + 4), 1).unwrap();
        done(a, 1);
    });
    b.start_at(CODE);
    b.run(LIMIT);
    let mut file = std::fs::File::from(event);
    let mut count = [0u8; 8];
    std::io::Read::read_exact(&mut file, &mut count).unwrap();
    assert_eq!(u64::from_le_bytes(count), 1);
    assert_eq!(*b.board.mmio.lock().unwrap(), [(0xe000_0044, 1, true)]);
}

fn libc_eventfd() -> i32 {
    // SAFETY: creates a descriptor; the result is checked.
    let fd = unsafe { libc::eventfd(0, libc::EFD_NONBLOCK) };
    assert!(fd >= 0);
    fd
}

#[test]
fn dirty_pages_are_seen() {
    let engine = kvm_or_skip!();
    let mut b = bench(&engine, 1);
    b.code(CODE, |a| {
        a.mov(rbx, 0x30_0000u64).unwrap();
        a.mov(dword_ptr(rbx), 1).unwrap();
        a.mov(rbx, 0x30_5000u64).unwrap();
        a.mov(dword_ptr(rbx), 1).unwrap();
        done(a, 1);
    });
    b.start_at(CODE);
    b.partition.track_dirty(true).unwrap();
    b.run(LIMIT);
    b.memory.write(Gpa(0x30_2000), &[1]).unwrap();
    let first = b.partition.take_dirty(Gpa(0x30_0000), 16).unwrap();
    assert_eq!(first.bits, [0b10_0101]);
    assert_eq!(b.partition.take_dirty(Gpa(0x30_0000), 16).unwrap().bits, [0]);
    // A page outside the range that was asked for is still there.
    assert_eq!(b.partition.take_dirty(Gpa(STACKS), RAM / PAGE_SIZE / 64).unwrap().bits.len(), 1);
}

#[test]
fn a_vp_is_started_with_a_state() {
    let engine = kvm_or_skip!();
    let mut b = bench(&engine, 2);
    b.code(CODE, |a| {
        log(a, 1);
        let mut wait = a.create_label();
        a.set_label(&mut wait).unwrap();
        a.hlt().unwrap();
        a.jmp(wait).unwrap();
    });
    b.code(CODE + 0x1000, |a| {
        a.add(r8, r9).unwrap();
        a.mov(eax, r8d).unwrap();
        a.mov(dx, u32::from(PORT_DONE)).unwrap();
        a.out(dx, eax).unwrap();
        a.hlt().unwrap();
    });
    b.start_at(CODE);
    let mut state = b.long_state(1, CODE + 0x1000);
    state.gprs[8] = 40;
    state.gprs[9] = 2;
    let (partition, board) = (b.partition.clone(), b.board.clone());
    let thread = std::thread::spawn(move || {
        while board.log.lock().unwrap().is_empty() && !board.finished.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_millis(100));
        partition.start_vp(1, Box::new(state)).unwrap();
    });
    assert_eq!(b.run(LIMIT), 42);
    thread.join().unwrap();
}

#[test]
fn states_survive_kvm() {
    let engine = kvm_or_skip!();
    let mut b = bench(&engine, 1);
    let mut state = b.long_state(0, CODE);
    state.rflags |= x86::regs::rflags::IF;
    for (i, r) in state.gprs.iter_mut().enumerate() {
        *r = 0x1111_2222_3333_0000 + i as u64;
    }
    state.dr = [0x1000, 0x2000, 0x3000, 0x4000];
    state.pending.nmi_masked = true;
    state.pending.interrupt_shadow = true;
    state.activity = partition::Activity::Halted;
    state.lapic.regs[0xf1] = 1;
    state.lapic.regs[0x80] = 0x30;
    state.lapic.regs[0x220] = 4;
    state.xsave[x86::xsave::LEGACY_SIZE] = 3;
    state.xsave[160..176].copy_from_slice(&[7; 16]);
    state.set_msr(x86::msr::TSC, 1_000_000);
    state.set_msr(x86::msr::LSTAR, 0xffff_ffff_8000_0000);
    state.set_msr(x86::msr::KERNEL_GS_BASE, 0xffff_8880_0000_0000);
    b.vps[0].set_state(&state).unwrap();
    let back = b.vps[0].state().unwrap();
    for number in [x86::msr::TSC, x86::msr::LSTAR, x86::msr::KERNEL_GS_BASE] {
        assert_eq!(back.msr(number), state.msr(number), "MSR {number:#x}");
    }
    assert_eq!((back.gprs, back.rip, back.rflags), (state.gprs, state.rip, state.rflags));
    assert_eq!((back.cr0, back.cr3, back.cr4, back.efer), (state.cr0, state.cr3, state.cr4, state.efer));
    assert_eq!(back.segments, state.segments);
    assert_eq!(back.dr, state.dr);
    assert_eq!(back.pending, state.pending);
    assert_eq!(back.activity, state.activity);
    assert_eq!((back.lapic.regs[0x220], back.lapic.regs[0x80]), (4, 0x30));
    assert_eq!(back.xsave[160..176], [7; 16]);
}

/// Sums, and logs each step. A vector register is loaded at the beginning and stored at the end (with the few vector
/// instructions that an emulated KVM executes).
fn summing_guest(b: &Bench, steps: u32) {
    b.code(CODE, |a| {
        a.xor(r8, r8).unwrap();
        a.mov(ecx, steps).unwrap();
        a.mov(rbx, DATA).unwrap();
        a.movdqu(xmm3, xmmword_ptr(rbx + 0x20)).unwrap();
        let mut sum = a.create_label();
        a.set_label(&mut sum).unwrap();
        a.add(r8, rcx).unwrap();
        a.mov(eax, ecx).unwrap();
        a.mov(dx, u32::from(PORT_LOG)).unwrap();
        a.out(dx, eax).unwrap();
        a.dec(ecx).unwrap();
        a.jne(sum).unwrap();
        a.mov(rbx, DATA).unwrap();
        a.mov(qword_ptr(rbx), r8).unwrap();
        a.movdqu(xmmword_ptr(rbx + 0x30), xmm3).unwrap();
        done(a, 1);
    });
}

const VECTOR: [u64; 2] = [0x1122_3344_5566_7788, 0x99aa_bbcc_ddee_ff00];

/// Runs half of the guest on `first`, the rest on `second`.
fn moves_between(first: &dyn Engine, second: &dyn Engine) {
    const STEPS: u32 = 200;
    let mut a = bench(first, 1);
    summing_guest(&a, STEPS);
    a.memory.write_plain(Gpa(DATA + 0x20), &VECTOR).unwrap();
    a.start_at(CODE);
    a.clock.start();
    let board = a.board.clone();
    board.kick_at.store(50, Ordering::SeqCst);
    assert_eq!(a.vps[0].run(&*board).unwrap(), partition::RunExit::Kicked);
    assert_eq!(a.log().len(), 50, "a kick takes effect before the next instruction");
    a.clock.stop();
    let state = a.vps[0].state().unwrap();
    let done_so_far = a.log().len();

    let mut b = bench(second, 1);
    let mut image = vec![0u8; RAM as usize];
    a.memory.read(Gpa(0), &mut image).unwrap();
    b.memory.write(Gpa(0), &image).unwrap();
    b.clock.set(a.clock.tsc());
    b.vps[0].set_state(&state).unwrap();
    assert_eq!(b.run(LIMIT), 1);
    let sum = STEPS * (STEPS + 1) / 2;
    assert_eq!(b.read_u64(DATA), u64::from(sum));
    assert_eq!([b.read_u64(DATA + 0x30), b.read_u64(DATA + 0x38)], VECTOR, "XMM3 has come along");
    assert_eq!(done_so_far + b.log().len(), STEPS as usize, "no step is lost or done twice");
    assert!(done_so_far < STEPS as usize, "the guest was done before it was saved");
}

#[test]
fn saved_on_kvm_restored_on_soft() {
    let engine = kvm_or_skip!();
    moves_between(&engine, &SoftEngine::new());
}

#[test]
fn saved_on_soft_restored_on_kvm() {
    let engine = kvm_or_skip!();
    moves_between(&SoftEngine::new(), &engine);
}
