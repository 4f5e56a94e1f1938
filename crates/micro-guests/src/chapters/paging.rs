//! Paging: rights, error codes, accessed and dirty bits, page-crossing accesses, invalidation, the older formats.

use super::{MicroGuest, finish, report, resume_at};
use crate::layout::{DATA, Mode, RESUME, TABLES, USER, USER_GPA, USER_PT, USER_STACK, sel};
use crate::{DEVICE, DeviceAccess, Guest, fault};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use partition::Engine;
use x86::cpuid::bits;
use x86::paging::{A, D, NX};
use x86::regs::{cr0, cr4};

/// The chapter.
pub const ALL: &[(&str, MicroGuest)] = &[
    ("paging: faults of the supervisor", supervisor_faults),
    ("paging: faults of the user", user_faults),
    ("paging: WP decides about supervisor writes", write_protect),
    ("paging: accessed and dirty bits", accessed_dirty),
    ("paging: a crossing write touches nothing if the second page faults", crossing),
    ("paging: INVLPG and CR3 drop translations", invalidation),
    ("paging: SMAP and SMEP", smap_smep),
    ("paging: PAE", pae),
    ("paging: 32-bit with 4 MiB pages", pse),
    ("paging: devices see aligned pieces", device_pieces),
    ("paging: PCIDs keep address spaces apart", pcid),
];

/// Faults on purpose: sets the resume address, runs one instruction, and goes on behind it.
fn faulting(
    a: &mut CodeAssembler,
    act: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Result<(), IcedError> {
    let mut after = a.create_label();
    resume_at(a, after)?;
    act(a)?;
    a.set_label(&mut after)?;
    a.nop()
}

const fn pte(n: u64) -> u64 {
    USER_PT + 8 * n
}

const fn page(n: u64) -> u64 {
    USER + 0x1000 * n
}

fn supervisor_faults(engine: &dyn Engine) {
    let g = Guest::new(Mode::Long);
    let gpa = |n: u64| USER_GPA + 0x1000 * n;
    g.put_u64(pte(1), 0);
    g.put_u64(pte(2), gpa(2) | 1);
    g.put_u64(pte(3), gpa(3) | 3 | NX);
    g.put_u64(pte(4), gpa(4) | 3 | 1 << 51);
    g.code(64, |a| {
        a.mov(rbx, page(1))?;
        faulting(a, |a| a.mov(eax, dword_ptr(rbx + 8)))?;
        faulting(a, |a| a.mov(dword_ptr(rbx + 12), eax))?;
        a.mov(rbx, page(2))?;
        faulting(a, |a| a.mov(byte_ptr(rbx), al))?;
        faulting(a, |a| a.lock().inc(dword_ptr(rbx)))?;
        a.mov(rbx, page(3))?;
        faulting(a, |a| a.jmp(rbx))?;
        a.mov(rbx, page(4))?;
        faulting(a, |a| a.mov(eax, dword_ptr(rbx)))?;
        // Not canonical: #GP, or #SS through RSP.
        a.mov(rbx, 0x8000_0000_0000u64)?;
        faulting(a, |a| a.mov(eax, dword_ptr(rbx)))?;
        a.mov(rbp, rbx)?;
        faulting(a, |a| a.mov(eax, dword_ptr(rbp)))?;
        finish(a)
    });
    let mut expected = Vec::new();
    expected.extend(fault(14, 0, page(1) + 8));
    expected.extend(fault(14, 2, page(1) + 12));
    expected.extend(fault(14, 3, page(2)));
    expected.extend(fault(14, 3, page(2)));
    expected.extend(fault(14, 0x11, page(3)));
    expected.extend(fault(14, 9, page(4)));
    expected.extend(fault(13, 0, page(4)));
    expected.extend(fault(12, 0, page(4)));
    g.run(engine).expect("supervisor faults", &expected);
}

/// Goes to ring 3 at `USER`, with the code that `write` puts there.
fn in_user_mode(g: &Guest, write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) {
    g.assemble_at(USER_GPA, USER, 64, write);
    g.code(64, |a| {
        a.push(i32::from(sel::USER_DATA))?;
        a.mov(rax, USER_STACK)?;
        a.push(rax)?;
        a.push(0x3002)?;
        a.push(i32::from(sel::USER_CODE64))?;
        a.mov(rax, USER)?;
        a.push(rax)?;
        a.iretq()
    });
}

/// As [`faulting`], in user mode: RESUME is a supervisor page there, so the handler's address cell is in a user page.
fn user_faulting(
    a: &mut CodeAssembler,
    act: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Result<(), IcedError> {
    let mut after = a.create_label();
    a.lea(rax, ptr(after))?;
    a.mov(rcx, page(100))?;
    a.mov(qword_ptr(rcx), rax)?;
    act(a)?;
    a.set_label(&mut after)?;
    a.nop()
}

fn user_faults(engine: &dyn Engine) {
    let g = Guest::new(Mode::Long);
    let gpa = |n: u64| USER_GPA + 0x1000 * n;
    // The user's page 100 is the page of the RESUME cell.
    g.put_u64(pte(100), (RESUME & !0xfff) | 7);
    g.put_u64(pte(1), 0);
    g.put_u64(pte(2), gpa(2) | 5);
    g.put_u64(pte(3), gpa(3) | 3);
    g.put_u64(pte(4), gpa(4) | 7 | NX);
    in_user_mode(&g, |a| {
        for n in 1..4 {
            a.mov(rbx, page(n))?;
            user_faulting(a, |a| a.mov(edx, dword_ptr(rbx)))?;
            user_faulting(a, |a| a.mov(dword_ptr(rbx + 4), edx))?;
        }
        a.mov(rbx, page(4))?;
        user_faulting(a, |a| a.jmp(rbx))?;
        user_faulting(a, |a| a.hlt())?;
        user_faulting(a, |a| a.int(0x30))?;
        user_faulting(a, |a| a.int3())?;
        finish(a)
    });
    let mut expected = Vec::new();
    expected.extend(fault(14, 4, page(1)));
    expected.extend(fault(14, 6, page(1) + 4));
    expected.extend(fault(14, 7, page(2) + 4));
    expected.extend(fault(14, 5, page(3)));
    expected.extend(fault(14, 7, page(3) + 4));
    expected.extend(fault(14, 0x15, page(4)));
    expected.extend(fault(13, 0, page(4)));
    // Gate 0x30 is not for ring 3: the error code names the gate.
    expected.extend(fault(13, 0x30 * 8 + 2, page(4)));
    expected.extend(fault(3, 0, page(4)));
    g.run(engine).expect("user faults", &expected);
}

fn write_protect(engine: &dyn Engine) {
    let g = Guest::new(Mode::Long);
    g.put_u64(pte(1), (USER_GPA + 0x1000) | 1);
    g.code(64, |a| {
        a.mov(rbx, page(1))?;
        a.mov(rcx, cr0)?;
        a.and(rcx, !(cr0::WP as i32))?;
        a.mov(cr0, rcx)?;
        faulting(a, |a| a.mov(dword_ptr(rbx), 0x55))?;
        a.mov(eax, dword_ptr(rbx))?;
        report(a)?;
        a.or(rcx, cr0::WP as i32)?;
        a.mov(cr0, rcx)?;
        faulting(a, |a| a.mov(dword_ptr(rbx), 0x66))?;
        a.mov(eax, dword_ptr(rbx))?;
        report(a)?;
        finish(a)
    });
    let mut expected = vec![0x55];
    expected.extend(fault(14, 3, page(1)));
    expected.push(0x55);
    g.run(engine).expect("WP", &expected);
}

fn accessed_dirty(engine: &dyn Engine) {
    let g = Guest::new(Mode::Long);
    g.code(64, |a| {
        a.mov(rbx, page(5))?;
        a.mov(rsi, pte(5))?;
        for write in [false, false, true] {
            if write {
                a.mov(dword_ptr(rbx), 1)?;
            }
            a.mov(eax, dword_ptr(rsi))?;
            a.and(eax, (A | D) as i32)?;
            report(a)?;
            a.mov(ecx, dword_ptr(rbx))?;
        }
        // The tables above the leaf: A only.
        for table in [TABLES + 8, TABLES + 0x6000, TABLES + 0x7000] {
            a.mov(rsi, table)?;
            a.mov(eax, dword_ptr(rsi))?;
            a.and(eax, (A | D) as i32)?;
            report(a)?;
        }
        // A fault sets no D.
        a.mov(rsi, pte(6))?;
        a.and(dword_ptr(rsi), !2)?;
        a.mov(rbx, page(6))?;
        faulting(a, |a| a.mov(dword_ptr(rbx), eax))?;
        a.mov(eax, dword_ptr(rsi))?;
        a.and(eax, D as i32)?;
        report(a)?;
        finish(a)
    });
    let (accessed, dirty) = (A as u32, D as u32);
    let mut expected = vec![0, accessed, accessed | dirty, accessed, accessed, accessed];
    expected.extend(fault(14, 3, page(6)));
    expected.push(0);
    g.run(engine).expect("A and D", &expected);
}

fn crossing(engine: &dyn Engine) {
    let g = Guest::new(Mode::Long);
    // Linear pages 1 and 2 are not neighbours in physical memory.
    g.put_u64(pte(1), (USER_GPA + 0x9000) | 3);
    g.put_u64(pte(2), (USER_GPA + 0x4000) | 3);
    g.put_u64(pte(3), 0);
    g.code(64, |a| {
        a.mov(rbx, page(2) - 4)?;
        a.mov(rax, 0x1122_3344_5566_7788u64)?;
        a.mov(qword_ptr(rbx), rax)?;
        a.mov(eax, dword_ptr(rbx + 1))?;
        report(a)?;
        a.mov(eax, dword_ptr(USER_GPA as i32 + 0x9ffc))?;
        report(a)?;
        a.mov(eax, dword_ptr(USER_GPA as i32 + 0x4000))?;
        report(a)?;
        a.mov(rbx, page(3) - 2)?;
        faulting(a, |a| a.mov(dword_ptr(rbx), -1))?;
        a.movzx(eax, word_ptr(rbx))?;
        report(a)?;
        // A locked one across the boundary that works.
        a.mov(rbx, page(2) - 2)?;
        a.lock().add(dword_ptr(rbx), 0x1_0001)?;
        a.mov(eax, dword_ptr(rbx))?;
        report(a)?;
        finish(a)
    });
    let mut expected = vec![0x4455_6677, 0x5566_7788, 0x1122_3344];
    expected.extend(fault(14, 2, page(3)));
    expected.push(0);
    expected.push(0x3345_5567);
    g.run(engine).expect("crossing", &expected);
}

fn invalidation(engine: &dyn Engine) {
    let g = Guest::new(Mode::Long);
    for n in 0..4u64 {
        g.put_u32(USER_GPA + 0x1000 * (10 + n), 0x100 + n as u32);
    }
    g.code(64, |a| {
        a.mov(rbx, page(1))?;
        a.mov(rsi, pte(1))?;
        a.mov(qword_ptr(rsi), (USER_GPA + 0xa000) as i32 | 3)?;
        a.mov(eax, dword_ptr(rbx))?;
        report(a)?;
        a.mov(qword_ptr(rsi), (USER_GPA + 0xb000) as i32 | 3)?;
        a.invlpg(ptr(rbx + 0x123))?;
        a.mov(eax, dword_ptr(rbx))?;
        report(a)?;
        a.mov(qword_ptr(rsi), (USER_GPA + 0xc000) as i32 | 3)?;
        a.mov(rax, cr3)?;
        a.mov(cr3, rax)?;
        a.mov(eax, dword_ptr(rbx))?;
        report(a)?;
        // A global page survives CR3 with CR4.PGE (it must be seen after the page table changed), INVLPG drops it.
        a.mov(rax, cr4)?;
        a.or(eax, cr4::PGE as i32)?;
        a.mov(cr4, rax)?;
        a.mov(qword_ptr(rsi), (USER_GPA + 0xd000) as i32 | 0x103)?;
        a.invlpg(ptr(rbx))?;
        a.mov(eax, dword_ptr(rbx))?;
        report(a)?;
        a.mov(qword_ptr(rsi), (USER_GPA + 0xa000) as i32 | 0x103)?;
        a.invlpg(ptr(rbx))?;
        a.mov(eax, dword_ptr(rbx))?;
        report(a)?;
        // One address inside a 2 MiB page invalidates all of it.
        a.mov(rbx, 0x40_0000u64)?;
        a.mov(eax, dword_ptr(rbx + 0x3000))?;
        a.mov(qword_ptr(TABLES as i32 + 0x2000 + 16), (USER_GPA as i32) | 0x83)?;
        a.invlpg(ptr(rbx))?;
        a.mov(eax, dword_ptr(rbx + 0xb000))?;
        report(a)?;
        finish(a)
    });
    g.run(engine).expect("invalidation", &[0x100, 0x101, 0x102, 0x103, 0x100, 0x101]);
}

fn smap_smep(engine: &dyn Engine) {
    let g = Guest::new(Mode::Long);
    if !g.has(&bits::SMAP) || !g.has(&bits::SMEP) {
        return;
    }
    g.code(64, |a| {
        a.mov(rax, cr4)?;
        a.or(eax, (cr4::SMAP | cr4::SMEP) as i32)?;
        a.mov(cr4, rax)?;
        a.mov(rbx, page(1))?;
        faulting(a, |a| a.mov(eax, dword_ptr(rbx)))?;
        faulting(a, |a| a.mov(dword_ptr(rbx), eax))?;
        a.stac()?;
        a.mov(dword_ptr(rbx), 0x77)?;
        a.mov(eax, dword_ptr(rbx))?;
        report(a)?;
        a.clac()?;
        faulting(a, |a| a.mov(eax, dword_ptr(rbx)))?;
        faulting(a, |a| a.jmp(rbx))?;
        finish(a)
    });
    let mut expected = Vec::new();
    expected.extend(fault(14, 1, page(1)));
    expected.extend(fault(14, 3, page(1)));
    expected.push(0x77);
    expected.extend(fault(14, 1, page(1)));
    expected.extend(fault(14, 0x11, page(1)));
    g.run(engine).expect("SMAP and SMEP", &expected);
}

/// 32-bit code: the next fault goes on at a label.
fn faulting32(
    a: &mut CodeAssembler,
    act: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Result<(), IcedError> {
    let mut inner = a.create_label();
    let mut after = a.create_label();
    a.call(inner)?;
    a.jmp(after)?;
    a.set_label(&mut inner)?;
    a.pop(dword_ptr(RESUME as u32))?;
    act(a)?;
    a.set_label(&mut after)?;
    a.nop()
}

fn pae(engine: &dyn Engine) {
    let g = Guest::new(Mode::Protected);
    // PDPT with one page directory of 2 MiB pages; its entry 4 leads to a page table.
    g.put_u64(TABLES, (TABLES + 0x1000) | 1);
    for n in 0..8u64 {
        g.put_u64(TABLES + 0x1000 + 8 * n, n << 21 | 0x83);
    }
    g.put_u64(TABLES + 0x1000 + 8 * 4, (TABLES + 0x2000) | 3);
    g.put_u64(TABLES + 0x2000, DATA | 3);
    g.put_u64(TABLES + 0x2008, DATA | 1);
    g.put_u32(DATA, 0xcafe);
    g.code(32, |a| {
        a.mov(eax, cr4::PAE as i32)?;
        a.mov(cr4, eax)?;
        a.mov(eax, TABLES as i32)?;
        a.mov(cr3, eax)?;
        a.mov(eax, cr0)?;
        a.or(eax, cr0::PG as u32 as i32)?;
        a.mov(cr0, eax)?;
        a.mov(ebx, 0x80_0000)?;
        a.mov(eax, dword_ptr(ebx))?;
        report(a)?;
        faulting32(a, |a| a.mov(dword_ptr(ebx + 0x1004), eax))?;
        faulting32(a, |a| a.mov(eax, dword_ptr(ebx + 0x2000)))?;
        // The second gigabyte has no directory.
        a.mov(ebx, 0x4000_0000)?;
        faulting32(a, |a| a.mov(eax, dword_ptr(ebx)))?;
        // A PDPTE is loaded with CR3, not looked at later.
        a.mov(dword_ptr(TABLES as i32 + 8), (TABLES as i32 + 0x1000) | 1)?;
        faulting32(a, |a| a.mov(eax, dword_ptr(ebx)))?;
        a.mov(eax, cr3)?;
        a.mov(cr3, eax)?;
        a.mov(eax, dword_ptr(ebx + 0x80_0000))?;
        report(a)?;
        // A reserved bit in a PDPTE is #GP when CR3 is loaded.
        a.mov(dword_ptr(TABLES as i32 + 16), (TABLES as i32 + 0x1000) | 3)?;
        a.mov(ecx, TABLES as i32)?;
        faulting32(a, |a| a.mov(cr3, ecx))?;
        finish(a)
    });
    let mut expected = vec![0xcafe];
    expected.extend(fault(14, 3, 0x80_1004));
    expected.extend(fault(14, 0, 0x80_2000));
    expected.extend(fault(14, 0, 0x4000_0000));
    expected.extend(fault(14, 0, 0x4000_0000));
    expected.push(0xcafe);
    expected.extend(fault(13, 0, 0x4000_0000));
    g.run(engine).expect("PAE", &expected);
}

fn pse(engine: &dyn Engine) {
    let g = Guest::new(Mode::Protected);
    g.put_u32(TABLES, 0x83);
    g.put_u32(TABLES + 4, 0x83);
    g.put_u32(TABLES + 8, (TABLES as u32 + 0x1000) | 3);
    g.put_u32(TABLES + 0x1000, DATA as u32 | 3);
    g.put_u32(DATA, 0xbeef);
    // Reserved bit 21 of a 4 MiB entry.
    g.put_u32(TABLES + 12, 0x83 | 1 << 21);
    g.code(32, |a| {
        a.mov(eax, cr4::PSE as i32)?;
        a.mov(cr4, eax)?;
        a.mov(eax, TABLES as i32)?;
        a.mov(cr3, eax)?;
        a.mov(eax, cr0)?;
        a.or(eax, cr0::PG as u32 as i32)?;
        a.mov(cr0, eax)?;
        a.mov(eax, ptr(0x40_0000 + DATA as i32))?;
        report(a)?;
        a.mov(eax, ptr(0x80_0000))?;
        report(a)?;
        a.mov(ebx, 0xc0_0000)?;
        faulting32(a, |a| a.mov(eax, dword_ptr(ebx)))?;
        a.mov(ebx, 0x100_0000)?;
        faulting32(a, |a| a.mov(dword_ptr(ebx), eax))?;
        finish(a)
    });
    let mut expected = vec![0xbeef, 0xbeef];
    expected.extend(fault(14, 9, 0xc0_0000));
    expected.extend(fault(14, 2, 0x100_0000));
    g.run(engine).expect("PSE", &expected);
}

fn device_pieces(engine: &dyn Engine) {
    let g = Guest::new(Mode::Long);
    g.code(64, |a| {
        a.mov(ebx, DEVICE as u32)?;
        a.mov(eax, dword_ptr(rbx + 0x10))?;
        report(a)?;
        a.mov(rax, qword_ptr(rbx + 0x24))?;
        report(a)?;
        a.mov(dword_ptr(rbx + 0x41), 0x4433_2211)?;
        a.add(word_ptr(rbx + 0x80), 1)?;
        a.lock().or(dword_ptr(rbx + 0x90), 0)?;
        finish(a)
    });
    let outcome = g.run(engine).expect("device", &[0x1312_1110, 0x2726_2524]);
    let access = |write, offset: u64, data: &[u8]| DeviceAccess { write, offset, data: data.to_vec() };
    assert_eq!(
        outcome.device,
        [
            access(false, 0x10, &[0x10, 0x11, 0x12, 0x13]),
            access(false, 0x24, &[0x24, 0x25, 0x26, 0x27]),
            access(false, 0x28, &[0x28, 0x29, 0x2a, 0x2b]),
            access(true, 0x41, &[0x11]),
            access(true, 0x42, &[0x22, 0x33]),
            access(true, 0x44, &[0x44]),
            access(false, 0x80, &[0x80, 0x81]),
            access(true, 0x80, &[0x81, 0x81]),
            access(false, 0x90, &[0x90, 0x91, 0x92, 0x93]),
            access(true, 0x90, &[0x90, 0x91, 0x92, 0x93]),
        ]
    );
}

fn pcid(engine: &dyn Engine) {
    let g = Guest::new(Mode::Long);
    if !g.has(&bits::PCID) {
        return;
    }
    // A second address space with its own user window.
    let (second, pdpt, pd, pt) = (0x3_0000u64, 0x3_1000u64, 0x3_2000u64, 0x3_3000u64);
    g.put_u64(second, (TABLES + 0x1000) | 3);
    g.put_u64(second + 8, pdpt | 7);
    g.put_u64(pdpt, pd | 7);
    g.put_u64(pd, pt | 7);
    g.put_u64(pt, (USER_GPA + 0x1000) | 7);
    g.put_u32(USER_GPA, 0xa);
    g.put_u32(USER_GPA + 0x1000, 0xb);
    g.put_u32(USER_GPA + 0x2000, 0xc);
    g.code(64, |a| {
        a.mov(rax, cr4)?;
        a.or(eax, cr4::PCIDE as i32)?;
        a.mov(cr4, rax)?;
        a.mov(rbx, USER)?;
        let keep = 1u64 << 63;
        for cr3_value in [TABLES | 1, second | 2, TABLES | 1 | keep, second | 2 | keep] {
            a.mov(rax, cr3_value)?;
            a.mov(cr3, rax)?;
            a.mov(eax, dword_ptr(rbx))?;
            report(a)?;
        }
        // The entry changes; a load without bit 63 must see it.
        a.mov(qword_ptr(pt as i32), (USER_GPA as i32 + 0x2000) | 7)?;
        a.mov(rax, second | 2)?;
        a.mov(cr3, rax)?;
        a.mov(eax, dword_ptr(rbx))?;
        report(a)?;
        a.mov(rax, cr3)?;
        report(a)?;
        // Clearing PG with PCIDE set is #GP.
        a.mov(rcx, cr0)?;
        a.btr(rcx, 31)?;
        faulting(a, |a| a.mov(cr0, rcx))?;
        finish(a)
    });
    let mut expected = vec![0xa, 0xb, 0xa, 0xb, 0xc, second as u32 | 2];
    expected.extend(fault(13, 0, 0));
    g.run(engine).expect("PCID", &expected);
}
