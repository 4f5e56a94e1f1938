//! Integration services with the real daemons: `tests/guest/hyperv-services.sh`.

use super::{common, noise, sha256sum, value, wait_for};
use crate::guest_test::hosted::{Hosted, Stage};
use anyhow::{Result, bail, ensure};
use std::time::Duration;

/// Bytes of the copied file.
const FILE: usize = 10 << 20;

/// Runs it; at the end the host shuts the guest down.
///
/// # Errors
/// Says what was not so.
pub fn services(stage: &Stage) -> Result<()> {
    let (disk, file) = (stage.file("vhdx"), stage.file("copied"));
    stage.new_disk(&disk, "64M", "8M")?;
    let data = noise(FILE, 3);
    std::fs::write(&file, &data)?;
    let arguments = ["--disk", &disk.display().to_string(), "--save", &stage.file("state").display().to_string()]
        .map(str::to_owned);
    let mut guest = Hosted::boot(stage, &arguments)?;
    guest.serve(|guest, words| act(guest, words, stage, &data))?;
    guest.guest(&["shutdown"])?;
    guest.end(Duration::from_secs(60))?;
    for f in [disk, file, stage.file("state")] {
        let _ = std::fs::remove_file(f);
    }
    Ok(())
}

/// File copy with the daemon that Linux has from 6.10 on, which serves the channel itself through `uio_hv_generic`:
/// `tests/guest/hyperv-file-copy.sh`. At the end the host presses the power button of a guest without the shutdown service.
///
/// # Errors
/// Says what was not so.
pub fn file_copy(stage: &Stage) -> Result<()> {
    let file = stage.file("copied");
    let data = noise(FILE, 4);
    std::fs::write(&file, &data)?;
    let mut guest = Hosted::boot(stage, &["--hyperv", "on"].map(str::to_owned))?;
    guest.serve(|guest, words| act(guest, words, stage, &data))?;
    let _ = std::fs::remove_file(file);
    Ok(())
}

fn act(guest: &mut Hosted, words: &[&str], stage: &Stage, data: &[u8]) -> Result<String> {
    if let Some(done) = common(guest, words) {
        return done;
    }
    let file = stage.file("copied").display().to_string();
    match words {
        ["connected"] => wait_for(guest, &["status"], "not all services are connected", |s| {
            ["shutdown", "kvp", "vss", "file-copy"].iter().all(|key| value(s, key) == Some("connected"))
        }),
        ["file-copy"] => {
            wait_for(guest, &["status"], "file copy is not connected", |s| value(s, "file-copy") == Some("connected"))
        }
        ["kvp-addresses", release] => wait_for(guest, &["kvp"], "data exchange", |pairs| {
            let has = |key: &str, text: &str| value(pairs, key).is_some_and(|v| v.contains(text));
            has("NetworkAddressIPv4", "192.0.2.7")
                && has("NetworkAddressIPv6", "2001:db8::7")
                && has("OSBuildNumber", release)
                && has("FullyQualifiedDomainName", "viridian")
        }),
        ["kvp-set"] => guest.guest(&["kvp", "--set", "greeting=hello from the host"]),
        ["kvp-delete"] => guest.guest(&["kvp", "--delete", "greeting"]),
        ["kvp-from-guest"] => wait_for(guest, &["kvp", "--pool", "guest"], "data exchange", |pairs| {
            value(pairs, "colour") == Some("green")
        }),
        ["freeze"] => guest.guest(&["freeze"]),
        ["thaw"] => guest.guest(&["thaw"]),
        ["copy"] => {
            guest.guest(&["copy", &file, "/mnt/in/copied", "--create-path"])?;
            Ok(sha256sum(data))
        }
        ["copy-again"] => match guest.guest(&["copy", &file, "/mnt/in/copied"]) {
            Ok(_) => bail!("a file that exists was replaced without being asked"),
            Err(e) => {
                ensure!(format!("{e:#}").contains("exists"), "{e:#}");
                Ok(String::new())
            }
        },
        ["pause", seconds] => {
            guest.pause(Duration::from_secs(seconds.parse()?))?;
            Ok(String::new())
        }
        ["save", seconds] => {
            guest.save_and_restore(Duration::from_secs(seconds.parse()?))?;
            Ok(String::new())
        }
        other => bail!("the host does not know {other:?}"),
    }
}
