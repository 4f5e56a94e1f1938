//! # micro-guests: an engine against the architecture's rules
//!
//! Guests of a few instructions, each written for one rule of the processor's manual, that run on any engine: the
//! harness makes a partition with a little RAM, puts a VP into the mode that the guest wants, runs it through the public
//! [`partition::Engine`] interface, and compares what it reported through a port with what the manual says.
//!
//! Or, as a file that loaders take ([`elf`]), in a whole machine.
//!
//! It may use: `partition`, `x86`, an assembler. It must never know: which engine it runs on.
#![forbid(unsafe_code)]

pub mod chapters;
pub mod elf;
pub mod layout;

use iced_x86::code_asm::CodeAssembler;
use iced_x86::{BlockEncoderOptions, IcedError};
use partition::{
    Clock, Engine, EngineOptions, Gpa, GuestMemory, HypercallContext, HypercallOutcome, Msi, MsrOutcome, Partition,
    PartitionConfig, RunExit, VpExits, VpIndex, VpState,
};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, mpsc};
use std::time::Duration;
use x86::cpuid::{CpuModel, CpuidTable};

pub use layout::Mode;

/// A doubleword written here is a result.
pub const RESULT_PORT: u16 = 0xf0;
/// A write here ends the guest.
pub const EXIT_PORT: u16 = 0xf4;
/// Reads as 0x11, 0x22, ... a byte at a time.
pub const PATTERN_PORT: u16 = 0xf8;
/// A page of device registers: reads as the low byte of the address, and writes are recorded.
pub const DEVICE: u64 = 0xd000_0000;
/// Guest RAM in bytes.
pub const RAM: u64 = 16 << 20;

/// How a guest ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// It wrote to the exit port.
    Exited,
    /// It did not get there in time.
    TimedOut,
    /// Triple fault.
    TripleFault,
    /// The engine failed.
    Failed(String),
}

/// An access to the device page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceAccess {
    /// Write or read.
    pub write: bool,
    /// Offset in the page.
    pub offset: u64,
    /// Bytes (of a write: the data).
    pub data: Vec<u8>,
}

/// What a guest did.
pub struct Outcome {
    /// How it ended.
    pub end: End,
    /// What it reported.
    pub results: Vec<u32>,
    /// What it did to the device page.
    pub device: Vec<DeviceAccess>,
    /// The VP afterwards.
    pub state: Option<VpState>,
    /// Guest memory afterwards.
    pub memory: Arc<GuestMemory>,
}

/// A guest before it runs.
pub struct Guest {
    /// Memory.
    pub memory: Arc<GuestMemory>,
    /// The first VP's registers.
    pub state: VpState,
    model: CpuModel,
    vps: u32,
}

/// The processor model that micro-guests run on.
fn model() -> CpuModel {
    static MODEL: OnceLock<CpuModel> = OnceLock::new();
    MODEL
        .get_or_init(|| {
            ["x86-64-v3", "x86-64-v2", "host"]
                .iter()
                .find_map(|name| CpuModel::by_name(name).ok())
                .expect("this host can offer one of the processor models")
        })
        .clone()
}

type TableFilter = Box<dyn Fn(CpuidTable) -> CpuidTable + Send + Sync>;
static FILTER: OnceLock<TableFilter> = OnceLock::new();

/// For an engine that cannot offer all of the model: what `filter` makes of a CPUID table is what guests get. Micro-guests
/// about what is missing then do nothing. Only the first call in a process counts.
pub fn limit_model(filter: impl Fn(CpuidTable) -> CpuidTable + Send + Sync + 'static) {
    let _ = FILTER.set(Box::new(filter));
}

impl Guest {
    /// A guest whose VP starts in this mode at [`layout::CODE`], with tables, stacks and handlers in place.
    pub fn new(mode: Mode) -> Self {
        let memory = GuestMemory::with_ram(RAM, 0xc000_0000..1 << 32, false).expect("16 MiB of memory");
        let model = model();
        let mut state = VpState::reset(0, model.signature());
        layout::prepare(&memory, &mut state, mode);
        Self { memory, state, model, vps: 1 }
    }

    /// More than one VP; the others wait for SIPI.
    pub fn vps(mut self, count: u32) -> Self {
        self.vps = count;
        self
    }

    /// Does the model have this CPUID feature?
    pub fn has(&self, bit: &x86::cpuid::bits::Bit) -> bool {
        bit.in_table(&self.table(0, 0))
    }

    fn table(&self, vp: u32, hz: u64) -> CpuidTable {
        let table = self.model.table(vp, self.vps, hz);
        match FILTER.get() {
            Some(filter) => filter(table),
            None => table,
        }
    }

    /// Writes bytes.
    pub fn put(&self, gpa: u64, bytes: &[u8]) {
        self.memory.write(Gpa(gpa), bytes).expect("inside the guest's RAM");
    }

    /// Writes a quadword.
    pub fn put_u64(&self, gpa: u64, value: u64) {
        self.put(gpa, &value.to_le_bytes());
    }

    /// Writes a doubleword.
    pub fn put_u32(&self, gpa: u64, value: u32) {
        self.put(gpa, &value.to_le_bytes());
    }

    /// Assembles code of this bitness at a linear address and puts it at a physical one.
    pub fn assemble_at(
        &self,
        gpa: u64,
        linear: u64,
        bits: u32,
        write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
    ) {
        let mut a = CodeAssembler::new(bits).expect("16, 32 or 64");
        write(&mut a).expect("assembles");
        let code = a.assemble_options(linear, BlockEncoderOptions::DONT_FIX_BRANCHES).expect("assembles");
        self.put(gpa, &code.inner.code_buffer);
    }

    /// Assembles the guest's main code.
    pub fn code(&self, bits: u32, write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) {
        self.assemble_at(layout::CODE, layout::CODE, bits, write);
    }

    /// Runs the guest.
    pub fn run(self, engine: &dyn Engine) -> Outcome {
        let clock = Arc::new(Clock::new());
        let hz = clock.tsc_frequency_hz();
        let config = PartitionConfig {
            vp_count: self.vps,
            memory: self.memory.clone(),
            clock: clock.clone(),
            cpuid: (0..self.vps).map(|n| self.table(n, hz)).collect(),
            msr_exits: Vec::new(),
            hypercall_port: None,
            options: EngineOptions::default(),
        };
        let partition = match engine.create(config) {
            Ok(partition) => partition,
            Err(e) => return self.failed(e.to_string()),
        };
        clock.start();
        run_vps(&*partition, self)
    }

    fn failed(self, what: String) -> Outcome {
        let memory = self.memory;
        Outcome { end: End::Failed(what), results: Vec::new(), device: Vec::new(), state: None, memory }
    }
}

fn run_vps(partition: &dyn Partition, guest: Guest) -> Outcome {
    let exits = Exits::new(partition, guest.vps);
    let (done, wait) = mpsc::channel::<()>();
    let mut outcome = (End::TimedOut, None);
    std::thread::scope(|scope| {
        let exits = &exits;
        scope.spawn(move || {
            if wait.recv_timeout(Duration::from_secs(20)).is_err() {
                exits.late.store(true, Ordering::SeqCst);
                exits.stop();
            }
        });
        for n in 1..guest.vps {
            scope.spawn(move || {
                if let Ok(mut vp) = partition.take_vp(n) {
                    while !exits.stopped.load(Ordering::SeqCst) {
                        match vp.run(exits) {
                            Ok(RunExit::Kicked) => {}
                            _ => break,
                        }
                    }
                }
            });
        }
        outcome = run_first(partition, &guest.state, exits);
        exits.stop();
        let _ = done.send(());
    });
    Outcome {
        end: outcome.0,
        results: exits.results.into_inner().expect("no panic holds it"),
        device: exits.device.into_inner().expect("no panic holds it"),
        state: outcome.1,
        memory: guest.memory,
    }
}

fn run_first(partition: &dyn Partition, state: &VpState, exits: &Exits<'_>) -> (End, Option<VpState>) {
    let mut vp = match partition.take_vp(0) {
        Ok(vp) => vp,
        Err(e) => return (End::Failed(e.to_string()), None),
    };
    if let Err(e) = vp.set_state(state) {
        return (End::Failed(e.to_string()), None);
    }
    let end = loop {
        match vp.run(exits) {
            Ok(RunExit::Kicked) if exits.late.load(Ordering::SeqCst) => break End::TimedOut,
            Ok(RunExit::Kicked) if exits.stopped.load(Ordering::SeqCst) => break End::Exited,
            Ok(RunExit::Kicked) => {}
            Ok(RunExit::TripleFault) => break End::TripleFault,
            Err(e) => break End::Failed(e.to_string()),
        }
    };
    (end, vp.state().ok())
}

/// The harness's machine.
struct Exits<'a> {
    partition: &'a dyn Partition,
    vps: u32,
    results: Mutex<Vec<u32>>,
    device: Mutex<Vec<DeviceAccess>>,
    pattern: Mutex<u8>,
    stopped: AtomicBool,
    late: AtomicBool,
}

impl<'a> Exits<'a> {
    fn new(partition: &'a dyn Partition, vps: u32) -> Self {
        Self {
            partition,
            vps,
            results: Mutex::default(),
            device: Mutex::default(),
            pattern: Mutex::new(0),
            stopped: AtomicBool::new(false),
            late: AtomicBool::new(false),
        }
    }

    fn stop(&self) {
        self.stopped.store(true, Ordering::SeqCst);
        for n in 0..self.vps {
            self.partition.kick(n);
        }
    }
}

impl VpExits for Exits<'_> {
    fn io_read(&self, _: VpIndex, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        if port == PATTERN_PORT {
            let mut pattern = self.pattern.lock().expect("no panic holds it");
            for byte in data {
                *pattern = pattern.wrapping_add(0x11);
                *byte = *pattern;
            }
        }
    }
    fn io_write(&self, _: VpIndex, port: u16, data: &[u8]) {
        let mut value = [0; 4];
        value[..data.len()].copy_from_slice(data);
        match port {
            RESULT_PORT => self.results.lock().expect("no panic holds it").push(u32::from_le_bytes(value)),
            EXIT_PORT => self.stop(),
            _ => {}
        }
    }
    fn mmio_read(&self, _: VpIndex, gpa: Gpa, data: &mut [u8]) {
        for (n, byte) in data.iter_mut().enumerate() {
            *byte = gpa.0 as u8 + n as u8;
        }
        self.record(false, gpa, data);
    }
    fn mmio_write(&self, _: VpIndex, gpa: Gpa, data: &[u8]) {
        self.record(true, gpa, data);
    }
    fn msr_read(&self, _: VpIndex, _: u32) -> MsrOutcome {
        MsrOutcome::Fault
    }
    fn msr_write(&self, _: VpIndex, _: u32, _: u64) -> MsrOutcome {
        MsrOutcome::Fault
    }
    fn hypercall(&self, _: VpIndex, _: &mut dyn HypercallContext) -> HypercallOutcome {
        HypercallOutcome::InvalidOpcode
    }
    fn eoi(&self, _: VpIndex, _: u8) {}
    fn acknowledge_extint(&self, _: VpIndex) -> Option<u8> {
        None
    }
}

impl Exits<'_> {
    fn record(&self, write: bool, gpa: Gpa, data: &[u8]) {
        if gpa.0 >> 12 == DEVICE >> 12 {
            let access = DeviceAccess { write, offset: gpa.0 & 0xfff, data: data.to_vec() };
            self.device.lock().expect("no panic holds it").push(access);
        }
    }
}

impl Outcome {
    /// The guest must have ended by itself with these results.
    #[track_caller]
    pub fn expect(self, name: &str, results: &[u32]) -> Self {
        let shown = |list: &[u32]| list.iter().map(|v| format!("{v:#x}")).collect::<Vec<_>>().join(" ");
        assert_eq!(
            (&self.end, shown(&self.results)),
            (&End::Exited, shown(results)),
            "{name}: (left: what it did, right: what the manual says)"
        );
        self
    }
}

/// What the fault handler reports of an exception.
pub fn fault(vector: u8, error: u32, cr2: u64) -> [u32; 3] {
    [u32::from(vector), error, cr2 as u32]
}

/// An MSI, for guests that want an interrupt.
pub fn interrupt(vector: u8) -> Msi {
    Msi::fixed(0, vector)
}
