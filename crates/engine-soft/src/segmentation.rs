//! Segmentation: from segment and offset to linear address, and loading segment registers (SDM volume 3, chapters 3
//! and 5; 64-bit rules in section 3.2.4; real and virtual-8086 mode in chapter 20).

use crate::vp::{CodeSize, Exec, Fault, SoftVp};
use x86::paging::is_canonical;
use x86::regs::{cr0, efer, rflags};
use x86::segment::{Segment, attr, sreg};

/// What an access does with a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// Data read.
    Read,
    /// Data write.
    Write,
    /// Instruction fetch (of CS).
    Exec,
}

/// A descriptor as read from a table.
#[derive(Clone, Copy, Debug)]
pub struct Descriptor {
    /// Where it is, linear.
    pub address: u64,
    /// Its first 8 bytes.
    pub raw: u64,
    /// The register that it describes (base bits 32-63 of 16-byte descriptors not included).
    pub segment: Segment,
}

impl Descriptor {
    /// Access rights.
    pub fn attr(&self) -> u32 {
        self.segment.attr
    }
    /// Present.
    pub fn present(&self) -> bool {
        self.segment.attr & attr::P != 0
    }
    /// Descriptor privilege level.
    pub fn dpl(&self) -> u8 {
        self.segment.dpl()
    }
    /// A code segment.
    pub fn is_code(&self) -> bool {
        self.segment.attr & (attr::S | attr::TYPE_CODE) == attr::S | attr::TYPE_CODE
    }
    /// A data segment.
    pub fn is_data(&self) -> bool {
        self.segment.attr & (attr::S | attr::TYPE_CODE) == attr::S
    }
    /// A conforming code segment.
    pub fn is_conforming(&self) -> bool {
        self.is_code() && self.segment.attr & attr::TYPE_CONFORMING != 0
    }
    /// Type of a system descriptor (SDM volume 3, table 3-2); `None` for code and data.
    pub fn system_type(&self) -> Option<u32> {
        (self.segment.attr & attr::S == 0).then_some(self.segment.attr & attr::TYPE)
    }
}

/// Selector as an error code: table and index without the RPL.
pub const fn selector_error(selector: u16) -> u32 {
    (selector & 0xfffc) as u32
}

/// Does the selector name the null descriptor?
pub const fn is_null(selector: u16) -> bool {
    selector & 0xfffc == 0
}

/// The fault of an access outside a segment.
const fn segment_fault(seg: usize) -> Fault {
    if seg == sreg::SS { Fault::SS0 } else { Fault::GP0 }
}

impl SoftVp {
    /// Protected mode, and not virtual-8086 mode?
    #[inline]
    pub fn protected(&self) -> bool {
        self.s.cr0 & cr0::PE != 0 && self.s.rflags & rflags::VM == 0
    }

    /// Virtual-8086 mode?
    #[inline]
    pub fn v86(&self) -> bool {
        self.s.cr0 & cr0::PE != 0 && self.s.rflags & rflags::VM != 0
    }

    /// Long mode is active (64-bit or compatibility mode)?
    #[inline]
    pub fn long_mode(&self) -> bool {
        self.s.efer & efer::LMA != 0
    }

    /// 64-bit mode?
    #[inline]
    pub fn mode64(&self) -> bool {
        self.s.code_size == CodeSize::Bits64
    }

    /// Recomputes what follows from CR0, CR4, EFER, CS, SS.DPL and RFLAGS (VM, AC): privilege level, code size, TLB
    /// sets. Called after any of them changed.
    pub fn mode_changed(&mut self) {
        let s = &mut *self.s;
        s.cpl = if s.cr0 & cr0::PE == 0 {
            0
        } else if s.rflags & rflags::VM != 0 {
            3
        } else {
            s.segments[sreg::SS].dpl()
        };
        let code = s.segments[sreg::CS].attr;
        s.code_size = if s.efer & efer::LMA != 0 && code & attr::L != 0 {
            CodeSize::Bits64
        } else if code & attr::DB != 0 {
            CodeSize::Bits32
        } else {
            CodeSize::Bits16
        };
        self.select_tlb();
    }

    /// Recomputes everything that is derived from the registers, after all of them were replaced (reset, restore).
    pub fn state_loaded(&mut self) {
        self.mode_changed();
        self.paging_changed();
        self.watchpoints_changed();
        self.update_boundary();
    }

    /// The linear address of `size` bytes at `offset` in a segment, after all segment checks. In 64-bit mode only FS
    /// and GS have a base, and addresses must be canonical.
    #[inline]
    pub fn seg_linear(&mut self, seg: usize, offset: u64, size: usize, want: Want) -> Exec<u64> {
        if self.s.code_size == CodeSize::Bits64 {
            let la = if seg >= sreg::FS { self.s.segments[seg].base.wrapping_add(offset) } else { offset };
            if is_canonical(la) && is_canonical(la.wrapping_add(size as u64 - 1)) {
                return Ok(la);
            }
            return Err(segment_fault(seg));
        }
        let s = &self.s.segments[seg];
        let last = offset.wrapping_add(size as u64 - 1);
        const MASK: u32 =
            attr::UNUSABLE | attr::P | attr::S | attr::TYPE_CODE | attr::TYPE_EXPAND_DOWN | attr::TYPE_WRITABLE;
        if want != Want::Exec
            && s.attr & MASK == attr::P | attr::S | attr::TYPE_WRITABLE
            && last <= u64::from(s.limit)
            && offset <= last
        {
            return Ok(s.base.wrapping_add(offset) & 0xffff_ffff);
        }
        self.seg_linear_checked(seg, offset, last, want)
    }

    fn seg_linear_checked(&self, seg: usize, offset: u64, last: u64, want: Want) -> Exec<u64> {
        let s = &self.s.segments[seg];
        let fault = segment_fault(seg);
        let mut expand_down = false;
        if self.protected() {
            if !s.usable() {
                return Err(fault);
            }
            let code = s.attr & attr::TYPE_CODE != 0;
            let allowed = match want {
                Want::Write => !code && s.attr & attr::TYPE_WRITABLE != 0,
                Want::Read => !code || s.attr & attr::TYPE_READABLE != 0,
                Want::Exec => true,
            };
            if !allowed {
                return Err(fault);
            }
            expand_down = !code && s.attr & attr::TYPE_EXPAND_DOWN != 0;
        }
        let inside = if expand_down {
            let top = if s.attr & attr::DB != 0 { 0xffff_ffff } else { 0xffff };
            offset > u64::from(s.limit) && last <= top
        } else {
            last <= u64::from(s.limit)
        };
        if !inside || offset > last {
            return Err(fault);
        }
        Ok(s.base.wrapping_add(offset) & 0xffff_ffff)
    }

    /// Where a selector's descriptor is, if it is inside its table.
    pub fn descriptor_address(&self, selector: u16) -> Option<u64> {
        let (base, limit) = if selector & 4 != 0 {
            if !self.s.ldtr.usable() {
                return None;
            }
            (self.s.ldtr.base, self.s.ldtr.limit)
        } else {
            (self.s.gdtr.base, u32::from(self.s.gdtr.limit))
        };
        (u32::from(selector) | 7 <= limit).then(|| self.wrap_linear(base.wrapping_add(u64::from(selector & 0xfff8))))
    }

    /// Reads the descriptor of a selector that is not null; outside its table it is `fault(selector)`.
    pub fn read_descriptor(&mut self, selector: u16, fault: fn(u32) -> Fault) -> Exec<Descriptor> {
        let address = self.descriptor_address(selector).ok_or(fault(selector_error(selector)))?;
        let raw = self.read_sys_u64(address)?;
        Ok(Descriptor { address, raw, segment: Segment::from_descriptor(selector, raw) })
    }

    /// Base bits 32-63 of a 16-byte system descriptor; bits 8-12 of its last dword must be zero.
    pub fn read_descriptor_high(&mut self, d: &Descriptor, fault: fn(u32) -> Fault) -> Exec<u64> {
        let selector = d.segment.selector;
        // The second half must be inside the table too.
        let inside = if selector & 4 != 0 {
            u32::from(selector & 0xfff8) + 15 <= self.s.ldtr.limit
        } else {
            u32::from(selector & 0xfff8) + 15 <= u32::from(self.s.gdtr.limit)
        };
        if !inside {
            return Err(fault(selector_error(selector)));
        }
        let high = self.read_sys_u64(d.address.wrapping_add(8))?;
        if high >> 40 & 0x1f != 0 {
            return Err(fault(selector_error(selector)));
        }
        Ok(high << 32)
    }

    /// Sets the accessed bit of a code or data descriptor that is being loaded.
    pub fn mark_accessed(&mut self, d: &mut Descriptor) -> Exec {
        if d.segment.attr & attr::TYPE_ACCESSED == 0 {
            d.segment.attr |= attr::TYPE_ACCESSED;
            let rights = (d.segment.attr & 0xff) as u8;
            self.write_sys_u8(d.address.wrapping_add(5), rights)?;
        }
        Ok(())
    }

    /// Loads ES, SS, DS, FS or GS as MOV and POP do, by the rules of the present mode.
    pub fn load_segment(&mut self, seg: usize, selector: u16) -> Exec {
        if !self.protected() {
            self.load_segment_real(seg, selector);
            return Ok(());
        }
        let cpl = self.s.cpl;
        let loaded = if seg == sreg::SS {
            self.stack_segment(selector, cpl, Fault::gp)?
        } else {
            self.data_segment(seg, selector)?
        };
        self.s.segments[seg] = loaded;
        Ok(())
    }

    /// Loads a segment register as real and virtual-8086 mode do: in real mode only selector and base change, so that
    /// limits set in protected mode stay ("unreal mode"); virtual-8086 mode has fixed limits and rights.
    pub fn load_segment_real(&mut self, seg: usize, selector: u16) {
        let v86 = self.v86();
        let s = &mut self.s.segments[seg];
        s.selector = selector;
        s.base = u64::from(selector) << 4;
        if v86 {
            *s = Self::v86_segment(selector);
        } else {
            // A segment that was null in protected mode becomes usable again.
            s.attr = (s.attr & !attr::UNUSABLE) | attr::P | attr::S;
            if seg != sreg::CS {
                s.attr = (s.attr & !(attr::TYPE | attr::DPL)) | 3;
            }
        }
    }

    /// A segment of virtual-8086 mode (SDM volume 3, section 20.2.1).
    pub fn v86_segment(selector: u16) -> Segment {
        Segment { base: u64::from(selector) << 4, limit: 0xffff, attr: attr::P | attr::S | attr::DPL | 3, selector }
    }

    /// Checks and reads what SS would be loaded with at privilege level `cpl`. `fault` is the class of the selector
    /// faults: #GP for MOV and POP, #TS for stack switches.
    pub fn stack_segment(&mut self, selector: u16, cpl: u8, fault: fn(u32) -> Fault) -> Exec<Segment> {
        if is_null(selector) {
            if self.mode64() && cpl != 3 && selector & 3 == u16::from(cpl) {
                return Ok(Self::null_stack(selector, cpl));
            }
            return Err(fault(0));
        }
        let mut d = self.read_descriptor(selector, fault)?;
        let writable_data = d.is_data() && d.attr() & attr::TYPE_WRITABLE != 0;
        if selector & 3 != u16::from(cpl) || !writable_data || d.dpl() != cpl {
            return Err(fault(selector_error(selector)));
        }
        if !d.present() {
            return Err(Fault::ss(selector_error(selector)));
        }
        self.mark_accessed(&mut d)?;
        Ok(d.segment)
    }

    /// SS with a null selector, as 64-bit mode allows; its DPL still carries the privilege level.
    pub fn null_stack(selector: u16, cpl: u8) -> Segment {
        Segment { base: 0, limit: 0, attr: attr::UNUSABLE | u32::from(cpl) << attr::DPL_SHIFT, selector }
    }

    fn data_segment(&mut self, seg: usize, selector: u16) -> Exec<Segment> {
        if is_null(selector) {
            return Ok(self.null_segment(seg, selector));
        }
        let mut d = self.read_descriptor(selector, Fault::gp)?;
        let error = selector_error(selector);
        let readable = d.is_data() || (d.is_code() && d.attr() & attr::TYPE_READABLE != 0);
        if !readable {
            return Err(Fault::gp(error));
        }
        if !d.is_conforming() && ((selector & 3) as u8 > d.dpl() || self.s.cpl > d.dpl()) {
            return Err(Fault::gp(error));
        }
        if !d.present() {
            return Err(Fault::np(error));
        }
        self.mark_accessed(&mut d)?;
        Ok(d.segment)
    }

    /// A data segment register loaded with a null selector. Intel's processors clear base and limit, AMD's do so if CPUID
    /// says NullSelectorClearsBase and leave them as they were otherwise (APM volume 2, section 4.5.3).
    pub fn null_segment(&self, seg: usize, selector: u16) -> Segment {
        let old = self.s.segments[seg];
        let keeps = self.vendor_is_amd() && !self.features.has(&x86::cpuid::bits::NULL_SEL_CLR_BASE);
        let (base, limit) = if keeps { (old.base, old.limit) } else { (0, 0) };
        Segment { base, limit, attr: attr::UNUSABLE, selector }
    }
}
