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
}

const LIMIT: Duration = Duration::from_secs(600);

/// Measures and prints the table.
///
/// # Errors
/// When a contender does not boot.
pub fn run(options: &Options) -> Result<ExitCode> {
    let guests = Guests::locate();
    guests.ensure(&[&options.kernel, "busybox"])?;
    let kernel = guests.kernel(&options.kernel)?;
    let vm = Vm {
        initrd: initramfs::build(&guests, &kernel, &Contents::default())?,
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
    let _ = std::fs::remove_file(log);
    Ok(format!("{:6.2} s processor time, {:6.2} s", usage.cpu.as_secs_f64(), usage.wall.as_secs_f64()))
}

/// Viridian's `--stats`: a line with `N guest instructions per second`, in any unit prefix of SI.
fn instructions_per_second(text: &str) -> Option<f64> {
    let line = text.lines().find(|l| l.contains("instructions per second"))?;
    let words: Vec<&str> = line.split_whitespace().collect();
    let at = words.iter().position(|w| w.parse::<f64>().is_ok())?;
    let number: f64 = words[at].parse().ok()?;
    let factor = match words.get(at + 1).copied() {
        Some("k") | Some("thousand") => 1e3,
        Some("M") | Some("million") => 1e6,
        Some("G") | Some("billion") => 1e9,
        _ => 1.0,
    };
    Some(number * factor)
}

fn summary(options: &Options, figures: &[Figures]) -> String {
    let mut table =
        Table::new(["", "cpu s", "least", "greatest", "wall s", "beyond RAM MiB", "M guest instr/s", "cpu ratio"]);
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
    fn speed_line() {
        assert_eq!(instructions_per_second("x\nstats: 62.5 M guest instructions per second\n"), Some(62.5e6));
        assert_eq!(instructions_per_second("1000 instructions per second"), Some(1000.0));
        assert_eq!(instructions_per_second("nothing"), None);
    }
}
