//! Guests of a few instructions, as ELF images.

use iced_x86::code_asm::*;
use std::path::{Path, PathBuf};

const LOAD: u64 = 0x20_0000;

/// A 64-bit ELF image of what `build` assembles.
pub fn image(dir: &Path, name: &str, build: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> PathBuf {
    let mut assembler = CodeAssembler::new(64).unwrap();
    build(&mut assembler).unwrap();
    let code = assembler.assemble(LOAD).unwrap();
    let path = dir.join(name);
    std::fs::write(&path, micro_guests::elf::image(LOAD, &code, 4096)).unwrap();
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
