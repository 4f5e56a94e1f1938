//! Processor states in which images are entered, and the tables that these need.

use crate::layout::boot;
use partition::{Gpa, GuestMemory, MemoryError, VpState};
use x86::paging::PAGE_SIZE;
use x86::regs::{cr0, cr4, efer, gpr};
use x86::segment::{Segment, TableRegister, attr, sreg};

/// Selectors in the table that [`write_gdt`] makes. The code and data selectors of 64-bit entries are those that the
/// Linux boot protocol asks for (`__BOOT_CS`, `__BOOT_DS`).
const CODE32: u16 = 0x08;
const CODE64: u16 = 0x10;
const DATA: u16 = 0x18;

const FLAT: Segment =
    Segment { base: 0, limit: 0xffff_ffff, attr: attr::P | attr::S | attr::DB | attr::G | 3, selector: DATA };

/// The descriptor of a flat segment with these attributes.
const fn descriptor(attr: u32) -> u64 {
    // Base 0; limit 0xfffff in pages.
    0xffff | 0xf << 48 | (attr as u64) << 40
}

fn write_gdt(memory: &GuestMemory) -> Result<TableRegister, MemoryError> {
    let code32 = attr::P | attr::S | attr::G | attr::DB | 0xb;
    let code64 = attr::P | attr::S | attr::G | attr::L | 0xb;
    let table = [0, descriptor(code32), descriptor(code64), descriptor(FLAT.attr)];
    for (i, entry) in table.iter().enumerate() {
        memory.write(Gpa(boot::GDT + 8 * i as u64), &entry.to_le_bytes())?;
    }
    Ok(TableRegister { base: boot::GDT, limit: 8 * table.len() as u16 - 1 })
}

/// Maps the first 4 GiB to themselves with 2 MiB pages, which every 64-bit processor has.
fn write_page_tables(memory: &GuestMemory) -> Result<u64, MemoryError> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    let directory_pointers = boot::PAGE_TABLES + PAGE_SIZE;
    let directories = directory_pointers + PAGE_SIZE;
    memory.fill(Gpa(boot::PAGE_TABLES), 0, 2 * PAGE_SIZE)?;
    memory.write(Gpa(boot::PAGE_TABLES), &(directory_pointers | PRESENT_WRITABLE).to_le_bytes())?;
    for i in 0..4 {
        let entry = (directories + i * PAGE_SIZE) | PRESENT_WRITABLE;
        memory.write(Gpa(directory_pointers + 8 * i), &entry.to_le_bytes())?;
    }
    let entries: Vec<u8> = (0..4 * 512u64).flat_map(|i| ((i << 21) | LARGE | PRESENT_WRITABLE).to_le_bytes()).collect();
    memory.write(Gpa(directories), &entries)?;
    Ok(boot::PAGE_TABLES)
}

/// Real mode at `address`.
pub fn real(mut state: VpState, address: u64) -> VpState {
    state.segments = [Segment::real(0); 6];
    state.segments[sreg::CS] = Segment { attr: attr::P | attr::S | 0xb, ..Segment::real((address >> 4) as u16) };
    state.rip = address & 15;
    state.gprs[gpr::RSP] = boot::STACK;
    state.idtr = TableRegister { base: 0, limit: 0x3ff };
    state
}

fn flat(memory: &GuestMemory, state: &mut VpState, entry: u64) -> Result<(), MemoryError> {
    state.gdtr = write_gdt(memory)?;
    state.idtr = TableRegister::default();
    state.segments = [FLAT; 6];
    state.tr = Segment { base: 0, limit: 0x67, attr: attr::P | 0xb, selector: 0 };
    state.ldtr = Segment { attr: attr::UNUSABLE, ..Segment::default() };
    state.rip = entry;
    state.gprs = [0; 16];
    state.gprs[gpr::RSP] = boot::STACK;
    Ok(())
}

/// 32-bit protected mode, paging off, interrupts off (the state that PVH asks for).
pub fn protected(memory: &GuestMemory, mut state: VpState, entry: u64) -> Result<VpState, MemoryError> {
    flat(memory, &mut state, entry)?;
    state.segments[sreg::CS] = Segment { attr: attr::P | attr::S | attr::DB | attr::G | 0xb, selector: CODE32, ..FLAT };
    state.cr0 = cr0::PE | cr0::ET;
    Ok(state)
}

/// 64-bit mode, the first 4 GiB mapped to themselves, interrupts off (the state that Linux's 64-bit entry asks for).
pub fn long(memory: &GuestMemory, mut state: VpState, entry: u64) -> Result<VpState, MemoryError> {
    flat(memory, &mut state, entry)?;
    state.segments[sreg::CS] = Segment { attr: attr::P | attr::S | attr::L | attr::G | 0xb, selector: CODE64, ..FLAT };
    state.cr3 = write_page_tables(memory)?;
    state.cr4 = cr4::PAE;
    state.efer = efer::LME | efer::LMA;
    state.cr0 = cr0::PE | cr0::ET | cr0::PG;
    Ok(state)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_says_what_the_registers_say() {
        let memory = GuestMemory::with_ram(2 << 20, crate::layout::HOLE, false).unwrap();
        for state in [
            protected(&memory, VpState::reset(0, 0), 0x1000).unwrap(),
            long(&memory, VpState::reset(0, 0), 0x1000).unwrap(),
        ] {
            for s in [sreg::CS, sreg::DS] {
                let hidden = state.segments[s];
                let raw = memory.read_plain::<u64>(Gpa(state.gdtr.base + u64::from(hidden.selector))).unwrap();
                assert_eq!(Segment::from_descriptor(hidden.selector, raw), hidden);
            }
        }
        // 0x12345678 is mapped to itself.
        let large = memory.read_plain::<u64>(Gpa(boot::PAGE_TABLES + 2 * PAGE_SIZE + (0x1234_5678 >> 21) * 8)).unwrap();
        assert_eq!(large, 0x1220_0083);
    }
}
