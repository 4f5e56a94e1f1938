//! Quality of service.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use super::dir;
use crate::{CreateOptions, Disk, DiskType, Format, IoBuffer, OpenOptions, Qos, RequestKind, create};

fn disk(at: &std::path::Path) -> Disk {
    let o = CreateOptions { format: Format::Raw, disk_type: DiskType::Fixed, ..CreateOptions::dynamic_vhdx(1 << 20) };
    create(at, &o).expect("creates");
    Disk::open(at, &OpenOptions { write: true, ..OpenOptions::default() }).expect("opens")
}

/// Reads `count` times `len` bytes, all submitted at once; how long it took.
fn reads(disk: &Disk, count: usize, len: usize) -> Duration {
    let (tx, rx) = mpsc::channel();
    let started = Instant::now();
    for _ in 0..count {
        let tx = tx.clone();
        let buffer = Some(IoBuffer::aligned(len));
        disk.submit(RequestKind::Read, 0, len as u64, buffer, Box::new(move |c| tx.send(c.result).expect("waits")));
    }
    for _ in 0..count {
        rx.recv().expect("ends").expect("reads");
    }
    started.elapsed()
}

#[test]
fn the_maximum_is_kept_in_units_of_8_kib() {
    let (_d, at) = dir();
    let disk = disk(&at("a.img"));
    disk.set_qos(Qos { maximum: Some(200), minimum: None }).expect("sets");
    // 100 operations at 200 a second, less the burst of 0.1 s.
    let small = reads(&disk, 100, 4096);
    assert!(small > Duration::from_millis(350), "{small:?}");
    std::thread::sleep(Duration::from_millis(150));
    // 20 requests of 40 KiB are 100 operations.
    let large = reads(&disk, 20, 40960);
    assert!(large > Duration::from_millis(350), "{large:?}");
    // Without limits again, and with requests waiting when the limit goes. With it they would take 20 seconds.
    let (tx, rx) = mpsc::channel();
    for _ in 0..4000 {
        let tx = tx.clone();
        let buffer = Some(IoBuffer::aligned(8192));
        disk.submit(RequestKind::Read, 0, 8192, buffer, Box::new(move |c| tx.send(c.result).expect("waits")));
    }
    let started = Instant::now();
    disk.set_qos(Qos::default()).expect("sets");
    for _ in 0..4000 {
        rx.recv().expect("ends").expect("reads");
    }
    assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
    assert!(disk.set_qos(Qos { maximum: Some(0), minimum: None }).is_err());
}

#[test]
fn closing_lets_waiting_requests_end() {
    let (_d, at) = dir();
    let disk = disk(&at("a.img"));
    disk.set_qos(Qos { maximum: Some(1), minimum: None }).expect("sets");
    let ended = Arc::new(AtomicU32::new(0));
    for _ in 0..20 {
        let ended = ended.clone();
        let done = Box::new(move |_| {
            ended.fetch_add(1, Ordering::SeqCst);
        });
        disk.submit(RequestKind::Read, 0, 512, Some(IoBuffer::aligned(512)), done);
    }
    disk.close().expect("closes");
    assert_eq!(ended.load(Ordering::SeqCst), 20);
}
