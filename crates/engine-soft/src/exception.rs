//! Exceptions and interrupts: delivery through IVT and IDT (SDM volume 3, chapter 6; section 20.3 for virtual-8086
//! mode; section 6.14 for long mode), and what a delivery does to debug registers and shadows.

use crate::segmentation::{is_null, selector_error};
use crate::stats::Count;
use crate::vp::{Exec, Fault, SoftVp, attention};
use partition::Activity;
use std::sync::atomic::Ordering;
use x86::exception::{self as vector, has_error_code};
use x86::paging::is_canonical;
use x86::regs::gpr::RSP;
use x86::regs::{cr0, dr7, rflags};
use x86::segment::{Segment, attr, sreg};

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

/// What is delivered.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Event {
    pub(crate) vector: u8,
    /// Error code to push (protected mode only).
    pub(crate) error: Option<u32>,
    /// Raised by INT n, INT3 or INTO: the gate's DPL counts, and faults during delivery have EXT clear.
    pub(crate) software: bool,
    /// Where the handler returns to.
    pub(crate) return_rip: u64,
    /// RFLAGS to push.
    pub(crate) flags: u64,
}

/// Delivers a fault at the current instruction (`rip`), with the rules for faults during delivery (SDM volume 3, table
/// 6-5). After a triple fault the VP is in shutdown. [`Fault::Restart`] is not delivered.
///
/// For #DB, the conditions in `pending_debug` move to DR6.
pub fn deliver(vp: &mut SoftVp, fault: Fault) {
    let Some((number, error)) = note(vp, fault) else { return };
    vp.counts.add(if number == vector::PF { Count::PageFaults } else { Count::Exceptions }, 1);
    vp.run.user_exits += u64::from(vp.s.cpl == 3);
    deliver_exception(vp, number, error);
}

/// Delivers an exception whose error code is known already (from a loaded state).
pub fn deliver_exception(vp: &mut SoftVp, number: u8, error: u32) {
    let mut current = number;
    let mut error = error;
    loop {
        let fault_class = !matches!(current, vector::DB | vector::BP | vector::OF | vector::DF);
        let event = Event {
            vector: current,
            error: has_error_code(current).then_some(error),
            software: false,
            return_rip: vp.s.rip,
            flags: if fault_class { vp.s.rflags | rflags::RF } else { vp.s.rflags },
        };
        let Err(second) = inject(vp, &event) else { return };
        match escalate(vp, current, second) {
            Some((v, e)) => (current, error) = (v, e),
            None => return,
        }
    }
}

/// Delivers an external interrupt; `rip` is where the interrupted program will go on.
pub fn deliver_interrupt(vp: &mut SoftVp, number: u8) {
    let event = Event { vector: number, error: None, software: false, return_rip: vp.s.rip, flags: vp.s.rflags };
    // Faults of an interrupt's delivery are delivered as any: an interrupt is benign.
    if let Err(fault) = inject(vp, &event) {
        deliver(vp, fault);
    }
}

/// Delivers a non-maskable interrupt: no other is taken until IRET.
pub fn deliver_nmi(vp: &mut SoftVp) {
    vp.s.nmi_masked = true;
    deliver_interrupt(vp, vector::NMI);
}

/// INT n, INT3, INTO, ICEBP: sets `next_rip` to the handler.
pub fn software_interrupt(vp: &mut SoftVp, number: u8, kind: SoftwareKind) -> Exec {
    if kind == SoftwareKind::IntN && vp.v86() {
        if vp.v86_redirect(number)? {
            return Ok(());
        }
        if vp.iopl() < 3 {
            return Err(Fault::GP0);
        }
    }
    let event = Event {
        vector: number,
        error: None,
        software: kind != SoftwareKind::Icebp,
        return_rip: vp.s.next_rip,
        flags: vp.s.rflags,
    };
    inject(vp, &event)
}

/// Turns a fault into vector and error code, and records CR2 and DR6. `None`: nothing to deliver.
fn note(vp: &mut SoftVp, fault: Fault) -> Option<(u8, u32)> {
    match fault {
        Fault::Exception { vector: vector::DB, .. } => {
            vp.s.dr6 = (vp.s.dr6 & !0xf) | vp.s.pending_debug;
            vp.s.pending_debug = 0;
            vp.s.dr7 &= !dr7::GD;
            Some((vector::DB, 0))
        }
        Fault::Exception { vector, error } => Some((vector, error)),
        Fault::Page { address, error } => {
            vp.s.cr2 = address;
            Some((vector::PF, error))
        }
        Fault::Restart => None,
    }
}

/// What follows a fault during the delivery of `first`. `None`: shutdown.
fn escalate(vp: &mut SoftVp, first: u8, second: Fault) -> Option<(u8, u32)> {
    let (next, error) = note(vp, second)?;
    let contributory = |v| matches!(v, vector::DE | vector::TS | vector::NP | vector::SS | vector::GP);
    if first == vector::DF && (contributory(next) || next == vector::PF) {
        vp.activity = Activity::Shutdown;
        vp.s.attention.fetch_or(attention::KICK, Ordering::SeqCst);
        return None;
    }
    let double = (contributory(first) && contributory(next))
        || (first == vector::PF && (contributory(next) || next == vector::PF));
    Some(if double { (vector::DF, 0) } else { (next, error) })
}

/// Delivers an event: everything is checked and the frame is written before a register changes. Sets `rip` and
/// `next_rip` to the handler.
pub(crate) fn inject(vp: &mut SoftVp, event: &Event) -> Exec {
    let result = if vp.s.cr0 & cr0::PE == 0 {
        vp.inject_real(event)
    } else if vp.long_mode() {
        vp.inject_long(event)
    } else {
        vp.inject_protected(event)
    };
    match result {
        Ok(()) => {
            vp.s.interrupt_shadow = false;
            vp.s.mov_ss_shadow = false;
            vp.update_boundary();
            Ok(())
        }
        // EXT: the event was not the program's own doing (SDM volume 3, section 6.13).
        Err(Fault::Exception { vector, error })
            if !event.software && matches!(vector, vector::TS | vector::NP | vector::SS | vector::GP) =>
        {
            Err(Fault::Exception { vector, error: error | 1 })
        }
        Err(fault) => Err(fault),
    }
}

/// Writes a frame onto a stack that is not (yet) in SS:RSP.
pub(crate) struct Frame {
    stack: Segment,
    /// Stack pointer so far.
    pub(crate) sp: u64,
    mask: u64,
    /// Privilege level of the writes.
    cpl: u8,
    /// Long mode: no limits, canonical addresses.
    long: bool,
    /// What a write outside the stack segment raises.
    fault: Fault,
}

impl Frame {
    /// A frame on a legacy stack. `fault` is what leaving the segment raises.
    pub(crate) fn legacy(stack: Segment, sp: u64, cpl: u8, fault: Fault) -> Self {
        let mask = if stack.attr & attr::DB != 0 { 0xffff_ffff } else { 0xffff };
        Self { stack, sp: sp & mask, mask, cpl, long: false, fault }
    }

    /// A frame of 64-bit mode.
    pub(crate) fn long(sp: u64, cpl: u8) -> Self {
        Self { stack: Segment::default(), sp, mask: u64::MAX, cpl, long: true, fault: Fault::SS0 }
    }

    /// Pushes 2, 4 or 8 bytes.
    pub(crate) fn push(&mut self, vp: &mut SoftVp, value: u64, size: usize) -> Exec {
        let sp = self.sp.wrapping_sub(size as u64) & self.mask;
        let la = if self.long {
            if !is_canonical(sp) || !is_canonical(sp.wrapping_add(size as u64 - 1)) {
                return Err(self.fault);
            }
            sp
        } else {
            if !stack_holds(&self.stack, sp, size) {
                return Err(self.fault);
            }
            self.stack.base.wrapping_add(sp) & 0xffff_ffff
        };
        vp.write_at_cpl(la, value, size, self.cpl)?;
        self.sp = sp;
        Ok(())
    }

    /// RSP after the pushes: a 16-bit stack keeps the upper bits of `old`.
    pub(crate) fn rsp(&self, old: u64) -> u64 {
        if self.mask == 0xffff { (old & !0xffff) | self.sp } else { self.sp }
    }
}

/// Are these bytes inside a stack segment's limit?
fn stack_holds(stack: &Segment, sp: u64, size: usize) -> bool {
    let last = sp + size as u64 - 1;
    if stack.attr & attr::TYPE_EXPAND_DOWN != 0 && stack.attr & attr::TYPE_CODE == 0 {
        let top = if stack.attr & attr::DB != 0 { 0xffff_ffff } else { 0xffff };
        sp > u64::from(stack.limit) && last <= top
    } else {
        last <= u64::from(stack.limit)
    }
}

/// An IDT entry.
struct Gate {
    selector: u16,
    offset: u64,
    /// Type (SDM volume 3, table 3-2).
    kind: u32,
    dpl: u8,
    present: bool,
    ist: usize,
}

impl Gate {
    fn decode(low: u64, high: u64) -> Self {
        let offset = (low & 0xffff) | ((low >> 32) & 0xffff_0000) | high << 32;
        Self {
            selector: (low >> 16) as u16,
            offset,
            kind: (low >> 40 & 0x1f) as u32,
            dpl: (low >> 45 & 3) as u8,
            present: low >> 47 & 1 != 0,
            ist: (low >> 32 & 7) as usize,
        }
    }
}

const TASK_GATE: u32 = 0x5;
const INTERRUPT_GATE_16: u32 = 0x6;
const TRAP_GATE_16: u32 = 0x7;
const INTERRUPT_GATE: u32 = 0xe;
const TRAP_GATE: u32 = 0xf;

impl SoftVp {
    /// I/O privilege level.
    #[inline]
    pub fn iopl(&self) -> u8 {
        ((self.s.rflags & rflags::IOPL) >> rflags::IOPL_SHIFT) as u8
    }

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

    /// Recomputes [`attention::BOUNDARY`] from TF, RF, shadows, pending debug conditions and DR7.
    pub fn update_boundary(&mut self) {
        let s = &self.s;
        let instruction_breakpoint = |n: u32| s.dr7 >> (2 * n) & 3 != 0 && s.dr7 >> (16 + 4 * n) & 3 == 0;
        let needed = s.rflags & (rflags::TF | rflags::RF) != 0
            || s.interrupt_shadow
            || s.pending_debug != 0
            || (s.dr7 & dr7::ENABLES != 0 && (0..4).any(instruction_breakpoint));
        if needed {
            s.attention.fetch_or(attention::BOUNDARY, Ordering::Relaxed);
        } else {
            s.attention.fetch_and(!attention::BOUNDARY, Ordering::Relaxed);
        }
    }

    /// Writes 2, 4 or 8 bytes with the rights of a privilege level.
    pub(crate) fn write_at_cpl(&mut self, la: u64, value: u64, size: usize, cpl: u8) -> Exec {
        if cpl == 3 {
            return self.write_slow(la, value, size, Some(crate::mmu::Class::User));
        }
        match size {
            8 => self.write_sys_u64(la, value),
            4 => self.write_sys_u32(la, value as u32),
            _ => self.write_sys_u16(la, value as u16),
        }
    }

    /// Through the interrupt vector table of real mode (SDM volume 3, section 20.1.4).
    fn inject_real(&mut self, event: &Event) -> Exec {
        let entry = u64::from(event.vector) * 4;
        if entry + 3 > u64::from(self.s.idtr.limit) {
            return Err(Fault::gp(u32::from(event.vector) * 8 + 2));
        }
        let target = self.read_sys_u32(self.s.idtr.base.wrapping_add(entry) & 0xffff_ffff)?;
        self.enter_real_handler(target, event.flags, event.return_rip)
    }

    /// Pushes a real-mode frame and goes to a far pointer; also for software interrupts that VME redirects.
    fn enter_real_handler(&mut self, target: u32, flags: u64, return_rip: u64) -> Exec {
        let stack = self.s.segments[sreg::SS];
        let cpl = self.s.cpl;
        let mut frame = Frame::legacy(stack, self.s.gprs[RSP], cpl, Fault::SS0);
        frame.push(self, flags, 2)?;
        frame.push(self, u64::from(self.s.segments[sreg::CS].selector), 2)?;
        frame.push(self, return_rip, 2)?;
        self.s.gprs[RSP] = frame.rsp(self.s.gprs[RSP]);
        self.load_segment_real(sreg::CS, (target >> 16) as u16);
        self.s.rip = u64::from(target & 0xffff);
        self.s.next_rip = self.s.rip;
        let cleared = if self.v86() { rflags::TF } else { rflags::IF | rflags::TF | rflags::AC };
        self.s.rflags &= !(cleared | rflags::RF);
        self.mode_changed();
        Ok(())
    }

    /// INT n in virtual-8086 mode with CR4.VME: if the TSS's redirection bitmap says so, goes through the virtual
    /// machine's own vector table (SDM volume 3, table 20-2).
    fn v86_redirect(&mut self, number: u8) -> Exec<bool> {
        if self.s.cr4 & x86::regs::cr4::VME == 0 {
            return Ok(false);
        }
        // The bitmap is the 32 bytes before the I/O bitmap.
        let limit = self.s.tr.limit;
        if limit < 0x67 {
            return Err(Fault::GP0);
        }
        let io_base = u32::from(self.read_sys_u16(self.s.tr.base.wrapping_add(0x66))?);
        let at = io_base.wrapping_sub(32).wrapping_add(u32::from(number) / 8);
        if at > limit {
            return Err(Fault::GP0);
        }
        if self.read_sys_u8(self.s.tr.base.wrapping_add(u64::from(at)))? >> (number % 8) & 1 != 0 {
            return Ok(false);
        }
        let iopl3 = self.iopl() == 3;
        let mut flags = self.s.rflags;
        if !iopl3 {
            // IF is virtual: the program sees VIF, and IOPL 3.
            flags = (flags & !rflags::IF) | rflags::IOPL;
            if flags & rflags::VIF != 0 {
                flags |= rflags::IF;
            }
        }
        let target = self.read_u32(u64::from(number) * 4)?;
        self.enter_real_handler(target, flags, self.s.next_rip)?;
        self.s.rflags &= if iopl3 { !rflags::IF } else { !rflags::VIF };
        Ok(true)
    }

    /// Finds the IDT entry of an event and makes the checks that all kinds of gates share.
    fn find_gate(&mut self, event: &Event, long: bool) -> Exec<Gate> {
        let size = if long { 16 } else { 8 };
        let error = u32::from(event.vector) * 8 + 2;
        let entry = u64::from(event.vector) * size;
        if entry + size - 1 > u64::from(self.s.idtr.limit) {
            return Err(Fault::gp(error));
        }
        let at = self.wrap_linear(self.s.idtr.base.wrapping_add(entry));
        let low = self.read_sys_u64(at)?;
        let high = if long { self.read_sys_u64(at.wrapping_add(8))? & 0xffff_ffff } else { 0 };
        let gate = Gate::decode(low, high);
        let known = match gate.kind {
            INTERRUPT_GATE | TRAP_GATE => true,
            TASK_GATE | INTERRUPT_GATE_16 | TRAP_GATE_16 => !long,
            _ => false,
        };
        if !known || (event.software && gate.dpl < self.s.cpl) {
            return Err(Fault::gp(error));
        }
        if !gate.present {
            return Err(Fault::np(error));
        }
        Ok(gate)
    }

    /// Reads and checks a handler's code segment: the segment (RPL set) and the new privilege level.
    fn handler_segment(&mut self, selector: u16, long: bool) -> Exec<(Segment, u8)> {
        if is_null(selector) {
            return Err(Fault::GP0);
        }
        let mut d = self.read_descriptor(selector, Fault::gp)?;
        let error = selector_error(selector);
        if !d.is_code() || d.dpl() > self.s.cpl {
            return Err(Fault::gp(error));
        }
        if long && d.attr() & (attr::L | attr::DB) != attr::L {
            return Err(Fault::gp(error));
        }
        if !d.present() {
            return Err(Fault::np(error));
        }
        let cpl = if d.is_conforming() { self.s.cpl } else { d.dpl() };
        if self.v86() && cpl != 0 {
            return Err(Fault::gp(error));
        }
        self.mark_accessed(&mut d)?;
        let mut segment = d.segment;
        segment.selector = (selector & !3) | u16::from(cpl);
        Ok((segment, cpl))
    }

    fn inject_protected(&mut self, event: &Event) -> Exec {
        let gate = self.find_gate(event, false)?;
        if gate.kind == TASK_GATE {
            return self.inject_task(event, gate.selector);
        }
        let (code, cpl) = self.handler_segment(gate.selector, false)?;
        let size = if gate.kind & 8 != 0 { 4 } else { 2 };
        let offset = if size == 4 { gate.offset } else { gate.offset & 0xffff };
        let old_ss = self.s.segments[sreg::SS];
        let old_sp = self.s.gprs[RSP];
        let v86 = self.v86();
        let inner = cpl < self.s.cpl;
        let (stack, mut frame) = if inner {
            let (selector, sp) = self.tss_stack(cpl)?;
            let stack = self.stack_segment(selector, cpl, Fault::ts)?;
            (stack, Frame::legacy(stack, sp, cpl, Fault::ss(selector_error(selector))))
        } else {
            (old_ss, Frame::legacy(old_ss, old_sp, cpl, Fault::SS0))
        };
        if inner {
            if v86 {
                for seg in [sreg::GS, sreg::FS, sreg::DS, sreg::ES] {
                    frame.push(self, u64::from(self.s.segments[seg].selector), size)?;
                }
            }
            frame.push(self, u64::from(old_ss.selector), size)?;
            frame.push(self, old_sp, size)?;
        }
        frame.push(self, event.flags, size)?;
        frame.push(self, u64::from(self.s.segments[sreg::CS].selector), size)?;
        frame.push(self, event.return_rip, size)?;
        if let Some(error) = event.error {
            frame.push(self, u64::from(error), size)?;
        }
        if offset > u64::from(code.limit) {
            return Err(Fault::GP0);
        }
        if v86 {
            for seg in [sreg::GS, sreg::FS, sreg::DS, sreg::ES] {
                self.s.segments[seg] = Segment { attr: attr::UNUSABLE, ..Segment::default() };
            }
        }
        // The new stack pointer replaces all of ESP when the stack is switched.
        self.s.gprs[RSP] = if inner { frame.sp } else { frame.rsp(old_sp) };
        self.s.segments[sreg::SS] = stack;
        self.enter_handler(code, offset, gate.kind);
        Ok(())
    }

    fn inject_long(&mut self, event: &Event) -> Exec {
        let gate = self.find_gate(event, true)?;
        let (code, cpl) = self.handler_segment(gate.selector, true)?;
        let old_ss = self.s.segments[sreg::SS];
        let old_sp = self.s.gprs[RSP];
        let inner = cpl < self.s.cpl;
        let sp = if gate.ist != 0 {
            self.tss64_stack(0x24 + 8 * (gate.ist as u32 - 1))?
        } else if inner {
            self.tss64_stack(4 + 8 * u32::from(cpl))?
        } else {
            old_sp
        };
        let mut frame = Frame::long(sp & !0xf, cpl);
        let cs = u64::from(self.s.segments[sreg::CS].selector);
        for value in [u64::from(old_ss.selector), old_sp, event.flags, cs, event.return_rip] {
            frame.push(self, value, 8)?;
        }
        if let Some(error) = event.error {
            frame.push(self, u64::from(error), 8)?;
        }
        if !is_canonical(gate.offset) {
            return Err(Fault::GP0);
        }
        self.s.gprs[RSP] = frame.sp;
        if inner {
            self.s.segments[sreg::SS] = Self::null_stack(u16::from(cpl), cpl);
        }
        self.enter_handler(code, gate.offset, gate.kind);
        Ok(())
    }

    fn enter_handler(&mut self, code: Segment, offset: u64, kind: u32) {
        self.s.segments[sreg::CS] = code;
        self.s.rip = offset;
        self.s.next_rip = offset;
        let mut cleared = rflags::TF | rflags::NT | rflags::RF | rflags::VM;
        if kind & 1 == 0 {
            cleared |= rflags::IF;
        }
        self.s.rflags &= !cleared;
        self.mode_changed();
    }

    /// A task gate in the IDT.
    fn inject_task(&mut self, event: &Event, selector: u16) -> Exec {
        self.s.next_rip = event.return_rip;
        self.switch_task(selector, crate::task::Reason::Gate, event.flags)?;
        if let Some(error) = event.error {
            // Pushed by the new task, in its own operand size.
            let size = if self.tss_is_32bit() { 4 } else { 2 };
            self.push(u64::from(error), size)?;
        }
        Ok(())
    }

    /// SS:ESP for a privilege level from the present 32- or 16-bit TSS.
    pub(crate) fn tss_stack(&mut self, cpl: u8) -> Exec<(u16, u64)> {
        let tr = self.s.tr;
        let wide = self.tss_is_32bit();
        let (at, size) = if wide { (4 + 8 * u32::from(cpl), 8) } else { (2 + 4 * u32::from(cpl), 4) };
        if at + size - 1 > tr.limit {
            return Err(Fault::ts(selector_error(tr.selector)));
        }
        let la = tr.base.wrapping_add(u64::from(at));
        if wide {
            let sp = self.read_sys_u32(la)?;
            Ok((self.read_sys_u16(la.wrapping_add(4))?, u64::from(sp)))
        } else {
            let sp = self.read_sys_u16(la)?;
            Ok((self.read_sys_u16(la.wrapping_add(2))?, u64::from(sp)))
        }
    }

    /// A stack pointer from the 64-bit TSS.
    pub(crate) fn tss64_stack(&mut self, at: u32) -> Exec<u64> {
        let tr = self.s.tr;
        if at + 7 > tr.limit {
            return Err(Fault::ts(selector_error(tr.selector)));
        }
        let sp = self.read_sys_u64(tr.base.wrapping_add(u64::from(at)))?;
        if is_canonical(sp) { Ok(sp) } else { Err(Fault::SS0) }
    }

    /// Is the present TSS a 32-bit one?
    pub(crate) fn tss_is_32bit(&self) -> bool {
        self.s.tr.attr & 8 != 0
    }
}
