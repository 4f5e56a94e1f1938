//! Bad arguments: one clear line and status 2, before any guest is started.

use crate::session::Session;
use crate::vm::Contender;
use anyhow::{Context, Result, bail, ensure};
use std::fs;
use std::process::Command;
use std::time::Duration;

/// Arguments after `viridian run`, and a word that the message must have. `KERNEL` and `BAD` stand for a file that
/// looks like nothing and for a path that is not there.
const CASES: &[(&[&str], &str)] = &[
    (&[], "--kernel"),
    (&["--kernel", "MISSING"], "missing-file"),
    (&["--kernel", "DAMAGED"], "damaged-file"),
    (&["--kernel", "EMPTY"], "empty-file"),
    (&["--kernel", "DAMAGED", "--initrd", "MISSING"], "missing-file"),
    (&["--kernel", "DAMAGED", "--memory", "0"], "memory"),
    (&["--kernel", "DAMAGED", "--memory", "12Q"], "memory"),
    (&["--kernel", "DAMAGED", "--memory", "99999999T"], "memory"),
    (&["--kernel", "DAMAGED", "--memory", "900T"], "memory"),
    (&["--kernel", "DAMAGED", "--processors", "0"], "processors"),
    (&["--kernel", "DAMAGED", "--processors", "65"], "processors"),
    (&["--kernel", "DAMAGED", "--processors", "many"], "processors"),
    (&["--kernel", "DAMAGED", "--engine", "steam"], "engine"),
    (&["--kernel", "DAMAGED", "--cpu-model", "z80"], "cpu-model"),
    (&["--kernel", "DAMAGED", "--serial", "file:/nonexistent/dir/log"], "serial"),
    (&["--kernel", "DAMAGED", "--serial", "pigeon"], "serial"),
    (&["--no-such-option"], "--no-such-option"),
];

/// Runs all of them.
///
/// # Errors
/// Says which arguments were not refused as they should be.
pub fn check(contender: &Contender) -> Result<()> {
    let Contender::Viridian { binary, .. } = contender else { bail!("only Viridian's own arguments are tested") };
    let folder = super::log_folder().join("usage");
    fs::create_dir_all(&folder)?;
    let file = |name: &str| folder.join(name).display().to_string();
    fs::write(file("damaged-file"), vec![0x5a; 70_000])?;
    fs::write(file("empty-file"), "")?;
    for (arguments, word) in CASES {
        let mut command = Command::new(binary);
        command.arg("run");
        for argument in *arguments {
            command.arg(match *argument {
                "MISSING" => file("missing-file"),
                "DAMAGED" => file("damaged-file"),
                "EMPTY" => file("empty-file"),
                other => other.to_owned(),
            });
        }
        one(command, word).with_context(|| format!("viridian run {}", arguments.join(" ")))?;
    }
    let _ = fs::remove_dir_all(&folder);
    Ok(())
}

fn one(command: Command, word: &str) -> Result<()> {
    let mut session = Session::start(command, None, false)?;
    let status = session.finish(Duration::from_secs(20))?.context("still runs after 20 s")?;
    let text = session.text();
    ensure!(status.code() == Some(2), "ended with {status}, expected status 2: {}", text.trim());
    // clap's own messages have the error in one line and a hint how to get help after it.
    let lines = text.lines().filter(|l| !l.trim().is_empty() && !l.starts_with("Usage:") && !l.starts_with("For more"));
    let count = lines.clone().count();
    let first = lines.clone().next().unwrap_or_default();
    ensure!(first.starts_with("error: "), "expected a line that begins with `error: `, got: {}", text.trim());
    ensure!(text.contains(word), "the message does not mention {word}: {}", text.trim());
    ensure!(count <= 3, "expected one line, got {count}: {}", text.trim());
    ensure!(!text.contains("panicked"), "{}", text.trim());
    Ok(())
}
