//! EFI programs of the project's own: built like the firmware, as a position-independent ELF image for the guest, and made
//! into a PE32+ application here (PE/COFF specification; the ELF side is ELF-64 with RELATIVE relocations only).

use anyhow::{Context, Result, bail, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Builds `firmware/conformance` and leaves it as an EFI application in the target folder.
///
/// # Errors
/// When it does not build, or not to what the conversion knows.
pub fn conformance() -> Result<PathBuf> {
    let root = crate::workspace_root();
    let folder = root.join("firmware/conformance");
    let target = root.join("target/conformance");
    let mut cargo = Command::new(env!("CARGO"));
    // From its own folder, so that its own .cargo/config.toml (target, linker, code model) counts.
    cargo.current_dir(&folder).args(["build", "--release", "--locked", "--quiet", "--target-dir"]).arg(&target);
    without_hosts_flags(&mut cargo);
    let status = cargo.status().context("cannot run cargo for the conformance program")?;
    ensure!(status.success(), "the conformance program does not build: run `cargo build` in {}", folder.display());
    let elf = fs::read(target.join("x86_64-unknown-linux-gnu/release/viridian-conformance"))?;
    let image = target.join("conformance.efi");
    write_whole(&image, &to_pe(&elf)?)?;
    Ok(image)
}

/// What cargo and the user have set for the host's code must not reach the guest's.
pub fn without_hosts_flags(cargo: &mut Command) {
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        let hosts = text.starts_with("CARGO_") && text != "CARGO_HOME" || text == "RUSTFLAGS";
        if hosts {
            cargo.env_remove(&name);
        }
    }
}

/// Tests that run side by side may write the same file: each writes its own and renames it.
fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let own = path.with_extension(format!("{:?}.new", std::thread::current().id()));
    fs::write(&own, bytes)?;
    fs::rename(&own, path).with_context(|| format!("cannot write {}", path.display()))
}

const PAGE: u64 = 0x1000;
const FILE_ALIGNMENT: u64 = 0x200;

/// A part of the image.
struct Section {
    name: &'static str,
    address: u64,
    /// Bytes in memory.
    size: u64,
    data: Vec<u8>,
    characteristics: u32,
}

/// Makes a PE32+ image for EFI of an ELF one whose first page is free for the headers.
///
/// # Errors
/// When the image is not of that form.
fn to_pe(elf: &[u8]) -> Result<Vec<u8>> {
    let word = |at: u64, n: usize| -> Result<u64> {
        let at = at as usize;
        let bytes = elf.get(at..at + n).context("the ELF image is cut off")?;
        Ok(bytes.iter().rev().fold(0, |v, b| v << 8 | u64::from(*b)))
    };
    ensure!(elf.starts_with(b"\x7fELF\x02\x01"), "not a 64-bit ELF image");
    let entry = word(24, 8)?;
    let (table, size, count) = (word(32, 8)?, word(54, 2)?, word(56, 2)?);
    let mut sections = Vec::new();
    let mut dynamic = None;
    for i in 0..count {
        let at = table + i * size;
        let (kind, flags) = (word(at, 4)?, word(at + 4, 4)?);
        let (offset, address, file, memory) =
            (word(at + 8, 8)?, word(at + 16, 8)?, word(at + 32, 8)?, word(at + 40, 8)?);
        if kind == 2 {
            dynamic = Some((offset, file));
        }
        if kind != 1 || memory == 0 {
            continue;
        }
        ensure!(address % PAGE == 0 && address >= PAGE, "a segment lies at {address:#x}");
        // Code or data, and how it may be used.
        let (name, characteristics) = match flags {
            5 => (".text", 0x6000_0020),
            4 => (".rdata", 0x4000_0040),
            6 => (".data", 0xc000_0040),
            _ => bail!("a segment with flags {flags}"),
        };
        let data = elf.get(offset as usize..(offset + file) as usize).context("the ELF image is cut off")?.to_vec();
        sections.push(Section { name, address, size: memory, data, characteristics });
    }
    let (mut rela, mut bytes) = (0, 0);
    let (at, len) = dynamic.context("no dynamic section")?;
    for i in 0..len / 16 {
        match word(at + i * 16, 8)? {
            7 => rela = word(at + i * 16 + 8, 8)?,
            8 => bytes = word(at + i * 16 + 8, 8)?,
            _ => {}
        }
    }
    let relocations = relocate(&mut sections, rela, bytes)?;
    let last = sections.last().context("no segment")?;
    let address = (last.address + last.size).next_multiple_of(PAGE);
    let size = relocations.len() as u64;
    sections.push(Section { name: ".reloc", address, size, data: relocations, characteristics: 0x4200_0040 });
    Ok(assemble(entry, &sections))
}

/// Writes the addends where they belong, and lists the places as base relocation blocks.
fn relocate(sections: &mut [Section], rela: u64, bytes: u64) -> Result<Vec<u8>> {
    let mut places = Vec::new();
    let table: Vec<u8> = if bytes == 0 {
        Vec::new()
    } else {
        let s = sections.iter().find(|s| s.address <= rela && rela < s.address + s.size).context("no relocations")?;
        let from = (rela - s.address) as usize;
        s.data.get(from..from + bytes as usize).context("the relocations are cut off")?.to_vec()
    };
    for r in table.chunks_exact(24) {
        let u64_at = |at: usize| u64::from_le_bytes(r[at..at + 8].try_into().expect("eight bytes"));
        let (place, kind, addend) = (u64_at(0), u64_at(8), u64_at(16));
        ensure!(kind == 8, "a relocation of type {kind}");
        let s = sections.iter_mut().find(|s| s.address <= place && place + 8 <= s.address + s.size);
        let s = s.with_context(|| format!("a relocation outside of everything, at {place:#x}"))?;
        let at = (place - s.address) as usize;
        if s.data.len() < at + 8 {
            s.data.resize(at + 8, 0);
        }
        s.data[at..at + 8].copy_from_slice(&addend.to_le_bytes());
        places.push(place);
    }
    places.sort_unstable();
    let mut out = Vec::new();
    for page in places.chunk_by(|a, b| a / PAGE == b / PAGE) {
        let mut entries: Vec<u16> = page.iter().map(|p| 0xa000 | (p % PAGE) as u16).collect();
        if entries.len() % 2 != 0 {
            entries.push(0);
        }
        out.extend(((page[0] & !(PAGE - 1)) as u32).to_le_bytes());
        out.extend((8 + entries.len() as u32 * 2).to_le_bytes());
        entries.iter().for_each(|e| out.extend(e.to_le_bytes()));
    }
    // An image without any would count as one whose relocations were stripped.
    if out.is_empty() {
        out.extend([0, 0, 0, 0, 12, 0, 0, 0, 0, 0, 0, 0]);
    }
    Ok(out)
}

fn assemble(entry: u64, sections: &[Section]) -> Vec<u8> {
    const HEADERS: u64 = 0x400;
    let end = sections.last().map_or(PAGE, |s| (s.address + s.size).next_multiple_of(PAGE));
    let of = |name: &str| sections.iter().find(|s| s.name == name).map_or((0, 0), |s| (s.address, s.size));
    let mut out = vec![0; 0x80];
    out[..2].copy_from_slice(b"MZ");
    out[0x3c] = 0x80;
    out.extend(b"PE\0\0");
    // Machine x86-64, sections, no time, no symbols, size of the optional header, executable that knows large addresses.
    for value in [0x8664, sections.len() as u16, 0, 0, 0, 0, 0, 0, 240, 0x22] {
        out.extend(value.to_le_bytes());
    }
    let put = |out: &mut Vec<u8>, value: u64, bytes: usize| out.extend(&value.to_le_bytes()[..bytes]);
    // PE32+, linker version, sizes of code and data, entry, base of code, image base, alignments.
    let fields = [
        (0x20b, 2),
        (0, 2),
        (of(".text").1, 4),
        (of(".data").1, 4),
        (0, 4),
        (entry, 4),
        (of(".text").0, 4),
        (0, 8),
        (PAGE, 4),
        (FILE_ALIGNMENT, 4),
        // Versions; sizes of image and headers; checksum; subsystem EFI application; NX compatible; stack and heap.
        (0, 4),
        (0, 4),
        (0, 4),
        (0, 4),
        (end, 4),
        (HEADERS, 4),
        (0, 4),
        (10, 2),
        (0x100, 2),
        (0, 8),
        (0, 8),
        (0, 8),
        (0, 8),
        (0, 4),
        (16, 4),
    ];
    fields.iter().for_each(|(value, bytes)| put(&mut out, *value, *bytes));
    for directory in 0..16 {
        let (address, size) = if directory == 5 { of(".reloc") } else { (0, 0) };
        put(&mut out, address, 4);
        put(&mut out, size, 4);
    }
    let mut at = HEADERS;
    for s in sections {
        let mut name = [0; 8];
        name[..s.name.len()].copy_from_slice(s.name.as_bytes());
        out.extend(name);
        let raw = (s.data.len() as u64).next_multiple_of(FILE_ALIGNMENT);
        for value in [s.size, s.address, raw, at] {
            put(&mut out, value, 4);
        }
        out.extend([0; 12]);
        out.extend(s.characteristics.to_le_bytes());
        at += raw;
    }
    for s in sections {
        out.resize((out.len() as u64).next_multiple_of(FILE_ALIGNMENT).max(HEADERS) as usize, 0);
        out.extend(&s.data);
    }
    out.resize((out.len() as u64).next_multiple_of(FILE_ALIGNMENT) as usize, 0);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relocations_are_grouped_by_page() {
        let mut s =
            vec![Section { name: ".data", address: 0x1000, size: 0x3000, data: vec![0; 72], characteristics: 0 }];
        // The table itself stands at the beginning of the section.
        for (i, place) in [0x1080u64, 0x1090, 0x3008].into_iter().enumerate() {
            let at = i * 24;
            s[0].data[at..at + 8].copy_from_slice(&place.to_le_bytes());
            s[0].data[at + 8] = 8;
            s[0].data[at + 16..at + 24].copy_from_slice(&(place + 1).to_le_bytes());
        }
        let out = relocate(&mut s, 0x1000, 72).unwrap();
        let wanted = [0x1000u32, 12, 0xa090_a080, 0x3000, 12, 0x0000_a008];
        assert_eq!(out, wanted.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<_>>());
        assert_eq!(s[0].data[0x80..0x88], 0x1081u64.to_le_bytes());
        assert_eq!(s[0].data[0x2008..0x2010], 0x3009u64.to_le_bytes());
    }

    #[test]
    fn only_the_known_form_is_taken() {
        assert!(to_pe(b"\x7fELF\x02\x01").is_err());
        assert!(to_pe(&[0; 4096]).is_err());
    }
}
