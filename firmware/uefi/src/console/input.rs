//! Simple Text Input and its extended form (UEFI 2.10, sections 12.2 and 12.3): keys from the synthetic keyboard and from
//! COM1.

use super::serial;
use crate::cell::Global;
use crate::tables::{self, leak};
use crate::{arch, event, handle};
use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::ffi::c_void;
use core::ptr::null_mut;
use r_efi::efi::{self, Boolean, Status};
use r_efi::protocols::{simple_text_input as sti, simple_text_input_ex as stix};
use uefi_core::guid::Guid;

/// Scan codes (UEFI 2.10, table 12.7).
pub mod scan {
    pub const UP: u16 = 1;
    pub const DOWN: u16 = 2;
    pub const RIGHT: u16 = 3;
    pub const LEFT: u16 = 4;
    pub const HOME: u16 = 5;
    pub const END: u16 = 6;
    pub const INSERT: u16 = 7;
    pub const DELETE: u16 = 8;
    pub const PAGE_UP: u16 = 9;
    pub const PAGE_DOWN: u16 = 10;
    pub const F1: u16 = 11;
    pub const F11: u16 = 21;
    pub const F12: u16 = 22;
    pub const ESC: u16 = 23;
}

/// Bits of `KeyShiftState`.
pub mod shift {
    pub const VALID: u32 = 0x8000_0000;
    pub const RIGHT_SHIFT: u32 = 0x01;
    pub const LEFT_SHIFT: u32 = 0x02;
    pub const RIGHT_CONTROL: u32 = 0x04;
    pub const LEFT_CONTROL: u32 = 0x08;
    pub const RIGHT_ALT: u32 = 0x10;
    pub const LEFT_ALT: u32 = 0x20;
}

/// A key.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct Key {
    pub scan: u16,
    pub unicode: u16,
    pub shift: u32,
    pub toggle: u8,
}

struct Notify {
    id: usize,
    key: Key,
    function: stix::KeyNotifyFunction,
}

struct State {
    keys: VecDeque<Key>,
    notifies: Vec<Notify>,
    next_id: usize,
    /// Bytes of an escape sequence from COM1, and when the first came.
    escape: Vec<u8>,
    escape_since: u64,
}

static STATE: Global<State> =
    Global::new(State { keys: VecDeque::new(), notifies: Vec::new(), next_id: 1, escape: Vec::new(), escape_since: 0 });

/// Most keys that wait.
const QUEUE: usize = 128;

/// Makes the protocols.
pub fn init() {
    let wait =
        event::create(event::EVT_NOTIFY_WAIT, event::TPL_NOTIFY, Some(on_wait), null_mut(), None).unwrap_or(null_mut());
    let wait_ex =
        event::create(event::EVT_NOTIFY_WAIT, event::TPL_NOTIFY, Some(on_wait), null_mut(), None).unwrap_or(null_mut());
    let p = leak(sti::Protocol { reset, read_key_stroke, wait_for_key: wait });
    let ex = leak(stix::Protocol {
        reset: reset_ex,
        read_key_stroke_ex,
        wait_for_key_ex: wait_ex,
        set_state,
        register_key_notify,
        unregister_key_notify,
    });
    let h = handle::install(null_mut(), &Guid(*sti::PROTOCOL_GUID.as_bytes()), p.cast()).unwrap_or(null_mut());
    let _ = handle::install(h, &Guid(*stix::PROTOCOL_GUID.as_bytes()), ex.cast());
    // SAFETY: the tables are live.
    unsafe {
        let t = tables::system();
        ((*t).console_in_handle, (*t).con_in) = (h, p);
    }
    tables::seal();
}

/// May more keys be pushed? What comes while nobody reads waits in the keyboard's channel.
pub fn has_room() -> bool {
    STATE.with(|s| s.keys.len() < QUEUE)
}

/// A key has been pressed.
pub fn push(key: Key) {
    let calls: Vec<stix::KeyNotifyFunction> = STATE.with(|s| {
        if s.keys.len() < QUEUE {
            s.keys.push_back(key);
        }
        let matches = |n: &&Notify| {
            n.key.scan == key.scan
                && n.key.unicode == key.unicode
                && (n.key.shift & shift::VALID == 0 || n.key.shift == key.shift)
        };
        s.notifies.iter().filter(matches).map(|n| n.function).collect()
    });
    let mut data = key_data(key);
    for f in calls {
        // SAFETY: the function was registered to be called so.
        unsafe { f(&mut data) };
    }
}

fn key_data(key: Key) -> stix::KeyData {
    stix::KeyData {
        key: sti::InputKey { scan_code: key.scan, unicode_char: key.unicode },
        key_state: stix::KeyState { key_shift_state: key.shift | shift::VALID, key_toggle_state: key.toggle | 0x80 },
    }
}

/// Takes what COM1 and the keyboard have.
fn poll() {
    crate::vmbus::poll_keyboard();
    while let Some(byte) = serial::receive() {
        if let Some(key) = serial_byte(byte) {
            push(key);
        }
    }
    // An escape that nothing follows for 100 ms is the key itself.
    let alone = STATE.with(|s| {
        let alone = !s.escape.is_empty() && arch::now().saturating_sub(s.escape_since) > 1_000_000;
        if alone {
            s.escape.clear();
        }
        alone
    });
    if alone {
        push(Key { scan: scan::ESC, ..Key::default() });
    }
}

/// Understands a byte from a VT100-like terminal.
fn serial_byte(byte: u8) -> Option<Key> {
    STATE.with(|s| {
        if s.escape.is_empty() {
            return match byte {
                0x1b => {
                    s.escape.push(byte);
                    s.escape_since = arch::now();
                    None
                }
                0x7f => Some(Key { unicode: 8, ..Key::default() }),
                b => Some(Key { unicode: u16::from(b), ..Key::default() }),
            };
        }
        s.escape.push(byte);
        let code = match &s.escape[1..] {
            [b'[' | b'O'] => return None,
            [b'[', b'0'..=b'9'] | [b'[', b'0'..=b'9', b'0'..=b'9'] => return None,
            [b'[' | b'O', b'A'] => scan::UP,
            [b'[' | b'O', b'B'] => scan::DOWN,
            [b'[' | b'O', b'C'] => scan::RIGHT,
            [b'[' | b'O', b'D'] => scan::LEFT,
            [b'[' | b'O', b'H'] | [b'[', b'1' | b'7', b'~'] => scan::HOME,
            [b'[' | b'O', b'F'] | [b'[', b'4' | b'8', b'~'] => scan::END,
            [b'[', b'2', b'~'] => scan::INSERT,
            [b'[', b'3', b'~'] => scan::DELETE,
            [b'[', b'5', b'~'] => scan::PAGE_UP,
            [b'[', b'6', b'~'] => scan::PAGE_DOWN,
            [b'O', f @ b'P'..=b'S'] => scan::F1 + u16::from(f - b'P'),
            [b'[', b'1', n @ b'1'..=b'5', b'~'] => scan::F1 + u16::from(n - b'1'),
            [b'[', b'1', n @ b'7'..=b'9', b'~'] => scan::F1 + 5 + u16::from(n - b'7'),
            [b'[', b'2', n @ b'0'..=b'1', b'~'] => scan::F1 + 8 + u16::from(n - b'0'),
            [b'[', b'2', b'3', b'~'] => scan::F11,
            [b'[', b'2', b'4', b'~'] => scan::F12,
            _ => scan::ESC,
        };
        s.escape.clear();
        Some(Key { scan: code, ..Key::default() })
    })
}

/// The next key, if there is one.
pub fn next() -> Option<Key> {
    poll();
    STATE.with(|s| s.keys.pop_front())
}

unsafe extern "efiapi" fn on_wait(e: efi::Event, _: *mut c_void) {
    poll();
    if STATE.with(|s| s.keys.iter().any(|k| k.scan != 0 || k.unicode != 0)) {
        let _ = event::signal(e);
    }
}

unsafe extern "efiapi" fn reset(_: *mut sti::Protocol, _: Boolean) -> Status {
    STATE.with(|s| s.keys.clear());
    Status::SUCCESS
}
unsafe extern "efiapi" fn reset_ex(_: *mut stix::Protocol, _: Boolean) -> Status {
    STATE.with(|s| s.keys.clear());
    Status::SUCCESS
}
unsafe extern "efiapi" fn read_key_stroke(_: *mut sti::Protocol, out: *mut sti::InputKey) -> Status {
    if out.is_null() {
        return Status::INVALID_PARAMETER;
    }
    while let Some(k) = next() {
        // A shift key alone is not a key stroke here.
        if k.scan == 0 && k.unicode == 0 {
            continue;
        }
        // Control and a letter are the control character here.
        let control = k.shift & (shift::LEFT_CONTROL | shift::RIGHT_CONTROL) != 0;
        let unicode = match k.unicode {
            c @ 0x61..=0x7a if control => c - 0x60,
            c @ 0x41..=0x5a if control => c - 0x40,
            c => c,
        };
        // SAFETY: not null.
        unsafe { out.write_unaligned(sti::InputKey { scan_code: k.scan, unicode_char: unicode }) };
        return Status::SUCCESS;
    }
    Status::NOT_READY
}
unsafe extern "efiapi" fn read_key_stroke_ex(_: *mut stix::Protocol, out: *mut stix::KeyData) -> Status {
    if out.is_null() {
        return Status::INVALID_PARAMETER;
    }
    let key = next();
    // SAFETY: not null.
    unsafe { out.write_unaligned(key_data(key.unwrap_or_default())) };
    if key.is_some() { Status::SUCCESS } else { Status::NOT_READY }
}
unsafe extern "efiapi" fn set_state(_: *mut stix::Protocol, state: *mut stix::KeyToggleState) -> Status {
    if state.is_null() {
        return Status::INVALID_PARAMETER;
    }
    // The synthetic keyboard's lights are the host's to show.
    Status::UNSUPPORTED
}
unsafe extern "efiapi" fn register_key_notify(
    _: *mut stix::Protocol,
    data: *mut stix::KeyData,
    function: stix::KeyNotifyFunction,
    out: *mut *mut c_void,
) -> Status {
    // The binding's type knows no null function, callers do.
    if data.is_null() || out.is_null() || core::hint::black_box(function as usize) == 0 {
        return Status::INVALID_PARAMETER;
    }
    // SAFETY: not null.
    let d = unsafe { data.read_unaligned() };
    let key = Key {
        scan: d.key.scan_code,
        unicode: d.key.unicode_char,
        shift: d.key_state.key_shift_state,
        toggle: d.key_state.key_toggle_state,
    };
    let id = STATE.with(|s| {
        let id = s.next_id;
        s.next_id += 1;
        s.notifies.push(Notify { id, key, function });
        id
    });
    // SAFETY: not null.
    unsafe { out.write_unaligned(id as *mut c_void) };
    Status::SUCCESS
}
unsafe extern "efiapi" fn unregister_key_notify(_: *mut stix::Protocol, id: *mut c_void) -> Status {
    STATE.with(|s| {
        let before = s.notifies.len();
        s.notifies.retain(|n| n.id != id as usize);
        if s.notifies.len() == before { Status::INVALID_PARAMETER } else { Status::SUCCESS }
    })
}
