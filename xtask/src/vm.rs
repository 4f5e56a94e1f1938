//! Virtual machines as a user starts them: the same description for `viridian run` and for QEMU.
//!
//! QEMU is the yardstick of `bench`, and proof that a guest test fails for Viridian's reasons and not for the guest's.

use crate::guests::Guests;
use crate::trees;
use anyhow::{Context, Result, bail};
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// One machine to start.
#[derive(Clone, Debug)]
pub struct Vm {
    /// bzImage.
    pub kernel: PathBuf,
    /// Initramfs image.
    pub initrd: PathBuf,
    /// Kernel command line after `console=ttyS0`.
    pub append: String,
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// Virtual processors.
    pub processors: u32,
}

impl Vm {
    /// The whole kernel command line, the same for every contender.
    pub fn command_line(&self) -> String {
        format!("console=ttyS0 {}", self.append).trim_end().to_owned()
    }
}

/// A program that runs machines.
#[derive(Clone, Debug)]
pub enum Contender {
    /// `viridian run`.
    Viridian {
        /// The binary.
        binary: PathBuf,
        /// `--engine`.
        engine: String,
        /// Further options, as `--translate off`.
        options: Vec<String>,
    },
    /// QEMU with its code generator, from Debian's package, run from its extracted tree.
    Qemu {
        /// The tree.
        tree: PathBuf,
    },
}

impl Contender {
    /// The contender that a developer names: `qemu`, or an engine of Viridian.
    ///
    /// # Errors
    /// When it cannot be built or fetched.
    pub fn by_name(name: &str, guests: &Guests, release: bool) -> Result<Self> {
        if name == "qemu" {
            guests.ensure(&["qemu"])?;
            return Ok(Self::Qemu { tree: guests.tool("qemu") });
        }
        Ok(Self::Viridian { binary: build_viridian(release)?, engine: name.to_owned(), options: Vec::new() })
    }

    /// Name for tables and messages.
    pub fn name(&self) -> String {
        match self {
            Self::Viridian { engine, options, .. } if options.is_empty() => engine.clone(),
            Self::Viridian { engine, options, .. } => format!("{engine} {}", options.join(" ")),
            Self::Qemu { .. } => "qemu-tcg".to_owned(),
        }
    }

    /// The command that starts `vm` with its serial line on standard input and output.
    pub fn command(&self, vm: &Vm) -> Command {
        match self {
            Self::Viridian { binary, engine, options } => {
                let mut command = Command::new(binary);
                command
                    .arg("run")
                    .arg("--kernel")
                    .arg(&vm.kernel)
                    .arg("--initrd")
                    .arg(&vm.initrd)
                    .args(["--append", &vm.command_line()])
                    .args(["--memory", &format!("{}M", vm.memory_mib)])
                    .args(["--processors", &vm.processors.to_string()])
                    .args(["--engine", engine])
                    .args(options);
                command
            }
            Self::Qemu { tree } => {
                let mut command = trees::qemu(tree, "qemu-system-x86_64");
                command
                    .args(["-accel", "tcg", "-cpu", "max", "-M", "pc", "-nic", "none", "-nographic"])
                    .args(["-m", &vm.memory_mib.to_string(), "-smp", &vm.processors.to_string()])
                    .arg("-kernel")
                    .arg(&vm.kernel)
                    .arg("-initrd")
                    .arg(&vm.initrd)
                    .args(["-append", &vm.command_line()]);
                command
            }
        }
    }
}

/// Builds the `viridian` binary and says where it is. `VIRIDIAN_BINARY` names one that is used as it is, for comparing
/// two of them.
///
/// # Errors
/// When it does not compile.
pub fn build_viridian(release: bool) -> Result<PathBuf> {
    if let Some(binary) = std::env::var_os("VIRIDIAN_BINARY").filter(|b| !b.is_empty()) {
        return Ok(PathBuf::from(binary));
    }
    let mut command = Command::new(env!("CARGO"));
    command.args(["build", "--quiet", "--package", "viridian", "--bin", "viridian"]);
    if release {
        command.arg("--release");
    }
    let status =
        command.current_dir(crate::workspace_root()).stdin(Stdio::null()).status().context("cannot run cargo")?;
    if !status.success() {
        bail!("cannot build viridian");
    }
    let target =
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| crate::workspace_root().join("target"), PathBuf::from);
    Ok(target.join(if release { "release" } else { "debug" }).join("viridian"))
}
