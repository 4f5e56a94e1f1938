//! String instructions: MOVS, STOS, LODS, SCAS, CMPS, INS, OUTS with their repeat prefixes.
//!
//! A repetition works in *chunks*: as many elements as lie in one page of plain memory on either side are done on host
//! addresses, everything else (devices, elements that cross a page, segment limits, wrapping addresses, faults) element by
//! element. After each chunk RSI, RDI and RCX are what the architecture says, so that a fault or an interrupt between
//! chunks finds the right state. An interrupted repetition completes with RIP still on it.

use super::host::Arith;
use super::op::*;
use crate::segmentation::Want;
use crate::vp::{CodeSize, Exec, SoftVp, attention};
use std::sync::atomic::Ordering;
use x86::paging::PAGE_MASK;
use x86::regs::{gpr, rflags};
use x86::segment::sreg;

const RCX: u8 = gpr::RCX as u8 * 8;
const RSI: u8 = gpr::RSI as u8 * 8;
const RDI: u8 = gpr::RDI as u8 * 8;

/// Does `n` elements at most; returns how many, and whether a comparison ends the repetition.
type Chunk = fn(&mut SoftVp, &Op, u64) -> Exec<(u64, bool)>;

fn backward(vp: &SoftVp) -> bool {
    vp.s.rflags & rflags::DF != 0
}

/// Executes a string instruction with or without repeat prefix.
fn repeat(vp: &mut SoftVp, op: &Op, chunk: Chunk) -> Exec {
    if op.flags & (flag::REP | flag::REPNE) == 0 {
        return chunk(vp, op, 1).map(drop);
    }
    loop {
        let n = get_sized(vp, RCX, op.addr);
        if n == 0 {
            return Ok(());
        }
        // With anything to attend to at the next boundary (single step, breakpoints), one element at a time.
        let waiting = vp.s.attention.load(Ordering::Relaxed);
        let most = if waiting & attention::BOUNDARY != 0 { 1 } else { n };
        let (done, stop) = chunk(vp, op, most)?;
        set_sized(vp, RCX, op.addr, n - done);
        if stop || n == done {
            return Ok(());
        }
        if vp.s.attention.load(Ordering::Relaxed) != 0 {
            vp.s.next_rip = vp.s.rip;
            // An instruction breakpoint has been reported before the first element (SDM volume 3, section 17.3.1.1).
            if waiting & attention::BOUNDARY != 0 {
                vp.s.rflags |= rflags::RF;
            }
            return Ok(());
        }
    }
}

/// One of the two places that a string instruction works on.
struct Side {
    seg: usize,
    reg: u8,
    want: Want,
}

const fn destination(want: Want) -> Side {
    Side { seg: sreg::ES, reg: RDI, want }
}
fn source(op: &Op) -> Side {
    Side { seg: (op.mem & 7).into(), reg: RSI, want: Want::Read }
}

impl Side {
    fn offset(&self, vp: &SoftVp, op: &Op) -> u64 {
        get_sized(vp, self.reg, op.addr)
    }
    /// Linear address of the current element.
    fn linear(&self, vp: &mut SoftVp, op: &Op, size: usize) -> Exec<u64> {
        let offset = self.offset(vp, op);
        vp.seg_linear(self.seg, offset, size, self.want)
    }
    fn advance(&self, vp: &mut SoftVp, op: &Op, elements: u64) {
        let bytes = elements.wrapping_mul(op.size.into());
        let old = self.offset(vp, op);
        let new = if backward(vp) { old.wrapping_sub(bytes) } else { old.wrapping_add(bytes) };
        set_sized(vp, self.reg, op.addr, new);
    }
    /// The host address of the current element and how many elements (at least one, at most `n`) from there on lie in the
    /// same page of plain memory, inside the segment, before the address wraps. `None`: one element, the slow way.
    fn run(&self, vp: &mut SoftVp, op: &Op, n: u64) -> Exec<Option<(*mut u8, u64)>> {
        let size = u64::from(op.size);
        let offset = self.offset(vp, op);
        let la = vp.seg_linear(self.seg, offset, op.size.into(), self.want)?;
        let in_page = la & PAGE_MASK;
        if in_page + size > PAGE_MASK + 1 {
            return Ok(None);
        }
        let down = backward(vp);
        let room = if down {
            (in_page / size).min(offset / size) + 1
        } else {
            ((PAGE_MASK + 1 - in_page) / size).min((mask(op.addr) - offset).saturating_add(1) / size)
        };
        let count = n.min(room);
        if count == 0 {
            return Ok(None);
        }
        if count > 1 && vp.s.code_size != CodeSize::Bits64 {
            let first = if down { offset - (count - 1) * size } else { offset };
            if vp.seg_linear(self.seg, first, (count * size) as usize, self.want).is_err() {
                return Ok(None);
            }
        }
        let write = matches!(self.want, Want::Write);
        Ok(vp.host_run(la, write, size as usize)?.map(|(p, _)| (p, count)))
    }
}

/// Calls `f` with the addresses of each element of a run.
#[inline(always)]
fn each(down: bool, size: usize, n: u64, mut f: impl FnMut(usize) -> bool) -> u64 {
    for i in 0..n {
        let at = (i as usize).wrapping_mul(size);
        if !f(if down { at.wrapping_neg() } else { at }) {
            return i + 1;
        }
    }
    n
}

/// MOVS.
pub fn movs<T: Int>(vp: &mut SoftVp, op: &Op) -> Exec {
    repeat(vp, op, |vp, op, n| {
        let (from, to) = (source(op), destination(Want::Write));
        let mut done = 1;
        let block = if n > 1 {
            match from.run(vp, op, n)? {
                Some((src, a)) => to.run(vp, op, n)?.map(|(dst, b)| (src, dst, a.min(b))),
                None => None,
            }
        } else {
            None
        };
        if let Some((src, dst, count)) = block {
            let bytes = count as usize * T::BYTES;
            let gap = (dst as usize).wrapping_sub(src as usize);
            // SAFETY: `run` says that `count` elements from `src` and `dst` on, in the direction of DF, lie in pages of
            // mapped guest memory. Overlap is honoured: a forward copy onto itself, ahead of its source, repeats what it
            // has written.
            unsafe {
                if !backward(vp) && gap.wrapping_sub(1) >= bytes {
                    std::ptr::copy(src, dst, bytes);
                } else {
                    each(backward(vp), T::BYTES, count, |at| {
                        let v = src.wrapping_add(at).cast::<T>().read_unaligned();
                        dst.wrapping_add(at).cast::<T>().write_unaligned(v);
                        true
                    });
                }
            }
            done = count;
        } else {
            let la = from.linear(vp, op, T::BYTES)?;
            let v = read_linear(vp, la, T::BYTES)?;
            let la = to.linear(vp, op, T::BYTES)?;
            write_linear(vp, la, T::BYTES, v)?;
        }
        from.advance(vp, op, done);
        to.advance(vp, op, done);
        Ok((done, false))
    })
}

/// STOS.
pub fn stos<T: Int>(vp: &mut SoftVp, op: &Op) -> Exec {
    repeat(vp, op, |vp, op, n| {
        let to = destination(Want::Write);
        let value = get::<T>(vp, 0);
        let mut done = 1;
        if let Some((dst, count)) = if n > 1 { to.run(vp, op, n)? } else { None } {
            let first = if backward(vp) { dst.wrapping_sub((count as usize - 1) * T::BYTES) } else { dst };
            // SAFETY: as in `movs`; the order of the stores of a fill cannot be seen.
            unsafe {
                if value.to_u64() == 0 {
                    std::ptr::write_bytes(first, 0, count as usize * T::BYTES);
                } else if T::BYTES == 1 {
                    std::ptr::write_bytes(first, value.to_u64() as u8, count as usize);
                } else {
                    for i in 0..count as usize {
                        first.cast::<T>().wrapping_add(i).write_unaligned(value);
                    }
                }
            }
            done = count;
        } else {
            let la = to.linear(vp, op, T::BYTES)?;
            write_linear(vp, la, T::BYTES, value.to_u64())?;
        }
        to.advance(vp, op, done);
        Ok((done, false))
    })
}

/// LODS.
pub fn lods<T: Int>(vp: &mut SoftVp, op: &Op) -> Exec {
    repeat(vp, op, |vp, op, _| {
        let from = source(op);
        let la = from.linear(vp, op, T::BYTES)?;
        let v = read_linear(vp, la, T::BYTES)?;
        set(vp, 0, T::from_u64(v));
        from.advance(vp, op, 1);
        Ok((1, false))
    })
}

/// Does a comparison with this ZF end the repetition?
fn ends(op: &Op, equal: bool) -> bool {
    if op.flags & flag::REPNE != 0 { equal } else { !equal }
}

/// SCAS.
pub fn scas<T: Arith>(vp: &mut SoftVp, op: &Op) -> Exec {
    repeat(vp, op, |vp, op, n| {
        let at = destination(Want::Read);
        let value = get::<T>(vp, 0);
        let mut last;
        let mut done = 1;
        if let Some((p, count)) = if n > 1 { at.run(vp, op, n)? } else { None } {
            last = value;
            done = each(backward(vp), T::BYTES, count, |at| {
                // SAFETY: as in `movs`.
                last = unsafe { p.wrapping_add(at).cast::<T>().read_unaligned() };
                !ends(op, last == value)
            });
        } else {
            let la = at.linear(vp, op, T::BYTES)?;
            last = T::from_u64(read_linear(vp, la, T::BYTES)?);
        }
        at.advance(vp, op, done);
        set_status(vp, T::sub(value, last, 0).1);
        Ok((done, ends(op, last == value)))
    })
}

/// CMPS.
pub fn cmps<T: Arith>(vp: &mut SoftVp, op: &Op) -> Exec {
    repeat(vp, op, |vp, op, n| {
        let (first, second) = (source(op), destination(Want::Read));
        let mut done = 1;
        let (mut a, mut b);
        let block = if n > 1 {
            match first.run(vp, op, n)? {
                Some((p, x)) => second.run(vp, op, n)?.map(|(q, y)| (p, q, x.min(y))),
                None => None,
            }
        } else {
            None
        };
        if let Some((p, q, count)) = block {
            (a, b) = (T::from_u64(0), T::from_u64(0));
            done = each(backward(vp), T::BYTES, count, |at| {
                // SAFETY: as in `movs`.
                unsafe {
                    a = p.wrapping_add(at).cast::<T>().read_unaligned();
                    b = q.wrapping_add(at).cast::<T>().read_unaligned();
                }
                !ends(op, a == b)
            });
        } else {
            let la = first.linear(vp, op, T::BYTES)?;
            a = T::from_u64(read_linear(vp, la, T::BYTES)?);
            let la = second.linear(vp, op, T::BYTES)?;
            b = T::from_u64(read_linear(vp, la, T::BYTES)?);
        }
        first.advance(vp, op, done);
        second.advance(vp, op, done);
        set_status(vp, T::sub(a, b, 0).1);
        Ok((done, ends(op, a == b)))
    })
}

/// INS.
pub fn ins<T: Int>(vp: &mut SoftVp, op: &Op) -> Exec {
    // Refused even if nothing is to be moved.
    vp.check_io(vp.s.gprs[gpr::RDX] as u16, T::BYTES)?;
    repeat(vp, op, |vp, op, _| {
        let to = destination(Want::Write);
        let port = vp.s.gprs[gpr::RDX] as u16;
        let la = to.linear(vp, op, T::BYTES)?;
        // The device must not be asked if the value has no place to go.
        vp.probe_write(la, T::BYTES)?;
        let mut data = [0; 4];
        vp.exits().io_read(vp.index, port, &mut data[..T::BYTES]);
        write_linear(vp, la, T::BYTES, u32::from_le_bytes(data).into())?;
        to.advance(vp, op, 1);
        Ok((1, false))
    })
}

/// OUTS.
pub fn outs<T: Int>(vp: &mut SoftVp, op: &Op) -> Exec {
    // Refused even if nothing is to be moved.
    vp.check_io(vp.s.gprs[gpr::RDX] as u16, T::BYTES)?;
    repeat(vp, op, |vp, op, _| {
        let from = source(op);
        let port = vp.s.gprs[gpr::RDX] as u16;
        let la = from.linear(vp, op, T::BYTES)?;
        let v = read_linear(vp, la, T::BYTES)?;
        vp.exits().io_write(vp.index, port, &v.to_le_bytes()[..T::BYTES]);
        from.advance(vp, op, 1);
        Ok((1, false))
    })
}
