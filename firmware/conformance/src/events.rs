//! Events, timers, task priority levels (UEFI 2.10, section 7.1).

use crate::env::{bogus, bs, own};
use crate::report::{check, equal, holds, s::*};
use core::ffi::c_void;
use core::ptr::null_mut;
use core::sync::atomic::{AtomicU32, Ordering};
use r_efi::efi::{self, Event, EventNotify};

const TIMER: u32 = 0x8000_0000;
const WAIT: u32 = 0x100;
const SIGNAL: u32 = 0x200;
const APPLICATION: usize = 4;
const CALLBACK: usize = 8;
const NOTIFY: usize = 16;
const HIGH: usize = 31;
/// 100 ns units of a millisecond.
const MS: u64 = 10_000;

/// Counts how often it was called in what its context points at.
unsafe extern "efiapi" fn count(_: Event, context: *mut c_void) {
    (*context.cast::<AtomicU32>()).fetch_add(1, Ordering::Relaxed);
}

static ORDER: AtomicU32 = AtomicU32::new(0);
/// Notes the number in its context behind those before.
unsafe extern "efiapi" fn note(_: Event, context: *mut c_void) {
    let _ = ORDER.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |o| Some(o << 4 | context as u32));
}
/// A wait event's notification, which finds its event ready.
unsafe extern "efiapi" fn ready(event: Event, context: *mut c_void) {
    count(event, context);
    let _ = (bs().signal_event)(event);
}
static LEVEL: AtomicU32 = AtomicU32::new(0);
/// Notes at which level it runs.
unsafe extern "efiapi" fn level(_: Event, _: *mut c_void) {
    let old = (bs().raise_tpl)(HIGH);
    (bs().restore_tpl)(old);
    LEVEL.store(old as u32, Ordering::Relaxed);
}

fn context(counter: &AtomicU32) -> *mut c_void {
    core::ptr::from_ref(counter).cast_mut().cast()
}
fn of(counter: &AtomicU32) -> u64 {
    u64::from(counter.load(Ordering::Relaxed))
}

pub unsafe fn run() {
    create();
    signal();
    levels();
    groups();
    timers();
    wait();
}

unsafe fn create() {
    let mut e = null_mut();
    let f: Option<EventNotify> = Some(count);
    let make = bs().create_event;
    check("CreateEvent/plain", &[OK], make(0, 0, None, null_mut(), &mut e));
    check("CloseEvent/good", &[OK], (bs().close_event)(e));
    check("CreateEvent/null-event", &[INVALID], make(0, 0, None, null_mut(), null_mut()));
    check("CreateEvent/unknown-type", &[INVALID], make(1, CALLBACK, f, null_mut(), &mut e));
    check("CreateEvent/both-notify-types", &[INVALID], make(WAIT | SIGNAL, CALLBACK, f, null_mut(), &mut e));
    check("CreateEvent/signal-without-function", &[INVALID], make(SIGNAL, CALLBACK, None, null_mut(), &mut e));
    check("CreateEvent/wait-without-function", &[INVALID], make(WAIT, CALLBACK, None, null_mut(), &mut e));
    for (name, tpl) in [
        ("CreateEvent/tpl-0", 0),
        ("CreateEvent/tpl-3", 3),
        ("CreateEvent/tpl-9", CALLBACK + 1),
        ("CreateEvent/tpl-17", NOTIFY + 1),
        ("CreateEvent/tpl-high", HIGH),
        ("CreateEvent/tpl-32", HIGH + 1),
    ] {
        check(name, &[INVALID], make(SIGNAL, tpl, f, null_mut(), &mut e));
    }
    let exit = 0x201;
    check("CreateEvent/exit-boot-services", &[OK], make(exit, CALLBACK, f, null_mut(), &mut e));
    let _ = (bs().close_event)(e);
    check("CreateEvent/virtual-address-change", &[OK], make(0x6000_0202, CALLBACK, f, null_mut(), &mut e));
    let _ = (bs().close_event)(e);
    let ex = bs().create_event_ex;
    let group = own(2);
    check("CreateEventEx/group", &[OK], ex(SIGNAL, CALLBACK, f, null_mut(), &group, &mut e));
    let _ = (bs().close_event)(e);
    check("CreateEventEx/no-group", &[OK], ex(SIGNAL, CALLBACK, f, null_mut(), core::ptr::null(), &mut e));
    let _ = (bs().close_event)(e);
    check("CreateEventEx/exit-type-with-group", &[INVALID], ex(exit, CALLBACK, f, null_mut(), &group, &mut e));
    let got = ex(0x6000_0202, CALLBACK, f, null_mut(), &group, &mut e);
    check("CreateEventEx/virtual-type-with-group", &[INVALID], got);
    check("CreateEventEx/null-event", &[INVALID], ex(SIGNAL, CALLBACK, f, null_mut(), &group, null_mut()));
    check("CreateEventEx/no-function", &[INVALID], ex(SIGNAL, CALLBACK, None, null_mut(), &group, &mut e));
    check("CreateEventEx/tpl-high", &[INVALID], ex(SIGNAL, HIGH, f, null_mut(), &group, &mut e));
}

unsafe fn signal() {
    let mut e = null_mut();
    let _ = (bs().create_event)(0, 0, None, null_mut(), &mut e);
    check("CheckEvent/fresh", &[NOT_READY], (bs().check_event)(e));
    check("SignalEvent/good", &[OK], (bs().signal_event)(e));
    check("SignalEvent/again", &[OK], (bs().signal_event)(e));
    check("CheckEvent/signaled", &[OK], (bs().check_event)(e));
    check("CheckEvent/spent", &[NOT_READY], (bs().check_event)(e));
    let _ = (bs().close_event)(e);

    let n = AtomicU32::new(0);
    let _ = (bs().create_event)(SIGNAL, CALLBACK, Some(count), context(&n), &mut e);
    check("CheckEvent/signal-type", &[INVALID], (bs().check_event)(e));
    let _ = (bs().signal_event)(e);
    equal("SignalEvent/notified-at-once", 1, of(&n));
    let _ = (bs().signal_event)(e);
    equal("SignalEvent/notified-each-time", 2, of(&n));
    let _ = (bs().close_event)(e);

    // A wait event asks its function each time that somebody looks.
    let n = AtomicU32::new(0);
    let _ = (bs().create_event)(WAIT, CALLBACK, Some(count), context(&n), &mut e);
    check("CheckEvent/wait-type-not-ready", &[NOT_READY], (bs().check_event)(e));
    equal("CheckEvent/asks-its-function", 1, of(&n));
    let _ = (bs().close_event)(e);
    let n = AtomicU32::new(0);
    let _ = (bs().create_event)(WAIT, CALLBACK, Some(ready), context(&n), &mut e);
    check("CheckEvent/wait-type-ready", &[OK], (bs().check_event)(e));
    equal("CheckEvent/asked-once", 1, of(&n));
    let _ = (bs().close_event)(e);
    check("CheckEvent/no-event", &[INVALID], (bs().check_event)(bogus()));
}

unsafe fn levels() {
    let old = (bs().raise_tpl)(NOTIFY);
    equal("RaiseTPL/tells-the-old-level", APPLICATION as u64, old as u64);
    equal("RaiseTPL/tells-the-raised-level", NOTIFY as u64, (bs().raise_tpl)(HIGH) as u64);
    (bs().restore_tpl)(old);
    let now = (bs().raise_tpl)(HIGH);
    equal("RestoreTPL/restores", APPLICATION as u64, now as u64);
    (bs().restore_tpl)(now);

    let n = AtomicU32::new(0);
    let mut e = null_mut();
    let _ = (bs().create_event)(SIGNAL, CALLBACK, Some(count), context(&n), &mut e);
    let old = (bs().raise_tpl)(CALLBACK);
    let _ = (bs().signal_event)(e);
    let _ = (bs().signal_event)(e);
    equal("RaiseTPL/holds-notifications-back", 0, of(&n));
    (bs().restore_tpl)(old);
    equal("RestoreTPL/delivers-once", 1, of(&n));

    // What is closed while it waits is not called.
    let old = (bs().raise_tpl)(NOTIFY);
    let _ = (bs().signal_event)(e);
    let _ = (bs().close_event)(e);
    (bs().restore_tpl)(old);
    equal("CloseEvent/forgets-what-waits", 1, of(&n));

    let mut all = [null_mut(); 4];
    for (i, (e, tpl)) in all.iter_mut().zip([CALLBACK, NOTIFY, CALLBACK, NOTIFY]).enumerate() {
        let _ = (bs().create_event)(SIGNAL, tpl, Some(note), (i + 1) as *mut c_void, e);
    }
    let old = (bs().raise_tpl)(NOTIFY);
    for e in all {
        let _ = (bs().signal_event)(e);
    }
    (bs().restore_tpl)(old);
    equal("RestoreTPL/highest-first-then-in-order", 0x2413, of(&ORDER));
    for e in all {
        let _ = (bs().close_event)(e);
    }

    let _ = (bs().create_event)(SIGNAL, NOTIFY, Some(level), null_mut(), &mut e);
    let _ = (bs().signal_event)(e);
    equal("SignalEvent/runs-at-the-events-level", NOTIFY as u64, of(&LEVEL));
    let _ = (bs().close_event)(e);
}

unsafe fn groups() {
    let group = own(3);
    let n = AtomicU32::new(0);
    let mut all = [null_mut(); 3];
    for e in &mut all {
        let _ = (bs().create_event_ex)(SIGNAL, CALLBACK, Some(count), context(&n), &group, e);
    }
    let _ = (bs().signal_event)(all[1]);
    equal("SignalEvent/whole-group", 3, of(&n));
    let _ = (bs().close_event)(all[0]);
    let _ = (bs().signal_event)(all[2]);
    equal("SignalEvent/group-without-closed", 5, of(&n));
    let _ = (bs().close_event)(all[1]);
    let _ = (bs().close_event)(all[2]);
}

/// Whether something comes within five seconds: on a busy host a timer's interrupt may be late, and that is no fault of the
/// firmware's.
unsafe fn comes(mut is: impl FnMut() -> bool) -> bool {
    for _ in 0..5000 {
        if is() {
            return true;
        }
        let _ = (bs().stall)(1000);
    }
    false
}

unsafe fn timers() {
    let mut e = null_mut();
    let _ = (bs().create_event)(0, 0, None, null_mut(), &mut e);
    check("SetTimer/not-a-timer", &[INVALID], (bs().set_timer)(e, efi::TIMER_RELATIVE, MS));
    let _ = (bs().close_event)(e);
    check("SetTimer/no-event", &[INVALID], (bs().set_timer)(bogus(), efi::TIMER_RELATIVE, MS));

    let _ = (bs().create_event)(TIMER, 0, None, null_mut(), &mut e);
    let ready = || (bs().check_event)(e) == OK;
    check("SetTimer/unknown-kind", &[INVALID], (bs().set_timer)(e, 3, MS));
    check("SetTimer/relative", &[OK], (bs().set_timer)(e, efi::TIMER_RELATIVE, 1000 * MS));
    let _ = (bs().stall)(40_000);
    check("SetTimer/not-before-its-time", &[NOT_READY], (bs().check_event)(e));
    holds("SetTimer/after-its-time", comes(ready));
    let _ = (bs().stall)(40_000);
    check("SetTimer/relative-goes-off-once", &[NOT_READY], (bs().check_event)(e));
    let _ = (bs().set_timer)(e, efi::TIMER_RELATIVE, 300 * MS);
    check("SetTimer/cancel", &[OK], (bs().set_timer)(e, efi::TIMER_CANCEL, 0));
    let _ = (bs().stall)(400_000);
    check("SetTimer/cancelled-stays-quiet", &[NOT_READY], (bs().check_event)(e));
    let _ = (bs().set_timer)(e, efi::TIMER_PERIODIC, 20 * MS);
    holds("SetTimer/periodic", comes(ready));
    holds("SetTimer/periodic-again", comes(ready));
    check("SetTimer/next-tick", &[OK], (bs().set_timer)(e, efi::TIMER_RELATIVE, 0));
    holds("SetTimer/next-tick-came", comes(ready));
    let _ = (bs().close_event)(e);

    let n = AtomicU32::new(0);
    let _ = (bs().create_event)(TIMER | SIGNAL, NOTIFY, Some(count), context(&n), &mut e);
    let _ = (bs().set_timer)(e, efi::TIMER_PERIODIC, 20 * MS);
    holds("SetTimer/periodic-notifies", comes(|| of(&n) >= 5));
    let old = (bs().raise_tpl)(HIGH);
    let before = of(&n);
    let _ = (bs().stall)(60_000);
    holds("RaiseTPL/high-holds-timers-back", of(&n) == before);
    (bs().restore_tpl)(old);
    holds("RestoreTPL/timers-go-on", comes(|| of(&n) > before));
    let _ = (bs().close_event)(e);
}

unsafe fn wait() {
    let mut index = 99;
    let (mut never, mut timer, mut told) = (null_mut(), null_mut(), null_mut());
    let n = AtomicU32::new(0);
    let _ = (bs().create_event)(0, 0, None, null_mut(), &mut never);
    let _ = (bs().create_event)(TIMER, 0, None, null_mut(), &mut timer);
    let _ = (bs().create_event)(SIGNAL, CALLBACK, Some(count), context(&n), &mut told);
    let mut list = [never, timer];
    check("WaitForEvent/none", &[INVALID], (bs().wait_for_event)(0, list.as_mut_ptr(), &mut index));
    let _ = (bs().set_timer)(timer, efi::TIMER_RELATIVE, 30 * MS);
    check("WaitForEvent/timer", &[OK], (bs().wait_for_event)(2, list.as_mut_ptr(), &mut index));
    equal("WaitForEvent/index", 1, index as u64);
    check("WaitForEvent/spends-the-signal", &[NOT_READY], (bs().check_event)(timer));
    let mut list = [never, told];
    check("WaitForEvent/signal-type", &[INVALID], (bs().wait_for_event)(2, list.as_mut_ptr(), &mut index));
    equal("WaitForEvent/index-of-signal-type", 1, index as u64);
    let _ = (bs().signal_event)(never);
    let old = (bs().raise_tpl)(CALLBACK);
    let got = (bs().wait_for_event)(1, list.as_mut_ptr(), &mut index);
    (bs().restore_tpl)(old);
    check("WaitForEvent/raised-level", &[UNSUPPORTED], got);
    for e in [never, timer, told] {
        let _ = (bs().close_event)(e);
    }
}
