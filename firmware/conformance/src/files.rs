//! The file protocol on the volume that the program came from (UEFI 2.10, section 13.5).

use crate::env::{g, loaded, own, pool, protocol};
use crate::report::{check, equal, holds, s::*};
use core::ffi::c_void;
use core::ptr::null_mut;
use r_efi::efi::{Guid, Status};
use r_efi::protocols::file::{self, INFO_ID, Protocol, SYSTEM_INFO_ID, SYSTEM_VOLUME_LABEL_ID};
use r_efi::protocols::simple_file_system;

const READ: u64 = file::MODE_READ;
const WRITE: u64 = file::MODE_READ | file::MODE_WRITE;
const CREATE: u64 = WRITE | file::MODE_CREATE;

/// A path as wide characters.
struct Path([u16; 80]);
fn path(text: &str) -> Path {
    let mut units = [0; 80];
    text.bytes().zip(&mut units[..79]).for_each(|(b, u)| *u = u16::from(b));
    Path(units)
}

unsafe fn root() -> *mut Protocol {
    let fs: *mut simple_file_system::Protocol = protocol((*loaded()).device_handle, &simple_file_system::PROTOCOL_GUID);
    let mut r = null_mut();
    if fs.is_null() || ((*fs).open_volume)(fs, &mut r) != OK {
        return null_mut();
    }
    r
}

unsafe fn open(at: *mut Protocol, name: &str, mode: u64, attributes: u64) -> (Status, *mut Protocol) {
    let mut f = null_mut();
    let s = ((*at).open)(at, &mut f, path(name).0.as_mut_ptr(), mode, attributes);
    (s, if s == OK { f } else { null_mut() })
}
unsafe fn close(f: *mut Protocol) {
    if !f.is_null() {
        let _ = ((*f).close)(f);
    }
}
unsafe fn write(f: *mut Protocol, data: &[u8]) -> (Status, usize) {
    let mut n = data.len();
    if f.is_null() {
        return (NOT_READY, 0);
    }
    (((*f).write)(f, &mut n, data.as_ptr().cast_mut().cast()), n)
}
unsafe fn read_some(f: *mut Protocol, to: &mut [u8]) -> (Status, usize) {
    let mut n = to.len();
    if f.is_null() {
        return (NOT_READY, 0);
    }
    (((*f).read)(f, &mut n, to.as_mut_ptr().cast()), n)
}
unsafe fn seek(f: *mut Protocol, to: u64) -> Status {
    if f.is_null() { NOT_READY } else { ((*f).set_position)(f, to) }
}
unsafe fn position(f: *mut Protocol) -> u64 {
    let mut p = 0;
    if !f.is_null() {
        let _ = ((*f).get_position)(f, &mut p);
    }
    p
}

/// A file's information, whose name is cut.
#[repr(C)]
struct Info {
    fixed: file::Info<0>,
    name: [u16; 64],
}
unsafe fn info(f: *mut Protocol) -> Info {
    let mut i: Info = core::mem::zeroed();
    let mut n = size_of::<Info>();
    if !f.is_null() {
        let _ = ((*f).get_info)(f, g(&INFO_ID), &mut n, (&raw mut i).cast());
    }
    i
}
unsafe fn delete(f: *mut Protocol) -> Status {
    if f.is_null() { NOT_READY } else { ((*f).delete)(f) }
}
unsafe fn flush(f: *mut Protocol) -> Status {
    if f.is_null() { NOT_READY } else { ((*f).flush)(f) }
}

/// Is there such a file on the program's volume?
pub unsafe fn exists(name: &str) -> bool {
    let r = root();
    if r.is_null() {
        return false;
    }
    let (s, f) = open(r, name, READ, 0);
    close(f);
    close(r);
    s == OK
}

/// Reads a whole file of the program's volume into pool memory.
pub unsafe fn read(name: &str) -> (*mut u8, usize) {
    let r = root();
    if r.is_null() {
        return (null_mut(), 0);
    }
    let (s, f) = open(r, name, READ, 0);
    close(r);
    if s != OK {
        return (null_mut(), 0);
    }
    let size = info(f).fixed.file_size as usize;
    let data = pool(size.max(1));
    let (_, n) = read_some(f, core::slice::from_raw_parts_mut(data, size));
    close(f);
    (data, n)
}

pub unsafe fn run() {
    let r = root();
    holds("SimpleFileSystem/volume", !r.is_null());
    opening(r);
    contents(r);
    directories(r);
    information(r);
    volume(r);
    close(r);
}

unsafe fn opening(r: *mut Protocol) {
    check("File.Open/absent", &[NOT_FOUND], open(r, "\\no-such-file", READ, 0).0);
    check("File.Open/absent-directory", &[NOT_FOUND], open(r, "\\no-such-folder\\file", READ, 0).0);
    for (name, mode) in [
        ("File.Open/no-mode", 0),
        ("File.Open/write-without-read", file::MODE_WRITE),
        ("File.Open/create-without-write", READ | file::MODE_CREATE),
        ("File.Open/unknown-mode", READ | 4),
    ] {
        check(name, &[INVALID], open(r, "\\EFI", mode, 0).0);
    }
    check("File.Open/unknown-attribute", &[INVALID], open(r, "\\new", CREATE, 0x40).0);
    let mut f = null_mut();
    check("File.Open/null-name", &[INVALID], ((*r).open)(r, &mut f, null_mut(), READ, 0));
    let (s, f) = open(r, "\\EFI\\BOOT\\bootx64.efi", READ, 0);
    check("File.Open/case-does-not-count", &[OK], s);
    close(f);
    check("File.Open/file-as-directory", &[NOT_FOUND], open(r, "\\EFI\\BOOT\\BOOTX64.EFI\\x", READ, 0).0);
    let (s, d) = open(r, "EFI", READ, 0);
    check("File.Open/directory", &[OK], s);
    let (s, f) = open(d, "BOOT\\BOOTX64.EFI", READ, 0);
    check("File.Open/relative", &[OK], s);
    close(f);
    let (s, f) = open(d, "..\\EFI\\.\\BOOT", READ, 0);
    check("File.Open/dots", &[OK], s);
    close(f);
    let (s, f) = open(d, "\\EFI", READ, 0);
    check("File.Open/from-the-root", &[OK], s);
    close(f);
    let (s, f) = open(r, "\\", READ, 0);
    check("File.Open/root", &[OK], s);
    close(f);
    close(d);
}

unsafe fn contents(r: *mut Protocol) {
    let (s, f) = open(r, "\\A rather long file name.text", CREATE, 0);
    check("File.Open/create", &[OK], s);
    let (s, n) = write(f, b"hello, world");
    check("File.Write/good", &[OK], s);
    equal("File.Write/all", 12, n as u64);
    equal("File.GetPosition/after-write", 12, position(f));
    let mut b = [0u8; 32];
    let (s, n) = read_some(f, &mut b);
    check("File.Read/at-the-end", &[OK], s);
    equal("File.Read/nothing-there", 0, n as u64);
    check("File.SetPosition/good", &[OK], seek(f, 7));
    let (s, n) = read_some(f, &mut b);
    check("File.Read/good", &[OK], s);
    holds("File.Read/read", n == 5 && b[..5] == *b"world");
    let _ = seek(f, u64::MAX);
    equal("File.SetPosition/end", 12, position(f));
    let _ = seek(f, 100);
    check("File.Read/beyond-the-end", &[DEVICE], read_some(f, &mut b).0);
    let (s, _) = write(f, b"!");
    check("File.Write/beyond-the-end", &[OK], s);
    equal("File.Write/grows", 101, info(f).fixed.file_size);
    check("File.Flush/good", &[OK], flush(f));
    close(f);

    let (s, f) = open(r, "\\A rather long file name.text", READ, 0);
    check("File.Open/again", &[OK], s);
    check("File.Write/read-only", &[DENIED], write(f, b"x").0);
    check("File.Flush/read-only", &[DENIED], flush(f));
    check("File.Delete/read-only", &[Status::WARN_DELETE_FAILURE], delete(f));
    let (s, f) = open(r, "\\A rather long file name.text", CREATE, 0);
    check("File.Open/create-keeps-what-is-there", &[OK], s);
    equal("File.Open/its-size", 101, info(f).fixed.file_size);
    check("File.Delete/good", &[OK], delete(f));
    check("File.Delete/deleted", &[NOT_FOUND], open(r, "\\A rather long file name.text", READ, 0).0);

    let (_, f) = open(r, "\\guarded", CREATE, 0);
    let mut i = info(f);
    i.fixed.attribute |= file::READ_ONLY;
    check("File.SetInfo/protect", &[OK], set(f, &mut i, &INFO_ID));
    close(f);
    check("File.Open/write-read-only-file", &[DENIED], open(r, "\\guarded", WRITE, 0).0);
    let (s, f) = open(r, "\\guarded", READ, 0);
    check("File.Open/read-read-only-file", &[OK], s);
    equal("File.Open/attribute-is-kept", file::READ_ONLY, info(f).fixed.attribute & file::READ_ONLY);
    close(f);
}

unsafe fn directories(r: *mut Protocol) {
    let (s, d) = open(r, "\\folder", CREATE, file::DIRECTORY);
    check("File.Open/create-directory", &[OK], s);
    let (s, f) = open(d, "one", CREATE, 0);
    check("File.Open/create-in-directory", &[OK], s);
    close(f);
    check("File.Open/create-in-absent-directory", &[NOT_FOUND], open(r, "\\absent\\x", CREATE, 0).0);
    let mut p = 0;
    check("File.GetPosition/directory", &[UNSUPPORTED], ((*d).get_position)(d, &mut p));
    check("File.SetPosition/directory", &[UNSUPPORTED], seek(d, 1));
    check("File.Write/directory", &[UNSUPPORTED], write(d, b"x").0);
    let mut tiny = [0u8; 8];
    let (s, n) = read_some(d, &mut tiny);
    check("File.Read/entry-too-small", &[SMALL], s);
    holds("File.Read/entry-size-told", n > 80 && n < 120);
    check("File.SetPosition/directory-start", &[OK], seek(d, 0));
    let mut found = 0;
    let mut entries = 0;
    let mut ends = DEVICE;
    for _ in 0..16 {
        let mut i: Info = core::mem::zeroed();
        let mut n = size_of::<Info>();
        let s = ((*d).read)(d, &mut n, (&raw mut i).cast());
        if s != OK || n == 0 {
            ends = s;
            break;
        }
        entries += 1;
        let name = (&raw const i).cast::<u8>().add(80).cast::<u16>();
        found += u64::from((0..4).all(|k| name.add(k).read_unaligned() == path("one").0[k]));
    }
    check("File.Read/directory-ends", &[OK], ends);
    holds("File.Read/directory-has-it", found == 1 && entries >= 1);
    check("File.Delete/full-directory", &[Status::WARN_DELETE_FAILURE], delete(d));
    let (_, f) = open(r, "\\folder\\one", WRITE, 0);
    let _ = delete(f);
    let (_, d) = open(r, "\\folder", WRITE, 0);
    check("File.Delete/empty-directory", &[OK], delete(d));
    check("File.Open/deleted-directory", &[NOT_FOUND], open(r, "\\folder", READ, 0).0);
}

unsafe fn set(f: *mut Protocol, i: &mut Info, guid: &Guid) -> Status {
    let size = i.fixed.size as usize;
    if f.is_null() {
        return NOT_READY;
    }
    ((*f).set_info)(f, g(guid), size, (i as *mut Info).cast())
}

/// Puts a name behind the fixed part.
fn rename(i: &mut Info, name: &str) {
    let units = path(name).0;
    // SAFETY: the name follows the fixed part at once, as the structure is laid out; both are inside of it.
    unsafe {
        let at = (i as *mut Info).cast::<u8>().add(80);
        core::ptr::copy_nonoverlapping(units.as_ptr().cast::<u8>(), at, 64);
    }
    i.fixed.size = 80 + (name.len() as u64 + 1) * 2;
}

unsafe fn information(r: *mut Protocol) {
    let (_, f) = open(r, "\\facts", CREATE, 0);
    let _ = write(f, &[7; 1000]);
    let mut n = 0;
    let mut data = [0u8; 256];
    let get = (*f).get_info;
    check("File.GetInfo/too-small", &[SMALL], get(f, g(&INFO_ID), &mut n, null_mut()));
    equal("File.GetInfo/size-told", 80 + 12, n as u64);
    n = 256;
    check("File.GetInfo/good", &[OK], get(f, g(&INFO_ID), &mut n, data.as_mut_ptr().cast()));
    let i = info(f);
    holds("File.GetInfo/sizes", i.fixed.file_size == 1000 && i.fixed.physical_size >= 1000 && i.fixed.size == 92);
    n = 256;
    check("File.GetInfo/unknown", &[UNSUPPORTED], get(f, g(&own(60)), &mut n, data.as_mut_ptr().cast()));

    let mut i = info(f);
    check("File.SetInfo/same", &[OK], set(f, &mut i, &INFO_ID));
    i.fixed.file_size = 300;
    check("File.SetInfo/shorter", &[OK], set(f, &mut i, &INFO_ID));
    equal("File.SetInfo/is-shorter", 300, info(f).fixed.file_size);
    let mut i = info(f);
    i.fixed.attribute |= file::DIRECTORY;
    check("File.SetInfo/make-directory", &[DENIED], set(f, &mut i, &INFO_ID));
    let mut i = info(f);
    i.fixed.attribute |= 0x100;
    check("File.SetInfo/unknown-attribute", &[INVALID], set(f, &mut i, &INFO_ID));
    let mut i = info(f);
    check("File.SetInfo/too-short", &[BAD_SIZE], ((*f).set_info)(f, g(&INFO_ID), 40, (&raw mut i).cast()));
    check("File.SetInfo/unknown", &[UNSUPPORTED], set(f, &mut i, &own(60)));
    rename(&mut i, "guarded");
    check("File.SetInfo/name-is-taken", &[DENIED], set(f, &mut i, &INFO_ID));
    rename(&mut i, "renamed file");
    check("File.SetInfo/rename", &[OK], set(f, &mut i, &INFO_ID));
    close(f);
    check("File.SetInfo/old-name", &[NOT_FOUND], open(r, "\\facts", READ, 0).0);
    let (s, f) = open(r, "\\renamed file", READ, 0);
    check("File.SetInfo/new-name", &[OK], s);
    let mut i = info(f);
    i.fixed.file_size = 10;
    check("File.SetInfo/size-of-read-only", &[DENIED], set(f, &mut i, &INFO_ID));
    close(f);
    let (_, f) = open(r, "\\renamed file", WRITE, 0);
    let _ = delete(f);
    // The read-only file of before: its attribute can be taken away.
    let (_, f) = open(r, "\\guarded", READ, 0);
    let mut i = info(f);
    i.fixed.attribute &= !file::READ_ONLY;
    check("File.SetInfo/unprotect", &[OK], set(f, &mut i, &INFO_ID));
    close(f);
    let (s, f) = open(r, "\\guarded", WRITE, 0);
    check("File.Open/unprotected", &[OK], s);
    if s == OK {
        let _ = delete(f);
    }
}

unsafe fn volume(r: *mut Protocol) {
    let mut data = [0u64; 32];
    let mut n = 256;
    let b: *mut c_void = data.as_mut_ptr().cast();
    check("File.GetInfo/volume", &[OK], ((*r).get_info)(r, g(&SYSTEM_INFO_ID), &mut n, b));
    holds("File.GetInfo/volume-sizes", data[0] == n as u64 && data[1] & 0xff == 0 && data[2] > 0 && data[3] <= data[2]);
    n = 8;
    check("File.GetInfo/volume-too-small", &[SMALL], ((*r).get_info)(r, g(&SYSTEM_INFO_ID), &mut n, b));
    n = 256;
    check("File.GetInfo/label", &[OK], ((*r).get_info)(r, g(&SYSTEM_VOLUME_LABEL_ID), &mut n, b));
    let label = core::slice::from_raw_parts(b.cast::<u16>(), 5);
    holds("File.GetInfo/label-is-TEST", label == &path("TEST").0[..5]);
    let mut i = info(r);
    equal("File.GetInfo/root-is-directory", file::DIRECTORY, i.fixed.attribute & file::DIRECTORY);
    i.fixed.attribute = 0;
    check("File.SetInfo/root-no-directory", &[DENIED], set(r, &mut i, &INFO_ID));
    let again = root();
    check("File.Delete/root", &[Status::WARN_DELETE_FAILURE], delete(again));
}
