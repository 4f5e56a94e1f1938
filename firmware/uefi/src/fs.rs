//! Simple File System and File protocols (UEFI 2.10, sections 13.4 and 13.5) on FAT and ISO 9660, and Load File 2.

use crate::cell::Global;
use crate::disk::{Volume, status};
use crate::tables::{self, leak};
use crate::{handle, log};
use alloc::boxed::Box;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use core::ffi::c_void;
use core::ptr::null_mut;
use core::slice;
use r_efi::efi::{self, Boolean, Char16, Status};
use r_efi::protocols::{device_path, file, simple_file_system as sfs};
use uefi_core::block::BlockDevice;
use uefi_core::devpath::DevicePath;
use uefi_core::fat::dir::{Directory, FatTime, Node, attribute};
use uefi_core::fat::file::Extents;
use uefi_core::fat::{FatError, FatVolume};
use uefi_core::guid::Guid;
use uefi_core::iso9660::{Entry, IsoVolume};

/// `EFI_SIMPLE_FILE_SYSTEM_PROTOCOL_GUID`.
pub const SIMPLE_FILE_SYSTEM: Guid =
    Guid::new(0x964e5b22, 0x6459, 0x11d2, [0x8e, 0x39, 0, 0xa0, 0xc9, 0x69, 0x72, 0x3b]);
const FILE_INFO: Guid = Guid::new(0x09576e92, 0x6d3f, 0x11d2, [0x8e, 0x39, 0, 0xa0, 0xc9, 0x69, 0x72, 0x3b]);
const SYSTEM_INFO: Guid = Guid::new(0x09576e93, 0x6d3f, 0x11d2, [0x8e, 0x39, 0, 0xa0, 0xc9, 0x69, 0x72, 0x3b]);
const VOLUME_LABEL: Guid = Guid::new(0xdb47d7d3, 0xfe81, 0x11d3, [0x9a, 0x35, 0, 0x90, 0x27, 0x3f, 0xc1, 0x4d]);
const LOAD_FILE: Guid = Guid::new(0x56ec3091, 0x954c, 0x11d2, [0x8e, 0x3f, 0, 0xa0, 0xc9, 0x69, 0x72, 0x3b]);
const LOAD_FILE2: Guid = Guid::new(0x4006c0c1, 0xfcb3, 0x403e, [0x99, 0x6d, 0x4a, 0x6c, 0x87, 0x24, 0xe0, 0x6d]);

/// Largest file that the firmware itself loads.
const MAX_LOAD: u64 = 512 << 20;

/// Open modes.
mod mode {
    pub const READ: u64 = 1;
    pub const WRITE: u64 = 2;
    pub const CREATE: u64 = 1 << 63;
}

enum Kind {
    Fat(FatVolume<Volume>),
    Iso(IsoVolume, Volume),
}

/// A file system on a handle. The protocol is the first field.
#[repr(C)]
struct FileSystem {
    protocol: sfs::Protocol,
    kind: Global<Kind>,
}

#[derive(Clone)]
enum What {
    FatRoot,
    Fat(Node),
    Iso(Entry),
}

/// An open file. The protocol is the first field.
#[repr(C)]
struct File {
    protocol: file::Protocol,
    system: *mut FileSystem,
    what: What,
    path: String,
    position: u64,
    writable: bool,
    extents: Extents,
    /// Directory being read: its entries, from the first call on.
    listing: Option<Vec<What>>,
}

fn fat_status(e: FatError) -> Status {
    match e {
        FatError::Block(b) => status(b),
        FatError::Corrupt(_) => Status::VOLUME_CORRUPTED,
        FatError::NotFound => Status::NOT_FOUND,
        FatError::Full => Status::VOLUME_FULL,
        FatError::ReadOnly => Status::WRITE_PROTECTED,
        FatError::Exists | FatError::NotEmpty => Status::ACCESS_DENIED,
        FatError::WrongKind | FatError::BadName => Status::INVALID_PARAMETER,
    }
}

/// Mounts whatever file system the volume holds.
pub fn mount(h: efi::Handle, volume: Volume) {
    let kind = match FatVolume::mount(volume) {
        Ok(Ok(fat)) => Kind::Fat(fat),
        Ok(Err(mut volume)) => match IsoVolume::open(&mut volume) {
            Ok(Some(iso)) => Kind::Iso(iso, volume),
            _ => return,
        },
        Err(e) => {
            log!("file system: {e}");
            return;
        }
    };
    let fs = leak(FileSystem { protocol: sfs::Protocol { revision: 0x10000, open_volume }, kind: Global::new(kind) });
    let _ = handle::install(h, &SIMPLE_FILE_SYSTEM, fs.cast());
}

/// Reads a whole file through a handle's file system protocol, whoever provides it.
pub fn read_file(h: efi::Handle, path: &str) -> Result<Vec<u8>, Status> {
    let p = handle::get(h, &SIMPLE_FILE_SYSTEM)?.cast::<sfs::Protocol>();
    let wide: Vec<u16> = path.encode_utf16().chain([0]).collect();
    // SAFETY: the protocol's own functions, called as the specification says; both files are closed at the end.
    unsafe {
        let mut root: *mut file::Protocol = null_mut();
        check(((*p).open_volume)(p, &mut root))?;
        let mut f: *mut file::Protocol = null_mut();
        let opened = check(((*root).open)(root, &mut f, wide.as_ptr().cast_mut(), mode::READ, 0));
        ((*root).close)(root);
        opened?;
        let data = read_all(f);
        ((*f).close)(f);
        data
    }
}

fn check(s: Status) -> Result<(), Status> {
    if s.is_error() { Err(s) } else { Ok(()) }
}

/// Reads an open file from its start.
///
/// # Safety
/// `f` is an open file.
unsafe fn read_all(f: *mut file::Protocol) -> Result<Vec<u8>, Status> {
    // SAFETY: the caller's promise.
    unsafe {
        let mut info = vec![0u8; 1024];
        let mut size = info.len();
        let mut guid = efi::Guid::from_bytes(&FILE_INFO.0);
        check(((*f).get_info)(f, &mut guid, &mut size, info.as_mut_ptr().cast()))?;
        let len = uefi_core::bytes::u64_at(&info, 8).unwrap_or(0);
        let attributes = uefi_core::bytes::u64_at(&info, 72).unwrap_or(0);
        if attributes & u64::from(attribute::DIRECTORY) != 0 {
            return Err(Status::NOT_FOUND);
        }
        if len > MAX_LOAD {
            return Err(Status::OUT_OF_RESOURCES);
        }
        let mut data = vec![0u8; len as usize];
        let mut n = data.len();
        check(((*f).read)(f, &mut n, data.as_mut_ptr().cast()))?;
        data.truncate(n);
        Ok(data)
    }
}

/// Loads through Load File 2 or (with a boot policy) Load File, if a handle on the path has it.
pub fn load_file(path: &DevicePath, boot_policy: bool) -> Option<Result<Vec<u8>, Status>> {
    let (guid, policy) = if boot_policy { (LOAD_FILE, Boolean::TRUE) } else { (LOAD_FILE2, Boolean::FALSE) };
    let (h, rest) = tables::locate_by_path(&guid, path)?;
    type LoadFile =
        unsafe extern "efiapi" fn(*mut c_void, *mut device_path::Protocol, Boolean, *mut usize, *mut c_void) -> Status;
    let p = handle::get(h, &guid).ok()?;
    let bytes = rest.to_bytes();
    // SAFETY: both protocols are one function pointer with this signature (UEFI 2.10, sections 13.1 and 13.2).
    unsafe {
        let f = *p.cast::<LoadFile>();
        let mut size = 0;
        let s = f(p, bytes.as_ptr().cast_mut().cast(), policy, &mut size, null_mut());
        if s != Status::BUFFER_TOO_SMALL || size as u64 > MAX_LOAD {
            return Some(Err(if s.is_error() { s } else { Status::LOAD_ERROR }));
        }
        let mut data = vec![0u8; size];
        let s = f(p, bytes.as_ptr().cast_mut().cast(), policy, &mut size, data.as_mut_ptr().cast());
        Some(check(s).map(|()| data))
    }
}

fn protocol() -> file::Protocol {
    file::Protocol {
        revision: 0x10000,
        open,
        close,
        delete,
        read,
        write,
        get_position,
        set_position,
        get_info,
        set_info,
        flush,
        open_ex,
        read_ex,
        write_ex,
        flush_ex,
    }
}

fn new_file(system: *mut FileSystem, what: What, path: String, writable: bool) -> *mut file::Protocol {
    Box::into_raw(Box::new(File {
        protocol: protocol(),
        system,
        what,
        path,
        position: 0,
        writable,
        extents: Extents::default(),
        listing: None,
    }))
    .cast()
}

unsafe extern "efiapi" fn open_volume(p: *mut sfs::Protocol, out: *mut *mut file::Protocol) -> Status {
    if out.is_null() {
        return Status::INVALID_PARAMETER;
    }
    let system = p.cast::<FileSystem>();
    // SAFETY: called through the protocol, which is the structure's first field.
    let (what, writable) = unsafe { &*system }.kind.with(|k| match k {
        Kind::Fat(_) => (What::FatRoot, true),
        Kind::Iso(v, _) => (What::Iso(v.root().clone()), false),
    });
    // SAFETY: not null.
    unsafe { out.write_unaligned(new_file(system, what, String::new(), writable)) };
    Status::SUCCESS
}

/// The structure behind an open file.
///
/// # Safety
/// `p` is a file that this module opened and that was not closed.
unsafe fn this<'a>(p: *mut file::Protocol) -> &'a mut File {
    // SAFETY: the protocol is the structure's first field.
    unsafe { &mut *p.cast() }
}
fn kind(f: &File) -> &'static Global<Kind> {
    // SAFETY: file systems are never unmounted.
    unsafe { &(*f.system).kind }
}

/// What the machine's clock says; no time at all if it does not run.
fn now() -> FatTime {
    let clock = crate::runtime::read_clock();
    clock.map_or(FatTime::default(), |(y, mo, d, h, mi, s)| FatTime::new(y, mo, d, h, mi, s))
}

/// Joins a path to a file's own; a leading backslash starts at the root.
fn join(base: &str, name: &str) -> String {
    let mut parts: Vec<&str> = if name.starts_with('\\') { Vec::new() } else { base.split('\\').collect() };
    for part in name.split('\\') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            p => parts.push(p),
        }
    }
    parts.retain(|p| !p.is_empty());
    parts.join("\\")
}

unsafe extern "efiapi" fn open(
    p: *mut file::Protocol,
    out: *mut *mut file::Protocol,
    name: *mut Char16,
    open_mode: u64,
    attributes: u64,
) -> Status {
    if out.is_null() {
        return Status::INVALID_PARAMETER;
    }
    let (Some(name), true) = (
        crate::misc::string(name),
        matches!(open_mode, mode::READ | 3 | 0x8000_0000_0000_0003) && attributes & !0x37 == 0,
    ) else {
        return Status::INVALID_PARAMETER;
    };
    // SAFETY: called through the protocol.
    let f = unsafe { this(p) };
    let path = join(&f.path, &name);
    let write = open_mode & mode::WRITE != 0;
    let r: Result<What, Status> = kind(f).with(|k| match k {
        Kind::Fat(v) => match v.find(&path) {
            Ok(None) => Ok(What::FatRoot),
            Ok(Some(n)) if write && n.attributes & attribute::READ_ONLY != 0 && !n.is_directory() => {
                Err(Status::ACCESS_DENIED)
            }
            Ok(Some(n)) => Ok(What::Fat(n)),
            Err(FatError::NotFound) if open_mode & mode::CREATE != 0 => {
                let (parent, leaf) = path.rsplit_once('\\').unwrap_or(("", &path));
                let directory = match v.find(parent).map_err(fat_status)? {
                    None => Directory::Root,
                    Some(d) => d.as_directory().map_err(|_| Status::NOT_FOUND)?,
                };
                v.create(directory, leaf, attributes as u8, now()).map(What::Fat).map_err(fat_status)
            }
            Err(e) => Err(if e == FatError::WrongKind { Status::NOT_FOUND } else { fat_status(e) }),
        },
        Kind::Iso(..) if write => Err(Status::WRITE_PROTECTED),
        Kind::Iso(v, d) => v.find(d, &path).map_err(status)?.map(What::Iso).ok_or(Status::NOT_FOUND),
    });
    match r {
        Ok(what) => {
            // SAFETY: not null.
            unsafe { out.write_unaligned(new_file(f.system, what, path, write)) };
            Status::SUCCESS
        }
        Err(s) => s,
    }
}

unsafe extern "efiapi" fn close(p: *mut file::Protocol) -> Status {
    // SAFETY: the file was made by `new_file` and is closed once.
    drop(unsafe { Box::from_raw(p.cast::<File>()) });
    Status::SUCCESS
}

unsafe extern "efiapi" fn delete(p: *mut file::Protocol) -> Status {
    // SAFETY: called through the protocol.
    let f = unsafe { this(p) };
    let done = match (&f.what, f.writable) {
        (What::Fat(n), true) => kind(f).with(|k| match k {
            Kind::Fat(v) => v.remove(n).is_ok(),
            Kind::Iso(..) => false,
        }),
        _ => false,
    };
    // SAFETY: Delete closes the file whatever it comes to.
    unsafe { close(p) };
    if done { Status::SUCCESS } else { Status::WARN_DELETE_FAILURE }
}

impl What {
    fn is_directory(&self) -> bool {
        match self {
            What::FatRoot => true,
            What::Fat(n) => n.is_directory(),
            What::Iso(e) => e.directory,
        }
    }
    fn size(&self) -> u64 {
        match self {
            What::FatRoot => 0,
            What::Fat(n) => u64::from(n.size),
            What::Iso(e) => u64::from(e.size),
        }
    }
    fn name(&self) -> &str {
        match self {
            What::FatRoot => "",
            What::Fat(n) => &n.name,
            What::Iso(e) => &e.name,
        }
    }
    /// `EFI_FILE_INFO`.
    fn info(&self, cluster: u64) -> Vec<u8> {
        let name: Vec<u8> = self.name().encode_utf16().chain([0]).flat_map(u16::to_le_bytes).collect();
        let (attributes, times) = match self {
            What::FatRoot => (attribute::DIRECTORY, [FatTime::default(); 3]),
            What::Fat(n) => (n.attributes & 0x37, [n.created, n.accessed, n.modified]),
            What::Iso(e) => {
                (attribute::READ_ONLY | if e.directory { attribute::DIRECTORY } else { 0 }, [FatTime::default(); 3])
            }
        };
        let size = if self.is_directory() { 0 } else { self.size() };
        let mut d = Vec::new();
        d.extend(((80 + name.len()) as u64).to_le_bytes());
        d.extend(size.to_le_bytes());
        d.extend(size.next_multiple_of(cluster.max(1)).to_le_bytes());
        times.iter().for_each(|t| d.extend(efi_time(*t)));
        d.extend(u64::from(attributes).to_le_bytes());
        d.extend(name);
        d
    }
}

fn efi_time(t: FatTime) -> [u8; 16] {
    let mut d = [0u8; 16];
    if t.date != 0 {
        d[..2].copy_from_slice(&(1980 + (t.date >> 9)).to_le_bytes());
        d[2] = (t.date >> 5 & 15) as u8;
        d[3] = (t.date & 31) as u8;
        d[4] = (t.time >> 11) as u8;
        d[5] = (t.time >> 5 & 63) as u8;
        d[6] = (t.time & 31) as u8 * 2;
    }
    d
}
fn fat_time(d: &[u8]) -> FatTime {
    let year = u16::from_le_bytes([d[0], d[1]]).saturating_sub(1980) & 127;
    FatTime {
        date: year << 9 | u16::from(d[2]) << 5 | u16::from(d[3]),
        time: u16::from(d[4]) << 11 | u16::from(d[5]) << 5 | u16::from(d[6] / 2),
    }
}

unsafe extern "efiapi" fn read(p: *mut file::Protocol, size: *mut usize, buffer: *mut c_void) -> Status {
    if size.is_null() {
        return Status::INVALID_PARAMETER;
    }
    // SAFETY: called through the protocol; not null.
    let (f, room) = unsafe { (this(p), size.read_unaligned()) };
    if f.what.is_directory() {
        return read_entry(f, room, size, buffer);
    }
    if f.position > f.what.size() {
        return Status::DEVICE_ERROR;
    }
    if room != 0 && buffer.is_null() {
        return Status::INVALID_PARAMETER;
    }
    // SAFETY: the caller passes `room` bytes.
    let data = if room == 0 { &mut [][..] } else { unsafe { slice::from_raw_parts_mut(buffer.cast::<u8>(), room) } };
    let r = kind(f).with(|k| match (k, &f.what) {
        (Kind::Fat(v), What::Fat(n)) => v.read(n, &mut f.extents, f.position, data).map_err(fat_status),
        (Kind::Iso(v, d), What::Iso(e)) => v.read(d, e, f.position, data).map_err(status),
        _ => Err(Status::DEVICE_ERROR),
    });
    match r {
        Ok(n) => {
            f.position += n as u64;
            // SAFETY: not null.
            unsafe { size.write_unaligned(n) };
            Status::SUCCESS
        }
        Err(s) => s,
    }
}

fn read_entry(f: &mut File, room: usize, size: *mut usize, buffer: *mut c_void) -> Status {
    if f.listing.is_none() {
        let list = kind(f).with(|k| match (k, &f.what) {
            (Kind::Fat(v), What::FatRoot) => v.read_directory(Directory::Root).map_err(fat_status).map(fat_entries),
            (Kind::Fat(v), What::Fat(n)) => {
                n.as_directory().and_then(|d| v.read_directory(d)).map_err(fat_status).map(fat_entries)
            }
            (Kind::Iso(v, d), What::Iso(e)) => {
                v.read_directory(d, e).map_err(status).map(|l| l.into_iter().map(What::Iso).collect())
            }
            _ => Err(Status::DEVICE_ERROR),
        });
        match list {
            Ok(l) => f.listing = Some(l),
            Err(s) => return s,
        }
    }
    let entry = f.listing.as_ref().and_then(|l| l.get(f.position as usize));
    let info = entry.map(|e| e.info(4096)).unwrap_or_default();
    // SAFETY: not null; the buffer has `room` bytes by the caller's word.
    unsafe {
        size.write_unaligned(info.len());
        if room < info.len() {
            return Status::BUFFER_TOO_SMALL;
        }
        if !info.is_empty() {
            buffer.cast::<u8>().copy_from(info.as_ptr(), info.len());
            f.position += 1;
        }
    }
    Status::SUCCESS
}

fn fat_entries(list: Vec<Node>) -> Vec<What> {
    list.into_iter().map(What::Fat).collect()
}

unsafe extern "efiapi" fn write(p: *mut file::Protocol, size: *mut usize, buffer: *mut c_void) -> Status {
    // SAFETY: called through the protocol.
    let f = unsafe { this(p) };
    if f.what.is_directory() {
        return Status::UNSUPPORTED;
    }
    if !f.writable {
        return Status::ACCESS_DENIED;
    }
    if size.is_null() || buffer.is_null() {
        return Status::INVALID_PARAMETER;
    }
    // SAFETY: the caller passes `*size` bytes.
    let data = unsafe { slice::from_raw_parts(buffer.cast::<u8>(), size.read_unaligned()) };
    let r = kind(f).with(|k| match (k, &mut f.what) {
        (Kind::Fat(v), What::Fat(n)) => v.write(n, &mut f.extents, f.position, data, now()).map_err(fat_status),
        _ => Err(Status::WRITE_PROTECTED),
    });
    match r {
        Ok(()) => {
            f.position += data.len() as u64;
            Status::SUCCESS
        }
        Err(s) => {
            // SAFETY: not null.
            unsafe { size.write_unaligned(0) };
            s
        }
    }
}

unsafe extern "efiapi" fn get_position(p: *mut file::Protocol, out: *mut u64) -> Status {
    // SAFETY: called through the protocol.
    let f = unsafe { this(p) };
    if f.what.is_directory() {
        return Status::UNSUPPORTED;
    }
    crate::image::give(out, f.position)
}
unsafe extern "efiapi" fn set_position(p: *mut file::Protocol, position: u64) -> Status {
    // SAFETY: called through the protocol.
    let f = unsafe { this(p) };
    if f.what.is_directory() {
        if position != 0 {
            return Status::UNSUPPORTED;
        }
        f.listing = None;
    }
    // All ones: the end of the file.
    f.position = if position == u64::MAX { f.what.size() } else { position };
    Status::SUCCESS
}

unsafe extern "efiapi" fn get_info(
    p: *mut file::Protocol,
    g: *mut efi::Guid,
    size: *mut usize,
    buffer: *mut c_void,
) -> Status {
    let Ok(g) = tables::guid(g) else { return Status::INVALID_PARAMETER };
    if size.is_null() {
        return Status::INVALID_PARAMETER;
    }
    // SAFETY: called through the protocol.
    let f = unsafe { this(p) };
    let wide = |s: &str| -> Vec<u8> { s.encode_utf16().chain([0]).flat_map(u16::to_le_bytes).collect() };
    let d = match g {
        FILE_INFO => f.what.info(4096),
        SYSTEM_INFO | VOLUME_LABEL => {
            let (total, free, block, label, read_only) = kind(f).with(|k| match k {
                Kind::Fat(v) => {
                    let label = v.label().ok().flatten().unwrap_or_default();
                    (v.size(), v.free_bytes().unwrap_or(0), v.cluster_size(), label, false)
                }
                Kind::Iso(v, d) => (d.block_count() * d.block_size() as u64, 0, 2048, v.label.clone(), true),
            });
            let name = wide(&label);
            if g == VOLUME_LABEL {
                name
            } else {
                let mut d = Vec::new();
                d.extend(((36 + name.len()) as u64).to_le_bytes());
                d.extend([u8::from(read_only), 0, 0, 0, 0, 0, 0, 0]);
                d.extend(total.to_le_bytes());
                d.extend(free.to_le_bytes());
                d.extend((block as u32).to_le_bytes());
                d.extend(name);
                d
            }
        }
        _ => return Status::UNSUPPORTED,
    };
    // SAFETY: not null; the buffer has `*size` bytes by the caller's word.
    unsafe {
        let room = size.read_unaligned();
        size.write_unaligned(d.len());
        if room < d.len() {
            return Status::BUFFER_TOO_SMALL;
        }
        if buffer.is_null() {
            return Status::INVALID_PARAMETER;
        }
        buffer.cast::<u8>().copy_from(d.as_ptr(), d.len());
    }
    Status::SUCCESS
}

unsafe extern "efiapi" fn set_info(
    p: *mut file::Protocol,
    g: *mut efi::Guid,
    size: usize,
    buffer: *mut c_void,
) -> Status {
    let Ok(g) = tables::guid(g) else { return Status::INVALID_PARAMETER };
    if g != FILE_INFO {
        return if g == SYSTEM_INFO || g == VOLUME_LABEL { Status::WRITE_PROTECTED } else { Status::UNSUPPORTED };
    }
    if size < 82 || buffer.is_null() {
        return Status::BAD_BUFFER_SIZE;
    }
    // SAFETY: called through the protocol; the caller passes `size` bytes.
    let (f, d) = unsafe { (this(p), slice::from_raw_parts(buffer.cast::<u8>(), size)) };
    let (Some(new_size), Some(attributes)) = (uefi_core::bytes::u64_at(d, 8), uefi_core::bytes::u64_at(d, 72)) else {
        return Status::BAD_BUFFER_SIZE;
    };
    let units: Vec<u16> =
        d[80..].chunks_exact(2).map(|c| u16::from_le_bytes([c[0], c[1]])).take_while(|u| *u != 0).collect();
    let name = String::from_utf16_lossy(&units);
    if attributes & !0x37 != 0 {
        return Status::INVALID_PARAMETER;
    }
    let r = kind(f).with(|k| {
        let (Kind::Fat(v), What::Fat(n)) = (k, &mut f.what) else {
            // The root of FAT has no entry in which anything could be changed; on a DVD nothing can.
            return Err(if matches!(f.what, What::FatRoot) { Status::ACCESS_DENIED } else { Status::WRITE_PROTECTED });
        };
        if n.is_directory() != (attributes as u8 & attribute::DIRECTORY != 0) {
            return Err(Status::ACCESS_DENIED);
        }
        let leaf = name.rsplit('\\').next().unwrap_or("");
        if !leaf.is_empty() && leaf != n.name {
            v.rename(n, leaf).map_err(fat_status)?;
        }
        if !n.is_directory() && new_size != u64::from(n.size) {
            if !f.writable {
                return Err(Status::ACCESS_DENIED);
            }
            v.set_size(n, &mut f.extents, new_size, now()).map_err(fat_status)?;
        }
        n.attributes = n.attributes & !0x27 | attributes as u8 & 0x27;
        for (at, field) in [(24, &mut n.created), (40, &mut n.accessed), (56, &mut n.modified)] {
            if d[at..at + 16] != [0; 16] {
                *field = fat_time(&d[at..]);
            }
        }
        v.update(n).map_err(fat_status)
    });
    tables::result(r)
}

unsafe extern "efiapi" fn flush(p: *mut file::Protocol) -> Status {
    // SAFETY: called through the protocol.
    let f = unsafe { this(p) };
    if !f.writable {
        return Status::ACCESS_DENIED;
    }
    tables::result(kind(f).with(|k| match k {
        Kind::Fat(v) => v.flush().map_err(fat_status),
        Kind::Iso(..) => Ok(()),
    }))
}

unsafe extern "efiapi" fn open_ex(
    _: *mut file::Protocol,
    _: *mut *mut file::Protocol,
    _: *mut Char16,
    _: u64,
    _: u64,
    _: *mut file::IoToken,
) -> Status {
    Status::UNSUPPORTED
}
unsafe extern "efiapi" fn read_ex(_: *mut file::Protocol, _: *mut file::IoToken) -> Status {
    Status::UNSUPPORTED
}
unsafe extern "efiapi" fn write_ex(_: *mut file::Protocol, _: *mut file::IoToken) -> Status {
    Status::UNSUPPORTED
}
unsafe extern "efiapi" fn flush_ex(_: *mut file::Protocol, _: *mut file::IoToken) -> Status {
    Status::UNSUPPORTED
}
