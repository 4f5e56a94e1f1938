//! Direct execution: a guest with a kernel and a user program, executed in a process wherever that is possible, and the same
//! guest by the translator alone. What the guest says, and its memory, must be the same.
#![allow(missing_docs)]

mod common;

use common::*;
use iced_x86::code_asm::*;
use partition::{DirectMode, EngineOptions, Gpa, GuestMemory, VpState};
use std::time::Duration;
use viridian_engine_soft::partition_impl::SoftEngine;
use x86::paging::{P, RW, US};
use x86::regs::{cr4, rflags, xcr0};

const LIMIT: Duration = Duration::from_secs(60);
/// The user program.
const USER: u64 = 0x20_0000;
const USER_STACK: u64 = 0x38_0000;
/// Pages with page tables of 4 KiB pages: 1 GiB up, the first 64 pages there to RAM from 8 MiB on.
const SMALL: u64 = 0x4000_0000;
const SMALL_TABLE: u64 = 0x7_0000;
const SMALL_RAM: u64 = 0x80_0000;
/// System calls: number in RDI.
const LOG: u64 = 1;
const END: u64 = 2;
const REMAP: u64 = 3;
const PROTECT: u64 = 4;
const WATCH: u64 = 5;

/// A bench whose VP has been prepared, so that processes can be made.
fn bench(direct: DirectMode) -> Bench {
    let memory = GuestMemory::with_ram(RAM, 0xc000_0000..1 << 32, true).unwrap();
    let options = EngineOptions { direct, ..EngineOptions::default() };
    Bench::with_options(&SoftEngine::new(), "host", 1, memory, options)
}

/// Kernel: system calls, page faults (a page of the small ones becomes present and writable), #DE, #UD and #GP (logged with
/// the instruction skipped), a timer.
fn kernel(b: &Bench) {
    let user = [0x00cf_f300_0000_ffffu64, 0x00af_fb00_0000_ffff];
    // User data at 0x28, user code at 0x30: what Linux has.
    for (i, d) in user.into_iter().enumerate() {
        b.memory.write_plain(Gpa(GDT + 0x28 + 8 * i as u64), &d).unwrap();
    }
    // 32-bit user code at 0x20.
    b.memory.write_plain(Gpa(GDT + 0x20), &0x00cf_fb00_0000_ffffu64).unwrap();
    // TSS at 0x38, with RSP0.
    let tss = 0x7_8000u64;
    b.memory
        .write_plain(Gpa(GDT + 0x38), &(0x67 | (tss & 0xff_ffff) << 16 | 0x89 << 40 | (tss >> 24 & 0xff) << 56))
        .unwrap();
    b.memory.write_plain(Gpa(GDT + 0x40), &(tss >> 32)).unwrap();
    b.memory.write_plain(Gpa(tss + 4), &(STACKS + 0x1000)).unwrap();
    // The small pages.
    b.memory.write_plain(Gpa(PD + 0x1000), &(SMALL_TABLE | P | RW | US)).unwrap();
    for n in 0..512u64 {
        b.memory.write_plain(Gpa(SMALL_TABLE + 8 * n), &((SMALL_RAM + n % 64 * 0x1000) | US)).unwrap();
    }
    let handler = CODE + 0x1000;
    b.code(handler, |a| {
        let [mut log, mut end, mut remap, mut protect, mut watch, mut out] = std::array::from_fn(|_| a.create_label());
        a.mov(rax, STACKS + 0x1000).unwrap();
        a.xchg(rax, rsp).unwrap();
        a.push(rax).unwrap();
        a.push(rcx).unwrap();
        a.push(r11).unwrap();
        for (number, label) in [(LOG, log), (END, end), (REMAP, remap), (PROTECT, protect), (WATCH, watch)] {
            a.cmp(rdi, number as i32).unwrap();
            a.je(label).unwrap();
        }
        a.ud2().unwrap();
        a.set_label(&mut log).unwrap();
        a.mov(eax, esi).unwrap();
        a.mov(dx, u32::from(PORT_LOG)).unwrap();
        a.out(dx, eax).unwrap();
        a.jmp(out).unwrap();
        a.set_label(&mut end).unwrap();
        a.mov(eax, esi).unwrap();
        a.mov(dx, u32::from(PORT_DONE)).unwrap();
        a.out(dx, eax).unwrap();
        a.set_label(&mut remap).unwrap();
        // Page RSI of the small ones is RAM page RDX from now on.
        a.mov(rax, rdx).unwrap();
        a.shl(rax, 12).unwrap();
        a.add(rax, (SMALL_RAM | P | RW | US | 0x60) as i32).unwrap();
        a.mov(rdx, SMALL_TABLE).unwrap();
        a.mov(qword_ptr(rdx + rsi * 8), rax).unwrap();
        a.shl(rsi, 12).unwrap();
        a.mov(rax, SMALL).unwrap();
        a.add(rsi, rax).unwrap();
        a.invlpg(byte_ptr(rsi)).unwrap();
        a.jmp(out).unwrap();
        a.set_label(&mut protect).unwrap();
        // Page RSI of the small ones is not there any more.
        a.mov(rdx, SMALL_TABLE).unwrap();
        a.and(qword_ptr(rdx + rsi * 8), !1i32).unwrap();
        a.mov(rax, cr3).unwrap();
        a.mov(cr3, rax).unwrap();
        a.jmp(out).unwrap();
        a.set_label(&mut watch).unwrap();
        // Breakpoint 0 is at RSI, and DR7 is RDX.
        a.mov(dr0, rsi).unwrap();
        a.mov(dr7, rdx).unwrap();
        a.set_label(&mut out).unwrap();
        a.pop(r11).unwrap();
        a.pop(rcx).unwrap();
        a.pop(rsp).unwrap();
        a.sysretq().unwrap();
    });
    // #PF: the page is there from now on. Its number goes to the count at DATA.
    b.code(CODE + 0x2000, |a| {
        a.push(rax).unwrap();
        a.push(rdx).unwrap();
        a.mov(rdx, DATA).unwrap();
        a.inc(qword_ptr(rdx)).unwrap();
        a.mov(rax, cr2).unwrap();
        a.mov(rdx, SMALL).unwrap();
        a.sub(rax, rdx).unwrap();
        a.shr(rax, 12).unwrap();
        a.mov(rdx, SMALL_TABLE).unwrap();
        a.or(qword_ptr(rdx + rax * 8), (P | RW | US) as i32).unwrap();
        a.pop(rdx).unwrap();
        a.pop(rax).unwrap();
        a.add(rsp, 8).unwrap();
        a.iretq().unwrap();
    });
    b.gate(14, CODE + 0x2000);
    // #DE and #UD: two bytes are skipped; the vector and the flags that were pushed are logged.
    for (vector, at) in [(0u8, CODE + 0x3000), (6, CODE + 0x3100)] {
        b.code(at, |a| {
            a.push(rax).unwrap();
            a.push(rdx).unwrap();
            a.mov(eax, dword_ptr(rsp + 32)).unwrap();
            a.shl(eax, 8).unwrap();
            a.or(eax, i32::from(vector)).unwrap();
            a.mov(dx, u32::from(PORT_LOG)).unwrap();
            a.out(dx, eax).unwrap();
            a.add(qword_ptr(rsp + 16), 2).unwrap();
            a.pop(rdx).unwrap();
            a.pop(rax).unwrap();
            a.iretq().unwrap();
        });
        b.gate(vector, at);
    }
    // #DB: which one it was, and the second byte of the address behind it, are logged.
    b.code(CODE + 0x3200, |a| {
        a.push(rax).unwrap();
        a.push(rdx).unwrap();
        a.mov(rax, dr6).unwrap();
        a.mov(edx, dword_ptr(rsp + 16)).unwrap();
        a.shl(edx, 16).unwrap();
        a.and(eax, 0xffff).unwrap();
        a.or(eax, edx).unwrap();
        a.mov(dx, u32::from(PORT_LOG)).unwrap();
        a.out(dx, eax).unwrap();
        a.mov(eax, 0xffff_0ff0u32).unwrap();
        a.mov(dr6, rax).unwrap();
        a.pop(rdx).unwrap();
        a.pop(rax).unwrap();
        a.iretq().unwrap();
    });
    b.gate(1, CODE + 0x3200);
    // The timer counts at DATA + 8.
    b.code(CODE + 0x4000, |a| {
        a.push(rax).unwrap();
        a.mov(rax, DATA).unwrap();
        a.inc(qword_ptr(rax + 8)).unwrap();
        a.mov(rax, 0xfee0_00b0u64).unwrap();
        a.mov(dword_ptr(rax), 0).unwrap();
        a.pop(rax).unwrap();
        a.iretq().unwrap();
    });
    b.gate(0x40, CODE + 0x4000);
    b.code(CODE, |a| {
        a.mov(ax, 0x38u32).unwrap();
        a.ltr(ax).unwrap();
        a.xor(ecx, ecx).unwrap();
        a.mov(eax, (xcr0::X87 | xcr0::SSE | xcr0::AVX) as u32).unwrap();
        a.xor(edx, edx).unwrap();
        a.xsetbv().unwrap();
        for (msr, value) in [(0xc000_0082u32, handler), (0xc000_0081, 0x0023_0008 << 32), (0xc000_0084, 0x4_7700)] {
            a.mov(ecx, msr).unwrap();
            a.mov(eax, value as u32).unwrap();
            a.mov(edx, (value >> 32) as u32).unwrap();
            a.wrmsr().unwrap();
        }
        // The APIC's timer, periodic.
        for (register, value) in [(0xf0u64, 0x1ffu32), (0x320, 0x2_0040), (0x3e0, 0xb), (0x380, 300_000)] {
            a.mov(rbx, 0xfee0_0000 + register).unwrap();
            a.mov(dword_ptr(rbx), value).unwrap();
        }
        a.xor(eax, eax).unwrap();
        a.mov(ds, ax).unwrap();
        a.mov(es, ax).unwrap();
        a.mov(fs, ax).unwrap();
        a.mov(gs, ax).unwrap();
        for value in [0x2b, USER_STACK, rflags::FIXED | rflags::IF, 0x33, USER] {
            a.mov(rax, value).unwrap();
            a.push(rax).unwrap();
        }
        a.iretq().unwrap();
    });
}

fn call(a: &mut CodeAssembler, number: u64, argument: impl FnOnce(&mut CodeAssembler)) {
    argument(a);
    a.mov(edi, number as u32).unwrap();
    a.syscall().unwrap();
}

/// Runs a user program; gives the log, the final value, the small pages' RAM and the number of direct executions.
fn run(direct: DirectMode, program: impl FnOnce(&mut CodeAssembler)) -> (Vec<u32>, u32, Vec<u8>, u64) {
    let mut b = bench(direct);
    kernel(&b);
    b.code(USER, program);
    let mut state: VpState = b.long_state(0, CODE);
    state.cr4 |= cr4::OSXSAVE | cr4::FSGSBASE;
    state.gdtr.limit = 0x47;
    b.vps[0].set_state(&state).unwrap();
    let value = b.run_prepared(LIMIT);
    let mut ram = vec![0; 64 * 0x1000];
    b.memory.read(Gpa(SMALL_RAM), &mut ram).unwrap();
    let runs = b.partition.stats().counters.iter().find(|(n, _)| *n == "direct executions").map_or(0, |(_, v)| *v);
    (b.log(), value, ram, runs)
}

/// Both ways, compared.
fn compare(program: impl Fn(&mut CodeAssembler) + Copy) -> (Vec<u32>, u32) {
    let by_translator = run(DirectMode::Off, program);
    assert_eq!(by_translator.3, 0);
    let directly = run(DirectMode::Always, program);
    assert!(directly.3 > 0, "nothing was executed directly");
    assert_eq!(directly.0, by_translator.0);
    assert_eq!(directly.1, by_translator.1);
    assert!(directly.2 == by_translator.2, "the memory differs");
    (directly.0, directly.1)
}

#[test]
fn registers_memory_and_calls() {
    let (log, _) = compare(|a| {
        let mut round = a.create_label();
        a.mov(r12d, 40u32).unwrap();
        a.mov(rbx, SMALL).unwrap();
        a.mov(r15, 0x1234_5678_9abc_def0u64).unwrap();
        a.pxor(xmm3, xmm3).unwrap();
        a.fldpi().unwrap();
        a.set_label(&mut round).unwrap();
        // Every page of the small ones, by and by: 40 faults.
        a.imul_3(r15, r15, 0x343fd).unwrap();
        a.add(r15, 0x26_9ec3).unwrap();
        a.mov(qword_ptr(rbx + 8), r15).unwrap();
        a.movq(xmm0, r15).unwrap();
        a.vpbroadcastq(ymm1, xmm0).unwrap();
        a.vpaddq(ymm3, ymm3, ymm1).unwrap();
        a.vmovdqu(ymmword_ptr(rbx + 32), ymm3).unwrap();
        a.fld1().unwrap();
        a.fadd_2(st1, st0).unwrap();
        a.fstp(st0).unwrap();
        a.fst(qword_ptr(rbx + 64)).unwrap();
        a.lock().xadd(qword_ptr(rbx + 16), r15).unwrap();
        // A system call with everything alive.
        call(a, LOG, |a| {
            a.mov(rsi, r15).unwrap();
            a.xor(esi, dword_ptr(rbx + 32)).unwrap();
        });
        a.add(rbx, 0x1000).unwrap();
        a.dec(r12d).unwrap();
        a.jnz(round).unwrap();
        // Copies across pages, by strings.
        a.mov(rsi, SMALL).unwrap();
        a.mov(rdi, SMALL + 41 * 0x1000 + 5).unwrap();
        a.mov(ecx, 0x2345).unwrap();
        a.rep().movsb().unwrap();
        a.pushfq().unwrap();
        a.pop(rsi).unwrap();
        call(a, LOG, |_| {});
        call(a, END, |a| {
            a.vmovq(rsi, xmm3).unwrap();
        });
    });
    assert_eq!(log.len(), 41);
}

#[test]
fn pages_that_move_and_go_are_seen() {
    compare(|a| {
        let mut round = a.create_label();
        a.xor(r12d, r12d).unwrap();
        a.xor(r13d, r13d).unwrap();
        a.mov(rbx, SMALL).unwrap();
        a.set_label(&mut round).unwrap();
        a.inc(qword_ptr(rbx)).unwrap();
        a.add(r13, qword_ptr(rbx)).unwrap();
        a.imul_3(r13, r13, 7).unwrap();
        // The page at the same address becomes another one...
        a.mov(edx, r12d).unwrap();
        a.and(edx, 7).unwrap();
        call(a, REMAP, |a| {
            a.xor(esi, esi).unwrap();
        });
        a.inc(qword_ptr(rbx)).unwrap();
        a.add(r13, qword_ptr(rbx)).unwrap();
        // ... or is not there: the next access faults, and it comes back.
        call(a, PROTECT, |a| {
            a.xor(esi, esi).unwrap();
        });
        a.inc(r12d).unwrap();
        a.cmp(r12d, 100).unwrap();
        a.jb(round).unwrap();
        call(a, END, |a| {
            a.mov(esi, r13d).unwrap();
        });
    });
}

#[test]
fn code_that_changes_and_exceptions() {
    compare(|a| {
        let mut round = a.create_label();
        // A function in a small page: MOV EAX, n; RET.
        a.mov(rbx, SMALL + 3 * 0x1000).unwrap();
        a.mov(byte_ptr(rbx), 0xb8).unwrap();
        a.mov(byte_ptr(rbx + 5), 0xc3).unwrap();
        a.xor(r13d, r13d).unwrap();
        a.mov(r12d, 50u32).unwrap();
        a.set_label(&mut round).unwrap();
        a.mov(dword_ptr(rbx + 1), r12d).unwrap();
        a.call(rbx).unwrap();
        a.add(r13d, eax).unwrap();
        a.call(rbx).unwrap();
        a.add(r13d, eax).unwrap();
        a.imul_3(r13d, r13d, 3).unwrap();
        // #DE with flags that are known; DIV ECX has two bytes, as UD2.
        a.xor(ecx, ecx).unwrap();
        a.xor(edx, edx).unwrap();
        a.mov(eax, 5u32).unwrap();
        a.cmp(eax, r12d).unwrap();
        a.div(ecx).unwrap();
        a.cmp(r12d, eax).unwrap();
        a.ud2().unwrap();
        a.dec(r12d).unwrap();
        a.jnz(round).unwrap();
        call(a, END, |a| {
            a.mov(esi, r13d).unwrap();
        });
    });
}

#[test]
fn the_processor_is_the_guests() {
    // CPUID, XGETBV and the time come from the guest's processor, and the selectors are its own.
    let (log, _) = compare(|a| {
        let mut round = a.create_label();
        a.mov(r12d, 20u32).unwrap();
        a.set_label(&mut round).unwrap();
        for leaf in [1u32, 7, 0x4000_0000] {
            a.mov(eax, leaf).unwrap();
            a.xor(ecx, ecx).unwrap();
            a.cpuid().unwrap();
            a.xor(esi, esi).unwrap();
            a.add(esi, ebx).unwrap();
            a.xor(esi, ecx).unwrap();
            call(a, LOG, |_| {});
        }
        a.xor(ecx, ecx).unwrap();
        a.xgetbv().unwrap();
        call(a, LOG, |a| {
            a.mov(esi, eax).unwrap();
        });
        a.mov(esi, cs).unwrap();
        call(a, LOG, |_| {});
        a.rdtsc().unwrap();
        a.shl(rdx, 32).unwrap();
        a.or(rax, rdx).unwrap();
        a.mov(r14, rax).unwrap();
        a.rdtsc().unwrap();
        a.shl(rdx, 32).unwrap();
        a.or(rax, rdx).unwrap();
        a.sub(rax, r14).unwrap();
        a.shr(rax, 40).unwrap();
        call(a, LOG, |a| {
            a.mov(esi, eax).unwrap();
        });
        a.dec(r12d).unwrap();
        a.jnz(round).unwrap();
        // Pages without any of those, often enough that they are executed directly: 64 times CALL RBP (which returns) and
        // INC EAX; then MOV ESI, CS and RET.
        a.mov(rbp, SMALL + 4 * 0x1000).unwrap();
        a.mov(byte_ptr(rbp), 0xc3).unwrap();
        a.mov(rbx, SMALL + 3 * 0x1000).unwrap();
        let bytes = [0x41, 0xbd, 64, 0, 0, 0, 0xff, 0xd5, 0xff, 0xc0, 0x41, 0xff, 0xcd, 0x75, 0xf7, 0x8c, 0xce, 0xc3];
        for (n, byte) in bytes.into_iter().enumerate() {
            a.mov(byte_ptr(rbx + n as i32), byte).unwrap();
        }
        a.xor(eax, eax).unwrap();
        a.call(rbx).unwrap();
        a.mov(r13d, eax).unwrap();
        call(a, LOG, |_| {});
        call(a, END, |a| {
            a.mov(esi, r13d).unwrap();
        });
    });
    assert!(log.iter().all(|v| *v != 0xffff_ffff));
    assert_eq!((log[3], log[4], log[5], log.last()), (7, 0x33, 0, Some(&0x33)));
}

#[test]
fn breakpoints_and_rare_flags() {
    let (log, _) = compare(|a| {
        let [mut round, mut no_watch, mut no_end] = std::array::from_fn(|_| a.create_label());
        a.xor(r12d, r12d).unwrap();
        a.mov(rbx, SMALL + 2 * 0x1000).unwrap();
        a.set_label(&mut round).unwrap();
        // From the sixth round on to the fifteenth writes of eight bytes at RBX + 8 are watched.
        a.cmp(r12d, 5).unwrap();
        a.jne(no_watch).unwrap();
        call(a, WATCH, |a| {
            a.lea(rsi, ptr(rbx + 8)).unwrap();
            a.mov(edx, 1u32 | 1 << 16 | 2 << 18).unwrap();
        });
        a.set_label(&mut no_watch).unwrap();
        a.cmp(r12d, 15).unwrap();
        a.jne(no_end).unwrap();
        call(a, WATCH, |a| {
            a.xor(esi, esi).unwrap();
            a.xor(edx, edx).unwrap();
        });
        a.set_label(&mut no_end).unwrap();
        a.mov(qword_ptr(rbx), r12).unwrap();
        a.add(dword_ptr(rbx + 12), 3).unwrap();
        a.mov(rax, qword_ptr(rbx + 8)).unwrap();
        a.mov(qword_ptr(rbx + 0x1000), rax).unwrap();
        a.inc(r12d).unwrap();
        a.cmp(r12d, 20).unwrap();
        a.jb(round).unwrap();
        // NT and ID, over faults and calls, set and cleared.
        for flags in [1 << 14, 1 << 21, 1 << 14 | 1 << 21, 0] {
            a.pushfq().unwrap();
            a.and(dword_ptr(rsp), !(1 << 14 | 1 << 21)).unwrap();
            a.or(dword_ptr(rsp), flags).unwrap();
            a.popfq().unwrap();
            for page in 0..3 {
                call(a, PROTECT, |a| {
                    a.mov(esi, 8u32 + page).unwrap();
                });
                a.mov(dword_ptr(rbx + 6 * 0x1000 + page as i32 * 0x1000), r12d).unwrap();
                a.pushfq().unwrap();
                a.pop(rsi).unwrap();
                call(a, LOG, |_| {});
            }
        }
        call(a, END, |a| {
            a.mov(esi, dword_ptr(rbx + 12)).unwrap();
        });
    });
    assert_eq!(log.iter().filter(|v| **v & 0xffff == 0xff1).count(), 10, "{log:x?}");
    assert_eq!(log.iter().rev().take(12).filter(|v| **v & (1 << 14) != 0).count(), 6, "{log:x?}");
    assert_eq!(log.iter().rev().take(12).filter(|v| **v & (1 << 21) != 0).count(), 6, "{log:x?}");
}

#[test]
fn thirty_two_bit_code_is_entered_and_left() {
    compare(|a| {
        let mut round = a.create_label();
        let (code, back) = (SMALL + 5 * 0x1000, SMALL + 6 * 0x1000);
        // Far code that comes back: MOV ECX, [page that faults]; INC EAX; DEC EAX; INC EAX (one byte each); JMP 33:back.
        a.mov(rbx, code).unwrap();
        let page = (SMALL + 7 * 0x1000) as u32;
        let mut bytes = vec![0x8b, 0x0d];
        bytes.extend_from_slice(&page.to_le_bytes());
        bytes.extend_from_slice(&[0x40, 0x48, 0x40, 0xea]);
        bytes.extend_from_slice(&(back as u32).to_le_bytes());
        bytes.extend_from_slice(&[0x33, 0x00]);
        for (n, byte) in bytes.into_iter().enumerate() {
            a.mov(byte_ptr(rbx + n as i32), i32::from(byte)).unwrap();
        }
        a.mov(rbx, back).unwrap();
        // RET, through the address that was pushed.
        a.mov(byte_ptr(rbx), 0xc3).unwrap();
        a.xor(eax, eax).unwrap();
        a.mov(r12d, 30u32).unwrap();
        a.set_label(&mut round).unwrap();
        let mut next = a.create_label();
        a.lea(rdx, ptr(next)).unwrap();
        a.push(rdx).unwrap();
        a.push(0x23).unwrap();
        a.mov(rdx, code).unwrap();
        a.push(rdx).unwrap();
        a.db(&[0x48, 0xcb]).unwrap(); // RETFQ
        a.set_label(&mut next).unwrap();
        a.mov(r13d, eax).unwrap();
        call(a, PROTECT, |a| {
            a.mov(esi, 7u32).unwrap();
        });
        a.mov(eax, r13d).unwrap();
        a.dec(r12d).unwrap();
        a.jnz(round).unwrap();
        call(a, END, |a| {
            a.mov(esi, r13d).unwrap();
        });
    });
}

#[test]
fn an_endless_loop_is_interrupted() {
    // User code that does nothing of itself sees what the timer's handler has counted.
    let (_, value, _, runs) = run(DirectMode::Always, |a| {
        let mut spin = a.create_label();
        a.mov(rbx, DATA).unwrap();
        a.set_label(&mut spin).unwrap();
        a.mov(rsi, qword_ptr(rbx + 8)).unwrap();
        a.cmp(rsi, 20).unwrap();
        a.jb(spin).unwrap();
        a.mov(esi, 77u32).unwrap();
        a.mov(edi, END as u32).unwrap();
        a.syscall().unwrap();
    });
    assert_eq!(value, 77);
    assert!(runs >= 10, "{runs} runs");
}
