//! `bench cpu`: the same programs on the bare machine, under QEMU's code generator and under Viridian.
//!
//! Small loops (`tests/guest/micro`) time themselves and give nanoseconds a unit. Real programs, from Debian's
//! packages (some of them of 32 bits), are timed from outside: processor time that the whole virtual machine used between two lines on the serial
//! line, or that the program used on the bare machine. Both leave out what other processes of the host take.

use super::table::{Table, figure};
use super::{Samples, geometric_mean, inputs};
use crate::guests::Guests;
use crate::initramfs::{self, Contents};
use crate::session::{Event, Session};
use crate::vm::{Contender, Vm};
use anyhow::{Context, Result, bail, ensure};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

/// Tree of the real programs, in the catalogue and in the guest.
pub(super) const TREE: &str = "programs";
/// Tool with a static program of 32 bits, and its name among the inputs.
const TOOL32: &str = "busybox-i386";
const PROGRAM32: &str = "busybox32";
const LIMIT: Duration = Duration::from_secs(3600);

/// Programs of the tree that are run; their libraries follow.
const PROGRAMS: &[&str] = &[
    "usr/lib/gcc/x86_64-linux-gnu/12/cc1",
    "usr/bin/python3.11",
    "bin/gzip",
    "usr/bin/sort",
    "usr/bin/gawk",
    "bin/grep",
    "usr/bin/sha256sum",
    "bin/dash",
    "usr/bin/find",
];

/// What is measured.
pub struct Options {
    /// Rounds.
    pub runs: u32,
    /// Kernel of the catalogue.
    pub kernel: String,
    /// The virtual machines; the bare machine always takes part.
    pub contenders: Vec<Contender>,
    /// Some of `micro`, `programs`, `programs32`.
    pub parts: Vec<String>,
    /// Names of the only programs to run; empty: all.
    pub only: Vec<String>,
    /// Guest memory in MiB.
    pub memory_mib: u32,
}

impl Options {
    /// [`Options::only`] as the script takes it.
    fn only(&self) -> String {
        if self.only.is_empty() { "all".to_owned() } else { self.only.join("+") }
    }
}

/// Where one measurement runs.
enum Place<'a> {
    Native(PathBuf),
    Guest(&'a Contender, &'a Vm),
}

impl Place<'_> {
    fn name(&self) -> String {
        match self {
            Self::Native(_) => "native".to_owned(),
            Self::Guest(contender, _) => contender.name(),
        }
    }
}

/// One figure of one run.
#[derive(Clone, Debug, PartialEq)]
struct Reading {
    group: String,
    name: String,
    unit: String,
    value: Option<f64>,
    check: String,
}

/// Measures and prints the tables.
///
/// # Errors
/// When something cannot be built, fetched or booted, or two contenders compute different results.
pub fn run(options: &Options) -> Result<ExitCode> {
    let guests = Guests::locate();
    guests.ensure(&[&options.kernel, "busybox", TREE, TOOL32])?;
    let micro = build_micro()?;
    let inputs = inputs::all();
    let kernel = guests.kernel(&options.kernel)?;
    let mut contents = contents(&micro, &inputs)?;
    let program32 = guests.tool(TOOL32).join("bin/busybox");
    let data = fs::read(&program32).with_context(|| format!("cannot read {}", program32.display()))?;
    contents.files.push((format!("work/{PROGRAM32}"), 0o755, data));
    let vm = Vm {
        initrd: initramfs::build(&guests, &kernel, &contents)?,
        kernel: kernel.image,
        append: format!(
            "viridian.test=bench-cpu viridian.args=/{TREE},/work,/bin/micro,{},{}",
            options.only(),
            options.parts.join(",")
        ),
        memory_mib: options.memory_mib,
        processors: 1,
    };
    let work = native_work(&guests, &inputs)?;
    fs::copy(&program32, work.join(PROGRAM32))?;
    let mut places = vec![Place::Native(work.clone())];
    places.extend(options.contenders.iter().map(|c| Place::Guest(c, &vm)));

    let mut results = Results::default();
    for round in 1..=options.runs {
        for (index, place) in places.iter().enumerate() {
            eprintln!("round {round} of {}: {}", options.runs, place.name());
            let readings = match place {
                Place::Native(work) => measure_native(&guests, work, &micro, options)?,
                Place::Guest(contender, vm) => measure_guest(contender, vm)?,
            };
            results.add(index, &place.name(), readings)?;
        }
    }
    let _ = fs::remove_dir_all(work);
    let names: Vec<String> = places.iter().map(Place::name).collect();
    print!("{}", results.report(&names));
    Ok(ExitCode::SUCCESS)
}

/// The image's contents: the programs with their libraries, the small program and the inputs.
///
/// # Errors
/// When the small program cannot be read.
pub(super) fn contents(micro: &Path, inputs: &[(&'static str, String)]) -> Result<Contents> {
    let mut contents = Contents {
        under: TREE.to_owned(),
        programs: PROGRAMS.iter().map(|p| (TREE.to_owned(), (*p).to_owned())).collect(),
        folders: vec![(TREE.to_owned(), "usr/lib/python3.11".to_owned())],
        files: vec![("bin/micro".to_owned(), 0o755, fs::read(micro)?)],
        uncompressed: true,
        ..Contents::default()
    };
    for (name, text) in inputs {
        contents.files.push((format!("work/{name}"), 0o644, text.clone().into_bytes()));
    }
    Ok(contents)
}

/// Builds the static program. Its flags differ from the product's, so it has a workspace and a target folder of its own.
pub(super) fn build_micro() -> Result<PathBuf> {
    const TARGET: &str = "x86_64-unknown-linux-gnu";
    let root = crate::workspace_root();
    let folder = root.join("target/guest-programs");
    let status = Command::new(env!("CARGO"))
        .args(["build", "--quiet", "--release", "--locked", "--target", TARGET, "--manifest-path"])
        .arg(root.join("tests/guest/micro/Cargo.toml"))
        .arg("--target-dir")
        .arg(&folder)
        .env("RUSTFLAGS", "-Ctarget-feature=+crt-static -Crelocation-model=static")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .stdin(Stdio::null())
        .status()
        .context("cannot run cargo")?;
    ensure!(status.success(), "cannot build tests/guest/micro");
    Ok(folder.join(TARGET).join("release/micro"))
}

/// A folder in memory for the bare machine's runs, as the guest's is.
fn native_work(guests: &Guests, inputs: &[(&str, String)]) -> Result<PathBuf> {
    let shm = Path::new("/dev/shm");
    let parent = if shm.is_dir() { shm.to_owned() } else { guests.root().to_owned() };
    let work = parent.join(format!("viridian-bench-{}", std::process::id()));
    fs::create_dir_all(&work).with_context(|| format!("cannot create {}", work.display()))?;
    for (name, text) in inputs {
        fs::write(work.join(name), text)?;
    }
    fs::write(work.join("run.sh"), initramfs::RUN)?;
    Ok(work)
}

fn measure_native(guests: &Guests, work: &Path, micro: &Path, options: &Options) -> Result<Vec<Reading>> {
    let mut command = Command::new(guests.tool("busybox").join("bin/busybox"));
    command.arg("sh").arg(work.join("run.sh")).arg(crate::workspace_root().join("tests/guest/bench-cpu.sh"));
    command.arg(guests.tool(TREE)).arg(work).arg(micro).arg(options.only()).args(&options.parts);
    command.env_clear().env("PATH", "/nonexistent");
    let mut session = Session::start(command, None, false)?;
    session.finish(LIMIT)?.context("the bare machine did not come to an end")?;
    readings(session.text(), &BTreeMap::new())
}

fn measure_guest(contender: &Contender, vm: &Vm) -> Result<Vec<Reading>> {
    let log = crate::guest_test::log_folder().join(format!("bench-cpu-{}.log", contender.name().replace(' ', "-")));
    let mut session = Session::start(contender.command(vm), Some(&log), false)?;
    let mut stopwatch = Stopwatch { process: session.process(), ..Stopwatch::default() };
    let event = session.wait_for(LIMIT, |text| {
        stopwatch.look(text);
        text.contains("VIRIDIAN-VERDICT: ") || text.contains("Kernel panic")
    })?;
    if event != Event::Seen || !session.text().contains("VIRIDIAN-VERDICT: ") {
        bail!("{} did not come to the end of the programs; its output is in {}", contender.name(), log.display());
    }
    // The verdict's own line may still be incomplete.
    session.finish(Duration::from_secs(120))?;
    let found = readings(session.text(), &stopwatch.times)
        .with_context(|| format!("{}: its output is in {}", contender.name(), log.display()))?;
    let _ = fs::remove_file(log);
    Ok(found)
}

/// Notes the machine's processor time at each `TIME-START` and `TIME-END` line, as it comes.
#[derive(Default)]
struct Stopwatch {
    process: u32,
    read: usize,
    started: Duration,
    times: BTreeMap<String, f64>,
}

impl Stopwatch {
    fn look(&mut self, text: &str) {
        while let Some(length) = text[self.read..].find('\n') {
            let line = &text[self.read..self.read + length];
            self.read += length + 1;
            if line.starts_with("TIME-START ") {
                self.started = crate::session::thread_time(self.process);
            } else if let Some(name) = line.strip_prefix("TIME-END ") {
                let used = crate::session::thread_time(self.process).saturating_sub(self.started);
                self.times.insert(name.trim().to_owned(), used.as_secs_f64());
            }
        }
    }
}

/// Reads `BENCH` and `TIME` lines. Real programs' times are those of `outside` where it has them.
fn readings(text: &str, outside: &BTreeMap<String, f64>) -> Result<Vec<Reading>> {
    let mut readings = Vec::new();
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["BENCH", group, name, value, unit, check] => readings.push(Reading {
                group: (*group).to_owned(),
                name: (*name).to_owned(),
                unit: format!("ns/{unit}"),
                value: value.parse().ok(),
                check: (*check).to_owned(),
            }),
            ["TIME", name, _elapsed, cpu, status, check] => {
                ensure!(*status == "ok", "{name} {status}");
                let inside = cpu.parse::<f64>().ok();
                readings.push(Reading {
                    group: if name.ends_with("-32") { "32-bit" } else { "real" }.to_owned(),
                    name: (*name).to_owned(),
                    unit: "ms".to_owned(),
                    value: outside.get(*name).copied().or(inside).map(|s| s * 1000.0),
                    check: (*check).to_owned(),
                });
            }
            _ => {}
        }
    }
    ensure!(!readings.is_empty(), "no figures in the output");
    Ok(readings)
}

/// All figures, in the order in which the programs ran.
#[derive(Default)]
struct Results {
    programs: Vec<Program>,
}

struct Program {
    group: String,
    name: String,
    unit: String,
    check: String,
    samples: Vec<Samples>,
}

impl Results {
    fn add(&mut self, place: usize, place_name: &str, readings: Vec<Reading>) -> Result<()> {
        for reading in readings {
            let at = match self.programs.iter().position(|p| p.group == reading.group && p.name == reading.name) {
                Some(at) => at,
                None => {
                    self.programs.push(Program {
                        group: reading.group,
                        name: reading.name,
                        unit: reading.unit,
                        check: reading.check.clone(),
                        samples: Vec::new(),
                    });
                    self.programs.len() - 1
                }
            };
            let program = &mut self.programs[at];
            // A processor without the instructions has no result to compare.
            ensure!(
                reading.check == program.check || reading.check == "-" || program.check == "-",
                "{} computes {} on {place_name}, but {} before",
                program.name,
                reading.check,
                program.check
            );
            if program.check == "-" {
                program.check = reading.check;
            }
            if program.samples.len() <= place {
                program.samples.resize_with(place + 1, Samples::default);
            }
            if let Some(value) = reading.value {
                program.samples[place].add(value);
            }
        }
        Ok(())
    }

    /// One table of all programs, then the geometric means of their ratios by group.
    fn report(&self, places: &[String]) -> String {
        let mut headings = vec!["program".to_owned(), "unit".to_owned()];
        for place in places {
            headings.push(place.clone());
            headings.push("min-max".to_owned());
        }
        // Every later place against every earlier one: slower than native, faster than QEMU.
        let pairs: Vec<(usize, usize)> =
            (1..places.len()).flat_map(|later| (0..later).map(move |earlier| (later, earlier))).collect();
        let pair_name = |(later, earlier): &(usize, usize)| format!("{}/{}", places[*later], places[*earlier]);
        headings.extend(pairs.iter().map(pair_name));
        let mut table = Table::new(headings);
        let mut ratios: BTreeMap<(String, usize), Vec<f64>> = BTreeMap::new();
        for program in &self.programs {
            let median = |place: usize| program.samples.get(place).and_then(Samples::median);
            let mut row = vec![program.name.clone(), program.unit.clone()];
            for place in 0..places.len() {
                row.push(figure(median(place)));
                let spread = program.samples.get(place).and_then(|s| s.least().zip(s.greatest()));
                row.push(spread.map_or_else(
                    || "-".to_owned(),
                    |(least, greatest)| format!("{}-{}", figure(Some(least)), figure(Some(greatest))),
                ));
            }
            for (index, (later, earlier)) in pairs.iter().enumerate() {
                let ratio = median(*later).zip(median(*earlier)).filter(|(_, e)| *e > 0.0).map(|(l, e)| l / e);
                row.push(figure(ratio));
                // A first start that only prepares is not a measurement.
                if let Some(ratio) = ratio.filter(|_| program.name != "python-first") {
                    for group in [program.group.as_str(), "all"] {
                        ratios.entry((group.to_owned(), index)).or_default().push(ratio);
                    }
                }
            }
            table.row(row);
        }
        let mut means = Table::new(
            ["geometric mean", "programs"].map(str::to_owned).into_iter().chain(pairs.iter().map(pair_name)),
        );
        for group in ["integer", "vector", "kernel", "real", "32-bit", "all"] {
            let of = |index| ratios.get(&(group.to_owned(), index));
            let Some(count) = of(0).map(Vec::len) else { continue };
            let mut row = vec![group.to_owned(), count.to_string()];
            row.extend((0..pairs.len()).map(|i| figure(of(i).and_then(|r| geometric_mean(r)))));
            means.row(row);
        }
        format!("{}\n{}", table.render(), means.render())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "x\nBENCH vector x87 2.5 step 00ff\nBENCH vector avx2 - vector -\nTIME-START sort\nTIME-END sort\n\
                        TIME sort 0.5 0.25 ok ab\n";

    #[test]
    fn lines_become_readings() {
        let found = readings(TEXT, &BTreeMap::new()).unwrap();
        assert_eq!(found[0].value, Some(2.5));
        assert_eq!(found[1].value, None);
        assert_eq!((found[2].value, found[2].unit.as_str()), (Some(250.0), "ms"));
        let outside = BTreeMap::from([("sort".to_owned(), 2.0)]);
        assert_eq!(readings(TEXT, &outside).unwrap()[2].value, Some(2000.0));
        assert!(readings("TIME sort 0.5 0.25 failed:1 ab\n", &outside).is_err());
        assert!(readings("", &outside).is_err());
    }

    #[test]
    fn ratios_and_means() {
        let mut results = Results::default();
        results.add(0, "native", readings(TEXT, &BTreeMap::new()).unwrap()).unwrap();
        let slower = TEXT.replace("2.5", "10.0").replace("0.25", "2.25");
        results.add(1, "qemu", readings(&slower, &BTreeMap::new()).unwrap()).unwrap();
        let report = results.report(&["native".to_owned(), "qemu".to_owned()]);
        assert!(report.contains("qemu/native"), "{report}");
        let all = report.lines().find(|l| l.starts_with("all")).unwrap();
        assert_eq!(all.split_whitespace().collect::<Vec<_>>(), ["all", "2", "6.00"]);
    }

    #[test]
    fn different_results_are_an_error() {
        let mut results = Results::default();
        results.add(0, "native", readings(TEXT, &BTreeMap::new()).unwrap()).unwrap();
        let wrong = TEXT.replace("00ff", "00fe");
        assert!(results.add(1, "qemu", readings(&wrong, &BTreeMap::new()).unwrap()).is_err());
    }
}
