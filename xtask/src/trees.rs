//! Programs of extracted package trees, run on the host.
//!
//! Each runs with the dynamic loader and the libraries of its own tree: a C library works with the loader that it was built with
//! only, and the host's may be of another release. (`lib64/ld-linux-x86-64.so.2` of a tree can be a link to the *host's*
//! loader: so it is not the one that is taken.) What such a program starts itself runs with the host's again.

use std::path::Path;
use std::process::Command;

/// Folders with libraries, in a tree.
const LIBRARIES: [&str; 2] = ["lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"];

/// A command that runs `path` of the tree (where it is there, or below `usr`). A tree without a C library has programs that need
/// none, or scripts.
pub fn program(tree: &Path, path: &str) -> Command {
    let loader = LIBRARIES.iter().map(|d| tree.join(d).join("ld-linux-x86-64.so.2")).find(|p| p.is_file());
    let mut command = match loader {
        Some(loader) => {
            let mut command = Command::new(loader);
            let folders = LIBRARIES.map(|d| tree.join(d).display().to_string());
            command.arg("--library-path").arg(folders.join(":"));
            command
        }
        None => Command::new("env"),
    };
    let below_usr = tree.join("usr").join(path);
    let path = tree.join(path);
    command.arg(if !path.exists() && below_usr.exists() { below_usr } else { path });
    command
}

/// A program of QEMU's (`qemu-system-x86_64`, `qemu-img`), which finds what else it needs by its own place: of that the loader
/// makes something else.
pub fn qemu(tree: &Path, name: &str) -> Command {
    let mut command = program(tree, &format!("usr/bin/{name}"));
    command.env("QEMU_MODULE_DIR", tree.join("usr/lib/x86_64-linux-gnu/qemu"));
    if name.starts_with("qemu-system") {
        command.arg("-L").arg(tree.join("usr/share/qemu")).arg("-L").arg(tree.join("usr/share/seabios"));
    }
    command
}
