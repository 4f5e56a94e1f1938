//! `bench disk`: `viridian vhd` against `qemu-img`: conversions, and streams of 4 KiB requests on a dynamic VHDX; and
//! `fio` in a guest of each: synthetic SCSI on a dynamic VHDX here, virtio-scsi on a raw image under QEMU's code generator.

mod guests;

use super::Samples;
use super::table::{Table, figure};
use crate::guests::Guests;
use crate::trees;
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
    /// `qemu-img`'s cache modes for both, in turn: none, writeback.
    pub caches: Vec<String>,
    /// Kernel of the catalogue for the guests; none leaves them out.
    pub kernel: Option<String>,
}

/// Distance of two requests: prime, so that the stream jumps over the whole disk like random access, the same for both.
const STEP: u64 = 4096 * 7919;

/// Measures and prints the table.
///
/// # Errors
/// When a program cannot be run or fails.
pub fn run(options: &Options) -> Result<ExitCode> {
    let viridian = build_viridian(true)?;
    Guests::locate().ensure(&["qemu-img"])?;
    std::fs::create_dir_all(&options.folder)?;
    let at = |name: &str| options.folder.join(name);
    let mut rows = Rows::default();
    make_source(&at("source.img"), options.data_mib)?;
    for _ in 0..options.runs {
        for ours in [true, false] {
            let (vhdx, raw) = (at("target.vhdx"), at("target.img"));
            for p in [&vhdx, &raw] {
                let _ = std::fs::remove_file(p);
            }
            rows.note("raw to VHDX", ours, convert(ours, &viridian, &at("source.img"), &vhdx)?);
            rows.note("VHDX to raw", ours, convert(ours, &viridian, &vhdx, &raw)?);
            for cache in &options.caches {
                let _ = std::fs::remove_file(&vhdx);
                must(Command::new(&viridian).args(["vhd", "new"]).arg(&vhdx).arg("2G"))?;
                for (what, write) in [("allocating writes", true), ("overwrites", true), ("reads", false)] {
                    let cost = stream(ours, &viridian, &vhdx, cache, write, options)?;
                    rows.note(&format!("{what}, cache {cache}"), ours, cost);
                }
            }
        }
    }
    rows.print("qemu-img", options.runs);
    if let Some(kernel) = &options.kernel {
        guests::run(&viridian, kernel, options)?;
    }
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

/// `qemu-img` of Debian's package, from its extracted tree.
fn qemu_img() -> Command {
    trees::qemu(&Guests::locate().tool("qemu-img"), "qemu-img")
}

fn format(path: &Path) -> &'static str {
    if path.extension().is_some_and(|e| e == "vhdx") { "vhdx" } else { "raw" }
}

/// What a run has cost.
#[derive(Clone, Copy)]
struct Cost {
    /// Seconds, as the program or the clock tells.
    wall: f64,
    /// Processor time in seconds, user and system, of the process and the kernel's work for it.
    cpu: f64,
}

/// Figures by name, in the order in which they came first.
#[derive(Default)]
struct Rows(Vec<(String, [(Samples, Samples); 2])>);

impl Rows {
    fn note(&mut self, name: &str, ours: bool, cost: Cost) {
        let at = self.0.iter().position(|(n, _)| n == name).unwrap_or_else(|| {
            self.0.push((name.to_owned(), Default::default()));
            self.0.len() - 1
        });
        let (wall, cpu) = &mut self.0[at].1[usize::from(!ours)];
        wall.add(cost.wall);
        cpu.add(cost.cpu);
    }

    fn print(&self, other: &str, runs: u32) {
        let heading = |what: &str| format!("{other} {what}");
        let mut table = Table::new([
            "".into(),
            "viridian s".into(),
            heading("s"),
            "ratio".into(),
            "CPU s".into(),
            heading("CPU s"),
            "ratio".into(),
        ]);
        for (name, [ours, theirs]) in &self.0 {
            let ratio = |a: &Samples, b: &Samples| a.median().zip(b.median()).map(|(a, b)| b / a);
            table.row([
                name.clone(),
                figure(ours.0.median()),
                figure(theirs.0.median()),
                figure(ratio(&ours.0, &theirs.0)),
                figure(ours.1.median()),
                figure(theirs.1.median()),
                figure(ratio(&ours.1, &theirs.1)),
            ]);
        }
        print!("{}", table.render());
        println!("(medians of {runs} rounds; a ratio above 1 is in viridian's favour)");
    }
}

/// Runs a command that must succeed; what it printed and cost.
fn measured(command: &mut Command) -> Result<(String, Cost)> {
    let (before, started) = (children_cpu()?, Instant::now());
    let text = must(command)?;
    Ok((text, Cost { wall: started.elapsed().as_secs_f64(), cpu: children_cpu()? - before }))
}

/// Processor time of all children that were waited for: fields 16 and 17 of `/proc/self/stat`, in ticks of 10 ms.
fn children_cpu() -> Result<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let (_, rest) = stat.rsplit_once(')').context("unexpected format of /proc/self/stat")?;
    let fields: Vec<f64> = rest.split_whitespace().skip(13).take(2).filter_map(|f| f.parse().ok()).collect();
    Ok(fields.iter().sum::<f64>() / 100.0)
}

/// A conversion. `qemu-img` gets a cache mode in which it, too, ends only when its target is durable.
fn convert(ours: bool, viridian: &Path, from: &Path, to: &Path) -> Result<Cost> {
    let (_, cost) = if ours {
        measured(Command::new(viridian).args(["vhd", "convert"]).arg(from).arg(to))?
    } else {
        let options = ["convert", "-t", "writeback", "-f", format(from), "-O", format(to)];
        measured(qemu_img().args(options).arg(from).arg(to))?
    };
    Ok(cost)
}

/// A stream; its seconds as the program itself takes them: without its start and without closing the image.
fn stream(ours: bool, viridian: &Path, image: &Path, cache: &str, write: bool, options: &Options) -> Result<Cost> {
    let mut command = if ours { Command::new(viridian) } else { qemu_img() };
    if ours {
        command.args(["vhd", "bench"]);
    } else {
        command.args(["bench", "-f", "vhdx"]);
    }
    let (count, step) = (options.count.to_string(), STEP.to_string());
    command.args(["-t", cache, "-c", &count, "-d", "32", "-s", "4096", "-S", &step]);
    if write {
        command.arg("-w");
    }
    let (text, cost) = measured(command.arg(image))?;
    let seconds = text.split("Run completed in ").nth(1).and_then(|t| t.split(' ').next()).and_then(|t| t.parse().ok());
    let wall = seconds.with_context(|| format!("no time in {text:?}"))?;
    Ok(Cost { wall, ..cost })
}
