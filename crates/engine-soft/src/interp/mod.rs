//! The interpreter: decoded instructions, operands, dispatch, and the general-purpose instructions (in submodules).
//!
//! An instruction is decoded once (kept in [`crate::code::DecodeCache`] by physical page). General-purpose instructions
//! become a compact operation of their own ([`op::Op`], made by [`lower`]); everything else becomes an [`Insn`] whose
//! handler is called with the VP and the `Insn`. Rules for handlers of both kinds:
//! * `vp.s.next_rip` already holds the address behind the instruction; branches overwrite it (after their checks).
//! * A handler that returns `Err` has changed nothing that the architecture does not say is changed: it checks and reads
//!   everything first, and writes registers last. Memory is written before registers.
//! * `iced` is decoded at IP 0 (decoded instructions are keyed by physical page): a RIP-relative displacement or a near
//!   branch target in it is relative to the *start* of the instruction, modulo 2^64. [`SoftVp::effective_address`] adds
//!   `s.rip`.

pub mod alu;
pub mod atomic;
pub mod bits;
pub mod branch;
pub mod data;
mod form;
pub mod host;
pub mod lower;
pub mod misc;
pub mod op;
pub mod operand;
pub mod string;

use crate::code::{BLOCK_MAX, CodeReader, Decoded, Key, MAX_LEN};
use crate::exception;
use crate::partition_impl::SoftPartition;
use crate::vp::{CodeSize, Exec, Fault, SoftVp, attention};
use iced_x86::Instruction;
use op::{Op, flag};
use partition::Activity;
use std::cell::Cell;
use std::sync::atomic::Ordering;
use x86::paging::{PAGE_MASK, PAGE_SIZE, is_canonical};
use x86::regs::{dr6, dr7, rflags};
use x86::segment::sreg;

/// Executes one decoded instruction.
pub type Handler = fn(&mut SoftVp, &Insn) -> Exec;

/// A decoded instruction.
#[derive(Clone)]
pub struct Insn {
    /// What to call.
    pub handler: Handler,
    /// As decoded, at IP 0.
    pub iced: Instruction,
    /// Bytes as fetched (the first `iced.len()` are valid).
    pub bytes: [u8; 15],
    /// For the handler's own use (something found once for this instruction); 0 at first.
    pub cache: Cell<u64>,
}

/// The linear address of the instruction at `rip`.
#[inline(always)]
pub(crate) fn code_linear(vp: &SoftVp) -> u64 {
    let rip = vp.s.rip;
    if vp.s.code_size == CodeSize::Bits64 { rip } else { vp.s.segments[sreg::CS].base.wrapping_add(rip) & 0xffff_ffff }
}

/// Makes the page of linear address `la` current.
#[inline]
fn enter_page(vp: &mut SoftVp, la: u64) -> Exec {
    let page = vp.fetch_page(la)?;
    let generation = vp.partition.code_generations.get(page.gpa >> 12);
    let current = &mut vp.decoded.current;
    current.page = la & !PAGE_MASK;
    current.epoch = vp.s.tlb.code_epoch;
    current.gpa = page.gpa;
    current.host = page.host;
    current.generation = generation;
    Ok(())
}

/// How many bytes may be fetched from `rip` on, as far as the code segment says: up to [`MAX_LEN`].
fn fetchable(vp: &SoftVp) -> Exec<usize> {
    let rip = vp.s.rip;
    if vp.s.code_size == CodeSize::Bits64 {
        return if is_canonical(rip) { Ok(MAX_LEN) } else { Err(Fault::GP0) };
    }
    let limit = u64::from(vp.s.segments[sreg::CS].limit);
    if rip > limit {
        return Err(Fault::GP0);
    }
    Ok(MAX_LEN.min((limit - rip) as usize + 1))
}

/// What to execute next.
enum Next {
    /// A block of the cache.
    Block(u32),
    /// One instruction, in the cache's scratch place.
    Single(*const Op),
}

/// Finds or decodes what is at RIP.
fn lookup(vp: &mut SoftVp, most: usize) -> Exec<Next> {
    let la = code_linear(vp);
    if la & !PAGE_MASK != vp.decoded.current.page || vp.decoded.current.epoch != vp.s.tlb.code_epoch {
        if vp.s.code_size == CodeSize::Bits64 {
            if !is_canonical(la) {
                return Err(Fault::GP0);
            }
        } else {
            fetchable(vp)?;
        }
        enter_page(vp, la)?;
    }
    let current = vp.decoded.current;
    let key = Key::new(current.gpa | la & PAGE_MASK, vp.s.code_size, current.generation);
    if let Some(number) = vp.decoded.find(key) {
        if in_limit(vp, number) {
            return Ok(Next::Block(number));
        }
        return decode_single(vp, la);
    }
    decode_block(vp, la, most)
}

/// Does all of a block lie inside the code segment?
#[inline(always)]
fn in_limit(vp: &SoftVp, number: u32) -> bool {
    vp.s.code_size == CodeSize::Bits64
        || vp.s.rip + u64::from(vp.decoded.block(number).bytes) <= u64::from(vp.s.segments[sreg::CS].limit) + 1
}

/// Decodes the block at RIP, at most `most` instructions, and keeps it.
#[cold]
fn decode_block(vp: &mut SoftVp, la: u64, most: usize) -> Exec<Next> {
    if vp.decoded.full() {
        vp.decoded.clear();
        enter_page(vp, la)?;
    }
    let current = vp.decoded.current;
    if current.host.is_null() || fetchable(vp)? < MAX_LEN {
        return decode_single(vp, la);
    }
    let generation = vp.partition.track_code(current.gpa >> 12);
    if vp.s.attention.load(Ordering::Relaxed) & attention::REQUEST != 0 {
        // This VP's own write permission for the page must be gone before its next store.
        SoftPartition::process_requests(vp);
        if vp.s.tlb.code_epoch != current.epoch {
            enter_page(vp, la)?;
            if vp.decoded.current.gpa != current.gpa {
                return decode_single(vp, la);
            }
        }
    }
    vp.decoded.current.generation = generation;
    let start = (la & PAGE_MASK) as usize;
    let mut room = PAGE_SIZE as usize - start;
    let size = vp.s.code_size;
    if size != CodeSize::Bits64 {
        let limit = u64::from(vp.s.segments[sreg::CS].limit);
        room = room.min((limit - vp.s.rip) as usize + 1);
    }
    // A copy, because the guest may change the bytes while they are decoded.
    let mut bytes = [0u8; BLOCK_MAX * MAX_LEN];
    let room = room.min(most * MAX_LEN).min(bytes.len());
    // SAFETY: `host` is the address of a page of guest memory; start + room <= 4096.
    unsafe { std::ptr::copy_nonoverlapping(current.host.add(start), bytes.as_mut_ptr(), room) };
    let mut reader = CodeReader::new(&bytes[..room], size, &vp.features);
    let mut ops: [std::mem::MaybeUninit<Op>; BLOCK_MAX] = [std::mem::MaybeUninit::uninit(); BLOCK_MAX];
    let mut count = 0;
    let mut end = 0;
    while count < most {
        let Some(d) = reader.decode() else { break };
        end = reader.position();
        let op = vp.decoded.digest(&d, size, &vp.features);
        ops[count].write(op);
        count += 1;
        if op.flags & flag::END != 0 {
            break;
        }
    }
    if count == 0 {
        return decode_single(vp, la);
    }
    let key = Key::new(current.gpa | la & PAGE_MASK, size, generation);
    // SAFETY: the first `count` elements have been written.
    let ops = unsafe { std::slice::from_raw_parts(ops.as_ptr().cast::<Op>(), count) };
    Ok(Next::Block(vp.decoded.add(key, ops, end as u16)))
}

/// Decodes one instruction without keeping it: one that crosses a page or is not in memory.
fn decode_single(vp: &mut SoftVp, la: u64) -> Exec<Next> {
    let allowed = fetchable(vp)?;
    let current = vp.decoded.current;
    let mut bytes = [0u8; MAX_LEN];
    let in_page = (PAGE_SIZE - (la & PAGE_MASK)) as usize;
    let first = in_page.min(allowed);
    fetch(vp, current.host, current.gpa | la & PAGE_MASK, &mut bytes[..first]);
    let size = vp.s.code_size;
    let mut have = first;
    if in_page < allowed && CodeReader::new(&bytes[..first], size, &vp.features).decode().is_none() {
        let next = la.wrapping_add(in_page as u64);
        let next = if size == CodeSize::Bits64 { next } else { next & 0xffff_ffff };
        if size == CodeSize::Bits64 && !is_canonical(next) {
            return Err(Fault::GP0);
        }
        let page = vp.fetch_page(next)?;
        fetch(vp, page.host, page.gpa, &mut bytes[first..allowed]);
        have = allowed;
    }
    let Some(d) = CodeReader::new(&bytes[..have], size, &vp.features).decode() else {
        // More than 15 bytes, or the code segment ends inside the instruction.
        return Err(Fault::GP0);
    };
    Ok(Next::Single(single(vp, &d)))
}

fn single(vp: &mut SoftVp, d: &Decoded) -> *const Op {
    let size = vp.s.code_size;
    vp.decoded.digest_scratch(d, size, &vp.features)
}

fn fetch(vp: &mut SoftVp, host: *const u8, gpa: u64, bytes: &mut [u8]) {
    if host.is_null() {
        vp.read_phys(gpa, bytes);
    } else {
        // SAFETY: `host` is the address of the page of guest memory that holds `gpa`; callers stay inside the page.
        unsafe {
            std::ptr::copy_nonoverlapping(host.add((gpa & PAGE_MASK) as usize), bytes.as_mut_ptr(), bytes.len());
        }
    }
}

/// Executes one instruction with everything that belongs to its boundaries: pending debug exceptions, instruction
/// breakpoints, single step, RF, the interrupt shadow; delivers the exception if it raises one.
pub fn step(vp: &mut SoftVp) {
    vp.s.attention.fetch_and(!attention::CODE, Ordering::AcqRel);
    vp.decoded.current.page = 1;
    if !debug_trap(vp) {
        step_checked(vp);
    }
    vp.update_boundary();
}

/// Executes one instruction where nothing special waits at its boundaries ([`attention::BOUNDARY`] is clear), and
/// delivers the exception if it raises one. For the translator, which executes single instructions here.
pub fn one(vp: &mut SoftVp) {
    let op = match lookup(vp, 1) {
        Ok(Next::Block(number)) => vp.decoded.block(number).ops,
        Ok(Next::Single(op)) => op,
        Err(fault) => return exception::deliver(vp, fault),
    };
    // SAFETY: the instruction lives in the cache, which is only cleared by `lookup`.
    let op = unsafe { &*op };
    vp.s.next_rip = next_rip(vp, op.len);
    vp.s.instructions += 1;
    match (op.run)(vp, op) {
        Ok(()) => {
            vp.s.rip = vp.s.next_rip;
            if vp.s.attention.load(Ordering::Relaxed) != 0 {
                debug_trap(vp);
            }
        }
        Err(Fault::Restart) => {}
        Err(fault) => exception::deliver(vp, fault),
    }
}

/// As [`one`], but leaves its exception to the caller; RIP is on the instruction then.
pub fn quiet(vp: &mut SoftVp) -> Exec {
    let op = match lookup(vp, 1)? {
        Next::Block(number) => vp.decoded.block(number).ops,
        Next::Single(op) => op,
    };
    // SAFETY: the instruction lives in the cache, which is only cleared by `lookup`.
    let op = unsafe { &*op };
    vp.s.next_rip = next_rip(vp, op.len);
    vp.s.instructions += 1;
    (op.run)(vp, op)?;
    vp.s.rip = vp.s.next_rip;
    Ok(())
}

/// Delivers the debug trap of the previous instruction, if there is one and no MOV SS holds it back.
fn debug_trap(vp: &mut SoftVp) -> bool {
    let due = vp.s.pending_debug != 0 && !vp.s.mov_ss_shadow;
    if due {
        exception::deliver(vp, DEBUG);
    }
    due
}

const DEBUG: Fault = Fault::Exception { vector: x86::exception::DB, error: 0 };

fn step_checked(vp: &mut SoftVp) {
    let before = vp.s.rflags;
    if before & rflags::RF == 0 && !vp.s.mov_ss_shadow && vp.s.dr7 & dr7::ENABLES != 0 {
        let hits = instruction_breakpoints(vp);
        if hits != 0 {
            vp.s.pending_debug |= hits;
            exception::deliver(vp, DEBUG);
            return;
        }
    }
    let op = match lookup(vp, BLOCK_MAX) {
        Ok(Next::Block(number)) => vp.decoded.block(number).ops,
        Ok(Next::Single(op)) => op,
        Err(fault) => return exception::deliver(vp, fault),
    };
    // SAFETY: the instruction lives in the cache, which is only cleared by `lookup`.
    let op = unsafe { &*op };
    let shadows = (vp.s.interrupt_shadow, vp.s.mov_ss_shadow);
    vp.s.rflags &= !rflags::RF;
    (vp.s.interrupt_shadow, vp.s.mov_ss_shadow) = (false, false);
    let sequential = next_rip(vp, op.len);
    vp.s.next_rip = sequential;
    vp.s.instructions += 1;
    match (op.run)(vp, op) {
        Ok(()) => {}
        Err(Fault::Restart) => {
            vp.s.rflags |= before & rflags::RF;
            (vp.s.interrupt_shadow, vp.s.mov_ss_shadow) = shadows;
            return;
        }
        Err(fault) => return exception::deliver(vp, fault),
    }
    // What decides is TF before the instruction, so that the POPF that clears it still traps; but a transfer that clears it
    // on the way to a handler (INT n, SYSCALL) does not.
    if before & rflags::TF != 0 && (vp.s.rflags & rflags::TF != 0 || vp.s.next_rip == sequential) {
        vp.s.pending_debug |= dr6::BS;
    }
    vp.s.rip = vp.s.next_rip;
    debug_trap(vp);
}

/// DR6 bits of the instruction breakpoints at RIP (SDM volume 3, section 17.2.4).
fn instruction_breakpoints(vp: &SoftVp) -> u64 {
    let la = code_linear(vp);
    let s = &vp.s;
    (0..4)
        .filter(|&n| s.dr7 >> (2 * n) & 3 != 0 && s.dr7 >> (16 + 4 * n) & 15 == 0 && s.dr[n] == la)
        .fold(0, |bits, n| bits | 1 << n)
}

#[inline(always)]
fn next_rip(vp: &SoftVp, len: u8) -> u64 {
    let next = vp.s.rip.wrapping_add(len.into());
    // Behind the end of a 64 KiB segment IP does not wrap: the next fetch finds it outside the limit.
    if vp.s.code_size == CodeSize::Bits64 { next } else { next & 0xffff_ffff }
}

/// Executes until [`crate::vp::attention`] has a bit other than CODE (which it handles and clears itself), the VP is
/// not [`partition::Activity::Running`] any more, or one instruction after it was entered with BOUNDARY set.
pub fn run(vp: &mut SoftVp) {
    run_until(vp, false);
}

/// As [`run`]; with `long` also returns when 64-bit code is to be executed.
pub fn run_until(vp: &mut SoftVp, long: bool) {
    let mut from = None;
    loop {
        if long && vp.s.code_size == CodeSize::Bits64 {
            return;
        }
        let attention = vp.s.attention.load(Ordering::Relaxed);
        if attention != 0 || vp.activity != Activity::Running {
            if vp.activity != Activity::Running || attention & !(attention::CODE | attention::BOUNDARY) != 0 {
                return;
            }
            if attention & attention::BOUNDARY != 0 {
                step(vp);
                return;
            }
            vp.s.attention.fetch_and(!attention::CODE, Ordering::AcqRel);
            vp.decoded.current.page = 1;
            from = None;
        }
        // The common case: on to a place in the same page where this block has gone before.
        let la = code_linear(vp);
        let current = &vp.decoded.current;
        let same = la & !PAGE_MASK == current.page && current.epoch == vp.s.tlb.code_epoch;
        let offset = (la & PAGE_MASK) as u16;
        let number = match from.filter(|_| same).and_then(|b| vp.decoded.follow(b, offset)) {
            Some(number) if in_limit(vp, number) => number,
            _ => {
                match lookup(vp, BLOCK_MAX) {
                    Ok(Next::Block(number)) => {
                        if let Some(b) = from.filter(|_| same) {
                            vp.decoded.link(b, offset, number);
                        }
                        number
                    }
                    Ok(Next::Single(op)) => {
                        from = None;
                        // SAFETY: the instruction lives in the cache, which is only cleared by `lookup`.
                        let op = unsafe { &*op };
                        vp.s.next_rip = next_rip(vp, op.len);
                        match (op.run)(vp, op) {
                            Ok(()) => vp.s.rip = vp.s.next_rip,
                            Err(fault) => exception::deliver(vp, fault),
                        }
                        vp.s.instructions += 1;
                        continue;
                    }
                    Err(fault) => {
                        from = None;
                        exception::deliver(vp, fault);
                        continue;
                    }
                }
            }
        };
        from = Some(number);
        if !run_block(vp, number) {
            from = None;
        }
    }
}

/// Executes a block until its end, an exception, or a reason to look up. Returns whether it ran to its end.
#[inline(always)]
fn run_block(vp: &mut SoftVp, number: u32) -> bool {
    let block = vp.decoded.block(number);
    let (first, count) = (block.ops, block.count as usize);
    let mut rip = vp.s.rip;
    for n in 0..count {
        // SAFETY: a block has `count` instructions, and the cache is only cleared by `lookup`.
        let op = unsafe { &*first.add(n) };
        vp.s.rip = rip;
        // Blocks lie inside the code segment's limit: no wrapping to 16 or 32 bits but behind its last byte, where the
        // next lookup sees it.
        rip = rip.wrapping_add(op.len.into());
        vp.s.next_rip = rip;
        if let Err(fault) = (op.run)(vp, op) {
            vp.s.instructions += n as u64 + 1;
            exception::deliver(vp, fault);
            return false;
        }
        if vp.s.attention.load(Ordering::Relaxed) != 0 {
            vp.s.instructions += n as u64 + 1;
            vp.s.rip = vp.s.next_rip;
            // A data breakpoint traps before an interrupt can be taken.
            debug_trap(vp);
            return false;
        }
    }
    vp.s.instructions += count as u64;
    vp.s.rip = vp.s.next_rip;
    true
}

/// Executes one instruction without boundary rules and without delivering its exception. For tests; a fault leaves RIP on
/// the instruction.
pub fn try_step(vp: &mut SoftVp) -> Exec {
    vp.s.attention.fetch_and(!attention::CODE, Ordering::AcqRel);
    vp.decoded.current.page = 1;
    let op = match lookup(vp, BLOCK_MAX)? {
        Next::Block(number) => vp.decoded.block(number).ops,
        Next::Single(op) => op,
    };
    // SAFETY: the instruction lives in the cache, which is only cleared by `lookup`.
    let op = unsafe { &*op };
    vp.s.next_rip = next_rip(vp, op.len);
    vp.s.instructions += 1;
    (op.run)(vp, op)?;
    vp.s.rip = vp.s.next_rip;
    Ok(())
}

/// For tests and tools: decodes the instruction at RIP, without executing it.
pub fn decode(vp: &mut SoftVp) -> Exec<Instruction> {
    let la = code_linear(vp);
    fetchable(vp)?;
    enter_page(vp, la)?;
    let allowed = fetchable(vp)?;
    let current = vp.decoded.current;
    let mut bytes = [0u8; MAX_LEN];
    let in_page = ((PAGE_SIZE - (la & PAGE_MASK)) as usize).min(allowed);
    fetch(vp, current.host, current.gpa | la & PAGE_MASK, &mut bytes[..in_page]);
    let mut have = in_page;
    if in_page < allowed
        && let Ok(page) = vp.fetch_page(la.wrapping_add(in_page as u64))
    {
        fetch(vp, page.host, page.gpa, &mut bytes[in_page..allowed]);
        have = allowed;
    }
    let d = CodeReader::new(&bytes[..have], vp.s.code_size, &vp.features).decode().ok_or(Fault::GP0)?;
    Ok(d.iced)
}
