//! Exceptions and interrupts: delivery, debug traps, interrupt shadows.

use crate::vp::{Exec, Fault, SoftVp, attention};
use std::sync::atomic::Ordering;
use x86::regs::{dr7, rflags};

/// Which instruction raised a software interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SoftwareKind {
    /// INT n.
    IntN,
    /// INT3.
    Int3,
    /// INTO.
    Into,
    /// INT1 (ICEBP).
    Icebp,
}

/// Delivers a fault at the current instruction (`rip`). After a triple fault the VP is in shutdown.
pub fn deliver(_vp: &mut SoftVp, _fault: Fault) {}

/// Delivers an external interrupt; `rip` is where the interrupted program will go on.
pub fn deliver_interrupt(_vp: &mut SoftVp, _vector: u8) {}

/// Delivers a non-maskable interrupt.
pub fn deliver_nmi(_vp: &mut SoftVp) {}

/// INT n, INT3, INTO, ICEBP: sets `next_rip` to the handler.
pub fn software_interrupt(_vp: &mut SoftVp, _vector: u8, _kind: SoftwareKind) -> Exec {
    Ok(())
}

impl SoftVp {
    /// Holds interrupts back for one instruction (STI; with `mov_ss` debug traps and NMIs too).
    pub fn set_shadow(&mut self, mov_ss: bool) {
        self.s.interrupt_shadow = true;
        self.s.mov_ss_shadow = mov_ss;
        self.s.attention.fetch_or(attention::BOUNDARY, Ordering::Relaxed);
    }

    /// Notes debug conditions (DR6 bits) that trap after the current instruction.
    pub fn raise_debug(&mut self, bits: u64) {
        self.s.pending_debug |= bits;
        self.s.attention.fetch_or(attention::BOUNDARY, Ordering::Relaxed);
    }

    /// Sets or clears [`attention::BOUNDARY`] as the state asks for. Called after RFLAGS, DR7 or shadows changed.
    pub fn update_boundary(&mut self) {
        let s = &self.s;
        let armed =
            s.dr7 & dr7::ENABLES != 0 && (0..4).any(|n| s.dr7 >> (2 * n) & 3 != 0 && s.dr7 >> (16 + 4 * n) & 3 == 0);
        let needed = s.rflags & (rflags::TF | rflags::RF) != 0 || s.interrupt_shadow || s.pending_debug != 0 || armed;
        if needed {
            s.attention.fetch_or(attention::BOUNDARY, Ordering::Relaxed);
        } else {
            s.attention.fetch_and(!attention::BOUNDARY, Ordering::Relaxed);
        }
    }

    /// Everything that happens at the boundary before an instruction, besides interrupts: debug traps of the previous
    /// instruction, instruction breakpoints. `Err`: an exception to deliver instead of the instruction. Only needed
    /// while [`attention::BOUNDARY`] is set.
    pub fn before_instruction(&mut self) -> Exec {
        Ok(())
    }

    /// Everything that happens after an instruction has completed, besides `rip = next_rip`: the shadow ends, RF is
    /// cleared, a single-step trap is noted. `before` is RFLAGS before the instruction, `shadow` whether the shadow
    /// was in force then. Only needed if [`attention::BOUNDARY`] was set before the instruction.
    pub fn after_instruction(&mut self, _before: u64, _shadow: bool) {}
}
