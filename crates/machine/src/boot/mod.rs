//! Loaders: from files to guest memory and the state of VP 0.

pub mod elf;
pub mod entry;
pub mod firmware;
pub mod linux;
pub mod pvh;

use crate::config::{BootSource, EntryMode, MachineConfig};
use crate::layout::{self, RangeKind};
use partition::{Gpa, GuestMemory, MemoryError, VpState};
use std::fs::File;
use std::io::{Read as _, Seek as _};
use std::ops::Range;
use std::path::{Path, PathBuf};
use thiserror::Error;
use x86::paging::PAGE_SIZE;

/// Why something cannot be booted.
#[derive(Debug, Error)]
pub enum BootError {
    /// A file cannot be read.
    #[error("cannot read {}: {source}", .path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the host said.
        source: std::io::Error,
    },
    /// The kernel file is not something that can be booted.
    #[error("{} is not a kernel that can be booted: {reason}", .path.display())]
    Image {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The guest's memory is too small for it.
    #[error("{what} needs {needed} MiB, the guest's memory has {available} MiB for it: give the guest more memory")]
    TooBig {
        /// What does not fit.
        what: &'static str,
        /// MiB.
        needed: u64,
        /// MiB.
        available: u64,
    },
    /// The firmware file is no firmware for this machine.
    #[error("{} is no firmware for a generation 2 machine: {reason}", .path.display())]
    Firmware {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: bios::volume::VolumeError,
    },
    /// Less memory than the firmware needs.
    #[error("a generation 2 machine needs at least {needed} MiB of memory")]
    FirmwareMemory {
        /// MiB.
        needed: u64,
    },
    /// The command line is too long.
    #[error("the kernel command line has {len} bytes, this kernel takes at most {most}")]
    CommandLine {
        /// Bytes.
        len: usize,
        /// Bytes.
        most: u64,
    },
    /// An image address outside RAM.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// Files to boot from that are open already, by path: for a process that gives up the right to open them before it boots,
/// and boots again at each reset. Others are opened when they are needed.
#[derive(Debug, Default)]
pub struct BootFiles(Vec<(PathBuf, File)>);

impl BootFiles {
    /// Takes regular files.
    pub fn new(files: Vec<(PathBuf, File)>) -> Self {
        Self(files)
    }

    /// Their paths.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.0.iter().map(|(path, _)| path.as_path())
    }

    /// Reads a file from its beginning, at most `most` bytes of it.
    fn read(&self, path: &Path, most: u64) -> Result<Vec<u8>, BootError> {
        let error = |source| BootError::File { path: path.into(), source };
        let mut bytes = Vec::new();
        match self.0.iter().find(|(known, _)| known == path) {
            Some((_, file)) => {
                let mut file = file;
                file.rewind().and_then(|()| file.take(most).read_to_end(&mut bytes))
            }
            None => File::open(path).and_then(|file| file.take(most).read_to_end(&mut bytes)),
        }
        .map_err(error)?;
        Ok(bytes)
    }
}

/// What a kernel loader gets.
pub(crate) struct Load<'a> {
    pub memory: &'a GuestMemory,
    /// Bytes of RAM.
    pub ram: u64,
    /// Where the RSDP is.
    pub rsdp: u64,
    pub path: &'a Path,
    pub image: &'a [u8],
    pub initrd: &'a [u8],
    pub command_line: &'a str,
    pub state: VpState,
}

impl Load<'_> {
    pub fn bad(&self, reason: impl Into<String>) -> BootError {
        BootError::Image { path: self.path.into(), reason: reason.into() }
    }

    /// End of RAM below the 32-bit hole.
    pub fn low_end(&self) -> u64 {
        self.ram.min(layout::HOLE.start)
    }

    /// Puts the command line in its place; `most` is the kernel's own limit without the final zero.
    pub fn place_command_line(&self, most: u64) -> Result<(), BootError> {
        let bytes = self.command_line.as_bytes();
        let most = most.min(layout::boot::COMMAND_LINE_MAX - 1);
        if bytes.len() as u64 > most {
            return Err(BootError::CommandLine { len: bytes.len(), most });
        }
        self.memory.write(Gpa(layout::boot::COMMAND_LINE), bytes)?;
        self.memory.write(Gpa(layout::boot::COMMAND_LINE + bytes.len() as u64), &[0])?;
        Ok(())
    }

    /// Puts the initial RAM disk as high as it may go, not below `kernel.end`; `highest` is the last address that the
    /// kernel can reach. Returns where it is.
    pub fn place_initrd(&self, kernel: &Range<u64>, highest: u64) -> Result<Range<u64>, BootError> {
        if self.initrd.is_empty() {
            return Ok(0..0);
        }
        let len = self.initrd.len() as u64;
        let end = self.low_end().min(highest.saturating_add(1));
        let start = end.checked_sub(len).map(|s| s & !(PAGE_SIZE - 1)).filter(|s| *s >= kernel.end);
        let Some(start) = start else {
            let available = end.saturating_sub(kernel.end) >> 20;
            return Err(BootError::TooBig { what: "the initial RAM disk", needed: len.div_ceil(1 << 20), available });
        };
        self.memory.write(Gpa(start), self.initrd)?;
        Ok(start..start + len)
    }

    /// Is the range RAM that a kernel may be loaded into (above 1 MiB, below the hole)?
    pub fn check_range(&self, range: &Range<u64>) -> Result<(), BootError> {
        if range.start < layout::HIGH_MEMORY {
            return Err(self.bad(format!("it wants to be loaded at {:#x}, below 1 MiB", range.start)));
        }
        if range.end > self.low_end() || range.end < range.start {
            return Err(BootError::TooBig {
                what: "the kernel",
                needed: range.end.div_ceil(1 << 20),
                available: self.low_end() >> 20,
            });
        }
        Ok(())
    }
}

/// Loads what the configuration says and returns the state in which VP 0 starts. `state` is the reset state.
pub fn load(
    config: &MachineConfig,
    files: &BootFiles,
    memory: &GuestMemory,
    rsdp: u64,
    state: VpState,
) -> Result<VpState, BootError> {
    let read_file = |path: &Path| files.read(path, u64::MAX);
    match &config.boot {
        BootSource::Kernel { kernel, initrd, command_line } => {
            let image = read_file(kernel)?;
            let initrd = initrd.as_deref().map(read_file).transpose()?.unwrap_or_default();
            let load = Load {
                memory,
                ram: config.memory_bytes,
                rsdp,
                path: kernel,
                image: &image,
                initrd: &initrd,
                command_line,
                state,
            };
            if image.starts_with(b"\x7fELF") { pvh::load(load) } else { linux::load(load) }
        }
        BootSource::Firmware { name, pause_after_failure, first, image } => {
            let blob = firmware::Blob { name, pause_after_failure: *pause_after_failure, first: first.as_deref() };
            let image = image.as_deref().map(|path| firmware::read_image(files, path)).transpose()?;
            firmware::load(config, &blob, image, memory, state)
        }
        BootSource::Flat { image, address, mode } => {
            memory.write(Gpa(*address), image)?;
            match mode {
                EntryMode::Real => Ok(entry::real(state, *address)),
                EntryMode::Protected => entry::protected(memory, state, *address),
                EntryMode::Long => entry::long(memory, state, *address),
            }
            .map_err(BootError::Memory)
        }
    }
}

/// The memory map as e820 entries: address, length, type.
pub(crate) fn e820(ram: u64) -> Vec<(u64, u64, u32)> {
    let kind = |kind: RangeKind| kind as u32;
    layout::memory_map(ram).into_iter().map(|(r, k)| (r.start, r.end - r.start, kind(k))).collect()
}
