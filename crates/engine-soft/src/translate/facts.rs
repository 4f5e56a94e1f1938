//! What translations of 16- and 32-bit code rely on: sizes, and which segments are flat.
//!
//! Outside 64-bit mode an address is an offset of 16 or 32 bits in a segment. Most code lives in flat segments (base 0,
//! limit 4 GiB, writable), where the offset is the linear address. That a segment is flat is a fact that blocks are
//! made for: it is part of their key ([`super::cache::Key::mode`]). Other segments are not looked at when a block is made:
//! its code adds the base and compares with [`super::JitState::ends`], which [`SoftVp::sync_facts`] keeps in step whenever
//! Rust code has run.

use crate::vp::{CodeSize, SoftVp};
use x86::regs::gpr;
use x86::segment::{Segment, attr, sreg};

/// The facts that a block of 16- or 32-bit code relies on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Facts {
    /// CS.D: operands and addresses have 32 bits unless a prefix says otherwise.
    pub big: bool,
    /// SS.B: the stack pointer is ESP, not SP.
    pub stack32: bool,
    /// Protected mode, and not virtual-8086 mode.
    pub protected: bool,
    /// Segments whose offsets are linear addresses, as a mask by segment number. FS and GS never are.
    pub flat: u8,
    /// Base of CS.
    pub code_base: u32,
    /// Limit of CS.
    pub code_limit: u32,
}

const KIND: u32 = attr::UNUSABLE | attr::P | attr::S | attr::TYPE_CODE;

impl Facts {
    /// Those of the VP now. `None`: 64-bit code.
    pub fn of(vp: &SoftVp) -> Option<Self> {
        if vp.s.code_size == CodeSize::Bits64 {
            return None;
        }
        let protected = vp.protected();
        let code = &vp.s.segments[sreg::CS];
        let mut flat = 0;
        if protected {
            for seg in [sreg::ES, sreg::CS, sreg::SS, sreg::DS] {
                let s = &vp.s.segments[seg];
                flat |= u8::from(s.base == 0 && s.limit == u32::MAX && end(s, seg, true) != 0) << seg;
            }
        }
        Some(Self {
            big: vp.s.code_size == CodeSize::Bits32,
            stack32: vp.s.segments[sreg::SS].attr & attr::DB != 0,
            protected,
            flat,
            code_base: code.base as u32,
            code_limit: code.limit,
        })
    }

    /// Of flat 32-bit code with a flat 32-bit stack.
    #[cfg(test)]
    pub const FLAT32: Self =
        Self { big: true, stack32: true, protected: true, flat: 0xf, code_base: 0, code_limit: u32::MAX };

    /// For the decoder.
    pub fn bits(&self) -> u32 {
        if self.big { 32 } else { 16 }
    }

    /// Is an offset in the segment a linear address that needs no check?
    pub fn is_flat(&self, seg: usize) -> bool {
        self.flat >> seg & 1 != 0
    }

    /// Is EIP the linear address of the code, with no limit to check? Then blocks do not depend on EIP, and processes
    /// that map a file at different addresses share them.
    pub fn code_is_flat(&self) -> bool {
        self.big && self.code_base == 0 && self.code_limit == u32::MAX
    }
}

/// Offset behind the last byte that may be read (and, unless it is CS of protected mode, written); 0: the interpreter
/// is to look at each access.
fn end(s: &Segment, seg: usize, protected: bool) -> u64 {
    let plain = match s.attr & KIND {
        _ if !protected => true,
        k if seg == sreg::CS => k == attr::P | attr::S | attr::TYPE_CODE && s.attr & attr::TYPE_READABLE != 0,
        k => k == attr::P | attr::S && s.attr & (attr::TYPE_WRITABLE | attr::TYPE_EXPAND_DOWN) == attr::TYPE_WRITABLE,
    };
    if plain { u64::from(s.limit) + 1 } else { 0 }
}

impl SoftVp {
    /// Offset of the present page's first byte in the code segment: RIP without the place in its linear page.
    pub(super) fn code_page(&self) -> u64 {
        let page = self.s.rip.wrapping_sub(crate::interp::code_linear(self) & x86::paging::PAGE_MASK);
        if self.s.code_size == CodeSize::Bits64 { page } else { page & 0xffff_ffff }
    }

    /// To be called between Rust code and translated code of 16 or 32 bits. Says whether the facts are as before.
    pub(super) fn sync_facts(&mut self) -> bool {
        let facts = Facts::of(self);
        if facts.is_some() {
            let protected = self.protected();
            for seg in 0..6 {
                let end = end(&self.s.segments[seg], seg, protected);
                self.s.jit.ends[seg] = end;
                self.s.jit.ends16[seg] = end.min(0x1_0000);
            }
            // Translated code relies on what the hardware does with each write of 32 bits; a switch from 64-bit mode leaves the
            // upper halves undefined (SDM volume 1, section 3.4.1.1).
            for g in &mut self.s.gprs[..=gpr::RDI] {
                *g &= 0xffff_ffff;
            }
        }
        let same = facts == self.run.facts;
        self.run.facts = facts;
        same
    }
}
