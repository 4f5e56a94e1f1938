//! Bars for long work, on a terminal only.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::IsTerminal;
use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// Work that takes no longer shows nothing.
const PATIENCE: Duration = Duration::from_millis(400);
/// How often a bar is drawn.
const TICK: Duration = Duration::from_millis(100);

fn new(style: &str, what: String) -> ProgressBar {
    let target =
        if std::io::stderr().is_terminal() { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
    let bar = ProgressBar::with_draw_target(None, target).with_message(what);
    if let Ok(style) = ProgressStyle::with_template(style) {
        bar.set_style(style);
    }
    bar
}

/// Work that says how far it is: done and total, in bytes.
pub fn counted<R>(what: &'static str, work: impl FnOnce(&mut dyn FnMut(u64, u64) -> bool) -> R) -> R {
    let style = "{msg} {bar:40} {percent:>3}% {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}";
    let bar = new(style, what.into());
    let result = work(&mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
        true
    });
    bar.finish_and_clear();
    result
}

/// Work that somebody else does, within a time.
pub fn waited<R>(what: String, limit: Duration, work: impl FnOnce() -> R) -> R {
    let bar = new(&format!("{{msg}} {{spinner}} {{elapsed}} of at most {} s", limit.as_secs()), what);
    drawn(&bar, |bar| bar.tick(), work)
}

/// Work by which a file grows, to `most` bytes if nothing can be left out of it.
pub fn written<R>(what: String, file: &Path, most: u64, work: impl FnOnce() -> R) -> R {
    let bar = new("{msg} {bar:40} {binary_bytes} of at most {binary_total_bytes}", what);
    bar.set_length(most);
    let size = || std::fs::metadata(file).map_or(0, |m| m.len());
    drawn(&bar, |bar| bar.set_position(size().min(most)), work)
}

/// Draws the bar while the work goes on.
fn drawn<R>(bar: &ProgressBar, draw: impl Fn(&ProgressBar) + Send, work: impl FnOnce() -> R) -> R {
    if bar.is_hidden() {
        return work();
    }
    let (end, ended) = channel::<()>();
    let begun = Instant::now();
    bar.reset_elapsed();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            while ended.recv_timeout(TICK) == Err(RecvTimeoutError::Timeout) {
                if begun.elapsed() > PATIENCE {
                    draw(bar);
                }
            }
            bar.finish_and_clear();
        });
        let result = work();
        // Its end is the end of the channel.
        drop(end);
        result
    })
}
