//! Time, counters, capsules, and virtual addresses before their time (UEFI 2.10, chapter 8).

use crate::env::{bs, own, rs};
use crate::report::{check, holds, s::*};
use core::mem::zeroed;
use core::ptr::null_mut;
use r_efi::efi::{self, Boolean, CapsuleHeader, Time};

pub unsafe fn run() {
    time();
    wake_up();
    counters();
    capsules();
    virtual_addresses();
}

fn valid(t: &Time) -> bool {
    (1900..=9999).contains(&t.year)
        && (1..=12).contains(&t.month)
        && (1..=31).contains(&t.day)
        && t.hour < 24
        && t.minute < 60
        && t.second < 60
        && t.nanosecond < 1_000_000_000
        && (t.timezone == 0x7ff || (-1440..=1440).contains(&t.timezone))
        && t.daylight & !3 == 0
}

unsafe fn time() {
    let mut t: Time = zeroed();
    let mut c: efi::TimeCapabilities = zeroed();
    let (get, set) = (rs().get_time, rs().set_time);
    check("GetTime/good", &[OK], get(&mut t, &mut c));
    holds("GetTime/valid", valid(&t) && t.year >= 2024);
    holds("GetTime/capabilities", c.resolution >= 1);
    check("GetTime/without-capabilities", &[OK], get(&mut t, null_mut()));
    check("GetTime/null", &[INVALID], get(null_mut(), &mut c));
    check("SetTime/null", &[INVALID], set(null_mut()));
    let now = t;
    let wrong: [(&str, fn(&mut Time)); 12] = [
        ("SetTime/month-0", |t| t.month = 0),
        ("SetTime/month-13", |t| t.month = 13),
        ("SetTime/day-0", |t| t.day = 0),
        ("SetTime/day-32", |t| t.day = 32),
        ("SetTime/february-30", |t| (t.month, t.day) = (2, 30)),
        ("SetTime/february-29-in-2023", |t| (t.year, t.month, t.day) = (2023, 2, 29)),
        ("SetTime/hour-24", |t| t.hour = 24),
        ("SetTime/minute-60", |t| t.minute = 60),
        ("SetTime/second-60", |t| t.second = 60),
        ("SetTime/nanosecond", |t| t.nanosecond = 1_000_000_000),
        ("SetTime/zone", |t| t.timezone = 1441),
        ("SetTime/daylight", |t| t.daylight = 4),
    ];
    for (name, change) in wrong {
        let mut t = now;
        change(&mut t);
        check(name, &[INVALID], set(&mut t));
    }
    let mut other = Time { year: 2031, month: 2, day: 28, hour: 23, minute: 59, second: 58, ..now };
    check("SetTime/good", &[OK], set(&mut other));
    let _ = get(&mut t, null_mut());
    holds("SetTime/set", t.year == 2031 && t.month == 2 && t.day == 28 && t.hour == 23 && t.second >= 58);
    let _ = (bs().stall)(3_000_000);
    let _ = get(&mut t, null_mut());
    holds("GetTime/goes-over-midnight", t.month == 3 && t.day == 1 && t.hour == 0 && t.second < 10);
    let mut back = now;
    let _ = set(&mut back);
    let _ = get(&mut t, null_mut());
    holds("SetTime/put-back", t.year == now.year && t.day == now.day && t.hour == now.hour);
}

unsafe fn wake_up() {
    let (mut on, mut pending, mut t): (Boolean, Boolean, Time) = (Boolean::FALSE, Boolean::FALSE, zeroed());
    let s = (rs().get_wakeup_time)(&mut on, &mut pending, &mut t);
    check("GetWakeupTime/answers", &[OK, UNSUPPORTED], s);
    check("GetWakeupTime/null", &[INVALID, UNSUPPORTED], (rs().get_wakeup_time)(null_mut(), &mut pending, &mut t));
    check("SetWakeupTime/off", &[OK, UNSUPPORTED], (rs().set_wakeup_time)(Boolean::FALSE, null_mut()));
    check("SetWakeupTime/null", &[INVALID, UNSUPPORTED], (rs().set_wakeup_time)(Boolean::TRUE, null_mut()));
}

unsafe fn counters() {
    let (mut a, mut b) = (0, 0);
    check("GetNextHighMonotonicCount/good", &[OK], (rs().get_next_high_mono_count)(&mut a));
    let _ = (rs().get_next_high_mono_count)(&mut b);
    holds("GetNextHighMonotonicCount/grows", b == a.wrapping_add(1));
    check("GetNextHighMonotonicCount/null", &[INVALID], (rs().get_next_high_mono_count)(null_mut()));
    // The high half is in the 64-bit count of boot services.
    let mut count = 0;
    let _ = (bs().get_next_monotonic_count)(&mut count);
    holds("GetNextMonotonicCount/has-the-high-half", count >> 32 == u64::from(b));
}

unsafe fn capsules() {
    const PERSIST: u32 = 0x1_0000;
    const POPULATE: u32 = 0x2_0000;
    const RESET: u32 = 0x4_0000;
    let capsule = |flags| CapsuleHeader {
        capsule_guid: own(50),
        header_size: size_of::<CapsuleHeader>() as u32,
        flags,
        capsule_image_size: size_of::<CapsuleHeader>() as u32,
    };
    let mut plain = capsule(0);
    let mut list = [&raw mut plain];
    let update = rs().update_capsule;
    check("UpdateCapsule/none", &[INVALID], update(list.as_mut_ptr(), 0, 0));
    check("UpdateCapsule/unknown-kind", &[UNSUPPORTED], update(list.as_mut_ptr(), 1, 0));
    for (name, flags) in [("UpdateCapsule/populate-alone", POPULATE), ("UpdateCapsule/reset-alone", RESET)] {
        let mut c = capsule(flags);
        let mut list = [&raw mut c];
        check(name, &[INVALID], update(list.as_mut_ptr(), 1, 0));
    }
    let mut c = capsule(PERSIST);
    let mut across = [&raw mut c];
    check("UpdateCapsule/across-reset-no-list", &[INVALID, UNSUPPORTED], update(across.as_mut_ptr(), 1, 0));
    let (mut size, mut reset) = (0, 0);
    let query = rs().query_capsule_capabilities;
    let s = query(list.as_mut_ptr(), 1, null_mut(), &mut reset);
    check("QueryCapsuleCapabilities/null-size", &[INVALID], s);
    let s = query(list.as_mut_ptr(), 1, &mut size, &mut reset);
    check("QueryCapsuleCapabilities/unknown-kind", &[UNSUPPORTED], s);
    let s = query(list.as_mut_ptr(), 0, &mut size, &mut reset);
    check("QueryCapsuleCapabilities/none", &[INVALID], s);
}

unsafe fn virtual_addresses() {
    let mut p = run as *mut core::ffi::c_void;
    check("ConvertPointer/too-early", &[UNSUPPORTED], (rs().convert_pointer)(0, &mut p));
    let mut d: efi::MemoryDescriptor = zeroed();
    let s = (rs().set_virtual_address_map)(size_of_val(&d), size_of_val(&d), 1, &mut d);
    check("SetVirtualAddressMap/too-early", &[UNSUPPORTED], s);
}
