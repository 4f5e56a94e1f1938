//! Runtime services (UEFI 2.10, chapter 8). After ExitBootServices only this module, [`crate::bios`] and what they call
//! still run: nothing here allocates.
//!
//! The whole image of the firmware stays as runtime memory. SetVirtualAddressMap relocates it once more, to the address
//! that the operating system gave it.

use crate::bios::{self, Nvram};
use crate::cell::Global;
use crate::tables::{self, guid, put, result};
use crate::{arch, event, memory};
use alloc::string::String;
use alloc::vec::Vec;
use core::ffi::c_void;
use core::slice;
use core::sync::atomic::{AtomicBool, Ordering};
use r_efi::efi::{self, Boolean, CapsuleHeader, Char16, MemoryDescriptor, ResetType, Status, TableHeader, Time};
use uefi_core::guid::Guid;

/// After ExitBootServices.
static RUNTIME: AtomicBool = AtomicBool::new(false);
/// After SetVirtualAddressMap.
static VIRTUAL: AtomicBool = AtomicBool::new(false);
/// The map that SetVirtualAddressMap works through, while it does: address, number, size of a descriptor.
static MAP: Global<(usize, usize, usize)> = Global::new((0, 0, 0));

/// The services.
pub fn table(hdr: TableHeader) -> efi::RuntimeServices {
    efi::RuntimeServices {
        hdr,
        get_time,
        set_time,
        get_wakeup_time,
        set_wakeup_time,
        set_virtual_address_map,
        convert_pointer,
        get_variable: get_variable_service,
        get_next_variable_name,
        set_variable: set_variable_service,
        get_next_high_mono_count,
        reset_system,
        update_capsule,
        query_capsule_capabilities,
        query_variable_info,
    }
}

/// Sets the variables that tell what the firmware can do.
pub fn init() {
    const BS_RT: u32 = 6;
    let g = uefi_core::guid::GLOBAL_VARIABLE;
    // No OS indications are acted upon but a stop at the boot manager's screen (bit 0).
    let _ = set_volatile("OsIndicationsSupported", &g, BS_RT, &1u64.to_le_bytes());
    let _ = set_volatile("BootOptionSupport", &g, BS_RT, &0u32.to_le_bytes());
    let _ = set_volatile("PlatformLangCodes", &g, BS_RT, b"en\0");
    if get_variable("PlatformLang", &g).is_none() {
        let _ = set_variable("PlatformLang", &g, 7, b"en\0");
    }
    runtime_properties();
}

/// Variables that the host keeps read-only for everybody else would be refused; those that it does not know are volatile
/// and made here at every start.
fn set_volatile(name: &str, vendor: &Guid, attributes: u32, data: &[u8]) -> Result<(), Status> {
    set_variable(name, vendor, attributes, data)
}

/// `EFI_RT_PROPERTIES_TABLE`: all runtime services work at run time but those for capsules and wake-up.
fn runtime_properties() {
    const GUID: Guid = Guid::new(0xeb66918a, 0x7eef, 0x402a, [0x84, 0x2e, 0x93, 0x1d, 0x21, 0xc3, 0x8a, 0xe9]);
    const SUPPORTED: u32 = 0x0001 | 0x0002 | 0x0010 | 0x0020 | 0x0040 | 0x0080 | 0x0100 | 0x0200 | 0x0400 | 0x2000;
    let mut d = [0u8; 8];
    d[..2].copy_from_slice(&1u16.to_le_bytes());
    d[2..4].copy_from_slice(&8u16.to_le_bytes());
    d[4..].copy_from_slice(&SUPPORTED.to_le_bytes());
    let _ = tables::configure(&GUID, tables::leak(d).cast());
}

fn wide(name: &str) -> Vec<u16> {
    name.encode_utf16().collect()
}

/// A variable's value, for the firmware itself.
pub fn get_variable(name: &str, vendor: &Guid) -> Option<Vec<u8>> {
    bios::nvram(Nvram::Get, &wide(name), vendor, 0, &[], |r| r.bytes.to_vec()).ok()
}

/// Sets a variable, for the firmware itself.
pub fn set_variable(name: &str, vendor: &Guid, attributes: u32, data: &[u8]) -> Result<(), Status> {
    bios::nvram(Nvram::Set, &wide(name), vendor, attributes, data, |_| ())
}

/// Names of all variables of a vendor.
pub fn variable_names(of: &Guid) -> Vec<String> {
    let mut names = Vec::new();
    let (mut name, mut vendor) = (Vec::new(), Guid::default());
    let mut command = Nvram::First;
    while let Ok((n, v)) = bios::nvram(command, &name, &vendor, 0, &[], |r| {
        let units: Vec<u16> = r.bytes.chunks_exact(2).map(|c| u16::from_le_bytes([c[0], c[1]])).collect();
        let end = units.iter().position(|u| *u == 0).unwrap_or(units.len());
        (units[..end].to_vec(), r.vendor)
    }) {
        command = Nvram::Next;
        if v == *of {
            names.push(String::from_utf16_lossy(&n));
        }
        (name, vendor) = (n, v);
        if names.len() > 1000 {
            break;
        }
    }
    names
}

/// ExitBootServices has succeeded.
pub fn enter() {
    RUNTIME.store(true, Ordering::Relaxed);
    let _ = bios::nvram(Nvram::SignalRuntime, &[], &Guid::default(), 0, &[], |_| ());
}

const MAX_NAME: usize = 1024;

/// A name that a caller passes, without its terminator, into a buffer of the callee's stack.
fn name(p: *const Char16, buffer: &mut [u16; MAX_NAME]) -> Result<&[u16], Status> {
    if p.is_null() {
        return Err(Status::INVALID_PARAMETER);
    }
    for i in 0..MAX_NAME {
        // SAFETY: the caller passes a terminated string; reading stops at its terminator.
        let c = unsafe { p.add(i).read_unaligned() };
        if c == 0 {
            return Ok(&buffer[..i]);
        }
        buffer[i] = c;
    }
    Err(Status::INVALID_PARAMETER)
}

unsafe extern "efiapi" fn get_variable_service(
    n: *mut Char16,
    vendor: *mut efi::Guid,
    attributes: *mut u32,
    size: *mut usize,
    data: *mut c_void,
) -> Status {
    let mut buffer = [0; MAX_NAME];
    let (Ok(vendor), Ok(n)) = (guid(vendor), name(n, &mut buffer)) else { return Status::INVALID_PARAMETER };
    if size.is_null() {
        return Status::INVALID_PARAMETER;
    }
    if n.is_empty() {
        return Status::NOT_FOUND;
    }
    // SAFETY: pointers are checked for null; the buffer has `*size` bytes by the caller's word.
    let r = bios::nvram(Nvram::Get, n, &vendor, 0, &[], |r| unsafe {
        let room = size.read_unaligned();
        size.write_unaligned(r.len);
        if !attributes.is_null() {
            attributes.write_unaligned(r.attributes);
        }
        if room < r.len {
            return Status::BUFFER_TOO_SMALL;
        }
        if data.is_null() {
            return Status::INVALID_PARAMETER;
        }
        data.cast::<u8>().copy_from(r.bytes.as_ptr(), r.bytes.len());
        Status::SUCCESS
    });
    r.unwrap_or_else(|e| e)
}

unsafe extern "efiapi" fn get_next_variable_name(size: *mut usize, n: *mut Char16, vendor: *mut efi::Guid) -> Status {
    let mut buffer = [0; MAX_NAME];
    if size.is_null() || n.is_null() {
        return Status::INVALID_PARAMETER;
    }
    let (Ok(from), Ok(current)) = (guid(vendor), name(n, &mut buffer)) else { return Status::INVALID_PARAMETER };
    // The name must end inside the buffer that the caller says it has.
    // SAFETY: not null.
    if current.len() * 2 >= unsafe { size.read_unaligned() } {
        return Status::INVALID_PARAMETER;
    }
    let command = if current.is_empty() { Nvram::First } else { Nvram::Next };
    // SAFETY: pointers are checked for null; the buffer has `*size` bytes by the caller's word.
    let r = bios::nvram(command, current, &from, 0, &[], |r| unsafe {
        let room = size.read_unaligned();
        size.write_unaligned(r.len);
        if room < r.len {
            return Status::BUFFER_TOO_SMALL;
        }
        n.cast::<u8>().copy_from(r.bytes.as_ptr(), r.len.min(r.bytes.len()));
        vendor.cast::<[u8; 16]>().write_unaligned(r.vendor.0);
        Status::SUCCESS
    });
    r.unwrap_or_else(|e| e)
}

unsafe extern "efiapi" fn set_variable_service(
    n: *mut Char16,
    vendor: *mut efi::Guid,
    attributes: u32,
    size: usize,
    data: *mut c_void,
) -> Status {
    let mut buffer = [0; MAX_NAME];
    let (Ok(vendor), Ok(n)) = (guid(vendor), name(n, &mut buffer)) else { return Status::INVALID_PARAMETER };
    if n.is_empty() || size != 0 && data.is_null() {
        return Status::INVALID_PARAMETER;
    }
    if uefi_core::variables::is_firmware_variable(n, &vendor) {
        return Status::WRITE_PROTECTED;
    }
    // SAFETY: the caller passes `size` bytes.
    let bytes = if size == 0 { &[][..] } else { unsafe { slice::from_raw_parts(data.cast(), size) } };
    result(bios::nvram(Nvram::Set, n, &vendor, attributes, bytes, |_| ()))
}

unsafe extern "efiapi" fn query_variable_info(
    attributes: u32,
    maximum: *mut u64,
    remaining: *mut u64,
    largest: *mut u64,
) -> Status {
    if maximum.is_null() || remaining.is_null() || largest.is_null() || attributes == 0 {
        return Status::INVALID_PARAMETER;
    }
    // SAFETY: not null.
    let r = bios::nvram(Nvram::Query, &[], &Guid::default(), attributes, &[], |r| unsafe {
        maximum.write_unaligned(r.query[0]);
        remaining.write_unaligned(r.query[1]);
        largest.write_unaligned(r.query[2]);
    });
    result(r)
}

/// Upper half of the monotonic count as of this start; 0: not counted yet.
static HIGH_COUNT: Global<u32> = Global::new(0);

/// The upper half, 0 if nobody has asked in this start.
pub fn high_count() -> u32 {
    HIGH_COUNT.with(|h| *h)
}

/// Counts the upper half on, in its variable.
pub fn next_high_count() -> Result<u32, Status> {
    const NAME: [u16; 3] = [b'M' as u16, b'T' as u16, b'C' as u16];
    const VENDOR: Guid = Guid::new(0x56697264, 0x4d54, 0x4321, [0x8a, 0x01, 0x76, 0x69, 0x72, 0x69, 0x64, 0x01]);
    let old = bios::nvram(Nvram::Get, &NAME, &VENDOR, 0, &[], |r| {
        r.bytes.get(..4).map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
    });
    let new = old.unwrap_or(0).wrapping_add(1).max(1);
    bios::nvram(Nvram::Set, &NAME, &VENDOR, 7, &new.to_le_bytes(), |_| ()).map_err(|_| Status::DEVICE_ERROR)?;
    HIGH_COUNT.with(|h| *h = new);
    Ok(new)
}

unsafe extern "efiapi" fn get_next_high_mono_count(out: *mut u32) -> Status {
    if out.is_null() {
        return Status::INVALID_PARAMETER;
    }
    match next_high_count() {
        // SAFETY: not null.
        Ok(new) => result(unsafe { put(out, new) }),
        Err(s) => s,
    }
}

/// CMOS real-time clock registers (MC146818).
fn cmos(register: u8) -> u8 {
    arch::out8(0x70, register);
    arch::in8(0x71)
}

fn cmos_write(register: u8, value: u8) {
    arch::out8(0x70, register);
    arch::out8(0x71, value);
}

/// Year, month, day, hour, minute, second.
pub type Civil = (u16, u8, u8, u8, u8, u8);

/// What the real-time clock says; nothing if it does not stand still for a reading.
pub fn read_clock() -> Option<Civil> {
    let on = arch::interrupts_off();
    let mut last = None;
    // Twice the same, with no update in progress: a reading that is not torn.
    for _ in 0..100_000 {
        if cmos(0x0a) & 0x80 != 0 {
            continue;
        }
        let raw = [cmos(0x32), cmos(9), cmos(8), cmos(7), cmos(4), cmos(2), cmos(0)];
        if last == Some(raw) {
            break;
        }
        last = Some(raw);
    }
    let mode = cmos(0x0b);
    arch::interrupts_restore(on);
    let raw = last?;
    let n = |v: u8| if mode & 4 == 0 { (v >> 4) * 10 + (v & 0xf) } else { v };
    let mut hour = n(raw[4] & 0x7f);
    if mode & 2 == 0 {
        hour = hour % 12 + if raw[4] & 0x80 != 0 { 12 } else { 0 };
    }
    let century = match n(raw[0]) {
        c @ 19..=99 => u16::from(c),
        _ => 20,
    };
    Some((century * 100 + u16::from(n(raw[1])), n(raw[2]), n(raw[3]), hour, n(raw[5]), n(raw[6])))
}

unsafe extern "efiapi" fn get_time(time: *mut Time, capabilities: *mut efi::TimeCapabilities) -> Status {
    if time.is_null() {
        return Status::INVALID_PARAMETER;
    }
    let Some((year, month, day, hour, minute, second)) = read_clock() else { return Status::DEVICE_ERROR };
    // SAFETY: not null. EFI_TIME is written whole; 0x7FF: no time zone is kept.
    unsafe {
        time.write_unaligned(Time {
            year,
            month,
            day,
            hour,
            minute,
            second,
            pad1: 0,
            nanosecond: 0,
            timezone: 0x7ff,
            daylight: 0,
            pad2: 0,
        });
        if !capabilities.is_null() {
            capabilities.write_unaligned(efi::TimeCapabilities {
                resolution: 1,
                accuracy: 50_000_000,
                sets_to_zero: Boolean::FALSE,
            });
        }
    }
    Status::SUCCESS
}

fn days_in(month: u8, year: u16) -> u8 {
    match month {
        4 | 6 | 9 | 11 => 30,
        2 if year % 4 == 0 && (year % 100 != 0 || year % 400 == 0) => 29,
        2 => 28,
        _ => 31,
    }
}

unsafe extern "efiapi" fn set_time(time: *mut Time) -> Status {
    if time.is_null() {
        return Status::INVALID_PARAMETER;
    }
    // SAFETY: not null.
    let t = unsafe { time.read_unaligned() };
    let valid = (1998..=9999).contains(&t.year)
        && (1..=12).contains(&t.month)
        && (1..=days_in(t.month, t.year)).contains(&t.day)
        && t.hour < 24
        && t.minute < 60
        && t.second < 60
        && t.nanosecond < 1_000_000_000
        && (t.timezone == 0x7ff || (-1440..=1440).contains(&t.timezone))
        && t.daylight & !3 == 0;
    if !valid {
        return Status::INVALID_PARAMETER;
    }
    let on = arch::interrupts_off();
    let mode = cmos(0x0b);
    let b = |v: u8| if mode & 4 == 0 { ((v / 10) << 4) | (v % 10) } else { v };
    let hour = match (mode & 2 != 0, t.hour) {
        (true, h) => b(h),
        (false, h) => b(if h % 12 == 0 { 12 } else { h % 12 }) | if h >= 12 { 0x80 } else { 0 },
    };
    // SET stops the clock while it is set.
    cmos_write(0x0b, mode | 0x80);
    let (century, year) = ((t.year / 100) as u8, (t.year % 100) as u8);
    for (register, value) in [
        (0x32, b(century)),
        (9, b(year)),
        (8, b(t.month)),
        (7, b(t.day)),
        (4, hour),
        (2, b(t.minute)),
        (0, b(t.second)),
    ] {
        cmos_write(register, value);
    }
    cmos_write(0x0b, mode);
    arch::interrupts_restore(on);
    Status::SUCCESS
}

unsafe extern "efiapi" fn get_wakeup_time(_: *mut Boolean, _: *mut Boolean, _: *mut Time) -> Status {
    Status::UNSUPPORTED
}
unsafe extern "efiapi" fn set_wakeup_time(_: Boolean, _: *mut Time) -> Status {
    Status::UNSUPPORTED
}

/// Resets or powers the machine off.
pub fn reset(kind: ResetType) -> ! {
    match kind {
        // PM1 control at 0x404: SLP_TYP 5 is S5 here, SLP_EN.
        efi::RESET_SHUTDOWN => arch::out16(0x404, 5 << 10 | 1 << 13),
        _ => {
            arch::out8(0xcf9, 0x02);
            arch::out8(0xcf9, 0x06);
            // The FADT's reset register, for machines without 0xCF9.
            arch::out8(0x40c, 0x01);
        }
    }
    arch::stop()
}

unsafe extern "efiapi" fn reset_system(kind: ResetType, _: Status, _: usize, _: *mut c_void) {
    reset(kind)
}

unsafe extern "efiapi" fn update_capsule(
    capsules: *mut *mut CapsuleHeader,
    count: usize,
    _: efi::PhysicalAddress,
) -> Status {
    if count == 0 || capsules.is_null() {
        return Status::INVALID_PARAMETER;
    }
    // Each of the other two says what follows a reset that the capsule must survive (UEFI 2.10, section 8.5.3.2).
    const PERSIST_ACROSS_RESET: u32 = 0x1_0000;
    const POPULATE_SYSTEM_TABLE: u32 = 0x2_0000;
    const INITIATE_RESET: u32 = 0x4_0000;
    for i in 0..count.min(64) {
        // SAFETY: the caller passes `count` pointers to capsules' headers.
        let flags = unsafe {
            let c = capsules.add(i).read_unaligned();
            if c.is_null() {
                return Status::INVALID_PARAMETER;
            }
            (&raw const (*c).flags).read_unaligned()
        };
        let follows = flags & (POPULATE_SYSTEM_TABLE | INITIATE_RESET) != 0;
        if follows && flags & PERSIST_ACROSS_RESET == 0 {
            return Status::INVALID_PARAMETER;
        }
    }
    Status::UNSUPPORTED
}
unsafe extern "efiapi" fn query_capsule_capabilities(
    capsules: *mut *mut CapsuleHeader,
    count: usize,
    size: *mut u64,
    kind: *mut ResetType,
) -> Status {
    if count == 0 || capsules.is_null() || size.is_null() || kind.is_null() {
        return Status::INVALID_PARAMETER;
    }
    Status::UNSUPPORTED
}

/// The virtual address of a physical one in the map that is being applied.
fn to_virtual(address: u64) -> Option<u64> {
    MAP.with(|(map, count, size)| {
        (0..*count).find_map(|i| {
            // SAFETY: SetVirtualAddressMap has stored the caller's map, which has `count` descriptors of `size` bytes.
            let d = unsafe { ((*map + i * *size) as *const MemoryDescriptor).read_unaligned() };
            let inside = address.wrapping_sub(d.physical_start);
            let runtime = d.attribute & efi::MEMORY_RUNTIME != 0;
            (runtime && inside < d.number_of_pages * memory::PAGE).then(|| d.virtual_start.wrapping_add(inside))
        })
    })
}

unsafe extern "efiapi" fn convert_pointer(disposition: usize, p: *mut *mut c_void) -> Status {
    if p.is_null() {
        return Status::INVALID_PARAMETER;
    }
    if MAP.with(|m| m.1) == 0 {
        return Status::UNSUPPORTED;
    }
    // SAFETY: not null.
    let old = unsafe { p.read_unaligned() };
    if old.is_null() {
        // EFI_OPTIONAL_PTR
        return if disposition & 1 != 0 { Status::SUCCESS } else { Status::INVALID_PARAMETER };
    }
    match to_virtual(old as u64) {
        // SAFETY: not null.
        Some(v) => result(unsafe { put(p, v as *mut c_void) }),
        None => Status::NOT_FOUND,
    }
}

unsafe extern "efiapi" fn set_virtual_address_map(
    size: usize,
    descriptor_size: usize,
    version: u32,
    map: *mut MemoryDescriptor,
) -> Status {
    if !RUNTIME.load(Ordering::Relaxed) || VIRTUAL.load(Ordering::Relaxed) {
        return Status::UNSUPPORTED;
    }
    if version != 1 || descriptor_size < size_of::<MemoryDescriptor>() || map.is_null() {
        return Status::INVALID_PARAMETER;
    }
    MAP.with(|m| *m = (map as usize, size / descriptor_size, descriptor_size));
    let [start, ..] = crate::entry::image();
    let Some(new) = to_virtual(start) else {
        MAP.with(|m| *m = (0, 0, 0));
        return Status::NO_MAPPING;
    };
    VIRTUAL.store(true, Ordering::Relaxed);
    event::virtual_address_change();
    // The pointers that others see; the functions' own addresses are relocations like all others.
    let t = tables::get();
    // SAFETY: the tables are live, nobody else runs; addresses that are not in the map stay as they are.
    unsafe {
        let s = &mut (*t).system;
        let convert = |p: &mut usize| {
            if let Some(v) = to_virtual(*p as u64) {
                *p = v as usize;
            }
        };
        // The configuration tables themselves keep their physical addresses (UEFI 2.10, section 4.6).
        let mut words = [s.firmware_vendor as usize, s.configuration_table as usize, s.runtime_services as usize];
        words.iter_mut().for_each(convert);
        s.firmware_vendor = words[0] as *mut Char16;
        s.configuration_table = words[1] as *mut _;
        s.runtime_services = words[2] as *mut _;
        // The function pointers of the table were filled in at run time, so no relocation covers them.
        let first = (&raw mut (*t).runtime.get_time).cast::<usize>();
        for i in 0..14 {
            convert(&mut *first.add(i));
        }
    }
    tables::seal();
    MAP.with(|m| *m = (0, 0, 0));
    let delta = new.wrapping_sub(start);
    for (offset, addend) in crate::entry::relocations() {
        // SAFETY: the linker's table names 8-byte places inside the image. This code itself goes on at the old address
        // until it returns; it uses no relocated pointer from here on.
        unsafe {
            let at = (start + offset) as *mut u64;
            at.write_unaligned(start.wrapping_add(addend).wrapping_add(delta));
        }
    }
    Status::SUCCESS
}
