//! Tests of the drive.

use std::sync::{Arc, mpsc};

use vhd::{Disk, IoBuffer, OpenOptions};

use crate::protocol::{Sense, Status};
use crate::{Cdb, EjectError, Request, Response, ScsiDvd, Target};

fn disc(dir: &tempfile::TempDir, name: &str, sectors: usize) -> Arc<Disk> {
    let path = dir.path().join(name);
    let data: Vec<u8> = (0..sectors * 2048).map(|i| (i / 2048 + 1) as u8).collect();
    std::fs::write(&path, data).expect("writes");
    Arc::new(Disk::open(&path, &OpenOptions::default()).expect("opens"))
}

fn send(t: &ScsiDvd, cdb: &[u8], data: &[u8]) -> (Response, Vec<u8>) {
    let (tx, rx) = mpsc::channel();
    let data = (!data.is_empty()).then(|| IoBuffer::from_vec(data.to_vec()));
    let request = Request { cdb: Cdb::new(cdb), data, initiator: 0 };
    t.execute(request, Box::new(move |r| tx.send(r).expect("the test waits")));
    let mut r = rx.recv().expect("an answer");
    let bytes = r.data.take().map(IoBuffer::into_vec).unwrap_or_default();
    (r, bytes)
}

fn good(t: &ScsiDvd, cdb: &[u8], len: usize) -> Vec<u8> {
    let (r, bytes) = send(t, cdb, &vec![0; len]);
    assert_eq!((r.status, r.sense), (Status::Good, None), "{cdb:02x?}");
    bytes[..r.transferred].to_vec()
}

fn refused(t: &ScsiDvd, cdb: &[u8]) -> Sense {
    send(t, cdb, &[0; 4096]).0.sense.expect("sense data")
}

const READY: [u8; 6] = [0; 6];
const EVENTS: [u8; 10] = [0x4a, 1, 0, 0, 0x10, 0, 0, 0, 8, 0];

#[test]
fn a_disc_is_read() {
    let d = tempfile::tempdir().expect("a directory");
    let t = ScsiDvd::new(Some(disc(&d, "a.iso", 40)));
    let inquiry = good(&t, &[0x12, 0, 0, 0, 36, 0], 36);
    assert_eq!((&inquiry[8..32], inquiry[0], inquiry[1]), (&b"Msft    Virtual DVD-ROM "[..], 5, 0x80));
    assert_eq!(good(&t, &[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], 8), [0, 0, 0, 39, 0, 0, 8, 0]);
    assert_eq!(good(&t, &[0x28, 0, 0, 0, 0, 7, 0, 0, 2, 0], 4096)[2047..2049], [8, 9]);
    assert_eq!(good(&t, &[0xa8, 0, 0, 0, 0, 7, 0, 0, 0, 1, 0, 0], 2048)[0], 8);
    assert_eq!(good(&t, &[0xbe, 0, 0, 0, 0, 3, 0, 0, 1, 0x10, 0, 0], 2048)[0], 4);
    assert_eq!(refused(&t, &[0x28, 0, 0, 0, 0, 39, 0, 0, 2, 0]), Sense::LBA_OUT_OF_RANGE);
    assert_eq!(refused(&t, &[0x2a, 0, 0, 0, 0, 0, 0, 0, 1, 0]), Sense::INVALID_OPCODE);
    // Table of contents: track 1 at 0, lead-out at 40.
    let toc = good(&t, &[0x43, 0, 0, 0, 0, 0, 0, 0, 32, 0], 32);
    assert_eq!(toc, [0, 18, 1, 1, 0, 0x14, 1, 0, 0, 0, 0, 0, 0, 0x14, 0xaa, 0, 0, 0, 0, 40]);
    let msf = good(&t, &[0x43, 2, 0, 0, 0, 0, 0xaa, 0, 32, 0], 32);
    assert_eq!(msf[8..12], [0, 0, 2, 40]);
    assert_eq!(good(&t, &[0x43, 0, 1, 0, 0, 0, 0, 0, 32, 0], 32)[..4], [0, 10, 1, 1]);
    // Configuration: a CD, because it is small.
    let c = good(&t, &[0x46, 0, 0, 0, 0, 0, 0, 0, 255, 0], 255);
    assert_eq!((c[6..8].to_vec(), u32::from_be_bytes([c[0], c[1], c[2], c[3]]) as usize + 4), (vec![0, 8], c.len()));
    let one = good(&t, &[0x46, 2, 0, 0x10, 0, 0, 0, 0, 255, 0], 255);
    assert_eq!(one[8..12], [0, 0x10, 1, 8]);
    assert_eq!(good(&t, &[0x51, 0, 0, 0, 0, 0, 0, 0, 34, 0], 34).len(), 34);
    assert_eq!(good(&t, &[0x52, 1, 0, 0, 0, 1, 0, 0, 36, 0], 36)[27], 40);
    let caps = good(&t, &[0x5a, 0, 0x2a, 0, 0, 0, 0, 0, 64, 0], 64);
    assert_eq!((caps[8], caps[9], caps.len()), (0x2a, 28, 38));
}

#[test]
fn discs_change_while_the_guest_runs() {
    let d = tempfile::tempdir().expect("a directory");
    let t = ScsiDvd::new(None);
    assert_eq!(refused(&t, &READY), Sense::MEDIUM_NOT_PRESENT_CLOSED);
    assert_eq!(good(&t, &EVENTS, 8)[4..6], [0, 0]);
    t.insert(disc(&d, "a.iso", 4)).expect("inserts");
    assert_eq!(t.insert(disc(&d, "b.iso", 4)), Err(EjectError::Occupied));
    assert_eq!(good(&t, &EVENTS, 8)[4..6], [2, 2], "new media");
    assert_eq!(good(&t, &EVENTS, 8)[4..6], [0, 2], "told once");
    assert_eq!(refused(&t, &READY), Sense::MEDIUM_MAY_HAVE_CHANGED);
    good(&t, &READY, 0);
    // The guest locks the tray: neither it nor the host opens it, but the host's wish is told.
    good(&t, &[0x1e, 0, 0, 0, 1, 0], 0);
    assert_eq!(refused(&t, &[0x1b, 0, 0, 0, 2, 0]), Sense::MEDIUM_REMOVAL_PREVENTED);
    assert_eq!(t.eject(false).err(), Some(EjectError::Locked));
    assert_eq!(good(&t, &EVENTS, 8)[4], 1, "eject request");
    good(&t, &[0x1e, 0, 0, 0, 0, 0], 0);
    good(&t, &[0x1b, 0, 0, 0, 2, 0], 0);
    assert!(!t.has_medium());
    assert_eq!(good(&t, &EVENTS, 8)[4..6], [3, 1], "removed, tray open");
    assert_eq!(good(&t, &[0xbd, 0, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0], 8)[1], 0x10);
    assert_eq!(refused(&t, &READY), Sense::MEDIUM_NOT_PRESENT_OPEN);
    t.insert(disc(&d, "c.iso", 9)).expect("inserts");
    assert_eq!(refused(&t, &READY), Sense::MEDIUM_MAY_HAVE_CHANGED);
    assert_eq!(good(&t, &[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], 8)[3], 8);
    // A saved drive finds its disc gone.
    let state = t.save();
    let fresh = ScsiDvd::new(None);
    fresh.restore(state).expect("restores");
    assert_eq!(good(&fresh, &EVENTS, 8)[4], 3);
    assert!(t.eject(true).expect("ejects").is_some());
}
