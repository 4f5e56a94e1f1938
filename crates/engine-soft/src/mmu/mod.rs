//! The soft MMU: from linear addresses to host memory or devices.
//!
//! [`tlb`] holds translations in the form that the fast paths want, [`walk`] makes them, [`access`] reads and writes by
//! them, [`phys`] knows what is behind a physical address. A hit needs no permission check because there is a table for
//! each kind of access ([`Class`]); what cannot be done by a plain host access (devices, pages with tracked code,
//! watched pages, accesses that leave the page) is never entered and so goes the slow way.

pub mod access;
pub mod phys;
pub mod tlb;
pub mod walk;

use crate::direct::policy::Space;
use crate::stats::Count;
use crate::vp::{Exec, Fault, SoftVp};
use partition::GuestMemory;
use phys::PhysMap;
use std::sync::Arc;
use tlb::{TlbEntry, TlbSet};
use walk::Intent;
use x86::paging::{PAGE_MASK, PAGE_SIZE};
use x86::regs::{cr0, cr4, dr7, efer, rflags};

/// Address spaces whose user translations are kept at a time (by PCID).
const USER_SETS: usize = 8;

/// Pointers that fast paths start from. The sets that they point to are owned by [`Mmu`].
#[repr(C)]
pub struct TlbPointers {
    /// First slot of the set for accesses at the current privilege.
    pub data: *mut TlbEntry,
    /// First slot of the set for implicit supervisor accesses.
    pub system: *mut TlbEntry,
    /// First slot of the set for explicit accesses at level 0 with EFLAGS.AC set.
    pub with_ac: *mut TlbEntry,
    /// Changes whenever a cached result of [`SoftVp::fetch_page`] may have become wrong.
    pub code_epoch: u64,
}

impl Default for TlbPointers {
    fn default() -> Self {
        Self { data: std::ptr::null_mut(), system: std::ptr::null_mut(), with_ac: std::ptr::null_mut(), code_epoch: 1 }
    }
}

/// Who makes an access, as far as rights go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// CPL 3.
    User,
    /// CPL 0 to 2 with EFLAGS.AC clear, and every implicit access; user pages are reachable only without SMAP.
    Supervisor,
    /// CPL 0 to 2 with EFLAGS.AC set: user pages are reachable.
    SupervisorAc,
}

/// What the MMU needs to know of the processor model.
#[derive(Clone, Copy, Debug)]
pub struct MmuModel {
    /// MAXPHYADDR (CPUID 8000_0008 EAX bits 0-7), 36 to 52.
    pub physical_bits: u32,
    /// 1 GiB pages (CPUID 8000_0001 EDX bit 26).
    pub gib_pages: bool,
}

/// A page that instructions are fetched from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CodePage {
    /// Physical address of the page.
    pub gpa: u64,
    /// Host address of the page; null if it is not plain memory (then fetch with [`SoftVp::read_phys`]).
    pub host: *const u8,
}

/// How a read-modify-write operand may be accessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RmwTarget {
    /// Writable RAM inside one page: use host atomics for LOCK forms.
    Host(*mut u8),
    /// Read and write through the access functions. Both will succeed.
    Slow,
}

/// User translations of one address space.
struct UserSpace {
    set: TlbSet,
    /// Whether it is executed directly.
    space: Space,
    pcid: u16,
    /// When it was last switched to.
    used: u64,
}

/// The MMU of a VP.
pub struct Mmu {
    phys: PhysMap,
    model: MmuModel,
    supervisor: TlbSet,
    supervisor_ac: TlbSet,
    users: Vec<UserSpace>,
    current_user: usize,
    /// The privilege for which [`SoftVp::select_tlb`] chose last.
    selected_user: bool,
    switches: u64,
    /// Never filled: in use while every access must go the slow way (alignment checking).
    empty: TlbSet,
    a20_mask: u64,
    apic_page: u64,
    /// Linear pages with armed data breakpoints; never entered.
    watched: Vec<u64>,
    /// Page walks made.
    pub walks: u64,
    /// Accesses are part of an execution that will be taken back ([`crate::translate::verify`]): all go the slow way.
    pub(crate) dry: Option<crate::translate::verify::DryLog>,
}

impl Mmu {
    /// An MMU with empty TLBs.
    pub fn new(memory: Arc<GuestMemory>, model: MmuModel) -> Self {
        Self {
            phys: PhysMap::new(memory),
            model: MmuModel { physical_bits: model.physical_bits.clamp(36, 52), ..model },
            supervisor: TlbSet::new(),
            supervisor_ac: TlbSet::new(),
            users: vec![UserSpace { set: TlbSet::new(), space: Space::default(), pcid: 0, used: 0 }],
            current_user: 0,
            selected_user: false,
            switches: 0,
            empty: TlbSet::new(),
            a20_mask: u64::MAX,
            apic_page: u64::MAX,
            watched: Vec::new(),
            walks: 0,
            dry: None,
        }
    }

    /// MAXPHYADDR.
    pub fn physical_bits(&self) -> u32 {
        self.model.physical_bits
    }

    fn set(&mut self, class: Class) -> &mut TlbSet {
        match class {
            Class::User => &mut self.users[self.current_user].set,
            Class::Supervisor => &mut self.supervisor,
            Class::SupervisorAc => &mut self.supervisor_ac,
        }
    }

    /// What is known of the address space in use with regard to direct execution.
    pub(crate) fn space(&mut self) -> &mut Space {
        &mut self.users[self.current_user].space
    }

    /// The number of the address space in use.
    pub(crate) fn space_index(&self) -> usize {
        self.current_user
    }

    /// The set for user accesses.
    pub(crate) fn user_set(&mut self) -> &mut TlbSet {
        &mut self.users[self.current_user].set
    }

    /// Empties the jump tables of the address space in use.
    pub(crate) fn flush_space_jumps(&mut self) {
        self.user_set().flush_jumps();
    }

    /// An address space is not executed directly any more.
    pub(crate) fn end_space(&mut self, index: usize) {
        if let Some(user) = self.users.get_mut(index) {
            user.set.mirror = None;
            user.space.put_off();
        }
    }

    /// None is.
    pub(crate) fn end_all_spaces(&mut self) {
        (0..self.users.len()).for_each(|index| self.end_space(index));
    }

    /// The block behind a physical page (its address) and the offset there, if it is RAM.
    pub(crate) fn block_of(&mut self, gpa: u64) -> Option<(usize, u64)> {
        if gpa & !PAGE_MASK == self.apic_page { None } else { self.phys.block_of(gpa) }
    }

    fn each_set(&mut self, mut f: impl FnMut(&mut TlbSet)) {
        f(&mut self.supervisor);
        f(&mut self.supervisor_ac);
        for user in &mut self.users {
            f(&mut user.set);
        }
    }
}

impl SoftVp {
    /// The class of explicit accesses now.
    #[inline]
    pub(crate) fn access_class(&self) -> Class {
        if self.s.cpl == 3 {
            Class::User
        } else if self.s.cr4 & cr4::SMAP != 0 && self.s.rflags & rflags::AC != 0 {
            Class::SupervisorAc
        } else {
            Class::Supervisor
        }
    }

    /// Are misaligned accesses #AC now (SDM volume 3, section 6.15, interrupt 17)?
    #[inline]
    pub(crate) fn alignment_checked(&self) -> bool {
        self.s.cpl == 3 && self.s.cr0 & cr0::AM != 0 && self.s.rflags & rflags::AC != 0
    }

    /// Chooses the TLB sets for the present privilege level and EFLAGS.AC. Called by [`SoftVp::mode_changed`] and
    /// whenever AC changes.
    pub fn select_tlb(&mut self) {
        let data = if self.alignment_checked() || self.mmu.dry.is_some() {
            self.mmu.empty.base()
        } else {
            self.mmu.set(self.access_class()).base()
        };
        self.s.tlb.data = data;
        self.s.tlb.system = self.mmu.supervisor.base();
        let smap = self.s.cr4 & cr4::SMAP != 0;
        self.s.tlb.with_ac = if smap { self.mmu.supervisor_ac.base() } else { self.s.tlb.system };
        // What may be fetched depends on the privilege level only as far as user or supervisor.
        let user = self.s.cpl == 3;
        if self.mmu.selected_user != user {
            self.mmu.selected_user = user;
            self.s.tlb.code_epoch += 1;
        }
    }

    /// The page that holds the instruction at `la`, at the current privilege.
    #[inline]
    pub fn fetch_page(&mut self, la: u64) -> Exec<CodePage> {
        let class = if self.s.cpl == 3 { Class::User } else { Class::Supervisor };
        if let Some((gpa, host)) = self.mmu.set(class).code_lookup(la & !PAGE_MASK) {
            return Ok(CodePage { gpa, host });
        }
        self.fetch_page_slow(la, class)
    }

    #[cold]
    fn fetch_page_slow(&mut self, la: u64, class: Class) -> Exec<CodePage> {
        self.mmu.walks += 1;
        let walked = self.walk(la, Intent::Fetch, class)?;
        let gpa = walked.gpa & !PAGE_MASK;
        let host = self.phys_page(gpa).map_or(std::ptr::null_mut(), |p| p.host);
        self.mmu.set(class).code_fill(la & !PAGE_MASK, gpa, host, walked.shift, walked.global);
        Ok(CodePage { gpa, host })
    }

    /// Who fetches instructions now.
    pub(crate) fn code_class(&self) -> Class {
        if self.s.cpl == 3 { Class::User } else { Class::Supervisor }
    }

    /// First slot and first link of the jump tables for code at the current privilege ([`crate::translate::jump_table`]).
    pub(crate) fn jump_tables(&mut self) -> (u64, u64) {
        let jumps = self.jumps();
        (jumps.slots(), jumps.links())
    }

    fn jumps(&mut self) -> &mut crate::translate::jump_table::JumpTable {
        let (class, mode) = (self.code_class(), self.s.jit.mode);
        let linear = self.run.facts.is_some_and(|f| f.code_base == 0);
        let set = self.mmu.set(class);
        if mode == 0 { &mut set.jumps } else { set.offset_jumps(mode, linear) }
    }

    /// The host address of the code at the VP's RIP, if it is in the jump table.
    pub(crate) fn find_jump(&mut self) -> Option<u64> {
        let rip = self.s.rip;
        self.jumps().get(rip)
    }

    /// Enters a target into the jump table. Its page must just have been fetched from. `goes_on`: the block depends on the next
    /// page's translation too.
    /// `link`: for this direct jump only.
    pub(crate) fn enter_jump(&mut self, rip: u64, host: u64, goes_on: bool, link: Option<u32>) {
        let class = self.code_class();
        let page = crate::interp::code_linear(self) & !PAGE_MASK;
        let global = !goes_on && self.mmu.set(class).code_is_global(page);
        match link {
            Some(link) => self.jumps().link(link, rip, host, global),
            None => self.jumps().insert(rip, host, global),
        }
    }

    /// Empties all jump tables.
    pub(crate) fn flush_jumps(&mut self) {
        self.mmu.each_set(TlbSet::flush_jumps);
    }

    /// As [`SoftVp::flush_jumps`], and gives the tables' memory back.
    pub(crate) fn release_jumps(&mut self) {
        self.mmu.each_set(|set| {
            set.jumps = crate::translate::jump_table::JumpTable::new();
            set.offset_jumps = None;
        });
    }

    /// Drops all translations.
    pub fn flush_tlb_all(&mut self) {
        self.counts.add(Count::FullFlushes, 1);
        self.mmu.each_set(TlbSet::flush_all);
        self.s.tlb.code_epoch += 1;
    }

    /// Drops all translations but those of global pages.
    pub fn flush_tlb_non_global(&mut self) {
        self.counts.add(Count::FullFlushes, 1);
        self.mmu.each_set(TlbSet::flush_local);
        self.s.tlb.code_epoch += 1;
    }

    /// INVLPG: drops the translations of one address, global or not, in every address space.
    pub fn invlpg(&mut self, la: u64) {
        self.counts.add(Count::PageFlushes, 1);
        self.mmu.each_set(|set| set.invalidate(la));
        self.s.tlb.code_epoch += 1;
    }

    /// INVPCID type 0: one address of one address space.
    pub fn invalidate_pcid_address(&mut self, pcid: u16, la: u64) {
        self.each_set_of(pcid, |set| set.invalidate(la));
    }

    /// INVPCID type 1: one address space, without global pages.
    pub fn invalidate_pcid(&mut self, pcid: u16) {
        self.each_set_of(pcid, TlbSet::flush_local);
    }

    fn each_set_of(&mut self, pcid: u16, f: impl Fn(&mut TlbSet)) {
        if self.mmu.users[self.mmu.current_user].pcid == pcid {
            // What the supervisor sets hold that is not global belongs to the current address space.
            f(&mut self.mmu.supervisor);
            f(&mut self.mmu.supervisor_ac);
        }
        for user in self.mmu.users.iter_mut().filter(|u| u.pcid == pcid) {
            f(&mut user.set);
        }
        self.s.tlb.code_epoch += 1;
    }

    /// Loads CR3 as MOV to CR3 and task switches do: PAE pointers are read and checked, translations dropped as the
    /// value and CR4.PCIDE say. The caller has checked reserved bits.
    ///
    /// # Errors
    /// #GP(0) for a reserved bit in a PAE pointer; nothing is changed then.
    pub fn load_cr3(&mut self, value: u64) -> Exec {
        if self.pae_without_long_mode() {
            self.s.pdptrs = self.read_pdptrs(value)?;
        }
        let pcide = self.s.cr4 & cr4::PCIDE != 0;
        let keep = pcide && value >> 63 != 0;
        let value = if pcide { value & !(1 << 63) } else { value };
        let same = self.s.cr3 == value;
        self.s.cr3 = value;
        if !(keep && same) {
            self.switch_address_space(if pcide { (value & 0xfff) as u16 } else { 0 }, keep);
        }
        Ok(())
    }

    /// Is PAE paging in use whose pointers are loaded with CR3?
    pub(crate) fn pae_without_long_mode(&self) -> bool {
        self.s.cr0 & cr0::PG != 0 && self.s.cr4 & cr4::PAE != 0 && self.s.efer & efer::LMA == 0
    }

    /// Reads the PAE pointers again after CR0 or CR4 changed, from the present CR3.
    ///
    /// # Errors
    /// #GP(0) for a reserved bit; nothing is changed then.
    pub fn reload_pdptrs(&mut self) -> Exec {
        self.s.pdptrs = self.read_pdptrs(self.s.cr3)?;
        Ok(())
    }

    fn switch_address_space(&mut self, pcid: u16, keep: bool) {
        let mmu = &mut self.mmu;
        mmu.supervisor.flush_local();
        mmu.supervisor_ac.flush_local();
        mmu.switches += 1;
        let found = mmu.users.iter().position(|u| u.pcid == pcid);
        let chosen = match found {
            Some(i) => i,
            None if mmu.users.len() < USER_SETS => {
                mmu.users.push(UserSpace { set: TlbSet::new(), space: Space::default(), pcid, used: 0 });
                mmu.users.len() - 1
            }
            None => {
                let oldest = mmu.users.iter().enumerate().min_by_key(|(_, u)| u.used);
                oldest.map_or(0, |(i, _)| i)
            }
        };
        let always = self.partition.options.direct == partition::DirectMode::Always;
        let user = &mut mmu.users[chosen];
        let kept = found.is_some() && keep;
        self.counts.add(if kept { Count::SpacesKept } else { Count::SpacesFlushed }, 1);
        if !kept {
            user.set.flush_local();
        }
        user.pcid = pcid;
        user.used = mmu.switches;
        if user.space.loaded(self.s.cr3 & 0x000f_ffff_ffff_f000, always) {
            user.set.mirror = None;
            if let Some(direct) = &mut self.direct {
                direct.leave(chosen);
            }
        }
        mmu.current_user = chosen;
        self.s.tlb.code_epoch += 1;
        self.select_tlb();
    }

    /// Flushes after a change of CR0, CR4 or EFER that changes how page tables are read, and finds the set of the
    /// present PCID.
    pub(crate) fn paging_changed(&mut self) {
        self.flush_tlb_all();
        let pcid = if self.s.cr4 & cr4::PCIDE != 0 { (self.s.cr3 & 0xfff) as u16 } else { 0 };
        self.switch_address_space(pcid, false);
    }

    /// After this returns, this VP holds no cached write permission for the physical page.
    pub fn drop_write_permission(&mut self, gpa_page: u64) {
        self.mmu.each_set(|set| set.drop_write(Some(gpa_page & !PAGE_MASK)));
    }

    /// After this returns, this VP holds no cached write permission at all (dirty tracking).
    pub fn drop_all_write_permissions(&mut self) {
        self.mmu.each_set(|set| set.drop_write(None));
    }

    /// The partition's mappings have changed: forget everything derived from them.
    pub fn mappings_changed(&mut self) {
        self.mmu.phys.reload();
        self.flush_tlb_all();
    }

    /// Where the local APIC's register page is (`None`: disabled or in x2APIC mode).
    pub fn set_apic_page(&mut self, gpa: Option<u64>) {
        let page = gpa.map_or(u64::MAX, |gpa| gpa & !PAGE_MASK);
        if self.mmu.apic_page != page {
            self.mmu.apic_page = page;
            self.flush_tlb_all();
        }
    }

    /// The A20 gate: with `enabled` false, bit 20 of every physical address is zero.
    pub fn set_a20(&mut self, enabled: bool) {
        let mask = if enabled { u64::MAX } else { !(1 << 20) };
        if self.mmu.a20_mask != mask {
            self.mmu.a20_mask = mask;
            self.flush_tlb_all();
        }
    }

    /// Debug registers have changed: pages with armed data breakpoints are kept out of the TLB.
    pub fn watchpoints_changed(&mut self) {
        let mut watched = Vec::new();
        for n in 0..4 {
            if let Some(watch) = self.data_breakpoint(n) {
                watched.push(watch.address & !PAGE_MASK);
                let last = (watch.address + (watch.len - 1)) & !PAGE_MASK;
                if !watched.contains(&last) {
                    watched.push(last);
                }
            }
        }
        if watched != self.mmu.watched {
            for &page in watched.iter().chain(&self.mmu.watched.clone()) {
                self.invlpg(page);
            }
            self.mmu.watched = watched;
        }
    }

    /// Data breakpoint `n`, if it is armed.
    fn data_breakpoint(&self, n: usize) -> Option<DataBreakpoint> {
        let kind = self.s.dr7 >> (16 + 4 * n) & 3;
        let armed = self.s.dr7 & dr7::ENABLES & (3 << (2 * n)) != 0;
        if !armed || kind & 1 == 0 {
            return None;
        }
        let len = [1, 2, 8, 4][(self.s.dr7 >> (18 + 4 * n) & 3) as usize];
        Some(DataBreakpoint { address: self.s.dr[n] & !(len - 1), len, reads: kind == 3 })
    }

    /// Records the data breakpoints that an access touches: they trap after the instruction.
    fn check_watchpoints(&mut self, la: u64, len: usize, write: bool) {
        if self.mmu.watched.is_empty() {
            return;
        }
        for n in 0..4 {
            if let Some(watch) = self.data_breakpoint(n) {
                let overlaps =
                    la.wrapping_sub(watch.address) < watch.len || watch.address.wrapping_sub(la) < len as u64;
                if overlaps && (write || watch.reads) {
                    self.raise_debug(1 << n);
                }
            }
        }
    }

    pub(crate) fn is_watched(&self, la: u64) -> bool {
        !self.mmu.watched.is_empty() && self.mmu.watched.contains(&(la & !PAGE_MASK))
    }
}

struct DataBreakpoint {
    address: u64,
    len: u64,
    reads: bool,
}

/// Does an access leave its page?
#[inline]
const fn crosses(la: u64, len: usize) -> bool {
    (la & PAGE_MASK) + len as u64 > PAGE_SIZE
}

/// #AC(0).
const AC0: Fault = Fault::Exception { vector: x86::exception::AC, error: 0 };
