//! `mmdebstrap` for ordinary users.
//!
//! Making a root file system takes root's rights: files belong to several users, and packages' scripts run in a `chroot`.
//! A user namespace in which the user is root gives `chroot` and mounts, but knows no other user: so `fakeroot` keeps the
//! owners, and tells `tar` of them in the end. A namespace with more users would take `newuidmap`, which is set-uid, and not
//! part of an ordinary installation.

use crate::guests::Guests;
use anyhow::{Result, bail};
use std::fs;
use std::path::Path;
use std::process::Command;

/// Starts `faked`, which keeps the owners, and then the command `$2 ...`, with fakeroot's tree in `$1`. In the new root the
/// library is in `/dev`, of which nothing gets into the tar, so that it is there to the very end. The root is made on a tmpfs,
/// which gives no number out twice: `faked` knows files by their numbers, and static programs (`ldconfig`) remove some behind
/// its back. `faked` ends with the namespace of process ids.
const WITH_FAKEROOT: &str = r#"set -e
tree=$1; shift
mkdir -p "$TMPDIR"
mount -t tmpfs none "$TMPDIR"
pair=$("$tree/usr/bin/faked-sysv")
export FAKEROOTKEY="${pair%%:*}" FAKEROOTDONTTRYCHOWN=1
export LD_LIBRARY_PATH="$tree/usr/lib/x86_64-linux-gnu/libfakeroot:/dev/fakeroot"
export LD_PRELOAD=libfakeroot-sysv.so
"$@"
"#;

/// Before anything is in the new root `$1`: fakeroot's library, and the devices that scripts use (a namespace's root
/// cannot make any).
const SETUP: &str = r#"set -e
mkdir -p "$1/dev/fakeroot"
cp "TREE/usr/lib/x86_64-linux-gnu/libfakeroot/libfakeroot-sysv.so" "$1/dev/fakeroot/"
for name in null zero full random urandom tty; do
    : > "$1/dev/$name"
    mount --bind "/dev/$name" "$1/dev/$name"
done
"#;

/// At the end.
const CLEANUP: &str = r#"set -e
for name in null zero full random urandom tty; do
    umount "$1/dev/$name"
    rm "$1/dev/$name"
done
"#;

/// Whether this process must do without root's rights.
pub fn is_needed() -> bool {
    !rustix::process::geteuid().is_root()
}

/// The command line, so far, of a program of a tree, so that it runs with what looks like root's rights.
///
/// # Errors
/// When the host gives ordinary users no namespaces, or the folder cannot be written.
pub fn command(guests: &Guests, work: &Path, program: &Command) -> Result<Command> {
    let namespaces = ["--user", "--map-root-user", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"];
    let trial = Command::new("unshare").args(namespaces).arg("true").output();
    let problem = match trial {
        Ok(output) if output.status.success() => None,
        Ok(output) => Some(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
        Err(error) => Some(error.to_string()),
    };
    if let Some(problem) = problem {
        bail!(
            "making a Debian disk as an ordinary user takes a user namespace, and this host refuses one ({problem}): allow it \
             (sysctl kernel.unprivileged_userns_clone=1, or kernel.apparmor_restrict_unprivileged_userns=0 on Ubuntu), or \
             fetch once as root: `cargo xtask guests debian-12-disk`"
        );
    }
    let script = work.join("with-fakeroot");
    fs::write(&script, WITH_FAKEROOT)?;
    let mut command = Command::new("unshare");
    let tree = guests.tool("fakeroot");
    command.args(namespaces).arg("sh").arg(script).arg(&tree).env("TMPDIR", work.join("temporary")).env("LC_ALL", "C");
    command.arg(program.get_program());
    // The loader of the program's tree looks nowhere else: what it removes must be known to `faked`, too.
    let mut is_path = false;
    for argument in program.get_args() {
        let mut argument = argument.to_owned();
        if is_path {
            argument.push(":");
            argument.push(tree.join("usr/lib/x86_64-linux-gnu/libfakeroot"));
        }
        is_path = argument == "--library-path";
        command.arg(argument);
    }
    Ok(command)
}

/// Options of `mmdebstrap` that go with it, in front of all other hooks, and behind them.
///
/// # Errors
/// When the folder cannot be written.
pub fn options(guests: &Guests, work: &Path, suite: &str) -> Result<(Vec<String>, Vec<String>)> {
    let tree = guests.tool("fakeroot").display().to_string();
    for (name, text) in [("setup", SETUP), ("cleanup", CLEANUP)] {
        fs::write(work.join(name), text.replace("TREE", &tree))?;
    }
    let hook = |kind: &str, name: &str| format!("--{kind}-hook=sh '{}' \"$1\"", work.join(name).display());
    let mut before = vec![
        "--mode=root".to_owned(),
        "--skip=chroot/mount/dev".to_owned(),
        "--skip=chroot/mount/sys".to_owned(),
        "--aptopt=APT::Sandbox::User \"root\"".to_owned(),
        hook("setup", "setup"),
    ];
    if suite == "bookworm" {
        // Newer apts than its own choose `usrmerge` among what makes `/bin` a link, which then trips over fakeroot's library. It
        // is told that the links are there. (Later suites have them in a package.)
        let hooks = guests.tool("mmdebstrap").join("usr/share/mmdebstrap/hooks/merged-usr");
        before.push(format!("--hook-dir={}", hooks.display()));
    }
    Ok((before, vec![hook("customize", "cleanup")]))
}
