//! From guest instructions to host code: one block.
//!
//! Order is kept and every instruction commits last, so the guest's state is exact at every call of the interpreter and
//! at every signal. The way out of every difficulty is the same: *this one instruction* is executed by the interpreter
//! (cold code), and the block goes on behind it.
//!
//! Nothing in a block depends on its linear address: what needs it adds an offset to [`JitState::page`], which entries
//! from other pages set. So processes at different addresses share translations.

use super::classify::{self, Kind, shape};
use super::emit::{A, Asm, B, C, RAX, RCX, SP, cc};
use super::flags::Need;
use super::flow;
use super::kernel;
use super::legacy;
use super::plan::{self, Origin, Plan, Shape};
use super::raw::{Place, Raw};
use super::recall::Recall;
use super::thunks::Thunks;
use crate::features::Features;
use crate::vp::VpBlock;
use iced_x86::{Instruction, OpKind, Register};
use std::mem::offset_of;

/// Jump-table slots.
pub const JUMP_SLOTS: usize = 1 << 16;
/// They are indexed by the target's bits from this one on: few blocks start less than 4 bytes apart.
pub const INDEX_SHIFT: u8 = 2;

/// Most direct jumps to other pages that have a link; the others use the jump table.
pub const LINKS: usize = 1 << 17;

/// Guest registers that live in the VP block, as a mask.
const MOVED: u16 = 1 << 9 | 1 << 10 | 1 << 11 | 1 << 15;

/// A scratch register that stands for a guest register in one instruction.
#[derive(Clone, Copy, Default)]
struct Held {
    guest: u8,
    host: u8,
    load: bool,
    written: bool,
}

/// Offset of a guest register in the VP block.
pub(super) fn gpr(n: u8) -> usize {
    8 * n as usize
}
/// Offset of a field of [`JitState`].
macro_rules! jit {
    ($field:ident) => {
        offset_of!(VpBlock, jit) + offset_of!($crate::translate::JitState, $field)
    };
}
pub(super) use jit;

/// The host register that holds a guest register; `None`: it lives in the VP block.
pub(super) fn host(n: u8) -> Option<u8> {
    match n {
        4 => Some(SP),
        9 | 10 | 11 | 15 => None,
        n => Some(n),
    }
}

/// Number of a general register of any size.
pub(super) fn number(r: Register) -> u8 {
    r.full_register().number() as u8
}

/// How a block can be left by a direct jump inside its page.
#[derive(Clone, Copy, Debug)]
pub struct Exit {
    /// Offset of the target in the page.
    pub target: u16,
    /// What kind of block it leads to.
    pub shape: Shape,
    /// Address of the 32-bit displacement to patch.
    pub patch: u64,
    /// Where it leads while it is not patched.
    pub stub: u64,
}

/// A place where a native instruction may raise a signal.
#[derive(Clone, Copy, Debug)]
pub struct Site {
    /// Address of the instruction in the code memory.
    pub at: u64,
    /// Offset of the guest instruction in its page.
    pub offset: u16,
}

/// A translated block, before it is entered anywhere.
pub struct Lowered {
    /// Hot code, for the address given.
    pub hot: Asm,
    /// Cold code.
    pub cold: Asm,
    /// Entry from its own page.
    pub entry: u64,
    /// Entry from anywhere, with RIP in A.
    pub table_entry: u64,
    /// Direct exits.
    pub exits: Vec<Exit>,
    /// Number of the next block's first link.
    pub links: u32,
    /// Signal sites, ascending.
    pub sites: Vec<Site>,
    /// Those in the cold code.
    pub cold_sites: Vec<Site>,
    /// Guest instructions.
    pub count: u32,
    /// The instructions that the block executes, for [`super::verify`] (empty otherwise).
    pub path: Vec<Instruction>,
}

/// Code out of the way of the hot path, emitted at the end.
pub(super) enum Cold {
    /// Execute the instruction in the interpreter, go on at `resume` (0: leave the block).
    Interpret { from: Vec<(u64, bool)>, rip: u64, len: u8, light: bool, resume: u64, recall: Option<Recall> },
    /// A check failed: see [`super::memory`].
    Miss(super::memory::Miss),
    /// Load the vector state, go on at `resume`. RCX is in A if `swapped`.
    Vector { from: u64, level: u8, swapped: bool, resume: u64 },
    /// Leave by a direct jump (patchable).
    Exit { from: u64, target: u16, shape: Shape },
    /// Leave by a link.
    Jump { from: u64, target: u64, poll: bool },
    /// A link was not entered, or somebody wants attention: see [`super::flow`].
    Link(super::flow::Link),
    /// Return to Rust because of attention. RCX is in A if `swapped`.
    Poll { from: u64, target: u64, swapped: bool },
}

pub(super) struct Lower<'a> {
    /// Where the block is.
    pub(super) origin: Origin,
    page: &'a [u8],
    /// Jumps to the block's own start stay in it.
    pub(super) loops: bool,
    pub(super) hot: Asm,
    pub(super) cold: Vec<Cold>,
    pub(super) thunks: &'a Thunks,
    exits: Vec<Exit>,
    /// Number of the next link.
    pub(super) link: u32,
    sites: Vec<Site>,
    cold_sites: Vec<Site>,
    /// Need before the current instruction.
    pub(super) need: Need,
    /// Flags that the target of the current Jcc may read.
    pub(super) taken: u8,
    /// Group whose addend is in C.
    pub(super) current: usize,
    /// Slow-path jumps of the current instruction (with: inside a flags-in-RAX sequence).
    pub(super) slow: Vec<(u64, bool)>,
    /// What A holds.
    pub(super) a: Holds,
    /// What B holds.
    pub(super) b: Holds,
    /// Failed checks in [`Lower::cold`] that go on behind the current instruction.
    pub(super) open_misses: Vec<usize>,
    /// Start of the code behind the entry's own checks.
    pub(super) inner: u64,
    pub(super) bmi2: bool,
    /// How the flags before the current instruction came about.
    pub(super) recall: Option<Recall>,
}

/// What a scratch register holds beyond the instruction that loaded it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Holds {
    /// Nothing of use.
    Nothing,
    /// A guest register that lives in the VP block, as it is there.
    Guest(u8),
    /// The linear address of a group's expression with this constant ([`plan::Access::relative`]).
    Sum(usize, i64),
}

/// Where a block goes in the code memory.
#[derive(Clone, Copy, Debug)]
pub struct Location {
    /// Address of its hot code.
    pub hot: u64,
    /// Address of its cold code.
    pub cold: u64,
    /// Number of its first exit.
    pub exit: u32,
    /// Number of its first link.
    pub link: u32,
}

/// Translates the block at `origin`. `page`: the bytes of its page, and perhaps some of the next one. `None`: the instruction
/// goes on in the next page, whose bytes were not given.
pub fn lower(
    origin: Origin,
    page: &[u8],
    shape: Shape,
    features: &Features,
    mode: kernel::Mode,
    thunks: &Thunks,
    at: Location,
) -> Option<Lowered> {
    let plan = Plan::new(&origin, page, shape, mode.verify, |i| {
        let kind = match &origin.facts {
            None => classify::kind(i, features),
            Some(facts) => legacy::kind(i, features, facts),
        };
        kernel::refine(i, kind, mode, origin.facts.as_ref(), thunks.bmi2)
    })?;
    let first = plan.steps.first()?;
    let mut l = Lower {
        origin,
        page,
        loops: shape == Shape::Grouped && !mode.verify,
        hot: Asm::new(at.hot),
        cold: Vec::new(),
        thunks,
        exits: Vec::new(),
        link: at.link,
        sites: Vec::new(),
        cold_sites: Vec::new(),
        need: first.need,
        taken: 0,
        current: usize::MAX,
        slow: Vec::new(),
        a: Holds::Nothing,
        b: Holds::Nothing,
        open_misses: Vec::new(),
        inner: 0,
        bmi2: thunks.bmi2,
        recall: None,
    };
    let table_entry = l.hot.here();
    l.hot.lea(origin.facts.is_none(), B, Some(A), 4, 1, -(origin.offset(origin.rip) as i32));
    l.hot.store_gs(B, jit!(page));
    let entry = l.hot.here();
    l.ensure_vector(plan.vector);
    for g in plan.ahead() {
        l.check_group(&plan, g, &first.i);
    }
    l.current = usize::MAX;
    l.forget();
    l.inner = l.hot.here();
    for (n, step) in plan.steps.iter().enumerate() {
        l.need = step.need;
        l.taken = step.taken;
        for g in plan.checks(n) {
            l.check_group(&plan, g, &step.i);
        }
        l.instruction(&plan, n);
        l.recall = Recall::after(l.recall, &step.i, step.kind).filter(|_| origin.facts.is_none());
    }
    if !plan.ended {
        l.need = plan.need_after;
        let next = plan.steps.last()?.i.next_ip();
        if plan.at_crossing {
            // That block depends on the next page's translation too: only the jump table knows whether it is good.
            l.leave_page(next, false, false);
        } else {
            l.direct_exit(next, false);
        }
    }
    let cold = l.finish_cold(at.cold, at.exit);
    Some(Lowered {
        hot: l.hot,
        cold,
        entry,
        table_entry,
        exits: l.exits,
        links: l.link,
        sites: l.sites,
        cold_sites: l.cold_sites,
        count: plan.steps.len() as u32,
        path: if mode.verify {
            plan.steps.iter().filter(|s| s.kind != Kind::Stop).map(|s| s.i).collect()
        } else {
            vec![]
        },
    })
}

impl Lower<'_> {
    /// To be called before a sequence that destroys the host's flags. True: it must keep them.
    pub(super) fn before_clobber(&mut self) -> bool {
        self.need.hard != 0
    }

    /// The scratch registers A and B hold nothing.
    pub(super) fn forget(&mut self) {
        self.a = Holds::Nothing;
        self.b = Holds::Nothing;
    }

    /// A host register with the value of a guest register that lives in the VP block.
    pub(super) fn guest_in_b(&mut self, r: u8) -> u8 {
        if self.a == Holds::Guest(r) {
            return A;
        }
        if self.b != Holds::Guest(r) {
            self.hot.load_gs(B, gpr(r));
            self.b = Holds::Guest(r);
        }
        B
    }

    /// Is the instruction at this address in the block's page, all of it? Blocks that go on in the next page are never
    /// chained to: only the jump table knows whether they are good.
    pub(super) fn inside(&self, target: u64) -> bool {
        let page = &self.page[..self.page.len().min(0x1000)];
        let offset = self.origin.offset(target) as usize;
        // A target in front of the page has an offset that wraps.
        let near_end = offset.saturating_add(15) > page.len();
        let goes_on = || plan::goes_on(page.get(offset..).unwrap_or_default(), self.origin.bits());
        offset < 0x1000 && !(near_end && goes_on())
    }

    /// Loads a register with the linear address of what is at `rip` in the block's own numbering.
    pub(super) fn address_of_code(h: &mut Asm, to: u8, block: &Origin, rip: u64) {
        h.load_gs(to, jit!(page));
        let offset = rip.wrapping_sub(block.page) as i64;
        // A displacement of 2 GiB at most: jumps and blocks reach no farther. (Outside 64-bit mode it is modulo 4 GiB.)
        if offset != 0 {
            h.lea(block.facts.is_none(), to, Some(to), 4, 1, offset as i32);
        }
    }

    /// [`Lower::address_of_code`] in the hot code.
    pub(super) fn code_address(&mut self, to: u8, rip: u64) {
        Self::address_of_code(&mut self.hot, to, &self.origin, rip);
    }

    fn instruction(&mut self, plan: &Plan, n: usize) {
        let (i, kind) = (&plan.steps[n].i, plan.steps[n].kind);
        match kind {
            _ if self.origin.facts.is_some() && self.segmented(plan, n) => {}
            Kind::Nop => {}
            Kind::Plain | Kind::Vector(_) => self.native(plan, n),
            Kind::Lea => self.lea(i),
            Kind::Push => self.push(plan, n),
            Kind::Pop => {
                self.addend(plan, plan.accesses_of(n)[0].group);
                let to = i.op0_register().number() as u8;
                match host(to) {
                    Some(SP) => self.hot.load_indexed(SP, SP, C, 0),
                    Some(h) => {
                        self.hot.load_indexed(h, SP, C, 0);
                        self.hot.lea(true, SP, Some(SP), 4, 1, 8);
                    }
                    None => {
                        self.hot.load_indexed(B, SP, C, 0);
                        self.set_held(B, to);
                        self.hot.lea(true, SP, Some(SP), 4, 1, 8);
                    }
                }
            }
            Kind::Leave => {
                self.addend(plan, plan.accesses_of(n)[0].group);
                self.hot.lea(true, SP, Some(5), 4, 1, 8);
                self.hot.load_indexed(5, 5, C, 0);
            }
            Kind::Jcc => self.jcc(i),
            // Of 16- and 32-bit code only: see [`super::segmented`].
            Kind::Loop => {}
            Kind::Jmp => {
                let target = i.near_branch_target();
                self.direct_exit(target, target <= i.ip());
            }
            Kind::Call => self.call(plan, n),
            Kind::Ret => self.ret(plan, n),
            Kind::JmpIndirect => {
                self.branch_target(plan, n);
                flow::poll_table(&mut self.hot, self.thunks);
                flow::table_jump(&mut self.hot, self.thunks, false);
            }
            Kind::CallIndirect => self.call_indirect(plan, n),
            Kind::Interpret => self.call_interpreter(i),
            Kind::System(system) => self.system(i, system),
            Kind::Stop => {
                // Flags are in the host's register: all are needed before a Stop.
                self.code_address(A, i.ip());
                let system = kernel::advances(i);
                self.hot.jmp(if system { self.thunks.exit_system } else { self.thunks.exit_interpret });
            }
        }
        let keeps = matches!(
            kind,
            Kind::Nop | Kind::Plain | Kind::Vector(_) | Kind::Lea | Kind::Push | Kind::Pop | Kind::Leave | Kind::Jcc
        );
        if !keeps || !self.open_misses.is_empty() || !self.slow.is_empty() {
            self.forget();
        }
        let leaves = matches!(kind, Kind::Call | Kind::Ret | Kind::JmpIndirect | Kind::CallIndirect);
        self.close_misses(if leaves { 0 } else { self.hot.here() });
        if plan.loses_addend(n) {
            self.current = usize::MAX;
        }
        if !self.slow.is_empty() {
            let from = std::mem::take(&mut self.slow);
            let resume = self.hot.here();
            let (light, recall) = (!kernel::touches_vector(i), self.recall);
            self.cold.push(Cold::Interpret { from, rip: i.ip(), len: i.len() as u8, light, resume, recall });
            // The interpreter leaves nothing in the scratch registers.
            self.current = usize::MAX;
        }
    }

    /// Bytes of an instruction.
    pub(super) fn bytes(&self, i: &Instruction) -> &[u8] {
        let at = self.origin.offset(i.ip()) as usize;
        &self.page[at..at + i.len()]
    }

    /// The instruction itself, on host operands.
    fn native(&mut self, plan: &Plan, n: usize) {
        let (i, kind) = (&plan.steps[n].i, plan.steps[n].kind);
        let general =
            |n: u32| (i.op_kind(n) == OpKind::Register && i.op_register(n).is_gpr()).then(|| i.op_register(n));
        let access = plan.accesses_of(n).first();
        let moved =
            (0..i.op_count()).filter_map(general).any(|r| !classify::is_high8(r) && host(number(r)) != Some(number(r)));
        if access.is_none() && !moved {
            self.site(i, kind);
            let at = (i.ip() & 0xfff) as usize;
            self.hot.bs(&self.page[at..at + i.len()]);
            return;
        }
        let shape = shape(i);
        let high = (0..i.op_count()).filter_map(general).any(classify::is_high8);
        let raw = Raw::parse(self.bytes(i), shape.modrm);
        let (Some(mut raw), false) = (raw, high) else {
            self.call_interpreter(i);
            self.current = usize::MAX;
            self.forget();
            return;
        };
        // Guest registers that need a scratch register.
        let mut held = [Held::default(); 4];
        let mut holds = 0;
        for n in 0..i.op_count() {
            let Some(r) = general(n) else { continue };
            let guest = number(r);
            if host(guest).is_some() {
                continue;
            }
            let written = if n == 0 { !shape.op0_read_only } else { shape.others_written };
            let load = n != 0 || !(shape.op0_write_only && r.size() >= 4);
            match held[..holds].iter_mut().find(|h| h.guest == guest) {
                Some(h) => {
                    h.load |= load;
                    h.written |= written;
                }
                None => {
                    held[holds] = Held { guest, host: 0, load, written };
                    holds += 1;
                }
            }
        }
        let held = &mut held[..holds];
        let place = access.map(|access| self.place(plan, access, holds > 1));
        let free: &[u8] = match place {
            None => &[A, B, C],
            Some(Place::Indexed(base, ..)) if base == A => &[B],
            Some(Place::Indexed(..)) => &[A, B],
            Some(_) => &[B, C],
        };
        self.assign_scratch(held, free);
        let map = |n: u8| host(n).or_else(|| held.iter().find(|h| h.guest == n).map(|h| h.host)).unwrap_or(n);
        let place = place.unwrap_or_else(|| Place::Register(if shape.rm { map(raw.rm()) } else { raw.rm() }));
        if shape.reg {
            raw.set_reg(map(raw.reg()));
        }
        if shape.opcode {
            raw.set_opcode_reg(map(raw.opcode_reg()));
        }
        if shape.vvvv {
            raw.set_vvvv(map(raw.vvvv()));
        }
        self.site(i, kind);
        raw.emit(&mut self.hot.bytes, place);
        for h in held.iter().filter(|h| h.written) {
            self.hot.store_gs(h.host, gpr(h.guest));
        }
        if held.iter().any(|h| h.host == C) || matches!(place, Place::Memory(_)) {
            self.current = usize::MAX;
        }
        // An instruction may change a register that it does not name only among those that live in host registers.
        debug_assert!(plan::written(i) & MOVED & !held.iter().fold(0, |m, h| m | 1 << h.guest) == 0);
    }

    /// Gives each guest register a scratch register, and loads what is not there yet.
    fn assign_scratch(&mut self, held: &mut [Held], free: &[u8]) {
        let mut taken = [false; 3];
        let index = |s: u8| usize::from(s - A);
        for h in held.iter_mut() {
            let there = match Holds::Guest(h.guest) {
                g if g == self.a && free.contains(&A) => A,
                g if g == self.b && free.contains(&B) => B,
                _ => continue,
            };
            h.host = there;
            h.load = false;
            taken[index(there)] = true;
        }
        for h in held.iter_mut() {
            if h.host == 0 {
                // Rather one that holds nothing.
                let open = |s: &&u8| !taken[index(**s)];
                let empty = |s: &&u8| match **s {
                    A => self.a == Holds::Nothing,
                    B => self.b == Holds::Nothing,
                    _ => false,
                };
                let Some(&s) = free.iter().find(|s| open(s) && empty(s)).or_else(|| free.iter().find(open)) else {
                    unreachable!("an instruction names at most three general registers, two beside memory")
                };
                taken[index(s)] = true;
                h.host = s;
                if h.load {
                    self.hot.load_gs(s, gpr(h.guest));
                }
            }
            // Nowhere else is the register's value kept: it may be written now.
            for holds in [&mut self.a, &mut self.b] {
                if *holds == Holds::Guest(h.guest) {
                    *holds = Holds::Nothing;
                }
            }
            match h.host {
                A => self.a = Holds::Guest(h.guest),
                B => self.b = Holds::Guest(h.guest),
                _ => {}
            }
        }
    }

    /// Writes a scratch register to a guest register that lives in the VP block.
    fn set_held(&mut self, from: u8, guest: u8) {
        self.hot.store_gs(from, gpr(guest));
        for holds in [&mut self.a, &mut self.b] {
            if *holds == Holds::Guest(guest) {
                *holds = Holds::Nothing;
            }
        }
        match from {
            A => self.a = Holds::Guest(guest),
            B => self.b = Holds::Guest(guest),
            _ => {}
        }
    }

    /// Remembers that the next host instruction may raise a signal.
    pub(super) fn site(&mut self, i: &Instruction, kind: Kind) {
        if classify::may_signal(i, kind) {
            self.sites.push(Site { at: self.hot.here(), offset: self.origin.offset(i.ip()) as u16 });
        }
    }

    /// A piece of hot code with its sites is executed in the cold code too.
    pub(super) fn copy_sites(&mut self, start: u64, end: u64, to: u64) {
        let inside = self.sites.iter().filter(|s| (start..end).contains(&s.at));
        self.cold_sites.extend(inside.map(|s| Site { at: s.at - start + to, ..*s }));
    }

    fn lea(&mut self, i: &Instruction) {
        let to = i.op0_register().number() as u8;
        let dest = host(to).unwrap_or(A);
        let (mut expression, displacement) = plan::expression_of(i, self.origin.page);
        expression.segment = plan::SegmentBase::Flat;
        expression.narrow |= i.op0_register().size() == 4;
        let simple = expression.direct(host).is_some();
        if !simple || dest == A {
            self.linear(dest, &expression, displacement);
        } else {
            Self::linear_address(&mut self.hot, dest, &expression, displacement);
        }
        if host(to).is_none() {
            self.set_held(dest, to);
        }
    }

    fn push(&mut self, plan: &Plan, n: usize) {
        let i = &plan.steps[n].i;
        let accesses = plan.accesses_of(n);
        let Some(stack) = accesses.last() else { return };
        match i.op0_kind() {
            OpKind::Register => {
                self.addend(plan, stack.group);
                let r = i.op0_register().number() as u8;
                let from = host(r).unwrap_or_else(|| self.guest_in_b(r));
                self.hot.store_indexed(from, SP, C, -8);
            }
            OpKind::Memory => {
                let place = self.place(plan, &accesses[0], false);
                self.load_place(B, place);
                self.b = Holds::Nothing;
                self.addend(plan, stack.group);
                self.hot.store_indexed(B, SP, C, -8);
            }
            _ => {
                self.addend(plan, stack.group);
                self.hot.store_indexed_imm(SP, C, -8, i.immediate(0) as i32);
            }
        }
        self.hot.lea(true, SP, Some(SP), 4, 1, -8);
    }

    /// Executes an instruction in the interpreter, in line.
    pub(super) fn call_interpreter(&mut self, i: &Instruction) {
        self.code_address(A, i.ip());
        self.hot.mov_imm(B, i.len() as u64);
        let light = !kernel::touches_vector(i);
        self.hot.call(if light { self.thunks.call_interpreter_light } else { self.thunks.call_interpreter });
    }

    /// Makes sure that the vector state is in the host's registers, at the start of a block that uses it.
    fn ensure_vector(&mut self, level: u8) {
        if level == 0 {
            return;
        }
        let (from, swapped);
        if self.need.hard == 0 {
            self.hot.cmp_gs32(jit!(vector), level);
            from = self.hot.jcc(cc::B, 0);
            swapped = false;
        } else {
            self.hot.mov(A, RCX);
            self.hot.load_gs32(RCX, if level == 1 { jit!(no_sse) } else { jit!(no_avx) });
            let loaded = self.hot.short(0xe3); // jrcxz
            from = self.hot.jmp(0);
            self.hot.close(loaded);
            self.hot.mov(RCX, A);
            swapped = true;
        }
        self.cold.push(Cold::Vector { from, level, swapped, resume: self.hot.here() });
    }

    /// Emits the cold parts.
    fn finish_cold(&mut self, base: u64, first_exit: u32) -> Asm {
        let mut c = Asm::new(base);
        let block = self.origin;
        let mut exits = std::mem::take(&mut self.exits);
        for cold in std::mem::take(&mut self.cold) {
            let here = c.here();
            match cold {
                Cold::Interpret { from, rip, len, light, resume, recall } => {
                    for keep in [true, false] {
                        let here = c.here();
                        let mut any = false;
                        for (at, _) in from.iter().filter(|f| f.1 == keep) {
                            self.hot.patch(*at, here);
                            any = true;
                        }
                        if any && keep {
                            Self::restore_flags(&mut c);
                        } else if any && let Some(recall) = recall {
                            recall.emit(&mut c);
                        }
                    }
                    self.interpret_and_resume(&mut c, rip, len, light, resume);
                }
                Cold::Miss(miss) => self.miss(&mut c, miss, first_exit, &mut exits),
                Cold::Vector { from, level, swapped, resume } => {
                    self.hot.patch(from, here);
                    if swapped {
                        c.mov(RCX, A);
                    }
                    Self::address_of_code(&mut c, A, &block, block.rip);
                    c.mov_imm(C, u64::from(level));
                    c.call(self.thunks.call_vector);
                    c.jmp(resume);
                }
                Cold::Exit { from, target, shape } => {
                    self.hot.patch(from, here);
                    Self::exit_stub(&mut c, self.thunks, from, target, shape, first_exit, &mut exits);
                }
                Cold::Jump { from, target, poll } => {
                    self.hot.patch(from, here);
                    Self::address_of_code(&mut c, A, &block, target);
                    if let Some(link) = self.emit_link_jump(&mut c, target, false, poll) {
                        let here = c.here();
                        c.patch(link.from, here);
                        flow::link_missed(&mut c, self.thunks, &link);
                    }
                }
                Cold::Link(link) => {
                    self.hot.patch(link.from, here);
                    flow::link_missed(&mut c, self.thunks, &link);
                }
                Cold::Poll { from, target, swapped } => {
                    self.hot.patch(from, here);
                    if swapped {
                        c.mov(RCX, A);
                    }
                    Self::address_of_code(&mut c, A, &block, target);
                    c.jmp(self.thunks.exit_resume);
                }
            }
        }
        self.exits = exits;
        c
    }

    /// The unpatched end of a direct exit.
    pub(super) fn exit_stub(
        c: &mut Asm,
        thunks: &Thunks,
        patch: u64,
        target: u16,
        shape: Shape,
        first_exit: u32,
        exits: &mut Vec<Exit>,
    ) {
        let stub = c.here();
        c.mov_imm(A, u64::from(first_exit) + exits.len() as u64);
        c.jmp(thunks.exit_direct);
        exits.push(Exit { target, shape, patch, stub });
    }

    /// Cold: the interpreter executes an instruction, and the block goes on at `resume` (0: it is left).
    pub(super) fn interpret_and_resume(&self, c: &mut Asm, rip: u64, len: u8, light: bool, resume: u64) {
        Self::address_of_code(c, A, &self.origin, rip);
        if resume == 0 {
            c.jmp(self.thunks.exit_system);
        } else {
            c.mov_imm(B, u64::from(len));
            c.call(if light { self.thunks.call_interpreter_light } else { self.thunks.call_interpreter });
            c.jmp(resume);
        }
    }

    /// Ends a flags-in-RAX sequence: add al, 0x7f; sahf; RAX back.
    pub(super) fn restore_flags(h: &mut Asm) {
        h.bs(&[0x04, 0x7f, 0x9e]);
        h.load_gs(RAX, jit!(rax));
    }

    /// Begins one: RAX into the block; lahf; seto al.
    pub(super) fn keep_flags(h: &mut Asm) {
        h.store_gs(RAX, jit!(rax));
        h.bs(&[0x9f, 0x0f, 0x90, 0xc0]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::features::Features;
    use iced_x86::{Decoder, DecoderOptions};
    use x86::cpuid::CpuModel;

    fn block(code: &[u8]) -> Lowered {
        let model = CpuModel::by_name("x86-64-v3").unwrap();
        let features = Features::from_table(&model.table(0, 1, 1_000_000_000));
        let thunks = Thunks { bmi2: true, ..Thunks::default() };
        let mut page = [0xf4; 4096];
        page[..code.len()].copy_from_slice(code);
        let at = Location { hot: 0x10_0000, cold: 0x20_0000, exit: 0, link: 0 };
        lower(Origin::long(0x1000), &page, Shape::Grouped, &features, kernel::Mode::default(), &thunks, at).unwrap()
    }

    /// The hot code of a block, disassembled.
    fn hot(code: &[u8]) -> Vec<String> {
        let l = block(code);
        Decoder::with_ip(64, &l.hot.bytes, 0x10_0000, DecoderOptions::NONE).iter().map(|i| i.to_string()).collect()
    }

    /// One that has no room would be interpreted for ever.
    #[test]
    fn the_largest_loop_has_room() {
        // push, inc of [r9+r10*8+0x1000n], and mov r9 from there with flags that are kept; cmp eax, ecx before or behind; jne
        for (access, kept) in
            [([0x43u8, 0xff, 0xb4, 0xd1], false), ([0x43, 0xff, 0x84, 0xd1], false), ([0x4f, 0x8b, 0x8c, 0xd1], true)]
        {
            let compare = |wanted: bool| [0x39u8, 0xc8].into_iter().filter(move |_| wanted);
            let mut code: Vec<u8> = compare(kept).collect();
            for n in 0..94u32 {
                code.extend(access);
                code.extend((0x1000 * n).to_le_bytes());
            }
            code.extend(compare(!kept));
            let back = -(code.len() as i32 + 6);
            code.extend([0x0f, 0x85]);
            code.extend(back.to_le_bytes());
            let l = block(&code);
            assert_eq!(l.count, 96);
            let (hot, cold) = (l.hot.bytes.len(), l.cold.bytes.len());
            assert!(hot.max(cold) < super::super::cache::BLOCK_ROOM, "{hot} {cold}");
        }
    }

    #[test]
    fn every_direct_jump_to_another_page_has_a_link() {
        // jmp to 0x1fd3 + 0x1000n: targets near a page's end too, where two may share a slot of the jump table
        for target in [0x2fd3u32, 0x2fff, 0x3000, 0x2000] {
            let mut code = vec![0xe9];
            code.extend((target - 0x1005).to_le_bytes());
            assert_eq!(block(&code).links, 1, "{target:#x}");
        }
    }

    #[test]
    fn string_instructions_are_the_hosts_own() {
        // rep stosq; rep movsb; bt [rdi], r11; hlt
        let text = hot(&[0xf3, 0x48, 0xab, 0xf3, 0xa4, 0x4c, 0x0f, 0xa3, 0x1f, 0xf4]);
        for want in ["rep stos %rax,(%rdi)", "rep movsb (%rsi),(%rdi)", "bt %r11,(%r9)", "and $0x3F,%r11d"] {
            assert!(text.iter().any(|t| t == want), "{want}: {text:#?}");
        }
    }

    #[test]
    fn registers_that_live_in_memory_go_through_scratch_registers() {
        let text = hot(&[0x49, 0xb7, 0xbc, 0xf4]);
        assert!(text.iter().any(|t| t == "mov $0xBC,%r9b"), "{text:#?}");
        let text = hot(&[0x4c, 0x89, 0xe0, 0xf4]);
        assert!(text.iter().any(|t| t == "mov %r12,%rax"), "{text:#?}");
        let text = hot(&[0x48, 0x89, 0xe0, 0xf4]);
        assert!(text.iter().any(|t| t == "mov %r15,%rax"), "{text:#?}");
    }

    #[test]
    fn the_second_access_of_a_group_is_one_instruction() {
        // mov rax,[rbx]; mov rcx,[rbx+8]
        let text = hot(&[0x48, 0x8b, 3, 0x48, 0x8b, 0x4b, 8, 0xf4]);
        let first = text.iter().position(|t| t == "mov (%rbx,%r11),%rax").expect("first access");
        assert_eq!(text[first + 1], "mov 8(%rbx,%r11),%rcx", "{text:#?}");
    }
}
