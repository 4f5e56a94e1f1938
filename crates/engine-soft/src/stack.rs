//! The stack: push and pop with the stack's own address size, and near jumps.

use crate::segmentation::Want;
use crate::vp::{CodeSize, Exec, Fault, SoftVp};
use x86::paging::is_canonical;
use x86::regs::gpr::RSP;
use x86::segment::{attr, sreg};

impl SoftVp {
    /// Bits of RSP that are the stack pointer: 64, 32 or 16 of them.
    #[inline]
    pub fn stack_mask(&self) -> u64 {
        if self.s.code_size == CodeSize::Bits64 {
            u64::MAX
        } else if self.s.segments[sreg::SS].attr & attr::DB != 0 {
            0xffff_ffff
        } else {
            0xffff
        }
    }

    /// The stack pointer, as wide as the stack's address size.
    #[inline]
    pub fn stack_pointer(&self) -> u64 {
        self.s.gprs[RSP] & self.stack_mask()
    }

    /// Sets the stack pointer; a 16-bit stack keeps the bits above.
    #[inline]
    pub fn set_stack_pointer(&mut self, value: u64) {
        let mask = self.stack_mask();
        self.s.gprs[RSP] = if mask == 0xffff { (self.s.gprs[RSP] & !mask) | (value & mask) } else { value & mask };
    }

    /// The linear address of `size` bytes at `displacement` from the stack pointer.
    #[inline]
    pub fn stack_linear(&mut self, displacement: i64, size: usize, want: Want) -> Exec<u64> {
        let at = self.s.gprs[RSP].wrapping_add(displacement as u64) & self.stack_mask();
        self.seg_linear(sreg::SS, at, size, want)
    }

    /// Pushes 2, 4 or 8 bytes.
    #[inline]
    pub fn push(&mut self, value: u64, opsize: usize) -> Exec {
        let la = self.stack_linear(-(opsize as i64), opsize, Want::Write)?;
        match opsize {
            8 => self.write_u64(la, value)?,
            4 => self.write_u32(la, value as u32)?,
            _ => self.write_u16(la, value as u16)?,
        }
        self.set_stack_pointer(self.s.gprs[RSP].wrapping_sub(opsize as u64));
        Ok(())
    }

    /// Reads 2, 4 or 8 bytes from the top of the stack. RSP is left for [`SoftVp::commit_rsp`].
    #[inline]
    pub fn pop(&mut self, opsize: usize) -> Exec<u64> {
        self.stack_read(0, opsize)
    }

    /// Reads 2, 4 or 8 bytes at a distance from the top of the stack.
    #[inline]
    pub fn stack_read(&mut self, displacement: i64, opsize: usize) -> Exec<u64> {
        let la = self.stack_linear(displacement, opsize, Want::Read)?;
        match opsize {
            8 => self.read_u64(la),
            4 => self.read_u32(la).map(u64::from),
            _ => self.read_u16(la).map(u64::from),
        }
    }

    /// Takes `bytes` off the stack.
    #[inline]
    pub fn commit_rsp(&mut self, bytes: u64) {
        self.set_stack_pointer(self.s.gprs[RSP].wrapping_add(bytes));
    }

    /// Makes `target` the next instruction, as a near branch of this operand size does: truncated to it, then checked
    /// (canonical in 64-bit mode, the code segment's limit otherwise).
    #[inline]
    pub fn jump_near(&mut self, target: u64, opsize: usize) -> Exec {
        let target = match opsize {
            8 => target,
            4 => target & 0xffff_ffff,
            _ => target & 0xffff,
        };
        let allowed = if self.s.code_size == CodeSize::Bits64 {
            is_canonical(target)
        } else {
            target <= u64::from(self.s.segments[sreg::CS].limit)
        };
        if !allowed {
            return Err(Fault::GP0);
        }
        self.s.next_rip = target;
        Ok(())
    }
}
