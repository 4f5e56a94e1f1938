//! `cargo xtask test`: everything that must hold before a change lands.

use crate::guest_test::{self, Bench, Tally};
use crate::guests::Guests;
use crate::vm::Contender;
use anyhow::{Context, Result};
use std::io::{BufRead, BufReader, Write as _};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// What to run.
pub struct Options {
    /// Only guest tests (and steps) whose name contains this.
    pub only: Option<String>,
    /// Leave guest tests out.
    pub no_guests: bool,
    /// Only say what there is.
    pub list: bool,
    /// Engine for guest tests, or `qemu`.
    pub contender: String,
    /// Include long tests.
    pub long: bool,
    /// Duration of the long stress run.
    pub stress_seconds: u32,
    /// Duration of each fuzz target, when one is asked for; 0 leaves them to the unit tests.
    pub fuzz_seconds: Option<u32>,
    /// Seed of all tests that make up their input, when one is asked for.
    pub seed: Option<u64>,
    /// Run the optimised binary in guests' tests, and fuzz targets in the profile `fuzz`.
    pub release: bool,
    /// Factor on time limits.
    pub patience: u32,
}

/// A step that runs cargo on a workspace.
struct Step {
    name: &'static str,
    /// Folder of the workspace, from the root.
    workspace: &'static str,
    arguments: &'static [&'static str],
}

/// What is built for the guest has a workspace of its own, with the guest's flags in `.cargo/config.toml`.
const GUEST_LINTS: &[&str] =
    &["clippy", "--quiet", "--release", "--locked", "--target-dir", "../../target/firmware", "--", "-D", "warnings"];
const CHECKS: &[Step] = &[
    Step { name: "format", workspace: ".", arguments: &["fmt", "--all", "--check"] },
    Step { name: "format-firmware", workspace: "firmware/uefi", arguments: &["fmt", "--check"] },
    Step { name: "format-conformance", workspace: "firmware/conformance", arguments: &["fmt", "--check"] },
    Step {
        name: "lints",
        workspace: ".",
        arguments: &["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"],
    },
    Step { name: "lints-firmware", workspace: "firmware/uefi", arguments: GUEST_LINTS },
    Step { name: "lints-conformance", workspace: "firmware/conformance", arguments: GUEST_LINTS },
];
const NEXTEST: Step = Step {
    name: "unit-tests",
    workspace: ".",
    arguments: &["nextest", "run", "--workspace", "--no-fail-fast", "--status-level", "fail", "--hide-progress-bar"],
};
/// nextest leaves examples in documentation out.
const EXAMPLES: Step =
    Step { name: "doc-examples", workspace: ".", arguments: &["test", "--workspace", "--doc", "--quiet"] };
const PLAIN: Step =
    Step { name: "unit-tests", workspace: ".", arguments: &["test", "--workspace", "--no-fail-fast", "--quiet"] };

/// Every target that makes up its own input, for [`Options::fuzz_seconds`] each and two at a time; in `unit-tests` the same ones
/// run for a few seconds. What is named here by test honours the variable as the `fuzz` binaries do.
const FUZZ: Step = Step {
    name: "fuzz",
    workspace: ".",
    arguments: &[
        "nextest",
        "run",
        "--workspace",
        "--no-fail-fast",
        "--status-level",
        "pass",
        "--hide-progress-bar",
        "--test-threads",
        "2",
        "--success-output",
        "immediate",
        "--filterset",
        "binary(fuzz) + binary(hostile) + binary(hostile_code) + test(/hostile::|random_commands_are_answered/)",
    ],
};
/// The most of them, without nextest.
const PLAIN_FUZZ: Step = Step {
    name: "fuzz",
    workspace: ".",
    // Two at a time, as nextest does; their growth is that of one process.
    arguments: &[
        "test",
        "--workspace",
        "--no-fail-fast",
        "--test",
        "fuzz",
        "--test",
        "hostile",
        "--test",
        "hostile_code",
        "--quiet",
        "--",
        "--test-threads",
        "2",
    ],
};

/// Duration of each fuzz target when none is asked for.
const FUZZ_SECONDS: u32 = 60;

/// What gives a test that makes up its input its seed. Each has a seed of its own without it, but for proptest's.
const SEEDS: &[&str] = &["VIRIDIAN_SEED", "VIRIDIAN_DIFF_SEED", "VIRIDIAN_FUZZ_SEED", PROPTEST_SEED];
/// proptest asks the system for a seed where this is not set.
const PROPTEST_SEED: &str = "PROPTEST_RNG_SEED";

/// The seeds of one step, as variables of its environment; what is set there already stays as it is.
///
/// What decides whether a change lands must decide the same each time, so a run starts from the same seeds as the one
/// before. What is there to find new faults looks elsewhere each time, and says where.
fn seeds(step: &Step, options: &Options, fresh: u64) -> Vec<(&'static str, u64)> {
    let fuzz = step.name == FUZZ.name;
    if !fuzz && step.name != NEXTEST.name {
        return Vec::new();
    }
    let search = options.long || fuzz && options.fuzz_seconds.is_some();
    match options.seed.or(search.then_some(fresh)) {
        Some(seed) => SEEDS.iter().map(|name| (*name, seed)).collect(),
        None => vec![(PROPTEST_SEED, 1)],
    }
}

/// A seed that no earlier run had.
fn fresh_seed() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    since.as_nanos() as u64 | 1
}

/// What must be left of the host's memory beside a guest's.
const HOST_RESERVE_MIB: u32 = 1024;

/// Memory that can be had without swapping; plenty where the host does not say.
fn host_memory_mib() -> u32 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"));
    let kib: Option<u64> = line.and_then(|l| l.split_whitespace().next()?.parse().ok());
    kib.map_or(u32::MAX, |k| u32::try_from(k >> 10).unwrap_or(u32::MAX))
}

/// Runs the steps and prints the closing line.
///
/// # Errors
/// When cargo itself cannot be started.
pub fn run(options: &Options) -> Result<ExitCode> {
    let wanted = |name: &str| options.only.as_ref().is_none_or(|o| name.contains(o.as_str()));
    let nextest = has_nextest();
    let units: &[Step] = if nextest { &[NEXTEST, EXAMPLES] } else { &[PLAIN] };
    let fuzz = if nextest { &FUZZ } else { &PLAIN_FUZZ };
    let fuzz = (options.fuzz_seconds != Some(0)).then_some(fuzz);
    let mut cases = guest_test::all(options.stress_seconds);
    cases.retain(|c| {
        let named = options.only.as_ref().is_some_and(|o| c.name.contains(o.as_str()));
        // A long test runs when it is asked for, by --long or by its whole name.
        wanted(&c.name)
            && (!c.long || options.long || (named && options.only.as_deref() == Some(&c.name)))
            && (!c.viridian_only || options.contender != "qemu")
    });
    let steps: Vec<&Step> = CHECKS.iter().chain(units).chain(fuzz).filter(|s| wanted(s.name)).collect();
    let available = host_memory_mib();
    let listed = cases.len();
    cases.retain(|c| c.memory_mib() + HOST_RESERVE_MIB <= available);
    if cases.len() < listed {
        println!("{} guest tests left out: this machine has only {available} MiB of free memory", listed - cases.len());
    }
    if options.list {
        for step in steps {
            println!("{}", step.name);
        }
        for case in &cases {
            println!("{}{}", case.name, if case.long { " (long)" } else { "" });
        }
        return Ok(ExitCode::SUCCESS);
    }

    let mut tally = Tally::default();
    let fresh = fresh_seed();
    for step in steps {
        tally.add(run_step(step, options, &seeds(step, options, fresh))?);
    }
    if !options.no_guests && !cases.is_empty() {
        println!("guest tests on {} ({} cases)", options.contender, cases.len());
        match guest_tests(options, &cases) {
            Ok(more) => tally.add(more),
            Err(error) => {
                println!("  FAILED guest tests could not start: {error:#}");
                tally.count(false);
            }
        }
    }
    println!("{} passed, {} failed", tally.passed, tally.failed);
    let nothing = tally == Tally::default();
    if nothing {
        eprintln!("error: no test matches; `cargo xtask test --list` shows what there is");
    }
    Ok(if tally.failed > 0 || nothing { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn guest_tests(options: &Options, cases: &[guest_test::Case]) -> Result<Tally> {
    let guests = Guests::locate();
    let contender = Contender::by_name(&options.contender, &guests, options.release)?;
    guest_test::run(cases, &Bench { guests: &guests, contender: &contender, patience: options.patience.max(1) })
}

fn has_nextest() -> bool {
    let quiet = |c: &mut Command| c.stdout(Stdio::null()).stderr(Stdio::null()).status();
    quiet(Command::new(env!("CARGO")).args(["nextest", "--version"])).is_ok_and(|s| s.success())
}

/// Runs one step, passes its output on, and counts the tests that its own summaries speak of; a step without a
/// summary is one test.
fn run_step(step: &Step, options: &Options, seeds: &[(&'static str, u64)]) -> Result<Tally> {
    let mut arguments = step.arguments.to_vec();
    let fuzz = step.name == FUZZ.name;
    if fuzz && options.release {
        let option = if arguments[0] == "nextest" { "--cargo-profile" } else { "--profile" };
        let at = arguments.iter().position(|a| *a == "--workspace").expect("both forms have it");
        arguments.splice(at..at, [option, "fuzz"]);
    }
    println!("{}: cargo {}", step.name, arguments.join(" "));
    let started = Instant::now();
    let mut command = Command::new(env!("CARGO"));
    if step.workspace != "." {
        crate::efi::without_hosts_flags(&mut command);
    }
    if fuzz {
        command.env("VIRIDIAN_FUZZ_SECONDS", options.fuzz_seconds.unwrap_or(FUZZ_SECONDS).to_string());
    }
    let given = seeds.iter().filter(|(name, _)| std::env::var_os(name).is_none());
    command.envs(given.map(|(name, seed)| (name, seed.to_string())));
    if let [(_, seed), _, ..] = seeds {
        println!("  seed {seed}: `cargo xtask test --only {} --seed {seed}` starts from it again", step.name);
    }
    if [NEXTEST.name, FUZZ.name].contains(&step.name) {
        // Secure Boot's rule is tested on real images, and disk images against other programs: all are packages.
        let guests = Guests::locate();
        match guests.ensure(&["efi-images", "qemu-img", "libvhdi"]) {
            Ok(()) => {
                command.env("VIRIDIAN_EFI_TREE", guests.tool("efi-images"));
                command.env("VIRIDIAN_QEMU_IMG_TREE", guests.tool("qemu-img"));
                command.env("VIRIDIAN_LIBVHDI_TREE", guests.tool("libvhdi"));
            }
            Err(error) => {
                println!("  FAILED what unit tests need of Debian's packages cannot be had: {error:#}");
                let mut tally = Tally::default();
                tally.count(false);
                return Ok(tally);
            }
        }
    }
    let mut child = command
        .args(&arguments)
        .current_dir(crate::workspace_root().join(step.workspace))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot run cargo")?;
    let stderr = child.stderr.take().expect("piped above");
    let stdout = child.stdout.take().expect("piped above");
    let nextest = arguments[0] == "nextest";
    let other = std::thread::spawn(move || pass_on(BufReader::new(stderr), nextest));
    let mut tally = pass_on(BufReader::new(stdout), nextest);
    tally.add(other.join().unwrap_or_default());
    let status = child.wait()?;
    if tally == Tally::default() {
        tally.count(status.success());
    } else if !status.success() && tally.failed == 0 {
        tally.count(false); // it broke off
    }
    let word = if status.success() { "ok    " } else { "FAILED" };
    println!("  {word} {:42} {:7.1} s", step.name, started.elapsed().as_secs_f64());
    Ok(tally)
}

fn pass_on(reader: impl BufRead, nextest: bool) -> Tally {
    let mut tally = Tally::default();
    for line in reader.split(b'\n').map_while(Result::ok) {
        let line = String::from_utf8_lossy(&line);
        if nextest && is_inner(&line) {
            continue;
        }
        if let Some(counted) = summary(&line) {
            tally.add(counted);
        }
        let _ = writeln!(std::io::stdout().lock(), "  {line}");
    }
    tally
}

/// What libtest says in the output of one test that nextest shows: nextest says (and counts) it as well.
fn is_inner(line: &str) -> bool {
    let line = line.trim();
    line.is_empty()
        || line == "running 1 test"
        || line.starts_with("test result: ")
        || (line.starts_with("test ") && line.contains(" ... "))
}

/// The numbers in `test result: ok. 3 passed; 1 failed; ...` (libtest) or `Summary [ 0.1s] 4 tests run: 3 passed, 1
/// failed, 0 skipped` (nextest).
fn summary(line: &str) -> Option<Tally> {
    let line = line.trim_start();
    if !line.starts_with("test result: ") && !line.starts_with("Summary [") {
        return None;
    }
    let words: Vec<&str> = line.split([' ', ';', ',']).filter(|w| !w.is_empty()).collect();
    let number =
        |label: &str| words.windows(2).find(|w| w[1] == label).and_then(|w| w[0].parse::<u32>().ok()).unwrap_or(0);
    Some(Tally { passed: number("passed"), failed: number("failed") + number("timed") })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_searches_has_new_seeds() {
        let mut options = Options {
            only: None,
            no_guests: false,
            list: false,
            contender: "soft".into(),
            long: false,
            stress_seconds: 60,
            fuzz_seconds: None,
            seed: None,
            release: false,
            patience: 1,
        };
        let of = |step: &Step, options: &Options| seeds(step, options, 77);
        let all = |seed: u64| SEEDS.iter().map(|name| (*name, seed)).collect::<Vec<_>>();
        for step in [&NEXTEST, &PLAIN, &FUZZ, &PLAIN_FUZZ] {
            assert_eq!(of(step, &options), [(PROPTEST_SEED, 1)], "{}", step.name);
        }
        assert!(of(&EXAMPLES, &options).is_empty());
        options.fuzz_seconds = Some(3600);
        assert_eq!((of(&NEXTEST, &options), of(&FUZZ, &options)), (vec![(PROPTEST_SEED, 1)], all(77)));
        options.long = true;
        assert_eq!((of(&NEXTEST, &options), of(&FUZZ, &options)), (all(77), all(77)));
        options.seed = Some(5);
        assert_eq!((of(&PLAIN, &options), of(&PLAIN_FUZZ, &options)), (all(5), all(5)));
    }

    #[test]
    fn summaries() {
        let of = |passed, failed| Some(Tally { passed, failed });
        assert_eq!(summary("test result: FAILED. 3 passed; 1 failed; 0 ignored; 0 measured"), of(3, 1));
        assert_eq!(summary("     Summary [   0.035s] 10 tests run: 9 passed (1 slow), 1 failed, 0 skipped"), of(9, 1));
        assert_eq!(summary("     Summary [   0.035s] 10 tests run: 10 passed, 0 skipped"), of(10, 0));
        assert_eq!(summary("running 3 tests"), None);
        assert!(is_inner("    test result: ok. 1 passed; 0 failed; 0 ignored"));
        assert!(
            !is_inner("    fuzz ring contents: 20 rounds") && !is_inner("     Summary [   0.1s] 1 test run: 1 passed")
        );
    }
}
