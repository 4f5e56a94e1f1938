//! The micro-guests on this engine: the interpreter (and the translator, where it is on) against the manual's rules.

use viridian_engine_soft::partition_impl::SoftEngine;

/// Runs every micro-guest, so that one failure does not hide the others.
#[test]
fn micro_guests() {
    let engine = SoftEngine::new();
    let mut failed = Vec::new();
    for (name, guest) in micro_guests::chapters::all() {
        if let Ok(only) = std::env::var("MICRO_GUEST")
            && !name.contains(&only)
        {
            continue;
        }
        let run = std::panic::AssertUnwindSafe(|| guest(&engine));
        let verdict = if std::panic::catch_unwind(run).is_ok() { "ok" } else { "FAILED" };
        println!("{name}: {verdict}");
        if verdict != "ok" {
            failed.push(name);
        }
    }
    assert!(failed.is_empty(), "{} micro-guests failed: {failed:#?}", failed.len());
}
