//! Tests of the disk.

use std::sync::{Arc, mpsc};

use vhd::{CreateOptions, Disk, IoBuffer, OpenOptions};

use super::{DiskConfig, ScsiDisk};
use crate::protocol::{Sense, Status};
use crate::{Cdb, Request, Response, Target};

const MIB: u64 = 1 << 20;

fn disk(size: u64, sector: u32) -> (tempfile::TempDir, ScsiDisk) {
    let d = tempfile::tempdir().expect("a directory");
    let path = d.path().join("d.vhdx");
    let o = CreateOptions { logical_sector_size: sector, block_size: 1 << 20, ..CreateOptions::dynamic_vhdx(size) };
    vhd::create(&path, &o).expect("creates");
    let open = OpenOptions { write: true, ..OpenOptions::default() };
    let disk = Disk::open(&path, &open).expect("opens");
    (d, ScsiDisk::new(Arc::new(disk), DiskConfig::default()))
}

fn send(t: &dyn Target, initiator: u64, cdb: &[u8], data: &[u8]) -> (Response, Vec<u8>) {
    let (tx, rx) = mpsc::channel();
    let data = (!data.is_empty()).then(|| IoBuffer::from_vec(data.to_vec()));
    let request = Request { cdb: Cdb::new(cdb), data, initiator };
    t.execute(request, Box::new(move |r| tx.send(r).expect("the test waits")));
    let mut r = rx.recv().expect("an answer");
    let bytes = r.data.take().map(IoBuffer::into_vec).unwrap_or_default();
    (r, bytes)
}

fn good(t: &dyn Target, cdb: &[u8], data: &[u8]) -> Vec<u8> {
    let (r, bytes) = send(t, 0, cdb, data);
    assert_eq!((r.status, r.sense), (Status::Good, None), "{cdb:02x?}");
    bytes
}

fn refused(t: &dyn Target, cdb: &[u8], data: &[u8]) -> Sense {
    let (r, _) = send(t, 0, cdb, data);
    assert_eq!(r.status, Status::CheckCondition, "{cdb:02x?}");
    r.sense.expect("sense data")
}

#[test]
fn identity_is_that_of_hyper_v() {
    let (_d, t) = disk(8 * MIB, 512);
    let b = good(&t, &[0x12, 0, 0, 0, 96, 0], &[0; 96]);
    assert_eq!(&b[8..36], b"Msft    Virtual Disk    1.0 ");
    assert_eq!(&b[..5], &[0, 0, 5, 2, 31]);
    let pages = good(&t, &[0x12, 1, 0, 0, 255, 0], &[0; 255]);
    assert_eq!(&pages[..10], &[0, 0, 0, 6, 0, 0x80, 0x83, 0xb0, 0xb1, 0xb2]);
    for page in [0x80, 0x83, 0xb0, 0xb1, 0xb2] {
        let b = good(&t, &[0x12, 1, page, 0, 255, 0], &[0; 255]);
        assert_eq!(b[1], page);
    }
    let naa = good(&t, &[0x12, 1, 0x83, 0, 255, 0], &[0; 255]);
    let at = 4 + 4 + 24;
    assert_eq!(&naa[at..at + 4], &[1, 3, 0, 16]);
    assert_eq!((naa[at + 4], naa[at + 5], naa[at + 6], naa[at + 7] >> 4), (0x60, 0x02, 0x24, 8));
    assert_eq!(refused(&t, &[0x12, 0, 0x80, 0, 96, 0], &[0; 96]), Sense::INVALID_FIELD_IN_CDB);
    assert_eq!(refused(&t, &[0x12, 1, 0xc7, 0, 96, 0], &[0; 96]), Sense::INVALID_FIELD_IN_CDB);
}

#[test]
fn capacities_and_mode_pages() {
    let (_d, t) = disk(8 * MIB, 4096);
    assert_eq!(&good(&t, &[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], &[0; 8]), &[0, 0, 7, 0xff, 0, 0, 0x10, 0]);
    let mut cdb = [0u8; 16];
    (cdb[0], cdb[1], cdb[13]) = (0x9e, 0x10, 32);
    let b = good(&t, &cdb, &[0; 32]);
    assert_eq!(&b[..12], &[0, 0, 0, 0, 0, 0, 7, 0xff, 0, 0, 0x10, 0]);
    assert_eq!(b[14], 0xc0, "thin, and zero after unmapping");
    let m = good(&t, &[0x1a, 8, 0x3f, 0, 255, 0], &[0; 255]);
    assert_eq!((m[0], m[2], m[3]), (3 + 20 + 12 + 12, 0x10, 0));
    assert_eq!((m[4], m[6] & 4), (0x08, 4), "the write cache is on");
    assert_eq!(refused(&t, &[0x1a, 8, 0xff, 0, 255, 0], &[0; 255]), Sense::SAVING_PARAMETERS_NOT_SUPPORTED);
    // Switching the cache off is allowed, changing anything else is not.
    let mut list = vec![0u8; 4 + 20];
    (list[4], list[5]) = (0x08, 18);
    good(&t, &[0x15, 0x10, 0, 0, 24, 0], &list);
    let m = good(&t, &[0x1a, 8, 0x08, 0, 255, 0], &[0; 255]);
    assert_eq!(m[6] & 4, 0);
    list[7] = 1;
    assert_eq!(refused(&t, &[0x15, 0x10, 0, 0, 24, 0], &list), Sense::INVALID_FIELD_IN_PARAMETER_LIST);
    assert_eq!(refused(&t, &[0x15, 0x10, 0, 0, 20, 0], &list), Sense::PARAMETER_LIST_LENGTH_ERROR);
}

#[test]
fn data_goes_and_comes_by_every_cdb_size() {
    let (_d, t) = disk(8 * MIB, 512);
    let cdbs: [(Vec<u8>, Vec<u8>); 4] = [
        (vec![0x0a, 0, 0, 100, 2, 0], vec![0x08, 0, 0, 100, 2, 0]),
        (vec![0x2a, 8, 0, 0, 1, 0, 0, 0, 2, 0], vec![0x28, 0, 0, 0, 1, 0, 0, 0, 2, 0]),
        (vec![0xaa, 0, 0, 0, 2, 0, 0, 0, 0, 2, 0, 0], vec![0xa8, 0, 0, 0, 2, 0, 0, 0, 0, 2, 0, 0]),
        (
            vec![0x8a, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 2, 0, 0],
            vec![0x88, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 2, 0, 0],
        ),
    ];
    for (i, (write, read)) in cdbs.iter().enumerate() {
        let data = vec![i as u8 + 1; 1024];
        good(&t, write, &data);
        assert_eq!(good(&t, read, &[0; 1024]), data);
        // A buffer that is too small is refused, a larger one is filled as far as the command says.
        assert_eq!(refused(&t, read, &[0; 1023]), Sense::INVALID_FIELD_IN_CDB);
        let (r, b) = send(&t, 0, read, &[0xee; 2048]);
        assert_eq!((r.transferred, b[1023], b[1024]), (1024, i as u8 + 1, 0xee));
    }
    good(&t, &[0x35, 0, 0, 0, 0, 0, 0, 0, 0, 0], &[]);
    let beyond = [0x28, 0, 0, 0, 0x3f, 0xff, 0, 0, 2, 0];
    assert_eq!(refused(&t, &beyond, &[0; 1024]), Sense::LBA_OUT_OF_RANGE);
    let huge = [0x88, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 2, 0, 0];
    assert_eq!(refused(&t, &huge, &[0; 1024]), Sense::LBA_OUT_OF_RANGE);
    assert_eq!(refused(&t, &[0x28, 0x20, 0, 0, 0, 0, 0, 0, 1, 0], &[0; 512]), Sense::INVALID_FIELD_IN_CDB);
    assert_eq!(refused(&t, &[0x28, 0, 0, 0, 0, 0, 0, 0, 1, 4], &[0; 512]), Sense::INVALID_FIELD_IN_CDB, "NACA");
    assert_eq!(refused(&t, &[0x28, 0, 0, 0], &[0; 512]), Sense::INVALID_FIELD_IN_CDB, "a short CDB");
    assert_eq!(refused(&t, &[0xc1, 0, 0, 0, 0, 0, 0, 0, 0, 0], &[]), Sense::INVALID_OPCODE);
}

#[test]
fn verify_compares() {
    let (_d, t) = disk(8 * MIB, 512);
    good(&t, &[0x2e, 2, 0, 0, 0, 0, 0, 0, 2, 0], &[7; 1024]);
    good(&t, &[0x2f, 2, 0, 0, 0, 0, 0, 0, 2, 0], &[7; 1024]);
    good(&t, &[0x2f, 6, 0, 0, 0, 0, 0, 0, 2, 0], &[7; 512]);
    good(&t, &[0x2f, 0, 0, 0, 0, 0, 0, 0, 2, 0], &[]);
    let mut other = [7; 1024];
    other[1000] = 8;
    assert_eq!(refused(&t, &[0x2f, 2, 0, 0, 0, 0, 0, 0, 2, 0], &other), Sense::MISCOMPARE);
    assert_eq!(refused(&t, &[0x2f, 4, 0, 0, 0, 0, 0, 0, 2, 0], &other), Sense::INVALID_FIELD_IN_CDB);
}

#[test]
fn unmap_and_write_same() {
    let (_d, t) = disk(64 * MIB, 512);
    // A pattern over 5000 blocks, then unmap the middle of it.
    good(&t, &[0x41, 0, 0, 0, 0, 0, 0, 0x13, 0x88, 0], &[0x5a; 512]);
    let read = |lba: u16| good(&t, &[0x28, 0, 0, 0, (lba >> 8) as u8, lba as u8, 0, 0, 1, 0], &[1; 512]);
    assert_eq!((read(0)[0], read(4999)[511], read(5000)[0]), (0x5a, 0x5a, 0));
    let mut list = vec![0u8; 24];
    (list[1], list[3]) = (22, 16);
    list[8..16].copy_from_slice(&100u64.to_be_bytes());
    list[16..20].copy_from_slice(&3000u32.to_be_bytes());
    good(&t, &[0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0], &list);
    assert_eq!((read(99)[0], read(100)[0], read(3099)[0], read(3100)[0]), (0x5a, 0, 0, 0x5a));
    list[8..16].copy_from_slice(&u64::MAX.to_be_bytes());
    assert_eq!(refused(&t, &[0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0], &list), Sense::LBA_OUT_OF_RANGE);
    assert_eq!(refused(&t, &[0x42, 0, 0, 0, 0, 0, 0, 0, 7, 0], &list), Sense::PARAMETER_LIST_LENGTH_ERROR);
    assert_eq!(refused(&t, &[0x42, 1, 0, 0, 0, 0, 0, 0, 24, 0], &list), Sense::INVALID_FIELD_IN_CDB);
    good(&t, &[0x42, 0, 0, 0, 0, 0, 0, 0, 0, 0], &[]);
    // NDOB and UNMAP.
    good(&t, &[0x93, 0x09, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x13, 0x88, 0, 0], &[]);
    assert_eq!((read(0)[0], read(4999)[0]), (0, 0));
    assert_eq!(refused(&t, &[0x41, 0, 0, 0, 0, 0, 0, 0, 0, 0], &[1; 512]), Sense::INVALID_FIELD_IN_CDB);
}

#[test]
fn reset_gives_one_unit_attention() {
    let (_d, t) = disk(8 * MIB, 512);
    good(&t, &[0; 6], &[]);
    t.reset();
    good(&t, &[0x12, 0, 0, 0, 36, 0], &[0; 36]);
    assert_eq!(refused(&t, &[0; 6], &[]), Sense::POWER_ON_OR_RESET);
    good(&t, &[0; 6], &[]);
    t.reset();
    let sense = good(&t, &[3, 0, 0, 0, 18, 0], &[0; 18]);
    assert_eq!((sense[2], sense[12], sense[13]), (6, 0x29, 0));
    good(&t, &[0; 6], &[]);
    // Stopped: not ready until started.
    good(&t, &[0x1b, 0, 0, 0, 0, 0], &[]);
    assert_eq!(refused(&t, &[0; 6], &[]), Sense::STOPPED);
    good(&t, &[0x1b, 0, 0, 0, 1, 0], &[]);
    good(&t, &[0; 6], &[]);
}

#[test]
fn reservations_fence_others() {
    let (_d, t) = disk(8 * MIB, 512);
    let out = |who: u64, action: u8, kind: u8, key: u64, service: u64| {
        let mut list = [0; 24];
        list[..8].copy_from_slice(&key.to_be_bytes());
        list[8..16].copy_from_slice(&service.to_be_bytes());
        let (r, _) = send(&t, who, &[0x5f, action, kind, 0, 0, 0, 0, 0, 24, 0], &list);
        r.status
    };
    let write = |who| send(&t, who, &[0x2a, 0, 0, 0, 0, 0, 0, 0, 1, 0], &[0; 512]).0;
    let read = |who| send(&t, who, &[0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0], &[0; 512]).0;
    assert_eq!(write(2).status, Status::Good);
    assert_eq!(out(1, 1, 1, 0, 0), Status::ReservationConflict, "not registered");
    assert_eq!(out(1, 0, 0, 0, 11), Status::Good);
    assert_eq!(out(2, 6, 0, 99, 22), Status::Good, "ignoring the existing key");
    assert_eq!(out(1, 1, 5, 11, 0), Status::Good, "write exclusive, registrants only");
    assert_eq!((write(1).status, write(2).status), (Status::Good, Status::Good));
    assert_eq!((write(3).status, read(3).status), (Status::ReservationConflict, Status::Good));
    let keys = send(&t, 3, &[0x5e, 0, 0, 0, 0, 0, 0, 0, 64, 0], &[0; 64]).1;
    assert_eq!((keys[7], keys[15], keys[23]), (16, 11, 22));
    // 2 takes the disk from 1.
    assert_eq!(out(2, 4, 3, 22, 11), Status::Good);
    assert_eq!(write(1).sense, Some(Sense::REGISTRATIONS_PREEMPTED));
    assert_eq!((write(1).status, read(1).status), (Status::ReservationConflict, Status::ReservationConflict));
    let held = send(&t, 3, &[0x5e, 1, 0, 0, 0, 0, 0, 0, 64, 0], &[0; 64]).1;
    assert_eq!((held[7], held[15], held[21]), (16, 22, 3));
    // State survives saving.
    let mut cbor = Vec::new();
    ciborium::into_writer(&t.save(), &mut cbor).expect("saves");
    assert_eq!(out(2, 3, 0, 22, 0), Status::Good);
    assert_eq!(write(1).status, Status::Good);
    t.restore(ciborium::from_reader(&cbor[..]).expect("loads")).expect("takes it");
    assert_eq!(write(1).status, Status::ReservationConflict);
}

#[test]
fn supported_opcodes_are_supported() {
    let (_d, t) = disk(8 * MIB, 512);
    let all = good(&t, &[0xa3, 0x0c, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0], &[0; 4096]);
    let n = u32::from_be_bytes([all[0], all[1], all[2], all[3]]) as usize;
    assert_eq!(n % 8, 0);
    for d in all[4..4 + n].chunks(8) {
        // An all-zero command of each kind may be refused, but not as unknown.
        let mut cdb = vec![0; usize::from(d[7])];
        (cdb[0], cdb[1]) = (d[0], d[3]);
        let (r, _) = send(&t, 0, &cdb, &[0; 512]);
        assert_ne!(r.sense, Some(Sense::INVALID_OPCODE), "{:02x}", d[0]);
    }
    let one = good(&t, &[0xa3, 0x0c, 1, 0x28, 0, 0, 0, 0, 0x10, 0, 0, 0], &[0; 64]);
    assert_eq!((one[1], one[3], one[4]), (3, 10, 0x28));
    let none = good(&t, &[0xa3, 0x0c, 1, 0xc0, 0, 0, 0, 0, 0x10, 0, 0, 0], &[0; 64]);
    assert_eq!(none[1], 1);
}

/// Random CDBs with random data: every one is answered once, nothing panics. Runs for 2 s, or `VIRIDIAN_FUZZ_SECONDS`;
/// see the crate `fuzzing`.
#[test]
fn random_commands_are_answered() {
    let (_d, disk) = disk(16 * MIB, 512);
    let dvd = crate::ScsiDvd::new(None);
    let known = [
        0x00, 0x03, 0x08, 0x0a, 0x12, 0x15, 0x1a, 0x1b, 0x1d, 0x1e, 0x25, 0x28, 0x2a, 0x2b, 0x2e, 0x2f, 0x35, 0x41,
        0x42, 0x43, 0x46, 0x4a, 0x51, 0x52, 0x55, 0x5a, 0x5e, 0x5f, 0x88, 0x8a, 0x8e, 0x8f, 0x91, 0x93, 0x9e, 0xa0,
        0xa3, 0xa8, 0xaa, 0xad, 0xae, 0xaf, 0xbb, 0xbd, 0xbe,
    ];
    let rounds = fuzzing::rounds("SCSI commands", std::time::Duration::from_secs(2), |rng| {
        for _ in 0..50 {
            let mut cdb = [0u8; 16];
            for b in &mut cdb {
                // Mostly small numbers, or nothing would ever be in range.
                *b = if rng.one_in(4) { rng.next() as u8 } else { rng.pick(&[0, 0, 0, 1, 2, 4, 7]) };
            }
            if !rng.one_in(8) {
                cdb[0] = rng.pick(&known);
            }
            let mut data = vec![0; rng.pick(&[0, 8, 24, 512, 4096, 65536])];
            for b in data.iter_mut().take(64) {
                *b = (rng.next() & rng.next()) as u8;
            }
            let cut = if rng.one_in(16) { rng.below(17) as usize } else { 16 };
            let target: &dyn Target = if rng.one_in(4) { &dvd } else { &disk };
            let (r, _) = send(target, rng.below(3), &cdb[..cut], &data);
            assert_eq!(r.sense.is_some(), r.status == Status::CheckCondition);
            assert!(r.transferred <= data.len());
        }
    });
    assert!(rounds > 2, "only {rounds} rounds");
}
