//! The memory map: pages, their types, and GetMemoryMap (UEFI 2.10, section 7.2).
//!
//! The map is a sorted array of regions in the firmware's own data, so that it needs no memory to manage memory.

use crate::cell::Global;
use crate::config;
use r_efi::efi::{self, MemoryDescriptor, Status};

pub const PAGE: u64 = 4096;
const MAX_REGIONS: usize = 1024;
/// Attributes of memory: cacheable in every way.
const CACHEABLE: u64 = efi::MEMORY_UC | efi::MEMORY_WC | efi::MEMORY_WT | efi::MEMORY_WB;

/// A region of one type.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Region {
    pub start: u64,
    pub pages: u64,
    pub kind: u32,
    pub attributes: u64,
}

impl Region {
    fn end(&self) -> u64 {
        self.start + self.pages * PAGE
    }
}

pub struct Map {
    regions: [Region; MAX_REGIONS],
    count: usize,
    key: usize,
}

static MAP: Global<Map> = Global::new(Map {
    regions: [Region { start: 0, pages: 0, kind: 0, attributes: 0 }; MAX_REGIONS],
    count: 0,
    key: 1,
});

impl Map {
    fn all(&self) -> &[Region] {
        &self.regions[..self.count]
    }

    fn insert(&mut self, at: usize, region: Region) -> Result<(), Status> {
        if self.count == MAX_REGIONS {
            return Err(Status::OUT_OF_RESOURCES);
        }
        self.regions.copy_within(at..self.count, at + 1);
        self.regions[at] = region;
        self.count += 1;
        Ok(())
    }

    /// Adds a region that overlaps none.
    fn add(&mut self, region: Region) {
        if region.pages != 0 {
            let at = self.all().partition_point(|r| r.start < region.start);
            let _ = self.insert(at, region);
        }
    }

    /// Joins neighbours of the same kind.
    fn merge(&mut self) {
        let mut kept = 0;
        for i in 1..self.count {
            let (a, b) = (self.regions[kept], self.regions[i]);
            if a.end() == b.start && a.kind == b.kind && a.attributes == b.attributes {
                self.regions[kept].pages += b.pages;
            } else {
                kept += 1;
                self.regions[kept] = b;
            }
        }
        self.count = if self.count == 0 { 0 } else { kept + 1 };
    }

    /// Changes the type of a range whose pages all have a type that `from` accepts.
    fn convert(&mut self, start: u64, pages: u64, kind: u32, from: impl Fn(u32) -> bool) -> Result<(), Status> {
        let end = pages.checked_mul(PAGE).and_then(|n| start.checked_add(n)).ok_or(Status::INVALID_PARAMETER)?;
        let mut at = start;
        for r in self.all() {
            if at < end && r.start <= at && at < r.end() {
                if !from(r.kind) {
                    return Err(Status::NOT_FOUND);
                }
                at = r.end();
            }
        }
        if at < end {
            return Err(Status::NOT_FOUND);
        }
        if self.count + 2 > MAX_REGIONS {
            return Err(Status::OUT_OF_RESOURCES);
        }
        // Cut at both ends, then change what lies between.
        for cut in [start, end] {
            if let Some(i) = self.all().iter().position(|r| r.start < cut && cut < r.end()) {
                let r = self.regions[i];
                self.regions[i].pages = (cut - r.start) / PAGE;
                self.insert(i + 1, Region { start: cut, pages: (r.end() - cut) / PAGE, ..r })?;
            }
        }
        for r in self.regions[..self.count].iter_mut().filter(|r| r.start >= start && r.start < end) {
            r.kind = kind;
            r.attributes = attributes_of(kind);
        }
        self.merge();
        self.key += 1;
        Ok(())
    }
}

fn attributes_of(kind: u32) -> u64 {
    match kind {
        efi::RUNTIME_SERVICES_CODE | efi::RUNTIME_SERVICES_DATA => CACHEABLE | efi::MEMORY_RUNTIME,
        efi::MEMORY_MAPPED_IO | efi::MEMORY_MAPPED_IO_PORT_SPACE => efi::MEMORY_UC | efi::MEMORY_RUNTIME,
        _ => CACHEABLE,
    }
}

/// Builds the map from the blob, and page tables that map all of it.
pub fn init() {
    crate::bios::init();
    let [start, _, _, end] = crate::entry::image();
    let mut top = 1u64 << 32;
    MAP.with(|map| {
        for (start, len, flags) in config::memory_ranges() {
            top = top.max(start + len);
            let kind = if flags & 1 != 0 { efi::RESERVED_MEMORY_TYPE } else { efi::CONVENTIONAL_MEMORY };
            map.add(Region { start, pages: len / PAGE, kind, attributes: attributes_of(kind) });
        }
        let conventional = |k| k == efi::CONVENTIONAL_MEMORY;
        // The first page stays unused: a null pointer is no address.
        let _ = map.convert(0, 1, efi::BOOT_SERVICES_DATA, conventional);
        let _ = map.convert(start, (end - start) / PAGE, efi::RUNTIME_SERVICES_CODE, conventional);
        let _ = map.convert(config::BLOB, config::blob_pages(), efi::BOOT_SERVICES_DATA, conventional);
        // The page tables that the host made.
        let _ = map.convert(0x70_0000, 9, efi::BOOT_SERVICES_DATA, conventional);
    });
    crate::paging::init(top);
}

/// Where pages may go.
#[derive(Clone, Copy)]
pub enum Placement {
    Any,
    /// The last byte is at or below this address.
    Below(u64),
    At(u64),
}

/// Types that a caller may allocate.
fn allocatable(kind: u32) -> bool {
    // Below the types of the specification; then those of OEMs (0x7000_0000) and operating systems (0x8000_0000).
    matches!(kind, 0..=6 | 8..=13) || kind >= 0x7000_0000
}

/// AllocatePages.
pub fn allocate(placement: Placement, kind: u32, pages: u64) -> Result<u64, Status> {
    if !allocatable(kind) {
        return Err(Status::INVALID_PARAMETER);
    }
    if pages == 0 {
        return Err(Status::NOT_FOUND);
    }
    MAP.with(|map| {
        let bytes = pages.checked_mul(PAGE).ok_or(Status::OUT_OF_RESOURCES)?;
        let limit = match placement {
            Placement::At(start) => {
                if start % PAGE != 0 {
                    return Err(Status::NOT_FOUND);
                }
                map.convert(start, pages, kind, |k| k == efi::CONVENTIONAL_MEMORY)?;
                return Ok(start);
            }
            Placement::Below(last) => last.saturating_add(1) & !(PAGE - 1),
            Placement::Any => !(PAGE - 1),
        };
        // From the top down, so that low memory stays for those who need it; but first below 4 GiB, where every
        // loader can reach.
        let find = |limit: u64| {
            map.all().iter().rev().filter(|r| r.kind == efi::CONVENTIONAL_MEMORY).find_map(|r| {
                let end = r.end().min(limit);
                let start = end.checked_sub(bytes)?;
                (start >= r.start).then_some(start)
            })
        };
        let start = find(limit.min(1 << 32)).or_else(|| find(limit)).ok_or(Status::OUT_OF_RESOURCES)?;
        map.convert(start, pages, kind, |k| k == efi::CONVENTIONAL_MEMORY)?;
        Ok(start)
    })
}

/// FreePages.
pub fn free(start: u64, pages: u64) -> Result<(), Status> {
    if start % PAGE != 0 || pages == 0 {
        return Err(Status::INVALID_PARAMETER);
    }
    MAP.with(|map| {
        map.convert(start, pages, efi::CONVENTIONAL_MEMORY, |k| allocatable(k) && k != efi::CONVENTIONAL_MEMORY)
    })?;
    // Whoever gets the pages next must find them as memory is.
    crate::paging::unprotect(start, pages);
    Ok(())
}

/// Bytes of a descriptor as GetMemoryMap returns it: more than the structure, so that nobody relies on its size.
pub const DESCRIPTOR_SIZE: usize = 48;

/// GetMemoryMap: number of descriptors and the key.
pub fn summary() -> (usize, usize) {
    MAP.with(|map| (map.count, map.key))
}

/// Calls `f` with each descriptor.
pub fn descriptors(mut f: impl FnMut(MemoryDescriptor)) {
    MAP.with(|map| {
        for r in map.all() {
            f(MemoryDescriptor {
                r#type: r.kind,
                physical_start: r.start,
                virtual_start: 0,
                number_of_pages: r.pages,
                attribute: r.attributes,
            });
        }
    });
}

/// Type of the region that holds an address.
pub fn kind_at(address: u64) -> Option<u32> {
    MAP.with(|map| map.all().iter().find(|r| r.start <= address && address < r.end()).map(|r| r.kind))
}
