//! The rules of SetVariable and friends, one test a rule of the specification.

use super::*;
use crate::guid::CERT_SHA256;
use crate::secure::sigdb;
use std::vec;

const VENDOR: Guid = Guid::new(0x1234, 1, 2, [3; 8]);
const NV_BS_RT: u32 = NON_VOLATILE | BOOTSERVICE_ACCESS | RUNTIME_ACCESS;

fn name(text: &str) -> Vec<u16> {
    text.encode_utf16().collect()
}
fn store() -> VariableStore {
    let mut s = VariableStore::new(Quota { non_volatile: 4096, volatile: 1024, variable: 2048 });
    s.reset(true);
    s
}

#[test]
fn set_get_append_delete() {
    let mut s = store();
    let n = name("Boot0000");
    assert_eq!(s.get(&n, VENDOR).err(), Some(VariableError::NotFound));
    s.set(&n, VENDOR, NV_BS_RT, &[1, 2]).unwrap();
    s.set(&n, VENDOR, NV_BS_RT | APPEND_WRITE, &[3]).unwrap();
    s.set(&n, VENDOR, NV_BS_RT | APPEND_WRITE, &[]).unwrap();
    assert_eq!(s.get(&n, VENDOR).unwrap().data, [1, 2, 3]);
    assert_eq!(s.set(&n, VENDOR, NON_VOLATILE | BOOTSERVICE_ACCESS, &[9]), Err(VariableError::InvalidParameter));
    assert_eq!(s.get(&n, VENDOR).unwrap().data, [1, 2, 3], "other attributes change nothing");
    s.set(&n, VENDOR, NV_BS_RT, &[]).unwrap();
    assert_eq!(s.set(&n, VENDOR, NV_BS_RT, &[]), Err(VariableError::NotFound));
    s.set(&n, VENDOR, NV_BS_RT, &[1]).unwrap();
    s.set(&n, VENDOR, 0, &[1]).unwrap();
    assert_eq!(s.get(&n, VENDOR).err(), Some(VariableError::NotFound), "no access attributes delete");
}

#[test]
fn attributes_are_checked() {
    let mut s = store();
    let n = name("x");
    use VariableError::*;
    assert_eq!(s.set(&[], VENDOR, NV_BS_RT, &[1]), Err(InvalidParameter));
    assert_eq!(s.set(&n, VENDOR, RUNTIME_ACCESS, &[1]), Err(InvalidParameter));
    assert_eq!(s.set(&n, VENDOR, NV_BS_RT | 0x100, &[1]), Err(InvalidParameter));
    assert_eq!(s.set(&n, VENDOR, NV_BS_RT | AUTHENTICATED_WRITE_ACCESS, &[1]), Err(Unsupported));
    assert_eq!(s.set(&n, VENDOR, NV_BS_RT | 0x30, &[1]), Err(InvalidParameter));
    assert_eq!(s.set(&n, VENDOR, HARDWARE_ERROR_RECORD | 2, &[1]), Err(InvalidParameter));
    assert_eq!(s.set(&name("SecureBoot"), GLOBAL_VARIABLE, 6, &[1]), Err(WriteProtected));
    assert_eq!(s.set(&n, VENDOR, NV_BS_RT, &vec![0; 2047]), Err(InvalidParameter));
}

#[test]
fn runtime_hides_and_protects() {
    let mut s = store();
    s.set(&name("boot"), VENDOR, NON_VOLATILE | BOOTSERVICE_ACCESS, &[1]).unwrap();
    s.set(&name("rt"), VENDOR, NV_BS_RT, &[1]).unwrap();
    s.enter_runtime();
    assert_eq!(s.get(&name("boot"), VENDOR).err(), Some(VariableError::NotFound));
    assert_eq!(s.set(&name("boot"), VENDOR, NV_BS_RT, &[2]), Err(VariableError::WriteProtected));
    assert_eq!(s.set(&name("new"), VENDOR, 6, &[2]), Err(VariableError::InvalidParameter), "volatile at run time");
    s.set(&name("rt"), VENDOR, NV_BS_RT, &[2]).unwrap();
    let mut seen = Vec::new();
    let (mut n, mut v) = (Vec::new(), Guid::default());
    while let Ok((next, vendor)) = s.next(&n, v) {
        (n, v) = (next.to_vec(), vendor);
        seen.push(n.clone());
    }
    assert!(seen.contains(&name("rt")) && !seen.contains(&name("boot")));
    assert_eq!(s.next(&name("boot"), VENDOR), Err(VariableError::InvalidParameter));
}

#[test]
fn quotas_hold_and_are_told() {
    let mut s = store();
    let before = s.query(NV_BS_RT).unwrap();
    assert_eq!((before.maximum_storage, before.remaining_storage), (4096, 4096));
    s.set(&name("a"), VENDOR, NV_BS_RT, &[0; 1000]).unwrap();
    assert_eq!(s.query(NV_BS_RT).unwrap().remaining_storage, 4096 - 1004);
    s.set(&name("b"), VENDOR, NV_BS_RT, &[0; 2000]).unwrap();
    assert_eq!(s.set(&name("c"), VENDOR, NV_BS_RT, &[0; 1200]), Err(VariableError::OutOfResources));
    s.set(&name("b"), VENDOR, NV_BS_RT, &[1; 2000]).unwrap();
    assert_eq!(s.query(0), Err(VariableError::InvalidParameter));
    assert_eq!(s.query(RUNTIME_ACCESS), Err(VariableError::InvalidParameter));
}

#[test]
fn the_file_round_trips_and_refuses_damage() {
    let mut s = store();
    s.set(&name("a"), VENDOR, NV_BS_RT, &[1, 2, 3]).unwrap();
    s.set(&name("gone"), VENDOR, BOOTSERVICE_ACCESS, &[1]).unwrap();
    let bytes = file::encode(&s);
    let mut back = file::decode(&bytes, s.quota).unwrap();
    back.reset(true);
    assert_eq!(back.get(&name("a"), VENDOR).unwrap().data, [1, 2, 3]);
    assert!(back.get(&name("gone"), VENDOR).is_err());
    for at in 0..bytes.len() {
        let mut broken = bytes.clone();
        broken[at] ^= 0x10;
        assert!(file::decode(&broken, s.quota).is_err(), "byte {at}");
        assert!(file::decode(&bytes[..at], s.quota).is_err(), "cut at {at}");
    }
}

#[test]
fn unsigned_writes_of_secure_variables_are_refused() {
    let mut s = store();
    let list = sigdb::list(CERT_SHA256, VENDOR, &[&[7; 32]]);
    let db = name("db");
    assert_eq!(s.set(&db, IMAGE_SECURITY_DATABASE, NV_BS_RT, &list), Err(VariableError::InvalidParameter));
    let auth = NV_BS_RT | TIME_BASED_AUTHENTICATED_WRITE_ACCESS;
    assert_eq!(s.set(&db, IMAGE_SECURITY_DATABASE, auth, &list), Err(VariableError::SecurityViolation));
    // In setup mode the signature is not looked at, but the header must be there.
    let mut payload = vec![0u8; 16];
    payload[..2].copy_from_slice(&2024u16.to_le_bytes());
    payload.extend(24u32.to_le_bytes());
    payload.extend(0x200u16.to_le_bytes());
    payload.extend(0xef1u16.to_le_bytes());
    payload.extend(crate::guid::CERT_TYPE_PKCS7.0);
    payload.extend(&list);
    s.set(&db, IMAGE_SECURITY_DATABASE, auth, &payload).unwrap();
    assert_eq!(s.database("db"), &list[..]);
    assert_eq!(
        s.set(&db, IMAGE_SECURITY_DATABASE, auth, &payload),
        Err(VariableError::SecurityViolation),
        "the same time again"
    );
    s.set(&db, IMAGE_SECURITY_DATABASE, auth | APPEND_WRITE, &payload).unwrap();
    assert_eq!(s.database("db"), &list[..], "appending what is there adds nothing");
}
