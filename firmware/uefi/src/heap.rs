//! Pools: AllocatePool and FreePool, one arena for each memory type, and the allocator of the firmware's own Rust code.
//!
//! An arena takes pages of its type from the memory map when it needs them. Large pool allocations are pages of their own.

use crate::cell::Global;
use crate::memory::{self, PAGE, Placement};
use core::alloc::{GlobalAlloc, Layout};
use core::ptr::NonNull;
use r_efi::efi::{self, Status};
use talc::{ErrOnOom, Span, Talc};

/// Pages that an arena takes at a time.
const CHUNK_PAGES: u64 = 64;
/// From this size on an allocation has pages of its own.
const LARGE: usize = 64 << 10;
/// What stands before every pool allocation.
#[repr(C)]
struct Header {
    magic: u64,
    kind: u32,
    _pad: u32,
    size: usize,
    _pad2: u64,
}
const MAGIC: u64 = 0x4c4f_4f50_4446_4556;
const HEADER: usize = size_of::<Header>();
/// Arenas for the types 0 to 13, and one each for types of OEMs and operating systems.
const ARENAS: usize = 16;

struct Arena {
    talc: Talc<ErrOnOom>,
}

// SAFETY: an arena's memory belongs to it alone; `Global` gives it to one user at a time.
unsafe impl Send for Arena {}

static ARENA: [Global<Arena>; ARENAS] = [const { Global::new(Arena { talc: Talc::new(ErrOnOom) }) }; ARENAS];

fn arena_of(kind: u32) -> Option<&'static Global<Arena>> {
    match kind {
        0..=13 => ARENA.get(kind as usize),
        0x7000_0000..=0x7fff_ffff => Some(&ARENA[14]),
        0x8000_0000.. => Some(&ARENA[15]),
        _ => None,
    }
}

fn arena_allocate(kind: u32, layout: Layout) -> Option<NonNull<u8>> {
    let arena = arena_of(kind)?;
    for _ in 0..2 {
        // SAFETY: a layout of non-zero size; the arena is borrowed alone.
        let got = arena.with(|a| unsafe { a.talc.malloc(layout) });
        if let Ok(p) = got {
            return Some(p);
        }
        let pages = CHUNK_PAGES.max((layout.size() as u64 + layout.align() as u64).div_ceil(PAGE) + 1);
        let start = match memory::allocate(Placement::Any, kind, pages) {
            Ok(s) => s,
            Err(e) => {
                crate::log!("no {pages} pages of type {kind}: {:#x}, {:?}", e.as_usize(), memory::summary());
                return None;
            }
        };
        let span = Span::from_base_size(start as *mut u8, (pages * PAGE) as usize);
        // SAFETY: fresh pages that nobody else knows, handed to the arena for good.
        let claimed = arena.with(|a| unsafe { a.talc.claim(span) });
        if claimed.is_err() {
            crate::log!("arena {kind} cannot take {start:#x}, {pages} pages");
        }
        claimed.ok()?;
    }
    None
}

/// AllocatePool. The memory is 16-byte aligned.
pub fn allocate_pool(kind: u32, size: usize) -> Result<*mut u8, Status> {
    if matches!(kind, efi::CONVENTIONAL_MEMORY | efi::PERSISTENT_MEMORY) || arena_of(kind).is_none() {
        return Err(Status::INVALID_PARAMETER);
    }
    let total = size.checked_add(HEADER).ok_or(Status::OUT_OF_RESOURCES)?;
    let at = if total >= LARGE {
        memory::allocate(Placement::Any, kind, (total as u64).div_ceil(PAGE))? as *mut u8
    } else {
        let layout = Layout::from_size_align(total, 16).map_err(|_| Status::OUT_OF_RESOURCES)?;
        arena_allocate(kind, layout).ok_or(Status::OUT_OF_RESOURCES)?.as_ptr()
    };
    // SAFETY: `at` is the start of at least HEADER bytes that were just allocated, aligned to 16.
    unsafe {
        at.cast::<Header>().write(Header { magic: MAGIC, kind, _pad: 0, size: total, _pad2: 0 });
        Ok(at.add(HEADER))
    }
}

/// FreePool.
pub fn free_pool(pointer: *mut u8) -> Result<(), Status> {
    let at = pointer.wrapping_sub(HEADER);
    if pointer.is_null() || pointer as usize % 16 != 0 || memory::kind_at(at as u64).is_none() {
        return Err(Status::INVALID_PARAMETER);
    }
    // SAFETY: the address is inside the memory map; a header that is not ours is told by its magic.
    let header = unsafe { &mut *at.cast::<Header>() };
    let arena = arena_of(header.kind).filter(|_| header.magic == MAGIC).ok_or(Status::INVALID_PARAMETER)?;
    header.magic = 0;
    let size = header.size;
    if size >= LARGE {
        return memory::free(at as u64, (size as u64).div_ceil(PAGE));
    }
    let layout = Layout::from_size_align(size, 16).map_err(|_| Status::INVALID_PARAMETER)?;
    let Some(p) = NonNull::new(at) else { return Err(Status::INVALID_PARAMETER) };
    // SAFETY: the header says that this arena gave the memory out with this layout, and it is freed once (magic).
    arena.with(|a| unsafe { a.talc.free(p, layout) });
    Ok(())
}

/// The firmware's own allocations are boot services data.
struct Firmware;

#[global_allocator]
static ALLOCATOR: Firmware = Firmware;

// SAFETY: memory comes from the arena or from whole pages, has the layout asked for, and stays until it is freed.
unsafe impl GlobalAlloc for Firmware {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if layout.size() >= LARGE {
            let pages = (layout.size() as u64).div_ceil(PAGE);
            return memory::allocate(Placement::Any, efi::BOOT_SERVICES_DATA, pages).unwrap_or(0) as *mut u8;
        }
        arena_allocate(efi::BOOT_SERVICES_DATA, layout).map_or(core::ptr::null_mut(), NonNull::as_ptr)
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        if layout.size() >= LARGE {
            let _ = memory::free(at as u64, (layout.size() as u64).div_ceil(PAGE));
        } else if let Some(p) = NonNull::new(at) {
            // SAFETY: the caller's promise: `at` came from `alloc` with this layout.
            ARENA[efi::BOOT_SERVICES_DATA as usize].with(|a| unsafe { a.talc.free(p, layout) });
        }
    }
}
