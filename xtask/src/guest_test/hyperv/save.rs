//! A machine that is saved with everything in use: `tests/guest/hyperv-save.sh`.

use super::{common, noise, sha256sum, value, wait_for};
use crate::guest_test::hosted::{Hosted, Stage};
use crate::initramfs::disks::{must, root};
use anyhow::{Context, Result, bail, ensure};
use std::process::Stdio;
use std::time::Duration;

/// Bytes of the copied file: enough that the copy takes longer than it takes to save.
const FILE: usize = 48 << 20;

/// Runs it.
///
/// # Errors
/// Says what was not so.
pub fn save(stage: &Stage) -> Result<()> {
    let (system, hot, file) = (stage.file("vhdx"), stage.file("hot.vhdx"), stage.file("copied"));
    let _ = std::fs::remove_file(&system);
    let plain = root(stage.bench.guests, &stage.boot.root_contents())?;
    must(stage.viridian(&["vhd", "convert"])?.arg(&plain).arg(&system))?;
    stage.new_disk(&hot, "256M", "8M")?;
    let data = noise(FILE, 4);
    std::fs::write(&file, &data)?;
    let arguments = ["--disk", &system.display().to_string(), "--save", &stage.file("state").display().to_string()]
        .map(str::to_owned);
    let mut guest = Hosted::boot(stage, &arguments)?;
    guest.serve(|guest, words| act(guest, words, stage, &data))?;
    guest.end(Duration::from_secs(60))?;
    for image in [&system, &hot] {
        must(stage.viridian(&["vhd", "check"])?.arg(image))?;
    }
    for f in [system, hot, file, stage.file("state")] {
        let _ = std::fs::remove_file(f);
    }
    Ok(())
}

fn act(guest: &mut Hosted, words: &[&str], stage: &Stage, data: &[u8]) -> Result<String> {
    if let Some(done) = common(guest, words) {
        return done;
    }
    match words {
        ["attach"] => guest.vm(&["disk", "add"], &["--lun", "5", &stage.file("hot.vhdx").display().to_string()]),
        ["connected"] => {
            wait_for(guest, &["status"], "file copy is not connected", |s| value(s, "file-copy") == Some("connected"))
        }
        ["save-while-copying"] => {
            let file = stage.file("copied").display().to_string();
            let mut copy = guest.guest_command(&["copy", &file, "/mnt/copied"])?;
            let mut copy = copy.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
            std::thread::sleep(Duration::from_millis(300));
            ensure!(copy.try_wait()?.is_none(), "the copy was over before the machine was saved");
            guest.save_and_restore(Duration::ZERO)?;
            let status = copy.wait()?;
            ensure!(!status.success(), "the copy ended well although its process was gone");
            Ok(String::new())
        }
        ["copy-sum"] => Ok(sha256sum(data)),
        ["hot-disk-known"] => {
            let list = guest.vm(&["disk", "list"], &[])?;
            let line = value(&list, "0:5").context("the restored machine does not know its hot-added unit")?;
            Ok(line.split_whitespace().next().unwrap_or_default().to_owned())
        }
        other => bail!("the host does not know {other:?}"),
    }
}
