//! REPORT SUPPORTED OPERATION CODES (SPC-4 6.35).

use crate::cdb::Cdb;
use crate::protocol::{Sense, op};

/// A command: operation code, service action if it has one, and which CDB bits it looks at.
struct Command(u8, Option<u8>, &'static [u8]);

const C6: &[u8] = &[0xff, 0, 0, 0, 0xff, 0x04];
const RW6: &[u8] = &[0xff, 0x1f, 0xff, 0xff, 0xff, 0x04];
const RW10: &[u8] = &[0xff, 0x18, 0xff, 0xff, 0xff, 0xff, 0, 0xff, 0xff, 0x04];
const RW12: &[u8] = &[0xff, 0x18, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0x04];
const RW16: &[u8] = &[0xff, 0x18, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0x04];
const V10: &[u8] = &[0xff, 0x16, 0xff, 0xff, 0xff, 0xff, 0, 0xff, 0xff, 0x04];
const V12: &[u8] = &[0xff, 0x16, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0x04];
const V16: &[u8] = &[0xff, 0x16, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0x04];
const LIST10: &[u8] = &[0xff, 0x1f, 0, 0, 0, 0, 0, 0xff, 0xff, 0x04];

const COMMANDS: &[Command] = &[
    Command(op::TEST_UNIT_READY, None, &[0xff, 0, 0, 0, 0, 0x04]),
    Command(op::REQUEST_SENSE, None, &[0xff, 0x01, 0, 0, 0xff, 0x04]),
    Command(op::READ_6, None, RW6),
    Command(op::WRITE_6, None, RW6),
    Command(op::INQUIRY, None, &[0xff, 0x01, 0xff, 0xff, 0xff, 0x04]),
    Command(op::MODE_SELECT_6, None, &[0xff, 0x11, 0, 0, 0xff, 0x04]),
    Command(op::MODE_SENSE_6, None, &[0xff, 0x08, 0xff, 0xff, 0xff, 0x04]),
    Command(op::START_STOP_UNIT, None, &[0xff, 0x01, 0, 0x0f, 0xf7, 0x04]),
    Command(op::SEND_DIAGNOSTIC, None, &[0xff, 0xff, 0, 0xff, 0xff, 0x04]),
    Command(op::PREVENT_ALLOW_MEDIUM_REMOVAL, None, C6),
    Command(op::READ_CAPACITY_10, None, &[0xff, 0, 0, 0, 0, 0, 0, 0, 0, 0x04]),
    Command(op::READ_10, None, RW10),
    Command(op::WRITE_10, None, RW10),
    Command(op::WRITE_AND_VERIFY_10, None, V10),
    Command(op::VERIFY_10, None, V10),
    Command(op::SYNCHRONIZE_CACHE_10, None, &[0xff, 0x02, 0xff, 0xff, 0xff, 0xff, 0, 0xff, 0xff, 0x04]),
    Command(op::WRITE_SAME_10, None, &[0xff, 0x18, 0xff, 0xff, 0xff, 0xff, 0, 0xff, 0xff, 0x04]),
    Command(op::UNMAP, None, &[0xff, 0x01, 0, 0, 0, 0, 0, 0xff, 0xff, 0x04]),
    Command(op::MODE_SELECT_10, None, LIST10),
    Command(op::MODE_SENSE_10, None, &[0xff, 0x18, 0xff, 0xff, 0, 0, 0, 0xff, 0xff, 0x04]),
    Command(op::PERSISTENT_RESERVE_IN, Some(0), LIST10),
    Command(op::PERSISTENT_RESERVE_IN, Some(1), LIST10),
    Command(op::PERSISTENT_RESERVE_IN, Some(2), LIST10),
    Command(op::PERSISTENT_RESERVE_IN, Some(3), LIST10),
    Command(op::PERSISTENT_RESERVE_OUT, Some(0), &[0xff, 0x1f, 0xff, 0, 0, 0xff, 0xff, 0xff, 0xff, 0x04]),
    Command(op::PERSISTENT_RESERVE_OUT, Some(1), &[0xff, 0x1f, 0xff, 0, 0, 0xff, 0xff, 0xff, 0xff, 0x04]),
    Command(op::PERSISTENT_RESERVE_OUT, Some(2), &[0xff, 0x1f, 0xff, 0, 0, 0xff, 0xff, 0xff, 0xff, 0x04]),
    Command(op::PERSISTENT_RESERVE_OUT, Some(3), &[0xff, 0x1f, 0xff, 0, 0, 0xff, 0xff, 0xff, 0xff, 0x04]),
    Command(op::PERSISTENT_RESERVE_OUT, Some(4), &[0xff, 0x1f, 0xff, 0, 0, 0xff, 0xff, 0xff, 0xff, 0x04]),
    Command(op::PERSISTENT_RESERVE_OUT, Some(5), &[0xff, 0x1f, 0xff, 0, 0, 0xff, 0xff, 0xff, 0xff, 0x04]),
    Command(op::PERSISTENT_RESERVE_OUT, Some(6), &[0xff, 0x1f, 0xff, 0, 0, 0xff, 0xff, 0xff, 0xff, 0x04]),
    Command(op::READ_16, None, RW16),
    Command(op::WRITE_16, None, RW16),
    Command(op::WRITE_AND_VERIFY_16, None, V16),
    Command(op::VERIFY_16, None, V16),
    Command(
        op::SYNCHRONIZE_CACHE_16,
        None,
        &[0xff, 0x02, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0x04],
    ),
    Command(
        op::WRITE_SAME_16,
        None,
        &[0xff, 0x19, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0x04],
    ),
    Command(
        op::SERVICE_ACTION_IN_16,
        Some(op::SA_READ_CAPACITY_16),
        &[0xff, 0x1f, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0x04],
    ),
    Command(op::REPORT_LUNS, None, &[0xff, 0, 0xff, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0x04]),
    Command(
        op::MAINTENANCE_IN,
        Some(op::SA_REPORT_SUPPORTED_OPCODES),
        &[0xff, 0x1f, 0x87, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0x04],
    ),
    Command(op::READ_12, None, RW12),
    Command(op::WRITE_12, None, RW12),
    Command(op::WRITE_AND_VERIFY_12, None, V12),
    Command(op::VERIFY_12, None, V12),
];

pub(super) fn report(cdb: &Cdb) -> Result<Vec<u8>, Sense> {
    let timeouts = cdb.u8(2) & 0x80 != 0;
    let (wanted, action) = (cdb.u8(3), cdb.u16(4));
    match cdb.u8(2) & 7 {
        0 => Ok(all(timeouts)),
        1 => one(COMMANDS.iter().find(|c| c.0 == wanted), |c| c.1.is_some(), timeouts),
        2 => {
            let known = COMMANDS.iter().find(|c| c.0 == wanted);
            let exact = COMMANDS.iter().find(|c| c.0 == wanted && c.1.map(u16::from) == Some(action));
            // A command without service actions must not be asked for with one.
            one(exact, |_| false, timeouts).and_then(|b| {
                if known.is_some_and(|c| c.1.is_none()) { Err(Sense::INVALID_FIELD_IN_CDB) } else { Ok(b) }
            })
        }
        3 => {
            let exact = COMMANDS.iter().find(|c| c.0 == wanted && c.1.map_or(action == 0, |a| u16::from(a) == action));
            one(exact, |_| false, timeouts)
        }
        _ => Err(Sense::INVALID_FIELD_IN_CDB),
    }
}

/// Command timeouts descriptor, SPC-4 6.35.4: nothing is promised.
const TIMEOUTS: [u8; 12] = [0, 10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

fn all(timeouts: bool) -> Vec<u8> {
    let mut list = Vec::new();
    for c in COMMANDS {
        let action = u16::from(c.1.unwrap_or(0)).to_be_bytes();
        let flags = u8::from(c.1.is_some()) | u8::from(timeouts) << 1;
        list.extend_from_slice(&[c.0, 0, action[0], action[1], 0, flags, 0, c.2.len() as u8]);
        if timeouts {
            list.extend_from_slice(&TIMEOUTS);
        }
    }
    let mut out = (list.len() as u32).to_be_bytes().to_vec();
    out.extend(list);
    out
}

fn one(c: Option<&Command>, refuse: impl Fn(&Command) -> bool, timeouts: bool) -> Result<Vec<u8>, Sense> {
    let Some(c) = c else { return Ok(vec![0, 1, 0, 0]) };
    if refuse(c) {
        return Err(Sense::INVALID_FIELD_IN_CDB);
    }
    let mut out = vec![0, 3 | u8::from(timeouts) << 7, 0, c.2.len() as u8];
    let at = out.len();
    out.extend_from_slice(c.2);
    // Usage data begins with the operation code itself.
    out[at] = c.0;
    if let Some(a) = c.1 {
        out[at + 1] = (out[at + 1] & !0x1f) | a;
    }
    if timeouts {
        out.extend_from_slice(&TIMEOUTS);
    }
    Ok(out)
}
