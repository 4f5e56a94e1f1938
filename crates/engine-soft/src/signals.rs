//! Synchronous signals raised by guest instructions that the host's own unit executes (SIGFPE, SIGILL, SIGSEGV for a misaligned
//! operand).
//!
//! The handler is the process's; signals that are not ours go to whoever was installed before.

use std::sync::Once;

const SIGNALS: [i32; 3] = [libc::SIGFPE, libc::SIGILL, libc::SIGSEGV];
static mut PREVIOUS: [std::mem::MaybeUninit<libc::sigaction>; 3] = [const { std::mem::MaybeUninit::uninit() }; 3];

/// Installs the handler, once in a process.
pub fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        for (i, signal) in SIGNALS.into_iter().enumerate() {
            // SAFETY: a zeroed sigaction is valid; `PREVIOUS` is written before the handler that reads it can run for
            // this signal, because sigaction stores it before it returns and installs atomically with it.
            unsafe {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = handler as *const () as usize;
                action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
                libc::sigaction(signal, &action, (&raw mut PREVIOUS[i]).cast());
            }
        }
    });
}

unsafe extern "C" fn handler(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel gives a ucontext to SA_SIGINFO handlers.
    if unsafe {
        crate::native::take_signal(signal, context.cast()) || crate::translate::run::take_signal(context.cast())
    } {
        return;
    }
    let Some(i) = SIGNALS.iter().position(|s| *s == signal) else { return };
    // SAFETY: `install` has stored the previous action; its own flags say how its handler is to be called. A default
    // action is reinstated, so that the instruction faults again and the process dies as it would have.
    unsafe {
        let previous = &*(&raw const PREVIOUS[i]).cast::<libc::sigaction>();
        match previous.sa_sigaction {
            libc::SIG_DFL | libc::SIG_IGN => {
                libc::sigaction(signal, previous, std::ptr::null_mut());
            }
            f if previous.sa_flags & libc::SA_SIGINFO != 0 => {
                let f: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) = std::mem::transmute(f);
                f(signal, info, context);
            }
            f => {
                let f: extern "C" fn(i32) = std::mem::transmute(f);
                f(signal);
            }
        }
    }
}
