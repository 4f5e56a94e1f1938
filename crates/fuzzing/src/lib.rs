//! # fuzzing: what fuzz targets have in common
//!
//! A generator that a seed determines ([`Rng`]), and the loop in which a target runs ([`rounds`]): for as long as one
//! likes, with the seed of a failing round named, a panic on any thread noticed, and the growth of the process bounded.
//!
//! | variable | meaning |
//! | --- | --- |
//! | `VIRIDIAN_FUZZ_SECONDS` | how long each target runs, instead of its own default |
//! | `VIRIDIAN_FUZZ_ROUNDS` | how many rounds each target runs at least, however long that takes |
//! | `VIRIDIAN_FUZZ_SEED` | the seed of its first round (default 1); each further round has the next one |
//!
//! For tests only: nothing of the product uses it, and it uses nothing of the product.
#![forbid(unsafe_code)]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// xorshift64* (Vigna 2016): enough for tests.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// Neighbouring seeds give sequences that have nothing to do with each other.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// Any number. (Not an iterator: it has no end.)
    #[allow(clippy::should_implement_trait)]
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `n`; 0 for `n` = 0.
    pub fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 11) % n.max(1)
    }

    /// True once in `n` times.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    /// One of these, of which there must be at least one.
    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }

    /// Numbers at which code goes wrong: edges, powers of two, and numbers of any size.
    pub fn odd(&mut self) -> u64 {
        const EDGES: [u64; 16] =
            [0, 1, 2, 3, 4, 7, 8, 16, 4095, 4096, 4097, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff, u64::MAX, 1 << 52];
        match self.below(3) {
            0 => self.pick(&EDGES),
            1 => 1 << self.below(64),
            _ => self.next() >> self.below(64),
        }
    }

    /// Fills with any bytes.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            let value = self.next().to_le_bytes();
            chunk.copy_from_slice(&value[..chunk.len()]);
        }
    }

    /// Any bytes.
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.fill(&mut bytes);
        bytes
    }

    /// Changes up to three places, and sometimes cuts the end off.
    pub fn damage(&mut self, bytes: &mut Vec<u8>) {
        for _ in 0..self.below(4) {
            let at = self.below(bytes.len() as u64 + 1) as usize;
            let new = self.odd().to_le_bytes();
            let len = self.pick(&[1usize, 2, 4, 8]).min(bytes.len() - at);
            bytes[at..at + len].copy_from_slice(&new[..len]);
        }
        if self.one_in(10) {
            bytes.truncate(self.below(bytes.len() as u64 + 1) as usize);
        }
    }
}

/// Growth of the process that is accepted: caches, and what is being taken apart on other threads.
const MOST_GROWTH_MIB: u64 = 400;
/// Growth of the address space that is accepted, at its peak: what a round asks for and gives back counts here. Threads
/// take some of it for their stacks and heaps.
const MOST_PEAK_MIB: u64 = 3000;
/// Rounds that run however short the time is.
const LEAST_ROUNDS: u64 = 20;
/// How often a long run says how far it is.
const REPORT: Duration = Duration::from_secs(300);

/// A panic on any thread: those of devices are joined without a look at how they ended.
static PANICKED: AtomicBool = AtomicBool::new(false);
static HOOK: Once = Once::new();

/// Runs rounds of the target `name` until its time (`default` unless the environment says otherwise) is up. Gives the
/// number of rounds.
///
/// # Panics
/// When a round, or a thread that it has started, panics; and when the process grows without bound.
pub fn rounds(name: &str, default: Duration, mut round: impl FnMut(&mut Rng)) -> u64 {
    HOOK.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            PANICKED.store(true, Ordering::SeqCst);
            usual(info);
        }));
    });
    let begun = Instant::now();
    let time = number("VIRIDIAN_FUZZ_SECONDS").map_or(default, Duration::from_secs);
    let least = number("VIRIDIAN_FUZZ_ROUNDS").unwrap_or(0).max(LEAST_ROUNDS);
    let first = number("VIRIDIAN_FUZZ_SEED").unwrap_or(1);
    let (mut count, mut before, mut reported) = (0u64, Use::default(), Duration::ZERO);
    let say = |count: u64, before: &Use| {
        let now = Use::now();
        let (wall, busy) = (begun.elapsed().as_secs_f64(), now.busy.as_secs_f64());
        let grown = now.resident_mib.saturating_sub(before.resident_mib);
        let peak = now.peak_mib.saturating_sub(before.peak_mib);
        println!(
            "fuzz {name}: {count} rounds from seed {first} in {wall:.1} s ({busy:.1} s of the processor); \
             {grown} MiB more resident, {peak} MiB more address space at the peak"
        );
        assert!(grown < MOST_GROWTH_MIB, "{name}: the process has grown by {grown} MiB in {count} rounds");
        assert!(peak < MOST_PEAK_MIB, "{name}: the process asked for {peak} MiB in {count} rounds");
    };
    while count < least || begun.elapsed() < time {
        let seed = first.wrapping_add(count);
        let mut rng = Rng::new(seed);
        let result = catch_unwind(AssertUnwindSafe(|| round(&mut rng)));
        assert!(result.is_ok(), "{name}: a panic in this round: VIRIDIAN_FUZZ_SEED={seed} brings it again");
        assert!(
            !PANICKED.load(Ordering::SeqCst),
            "{name}: a panic on another thread, see above: one of a device of this round (VIRIDIAN_FUZZ_SEED={seed}), or \
             that of another target in the same process"
        );
        count += 1;
        // By now everything that is made once has been made.
        if count == LEAST_ROUNDS {
            before = Use::now();
        }
        if count > LEAST_ROUNDS && begun.elapsed() - reported > REPORT {
            reported = begun.elapsed();
            say(count, &before);
        }
    }
    say(count, &before);
    count
}

/// Processor time that the calling thread has used since [`Effort::begin`]: what an endless loop uses up, and what a busy
/// or suspended host leaves as it is. Tests whether something ends soon go by it, and not by the clock on the wall.
pub struct Effort(Duration);

impl Effort {
    /// From now on.
    pub fn begin() -> Self {
        Self(Self::of_thread())
    }

    /// Until now, on the same thread.
    pub fn spent(&self) -> Duration {
        Self::of_thread().saturating_sub(self.0)
    }

    fn of_thread() -> Duration {
        let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
        Duration::new(time.tv_sec.try_into().unwrap_or(0), time.tv_nsec.try_into().unwrap_or(0))
    }
}

/// A number in the environment.
fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text} is not a number")))
}

/// What the process uses.
#[derive(Default)]
struct Use {
    /// Time on the processors, of all threads.
    busy: Duration,
    /// Memory that is there now.
    resident_mib: u64,
    /// The most address space that there has been.
    peak_mib: u64,
}

impl Use {
    fn now() -> Self {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let mib = |label: &str| {
            let line = status.lines().find_map(|l| l.strip_prefix(label));
            line.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) / 1024
        };
        // proc(5): behind the name, which ends with the last bracket, the 12th and 13th fields are user and system
        // time in hundredths of a second.
        let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
        let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace().skip(11).take(2);
        let hundredths: u64 = fields.filter_map(|f| f.parse::<u64>().ok()).sum();
        Self { busy: Duration::from_millis(hundredths * 10), resident_mib: mib("VmRSS:"), peak_mib: mib("VmPeak:") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_says_everything() {
        let draw = |seed| {
            let mut rng = Rng::new(seed);
            let mut bytes = rng.bytes(100);
            rng.damage(&mut bytes);
            (bytes, rng.odd(), rng.below(1000))
        };
        assert_eq!(draw(7), draw(7));
        assert_ne!(draw(7), draw(8));
    }

    #[test]
    fn numbers_stay_below_their_bound() {
        let mut rng = Rng::new(1);
        assert!((0..1000).all(|_| rng.below(3) < 3));
        assert_eq!(rng.below(0), 0);
        let hits = (0..10_000).filter(|_| rng.one_in(10)).count();
        assert!((800..1200).contains(&hits), "{hits} of 10000");
    }

    #[test]
    fn sleep_is_no_effort() {
        let effort = Effort::begin();
        std::thread::sleep(Duration::from_millis(300));
        assert!(effort.spent() < Duration::from_millis(200), "{:?}", effort.spent());
        while effort.spent() < Duration::from_millis(20) {}
    }

    #[test]
    fn damage_never_lengthens() {
        let mut rng = Rng::new(2);
        for len in 0..200 {
            let mut bytes = vec![0; len];
            rng.damage(&mut bytes);
            assert!(bytes.len() <= len);
        }
    }
}
