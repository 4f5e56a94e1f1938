//! Executing through translations: finding, making and chaining blocks, and what happens when they come back.

use super::cache::{Key, Translator};
use super::kernel::{self, Mode};
use super::lower::lower;
use super::plan::{self, Origin, Shape};
use super::thunks::{self, Helpers, Thunks};
use crate::stats::Count;
use crate::vp::{CodeSize, SoftVp, VpBlock, attention};
use crate::{interp, signals};
use partition::Activity;
use partition::clock::host_tsc;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::Ordering;
use x86::paging::PAGE_SIZE;
use x86::regs::{cr0, cr4, rflags, xcr0};

thread_local! {
    /// The translator whose code this thread executes, and the VP's block, for the signal handler.
    static CURRENT: Cell<(*const Translator, *const VpBlock)> = const { Cell::new((std::ptr::null(), std::ptr::null())) };
}

/// Called from translated code: executes the instruction at the VP block's RIP. Not zero if the block can go on behind
/// its `len` bytes.
unsafe extern "C" fn interpret(vp: *mut SoftVp, len: u64) -> u64 {
    // SAFETY: translated code passes the VP that `run` stored, and `run` does not use its reference meanwhile.
    let vp = unsafe { &mut *vp };
    vp.counts.add(Count::Interpreted, 1);
    guarded(vp, |vp| {
        let (expected, cpl) = (wrap(vp, vp.s.rip.wrapping_add(len)), vp.s.cpl);
        if vp.s.jit.verify != 0 {
            vp.verify.fault = interp::quiet(vp).err();
            return u64::from(vp.verify.fault.is_none() && vp.s.rip == expected);
        }
        interp::one(vp);
        let go_on = vp.s.rip == expected
            && vp.s.cpl == cpl
            && translates(vp)
            && vp.s.attention.load(Ordering::Relaxed) == 0
            && vp.activity == Activity::Running
            && vp.s.tlb.code_epoch == vp.s.jit.shadow_epoch
            && same_facts(vp);
        u64::from(go_on)
    })
}

/// Called from translated code: makes the TLB hit for an access that will perhaps follow, if that changes nothing but A bits (and D
/// bits, for a write that follows at once). What is wanted: bytes, bit 16 for a write, bit 17 if a copy of the operand will do, bit
/// 18 if the access follows at once. Gives a [`super::memory::Filled`].
unsafe extern "C" fn fill(vp: *mut SoftVp, la: u64, wanted: u64) -> u64 {
    // SAFETY: as in `interpret`.
    let vp = unsafe { &mut *vp };
    let bit = |n: u32| wanted >> n & 1 != 0;
    guarded(vp, |vp| vp.fill_for(la, wanted as u16, bit(16), bit(17), bit(18)) as u64)
}

/// Called from translated code: the copy that [`fill`] made has been worked on.
unsafe extern "C" fn put_back(vp: *mut SoftVp) {
    // SAFETY: as in `interpret`.
    let vp = unsafe { &mut *vp };
    guarded(vp, |vp| {
        vp.put_back();
        0
    });
}

/// An address of code, as wide as the mode of the code that is executed has it.
fn wrap(vp: &SoftVp, rip: u64) -> u64 {
    if vp.s.jit.mode == 0 { rip } else { rip & 0xffff_ffff }
}

/// Does what blocks of 16- or 32-bit code rely on still hold, behind an instruction that the interpreter has executed?
fn same_facts(vp: &mut SoftVp) -> bool {
    if vp.s.jit.mode == 0 && vp.s.code_size == CodeSize::Bits64 || vp.sync_facts() {
        return true;
    }
    // [`sync_mode`] finds out what they are called.
    (vp.s.jit.mode, vp.s.jit.shadow_epoch) = (0, 0);
    false
}

/// Finds out what translated code may rely on now.
pub(super) fn sync_mode(vp: &mut SoftVp, t: &mut Translator) {
    if vp.s.jit.mode == 0 && vp.s.code_size == CodeSize::Bits64 {
        return;
    }
    let same = vp.sync_facts();
    let number = match vp.run.facts {
        None => 0,
        Some(_) if same && vp.s.jit.mode != 0 => return,
        Some(facts) => t.mode(&facts).unwrap_or_else(|| {
            t.forget_modes();
            vp.flush_jumps();
            t.mode(&facts).unwrap_or(1)
        }),
    };
    vp.s.jit.mode = number.into();
    // Return addresses were those of other code.
    vp.s.jit.shadow_epoch = 0;
}

/// What translated code relies on of the address space in use.
fn prepare(vp: &mut SoftVp, t: &mut Translator) {
    sync_mode(vp, t);
    (vp.s.jit.jump_table, vp.s.jit.links) = vp.jump_tables();
    sync_shadow(vp, t);
}

/// Return addresses are good as long as code is where it was.
fn sync_shadow(vp: &mut SoftVp, t: &Translator) {
    if vp.s.jit.shadow_epoch != vp.s.tlb.code_epoch {
        vp.s.jit.shadow_epoch = vp.s.tlb.code_epoch;
        vp.s.jit.shadow_rsp = t.shadow.top();
    }
}

/// Drops all translations.
pub(super) fn flush(vp: &mut SoftVp, t: &mut Translator) {
    t.flush();
    vp.flush_jumps();
    vp.s.jit.shadow_epoch = 0;
}

/// Called from translated code where a block ends and the next one is not known: does what the code asks for and finds
/// the next block. Gives its entry through the jump table, or 0: leave, the VP block's RIP is right.
unsafe extern "C" fn advance(vp: *mut SoftVp, value: u64, code: u64) -> u64 {
    // SAFETY: as in `interpret`; `execute` stored the translator and does not use its reference meanwhile.
    let (vp, t) = unsafe { (&mut *vp, (*vp).s.jit.translator as *mut Translator) };
    let (code, link) = (code & 0xff, code >> 8);
    let what = match code {
        thunks::code::LINK => Count::Links,
        thunks::code::DIRECT => Count::Direct,
        thunks::code::INTERPRET => Count::System,
        thunks::code::TABLE => Count::Table,
        _ => Count::Diverted,
    };
    vp.counts.add(what, 1);
    guarded(vp, |vp| {
        // SAFETY: see above.
        let t = unsafe { &mut *t };
        let (mut exit, mut shape) = (None, Shape::Grouped);
        if vp.s.jit.verify != 0 {
            match code {
                thunks::code::DIRECT => {
                    let Some((target, wanted)) = t.exit_target(value) else { return 0 };
                    vp.s.rip = wrap(vp, vp.s.jit.page.wrapping_add(target.into()));
                    vp.verify.single = wanted == Shape::Single;
                }
                thunks::code::INTERPRET | thunks::code::TABLE | thunks::code::LINK => vp.s.rip = value,
                _ => {}
            }
            vp.verify.early = code == thunks::code::INTERPRET || vp.verify.single;
            return 0;
        }
        match code {
            thunks::code::DIRECT => {
                let Some((target, wanted)) = t.exit_target(value) else { return 0 };
                vp.s.rip = wrap(vp, vp.s.jit.page.wrapping_add(target.into()));
                shape = wanted;
                exit = Some(value);
            }
            thunks::code::INTERPRET => {
                vp.s.rip = value;
                interp::one(vp);
            }
            thunks::code::TABLE | thunks::code::LINK => vp.s.rip = value,
            _ => {}
        }
        if vp.s.attention.load(Ordering::SeqCst) != 0 || vp.activity != Activity::Running || !translates(vp) {
            return 0;
        }
        if vp.is_direct() {
            return 0;
        }
        prepare(vp, t);
        let link = (code == thunks::code::LINK).then_some(link as u32);
        if exit.is_none()
            && link.is_none()
            && let Some(host) = vp.find_jump()
        {
            return host;
        }
        let Some(block) = find(vp, t, shape) else {
            // The run loop would enter the block with groups here, whose check has just failed.
            if vp.s.attention.load(Ordering::SeqCst) == 0 {
                interp::one(vp);
            }
            return 0;
        };
        // Translating may have asked this VP to drop its write permission for the page, which comes first.
        if vp.s.attention.load(Ordering::SeqCst) != 0 {
            return 0;
        }
        // Translating may have dropped everything.
        sync_shadow(vp, t);
        let host = t.table_entry(block);
        match exit {
            Some(exit) => t.chain(exit, block),
            None => vp.enter_jump(vp.s.rip, host, t.goes_on(block), link),
        }
        host
    })
}

/// Is what comes next code that is translated? Privilege levels 1 and 2 are not: nobody uses them, and so blocks of
/// supervisor code may rely on level 0.
fn translates(vp: &SoftVp) -> bool {
    matches!(vp.s.cpl, 0 | 3) && kernel::assumed(vp) == vp.s.jit.assumed
}

/// One call in this many is timed.
const CALLS_A_SAMPLE: u32 = 64;

/// A panic must not unwind through translated code: it is kept for [`run`] to go on with.
fn guarded(vp: &mut SoftVp, f: impl FnOnce(&mut SoftVp) -> u64) -> u64 {
    vp.run.calls = vp.run.calls.wrapping_add(1);
    let begun = vp.run.calls.is_multiple_of(CALLS_A_SAMPLE).then(host_tsc);
    let result = catch_unwind(AssertUnwindSafe(|| f(vp)));
    if let Some(begun) = begun {
        vp.counts.add(Count::CallTicks, host_tsc().wrapping_sub(begun) * u64::from(CALLS_A_SAMPLE));
    }
    match result {
        Ok(value) => value,
        Err(panic) => {
            vp.run.panic = Some(panic);
            vp.s.attention.fetch_or(attention::KICK, Ordering::SeqCst);
            0
        }
    }
}

/// Called from translated code: may the vector state be used at this level (1 SSE and x87, 2 AVX)? Gives the level that
/// may, or 0.
unsafe extern "C" fn vector(vp: *mut SoftVp, level: u64) -> u64 {
    // SAFETY: as in `interpret`.
    let s = unsafe { &(*vp).s };
    if s.cr0 & (cr0::EM | cr0::TS) != 0 || s.cr4 & cr4::OSFXSR == 0 {
        return 0;
    }
    let both = xcr0::SSE | xcr0::AVX;
    let avx = s.cr4 & cr4::OSXSAVE != 0 && s.xcr0 & both == both && s.rflags & rflags::VM == 0;
    let have = 1 + u64::from(avx);
    if have >= level { have } else { 0 }
}

/// Executes until something wants attention; the same contract as [`interp::run`].
pub fn run(vp: &mut SoftVp) {
    signals::prepare_thread();
    let Some(mut translator) = take(vp) else {
        interp::run(vp);
        return;
    };
    run_with(vp, &mut translator);
    vp.translator = Some(translator);
}

/// The VP's translator, made on first use. `None`: the host gives no executable memory.
pub(super) fn take(vp: &mut SoftVp) -> Option<Box<Translator>> {
    if let Some(translator) = vp.translator.take() {
        return Some(translator);
    }
    if vp.translator_refused {
        return None;
    }
    signals::install();
    let share = vp.partition.options.code_cache_bytes / vp.partition.vp_count().max(1) as usize;
    match Translator::new(share, Helpers { interpret, vector, fill, put_back, advance }) {
        Ok(translator) => Some(Box::new(translator)),
        Err(error) => {
            tracing::warn!(%error, "the host gives no executable memory (vm.memfd_noexec, SELinux execmem?): \
                the guest is interpreted, many times slower");
            vp.translator_refused = true;
            None
        }
    }
}

fn run_with(vp: &mut SoftVp, t: &mut Translator) {
    if vp.s.attention.load(Ordering::SeqCst) & attention::BOUNDARY != 0 {
        interp::run(vp);
        drop_changed(vp, t);
        return;
    }
    loop {
        let bits = vp.s.attention.load(Ordering::SeqCst);
        if bits & attention::CODE != 0 {
            vp.s.attention.fetch_and(!attention::CODE, Ordering::SeqCst);
            // The interpreter looks the generation of its page up again.
            vp.decoded.current.page = 1;
            drop_changed(vp, t);
        }
        if bits & !attention::CODE != 0 || vp.activity != Activity::Running {
            return;
        }
        let assumed = kernel::assumed(vp);
        if assumed != vp.s.jit.assumed {
            vp.s.jit.assumed = assumed;
            flush(vp, t);
        }
        if vp.goes_direct() {
            crate::direct::run::run(vp);
            continue;
        }
        sync_mode(vp, t);
        let block = if translates(vp) { find(vp, t, Shape::Grouped) } else { None };
        let Some(block) = block else {
            interp::one(vp);
            continue;
        };
        // Translating may have asked this VP to drop its write permission for the page, which comes first.
        if vp.s.attention.load(Ordering::SeqCst) != 0 {
            continue;
        }
        let entry = t.entry(block);
        let begun = host_tsc();
        let (code, value) = execute(vp, t, entry);
        vp.counts.add(Count::Leaves, 1);
        vp.counts.add(Count::CodeTicks, host_tsc().wrapping_sub(begun));
        if let Some(panic) = vp.run.panic.take() {
            resume_unwind(panic);
        }
        match code {
            thunks::code::INTERPRET => {
                vp.s.rip = value;
                interp::one(vp);
            }
            thunks::code::RESUME => vp.s.rip = value,
            _ => {}
        }
    }
}

/// Enters translated code; gives the exit's code and value.
pub(super) fn execute(vp: &mut SoftVp, t: &mut Translator, entry: u64) -> (u64, u64) {
    prepare(vp, t);
    vp.s.jit.shadow_top = t.shadow.top();
    vp.s.jit.page = vp.code_page();
    let Thunks { enter, fsgsbase, .. } = t.thunks;
    let translator: *mut Translator = t;
    vp.s.jit.translator = translator as u64;
    let vp_pointer: *mut SoftVp = vp;
    // SAFETY: a live VP.
    let block: *mut VpBlock = unsafe {
        (*vp_pointer).s.jit.vp = vp_pointer as u64;
        &raw mut *(*vp_pointer).s
    };
    if !fsgsbase {
        // SAFETY: the VP's own block, which lives as long as the VP.
        unsafe { thunks::set_gs_base(block) };
    }
    // SAFETY: `enter` was generated with this signature; it keeps the callee-saved registers. Translated code reaches
    // host memory only through the TLB, the VP block and the jump table, and calls back only `interpret`, `vector` and
    // `advance`, with the pointers just stored; this function does not use its references until it returns.
    unsafe {
        let enter: unsafe extern "C" fn(*mut VpBlock, u64) -> u64 = std::mem::transmute(enter as *const ());
        CURRENT.set((translator, block));
        let code = enter(block, entry);
        CURRENT.set((std::ptr::null(), std::ptr::null()));
        (*vp_pointer).s.jit.translator = 0;
        (code, (*vp_pointer).s.jit.exit_value)
    }
}

/// The block at the VP's RIP, translated if need be. `None`: not from plain memory, or the fetch faults.
pub(super) fn find(vp: &mut SoftVp, t: &mut Translator, shape: Shape) -> Option<u32> {
    let rip = vp.s.rip;
    let facts = vp.run.facts.filter(|_| vp.s.jit.mode != 0);
    if facts.is_some_and(|f| rip > f.code_limit.into()) {
        return None;
    }
    let la = interp::code_linear(vp);
    let page = vp.fetch_page(la).ok()?;
    if page.host.is_null() {
        return None;
    }
    let offset = la & (PAGE_SIZE - 1);
    let origin = Origin { rip, page: vp.code_page(), facts };
    // Translations do not depend on their address, but their comparison with the interpreter does, and those of code in a
    // segment that is not flat do.
    let linear = match facts {
        Some(f) if vp.s.jit.verify != 0 || !f.code_is_flat() => origin.page | 1 << 32,
        None if vp.s.jit.verify != 0 => origin.page,
        _ => 0,
    };
    let mode = vp.s.jit.mode as u16;
    let mut key = Key { gpa: page.gpa | offset, next: 0, shape, kernel: vp.s.cpl == 0, linear, mode };
    if let Some(block) = t.find(key) {
        return Some(block);
    }
    let mut end = [0; LONGEST as usize];
    let left = (PAGE_SIZE - offset).min(LONGEST) as usize;
    // SAFETY: `host` is a page that `fetch_page` found: live guest memory. It may change while it is copied; then what is
    // guessed here is found to be wrong below.
    unsafe { std::ptr::copy_nonoverlapping(page.host.add(offset as usize), end.as_mut_ptr(), left) };
    let crosses = left < end.len() && plan::goes_on(&end[..left], origin.bits());
    if !crosses && let Some(block) = translate(vp, t, key, origin, [page.host, std::ptr::null()]) {
        return Some(block);
    }
    // The instruction goes on in the next page.
    let next = (la | (PAGE_SIZE - 1)).wrapping_add(1);
    let next = vp.fetch_page(if facts.is_some() { next & 0xffff_ffff } else { next }).ok()?;
    if next.host.is_null() || next.gpa == 0 || offset + LONGEST <= PAGE_SIZE {
        return None;
    }
    key.next = next.gpa;
    if let Some(block) = t.find(key) {
        return Some(block);
    }
    translate(vp, t, key, origin, [page.host, next.host])
}

/// Bytes of the longest instruction.
const LONGEST: u64 = 15;

/// Translates a block from its page, and the one that it goes on in.
fn translate(vp: &mut SoftVp, t: &mut Translator, key: Key, origin: Origin, hosts: [*const u8; 2]) -> Option<u32> {
    let begun = host_tsc();
    let block = make(vp, t, key, origin, hosts);
    vp.counts.add(Count::TranslateTicks, host_tsc().wrapping_sub(begun));
    block
}

fn make(vp: &mut SoftVp, t: &mut Translator, key: Key, origin: Origin, hosts: [*const u8; 2]) -> Option<u32> {
    let mut generations = [0; 2];
    let mut len = 0;
    for (n, host) in hosts.into_iter().enumerate().filter(|(_, host)| !host.is_null()) {
        let page = [key.gpa, key.next][n] >> 12;
        let generation = vp.partition.track_code(page);
        if t.page_generation(page).is_some_and(|g| g != generation) {
            t.drop_page(page);
            vp.flush_jumps();
        }
        generations[n] = generation;
        let copy = t.page_copy();
        let count = if n == 0 { PAGE_SIZE } else { LONGEST } as usize;
        // Pages with this generation cannot change without another one.
        if n != 0 || copy.of != (page, generation) {
            // SAFETY: `host` is a page that `fetch_page` found: live guest memory. It may change while it is copied; then its
            // generation changes too, and the block is dropped.
            unsafe { std::ptr::copy_nonoverlapping(host, copy.bytes[len..].as_mut_ptr(), count) };
            if n == 0 {
                copy.of = (page, generation);
            }
        }
        len += count;
    }
    if !t.make_room() {
        flush(vp, t);
    }
    let offset = (key.gpa & (PAGE_SIZE - 1)) as usize;
    let at = t.next();
    let thunks = t.thunks;
    let copy = t.page_copy();
    if vp.s.jit.sabotage != 0 && copy.bytes[offset..].starts_with(&[0x48, 0x01]) {
        copy.bytes[offset + 1] = 0x29;
    }
    if let Some(facts) = origin.facts.filter(|f| !f.code_is_flat()) {
        // Nothing behind the segment's end is code.
        let left = u64::from(facts.code_limit).saturating_sub(origin.rip) + 1;
        len = len.min(offset + usize::try_from(left).unwrap_or(usize::MAX - offset));
    }
    let lowered = lower(origin, &copy.bytes[..len], key.shape, &vp.features, Mode::of(vp), &thunks, at)?;
    t.insert(key, generations, lowered)
}

/// Drops the blocks of pages that have changed.
pub(super) fn drop_changed(vp: &mut SoftVp, t: &mut Translator) {
    let generations = &vp.partition.code_generations;
    let named = {
        let log = vp.partition.changed_code.lock().unwrap_or_else(|e| e.into_inner());
        let from = t.log_seen.checked_sub(log.0);
        t.log_seen = log.0 + log.1.len() as u64;
        from.and_then(|from| log.1.get(from as usize..)).map(<[u64]>::to_vec)
    };
    let changed = match named {
        Some(pages) => pages
            .into_iter()
            .filter(|page| t.page_generation(*page).is_some_and(|g| g != generations.get(*page)))
            .collect(),
        None => t.changed_pages(|page| generations.get(page)),
    };
    if changed.is_empty() {
        return;
    }
    for page in changed {
        t.drop_page(page);
    }
    vp.flush_jumps();
}

/// Called by the process's signal handler: if the signal was raised by translated code of this thread, has the
/// interpreter execute the instruction (and raise the guest's exception). Says whether it was.
///
/// # Safety
/// Only from a signal handler, with its `ucontext`.
pub unsafe fn take_signal(context: *mut libc::ucontext_t) -> bool {
    let (current, block) = CURRENT.with(Cell::get);
    if current.is_null() {
        return false;
    }
    // SAFETY: they are those that `execute` on this thread uses: nobody changes them meanwhile.
    unsafe {
        let gregs = &mut (*context).uc_mcontext.gregs;
        let t = &*current;
        let at = gregs[libc::REG_RIP as usize] as u64;
        if let Some(site) = t.site(at) {
            let rip = (*block).jit.page.wrapping_add(site.offset.into());
            let rip = if (*block).jit.mode == 0 { rip } else { rip & 0xffff_ffff };
            gregs[libc::REG_R9 as usize] = rip as i64;
            gregs[libc::REG_RIP as usize] = t.thunks.exit_interpret as i64;
            return true;
        }
        // The stack of return addresses is full: it is emptied, and the push is done again.
        if t.contains(at) && t.shadow.guards(gregs[libc::REG_CR2 as usize] as u64) {
            gregs[libc::REG_RSP as usize] = t.shadow.top() as i64;
            return true;
        }
    }
    false
}
