//! A VP's state in words, for the error message of a triple fault.

use partition::{Gpa, GuestMemory, VpState};
use std::fmt::Write;
use x86::regs::{cr0, cr4, efer};
use x86::segment::sreg;

const NAMES: [&str; 16] =
    ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"];

/// Registers, segments, control registers and the bytes at RIP.
pub fn vp_state(vp: u32, s: &VpState, memory: &GuestMemory) -> String {
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = writeln!(text, "VP {vp}: rip {:016x} rflags {:08x}", s.rip, s.rflags);
    for row in NAMES.iter().zip(&s.gprs).collect::<Vec<_>>().chunks(4) {
        let row: Vec<String> = row.iter().map(|(name, value)| format!("{name:>3} {value:016x}")).collect();
        let _ = writeln!(text, "  {}", row.join("  "));
    }
    for (name, seg) in ["es", "cs", "ss", "ds", "fs", "gs"].iter().zip(&s.segments) {
        let _ = writeln!(
            text,
            "  {name} {:04x} base {:016x} limit {:08x} attributes {:05x}",
            seg.selector, seg.base, seg.limit, seg.attr
        );
    }
    let _ = writeln!(
        text,
        "  tr {:04x} base {:016x} limit {:08x}  ldtr {:04x} base {:016x} limit {:08x}",
        s.tr.selector, s.tr.base, s.tr.limit, s.ldtr.selector, s.ldtr.base, s.ldtr.limit
    );
    let _ = writeln!(
        text,
        "  gdtr {:016x} limit {:04x}  idtr {:016x} limit {:04x}",
        s.gdtr.base, s.gdtr.limit, s.idtr.base, s.idtr.limit
    );
    let _ = writeln!(
        text,
        "  cr0 {:08x}  cr2 {:016x}  cr3 {:016x}  cr4 {:08x}  efer {:04x}  xcr0 {:x}",
        s.cr0, s.cr2, s.cr3, s.cr4, s.efer, s.xcr0
    );
    let linear = s.segments[sreg::CS].base.wrapping_add(s.rip);
    let bytes: Vec<String> = (0..16u64)
        .map_while(|i| translate(s, memory, linear.wrapping_add(i)))
        .map_while(|gpa| memory.read_plain::<u8>(Gpa(gpa)).ok())
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let bytes = if bytes.is_empty() { "not mapped".into() } else { bytes.join(" ") };
    let _ = write!(text, "  bytes at rip: {bytes}");
    text
}

/// Translates a linear address by the state's page tables, without rights and without setting accessed bits.
fn translate(s: &VpState, memory: &GuestMemory, linear: u64) -> Option<u64> {
    if s.cr0 & cr0::PG == 0 {
        return Some(linear & 0xffff_ffff);
    }
    const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
    let wide = s.cr4 & cr4::PAE != 0;
    let levels: &[u32] = match (s.efer & efer::LMA != 0, wide) {
        (true, _) => &[39, 30, 21, 12],
        (false, true) => &[30, 21, 12],
        (false, false) => &[22, 12],
    };
    let mut table = s.cr3 & if wide && s.efer & efer::LMA == 0 { 0xffff_ffe0 } else { ADDRESS };
    for shift in levels {
        let entry = if wide {
            let index = linear >> shift & if *shift == 30 && levels.len() == 3 { 3 } else { 511 };
            memory.read_plain::<u64>(Gpa(table + index * 8)).ok()?
        } else {
            u64::from(memory.read_plain::<u32>(Gpa(table + (linear >> shift & 1023) * 4)).ok()?)
        };
        if entry & 1 == 0 {
            return None;
        }
        let large = *shift != 12 && *shift != 39 && entry & 0x80 != 0 && !(levels.len() == 3 && *shift == 30);
        if large || *shift == 12 {
            let offset = (1u64 << shift) - 1;
            return Some(entry & ADDRESS & !offset | linear & offset);
        }
        table = entry & ADDRESS;
    }
    None
}
