//! Tests that start from the firmware: Debian's signed chain from disk and DVD, what Secure Boot refuses, and the EFI
//! programs that must work without it.

mod boot;
mod conformance;
mod keys;
mod linux;
mod machine;
mod programs;

use super::Bench;
use anyhow::Result;
use std::path::Path;

/// One test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scenario {
    /// Debian 12 from a disk, with 1 VP and then with 4: Secure Boot's state, boot entries and dbx updates that survive.
    Debian12,
    /// Debian 13's chain from a disk.
    Debian13,
    /// The installer-style DVD.
    Dvd,
    /// Unsigned, changed, unknown and forbidden images are refused, each with its reason; enrolled ones run.
    Refusals,
    /// The UEFI shell runs a script; KeyTool, systemd-boot and iPXE come up; a kernel boots from systemd-boot.
    Programs,
    /// Every service's and protocol's answers, against the specification and against OVMF.
    Conformance,
    /// `--boot`, boot options, `--boot-failure`, the watchdog.
    BootOrder,
    /// Programs signed with a key of the user's own run under Secure Boot.
    Signed,
    /// memtest86+ runs a pass.
    Memtest,
}

impl Scenario {
    /// All.
    pub const ALL: [Self; 9] = [
        Self::Debian12,
        Self::Debian13,
        Self::Dvd,
        Self::Refusals,
        Self::Programs,
        Self::Conformance,
        Self::BootOrder,
        Self::Signed,
        Self::Memtest,
    ];

    /// Name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Debian12 => "debian-12",
            Self::Debian13 => "debian-13",
            Self::Dvd => "dvd",
            Self::Refusals => "refusals",
            Self::Programs => "programs",
            Self::Conformance => "conformance",
            Self::BootOrder => "boot-order",
            Self::Signed => "signed",
            Self::Memtest => "memtest86",
        }
    }

    /// Whether it takes too long for every day.
    pub fn is_long(self) -> bool {
        self == Self::Memtest
    }

    /// Processors of the host that it keeps busy.
    pub fn processors(self) -> u32 {
        if self == Self::Debian12 { 2 } else { 1 }
    }

    /// What must have been fetched.
    pub fn needs(self) -> &'static [&'static str] {
        match self {
            Self::Debian12 => &["debian-12-disk", "efitools", "disk-tools"],
            Self::Debian13 => &["debian-13-disk"],
            Self::Dvd => &["debian-12-dvd", "debian-12-disk"],
            Self::Refusals => {
                &["disk-tools", "efitools", "efi-shell", "memtest86", "ipxe", "systemd-boot", "shim-signed", "grub-efi"]
            }
            Self::Programs => {
                &["disk-tools", "efitools", "efi-shell", "ipxe", "systemd-boot", "bookworm-cloud", "busybox"]
            }
            Self::Conformance => &["disk-tools", "qemu", "ovmf"],
            Self::BootOrder => &["disk-tools"],
            Self::Signed => &["disk-tools", "efitools", "efi-shell", "memtest86", "ipxe", "systemd-boot"],
            Self::Memtest => &["disk-tools", "memtest86", "efi-shell"],
        }
    }

    /// Runs it; logs and images go into `folder`.
    ///
    /// # Errors
    /// Says what was not as it must be.
    pub fn run(self, bench: &Bench, folder: &Path) -> Result<()> {
        match self {
            Self::Debian12 => linux::debian_12(bench, folder),
            Self::Debian13 => linux::debian_13(bench, folder),
            Self::Dvd => linux::dvd(bench, folder),
            Self::Refusals => programs::refusals(bench, folder),
            Self::Programs => programs::work(bench, folder),
            Self::Conformance => conformance::check(bench, folder),
            Self::BootOrder => boot::order(bench, folder),
            Self::Signed => programs::signed(bench, folder),
            Self::Memtest => programs::memtest(bench, folder),
        }
    }
}
