//! The compact form of a general-purpose instruction, and access to its operands.

use crate::mmu::RmwTarget;
use crate::segmentation::Want;
use crate::vp::{CodeSize, Exec, SoftVp, VpBlock};
use iced_x86::{Instruction, OpKind, Register};
use std::mem::offset_of;
use x86::regs::rflags;
use x86::segment::{Segment, sreg};

/// Executes an [`Op`].
pub type OpFn = fn(&mut SoftVp, &Op) -> Exec;

/// A pre-digested instruction: 32 bytes, so that two fit a cache line. What the fields mean beyond the memory operand is
/// up to the function in `run`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Op {
    /// What executes it.
    pub run: OpFn,
    /// Immediate (sign-extended), branch displacement from the next instruction, or address of an `Insn`.
    pub imm: u64,
    /// Displacement, to be sign-extended.
    pub disp: i32,
    /// Byte offset in [`VpBlock`] of the segment base (of `zero` for segments without base in 64-bit mode).
    pub seg: u16,
    /// Byte offset in [`VpBlock`] of the base register (or `zero`, or `next_rip`).
    pub base: u8,
    /// Byte offset in [`VpBlock`] of the index register (or `zero`).
    pub index: u8,
    /// Shift of the index.
    pub scale: u8,
    /// Segment register number, and [`CHECKED`].
    pub mem: u8,
    /// Byte offset in [`VpBlock`] of the first register operand.
    pub a: u8,
    /// Byte offset in [`VpBlock`] of the second register operand.
    pub b: u8,
    /// Length in bytes.
    pub len: u8,
    /// Operand size in bytes.
    pub size: u8,
    /// Address size in bytes.
    pub addr: u8,
    /// See [`flag`].
    pub flags: u8,
}

const _: () = assert!(size_of::<Op>() == 32);

/// In [`Op::mem`]: not a plain 64-bit address; the slow way computes and checks it.
pub const CHECKED: u8 = 0x80;

/// Bits of [`Op::flags`].
pub mod flag {
    /// F3 prefix (REP, REPE).
    pub const REP: u8 = 1;
    /// F2 prefix (REPNE).
    pub const REPNE: u8 = 2;
    /// LOCK prefix, or locked by itself.
    pub const LOCK: u8 = 4;
    /// Decoded for 64-bit mode.
    pub const LONG: u8 = 8;
    /// Ends a block.
    pub const END: u8 = 16;
}

/// Offset of `zero`.
pub const ZERO: u8 = offset_of!(VpBlock, zero) as u8;
/// Offset of `next_rip`.
const NEXT_RIP: u8 = offset_of!(VpBlock, next_rip) as u8;
const _: () = assert!(offset_of!(VpBlock, gprs) == 0 && offset_of!(VpBlock, zero) < 256 - 8);
const _: () = assert!(offset_of!(VpBlock, segments) + 6 * size_of::<Segment>() < 65536);
const _: () = assert!(offset_of!(Segment, base) == 0);

/// An unsigned integer of an operand size.
pub trait Int: Copy + Eq {
    /// Bytes.
    const BYTES: usize;
    /// Truncated.
    fn from_u64(v: u64) -> Self;
    /// Zero-extended.
    fn to_u64(self) -> u64;
    /// Sign-extended.
    fn sext(self) -> u64;
}
macro_rules! int {
    ($($t:ty, $i:ty;)*) => {$(
        impl Int for $t {
            const BYTES: usize = size_of::<$t>();
            #[inline(always)]
            fn from_u64(v: u64) -> Self { v as $t }
            #[inline(always)]
            fn to_u64(self) -> u64 { u64::from(self) }
            #[inline(always)]
            fn sext(self) -> u64 { self as $i as i64 as u64 }
        }
    )*};
}
int!(u8, i8; u16, i16; u32, i32; u64, i64;);

/// Ones in the low `bytes` bytes.
#[inline(always)]
pub const fn mask(bytes: u8) -> u64 {
    if bytes >= 8 { u64::MAX } else { (1 << (bytes as u32 * 8)) - 1 }
}

/// Byte offset in [`VpBlock`] of a general-purpose register of any size.
pub fn register_offset(r: Register) -> Option<u8> {
    let n = r.number() as u8;
    if matches!(r, Register::AH | Register::CH | Register::DH | Register::BH) {
        return Some((r as u8 - Register::AH as u8) * 8 + 1);
    }
    r.is_gpr().then_some(if r.is_gpr8() { (r.full_register().number() as u8) * 8 } else { n * 8 })
}

/// Reads a field of the block by byte offset.
#[inline(always)]
pub fn field(vp: &SoftVp, offset: u64) -> u64 {
    let block: *const VpBlock = &*vp.s;
    // SAFETY: offsets are made at decoding, by `Operands` below: they name 8-byte fields of the block.
    unsafe { *(block.cast::<u8>().add(offset as usize).cast::<u64>()) }
}

/// Reads a register operand.
#[inline(always)]
pub fn get<T: Int>(vp: &SoftVp, offset: u8) -> T {
    let block: *const VpBlock = &*vp.s;
    // SAFETY: register offsets (`register_offset`) lie in `gprs`, the block's first field; offset 1 mod 8 is only given
    // for bytes.
    unsafe { block.cast::<u8>().add(offset as usize).cast::<T>().read_unaligned() }
}

/// Writes a register operand: 32-bit values clear the upper half, smaller ones leave the rest.
///
/// Always stores 8 bytes, so that a following 8-byte load is forwarded.
#[inline(always)]
pub fn set<T: Int>(vp: &mut SoftVp, offset: u8, value: T) {
    let n = usize::from(offset >> 3) & 15;
    // SAFETY: n < 16.
    let reg = unsafe { vp.s.gprs.get_unchecked_mut(n) };
    match T::BYTES {
        8 | 4 => *reg = value.to_u64(),
        2 => *reg = *reg & !0xffff | value.to_u64(),
        _ => {
            let shift = (offset & 1) * 8;
            *reg = *reg & !(0xff << shift) | value.to_u64() << shift;
        }
    }
}

/// [`get`] with the size at run time.
#[inline]
pub fn get_sized(vp: &SoftVp, offset: u8, size: u8) -> u64 {
    match size {
        1 => get::<u8>(vp, offset).to_u64(),
        2 => get::<u16>(vp, offset).to_u64(),
        4 => get::<u32>(vp, offset).to_u64(),
        _ => get::<u64>(vp, offset),
    }
}

/// [`set`] with the size at run time.
#[inline]
pub fn set_sized(vp: &mut SoftVp, offset: u8, size: u8, value: u64) {
    match size {
        1 => set::<u8>(vp, offset, value as u8),
        2 => set::<u16>(vp, offset, value as u16),
        4 => set::<u32>(vp, offset, value as u32),
        _ => set::<u64>(vp, offset, value),
    }
}

/// Replaces the status flags.
#[inline(always)]
pub fn set_status(vp: &mut SoftVp, status: u64) {
    vp.s.rflags = vp.s.rflags & !rflags::STATUS | status;
}

/// Replaces some of the flags.
#[inline(always)]
pub fn set_flags(vp: &mut SoftVp, which: u64, value: u64) {
    vp.s.rflags = vp.s.rflags & !which | value & which;
}

/// Offset of the memory operand in its segment, before truncation to the address size.
#[inline(always)]
pub fn offset(vp: &SoftVp, op: &Op) -> u64 {
    field(vp, op.base.into())
        .wrapping_add(field(vp, op.index.into()) << (op.scale & 3))
        .wrapping_add(op.disp as i64 as u64)
}

/// Linear address, if the operand is a plain one of 64-bit mode.
#[inline(always)]
fn plain(vp: &SoftVp, op: &Op) -> u64 {
    offset(vp, op).wrapping_add(field(vp, op.seg.into()))
}

/// Linear address with all checks.
pub fn linear(vp: &mut SoftVp, op: &Op, displacement: u64, size: usize, want: Want) -> Exec<u64> {
    let offset = offset(vp, op).wrapping_add(displacement) & mask(op.addr);
    vp.seg_linear((op.mem & 7).into(), offset, size, want)
}

#[repr(C, packed)]
#[derive(Clone, Copy)]
struct Unaligned<T>(T);

/// Host address of a linear address, if the TLB allows an access of `size` bytes there.
#[inline(always)]
pub fn hit<const WRITE: bool>(vp: &SoftVp, la: u64, size: usize) -> Option<*mut u8> {
    let e = vp.s.tlb.data.wrapping_add(crate::mmu::tlb::slot_of(la));
    // SAFETY: `tlb.data` points to the slots of the selected TLB set, which lives as long as the VP (see `mmu`).
    let (tag, addend) = unsafe { (if WRITE { (*e).tag_w } else { (*e).tag_r }, (*e).addend) };
    (la.wrapping_sub(tag) <= 4096 - size as u64).then_some(la.wrapping_add(addend) as *mut u8)
}

/// Reads from a host address that [`hit`] gave.
#[inline(always)]
fn peek<T: Int>(p: *mut u8) -> T {
    // SAFETY: `hit` says that the whole access lies in a page of guest memory that is mapped for as long as the
    // partition lives; other threads may change it, hence volatile.
    unsafe { p.cast::<Unaligned<T>>().read_volatile().0 }
}

/// Writes to a host address that [`hit`] gave.
#[inline(always)]
fn poke<T: Int>(p: *mut u8, v: T) {
    // SAFETY: as in `peek`, and `hit` has checked the write permission.
    unsafe { p.cast::<Unaligned<T>>().write_volatile(Unaligned(v)) }
}

/// Reads the memory operand.
#[inline(always)]
pub fn load<T: Int>(vp: &mut SoftVp, op: &Op) -> Exec<T> {
    if op.mem & CHECKED == 0
        && let Some(p) = hit::<false>(vp, plain(vp, op), T::BYTES)
    {
        return Ok(peek(p));
    }
    load_slow(vp, op, T::BYTES).map(T::from_u64)
}

#[cold]
#[inline(never)]
fn load_slow(vp: &mut SoftVp, op: &Op, size: usize) -> Exec<u64> {
    let la = linear(vp, op, 0, size, Want::Read)?;
    read_linear(vp, la, size)
}

/// Reads 1, 2, 4 or 8 bytes at a checked linear address.
#[inline]
pub fn read_linear(vp: &mut SoftVp, la: u64, size: usize) -> Exec<u64> {
    Ok(match size {
        1 => vp.read_u8(la)?.into(),
        2 => vp.read_u16(la)?.into(),
        4 => vp.read_u32(la)?.into(),
        _ => vp.read_u64(la)?,
    })
}

/// Writes 1, 2, 4 or 8 bytes at a checked linear address.
#[inline]
pub fn write_linear(vp: &mut SoftVp, la: u64, size: usize, value: u64) -> Exec {
    match size {
        1 => vp.write_u8(la, value as u8),
        2 => vp.write_u16(la, value as u16),
        4 => vp.write_u32(la, value as u32),
        _ => vp.write_u64(la, value),
    }
}

/// Writes the memory operand.
#[inline(always)]
pub fn store<T: Int>(vp: &mut SoftVp, op: &Op, value: T) -> Exec {
    if op.mem & CHECKED == 0
        && let Some(p) = hit::<true>(vp, plain(vp, op), T::BYTES)
    {
        poke(p, value);
        return Ok(());
    }
    store_slow(vp, op, T::BYTES, value.to_u64())
}

#[cold]
#[inline(never)]
fn store_slow(vp: &mut SoftVp, op: &Op, size: usize, value: u64) -> Exec {
    let la = linear(vp, op, 0, size, Want::Write)?;
    write_linear(vp, la, size, value)
}

/// [`load`] with the size at run time.
#[inline]
pub fn load_sized(vp: &mut SoftVp, op: &Op, size: u8) -> Exec<u64> {
    Ok(match size {
        1 => load::<u8>(vp, op)?.into(),
        2 => load::<u16>(vp, op)?.into(),
        4 => load::<u32>(vp, op)?.into(),
        _ => load::<u64>(vp, op)?,
    })
}

/// [`store`] with the size at run time.
#[inline]
pub fn store_sized(vp: &mut SoftVp, op: &Op, size: u8, value: u64) -> Exec {
    match size {
        1 => store(vp, op, value as u8),
        2 => store(vp, op, value as u16),
        4 => store(vp, op, value as u32),
        _ => store(vp, op, value),
    }
}

/// Where a read-modify-write goes; write permission is checked.
#[derive(Clone, Copy)]
pub enum Place {
    /// Plain memory.
    Host(*mut u8),
    /// Through the MMU's functions, at this linear address.
    Linear(u64),
}

/// Finds the place of a read-modify-write of the memory operand, `displacement` bytes from it (bit strings).
#[inline(always)]
pub fn place(vp: &mut SoftVp, op: &Op, displacement: u64, size: usize) -> Exec<Place> {
    if op.mem & CHECKED == 0
        && let Some(p) = hit::<true>(vp, plain(vp, op).wrapping_add(displacement), size)
    {
        return Ok(Place::Host(p));
    }
    place_slow(vp, op, displacement, size)
}

#[cold]
#[inline(never)]
fn place_slow(vp: &mut SoftVp, op: &Op, displacement: u64, size: usize) -> Exec<Place> {
    // An instruction that reads and writes needs both rights of the segment; every writable segment is readable.
    let la = linear(vp, op, displacement, size, Want::Write)?;
    Ok(match vp.rmw_target(la, size)? {
        RmwTarget::Host(p) => Place::Host(p),
        RmwTarget::Slow => Place::Linear(la),
    })
}

/// Reads at a place.
#[inline(always)]
pub fn place_read<T: Int>(vp: &mut SoftVp, place: Place) -> Exec<T> {
    match place {
        Place::Host(p) => Ok(peek(p)),
        Place::Linear(la) => read_linear(vp, la, T::BYTES).map(T::from_u64),
    }
}

/// Writes at a place.
#[inline(always)]
pub fn place_write<T: Int>(vp: &mut SoftVp, place: Place, value: T) -> Exec {
    match place {
        Place::Host(p) => {
            poke(p, value);
            Ok(())
        }
        Place::Linear(la) => write_linear(vp, la, T::BYTES, value.to_u64()),
    }
}

/// Reads at a place, with the size at run time.
pub fn place_read_sized(vp: &mut SoftVp, place: Place, size: u8) -> Exec<u64> {
    Ok(match size {
        1 => place_read::<u8>(vp, place)?.into(),
        2 => place_read::<u16>(vp, place)?.into(),
        4 => place_read::<u32>(vp, place)?.into(),
        _ => place_read::<u64>(vp, place)?,
    })
}

/// Writes at a place, with the size at run time.
pub fn place_write_sized(vp: &mut SoftVp, place: Place, size: u8, value: u64) -> Exec {
    match size {
        1 => place_write(vp, place, value as u8),
        2 => place_write(vp, place, value as u16),
        4 => place_write(vp, place, value as u32),
        _ => place_write(vp, place, value),
    }
}

/// Segment register number of a segment register.
pub fn sreg_number(r: Register) -> usize {
    match r {
        Register::ES => sreg::ES,
        Register::CS => sreg::CS,
        Register::SS => sreg::SS,
        Register::FS => sreg::FS,
        Register::GS => sreg::GS,
        _ => sreg::DS,
    }
}

fn segment_base(number: usize, code: CodeSize) -> u16 {
    if code == CodeSize::Bits64 && number < sreg::FS {
        ZERO.into()
    } else {
        (offset_of!(VpBlock, segments) + number * size_of::<Segment>()) as u16
    }
}

/// An [`Op`] with nothing but what every instruction has.
pub fn bare(run: OpFn, i: &Instruction, code: CodeSize) -> Op {
    let mut flags = if code == CodeSize::Bits64 { flag::LONG } else { 0 };
    if i.has_rep_prefix() {
        flags |= flag::REP;
    }
    if i.has_repne_prefix() {
        flags |= flag::REPNE;
    }
    if i.has_lock_prefix() {
        flags |= flag::LOCK;
    }
    Op {
        run,
        imm: 0,
        disp: 0,
        seg: ZERO.into(),
        base: ZERO,
        index: ZERO,
        scale: 0,
        mem: 0,
        a: 0,
        b: 0,
        len: i.len() as u8,
        size: 0,
        addr: 0,
        flags,
    }
}

/// Sets the segment of an implicit or explicit memory operand.
pub fn set_segment(op: &mut Op, number: usize, code: CodeSize, addr: u8) {
    op.seg = segment_base(number, code);
    op.addr = addr;
    op.mem = number as u8 | if code == CodeSize::Bits64 && addr == 8 { 0 } else { CHECKED };
}

/// Fills in the memory operand of `i`, if it has one of `OpKind::Memory`. `None`: an address that [`Op`] cannot hold
/// (a 64-bit absolute one beyond 32 bits).
pub fn set_memory(op: &mut Op, i: &Instruction, code: CodeSize) -> Option<()> {
    let base = i.memory_base();
    let index = i.memory_index();
    let addr = address_size(i, code);
    set_segment(op, sreg_number(i.memory_segment()), code, addr);
    let mut disp = i.memory_displacement64();
    op.base = match base {
        Register::None => ZERO,
        Register::RIP | Register::EIP => {
            disp = disp.wrapping_sub(i.len() as u64);
            NEXT_RIP
        }
        r => register_offset(r)?,
    };
    op.index = if index == Register::None { ZERO } else { register_offset(index)? };
    op.scale = i.memory_index_scale().trailing_zeros() as u8;
    op.disp = disp as i32;
    // Truncation to the address size makes any 32-bit displacement right there.
    (addr < 8 || op.disp as i64 as u64 == disp).then_some(())
}

/// Address size in bytes of the instruction's memory operand.
pub fn address_size(i: &Instruction, code: CodeSize) -> u8 {
    for r in [i.memory_base(), i.memory_index()] {
        match r {
            Register::None => {}
            Register::RIP => return 8,
            Register::EIP => return 4,
            r => return r.size() as u8,
        }
    }
    match i.memory_displ_size() {
        n @ (2 | 4 | 8) => n as u8,
        _ => match code {
            CodeSize::Bits16 => 2,
            CodeSize::Bits32 => 4,
            CodeSize::Bits64 => 8,
        },
    }
}

/// Is this operand memory with an explicit address?
pub fn is_memory(kind: OpKind) -> bool {
    kind == OpKind::Memory
}
