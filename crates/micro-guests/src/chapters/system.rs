//! System instructions: control-register checks, UMIP, FSGSBASE, INVPCID, XSETBV, port permissions, LDT, POPF, SYSENTER.

use super::{MicroGuest, finish, report, resume_at};
use crate::layout::{DATA, GDT, IDT, Mode, RESUME, TABLES, TSS, USER, USER_GPA, USER_PT, USER_STACK, descriptor, sel};
use crate::{Guest, fault};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use partition::Engine;
use x86::cpuid::bits;
use x86::msr;
use x86::regs::{cr0, cr4, efer, rflags};
use x86::segment::attr;

/// The chapter.
pub const ALL: &[(&str, MicroGuest)] = &[
    ("system: control registers refuse what they must", control_register_checks),
    ("system: 64-bit mode cannot be left by CR0, CR4 or EFER", long_mode_locks),
    ("system: UMIP, TSD and privileged instructions at ring 3", user_restrictions),
    ("system: FS and GS bases", bases),
    ("system: INVPCID", invpcid),
    ("system: XSETBV and XGETBV", xcr0),
    ("system: the I/O permission bitmap", io_bitmap),
    ("system: LDT, LAR, LSL, VERR, VERW", ldt),
    ("system: POPF changes IF and IOPL only with the right", popf),
    ("system: SYSENTER and SYSEXIT in protected mode", sysenter),
    ("system: 16-bit gates and stacks", sixteen_bit),
];

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

const GP0: [u32; 3] = [13, 0, 0];
const UD: [u32; 3] = [6, 0, 0];

/// A guest of 64-bit ring 0 code in which every action must be #GP(0).
fn all_gp(engine: &dyn Engine, name: &str, actions: &[&dyn Fn(&mut CodeAssembler) -> Result<(), IcedError>]) {
    let g = Guest::new(Mode::Long);
    g.code(64, |a| {
        for action in actions {
            faulting(a, |a| action(a))?;
        }
        finish(a)
    });
    g.run(engine).expect(name, &GP0.repeat(actions.len()));
}

fn control_register_checks(engine: &dyn Engine) {
    let set_cr0 = |a: &mut CodeAssembler, set: u64, clear: u64| {
        a.mov(rcx, cr0)?;
        a.mov(rdx, !clear)?;
        a.and(rcx, rdx)?;
        a.mov(rdx, set)?;
        a.or(rcx, rdx)?;
        a.mov(cr0, rcx)
    };
    let write_msr = |a: &mut CodeAssembler, number: u32, value: u64| {
        a.mov(ecx, number)?;
        a.mov(eax, value as u32)?;
        a.mov(edx, (value >> 32) as u32)?;
        a.wrmsr()
    };
    all_gp(
        engine,
        "control registers",
        &[
            &|a| set_cr0(a, cr0::NW, cr0::CD),
            &|a| set_cr0(a, 1 << 32, 0),
            &|a| {
                a.mov(rcx, cr4)?;
                a.bts(rcx, 40)?;
                a.mov(cr4, rcx)
            },
            &|a| {
                a.mov(rcx, cr4)?;
                a.or(ecx, cr4::LA57 as i32)?;
                a.mov(cr4, rcx)
            },
            &|a| {
                a.mov(rcx, TABLES | 1 << 52)?;
                a.mov(cr3, rcx)
            },
            &|a| {
                a.mov(rcx, 0x10u64)?;
                a.mov(cr8, rcx)
            },
            &|a| write_msr(a, msr::EFER, 1 << 1),
            &|a| write_msr(a, msr::LSTAR, 0x8000_0000_0000),
            &|a| write_msr(a, 0x1234_5678, 0),
            &|a| {
                a.mov(ecx, 0x1234_5678)?;
                a.rdmsr()
            },
            &|a| {
                a.mov(rcx, 1u64 << 32)?;
                a.mov(dr7, rcx)
            },
        ],
    );
}

fn long_mode_locks(engine: &dyn Engine) {
    all_gp(
        engine,
        "leaving 64-bit mode",
        &[
            &|a| {
                a.mov(rcx, cr0)?;
                a.btr(rcx, 31)?;
                a.mov(cr0, rcx)
            },
            &|a| {
                a.mov(rcx, cr4)?;
                a.and(ecx, !(cr4::PAE as i32))?;
                a.mov(cr4, rcx)
            },
            &|a| {
                a.mov(ecx, msr::EFER)?;
                a.mov(eax, (efer::SCE | efer::NXE) as u32)?;
                a.xor(edx, edx)?;
                a.wrmsr()
            },
        ],
    );
}

fn enter_user(a: &mut CodeAssembler, flags: u64) -> Result<(), IcedError> {
    a.push(i32::from(sel::USER_DATA))?;
    a.mov(rax, USER_STACK)?;
    a.push(rax)?;
    a.push(flags as i32)?;
    a.push(i32::from(sel::USER_CODE64))?;
    a.mov(rax, USER)?;
    a.push(rax)?;
    a.iretq()
}

/// Ring 3 of 64-bit mode; the RESUME cell is visible there as page 100 of the window.
fn user_faulting(
    a: &mut CodeAssembler,
    act: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Result<(), IcedError> {
    let mut after = a.create_label();
    a.lea(rax, ptr(after))?;
    a.mov(rcx, USER + 100 * 0x1000 + (RESUME & 0xfff))?;
    a.mov(qword_ptr(rcx), rax)?;
    act(a)?;
    a.set_label(&mut after)?;
    a.nop()
}

fn share_resume(g: &Guest) {
    g.put_u64(USER_PT + 8 * 100, (RESUME & !0xfff) | 7);
}

fn user_restrictions(engine: &dyn Engine) {
    type Action = fn(&mut CodeAssembler) -> Result<(), IcedError>;
    let actions: &[(&str, Action)] = &[
        ("SGDT", |a| a.sgdt(ptr(rsp - 64))),
        ("SIDT", |a| a.sidt(ptr(rsp - 64))),
        ("SLDT", |a| a.sldt(eax)),
        ("STR", |a| a.str(eax)),
        ("SMSW", |a| a.smsw(eax)),
        ("RDTSC", |a| a.rdtsc()),
        ("CLI", |a| a.cli()),
        ("HLT", |a| a.hlt()),
        ("CLTS", |a| a.clts()),
        ("INVD", |a| a.invd()),
        ("WBINVD", |a| a.wbinvd()),
        ("INVLPG", |a| a.invlpg(ptr(rsp))),
        ("MOV from CR", |a| a.mov(rax, cr0)),
        ("MOV from DR", |a| a.mov(rax, dr0)),
        ("LGDT", |a| a.lgdt(ptr(rsp))),
        ("LTR", |a| a.ltr(eax)),
        ("RDMSR", |a| a.rdmsr()),
        ("WRMSR", |a| a.wrmsr()),
        ("SWAPGS", |a| a.swapgs()),
        ("SYSRET", |a| a.sysretq()),
        ("IN", |a| a.in_(al, 0x80)),
    ];
    for (name, action) in actions {
        let mut g = Guest::new(Mode::Long);
        if !g.has(&bits::UMIP) {
            return;
        }
        g.state.cr4 |= cr4::UMIP | cr4::TSD;
        share_resume(&g);
        g.assemble_at(USER_GPA, USER, 64, |a| {
            user_faulting(a, action)?;
            user_faulting(a, |a| a.int(0x20))?;
            // Ring 3 has no port here to end the guest: INT3 does it.
            a.int3()
        });
        let end = 0x10_4000u64;
        for (n, word) in crate::layout::gate64(end, sel::CODE64, 3, 0).into_iter().enumerate() {
            g.put_u64(IDT + 16 * 3 + 8 * n as u64, word);
        }
        g.assemble_at(end, end, 64, finish);
        g.code(64, |a| enter_user(a, 2));
        g.run(engine).expect(name, &[GP0, fault(13, 0x20 * 8 + 2, 0)].concat());
    }
}

fn bases(engine: &dyn Engine) {
    let mut g = Guest::new(Mode::Long);
    if !g.has(&bits::FSGSBASE) {
        return;
    }
    g.put_u32(DATA + 0x10, 0x1111);
    g.put_u32(DATA + 0x110, 0x2222);
    g.state.set_msr(msr::KERNEL_GS_BASE, DATA + 0x100);
    g.code(64, |a| {
        // Not enabled yet.
        faulting(a, |a| a.rdfsbase(rax))?;
        a.mov(rcx, cr4)?;
        a.or(ecx, cr4::FSGSBASE as i32)?;
        a.mov(cr4, rcx)?;
        a.mov(rcx, DATA)?;
        a.wrgsbase(rcx)?;
        a.mov(eax, ptr(0x10).gs())?;
        report(a)?;
        a.swapgs()?;
        a.mov(eax, ptr(0x10).gs())?;
        report(a)?;
        a.mov(ecx, msr::KERNEL_GS_BASE)?;
        a.rdmsr()?;
        report(a)?;
        a.rdgsbase(eax)?;
        report(a)?;
        a.mov(rcx, 1u64 << 47)?;
        faulting(a, |a| a.wrfsbase(rcx))?;
        // A selector load replaces the base.
        a.mov(ecx, i32::from(sel::DATA))?;
        a.mov(gs, ecx)?;
        a.rdgsbase(eax)?;
        report(a)?;
        finish(a)
    });
    let mut expected = UD.to_vec();
    expected.extend([0x1111, 0x2222, DATA as u32, DATA as u32 + 0x100]);
    expected.extend(GP0);
    expected.push(0);
    g.run(engine).expect("bases", &expected);
}

fn invpcid(engine: &dyn Engine) {
    let g = Guest::new(Mode::Long);
    if !g.has(&bits::PCID) || !g.has(&bits::INVPCID) {
        return;
    }
    for n in 0..5u64 {
        g.put_u32(USER_GPA + 0x1000 * n, 0x100 + n as u32);
    }
    let (page, pte) = (USER, USER_PT);
    g.code(64, |a| {
        a.mov(rcx, cr4)?;
        a.or(ecx, cr4::PCIDE as i32)?;
        a.mov(cr4, rcx)?;
        a.mov(rcx, TABLES | 5)?;
        a.mov(cr3, rcx)?;
        a.mov(rbx, page)?;
        a.mov(eax, dword_ptr(rbx))?;
        report(a)?;
        // After each change of the entry, each type of INVPCID in turn.
        a.mov(qword_ptr(DATA as i32), 5)?;
        a.mov(qword_ptr(DATA as i32 + 8), rbx)?;
        for kind in 0..4u64 {
            a.mov(qword_ptr(pte as i32), (USER_GPA as i32 + 0x1000 * (kind as i32 + 1)) | 7)?;
            a.mov(rcx, kind)?;
            a.invpcid(rcx, xmmword_ptr(DATA as i32))?;
            a.mov(eax, dword_ptr(rbx))?;
            report(a)?;
        }
        a.mov(ecx, 4)?;
        faulting(a, |a| a.invpcid(rcx, xmmword_ptr(DATA as i32)))?;
        a.mov(qword_ptr(DATA as i32), 0x1000)?;
        a.mov(ecx, 1)?;
        faulting(a, |a| a.invpcid(rcx, xmmword_ptr(DATA as i32)))?;
        a.mov(qword_ptr(DATA as i32), 5)?;
        a.mov(rax, 1u64 << 63 >> 1)?;
        a.mov(qword_ptr(DATA as i32 + 8), rax)?;
        a.xor(ecx, ecx)?;
        faulting(a, |a| {
            a.xor(ecx, ecx)?;
            a.invpcid(rcx, xmmword_ptr(DATA as i32))
        })?;
        finish(a)
    });
    let mut expected = vec![0x100, 0x101, 0x102, 0x103, 0x104];
    expected.extend(GP0.repeat(3));
    g.run(engine).expect("INVPCID", &expected);
}

fn xcr0(engine: &dyn Engine) {
    let g = Guest::new(Mode::Long);
    if !g.has(&bits::XSAVE) || !g.has(&bits::AVX) {
        return;
    }
    g.code(64, |a| {
        a.xor(ecx, ecx)?;
        faulting(a, |a| {
            a.xor(ecx, ecx)?;
            a.xgetbv()
        })?;
        a.mov(rcx, cr4)?;
        a.or(ecx, cr4::OSXSAVE as i32)?;
        a.mov(cr4, rcx)?;
        // CPUID.1:ECX.OSXSAVE follows CR4.
        a.mov(eax, 1)?;
        a.cpuid()?;
        a.mov(eax, ecx)?;
        a.shr(eax, 27)?;
        a.and(eax, 1)?;
        report(a)?;
        for value in [7, 3, 1] {
            a.xor(ecx, ecx)?;
            a.xor(edx, edx)?;
            a.mov(eax, value)?;
            a.xsetbv()?;
            a.xgetbv()?;
            report(a)?;
            // CPUID.D.0:EBX is the size for what is enabled.
            a.mov(eax, 0xd)?;
            a.xor(ecx, ecx)?;
            a.cpuid()?;
            a.mov(eax, ebx)?;
            report(a)?;
        }
        // x87 off, AVX without SSE, an unknown component, another register.
        for (register, value) in [(0, 2), (0, 5), (0, 0x8000_0001u32), (1, 1)] {
            faulting(a, |a| {
                a.mov(ecx, register)?;
                a.xor(edx, edx)?;
                a.mov(eax, value)?;
                a.xsetbv()
            })?;
        }
        finish(a)
    });
    let mut expected = UD.to_vec();
    expected.extend([1, 7, 832, 3, 576, 1, 576]);
    expected.extend(GP0.repeat(4));
    g.run(engine).expect("XCR0", &expected);
}

fn io_bitmap(engine: &dyn Engine) {
    let mut g = Guest::new(Mode::Long);
    share_resume(&g);
    // A bitmap behind the TSS that allows only the harness's ports 0xf0-0xf7, and 0x3f8 (not 0x3f9).
    g.state.tr.limit = 0x68 + 0x100;
    g.put(TSS + 0x66, &0x68u16.to_le_bytes());
    let mut bitmap = [0xffu8; 0x101];
    bitmap[0xf0 / 8] = 0;
    bitmap[0x3f8 / 8] = 0xfe;
    g.put(TSS + 0x68, &bitmap);
    g.assemble_at(USER_GPA, USER, 64, |a| {
        a.mov(edx, 0x3f8)?;
        a.in_(al, dx)?;
        user_faulting(a, |a| a.in_(ax, dx))?;
        user_faulting(a, |a| a.in_(al, 0x80))?;
        a.mov(edx, 0x900)?;
        user_faulting(a, |a| a.out(dx, al))?;
        a.mov(eax, 0x99u32)?;
        report(a)?;
        finish(a)
    });
    g.code(64, |a| enter_user(a, 2));
    let mut expected = GP0.repeat(3);
    expected.push(0x99);
    g.run(engine).expect("I/O bitmap", &expected);
}

fn ldt(engine: &dyn Engine) {
    let g = Guest::new(Mode::Protected);
    let (free, table) = (sel::FREE, 0x3_0000u64);
    g.put_u64(GDT + u64::from(free), descriptor(table as u32, 0x1f, attr::P | 2));
    // LDT 1: data at DATA; LDT 2: not present; LDT 3: execute-only code.
    g.put_u64(table + 8, descriptor(DATA as u32, 0xff, attr::P | attr::S | 2));
    g.put_u64(table + 16, descriptor(DATA as u32, 0xff, attr::S | 2));
    g.put_u64(table + 24, descriptor(0, 0xff, attr::P | attr::S | 8));
    g.put_u32(DATA + 4, 0x1d7);
    let in_ldt = |n: i32| 8 * n + 4;
    g.code(32, |a| {
        let selector_fault = |a: &mut CodeAssembler, act: &dyn Fn(&mut CodeAssembler) -> Result<(), IcedError>| {
            let mut inner = a.create_label();
            let mut after = a.create_label();
            a.call(inner)?;
            a.jmp(after)?;
            a.set_label(&mut inner)?;
            a.pop(dword_ptr(RESUME as u32))?;
            act(a)?;
            a.set_label(&mut after)?;
            a.nop()
        };
        a.mov(ecx, i32::from(free))?;
        a.lldt(ecx)?;
        a.sldt(eax)?;
        report(a)?;
        a.mov(ecx, in_ldt(1))?;
        a.mov(fs, ecx)?;
        a.mov(eax, ptr(4).fs())?;
        report(a)?;
        // Loading it has set the accessed bit.
        a.movzx(eax, byte_ptr(table as i32 + 13))?;
        report(a)?;
        for n in 2..5 {
            a.mov(ecx, in_ldt(n))?;
            selector_fault(a, &|a| a.mov(fs, ecx))?;
        }
        // LSL, LAR; VERR and VERW of data, of execute-only code, and of what is outside.
        a.mov(ecx, in_ldt(1))?;
        a.lsl(eax, ecx)?;
        report(a)?;
        a.lar(eax, ecx)?;
        report(a)?;
        for n in [1, 3, 4] {
            a.mov(ecx, in_ldt(n))?;
            a.xor(eax, eax)?;
            a.verr(cx)?;
            a.setz(al)?;
            a.verw(cx)?;
            a.setz(ah)?;
            report(a)?;
        }
        // No LDT.
        a.xor(ecx, ecx)?;
        a.lldt(ecx)?;
        a.mov(ecx, in_ldt(1))?;
        selector_fault(a, &|a| a.mov(fs, ecx))?;
        a.mov(ecx, i32::from(sel::DATA))?;
        selector_fault(a, &|a| a.lldt(ecx))?;
        selector_fault(a, &|a| a.ltr(ecx))?;
        finish(a)
    });
    let error = |n: u32| 8 * n + 4;
    let mut expected = vec![u32::from(free), 0x1d7, 0x93];
    expected.extend(fault(11, error(2), 0));
    expected.extend(fault(13, error(3), 0));
    expected.extend(fault(13, error(4), 0));
    expected.extend([0xff, 0x9300, 0x101, 0, 0]);
    expected.extend(fault(13, error(1), 0));
    expected.extend(fault(13, u32::from(sel::DATA), 0));
    expected.extend(fault(13, u32::from(sel::DATA), 0));
    g.run(engine).expect("LDT", &expected);
}

fn popf(engine: &dyn Engine) {
    let g = Guest::new(Mode::Long);
    let all = (rflags::IF | rflags::IOPL | rflags::NT | rflags::AC | rflags::ID) as i32;
    let shown = all as u32;
    g.assemble_at(USER_GPA, USER, 64, |a| {
        // IOPL is 3: IF may change, IOPL may not.
        a.push(2)?;
        a.popfq()?;
        a.pushfq()?;
        a.pop(rax)?;
        a.and(eax, all)?;
        report(a)?;
        a.push(all | 2)?;
        a.popfq()?;
        a.pushfq()?;
        a.pop(rax)?;
        a.push(2)?;
        a.popfq()?;
        a.and(eax, all)?;
        report(a)?;
        finish(a)
    });
    g.code(64, |a| {
        a.push(all & !(rflags::IF as i32) | 2)?;
        a.popfq()?;
        a.pushfq()?;
        a.pop(rax)?;
        a.push(2)?;
        a.popfq()?;
        a.and(eax, all)?;
        report(a)?;
        enter_user(a, rflags::IOPL | 2)
    });
    let iopl = rflags::IOPL as u32;
    g.run(engine).expect("POPF", &[shown & !(rflags::IF as u32), iopl, shown]);
}

fn sysenter(engine: &dyn Engine) {
    let mut g = Guest::new(Mode::Protected);
    if !g.has(&bits::SEP) {
        return;
    }
    let (kernel, user, stack) = (0x10_4000u64, 0x10_8000u64, 0x9_8000u64);
    // Four descriptors in a row: ring 0 code and data, ring 3 code and data.
    let free = u64::from(sel::FREE);
    let flat = attr::P | attr::S | attr::DB | attr::G;
    for (n, rights) in [flat | 0xb, flat | 3, flat | 0xb | attr::DPL, flat | 3 | attr::DPL].into_iter().enumerate() {
        g.put_u64(GDT + free + 8 * n as u64, descriptor(0, 0xf_ffff, rights));
    }
    g.state.set_msr(msr::SYSENTER_CS, free);
    g.state.set_msr(msr::SYSENTER_ESP, stack);
    g.state.set_msr(msr::SYSENTER_EIP, kernel);
    g.assemble_at(kernel, kernel, 32, |a| {
        a.mov(eax, cs)?;
        report(a)?;
        a.mov(eax, ss)?;
        report(a)?;
        a.mov(eax, esp)?;
        report(a)?;
        a.push(eax)?;
        a.mov(edx, ebx)?;
        a.mov(ecx, 0x9_0000)?;
        a.sysexit()
    });
    g.assemble_at(user, user, 32, |a| {
        let mut inner = a.create_label();
        let mut after = a.create_label();
        a.call(inner)?;
        a.jmp(after)?;
        a.set_label(&mut inner)?;
        a.pop(ebx)?;
        a.sysenter()?;
        a.set_label(&mut after)?;
        a.mov(eax, cs)?;
        report(a)?;
        a.mov(eax, ss)?;
        report(a)?;
        a.mov(eax, esp)?;
        report(a)?;
        finish(a)
    });
    g.code(32, |a| {
        for value in [i32::from(sel::USER_DATA), 0x9_0000, 0x3002, i32::from(sel::USER_CODE32), user as i32] {
            a.push(value)?;
        }
        a.iretd()
    });
    let free = free as u32;
    g.run(engine).expect("SYSENTER", &[free, free + 8, stack as u32, free + 0x13, free + 0x1b, 0x9_0000]);
}

fn sixteen_bit(engine: &dyn Engine) {
    let g = Guest::new(Mode::Protected);
    let (code, handler) = (0x3_0000u64, 0x3_4000u64);
    let free = u64::from(sel::FREE);
    g.put_u64(GDT + free, descriptor(code as u32, 0xffff, attr::P | attr::S | 0xb));
    // A 16-bit trap gate to offset 0x4000 of that segment.
    g.put_u64(IDT + 8 * 0x60, crate::layout::gate32(handler - code, sel::FREE, 7, 0));
    g.assemble_at(handler, handler - code, 16, |a| {
        // The frame has three words.
        a.mov(bp, sp)?;
        a.mov(eax, dword_ptr(bp))?;
        report(a)?;
        a.movzx(eax, word_ptr(bp + 4))?;
        a.and(eax, 0xfd)?;
        report(a)?;
        a.mov(eax, esp)?;
        report(a)?;
        a.iret()
    });
    g.assemble_at(code, 0, 16, |a| {
        // A 16-bit stack: the upper half of ESP stays.
        a.mov(cx, u32::from(sel::DATA16))?;
        a.mov(ss, cx)?;
        a.mov(esp, 0x1234_8000)?;
        a.push(ax)?;
        a.mov(eax, esp)?;
        report(a)?;
        a.xor(ax, ax)?;
        a.int(0x60)?;
        a.mov(eax, esp)?;
        report(a)?;
        finish(a)
    });
    g.code(32, |a| {
        let selector = sel::FREE.to_le_bytes();
        a.db(&[0xea, 0, 0, 0, 0, selector[0], selector[1]])
    });
    let outcome = g.run(engine);
    assert_eq!(outcome.end, crate::End::Exited, "{:x?}", outcome.results);
    let r = &outcome.results;
    assert_eq!(r[0], 0x1234_7ffe);
    assert_eq!(r[1] >> 16, u32::from(sel::FREE), "CS of the frame");
    let mut bytes = [0; 2];
    let back = code + u64::from(r[1] & 0xffff);
    outcome.memory.read(partition::Gpa(back - 2), &mut bytes).expect("inside RAM");
    assert_eq!(bytes, [0xcd, 0x60], "IP of the frame");
    assert_eq!(r[2], 0x44, "flags after XOR: ZF and PF");
    assert_eq!((r[3], r[4]), (0x1234_7ff8, 0x1234_7ffe));
}
