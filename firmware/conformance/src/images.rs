//! Images (UEFI 2.10, section 7.4): the program loads copies of itself, which play the role that their load options name.

use crate::env::{bogus, bs, free, g, image, loaded, pool, protocol, table};
use crate::files;
use crate::report::{check, equal, holds, s::*};
use core::ptr::null_mut;
use core::sync::atomic::{AtomicU32, Ordering::Relaxed};
use r_efi::efi::{self, Boolean, Handle, Status};
use r_efi::protocols::{device_path, loaded_image};

const MAGIC: u32 = 0x4c4f_5256;

/// What a copy does.
#[derive(Clone, Copy)]
#[repr(u32)]
enum Role {
    /// Returns success.
    Succeed = 1,
    /// Returns a device error.
    Fail,
    /// Leaves by Exit, with data.
    ExitWithData,
    /// Leaves by Exit, without.
    Exit,
    /// Tries to end its parent, and returns what came of it.
    ExitParent,
    /// Stays, with an unload function that refuses once.
    Stay,
    /// Stays, without one.
    StayForGood,
}

const FAREWELL: [u16; 4] = [b'b' as u16, b'y' as u16, b'e' as u16, 0];
static REFUSALS: AtomicU32 = AtomicU32::new(1);

unsafe extern "efiapi" fn unload(_: Handle) -> Status {
    if REFUSALS.fetch_update(Relaxed, Relaxed, |n| n.checked_sub(1)).is_ok() { DENIED } else { OK }
}

/// Plays the role that the load options name, if they name one.
pub unsafe fn role() -> Option<Status> {
    let li = loaded();
    if (*li).load_options_size != 8 || (*li).load_options.cast::<u32>().read_unaligned() != MAGIC {
        return None;
    }
    let role = (*li).load_options.cast::<u32>().add(1).read_unaligned();
    Some(match role {
        r if r == Role::Succeed as u32 => OK,
        r if r == Role::Fail as u32 => DEVICE,
        r if r == Role::ExitWithData as u32 => {
            let data = pool(8).cast::<u16>();
            data.copy_from_nonoverlapping(FAREWELL.as_ptr(), 4);
            (bs().exit)(image(), ABORTED, 8, data)
        }
        r if r == Role::Exit as u32 => (bs().exit)(image(), TIMEOUT, 0, null_mut()),
        r if r == Role::ExitParent as u32 => (bs().exit)((*li).parent_handle, OK, 0, null_mut()),
        r if r == Role::Stay as u32 => {
            (*li).unload = Some(unload);
            OK
        }
        _ => OK,
    })
}

/// The program's own file in pool memory.
struct Own {
    bytes: *mut u8,
    size: usize,
}

/// Offset of the PE header.
unsafe fn pe(bytes: *const u8) -> usize {
    bytes.add(0x3c).cast::<u32>().read_unaligned() as usize
}
/// Offset of the subsystem in the optional header.
const SUBSYSTEM: usize = 24 + 68;
const BOOT_DRIVER: u16 = 11;

unsafe fn load(own: &Own, subsystem: u16, role: Role) -> Handle {
    own.bytes.add(pe(own.bytes) + SUBSYSTEM).cast::<u16>().write_unaligned(subsystem);
    let mut h = null_mut();
    let _ = (bs().load_image)(Boolean::FALSE, image(), null_mut(), own.bytes.cast(), own.size, &mut h);
    if !h.is_null() {
        let options = pool(8).cast::<u32>();
        options.write(MAGIC);
        options.add(1).write(role as u32);
        let li: *mut loaded_image::Protocol = protocol(h, &loaded_image::PROTOCOL_GUID);
        (*li).load_options = options.cast();
        (*li).load_options_size = 8;
    }
    h
}

unsafe fn gone(h: Handle) -> Status {
    (bs().handle_protocol)(h, g(&loaded_image::PROTOCOL_GUID), &mut null_mut())
}

pub unsafe fn run() {
    own_image();
    let (bytes, size) = files::read("\\EFI\\BOOT\\BOOTX64.EFI");
    holds("LoadImage/own-file-is-there", !bytes.is_null() && size > 4096);
    let own = Own { bytes, size };
    loading(&own);
    from_path(&own);
    applications(&own);
    drivers(&own);
    free(bytes);
}

unsafe fn own_image() {
    let li = loaded();
    holds("LoadedImage/own", !li.is_null());
    equal("LoadedImage/revision", 0x1000, u64::from((*li).revision));
    holds("LoadedImage/system-table", (*li).system_table == table());
    let code = run as *const () as u64;
    let base = (*li).image_base as u64;
    holds("LoadedImage/base-and-size", base <= code && code < base + (*li).image_size);
    equal("LoadedImage/code-type", u64::from(efi::LOADER_CODE), u64::from((*li).image_code_type));
    equal("LoadedImage/data-type", u64::from(efi::LOADER_DATA), u64::from((*li).image_data_type));
    holds("LoadedImage/device", !(*li).device_handle.is_null() && !(*li).file_path.is_null());
}

unsafe fn loading(own: &Own) {
    let f = bs().load_image;
    let no = Boolean::FALSE;
    let (bytes, size) = (own.bytes.cast(), own.size);
    let mut h = null_mut();
    check("LoadImage/null-result", &[INVALID], f(no, image(), null_mut(), bytes, size, null_mut()));
    check("LoadImage/null-parent", &[INVALID], f(no, null_mut(), null_mut(), bytes, size, &mut h));
    check("LoadImage/no-such-parent", &[INVALID], f(no, bogus(), null_mut(), bytes, size, &mut h));
    check("LoadImage/no-source", &[NOT_FOUND], f(no, image(), null_mut(), null_mut(), 0, &mut h));
    let zeros = pool(4096);
    check("LoadImage/no-image", &[UNSUPPORTED, LOAD], f(no, image(), null_mut(), zeros.cast(), 4096, &mut h));
    free(zeros);
    check("LoadImage/cut-in-header", &[UNSUPPORTED, LOAD], f(no, image(), null_mut(), bytes, 0x60, &mut h));
    let at = own.bytes.add(pe(own.bytes) + 4).cast::<u16>();
    let machine = at.read_unaligned();
    at.write_unaligned(0xaa64);
    check("LoadImage/other-machine", &[UNSUPPORTED], f(no, image(), null_mut(), bytes, size, &mut h));
    at.write_unaligned(machine);
    let at = own.bytes.add(pe(own.bytes) + SUBSYSTEM).cast::<u16>();
    at.write_unaligned(3);
    check("LoadImage/other-subsystem", &[UNSUPPORTED], f(no, image(), null_mut(), bytes, size, &mut h));
    at.write_unaligned(10);

    h = null_mut();
    check("LoadImage/memory", &[OK], f(no, image(), null_mut(), bytes, size, &mut h));
    let li: *mut loaded_image::Protocol = protocol(h, &loaded_image::PROTOCOL_GUID);
    holds("LoadImage/parent", (*li).parent_handle == image());
    holds("LoadImage/no-device", (*li).device_handle.is_null());
    holds("LoadImage/no-options", (*li).load_options_size == 0);
    holds("LoadImage/elsewhere", (*li).image_base != (*loaded()).image_base);
    check("UnloadImage/not-started", &[OK], (bs().unload_image)(h));
    check("UnloadImage/handle-is-gone", &[INVALID], gone(h));
    check("UnloadImage/again", &[INVALID], (bs().unload_image)(h));
    check("UnloadImage/null", &[INVALID], (bs().unload_image)(null_mut()));
    check("UnloadImage/no-such-handle", &[INVALID], (bs().unload_image)(bogus()));
    check("UnloadImage/running-without-function", &[UNSUPPORTED], (bs().unload_image)(image()));
}

/// Through the device path of the program itself, and paths to nowhere.
unsafe fn from_path(own: &Own) {
    let path_guid = r_efi::protocols::loaded_image_device_path::PROTOCOL_GUID;
    let path: *mut device_path::Protocol = protocol(image(), &path_guid);
    holds("LoadedImageDevicePath/own", !path.is_null());
    let f = bs().load_image;
    let mut h = null_mut();
    check("LoadImage/path", &[OK], f(Boolean::FALSE, image(), path, null_mut(), 0, &mut h));
    let li: *mut loaded_image::Protocol = protocol(h, &loaded_image::PROTOCOL_GUID);
    holds("LoadImage/path-device", (*li).device_handle == (*loaded()).device_handle);
    let theirs: *mut u8 = protocol(h, &path_guid);
    holds("LoadImage/path-is-kept", !theirs.is_null() && (0..8).all(|i| *theirs.add(i) == *path.cast::<u8>().add(i)));
    check("LoadImage/path-unload", &[OK], (bs().unload_image)(h));
    let nowhere = crate::handles::VendorPath::new([crate::env::own(120)]);
    let got = f(Boolean::FALSE, image(), nowhere.ptr(), null_mut(), 0, &mut h);
    check("LoadImage/path-to-nowhere", &[NOT_FOUND], got);
    // With a source in memory the path only tells where it is said to come from.
    h = null_mut();
    let got = f(Boolean::FALSE, image(), nowhere.ptr(), own.bytes.cast(), own.size, &mut h);
    check("LoadImage/memory-with-path", &[OK], got);
    let _ = (bs().unload_image)(h);
}

unsafe fn applications(own: &Own) {
    const APPLICATION: u16 = 10;
    let start = bs().start_image;
    let (mut size, mut data) = (77, bogus().cast());
    check("StartImage/null", &[INVALID], start(null_mut(), &mut size, &mut data));
    check("StartImage/no-such-handle", &[INVALID], start(bogus(), &mut size, &mut data));
    check("StartImage/running", &[INVALID], start(image(), &mut size, &mut data));
    let h = load(own, APPLICATION, Role::Succeed);
    check("StartImage/returns", &[OK], start(h, null_mut(), null_mut()));
    check("StartImage/application-is-unloaded", &[INVALID], gone(h));
    check("StartImage/ended", &[INVALID], start(h, null_mut(), null_mut()));
    let h = load(own, APPLICATION, Role::Fail);
    check("StartImage/error-is-passed-on", &[DEVICE], start(h, null_mut(), null_mut()));
    let h = load(own, APPLICATION, Role::ExitWithData);
    check("StartImage/exit", &[ABORTED], start(h, &mut size, &mut data));
    equal("StartImage/exit-size", 8, size as u64);
    holds("StartImage/exit-data", (0..4).all(|i| data.cast::<u16>().add(i).read() == FAREWELL[i]));
    check("StartImage/exit-data-is-pool", &[OK], (bs().free_pool)(data.cast()));
    check("StartImage/exited-is-unloaded", &[INVALID], gone(h));
    let h = load(own, APPLICATION, Role::Exit);
    check("StartImage/exit-without-data", &[TIMEOUT], start(h, &mut size, &mut data));
    let h = load(own, APPLICATION, Role::ExitParent);
    check("Exit/not-the-running-image", &[INVALID], start(h, null_mut(), null_mut()));
    let h = load(own, APPLICATION, Role::Succeed);
    check("Exit/not-started", &[OK], (bs().exit)(h, OK, 0, null_mut()));
    check("Exit/not-started-is-unloaded", &[INVALID], gone(h));
    check("Exit/no-such-handle", &[INVALID], (bs().exit)(bogus(), OK, 0, null_mut()));
}

unsafe fn drivers(own: &Own) {
    let start = bs().start_image;
    let h = load(own, BOOT_DRIVER, Role::StayForGood);
    let li: *mut loaded_image::Protocol = protocol(h, &loaded_image::PROTOCOL_GUID);
    equal("LoadImage/driver-code-type", u64::from(efi::BOOT_SERVICES_CODE), u64::from((*li).image_code_type));
    check("StartImage/driver", &[OK], start(h, null_mut(), null_mut()));
    check("StartImage/driver-stays", &[OK], gone(h));
    check("StartImage/driver-again", &[INVALID], start(h, null_mut(), null_mut()));
    check("UnloadImage/driver-without-function", &[UNSUPPORTED], (bs().unload_image)(h));
    let h = load(own, BOOT_DRIVER, Role::Stay);
    check("StartImage/driver-with-unload", &[OK], start(h, null_mut(), null_mut()));
    check("UnloadImage/driver-refuses", &[DENIED], (bs().unload_image)(h));
    check("UnloadImage/refusing-driver-stays", &[OK], gone(h));
    check("UnloadImage/driver-agrees", &[OK], (bs().unload_image)(h));
    check("UnloadImage/driver-is-gone", &[INVALID], gone(h));
    let h = load(own, BOOT_DRIVER, Role::Fail);
    check("StartImage/driver-fails", &[DEVICE], start(h, null_mut(), null_mut()));
    check("StartImage/failed-driver-is-unloaded", &[INVALID], gone(h));
}
