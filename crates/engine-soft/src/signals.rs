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

/// Prepares the thread for executing translated code, whose stack pointer is not that of a stack for signal handlers: signals
/// from outside are blocked (other threads take them), and those of instructions get a stack of their own.
pub fn prepare_thread() {
    thread_local! {
        static PREPARED: Option<AlternateStack> = {
            // SAFETY: plain calls on a local set.
            unsafe {
                let mut set: libc::sigset_t = std::mem::zeroed();
                libc::sigfillset(&mut set);
                for signal in SIGNALS.into_iter().chain([libc::SIGBUS, libc::SIGTRAP, libc::SIGABRT, libc::SIGSYS]) {
                    libc::sigdelset(&mut set, signal);
                }
                libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
            }
            AlternateStack::install()
        };
    }
    PREPARED.with(|_| ());
}

/// A signal stack for a thread that has none. (Threads of the standard library have one.)
struct AlternateStack(Box<[u8]>);

impl AlternateStack {
    /// Room for the largest register state, and for the handler.
    const SIZE: usize = 64 << 10;

    fn install() -> Option<Self> {
        // SAFETY: the structure is the kernel's; the memory lives until `drop` takes the stack away.
        unsafe {
            let mut present: libc::stack_t = std::mem::zeroed();
            libc::sigaltstack(std::ptr::null(), &mut present);
            if present.ss_flags & libc::SS_DISABLE == 0 && present.ss_size >= 16 << 10 {
                return None;
            }
            let mut memory = vec![0u8; Self::SIZE].into_boxed_slice();
            let stack = libc::stack_t { ss_sp: memory.as_mut_ptr().cast(), ss_flags: 0, ss_size: Self::SIZE };
            libc::sigaltstack(&stack, std::ptr::null_mut());
            Some(Self(memory))
        }
    }
}

impl Drop for AlternateStack {
    fn drop(&mut self) {
        let _ = &self.0;
        // SAFETY: no handler runs on it: this is the thread's own end.
        unsafe {
            let mut none: libc::stack_t = std::mem::zeroed();
            none.ss_flags = libc::SS_DISABLE;
            libc::sigaltstack(&none, std::ptr::null_mut());
        }
    }
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
