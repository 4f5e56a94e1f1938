//! Scenarios of Hyper-V's devices in which the host takes part.

mod cut;
mod disks;
mod save;
mod services;

pub use cut::cut;
pub use disks::disks;
pub use save::save;
pub use services::{file_copy, services};

use super::hosted::Hosted;
use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// As `sha256sum` prints the sum of its standard input.
fn sha256sum(data: &[u8]) -> String {
    let sum: String = Sha256::digest(data).iter().map(|b| format!("{b:02x}")).collect();
    sum + "  -"
}

/// Bytes that look like nothing and are always the same.
fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let word = || {
        // xorshift64 (Marsaglia 2003).
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let words: Vec<u8> = std::iter::repeat_with(word).take(len.div_ceil(8)).flat_map(u64::to_le_bytes).collect();
    words[..len].to_vec()
}

/// Waits until `viridian guest status` (or another listing) has what is wanted.
fn wait_for(hosted: &Hosted, listing: &[&str], what: &str, fits: impl Fn(&str) -> bool) -> Result<String> {
    let mut seen = String::new();
    for _ in 0..150 {
        // A service may not be connected yet, which is an error of the listing.
        seen = hosted.guest(listing).unwrap_or_else(|e| format!("{e:#}"));
        if fits(&seen) {
            return Ok(String::new());
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    bail!("{what}: {}", seen.replace('\n', "; "))
}

/// The value of a line of `viridian guest status`.
fn value<'a>(status: &'a str, key: &str) -> Option<&'a str> {
    status.lines().find_map(|line| line.strip_prefix(key)).map(str::trim)
}

/// What several scenarios ask for. `None`: it is not one of those.
fn common(hosted: &mut Hosted, words: &[&str]) -> Option<Result<String>> {
    match words {
        ["heartbeat", wanted] => {
            let fits = |s: &str| value(s, "heartbeat").is_some_and(|v| v.starts_with(wanted));
            Some(wait_for(hosted, &["status"], "heartbeat", fits))
        }
        ["tick"] => {
            hosted.tick = Some(SystemTime::now());
            Some(Ok(String::new()))
        }
        ["clock-now", time] => Some(clock(time, hosted.tick)),
        _ => None,
    }
}

/// How far the guest's clock may be from ours, seconds.
const MOST_CLOCK_ERROR: f64 = 0.1;

/// The guest has read its clock between the tick and now: how far it is off lies between the two differences. (A guest
/// that has just been restored is slow for a moment, which says nothing about its clock.)
fn clock(time: &str, tick: Option<SystemTime>) -> Result<String> {
    let seconds = |t: SystemTime| t.duration_since(UNIX_EPOCH).map(|d| d.as_secs_f64()).context("a clock before 1970");
    let (before, after) = (seconds(tick.context("no tick came before")?)?, seconds(SystemTime::now())?);
    let guest: f64 = time.parse().with_context(|| format!("the guest's time '{time}'"))?;
    let text = format!("{:+.1} to {:+.1} ms off", (guest - after) * 1e3, (guest - before) * 1e3);
    ensure!(guest - after <= MOST_CLOCK_ERROR && guest - before >= -MOST_CLOCK_ERROR, "the guest's clock is {text}");
    Ok(text)
}
