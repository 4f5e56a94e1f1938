//! Which mebibytes of a VHDX are taken, which are free, and which of the free ones may be used.
//!
//! A block that is handed out must durably read as zeros: then its BAT entry may reach the disk before or after its
//! data, and a power cut never shows a guest what was there before. Space beyond the old end of the file is such space.
//! Space that a block has given up becomes so in steps: the BAT change is durable, requests on it have ended, it has
//! been punched, the punching has been synced.

use std::collections::VecDeque;

/// The unit of allocation: 1 MiB.
pub(crate) const UNIT: u64 = 1 << 20;

/// A range in units.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Run {
    pub start: u64,
    pub count: u64,
}

#[derive(Default)]
pub(crate) struct Space {
    /// One bit a unit: taken by a region or a block, or on its way to being clean.
    used: Vec<u64>,
    /// One bit a unit: free and durably zero.
    clean: Vec<u64>,
    clean_count: u64,
    /// Where the search for clean space goes on.
    hint: u64,
    /// First unit that was never handed out; everything from here to the file's end reads as zeros.
    pub tail: u64,
    /// Given up in memory; waits for the next commit to take it.
    pub freed: Vec<Run>,
    /// Given up in the commit that is under way.
    pub committing: Vec<Run>,
    /// Durably given up; waits until the requests of its epoch have ended.
    pub draining: VecDeque<(u64, Run)>,
    /// Found free but of unknown content when the image was opened.
    pub unclean: VecDeque<Run>,
    /// Punched, not yet synced.
    pub punched: Vec<Run>,
    /// Punched, and a sync that covers it is under way.
    pub syncing: Vec<Run>,
}

impl Space {
    fn ensure(v: &mut Vec<u64>, unit: u64) {
        let words = (unit / 64 + 1) as usize;
        if v.len() < words {
            v.resize(words, 0);
        }
    }

    /// Marks a run as taken; the first unit that already was, if any.
    pub fn take(&mut self, run: Run) -> Result<(), u64> {
        let end = run.start + run.count;
        Self::ensure(&mut self.used, end);
        for u in run.start..end {
            let (w, b) = ((u / 64) as usize, 1u64 << (u % 64));
            if self.used[w] & b != 0 {
                return Err(u);
            }
            self.used[w] |= b;
        }
        self.tail = self.tail.max(end);
        Ok(())
    }

    /// After all `take`s of opening: what lies between them is free, of unknown content.
    pub fn find_holes(&mut self) {
        Self::ensure(&mut self.used, self.tail);
        let mut u = 0;
        while u < self.tail {
            let w = self.used[(u / 64) as usize];
            if u % 64 == 0 && w == u64::MAX {
                u += 64;
                continue;
            }
            if w >> (u % 64) & 1 != 0 {
                u += 1;
                continue;
            }
            let start = u;
            while u < self.tail && self.used[(u / 64) as usize] >> (u % 64) & 1 == 0 {
                u += 1;
            }
            self.unclean.push_back(Run { start, count: u - start });
        }
        // Unclean space counts as taken until it has been cleaned.
        let holes: Vec<Run> = self.unclean.iter().copied().collect();
        for r in holes {
            let _ = self.take(r);
        }
    }

    pub fn make_clean(&mut self, run: Run) {
        let end = run.start + run.count;
        Self::ensure(&mut self.used, end);
        Self::ensure(&mut self.clean, end);
        for u in run.start..end {
            let (w, b) = ((u / 64) as usize, 1u64 << (u % 64));
            self.used[w] &= !b;
            self.clean[w] |= b;
        }
        self.clean_count += run.count;
    }

    /// A run of clean units inside the file, if there is one.
    pub fn take_clean(&mut self, count: u64) -> Option<Run> {
        if self.clean_count < count {
            return None;
        }
        let total = self.clean.len() as u64 * 64;
        let start = self.find_clean(self.hint, total, count).or_else(|| self.find_clean(0, total, count))?;
        for u in start..start + count {
            let (w, b) = ((u / 64) as usize, 1u64 << (u % 64));
            self.clean[w] &= !b;
            self.used[w] |= b;
        }
        self.clean_count -= count;
        self.hint = start + count;
        Some(Run { start, count })
    }

    fn find_clean(&self, from: u64, to: u64, count: u64) -> Option<u64> {
        let (mut run, mut u) = (0, from);
        while u < to {
            let w = self.clean[(u / 64) as usize];
            if u % 64 == 0 && w == 0 {
                run = 0;
                u += 64;
                continue;
            }
            run = if w >> (u % 64) & 1 != 0 { run + 1 } else { 0 };
            u += 1;
            if run == count {
                return Some(u - count);
            }
        }
        None
    }

    /// A run at the end of the file; the caller extends the file if [`Space::tail`] has passed its length.
    pub fn take_tail(&mut self, count: u64) -> Run {
        let run = Run { start: self.tail, count };
        self.tail += count;
        Self::ensure(&mut self.used, self.tail);
        for u in run.start..self.tail {
            self.used[(u / 64) as usize] |= 1 << (u % 64);
        }
        run
    }

    /// Where the file may be cut: after the last unit that is not clean.
    pub fn end(&self) -> u64 {
        let mut end = self.tail;
        while end > 0 && self.clean.get(((end - 1) / 64) as usize).is_some_and(|w| w >> ((end - 1) % 64) & 1 != 0) {
            end -= 1;
        }
        end
    }

    /// Forgets clean space from `end` on, because the file is being cut there.
    pub fn cut(&mut self, end: u64) {
        for u in end..self.tail {
            let (w, b) = ((u / 64) as usize, 1u64 << (u % 64));
            if let Some(c) = self.clean.get_mut(w)
                && *c & b != 0
            {
                *c &= !b;
                self.clean_count -= 1;
            }
            self.used[w] &= !b;
        }
        self.tail = end;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_become_usable_only_when_cleaned() {
        let mut s = Space::default();
        s.take(Run { start: 0, count: 4 }).unwrap();
        s.take(Run { start: 70, count: 2 }).unwrap();
        assert_eq!(s.take(Run { start: 71, count: 1 }), Err(71));
        s.find_holes();
        assert_eq!(s.unclean, [Run { start: 4, count: 66 }]);
        assert_eq!(s.take_clean(1), None);
        s.make_clean(Run { start: 60, count: 10 });
        assert_eq!(s.take_clean(8), Some(Run { start: 60, count: 8 }));
        assert_eq!(s.take_clean(8), None);
        assert_eq!(s.take_tail(3), Run { start: 72, count: 3 });
        assert_eq!(s.end(), 75);
        s.make_clean(Run { start: 72, count: 3 });
        assert_eq!(s.end(), 72);
        s.cut(72);
        assert_eq!(s.take_clean(3), None);
        assert_eq!(s.take_clean(2), Some(Run { start: 68, count: 2 }));
    }
}
