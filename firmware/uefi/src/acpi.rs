//! ACPI and SMBIOS tables: the host gives them in the blob, the firmware puts them into memory of the right type and
//! makes the pointers.

use crate::config::{self, kind};
use crate::memory::{self, PAGE, Placement};
use crate::tables;
use alloc::vec::Vec;
use r_efi::efi;
use uefi_core::bytes::u64_at;
use uefi_core::guid::Guid;

/// `EFI_ACPI_20_TABLE_GUID`.
const ACPI_20: Guid = Guid::new(0x8868e871, 0xe4f1, 0x11d3, [0xbc, 0x22, 0, 0x80, 0xc7, 0x3c, 0x88, 0x81]);
/// `SMBIOS3_TABLE_GUID`.
const SMBIOS3: Guid = Guid::new(0xf2fd1544, 0x9794, 0x4a2c, [0x99, 0x2e, 0xe5, 0xbb, 0xcf, 0x20, 0xe3, 0x94]);

/// Copies bytes into pages of a type; returns their address.
fn place(bytes: &[u8], kind: u32) -> Option<u64> {
    let pages = (bytes.len() as u64).div_ceil(PAGE).max(1);
    let at = memory::allocate(Placement::Below(0xffff_ffff), kind, pages).ok()?;
    // SAFETY: fresh pages, large enough.
    unsafe {
        (at as *mut u8).write_bytes(0, (pages * PAGE) as usize);
        (at as *mut u8).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
    }
    Some(at)
}

fn checksum(bytes: &mut [u8], at: usize) {
    bytes[at] = 0;
    bytes[at] = bytes.iter().fold(0u8, |s, b| s.wrapping_sub(*b));
}

/// Installs what the host gave.
pub fn init() {
    acpi();
    smbios();
}

fn acpi() {
    // One block for all tables, each at a multiple of 64 as FACS needs it.
    let mut given: Vec<Vec<u8>> = config::records(kind::ACPI_TABLE)
        .filter_map(|r| {
            let len = u32::from_le_bytes(r.get(4..8)?.try_into().ok()?) as usize;
            r.get(..len).filter(|t| t.len() >= 36).map(<[u8]>::to_vec)
        })
        .collect();
    if given.is_empty() {
        return;
    }
    let xsdt_len = 36 + given.len() * 8;
    let total: usize = given.iter().map(|t| t.len().next_multiple_of(64)).sum();
    let bytes = 64 + xsdt_len.next_multiple_of(64) + total;
    let Some(base) = place(&alloc::vec![0; bytes], efi::ACPI_RECLAIM_MEMORY) else { return };
    let mut at = base + 64 + xsdt_len.next_multiple_of(64) as u64;
    let mut addresses: Vec<(u64, [u8; 4])> = Vec::new();
    for t in &given {
        addresses.push((at, [t[0], t[1], t[2], t[3]]));
        at += t.len().next_multiple_of(64) as u64;
    }
    let facs = addresses.iter().find(|a| &a.1 == b"FACS").map(|a| a.0);
    let dsdt = addresses.iter().find(|a| &a.1 == b"DSDT").map(|a| a.0);
    for t in &mut given {
        if let (b"FACP", Some(dsdt)) = (&t[..4], dsdt) {
            // DSDT and X_DSDT (ACPI 6.5, table 5.9).
            t[40..44].copy_from_slice(&(dsdt as u32).to_le_bytes());
            if t.len() >= 148 {
                t[140..148].copy_from_slice(&dsdt.to_le_bytes());
            }
            if let Some(facs) = facs {
                t[36..40].copy_from_slice(&(facs as u32).to_le_bytes());
            }
            checksum(t, 9);
        }
    }
    let mut xsdt = Vec::from(*b"XSDT");
    let listed: Vec<u64> = addresses.iter().filter(|a| &a.1 != b"DSDT" && &a.1 != b"FACS").map(|a| a.0).collect();
    xsdt.extend(((36 + listed.len() * 8) as u32).to_le_bytes());
    xsdt.extend([1, 0]);
    xsdt.extend(b"VIRDN VIRIDIAN");
    xsdt.extend(1u32.to_le_bytes());
    xsdt.extend(b"VRDN");
    xsdt.extend(1u32.to_le_bytes());
    listed.iter().for_each(|a| xsdt.extend(a.to_le_bytes()));
    checksum(&mut xsdt, 9);
    let mut rsdp = Vec::from(*b"RSD PTR ");
    rsdp.push(0);
    rsdp.extend(b"VIRDN ");
    rsdp.push(2);
    rsdp.extend(0u32.to_le_bytes());
    rsdp.extend(36u32.to_le_bytes());
    rsdp.extend((base + 64).to_le_bytes());
    rsdp.extend([0; 4]);
    checksum(&mut rsdp[..20], 8);
    checksum(&mut rsdp, 32);
    let put = |at: u64, bytes: &[u8]| {
        // SAFETY: inside the block placed above.
        unsafe { (at as *mut u8).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) }
    };
    put(base, &rsdp);
    put(base + 64, &xsdt);
    for (t, a) in given.iter().zip(&addresses) {
        put(a.0, t);
    }
    let _ = tables::configure(&ACPI_20, base as *mut _);
}

fn smbios() {
    let Some(structures) = config::record(kind::SMBIOS) else { return };
    // The record: length of the structure table u64, then the table.
    let Some(len) = u64_at(structures, 0) else { return };
    let Some(table) = structures.get(8..8 + len as usize) else { return };
    let mut block = alloc::vec![0u8; 32];
    block.extend_from_slice(table);
    let Some(at) = place(&block, efi::RUNTIME_SERVICES_DATA) else { return };
    let mut entry = Vec::from(*b"_SM3_");
    entry.extend([0, 24, 3, 6, 0, 1, 0]);
    entry.extend((table.len() as u32).to_le_bytes());
    entry.extend((at + 32).to_le_bytes());
    checksum(&mut entry, 5);
    // SAFETY: the block starts with 32 bytes for the entry point.
    unsafe { (at as *mut u8).copy_from_nonoverlapping(entry.as_ptr(), entry.len()) };
    let _ = tables::configure(&SMBIOS3, at as *mut _);
}
