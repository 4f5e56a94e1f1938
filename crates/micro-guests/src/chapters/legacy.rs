//! Real, unreal, protected and virtual-8086 mode; call gates with parameters; task switches.

use super::{MicroGuest, finish, report};
use crate::layout::{GDT, IDT, Mode, REAL_CODE, RESUME, descriptor, gate32, sel};
use crate::{Guest, fault};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use partition::Engine;
use x86::regs::rflags;
use x86::segment::attr;

/// The chapter.
pub const ALL: &[(&str, MicroGuest)] = &[
    ("legacy: real-mode interrupts and faults go through the IVT", real_interrupts),
    ("legacy: limits loaded in protected mode stay in real mode", unreal),
    ("legacy: segment limits and expand-down segments", limits),
    ("legacy: a 32-bit call gate copies parameters", call_gate),
    ("legacy: virtual-8086 mode", v86),
    ("legacy: task switches by JMP, CALL, IRET and a task gate", tasks),
];

fn real(g: &Guest, at: u64, write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) {
    g.assemble_at(at, at, 16, write);
}

/// A vector of the IVT.
fn ivt(g: &Guest, vector: u64, offset: u16) {
    g.put(vector * 4, &[offset.to_le_bytes(), [0, 0]].concat());
}

fn real_interrupts(engine: &dyn Engine) {
    let g = Guest::new(Mode::Real);
    let handler = 0x9000u64;
    for vector in [0, 6, 13, 0x21] {
        ivt(&g, vector, handler as u16);
    }
    real(&g, handler, |a| {
        a.mov(bp, sp)?;
        a.movzx(eax, word_ptr(bp))?;
        report(a)?;
        a.movzx(eax, word_ptr(bp + 4))?;
        a.and(eax, rflags::IF as i32)?;
        report(a)?;
        a.pushf()?;
        a.pop(ax)?;
        a.and(eax, rflags::IF as i32)?;
        report(a)?;
        // Go on at CX.
        a.mov(word_ptr(bp), cx)?;
        a.iret()
    });
    real(&g, REAL_CODE, |a| {
        // Each runs with CX at the way past it.
        let mut guarded = |act: &dyn Fn(&mut CodeAssembler) -> Result<(), IcedError>| -> Result<(), IcedError> {
            let mut inner = a.create_label();
            let mut after = a.create_label();
            a.call(inner)?;
            a.jmp(after)?;
            a.set_label(&mut inner)?;
            a.pop(cx)?;
            act(a)?;
            a.set_label(&mut after)?;
            a.sti()
        };
        guarded(&|a| a.sti())?;
        guarded(&|a| a.int(0x21))?;
        guarded(&|a| {
            a.xor(bx, bx)?;
            a.div(bx)
        })?;
        guarded(&|a| {
            a.mov(bx, 0xffff)?;
            a.mov(ax, word_ptr(bx))
        })?;
        guarded(&|a| a.ud2())?;
        a.cli()?;
        finish(a)
    });
    let outcome = g.run(engine);
    assert_eq!(outcome.end, crate::End::Exited, "{:x?}", outcome.results);
    // Each handler saw IF in the frame and had it cleared.
    assert_eq!(outcome.results.len(), 12);
    for frame in outcome.results.chunks(3) {
        assert_eq!(frame[1..], [rflags::IF as u32, 0]);
    }
    // Faults return to the instruction, the software interrupt behind it.
    let code = |rip: u32| {
        let mut bytes = [0; 2];
        outcome.memory.read(partition::Gpa(u64::from(rip)), &mut bytes).expect("inside RAM");
        bytes
    };
    assert_eq!(code(outcome.results[0] - 2), [0xcd, 0x21]);
    assert_eq!(code(outcome.results[3]), [0xf7, 0xf3], "DIV BX");
    assert_eq!(code(outcome.results[6]), [0x8b, 0x07], "MOV AX,[BX]");
    assert_eq!(code(outcome.results[9]), [0x0f, 0x0b], "UD2");
}

fn unreal(engine: &dyn Engine) {
    let g = Guest::new(Mode::Real);
    // GDT: null, flat data. Its pseudo-descriptor.
    g.put_u64(GDT + 8, descriptor(0, 0xf_ffff, attr::P | attr::S | 3 | attr::DB | attr::G));
    g.put(0x5000, &[0x0f, 0]);
    g.put_u32(0x5002, GDT as u32);
    g.put_u32(0x20_0000, 0x1357_9bdf);
    ivt(&g, 13, 0x9000);
    real(&g, 0x9000, |a| {
        a.mov(eax, 0x13)?;
        report(a)?;
        finish(a)
    });
    real(&g, REAL_CODE, |a| {
        a.lgdt(fword_ptr(0x5000))?;
        a.mov(eax, cr0)?;
        a.or(al, 1)?;
        a.mov(cr0, eax)?;
        a.mov(bx, 8)?;
        a.mov(ds, bx)?;
        a.and(al, 0xfe)?;
        a.mov(cr0, eax)?;
        a.xor(bx, bx)?;
        a.mov(ds, bx)?;
        a.mov(ebx, 0x20_0000)?;
        a.mov(eax, dword_ptr(ebx))?;
        report(a)?;
        // ES still has its 64 KiB.
        a.mov(eax, dword_ptr(ebx).es())?;
        report(a)?;
        finish(a)
    });
    g.run(engine).expect("unreal mode", &[0x1357_9bdf, 0x13]);
}

fn faulting(
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

fn limits(engine: &dyn Engine) {
    let g = Guest::new(Mode::Protected);
    let free = u64::from(sel::FREE);
    // 16 bytes at 0x20000; expand-down above 0xffff; read-only.
    g.put_u64(GDT + free, descriptor(0x2_0000, 15, attr::P | attr::S | 3));
    g.put_u64(GDT + free + 8, descriptor(0, 0xffff, attr::P | attr::S | 7 | attr::DB));
    g.put_u64(GDT + free + 16, descriptor(0x2_0000, 15, attr::P | attr::S | 1));
    g.put_u32(0x2_000c, 0xabcd);
    g.code(32, |a| {
        a.mov(ecx, free as i32)?;
        a.mov(es, ecx)?;
        a.mov(eax, ptr(12).es())?;
        report(a)?;
        faulting(a, |a| a.mov(ecx, dword_ptr(13).es()))?;
        a.mov(ecx, free as i32 + 8)?;
        a.mov(es, ecx)?;
        a.mov(eax, ptr(0x2_000c).es())?;
        report(a)?;
        faulting(a, |a| a.mov(cl, byte_ptr(0xffff).es()))?;
        a.mov(ecx, free as i32 + 16)?;
        a.mov(es, ecx)?;
        faulting(a, |a| a.mov(byte_ptr(0).es(), cl))?;
        a.xor(ecx, ecx)?;
        a.mov(es, ecx)?;
        faulting(a, |a| a.mov(cl, byte_ptr(0).es()))?;
        // The accessed bit was set when the descriptors were loaded; the code segment cannot be written.
        faulting(a, |a| a.mov(byte_ptr(0).cs(), cl))?;
        a.mov(ecx, free as i32)?;
        a.lsl(eax, ecx)?;
        report(a)?;
        a.lar(eax, ecx)?;
        report(a)?;
        finish(a)
    });
    let gp = fault(13, 0, 0);
    let mut expected = vec![0xabcd];
    expected.extend(gp);
    expected.push(0xabcd);
    for _ in 0..4 {
        expected.extend(gp);
    }
    expected.extend([15, 0x9300]);
    g.run(engine).expect("limits", &expected);
}

/// 32-bit ring 3 at this address.
fn enter_user(a: &mut CodeAssembler, entry: u64, stack: u64) -> Result<(), IcedError> {
    a.push(i32::from(sel::USER_DATA))?;
    a.push(stack as i32)?;
    a.push(0x3002)?;
    a.push(i32::from(sel::USER_CODE32))?;
    a.push(entry as i32)?;
    a.iretd()
}

fn call_gate(engine: &dyn Engine) {
    let g = Guest::new(Mode::Protected);
    let (handler, user) = (0x10_4000u64, 0x10_8000u64);
    // Two parameters.
    let gate = (handler & 0xffff) | u64::from(sel::CODE32) << 16 | 2 << 32 | 0xec << 40 | (handler >> 16) << 48;
    g.put_u64(GDT + u64::from(sel::FREE), gate);
    g.assemble_at(handler, handler, 32, |a| {
        for n in 0..6 {
            a.mov(eax, dword_ptr(esp + 4 * n))?;
            report(a)?;
        }
        a.db(&[0xca, 8, 0])
    });
    g.assemble_at(user, user, 32, |a| {
        a.push(0x111)?;
        a.push(0x222)?;
        let selector = (sel::FREE | 3).to_le_bytes();
        a.db(&[0x9a, 0, 0, 0, 0, selector[0], selector[1]])?;
        a.mov(eax, esp)?;
        report(a)?;
        a.mov(eax, cs)?;
        report(a)?;
        finish(a)
    });
    g.code(32, |a| enter_user(a, user, 0x9_0000));
    let expected = [
        user as u32 + 5 + 5 + 7,
        u32::from(sel::USER_CODE32),
        0x222,
        0x111,
        0x9_0000 - 8,
        u32::from(sel::USER_DATA),
        0x9_0000,
        u32::from(sel::USER_CODE32),
    ];
    g.run(engine).expect("call gate", &expected);
}

fn v86(engine: &dyn Engine) {
    let g = Guest::new(Mode::Protected);
    let handler = 0x10_4000u64;
    g.put_u64(IDT + 8 * 13, gate32(handler, sel::CODE32, 0xe, 0));
    // #GP handler: reports error code, CS:IP of the virtual machine, VM in the frame, and DS there; ends on HLT.
    g.assemble_at(handler, handler, 32, |a| {
        let mut end = a.create_label();
        for at in [0, 8, 4, 28] {
            a.mov(eax, dword_ptr(esp + at))?;
            report(a)?;
        }
        a.mov(eax, dword_ptr(esp + 12))?;
        a.and(eax, rflags::VM as i32)?;
        report(a)?;
        a.mov(eax, ds)?;
        report(a)?;
        a.movzx(ebx, word_ptr(esp + 8))?;
        a.shl(ebx, 4)?;
        a.movzx(ecx, word_ptr(esp + 4))?;
        a.add(ebx, ecx)?;
        a.mov(ecx, i32::from(sel::DATA))?;
        a.mov(ds, ecx)?;
        a.cmp(byte_ptr(ebx), 0xf4)?;
        a.je(end)?;
        // Skip INT n (two bytes).
        a.add(dword_ptr(esp + 4), 2)?;
        a.add(esp, 4)?;
        a.iretd()?;
        a.set_label(&mut end)?;
        finish(a)
    });
    g.assemble_at(0x3_0000, 0, 16, |a| {
        a.mov(ax, 0x2000)?;
        a.mov(ds, ax)?;
        a.movzx(eax, word_ptr(0x10))?;
        report(a)?;
        a.int(0x21)?;
        a.mov(eax, 0x77)?;
        report(a)?;
        a.hlt()
    });
    g.put(0x2_0010, &[0x34, 0x12]);
    g.code(32, |a| {
        // GS FS DS ES SS ESP EFLAGS CS EIP
        for value in [0, 0, 0, 0, 0x4000, 0xfff0, (rflags::VM | 2) as i32, 0x3000, 0] {
            a.push(value)?;
        }
        a.iretd()
    });
    let int_at = 0x3 + 2 + 6 + 3;
    let vm = rflags::VM as u32;
    let outcome = g.run(engine);
    assert_eq!(outcome.end, crate::End::Exited, "{:x?}", outcome.results);
    let r = &outcome.results;
    assert_eq!(r[0], 0x1234);
    assert_eq!((r[1], r[2], r[4], r[5], r[6]), (0, 0x3000, 0x2000, vm, 0), "{r:x?}");
    let mut byte = [0];
    outcome.memory.read(partition::Gpa(0x3_0000 + u64::from(r[3])), &mut byte).expect("inside RAM");
    assert_eq!(byte, [0xcd], "INT n faults with IOPL 0 (IP {:#x}, about {int_at:#x})", r[3]);
    assert_eq!(r[7], 0x77);
    assert_eq!((r[8], r[9], r[12]), (0, 0x3000, vm), "HLT");
}

/// Writes a 32-bit TSS for a ring 0 task.
fn write_tss(g: &Guest, at: u64, entry: u64, stack: u64) {
    let mut tss = [0u32; 26];
    tss[8] = entry as u32;
    tss[9] = 2;
    tss[14] = stack as u32;
    for segment in [18, 20, 21, 22, 23] {
        tss[segment] = u32::from(sel::DATA);
    }
    tss[19] = u32::from(sel::CODE32);
    tss[25] = 0x68 << 16;
    for (n, word) in tss.into_iter().enumerate() {
        g.put_u32(at + 4 * n as u64, word);
    }
}

fn tasks(engine: &dyn Engine) {
    let g = Guest::new(Mode::Protected);
    let free = u64::from(sel::FREE);
    let (tss1, tss2, task1, task2) = (0x3_0000u64, 0x3_1000u64, 0x10_4000u64, 0x10_8000u64);
    g.put_u64(GDT + free, descriptor(tss1 as u32, 0x67, attr::P | 9));
    g.put_u64(GDT + free + 8, descriptor(tss2 as u32, 0x67, attr::P | 9));
    write_tss(&g, tss1, task1, 0x9_8000);
    write_tss(&g, tss2, task2, 0x9_9000);
    g.put_u64(IDT + 8 * 0x50, gate32(0, sel::FREE + 8, 5, 0));
    // Task 1 is called: it reports its link, NT and TR, and returns.
    g.assemble_at(task1, task1, 32, |a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.movzx(eax, word_ptr(tss1 as i32))?;
        report(a)?;
        a.pushfd()?;
        a.pop(eax)?;
        a.and(eax, rflags::NT as i32)?;
        report(a)?;
        a.str(ax)?;
        a.movzx(eax, ax)?;
        report(a)?;
        a.mov(eax, cr0)?;
        a.and(eax, 8)?;
        report(a)?;
        a.iretd()?;
        a.jmp(again)
    });
    // Task 2 is entered by the task gate, then by JMP.
    g.assemble_at(task2, task2, 32, |a| {
        a.mov(eax, 0x222)?;
        report(a)?;
        a.iretd()?;
        a.mov(eax, 0x333)?;
        report(a)?;
        let selector = sel::TSS.to_le_bytes();
        a.db(&[0xea, 0, 0, 0, 0, selector[0], selector[1]])
    });
    g.code(32, |a| {
        let one = sel::FREE.to_le_bytes();
        let two = (sel::FREE + 8).to_le_bytes();
        a.mov(ebx, 0x1234)?;
        a.db(&[0x9a, 0, 0, 0, 0, one[0], one[1]])?;
        a.mov(eax, ebx)?;
        report(a)?;
        a.int(0x50)?;
        // Busy bits: both called tasks are free again.
        a.mov(al, byte_ptr((GDT + free) as i32 + 5))?;
        a.movzx(eax, al)?;
        report(a)?;
        a.db(&[0xea, 0, 0, 0, 0, two[0], two[1]])?;
        a.mov(al, byte_ptr((GDT + u64::from(sel::TSS)) as i32 + 5))?;
        a.movzx(eax, al)?;
        report(a)?;
        a.clts()?;
        // A busy TSS cannot be jumped to.
        let own = sel::TSS.to_le_bytes();
        faulting(a, |a| a.db(&[0xea, 0, 0, 0, 0, own[0], own[1]]))?;
        finish(a)
    });
    let nt = rflags::NT as u32;
    let mut expected = vec![u32::from(sel::TSS), nt, u32::from(sel::FREE), 8, 0x1234, 0x222, 0x89, 0x333, 0x8b];
    expected.extend(fault(13, u32::from(sel::TSS), 0));
    g.run(engine).expect("tasks", &expected);
}
