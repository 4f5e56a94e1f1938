//! SMBIOS tables: who made the machine, and what memory it has.
//!
//! Source: DMTF DSP0134 (SMBIOS 3.6), section 5.2.2 (64-bit entry point) and chapter 7 (structures). Guests search the
//! entry point at multiples of 16 from 0xF0000 (section 5.2.1).

use partition::{Gpa, GuestMemory, MemoryError};

/// Where the entry point is.
pub const ENTRY_POINT: u64 = 0xf_0000;
const TABLE: u64 = ENTRY_POINT + 0x20;
/// Capacity that a type 17 structure cannot say in its own 15 bits of MiB: the extended field says it.
const EXTENDED_SIZE: u16 = 0x7fff;

/// A table under construction.
#[derive(Default)]
struct Builder {
    bytes: Vec<u8>,
    handle: u16,
}

impl Builder {
    /// Adds a structure: its fields after the header, and its strings, which fields name by number from 1.
    fn add(&mut self, kind: u8, fields: &[&[u8]], strings: &[&str]) -> u16 {
        let len = 4 + fields.iter().map(|f| f.len()).sum::<usize>();
        let handle = self.handle;
        self.handle += 1;
        self.bytes.extend([kind, len as u8]);
        self.bytes.extend(handle.to_le_bytes());
        fields.iter().for_each(|field| self.bytes.extend(*field));
        for string in strings {
            self.bytes.extend(string.bytes());
            self.bytes.push(0);
        }
        // The string set ends with a zero; an empty one has two.
        self.bytes.extend(if strings.is_empty() { &[0, 0][..] } else { &[0] });
        handle
    }
}

/// The structure table of a machine with this much RAM.
pub fn table(ram_bytes: u64) -> Vec<u8> {
    let mut b = Builder::default();
    // Type 0, firmware: vendor, version, segment, release date, ROM size; characteristics "not supported" (bit 3);
    // extension bytes: ACPI, and "this is a virtual machine" (bit 4); firmware and controller release.
    let characteristics = 1u64 << 3;
    b.add(
        0,
        &[
            &[1, 2],
            &0xe800u16.to_le_bytes(),
            &[3, 0],
            &characteristics.to_le_bytes(),
            &[1, 0x10, 0, 1, 0xff, 0xff],
            &[0; 2],
        ],
        &["Viridian", env!("CARGO_PKG_VERSION"), "01/01/2026"],
    );
    // Type 1, system: manufacturer, product, version, serial number, UUID (all zero: none), wake-up by power switch,
    // SKU, family.
    b.add(1, &[&[1, 2, 3, 0], &[0; 16], &[6, 0, 0]], &["Viridian", "Virtual Machine", env!("CARGO_PKG_VERSION")]);
    // Type 3, chassis: manufacturer, type "other", no version, serial number or tag; states safe and unknown.
    b.add(3, &[&[1, 1, 0, 0, 0, 3, 3, 3, 2], &[0; 4], &[0, 0, 0, 0, 0]], &["Viridian"]);
    // Type 16, memory array: on the board, system memory, multi-bit ECC "none" (3); capacity in the extended field.
    let array = b.add(
        16,
        &[
            &[3, 3, 3],
            &0x8000_0000u32.to_le_bytes(),
            &0xfffeu16.to_le_bytes(),
            &1u16.to_le_bytes(),
            &ram_bytes.to_le_bytes(),
        ],
        &[],
    );
    // Type 17, one memory device with everything.
    let mib = ram_bytes >> 20;
    let (size, extended) = match u16::try_from(mib) {
        Ok(size) if size < EXTENDED_SIZE => (size, 0),
        _ => (EXTENDED_SIZE, mib as u32),
    };
    let mut device = Vec::new();
    for value in [array, 0xfffe, 64, 64, size] {
        device.extend(value.to_le_bytes());
    }
    // Form factor DIMM, no set, locator, no bank, type RAM, detail "synchronous", speed unknown, no names.
    device.extend([9, 0, 1, 0, 7, 0x80, 0, 0, 0, 0, 0, 0, 0, 0]);
    device.extend(extended.to_le_bytes());
    // Configured speed and three voltages: unknown.
    device.extend([0; 8]);
    b.add(17, &[&device], &["RAM"]);
    // Type 19, the addresses of the array: in the extended fields, inclusive.
    let last = match ram_bytes.checked_sub(crate::layout::HOLE.start) {
        Some(high) if high > 0 => crate::layout::HOLE.end + high - 1,
        _ => ram_bytes - 1,
    };
    b.add(
        19,
        &[
            &u32::MAX.to_le_bytes(),
            &u32::MAX.to_le_bytes(),
            &array.to_le_bytes(),
            &[1],
            &0u64.to_le_bytes(),
            &last.to_le_bytes(),
        ],
        &[],
    );
    // Type 32, boot status: no errors.
    b.add(32, &[&[0; 7]], &[]);
    b.add(127, &[], &[]);
    b.bytes
}

/// Writes entry point and table of a machine with this much RAM.
pub fn write(memory: &GuestMemory, ram_bytes: u64) -> Result<(), MemoryError> {
    let table = table(ram_bytes);
    memory.write(Gpa(TABLE), &table)?;
    memory.write(Gpa(ENTRY_POINT), &entry_point(&table))
}

fn entry_point(table: &[u8]) -> Vec<u8> {
    // Anchor, checksum, length, version 3.6, document revision, entry point revision 1.
    let mut entry = b"_SM3_\0\x18\x03\x06\0\x01\0".to_vec();
    entry.extend((table.len() as u32).to_le_bytes());
    entry.extend(TABLE.to_le_bytes());
    entry[5] = entry.iter().fold(0u8, |sum, byte| sum.wrapping_sub(*byte));
    entry
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_can_be_walked() {
        for ram in [64 << 20, 3 << 30, 100u64 << 30] {
            let table = table(ram);
            let entry = entry_point(&table);
            assert_eq!((entry.len(), entry.iter().fold(0u8, |s, b| s.wrapping_add(*b))), (24, 0));
            let (mut at, mut kinds) = (0, Vec::new());
            while at < table.len() {
                kinds.push((table[at], table[at + 1]));
                if table[at] == 17 {
                    let size = u64::from(u16::from_le_bytes([table[at + 12], table[at + 13]]));
                    let extended = u32::from_le_bytes(table[at + 28..at + 32].try_into().unwrap());
                    assert_eq!(if size == 0x7fff { u64::from(extended) } else { size }, ram >> 20);
                }
                at += usize::from(table[at + 1]);
                at += table[at..].windows(2).position(|w| w == [0, 0]).unwrap() + 2;
            }
            // Lengths are those of the specification for the version in which each was completed.
            assert_eq!(kinds, [(0, 26), (1, 27), (3, 22), (16, 23), (17, 40), (19, 31), (32, 11), (127, 4)]);
        }
    }
}
