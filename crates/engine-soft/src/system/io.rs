//! IN and OUT, the I/O permission check (SDM volume 1, chapter 19), I/O breakpoints, and hypercalls.

use crate::interp::{Handler, Insn};
use crate::vp::{Exec, Fault, SoftVp};
use iced_x86::{Code, Instruction};
use partition::{HypercallContext, HypercallOutcome};
use x86::regs::gpr::{RAX, RDX};
use x86::regs::{cr0, cr4, dr7};
use x86::xsave::legacy;

/// The handler of an instruction that this module executes.
pub fn handler(i: &Instruction) -> Option<Handler> {
    use Code::*;
    Some(match i.code() {
        In_AL_imm8 | In_AX_imm8 | In_EAX_imm8 => |vp, i| input(vp, i, u16::from(i.iced.immediate8())),
        In_AL_DX | In_AX_DX | In_EAX_DX => |vp, i| input(vp, i, vp.s.gprs[RDX] as u16),
        Out_imm8_AL => out_byte,
        Out_imm8_AX | Out_imm8_EAX => |vp, i| output(vp, i, u16::from(i.iced.immediate8())),
        Out_DX_AL | Out_DX_AX | Out_DX_EAX => |vp, i| output(vp, i, vp.s.gprs[RDX] as u16),
        _ => return None,
    })
}

fn width(code: Code) -> usize {
    use Code::*;
    match code {
        In_AL_imm8 | In_AL_DX | Out_imm8_AL | Out_DX_AL => 1,
        In_AX_imm8 | In_AX_DX | Out_imm8_AX | Out_DX_AX => 2,
        _ => 4,
    }
}

fn input(vp: &mut SoftVp, i: &Insn, port: u16) -> Exec {
    let size = width(i.iced.code());
    vp.check_io(port, size)?;
    let mut data = [0u8; 4];
    vp.exits().io_read(vp.index, port, &mut data[..size]);
    let value = u64::from(u32::from_le_bytes(data));
    let rax = &mut vp.s.gprs[RAX];
    *rax = match size {
        1 => (*rax & !0xff) | value,
        2 => (*rax & !0xffff) | value,
        _ => value,
    };
    Ok(())
}

fn output(vp: &mut SoftVp, i: &Insn, port: u16) -> Exec {
    let size = width(i.iced.code());
    vp.check_io(port, size)?;
    let data = (vp.s.gprs[RAX] as u32).to_le_bytes();
    vp.exits().io_write(vp.index, port, &data[..size]);
    Ok(())
}

/// OUT imm8, AL: a hypercall if it is the machine's hypercall port.
fn out_byte(vp: &mut SoftVp, i: &Insn) -> Exec {
    let port = i.iced.immediate8();
    if vp.hypercall_port() != Some(port) {
        return output(vp, i, u16::from(port));
    }
    match vp.hypercall() {
        HypercallOutcome::Complete => Ok(()),
        // `rip` still points at the instruction.
        HypercallOutcome::Restart => Err(Fault::Restart),
        HypercallOutcome::InvalidOpcode => Err(Fault::UD),
    }
}

impl SoftVp {
    /// May the program access `size` bytes of I/O ports at `port` (IOPL, TSS bitmap)? #GP(0) if not. Notes I/O
    /// breakpoints too.
    pub fn check_io(&mut self, port: u16, size: usize) -> Exec {
        let restricted = self.s.cr0 & cr0::PE != 0 && (self.v86() || self.s.cpl > self.iopl());
        if restricted {
            self.check_io_bitmap(port, size)?;
        }
        if self.s.cr4 & cr4::DE != 0 && self.s.dr7 & dr7::ENABLES != 0 {
            self.check_io_breakpoints(port, size);
        }
        Ok(())
    }

    fn check_io_bitmap(&mut self, port: u16, size: usize) -> Exec {
        let tr = self.s.tr;
        // A 16-bit TSS has no bitmap.
        if !tr.usable() || tr.attr & 8 == 0 || tr.limit < 0x67 {
            return Err(Fault::GP0);
        }
        let map = u32::from(self.read_sys_u16(tr.base.wrapping_add(0x66))?);
        let at = map + u32::from(port) / 8;
        // Two bytes are always read: the last byte of a bitmap must be followed by one of ones.
        if at + 1 > tr.limit {
            return Err(Fault::GP0);
        }
        let bits = self.read_sys_u16(tr.base.wrapping_add(u64::from(at)))?;
        let mask = (1u16 << size) - 1;
        if bits >> (port % 8) & mask != 0 { Err(Fault::GP0) } else { Ok(()) }
    }

    fn check_io_breakpoints(&mut self, port: u16, size: usize) {
        for n in 0..4 {
            let enabled = self.s.dr7 >> (2 * n) & 3 != 0;
            let kind = self.s.dr7 >> (16 + 4 * n) & 3;
            if !enabled || kind != 2 {
                continue;
            }
            let len = [1, 2, 8, 4][(self.s.dr7 >> (18 + 4 * n) & 3) as usize];
            let start = self.s.dr[n] & !(len - 1);
            let port = u64::from(port);
            if port.wrapping_sub(start) < len || start.wrapping_sub(port) < size as u64 {
                self.raise_debug(1 << n);
            }
        }
    }

    fn hypercall(&mut self) -> HypercallOutcome {
        match self.exits {
            // SAFETY: as in `SoftVp::exits`; going through the pointer lets the VP itself be the call's context.
            Some(exits) => unsafe { (*exits).hypercall(self.index, self) },
            None => HypercallOutcome::InvalidOpcode,
        }
    }
}

impl HypercallContext for SoftVp {
    fn gpr(&self, number: usize) -> u64 {
        self.s.gprs.get(number).copied().unwrap_or(0)
    }
    fn set_gpr(&mut self, number: usize, value: u64) {
        if let Some(gpr) = self.s.gprs.get_mut(number) {
            *gpr = value;
        }
    }
    fn xmm(&mut self, number: usize) -> u128 {
        let at = legacy::XMM0 + 16 * (number & 15);
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&self.s.xsave.0[at..at + 16]);
        u128::from_le_bytes(bytes)
    }
    fn set_xmm(&mut self, number: usize, value: u128) {
        let at = legacy::XMM0 + 16 * (number & 15);
        self.s.xsave.0[at..at + 16].copy_from_slice(&value.to_le_bytes());
    }
    fn is_64bit(&self) -> bool {
        self.mode64()
    }
    fn cpl(&self) -> u8 {
        self.s.cpl
    }
    fn is_protected(&self) -> bool {
        self.protected()
    }
}
