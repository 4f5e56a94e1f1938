//! The local APIC (SDM volume 3, chapter 10).
//!
//! A VP's own thread reads and writes its registers and takes interrupts; every other thread may deliver to it. So all
//! registers are atomics, and only the timer has a lock. [`ApicBus`] finds the receivers of a message.

mod bus;
mod timer;

pub use bus::ApicBus;

use crate::timers::{NEVER, Timers};
use crate::vp::attention;
use crate::wake::Waker;
use partition::{Clock, LapicState, VpExits, VpIndex};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use timer::{TIMER_DEADLINE, TIMER_ONE_SHOT, TIMER_PERIODIC, Timer};
use x86::msr::apic_base;

/// Register numbers: offset in the register page divided by 16; the x2APIC MSR is 0x800 plus the number (SDM volume 3,
/// tables 10-1 and 10-6).
pub mod reg {
    #![allow(missing_docs)]
    pub const ID: u32 = 0x02;
    pub const VERSION: u32 = 0x03;
    pub const TPR: u32 = 0x08;
    pub const PPR: u32 = 0x0a;
    pub const EOI: u32 = 0x0b;
    pub const LDR: u32 = 0x0d;
    pub const DFR: u32 = 0x0e;
    pub const SVR: u32 = 0x0f;
    pub const ISR: u32 = 0x10;
    pub const TMR: u32 = 0x18;
    pub const IRR: u32 = 0x20;
    pub const ESR: u32 = 0x28;
    pub const ICR: u32 = 0x30;
    pub const ICR_HIGH: u32 = 0x31;
    pub const LVT_TIMER: u32 = 0x32;
    pub const LVT_THERMAL: u32 = 0x33;
    pub const LVT_PERF: u32 = 0x34;
    pub const LVT_LINT0: u32 = 0x35;
    pub const LVT_LINT1: u32 = 0x36;
    pub const LVT_ERROR: u32 = 0x37;
    pub const INITIAL_COUNT: u32 = 0x38;
    pub const CURRENT_COUNT: u32 = 0x39;
    pub const DIVIDE: u32 = 0x3e;
    pub const SELF_IPI: u32 = 0x3f;
}

/// LVT and ICR bits.
mod bit {
    pub const MASKED: u32 = 1 << 16;
    pub const LEVEL_TRIGGER: u32 = 1 << 15;
    pub const ASSERT: u32 = 1 << 14;
    pub const LOGICAL: u32 = 1 << 11;
    pub const SVR_ENABLE: u32 = 1 << 8;
}

/// Error status bits (SDM volume 3, figure 10-9).
mod error {
    pub const SEND_ILLEGAL_VECTOR: u32 = 1 << 5;
    pub const RECEIVE_ILLEGAL_VECTOR: u32 = 1 << 6;
    pub const ILLEGAL_REGISTER: u32 = 1 << 7;
}

/// Delivery modes.
mod mode {
    pub const FIXED: u32 = 0;
    pub const LOWEST: u32 = 1;
    pub const NMI: u32 = 4;
    pub const INIT: u32 = 5;
    pub const SIPI: u32 = 6;
    pub const EXTINT: u32 = 7;
}

/// Signals that wait for the VP, in [`Lapic`]'s event word.
pub mod event {
    /// A non-maskable interrupt.
    pub const NMI: u32 = 1;
    /// INIT.
    pub const INIT: u32 = 2;
    /// A start-up IPI, with its vector in bits 8 to 15.
    pub const SIPI: u32 = 4;
    pub(super) const SIPI_VECTOR_SHIFT: u32 = 8;
}

/// The access is not allowed: #GP(0) for an x2APIC MSR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Denied;

/// An interrupt message.
#[derive(Clone, Copy, Debug)]
pub struct Message {
    /// Destination, 32 bits in physical and x2APIC logical form.
    pub destination: u32,
    /// Logical destination mode.
    pub logical: bool,
    /// Delivery mode (3 bits).
    pub mode: u32,
    /// Vector.
    pub vector: u8,
    /// Level-triggered.
    pub level: bool,
}

/// A VP's local APIC.
pub struct Lapic {
    index: VpIndex,
    x2apic_offered: bool,
    deadline_offered: bool,
    base: AtomicU64,
    /// The register page by register number, as in `LapicState`.
    regs: [AtomicU32; 64],
    /// Errors that a write to ESR will show.
    errors: AtomicU32,
    events: AtomicU32,
    /// Level of the PIC's output at LINT0.
    extint: AtomicBool,
    tsc_deadline: AtomicU64,
    /// The VP's TSC minus the partition's clock.
    tsc_delta: AtomicU64,
    timer: Mutex<Timer>,
    auto_eoi: [AtomicU64; 4],
    clock: Arc<Clock>,
    waker: Arc<Waker>,
    timers: Arc<Timers>,
}

impl Lapic {
    /// In the state after reset.
    pub fn new(index: VpIndex, offered: Offered, clock: Arc<Clock>, waker: Arc<Waker>, timers: Arc<Timers>) -> Self {
        let lapic = Self {
            index,
            x2apic_offered: offered.x2apic,
            deadline_offered: offered.tsc_deadline,
            base: AtomicU64::new(0),
            regs: [const { AtomicU32::new(0) }; 64],
            errors: AtomicU32::new(0),
            events: AtomicU32::new(0),
            extint: AtomicBool::new(false),
            tsc_deadline: AtomicU64::new(0),
            tsc_delta: AtomicU64::new(0),
            timer: Mutex::new(Timer { deadline: NEVER, period: 0 }),
            auto_eoi: [const { AtomicU64::new(0) }; 4],
            clock,
            waker,
            timers,
        };
        lapic.load(&LapicState::reset(index, index == 0));
        lapic
    }

    /// `IA32_APIC_BASE`.
    pub fn base(&self) -> u64 {
        self.base.load(Ordering::Relaxed)
    }

    /// Where the register page is, if it is in physical memory.
    pub fn mmio_page(&self) -> Option<u64> {
        let base = self.base();
        let on = base & (apic_base::ENABLE | apic_base::X2APIC_ENABLE) == apic_base::ENABLE;
        on.then_some(base & !0xfff)
    }

    fn hardware_enabled(&self) -> bool {
        self.base() & apic_base::ENABLE != 0
    }

    /// Is it in x2APIC mode?
    pub fn is_x2apic(&self) -> bool {
        self.base() & apic_base::X2APIC_ENABLE != 0
    }

    /// Is any interrupt requested, of whatever priority?
    pub fn is_requested(&self) -> bool {
        self.hardware_enabled() && self.highest(reg::IRR).is_some()
    }

    /// Does it accept interrupts, or drop them because it is disabled?
    pub fn accepts(&self) -> bool {
        self.software_enabled()
    }

    fn software_enabled(&self) -> bool {
        self.hardware_enabled() && self.get(reg::SVR) & bit::SVR_ENABLE != 0
    }

    #[inline]
    fn get(&self, r: u32) -> u32 {
        self.regs[r as usize].load(Ordering::SeqCst)
    }
    fn put(&self, r: u32, value: u32) {
        self.regs[r as usize].store(value, Ordering::SeqCst);
    }
    fn timer(&self) -> MutexGuard<'_, Timer> {
        self.timer.lock().unwrap_or_else(|e| e.into_inner())
    }

    // ---- IA32_APIC_BASE ------------------------------------------------------------------------------------------

    /// Writes `IA32_APIC_BASE` (SDM volume 3, sections 10.4.3 and 10.12.5). The caller tells the MMU where the page is.
    pub fn set_base(&self, value: u64, maxphyaddr: u32) -> Result<(), Denied> {
        use apic_base::{BSP, ENABLE, X2APIC_ENABLE};
        let address = ((1u64 << maxphyaddr) - 1) & !0xfff;
        let allowed = BSP | ENABLE | address | if self.x2apic_offered { X2APIC_ENABLE } else { 0 };
        if value & !allowed != 0 {
            return Err(Denied);
        }
        let old = self.base();
        let (was, is) = (old & (ENABLE | X2APIC_ENABLE), value & (ENABLE | X2APIC_ENABLE));
        let x2apic = ENABLE | X2APIC_ENABLE;
        if is == X2APIC_ENABLE || was == 0 && is == x2apic || was == x2apic && is == ENABLE {
            return Err(Denied);
        }
        if was != 0 && is == 0 {
            // Enabled again later, it starts from the reset state.
            self.reset_registers();
        }
        self.base.store(value, Ordering::SeqCst);
        if was != x2apic && is == x2apic {
            self.put(reg::ID, self.index);
            self.put(reg::LDR, x2apic_ldr(self.index));
            self.put(reg::ICR_HIGH, 0);
        } else if was == 0 && is == ENABLE {
            self.put(reg::ID, self.index << 24);
        }
        self.waker.raise(attention::INTERRUPT);
        Ok(())
    }

    fn reset_registers(&self) {
        let base = self.base();
        let deadline = self.timers_cleared();
        self.load_registers(&LapicState::reset(self.index, self.index == 0));
        self.base.store(base, Ordering::SeqCst);
        drop(deadline);
    }

    /// INIT: every register but the id and the base goes to its reset value (SDM volume 3, section 10.4.7.3).
    pub fn init_reset(&self) {
        self.reset_registers();
        if self.is_x2apic() {
            self.put(reg::ID, self.index);
            self.put(reg::LDR, x2apic_ldr(self.index));
        }
    }

    fn timers_cleared(&self) -> MutexGuard<'_, Timer> {
        let mut timer = self.timer();
        *timer = Timer { deadline: NEVER, period: 0 };
        self.tsc_deadline.store(0, Ordering::SeqCst);
        self.timers.set(self.index, NEVER);
        timer
    }

    // ---- registers -----------------------------------------------------------------------------------------------

    /// A read of the register page (SDM volume 3, section 10.4.1): 4 bytes at a multiple of 16; anything else is
    /// undefined and reads as zeros.
    pub fn mmio_read(&self, offset: u32, data: &mut [u8]) {
        data.fill(0);
        let r = (offset >> 4) & 0xff;
        let (at, len) = ((offset & 0xf) as usize, data.len());
        let value = match r {
            0..=0x3f if at < 4 => self.read_xapic(r).to_le_bytes(),
            _ => return,
        };
        let n = len.min(4 - at);
        data[..n].copy_from_slice(&value[at..at + n]);
    }

    /// A write to the register page; only 4-byte writes at a multiple of 16 have an effect.
    pub fn mmio_write(&self, bus: &ApicBus, exits: &dyn VpExits, offset: u32, data: &[u8]) {
        let Some(value) = data.first_chunk::<4>() else { return };
        if offset & 0xf != 0 || offset >= 0x400 {
            return;
        }
        self.write_xapic(bus, exits, offset >> 4, u32::from_le_bytes(*value));
    }

    fn read_xapic(&self, r: u32) -> u32 {
        match r {
            reg::EOI | reg::SELF_IPI => 0,
            _ => self.read_common(r),
        }
    }

    fn read_common(&self, r: u32) -> u32 {
        match r {
            reg::PPR => self.ppr(),
            reg::CURRENT_COUNT => self.current_count(),
            reg::ID..=reg::VERSION | reg::TPR | reg::LDR..=reg::ESR | reg::ICR..=reg::INITIAL_COUNT | reg::DIVIDE => {
                self.get(r)
            }
            _ => {
                self.raise_error(error::ILLEGAL_REGISTER);
                0
            }
        }
    }

    fn write_xapic(&self, bus: &ApicBus, exits: &dyn VpExits, r: u32, value: u32) {
        match r {
            // The id is the VP's number for good, as on current processors (SDM volume 3, section 10.4.6).
            reg::ID | reg::VERSION | reg::PPR | reg::CURRENT_COUNT => {}
            reg::ISR..=0x27 => {}
            reg::LDR => self.put(reg::LDR, value & 0xff00_0000),
            reg::DFR => self.put(reg::DFR, value | 0x0fff_ffff),
            reg::ICR_HIGH => self.put(reg::ICR_HIGH, value & 0xff00_0000),
            reg::ICR => {
                let destination = self.get(reg::ICR_HIGH) >> 24;
                self.put(reg::ICR, value & !(1 << 12));
                self.send(bus, value, destination);
            }
            reg::SELF_IPI => self.raise_error(error::ILLEGAL_REGISTER),
            _ => self.write_common(exits, r, value),
        }
    }

    /// Registers that behave alike in both modes.
    fn write_common(&self, exits: &dyn VpExits, r: u32, value: u32) {
        match r {
            reg::TPR => self.set_tpr(value & 0xff),
            reg::EOI => self.eoi(exits),
            reg::SVR => self.write_svr(value & 0x3ff),
            reg::ESR => self.put(reg::ESR, self.errors.swap(0, Ordering::SeqCst)),
            reg::LVT_TIMER..=reg::LVT_ERROR => self.write_lvt(r, value),
            reg::INITIAL_COUNT => self.write_initial_count(value),
            reg::DIVIDE => {
                self.put(reg::DIVIDE, value & 0xb);
                self.restart_count();
            }
            _ => self.raise_error(error::ILLEGAL_REGISTER),
        }
    }

    /// RDMSR of an x2APIC register (SDM volume 3, table 10-6).
    pub fn x2apic_read(&self, r: u32) -> Result<u64, Denied> {
        if !self.is_x2apic() {
            return Err(Denied);
        }
        match r {
            reg::ID..=reg::VERSION
            | reg::TPR
            | reg::PPR
            | reg::LDR
            | reg::SVR..=reg::ESR
            | reg::LVT_TIMER..=reg::CURRENT_COUNT
            | reg::DIVIDE => Ok(u64::from(self.read_common(r))),
            reg::ICR => Ok(u64::from(self.get(reg::ICR_HIGH)) << 32 | u64::from(self.get(reg::ICR))),
            _ => Err(Denied),
        }
    }

    /// WRMSR of an x2APIC register.
    pub fn x2apic_write(&self, bus: &ApicBus, exits: &dyn VpExits, r: u32, value: u64) -> Result<(), Denied> {
        if !self.is_x2apic() {
            return Err(Denied);
        }
        // Reserved bits (SDM volume 3, section 10.12.1.3). Delivery status (bit 12) and remote IRR (bit 14) of the LVT are
        // not reserved but read-only: Linux writes them when it disconnects its APIC.
        let allowed: u64 = match r {
            reg::TPR => 0xff,
            reg::EOI | reg::ESR => 0,
            reg::SVR => 0x1ff,
            reg::ICR => 0xffff_ffff_000c_cfff,
            reg::LVT_TIMER => 0x7_10ff,
            reg::LVT_THERMAL | reg::LVT_PERF => 0x1_17ff,
            reg::LVT_LINT0 | reg::LVT_LINT1 => 0x1_f7ff,
            reg::LVT_ERROR => 0x1_10ff,
            reg::INITIAL_COUNT => 0xffff_ffff,
            reg::DIVIDE => 0xb,
            reg::SELF_IPI => 0xff,
            _ => return Err(Denied),
        };
        if value & !allowed != 0 {
            return Err(Denied);
        }
        match r {
            reg::ICR => {
                self.put(reg::ICR, value as u32);
                self.put(reg::ICR_HIGH, (value >> 32) as u32);
                self.send(bus, value as u32, (value >> 32) as u32);
            }
            reg::SELF_IPI => self.send(bus, value as u32 | 1 << 18, 0),
            _ => self.write_common(exits, r, value as u32),
        }
        Ok(())
    }

    /// [`partition::Partition::apic_read`].
    pub fn read_any(&self, r: u32) -> u64 {
        match r {
            reg::ICR if self.is_x2apic() => u64::from(self.get(reg::ICR_HIGH)) << 32 | u64::from(self.get(reg::ICR)),
            reg::ICR => u64::from(self.get(reg::ICR_HIGH) >> 24) << 32 | u64::from(self.get(reg::ICR)),
            0..=0x3f => u64::from(self.read_xapic(r)),
            _ => 0,
        }
    }

    /// [`partition::Partition::apic_write`].
    pub fn write_any(&self, bus: &ApicBus, exits: &dyn VpExits, r: u32, value: u64) {
        match r {
            reg::ICR => {
                let destination = (value >> 32) as u32;
                self.put(reg::ICR, value as u32 & !(1 << 12));
                self.put(reg::ICR_HIGH, if self.is_x2apic() { destination } else { destination << 24 });
                self.send(bus, value as u32, destination);
            }
            reg::SELF_IPI => self.send(bus, value as u32 & 0xff | 1 << 18, 0),
            _ if self.is_x2apic() => {
                let _ = self.x2apic_write(bus, exits, r, value);
            }
            0..=0x3f => self.write_xapic(bus, exits, r, value as u32),
            _ => {}
        }
    }

    fn write_svr(&self, value: u32) {
        self.put(reg::SVR, value);
        if value & bit::SVR_ENABLE == 0 {
            // SDM volume 3, section 10.4.7.2: all LVT entries are masked while the APIC is disabled by software.
            for r in reg::LVT_TIMER..=reg::LVT_ERROR {
                self.regs[r as usize].fetch_or(bit::MASKED, Ordering::SeqCst);
            }
        }
        self.waker.raise(attention::INTERRUPT);
    }

    fn write_lvt(&self, r: u32, value: u32) {
        let writable = match r {
            reg::LVT_TIMER if self.deadline_offered => 0x7_00ff,
            reg::LVT_TIMER => 0x3_00ff,
            reg::LVT_LINT0 | reg::LVT_LINT1 => 0x1_a7ff,
            reg::LVT_ERROR => 0x1_00ff,
            _ => 0x1_07ff,
        };
        let mut value = value & writable;
        if !self.software_enabled() {
            value |= bit::MASKED;
        }
        let old = self.get(r);
        self.put(r, value);
        if r == reg::LVT_TIMER && (old ^ value) & 0x6_0000 != 0 {
            self.timer_mode_changed(old >> 17 & 3, value >> 17 & 3);
        }
        if r == reg::LVT_LINT0 {
            self.waker.raise(attention::INTERRUPT);
        }
    }

    /// Task priority.
    pub fn tpr(&self) -> u32 {
        self.get(reg::TPR)
    }

    /// Sets the task priority (also by CR8, whose value is bits 4 to 7).
    pub fn set_tpr(&self, value: u32) {
        self.put(reg::TPR, value);
        if self.pending_vector().is_some() {
            self.waker.raise(attention::INTERRUPT);
        }
    }

    /// Processor priority (SDM volume 3, section 10.8.3.1).
    fn ppr(&self) -> u32 {
        let tpr = self.get(reg::TPR);
        let isr = self.highest(reg::ISR).map_or(0, u32::from) & 0xf0;
        if tpr & 0xf0 >= isr { tpr } else { isr }
    }

    fn highest(&self, first: u32) -> Option<u8> {
        (0..8u32).rev().find_map(|i| {
            let word = self.get(first + i);
            (word != 0).then(|| (i * 32 + 31 - word.leading_zeros()) as u8)
        })
    }

    fn set_bit(&self, first: u32, vector: u8, on: bool) -> bool {
        let (word, mask) = (&self.regs[(first + u32::from(vector) / 32) as usize], 1u32 << (vector % 32));
        let old = if on { word.fetch_or(mask, Ordering::SeqCst) } else { word.fetch_and(!mask, Ordering::SeqCst) };
        old & mask != 0
    }

    fn test_bit(&self, first: u32, vector: u8) -> bool {
        self.get(first + u32::from(vector) / 32) >> (vector % 32) & 1 != 0
    }

    // ---- interrupts ----------------------------------------------------------------------------------------------

    /// The interrupt that the processor should take, if its priority allows.
    #[inline]
    pub fn pending_vector(&self) -> Option<u8> {
        if !self.hardware_enabled() {
            return None;
        }
        let vector = self.highest(reg::IRR)?;
        (u32::from(vector) & 0xf0 > self.ppr() & 0xf0).then_some(vector)
    }

    /// The processor takes an interrupt: it moves from IRR to ISR (or, with auto-EOI, just goes).
    pub fn acknowledge(&self, vector: u8) {
        self.set_bit(reg::IRR, vector, false);
        if self.auto_eoi[usize::from(vector / 64)].load(Ordering::Relaxed) >> (vector % 64) & 1 == 0 {
            self.set_bit(reg::ISR, vector, true);
        }
    }

    /// Vectors that need no end-of-interrupt.
    pub fn set_auto_eoi(&self, vectors: [u64; 4]) {
        for (word, value) in self.auto_eoi.iter().zip(vectors) {
            word.store(value, Ordering::Relaxed);
        }
    }

    fn eoi(&self, exits: &dyn VpExits) {
        let Some(vector) = self.highest(reg::ISR) else { return };
        self.set_bit(reg::ISR, vector, false);
        if self.test_bit(reg::TMR, vector) {
            exits.eoi(self.index, vector);
        }
        if self.pending_vector().is_some() {
            self.waker.raise(attention::INTERRUPT);
        }
    }

    /// Accepts a fixed interrupt (SDM volume 3, section 10.8). From any thread.
    pub fn accept(&self, vector: u8, level: bool) {
        if !self.software_enabled() {
            return;
        }
        if vector < 16 {
            self.raise_error(error::RECEIVE_ILLEGAL_VECTOR);
            return;
        }
        self.set_bit(reg::TMR, vector, level);
        if !self.set_bit(reg::IRR, vector, true) {
            self.waker.raise(attention::INTERRUPT);
        }
    }

    fn raise_error(&self, error: u32) {
        let fresh = self.errors.fetch_or(error, Ordering::SeqCst) & error == 0;
        let lvt = self.get(reg::LVT_ERROR);
        // An error vector that is illegal itself would raise the same error again: it only counts.
        if fresh && lvt & bit::MASKED == 0 && lvt & 0xff >= 16 {
            self.accept(lvt as u8, false);
        }
    }

    /// Level of the PIC's output, which is wired to LINT0.
    pub fn set_extint(&self, asserted: bool) {
        let was = self.extint.swap(asserted, Ordering::SeqCst);
        if asserted && !was {
            let lvt = self.get(reg::LVT_LINT0);
            if self.hardware_enabled() && lvt & bit::MASKED == 0 {
                match lvt >> 8 & 7 {
                    mode::FIXED => self.accept(lvt as u8, lvt & bit::LEVEL_TRIGGER != 0),
                    mode::NMI => self.signal(event::NMI),
                    mode::INIT => self.signal(event::INIT),
                    _ => {}
                }
            }
            self.waker.raise(attention::INTERRUPT);
        }
    }

    /// Is there an external interrupt for the processor to acknowledge?
    pub fn extint_pending(&self) -> bool {
        if !self.extint.load(Ordering::SeqCst) {
            return false;
        }
        let lvt = self.get(reg::LVT_LINT0);
        !self.hardware_enabled() || lvt & bit::MASKED == 0 && lvt >> 8 & 7 == mode::EXTINT
    }

    /// Raises an [`event`]. From any thread.
    pub fn signal(&self, event: u32) {
        if event == event::INIT {
            // A start-up IPI that came before belongs to the time before.
            let clear = event::SIPI | 0xff << event::SIPI_VECTOR_SHIFT;
            let _ = self.events.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |e| Some(e & !clear | event));
        } else {
            self.events.fetch_or(event, Ordering::SeqCst);
        }
        self.waker.raise(attention::INTERRUPT);
    }

    /// A start-up IPI. The first one counts.
    pub fn signal_sipi(&self, vector: u8) {
        let set = event::SIPI | u32::from(vector) << event::SIPI_VECTOR_SHIFT;
        let _ =
            self.events.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |e| (e & event::SIPI == 0).then_some(e | set));
        self.waker.raise(attention::INTERRUPT);
    }

    /// Events that wait.
    pub fn events(&self) -> u32 {
        self.events.load(Ordering::SeqCst)
    }

    /// Takes an NMI or INIT; says whether it was there.
    pub fn take_event(&self, event: u32) -> bool {
        self.events.fetch_and(!event, Ordering::SeqCst) & event != 0
    }

    /// Takes a start-up IPI.
    pub fn take_sipi(&self) -> Option<u8> {
        let clear = event::SIPI | 0xff << event::SIPI_VECTOR_SHIFT;
        let old = self.events.fetch_and(!clear, Ordering::SeqCst);
        (old & event::SIPI != 0).then_some((old >> event::SIPI_VECTOR_SHIFT) as u8)
    }

    // ---- sending -------------------------------------------------------------------------------------------------

    fn send(&self, bus: &ApicBus, command: u32, destination: u32) {
        let mode = command >> 8 & 7;
        let vector = command as u8;
        if matches!(mode, mode::FIXED | mode::LOWEST) && vector < 16 {
            self.raise_error(error::SEND_ILLEGAL_VECTOR);
            return;
        }
        let level = command & bit::LEVEL_TRIGGER != 0;
        if mode == mode::INIT && level && command & bit::ASSERT == 0 {
            // INIT level de-assert: sets arbitration ids on old processors, nothing on newer ones.
            return;
        }
        let message = Message { destination, logical: command & bit::LOGICAL != 0, mode, vector, level: false };
        match command >> 18 & 3 {
            0 => bus.deliver(&message),
            1 => {
                if mode == mode::FIXED {
                    self.accept(vector, false);
                }
            }
            shorthand => {
                for target in bus.lapics.iter().filter(|t| shorthand == 2 || t.index != self.index) {
                    target.receive(&message);
                }
            }
        }
    }

    /// Is this APIC among the destinations?
    fn matches(&self, m: &Message) -> bool {
        if !self.hardware_enabled() {
            // It still has its id for INIT, SIPI and NMI.
            return !m.logical && (m.destination == self.index || is_broadcast(m.destination));
        }
        if !m.logical {
            return m.destination == self.index || is_broadcast(m.destination);
        }
        let ldr = self.get(reg::LDR);
        if self.is_x2apic() {
            return m.destination == u32::MAX || m.destination >> 16 == ldr >> 16 && m.destination & ldr & 0xffff != 0;
        }
        let (mine, theirs) = (ldr >> 24, m.destination);
        if theirs > 0xff {
            return theirs == u32::MAX;
        }
        match self.get(reg::DFR) >> 28 {
            0xf => mine & theirs != 0,
            // Flat cluster: 0xf is every cluster.
            0 => (theirs >> 4 == 0xf || theirs >> 4 == mine >> 4) && mine & theirs & 0xf != 0,
            _ => false,
        }
    }

    /// Takes a message that is for this APIC.
    fn receive(&self, m: &Message) {
        match m.mode {
            mode::FIXED | mode::LOWEST => self.accept(m.vector, m.level),
            mode::NMI => self.signal(event::NMI),
            mode::INIT => self.signal(event::INIT),
            mode::SIPI => self.signal_sipi(m.vector),
            // SMI: there is no system-management mode. ExtINT messages are not sent to several processors.
            _ => {}
        }
    }

    // ---- state ---------------------------------------------------------------------------------------------------

    /// All registers.
    pub fn state(&self) -> LapicState {
        let mut regs = vec![0u8; LapicState::SIZE];
        for r in 0..64u32 {
            let value = match r {
                reg::PPR => self.ppr(),
                reg::CURRENT_COUNT => self.current_count(),
                _ => self.get(r),
            };
            let at = r as usize * 16;
            regs[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
        LapicState { regs, base: self.base(), tsc_deadline: self.tsc_deadline() }
    }

    fn load_registers(&self, state: &LapicState) {
        for r in 0..64u32 {
            let at = r as usize * 16;
            let value = state.regs.get(at..at + 4).map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
            self.put(r, value);
        }
        self.errors.store(0, Ordering::SeqCst);
    }

    /// Loads all registers and starts the timer where it was.
    pub fn load(&self, state: &LapicState) {
        drop(self.timers_cleared());
        self.base.store(state.base, Ordering::SeqCst);
        self.load_registers(state);
        // The id is the VP's number, whatever the state says.
        self.put(reg::ID, if self.is_x2apic() { self.index } else { self.index << 24 });
        if self.is_x2apic() {
            self.put(reg::LDR, x2apic_ldr(self.index));
        }
        match self.timer_mode() {
            TIMER_DEADLINE => self.set_tsc_deadline(state.tsc_deadline),
            TIMER_ONE_SHOT | TIMER_PERIODIC => {
                let left = self.get(reg::CURRENT_COUNT);
                let full = self.get(reg::INITIAL_COUNT);
                if full != 0 && (left != 0 || self.timer_mode() == TIMER_PERIODIC) {
                    self.start_count(if left != 0 { left } else { full });
                }
            }
            _ => {}
        }
        self.waker.raise(attention::INTERRUPT);
    }

    /// Replaces the events that wait (loading a state).
    pub fn set_events(&self, nmi: bool, init: bool, sipi: Option<u8>) {
        let mut events = 0;
        if nmi {
            events |= event::NMI;
        }
        if init {
            events |= event::INIT;
        }
        if let Some(vector) = sipi {
            events |= event::SIPI | u32::from(vector) << event::SIPI_VECTOR_SHIFT;
        }
        self.events.store(events, Ordering::SeqCst);
        if events != 0 {
            self.waker.raise(attention::INTERRUPT);
        }
    }
}

/// What the processor model has of the optional parts.
#[derive(Clone, Copy, Debug)]
pub struct Offered {
    /// x2APIC mode.
    pub x2apic: bool,
    /// TSC-deadline timer mode.
    pub tsc_deadline: bool,
}

const fn x2apic_ldr(id: u32) -> u32 {
    (id >> 4) << 16 | 1 << (id & 0xf)
}

/// There are at most 64 VPs, so that 0xff is never an id.
const fn is_broadcast(destination: u32) -> bool {
    destination == 0xff || destination == u32::MAX
}

#[cfg(test)]
mod tests;
