//! The Linux boot protocol: bzImage, entered in 64-bit mode, or in 32-bit protected mode if it is a 32-bit kernel.
//!
//! Source: Linux `Documentation/arch/x86/boot.rst` (offsets are those of its tables) and `zero-page.rst`.

use super::{BootError, Load, e820, entry};
use crate::layout::boot;
use partition::{Gpa, VpState};
use x86::regs::gpr;

/// Offsets in the file, and in the zero page, of the setup header's fields.
mod header {
    pub const START: usize = 0x1f1;
    pub const SETUP_SECTS: usize = 0x1f1;
    pub const BOOT_FLAG: usize = 0x1fe;
    /// The second byte of the jump instruction: the header ends this far behind 0x202.
    pub const JUMP: usize = 0x201;
    pub const MAGIC: usize = 0x202;
    pub const VERSION: usize = 0x206;
    pub const TYPE_OF_LOADER: usize = 0x210;
    pub const LOADFLAGS: usize = 0x211;
    pub const RAMDISK_IMAGE: usize = 0x218;
    pub const RAMDISK_SIZE: usize = 0x21c;
    pub const CMD_LINE_PTR: usize = 0x228;
    pub const INITRD_ADDR_MAX: usize = 0x22c;
    pub const KERNEL_ALIGNMENT: usize = 0x230;
    pub const RELOCATABLE: usize = 0x234;
    pub const XLOADFLAGS: usize = 0x236;
    pub const CMDLINE_SIZE: usize = 0x238;
    pub const PREF_ADDRESS: usize = 0x258;
    pub const INIT_SIZE: usize = 0x260;
    /// Where the header of version 2.12 ends.
    pub const END: usize = 0x268;
}

/// Offsets in the zero page.
mod zero_page {
    pub const ACPI_RSDP: usize = 0x70;
    pub const E820_ENTRIES: usize = 0x1e8;
    pub const E820_TABLE: usize = 0x2d0;
    pub const E820_MAX: usize = 128;
    pub const SIZE: usize = 4096;
}

/// First version that says whether there is a 64-bit entry (xloadflags).
const VERSION_NEEDED: u16 = 0x020c;
const LOADED_HIGH: u8 = 1;
const XLF_KERNEL_64: u16 = 1;
/// An unknown loader, as everybody without a number of his own says.
const LOADER_UNDEFINED: u8 = 0xff;
/// Offset of the 64-bit entry.
const ENTRY_64: u64 = 0x200;

fn bytes<const N: usize>(image: &[u8], at: usize) -> [u8; N] {
    let mut value = [0; N];
    if let Some(slice) = image.get(at..at + N) {
        value.copy_from_slice(slice);
    }
    value
}

fn u16_at(image: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes(image, at))
}

fn u32_at(image: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes(image, at))
}

pub(super) fn load(load: Load<'_>) -> Result<VpState, BootError> {
    let image = load.image;
    if image.len() < header::END
        || u16_at(image, header::BOOT_FLAG) != 0xaa55
        || &image[header::MAGIC..][..4] != b"HdrS"
    {
        return Err(load.bad("neither a Linux bzImage nor an ELF image"));
    }
    let version = u16_at(image, header::VERSION);
    let kernel_64 = u16_at(image, header::XLOADFLAGS) & XLF_KERNEL_64 != 0;
    if version < VERSION_NEEDED || image[header::LOADFLAGS] & LOADED_HIGH == 0 {
        return Err(load.bad(format!(
            "its boot protocol is {}.{:02}, and 2.12 (loaded high) is needed",
            version >> 8,
            version & 0xff
        )));
    }
    let sectors = match image[header::SETUP_SECTS] {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let Some(kernel) = image.get((sectors + 1) * 512..).filter(|k| k.len() as u64 > ENTRY_64) else {
        return Err(load.bad(format!("the file is cut off after {} bytes", image.len())));
    };

    let init_size = u64::from(u32_at(image, header::INIT_SIZE)).max(kernel.len() as u64);
    let mut start = u64::from_le_bytes(bytes(image, header::PREF_ADDRESS));
    let range = |start: u64| start..start.saturating_add(init_size);
    if image[header::RELOCATABLE] != 0 && load.check_range(&range(start)).is_err() {
        // It may lie anywhere; as low as it may is where there is most room.
        let alignment = u64::from(u32_at(image, header::KERNEL_ALIGNMENT)).max(1);
        start = crate::layout::HIGH_MEMORY.div_ceil(alignment) * alignment;
    }
    let kernel_range = range(start);
    load.check_range(&kernel_range)?;
    load.memory.write(Gpa(start), kernel)?;
    let initrd = load.place_initrd(&kernel_range, u32_at(image, header::INITRD_ADDR_MAX).into())?;
    load.place_command_line(u32_at(image, header::CMDLINE_SIZE).into())?;

    let mut page = vec![0; zero_page::SIZE];
    let end = (header::MAGIC + usize::from(image[header::JUMP])).clamp(header::END, zero_page::E820_TABLE);
    let end = end.min(image.len());
    page[header::START..end].copy_from_slice(&image[header::START..end]);
    let mut put = |at: usize, bytes: &[u8]| page[at..at + bytes.len()].copy_from_slice(bytes);
    put(header::TYPE_OF_LOADER, &[LOADER_UNDEFINED]);
    // Both lie below 4 GiB: RAM that is used here ends at the 32-bit hole.
    put(header::RAMDISK_IMAGE, &(initrd.start as u32).to_le_bytes());
    put(header::RAMDISK_SIZE, &((initrd.end - initrd.start) as u32).to_le_bytes());
    put(header::CMD_LINE_PTR, &(boot::COMMAND_LINE as u32).to_le_bytes());
    put(zero_page::ACPI_RSDP, &load.rsdp.to_le_bytes());
    let map = e820(load.ram);
    put(zero_page::E820_ENTRIES, &[map.len().min(zero_page::E820_MAX) as u8]);
    for (i, (address, len, kind)) in map.iter().take(zero_page::E820_MAX).enumerate() {
        let at = zero_page::E820_TABLE + 20 * i;
        put(at, &address.to_le_bytes());
        put(at + 8, &len.to_le_bytes());
        put(at + 16, &kind.to_le_bytes());
    }
    load.memory.write(Gpa(boot::ZERO_PAGE), &page)?;

    let mut state = if kernel_64 {
        entry::long(load.memory, load.state, start + ENTRY_64)?
    } else {
        entry::protected(load.memory, load.state, start)?
    };
    state.gprs[gpr::RSI] = boot::ZERO_PAGE;
    Ok(state)
}

#[cfg(test)]
mod tests {
    use super::*;
    use partition::GuestMemory;
    use std::path::Path;

    /// A bzImage with `code` as its kernel, which is all header otherwise.
    fn image(code_len: usize) -> Vec<u8> {
        let mut image = vec![0u8; 5 * 512 + code_len];
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        put(header::BOOT_FLAG, &[0x55, 0xaa]);
        put(header::JUMP, &[0x66]);
        put(header::MAGIC, b"HdrS");
        put(header::VERSION, &0x20f_u16.to_le_bytes());
        put(header::LOADFLAGS, &[1]);
        put(header::INITRD_ADDR_MAX, &0x7fff_ffff_u32.to_le_bytes());
        put(header::KERNEL_ALIGNMENT, &0x20_0000_u32.to_le_bytes());
        put(header::RELOCATABLE, &[1]);
        put(header::XLOADFLAGS, &1u16.to_le_bytes());
        put(header::CMDLINE_SIZE, &2047u32.to_le_bytes());
        put(header::PREF_ADDRESS, &0x100_0000_u64.to_le_bytes());
        put(header::INIT_SIZE, &0x80_0000_u32.to_le_bytes());
        image[5 * 512..].fill(0xcc);
        image
    }

    fn try_load(
        ram: u64,
        image: &[u8],
        initrd: &[u8],
        command_line: &str,
    ) -> Result<(std::sync::Arc<GuestMemory>, VpState), String> {
        let memory = GuestMemory::with_ram(ram, crate::layout::HOLE, false).unwrap();
        let l = Load {
            memory: &memory,
            ram,
            rsdp: 0xe0000,
            path: Path::new("k"),
            image,
            initrd,
            command_line,
            state: VpState::reset(0, 0),
        };
        let state = load(l).map_err(|e| e.to_string())?;
        Ok((memory, state))
    }

    #[test]
    fn loads_kernel_ramdisk_and_zero_page() {
        let (memory, state) = try_load(64 << 20, &image(0x1000), &[0x5a; 5000], "console=ttyS0").unwrap();
        assert_eq!((state.rip, state.gprs[gpr::RSI]), (0x100_0200, boot::ZERO_PAGE));
        let read32 = |at: u64| memory.read_plain::<u32>(Gpa(at)).unwrap();
        assert_eq!(read32(0x100_0000), 0xcccc_cccc);
        let zp = |at: usize| read32(boot::ZERO_PAGE + at as u64);
        assert_eq!(zp(header::MAGIC), u32::from_le_bytes(*b"HdrS"));
        assert_eq!((zp(header::RAMDISK_IMAGE), zp(header::RAMDISK_SIZE)), ((64 << 20) - 8192, 5000));
        assert_eq!(read32((64 << 20) - 8192), 0x5a5a_5a5a);
        assert_eq!((zp(header::CMD_LINE_PTR), zp(zero_page::ACPI_RSDP)), (0x20000, 0xe0000));
        assert_eq!(zp(zero_page::E820_ENTRIES) & 0xff, 4);
        let mut text = [0; 14];
        memory.read(Gpa(boot::COMMAND_LINE), &mut text).unwrap();
        assert_eq!(&text, b"console=ttyS0\0");
        // A small machine: the kernel moves down.
        assert_eq!(try_load(12 << 20, &image(0x1000), &[], "").unwrap().1.rip, 0x20_0200);
    }

    #[test]
    fn refuses_what_does_not_fit() {
        let whole = image(0x1000);
        assert!(try_load(4 << 20, &whole, &[], "").err().unwrap().contains("more memory"));
        assert!(try_load(16 << 20, &whole, &vec![0; 8 << 20], "").err().unwrap().contains("initial RAM disk"));
        assert!(try_load(64 << 20, &whole, &[], &"x".repeat(2048)).err().unwrap().contains("2047"));
        assert!(try_load(64 << 20, b"#!/bin/sh", &[], "").err().unwrap().contains("neither"));
        for len in 0..whole.len() {
            // No cut-off file may panic; those without the entry are refused.
            assert!(try_load(64 << 20, &whole[..len], &[], "").is_err() || len > 5 * 512 + 0x200);
        }
        let mut old = whole.clone();
        old[header::VERSION] = 0x0b;
        assert!(try_load(64 << 20, &old, &[], "").err().unwrap().contains("2.11"));
    }
}
