//! The vector state's image, and the instructions that save and restore it: FXSAVE and XSAVE families, x87 environments.
//!
//! [`crate::vp::VpBlock::xsave`] always holds the whole state in the standard format: a component that XSTATE_BV calls
//! initial has its initial values in its place too. (XSAVE writes it so.) Whoever changes the image by hand goes through
//! this module, which sets XSTATE_BV. FIP and FDP are kept in their 64-bit form; FCS and FDS are always zero
//! (deprecated, CPUID.7.0:EBX bit 13).

use crate::interp::{Handler, Insn};
use crate::native::{self, Unit, check_available, operand};
use crate::segmentation::Want;
use crate::vp::{CodeSize, Exec, Fault, SoftVp, XsaveArea};
use iced_x86::{Code, Mnemonic};
use x86::regs::{cr0, cr4, efer, gpr, rflags, xcr0};
use x86::xsave::{self, legacy};

const XSTATE_BV: usize = xsave::HEADER_OFFSET;
const XCOMP_BV: usize = xsave::HEADER_OFFSET + 8;
const ALL: u64 = xcr0::X87 | xcr0::SSE | xcr0::AVX;
/// XCOMP_BV bit 63: the area is compacted.
const COMPACT: u64 = 1 << 63;

/// Reads 16 bits of the image.
pub fn get_u16(image: &XsaveArea, at: usize) -> u16 {
    u16::from_le_bytes([image.0[at], image.0[at + 1]])
}
/// Reads 32 bits of the image.
pub fn get_u32(image: &XsaveArea, at: usize) -> u32 {
    u32::from(get_u16(image, at)) | u32::from(get_u16(image, at + 2)) << 16
}
/// Reads 64 bits of the image.
pub fn get_u64(image: &XsaveArea, at: usize) -> u64 {
    u64::from(get_u32(image, at)) | u64::from(get_u32(image, at + 4)) << 32
}
fn put(image: &mut XsaveArea, at: usize, bytes: &[u8]) {
    image.0[at..at + bytes.len()].copy_from_slice(bytes);
}

/// Components that are not (known to be) in their initial state.
pub fn in_use(image: &XsaveArea) -> u64 {
    get_u64(image, XSTATE_BV) & ALL
}
fn set_in_use(image: &mut XsaveArea, components: u64) {
    put(image, XSTATE_BV, &(components & ALL & native::host_components().max(1)).to_le_bytes());
}

/// A vector register.
pub fn ymm(image: &XsaveArea, n: usize) -> [u8; 32] {
    let mut value = [0; 32];
    value[..16].copy_from_slice(&image.0[legacy::XMM0 + 16 * n..][..16]);
    value[16..].copy_from_slice(&image.0[xsave::AVX_OFFSET + 16 * n..][..16]);
    value
}
/// Writes a vector register.
pub fn set_ymm(image: &mut XsaveArea, n: usize, value: &[u8; 32]) {
    put(image, legacy::XMM0 + 16 * n, &value[..16]);
    put(image, xsave::AVX_OFFSET + 16 * n, &value[16..]);
    set_in_use(image, in_use(image) | xcr0::SSE | xcr0::AVX);
}
/// The low half of a vector register.
pub fn xmm(image: &XsaveArea, n: usize) -> u128 {
    let at = legacy::XMM0 + 16 * n;
    u128::from(get_u64(image, at)) | u128::from(get_u64(image, at + 8)) << 64
}
/// Writes the low half of a vector register.
pub fn set_xmm(image: &mut XsaveArea, n: usize, value: u128) {
    put(image, legacy::XMM0 + 16 * n, &value.to_le_bytes());
    set_in_use(image, in_use(image) | xcr0::SSE);
}

/// What an MMX instruction does to the x87 state besides its operands: TOP is zeroed and all registers become valid.
pub fn enter_mmx(image: &mut XsaveArea) {
    let top = usize::from(get_u16(image, legacy::FSW) >> 11 & 7);
    // Registers are stored by their position relative to TOP.
    let mut registers = [[0; 16]; 8];
    for (n, r) in registers.iter_mut().enumerate() {
        r.copy_from_slice(&image.0[legacy::ST0 + 16 * ((n + 8 - top) & 7)..][..16]);
    }
    for (n, r) in registers.iter().enumerate() {
        put(image, legacy::ST0 + 16 * n, r);
    }
    let fsw = get_u16(image, legacy::FSW) & !0x3800;
    put(image, legacy::FSW, &fsw.to_le_bytes());
    image.0[legacy::FTW] = 0xff;
    set_in_use(image, in_use(image) | xcr0::X87);
}

/// Pointers to the last x87 instruction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pointers {
    /// Its address.
    pub fip: u64,
    /// Its memory operand's address.
    pub fdp: u64,
    /// Its opcode (11 bits).
    pub fop: u16,
}

/// Reads the pointers.
pub fn pointers(image: &XsaveArea) -> Pointers {
    Pointers { fip: get_u64(image, legacy::FIP), fdp: get_u64(image, legacy::FDP), fop: get_u16(image, legacy::FOP) }
}
/// Writes the pointers (after XSAVE has put the host's there).
pub fn set_pointers(image: &mut XsaveArea, p: Pointers) {
    put(image, legacy::FIP, &p.fip.to_le_bytes());
    put(image, legacy::FDP, &p.fdp.to_le_bytes());
    put(image, legacy::FOP, &p.fop.to_le_bytes());
    if p != Pointers::default() {
        set_in_use(image, in_use(image) | xcr0::X87);
    }
}

/// Puts components into their initial state.
fn initialise(image: &mut XsaveArea, components: u64) {
    if components & xcr0::X87 != 0 {
        image.0[..legacy::MXCSR].fill(0);
        image.0[legacy::ST0..legacy::XMM0].fill(0);
        put(image, legacy::FCW, &xsave::FCW_INIT.to_le_bytes());
    }
    if components & xcr0::SSE != 0 {
        image.0[legacy::XMM0..legacy::XMM0 + 256].fill(0);
    }
    if components & xcr0::AVX != 0 {
        image.0[xsave::AVX_OFFSET..].fill(0);
    }
    set_in_use(image, in_use(image) & !components);
}

/// Takes an image of foreign origin (saved state): components that its XSTATE_BV calls initial get their initial values,
/// everything that the host's XRSTOR would refuse is cleaned. Bytes beyond the image are zero.
pub fn import(saved: &[u8]) -> XsaveArea {
    let mut image = XsaveArea([0; xsave::AREA_SIZE]);
    let len = saved.len().min(xsave::AREA_SIZE);
    image.0[..len].copy_from_slice(&saved[..len]);
    let used = in_use(&image);
    image.0[xsave::HEADER_OFFSET..xsave::AVX_OFFSET].fill(0);
    set_in_use(&mut image, used);
    let used = in_use(&image);
    initialise(&mut image, !used & ALL);
    let mxcsr = get_u32(&image, legacy::MXCSR) & xsave::MXCSR_MASK;
    put(&mut image, legacy::MXCSR, &mxcsr.to_le_bytes());
    put(&mut image, legacy::MXCSR_MASK, &xsave::MXCSR_MASK.to_le_bytes());
    image
}

/// The image as saved state.
pub fn export(image: &XsaveArea) -> Vec<u8> {
    let mut saved = image.0.to_vec();
    saved[legacy::MXCSR_MASK..legacy::MXCSR_MASK + 4].copy_from_slice(&xsave::MXCSR_MASK.to_le_bytes());
    saved
}

/// What executes this instruction, if it belongs here.
pub fn handler(i: &iced_x86::Instruction) -> Option<Handler> {
    use Mnemonic as M;
    Some(match i.mnemonic() {
        M::Ldmxcsr => |vp, i| load_mxcsr(vp, i, Unit::Sse),
        M::Vldmxcsr => |vp, i| load_mxcsr(vp, i, Unit::Avx),
        M::Stmxcsr => |vp, i| store_mxcsr(vp, i, Unit::Sse),
        M::Vstmxcsr => |vp, i| store_mxcsr(vp, i, Unit::Avx),
        M::Fxsave | M::Fxsave64 => fxsave,
        M::Fxrstor | M::Fxrstor64 => fxrstor,
        M::Xsave | M::Xsave64 => |vp, i| save(vp, i, Form::Standard),
        M::Xsaveopt | M::Xsaveopt64 => |vp, i| save(vp, i, Form::Optimised),
        M::Xsavec | M::Xsavec64 => |vp, i| save(vp, i, Form::Compact),
        M::Xsaves | M::Xsaves64 => |vp, i| save(vp, i, Form::Supervisor),
        M::Xrstor | M::Xrstor64 => |vp, i| restore(vp, i, false),
        M::Xrstors | M::Xrstors64 => |vp, i| restore(vp, i, true),
        M::Fnstenv => store_environment,
        M::Fldenv => load_environment,
        M::Fnsave => store_all,
        M::Frstor => load_all,
        _ => return None,
    })
}

fn load_mxcsr(vp: &mut SoftVp, insn: &Insn, unit: Unit) -> Exec {
    check_available(vp, unit)?;
    let address = operand::linear(vp, insn, 4, Want::Read)?;
    let value = vp.read_u32(address)?;
    if value & !xsave::MXCSR_MASK != 0 {
        return Err(Fault::GP0);
    }
    put(&mut vp.s.xsave, legacy::MXCSR, &value.to_le_bytes());
    Ok(())
}

fn store_mxcsr(vp: &mut SoftVp, insn: &Insn, unit: Unit) -> Exec {
    check_available(vp, unit)?;
    let address = operand::linear(vp, insn, 4, Want::Write)?;
    vp.write_u32(address, get_u32(&vp.s.xsave, legacy::MXCSR))
}

/// XMM and YMM registers that the mode can name: 8 outside 64-bit mode.
fn register_count(vp: &SoftVp) -> usize {
    if vp.s.code_size == CodeSize::Bits64 { 16 } else { 8 }
}

/// The x87 part of the legacy region, as memory shows it: with 64-bit pointers or with selector and offset.
fn x87_header(image: &XsaveArea, wide: bool) -> [u8; 24] {
    let mut bytes = [0; 24];
    bytes.copy_from_slice(&image.0[..24]);
    bytes[5] = 0;
    if !wide {
        bytes[12..16].fill(0);
        bytes[20..24].fill(0);
    }
    bytes
}

/// Loads the x87 part of a legacy region.
fn set_x87(image: &mut XsaveArea, area: &[u8], wide: bool) {
    put(image, 0, &area[..24]);
    image.0[5] = 0;
    // Reserved bits of the control word; ES and B follow from the exceptions that are flagged and not masked.
    let fcw = u16::from_le_bytes([area[0], area[1]]) & 0x1f3f | 0x40;
    let fsw = u16::from_le_bytes([area[2], area[3]]) & 0x7f7f;
    let pending = if fsw & !fcw & 0x3f != 0 { 0x8080 } else { 0 };
    put(image, legacy::FCW, &fcw.to_le_bytes());
    put(image, legacy::FSW, &(fsw | pending).to_le_bytes());
    if !wide {
        image.0[12..16].fill(0);
        image.0[20..24].fill(0);
    }
    for n in 0..8 {
        let at = legacy::ST0 + 16 * n;
        put(image, at, &area[at..at + 10]);
        image.0[at + 10..at + 16].fill(0);
    }
    set_in_use(image, in_use(image) | xcr0::X87);
}

fn check_fx(vp: &SoftVp) -> Exec {
    if vp.s.cr0 & (cr0::EM | cr0::TS) != 0 { Err(Fault::NM) } else { Ok(()) }
}

/// Does FXSAVE leave the XMM registers out (APM volume 2, section 3.1.7, FFXSR)?
fn fast_fx(vp: &SoftVp) -> bool {
    vp.s.efer & efer::FFXSR != 0 && vp.s.cpl == 0 && vp.s.code_size == CodeSize::Bits64
}

fn fxsave(vp: &mut SoftVp, insn: &Insn) -> Exec {
    check_fx(vp)?;
    let address = operand::linear(vp, insn, xsave::LEGACY_SIZE, Want::Write)?;
    if address & 15 != 0 {
        return Err(Fault::GP0);
    }
    let wide = insn.iced.mnemonic() == Mnemonic::Fxsave64;
    let xmm_end = if fast_fx(vp) { legacy::XMM0 } else { legacy::XMM0 + 16 * register_count(vp) };
    let image = &vp.s.xsave;
    let mut area = [0; xsave::LEGACY_SIZE];
    area[..24].copy_from_slice(&x87_header(image, wide));
    area[24..xmm_end].copy_from_slice(&image.0[24..xmm_end]);
    area[legacy::MXCSR_MASK..legacy::ST0].copy_from_slice(&xsave::MXCSR_MASK.to_le_bytes());
    // All 512 bytes must be writable, those that stay as they are too.
    vp.probe_write(address, xsave::LEGACY_SIZE)?;
    vp.write_bytes(address, &area[..xmm_end])
}

fn fxrstor(vp: &mut SoftVp, insn: &Insn) -> Exec {
    check_fx(vp)?;
    let address = operand::linear(vp, insn, xsave::LEGACY_SIZE, Want::Read)?;
    if address & 15 != 0 {
        return Err(Fault::GP0);
    }
    let mut area = [0; xsave::LEGACY_SIZE];
    vp.read_bytes(address, &mut area)?;
    let mxcsr = u32::from_le_bytes([area[24], area[25], area[26], area[27]]);
    if mxcsr & !xsave::MXCSR_MASK != 0 {
        return Err(Fault::GP0);
    }
    let wide = insn.iced.mnemonic() == Mnemonic::Fxrstor64;
    let (fast, count) = (fast_fx(vp), register_count(vp));
    let image = &mut vp.s.xsave;
    set_x87(image, &area, wide);
    put(image, legacy::MXCSR, &mxcsr.to_le_bytes());
    if !fast {
        put(image, legacy::XMM0, &area[legacy::XMM0..legacy::XMM0 + 16 * count]);
        set_in_use(image, in_use(image) | xcr0::SSE);
    }
    Ok(())
}

/// The saving instructions (SDM volume 1, sections 13.7, 13.9, 13.10, 13.11).
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    Standard,
    Optimised,
    Compact,
    Supervisor,
}

/// Checks common to the family; gives the requested-feature bitmap and whether the form is the 64-bit one.
fn requested(vp: &SoftVp, insn: &Insn, supervisor: bool) -> Exec<(u64, bool)> {
    if vp.s.cr4 & cr4::OSXSAVE == 0 {
        return Err(Fault::UD);
    }
    if vp.s.cr0 & cr0::TS != 0 {
        return Err(Fault::NM);
    }
    if supervisor && vp.s.cpl != 0 {
        return Err(Fault::GP0);
    }
    let asked = vp.s.gprs[gpr::RDX] << 32 | vp.s.gprs[gpr::RAX] & 0xffff_ffff;
    use Code as C;
    let wide = matches!(
        insn.iced.code(),
        C::Xsave64_mem | C::Xsaveopt64_mem | C::Xsavec64_mem | C::Xsaves64_mem | C::Xrstor64_mem | C::Xrstors64_mem
    );
    Ok((asked & vp.s.xcr0 & ALL, wide))
}

fn area_address(vp: &mut SoftVp, insn: &Insn, rfbm: u64, want: Want) -> Exec<(u64, usize)> {
    let size = if rfbm & xcr0::AVX != 0 { xsave::AREA_SIZE } else { xsave::AVX_OFFSET };
    let address = operand::linear(vp, insn, size, want)?;
    if address & 63 != 0 {
        return Err(Fault::GP0);
    }
    Ok((address, size))
}

fn save(vp: &mut SoftVp, insn: &Insn, form: Form) -> Exec {
    let (rfbm, wide) = requested(vp, insn, form == Form::Supervisor)?;
    let (address, size) = area_address(vp, insn, rfbm, Want::Write)?;
    vp.probe_write(address, size)?;
    let compact = matches!(form, Form::Compact | Form::Supervisor);
    let mut used = in_use(&vp.s.xsave);
    let mxcsr = get_u32(&vp.s.xsave, legacy::MXCSR);
    if compact && mxcsr != xsave::MXCSR_INIT {
        used |= xcr0::SSE;
    }
    // Components that are written: all requested ones by XSAVE, those in use by the others.
    let written = if form == Form::Standard { rfbm } else { rfbm & used };
    if written & xcr0::X87 != 0 {
        let header = x87_header(&vp.s.xsave, wide);
        let registers: [u8; 128] = part(&vp.s.xsave, legacy::ST0);
        vp.write_bytes(address, &header)?;
        vp.write_bytes(address.wrapping_add(legacy::ST0 as u64), &registers)?;
    }
    let mxcsr_saved = if compact { written & xcr0::SSE != 0 } else { rfbm & (xcr0::SSE | xcr0::AVX) != 0 };
    if mxcsr_saved {
        vp.write_u32(address.wrapping_add(legacy::MXCSR as u64), mxcsr)?;
        vp.write_u32(address.wrapping_add(legacy::MXCSR_MASK as u64), xsave::MXCSR_MASK)?;
    }
    let bytes = 16 * register_count(vp);
    if written & xcr0::SSE != 0 {
        let registers: [u8; 256] = part(&vp.s.xsave, legacy::XMM0);
        vp.write_bytes(address.wrapping_add(legacy::XMM0 as u64), &registers[..bytes])?;
    }
    if written & xcr0::AVX != 0 {
        let registers: [u8; 256] = part(&vp.s.xsave, xsave::AVX_OFFSET);
        vp.write_bytes(address.wrapping_add(xsave::AVX_OFFSET as u64), &registers[..bytes])?;
    }
    if compact {
        vp.write_u64(address.wrapping_add(XSTATE_BV as u64), used & rfbm)?;
        vp.write_u64(address.wrapping_add(XCOMP_BV as u64), rfbm | COMPACT)
    } else {
        let old = vp.read_u64(address.wrapping_add(XSTATE_BV as u64))?;
        vp.write_u64(address.wrapping_add(XSTATE_BV as u64), old & !rfbm | used & rfbm)
    }
}

fn part<const N: usize>(image: &XsaveArea, at: usize) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.copy_from_slice(&image.0[at..at + N]);
    bytes
}

fn restore(vp: &mut SoftVp, insn: &Insn, supervisor: bool) -> Exec {
    let (rfbm, wide) = requested(vp, insn, supervisor)?;
    let (address, size) = area_address(vp, insn, rfbm, Want::Read)?;
    let mut area = [0; xsave::AREA_SIZE];
    vp.read_bytes(address, &mut area[..size])?;
    let word = |at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&area[at..at + 8]);
        u64::from_le_bytes(bytes)
    };
    let (stored, layout) = (word(XSTATE_BV), word(XCOMP_BV));
    let compact = layout & COMPACT != 0;
    let reserved = &area[xsave::HEADER_OFFSET + 16..xsave::AVX_OFFSET];
    let valid = if compact {
        layout & !COMPACT & !vp.s.xcr0 == 0 && stored & !layout == 0 && reserved.iter().all(|b| *b == 0)
    } else {
        // SDM volume 1, section 13.8.1: bytes 8 to 23 of the header must be zero.
        !supervisor && layout == 0 && stored & !vp.s.xcr0 == 0 && reserved[..8].iter().all(|b| *b == 0)
    };
    if !valid {
        return Err(Fault::GP0);
    }
    let loads = rfbm & stored;
    let mxcsr = u32::from_le_bytes([area[24], area[25], area[26], area[27]]);
    let mxcsr_loaded = if compact { loads & xcr0::SSE != 0 } else { rfbm & (xcr0::SSE | xcr0::AVX) != 0 };
    if mxcsr_loaded && mxcsr & !xsave::MXCSR_MASK != 0 {
        return Err(Fault::GP0);
    }
    let bytes = 16 * register_count(vp);
    let image = &mut vp.s.xsave;
    // Registers that the mode does not have keep their values, also where a component gets its initial ones.
    let beyond = [legacy::XMM0 + 128, xsave::AVX_OFFSET + 128].map(|at| (at, part::<128>(image, at)));
    initialise(image, rfbm & !stored);
    if bytes == 128 {
        for ((at, kept), component) in beyond.iter().zip([xcr0::SSE, xcr0::AVX]) {
            if kept.iter().any(|b| *b != 0) {
                put(image, *at, kept);
                set_in_use(image, in_use(image) | component);
            }
        }
    }
    if mxcsr_loaded {
        put(image, legacy::MXCSR, &mxcsr.to_le_bytes());
    } else if compact && rfbm & xcr0::SSE != 0 {
        put(image, legacy::MXCSR, &xsave::MXCSR_INIT.to_le_bytes());
    }
    if loads & xcr0::X87 != 0 {
        set_x87(image, &area, wide);
    }
    if loads & xcr0::SSE != 0 {
        put(image, legacy::XMM0, &area[legacy::XMM0..][..bytes]);
        set_in_use(image, in_use(image) | xcr0::SSE);
    }
    if loads & xcr0::AVX != 0 {
        put(image, xsave::AVX_OFFSET, &area[xsave::AVX_OFFSET..][..bytes]);
        set_in_use(image, in_use(image) | xcr0::AVX);
    }
    Ok(())
}

/// The full tag word from the abridged one and the registers (SDM volume 1, section 10.5.1.1).
fn full_tags(image: &XsaveArea) -> u16 {
    let top = usize::from(get_u16(image, legacy::FSW) >> 11 & 7);
    let mut tags = 0;
    for physical in 0..8 {
        let tag = if image.0[legacy::FTW] >> physical & 1 == 0 {
            3
        } else {
            let at = legacy::ST0 + 16 * ((physical + 8 - top) & 7);
            let (mantissa, exponent) = (get_u64(image, at), get_u16(image, at + 8) & 0x7fff);
            match (exponent, mantissa) {
                (0, 0) => 1,
                (0 | 0x7fff, _) => 2,
                (_, m) if m >> 63 == 0 => 2,
                _ => 0,
            }
        };
        tags |= tag << (2 * physical);
    }
    tags
}

/// How the environment lies in memory (SDM volume 1, figures 8-9 to 8-12).
#[derive(Clone, Copy)]
struct EnvironmentForm {
    wide: bool,
    real: bool,
}

impl EnvironmentForm {
    fn of(vp: &SoftVp, insn: &Insn) -> Self {
        use Code as C;
        let wide = matches!(
            insn.iced.code(),
            C::Fnstenv_m28byte | C::Fldenv_m28byte | C::Fnsave_m108byte | C::Frstor_m108byte
        );
        Self { wide, real: vp.s.cr0 & cr0::PE == 0 || vp.s.rflags & rflags::VM != 0 }
    }
    fn size(self) -> usize {
        if self.wide { 28 } else { 14 }
    }
    /// The seven words.
    fn store(self, image: &XsaveArea) -> [u8; 28] {
        let p = pointers(image);
        let (fip, fdp, fop) = (p.fip as u32, p.fdp as u32, u32::from(p.fop & 0x7ff));
        let (fcw, fsw) = (get_u16(image, legacy::FCW), get_u16(image, legacy::FSW));
        let control = [fcw, fsw, full_tags(image)].map(|w| u32::from(w) | 0xffff_0000);
        let rest = match (self.real, self.wide) {
            (false, true) => [fip, fop << 16, fdp, 0xffff_0000],
            (false, false) => [fip, 0, fdp, 0],
            (true, true) => {
                [fip & 0xffff | 0xffff_0000, (fip >> 16) << 12 | fop, fdp & 0xffff | 0xffff_0000, (fdp >> 16) << 12]
            }
            (true, false) => [fip, (fip >> 16 & 0xf) << 12 | fop, fdp, (fdp >> 16 & 0xf) << 12],
        };
        let mut bytes = [0; 28];
        for (n, word) in control.into_iter().chain(rest).enumerate() {
            if self.wide {
                bytes[4 * n..4 * n + 4].copy_from_slice(&word.to_le_bytes());
            } else {
                bytes[2 * n..2 * n + 2].copy_from_slice(&(word as u16).to_le_bytes());
            }
        }
        bytes
    }
    fn load(self, image: &mut XsaveArea, bytes: &[u8]) {
        let word = |n: usize| {
            if self.wide {
                u32::from_le_bytes([bytes[4 * n], bytes[4 * n + 1], bytes[4 * n + 2], bytes[4 * n + 3]])
            } else {
                u32::from(u16::from_le_bytes([bytes[2 * n], bytes[2 * n + 1]]))
            }
        };
        let (fcw, mut fsw, tags) = (word(0) as u16, word(1) as u16, word(2) as u16);
        // ES and B follow from the flags and masks.
        fsw &= !0x8080;
        if fsw & !fcw & 0x3f != 0 {
            fsw |= 0x8080;
        }
        let p = match (self.real, self.wide) {
            (false, true) => Pointers { fip: word(3).into(), fdp: word(5).into(), fop: (word(4) >> 16) as u16 & 0x7ff },
            (false, false) => Pointers { fip: word(3).into(), fdp: word(5).into(), fop: 0 },
            (true, _) => Pointers {
                fip: (word(3) & 0xffff | (word(4) >> 12) << 16).into(),
                fdp: (word(5) & 0xffff | (word(6) >> 12) << 16).into(),
                fop: word(4) as u16 & 0x7ff,
            },
        };
        let abridged = (0..8).fold(0u8, |a, n| a | u8::from(tags >> (2 * n) & 3 != 3) << n);
        // Bit 6 of the control word always reads as one, bits 7, 13-15 as zero.
        put(image, legacy::FCW, &(fcw & 0x1f7f | 0x40).to_le_bytes());
        put(image, legacy::FSW, &fsw.to_le_bytes());
        put(image, legacy::FTW, &[abridged, 0]);
        set_pointers(image, p);
        set_in_use(image, in_use(image) | xcr0::X87);
    }
}

fn store_environment(vp: &mut SoftVp, insn: &Insn) -> Exec {
    check_available(vp, Unit::X87)?;
    let form = EnvironmentForm::of(vp, insn);
    let address = operand::linear(vp, insn, form.size(), Want::Write)?;
    let bytes = form.store(&vp.s.xsave);
    vp.write_bytes(address, &bytes[..form.size()])?;
    // All exceptions are masked afterwards, and nothing is pending.
    let image = &mut vp.s.xsave;
    put(image, legacy::FCW, &(get_u16(image, legacy::FCW) | 0x3f).to_le_bytes());
    put(image, legacy::FSW, &(get_u16(image, legacy::FSW) & !0x8080).to_le_bytes());
    set_in_use(image, in_use(image) | xcr0::X87);
    Ok(())
}

fn check_pending(vp: &SoftVp) -> Exec {
    if get_u16(&vp.s.xsave, legacy::FSW) & 0x80 != 0 {
        return Err(Fault::Exception { vector: x86::exception::MF, error: 0 });
    }
    Ok(())
}

fn load_environment(vp: &mut SoftVp, insn: &Insn) -> Exec {
    check_available(vp, Unit::X87)?;
    check_pending(vp)?;
    let form = EnvironmentForm::of(vp, insn);
    let address = operand::linear(vp, insn, form.size(), Want::Read)?;
    let mut bytes = [0; 28];
    vp.read_bytes(address, &mut bytes[..form.size()])?;
    load_keeping_registers(&mut vp.s.xsave, form, &bytes);
    Ok(())
}

/// Loads an environment; the register contents stay where they physically are although TOP changes.
fn load_keeping_registers(image: &mut XsaveArea, form: EnvironmentForm, bytes: &[u8]) {
    let top = |image: &XsaveArea| usize::from(get_u16(image, legacy::FSW) >> 11 & 7);
    let (before, registers) = (top(image), part::<128>(image, legacy::ST0));
    form.load(image, bytes);
    let after = top(image);
    for n in 0..8 {
        let physical = (n + after) & 7;
        let from = (physical + 8 - before) & 7;
        put(image, legacy::ST0 + 16 * n, &registers[16 * from..16 * from + 16]);
    }
}

fn store_all(vp: &mut SoftVp, insn: &Insn) -> Exec {
    check_available(vp, Unit::X87)?;
    let form = EnvironmentForm::of(vp, insn);
    let size = form.size() + 80;
    let address = operand::linear(vp, insn, size, Want::Write)?;
    let mut area = [0; 108];
    area[..28].copy_from_slice(&form.store(&vp.s.xsave));
    for n in 0..8 {
        let at = legacy::ST0 + 16 * n;
        area[form.size() + 10 * n..][..10].copy_from_slice(&vp.s.xsave.0[at..at + 10]);
    }
    vp.write_bytes(address, &area[..size])?;
    // FNINIT does not touch the registers' contents, but they are all empty: XSAVE may show them either way.
    initialise(&mut vp.s.xsave, xcr0::X87);
    Ok(())
}

fn load_all(vp: &mut SoftVp, insn: &Insn) -> Exec {
    check_available(vp, Unit::X87)?;
    check_pending(vp)?;
    let form = EnvironmentForm::of(vp, insn);
    let size = form.size() + 80;
    let address = operand::linear(vp, insn, size, Want::Read)?;
    let mut area = [0; 108];
    vp.read_bytes(address, &mut area[..size])?;
    let image = &mut vp.s.xsave;
    form.load(image, &area);
    for n in 0..8 {
        let at = legacy::ST0 + 16 * n;
        put(image, at, &area[form.size() + 10 * n..][..10]);
        image.0[at + 10..at + 16].fill(0);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn import_cleans_what_xrstor_would_refuse() {
        let mut saved = vec![0xff; xsave::AREA_SIZE];
        saved[XSTATE_BV..XSTATE_BV + 8].copy_from_slice(&xcr0::SSE.to_le_bytes());
        let image = import(&saved);
        assert_eq!(get_u16(&image, legacy::FCW), xsave::FCW_INIT, "x87 was initial");
        assert_eq!(image.0[xsave::AVX_OFFSET..], [0; 256], "AVX was initial");
        assert_eq!(xmm(&image, 15), u128::MAX, "SSE was not");
        assert_eq!(get_u32(&image, legacy::MXCSR), 0xffff);
        assert!(image.0[XCOMP_BV..xsave::AVX_OFFSET].iter().all(|b| *b == 0));
    }

    #[test]
    fn environment_round_trip() {
        let mut image = import(&[]);
        put(&mut image, legacy::FSW, &0x2800u16.to_le_bytes());
        image.0[legacy::FTW] = 0b0010_0000;
        put(&mut image, legacy::ST0 + 8, &0x3fffu16.to_le_bytes());
        put(&mut image, legacy::ST0, &(1u64 << 63).to_le_bytes());
        set_pointers(&mut image, Pointers { fip: 0x1_2345, fdp: 0xabcd, fop: 0x123 });
        assert_eq!(full_tags(&image), 0xf3ff, "register 5 is valid, the others empty");
        for (wide, real) in [(false, true), (true, true), (true, false)] {
            let form = EnvironmentForm { wide, real };
            let bytes = form.store(&image);
            let mut other = import(&[]);
            load_keeping_registers(&mut other, form, &bytes);
            assert_eq!(other.0[..24], image.0[..24], "wide {wide}, real {real}");
        }
    }
}
