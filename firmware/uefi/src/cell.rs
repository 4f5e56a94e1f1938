//! State that is shared by everything that runs on the firmware's one processor.

use crate::arch;
use core::cell::{Cell, UnsafeCell};

/// A value in a static. Borrowing it holds interrupts off, so that an event's notification never finds it half-changed;
/// borrowing it twice at once is a defect of the firmware and stops it.
pub struct Global<T> {
    value: UnsafeCell<T>,
    borrowed: Cell<bool>,
}

// SAFETY: one processor runs the firmware, and `with` keeps interrupts off; no two borrows exist at a time.
unsafe impl<T> Sync for Global<T> {}

impl<T> Global<T> {
    pub const fn new(value: T) -> Self {
        Self { value: UnsafeCell::new(value), borrowed: Cell::new(false) }
    }

    /// Runs `f` with the value. `f` must not call out of the firmware.
    pub fn with<R>(&self, f: impl FnOnce(&mut T) -> R) -> R {
        let interrupts = arch::interrupts_off();
        if self.borrowed.replace(true) {
            panic!("state of the firmware is borrowed twice");
        }
        // SAFETY: `borrowed` was false: no other borrow exists, and none can start while it is true.
        let result = f(unsafe { &mut *self.value.get() });
        self.borrowed.set(false);
        arch::interrupts_restore(interrupts);
        result
    }
}
