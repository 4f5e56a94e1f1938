//! FAT on volumes that `mkfs.fat` and `mtools` could have made: formatted here by hand for the three widths.

use super::dir::{Directory, FatTime, attribute};
use super::file::Extents;
use super::*;
use crate::block::MemoryDisk;
use std::format;
use std::string::String;

const NOW: FatTime = FatTime { date: (44 << 9) | (11 << 5) | 22, time: 0 };

/// A freshly formatted volume.
fn format(kind: FatKind) -> FatVolume<MemoryDisk> {
    let (sectors, per_cluster, table_sectors, reserved, roots): (u32, u8, u32, u16, u16) = match kind {
        FatKind::Fat12 => (2880, 1, 9, 1, 224),
        FatKind::Fat16 => (32768, 4, 32, 4, 512),
        FatKind::Fat32 => (80000, 1, 620, 32, 0),
    };
    let mut data = vec![0u8; sectors as usize * 512];
    data[..3].copy_from_slice(&[0xeb, 0x58, 0x90]);
    data[11..13].copy_from_slice(&512u16.to_le_bytes());
    data[13] = per_cluster;
    data[14..16].copy_from_slice(&reserved.to_le_bytes());
    data[16] = 2;
    data[17..19].copy_from_slice(&roots.to_le_bytes());
    data[32..36].copy_from_slice(&sectors.to_le_bytes());
    if kind == FatKind::Fat32 {
        data[36..40].copy_from_slice(&table_sectors.to_le_bytes());
        data[44..48].copy_from_slice(&2u32.to_le_bytes());
    } else {
        data[22..24].copy_from_slice(&(table_sectors as u16).to_le_bytes());
    }
    data[510..512].copy_from_slice(&[0x55, 0xaa]);
    for t in 0..2 {
        let at = (usize::from(reserved) + t * table_sectors as usize) * 512;
        let first: &[u8] = match kind {
            FatKind::Fat12 => &[0xf8, 0xff, 0xff],
            FatKind::Fat16 => &[0xf8, 0xff, 0xff, 0xff],
            FatKind::Fat32 => &[0xf8, 0xff, 0xff, 0x0f, 0xff, 0xff, 0xff, 0x0f, 0xff, 0xff, 0xff, 0x0f],
        };
        data[at..at + first.len()].copy_from_slice(first);
    }
    let volume = FatVolume::mount(MemoryDisk { data, block: 512 }).unwrap().unwrap();
    assert_eq!(volume.kind(), kind);
    volume
}

fn pattern(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|i| ((i * 31 + seed * 7) >> 3) as u8).collect()
}

#[test]
fn files_and_directories_live() {
    for kind in [FatKind::Fat12, FatKind::Fat16, FatKind::Fat32] {
        let mut v = format(kind);
        let free = v.free_bytes().unwrap();
        let efi = v.create(Directory::Root, "EFI", attribute::DIRECTORY, NOW).unwrap();
        let efi_dir = efi.as_directory().unwrap();
        let mut files = Vec::new();
        for i in 0..40 {
            let name = format!("A rather long file name number {i}.efi");
            let mut node = v.create(efi_dir, &name, 0, NOW).unwrap();
            let mut x = Extents::default();
            // In two parts, the second one first: the gap is zeros, then filled.
            let data = pattern(3000 + i * 100, i);
            v.write(&mut node, &mut x, 1000, &data[1000..], NOW).unwrap();
            let mut gap = [1; 1000];
            assert_eq!(v.read(&node, &mut x, 0, &mut gap).unwrap(), 1000);
            assert!(gap.iter().all(|b| *b == 0));
            v.write(&mut node, &mut x, 0, &data[..1000], NOW).unwrap();
            files.push((name, data));
        }
        // A second mount sees the same.
        let mut v = FatVolume::mount(v.unmount()).unwrap().unwrap();
        for (name, data) in &files {
            let node = v.find(&format!("\\efi\\{}", name.to_uppercase())).unwrap().unwrap();
            assert_eq!(&node.name, name);
            let mut back = vec![0; data.len() + 10];
            assert_eq!(v.read(&node, &mut Extents::default(), 0, &mut back).unwrap(), data.len());
            assert_eq!(&back[..data.len()], &data[..]);
        }
        assert_eq!(v.create(efi_dir, &files[0].0.to_lowercase(), 0, NOW).err(), Some(FatError::Exists));
        let efi = v.find("EFI").unwrap().unwrap();
        assert_eq!(v.remove(&efi), Err(FatError::NotEmpty));
        let mut first = v.find("EFI/A rather long file name number 0.efi").unwrap().unwrap();
        v.rename(&mut first, "BOOTX64.EFI").unwrap();
        let node = v.find("efi/bootx64.efi").unwrap().unwrap();
        assert_eq!((node.size, node.first), (first.size, first.first));
        for node in v.read_directory(efi_dir).unwrap() {
            if !node.name.starts_with('.') {
                v.remove(&node).unwrap();
            }
        }
        v.remove(&efi).unwrap();
        assert_eq!(v.free_bytes().unwrap(), free, "{kind:?}: every cluster came back");
    }
}

#[test]
fn a_full_volume_says_so_and_loses_nothing() {
    let mut v = format(FatKind::Fat12);
    let mut node = v.create(Directory::Root, "big", 0, NOW).unwrap();
    let mut x = Extents::default();
    let free = v.free_bytes().unwrap();
    v.write(&mut node, &mut x, 0, b"kept", NOW).unwrap();
    let too_much = vec![1; free as usize + 1];
    assert_eq!(v.write(&mut node, &mut x, 0, &too_much, NOW), Err(FatError::Full));
    let mut back = [0; 8];
    assert_eq!(v.read(&node, &mut x, 0, &mut back).unwrap(), 4);
    assert_eq!(&back[..4], b"kept");
    v.set_size(&mut node, &mut x, 0, NOW).unwrap();
    assert_eq!(v.free_bytes().unwrap(), free);
}

#[test]
fn names_that_fat_cannot_hold_are_refused() {
    let mut v = format(FatKind::Fat16);
    for bad in ["", ".", "..", "a/b", "a:b", "end.", "end ", &"x".repeat(256), "tab\t"] {
        assert_eq!(v.create(Directory::Root, bad, 0, NOW).err(), Some(FatError::BadName), "{bad:?}");
    }
    for good in ["ж", "with space", ".profile", "a.b.c.d", &"x".repeat(255)] {
        v.create(Directory::Root, good, 0, NOW).unwrap();
        assert_eq!(v.lookup(Directory::Root, good).unwrap().name, *good);
    }
}

proptest::proptest! {
    /// Damaged volumes never hang or panic, whatever is asked of them.
    #[test]
    fn damage_is_survived(changes in proptest::collection::vec((0usize..40_000, proptest::num::u8::ANY), 1..40)) {
        let mut v = format(FatKind::Fat12);
        let d = v.create(Directory::Root, "dir", attribute::DIRECTORY, NOW).unwrap().as_directory().unwrap();
        let mut n = v.create(d, "a long enough name", 0, NOW).unwrap();
        v.write(&mut n, &mut Extents::default(), 0, &pattern(5000, 1), NOW).unwrap();
        let mut disk = v.unmount();
        for (at, value) in changes {
            disk.data[at] = value;
        }
        if let Ok(Ok(mut v)) = FatVolume::mount(disk) {
            let _ = v.free_bytes();
            let _ = v.label();
            let mut names: Vec<String> = Vec::new();
            for node in v.read_directory(Directory::Root).unwrap_or_default() {
                let _ = v.read(&node, &mut Extents::default(), 0, &mut [0; 6000]);
                if let Ok(inner) = node.as_directory() {
                    names.extend(v.read_directory(inner).unwrap_or_default().into_iter().map(|n| n.name));
                }
                let _ = v.remove(&node);
            }
            let _ = v.create(Directory::Root, "new file.txt", 0, NOW);
        }
    }
}

#[test]
fn times_are_packed_as_fat_has_them() {
    let t = FatTime::new(2026, 11, 27, 16, 45, 59);
    assert_eq!((t.date, t.time), (46 << 9 | 11 << 5 | 27, 16 << 11 | 45 << 5 | 29));
    assert_eq!(FatTime::new(1970, 1, 1, 0, 0, 0).date, 1 << 5 | 1);
}
