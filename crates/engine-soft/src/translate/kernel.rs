//! System instructions in translated code: in line, or by a call after which translated code goes on.
//!
//! A block knows its privilege level (0 or 3; [`super::run`] translates no other) and what [`Mode`] says of the control
//! registers; when that changes, everything is translated again. So nothing of it is tested at run time.
//!
//! Interrupts are polled at backward and table jumps only, so an instruction that opens the window for them (STI, POPF)
//! goes the slow way if anything waits: the interpreter then holds the boundary rules. If nothing waits, what comes in
//! later is as if it came in after the next poll.

use super::classify::Kind;
use super::emit::{A, Asm, B, C, RAX, RCX, SP, cc};
use super::facts::Facts;
use super::legacy;
use super::lower::{Lower, gpr, host, jit};
use crate::mmu::TlbPointers;
use crate::mmu::tlb::{SLOTS, TlbEntry};
use crate::vp::{SoftVp, VpBlock};
use crate::{native, xstate};
use iced_x86::{Code, Instruction, OpKind, Register};
use std::mem::{offset_of, size_of};
use x86::regs::{cr4, efer, rflags};
use x86::segment::{Segment, sreg};

/// A system instruction that is lowered in line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum System {
    /// CLI at level 0.
    Cli,
    /// STI at level 0.
    Sti,
    /// PUSHFQ.
    Pushf,
    /// POPFQ at level 0.
    Popf,
    /// SWAPGS at level 0.
    Swapgs,
    /// STAC at level 0.
    Stac,
    /// CLAC at level 0.
    Clac,
    /// RDTSC where it is allowed.
    Rdtsc,
    /// RDTSCP where it is allowed.
    Rdtscp,
    /// MOV from CR0, CR2, CR3 or CR4 at level 0: offset of the register in the VP block.
    ReadControl(u16),
    /// RDFSBASE, RDGSBASE (64 bits) where they are allowed: the segment.
    ReadBase(u8),
    /// WRFSBASE, WRGSBASE (64 bits).
    WriteBase(u8),
    /// REP STOS: log2 of the element's size.
    RepStos(u8),
    /// REP MOVS: log2 of the element's size.
    RepMovs(u8),
    /// LODS, STOS, MOVS, SCAS or CMPS of one element, in 16- and 32-bit code.
    Element,
    /// BT, BTS, BTR, BTC of memory by a register of 4 (`false`) or 8 bytes: the bit may lie anywhere.
    BitString(bool),
}

/// What translations rely on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mode {
    /// Level 0 (else 3).
    pub kernel: bool,
    /// What may not be executed twice ends a block ([`super::verify`]).
    pub verify: bool,
    /// CR4.TSD.
    tsd: bool,
    /// CR4.FSGSBASE.
    fsgsbase: bool,
}

impl Mode {
    /// That of the VP now.
    pub fn of(vp: &SoftVp) -> Self {
        let cr4 = vp.s.cr4;
        let verify = vp.s.jit.verify != 0;
        Self { kernel: vp.s.cpl == 0, verify, tsd: cr4 & cr4::TSD != 0, fsgsbase: cr4 & cr4::FSGSBASE != 0 }
    }
}

impl Mode {
    /// May the code read the time-stamp counter?
    pub fn may_read_tsc(&self) -> bool {
        self.kernel || !self.tsd
    }
}

/// The state that all translations rely on, in one word: when it changes, they are dropped.
pub fn assumed(vp: &SoftVp) -> u64 {
    const CR4: u64 = cr4::TSD | cr4::FSGSBASE | cr4::SMAP | cr4::OSXSAVE | cr4::OSFXSR;
    (vp.s.cr4 & CR4) << 8 | vp.s.efer & efer::SCE | 2
}

/// Replaces the kind of a system instruction that can be lowered in line in this mode. `facts`: of 16- or 32-bit code.
pub fn refine(i: &Instruction, kind: Kind, mode: Mode, facts: Option<&Facts>, bmi2: bool) -> Kind {
    if !matches!(kind, Kind::Interpret | Kind::Stop) {
        return kind;
    }
    let refined = match facts {
        None => refine_system(i, kind, mode, bmi2),
        Some(facts) => legacy::refine(i, kind, &mode, facts, bmi2),
    };
    match refined {
        Kind::Interpret | Kind::System(System::Rdtsc | System::Rdtscp) if mode.verify => Kind::Stop,
        kind => kind,
    }
}

fn refine_system(i: &Instruction, kind: Kind, mode: Mode, bmi2: bool) -> Kind {
    use Code::*;
    let base = |seg: usize| u8::try_from(seg).unwrap_or(0);
    if let Some(system) = string(i) {
        return Kind::System(system);
    }
    let system = match i.code() {
        Pushfq => System::Pushf,
        Rdtsc if bmi2 && mode.may_read_tsc() => System::Rdtsc,
        Rdtscp if bmi2 && mode.may_read_tsc() => System::Rdtscp,
        Rdfsbase_r64 if mode.fsgsbase => System::ReadBase(base(sreg::FS)),
        Rdgsbase_r64 if mode.fsgsbase => System::ReadBase(base(sreg::GS)),
        Wrfsbase_r64 if mode.fsgsbase => System::WriteBase(base(sreg::FS)),
        Wrgsbase_r64 if mode.fsgsbase => System::WriteBase(base(sreg::GS)),
        _ if !mode.kernel => return kind,
        Cli => System::Cli,
        Sti => System::Sti,
        Popfq => System::Popf,
        Swapgs => System::Swapgs,
        Stac => System::Stac,
        Clac => System::Clac,
        Mov_r64_cr => match i.op1_register() {
            Register::CR0 => System::ReadControl(offset_of!(VpBlock, cr0) as u16),
            Register::CR2 => System::ReadControl(offset_of!(VpBlock, cr2) as u16),
            Register::CR3 => System::ReadControl(offset_of!(VpBlock, cr3) as u16),
            Register::CR4 => System::ReadControl(offset_of!(VpBlock, cr4) as u16),
            _ => return kind,
        },
        _ => return kind,
    };
    Kind::System(system)
}

/// String and bit-string instructions that are lowered in line, at every level.
fn string(i: &Instruction) -> Option<System> {
    use Code::*;
    // With 32-bit addresses the sum would have to wrap.
    let narrow = i.memory_base().size() == 4 || i.memory_index().size() == 4;
    let absolute = i.memory_base() == Register::None && i.memory_index() == Register::None;
    let bits = |wide: bool| {
        let plain = i.op0_kind() == OpKind::Memory && !narrow && !absolute;
        plain.then_some(System::BitString(wide))
    };
    let size = match i.code() {
        Stosb_m8_AL | Movsb_m8_m8 => 0,
        Stosw_m16_AX | Movsw_m16_m16 => 1,
        Stosd_m32_EAX | Movsd_m32_m32 => 2,
        Stosq_m64_RAX | Movsq_m64_m64 => 3,
        Bt_rm32_r32 | Bts_rm32_r32 | Btr_rm32_r32 | Btc_rm32_r32 => return bits(false),
        Bt_rm64_r64 | Bts_rm64_r64 | Btr_rm64_r64 | Btc_rm64_r64 => return bits(true),
        _ => return None,
    };
    if !(i.has_rep_prefix() || i.has_repne_prefix()) || i.op0_kind() != OpKind::MemoryESRDI {
        return None;
    }
    match i.op1_kind() {
        OpKind::MemorySegRSI if !matches!(i.memory_segment(), Register::FS | Register::GS) => {
            Some(System::RepMovs(size))
        }
        OpKind::Register => Some(System::RepStos(size)),
        _ => None,
    }
}

/// Does the instruction, executed by the interpreter, read or write the vector state's image? If not, the state may stay
/// in the host's registers.
pub fn touches_vector(i: &Instruction) -> bool {
    native::unit(i).is_some() || native::handler(i).is_some() || xstate::handler(i).is_some()
}

/// Does a block end at this instruction without a need to leave translated code for it? Those that change whether the
/// vector state may be used (CR0, CR4, XCR0) are not among them, nor those whose consequences the run loop sees to.
pub fn advances(i: &Instruction) -> bool {
    use Code::*;
    match i.code() {
        Syscall | Sysretq | Iretq | Int3 | Invlpg_m | Invpcid_r64_m128 | Retfq => true,
        // Of 16- and 32-bit code.
        Sysretd | Sysenter | Sysexitd | Int_imm8 | Iretd | Iretw | Retfd | Retfw | Jmp_ptr1616 | Jmp_ptr1632
        | Call_ptr1616 | Call_ptr1632 | Jmp_m1616 | Jmp_m1632 | Call_m1616 | Call_m1632 | Invpcid_r32_m128 => true,
        Mov_cr_r64 | Mov_cr_r32 => i.op0_register() == Register::CR3,
        Mov_r64_cr | Mov_r64_dr | Mov_r32_cr | Mov_r32_dr => true,
        _ => false,
    }
}

/// Group-1 operations on a dword of the VP block: `op dword gs:[offset], imm32`.
fn alu_gs_imm(h: &mut Asm, ext: u8, offset: usize, imm: i32) {
    h.bs(&[0x65, 0x81, ext << 3 | 4, 0x25]);
    h.d(offset as u32);
    h.d(imm as u32);
}

const OR: u8 = 1;
const AND: u8 = 4;

impl Lower<'_> {
    /// Emits what destroys flags, with the flags kept if they are needed. `f` gives the slow-path jumps.
    fn clobbering(&mut self, f: impl FnOnce(&mut Asm) -> Option<u64>) {
        let keep = self.before_clobber();
        if keep {
            self.hot.store_gs(RAX, jit!(rax));
            self.hot.bs(&[0x9f, 0x0f, 0x90, 0xc0]); // lahf; seto al
        }
        let slow = f(&mut self.hot);
        if keep {
            Self::restore_flags(&mut self.hot);
        }
        self.slow.extend(slow.map(|at| (at, keep)));
    }

    /// A jump that is taken if something wants attention, or an interrupt waits for the window.
    pub(super) fn anything_waits(h: &mut Asm) -> u64 {
        const { assert!(offset_of!(VpBlock, window) == offset_of!(VpBlock, attention) + 4) };
        const { assert!(offset_of!(VpBlock, attention) % 8 == 0) };
        h.bs(&[0x65, 0x48, 0x83, 0x3c, 0x25]); // cmp qword gs:[attention], 0
        h.d(offset_of!(VpBlock, attention) as u32);
        h.b(0);
        h.jcc(cc::NE, 0)
    }

    /// Writes a scratch or held register to a guest register.
    fn set_gpr(&mut self, to: u8, from: u8) {
        match host(to) {
            Some(h) => self.hot.mov(h, from),
            None => self.hot.store_gs(from, gpr(to)),
        }
    }

    /// A system instruction in line.
    pub(super) fn system(&mut self, i: &Instruction, system: System) {
        let flags = offset_of!(VpBlock, rflags);
        let base_of = |seg: u8| {
            offset_of!(VpBlock, segments) + size_of::<Segment>() * usize::from(seg) + offset_of!(Segment, base)
        };
        match system {
            System::Cli => self.clobbering(|h| {
                alu_gs_imm(h, AND, flags, !(rflags::IF as i32));
                None
            }),
            System::Sti => self.clobbering(|h| {
                let slow = Self::anything_waits(h);
                alu_gs_imm(h, OR, flags, rflags::IF as i32);
                Some(slow)
            }),
            System::Stac | System::Clac => {
                let on = system == System::Stac;
                let tlb = offset_of!(VpBlock, tlb);
                self.clobbering(|h| {
                    if on {
                        alu_gs_imm(h, OR, flags, rflags::AC as i32);
                    } else {
                        alu_gs_imm(h, AND, flags, !(rflags::AC as i32));
                    }
                    None
                });
                // With CR4.SMAP clear both are the same set.
                let set = if on { offset_of!(TlbPointers, with_ac) } else { offset_of!(TlbPointers, system) };
                self.hot.load_gs(A, tlb + set);
                self.hot.store_gs(A, tlb + offset_of!(TlbPointers, data));
            }
            System::Swapgs => {
                let (base, other) = (base_of(sreg::GS as u8), offset_of!(VpBlock, kernel_gs_base));
                self.hot.load_gs(A, base);
                self.hot.load_gs(B, other);
                self.hot.store_gs(A, other);
                self.hot.store_gs(B, base);
            }
            System::Pushf if self.origin.facts.is_some() => self.pushf_segmented(i),
            System::Popf if self.origin.facts.is_some() => self.popf_segmented(i),
            System::Pushf => self.pushf(),
            System::Popf => self.popf(),
            System::Rdtsc | System::Rdtscp => {
                let h = &mut self.hot;
                h.bs(&[0x0f, 0x31]); // rdtsc
                h.rorx(2, 2, 32);
                h.lea(true, 0, Some(0), 2, 1, 0);
                h.load_gs(A, offset_of!(VpBlock, tsc_offset));
                h.lea(true, 0, Some(0), A, 1, 0);
                h.rorx(2, 0, 32);
                h.bs(&[0x89, 0xd2, 0x89, 0xc0]); // mov edx, edx; mov eax, eax
                if system == System::Rdtscp {
                    h.load_gs32(1, offset_of!(VpBlock, tsc_aux));
                }
            }
            System::ReadControl(offset) => {
                if self.origin.facts.is_some() {
                    self.hot.load_gs32(A, usize::from(offset));
                } else {
                    self.hot.load_gs(A, usize::from(offset));
                }
                self.set_gpr(i.op0_register().number() as u8, A);
            }
            System::ReadBase(seg) => {
                self.hot.load_gs(A, base_of(seg));
                self.set_gpr(i.op0_register().number() as u8, A);
            }
            System::WriteBase(seg) => {
                debug_assert_eq!(i.op0_kind(), OpKind::Register);
                let n = i.op0_register().number() as u8;
                match host(n) {
                    Some(h) => self.hot.mov(A, h),
                    None => self.hot.load_gs(A, gpr(n)),
                }
                self.clobbering(|h| {
                    h.mov(B, A);
                    h.bs(&[0x49, 0xc1, 0xe2, 16]); // shl r10, 16
                    h.bs(&[0x49, 0xc1, 0xfa, 16]); // sar r10, 16
                    h.bs(&[0x4d, 0x39, 0xca]); // cmp r10, r9
                    Some(h.jcc(cc::NE, 0))
                });
                self.hot.store_gs(A, base_of(seg));
            }
            System::RepStos(size) | System::RepMovs(size) => {
                self.repeated(size, matches!(system, System::RepMovs(_)));
            }
            System::Element => self.element(i),
            System::BitString(wide) => self.bit_string(i, wide),
        }
    }

    /// REP STOS and REP MOVS upwards inside a page on each side: the host's own, on host addresses.
    fn repeated(&mut self, size: u8, moves: bool) {
        const RSI: u8 = 6;
        const RDI: u8 = 7;
        let keep = self.before_clobber();
        let h = &mut self.hot;
        let mut slow = Vec::new();
        if keep {
            h.store_gs(RAX, jit!(rax));
            h.bs(&[0x9f, 0x0f, 0x90, 0xc0]); // lahf; seto al
        }
        h.bs(&[0x65, 0xf6, 0x04, 0x25]); // test byte gs:[rflags + 1], DF
        h.d(offset_of!(VpBlock, rflags) as u32 + 1);
        h.b((rflags::DF >> 8) as u8);
        slow.push(h.jcc(cc::NE, 0));
        h.alu_imm(true, 7, RCX, 4096 >> size); // cmp rcx, a page's elements
        slow.push(h.jcc(cc::A, 0));
        let sides: &[(u8, usize)] = if moves {
            &[(RSI, offset_of!(TlbEntry, tag_r)), (RDI, offset_of!(TlbEntry, tag_w))]
        } else {
            &[(RDI, offset_of!(TlbEntry, tag_w))]
        };
        for &(pointer, tag) in sides {
            h.mov(B, pointer);
            h.bs(&[0x49, 0xc1, 0xea, 7]); // shr r10, 7
            h.alu_imm(false, 4, B, ((SLOTS - 1) << 5) as i32);
            h.gs(true, 0x03, B, offset_of!(VpBlock, tlb) + offset_of!(TlbPointers, data));
            h.mov(C, pointer);
            h.op_mem(0x2b, C, B, tag as i32);
            h.alu_imm(true, 7, C, 4095);
            slow.push(h.jcc(cc::A, 0));
            h.lea(true, C, Some(C), RCX, 1 << size, 0);
            h.alu_imm(true, 7, C, 4096);
            slow.push(h.jcc(cc::A, 0));
            h.load(A, B, offset_of!(TlbEntry, addend) as i32);
            if pointer == RSI {
                h.store_gs(A, jit!(temporary));
            }
        }
        if keep {
            Self::restore_flags(h);
        }
        // From here on without touching flags. A: addend of the destination, B: of the source.
        if moves {
            h.load_gs(B, jit!(temporary));
            h.lea(true, RSI, Some(RSI), B, 1, 0);
        }
        h.lea(true, RDI, Some(RDI), A, 1, 0);
        h.b(0xf3);
        match (size, moves) {
            (0, true) => h.b(0xa4),
            (0, false) => h.b(0xaa),
            (1, true) => h.bs(&[0x66, 0xa5]),
            (1, false) => h.bs(&[0x66, 0xab]),
            (2, true) => h.b(0xa5),
            (2, false) => h.b(0xab),
            (_, true) => h.bs(&[0x48, 0xa5]),
            (_, false) => h.bs(&[0x48, 0xab]),
        }
        h.bs(&[0x49, 0xf7, 0xd1]); // not r9
        h.lea(true, RDI, Some(RDI), A, 1, 1);
        if moves {
            h.bs(&[0x49, 0xf7, 0xd2]); // not r10
            h.lea(true, RSI, Some(RSI), B, 1, 1);
        }
        if self.origin.facts.is_some() {
            // Behind the last byte of 4 GiB comes the first.
            self.hot.bs(&[0x89, 0xf6, 0x89, 0xff]); // mov esi, esi; mov edi, edi
        }
        self.slow.extend(slow.into_iter().map(|at| (at, keep)));
    }

    /// BT and its relatives on memory: finds the word that holds the bit, then does it there with the bit's number in it.
    fn bit_string(&mut self, i: &Instruction, wide: bool) {
        let writes = !matches!(i.code(), Code::Bt_rm32_r32 | Code::Bt_rm64_r64);
        let n = i.op1_register().number() as u8;
        let (size, shift) = if wide { (8, 6) } else { (4, 5) };
        self.address(i);
        match host(n) {
            Some(h) => self.hot.mov(B, h),
            None => self.hot.load_gs(B, gpr(n)),
        }
        self.clobbering(|h| {
            if !wide {
                h.bs(&[0x4d, 0x63, 0xd2]); // movsxd r10, r10d
            }
            h.bs(&[0x49, 0xc1, 0xfa, shift]); // sar r10, 6
            None
        });
        self.hot.lea(self.origin.facts.is_none(), A, Some(A), B, size, 0);
        self.check(size.into(), writes);
        match host(n) {
            Some(h) => self.hot.mov(C, h),
            None => self.hot.load_gs(C, gpr(n)),
        }
        self.clobbering(|h| {
            h.alu_imm(false, 4, C, i32::from(8 * size - 1));
            None
        });
        if i.has_lock_prefix() {
            self.hot.b(0xf0);
        }
        let op = match i.code() {
            Code::Bt_rm32_r32 | Code::Bt_rm64_r64 => 0xa3,
            Code::Bts_rm32_r32 | Code::Bts_rm64_r64 => 0xab,
            Code::Btr_rm32_r32 | Code::Btr_rm64_r64 => 0xb3,
            _ => 0xbb,
        };
        // op [r9], r11
        self.hot.bs(&[if wide { 0x4d } else { 0x45 }, 0x0f, op, 0x19]);
    }

    /// PUSHFQ. What follows may read the flags: they are in the host's register and stay there.
    fn pushf(&mut self) {
        self.push_place();
        let h = &mut self.hot;
        h.pushf();
        h.bs(&[0x41, 0x5a]); // pop r10
        let keep = self.before_clobber();
        let h = &mut self.hot;
        if keep {
            h.store_gs(RAX, jit!(rax));
            h.bs(&[0x9f, 0x0f, 0x90, 0xc0]); // lahf; seto al
        }
        h.alu_imm(false, 4, B, rflags::STATUS as i32);
        h.load_gs(C, offset_of!(VpBlock, rflags));
        h.alu_imm(true, 4, C, !((rflags::STATUS | rflags::VM | rflags::RF) as i32));
        h.bs(&[0x4d, 0x09, 0xda]); // or r10, r11
        h.store(B, A, 0);
        if keep {
            Self::restore_flags(h);
        }
        h.lea(true, SP, Some(SP), 4, 1, -8);
    }

    /// POPFQ at level 0: only the status flags and IF change, or it goes the slow way.
    fn popf(&mut self) {
        self.hot.mov(A, SP);
        self.check(8, false);
        // All flags are overwritten: nothing to keep.
        let h = &mut self.hot;
        h.load(B, A, 0);
        h.load_gs(C, offset_of!(VpBlock, rflags));
        h.mov(A, C);
        h.bs(&[0x4d, 0x31, 0xd3]); // xor r11, r10
        let other = rflags::TF | rflags::DF | rflags::NT | rflags::AC | rflags::ID | rflags::IOPL;
        h.bs(&[0x41, 0xf7, 0xc3]); // test r11d, imm32
        h.d(other as u32);
        let different = h.jcc(cc::NE, 0);
        let waits = Self::anything_waits(h);
        h.alu_imm(true, 4, A, !(rflags::IF as i32));
        h.mov(C, B);
        h.alu_imm(false, 4, C, rflags::IF as i32);
        h.bs(&[0x4d, 0x09, 0xd9]); // or r9, r11
        h.store_gs(A, offset_of!(VpBlock, rflags));
        h.lea(true, SP, Some(SP), 4, 1, 8);
        Self::flags_from_b(h);
        self.slow.push((different, false));
        self.slow.push((waits, false));
    }
}
