//! The system table and the boot services table: the C side of [`crate::memory`], [`crate::event`], [`crate::handle`] and
//! [`crate::image`]. Each function checks its pointers as the specification's status tables say and calls the Rust side.

use crate::cell::Global;
use crate::{event, handle, heap, image, memory};
use alloc::vec::Vec;
use core::ffi::c_void;
use core::ptr::null_mut;
use core::slice;
use r_efi::efi::{self, Boolean, Char16, ConfigurationTable, MemoryDescriptor, Status, TableHeader};
use r_efi::protocols::device_path;
use uefi_core::devpath::DevicePath;
use uefi_core::guid::Guid;
use uefi_core::partition::crc32;

/// UEFI 2.10.
const REVISION: u32 = 2 << 16 | 100;
const FIRMWARE_REVISION: u32 = 0x0001_0000;
const MAX_TABLES: usize = 32;

#[repr(C)]
pub struct Tables {
    pub system: efi::SystemTable,
    pub boot: efi::BootServices,
    pub runtime: efi::RuntimeServices,
    configuration: [ConfigurationTable; MAX_TABLES],
    vendor: [u16; 16],
}

/// A place for the tables: made in [`init`], before anything reads them.
struct Place(core::cell::UnsafeCell<core::mem::MaybeUninit<Tables>>);
// SAFETY: written once in `init`; later writes happen with interrupts off on the one processor.
unsafe impl Sync for Place {}
static TABLES: Place = Place(core::cell::UnsafeCell::new(core::mem::MaybeUninit::uninit()));

/// Lower half of the monotonic count.
static MONOTONIC: Global<u32> = Global::new(0);

/// The tables. They are in the firmware's image, which is runtime memory.
pub fn get() -> *mut Tables {
    TABLES.0.get().cast()
}

/// The system table.
pub fn system() -> *mut efi::SystemTable {
    // SAFETY: `init` has written the tables.
    unsafe { &raw mut (*get()).system }
}

pub fn result(r: Result<(), Status>) -> Status {
    r.err().unwrap_or(Status::SUCCESS)
}

/// A GUID that a caller passes.
pub fn guid(p: *const efi::Guid) -> Result<Guid, Status> {
    if p.is_null() {
        return Err(Status::INVALID_PARAMETER);
    }
    // SAFETY: the caller passes a GUID's address, as every service's definition says.
    Ok(Guid(unsafe { p.cast::<[u8; 16]>().read_unaligned() }))
}

/// Writes a result where the caller wants it.
///
/// # Safety
/// `p` is null or points at writable memory for a `T`.
pub unsafe fn put<T>(p: *mut T, value: T) -> Result<(), Status> {
    if p.is_null() {
        return Err(Status::INVALID_PARAMETER);
    }
    // SAFETY: the caller's promise.
    unsafe { p.write_unaligned(value) };
    Ok(())
}

/// A device path that a caller passes.
pub fn path(p: *const device_path::Protocol) -> Option<DevicePath> {
    if p.is_null() {
        return None;
    }
    // Length first: node by node to the end, bounded.
    let mut len = 0;
    loop {
        // SAFETY: the caller passes a well-formed device path; each header says how far the next one is.
        let (kind, sub, size) = unsafe {
            let h = p.cast::<u8>().add(len);
            (*h, *h.add(1), usize::from(u16::from_le_bytes([*h.add(2), *h.add(3)])))
        };
        if size < 4 || len + size > uefi_core::devpath::MAX_PATH {
            return None;
        }
        len += size;
        if kind & 0x7f == 0x7f && sub == 0xff {
            break;
        }
    }
    // SAFETY: `len` bytes were just walked.
    DevicePath::parse(unsafe { slice::from_raw_parts(p.cast(), len) }).map(|(p, _)| p)
}

/// Copies a list into pool memory that the caller frees.
pub fn to_pool<T: Copy>(items: &[T]) -> Result<*mut T, Status> {
    let at = heap::allocate_pool(efi::BOOT_SERVICES_DATA, size_of_val(items).max(1))?.cast::<T>();
    // SAFETY: the pool memory is large enough and 16-byte aligned.
    unsafe { at.copy_from_nonoverlapping(items.as_ptr(), items.len()) };
    Ok(at)
}

/// Leaks a value: protocol structures live as long as the firmware.
pub fn leak<T>(value: T) -> *mut T {
    alloc::boxed::Box::into_raw(alloc::boxed::Box::new(value))
}

/// Makes the tables.
pub fn init() {
    let vendor = "Viridian\0";
    let mut wide = [0u16; 16];
    wide.iter_mut().zip(vendor.encode_utf16()).for_each(|(to, from)| *to = from);
    let header = |signature, size| TableHeader {
        signature,
        revision: REVISION,
        header_size: size as u32,
        crc32: 0,
        reserved: 0,
    };
    let boot = efi::BootServices {
        hdr: header(efi::BOOT_SERVICES_SIGNATURE, size_of::<efi::BootServices>()),
        raise_tpl,
        restore_tpl,
        allocate_pages,
        free_pages,
        get_memory_map,
        allocate_pool,
        free_pool,
        create_event,
        set_timer,
        wait_for_event,
        signal_event,
        close_event,
        check_event,
        install_protocol_interface,
        reinstall_protocol_interface,
        uninstall_protocol_interface,
        handle_protocol,
        reserved: null_mut(),
        register_protocol_notify,
        locate_handle,
        locate_device_path,
        install_configuration_table,
        load_image: image::load_image,
        start_image: image::start_image,
        exit: image::exit,
        unload_image: image::unload_image,
        exit_boot_services: image::exit_boot_services,
        get_next_monotonic_count,
        stall,
        set_watchdog_timer,
        connect_controller,
        disconnect_controller,
        open_protocol,
        close_protocol,
        open_protocol_information,
        protocols_per_handle,
        locate_handle_buffer,
        locate_protocol,
        install_multiple_protocol_interfaces: variadic_install,
        uninstall_multiple_protocol_interfaces: variadic_uninstall,
        calculate_crc32,
        copy_mem,
        set_mem,
        create_event_ex,
    };
    let tables = get();
    // SAFETY: the place is ours alone until the first image starts.
    unsafe {
        tables.write(Tables {
            system: efi::SystemTable {
                hdr: header(efi::SYSTEM_TABLE_SIGNATURE, size_of::<efi::SystemTable>()),
                firmware_vendor: null_mut(),
                firmware_revision: FIRMWARE_REVISION,
                console_in_handle: null_mut(),
                con_in: null_mut(),
                console_out_handle: null_mut(),
                con_out: null_mut(),
                standard_error_handle: null_mut(),
                std_err: null_mut(),
                runtime_services: &raw mut (*tables).runtime,
                boot_services: &raw mut (*tables).boot,
                number_of_table_entries: 0,
                configuration_table: (&raw mut (*tables).configuration).cast(),
            },
            boot,
            runtime: crate::runtime::table(header(efi::RUNTIME_SERVICES_SIGNATURE, size_of::<efi::RuntimeServices>())),
            configuration: [ConfigurationTable {
                vendor_guid: efi::Guid::from_bytes(&[0; 16]),
                vendor_table: null_mut(),
            }; MAX_TABLES],
            vendor: wide,
        });
        (*tables).system.firmware_vendor = (&raw mut (*tables).vendor).cast();
    }
    seal();
}

/// Computes the tables' checksums, after every change.
pub fn seal() {
    /// # Safety
    /// The table is plain memory of the size that its header says.
    unsafe fn one(header: *mut TableHeader) {
        // SAFETY: the caller's promise.
        unsafe {
            (*header).crc32 = 0;
            let bytes = slice::from_raw_parts(header.cast::<u8>(), (*header).header_size as usize);
            (*header).crc32 = crc32(bytes);
        }
    }
    let t = get();
    // SAFETY: `init` has written the tables.
    unsafe {
        one(&raw mut (*t).boot.hdr);
        one(&raw mut (*t).runtime.hdr);
        one(&raw mut (*t).system.hdr);
    }
}

/// Installs, replaces or (null) removes a configuration table.
pub fn configure(guid: &Guid, table: *mut c_void) -> Result<(), Status> {
    let on = crate::arch::interrupts_off();
    // SAFETY: `init` has written the tables; interrupts are off.
    let r = unsafe {
        let t = &mut *get();
        let count = &mut t.system.number_of_table_entries;
        let list = &mut t.configuration;
        let at = list[..*count].iter().position(|e| e.vendor_guid.as_bytes() == &guid.0);
        match (at, table.is_null()) {
            (Some(i), false) => {
                list[i].vendor_table = table;
                Ok(())
            }
            (Some(i), true) => {
                list.copy_within(i + 1..*count, i);
                *count -= 1;
                Ok(())
            }
            (None, true) => Err(Status::NOT_FOUND),
            (None, false) if *count == MAX_TABLES => Err(Status::OUT_OF_RESOURCES),
            (None, false) => {
                list[*count] = ConfigurationTable { vendor_guid: efi::Guid::from_bytes(&guid.0), vendor_table: table };
                *count += 1;
                Ok(())
            }
        }
    };
    seal();
    crate::arch::interrupts_restore(on);
    r
}

unsafe extern "efiapi" fn raise_tpl(new: efi::Tpl) -> efi::Tpl {
    event::raise(new)
}
unsafe extern "efiapi" fn restore_tpl(old: efi::Tpl) {
    event::restore(old);
}

/// Does what may change the memory map, and tells those who wait for that (UEFI 2.10, section 7.1.2). Only the services do: an
/// allocation of the firmware's own may happen while the events themselves are borrowed.
fn told<R>(f: impl FnOnce() -> R) -> R {
    let before = memory::summary().1;
    let r = f();
    if memory::summary().1 != before {
        event::signal_group(event::GROUP_MEMORY_MAP_CHANGE);
    }
    r
}

unsafe extern "efiapi" fn allocate_pages(
    how: efi::AllocateType,
    kind: efi::MemoryType,
    pages: usize,
    address: *mut efi::PhysicalAddress,
) -> Status {
    if address.is_null() {
        return Status::INVALID_PARAMETER;
    }
    // SAFETY: not null; the caller passes a pointer to an address.
    let wanted = unsafe { address.read_unaligned() };
    let placement = match how {
        efi::ALLOCATE_ANY_PAGES => memory::Placement::Any,
        efi::ALLOCATE_MAX_ADDRESS => memory::Placement::Below(wanted),
        efi::ALLOCATE_ADDRESS => memory::Placement::At(wanted),
        _ => return Status::INVALID_PARAMETER,
    };
    match told(|| memory::allocate(placement, kind, pages as u64)) {
        Ok(start) => {
            // SAFETY: as above.
            unsafe { address.write_unaligned(start) };
            Status::SUCCESS
        }
        // At a given address, "not found" is the answer; elsewhere memory is short.
        Err(Status::NOT_FOUND) if how != efi::ALLOCATE_ADDRESS => Status::OUT_OF_RESOURCES,
        Err(s) => s,
    }
}
unsafe extern "efiapi" fn free_pages(address: efi::PhysicalAddress, pages: usize) -> Status {
    result(told(|| memory::free(address, pages as u64)))
}

unsafe extern "efiapi" fn get_memory_map(
    size: *mut usize,
    map: *mut MemoryDescriptor,
    key: *mut usize,
    descriptor_size: *mut usize,
    version: *mut u32,
) -> Status {
    if size.is_null() {
        return Status::INVALID_PARAMETER;
    }
    let (count, current) = memory::summary();
    let need = count * memory::DESCRIPTOR_SIZE;
    // SAFETY: pointers are checked for null; the buffer has `*size` bytes by the caller's word.
    unsafe {
        let room = size.read_unaligned();
        size.write_unaligned(need);
        if !descriptor_size.is_null() {
            descriptor_size.write_unaligned(memory::DESCRIPTOR_SIZE);
        }
        if !version.is_null() {
            version.write_unaligned(1);
        }
        if room < need {
            return Status::BUFFER_TOO_SMALL;
        }
        if map.is_null() {
            return Status::INVALID_PARAMETER;
        }
        let mut at = map.cast::<u8>();
        memory::descriptors(|d| {
            at.write_bytes(0, memory::DESCRIPTOR_SIZE);
            at.cast::<MemoryDescriptor>().write_unaligned(d);
            at = at.add(memory::DESCRIPTOR_SIZE);
        });
        if !key.is_null() {
            key.write_unaligned(current);
        }
    }
    Status::SUCCESS
}

unsafe extern "efiapi" fn allocate_pool(kind: efi::MemoryType, size: usize, out: *mut *mut c_void) -> Status {
    if out.is_null() {
        return Status::INVALID_PARAMETER;
    }
    match told(|| heap::allocate_pool(kind, size)) {
        // SAFETY: not null.
        Ok(p) => result(unsafe { put(out, p.cast()) }),
        Err(s) => s,
    }
}
unsafe extern "efiapi" fn free_pool(p: *mut c_void) -> Status {
    result(told(|| heap::free_pool(p.cast())))
}

unsafe extern "efiapi" fn create_event(
    kind: u32,
    tpl: efi::Tpl,
    notify: Option<efi::EventNotify>,
    context: *mut c_void,
    out: *mut efi::Event,
) -> Status {
    // SAFETY: passes on what it was given.
    unsafe { create_event_ex(kind, tpl, notify, context, core::ptr::null(), out) }
}
unsafe extern "efiapi" fn create_event_ex(
    kind: u32,
    tpl: efi::Tpl,
    notify: Option<efi::EventNotify>,
    context: *const c_void,
    group: *const efi::Guid,
    out: *mut efi::Event,
) -> Status {
    if out.is_null() {
        return Status::INVALID_PARAMETER;
    }
    match event::create(kind, tpl, notify, context.cast_mut(), guid(group).ok()) {
        // SAFETY: not null.
        Ok(e) => result(unsafe { put(out, e) }),
        Err(s) => s,
    }
}
unsafe extern "efiapi" fn set_timer(e: efi::Event, kind: efi::TimerDelay, time: u64) -> Status {
    result(event::set_timer(e, kind, time))
}
unsafe extern "efiapi" fn wait_for_event(count: usize, events: *mut efi::Event, index: *mut usize) -> Status {
    if events.is_null() || index.is_null() || count == 0 {
        return Status::INVALID_PARAMETER;
    }
    // SAFETY: the caller passes `count` events.
    let list: Vec<efi::Event> = unsafe { slice::from_raw_parts(events, count) }.to_vec();
    let (status, i) = match event::wait(&list) {
        Ok(i) => (Status::SUCCESS, i),
        Err(e) => e,
    };
    // SAFETY: not null.
    unsafe { index.write_unaligned(i) };
    status
}
unsafe extern "efiapi" fn signal_event(e: efi::Event) -> Status {
    result(event::signal(e))
}
unsafe extern "efiapi" fn close_event(e: efi::Event) -> Status {
    result(event::close(e))
}
unsafe extern "efiapi" fn check_event(e: efi::Event) -> Status {
    result(event::check(e))
}

unsafe extern "efiapi" fn install_protocol_interface(
    h: *mut efi::Handle,
    g: *mut efi::Guid,
    kind: efi::InterfaceType,
    interface: *mut c_void,
) -> Status {
    if h.is_null() || kind != efi::NATIVE_INTERFACE {
        return Status::INVALID_PARAMETER;
    }
    let Ok(g) = guid(g) else { return Status::INVALID_PARAMETER };
    // SAFETY: not null.
    let old = unsafe { h.read_unaligned() };
    match handle::install(old, &g, interface) {
        // SAFETY: not null.
        Ok(new) => result(unsafe { put(h, new) }),
        Err(s) => s,
    }
}
unsafe extern "efiapi" fn reinstall_protocol_interface(
    h: efi::Handle,
    g: *mut efi::Guid,
    old: *mut c_void,
    new: *mut c_void,
) -> Status {
    result(guid(g).and_then(|g| handle::reinstall(h, &g, old, new)))
}
unsafe extern "efiapi" fn uninstall_protocol_interface(
    h: efi::Handle,
    g: *mut efi::Guid,
    interface: *mut c_void,
) -> Status {
    result(guid(g).and_then(|g| handle::uninstall(h, &g, interface)))
}
unsafe extern "efiapi" fn handle_protocol(h: efi::Handle, g: *mut efi::Guid, out: *mut *mut c_void) -> Status {
    // SAFETY: passes on what it was given; the firmware's own image is the agent.
    unsafe { open_protocol(h, g, out, null_mut(), null_mut(), handle::open::BY_HANDLE_PROTOCOL) }
}
unsafe extern "efiapi" fn register_protocol_notify(g: *mut efi::Guid, e: efi::Event, out: *mut *mut c_void) -> Status {
    match guid(g) {
        Ok(g) if !e.is_null() && !out.is_null() => {
            // SAFETY: not null.
            result(unsafe { put(out, handle::register(&g, e)) })
        }
        _ => Status::INVALID_PARAMETER,
    }
}

fn search(kind: efi::LocateSearchType, g: *mut efi::Guid, key: *mut c_void) -> Result<Vec<efi::Handle>, Status> {
    let found = match kind {
        efi::ALL_HANDLES => handle::all(),
        efi::BY_REGISTER_NOTIFY if key.is_null() => return Err(Status::INVALID_PARAMETER),
        efi::BY_REGISTER_NOTIFY => [handle::next_registered(key)?.0].to_vec(),
        efi::BY_PROTOCOL => handle::with_protocol(&guid(g)?),
        _ => return Err(Status::INVALID_PARAMETER),
    };
    if found.is_empty() { Err(Status::NOT_FOUND) } else { Ok(found) }
}
unsafe extern "efiapi" fn locate_handle(
    kind: efi::LocateSearchType,
    g: *mut efi::Guid,
    key: *mut c_void,
    size: *mut usize,
    out: *mut efi::Handle,
) -> Status {
    if size.is_null() {
        return Status::INVALID_PARAMETER;
    }
    let found = match search(kind, g, key) {
        Ok(f) => f,
        Err(s) => return s,
    };
    let need = size_of_val(&found[..]);
    // SAFETY: not null; the buffer has `*size` bytes by the caller's word.
    unsafe {
        let room = size.read_unaligned();
        size.write_unaligned(need);
        if room < need {
            return Status::BUFFER_TOO_SMALL;
        }
        if out.is_null() {
            return Status::INVALID_PARAMETER;
        }
        out.copy_from_nonoverlapping(found.as_ptr(), found.len());
    }
    Status::SUCCESS
}
unsafe extern "efiapi" fn locate_handle_buffer(
    kind: efi::LocateSearchType,
    g: *mut efi::Guid,
    key: *mut c_void,
    count: *mut usize,
    out: *mut *mut efi::Handle,
) -> Status {
    if count.is_null() || out.is_null() {
        return Status::INVALID_PARAMETER;
    }
    let (status, found) = match search(kind, g, key) {
        Ok(f) => (Status::SUCCESS, f),
        Err(s) => (s, Vec::new()),
    };
    let buffer = if found.is_empty() { Ok(null_mut()) } else { to_pool(&found) };
    // SAFETY: not null.
    unsafe {
        count.write_unaligned(found.len());
        match buffer {
            Ok(b) => {
                out.write_unaligned(b);
                status
            }
            Err(s) => s,
        }
    }
}
unsafe extern "efiapi" fn locate_protocol(g: *mut efi::Guid, key: *mut c_void, out: *mut *mut c_void) -> Status {
    if out.is_null() {
        return Status::INVALID_PARAMETER;
    }
    let Ok(g) = guid(g) else { return Status::INVALID_PARAMETER };
    let found = if key.is_null() {
        handle::with_protocol(&g).first().map_or(Err(Status::NOT_FOUND), |h| handle::get(*h, &g))
    } else {
        handle::next_registered(key).map(|(_, i)| i)
    };
    // SAFETY: not null.
    unsafe { out.write_unaligned(found.unwrap_or(null_mut())) };
    found.err().map_or(Status::SUCCESS, |e| if e == Status::UNSUPPORTED { Status::NOT_FOUND } else { e })
}

/// `EFI_DEVICE_PATH_PROTOCOL_GUID`.
pub const DEVICE_PATH: Guid = Guid::new(0x09576e91, 0x6d3f, 0x11d2, [0x8e, 0x39, 0, 0xa0, 0xc9, 0x69, 0x72, 0x3b]);

/// The handle with a protocol whose device path is the longest prefix of `whole`; and the rest of the path.
pub fn locate_by_path(g: &Guid, whole: &DevicePath) -> Option<(efi::Handle, DevicePath)> {
    handle::with_protocol(g)
        .into_iter()
        .filter_map(|h| {
            let p = path(handle::get(h, &DEVICE_PATH).ok()?.cast())?;
            whole.strip_prefix(&p).map(|rest| (h, rest))
        })
        .min_by_key(|(_, rest)| rest.to_bytes().len())
}
unsafe extern "efiapi" fn locate_device_path(
    g: *mut efi::Guid,
    p: *mut *mut device_path::Protocol,
    out: *mut efi::Handle,
) -> Status {
    if p.is_null() {
        return Status::INVALID_PARAMETER;
    }
    // SAFETY: not null.
    let start = unsafe { p.read_unaligned() };
    let (Ok(g), Some(whole)) = (guid(g), path(start)) else { return Status::INVALID_PARAMETER };
    match locate_by_path(&g, &whole) {
        // SAFETY: pointers are checked; the rest of the path lies behind the prefix.
        Some((h, rest)) => unsafe {
            if out.is_null() {
                return Status::INVALID_PARAMETER;
            }
            out.write_unaligned(h);
            let used = whole.to_bytes().len() - rest.to_bytes().len();
            p.write_unaligned(start.cast::<u8>().add(used).cast());
            Status::SUCCESS
        },
        None => Status::NOT_FOUND,
    }
}
unsafe extern "efiapi" fn install_configuration_table(g: *mut efi::Guid, table: *mut c_void) -> Status {
    match guid(g) {
        Ok(g) => {
            let r = configure(&g, table);
            if r.is_ok() {
                event::signal_group(g);
            }
            result(r)
        }
        Err(s) => s,
    }
}

unsafe extern "efiapi" fn get_next_monotonic_count(out: *mut u64) -> Status {
    if out.is_null() {
        return Status::INVALID_PARAMETER;
    }
    let low = MONOTONIC.with(|m| {
        *m = m.wrapping_add(1);
        *m
    });
    // The upper half counts starts (and overflows); it moves on when a machine is first asked.
    let high = match (low, crate::runtime::high_count()) {
        (0 | 1, _) | (_, 0) => crate::runtime::next_high_count(),
        (_, high) => Ok(high),
    };
    match high {
        // SAFETY: not null.
        Ok(high) => result(unsafe { put(out, u64::from(high) << 32 | u64::from(low)) }),
        Err(s) => s,
    }
}
unsafe extern "efiapi" fn stall(microseconds: usize) -> Status {
    crate::arch::stall(microseconds as u64);
    Status::SUCCESS
}
unsafe extern "efiapi" fn set_watchdog_timer(seconds: usize, code: u64, _: usize, _: *mut Char16) -> Status {
    if code <= 0xffff && code != 0 && seconds != 0 {
        // Codes up to 0xFFFF are the firmware's own.
        return Status::INVALID_PARAMETER;
    }
    crate::misc::watchdog(seconds as u32);
    Status::SUCCESS
}

unsafe extern "efiapi" fn connect_controller(
    controller: efi::Handle,
    drivers: *mut efi::Handle,
    rest: *mut device_path::Protocol,
    recursive: Boolean,
) -> Status {
    let mut first = Vec::new();
    if !drivers.is_null() {
        let mut at = drivers;
        // SAFETY: the caller passes a list that ends with null.
        unsafe {
            while !(*at).is_null() && first.len() < 256 {
                first.push(*at);
                at = at.add(1);
            }
        }
    }
    result(handle::connect(controller, &first, rest, bool::from(recursive)))
}
unsafe extern "efiapi" fn disconnect_controller(
    controller: efi::Handle,
    driver: efi::Handle,
    child: efi::Handle,
) -> Status {
    result(handle::disconnect(controller, driver, child))
}
unsafe extern "efiapi" fn open_protocol(
    h: efi::Handle,
    g: *mut efi::Guid,
    out: *mut *mut c_void,
    agent: efi::Handle,
    controller: efi::Handle,
    attributes: u32,
) -> Status {
    let Ok(g) = guid(g) else { return Status::INVALID_PARAMETER };
    if out.is_null() && attributes != handle::open::TEST_PROTOCOL {
        return Status::INVALID_PARAMETER;
    }
    let r = handle::open_protocol(h, &g, agent, controller, attributes);
    if !out.is_null() && attributes != handle::open::TEST_PROTOCOL {
        let value = match r {
            Ok(p) => Some(p),
            // The interface is told with this answer too; otherwise the pointer is not touched but for "unsupported".
            Err(Status::ALREADY_STARTED) => handle::get(h, &g).ok(),
            Err(Status::UNSUPPORTED) => Some(null_mut()),
            Err(_) => None,
        };
        if let Some(v) = value {
            // SAFETY: not null.
            unsafe { out.write_unaligned(v) };
        }
    }
    r.err().unwrap_or(Status::SUCCESS)
}
unsafe extern "efiapi" fn close_protocol(
    h: efi::Handle,
    g: *mut efi::Guid,
    agent: efi::Handle,
    controller: efi::Handle,
) -> Status {
    result(guid(g).and_then(|g| handle::close_protocol(h, &g, agent, controller)))
}
unsafe extern "efiapi" fn open_protocol_information(
    h: efi::Handle,
    g: *mut efi::Guid,
    out: *mut *mut efi::OpenProtocolInformationEntry,
    count: *mut usize,
) -> Status {
    if out.is_null() || count.is_null() {
        return Status::INVALID_PARAMETER;
    }
    let list = guid(g).and_then(|g| handle::openings(h, &g));
    let entries: Vec<efi::OpenProtocolInformationEntry> = match list {
        Ok(l) => l
            .iter()
            .map(|o| efi::OpenProtocolInformationEntry {
                agent_handle: o.agent,
                controller_handle: o.controller,
                attributes: o.attributes,
                open_count: o.count,
            })
            .collect(),
        Err(s) => return s,
    };
    let size = core::mem::size_of_val(&entries[..]).max(1);
    match heap::allocate_pool(efi::BOOT_SERVICES_DATA, size) {
        // SAFETY: pointers are checked; the pool memory holds all entries.
        Ok(p) => unsafe {
            p.copy_from_nonoverlapping(entries.as_ptr().cast(), core::mem::size_of_val(&entries[..]));
            out.write_unaligned(p.cast());
            count.write_unaligned(entries.len());
            Status::SUCCESS
        },
        Err(s) => s,
    }
}
unsafe extern "efiapi" fn protocols_per_handle(
    h: efi::Handle,
    out: *mut *mut *mut efi::Guid,
    count: *mut usize,
) -> Status {
    if out.is_null() || count.is_null() {
        return Status::INVALID_PARAMETER;
    }
    let list = match handle::protocols(h) {
        Ok(l) => l,
        Err(s) => return s,
    };
    // One block: the pointers, then the GUIDs that they point at.
    let pointers = list.len() * size_of::<*mut efi::Guid>();
    match heap::allocate_pool(efi::BOOT_SERVICES_DATA, pointers + list.len() * 16) {
        // SAFETY: the block has room for both parts.
        Ok(p) => unsafe {
            let guids = p.add(pointers);
            for (i, g) in list.iter().enumerate() {
                let at = guids.add(i * 16);
                at.copy_from_nonoverlapping(g.0.as_ptr(), 16);
                p.cast::<*mut u8>().add(i).write(at);
            }
            out.write_unaligned(p.cast());
            count.write_unaligned(list.len());
            Status::SUCCESS
        },
        Err(s) => s,
    }
}

core::arch::global_asm!(
    // InstallMultipleProtocolInterfaces and its opposite take any number of arguments, which Rust cannot say. In this
    // calling convention all of them can be made one array: the four in registers have their homes on the stack right
    // below the others.
    ".globl variadic_install",
    "variadic_install:",
    "mov [rsp + 8], rcx; mov [rsp + 16], rdx; mov [rsp + 24], r8; mov [rsp + 32], r9",
    "lea rcx, [rsp + 8]",
    "jmp {install}",
    ".globl variadic_uninstall",
    "variadic_uninstall:",
    "mov [rsp + 8], rcx; mov [rsp + 16], rdx; mov [rsp + 24], r8; mov [rsp + 32], r9",
    "lea rcx, [rsp + 8]",
    "jmp {uninstall}",
    install = sym install_multiple,
    uninstall = sym uninstall_multiple,
);

unsafe extern "efiapi" {
    fn variadic_install(h: *mut efi::Handle, a: *mut c_void, b: *mut c_void) -> Status;
    fn variadic_uninstall(h: efi::Handle, a: *mut c_void, b: *mut c_void) -> Status;
}

/// The pairs (GUID, interface) from an argument array on, up to a null GUID.
///
/// # Safety
/// `args` points at pairs that end with a null.
unsafe fn pairs(mut args: *const usize) -> Vec<(Guid, *mut c_void)> {
    let mut list = Vec::new();
    // SAFETY: the caller's promise; each non-null first word points at a GUID.
    unsafe {
        while *args != 0 && list.len() < 64 {
            list.push((Guid((*args as *const [u8; 16]).read_unaligned()), *args.add(1) as *mut c_void));
            args = args.add(2);
        }
    }
    list
}

unsafe extern "efiapi" fn install_multiple(args: *const usize) -> Status {
    // SAFETY: the trampoline passes the address of the argument array.
    let (out, list) = unsafe { (*args as *mut efi::Handle, pairs(args.add(1))) };
    if out.is_null() {
        return Status::INVALID_PARAMETER;
    }
    // SAFETY: not null.
    let original = unsafe { out.read_unaligned() };
    // Two handles with one device path are a mistake that the specification asks to refuse.
    for (g, i) in &list {
        if *g == DEVICE_PATH
            && let Some(p) = path(i.cast())
            && locate_by_path(&DEVICE_PATH, &p).is_some_and(|(_, rest)| rest.is_empty())
        {
            return Status::ALREADY_STARTED;
        }
    }
    let mut h = original;
    for (n, (g, i)) in list.iter().enumerate() {
        match handle::install(h, g, *i) {
            Ok(new) => h = new,
            Err(s) => {
                for (g, i) in &list[..n] {
                    let _ = handle::uninstall(h, g, *i);
                }
                return s;
            }
        }
    }
    // SAFETY: not null.
    result(unsafe { put(out, h) })
}

unsafe extern "efiapi" fn uninstall_multiple(args: *const usize) -> Status {
    // SAFETY: as `install_multiple`.
    let (h, list) = unsafe { (*args as efi::Handle, pairs(args.add(1))) };
    for (n, (g, i)) in list.iter().enumerate() {
        if handle::uninstall(h, g, *i).is_err() {
            for (g, i) in &list[..n] {
                let _ = handle::install(h, g, *i);
            }
            return Status::INVALID_PARAMETER;
        }
    }
    Status::SUCCESS
}

unsafe extern "efiapi" fn calculate_crc32(data: *mut c_void, size: usize, out: *mut u32) -> Status {
    if data.is_null() || size == 0 || out.is_null() {
        return Status::INVALID_PARAMETER;
    }
    // SAFETY: the caller passes `size` bytes.
    result(unsafe { put(out, crc32(slice::from_raw_parts(data.cast(), size))) })
}
unsafe extern "efiapi" fn copy_mem(to: *mut c_void, from: *mut c_void, size: usize) {
    // SAFETY: the caller passes two ranges of `size` bytes, which may overlap.
    unsafe { core::ptr::copy(from.cast::<u8>(), to.cast::<u8>(), size) }
}
unsafe extern "efiapi" fn set_mem(to: *mut c_void, size: usize, value: u8) {
    // SAFETY: the caller passes a range of `size` bytes.
    unsafe { core::ptr::write_bytes(to.cast::<u8>(), value, size) }
}
