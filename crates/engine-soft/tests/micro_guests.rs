//! The micro-guests on this engine, interpreted, translated, and both compared, against the manual's rules.

use partition::{Abilities, Engine, EngineError, Partition, PartitionConfig, TranslateMode};
use std::sync::Arc;
use viridian_engine_soft::partition_impl::SoftEngine;

/// The engine with a translator mode of the test's choice.
struct InMode(SoftEngine, TranslateMode);

impl Engine for InMode {
    fn name(&self) -> &'static str {
        self.0.name()
    }
    fn abilities(&self) -> Abilities {
        self.0.abilities()
    }
    fn create(&self, mut config: PartitionConfig) -> Result<Arc<dyn Partition>, EngineError> {
        config.options.translate = self.1;
        self.0.create(config)
    }
}

/// Runs every micro-guest (or those whose name contains `MICRO_GUEST`), so that one failure does not hide the others.
fn run_all(mode: TranslateMode) {
    let engine = InMode(SoftEngine::new(), mode);
    let only = std::env::var("MICRO_GUEST").unwrap_or_default();
    let mut failed = Vec::new();
    for (name, guest) in micro_guests::chapters::all().into_iter().filter(|(name, _)| name.contains(&only)) {
        let run = std::panic::AssertUnwindSafe(|| guest(&engine));
        let verdict = if std::panic::catch_unwind(run).is_ok() { "ok" } else { "FAILED" };
        println!("{mode:?}: {name}: {verdict}");
        if verdict != "ok" {
            failed.push(name);
        }
    }
    assert!(failed.is_empty(), "{} micro-guests failed ({mode:?}): {failed:#?}", failed.len());
}

#[test]
fn interpreted() {
    run_all(TranslateMode::Off);
}

#[test]
fn translated() {
    run_all(TranslateMode::On);
}

#[test]
fn verified() {
    run_all(TranslateMode::Verify);
}
