//! The end of boot services, and what works after it (UEFI 2.10, sections 7.4.6 and 8).

use crate::env::{Wide, bs, image, own, rs, table};
use crate::memory::Map;
use crate::report::{self, check, equal, holds, s::*};
use crate::variables::{VENDOR, get, set};
use core::ffi::c_void;
use core::mem::zeroed;
use core::ptr::null_mut;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use r_efi::efi::{self, MemoryDescriptor, Status};

const NV: u32 = 1;
const BS: u32 = 2;
const RT: u32 = 4;
/// Where runtime memory goes: an address that is not its own, and canonical.
const OFFSET: u64 = 128 << 39;

static EXITS: AtomicU32 = AtomicU32::new(0);
unsafe extern "efiapi" fn exits(_: efi::Event, _: *mut c_void) {
    EXITS.fetch_add(1, Relaxed);
}

/// Answers of ConvertPointer while the map is applied.
static CONVERTED: [AtomicU64; 6] = [const { AtomicU64::new(77) }; 6];
static MOVED: AtomicU64 = AtomicU64::new(0);
unsafe extern "efiapi" fn moves(_: efi::Event, context: *mut c_void) {
    let services = context.cast::<efi::RuntimeServices>();
    let convert = (*services).convert_pointer;
    let mut p = context;
    CONVERTED[0].store(convert(0, &mut p).as_usize() as u64, Relaxed);
    MOVED.store(p as u64, Relaxed);
    let mut none = null_mut();
    CONVERTED[1].store(convert(0, &mut none).as_usize() as u64, Relaxed);
    CONVERTED[2].store(convert(1, &mut none).as_usize() as u64, Relaxed);
    let mut nowhere = 0x7_0000_0000_0000 as *mut c_void;
    CONVERTED[3].store(convert(0, &mut nowhere).as_usize() as u64, Relaxed);
    CONVERTED[4].store(convert(0, null_mut()).as_usize() as u64, Relaxed);
    CONVERTED[5].store(1, Relaxed);
}

pub unsafe fn run() -> Status {
    let boot_only = Wide::<16>::new("BootOnly");
    let volatile = Wide::<16>::new("Volatile");
    let lasting = Wide::<16>::new("Lasting");
    let _ = set(&boot_only, &VENDOR, NV | BS, b"b");
    let _ = set(&volatile, &VENDOR, BS | RT, b"v");
    let _ = set(&lasting, &VENDOR, NV | BS | RT, b"l");

    let (mut exit, mut before, mut virt) = (null_mut(), null_mut(), null_mut());
    let _ = (bs().create_event)(0x201, 8, Some(exits), null_mut(), &mut exit);
    const BEFORE: efi::Guid =
        efi::Guid::from_fields(0x8be0_e274, 0x3970, 0x4b44, 0x80, 0xc5, &[0x1a, 0xb9, 0x50, 0x2f, 0x3b, 0xfc]);
    let _ = (bs().create_event_ex)(0x200, 8, Some(exits), null_mut(), &BEFORE, &mut before);
    let services: *mut c_void = (*table()).runtime_services.cast();
    let _ = (bs().create_event)(0x6000_0202, 8, Some(moves), services, &mut virt);
    // A copy of the uppermost page table, in which runtime memory has a second address.
    let mut tables = 0xffff_ffff;
    let _ = (bs().allocate_pages)(efi::ALLOCATE_MAX_ADDRESS, efi::LOADER_DATA, 1, &mut tables);

    let wrong = Map::read();
    check("ExitBootServices/stale-key", &[INVALID], (bs().exit_boot_services)(image(), wrong.key.wrapping_add(0x1000)));
    holds("ExitBootServices/stale-key-no-event", EXITS.load(Relaxed) <= 1);
    EXITS.store(0, Relaxed);
    // What is still allowed after a refusal: the memory map, and once more.
    let mut m = Map::read();
    let mut status = (bs().exit_boot_services)(image(), m.key);
    for _ in 0..3 {
        if status == OK {
            break;
        }
        m.refresh();
        status = (bs().exit_boot_services)(image(), m.key);
    }
    check("ExitBootServices/good", &[OK], status);
    core::arch::asm!("cli");
    holds("ExitBootServices/events", (1..=4).contains(&EXITS.load(Relaxed)));
    let st = table();
    holds("ExitBootServices/no-consoles", (*st).con_in.is_null() && (*st).con_out.is_null() && (*st).std_err.is_null());
    holds("ExitBootServices/no-boot-services", (*st).boot_services.is_null());
    variables(&boot_only, &volatile, &lasting);
    small();
    virtual_addresses(&m, tables, &lasting);
    report::finish();
    (rs().reset_system)(efi::RESET_SHUTDOWN, OK, 0, null_mut());
    report::text("\r\nCONFORMANCE-STILL-HERE\r\n");
    loop {
        core::hint::spin_loop();
    }
}

unsafe fn variables(boot_only: &Wide<16>, volatile: &Wide<16>, lasting: &Wide<16>) {
    check("GetVariable/boot-only-afterwards", &[NOT_FOUND], get(boot_only, &VENDOR).0);
    let (s, _, d, n) = get(volatile, &VENDOR);
    holds("GetVariable/volatile-afterwards", s == OK && n == 1 && d[0] == b'v');
    let (s, _, d, n) = get(lasting, &VENDOR);
    holds("GetVariable/non-volatile-afterwards", s == OK && n == 1 && d[0] == b'l');
    let all = NV | BS | RT;
    check("SetVariable/afterwards", &[OK], set(lasting, &VENDOR, all, b"longer"));
    equal("SetVariable/afterwards-is-set", 6, get(lasting, &VENDOR).3 as u64);
    let s = set(volatile, &VENDOR, BS | RT, b"w");
    check("SetVariable/volatile-afterwards", &[PROTECTED, INVALID], s);
    let s = set(boot_only, &VENDOR, NV | BS, b"w");
    check("SetVariable/boot-only-afterwards", &[PROTECTED, INVALID], s);
    let new = Wide::<16>::new("NewAtRunTime");
    check("SetVariable/new-volatile-afterwards", &[INVALID, PROTECTED], set(&new, &VENDOR, BS | RT, b"w"));
    check("SetVariable/new-afterwards", &[OK], set(&new, &VENDOR, all, b"w"));
    check("SetVariable/delete-afterwards", &[OK], set(&new, &VENDOR, all, b""));
    check("GetVariable/deleted-afterwards", &[NOT_FOUND], get(&new, &VENDOR).0);
    let mut name = [0u16; 256];
    let mut vendor = own(0);
    let (mut seen, mut status) = (false, OK);
    while status == OK {
        let mut n = 512;
        status = (rs().get_next_variable_name)(&mut n, name.as_mut_ptr(), &mut vendor);
        seen |= status == OK && vendor == VENDOR && name[..9] == boot_only.0[..9];
    }
    check("GetNextVariableName/ends-afterwards", &[NOT_FOUND], status);
    holds("GetNextVariableName/boot-only-is-hidden", !seen);
    let (mut most, mut left, mut one) = (0, 0, 0);
    let s = (rs().query_variable_info)(all, &mut most, &mut left, &mut one);
    check("QueryVariableInfo/afterwards", &[OK], s);
    let s = (rs().query_variable_info)(NV | BS, &mut most, &mut left, &mut one);
    check("QueryVariableInfo/boot-only-afterwards", &[INVALID], s);
}

unsafe fn small() {
    let mut t: efi::Time = zeroed();
    check("GetTime/afterwards", &[OK], (rs().get_time)(&mut t, null_mut()));
    holds("GetTime/valid-afterwards", t.year >= 2024 && (1..=12).contains(&t.month));
    check("SetTime/afterwards", &[OK], (rs().set_time)(&mut t));
    let mut n = 0;
    check("GetNextHighMonotonicCount/afterwards", &[OK], (rs().get_next_high_mono_count)(&mut n));
    let mut list = [null_mut()];
    let s = (rs().update_capsule)(list.as_mut_ptr(), 0, 0);
    check("UpdateCapsule/none-afterwards", &[INVALID, UNSUPPORTED], s);
    let mut p: *mut c_void = small as *mut c_void;
    check("ConvertPointer/not-yet", &[UNSUPPORTED], (rs().convert_pointer)(0, &mut p));
}

unsafe fn virtual_addresses(m: &Map, tables: u64, lasting: &Wide<16>) {
    let (at, size, step) = m.raw();
    let f = rs().set_virtual_address_map;
    check("SetVirtualAddressMap/version", &[INVALID], f(size, step, 99, at.cast()));
    check("SetVirtualAddressMap/descriptor-size", &[INVALID], f(size, 8, 1, at.cast()));
    let old: u64;
    core::arch::asm!("mov {}, cr3", out(reg) old);
    let (from, to) = ((old & !0xfff) as *const u64, tables as *mut u64);
    to.copy_from_nonoverlapping(from, 512);
    to.add(128).write(from.read());
    core::arch::asm!("mov cr3, {}", in(reg) tables);
    // Runtime memory only, as operating systems pass it.
    let mut kept = 0;
    for i in 0..m.count() {
        let mut d = m.get(i);
        if d.attribute & efi::MEMORY_RUNTIME != 0 {
            d.virtual_start = d.physical_start + OFFSET;
            at.add(kept * step).cast::<MemoryDescriptor>().write_unaligned(d);
            kept += 1;
        }
    }
    let physical = rs() as *const efi::RuntimeServices as u64;
    let f = rs().set_virtual_address_map;
    check("SetVirtualAddressMap/good", &[OK], f(kept * step, step, 1, at.cast()));
    let st = table();
    let now = (*st).runtime_services as u64;
    holds("SetVirtualAddressMap/table-has-moved", now == physical + OFFSET);
    let code = rs().get_variable as usize as u64;
    holds("SetVirtualAddressMap/functions-have-moved", code >= OFFSET);
    equal("ConvertPointer/event-ran", 1, CONVERTED[5].load(Relaxed));
    let answer = |i: usize| Status::from_usize(CONVERTED[i].load(Relaxed) as usize);
    check("ConvertPointer/good", &[OK], answer(0));
    holds("ConvertPointer/converted", MOVED.load(Relaxed) == physical + OFFSET);
    check("ConvertPointer/pointer-is-null", &[INVALID], answer(1));
    check("ConvertPointer/optional-null", &[OK], answer(2));
    check("ConvertPointer/not-in-the-map", &[NOT_FOUND], answer(3));
    check("ConvertPointer/null", &[INVALID], answer(4));
    let f = rs().set_virtual_address_map;
    check("SetVirtualAddressMap/twice", &[UNSUPPORTED], f(kept * step, step, 1, at.cast()));
    let mut p = at.cast::<c_void>();
    check("ConvertPointer/too-late", &[UNSUPPORTED], (rs().convert_pointer)(0, &mut p));
    let (s, _, d, n) = get(lasting, &VENDOR);
    check("GetVariable/virtual", &[OK], s);
    holds("GetVariable/virtual-value", n == 6 && d[..6] == *b"longer");
    check("SetVariable/virtual", &[OK], set(lasting, &VENDOR, NV | BS | RT, b""));
    let mut t: efi::Time = zeroed();
    check("GetTime/virtual", &[OK], (rs().get_time)(&mut t, null_mut()));
}
