//! From guest instructions to host code: one block.
//!
//! Order is kept and every instruction commits last, so the guest's state is exact at every call of the interpreter and
//! at every signal. The way out of every difficulty is the same: *this one instruction* is executed by the interpreter
//! (cold code), and the block goes on behind it.

use super::JitState;
use super::classify::{self, Kind, shape};
use super::emit::{A, Asm, B, C, RAX, RCX, SP, cc};
use super::flags::{self, Need};
use super::kernel;
use super::raw::{Place, Raw};
use super::thunks::Thunks;
use crate::features::Features;
use crate::mmu::TlbPointers;
use crate::mmu::tlb::{SLOTS, TlbEntry};
use crate::vp::VpBlock;
use iced_x86::{Decoder, DecoderOptions, Instruction, OpKind, Register};
use std::mem::{offset_of, size_of};
use x86::segment::{Segment, sreg};

/// Most instructions of a block.
pub const MAX_INSTRUCTIONS: usize = 48;
/// Jump-table slots (indexed by the low 16 bits of the target).
pub const JUMP_SLOTS: usize = 1 << 16;

/// Offset of a guest register in the VP block.
pub(super) fn gpr(n: u8) -> usize {
    8 * n as usize
}
/// Offset of a field of [`JitState`].
macro_rules! jit {
    ($field:ident) => {
        offset_of!(VpBlock, jit) + offset_of!(JitState, $field)
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
fn number(r: Register) -> u8 {
    r.full_register().number() as u8
}

/// How a block can be left by a direct jump.
#[derive(Clone, Copy, Debug)]
pub struct Exit {
    /// Where to.
    pub target: u64,
    /// Address of the 32-bit displacement to patch; 0: the exit is not to be patched.
    pub patch: u64,
    /// Where it leads while it is not patched.
    pub stub: u64,
}

/// A place where a native instruction may raise a signal.
#[derive(Clone, Copy, Debug)]
pub struct Site {
    /// Address of the instruction in the code memory.
    pub at: u64,
    /// The guest instruction.
    pub rip: u64,
    /// The guest's flags are in [`JitState::lazy`].
    pub lazy: bool,
}

/// A translated block, before it is entered anywhere.
pub struct Lowered {
    /// Hot code, for the address given.
    pub hot: Asm,
    /// Cold code.
    pub cold: Asm,
    /// Entry with flags in the host's register.
    pub entry: u64,
    /// Entry with flags in [`JitState::lazy`] (through the jump table).
    pub table_entry: u64,
    /// Direct exits.
    pub exits: Vec<Exit>,
    /// Signal sites, ascending.
    pub sites: Vec<Site>,
    /// Guest bytes that the block was made from: `rip .. rip + len`.
    pub len: u32,
    /// Guest instructions.
    pub count: u32,
    /// The instructions that the block executes, for [`super::verify`] (empty otherwise).
    pub path: Vec<Instruction>,
}

enum Cold {
    /// Execute the instruction in the interpreter, go on at `resume` (0: leave the block).
    Interpret { from: Vec<(u64, bool)>, rip: u64, len: u8, lazy: bool, light: bool, resume: u64 },
    /// Load the vector state, go on at `resume`. `pop`: the flags are on the stack.
    Vector { from: u64, rip: u64, level: u8, lazy: bool, pop: bool, resume: u64 },
    /// Leave by a direct jump (patchable).
    Exit { from: u64, target: u64 },
    /// Leave through the jump table; flags are in the host's register and are stored if `save`.
    Table { from: u64, target: u64, save: bool },
    /// Return to Rust because of attention; flags are in the host's register.
    Poll { from: u64, target: u64 },
}

pub(super) struct Lower<'a> {
    rip: u64,
    code: &'a [u8],
    pub(super) hot: Asm,
    cold: Vec<Cold>,
    thunks: &'a Thunks,
    exits: Vec<Exit>,
    sites: Vec<Site>,
    /// Need before the current instruction.
    need: Need,
    /// Flags that the target of the current Jcc may read.
    taken: u8,
    /// The flags are in `lazy`, and the host's may be destroyed.
    saved: bool,
    /// 0: unknown, 1: SSE, 2: AVX usable and loaded.
    vector: u8,
    /// Slow-path jumps of the current instruction (with: inside a flags-in-RAX sequence).
    pub(super) slow: Vec<(u64, bool)>,
    bmi2: bool,
}

/// Translates the block at `rip`. `code`: the bytes from there to the end of the page. `peek`: flags that the code at a
/// target may read. `None` if the first instruction is invalid or leaves the page.
pub fn lower(
    rip: u64,
    code: &[u8],
    peek: &dyn Fn(u64) -> u8,
    features: &Features,
    mode: kernel::Mode,
    thunks: &Thunks,
    hot_base: u64,
    cold_base: u64,
    first_exit: u32,
) -> Option<Lowered> {
    let mut list: Vec<(Instruction, Kind)> = Vec::with_capacity(16);
    let mut decoder = Decoder::with_ip(64, code, rip, DecoderOptions::NONE);
    let mut ended = false;
    while decoder.can_decode() && list.len() < MAX_INSTRUCTIONS {
        let i = decoder.decode();
        if i.is_invalid() {
            break;
        }
        let kind = kernel::refine(&i, classify::kind(&i, features), mode, thunks.bmi2);
        list.push((i, kind));
        if matches!(kind, Kind::Stop | Kind::Jmp | Kind::Ret | Kind::JmpIndirect | Kind::CallIndirect | Kind::Call) {
            ended = true;
            break;
        }
    }
    if list.is_empty() {
        // The first instruction is invalid or goes on in the next page: a block that leads to the interpreter, so that the
        // next time costs a jump and not a translation.
        let mut i = Instruction::default();
        i.set_ip(rip);
        list.push((i, Kind::Stop));
        ended = true;
    }
    if let Some((_, kind @ Kind::System(kernel::System::Sti))) = list.last_mut() {
        // The instruction behind STI belongs to it: an interrupt must not come between.
        *kind = if mode.verify { Kind::Stop } else { Kind::Interpret };
        ended |= mode.verify;
    }
    let last = list.last()?.0;
    let page = rip >> 12;
    // Needs, backwards.
    let of_target = peek;
    let to = |target: u64| {
        let live = of_target(target);
        if target >> 12 == page { Need { hard: live, soft: 0 } } else { Need { hard: 0, soft: live } }
    };
    let mut needs = vec![Need::default(); list.len() + 1];
    let mut taken = vec![0; list.len()];
    needs[list.len()] = match list.last()?.1 {
        _ if !ended => to(last.next_ip()),
        Kind::Stop => Need { hard: flags::ALL, soft: 0 },
        Kind::Jmp | Kind::Call => to(last.near_branch64()),
        _ => Need { hard: 0, soft: flags::ALL },
    };
    for n in (0..list.len()).rev() {
        let (i, kind) = &list[n];
        let mut need = needs[n + 1].before(flags::effect(i, *kind));
        if *kind == Kind::Jcc {
            taken[n] = of_target(i.near_branch64());
            need.hard |= taken[n];
            need.soft &= !need.hard;
        }
        needs[n] = need;
    }
    let mut l = Lower {
        rip,
        code,
        hot: Asm::new(hot_base),
        cold: Vec::new(),
        thunks,
        exits: Vec::new(),
        sites: Vec::new(),
        need: needs[0],
        taken: 0,
        saved: false,
        vector: 0,
        slow: Vec::new(),
        bmi2: thunks.bmi2,
    };
    // Two ways in: with the flags in the host's register, and through the table with the flags in `lazy`.
    let (entry, table_entry);
    if needs[0].hard != 0 {
        table_entry = l.hot.here();
        l.hot.push_gs(jit!(lazy));
        l.hot.popf();
        entry = l.hot.here();
    } else if needs[0].soft != 0 {
        entry = l.hot.here();
        l.save_flags();
        table_entry = l.hot.here();
    } else {
        entry = l.hot.here();
        table_entry = entry;
    }
    for (n, (i, kind)) in list.iter().enumerate() {
        l.need = needs[n];
        l.taken = taken[n];
        l.instruction(i, *kind, page);
    }
    if !ended {
        l.need = needs[list.len()];
        l.direct_exit(last.next_ip(), page, false);
    }
    let cold = l.finish_cold(cold_base, first_exit);
    Some(Lowered {
        hot: l.hot,
        cold,
        entry,
        table_entry,
        exits: l.exits,
        sites: l.sites,
        len: (last.next_ip() - rip) as u32,
        count: list.len() as u32,
        path: if mode.verify {
            list.iter().filter(|(_, k)| *k != Kind::Stop).map(|(i, _)| *i).collect()
        } else {
            vec![]
        },
    })
}

impl Lower<'_> {
    /// Stores the flags where table exits and cold code expect them.
    fn save_flags(&mut self) {
        self.hot.pushf();
        self.hot.pop_gs(jit!(lazy));
        self.saved = true;
    }

    /// To be called before a sequence that destroys the host's flags. True: it must keep them.
    pub(super) fn before_clobber(&mut self) -> bool {
        if self.need.hard != 0 {
            return true;
        }
        if self.need.soft != 0 && !self.saved {
            self.save_flags();
        }
        false
    }

    fn instruction(&mut self, i: &Instruction, kind: Kind, page: u64) {
        match kind {
            Kind::Nop => {}
            Kind::Plain | Kind::Vector(_) => self.native(i, kind),
            Kind::Lea => self.lea(i),
            Kind::Push => self.push(i),
            Kind::Pop => {
                self.hot.mov(A, SP);
                self.check(8, false);
                let to = i.op0_register().number() as u8;
                match host(to) {
                    Some(SP) => self.hot.load(SP, A, 0),
                    Some(h) => {
                        self.hot.load(h, A, 0);
                        self.hot.lea(true, SP, Some(SP), 4, 1, 8);
                    }
                    None => {
                        self.hot.load(B, A, 0);
                        self.hot.store_gs(B, gpr(to));
                        self.hot.lea(true, SP, Some(SP), 4, 1, 8);
                    }
                }
            }
            Kind::Leave => {
                self.hot.mov(A, 5);
                self.check(8, false);
                self.hot.lea(true, SP, Some(5), 4, 1, 8);
                self.hot.load(5, A, 0);
            }
            Kind::Jcc => self.jcc(i, page),
            Kind::Jmp => {
                let target = i.near_branch64();
                self.direct_exit(target, page, target <= i.ip());
            }
            Kind::Call => {
                self.push_return(i);
                self.direct_exit(i.near_branch64(), page, false);
            }
            Kind::Ret => {
                self.hot.mov(A, SP);
                self.check(8, false);
                self.hot.load(A, A, 0);
                let extra = if i.op_count() == 1 { i32::from(i.immediate16()) } else { 0 };
                self.hot.lea(true, SP, Some(SP), 4, 1, 8 + extra);
                self.table_exit();
            }
            Kind::JmpIndirect => {
                self.branch_target(i);
                self.table_exit();
            }
            Kind::CallIndirect => {
                if i.op0_kind() == OpKind::Register {
                    self.push_return(i);
                    self.branch_target(i);
                } else {
                    self.branch_target(i);
                    self.hot.store_gs(A, jit!(temporary));
                    self.push_return(i);
                    self.hot.load_gs(A, jit!(temporary));
                }
                self.table_exit();
            }
            Kind::Interpret => {
                self.call_interpreter(i);
            }
            Kind::System(system) => self.system(i, system),
            Kind::Stop => {
                // Flags are in the host's register: the need before a Stop is hard.
                self.hot.mov_imm(A, i.ip());
                let system = kernel::advances(i);
                self.hot.jmp(if system { self.thunks.exit_system } else { self.thunks.exit_interpret });
            }
        }
        let lazy = self.need.hard == 0 && self.saved;
        if flags::effect(i, kind).writes != 0 {
            self.saved = false;
        }
        if !self.slow.is_empty() {
            let from = std::mem::take(&mut self.slow);
            let leaves = matches!(kind, Kind::Call | Kind::Ret | Kind::JmpIndirect | Kind::CallIndirect);
            let resume = if leaves { 0 } else { self.hot.here() };
            let light = !kernel::touches_vector(i);
            self.cold.push(Cold::Interpret { from, rip: i.ip(), len: i.len() as u8, lazy, light, resume });
        }
    }

    /// Bytes of an instruction.
    fn bytes(&self, i: &Instruction) -> &[u8] {
        let at = (i.ip() - self.rip) as usize;
        &self.code[at..at + i.len()]
    }

    /// Loads A with the linear address of the memory operand.
    pub(super) fn address(&mut self, i: &Instruction) {
        self.address_into(A, i, false);
        let segment = i.memory_segment();
        if matches!(segment, Register::FS | Register::GS) {
            let at = offset_of!(VpBlock, segments)
                + size_of::<Segment>() * if segment == Register::FS { sreg::FS } else { sreg::GS }
                + offset_of!(Segment, base);
            self.hot.load_gs(B, at);
            self.hot.lea(true, A, Some(A), B, 1, 0);
        }
    }

    /// Loads a host register with the offset of the memory operand.
    fn address_into(&mut self, to: u8, i: &Instruction, narrow_result: bool) {
        let (base, index) = (i.memory_base(), i.memory_index());
        let displacement = i.memory_displacement64();
        if matches!(base, Register::RIP | Register::EIP) {
            self.hot.mov_imm(to, if narrow_result { displacement & 0xffff_ffff } else { displacement });
            return;
        }
        let narrow = match (base, index) {
            (Register::None, Register::None) => {
                let wide = i.memory_displ_size() == 8 && !narrow_result;
                let value = if wide { displacement } else { displacement & 0xffff_ffff };
                self.hot.mov_imm(to, value);
                return;
            }
            (Register::None, x) => x.size() == 4,
            (b, _) => b.size() == 4,
        } || narrow_result;
        let b = (base != Register::None).then(|| {
            let n = base.number() as u8;
            host(n).unwrap_or_else(|| {
                self.hot.load_gs(A, gpr(n));
                A
            })
        });
        let x = if index == Register::None {
            4
        } else {
            let n = index.number() as u8;
            host(n).unwrap_or_else(|| {
                self.hot.load_gs(B, gpr(n));
                B
            })
        };
        match b {
            Some(b) if x == 4 && displacement == 0 && !narrow => {
                if b != to {
                    self.hot.mov(to, b);
                }
            }
            _ => {
                let scale = if x == 4 { 1 } else { i.memory_index_scale() as u8 };
                self.hot.lea(!narrow, to, b, x, scale, displacement as i32);
            }
        }
    }

    /// Turns the linear address in A into a host address, or goes the slow way.
    pub(super) fn check(&mut self, size: usize, write: bool) {
        let keep = self.before_clobber();
        let h = &mut self.hot;
        if keep {
            // lahf; seto al
            h.store_gs(RAX, jit!(rax));
            h.bs(&[0x9f, 0x0f, 0x90, 0xc0]);
        }
        if self.bmi2 {
            h.rorx(B, A, 7);
        } else {
            h.mov(B, A);
            h.bs(&[0x49, 0xc1, 0xea, 7]); // shr r10, 7
        }
        const { assert!(size_of::<TlbEntry>() == 32) };
        h.alu_imm(false, 4, B, ((SLOTS - 1) << 5) as i32);
        h.gs(true, 0x03, B, offset_of!(VpBlock, tlb) + offset_of!(TlbPointers, data));
        h.mov(C, A);
        let tag = if write { offset_of!(TlbEntry, tag_w) } else { offset_of!(TlbEntry, tag_r) };
        h.op_mem(0x2b, C, B, tag as i32);
        h.alu_imm(true, 7, C, 4096 - size as i32);
        let from = h.jcc(cc::A, 0);
        h.op_mem(0x03, A, B, offset_of!(TlbEntry, addend) as i32);
        if keep {
            Self::restore_flags(h);
        }
        self.slow.push((from, keep));
    }

    /// Ends a flags-in-RAX sequence: add al, 0x7f; sahf; RAX back.
    pub(super) fn restore_flags(h: &mut Asm) {
        h.bs(&[0x04, 0x7f, 0x9e]);
        h.load_gs(RAX, jit!(rax));
    }

    /// The instruction itself, on host operands.
    fn native(&mut self, i: &Instruction, kind: Kind) {
        if let Kind::Vector(avx) = kind {
            self.ensure_vector(i, avx);
        }
        let memory = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory);
        let general =
            |n: u32| (i.op_kind(n) == OpKind::Register && i.op_register(n).is_gpr()).then(|| i.op_register(n));
        let moved =
            (0..i.op_count()).filter_map(general).any(|r| !classify::is_high8(r) && host(number(r)) != Some(number(r)));
        if !memory && !moved {
            self.site(i, kind);
            let at = (i.ip() - self.rip) as usize;
            self.hot.bs(&self.code[at..at + i.len()]);
            return;
        }
        let shape = shape(i);
        let high = (0..i.op_count()).filter_map(general).any(classify::is_high8);
        let raw = Raw::parse(self.bytes(i), shape.modrm);
        let (Some(mut raw), false) = (raw, high) else {
            self.call_interpreter(i);
            return;
        };
        if memory {
            self.address(i);
            self.check(i.memory_size().size(), shape.writes_memory);
        }
        let mut free = [C, B, A].into_iter().filter(|r| !memory || *r != A).collect::<Vec<_>>();
        let mut held: Vec<(u8, u8, bool)> = Vec::new();
        for n in 0..i.op_count() {
            let Some(r) = general(n) else { continue };
            let guest = number(r);
            if host(guest).is_some() {
                continue;
            }
            let written = if n == 0 { !shape.op0_read_only } else { shape.others_written };
            let load = n != 0 || !(shape.op0_write_only && r.size() >= 4);
            match held.iter_mut().find(|h| h.0 == guest) {
                Some(h) => {
                    // The first mention may have been write-only; loading again is harmless before the instruction.
                    if load {
                        self.hot.load_gs(h.1, gpr(guest));
                    }
                    h.2 |= written;
                }
                None => {
                    let Some(s) = free.pop() else {
                        unreachable!("an instruction names at most three general registers")
                    };
                    if load {
                        self.hot.load_gs(s, gpr(guest));
                    }
                    held.push((guest, s, written));
                }
            }
        }
        let map = |n: u8| host(n).or_else(|| held.iter().find(|h| h.0 == n).map(|h| h.1)).unwrap_or(n);
        let place = if memory {
            Place::Memory(A)
        } else if shape.rm {
            Place::Register(map(raw.rm()))
        } else {
            Place::Register(raw.rm())
        };
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
        for (guest, s, written) in held {
            if written {
                self.hot.store_gs(s, gpr(guest));
            }
        }
    }

    /// Remembers that the next host instruction may raise a signal.
    fn site(&mut self, i: &Instruction, kind: Kind) {
        if classify::may_signal(i, kind) {
            let lazy = self.need.hard == 0 && self.saved;
            self.sites.push(Site { at: self.hot.here(), rip: i.ip(), lazy });
        }
    }

    fn lea(&mut self, i: &Instruction) {
        let to = i.op0_register().number() as u8;
        let dest = host(to).unwrap_or(A);
        self.address_into(dest, i, i.op0_register().size() == 4);
        if host(to).is_none() {
            self.hot.store_gs(dest, gpr(to));
        }
    }

    /// A = RSP - 8, checked for writing.
    pub(super) fn push_place(&mut self) {
        self.hot.lea(true, A, Some(SP), 4, 1, -8);
        self.check(8, true);
    }

    fn push(&mut self, i: &Instruction) {
        let store_imm = |l: &mut Self, value: i32| {
            l.hot.bs(&[0x49, 0xc7, 0x01]); // mov qword [r9], imm32
            l.hot.d(value as u32);
        };
        match i.op0_kind() {
            OpKind::Register => {
                let n = i.op0_register().number() as u8;
                self.push_place();
                let from = host(n).unwrap_or_else(|| {
                    self.hot.load_gs(B, gpr(n));
                    B
                });
                self.hot.store(from, A, 0);
            }
            OpKind::Memory => {
                self.address(i);
                self.check(8, false);
                self.hot.load(A, A, 0);
                self.hot.store_gs(A, jit!(temporary));
                self.push_place();
                self.hot.load_gs(B, jit!(temporary));
                self.hot.store(B, A, 0);
            }
            _ => {
                self.push_place();
                store_imm(self, i.immediate(0) as i32);
            }
        }
        self.hot.lea(true, SP, Some(SP), 4, 1, -8);
    }

    fn push_return(&mut self, i: &Instruction) {
        self.push_place();
        let next = i.next_ip();
        if let Ok(imm) = i32::try_from(next as i64) {
            self.hot.bs(&[0x49, 0xc7, 0x01]);
            self.hot.d(imm as u32);
        } else {
            self.hot.mov_imm(B, next);
            self.hot.store(B, A, 0);
        }
        self.hot.lea(true, SP, Some(SP), 4, 1, -8);
    }

    /// A = target of an indirect branch.
    fn branch_target(&mut self, i: &Instruction) {
        if i.op0_kind() == OpKind::Register {
            let n = i.op0_register().number() as u8;
            match host(n) {
                Some(h) => self.hot.mov(A, h),
                None => self.hot.load_gs(A, gpr(n)),
            }
        } else {
            self.address(i);
            self.check(8, false);
            self.hot.load(A, A, 0);
        }
    }

    fn jcc(&mut self, i: &Instruction, page: u64) {
        let target = i.near_branch64();
        let encoded = encoded_condition(self.bytes(i));
        if target >> 12 != page {
            let from = self.hot.jcc(encoded, 0);
            self.cold.push(Cold::Table { from, target, save: self.taken != 0 });
        } else if target > i.ip() {
            let from = self.hot.jcc(encoded, 0);
            self.cold.push(Cold::Exit { from, target });
        } else {
            let over = self.hot.short(0x70 | encoded ^ 1);
            self.poll(target, self.taken != 0);
            let from = self.hot.jmp(0);
            self.cold.push(Cold::Exit { from, target });
            self.hot.close(over);
        }
    }

    /// Leaves towards `target` if somebody wants attention.
    fn poll(&mut self, target: u64, keep: bool) {
        let attention = offset_of!(VpBlock, attention);
        if keep {
            self.hot.mov(A, RCX);
            self.hot.load_gs32(RCX, attention);
            let none = self.hot.short(0xe3); // jrcxz
            self.hot.mov(RCX, A);
            let from = self.hot.jmp(0);
            self.cold.push(Cold::Poll { from, target });
            self.hot.close(none);
            self.hot.mov(RCX, A);
        } else {
            self.hot.cmp_gs32(attention, 0);
            let from = self.hot.jcc(cc::NE, 0);
            self.cold.push(Cold::Poll { from, target });
        }
    }

    /// Leaves the block for a known target.
    fn direct_exit(&mut self, target: u64, page: u64, poll: bool) {
        if target >> 12 == page {
            if poll {
                self.poll(target, self.need.hard != 0);
            }
            let from = self.hot.jmp(0);
            self.cold.push(Cold::Exit { from, target });
        } else {
            self.before_clobber();
            self.hot.mov_imm(A, target);
            table_jump(&mut self.hot, self.thunks);
        }
    }

    /// Leaves the block for the target in A.
    fn table_exit(&mut self) {
        self.before_clobber();
        table_jump(&mut self.hot, self.thunks);
    }

    /// Executes an instruction in the interpreter, in line.
    fn call_interpreter(&mut self, i: &Instruction) {
        let lazy = self.need.hard == 0 && self.saved;
        if lazy {
            self.hot.push_gs(jit!(lazy));
            self.hot.popf();
        }
        self.hot.mov_imm(A, i.ip());
        self.hot.mov_imm(B, i.len() as u64);
        let light = !kernel::touches_vector(i);
        self.hot.call(if light { self.thunks.call_interpreter_light } else { self.thunks.call_interpreter });
    }

    /// Makes sure that the vector state is in the host's registers.
    fn ensure_vector(&mut self, i: &Instruction, avx: bool) {
        let level = 1 + u8::from(avx);
        if self.vector >= level {
            return;
        }
        self.vector = level;
        let keep = self.before_clobber();
        if keep {
            self.hot.pushf();
        }
        self.hot.cmp_gs32(jit!(vector), level);
        let from = self.hot.jcc(2, 0); // jb
        if keep {
            self.hot.popf();
        }
        let lazy = !keep && self.saved;
        self.cold.push(Cold::Vector { from, rip: i.ip(), level, lazy, pop: keep, resume: self.hot.here() });
    }

    /// Emits the cold parts.
    fn finish_cold(&mut self, base: u64, first_exit: u32) -> Asm {
        let mut c = Asm::new(base);
        let load_lazy = |c: &mut Asm, lazy: bool| {
            if lazy {
                c.push_gs(jit!(lazy));
                c.popf();
            }
        };
        for cold in std::mem::take(&mut self.cold) {
            let here = c.here();
            match cold {
                Cold::Interpret { from, rip, len, lazy, light, resume } => {
                    for keep in [true, false] {
                        let here = c.here();
                        let mut any = false;
                        for (at, _) in from.iter().filter(|f| f.1 == keep) {
                            self.hot.patch(*at, here);
                            any = true;
                        }
                        if any && keep {
                            Self::restore_flags(&mut c);
                        }
                    }
                    load_lazy(&mut c, lazy);
                    c.mov_imm(A, rip);
                    if resume == 0 {
                        c.jmp(self.thunks.exit_system);
                    } else {
                        c.mov_imm(B, u64::from(len));
                        c.call(if light { self.thunks.call_interpreter_light } else { self.thunks.call_interpreter });
                        c.jmp(resume);
                    }
                }
                Cold::Vector { from, rip, level, lazy, pop, resume } => {
                    self.hot.patch(from, here);
                    if pop {
                        c.popf();
                    }
                    load_lazy(&mut c, lazy);
                    c.mov_imm(A, rip);
                    c.mov_imm(C, u64::from(level));
                    c.call(self.thunks.call_vector);
                    c.jmp(resume);
                }
                Cold::Exit { from, target } => {
                    self.hot.patch(from, here);
                    c.mov_imm(A, u64::from(first_exit) + self.exits.len() as u64);
                    c.jmp(self.thunks.exit_direct);
                    self.exits.push(Exit { target, patch: from, stub: here });
                }
                Cold::Table { from, target, save } => {
                    self.hot.patch(from, here);
                    if save {
                        c.pushf();
                        c.pop_gs(jit!(lazy));
                    }
                    c.mov_imm(A, target);
                    table_jump(&mut c, self.thunks);
                }
                Cold::Poll { from, target } => {
                    self.hot.patch(from, here);
                    c.mov_imm(A, target);
                    c.jmp(self.thunks.exit_resume);
                }
            }
        }
        c
    }
}

/// Jumps through the jump table to the target in A; the flags are in `lazy`.
fn table_jump(h: &mut Asm, thunks: &Thunks) {
    h.cmp_gs32(offset_of!(VpBlock, attention), 0);
    h.jcc(cc::NE, thunks.exit_table);
    h.bs(&[0x45, 0x0f, 0xb7, 0xd1]); // movzx r10d, r9w
    h.bs(&[0x41, 0xc1, 0xe2, 4]); // shl r10d, 4
    h.gs(true, 0x03, B, jit!(jump_table));
    h.op_mem(0x3b, A, B, 0);
    h.jcc(cc::NE, thunks.exit_table);
    h.bs(&[0x41, 0xff, 0x62, 8]); // jmp [r10 + 8]
}

/// Condition of a Jcc from its bytes.
fn encoded_condition(bytes: &[u8]) -> u8 {
    match bytes.iter().position(|b| *b == 0x0f) {
        Some(at) if bytes.get(at + 1).is_some_and(|b| b & 0xf0 == 0x80) => bytes[at + 1] & 15,
        _ => bytes.iter().find(|b| *b & 0xf0 == 0x70).map_or(0, |b| b & 15),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::features::Features;
    use x86::cpuid::CpuModel;

    /// The hot code of a block, disassembled.
    fn hot(code: &[u8]) -> Vec<String> {
        let model = CpuModel::by_name("x86-64-v3").unwrap();
        let features = Features::from_table(&model.table(0, 1, 1_000_000_000));
        let thunks = Thunks { bmi2: true, ..Thunks::default() };
        let l =
            lower(0x1000, code, &|_| flags::ALL, &features, kernel::Mode::default(), &thunks, 0x10_0000, 0x20_0000, 0)
                .unwrap();
        Decoder::with_ip(64, &l.hot.bytes, 0x10_0000, DecoderOptions::NONE).iter().map(|i| i.to_string()).collect()
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
}
