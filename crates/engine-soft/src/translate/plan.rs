//! What a block accesses, and which inline checks cover it: analysis before a byte is emitted.
//!
//! Accesses whose addresses differ by a constant (fields of one structure, the stack frame) share one check of the TLB:
//! a *group*. Its check covers the bytes from the lowest to the highest access, leaves the distance between linear and
//! host addresses (the *addend*) in a scratch register or a slot of the VP block, and stands as early as its registers
//! have their values: before the instruction that sets flags which are still needed, if possible, because a check
//! destroys them.
//!
//! A check that fails hands the block's remainder to a translation without groups ([`Shape::Single`]), where each access
//! has its own; so nothing that a group's check is stricter about (page ends, write permission for a read) can be seen.

use super::bounds::Bounds;
use super::classify::{self, Kind};
use super::facts::Facts;
use super::flags::{self, Need};
use super::kernel::System;
use super::legacy;
use iced_x86::{Code, Decoder, DecoderError, DecoderOptions, Instruction, Mnemonic, OpKind, Register};

/// Most instructions of a block.
pub const MAX_INSTRUCTIONS: usize = 48;
/// Of one that is a loop: it pays to keep it in one piece.
const MAX_LOOP: usize = 96;
/// Most bytes that one check covers: the more, the likelier a page's end lies between.
const REACH: i64 = 256;
/// Slots for addends in [`super::JitState`].
pub const ADDENDS: usize = 16;

/// How accesses are checked.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Shape {
    /// In groups.
    Grouped,
    /// Each on its own.
    Single,
}

/// What an address is computed from, beside a constant.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Base {
    /// Nothing.
    Zero,
    /// The linear page of the code.
    Page,
    /// A general register.
    Register(u8),
}

/// Where an address's segment begins.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SegmentBase {
    /// A segment with base 0.
    Flat,
    /// FS.
    Fs,
    /// GS.
    Gs,
    /// Outside 64-bit mode: a segment, by number, whose base is added and whose limit is checked.
    Limited(u8),
}

/// An address without its constant part.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Expression {
    /// Base.
    pub base: Base,
    /// Index register and scale.
    pub index: Option<(u8, u8)>,
    /// Segment.
    pub segment: SegmentBase,
    /// 32-bit address size, or 16 bits.
    pub narrow: bool,
    /// 16-bit address size.
    pub word: bool,
}

impl Expression {
    /// Of a stack access.
    pub const STACK: Self =
        Self { base: Base::Register(4), index: None, segment: SegmentBase::Flat, narrow: false, word: false };

    /// Is it the same sum, whatever the registers are that hold its parts?
    fn alike(&self, other: &Self) -> bool {
        let kind = |b: Base| match b {
            Base::Zero => 0,
            Base::Page => 1,
            Base::Register(_) => 2,
        };
        kind(self.base) == kind(other.base)
            && self.index.map(|x| x.1) == other.index.map(|x| x.1)
            && (self.segment, self.narrow, self.word) == (other.segment, other.narrow, other.word)
    }

    /// Can the address be written as `[host register + displacement]`, given which guest registers live in host ones?
    pub fn direct(&self, host: impl Fn(u8) -> Option<u8>) -> Option<u8> {
        match (self.base, self.index, self.segment, self.narrow) {
            (Base::Register(r), None, SegmentBase::Flat, false) => host(r),
            _ => None,
        }
    }
}

/// Where a block is, and for what code it is made.
#[derive(Clone, Copy, Debug)]
pub struct Origin {
    /// RIP of its first instruction.
    pub rip: u64,
    /// RIP of the first byte of its linear page. Outside 64-bit mode it is not always the start of a page itself.
    pub page: u64,
    /// 16- or 32-bit code.
    pub facts: Option<Facts>,
}

impl Origin {
    /// 64-bit code.
    pub const fn long(rip: u64) -> Self {
        Self { rip, page: rip & !0xfff, facts: None }
    }

    /// Place of an address in the block's page, or 4096 and more.
    pub fn offset(&self, rip: u64) -> u64 {
        let offset = rip.wrapping_sub(self.page);
        if self.facts.is_some() { offset & 0xffff_ffff } else { offset }
    }

    /// For the decoder.
    pub fn bits(&self) -> u32 {
        self.facts.map_or(64, |f| f.bits())
    }
}

/// One access of an instruction.
#[derive(Clone, Copy, Debug)]
pub struct Access {
    /// Address expression.
    pub expression: Expression,
    /// That of the operand itself, if `expression` leaves out an index whose range is part of `size` ([`super::bounds`]).
    pub operand: Option<Expression>,
    /// Constant part, at this instruction.
    pub displacement: i64,
    /// Bytes, from the lowest that may be accessed.
    pub size: u32,
    /// Is it (also) a write?
    pub write: bool,
    /// Its group.
    pub group: usize,
    /// Constant part relative to what the registers held when their present values began.
    pub relative: i64,
}

/// A check and what it covers.
#[derive(Clone, Copy, Debug)]
pub struct Group {
    /// Address expression.
    pub expression: Expression,
    /// Lowest byte, as a constant relative to the expression *at the check*.
    pub low: i64,
    /// The same relative to what the registers held when their values began.
    pub relative: i64,
    /// Its address is the same in each round of a block that is a loop, so one check at the entry is enough.
    pub invariant: bool,
    /// Its address moves by a constant in each round of a block that is a loop, so its page is mostly that of the round before:
    /// lowest byte, as a constant relative to the expression at the block's start.
    pub moving: Option<i64>,
    /// Bytes from there on.
    pub span: i64,
    /// Is there a write?
    pub write: bool,
    /// Does it cover more than what is accessed?
    pub ranges: bool,
    /// Number of accesses.
    pub accesses: u32,
    /// Instruction before which the check stands.
    pub at: usize,
    /// Instruction of the first access.
    pub first: usize,
    /// Where the addend is kept while another group uses the scratch register.
    pub slot: Option<usize>,
}

impl Group {
    /// Does the check stand right before its only access? Then the interpreter can take over there.
    pub fn is_single(&self) -> bool {
        self.accesses == 1 && self.at == self.first && !self.is_ahead() && !self.ranges
    }

    /// Is it (also) checked before the loop that the block is?
    pub fn is_ahead(&self) -> bool {
        self.invariant || self.moving.is_some()
    }
}

/// An instruction of the block.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// The instruction.
    pub i: Instruction,
    /// What is done with it.
    pub kind: Kind,
    /// Flags that are needed before it.
    pub need: Need,
    /// Flags that the target of a conditional jump may read.
    pub taken: u8,
    /// First of its accesses in [`Plan::accesses`].
    pub access: usize,
}

/// The analysis of a block.
#[derive(Default)]
pub struct Plan {
    /// Instructions.
    pub steps: Vec<Step>,
    /// Accesses in order.
    pub accesses: Vec<Access>,
    /// Groups in order of their checks.
    pub groups: Vec<Group>,
    /// Flags needed behind the last instruction.
    pub need_after: Need,
    /// The block ends with an instruction that never falls through.
    pub ended: bool,
    /// Behind the block comes an instruction that goes on in the next page.
    pub at_crossing: bool,
    /// Level of vector state used: 0 none, 1 SSE or x87, 2 AVX.
    pub vector: u8,
}

/// Values of the general registers as far as constants are concerned.
#[derive(Clone, Copy, Default)]
pub(super) struct Value {
    pub(super) version: u32,
    pub(super) delta: i64,
}

/// Registers as they are before an instruction. Outside 64-bit mode the second half are the low 16 bits of the first.
pub(super) type Values = [Value; 16];

/// Number of a general register of any size.
pub(super) fn number(r: Register) -> u8 {
    r.full_register().number() as u8
}

impl Plan {
    /// Analyses a block. `page`: the bytes of its page, perhaps with some of the next one: then an
    /// instruction that goes on there is a block of its own. `kind` decides about an instruction. `None`: the first
    /// instruction goes on in the next page, whose bytes were not given.
    pub fn new(
        origin: &Origin,
        page: &[u8],
        shape: Shape,
        verify: bool,
        kind: impl Fn(&Instruction) -> Kind,
    ) -> Option<Self> {
        let mut limit = if shape == Shape::Grouped && !verify { MAX_LOOP } else { MAX_INSTRUCTIONS };
        loop {
            let mut plan = Plan::default();
            plan.decode(origin, page, limit, &kind);
            if plan.steps.len() > MAX_INSTRUCTIONS && !plan.is_loop(origin.rip) {
                plan.cut(MAX_INSTRUCTIONS);
            }
            let last = plan.steps.last_mut()?;
            if last.kind == Kind::System(System::Sti) {
                // The instruction behind STI belongs to it: an interrupt must not come between.
                last.kind = if verify { Kind::Stop } else { Kind::Interpret };
                plan.ended |= verify;
            }
            plan.flags(origin, page, shape);
            plan.group(origin, shape, verify);
            if plan.assign_slots() {
                return Some(plan);
            }
            // A shorter block needs fewer slots; one instruction has two accesses at most.
            limit = if plan.steps.len() > MAX_INSTRUCTIONS { MAX_INSTRUCTIONS } else { plan.steps.len() / 2 };
        }
    }

    /// Leaves out what comes behind the first instructions.
    fn cut(&mut self, len: usize) {
        self.steps.truncate(len);
        (self.ended, self.at_crossing) = (false, false);
        self.vector = self.steps.iter().map(|s| vector_level(s.kind)).max().unwrap_or_default();
    }

    fn decode(&mut self, origin: &Origin, page: &[u8], limit: usize, kind: impl Fn(&Instruction) -> Kind) {
        let rip = origin.rip;
        let code = &page[origin.offset(rip) as usize..];
        let mut decoder = Decoder::with_ip(origin.bits(), code, rip, DecoderOptions::NONE);
        let ends_in = |i: &Instruction| origin.offset(i.ip()) as usize + i.len();
        let step = |i, kind| Step { i, kind, need: Need::default(), taken: 0, access: 0 };
        while decoder.can_decode() && self.steps.len() < limit {
            let i = decoder.decode();
            if i.is_invalid() {
                self.at_crossing = decoder.last_error() == DecoderError::NoMoreBytes;
                break;
            }
            if ends_in(&i) > 0x1000 && !self.steps.is_empty() {
                self.at_crossing = true;
                break;
            }
            let mut kind = kind(&i);
            if kind == Kind::Jcc && i.near_branch_target() == i.next_ip() {
                kind = Kind::Nop; // both ways lead to the next instruction, and no exit between them
            }
            self.vector = self.vector.max(vector_level(kind));
            self.steps.push(step(i, kind));
            if ends_in(&i) > 0x1000 {
                // Alone: what follows belongs to the next page's blocks.
                self.ended = self.ended || is_end(kind);
                break;
            }
            if is_end(kind) {
                self.ended = true;
                break;
            }
            if matches!(kind, Kind::Jcc | Kind::Loop) && i.near_branch_target() == rip {
                break; // a loop is a block of its own
            }
        }
        if self.steps.is_empty() && !self.at_crossing {
            // The first instruction is invalid: a block that leads to the interpreter, so that the next time costs a jump
            // and not a translation.
            let mut i = Instruction::default();
            i.set_ip(rip);
            self.steps.push(step(i, Kind::Stop));
            self.ended = true;
        }
    }

    /// Liveness of the flags, backwards, until the jumps inside the block agree. What lies outside the page is not looked at: its
    /// contents may differ from one address space to another, and change without this page's changing.
    fn flags(&mut self, origin: &Origin, page: &[u8], shape: Shape) {
        let page = &page[..page.len().min(0x1000)];
        let peek = |target: u64| match origin.offset(target) {
            offset if offset < page.len() as u64 => flags::peek(page, offset as usize, origin.bits()),
            _ => flags::ALL,
        };
        // Targets in the block itself are looked up there, from round to round; the others once.
        let own = |steps: &[Step], target: u64| steps.binary_search_by_key(&target, |s| s.i.ip()).ok();
        let mut again = false;
        for n in 0..self.steps.len() {
            let Step { i, kind, .. } = self.steps[n];
            if matches!(kind, Kind::Jcc | Kind::Loop) {
                let target = i.near_branch_target();
                let inside = own(&self.steps, target).is_some();
                again |= inside;
                self.steps[n].taken = if inside { 0 } else { peek(target) };
            }
        }
        let Some(last) = self.steps.last() else { return };
        let (end, to) = match last.kind {
            _ if !self.ended && self.at_crossing => (flags::ALL, None),
            _ if !self.ended => (peek(last.i.next_ip()), None),
            Kind::Jmp | Kind::Call => match own(&self.steps, last.i.near_branch_target()) {
                Some(to) => (0, Some(to)),
                None => (peek(last.i.near_branch_target()), None),
            },
            _ => (flags::ALL, None),
        };
        again |= to.is_some();
        loop {
            let mut need = to.map_or(end, |to| self.steps[to].need.hard);
            self.need_after = Need { hard: need };
            let mut changed = false;
            for n in (0..self.steps.len()).rev() {
                let Step { i, kind, .. } = self.steps[n];
                let effect = flags::effect(&i, kind);
                need = need & !effect.kills | effect.reads;
                if matches!(kind, Kind::Jcc | Kind::Loop) {
                    if again && let Some(to) = own(&self.steps, i.near_branch_target()) {
                        self.steps[n].taken = self.steps[to].need.hard;
                    }
                    need |= self.steps[n].taken;
                }
                changed |= self.steps[n].need.hard != need;
                self.steps[n].need = Need { hard: need };
            }
            if !again || !changed {
                break;
            }
        }
        if shape == Shape::Single {
            // Where accesses fault: so that the flags that a fault pushes are right. It is not the hot path.
            for need in self.steps.iter_mut().map(|s| &mut s.need).chain([&mut self.need_after]) {
                need.hard = flags::ALL;
            }
        }
    }

    fn group(&mut self, origin: &Origin, shape: Shape, verify: bool) {
        let rip = origin.rip;
        let mut values: Values = std::array::from_fn(|r| Value { version: r as u32, delta: 0 });
        let mut before: Vec<Values> = Vec::with_capacity(self.steps.len());
        // Groups that may take more accesses, with the values of their registers' versions.
        let mut open: Vec<(usize, [u32; 2])> = Vec::new();
        // No check may be moved before this instruction.
        let mut barrier = 0;
        let mut next_version = 16;
        let mut bounds = Bounds::default();
        for n in 0..self.steps.len() {
            before.push(values);
            let Step { i, kind, .. } = self.steps[n];
            self.steps[n].access = self.accesses.len();
            let first = self.accesses.len();
            match &origin.facts {
                None => accesses_of(&i, kind, origin.page, |mut access| {
                    if shape == Shape::Grouped {
                        bounds.widen(&mut access, REACH);
                    }
                    self.accesses.push(access);
                }),
                Some(facts) => legacy::accesses_of(&i, kind, facts, |access| self.accesses.push(access)),
            }
            for a in first..self.accesses.len() {
                let access = self.accesses[a];
                // PUSH [RSP + x] and the like compute their addresses before RSP changes; all accesses of an instruction do.
                let (versions, constant) = constants(&values, &access.expression);
                let relative = access.displacement.wrapping_add(constant);
                let plain = !access.expression.narrow || origin.facts.is_some();
                let groupable = shape == Shape::Grouped && plain && relative.abs() < 1 << 28;
                let found = open.iter().position(|(g, v)| {
                    groupable && *v == versions && self.groups[*g].expression.alike(&access.expression) && {
                        let g = &self.groups[*g];
                        let low = g.low.min(relative);
                        (g.low + g.span).max(relative + i64::from(access.size)) - low <= REACH
                    }
                });
                let number = match found {
                    Some(at) => {
                        let number = open[at].0;
                        let g = &mut self.groups[number];
                        let high = (g.low + g.span).max(relative + i64::from(access.size));
                        g.low = g.low.min(relative);
                        g.span = high - g.low;
                        g.write |= access.write;
                        g.ranges |= access.operand.is_some();
                        g.accesses += 1;
                        number
                    }
                    None => {
                        open.retain(|(g, v)| *v != versions || !self.groups[*g].expression.alike(&access.expression));
                        let number = self.groups.len();
                        self.groups.push(Group {
                            expression: access.expression,
                            low: relative,
                            span: i64::from(access.size),
                            write: access.write,
                            ranges: access.operand.is_some(),
                            accesses: 1,
                            at: barrier,
                            first: n,
                            slot: None,
                            relative: 0,
                            invariant: false,
                            moving: None,
                        });
                        if groupable {
                            open.push((number, versions));
                        }
                        number
                    }
                };
                self.accesses[a].group = number;
                self.accesses[a].relative = relative;
            }
            if is_barrier(kind) {
                open.clear();
                bounds.forget();
                barrier = n + 1;
                for v in &mut values {
                    *v = Value { version: next_version, delta: 0 };
                    next_version += 1;
                }
            } else if let Some(facts) = &origin.facts {
                legacy::step_values(&i, kind, facts, &mut values, &mut next_version);
            } else {
                step_values(&i, kind, &mut values, &mut next_version);
                bounds.step(&i, kind);
            }
        }
        // Where the checks stand; `at` is the earliest place so far. A block of single accesses must be able to leave each to
        // the interpreter, so there the check stands right before it.
        for g in &mut self.groups {
            let (wanted, _) = constants(&before[g.first], &g.expression);
            let mut at = g.first;
            if self.steps[at].need.hard != 0 && shape == Shape::Grouped {
                let mut place = at;
                while place > g.at {
                    place -= 1;
                    if constants(&before[place], &g.expression).0 != wanted {
                        break;
                    }
                    if self.steps[place].need.hard == 0 {
                        at = place;
                        break;
                    }
                }
            }
            g.at = at;
            g.relative = g.low;
            g.low = g.low.wrapping_sub(constants(&before[at], &g.expression).1);
        }
        if shape == Shape::Grouped && !verify && barrier == 0 && self.is_loop(rip) {
            self.find_invariants(&before, &values, origin.facts.is_none());
        }
    }

    /// Does the block end with a jump to its own start?
    fn is_loop(&self, rip: u64) -> bool {
        // (No other jump leads there: [`Plan::decode`] ends the block at the first one.)
        let jumps = |s: &Step| matches!(s.kind, Kind::Jcc | Kind::Jmp | Kind::Loop) && s.i.near_branch_target() == rip;
        self.steps.last().is_some_and(jumps)
    }

    /// Groups whose registers the block leaves as they were move to its entry. Those whose registers it moves by a constant are
    /// compared with the page of the round before. Nothing in such a block can end what a check promises: there is no
    /// barrier, and whoever changes translations has the loop left at its poll.
    fn find_invariants(&mut self, before: &[Values], after: &Values, moving: bool) {
        let mut ahead = 0;
        for g in &mut self.groups {
            // The others need some slots too.
            if ahead == ADDENDS - 4 {
                break;
            }
            let whole = |values: &Values| constants(values, &g.expression);
            let start = whole(&before[0]);
            if start.0 != whole(&before[g.first]).0 || start.0 != whole(after).0 {
                continue;
            }
            let low = g.relative.wrapping_sub(start.1);
            if start != whole(after) {
                g.moving = moving.then_some(low);
            } else {
                g.invariant = true;
                g.at = 0;
                g.low = low;
            }
            ahead += usize::from(g.is_ahead());
        }
    }

    /// Finds out which groups need a slot, by following the scratch register through the block, and gives each one that is
    /// free from its check to its last access. False: there are not enough.
    fn assign_slots(&mut self) -> bool {
        let mut needs = vec![false; self.groups.len()];
        // Instruction of the last access.
        let mut last = vec![0; self.groups.len()];
        let mut current = usize::MAX;
        for (g, needs) in self.groups.iter().zip(&mut needs) {
            *needs = g.is_ahead();
        }
        for n in 0..self.steps.len() {
            for g in self.checks(n) {
                current = g;
            }
            for access in self.accesses_of(n) {
                if current != access.group {
                    needs[access.group] = true;
                }
                current = access.group;
                last[access.group] = n;
            }
            if self.loses_addend(n) {
                current = usize::MAX;
            }
        }
        // Those of the checks at the entry are never free again.
        let mut free_from = [0; ADDENDS];
        let others = (0..self.steps.len()).flat_map(|n| self.checks(n)).filter(|g| !self.groups[*g].is_ahead());
        for number in self.ahead().chain(others).filter(|g| needs[*g]).collect::<Vec<_>>() {
            let g = &mut self.groups[number];
            let Some(slot) = free_from.iter().position(|from| *from <= g.at) else { return false };
            free_from[slot] = if g.is_ahead() { usize::MAX } else { last[number] + 1 };
            g.slot = Some(slot);
        }
        true
    }

    /// Does the scratch register lose its addend at instruction `n`? Where the interpreter may execute it, nothing is left in
    /// scratch registers.
    pub fn loses_addend(&self, n: usize) -> bool {
        let Step { i, kind, .. } = &self.steps[n];
        is_barrier(*kind)
            || matches!(kind, Kind::Plain | Kind::Vector(_)) && names_many(i)
            || self.accesses_of(n).iter().any(|a| self.groups[a.group].is_single())
    }

    /// Groups whose check stands before instruction `n`, in order. Where one fails that is for this instruction only, the
    /// interpreter executes it and the block goes on behind it: so such a one comes last, and no other check is left out.
    pub fn checks(&self, n: usize) -> impl Iterator<Item = usize> + '_ {
        let here = move |single: bool| {
            let groups = self.groups.iter().enumerate();
            groups.filter(move |(_, g)| g.at == n && !g.invariant && g.is_single() == single).map(|(number, _)| number)
        };
        here(false).chain(here(true))
    }

    /// Groups with a check before the loop that the block is.
    pub fn ahead(&self) -> impl Iterator<Item = usize> + '_ {
        self.groups.iter().enumerate().filter(|(_, g)| g.is_ahead()).map(|(number, _)| number)
    }

    /// Accesses of instruction `n`.
    pub fn accesses_of(&self, n: usize) -> &[Access] {
        let end = self.steps.get(n + 1).map_or(self.accesses.len(), |s| s.access);
        &self.accesses[self.steps[n].access..end]
    }
}

/// Does the instruction at `bytes` go on behind them? `bits`: of the code.
pub fn goes_on(bytes: &[u8], bits: u32) -> bool {
    let mut decoder = Decoder::with_ip(bits, bytes, 0, DecoderOptions::NONE);
    decoder.decode().is_invalid() && decoder.last_error() == DecoderError::NoMoreBytes
}

/// Does the instruction name so many general registers that all scratch registers may be needed for them?
fn names_many(i: &Instruction) -> bool {
    let needs = |n: &u32| match i.op_kind(*n) {
        OpKind::Register => i.op_register(*n).is_gpr(),
        kind => kind == OpKind::Memory,
    };
    (0..i.op_count()).filter(needs).count() > 2
}

/// The level of vector state that an instruction uses: see [`Plan::vector`].
fn vector_level(kind: Kind) -> u8 {
    match kind {
        Kind::Vector(avx) => 1 + u8::from(avx),
        _ => 0,
    }
}

/// Does a block end behind the instruction?
fn is_end(kind: Kind) -> bool {
    matches!(kind, Kind::Stop | Kind::Jmp | Kind::Ret | Kind::JmpIndirect | Kind::CallIndirect | Kind::Call)
}

/// Does the instruction end what checks promise?
fn is_barrier(kind: Kind) -> bool {
    matches!(kind, Kind::Interpret | Kind::System(_) | Kind::Stop)
}

/// Versions of an expression's registers, and the constant that they have gained since those versions began.
fn constants(values: &Values, e: &Expression) -> ([u32; 2], i64) {
    let (mut versions, mut constant) = ([0; 2], 0i64);
    let half = if e.word { 8 } else { 0 };
    if let Base::Register(r) = e.base {
        let v = values[usize::from(r) + half];
        versions[0] = v.version;
        constant = v.delta;
    }
    if let Some((r, scale)) = e.index {
        let v = values[usize::from(r) + half];
        versions[1] = v.version;
        constant = constant.wrapping_add(v.delta.wrapping_mul(i64::from(scale)));
    }
    (versions, constant)
}

/// What an instruction accesses.
fn accesses_of(i: &Instruction, kind: Kind, linear_page: u64, mut f: impl FnMut(Access)) {
    let stack = |displacement, write| Access {
        expression: Expression::STACK,
        operand: None,
        displacement,
        size: 8,
        write,
        group: 0,
        relative: 0,
    };
    let operand = |size: usize, write| {
        let (expression, displacement) = expression_of(i, linear_page);
        Access { expression, operand: None, displacement, size: size as u32, write, group: 0, relative: 0 }
    };
    match kind {
        Kind::Plain | Kind::Vector(_) if (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory) => {
            f(operand(i.memory_size().size(), classify::shape(i).writes_memory));
        }
        Kind::Push => {
            if i.op0_kind() == OpKind::Memory {
                f(operand(8, false));
            }
            f(stack(-8, true));
        }
        Kind::Pop | Kind::Ret => f(stack(0, false)),
        Kind::Leave => f(Access {
            expression: Expression { base: Base::Register(5), ..Expression::STACK },
            operand: None,
            displacement: 0,
            size: 8,
            write: false,
            group: 0,
            relative: 0,
        }),
        Kind::Call => f(stack(-8, true)),
        Kind::JmpIndirect | Kind::CallIndirect => {
            if i.op0_kind() == OpKind::Memory {
                f(operand(8, false));
            }
            if kind == Kind::CallIndirect {
                f(stack(-8, true));
            }
        }
        _ => {}
    }
}

/// The address of the memory operand.
pub fn expression_of(i: &Instruction, linear_page: u64) -> (Expression, i64) {
    let (base, index) = (i.memory_base(), i.memory_index());
    let displacement = i.memory_displacement64();
    let segment = match i.memory_segment() {
        Register::FS => SegmentBase::Fs,
        Register::GS => SegmentBase::Gs,
        _ => SegmentBase::Flat,
    };
    if base == Register::RIP {
        let e = Expression { base: Base::Page, index: None, segment, narrow: false, word: false };
        return (e, displacement.wrapping_sub(linear_page) as i64);
    }
    if base == Register::EIP {
        // The offset is truncated to 32 bits: only the page's own address says to what.
        let e = Expression { base: Base::Page, index: None, segment, narrow: true, word: false };
        return (e, displacement.wrapping_sub(linear_page) as i64);
    }
    let index = (index != Register::None).then(|| (number(index), i.memory_index_scale() as u8));
    let narrow = match (base, i.memory_index()) {
        (Register::None, Register::None) => i.memory_displ_size() != 8 && displacement >> 31 == 1,
        (Register::None, x) => x.size() == 4,
        (b, _) => b.size() == 4,
    };
    let base = if base == Register::None { Base::Zero } else { Base::Register(number(base)) };
    let e = Expression { base, index, segment, narrow, word: false };
    (e, if narrow { i64::from(displacement as i32) } else { displacement as i64 })
}

/// What an instruction does to the values of registers.
fn step_values(i: &Instruction, kind: Kind, values: &mut Values, next_version: &mut u32) {
    let mut fresh = |v: &mut Value| {
        *v = Value { version: *next_version, delta: 0 };
        *next_version += 1;
    };
    match kind {
        Kind::Push | Kind::Call | Kind::CallIndirect => values[4].delta -= 8,
        Kind::Pop => {
            values[4].delta += 8;
            fresh(&mut values[usize::from(number(i.op0_register()))]);
        }
        Kind::Ret => fresh(&mut values[4]),
        Kind::Leave => {
            fresh(&mut values[4]);
            fresh(&mut values[5]);
        }
        Kind::Plain | Kind::Vector(_) | Kind::Lea => {
            if let Some((register, delta)) = constant_step(i) {
                let v = &mut values[usize::from(register)];
                v.delta = v.delta.wrapping_add(delta);
                if v.delta.abs() >= 1 << 28 {
                    fresh(v);
                }
                return;
            }
            if i.code() == Code::Mov_r64_rm64 || i.code() == Code::Mov_rm64_r64 {
                // A copy: both are the same value until one changes.
                if i.op0_kind() == OpKind::Register && i.op1_kind() == OpKind::Register {
                    values[usize::from(number(i.op0_register()))] = values[usize::from(number(i.op1_register()))];
                    return;
                }
            }
            let written = written(i);
            for (r, v) in values.iter_mut().enumerate() {
                if written & 1 << r != 0 {
                    fresh(v);
                }
            }
        }
        _ => {}
    }
}

/// A 64-bit register to which the instruction adds a constant.
fn constant_step(i: &Instruction) -> Option<(u8, i64)> {
    use Mnemonic as M;
    if i.op0_kind() != OpKind::Register || i.op0_register().size() != 8 || !i.op0_register().is_gpr() {
        return None;
    }
    let register = number(i.op0_register());
    let immediate = || match i.op1_kind() {
        OpKind::Immediate8to64 | OpKind::Immediate32to64 => Some(i.immediate(1) as i64),
        _ => None,
    };
    match i.mnemonic() {
        M::Add => Some((register, immediate()?)),
        M::Sub => Some((register, immediate()?.wrapping_neg())),
        M::Inc => Some((register, 1)),
        M::Dec => Some((register, -1)),
        M::Lea if i.memory_base() == i.op0_register() && i.memory_index() == Register::None => {
            Some((register, i.memory_displacement64() as i64))
        }
        _ => None,
    }
}

/// General registers that a plain or vector instruction writes, as a mask.
pub fn written(i: &Instruction) -> u16 {
    use Mnemonic as M;
    let shape = classify::shape(i);
    let mut mask = match i.mnemonic() {
        M::Mul | M::Div | M::Idiv | M::Cmpxchg8b | M::Cmpxchg16b => 1 | 1 << 2,
        M::Imul if i.op_count() == 1 => 1 | 1 << 2,
        M::Cwd | M::Cdq | M::Cqo => 1 << 2,
        M::Cbw | M::Cwde | M::Cdqe | M::Cmpxchg | M::Lahf => 1,
        M::Pcmpestri | M::Pcmpistri | M::Vpcmpestri | M::Vpcmpistri | M::Pcmpestri64 | M::Vpcmpestri64 => 1 << 1,
        _ => 0,
    };
    for n in 0..i.op_count() {
        if i.op_kind(n) == OpKind::Register && i.op_register(n).is_gpr() {
            let writes = if n == 0 { !shape.op0_read_only } else { shape.others_written };
            if writes {
                mask |= 1 << number(i.op_register(n));
            }
        }
    }
    mask
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::features::Features;
    use iced_x86::{InstructionInfoFactory, OpAccess};
    use x86::cpuid::CpuModel;

    fn features() -> Features {
        Features::from_table(&CpuModel::by_name("x86-64-v3").unwrap().table(0, 1, 1_000_000_000))
    }

    fn shaped(code: &[u8], shape: Shape) -> Plan {
        let mut page = [0xf4u8; 4096];
        page[..code.len()].copy_from_slice(code);
        let features = features();
        Plan::new(&Origin::long(0x7000), &page, shape, false, |i| classify::kind(i, &features)).unwrap_or_default()
    }

    fn plan(code: &[u8]) -> Plan {
        shaped(code, Shape::Grouped)
    }

    /// Where slots are in use, no other group has the same one.
    fn check_slots(p: &Plan) {
        for (n, g) in p.groups.iter().enumerate() {
            let accesses = (0..p.steps.len()).flat_map(|s| p.accesses_of(s).iter().map(move |a| (s, a)));
            let last = accesses.filter(|(_, a)| a.group == n).map(|(s, _)| s).max().unwrap();
            for (m, other) in p.groups.iter().enumerate() {
                let beside = m != n && other.at >= g.at && (other.at <= last || g.is_ahead());
                assert!(g.slot.is_none() || !beside || g.slot != other.slot, "{g:?} {other:?}");
            }
        }
    }

    #[test]
    fn slots_are_used_again() {
        // push [rbx+8n], each with two checks
        let pushes: Vec<u8> = (0..40u8).flat_map(|n| [0xff, 0x73, 3 * n]).collect();
        let p = shaped(&pushes, Shape::Single);
        assert_eq!((p.steps.len(), p.groups.len()), (41, 80), "each has two checks; the last one is HLT");
        check_slots(&p);
        assert!(p.groups.iter().all(|g| g.slot.is_some_and(|s| s < 4)));
    }

    #[test]
    fn a_block_with_too_many_groups_is_cut() {
        // mov rax,[rbx+0x1000n] (n = 0..17), and again: all are in use at the same time
        let read = |n: u32| {
            let mut bytes = vec![0x48, 0x8b, 0x83];
            bytes.extend((n % 17 * 0x1000).to_le_bytes());
            bytes
        };
        let p = plan(&(0..34).flat_map(read).collect::<Vec<_>>());
        assert!(!p.steps.is_empty() && !p.groups.is_empty());
        check_slots(&p);
    }

    #[test]
    fn fields_of_one_structure_share_a_check() {
        // mov rax,[rbx+8]; mov rcx,[rbx+0x20]; mov [rbx],rax; add rbx,0x40; mov rdx,[rbx-8]
        let p = plan(&[
            0x48, 0x8b, 0x43, 8, 0x48, 0x8b, 0x4b, 0x20, 0x48, 0x89, 3, 0x48, 0x83, 0xc3, 0x40, 0x48, 0x8b, 0x53, 0xf8,
        ]);
        assert_eq!(p.groups.len(), 1);
        let g = p.groups[0];
        assert_eq!((g.low, g.span, g.write, g.accesses, g.at, g.slot), (0, 0x40, true, 4, 0, None));
    }

    #[test]
    fn a_written_base_ends_the_group_and_two_groups_keep_one_addend_in_a_slot() {
        // mov rax,[rbx]; mov rcx,[rsi]; mov rdx,[rbx+8]; mov rbx,rcx; mov rdx,[rbx+8]
        let p = plan(&[0x48, 0x8b, 3, 0x48, 0x8b, 0x0e, 0x48, 0x8b, 0x53, 8, 0x48, 0x89, 0xcb, 0x48, 0x8b, 0x53, 8]);
        assert_eq!(p.groups.len(), 3);
        assert_eq!(p.groups.iter().map(|g| g.slot).collect::<Vec<_>>(), [Some(0), None, None]);
    }

    #[test]
    fn a_copy_of_a_base_belongs_to_its_group() {
        // push rbp; mov rbp,rsp; sub rsp,16; mov rax,[rbp-8]; mov rcx,[rsp]
        let p = plan(&[0x55, 0x48, 0x89, 0xe5, 0x48, 0x83, 0xec, 16, 0x48, 0x8b, 0x45, 0xf8, 0x48, 0x8b, 0x0c, 0x24]);
        assert_eq!(p.groups.len(), 1);
        assert_eq!((p.groups[0].low, p.groups[0].span), (-24, 24));
    }

    #[test]
    fn checks_move_before_the_instruction_that_sets_needed_flags() {
        // cmp eax,ecx; mov rdx,[rdi+8]; je +0
        let p = plan(&[0x39, 0xc8, 0x48, 0x8b, 0x57, 8, 0x74, 0]);
        assert_eq!(p.groups[0].at, 0);
        // add rsp,8; pop rbx; ret: the stack moves between check and access
        let p = plan(&[0x48, 0x83, 0xc4, 8, 0x5b, 0xc3]);
        assert_eq!(p.groups.len(), 1);
        assert_eq!((p.groups[0].at, p.groups[0].low, p.groups[0].span), (0, 8, 16));
        // mov rdi,[rsi] between: the base is another one there
        let p = plan(&[0x39, 0xc8, 0x48, 0x8b, 0x3e, 0x48, 0x8b, 0x57, 8, 0x74, 0]);
        assert_eq!((p.groups[0].at, p.groups[1].at), (0, 2));
    }

    /// `written` against the decoder's own tables, for every form that is translated.
    #[test]
    fn written_registers() {
        let features = features();
        let mut factory = InstructionInfoFactory::new();
        let mut seen = 0;
        let mut random = 0x1234_5678_9abc_def1u64;
        for _ in 0..400_000 {
            let mut bytes = [0u8; 16];
            for chunk in bytes.chunks_mut(8) {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                chunk.copy_from_slice(&random.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes());
            }
            match random % 5 {
                0 => bytes[0] = 0x48,
                1 => bytes[0] = 0x0f,
                2 => bytes[..2].copy_from_slice(&[0x66, 0x0f]),
                3 => (bytes[0], bytes[1]) = (0xc4, 0xe2 | bytes[1] & 1),
                _ => {}
            }
            let i = Decoder::with_ip(64, &bytes, 0x1000, DecoderOptions::NONE).decode();
            if i.is_invalid() || i.code() == Code::INVALID {
                continue;
            }
            let kind = classify::kind(&i, &features);
            if !matches!(kind, Kind::Plain | Kind::Vector(_) | Kind::Lea) {
                continue;
            }
            seen += 1;
            let mut expected = 0u16;
            for used in factory.info(&i).used_registers() {
                let writes = matches!(
                    used.access(),
                    OpAccess::Write | OpAccess::ReadWrite | OpAccess::CondWrite | OpAccess::ReadCondWrite
                );
                if writes && used.register().is_gpr() {
                    expected |= 1 << number(used.register());
                }
            }
            assert_eq!(expected & !written(&i), 0, "{i} writes a register that is not noticed");
        }
        assert!(seen > 20_000, "{seen}");
    }
}
