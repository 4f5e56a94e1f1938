//! Against `qemu-img` and libvhdi: each side reads what the other writes.
//!
//! `cargo xtask test` fetches both and names their trees (`VIRIDIAN_QEMU_IMG_TREE`, `VIRIDIAN_LIBVHDI_TREE`). Without
//! that, those of the machine are used, and a test is skipped, and says so, where there are none.

use std::path::Path;
use std::process::Command;

use super::{Rng, dir};
use crate::{CreateOptions, Disk, DiskType, Format, Io, OpenOptions, check, convert, create};

const MIB: u64 = 1 << 20;

/// A program: of an extracted tree that a variable names, or else of the machine.
fn program(variable: &str, in_tree: &str, name: &str) -> Command {
    let Some(tree) = std::env::var_os(variable).filter(|t| !t.is_empty()) else { return Command::new(name) };
    let tree = Path::new(&tree);
    // With the loader and the libraries of its own tree: the host's may be of another release, and the two belong together.
    let libraries = ["lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"].map(|d| tree.join(d));
    let loader = libraries.iter().map(|d| d.join("ld-linux-x86-64.so.2")).find(|p| p.is_file());
    let mut command = Command::new(loader.expect("the tree has a C library"));
    command.arg("--library-path").arg(libraries.map(|d| d.display().to_string()).join(":")).arg(tree.join(in_tree));
    command.env("PYTHONHOME", tree.join("usr")).env("PYTHONPATH", tree.join("usr/lib/python3/dist-packages"));
    command
}

fn fetched(variable: &str) -> bool {
    std::env::var_os(variable).is_some_and(|t| !t.is_empty())
}

fn qemu(args: &[&str]) -> Option<(bool, String)> {
    let out = match program("VIRIDIAN_QEMU_IMG_TREE", "usr/bin/qemu-img", "qemu-img").args(args).output() {
        Ok(o) => o,
        Err(e) => {
            assert!(!fetched("VIRIDIAN_QEMU_IMG_TREE"), "the fetched qemu-img cannot be run: {e}");
            eprintln!("skipped: qemu-img cannot be run: {e}");
            return None;
        }
    };
    let text = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    Some((out.status.success(), text))
}

fn must(args: &[&str]) -> Option<String> {
    let (ok, text) = qemu(args)?;
    assert!(ok, "qemu-img {args:?}: {text}");
    Some(text)
}

fn text(p: &Path) -> &str {
    p.to_str().expect("UTF-8")
}

fn scribble(path: &Path, times: u32) {
    let disk =
        Disk::open(path, &OpenOptions { write: true, io: Io::Blocking, ..OpenOptions::default() }).expect("opens");
    let mut rng = Rng::new(77);
    for _ in 0..times {
        let mut data = vec![0; 4096 * (1 + rng.below(16)) as usize];
        rng.fill(&mut data);
        let off = rng.below((disk.size() - data.len() as u64) / 512) * 512;
        disk.write_at(off, &data).expect("writes");
    }
    disk.write_at(disk.size() - 512, &[7; 512]).expect("writes at the end");
    disk.close().expect("closes");
}

#[test]
fn qemu_img_reads_what_we_write() {
    let (_d, at) = dir();
    for (i, (format, disk_type, size, block)) in [
        (Format::Vhdx, DiskType::Dynamic, MIB, 0),
        (Format::Vhdx, DiskType::Dynamic, 100 * MIB + 512, 1 << 20),
        (Format::Vhdx, DiskType::Fixed, 40 * MIB, 0),
        (Format::Vhdx, DiskType::Dynamic, 3 << 40, 256 << 20),
        (Format::Vhdx, DiskType::Dynamic, 1 << 30, 0),
        (Format::Vhdx, DiskType::Dynamic, 64 << 40, 0),
        (Format::Vhd, DiskType::Dynamic, MIB, 0),
        (Format::Vhd, DiskType::Dynamic, 50 * MIB, 0),
        (Format::Vhd, DiskType::Dynamic, 2040 << 30, 0),
        (Format::Vhd, DiskType::Fixed, 30 * MIB, 0),
    ]
    .into_iter()
    .enumerate()
    {
        let (ext, name) = if format == Format::Vhdx { ("vhdx", "vhdx") } else { ("vhd", "vpc") };
        let path = at(&format!("{i}.{ext}"));
        let o = CreateOptions { format, disk_type, block_size: block, ..CreateOptions::dynamic_vhdx(size) };
        create(&path, &o).expect("creates");
        scribble(&path, 30);
        let Some(info) = must(&["info", "-f", name, "--output=json", text(&path)]) else { return };
        assert!(info.contains(&format!("\"virtual-size\": {size}")), "{format} {size}: {info}");
        if format == Format::Vhdx {
            must(&["check", "-f", "vhdx", text(&path)]);
        }
        // Content: through a raw copy where that is small, else at the end, which is where it goes wrong.
        if size <= 128 * MIB {
            let raw = at(&format!("{i}.img"));
            let o = CreateOptions { format: Format::Raw, disk_type: DiskType::Fixed, ..CreateOptions::dynamic_vhdx(0) };
            convert(&path, None, &raw, &o, &mut |_, _| true).expect("converts");
            must(&["compare", "-f", name, "-F", "raw", text(&path), text(&raw)]);
        } else if format == Format::Vhdx && block == 0 {
            let part = at(&format!("{i}.part"));
            let skip = format!("skip={}", size / 512 - 1);
            let (from, to) = (format!("if={}", text(&path)), format!("of={}", text(&part)));
            if must(&["dd", "-f", name, "-O", "raw", "bs=512", &skip, &from, &to]).is_some() {
                assert_eq!(std::fs::read(&part).expect("reads"), [7; 512]);
            }
        }
    }
}

#[test]
fn we_read_what_qemu_img_writes() {
    let (_d, at) = dir();
    let raw = at("a.img");
    let o = CreateOptions { format: Format::Raw, disk_type: DiskType::Fixed, ..CreateOptions::dynamic_vhdx(60 * MIB) };
    create(&raw, &o).expect("creates");
    scribble(&raw, 40);
    let want = std::fs::read(&raw).expect("reads");
    for (i, (name, option)) in [
        ("vhdx", "subformat=dynamic"),
        ("vhdx", "subformat=fixed"),
        ("vhdx", "subformat=dynamic,block_size=1048576,log_size=2097152"),
        ("vpc", "subformat=dynamic,force_size=on"),
        ("vpc", "subformat=fixed,force_size=on"),
    ]
    .into_iter()
    .enumerate()
    {
        let path = at(&format!("{i}.{}", if name == "vhdx" { "vhdx" } else { "vhd" }));
        if must(&["convert", "-f", "raw", "-O", name, "-o", option, text(&raw), text(&path)]).is_none() {
            return;
        }
        let report = check(&path, None).expect("checks");
        assert!(report.is_clean(), "{option}: {:?}", report.findings);
        for write in [false, true] {
            let disk = Disk::open(&path, &OpenOptions { write, ..OpenOptions::default() }).expect("opens");
            let mut got = vec![0; want.len()];
            disk.read_at(0, &mut got).expect("reads");
            assert!(got == want, "{name} {option}");
            if write {
                disk.write_at(0, &want[..512]).expect("writes");
            }
        }
        // And qemu-img still reads it after we have written.
        must(&["compare", "-f", name, "-F", "raw", text(&path), text(&raw)]);
    }
    for (name, size, bytes) in [
        ("vhdx", "1M", MIB),
        ("vhdx", "1G", 1 << 30),
        ("vhdx", "3T", 3 << 40),
        ("vhdx", "64T", 64 << 40),
        ("vpc", "1M", MIB),
        ("vpc", "2040G", 2040 << 30),
    ] {
        let path = at(&format!("{size}.{}", if name == "vhdx" { "vhdx" } else { "vhd" }));
        let force = if name == "vpc" { "force_size=on" } else { "subformat=dynamic" };
        must(&["create", "-f", name, "-o", force, text(&path), size]);
        assert_eq!(Disk::open(&path, &OpenOptions::default()).expect("opens").size(), bytes);
        scribble(&path, 10);
        // Of VHD it has no check; that it finds the end of the disk is seen below.
        if name == "vhdx" {
            must(&["check", "-f", "vhdx", text(&path)]);
        }
        assert!(check(&path, None).expect("checks").is_clean());
        let info = must(&["info", "-f", name, "--output=json", text(&path)]).unwrap_or_default();
        assert!(info.contains(&format!("\"virtual-size\": {bytes}")), "{name} {size}: {info}");
    }
}

/// Reads a chain with libvhdi's Python module and compares it with a raw image.
const LIBVHDI: &str = "
import sys
try:
    import pyvhdi
except ImportError as e:
    print('skipped:', e)
    sys.exit(0)
files = []
for p in sys.argv[2:]:
    f = pyvhdi.file()
    f.open(p)
    files.append(f)
for child, parent in zip(files, files[1:]):
    child.set_parent(parent)
raw = open(sys.argv[1], 'rb').read()
assert files[0].get_media_size() == len(raw), files[0].get_media_size()
data = files[0].read_buffer_at_offset(len(raw), 0)
bad = [i // 4096 for i in range(0, len(raw), 4096) if data[i:i+4096] != raw[i:i+4096]]
assert not bad, 'pages differ: %r' % bad[:10]
print('same')
";

#[test]
fn libvhdi_reads_our_differencing_images() {
    let (_d, at) = dir();
    for (format, ext) in [(Format::Vhdx, "vhdx"), (Format::Vhd, "vhd")] {
        let mut chain = Vec::new();
        for i in 0..3u64 {
            let path = at(&format!("{i}.{ext}"));
            let o = CreateOptions {
                format,
                disk_type: if i == 0 { DiskType::Dynamic } else { DiskType::Differencing },
                block_size: 2 << 20,
                parent: chain.first().cloned(),
                ..CreateOptions::dynamic_vhdx(if i == 0 { 40 * MIB } else { 0 })
            };
            create(&path, &o).expect("creates");
            let write = OpenOptions { write: true, io: Io::Blocking, ..OpenOptions::default() };
            let disk = Disk::open(&path, &write).expect("opens");
            let mut rng = Rng::new(500 + i);
            for _ in 0..60 {
                // Whole pages: libvhdi 20210425 takes the last sectors of a bitmap byte for the first ones' kind
                // (a sector whose bit is 0 then reads from the child although its parent has it).
                let mut data = vec![0; 4096 * (1 + rng.below(8)) as usize];
                rng.fill(&mut data);
                let off = rng.below((disk.size() - data.len() as u64) / 4096) * 4096;
                disk.write_at(off, &data).expect("writes");
            }
            disk.close().expect("closes");
            chain.insert(0, path);
        }
        let raw = at(&format!("{ext}.img"));
        let o = CreateOptions { format: Format::Raw, disk_type: DiskType::Fixed, ..CreateOptions::dynamic_vhdx(0) };
        convert(&chain[0], None, &raw, &o, &mut |_, _| true).expect("converts");
        let mut python = program("VIRIDIAN_LIBVHDI_TREE", "usr/bin/python3.11", "python3");
        let out = match python.arg("-c").arg(LIBVHDI).arg(&raw).args(&chain).output() {
            Ok(o) => o,
            Err(e) => {
                assert!(!fetched("VIRIDIAN_LIBVHDI_TREE"), "the fetched Python cannot be run: {e}");
                eprintln!("skipped: python3 cannot be run: {e}");
                return;
            }
        };
        let said = String::from_utf8_lossy(&out.stdout).trim().to_string();
        println!("{format}: {said}");
        assert!(out.status.success(), "{format}: {}", String::from_utf8_lossy(&out.stderr));
        let skipped = said.starts_with("skipped") && !fetched("VIRIDIAN_LIBVHDI_TREE");
        assert!(said == "same" || skipped, "{said}");
    }
}
