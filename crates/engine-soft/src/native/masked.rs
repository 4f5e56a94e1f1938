//! Masked moves and gathers: element by element, because a masked-out element must not be touched and a gather that
//! faults keeps what it has done.

use super::{Unit, check_available, operand, unit};
use crate::interp::{Handler, Insn};
use crate::segmentation::Want;
use crate::vp::{CodeSize, Exec, Fault, SoftVp};
use crate::xstate;
use iced_x86::{Mnemonic, OpKind, Register};
use x86::paging::is_canonical;

/// What executes this instruction, if it belongs here.
pub fn handler(i: &iced_x86::Instruction) -> Option<Handler> {
    use Mnemonic as M;
    unit(i)?;
    Some(match i.mnemonic() {
        M::Vzeroupper | M::Vzeroall => zero_vectors,
        M::Maskmovq | M::Maskmovdqu | M::Vmaskmovdqu => byte_mask_store,
        M::Vmaskmovps | M::Vpmaskmovd => |vp, i| masked_move(vp, i, 4),
        M::Vmaskmovpd | M::Vpmaskmovq => |vp, i| masked_move(vp, i, 8),
        M::Vgatherdps | M::Vpgatherdd => |vp, i| gather(vp, i, 4, 4),
        M::Vgatherqps | M::Vpgatherqd => |vp, i| gather(vp, i, 8, 4),
        M::Vgatherdpd | M::Vpgatherdq => |vp, i| gather(vp, i, 4, 8),
        M::Vgatherqpd | M::Vpgatherqq => |vp, i| gather(vp, i, 8, 8),
        _ => return None,
    })
}

/// VZEROUPPER, VZEROALL: of the registers that the mode has.
fn zero_vectors(vp: &mut SoftVp, insn: &Insn) -> Exec {
    check_available(vp, Unit::Avx)?;
    let count = if vp.s.code_size == CodeSize::Bits64 { 16 } else { 8 };
    for n in 0..count {
        let mut v = xstate::ymm(&vp.s.xsave, n);
        v[if insn.iced.mnemonic() == Mnemonic::Vzeroall { 0 } else { 16 }..].fill(0);
        xstate::set_ymm(&mut vp.s.xsave, n, &v);
    }
    Ok(())
}

/// Number of an XMM or YMM register.
fn number(r: Register) -> usize {
    r.number()
}

/// MASKMOVQ, MASKMOVDQU, VMASKMOVDQU: bytes at seg:rDI.
fn byte_mask_store(vp: &mut SoftVp, insn: &Insn) -> Exec {
    let i = &insn.iced;
    let unit = unit(i).ok_or(Fault::UD)?;
    check_available(vp, unit)?;
    let (size, data, mask) = if unit == Unit::Mmx {
        if xstate::get_u16(&vp.s.xsave, x86::xsave::legacy::FSW) & 0x80 != 0 {
            return Err(Fault::Exception { vector: x86::exception::MF, error: 0 });
        }
        let register = |r: Register| {
            // Kept by their position relative to TOP.
            let top = usize::from(xstate::get_u16(&vp.s.xsave, x86::xsave::legacy::FSW) >> 11 & 7);
            let at = x86::xsave::legacy::ST0 + 16 * ((r.number() + 8 - top) & 7);
            let mut bytes = [0; 32];
            bytes[..8].copy_from_slice(&vp.s.xsave.0[at..at + 8]);
            bytes
        };
        (8, register(i.op1_register()), register(i.op2_register()))
    } else {
        (16, xstate::ymm(&vp.s.xsave, number(i.op1_register())), xstate::ymm(&vp.s.xsave, number(i.op2_register())))
    };
    let rdi = vp.s.gprs[x86::regs::gpr::RDI];
    let offset = match i.op0_kind() {
        OpKind::MemorySegDI => rdi & 0xffff,
        OpKind::MemorySegEDI => rdi & 0xffff_ffff,
        _ => rdi,
    };
    let address = vp.seg_linear(i.memory_segment().number(), offset, size, Want::Write)?;
    let selected: Vec<usize> = (0..size).filter(|n| mask[*n] & 0x80 != 0).collect();
    if unit == Unit::Mmx {
        // Even if the store faults.
        xstate::enter_mmx(&mut vp.s.xsave);
    }
    // The whole operand must be writable, whatever the mask says (measured on AMD; the SDM leaves it open).
    vp.probe_write(address, size)?;
    for n in &selected {
        vp.write_u8(element(vp, address, *n as u64)?, data[*n])?;
    }
    Ok(())
}

/// Linear address of a part of an operand.
fn element(vp: &SoftVp, base: u64, offset: u64) -> Exec<u64> {
    let address = base.wrapping_add(offset);
    if vp.s.code_size == CodeSize::Bits64 {
        return if is_canonical(address) { Ok(address) } else { Err(Fault::GP0) };
    }
    Ok(address & 0xffff_ffff)
}

/// VMASKMOVPS/PD, VPMASKMOVD/Q.
fn masked_move(vp: &mut SoftVp, insn: &Insn, size: usize) -> Exec {
    let i = &insn.iced;
    check_available(vp, Unit::Avx)?;
    let store = i.op0_kind() == OpKind::Memory;
    let mask_register = i.op1_register();
    let register = if store { i.op2_register() } else { i.op0_register() };
    let count = register.size() / size;
    let mask = xstate::ymm(&vp.s.xsave, number(mask_register));
    let selected: Vec<usize> = (0..count).filter(|n| mask[n * size + size - 1] & 0x80 != 0).collect();
    let want = if store { Want::Write } else { Want::Read };
    // Segment limit and canonical form count for each selected element alone; with none selected nothing is looked at.
    let (segment, offset) = operand::effective_address(vp, insn);
    let at = |vp: &mut SoftVp, n: usize| vp.seg_linear(segment, offset.wrapping_add((n * size) as u64), size, want);
    if store {
        let data = xstate::ymm(&vp.s.xsave, number(register));
        for n in &selected {
            let address = at(vp, *n)?;
            vp.probe_write(address, size)?;
        }
        for n in &selected {
            let address = at(vp, *n)?;
            vp.write_bytes(address, &data[n * size..][..size])?;
        }
    } else {
        let mut data = [0; 32];
        for n in &selected {
            let address = at(vp, *n)?;
            vp.read_bytes(address, &mut data[n * size..][..size])?;
        }
        xstate::set_ymm(&mut vp.s.xsave, number(register), &data);
    }
    Ok(())
}

/// The gathers. Elements are read in order; a fault leaves the finished ones in place with their masks cleared (SDM
/// volume 2, VPGATHERDD).
fn gather(vp: &mut SoftVp, insn: &Insn, index_size: usize, size: usize) -> Exec {
    let i = &insn.iced;
    check_available(vp, Unit::Avx)?;
    let (to, index, mask) = (number(i.op0_register()), i.memory_index(), number(i.op2_register()));
    if to == mask || to == number(index) || mask == number(index) {
        return Err(Fault::UD);
    }
    let count = (i.op0_register().size() / size).min(index.size() / index_size);
    let indices = xstate::ymm(&vp.s.xsave, number(index));
    let mut masks = xstate::ymm(&vp.s.xsave, mask);
    let mut data = xstate::ymm(&vp.s.xsave, to);
    let base = i.memory_base();
    let wide = if base == Register::None { i.memory_displ_size() == 8 } else { base.size() == 8 };
    let base = if base == Register::None { 0 } else { vp.s.gprs[base.number()] };
    let segment = i.memory_segment().number();
    for n in 0..count {
        if masks[n * size + size - 1] & 0x80 != 0 {
            let raw = &indices[n * index_size..][..index_size];
            let index = match index_size {
                4 => i64::from(i32::from_le_bytes([raw[0], raw[1], raw[2], raw[3]])),
                _ => i64::from_le_bytes([raw[0], raw[1], raw[2], raw[3], raw[4], raw[5], raw[6], raw[7]]),
            };
            let scaled = (index as u64).wrapping_mul(u64::from(i.memory_index_scale()));
            let mut offset = base.wrapping_add(scaled).wrapping_add(i.memory_displacement64());
            if !wide {
                offset &= 0xffff_ffff;
            }
            let one = (|| {
                let at = vp.seg_linear(segment, offset, size, Want::Read)?;
                vp.read_bytes(at, &mut data[n * size..][..size])
            })();
            if let Err(fault) = one {
                xstate::set_ymm(&mut vp.s.xsave, to, &data);
                xstate::set_ymm(&mut vp.s.xsave, mask, &masks);
                return Err(fault);
            }
        }
        masks[n * size..][..size].fill(0);
    }
    data[count * size..].fill(0);
    xstate::set_ymm(&mut vp.s.xsave, to, &data);
    xstate::set_ymm(&mut vp.s.xsave, mask, &[0; 32]);
    Ok(())
}
