//! Counters for people, after a run.

use machine::Machine;
use std::fmt::Write;
use std::time::Duration;

/// What happened, in lines of text.
pub fn report(machine: &Machine, startup: Duration, run: Duration) -> String {
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = writeln!(text, "start to first guest instruction: {:.1} ms", startup.as_secs_f64() * 1e3);
    let _ = writeln!(
        text,
        "run: {:.3} s, guest clock {:.3} s",
        run.as_secs_f64(),
        machine.clock().nanoseconds() as f64 / 1e9
    );
    let stats = machine.engine_stats();
    let _ = writeln!(
        text,
        "guest instructions: {} ({:.1} million a second)",
        stats.instructions,
        stats.instructions as f64 / run.as_secs_f64().max(1e-9) / 1e6
    );
    for vp in 0..machine.config().processors {
        let time = machine.partition().vp_runtime(vp) as f64 / 1e7;
        let _ = writeln!(text, "vp {vp}: executed for {time:.3} s");
    }
    for (name, value) in stats.counters {
        let _ = writeln!(text, "  {name:32} {value:>14}");
    }
    for (name, value) in machine.interface_counters() {
        let _ = writeln!(text, "  {name:32} {value:>14}");
    }
    let _ = writeln!(text, "  {:12} {:>12} {:>12} {:>12} {:>12}", "device", "in", "out", "mem read", "mem write");
    for device in machine.device_counts() {
        let [a, b, c, d] = device.counts;
        let _ = writeln!(text, "  {:12} {a:>12} {b:>12} {c:>12} {d:>12}", device.name);
    }
    text
}
