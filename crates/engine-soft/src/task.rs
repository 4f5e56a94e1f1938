//! Hardware task switches (SDM volume 3, chapter 7), with 32- and 16-bit TSSs.

use crate::segmentation::{Descriptor, is_null, selector_error};
use crate::vp::{Exec, Fault, SoftVp};
use x86::regs::{cr0, cr4, dr6, rflags};
use x86::segment::{Segment, attr, sreg};

/// Why a task switch happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// JMP.
    Jump,
    /// CALL.
    Call,
    /// Interrupt or exception through a task gate.
    Gate,
    /// IRET with NT.
    Iret,
}

/// TSS types without the busy bit, and the busy bit (SDM volume 3, table 3-2).
const TSS16: u32 = 1;
const TSS32: u32 = 9;
const BUSY: u32 = 2;

/// Where things are in a TSS (SDM volume 3, figures 7-2 and 7-10).
struct Layout {
    /// Bytes of a register.
    word: u64,
    eip: u64,
    segments: u64,
    /// Number of segment registers: the 16-bit TSS has no FS and GS.
    segment_count: usize,
    ldt: u64,
    /// Lowest limit that the processor accepts.
    min_limit: u32,
}

const LAYOUT32: Layout = Layout { word: 4, eip: 0x20, segments: 0x48, segment_count: 6, ldt: 0x60, min_limit: 0x67 };
const LAYOUT16: Layout = Layout { word: 2, eip: 0x0e, segments: 0x22, segment_count: 4, ldt: 0x2a, min_limit: 0x2b };

/// What a TSS holds of a task.
struct Image {
    cr3: Option<u64>,
    eip: u64,
    eflags: u64,
    gprs: [u64; 8],
    segments: [u16; 6],
    ldt: u16,
    trap: bool,
}

impl SoftVp {
    fn tss_read(&mut self, base: u64, at: u64, word: u64) -> Exec<u64> {
        let la = self.wrap_linear(base.wrapping_add(at));
        if word == 4 { self.read_sys_u32(la).map(u64::from) } else { self.read_sys_u16(la).map(u64::from) }
    }

    fn tss_write(&mut self, base: u64, at: u64, word: u64, value: u64) -> Exec {
        let la = self.wrap_linear(base.wrapping_add(at));
        if word == 4 { self.write_sys_u32(la, value as u32) } else { self.write_sys_u16(la, value as u16) }
    }

    fn read_image(&mut self, base: u64, layout: &Layout) -> Exec<Image> {
        let w = layout.word;
        let mut image = Image {
            cr3: None,
            eip: self.tss_read(base, layout.eip, w)?,
            eflags: self.tss_read(base, layout.eip + w, w)?,
            gprs: [0; 8],
            segments: [0; 6],
            ldt: self.tss_read(base, layout.ldt, 2)? as u16,
            trap: false,
        };
        for n in 0..8u64 {
            image.gprs[n as usize] = self.tss_read(base, layout.eip + w * (2 + n), w)?;
        }
        for n in 0..layout.segment_count {
            image.segments[n] = self.tss_read(base, layout.segments + w * n as u64, 2)? as u16;
        }
        if w == 4 {
            image.cr3 = Some(self.tss_read(base, 0x1c, 4)?);
            image.trap = self.tss_read(base, 0x64, 2)? & 1 != 0;
        }
        Ok(image)
    }

    fn write_image(&mut self, base: u64, layout: &Layout, eip: u64, eflags: u64) -> Exec {
        let w = layout.word;
        self.tss_write(base, layout.eip, w, eip)?;
        self.tss_write(base, layout.eip + w, w, eflags)?;
        for n in 0..8u64 {
            self.tss_write(base, layout.eip + w * (2 + n), w, self.s.gprs[n as usize])?;
        }
        for n in 0..layout.segment_count {
            let selector = self.s.segments[n].selector;
            self.tss_write(base, layout.segments + w * n as u64, 2, u64::from(selector))?;
        }
        Ok(())
    }

    fn set_busy(&mut self, selector: u16, busy: bool) -> Exec {
        if let Some(address) = self.descriptor_address(selector & !4) {
            let kind = self.read_sys_u8(address.wrapping_add(5))?;
            self.write_sys_u8(address.wrapping_add(5), if busy { kind | BUSY as u8 } else { kind & !(BUSY as u8) })?;
        }
        Ok(())
    }

    /// The TSS descriptor that a task switch goes to, with the checks of SDM volume 3, section 7.3, steps 2 to 4.
    fn task_descriptor(&mut self, selector: u16, reason: Reason) -> Exec<Descriptor> {
        let error = selector_error(selector);
        let fault = if reason == Reason::Iret { Fault::ts } else { Fault::gp };
        if is_null(selector) || selector & 4 != 0 {
            return Err(fault(error));
        }
        let d = self.read_descriptor(selector, fault)?;
        let busy = if reason == Reason::Iret { BUSY } else { 0 };
        let kind = d.system_type().unwrap_or(0);
        if kind != TSS16 | busy && kind != TSS32 | busy {
            return Err(fault(error));
        }
        if !d.present() {
            return Err(Fault::np(error));
        }
        let layout = if kind & 8 != 0 { &LAYOUT32 } else { &LAYOUT16 };
        if d.segment.limit < layout.min_limit {
            return Err(Fault::ts(error));
        }
        Ok(d)
    }

    /// Switches to the task of a TSS selector. Privilege checks of the way that led here are the caller's. `next_rip`
    /// is where the old task goes on, with `flags`. Faults up to the commit point leave the old task as it was; later ones belong to
    /// the new task (`rip` is its own then).
    pub fn switch_task(&mut self, selector: u16, reason: Reason, flags: u64) -> Exec {
        let mut new = self.task_descriptor(selector, reason)?;
        let layout = if new.attr() & 8 != 0 { &LAYOUT32 } else { &LAYOUT16 };
        let old = self.s.tr;
        let old_layout = if old.attr & 8 != 0 { &LAYOUT32 } else { &LAYOUT16 };
        let nested = matches!(reason, Reason::Call | Reason::Gate);

        // Everything that may fault in the old task comes first.
        let span = old_layout.min_limit as usize + 1;
        self.probe_sys_write(self.wrap_linear(old.base), span)?;
        let mut image = self.read_image(new.segment.base, layout)?;
        if nested {
            self.probe_sys_write(self.wrap_linear(new.segment.base), 2)?;
        }

        let mut flags = flags;
        if matches!(reason, Reason::Jump | Reason::Iret) {
            self.set_busy(old.selector, false)?;
        }
        if reason == Reason::Iret {
            flags &= !rflags::NT;
        }
        self.write_image(old.base, old_layout, self.s.next_rip, flags)?;
        if nested {
            self.tss_write(new.segment.base, 0, 2, u64::from(old.selector))?;
            image.eflags |= rflags::NT;
        }
        if reason != Reason::Iret {
            self.set_busy(selector, true)?;
        }
        // The commit point: from here on the new task is the current one.
        new.segment.attr |= BUSY;
        self.s.tr = new.segment;
        self.s.cr0 |= cr0::TS;
        self.load_image(&image, layout)
    }

    fn load_image(&mut self, image: &Image, layout: &Layout) -> Exec {
        let wide = layout.word == 4;
        self.s.rip = image.eip;
        self.s.next_rip = image.eip;
        let keep = if wide { 0 } else { self.s.rflags & 0xffff_0000 & !(rflags::VM | rflags::RF) };
        self.s.rflags = (image.eflags & rflags::ALL) | keep | rflags::FIXED;
        self.interrupts_unblocked();
        for n in 0..8 {
            self.s.gprs[n] = if wide { image.gprs[n] } else { 0xffff_0000 | image.gprs[n] };
        }
        // Local breakpoints belong to the old task.
        self.s.dr7 &= !0x155;
        self.watchpoints_changed();
        for n in 0..6 {
            // Selectors first, so that a fault in the new task sees them; unusable until they are checked.
            self.s.segments[n] = Segment { selector: image.segments[n], attr: attr::UNUSABLE, ..self.s.segments[n] };
        }
        self.s.ldtr = Segment { selector: image.ldt, attr: attr::UNUSABLE, ..Segment::default() };
        let v86 = image.eflags & rflags::VM != 0;
        let cpl = if v86 { 3 } else { (image.segments[sreg::CS] & 3) as u8 };
        self.s.segments[sreg::SS].attr |= u32::from(cpl) << attr::DPL_SHIFT;
        self.mode_changed();
        self.update_boundary();
        if let Some(cr3) = image.cr3
            && self.s.cr0 & cr0::PG != 0
        {
            let pcid = if self.s.cr4 & cr4::PCIDE != 0 { 0xfff } else { 0 };
            self.load_cr3(cr3 & !pcid)?;
        }
        self.load_task_ldt(image.ldt)?;
        if v86 {
            for n in 0..6 {
                self.s.segments[n] = Self::v86_segment(image.segments[n]);
            }
        } else {
            self.load_task_segments(&image.segments, cpl)?;
        }
        self.mode_changed();
        if self.s.next_rip > u64::from(self.s.segments[sreg::CS].limit) {
            return Err(Fault::GP0);
        }
        if image.trap {
            self.raise_debug(dr6::BT);
        }
        Ok(())
    }

    fn load_task_ldt(&mut self, selector: u16) -> Exec {
        if is_null(selector) {
            return Ok(());
        }
        let error = selector_error(selector);
        if selector & 4 != 0 {
            return Err(Fault::ts(error));
        }
        let d = self.read_descriptor(selector, Fault::ts)?;
        if d.system_type() != Some(2) || !d.present() {
            return Err(Fault::ts(error));
        }
        self.s.ldtr = d.segment;
        Ok(())
    }

    /// Segment registers of the new task (SDM volume 3, table 7-1): selector faults are #TS.
    fn load_task_segments(&mut self, selectors: &[u16; 6], cpl: u8) -> Exec {
        let cs = selectors[sreg::CS];
        if is_null(cs) {
            return Err(Fault::ts(0));
        }
        let mut code = self.read_descriptor(cs, Fault::ts)?;
        let error = selector_error(cs);
        let dpl_fits = if code.is_conforming() { code.dpl() <= cpl } else { code.dpl() == cpl };
        if !code.is_code() || !dpl_fits {
            return Err(Fault::ts(error));
        }
        if !code.present() {
            return Err(Fault::np(error));
        }
        let stack = self.stack_segment(selectors[sreg::SS], cpl, Fault::ts)?;
        self.mark_accessed(&mut code)?;
        self.s.segments[sreg::SS] = stack;
        self.s.segments[sreg::CS] = code.segment;
        self.mode_changed();
        for seg in [sreg::DS, sreg::ES, sreg::FS, sreg::GS] {
            let selector = selectors[seg];
            if is_null(selector) {
                continue;
            }
            let mut d = self.read_descriptor(selector, Fault::ts)?;
            let error = selector_error(selector);
            let readable = d.is_data() || (d.is_code() && d.attr() & attr::TYPE_READABLE != 0);
            let privileged = d.is_conforming() || ((selector & 3) as u8 <= d.dpl() && cpl <= d.dpl());
            if !readable || !privileged {
                return Err(Fault::ts(error));
            }
            if !d.present() {
                return Err(Fault::np(error));
            }
            self.mark_accessed(&mut d)?;
            self.s.segments[seg] = d.segment;
        }
        Ok(())
    }
}
