//! Guests of a few instructions, as ELF images.

use iced_x86::code_asm::*;
use std::path::{Path, PathBuf};

const LOAD: u64 = 0x20_0000;

/// A 64-bit ELF image of what `build` assembles.
pub fn image(dir: &Path, name: &str, build: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> PathBuf {
    let mut assembler = CodeAssembler::new(64).unwrap();
    build(&mut assembler).unwrap();
    let code = assembler.assemble(LOAD).unwrap();
    let mut file = vec![0u8; 120];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"\x7fELF\x02\x01\x01");
    put(16, &[2, 0, 62, 0, 1]);
    put(24, &LOAD.to_le_bytes());
    put(32, &64u64.to_le_bytes());
    put(52, &[64, 0, 56, 0, 1]);
    put(64, &[1, 0, 0, 0, 7]);
    put(72, &120u64.to_le_bytes());
    put(80, &LOAD.to_le_bytes());
    put(88, &LOAD.to_le_bytes());
    put(96, &(code.len() as u64).to_le_bytes());
    put(104, &(code.len() as u64 + 4096).to_le_bytes());
    file.extend(code);
    let path = dir.join(name);
    std::fs::write(&path, file).unwrap();
    path
}

pub fn out(a: &mut CodeAssembler, port: u32, value: u32) -> Result<(), IcedError> {
    a.mov(edx, port)?;
    a.mov(eax, value)?;
    a.out(dx, al)
}

pub fn print(a: &mut CodeAssembler, text: &str) -> Result<(), IcedError> {
    text.bytes().try_for_each(|byte| out(a, 0x3f8, byte.into()))
}

pub fn power_off(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(edx, 0x404)?;
    a.mov(eax, 5 << 10 | 1 << 13)?;
    a.out(dx, ax)
}
