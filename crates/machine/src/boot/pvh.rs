//! ELF images: kernels with a PVH entry (Linux `vmlinux`), and plain ones.
//!
//! Source: Xen `docs/misc/pvh.pandoc` (entry state) and `xen/include/public/arch-x86/hvm/start_info.h` (layouts).

use super::{BootError, Load, e820, elf, entry};
use crate::layout::boot;
use partition::{Gpa, VpState};
use std::ops::Range;
use x86::regs::gpr;

/// `XEN_HVM_START_MAGIC_VALUE`.
const MAGIC: u32 = 0x336e_c578;
/// Offsets in our page: start_info, then the module entry, then the memory map.
const MODULE: u64 = 0x40;
const MEMORY_MAP: u64 = 0x80;
/// Linux's own limit (COMMAND_LINE_SIZE), less the final zero.
const COMMAND_LINE_MAX: u64 = 2047;

fn load_segments(load: &Load<'_>, image: &elf::Image) -> Result<Range<u64>, BootError> {
    let (mut first, mut last) = (u64::MAX, 0);
    for segment in &image.segments {
        let end = segment.address.checked_add(segment.memory_size);
        let end = end.ok_or_else(|| load.bad("an ELF segment wraps around the address space"))?;
        load.check_range(&(segment.address..end))?;
        // The parser has checked that the segment lies in the file.
        let bytes = &load.image[segment.offset as usize..][..segment.file_size as usize];
        load.memory.write(Gpa(segment.address), bytes)?;
        load.memory.fill(Gpa(segment.address + segment.file_size), 0, segment.memory_size - segment.file_size)?;
        (first, last) = (first.min(segment.address), last.max(end));
    }
    Ok(first..last)
}

pub(super) fn load(load: Load<'_>) -> Result<VpState, BootError> {
    let image = elf::parse(load.image).map_err(|reason| load.bad(reason))?;
    let kernel = load_segments(&load, &image)?;
    let Some(pvh_entry) = image.pvh_entry else {
        // A plain image knows no protocol: it gets 64-bit mode and a stack.
        return Ok(entry::long(load.memory, load.state, image.entry)?);
    };
    let initrd = load.place_initrd(&kernel, u32::MAX.into())?;
    load.place_command_line(COMMAND_LINE_MAX)?;

    let map = e820(load.ram);
    let modules = u32::from(!initrd.is_empty());
    let mut info = Vec::new();
    // struct hvm_start_info, version 1
    for value in [MAGIC, 1, 0, modules] {
        info.extend(value.to_le_bytes());
    }
    let module_list = if modules > 0 { boot::PVH_INFO + MODULE } else { 0 };
    for value in [module_list, boot::COMMAND_LINE, load.rsdp, boot::PVH_INFO + MEMORY_MAP] {
        info.extend(value.to_le_bytes());
    }
    info.extend((map.len() as u32).to_le_bytes());
    info.resize(MODULE as usize, 0);
    // struct hvm_modlist_entry
    for value in [initrd.start, initrd.end - initrd.start, 0, 0] {
        info.extend(value.to_le_bytes());
    }
    info.resize(MEMORY_MAP as usize, 0);
    // struct hvm_memmap_table_entry
    for (address, len, kind) in map {
        info.extend(address.to_le_bytes());
        info.extend(len.to_le_bytes());
        info.extend(u64::from(kind).to_le_bytes());
    }
    load.memory.write(Gpa(boot::PVH_INFO), &info)?;

    let mut state = entry::protected(load.memory, load.state, pvh_entry.into())?;
    state.gprs[gpr::RBX] = boot::PVH_INFO;
    Ok(state)
}

#[cfg(test)]
mod tests {
    use super::*;
    use partition::GuestMemory;
    use std::path::Path;

    fn try_load(image: &[u8]) -> Result<(std::sync::Arc<GuestMemory>, VpState), String> {
        let memory = GuestMemory::with_ram(16 << 20, crate::layout::HOLE, false).unwrap();
        memory.fill(Gpa(0x10_0000), 0xee, 0x1000).unwrap();
        let l = Load {
            memory: &memory,
            ram: 16 << 20,
            rsdp: 0xe0000,
            path: Path::new("k"),
            image,
            initrd: &[9; 100],
            command_line: "quiet",
            state: VpState::reset(0, 0),
        };
        let state = load(l).map_err(|e| e.to_string())?;
        Ok((memory, state))
    }

    #[test]
    fn pvh_and_plain_entries() {
        let (memory, state) = try_load(&elf::tests::image(0x10_0000, &[0x90; 100], true)).unwrap();
        assert_eq!((state.rip, state.gprs[gpr::RBX], state.efer), (0x10_0010, boot::PVH_INFO, 0));
        let u32_at = |at: u64| memory.read_plain::<u32>(Gpa(at)).unwrap();
        assert_eq!((u32_at(boot::PVH_INFO), u32_at(boot::PVH_INFO + 12)), (MAGIC, 1));
        assert_eq!(u32_at(boot::PVH_INFO + 48), 4, "memory map entries");
        let module = memory.read_plain::<u64>(Gpa(boot::PVH_INFO + MODULE)).unwrap();
        assert_eq!(u32_at(module), 0x0909_0909);
        assert_eq!((u32_at(0x10_0060), u32_at(0x10_0064)), (0x9090_9090, 0), "the rest is zero");
        let (_, state) = try_load(&elf::tests::image(0x10_0000, &[0x90; 100], false)).unwrap();
        assert_eq!(state.rip, 0x10_0000);
        assert_ne!(state.efer, 0);
    }

    #[test]
    fn bad_addresses_are_refused() {
        assert!(try_load(&elf::tests::image(0x1000, &[0x90; 100], true)).err().unwrap().contains("below 1 MiB"));
        assert!(try_load(&elf::tests::image(1 << 40, &[0x90; 100], true)).err().unwrap().contains("more memory"));
        assert!(try_load(&elf::tests::image(u64::MAX - 10, &[0x90; 100], true)).is_err());
    }
}
