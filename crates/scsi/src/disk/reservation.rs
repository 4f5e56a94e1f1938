//! Persistent reservations (SPC-4 5.13, 6.15, 6.16): what clusters use to fence each other's disks.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{DiskState, MAX_INITIATORS};
use crate::cdb::Cdb;
use crate::protocol::{Sense, op};
use crate::target::Initiator;

/// Reservation types (SPC-4 table 56).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Kind {
    WriteExclusive = 1,
    ExclusiveAccess = 3,
    WriteExclusiveRegistrantsOnly = 5,
    ExclusiveAccessRegistrantsOnly = 6,
    WriteExclusiveAllRegistrants = 7,
    ExclusiveAccessAllRegistrants = 8,
}

impl Kind {
    fn from_code(c: u8) -> Option<Self> {
        Some(match c {
            1 => Self::WriteExclusive,
            3 => Self::ExclusiveAccess,
            5 => Self::WriteExclusiveRegistrantsOnly,
            6 => Self::ExclusiveAccessRegistrantsOnly,
            7 => Self::WriteExclusiveAllRegistrants,
            8 => Self::ExclusiveAccessAllRegistrants,
            _ => return None,
        })
    }
    fn all_registrants(self) -> bool {
        matches!(self, Self::WriteExclusiveAllRegistrants | Self::ExclusiveAccessAllRegistrants)
    }
    fn for_registrants(self) -> bool {
        self.all_registrants()
            || matches!(self, Self::WriteExclusiveRegistrantsOnly | Self::ExclusiveAccessRegistrantsOnly)
    }
    fn excludes_reads(self) -> bool {
        matches!(
            self,
            Self::ExclusiveAccess | Self::ExclusiveAccessRegistrantsOnly | Self::ExclusiveAccessAllRegistrants
        )
    }
}

/// Registrations and the reservation of a unit.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Reservations {
    generation: u32,
    keys: BTreeMap<Initiator, u64>,
    /// The holder is nobody in particular for the all-registrants types.
    reservation: Option<(Kind, Option<Initiator>)>,
}

/// Why PERSISTENT RESERVE OUT is refused.
pub(super) enum Refused {
    Sense(Sense),
    Conflict,
}

impl From<Sense> for Refused {
    fn from(s: Sense) -> Self {
        Self::Sense(s)
    }
}

impl Reservations {
    fn holds(&self, i: Initiator) -> bool {
        match self.reservation {
            Some((k, _)) if k.all_registrants() => self.keys.contains_key(&i),
            Some((_, holder)) => holder == Some(i),
            None => false,
        }
    }

    /// Whether a command may be executed (SPC-4 table 47, SBC-3 table 12).
    pub fn allows(&self, i: Initiator, cdb: &Cdb) -> bool {
        let Some((kind, _)) = self.reservation else { return true };
        if self.holds(i) || (kind.for_registrants() && self.keys.contains_key(&i)) {
            return true;
        }
        match cdb.opcode() {
            op::READ_6
            | op::READ_10
            | op::READ_12
            | op::READ_16
            | op::VERIFY_10
            | op::VERIFY_12
            | op::VERIFY_16
            | op::MODE_SENSE_6
            | op::MODE_SENSE_10 => !kind.excludes_reads(),
            op::WRITE_6
            | op::WRITE_10
            | op::WRITE_12
            | op::WRITE_16
            | op::WRITE_AND_VERIFY_10
            | op::WRITE_AND_VERIFY_12
            | op::WRITE_AND_VERIFY_16
            | op::WRITE_SAME_10
            | op::WRITE_SAME_16
            | op::UNMAP
            | op::SYNCHRONIZE_CACHE_10
            | op::SYNCHRONIZE_CACHE_16
            | op::MODE_SELECT_6
            | op::MODE_SELECT_10
            | op::SEND_DIAGNOSTIC => false,
            // START is allowed, stopping is not.
            op::START_STOP_UNIT => cdb.u8(4) & 0xf1 == 1,
            op::PREVENT_ALLOW_MEDIUM_REMOVAL => cdb.u8(4) & 1 == 0,
            _ => true,
        }
    }

    pub fn reserve_in(&self, cdb: &Cdb) -> Result<Vec<u8>, Sense> {
        let mut out = self.generation.to_be_bytes().to_vec();
        let mut body = Vec::new();
        match cdb.service_action() {
            0 => self.keys.values().for_each(|k| body.extend_from_slice(&k.to_be_bytes())),
            1 => {
                if let Some((kind, holder)) = self.reservation {
                    let key = holder.and_then(|h| self.keys.get(&h)).copied().unwrap_or(0);
                    body.extend_from_slice(&key.to_be_bytes());
                    body.extend_from_slice(&[0, 0, 0, 0, 0, kind as u8, 0, 0]);
                }
            }
            2 => {
                // REPORT CAPABILITIES: all six types; nothing persists through power loss.
                return Ok(vec![0, 8, 0, 0x80, 0xea, 0x01, 0, 0]);
            }
            3 => {
                for (&i, key) in &self.keys {
                    let mut d = [0; 24];
                    d[..8].copy_from_slice(&key.to_be_bytes());
                    if let (true, Some((kind, _))) = (self.holds(i), self.reservation) {
                        (d[12], d[13]) = (1, kind as u8);
                    }
                    d[18..20].copy_from_slice(&(i as u16).to_be_bytes());
                    body.extend_from_slice(&d);
                }
            }
            _ => return Err(Sense::INVALID_FIELD_IN_CDB),
        }
        out.extend_from_slice(&(body.len() as u32).to_be_bytes());
        out.extend(body);
        Ok(out)
    }
}

/// PERSISTENT RESERVE OUT (SPC-4 6.16).
pub(super) fn reserve_out(s: &mut DiskState, cdb: &Cdb, list: &[u8], me: Initiator) -> Result<(), Refused> {
    let action = cdb.service_action();
    if list.len() != 24 {
        return Err(Sense::PARAMETER_LIST_LENGTH_ERROR.into());
    }
    let key = u64::from_be_bytes(list[..8].try_into().unwrap_or_default());
    let service_key = u64::from_be_bytes(list[8..16].try_into().unwrap_or_default());
    let flags = list[20];
    // SPEC_I_PT, ALL_TG_PT and APTPL are not offered (see REPORT CAPABILITIES).
    if flags & 0x0d != 0 {
        return Err(Sense::INVALID_FIELD_IN_PARAMETER_LIST.into());
    }
    let scope_and_type = || {
        let kind = Kind::from_code(cdb.u8(2) & 0xf).filter(|_| cdb.u8(2) >> 4 == 0);
        kind.ok_or(Refused::Sense(Sense::INVALID_FIELD_IN_CDB))
    };
    let registered = s.reservations.keys.get(&me).copied();
    if action != 0 && action != 6 && (registered.is_none() || registered != Some(key)) {
        return Err(Refused::Conflict);
    }
    match action {
        // REGISTER, REGISTER AND IGNORE EXISTING KEY
        0 | 6 => {
            if action == 0 && registered.unwrap_or(0) != key {
                return Err(Refused::Conflict);
            }
            if service_key == 0 {
                if registered.is_some() {
                    unregister(s, me);
                    s.reservations.generation = s.reservations.generation.wrapping_add(1);
                }
                return Ok(());
            }
            if registered.is_none() && s.reservations.keys.len() >= MAX_INITIATORS {
                return Err(Sense::INSUFFICIENT_REGISTRATION_RESOURCES.into());
            }
            s.reservations.keys.insert(me, service_key);
            s.reservations.generation = s.reservations.generation.wrapping_add(1);
        }
        // RESERVE
        1 => {
            let kind = scope_and_type()?;
            match s.reservations.reservation {
                None => {
                    s.reservations.reservation = Some((kind, (!kind.all_registrants()).then_some(me)));
                }
                Some((k, _)) if s.reservations.holds(me) && k == kind => {}
                Some(_) => return Err(Refused::Conflict),
            }
        }
        // RELEASE
        2 => {
            let kind = scope_and_type()?;
            if !s.reservations.holds(me) {
                return Ok(());
            }
            if s.reservations.reservation.map(|r| r.0) != Some(kind) {
                return Err(Sense::INVALID_RELEASE_OF_RESERVATION.into());
            }
            release(s, me);
        }
        // CLEAR
        3 => {
            let others: Vec<_> = s.reservations.keys.keys().copied().filter(|&i| i != me).collect();
            s.reservations.keys.clear();
            s.reservations.reservation = None;
            s.reservations.generation = s.reservations.generation.wrapping_add(1);
            for i in others {
                s.attention_for(i, Sense::RESERVATIONS_PREEMPTED);
            }
        }
        // PREEMPT, PREEMPT AND ABORT (commands in flight end by themselves)
        4 | 5 => preempt(s, scope_and_type()?, service_key, me)?,
        _ => return Err(Sense::INVALID_FIELD_IN_CDB.into()),
    }
    Ok(())
}

fn unregister(s: &mut DiskState, me: Initiator) {
    let held = s.reservations.holds(me);
    s.reservations.keys.remove(&me);
    let last_of_all =
        s.reservations.reservation.is_some_and(|(k, _)| k.all_registrants()) && s.reservations.keys.is_empty();
    let sole_holder = held && s.reservations.reservation.is_some_and(|(k, _)| !k.all_registrants());
    if last_of_all || sole_holder {
        release(s, me);
    }
}

/// Ends the reservation; the other registrants of a registrants-only reservation are told (SPC-4 5.13.11.2.2).
fn release(s: &mut DiskState, me: Initiator) {
    let Some((kind, _)) = s.reservations.reservation.take() else { return };
    if kind.for_registrants() {
        let others: Vec<_> = s.reservations.keys.keys().copied().filter(|&i| i != me).collect();
        for i in others {
            s.attention_for(i, Sense::RESERVATIONS_RELEASED);
        }
    }
}

fn preempt(s: &mut DiskState, kind: Kind, victim_key: u64, me: Initiator) -> Result<(), Refused> {
    let all = s.reservations.reservation.is_some_and(|(k, _)| k.all_registrants());
    let holder_key = match s.reservations.reservation {
        Some((_, Some(h))) => s.reservations.keys.get(&h).copied(),
        _ => None,
    };
    if victim_key == 0 && !all {
        return Err(Sense::INVALID_FIELD_IN_PARAMETER_LIST.into());
    }
    let takes_over = (all && victim_key == 0) || (holder_key.is_some() && holder_key == Some(victim_key));
    let victims: Vec<_> = s
        .reservations
        .keys
        .iter()
        .filter(|&(&i, &k)| i != me && (k == victim_key || (all && victim_key == 0)))
        .map(|(&i, _)| i)
        .collect();
    let own = s.reservations.keys.get(&me) == Some(&victim_key);
    if victims.is_empty() && !takes_over && !own {
        return Err(Refused::Conflict);
    }
    for &v in &victims {
        s.reservations.keys.remove(&v);
        s.attention_for(v, Sense::REGISTRATIONS_PREEMPTED);
    }
    s.reservations.generation = s.reservations.generation.wrapping_add(1);
    if takes_over {
        let old = s.reservations.reservation.map(|r| r.0);
        s.reservations.reservation = Some((kind, (!kind.all_registrants()).then_some(me)));
        if old != Some(kind) {
            let others: Vec<_> = s.reservations.keys.keys().copied().filter(|&i| i != me).collect();
            for i in others {
                s.attention_for(i, Sense::RESERVATIONS_RELEASED);
            }
        }
    }
    Ok(())
}
