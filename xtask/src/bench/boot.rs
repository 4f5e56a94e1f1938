//! `bench boot`: from the start of the program to the guest's `/init`, same kernel, image and command line.

use super::Samples;
use super::table::{Table, figure};
use crate::guests::Guests;
use crate::initramfs::{self, Contents};
use crate::session::{Event, Session};
use crate::vm::{Contender, Vm};
use anyhow::{Result, bail};
use std::process::ExitCode;
use std::time::Duration;

/// What is measured.
pub struct Options {
    /// Rounds.
    pub runs: u32,
    /// Kernel of the catalogue.
    pub kernel: String,
    /// Contenders; the first is the yardstick of the ratios.
    pub contenders: Vec<Contender>,
    /// Virtual processors.
    pub processors: u32,
    /// Guest memory in MiB.
    pub memory_mib: u32,
}

#[derive(Default)]
struct Figures {
    cpu: Samples,
    wall: Samples,
    overhead: Samples,
    speed: Samples,
    start: Samples,
}

/// Viridian's `--stats`: from the program's start.
const START_LABEL: &str = "start to first guest instruction: ";
const LIMIT: Duration = Duration::from_secs(600);

/// Measures and prints the table.
///
/// # Errors
/// When a contender does not boot.
pub fn run(options: &Options) -> Result<ExitCode> {
    let guests = Guests::locate();
    let busybox = crate::guests::busybox_for(&options.kernel);
    guests.ensure(&[&options.kernel, "busybox", busybox])?;
    let kernel = guests.kernel(&options.kernel)?;
    let vm = Vm {
        initrd: initramfs::build(&guests, &kernel, &Contents { busybox, ..Contents::default() })?,
        kernel: kernel.image,
        append: "viridian.run=Y2hlY2sgdHJ1ZQo=".to_owned(), // check true
        memory_mib: options.memory_mib,
        processors: options.processors,
    };
    println!(
        "boot to init: kernel {}, {} MiB, {} processor(s), {} interleaved rounds",
        kernel.version, vm.memory_mib, vm.processors, options.runs
    );
    let mut figures: Vec<Figures> = options.contenders.iter().map(|_| Figures::default()).collect();
    for round in 1..=options.runs {
        for (contender, figures) in options.contenders.iter().zip(&mut figures) {
            let text = measure(contender, &vm, figures)?;
            eprintln!("  round {round}: {:12} {text}", contender.name());
        }
    }
    print!("{}", summary(options, &figures));
    Ok(ExitCode::SUCCESS)
}

fn measure(contender: &Contender, vm: &Vm, figures: &mut Figures) -> Result<String> {
    let mut contender = contender.clone();
    if let Contender::Viridian { options, .. } = &mut contender {
        options.push("--stats".to_owned());
    }
    let log = crate::guest_test::log_folder().join(format!("bench-boot-{}.log", contender.name().replace(' ', "-")));
    let mut session = Session::start(contender.command(vm), Some(&log), false)?;
    let event = session.wait_for(LIMIT, |t| t.contains("VIRIDIAN-INIT"))?;
    if event != Event::Seen {
        bail!("{} did not come to init; its output is in {}", contender.name(), log.display());
    }
    let usage = session.usage(vm.memory_mib)?;
    figures.cpu.add(usage.cpu.as_secs_f64());
    figures.wall.add(usage.wall.as_secs_f64());
    figures.overhead.add(usage.overhead as f64 / f64::from(1 << 20));
    let ended = session.finish(Duration::from_secs(120))?;
    if !ended.is_some_and(|s| s.success()) {
        bail!("{} did not power off properly; its output is in {}", contender.name(), log.display());
    }
    if let Some(speed) = instructions_per_second(session.text()) {
        figures.speed.add(speed);
    }
    if let Some(milliseconds) = number_after(session.text(), START_LABEL) {
        figures.start.add(milliseconds);
    }
    let _ = std::fs::remove_file(log);
    Ok(format!("{:6.2} s processor time, {:6.2} s", usage.cpu.as_secs_f64(), usage.wall.as_secs_f64()))
}

/// From Viridian's `--stats`: guest instructions by the time in which VPs executed them.
fn instructions_per_second(text: &str) -> Option<f64> {
    let count: f64 = number_after(text, "guest instructions: ")?;
    let executed: f64 =
        text.lines().filter(|l| l.starts_with("vp ")).filter_map(|l| number_after(l, ": executed for ")).sum();
    (executed > 0.0).then(|| count / executed)
}

/// The number that follows `label`.
fn number_after(text: &str, label: &str) -> Option<f64> {
    let (_, rest) = text.split_once(label)?;
    let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
    rest[..end].parse().ok()
}

fn summary(options: &Options, figures: &[Figures]) -> String {
    let mut table = Table::new([
        "",
        "cpu s",
        "least",
        "greatest",
        "wall s",
        "beyond RAM MiB",
        "start ms",
        "M guest instr/s",
        "cpu ratio",
    ]);
    let yardstick = figures.first().and_then(|f| f.cpu.median());
    for (contender, f) in options.contenders.iter().zip(figures) {
        let ratio = f.cpu.median().zip(yardstick).map(|(own, other)| own / other);
        table.row([
            contender.name(),
            figure(f.cpu.median()),
            figure(f.cpu.least()),
            figure(f.cpu.greatest()),
            figure(f.wall.median()),
            figure(f.overhead.greatest()),
            figure(f.start.median()),
            figure(f.speed.median().map(|s| s / 1e6)),
            figure(ratio),
        ]);
    }
    table.render()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stats_lines() {
        let text = "start to first guest instruction: 12.5 ms\nguest instructions: 3000000 (1.0 million a second)\n\
                    vp 0: executed for 1.500 s\nvp 1: executed for 0.500 s\n";
        assert_eq!(instructions_per_second(text), Some(1.5e6));
        assert_eq!(number_after(text, START_LABEL), Some(12.5));
        assert_eq!(instructions_per_second("nothing"), None);
    }
}
