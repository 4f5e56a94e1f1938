//! HII Database and HII String (UEFI 2.10, sections 34.3 and 34.8), as far as the UEFI shell and boot loaders ask: package
//! lists with strings. There are no keyboard layouts to choose from, and no forms.

use crate::cell::Global;
use crate::handle;
use crate::tables::{guid, leak, put, result};
use alloc::string::String;
use alloc::vec::Vec;
use core::ptr::null_mut;
use core::slice;
use r_efi::efi::{self, Char8, Char16, Status};
use r_efi::hii::{Handle, PackageListHeader, StringId};
use r_efi::protocols::{hii_database, hii_string};
use uefi_core::guid::Guid;
use uefi_core::hii::{MAX_LIST, NoString, PackageList, kind};

/// Most lists and notifications: a program must not use the firmware's memory up by mistake.
const MAX_ENTRIES: usize = 256;

struct Entry {
    id: usize,
    list: PackageList,
    driver: efi::Handle,
}

#[derive(Clone, Copy)]
struct Notify {
    id: usize,
    package: u8,
    guid: Guid,
    function: hii_database::Notify,
    what: usize,
}

struct Database {
    entries: Vec<Entry>,
    notifies: Vec<Notify>,
    next: usize,
}
// SAFETY: handles are opaque values of the one processor's programs.
unsafe impl Send for Database {}

static DATABASE: Global<Database> = Global::new(Database { entries: Vec::new(), notifies: Vec::new(), next: 1 });

impl Database {
    fn entry(&mut self, h: Handle) -> Result<&mut Entry, Status> {
        self.entries.iter_mut().find(|e| e.id == h as usize).ok_or(Status::NOT_FOUND)
    }
}

/// Installs both protocols.
pub fn init() {
    let of = |g: &efi::Guid| Guid(*g.as_bytes());
    let database = leak(hii_database::Protocol {
        new_package_list,
        remove_package_list,
        update_package_list,
        list_package_lists,
        export_package_lists,
        register_package_notify,
        unregister_package_notify,
        find_keyboard_layouts,
        get_keyboard_layout,
        set_keyboard_layout,
        get_package_list_handle,
    });
    let strings =
        leak(hii_string::Protocol { new_string, get_string, set_string, get_languages, get_secondary_languages });
    let h = handle::install(null_mut(), &of(&hii_database::PROTOCOL_GUID), database.cast()).unwrap_or(null_mut());
    let _ = handle::install(h, &of(&hii_string::PROTOCOL_GUID), strings.cast());
}

/// A package list that a caller passes.
fn list(p: *const PackageListHeader) -> Result<PackageList, Status> {
    if p.is_null() {
        return Err(Status::INVALID_PARAMETER);
    }
    // SAFETY: the caller passes a list, whose header says how long it is.
    let bytes = unsafe {
        let len = p.cast::<u8>().add(16).cast::<u32>().read_unaligned() as usize;
        slice::from_raw_parts(p.cast::<u8>(), len.clamp(20, MAX_LIST))
    };
    PackageList::parse(bytes).ok_or(Status::INVALID_PARAMETER)
}

/// Calls those who want to know about the packages of a list.
fn tell(h: Handle, packages: &PackageList, what: usize) {
    let notifies = DATABASE.with(|d| d.notifies.clone());
    if notifies.is_empty() {
        return;
    }
    let guid = efi::Guid::from_bytes(&packages.guid.0);
    for package in packages.kinds() {
        for n in notifies.iter().filter(|n| n.what == what && (n.package == package || n.package == kind::ALL)) {
            if n.package == 1 && n.guid != packages.guid {
                continue;
            }
            let header = u32::from(package) << 24 | 4;
            // SAFETY: the function was registered to be called so.
            unsafe { (n.function)(package, &guid, (&raw const header).cast(), h, what) };
        }
    }
}

unsafe extern "efiapi" fn new_package_list(
    _: *const hii_database::Protocol,
    packages: *const PackageListHeader,
    driver: efi::Handle,
    out: *mut Handle,
) -> Status {
    if out.is_null() {
        return Status::INVALID_PARAMETER;
    }
    let list = match list(packages) {
        Ok(l) => l,
        Err(s) => return s,
    };
    let copy = list.clone();
    let id = DATABASE.with(|d| {
        if d.entries.len() >= MAX_ENTRIES {
            return None;
        }
        let id = d.next;
        d.next += 1;
        d.entries.push(Entry { id, list, driver });
        Some(id)
    });
    let Some(id) = id else { return Status::OUT_OF_RESOURCES };
    tell(id as Handle, &copy, hii_database::NOTIFY_NEW_PACK);
    // SAFETY: not null.
    result(unsafe { put(out, id as Handle) })
}

unsafe extern "efiapi" fn remove_package_list(_: *const hii_database::Protocol, h: Handle) -> Status {
    let gone = DATABASE.with(|d| {
        let at = d.entries.iter().position(|e| e.id == h as usize)?;
        Some(d.entries.remove(at).list)
    });
    match gone {
        Some(list) => {
            tell(h, &list, hii_database::NOTIFY_REMOVE_PACK);
            Status::SUCCESS
        }
        None => Status::NOT_FOUND,
    }
}

unsafe extern "efiapi" fn update_package_list(
    _: *const hii_database::Protocol,
    h: Handle,
    packages: *const PackageListHeader,
) -> Status {
    if h.is_null() {
        return Status::INVALID_PARAMETER;
    }
    let new = match list(packages) {
        Ok(l) => l,
        Err(s) => return s,
    };
    let copy = new.clone();
    let old = DATABASE.with(|d| {
        let e = d.entry(h)?;
        let old = e.list.clone();
        // Packages of a type that the new list has are replaced; others stay.
        if !new.languages.is_empty() {
            e.list.languages = new.languages;
        }
        e.list.others.retain(|o| !new.others.iter().any(|n| n.0 == o.0));
        e.list.others.extend(new.others);
        Ok(old)
    });
    match old {
        Ok(old) => {
            tell(h, &old, hii_database::NOTIFY_REMOVE_PACK);
            tell(h, &copy, hii_database::NOTIFY_ADD_PACK);
            Status::SUCCESS
        }
        Err(s) => s,
    }
}

/// Gives bytes into a caller's buffer whose size is in and out.
///
/// # Safety
/// `size` is null or valid, and `out` is null or has `*size` bytes.
unsafe fn give(size: *mut usize, out: *mut u8, bytes: &[u8]) -> Status {
    if size.is_null() {
        return Status::INVALID_PARAMETER;
    }
    // SAFETY: the caller's promise.
    unsafe {
        let room = size.read_unaligned();
        size.write_unaligned(bytes.len());
        if room < bytes.len() {
            return Status::BUFFER_TOO_SMALL;
        }
        if out.is_null() {
            return Status::INVALID_PARAMETER;
        }
        out.copy_from(bytes.as_ptr(), bytes.len());
    }
    Status::SUCCESS
}

unsafe extern "efiapi" fn list_package_lists(
    _: *const hii_database::Protocol,
    package: u8,
    package_guid: *const efi::Guid,
    size: *mut usize,
    out: *mut Handle,
) -> Status {
    // A GUID belongs to the package type that is named by one, and to no other.
    if (package == 1) == package_guid.is_null() {
        return Status::INVALID_PARAMETER;
    }
    let wanted = guid(package_guid).ok();
    let handles: Vec<u8> = DATABASE.with(|d| {
        let fits = |e: &&Entry| {
            package == kind::ALL || e.list.kinds().any(|k| k == package) && wanted.is_none_or(|w| w == e.list.guid)
        };
        d.entries.iter().filter(fits).flat_map(|e| e.id.to_le_bytes()).collect()
    });
    if handles.is_empty() {
        return Status::NOT_FOUND;
    }
    // SAFETY: the caller passes a buffer of `*size` bytes.
    unsafe { give(size, out.cast(), &handles) }
}

unsafe extern "efiapi" fn export_package_lists(
    _: *const hii_database::Protocol,
    h: Handle,
    size: *mut usize,
    out: *mut PackageListHeader,
) -> Status {
    let bytes: Vec<u8> = DATABASE.with(|d| {
        let wanted = |e: &&Entry| h.is_null() || e.id == h as usize;
        d.entries.iter().filter(wanted).flat_map(|e| e.list.encode()).collect()
    });
    if bytes.is_empty() {
        return Status::NOT_FOUND;
    }
    // SAFETY: the caller passes a buffer of `*size` bytes.
    unsafe { give(size, out.cast(), &bytes) }
}

unsafe extern "efiapi" fn register_package_notify(
    _: *const hii_database::Protocol,
    package: u8,
    package_guid: *const efi::Guid,
    function: hii_database::Notify,
    what: usize,
    out: *mut efi::Handle,
) -> Status {
    if out.is_null() || (package == 1) == package_guid.is_null() || !matches!(what, 1 | 2 | 4 | 8) {
        return Status::INVALID_PARAMETER;
    }
    let guid = guid(package_guid).unwrap_or_default();
    let id = DATABASE.with(|d| {
        if d.notifies.len() >= MAX_ENTRIES {
            return None;
        }
        let id = d.next;
        d.next += 1;
        d.notifies.push(Notify { id, package, guid, function, what });
        Some(id)
    });
    let Some(id) = id else { return Status::OUT_OF_RESOURCES };
    // SAFETY: not null.
    result(unsafe { put(out, id as efi::Handle) })
}

unsafe extern "efiapi" fn unregister_package_notify(_: *const hii_database::Protocol, h: efi::Handle) -> Status {
    DATABASE.with(|d| {
        let before = d.notifies.len();
        d.notifies.retain(|n| n.id != h as usize);
        if d.notifies.len() < before { Status::SUCCESS } else { Status::NOT_FOUND }
    })
}

unsafe extern "efiapi" fn find_keyboard_layouts(
    _: *const hii_database::Protocol,
    size: *mut u16,
    _: *mut efi::Guid,
) -> Status {
    // SAFETY: null or writable by the caller's word. There is none.
    result(unsafe { put(size, 0) })
}
unsafe extern "efiapi" fn get_keyboard_layout(
    _: *const hii_database::Protocol,
    _: *const efi::Guid,
    size: *mut u16,
    _: *mut hii_database::KeyboardLayout,
) -> Status {
    if size.is_null() { Status::INVALID_PARAMETER } else { Status::NOT_FOUND }
}
unsafe extern "efiapi" fn set_keyboard_layout(_: *const hii_database::Protocol, g: *mut efi::Guid) -> Status {
    if g.is_null() { Status::INVALID_PARAMETER } else { Status::NOT_FOUND }
}

unsafe extern "efiapi" fn get_package_list_handle(
    _: *const hii_database::Protocol,
    h: Handle,
    out: *mut efi::Handle,
) -> Status {
    match DATABASE.with(|d| d.entry(h).map(|e| e.driver)) {
        // SAFETY: null or writable by the caller's word.
        Ok(driver) => result(unsafe { put(out, driver) }),
        Err(_) => Status::INVALID_PARAMETER,
    }
}

/// An ASCII text that a caller passes.
fn narrow(p: *const Char8) -> Option<String> {
    if p.is_null() {
        return None;
    }
    // SAFETY: the caller passes a terminated string; reading stops at its terminator.
    let bytes: Vec<u8> = (0..128).map(|i| unsafe { p.cast::<u8>().add(i).read() }).take_while(|b| *b != 0).collect();
    String::from_utf8(bytes).ok()
}

/// A wide text that a caller passes.
fn wide(p: *const Char16) -> Option<Vec<u16>> {
    if p.is_null() {
        return None;
    }
    // SAFETY: the caller passes a terminated string; reading stops at its terminator.
    Some((0..65536).map(|i| unsafe { p.add(i).read_unaligned() }).take_while(|u| *u != 0).collect())
}

unsafe extern "efiapi" fn new_string(
    _: *const hii_string::Protocol,
    h: Handle,
    out: *mut StringId,
    language: *const Char8,
    _: *const Char16,
    text: *mut Char16,
    _: *const hii_string::Info,
) -> Status {
    let (Some(language), Some(text)) = (narrow(language), wide(text)) else { return Status::INVALID_PARAMETER };
    if out.is_null() {
        return Status::INVALID_PARAMETER;
    }
    match DATABASE.with(|d| d.entry(h).map(|e| e.list.add(&language, &text))) {
        // SAFETY: not null.
        Ok(Some(id)) => result(unsafe { put(out, id) }),
        Ok(None) => Status::OUT_OF_RESOURCES,
        Err(s) => s,
    }
}

unsafe extern "efiapi" fn get_string(
    _: *const hii_string::Protocol,
    language: *const Char8,
    h: Handle,
    id: StringId,
    out: *mut Char16,
    size: *mut usize,
    font: *mut *mut hii_string::Info,
) -> Status {
    let Some(language) = narrow(language) else { return Status::INVALID_PARAMETER };
    if size.is_null() || id == 0 {
        return Status::INVALID_PARAMETER;
    }
    let found = DATABASE.with(|d| {
        d.entry(h).and_then(|e| {
            e.list.string(&language, id).map(<[u16]>::to_vec).map_err(|e| match e {
                NoString::NotFound => Status::NOT_FOUND,
                NoString::Language => Status::INVALID_LANGUAGE,
            })
        })
    });
    match found {
        Ok(text) => {
            let bytes: Vec<u8> = text.iter().chain(&[0]).flat_map(|u| u.to_le_bytes()).collect();
            // SAFETY: `font` is null or writable; the caller's buffer has `*size` bytes. No string has a font of its own.
            unsafe {
                let _ = put(font, null_mut());
                give(size, out.cast(), &bytes)
            }
        }
        Err(s) => s,
    }
}

unsafe extern "efiapi" fn set_string(
    _: *const hii_string::Protocol,
    h: Handle,
    id: StringId,
    language: *const Char8,
    text: *mut Char16,
    _: *const hii_string::Info,
) -> Status {
    let (Some(language), Some(text)) = (narrow(language), wide(text)) else { return Status::INVALID_PARAMETER };
    match DATABASE.with(|d| d.entry(h).map(|e| e.list.replace(&language, id, &text))) {
        Ok(true) => Status::SUCCESS,
        Ok(false) => Status::NOT_FOUND,
        Err(s) => s,
    }
}

unsafe extern "efiapi" fn get_languages(
    _: *const hii_string::Protocol,
    h: Handle,
    out: *mut Char8,
    size: *mut usize,
) -> Status {
    let names = DATABASE.with(|d| {
        d.entry(h).map(|e| {
            let names: Vec<&str> = e.list.languages.iter().map(|l| l.name.as_str()).collect();
            names.join(";") + "\0"
        })
    });
    match names {
        // SAFETY: the caller passes a buffer of `*size` bytes.
        Ok(names) => unsafe { give(size, out.cast(), names.as_bytes()) },
        Err(s) => s,
    }
}

unsafe extern "efiapi" fn get_secondary_languages(
    _: *const hii_string::Protocol,
    h: Handle,
    language: *const Char8,
    _: *mut Char8,
    size: *mut usize,
) -> Status {
    let Some(language) = narrow(language) else { return Status::INVALID_PARAMETER };
    if size.is_null() {
        return Status::INVALID_PARAMETER;
    }
    let known =
        DATABASE.with(|d| d.entry(h).map(|e| e.list.languages.iter().any(|l| l.name.eq_ignore_ascii_case(&language))));
    match known {
        // No package names secondary languages here.
        Ok(true) => Status::NOT_FOUND,
        Ok(false) => Status::INVALID_LANGUAGE,
        Err(s) => s,
    }
}
