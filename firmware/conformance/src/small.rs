//! Random numbers, Unicode collation, the HII database (UEFI 2.10, sections 37.5, 13.10 and 34.8).

use crate::env::{Wide, free, image, locate, own, pool};
use crate::report::{check, equal, holds, s::*, skip};
use core::ptr::{null, null_mut};
use r_efi::efi::{Boolean, Char16, Guid};
use r_efi::protocols::{hii_database, rng};

pub unsafe fn run() {
    random();
    collation();
    database();
}

unsafe fn random() {
    let p: *mut rng::Protocol = locate(&rng::PROTOCOL_GUID);
    if p.is_null() {
        return skip("Rng", "not offered");
    }
    let mut n = 0;
    let mut list = [own(0); 16];
    check("Rng.GetInfo/too-small", &[SMALL], ((*p).get_info)(p, &mut n, list.as_mut_ptr()));
    holds("Rng.GetInfo/size-told", n >= 16 && n % 16 == 0);
    n = 256;
    check("Rng.GetInfo/good", &[OK], ((*p).get_info)(p, &mut n, list.as_mut_ptr()));
    check("Rng.GetInfo/null-size", &[INVALID], ((*p).get_info)(p, null_mut(), list.as_mut_ptr()));
    let (mut a, mut b) = ([0u8; 32], [0u8; 32]);
    check("Rng.GetRNG/default", &[OK], ((*p).get_rng)(p, null_mut(), 32, a.as_mut_ptr()));
    check("Rng.GetRNG/named", &[OK], ((*p).get_rng)(p, list.as_mut_ptr(), 32, b.as_mut_ptr()));
    holds("Rng.GetRNG/differs", a != b && a != [0; 32]);
    let mut unknown = own(61);
    check("Rng.GetRNG/unknown-algorithm", &[UNSUPPORTED], ((*p).get_rng)(p, &mut unknown, 32, a.as_mut_ptr()));
    check("Rng.GetRNG/null", &[INVALID], ((*p).get_rng)(p, null_mut(), 32, null_mut()));
    check("Rng.GetRNG/nothing", &[INVALID], ((*p).get_rng)(p, null_mut(), 0, a.as_mut_ptr()));
}

#[repr(C)]
struct Collation {
    compare: unsafe extern "efiapi" fn(*mut Collation, *const Char16, *const Char16) -> isize,
    matches: unsafe extern "efiapi" fn(*mut Collation, *const Char16, *const Char16) -> Boolean,
    lower: unsafe extern "efiapi" fn(*mut Collation, *mut Char16),
    upper: unsafe extern "efiapi" fn(*mut Collation, *mut Char16),
    from_fat: unsafe extern "efiapi" fn(*mut Collation, usize, *const u8, *mut Char16),
    to_fat: unsafe extern "efiapi" fn(*mut Collation, *const Char16, usize, *mut u8) -> Boolean,
    languages: *const u8,
}

unsafe fn collation() {
    const GUID: Guid =
        Guid::from_fields(0xa4c7_51fc, 0x23ae, 0x4c3e, 0x92, 0xe9, &[0x49, 0x64, 0xcf, 0x63, 0xf3, 0x49]);
    let p: *mut Collation = locate(&GUID);
    if p.is_null() {
        return holds("UnicodeCollation/there", false);
    }
    let compare = |a: &Wide<32>, b: &Wide<32>| ((*p).compare)(p, a.ptr(), b.ptr());
    let w = |t: &str| Wide::<32>::new_at_run_time(t);
    holds("UnicodeCollation.StriColl/case", compare(&w("Alpha"), &w("aLPHA")) == 0);
    holds("UnicodeCollation.StriColl/less", compare(&w("alpha"), &w("BETA")) < 0);
    holds("UnicodeCollation.StriColl/greater", compare(&w("gamma"), &w("BETA")) > 0);
    holds("UnicodeCollation.StriColl/prefix", compare(&w("alp"), &w("alpha")) < 0);
    for (name, text, pattern, wanted) in [
        ("UnicodeCollation.MetaiMatch/star", "kernel.efi", "*.EFI", true),
        ("UnicodeCollation.MetaiMatch/star-alone", "", "*", true),
        ("UnicodeCollation.MetaiMatch/question", "abc", "a?c", true),
        ("UnicodeCollation.MetaiMatch/question-needs-one", "ac", "a?c", false),
        ("UnicodeCollation.MetaiMatch/set", "a5z", "a[0-9]z", true),
        ("UnicodeCollation.MetaiMatch/set-list", "xbx", "x[abc]x", true),
        ("UnicodeCollation.MetaiMatch/not-in-set", "xdx", "x[a-c]x", false),
        ("UnicodeCollation.MetaiMatch/longer", "abcd", "abc", false),
        ("UnicodeCollation.MetaiMatch/two-stars", "one.two.three", "*two*", true),
    ] {
        holds(name, bool::from(((*p).matches)(p, w(text).ptr(), w(pattern).ptr())) == wanted);
    }
    let t = w("MiXed 1");
    ((*p).upper)(p, t.ptr());
    holds("UnicodeCollation.StrUpr/good", t.0[..7] == w("MIXED 1").0[..7]);
    ((*p).lower)(p, t.ptr());
    holds("UnicodeCollation.StrLwr/good", t.0[..7] == w("mixed 1").0[..7]);
    let mut out = [0xffffu16; 12];
    ((*p).from_fat)(p, 8, b"NAME\0xyz".as_ptr(), out.as_mut_ptr());
    holds("UnicodeCollation.FatToStr/good", out[..5] == w("NAME").0[..5]);
    let mut fat = [0u8; 16];
    let changed = ((*p).to_fat)(p, w("a name.x").ptr(), 16, fat.as_mut_ptr());
    holds("UnicodeCollation.StrToFat/no-spaces-no-dots", &fat[..6] == b"ANAMEX" && !bool::from(changed));
    let changed = ((*p).to_fat)(p, w("a+b").ptr(), 16, fat.as_mut_ptr());
    holds("UnicodeCollation.StrToFat/replaces", &fat[..3] == b"A_B" && bool::from(changed));
    holds("UnicodeCollation/language", !(*p).languages.is_null() && *(*p).languages == b'e');
}

/// A package list: its header, one package of strings with nothing in it, and the end.
fn packages(out: &mut [u8; 128], guid: &Guid) -> usize {
    const STRINGS: usize = 46 + 3 + 1;
    out.fill(0);
    out[..16].copy_from_slice(guid.as_bytes());
    let total = 20 + STRINGS + 4;
    out[16..20].copy_from_slice(&(total as u32).to_le_bytes());
    let s = &mut out[20..20 + STRINGS];
    // Length in 24 bits, type 4 (strings); header size, offset of the strings, language window, language name, language.
    s[..4].copy_from_slice(&(STRINGS as u32 | 4 << 24).to_le_bytes());
    s[4..8].copy_from_slice(&49u32.to_le_bytes());
    s[8..12].copy_from_slice(&49u32.to_le_bytes());
    s[44] = 1;
    s[46..49].copy_from_slice(b"en\0");
    let end = &mut out[20 + STRINGS..total];
    end.copy_from_slice(&(4u32 | 0xdf << 24).to_le_bytes());
    total
}

unsafe fn database() {
    let p: *mut hii_database::Protocol = locate(&hii_database::PROTOCOL_GUID);
    if p.is_null() {
        return skip("HiiDatabase", "not offered");
    }
    let mut list = [0u8; 128];
    let guid = own(62);
    let total = packages(&mut list, &guid);
    let mut h = null_mut();
    let new = (*p).new_package_list;
    check("HiiDatabase.NewPackageList/null-list", &[INVALID], new(p, null(), null_mut(), &mut h));
    check("HiiDatabase.NewPackageList/null-handle", &[INVALID], new(p, list.as_ptr().cast(), null_mut(), null_mut()));
    check("HiiDatabase.NewPackageList/good", &[OK], new(p, list.as_ptr().cast(), image(), &mut h));
    holds("HiiDatabase.NewPackageList/handle", !h.is_null());
    let mut driver = null_mut();
    let owner = (*p).get_package_list_handle;
    check("HiiDatabase.GetPackageListHandle/good", &[OK], owner(p, h, &mut driver));
    holds("HiiDatabase.GetPackageListHandle/driver", driver == image());
    check("HiiDatabase.GetPackageListHandle/null", &[INVALID], owner(p, h, null_mut()));
    check("HiiDatabase.GetPackageListHandle/null-list", &[INVALID], owner(p, null_mut(), &mut driver));

    let lists = (*p).list_package_lists;
    let mut found = [null_mut(); 64];
    let mut n = 0;
    let s = lists(p, 4, null(), &mut n, found.as_mut_ptr());
    check("HiiDatabase.ListPackageLists/too-small", &[SMALL], s);
    holds("HiiDatabase.ListPackageLists/size-told", n >= 8 && n % 8 == 0);
    n = size_of_val(&found);
    check("HiiDatabase.ListPackageLists/good", &[OK], lists(p, 4, null(), &mut n, found.as_mut_ptr()));
    holds("HiiDatabase.ListPackageLists/found", found[..n / 8].contains(&h));
    check("HiiDatabase.ListPackageLists/null-size", &[INVALID], lists(p, 4, null(), null_mut(), found.as_mut_ptr()));
    n = 512;
    // A GUID goes with packages of the GUID type only.
    let s = lists(p, 4, &guid, &mut n, found.as_mut_ptr());
    check("HiiDatabase.ListPackageLists/guid-with-strings", &[INVALID], s);
    n = 512;
    let s = lists(p, 1, null(), &mut n, found.as_mut_ptr());
    check("HiiDatabase.ListPackageLists/guid-type-without", &[INVALID], s);

    let export = (*p).export_package_lists;
    let mut n = 0;
    check("HiiDatabase.ExportPackageLists/too-small", &[SMALL], export(p, h, &mut n, null_mut()));
    equal("HiiDatabase.ExportPackageLists/size-told", total as u64, n as u64);
    let copy = pool(n);
    check("HiiDatabase.ExportPackageLists/good", &[OK], export(p, h, &mut n, copy.cast()));
    holds("HiiDatabase.ExportPackageLists/same", (0..16).all(|i| *copy.add(i) == list[i]));
    free(copy);
    check("HiiDatabase.ExportPackageLists/null-size", &[INVALID], export(p, h, null_mut(), null_mut()));

    let update = (*p).update_package_list;
    check("HiiDatabase.UpdatePackageList/good", &[OK], update(p, h, list.as_ptr().cast()));
    check("HiiDatabase.UpdatePackageList/null-handle", &[INVALID], update(p, null_mut(), list.as_ptr().cast()));
    check("HiiDatabase.UpdatePackageList/null-list", &[INVALID], update(p, h, null()));
    let remove = (*p).remove_package_list;
    check("HiiDatabase.RemovePackageList/good", &[OK], remove(p, h));
    check("HiiDatabase.RemovePackageList/again", &[NOT_FOUND], remove(p, h));
    check("HiiDatabase.RemovePackageList/null", &[NOT_FOUND, INVALID], remove(p, null_mut()));
    check("HiiDatabase.UpdatePackageList/removed", &[NOT_FOUND], update(p, h, list.as_ptr().cast()));
    let mut n = 0u16;
    let s = ((*p).find_keyboard_layouts)(p, null_mut(), null_mut());
    check("HiiDatabase.FindKeyboardLayouts/null", &[INVALID], s);
    let s = ((*p).get_keyboard_layout)(p, &own(63), &mut n, null_mut());
    check("HiiDatabase.GetKeyboardLayout/unknown", &[NOT_FOUND, INVALID], s);
    let mut unknown = own(63);
    let s = ((*p).set_keyboard_layout)(p, &mut unknown);
    check("HiiDatabase.SetKeyboardLayout/unknown", &[NOT_FOUND], s);
    check("HiiDatabase.SetKeyboardLayout/null", &[INVALID], ((*p).set_keyboard_layout)(p, null_mut()));
}
