//! Variables (UEFI 2.10, section 8.2). The machine is in setup mode: there is no platform key.

use crate::env::{Wide, free, g, own, pool, rs};
use crate::report::{check, equal, holds, s::*};
use core::ffi::c_void;
use core::ptr::null_mut;
use r_efi::efi::{Guid, Status};

const NV: u32 = 1;
const BS: u32 = 2;
const RT: u32 = 4;
const HW: u32 = 8;
const AUTH: u32 = 0x10;
const TIME: u32 = 0x20;
const APPEND: u32 = 0x40;
const ENHANCED: u32 = 0x80;

/// Vendor of all variables made here.
pub const VENDOR: Guid = own(30);
const GLOBAL: Guid = Guid::from_fields(0x8be4_df61, 0x93ca, 0x11d2, 0xaa, 0x0d, &[0x00, 0xe0, 0x98, 0x03, 0x2b, 0x8c]);
const IMAGE_SECURITY: Guid =
    Guid::from_fields(0xd719_b2cb, 0x3d3a, 0x4596, 0xa3, 0xbc, &[0xda, 0xd0, 0x0e, 0x67, 0x65, 0x6f]);

/// SetVariable with a value.
pub unsafe fn set<const N: usize>(name: &Wide<N>, vendor: &Guid, attributes: u32, data: &[u8]) -> Status {
    (rs().set_variable)(name.ptr(), g(vendor), attributes, data.len(), data.as_ptr().cast_mut().cast())
}
/// GetVariable into a small buffer: status, attributes, bytes.
pub unsafe fn get<const N: usize>(name: &Wide<N>, vendor: &Guid) -> (Status, u32, [u8; 64], usize) {
    let (mut a, mut d, mut n) = (0, [0u8; 64], 64);
    let s = (rs().get_variable)(name.ptr(), g(vendor), &mut a, &mut n, d.as_mut_ptr().cast());
    (s, a, d, n)
}

pub unsafe fn run() {
    getting();
    setting();
    attributes();
    appending();
    protected();
    authenticated();
    walking();
    storage();
}

unsafe fn getting() {
    let name = Wide::<16>::new("Conformance");
    let f = rs().get_variable;
    let (mut a, mut n, mut d) = (0, 0, [0u8; 8]);
    let data: *mut c_void = d.as_mut_ptr().cast();
    check("GetVariable/absent", &[NOT_FOUND], f(name.ptr(), g(&VENDOR), &mut a, &mut n, null_mut()));
    check("SetVariable/good", &[OK], set(&name, &VENDOR, NV | BS | RT, b"12345"));
    check("GetVariable/too-small", &[SMALL], f(name.ptr(), g(&VENDOR), &mut a, &mut n, null_mut()));
    equal("GetVariable/size-told", 5, n as u64);
    equal("GetVariable/attributes-with-too-small", u64::from(NV | BS | RT), u64::from(a));
    n = 8;
    check("GetVariable/null-data", &[INVALID], f(name.ptr(), g(&VENDOR), &mut a, &mut n, null_mut()));
    n = 8;
    check("GetVariable/good", &[OK], f(name.ptr(), g(&VENDOR), &mut a, &mut n, data));
    holds("GetVariable/value", n == 5 && d[..5] == *b"12345");
    n = 8;
    check("GetVariable/without-attributes", &[OK], f(name.ptr(), g(&VENDOR), null_mut(), &mut n, data));
    check("GetVariable/other-vendor", &[NOT_FOUND], f(name.ptr(), g(&own(31)), &mut a, &mut n, data));
    check("GetVariable/null-name", &[INVALID], f(null_mut(), g(&VENDOR), &mut a, &mut n, data));
    check("GetVariable/null-vendor", &[INVALID], f(name.ptr(), null_mut(), &mut a, &mut n, data));
    check("GetVariable/null-size", &[INVALID], f(name.ptr(), g(&VENDOR), &mut a, null_mut(), data));
    let empty = Wide::<1>::new("");
    check("GetVariable/empty-name", &[NOT_FOUND], f(empty.ptr(), g(&VENDOR), &mut a, &mut n, data));
    // Names differ by case.
    let lower = Wide::<16>::new("conformance");
    check("GetVariable/case-counts", &[NOT_FOUND], f(lower.ptr(), g(&VENDOR), &mut a, &mut n, data));
}

unsafe fn setting() {
    let name = Wide::<16>::new("Conformance");
    let empty = Wide::<1>::new("");
    let f = rs().set_variable;
    let data: *mut c_void = b"abc".as_ptr().cast_mut().cast();
    let all = NV | BS | RT;
    check("SetVariable/null-name", &[INVALID], f(null_mut(), g(&VENDOR), all, 3, data));
    check("SetVariable/empty-name", &[INVALID], f(empty.ptr(), g(&VENDOR), all, 3, data));
    check("SetVariable/null-vendor", &[INVALID], f(name.ptr(), null_mut(), all, 3, data));
    check("SetVariable/null-data", &[INVALID], f(name.ptr(), g(&VENDOR), all, 3, null_mut()));
    check("SetVariable/replaces", &[OK], set(&name, &VENDOR, all, b"x"));
    let (s, _, d, n) = get(&name, &VENDOR);
    holds("SetVariable/replaced", s == OK && n == 1 && d[0] == b'x');
    check("SetVariable/same-again", &[OK], set(&name, &VENDOR, all, b"x"));
    check("SetVariable/other-attributes", &[INVALID], set(&name, &VENDOR, BS | RT, b"x"));
    check("SetVariable/delete-by-size", &[OK], set(&name, &VENDOR, all, b""));
    check("GetVariable/deleted", &[NOT_FOUND], get(&name, &VENDOR).0);
    check("SetVariable/delete-absent", &[NOT_FOUND], set(&name, &VENDOR, all, b""));
    let _ = set(&name, &VENDOR, BS, b"volatile");
    equal("GetVariable/volatile-attributes", u64::from(BS), u64::from(get(&name, &VENDOR).1));
    check("SetVariable/delete-by-attributes", &[OK], set(&name, &VENDOR, 0, b"anything"));
    check("GetVariable/deleted-by-attributes", &[NOT_FOUND], get(&name, &VENDOR).0);
    check("SetVariable/delete-absent-by-attributes", &[NOT_FOUND], set(&name, &VENDOR, 0, b"anything"));
}

unsafe fn attributes() {
    let name = Wide::<16>::new("Attributes");
    for (what, attributes) in [
        ("SetVariable/runtime-only", RT),
        ("SetVariable/non-volatile-runtime-only", NV | RT),
        ("SetVariable/unknown-attribute", NV | BS | 0x100),
        ("SetVariable/highest-attribute", NV | BS | 0x8000_0000),
    ] {
        check(what, &[INVALID], set(&name, &VENDOR, attributes, b"1"));
    }
    let s = set(&name, &VENDOR, HW | BS | RT, b"1");
    check("SetVariable/volatile-error-record", &[INVALID, UNSUPPORTED], s);
    // Deprecated, or not offered here: refused as one or the other.
    let s = set(&name, &VENDOR, NV | BS | RT | AUTH, b"1");
    check("SetVariable/counter-authenticated", &[UNSUPPORTED, INVALID, SECURITY], s);
    let s = set(&name, &VENDOR, NV | BS | RT | AUTH | TIME, b"1");
    check("SetVariable/authenticated-both-ways", &[INVALID, UNSUPPORTED, SECURITY], s);
    let s = set(&name, &VENDOR, NV | BS | RT | ENHANCED, b"1");
    check("SetVariable/enhanced", &[UNSUPPORTED, INVALID], s);
    check("GetVariable/none-was-made", &[NOT_FOUND], get(&name, &VENDOR).0);
    let mut a = [(0, OK); 3];
    for (x, attributes) in a.iter_mut().zip([BS, BS | RT, NV | BS]) {
        let made = set(&name, &VENDOR, attributes, b"1");
        *x = (get(&name, &VENDOR).1, made);
        let _ = set(&name, &VENDOR, attributes, b"");
    }
    holds("SetVariable/combinations", a == [(BS, OK), (BS | RT, OK), (NV | BS, OK)]);
}

unsafe fn appending() {
    let name = Wide::<16>::new("Append");
    let all = NV | BS | RT;
    check("SetVariable/append-to-absent", &[OK], set(&name, &VENDOR, all | APPEND, b"one"));
    check("SetVariable/append", &[OK], set(&name, &VENDOR, all | APPEND, b"two"));
    let (_, a, d, n) = get(&name, &VENDOR);
    holds("SetVariable/appended", n == 6 && d[..6] == *b"onetwo");
    equal("SetVariable/append-is-not-kept", u64::from(all), u64::from(a));
    check("SetVariable/append-nothing", &[OK], set(&name, &VENDOR, all | APPEND, b""));
    equal("SetVariable/append-nothing-keeps", 6, get(&name, &VENDOR).3 as u64);
    check("SetVariable/append-other-attributes", &[INVALID], set(&name, &VENDOR, BS | APPEND, b"three"));
    let _ = set(&name, &VENDOR, all, b"");
}

unsafe fn protected() {
    for (what, name) in [
        ("SetVariable/SetupMode", Wide::<32>::new("SetupMode")),
        ("SetVariable/SecureBoot", Wide::<32>::new("SecureBoot")),
        ("SetVariable/SignatureSupport", Wide::<32>::new("SignatureSupport")),
    ] {
        check(what, &[PROTECTED], set(&name, &GLOBAL, BS | RT, &[1]));
    }
    // The vendor GUIDs of the specification are for its own variables only (section 3.3).
    let unknown = Wide::<32>::new("ViridianConformance");
    check("SetVariable/unknown-global", &[INVALID, PROTECTED], set(&unknown, &GLOBAL, NV | BS | RT, &[1]));
    let boot = Wide::<16>::new("Boot7FFE");
    check("SetVariable/boot-option", &[OK], set(&boot, &GLOBAL, NV | BS | RT, &OPTION));
    check("SetVariable/boot-option-delete", &[OK], set(&boot, &GLOBAL, NV | BS | RT, &[]));
    let (s, _, d, n) = get(&Wide::<16>::new("SetupMode"), &GLOBAL);
    holds("GetVariable/setup-mode", s == OK && n == 1 && d[0] == 1);
    let (s, _, d, n) = get(&Wide::<16>::new("SecureBoot"), &GLOBAL);
    holds("GetVariable/secure-boot-is-off", s == OK && n == 1 && d[0] == 0);
    let support = Wide::<32>::new("SignatureSupport");
    let (mut n, mut d) = (0, 0u8);
    let s = (rs().get_variable)(support.ptr(), g(&GLOBAL), null_mut(), &mut n, (&raw mut d).cast());
    holds("GetVariable/signature-support", s == SMALL && n % 16 == 0 && n >= 16);
}

/// An inactive load option: attributes, length of its path, description "x", an end node.
const OPTION: [u8; 14] = [0, 0, 0, 0, 4, 0, b'x', 0, 0, 0, 0x7f, 0xff, 4, 0];

unsafe fn authenticated() {
    let all = NV | BS | RT;
    let name = Wide::<16>::new("Private");
    let s = set(&name, &VENDOR, all | TIME, b"far too short");
    check("SetVariable/authentication-too-short", &[SECURITY], s);
    // A time stamp, a certificate header of the right type and size, and no signature in it.
    let mut d = [0u8; 64];
    d[..8].copy_from_slice(&[0xea, 0x07, 1, 1, 0, 0, 0, 0]);
    d[16..20].copy_from_slice(&40u32.to_le_bytes());
    d[20..24].copy_from_slice(&[0x00, 0x02, 0xf1, 0x0e]);
    d[24..40].copy_from_slice(&[
        0x9d, 0xd2, 0xaf, 0x4a, 0xdf, 0x68, 0xee, 0x49, 0x8a, 0xa9, 0x34, 0x7d, 0x37, 0x56, 0x65, 0xa7,
    ]);
    check("SetVariable/no-signature", &[SECURITY], set(&name, &VENDOR, all | TIME, &d));
    d[0] = 0; // no year
    d[7] = 1; // and a field that must be zero
    check("SetVariable/bad-time-stamp", &[SECURITY], set(&name, &VENDOR, all | TIME, &d));
    check("GetVariable/unsigned-is-not-kept", &[NOT_FOUND], get(&name, &VENDOR).0);
    for (what, name, vendor) in [
        ("SetVariable/PK-unauthenticated", Wide::<8>::new("PK"), &GLOBAL),
        ("SetVariable/KEK-unauthenticated", Wide::<8>::new("KEK"), &GLOBAL),
        ("SetVariable/db-unauthenticated", Wide::<8>::new("db"), &IMAGE_SECURITY),
        ("SetVariable/dbx-unauthenticated", Wide::<8>::new("dbx"), &IMAGE_SECURITY),
    ] {
        check(what, &[INVALID, SECURITY, PROTECTED], set(&name, vendor, all, &d[..44]));
    }
    let s = set(&Wide::<8>::new("db"), &IMAGE_SECURITY, all | TIME, &d);
    check("SetVariable/db-bad-authentication", &[SECURITY], s);
    check("GetVariable/no-PK", &[NOT_FOUND], get(&Wide::<8>::new("PK"), &GLOBAL).0);
}

unsafe fn walking() {
    let f = rs().get_next_variable_name;
    let one = Wide::<16>::new("WalkOne");
    let two = Wide::<16>::new("WalkTwo");
    let _ = set(&one, &VENDOR, NV | BS, b"1");
    let _ = set(&two, &VENDOR, BS, b"2");
    let mut name = [0u16; 256];
    let mut vendor = VENDOR;
    let mut n = 512;
    check("GetNextVariableName/null-size", &[INVALID], f(null_mut(), name.as_mut_ptr(), &mut vendor));
    check("GetNextVariableName/null-name", &[INVALID], f(&mut n, null_mut(), &mut vendor));
    check("GetNextVariableName/null-vendor", &[INVALID], f(&mut n, name.as_mut_ptr(), null_mut()));
    let mut absent = Wide::<32>::new("NoSuchVariable").0;
    n = 64;
    check("GetNextVariableName/no-such", &[INVALID], f(&mut n, absent.as_mut_ptr(), &mut vendor));
    let mut there = one.0;
    n = 4;
    check("GetNextVariableName/no-terminator", &[INVALID], f(&mut n, there.as_mut_ptr(), &mut vendor));
    n = 2;
    check("GetNextVariableName/too-small", &[SMALL], f(&mut n, name.as_mut_ptr(), &mut vendor));
    holds("GetNextVariableName/size-told", n >= 4 && n % 2 == 0);
    let (mut seen, mut steps, mut status) = ([0; 2], 0, OK);
    while status == OK && steps < 1000 {
        n = 512;
        status = f(&mut n, name.as_mut_ptr(), &mut vendor);
        if status == OK {
            steps += 1;
            for (count, w) in seen.iter_mut().zip([&one, &two]) {
                *count += usize::from(is_name(&name, w) && vendor == VENDOR);
            }
        }
    }
    check("GetNextVariableName/ends", &[NOT_FOUND], status);
    holds("GetNextVariableName/each-once", seen == [1, 1]);
    let _ = set(&one, &VENDOR, NV | BS, b"");
    let _ = set(&two, &VENDOR, BS, b"");
}

fn is_name<const N: usize>(name: &[u16; 256], w: &Wide<N>) -> bool {
    let len = w.0.iter().position(|c| *c == 0).unwrap_or(N);
    name[..=len] == w.0[..=len]
}

unsafe fn storage() {
    let f = rs().query_variable_info;
    let (mut most, mut left, mut one) = (0, 0, 0);
    let all = NV | BS | RT;
    check("QueryVariableInfo/good", &[OK], f(all, &mut most, &mut left, &mut one));
    holds("QueryVariableInfo/numbers", left <= most && one <= most && one > 0);
    check("QueryVariableInfo/volatile", &[OK], f(BS, &mut most, &mut left, &mut one));
    check("QueryVariableInfo/null", &[INVALID], f(all, null_mut(), &mut left, &mut one));
    check("QueryVariableInfo/null-left", &[INVALID], f(all, &mut most, null_mut(), &mut one));
    check("QueryVariableInfo/null-one", &[INVALID], f(all, &mut most, &mut left, null_mut()));
    check("QueryVariableInfo/no-attributes", &[INVALID], f(0, &mut most, &mut left, &mut one));
    check("QueryVariableInfo/runtime-only", &[INVALID], f(NV | RT, &mut most, &mut left, &mut one));
    let s = f(0x8000_0000, &mut most, &mut left, &mut one);
    check("QueryVariableInfo/unknown", &[INVALID, UNSUPPORTED], s);

    let _ = f(all, &mut most, &mut left, &mut one);
    let name = Wide::<16>::new("Large");
    let size = (one as usize).min(1 << 20) + 4096;
    let data = pool(size);
    let value = |n: usize| core::slice::from_raw_parts(data, n);
    check("SetVariable/larger-than-allowed", &[INVALID, RESOURCES], set(&name, &VENDOR, all, value(size)));
    check("GetVariable/larger-was-not-kept", &[NOT_FOUND], get(&name, &VENDOR).0);
    check("SetVariable/large", &[OK], set(&name, &VENDOR, all, value(8192)));
    let mut after = 0;
    let _ = f(all, &mut most, &mut after, &mut one);
    holds("QueryVariableInfo/less-is-left", after + 8192 <= left);
    let _ = set(&name, &VENDOR, all, b"");
    // Until nothing more goes in: the quota's answer, and what was there stays.
    let kept = Wide::<16>::new("Kept");
    let _ = set(&kept, &VENDOR, all, b"kept");
    let mut status = OK;
    let mut made = 0;
    for i in 0..64u16 {
        let mut name = Wide::<16>::new("Quota00");
        name.0[5] = b'0' as u16 + i / 8;
        name.0[6] = b'0' as u16 + i % 8;
        status = set(&name, &VENDOR, all, value(30 << 10));
        if status != OK {
            break;
        }
        made = i + 1;
    }
    check("SetVariable/quota", &[RESOURCES], status);
    holds("SetVariable/quota-keeps-others", get(&kept, &VENDOR).3 == 4);
    for i in 0..made {
        let mut name = Wide::<16>::new("Quota00");
        name.0[5] = b'0' as u16 + i / 8;
        name.0[6] = b'0' as u16 + i % 8;
        let _ = set(&name, &VENDOR, all, b"");
    }
    let _ = set(&kept, &VENDOR, all, b"");
    free(data);
}
