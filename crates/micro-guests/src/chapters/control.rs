//! Long-mode control transfers: IST, gates, SYSCALL, compatibility mode, far returns.

use super::{MicroGuest, finish, report, resume_at};
use crate::layout::{GDT, IDT, IST1, Mode, STACK0, USER, USER_GPA, USER_PT, USER_STACK, gate64, sel};
use crate::{Guest, fault};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use partition::Engine;
use x86::{msr, regs::rflags};

/// The chapter.
pub const ALL: &[(&str, MicroGuest)] = &[
    ("control: an interrupt through IST switches and aligns the stack", ist),
    ("control: SYSCALL and SYSRET", syscall),
    ("control: a 64-bit call gate to ring 0 and back", call_gate),
    ("control: compatibility mode and back", compatibility),
    ("control: IRET to ring 3 drops data segments that ring 3 may not have", iret_nulls),
    ("control: selector faults name the selector", selector_faults),
    ("control: a fault while delivering #PF is #DF, one while delivering #DF shuts down", double_fault),
    ("control: the shadow of STI holds for one instruction", sti_shadow),
];

fn ist(engine: &dyn Engine) {
    let g = Guest::new(Mode::Long);
    let handler = 0x10_4000u64;
    for (n, word) in gate64(handler, sel::CODE64, 0, 1).into_iter().enumerate() {
        g.put_u64(IDT + 16 * 0x40 + 8 * n as u64, word);
    }
    g.assemble_at(handler, handler, 64, |a| {
        a.mov(eax, esp)?;
        report(a)?;
        a.mov(rax, qword_ptr(rsp + 24))?;
        report(a)?;
        a.mov(rax, qword_ptr(rsp + 16))?;
        a.and(eax, (rflags::IF) as i32)?;
        report(a)?;
        a.mov(eax, ss)?;
        report(a)?;
        a.pushfq()?;
        a.pop(rax)?;
        a.and(eax, (rflags::IF) as i32)?;
        report(a)?;
        a.iretq()
    });
    g.code(64, |a| {
        a.sub(rsp, 12)?;
        a.mov(ebx, esp)?;
        a.sti()?;
        a.int(0x40)?;
        a.cli()?;
        a.mov(eax, esp)?;
        a.sub(eax, ebx)?;
        report(a)?;
        finish(a)
    });
    let stack = crate::layout::STACK as u32 - 12;
    let expected = [IST1 as u32 - 40, stack, rflags::IF as u32, u32::from(sel::DATA), 0, 0];
    g.run(engine).expect("IST", &expected);
}

fn enter_user(a: &mut CodeAssembler, code: u16) -> Result<(), IcedError> {
    a.push(i32::from(sel::USER_DATA))?;
    a.mov(rax, USER_STACK)?;
    a.push(rax)?;
    a.push(0x3002)?;
    a.push(i32::from(code))?;
    a.mov(rax, USER)?;
    a.push(rax)?;
    a.iretq()
}

fn syscall(engine: &dyn Engine) {
    let mut g = Guest::new(Mode::Long);
    let handler = 0x10_4000u64;
    // SYSCALL takes CS = 8, SS = 16; SYSRET to 64-bit takes CS = base + 16, SS = base + 8.
    g.state.set_msr(msr::STAR, 8 << 32 | u64::from(sel::USER_DATA - 8) << 48);
    g.state.set_msr(msr::LSTAR, handler);
    g.state.set_msr(msr::FMASK, rflags::DF | rflags::IF);
    g.assemble_at(handler, handler, 64, |a| {
        a.mov(r9, rcx)?;
        a.mov(eax, cs)?;
        report(a)?;
        a.mov(eax, ss)?;
        report(a)?;
        a.mov(eax, r9d)?;
        report(a)?;
        a.mov(eax, r11d)?;
        a.and(eax, rflags::DF as i32)?;
        report(a)?;
        a.pushfq()?;
        a.pop(rax)?;
        a.and(eax, rflags::DF as i32)?;
        report(a)?;
        a.mov(rcx, r9)?;
        a.sysretq()
    });
    g.assemble_at(USER_GPA, USER, 64, |a| {
        a.std()?;
        a.nop()?;
        a.syscall()?;
        a.mov(eax, cs)?;
        report(a)?;
        a.mov(eax, ss)?;
        report(a)?;
        a.pushfq()?;
        a.pop(rax)?;
        a.and(eax, rflags::DF as i32)?;
        report(a)?;
        finish(a)
    });
    g.code(64, |a| {
        // The handler runs on the user's stack, which is fine without SMAP.
        enter_user(a, sel::USER_CODE64)
    });
    let df = rflags::DF as u32;
    let expected = [8, 16, USER as u32 + 4, df, 0, u32::from(sel::USER_CODE64), u32::from(sel::USER_DATA), df];
    g.run(engine).expect("SYSCALL", &expected);
}

fn call_gate(engine: &dyn Engine) {
    let g = Guest::new(Mode::Long);
    let handler = 0x10_4000u64;
    let gate = (handler & 0xffff) | u64::from(sel::CODE64) << 16 | 0xec << 40 | (handler >> 16 & 0xffff) << 48;
    g.put_u64(GDT + u64::from(sel::FREE), gate);
    g.put_u64(GDT + u64::from(sel::FREE) + 8, handler >> 32);
    g.assemble_at(handler, handler, 64, |a| {
        a.mov(eax, cs)?;
        report(a)?;
        a.mov(eax, ss)?;
        report(a)?;
        a.mov(eax, esp)?;
        report(a)?;
        for n in 0..4 {
            a.mov(eax, dword_ptr(rsp + 8 * n))?;
            report(a)?;
        }
        // REX.W RETF
        a.db(&[0x48, 0xcb])
    });
    // A 64-bit far pointer in the user's data: the offset is ignored.
    g.put_u64(USER_GPA + 0x1000, 0x1234_5678);
    g.put(USER_GPA + 0x1004, &(sel::FREE | 3).to_le_bytes());
    g.assemble_at(USER_GPA, USER, 64, |a| {
        a.mov(rbx, USER + 0x1000)?;
        a.call(fword_ptr(rbx))?;
        a.mov(eax, cs)?;
        report(a)?;
        a.mov(eax, esp)?;
        report(a)?;
        finish(a)
    });
    g.code(64, |a| enter_user(a, sel::USER_CODE64));
    let expected = [
        u32::from(sel::CODE64),
        0,
        STACK0 as u32 - 32,
        USER as u32 + 12,
        u32::from(sel::USER_CODE64),
        USER_STACK as u32,
        u32::from(sel::USER_DATA),
        u32::from(sel::USER_CODE64),
        USER_STACK as u32,
    ];
    g.run(engine).expect("call gate", &expected);
}

fn compatibility(engine: &dyn Engine) {
    let g = Guest::new(Mode::Long);
    let code32 = 0x10_8000u64;
    let back = 0x10_a000u64;
    g.assemble_at(code32, code32, 32, |a| {
        // INC EAX's one-byte form is a REX prefix in 64-bit mode.
        a.db(&[0x40])?;
        report(a)?;
        a.mov(eax, cs)?;
        report(a)?;
        a.mov(esp, 0x9_c000)?;
        a.push(eax)?;
        a.mov(eax, esp)?;
        report(a)?;
        // Far jump to 64-bit code: EA offset32 selector16.
        let target = (back as u32).to_le_bytes();
        let selector = sel::CODE64.to_le_bytes();
        a.db(&[0xea, target[0], target[1], target[2], target[3], selector[0], selector[1]])
    });
    g.assemble_at(back, back, 64, |a| {
        a.mov(eax, cs)?;
        report(a)?;
        a.mov(rax, 0x1_0000_0005u64)?;
        a.shr(rax, 32)?;
        report(a)?;
        finish(a)
    });
    g.code(64, |a| {
        a.mov(eax, 0x41)?;
        a.push(i32::from(sel::CODE32))?;
        a.push(code32 as i32)?;
        // REX.W RETF
        a.db(&[0x48, 0xcb])
    });
    let expected = [0x42, u32::from(sel::CODE32), 0x9_bffc, u32::from(sel::CODE64), 1];
    g.run(engine).expect("compatibility mode", &expected);
}

fn iret_nulls(engine: &dyn Engine) {
    let g = Guest::new(Mode::Long);
    g.assemble_at(USER_GPA, USER, 64, |a| {
        for register in [ds, es, fs, gs] {
            a.mov(eax, register)?;
            report(a)?;
        }
        finish(a)
    });
    g.code(64, |a| {
        a.mov(eax, i32::from(sel::DATA))?;
        a.mov(ds, eax)?;
        a.mov(fs, eax)?;
        a.mov(eax, i32::from(sel::USER_DATA))?;
        a.mov(es, eax)?;
        a.xor(eax, eax)?;
        a.mov(gs, eax)?;
        enter_user(a, sel::USER_CODE64)
    });
    g.run(engine).expect("data segments", &[0, u32::from(sel::USER_DATA), 0, 0]);
}

fn selector_faults(engine: &dyn Engine) {
    let g = Guest::new(Mode::Long);
    let free = sel::FREE;
    // Not present data; a code segment without the right to read.
    g.put_u64(GDT + u64::from(free), 0x00cf_1300_0000_ffff);
    g.put_u64(GDT + u64::from(free) + 8, 0x00af_9900_0000_ffff);
    g.code(64, |a| {
        let mut load = |value: u16, into: AsmRegisterSegment| -> Result<(), IcedError> {
            let mut after = a.create_label();
            resume_at(a, after)?;
            a.mov(ecx, i32::from(value))?;
            a.mov(into, ecx)?;
            a.set_label(&mut after)?;
            a.nop()
        };
        load(free, ds)?;
        load(free, ss)?;
        load(free + 8, es)?;
        load(0x7ff8, fs)?;
        load(sel::USER_DATA, ss)?;
        load(0x14, ds)?;
        // Ring 0 of 64-bit mode may have a null SS.
        load(0, ss)?;
        finish(a)
    });
    let mut expected = Vec::new();
    expected.extend(fault(11, u32::from(free), 0));
    expected.extend(fault(12, u32::from(free), 0));
    expected.extend(fault(13, u32::from(free) + 8, 0));
    expected.extend(fault(13, 0x7ff8, 0));
    expected.extend(fault(13, u32::from(sel::USER_DATA) & 0xfffc, 0));
    expected.extend(fault(13, 0x14, 0));
    g.run(engine).expect("selectors", &expected);
}

fn double_fault(engine: &dyn Engine) {
    let g = Guest::new(Mode::Long);
    // The gate of #PF is not present: #NP during the delivery of #PF.
    g.put_u64(IDT + 16 * 14, 0);
    g.put_u64(USER_PT + 8, 0);
    let page = USER + 0x1000;
    g.code(64, |a| {
        let mut after = a.create_label();
        resume_at(a, after)?;
        a.mov(rbx, page)?;
        a.mov(eax, dword_ptr(rbx))?;
        a.set_label(&mut after)?;
        a.mov(qword_ptr(IDT as i32 + 16 * 8), 0)?;
        a.mov(eax, dword_ptr(rbx))?;
        finish(a)
    });
    let outcome = g.run(engine);
    assert_eq!(outcome.end, crate::End::TripleFault);
    assert_eq!(outcome.results, fault(8, 0, page));
}

fn sti_shadow(engine: &dyn Engine) {
    // A self-IPI is pending when STI executes; the instruction after STI completes first.
    let g = Guest::new(Mode::Long);
    let handler = 0x10_4000u64;
    for (n, word) in gate64(handler, sel::CODE64, 0, 0).into_iter().enumerate() {
        g.put_u64(IDT + 16 * 0x41 + 8 * n as u64, word);
    }
    g.assemble_at(handler, handler, 64, |a| {
        a.mov(eax, ebx)?;
        report(a)?;
        a.mov(eax, 0xfee0_00b0u32)?;
        a.mov(dword_ptr(rax), 0)?;
        a.iretq()
    });
    g.code(64, |a| {
        a.mov(eax, 0xfee0_0000u32)?;
        a.mov(dword_ptr(rax + 0xf0), 0x1ff)?;
        a.mov(dword_ptr(rax + 0x300), 0x4_4041)?;
        a.xor(ebx, ebx)?;
        a.nop()?;
        a.sti()?;
        a.inc(ebx)?;
        a.inc(ebx)?;
        a.inc(ebx)?;
        a.cli()?;
        a.mov(eax, 0xeeu32)?;
        report(a)?;
        finish(a)
    });
    g.run(engine).expect("STI", &[1, 0xee]);
}
