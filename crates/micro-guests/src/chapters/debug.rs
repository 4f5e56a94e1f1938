//! Debug exceptions: single step, breakpoints on instructions and data, RF, DR6, DR7.GD, ICEBP.

use super::{MicroGuest, finish, report};
use crate::Guest;
use crate::layout::{DATA, IDT, Mode, gate64, sel};
use iced_x86::code_asm::*;
use partition::Engine;
use x86::regs::{dr6, rflags};

/// The chapter.
pub const ALL: &[(&str, MicroGuest)] = &[
    ("debug: single step traps after each instruction", single_step),
    ("debug: an instruction breakpoint faults before, RF lets it pass", instruction_breakpoint),
    ("debug: a data breakpoint traps after the access", data_breakpoint),
    ("debug: ICEBP and general detect", icebp_and_gd),
    ("debug: MOV SS holds single step back", mov_ss),
];

const HANDLER: u64 = 0x10_4000;

/// A #DB handler that reports DR6 (low 16 bits) and the distance of RIP from RBX, clears DR6, and sets RF.
fn install(g: &Guest) {
    for (n, word) in gate64(HANDLER, sel::CODE64, 0, 0).into_iter().enumerate() {
        g.put_u64(IDT + 16 + 8 * n as u64, word);
    }
    g.assemble_at(HANDLER, HANDLER, 64, |a| {
        a.push(rax)?;
        a.mov(rax, dr6)?;
        a.movzx(eax, ax)?;
        a.and(eax, 0xe00f)?;
        report(a)?;
        a.mov(rax, qword_ptr(rsp + 8))?;
        a.sub(rax, rbx)?;
        report(a)?;
        a.xor(eax, eax)?;
        a.mov(dr6, rax)?;
        a.or(dword_ptr(rsp + 24), rflags::RF as i32)?;
        a.pop(rax)?;
        a.iretq()
    });
}

const BS: u32 = dr6::BS as u32;

fn single_step(engine: &dyn Engine) {
    let g = Guest::new(Mode::Long);
    install(&g);
    g.code(64, |a| {
        let mut start = a.create_label();
        let mut skip = a.create_label();
        a.lea(rbx, ptr(start))?;
        a.pushfq()?;
        a.or(dword_ptr(rsp), rflags::TF as i32)?;
        a.popfq()?;
        a.set_label(&mut start)?;
        a.nop()?;
        a.jmp(skip)?;
        a.ud2()?;
        a.set_label(&mut skip)?;
        a.pushfq()?;
        a.and(dword_ptr(rsp), !(rflags::TF as i32))?;
        a.popfq()?;
        a.nop()?;
        finish(a)
    });
    // After NOP, JMP, PUSHFQ, AND and the POPFQ that clears TF; the JMP is 2 bytes, UD2 2, AND 7.
    let expected = [BS, 1, BS, 5, BS, 6, BS, 13, BS, 14];
    g.run(engine).expect("single step", &expected);
}

fn instruction_breakpoint(engine: &dyn Engine) {
    let g = Guest::new(Mode::Long);
    install(&g);
    g.code(64, |a| {
        let mut here = a.create_label();
        let mut again = a.create_label();
        a.lea(rbx, ptr(here))?;
        a.mov(dr0, rbx)?;
        a.mov(eax, 0x402)?;
        a.mov(dr7, rax)?;
        a.mov(ecx, 2)?;
        a.set_label(&mut again)?;
        a.nop()?;
        a.set_label(&mut here)?;
        a.dec(ecx)?;
        a.jnz(again)?;
        a.mov(eax, ecx)?;
        report(a)?;
        finish(a)
    });
    g.run(engine).expect("instruction breakpoint", &[1, 0, 1, 0, 0]);
}

fn data_breakpoint(engine: &dyn Engine) {
    let g = Guest::new(Mode::Long);
    install(&g);
    g.code(64, |a| {
        let mut start = a.create_label();
        a.mov(eax, DATA as i32 + 8)?;
        a.mov(dr1, rax)?;
        // DR1: write, 4 bytes. DR2: read or write, 1 byte at DATA + 0x20.
        a.mov(eax, DATA as i32 + 0x20)?;
        a.mov(dr2, rax)?;
        a.mov(eax, 0x400 | 0x4 | 0x10 | 0b1101 << 20 | 0b0011 << 24)?;
        a.mov(dr7, rax)?;
        a.lea(rbx, ptr(start))?;
        a.mov(esi, DATA as i32)?;
        a.set_label(&mut start)?;
        a.mov(dword_ptr(rsi), 1)?;
        a.mov(eax, dword_ptr(rsi + 8))?;
        a.mov(word_ptr(rsi + 10), ax)?;
        a.mov(dword_ptr(rsi + 12), eax)?;
        a.mov(al, byte_ptr(rsi + 0x20))?;
        a.push(rax)?;
        finish(a)
    });
    let outcome = g.run(engine);
    assert_eq!(outcome.end, crate::End::Exited);
    // MOV [RSI],imm (6) + MOV (3) + MOV word (4); then MOV (3) + MOV AL (3).
    assert_eq!(outcome.results, [2, 13, 4, 19]);
}

fn icebp_and_gd(engine: &dyn Engine) {
    let g = Guest::new(Mode::Long);
    install(&g);
    g.code(64, |a| {
        let mut start = a.create_label();
        a.lea(rbx, ptr(start))?;
        a.set_label(&mut start)?;
        a.int1()?;
        a.nop()?;
        // GD: the next access to a debug register faults before it happens (once: delivery clears GD).
        a.mov(eax, 0x2400)?;
        a.mov(dr7, rax)?;
        a.mov(rcx, dr7)?;
        a.mov(eax, ecx)?;
        report(a)?;
        finish(a)
    });
    g.run(engine).expect("ICEBP and GD", &[0, 1, dr6::BD as u32, 10, 0x400]);
}

fn mov_ss(engine: &dyn Engine) {
    let g = Guest::new(Mode::Long);
    install(&g);
    g.code(64, |a| {
        let mut start = a.create_label();
        a.lea(rbx, ptr(start))?;
        a.mov(ecx, i32::from(sel::DATA))?;
        a.pushfq()?;
        a.or(dword_ptr(rsp), rflags::TF as i32)?;
        a.popfq()?;
        a.set_label(&mut start)?;
        a.mov(ss, ecx)?;
        a.nop()?;
        a.pushfq()?;
        a.and(dword_ptr(rsp), !(rflags::TF as i32))?;
        a.popfq()?;
        finish(a)
    });
    let outcome = g.run(engine);
    assert_eq!(outcome.end, crate::End::Exited);
    let places: Vec<u32> = outcome.results.chunks(2).map(|c| c[1]).collect();
    // No trap between MOV SS (2 bytes) and NOP.
    assert_eq!(places, [3, 4, 11, 12], "{:x?}", outcome.results);
}
