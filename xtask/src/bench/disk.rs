//! `bench disk`: `viridian vhd` against `qemu-img`: conversions, and streams of 4 KiB requests on a dynamic VHDX.

use super::Samples;
use super::table::{Table, figure};
use crate::vm::build_viridian;
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

/// What is measured.
pub struct Options {
    /// Rounds.
    pub runs: u32,
    /// Where the images are made.
    pub folder: PathBuf,
    /// MiB of random data in the image that is converted; its disk is twice as large.
    pub data_mib: u64,
    /// Requests in a stream.
    pub count: u64,
    /// `qemu-img`'s cache mode for both: none or writeback.
    pub cache: String,
}

/// Distance of two requests: prime, so that the stream jumps over the whole disk like random access, the same for both.
const STEP: u64 = 4096 * 7919;

/// Measures and prints the table.
///
/// # Errors
/// When a program cannot be run or fails.
pub fn run(options: &Options) -> Result<ExitCode> {
    let viridian = build_viridian(true)?;
    std::fs::create_dir_all(&options.folder)?;
    let at = |name: &str| options.folder.join(name);
    let mut figures: Vec<(&str, Samples, Samples)> =
        ["raw to VHDX, s", "VHDX to raw, s", "allocating writes, s", "overwrites, s", "reads, s"]
            .map(|name| (name, Samples::default(), Samples::default()))
            .into();
    make_source(&at("source.img"), options.data_mib)?;
    for _ in 0..options.runs {
        for ours in [true, false] {
            let (vhdx, raw) = (at("target.vhdx"), at("target.img"));
            for p in [&vhdx, &raw] {
                let _ = std::fs::remove_file(p);
            }
            let mut note = |i: usize, seconds: f64| {
                let (_, a, b) = &mut figures[i];
                if ours { a.add(seconds) } else { b.add(seconds) }
            };
            note(0, convert(ours, &viridian, &at("source.img"), &vhdx)?);
            note(1, convert(ours, &viridian, &vhdx, &raw)?);
            std::fs::remove_file(&vhdx)?;
            must(Command::new(&viridian).args(["vhd", "new"]).arg(&vhdx).arg("2G"))?;
            for (i, write) in [(2, true), (3, true), (4, false)] {
                note(i, stream(ours, &viridian, &vhdx, write, options)?);
            }
        }
    }
    let mut table = Table::new(["", "viridian", "qemu-img", "ratio"]);
    for (name, ours, theirs) in &figures {
        let ratio = ours.median().zip(theirs.median()).map(|(a, b)| b / a);
        table.row([(*name).to_string(), figure(ours.median()), figure(theirs.median()), figure(ratio)]);
    }
    print!("{}", table.render());
    println!(
        "(medians of {} rounds; cache mode {}; a ratio above 1 is in viridian's favour)",
        options.runs, options.cache
    );
    for name in ["source.img", "target.vhdx", "target.img"] {
        let _ = std::fs::remove_file(at(name));
    }
    Ok(ExitCode::SUCCESS)
}

/// Random data, then a hole of the same size.
fn make_source(path: &Path, mib: u64) -> Result<()> {
    let mut file = std::fs::File::create(path)?;
    let random = std::fs::File::open("/dev/urandom")?;
    std::io::copy(&mut std::io::Read::take(random, mib << 20), &mut file)?;
    file.set_len(mib << 21)?;
    Ok(())
}

fn must(command: &mut Command) -> Result<String> {
    let out = command.stdin(Stdio::null()).output().with_context(|| format!("cannot run {command:?}"))?;
    if !out.status.success() {
        bail!("{command:?}: {}", String::from_utf8_lossy(&out.stderr));
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

fn format(path: &Path) -> &'static str {
    if path.extension().is_some_and(|e| e == "vhdx") { "vhdx" } else { "raw" }
}

/// Seconds of a conversion. `qemu-img` gets a cache mode in which it, too, ends only when its target is durable.
fn convert(ours: bool, viridian: &Path, from: &Path, to: &Path) -> Result<f64> {
    let started = Instant::now();
    if ours {
        must(Command::new(viridian).args(["vhd", "convert"]).arg(from).arg(to))?;
    } else {
        let options = ["convert", "-t", "writeback", "-f", format(from), "-O", format(to)];
        must(Command::new("qemu-img").args(options).arg(from).arg(to))?;
    }
    Ok(started.elapsed().as_secs_f64())
}

/// Seconds of a stream, as the program itself takes them: without its start and without closing the image.
fn stream(ours: bool, viridian: &Path, image: &Path, write: bool, options: &Options) -> Result<f64> {
    let mut command = if ours { Command::new(viridian) } else { Command::new("qemu-img") };
    if ours {
        command.args(["vhd", "bench"]);
    } else {
        command.args(["bench", "-f", "vhdx"]);
    }
    let (count, step) = (options.count.to_string(), STEP.to_string());
    command.args(["-t", &options.cache, "-c", &count, "-d", "32", "-s", "4096", "-S", &step]);
    if write {
        command.arg("-w");
    }
    let text = must(command.arg(image))?;
    let seconds = text.split("Run completed in ").nth(1).and_then(|t| t.split(' ').next()).and_then(|t| t.parse().ok());
    seconds.with_context(|| format!("no time in {text:?}"))
}
