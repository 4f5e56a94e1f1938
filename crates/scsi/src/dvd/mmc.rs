//! Answers of a drive that are functions of the command and the disc's size.

use crate::cdb::Cdb;
use crate::protocol::{Sense, op};

/// Profiles (MMC-6 5.3.1).
const PROFILE_CD_ROM: u16 = 0x0008;
const PROFILE_DVD_ROM: u16 = 0x0010;
/// More sectors than a CD can have (99 minutes).
const CD_SECTORS: u32 = 99 * 60 * 75;

fn profile(blocks: u32) -> u16 {
    if blocks > CD_SECTORS { PROFILE_DVD_ROM } else { PROFILE_CD_ROM }
}

/// An address as LBA or as minute, second, frame (MMC-6 6.25: two seconds of pre-gap).
fn address(lba: u32, msf: bool) -> [u8; 4] {
    if !msf {
        return lba.to_be_bytes();
    }
    let f = lba.saturating_add(150);
    [0, (f / (60 * 75)).min(255) as u8, (f / 75 % 60) as u8, (f % 75) as u8]
}

/// READ TOC/PMA/ATIP (MMC-6 6.25): one data track, one session.
pub(super) fn toc(cdb: &Cdb, blocks: u32) -> Result<Vec<u8>, Sense> {
    let msf = cdb.u8(1) & 2 != 0;
    let mut format = cdb.u8(2) & 0xf;
    if format == 0 && cdb.u8(9) >> 6 != 0 {
        // SFF-8020i put the format into the control byte; old ATAPI drivers still do.
        format = cdb.u8(9) >> 6;
    }
    let first = cdb.u8(6);
    let mut body = Vec::new();
    let mut track = |number: u8, lba: u32| {
        body.extend_from_slice(&[0, 0x14, number, 0]);
        body.extend_from_slice(&address(lba, msf));
    };
    match format {
        0 => {
            if first > 1 && first != 0xaa {
                return Err(Sense::INVALID_FIELD_IN_CDB);
            }
            if first <= 1 {
                track(1, 0);
            }
            track(0xaa, blocks);
        }
        1 => track(1, 0),
        2 => {
            // Points A0, A1, A2 and track 1, always in minutes, seconds and frames.
            let lead_out = address(blocks, true);
            let start = address(0, true);
            for (point, p) in [(0xa0, [0, 1, 0, 0]), (0xa1, [0, 1, 0, 0]), (0xa2, lead_out), (1, start)] {
                body.extend_from_slice(&[1, 0x14, 0, point, 0, 0, 0, 0, p[1], p[2], p[3]]);
            }
        }
        _ => return Err(Sense::INVALID_FIELD_IN_CDB),
    }
    let mut out = ((body.len() + 2) as u16).to_be_bytes().to_vec();
    out.extend_from_slice(&[1, 1]);
    out.extend(body);
    Ok(out)
}

/// GET CONFIGURATION (MMC-6 6.5): features (5.3), with the current ones marked.
pub(super) fn configuration(cdb: &Cdb, blocks: Option<u32>) -> Result<Vec<u8>, Sense> {
    let (rt, start) = (cdb.u8(1) & 3, cdb.u16(2));
    if rt == 3 {
        return Err(Sense::INVALID_FIELD_IN_CDB);
    }
    let current = blocks.map_or(0, profile);
    let (cd, dvd) = (current == PROFILE_CD_ROM, current == PROFILE_DVD_ROM);
    let list = {
        let mut l = Vec::new();
        for (p, on) in [(PROFILE_DVD_ROM, dvd), (PROFILE_CD_ROM, cd)] {
            let p = p.to_be_bytes();
            l.extend_from_slice(&[p[0], p[1], u8::from(on), 0]);
        }
        l
    };
    // (code, version, persistent, current, data)
    let features: [(u16, u8, bool, bool, Vec<u8>); 10] = [
        (0x0000, 0, true, true, list),
        (0x0001, 2, true, true, vec![0, 0, 0, 1, 1, 0, 0, 0]), // core: SCSI family, device busy events
        (0x0002, 1, true, true, vec![0x02, 0, 0, 0]),          // morphing
        (0x0003, 1, true, true, vec![0x29, 0, 0, 0]),          // removable: tray, eject, lock
        (0x0010, 0, false, cd || dvd, vec![0, 0, 8, 0, 0, 1, 0, 0]), // random readable: 2048 bytes, 1 block
        (0x001d, 0, false, cd, vec![]),                        // multi-read
        (0x001e, 2, false, cd, vec![0, 0, 0, 0]),              // CD read
        (0x001f, 1, false, dvd, vec![0, 0, 0, 0]),             // DVD read
        (0x0100, 0, true, true, vec![]),                       // power management
        (0x0105, 1, true, true, vec![0, 0, 0, 0]),             // timeout
    ];
    let mut body = Vec::new();
    for (code, version, persistent, on, data) in features {
        let wanted = match rt {
            0 => code >= start,
            1 => code >= start && on,
            _ => code == start,
        };
        if wanted {
            body.extend_from_slice(&code.to_be_bytes());
            body.push(version << 2 | u8::from(persistent) << 1 | u8::from(on));
            body.push(data.len() as u8);
            body.extend(data);
        }
    }
    let mut out = ((body.len() + 4) as u32).to_be_bytes().to_vec();
    out.extend_from_slice(&[0, 0]);
    out.extend_from_slice(&current.to_be_bytes());
    out.extend(body);
    Ok(out)
}

/// READ DISC INFORMATION (MMC-6 6.21.3): a finished disc with one session and one track.
pub(super) fn disc_information() -> Vec<u8> {
    let mut b = vec![0u8; 34];
    b[1] = 32;
    b[2] = 0x0e; // last session complete, disc finalized
    b[3..7].copy_from_slice(&[1, 1, 1, 1]); // first track, sessions, first and last track of the last session
    b[7] = 0x20; // unrestricted use
    b[16..24].fill(0xff); // lead-in and lead-out: none to come
    b
}

/// READ TRACK INFORMATION (MMC-6 6.26.3).
pub(super) fn track_information(cdb: &Cdb, blocks: u32) -> Result<Vec<u8>, Sense> {
    let which = cdb.u32(2);
    let found = match cdb.u8(1) & 3 {
        0 => which < blocks,
        1 => which <= 1 || which == 0xff,
        2 => which == 1,
        _ => false,
    };
    if !found {
        return Err(Sense::INVALID_FIELD_IN_CDB);
    }
    let mut b = vec![0u8; 36];
    b[1] = 34;
    (b[2], b[3]) = (1, 1);
    b[5] = 4; // data track
    b[6] = 1; // mode 1
    b[24..28].copy_from_slice(&blocks.to_be_bytes());
    Ok(b)
}

/// READ DVD STRUCTURE (MMC-6 6.22): physical format and copyright.
pub(super) fn dvd_structure(cdb: &Cdb, blocks: u32) -> Result<Vec<u8>, Sense> {
    if cdb.u8(1) & 0xf != 0 || cdb.u8(6) != 0 || profile(blocks) != PROFILE_DVD_ROM {
        return Err(Sense::INVALID_FIELD_IN_CDB);
    }
    let body = match cdb.u8(7) {
        0x00 => {
            let mut p = vec![0u8; 2048];
            p[0] = 0x01; // DVD-ROM, version 1
            p[1] = 0x0f; // 120 mm, no maximum rate
            p[2] = 0x01; // one layer, embossed data
            p[5..8].copy_from_slice(&[0x03, 0, 0]); // data begins at sector 30000h
            let end = 0x3_0000u32.saturating_add(blocks.saturating_sub(1)).min(0xff_ffff);
            p[9..12].copy_from_slice(&end.to_be_bytes()[1..]);
            p
        }
        0x01 => vec![0, 0, 0, 0],
        _ => return Err(Sense::INVALID_FIELD_IN_CDB),
    };
    let mut out = ((body.len() + 2) as u16).to_be_bytes().to_vec();
    out.extend_from_slice(&[0, 0]);
    out.extend(body);
    Ok(out)
}

fn pages(page: u8, changeable: bool, locked: bool) -> Result<Vec<u8>, Sense> {
    // Read error recovery (MMC-6 7.3), and capabilities and mechanical status (7.11).
    let mut recovery = vec![0u8; 12];
    (recovery[0], recovery[1]) = (0x01, 10);
    let mut caps = vec![0u8; 30];
    (caps[0], caps[1]) = (0x2a, 28);
    if !changeable {
        recovery[3] = 5; // retries
        caps[2] = 0x0b; // reads CD-R, CD-RW, DVD-ROM
        caps[4] = 0x70; // multi-session, mode 2 forms
        caps[6] = 0x29 | u8::from(locked) << 1; // tray, eject, lock
        caps[8..10].copy_from_slice(&5540u16.to_be_bytes()); // kB/s, 4x DVD
        caps[14..16].copy_from_slice(&5540u16.to_be_bytes());
    }
    Ok(match page {
        0x01 => recovery,
        0x2a => caps,
        0x3f => [recovery, caps].concat(),
        _ => return Err(Sense::INVALID_FIELD_IN_CDB),
    })
}

/// MODE SENSE: drives have no block descriptors.
pub(super) fn mode_sense(cdb: &Cdb, locked: bool) -> Result<Vec<u8>, Sense> {
    let control = cdb.u8(2) >> 6;
    if control == 3 {
        return Err(Sense::SAVING_PARAMETERS_NOT_SUPPORTED);
    }
    if cdb.u8(3) != 0 && cdb.u8(3) != 0xff {
        return Err(Sense::INVALID_FIELD_IN_CDB);
    }
    let pages = pages(cdb.u8(2) & 0x3f, control == 1, locked)?;
    let mut out = if cdb.opcode() == op::MODE_SENSE_6 {
        vec![(pages.len() + 3) as u8, 0, 0, 0]
    } else {
        let len = ((pages.len() + 6) as u16).to_be_bytes();
        vec![len[0], len[1], 0, 0, 0, 0, 0, 0]
    };
    out.extend(pages);
    Ok(out)
}

/// MODE SELECT: nothing can be changed, but what is may be said again.
pub(super) fn mode_select(cdb: &Cdb, list: &[u8]) -> Result<(), Sense> {
    if cdb.u8(1) & 0x10 == 0 || cdb.u8(1) & 1 != 0 {
        return Err(Sense::INVALID_FIELD_IN_CDB);
    }
    if list.is_empty() {
        return Ok(());
    }
    let head = if cdb.opcode() == op::MODE_SELECT_6 { 4 } else { 8 };
    let mut rest = list.get(head..).ok_or(Sense::PARAMETER_LIST_LENGTH_ERROR)?;
    while !rest.is_empty() {
        let len = 2 + usize::from(*rest.get(1).ok_or(Sense::PARAMETER_LIST_LENGTH_ERROR)?);
        let page = rest.get(..len).ok_or(Sense::PARAMETER_LIST_LENGTH_ERROR)?;
        if !matches!(page[0] & 0x3f, 0x01 | 0x2a) {
            return Err(Sense::INVALID_FIELD_IN_PARAMETER_LIST);
        }
        rest = &rest[len..];
    }
    Ok(())
}
