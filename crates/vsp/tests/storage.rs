//! The synthetic SCSI controller against a fake guest: negotiation of every version, data both ways, absent units, hot
//! add and remove, sub-channels, pause and restore with commands in flight, and lies.

use partition::{Gpa, GuestMemory};
use proptest::prelude::*;
use scsi::{DiskConfig, ScsiDisk};
use std::path::Path;
use std::sync::Arc;
use vhd::{Disk, OpenOptions};
use viridian_vsp::SyntheticDevice;
use viridian_vsp::storage::{StorageController, Unit};
use vmbus::VmBus;
use vmbus::protocol::message::{self as msg, kind};
use vmbus::protocol::ring::packet;
use vmbus::protocol::storage::{ScsiRequest, operation, srb, status, version};
use vmbus::protocol::{MAX_RELID, Version};
use vmbus::testing::{Guest, Vsc, world_with};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

const BUFFER: u64 = 0x30_0000;

struct World {
    bus: VmBus,
    guest: Guest,
    controller: Arc<StorageController>,
    vsc: Vsc,
    _dir: tempfile::TempDir,
}

fn unit(path: &Path) -> Unit {
    let options = OpenOptions { write: true, ..OpenOptions::default() };
    Unit::Disk(Arc::new(ScsiDisk::new(Arc::new(Disk::open(path, &options).unwrap()), DiskConfig::default())))
}

fn image(dir: &Path, name: &str) -> std::path::PathBuf {
    let path = dir.join(name);
    std::fs::File::create(&path).unwrap().set_len(8 << 20).unwrap();
    path
}

fn world() -> World {
    let dir = tempfile::tempdir().unwrap();
    let memory = GuestMemory::with_ram(16 << 20, 0xc000_0000..1 << 32, false).unwrap();
    let (bus, mut guest) = world_with(memory);
    let controller = StorageController::new(0, 4);
    controller.attach(0, unit(&image(dir.path(), "0.img"))).unwrap();
    assert!(bus.offer(controller.clone()));
    guest.connect(Version::V5_3);
    let offer = guest.offers()[0];
    let vsc = guest.open(&offer, 8);
    World { bus, guest, controller, vsc, _dir: dir }
}

/// Sends a storvsp packet and returns (status, payload of the answer).
fn ask(guest: &Guest, vsc: &Vsc, op: u32, payload: &[u8]) -> (u32, Vec<u8>) {
    let mut bytes = [op, 1, 0].as_bytes().to_vec();
    bytes.extend(payload);
    bytes.resize(64, 0);
    assert!(guest.send(vsc, packet::IN_BAND, 1, 77, &[], &bytes));
    let (header, answer) = guest.receive(vsc);
    assert_eq!((header.kind, header.transaction_id), (packet::COMPLETION, 77));
    assert_eq!(answer[..4], operation::COMPLETE_IO.to_le_bytes());
    (u32::from_le_bytes(answer[8..12].try_into().unwrap()), answer[12..].to_vec())
}

fn negotiate(w: &World, version: u16) {
    assert_eq!(ask(&w.guest, &w.vsc, operation::BEGIN_INITIALIZATION, &[]).0, status::SUCCESS);
    assert_eq!(ask(&w.guest, &w.vsc, operation::QUERY_PROTOCOL_VERSION, &version.to_le_bytes()).0, status::SUCCESS);
    assert_eq!(ask(&w.guest, &w.vsc, operation::QUERY_PROPERTIES, &[]).0, status::SUCCESS);
    assert_eq!(ask(&w.guest, &w.vsc, operation::END_INITIALIZATION, &[]).0, status::SUCCESS);
}

/// Sends a command with a buffer at [`BUFFER`].
fn start(guest: &Guest, vsc: &Vsc, id: u64, lun: u8, cdb: &[u8], data_in: u8, len: u32) {
    let mut request = ScsiRequest::new_zeroed();
    request.length = size_of::<ScsiRequest>() as u16;
    (request.lun, request.cdb_length, request.data_in, request.transfer_length) = (lun, cdb.len() as u8, data_in, len);
    request.cdb_or_sense[..cdb.len()].copy_from_slice(cdb);
    let mut bytes = [operation::EXECUTE_SRB, 1, 0].as_bytes().to_vec();
    bytes.extend(request.as_bytes());
    let mut extra = [0u32, 1, len, 0].as_bytes().to_vec();
    (0..u64::from(len).div_ceil(4096)).for_each(|p| extra.extend((BUFFER / 4096 + p).to_le_bytes()));
    let sent = if len == 0 {
        guest.send(vsc, packet::IN_BAND, 1, id, &[], &bytes)
    } else {
        guest.send(vsc, packet::GPA_DIRECT, 1, id, &extra, &bytes)
    };
    assert!(sent);
}

fn finish(guest: &Guest, vsc: &Vsc) -> (u64, ScsiRequest) {
    let (header, answer) = guest.receive(vsc);
    (header.transaction_id, ScsiRequest::read_from_prefix(&answer[12..]).unwrap().0)
}

fn command(guest: &Guest, vsc: &Vsc, lun: u8, cdb: &[u8], data_in: u8, len: u32) -> ScsiRequest {
    start(guest, vsc, 5, lun, cdb, data_in, len);
    finish(guest, vsc).1
}

fn rw(opcode: u8, lba: u32, blocks: u16) -> [u8; 10] {
    let (l, b) = (lba.to_be_bytes(), blocks.to_be_bytes());
    [opcode, 0, l[0], l[1], l[2], l[3], 0, b[0], b[1], 0]
}

#[test]
fn versions_and_order() {
    for v in version::ALL {
        let w = world();
        assert_eq!(ask(&w.guest, &w.vsc, operation::QUERY_PROTOCOL_VERSION, &[9, 9]).0, status::REVISION_MISMATCH);
        assert_eq!(ask(&w.guest, &w.vsc, operation::END_INITIALIZATION, &[]).0, status::INVALID_DEVICE_STATE);
        assert_eq!(ask(&w.guest, &w.vsc, operation::EXECUTE_SRB, &[]).0, status::INVALID_DEVICE_STATE, "too early");
        negotiate(&w, v);
        let properties = ask(&w.guest, &w.vsc, operation::QUERY_PROPERTIES, &[]).1;
        assert_eq!(properties[4] > 0, v >= version::V5_1, "sub-channels from 5.1 on");
        assert_eq!(ask(&w.guest, &w.vsc, 99, &[]).0, status::INVALID_PARAMETER);
    }
}

#[test]
fn data_both_ways() {
    let w = world();
    negotiate(&w, version::V6_2);
    let data: Vec<u8> = (0..64 * 1024u32).map(|i| (i * 7) as u8).collect();
    w.guest.memory.write(Gpa(BUFFER), &data).unwrap();
    let done = command(&w.guest, &w.vsc, 0, &rw(0x2a, 100, 128), srb::DATA_OUT, 65536);
    assert_eq!((done.srb_status, done.scsi_status, done.transfer_length), (srb::SUCCESS, 0, 65536));
    w.guest.memory.fill(Gpa(BUFFER), 0, 65536).unwrap();
    w.guest.memory.set_dirty_tracking(true);
    let done = command(&w.guest, &w.vsc, 0, &rw(0x28, 100, 128), srb::DATA_IN, 65536);
    assert_eq!((done.srb_status, done.transfer_length), (srb::SUCCESS, 65536));
    let mut back = vec![0; data.len()];
    w.guest.memory.read(Gpa(BUFFER), &mut back).unwrap();
    assert_eq!(back, data);
    assert_eq!(w.guest.memory.take_dirty(Gpa(BUFFER), 16).bits, [0xffff], "what the host writes is dirty");
    let done = command(&w.guest, &w.vsc, 0, &rw(0x28, 0x7fff_0000, 1), srb::DATA_IN, 512);
    assert_eq!(done.srb_status, srb::ERROR | srb::AUTOSENSE_VALID);
    assert_eq!((done.sense_length, done.cdb_or_sense[2], done.cdb_or_sense[12]), (18, 5, 0x21), "LBA out of range");
}

#[test]
fn absent_units() {
    let w = world();
    negotiate(&w, version::V6_2);
    let inquiry = [0x12, 0, 0, 0, 36, 0];
    assert_eq!(command(&w.guest, &w.vsc, 0, &inquiry, srb::DATA_IN, 36).srb_status, srb::SUCCESS);
    let mut first = [0xff];
    w.guest.memory.read(Gpa(BUFFER), &mut first).unwrap();
    assert_eq!(first, [0]);
    assert_eq!(command(&w.guest, &w.vsc, 9, &inquiry, srb::DATA_IN, 36).transfer_length, 36);
    w.guest.memory.read(Gpa(BUFFER), &mut first).unwrap();
    assert_eq!(first, [0x7f], "no unit here");
    assert_eq!(command(&w.guest, &w.vsc, 9, &[0; 6], srb::DATA_UNKNOWN, 0).srb_status, srb::INVALID_LUN);
    let report = [0xa0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0];
    let done = command(&w.guest, &w.vsc, 9, &report, srb::DATA_IN, 256);
    assert_eq!((done.srb_status, done.transfer_length), (srb::SUCCESS, 16), "one unit");
}

#[test]
fn hot_add_and_remove() {
    let w = world();
    negotiate(&w, version::V6_2);
    let second = unit(&image(w._dir.path(), "1.img"));
    assert!(w.controller.attach(0, second.clone()).is_err());
    assert!(w.controller.attach(64, second.clone()).is_err());
    w.controller.attach(5, second).unwrap();
    let (header, packet) = w.guest.receive(&w.vsc);
    assert_eq!((header.transaction_id, &packet[..4]), (0, &operation::ENUMERATE_BUS.to_le_bytes()[..]));
    // A new unit reports its power-on first.
    assert_eq!(command(&w.guest, &w.vsc, 5, &rw(0x28, 0, 8), srb::DATA_IN, 4096).lun, 5);
    assert!(w.controller.detach(5).is_some());
    w.guest.receive(&w.vsc);
    assert_eq!(command(&w.guest, &w.vsc, 5, &[0; 6], srb::DATA_UNKNOWN, 0).srb_status, srb::INVALID_LUN);
}

#[test]
fn sub_channels_and_many_commands() {
    let mut w = world();
    negotiate(&w, version::V6_2);
    assert_eq!(
        ask(&w.guest, &w.vsc, operation::CREATE_SUB_CHANNELS, &99u16.to_le_bytes()).0,
        status::INVALID_PARAMETER
    );
    assert_eq!(ask(&w.guest, &w.vsc, operation::CREATE_SUB_CHANNELS, &1u16.to_le_bytes()).0, status::SUCCESS);
    let offer: msg::Offer = w.guest.expect(kind::OFFER);
    let sub = w.guest.open(&offer, 8);
    for round in 0..40u64 {
        for (vsc, base) in [(&w.vsc, 0), (&sub, 4000)] {
            for n in 0..20 {
                start(&w.guest, vsc, round * 20 + n, 0, &rw(0x28, base + n as u32, 8), srb::DATA_IN, 4096);
            }
        }
        for vsc in [&w.vsc, &sub] {
            let mut ids: Vec<u64> = (0..20)
                .map(|_| finish(&w.guest, vsc))
                .map(|(id, done)| {
                    assert_eq!(done.srb_status, srb::SUCCESS);
                    id
                })
                .collect();
            ids.sort_unstable();
            assert_eq!(ids, (round * 20..round * 20 + 20).collect::<Vec<_>>());
        }
    }
    let counters: std::collections::HashMap<_, _> = w.controller.counters().into_iter().collect();
    assert_eq!((counters["scsi_commands"], counters["scsi_sub_channel_commands"]), (1600, 800));
}

#[test]
fn pause_waits_for_commands_and_restore_goes_on() {
    let w = world();
    negotiate(&w, version::V6_2);
    for n in 0..50 {
        start(&w.guest, &w.vsc, n, 0, &rw(0x2a, n as u32 * 8, 8), srb::DATA_OUT, 4096);
    }
    w.bus.pause();
    let (bus_state, device_state) = (w.bus.save(), w.controller.save().unwrap());
    let World { bus, guest, controller, vsc, _dir } = w;
    drop((bus, controller));
    let (bus, next) = world_with(guest.memory.clone());
    let controller = StorageController::new(0, 4);
    assert!(controller.restore(&device_state).is_err(), "the unit is missing");
    controller.attach(0, unit(&_dir.path().join("0.img"))).unwrap();
    bus.offer(controller.clone());
    controller.restore(&device_state).unwrap();
    bus.restore(&bus_state).unwrap();
    bus.resume();
    let mut ids: Vec<u64> = (0..50).map(|_| finish(&next, &vsc).0).collect();
    ids.sort_unstable();
    assert_eq!(ids, (0..50).collect::<Vec<_>>(), "each command is answered once");
    assert!(u32::from(vsc.relid as u16) <= MAX_RELID);
    assert_eq!(command(&next, &vsc, 0, &[0; 6], srb::DATA_UNKNOWN, 0).srb_status, srb::SUCCESS);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn no_packet_breaks_the_controller(
        packets in prop::collection::vec(
            (0u32..16, prop::collection::vec(any::<u8>(), 0..80), any::<bool>(), 0u32..70000, 0u32..5000), 1..30),
    ) {
        let w = world();
        negotiate(&w, version::V6_2);
        for (op, rest, direct, len, offset) in packets {
            let mut bytes = [op, 1, 0].as_bytes().to_vec();
            bytes.extend(rest);
            let extra = match direct {
                false => Vec::new(),
                true => {
                    // Pages as many as the length needs: everything else loses the channel, as it should.
                    let offset = offset % 4096;
                    let mut extra = [0u32, 1, len, offset].as_bytes().to_vec();
                    (0..u64::from(len + offset).div_ceil(4096)).for_each(|p| extra.extend((p * 977).to_le_bytes()));
                    extra
                }
            };
            let kind = if direct { packet::GPA_DIRECT } else { packet::IN_BAND };
            w.guest.send(&w.vsc, kind, 1, 1, &extra, &bytes);
            while w.guest.try_receive(&w.vsc).is_some() {}
        }
        w.bus.pause();
        w.bus.resume();
        while w.guest.try_receive(&w.vsc).is_some() {}
        prop_assert_eq!(w.bus.open_channels(), 1);
    }
}
