//! Guest memory as KVM's memory slots, and the pages that KVM has seen written.

use crate::sys::host;
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use partition::{Access, EngineError, GuestMemory};
use x86::paging::PAGE_SIZE;

/// One memory slot.
#[derive(Clone, Debug)]
struct Slot {
    number: u32,
    gpa: u64,
    len: u64,
    host: u64,
    read_only: bool,
    /// Pages that KVM has reported and nobody has asked for yet (its report clears its own record).
    dirty: Vec<u64>,
}

impl Slot {
    fn same_mapping(&self, other: &Slot) -> bool {
        (self.gpa, self.len, self.host, self.read_only) == (other.gpa, other.len, other.host, other.read_only)
    }
    fn pages(&self) -> u64 {
        self.len / PAGE_SIZE
    }
}

/// All slots of a partition.
#[derive(Default)]
pub struct Slots {
    slots: Vec<Slot>,
    logging: bool,
}

impl Slots {
    fn set(&self, vm: &VmFd, slot: &Slot, len: u64) -> Result<(), EngineError> {
        let mut flags = 0;
        if slot.read_only {
            flags |= KVM_MEM_READONLY;
        } else if self.logging {
            flags |= KVM_MEM_LOG_DIRTY_PAGES;
        }
        let region = kvm_userspace_memory_region {
            slot: slot.number,
            flags,
            guest_phys_addr: slot.gpa,
            memory_size: len,
            userspace_addr: slot.host,
        };
        // SAFETY: the range is part of a `MemoryBlock`, which `GuestMemory` keeps mapped for as long as itself, and the
        // partition that owns this VM keeps the `GuestMemory`.
        unsafe { vm.set_user_memory_region(region) }.map_err(host("KVM_SET_USER_MEMORY_REGION"))
    }

    /// Makes KVM's slots equal to the mappings. When it returns, no VP uses the old ones.
    pub fn update(&mut self, vm: &VmFd, memory: &GuestMemory) -> Result<(), EngineError> {
        let wanted: Vec<Slot> = memory
            .mappings()
            .iter()
            .map(|m| Slot {
                number: 0,
                gpa: m.gpa.0,
                len: m.len,
                host: m.block.as_ptr().addr() as u64 + m.offset,
                read_only: m.access == Access::Rom,
                dirty: Vec::new(),
            })
            .collect();
        // KVM changes no slot in place: what is not wanted goes first.
        let (kept, gone): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.slots).into_iter().partition(|s| wanted.iter().any(|w| w.same_mapping(s)));
        self.slots = kept;
        for slot in gone {
            self.set(vm, &slot, 0)?;
        }
        for mut slot in wanted {
            if self.slots.iter().any(|s| s.same_mapping(&slot)) {
                continue;
            }
            slot.number = (0..).find(|n| self.slots.iter().all(|s| s.number != *n)).unwrap_or(0);
            self.set(vm, &slot, slot.len)?;
            self.slots.push(slot);
        }
        Ok(())
    }

    /// Switches KVM's own dirty log.
    pub fn set_logging(&mut self, vm: &VmFd, on: bool) -> Result<(), EngineError> {
        self.logging = on;
        for i in 0..self.slots.len() {
            let slot = self.slots[i].clone();
            self.set(vm, &slot, slot.len)?;
            self.slots[i].dirty.clear();
        }
        Ok(())
    }

    /// Adds the pages that guests have written to `bits` (bit 0 of word 0 is the page at `gpa`) and forgets them.
    pub fn take_dirty(&mut self, vm: &VmFd, gpa: u64, pages: u64, bits: &mut [u64]) -> Result<(), EngineError> {
        if !self.logging {
            return Ok(());
        }
        let end = gpa.saturating_add(pages.saturating_mul(PAGE_SIZE));
        for slot in &mut self.slots {
            if slot.read_only || slot.gpa >= end || slot.gpa + slot.len <= gpa {
                continue;
            }
            let fresh = vm.get_dirty_log(slot.number, slot.len as usize).map_err(host("KVM_GET_DIRTY_LOG"))?;
            let words = slot.pages().div_ceil(64) as usize;
            slot.dirty.resize(words, 0);
            for (old, new) in slot.dirty.iter_mut().zip(fresh) {
                *old |= new;
            }
            let first = gpa.max(slot.gpa);
            let last = end.min(slot.gpa + slot.len);
            for at in (first..last).step_by(PAGE_SIZE as usize) {
                let inside = (at - slot.gpa) / PAGE_SIZE;
                let word = &mut slot.dirty[inside as usize / 64];
                let mask = 1u64 << (inside % 64);
                if *word & mask != 0 {
                    *word &= !mask;
                    let n = (at - gpa) / PAGE_SIZE;
                    if let Some(out) = bits.get_mut(n as usize / 64) {
                        *out |= 1 << (n % 64);
                    }
                }
            }
        }
        Ok(())
    }
}
