//! The screen: the linear frame buffer that the host gives, characters on it, and Graphics Output (UEFI 2.10, section
//! 12.9).

use crate::cell::Global;
use crate::config::{self, kind};
use crate::handle;
use crate::tables::leak;
use core::ptr::null_mut;
use font8x8::UnicodeFonts;
use r_efi::efi::Status;
use r_efi::protocols::graphics_output::{
    BLT_BUFFER_TO_VIDEO, BLT_VIDEO_FILL, BLT_VIDEO_TO_BLT_BUFFER, BLT_VIDEO_TO_VIDEO, BltOperation, BltPixel, Mode,
    ModeInformation, PIXEL_BLUE_GREEN_RED_RESERVED_8_BIT_PER_COLOR, PROTOCOL_GUID, PixelBitmask, Protocol,
};
use uefi_core::bytes::{u32_at, u64_at};
use uefi_core::guid::Guid;

/// Pixels of a character: the 8x8 font with every line twice.
const CELL: (usize, usize) = (8, 16);
/// Resolutions that are offered, as far as the frame buffer holds them.
const SIZES: [(u32, u32); 4] = [(1024, 768), (800, 600), (1280, 1024), (640, 480)];

#[derive(Clone, Copy)]
struct Screen {
    base: *mut u32,
    /// Bytes of the whole frame buffer.
    bytes: usize,
    width: usize,
    height: usize,
    /// Pixels a line.
    stride: usize,
    mode: *mut Mode,
    info: *mut ModeInformation,
}
// SAFETY: the frame buffer is reached from the one processor only.
unsafe impl Send for Screen {}

static SCREEN: Global<Option<Screen>> = Global::new(None);

fn screen() -> Option<Screen> {
    SCREEN.with(|s| *s)
}

impl Screen {
    fn fill(&self, x: usize, y: usize, w: usize, h: usize, colour: u32) {
        for row in y..(y + h).min(self.height) {
            for column in x..(x + w).min(self.width) {
                // SAFETY: inside the frame buffer: row < height, column < width <= stride.
                unsafe { self.base.add(row * self.stride + column).write_volatile(colour) }
            }
        }
    }
    fn row(&self, y: usize) -> *mut u32 {
        self.base.wrapping_add(y * self.stride)
    }
}

/// The sixteen colours of text attributes.
fn colour(index: u8) -> u32 {
    let on = if index & 8 != 0 { 0xff } else { 0xaa };
    if index == 8 {
        return 0x55_5555;
    }
    let part = |bit: u8| if index & bit != 0 { on } else { 0 };
    part(4) << 16 | part(2) << 8 | part(1)
}

/// Columns and rows of characters that fit.
pub fn text_size() -> Option<(usize, usize)> {
    screen().map(|s| (s.width / CELL.0, s.height / CELL.1))
}

fn glyph(c: char) -> Option<[u8; 8]> {
    use font8x8::{BASIC_FONTS, BLOCK_FONTS, BOX_FONTS, GREEK_FONTS, LATIN_FONTS, MISC_FONTS};
    // What the fonts lack of the characters that UEFI demands (section 12.4): arrows and triangles.
    let own = match c {
        '\u{2190}' => [0x00, 0x08, 0x0c, 0xfe, 0x0c, 0x08, 0x00, 0x00],
        '\u{2191}' | '\u{25b2}' => [0x10, 0x38, 0x7c, 0xfe, 0x10, 0x10, 0x10, 0x00],
        '\u{2192}' => [0x00, 0x10, 0x30, 0x7f, 0x30, 0x10, 0x00, 0x00],
        '\u{2193}' | '\u{25bc}' => [0x10, 0x10, 0x10, 0xfe, 0x7c, 0x38, 0x10, 0x00],
        '\u{25ba}' => [0x02, 0x06, 0x0e, 0x1e, 0x0e, 0x06, 0x02, 0x00],
        '\u{25c4}' => [0x40, 0x60, 0x70, 0x78, 0x70, 0x60, 0x40, 0x00],
        _ => [0; 8],
    };
    if own != [0; 8] {
        return Some(own);
    }
    BASIC_FONTS
        .get(c)
        .or_else(|| LATIN_FONTS.get(c))
        .or_else(|| BOX_FONTS.get(c))
        .or_else(|| BLOCK_FONTS.get(c))
        .or_else(|| GREEK_FONTS.get(c))
        .or_else(|| MISC_FONTS.get(c))
}

/// Can the character be shown?
pub fn has_glyph(c: char) -> bool {
    glyph(c).is_some()
}

/// Draws a character.
pub fn draw_char(column: usize, row: usize, c: char, attribute: u8) {
    let Some(s) = screen() else { return };
    let bits = glyph(c).unwrap_or([0x7e, 0x42, 0x42, 0x42, 0x42, 0x42, 0x7e, 0]);
    let (fg, bg) = (colour(attribute & 15), colour(attribute >> 4 & 7));
    for (line, byte) in bits.iter().enumerate() {
        for half in 0..2 {
            let y = row * CELL.1 + line * 2 + half;
            if y >= s.height || (column + 1) * CELL.0 > s.width {
                return;
            }
            let to = s.row(y).wrapping_add(column * CELL.0);
            for bit in 0..8 {
                // SAFETY: the cell lies inside the frame buffer, as checked.
                unsafe { to.add(bit).write_volatile(if byte >> bit & 1 != 0 { fg } else { bg }) }
            }
        }
    }
}

/// Moves the first `rows` rows of text up by one.
pub fn scroll(rows: usize, attribute: u8) {
    let Some(s) = screen() else { return };
    let lines = (rows * CELL.1).min(s.height);
    if lines > CELL.1 {
        // SAFETY: both ranges lie inside the frame buffer.
        unsafe { core::ptr::copy(s.row(CELL.1), s.base, (lines - CELL.1) * s.stride) }
        s.fill(0, lines - CELL.1, s.width, CELL.1, colour(attribute >> 4 & 7));
    }
}

/// Fills the screen with the background colour.
pub fn clear(attribute: u8) {
    if let Some(s) = screen() {
        s.fill(0, 0, s.width, s.height, colour(attribute >> 4 & 7));
    }
}

/// Writes text to the top of the screen, whatever state it is in.
pub fn emergency(text: &str) {
    for (i, c) in text.chars().filter(|c| *c >= ' ').enumerate() {
        draw_char(i % 80, i / 80, c, 0x4f);
    }
}

/// Finds the frame buffer and makes the protocol.
pub fn init() {
    let Some(d) = config::record(kind::FRAME_BUFFER) else { return };
    let (Some(base), Some(width), Some(height), Some(line)) =
        (u64_at(d, 0), u32_at(d, 8), u32_at(d, 12), u32_at(d, 16))
    else {
        return;
    };
    let bytes = u32_at(d, 20).filter(|b| *b != 0).unwrap_or(line.saturating_mul(height));
    if base == 0 || line < width.saturating_mul(4) || u64::from(line) * u64::from(height) > u64::from(bytes) {
        return;
    }
    let info = leak(information(width, height, line / 4));
    let mode = leak(Mode {
        max_mode: 0,
        mode: 0,
        info,
        size_of_info: size_of::<ModeInformation>(),
        frame_buffer_base: base,
        frame_buffer_size: bytes as usize,
    });
    let s = Screen {
        base: base as *mut u32,
        bytes: bytes as usize,
        width: width as usize,
        height: height as usize,
        stride: line as usize / 4,
        mode,
        info,
    };
    SCREEN.with(|place| *place = Some(s));
    // SAFETY: leaked above; nobody else knows it yet.
    unsafe { (*mode).max_mode = modes(&s).count() as u32 };
    let p = leak(Protocol { query_mode, set_mode, blt, mode });
    let h = handle::install(null_mut(), &Guid(*PROTOCOL_GUID.as_bytes()), p.cast()).unwrap_or(null_mut());
    let path = uefi_core::devpath::DevicePath::new()
        .vendor_hardware(Guid::new(0x9b17e5a2, 0x0891, 0x42dd, [0xb6, 0x53, 0x80, 0xb5, 0xc2, 0x28, 0x09, 0xba]), &[]);
    // _ADR of a display output: VGA-class, digital (ACPI 6.5, appendix B.4.2).
    let path = path.with(2, 3, &0x8000_0400u32.to_le_bytes());
    let _ = handle::install(h, &crate::tables::DEVICE_PATH, crate::image::bytes_of(&path));
}

/// Modes: the host's own first, then those of the list that fit.
fn modes(s: &Screen) -> impl Iterator<Item = (u32, u32)> {
    let d = config::record(kind::FRAME_BUFFER).unwrap_or(&[]);
    let first = (u32_at(d, 8).unwrap_or(0), u32_at(d, 12).unwrap_or(0));
    let bytes = s.bytes;
    let fits = move |m: &(u32, u32)| *m != first && m.0 as usize * m.1 as usize * 4 <= bytes;
    core::iter::once(first).chain(SIZES.into_iter().filter(fits))
}

fn information(width: u32, height: u32, stride: u32) -> ModeInformation {
    ModeInformation {
        version: 0,
        horizontal_resolution: width,
        vertical_resolution: height,
        pixel_format: PIXEL_BLUE_GREEN_RED_RESERVED_8_BIT_PER_COLOR,
        pixel_information: PixelBitmask { red_mask: 0, green_mask: 0, blue_mask: 0, reserved_mask: 0 },
        pixels_per_scan_line: stride,
    }
}

unsafe extern "efiapi" fn query_mode(
    _: *mut Protocol,
    mode: u32,
    size: *mut usize,
    out: *mut *mut ModeInformation,
) -> Status {
    let Some(s) = screen() else { return Status::NOT_FOUND };
    let Some((w, h)) = modes(&s).nth(mode as usize) else { return Status::INVALID_PARAMETER };
    if size.is_null() || out.is_null() {
        return Status::INVALID_PARAMETER;
    }
    let stride = if mode == 0 { first_stride(&s) } else { w };
    let Ok(p) = crate::heap::allocate_pool(r_efi::efi::BOOT_SERVICES_DATA, size_of::<ModeInformation>()) else {
        return Status::OUT_OF_RESOURCES;
    };
    // SAFETY: pointers are checked; the pool memory is large enough.
    unsafe {
        p.cast::<ModeInformation>().write(information(w, h, stride));
        out.write_unaligned(p.cast());
        size.write_unaligned(size_of::<ModeInformation>());
    }
    Status::SUCCESS
}

fn first_stride(s: &Screen) -> u32 {
    let d = config::record(kind::FRAME_BUFFER).unwrap_or(&[]);
    u32_at(d, 16).map_or(s.stride as u32, |line| line / 4)
}

unsafe extern "efiapi" fn set_mode(_: *mut Protocol, mode: u32) -> Status {
    let Some(mut s) = screen() else { return Status::DEVICE_ERROR };
    let Some((w, h)) = modes(&s).nth(mode as usize) else { return Status::UNSUPPORTED };
    let stride = if mode == 0 { first_stride(&s) } else { w };
    (s.width, s.height, s.stride) = (w as usize, h as usize, stride as usize);
    // SAFETY: leaked at `init`.
    unsafe {
        (*s.mode).mode = mode;
        s.info.write(information(w, h, stride));
    }
    SCREEN.with(|place| *place = Some(s));
    crate::vmbus::resolution(w, h, stride);
    clear(0);
    Status::SUCCESS
}

unsafe extern "efiapi" fn blt(
    _: *mut Protocol,
    buffer: *mut BltPixel,
    operation: BltOperation,
    sx: usize,
    sy: usize,
    dx: usize,
    dy: usize,
    w: usize,
    h: usize,
    delta: usize,
) -> Status {
    let Some(s) = screen() else { return Status::DEVICE_ERROR };
    if w == 0 || h == 0 {
        return Status::INVALID_PARAMETER;
    }
    let inside = |x: usize, y: usize| {
        x.checked_add(w).is_some_and(|e| e <= s.width) && y.checked_add(h).is_some_and(|e| e <= s.height)
    };
    let line = if delta == 0 { w * 4 } else { delta };
    let buffer_row = |x: usize, y: usize| buffer.cast::<u8>().wrapping_add(y * line + x * 4).cast::<u32>();
    let needs_buffer = operation != BLT_VIDEO_TO_VIDEO;
    if needs_buffer && buffer.is_null() {
        return Status::INVALID_PARAMETER;
    }
    // SAFETY: video ranges are checked against the screen; the buffer has the rows that the caller says.
    unsafe {
        match operation {
            BLT_VIDEO_FILL if inside(dx, dy) => s.fill(dx, dy, w, h, buffer.cast::<u32>().read_unaligned()),
            BLT_VIDEO_TO_BLT_BUFFER if inside(sx, sy) => {
                for row in 0..h {
                    let to = buffer_row(dx, dy + row).cast::<u8>();
                    to.copy_from(s.row(sy + row).add(sx).cast(), w * 4);
                }
            }
            BLT_BUFFER_TO_VIDEO if inside(dx, dy) => {
                for row in 0..h {
                    let from = buffer_row(sx, sy + row).cast::<u8>();
                    s.row(dy + row).add(dx).cast::<u8>().copy_from(from, w * 4);
                }
            }
            BLT_VIDEO_TO_VIDEO if inside(sx, sy) && inside(dx, dy) => {
                let copy = |row: usize| core::ptr::copy(s.row(sy + row).add(sx), s.row(dy + row).add(dx), w);
                // Towards the end first where the ranges may overlap that way.
                if dy > sy { (0..h).rev().for_each(copy) } else { (0..h).for_each(copy) }
            }
            _ => return Status::INVALID_PARAMETER,
        }
    }
    Status::SUCCESS
}
