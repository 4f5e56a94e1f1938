//! The protocol database (UEFI 2.10, section 7.3).

use crate::env::{bogus, bs, free, g, image, own};
use crate::report::{check, equal, holds, s::*};
use core::ffi::c_void;
use core::mem::transmute;
use core::ptr::null_mut;
use core::sync::atomic::{AtomicU32, Ordering};
use r_efi::efi::{self, Guid, Handle, Status};
use r_efi::protocols::device_path;

const GET: u32 = efi::OPEN_PROTOCOL_GET_PROTOCOL;
const BY_HANDLE: u32 = efi::OPEN_PROTOCOL_BY_HANDLE_PROTOCOL;
const TEST: u32 = efi::OPEN_PROTOCOL_TEST_PROTOCOL;
const BY_CHILD: u32 = efi::OPEN_PROTOCOL_BY_CHILD_CONTROLLER;
const BY_DRIVER: u32 = efi::OPEN_PROTOCOL_BY_DRIVER;
const EXCLUSIVE: u32 = efi::OPEN_PROTOCOL_EXCLUSIVE;

const A: Guid = own(10);
const B: Guid = own(11);
const C: Guid = own(12);
const UNKNOWN: Guid = own(13);
static mut INTERFACES: [u64; 4] = [0; 4];

/// Addresses that stand for interfaces.
fn interface(n: usize) -> *mut c_void {
    (&raw mut INTERFACES).cast::<u64>().wrapping_add(n).cast()
}

type Multiple2 =
    unsafe extern "efiapi" fn(*mut c_void, *const Guid, *mut c_void, *const Guid, *mut c_void, usize) -> Status;

/// InstallMultipleProtocolInterfaces with two pairs.
pub unsafe fn install_two(h: *mut Handle, a: &Guid, ai: *mut c_void, b: &Guid, bi: *mut c_void) -> Status {
    let f: Multiple2 = transmute(bs().install_multiple_protocol_interfaces as *const ());
    f(h.cast(), a, ai, b, bi, 0)
}
/// UninstallMultipleProtocolInterfaces with two pairs.
pub unsafe fn uninstall_two(h: Handle, a: &Guid, ai: *mut c_void, b: &Guid, bi: *mut c_void) -> Status {
    let f: Multiple2 = transmute(bs().uninstall_multiple_protocol_interfaces as *const ());
    f(h, a, ai, b, bi, 0)
}
/// Installs one interface.
pub unsafe fn install(h: &mut Handle, guid: &Guid, i: *mut c_void) -> Status {
    (bs().install_protocol_interface)(h, g(guid), efi::NATIVE_INTERFACE, i)
}
/// Removes one interface.
pub unsafe fn uninstall(h: Handle, guid: &Guid, i: *mut c_void) -> Status {
    (bs().uninstall_protocol_interface)(h, g(guid), i)
}
unsafe fn get(h: Handle, guid: &Guid, out: &mut *mut c_void) -> Status {
    (bs().handle_protocol)(h, g(guid), out)
}
unsafe fn has(h: Handle, guid: &Guid) -> bool {
    get(h, guid, &mut null_mut()) == OK
}

pub unsafe fn run() {
    installing();
    multiple();
    opening();
    information();
    locating();
    notifying();
    device_paths();
}

unsafe fn installing() {
    let mut h = null_mut();
    let native = efi::NATIVE_INTERFACE;
    let f = bs().install_protocol_interface;
    check("InstallProtocolInterface/new-handle", &[OK], f(&mut h, g(&A), native, interface(0)));
    holds("InstallProtocolInterface/handle-made", !h.is_null());
    check("InstallProtocolInterface/twice", &[INVALID], f(&mut h, g(&A), native, interface(1)));
    check("InstallProtocolInterface/null-handle", &[INVALID], f(null_mut(), g(&B), native, interface(1)));
    check("InstallProtocolInterface/null-guid", &[INVALID], f(&mut h, null_mut(), native, interface(1)));
    check("InstallProtocolInterface/not-native", &[INVALID], f(&mut h, g(&B), 1, interface(1)));
    let mut none = bogus();
    check("InstallProtocolInterface/no-such-handle", &[INVALID], f(&mut none, g(&B), native, interface(1)));
    check("InstallProtocolInterface/null-interface", &[OK], f(&mut h, g(&B), native, null_mut()));
    let mut p = interface(3);
    check("HandleProtocol/null-interface", &[OK], get(h, &B, &mut p));
    holds("HandleProtocol/interface-is-null", p.is_null());

    check("HandleProtocol/good", &[OK], get(h, &A, &mut p));
    holds("HandleProtocol/interface", p == interface(0));
    check("HandleProtocol/unsupported", &[UNSUPPORTED], get(h, &UNKNOWN, &mut p));
    check("HandleProtocol/no-such-handle", &[INVALID], get(bogus(), &A, &mut p));
    check("HandleProtocol/null-handle", &[INVALID], get(null_mut(), &A, &mut p));
    check("HandleProtocol/null-guid", &[INVALID], (bs().handle_protocol)(h, null_mut(), &mut p));
    check("HandleProtocol/null-result", &[INVALID], (bs().handle_protocol)(h, g(&A), null_mut()));

    let re = bs().reinstall_protocol_interface;
    check("ReinstallProtocolInterface/good", &[OK], re(h, g(&A), interface(0), interface(2)));
    let _ = get(h, &A, &mut p);
    holds("ReinstallProtocolInterface/new-interface", p == interface(2));
    check("ReinstallProtocolInterface/old-is-wrong", &[NOT_FOUND], re(h, g(&A), interface(0), interface(1)));
    check("ReinstallProtocolInterface/absent", &[NOT_FOUND], re(h, g(&UNKNOWN), interface(0), interface(1)));
    check("ReinstallProtocolInterface/no-such-handle", &[INVALID], re(bogus(), g(&A), interface(0), interface(1)));
    check("ReinstallProtocolInterface/null-handle", &[INVALID], re(null_mut(), g(&A), interface(0), interface(1)));
    check("ReinstallProtocolInterface/null-guid", &[INVALID], re(h, null_mut(), interface(0), interface(1)));

    let un = bs().uninstall_protocol_interface;
    check("UninstallProtocolInterface/wrong-interface", &[NOT_FOUND], un(h, g(&A), interface(0)));
    check("UninstallProtocolInterface/absent", &[NOT_FOUND], un(h, g(&UNKNOWN), interface(0)));
    check("UninstallProtocolInterface/null-handle", &[INVALID], un(null_mut(), g(&A), interface(2)));
    check("UninstallProtocolInterface/no-such-handle", &[INVALID], un(bogus(), g(&A), interface(2)));
    check("UninstallProtocolInterface/null-guid", &[INVALID], un(h, null_mut(), interface(2)));
    check("UninstallProtocolInterface/good", &[OK], un(h, g(&A), interface(2)));
    check("UninstallProtocolInterface/last", &[OK], un(h, g(&B), null_mut()));
    check("UninstallProtocolInterface/handle-is-gone", &[INVALID], get(h, &A, &mut p));
}

unsafe fn multiple() {
    let mut h = null_mut();
    let good = install_two(&mut h, &A, interface(0), &B, interface(1));
    check("InstallMultiple/good", &[OK], good);
    holds("InstallMultiple/both", has(h, &A) && has(h, &B));
    let twice = install_two(&mut h, &C, interface(2), &A, interface(3));
    check("InstallMultiple/second-is-there", &[INVALID], twice);
    holds("InstallMultiple/first-is-taken-back", !has(h, &C) && has(h, &A));
    check("InstallMultiple/null-handle", &[INVALID], install_two(null_mut(), &A, interface(0), &B, interface(1)));
    let mut fresh = null_mut();
    check("InstallMultiple/same-twice", &[INVALID], install_two(&mut fresh, &C, interface(0), &C, interface(1)));
    let (mut n, mut list) = (0, null_mut());
    let left = (bs().locate_handle_buffer)(efi::BY_PROTOCOL, g(&C), null_mut(), &mut n, &mut list);
    check("InstallMultiple/nothing-is-left", &[NOT_FOUND], left);

    let wrong = uninstall_two(h, &A, interface(0), &C, interface(2));
    check("UninstallMultiple/second-is-absent", &[INVALID], wrong);
    holds("UninstallMultiple/first-is-back", has(h, &A) && has(h, &B));
    check("UninstallMultiple/good", &[OK], uninstall_two(h, &A, interface(0), &B, interface(1)));
    check("UninstallMultiple/handle-is-gone", &[INVALID], get(h, &A, &mut null_mut()));
}

unsafe fn open(h: Handle, guid: &Guid, agent: Handle, controller: Handle, attributes: u32) -> Status {
    let mut p = null_mut();
    (bs().open_protocol)(h, g(guid), &mut p, agent, controller, attributes)
}
unsafe fn close(h: Handle, guid: &Guid, agent: Handle, controller: Handle) -> Status {
    (bs().close_protocol)(h, g(guid), agent, controller)
}

unsafe fn opening() {
    let (mut h, mut other, mut third) = (null_mut(), null_mut(), null_mut());
    let _ = install(&mut h, &A, interface(0));
    let _ = install(&mut other, &B, interface(1));
    let _ = install(&mut third, &B, interface(2));
    let me = image();
    let mut p = null_mut();
    let f = bs().open_protocol;
    check("OpenProtocol/get", &[OK], f(h, g(&A), &mut p, me, null_mut(), GET));
    holds("OpenProtocol/interface", p == interface(0));
    check("OpenProtocol/get-without-agent", &[OK], open(h, &A, null_mut(), null_mut(), GET));
    check("OpenProtocol/by-handle-protocol", &[OK], open(h, &A, me, null_mut(), BY_HANDLE));
    check("OpenProtocol/test", &[OK], f(h, g(&A), null_mut(), me, null_mut(), TEST));
    check("OpenProtocol/test-absent", &[UNSUPPORTED], f(h, g(&B), null_mut(), me, null_mut(), TEST));
    check("OpenProtocol/absent", &[UNSUPPORTED], open(h, &UNKNOWN, me, null_mut(), GET));
    check("OpenProtocol/null-guid", &[INVALID], f(h, null_mut(), &mut p, me, null_mut(), GET));
    check("OpenProtocol/null-interface", &[INVALID], f(h, g(&A), null_mut(), me, null_mut(), GET));
    check("OpenProtocol/null-handle", &[INVALID], open(null_mut(), &A, me, null_mut(), GET));
    check("OpenProtocol/no-such-handle", &[INVALID], open(bogus(), &A, me, null_mut(), GET));
    for (name, attributes) in [
        ("OpenProtocol/no-attributes", 0),
        ("OpenProtocol/two-attributes", GET | TEST),
        ("OpenProtocol/child-and-driver", BY_CHILD | BY_DRIVER),
        ("OpenProtocol/unknown-attribute", 0x40),
    ] {
        check(name, &[INVALID], open(h, &A, me, other, attributes));
    }
    for (name, attributes) in [
        ("OpenProtocol/by-child-agent", BY_CHILD),
        ("OpenProtocol/by-driver-agent", BY_DRIVER),
        ("OpenProtocol/by-driver-exclusive-agent", BY_DRIVER | EXCLUSIVE),
        ("OpenProtocol/exclusive-agent", EXCLUSIVE),
    ] {
        check(name, &[INVALID], open(h, &A, bogus(), other, attributes));
    }
    for (name, attributes) in [
        ("OpenProtocol/by-child-controller", BY_CHILD),
        ("OpenProtocol/by-driver-controller", BY_DRIVER),
        ("OpenProtocol/by-driver-exclusive-controller", BY_DRIVER | EXCLUSIVE),
    ] {
        check(name, &[INVALID], open(h, &A, me, bogus(), attributes));
    }
    check("OpenProtocol/child-of-itself", &[INVALID], open(h, &A, me, h, BY_CHILD));

    check("OpenProtocol/by-driver", &[OK], open(h, &A, me, h, BY_DRIVER));
    check("OpenProtocol/by-driver-again", &[STARTED], open(h, &A, me, h, BY_DRIVER));
    check("OpenProtocol/by-other-driver", &[DENIED], open(h, &A, other, h, BY_DRIVER));
    check("OpenProtocol/get-beside-driver", &[OK], open(h, &A, other, null_mut(), GET));
    check("CloseProtocol/driver", &[OK], close(h, &A, me, h));
    check("CloseProtocol/again", &[NOT_FOUND], close(h, &A, me, h));

    check("OpenProtocol/exclusive", &[OK], open(h, &A, me, null_mut(), EXCLUSIVE));
    check("OpenProtocol/exclusive-twice", &[DENIED], open(h, &A, other, null_mut(), EXCLUSIVE));
    check("OpenProtocol/by-driver-beside-exclusive", &[DENIED], open(h, &A, other, h, BY_DRIVER));
    check("OpenProtocol/both-beside-exclusive", &[DENIED], open(h, &A, other, h, BY_DRIVER | EXCLUSIVE));
    check("OpenProtocol/get-beside-exclusive", &[OK], open(h, &A, other, null_mut(), GET));
    check("UninstallProtocolInterface/held-exclusively", &[DENIED], uninstall(h, &A, interface(0)));
    holds("UninstallProtocolInterface/held-stays", has(h, &A));
    check("CloseProtocol/exclusive", &[OK], close(h, &A, me, null_mut()));
    check("OpenProtocol/driver-and-exclusive", &[OK], open(h, &A, me, h, BY_DRIVER | EXCLUSIVE));
    check("OpenProtocol/driver-and-exclusive-again", &[STARTED], open(h, &A, me, h, BY_DRIVER | EXCLUSIVE));
    check("OpenProtocol/driver-beside-both", &[DENIED], open(h, &A, other, h, BY_DRIVER));
    let _ = close(h, &A, me, h);

    check("OpenProtocol/by-child", &[OK], open(h, &A, me, other, BY_CHILD));
    check("UninstallProtocolInterface/held-by-child", &[DENIED], uninstall(h, &A, interface(0)));
    check("CloseProtocol/absent", &[NOT_FOUND], close(h, &UNKNOWN, me, other));
    check("CloseProtocol/other-controller", &[NOT_FOUND], close(h, &A, me, third));
    check("CloseProtocol/other-agent", &[NOT_FOUND], close(h, &A, third, other));
    check("CloseProtocol/null-handle", &[INVALID], close(null_mut(), &A, me, other));
    check("CloseProtocol/no-such-handle", &[INVALID], close(bogus(), &A, me, other));
    check("CloseProtocol/null-agent", &[INVALID], close(h, &A, null_mut(), other));
    check("CloseProtocol/no-such-agent", &[INVALID], close(h, &A, bogus(), other));
    check("CloseProtocol/no-such-controller", &[INVALID], close(h, &A, me, bogus()));
    check("CloseProtocol/null-guid", &[INVALID], (bs().close_protocol)(h, null_mut(), me, other));
    check("CloseProtocol/child", &[OK], close(h, &A, me, other));
    // Those who only looked do not hold an interface.
    check("UninstallProtocolInterface/looked-at", &[OK], uninstall(h, &A, interface(0)));
    let _ = uninstall(other, &B, interface(1));
    let _ = uninstall(third, &B, interface(2));
}

unsafe fn information() {
    let (mut h, mut other) = (null_mut(), null_mut());
    let _ = install(&mut h, &A, interface(0));
    let _ = install(&mut other, &B, interface(1));
    let me = image();
    let (mut list, mut n) = (null_mut(), 0);
    let f = bs().open_protocol_information;
    let _ = open(h, &A, me, null_mut(), GET);
    let _ = open(h, &A, me, null_mut(), GET);
    let _ = open(h, &A, me, other, BY_CHILD);
    check("OpenProtocolInformation/good", &[OK], f(h, g(&A), &mut list, &mut n));
    let entries = core::slice::from_raw_parts(list, n);
    let found = |attributes: u32| entries.iter().find(|e| e.agent_handle == me && e.attributes == attributes);
    equal("OpenProtocolInformation/entries", 2, n as u64);
    equal("OpenProtocolInformation/count-of-two", 2, found(GET).map_or(0, |e| u64::from(e.open_count)));
    equal("OpenProtocolInformation/count-of-one", 1, found(BY_CHILD).map_or(0, |e| u64::from(e.open_count)));
    holds("OpenProtocolInformation/controller", found(BY_CHILD).is_some_and(|e| e.controller_handle == other));
    free(list);
    check("OpenProtocolInformation/absent", &[NOT_FOUND], f(h, g(&UNKNOWN), &mut list, &mut n));
    let _ = close(h, &A, me, null_mut());
    let _ = close(h, &A, me, other);
    let s = f(h, g(&A), &mut list, &mut n);
    check("OpenProtocolInformation/closed", &[OK], s);
    equal("OpenProtocolInformation/none-left", 0, n as u64);
    free(list);

    let (mut guids, mut n) = (null_mut(), 0);
    let per = bs().protocols_per_handle;
    check("ProtocolsPerHandle/good", &[OK], per(h, &mut guids, &mut n));
    holds("ProtocolsPerHandle/guids", n == 1 && **guids == A);
    free(guids);
    check("ProtocolsPerHandle/null-handle", &[INVALID], per(null_mut(), &mut guids, &mut n));
    check("ProtocolsPerHandle/no-such-handle", &[INVALID], per(bogus(), &mut guids, &mut n));
    check("ProtocolsPerHandle/null-list", &[INVALID], per(h, null_mut(), &mut n));
    check("ProtocolsPerHandle/null-count", &[INVALID], per(h, &mut guids, null_mut()));
    let _ = uninstall(h, &A, interface(0));
    let _ = uninstall(other, &B, interface(1));
}

unsafe fn locating() {
    let (mut h1, mut h2) = (null_mut(), null_mut());
    let _ = install(&mut h1, &A, interface(0));
    let _ = install(&mut h2, &A, interface(1));
    let by = efi::BY_PROTOCOL;
    let mut list = [null_mut(); 4];
    let mut size = 0;
    let f = bs().locate_handle;
    check("LocateHandle/too-small", &[SMALL], f(by, g(&A), null_mut(), &mut size, list.as_mut_ptr()));
    equal("LocateHandle/size-told", 16, size as u64);
    size = 32;
    check("LocateHandle/good", &[OK], f(by, g(&A), null_mut(), &mut size, list.as_mut_ptr()));
    holds("LocateHandle/both", size == 16 && list[..2].contains(&h1) && list[..2].contains(&h2));
    size = 32;
    check("LocateHandle/none", &[NOT_FOUND], f(by, g(&UNKNOWN), null_mut(), &mut size, list.as_mut_ptr()));
    check("LocateHandle/unknown-search", &[INVALID], f(3, g(&A), null_mut(), &mut size, list.as_mut_ptr()));
    check("LocateHandle/null-guid", &[INVALID], f(by, null_mut(), null_mut(), &mut size, list.as_mut_ptr()));
    let key = f(efi::BY_REGISTER_NOTIFY, null_mut(), null_mut(), &mut size, list.as_mut_ptr());
    check("LocateHandle/null-key", &[INVALID], key);
    check("LocateHandle/null-size", &[INVALID], f(by, g(&A), null_mut(), null_mut(), list.as_mut_ptr()));
    size = 32;
    check("LocateHandle/null-buffer", &[INVALID], f(by, g(&A), null_mut(), &mut size, null_mut()));
    size = 8;
    let all = f(efi::ALL_HANDLES, null_mut(), null_mut(), &mut size, list.as_mut_ptr());
    check("LocateHandle/all-too-small", &[SMALL], all);
    holds("LocateHandle/all-are-many", size > 64);

    let (mut n, mut found) = (0, null_mut());
    let f = bs().locate_handle_buffer;
    check("LocateHandleBuffer/good", &[OK], f(by, g(&A), null_mut(), &mut n, &mut found));
    equal("LocateHandleBuffer/count", 2, n as u64);
    free(found);
    check("LocateHandleBuffer/all", &[OK], f(efi::ALL_HANDLES, null_mut(), null_mut(), &mut n, &mut found));
    free(found);
    check("LocateHandleBuffer/none", &[NOT_FOUND], f(by, g(&UNKNOWN), null_mut(), &mut n, &mut found));
    check("LocateHandleBuffer/null-count", &[INVALID], f(by, g(&A), null_mut(), null_mut(), &mut found));
    check("LocateHandleBuffer/null-buffer", &[INVALID], f(by, g(&A), null_mut(), &mut n, null_mut()));
    check("LocateHandleBuffer/null-guid", &[INVALID], f(by, null_mut(), null_mut(), &mut n, &mut found));
    check("LocateHandleBuffer/unknown-search", &[INVALID], f(9, g(&A), null_mut(), &mut n, &mut found));

    let mut p = null_mut();
    let f = bs().locate_protocol;
    check("LocateProtocol/good", &[OK], f(g(&A), null_mut(), &mut p));
    holds("LocateProtocol/interface", p == interface(0) || p == interface(1));
    check("LocateProtocol/none", &[NOT_FOUND], f(g(&UNKNOWN), null_mut(), &mut p));
    check("LocateProtocol/null-result", &[INVALID], f(g(&A), null_mut(), null_mut()));
    check("LocateProtocol/null-guid", &[INVALID], f(null_mut(), null_mut(), &mut p));
    let _ = uninstall(h1, &A, interface(0));
    let _ = uninstall(h2, &A, interface(1));
}

static TOLD: AtomicU32 = AtomicU32::new(0);
unsafe extern "efiapi" fn told(_: efi::Event, _: *mut c_void) {
    TOLD.fetch_add(1, Ordering::Relaxed);
}

unsafe fn notifying() {
    let (mut event, mut key) = (null_mut(), null_mut());
    let _ = (bs().create_event)(0x200, 8, Some(told), null_mut(), &mut event);
    let f = bs().register_protocol_notify;
    check("RegisterProtocolNotify/null-guid", &[INVALID], f(null_mut(), event, &mut key));
    check("RegisterProtocolNotify/null-event", &[INVALID], f(g(&C), null_mut(), &mut key));
    check("RegisterProtocolNotify/null-key", &[INVALID], f(g(&C), event, null_mut()));
    check("RegisterProtocolNotify/good", &[OK], f(g(&C), event, &mut key));
    let by = efi::BY_REGISTER_NOTIFY;
    let (mut size, mut list) = (8, [null_mut(); 1]);
    let early = (bs().locate_handle)(by, null_mut(), key, &mut size, list.as_mut_ptr());
    check("LocateHandle/by-key-nothing-new", &[NOT_FOUND], early);
    let mut h = null_mut();
    let _ = install(&mut h, &C, interface(0));
    equal("RegisterProtocolNotify/told-of-install", 1, u64::from(TOLD.load(Ordering::Relaxed)));
    size = 8;
    let found = (bs().locate_handle)(by, null_mut(), key, &mut size, list.as_mut_ptr());
    check("LocateHandle/by-key", &[OK], found);
    holds("LocateHandle/by-key-handle", list[0] == h);
    size = 8;
    let again = (bs().locate_handle)(by, null_mut(), key, &mut size, list.as_mut_ptr());
    check("LocateHandle/by-key-spent", &[NOT_FOUND], again);
    let _ = (bs().reinstall_protocol_interface)(h, g(&C), interface(0), interface(1));
    equal("RegisterProtocolNotify/told-of-reinstall", 2, u64::from(TOLD.load(Ordering::Relaxed)));
    let mut p = null_mut();
    check("LocateProtocol/by-key", &[OK], (bs().locate_protocol)(g(&C), key, &mut p));
    holds("LocateProtocol/by-key-interface", p == interface(1));
    check("LocateProtocol/by-key-spent", &[NOT_FOUND], (bs().locate_protocol)(g(&C), key, &mut p));
    let _ = uninstall(h, &C, interface(1));
    let _ = (bs().close_event)(event);
}

/// A path of vendor hardware nodes and its end.
#[repr(C, packed)]
pub struct VendorPath<const N: usize> {
    nodes: [([u8; 4], Guid); N],
    end: [u8; 4],
}

impl<const N: usize> VendorPath<N> {
    pub const fn new(guids: [Guid; N]) -> Self {
        let mut nodes = [([1, 4, 20, 0], own(0)); N];
        let mut i = 0;
        while i < N {
            nodes[i].1 = guids[i];
            i += 1;
        }
        Self { nodes, end: [0x7f, 0xff, 4, 0] }
    }
    pub fn ptr(&self) -> *mut device_path::Protocol {
        core::ptr::from_ref(self).cast_mut().cast()
    }
}

unsafe fn device_paths() {
    static SHORT: VendorPath<1> = VendorPath::new([own(100)]);
    static LONG: VendorPath<2> = VendorPath::new([own(100), own(101)]);
    static SAME: VendorPath<1> = VendorPath::new([own(100)]);
    let wanted = VendorPath::new([own(100), own(101), own(102)]);
    let elsewhere = VendorPath::new([own(103)]);
    let path = device_path::PROTOCOL_GUID;
    let (mut short, mut long) = (null_mut(), null_mut());
    let _ = install_two(&mut short, &path, SHORT.ptr().cast(), &A, interface(0));
    let _ = install_two(&mut long, &path, LONG.ptr().cast(), &B, interface(1));
    let mut twin = null_mut();
    let dup = install_two(&mut twin, &C, interface(0), &path, SAME.ptr().cast());
    check("InstallMultiple/same-device-path", &[STARTED], dup);

    let f = bs().locate_device_path;
    let mut p = wanted.ptr();
    let mut h = null_mut();
    check("LocateDevicePath/good", &[OK], f(g(&path), &mut p, &mut h));
    holds("LocateDevicePath/longest", h == long);
    equal("LocateDevicePath/rest", 40, (p as usize - wanted.ptr() as usize) as u64);
    let mut p = wanted.ptr();
    check("LocateDevicePath/by-protocol", &[OK], f(g(&A), &mut p, &mut h));
    holds("LocateDevicePath/handle-with-protocol", h == short && p as usize - wanted.ptr() as usize == 20);
    let mut p = LONG.ptr();
    check("LocateDevicePath/whole", &[OK], f(g(&B), &mut p, &mut h));
    holds("LocateDevicePath/rest-is-the-end", h == long && p.cast::<u8>().read() == 0x7f);
    let mut p = elsewhere.ptr();
    check("LocateDevicePath/elsewhere", &[NOT_FOUND], f(g(&path), &mut p, &mut h));
    let mut p = wanted.ptr();
    check("LocateDevicePath/no-such-protocol", &[NOT_FOUND], f(g(&UNKNOWN), &mut p, &mut h));
    check("LocateDevicePath/null-guid", &[INVALID], f(null_mut(), &mut p, &mut h));
    check("LocateDevicePath/null-path", &[INVALID], f(g(&path), null_mut(), &mut h));
    let mut none = null_mut();
    check("LocateDevicePath/path-is-null", &[INVALID], f(g(&path), &mut none, &mut h));
    check("LocateDevicePath/null-handle", &[INVALID], f(g(&path), &mut p, null_mut()));
    let _ = uninstall_two(short, &path, SHORT.ptr().cast(), &A, interface(0));
    let _ = uninstall_two(long, &path, LONG.ptr().cast(), &B, interface(1));
}
