//! Saved state.

use crate::defs::{FIRST_VALID_VECTOR, MESSAGE_PAYLOAD, TIMER_COUNT, sint};
use crate::hv::{HvPartition, TimerId};
use crate::synic::VpSynic;
use partition::Ticks100ns;
use serde::{Deserialize, Serialize};

/// Registers that the partition has once.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Global {
    pub(crate) guest_os_id: u64,
    pub(crate) hypercall: u64,
    pub(crate) reference_tsc: u64,
    pub(crate) crash: [u64; 5],
    /// Crash reports of this boot; after a few, no more are passed on.
    pub(crate) crashes: u32,
}

/// Complete state of an [`HvPartition`]. Ports are not part of it: who registered them registers them again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HvState {
    version: u32,
    global: Global,
    vps: Vec<VpSynic>,
    reference_time: Ticks100ns,
    tsc_sequence: u32,
    tsc_frequency_hz: u64,
}

/// Version of [`HvState`].
const VERSION: u32 = 1;

/// Why a state cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum HvRestoreError {
    /// Made by another version.
    #[error("saved Hyper-V state has version {0}, this program reads version {VERSION}")]
    Version(u32),
    /// Made with another number of VPs.
    #[error("saved Hyper-V state has {saved} VPs, the machine has {here}")]
    VpCount {
        /// In the state.
        saved: usize,
        /// In the configuration.
        here: u32,
    },
    /// Not a state that a running partition can have.
    #[error("saved Hyper-V state is damaged: {0}")]
    Damaged(&'static str),
}

impl HvPartition {
    /// Takes the state. VPs must not run and the clock must stand.
    pub fn save(&self) -> HvState {
        let (reference_time, tsc_sequence) = self.time.save();
        let vps = (0..self.config.vp_count).filter_map(|vp| self.vp_state(vp).map(|s| s.clone())).collect();
        HvState {
            version: VERSION,
            global: self.global().clone(),
            vps,
            reference_time,
            tsc_sequence,
            tsc_frequency_hz: self.time.frequency_hz(),
        }
    }

    /// Loads a state. Guest memory and the clock ([`partition::Clock::set`]) must have been loaded before; the clock
    /// stands. If the host's TSC has another frequency, the guest's reference TSC page is written anew; reference time
    /// goes on without a jump either way.
    pub fn restore(&self, state: &HvState) -> Result<(), HvRestoreError> {
        if state.version != VERSION {
            return Err(HvRestoreError::Version(state.version));
        }
        if state.vps.len() != self.config.vp_count as usize {
            return Err(HvRestoreError::VpCount { saved: state.vps.len(), here: self.config.vp_count });
        }
        for vp in &state.vps {
            if vp.queues.iter().flatten().any(|m| m.payload.len() > MESSAGE_PAYLOAD) {
                return Err(HvRestoreError::Damaged("a message is longer than 240 bytes"));
            }
            let bad_sint = |v: &u64| v & sint::MASKED == 0 && v & sint::VECTOR < u64::from(FIRST_VALID_VECTOR);
            if vp.sints.iter().any(bad_sint) {
                return Err(HvRestoreError::Damaged("a SINT has a vector below 16"));
            }
        }
        self.time.restore(state.reference_time, state.tsc_sequence);
        *self.global() = state.global.clone();
        self.write_tsc_page(state.global.reference_tsc);
        for (vp, saved) in (0..).zip(&state.vps) {
            let Some(mut synic) = self.vp_state(vp) else { continue };
            *synic = saved.clone();
            for timer in 0..TIMER_COUNT as u8 {
                synic.rearm(self, TimerId { vp, timer });
            }
            let vectors = synic.auto_eoi_vectors();
            drop(synic);
            if self.config.abilities.auto_eoi
                && let Some(partition) = self.partition()
            {
                partition.set_auto_eoi(vp, vectors);
            }
        }
        Ok(())
    }
}

impl VpSynic {
    /// Arms the service for a timer's next expiration, without expiring it.
    fn rearm(&mut self, hv: &HvPartition, id: TimerId) {
        // The clock stands while a state is loaded, so that a timer that is due now expires after the start.
        let deadline = self.timer_deadline(id);
        hv.config.timers.arm(id, deadline.map(|time| hv.time.tsc_at(time)));
    }
}
