//! Who receives an interrupt message.

use super::{Lapic, Message, bit, mode};
use partition::{Msi, VpIndex};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// All local APICs of a partition.
pub struct ApicBus {
    pub(super) lapics: Box<[Arc<Lapic>]>,
    /// Rotates among equals for lowest-priority delivery.
    turn: AtomicU32,
}

impl ApicBus {
    /// A bus with these APICs, by VP number.
    pub fn new(lapics: Box<[Arc<Lapic>]>) -> Self {
        Self { lapics, turn: AtomicU32::new(0) }
    }

    /// The APIC of a VP.
    pub fn lapic(&self, vp: VpIndex) -> Option<&Arc<Lapic>> {
        self.lapics.get(vp as usize)
    }

    /// Delivers a message to its destinations.
    pub fn deliver(&self, m: &Message) {
        if m.mode == mode::LOWEST {
            if let Some(target) = self.lowest_priority(m) {
                target.receive(m);
            }
            return;
        }
        for target in self.lapics.iter().filter(|t| t.matches(m)) {
            target.receive(m);
        }
    }

    /// Delivers an MSI (SDM volume 3, section 10.11).
    pub fn deliver_msi(&self, msi: Msi) {
        if msi.address as u32 >> 20 != 0xfee {
            return;
        }
        let destination = (msi.address >> 12 & 0xff) as u32 | (msi.address >> 32) as u32 & !0xff;
        let redirect = msi.address & 8 != 0;
        let level = msi.data & bit::LEVEL_TRIGGER != 0;
        if level && msi.data & bit::ASSERT == 0 {
            return;
        }
        let mode = msi.data >> 8 & 7;
        self.deliver(&Message {
            destination,
            logical: msi.address & 4 != 0,
            // The redirection hint asks for one receiver of a fixed interrupt.
            mode: if redirect && mode == mode::FIXED && msi.address & 4 != 0 { mode::LOWEST } else { mode },
            vector: msi.data as u8,
            level,
        });
    }

    fn lowest_priority(&self, m: &Message) -> Option<&Arc<Lapic>> {
        let start = self.turn.fetch_add(1, Ordering::Relaxed) as usize % self.lapics.len().max(1);
        let (tail, head) = self.lapics.split_at(start);
        head.iter().chain(tail).filter(|t| t.software_enabled() && t.matches(m)).min_by_key(|t| t.ppr() & 0xf0)
    }
}
