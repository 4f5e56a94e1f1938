//! Text in and out, on the screen and on COM1; graphics.
//!
//! One console feeds both: every character goes to the screen (if the machine has one) and to COM1 (if it has one), and
//! keys come from the synthetic keyboard and from COM1.

pub mod graphics;
pub mod input;
pub mod output;
pub mod serial;
mod serial_io;

use crate::config;
use core::fmt::{self, Write};

/// Finds COM1, so that early failures can be said.
pub fn init_serial() {
    serial::init(config::flags() & config::flags::SERIAL != 0);
}

/// Installs the protocols and the console fields of the system table.
pub fn init() {
    graphics::init();
    output::init();
    input::init();
    serial_io::init();
}

/// Says something when nothing else works any more.
pub fn emergency(args: fmt::Arguments<'_>) {
    struct Raw;
    impl Write for Raw {
        fn write_str(&mut self, s: &str) -> fmt::Result {
            s.bytes().for_each(serial::send);
            graphics::emergency(s);
            Ok(())
        }
    }
    let _ = Raw.write_fmt(args);
}

/// Writes to the console.
pub fn write(args: fmt::Arguments<'_>) {
    struct Out;
    impl Write for Out {
        fn write_str(&mut self, s: &str) -> fmt::Result {
            for c in s.chars() {
                if c == '\n' {
                    output::put('\r');
                }
                output::put(c);
            }
            Ok(())
        }
    }
    let _ = Out.write_fmt(args);
}

/// Prints to the console.
#[macro_export]
macro_rules! print {
    ($($arg:tt)*) => { $crate::console::write(format_args!($($arg)*)) };
}
