//! The root file system: what `mmdebstrap` is told.

use super::super::{Guests, Item};
use super::{HostSources, ordinary, root_uuid, run, tool};
use crate::guests::sources::host_acquire_settings;
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};

/// Before the kernel's package is installed (its script makes the initial RAM disk): `$1` is the root. The initial RAM disk
/// has what finds the root disk and nothing else, so that it is small and quick.
const BEFORE: &str = r#"set -e
mkdir -p "$1/etc/initramfs-tools/conf.d" "$1/usr/share/initramfs-tools/modules.d" "$1/etc/systemd/system"
printf 'MODULES=list\nCOMPRESS=zstd\nCOMPRESSLEVEL=3\n' > "$1/etc/initramfs-tools/conf.d/viridian"
printf 'hv_vmbus\nhv_storvsc\nsd_mod\next4\ncrc32c_intel\n' > "$1/usr/share/initramfs-tools/modules.d/viridian"
printf 'UUID=ROOT-UUID / ext4 noatime 0 0\n' > "$1/etc/fstab"
"#;

/// When all packages are there. root needs no password on the serial line; what only costs time at every start is off.
const AFTER: &str = r#"set -e
rm -rf "$1"/usr/share/man/* "$1"/usr/share/locale/* "$1"/var/lib/apt/lists/* "$1"/var/cache/debconf/*-old
find "$1/usr/share/doc" -type f -not -name copyright -delete
echo NAME > "$1/etc/hostname"
printf '127.0.0.1 localhost NAME\n' > "$1/etc/hosts"
echo MACHINE-ID > "$1/etc/machine-id"
sed -i 's/^root:[^:]*:/root::/' "$1/etc/shadow"
mkdir -p "$1/etc/systemd/system/serial-getty@ttyS0.service.d" "$1/etc/systemd/journald.conf.d" "$1/boot/efi"
cat > "$1/etc/systemd/system/serial-getty@ttyS0.service.d/autologin.conf" <<'END'
[Service]
ExecStart=
ExecStart=-/sbin/agetty --autologin root --keep-baud 115200 - dumb
END
printf '[Journal]\nStorage=volatile\n' > "$1/etc/systemd/journald.conf.d/viridian.conf"
cat > "$1/root/.profile" <<'END'
PS1='NAME:\w# '
HISTFILE=
END
for unit in apt-daily.timer apt-daily-upgrade.timer e2scrub_all.timer e2scrub_reap.service fstrim.timer dpkg-db-backup.timer \
    getty@tty1.service systemd-pstore.service systemd-update-utmp.service; do
    ln -sf /dev/null "$1/etc/systemd/system/$unit"
done
mkdir -p "$1/boot/grub"
cat > "$1/boot/grub/grub.cfg" <<'END'
set timeout=0
set default=0
menuentry 'Debian' {
    search.fs_uuid ROOT-UUID root
    linux /vmlinuz root=UUID=ROOT-UUID ro console=tty0 console=ttyS0,115200
    initrd /initrd.img
}
END
"#;

/// Everything that decides what comes out.
pub const RECIPE: &str = include_str!("root.rs");

/// Makes the root file system as a tar.
///
/// # Errors
/// With what mmdebstrap said last.
pub fn make_tar(guests: &Guests, item: &Item, sources: &HostSources, work: &Path) -> Result<PathBuf> {
    let tree = guests.tool("mmdebstrap");
    let work = std::path::absolute(work)?;
    let tar = work.join("root.tar");
    let list = work.join("debian.sources");
    fs::write(&list, sources.for_suite(item.suite))?;
    // mmdebstrap starts its hooks in shells with the new root as $1.
    let machine_id: String = super::gpt::unique(item.name, "machine").iter().map(|b| format!("{b:02x}")).collect();
    let name = item.name.trim_end_matches("-disk");
    for (file, text) in [("before", BEFORE), ("after", AFTER)] {
        let text = text.replace("ROOT-UUID", &root_uuid(item)).replace("MACHINE-ID", &machine_id).replace("NAME", name);
        fs::write(work.join(file), text)?;
    }
    let (perl, version) = find_perl(&tree)?;
    let perl = tool(guests, "mmdebstrap", &perl);
    let (mut command, before, after) = if ordinary::is_needed() {
        let command = ordinary::command(guests, &work, &perl)?;
        let (before, after) = ordinary::options(guests, &work, item.suite)?;
        (command, before, after)
    } else {
        (perl, Vec::new(), Vec::new())
    };
    let libraries = [
        "usr/share/perl5".to_owned(),
        format!("usr/share/perl/{version}"),
        format!("usr/lib/x86_64-linux-gnu/perl/{version}"),
        "usr/lib/x86_64-linux-gnu/perl-base".to_owned(),
    ];
    let libraries: Vec<String> = libraries.iter().map(|l| tree.join(l).display().to_string()).collect();
    command.env("PERL5LIB", libraries.join(":")).arg(tree.join("usr/bin/mmdebstrap"));
    command.args(["--quiet", "--variant=minbase", "--format=tar", "--skip=check/empty"]);
    command.args(before);
    command.arg(format!("--include={}", item.packages.join(",")));
    for setting in host_acquire_settings()? {
        command.arg(format!("--aptopt={setting}"));
    }
    command.arg(format!("--essential-hook=sh '{}' \"$1\"", work.join("before").display()));
    command.arg(format!("--customize-hook=sh '{}' \"$1\"", work.join("after").display()));
    // The settings above are for this machine's way to the archive, not for the guest's.
    command.arg("--customize-hook=rm -f \"$1/etc/apt/apt.conf.d/99mmdebstrap\"");
    command.args(after);
    command.arg(item.suite).arg(&tar).arg(&list).current_dir(&work);
    run(&mut command).with_context(|| format!("cannot make {}'s root file system with mmdebstrap", item.name))?;
    Ok(tar)
}

/// The tree's own perl, by its full name with its version: the machine's need not have the modules.
fn find_perl(tree: &Path) -> Result<(String, String)> {
    let bin = tree.join("usr/bin");
    for entry in fs::read_dir(&bin).with_context(|| format!("cannot read {}", bin.display()))? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let version = name.strip_prefix("perl").and_then(|n| n.strip_suffix("-x86_64-linux-gnu"));
        if let Some(version) = version {
            return Ok((format!("usr/bin/{name}"), version.to_owned()));
        }
    }
    anyhow::bail!("{} has no perl", bin.display())
}
