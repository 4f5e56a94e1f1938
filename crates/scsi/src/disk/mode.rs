//! MODE SENSE and MODE SELECT: caching (08h), control (0Ah), informational exceptions (1Ch).

use super::{DiskState, Inner};
use crate::cdb::Cdb;
use crate::protocol::{Sense, op};
use crate::target::Initiator;

/// Which values MODE SENSE returns (SPC-4 6.11.1).
#[derive(Clone, Copy, PartialEq, Eq)]
enum Control {
    Current,
    Changeable,
    Default,
}

/// Caching, SBC-3 6.5.5: WCE can be changed.
fn caching(s: &DiskState, c: Control) -> Vec<u8> {
    let mut p = vec![0u8; 20];
    (p[0], p[1]) = (0x08, 18);
    let wce = match c {
        Control::Current => s.write_cache,
        Control::Changeable | Control::Default => true,
    };
    p[2] = u8::from(wce) << 2;
    p
}

/// Control, SPC-4 7.5.8: D_SENSE can be changed.
fn control(s: &DiskState, c: Control) -> Vec<u8> {
    let mut p = vec![0u8; 12];
    (p[0], p[1]) = (0x0a, 10);
    let d_sense = match c {
        Control::Current => s.descriptor_sense,
        Control::Changeable => true,
        Control::Default => false,
    };
    p[2] = u8::from(d_sense) << 2;
    if c != Control::Changeable {
        p[3] = 0x10; // unrestricted reordering
    }
    p
}

/// Informational exceptions control, SPC-4 7.5.11: none are reported.
fn exceptions() -> Vec<u8> {
    let mut p = vec![0u8; 12];
    (p[0], p[1]) = (0x1c, 10);
    p
}

impl Inner {
    pub(super) fn mode_sense(&self, cdb: &Cdb) -> Result<Vec<u8>, Sense> {
        let six = cdb.opcode() == op::MODE_SENSE_6;
        let (page, subpage) = (cdb.u8(2) & 0x3f, cdb.u8(3));
        let control_value = match cdb.u8(2) >> 6 {
            0 => Control::Current,
            1 => Control::Changeable,
            2 => Control::Default,
            _ => return Err(Sense::SAVING_PARAMETERS_NOT_SUPPORTED),
        };
        // Subpages: none, or all of them.
        if subpage != 0 && subpage != 0xff {
            return Err(Sense::INVALID_FIELD_IN_CDB);
        }
        let s = self.lock();
        let pages = match page {
            0x08 => caching(&s, control_value),
            0x0a => control(&s, control_value),
            0x1c => exceptions(),
            0x3f => [caching(&s, control_value), control(&s, control_value), exceptions()].concat(),
            _ => return Err(Sense::INVALID_FIELD_IN_CDB),
        };
        drop(s);
        let block_descriptor = cdb.u8(1) & 8 == 0;
        let long = !six && cdb.u8(1) & 0x10 != 0;
        let mut descriptor = Vec::new();
        if block_descriptor && long {
            descriptor.extend_from_slice(&self.blocks().to_be_bytes());
            descriptor.extend_from_slice(&[0; 4]);
            descriptor.extend_from_slice(&(self.sector() as u32).to_be_bytes());
        } else if block_descriptor {
            descriptor.extend_from_slice(&u32::try_from(self.blocks()).unwrap_or(u32::MAX).to_be_bytes());
            descriptor.extend_from_slice(&(self.sector() as u32).to_be_bytes());
        }
        // Device-specific parameter, SBC-3 6.5.1: write protection and "FUA is understood".
        let specific = if self.disk.info().read_only { 0x80 } else { 0 } | 0x10;
        let total = descriptor.len() + pages.len();
        let mut out = if six {
            vec![(total + 3) as u8, 0, specific, descriptor.len() as u8]
        } else {
            let len = ((total + 6) as u16).to_be_bytes();
            let d = (descriptor.len() as u16).to_be_bytes();
            vec![len[0], len[1], 0, specific, u8::from(long), 0, d[0], d[1]]
        };
        out.extend(descriptor);
        out.extend(pages);
        Ok(out)
    }

    pub(super) fn mode_select(&self, cdb: &Cdb, list: &[u8], initiator: Initiator) -> Result<(), Sense> {
        let six = cdb.opcode() == op::MODE_SELECT_6;
        // PF must be set (page format), SP not (nothing is saved).
        if cdb.u8(1) & 0x10 == 0 || cdb.u8(1) & 1 != 0 {
            return Err(Sense::INVALID_FIELD_IN_CDB);
        }
        if list.is_empty() {
            return Ok(());
        }
        let head = if six { 4 } else { 8 };
        if list.len() < head {
            return Err(Sense::PARAMETER_LIST_LENGTH_ERROR);
        }
        let descriptor = if six { usize::from(list[3]) } else { usize::from(u16::from_be_bytes([list[6], list[7]])) };
        let mut rest = list.get(head + descriptor..).ok_or(Sense::PARAMETER_LIST_LENGTH_ERROR)?;
        if !matches!(descriptor, 0 | 8 | 16) {
            return Err(Sense::INVALID_FIELD_IN_PARAMETER_LIST);
        }
        let mut s = self.lock();
        let (mut write_cache, mut descriptor_sense) = (s.write_cache, s.descriptor_sense);
        while !rest.is_empty() {
            let len = 2 + usize::from(*rest.get(1).ok_or(Sense::PARAMETER_LIST_LENGTH_ERROR)?);
            let page = rest.get(..len).ok_or(Sense::PARAMETER_LIST_LENGTH_ERROR)?;
            let (current, changeable) = match page[0] & 0x3f {
                0x08 => (caching(&s, Control::Current), caching(&s, Control::Changeable)),
                0x0a => (control(&s, Control::Current), control(&s, Control::Changeable)),
                0x1c => (exceptions(), vec![0; 12]),
                _ => return Err(Sense::INVALID_FIELD_IN_PARAMETER_LIST),
            };
            if page.len() != current.len() {
                return Err(Sense::INVALID_FIELD_IN_PARAMETER_LIST);
            }
            // Only what is changeable may differ from what is (SPC-4 6.9).
            for i in 2..page.len() {
                if (page[i] ^ current[i]) & !changeable[i] != 0 {
                    return Err(Sense::INVALID_FIELD_IN_PARAMETER_LIST);
                }
            }
            match page[0] & 0x3f {
                0x08 => write_cache = page[2] & 4 != 0,
                0x0a => descriptor_sense = page[2] & 4 != 0,
                _ => {}
            }
            rest = &rest[len..];
        }
        if (write_cache, descriptor_sense) != (s.write_cache, s.descriptor_sense) {
            (s.write_cache, s.descriptor_sense) = (write_cache, descriptor_sense);
            s.attention_for_all(Sense::MODE_PARAMETERS_CHANGED, Some(initiator));
        }
        Ok(())
    }
}
