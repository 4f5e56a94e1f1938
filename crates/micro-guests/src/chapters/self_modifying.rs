//! Code that changes itself, from the same page, another page, and through another linear address.

use super::{MicroGuest, finish, report};
use crate::Guest;
use crate::layout::{Mode, USER, USER_GPA};
use iced_x86::code_asm::*;
use partition::Engine;

/// The chapter.
pub const ALL: &[(&str, MicroGuest)] = &[
    ("self-modifying: the next instruction", next_instruction),
    ("self-modifying: a loop patches its own immediate", patched_loop),
    ("self-modifying: a function is rewritten through another mapping", aliased),
    ("self-modifying: an instruction that crosses pages", crossing),
];

fn next_instruction(engine: &dyn Engine) {
    let g = Guest::new(Mode::Long);
    g.code(64, |a| {
        let mut patched = a.create_label();
        a.lea(rbx, ptr(patched))?;
        // Twice, so that the second time the code is known.
        for value in [0x11, 0x22] {
            let mut here = a.create_label();
            a.lea(rbx, ptr(here))?;
            a.mov(dword_ptr(rbx + 1), value)?;
            a.set_label(&mut here)?;
            a.db(&[0xb8, 0, 0, 0, 0])?;
            report(a)?;
        }
        a.set_label(&mut patched)?;
        finish(a)
    });
    g.run(engine).expect("next instruction", &[0x11, 0x22]);
}

fn patched_loop(engine: &dyn Engine) {
    let g = Guest::new(Mode::Long);
    g.code(64, |a| {
        let mut here = a.create_label();
        a.lea(rbx, ptr(here))?;
        a.xor(esi, esi)?;
        a.mov(ecx, 1000)?;
        a.set_label(&mut here)?;
        a.db(&[0xb8, 1, 0, 0, 0])?;
        a.add(esi, eax)?;
        a.inc(dword_ptr(rbx + 1))?;
        a.dec(ecx)?;
        a.jnz(here)?;
        a.mov(eax, esi)?;
        report(a)?;
        finish(a)
    });
    g.run(engine).expect("patched loop", &[500_500]);
}

fn aliased(engine: &dyn Engine) {
    let g = Guest::new(Mode::Long);
    // mov eax, 1; ret
    g.put(USER_GPA, &[0xb8, 1, 0, 0, 0, 0xc3]);
    g.code(64, |a| {
        a.mov(rbx, USER)?;
        for value in [2, 3, 4] {
            a.call(rbx)?;
            report(a)?;
            a.mov(byte_ptr(USER_GPA as i32 + 1), value)?;
        }
        a.call(rbx)?;
        report(a)?;
        // By a string instruction too.
        a.mov(edi, USER_GPA as i32)?;
        a.mov(ecx, 6)?;
        a.mov(al, 0x90)?;
        a.rep().stosb()?;
        a.mov(byte_ptr(USER_GPA as i32 + 6), 0xc3)?;
        a.mov(eax, 0x99)?;
        a.call(rbx)?;
        report(a)?;
        finish(a)
    });
    g.run(engine).expect("aliased", &[1, 2, 3, 4, 0x99]);
}

fn crossing(engine: &dyn Engine) {
    let g = Guest::new(Mode::Long);
    // mov eax, imm32 with two bytes of the immediate on the second page, then ret.
    let at = USER_GPA + 0x1000 - 3;
    g.put(at, &[0xb8, 0x44, 0x33, 0x22, 0x11, 0xc3]);
    g.code(64, |a| {
        a.mov(rbx, USER + 0x1000 - 3)?;
        a.call(rbx)?;
        report(a)?;
        a.mov(byte_ptr(at as i32 + 4), 0x99u32)?;
        a.call(rbx)?;
        report(a)?;
        a.mov(byte_ptr(at as i32 + 1), 0x55)?;
        a.call(rbx)?;
        report(a)?;
        finish(a)
    });
    g.run(engine).expect("crossing", &[0x1122_3344, 0x9922_3344, 0x9922_3355]);
}
