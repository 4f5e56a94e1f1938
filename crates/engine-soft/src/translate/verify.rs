//! `--translate verify`: every execution of a translated block is made twice, and what comes out is compared.
//!
//! First the interpreter executes the block's instructions, with a log of what it overwrites in guest memory. Then memory
//! and registers are put back, and the translation is executed, once and unchained. Registers, the vector state, the
//! written memory and an exception must be the same. Then the guest goes on from what the interpreter found, so that a
//! difference is reported where it arises.
//!
//! **Once only.** Instructions that may not be repeated (I/O, TSC, MSRs, everything that the interpreter executes on
//! behalf of a block) end a block in this mode, and the interpreter executes them alone. An access that turns out to
//! reach a device, or a page that code was made from, stops the first execution: nothing has happened yet, and the
//! interpreter executes that instruction for good. VPs take turns ([`Turns`]), so that none sees what is taken back.
//! Devices are not stopped: if a block differs it is tried again from the start, and only what differs every time is
//! reported.
//!
//! **Flags.** A translation may lose a status flag that nobody reads. It is not forbidden to: the flags that it lost are
//! remembered, and an instruction that reads one before it is written again is the difference.

use super::cache::Translator;
use super::classify::Kind;
use super::kernel;
use super::plan::{MAX_INSTRUCTIONS, Shape};
use super::run::{drop_changed, execute, find, flush, sync_mode, take};
use super::{flags, thunks};
use crate::exception;
use crate::interp;
use crate::vp::{Fault, SoftVp, attention};
use iced_x86::{Instruction, Mnemonic, RflagsBits};
use partition::Activity;
use std::fmt::Write;
use std::sync::atomic::Ordering;
use std::sync::{Condvar, Mutex};
use x86::regs::{dr7, rflags};
use x86::segment::Segment;
use x86::xsave::{self, legacy};

/// Memory that the first execution has overwritten.
#[derive(Default)]
pub struct DryLog {
    /// Host address, length, place of the old bytes.
    writes: Vec<(*mut u8, usize, usize)>,
    bytes: Vec<u8>,
    expected: Vec<u8>,
    /// Something was reached that may not be done twice: the instruction has done nothing.
    pub stopped: bool,
}

// SAFETY: the pointers are into guest memory, which outlives the VP that owns the log.
unsafe impl Send for DryLog {}

impl DryLog {
    /// Keeps what is in guest memory now.
    ///
    /// # Safety
    /// The range must be in a mapped page of guest memory.
    pub unsafe fn keep(&mut self, host: *mut u8, len: usize) {
        let at = self.bytes.len();
        self.bytes.resize(at + len, 0);
        // SAFETY: the caller's promise; `bytes` has just grown by `len`.
        unsafe { std::ptr::copy_nonoverlapping(host, self.bytes[at..].as_mut_ptr(), len) };
        self.writes.push((host, len, at));
    }

    fn clear(&mut self) {
        self.writes.clear();
        self.bytes.clear();
        self.expected.clear();
        self.stopped = false;
    }

    /// What the interpreter wrote becomes what is expected, and memory is as it was.
    fn take_back(&mut self) {
        self.expected.resize(self.bytes.len(), 0);
        for &(host, len, at) in &self.writes {
            // SAFETY: `keep`'s promise; both buffers have `len` bytes from `at` on.
            unsafe { std::ptr::copy_nonoverlapping(host, self.expected[at..].as_mut_ptr(), len) };
        }
        self.restore();
    }

    /// Memory as it was.
    fn restore(&self) {
        for &(host, len, at) in self.writes.iter().rev() {
            // SAFETY: as in `take_back`.
            unsafe { std::ptr::copy_nonoverlapping(self.bytes[at..].as_ptr(), host, len) };
        }
    }

    /// The first byte that is not as expected: host address, expected, found.
    fn difference(&self) -> Option<(*mut u8, u8, u8)> {
        self.writes.iter().find_map(|&(host, len, at)| {
            (0..len).find_map(|n| {
                let place = host.wrapping_add(n);
                // SAFETY: as in `take_back`.
                let found = unsafe { place.read_volatile() };
                (found != self.expected[at + n]).then_some((place, self.expected[at + n], found))
            })
        })
    }
}

/// Lets VPs execute one after the other, in the order in which they come.
#[derive(Default)]
pub struct Turns {
    /// Next ticket to give, ticket that is served.
    state: Mutex<(u64, u64)>,
    changed: Condvar,
}

impl Turns {
    fn take(&self) {
        let mut state = self.state.lock().unwrap_or_else(|e| e.into_inner());
        let mine = state.0;
        state.0 += 1;
        while state.1 != mine {
            state = self.changed.wait(state).unwrap_or_else(|e| e.into_inner());
        }
    }
    fn give(&self) {
        self.state.lock().unwrap_or_else(|e| e.into_inner()).1 += 1;
        self.changed.notify_all();
    }
}

/// What the VP keeps for this mode.
#[derive(Default)]
pub struct Verify {
    /// The fault that an instruction raised on behalf of the translation; not delivered.
    pub fault: Option<Fault>,
    /// The translation ended before an instruction that the interpreter is to execute.
    pub early: bool,
    /// It ended where a translation without groups is to go on.
    pub single: bool,
    /// Status flags that translations have lost.
    lost: u64,
    log: DryLog,
    /// The first difference, in words: the run ends.
    pub difference: Option<String>,
    /// Blocks compared, executions that could not be (devices, code pages), tries that were repeated, faults at which
    /// status flags were lost.
    pub counts: [u64; 4],
}

/// The registers that a block may change.
#[derive(Clone)]
struct Registers {
    gprs: [u64; 16],
    rip: u64,
    rflags: u64,
    segments: [Segment; 6],
    kernel_gs_base: u64,
    xsave: [u8; xsave::AREA_SIZE],
}

impl Registers {
    fn of(vp: &SoftVp) -> Self {
        let s = &vp.s;
        Self {
            gprs: s.gprs,
            rip: s.rip,
            rflags: s.rflags,
            segments: s.segments,
            kernel_gs_base: s.kernel_gs_base,
            xsave: s.xsave.0,
        }
    }

    fn put(&self, vp: &mut SoftVp) {
        let s = &mut vp.s;
        s.gprs = self.gprs;
        s.rip = self.rip;
        s.next_rip = self.rip;
        s.rflags = self.rflags;
        s.segments = self.segments;
        s.kernel_gs_base = self.kernel_gs_base;
        s.xsave.0 = self.xsave;
        s.interrupt_shadow = false;
        s.mov_ss_shadow = false;
        vp.update_boundary();
        vp.select_tlb();
    }
}

/// Vector state without what is not compared: FOP, FIP, FDP, MXCSR_MASK, the unused bytes behind the x87 registers and
/// the legacy region's end, XSTATE_BV.
fn comparable(image: &[u8; xsave::AREA_SIZE]) -> [u8; xsave::AREA_SIZE] {
    let mut image = *image;
    image[legacy::FOP..legacy::MXCSR].fill(0);
    image[legacy::MXCSR + 4..legacy::MXCSR + 8].fill(0);
    for n in 0..8 {
        image[32 + 16 * n + 10..32 + 16 * n + 16].fill(0);
    }
    image[legacy::XMM0 + 256..xsave::AVX_OFFSET].fill(0);
    image
}

fn status(bits: u32) -> u64 {
    [
        (RflagsBits::OF, rflags::OF),
        (RflagsBits::SF, rflags::SF),
        (RflagsBits::ZF, rflags::ZF),
        (RflagsBits::AF, rflags::AF),
        (RflagsBits::CF, rflags::CF),
        (RflagsBits::PF, rflags::PF),
    ]
    .iter()
    .filter(|(bit, _)| bits & bit != 0)
    .fold(0, |mask, (_, flag)| mask | flag)
}

/// An instruction of a block, and the status flags that it reads, overwrites in every case, leaves undefined, and leaves
/// otherwise in the interpreter than on the host.
#[derive(Clone, Copy)]
pub struct Planned {
    i: Instruction,
    reads: u64,
    overwrites: u64,
    undefined: u64,
    unlike: u64,
}

impl Planned {
    /// For an instruction at its address.
    pub fn new(i: Instruction) -> Self {
        let reads = match i.mnemonic() {
            Mnemonic::Pushfq | Mnemonic::Pushfd | Mnemonic::Pushf | Mnemonic::Lahf | Mnemonic::Syscall => {
                rflags::STATUS
            }
            _ => status(i.rflags_read()),
        };
        let undefined = status(i.rflags_undefined());
        let division = matches!(i.mnemonic(), Mnemonic::Div | Mnemonic::Idiv);
        Self {
            i,
            reads,
            overwrites: status(u32::from(flags::effect(&i, Kind::Plain).kills)),
            undefined,
            unlike: if division { undefined } else { 0 },
        }
    }
}

/// How the first execution ended.
enum Dry {
    /// At `rip`, with this fault.
    Done { fault: Option<Fault>, undefined: u64, count: usize },
    /// Something may be done only once; everything is as before.
    Once,
    /// A lost flag was read.
    Lost(String),
}

/// What the second execution showed.
enum Verdict {
    /// No difference; the guest has gone on.
    Same,
    /// This, in words.
    Different(String),
    /// The translation left this many instructions later to the interpreter (the vector unit is not to be used).
    Early(usize),
}

/// Executes until something wants attention, as [`super::run::run`] does.
pub fn run(vp: &mut SoftVp) {
    let Some(mut t) = take(vp) else {
        interp::run(vp);
        return;
    };
    vp.s.jit.verify = 1;
    // An interrupt or a return to the run loop has come between.
    vp.verify.lost = 0;
    if vp.s.attention.load(Ordering::SeqCst) & attention::BOUNDARY != 0 {
        take_turn(vp);
        interp::run(vp);
        give_turn(vp);
        drop_changed(vp, &mut t);
        vp.translator = Some(t);
        return;
    }
    while vp.verify.difference.is_none() {
        let bits = vp.s.attention.load(Ordering::SeqCst);
        if bits & attention::CODE != 0 {
            vp.s.attention.fetch_and(!attention::CODE, Ordering::SeqCst);
            vp.decoded.current.page = 1;
            drop_changed(vp, &mut t);
        }
        if bits & !attention::CODE != 0 || vp.activity != Activity::Running {
            break;
        }
        take_turn(vp);
        for _ in 0..64 {
            if vp.s.attention.load(Ordering::SeqCst) != 0 || vp.activity != Activity::Running {
                break;
            }
            step(vp, &mut t);
            if vp.verify.difference.is_some() {
                break;
            }
        }
        give_turn(vp);
    }
    vp.translator = Some(t);
}

/// While a VP waits for its turn it counts as outside, so that the one whose turn it is may ask things of it.
fn take_turn(vp: &mut SoftVp) {
    if vp.partition.vp_count() > 1 {
        let partition = vp.partition.clone();
        let waker = &partition.shared(vp.index).waker;
        let was = waker.set_inside(false);
        partition.turns.take();
        waker.set_inside(was);
    }
}

fn give_turn(vp: &SoftVp) {
    if vp.partition.vp_count() > 1 {
        vp.partition.turns.give();
    }
}

/// One block, or one instruction.
fn step(vp: &mut SoftVp, t: &mut Translator) {
    let assumed = kernel::assumed(vp);
    if assumed != vp.s.jit.assumed {
        vp.s.jit.assumed = assumed;
        flush(vp, t);
    }
    sync_mode(vp, t);
    let translated = matches!(vp.s.cpl, 0 | 3) && vp.s.dr7 & dr7::ENABLES == 0;
    let block = if translated { find(vp, t, Shape::Grouped) } else { None };
    // Translating may have asked this VP to drop its write permission for the page, which comes first.
    if block.is_some() && vp.s.attention.load(Ordering::SeqCst) != 0 {
        return;
    }
    let mut whole = block.map(|block| t.path(block)).unwrap_or_default();
    let Some(mut block) = block.filter(|_| !whole.is_empty()) else {
        if vp.verify.lost != 0
            && let Ok(i) = interp::decode(vp)
        {
            once(vp, &Planned::new(i));
        }
        interp::one(vp);
        return;
    };
    let before = Registers::of(vp);
    let first = whole[0];
    let mut len = whole.len();
    let mut attempt = 0;
    loop {
        let problem = match dry_run(vp, &whole[..len], &before) {
            Dry::Once => {
                vp.verify.counts[1] += 1;
                once(vp, &first);
                interp::one(vp);
                return;
            }
            Dry::Lost(text) => Some(text),
            Dry::Done { fault, undefined, count } => {
                match compare(vp, t, block, &whole[..count], &before, fault, undefined) {
                    Verdict::Same => None,
                    Verdict::Different(text) => Some(text),
                    Verdict::Early(count) => {
                        vp.verify.log.restore();
                        before.put(vp);
                        len = count;
                        if count == 0
                            && vp.verify.single
                            && let Some(single) = find(vp, t, Shape::Single)
                            && vp.s.attention.load(Ordering::SeqCst) == 0
                        {
                            block = single;
                            whole = t.path(block);
                            len = whole.len();
                        } else if count == 0 {
                            once(vp, &first);
                            interp::one(vp);
                            return;
                        }
                        continue;
                    }
                }
            }
        };
        match problem {
            None => return,
            Some(text) if attempt == 2 => {
                vp.verify.difference = Some(text);
                return;
            }
            Some(_) => {
                vp.verify.counts[2] += 1;
                vp.verify.log.restore();
                before.put(vp);
            }
        }
        attempt += 1;
    }
}

/// An instruction is going to be executed once, by the interpreter.
fn once(vp: &mut SoftVp, p: &Planned) {
    if p.reads & vp.verify.lost != 0 {
        vp.verify.difference =
            Some(format!("{:#x}: {} reads flags {:#x}, which translations lost", vp.s.rip, p.i, vp.verify.lost));
    }
    vp.verify.lost &= !p.overwrites;
}

/// The first execution. Leaves the registers as the interpreter has them; memory is as before.
fn dry_run(vp: &mut SoftVp, path: &[Planned], before: &Registers) -> Dry {
    let mut log = std::mem::take(&mut vp.verify.log);
    log.clear();
    vp.mmu.dry = Some(log);
    vp.select_tlb();
    let mut lost = vp.verify.lost;
    let (mut undefined, mut unlike) = (0, 0);
    let mut result = None;
    let mut count = 0;
    let mut fault = None;
    debug_assert!(path.len() <= MAX_INSTRUCTIONS);
    for p in path {
        let i = &p.i;
        if i.ip() != vp.s.rip {
            break;
        }
        if p.reads & lost != 0 {
            result = Some(Dry::Lost(format!("{:#x}: {i} reads flags {:#x}, which translations lost", i.ip(), lost)));
            break;
        }
        if p.reads & unlike != 0 {
            // What the program does depends on flags that DIV leaves undefined.
            result = Some(Dry::Once);
            break;
        }
        let shadow = vp.s.interrupt_shadow;
        match interp::quiet(vp) {
            Ok(()) => {}
            Err(Fault::Restart) => result = Some(Dry::Once),
            Err(f) => fault = Some(f),
        }
        if vp.mmu.dry.as_ref().is_some_and(|log| log.stopped) || vp.s.pending_debug != 0 {
            vp.s.pending_debug = 0;
            result = Some(Dry::Once);
        }
        // Single step, or an interrupt that may be taken now: the next instruction is not simply the block's next.
        let waits = vp.s.attention.load(Ordering::SeqCst) & !attention::BOUNDARY != 0;
        if vp.s.rflags & (rflags::TF | rflags::RF) != 0 || waits {
            result = Some(Dry::Once);
        }
        if result.is_some() || fault.is_some() {
            break;
        }
        if shadow {
            vp.s.interrupt_shadow = false;
        }
        count += 1;
        lost &= !p.overwrites;
        undefined = undefined & !p.overwrites | p.undefined;
        unlike = unlike & !p.overwrites | p.unlike;
    }
    let mut log = vp.mmu.dry.take().unwrap_or_default();
    log.take_back();
    vp.verify.log = log;
    if fault.is_some() {
        count += 1;
    }
    match result {
        Some(result) => {
            before.put(vp);
            result
        }
        None => {
            vp.verify.lost = lost;
            Dry::Done { fault, undefined, count }
        }
    }
}

/// The second execution. Gives what differs; if nothing does, the guest goes on from what the interpreter found.
fn compare(
    vp: &mut SoftVp,
    t: &mut Translator,
    block: u32,
    path: &[Planned],
    before: &Registers,
    fault: Option<Fault>,
    undefined: u64,
) -> Verdict {
    let lost = vp.verify.lost;
    let expected = Registers::of(vp);
    before.put(vp);
    vp.verify.fault = None;
    vp.verify.early = false;
    vp.verify.single = false;
    let entry = t.entry(block);
    let (code, value) = execute(vp, t, entry);
    if matches!(code, thunks::code::INTERPRET | thunks::code::RESUME) {
        vp.s.rip = value;
    }
    let found = Registers::of(vp);
    if (code == thunks::code::INTERPRET || vp.verify.early)
        && (found.rip != expected.rip || vp.verify.single)
        && let Some(count) = path.iter().position(|p| p.i.ip() == found.rip)
    {
        return Verdict::Early(count);
    }
    let raised = vp.verify.fault.take();
    let mut text = String::new();
    let names = ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"];
    for n in 0..16 {
        if expected.gprs[n] != found.gprs[n] {
            let name = names.get(n).map_or_else(|| format!("r{n}"), |s| (*s).to_owned());
            let _ = writeln!(text, "  {name}: {:#x}, translated {:#x}", expected.gprs[n], found.gprs[n]);
        }
    }
    if expected.rip != found.rip {
        let _ = writeln!(text, "  rip: {:#x}, translated {:#x} (code {code})", expected.rip, found.rip);
    }
    let flags = expected.rflags ^ found.rflags;
    if flags & !rflags::STATUS != 0 {
        let _ = writeln!(text, "  rflags: {:#x}, translated {:#x}", expected.rflags, found.rflags);
    }
    if expected.segments != found.segments || expected.kernel_gs_base != found.kernel_gs_base {
        let _ = writeln!(text, "  segment bases differ");
    }
    // A signal or a refused vector unit comes back with the instruction's address; the fault is then the interpreter's.
    if raised != fault && !(raised.is_none() && (code == thunks::code::INTERPRET || vp.verify.early)) {
        let _ = writeln!(text, "  fault: {fault:x?}, translated {raised:x?} (code {code})");
    }
    if expected.xsave != found.xsave {
        let (a, b) = (comparable(&expected.xsave), comparable(&found.xsave));
        if let Some(n) = (0..a.len()).find(|n| a[*n] != b[*n]) {
            let _ = writeln!(text, "  vector state, byte {n:#x}: {:#x}, translated {:#x}", a[n], b[n]);
        }
    }
    if let Some((place, want, got)) = vp.verify.log.difference() {
        let _ = writeln!(text, "  memory at host {place:p}: {want:#x}, translated {got:#x}");
    }
    if !text.is_empty() {
        let mut all = format!("the translation of the code at {:#x} (level {}) differs:\n", before.rip, vp.s.cpl);
        for p in path {
            let _ = writeln!(all, "  {:#x}: {}", p.i.ip(), p.i);
        }
        return Verdict::Different(all + &text);
    }
    let lost_now = flags & rflags::STATUS & !undefined;
    vp.verify.counts[0] += 1;
    expected.put(vp);
    match fault {
        Some(fault) => {
            vp.verify.counts[3] += u64::from(lost_now != 0);
            vp.verify.lost = 0;
            exception::deliver(vp, fault);
        }
        None => vp.verify.lost = lost | lost_now,
    }
    Verdict::Same
}
