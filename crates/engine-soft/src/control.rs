//! Far transfers: JMP, CALL, RET through every kind of gate, IRET, INT, SYSCALL and SYSENTER (SDM volume 2; APM volume
//! 3 where AMD differs; SDM volume 3, section 5.8).

use crate::exception::{Frame, SoftwareKind, software_interrupt};
use crate::interp::{Handler, Insn};
use crate::segmentation::{Descriptor, Want, is_null, selector_error};
use crate::task::Reason;
use crate::vp::{Exec, Fault, SoftVp};
use iced_x86::{Code, Instruction, OpKind};
use x86::exception as vector;
use x86::paging::is_canonical;
use x86::regs::gpr::{R11, RCX, RDX, RSP};
use x86::regs::{cr4, efer, rflags};
use x86::segment::{Segment, attr, sreg};

/// The handler of an instruction that this module executes.
pub fn handler(i: &Instruction) -> Option<Handler> {
    use Code::*;
    Some(match i.code() {
        Jmp_ptr1616 | Jmp_ptr1632 | Jmp_m1616 | Jmp_m1632 | Jmp_m1664 => jmp_far,
        Call_ptr1616 | Call_ptr1632 | Call_m1616 | Call_m1632 | Call_m1664 => call_far,
        Retfw | Retfd | Retfq | Retfw_imm16 | Retfd_imm16 | Retfq_imm16 => ret_far,
        Iretw | Iretd | Iretq => iret,
        Int1 => |vp, _| software_interrupt(vp, vector::DB, SoftwareKind::Icebp),
        Int3 => |vp, _| software_interrupt(vp, vector::BP, SoftwareKind::Int3),
        Int_imm8 => |vp, i| software_interrupt(vp, i.iced.immediate8(), SoftwareKind::IntN),
        Into => into,
        Syscall => |vp, _| vp.syscall(),
        Sysretd => |vp, _| vp.sysret(false),
        Sysretq => |vp, _| vp.sysret(true),
        Sysenter => |vp, _| vp.sysenter(),
        Sysexitd => |vp, _| vp.sysexit(false),
        Sysexitq => |vp, _| vp.sysexit(true),
        Swapgs => |vp, _| vp.swapgs(),
        _ => return None,
    })
}

fn into(vp: &mut SoftVp, _: &Insn) -> Exec {
    if vp.s.rflags & rflags::OF == 0 {
        return Ok(());
    }
    software_interrupt(vp, vector::OF, SoftwareKind::Into)
}

/// Operand size of a far transfer in bytes.
fn far_size(code: Code) -> usize {
    use Code::*;
    match code {
        Jmp_ptr1616 | Jmp_m1616 | Call_ptr1616 | Call_m1616 | Retfw | Retfw_imm16 | Iretw => 2,
        Jmp_m1664 | Call_m1664 | Retfq | Retfq_imm16 | Iretq => 8,
        _ => 4,
    }
}

/// The far pointer operand: selector and offset.
fn far_pointer(vp: &mut SoftVp, i: &Insn, size: usize) -> Exec<(u16, u64)> {
    match i.iced.op0_kind() {
        OpKind::FarBranch16 => Ok((i.iced.far_branch_selector(), u64::from(i.iced.far_branch16()))),
        OpKind::FarBranch32 => Ok((i.iced.far_branch_selector(), u64::from(i.iced.far_branch32()))),
        _ => {
            let (seg, offset) = crate::native::operand::effective_address(vp, i);
            let la = vp.seg_linear(seg, offset, size + 2, Want::Read)?;
            let mut bytes = [0u8; 10];
            vp.read_bytes(la, &mut bytes[..size + 2])?;
            let mut pointer = [0u8; 8];
            pointer[..size].copy_from_slice(&bytes[..size]);
            Ok((u16::from_le_bytes([bytes[size], bytes[size + 1]]), u64::from_le_bytes(pointer)))
        }
    }
}

fn jmp_far(vp: &mut SoftVp, i: &Insn) -> Exec {
    let size = far_size(i.iced.code());
    let (selector, offset) = far_pointer(vp, i, size)?;
    vp.jump_far(selector, offset)
}

fn call_far(vp: &mut SoftVp, i: &Insn) -> Exec {
    let size = far_size(i.iced.code());
    let (selector, offset) = far_pointer(vp, i, size)?;
    vp.call_far(selector, offset, size)
}

fn ret_far(vp: &mut SoftVp, i: &Insn) -> Exec {
    let release = if i.iced.op_count() > 0 { u64::from(i.iced.immediate16()) } else { 0 };
    vp.return_far(far_size(i.iced.code()), release)
}

fn iret(vp: &mut SoftVp, i: &Insn) -> Exec {
    let size = far_size(i.iced.code());
    if vp.protected() { vp.iret_protected(size) } else { vp.iret_real(size) }
}

/// A call gate.
struct CallGate {
    selector: u16,
    offset: u64,
    /// Parameters to copy.
    count: u32,
    /// Bytes of a push.
    size: usize,
}

const TSS16_AVAILABLE: u32 = 1;
const CALL_GATE16: u32 = 4;
const TASK_GATE: u32 = 5;
const TSS32_AVAILABLE: u32 = 9;
const CALL_GATE: u32 = 12;

impl SoftVp {
    /// Checks where a transfer ends: inside the new code segment, or canonical for 64-bit code.
    fn check_target(&self, code: &Segment, offset: u64) -> Exec {
        let allowed = if self.long_mode() && code.attr & attr::L != 0 {
            is_canonical(offset)
        } else {
            offset <= u64::from(code.limit)
        };
        if allowed { Ok(()) } else { Err(Fault::GP0) }
    }

    /// Reads a code segment descriptor that something transfers to; `transfer` adds its privilege rule.
    fn code_segment(&mut self, selector: u16, transfer: impl Fn(&Descriptor) -> bool) -> Exec<Descriptor> {
        if is_null(selector) {
            return Err(Fault::GP0);
        }
        let d = self.read_descriptor(selector, Fault::gp)?;
        let error = selector_error(selector);
        if !d.is_code() || !transfer(&d) {
            return Err(Fault::gp(error));
        }
        if self.long_mode() && d.attr() & (attr::L | attr::DB) == attr::L | attr::DB {
            return Err(Fault::gp(error));
        }
        if !d.present() {
            return Err(Fault::np(error));
        }
        Ok(d)
    }

    /// User code has jumped to this code segment while it was executed directly; RIP is there.
    pub(crate) fn found_in_segment(&mut self, selector: u16) -> Exec {
        let d = self.code_segment(selector, |d| d.dpl() == 3 && !d.is_conforming())?;
        self.enter_code(d, self.s.rip, 3)
    }

    fn enter_code(&mut self, mut d: Descriptor, offset: u64, cpl: u8) -> Exec {
        self.mark_accessed(&mut d)?;
        let mut segment = d.segment;
        segment.selector = (segment.selector & !3) | u16::from(cpl);
        self.s.segments[sreg::CS] = segment;
        self.s.next_rip = offset;
        self.mode_changed();
        Ok(())
    }

    fn jump_far(&mut self, selector: u16, offset: u64) -> Exec {
        if !self.protected() {
            if offset > u64::from(self.s.segments[sreg::CS].limit) {
                return Err(Fault::GP0);
            }
            self.load_segment_real(sreg::CS, selector);
            self.s.next_rip = offset;
            return Ok(());
        }
        if is_null(selector) {
            return Err(Fault::GP0);
        }
        let d = self.read_descriptor(selector, Fault::gp)?;
        if let Some(kind) = d.system_type() {
            return self.jump_system(selector, d, kind);
        }
        let (cpl, rpl) = (self.s.cpl, (selector & 3) as u8);
        let d = self.code_segment(selector, |d| direct_allowed(d, cpl, rpl))?;
        self.check_target(&d.segment, offset)?;
        self.enter_code(d, offset, cpl)
    }

    /// The privilege check of gates and TSSs that are named by a selector.
    fn check_gate(&self, d: &Descriptor, selector: u16) -> Exec {
        let error = selector_error(selector);
        if d.dpl() < self.s.cpl || d.dpl() < (selector & 3) as u8 {
            return Err(Fault::gp(error));
        }
        if !d.present() {
            return Err(Fault::np(error));
        }
        Ok(())
    }

    fn jump_system(&mut self, selector: u16, d: Descriptor, kind: u32) -> Exec {
        let error = selector_error(selector);
        let long = self.long_mode();
        match kind {
            CALL_GATE | CALL_GATE16 if kind == CALL_GATE || !long => {
                self.check_gate(&d, selector)?;
                let gate = self.read_call_gate(&d, kind)?;
                let cpl = self.s.cpl;
                let code =
                    self.gate_target(&gate, |d| if d.is_conforming() { d.dpl() <= cpl } else { d.dpl() == cpl })?;
                self.check_target(&code.segment, gate.offset)?;
                self.enter_code(code, gate.offset, cpl)
            }
            _ => self.transfer_to_task(selector, &d, kind, Reason::Jump).unwrap_or(Err(Fault::gp(error))),
        }
    }

    /// A transfer to a TSS or a task gate. `None`: the descriptor is neither.
    fn transfer_to_task(&mut self, selector: u16, d: &Descriptor, kind: u32, reason: Reason) -> Option<Exec> {
        if self.long_mode() {
            return None;
        }
        let target = match kind {
            TSS16_AVAILABLE | TSS32_AVAILABLE => selector,
            TASK_GATE => (d.raw >> 16) as u16,
            _ => return None,
        };
        if let Err(fault) = self.check_gate(d, selector) {
            return Some(Err(fault));
        }
        Some(self.switch_task(target, reason, self.s.rflags))
    }

    fn read_call_gate(&mut self, d: &Descriptor, kind: u32) -> Exec<CallGate> {
        let low = (d.raw & 0xffff) | ((d.raw >> 32) & 0xffff_0000);
        let selector = (d.raw >> 16) as u16;
        if self.long_mode() {
            let high = self.read_descriptor_high(d, Fault::gp)?;
            return Ok(CallGate { selector, offset: low | high, count: 0, size: 8 });
        }
        let count = (d.raw >> 32 & 0x1f) as u32;
        Ok(if kind == CALL_GATE {
            CallGate { selector, offset: low, count, size: 4 }
        } else {
            CallGate { selector, offset: low & 0xffff, count, size: 2 }
        })
    }

    /// The code segment that a call gate leads to; in long mode it must be 64-bit code.
    fn gate_target(&mut self, gate: &CallGate, transfer: impl Fn(&Descriptor) -> bool) -> Exec<Descriptor> {
        let d = self.code_segment(gate.selector, transfer)?;
        if self.long_mode() && d.attr() & attr::L == 0 {
            return Err(Fault::gp(selector_error(gate.selector)));
        }
        Ok(d)
    }

    fn call_far(&mut self, selector: u16, offset: u64, size: usize) -> Exec {
        let return_cs = u64::from(self.s.segments[sreg::CS].selector);
        let return_rip = self.s.next_rip;
        if !self.protected() {
            if offset > u64::from(self.s.segments[sreg::CS].limit) {
                return Err(Fault::GP0);
            }
            self.push_pair(return_cs, return_rip, size)?;
            self.load_segment_real(sreg::CS, selector);
            self.s.next_rip = offset;
            return Ok(());
        }
        if is_null(selector) {
            return Err(Fault::GP0);
        }
        let d = self.read_descriptor(selector, Fault::gp)?;
        if let Some(kind) = d.system_type() {
            return self.call_system(selector, d, kind);
        }
        let (cpl, rpl) = (self.s.cpl, (selector & 3) as u8);
        let d = self.code_segment(selector, |d| direct_allowed(d, cpl, rpl))?;
        self.check_target(&d.segment, offset)?;
        self.push_pair(return_cs, return_rip, size)?;
        self.enter_code(d, offset, cpl)
    }

    /// Pushes CS and RIP on the present stack; RSP changes only if both succeed.
    fn push_pair(&mut self, cs: u64, rip: u64, size: usize) -> Exec {
        let mut frame = self.present_frame();
        frame.push(self, cs, size)?;
        frame.push(self, rip, size)?;
        self.s.gprs[RSP] = frame.rsp(self.s.gprs[RSP]);
        Ok(())
    }

    /// A frame on the present stack.
    fn present_frame(&self) -> Frame {
        let sp = self.s.gprs[RSP];
        if self.mode64() {
            Frame::long(sp, self.s.cpl)
        } else {
            Frame::legacy(self.s.segments[sreg::SS], sp, self.s.cpl, Fault::SS0)
        }
    }

    fn call_system(&mut self, selector: u16, d: Descriptor, kind: u32) -> Exec {
        let error = selector_error(selector);
        let long = self.long_mode();
        match kind {
            CALL_GATE | CALL_GATE16 if kind == CALL_GATE || !long => {
                self.check_gate(&d, selector)?;
                let gate = self.read_call_gate(&d, kind)?;
                let cpl = self.s.cpl;
                let code = self.gate_target(&gate, |d| d.dpl() <= cpl)?;
                if !code.is_conforming() && code.dpl() < cpl {
                    self.call_inner(&gate, code)
                } else {
                    self.check_target(&code.segment, gate.offset)?;
                    let cs = u64::from(self.s.segments[sreg::CS].selector);
                    let mut frame = if long { Frame::long(self.s.gprs[RSP], cpl) } else { self.present_frame() };
                    frame.push(self, cs, gate.size)?;
                    frame.push(self, self.s.next_rip, gate.size)?;
                    self.s.gprs[RSP] = frame.rsp(self.s.gprs[RSP]);
                    self.enter_code(code, gate.offset, cpl)
                }
            }
            _ => self.transfer_to_task(selector, &d, kind, Reason::Call).unwrap_or(Err(Fault::gp(error))),
        }
    }

    /// A call gate to a more privileged level: switches the stack and copies parameters.
    fn call_inner(&mut self, gate: &CallGate, code: Descriptor) -> Exec {
        let cpl = code.dpl();
        let old_ss = self.s.segments[sreg::SS];
        let old_sp = self.s.gprs[RSP];
        let cs = u64::from(self.s.segments[sreg::CS].selector);
        let return_rip = self.s.next_rip;
        self.check_target(&code.segment, gate.offset)?;
        let (stack, mut frame) = if self.long_mode() {
            let sp = self.tss64_stack(4 + 8 * u32::from(cpl))?;
            (Self::null_stack(u16::from(cpl), cpl), Frame::long(sp, cpl))
        } else {
            let (selector, sp) = self.tss_stack(cpl)?;
            let stack = self.stack_segment(selector, cpl, Fault::ts)?;
            (stack, Frame::legacy(stack, sp, cpl, Fault::ss(selector_error(selector))))
        };
        let mut parameters = [0u64; 31];
        let parameters = &mut parameters[..gate.count as usize];
        for (n, parameter) in parameters.iter_mut().enumerate() {
            *parameter = self.stack_read((n * gate.size) as i64, gate.size)?;
        }
        frame.push(self, u64::from(old_ss.selector), gate.size)?;
        frame.push(self, old_sp, gate.size)?;
        for parameter in parameters.iter().rev() {
            frame.push(self, *parameter, gate.size)?;
        }
        frame.push(self, cs, gate.size)?;
        frame.push(self, return_rip, gate.size)?;
        let mut code = code;
        self.mark_accessed(&mut code)?;
        self.s.gprs[RSP] = frame.sp;
        self.s.segments[sreg::SS] = stack;
        self.enter_code(code, gate.offset, cpl)
    }

    fn return_far(&mut self, size: usize, release: u64) -> Exec {
        let word = size as i64;
        let offset = self.stack_read(0, size)?;
        let selector = self.stack_read(word, size)? as u16;
        if !self.protected() {
            if offset > u64::from(self.s.segments[sreg::CS].limit) {
                return Err(Fault::GP0);
            }
            self.commit_rsp(2 * size as u64 + release);
            self.load_segment_real(sreg::CS, selector);
            self.s.next_rip = offset;
            return Ok(());
        }
        let code = self.return_segment(selector)?;
        self.check_target(&code.segment, offset)?;
        let cpl = (selector & 3) as u8;
        if cpl == self.s.cpl {
            self.commit_rsp(2 * size as u64 + release);
            return self.enter_code(code, offset, cpl);
        }
        let at = 2 * word + release as i64;
        let sp = self.stack_read(at, size)?;
        let ss = self.stack_read(at + word, size)? as u16;
        let stack = self.return_stack(ss, cpl, &code.segment)?;
        self.leave_to(code, offset, stack, sp, cpl)?;
        self.commit_rsp(release);
        Ok(())
    }

    /// The code segment that RET or IRET returns to.
    fn return_segment(&mut self, selector: u16) -> Exec<Descriptor> {
        let (cpl, rpl) = (self.s.cpl, (selector & 3) as u8);
        if is_null(selector) {
            return Err(Fault::GP0);
        }
        if rpl < cpl {
            return Err(Fault::gp(selector_error(selector)));
        }
        self.code_segment(selector, |d| if d.is_conforming() { d.dpl() <= rpl } else { d.dpl() == rpl })
    }

    /// The stack segment that RET or IRET returns to; null only for 64-bit code below CPL 3.
    fn return_stack(&mut self, selector: u16, cpl: u8, code: &Segment) -> Exec<Segment> {
        if is_null(selector) {
            let to64 = self.long_mode() && code.attr & attr::L != 0;
            if to64 && cpl != 3 && selector & 3 == u16::from(cpl) {
                return Ok(Self::null_stack(selector, cpl));
            }
            return Err(Fault::GP0);
        }
        self.stack_segment(selector, cpl, Fault::gp)
    }

    /// The end of a return with a stack change: code, stack, and data segments that the outer level may not keep.
    fn leave_to(&mut self, code: Descriptor, offset: u64, stack: Segment, sp: u64, cpl: u8) -> Exec {
        let outward = cpl != self.s.cpl;
        let mut code = code;
        self.mark_accessed(&mut code)?;
        self.s.segments[sreg::SS] = stack;
        self.enter_code(code, offset, cpl)?;
        self.set_stack_pointer(sp);
        if outward {
            for seg in [sreg::ES, sreg::DS, sreg::FS, sreg::GS] {
                let s = self.s.segments[seg];
                let conforming =
                    s.attr & (attr::TYPE_CODE | attr::TYPE_CONFORMING) == attr::TYPE_CODE | attr::TYPE_CONFORMING;
                // A register that is null already keeps its base: in 64-bit mode FS and GS have theirs with a null selector.
                if s.usable() && s.dpl() < cpl && !conforming {
                    self.s.segments[seg] = Segment { attr: attr::UNUSABLE, selector: 0, ..s };
                }
            }
        }
        Ok(())
    }

    /// Replaces the bits of RFLAGS in `mask`, with everything that follows from AC, IF, TF and RF.
    pub(crate) fn set_flags_masked(&mut self, value: u64, mask: u64) {
        let old = self.s.rflags;
        let new = (old & !mask) | (value & mask) | rflags::FIXED;
        self.s.rflags = new;
        let changed = old ^ new;
        if changed & rflags::AC != 0 {
            self.select_tlb();
        }
        if changed & new & rflags::IF != 0 {
            self.interrupts_unblocked();
        }
        if changed & (rflags::TF | rflags::RF) != 0 {
            self.update_boundary();
        }
    }

    /// IRET ends the blocking of NMIs, even if it faults later (SDM volume 3, section 6.7.1).
    fn unmask_nmi(&mut self) {
        if self.s.nmi_masked {
            self.s.nmi_masked = false;
            self.interrupts_unblocked();
        }
    }

    fn iret_real(&mut self, size: usize) -> Exec {
        let word = size as i64;
        let v86 = self.v86();
        let vme = v86 && self.iopl() < 3;
        if vme && (self.s.cr4 & cr4::VME == 0 || size != 2) {
            return Err(Fault::GP0);
        }
        let offset = self.stack_read(0, size)?;
        let selector = self.stack_read(word, size)? as u16;
        let flags = self.stack_read(2 * word, size)?;
        if offset > u64::from(self.s.segments[sreg::CS].limit) {
            return Err(Fault::GP0);
        }
        if vme {
            let blocked = flags & rflags::IF != 0 && self.s.rflags & rflags::VIP != 0;
            if blocked || flags & rflags::TF != 0 {
                return Err(Fault::GP0);
            }
        }
        self.commit_rsp(3 * size as u64);
        self.unmask_nmi();
        self.load_segment_real(sreg::CS, selector);
        self.s.next_rip = offset;
        let mut mask = rflags::ALL & !(rflags::VM | rflags::VIF | rflags::VIP);
        if v86 {
            mask &= !rflags::IOPL;
        }
        if size == 2 {
            mask &= 0xffff;
        }
        let mut flags = flags;
        if vme {
            mask = (mask & !rflags::IF) | rflags::VIF;
            flags = (flags & !rflags::VIF) | if flags & rflags::IF != 0 { rflags::VIF } else { 0 };
        }
        self.set_flags_masked(flags, mask);
        Ok(())
    }

    /// Which flags IRET and POPF may change at this privilege (SDM volume 2, IRET and POPF).
    pub(crate) fn flags_mask(&self, size: usize) -> u64 {
        let mut mask = rflags::STATUS | rflags::TF | rflags::DF | rflags::NT;
        if size > 2 {
            mask |= rflags::RF | rflags::AC | rflags::ID;
        }
        if self.s.cpl <= self.iopl() {
            mask |= rflags::IF;
        }
        if self.s.cpl == 0 {
            mask |= rflags::IOPL;
        }
        mask
    }

    fn iret_protected(&mut self, size: usize) -> Exec {
        let word = size as i64;
        if self.s.rflags & rflags::NT != 0 {
            if self.long_mode() {
                return Err(Fault::GP0);
            }
            let link = self.read_sys_u16(self.s.tr.base)?;
            self.unmask_nmi();
            return self.switch_task(link, Reason::Iret, self.s.rflags);
        }
        let offset = self.stack_read(0, size)?;
        let selector = self.stack_read(word, size)? as u16;
        let flags = self.stack_read(2 * word, size)?;
        if flags & rflags::VM != 0 && self.s.cpl == 0 && !self.long_mode() && size == 4 {
            return self.iret_to_v86(offset, selector, flags);
        }
        let code = self.return_segment(selector)?;
        self.check_target(&code.segment, offset)?;
        let cpl = (selector & 3) as u8;
        let mut mask = self.flags_mask(size);
        if self.s.cpl == 0 && size > 2 {
            mask |= rflags::VIF | rflags::VIP;
        }
        if cpl == self.s.cpl && !self.mode64() {
            self.commit_rsp(3 * size as u64);
            self.enter_code(code, offset, cpl)?;
        } else {
            let sp = self.stack_read(3 * word, size)?;
            let ss = self.stack_read(4 * word, size)? as u16;
            let stack = self.return_stack(ss, cpl, &code.segment)?;
            self.leave_to(code, offset, stack, sp, cpl)?;
        }
        self.unmask_nmi();
        self.set_flags_masked(flags, mask);
        Ok(())
    }

    fn iret_to_v86(&mut self, offset: u64, cs: u16, flags: u64) -> Exec {
        let mut words = [0u64; 6];
        for (n, value) in words.iter_mut().enumerate() {
            *value = self.stack_read(12 + 4 * n as i64, 4)?;
        }
        let [sp, ss, es, ds, fs, gs] = words;
        if offset > 0xffff {
            return Err(Fault::GP0);
        }
        self.unmask_nmi();
        for (seg, selector) in
            [(sreg::CS, u64::from(cs)), (sreg::SS, ss), (sreg::ES, es), (sreg::DS, ds), (sreg::FS, fs), (sreg::GS, gs)]
        {
            self.s.segments[seg] = Self::v86_segment(selector as u16);
        }
        self.s.gprs[RSP] = sp;
        self.s.next_rip = offset;
        self.set_flags_masked(flags, rflags::ALL);
        self.mode_changed();
        Ok(())
    }

    /// A flat segment as SYSCALL and its relatives load it.
    fn flat(selector: u16, code: bool, long: bool, dpl: u8) -> Segment {
        let kind = if code { 0xb } else { 3 };
        let size = if long { attr::L } else { attr::DB };
        Segment {
            base: 0,
            limit: u32::MAX,
            attr: attr::P | attr::S | kind | size | attr::G | u32::from(dpl) << attr::DPL_SHIFT,
            selector,
        }
    }

    fn syscall(&mut self) -> Exec {
        let long = self.long_mode();
        if self.s.efer & efer::SCE == 0 || !self.protected() || (!self.mode64() && !self.vendor_is_amd()) {
            return Err(Fault::UD);
        }
        self.run.user_exits += u64::from(self.s.cpl == 3);
        let selector = (self.s.star >> 32) as u16 & 0xfffc;
        if long {
            let target = if self.mode64() { self.s.lstar } else { self.s.cstar };
            self.s.gprs[RCX] = self.s.next_rip;
            self.s.gprs[R11] = self.s.rflags & !rflags::RF;
            self.s.next_rip = target;
        } else {
            self.s.gprs[RCX] = self.s.next_rip;
            self.s.next_rip = self.s.star & 0xffff_ffff;
        }
        self.s.segments[sreg::CS] = Self::flat(selector, true, long, 0);
        self.s.segments[sreg::SS] = Self::flat(selector.wrapping_add(8), false, false, 0);
        let cleared = if long { self.s.fmask | rflags::RF } else { rflags::IF | rflags::VM | rflags::RF };
        self.set_flags_masked(0, cleared & rflags::ALL & !rflags::FIXED);
        self.mode_changed();
        Ok(())
    }

    fn sysret(&mut self, wide: bool) -> Exec {
        let amd = self.vendor_is_amd();
        if self.s.efer & efer::SCE == 0 || (!self.mode64() && !amd) {
            return Err(Fault::UD);
        }
        if !self.protected() || self.s.cpl != 0 {
            return Err(Fault::GP0);
        }
        let target = if wide { self.s.gprs[RCX] } else { self.s.gprs[RCX] & 0xffff_ffff };
        // Intel checks here, at privilege level 0; AMD's fault comes with the first fetch at level 3.
        if wide && !amd && !is_canonical(target) {
            return Err(Fault::GP0);
        }
        let base = (self.s.star >> 48) as u16;
        let code = if wide { base.wrapping_add(16) } else { base };
        let was_long = self.long_mode();
        self.s.segments[sreg::CS] = Self::flat(code | 3, true, wide, 3);
        let stack = Self::flat(base.wrapping_add(8) | 3, false, false, 3);
        if amd {
            // AMD loads only the selector (APM volume 3, SYSRET); the DPL here is ours, it carries the CPL.
            let ss = &mut self.s.segments[sreg::SS];
            ss.selector = stack.selector;
            ss.attr |= attr::DPL;
        } else {
            self.s.segments[sreg::SS] = stack;
        }
        self.s.next_rip = target;
        if was_long {
            let mask = rflags::ALL & !(rflags::RF | rflags::VM | rflags::FIXED);
            self.set_flags_masked(self.s.gprs[R11], mask | rflags::RF | rflags::VM);
            self.s.rflags &= !(rflags::RF | rflags::VM);
        } else {
            self.set_flags_masked(rflags::IF, rflags::IF);
        }
        self.mode_changed();
        self.update_boundary();
        Ok(())
    }

    fn sysenter(&mut self) -> Exec {
        let long = self.long_mode();
        if long && self.vendor_is_amd() {
            return Err(Fault::UD);
        }
        let selector = self.s.sysenter[0] as u16;
        if self.s.cr0 & x86::regs::cr0::PE == 0 || is_null(selector) {
            return Err(Fault::GP0);
        }
        let selector = selector & 0xfffc;
        self.s.segments[sreg::CS] = Self::flat(selector, true, long, 0);
        self.s.segments[sreg::SS] = Self::flat(selector.wrapping_add(8), false, false, 0);
        let width = if long { u64::MAX } else { 0xffff_ffff };
        self.s.gprs[RSP] = self.s.sysenter[1] & width;
        self.s.next_rip = self.s.sysenter[2] & width;
        self.set_flags_masked(0, rflags::IF | rflags::VM | rflags::RF);
        self.mode_changed();
        Ok(())
    }

    fn sysexit(&mut self, wide: bool) -> Exec {
        // The privilege level is looked at first (measured).
        if self.long_mode() && self.vendor_is_amd() && self.s.cpl == 0 {
            return Err(Fault::UD);
        }
        let selector = self.s.sysenter[0] as u16;
        if !self.protected() || self.s.cpl != 0 || is_null(selector) {
            return Err(Fault::GP0);
        }
        let (rip, rsp) = (self.s.gprs[RDX], self.s.gprs[RCX]);
        if wide && !(is_canonical(rip) && is_canonical(rsp)) {
            return Err(Fault::GP0);
        }
        let (code, stack, width) = if wide { (32, 40, u64::MAX) } else { (16, 24, 0xffff_ffff) };
        let base = selector & 0xfffc;
        self.s.segments[sreg::CS] = Self::flat(base.wrapping_add(code) | 3, true, wide, 3);
        self.s.segments[sreg::SS] = Self::flat(base.wrapping_add(stack) | 3, false, false, 3);
        self.s.gprs[RSP] = rsp & width;
        self.s.next_rip = rip & width;
        self.mode_changed();
        Ok(())
    }

    fn swapgs(&mut self) -> Exec {
        if self.s.cpl != 0 {
            return Err(Fault::GP0);
        }
        std::mem::swap(&mut self.s.segments[sreg::GS].base, &mut self.s.kernel_gs_base);
        Ok(())
    }
}

/// May JMP and CALL go to this code segment directly?
fn direct_allowed(d: &Descriptor, cpl: u8, rpl: u8) -> bool {
    if d.is_conforming() { d.dpl() <= cpl } else { rpl <= cpl && d.dpl() == cpl }
}
