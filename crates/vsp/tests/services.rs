//! Integration services against a fake guest: negotiation, requests and answers, refusals, silence, and lies.

use partition::GuestMemory;
use proptest::prelude::*;
use std::sync::Arc;
use std::time::Duration;
use viridian_vsp::SyntheticDevice;
use viridian_vsp::filecopy::{CopyOptions, FileCopy};
use viridian_vsp::heartbeat::{Heartbeat, Status};
use viridian_vsp::ic::ServiceError;
use viridian_vsp::kvp::{Kvp, Pool};
use viridian_vsp::shutdown::{Shutdown, ShutdownKind};
use viridian_vsp::timesync::TimeSync;
use viridian_vsp::vss::Vss;
use vmbus::VmBus;
use vmbus::protocol::Version;
use vmbus::protocol::ring::{PipeHeader, packet};
use vmbus::protocol::service::{MessageHeader, ServiceVersion, flags, kind, status};
use vmbus::testing::{Guest, Vsc, world_with};
use zerocopy::{FromBytes, IntoBytes};

fn world(device: Arc<dyn SyntheticDevice>) -> (VmBus, Guest, Vsc) {
    let memory = GuestMemory::with_ram(16 << 20, 0xc000_0000..1 << 32, false).unwrap();
    let (bus, mut guest) = world_with(memory);
    assert!(bus.offer(device));
    guest.connect(Version::V5_3);
    let offer = guest.offers()[0];
    let vsc = guest.open(&offer, 8);
    (bus, guest, vsc)
}

fn receive(guest: &Guest, vsc: &Vsc) -> (MessageHeader, Vec<u8>) {
    let (header, payload) = guest.receive(vsc);
    assert_eq!(header.kind, packet::IN_BAND);
    let (pipe, rest) = PipeHeader::read_from_prefix(&payload).unwrap();
    let (header, body) = MessageHeader::read_from_prefix(rest).unwrap();
    assert_eq!((pipe.kind, pipe.len as usize), (1, 20 + usize::from(header.size)));
    (header, body[..usize::from(header.size)].to_vec())
}

fn answer(guest: &Guest, vsc: &Vsc, mut header: MessageHeader, code: u32, body: &[u8]) {
    header.flags = flags::TRANSACTION | flags::RESPONSE;
    header.status = code;
    header.size = body.len() as u16;
    let pipe = PipeHeader { kind: 1, len: (20 + body.len()) as u32 };
    let bytes = [pipe.as_bytes(), header.as_bytes(), body].concat();
    assert!(guest.send(vsc, packet::IN_BAND, 0, 1, &[], &bytes));
}

/// Chooses the newest framework and service version that the host offers, as Linux does.
fn negotiate(guest: &Guest, vsc: &Vsc) -> ServiceVersion {
    let (header, body) = receive(guest, vsc);
    assert_eq!(header.kind, kind::NEGOTIATE);
    let half = |at: usize| u16::from_le_bytes([body[at], body[at + 1]]);
    let (frames, versions) = (usize::from(half(0)), usize::from(half(2)));
    let version = |i: usize| ServiceVersion { major: half(8 + i * 4), minor: half(10 + i * 4) };
    let (frame, newest) = (version(frames - 1), version(frames + versions - 1));
    let mut chosen = [1u16, 1, 0, 0].as_bytes().to_vec();
    chosen.extend(frame.as_bytes());
    chosen.extend(newest.as_bytes());
    answer(guest, vsc, header, status::OK, &chosen);
    newest
}

fn wait_until(mut f: impl FnMut() -> bool) {
    let end = std::time::Instant::now() + Duration::from_secs(60);
    while !f() {
        assert!(std::time::Instant::now() < end, "it did not happen");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn heartbeat_lives_and_ends_with_the_channel() {
    let heartbeat = Heartbeat::new();
    let (bus, guest, vsc) = world(heartbeat.clone());
    assert_eq!(heartbeat.status(), Status::NoContact);
    negotiate(&guest, &vsc);
    for _ in 0..2 {
        let (header, mut body) = receive(&guest, &vsc);
        let number = u64::from_le_bytes(body[..8].try_into().unwrap());
        body[..8].copy_from_slice(&(number + 1).to_le_bytes());
        answer(&guest, &vsc, header, status::OK, &body);
    }
    assert_eq!(heartbeat.status(), Status::Ok);
    bus.reset();
    assert_eq!(heartbeat.status(), Status::NoContact);
}

#[test]
fn shutdown_asks_and_hears_refusals() {
    let shutdown = Shutdown::new();
    let (_bus, guest, vsc) = world(shutdown.clone());
    assert_eq!(shutdown.request(ShutdownKind::PowerOff, false, ""), Err(ServiceError::NotConnected("shutdown")));
    negotiate(&guest, &vsc);
    wait_until(|| shutdown.is_connected());
    for (what, force, expected, code) in [
        (ShutdownKind::PowerOff, false, 0u32, status::OK),
        (ShutdownKind::Restart, true, 3, status::OK),
        (ShutdownKind::Hibernate, false, 4, status::FAIL),
    ] {
        let caller = shutdown.clone();
        let call = std::thread::spawn(move || caller.request(what, force, "bye"));
        let (header, body) = receive(&guest, &vsc);
        assert_eq!((header.kind, body.len()), (kind::SHUTDOWN, 12 + 2048));
        assert_eq!(u32::from_le_bytes(body[8..12].try_into().unwrap()), expected);
        assert_eq!(body[12..18], [b'b', 0, b'y', 0, b'e', 0]);
        answer(&guest, &vsc, header, code, &body);
        let result = call.join().unwrap();
        assert_eq!(result, if code == status::OK { Ok(()) } else { Err(ServiceError::Refused(code)) });
    }
}

#[test]
fn a_call_ends_when_the_channel_does() {
    let vss = Vss::new();
    let (bus, guest, vsc) = world(vss.clone());
    negotiate(&guest, &vsc);
    wait_until(|| vss.is_connected());
    let caller = vss.clone();
    let call = std::thread::spawn(move || caller.freeze());
    receive(&guest, &vsc);
    bus.reset();
    assert_eq!(call.join().unwrap(), Err(ServiceError::NotConnected("vss")));
}

#[test]
fn vss_checks_before_it_freezes() {
    let vss = Vss::new();
    let (_bus, guest, vsc) = world(vss.clone());
    negotiate(&guest, &vsc);
    wait_until(|| vss.is_connected());
    let caller = vss.clone();
    let call = std::thread::spawn(move || caller.freeze().and_then(|()| caller.thaw()));
    for operation in [2u8, 5, 6] {
        let (header, body) = receive(&guest, &vsc);
        assert_eq!((header.kind, body[0]), (kind::VSS, operation));
        answer(&guest, &vsc, header, status::OK, &body);
    }
    assert_eq!(call.join().unwrap(), Ok(()));
}

#[test]
fn time_samples() {
    let time = TimeSync::new(Box::new(|| 12345));
    let (_bus, guest, vsc) = world(time.clone());
    let version = negotiate(&guest, &vsc);
    assert_eq!(version, ServiceVersion { major: 4, minor: 0 });
    let (_, body) = receive(&guest, &vsc);
    let word = |at: usize| u64::from_le_bytes(body[at..at + 8].try_into().unwrap());
    let unix = (word(0) - 116_444_736_000_000_000) / 10_000_000;
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    assert!(now.abs_diff(unix) <= 2);
    assert_eq!((word(8), body[16], body.len()), (12345, 1, 22), "the first sample sets the clock");
    // After a pause the clock is to be set again, at once.
    time.started();
    assert_eq!(receive(&guest, &vsc).1[16], 1);
}

#[test]
fn kvp_both_ways() {
    let kvp = Kvp::new();
    let (_bus, guest, vsc) = world(kvp.clone());
    negotiate(&guest, &vsc);
    wait_until(|| kvp.is_connected());
    let utf16 = |text: &str| text.encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<u8>>();
    let caller = kvp.clone();
    let call = std::thread::spawn(move || caller.set("größe", "7"));
    let (header, body) = receive(&guest, &vsc);
    assert_eq!((body[0], body[1]), (1, 0));
    assert_eq!(body[16..26], utf16("größe")[..]);
    assert_eq!(u32::from_le_bytes(body[8..12].try_into().unwrap()), 12, "with the final zero");
    answer(&guest, &vsc, header, status::OK, &body);
    assert_eq!(call.join().unwrap(), Ok(()));
    assert!(matches!(kvp.set(&"x".repeat(256), ""), Err(ServiceError::Host(_))));

    let caller = kvp.clone();
    let call = std::thread::spawn(move || caller.pairs(Pool::Auto));
    for (n, (key, value)) in [("OSName", "Debian"), ("é", "")].into_iter().enumerate() {
        let (header, mut body) = receive(&guest, &vsc);
        assert_eq!((body[0], body[1], body[4]), (3, 2, n as u8));
        let (k, v) = (utf16(key), utf16(value));
        body[8..20].copy_from_slice([1u32, k.len() as u32 + 2, v.len() as u32 + 2].as_bytes());
        body[20..20 + k.len()].copy_from_slice(&k);
        body[532..532 + v.len()].copy_from_slice(&v);
        answer(&guest, &vsc, header, status::OK, &body);
    }
    let (header, body) = receive(&guest, &vsc);
    answer(&guest, &vsc, header, status::NO_MORE, &body);
    let expected = vec![("OSName".to_string(), "Debian".to_string()), ("é".into(), String::new())];
    assert_eq!(call.join().unwrap(), Ok(expected));
}

#[test]
fn a_file_arrives_in_fragments() {
    let copy = FileCopy::new();
    let (_bus, guest, vsc) = world(copy.device());
    negotiate(&guest, &vsc);
    wait_until(|| copy.is_connected());
    let data: Vec<u8> = (0..20_000u32).map(|n| (n * 3) as u8).collect();
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &data).unwrap();
    let (caller, source, size) = (copy.clone(), file.reopen().unwrap(), data.len() as u64);
    let call = std::thread::spawn(move || {
        let mut seen = 0;
        let options = CopyOptions { overwrite: true, create_path: true };
        caller.copy(source, size, "/tmp", "f", options, &mut |n| seen = n).map(|()| seen)
    });
    let (mut got, mut operations) = (vec![0; data.len()], Vec::new());
    loop {
        let (header, body) = receive(&guest, &vsc);
        operations.push(body[0]);
        if body[0] == 1 {
            let at = u64::from_le_bytes(body[40..48].try_into().unwrap()) as usize;
            let len = u32::from_le_bytes(body[48..52].try_into().unwrap()) as usize;
            got[at..at + len].copy_from_slice(&body[52..52 + len]);
        }
        answer(&guest, &vsc, header, status::OK, &[]);
        if body[0] == 2 {
            break;
        }
    }
    assert_eq!(operations, [0, 1, 1, 1, 1, 2]);
    assert_eq!(got, data);
    assert_eq!(call.join().unwrap(), Ok(20_000));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn no_answer_breaks_a_service(
        answers in prop::collection::vec((0u16..9, 0u8..8, any::<u32>(), prop::collection::vec(any::<u8>(), 0..120)), 1..20),
    ) {
        let (kvp, heartbeat) = (Kvp::new(), Heartbeat::new());
        for device in [kvp.clone() as Arc<dyn SyntheticDevice>, heartbeat.clone()] {
            let (bus, guest, vsc) = world(device);
            let (mut header, _) = receive(&guest, &vsc);
            for (kind, flags, size, body) in &answers {
                header.kind = *kind;
                header.flags = *flags;
                header.size = *size as u16;
                header.transaction_id = *size as u8;
                let bytes = [[*size % 3, 9].as_bytes(), header.as_bytes(), body].concat();
                guest.send(&vsc, packet::IN_BAND, 0, 1, &[], &bytes);
                while guest.try_receive(&vsc).is_some() {}
            }
            bus.pause();
            bus.resume();
            prop_assert_eq!(bus.open_channels(), 1);
        }
    }
}
