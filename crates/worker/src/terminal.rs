//! The user's terminal: raw while the guest has it, always restored.
//!
//! Restored when the guard is dropped, when the program panics ([`RawTerminal::enter`] installs a hook), and by whoever
//! ends the process in another way ([`restore`]); signals that would end the process are caught by the worker, which
//! then ends in the ordinary way.

use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcsetattr};
use std::sync::{Mutex, Once};

/// The key that leaves the guest: Ctrl-].
pub const ESCAPE: u8 = 0x1d;

/// Settings to go back to, while the terminal is raw.
static SAVED: Mutex<Option<Termios>> = Mutex::new(None);

/// While it lives, standard input is a raw terminal.
pub struct RawTerminal(());

impl RawTerminal {
    /// Makes standard input raw, if it is a terminal (`None` if it is not).
    pub fn enter() -> std::io::Result<Option<Self>> {
        let stdin = std::io::stdin();
        if !isatty(&stdin) {
            return Ok(None);
        }
        static HOOK: Once = Once::new();
        HOOK.call_once(|| {
            let previous = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |info| {
                // The message needs a terminal that breaks lines; after a panic the worker ends in any case.
                restore();
                previous(info);
            }));
        });
        let old = tcgetattr(&stdin)?;
        let mut raw = old.clone();
        raw.make_raw();
        *SAVED.lock().unwrap_or_else(|e| e.into_inner()) = Some(old);
        tcsetattr(&stdin, OptionalActions::Flush, &raw)?;
        Ok(Some(Self(())))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
    }
}

/// Restores the terminal, if it is raw.
pub fn restore() {
    let mut saved = SAVED.lock().unwrap_or_else(|e| e.into_inner());
    // A thread that may not do it (a VP's, when it panics) leaves it to the next; nothing better can be done if the
    // terminal has gone away.
    if saved.as_ref().is_some_and(|old| tcsetattr(std::io::stdin(), OptionalActions::Drain, old).is_ok()) {
        *saved = None;
    }
}
