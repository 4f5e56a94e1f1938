//! Viridian in a guest of Viridian: for what a host may lack and a guest's kernel has, as control groups of version 2.

use crate::initramfs::Contents;
use crate::vm::Contender;
use anyhow::{Result, bail};

/// Where the image has the guest's guest: an ELF kernel that does nothing but jump to itself.
pub const SPINNING: &str = "lib/viridian/spinning";
/// Where it is loaded.
const LOAD: u64 = 1 << 20;

/// Puts the program under test and a guest for it into an image.
///
/// # Errors
/// When another program is tested.
pub fn add(contents: &mut Contents, contender: &Contender) -> Result<()> {
    let Contender::Viridian { binary, .. } = contender else { bail!("only Viridian is run within itself") };
    contents.nested = Some(binary.clone());
    // `jmp $`
    contents.files.push((SPINNING.into(), 0o644, micro_guests::elf::image(LOAD, &[0xeb, 0xfe], 4096)));
    Ok(())
}
