//! Integer programs: registers, branches, memory, calls.

use crate::{Bench, Done, Random, Work};
use std::arch::asm;
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};

const fn bench(name: &'static str, unit: &'static str, make: fn() -> Option<Work>) -> Bench {
    Bench { group: "integer", name, unit, make }
}

/// All measurements of this group.
pub const ALL: &[Bench] = &[
    bench("alu", "round", alu),
    bench("collatz", "number", collatz),
    bench("chase-16k", "load", || chase(16 << 10)),
    bench("chase-256k", "load", || chase(256 << 10)),
    bench("chase-128m", "load", || chase(128 << 20)),
    bench("hash-table", "operation", hash_table),
    bench("sha256-scalar", "byte", sha256),
    bench("quicksort", "element", sort),
    bench("fib-calls", "call", fib),
    bench("indirect-calls", "call", indirect),
    bench("switch-interpreter", "operation", interpreter),
    bench("linked-list", "node", linked_list),
    bench("byte-strings", "byte", byte_strings),
    bench("copy-words", "byte", copy_words),
    bench("lock-xadd", "operation", lock_xadd),
    bench("bit-count", "word", bit_count),
];

/// Registers only.
fn alu() -> Option<Work> {
    let mut x = 0x1234_5678_9abc_def1_u64;
    Some(Box::new(move |n| {
        let rounds = n * 1024;
        for _ in 0..rounds {
            x = black_box(x.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(23) ^ (x >> 7)).wrapping_add(x << 3);
        }
        Done { units: rounds, check: x }
    }))
}

/// Branches that no predictor knows.
fn collatz() -> Option<Work> {
    let mut start = 27_u64;
    Some(Box::new(move |n| {
        let mut steps = 0_u64;
        for _ in 0..n * 64 {
            start = start % 100_003 + 2;
            let mut value = start;
            while value != 1 {
                value = if black_box(value) & 1 == 0 { value / 2 } else { 3 * value + 1 };
                steps += 1;
            }
        }
        Done { units: n * 64, check: steps }
    }))
}

/// Dependent loads all over a buffer: one cycle through all cache lines in random order.
fn chase(bytes: usize) -> Option<Work> {
    const STEP: usize = 8; // words of a cache line
    let lines = bytes / 64;
    let mut order: Vec<usize> = (0..lines).collect();
    let mut random = Random(99);
    for i in (1..lines).rev() {
        order.swap(i, (random.next() % (i as u64 + 1)) as usize);
    }
    let mut next = vec![0_usize; lines * STEP];
    for (i, line) in order.iter().enumerate() {
        next[line * STEP] = order[(i + 1) % lines] * STEP;
    }
    let mut at = 0;
    Some(Box::new(move |n| {
        for _ in 0..n * 300 {
            at = next[at];
        }
        Done { units: n * 300, check: at as u64 }
    }))
}

/// A fixed hash function (multiply and fold), so that the work is the same everywhere.
#[derive(Default)]
struct Fold(u64);

impl Hasher for Fold {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|b| self.write_u64(u64::from(*b)));
    }

    fn write_u64(&mut self, value: u64) {
        let wide = u128::from(self.0 ^ value) * 0x9e37_79b9_7f4a_7c15_f39c_c060;
        self.0 = (wide >> 64) as u64 ^ wide as u64;
    }
}

fn hash_table() -> Option<Work> {
    let mut table: HashMap<u64, u64, BuildHasherDefault<Fold>> = HashMap::default();
    let mut random = Random(7);
    Some(Box::new(move |n| {
        let mut sum = 0_u64;
        for _ in 0..n * 256 {
            let key = random.next() % 20_000;
            *table.entry(key).or_insert(0) += 1;
            sum += table.get(&(key ^ 1)).copied().unwrap_or(0);
        }
        Done { units: n * 512, check: sum }
    }))
}

/// SHA-256 round constants (FIPS 180-4, section 4.2.2): fractional parts of cube roots of the first 64 primes.
fn round_constants() -> [u32; 64] {
    let primes = (2_u64..).filter(|n| (2..*n).take_while(|d| d * d <= *n).all(|d| n % d != 0));
    let mut constants = [0; 64];
    for (constant, prime) in constants.iter_mut().zip(primes) {
        // The cube root with 32 binary places, by bisection on integers.
        let target = u128::from(prime) << 96;
        let (mut low, mut high) = (0_u128, 1 << 36);
        while high - low > 1 {
            let middle = (low + high) / 2;
            if middle * middle * middle <= target { low = middle } else { high = middle }
        }
        *constant = low as u32;
    }
    constants
}

fn sha256() -> Option<Work> {
    let constants = round_constants();
    let message: Vec<u8> = (0..4096_u32).map(|i| (i * 31 % 251) as u8).collect();
    let mut state =
        [0x6a09_e667_u32, 0xbb67_ae85, 0x3c6e_f372, 0xa54f_f53a, 0x510e_527f, 0x9b05_688c, 0x1f83_d9ab, 0x5be0_cd19];
    Some(Box::new(move |n| {
        for _ in 0..n {
            for block in message.chunks_exact(64) {
                compress(&mut state, block, &constants);
            }
        }
        Done { units: n * 4096, check: u64::from(state[0]) << 32 | u64::from(state[7]) }
    }))
}

#[inline(never)]
fn compress(state: &mut [u32; 8], block: &[u8], constants: &[u32; 64]) {
    let mut w = [0_u32; 64];
    for (word, bytes) in w.iter_mut().zip(block.chunks_exact(4)) {
        *word = u32::from_be_bytes(bytes.try_into().expect("chunks of four"));
    }
    for i in 16..64 {
        let s0 = w[i - 15].rotate_right(7) ^ w[i - 15].rotate_right(18) ^ (w[i - 15] >> 3);
        let s1 = w[i - 2].rotate_right(17) ^ w[i - 2].rotate_right(19) ^ (w[i - 2] >> 10);
        w[i] = w[i - 16].wrapping_add(s0).wrapping_add(w[i - 7]).wrapping_add(s1);
    }
    let [mut a, mut b, mut c, mut d, mut e, mut f, mut g, mut h] = *state;
    for i in 0..64 {
        let s1 = e.rotate_right(6) ^ e.rotate_right(11) ^ e.rotate_right(25);
        let choice = (e & f) ^ (!e & g);
        let t1 = h.wrapping_add(s1).wrapping_add(choice).wrapping_add(constants[i]).wrapping_add(w[i]);
        let s0 = a.rotate_right(2) ^ a.rotate_right(13) ^ a.rotate_right(22);
        let majority = (a & b) ^ (a & c) ^ (b & c);
        (h, g, f, e, d, c, b, a) = (g, f, e, d.wrapping_add(t1), c, b, a, t1.wrapping_add(s0).wrapping_add(majority));
    }
    for (old, new) in state.iter_mut().zip([a, b, c, d, e, f, g, h]) {
        *old = old.wrapping_add(new);
    }
}

/// Quicksort through a comparison function that is called by pointer, as C's qsort does.
fn sort() -> Option<Work> {
    let mut random = Random(5);
    let data: Vec<u32> = (0..4096).map(|_| random.next() as u32).collect();
    let compare: fn(&u32, &u32) -> std::cmp::Ordering = black_box(|a, b| a.cmp(b));
    Some(Box::new(move |n| {
        let mut check = 0;
        for _ in 0..n {
            let mut copy = data.clone();
            copy.sort_unstable_by(compare);
            check = u64::from(copy[1000]);
        }
        Done { units: n * 4096, check }
    }))
}

#[inline(never)]
fn fib_of(n: u32, calls: &mut u64) -> u64 {
    *calls += 1;
    if black_box(n) < 2 { u64::from(n) } else { fib_of(n - 1, calls) + fib_of(n - 2, calls) }
}

fn fib() -> Option<Work> {
    Some(Box::new(|n| {
        let (mut units, mut check) = (0, 0);
        for _ in 0..n {
            check = fib_of(18, &mut units);
        }
        Done { units, check }
    }))
}

/// Calls through a table in an order that changes.
fn indirect() -> Option<Work> {
    type Step = fn(u64) -> u64;
    let table: [Step; 8] = black_box([
        |x| x + 1,
        |x| x ^ 0x55,
        |x| x.rotate_left(5),
        |x| x.wrapping_mul(3),
        |x| !x,
        |x| x.wrapping_sub(77),
        |x| x ^ (x >> 9),
        |x| x.swap_bytes(),
    ]);
    let mut random = Random(11);
    let order: Vec<u8> = (0..1024).map(|_| (random.next() % 8) as u8).collect();
    let mut x = 1;
    Some(Box::new(move |n| {
        for _ in 0..n {
            for step in &order {
                x = table[usize::from(*step)](x) & (u64::MAX >> 1);
            }
        }
        Done { units: n * 1024, check: x }
    }))
}

/// An interpreter of a tiny stack machine: one unpredictable jump an operation.
fn interpreter() -> Option<Work> {
    let mut random = Random(3);
    let program: Vec<u8> = (0..2048).map(|_| (random.next() % 9) as u8).collect();
    Some(Box::new(move |n| {
        let mut stack = [1_u64; 16];
        let mut top = 0_usize;
        for _ in 0..n {
            for (at, operation) in program.iter().enumerate() {
                let value = stack[top & 15];
                match black_box(*operation) {
                    0 => stack[top & 15] = value.wrapping_add(at as u64),
                    1 => top += 1,
                    2 => top = top.wrapping_sub(1),
                    3 => stack[top & 15] = value.wrapping_mul(5),
                    4 => stack[(top + 1) & 15] = value,
                    5 => stack[top & 15] = value ^ stack[(top + 3) & 15],
                    6 => stack[top & 15] = value >> 1,
                    7 => stack[(top + 7) & 15] ^= value << 2,
                    _ => stack[top & 15] = !value,
                }
            }
        }
        Done { units: n * 2048, check: stack.iter().fold(0, |a, b| a.rotate_left(7) ^ b) }
    }))
}

struct Node {
    value: u64,
    next: Option<Box<Node>>,
}

/// Makes, walks and frees a list.
fn linked_list() -> Option<Work> {
    Some(Box::new(|n| {
        let mut check = 0_u64;
        for _ in 0..n {
            let mut head = None;
            for value in 0..512 {
                head = Some(Box::new(Node { value, next: head }));
            }
            let mut at = &head;
            while let Some(node) = at {
                check = check.wrapping_mul(31).wrapping_add(node.value);
                at = &node.next;
            }
            // Freed one by one, not by recursion.
            while let Some(mut node) = head {
                head = node.next.take();
            }
        }
        Done { units: n * 512, check }
    }))
}

/// Byte loops: find, fold case, compare.
fn byte_strings() -> Option<Work> {
    let text: Vec<u8> = (0..4096_u32).map(|i| b'A' + (i * 7 % 57) as u8).collect();
    let mut lower = vec![0_u8; text.len()];
    Some(Box::new(move |n| {
        let mut check = 0_u64;
        for _ in 0..n {
            for (to, from) in lower.iter_mut().zip(&text) {
                let byte = black_box(*from);
                *to = if byte.is_ascii_uppercase() { byte + 32 } else { byte };
            }
            for byte in &lower {
                if black_box(*byte) == b'q' {
                    check += 1;
                }
            }
        }
        Done { units: n * 8192, check }
    }))
}

/// A plain loop over 64-bit words, kept from becoming vector code.
fn copy_words() -> Option<Work> {
    let from: Vec<u64> = (0..2048).collect();
    let mut to = vec![0_u64; 2048];
    Some(Box::new(move |n| {
        for _ in 0..n {
            // SAFETY: both buffers have 2048 words; rcx counts them down; only the named registers change.
            unsafe {
                asm!(
                    "2:",
                    "mov {t}, [{f} + {i} * 8 - 8]",
                    "mov [{d} + {i} * 8 - 8], {t}",
                    "dec {i}",
                    "jnz 2b",
                    t = out(reg) _,
                    f = in(reg) from.as_ptr(),
                    d = in(reg) to.as_mut_ptr(),
                    i = inout(reg) 2048_u64 => _,
                    options(nostack)
                );
            }
        }
        Done { units: n * 2048 * 8, check: to.iter().sum() }
    }))
}

fn lock_xadd() -> Option<Work> {
    let counter = AtomicU64::new(0);
    Some(Box::new(move |n| {
        for _ in 0..n * 256 {
            black_box(counter.fetch_add(3, Ordering::SeqCst));
        }
        Done { units: n * 256, check: counter.load(Ordering::SeqCst) }
    }))
}

/// Bit counting and scanning without the newer instructions.
fn bit_count() -> Option<Work> {
    let mut random = Random(21);
    let words: Vec<u64> = (0..1024).map(|_| random.next()).collect();
    Some(Box::new(move |n| {
        let mut check = 0_u64;
        for _ in 0..n {
            for word in &words {
                let word = black_box(*word);
                check = check.wrapping_add(u64::from(word.count_ones() * 64 + word.trailing_zeros()));
            }
        }
        Done { units: n * 1024, check }
    }))
}
