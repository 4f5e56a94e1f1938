//! How other threads get a VP's attention: its attention word, and its sleep on that word.

use crate::direct::process::Interrupter;
use crate::vp::attention;
use std::ptr::NonNull;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

/// The attention word of a VP that has been taken; the VP detaches it before its block is freed.
struct Word(NonNull<AtomicU32>);

// SAFETY: the word is an atomic, and it is only reached under the mutex that `detach` takes before it goes away.
unsafe impl Send for Word {}

/// Raises [`attention`] bits of one VP from any thread and wakes it if it sleeps.
pub struct Waker {
    word: Mutex<Option<Word>>,
    /// The process that executes for the VP ([`crate::direct`]).
    process: Mutex<Option<Interrupter>>,
    /// Bits raised while there is no word.
    early: AtomicU32,
    /// The VP is in [`Waker::sleep`].
    sleeping: AtomicBool,
    /// The VP may be using translations: it executes guest code.
    inside: AtomicBool,
}

impl Waker {
    /// For a VP that has not been taken yet.
    pub fn new() -> Self {
        Self {
            word: Mutex::new(None),
            process: Mutex::new(None),
            early: AtomicU32::new(0),
            sleeping: AtomicBool::new(false),
            inside: AtomicBool::new(false),
        }
    }

    /// Raises bits.
    pub fn raise(&self, bits: u32) {
        let word = self.word.lock().unwrap_or_else(|e| e.into_inner());
        match &*word {
            Some(Word(word)) => {
                // SAFETY: `detach` has not been called, so the VP's block is alive.
                let word = unsafe { word.as_ref() };
                let old = word.fetch_or(bits, Ordering::SeqCst);
                // The sleeper announces itself, then looks at the word; this side writes the word, then looks for a
                // sleeper: one sees the other.
                if old & bits != bits {
                    if self.sleeping.load(Ordering::SeqCst) {
                        futex_wake(word);
                    }
                    // In the same way: the VP announces the process, then looks at the word.
                    if let Some(process) = &*self.process.lock().unwrap_or_else(|e| e.into_inner()) {
                        process.interrupt();
                    }
                }
            }
            None => {
                self.early.fetch_or(bits, Ordering::SeqCst);
            }
        }
    }

    /// From now on bits go to this word.
    ///
    /// # Safety
    /// The word must stay valid until [`Waker::detach`].
    pub unsafe fn attach(&self, word: &AtomicU32) {
        let mut slot = self.word.lock().unwrap_or_else(|e| e.into_inner());
        *slot = Some(Word(NonNull::from(word)));
        word.fetch_or(self.early.swap(0, Ordering::SeqCst), Ordering::SeqCst);
    }

    /// The word goes away.
    pub fn detach(&self) {
        let mut slot = self.word.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(Word(word)) = slot.take() {
            // SAFETY: the word is valid until this call ends.
            let left = unsafe { word.as_ref() }.load(Ordering::SeqCst);
            self.early.fetch_or(left & (attention::KICK | attention::INTERRUPT), Ordering::SeqCst);
        }
    }

    /// Sleeps until the word is not zero or the time is over. On the VP's own thread.
    pub fn sleep(&self, word: &AtomicU32, timeout: Option<Duration>) {
        self.sleeping.store(true, Ordering::SeqCst);
        futex_wait(word, 0, timeout);
        self.sleeping.store(false, Ordering::SeqCst);
    }

    /// The process that executes for the VP now: it is to be interrupted when bits are raised. The caller looks at the word
    /// afterwards.
    pub fn interrupt_too(&self, process: Option<Interrupter>) {
        *self.process.lock().unwrap_or_else(|e| e.into_inner()) = process;
    }

    /// Says whether the VP executes guest code; returns what was said before. On the VP's own thread.
    pub fn set_inside(&self, inside: bool) -> bool {
        self.inside.swap(inside, Ordering::SeqCst)
    }

    /// Is the VP executing guest code?
    pub fn is_inside(&self) -> bool {
        self.inside.load(Ordering::SeqCst)
    }
}

impl Default for Waker {
    fn default() -> Self {
        Self::new()
    }
}

/// Waits while the word has this value; wakes early for no reason at times.
pub(crate) fn futex_wait(word: &AtomicU32, value: u32, timeout: Option<Duration>) {
    let spec = timeout.map(|t| libc::timespec {
        tv_sec: i64::try_from(t.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(t.subsec_nanos()),
    });
    let spec = spec.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: the word and the time outlive the call; FUTEX_WAIT only reads them.
    unsafe {
        libc::syscall(
            libc::SYS_futex,
            std::ptr::from_ref(word),
            libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG,
            value,
            spec,
        );
    }
}

/// Wakes every thread that waits on the word.
pub(crate) fn futex_wake(word: &AtomicU32) {
    // SAFETY: FUTEX_WAKE uses the address as a name only.
    unsafe {
        libc::syscall(libc::SYS_futex, std::ptr::from_ref(word), libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG, i32::MAX);
    }
}

/// Timers of the calling thread end on time, not up to 50 us later (the default slack).
pub(crate) fn exact_timers() {
    // SAFETY: changes an attribute of the calling thread only.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1 as libc::c_ulong) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::time::Instant;

    #[test]
    fn early_bits_arrive_and_sleep_ends() {
        let waker = Arc::new(Waker::new());
        let word = Box::new(AtomicU32::new(0));
        waker.raise(attention::KICK);
        // SAFETY: detached below, before the word goes away.
        unsafe { waker.attach(&word) };
        assert_eq!(word.swap(0, Ordering::SeqCst), attention::KICK);
        let other = waker.clone();
        let thread = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            other.raise(attention::INTERRUPT);
        });
        let start = Instant::now();
        while word.load(Ordering::SeqCst) == 0 && start.elapsed() < Duration::from_secs(120) {
            waker.sleep(&word, Some(Duration::from_secs(120)));
        }
        assert_eq!(word.load(Ordering::SeqCst), attention::INTERRUPT);
        // (A host that is suspended for a while is not asleep here.)
        assert!(start.elapsed() < Duration::from_secs(100));
        thread.join().unwrap();
        waker.detach();
    }
}
