//! For which address spaces direct execution pays.
//!
//! Going in and coming back costs some ten microseconds, and every page that is used must be mapped first. So an address
//! space is tried when interrupts have found it in user mode a few times running, and an account is kept: time in guest
//! code counts for what the translator would have taken longer, everything else against it. Who is overdrawn is given up,
//! and tried again after twice as many interrupts.

/// Interrupts in user mode before the first try.
const FIRST: u32 = 4;
/// Most interrupts before a try.
const LAST: u32 = 256;
/// Milliseconds that may be lost by the first try, and by later ones.
const FIRST_LOSS: i64 = 40;
const LATER_LOSS: i64 = 20;
/// The translator takes this many times as long as the processor, beyond the processor's own time.
const GAIN: i64 = 3;

/// What is known of an address space.
#[derive(Debug)]
pub struct Space {
    /// Physical address of the top-level page table that it was when this began.
    root: u64,
    /// Interrupts in user mode lately.
    seen: u32,
    /// So many are needed for a try.
    needed: u32,
    active: bool,
    /// Tried at once and never given up ([`partition::DirectMode::Always`]).
    always: bool,
    /// Not until the next interrupt: it executes code that cannot be executed directly.
    suspended: bool,
    /// Interrupts until it goes on, and how many they were at first.
    left: u32,
    pause: u32,
    /// Host TSC ticks in guest code since it went on.
    stretch: u64,
    /// Host TSC ticks won so far, at most [`Space::most`].
    account: i64,
}

impl Default for Space {
    fn default() -> Self {
        Self {
            root: u64::MAX,
            seen: 0,
            needed: FIRST,
            active: false,
            always: false,
            suspended: false,
            left: 0,
            pause: 1,
            stretch: 0,
            account: 0,
        }
    }
}

impl Space {
    /// The address space is loaded. Says whether it is another one than before, which had been executed directly.
    pub fn loaded(&mut self, root: u64, always: bool) -> bool {
        if self.root == root {
            return false;
        }
        let active = self.active;
        let needed = if always { 0 } else { FIRST };
        *self = Self { root, always, needed, ..Self::default() };
        active
    }

    /// An interrupt has come, in user mode or not.
    pub fn interrupted(&mut self, user: bool) {
        self.seen = if user { self.seen.saturating_add(1) } else { self.seen.saturating_sub(1) };
    }

    /// Is it to be tried?
    pub fn wanted(&self) -> bool {
        !self.active && self.seen >= self.needed
    }

    /// It is executed directly from now on.
    pub fn begin(&mut self) {
        (self.active, self.suspended, self.account) = (true, false, 0);
        (self.pause, self.stretch) = (1, 0);
    }

    /// It is not any more, and is tried again later.
    pub fn end(&mut self) {
        self.active = false;
        self.seen = 0;
        self.needed = (self.needed * 2).min(LAST);
    }

    /// It is not any more, through no fault of its own.
    pub fn put_off(&mut self) {
        self.active = false;
        self.seen = 0;
    }

    /// Is it executed directly (though perhaps not now)?
    pub fn active(&self) -> bool {
        self.active
    }

    /// Is it to be executed directly now?
    pub fn now(&self) -> bool {
        self.active && !self.suspended
    }

    /// Not for some interrupts: more and more, if it has hardly begun. (To go on costs the translator its jump tables.)
    /// `second`: ticks of a second.
    pub fn suspend(&mut self, second: u64) {
        self.pause = if self.always || self.stretch > second / 500 { 1 } else { (self.pause * 2).min(LAST) };
        (self.suspended, self.left, self.stretch) = (true, self.pause, 0);
    }

    /// An interrupt has come. Says whether it goes on now.
    pub fn resume(&mut self) -> bool {
        self.left = self.left.saturating_sub(1);
        self.suspended && self.left == 0 && {
            self.suspended = false;
            true
        }
    }

    /// Ticks spent: in guest code, and on everything around it. `second`: ticks of a second. Says whether to go on.
    pub fn spent(&mut self, guest: u64, around: u64, second: u64) -> bool {
        self.stretch = self.stretch.saturating_add(guest);
        let most = (second / 100) as i64;
        self.account = self.account.saturating_add(GAIN * guest as i64).saturating_sub(around as i64).min(most);
        // What a program's pages cost at first may be lost; less of it when it has been lost once.
        let least = if self.needed <= FIRST { FIRST_LOSS } else { LATER_LOSS };
        self.always || self.account > -((second / 1000) as i64 * least)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_space_is_tried_when_it_stays_in_user_mode_and_given_up_when_it_does_not_pay() {
        let mut s = Space::default();
        assert!(!s.loaded(5, false) && !s.wanted());
        for user in [true, true, false, true, true] {
            s.interrupted(user);
        }
        assert!(!s.wanted());
        s.interrupted(true);
        assert!(s.wanted());
        s.begin();
        assert!(s.now() && !s.wanted());
        s.suspend(1_000_000);
        assert!(!s.now() && s.active() && !s.resume() && s.resume() && s.now());
        s.suspend(1_000_000);
        assert!(!s.resume() && !s.resume() && !s.resume() && s.resume());
        // 40 milliseconds may be lost.
        let second = 1_000_000;
        assert!(s.spent(100_000, 1000, second));
        assert!(s.spent(0, 45_000, second), "what was won is bounded, but counts");
        assert!(!s.spent(0, 5_000, second));
        assert!(!Space { always: false, ..Space::default() }.spent(0, 45_000, second));
        assert!(Space { always: true, ..Space::default() }.spent(0, 45_000, second));
        s.end();
        for _ in 0..7 {
            s.interrupted(true);
        }
        assert!(!s.wanted());
        s.interrupted(true);
        assert!(s.wanted());
        s.begin();
        assert!(s.loaded(6, false), "another address space");
        assert!(!s.active());
    }
}
