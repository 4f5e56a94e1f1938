//! `cargo xtask demo`: what Viridian can do today, on the terminal.

use crate::guests::Guests;
use crate::initramfs::{self, Contents};
use crate::session::Session;
use crate::vm::{Contender, Vm};
use anyhow::{Result, bail};
use base64::Engine as _;
use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;

/// How long the unattended demo may take.
const LIMIT: Duration = Duration::from_secs(300);

/// What the guest does when nobody can type.
const SCRIPT: &str = r#"echo "This is $(uname -srm) with $(nproc) processors."
awk -F: '/model name/ { print "Processor:" $2; exit }' /proc/cpuinfo
free -m | head -n 2
check counts [ "$(seq 1 1000 | awk '{ s += $1 } END { print s }')" = 500500 ]
"#;

/// Boots the Debian kernel to a shell on this terminal. Without a terminal: runs a short script in the guest.
///
/// # Errors
/// When something cannot be built or fetched, or the guest does not come to its end.
pub fn run(engine: &str, kernel: &str, processors: u32, memory_mib: u32) -> Result<ExitCode> {
    let guests = Guests::locate();
    guests.ensure(&[kernel, "busybox"])?;
    let contender = Contender::by_name(engine, &guests, true)?;
    let kernel = guests.kernel(kernel)?;
    let initrd = initramfs::build(&guests, &kernel, &Contents::default())?;
    let interactive = std::io::stdin().is_terminal();
    let append = if interactive {
        "quiet".to_owned()
    } else {
        format!("quiet viridian.run={}", base64::engine::general_purpose::STANDARD.encode(SCRIPT))
    };
    let vm = Vm { kernel: kernel.image, initrd, append, memory_mib, processors };
    let command = contender.command(&vm);
    println!("Debian's kernel {} on {} virtual processors ({}):", kernel.version, processors, contender.name());
    if interactive {
        let status = { command }.status()?;
        if !status.success() {
            bail!("the virtual machine ended with {status}");
        }
        return Ok(ExitCode::SUCCESS);
    }
    let mut session = Session::start(command, None, false)?;
    let mut shown = 0;
    session.wait_for(LIMIT, |text| {
        print!("{}", &text[shown..]);
        let _ = std::io::stdout().flush();
        shown = text.len();
        false
    })?;
    let status = session.finish(Duration::from_secs(1))?;
    if !session.text().contains("VIRIDIAN-VERDICT: PASS") || !status.is_some_and(|s| s.success()) {
        let how =
            status.map_or_else(|| format!("was stopped after {} s", LIMIT.as_secs()), |s| format!("ended with {s}"));
        bail!("the guest did not pass its checks; the virtual machine {how}");
    }
    Ok(ExitCode::SUCCESS)
}
