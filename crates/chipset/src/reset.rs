//! The reset control register at port 0xCF9 and the system control port 0x92.
//!
//! Sources: PIIX4 (290562), section 4.2.6.3 (RC, 0xCF9) and 4.2.6.2 (port 92). Both are byte registers; 0xCF9 lies inside
//! the dword of the PCI configuration address, which is reached with dword accesses only.
//!
//! **A20.** Port 0x92 bit 1 and the keyboard controller's output port can close the address line A20. The processor
//! sees every address with A20 open: no board that is modelled here runs software that depends on the wrap at 1 MiB
//! (firmware and every boot loader open the gate first thing). [`A20Gate`] keeps the bit that software reads back, and
//! is the place where a board that must close the line would tell the engine.

use crate::device::{Device, DeviceError, PortIo, PowerSink, Request, SavedState, split_read, split_write};
use crate::lock;
use serde::{Deserialize, Serialize};
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

const VERSION: u32 = 1;

/// The A20 bit as software set it (module page).
pub struct A20Gate(AtomicBool);

impl A20Gate {
    /// An open gate, as after the firmware of a modern machine.
    pub fn new() -> Arc<Self> {
        Arc::new(Self(AtomicBool::new(true)))
    }

    /// Is the line open, as far as software can read?
    pub fn is_open(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Records what software asked for.
    pub fn set(&self, open: bool) {
        if self.0.swap(open, Ordering::Relaxed) != open && !open {
            tracing::debug!("guest closed A20; the line stays open");
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    /// 0xCF9 bits 1 and 3.
    control: u8,
    /// Port 0x92 without bits 0 and 1.
    port92: u8,
    /// The A20 bit, only in saved state.
    a20: bool,
}

/// Both registers.
pub struct ResetControl {
    state: Mutex<State>,
    a20: Arc<A20Gate>,
    power: Arc<dyn PowerSink>,
}

impl ResetControl {
    /// The registers of a board with this A20 gate.
    pub fn new(a20: Arc<A20Gate>, power: Arc<dyn PowerSink>) -> Arc<Self> {
        Arc::new(Self { state: Mutex::default(), a20, power })
    }
}

impl PortIo for ResetControl {
    fn port_ranges(&self) -> Vec<RangeInclusive<u16>> {
        vec![0x92..=0x92, 0xcf9..=0xcf9]
    }

    fn port_read(&self, port: u16, data: &mut [u8]) {
        let state = lock(&self.state);
        split_read(port, data, |port| match port {
            0x92 => state.port92 | u8::from(self.a20.is_open()) << 1,
            0xcf9 => state.control,
            _ => 0xff,
        });
    }

    fn port_write(&self, port: u16, data: &[u8]) {
        let mut reset = false;
        {
            let mut state = lock(&self.state);
            split_write(port, data, |port, value| match port {
                0x92 => {
                    // Bit 0 pulses INIT when it is set.
                    reset |= value & 1 != 0;
                    state.port92 = value & !3;
                    self.a20.set(value & 2 != 0);
                }
                0xcf9 => {
                    // Bit 2 rising resets; bit 1 says hard or soft, which is the same here.
                    reset |= value & 4 != 0;
                    state.control = value & 0xa;
                }
                _ => {}
            });
        }
        if reset {
            self.power.reset();
        }
    }
}

impl Device for ResetControl {
    fn name(&self) -> &str {
        "reset"
    }

    fn ports(&self) -> Option<&dyn PortIo> {
        Some(self)
    }

    fn request(&self, request: Request<'_>) -> Result<(), DeviceError> {
        match request {
            Request::Start | Request::Stop => {}
            Request::Reset => {
                *lock(&self.state) = State::default();
                self.a20.set(true);
            }
            Request::Save(place) => {
                let state = State { a20: self.a20.is_open(), ..lock(&self.state).clone() };
                *place = Some(SavedState::new(VERSION, &state)?);
            }
            Request::Restore(saved) => {
                let new: State = saved.get(VERSION)?;
                if new.control & !0xa != 0 || new.port92 & 3 != 0 {
                    return Err(DeviceError::BadState("reset control register out of range".into()));
                }
                self.a20.set(new.a20);
                *lock(&self.state) = new;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;

    #[derive(Default)]
    struct Power(AtomicU32);
    impl PowerSink for Power {
        fn power_off(&self) {}
        fn reset(&self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn both_registers_reset() {
        let (a20, power) = (A20Gate::new(), Arc::new(Power::default()));
        let reset = ResetControl::new(a20.clone(), power.clone());
        reset.port_write(0xcf9, &[2]);
        assert_eq!(power.0.load(Ordering::SeqCst), 0);
        reset.port_write(0xcf9, &[6]);
        assert_eq!(power.0.load(Ordering::SeqCst), 1);
        let mut data = [0; 1];
        reset.port_read(0xcf9, &mut data);
        assert_eq!(data, [2]);
        reset.port_read(0x92, &mut data);
        assert_eq!(data, [2], "A20 open");
        reset.port_write(0x92, &[0]);
        reset.port_read(0x92, &mut data);
        assert_eq!(data, [0]);
        let mut saved = None;
        reset.request(Request::Save(&mut saved)).unwrap();
        reset.request(Request::Reset).unwrap();
        assert!(a20.is_open());
        reset.request(Request::Restore(&saved.unwrap())).unwrap();
        assert!(!a20.is_open());
        reset.port_write(0x92, &[3]);
        assert_eq!(power.0.load(Ordering::SeqCst), 2);
    }
}
