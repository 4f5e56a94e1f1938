//! Operations on whole images: what they keep, that they can be interrupted, that children know their parents.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::powercut::{new_child, new_image, options};
use super::sim::{Content, SimFile};
use super::{Rng, dir};
use crate::ops::check::check_storage;
use crate::ops::merge::merge_into;
use crate::ops::resize::resize_file;
use crate::storage::Storage;
use crate::{
    CreateOptions, Disk, DiskType, Error, Format, Io, OpenOptions, check, compact, convert, create, image, info, merge,
    minimum_size, reparent, resize,
};

const MIB: u64 = 1 << 20;

fn open(path: &Path) -> Disk {
    Disk::open(path, &OpenOptions { write: true, io: Io::Blocking, ..OpenOptions::default() }).expect("opens")
}

fn content(disk: &Disk) -> Vec<u8> {
    let mut v = vec![0; disk.size() as usize];
    disk.read_at(0, &mut v).expect("reads");
    v
}

fn scribble(disk: &Disk, seed: u64, times: u32) {
    let mut rng = Rng::new(seed);
    for _ in 0..times {
        let off = rng.below(disk.size() / 4096) * 4096;
        let mut data = vec![0; (4096 * (1 + rng.below(20))).min(disk.size() - off) as usize];
        if rng.below(4) == 0 {
            disk.write_zeroes(off, data.len() as u64).expect("zeroes");
        } else {
            rng.fill(&mut data);
            disk.write_at(off, &data).expect("writes");
        }
    }
}

fn make(path: &Path, format: Format, disk_type: DiskType, size: u64, parent: Option<PathBuf>) {
    let o = CreateOptions { format, disk_type, parent, block_size: 1 << 20, ..CreateOptions::dynamic_vhdx(size) };
    create(path, &o).expect("creates");
}

fn quiet() -> impl FnMut(u64, u64) -> bool {
    |_, _| true
}

#[test]
fn conversions_keep_the_content() {
    let (_d, at) = dir();
    let first = at("a.vhdx");
    make(&first, Format::Vhdx, DiskType::Dynamic, 20 * MIB + 4096, None);
    let disk = open(&first);
    scribble(&disk, 1, 60);
    let want = content(&disk);
    disk.close().expect("closes");
    let mut from = first;
    for (i, (format, disk_type)) in [
        (Format::Raw, DiskType::Fixed),
        (Format::Vhd, DiskType::Dynamic),
        (Format::Vhdx, DiskType::Fixed),
        (Format::Vhd, DiskType::Fixed),
        (Format::Vhdx, DiskType::Dynamic),
    ]
    .into_iter()
    .enumerate()
    {
        let to = at(&format!("{i}.{}", if format == Format::Raw { "img" } else { "x" }));
        let o = CreateOptions { format, disk_type, ..CreateOptions::dynamic_vhdx(0) };
        // Cancelled: nothing is left behind, and it can be done again.
        let cancelled = convert(&from, None, &to, &o, &mut |_, _| false);
        assert!(matches!(cancelled, Err(Error::Cancelled)), "{cancelled:?}");
        assert!(!to.exists());
        let mut last = (0, 0);
        convert(&from, None, &to, &o, &mut |a, b| {
            assert!(a >= last.0, "progress goes forward");
            last = (a, b);
            true
        })
        .expect("converts");
        assert_eq!(last, (want.len() as u64, want.len() as u64));
        assert!(matches!(convert(&from, None, &to, &o, &mut quiet()), Err(Error::Io { .. })), "no overwriting");
        let disk = Disk::open(&to, &OpenOptions::default()).expect("opens");
        assert!(content(&disk) == want, "{format} {disk_type}");
        assert!(check(&to, None).expect("checks").is_clean());
        from = to;
    }
    assert_eq!(std::fs::read_dir(at("").as_path()).expect("lists").count(), 6, "no temporary files");
}

#[test]
fn chains_are_checked_merged_and_moved() {
    for format in [Format::Vhdx, Format::Vhd] {
        let (_d, at) = dir();
        let ext = if format == Format::Vhdx { "vhdx" } else { "vhd" };
        let (base, mid, top) = (at(&format!("base.{ext}")), at(&format!("mid.{ext}")), at(&format!("top.{ext}")));
        make(&base, format, DiskType::Dynamic, 12 * MIB, None);
        scribble(&open(&base), 2, 30);
        make(&mid, format, DiskType::Differencing, 0, Some(base.clone()));
        scribble(&open(&mid), 3, 30);
        make(&top, format, DiskType::Differencing, 0, Some(mid.clone()));
        let disk = open(&top);
        scribble(&disk, 4, 30);
        let want = content(&disk);
        assert_eq!(disk.info().parents.len(), 2);
        // A held chain is refused to everybody else, parents too.
        assert!(matches!(Disk::open(&top, &OpenOptions::default()), Err(Error::InUse { .. })));
        let write = OpenOptions { write: true, ..OpenOptions::default() };
        assert!(matches!(Disk::open(&base, &write), Err(Error::InUse { .. })));
        assert!(info(&top, None).expect("information all the same").in_use);
        disk.close().expect("closes");
        // Compacting keeps content and identity.
        for p in [&top, &mid, &base] {
            compact(p, None, &mut quiet()).expect("compacts");
            assert!(content(&Disk::open(&top, &OpenOptions::default()).expect("opens")) == want, "{}", p.display());
        }
        // Moved away: not found, then found again.
        let moved = at("sub").join(mid.file_name().expect("a name"));
        std::fs::create_dir(at("sub")).expect("makes a directory");
        // Its own parent is one directory up now.
        std::fs::rename(&mid, &moved).expect("moves");
        assert!(matches!(Disk::open(&top, &OpenOptions::default()), Err(Error::Parent { .. })));
        reparent(&moved, None, &base, false).expect("reparents");
        reparent(&top, None, &moved, false).expect("reparents");
        assert!(content(&Disk::open(&top, &OpenOptions::default()).expect("opens")) == want);
        // The wrong parent is refused, and so is a loop.
        assert!(matches!(reparent(&top, None, &base, false), Err(Error::Parent { .. })));
        assert!(matches!(reparent(&moved, None, &top, true), Err(Error::Parent { .. })));
        // Merging the middle into the base; the top then stands on the base.
        merge(&moved, None, &mut quiet()).expect("merges");
        assert!(!moved.exists());
        reparent(&top, None, &base, format == Format::Vhd).expect("reparents");
        assert!(content(&Disk::open(&top, &OpenOptions::default()).expect("opens")) == want);
        let kept = at("kept");
        std::fs::copy(&top, &kept).expect("copies");
        merge(&top, None, &mut quiet()).expect("merges");
        assert!(content(&Disk::open(&base, &OpenOptions::default()).expect("opens")) == want);
        if format == Format::Vhdx {
            // Interrupted before the child was removed: it shows the same, takes no write, and merging again removes it.
            std::fs::rename(&kept, &top).expect("moves");
            assert!(check(&top, None).expect("checks").is_clean());
            assert!(content(&Disk::open(&top, &OpenOptions::default()).expect("opens")) == want);
            assert!(matches!(Disk::open(&top, &write), Err(Error::Parent { .. })));
            merge(&top, None, &mut quiet()).expect("merges");
            assert!(!top.exists());
        }
        assert!(check(&base, None).expect("checks").is_clean());
    }
}

/// Somebody else's open files are enough: where the paths lead does not matter any more.
#[test]
fn a_chain_opens_from_files_that_are_given() {
    let (_d, at) = dir();
    let (base, child) = (at("there/base.vhdx"), at("there/child.vhdx"));
    std::fs::create_dir(at("there")).expect("makes");
    make(&base, Format::Vhdx, DiskType::Dynamic, 8 * MIB, None);
    scribble(&open(&base), 1, 20);
    make(&child, Format::Vhdx, DiskType::Differencing, 8 * MIB, Some(base.clone()));
    let disk = open(&child);
    scribble(&disk, 2, 10);
    let want = content(&disk);
    drop(disk);
    let file = |path: &Path, write| std::fs::File::options().read(true).write(write).open(path).expect("opens");
    let files = vec![(child.clone(), file(&child, true)), (base.clone(), file(&base, false))];
    let with =
        |files| OpenOptions { write: true, io: Io::Blocking, files: Some(Arc::new(files)), ..Default::default() };
    std::fs::rename(at("there"), at("elsewhere")).expect("renames");
    assert!(Disk::open(&child, &with(Vec::new())).is_err());
    let disk = Disk::open(&child, &with(files)).expect("opens");
    assert!(content(&disk) == want);
    scribble(&disk, 3, 10);
    let want = content(&disk);
    drop(disk);
    std::fs::rename(at("elsewhere"), at("there")).expect("renames");
    assert!(content(&open(&child)) == want);
}

#[test]
fn a_changed_parent_is_noticed() {
    let (_d, at) = dir();
    let (base, child) = (at("base.vhdx"), at("child.vhdx"));
    make(&base, Format::Vhdx, DiskType::Dynamic, 8 * MIB, None);
    make(&child, Format::Vhdx, DiskType::Differencing, 0, Some(base.clone()));
    // Opening the parent for writing changes nothing yet.
    open(&base).close().expect("closes");
    open(&child).close().expect("closes");
    open(&base).write_at(0, &[1; 512]).expect("writes");
    let e = Disk::open(&child, &OpenOptions::default()).err().expect("refused");
    assert!(matches!(e, Error::Parent { .. }), "{e}");
    assert!(!check(&child, None).expect("checks").is_clean());
}

#[test]
fn unmapped_space_is_given_back() {
    let (_d, at) = dir();
    let path = at("a.vhdx");
    make(&path, Format::Vhdx, DiskType::Dynamic, 64 * MIB, None);
    let disk = open(&path);
    disk.write_at(0, &vec![7; 40 << 20]).expect("writes");
    disk.flush().expect("flushes");
    disk.unmap(4 * MIB, 30 * MIB).expect("unmaps");
    disk.flush().expect("flushes");
    disk.flush().expect("makes the punching durable");
    // Given-up blocks are used again before the file grows.
    let before = info(&path, None).expect("looks").file_size;
    disk.write_at(44 * MIB, &vec![8; 10 << 20]).expect("writes");
    disk.flush().expect("flushes");
    let i = info(&path, None).expect("looks");
    assert_eq!(i.file_size, before, "the file grew");
    assert!(i.allocated < 26 * MIB, "{} bytes on the host", i.allocated);
    let want = content(&disk);
    disk.close().expect("closes");
    compact(&path, None, &mut quiet()).expect("compacts");
    assert!(info(&path, None).expect("looks").file_size <= 27 * MIB);
    assert!(content(&open(&path)) == want);
}

#[test]
fn sizes_change_in_use_and_offline() {
    let (_d, at) = dir();
    for (name, format, disk_type) in [
        ("a.vhdx", Format::Vhdx, DiskType::Dynamic),
        ("f.vhdx", Format::Vhdx, DiskType::Fixed),
        ("f.vhd", Format::Vhd, DiskType::Fixed),
        ("a.img", Format::Raw, DiskType::Fixed),
        ("d.vhd", Format::Vhd, DiskType::Dynamic),
    ] {
        let path = at(name);
        make(&path, format, disk_type, 5 * MIB + 512, None);
        let mut want = {
            let disk = open(&path);
            disk.write_at(0, &vec![5; 5 * MIB as usize + 512]).expect("writes");
            disk.flush().expect("flushes");
            content(&disk)
        };
        // Shrunk, then grown: what was cut off does not come back.
        for (size, force) in [(3 * MIB + 1024, true), (9 * MIB, false)] {
            resize(&path, None, size, force, &mut quiet()).expect("resizes");
            want.truncate(size as usize);
            want.resize(size as usize, 0);
            let disk = open(&path);
            assert_eq!(disk.size(), size);
            assert!(content(&disk) == want, "{name} at {size}");
        }
        if name != "d.vhd" {
            let disk = Disk::open(&path, &OpenOptions { write: true, ..OpenOptions::default() }).expect("opens");
            disk.resize(20 * MIB, false).expect("grows in use");
            want.resize(20 * MIB as usize, 0);
            disk.write_at(20 * MIB - 512, &[6; 512]).expect("writes at the new end");
            want[20 * MIB as usize - 512..].fill(6);
            assert!(content(&disk) == want, "{name}");
        }
        assert!(check(&path, None).expect("checks").is_clean(), "{name}");
        assert!(content(&open(&path)) == want, "{name}");
    }
    // The smallest safe size: the end of the last partition.
    let path = at("p.vhdx");
    make(&path, Format::Vhdx, DiskType::Dynamic, 64 * MIB, None);
    let disk = open(&path);
    let mut mbr = [0; 512];
    mbr[450] = 0x83;
    mbr[454..458].copy_from_slice(&2048u32.to_le_bytes());
    mbr[458..462].copy_from_slice(&20480u32.to_le_bytes());
    mbr[510..].copy_from_slice(&[0x55, 0xaa]);
    disk.write_at(0, &mbr).expect("writes");
    disk.close().expect("closes");
    assert_eq!(minimum_size(&path, None).expect("finds"), 11 * MIB);
    assert!(matches!(resize(&path, None, 10 * MIB, false, &mut quiet()), Err(Error::Parameter(_))));
    resize(&path, None, 11 * MIB, false, &mut quiet()).expect("shrinks");
}

#[test]
fn a_bat_that_is_too_small_moves() {
    let (_d, at) = dir();
    let path = at("a.vhdx");
    make(&path, Format::Vhdx, DiskType::Dynamic, 8 * MIB, None);
    let disk = open(&path);
    scribble(&disk, 8, 20);
    let want = content(&disk);
    // More than 131072 blocks of 1 MiB: the BAT needs a second mebibyte.
    disk.resize(300 << 30, false).expect("grows");
    disk.write_at((300 << 30) - 4096, &[3; 4096]).expect("writes");
    disk.close().expect("closes");
    assert!(check(&path, None).expect("checks").is_clean());
    let disk = open(&path);
    let mut got = vec![0; want.len()];
    disk.read_at(0, &mut got).expect("reads");
    assert!(got == want);
    disk.read_at((300 << 30) - 4096, &mut got[..4096]).expect("reads");
    assert_eq!(got[..4096], [3; 4096]);
}

fn sim_disk(file: Arc<SimFile>, parents: &[Arc<SimFile>], write: bool) -> crate::Result<Disk> {
    let mut images = vec![image::open(file, Format::Vhdx, write)?];
    for p in parents {
        images.push(image::open(p.clone(), Format::Vhdx, false)?);
    }
    let paths = images.iter().map(|_| PathBuf::from("simulated")).collect();
    Disk::from_images(images, paths, Io::Blocking)
}

fn filled(o: &CreateOptions, seed: u64) -> (Content, Vec<u8>) {
    let file = SimFile::new(new_image(o));
    let disk = sim_disk(file.clone(), &[], true).expect("opens");
    scribble(&disk, seed, 25);
    let c = content(&disk);
    disk.close().expect("closes");
    (file.now(), c)
}

#[test]
fn power_cuts_while_resizing() {
    let mut rng = Rng::new(5);
    for (disk_type, from, to) in [
        (DiskType::Dynamic, 6 * MIB + 512, 9 * MIB),
        (DiskType::Dynamic, 9 * MIB, 4 * MIB + 512),
        (DiskType::Fixed, 3 * MIB + 512, 6 * MIB),
        (DiskType::Dynamic, 6 * MIB, 140_000 * MIB),
    ] {
        let (before, data) = filled(&options(Format::Vhdx, disk_type, from, 1 << 20, 512), 3);
        let file = SimFile::new(before);
        resize_file(file.clone(), Format::Vhdx, to, true).expect("resizes");
        let end = file.journal_len();
        for i in 0..200 {
            let cut = if i == 0 { end } else { rng.below(end as u64 + 1) as usize };
            let crashed = SimFile::new(file.crash(cut, &mut rng, 512));
            let disk = sim_disk(crashed.clone(), &[], true).unwrap_or_else(|e| panic!("cut {cut}: {e}"));
            assert!(disk.size() == from || disk.size() == to, "cut {cut}: {}", disk.size());
            assert!(cut != end || disk.size() == to, "done, but not durable");
            let n = data.len().min(to as usize);
            let mut got = vec![1; n];
            disk.read_at(0, &mut got).expect("reads");
            assert!(got == data[..n], "cut {cut}");
            let mut rest = vec![1; ((disk.size() as usize - n) / 512 * 512).min(3 << 20)];
            if disk.size() == to && to > from {
                disk.read_at(n as u64, &mut rest).expect("reads");
                assert!(rest.iter().all(|&b| b == 0), "cut {cut}: something shows behind the old end");
            }
            assert!(check_storage(crashed, Format::Vhdx).expect("checks").is_clean());
        }
    }
}

#[test]
fn power_cuts_while_merging() {
    let mut rng = Rng::new(6);
    let base_options = options(Format::Vhdx, DiskType::Dynamic, 12 * MIB, 2 << 20, 512);
    let (base, _) = filled(&base_options, 11);
    let base_file = SimFile::new(base.clone());
    let mut o = options(Format::Vhdx, DiskType::Differencing, 12 * MIB, 1 << 20, 512);
    o.parent = Some("parent".into());
    let child = SimFile::new(new_child(&o, &base_file));
    let want = {
        let disk = sim_disk(child.clone(), std::slice::from_ref(&base_file), true).expect("opens");
        scribble(&disk, 12, 40);
        content(&disk)
    };
    let child = child.now();
    let source = sim_disk(SimFile::new(child.clone()), &[], false).expect("opens");
    let child_id = source.facts.link_id;
    merge_into(&source, base_file.clone(), &mut quiet()).expect("merges");
    let end = base_file.journal_len();
    for i in 0..200 {
        let cut = if i == 0 { end } else { rng.below(end as u64 + 1) as usize };
        let crashed = SimFile::new(base_file.crash(cut, &mut rng, 512));
        let parent = image::open(crashed.clone(), Format::Vhdx, false).unwrap_or_else(|e| panic!("cut {cut}: {e}"));
        let merged = parent.facts.link_id == child_id;
        assert!(cut != end || merged, "done, but not durable");
        assert!(check_storage(crashed.clone(), Format::Vhdx).expect("checks").is_clean());
        if merged {
            // The parent alone shows what the child showed.
            assert!(content(&sim_disk(crashed, &[], true).expect("opens")) == want, "cut {cut}");
            continue;
        }
        // The child over the half-merged parent shows the same, is still its child, and can be merged again.
        let facts = image::open(SimFile::new(child.clone()), Format::Vhdx, false).expect("opens").facts;
        let link = facts.link.clone().expect("a link");
        let here = Path::new("simulated");
        image::check_link(here, here, &link, &facts, &parent.facts).unwrap_or_else(|e| panic!("cut {cut}: {e}"));
        let both = sim_disk(SimFile::new(child.clone()), std::slice::from_ref(&crashed), false).expect("opens");
        assert!(content(&both) == want, "cut {cut}");
        drop(both);
        let source = sim_disk(SimFile::new(child.clone()), &[], false).expect("opens");
        merge_into(&source, crashed.clone(), &mut quiet()).expect("merges again");
        assert!(content(&sim_disk(crashed, &[], false).expect("opens")) == want, "cut {cut}");
    }
}

#[test]
fn power_cuts_after_writing_anew() {
    // `convert` and `compact` give the new file its name only when all of it is durable.
    let (source, want) = filled(&options(Format::Vhdx, DiskType::Dynamic, 12 * MIB, 1 << 20, 512), 21);
    let source = sim_disk(SimFile::new(source), &[], false).expect("opens");
    let mut rng = Rng::new(7);
    for o in [
        options(Format::Vhdx, DiskType::Dynamic, 12 * MIB, 2 << 20, 512),
        options(Format::Vhdx, DiskType::Fixed, 12 * MIB, 1 << 20, 512),
        options(Format::Vhd, DiskType::Dynamic, 12 * MIB, 2 << 20, 512),
        options(Format::Raw, DiskType::Fixed, 12 * MIB, 0, 512),
    ] {
        let file = SimFile::new(Content::default());
        crate::ops::create::write_structures(&*file, Path::new("simulated"), &o, None, Vec::new()).expect("creates");
        let images = vec![image::open(file.clone(), o.format, true).expect("opens")];
        let target = Disk::from_images(images, vec!["simulated".into()], Io::Blocking).expect("opens");
        crate::ops::copy::copy(&source, &target, 12 * MIB, crate::ops::copy::What::Content, &mut quiet())
            .expect("copies");
        target.close().expect("closes");
        file.sync().expect("as `NewFile::commit` does");
        for _ in 0..20 {
            let crashed = SimFile::new(file.crash(file.journal_len(), &mut rng, 512));
            let images = vec![image::open(crashed, o.format, false).expect("opens")];
            let disk = Disk::from_images(images, vec!["simulated".into()], Io::Blocking).expect("opens");
            assert!(content(&disk) == want, "{}", o.format);
        }
    }
}
