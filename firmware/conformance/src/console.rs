//! Text in and out, graphics (UEFI 2.10, chapter 12).

use crate::env::{Wide, free, locate, protocol, table};
use crate::report::{check, equal, holds, s::*, skip};
use core::ptr::null_mut;
use r_efi::efi::{Boolean, Status};
use r_efi::protocols::graphics_output as gop;
use r_efi::protocols::{simple_text_input, simple_text_input_ex as ex, simple_text_output};

pub unsafe fn run() {
    output();
    input();
    input_ex();
    graphics();
}

unsafe fn output() {
    let out = (*table()).con_out;
    let same: *mut simple_text_output::Protocol =
        protocol((*table()).console_out_handle, &simple_text_output::PROTOCOL_GUID);
    holds("SimpleTextOutput/on-its-handle", same == out);
    let mode = || *(*out).mode;
    let (mut columns, mut rows) = (0, 0);
    check("TextOutput.QueryMode/mode-0", &[OK], ((*out).query_mode)(out, 0, &mut columns, &mut rows));
    holds("TextOutput.QueryMode/80x25", columns == 80 && rows == 25);
    let s = ((*out).query_mode)(out, mode().max_mode as usize, &mut columns, &mut rows);
    check("TextOutput.QueryMode/beyond", &[UNSUPPORTED], s);
    let s = ((*out).query_mode)(out, 1, &mut columns, &mut rows);
    check("TextOutput.QueryMode/mode-1", &[OK, UNSUPPORTED], s);
    let before = mode().mode as usize;
    check("TextOutput.SetMode/mode-0", &[OK], ((*out).set_mode)(out, 0));
    holds("TextOutput.SetMode/cursor-home", mode().mode == 0 && mode().cursor_column == 0 && mode().cursor_row == 0);
    let s = ((*out).set_mode)(out, mode().max_mode as usize);
    check("TextOutput.SetMode/beyond", &[UNSUPPORTED], s);
    equal("TextOutput.SetMode/beyond-changes-nothing", 0, mode().mode as u64);
    check("TextOutput.ClearScreen/good", &[OK], ((*out).clear_screen)(out));
    check("TextOutput.SetAttribute/good", &[OK], ((*out).set_attribute)(out, 0x1f));
    equal("TextOutput.SetAttribute/set", 0x1f, mode().attribute as u64);
    check("TextOutput.SetAttribute/too-large", &[UNSUPPORTED], ((*out).set_attribute)(out, 0x100));
    check("TextOutput.SetCursorPosition/good", &[OK], ((*out).set_cursor_position)(out, 5, 3));
    holds("TextOutput.SetCursorPosition/set", mode().cursor_column == 5 && mode().cursor_row == 3);
    check("TextOutput.SetCursorPosition/column", &[UNSUPPORTED], ((*out).set_cursor_position)(out, 80, 3));
    check("TextOutput.SetCursorPosition/row", &[UNSUPPORTED], ((*out).set_cursor_position)(out, 5, 25));
    let hello = Wide::<8>::new("hello");
    check("TextOutput.OutputString/good", &[OK], ((*out).output_string)(out, hello.ptr()));
    holds("TextOutput.OutputString/moves", mode().cursor_column == 10 && mode().cursor_row == 3);
    let crlf = Wide::<4>::new("\r\n");
    let _ = ((*out).output_string)(out, crlf.ptr());
    holds("TextOutput.OutputString/next-line", mode().cursor_column == 0 && mode().cursor_row == 4);
    let back = Wide::<4>::new("ab\u{8}");
    let _ = ((*out).output_string)(out, back.ptr());
    equal("TextOutput.OutputString/backspace", 1, mode().cursor_column as u64);
    let _ = ((*out).set_cursor_position)(out, 79, 4);
    let _ = ((*out).output_string)(out, Wide::<4>::new("x").ptr());
    holds("TextOutput.OutputString/wraps", mode().cursor_column == 0 && mode().cursor_row == 5);
    let _ = ((*out).set_cursor_position)(out, 0, 24);
    let _ = ((*out).output_string)(out, Wide::<4>::new("\n").ptr());
    equal("TextOutput.OutputString/scrolls", 24, mode().cursor_row as u64);
    check("TextOutput.TestString/good", &[OK], ((*out).test_string)(out, hello.ptr()));
    let box_drawing = [0x2500u16, 0x2502, 0x250c, 0x2588, 0];
    let s = ((*out).test_string)(out, box_drawing.as_ptr().cast_mut());
    check("TextOutput.TestString/box-drawing", &[OK], s);
    let strange = [0xe123u16, 0];
    check("TextOutput.TestString/unknown", &[UNSUPPORTED], ((*out).test_string)(out, strange.as_ptr().cast_mut()));
    check("TextOutput.EnableCursor/off", &[OK, UNSUPPORTED], ((*out).enable_cursor)(out, Boolean::FALSE));
    check("TextOutput.Reset/good", &[OK], ((*out).reset)(out, Boolean::FALSE));
    holds("TextOutput.Reset/cursor-home", mode().cursor_column == 0 && mode().cursor_row == 0);
    let _ = ((*out).set_mode)(out, before);
}

unsafe fn input() {
    let inp = (*table()).con_in;
    let same: *mut simple_text_input::Protocol =
        protocol((*table()).console_in_handle, &simple_text_input::PROTOCOL_GUID);
    holds("SimpleTextInput/on-its-handle", same == inp);
    check("TextInput.Reset/good", &[OK], ((*inp).reset)(inp, Boolean::FALSE));
    let mut key = simple_text_input::InputKey { scan_code: 0, unicode_char: 0 };
    check("TextInput.ReadKeyStroke/none", &[NOT_READY], ((*inp).read_key_stroke)(inp, &mut key));
    check("TextInput.WaitForKey/none", &[NOT_READY], (crate::env::bs().check_event)((*inp).wait_for_key));
}

type Register =
    unsafe extern "efiapi" fn(*mut ex::Protocol, *mut ex::KeyData, *const (), *mut *mut core::ffi::c_void) -> Status;
unsafe extern "efiapi" fn pressed(_: *mut ex::KeyData) -> Status {
    OK
}

unsafe fn input_ex() {
    let p: *mut ex::Protocol = protocol((*table()).console_in_handle, &ex::PROTOCOL_GUID);
    holds("SimpleTextInputEx/on-console", !p.is_null());
    let mut data: ex::KeyData = core::mem::zeroed();
    check("TextInputEx.Reset/good", &[OK], ((*p).reset)(p, Boolean::FALSE));
    check("TextInputEx.ReadKeyStrokeEx/none", &[NOT_READY], ((*p).read_key_stroke_ex)(p, &mut data));
    check("TextInputEx.ReadKeyStrokeEx/null", &[INVALID], ((*p).read_key_stroke_ex)(p, null_mut()));
    check("TextInputEx.SetState/null", &[INVALID], ((*p).set_state)(p, null_mut()));
    let mut strange = 0x08;
    check("TextInputEx.SetState/not-valid", &[UNSUPPORTED], ((*p).set_state)(p, &mut strange));
    // Called through a type in which the function may be null.
    let register: Register = core::mem::transmute((*p).register_key_notify as *const ());
    let function = pressed as *const ();
    let mut handle = null_mut();
    data.key.unicode_char = u16::from(b'q');
    check("TextInputEx.RegisterKeyNotify/null-key", &[INVALID], register(p, null_mut(), function, &mut handle));
    let s = register(p, &mut data, core::ptr::null(), &mut handle);
    check("TextInputEx.RegisterKeyNotify/null-function", &[INVALID], s);
    check("TextInputEx.RegisterKeyNotify/null-handle", &[INVALID], register(p, &mut data, function, null_mut()));
    check("TextInputEx.RegisterKeyNotify/good", &[OK], register(p, &mut data, function, &mut handle));
    let (first, mut again) = (handle, null_mut());
    check("TextInputEx.RegisterKeyNotify/same-again", &[OK], register(p, &mut data, function, &mut again));
    check("TextInputEx.UnregisterKeyNotify/good", &[OK], ((*p).unregister_key_notify)(p, first));
    if again != first {
        let _ = ((*p).unregister_key_notify)(p, again);
    }
    check("TextInputEx.UnregisterKeyNotify/again", &[INVALID], ((*p).unregister_key_notify)(p, first));
    check("TextInputEx.UnregisterKeyNotify/null", &[INVALID], ((*p).unregister_key_notify)(p, null_mut()));
}

unsafe fn graphics() {
    let p: *mut gop::Protocol = locate(&gop::PROTOCOL_GUID);
    if p.is_null() {
        return skip("GraphicsOutput", "no screen");
    }
    let mode = || *(*p).mode;
    holds("GraphicsOutput/mode", mode().mode < mode().max_mode && mode().size_of_info >= 36);
    let info = *mode().info;
    holds("GraphicsOutput/frame-buffer", {
        let bytes = info.pixels_per_scan_line as usize * info.vertical_resolution as usize * 4;
        info.pixel_format == gop::PIXEL_BLT_ONLY || mode().frame_buffer_base != 0 && mode().frame_buffer_size >= bytes
    });
    let (mut size, mut out) = (0, null_mut());
    let query = (*p).query_mode;
    check("GraphicsOutput.QueryMode/good", &[OK], query(p, mode().mode, &mut size, &mut out));
    let told = *out;
    holds(
        "GraphicsOutput.QueryMode/is-the-mode",
        size >= 36 && told.horizontal_resolution == info.horizontal_resolution,
    );
    free(out);
    check("GraphicsOutput.QueryMode/beyond", &[INVALID], query(p, mode().max_mode, &mut size, &mut out));
    check("GraphicsOutput.QueryMode/null-size", &[INVALID], query(p, 0, null_mut(), &mut out));
    check("GraphicsOutput.QueryMode/null-info", &[INVALID], query(p, 0, &mut size, null_mut()));
    check("GraphicsOutput.SetMode/beyond", &[UNSUPPORTED], ((*p).set_mode)(p, mode().max_mode));
    check("GraphicsOutput.SetMode/same", &[OK], ((*p).set_mode)(p, mode().mode));
    blt(p, info.horizontal_resolution as usize, info.vertical_resolution as usize);
}

unsafe fn blt(p: *mut gop::Protocol, width: usize, height: usize) {
    let f = (*p).blt;
    let pixel = |n: u8| gop::BltPixel { blue: n, green: n / 2, red: 255 - n, reserved: 0 };
    let same = |a: &gop::BltPixel, b: &gop::BltPixel| a.blue == b.blue && a.green == b.green && a.red == b.red;
    let mut one = pixel(90);
    check("GraphicsOutput.Blt/fill", &[OK], f(p, &mut one, gop::BLT_VIDEO_FILL, 0, 0, 10, 20, 4, 3, 0));
    let mut back = [pixel(0); 12];
    let s = f(p, back.as_mut_ptr(), gop::BLT_VIDEO_TO_BLT_BUFFER, 10, 20, 0, 0, 4, 3, 0);
    check("GraphicsOutput.Blt/read", &[OK], s);
    holds("GraphicsOutput.Blt/filled", back.iter().all(|b| same(b, &one)));
    let mut picture = [pixel(0); 12];
    picture.iter_mut().enumerate().for_each(|(i, b)| *b = pixel(i as u8 * 20));
    let s = f(p, picture.as_mut_ptr(), gop::BLT_BUFFER_TO_VIDEO, 0, 0, 40, 50, 4, 3, 16);
    check("GraphicsOutput.Blt/write", &[OK], s);
    let s = f(p, null_mut(), gop::BLT_VIDEO_TO_VIDEO, 40, 50, 80, 90, 4, 3, 0);
    check("GraphicsOutput.Blt/move", &[OK], s);
    let _ = f(p, back.as_mut_ptr(), gop::BLT_VIDEO_TO_BLT_BUFFER, 80, 90, 0, 0, 4, 3, 0);
    holds("GraphicsOutput.Blt/moved", back.iter().zip(&picture).all(|(a, b)| same(a, b)));
    let _ = f(p, null_mut(), gop::BLT_VIDEO_TO_VIDEO, 40, 50, 20, 10, 4, 3, 0);
    let _ = f(p, back.as_mut_ptr(), gop::BLT_VIDEO_TO_BLT_BUFFER, 20, 10, 0, 0, 4, 3, 0);
    holds("GraphicsOutput.Blt/moved-upwards", back.iter().zip(&picture).all(|(a, b)| same(a, b)));
    let _ = f(p, null_mut(), gop::BLT_VIDEO_TO_VIDEO, 40, 50, 41, 51, 4, 3, 0);
    let _ = f(p, back.as_mut_ptr(), gop::BLT_VIDEO_TO_BLT_BUFFER, 41, 51, 0, 0, 4, 3, 0);
    holds("GraphicsOutput.Blt/moved-over-itself", back.iter().zip(&picture).all(|(a, b)| same(a, b)));
    // A part of a buffer, by its delta.
    let s = f(p, picture.as_mut_ptr(), gop::BLT_BUFFER_TO_VIDEO, 1, 1, 60, 60, 2, 2, 16);
    check("GraphicsOutput.Blt/part", &[OK], s);
    let _ = f(p, back.as_mut_ptr(), gop::BLT_VIDEO_TO_BLT_BUFFER, 60, 60, 0, 0, 2, 2, 0);
    let wanted = [5, 6, 9, 10];
    holds("GraphicsOutput.Blt/part-written", wanted.iter().enumerate().all(|(i, w)| same(&back[i], &picture[*w])));
    let buffer = back.as_mut_ptr();
    check("GraphicsOutput.Blt/unknown", &[INVALID], f(p, buffer, 4, 0, 0, 0, 0, 2, 2, 0));
    check("GraphicsOutput.Blt/no-width", &[INVALID], f(p, buffer, gop::BLT_VIDEO_FILL, 0, 0, 0, 0, 0, 2, 0));
    check("GraphicsOutput.Blt/no-height", &[INVALID], f(p, buffer, gop::BLT_VIDEO_FILL, 0, 0, 0, 0, 2, 0, 0));
    check(
        "GraphicsOutput.Blt/too-far-right",
        &[INVALID],
        f(p, buffer, gop::BLT_VIDEO_FILL, 0, 0, width - 1, 0, 2, 1, 0),
    );
    let s = f(p, buffer, gop::BLT_VIDEO_TO_BLT_BUFFER, 0, height, 0, 0, 1, 1, 0);
    check("GraphicsOutput.Blt/below-the-screen", &[INVALID], s);
    let s = f(p, buffer, gop::BLT_BUFFER_TO_VIDEO, 0, 0, width, 0, 1, 1, 0);
    check("GraphicsOutput.Blt/beside-the-screen", &[INVALID], s);
}
