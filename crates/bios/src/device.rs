//! The BiosDevice: an address port and a data port (mu_msvm `BiosInterface.h`, selectors `BiosConfig*`).
//!
//! The firmware writes a selector to the address port, then reads or writes the data port, 32 bits at a time. Other sizes
//! and unknown selectors read as all ones and are ignored when written.

use crate::nvram::Nvram;
use chipset::{Device, DeviceError, PortIo, Request, SavedState};
use partition::{Clock, Gpa, GuestMemory};
use serde::{Deserialize, Serialize};
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, MutexGuard};
use uefi_core::bytes::{u32_at, u64_at};
use uefi_core::variables::{Quota, file};

/// The address port; the data port is 4 above.
pub const ADDRESS_PORT: u16 = 0x28;
const DATA_PORT: u16 = 0x2c;
/// Version of the device that the firmware may ask for: the one that has the blob and memory ranges with flags.
const VDEV_VERSION: u32 = 5;
/// Most bytes of random numbers in one request.
const MAX_RANDOM: u32 = 4096;
const VERSION: u32 = 1;

/// Selectors.
mod selector {
    pub const GENERATION_ID_LOW: u32 = 0x0e;
    pub const GENERATION_ID_HIGH: u32 = 0x0f;
    pub const BOOT_FINALIZE: u32 = 0x1a;
    pub const NVRAM_COMMAND: u32 = 0x24;
    pub const CRYPTO_COMMAND: u32 = 0x26;
    pub const WATCHDOG_CONFIG: u32 = 0x27;
    pub const WATCHDOG_RESOLUTION: u32 = 0x28;
    pub const WATCHDOG_COUNT: u32 = 0x29;
    pub const DIAGNOSTICS_GPA: u32 = 0x2b;
    pub const PROCESS_DIAGNOSTICS: u32 = 0x2c;
    pub const EVENT_LOG_FLUSH: u32 = 0x30;
    pub const VDEV_VERSION: u32 = 0x32;
    pub const DEBUG_OUTPUT: u32 = 0x36;
    /// Viridian's own: what the firmware shows of the frame buffer, width in the lower half, height in the upper.
    pub const SCREEN: u32 = 0x5600_0000;
}

/// Watchdog configuration bits.
mod watchdog {
    pub const CONFIGURED: u32 = 1;
    pub const ENABLED: u32 = 2;
    pub const ONE_SHOT: u32 = 0x10;
    pub const BOOT_STATUS: u32 = 0x100;
    pub const RUNNING: u32 = CONFIGURED | ENABLED;
    /// Seconds that one count stands for.
    pub const RESOLUTION: u32 = 1;
}

/// Why an image was refused, as the firmware reports it (`SECUREBOOT_EVENT_INFO`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SecureBootEvent {
    /// Verification failed.
    Failed,
    /// Unsigned, and its hash is not in db.
    Unsigned,
    /// Its hash is in dbx.
    HashForbidden,
    /// Neither a certificate nor its hash is in db.
    NotAllowed,
    /// A certificate is in dbx.
    CertificateForbidden,
    /// Not a PE image.
    NotAnImage,
}

/// What the firmware tells its host. All methods are called on a VP's thread with no lock of the device held.
pub trait FirmwareEvents: Send + Sync {
    /// Secure Boot refused an image.
    fn secure_boot(&self, event: SecureBootEvent);
    /// The firmware is about to leave boot services: the operating system takes over.
    fn boot_finalized(&self);
    /// A line of the firmware's log. Lines are cut at 240 bytes; the receiver limits how many it keeps.
    fn log(&self, line: &str);
    /// The watchdog has run out.
    fn watchdog_expired(&self);
}

/// What a BiosDevice is made from.
pub struct BiosConfig {
    /// Guest memory.
    pub memory: Arc<GuestMemory>,
    /// The partition's clock.
    pub clock: Arc<Clock>,
    /// Variables.
    pub nvram: Nvram,
    /// Is Secure Boot on?
    pub secure_boot: bool,
    /// Generation ID, 16 bytes; changes when the VM is restored from a checkpoint or copied.
    pub generation_id: [u8; 16],
    /// Who listens.
    pub events: Arc<dyn FirmwareEvents>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct State {
    address: u32,
    generation_gpa: u64,
    watchdog_config: u32,
    watchdog_count: u32,
    /// Reference time at which the watchdog runs out; 0: not armed.
    watchdog_deadline: u64,
    diagnostics: u32,
    /// Pixels that are shown, if the firmware has chosen others than the machine's own.
    #[serde(default)]
    screen: Option<(u16, u16)>,
    line: Vec<u8>,
}

#[derive(Serialize, Deserialize)]
struct Saved {
    state: State,
    /// Non-volatile variables are in their file; what a saved machine needs beside it are the volatile ones.
    variables: Vec<u8>,
    runtime: bool,
}

/// The device.
pub struct BiosDevice {
    memory: Arc<GuestMemory>,
    clock: Arc<Clock>,
    events: Arc<dyn FirmwareEvents>,
    secure_boot: bool,
    generation_id: Mutex<[u8; 16]>,
    inner: Mutex<(State, Nvram)>,
}

enum Tell {
    SecureBoot(SecureBootEvent),
    BootFinalized,
    Log(Vec<u8>),
}

impl BiosDevice {
    /// A device in its power-on state.
    pub fn new(config: BiosConfig) -> Arc<Self> {
        let mut nvram = config.nvram;
        nvram.reset(config.secure_boot);
        Arc::new(Self {
            memory: config.memory,
            clock: config.clock,
            events: config.events,
            secure_boot: config.secure_boot,
            generation_id: Mutex::new(config.generation_id),
            inner: Mutex::new((State::default(), nvram)),
        })
    }

    fn lock(&self) -> MutexGuard<'_, (State, Nvram)> {
        self.inner.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Looks at or changes the variables as the machine.
    pub fn with_nvram<R>(&self, f: impl FnOnce(&mut Nvram) -> R) -> R {
        f(&mut self.lock().1)
    }

    /// Gives the VM another generation ID and writes it where the firmware asked for it. The caller notifies the guest
    /// through ACPI.
    pub fn set_generation_id(&self, id: [u8; 16]) {
        *self.generation_id.lock().unwrap_or_else(|e| e.into_inner()) = id;
        let gpa = self.lock().0.generation_gpa;
        self.write_generation_id(gpa);
    }

    /// Width and height in pixels that the firmware has set; `None`: those with which the machine started. Lines follow each
    /// other without a gap.
    pub fn screen(&self) -> Option<(u16, u16)> {
        self.lock().0.screen
    }

    fn write_generation_id(&self, gpa: u64) {
        if gpa != 0 {
            let id = *self.generation_id.lock().unwrap_or_else(|e| e.into_inner());
            let _ = self.memory.write(Gpa(gpa), &id);
        }
    }

    /// To be called now and then by the machine: tells of a watchdog that has run out.
    pub fn poll_watchdog(&self) {
        let expired = {
            let state = &mut self.lock().0;
            let due = state.watchdog_deadline != 0 && self.clock.reference_time() >= state.watchdog_deadline;
            if due {
                state.watchdog_deadline = 0;
                state.watchdog_config |= watchdog::BOOT_STATUS;
            }
            due
        };
        if expired {
            self.events.watchdog_expired();
        }
    }

    fn arm_watchdog(&self, state: &mut State) {
        let running = state.watchdog_config & watchdog::RUNNING == watchdog::RUNNING && state.watchdog_count != 0;
        let span = u64::from(state.watchdog_count) * u64::from(watchdog::RESOLUTION) * 10_000_000;
        state.watchdog_deadline = if running { self.clock.reference_time() + span.max(1) } else { 0 };
    }

    fn read(&self) -> u32 {
        let state = &self.lock().0;
        match state.address {
            selector::WATCHDOG_CONFIG => state.watchdog_config,
            selector::WATCHDOG_RESOLUTION => watchdog::RESOLUTION,
            selector::WATCHDOG_COUNT => {
                let left = state.watchdog_deadline.saturating_sub(self.clock.reference_time());
                (left / 10_000_000 / u64::from(watchdog::RESOLUTION)) as u32
            }
            selector::VDEV_VERSION => VDEV_VERSION,
            _ => u32::MAX,
        }
    }

    fn write(&self, value: u32) {
        let mut guard = self.lock();
        let (state, nvram) = &mut *guard;
        let mut tell = None;
        match state.address {
            selector::GENERATION_ID_LOW => {
                state.generation_gpa = state.generation_gpa >> 32 << 32 | u64::from(value);
            }
            selector::GENERATION_ID_HIGH => {
                state.generation_gpa = state.generation_gpa & 0xffff_ffff | u64::from(value) << 32;
                let gpa = state.generation_gpa;
                drop(guard);
                return self.write_generation_id(gpa);
            }
            selector::BOOT_FINALIZE => tell = Some(Tell::BootFinalized),
            selector::NVRAM_COMMAND => nvram.command(&self.memory, Gpa(u64::from(value))),
            selector::CRYPTO_COMMAND => tell = self.crypto(Gpa(u64::from(value))),
            selector::WATCHDOG_CONFIG => {
                // BOOT_STATUS is cleared by writing one.
                let status = state.watchdog_config & watchdog::BOOT_STATUS & !value;
                state.watchdog_config = value & (watchdog::RUNNING | watchdog::ONE_SHOT) | status;
                self.arm_watchdog(state);
            }
            selector::WATCHDOG_COUNT => {
                state.watchdog_count = value;
                self.arm_watchdog(state);
            }
            selector::DIAGNOSTICS_GPA => state.diagnostics = value,
            selector::PROCESS_DIAGNOSTICS | selector::EVENT_LOG_FLUSH => {
                tracing::debug!("firmware diagnostics at {:#x}", state.diagnostics);
            }
            selector::SCREEN => state.screen = Some((value as u16, (value >> 16) as u16)),
            selector::DEBUG_OUTPUT => tell = state.debug_bytes(value),
            _ => {}
        }
        drop(guard);
        match tell {
            Some(Tell::SecureBoot(event)) => self.events.secure_boot(event),
            Some(Tell::BootFinalized) => self.events.boot_finalized(),
            Some(Tell::Log(line)) => self.events.log(&String::from_utf8_lossy(&line)),
            None => {}
        }
    }

    /// Crypto commands: random numbers and Secure Boot's events. Hashes and signatures are the firmware's own business
    /// here, so those commands answer `EFI_UNSUPPORTED`.
    fn crypto(&self, gpa: Gpa) -> Option<Tell> {
        let mut d = [0; 24];
        self.memory.read(gpa, &mut d).ok()?;
        const UNSUPPORTED: u64 = 1 << 63 | 3;
        const INVALID_PARAMETER: u64 = 1 << 63 | 2;
        let (status, tell) = match u32_at(&d, 0)? {
            4 => {
                let event = match u32_at(&d, 12)? {
                    1 => SecureBootEvent::Unsigned,
                    2 => SecureBootEvent::HashForbidden,
                    3 => SecureBootEvent::NotAllowed,
                    4 => SecureBootEvent::CertificateForbidden,
                    5 => SecureBootEvent::NotAnImage,
                    _ => SecureBootEvent::Failed,
                };
                (0, Some(Tell::SecureBoot(event)))
            }
            5 => {
                let (address, len) = (u64_at(&d, 12)?, u32_at(&d, 20)?);
                let mut bytes = vec![0; len.min(MAX_RANDOM) as usize];
                let good = len <= MAX_RANDOM
                    && getrandom::fill(&mut bytes).is_ok()
                    && self.memory.write(Gpa(address), &bytes).is_ok();
                (if good { 0 } else { INVALID_PARAMETER }, None)
            }
            _ => (UNSUPPORTED, None),
        };
        let _ = self.memory.write(gpa + 4, &u64::to_le_bytes(status));
        tell
    }
}

impl State {
    /// Debug output: up to four characters in a word, a line ends with a line feed.
    fn debug_bytes(&mut self, value: u32) -> Option<Tell> {
        const MAX_LINE: usize = 240;
        let mut done = None;
        for byte in value.to_le_bytes() {
            match byte {
                0 => break,
                b'\n' => done = Some(Tell::Log(std::mem::take(&mut self.line))),
                b'\r' => {}
                _ if self.line.len() < MAX_LINE => self.line.push(byte),
                _ => {}
            }
        }
        done
    }
}

impl PortIo for BiosDevice {
    fn port_ranges(&self) -> Vec<RangeInclusive<u16>> {
        vec![ADDRESS_PORT..=ADDRESS_PORT + 7]
    }

    fn port_read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        if let (DATA_PORT, Ok(data)) = (port, <&mut [u8; 4]>::try_from(data)) {
            *data = self.read().to_le_bytes();
        }
    }

    fn port_write(&self, port: u16, data: &[u8]) {
        let Ok(data) = <[u8; 4]>::try_from(data) else { return };
        let value = u32::from_le_bytes(data);
        match port {
            ADDRESS_PORT => self.lock().0.address = value,
            DATA_PORT => self.write(value),
            _ => {}
        }
    }
}

impl Device for BiosDevice {
    fn name(&self) -> &str {
        "bios"
    }

    fn ports(&self) -> Option<&dyn PortIo> {
        Some(self)
    }

    fn request(&self, request: Request<'_>) -> Result<(), DeviceError> {
        match request {
            Request::Start | Request::Stop => {}
            Request::Reset => {
                let (state, nvram) = &mut *self.lock();
                *state = State::default();
                nvram.reset(self.secure_boot);
            }
            Request::Save(place) => {
                let (state, nvram) = &*self.lock();
                let store = nvram.snapshot();
                let saved =
                    Saved { state: state.clone(), variables: file::encode_all(&store), runtime: store.is_runtime() };
                *place = Some(SavedState::new(VERSION, &saved)?);
            }
            Request::Restore(saved) => {
                let saved: Saved = saved.get(VERSION)?;
                let mut store = file::decode(&saved.variables, Quota::default())
                    .map_err(|e| DeviceError::BadState(e.to_string()))?;
                if saved.runtime {
                    store.enter_runtime();
                }
                let (state, nvram) = &mut *self.lock();
                *state = saved.state;
                nvram.restore(store);
            }
        }
        Ok(())
    }
}
