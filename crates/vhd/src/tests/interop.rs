//! Against `qemu-img`: each side reads what the other writes. Skipped, and says so, where `qemu-img` is not installed.

use std::path::Path;
use std::process::Command;

use super::{Rng, dir};
use crate::{CreateOptions, Disk, DiskType, Format, Io, OpenOptions, check, convert, create};

const MIB: u64 = 1 << 20;

fn qemu(args: &[&str]) -> Option<(bool, String)> {
    let out = match Command::new("qemu-img").args(args).output() {
        Ok(o) => o,
        Err(e) => {
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
        (Format::Vhdx, DiskType::Dynamic, 64 << 40, 0),
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
    for (size, bytes) in [("1M", MIB), ("64T", 64 << 40)] {
        let path = at(&format!("{size}.vhdx"));
        must(&["create", "-f", "vhdx", text(&path), size]);
        assert_eq!(Disk::open(&path, &OpenOptions::default()).expect("opens").size(), bytes);
        scribble(&path, 10);
        must(&["check", "-f", "vhdx", text(&path)]);
        assert!(check(&path, None).expect("checks").is_clean());
    }
}
