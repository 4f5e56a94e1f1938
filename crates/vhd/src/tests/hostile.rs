//! Images that lie. Valid images are damaged where their structures are, mostly with checksums put right again, and
//! then opened, checked, read and written: whatever happens is an error or a disk, never a panic.
//!
//! Runs for 3 s, or `VIRIDIAN_FUZZ_SECONDS`; see the crate `fuzzing`.

use std::sync::Arc;
use std::time::Duration;

use super::Rng;
use super::powercut::{new_child, new_image, options};
use super::sim::{Content, SimFile};
use crate::ops::check::check_storage;
use crate::{Disk, DiskType, Format, Io, image};

const MIB: u64 = 1 << 20;

fn disk(file: Arc<SimFile>, format: Format, write: bool) -> crate::Result<Disk> {
    Disk::from_images(vec![image::open(file, format, write)?], vec!["simulated".into()], Io::Blocking)
}

/// Images of each kind with something in them; the VHDX ones also as a power cut leaves them, with a log.
fn seeds() -> Vec<(Format, Content)> {
    let mut out = Vec::new();
    for (format, disk_type) in [
        (Format::Vhdx, DiskType::Dynamic),
        (Format::Vhdx, DiskType::Fixed),
        (Format::Vhdx, DiskType::Differencing),
        (Format::Vhd, DiskType::Dynamic),
        (Format::Vhd, DiskType::Fixed),
        (Format::Vhd, DiskType::Differencing),
    ] {
        let block = if format == Format::Vhdx { 1 << 20 } else { 64 << 10 };
        let o = options(format, disk_type, 4 * MIB, block, 512);
        let content = if disk_type == DiskType::Differencing {
            let base = SimFile::new(new_image(&options(format, DiskType::Dynamic, 4 * MIB, block, 512)));
            new_child(&crate::CreateOptions { parent: Some("parent".into()), ..o }, &base)
        } else {
            new_image(&o)
        };
        let file = SimFile::new(content);
        let d = disk(file.clone(), format, true).expect("opens");
        let mut rng = Rng::new(3);
        for _ in 0..12 {
            let mut data = vec![0; 8192];
            rng.fill(&mut data);
            d.write_at(rng.below(500) * 8192, &data).expect("writes");
        }
        d.flush().expect("flushes");
        // Before it is closed: with its log.
        out.push((format, file.now()));
        d.close().expect("closes");
        out.push((format, file.now()));
    }
    out
}

fn get(c: &Content, at: u64, len: usize) -> Vec<u8> {
    let mut v = vec![0; len];
    c.read(at, &mut v);
    v
}

fn damage(c: &mut Content, format: Format, rng: &mut Rng) {
    // Where structures are: heads of the first mebibytes, the log, the end.
    let places: Vec<u64> = match format {
        Format::Vhdx => vec![
            0,
            65536,
            131_072,
            196_608,
            262_144,
            MIB,
            MIB + 4096,
            MIB + 8192,
            2 * MIB,
            2 * MIB + 65536,
            3 * MIB,
            5 * MIB,
            5 * MIB + 65536,
            6 * MIB,
        ],
        _ => vec![0, 512, 1536, 2048, 2560, c.length.saturating_sub(512)],
    };
    for _ in 0..1 + rng.below(4) {
        let span = if rng.below(4) == 0 { 4096 } else { 128 };
        let mut at = places[rng.below(places.len() as u64) as usize] + rng.below(span);
        at -= at % [1, 2, 4, 8][rng.below(4) as usize];
        let old = get(c, at, 8);
        let v = u64::from_le_bytes(old.clone().try_into().expect("eight"));
        let new: Vec<u8> = match rng.below(9) {
            0 => vec![0xff; 1 << rng.below(4)],
            1 => vec![0; 1 << rng.below(4)],
            2 => v.wrapping_add(1 << rng.below(64)).to_le_bytes().to_vec(),
            3 => v.swap_bytes().wrapping_add(1 << rng.below(64)).to_be_bytes().to_vec(),
            4 => vec![rng.next() as u8],
            5 => ((rng.below(64) * MIB) | rng.below(8)).to_le_bytes().to_vec(),
            6 => ((rng.next() & 7) | (rng.next() << 20)).to_le_bytes().to_vec(),
            7 => get(c, places[rng.below(places.len() as u64) as usize], 512),
            _ => (rng.next() as u32).to_be_bytes().to_vec(),
        };
        if at + new.len() as u64 <= c.length {
            c.write(at, &new);
        }
    }
    if rng.below(12) == 0 {
        c.set_length(rng.below(c.length + 1));
    }
    if rng.below(8) != 0 {
        repair_checksums(c, format);
    }
}

/// Puts right the checksums of what still has its signature.
fn repair_checksums(c: &mut Content, format: Format) {
    let mut crc = |at: u64, len: usize, signature: &[u8]| {
        if at + len as u64 > c.length {
            return;
        }
        let mut b = get(c, at, len);
        if b.starts_with(signature) {
            b[4..8].fill(0);
            let sum = crc32c::crc32c(&b);
            c.write(at + 4, &sum.to_le_bytes());
        }
    };
    if format == Format::Vhdx {
        for at in [65536, 131_072] {
            crc(at, 4096, b"head");
        }
        for at in [196_608, 262_144] {
            crc(at, 65536, b"regi");
        }
        let mut at = MIB;
        while at < 5 * MIB {
            let head = get(c, at, 16);
            let mut step = 4096;
            if head.starts_with(b"loge") {
                let len = u32::from_le_bytes(head[8..12].try_into().expect("four")) as usize;
                if len % 4096 == 0 && (4096..=1 << 20).contains(&len) && at + len as u64 <= c.length {
                    let mut b = get(c, at, len);
                    b[4..8].fill(0);
                    let sum = crc32c::crc32c(&b);
                    c.write(at + 4, &sum.to_le_bytes());
                    step = len as u64;
                }
            }
            at += step;
        }
        return;
    }
    for (at, len, field) in [(0, 512, 64), (512, 1024, 36), (c.length.saturating_sub(512), 512, 64)] {
        if at + len as u64 <= c.length {
            let sum = crate::vhd::checksum(&get(c, at, len), field);
            c.write(at + field as u64, &sum.to_be_bytes());
        }
    }
}

/// Uses an image as far as it lets itself be used. Errors are fine.
fn use_it(content: &Content, format: Format, rng: &mut Rng) -> bool {
    let _ = check_storage(SimFile::new(content.clone()), format);
    let mut opened = false;
    for write in [false, true] {
        let file = SimFile::new(content.clone());
        let Ok(d) = disk(file.clone(), format, write) else { continue };
        opened = true;
        for _ in 0..6 {
            let sectors = d.size() / u64::from(d.info().logical_sector_size);
            let s = u64::from(d.info().logical_sector_size);
            let first = if rng.below(2) == 0 { rng.below(sectors.min(8192)) } else { rng.below(sectors) };
            let n = (1 + rng.below(64)).min(sectors - first);
            let _ = d.read_at(first * s, &mut vec![0; (n * s) as usize]);
            if write {
                let _ = d.write_at(first * s, &vec![1; (n * s) as usize]);
                let _ = d.unmap(first * s, n * s);
                let _ = d.flush();
            }
        }
        drop(d);
        if write {
            let _ = check_storage(file, format);
        }
    }
    opened
}

#[test]
fn damaged_images_never_panic() {
    let seeds = seeds();
    let mut opened = 0u64;
    let tried = fuzzing::rounds("damaged images", Duration::from_secs(3), |rng| {
        for _ in 0..10 {
            let (format, content) = &seeds[rng.below(seeds.len() as u64) as usize];
            let mut c = content.clone();
            damage(&mut c, *format, rng);
            opened += u64::from(use_it(&c, *format, rng));
        }
    }) * 10;
    println!("{tried} images, {opened} could be opened");
    // Both ends must be exercised, or the damage is too small or too great to say anything.
    assert!(opened > tried / 20 && opened < tried, "{opened} of {tried} opened");
}

#[test]
fn what_must_be_refused_is_refused() {
    let base = new_image(&options(Format::Vhdx, DiskType::Dynamic, 4 * MIB, 1 << 20, 512));
    let file = SimFile::new(base);
    let d = disk(file.clone(), Format::Vhdx, true).expect("opens");
    d.write_at(0, &[1; 512]).expect("writes");
    d.write_at(MIB, &[2; 512]).expect("writes");
    d.close().expect("closes");
    let bat = 3 * MIB;
    let entry = |n: u64| u64::from_le_bytes(get(&file.now(), bat + n * 8, 8).try_into().expect("eight"));
    for (what, raw) in [
        ("a block that shares another's space", entry(1)),
        ("a block in the BAT", (3 * MIB) | 6),
        ("a block in the log", MIB | 6),
        ("a block in the headers", 6),
        ("a block beyond the file", (900 * MIB) | 6),
        ("a block at the end of the address space", (u64::MAX << 20) | 6),
        ("partially present without a parent", entry(0) | 7),
        ("an unknown state", 4),
    ] {
        let mut c = file.now();
        c.write(bat, &raw.to_le_bytes());
        assert!(image::open(SimFile::new(c.clone()), Format::Vhdx, true).is_err(), "{what}");
        assert!(!check_storage(SimFile::new(c), Format::Vhdx).expect("checks").is_clean(), "{what}");
    }
}
