//! Hostile guests for as long as one likes: mutated VMBus messages, ring contents, storvsp packets with their SCSI
//! commands, and answers of services. Nothing panics, the bus serves a well-behaved guest afterwards, and the process
//! does not grow.
//!
//! Each target runs for 6 s, or `VIRIDIAN_FUZZ_SECONDS`; see the crate `fuzzing`. docs/hyperv.md says how to run an hour.

use fuzzing::rounds;
use partition::GuestMemory;
use scsi::{DiskConfig, ScsiDisk, ScsiDvd};
use std::sync::Arc;
use std::time::Duration;
use vhd::{CreateOptions, Disk, OpenOptions};
use viridian_vsp::SyntheticDevice;
use viridian_vsp::filecopy::{CopyOptions, FileCopy};
use viridian_vsp::heartbeat::Heartbeat;
use viridian_vsp::keyboard::Keyboard;
use viridian_vsp::kvp::{Kvp, Pool};
use viridian_vsp::shutdown::{Shutdown, ShutdownKind};
use viridian_vsp::storage::{StorageController, Unit};
use viridian_vsp::timesync::TimeSync;
use viridian_vsp::vss::Vss;
use vmbus::VmBus;
use vmbus::protocol::message::{Header, Offer, kind};
use vmbus::protocol::ring::{PipeHeader, control, packet};
use vmbus::protocol::service::{MessageHeader, flags};
use vmbus::protocol::storage::{ScsiRequest, operation, srb, version};
use vmbus::protocol::{Version, service};
use vmbus::testing::{Guest, Vsc, world_with};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

/// How long each target runs by default.
const TIME: Duration = Duration::from_secs(6);

/// All devices on one bus.
struct World {
    bus: VmBus,
    guest: Guest,
    kvp: Arc<Kvp>,
    vss: Arc<Vss>,
    shutdown: Arc<Shutdown>,
    copy: Arc<FileCopy>,
    _dir: tempfile::TempDir,
}

fn world() -> World {
    // In memory where that can be had: each round makes an image, and no disk should wait for that.
    let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    let path = dir.path().join("disk.vhdx");
    vhd::create(&path, &CreateOptions { block_size: 1 << 20, ..CreateOptions::dynamic_vhdx(16 << 20) }).unwrap();
    let disk = Disk::open(&path, &OpenOptions { write: true, ..OpenOptions::default() }).unwrap();
    let controller = StorageController::new(0, 4);
    controller.attach(0, Unit::Disk(Arc::new(ScsiDisk::new(Arc::new(disk), DiskConfig::default())))).unwrap();
    controller.attach(3, Unit::Dvd(Arc::new(ScsiDvd::new(None)))).unwrap();
    let (kvp, vss, shutdown, copy) = (Kvp::new(), Vss::new(), Shutdown::new(), FileCopy::new());
    let devices: [Arc<dyn SyntheticDevice>; 8] = [
        controller,
        kvp.clone(),
        vss.clone(),
        shutdown.clone(),
        copy.device(),
        Heartbeat::new(),
        TimeSync::new(Box::new(|| 7)),
        Keyboard::new(),
    ];
    let memory = GuestMemory::with_ram(16 << 20, 0xc000_0000..1 << 32, false).unwrap();
    let (bus, guest) = world_with(memory);
    for device in devices {
        assert!(bus.offer(device));
    }
    World { bus, guest, kvp, vss, shutdown, copy, _dir: dir }
}

/// A guest that starts anew is served: whatever happened before is forgotten.
fn still_serves(w: &mut World) {
    w.bus.reset();
    w.guest.synic.wires.lock().unwrap().messages.clear();
    assert_eq!(w.guest.connect(Version::V5_3), 1, "the bus does not answer any more");
    let offers = w.guest.offers();
    assert_eq!(offers.len(), 8);
    let storage = offers.iter().find(|o| { o.class } == vmbus::protocol::class::SCSI).unwrap();
    let vsc = w.guest.open(storage, 4);
    let begin = [operation::BEGIN_INITIALIZATION, 1, 0].as_bytes().to_vec();
    assert!(w.guest.send(&vsc, packet::IN_BAND, 1, 1, &[], &[begin, vec![0; 52]].concat()));
    w.guest.receive(&vsc);
}

fn negotiate_storage(w: &World, vsc: &Vsc) {
    for (op, payload) in [
        (operation::BEGIN_INITIALIZATION, 0u16),
        (operation::QUERY_PROTOCOL_VERSION, version::V6_2),
        (operation::QUERY_PROPERTIES, 0),
        (operation::END_INITIALIZATION, 0),
    ] {
        let mut bytes = [op, 1, 0].as_bytes().to_vec();
        bytes.extend(payload.to_le_bytes());
        bytes.resize(64, 0);
        assert!(w.guest.send(vsc, packet::IN_BAND, 1, 1, &[], &bytes));
        w.guest.receive(vsc);
    }
}

#[test]
fn vmbus_messages() {
    rounds("vmbus messages", TIME, |rng| {
        let mut w = world();
        w.guest.connect(rng.pick(&[Version::V5_3, Version::V4_1, Version::V3_0, Version::V1_1]));
        let relids: Vec<u32> = w.guest.offers().iter().map(|o| o.relid).collect();
        let mut gpadls = vec![1u32];
        for _ in 0..200 {
            let relid = if rng.one_in(6) { rng.odd() as u32 } else { rng.pick(&relids) };
            let gpadl = if rng.one_in(6) { rng.odd() as u32 } else { rng.pick(&gpadls) };
            let mut message = Header::new(0).as_bytes().to_vec();
            let kinds = [
                kind::REQUEST_OFFERS,
                kind::OPEN,
                kind::CLOSE,
                kind::GPADL_HEADER,
                kind::GPADL_HEADER,
                kind::GPADL_BODY,
                kind::GPADL_TEARDOWN,
                kind::RELID_RELEASED,
                kind::INITIATE_CONTACT,
                kind::UNLOAD,
                kind::TL_CONNECT_REQUEST,
                kind::MODIFY,
            ];
            let kind = if rng.one_in(20) { rng.odd() as u32 } else { rng.pick(&kinds) };
            message[..4].copy_from_slice(&kind.to_le_bytes());
            match kind {
                kind::OPEN => {
                    message.extend([relid, 99, gpadl, rng.below(3) as u32, rng.below(9) as u32].as_bytes());
                    message.resize(148, 0);
                }
                kind::GPADL_HEADER => {
                    let gpadl = 0x100 + rng.below(40) as u32;
                    gpadls.push(gpadl);
                    let (pages, here) = (1 + rng.below(60), rng.below(27));
                    let bytes = 8 + pages * 8;
                    message.extend([relid, gpadl].as_bytes());
                    message.extend([bytes as u16, 1].as_bytes());
                    message.extend([(pages * 4096) as u32, 0].as_bytes());
                    (0..pages.min(here)).for_each(|p| message.extend((0x200 + p + rng.below(2)).to_le_bytes()));
                }
                kind::GPADL_BODY => {
                    message.extend([rng.below(3) as u32, gpadl].as_bytes());
                    (0..rng.below(29)).for_each(|p| message.extend((0x300 + p).to_le_bytes()));
                }
                kind::GPADL_TEARDOWN => message.extend([relid, gpadl].as_bytes()),
                kind::INITIATE_CONTACT => {
                    let any = rng.next() as u32;
                    let version = rng.pick(&[Version::V5_3.0, Version::V4_0.0, 13, any]);
                    message.extend([version, rng.below(3) as u32].as_bytes());
                    message.extend([2u64, 0x2000, 0x3000].as_bytes());
                }
                _ => message.extend([relid, rng.below(3) as u32, 0, 0, 0, 0, 0, 0].as_bytes()),
            }
            if rng.one_in(3) {
                rng.damage(&mut message);
            }
            message.truncate(240);
            w.guest.post_bytes(&message);
            if rng.one_in(16) {
                w.guest.synic.wires.lock().unwrap().messages.clear();
            }
        }
        still_serves(&mut w);
    });
}

#[test]
fn ring_contents() {
    rounds("ring contents", TIME, |rng| {
        let mut w = world();
        w.guest.connect(Version::V5_3);
        let offers: Vec<Offer> = w.guest.offers();
        for offer in &offers {
            let vsc = w.guest.open(offer, 2 + rng.below(4));
            let size = ((vsc.pages - 1) * 4096) as u32;
            for _ in 0..30 {
                let at = w.guest.load(&vsc, false, control::WRITE_INDEX) % size;
                let mut bytes = Vec::new();
                for _ in 0..1 + rng.below(4) {
                    let len = 16 + rng.below(12) * 8;
                    // Type, data offset, length (in units of 8), flags, transaction.
                    let kind = rng.pick(&[packet::IN_BAND, packet::GPA_DIRECT, packet::COMPLETION, 7, 9]);
                    let offset = if kind == packet::GPA_DIRECT { 5 } else { 2 };
                    let mut one = [kind, offset, (len / 8) as u16, 1].as_bytes().to_vec();
                    one.extend(rng.next().to_le_bytes());
                    one.extend(rng.bytes(len as usize - 16));
                    rng.damage(&mut one);
                    bytes.extend(one);
                    bytes.extend((u64::from(at) << 32).to_le_bytes());
                }
                bytes.resize(bytes.len().next_multiple_of(8), 0);
                w.guest.copy(&vsc, at, &bytes);
                let end = if rng.one_in(12) { rng.odd() as u32 } else { (at + bytes.len() as u32) % size };
                w.guest.store(&vsc, false, control::WRITE_INDEX, end);
                if rng.one_in(20) {
                    let field = rng.below(20) * 4;
                    let (down, value) = (rng.one_in(2), rng.odd() as u32);
                    w.guest.store(&vsc, down, field, value);
                }
                w.guest.signal(vsc.connection);
                // What the host has sent counts as read, so that its answers go on.
                let sent = w.guest.load(&vsc, true, control::WRITE_INDEX);
                w.guest.store(&vsc, true, control::READ_INDEX, sent);
            }
        }
        still_serves(&mut w);
    });
}

#[test]
fn storage_packets() {
    let known = [
        0x00u8, 0x03, 0x08, 0x0a, 0x12, 0x15, 0x1a, 0x1b, 0x1e, 0x25, 0x28, 0x2a, 0x2e, 0x2f, 0x35, 0x41, 0x42, 0x43,
        0x46, 0x4a, 0x51, 0x55, 0x5a, 0x5e, 0x5f, 0x88, 0x8a, 0x91, 0x93, 0x9e, 0xa0, 0xa3, 0xa8, 0xbe,
    ];
    rounds("storage packets", TIME, |rng| {
        let mut w = world();
        w.guest.connect(Version::V5_3);
        let offers = w.guest.offers();
        let storage = *offers.iter().find(|o| { o.class } == vmbus::protocol::class::SCSI).unwrap();
        let vsc = w.guest.open(&storage, 8);
        negotiate_storage(&w, &vsc);
        for _ in 0..150 {
            let mut request = ScsiRequest::new_zeroed();
            request.length = size_of::<ScsiRequest>() as u16;
            request.lun = rng.pick(&[0, 0, 0, 3, 1, 63, 255]);
            request.cdb_length = rng.pick(&[6, 10, 12, 16, 16, 0, 20]);
            request.data_in = rng.pick(&[srb::DATA_OUT, 1, srb::DATA_UNKNOWN]);
            let len = rng.pick(&[0u64, 8, 36, 252, 512, 4096, 65536, 262_144]);
            request.transfer_length = if rng.one_in(10) { rng.odd() as u32 } else { len as u32 };
            for byte in &mut request.cdb_or_sense {
                *byte = if rng.one_in(4) { rng.next() as u8 } else { rng.below(3) as u8 };
            }
            request.cdb_or_sense[0] = if rng.one_in(12) { rng.next() as u8 } else { rng.pick(&known) };
            let op = if rng.one_in(10) { rng.below(16) as u32 } else { operation::EXECUTE_SRB };
            let mut bytes = [op, 1, 0].as_bytes().to_vec();
            bytes.extend(request.as_bytes());
            if rng.one_in(4) {
                rng.damage(&mut bytes);
            }
            let offset = if rng.one_in(4) { rng.below(4096) } else { 0 };
            let mut extra = [0u32, 1, len as u32, offset as u32].as_bytes().to_vec();
            for page in 0..(len + offset).div_ceil(4096) {
                let page = if rng.one_in(50) { rng.odd() } else { 0x400 + page };
                extra.extend(page.to_le_bytes());
            }
            let direct = len != 0;
            let kind = if direct { packet::GPA_DIRECT } else { packet::IN_BAND };
            w.guest.send(&vsc, kind, rng.below(2) as u16, rng.next(), if direct { &extra } else { &[] }, &bytes);
            // The guest may have had a disk's contents written over its own rings: so it does not look at them.
            w.guest.drain(&vsc);
        }
        still_serves(&mut w);
    });
}

/// A service's message as the guest frames it.
fn framed(header: MessageHeader, body: &[u8]) -> Vec<u8> {
    let pipe = PipeHeader { kind: 1, len: (size_of::<MessageHeader>() + body.len()) as u32 };
    [pipe.as_bytes(), header.as_bytes(), body].concat()
}

#[test]
fn service_messages() {
    rounds("service messages", TIME, |rng| {
        let mut w = world();
        w.guest.connect(Version::V5_3);
        let offers = w.guest.offers();
        let services: Vec<Offer> = offers.into_iter().filter(|o| { o.class } != vmbus::protocol::class::SCSI).collect();
        let channels: Vec<Vsc> = services.iter().map(|offer| w.guest.open(offer, 8)).collect();
        let file = tempfile::tempfile().unwrap();
        file.set_len(20_000).unwrap();
        let calls = [
            {
                let s = w.kvp.clone();
                std::thread::spawn(move || drop(s.pairs(Pool::Auto)))
            },
            {
                let s = w.kvp.clone();
                std::thread::spawn(move || drop(s.set("key", "value")))
            },
            {
                let s = w.vss.clone();
                std::thread::spawn(move || drop((s.freeze(), s.thaw())))
            },
            {
                let s = w.shutdown.clone();
                std::thread::spawn(move || drop(s.request(ShutdownKind::Restart, true, "x")))
            },
            {
                let s = w.copy.clone();
                std::thread::spawn(move || drop(s.copy(file, 20_000, "/d", "n", CopyOptions::default(), &mut |_| {})))
            },
        ];
        for turn in 0..60 {
            for vsc in &channels {
                let Some((_, payload)) = w.guest.try_receive(vsc) else {
                    if rng.one_in(8) {
                        let mut bytes = framed(MessageHeader::new_zeroed(), &[0; 40]);
                        rng.damage(&mut bytes);
                        w.guest.send(vsc, packet::IN_BAND, 0, rng.next(), &[], &bytes);
                    }
                    continue;
                };
                let Ok((_, rest)) = PipeHeader::read_from_prefix(&payload) else { continue };
                let Ok((mut header, body)) = MessageHeader::read_from_prefix(rest) else { continue };
                let mut body = body[..usize::from(header.size).min(body.len())].to_vec();
                header.flags = flags::TRANSACTION | flags::RESPONSE;
                if header.kind == service::kind::NEGOTIATE && body.len() >= 8 && !rng.one_in(10) {
                    // One framework, one version: the last of each, as Linux chooses.
                    let half = |at: usize| usize::from(u16::from_le_bytes([body[at], body[at + 1]]));
                    let (frames, versions) = (half(0), half(2));
                    let at = |i: usize| body.get(8 + i * 4..12 + i * 4).unwrap_or(&[0; 4]).to_vec();
                    let chosen = [at(frames.saturating_sub(1)), at((frames + versions).saturating_sub(1))].concat();
                    body = [[1u16, 1, 0, 0].as_bytes(), &chosen].concat();
                } else if rng.one_in(2) {
                    rng.damage(&mut body);
                    let any = rng.next() as u32;
                    header.status = rng.pick(&[0, 0, 0x8000_4005, any]);
                }
                header.size = body.len() as u16;
                let mut bytes = framed(header, &body);
                if rng.one_in(6) {
                    rng.damage(&mut bytes);
                }
                w.guest.send(vsc, packet::IN_BAND, 0, 1, &[], &bytes);
            }
            if turn % 8 == 0 {
                std::thread::sleep(Duration::from_micros(300));
            }
        }
        // Closing the channels ends the host's calls that still wait.
        still_serves(&mut w);
        for call in calls {
            call.join().expect("a call of the host panicked");
        }
    });
}
