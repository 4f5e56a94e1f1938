//! Images: loading, checking, starting, leaving (UEFI 2.10, section 7.4), and the end of boot services.

use crate::cell::Global;
use crate::tables::{self, path, put, result};
use crate::{arch, bios, disk, event, fs, handle, heap, log, memory, runtime};
use alloc::boxed::Box;
use alloc::string::String;
use alloc::vec::Vec;
use core::ffi::c_void;
use core::ptr::null_mut;
use core::slice;
use r_efi::efi::{self, Boolean, Char16, Status};
use r_efi::protocols::{device_path, loaded_image};
use uefi_core::devpath::{DevicePath, text};
use uefi_core::guid::{Guid, IMAGE_SECURITY_DATABASE};
use uefi_core::pe::{PeImage, Subsystem};
use uefi_core::secure::hash::HashAlgorithm;
use uefi_core::secure::image::{self as policy, Refused};

/// `EFI_LOADED_IMAGE_PROTOCOL_GUID`.
pub const LOADED_IMAGE: Guid = Guid::new(0x5b1b31a1, 0x9562, 0x11d2, [0x8e, 0x3f, 0, 0xa0, 0xc9, 0x69, 0x72, 0x3b]);
/// `EFI_LOADED_IMAGE_DEVICE_PATH_PROTOCOL_GUID`.
const LOADED_IMAGE_PATH: Guid = Guid::new(0xbc62157e, 0x3e33, 0x4fec, [0x99, 0x20, 0x2d, 0x3b, 0x36, 0xd7, 0x50, 0xdf]);

type Entry = unsafe extern "efiapi" fn(efi::Handle, *mut efi::SystemTable) -> Status;

/// An image in memory.
struct Image {
    handle: efi::Handle,
    protocol: *mut loaded_image::Protocol,
    path: *mut c_void,
    base: u64,
    pages: u64,
    entry: u64,
    started: bool,
    /// Loaded although Secure Boot refuses it: it may not be started.
    refused: bool,
    /// Where StartImage waits: stack pointer to go back to on Exit.
    stack: *mut u64,
    exit: Option<(Status, usize, *mut Char16)>,
    driver: bool,
}

static IMAGES: Global<Vec<Image>> = Global::new(Vec::new());
/// Images that are being started, innermost last.
static RUNNING: Global<Vec<efi::Handle>> = Global::new(Vec::new());
/// Handle of the firmware itself, the parent of boot applications.
static FIRMWARE: Global<usize> = Global::new(0);

fn with_image<R>(h: efi::Handle, f: impl FnOnce(&mut Image) -> R) -> Option<R> {
    IMAGES.with(|all| all.iter_mut().find(|i| i.handle == h).map(f))
}

/// The firmware's own image handle.
pub fn firmware() -> efi::Handle {
    let h = FIRMWARE.with(|f| *f);
    if h != 0 {
        return h as efi::Handle;
    }
    let [start, .., end] = crate::entry::image();
    let protocol = tables::leak(loaded_image::Protocol {
        revision: 0x1000,
        parent_handle: null_mut(),
        system_table: tables::system(),
        device_handle: null_mut(),
        file_path: null_mut(),
        reserved: null_mut(),
        load_options_size: 0,
        load_options: null_mut(),
        image_base: start as *mut c_void,
        image_size: end - start,
        image_code_type: efi::RUNTIME_SERVICES_CODE,
        image_data_type: efi::RUNTIME_SERVICES_DATA,
        unload: None,
    });
    let h = handle::install(null_mut(), &LOADED_IMAGE, protocol.cast()).unwrap_or(null_mut());
    FIRMWARE.with(|f| *f = h as usize);
    h
}

/// What refused an image, for the boot manager's screen.
static LAST_REFUSAL: Global<Option<(String, Refused)>> = Global::new(None);

/// The last refusal since the last call.
pub fn take_refusal() -> Option<(String, Refused)> {
    LAST_REFUSAL.with(Option::take)
}

/// A variable's value through boot services.
fn database(name: &str) -> Vec<u8> {
    runtime::get_variable(name, &IMAGE_SECURITY_DATABASE).unwrap_or_default()
}

/// Asks Secure Boot's rule.
fn verify(image: &PeImage<'_>, from: Option<&DevicePath>) -> Result<(), Status> {
    let on = runtime::get_variable("SecureBoot", &uefi_core::guid::GLOBAL_VARIABLE).is_some_and(|v| v == [1]);
    if !on {
        return Ok(());
    }
    match policy::check(image, &database("db"), &database("dbx")) {
        Ok(_) => Ok(()),
        Err(why) => {
            let name = from.map(text::to_text).unwrap_or_else(|| String::from("an image in memory"));
            log!("secure boot refused {name}: {why}");
            bios::secure_boot_event(match why {
                Refused::Unsigned => 1,
                Refused::HashForbidden => 2,
                Refused::UnknownSigner(_) => 3,
                Refused::CertificateForbidden(_) => 4,
                Refused::BadCertificateTable => 5,
                Refused::BadSignature => 0,
            });
            record_execution(image, from, &why);
            LAST_REFUSAL.with(|l| *l = Some((name, why)));
            Err(Status::SECURITY_VIOLATION)
        }
    }
}

/// Adds an entry to the image execution information table (UEFI 2.10, section 32.4.2).
fn record_execution(image: &PeImage<'_>, from: Option<&DevicePath>, why: &Refused) {
    static TABLE: Global<Vec<u8>> = Global::new(Vec::new());
    // EFI_IMAGE_EXECUTION_ACTION: initialized, failed or passed.
    let action: u32 = match why {
        Refused::Unsigned => 0x2, // AUTH_UNTESTED comes before; unsigned images fail as "not found"
        Refused::HashForbidden | Refused::CertificateForbidden(_) => 0x4,
        _ => 0x1,
    };
    let path = from.cloned().unwrap_or_default().to_bytes();
    let hash = policy::digest(image, HashAlgorithm::Sha256).unwrap_or_default();
    let list = uefi_core::secure::sigdb::list(uefi_core::guid::CERT_SHA256, Guid::default(), &[&hash]);
    let mut entry = Vec::new();
    entry.extend(action.to_le_bytes());
    entry.extend(((12 + 2 + path.len() + list.len()) as u32).to_le_bytes());
    entry.extend([0, 0]); // name: empty, terminated
    entry.extend(path);
    entry.extend(list);
    let table = TABLE.with(|t| {
        if t.is_empty() {
            t.extend(0u32.to_le_bytes());
        }
        let count = u32::from_le_bytes([t[0], t[1], t[2], t[3]]) + 1;
        t[..4].copy_from_slice(&count.to_le_bytes());
        t.extend(entry);
        t.clone()
    });
    if let Ok(p) = heap::allocate_pool(efi::ACPI_RECLAIM_MEMORY, table.len()) {
        // SAFETY: fresh pool memory of the table's size.
        unsafe { p.copy_from_nonoverlapping(table.as_ptr(), table.len()) };
        let _ = tables::configure(&IMAGE_SECURITY_DATABASE, p.cast());
    }
}

/// LoadImage.
pub unsafe extern "efiapi" fn load_image(
    boot_policy: Boolean,
    parent: efi::Handle,
    device_path: *mut device_path::Protocol,
    source: *mut c_void,
    size: usize,
    out: *mut efi::Handle,
) -> Status {
    if out.is_null() || handle::get(parent, &LOADED_IMAGE).is_err() {
        return Status::INVALID_PARAMETER;
    }
    let path = path(device_path);
    let data;
    let bytes: &[u8] = if !source.is_null() {
        if size == 0 {
            return Status::LOAD_ERROR;
        }
        // SAFETY: the caller passes `size` bytes.
        unsafe { slice::from_raw_parts(source.cast(), size) }
    } else {
        let Some(p) = &path else {
            return if device_path.is_null() { Status::NOT_FOUND } else { Status::INVALID_PARAMETER };
        };
        match read_path(p, bool::from(boot_policy)) {
            Ok(d) => {
                data = d;
                &data
            }
            Err(s) => return s,
        }
    };
    let (status, h) = load(parent, path.as_ref(), bytes);
    if let Some(h) = h {
        // SAFETY: not null.
        unsafe { out.write_unaligned(h) };
    }
    status
}

/// Reads the file that a path names: through a file system, or a load-file protocol.
pub fn read_path(path: &DevicePath, boot_policy: bool) -> Result<Vec<u8>, Status> {
    if let Some((h, rest)) = tables::locate_by_path(&fs::SIMPLE_FILE_SYSTEM, path)
        && let Some(name) = rest.file_path()
    {
        return fs::read_file(h, &name);
    }
    if let Some(data) = fs::load_file(path, boot_policy) {
        return data;
    }
    Err(Status::NOT_FOUND)
}

/// Lays an image out in memory.
pub fn load(parent: efi::Handle, path: Option<&DevicePath>, bytes: &[u8]) -> (Status, Option<efi::Handle>) {
    let image = match PeImage::parse(bytes) {
        Ok(i) => i,
        Err(e) => {
            log!("image refused: {e}");
            return (Status::UNSUPPORTED, None);
        }
    };
    // A refused image is still laid out (so says LoadImage), but StartImage will not start it.
    let verdict = verify(&image, path);
    if verdict == Err(Status::ACCESS_DENIED) {
        return (Status::ACCESS_DENIED, None);
    }
    let (code, data) = match image.subsystem {
        Subsystem::Application => (efi::LOADER_CODE, efi::LOADER_DATA),
        Subsystem::BootDriver => (efi::BOOT_SERVICES_CODE, efi::BOOT_SERVICES_DATA),
        Subsystem::RuntimeDriver => (efi::RUNTIME_SERVICES_CODE, efi::RUNTIME_SERVICES_DATA),
    };
    let align = u64::from(image.section_alignment).max(memory::PAGE);
    let pages = u64::from(image.size_of_image).div_ceil(memory::PAGE);
    let extra = align / memory::PAGE - 1;
    let Ok(block) = memory::allocate(memory::Placement::Any, code, pages + extra) else {
        return (Status::OUT_OF_RESOURCES, None);
    };
    let base = block.next_multiple_of(align);
    if base > block {
        let _ = memory::free(block, (base - block) / memory::PAGE);
    }
    let tail = block + (pages + extra) * memory::PAGE - (base + pages * memory::PAGE);
    if tail > 0 {
        let _ = memory::free(base + pages * memory::PAGE, tail / memory::PAGE);
    }
    // SAFETY: the pages were just allocated for this image.
    let target = unsafe { slice::from_raw_parts_mut(base as *mut u8, (pages * memory::PAGE) as usize) };
    if let Err(e) = image.load(target, base) {
        log!("image refused: {e}");
        let _ = memory::free(base, pages);
        return (Status::LOAD_ERROR, None);
    }
    // The device that the path starts with, and the file part of the path.
    let located = path.and_then(|p| {
        tables::locate_by_path(&fs::SIMPLE_FILE_SYSTEM, p).or_else(|| tables::locate_by_path(&tables::DEVICE_PATH, p))
    });
    let (device, file) = match &located {
        Some((h, rest)) => (*h, bytes_of(rest)),
        None => (null_mut(), path.map_or(null_mut(), bytes_of)),
    };
    let protocol = tables::leak(loaded_image::Protocol {
        revision: 0x1000,
        parent_handle: parent,
        system_table: tables::system(),
        device_handle: device,
        file_path: file.cast(),
        reserved: null_mut(),
        load_options_size: 0,
        load_options: null_mut(),
        image_base: base as *mut c_void,
        image_size: u64::from(image.size_of_image),
        image_code_type: code,
        image_data_type: data,
        unload: None,
    });
    let full = path.map_or(null_mut(), bytes_of);
    let Ok(h) = handle::install(null_mut(), &LOADED_IMAGE, protocol.cast()) else {
        return (Status::OUT_OF_RESOURCES, None);
    };
    let _ = handle::install(h, &LOADED_IMAGE_PATH, full);
    IMAGES.with(|all| {
        all.push(Image {
            handle: h,
            protocol,
            path: full,
            base,
            pages,
            entry: base + u64::from(image.entry),
            started: false,
            refused: verdict.is_err(),
            stack: null_mut(),
            exit: None,
            driver: image.subsystem != Subsystem::Application,
        });
    });
    (result(verdict), Some(h))
}

/// A path's bytes in memory that stays.
pub fn bytes_of(path: &DevicePath) -> *mut c_void {
    Box::leak(path.to_bytes().into_boxed_slice()).as_mut_ptr().cast()
}

core::arch::global_asm!(
    // start_on(entry rcx, handle rdx, system table r8, where to keep the stack pointer r9) -> status.
    // Keeps everything that the calling convention preserves on the stack, so that `leave` can come back here from any
    // depth.
    ".globl image_start_on",
    "image_start_on:",
    "push rbx; push rbp; push rdi; push rsi; push r12; push r13; push r14; push r15",
    "sub rsp, 168",
    "movaps [rsp], xmm6; movaps [rsp + 16], xmm7; movaps [rsp + 32], xmm8; movaps [rsp + 48], xmm9",
    "movaps [rsp + 64], xmm10; movaps [rsp + 80], xmm11; movaps [rsp + 96], xmm12; movaps [rsp + 112], xmm13",
    "movaps [rsp + 128], xmm14; movaps [rsp + 144], xmm15",
    "mov [r9], rsp",
    "mov rax, rcx",
    "mov rcx, rdx",
    "mov rdx, r8",
    "sub rsp, 32",
    "call rax",
    "add rsp, 32",
    "2:",
    "movaps xmm6, [rsp]; movaps xmm7, [rsp + 16]; movaps xmm8, [rsp + 32]; movaps xmm9, [rsp + 48]",
    "movaps xmm10, [rsp + 64]; movaps xmm11, [rsp + 80]; movaps xmm12, [rsp + 96]; movaps xmm13, [rsp + 112]",
    "movaps xmm14, [rsp + 128]; movaps xmm15, [rsp + 144]",
    "add rsp, 168",
    "pop r15; pop r14; pop r13; pop r12; pop rsi; pop rdi; pop rbp; pop rbx",
    "ret",
    // leave(stack pointer rcx, status rdx): does not return to its caller.
    ".globl image_leave",
    "image_leave:",
    "mov rsp, rcx",
    "mov rax, rdx",
    "jmp 2b",
);

unsafe extern "efiapi" {
    fn image_start_on(entry: Entry, h: efi::Handle, table: *mut efi::SystemTable, stack: *mut *mut u64) -> Status;
    fn image_leave(stack: *mut u64, status: Status) -> !;
}

/// StartImage.
pub unsafe extern "efiapi" fn start_image(h: efi::Handle, size: *mut usize, data: *mut *mut Char16) -> Status {
    let Some(ready) = with_image(h, |i| {
        if i.started {
            return Err(Status::INVALID_PARAMETER);
        }
        if i.refused {
            return Err(Status::SECURITY_VIOLATION);
        }
        i.started = true;
        Ok((i.entry, i.driver))
    }) else {
        return Status::INVALID_PARAMETER;
    };
    let (entry, driver) = match ready {
        Ok(e) => e,
        Err(s) => return s,
    };
    RUNNING.with(|r| r.push(h));
    let tpl = event::tpl();
    // The image's place in the list may move while it runs: the stack pointer has a place of its own.
    let slot: *mut *mut u64 = Box::into_raw(Box::new(null_mut()));
    with_image(h, |i| i.stack = slot.cast());
    // SAFETY: the entry point is inside an image that was laid out and relocated; Secure Boot's rule has agreed.
    let mut status = unsafe {
        let entry: Entry = core::mem::transmute::<usize, Entry>(entry as usize);
        image_start_on(entry, h, tables::system(), slot)
    };
    RUNNING.with(|r| {
        r.pop();
    });
    // SAFETY: made above; nobody uses it any more.
    drop(unsafe { Box::from_raw(slot) });
    if event::tpl() != tpl {
        // An image must leave at the level at which it came; one that does not is put right.
        event::restore(tpl);
    }
    let exit = with_image(h, |i| {
        i.stack = null_mut();
        i.exit.take()
    });
    if let Some(Some((code, exit_size, exit_data))) = exit {
        status = code;
        if !data.is_null() && !size.is_null() {
            // SAFETY: not null.
            unsafe {
                size.write_unaligned(exit_size);
                data.write_unaligned(exit_data);
            }
        }
    }
    // Applications are unloaded when they end; drivers only if they failed.
    if !driver || status.is_error() {
        unload(h);
    }
    status
}

/// Exit.
pub unsafe extern "efiapi" fn exit(h: efi::Handle, status: Status, size: usize, data: *mut Char16) -> Status {
    let Some((started, stack)) = with_image(h, |i| (i.started, i.stack)) else { return Status::INVALID_PARAMETER };
    if !started {
        // Loaded, never started: Exit unloads it.
        unload(h);
        return Status::SUCCESS;
    }
    if stack.is_null() || RUNNING.with(|r| r.last() != Some(&h)) {
        return Status::INVALID_PARAMETER;
    }
    with_image(h, |i| i.exit = Some((status, size, data)));
    // SAFETY: `stack` is the slot in which image_start_on keeps its stack pointer; its frame is live, since the image is
    // the innermost running one.
    unsafe { image_leave(stack.cast::<*mut u64>().read(), status) }
}

fn unload(h: efi::Handle) {
    let gone = IMAGES.with(|all| {
        let at = all.iter().position(|i| i.handle == h)?;
        Some(all.remove(at))
    });
    let Some(image) = gone else { return };
    handle::forget_agent(h);
    let _ = handle::uninstall(h, &LOADED_IMAGE, image.protocol.cast());
    let _ = handle::uninstall(h, &LOADED_IMAGE_PATH, image.path);
    let _ = memory::free(image.base, image.pages);
}

/// UnloadImage.
pub unsafe extern "efiapi" fn unload_image(h: efi::Handle) -> Status {
    let Some((started, protocol)) = with_image(h, |i| (i.started, i.protocol)) else {
        return Status::INVALID_PARAMETER;
    };
    if started {
        // SAFETY: the loaded-image structure lives as long as the image.
        let Some(f) = (unsafe { (*protocol).unload }) else { return Status::UNSUPPORTED };
        // SAFETY: the image gave the function to be called so.
        let status = unsafe { f(h) };
        if status.is_error() {
            return status;
        }
    }
    unload(h);
    Status::SUCCESS
}

/// ExitBootServices. The image handle is not looked at: shim (from 16 on) starts kernels that it has loaded itself, on
/// handles of its own, and the specification (section 7.4.6) has no status for that, only for a stale key.
pub unsafe extern "efiapi" fn exit_boot_services(_image: efi::Handle, key: usize) -> Status {
    event::signal_group(event::GROUP_BEFORE_EXIT_BOOT_SERVICES);
    if key != memory::summary().1 {
        return Status::INVALID_PARAMETER;
    }
    event::signal_group(event::GROUP_EXIT_BOOT_SERVICES);
    crate::misc::watchdog(0);
    disk::stop();
    crate::vmbus::stop();
    event::end_boot_services();
    arch::stop_interrupts();
    bios::write(bios::selector::BOOT_FINALIZE, 1);
    runtime::enter();
    let t = tables::get();
    // SAFETY: the tables are live; nobody else runs.
    unsafe {
        let s = &mut (*t).system;
        (s.console_in_handle, s.con_in) = (null_mut(), null_mut());
        (s.console_out_handle, s.con_out) = (null_mut(), null_mut());
        (s.standard_error_handle, s.std_err) = (null_mut(), null_mut());
        s.boot_services = null_mut();
    }
    tables::seal();
    Status::SUCCESS
}

/// Sets the options (command line) of a loaded image.
pub fn set_options(h: efi::Handle, options: &[u8]) {
    if options.is_empty() {
        return;
    }
    let copy = Box::leak(options.to_vec().into_boxed_slice());
    with_image(h, |i| {
        // SAFETY: the loaded-image structure lives as long as the image.
        unsafe {
            (*i.protocol).load_options = copy.as_mut_ptr().cast();
            (*i.protocol).load_options_size = copy.len() as u32;
        }
    });
}

/// A result in the caller's memory, for callers outside this module.
pub fn give<T>(p: *mut T, value: T) -> Status {
    // SAFETY: the caller of the service passes a pointer or null.
    result(unsafe { put(p, value) })
}
