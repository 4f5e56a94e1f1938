//! The synthetic interrupt controller of one VP: message slots, event flags, SINTs (TLFS chapter 11).

use crate::defs::{
    EVENT_FLAG_COUNT, FIRST_VALID_VECTOR, MESSAGE_PAYLOAD, MESSAGE_SIZE, Message, PAGE_ADDRESS, PAGE_ENABLE,
    SINT_COUNT, TIMER_COUNT, sint,
};
use crate::hv::HvPartition;
use crate::timers::Timer;
use partition::{Gpa, GuestMemory};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::sync::atomic::Ordering;

/// Messages that may wait for one SINT. VMBus sends one offer for each of at most 2047 channels in a row.
const QUEUE_LIMIT: usize = 4096;

/// Too many messages wait: the guest does not take them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{QUEUE_LIMIT} messages wait for the guest already, or the VP or SINT does not exist")]
pub struct QueueFull;

/// What a change asks of the engine, once the VP's lock is released.
#[derive(Default)]
pub(crate) struct Actions {
    /// Interrupts for the VP.
    pub(crate) vectors: Vec<u8>,
    /// New set of auto-EOI vectors.
    pub(crate) auto_eoi: Option<[u64; 4]>,
}

/// Registers and queues.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct VpSynic {
    pub(crate) scontrol: u64,
    pub(crate) siefp: u64,
    pub(crate) simp: u64,
    pub(crate) vp_assist: u64,
    pub(crate) sints: [u64; SINT_COUNT],
    pub(crate) queues: [VecDeque<Message>; SINT_COUNT],
    pub(crate) timers: [Timer; TIMER_COUNT],
}

impl Default for VpSynic {
    fn default() -> Self {
        Self {
            scontrol: 0,
            siefp: 0,
            simp: 0,
            vp_assist: 0,
            sints: [sint::RESET; SINT_COUNT],
            queues: Default::default(),
            timers: Default::default(),
        }
    }
}

/// The page of a SIMP or SIEFP register, if enabled.
fn page(register: u64) -> Option<Gpa> {
    (register & PAGE_ENABLE != 0).then_some(Gpa(register & PAGE_ADDRESS))
}

impl VpSynic {
    fn enabled(&self) -> bool {
        self.scontrol & 1 != 0
    }

    /// The vector of a SINT that may interrupt.
    fn vector(&self, index: usize) -> Option<u8> {
        let value = self.sints[index];
        let vector = (value & sint::VECTOR) as u8;
        (value & (sint::MASKED | sint::POLLING) == 0 && vector >= FIRST_VALID_VECTOR).then_some(vector)
    }

    /// Writes SCONTROL, SIMP, SIEFP (already validated) or a SINT; what waits is delivered if it can be now.
    pub(crate) fn changed(&mut self, hv: &HvPartition, actions: &mut Actions) {
        for index in 0..SINT_COUNT {
            self.deliver(hv, index, actions);
        }
    }

    /// Writes a SINT register. `false`: the value is not allowed.
    pub(crate) fn write_sint(&mut self, hv: &HvPartition, index: usize, value: u64, actions: &mut Actions) -> bool {
        let value = value & (sint::VECTOR | sint::MASKED | sint::AUTO_EOI | sint::POLLING);
        if value & sint::MASKED == 0 && (value & sint::VECTOR) < u64::from(FIRST_VALID_VECTOR) {
            return false;
        }
        self.sints[index] = value;
        if hv.config.abilities.auto_eoi {
            actions.auto_eoi = Some(self.auto_eoi_vectors());
        }
        self.deliver(hv, index, actions);
        true
    }

    /// Vectors of unmasked auto-EOI SINTs, one bit each.
    pub(crate) fn auto_eoi_vectors(&self) -> [u64; 4] {
        let mut vectors = [0u64; 4];
        for value in self.sints {
            if value & (sint::MASKED | sint::AUTO_EOI) == sint::AUTO_EOI {
                let vector = value & sint::VECTOR;
                vectors[(vector / 64) as usize] |= 1 << (vector % 64);
            }
        }
        vectors
    }

    pub(crate) fn post(
        &mut self,
        hv: &HvPartition,
        index: u8,
        message: Message,
        actions: &mut Actions,
    ) -> Result<(), QueueFull> {
        let queue = self.queues.get_mut(usize::from(index)).ok_or(QueueFull)?;
        if queue.len() >= QUEUE_LIMIT || message.payload.len() > MESSAGE_PAYLOAD {
            return Err(QueueFull);
        }
        queue.push_back(message);
        self.deliver(hv, usize::from(index), actions);
        Ok(())
    }

    /// End of message: the guest has emptied a slot that was flagged "pending".
    pub(crate) fn end_of_message(&mut self, hv: &HvPartition, actions: &mut Actions) {
        self.changed(hv, actions);
    }

    /// Moves what waits for a SINT into its slot, if the slot is free: at most one message.
    pub(crate) fn deliver(&mut self, hv: &HvPartition, index: usize, actions: &mut Actions) {
        // A timer's message counts as waiting behind the queue.
        let timer = self.waiting_timer(index);
        if self.queues[index].is_empty() && timer.is_none() {
            return;
        }
        if !self.enabled() || self.sints[index] & sint::MASKED != 0 {
            return;
        }
        let Some(simp) = page(self.simp) else { return };
        let slot = simp + (index * MESSAGE_SIZE) as u64;
        let memory = &*hv.config.memory;
        match slot_is_free(memory, slot) {
            Some(true) => {}
            Some(false) => return,
            None => return,
        }
        let message = match self.queues[index].pop_front() {
            Some(message) => message,
            None => match timer {
                Some(timer) => self.take_timer_message(hv, timer),
                None => return,
            },
        };
        let more = !self.queues[index].is_empty() || self.waiting_timer(index).is_some();
        // The page was mapped a moment ago; if it is gone, the guest took its own message page away.
        if write_slot(memory, slot, &message, more).is_ok()
            && let Some(vector) = self.vector(index)
        {
            actions.vectors.push(vector);
        }
    }

    pub(crate) fn signal(&mut self, hv: &HvPartition, index: u8, flag: u16, actions: &mut Actions) -> bool {
        if !HvPartition::valid_sint(index) || flag >= EVENT_FLAG_COUNT || !self.enabled() {
            return false;
        }
        let Some(siefp) = page(self.siefp) else { return false };
        let word = siefp + u64::from(index) * 256 + u64::from(flag / 64) * 8;
        let bit = 1u64 << (flag % 64);
        match hv.config.memory.fetch_or_u64(word, bit) {
            Ok(old) => {
                if old & bit == 0
                    && let Some(vector) = self.vector(usize::from(index))
                {
                    actions.vectors.push(vector);
                }
                true
            }
            Err(_) => false,
        }
    }
}

/// Is the slot free? If not, it is flagged "pending", so that the guest writes EOM when it has emptied it. `None`: the
/// page is not there.
fn slot_is_free(memory: &GuestMemory, slot: Gpa) -> Option<bool> {
    if memory.load_u32(slot, Ordering::SeqCst).ok()? == 0 {
        return Some(true);
    }
    // Byte 5 of the header holds the flags; bit 0 is "message pending".
    memory.fetch_or_u16(slot + 4, 1 << 8).ok()?;
    // The guest may have emptied the slot before it could see the flag: then it will not write EOM.
    Some(memory.load_u32(slot, Ordering::SeqCst).ok()? == 0)
}

/// Writes a message; its type last, because a non-zero type tells the guest that the slot is full.
fn write_slot(memory: &GuestMemory, slot: Gpa, message: &Message, more: bool) -> Result<(), partition::MemoryError> {
    let mut bytes = [0u8; MESSAGE_SIZE];
    // The payload has at most 240 bytes, which was checked when the message was queued.
    let len = message.payload.len().min(MESSAGE_PAYLOAD);
    bytes[4] = len as u8;
    bytes[5] = u8::from(more);
    bytes[8..16].copy_from_slice(&message.sender.to_le_bytes());
    bytes[16..16 + len].copy_from_slice(&message.payload[..len]);
    memory.write(slot + 4, &bytes[4..])?;
    memory.store_u32(slot, message.message_type, Ordering::SeqCst)
}
