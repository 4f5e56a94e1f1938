//! Going into direct execution and coming back.
//!
//! The registers go to the process, the process executes, and whatever stops it is seen to here: a page that is not
//! mapped yet is mapped if the guest's page tables allow it as they are; every other difficulty has the way out that
//! translated code has too: *this one instruction* is executed by the interpreter, with all that follows from it.

use super::mirror::{Change, Mirror, Rights};
use super::process::{Hold, MapOp, Process, Prot, Stop, USER_END, USER_START, user_regs};
use super::{Direct, Place, scan};
use crate::interp;
use crate::mmu::Class;
use crate::stats::Count;
use crate::vp::{CodeSize, SoftVp};
use libc::user_regs_struct;
use partition::Activity;
use partition::clock::host_tsc;
use std::io;
use std::sync::atomic::Ordering;
use x86::paging::{PAGE_MASK, PAGE_SIZE};
use x86::regs::{cr0, cr4, efer, rflags, xcr0};
use x86::segment::sreg;
use x86::xsave;

/// Selectors of user code that a process of Linux has, and so must the guest's: its code can read them.
const USER_CS: u16 = 0x33;
const USER_SS: u16 = 0x2b;
/// RFLAGS bits that user code changes at will.
const FLAGS: u64 = rflags::STATUS | rflags::DF | rflags::TF | rflags::AC | STICKY;
/// Those of them that a process's registers cannot be given.
const STICKY: u64 = rflags::NT | rflags::ID;
/// Pages that are looked at around one that is missing, aligned.
const AROUND: u64 = 8;
/// Pages of code that are looked through at a time.
const CODE_AROUND: u64 = 8;
/// Pages of code whose looks are remembered at most.
const MOST_LOOKED_AT: usize = 1 << 14;
/// Bytes of the longest instruction.
const LONGEST: u64 = 15;

/// Where the guest's state is.
struct Registers {
    regs: user_regs_struct,
    /// In the process (and `regs`), not in the VP.
    away: bool,
}

impl Direct {
    /// What going in and coming back costs at least.
    pub(super) fn measure(&mut self) -> io::Result<u64> {
        let Some(seat) = self.seats.first_mut() else { return Ok(0) };
        let _hold = Hold::here();
        let mut times = [0; 9];
        for time in &mut times {
            let mut regs = user_regs();
            // Nothing is mapped there.
            regs.rip = USER_START;
            let begun = host_tsc();
            seat.process.run(&mut regs)?;
            *time = host_tsc().wrapping_sub(begun);
        }
        times.sort_unstable();
        Ok(times[times.len() / 2])
    }
}

impl SoftVp {
    /// Is the address space in use to be executed directly, here and now? If it is time to try it, it begins.
    #[inline]
    pub(crate) fn goes_direct(&mut self) -> bool {
        self.direct.is_some() && self.s.cpl == 3 && {
            let rip = self.s.rip;
            let space = self.mmu.space();
            (space.goes(rip) || space.wanted()) && self.enter_direct()
        }
    }

    /// Does translated code have to leave jumps to user code to the run loop?
    #[inline]
    pub(crate) fn is_direct(&mut self) -> bool {
        self.direct.is_some() && self.s.cpl == 3 && {
            let rip = self.s.rip;
            let space = self.mmu.space();
            space.now(rip) || space.wanted()
        }
    }

    /// An interrupt (or whatever needs the VP's attention) has come.
    pub(crate) fn direct_interrupted(&mut self) {
        let second = self.partition.clock.tsc_frequency_hz();
        let Some(direct) = &mut self.direct else { return };
        let (now, exits) = (host_tsc(), self.run.user_exits);
        let (since, before) = direct.last_interrupt;
        let elapsed = now.wrapping_sub(since);
        let user = self.s.cpl == 3;
        let space = self.mmu.space();
        // Interrupts that come in a burst say nothing.
        if elapsed > second / 1000 {
            direct.last_interrupt = (now, exits);
            // To come back, to map the page that is new, and to go in: a quarter of the time at most.
            // (A loaded state begins to count anew.)
            let lost = exits.saturating_sub(before).saturating_mul(2 * direct.overhead);
            let calm = lost < elapsed / 4;
            space.interrupted(user, calm);
            // A program that makes nothing but system calls must not wait until all that it has won is lost.
            if space.has_lost() && !calm {
                let index = self.mmu.space_index();
                self.mmu.end_space(index);
                direct.leave(index);
                return;
            }
        }
        if space.resume() && space.active() || space.wanted() {
            // Translated code must find no way back to its user code.
            self.mmu.flush_space_jumps();
            self.s.tlb.code_epoch += 1;
        }
    }

    fn enter_direct(&mut self) -> bool {
        let may = self.may_be_direct();
        let space = self.mmu.space();
        match (space.active(), may) {
            (true, true) => return true,
            (true, false) => {
                self.suspend_direct();
                return false;
            }
            (false, false) => {
                space.end();
                return false;
            }
            (false, true) => {}
        }
        space.begin();
        let index = self.mmu.space_index();
        let Some(direct) = &mut self.direct else { return false };
        let Some((_, before)) = direct.seat_for(index) else { return false };
        if let Some(before) = before {
            self.mmu.end_space(before);
        }
        let set = self.mmu.user_set();
        set.mirror = Some(Box::new(Mirror::new()));
        set.flush_jumps();
        // Return addresses of translated code lead to user code too.
        self.s.tlb.code_epoch += 1;
        self.counts.add(Count::DirectSpaces, 1);
        true
    }

    /// Is the VP in a state in which user code cannot tell the process from the guest's processor?
    fn may_be_direct(&self) -> bool {
        let s = &self.s;
        let segment = |n: usize| &s.segments[n];
        let both = cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE | cr4::FSGSBASE;
        let components = xcr0::X87 | xcr0::SSE | xcr0::AVX;
        s.code_size == CodeSize::Bits64
            && segment(sreg::CS).selector == USER_CS
            && segment(sreg::SS).selector == USER_SS
            && [sreg::DS, sreg::ES, sreg::FS, sreg::GS].iter().all(|n| segment(*n).selector == 0)
            && s.cr4 & (both | cr4::PKE) == both
            && s.cr0 & (cr0::EM | cr0::TS | cr0::NE) == cr0::NE
            && s.xcr0 == components
            && s.rflags & (rflags::IF | rflags::IOPL | rflags::TF | rflags::VM | rflags::RF) == rflags::IF
            && !self.alignment_checked()
            && self.mmu.dry.is_none()
            && self.s.efer & efer::LMA != 0
            && s.rip < USER_END
            && segment(sreg::FS).base < USER_END
            && segment(sreg::GS).base < USER_END
            && self.activity == Activity::Running
    }

    /// The address space in use is not executed directly for a while.
    fn suspend_direct(&mut self) {
        let second = self.partition.clock.tsc_frequency_hz();
        self.mmu.space().suspend(second);
        self.counts.add(Count::DirectSuspends, 1);
    }

    /// The code at this linear address cannot be executed directly.
    fn step_aside(&mut self, la: u64) {
        let second = self.partition.clock.tsc_frequency_hz();
        self.counts.add(Count::DirectAsides, 1);
        if !self.mmu.space().step_aside(la, second) {
            self.suspend_direct();
        }
    }

    /// Gives the address space in use up.
    fn end_direct(&mut self) {
        let index = self.mmu.space_index();
        self.mmu.end_space(index);
        self.mmu.space().end();
        if let Some(direct) = &mut self.direct {
            direct.leave(index);
        }
    }
}

/// Executes directly until something else has to be done. Only after [`SoftVp::goes_direct`].
pub fn run(vp: &mut SoftVp) {
    let Some(mut direct) = vp.direct.take() else { return };
    let index = vp.mmu.space_index();
    let begun = host_tsc();
    let guest_before = vp.counts.0[Count::DirectTicks as usize];
    let result = match direct.seat_for(index) {
        Some((seat, None)) => execute(vp, &mut direct, seat),
        // It was given to another address space.
        Some((_, Some(_))) | None => {
            direct.leave(index);
            vp.mmu.end_space(index);
            Ok(true)
        }
    };
    let inside = vp.counts.0[Count::DirectTicks as usize].wrapping_sub(guest_before);
    vp.counts.add(Count::DirectAround, host_tsc().wrapping_sub(begun).saturating_sub(inside));
    match result {
        Ok(go_on) => {
            vp.direct = Some(direct);
            if !go_on {
                vp.end_direct();
            }
        }
        Err(error) => {
            tracing::warn!(vp = vp.index, %error, "direct execution has failed and is not used any more");
            vp.mmu.end_all_spaces();
        }
    }
}

/// The loop. `Ok(false)`: it does not pay here.
fn execute(vp: &mut SoftVp, direct: &mut Direct, seat: usize) -> io::Result<bool> {
    direct.turns += 1;
    direct.seats[seat].used = direct.turns;
    let overhead = direct.overhead;
    let second = vp.partition.clock.tsc_frequency_hz();
    let waker = vp.partition.shared(vp.index).waker.clone();
    let mut registers = Registers { regs: user_regs(), away: false };
    // The stub and its commands must not stand where the guest has something.
    if vp.peek_top(Process::RESERVED.start) {
        vp.suspend_direct();
        return Ok(true);
    }
    // What the guest's kernel has just mapped at the place of the last fault is used at once. (RIP may be behind it by now: an
    // instruction that is returned to with RF set is interpreted.)
    if let Some((root, address)) = vp.run.direct_fault.take()
        && root == vp.s.cr3
    {
        map_missing(vp, direct, address);
    }
    // A page of code that is new is looked through before the process runs into it.
    let rip = vp.s.rip;
    if !is_executable(vp, rip) && matches!(map_code(vp, direct, rip), Found::Telling) {
        vp.step_aside(rip);
        return Ok(true);
    }
    vp.mmu.space().back();
    let mut hold = None;
    let mut begun = host_tsc();
    loop {
        if vp.s.attention.load(Ordering::SeqCst) != 0 || !vp.may_be_direct() {
            break;
        }
        if !direct.seats[seat].process.is_brief() {
            hold = None;
        } else if hold.is_none() {
            hold = Hold::here();
        }
        if !update(vp, direct, seat)? {
            // The host refuses to map: without a pause the run loop would come back here at once, and again.
            vp.suspend_direct();
            break;
        }
        if !registers.away && !send(vp, direct, seat, &mut registers)? {
            // The rare flags that only guest code can set.
            vp.suspend_direct();
            break;
        }
        let process = &mut direct.seats[seat].process;
        let entered = host_tsc();
        waker.interrupt_too(Some(process.interrupter()));
        let stop = if vp.s.attention.load(Ordering::SeqCst) == 0 {
            process.run(&mut registers.regs)
        } else {
            Ok(Stop::Interrupted)
        };
        waker.interrupt_too(None);
        let stop = stop?;
        let left = host_tsc();
        vp.counts.add(Count::DirectRuns, 1);
        // How long going in and coming back takes varies: what is near it may be nothing else.
        let took = left.wrapping_sub(entered);
        let guest = if took > overhead + overhead / 2 { took - overhead } else { 0 };
        vp.counts.add(Count::DirectTicks, guest);
        let around = left.wrapping_sub(begun).saturating_sub(guest);
        begun = left;
        let pays = vp.mmu.space().spent(guest, around, second);
        let go_on = see_to(vp, direct, seat, &mut registers, stop)?;
        if !pays {
            bring_back(vp, direct, seat, &mut registers)?;
            return Ok(false);
        }
        if !go_on {
            break;
        }
    }
    bring_back(vp, direct, seat, &mut registers)?;
    Ok(true)
}

/// Sees to a stop. `false`: the process must not go on now.
fn see_to(
    vp: &mut SoftVp,
    direct: &mut Direct,
    seat: usize,
    registers: &mut Registers,
    stop: Stop,
) -> io::Result<bool> {
    let regs = &mut registers.regs;
    let mut missing = None;
    match stop {
        Stop::Interrupted => return Ok(true),
        // SYSCALL and INT 0x80 have two bytes. What SYSCALL has done to RCX and R11 it does again.
        Stop::Syscall => {
            regs.rip = regs.rip.wrapping_sub(2);
            regs.rax = regs.orig_rax;
        }
        Stop::Fault { signal: libc::SIGSEGV, address, .. } => {
            let code =
                address.wrapping_sub(regs.rip & !PAGE_MASK) < PAGE_SIZE || address.wrapping_sub(regs.rip) < LONGEST;
            if (USER_START..USER_END).contains(&address) {
                if code && !is_executable(vp, address) {
                    match map_code(vp, direct, address) {
                        Found::Mapped => return Ok(true),
                        Found::Telling => {
                            let rip = regs.rip;
                            bring_back(vp, direct, seat, registers)?;
                            vp.step_aside(rip);
                            return Ok(false);
                        }
                        Found::Nothing => {}
                    }
                }
                if map_data(vp, direct, address) {
                    return Ok(true);
                }
                missing = Some(address);
            }
        }
        // RIP is behind INT3, and on INT1.
        Stop::Fault { signal: libc::SIGTRAP, code, .. } => {
            if code == libc::TRAP_TRACE {
                // POPF has set TF: this is the trap of the instruction behind it, with everything committed.
                bring_back(vp, direct, seat, registers)?;
                vp.s.pending_debug |= x86::regs::dr6::BS;
                vp.update_boundary();
                return Ok(false);
            }
            let byte = |vp: &mut SoftVp, at: u64| vp.read_u8(at).unwrap_or(0);
            let behind = regs.rip;
            regs.rip = match (byte(vp, behind.wrapping_sub(1)), byte(vp, behind)) {
                (0xcc, _) => behind.wrapping_sub(1),
                (_, 0xf1) => behind,
                // INT 3 in its two-byte form.
                _ => behind.wrapping_sub(2),
            };
        }
        // The host's kernel has executed a call of its vsyscall page and returned; here it is a call of that address. RAX is
        // lost: it takes the call's result.
        Stop::Fault { signal: libc::SIGSYS, address, .. } => {
            regs.rsp = regs.rsp.wrapping_sub(8);
            regs.rip = address;
        }
        Stop::Fault { .. } => {}
    }
    bring_back(vp, direct, seat, registers)?;
    vp.counts.add(Count::DirectSingles, 1);
    let root = vp.s.cr3;
    interp::one(vp);
    if vp.s.cpl == 3 {
        // A write has set the D bit: the page can be mapped for writing now.
        if let Some(address) = missing {
            map_data(vp, direct, address);
        }
        return Ok(true);
    }
    vp.run.direct_fault = missing.map(|address| (root, address));
    Ok(false)
}

/// Makes the process's memory what the mirror says. `false`: nothing can be executed now.
fn update(vp: &mut SoftVp, direct: &mut Direct, seat: usize) -> io::Result<bool> {
    let partition = vp.partition.clone();
    let seen = {
        let log = partition.changed_code.lock().unwrap_or_else(|e| e.into_inner());
        log.0 + log.1.len() as u64
    };
    // A second try after the host has refused: from nothing.
    for _ in 0..2 {
        let Some(mirror) = &mut vp.mmu.user_set().mirror else { return Ok(false) };
        if mirror.log_seen != seen {
            mirror.log_seen = seen;
            mirror.drop_changed(|page| partition.code_generations.get(page));
        }
        if mirror.pending().is_empty() {
            return Ok(true);
        }
        let mut ops = Vec::with_capacity(mirror.pending().len());
        for change in mirror.pending().to_vec() {
            match change {
                Change::UnmapAll => ops.push(MapOp::UnmapAll),
                Change::Unmap { at, len } => ops.push(MapOp::Unmap { at, len }),
                Change::Map { at, len, gpa, rights } => {
                    let prot = match rights {
                        Rights::Read => Prot::Read,
                        Rights::Write => Prot::ReadWrite,
                        Rights::Execute => Prot::ReadExecute,
                    };
                    // Physically adjacent pages may lie in several mappings.
                    for page in (0..len).step_by(PAGE_SIZE as usize) {
                        let Some((block, offset)) = direct.place_of(vp, gpa + page) else { continue };
                        if let Some(MapOp::Map { at: a, len, block: b, offset: o, prot: p }) = ops.last_mut()
                            && (*a + *len, *o + *len, *b, *p) == (at + page, offset, block, prot)
                        {
                            *len += PAGE_SIZE;
                        } else {
                            ops.push(MapOp::Map { at: at + page, len: PAGE_SIZE, block, offset, prot });
                        }
                    }
                }
            }
        }
        vp.counts.add(Count::DirectChanges, ops.len() as u64);
        let begun = host_tsc();
        let done = direct.seats[seat].process.apply(&ops);
        vp.counts.add(Count::DirectMapTicks, host_tsc().wrapping_sub(begun));
        let Some(mirror) = &mut vp.mmu.user_set().mirror else { return Ok(false) };
        match done {
            Ok(()) => {
                mirror.made();
                return Ok(true);
            }
            Err(error) if error.raw_os_error() == Some(libc::ENOMEM) => mirror.clear(),
            Err(error) => return Err(error),
        }
    }
    Ok(false)
}

/// Gives the guest's state to the process. `false`: it cannot have it.
fn send(vp: &mut SoftVp, direct: &mut Direct, seat: usize, registers: &mut Registers) -> io::Result<bool> {
    let seat = &mut direct.seats[seat];
    let s = &vp.s;
    if s.rflags & STICKY != seat.sticky {
        return Ok(false);
    }
    let r = &mut registers.regs;
    let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] = s.gprs;
    (r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi) = (rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi);
    (r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14, r.r15) = (r8, r9, r10, r11, r12, r13, r14, r15);
    r.rip = s.rip;
    r.eflags = s.rflags & FLAGS | rflags::IF | rflags::FIXED;
    r.fs_base = s.segments[sreg::FS].base;
    r.gs_base = s.segments[sreg::GS].base;
    if s.xsave.0 != *seat.state {
        seat.process.set_xstate(&s.xsave.0)?;
        *seat.state = s.xsave.0;
    }
    registers.away = true;
    Ok(true)
}

/// Takes the guest's state back from the process.
fn bring_back(vp: &mut SoftVp, direct: &mut Direct, seat: usize, registers: &mut Registers) -> io::Result<()> {
    if !std::mem::take(&mut registers.away) {
        return Ok(());
    }
    let seat = &mut direct.seats[seat];
    let r = &registers.regs;
    let s = &mut vp.s;
    s.gprs =
        [r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14, r.r15];
    (s.rip, s.next_rip) = (r.rip, r.rip);
    s.rflags = s.rflags & !FLAGS | r.eflags & FLAGS;
    seat.sticky = r.eflags & STICKY;
    s.segments[sreg::FS].base = r.fs_base;
    s.segments[sreg::GS].base = r.gs_base;
    seat.process.get_xstate(&mut s.xsave.0)?;
    let header = &mut s.xsave.0[xsave::HEADER_OFFSET..][..8];
    let offered = xcr0::X87 | xcr0::SSE | xcr0::AVX;
    for (byte, mask) in header.iter_mut().zip(offered.to_le_bytes()) {
        *byte &= mask;
    }
    *seat.state = s.xsave.0;
    // Selectors that user code has loaded: descriptors are the guest's.
    let loaded = [
        (sreg::SS, r.ss, u64::from(USER_SS)),
        (sreg::DS, r.ds, 0),
        (sreg::ES, r.es, 0),
        (sreg::FS, r.fs, 0),
        (sreg::GS, r.gs, 0),
        (sreg::CS, r.cs, u64::from(USER_CS)),
    ];
    for (n, selector, before) in loaded {
        if selector != before {
            vp.load_found_selector(n, selector as u16);
        }
    }
    vp.select_tlb();
    vp.update_boundary();
    Ok(())
}

fn is_executable(vp: &mut SoftVp, la: u64) -> bool {
    let mirror = vp.mmu.user_set().mirror.as_ref();
    mirror.is_some_and(|m| m.rights(la) == Some(Rights::Execute))
}

fn map_missing(vp: &mut SoftVp, direct: &mut Direct, la: u64) {
    let code = vp.s.rip & !PAGE_MASK == la & !PAGE_MASK;
    if !code || !matches!(map_code(vp, direct, la), Found::Mapped) {
        map_data(vp, direct, la);
    }
}

/// May a process have something there?
fn is_free(la: u64) -> bool {
    (USER_START..USER_END).contains(&la) && !Process::RESERVED.contains(&la)
}

/// What [`map_code`] has found.
enum Found {
    Mapped,
    /// Code that may not be executed directly.
    Telling,
    Nothing,
}

/// Maps the page of an instruction, and others around it that are as good.
fn map_code(vp: &mut SoftVp, direct: &mut Direct, la: u64) -> Found {
    let page = la & !PAGE_MASK;
    if !is_free(page) || vp.fetch_page(page).is_err() {
        return Found::Nothing;
    }
    let first = page & !(CODE_AROUND * PAGE_SIZE - 1);
    let mut found = Found::Nothing;
    for at in (first..first + CODE_AROUND * PAGE_SIZE).step_by(PAGE_SIZE as usize) {
        let own = at == page;
        if !is_free(at) || is_executable(vp, at) {
            continue;
        }
        let Some(seen) = vp.peek(at).filter(|p| p.execute) else { continue };
        // What is written now and then is mapped for execution only when it is executed.
        if !own && seen.write {
            continue;
        }
        let gpa = seen.gpa & !PAGE_MASK;
        if direct.place_of(vp, gpa).is_none() {
            continue;
        }
        let generation = vp.partition.track_code(gpa >> 12);
        let begun = host_tsc();
        let good = looks_good(vp, direct, at, gpa, generation);
        vp.counts.add(Count::DirectScanTicks, host_tsc().wrapping_sub(begun));
        if good {
            let Some(mirror) = &mut vp.mmu.user_set().mirror else { return Found::Nothing };
            mirror.map(at, gpa, Rights::Execute, seen.shift, Some(generation));
        }
        if own {
            found = if good { Found::Mapped } else { Found::Telling };
        }
    }
    found
}

/// Looks a page of code through, with its seams. What has been seen once, in whatever address space, is known until it changes.
fn looks_good(vp: &mut SoftVp, direct: &mut Direct, la: u64, gpa: u64, generation: u32) -> bool {
    let neighbour = |vp: &mut SoftVp, la: u64| vp.peek(la).map(|p| p.gpa & !PAGE_MASK);
    let (previous, following) = (la.wrapping_sub(PAGE_SIZE), la.wrapping_add(PAGE_SIZE));
    let before = neighbour(vp, previous);
    let seam = before.is_some() && is_executable(vp, previous);
    let after = if is_executable(vp, following) { neighbour(vp, following) } else { None };
    let generations = &vp.partition.code_generations;
    let generation_of = |gpa: Option<u64>| gpa.map_or(0, |gpa| generations.get(gpa >> 12));
    let place = Place { gpa, before, after, seam };
    let state = [generation, generation_of(before), generation_of(after)];
    if let Some((seen, good)) = direct.looked_at.get(&place)
        && *seen == state
    {
        return *good;
    }
    let mut copy = [0u8; PAGE_SIZE as usize];
    let mut next = [0u8; 4];
    let mut tail = [0u8; scan::TAIL];
    vp.read_phys(gpa, &mut copy);
    if let Some(gpa) = before {
        vp.read_phys(gpa + PAGE_SIZE - scan::TAIL as u64, &mut tail);
    }
    if let Some(gpa) = after {
        vp.read_phys(gpa, &mut next);
    }
    let good =
        scan::is_direct(if before.is_some() { &tail } else { &[] }, &copy, if after.is_some() { &next } else { &[] })
            && (!seam || scan::is_direct_seam(&tail, &copy));
    if direct.looked_at.len() >= MOST_LOOKED_AT {
        direct.looked_at.clear();
    }
    direct.looked_at.insert(place, (state, good));
    good
}

/// Maps the page of a data access as the page tables allow it now, and others around it. Says whether more is allowed there than
/// before.
fn map_data(vp: &mut SoftVp, direct: &Direct, la: u64) -> bool {
    let page = la & !PAGE_MASK;
    if !is_free(page) {
        return false;
    }
    let before = vp.mmu.user_set().mirror.as_ref().and_then(|m| m.rights(page));
    let Some((gpa, write, shift)) = vp.user_page(page) else { return false };
    let rights = if write { Rights::Write } else { Rights::Read };
    if before == Some(rights) || before == Some(Rights::Write) || before == Some(Rights::Execute) && !write {
        return false;
    }
    if direct.place_of(vp, gpa).is_none() {
        return false;
    }
    let span = if shift > 12 { 512 } else { AROUND };
    let first = page & !(span * PAGE_SIZE - 1);
    for at in (first..first + span * PAGE_SIZE).step_by(PAGE_SIZE as usize) {
        if at == page {
            let Some(mirror) = &mut vp.mmu.user_set().mirror else { return false };
            mirror.map(page, gpa, rights, shift, None);
            continue;
        }
        if !is_free(at) || vp.mmu.user_set().mirror.as_ref().is_some_and(|m| m.rights(at).is_some()) {
            continue;
        }
        if let Some((gpa, write, shift)) = vp.user_page_around(at) {
            let rights = if write { Rights::Write } else { Rights::Read };
            let Some(mirror) = &mut vp.mmu.user_set().mirror else { return false };
            mirror.map(at, gpa, rights, shift, None);
        }
    }
    true
}

impl SoftVp {
    /// The physical page that ring 3 reads at `la`, whether it may be written as it is, and log2 of the guest's page size. Sets the
    /// A bit. `None`: not without a fault, or not plain memory.
    fn user_page(&mut self, la: u64) -> Option<(u64, bool, u32)> {
        debug_assert_eq!(self.access_class(), Class::User);
        // A probe of a watched page would count as an access to it.
        if self.is_watched(la) {
            return None;
        }
        self.probe_read(la, 1).ok()?;
        self.user_page_around(la)
    }

    /// As [`SoftVp::user_page`], where no A bit need be set.
    fn user_page_around(&mut self, la: u64) -> Option<(u64, bool, u32)> {
        let seen = self.peek(la)?;
        let gpa = seen.gpa & !PAGE_MASK;
        let write = seen.write;
        self.plain_page(la, gpa, write).map(|write| (gpa, write, seen.shift))
    }

    /// A selector that user code has loaded while it was executed directly.
    fn load_found_selector(&mut self, n: usize, selector: u16) {
        let loaded = if n == sreg::CS { self.found_in_segment(selector) } else { self.load_segment(n, selector) };
        if let Err(fault) = loaded {
            crate::exception::deliver(self, fault);
        }
    }
}
