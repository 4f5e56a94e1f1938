//! Mutational fuzzing of everything in the firmware that reads what a disk, a variable or a program brings. The targets
//! are the guest's own code, built for the host.
//!
//! Each target runs for 3 s, or `VIRIDIAN_FUZZ_SECONDS`; see the crate `fuzzing`. It fails on a panic, on an input that takes more
//! than two seconds of the processor, and on a broken promise that the target states.
//! With `VIRIDIAN_EFI_TREE` (see `real_images.rs`) the corpus has real signed images, without it only made ones.

use fuzzing::{Effort, Rng, rounds};
use std::path::PathBuf;
use std::time::Duration;
use uefi_core::block::{BlockDevice, MemoryDisk};
use uefi_core::devpath::{DevicePath, text};
use uefi_core::fat::FatVolume;
use uefi_core::fat::dir::{Directory, FatTime, attribute};
use uefi_core::fat::file::Extents;
use uefi_core::guid::{CERT_X509, GLOBAL_VARIABLE, Guid, IMAGE_SECURITY_DATABASE};
use uefi_core::hii::PackageList;
use uefi_core::iso9660::IsoVolume;
use uefi_core::partition::{Identity, crc32, scan};
use uefi_core::pe::PeImage;
use uefi_core::secure::hash::HashAlgorithm;
use uefi_core::secure::image::{check, digest};
use uefi_core::secure::{pkcs7, sigdb, x509};
use uefi_core::variables::{Quota, VariableStore, attribute as variable, file};

/// Longest that one input may take.
const SLOW: Duration = Duration::from_secs(2);

/// What mutation needs of the generator beyond what all fuzz targets do.
trait Mutation {
    /// A place among so many.
    fn index(&mut self, bound: usize) -> usize;
    /// Values at which arithmetic breaks.
    fn number(&mut self) -> u64;
    /// Changes a few things; `hot` names places that matter more than others (the empty range: none).
    fn mutate(&mut self, data: &mut Vec<u8>, hot: std::ops::Range<usize>);
}

impl Mutation for Rng {
    fn index(&mut self, bound: usize) -> usize {
        self.below(bound as u64) as usize
    }
    fn number(&mut self) -> u64 {
        const EDGES: [u64; 12] = [
            0,
            1,
            0x7f,
            0x80,
            0xff,
            0x7fff,
            0xffff,
            0x7fff_ffff,
            0xffff_ffff,
            0x1_0000_0000,
            i64::MAX as u64,
            u64::MAX,
        ];
        match self.index(3) {
            0 => EDGES[self.index(EDGES.len())],
            1 => self.next() % 4096,
            _ => self.next(),
        }
    }
    fn mutate(&mut self, data: &mut Vec<u8>, hot: std::ops::Range<usize>) {
        for _ in 0..=self.index(6) {
            if data.is_empty() {
                data.push(self.next() as u8);
            }
            let place = |r: &mut Self, len: usize| {
                if !hot.is_empty() && r.index(4) != 0 { hot.start + r.index(hot.len()) } else { r.index(len) }
            };
            let at = place(self, data.len()).min(data.len() - 1);
            match self.index(8) {
                0 => data[at] ^= 1 << self.index(8),
                1 => data[at] = self.next() as u8,
                2 | 3 => {
                    let bytes = self.number().to_le_bytes();
                    let width = [2, 4, 8][self.index(3)].min(data.len() - at);
                    data[at..at + width].copy_from_slice(&bytes[..width]);
                }
                4 => {
                    let from = self.index(data.len());
                    let len = self.index(64).min(data.len() - at).min(data.len() - from);
                    data.copy_within(from..from + len, at);
                }
                5 if data.len() < 1 << 16 => {
                    let piece: Vec<u8> = (0..self.index(16)).map(|_| self.next() as u8).collect();
                    data.splice(at..at, piece);
                }
                6 if data.len() < 1 << 20 => data.truncate(at),
                _ => data[at] = data[at].wrapping_add(1),
            }
        }
    }
}

/// Runs a target on mutations of the corpus; also on the corpus itself.
fn fuzz(
    name: &str,
    corpus: &[Vec<u8>],
    hot: impl Fn(&[u8]) -> std::ops::Range<usize>,
    mut target: impl FnMut(&mut Rng, &[u8]),
) {
    corpus.iter().for_each(|c| target(&mut Rng::new(0), c));
    rounds(name, Duration::from_secs(3), |random| {
        let mut input = corpus[random.index(corpus.len())].clone();
        let range = hot(&input);
        random.mutate(&mut input, range);
        let effort = Effort::begin();
        target(random, &input);
        let spent = effort.spent();
        assert!(spent < SLOW, "{name}: one input of {} bytes took {spent:?}", input.len());
    });
}

/// Real images, if there are any.
fn images() -> Vec<Vec<u8>> {
    let Some(tree) = std::env::var_os("VIRIDIAN_EFI_TREE").map(PathBuf::from) else { return Vec::new() };
    ["usr/lib/shim/shimx64.efi.signed", "usr/lib/efitools/x86_64-linux-gnu/HelloWorld.efi"]
        .iter()
        .map(|p| std::fs::read(tree.join(p)).unwrap_or_else(|e| panic!("{p}: {e}")))
        .collect()
}

/// A small PE32+ image with one section, relocations, and a certificate table with nothing sensible in it.
fn small_image() -> Vec<u8> {
    let mut d = vec![0u8; 0x600];
    d[..2].copy_from_slice(b"MZ");
    d[0x3c] = 0x80;
    d[0x80..0x84].copy_from_slice(b"PE\0\0");
    let mut put = |at: usize, bytes: &[u8]| d[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x84, &0x8664u16.to_le_bytes());
    put(0x86, &2u16.to_le_bytes());
    put(0x94, &240u16.to_le_bytes());
    put(0x96, &0x222u16.to_le_bytes());
    put(0x98, &0x20bu16.to_le_bytes());
    put(0xa8, &0x1000u32.to_le_bytes());
    put(0xb8, &0x1000u32.to_le_bytes());
    put(0xbc, &0x200u32.to_le_bytes());
    put(0xd0, &0x3000u32.to_le_bytes());
    put(0xd4, &0x200u32.to_le_bytes());
    put(0xdc, &10u16.to_le_bytes());
    put(0x104, &16u32.to_le_bytes());
    // Certificate table and base relocations.
    put(0x128, &0x580u32.to_le_bytes());
    put(0x12c, &0x80u32.to_le_bytes());
    put(0x130, &0x2000u32.to_le_bytes());
    put(0x134, &12u32.to_le_bytes());
    for (i, (name, address, raw, flags)) in
        [(b".text\0\0\0", 0x1000u32, 0x200u32, 0x6000_0020u32), (b".reloc\0\0", 0x2000, 0x400, 0x4200_0040)]
            .iter()
            .enumerate()
    {
        let at = 0x188 + i * 40;
        put(at, *name);
        put(at + 8, &0x180u32.to_le_bytes());
        put(at + 12, &address.to_le_bytes());
        put(at + 16, &0x180u32.to_le_bytes());
        put(at + 20, &raw.to_le_bytes());
        put(at + 36, &flags.to_le_bytes());
    }
    put(0x400, &[0, 0x10, 0, 0, 12, 0, 0, 0, 8, 0xa0, 0, 0]);
    put(0x580, &[0x80, 0, 0, 0, 0, 2, 2, 0]);
    d
}

/// The first bytes of an image, where its headers are.
fn headers(image: &[u8]) -> std::ops::Range<usize> {
    0..image.len().min(0x400)
}

/// Microsoft's certificates from the product's templates, DER.
fn certificates() -> Vec<Vec<u8>> {
    [
        include_str!("../../../crates/bios/certs/ms-uefi-2011.pem"),
        include_str!("../../../crates/bios/certs/ms-uefi-2023.pem"),
        include_str!("../../../crates/bios/certs/ms-kek-2011.pem"),
    ]
    .iter()
    .map(|pem| {
        let digit =
            |c: u8| b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/".iter().position(|d| *d == c);
        let body: String = pem.lines().filter(|l| !l.starts_with('-')).collect();
        let (mut bits, mut have, mut out) = (0usize, 0, Vec::new());
        for d in body.bytes().filter_map(digit) {
            bits = bits << 6 | d;
            have += 6;
            if have >= 8 {
                have -= 8;
                out.push((bits >> have) as u8);
                bits &= (1 << have) - 1;
            }
        }
        out
    })
    .collect()
}

fn database() -> Vec<u8> {
    certificates().iter().flat_map(|c| sigdb::list(CERT_X509, Guid::default(), &[c])).collect()
}

/// The PKCS#7 blob of a signed image's first certificate.
fn signature(image: &[u8]) -> Option<Vec<u8>> {
    let table = PeImage::parse(image).ok()?.certificate_table()?;
    let len = u32::from_le_bytes(table.get(..4)?.try_into().ok()?) as usize;
    table.get(8..len).map(<[u8]>::to_vec)
}

#[test]
fn pe_images() {
    let mut corpus = vec![small_image()];
    assert!(PeImage::parse(&corpus[0]).is_ok(), "the made image is one");
    corpus.extend(images());
    fuzz("pe", &corpus, headers, |_, input| {
        let Ok(image) = PeImage::parse(input) else { return };
        if image.size_of_image <= 8 << 20 {
            let mut memory = vec![0; image.size_of_image as usize];
            let _ = image.load(&mut memory, 0x12_3456_7000);
        }
        for hash in [HashAlgorithm::Sha256, HashAlgorithm::Sha512] {
            let _ = digest(&image, hash);
        }
    });
}

/// Found by `pe_images`: a section without data whose offset is outside of the file stopped the firmware.
#[test]
fn a_section_without_data_may_say_any_offset() {
    let mut d = small_image();
    d[0x188 + 16..0x188 + 20].fill(0);
    d[0x188 + 20..0x188 + 24].copy_from_slice(&0x1800_0000u32.to_le_bytes());
    let image = PeImage::parse(&d).unwrap();
    image.load(&mut vec![0; image.size_of_image as usize], 0).unwrap();
}

#[test]
fn authenticode() {
    let db = database();
    let mut corpus = images();
    corpus.push(small_image());
    let hot = |image: &[u8]| {
        let table = PeImage::parse(image).ok().and_then(|i| i.certificate_table()).map_or(0, <[u8]>::len);
        image.len() - table.min(image.len())..image.len()
    };
    let good: Vec<Vec<u8>> = corpus.clone();
    fuzz("authenticode", &corpus, hot, |_, input| {
        let Ok(image) = PeImage::parse(input) else { return };
        // Whatever is changed in what the digest covers: nothing that differs from the original there may be allowed.
        if check(&image, &db, &[]).is_ok() {
            let own = digest(&image, HashAlgorithm::Sha256);
            let known = good.iter().any(|g| PeImage::parse(g).is_ok_and(|g| digest(&g, HashAlgorithm::Sha256) == own));
            assert!(known, "a changed image was allowed");
        }
    });
}

#[test]
fn pkcs7_and_certificates() {
    let mut corpus: Vec<Vec<u8>> = images().iter().filter_map(|i| signature(i)).collect();
    let anchors = certificates();
    corpus.extend(anchors.clone());
    fuzz(
        "pkcs7",
        &corpus,
        |_| 0..0,
        |_, input| {
            let anchor = x509::Certificate::parse(&anchors[0]).expect("Microsoft's certificate");
            if let Ok(signed) = pkcs7::SignedData::parse(input) {
                let _ = signed.signer_certificate().map(|c| c.common_name().map(<[u8]>::len));
                let _ = signed.verifies(b"content", &anchor);
            }
            if let Ok(certificate) = x509::Certificate::parse(input) {
                let _ = certificate.issued_by(&anchor);
                let _ = certificate.common_name();
            }
            let _ = sigdb::is_valid(input);
            sigdb::entries(input).for_each(drop);
            let _ = sigdb::forbids(input, &anchor);
            let joined = sigdb::append(input, &sigdb::list(CERT_X509, Guid::default(), &[&anchors[1]]));
            assert!(!sigdb::is_valid(input) || sigdb::is_valid(&joined), "appending broke a database");
        },
    );
}

/// A disk of 64 KiB with a GPT of one partition, both copies.
fn gpt_disk() -> Vec<u8> {
    let mut d = vec![0u8; 128 * 512];
    d[446..462].copy_from_slice(&[0, 0, 2, 0, 0xee, 0xff, 0xff, 0xff, 1, 0, 0, 0, 127, 0, 0, 0]);
    d[510..512].copy_from_slice(&[0x55, 0xaa]);
    let mut entries = vec![0u8; 128 * 4];
    entries[..16].copy_from_slice(&uefi_core::partition::TYPE_ESP.0);
    entries[16] = 1;
    entries[32] = 40;
    entries[40] = 80;
    for (this, other, array) in [(1u64, 127u64, 2u64), (127, 1, 126)] {
        let mut h = b"EFI PART\0\0\x01\0".to_vec();
        h.extend(92u32.to_le_bytes());
        h.extend([0; 8]);
        for v in [this, other, 34, 100] {
            h.extend(v.to_le_bytes());
        }
        h.extend([7; 16]);
        h.extend(array.to_le_bytes());
        for v in [4u32, 128, crc32(&entries)] {
            h.extend(v.to_le_bytes());
        }
        let sum = crc32(&h).to_le_bytes();
        h[16..20].copy_from_slice(&sum);
        d[this as usize * 512..this as usize * 512 + 92].copy_from_slice(&h);
        d[array as usize * 512..array as usize * 512 + 512].copy_from_slice(&entries);
    }
    d
}

/// A disk with two primary partitions and a chain of logical ones.
fn mbr_disk() -> Vec<u8> {
    let mut d = vec![0u8; 64 * 512];
    let mut entry = |sector: usize, index: usize, kind: u8, first: u32, count: u32| {
        let at = sector * 512 + 446 + index * 16;
        d[at + 4] = kind;
        d[at + 8..at + 12].copy_from_slice(&first.to_le_bytes());
        d[at + 12..at + 16].copy_from_slice(&count.to_le_bytes());
        d[sector * 512 + 510..sector * 512 + 512].copy_from_slice(&[0x55, 0xaa]);
    };
    entry(0, 0, 0xef, 1, 8);
    entry(0, 1, 0x05, 16, 40);
    entry(16, 0, 0x83, 1, 4);
    entry(16, 1, 0x05, 10, 10);
    entry(26, 0, 0x83, 1, 4);
    d
}

/// An ISO with El Torito: descriptors, a root directory with one file, a boot catalog for UEFI.
fn iso() -> Vec<u8> {
    let mut d = vec![0u8; 24 * 2048];
    let both = |v: u32| [v.to_le_bytes(), v.to_be_bytes()].concat();
    let record = |name: &[u8], extent: u32, size: u32, flags: u8| {
        let mut r = vec![0u8; 33 + name.len() + (name.len() + 1) % 2];
        r[0] = r.len() as u8;
        r[2..10].copy_from_slice(&both(extent));
        r[10..18].copy_from_slice(&both(size));
        r[25] = flags;
        r[32] = name.len() as u8;
        r[33..33 + name.len()].copy_from_slice(name);
        r
    };
    let mut put = |at: usize, bytes: &[u8]| d[at..at + bytes.len()].copy_from_slice(bytes);
    put(16 * 2048, b"\x01CD001\x01");
    put(16 * 2048 + 156, &record(&[0], 20, 2048, 2));
    put(17 * 2048, b"\x00CD001\x01EL TORITO SPECIFICATION");
    put(17 * 2048 + 71, &19u32.to_le_bytes());
    put(18 * 2048, b"\xffCD001\x01");
    // Validation entry with its check sum, then the default entry: a UEFI image of four sectors at block 22.
    put(19 * 2048, &[1, 0xef]);
    put(19 * 2048 + 30, &[0x55, 0xaa]);
    let sum: u16 = [0xef01u16, 0xaa55].iter().fold(0u16, |s, w| s.wrapping_add(*w));
    put(19 * 2048 + 28, &0u16.wrapping_sub(sum).to_le_bytes());
    put(19 * 2048 + 32, &[0x88, 0, 0, 0, 0, 0, 4, 0, 22, 0, 0, 0]);
    let directory = [
        record(&[0], 20, 2048, 2),
        record(&[1], 20, 2048, 2),
        record(b"FILE.TXT;1", 21, 11, 0),
        record(b"LOOP", 20, 2048, 2),
    ];
    put(20 * 2048, &directory.concat());
    put(21 * 2048, b"hello world");
    d
}

#[test]
fn partitions() {
    let corpus = vec![gpt_disk(), mbr_disk(), iso()];
    for (disk, block) in [(&corpus[0], 512), (&corpus[1], 512), (&corpus[2], 2048)] {
        assert!(
            !scan(&mut MemoryDisk { data: disk.clone(), block }).unwrap().is_empty(),
            "the made disk has partitions"
        );
    }
    let hot = |_: &[u8]| 0..1536;
    fuzz("partitions", &corpus, hot, |random, input| {
        let mut data = input.to_vec();
        // A mutation behind the check sum is worth nothing: half of the headers get a new one.
        if data.len() >= 1024 && &data[512..516] == b"EFI " && random.index(2) == 0 {
            data[528..532].fill(0);
            let sum = crc32(&data[512..604]).to_le_bytes();
            data[528..532].copy_from_slice(&sum);
        }
        for block in [512, 2048] {
            let mut disk = MemoryDisk { data: data[..data.len() / block * block].to_vec(), block };
            let blocks = disk.block_count();
            for p in scan(&mut disk).unwrap_or_default() {
                let end = p.first.checked_add(p.blocks).expect("a partition that ends");
                assert!(p.blocks != 0 && end <= blocks, "a partition outside of the disk: {p:?} of {blocks}");
                let path = DevicePath::new().scsi(0, 0).partition(&p);
                let hard_drive = !matches!(p.identity, Identity::ElTorito { .. });
                assert_eq!(hard_drive, path.from_hard_drive().is_some_and(|h| h.starts_with_partition(&p)));
            }
        }
    });
}

#[test]
fn iso9660() {
    fuzz(
        "iso9660",
        &[iso()],
        |_| 16 * 2048..20 * 2048 + 256,
        |_, input| {
            let mut disk = MemoryDisk { data: input[..input.len() / 2048 * 2048].to_vec(), block: 2048 };
            let Ok(Some(volume)) = IsoVolume::open(&mut disk) else { return };
            for entry in volume.read_directory(&mut disk, volume.root()).unwrap_or_default().iter().take(32) {
                if entry.directory {
                    let _ = volume.read_directory(&mut disk, entry);
                } else {
                    let mut data = [0; 512];
                    let _ = volume.read(&mut disk, entry, u64::from(entry.size / 2), &mut data);
                }
            }
            let _ = volume.find(&mut disk, "\\LOOP\\LOOP\\file.txt");
        },
    );
}

/// A FAT12 floppy with a folder and files.
fn fat() -> Vec<u8> {
    let mut d = vec![0u8; 720 * 512];
    d[..3].copy_from_slice(&[0xeb, 0x3c, 0x90]);
    d[11..24].copy_from_slice(&[0, 2, 1, 1, 0, 2, 112, 0, 0xd0, 2, 0xf9, 3, 0]);
    d[510..512].copy_from_slice(&[0x55, 0xaa]);
    for t in [1, 4] {
        d[t * 512..t * 512 + 3].copy_from_slice(&[0xf9, 0xff, 0xff]);
    }
    let Ok(Ok(mut v)) = FatVolume::mount(MemoryDisk { data: d, block: 512 }) else { panic!("the made volume is none") };
    let now = FatTime::new(2026, 1, 1, 0, 0, 0);
    let folder = v.create(Directory::Root, "A folder", attribute::DIRECTORY, now).unwrap().as_directory().unwrap();
    for name in ["a long file name.txt", "SHORT.BIN", "third"] {
        let mut node = v.create(folder, name, 0, now).unwrap();
        let mut extents = Extents::default();
        v.write(&mut node, &mut extents, 0, &[7; 3000], now).unwrap();
    }
    v.flush().unwrap();
    v.unmount().data
}

#[test]
fn fat_volumes() {
    let now = FatTime::new(2026, 1, 1, 0, 0, 0);
    // Boot sector, both tables, root directory, first clusters.
    fuzz(
        "fat",
        &[fat()],
        |_| 0..18 * 512,
        |random, input| {
            let disk = MemoryDisk { data: input[..input.len() / 512 * 512].to_vec(), block: 512 };
            let Ok(Ok(mut v)) = FatVolume::mount(disk) else { return };
            let _ = v.free_bytes();
            let _ = v.label();
            let mut directories = vec![Directory::Root];
            let mut steps = 0;
            while let Some(directory) = directories.pop() {
                for mut node in v.read_directory(directory).unwrap_or_default() {
                    steps += 1;
                    if steps > 40 {
                        break;
                    }
                    if let Ok(below) = node.as_directory() {
                        directories.push(below);
                        continue;
                    }
                    let mut extents = Extents::default();
                    let mut data = [0; 700];
                    let _ = v.read(&node, &mut extents, random.number() % 5000, &mut data);
                    match random.index(5) {
                        0 => drop(v.write(&mut node, &mut extents, random.number() % 9000, &data, now)),
                        1 => drop(v.set_size(&mut node, &mut extents, random.number() % 20_000, now)),
                        2 => drop(v.rename(&mut node, "another name.text")),
                        3 => drop(v.remove(&node)),
                        _ => {}
                    }
                }
            }
            let _ = v.create(Directory::Root, "new file", 0, now);
            let _ = v.find("\\A folder\\third");
            let _ = v.flush();
        },
    );
}

#[test]
fn device_paths() {
    let p = scan(&mut MemoryDisk { data: gpt_disk(), block: 512 }).unwrap()[0];
    let paths = [
        DevicePath::new()
            .vendor_hardware(GLOBAL_VARIABLE, &[1; 32])
            .scsi(0, 3)
            .partition(&p)
            .file("\\EFI\\BOOT\\BOOTX64.EFI"),
        DevicePath::new().with(2, 1, &[0xd0, 0x41, 3, 0x0a, 0, 0, 0, 0]).with(1, 1, &[0, 2]).with(3, 12, &[0; 60]),
        DevicePath::new().with(4, 3, &[5; 16]).with(5, 1, &[1, 0, 0, 0, b'x', 0]),
    ];
    let mut corpus: Vec<Vec<u8>> = paths.iter().map(DevicePath::to_bytes).collect();
    corpus.extend(paths.iter().map(|p| text::to_text(p).into_bytes()));
    fuzz(
        "device-paths",
        &corpus,
        |_| 0..0,
        |_, input| {
            if let Some((path, used)) = DevicePath::parse(input) {
                assert!(used <= input.len());
                assert_eq!(
                    DevicePath::parse(&path.to_bytes()).map(|p| p.0),
                    Some(path.clone()),
                    "written and read again"
                );
                let _ = text::to_text(&path);
                let _ = path.file_path();
                let _ = path.from_hard_drive();
                let _ = path.tail();
            }
            if let Ok(text) = std::str::from_utf8(input)
                && let Some(path) = text::from_text(text)
            {
                assert!(
                    DevicePath::parse(&path.to_bytes()).is_some(),
                    "text became a path that cannot be read: {text}"
                );
            }
        },
    );
}

fn store() -> VariableStore {
    let mut store = VariableStore::new(Quota::default());
    const SECURE: u32 = 7 | variable::TIME_BASED_AUTHENTICATED_WRITE_ACCESS;
    store.set_internal("db", IMAGE_SECURITY_DATABASE, SECURE, &database()).unwrap();
    store.set_internal("KEK", GLOBAL_VARIABLE, SECURE, &database()).unwrap();
    store.set_internal("PK", GLOBAL_VARIABLE, SECURE, &database()).unwrap();
    store.set_internal("Boot0000", GLOBAL_VARIABLE, 7, &[1, 0, 0, 0, 4, 0, b'x', 0, 0, 0, 0x7f, 0xff, 4, 0]).unwrap();
    store.reset(true);
    store
}

#[test]
fn variable_files() {
    let corpus = vec![file::encode(&store()), file::encode_all(&store())];
    fuzz(
        "variable-files",
        &corpus,
        |d| 0..d.len().min(256),
        |_, input| {
            // The file ends with a check sum, or has none: a changed one is refused or whole.
            if let Ok(read) = file::decode(input, Quota::default()) {
                let again = file::decode(&file::encode_all(&read), Quota::default()).expect("what was written");
                assert_eq!(again.iter().count(), read.iter().count());
            }
        },
    );
}

#[test]
fn authenticated_variables() {
    // A time, WIN_CERTIFICATE_UEFI_GUID with a real signature (of something else), and a database.
    let payload = |blob: &[u8]| {
        let mut d = vec![0xea, 7, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        d.extend((24 + blob.len() as u32).to_le_bytes());
        d.extend([0, 2, 0xf1, 0x0e]);
        d.extend([0x9d, 0xd2, 0xaf, 0x4a, 0xdf, 0x68, 0xee, 0x49, 0x8a, 0xa9, 0x34, 0x7d, 0x37, 0x56, 0x65, 0xa7]);
        d.extend(blob);
        d.extend(database());
        d
    };
    let mut corpus: Vec<Vec<u8>> = images().iter().filter_map(|i| signature(i)).map(|s| payload(&s)).collect();
    corpus.push(payload(&[0x30, 0x03, 2, 1, 1]));
    let before = store();
    let wide = |t: &str| t.encode_utf16().collect::<Vec<u16>>();
    fuzz(
        "authenticated-variables",
        &corpus,
        |_| 0..64,
        |random, input| {
            let mut s = before.clone();
            let (name, vendor) = match random.index(5) {
                0 => ("PK", GLOBAL_VARIABLE),
                1 => ("KEK", GLOBAL_VARIABLE),
                2 => ("db", IMAGE_SECURITY_DATABASE),
                3 => ("dbx", IMAGE_SECURITY_DATABASE),
                _ => ("Private", Guid::default()),
            };
            let append = if random.index(2) == 0 { variable::APPEND_WRITE } else { 0 };
            let attributes = 7 | variable::TIME_BASED_AUTHENTICATED_WRITE_ACCESS | append;
            let set = s.set(&wide(name), vendor, attributes, input);
            // Nobody here has a key.
            assert!(set.is_err() || name == "Private", "{name} was written without a key");
            assert_eq!(s.database("db"), before.database("db"));
        },
    );
}

#[test]
fn package_lists() {
    let mut list =
        PackageList { guid: Guid::default(), languages: Vec::new(), others: vec![(2, vec![6, 0, 0, 2, 1, 2])] };
    for text in ["one", "two", "three"] {
        list.add("en-US", &text.encode_utf16().collect::<Vec<u16>>()).unwrap();
    }
    fuzz(
        "package-lists",
        &[list.encode()],
        |_| 0..0,
        |random, input| {
            if let Some(list) = PackageList::parse(input) {
                assert_eq!(PackageList::parse(&list.encode()).as_ref(), Some(&list), "written and read again");
                let _ = list.string("en-US", random.next() as u16);
            }
        },
    );
}
