//! Small loops, each of which measures one thing that a processor or a kernel does.
//!
//! ```text
//! micro              all of them: BENCH GROUP NAME VALUE UNIT CHECK
//! micro NAME...      only these
//! micro --list       GROUP NAME UNIT
//! micro --time NAME OUTPUT COMMAND...   runs a command with its output in a file:
//!                    TIME-START NAME, then TIME NAME ELAPSED CPU STATUS CHECK
//! ```
//! VALUE is the best of several batches, in nanoseconds a unit of work. CHECK is a checksum of what was computed in a
//! first run of fixed length: it must be the same on every machine, real or not.

mod integer;
mod kernel;
mod sys;
mod vector;

use std::process::{ExitCode, Stdio};
use std::time::{Duration, Instant};

/// What a run of a loop did.
pub struct Done {
    /// Units of work.
    pub units: u64,
    /// Checksum of the results; 0 where there is nothing to compute.
    pub check: u64,
}

/// A loop with its data, ready to run `n` times.
pub type Work = Box<dyn FnMut(u64) -> Done>;

/// One measurement.
pub struct Bench {
    /// `integer`, `vector` or `kernel`.
    pub group: &'static str,
    /// Name in tables.
    pub name: &'static str,
    /// What one unit of work is.
    pub unit: &'static str,
    /// Makes the loop; `None` when this processor cannot run it.
    pub make: fn() -> Option<Work>,
}

/// Batches must be much longer than the clock's grain and short against a scheduler's time slice.
const BATCH: Duration = Duration::from_millis(8);
const BATCHES: u32 = 7;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let all = integer::ALL.iter().chain(vector::ALL).chain(kernel::ALL);
    match arguments.first().map(String::as_str) {
        Some("--child") => return ExitCode::SUCCESS, // what fork-exec executes
        Some("--list") => all.for_each(|b| println!("{} {} {}", b.group, b.name, b.unit)),
        Some("--time") => return time(&arguments[1..]),
        _ => all.filter(|b| arguments.is_empty() || arguments.iter().any(|a| a == b.name)).for_each(measure),
    }
    ExitCode::SUCCESS
}

fn measure(bench: &Bench) {
    let Some(mut work) = (bench.make)() else {
        println!("BENCH {} {} - {} -", bench.group, bench.name, bench.unit);
        return;
    };
    let check = work(2).check;
    let mut count = 1;
    let mut best = f64::INFINITY;
    loop {
        let (elapsed, value) = batch(&mut work, count);
        if elapsed >= BATCH {
            best = best.min(value);
            break;
        }
        // Not more than four times as far at once: the first runs are slower than what comes after.
        let grown = BATCH.as_nanos() * u128::from(count) * 5 / 4 / elapsed.as_nanos().max(1);
        count = (grown as u64).clamp(count + 1, count * 4);
    }
    for _ in 1..BATCHES {
        best = best.min(batch(&mut work, count).1);
    }
    println!("BENCH {} {} {best:.4} {} {check:016x}", bench.group, bench.name, bench.unit);
}

fn batch(work: &mut Work, count: u64) -> (Duration, f64) {
    let start = Instant::now();
    let done = work(count);
    let elapsed = start.elapsed();
    (elapsed, elapsed.as_nanos() as f64 / done.units.max(1) as f64)
}

/// Runs a command with its output in a file and prints how long it took (elapsed, and processor time of the process and
/// its children, in seconds) and a checksum of the output.
fn time(arguments: &[String]) -> ExitCode {
    let [name, output, program, rest @ ..] = arguments else {
        eprintln!("expected --time NAME OUTPUT COMMAND...");
        return ExitCode::FAILURE;
    };
    let file = match std::fs::File::create(output) {
        Ok(file) => file,
        Err(error) => {
            eprintln!("{output}: {error}");
            return ExitCode::FAILURE;
        }
    };
    println!("TIME-START {name}");
    let before = sys::children_time();
    let start = Instant::now();
    let status = std::process::Command::new(program).args(rest).stdin(Stdio::null()).stdout(file).status();
    let elapsed = start.elapsed().as_secs_f64();
    let cpu = (sys::children_time() - before).as_secs_f64();
    println!("TIME-END {name}");
    let word = match status {
        Ok(s) if s.success() => "ok".to_owned(),
        Ok(s) => format!("failed:{}", s.code().unwrap_or(-1)),
        Err(e) => format!("failed:{:?}", e.kind()),
    };
    let check = std::fs::read(output).map(|bytes| fnv(&bytes)).unwrap_or(0);
    println!("TIME {name} {elapsed:.6} {cpu:.6} {word} {check:016x}");
    ExitCode::SUCCESS
}

/// The 64-bit Fowler-Noll-Vo hash, variant 1a.
fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

/// A small generator with a fixed seed (xorshift64): the data must be the same everywhere.
pub struct Random(pub u64);

impl Random {
    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}
