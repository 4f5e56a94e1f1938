//! Viridian's own firmware, as it is placed in a guest's memory.
//!
//! The layout is that of Hyper-V's firmware: the image from 1 MiB on, page tables at 0x700000, the configuration blob at
//! 0x709000, entry in 64-bit mode.

use partition::{Gpa, GuestMemory, MemoryError};

/// The image: code and data as they lie in memory.
static IMAGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/firmware.bin"));
/// Bytes in memory: the image and zeros behind it.
const MEMORY: u64 = include!(concat!(env!("OUT_DIR"), "/firmware_memory.rs"));

/// Where the image is placed; it is entered at its first byte.
pub const BASE: u64 = 0x10_0000;
/// Page tables that map the first 4 GiB to themselves: PML4, PDPT, four page directories.
pub const PAGE_TABLES: u64 = 0x70_0000;
/// Global descriptor table: null, 64-bit code (selector 8), data (selector 16).
pub const GDT: u64 = 0x70_8000;
/// The configuration blob.
pub const BLOB: u64 = 0x70_9000;
/// End of what is used below; a machine needs at least this much RAM for its firmware.
pub const END: u64 = 0x100_0000;

/// Selectors of the descriptors that [`place`] writes.
pub const CODE_SELECTOR: u16 = 8;
/// See [`CODE_SELECTOR`].
pub const DATA_SELECTOR: u16 = 16;

/// Bytes of the embedded image.
pub fn image_size() -> usize {
    IMAGE.len()
}

/// Places image, page tables, descriptors and blob. The VP then starts in 64-bit mode with CR3 = [`PAGE_TABLES`], at
/// [`BASE`].
pub fn place(memory: &GuestMemory, blob: &[u8]) -> Result<(), MemoryError> {
    memory.write(Gpa(BASE), IMAGE)?;
    let len = IMAGE.len() as u64;
    memory.fill(Gpa(BASE + len), 0, MEMORY.next_multiple_of(4096) - len)?;
    surroundings(memory, blob)
}

/// As [`place`], with an image of Hyper-V's layout instead, which is entered at [`crate::volume::entry`].
pub fn place_image(memory: &GuestMemory, image: &[u8], blob: &[u8]) -> Result<(), MemoryError> {
    memory.write(Gpa(BASE), image)?;
    surroundings(memory, blob)
}

/// Page tables, descriptors and blob.
fn surroundings(memory: &GuestMemory, blob: &[u8]) -> Result<(), MemoryError> {
    let entry = |at: u64, value: u64| memory.write(Gpa(at), &value.to_le_bytes());
    memory.fill(Gpa(PAGE_TABLES), 0, 6 * 4096)?;
    entry(PAGE_TABLES, (PAGE_TABLES + 0x1000) | 3)?;
    for gigabyte in 0..4 {
        let directory = PAGE_TABLES + 0x2000 + gigabyte * 0x1000;
        entry(PAGE_TABLES + 0x1000 + gigabyte * 8, directory | 3)?;
        for i in 0..512 {
            // Present, writable, 2 MiB.
            entry(directory + i * 8, ((gigabyte << 30) + (i << 21)) | 0x83)?;
        }
    }
    entry(GDT, 0)?;
    entry(GDT + 8, 0x00af_9b00_0000_ffff)?;
    entry(GDT + 16, 0x00cf_9300_0000_ffff)?;
    memory.write(Gpa(BLOB), blob)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_image_is_small_and_fits_its_place() {
        assert!(image_size() <= 3 << 19, "the firmware image has {} bytes, the limit is 1.5 MiB", image_size());
        const { assert!(BASE + MEMORY <= PAGE_TABLES) };
        let memory = GuestMemory::with_ram(END, 0xc000_0000..1 << 32, false).unwrap();
        place(&memory, &[1; 64]).unwrap();
        let mut first = [0];
        memory.read(Gpa(BASE), &mut first).unwrap();
        assert_eq!(first, [0xfa], "the image starts with CLI");
    }
}
