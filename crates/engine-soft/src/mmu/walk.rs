//! Page walks: 32-bit, PAE and 4-level paging (SDM volume 3, chapter 4).

use super::Class;
use crate::vp::{Exec, Fault, SoftVp};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use x86::exception::pf;
use x86::paging::{self, A, D, G, NX, P, PAGE_MASK, PS, RW, US};
use x86::regs::{cr0, cr4, efer};

/// What an access wants of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Intent {
    /// Data read.
    Read,
    /// Data write (or a read that will be followed by a write).
    Write,
    /// Instruction fetch.
    Fetch,
}

/// A completed walk.
#[derive(Clone, Copy, Debug)]
pub struct Walked {
    /// Physical address.
    pub gpa: u64,
    /// This class of access may write, and the page's D bit is set: a write needs no further walk.
    pub write: bool,
    /// Global page.
    pub global: bool,
    /// log2 of the page size.
    pub shift: u32,
}

/// What [`SoftVp::peek`] has found.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Peeked {
    /// Physical address.
    pub(crate) gpa: u64,
    /// Writable, and the D bit is set.
    pub(crate) write: bool,
    /// Executable.
    pub(crate) execute: bool,
    /// log2 of the page size.
    pub(crate) shift: u32,
}

/// The shape of a paging mode.
#[derive(Clone, Copy)]
struct Format {
    /// Levels to walk in memory.
    levels: u32,
    /// Bytes of an entry (4 or 8).
    entry: u64,
    /// Index bits of a level.
    bits: u32,
}

const FOUR_LEVEL: Format = Format { levels: 4, entry: 8, bits: 9 };
const PAE: Format = Format { levels: 2, entry: 8, bits: 9 };
const TWO_LEVEL: Format = Format { levels: 2, entry: 4, bits: 10 };

/// An entry that a walk went through, for its A and D bits.
#[derive(Clone, Copy, Default)]
struct Step {
    gpa: u64,
    value: u64,
}

impl SoftVp {
    /// Translates a linear address, with all checks; sets accessed and dirty bits if the access is allowed.
    pub(super) fn walk(&mut self, la: u64, intent: Intent, class: Class) -> Exec<Walked> {
        if self.s.cr0 & cr0::PG == 0 {
            return Ok(Walked { gpa: la & 0xffff_ffff & self.mmu.a20_mask, write: true, global: false, shift: 12 });
        }
        loop {
            // An entry that changes under the walk makes it start again.
            if let Some(walked) = self.try_walk(la, intent, class)? {
                return Ok(walked);
            }
        }
    }

    fn try_walk(&mut self, la: u64, intent: Intent, class: Class) -> Exec<Option<Walked>> {
        let (format, mut table, mut rights) = match self.walk_root(la)? {
            Some(root) => root,
            None => return Err(self.page_fault(la, 0, intent, class)),
        };
        let mut steps = [Step::default(); 4];
        let mut count = 0;
        let mut level = format.levels;
        loop {
            let shift = 12 + format.bits * (level - 1);
            let index = (la >> shift) & ((1 << format.bits) - 1);
            let gpa = (table + index * format.entry) & self.mmu.a20_mask;
            let value = self.read_entry(gpa, format.entry);
            if value & P == 0 {
                return Err(self.page_fault(la, 0, intent, class));
            }
            let leaf = level == 1 || (value & PS != 0 && self.large_allowed(format, level));
            if value & self.reserved(format, level, leaf) != 0 {
                return Err(self.page_fault(la, pf::PRESENT | pf::RSVD, intent, class));
            }
            rights = Rights {
                user: rights.user && value & US != 0,
                write: rights.write && value & RW != 0,
                nx: rights.nx || (format.entry == 8 && value & NX != 0),
            };
            steps[count] = Step { gpa, value };
            count += 1;
            if leaf {
                let base = frame(format, shift, value);
                return self.finish(la, intent, class, rights, &steps[..count], base, shift, format.entry);
            }
            table = value & entry_address_mask(format);
            level -= 1;
        }
    }

    /// What ring 3 may do at `la` without a change of the page tables, which are 4-level ones: the walk sets no A or D bit, and
    /// finds nothing where one would have to be set.
    pub(crate) fn peek(&mut self, la: u64) -> Option<Peeked> {
        let mut table = self.s.cr3 & 0x000f_ffff_ffff_f000;
        let (mut write, mut execute) = (true, true);
        for level in (1..=FOUR_LEVEL.levels).rev() {
            let shift = 12 + FOUR_LEVEL.bits * (level - 1);
            let index = (la >> shift) & ((1 << FOUR_LEVEL.bits) - 1);
            let value = self.read_entry((table + index * 8) & self.mmu.a20_mask, 8);
            let leaf = level == 1 || (value & PS != 0 && self.large_allowed(FOUR_LEVEL, level));
            let wanted = P | US | A;
            if value & wanted != wanted || value & self.reserved(FOUR_LEVEL, level, leaf) != 0 {
                return None;
            }
            write &= value & RW != 0;
            execute &= value & NX == 0;
            if leaf {
                let gpa = (frame(FOUR_LEVEL, shift, value) | (la & ((1u64 << shift) - 1))) & self.mmu.a20_mask;
                return Some(Peeked { gpa, write: write && value & D != 0, execute, shift });
            }
            table = value & 0x000f_ffff_ffff_f000;
        }
        None
    }

    /// Is there anything in the part of the address space that the top-level entry of `la` covers (512 GiB)?
    pub(crate) fn peek_top(&mut self, la: u64) -> bool {
        let table = self.s.cr3 & 0x000f_ffff_ffff_f000;
        self.read_entry((table + (la >> 39 & 0x1ff) * 8) & self.mmu.a20_mask, 8) & P != 0
    }

    /// Where the walk starts: the format, the first table, and rights so far. `None`: a PDPTE that is not present.
    fn walk_root(&mut self, la: u64) -> Exec<Option<(Format, u64, Rights)>> {
        let all = Rights { user: true, write: true, nx: false };
        if self.s.efer & efer::LMA != 0 {
            if !paging::is_canonical(la) {
                return Err(Fault::GP0);
            }
            return Ok(Some((FOUR_LEVEL, self.s.cr3 & 0x000f_ffff_ffff_f000, all)));
        }
        if self.s.cr4 & cr4::PAE != 0 {
            let pdpte = self.s.pdptrs[(la >> 30) as usize & 3];
            return Ok((pdpte & P != 0).then_some((PAE, pdpte & 0x000f_ffff_ffff_f000, all)));
        }
        Ok(Some((TWO_LEVEL, self.s.cr3 & 0xffff_f000, all)))
    }

    fn large_allowed(&self, format: Format, level: u32) -> bool {
        match (format.entry, level) {
            (4, 2) => self.s.cr4 & cr4::PSE != 0,
            (8, 2) => true,
            (8, 3) => self.mmu.model.gib_pages,
            _ => false,
        }
    }

    /// Bits that must be zero in a present entry (SDM volume 3, sections 4.3 to 4.5).
    fn reserved(&self, format: Format, level: u32, leaf: bool) -> u64 {
        if format.entry == 4 {
            // PSE-36: bits 13-20 hold address bits 32-39, as far as the model has them; bit 21 is reserved.
            let address_bits = self.mmu.model.physical_bits.min(40) - 32;
            let unused = 0xff & !((1u64 << address_bits) - 1);
            return if level == 2 && leaf { 1 << 21 | unused << 13 } else { 0 };
        }
        let long = format.levels == 4;
        let top = if long { 52 } else { 63 };
        let mut bits = (1u64 << top) - (1u64 << self.mmu.model.physical_bits);
        if self.s.efer & efer::NXE == 0 {
            bits |= NX;
        }
        match level {
            4 => bits |= PS,
            3 if leaf => bits |= 0x3fff_e000,
            3 => bits |= PS,
            2 if leaf => bits |= 0x1f_e000,
            _ => {}
        }
        bits
    }

    fn finish(
        &mut self,
        la: u64,
        intent: Intent,
        class: Class,
        rights: Rights,
        steps: &[Step],
        base: u64,
        shift: u32,
        entry: u64,
    ) -> Exec<Option<Walked>> {
        let wp = self.s.cr0 & cr0::WP != 0;
        let user_class = class == Class::User;
        let may_write = if user_class { rights.user && rights.write } else { rights.write || !wp };
        let reachable = match class {
            Class::User => rights.user,
            Class::Supervisor => !(rights.user && self.s.cr4 & cr4::SMAP != 0),
            Class::SupervisorAc => true,
        };
        let allowed = match intent {
            Intent::Read => reachable,
            Intent::Write => reachable && may_write,
            Intent::Fetch if user_class => rights.user && !rights.nx,
            Intent::Fetch if rights.nx => false,
            Intent::Fetch => !rights.user || self.s.cr4 & cr4::SMEP == 0,
        };
        if !allowed {
            return Err(self.page_fault(la, pf::PRESENT, intent, class));
        }
        let mut dirty = false;
        for (i, step) in steps.iter().enumerate() {
            let leaf = i + 1 == steps.len();
            let mut wanted = step.value | A;
            if leaf && intent == Intent::Write {
                wanted |= D;
            }
            dirty = wanted & D != 0;
            if wanted != step.value && !self.update_entry(step, wanted, entry) {
                return Ok(None);
            }
        }
        let global = self.s.cr4 & cr4::PGE != 0 && steps.last().is_some_and(|s| s.value & G != 0);
        let gpa = (base | (la & ((1u64 << shift) - 1))) & self.mmu.a20_mask;
        Ok(Some(Walked { gpa, write: may_write && dirty, global, shift }))
    }

    fn read_entry(&mut self, gpa: u64, size: u64) -> u64 {
        if let Some(page) = self.phys_page(gpa) {
            let at = page.host.wrapping_add((gpa & PAGE_MASK) as usize);
            // SAFETY: an entry is naturally aligned and so inside the mapped page.
            return unsafe {
                if size == 4 {
                    u64::from(AtomicU32::from_ptr(at.cast()).load(Ordering::Relaxed))
                } else {
                    AtomicU64::from_ptr(at.cast()).load(Ordering::Relaxed)
                }
            };
        }
        let mut bytes = [0; 8];
        self.read_phys(gpa, &mut bytes[..size as usize]);
        u64::from_le_bytes(bytes)
    }

    /// Sets A or D in an entry if it is still what the walk saw. Entries outside RAM keep what they have.
    fn update_entry(&mut self, step: &Step, wanted: u64, size: u64) -> bool {
        let Some(page) = self.phys_page(step.gpa).filter(|p| p.writable) else { return true };
        let at = page.host.wrapping_add((step.gpa & PAGE_MASK) as usize);
        let (success, failure) = (Ordering::SeqCst, Ordering::Relaxed);
        // SAFETY: as in `read_entry`.
        let done = unsafe {
            if size == 4 {
                AtomicU32::from_ptr(at.cast())
                    .compare_exchange(step.value as u32, wanted as u32, success, failure)
                    .is_ok()
            } else {
                AtomicU64::from_ptr(at.cast()).compare_exchange(step.value, wanted, success, failure).is_ok()
            }
        };
        if done {
            self.ram_written(&page, step.gpa, size as usize);
        }
        done
    }

    /// The #PF of an access.
    fn page_fault(&self, la: u64, cause: u32, intent: Intent, class: Class) -> Fault {
        let mut error = cause;
        if intent == Intent::Write {
            error |= pf::WRITE;
        }
        if class == Class::User {
            error |= pf::USER;
        }
        let nx = self.s.efer & efer::NXE != 0 && self.s.cr4 & cr4::PAE != 0;
        if intent == Intent::Fetch && (nx || self.s.cr4 & cr4::SMEP != 0) {
            error |= pf::FETCH;
        }
        Fault::Page { address: la, error }
    }

    /// Reads and checks the PAE page-directory-pointer table (SDM volume 3, section 4.4.1).
    pub(super) fn read_pdptrs(&mut self, cr3: u64) -> Exec<[u64; 4]> {
        let mut pdptrs = [0; 4];
        let reserved = 0x1e6 | !((1u64 << self.mmu.model.physical_bits) - 1);
        for (i, pdpte) in pdptrs.iter_mut().enumerate() {
            *pdpte = self.read_entry(((cr3 & 0xffff_ffe0) + 8 * i as u64) & self.mmu.a20_mask, 8);
            if *pdpte & P != 0 && *pdpte & reserved != 0 {
                return Err(Fault::GP0);
            }
        }
        Ok(pdptrs)
    }
}

#[derive(Clone, Copy)]
struct Rights {
    user: bool,
    write: bool,
    nx: bool,
}

fn entry_address_mask(format: Format) -> u64 {
    if format.entry == 4 { 0xffff_f000 } else { 0x000f_ffff_ffff_f000 }
}

/// Physical address of the page that a leaf entry maps.
fn frame(format: Format, shift: u32, value: u64) -> u64 {
    let base = value & entry_address_mask(format) & !((1u64 << shift) - 1);
    if format.entry == 4 && shift == 22 {
        // PSE-36 (SDM volume 3, table 4-4).
        (value & 0xffc0_0000) | ((value >> 13) & 0xff) << 32
    } else {
        base
    }
}
