//! The transcript: one line a check on COM1, in a form that xtask reads.
//!
//! `CHECK name expects=A,B got=C`: the names of the status codes that the specification allows, and the one that came. A
//! condition expects `true`. `SKIP name reason` stands where a firmware has not what is to be checked and need not have it.
//! The last line is `CONFORMANCE-END n`.
//!
//! Lines go to the port directly: they must come after ExitBootServices too, and no console may break them. Nothing here uses
//! `core::fmt`: its prebuilt code may use the red zone below the stack, which a firmware's interrupts overwrite.

use core::arch::asm;
use core::sync::atomic::{AtomicU32, Ordering};
use r_efi::efi::Status;

/// Short names of the codes that checks expect.
pub mod s {
    use r_efi::efi::Status;
    pub const OK: Status = Status::SUCCESS;
    pub const LOAD: Status = Status::LOAD_ERROR;
    pub const INVALID: Status = Status::INVALID_PARAMETER;
    pub const UNSUPPORTED: Status = Status::UNSUPPORTED;
    pub const BAD_SIZE: Status = Status::BAD_BUFFER_SIZE;
    pub const SMALL: Status = Status::BUFFER_TOO_SMALL;
    pub const NOT_READY: Status = Status::NOT_READY;
    pub const DEVICE: Status = Status::DEVICE_ERROR;
    pub const PROTECTED: Status = Status::WRITE_PROTECTED;
    pub const RESOURCES: Status = Status::OUT_OF_RESOURCES;
    pub const CHANGED: Status = Status::MEDIA_CHANGED;
    pub const NOT_FOUND: Status = Status::NOT_FOUND;
    pub const DENIED: Status = Status::ACCESS_DENIED;
    pub const NO_MAPPING: Status = Status::NO_MAPPING;
    pub const TIMEOUT: Status = Status::TIMEOUT;
    pub const STARTED: Status = Status::ALREADY_STARTED;
    pub const ABORTED: Status = Status::ABORTED;
    pub const SECURITY: Status = Status::SECURITY_VIOLATION;
}

static COUNT: AtomicU32 = AtomicU32::new(0);

const COM1: u16 = 0x3f8;

fn out(port: u16, value: u8) {
    // SAFETY: the serial port's registers have no effect on memory.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nostack, preserves_flags)) }
}
fn inp(port: u16) -> u8 {
    let value;
    // SAFETY: as `out`.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nostack, preserves_flags)) }
    value
}

/// Sends text as it is.
pub fn text(t: &str) {
    for b in t.bytes() {
        for _ in 0..1_000_000 {
            if inp(COM1 + 5) & 0x20 != 0 {
                break;
            }
        }
        out(COM1, b);
    }
}

/// Sends a number in base 16.
pub fn hex(n: u64) {
    text("0x");
    let digits = (64 - (n | 1).leading_zeros()).div_ceil(4);
    for i in (0..digits).rev() {
        let d = (n >> (i * 4) & 15) as usize;
        text(&"0123456789abcdef"[d..=d]);
    }
}

fn decimal(n: u32) {
    if n >= 10 {
        decimal(n / 10);
    }
    let d = (n % 10) as usize;
    text(&"0123456789"[d..=d]);
}

fn status(s: Status) {
    const NAMES: [&str; 36] = [
        "SUCCESS",
        "LOAD_ERROR",
        "INVALID_PARAMETER",
        "UNSUPPORTED",
        "BAD_BUFFER_SIZE",
        "BUFFER_TOO_SMALL",
        "NOT_READY",
        "DEVICE_ERROR",
        "WRITE_PROTECTED",
        "OUT_OF_RESOURCES",
        "VOLUME_CORRUPTED",
        "VOLUME_FULL",
        "NO_MEDIA",
        "MEDIA_CHANGED",
        "NOT_FOUND",
        "ACCESS_DENIED",
        "NO_RESPONSE",
        "NO_MAPPING",
        "TIMEOUT",
        "NOT_STARTED",
        "ALREADY_STARTED",
        "ABORTED",
        "ICMP_ERROR",
        "TFTP_ERROR",
        "PROTOCOL_ERROR",
        "INCOMPATIBLE_VERSION",
        "SECURITY_VIOLATION",
        "CRC_ERROR",
        "END_OF_MEDIA",
        "?",
        "?",
        "END_OF_FILE",
        "INVALID_LANGUAGE",
        "COMPROMISED_DATA",
        "IP_ADDRESS_CONFLICT",
        "HTTP_ERROR",
    ];
    const WARNINGS: [&str; 8] = [
        "SUCCESS",
        "WARN_UNKNOWN_GLYPH",
        "WARN_DELETE_FAILURE",
        "WARN_WRITE_FAILURE",
        "WARN_BUFFER_TOO_SMALL",
        "WARN_STALE_DATA",
        "WARN_FILE_SYSTEM",
        "WARN_RESET_REQUIRED",
    ];
    let n = s.as_usize();
    let names: &[&str] = if s.is_error() { &NAMES } else { &WARNINGS };
    match names.get(n & !(1 << 63)) {
        Some(name) => text(name),
        None => hex(n as u64),
    }
}

/// A service's answer.
pub fn check(name: &str, expected: &[Status], got: Status) {
    begin(name);
    for (i, e) in expected.iter().enumerate() {
        if i > 0 {
            text(",");
        }
        status(*e);
    }
    text(" got=");
    status(got);
    end();
}

/// A condition that must hold.
pub fn holds(name: &str, is: bool) {
    begin(name);
    text(if is { "true got=true" } else { "true got=false" });
    end();
}

/// A number that must be this.
pub fn equal(name: &str, expected: u64, got: u64) {
    begin(name);
    hex(expected);
    text(" got=");
    hex(got);
    end();
}

fn begin(name: &str) {
    COUNT.fetch_add(1, Ordering::Relaxed);
    text("\r\nCHECK ");
    text(name);
    text(" expects=");
}

fn end() {
    text("\r\n");
}

/// A firmware without something that it need not have.
pub fn skip(name: &str, why: &str) {
    text("\r\nSKIP ");
    text(name);
    text(" ");
    text(why);
    end();
}

/// The last line.
pub fn finish() {
    text("\r\nCONFORMANCE-END ");
    decimal(COUNT.load(Ordering::Relaxed));
    end();
}
