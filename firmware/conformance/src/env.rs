//! The system table, and little helpers over the services that all checks use.

use core::ffi::c_void;
use core::ptr::null_mut;
use core::sync::atomic::{AtomicPtr, Ordering};
use r_efi::efi::{self, BootServices, Guid, Handle, RuntimeServices, Status, SystemTable};
use r_efi::protocols::loaded_image;

static TABLE: AtomicPtr<SystemTable> = AtomicPtr::new(null_mut());
static IMAGE: AtomicPtr<c_void> = AtomicPtr::new(null_mut());

/// Remembers what the entry point was given.
pub fn init(image: Handle, table: *mut SystemTable) {
    TABLE.store(table, Ordering::Relaxed);
    IMAGE.store(image, Ordering::Relaxed);
}

/// The system table.
pub fn table() -> *mut SystemTable {
    TABLE.load(Ordering::Relaxed)
}
/// Boot services. Valid until ExitBootServices.
pub fn bs() -> &'static BootServices {
    // SAFETY: the firmware passed the table, which lives as long as boot services.
    unsafe { &*(*table()).boot_services }
}
/// Runtime services.
pub fn rs() -> &'static RuntimeServices {
    // SAFETY: as `bs`.
    unsafe { &*(*table()).runtime_services }
}
/// The program's own handle.
pub fn image() -> Handle {
    IMAGE.load(Ordering::Relaxed)
}

/// A GUID's address as services take it.
pub fn g(guid: &Guid) -> *mut Guid {
    core::ptr::from_ref(guid).cast_mut()
}

/// A GUID of the program's own.
pub const fn own(n: u8) -> Guid {
    Guid::from_fields(0x5669_7264, 0x4346, 0x4d4e, 0x80, n, &[0x76, 0x69, 0x72, 0x69, 0x64, n])
}

/// A wide string in memory that stays, with its terminator.
pub struct Wide<const N: usize>(pub [u16; N]);

impl<const N: usize> Wide<N> {
    pub const fn new(text: &str) -> Self {
        let mut units = [0; N];
        let bytes = text.as_bytes();
        let mut i = 0;
        while i < bytes.len() {
            units[i] = bytes[i] as u16;
            i += 1;
        }
        assert!(i < N);
        Self(units)
    }
    pub fn ptr(&self) -> *mut u16 {
        self.0.as_ptr().cast_mut()
    }
}

/// Memory with nothing in it, for handles and events that are none.
#[repr(align(16))]
struct Nothing([u8; 512]);
static NOTHING: Nothing = Nothing([0; 512]);

/// An address that is no handle and no event.
pub fn bogus() -> *mut c_void {
    NOTHING.0.as_ptr().cast_mut().cast()
}

/// Pool memory of a size, zeroed.
pub unsafe fn pool(size: usize) -> *mut u8 {
    let mut p = null_mut();
    if (bs().allocate_pool)(efi::LOADER_DATA, size, &mut p) != Status::SUCCESS {
        return null_mut();
    }
    p.cast::<u8>().write_bytes(0, size);
    p.cast()
}

/// Gives pool memory back.
pub unsafe fn free<T>(p: *mut T) {
    if !p.is_null() {
        let _ = (bs().free_pool)(p.cast());
    }
}

/// A handle's protocol.
pub unsafe fn protocol<T>(handle: Handle, guid: &Guid) -> *mut T {
    let mut p = null_mut();
    if (bs().handle_protocol)(handle, g(guid), &mut p) != Status::SUCCESS {
        return null_mut();
    }
    p.cast()
}

/// The first instance of a protocol, null without one.
pub unsafe fn locate<T>(guid: &Guid) -> *mut T {
    let mut p = null_mut();
    if (bs().locate_protocol)(g(guid), null_mut(), &mut p) != Status::SUCCESS {
        return null_mut();
    }
    p.cast()
}

/// All handles with a protocol, in pool memory.
pub unsafe fn handles(guid: &Guid) -> (&'static [Handle], *mut Handle) {
    let (mut n, mut list) = (0, null_mut());
    if (bs().locate_handle_buffer)(efi::BY_PROTOCOL, g(guid), null_mut(), &mut n, &mut list) != Status::SUCCESS {
        return (&[], null_mut());
    }
    (core::slice::from_raw_parts(list, n), list)
}

/// The program's loaded-image protocol.
pub unsafe fn loaded() -> *mut loaded_image::Protocol {
    protocol(image(), &loaded_image::PROTOCOL_GUID)
}

impl<const N: usize> Wide<N> {
    /// As [`Wide::new`], cut to what fits.
    pub fn new_at_run_time(text: &str) -> Self {
        let mut units = [0; N];
        text.bytes().zip(&mut units[..N - 1]).for_each(|(b, u)| *u = u16::from(b));
        Self(units)
    }
}
