//! The conformance program under Viridian's firmware and, as the oracle, under OVMF on QEMU.
//!
//! Under Viridian every answer must be one that the specification allows. Where OVMF answers otherwise, the difference must
//! stand in `differences.txt` beside this file, with its reason; what stands there and is none any more is an error too.

use super::super::Bench;
use super::machine::{Machine, fat_disk};
use crate::session::Session;
use crate::trees;
use anyhow::{Context, Result, bail, ensure};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

const DIFFERENCES: &str = include_str!("differences.txt");
const SCRATCH: &[u8] = b"VIRIDIAN-SCRATCH";
const SCRATCH_BYTES: u64 = 4 << 20;

/// One check of a transcript.
#[derive(Debug, PartialEq, Eq)]
struct Check {
    expects: String,
    got: String,
}

impl Check {
    fn is_good(&self) -> bool {
        self.expects.split(',').any(|e| e == self.got)
    }
}

/// What a run has printed: checks by name, and the names of groups that it left out.
#[derive(Debug, Default)]
struct Transcript {
    checks: BTreeMap<String, Check>,
    skipped: BTreeSet<String>,
}

impl Transcript {
    /// Reads the lines of a serial line's text, in which a console may have written between them.
    fn read(text: &str) -> Result<Self> {
        let mut t = Self::default();
        let mut end = None;
        for line in text.lines().map(str::trim) {
            if let Some(rest) = line.strip_prefix("CHECK ") {
                let parsed =
                    rest.split_once(" expects=").and_then(|(name, rest)| Some((name, rest.split_once(" got=")?)));
                let (name, (expects, got)) = parsed.with_context(|| format!("a line that is cut off: {line}"))?;
                let check = Check { expects: expects.to_owned(), got: got.to_owned() };
                ensure!(t.checks.insert(name.to_owned(), check).is_none(), "{name} was checked twice");
            } else if let Some(rest) = line.strip_prefix("SKIP ") {
                t.skipped.insert(rest.split(' ').next().unwrap_or_default().to_owned());
            } else if let Some(count) = line.strip_prefix("CONFORMANCE-END ") {
                end = Some(count.parse::<usize>().context("the last line is cut off")?);
            }
        }
        let last = || t.checks.len().to_string();
        let count = end.with_context(|| format!("the program broke off after {} checks", last()))?;
        ensure!(count == t.checks.len(), "{} of {count} checks were printed", t.checks.len());
        Ok(t)
    }

    fn is_skipped(&self, name: &str) -> bool {
        self.skipped.iter().any(|s| name.strip_prefix(s.as_str()).is_some_and(|rest| rest.starts_with(['.', '/'])))
    }
}

/// A line of the table: check, Viridian's answer, OVMF's, and why.
struct Difference<'a> {
    name: &'a str,
    ours: &'a str,
    theirs: &'a str,
}

fn differences(table: &str) -> Result<Vec<Difference<'_>>> {
    let lines = table.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#'));
    lines
        .map(|line| {
            let fields: Vec<&str> = line.split('|').map(str::trim).collect();
            let [name, ours, theirs, why] = fields[..] else { bail!("differences.txt: four fields in {line:?}") };
            ensure!(why.len() > 10, "differences.txt: {name} has no explanation");
            Ok(Difference { name, ours, theirs })
        })
        .collect()
}

/// What is wrong: answers that the specification does not allow, and differences without explanation.
fn compare(ours: &Transcript, theirs: &Transcript, table: &[Difference<'_>]) -> Vec<String> {
    let mut wrong = Vec::new();
    for (name, check) in &ours.checks {
        if !check.is_good() {
            wrong.push(format!("{name}: {} instead of {}", check.got, check.expects));
        }
    }
    for group in &ours.skipped {
        wrong.push(format!("{group}: Viridian's firmware does not offer it"));
    }
    let absent = Check { expects: String::new(), got: "-".to_owned() };
    for name in ours.checks.keys().chain(theirs.checks.keys()).collect::<BTreeSet<_>>() {
        if theirs.is_skipped(name) {
            continue;
        }
        let (a, b) = (ours.checks.get(name).unwrap_or(&absent), theirs.checks.get(name).unwrap_or(&absent));
        let known = table.iter().find(|d| d.name == name);
        match known {
            None if a.got != b.got => {
                wrong.push(format!("{name}: Viridian {}, OVMF {}, and no explanation", a.got, b.got));
            }
            Some(d) if (d.ours, d.theirs) != (a.got.as_str(), b.got.as_str()) => {
                let told = format!("the table says {} and {}", d.ours, d.theirs);
                wrong.push(format!("{name}: Viridian {}, OVMF {}; {told}", a.got, b.got));
            }
            _ => {}
        }
    }
    for d in table {
        if d.ours == d.theirs || !ours.checks.contains_key(d.name) {
            wrong.push(format!("{}: is in the table of differences, and is none", d.name));
        }
    }
    wrong
}

/// The program's disk and the one that it may write on.
fn disks(bench: &Bench, folder: &Path, program: &Path, who: &str) -> Result<[PathBuf; 2]> {
    let (boot, scratch) = (folder.join(format!("{who}-boot.img")), folder.join(format!("{who}-scratch.img")));
    fat_disk(bench, &boot, 8, &[(program, super::programs::DEFAULT)])?;
    fs::write(&scratch, SCRATCH)?;
    fs::OpenOptions::new().write(true).open(&scratch)?.set_len(SCRATCH_BYTES)?;
    Ok([boot, scratch])
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path that is not UTF-8")
}

fn on_viridian(bench: &Bench, folder: &Path, program: &Path) -> Result<Transcript> {
    let [boot, scratch] = disks(bench, folder, program, "viridian")?;
    let (state, keys) = (folder.join("state"), ["--secure-boot-template", "none"]);
    let arguments = ["--memory", "256M", "--disk", text(&boot)?, "--disk", text(&scratch)?, "--state", text(&state)?];
    let mut machine = Machine::start(bench, folder, "viridian", &[&arguments[..], &keys].concat())?;
    machine.expect("CONFORMANCE-BEGIN")?;
    machine.expect("CONFORMANCE-END ").context("on Viridian")?;
    machine.powered_off()?;
    Transcript::read(machine.text()).context("on Viridian")
}

fn on_ovmf(bench: &Bench, folder: &Path, program: &Path) -> Result<Transcript> {
    let [boot, scratch] = disks(bench, folder, program, "ovmf")?;
    let tree = bench.guests.tool("qemu");
    let ovmf = bench.guests.tool("ovmf").join("usr/share/OVMF");
    let variables = folder.join("ovmf-variables.fd");
    // Without any key: setup mode.
    fs::copy(ovmf.join("OVMF_VARS_4M.fd"), &variables)?;
    let mut command = trees::qemu(&tree, "qemu-system-x86_64");
    command.args(["-accel", "tcg", "-cpu", "max", "-machine", "q35,smm=on", "-nic", "none", "-smp", "1", "-m", "256"]);
    command.args(["-display", "none", "-serial", "stdio", "-vga", "std", "-no-reboot"]);
    command.args(["-global", "driver=cfi.pflash01,property=secure,value=on", "-device", "virtio-rng-pci"]);
    let code = ovmf.join("OVMF_CODE_4M.secboot.fd");
    command.arg("-drive").arg(format!("if=pflash,format=raw,unit=0,readonly=on,file={}", code.display()));
    command.arg("-drive").arg(format!("if=pflash,format=raw,unit=1,file={}", variables.display()));
    command.args(["-device", "virtio-scsi-pci,id=scsi"]);
    for (i, disk) in [boot, scratch].iter().enumerate() {
        command.arg("-drive").arg(format!("if=none,id=d{i},format=raw,file={}", disk.display()));
        command.args(["-device", &format!("scsi-hd,bus=scsi.0,scsi-id={i},drive=d{i}")]);
    }
    let limit = Duration::from_secs(120 * u64::from(bench.patience));
    let mut session = Session::start(command, Some(&folder.join("ovmf.log")), false)?;
    session.wait_for(limit, |t| t.contains("CONFORMANCE-END "))?;
    let ended = session.finish(Duration::from_secs(20))?;
    let transcript = Transcript::read(session.text()).context("on OVMF")?;
    ensure!(ended.is_some(), "OVMF has not powered QEMU off");
    Ok(transcript)
}

/// Both runs and their comparison.
pub fn check(bench: &Bench, folder: &Path) -> Result<()> {
    let program = crate::efi::conformance()?;
    let ours = on_viridian(bench, folder, &program)?;
    let theirs = on_ovmf(bench, folder, &program)?;
    let wrong = compare(&ours, &theirs, &differences(DIFFERENCES)?);
    ensure!(ours.checks.len() > 900, "only {} checks", ours.checks.len());
    ensure!(wrong.is_empty(), "{} of {} answers:\n    {}", wrong.len(), ours.checks.len(), wrong.join("\n    "));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: &str = "\x1b[2JCHECK\r\nCHECK A/one expects=SUCCESS got=SUCCESS\r\nnoise\r\nCHECK A/two expects=NOT_FOUND,UNSUPPORTED \
                        got=UNSUPPORTED\r\nCONFORMANCE-END 2\r\n";
    const THEIRS: &str = "CHECK A/one expects=SUCCESS got=SUCCESS\nCHECK A/two expects=NOT_FOUND,UNSUPPORTED got=NOT_FOUND\nSKIP B why\nCONFORMANCE-END 2\n";

    #[test]
    fn differences_must_be_explained() {
        let (ours, theirs) = (Transcript::read(OURS).unwrap(), Transcript::read(THEIRS).unwrap());
        let wrong = compare(&ours, &theirs, &[]);
        assert_eq!(wrong, ["A/two: Viridian UNSUPPORTED, OVMF NOT_FOUND, and no explanation"]);
        let table = differences("# c\n\nA/two | UNSUPPORTED | NOT_FOUND | both are allowed there").unwrap();
        assert!(compare(&ours, &theirs, &table).is_empty());
        assert_eq!(compare(&ours, &ours, &table).len(), 1, "what is no difference any more");
        assert!(differences("A/two | UNSUPPORTED | NOT_FOUND | -").is_err());
    }

    #[test]
    fn broken_transcripts_and_wrong_answers_are_found() {
        assert!(Transcript::read(&OURS.replace("CONFORMANCE-END 2", "")).is_err());
        assert!(Transcript::read(&OURS.replace("END 2", "END 3")).is_err());
        let wrong = Transcript::read(&OURS.replace("got=SUCCESS", "got=ABORTED")).unwrap();
        assert_eq!(compare(&wrong, &wrong, &[]), ["A/one: ABORTED instead of SUCCESS"]);
    }

    #[test]
    fn the_table_is_well_formed() {
        differences(DIFFERENCES).unwrap();
    }
}
