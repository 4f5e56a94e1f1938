//! Device path utilities and texts (UEFI 2.10, sections 10.5 and 10.6).

use crate::env::{Wide, free, locate, own};
use crate::handles::VendorPath;
use crate::report::{equal, holds};
use core::ptr::null_mut;
use r_efi::efi::Boolean;
use r_efi::protocols::device_path::Protocol as Path;
use r_efi::protocols::{device_path_from_text, device_path_to_text, device_path_utilities};

static END: [u8; 4] = [0x7f, 0xff, 4, 0];

pub unsafe fn run() {
    utilities();
    texts();
}

unsafe fn same(a: *mut Path, b: &[u8]) -> bool {
    !a.is_null() && b.iter().enumerate().all(|(i, x)| *a.cast::<u8>().add(i) == *x)
}

unsafe fn bytes<const N: usize>(p: &VendorPath<N>) -> &[u8] {
    core::slice::from_raw_parts(p.ptr().cast(), N * 20 + 4)
}

unsafe fn utilities() {
    let p: *mut device_path_utilities::Protocol = locate(&device_path_utilities::PROTOCOL_GUID);
    if p.is_null() {
        return holds("DevicePathUtilities/there", false);
    }
    let p = &*p;
    let one = VendorPath::new([own(1)]);
    let two = VendorPath::new([own(2)]);
    let both = VendorPath::new([own(1), own(2)]);
    equal("DevicePath.GetSize/good", 44, (p.get_device_path_size)(both.ptr()) as u64);
    equal("DevicePath.GetSize/null", 0, (p.get_device_path_size)(null_mut()) as u64);
    let d = (p.duplicate_device_path)(both.ptr());
    holds("DevicePath.Duplicate/good", d != both.ptr() && same(d, bytes(&both)));
    free(d);
    holds("DevicePath.Duplicate/null", (p.duplicate_device_path)(null_mut()).is_null());
    let d = (p.append_device_path)(one.ptr(), two.ptr());
    holds("DevicePath.Append/good", same(d, bytes(&both)));
    free(d);
    let d = (p.append_device_path)(null_mut(), two.ptr());
    holds("DevicePath.Append/first-null", same(d, bytes(&two)));
    free(d);
    let d = (p.append_device_path)(one.ptr(), null_mut());
    holds("DevicePath.Append/second-null", same(d, bytes(&one)));
    free(d);
    let d = (p.append_device_path)(null_mut(), null_mut());
    holds("DevicePath.Append/both-null", same(d, &END));
    free(d);
    let d = (p.append_device_node)(one.ptr(), two.ptr());
    holds("DevicePath.AppendNode/good", same(d, bytes(&both)));
    free(d);
    let d = (p.append_device_node)(null_mut(), two.ptr());
    holds("DevicePath.AppendNode/first-null", same(d, bytes(&two)));
    free(d);
    let d = (p.append_device_node)(one.ptr(), null_mut());
    holds("DevicePath.AppendNode/second-null", same(d, bytes(&one)));
    free(d);
    let d = (p.append_device_node)(null_mut(), null_mut());
    holds("DevicePath.AppendNode/both-null", same(d, &END));
    free(d);

    let multi = (p.append_device_path_instance)(one.ptr(), two.ptr());
    holds("DevicePath.AppendInstance/is-multi", bool::from((p.is_device_path_multi_instance)(multi)));
    equal("DevicePath.AppendInstance/size", 48, (p.get_device_path_size)(multi) as u64);
    holds("DevicePath.IsMulti/single", !bool::from((p.is_device_path_multi_instance)(one.ptr())));
    holds("DevicePath.IsMulti/null", !bool::from((p.is_device_path_multi_instance)(null_mut())));
    let d = (p.append_device_path_instance)(null_mut(), two.ptr());
    holds("DevicePath.AppendInstance/first-null", same(d, bytes(&two)));
    free(d);
    holds("DevicePath.AppendInstance/second-null", (p.append_device_path_instance)(one.ptr(), null_mut()).is_null());
    let (mut at, mut size) = (multi, 0);
    let first = (p.get_next_device_path_instance)(&mut at, &mut size);
    holds("DevicePath.GetNextInstance/first", same(first, bytes(&one)) && size == 24 && !at.is_null());
    free(first);
    let second = (p.get_next_device_path_instance)(&mut at, &mut size);
    holds("DevicePath.GetNextInstance/second", same(second, bytes(&two)) && size == 24 && at.is_null());
    free(second);
    holds("DevicePath.GetNextInstance/no-more", (p.get_next_device_path_instance)(&mut at, &mut size).is_null());
    free(multi);
    let n = (p.create_device_node)(4, 4, 10);
    holds("DevicePath.CreateNode/good", same(n, &[4, 4, 10, 0]));
    free(n);
    holds("DevicePath.CreateNode/too-short", (p.create_device_node)(4, 4, 3).is_null());
}

/// Texts in the form in which they are shown, each of a path that is made from the text itself.
const TEXTS: [&str; 12] = [
    "PciRoot(0x0)/Pci(0x1F,0x2)/Sata(0x1,0xFFFF,0x0)",
    "Acpi(PNP0C02,0x1)",
    "VenHw(56697264-4346-4D4E-8001-766972696401)",
    "VenMedia(56697264-4346-4D4E-8001-766972696401)",
    "PciRoot(0x0)/Pci(0x4,0x0)/Scsi(0x0,0x3)",
    "HD(1,GPT,11223344-5566-7788-99AA-BBCCDDEEFF00,0x800,0x19000)",
    "HD(2,MBR,0x12345678,0x3F,0x1000)",
    "CDROM(0x1,0x40,0x100)",
    "\\EFI\\BOOT\\BOOTX64.EFI",
    "PciRoot(0x0)/Pci(0x1,0x0)/MAC(525400123456,0x1)",
    "PciRoot(0x0)/Pci(0x1,0x0)/USB(0x3,0x0)",
    "Fv(56697264-4346-4D4E-8001-766972696401)/FvFile(56697264-4346-4D4E-8002-766972696401)",
];

unsafe fn texts() {
    let to: *mut device_path_to_text::Protocol = locate(&device_path_to_text::PROTOCOL_GUID);
    let from: *mut device_path_from_text::Protocol = locate(&device_path_from_text::PROTOCOL_GUID);
    if to.is_null() || from.is_null() {
        return holds("DevicePathText/there", false);
    }
    let no = Boolean::FALSE;
    holds("DevicePathToText/null", ((*to).convert_device_path_to_text)(null_mut(), no, no).is_null());
    holds("DevicePathToText/null-node", ((*to).convert_device_node_to_text)(null_mut(), no, no).is_null());
    holds("DevicePathFromText/null", ((*from).convert_text_to_device_path)(core::ptr::null()).is_null());
    holds("DevicePathFromText/null-node", ((*from).convert_text_to_device_node)(core::ptr::null()).is_null());
    for text in TEXTS {
        let mut wide = [0u16; 128];
        text.bytes().zip(&mut wide).for_each(|(b, w)| *w = u16::from(b));
        let path = ((*from).convert_text_to_device_path)(wide.as_ptr());
        let back = if path.is_null() { null_mut() } else { ((*to).convert_device_path_to_text)(path, no, no) };
        let mut name = [0u8; 160];
        let head = b"DevicePathText/";
        name[..head.len()].copy_from_slice(head);
        // The check's name is the text, without characters that a transcript line has for itself.
        text.bytes().zip(&mut name[head.len()..]).for_each(|(b, n)| *n = if b == b' ' { b'_' } else { b });
        let len = head.len() + text.len();
        let good = !back.is_null() && (0..=text.len()).all(|i| *back.add(i) == wide[i]);
        holds(core::str::from_utf8(&name[..len]).unwrap_or("DevicePathText/?"), good);
        free(back);
        free(path);
    }
    let node = VendorPath::new([own(1)]);
    let text = ((*to).convert_device_node_to_text)(node.ptr(), no, no);
    let wanted = Wide::<48>::new("VenHw(56697264-4346-4D4E-8001-766972696401)");
    holds("DevicePathToText/node", !text.is_null() && (0..44).all(|i| *text.add(i) == wanted.0[i]));
    free(text);
}
