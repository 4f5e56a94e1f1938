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
    contents.files.push((SPINNING.into(), 0o644, spinning()));
    Ok(())
}

/// ELF-64 header, one program header (tool interface standard, and System V ABI for x86-64), and `jmp $`.
fn spinning() -> Vec<u8> {
    const CODE: [u8; 2] = [0xeb, 0xfe];
    const HEADERS: usize = 64 + 56;
    let mut file = vec![0; HEADERS];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"\x7fELF\x02\x01\x01");
    // An executable for x86-64, version 1.
    put(16, &[2, 0, 62, 0, 1]);
    put(24, &LOAD.to_le_bytes());
    // Offset of the program headers; sizes of both kinds of headers; one.
    put(32, &64u64.to_le_bytes());
    put(52, &[64, 0, 56, 0, 1]);
    // PT_LOAD, readable and executable; offset, addresses, sizes.
    put(64, &[1, 0, 0, 0, 5]);
    put(72, &(HEADERS as u64).to_le_bytes());
    put(80, &LOAD.to_le_bytes());
    put(88, &LOAD.to_le_bytes());
    put(96, &(CODE.len() as u64).to_le_bytes());
    put(104, &4096u64.to_le_bytes());
    file.extend(CODE);
    file
}
