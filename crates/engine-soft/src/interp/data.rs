//! Moves, extensions, addresses, conditional moves and sets, the stack.

use super::op::*;
use crate::vp::{Exec, Fault, SoftVp};
use x86::regs::{gpr, rflags};

/// `mov r, r`
pub fn mov_rr<T: Int>(vp: &mut SoftVp, op: &Op) -> Exec {
    let v = get::<T>(vp, op.b);
    set(vp, op.a, v);
    Ok(())
}
/// `mov r, imm`
pub fn mov_ri<T: Int>(vp: &mut SoftVp, op: &Op) -> Exec {
    set(vp, op.a, T::from_u64(op.imm));
    Ok(())
}
/// `mov r, m`
pub fn mov_rm<T: Int>(vp: &mut SoftVp, op: &Op) -> Exec {
    let v = load::<T>(vp, op)?;
    set(vp, op.a, v);
    Ok(())
}
/// `mov m, r`
pub fn mov_mr<T: Int>(vp: &mut SoftVp, op: &Op) -> Exec {
    let v = get::<T>(vp, op.a);
    store(vp, op, v)
}
/// `mov m, imm`
pub fn mov_mi<T: Int>(vp: &mut SoftVp, op: &Op) -> Exec {
    store(vp, op, T::from_u64(op.imm))
}
/// MOV between the accumulator and an absolute address of up to 64 bits, which is in `imm`.
pub fn mov_absolute<T: Int, const STORE: bool>(vp: &mut SoftVp, op: &Op) -> Exec {
    let want = if STORE { crate::segmentation::Want::Write } else { crate::segmentation::Want::Read };
    let la = vp.seg_linear((op.mem & 7).into(), op.imm & mask(op.addr), T::BYTES, want)?;
    if STORE {
        let v = get::<T>(vp, op.a).to_u64();
        write_linear(vp, la, T::BYTES, v)
    } else {
        let v = read_linear(vp, la, T::BYTES)?;
        set(vp, op.a, T::from_u64(v));
        Ok(())
    }
}

/// MOVZX.
pub fn movzx<D: Int, S: Int, const MEM: bool>(vp: &mut SoftVp, op: &Op) -> Exec {
    let v = if MEM { load::<S>(vp, op)? } else { get::<S>(vp, op.b) };
    set(vp, op.a, D::from_u64(v.to_u64()));
    Ok(())
}
/// MOVSX and MOVSXD.
pub fn movsx<D: Int, S: Int, const MEM: bool>(vp: &mut SoftVp, op: &Op) -> Exec {
    let v = if MEM { load::<S>(vp, op)? } else { get::<S>(vp, op.b) };
    set(vp, op.a, D::from_u64(v.sext()));
    Ok(())
}
/// LEA.
pub fn lea<T: Int>(vp: &mut SoftVp, op: &Op) -> Exec {
    let v = offset(vp, op) & mask(op.addr);
    set(vp, op.a, T::from_u64(v));
    Ok(())
}

/// Does condition `CC` (as in the low four bits of Jcc's opcode) hold?
#[inline(always)]
pub fn condition<const CC: u8>(vp: &SoftVp) -> bool {
    let f = vp.s.rflags;
    let any = |bits: u64| f & bits != 0;
    let less = (f >> 7 ^ f >> 11) & 1 != 0;
    let holds = match CC >> 1 {
        0 => any(rflags::OF),
        1 => any(rflags::CF),
        2 => any(rflags::ZF),
        3 => any(rflags::CF | rflags::ZF),
        4 => any(rflags::SF),
        5 => any(rflags::PF),
        6 => less,
        _ => less || any(rflags::ZF),
    };
    holds != (CC & 1 != 0)
}

/// CMOVcc.
pub fn cmov<T: Int, const CC: u8, const MEM: bool>(vp: &mut SoftVp, op: &Op) -> Exec {
    // The source is read and a 32-bit destination is cleared above whether the condition holds or not.
    let source = if MEM { load::<T>(vp, op)? } else { get::<T>(vp, op.b) };
    let v = if condition::<CC>(vp) { source } else { get::<T>(vp, op.a) };
    set(vp, op.a, v);
    Ok(())
}
/// SETcc.
pub fn setcc<const CC: u8, const MEM: bool>(vp: &mut SoftVp, op: &Op) -> Exec {
    let v = u8::from(condition::<CC>(vp));
    if MEM {
        store(vp, op, v)
    } else {
        set(vp, op.a, v);
        Ok(())
    }
}

/// PAUSE.
pub fn pause(vp: &mut SoftVp, _: &Op) -> Exec {
    vp.spin_hint();
    Ok(())
}

/// Nothing (NOP, PREFETCH*, ENDBR, hints).
pub fn nop(_: &mut SoftVp, _: &Op) -> Exec {
    Ok(())
}

/// LFENCE, MFENCE, SFENCE.
pub fn fence(_: &mut SoftVp, _: &Op) -> Exec {
    std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    Ok(())
}

/// CBW, CWDE, CDQE: `op.size` is the destination's.
pub fn cbw(vp: &mut SoftVp, op: &Op) -> Exec {
    let a = vp.s.gprs[gpr::RAX];
    match op.size {
        2 => set::<u16>(vp, 0, (a as u8).sext() as u16),
        4 => set::<u32>(vp, 0, (a as u16).sext() as u32),
        _ => set::<u64>(vp, 0, (a as u32).sext()),
    }
    Ok(())
}
/// CWD, CDQ, CQO: `op.size` is the source's.
pub fn cwd(vp: &mut SoftVp, op: &Op) -> Exec {
    let a = get_sized(vp, 0, op.size);
    let negative = a >> (op.size * 8 - 1) & 1 != 0;
    set_sized(vp, gpr::RDX as u8 * 8, op.size, if negative { u64::MAX } else { 0 });
    Ok(())
}

/// BSWAP; with a 16-bit operand (undefined) the processors known give zero.
pub fn bswap(vp: &mut SoftVp, op: &Op) -> Exec {
    match op.size {
        2 => set::<u16>(vp, op.a, 0),
        4 => {
            let v = get::<u32>(vp, op.a).swap_bytes();
            set(vp, op.a, v);
        }
        _ => {
            let v = get::<u64>(vp, op.a).swap_bytes();
            set(vp, op.a, v);
        }
    }
    Ok(())
}

/// MOVBE.
pub fn movbe<T: Int, const STORE: bool>(vp: &mut SoftVp, op: &Op) -> Exec {
    let swap = |v: T| T::from_u64(v.to_u64().swap_bytes() >> (64 - T::BYTES * 8));
    if STORE {
        let v = swap(get::<T>(vp, op.a));
        store(vp, op, v)
    } else {
        let v = swap(load::<T>(vp, op)?);
        set(vp, op.a, v);
        Ok(())
    }
}

/// XLAT: the address is base plus AL.
pub fn xlat(vp: &mut SoftVp, op: &Op) -> Exec {
    let offset = vp.s.gprs[gpr::RBX].wrapping_add(vp.s.gprs[gpr::RAX] & 0xff) & mask(op.addr);
    let la = vp.seg_linear((op.mem & 7).into(), offset, 1, crate::segmentation::Want::Read)?;
    let v = vp.read_u8(la)?;
    set(vp, 0, v);
    Ok(())
}

/// LAHF.
pub fn lahf(vp: &mut SoftVp, _: &Op) -> Exec {
    let f = vp.s.rflags & (rflags::STATUS & !rflags::OF) | rflags::FIXED;
    set(vp, 1, f as u8);
    Ok(())
}
/// SAHF.
pub fn sahf(vp: &mut SoftVp, _: &Op) -> Exec {
    let f = get::<u8>(vp, 1).into();
    set_flags(vp, rflags::STATUS & !rflags::OF, f);
    Ok(())
}
/// CLC, STC, CMC, CLD, STD: flag mask in `imm`, `a` is 0 to clear, 1 to set, 2 to complement.
pub fn flag_bit(vp: &mut SoftVp, op: &Op) -> Exec {
    match op.a {
        0 => vp.s.rflags &= !op.imm,
        1 => vp.s.rflags |= op.imm,
        _ => vp.s.rflags ^= op.imm,
    }
    Ok(())
}
/// SALC.
pub fn salc(vp: &mut SoftVp, _: &Op) -> Exec {
    let v = if vp.s.rflags & rflags::CF != 0 { 0xffu8 } else { 0 };
    set(vp, 0, v);
    Ok(())
}

/// Pushes 8 bytes on a 64-bit stack.
#[inline(always)]
pub fn push64(vp: &mut SoftVp, v: u64) -> Exec {
    let la = vp.s.gprs[gpr::RSP].wrapping_sub(8);
    if let Some(p) = hit::<true>(vp, la, 8) {
        // SAFETY: `hit` says that the access is to mapped guest memory and allowed.
        unsafe { p.cast::<u64>().write_unaligned(v) };
        vp.s.gprs[gpr::RSP] = la;
        return Ok(());
    }
    vp.push(v, 8)
}
/// Reads 8 bytes from the top of a 64-bit stack; the caller adds 8 to RSP.
#[inline(always)]
pub fn top64(vp: &mut SoftVp) -> Exec<u64> {
    let la = vp.s.gprs[gpr::RSP];
    if let Some(p) = hit::<false>(vp, la, 8) {
        // SAFETY: `hit` says that the access is to mapped guest memory and allowed.
        return Ok(unsafe { p.cast::<u64>().read_unaligned() });
    }
    vp.pop(8)
}

/// `push r64`
pub fn push_r64(vp: &mut SoftVp, op: &Op) -> Exec {
    let v = get::<u64>(vp, op.a);
    push64(vp, v)
}
/// `push imm` in 64-bit mode
pub fn push_i64(vp: &mut SoftVp, op: &Op) -> Exec {
    push64(vp, op.imm)
}
/// `pop r64`
pub fn pop_r64(vp: &mut SoftVp, op: &Op) -> Exec {
    let v = top64(vp)?;
    vp.s.gprs[gpr::RSP] = vp.s.gprs[gpr::RSP].wrapping_add(8);
    set(vp, op.a, v);
    Ok(())
}
/// `push r` of any size
pub fn push_r(vp: &mut SoftVp, op: &Op) -> Exec {
    let v = get_sized(vp, op.a, op.size);
    vp.push(v, op.size.into())
}
/// `push imm`
pub fn push_i(vp: &mut SoftVp, op: &Op) -> Exec {
    vp.push(op.imm, op.size.into())
}
/// `push m`
pub fn push_m(vp: &mut SoftVp, op: &Op) -> Exec {
    let v = load_sized(vp, op, op.size)?;
    vp.push(v, op.size.into())
}
/// `pop r`
pub fn pop_r(vp: &mut SoftVp, op: &Op) -> Exec {
    let v = vp.pop(op.size.into())?;
    // POP SP: the increment comes first and is overwritten.
    vp.commit_rsp(op.size.into());
    set_sized(vp, op.a, op.size, v);
    Ok(())
}
/// `pop m`: an address that uses RSP sees the incremented one (SDM volume 2, POP).
pub fn pop_m(vp: &mut SoftVp, op: &Op) -> Exec {
    let v = vp.pop(op.size.into())?;
    let rsp = vp.s.gprs[gpr::RSP];
    vp.commit_rsp(op.size.into());
    store_sized(vp, op, op.size, v).inspect_err(|_| vp.s.gprs[gpr::RSP] = rsp)
}

/// PUSHA. A fault in the middle leaves what has been written below the stack pointer, as the hardware does.
pub fn pusha(vp: &mut SoftVp, op: &Op) -> Exec {
    let old = vp.s.gprs[gpr::RSP];
    for n in 0..8 {
        let v = if n == gpr::RSP { old } else { vp.s.gprs[n] };
        if let Err(fault) = vp.push(v, op.size.into()) {
            vp.s.gprs[gpr::RSP] = old;
            return Err(fault);
        }
    }
    Ok(())
}
/// POPA. A fault in the middle leaves the registers that have been read, as AMD's hardware does (measured).
pub fn popa(vp: &mut SoftVp, op: &Op) -> Exec {
    let size = i64::from(op.size);
    for n in 0..8 {
        // In ascending order: DI first; SP's is read and dropped.
        let v = vp.stack_read(n as i64 * size, size as usize)?;
        if 7 - n != gpr::RSP {
            set_sized(vp, (7 - n) as u8 * 8, op.size, v);
        }
    }
    vp.commit_rsp(8 * size as u64);
    Ok(())
}

/// ENTER: `imm` is the frame size, `b` the nesting level.
pub fn enter(vp: &mut SoftVp, op: &Op) -> Exec {
    let size = i64::from(op.size);
    let level = i64::from(op.b & 31);
    let stack = vp.stack_mask();
    let old_rsp = vp.s.gprs[gpr::RSP];
    let rbp = vp.s.gprs[gpr::RBP];
    let mut run = || -> Exec<u64> {
        vp.push(rbp, size as usize)?;
        let frame = vp.s.gprs[gpr::RSP];
        for n in 1..level {
            // The frame pointers of the outer levels, addressed as the stack is.
            let at = rbp.wrapping_sub((n * size) as u64) & stack;
            let la = vp.seg_linear(x86::segment::sreg::SS, at, size as usize, crate::segmentation::Want::Read)?;
            let v = read_linear(vp, la, size as usize)?;
            vp.push(v, size as usize)?;
        }
        if level > 0 {
            vp.push(frame, size as usize)?;
        }
        vp.set_stack_pointer(vp.s.gprs[gpr::RSP].wrapping_sub(op.imm));
        // The final stack pointer must be writable (SDM volume 2, ENTER, exceptions).
        let la = vp.stack_linear(0, size as usize, crate::segmentation::Want::Write)?;
        vp.probe_write(la, size as usize)?;
        Ok(frame)
    };
    match run() {
        Ok(frame) => {
            let width = if stack == 0xffff { 2 } else { op.size };
            set_sized(vp, gpr::RBP as u8 * 8, width.min(op.size), frame);
            Ok(())
        }
        Err(fault) => {
            vp.s.gprs[gpr::RSP] = old_rsp;
            Err(fault)
        }
    }
}

/// LEAVE.
pub fn leave(vp: &mut SoftVp, op: &Op) -> Exec {
    let rsp = vp.s.gprs[gpr::RSP];
    vp.set_stack_pointer(vp.s.gprs[gpr::RBP]);
    let v = match vp.pop(op.size.into()) {
        Ok(v) => v,
        Err(fault) => {
            vp.s.gprs[gpr::RSP] = rsp;
            return Err(fault);
        }
    };
    vp.commit_rsp(op.size.into());
    set_sized(vp, gpr::RBP as u8 * 8, op.size, v);
    Ok(())
}
/// LEAVE in 64-bit mode.
pub fn leave64(vp: &mut SoftVp, _: &Op) -> Exec {
    let rbp = vp.s.gprs[gpr::RBP];
    let rsp = std::mem::replace(&mut vp.s.gprs[gpr::RSP], rbp);
    match top64(vp) {
        Ok(v) => {
            vp.s.gprs[gpr::RSP] = rbp.wrapping_add(8);
            vp.s.gprs[gpr::RBP] = v;
            Ok(())
        }
        Err(fault) => {
            vp.s.gprs[gpr::RSP] = rsp;
            Err(fault)
        }
    }
}

/// `push sreg`: a 32- or 64-bit push of a segment register writes its 16 bits zero-extended.
pub fn push_sreg(vp: &mut SoftVp, op: &Op) -> Exec {
    let v = vp.s.segments[usize::from(op.b)].selector;
    vp.push(v.into(), op.size.into())
}
/// `pop sreg`
pub fn pop_sreg(vp: &mut SoftVp, op: &Op) -> Exec {
    let v = vp.pop(op.size.into())?;
    let seg = usize::from(op.b);
    // The size of the stack that is popped from is that before SS is loaded.
    let mask = vp.stack_mask();
    vp.load_segment(seg, v as u16)?;
    let rsp = vp.s.gprs[gpr::RSP];
    let new = rsp.wrapping_add(op.size.into()) & mask;
    vp.s.gprs[gpr::RSP] = if mask == 0xffff { rsp & !mask | new } else { new };
    if seg == x86::segment::sreg::SS {
        vp.set_shadow(true);
    }
    Ok(())
}
/// `mov sreg, r/m16`
pub fn mov_to_sreg<const MEM: bool>(vp: &mut SoftVp, op: &Op) -> Exec {
    let v = if MEM { load::<u16>(vp, op)? } else { get::<u16>(vp, op.a) };
    let seg = usize::from(op.b);
    if seg == x86::segment::sreg::CS {
        return Err(Fault::UD);
    }
    vp.load_segment(seg, v)?;
    if seg == x86::segment::sreg::SS {
        vp.set_shadow(true);
    }
    Ok(())
}
/// `mov r/m, sreg`: memory gets 16 bits, a register as many as its size.
pub fn mov_from_sreg<const MEM: bool>(vp: &mut SoftVp, op: &Op) -> Exec {
    let v = vp.s.segments[usize::from(op.b)].selector;
    if MEM {
        store::<u16>(vp, op, v)
    } else {
        set_sized(vp, op.a, op.size, v.into());
        Ok(())
    }
}
/// LDS, LES, LFS, LGS, LSS.
pub fn load_far_pointer(vp: &mut SoftVp, op: &Op) -> Exec {
    let size = usize::from(op.size);
    let la = linear(vp, op, 0, size + 2, crate::segmentation::Want::Read)?;
    let mut bytes = [0; 10];
    vp.read_bytes(la, &mut bytes[..size + 2])?;
    let selector = u16::from_le_bytes([bytes[size], bytes[size + 1]]);
    let mut offset = [0; 8];
    offset[..size].copy_from_slice(&bytes[..size]);
    let seg = usize::from(op.b);
    vp.load_segment(seg, selector)?;
    set_sized(vp, op.a, op.size, u64::from_le_bytes(offset));
    Ok(())
}
