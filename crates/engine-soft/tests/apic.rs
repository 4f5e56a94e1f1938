//! Micro-guests for the local APIC, MSRs, start-up of VPs, timers, save and restore.
#![allow(missing_docs)]

mod common;

use common::*;
use iced_x86::code_asm::*;
use partition::Msi;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use viridian_engine_soft::partition_impl::SoftEngine;

const LIMIT: Duration = Duration::from_secs(60);
const APIC: u64 = 0xfee0_0000;

fn bench(vps: u32) -> Bench {
    Bench::new(&SoftEngine::new(), "x86-64-v2", vps)
}

/// Writes an xAPIC register.
fn apic_write(a: &mut CodeAssembler, register: u64, value: u32) {
    a.mov(rbx, APIC + register).unwrap();
    a.mov(dword_ptr(rbx), value).unwrap();
}

fn wrmsr(a: &mut CodeAssembler, msr: u32, value: u64) {
    a.mov(ecx, msr).unwrap();
    a.mov(eax, value as u32).unwrap();
    a.mov(edx, (value >> 32) as u32).unwrap();
    a.wrmsr().unwrap();
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
    a.pause().unwrap();
    a.jmp(forever).unwrap();
}

/// A handler that counts at DATA + 8 * slot, ends the interrupt (xAPIC) and returns.
fn counting_handler(b: &Bench, vector: u8, at: u64, slot: u64) {
    b.code(at, |a| {
        a.push(rax).unwrap();
        a.push(rbx).unwrap();
        a.mov(rax, DATA + 8 * slot).unwrap();
        a.lock().inc(qword_ptr(rax)).unwrap();
        apic_write(a, 0xb0, 0);
        a.pop(rbx).unwrap();
        a.pop(rax).unwrap();
        a.iretq().unwrap();
    });
    b.gate(vector, at);
}

#[test]
fn runs_at_all() {
    let mut b = bench(1);
    b.code(CODE, |a| done(a, 42));
    b.start_at(CODE);
    assert_eq!(b.run(LIMIT), 42);
}

#[test]
fn self_ipi_respects_priority_and_if() {
    let mut b = bench(1);
    counting_handler(&b, 0x40, CODE + 0x1000, 0);
    b.code(CODE, |a| {
        apic_write(a, 0xf0, 0x1ff);
        // With IF clear nothing happens.
        apic_write(a, 0x300, 0x4_4040);
        a.mov(rsi, DATA).unwrap();
        a.mov(eax, dword_ptr(rsi)).unwrap();
        a.mov(dx, u32::from(PORT_LOG)).unwrap();
        a.out(dx, eax).unwrap();
        // Task priority 0x40 holds vector 0x40 back.
        a.mov(eax, 4).unwrap();
        a.mov(cr8, rax).unwrap();
        a.sti().unwrap();
        a.nop().unwrap();
        a.nop().unwrap();
        a.mov(eax, dword_ptr(rsi)).unwrap();
        a.out(dx, eax).unwrap();
        a.xor(eax, eax).unwrap();
        a.mov(cr8, rax).unwrap();
        a.mov(eax, dword_ptr(rsi)).unwrap();
        a.out(dx, eax).unwrap();
        done(a, 0);
    });
    b.start_at(CODE);
    b.run(LIMIT);
    assert_eq!(b.log(), [0, 0, 1]);
}

#[test]
fn interrupt_shadow_of_sti_covers_hlt() {
    // STI; HLT with an interrupt already waiting must not lose it, and the handler returns behind HLT.
    let mut b = bench(1);
    counting_handler(&b, 0x51, CODE + 0x1000, 0);
    b.code(CODE, |a| {
        apic_write(a, 0xf0, 0x1ff);
        apic_write(a, 0x300, 0x4_4051);
        a.sti().unwrap();
        a.hlt().unwrap();
        a.cli().unwrap();
        done(a, 7);
    });
    b.start_at(CODE);
    assert_eq!(b.run(LIMIT), 7);
    assert_eq!(b.read_u64(DATA), 1);
}

#[test]
fn msi_wakes_from_hlt() {
    let mut b = bench(1);
    counting_handler(&b, 0x61, CODE + 0x1000, 0);
    b.code(CODE, |a| {
        apic_write(a, 0xf0, 0x1ff);
        a.sti().unwrap();
        log(a, 1);
        a.hlt().unwrap();
        done(a, 1);
    });
    b.start_at(CODE);
    let partition = b.partition.clone();
    let board = b.board.clone();
    let thread = std::thread::spawn(move || {
        while board.log.lock().unwrap().is_empty() {
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_millis(20));
        partition.signal_msi(Msi::fixed(0, 0x61));
    });
    assert_eq!(b.run(LIMIT), 1);
    thread.join().unwrap();
    assert_eq!(b.read_u64(DATA), 1);
}

#[test]
fn level_interrupt_reports_its_eoi() {
    let mut b = bench(1);
    counting_handler(&b, 0x62, CODE + 0x1000, 0);
    b.code(CODE, |a| {
        apic_write(a, 0xf0, 0x1ff);
        a.sti().unwrap();
        a.nop().unwrap();
        a.hlt().unwrap();
        done(a, 1);
    });
    b.start_at(CODE);
    // Level, asserted.
    let partition = b.partition.clone();
    let thread = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        partition.signal_msi(Msi { address: 0xfee0_0000, data: 0xc062 });
    });
    b.run(LIMIT);
    thread.join().unwrap();
    assert_eq!(*b.board.eois.lock().unwrap(), [(0, 0x62)]);
}

#[test]
fn extint_is_acknowledged_by_the_machine() {
    let mut b = bench(1);
    counting_handler(&b, 0x38, CODE + 0x1000, 0);
    b.code(CODE, |a| {
        apic_write(a, 0xf0, 0x1ff);
        apic_write(a, 0x350, 0x700);
        a.sti().unwrap();
        a.hlt().unwrap();
        done(a, 1);
    });
    b.start_at(CODE);
    b.board.extint.store(0x38, Ordering::SeqCst);
    let partition = b.partition.clone();
    let thread = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(30));
        partition.set_extint(true);
    });
    b.run(LIMIT);
    thread.join().unwrap();
    assert_eq!(b.read_u64(DATA), 1);
}

#[test]
fn periodic_timer_reaches_a_spinning_vp() {
    let periods = || {
        let mut b = bench(1);
        counting_handler(&b, 0x70, CODE + 0x1000, 0);
        b.code(CODE, |a| {
            apic_write(a, 0xf0, 0x1ff);
            apic_write(a, 0x3e0, 0xb); // divide by 1: one tick a nanosecond
            apic_write(a, 0x320, 0x2_0070);
            apic_write(a, 0x380, 1_000_000);
            a.sti().unwrap();
            let mut spin = a.create_label();
            a.mov(rsi, DATA).unwrap();
            a.set_label(&mut spin).unwrap();
            a.cmp(qword_ptr(rsi), 50).unwrap();
            a.jb(spin).unwrap();
            done(a, 1);
        });
        b.start_at(CODE);
        let start = Instant::now();
        b.run(LIMIT);
        start.elapsed()
    };
    // Never too early; late only while the host has no time for it, which does not last.
    let mut took = Vec::new();
    while took.len() < 5 && took.iter().all(|t| *t >= Duration::from_millis(1500)) {
        took.push(periods());
        assert!(took.iter().all(|t| *t >= Duration::from_millis(49)), "50 periods of 1 ms took {took:?}");
    }
    assert!(took.iter().any(|t| *t < Duration::from_millis(1500)), "50 periods of 1 ms took {took:?}");
}

#[test]
fn tsc_deadline_fires_once_and_on_time() {
    let mut b = bench(1);
    b.code(CODE + 0x1000, |a| {
        // How late, in TSC ticks.
        a.rdtsc().unwrap();
        a.shl(rdx, 32).unwrap();
        a.or(rax, rdx).unwrap();
        a.sub(rax, r8).unwrap();
        a.mov(rbx, DATA).unwrap();
        a.mov(qword_ptr(rbx), rax).unwrap();
        a.mov(ecx, 0x6e0).unwrap();
        a.rdmsr().unwrap();
        a.mov(dword_ptr(rbx + 8), eax).unwrap();
        done(a, 1);
    });
    b.gate(0x71, CODE + 0x1000);
    let ticks = (b.clock.tsc_frequency_hz() / 100) as i32;
    b.code(CODE, |a| {
        apic_write(a, 0xf0, 0x1ff);
        apic_write(a, 0x320, 0x4_0071);
        a.rdtsc().unwrap();
        a.shl(rdx, 32).unwrap();
        a.or(rax, rdx).unwrap();
        a.lea(r8, qword_ptr(rax + ticks)).unwrap();
        a.mov(rax, r8).unwrap();
        a.mov(rdx, r8).unwrap();
        a.shr(rdx, 32).unwrap();
        a.mov(ecx, 0x6e0).unwrap();
        a.wrmsr().unwrap();
        a.sti().unwrap();
        let mut idle = a.create_label();
        a.set_label(&mut idle).unwrap();
        a.hlt().unwrap();
        a.jmp(idle).unwrap();
    });
    b.start_at(CODE);
    b.run(LIMIT);
    let late = b.read_u64(DATA) as i64;
    assert!(late >= 0, "early by {} ticks", -late);
    assert!((late as u64) < b.clock.tsc_frequency_hz() / 10, "late by {late} ticks");
    assert_eq!(b.read_u64(DATA + 8) as u32, 0, "the deadline must read as zero after it has fired");
}

/// A real-mode trampoline at 0x8000 that goes to long mode and jumps to `CODE + 0x4000`.
fn trampoline(b: &Bench) {
    b.code_bits(16, 0x8000, |a| {
        a.cli().unwrap();
        a.xor(ax, ax).unwrap();
        a.mov(ds, ax).unwrap();
        a.db(&[0x66, 0x0f, 0x01, 0x16, 0xf0, 0x80]).unwrap(); // lgdt [0x80f0]
        a.mov(eax, 0x6a0).unwrap(); // PAE, PGE, OSFXSR, OSXMMEXCPT
        a.mov(cr4, eax).unwrap();
        a.mov(eax, PML4 as u32).unwrap();
        a.mov(cr3, eax).unwrap();
        a.mov(ecx, 0xc000_0080u32).unwrap();
        a.mov(eax, 0x900).unwrap();
        a.xor(edx, edx).unwrap();
        a.wrmsr().unwrap();
        a.mov(eax, 0x8000_0033u32).unwrap();
        a.mov(cr0, eax).unwrap();
        let target = (CODE + 0x4000) as u32;
        let mut far = vec![0x66, 0xea];
        far.extend_from_slice(&target.to_le_bytes());
        far.extend_from_slice(&8u16.to_le_bytes());
        a.db(&far).unwrap();
    });
    let mut gdtr = vec![23u8, 0];
    gdtr.extend_from_slice(&(GDT as u32).to_le_bytes());
    b.memory.write(partition::Gpa(0x80f0), &gdtr).unwrap();
    b.code(CODE + 0x4000, |a| {
        a.mov(ax, 0x10u32).unwrap();
        a.mov(ss, ax).unwrap();
        a.mov(ds, ax).unwrap();
        a.mov(es, ax).unwrap();
        a.mov(rbx, APIC + 0x20).unwrap();
        a.mov(ecx, dword_ptr(rbx)).unwrap();
        a.shr(ecx, 24).unwrap();
        a.lea(rsp, qword_ptr(rcx + 1)).unwrap();
        a.shl(rsp, 12).unwrap();
        a.add(rsp, STACKS as i32).unwrap();
        a.sub(rsp, 16).unwrap();
        a.mov(word_ptr(rsp), 0xfff).unwrap();
        a.mov(rax, IDT).unwrap();
        a.mov(qword_ptr(rsp + 2), rax).unwrap();
        a.lidt(ptr(rsp)).unwrap();
        apic_write(a, 0xf0, 0x1ff);
        a.mov(rsi, DATA).unwrap();
        a.lock().inc(qword_ptr(rsi)).unwrap();
        a.sti().unwrap();
        let mut idle = a.create_label();
        a.set_label(&mut idle).unwrap();
        a.hlt().unwrap();
        a.jmp(idle).unwrap();
    });
}

fn wait_for(a: &mut CodeAssembler, slot: i32, count: i32) {
    let mut wait = a.create_label();
    a.mov(rsi, DATA).unwrap();
    a.set_label(&mut wait).unwrap();
    a.pause().unwrap();
    a.cmp(qword_ptr(rsi + 8 * slot), count).unwrap();
    a.jb(wait).unwrap();
}

#[test]
fn four_vps_start_and_get_every_kind_of_ipi() {
    let mut b = bench(4);
    trampoline(&b);
    counting_handler(&b, 0x41, CODE + 0x1000, 1);
    counting_handler(&b, 0x42, CODE + 0x1100, 2);
    counting_handler(&b, 0x43, CODE + 0x1200, 3);
    b.code(CODE, |a| {
        apic_write(a, 0xf0, 0x1ff);
        a.sti().unwrap();
        apic_write(a, 0x300, 0xc_4500); // INIT, all but self
        apic_write(a, 0x300, 0xc_4608); // SIPI at 0x8000
        apic_write(a, 0x300, 0xc_4608);
        wait_for(a, 0, 3);
        // All including self; all excluding self; physical to VP 2; logical flat is set up by VP 0 for itself only.
        apic_write(a, 0x300, 0x8_4041);
        wait_for(a, 1, 4);
        apic_write(a, 0x300, 0xc_4042);
        wait_for(a, 2, 3);
        apic_write(a, 0x310, 2 << 24);
        apic_write(a, 0x300, 0x4043);
        wait_for(a, 3, 1);
        apic_write(a, 0xd0, 0x8000_0000);
        apic_write(a, 0x310, 0x80 << 24);
        apic_write(a, 0x300, 0x4843);
        wait_for(a, 3, 2);
        done(a, 9);
    });
    b.start_at(CODE);
    assert_eq!(b.run(LIMIT), 9);
    assert_eq!([1, 2, 3].map(|n| b.read_u64(DATA + 8 * n)), [4, 3, 2]);
}

#[test]
fn more_vps_than_cores_do_not_starve() {
    // Seven VPs wait by spinning (IF clear, no PAUSE) while the eighth has work to do.
    let mut b = bench(8);
    b.code(CODE, |a| {
        a.mov(rsi, DATA).unwrap();
        a.mov(ecx, 3_000_000).unwrap();
        let mut work = a.create_label();
        a.set_label(&mut work).unwrap();
        a.dec(ecx).unwrap();
        a.jne(work).unwrap();
        a.mov(qword_ptr(rsi), 1).unwrap();
        wait_for(a, 1, 7);
        done(a, 3);
    });
    b.code(CODE + 0x2000, |a| {
        a.mov(rsi, DATA).unwrap();
        let mut spin = a.create_label();
        a.set_label(&mut spin).unwrap();
        a.cmp(qword_ptr(rsi), 1).unwrap();
        a.jne(spin).unwrap();
        a.lock().inc(qword_ptr(rsi + 8)).unwrap();
        let mut idle = a.create_label();
        a.set_label(&mut idle).unwrap();
        a.hlt().unwrap();
        a.jmp(idle).unwrap();
    });
    b.start_at(CODE);
    for n in 1..8 {
        let state = b.long_state(n, CODE + 0x2000);
        b.vps[n as usize].set_state(&state).unwrap();
    }
    assert_eq!(b.run(LIMIT), 3);
}

#[test]
fn x2apic_and_its_faults() {
    let mut b = bench(1);
    // #GP handler: logs the error code + 0xff00 and skips the two-byte WRMSR/RDMSR.
    b.code(CODE + 0x1000, |a| {
        a.add(rsp, 8).unwrap();
        a.add(qword_ptr(rsp), 2).unwrap();
        a.push(rax).unwrap();
        a.push(rdx).unwrap();
        log(a, 0xff00);
        a.pop(rdx).unwrap();
        a.pop(rax).unwrap();
        a.iretq().unwrap();
    });
    b.gate(13, CODE + 0x1000);
    b.code(CODE + 0x2000, |a| {
        a.push(rax).unwrap();
        a.push(rdx).unwrap();
        a.push(rcx).unwrap();
        log(a, 0x77);
        wrmsr(a, 0x80b, 0);
        a.pop(rcx).unwrap();
        a.pop(rdx).unwrap();
        a.pop(rax).unwrap();
        a.iretq().unwrap();
    });
    b.gate(0x77, CODE + 0x2000);
    let report = |a: &mut CodeAssembler| {
        a.mov(dx, u32::from(PORT_LOG)).unwrap();
        a.out(dx, eax).unwrap();
    };
    b.code(CODE, |a| {
        // x2APIC registers do not exist in xAPIC mode.
        a.mov(ecx, 0x802).unwrap();
        a.rdmsr().unwrap();
        wrmsr(a, 0x1b, 0xfee0_0d00);
        a.mov(ecx, 0x802).unwrap();
        a.rdmsr().unwrap();
        report(a);
        a.mov(ecx, 0x80d).unwrap();
        a.rdmsr().unwrap();
        report(a);
        // From x2APIC straight to xAPIC: #GP. A reserved bit of TPR: #GP. Writing the id: #GP.
        wrmsr(a, 0x1b, 0xfee0_0900);
        wrmsr(a, 0x808, 0x100);
        wrmsr(a, 0x802, 1);
        wrmsr(a, 0x80f, 0x1ff);
        a.sti().unwrap();
        wrmsr(a, 0x83f, 0x77);
        a.nop().unwrap();
        a.cli().unwrap();
        done(a, 0);
    });
    b.start_at(CODE);
    b.run(LIMIT);
    assert_eq!(b.log(), [0xff00, 0, 1, 0xff00, 0xff00, 0xff00, 0x77]);
}

#[test]
fn nmi_is_blocked_until_iret() {
    let mut b = bench(1);
    b.code(CODE + 0x1000, |a| {
        log(a, 0x2);
        // A second NMI comes while this handler runs: it must wait for IRET.
        apic_write(a, 0x300, 0x4400);
        a.nop().unwrap();
        a.mov(rbx, DATA).unwrap();
        a.inc(qword_ptr(rbx)).unwrap();
        log(a, 0x3);
        let mut out = a.create_label();
        a.cmp(qword_ptr(rbx), 2).unwrap();
        a.jb(out).unwrap();
        done(a, 0);
        a.set_label(&mut out).unwrap();
        a.iretq().unwrap();
    });
    b.gate(2, CODE + 0x1000);
    b.code(CODE, |a| {
        apic_write(a, 0xf0, 0x1ff);
        apic_write(a, 0x300, 0x4400);
        let mut idle = a.create_label();
        a.set_label(&mut idle).unwrap();
        a.hlt().unwrap();
        a.jmp(idle).unwrap();
    });
    b.start_at(CODE);
    b.run(LIMIT);
    assert_eq!(b.log(), [2, 3, 2, 3]);
}

#[test]
fn hypercalls_and_machine_msrs() {
    let mut b = bench(1);
    b.code(CODE, |a| {
        let report = |a: &mut CodeAssembler| {
            a.mov(dx, u32::from(PORT_LOG)).unwrap();
            a.out(dx, eax).unwrap();
        };
        a.mov(ecx, 0x4000_0002u32).unwrap();
        a.rdmsr().unwrap();
        report(a);
        wrmsr(a, 0x4000_0010, 0x55);
        a.mov(ecx, 1).unwrap();
        a.mov(edx, 9).unwrap();
        a.out(u32::from(PORT_HYPERCALL), al).unwrap();
        report(a);
        a.mov(ecx, 2).unwrap();
        a.out(u32::from(PORT_HYPERCALL), al).unwrap();
        done(a, 0);
    });
    b.start_at(CODE);
    b.run(LIMIT);
    assert_eq!(b.log(), [0x9abc_def0, 10]);
    assert_eq!(b.board.hypercalls.load(Ordering::SeqCst), 6);
    assert_eq!(*b.board.msrs.lock().unwrap(), [(0x4000_0010, 0x55)]);
}

#[test]
fn xsave_sizes_follow_xcr0() {
    let Ok(_) = x86::cpuid::CpuModel::by_name("x86-64-v3") else {
        eprintln!("skipped: this host does not offer x86-64-v3");
        return;
    };
    let mut b = Bench::new(&SoftEngine::new(), "x86-64-v3", 1);
    b.code(CODE, |a| {
        let cpuid = |a: &mut CodeAssembler, leaf: u32, sub: u32| {
            a.mov(eax, leaf).unwrap();
            a.mov(ecx, sub).unwrap();
            a.cpuid().unwrap();
        };
        let report = |a: &mut CodeAssembler, r: AsmRegister32| {
            a.mov(eax, r).unwrap();
            a.mov(dx, u32::from(PORT_LOG)).unwrap();
            a.out(dx, eax).unwrap();
        };
        cpuid(a, 1, 0);
        a.shr(ecx, 27).unwrap();
        a.and(ecx, 1).unwrap();
        report(a, ecx);
        a.mov(rax, cr4).unwrap();
        a.or(eax, 1 << 18).unwrap();
        a.mov(cr4, rax).unwrap();
        cpuid(a, 1, 0);
        a.shr(ecx, 27).unwrap();
        a.and(ecx, 1).unwrap();
        report(a, ecx);
        cpuid(a, 0xd, 0);
        report(a, ebx);
        a.xor(ecx, ecx).unwrap();
        a.xor(edx, edx).unwrap();
        a.mov(eax, 7).unwrap();
        a.xsetbv().unwrap();
        cpuid(a, 0xd, 0);
        report(a, ebx);
        cpuid(a, 0xd, 0);
        report(a, ecx);
        done(a, 0);
    });
    b.start_at(CODE);
    b.run(LIMIT);
    assert_eq!(b.log(), [0, 1, 576, 832, 832]);
}

#[test]
fn state_goes_around_unchanged() {
    let mut b = bench(2);
    let mut state = b.long_state(0, 0x1234);
    state.rflags |= x86::regs::rflags::IF | x86::regs::rflags::CF;
    for (i, r) in state.gprs.iter_mut().enumerate() {
        *r = 0x1111_2222_3333_0000 + i as u64;
    }
    state.dr = [0x1000, 0x2000, 0x3000, 0x4000];
    state.pending.nmi_pending = true;
    state.pending.interrupt_shadow = true;
    state.pending.interrupt = Some(0x99);
    state.activity = partition::Activity::Halted;
    state.lapic.regs[0xf0] = 0xff;
    state.lapic.regs[0xf1] = 1;
    state.lapic.regs[0x80] = 0x30;
    state.lapic.regs[0x220] = 4; // IRR, vector 0x42
    state.xsave[x86::xsave::LEGACY_SIZE] = 3;
    state.xsave[160..176].copy_from_slice(&[7; 16]);
    let tsc = 1_000_000;
    state.set_msr(x86::msr::TSC, tsc);
    state.set_msr(x86::msr::LSTAR, 0xffff_ffff_8000_0000);
    state.set_msr(x86::msr::STAR, 0x23_0010_0000_0000);
    state.set_msr(x86::msr::KERNEL_GS_BASE, 0xffff_8880_0000_0000);
    b.vps[0].set_state(&state).unwrap();
    let first = b.vps[0].state().unwrap();
    for (number, value) in &state.msrs {
        assert_eq!(first.msr(*number), Some(*value), "MSR {number:#x}");
    }
    assert_eq!(first.gprs, state.gprs);
    assert_eq!(first.pending, state.pending);
    assert_eq!(first.activity, state.activity);
    assert_eq!(first.lapic.regs[0x220], 4);
    b.vps[0].set_state(&first).unwrap();
    let second = b.vps[0].state().unwrap();
    assert_eq!(first, second);
    // A state that no processor can be in is refused.
    let mut bad = second.clone();
    bad.cr4 |= x86::regs::cr4::LA57;
    assert!(b.vps[0].set_state(&bad).is_err());
}

#[test]
fn a_saved_guest_goes_on_in_another_partition() {
    // Sums 1..=4 thousand million while a timer interrupts it; saved in the middle. It takes a second or two, so that a
    // loaded host stops it in time.
    let program = |b: &Bench| {
        counting_handler(b, 0x70, CODE + 0x1000, 0);
        b.code(CODE, |a| {
            apic_write(a, 0xf0, 0x1ff);
            apic_write(a, 0x3e0, 0xb);
            apic_write(a, 0x320, 0x2_0070);
            apic_write(a, 0x380, 500_000);
            a.sti().unwrap();
            a.xor(r8, r8).unwrap();
            a.mov(rcx, 4_000_000_000u64).unwrap();
            let mut sum = a.create_label();
            a.set_label(&mut sum).unwrap();
            a.add(r8, rcx).unwrap();
            a.dec(rcx).unwrap();
            a.jne(sum).unwrap();
            a.mov(rbx, DATA + 0x100).unwrap();
            a.mov(qword_ptr(rbx), r8).unwrap();
            done(a, 1);
        });
    };
    let mut first = bench(1);
    program(&first);
    first.start_at(CODE);
    first.clock.start();
    let (partition, memory) = (first.partition.clone(), first.memory.clone());
    let thread = std::thread::spawn(move || {
        // Once it has begun, which on a loaded host takes its time: then it has counted a tick.
        let mut ticks = [0; 8];
        while ticks == [0; 8] {
            std::thread::sleep(Duration::from_millis(1));
            memory.read(partition::Gpa(DATA), &mut ticks).unwrap();
        }
        partition.kick(0);
    });
    let board = first.board.clone();
    assert_eq!(first.vps[0].run(&*board).unwrap(), partition::RunExit::Kicked);
    thread.join().unwrap();
    first.clock.stop();
    let state = first.vps[0].state().unwrap();
    assert!(state.gprs[x86::regs::gpr::RCX] > 0, "the guest was done before it was saved");
    let ticks_before = first.read_u64(DATA);

    let mut second = bench(1);
    let mut page = vec![0u8; RAM as usize];
    first.memory.read(partition::Gpa(0), &mut page).unwrap();
    second.memory.write(partition::Gpa(0), &page).unwrap();
    second.clock.set(first.clock.tsc());
    second.vps[0].set_state(&state).unwrap();
    second.run(LIMIT);
    assert_eq!(second.read_u64(DATA + 0x100), 4_000_000_000u64 * 4_000_000_001 / 2);
    assert!(second.read_u64(DATA) > ticks_before, "the timer must go on after restore");
}

#[test]
fn remote_flushes_do_not_deadlock() {
    use partition::{TlbFlush, VpSet};
    let mut b = bench(2);
    let spin = |b: &Bench, at: u64| {
        b.code(at, |a| {
            a.mov(rsi, DATA).unwrap();
            let mut spin = a.create_label();
            a.set_label(&mut spin).unwrap();
            a.inc(qword_ptr(rsi)).unwrap();
            a.jmp(spin).unwrap();
        });
    };
    spin(&b, CODE);
    b.start_at(CODE);
    let state = b.long_state(1, CODE);
    b.vps[1].set_state(&state).unwrap();
    let partition = b.partition.clone();
    let board = b.board.clone();
    let thread = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(20));
        for n in 0..2000 {
            let what = if n % 2 == 0 { TlbFlush::All } else { TlbFlush::Ranges(&[(DATA, 2)]) };
            partition.flush_tlb(None, VpSet(3), what);
        }
        use partition::VpExits;
        board.io_write(0, PORT_DONE, &[5]);
    });
    assert_eq!(b.run(LIMIT), 5);
    thread.join().unwrap();
}

/// The x86-64-v2 table of a vendor.
fn table_of(vendor: &'static [u8; 4]) -> x86::cpuid::CpuidTable {
    let host = move |leaf, sub| {
        let mut r = x86::cpuid::host_cpuid(leaf, sub);
        if leaf == 0 {
            r.ebx = u32::from_le_bytes(*vendor);
        }
        r
    };
    let hz = partition::Clock::new().tsc_frequency_hz();
    x86::cpuid::CpuModel::by_name_on("x86-64-v2", host).unwrap().table(0, 1, hz)
}

#[test]
fn fs_base_survives_iret_to_user_and_not_a_null_load() {
    for vendor in [b"Genu", b"Auth"] {
        let memory = partition::GuestMemory::with_ram(RAM, 0xc000_0000..1 << 32, false).unwrap();
        let mut b = Bench::with_tables(&SoftEngine::new(), vec![table_of(vendor)], memory);
        b.memory.write_plain(partition::Gpa(DATA), &0x1111_2222u64).unwrap();
        b.memory.write_plain(partition::Gpa(0x10), &0x3333u64).unwrap();
        b.code(CODE + 0x1000, |a| {
            let report = |a: &mut CodeAssembler| {
                a.mov(dx, u32::from(PORT_LOG)).unwrap();
                a.out(dx, eax).unwrap();
            };
            // In user mode: the base is still there; loading the null selector clears it.
            a.mov(rax, qword_ptr(0).fs()).unwrap();
            report(a);
            a.xor(eax, eax).unwrap();
            a.mov(fs, eax).unwrap();
            a.mov(rax, qword_ptr(0x10).fs()).unwrap();
            report(a);
            done(a, 1);
        });
        b.code(CODE, |a| {
            a.xor(eax, eax).unwrap();
            a.mov(fs, eax).unwrap();
            a.mov(ds, eax).unwrap();
            wrmsr(a, 0xc000_0100, DATA);
            for value in [0x1b, DATA as i32 + 0x4000, 0x3002, 0x23, CODE as i32 + 0x1000] {
                a.push(value).unwrap();
            }
            a.iretq().unwrap();
        });
        b.start_at(CODE);
        assert_eq!(b.run(LIMIT), 1);
        assert_eq!(b.log(), [0x1111_2222, 0x3333], "{vendor:?}");
    }
}

#[test]
fn a_model_that_the_host_cannot_execute_is_refused() {
    use partition::Engine;
    let mut table = x86::cpuid::CpuModel::by_name("x86-64-v2").unwrap().table(0, 1, 1_000_000_000);
    let missing = [x86::cpuid::bits::SHA, x86::cpuid::bits::GFNI, x86::cpuid::bits::VAES]
        .into_iter()
        .find(|b| x86::cpuid::host_cpuid(b.leaf, b.subleaf).reg(b.reg) >> b.bit & 1 == 0);
    let Some(bit) = missing else {
        eprintln!("skipped: this host has every feature that a model can have");
        return;
    };
    let mut r = table.get(bit.leaf, bit.subleaf);
    *r.reg_mut(bit.reg) |= 1 << bit.bit;
    table.set(bit.leaf, Some(bit.subleaf), r);
    let config = partition::PartitionConfig {
        vp_count: 1,
        memory: partition::GuestMemory::new(),
        clock: std::sync::Arc::new(partition::Clock::new()),
        cpuid: vec![table],
        msr_exits: vec![],
        hypercall_port: None,
        options: partition::EngineOptions::default(),
    };
    let error = SoftEngine::new().create(config).err().unwrap();
    assert!(error.to_string().contains(bit.name), "{error}");
}

#[test]
fn code_that_another_vp_writes_is_seen() {
    const ROUNDS: i32 = 5_000;
    let mut b = bench(2);
    let func = CODE + 0x3000;
    b.code(func, |a| {
        a.mov(eax, 0).unwrap();
        a.ret().unwrap();
    });
    // VP 0 writes the immediate operand, then the flag, and waits for the answer.
    b.code(CODE, |a| {
        a.mov(rsi, DATA).unwrap();
        a.mov(rdi, func).unwrap();
        a.xor(ecx, ecx).unwrap();
        let (mut next, mut wait) = (a.create_label(), a.create_label());
        a.set_label(&mut next).unwrap();
        a.inc(ecx).unwrap();
        a.mov(dword_ptr(rdi + 1), ecx).unwrap();
        a.mov(dword_ptr(rsi), ecx).unwrap();
        a.set_label(&mut wait).unwrap();
        a.pause().unwrap();
        a.cmp(dword_ptr(rsi + 8), ecx).unwrap();
        a.jne(wait).unwrap();
        a.cmp(ecx, ROUNDS).unwrap();
        a.jb(next).unwrap();
        done(a, 1);
    });
    // VP 1 waits for the flag, serialises, calls, compares.
    b.code(CODE + 0x2000, |a| {
        a.mov(rsi, DATA).unwrap();
        a.mov(rdi, func).unwrap();
        a.xor(r8d, r8d).unwrap();
        let (mut next, mut wait, mut good) = (a.create_label(), a.create_label(), a.create_label());
        a.set_label(&mut next).unwrap();
        a.inc(r8d).unwrap();
        a.set_label(&mut wait).unwrap();
        a.pause().unwrap();
        a.cmp(dword_ptr(rsi), r8d).unwrap();
        a.jne(wait).unwrap();
        a.xor(eax, eax).unwrap();
        a.cpuid().unwrap();
        a.call(rdi).unwrap();
        a.cmp(eax, r8d).unwrap();
        a.je(good).unwrap();
        done(a, 0xbad);
        a.set_label(&mut good).unwrap();
        a.mov(dword_ptr(rsi + 8), r8d).unwrap();
        a.jmp(next).unwrap();
    });
    b.start_at(CODE);
    let state = b.long_state(1, CODE + 0x2000);
    b.vps[1].set_state(&state).unwrap();
    assert_eq!(b.run(LIMIT), 1);
}

#[test]
fn dirty_pages_and_doorbells() {
    use std::io::Read;
    use std::os::fd::{AsFd, FromRawFd, OwnedFd};
    let mut b = bench(1);
    // SAFETY: a fresh descriptor that nobody else owns; the result is checked.
    let event = unsafe {
        let fd = libc::eventfd(0, libc::EFD_NONBLOCK);
        assert!(fd >= 0);
        OwnedFd::from_raw_fd(fd)
    };
    b.partition.register_doorbell(partition::Gpa(0xe000_0040), event.as_fd()).unwrap();
    b.code(CODE, |a| {
        // The first write caches the permission; the second must be seen again after the record was taken.
        for round in 0..2u32 {
            a.mov(rbx, 0x30_0000u64).unwrap();
            a.mov(dword_ptr(rbx), 1).unwrap();
            a.mov(rbx, 0x30_5000u64 + u64::from(round) * 0x1000).unwrap();
            a.mov(dword_ptr(rbx), 1).unwrap();
            a.mov(rbx, 0xe000_0040u64).unwrap();
            a.mov(dword_ptr(rbx), 7).unwrap();
            a.mov(word_ptr(rbx), 7).unwrap();
            log(a, round);
        }
        done(a, 1);
    });
    b.start_at(CODE);
    b.partition.track_dirty(true).unwrap();
    b.clock.start();
    b.board.kick_at.store(1, Ordering::SeqCst);
    let board = b.board.clone();
    assert_eq!(b.vps[0].run(&*board).unwrap(), partition::RunExit::Kicked);
    b.memory.write(partition::Gpa(0x30_2000), &[1]).unwrap();
    assert_eq!(b.partition.take_dirty(partition::Gpa(0x30_0000), 16).unwrap().bits, [0b10_0101]);
    b.run(LIMIT);
    assert_eq!(b.partition.take_dirty(partition::Gpa(0x30_0000), 16).unwrap().bits, [0b100_0001]);
    let mut count = [0u8; 8];
    std::fs::File::from(event).read_exact(&mut count).unwrap();
    assert_eq!(u64::from_le_bytes(count), 2, "4-byte writes ring");
    let mmio = b.board.mmio.lock().unwrap();
    assert_eq!(*mmio, [(0xe000_0040, 7, true), (0xe000_0040, 7, true)], "others are exits");
}

#[test]
fn kicks_from_many_threads_are_never_lost() {
    let mut b = bench(1);
    b.code(CODE, |a| {
        let mut spin = a.create_label();
        a.set_label(&mut spin).unwrap();
        a.inc(rax).unwrap();
        a.jmp(spin).unwrap();
    });
    b.code(CODE + 0x1000, |a| {
        let mut idle = a.create_label();
        a.set_label(&mut idle).unwrap();
        a.hlt().unwrap();
        a.jmp(idle).unwrap();
    });
    b.clock.start();
    for code in [CODE, CODE + 0x1000] {
        b.start_at(code);
        for _ in 0..500 {
            let partition = b.partition.clone();
            let kicker = std::thread::spawn(move || partition.kick(0));
            // `run` must return once for the kick, whether it came before or after.
            let board = b.board.clone();
            assert_eq!(b.vps[0].run(&*board).unwrap(), partition::RunExit::Kicked);
            kicker.join().unwrap();
        }
    }
}

#[test]
fn interrupts_between_vps_are_not_lost() {
    // Each VP sends the other one interrupt at a time and sleeps until the answer comes: a lost one hangs.
    const ROUNDS: i32 = 3_000;
    let mut b = bench(2);
    for vp in 0..2u64 {
        let vector = 0x50 + vp as u8;
        counting_handler(&b, vector, CODE + 0x1000 + vp * 0x100, vp);
        b.code(CODE + 0x4000 * vp, |a| {
            apic_write(a, 0xf0, 0x1ff);
            apic_write(a, 0x310, (1 - vp as u32) << 24);
            // An interrupt that came before the other APIC was enabled would be dropped, rightly.
            if vp == 0 {
                wait_for(a, 8, 1);
            }
            a.mov(rsi, DATA).unwrap();
            a.mov(dword_ptr(rsi + 64), 1).unwrap();
            a.xor(ecx, ecx).unwrap();
            let (mut next, mut wait, mut there) = (a.create_label(), a.create_label(), a.create_label());
            a.set_label(&mut next).unwrap();
            a.inc(ecx).unwrap();
            if vp == 0 {
                apic_write(a, 0x300, 0x4051);
            }
            a.set_label(&mut wait).unwrap();
            a.cli().unwrap();
            a.cmp(dword_ptr(rsi + 8 * vp as i32), ecx).unwrap();
            a.jae(there).unwrap();
            a.sti().unwrap();
            a.hlt().unwrap();
            a.jmp(wait).unwrap();
            a.set_label(&mut there).unwrap();
            a.sti().unwrap();
            if vp == 1 {
                apic_write(a, 0x300, 0x4050);
            }
            a.cmp(ecx, ROUNDS).unwrap();
            a.jb(next).unwrap();
            if vp == 0 {
                done(a, 1);
            } else {
                a.hlt().unwrap();
            }
        });
    }
    b.start_at(CODE);
    let state = b.long_state(1, CODE + 0x4000);
    b.vps[1].set_state(&state).unwrap();
    assert_eq!(b.run(LIMIT), 1);
}

#[test]
fn guest_idle_ends_without_an_apic_and_below_the_priority() {
    // A starting VP waits for a spinlock by the guest-idle MSR before it has enabled its APIC: the kick is dropped, and
    // the VP must look again by itself. Then: an interrupt that the priority of the one in service holds back.
    let mut b = bench(2);
    b.code(CODE + 0x1100, |a| {
        // In service until the other VP's 0xf7 has ended the idle state.
        let mut wait = a.create_label();
        a.mov(rsi, DATA).unwrap();
        a.mov(dword_ptr(rsi + 16), 1).unwrap();
        a.set_label(&mut wait).unwrap();
        a.mov(ecx, 0x4000_00f0u32).unwrap();
        a.rdmsr().unwrap();
        a.cmp(dword_ptr(rsi + 24), 0).unwrap();
        a.je(wait).unwrap();
        apic_write(a, 0xb0, 0);
        done(a, 3);
    });
    b.gate(0xf4, CODE + 0x1100);
    b.code(CODE, |a| {
        let mut wait = a.create_label();
        a.mov(rsi, DATA).unwrap();
        a.cli().unwrap();
        a.mov(dword_ptr(rsi), 1).unwrap();
        a.set_label(&mut wait).unwrap();
        a.mov(ecx, 0x4000_00f0u32).unwrap();
        a.rdmsr().unwrap();
        a.cmp(dword_ptr(rsi + 8), 0).unwrap();
        a.je(wait).unwrap();
        log(a, 1);
        apic_write(a, 0xf0, 0x1ff);
        apic_write(a, 0x300, 0x4_40f4);
        a.sti().unwrap();
        a.hlt().unwrap();
    });
    // The other VP gives each wait time to fall asleep, then kicks it as Linux does: by an interrupt.
    b.code(CODE + 0x4000, |a| {
        apic_write(a, 0xf0, 0x1ff);
        for (ready, flag, vector) in [(0, 8, 0xf7u32), (2, 24, 0xf7)] {
            wait_for(a, ready, 1);
            let mut spin = a.create_label();
            a.mov(ecx, 20_000_000u32).unwrap();
            a.set_label(&mut spin).unwrap();
            a.dec(ecx).unwrap();
            a.jnz(spin).unwrap();
            a.mov(rsi, DATA).unwrap();
            a.mov(dword_ptr(rsi + flag), 1).unwrap();
            apic_write(a, 0x310, 0);
            apic_write(a, 0x300, 0x4000 | vector);
        }
        a.hlt().unwrap();
    });
    b.start_at(CODE);
    let state = b.long_state(1, CODE + 0x4000);
    b.vps[1].set_state(&state).unwrap();
    assert_eq!(b.run(LIMIT), 3);
    assert_eq!(b.log(), [1]);
}
