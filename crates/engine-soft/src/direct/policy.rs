//! For which address spaces direct execution pays.
//!
//! Going in and coming back costs some ten microseconds, and every page that is used must be mapped first. So an address
//! space is tried when interrupts have found it in user mode a few times running, with few system calls and exceptions
//! between them, and an account is kept: time in guest code counts for what the translator would have taken longer,
//! everything else against it. Who is overdrawn is given up, and tried again after twice as many interrupts. Who has lost
//! since the last interrupt, with many calls and exceptions, is put off until it is calm again.

use x86::paging::PAGE_MASK;

/// Interrupts in user mode before the first try.
const FIRST: u32 = 2;
/// Most interrupts before a try.
const LAST: u32 = 256;
/// Milliseconds that may be lost by the first try, and by later ones.
const FIRST_LOSS: i64 = 60;
const LATER_LOSS: i64 = 30;
/// The translator takes this many times as long as the processor, beyond the processor's own time.
const GAIN: i64 = 4;
/// Milliseconds that are remembered as won.
const MOST_WON: i64 = 50;
/// Rounds of the run loop for which the translator goes on after it has left a page that it must have.
const LINGER: u32 = 24;

/// So many times in a row may code that cannot be executed directly be come to after a fifth of a millisecond.
const HOT: u32 = 8;

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
    /// The page (its linear address) of such code that is being executed by the translator.
    aside: Option<u64>,
    /// Rounds of the run loop for which the translator goes on behind it.
    linger: u32,
    /// Times lately that such a page was come to after a short stretch.
    hot: u32,
    /// Interrupts until it goes on, and how many they were at first.
    left: u32,
    pause: u32,
    /// Host TSC ticks in guest code since it went on.
    stretch: u64,
    /// Host TSC ticks won so far, at most [`MOST_WON`] milliseconds.
    account: i64,
    /// Host TSC ticks won since the last interrupt.
    lately: i64,
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
            aside: None,
            linger: 0,
            hot: 0,
            left: 0,
            pause: 1,
            stretch: 0,
            account: 0,
            lately: 0,
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

    /// An interrupt has come, in user mode or not. `calm`: since the last one few system calls and exceptions have ended direct
    /// execution, or would have.
    pub fn interrupted(&mut self, user: bool, calm: bool) {
        self.seen = if user && calm { self.seen.saturating_add(1) } else { self.seen.saturating_sub(1) };
    }

    /// Is it to be tried?
    pub fn wanted(&self) -> bool {
        !self.active && self.seen >= self.needed
    }

    /// It is executed directly from now on.
    pub fn begin(&mut self) {
        (self.active, self.suspended, self.account) = (true, false, 0);
        (self.pause, self.stretch) = (1, 0);
        (self.aside, self.hot) = (None, 0);
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

    /// Is code at this linear address to be executed directly now?
    pub fn now(&self, rip: u64) -> bool {
        self.active && !self.suspended && self.aside != Some(rip & !PAGE_MASK)
    }

    /// The page of this linear address has code that cannot be executed directly: the translator has it until it leaves the
    /// page. Says whether that is worth while: not if it comes and goes all the time. `second`: ticks of a second.
    pub fn step_aside(&mut self, rip: u64, second: u64) -> bool {
        let short = self.stretch < second / 5000;
        self.hot = if short { self.hot + 1 } else { self.hot / 2 };
        (self.aside, self.linger) = (Some(rip & !PAGE_MASK), LINGER);
        if self.hot < HOT {
            self.stretch = 0;
        }
        self.hot < HOT
    }

    /// Is code at this linear address to be executed directly in this round of the run loop? The translator goes on for some
    /// rounds after such a page: a function that it calls is often a short one.
    pub fn goes(&mut self, rip: u64) -> bool {
        if !self.active || self.suspended {
            return false;
        }
        match self.aside {
            None => true,
            Some(page) if page == rip & !PAGE_MASK => {
                self.linger = LINGER;
                false
            }
            Some(_) => {
                self.linger = self.linger.saturating_sub(1);
                self.linger == 0
            }
        }
    }

    /// It is executed directly again.
    pub fn back(&mut self) {
        self.aside = None;
    }

    /// Not for some interrupts: more and more, if it has hardly begun. (To go on costs the translator its jump tables.)
    /// `second`: ticks of a second.
    pub fn suspend(&mut self, second: u64) {
        self.pause = if self.always || self.stretch > second / 500 { 1 } else { (self.pause * 2).min(LAST) };
        (self.suspended, self.left, self.stretch) = (true, self.pause, 0);
        (self.aside, self.hot) = (None, 0);
    }

    /// An interrupt has come. Says whether it goes on now.
    pub fn resume(&mut self) -> bool {
        self.left = self.left.saturating_sub(1);
        self.suspended && self.left == 0 && {
            self.suspended = false;
            true
        }
    }

    /// Has it lost since this was asked last?
    pub fn has_lost(&mut self) -> bool {
        std::mem::take(&mut self.lately) < 0 && self.active && !self.always
    }

    /// Ticks spent: in guest code, and on everything around it. `second`: ticks of a second. Says whether to go on.
    pub fn spent(&mut self, guest: u64, around: u64, second: u64) -> bool {
        self.stretch = self.stretch.saturating_add(guest);
        let most = (second / 1000) as i64 * MOST_WON;
        let won = (GAIN * guest as i64).saturating_sub(around as i64);
        self.lately = self.lately.saturating_add(won);
        self.account = self.account.saturating_add(won).min(most);
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
        for (user, calm) in [(true, true), (false, true), (true, true), (true, false), (true, true)] {
            s.interrupted(user, calm);
        }
        assert!(!s.wanted());
        s.interrupted(true, true);
        assert!(s.wanted());
        s.begin();
        assert!(s.now(0x1000) && !s.wanted());
        s.suspend(1_000_000);
        assert!(!s.now(0x1000) && s.active() && !s.resume() && s.resume() && s.now(0x1000));
        s.suspend(1_000_000);
        assert!(!s.resume() && !s.resume() && !s.resume() && s.resume());
        // 60 milliseconds may be lost.
        let second = 1_000_000;
        assert!(s.spent(100_000, 1000, second));
        assert!(s.spent(0, 105_000, second), "what was won is bounded, but counts");
        assert!(!s.spent(0, 6_000, second));
        assert!(!Space { always: false, ..Space::default() }.spent(0, 65_000, second));
        assert!(Space { always: true, ..Space::default() }.spent(0, 65_000, second));
        s.end();
        for _ in 0..3 {
            s.interrupted(true, true);
        }
        assert!(!s.wanted());
        s.interrupted(true, true);
        assert!(s.wanted());
        s.begin();
        assert!(s.loaded(6, false), "another address space");
        assert!(!s.active());
    }

    #[test]
    fn a_page_is_left_to_the_translator_until_code_has_left_it() {
        let second = 1_000_000;
        let mut s = Space::default();
        s.loaded(5, false);
        s.begin();
        s.spent(1000, 0, second);
        assert!(s.goes(0x1234) && s.step_aside(0x1234, second));
        assert!(!s.goes(0x1fff) && !s.now(0x1000) && s.now(0x2000));
        for _ in 1..LINGER {
            assert!(!s.goes(0x2000));
        }
        assert!(s.goes(0x2000));
        // It comes back there: from the beginning.
        assert!(!s.goes(0x1000) && !s.goes(0x2000));
        s.back();
        assert!(s.goes(0x1000));
        // To and fro all the time.
        assert_eq!((0..HOT).filter(|_| s.step_aside(0x1000, second)).count() as u32, HOT - 1);
        s.suspend(second);
        assert!(!s.goes(0x2000) && s.active());
    }

    #[test]
    fn what_was_lost_since_the_last_interrupt_is_asked_once() {
        let mut s = Space::default();
        s.loaded(5, false);
        s.begin();
        s.spent(10, 1000, 1_000_000);
        assert!(s.has_lost() && !s.has_lost());
        s.spent(1000, 10, 1_000_000);
        assert!(!s.has_lost());
    }
}
