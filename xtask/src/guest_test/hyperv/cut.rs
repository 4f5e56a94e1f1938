//! Power cuts: the process is killed while the guest writes (`tests/guest/hyperv-cut.sh`). Afterwards the images open,
//! check clean, and hold every record of which the guest had said that it was flushed.

use super::noise;
use crate::guest_test::hosted::{Hosted, Stage};
use crate::initramfs::disks::{must, tool};
use anyhow::{Context, Result, bail, ensure};
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::Duration;

/// Cuts in one run.
const CUTS: u32 = 4;

/// Runs it.
///
/// # Errors
/// Says what was lost or damaged.
pub fn cut(stage: &Stage) -> Result<()> {
    let (system, records) = (stage.file("vhdx"), stage.file("records.vhdx"));
    stage.new_disk(&system, "256M", "1M")?;
    stage.new_disk(&records, "512M", "1M")?;
    let mut known: Vec<(u64, u64)> = Vec::new();
    for turn in 0..CUTS {
        let first = known.last().map_or(0, |(n, _)| n + 1);
        let vm = crate::vm::Vm { append: format!("{},{first}", stage.boot.append), ..stage.vm.clone() };
        let turn_stage = Stage { vm: &vm, ..*stage };
        let arguments =
            ["--disk", &system.display().to_string(), "--disk", &records.display().to_string()].map(str::to_owned);
        let mut guest = Hosted::boot(&turn_stage, &arguments)?;
        let session = guest.session();
        let event = session.wait_for(stage.limit, |t| t.contains("VIRIDIAN-RECORD") || t.contains("VERDICT"))?;
        crate::guest_test::expect_seen(event, stage.limit, session.text(), "the first record")?;
        // Some moment of the next two seconds, the same in every run of the test.
        let pause = u64::from(noise(1, u64::from(turn) * 7919 + 11)[0]) * 8;
        session.wait_for(Duration::from_millis(500 + pause), |t| t.contains("VERDICT"))?;
        session.kill();
        // What the guest had said before the cut.
        session.wait_for(Duration::from_secs(1), |_| false)?;
        let before = known.len();
        known.extend(session.text().lines().filter_map(record));
        ensure!(known.len() > before + 5, "only {} records before the cut", known.len() - before);
        check(stage, &system, &records, &known).with_context(|| format!("after cut {}", turn + 1))?;
    }
    for f in [system, records] {
        let _ = std::fs::remove_file(f);
    }
    Ok(())
}

/// A complete line of the guest: number and place.
fn record(line: &str) -> Option<(u64, u64)> {
    let (_, rest) = line.split_once("VIRIDIAN-RECORD: ")?;
    let mut words = rest.split_whitespace();
    Some((words.next()?.parse().ok()?, words.next()?.parse().ok()?))
}

fn check(stage: &Stage, system: &Path, records: &Path, known: &[(u64, u64)]) -> Result<()> {
    let raw = stage.file("cut.img");
    let convert = |from: &Path| -> Result<()> {
        let _ = std::fs::remove_file(&raw);
        must(stage.viridian(&["vhd", "convert"])?.arg(from).arg(&raw)).map(drop)
    };
    for image in [system, records] {
        must(stage.viridian(&["vhd", "check"])?.arg(image))?;
    }
    convert(records)?;
    let file = File::open(&raw)?;
    // A place may have been written again by a later record.
    for (i, (number, at)) in known.iter().enumerate() {
        let later: Vec<u64> = known[i..].iter().filter(|(_, a)| a == at).map(|(n, _)| *n).collect();
        let mut bytes = [0; 16];
        file.read_exact_at(&mut bytes, at * 4096)?;
        let said: Option<u64> = std::str::from_utf8(&bytes[..15]).ok().and_then(|t| t.parse().ok());
        // The cut may have come between the record that was told last and the next, which lies there already.
        if !said.is_some_and(|said| later.contains(&said) || said > known.last().map_or(0, |k| k.0)) {
            bail!("record {number} was flushed but block {at} holds {:?}", String::from_utf8_lossy(&bytes));
        }
    }
    convert(system)?;
    let guests = stage.bench.guests;
    must(tool(guests, "sbin/e2fsck").args(["-E", "journal_only", "-p"]).arg(&raw)).context("replaying the journal")?;
    must(tool(guests, "sbin/e2fsck").arg("-fn").arg(&raw)).context("ext4")?;
    let _ = std::fs::remove_file(&raw);
    Ok(())
}
