//! Random reads, writes, unmaps and flushes on every kind of image, by both drivers, against a copy in memory.

use super::{Rng, dir};
use crate::{CreateOptions, Disk, DiskType, Format, Io, OpenOptions, create};

const MIB: u64 = 1 << 20;

fn options(io: Io, direct: bool) -> OpenOptions {
    OpenOptions { write: true, direct, io, ..OpenOptions::default() }
}

/// Runs random operations and compares everything at the end, after reopening too.
fn exercise(path: &std::path::Path, model: &mut [u8], sector: u64, seed: u64, io: Io, direct: bool, rounds: u32) {
    let mut rng = Rng::new(seed);
    let size = model.len() as u64;
    let disk = Disk::open(path, &options(io, direct)).expect("opens");
    assert_eq!(disk.size(), size);
    let zeroes = disk.info().unmap_zeroes;
    for _ in 0..rounds {
        let max = if rng.below(8) == 0 { size } else { 96 << 10 };
        let off = rng.below(size / sector) * sector;
        let len = ((rng.below(max) / sector + 1) * sector).min(size - off);
        let range = off as usize..(off + len) as usize;
        match rng.below(10) {
            0..=4 => {
                let mut data = vec![0; len as usize];
                rng.fill(&mut data);
                disk.write_at(off, &data).expect("writes");
                model[range].copy_from_slice(&data);
            }
            5..=6 => {
                let mut data = vec![0xaa; len as usize];
                disk.read_at(off, &mut data).expect("reads");
                assert!(data == model[range], "seed {seed}: read at {off:#x}+{len:#x}");
            }
            7 => {
                disk.write_zeroes(off, len).expect("writes zeros");
                model[range].fill(0);
            }
            8 => {
                disk.unmap(off, len).expect("unmaps");
                if zeroes {
                    model[range].fill(0);
                } else {
                    // What an unmapped sector holds is not promised here: take what it is.
                    disk.read_at(off, &mut model[range]).expect("reads");
                }
            }
            _ => disk.flush().expect("flushes"),
        }
    }
    compare(&disk, model, seed);
    disk.close().expect("closes");
    let disk = Disk::open(path, &OpenOptions { io, ..OpenOptions::default() }).expect("opens again");
    compare(&disk, model, seed);
}

fn compare(disk: &Disk, model: &[u8], seed: u64) {
    let mut all = vec![0; model.len()];
    disk.read_at(0, &mut all).expect("reads all");
    if let Some(at) = all.iter().zip(model).position(|(a, b)| a != b) {
        panic!("seed {seed}: differs at {at:#x}");
    }
}

fn kinds() -> Vec<(Format, DiskType, u32, u32)> {
    let mut k = Vec::new();
    for sector in [512, 4096] {
        for block in [1 << 20, 2 << 20] {
            k.push((Format::Vhdx, DiskType::Dynamic, block, sector));
        }
        k.push((Format::Vhdx, DiskType::Fixed, 1 << 20, sector));
    }
    k.push((Format::Vhd, DiskType::Fixed, 0, 512));
    k.push((Format::Vhd, DiskType::Dynamic, 64 << 10, 512));
    k.push((Format::Vhd, DiskType::Dynamic, 2 << 20, 512));
    k.push((Format::Raw, DiskType::Fixed, 0, 512));
    k
}

fn extension(f: Format) -> &'static str {
    match f {
        Format::Vhdx => "vhdx",
        Format::Vhd => "vhd",
        Format::Raw => "img",
        Format::Iso => "iso",
    }
}

#[test]
fn random_operations_match_a_model() {
    let (_d, at) = dir();
    for (i, (format, disk_type, block_size, sector)) in kinds().into_iter().enumerate() {
        for (io, direct) in [(Io::Uring, false), (Io::Threads, false), (Io::Auto, true)] {
            let seed = 100 + i as u64;
            let path = at(&format!("{i}-{io:?}-{direct}.{}", extension(format)));
            let size = 7 * MIB + 4096 * 3;
            let o = CreateOptions {
                format,
                disk_type,
                size,
                block_size,
                logical_sector_size: sector,
                ..CreateOptions::dynamic_vhdx(size)
            };
            create(&path, &o).expect("creates");
            let mut model = vec![0; size as usize];
            if io == Io::Uring && Disk::open(&path, &options(io, false)).is_err() {
                eprintln!("skipped: io_uring is not available");
                continue;
            }
            for pass in 0..3 {
                exercise(&path, &mut model, u64::from(sector), seed * 10 + pass, io, direct, 120);
            }
            std::fs::remove_file(&path).expect("removes");
        }
    }
}

#[test]
fn differencing_chains_match_a_model() {
    let (_d, at) = dir();
    for (format, sector, blocks) in [
        (Format::Vhdx, 512, [1 << 20, 2 << 20, 1 << 20]),
        (Format::Vhdx, 4096, [2 << 20, 1 << 20, 4 << 20]),
        (Format::Vhd, 512, [2 << 20, 64 << 10, 2 << 20]),
    ] {
        let size = 9 * MIB + 4096;
        let mut model = vec![0; size as usize];
        let mut parent = None;
        for (i, block_size) in blocks.into_iter().enumerate() {
            let path = at(&format!("{format}-{sector}-{i}.{}", extension(format)));
            let o = CreateOptions {
                format,
                disk_type: if i == 0 { DiskType::Dynamic } else { DiskType::Differencing },
                size: if i == 0 { size } else { 0 },
                block_size,
                logical_sector_size: sector,
                parent: parent.clone(),
                ..CreateOptions::dynamic_vhdx(size)
            };
            create(&path, &o).expect("creates");
            for pass in 0..3 {
                let io = if pass == 0 { Io::Threads } else { Io::Auto };
                exercise(&path, &mut model, u64::from(sector), 7000 + i as u64 * 10 + pass, io, pass == 1, 60);
            }
            parent = Some(path);
        }
    }
}

#[test]
fn many_requests_at_once_keep_apart() {
    // Writers on all threads allocate neighbouring sectors of the same blocks at once; each sees his own afterwards.
    let (_d, at) = dir();
    for io in [Io::Auto, Io::Threads] {
        let path = at(&format!("many-{io:?}.vhdx"));
        let o = CreateOptions { block_size: 1 << 20, ..CreateOptions::dynamic_vhdx(64 * MIB) };
        create(&path, &o).expect("creates");
        let disk = std::sync::Arc::new(Disk::open(&path, &options(io, false)).expect("opens"));
        let threads: Vec<_> = (0..4u64)
            .map(|t| {
                let disk = disk.clone();
                std::thread::spawn(move || {
                    let mut rng = Rng::new(t + 1);
                    for _ in 0..400 {
                        let slot = rng.below(64 * MIB / 2048);
                        let off = slot * 2048 + t * 512;
                        let mut data = [0; 512];
                        Rng::new(off).fill(&mut data);
                        disk.write_at(off, &data).expect("writes");
                        if rng.below(20) == 0 {
                            disk.flush().expect("flushes");
                        }
                    }
                })
            })
            .collect();
        threads.into_iter().for_each(|t| t.join().expect("a writer"));
        let Ok(disk) = std::sync::Arc::try_unwrap(disk) else { panic!("all writers have ended") };
        disk.close().expect("closes");
        let disk = Disk::open(&path, &OpenOptions::default()).expect("opens again");
        let (mut all, mut want, mut written) = (vec![0; 64 << 20], [0; 512], 0);
        disk.read_at(0, &mut all).expect("reads");
        for (sector, data) in all.as_chunks::<512>().0.iter().enumerate() {
            if *data != [0; 512] {
                Rng::new(sector as u64 * 512).fill(&mut want);
                assert!(*data == want, "sector {sector}");
                written += 1;
            }
        }
        assert!(written > 1400, "{written} sectors were written");
    }
}
