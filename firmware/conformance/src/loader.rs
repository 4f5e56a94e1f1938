//! The program as somebody's boot loader: it says which one it is and from where it was started, and ends.
//!
//! `SAYS text path`: the text is what the file `\say` of its volume holds. If it begins with `order`, the program also makes itself the
//! only boot option, under another name.

use crate::env::{Wide, free, g, loaded, locate, protocol, rs};
use crate::files;
use crate::report;
use r_efi::efi::{Boolean, Guid, Status};
use r_efi::protocols::device_path::{self, Protocol as Path};
use r_efi::protocols::{device_path_from_text, device_path_to_text, device_path_utilities};

const GLOBAL: Guid = Guid::from_fields(0x8be4_df61, 0x93ca, 0x11d2, 0xaa, 0x0d, &[0x00, 0xe0, 0x98, 0x03, 0x2b, 0x8c]);

/// Says it.
pub unsafe fn run() -> Status {
    let (said, len) = files::read("\\say");
    let said = core::slice::from_raw_parts(said, len);
    report::text("\r\nSAYS ");
    report::text(core::str::from_utf8(said).unwrap_or("?"));
    report::text(" ");
    let to: *mut device_path_to_text::Protocol = locate(&device_path_to_text::PROTOCOL_GUID);
    let path = (*loaded()).file_path;
    let name = ((*to).convert_device_path_to_text)(path.cast(), Boolean::FALSE, Boolean::FALSE);
    let mut at = name;
    while !at.is_null() && *at != 0 {
        let byte = [*at as u8];
        report::text(core::str::from_utf8(&byte).unwrap_or("?"));
        at = at.add(1);
    }
    free(name);
    report::text("\r\n");
    if said.starts_with(b"order") { make_option() } else { Status::SUCCESS }
}

/// `Boot0000` with this volume's `\OTHER.EFI`, and a boot order of it alone.
unsafe fn make_option() -> Status {
    let from: *mut device_path_from_text::Protocol = locate(&device_path_from_text::PROTOCOL_GUID);
    let utilities: *mut device_path_utilities::Protocol = locate(&device_path_utilities::PROTOCOL_GUID);
    let file = ((*from).convert_text_to_device_path)(Wide::<16>::new("\\OTHER.EFI").ptr());
    let device: *mut Path = protocol((*loaded()).device_handle, &device_path::PROTOCOL_GUID);
    let path = ((*utilities).append_device_path)(device, file);
    let size = ((*utilities).get_device_path_size)(path);
    // Active, length of the path, description "Other".
    let mut option = [0u8; 512];
    let head = 6 + 12;
    if path.is_null() || head + size > option.len() {
        return Status::BUFFER_TOO_SMALL;
    }
    option[0] = 1;
    option[4..6].copy_from_slice(&(size as u16).to_le_bytes());
    for (i, c) in b"Other".iter().enumerate() {
        option[6 + i * 2] = *c;
    }
    core::ptr::copy_nonoverlapping(path.cast::<u8>(), option[head..].as_mut_ptr(), size);
    let set = rs().set_variable;
    let (name, order) = (Wide::<16>::new("Boot0000"), Wide::<16>::new("BootOrder"));
    let status = set(name.ptr(), g(&GLOBAL), 7, head + size, option.as_mut_ptr().cast());
    if status != Status::SUCCESS {
        return status;
    }
    let mut first = 0u16;
    let status = set(order.ptr(), g(&GLOBAL), 7, 2, (&raw mut first).cast());
    free(path);
    free(file);
    status
}
