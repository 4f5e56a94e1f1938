//! The ACPI fixed hardware: PM1 event and control registers, the PM timer, a general-purpose event block and the SCI.
//!
//! Source: ACPI 6.5, section 4.8.3 (fixed hardware registers) and 4.8.5.1 (general-purpose event registers). There is no
//! legacy mode and so no SMI command port: SCI_EN is always set (ACPI 6.5, 4.8.3.2.1; FADT SMI_CMD is zero).

use crate::device::{Device, DeviceError, PortIo, PowerSink, Request, SavedState, split_read, split_write};
use crate::line::Line;
use crate::timer::{Timer, TimerService, TimerTarget};
use crate::{lock, scale};
use partition::Clock;
use serde::{Deserialize, Serialize};
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, Weak};

/// SLP_TYP value that means S5 here; the DSDT's `\_S5` says the same.
pub const SLP_TYP_S5: u8 = 5;
/// Frequency of the PM timer is `TIMER_TICKS / TIMER_SECONDS` Hz: 3.579545 MHz, the colour burst.
const TIMER_TICKS: u64 = 315_000_000;
const TIMER_SECONDS: u64 = 88;
const VERSION: u32 = 1;

/// Where the registers are, relative to the block's base.
pub mod layout {
    /// PM1a_EVT_BLK: status (2 bytes), enable (2 bytes).
    pub const PM1_EVENT: u16 = 0;
    /// PM1a_CNT_BLK.
    pub const PM1_CONTROL: u16 = 4;
    /// PM_TMR_BLK.
    pub const TIMER: u16 = 8;
    /// RESET_REG of the FADT: writing [`RESET_VALUE`] resets.
    pub const RESET: u16 = 0x0c;
    /// GPE0_BLK: two bytes status, two bytes enable.
    pub const GPE0: u16 = 0x20;
    /// Bytes of GPE0_BLK.
    pub const GPE0_LEN: u16 = 4;
    /// Ports in all.
    pub const SIZE: u16 = 0x24;
    /// RESET_VALUE of the FADT.
    pub const RESET_VALUE: u8 = 0x01;
}

/// Bits of PM1 status and enable (ACPI 6.5, tables 4.12 and 4.13).
mod pm1 {
    pub const TIMER: u16 = 1 << 0;
    pub const GLOBAL: u16 = 1 << 5;
    pub const POWER_BUTTON: u16 = 1 << 8;
    pub const SLEEP_BUTTON: u16 = 1 << 9;
    pub const RTC: u16 = 1 << 10;
    /// Status only.
    pub const WAKE: u16 = 1 << 15;
    pub const ENABLES: u16 = TIMER | GLOBAL | POWER_BUTTON | SLEEP_BUTTON | RTC;
    pub const STATUSES: u16 = ENABLES | WAKE;
}

/// Bits of PM1 control (ACPI 6.5, table 4.14).
mod control {
    pub const SCI_EN: u16 = 1 << 0;
    pub const BUS_MASTER_RELOAD: u16 = 1 << 1;
    pub const SLP_TYP_SHIFT: u32 = 10;
    pub const SLP_TYP: u16 = 7 << SLP_TYP_SHIFT;
    pub const SLP_EN: u16 = 1 << 13;
    /// What a write keeps; SLP_EN and GBL_RLS are commands.
    pub const KEPT: u16 = BUS_MASTER_RELOAD | SLP_TYP;
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    pm1_status: u16,
    pm1_enable: u16,
    pm1_control: u16,
    gpe_status: u16,
    gpe_enable: u16,
    /// How often the timer's highest bit had toggled when it was last looked at.
    toggles: u64,
}

impl State {
    fn sci(&self) -> bool {
        self.pm1_status & self.pm1_enable != 0 || self.gpe_status & self.gpe_enable != 0
    }

    fn register(&mut self, offset: u16) -> Option<&mut u16> {
        Some(match offset & !1 {
            0 => &mut self.pm1_status,
            2 => &mut self.pm1_enable,
            4 => &mut self.pm1_control,
            0x20 => &mut self.gpe_status,
            0x22 => &mut self.gpe_enable,
            _ => return None,
        })
    }
}

/// What the guest asked for with a write.
#[derive(Default)]
struct Wish {
    off: bool,
    reset: bool,
}

/// The PM block.
pub struct PowerManagement {
    base: u16,
    /// 31: the guest sees a 32-bit timer; 23: a 24-bit timer.
    highest_bit: u32,
    clock: Arc<Clock>,
    state: Mutex<State>,
    timer: Timer,
    sci: Line,
    power: Arc<dyn PowerSink>,
}

impl PowerManagement {
    /// A PM block at port `base`. `wide_timer` selects the 32-bit PM timer (FADT flag TMR_VAL_EXT).
    pub fn new(base: u16, wide_timer: bool, timers: &TimerService, sci: Line, power: Arc<dyn PowerSink>) -> Arc<Self> {
        let pm = Arc::new(Self {
            base,
            highest_bit: if wide_timer { 31 } else { 23 },
            clock: timers.clock().clone(),
            state: Mutex::default(),
            timer: timers.timer(),
            sci,
            power,
        });
        let target: Arc<dyn TimerTarget> = pm.clone();
        pm.timer.connect(Arc::downgrade(&target) as Weak<dyn TimerTarget>);
        pm
    }

    fn ticks(&self) -> u64 {
        scale(self.clock.tsc(), TIMER_TICKS, TIMER_SECONDS.saturating_mul(self.clock.tsc_frequency_hz()))
    }

    fn with<R>(&self, f: impl FnOnce(&mut State, u64) -> R) -> R {
        let result = {
            let mut state = lock(&self.state);
            let ticks = self.ticks();
            let toggles = ticks >> self.highest_bit;
            if std::mem::replace(&mut state.toggles, toggles) != toggles {
                state.pm1_status |= pm1::TIMER;
            }
            let result = f(&mut state, ticks);
            self.sci.set(state.sci());
            // The status bit is needed in time only if it interrupts.
            let deadline = (state.pm1_enable & pm1::TIMER != 0 && state.pm1_status & pm1::TIMER == 0).then(|| {
                let at = (toggles + 1) << self.highest_bit;
                scale(at, TIMER_SECONDS.saturating_mul(self.clock.tsc_frequency_hz()), TIMER_TICKS).saturating_add(1)
            });
            self.timer.set(deadline);
            result
        };
        self.sci.deliver();
        result
    }

    /// Somebody has pressed the power button.
    pub fn press_power_button(&self) {
        self.with(|s, _| s.pm1_status |= pm1::POWER_BUTTON);
    }

    /// Raises a general-purpose event, 0 to 15.
    pub fn raise_gpe(&self, event: u8) {
        if event < 16 {
            self.with(|s, _| s.gpe_status |= 1 << event);
        }
    }

    fn write_byte(&self, state: &mut State, offset: u16, value: u8, wish: &mut Wish) {
        if offset == layout::RESET {
            wish.reset |= value == layout::RESET_VALUE;
            return;
        }
        let shift = 8 * (offset & 1);
        let (wide, mask) = (u16::from(value) << shift, 0xffu16 << shift);
        let Some(register) = state.register(offset) else { return };
        match offset & !1 {
            // Write one to clear.
            0 | 0x20 => *register &= !wide,
            2 => *register = (*register & !mask | wide) & pm1::ENABLES,
            0x22 => *register = *register & !mask | wide,
            _ => {
                *register = (*register & !mask | wide) & control::KEPT;
                if wide & control::SLP_EN != 0 {
                    let kind = (*register & control::SLP_TYP) >> control::SLP_TYP_SHIFT;
                    if kind == u16::from(SLP_TYP_S5) {
                        wish.off = true;
                    } else {
                        // A sleep state that the tables do not offer: the guest is awake again at once.
                        tracing::debug!(kind, "guest asked for a sleep state that this board does not have");
                        state.pm1_status |= pm1::WAKE;
                    }
                }
            }
        }
    }
}

impl TimerTarget for PowerManagement {
    fn expired(&self) {
        self.with(|_, _| {});
    }
}

impl PortIo for PowerManagement {
    fn port_ranges(&self) -> Vec<RangeInclusive<u16>> {
        vec![self.base..=self.base + layout::RESET, self.base + layout::GPE0..=self.base + layout::SIZE - 1]
    }

    fn port_read(&self, port: u16, data: &mut [u8]) {
        self.with(|s, ticks| {
            let value = (ticks & ((2u64 << self.highest_bit) - 1)) as u32;
            split_read(port.wrapping_sub(self.base), data, |offset| match offset {
                layout::TIMER..=0xb => value.to_le_bytes()[usize::from(offset - layout::TIMER)],
                layout::PM1_CONTROL => s.pm1_control.to_le_bytes()[0] | control::SCI_EN as u8,
                _ => match s.register(offset) {
                    Some(register) => register.to_le_bytes()[usize::from(offset & 1)],
                    None if offset <= layout::RESET => 0,
                    None => 0xff,
                },
            });
        });
    }

    fn port_write(&self, port: u16, data: &[u8]) {
        let mut wish = Wish::default();
        self.with(|s, _| {
            split_write(port.wrapping_sub(self.base), data, |offset, value| {
                self.write_byte(s, offset, value, &mut wish);
            });
        });
        if wish.off {
            self.power.power_off();
        } else if wish.reset {
            self.power.reset();
        }
    }
}

impl Device for PowerManagement {
    fn name(&self) -> &str {
        "pm"
    }

    fn ports(&self) -> Option<&dyn PortIo> {
        Some(self)
    }

    fn request(&self, request: Request<'_>) -> Result<(), DeviceError> {
        match request {
            Request::Start => self.with(|_, _| {}),
            Request::Stop => {}
            Request::Reset => {
                self.with(|s, ticks| *s = State { toggles: ticks >> self.highest_bit, ..State::default() });
            }
            Request::Save(place) => *place = Some(SavedState::new(VERSION, &*lock(&self.state))?),
            Request::Restore(saved) => {
                let new: State = saved.get(VERSION)?;
                if new.pm1_status & !pm1::STATUSES | new.pm1_enable & !pm1::ENABLES | new.pm1_control & !control::KEPT
                    != 0
                {
                    return Err(DeviceError::BadState("PM1 register out of range".into()));
                }
                let level = new.sci();
                *lock(&self.state) = new;
                self.sci.prime(level);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[derive(Default)]
    struct Power {
        off: AtomicU32,
        reset: AtomicU32,
    }
    impl PowerSink for Power {
        fn power_off(&self) {
            self.off.fetch_add(1, Ordering::SeqCst);
        }
        fn reset(&self) {
            self.reset.fetch_add(1, Ordering::SeqCst);
        }
    }
    fn bench(wide: bool) -> (Arc<Clock>, Arc<TimerService>, Arc<Power>, Arc<PowerManagement>) {
        let clock = Arc::new(Clock::new());
        let timers = TimerService::manual(clock.clone());
        let power = Arc::new(Power::default());
        let pm = PowerManagement::new(0x400, wide, &timers, Line::disconnected(), power.clone());
        (clock, timers, power, pm)
    }
    fn inw(pm: &PowerManagement, port: u16) -> u16 {
        let mut data = [0; 2];
        pm.port_read(port, &mut data);
        u16::from_le_bytes(data)
    }
    fn outw(pm: &PowerManagement, port: u16, value: u16) {
        pm.port_write(port, &value.to_le_bytes());
    }
    fn timer(pm: &PowerManagement) -> u32 {
        let mut data = [0; 4];
        pm.port_read(0x408, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn soft_off_and_refused_sleep() {
        let (_, _, power, pm) = bench(true);
        assert_eq!(inw(&pm, 0x404), 1, "SCI_EN");
        outw(&pm, 0x404, 1 << 10 | 1 << 13);
        assert_eq!(inw(&pm, 0x400), 0x8000, "awake again");
        outw(&pm, 0x400, 0x8000);
        assert_eq!(inw(&pm, 0x400), 0);
        assert_eq!(power.off.load(Ordering::SeqCst), 0);
        outw(&pm, 0x404, 5 << 10);
        assert_eq!(power.off.load(Ordering::SeqCst), 0, "SLP_TYP alone does nothing");
        outw(&pm, 0x404, 5 << 10 | 1 << 13);
        assert_eq!(power.off.load(Ordering::SeqCst), 1);
        assert_eq!(inw(&pm, 0x404), 5 << 10 | 1, "SLP_EN reads as zero");
        pm.port_write(0x40c, &[2]);
        assert_eq!(power.reset.load(Ordering::SeqCst), 0);
        pm.port_write(0x40c, &[1]);
        assert_eq!(power.reset.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn timer_counts_and_overflows() {
        for (wide, half) in [(false, 1u64 << 23), (true, 1 << 31)] {
            let (clock, timers, _, pm) = bench(wide);
            assert_eq!(timer(&pm), 0);
            clock.set(clock.tsc_at_100ns(10_000_000));
            assert!(timer(&pm).abs_diff(3_579_545) <= 1);
            outw(&pm, 0x402, 1);
            let deadline = timers.next_deadline().unwrap();
            clock.set(deadline);
            assert_eq!(timers.run_due(10), 1);
            assert!(pm.sci.level());
            assert_eq!(inw(&pm, 0x400) & 1, 1);
            assert!(u64::from(timer(&pm)).abs_diff(half) <= 1);
            outw(&pm, 0x400, 1);
            assert!(!pm.sci.level());
            clock.set(timers.next_deadline().unwrap());
            timers.run_due(10);
            assert!(timer(&pm) <= 1, "wraps to zero");
            assert!(pm.sci.level());
        }
    }

    #[test]
    fn buttons_and_general_purpose_events() {
        let (_, _, _, pm) = bench(true);
        pm.press_power_button();
        assert!(!pm.sci.level());
        outw(&pm, 0x402, 0x100);
        assert!(pm.sci.level());
        outw(&pm, 0x400, 0x100);
        assert!(!pm.sci.level());
        pm.raise_gpe(3);
        outw(&pm, 0x422, 8);
        assert!(pm.sci.level());
        let mut saved = None;
        pm.request(Request::Save(&mut saved)).unwrap();
        let (_, _, _, other) = bench(true);
        other.request(Request::Restore(&saved.unwrap())).unwrap();
        assert!(other.sci.level());
        outw(&other, 0x420, 8);
        assert!(!other.sci.level());
    }
}
