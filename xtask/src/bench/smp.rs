//! `bench smp`: a parallel compilation on one virtual processor and on several.
//!
//! Time is the guest's own clock: it shows what somebody waits for.

use super::cpu::{TREE, build_micro, contents};
use super::table::{Table, figure};
use super::{Samples, inputs};
use crate::guests::Guests;
use crate::initramfs;
use crate::session::{Event, Session};
use crate::vm::{Contender, Vm};
use anyhow::{Context, Result, bail, ensure};
use std::process::ExitCode;
use std::time::Duration;

/// What is measured.
pub struct Options {
    /// Rounds.
    pub runs: u32,
    /// Kernel of the catalogue.
    pub kernel: String,
    /// The engine.
    pub contender: Contender,
    /// Virtual processors of the larger machine, and compilations at a time in it.
    pub processors: u32,
    /// Compilations.
    pub compilations: u32,
    /// Guest memory in MiB.
    pub memory_mib: u32,
}

const LIMIT: Duration = Duration::from_secs(1200);

/// Measures and prints the table.
///
/// # Errors
/// When something cannot be built, fetched or booted, or a compilation fails.
pub fn run(options: &Options) -> Result<ExitCode> {
    let guests = Guests::locate();
    guests.ensure(&[&options.kernel, "busybox", TREE])?;
    let kernel = guests.kernel(&options.kernel)?;
    let contents = contents(&build_micro()?, &inputs::all())?;
    let initrd = initramfs::build(&guests, &kernel, &contents)?;
    let sizes = [1, options.processors];
    let mut samples = [Samples::default(), Samples::default()];
    for round in 1..=options.runs {
        for (processors, samples) in sizes.into_iter().zip(&mut samples) {
            let vm = Vm {
                kernel: kernel.image.clone(),
                initrd: initrd.clone(),
                append: format!(
                    "viridian.test=bench-smp viridian.args=/{TREE},/work,/bin/micro,{},{processors}",
                    options.compilations
                ),
                memory_mib: options.memory_mib,
                processors,
            };
            let seconds = measure(&options.contender, &vm)?;
            eprintln!("  round {round}: {processors} processor(s) {seconds:.2} s");
            samples.add(seconds);
        }
    }
    let mut table = Table::new(["processors", "at a time", "s", "least", "greatest", "speed-up"]);
    let first = samples[0].median();
    for (processors, samples) in sizes.into_iter().zip(&samples) {
        let speed_up = first.zip(samples.median()).map(|(one, many)| one / many);
        table.row([
            processors.to_string(),
            processors.to_string(),
            figure(samples.median()),
            figure(samples.least()),
            figure(samples.greatest()),
            figure(speed_up),
        ]);
    }
    print!("{}", table.render());
    Ok(ExitCode::SUCCESS)
}

fn measure(contender: &Contender, vm: &Vm) -> Result<f64> {
    let log = crate::guest_test::log_folder().join(format!("bench-smp-{}.log", vm.processors));
    let mut session = Session::start(contender.command(vm), Some(&log), false)?;
    let event = session.wait_for(LIMIT, |t| t.contains("VIRIDIAN-VERDICT: ") || t.contains("Kernel panic"))?;
    if event != Event::Seen {
        bail!("the guest did not come to its end; its output is in {}", log.display());
    }
    session.finish(Duration::from_secs(120))?;
    let line = session.text().lines().find(|l| l.starts_with("TIME compile-j")).context("no figure in the output")?;
    let words: Vec<&str> = line.split_whitespace().collect();
    ensure!(words.get(4) == Some(&"ok"), "the compilations failed: {line}; the guest's output is in {}", log.display());
    let seconds = words.get(2).and_then(|w| w.parse().ok()).context("no time in the line")?;
    let _ = std::fs::remove_file(log);
    Ok(seconds)
}
