//! Generation 2: Viridian's UEFI and the configuration blob that tells it what machine it is in.

use super::{BootError, BootFiles};
use crate::config::MachineConfig;
use crate::layout::{self, RangeKind, frame_buffer};
use crate::{acpi, smbios};
use bios::blob::{BlobBuilder, flags, kind};
use bios::{firmware, volume};
use partition::{GuestMemory, VpState};
use std::path::Path;
use x86::regs::{cr0, cr4, efer, gpr};
use x86::segment::{Segment, TableRegister, attr, sreg};

/// RAM that the firmware needs at least: itself and room for a boot loader.
const LEAST_MEMORY: u64 = 64 << 20;

/// What the blob tells of this start.
pub struct Blob<'a> {
    /// What the firmware's screen calls the machine.
    pub name: &'a str,
    /// When nothing can be booted: wait for a key instead of powering off.
    pub pause_after_failure: bool,
    /// What is tried before the boot options.
    pub first: Option<&'a str>,
}

/// Places the firmware, Viridian's own or `image` ([`read_image`]), and returns the state in which VP 0 enters it.
pub fn load(
    config: &MachineConfig,
    what: &Blob<'_>,
    image: Option<(&Path, Vec<u8>)>,
    memory: &GuestMemory,
    mut state: VpState,
) -> Result<VpState, BootError> {
    if config.memory_bytes < LEAST_MEMORY {
        return Err(BootError::FirmwareMemory { needed: LEAST_MEMORY >> 20 });
    }
    let blob = blob(config, what, image.is_some());
    let entry = match &image {
        None => {
            firmware::place(memory, &blob)?;
            0
        }
        Some((path, image)) => {
            let entry =
                volume::entry(image).map_err(|reason| BootError::Firmware { path: path.to_path_buf(), reason })?;
            firmware::place_image(memory, image, &blob)?;
            entry
        }
    };
    let flat = |selector: u16, attributes: u32| Segment {
        base: 0,
        limit: 0xffff_ffff,
        attr: attr::P | attr::S | attr::G | attributes,
        selector,
    };
    state.segments = [flat(firmware::DATA_SELECTOR, attr::DB | 3); 6];
    state.segments[sreg::CS] = flat(firmware::CODE_SELECTOR, attr::L | 0xb);
    state.gdtr = TableRegister { base: firmware::GDT, limit: 23 };
    state.idtr = TableRegister::default();
    state.tr = Segment { base: 0, limit: 0x67, attr: attr::P | 0xb, selector: 0 };
    state.ldtr = Segment { attr: attr::UNUSABLE, ..Segment::default() };
    state.gprs = [0; 16];
    state.rip = firmware::BASE + entry;
    if image.is_some() {
        // The security core finds its volume here.
        state.gprs[gpr::RBP] = firmware::BASE + volume::SEC_VOLUME as u64;
    }
    state.cr3 = firmware::PAGE_TABLES;
    // What the security core of Hyper-V's own firmware starts with; Viridian's sets what it needs itself.
    state.cr4 = cr4::PAE | cr4::MCE | cr4::OSFXSR | cr4::OSXMMEXCPT;
    state.efer = efer::LME | efer::LMA | efer::NXE;
    state.cr0 = cr0::PE | cr0::MP | cr0::ET | cr0::NE | cr0::PG;
    Ok(state)
}

/// Reads a firmware file; one that is much too large is not read whole.
pub fn read_image<'a>(files: &BootFiles, path: &'a Path) -> Result<(&'a Path, Vec<u8>), BootError> {
    Ok((path, files.read(path, volume::SIZE as u64 + 1)?))
}

/// The blob. A firmware other than Viridian's own also gets what that one knows without being told.
fn blob(config: &MachineConfig, what: &Blob<'_>, foreign: bool) -> Vec<u8> {
    let ranges: Vec<(u64, u64, u32)> = layout::memory_map(config.memory_bytes)
        .into_iter()
        .filter(|(_, kind)| *kind == RangeKind::Ram)
        // No tables of a BIOS: low memory is whole up to the VGA window.
        .map(|(r, _)| if r.start == 0 { 0..layout::VGA.start } else { r })
        .map(|r| (r.start, r.end - r.start, 0))
        .collect();
    let mut flag_bits = flags::SERIAL_CONTROLLERS_ENABLED | flags::MEMORY_ATTRIBUTES_TABLE;
    if what.pause_after_failure {
        flag_bits |= flags::PAUSE_AFTER_BOOT_FAILURE;
    }
    let table = smbios::table(config.memory_bytes);
    let smbios = [&(table.len() as u64).to_le_bytes()[..], &table].concat();
    let mut screen = frame_buffer::BASE.to_le_bytes().to_vec();
    for value in [frame_buffer::WIDTH, frame_buffer::HEIGHT, frame_buffer::WIDTH * 4, frame_buffer::SIZE as u32] {
        screen.extend(value.to_le_bytes());
    }
    let window = layout::VMBUS_MMIO;
    let mut blob = BlobBuilder::new()
        .memory_map(&ranges)
        .processors(config.processors)
        .mmio_ranges(&[(window.start, window.end - window.start)])
        .record(kind::FLAGS, &flag_bits.to_le_bytes())
        .record(kind::VIRIDIAN_FRAME_BUFFER, &screen)
        .record(kind::VIRIDIAN_SMBIOS, &smbios)
        .text(kind::VIRIDIAN_NAME, what.name);
    if let Some(first) = what.first {
        blob = blob.text(kind::VIRIDIAN_BOOT_FIRST, first);
    }
    if foreign {
        // Pages from 1 MiB on that are the firmware's; a memory map without legacy ranges.
        let pages = ((firmware::END - firmware::BASE) / 4096) as u32;
        blob = blob.record(kind::BIOS_INFORMATION, &[pages.to_le_bytes(), [0; 4]].concat()).identity();
    }
    for (_, signature, bytes) in acpi::generation2(config.processors).tables {
        // The firmware makes these two itself, where it puts the others.
        if foreign && signature == "APIC" {
            blob = blob.record(kind::MADT, &bytes);
        } else if !matches!(signature, "RSDP" | "XSDT") {
            blob = blob.record(kind::ACPI_TABLE, &bytes);
        }
    }
    blob.build()
}
