//! The host's BiosDevice (see `crates/bios/src/device.rs`).

use crate::arch;
use crate::cell::Global;
use core::fmt::{self, Write};
use r_efi::efi::Status;
use uefi_core::guid::Guid;

const ADDRESS: u16 = 0x28;
const DATA: u16 = 0x2c;

/// Selectors.
pub mod selector {
    pub const GENERATION_ID_LOW: u32 = 0x0e;
    pub const GENERATION_ID_HIGH: u32 = 0x0f;
    pub const BOOT_FINALIZE: u32 = 0x1a;
    pub const NVRAM: u32 = 0x24;
    pub const CRYPTO: u32 = 0x26;
    pub const WATCHDOG_CONFIG: u32 = 0x27;
    pub const WATCHDOG_COUNT: u32 = 0x29;
    pub const DEBUG_OUTPUT: u32 = 0x36;
}

pub fn write(selector: u32, value: u32) {
    arch::out32(ADDRESS, selector);
    arch::out32(DATA, value);
}

/// A line for the host's log of this VM.
pub fn log_line(args: fmt::Arguments<'_>) {
    struct Port;
    impl Write for Port {
        fn write_str(&mut self, s: &str) -> fmt::Result {
            for four in s.as_bytes().chunks(4) {
                let mut word = [0; 4];
                word[..four.len()].copy_from_slice(four);
                arch::out32(DATA, u32::from_le_bytes(word));
            }
            Ok(())
        }
    }
    let on = arch::interrupts_off();
    arch::out32(ADDRESS, selector::DEBUG_OUTPUT);
    let _ = Port.write_fmt(args);
    let _ = Port.write_str("\n");
    arch::interrupts_restore(on);
}

/// Logs a line through the host.
#[macro_export]
macro_rules! log {
    ($($arg:tt)*) => { $crate::bios::log_line(format_args!($($arg)*)) };
}

/// Commands of the NVRAM descriptor.
#[derive(Clone, Copy)]
#[repr(u32)]
pub enum Nvram {
    Get = 0,
    Set = 1,
    First = 2,
    Next = 3,
    Query = 4,
    SignalRuntime = 5,
}

const NAME_BYTES: usize = 2048;
const DATA_BYTES: usize = 128 << 10;

/// The page that the host reads and writes: descriptor, name, data. It is part of the firmware's image, so that runtime
/// services can use it; the host is told its physical address, which does not change.
#[repr(C, align(4096))]
pub struct Exchange {
    descriptor: [u8; 64],
    name: [u8; NAME_BYTES],
    data: [u8; DATA_BYTES],
}

static EXCHANGE: Global<Exchange> =
    Global::new(Exchange { descriptor: [0; 64], name: [0; NAME_BYTES], data: [0; DATA_BYTES] });
/// Physical address of [`EXCHANGE`], fixed before virtual addresses come.
static PHYSICAL: Global<u64> = Global::new(0);

/// Remembers where the exchange page is, while addresses are physical.
pub fn init() {
    // The compiler must not see that this is EXCHANGE's address: it would keep a mere flag and compute the address anew,
    // which after SetVirtualAddressMap is a virtual one.
    let at = core::hint::black_box(EXCHANGE.with(|e| e as *mut Exchange as u64));
    PHYSICAL.with(|p| *p = at);
}

/// A variable command. `name` has no terminator. `use_result` gets the name (for Next) or data (for Get) as the host
/// left it, the attributes, and the length in bytes.
pub struct Reply<'a> {
    pub attributes: u32,
    pub vendor: Guid,
    /// Bytes that the host says there are (data for Get, name with terminator for First and Next).
    pub len: usize,
    pub bytes: &'a [u8],
    /// The three results of Query.
    pub query: [u64; 3],
}

/// Calls the host.
pub fn nvram<R>(
    command: Nvram,
    name: &[u16],
    vendor: &Guid,
    attributes: u32,
    data: &[u8],
    f: impl FnOnce(Reply<'_>) -> R,
) -> Result<R, Status> {
    let base = PHYSICAL.with(|p| *p);
    if (name.len() + 1) * 2 > NAME_BYTES {
        return Err(Status::INVALID_PARAMETER);
    }
    if data.len() > DATA_BYTES {
        // Larger than any variable may be.
        return Err(Status::INVALID_PARAMETER);
    }
    EXCHANGE.with(|e| {
        for (to, unit) in e.name.chunks_exact_mut(2).zip(name.iter().chain(&[0])) {
            to.copy_from_slice(&unit.to_le_bytes());
        }
        e.data[..data.len()].copy_from_slice(data);
        let next = matches!(command, Nvram::First | Nvram::Next);
        let name_len = if next { NAME_BYTES } else { (name.len() + 1) * 2 };
        let data_len = if matches!(command, Nvram::Set) { data.len() } else { DATA_BYTES };
        let d = &mut e.descriptor;
        d[..4].copy_from_slice(&(command as u32).to_le_bytes());
        d[4..12].copy_from_slice(&u64::MAX.to_le_bytes());
        d[12..16].copy_from_slice(&attributes.to_le_bytes());
        d[16..24].copy_from_slice(&(base + 64).to_le_bytes());
        d[24..28].copy_from_slice(&(name_len as u32).to_le_bytes());
        d[28..44].copy_from_slice(&vendor.0);
        d[44..52].copy_from_slice(&(base + 64 + NAME_BYTES as u64).to_le_bytes());
        d[52..56].copy_from_slice(&(data_len as u32).to_le_bytes());
        core::sync::atomic::fence(core::sync::atomic::Ordering::SeqCst);
        write(selector::NVRAM, base as u32);
        // The host wrote behind the compiler's back.
        // SAFETY: a plain copy of bytes that belong to this exclusive borrow.
        let d: [u8; 64] = unsafe { (&raw const e.descriptor).read_volatile() };
        let u32_of = |at: usize| u32::from_le_bytes([d[at], d[at + 1], d[at + 2], d[at + 3]]);
        let u64_of = |at: usize| u64::from(u32_of(at)) | u64::from(u32_of(at + 4)) << 32;
        let status = Status::from_usize(u64_of(4) as usize);
        if status.is_error() {
            return Err(status);
        }
        let len = if next { u32_of(24) } else { u32_of(52) } as usize;
        let from = if next { &e.name[..] } else { &e.data[..] };
        let mut vendor = Guid::default();
        vendor.0.copy_from_slice(&d[28..44]);
        let bytes = core::hint::black_box(&from[..len.min(from.len())]);
        Ok(f(Reply { attributes: u32_of(12), vendor, len, bytes, query: [u64_of(16), u64_of(24), u64_of(32)] }))
    })
}

/// Fills `out` with random numbers from the host.
pub fn random(out: &mut [u8]) -> bool {
    let base = PHYSICAL.with(|p| *p);
    out.chunks_mut(4096).all(|chunk| {
        EXCHANGE.with(|e| {
            let d = &mut e.descriptor;
            d[..4].copy_from_slice(&5u32.to_le_bytes());
            d[4..12].copy_from_slice(&u64::MAX.to_le_bytes());
            d[12..20].copy_from_slice(&(base + 64 + NAME_BYTES as u64).to_le_bytes());
            d[20..24].copy_from_slice(&(chunk.len() as u32).to_le_bytes());
            core::sync::atomic::fence(core::sync::atomic::Ordering::SeqCst);
            write(selector::CRYPTO, base as u32);
            // SAFETY: a plain copy of bytes that belong to this exclusive borrow; the host has written them.
            let d: [u8; 64] = unsafe { (&raw const e.descriptor).read_volatile() };
            chunk.copy_from_slice(core::hint::black_box(&e.data[..chunk.len()]));
            d[4..12] == [0; 8]
        })
    })
}

/// Tells the host that Secure Boot refused an image (`SECUREBOOT_EVENT_INFO`).
pub fn secure_boot_event(event: u32) {
    let base = PHYSICAL.with(|p| *p);
    EXCHANGE.with(|e| {
        e.descriptor[..4].copy_from_slice(&4u32.to_le_bytes());
        e.descriptor[12..16].copy_from_slice(&event.to_le_bytes());
        core::sync::atomic::fence(core::sync::atomic::Ordering::SeqCst);
        core::hint::black_box(&e.descriptor);
        write(selector::CRYPTO, base as u32);
    });
}
