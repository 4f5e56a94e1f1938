//! What a machine is made from.

use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Least and most RAM.
pub const MEMORY_BYTES: std::ops::RangeInclusive<u64> = (2 << 20)..=(1 << 40) - (1 << 30);

/// Configuration of a machine, as it is saved with its state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineConfig {
    /// RAM, a multiple of 1 MiB.
    pub memory_bytes: u64,
    /// Number of VPs.
    pub processors: u32,
    /// Name of the processor model.
    pub cpu_model: String,
    /// Hyper-V's interface for guests (CPUID leaves, MSRs, hypercalls).
    pub hyperv: bool,
    /// What is loaded at every start and reset.
    pub boot: BootSource,
    /// Units of the synthetic SCSI controllers (with `hyperv` only).
    pub storage: Vec<StorageUnit>,
}

/// A disk or DVD drive on a synthetic SCSI controller.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StorageUnit {
    /// Controller, 0 to 3.
    pub controller: u32,
    /// Unit, 0 to 63.
    pub lun: u8,
    /// Disk or drive.
    pub kind: UnitKind,
    /// The image; a drive may be empty.
    pub image: Option<PathBuf>,
    /// Limits of a disk.
    #[serde(default)]
    pub limits: IoLimits,
}

/// Limits of a disk, in operations of 8 KiB a second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoLimits {
    /// Less than this, while requests wait, is an alert.
    pub minimum: Option<u32>,
    /// No more than this.
    pub maximum: Option<u32>,
}

/// Kind of a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum UnitKind {
    /// A hard disk.
    Disk,
    /// A DVD drive.
    Dvd,
}

/// What the guest boots. Files are read again at every reset, as a boot loader would.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum BootSource {
    /// A Linux bzImage, an ELF image with a PVH entry, or any other 64-bit ELF image (which is entered in 64-bit mode).
    Kernel {
        /// The image.
        kernel: PathBuf,
        /// Initial RAM disk.
        initrd: Option<PathBuf>,
        /// Kernel command line.
        command_line: String,
    },
    /// Generation 2: the UEFI firmware, which boots from the synthetic disks and drives. Needs `hyperv`.
    Firmware {
        /// What the firmware's screen calls the machine.
        name: String,
        /// When nothing can be booted: wait for a key instead of powering off.
        pause_after_failure: bool,
        /// What is tried before the boot options: `disk`, `dvd`, or the path of a file on any of them (`\\EFI\\...`).
        #[serde(default)]
        first: Option<String>,
        /// A firmware image of Hyper-V's layout (`bios::volume`) instead of Viridian's own.
        #[serde(default)]
        image: Option<PathBuf>,
    },
    /// A raw image at a given address.
    Flat {
        /// The bytes.
        image: Vec<u8>,
        /// Where they go.
        address: u64,
        /// How they are entered, at their first byte.
        mode: EntryMode,
    },
}

/// Processor mode in which an image is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum EntryMode {
    /// Real mode, CS base = address (which must be below 1 MiB and a multiple of 16), IP 0.
    Real,
    /// 32-bit protected mode, flat segments, no paging.
    Protected,
    /// 64-bit mode, the first 4 GiB mapped to themselves.
    Long,
}
