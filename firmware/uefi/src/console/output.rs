//! Simple Text Output (UEFI 2.10, section 12.4) on the screen and on COM1.

use super::{graphics, serial};
use crate::cell::Global;
use crate::handle;
use crate::tables::{self, leak};
use core::ptr::null_mut;
use r_efi::efi::{Boolean, Char16, Status};
use r_efi::protocols::simple_text_output::{Mode, PROTOCOL_GUID, Protocol};
use uefi_core::guid::Guid;

/// Columns and rows of the modes. Mode 1 (80x50) is not offered, as the specification allows.
const MODES: [(usize, usize); 3] = [(80, 25), (0, 0), (100, 31)];
const DEFAULT_ATTRIBUTE: i32 = 0x07;

struct State {
    mode: *mut Mode,
    /// Serial terminals are told positions and colours only when they change.
    serial_attribute: i32,
}
// SAFETY: the pointer is to leaked memory that only this state uses.
unsafe impl Send for State {}

static STATE: Global<State> = Global::new(State { mode: null_mut(), serial_attribute: DEFAULT_ATTRIBUTE });

fn size(mode: i32) -> Option<(usize, usize)> {
    let m = *usize::try_from(mode).ok().and_then(|m| MODES.get(m))?;
    let fits = |m: (usize, usize)| graphics::text_size().is_none_or(|(c, r)| m.0 <= c && m.1 <= r);
    (m.0 != 0 && fits(m)).then_some(m)
}

/// Makes the protocol.
pub fn init() {
    let mode = leak(Mode {
        max_mode: MODES.len() as i32,
        mode: if size(2).is_some() { 2 } else { 0 },
        attribute: DEFAULT_ATTRIBUTE,
        cursor_column: 0,
        cursor_row: 0,
        cursor_visible: Boolean::TRUE,
    });
    STATE.with(|s| s.mode = mode);
    let p = leak(Protocol {
        reset,
        output_string,
        test_string,
        query_mode,
        set_mode,
        set_attribute,
        clear_screen: clear_service,
        set_cursor_position,
        enable_cursor,
        mode,
    });
    let guid = Guid(*PROTOCOL_GUID.as_bytes());
    let h = handle::install(null_mut(), &guid, p.cast()).unwrap_or(null_mut());
    // SAFETY: the tables are live.
    unsafe {
        let t = tables::system();
        ((*t).console_out_handle, (*t).con_out) = (h, p);
        ((*t).standard_error_handle, (*t).std_err) = (h, p);
    }
    tables::seal();
    clear();
}

fn with<R>(f: impl FnOnce(&mut Mode) -> R) -> R {
    STATE.with(|s| {
        // SAFETY: `init` has set the pointer; the borrow of STATE makes this the only user.
        f(unsafe { &mut *s.mode })
    })
}

fn serial_text(s: core::fmt::Arguments<'_>) {
    struct W;
    impl core::fmt::Write for W {
        fn write_str(&mut self, s: &str) -> core::fmt::Result {
            s.bytes().for_each(serial::send);
            Ok(())
        }
    }
    let _ = core::fmt::Write::write_fmt(&mut W, s);
}

/// Tells the serial terminal the colours, if they have changed.
fn serial_attribute(attribute: i32) {
    let changed = STATE.with(|s| core::mem::replace(&mut s.serial_attribute, attribute) != attribute);
    if changed {
        // From the PC's colour numbers (blue 1, green 2, red 4) to ANSI's (red 1, green 2, blue 4).
        let ansi = |c: i32| (c & 1) << 2 | c & 2 | (c & 4) >> 2;
        let (fg, bright, bg) = (ansi(attribute), attribute & 8 != 0, ansi(attribute >> 4));
        serial_text(format_args!("\x1b[{}m\x1b[{}m\x1b[{}m", u8::from(bright), 30 + fg, 40 + bg));
    }
}

/// Writes one character at the cursor.
pub fn put(c: char) {
    let (attribute, columns, rows) = with(|m| {
        let (c, r) = size(m.mode).unwrap_or((80, 25));
        (m.attribute, c as i32, r as i32)
    });
    serial_attribute(attribute);
    match c {
        '\r' => {
            with(|m| m.cursor_column = 0);
            serial::send(b'\r');
        }
        '\n' => {
            newline(rows, attribute);
            serial::send(b'\n');
        }
        '\u{8}' => {
            with(|m| m.cursor_column = (m.cursor_column - 1).max(0));
            serial::send(8);
        }
        c => {
            let (x, y) = with(|m| (m.cursor_column, m.cursor_row));
            graphics::draw_char(x as usize, y as usize, c, attribute as u8);
            let mut utf8 = [0; 4];
            c.encode_utf8(&mut utf8).bytes().for_each(serial::send);
            let wraps = with(|m| {
                m.cursor_column += 1;
                m.cursor_column >= columns
            });
            if wraps {
                with(|m| m.cursor_column = 0);
                newline(rows, attribute);
                serial_text(format_args!("\r\n"));
            }
        }
    }
}

fn newline(rows: i32, attribute: i32) {
    let scrolls = with(|m| {
        let last = m.cursor_row + 1 >= rows;
        if !last {
            m.cursor_row += 1;
        }
        last
    });
    if scrolls {
        graphics::scroll(rows as usize, attribute as u8);
    }
}

/// Clears the screen.
pub fn clear() {
    let attribute = with(|m| {
        (m.cursor_column, m.cursor_row) = (0, 0);
        m.attribute
    });
    graphics::clear(attribute as u8);
    serial_attribute(attribute);
    serial_text(format_args!("\x1b[2J\x1b[H"));
}

unsafe extern "efiapi" fn reset(_: *mut Protocol, _: Boolean) -> Status {
    with(|m| m.attribute = DEFAULT_ATTRIBUTE);
    clear();
    Status::SUCCESS
}

unsafe extern "efiapi" fn output_string(_: *mut Protocol, text: *mut Char16) -> Status {
    if text.is_null() {
        return Status::INVALID_PARAMETER;
    }
    let mut at = text;
    loop {
        // SAFETY: the caller passes a terminated string.
        let unit = unsafe { at.read_unaligned() };
        if unit == 0 {
            return Status::SUCCESS;
        }
        // UCS-2: surrogates are not characters here.
        put(char::from_u32(u32::from(unit)).unwrap_or('\u{fffd}'));
        at = at.wrapping_add(1);
    }
}

unsafe extern "efiapi" fn test_string(_: *mut Protocol, text: *mut Char16) -> Status {
    let Some(s) = crate::misc::string(text) else { return Status::INVALID_PARAMETER };
    if s.chars().all(|c| c < ' ' || graphics::has_glyph(c)) { Status::SUCCESS } else { Status::UNSUPPORTED }
}

unsafe extern "efiapi" fn query_mode(_: *mut Protocol, mode: usize, columns: *mut usize, rows: *mut usize) -> Status {
    match i32::try_from(mode).ok().and_then(size) {
        Some((c, r)) if !columns.is_null() && !rows.is_null() => {
            // SAFETY: not null.
            unsafe {
                columns.write_unaligned(c);
                rows.write_unaligned(r);
            }
            Status::SUCCESS
        }
        Some(_) => Status::INVALID_PARAMETER,
        None => Status::UNSUPPORTED,
    }
}

unsafe extern "efiapi" fn set_mode(_: *mut Protocol, mode: usize) -> Status {
    let Ok(mode) = i32::try_from(mode) else { return Status::UNSUPPORTED };
    if size(mode).is_none() {
        return Status::UNSUPPORTED;
    }
    with(|m| m.mode = mode);
    clear();
    Status::SUCCESS
}

unsafe extern "efiapi" fn set_attribute(_: *mut Protocol, attribute: usize) -> Status {
    if attribute > 0x7f {
        return Status::UNSUPPORTED;
    }
    with(|m| m.attribute = attribute as i32);
    Status::SUCCESS
}

unsafe extern "efiapi" fn clear_service(_: *mut Protocol) -> Status {
    clear();
    Status::SUCCESS
}

unsafe extern "efiapi" fn set_cursor_position(_: *mut Protocol, column: usize, row: usize) -> Status {
    let fits = with(|m| {
        let (c, r) = size(m.mode).unwrap_or((80, 25));
        let fits = column < c && row < r;
        if fits {
            (m.cursor_column, m.cursor_row) = (column as i32, row as i32);
        }
        fits
    });
    if !fits {
        return Status::UNSUPPORTED;
    }
    serial_text(format_args!("\x1b[{};{}H", row + 1, column + 1));
    Status::SUCCESS
}

unsafe extern "efiapi" fn enable_cursor(_: *mut Protocol, visible: Boolean) -> Status {
    with(|m| m.cursor_visible = visible);
    serial_text(format_args!("\x1b[?25{}", if bool::from(visible) { 'h' } else { 'l' }));
    Status::SUCCESS
}
