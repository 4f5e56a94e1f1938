//! Guest tests: real kernels on the `viridian` binary, each under a time limit, judged by what the serial line says
//! and by how the program ends.

mod cases;
mod firmware;
mod hosted;
mod hyperv;
mod life;
mod nested;
mod special;
mod usage;

pub use cases::{Case, all};

use crate::guests::Guests;
use crate::initramfs;
use crate::session::{Event, Session};
use crate::vm::{Contender, Vm};
use anyhow::{Context, Result};
use cases::{Expect, Work};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

/// How many passed and failed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Tests that passed.
    pub passed: u32,
    /// Tests that failed.
    pub failed: u32,
}

impl Tally {
    /// Counts one test.
    pub fn count(&mut self, passed: bool) {
        if passed {
            self.passed += 1;
        } else {
            self.failed += 1;
        }
    }

    /// Adds another tally.
    pub fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
    }
}

/// What the tests run on.
pub struct Bench<'a> {
    /// Kernels and tools.
    pub guests: &'a Guests,
    /// What runs the machines.
    pub contender: &'a Contender,
    /// Time limits are multiplied by this.
    pub patience: u32,
}

/// Where logs of failed tests are kept.
pub fn log_folder() -> PathBuf {
    crate::workspace_root().join("target/test-logs")
}

/// Runs the cases, as many at a time as the host's processors allow, and prints a line for each.
///
/// # Errors
/// When the guests cannot be fetched.
pub fn run(cases: &[Case], bench: &Bench) -> Result<Tally> {
    let mut needed: Vec<&str> = vec!["busybox"];
    for case in cases {
        if let Work::Boot(boot) = &case.work {
            needed.push(boot.kernel);
            needed.extend(boot.tools());
        }
        if let Work::Firmware(scenario) = &case.work {
            needed.extend(scenario.needs());
        }
    }
    needed.sort_unstable();
    needed.dedup();
    bench.guests.ensure(&needed)?;
    // Some make their disks there.
    std::fs::create_dir_all(log_folder()).context("cannot make the folder for logs")?;

    let slots = Slots::new(std::thread::available_parallelism().map_or(1, |n| n.get() as u32));
    let tally = Mutex::new(Tally::default());
    let next = Mutex::new(cases.iter());
    std::thread::scope(|scope| {
        for _ in 0..slots.total {
            scope.spawn(|| {
                loop {
                    // The lock is held while waiting for processors, so that a wide case is not overtaken for ever.
                    let (case, _held) = {
                        let mut next = next.lock().expect("no panic under this lock");
                        let Some(case) = next.next() else { return };
                        (case, slots.take(case.processors()))
                    };
                    let started = Instant::now();
                    let result = run_case(case, bench);
                    report(case, started.elapsed(), &result);
                    tally.lock().expect("no panic under this lock").count(result.is_ok());
                }
            });
        }
    });
    Ok(tally.into_inner().expect("no panic under this lock"))
}

fn report(case: &Case, elapsed: Duration, result: &Result<()>) {
    let seconds = elapsed.as_secs_f64();
    let mut out = std::io::stdout().lock();
    let _ = match result {
        Ok(()) => writeln!(out, "  ok     {:42} {seconds:7.1} s", case.name),
        Err(error) => writeln!(out, "  FAILED {:42} {seconds:7.1} s: {error:#}", case.name),
    };
}

/// Makes an empty dynamic VHDX with the program under test, and gives it to the guest.
fn add_disk(command: &mut Command, image: &Path, mib: u32) -> Result<()> {
    if let Some(folder) = image.parent() {
        std::fs::create_dir_all(folder)?;
    }
    // What an earlier failure has left.
    let _ = std::fs::remove_file(image);
    let made = Command::new(command.get_program()).args(["vhd", "new"]).arg(image).arg(format!("{mib}M")).status()?;
    anyhow::ensure!(made.success(), "viridian vhd new ended with {made}");
    command.arg("--disk").arg(image);
    Ok(())
}

fn run_case(case: &Case, bench: &Bench) -> Result<()> {
    match &case.work {
        Work::Usage => usage::check(bench.contender),
        Work::Firmware(scenario) => {
            let folder = log_folder().join(case.name.replace('/', "-"));
            let _ = std::fs::remove_dir_all(&folder);
            std::fs::create_dir_all(&folder)?;
            scenario.run(bench, &folder).with_context(|| format!("logs in {}", shown(&folder)))?;
            let _ = std::fs::remove_dir_all(&folder);
            Ok(())
        }
        Work::Boot(boot) => {
            let kernel = bench.guests.kernel(boot.kernel)?;
            let mut contents = boot.contents();
            if boot.nested {
                nested::add(&mut contents, bench.contender)?;
            }
            let initrd = initramfs::build(bench.guests, &kernel, &contents)?;
            let vm = Vm {
                kernel: kernel.image,
                initrd,
                append: boot.append.clone(),
                memory_mib: boot.memory_mib,
                processors: boot.processors,
            };
            let log = log_folder().join(format!("{}.log", case.name.replace('/', "-")));
            let limit = Duration::from_secs(u64::from(boot.seconds) * u64::from(bench.patience));
            let result = match &boot.expect {
                Expect::Terminal => special::terminal(bench.contender, &vm, &log, limit),
                Expect::Scenario(act) => act(&hosted::Stage { bench, boot, vm: &vm, log: &log, limit }),
                Expect::SaveAndRestore(when) => special::save_and_restore(bench.contender, &vm, when, &log, limit),
                _ => {
                    let mut command = bench.contender.command(&vm);
                    let image = log.with_extension("vhdx");
                    command.args(boot.options);
                    if !boot.counters.is_empty() {
                        command.arg("--stats");
                    }
                    if let Some(mib) = boot.disk_mib {
                        add_disk(&mut command, &image, mib)?;
                    }
                    let mut session = Session::start(command, Some(&log), boot.input.is_some())?;
                    judge(boot, &mut session, bench)
                }
            };
            match result {
                Ok(()) => {
                    let _ = std::fs::remove_file(log.with_extension("vhdx"));
                    let _ = std::fs::remove_file(&log);
                    Ok(())
                }
                Err(error) => Err(error.context(format!("log in {}", shown(&log)))),
            }
        }
    }
}

/// A path as a developer types it.
fn shown(path: &Path) -> String {
    path.strip_prefix(crate::workspace_root()).unwrap_or(path).display().to_string()
}

/// Text of the guest that means that waiting is useless.
const FATAL: &[&str] = &["Kernel panic - not syncing", "Attempted to kill init", "---[ end Kernel panic"];

fn judge(boot: &cases::Boot, session: &mut Session, bench: &Bench) -> Result<()> {
    let limit = Duration::from_secs(u64::from(boot.seconds) * u64::from(bench.patience));
    let deadline = Instant::now() + limit;
    if let Some(input) = &boot.input {
        // What is typed before the shell asks would reach nobody.
        let event = session.wait_for(limit, |t| t.contains(input.after) || is_fatal(t))?;
        expect_seen(event, limit, session.text(), input.after)?;
        let mut keyboard = session.input().context("input was asked for")?;
        keyboard.write_all(input.text.as_bytes()).context("cannot type into the guest")?;
        // The pipe stays open until the guest is done: its end must not mean anything to the test.
        let result = judge_end(boot, session, bench, deadline, limit);
        drop(keyboard);
        return result;
    }
    judge_end(boot, session, bench, deadline, limit)
}

fn judge_end(
    boot: &cases::Boot,
    session: &mut Session,
    bench: &Bench,
    deadline: Instant,
    limit: Duration,
) -> Result<()> {
    let left = || deadline.saturating_duration_since(Instant::now());
    match &boot.expect {
        Expect::Verdict => {
            let event = session.wait_for(left(), |t| verdict(t).is_some() || is_fatal(t))?;
            expect_seen(event, limit, session.text(), "the verdict")?;
            let verdict = verdict(session.text()).context("no verdict")?.to_owned();
            let modules: Vec<_> = session.text().lines().filter(|l| l.starts_with("VIRIDIAN-MODULE: FAIL")).collect();
            anyhow::ensure!(verdict.starts_with("PASS"), "the guest says {verdict}");
            anyhow::ensure!(modules.is_empty(), "{}", modules.join(", "));
            power_off(session, bench)?;
            hosted::check_counters(session.text(), boot.counters)
        }
        Expect::Text(wanted) => {
            for want in *wanted {
                let event = session.wait_for(left(), |t| t.contains(want) || is_fatal(t))?;
                expect_seen(event, limit, session.text(), want)?;
            }
            power_off(session, bench)
        }
        Expect::Stops(want) => {
            let event = session.wait_for(left(), |t| t.contains(want) || is_fatal(t))?;
            expect_seen(event, limit, session.text(), want)
        }
        Expect::Boots(count) => {
            let boots = |t: &str| t.matches("VIRIDIAN-INIT").count();
            let event = session.wait_for(left(), |t| boots(t) >= *count || is_fatal(t))?;
            expect_seen(event, limit, session.text(), &format!("{count} boots"))?;
            let verdict = verdict(session.text()).context("no verdict before the reset")?;
            anyhow::ensure!(verdict.starts_with("PASS"), "before the reset the guest says {verdict}");
            Ok(())
        }
        Expect::Terminal | Expect::SaveAndRestore(_) | Expect::Scenario(_) => {
            anyhow::bail!("this case has a procedure of its own")
        }
        Expect::CrashReport => {
            // The guest's console and the report are two pipes: either may come first.
            let report = |t: &str| t.split_once("the guest has crashed: ").map(|(_, rest)| rest.to_owned());
            let event = session.wait_for(left(), |t| {
                report(t).is_some_and(|r| r.contains("Kernel panic - not syncing: sysrq triggered crash"))
            })?;
            anyhow::ensure!(event == Event::Seen, "no report of the crash with the kernel's last words came");
            session.kill();
            Ok(())
        }
        Expect::TripleFault => {
            let event = session.wait_for(left(), |_| false)?;
            anyhow::ensure!(
                event == Event::Ended,
                "the machine went on for {} s after a triple fault",
                limit.as_secs()
            );
            let status = session.finish(Duration::from_secs(10))?.context("the program did not end")?;
            anyhow::ensure!(!status.success(), "a triple fault ended the program with {status}");
            for want in ["triple fault", "rip", "cr3"] {
                let found = session.text().to_ascii_lowercase().contains(want);
                anyhow::ensure!(found, "the report of the triple fault does not mention {want}");
            }
            Ok(())
        }
    }
}

/// After its work the guest powers off, which ends the program with status 0.
fn power_off(session: &mut Session, bench: &Bench) -> Result<()> {
    let limit = Duration::from_secs(60 * u64::from(bench.patience));
    let status = session.finish(limit)?;
    let status = status.with_context(|| format!("the program still ran {} s after power-off", limit.as_secs()))?;
    anyhow::ensure!(status.success(), "power-off ended the program with {status}, expected status 0");
    Ok(())
}

fn verdict(text: &str) -> Option<&str> {
    let (_, rest) = text.split_once("VIRIDIAN-VERDICT: ")?;
    rest.split_once('\n').map(|(line, _)| line.trim_end())
}

fn is_fatal(text: &str) -> bool {
    // Only the newest output: the whole text is looked at for each chunk.
    let mut from = text.len().saturating_sub(8192);
    while !text.is_char_boundary(from) {
        from += 1;
    }
    FATAL.iter().any(|f| text[from..].contains(f))
}

fn expect_seen(event: Event, limit: Duration, text: &str, what: &str) -> Result<()> {
    let last = || text.lines().rev().map(str::trim).find(|l| !l.is_empty()).unwrap_or("(nothing)").to_owned();
    match event {
        Event::Seen if text.contains("VIRIDIAN-VERDICT") || !is_fatal(text) => Ok(()),
        Event::Seen => {
            let line = text.lines().find(|l| l.contains("Kernel panic")).unwrap_or("Kernel panic");
            anyhow::bail!("{}", line.trim())
        }
        Event::Ended => anyhow::bail!("the program ended before {what}; last line: {}", last()),
        Event::TimedOut => anyhow::bail!("no {what} within {} s; last line: {}", limit.as_secs(), last()),
    }
}

/// The host's processors, taken by tests as they are by their guests.
struct Slots {
    total: u32,
    free: Mutex<u32>,
    freed: Condvar,
}

struct Held<'a> {
    slots: &'a Slots,
    count: u32,
}

impl Slots {
    fn new(total: u32) -> Self {
        Self { total, free: Mutex::new(total), freed: Condvar::new() }
    }

    /// Waits for `count` processors; a case that wants more than the host has gets all.
    fn take(&self, count: u32) -> Held<'_> {
        let count = count.clamp(1, self.total);
        let free = self.free.lock().expect("no panic under this lock");
        let mut free = self.freed.wait_while(free, |f| *f < count).expect("no panic under this lock");
        *free -= count;
        Held { slots: self, count }
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        if let Ok(mut free) = self.slots.free.lock() {
            *free += self.count;
        }
        self.slots.freed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdicts() {
        assert_eq!(verdict("a\nVIRIDIAN-VERDICT: PASS 3 checks\r\nb"), Some("PASS 3 checks"));
        assert_eq!(verdict("VIRIDIAN-VERDICT: PA"), None, "the line is not complete");
    }

    #[test]
    fn a_panic_is_noticed_at_once() {
        let text = format!("{}ä\n[ 1.0] Kernel panic - not syncing: No init\n", "x".repeat(9000));
        assert!(is_fatal(&text));
        let error = expect_seen(Event::Seen, Duration::from_secs(1), &text, "the verdict").unwrap_err();
        assert!(error.to_string().contains("No init"), "{error}");
    }

    #[test]
    fn case_names_are_unique() {
        let cases = all(60);
        for (i, case) in cases.iter().enumerate() {
            assert!(cases[..i].iter().all(|other| other.name != case.name), "{} twice", case.name);
        }
    }
}
