//! Addresses of vector memory operands.

use crate::interp::Insn;
use crate::segmentation::Want;
use crate::vp::{Exec, SoftVp};
use iced_x86::Register;

/// Segment register number and offset of the instruction's memory operand.
pub fn effective_address(vp: &SoftVp, insn: &Insn) -> (usize, u64) {
    let i = &insn.iced;
    let (base, index) = (i.memory_base(), i.memory_index());
    let mut offset = i.memory_displacement64();
    let mut bytes = i.memory_displ_size();
    for (register, scale) in [(index, i.memory_index_scale()), (base, 1)] {
        match register {
            Register::None => {}
            // The decoder's IP is 0: its displacement is relative to the start of the instruction.
            Register::RIP | Register::EIP => {
                offset = offset.wrapping_add(vp.s.rip);
                bytes = register.size() as u32;
            }
            _ => {
                let value = vp.s.gprs[register.number()];
                offset = offset.wrapping_add(value.wrapping_mul(u64::from(scale)));
                bytes = register.size() as u32;
            }
        }
    }
    let offset = match bytes {
        2 => offset & 0xffff,
        4 => offset & 0xffff_ffff,
        _ => offset,
    };
    (i.memory_segment().number(), offset)
}

/// Linear address of the memory operand, after the segment's checks for `size` bytes.
pub fn linear(vp: &mut SoftVp, insn: &Insn, size: usize, want: Want) -> Exec<u64> {
    let (segment, offset) = effective_address(vp, insn);
    vp.seg_linear(segment, offset, size, want)
}
