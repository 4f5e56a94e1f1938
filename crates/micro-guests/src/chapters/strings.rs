//! String instructions across pages, into devices, interrupted by faults, and with I/O ports.

use super::{MicroGuest, finish, report, resume_at};
use crate::layout::{DATA, Mode, USER, USER_GPA, USER_PT};
use crate::{DEVICE, Guest, PATTERN_PORT, RESULT_PORT, fault};
use iced_x86::code_asm::*;
use partition::Engine;

/// The chapter.
pub const ALL: &[(&str, MicroGuest)] = &[
    ("strings: REP MOVSB across pages", movs_across_pages),
    ("strings: a fault leaves the registers at the element", fault_in_the_middle),
    ("strings: an overlapping MOVSB repeats", overlap),
    ("strings: backwards", backwards),
    ("strings: into a device", device),
    ("strings: SCAS and CMPS stop where they should", compare),
    ("strings: INS and OUTS", io),
];

fn movs_across_pages(engine: &dyn Engine) {
    let g = Guest::new(Mode::Long);
    // The user window's pages in reverse order, so that neighbours in linear memory are none in physical memory.
    for n in 0..8u64 {
        g.put_u64(USER_PT + 8 * n, (USER_GPA + 0x1000 * (7 - n)) | 7);
    }
    let pattern: Vec<u8> = (0..0x3000u32).map(|n| (n * 7 + n / 256) as u8).collect();
    g.put(0x30_0000, &pattern);
    g.code(64, |a| {
        a.mov(esi, 0x30_0000)?;
        a.mov(rdi, USER + 0x7f3)?;
        a.mov(ecx, 0x3000)?;
        a.rep().movsb()?;
        a.mov(eax, esi)?;
        report(a)?;
        a.mov(eax, edi)?;
        report(a)?;
        a.mov(eax, ecx)?;
        report(a)?;
        finish(a)
    });
    let outcome = g.run(engine).expect("MOVSB", &[0x30_3000, USER as u32 + 0x37f3, 0]);
    let mut copy = Vec::new();
    for at in 0x7f3..0x37f3u64 {
        let mut byte = [0];
        let gpa = USER_GPA + 0x1000 * (7 - at / 0x1000) + at % 0x1000;
        outcome.memory.read(partition::Gpa(gpa), &mut byte).expect("inside RAM");
        copy.push(byte[0]);
    }
    assert!(copy == pattern, "the copy differs");
}

fn fault_in_the_middle(engine: &dyn Engine) {
    let g = Guest::new(Mode::Long);
    g.put_u64(USER_PT + 16, 0);
    g.code(64, |a| {
        let mut after = a.create_label();
        resume_at(a, after)?;
        a.mov(eax, 0x5a5a_5a5a)?;
        a.mov(rdi, USER + 0x1ff2)?;
        a.mov(ecx, 100)?;
        a.rep().stosd()?;
        a.set_label(&mut after)?;
        a.mov(eax, ecx)?;
        report(a)?;
        a.mov(eax, edi)?;
        report(a)?;
        a.mov(rbx, USER + 0x1ffc)?;
        a.mov(eax, dword_ptr(rbx))?;
        report(a)?;
        finish(a)
    });
    // Three elements fit; the fourth crosses into the missing page and writes nothing.
    let mut expected = fault(14, 2, USER + 0x2000).to_vec();
    expected.extend([97, USER as u32 + 0x1ffe, 0x5a5a]);
    g.run(engine).expect("fault in the middle", &expected);
}

fn overlap(engine: &dyn Engine) {
    let g = Guest::new(Mode::Long);
    g.put(DATA, &[1, 2, 3]);
    g.code(64, |a| {
        a.mov(esi, DATA as i32)?;
        a.mov(edi, DATA as i32 + 3)?;
        a.mov(ecx, 9)?;
        a.rep().movsb()?;
        a.mov(eax, dword_ptr(DATA as i32 + 8))?;
        report(a)?;
        finish(a)
    });
    g.run(engine).expect("overlap", &[0x0302_0103]);
}

fn backwards(engine: &dyn Engine) {
    let g = Guest::new(Mode::Long);
    g.put_u64(DATA + 0xffc, 0x8877_6655_4433_2211);
    g.code(64, |a| {
        a.std()?;
        a.mov(esi, DATA as i32 + 0x1002)?;
        a.mov(edi, DATA as i32 + 0x2002)?;
        a.mov(ecx, 4)?;
        a.rep().movsw()?;
        a.cld()?;
        a.mov(eax, dword_ptr(DATA as i32 + 0x1ffc))?;
        report(a)?;
        a.mov(eax, dword_ptr(DATA as i32 + 0x2000))?;
        report(a)?;
        a.mov(eax, edi)?;
        report(a)?;
        finish(a)
    });
    g.run(engine).expect("backwards", &[0x4433_2211, 0x8877_6655, DATA as u32 + 0x1ffa]);
}

fn device(engine: &dyn Engine) {
    let g = Guest::new(Mode::Long);
    g.put(DATA, &[1, 2, 3, 4, 5, 6, 7, 8]);
    g.code(64, |a| {
        a.mov(esi, DATA as i32)?;
        a.mov(edi, DEVICE as u32 as i32)?;
        a.mov(ecx, 4)?;
        a.rep().movsw()?;
        a.mov(esi, DEVICE as u32 as i32)?;
        a.mov(edi, DATA as i32 + 0x100)?;
        a.mov(ecx, 2)?;
        a.rep().movsd()?;
        a.mov(eax, dword_ptr(DATA as i32 + 0x104))?;
        report(a)?;
        finish(a)
    });
    let outcome = g.run(engine).expect("device", &[0x0706_0504]);
    let writes: Vec<_> = outcome.device.iter().filter(|d| d.write).map(|d| (d.offset, d.data.clone())).collect();
    assert_eq!(writes, [(0, vec![1, 2]), (2, vec![3, 4]), (4, vec![5, 6]), (6, vec![7, 8])]);
}

fn compare(engine: &dyn Engine) {
    let g = Guest::new(Mode::Long);
    let mut text = vec![b'x'; 0x1800];
    text[0x1234] = b'!';
    g.put(0x30_0000, &text);
    text[0x1300] = b'?';
    text[0x1234] = b'!';
    g.put(0x31_0000, &text);
    g.code(64, |a| {
        a.mov(edi, 0x30_0000)?;
        a.mov(ecx, 0x1800)?;
        a.mov(al, i32::from(b'!'))?;
        a.repne().scasb()?;
        a.mov(eax, edi)?;
        report(a)?;
        a.mov(eax, ecx)?;
        report(a)?;
        a.mov(esi, 0x30_0000)?;
        a.mov(edi, 0x31_0000)?;
        a.mov(ecx, 0x1800)?;
        a.repe().cmpsb()?;
        a.mov(eax, esi)?;
        report(a)?;
        a.mov(eax, ecx)?;
        report(a)?;
        finish(a)
    });
    g.run(engine).expect("compare", &[0x30_1235, 0x1800 - 0x1235, 0x30_1301, 0x1800 - 0x1301]);
}

fn io(engine: &dyn Engine) {
    let g = Guest::new(Mode::Long);
    g.put_u32(DATA + 0x20, 0xdead_beef);
    g.code(64, |a| {
        a.mov(edx, u32::from(PATTERN_PORT))?;
        a.mov(edi, DATA as i32)?;
        a.mov(ecx, 5)?;
        a.rep().insb()?;
        a.mov(eax, dword_ptr(DATA as i32 + 1))?;
        report(a)?;
        a.mov(edx, u32::from(RESULT_PORT))?;
        a.mov(esi, DATA as i32 + 0x20)?;
        a.mov(ecx, 1)?;
        a.rep().outsd()?;
        finish(a)
    });
    g.run(engine).expect("INS and OUTS", &[0x5544_3322, 0xdead_beef]);
}
