//! Periodic interrupts that a guest has not taken yet.
//!
//! A real processor is always there to take a tick. A virtual one may be without a host processor for longer than a tick
//! lasts; then several ticks are one in the edge-triggered latch, and a guest that counts ticks against another clock (as
//! Linux does when it checks its timer) finds some missing. They are kept here and delivered one after the other, each as
//! soon as the one before it was taken.

/// Ticks kept at most. A guest that leaves more untaken does not listen to the timer (any more).
const MOST: u64 = 250;

/// The ticks of one timer.
#[derive(Clone, Copy, Debug, Default)]
pub struct Backlog {
    /// The guest takes these interrupts, and somebody tells us when.
    listening: bool,
    /// One was delivered and not taken.
    outstanding: bool,
    owed: u64,
}

impl Backlog {
    /// Ticks have come at which the line rises once.
    pub fn came(&mut self, ticks: u64) {
        let merged = if self.outstanding { ticks } else { ticks.saturating_sub(1) };
        self.outstanding = true;
        if self.listening {
            self.owed += merged;
            if self.owed > MOST {
                *self = Self::default();
            }
        }
    }

    /// The guest has taken one. True: the line is to rise again for the next.
    pub fn taken(&mut self) -> bool {
        self.listening = true;
        self.outstanding = self.owed > 0;
        self.owed = self.owed.saturating_sub(1);
        self.outstanding
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missed_ticks_come_one_after_the_other() {
        let mut b = Backlog::default();
        b.came(1);
        assert!(!b.taken(), "nothing was missed");
        b.came(1);
        b.came(1);
        b.came(3);
        assert_eq!((0..6).map(|_| b.taken()).collect::<Vec<_>>(), [true, true, true, true, false, false]);
    }

    #[test]
    fn nobody_is_flooded_who_does_not_listen() {
        let mut b = Backlog::default();
        for _ in 0..1000 {
            b.came(1);
        }
        assert!(!b.taken(), "ticks before the first that was taken are lost");
        for _ in 0..1000 {
            b.came(1);
        }
        let mut again = 0;
        while b.taken() {
            again += 1;
        }
        assert!(again <= MOST, "{again}");
    }
}
