//! Tests that do more than look at one boot: the terminal, and a machine that moves from one process to another.

use super::{expect_seen, is_fatal, verdict};
use crate::session::{Session, Signal};
use crate::vm::{Contender, Vm};
use anyhow::{Context, Result, bail, ensure};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// Control and `]`, the key that `viridian run --help` documents.
const LEAVE_KEY: &[u8] = b"\x1d";

/// The terminal is raw while the guest has it; the key leaves with status 0; the settings are what they were.
///
/// # Errors
/// Says what was not so.
pub fn terminal(contender: &Contender, vm: &Vm, log: &Path, limit: Duration) -> Result<()> {
    let (mut session, mut terminal) = Session::on_terminal(contender.command(vm), log)?;
    // The program may have changed them already: what a fresh terminal has is known by opening another.
    let (_other, untouched) = Session::on_terminal(Command::new("true"), &log.with_extension("true.log"))?;
    let before = untouched.settings()?;
    let _ = std::fs::remove_file(log.with_extension("true.log"));

    let event = session.wait_for(limit, |t| t.contains("viridian:") || is_fatal(t))?;
    expect_seen(event, limit, session.text(), "the shell's prompt")?;
    ensure!(terminal.is_raw()?, "the terminal is not raw while the guest has it");
    // Control-C is the guest's: it ends the guest's command, not the program.
    terminal.type_bytes(b"sleep 1000\r")?;
    let event = session.wait_for(limit, |t| t.contains("sleep 1000"))?;
    expect_seen(event, limit, session.text(), "the guest's echo")?;
    std::thread::sleep(Duration::from_millis(500));
    terminal.type_bytes(b"\x03")?;
    terminal.type_bytes(b"echo answer-$((6 * 7))\r")?;
    let event = session.wait_for(limit, |t| t.contains("answer-42") || is_fatal(t))?;
    expect_seen(event, limit, session.text(), "the shell's answer")?;
    terminal.type_bytes(LEAVE_KEY)?;
    let status = session.finish(Duration::from_secs(30))?.context("the key did not end the program within 30 s")?;
    ensure!(status.success(), "the key ended the program with {status}, expected status 0");
    let after = terminal.settings()?;
    ensure!(before == after, "the terminal's settings have changed from {before} to {after}");
    Ok(())
}

/// Saves the running machine when `when` appears and lets another process go on with it.
///
/// # Errors
/// Says at which step it failed.
pub fn save_and_restore(contender: &Contender, vm: &Vm, when: &str, log: &Path, limit: Duration) -> Result<()> {
    let Contender::Viridian { binary, engine, options } = contender else { bail!("only Viridian saves machines so") };
    let state = log.with_extension("state");
    let mut command = contender.command(vm);
    command.arg("--save").arg(&state);
    let mut first = Session::start(command, Some(log), false)?;
    let event = first.wait_for(limit, |t| t.contains(when) || is_fatal(t))?;
    expect_seen(event, limit, first.text(), when)?;
    first.signal(Signal::USR1)?;
    let status = first.finish(Duration::from_secs(120))?.context("saving took more than 120 s")?;
    ensure!(status.success(), "saving ended the program with {status}");
    ensure!(verdict(first.text()).is_none(), "the guest was at its end before it was saved");

    let mut command = Command::new(binary);
    command.args(["run", "--engine", engine]).args(options).arg("--restore").arg(&state);
    let mut second = Session::start(command, Some(&log.with_extension("restored.log")), false)?;
    let event = second.wait_for(limit, |t| verdict(t).is_some() || is_fatal(t))?;
    let result = expect_seen(event, limit, second.text(), "the verdict after restoring");
    let _ = std::fs::remove_file(&state);
    result.with_context(|| format!("log in {}", super::shown(&log.with_extension("restored.log"))))?;
    let verdict = verdict(second.text()).unwrap_or_default();
    ensure!(verdict.starts_with("PASS"), "after restoring, the guest says {verdict}");
    ensure!(!second.text().contains("VIRIDIAN-INIT"), "the guest was booted again, not restored");
    let status = second.finish(Duration::from_secs(60))?.context("the program still ran 60 s after power-off")?;
    ensure!(status.success(), "power-off ended the program with {status}");
    let _ = std::fs::remove_file(log.with_extension("restored.log"));
    Ok(())
}
