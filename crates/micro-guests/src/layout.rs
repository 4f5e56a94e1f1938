//! Where things are in a micro-guest, and the state that it starts from.

use iced_x86::code_asm::*;
use iced_x86::{BlockEncoderOptions, IcedError};
use partition::{Gpa, GuestMemory, VpState};
use x86::regs::gpr::RSP;
use x86::regs::{cr0, cr4, efer, rflags};
use x86::segment::{Segment, TableRegister, attr, sreg};

/// Main code, linear and physical.
pub const CODE: u64 = 0x10_0000;
/// Main code in real mode.
pub const REAL_CODE: u64 = 0x8000;
/// Top of the stack.
pub const STACK: u64 = 0x9_f000;
/// Ring 0 stack in the TSS.
pub const STACK0: u64 = 0x9_e000;
/// IST 1.
pub const IST1: u64 = 0x9_d000;
/// GDT.
pub const GDT: u64 = 0x1000;
/// IDT.
pub const IDT: u64 = 0x2000;
/// TSS (64- or 32-bit).
pub const TSS: u64 = 0x4000;
/// Where the fault handler goes on: the guest stores an address here before it faults.
pub const RESUME: u64 = 0x5000;
/// Scratch memory.
pub const DATA: u64 = 0x2_0000;
/// First page-table page: PML4, PDPT, 4 page directories, then those of the user window.
pub const TABLES: u64 = 0x1_0000;
/// The user window's page table.
pub const USER_PT: u64 = 0x1_8000;
/// The user window: 512 small pages, linear.
pub const USER: u64 = 0x80_0000_0000;
/// Physical address of the user window's first page.
pub const USER_GPA: u64 = 0x20_0000;
/// Top of the user stack (page 64 of the window).
pub const USER_STACK: u64 = USER + 0x4_0000;

/// Selectors.
pub mod sel {
    #![allow(missing_docs)]
    pub const CODE64: u16 = 0x08;
    pub const DATA: u16 = 0x10;
    pub const CODE32: u16 = 0x18;
    pub const USER_DATA: u16 = 0x23;
    pub const USER_CODE64: u16 = 0x2b;
    pub const USER_CODE32: u16 = 0x33;
    pub const CODE16: u16 = 0x38;
    pub const DATA16: u16 = 0x40;
    pub const TSS: u16 = 0x48;
    /// First that a test may define (the GDT has room up to 0xff).
    pub const FREE: u16 = 0x60;
}

/// Modes that a guest can start in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Real mode, segments zero, IP [`REAL_CODE`].
    Real,
    /// Flat protected mode without paging.
    Protected,
    /// 64-bit mode, identity mapping of 4 GiB by large supervisor pages, and the user window.
    Long,
}

/// A descriptor.
pub const fn descriptor(base: u32, limit: u32, rights: u32) -> u64 {
    let (base, limit, rights) = (base as u64, limit as u64, rights as u64);
    (limit & 0xffff)
        | (base & 0xff_ffff) << 16
        | (rights & 0xf0ff) << 40
        | (limit >> 16 & 0xf) << 48
        | (base >> 24) << 56
}

const P: u32 = attr::P;
const S: u32 = attr::S;
const FLAT: u32 = attr::G;
const USER_DPL: u32 = attr::DPL;

fn gdt(long: bool) -> Vec<u64> {
    let tss_kind = 9;
    let mut gdt = vec![
        0,
        descriptor(0, 0xf_ffff, P | S | 0xb | attr::L | FLAT),
        descriptor(0, 0xf_ffff, P | S | 3 | attr::DB | FLAT),
        descriptor(0, 0xf_ffff, P | S | 0xb | attr::DB | FLAT),
        descriptor(0, 0xf_ffff, P | S | 3 | attr::DB | FLAT | USER_DPL),
        descriptor(0, 0xf_ffff, P | S | 0xb | attr::L | FLAT | USER_DPL),
        descriptor(0, 0xf_ffff, P | S | 0xb | attr::DB | FLAT | USER_DPL),
        descriptor(0, 0xffff, P | S | 0xb),
        descriptor(0, 0xffff, P | S | 3),
        descriptor(TSS as u32, if long { 0x67 } else { 0x20ff }, P | tss_kind),
        0,
    ];
    gdt.resize(32, 0);
    gdt
}

/// The handler code: a stub for each vector and one common end that reports vector, error code and CR2, and goes on
/// at the address in [`RESUME`].
fn handlers(bits: u32) -> Result<(Vec<u8>, Vec<u64>), IcedError> {
    const BASE: u64 = 0x6000;
    let mut a = CodeAssembler::new(bits)?;
    let mut labels = Vec::new();
    let mut common = a.create_label();
    for vector in 0..=255u8 {
        let mut label = a.create_label();
        a.set_label(&mut label)?;
        labels.push(label);
        if !x86::exception::has_error_code(vector) {
            a.push(0)?;
        }
        a.push(i32::from(vector))?;
        a.jmp(common)?;
    }
    a.set_label(&mut common)?;
    if bits == 64 {
        a.push(rax)?;
        a.push(rdx)?;
        a.mov(edx, u32::from(crate::RESULT_PORT))?;
        a.mov(eax, dword_ptr(rsp + 16))?;
        a.out(dx, eax)?;
        a.mov(eax, dword_ptr(rsp + 24))?;
        a.out(dx, eax)?;
        a.mov(rax, cr2)?;
        a.out(dx, eax)?;
        a.mov(rax, qword_ptr(RESUME))?;
        a.mov(qword_ptr(rsp + 32), rax)?;
        a.pop(rdx)?;
        a.pop(rax)?;
        a.add(rsp, 16)?;
        a.iretq()?;
    } else {
        a.push(eax)?;
        a.push(edx)?;
        a.mov(edx, u32::from(crate::RESULT_PORT))?;
        a.mov(eax, dword_ptr(esp + 8))?;
        a.out(dx, eax)?;
        a.mov(eax, dword_ptr(esp + 12))?;
        a.out(dx, eax)?;
        a.mov(eax, cr2)?;
        a.out(dx, eax)?;
        a.mov(eax, ptr(RESUME))?;
        a.mov(dword_ptr(esp + 16), eax)?;
        a.pop(edx)?;
        a.pop(eax)?;
        a.add(esp, 8)?;
        a.iretd()?;
    }
    let result = a.assemble_options(BASE, BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS)?;
    let entries = labels.iter().map(|l| result.label_ip(l)).collect::<Result<Vec<_>, _>>()?;
    Ok((result.inner.code_buffer, entries))
}

/// A 64-bit interrupt gate.
pub fn gate64(entry: u64, selector: u16, dpl: u64, ist: u64) -> [u64; 2] {
    let low = (entry & 0xffff)
        | u64::from(selector) << 16
        | ist << 32
        | (0x8e | dpl << 5) << 40
        | (entry >> 16 & 0xffff) << 48;
    [low, entry >> 32]
}

/// A 32-bit gate of this type (0xe interrupt, 0xf trap, 5 task).
pub fn gate32(entry: u64, selector: u16, kind: u64, dpl: u64) -> u64 {
    (entry & 0xffff) | u64::from(selector) << 16 | (0x80 | kind | dpl << 5) << 40 | (entry >> 16 & 0xffff) << 48
}

fn write_tables(memory: &GuestMemory, long: bool) {
    let put = |gpa: u64, value: u64| memory.write(Gpa(gpa), &value.to_le_bytes()).expect("inside RAM");
    for (n, entry) in gdt(long).into_iter().enumerate() {
        put(GDT + 8 * n as u64, entry);
    }
    let (code, entries) = handlers(if long { 64 } else { 32 }).expect("assembles");
    assert!(code.len() <= 0x2000, "handlers reach into real-mode code");
    memory.write(Gpa(0x6000), &code).expect("inside RAM");
    for (n, entry) in entries.into_iter().enumerate() {
        // INT3 and INTO are for everybody.
        let dpl = if n == 3 || n == 4 { 3 } else { 0 };
        if long {
            let [low, high] = gate64(entry, sel::CODE64, dpl, 0);
            put(IDT + 16 * n as u64, low);
            put(IDT + 16 * n as u64 + 8, high);
        } else {
            put(IDT + 8 * n as u64, gate32(entry, sel::CODE32, 0xe, dpl));
        }
    }
    if long {
        put(TSS + 4, STACK0);
        put(TSS + 0x24, IST1);
        // No I/O bitmap: it would start behind the limit.
        put(TSS + 0x60, 0x68 << 48);
    } else {
        put(TSS + 4, STACK0 | u64::from(sel::DATA) << 32);
        // The I/O bitmap follows at once, all ports allowed, closed by a byte of ones.
        put(TSS + 0x64, 0x68 << 16);
        memory.write(Gpa(TSS + 0x20ff), &[0xff]).expect("inside RAM");
    }
}

fn write_page_tables(memory: &GuestMemory) {
    let put = |gpa: u64, value: u64| memory.write(Gpa(gpa), &value.to_le_bytes()).expect("inside RAM");
    put(TABLES, (TABLES + 0x1000) | 3);
    for gib in 0..4u64 {
        let directory = TABLES + 0x2000 + 0x1000 * gib;
        put(TABLES + 0x1000 + 8 * gib, directory | 3);
        for n in 0..512u64 {
            put(directory + 8 * n, gib << 30 | n << 21 | 0x83);
        }
    }
    put(TABLES + 8, (TABLES + 0x6000) | 7);
    put(TABLES + 0x6000, (TABLES + 0x7000) | 7);
    put(TABLES + 0x7000, USER_PT | 7);
    for n in 0..512u64 {
        put(USER_PT + 8 * n, (USER_GPA + 0x1000 * n) | 7);
    }
}

fn segment(selector: u16, rights: u32) -> Segment {
    Segment { base: 0, limit: u32::MAX, attr: P | S | attr::G | rights, selector }
}

/// Writes tables and handlers, and sets the registers.
pub fn prepare(memory: &GuestMemory, state: &mut VpState, mode: Mode) {
    state.cr0 = cr0::ET | cr0::NE;
    if mode == Mode::Real {
        state.segments = [Segment::real(0); 6];
        state.segments[sreg::CS].attr |= 8;
        state.rip = REAL_CODE;
        state.gprs[RSP] = 0x7000;
        return;
    }
    let long = mode == Mode::Long;
    write_tables(memory, long);
    state.rip = CODE;
    state.gprs[RSP] = STACK;
    state.cr0 |= cr0::PE | cr0::WP;
    state.gdtr = TableRegister { base: GDT, limit: 0xff };
    state.idtr = TableRegister { base: IDT, limit: if long { 0xfff } else { 0x7ff } };
    let (code, big) = if long { (sel::CODE64, attr::L) } else { (sel::CODE32, attr::DB) };
    state.segments = [segment(sel::DATA, 3 | attr::DB); 6];
    state.segments[sreg::CS] = segment(code, 0xb | big);
    state.tr = Segment { base: TSS, limit: if long { 0x67 } else { 0x20ff }, attr: P | 0xb, selector: sel::TSS };
    state.ldtr = Segment { attr: attr::UNUSABLE, ..Segment::default() };
    // The descriptor in the GDT says busy, as LTR would have left it.
    let tss = GDT + u64::from(sel::TSS) + 5;
    memory.write(Gpa(tss), &[0x8b]).expect("inside RAM");
    if long {
        write_page_tables(memory);
        state.cr0 |= cr0::PG;
        state.cr3 = TABLES;
        state.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT;
        state.efer = efer::LME | efer::LMA | efer::NXE | efer::SCE;
    }
    // User code may use the result port.
    state.rflags = rflags::FIXED | rflags::IOPL;
}
