//! ConnectController and DisconnectController with driver bindings of the program's own (UEFI 2.10, sections 7.3 and 11.1).
//!
//! Two drivers manage controllers with the protocol [`BUS`]: each makes two children. What they are asked is counted.

use crate::env::{bogus, bs, g, image, own};
use crate::handles::{VendorPath, install, uninstall};
use crate::report::{check, equal, holds, s::*};
use core::ffi::c_void;
use core::ptr::null_mut;
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, Ordering::Relaxed};
use r_efi::efi::{self, Guid, Handle, Status};
use r_efi::protocols::device_path;
use r_efi::protocols::driver_binding::{PROTOCOL_GUID as BINDING, Protocol};

const BUS: Guid = own(40);
const CHILD: Guid = own(41);
const BY_DRIVER: u32 = efi::OPEN_PROTOCOL_BY_DRIVER;
const BY_CHILD: u32 = efi::OPEN_PROTOCOL_BY_CHILD_CONTROLLER;

/// A driver: its binding is the first field, so that the binding's address is the driver's.
#[repr(C)]
struct Driver {
    binding: Protocol,
    asked: AtomicU32,
    started: AtomicU32,
    stopped: AtomicU32,
    /// Children given to the last Stop.
    children_stopped: AtomicU32,
    children: [AtomicPtr<c_void>; 2],
    /// Whether Supported was given the path that [`REST`] is: it need not live longer than the call.
    rest: AtomicBool,
    refuses: AtomicBool,
}

static mut FIRST: Driver = driver(0x10);
static mut SECOND: Driver = driver(0x20);
/// The one child that is wanted.
static REST: VendorPath<1> = VendorPath::new([own(110)]);
/// Which driver was asked first in the last round.
static ASKED_FIRST: AtomicU32 = AtomicU32::new(0);

const fn driver(version: u32) -> Driver {
    Driver {
        binding: Protocol {
            supported,
            start,
            stop,
            version,
            image_handle: null_mut(),
            driver_binding_handle: null_mut(),
        },
        asked: AtomicU32::new(0),
        started: AtomicU32::new(0),
        stopped: AtomicU32::new(0),
        children_stopped: AtomicU32::new(99),
        children: [AtomicPtr::new(null_mut()), AtomicPtr::new(null_mut())],
        rest: AtomicBool::new(false),
        refuses: AtomicBool::new(false),
    }
}

unsafe fn open(this: *mut Protocol, controller: Handle, agent_controller: Handle, how: u32) -> Status {
    let mut p = null_mut();
    (bs().open_protocol)(controller, g(&BUS), &mut p, (*this).driver_binding_handle, agent_controller, how)
}

unsafe extern "efiapi" fn supported(this: *mut Protocol, c: Handle, rest: *mut device_path::Protocol) -> Status {
    let d = this.cast::<Driver>();
    (*d).asked.fetch_add(1, Relaxed);
    let same = |i: usize| *rest.cast::<u8>().add(i) == *REST.ptr().cast::<u8>().add(i);
    (*d).rest.fetch_or(!rest.is_null() && (0..24).all(same), Relaxed);
    let _ = ASKED_FIRST.compare_exchange(0, (*this).version, Relaxed, Relaxed);
    let status = open(this, c, c, BY_DRIVER);
    if status == OK {
        let _ = (bs().close_protocol)(c, g(&BUS), (*this).driver_binding_handle, c);
    }
    status
}

unsafe extern "efiapi" fn start(this: *mut Protocol, c: Handle, _: *mut device_path::Protocol) -> Status {
    let d = this.cast::<Driver>();
    let status = open(this, c, c, BY_DRIVER);
    if status != OK {
        return status;
    }
    (*d).started.fetch_add(1, Relaxed);
    for child in &(*d).children {
        let mut h = null_mut();
        let _ = install(&mut h, &CHILD, this.cast());
        let _ = open(this, c, h, BY_CHILD);
        child.store(h, Relaxed);
    }
    OK
}

unsafe extern "efiapi" fn stop(this: *mut Protocol, c: Handle, n: usize, children: *mut Handle) -> Status {
    let d = this.cast::<Driver>();
    if (*d).refuses.load(Relaxed) {
        return DEVICE;
    }
    (*d).stopped.fetch_add(1, Relaxed);
    (*d).children_stopped.store(n as u32, Relaxed);
    if n == 0 {
        return (bs().close_protocol)(c, g(&BUS), (*this).driver_binding_handle, c);
    }
    for i in 0..n {
        let child = *children.add(i);
        let _ = (bs().close_protocol)(c, g(&BUS), (*this).driver_binding_handle, child);
        let _ = uninstall(child, &CHILD, this.cast());
    }
    OK
}

unsafe fn begin(d: *mut Driver) -> Handle {
    let mut h = null_mut();
    let _ = install(&mut h, &BINDING, d.cast());
    (*d).binding.image_handle = image();
    (*d).binding.driver_binding_handle = h;
    h
}

fn count(n: &AtomicU32) -> u64 {
    u64::from(n.swap(0, Relaxed))
}

pub unsafe fn run() {
    let (first, second) = (&raw mut FIRST, &raw mut SECOND);
    let mut bus = null_mut();
    let mut old = bogus();
    let _ = install(&mut bus, &BUS, old);
    let connect = bs().connect_controller;
    let disconnect = bs().disconnect_controller;
    let (none, all) = (null_mut(), efi::Boolean::TRUE);
    let flat = efi::Boolean::FALSE;
    check("ConnectController/null", &[INVALID], connect(null_mut(), none, null_mut(), flat));
    check("ConnectController/no-such-handle", &[INVALID], connect(bogus(), none, null_mut(), flat));
    check("ConnectController/no-driver", &[NOT_FOUND], connect(bus, none, null_mut(), flat));
    check("DisconnectController/nothing-manages", &[OK], disconnect(bus, null_mut(), null_mut()));

    let h1 = begin(first);
    check("ConnectController/good", &[OK], connect(bus, none, null_mut(), flat));
    equal("ConnectController/started-once", 1, count(&(*first).started));
    check("ConnectController/again", &[NOT_FOUND], connect(bus, none, null_mut(), flat));
    equal("ConnectController/not-started-again", 0, count(&(*first).started));
    check("DisconnectController/child", &[OK], disconnect(bus, h1, (*first).children[0].load(Relaxed)));
    equal("DisconnectController/one-child", 1, u64::from((*first).children_stopped.load(Relaxed)));
    equal("DisconnectController/driver-stays", 1, count(&(*first).stopped));
    check("DisconnectController/all", &[OK], disconnect(bus, null_mut(), null_mut()));
    equal("DisconnectController/children-then-driver", 2, count(&(*first).stopped));
    equal("DisconnectController/last-without-children", 0, u64::from((*first).children_stopped.load(Relaxed)));
    check("DisconnectController/again", &[OK], disconnect(bus, null_mut(), null_mut()));
    check("DisconnectController/not-managing", &[OK], disconnect(bus, h1, null_mut()));
    check("DisconnectController/null", &[INVALID], disconnect(null_mut(), null_mut(), null_mut()));
    check("DisconnectController/no-such-handle", &[INVALID], disconnect(bogus(), null_mut(), null_mut()));
    check("DisconnectController/no-such-driver", &[INVALID], disconnect(bus, bogus(), null_mut()));
    check("DisconnectController/not-a-driver", &[INVALID], disconnect(bus, bus, null_mut()));
    check("DisconnectController/no-such-child", &[INVALID], disconnect(bus, null_mut(), bogus()));

    // A higher version is asked first, unless the caller names another.
    let h2 = begin(second);
    ASKED_FIRST.store(0, Relaxed);
    check("ConnectController/two-drivers", &[OK], connect(bus, none, null_mut(), flat));
    equal("ConnectController/higher-version-first", 0x20, count(&ASKED_FIRST));
    equal("ConnectController/higher-version-starts", 1, count(&(*second).started));
    equal("ConnectController/lower-version-does-not", 0, count(&(*first).started));
    let _ = disconnect(bus, null_mut(), null_mut());
    let mut named = [h1, null_mut()];
    ASKED_FIRST.store(0, Relaxed);
    check("ConnectController/named-driver", &[OK], connect(bus, named.as_mut_ptr(), REST.ptr(), flat));
    equal("ConnectController/named-driver-first", 0x10, count(&ASKED_FIRST));
    equal("ConnectController/named-driver-starts", 1, count(&(*first).started));
    holds("ConnectController/passes-the-remaining-path", (*first).rest.load(Relaxed));
    // With an end node as the remaining path a bus driver makes no child: that is success, whoever starts.
    static END: [u8; 4] = [0x7f, 0xff, 4, 0];
    let _ = disconnect(bus, null_mut(), null_mut());

    // An exclusive opening asks the driver to leave.
    let _ = connect(bus, none, null_mut(), all);
    let mut p = null_mut();
    let (_, _) = (count(&(*second).stopped), count(&(*first).stopped));
    let got = (bs().open_protocol)(bus, g(&BUS), &mut p, image(), null_mut(), efi::OPEN_PROTOCOL_EXCLUSIVE);
    check("OpenProtocol/exclusive-beside-driver", &[OK], got);
    equal("OpenProtocol/exclusive-stops-driver", 2, count(&(*second).stopped));
    let _ = (bs().close_protocol)(bus, g(&BUS), image(), null_mut());
    let _ = connect(bus, none, null_mut(), flat);
    (*second).refuses.store(true, Relaxed);
    let got = (bs().open_protocol)(bus, g(&BUS), &mut p, image(), null_mut(), efi::OPEN_PROTOCOL_EXCLUSIVE);
    check("OpenProtocol/exclusive-driver-refuses", &[DENIED], got);
    check("UninstallProtocolInterface/driver-refuses", &[DENIED], uninstall(bus, &BUS, old));
    let re = (bs().reinstall_protocol_interface)(bus, g(&BUS), old, old);
    check("ReinstallProtocolInterface/driver-refuses", &[DENIED], re);
    (*second).refuses.store(false, Relaxed);

    // Reinstalling stops the driver and connects again.
    let (_, _) = (count(&(*second).stopped), count(&(*second).started));
    let new = bogus().cast::<u8>().add(16).cast();
    let re = (bs().reinstall_protocol_interface)(bus, g(&BUS), old, new);
    check("ReinstallProtocolInterface/managed", &[OK], re);
    equal("ReinstallProtocolInterface/stops", 2, count(&(*second).stopped));
    equal("ReinstallProtocolInterface/starts-again", 1, count(&(*second).started));
    old = new;
    check("UninstallProtocolInterface/managed", &[OK], uninstall(bus, &BUS, old));
    equal("UninstallProtocolInterface/stops-driver", 2, count(&(*second).stopped));

    // Nothing to start, but the remaining path is an end node.
    let mut plain = null_mut();
    let _ = install(&mut plain, &CHILD, bogus());
    let end = END.as_ptr().cast_mut().cast();
    check("ConnectController/end-node", &[OK], connect(plain, none, end, flat));
    let _ = uninstall(plain, &CHILD, bogus());
    let _ = uninstall(h1, &BINDING, first.cast());
    let _ = uninstall(h2, &BINDING, second.cast());
}
