//! Smaller protocols and tables: random numbers, collation, device path utilities, watchdog, memory attributes,
//! generation ID.

use crate::tables::{self, guid, leak};
use crate::{arch, bios, entry, handle, heap};
use alloc::vec::Vec;
use core::ffi::c_void;
use core::ptr::null_mut;
use core::slice;
use r_efi::efi::{self, Boolean, Char16, Status};
use r_efi::protocols::{device_path, device_path_from_text, device_path_to_text, device_path_utilities, rng};
use uefi_core::devpath::{DevicePath, text};
use uefi_core::guid::Guid;

fn of(g: &efi::Guid) -> Guid {
    Guid(*g.as_bytes())
}

/// Installs them all.
pub fn init() {
    let install = |g: Guid, p: *mut c_void| {
        let _ = handle::install(null_mut(), &g, p);
    };
    install(of(&rng::PROTOCOL_GUID), leak(rng::Protocol { get_info: rng_info, get_rng: rng_get }).cast());
    install(
        of(&device_path_to_text::PROTOCOL_GUID),
        leak(device_path_to_text::Protocol {
            convert_device_node_to_text: node_to_text,
            convert_device_path_to_text: path_to_text,
        })
        .cast(),
    );
    install(
        of(&device_path_from_text::PROTOCOL_GUID),
        leak(device_path_from_text::Protocol {
            convert_text_to_device_node: text_to_node,
            convert_text_to_device_path: text_to_path,
        })
        .cast(),
    );
    install(
        of(&device_path_utilities::PROTOCOL_GUID),
        leak(device_path_utilities::Protocol {
            get_device_path_size: path_size,
            duplicate_device_path: path_duplicate,
            append_device_path: path_append,
            append_device_node: path_append_node,
            append_device_path_instance: path_append_instance,
            get_next_device_path_instance: path_next_instance,
            is_device_path_multi_instance: path_is_multi,
            create_device_node: node_create,
        })
        .cast(),
    );
    install(
        Guid::new(0xa4c751fc, 0x23ae, 0x4c3e, [0x92, 0xe9, 0x49, 0x64, 0xcf, 0x63, 0xf3, 0x49]),
        leak(Collation {
            stri_coll,
            metai_match,
            str_lwr,
            str_upr,
            fat_to_str,
            str_to_fat,
            languages: LANGUAGES.as_ptr(),
        })
        .cast(),
    );
    memory_attributes();
    crate::paging::install();
    generation_id();
}

/// Arms the host's watchdog for boot services; 0 disarms it.
pub fn watchdog(seconds: u32) {
    const RUNNING: u32 = 3;
    const ONE_SHOT: u32 = 0x10;
    let on = arch::interrupts_off();
    if seconds == 0 {
        bios::write(bios::selector::WATCHDOG_CONFIG, 0);
    } else {
        bios::write(bios::selector::WATCHDOG_COUNT, seconds);
        bios::write(bios::selector::WATCHDOG_CONFIG, RUNNING | ONE_SHOT);
    }
    arch::interrupts_restore(on);
}

/// `EFI_MEMORY_ATTRIBUTES_TABLE`: the firmware's code is read-only, its data is not executable.
fn memory_attributes() {
    const GUID: Guid = Guid::new(0xdcfa911d, 0x26eb, 0x469f, [0xa2, 0x20, 0x38, 0xb7, 0xdc, 0x46, 0x12, 0x20]);
    let [start, rodata, data, end] = entry::image();
    let parts =
        [(start, rodata, efi::MEMORY_RO), (rodata, data, efi::MEMORY_RO | efi::MEMORY_XP), (data, end, efi::MEMORY_XP)];
    let mut t: Vec<u8> = Vec::new();
    for word in [1u32, parts.len() as u32, crate::memory::DESCRIPTOR_SIZE as u32, 0] {
        t.extend(word.to_le_bytes());
    }
    for (from, to, attributes) in parts {
        let mut d = [0u8; crate::memory::DESCRIPTOR_SIZE];
        d[..4].copy_from_slice(&efi::RUNTIME_SERVICES_CODE.to_le_bytes());
        d[8..16].copy_from_slice(&from.to_le_bytes());
        d[24..32].copy_from_slice(&((to - from) / 4096).to_le_bytes());
        d[32..40].copy_from_slice(&(attributes | efi::MEMORY_RUNTIME).to_le_bytes());
        t.extend(d);
    }
    if let Ok(p) = heap::allocate_pool(efi::BOOT_SERVICES_DATA, t.len()) {
        // SAFETY: fresh pool memory of the table's size.
        unsafe { p.copy_from_nonoverlapping(t.as_ptr(), t.len()) };
        let _ = tables::configure(&GUID, p.cast());
    }
}

/// Tells the host where the generation ID lies: a page of ACPI NVS memory that the DSDT finds through the host.
fn generation_id() {
    if let Ok(page) = crate::memory::allocate(crate::memory::Placement::Below(0xffff_ffff), efi::ACPI_MEMORY_NVS, 1) {
        bios::write(bios::selector::GENERATION_ID_LOW, page as u32);
        bios::write(bios::selector::GENERATION_ID_HIGH, (page >> 32) as u32);
    }
}

/// `EFI_RNG_ALGORITHM_RAW`.
const RNG_RAW: Guid = Guid::new(0xe43176d7, 0xb6e8, 0x4827, [0xb7, 0x84, 0x7f, 0xfd, 0xc4, 0xb6, 0x85, 0x61]);

unsafe extern "efiapi" fn rng_info(_: *mut rng::Protocol, size: *mut usize, list: *mut rng::Algorithm) -> Status {
    if size.is_null() {
        return Status::INVALID_PARAMETER;
    }
    // SAFETY: not null; the buffer has `*size` bytes by the caller's word.
    unsafe {
        let room = size.read_unaligned();
        size.write_unaligned(16);
        if room < 16 {
            return Status::BUFFER_TOO_SMALL;
        }
        if list.is_null() {
            return Status::INVALID_PARAMETER;
        }
        list.cast::<[u8; 16]>().write_unaligned(RNG_RAW.0);
    }
    Status::SUCCESS
}
unsafe extern "efiapi" fn rng_get(
    _: *mut rng::Protocol,
    algorithm: *mut rng::Algorithm,
    size: usize,
    out: *mut u8,
) -> Status {
    if size == 0 || out.is_null() {
        return Status::INVALID_PARAMETER;
    }
    if !algorithm.is_null() && guid(algorithm) != Ok(RNG_RAW) {
        return Status::UNSUPPORTED;
    }
    // SAFETY: the caller passes `size` bytes.
    let good = bios::random(unsafe { slice::from_raw_parts_mut(out, size) });
    if good { Status::SUCCESS } else { Status::DEVICE_ERROR }
}

/// A string in pool memory that the caller frees.
fn string_to_pool(s: &str) -> *mut Char16 {
    let units: Vec<u16> = s.encode_utf16().chain([0]).collect();
    tables::to_pool(&units).unwrap_or(null_mut())
}
/// A path in pool memory that the caller frees.
fn path_to_pool(bytes: &[u8]) -> *mut device_path::Protocol {
    tables::to_pool(bytes).unwrap_or(null_mut()).cast()
}
/// A terminated string of a caller.
pub fn string(p: *const Char16) -> Option<alloc::string::String> {
    if p.is_null() {
        return None;
    }
    let mut units = Vec::new();
    loop {
        // SAFETY: the caller passes a terminated string.
        match unsafe { p.add(units.len()).read_unaligned() } {
            0 => return Some(alloc::string::String::from_utf16_lossy(&units)),
            c if units.len() < 16384 => units.push(c),
            _ => return None,
        }
    }
}

/// One node of a caller, as a path of that node.
fn single(node: *const device_path::Protocol) -> Option<DevicePath> {
    if node.is_null() {
        return None;
    }
    // SAFETY: the caller passes a node; its header says how long it is.
    unsafe {
        let h = node.cast::<u8>();
        let len = usize::from(u16::from_le_bytes([*h.add(2), *h.add(3)]));
        (len >= 4).then(|| DevicePath::new().with(*h, *h.add(1), slice::from_raw_parts(h.add(4), len - 4)))
    }
}

unsafe extern "efiapi" fn node_to_text(n: *mut device_path::Protocol, _: Boolean, _: Boolean) -> *mut Char16 {
    single(n).map_or(null_mut(), |p| string_to_pool(&text::to_text(&p)))
}
unsafe extern "efiapi" fn path_to_text(p: *mut device_path::Protocol, _: Boolean, _: Boolean) -> *mut Char16 {
    tables::path(p).map_or(null_mut(), |p| string_to_pool(&text::to_text(&p)))
}
unsafe extern "efiapi" fn text_to_node(t: *const Char16) -> *mut device_path::Protocol {
    let Some(path) = string(t).and_then(|t| text::from_text(&t)) else { return null_mut() };
    let bytes = path.to_bytes();
    path_to_pool(&bytes[..bytes.len() - 4])
}
unsafe extern "efiapi" fn text_to_path(t: *const Char16) -> *mut device_path::Protocol {
    string(t).and_then(|t| text::from_text(&t)).map_or(null_mut(), |p| path_to_pool(&p.to_bytes()))
}
unsafe extern "efiapi" fn path_size(p: *const device_path::Protocol) -> usize {
    tables::path(p).map_or(0, |p| p.to_bytes().len())
}
unsafe extern "efiapi" fn path_duplicate(p: *const device_path::Protocol) -> *mut device_path::Protocol {
    tables::path(p).map_or(null_mut(), |p| path_to_pool(&p.to_bytes()))
}
unsafe extern "efiapi" fn path_append(
    a: *const device_path::Protocol,
    b: *const device_path::Protocol,
) -> *mut device_path::Protocol {
    let (a, b) = (tables::path(a).unwrap_or_default(), tables::path(b).unwrap_or_default());
    path_to_pool(&a.join(&b).to_bytes())
}
unsafe extern "efiapi" fn path_append_node(
    a: *const device_path::Protocol,
    n: *const device_path::Protocol,
) -> *mut device_path::Protocol {
    let (a, n) = (tables::path(a).unwrap_or_default(), single(n).unwrap_or_default());
    path_to_pool(&a.join(&n).to_bytes())
}
unsafe extern "efiapi" fn path_append_instance(
    a: *const device_path::Protocol,
    i: *const device_path::Protocol,
) -> *mut device_path::Protocol {
    let Some(i) = tables::path(i) else { return null_mut() };
    let whole = match tables::path(a) {
        Some(a) => a.with(0x7f, 1, &[]).join(&i),
        None => i,
    };
    path_to_pool(&whole.to_bytes())
}
unsafe extern "efiapi" fn path_next_instance(
    p: *mut *mut device_path::Protocol,
    size: *mut usize,
) -> *mut device_path::Protocol {
    if p.is_null() {
        return null_mut();
    }
    // SAFETY: not null.
    let start = unsafe { p.read_unaligned() };
    let Some(whole) = tables::path(start) else { return null_mut() };
    let (mut first, mut used, mut more) = (DevicePath::new(), 0, false);
    for n in whole.iter() {
        used += n.data.len() + 4;
        if n.kind == (0x7f, 1) {
            more = true;
            break;
        }
        first = first.with(n.kind.0, n.kind.1, n.data);
    }
    let bytes = first.to_bytes();
    // SAFETY: not null; `used` bytes of the path were walked.
    unsafe {
        p.write_unaligned(if more { start.cast::<u8>().add(used).cast() } else { null_mut() });
        if !size.is_null() {
            size.write_unaligned(bytes.len());
        }
    }
    path_to_pool(&bytes)
}
unsafe extern "efiapi" fn path_is_multi(p: *const device_path::Protocol) -> Boolean {
    tables::path(p).is_some_and(|p| p.iter().any(|n| n.kind == (0x7f, 1))).into()
}
unsafe extern "efiapi" fn node_create(kind: u8, sub: u8, len: u16) -> *mut device_path::Protocol {
    if len < 4 {
        return null_mut();
    }
    let mut bytes = alloc::vec![0u8; usize::from(len)];
    bytes[0] = kind;
    bytes[1] = sub;
    bytes[2..4].copy_from_slice(&len.to_le_bytes());
    path_to_pool(&bytes)
}

/// `EFI_UNICODE_COLLATION_PROTOCOL` (UEFI 2.10, section 13.10).
#[repr(C)]
struct Collation {
    stri_coll: unsafe extern "efiapi" fn(*mut Collation, *const Char16, *const Char16) -> isize,
    metai_match: unsafe extern "efiapi" fn(*mut Collation, *const Char16, *const Char16) -> Boolean,
    str_lwr: unsafe extern "efiapi" fn(*mut Collation, *mut Char16),
    str_upr: unsafe extern "efiapi" fn(*mut Collation, *mut Char16),
    fat_to_str: unsafe extern "efiapi" fn(*mut Collation, usize, *const u8, *mut Char16),
    str_to_fat: unsafe extern "efiapi" fn(*mut Collation, *const Char16, usize, *mut u8) -> Boolean,
    languages: *const u8,
}
static LANGUAGES: &[u8] = b"en\0";

fn upper(c: u16) -> u16 {
    char::from_u32(u32::from(c))
        .map(|c| c.to_uppercase())
        .filter(|u| u.clone().count() == 1)
        .and_then(|mut u| u.next())
        .and_then(|c| u16::try_from(u32::from(c)).ok())
        .unwrap_or(c)
}
fn lower(c: u16) -> u16 {
    char::from_u32(u32::from(c))
        .map(|c| c.to_lowercase())
        .filter(|u| u.clone().count() == 1)
        .and_then(|mut u| u.next())
        .and_then(|c| u16::try_from(u32::from(c)).ok())
        .unwrap_or(c)
}
fn units(p: *const Char16) -> Vec<u16> {
    string(p).map(|s| s.encode_utf16().collect()).unwrap_or_default()
}
unsafe extern "efiapi" fn stri_coll(_: *mut Collation, a: *const Char16, b: *const Char16) -> isize {
    let (a, b) = (units(a), units(b));
    a.iter().map(|c| upper(*c)).cmp(b.iter().map(|c| upper(*c))) as isize
}
unsafe extern "efiapi" fn metai_match(_: *mut Collation, s: *const Char16, p: *const Char16) -> Boolean {
    matches(&units(s), &units(p), 0).into()
}
/// Wild cards: `*` any number of characters, `?` one, `[a-c]` one of a set.
fn matches(s: &[u16], p: &[u16], depth: u32) -> bool {
    const STAR: u16 = b'*' as u16;
    const ANY: u16 = b'?' as u16;
    const OPEN: u16 = b'[' as u16;
    const CLOSE: u16 = b']' as u16;
    if depth > 64 {
        return false;
    }
    match (p.split_first(), s.split_first()) {
        (None, None) => true,
        (Some((&STAR, rest)), _) => (0..=s.len()).any(|n| matches(&s[n..], rest, depth + 1)),
        (Some((&ANY, rest)), Some((_, tail))) => matches(tail, rest, depth),
        (Some((&OPEN, rest)), Some((c, tail))) => {
            let Some(end) = rest.iter().position(|c| *c == CLOSE) else { return false };
            let set = &rest[..end];
            let mut i = 0;
            let mut inside = false;
            while i < set.len() {
                if i + 2 < set.len() && set[i + 1] == b'-' as u16 {
                    inside |= (upper(set[i])..=upper(set[i + 2])).contains(&upper(*c));
                    i += 3;
                } else {
                    inside |= upper(set[i]) == upper(*c);
                    i += 1;
                }
            }
            inside && matches(tail, &rest[end + 1..], depth)
        }
        (Some((a, rest)), Some((b, tail))) => upper(*a) == upper(*b) && matches(tail, rest, depth),
        _ => false,
    }
}
fn change(p: *mut Char16, f: fn(u16) -> u16) {
    for (i, c) in units(p).into_iter().enumerate() {
        // SAFETY: the string has at least this many characters.
        unsafe { p.add(i).write_unaligned(f(c)) };
    }
}
unsafe extern "efiapi" fn str_lwr(_: *mut Collation, p: *mut Char16) {
    change(p, lower);
}
unsafe extern "efiapi" fn str_upr(_: *mut Collation, p: *mut Char16) {
    change(p, upper);
}
unsafe extern "efiapi" fn fat_to_str(_: *mut Collation, size: usize, fat: *const u8, out: *mut Char16) {
    // SAFETY: the caller passes `size` bytes and room for as many characters and a terminator.
    unsafe {
        let mut n = 0;
        while n < size && *fat.add(n) != 0 {
            out.add(n).write_unaligned(u16::from(*fat.add(n)));
            n += 1;
        }
        out.add(n).write_unaligned(0);
    }
}
unsafe extern "efiapi" fn str_to_fat(_: *mut Collation, s: *const Char16, size: usize, fat: *mut u8) -> Boolean {
    let (mut lossy, mut n) = (false, 0);
    for c in units(s) {
        if n == size {
            break;
        }
        let byte = match upper(c) {
            0x20 | 0x2e => continue,
            c @ 0x21..=0x7e if !"\"*+,/:;<=>?[\\]|".contains(char::from(c as u8)) => c as u8,
            _ => {
                lossy = true;
                b'_'
            }
        };
        // SAFETY: the caller passes room for `size` bytes.
        unsafe { fat.add(n).write(byte) };
        n += 1;
    }
    if n < size {
        // SAFETY: as above.
        unsafe { fat.add(n).write(0) };
    }
    lossy.into()
}
