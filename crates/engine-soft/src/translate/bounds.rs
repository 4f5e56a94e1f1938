//! Upper bounds of registers, as far as the instructions of a block show them: `and eax, 15`, `movzx eax, byte [..]`.
//!
//! An access whose index is so bounded (a ring of sixteen words on the stack, a table of digits) reaches a known range behind its
//! base, so that it can share the check of the base's other accesses: see [`super::plan`].

use super::classify::Kind;
use super::plan::{self, Access, Base, number};
use iced_x86::{Instruction, Mnemonic, OpKind, Register};

/// Highest value that each general register can have (all 64 bits of it).
#[derive(Clone, Copy, Default)]
pub(super) struct Bounds([Option<u32>; 16]);

impl Bounds {
    /// Nothing is known any more.
    pub(super) fn forget(&mut self) {
        *self = Self::default();
    }

    fn of(&self, r: Register) -> Option<u32> {
        matches!(r.size(), 4 | 8).then(|| self.0[usize::from(number(r))]).flatten()
    }

    /// Behind an instruction of 64-bit code that is no barrier.
    pub(super) fn step(&mut self, i: &Instruction, kind: Kind) {
        match kind {
            Kind::Plain | Kind::Vector(_) | Kind::Lea => {}
            Kind::Pop => return self.0[usize::from(number(i.op0_register()))] = None,
            Kind::Leave => return self.0[5] = None,
            // Nothing else writes a register but RSP, which has no bound.
            _ => return,
        }
        let bound = self.result(i);
        let written = plan::written(i);
        for (r, b) in self.0.iter_mut().enumerate() {
            if written & 1 << r != 0 {
                *b = None;
            }
        }
        if bound.is_some() {
            self.0[usize::from(number(i.op0_register()))] = bound;
        }
    }

    /// Of the first operand after the instruction.
    fn result(&self, i: &Instruction) -> Option<u32> {
        let to = i.op0_register();
        // (What is written with 32 bits has zeros above; with 8 or 16 bits it keeps what was there.)
        if i.op0_kind() != OpKind::Register
            || !to.is_gpr()
            || !matches!(to.size(), 4 | 8)
            || to.full_register() == Register::RSP
        {
            return None;
        }
        let wide = to.size() == 8;
        let before = self.of(to);
        let source = match i.op1_kind() {
            OpKind::Register => self.of(i.op1_register()),
            OpKind::Immediate8to32 | OpKind::Immediate8to64 | OpKind::Immediate32 | OpKind::Immediate32to64 => {
                let value = i.immediate(1);
                if wide { u32::try_from(value).ok() } else { Some(value as u32) }
            }
            _ => None,
        };
        match i.mnemonic() {
            Mnemonic::And => before.into_iter().chain(source).min(),
            Mnemonic::Mov if i.op1_kind() == OpKind::Register && i.op1_register().size() == to.size() => source,
            Mnemonic::Movzx if source_size(i) == 1 => Some(0xff),
            Mnemonic::Shr if i.op1_kind() == OpKind::Immediate8 => {
                let count = i.immediate8() & if wide { 63 } else { 31 };
                let most = if wide { u64::from(before?) } else { u64::from(before.unwrap_or(u32::MAX)) };
                u32::try_from(most >> count).ok()
            }
            _ => None,
        }
    }

    /// Makes an access with a bounded index one of everything that it may reach from its base, if that is at most `reach` bytes.
    pub(super) fn widen(&self, access: &mut Access, reach: i64) {
        let e = access.expression;
        let (Base::Register(base), Some((index, scale)), false) = (e.base, e.index, e.narrow) else { return };
        let (base, most) = match (self.0[usize::from(index)], self.0[usize::from(base)]) {
            (Some(most), _) => (base, i64::from(most) * i64::from(scale)),
            (None, Some(most)) if scale == 1 => (index, i64::from(most)),
            _ => return,
        };
        if most + i64::from(access.size) > reach {
            return;
        }
        access.operand = Some(e);
        access.expression.base = Base::Register(base);
        access.expression.index = None;
        access.size += most as u32;
    }
}

/// Bytes of the second operand.
fn source_size(i: &Instruction) -> usize {
    match i.op1_kind() {
        OpKind::Register => i.op1_register().size(),
        _ => i.memory_size().size(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::classify;
    use super::super::plan::{MAX_INSTRUCTIONS, Origin, Plan, Shape};
    use crate::features::Features;
    use iced_x86::code_asm::*;
    use x86::cpuid::CpuModel;

    fn plan(shape: Shape, emit: impl FnOnce(&mut CodeAssembler)) -> Plan {
        let features = Features::from_table(&CpuModel::by_name("x86-64-v3").unwrap().table(0, 1, 1_000_000_000));
        let mut a = CodeAssembler::new(64).unwrap();
        emit(&mut a);
        let code = a.assemble(0x7000).unwrap();
        let mut page = [0xf4u8; 4096];
        page[..code.len()].copy_from_slice(&code);
        Plan::new(&Origin::long(0x7000), &page, shape, false, |i| classify::kind(i, &features)).unwrap()
    }

    #[test]
    fn a_bounded_index_shares_the_check_of_its_base() {
        type Emit = fn(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>;
        // What bounds RDX, and the highest value that it can have then.
        let bounds: [(Emit, i64); 7] = [
            (|a| a.and(edx, 15), 15),
            (|a| a.and(rdx, 15), 15),
            (|a| a.shr(edx, 28u32), 15),
            (|a| a.and(ecx, 7).and_then(|()| a.mov(edx, ecx)), 7),
            (|a| a.and(ecx, 7).and_then(|()| a.and(rdx, rcx)), 7),
            (|a| a.movzx(edx, cl).and_then(|()| a.shr(rdx, 4u32)), 15),
            (|a| a.and(edx, 15).and_then(|()| a.and(edx, 0x7fff_ffff)), 15),
        ];
        for (n, (bound, most)) in bounds.into_iter().enumerate() {
            for shape in [Shape::Grouped, Shape::Single] {
                let p = plan(shape, |a| {
                    bound(a).unwrap();
                    a.mov(eax, dword_ptr(rsp + rdx * 4 + 0x40)).unwrap();
                    a.mov(ecx, dword_ptr(rsp + 4)).unwrap();
                    a.add(byte_ptr(rsp + rdx + 0x10), 1).unwrap();
                });
                if shape == Shape::Single {
                    assert_eq!(p.groups.len(), 3, "each access is checked as it is");
                    assert!(p.groups.iter().all(|g| g.is_single() && g.span <= 4));
                    continue;
                }
                assert_eq!(p.groups.len(), 1, "{n}");
                let g = p.groups[0];
                assert_eq!((g.low, g.span, g.write, g.accesses), (4, 0x40 + 4 * most + 4 - 4, true, 3), "{n}");
            }
        }
    }

    #[test]
    fn what_shows_no_bound_is_checked_as_it_is() {
        type Emit = fn(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>;
        let unbounded: [Emit; 10] = [
            |a| a.and(dl, 15),
            |a| a.and(dx, 15),
            |a| a.and(rdx, -16),
            |a| a.and(edx, -16),
            |a| a.and(edx, 15).and_then(|()| a.mov(dl, 0x80)),
            |a| a.and(edx, 15).and_then(|()| a.add(edx, 1)),
            |a| a.and(edx, 15).and_then(|()| a.pop(rdx)).and_then(|()| a.push(rdx)),
            |a| a.and(edx, 15).and_then(|()| a.xchg(rdx, rcx)),
            |a| a.and(edx, 15).and_then(|()| a.cpuid()),
            |a| a.and(edx, 255), // too far
        ];
        for (n, emit) in unbounded.into_iter().enumerate() {
            let p = plan(Shape::Grouped, |a| {
                emit(a).unwrap();
                a.mov(eax, dword_ptr(rsi + rdx * 4 + 0x40)).unwrap();
                a.mov(ecx, dword_ptr(rsi + 4)).unwrap();
            });
            assert!(p.groups.iter().all(|g| !g.ranges), "{n}");
        }
        // A lone range is not left to the interpreter: that would work on a copy of all of it.
        let p = plan(Shape::Grouped, |a| {
            a.and(edx, 15).unwrap();
            a.mov(dword_ptr(rsi + rdx * 4), eax).unwrap();
        });
        assert!(p.groups.len() == 1 && p.groups[0].ranges && !p.groups[0].is_single());
    }

    #[test]
    fn a_loop_stays_in_one_piece() {
        let rounds = |adds: usize, jumps: bool| {
            plan(Shape::Grouped, |a| {
                let mut again = a.create_label();
                a.set_label(&mut again).unwrap();
                a.nop().unwrap();
                (0..adds).for_each(|n| a.add(dword_ptr(rsp + (n % 8 * 4) as i32), eax).unwrap());
                a.dec(ecx).unwrap();
                if jumps {
                    a.jnz(again).unwrap();
                }
                (0..100).for_each(|_| a.vpxor(xmm0, xmm0, xmm0).unwrap());
            })
        };
        let p = rounds(70, true);
        assert_eq!((p.steps.len(), p.groups.len(), p.vector), (73, 1, 0));
        assert!(p.groups[0].invariant, "one check before the loop");
        for (adds, jumps) in [(100, true), (70, false)] {
            let p = rounds(adds, jumps);
            assert_eq!((p.steps.len(), p.vector, p.ended), (MAX_INSTRUCTIONS, 0, false));
        }
        assert_eq!(rounds(40, true).steps.len(), 43);
    }
}
