//! The synthetic keyboard against a fake guest.

use partition::GuestMemory;
use proptest::prelude::*;
use std::sync::Arc;
use viridian_vsp::SyntheticDevice;
use viridian_vsp::keyboard::{Keyboard, KeyboardError, MOST_STROKES, Stroke};
use vmbus::VmBus;
use vmbus::protocol::Version;
use vmbus::protocol::ring::packet;
use vmbus::testing::{Guest, Vsc, world_with};

fn world(keyboard: &Arc<Keyboard>) -> (VmBus, Guest, Vsc) {
    let memory = GuestMemory::with_ram(16 << 20, 0xc000_0000..1 << 32, false).unwrap();
    let (bus, mut guest) = world_with(memory);
    assert!(bus.offer(keyboard.clone()));
    guest.connect(Version::V5_3);
    let offer = guest.offers()[0];
    let vsc = guest.open(&offer, 8);
    (bus, guest, vsc)
}

fn ask(guest: &Guest, vsc: &Vsc, version: u32) -> u32 {
    let message = [1u32.to_le_bytes(), version.to_le_bytes()].concat();
    assert!(guest.send(vsc, packet::IN_BAND, 1, 7, &[], &message));
    let (_, answer) = guest.receive(vsc);
    assert_eq!(answer[..4], 2u32.to_le_bytes());
    u32::from_le_bytes(answer[4..8].try_into().unwrap())
}

#[test]
fn keys_arrive_in_order_after_the_protocol_is_agreed() {
    let keyboard = Keyboard::new();
    let strokes: Vec<Stroke> =
        (0..600).map(|i| Stroke { code: i % 0x58 + 1, extended: i % 3 == 0, down: i % 2 == 0 }).collect();
    assert_eq!(keyboard.send(&strokes), Err(KeyboardError::NotConnected));
    let (bus, guest, vsc) = world(&keyboard);
    assert_eq!(keyboard.send(&strokes), Err(KeyboardError::NotConnected), "no protocol yet");
    assert_eq!(ask(&guest, &vsc, 0x0002_0000), 0, "a version that nobody knows");
    assert!(!keyboard.is_connected());
    assert_eq!(ask(&guest, &vsc, 0x0001_0000) & 1, 1);
    keyboard.send(&strokes).unwrap();
    for s in &strokes {
        let (header, p) = guest.receive(&vsc);
        assert_eq!((header.kind, p.len()), (packet::IN_BAND, 16));
        assert_eq!(p[..4], 3u32.to_le_bytes());
        let info = u32::from(!s.down) << 1 | u32::from(s.extended) << 2;
        assert_eq!((p[4..6].to_vec(), p[8..12].to_vec()), (s.code.to_le_bytes().to_vec(), info.to_le_bytes().to_vec()));
    }
    let many = vec![strokes[0]; MOST_STROKES + 1];
    assert_eq!(keyboard.send(&many), Err(KeyboardError::TooMany(MOST_STROKES + 1)));
    drop(bus);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    #[test]
    fn nonsense_is_survived(messages in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..64), 0..16)) {
        let keyboard = Keyboard::new();
        let (_bus, guest, vsc) = world(&keyboard);
        for m in messages {
            // Neither a request, whose answer would be in the way.
            if m.first() != Some(&1) {
                guest.send(&vsc, packet::IN_BAND, 0, 1, &[], &m);
            }
        }
        prop_assert_eq!(ask(&guest, &vsc, 0x0001_0000) & 1, 1);
        keyboard.save().unwrap();
    }
}
