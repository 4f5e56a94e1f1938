//! Status flags that a check has destroyed, made again where an access fails.
//!
//! A check destroys the flags where nobody of the program reads them any more. But a fault pushes them. So the translator
//! remembers how the last flags came about as long as the registers of that instruction are what they were, and code off
//! the hot path repeats it: a comparison as it was, a logical operation as a test of its result, an addition or subtraction
//! after it was undone.

use super::classify::{self, Kind};
use super::emit::{A, Asm, B};
use super::flags;
use super::lower::{gpr, host, number};
use super::plan;
use iced_x86::{Instruction, Mnemonic, OpKind};

/// The second operand.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Other {
    Register(u8),
    Value(u64),
}

/// What is repeated.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Operation {
    Cmp,
    Test,
    Add,
    Sub,
}

/// How the present flags came about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Recall {
    operation: Operation,
    /// Bytes of the operands.
    size: usize,
    /// Guest register: the first operand of a comparison, the result of an addition or subtraction.
    register: u8,
    other: Other,
}

impl Recall {
    /// What is known behind an instruction of 64-bit code, given what was known before it.
    pub fn after(before: Option<Self>, i: &Instruction, kind: Kind) -> Option<Self> {
        let changed = match kind {
            Kind::Nop | Kind::Jcc => 0,
            Kind::Plain | Kind::Vector(_) | Kind::Lea => plan::written(i),
            Kind::Push => 1 << 4,
            Kind::Pop => 1 << 4 | 1 << number(i.op0_register()),
            Kind::Leave => 1 << 4 | 1 << 5,
            // The block ends, or somebody else executes it.
            _ => return None,
        };
        let effect = flags::effect(i, kind);
        if effect.writes != 0 {
            return Self::of(i).filter(|_| effect.kills == flags::ALL);
        }
        before.filter(|r| {
            let other = if let Other::Register(r) = r.other { 1 << r } else { 0 };
            changed & (1 << r.register | other) == 0
        })
    }

    /// The flags of an instruction whose result has been stored.
    fn of(i: &Instruction) -> Option<Self> {
        use Mnemonic as M;
        let register = (i.op0_kind() == OpKind::Register).then(|| i.op0_register())?;
        if !register.is_gpr() || classify::is_high8(register) || i.op_count() != 2 {
            return None;
        }
        let result = number(register);
        let other = match i.op1_kind() {
            OpKind::Register if i.op1_register().is_gpr() && !classify::is_high8(i.op1_register()) => {
                Some(Other::Register(number(i.op1_register())))
            }
            OpKind::Register | OpKind::Memory => None,
            _ => Some(Other::Value(i.immediate(1))),
        };
        // An addition to itself cannot be undone by its result.
        let another = other.filter(|o| *o != Other::Register(result));
        let (operation, other) = match i.mnemonic() {
            M::Cmp => (Operation::Cmp, other?),
            M::Test => (Operation::Test, other?),
            M::And | M::Or | M::Xor => (Operation::Test, Other::Register(result)),
            M::Add => (Operation::Add, another?),
            // From itself: zero from zero.
            M::Sub if other.is_some() && another.is_none() => (Operation::Cmp, other?),
            M::Sub => (Operation::Sub, another?),
            _ => return None,
        };
        Some(Self { operation, size: register.size(), register: result, other })
    }

    /// Emits the repetition. Destroys A and B.
    pub fn emit(&self, c: &mut Asm) {
        let load = |c: &mut Asm, to, guest| match host(guest) {
            Some(from) => c.mov(to, from),
            None => c.load_gs(to, gpr(guest)),
        };
        load(c, A, self.register);
        match self.other {
            Other::Register(r) => load(c, B, r),
            Other::Value(value) => {
                c.mov_imm(B, value);
            }
        }
        // opcode A, B
        let mut operate = |opcode: u8| {
            if self.size == 2 {
                c.b(0x66);
            }
            let rex = 0x45 | u8::from(self.size == 8) << 3;
            c.bs(&[rex, opcode | u8::from(self.size != 1), 0xc0 | (B & 7) << 3 | A & 7]);
        };
        let (add, sub) = (0x00, 0x28);
        match self.operation {
            Operation::Cmp => operate(0x38),
            Operation::Test => operate(0x84),
            Operation::Add => {
                operate(sub);
                operate(add);
            }
            Operation::Sub => {
                operate(add);
                operate(sub);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::features::Features;
    use iced_x86::{Decoder, DecoderOptions};
    use x86::cpuid::CpuModel;

    fn recall(code: &[u8]) -> Option<Recall> {
        let features = Features::from_table(&CpuModel::by_name("x86-64-v3").unwrap().table(0, 1, 1_000_000_000));
        let decoder = Decoder::with_ip(64, code, 0, DecoderOptions::NONE);
        decoder.into_iter().fold(None, |before, i| Recall::after(before, &i, classify::kind(&i, &features)))
    }

    #[test]
    fn what_is_remembered() {
        let cmp = Recall { operation: Operation::Cmp, size: 8, register: 3, other: Other::Register(1) };
        // cmp rbx,rcx; mov rax,[rcx]; push rax
        assert_eq!(recall(&[0x48, 0x39, 0xcb, 0x48, 0x8b, 1, 0x50]), Some(cmp));
        // cmp rbx,rcx; mov ecx,[rcx]
        assert_eq!(recall(&[0x48, 0x39, 0xcb, 0x8b, 9]), None);
        // sub rsp,0x10; and then: push rax
        let sub = Recall { operation: Operation::Sub, size: 8, register: 4, other: Other::Value(0x10) };
        assert_eq!(recall(&[0x48, 0x83, 0xec, 0x10]), Some(sub));
        assert_eq!(recall(&[0x48, 0x83, 0xec, 0x10, 0x50]), None);
        // xor eax,[rcx]: its result says all
        let test = Recall { operation: Operation::Test, size: 4, register: 0, other: Other::Register(0) };
        assert_eq!(recall(&[0x33, 1]), Some(test));
        // add eax,eax; cmp ah,bl; inc eax behind a comparison (CF is the comparison's); shl ebx,cl; cmp [rbx],eax
        assert_eq!(recall(&[0x01, 0xc0]), None);
        assert_eq!(recall(&[0x38, 0xdc]), None);
        assert_eq!(recall(&[0x39, 0xcb, 0xff, 0xc0]), None);
        assert_eq!(recall(&[0x39, 0xcb, 0xd3, 0xe3]), None);
        assert_eq!(recall(&[0x39, 3]), None);
        // cmp ebx,ecx; cpuid: the interpreter's
        assert_eq!(recall(&[0x39, 0xcb, 0x0f, 0xa2]), None);
    }
}
