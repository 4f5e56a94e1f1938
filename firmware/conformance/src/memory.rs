//! Pages, pools, the memory map (UEFI 2.10, section 7.2).

use crate::env::{bogus, bs, free, pool};
use crate::report::{check, holds, s::*};
use core::ffi::c_void;
use core::ptr::null_mut;
use core::sync::atomic::{AtomicU32, Ordering};
use r_efi::efi::{self, MemoryDescriptor};

const PAGE: u64 = 4096;

/// A copy of the memory map in pool memory.
pub struct Map {
    at: *mut u8,
    room: usize,
    size: usize,
    step: usize,
    pub key: usize,
}

impl Map {
    /// Reads it.
    pub unsafe fn read() -> Self {
        let mut m = Self { at: null_mut(), room: 0, size: 0, step: 0, key: 0 };
        let mut version = 0;
        let _ = (bs().get_memory_map)(&mut m.size, null_mut(), &mut m.key, &mut m.step, &mut version);
        // The copy's own allocation may make the map longer.
        m.room = m.size + 16 * m.step.max(48);
        m.at = pool(m.room);
        m.refresh();
        m
    }
    /// Reads it again into the same memory.
    pub unsafe fn refresh(&mut self) {
        self.size = self.room;
        let mut version = 0;
        let get = bs().get_memory_map;
        if get(&mut self.size, self.at.cast(), &mut self.key, &mut self.step, &mut version) != OK {
            self.size = 0;
        }
    }
    pub fn count(&self) -> usize {
        self.size.checked_div(self.step).unwrap_or(0)
    }
    pub fn raw(&self) -> (*mut u8, usize, usize) {
        (self.at, self.size, self.step)
    }
    pub fn get(&self, i: usize) -> MemoryDescriptor {
        // SAFETY: inside the copy, whose descriptors are `step` bytes apart.
        unsafe { self.at.add(i * self.step).cast::<MemoryDescriptor>().read_unaligned() }
    }
    pub fn all(&self) -> impl Iterator<Item = MemoryDescriptor> {
        (0..self.count()).map(|i| self.get(i))
    }
    pub fn kind_of(&self, address: u64) -> Option<u32> {
        self.all().find(|d| d.physical_start <= address && address < end(d)).map(|d| d.r#type)
    }
    pub unsafe fn free(self) {
        free(self.at);
    }
}

fn end(d: &MemoryDescriptor) -> u64 {
    d.physical_start + d.number_of_pages * PAGE
}

static CHANGES: AtomicU32 = AtomicU32::new(0);
unsafe extern "efiapi" fn changed(_: efi::Event, _: *mut c_void) {
    CHANGES.fetch_add(1, Ordering::Relaxed);
}

/// `EFI_EVENT_GROUP_MEMORY_MAP_CHANGE`: told of allocations and frees.
unsafe fn changes() {
    let mut event = null_mut();
    let group = efi::EVENT_GROUP_MEMORY_MAP_CHANGE;
    let _ = (bs().create_event_ex)(0x200, 8, Some(changed), null_mut(), &group, &mut event);
    let mut at = 0;
    let _ = (bs().allocate_pages)(efi::ALLOCATE_ANY_PAGES, efi::LOADER_DATA, 7, &mut at);
    let allocated = CHANGES.load(Ordering::Relaxed);
    holds("AllocatePages/map-change-is-told", allocated > 0);
    let _ = (bs().free_pages)(at, 7);
    holds("FreePages/map-change-is-told", CHANGES.load(Ordering::Relaxed) > allocated);
    let _ = (bs().close_event)(event);
}

pub unsafe fn run() {
    map();
    changes();
    pages();
    free_pages();
    pools();
}

unsafe fn map() {
    let (mut size, mut key, mut step, mut version) = (0, 0, 0, 0);
    let get = bs().get_memory_map;
    check("GetMemoryMap/null-size", &[INVALID], get(null_mut(), null_mut(), &mut key, &mut step, &mut version));
    check("GetMemoryMap/too-small", &[SMALL], get(&mut size, null_mut(), &mut key, &mut step, &mut version));
    holds("GetMemoryMap/size-told", size >= 40 && step >= 40 && size % step == 0);
    holds("GetMemoryMap/version", version == 1);
    let mut large = 1 << 20;
    check("GetMemoryMap/null-buffer", &[INVALID], get(&mut large, null_mut(), &mut key, &mut step, &mut version));

    let m = Map::read();
    holds("GetMemoryMap/read", m.count() > 0);
    holds("MemoryMap/aligned", m.all().all(|d| d.physical_start % PAGE == 0 && d.number_of_pages > 0));
    holds("MemoryMap/no-overflow", m.all().all(|d| d.number_of_pages < 1 << 52 && end(&d) > d.physical_start));
    let overlap = |i: usize, j: usize| {
        let (a, b) = (m.get(i), m.get(j));
        a.physical_start < end(&b) && b.physical_start < end(&a)
    };
    let n = m.count();
    holds("MemoryMap/no-overlap", !(0..n).any(|i| (0..i).any(|j| overlap(i, j))));
    holds("MemoryMap/known-types", m.all().all(|d| d.r#type <= 15 || d.r#type >= 0x7000_0000));
    let runtime = |d: &MemoryDescriptor| d.attribute & efi::MEMORY_RUNTIME != 0;
    let services = [efi::RUNTIME_SERVICES_CODE, efi::RUNTIME_SERVICES_DATA];
    holds("MemoryMap/runtime-types-marked", m.all().all(|d| !services.contains(&d.r#type) || runtime(&d)));
    let may = |k: u32| services.contains(&k) || matches!(k, 0 | 9 | 10 | 11 | 12 | 13);
    holds("MemoryMap/only-those-marked", m.all().all(|d| !runtime(&d) || may(d.r#type)));
    let memory = |k: u32| matches!(k, 1..=7);
    holds("MemoryMap/memory-is-cacheable", m.all().all(|d| !memory(d.r#type) || d.attribute & efi::MEMORY_WB != 0));
    let code = run as *const () as u64;
    holds("MemoryMap/own-code-is-loader-code", m.kind_of(code) == Some(efi::LOADER_CODE));
    let table = crate::env::rs() as *const _ as u64;
    let place = m.kind_of(table);
    holds("MemoryMap/runtime-table-is-runtime-memory", place.is_some_and(|k| services.contains(&k)));
    let key = m.key;
    m.free();
    let mut at = 0;
    let _ = (bs().allocate_pages)(efi::ALLOCATE_ANY_PAGES, efi::LOADER_DATA, 1, &mut at);
    let after = Map::read();
    holds("MemoryMap/key-changes", after.key != key);
    after.free();
    let _ = (bs().free_pages)(at, 1);
}

unsafe fn pages() {
    let allocate = bs().allocate_pages;
    let any = efi::ALLOCATE_ANY_PAGES;
    let mut at = 0;
    check("AllocatePages/any", &[OK], allocate(any, efi::LOADER_DATA, 3, &mut at));
    holds("AllocatePages/aligned", at % PAGE == 0 && at != 0);
    let m = Map::read();
    holds("AllocatePages/type-in-map", (0..3).all(|i| m.kind_of(at + i * PAGE) == Some(efi::LOADER_DATA)));
    m.free();
    (at as *mut u8).write_bytes(0x5a, 3 * PAGE as usize);
    // The same place once more: it is taken, then free, then can be had by its address.
    let mut same = at;
    check("AllocatePages/address-taken", &[NOT_FOUND], allocate(efi::ALLOCATE_ADDRESS, efi::LOADER_DATA, 3, &mut same));
    check("FreePages/good", &[OK], (bs().free_pages)(at, 3));
    let mut same = at;
    check("AllocatePages/address-free", &[OK], allocate(efi::ALLOCATE_ADDRESS, efi::BOOT_SERVICES_DATA, 3, &mut same));
    holds("AllocatePages/address-kept", same == at);
    let m = Map::read();
    holds("AllocatePages/boot-data-in-map", m.kind_of(at) == Some(efi::BOOT_SERVICES_DATA));
    m.free();
    let _ = (bs().free_pages)(at, 3);

    let mut low = 0x100_0000 - 1;
    check("AllocatePages/below", &[OK], allocate(efi::ALLOCATE_MAX_ADDRESS, efi::LOADER_DATA, 2, &mut low));
    holds("AllocatePages/below-its-limit", low + 2 * PAGE <= 0x100_0000);
    let _ = (bs().free_pages)(low, 2);
    let mut nowhere = PAGE - 1;
    let got = allocate(efi::ALLOCATE_MAX_ADDRESS, efi::LOADER_DATA, 4, &mut nowhere);
    check("AllocatePages/below-impossible", &[RESOURCES, NOT_FOUND], got);
    let mut beyond = 0x000f_ffff_ffff_f000;
    let got = allocate(efi::ALLOCATE_ADDRESS, efi::LOADER_DATA, 1, &mut beyond);
    check("AllocatePages/no-memory-there", &[NOT_FOUND], got);
    let mut p = 0;
    check("AllocatePages/too-many", &[RESOURCES], allocate(any, efi::LOADER_DATA, 1 << 40, &mut p));
    check("AllocatePages/null-address", &[INVALID], allocate(any, efi::LOADER_DATA, 1, null_mut()));
    check("AllocatePages/how-is-unknown", &[INVALID], allocate(3, efi::LOADER_DATA, 1, &mut p));
    for (name, kind) in [
        ("AllocatePages/type-max", 16),
        ("AllocatePages/type-reserved", 0x6fff_ffff),
        ("AllocatePages/type-persistent", efi::PERSISTENT_MEMORY),
        ("AllocatePages/type-unaccepted", 15),
    ] {
        check(name, &[INVALID], allocate(any, kind, 1, &mut p));
    }
    for (name, kind) in [
        ("AllocatePages/type-oem", 0x7000_0001),
        ("AllocatePages/type-os", 0x8000_0001),
        ("AllocatePages/type-acpi", efi::ACPI_RECLAIM_MEMORY),
        ("AllocatePages/type-nvs", efi::ACPI_MEMORY_NVS),
        ("AllocatePages/type-runtime", efi::RUNTIME_SERVICES_DATA),
        ("AllocatePages/type-reserved-memory", efi::RESERVED_MEMORY_TYPE),
    ] {
        check(name, &[OK], allocate(any, kind, 1, &mut p));
        let _ = (bs().free_pages)(p, 1);
    }
}

unsafe fn free_pages() {
    let mut at = 0;
    let _ = (bs().allocate_pages)(efi::ALLOCATE_ANY_PAGES, efi::LOADER_DATA, 4, &mut at);
    check("FreePages/unaligned", &[INVALID], (bs().free_pages)(at + 8, 1));
    check("FreePages/none", &[INVALID, NOT_FOUND], (bs().free_pages)(at, 0));
    check("FreePages/middle", &[OK], (bs().free_pages)(at + PAGE, 1));
    check("FreePages/twice", &[NOT_FOUND], (bs().free_pages)(at + PAGE, 1));
    check("FreePages/first", &[OK], (bs().free_pages)(at, 1));
    check("FreePages/with-hole", &[NOT_FOUND], (bs().free_pages)(at + PAGE, 3));
    check("FreePages/last-two", &[OK], (bs().free_pages)(at + 2 * PAGE, 2));
    check("FreePages/no-memory", &[NOT_FOUND], (bs().free_pages)(0x000f_ffff_ffff_f000, 1));
}

unsafe fn pools() {
    let mut p: *mut c_void = null_mut();
    let allocate = bs().allocate_pool;
    check("AllocatePool/good", &[OK], allocate(efi::LOADER_DATA, 100, &mut p));
    holds("AllocatePool/aligned", p as usize % 8 == 0 && !p.is_null());
    p.cast::<u8>().write_bytes(0xa5, 100);
    let m = Map::read();
    holds("AllocatePool/type-in-map", m.kind_of(p as u64) == Some(efi::LOADER_DATA));
    m.free();
    check("FreePool/good", &[OK], (bs().free_pool)(p));
    check("AllocatePool/null", &[INVALID], allocate(efi::LOADER_DATA, 100, null_mut()));
    for (name, kind) in [
        ("AllocatePool/type-max", 16),
        ("AllocatePool/type-reserved", 0x6fff_ffff),
        ("AllocatePool/type-persistent", efi::PERSISTENT_MEMORY),
    ] {
        check(name, &[INVALID], allocate(kind, 16, &mut p));
    }
    check("AllocatePool/too-much", &[RESOURCES], allocate(efi::LOADER_DATA, 1 << 50, &mut p));
    check("AllocatePool/all-ones", &[RESOURCES], allocate(efi::LOADER_DATA, usize::MAX, &mut p));
    check("FreePool/null", &[INVALID], (bs().free_pool)(null_mut()));
    check("FreePool/not-pool", &[INVALID], (bs().free_pool)(bogus().cast::<u8>().add(64).cast()));
    check("AllocatePool/large", &[OK], allocate(efi::BOOT_SERVICES_DATA, 3 << 20, &mut p));
    p.cast::<u8>().write_bytes(1, 3 << 20);
    check("FreePool/large", &[OK], (bs().free_pool)(p));
}
