//! Synthetic storage: `tests/guest/hyperv-disks.sh`.

use super::{common, noise, sha256sum, value};
use crate::guest_test::hosted::{Hosted, Stage};
use crate::initramfs::disks::{disc, must, root, tool};
use anyhow::{Context, Result, bail, ensure};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::Duration;

fn text(path: &Path) -> String {
    path.display().to_string()
}

/// Runs it: twice in one process, with a restart by the host in between and a shutdown by the host at the end; then
/// the images must be clean.
///
/// # Errors
/// Says what was not so.
pub fn disks(stage: &Stage) -> Result<()> {
    let guests = stage.bench.guests;
    let (system, data, hot) = (stage.file("vhdx"), stage.file("data.vhdx"), stage.file("hot.vhdx"));
    let (first, second) = (stage.file("first.iso"), stage.file("second.iso"));
    let files = [&system, &data, &hot, &first, &second];
    files.iter().for_each(|f| drop(std::fs::remove_file(f)));
    let plain = root(guests, &stage.boot.root_contents())?;
    must(stage.viridian(&["vhd", "convert"])?.arg(&plain).arg(&system))?;
    stage.new_disk(&data, "256M", "1M")?;
    stage.new_disk(&hot, "64M", "8M")?;
    let (one, two) = (noise(3 << 20, 1), noise(2 << 20, 2));
    disc(guests, &first, "first", &one)?;
    disc(guests, &second, "second", &two)?;

    // The drive and the data disk are added while the guest runs.
    let arguments = ["--disk", &text(&system)].map(str::to_owned);
    let mut guest = Hosted::boot(stage, &arguments)?;
    guest.serve(|guest, words| act(guest, words, stage, &one, &two))?;
    guest.guest(&["shutdown", "--restart"])?;
    guest.serve(|guest, words| act(guest, words, stage, &one, &two))?;
    guest.guest(&["shutdown"])?;
    guest.end(Duration::from_secs(60))?;

    for image in [&system, &data, &hot] {
        must(stage.viridian(&["vhd", "check"])?.arg(image))?;
    }
    let raw = stage.file("checked.img");
    for image in [&system, &hot] {
        let _ = std::fs::remove_file(&raw);
        must(stage.viridian(&["vhd", "convert"])?.arg(image).arg(&raw))?;
        // The journal is replayed (the root was in use at the end); after that nothing may be left to mend.
        must(tool(guests, "sbin/e2fsck").args(["-E", "journal_only"]).arg("-p").arg(&raw))
            .context("replaying the journal")?;
        must(tool(guests, "sbin/e2fsck").arg("-fn").arg(&raw)).with_context(|| format!("{}", image.display()))?;
    }
    let _ = std::fs::remove_file(&raw);
    files.iter().for_each(|f| drop(std::fs::remove_file(f)));
    Ok(())
}

fn act(guest: &mut Hosted, words: &[&str], stage: &Stage, one: &[u8], two: &[u8]) -> Result<String> {
    if let Some(done) = common(guest, words) {
        return done;
    }
    let (data, hot) = (text(&stage.file("data.vhdx")), text(&stage.file("hot.vhdx")));
    let (first, second) = (text(&stage.file("first.iso")), text(&stage.file("second.iso")));
    let used = || -> Result<u64> { Ok(std::fs::metadata(&data)?.blocks() * 512) };
    match words {
        ["units"] => {
            guest.vm(&["disk", "add"], &["--dvd", "--lun", "1", &first])?;
            guest.vm(&["disk", "add"], &["--lun", "2", &data])
        }
        ["sum-first"] => Ok(sha256sum(one)),
        ["sum-second"] => Ok(sha256sum(two)),
        ["disc-locked"] => match guest.vm(&["dvd", "eject"], &["--lun", "1"]) {
            Ok(_) => bail!("a disc that the guest has locked came out"),
            Err(e) => {
                ensure!(format!("{e:#}").contains("locked"), "{e:#}");
                Ok(String::new())
            }
        },
        ["disc-second"] => guest.vm(&["dvd", "insert"], &["--lun", "1", &second]),
        ["disc-none"] => guest.vm(&["dvd", "eject"], &["--lun", "1"]),
        ["attach"] => guest.vm(&["disk", "add"], &["--lun", "5", &hot]),
        ["detach"] => guest.vm(&["disk", "remove"], &["--lun", "5"]),
        ["grow"] => guest.vm(&["disk", "resize"], &["--lun", "2", "384M"]),
        ["used"] => Ok(used()?.to_string()),
        ["used-below", most] => {
            let most: u64 = most.parse()?;
            for _ in 0..50 {
                if used()? <= most {
                    return Ok(used()?.to_string());
                }
                std::thread::sleep(Duration::from_millis(100));
            }
            bail!("the image still has {} bytes, expected at most {most}", used()?)
        }
        ["limit"] => guest.vm(&["disk", "limit"], &["--lun", "2"]),
        ["limit", most] => guest.vm(&["disk", "limit"], &["--lun", "2", "--maximum", most]),
        ["limit", most, least] => guest.vm(&["disk", "limit"], &["--lun", "2", "--maximum", most, "--minimum", least]),
        ["no-alert"] => {
            let list = guest.vm(&["disk", "list"], &[])?;
            let line = value(&list, "0:2").context("the disk is not listed")?;
            ensure!(!line.contains("alert"), "{line}");
            Ok(String::new())
        }
        ["alert"] => {
            let list = guest.vm(&["disk", "list"], &[])?;
            let line = value(&list, "0:2").context("the disk is not listed")?;
            ensure!(line.contains("alert: "), "{line}");
            Ok(String::new())
        }
        other => bail!("the host does not know {other:?}"),
    }
}
