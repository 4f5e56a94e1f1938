//! The firmware's page tables: all memory mapped to itself, in pages as large as possible, and the Memory Attribute protocol
//! (UEFI 2.10, section 37.8), which splits them where a part of them is protected.
//!
//! A page that may not be read is not present but keeps its other bits, so that its address is not lost.

use crate::memory::{self, PAGE, Placement};
use crate::{handle, tables};
use core::ptr::null_mut;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use r_efi::efi::{self, Status};
use r_efi::protocols::memory_attribute::{PROTOCOL_GUID, Protocol};
use uefi_core::guid::Guid;

const PRESENT: u64 = 1;
const WRITE: u64 = 2;
const LARGE: u64 = 0x80;
const NO_EXECUTE: u64 = 1 << 63;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
const GIB: u64 = 1 << 30;

/// End of what is mapped.
static TOP: AtomicU64 = AtomicU64::new(0);
/// Whether anything was ever protected.
static USED: AtomicBool = AtomicBool::new(false);

/// The table at a physical address.
///
/// # Safety
/// A page table of the firmware's own is there; the one processor changes it in one place at a time.
unsafe fn table(at: u64) -> *mut u64 {
    (at & ADDRESS) as *mut u64
}

/// Maps everything up to `top` to itself, in pages of 1 GiB or 2 MiB.
pub fn init(top: u64) {
    let gigabytes = top.div_ceil(GIB).clamp(4, 1024);
    let extended = core::arch::x86_64::__cpuid(0x8000_0001).edx;
    let large = extended & 1 << 26 != 0;
    let pdpts = gigabytes.div_ceil(512);
    let pages = 1 + pdpts + if large { 0 } else { gigabytes };
    // Below the limit that the host's tables map; enough is free there.
    let Ok(base) = memory::allocate(Placement::Below(0xbfff_ffff), efi::BOOT_SERVICES_DATA, pages) else { return };
    let put = |page: u64, index: u64, value: u64| {
        // SAFETY: the pages were just allocated and are mapped; every index is below 512.
        unsafe { table(base + page * PAGE).add(index as usize).write(value) }
    };
    (0..pages).for_each(|p| (0..512).for_each(|i| put(p, i, 0)));
    for g in 0..pdpts {
        put(0, g, (base + (1 + g) * PAGE) | PRESENT | WRITE);
    }
    for g in 0..gigabytes {
        if large {
            put(1 + g / 512, g % 512, (g * GIB) | LARGE | PRESENT | WRITE);
        } else {
            let directory = 1 + pdpts + g;
            put(1 + g / 512, g % 512, (base + directory * PAGE) | PRESENT | WRITE);
            (0..512).for_each(|i| put(directory, i, (g * GIB + (i << 21)) | LARGE | PRESENT | WRITE));
        }
    }
    TOP.store(gigabytes * GIB, Ordering::Relaxed);
    // SAFETY: the new tables map the image, its stack and data where they are. Protection counts for the firmware too (CR0.WP),
    // and pages may be not executable (EFER.NXE) where the processor has that.
    unsafe {
        core::arch::asm!("mov cr3, {}", in(reg) base, options(nostack, preserves_flags));
        core::arch::asm!("mov {0}, cr0", "bts {0}, 16", "mov cr0, {0}", out(reg) _, options(nostack));
    }
    if extended & 1 << 20 != 0 {
        const EFER: u32 = 0xc000_0080;
        crate::arch::wrmsr(EFER, crate::arch::rdmsr(EFER) | 1 << 11);
    }
}

/// Installs the protocol.
pub fn install() {
    let p = tables::leak(Protocol {
        get_memory_attributes: get_service,
        set_memory_attributes: set_service,
        clear_memory_attributes: clear_service,
    });
    let _ = handle::install(null_mut(), &Guid(*PROTOCOL_GUID.as_bytes()), p.cast());
}

fn root() -> u64 {
    let cr3: u64;
    // SAFETY: reads a register.
    unsafe { core::arch::asm!("mov {}, cr3", out(reg) cr3, options(nomem, nostack, preserves_flags)) }
    cr3
}

fn flush() {
    // SAFETY: the same tables again; only the translations that the processor keeps are dropped.
    unsafe { core::arch::asm!("mov {0}, cr3", "mov cr3, {0}", out(reg) _, options(nostack, preserves_flags)) }
}

/// The entry that maps an address, and the bytes that it maps. With `split`, an entry of one page of 4 KiB.
fn entry(address: u64, split: bool) -> Result<(*mut u64, u64), Status> {
    let mut at = root();
    for shift in [39, 30, 21, 12] {
        // SAFETY: `at` is a table: the root, or what an entry of a table without the large bit points at.
        let e = unsafe { table(at).add((address >> shift & 511) as usize) };
        // SAFETY: inside the table.
        let value = unsafe { e.read() };
        if shift == 12 {
            return Ok((e, PAGE));
        }
        if value == 0 {
            return Err(Status::UNSUPPORTED);
        }
        if value & LARGE == 0 {
            at = value;
            continue;
        }
        if !split {
            return Ok((e, 1 << shift));
        }
        // The same mapping and protection in 512 parts; the smallest have no large bit.
        let part = 1u64 << (shift - 9);
        let new = memory::allocate(Placement::Any, efi::BOOT_SERVICES_DATA, 1)?;
        let bits = value & !ADDRESS & if shift == 21 { !LARGE } else { !0 };
        let first = value & ADDRESS & !((1 << shift) - 1);
        for i in 0..512 {
            // SAFETY: the page was just allocated for this.
            unsafe { table(new).add(i).write((first + i as u64 * part) | bits) };
        }
        // SAFETY: inside the table. What is protected is protected below.
        unsafe { e.write(new | PRESENT | WRITE) };
        at = new;
    }
    Err(Status::UNSUPPORTED)
}

fn attributes(entry: u64) -> u64 {
    let mut a = 0;
    if entry & PRESENT == 0 {
        a |= efi::MEMORY_RP;
    }
    if entry & WRITE == 0 {
        a |= efi::MEMORY_RO;
    }
    if entry & NO_EXECUTE != 0 {
        a |= efi::MEMORY_XP;
    }
    a
}

fn range(base: u64, length: u64) -> Result<(), Status> {
    if length == 0 {
        return Err(Status::INVALID_PARAMETER);
    }
    let inside = base.checked_add(length).is_some_and(|end| end <= TOP.load(Ordering::Relaxed));
    if base % PAGE != 0 || length % PAGE != 0 || !inside { Err(Status::UNSUPPORTED) } else { Ok(()) }
}

fn get(base: u64, length: u64) -> Result<u64, Status> {
    range(base, length)?;
    let (mut at, mut found) = (base, None);
    while at < base + length {
        let (e, size) = entry(at, false)?;
        // SAFETY: an entry of the live tables.
        let a = attributes(unsafe { e.read() });
        if found.is_some_and(|f| f != a) {
            return Err(Status::NO_MAPPING);
        }
        found = Some(a);
        at = (at & !(size - 1)) + size;
    }
    found.ok_or(Status::UNSUPPORTED)
}

fn change(base: u64, length: u64, set: u64, clear: u64) -> Result<(), Status> {
    let mut at = base;
    while at < base + length {
        let (e, size) = entry(at, false)?;
        // A large page is split only if it changes and not all of it does.
        // SAFETY: an entry of the live tables.
        let now = attributes(unsafe { e.read() });
        let whole = at % size == 0 && base + length - at >= size;
        let same = (now | set) & !clear == now;
        let (e, size) = if same || whole { (e, size) } else { entry(at, true)? };
        let wanted = (now | set) & !clear;
        // SAFETY: an entry of the live tables. Only the bits that protect change.
        unsafe {
            let mut value = e.read();
            let mut bit = |attribute: u64, mask: u64, on: bool| {
                value = if (wanted & attribute != 0) == on { value | mask } else { value & !mask };
            };
            bit(efi::MEMORY_RP, PRESENT, false);
            bit(efi::MEMORY_RO, WRITE, false);
            bit(efi::MEMORY_XP, NO_EXECUTE, true);
            e.write(value);
        }
        at = (at & !(size - 1)) + size;
    }
    flush();
    Ok(())
}

const ALL: u64 = efi::MEMORY_RP | efi::MEMORY_RO | efi::MEMORY_XP;

/// Takes all protection off pages that are freed.
pub fn unprotect(base: u64, pages: u64) {
    if USED.load(Ordering::Relaxed) && range(base, pages * PAGE).is_ok() {
        let _ = change(base, pages * PAGE, 0, ALL);
    }
}

fn checked(base: u64, length: u64, attributes: u64, set: bool) -> Status {
    if length == 0 || attributes == 0 || attributes & !ALL != 0 {
        return Status::INVALID_PARAMETER;
    }
    if let Err(s) = range(base, length) {
        return s;
    }
    USED.store(true, Ordering::Relaxed);
    tables::result(if set { change(base, length, attributes, 0) } else { change(base, length, 0, attributes) })
}

unsafe extern "efiapi" fn get_service(_: *mut Protocol, base: u64, length: u64, out: *mut u64) -> Status {
    if out.is_null() {
        return Status::INVALID_PARAMETER;
    }
    match get(base, length) {
        Ok(a) => crate::image::give(out, a),
        Err(s) => s,
    }
}
unsafe extern "efiapi" fn set_service(_: *mut Protocol, base: u64, length: u64, attributes: u64) -> Status {
    checked(base, length, attributes, true)
}
unsafe extern "efiapi" fn clear_service(_: *mut Protocol, base: u64, length: u64, attributes: u64) -> Status {
    checked(base, length, attributes, false)
}
