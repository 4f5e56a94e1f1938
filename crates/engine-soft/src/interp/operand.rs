//! Operands of instructions that are executed by [`super::Handler`]s: general, sized at run time.

use super::Insn;
use super::op::{get_sized, mask, read_linear, register_offset, set_sized, sreg_number, write_linear};
use crate::segmentation::Want;
use crate::vp::{CodeSize, Exec, Fault, SoftVp};
use iced_x86::{OpKind, Register};

impl SoftVp {
    /// Segment register number and offset of the explicit memory operand, truncated to the address size.
    pub fn effective_address(&self, insn: &Insn) -> (usize, u64) {
        let i = &insn.iced;
        let seg = sreg_number(i.memory_segment());
        let part = |r: Register| match r {
            // The displacement is relative to the start of the instruction: it was decoded at IP 0.
            Register::RIP | Register::EIP => self.s.rip,
            r => register_offset(r).map_or(0, |at| get_sized(self, at, r.size() as u8)),
        };
        let offset = part(i.memory_base())
            .wrapping_add(part(i.memory_index()).wrapping_mul(i.memory_index_scale().into()))
            .wrapping_add(i.memory_displacement64());
        (seg, offset & mask(super::op::address_size(i, self.s.code_size)))
    }

    /// The checked linear address of memory operand `n`, whatever kind of memory operand it is.
    pub fn linear_operand(&mut self, insn: &Insn, n: u32, size: usize, want: Want) -> Exec<u64> {
        let (seg, offset) = match implicit(&insn.iced, n) {
            Some((seg, register, addr)) => (seg, self.s.gprs[register] & mask(addr)),
            None => self.effective_address(insn),
        };
        self.seg_linear(seg, offset, size, want)
    }

    /// Size in bytes of operand `n` (register, memory or immediate).
    pub fn operand_size(&self, insn: &Insn, n: u32) -> usize {
        match insn.iced.op_kind(n) {
            OpKind::Register => insn.iced.op_register(n).size(),
            OpKind::Immediate8 => 1,
            OpKind::Immediate16 | OpKind::Immediate8to16 => 2,
            OpKind::Immediate32 | OpKind::Immediate8to32 => 4,
            OpKind::Immediate64 | OpKind::Immediate8to64 | OpKind::Immediate32to64 => 8,
            _ => insn.iced.memory_size().size(),
        }
    }

    /// Reads operand `n` (general-purpose or segment register, memory of up to 8 bytes, immediate), zero-extended.
    pub fn operand_read(&mut self, insn: &Insn, n: u32) -> Exec<u64> {
        let i = &insn.iced;
        match i.op_kind(n) {
            OpKind::Register => {
                let r = i.op_register(n);
                if r.is_segment_register() {
                    return Ok(self.s.segments[sreg_number(r)].selector.into());
                }
                let at = register_offset(r).ok_or(Fault::UD)?;
                Ok(get_sized(self, at, r.size() as u8))
            }
            _ => match i.try_immediate(n) {
                Ok(v) => Ok(v & mask(self.operand_size(insn, n) as u8)),
                Err(_) => {
                    let size = self.operand_size(insn, n);
                    let la = self.linear_operand(insn, n, size, Want::Read)?;
                    read_linear(self, la, size)
                }
            },
        }
    }

    /// Writes operand `n` (general-purpose register, memory of up to 8 bytes); 32-bit registers are zero-extended.
    pub fn operand_write(&mut self, insn: &Insn, n: u32, value: u64) -> Exec {
        let i = &insn.iced;
        if i.op_kind(n) == OpKind::Register {
            let r = i.op_register(n);
            let at = register_offset(r).ok_or(Fault::UD)?;
            set_sized(self, at, r.size() as u8, value);
            return Ok(());
        }
        let size = self.operand_size(insn, n);
        let la = self.linear_operand(insn, n, size, Want::Write)?;
        write_linear(self, la, size, value)
    }

    /// Is the VP executing 64-bit code?
    pub fn is_64bit_code(&self) -> bool {
        self.s.code_size == CodeSize::Bits64
    }
}

/// Segment, register and address size of an operand addressed by RSI or RDI.
fn implicit(i: &iced_x86::Instruction, n: u32) -> Option<(usize, usize, u8)> {
    use x86::regs::gpr::{RDI, RSI};
    use x86::segment::sreg::ES;
    let seg = sreg_number(i.memory_segment());
    Some(match i.op_kind(n) {
        OpKind::MemorySegSI => (seg, RSI, 2),
        OpKind::MemorySegESI => (seg, RSI, 4),
        OpKind::MemorySegRSI => (seg, RSI, 8),
        OpKind::MemorySegDI => (seg, RDI, 2),
        OpKind::MemorySegEDI => (seg, RDI, 4),
        OpKind::MemorySegRDI => (seg, RDI, 8),
        OpKind::MemoryESDI => (ES, RDI, 2),
        OpKind::MemoryESEDI => (ES, RDI, 4),
        OpKind::MemoryESRDI => (ES, RDI, 8),
        _ => return None,
    })
}
