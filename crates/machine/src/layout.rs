//! Where things are in the guest physical address space.

use std::ops::Range;

/// Addresses below 4 GiB that are not RAM: local APICs, I/O APIC, firmware, and room for devices.
pub const HOLE: Range<u64> = 0xc000_0000..0x1_0000_0000;
/// MMIO for synthetic devices, inside [`HOLE`].
pub const VMBUS_MMIO: Range<u64> = 0xf800_0000..0xfc00_0000;
/// The window of a VGA adapter, which is not RAM on any PC.
pub const VGA: Range<u64> = 0xa_0000..0xc_0000;
/// End of conventional memory; the last KiB is where a BIOS keeps its extended data area.
pub const CONVENTIONAL_END: u64 = 0x9_fc00;
/// Firmware tables: the range that the ACPI specification (6.5, section 5.2.5.1) has searched for the RSDP.
pub const TABLES: Range<u64> = 0xe_0000..0x10_0000;
/// Start of the memory above 1 MiB.
pub const HIGH_MEMORY: u64 = 0x10_0000;
/// Local APICs.
pub const LOCAL_APIC: u64 = 0xfee0_0000;

/// Structures that the loaders leave for the first instructions of a guest, all in conventional memory.
pub mod boot {
    /// Global descriptor table.
    pub const GDT: u64 = 0x500;
    /// PVH start information, modules and memory map.
    pub const PVH_INFO: u64 = 0x6000;
    /// Linux's zero page.
    pub const ZERO_PAGE: u64 = 0x7000;
    /// Top of a stack for micro-guests; it grows down over unused memory.
    pub const STACK: u64 = 0x8ff0;
    /// Page tables that map the first 4 GiB to themselves: six pages.
    pub const PAGE_TABLES: u64 = 0x9000;
    /// Kernel command line.
    pub const COMMAND_LINE: u64 = 0x2_0000;
    /// Most bytes of it, with the final zero.
    pub const COMMAND_LINE_MAX: u64 = 0x1_0000;
}

/// Frame buffer of a generation 2 machine, at the start of [`VMBUS_MMIO`], as on Hyper-V.
pub mod frame_buffer {
    /// Address.
    pub const BASE: u64 = super::VMBUS_MMIO.start;
    /// Bytes.
    pub const SIZE: u64 = 8 << 20;
    /// Resolution when the machine starts.
    pub const WIDTH: u32 = 1024;
    /// See [`WIDTH`].
    pub const HEIGHT: u32 = 768;
}

/// Ports and interrupts of the board's devices.
pub mod io {
    /// PM block.
    pub const PM: u16 = 0x400;
    /// System control interrupt.
    pub const SCI: u8 = 9;
    /// COM1: port and interrupt.
    pub const COM1: (u16, u8) = (0x3f8, 4);
    /// COM2: port and interrupt.
    pub const COM2: (u16, u8) = (0x2f8, 3);
    /// Debug port for test programs.
    pub const DEBUG: u16 = 0xe9;
    /// The I/O APIC input of the PIT, which an interrupt source override makes known (IRQ 0).
    pub const PIT_PIN: u8 = 2;
    /// An OUT to this port is the hypercall instruction.
    pub const HYPERCALL: u8 = 0xe6;
}

/// What a range of the memory map is, by e820 type (ACPI 6.5, table 15.14).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RangeKind {
    /// Free RAM.
    Ram = 1,
    /// Not for the guest's use.
    Reserved = 2,
}

/// The memory map that loaders hand to the guest, ascending.
pub fn memory_map(ram_bytes: u64) -> Vec<(Range<u64>, RangeKind)> {
    let low = ram_bytes.min(HOLE.start);
    let mut map = vec![
        (0..CONVENTIONAL_END, RangeKind::Ram),
        (CONVENTIONAL_END..VGA.start, RangeKind::Reserved),
        (TABLES, RangeKind::Reserved),
        (HIGH_MEMORY..low, RangeKind::Ram),
    ];
    if ram_bytes > low {
        map.push((HOLE.end..HOLE.end + (ram_bytes - low), RangeKind::Ram));
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_map_is_ascending_and_complete() {
        for ram in [64 << 20, 3 << 30, 5u64 << 30] {
            let map = memory_map(ram);
            assert!(map.windows(2).all(|w| w[0].0.end <= w[1].0.start));
            let sum: u64 = map.iter().filter(|r| r.1 == RangeKind::Ram).map(|r| r.0.end - r.0.start).sum();
            assert_eq!(sum, ram - HIGH_MEMORY + CONVENTIONAL_END);
        }
    }
}
