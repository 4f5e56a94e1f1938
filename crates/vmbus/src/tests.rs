//! A guest that negotiates, opens, exchanges, and lies.

use crate::bus::*;
use crate::channel::*;
use crate::server::{OfferKey, OfferParams};
use crate::testing::*;
use partition::{Gpa, GuestMemory};
use proptest::prelude::*;
use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vmbus_protocol::message::{self as msg, Header, kind};
use vmbus_protocol::ring::{control, packet};
use vmbus_protocol::{Guid, USER_DATA, Version};
use zerocopy::IntoBytes;

const CLASS: Guid = Guid::new(1, 2, 3, 4);

/// Answers every packet: completions for those that want one, otherwise the same in-band. With "sub" as the payload it
/// offers two sub-channels.
struct Echo {
    instance: Guid,
    threads: Mutex<HashMap<u16, JoinHandle<()>>>,
    channels: Mutex<HashMap<u16, Arc<Channel>>>,
}

impl Echo {
    fn new(n: u32) -> Arc<Self> {
        Arc::new(Self { instance: Guid::new(n, 0, 0, 0), threads: Mutex::default(), channels: Mutex::default() })
    }
    fn channel(&self, sub: u16) -> Arc<Channel> {
        self.channels.lock().unwrap()[&sub].clone()
    }
}

impl ChannelDevice for Echo {
    fn offer(&self) -> OfferParams {
        OfferParams {
            key: OfferKey { class: CLASS, instance: self.instance, sub_channel: 0 },
            flags: 0,
            mmio_megabytes: 0,
            user_data: [7; USER_DATA],
            monitored: true,
        }
    }
    fn opened(&self, channel: Arc<Channel>) -> Result<(), OpenRefused> {
        let sub = channel.sub_channel();
        self.channels.lock().unwrap().insert(sub, channel.clone());
        let thread = std::thread::spawn(move || {
            loop {
                match channel.next(None) {
                    Next::Packet(p) if p.payload.starts_with(b"sub") => channel.offer_sub_channels(2),
                    Next::Packet(p) => {
                        let mut answer = p.payload.clone();
                        for range in &p.ranges {
                            let mut bytes = vec![0; range.len as usize];
                            // A buffer that is not memory is answered with nothing.
                            if range.read(channel.memory(), 0, &mut bytes).is_ok() {
                                answer.extend(bytes);
                            }
                        }
                        let kind = if p.wants_completion { packet::COMPLETION } else { packet::IN_BAND };
                        let _ = channel.send(kind, 0, p.transaction_id, &answer);
                    }
                    Next::Woken => {
                        let _ = channel.send_in_band(0, b"woken!!!");
                    }
                    Next::Timeout => {}
                    Next::Closed => return,
                }
            }
        });
        self.threads.lock().unwrap().insert(sub, thread);
        Ok(())
    }
    fn closed(&self, sub: u16) {
        self.channels.lock().unwrap().remove(&sub);
        self.threads.lock().unwrap().remove(&sub).unwrap().join().unwrap();
    }
}

#[test]
fn every_version_negotiates() {
    for version in Version::ALL {
        let (bus, guest) = world();
        assert!(bus.offer(Echo::new(1)));
        assert_eq!(guest.connect(Version(6 << 16)), 0, "a version from the future is refused");
        assert_eq!(guest.connect(version), 1);
        assert_eq!(bus.version(), Some(version));
        let offers = guest.offers();
        assert_eq!(offers.len(), 1);
        assert_eq!(({ offers[0].class }, { offers[0].instance }), (CLASS, Guid::new(1, 0, 0, 0)));
        assert_eq!({ offers[0].dedicated_interrupt }, u16::from(version >= Version::V1_1));
        assert_eq!({ offers[0].user_data }, [7; USER_DATA]);
        assert!(!bus.offer(Echo::new(1)), "the same device twice");
    }
}

#[test]
fn exchange_on_old_and_new_versions() {
    for version in [Version::V0_13, Version::V1_1, Version::V3_0, Version::V5_3] {
        let (bus, mut guest) = world();
        bus.offer(Echo::new(1));
        guest.connect(version);
        let offer = guest.offers()[0];
        let vsc = guest.open(&offer, 4);
        for n in 0..500u64 {
            let payload = vec![n as u8; (n % 700) as usize];
            if version < Version::V1_1 {
                // The interrupt page says which channel.
                let word = Gpa(0x1000 + 2048 + u64::from(vsc.relid / 64 * 8));
                guest.memory.fetch_or_u64(word, 1 << (vsc.relid % 64)).unwrap();
            }
            assert!(guest.send(&vsc, packet::IN_BAND, (n % 2) as u16, n, &[], &payload));
            let (header, answer) = guest.receive(&vsc);
            let kind = if n % 2 == 1 { packet::COMPLETION } else { packet::IN_BAND };
            assert_eq!((header.kind, header.transaction_id), (kind, n));
            assert_eq!(answer[..payload.len()], payload);
        }
        let expected = if version < Version::V2_4 { (0, 2, 0) } else { (0, 2, vsc.relid as u16) };
        let events = guest.take_events();
        assert!(!events.is_empty() && events.iter().all(|e| *e == expected), "{version}: {:?}", events.first());
        if version < Version::V2_4 {
            let mut flags = [0];
            guest.memory.read(Gpa(0x1000), &mut flags).unwrap();
            assert_eq!(flags[0], 1 << vsc.relid);
        }
    }
}

#[test]
fn gpa_direct_buffers() {
    let (bus, mut guest) = world();
    bus.offer(Echo::new(1));
    guest.connect(Version::V5_3);
    let offer = guest.offers()[0];
    let vsc = guest.open(&offer, 4);
    // 100 bytes over a page boundary, in pages that are not contiguous.
    guest.memory.fill(Gpa(0x50_0000 + 4060), 0x11, 36).unwrap();
    guest.memory.fill(Gpa(0x60_0000), 0x22, 64).unwrap();
    let extra = |len: u32, offset: u32, pages: &[u64]| {
        let mut bytes = [0u32, 1, len, offset].as_bytes().to_vec();
        bytes.extend(pages.as_bytes());
        bytes
    };
    assert!(guest.send(&vsc, packet::GPA_DIRECT, 1, 5, &extra(100, 4060, &[0x500, 0x600]), b"12345678"));
    let (_, answer) = guest.receive(&vsc);
    assert_eq!(answer[..108], [b"12345678".as_slice(), &[0x11; 36], &[0x22; 64]].concat());
    // Pages that do not exist.
    assert!(guest.send(&vsc, packet::GPA_DIRECT, 1, 6, &extra(8, 0, &[u64::MAX]), b"12345678"));
    assert_eq!(guest.receive(&vsc).1, b"12345678");
    // Too few pages for the length: the channel is lost, and only that.
    assert!(guest.send(&vsc, packet::GPA_DIRECT, 1, 7, &extra(5000, 0, &[0x500]), b"12345678"));
    wait_until(|| bus.open_channels() == 0);
    assert_eq!(bus.version(), Some(Version::V5_3));
}

fn wait_until(mut f: impl FnMut() -> bool) {
    let end = Instant::now() + WAIT;
    while !f() {
        assert!(Instant::now() < end, "it did not happen");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_full_ring_loses_nothing() {
    let (bus, mut guest) = world();
    bus.offer(Echo::new(1));
    guest.connect(Version::V5_3);
    let offer = guest.offers()[0];
    // One page of data each way.
    let vsc = guest.open(&offer, 2);
    let (mut sent, mut received) = (0u64, 0u64);
    let end = Instant::now() + WAIT;
    while received < 2000 {
        let f = |down, field| guest.load(&vsc, down, field);
        assert!(
            Instant::now() < end,
            "stuck after {received} of {sent}; up: {:?}, down: {:?}, {} channels",
            [f(false, 0), f(false, 4), f(false, 8), f(false, 12)],
            [f(true, 0), f(true, 4), f(true, 8), f(true, 12)],
            bus.open_channels(),
        );
        // Write until the ring towards the host is full: the host's answers do not fit theirs either.
        while sent < 2000 && guest.send(&vsc, packet::IN_BAND, 1, sent, &[], &[sent as u8; 300]) {
            sent += 1;
        }
        std::thread::sleep(Duration::from_micros(200));
        while let Some((header, payload)) = guest.try_receive(&vsc) {
            assert_eq!(header.transaction_id, received);
            assert_eq!(payload[..300], [received as u8; 300]);
            received += 1;
        }
    }
}

#[test]
fn liars_lose_their_channel() {
    type Lie = fn(&Guest, &Vsc);
    let lies: [(&str, Lie); 7] = [
        ("write index beyond the ring", |g, v| g.store(v, false, control::WRITE_INDEX, 0x10_0000)),
        ("unaligned write index", |g, v| g.store(v, false, control::WRITE_INDEX, 37)),
        ("less than a header", |g, v| g.store(v, false, control::WRITE_INDEX, 8)),
        ("a packet of length zero", |g, v| g.store(v, false, control::WRITE_INDEX, 64)),
        ("a packet longer than what was written", |g, v| {
            g.copy(v, 0, &[6, 0, 2, 0, 0xff, 0xff, 0, 0]);
            g.store(v, false, control::WRITE_INDEX, 64);
        }),
        ("payload behind the end", |g, v| {
            g.copy(v, 0, &[6, 0, 9, 0, 3, 0, 0, 0]);
            g.store(v, false, control::WRITE_INDEX, 64);
        }),
        ("read index of the other ring", |g, v| {
            g.store(v, true, control::READ_INDEX, 0xffff_fff8);
            g.send(v, packet::IN_BAND, 1, 1, &[], b"12345678");
        }),
    ];
    for (lie, tell) in lies {
        let (bus, mut guest) = world();
        bus.offer(Echo::new(1));
        bus.offer(Echo::new(2));
        guest.connect(Version::V5_3);
        let offers = guest.offers();
        let (liar, honest) = (guest.open(&offers[0], 4), guest.open(&offers[1], 4));
        tell(&guest, &liar);
        guest.signal(liar.connection);
        let end = Instant::now() + WAIT;
        while bus.open_channels() != 1 {
            assert!(Instant::now() < end, "{lie}: not noticed");
            std::thread::sleep(Duration::from_millis(1));
        }
        guest.send(&honest, packet::IN_BAND, 1, 5, &[], b"12345678");
        assert_eq!(guest.receive(&honest).1, b"12345678", "{lie}: the other channel goes on");
        // It may start again.
        let again = guest.open(&offers[0], 4);
        guest.send(&again, packet::IN_BAND, 1, 6, &[], b"again   ");
        assert_eq!(guest.receive(&again).1, b"again   ");
    }
}

#[test]
fn gpadls_large_wrong_and_in_use() {
    let (bus, mut guest) = world();
    bus.offer(Echo::new(1));
    guest.connect(Version::V5_3);
    let offer = guest.offers()[0];
    assert_eq!(guest.gpadl(offer.relid, 0x400, 2000).1, 0, "many parts");
    assert_ne!(guest.gpadl(77, 0x400, 1).1, 0, "no such channel");
    let small = guest.gpadl(offer.relid, 0x400, 3).0;
    assert_ne!(guest.open_raw(offer.relid, small, 2, 0), 0, "one page for a ring");
    let ring = guest.gpadl(offer.relid, 0x800, 8).0;
    assert_ne!(guest.open_raw(offer.relid, ring, 7, 0), 0);
    assert_ne!(guest.open_raw(offer.relid, ring, 1, 0), 0);
    assert_ne!(guest.open_raw(offer.relid, ring, 4, 9), 0, "no such VP");
    assert_ne!(guest.open_raw(offer.relid, 0x1234, 4, 0), 0, "no such GPADL");
    assert_eq!(guest.open_raw(offer.relid, ring, 4, 1), 0);
    assert_ne!(guest.open_raw(offer.relid, ring, 4, 1), 0, "it is open");
    let teardown = |gpadl| msg::GpadlTeardown { header: Header::new(kind::GPADL_TEARDOWN), relid: offer.relid, gpadl };
    guest.post(&teardown(ring));
    bus.settle();
    assert!(guest.synic.wires.lock().unwrap().messages.is_empty(), "it is in use: no answer yet");
    guest.post(&msg::Relid { header: Header::new(kind::CLOSE), relid: offer.relid });
    assert_eq!({ guest.expect::<msg::GpadlTorndown>(kind::GPADL_TORNDOWN).gpadl }, ring);
    guest.post(&teardown(small));
    assert_eq!({ guest.expect::<msg::GpadlTorndown>(kind::GPADL_TORNDOWN).gpadl }, small);
    guest.post(&teardown(0x9999));
    guest.expect::<msg::GpadlTorndown>(kind::GPADL_TORNDOWN);
}

#[test]
fn hot_add_remove_and_release() {
    let (bus, mut guest) = world();
    guest.connect(Version::V4_0);
    assert!(guest.offers().is_empty());
    bus.offer(Echo::new(1));
    let offer: msg::Offer = guest.expect(kind::OFFER);
    let vsc = guest.open(&offer, 4);
    bus.rescind(CLASS, Guid::new(1, 0, 0, 0));
    assert_eq!({ guest.expect::<msg::Relid>(kind::RESCIND).relid }, vsc.relid);
    assert_eq!(bus.open_channels(), 0);
    // Until the guest lets go of the number, it is not used again.
    bus.offer(Echo::new(1));
    assert_ne!({ guest.expect::<msg::Offer>(kind::OFFER).relid }, vsc.relid);
    guest.post(&msg::Relid { header: Header::new(kind::RELID_RELEASED), relid: vsc.relid });
    bus.settle();
    bus.offer(Echo::new(2));
    assert_eq!({ guest.expect::<msg::Offer>(kind::OFFER).relid }, vsc.relid);
}

#[test]
fn sub_channels() {
    let (bus, mut guest) = world();
    bus.offer(Echo::new(1));
    guest.connect(Version::V5_3);
    let primary = guest.offers()[0];
    let vsc = guest.open(&primary, 4);
    guest.send(&vsc, packet::IN_BAND, 0, 0, &[], b"sub     ");
    let offers: Vec<msg::Offer> = (0..2).map(|_| guest.expect(kind::OFFER)).collect();
    for (n, offer) in (1..).zip(offers) {
        assert_eq!(({ offer.sub_channel_index }, { offer.instance }), (n, primary.instance));
        let sub = guest.open(&offer, 4);
        guest.send(&sub, packet::IN_BAND, 1, 1, &[], b"hello   ");
        assert_eq!(guest.receive(&sub).1, b"hello   ");
    }
    assert_eq!(bus.open_channels(), 3);
    guest.post(&msg::Relid { header: Header::new(kind::CLOSE), relid: vsc.relid });
    for _ in 0..2 {
        guest.expect::<msg::Relid>(kind::RESCIND);
    }
    assert_eq!(bus.open_channels(), 0);
}

#[test]
fn unload_reconnect_and_kexec() {
    let (bus, mut guest) = world();
    bus.offer(Echo::new(1));
    for round in 0..3 {
        assert_eq!(guest.connect(Version::V5_3), 1);
        let offer = guest.offers()[0];
        let vsc = guest.open(&offer, 4);
        guest.send(&vsc, packet::IN_BAND, 1, round, &[], b"hello   ");
        assert_eq!(guest.receive(&vsc).1, b"hello   ");
        match round {
            0 => {
                guest.post(&Header::new(kind::UNLOAD));
                guest.expect::<Header>(kind::UNLOAD_RESPONSE);
                assert_eq!((bus.open_channels(), bus.version()), (0, None));
            }
            // The next round connects while everything is open.
            1 => {}
            _ => bus.reset(),
        }
    }
    assert_eq!((bus.open_channels(), bus.version()), (0, None));
}

#[test]
fn target_vp_moves() {
    for version in [Version::V4_1, Version::V5_3] {
        let (bus, mut guest) = world();
        bus.offer(Echo::new(1));
        guest.connect(version);
        let offer = guest.offers()[0];
        let vsc = guest.open(&offer, 4);
        let modify = |relid, target_vp| msg::Modify { header: Header::new(kind::MODIFY), relid, target_vp };
        guest.post(&modify(vsc.relid, 1));
        bus.settle();
        guest.take_events();
        guest.send(&vsc, packet::IN_BAND, 1, 1, &[], b"hello   ");
        guest.receive(&vsc);
        wait_until(|| guest.synic.wires.lock().unwrap().events.contains(&(1, 2, vsc.relid as u16)));
        if version >= Version::V5_3 {
            assert_eq!({ guest.expect::<msg::ModifyResponse>(kind::MODIFY_RESPONSE).status }, 0);
            guest.post(&modify(vsc.relid, 7));
            assert_ne!({ guest.expect::<msg::ModifyResponse>(kind::MODIFY_RESPONSE).status }, 0, "no such VP");
        }
    }
}

#[test]
fn monitor_page_and_host_wakes() {
    let (bus, mut guest) = world();
    let device = Echo::new(1);
    bus.offer(device.clone());
    guest.connect(Version::V5_3);
    let mut offer = guest.offers()[0];
    assert_eq!(offer.monitor_allocated, 1);
    // The guest does not signal, but notes in the monitor page.
    offer.connection_id = 0;
    let vsc = guest.open(&offer, 4);
    let id = u64::from(offer.monitor_id);
    guest.send(&vsc, packet::IN_BAND, 1, 1, &[], b"hello   ");
    guest.memory.fetch_or_u64(Gpa(0x3000 + 8 + id / 32 * 8), 1 << (id % 32)).unwrap();
    bus.poll_monitor();
    assert_eq!(guest.receive(&vsc).1, b"hello   ");
    device.channel(0).wake();
    assert_eq!(guest.receive(&vsc).1, b"woken!!!");
}

#[test]
fn sockets_are_refused() {
    let (_bus, guest) = world();
    guest.connect(Version::V5_3);
    let (endpoint, service) = (Guid::new(5, 0, 0, 0), Guid::new(6, 0, 0, 0));
    guest.post(&msg::TlConnectRequest { header: Header::new(kind::TL_CONNECT_REQUEST), endpoint, service });
    let result: msg::TlConnectResult = guest.expect(kind::TL_CONNECT_RESULT);
    assert_eq!(({ result.endpoint }, { result.status }), (endpoint, 0xc000_0236));
}

#[test]
fn save_and_restore_with_channels_open() {
    let (bus, mut guest) = world();
    bus.offer(Echo::new(1));
    bus.offer(Echo::new(2));
    guest.connect(Version::V5_3);
    let offers = guest.offers();
    let (a, b) = (guest.open(&offers[0], 2), guest.open(&offers[1], 4));
    guest.send(&a, packet::IN_BAND, 0, 0, &[], b"sub     ");
    let sub_offer: msg::Offer = guest.expect(kind::OFFER);
    guest.expect::<msg::Offer>(kind::OFFER);
    let sub = guest.open(&sub_offer, 4);
    // Answers fill the guest's ring and wait; more requests wait in the other.
    let mut sent = 0;
    while guest.send(&a, packet::IN_BAND, 1, sent, &[], &[sent as u8; 300]) {
        sent += 1;
        std::thread::sleep(Duration::from_millis(2));
    }
    bus.pause();
    guest.send(&b, packet::IN_BAND, 1, 77, &[], b"later   ");
    let state = bus.save();
    assert!(
        state != {
            drop(bus);
            world().0.save()
        }
    );
    let (bus, mut next) = world_with(guest.memory.clone());
    assert!(bus.restore(&state).is_err(), "the devices are missing");
    // In another order, so that numbers must be put right.
    let (bus2, next2) = world_with(guest.memory.clone());
    drop((bus, next));
    next = next2;
    bus2.offer(Echo::new(2));
    bus2.offer(Echo::new(1));
    bus2.restore(&state).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert!(next.try_receive(&b).is_none(), "it stands still until resumed");
    bus2.resume();
    assert_eq!(next.receive(&b).0.transaction_id, 77);
    for n in 0..sent {
        let (header, payload) = next.receive(&a);
        assert_eq!((header.transaction_id, payload[0]), (n, n as u8));
    }
    next.send(&sub, packet::IN_BAND, 1, 8, &[], b"im here ");
    assert_eq!(next.receive(&sub).1, b"im here ");
    next.next_gpadl = 0x2000;
    assert_eq!(bus2.version(), Some(Version::V5_3));
}

#[test]
fn damaged_states_are_refused() {
    let (bus, mut guest) = world();
    bus.offer(Echo::new(1));
    guest.connect(Version::V5_3);
    let offer = guest.offers()[0];
    guest.open(&offer, 4);
    bus.pause();
    let state = bus.save();
    bus.resume();
    let (other, _) = world_with(GuestMemory::with_ram(1 << 20, 0xc000_0000..1 << 32, false).unwrap());
    other.offer(Echo::new(1));
    assert!(other.restore(&state).is_err(), "the ring is not in this memory");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn no_message_breaks_the_bus(
        messages in prop::collection::vec((0u32..26, prop::collection::vec(any::<u8>(), 0..232), 0u32..6), 1..60),
    ) {
        let (bus, guest) = world();
        bus.offer(Echo::new(1));
        bus.offer(Echo::new(2));
        guest.connect(Version::V5_3);
        guest.offers();
        for (kind, mut rest, small) in messages {
            // Small numbers where channel and GPADL numbers are, half of the time.
            if small > 0 {
                for (i, byte) in rest.iter_mut().take(24).enumerate() {
                    *byte = if i % 4 == 0 { *byte % 8 } else { 0 };
                }
            }
            let mut message = Header::new(kind).as_bytes().to_vec();
            message.extend(rest);
            guest.post_bytes(&message);
        }
        bus.settle();
        guest.synic.wires.lock().unwrap().messages.clear();
        prop_assert_eq!(guest.connect(Version::V5_3), 1);
        prop_assert!(guest.offers().len() >= 2);
    }

    #[test]
    fn no_ring_content_breaks_the_bus(
        bytes in prop::collection::vec(any::<u8>(), 0..400),
        fields in prop::collection::vec((any::<bool>(), 0u64..5, prop_oneof![any::<u32>(), (0u32..600).prop_map(|v| v * 8)]), 1..12),
    ) {
        let (bus, mut guest) = world();
        bus.offer(Echo::new(1));
        guest.connect(Version::V5_3);
        let offer = guest.offers()[0];
        let vsc = guest.open(&offer, 2);
        guest.copy(&vsc, 0, &bytes);
        for (down, field, value) in fields {
            guest.store(&vsc, down, field * 4, value);
            guest.signal(vsc.connection);
            std::thread::yield_now();
        }
        bus.pause();
        bus.resume();
        // Whatever happened, the guest can close and open again.
        guest.post(&msg::Relid { header: Header::new(kind::CLOSE), relid: vsc.relid });
        let again = guest.open(&offer, 4);
        guest.send(&again, packet::IN_BAND, 1, 6, &[], b"again   ");
        prop_assert_eq!(guest.receive(&again).1, b"again   ");
    }
}
