//! A bare machine for micro-guests that are assembled in 64-bit mode: RAM, identity page tables, a GDT, an IDT, and
//! ports that report.
#![allow(dead_code, missing_docs)]

use iced_x86::code_asm::CodeAssembler;
use partition::{
    Activity, Clock, Engine, EngineError, EngineOptions, Gpa, GuestMemory, HypercallContext, HypercallOutcome,
    MsrOutcome, Partition, PartitionConfig, RunExit, Vp, VpExits, VpIndex, VpState,
};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use x86::cpuid::{CpuModel, CpuidTable};
use x86::paging::{P, PS, RW, US};
use x86::regs::{cr0, cr4, efer, gpr, rflags};
use x86::segment::{Segment, TableRegister, attr, sreg};

pub const RAM: u64 = 16 << 20;
pub const PML4: u64 = 0x1000;
pub const PDPT: u64 = 0x2000;
/// Page directories, four of them.
pub const PD: u64 = 0xa000;
pub const GDT: u64 = 0x5000;
pub const IDT: u64 = 0x6000;
/// Where code goes.
pub const CODE: u64 = 0x1_0000;
/// Scratch data that guests and tests share.
pub const DATA: u64 = 0x8_0000;
/// Stack of VP n ends at STACKS + (n + 1) * 0x1000.
pub const STACKS: u64 = 0x9_0000;

/// A one-byte or four-byte OUT to this port ends the test with AL/EAX.
pub const PORT_DONE: u16 = 0xf4;
/// OUT EAX to this port is logged.
pub const PORT_LOG: u16 = 0xf5;
/// The hypercall port.
pub const PORT_HYPERCALL: u8 = 0xf6;

/// The machine's side.
#[derive(Default)]
pub struct Board {
    pub done: Mutex<Option<u32>>,
    pub log: Mutex<Vec<(VpIndex, u32)>>,
    pub eois: Mutex<Vec<(VpIndex, u8)>>,
    pub mmio: Mutex<Vec<(u64, u64, bool)>>,
    pub msrs: Mutex<Vec<(u32, u64)>>,
    pub extint: AtomicU64,
    pub hypercalls: AtomicU64,
    pub partition: Mutex<Option<std::sync::Weak<dyn Partition>>>,
    pub finished: AtomicBool,
    /// The VP is kicked, from inside the exit, when the log has this many entries (0: never).
    pub kick_at: AtomicU64,
}

fn value(data: &[u8]) -> u64 {
    let mut bytes = [0u8; 8];
    bytes[..data.len()].copy_from_slice(data);
    u64::from_le_bytes(bytes)
}

impl Board {
    fn finish(&self, code: u32) {
        *self.done.lock().unwrap() = Some(code);
        self.finished.store(true, Ordering::SeqCst);
        if let Some(p) = self.partition.lock().unwrap().as_ref().and_then(std::sync::Weak::upgrade) {
            for vp in 0..64 {
                p.kick(vp);
            }
        }
    }
}

impl VpExits for Board {
    fn io_read(&self, _: VpIndex, _: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn io_write(&self, vp: VpIndex, port: u16, data: &[u8]) {
        match port {
            PORT_DONE => self.finish(value(data) as u32),
            PORT_LOG => {
                let mut log = self.log.lock().unwrap();
                log.push((vp, value(data) as u32));
                if log.len() as u64 == self.kick_at.load(Ordering::SeqCst)
                    && let Some(p) = self.partition.lock().unwrap().as_ref().and_then(std::sync::Weak::upgrade)
                {
                    p.kick(vp);
                }
            }
            _ => {}
        }
    }
    fn mmio_read(&self, _: VpIndex, gpa: Gpa, data: &mut [u8]) {
        self.mmio.lock().unwrap().push((gpa.0, data.len() as u64, false));
        let bytes = (gpa.0 ^ 0x5a5a_5a5a_5a5a_5a5a).to_le_bytes();
        data.copy_from_slice(&bytes[..data.len()]);
    }
    fn mmio_write(&self, _: VpIndex, gpa: Gpa, data: &[u8]) {
        self.mmio.lock().unwrap().push((gpa.0, value(data), true));
    }
    fn msr_read(&self, _: VpIndex, msr: u32) -> MsrOutcome {
        match msr {
            0x4000_00f0 => MsrOutcome::ValueThenIdle(0),
            0x4000_0002 => MsrOutcome::Value(0x1234_5678_9abc_def0),
            _ => MsrOutcome::Fault,
        }
    }
    fn msr_write(&self, _: VpIndex, msr: u32, value: u64) -> MsrOutcome {
        self.msrs.lock().unwrap().push((msr, value));
        if msr == 0x4000_0001 { MsrOutcome::Fault } else { MsrOutcome::Value(0) }
    }
    fn hypercall(&self, _: VpIndex, context: &mut dyn HypercallContext) -> HypercallOutcome {
        let n = self.hypercalls.fetch_add(1, Ordering::SeqCst);
        match context.gpr(gpr::RCX) {
            1 => {
                context.set_gpr(gpr::RAX, context.gpr(gpr::RDX) + 1);
                let x = context.xmm(1);
                context.set_xmm(0, x.wrapping_add(5));
                HypercallOutcome::Complete
            }
            2 if n < 5 => HypercallOutcome::Restart,
            2 => HypercallOutcome::Complete,
            _ => HypercallOutcome::InvalidOpcode,
        }
    }
    fn eoi(&self, vp: VpIndex, vector: u8) {
        self.eois.lock().unwrap().push((vp, vector));
    }
    fn acknowledge_extint(&self, _: VpIndex) -> Option<u8> {
        let vector = self.extint.swap(0, Ordering::SeqCst);
        if let Some(p) = self.partition.lock().unwrap().as_ref().and_then(std::sync::Weak::upgrade) {
            p.set_extint(false);
        }
        (vector != 0).then_some(vector as u8)
    }
}

/// A partition with everything around it.
pub struct Bench {
    pub memory: Arc<GuestMemory>,
    pub clock: Arc<Clock>,
    pub partition: Arc<dyn Partition>,
    pub board: Arc<Board>,
    pub vps: Vec<Box<dyn Vp>>,
    signature: u32,
}

impl Bench {
    pub fn new(engine: &dyn Engine, model: &str, vps: u32) -> Self {
        let memory = GuestMemory::with_ram(RAM, 0xc000_0000..1 << 32, false).unwrap();
        Self::with_memory(engine, model, vps, memory)
    }

    pub fn with_memory(engine: &dyn Engine, model: &str, vps: u32, memory: Arc<GuestMemory>) -> Self {
        Self::with_options(engine, model, vps, memory, EngineOptions::default())
    }

    pub fn with_options(
        engine: &dyn Engine,
        model: &str,
        vps: u32,
        memory: Arc<GuestMemory>,
        options: EngineOptions,
    ) -> Self {
        let model = CpuModel::by_name(model).unwrap();
        let hz = Clock::new().tsc_frequency_hz();
        Self::with_all(engine, (0..vps).map(|n| model.table(n, vps, hz)).collect(), memory, options)
    }

    pub fn with_tables(engine: &dyn Engine, cpuid: Vec<CpuidTable>, memory: Arc<GuestMemory>) -> Self {
        Self::with_all(engine, cpuid, memory, EngineOptions::default())
    }

    fn with_all(engine: &dyn Engine, cpuid: Vec<CpuidTable>, memory: Arc<GuestMemory>, options: EngineOptions) -> Self {
        let clock = Arc::new(Clock::new());
        let signature = cpuid[0].get(1, 0).eax;
        let vps = cpuid.len() as u32;
        let config = PartitionConfig {
            vp_count: vps,
            memory: memory.clone(),
            clock: clock.clone(),
            cpuid,
            msr_exits: vec![0x4000_0000..=0x4000_1fff],
            hypercall_port: Some(PORT_HYPERCALL),
            options,
        };
        let partition = engine.create(config).unwrap();
        let board = Arc::new(Board::default());
        *board.partition.lock().unwrap() = Some(Arc::downgrade(&partition));
        let vps = (0..vps).map(|n| partition.take_vp(n).unwrap()).collect();
        let bench = Self { memory, clock, partition, board, vps, signature };
        bench.tables();
        bench
    }

    /// Identity page tables (the first 4 GiB in 2 MiB pages), a GDT, an empty IDT.
    fn tables(&self) {
        self.memory.write_plain(Gpa(PML4), &(PDPT | P | RW | US)).unwrap();
        for i in 0..4u64 {
            self.memory.write_plain(Gpa(PDPT + 8 * i), &((PD + i * 0x1000) | P | RW | US)).unwrap();
        }
        for i in 0..2048u64 {
            self.memory.write_plain(Gpa(PD + 8 * i), &(i << 21 | P | RW | US | PS)).unwrap();
        }
        // Null, kernel code and data, user data and code.
        let user = [0x00cf_f300_0000_ffff, 0x00af_fb00_0000_ffff];
        let descriptors = [0u64, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, user[0], user[1]];
        for (i, d) in descriptors.into_iter().enumerate() {
            self.memory.write_plain(Gpa(GDT + 8 * i as u64), &d).unwrap();
        }
    }

    /// Points an IDT entry at a handler.
    pub fn gate(&self, vector: u8, handler: u64) {
        let low = handler & 0xffff | 8 << 16 | 0x8e00 << 32 | (handler >> 16 & 0xffff) << 48;
        self.memory.write_plain(Gpa(IDT + 16 * u64::from(vector)), &low).unwrap();
        self.memory.write_plain(Gpa(IDT + 16 * u64::from(vector) + 8), &(handler >> 32)).unwrap();
    }

    /// Assembles at an address.
    pub fn code(&self, at: u64, f: impl FnOnce(&mut CodeAssembler)) {
        self.code_bits(64, at, f);
    }

    pub fn code_bits(&self, bits: u32, at: u64, f: impl FnOnce(&mut CodeAssembler)) {
        let mut a = CodeAssembler::new(bits).unwrap();
        f(&mut a);
        let bytes = a.assemble(at).unwrap();
        self.memory.write(Gpa(at), &bytes).unwrap();
    }

    /// Flat 64-bit mode at `rip`, interrupts off.
    pub fn long_state(&self, vp: VpIndex, rip: u64) -> VpState {
        let mut s = VpState::reset(vp, self.signature);
        let data =
            Segment { base: 0, limit: u32::MAX, attr: attr::P | attr::S | attr::DB | attr::G | 3, selector: 0x10 };
        let code = Segment { attr: attr::P | attr::S | attr::L | attr::G | 0xb, selector: 8, ..data };
        s.segments = [data; 6];
        s.segments[sreg::CS] = code;
        s.gdtr = TableRegister { base: GDT, limit: 39 };
        s.idtr = TableRegister { base: IDT, limit: 0xfff };
        s.cr0 = cr0::PE | cr0::PG | cr0::NE | cr0::ET | cr0::WP | cr0::MP;
        s.cr3 = PML4;
        s.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::PGE;
        s.efer = efer::LME | efer::LMA | efer::SCE | efer::NXE;
        s.rip = rip;
        s.rflags = rflags::FIXED;
        s.gprs = [0; 16];
        s.gprs[gpr::RSP] = STACKS + (u64::from(vp) + 1) * 0x1000;
        s.activity = Activity::Running;
        s
    }

    /// Puts VP 0 at `CODE`.
    pub fn start_at(&mut self, rip: u64) {
        let state = self.long_state(0, rip);
        self.vps[0].set_state(&state).unwrap();
    }

    /// Runs all VPs, each on its thread, until one writes PORT_DONE. Panics after `limit`.
    pub fn run(&mut self, limit: Duration) -> u32 {
        self.run_as(limit, false)
    }

    /// As [`Bench::run`], after [`Vp::prepare`] on each VP's thread.
    pub fn run_prepared(&mut self, limit: Duration) -> u32 {
        self.run_as(limit, true)
    }

    fn run_as(&mut self, limit: Duration, prepare: bool) -> u32 {
        self.clock.start();
        self.board.finished.store(false, Ordering::SeqCst);
        *self.board.done.lock().unwrap() = None;
        let board = self.board.clone();
        let partition = self.partition.clone();
        let mut failure = None;
        std::thread::scope(|scope| {
            let mut threads = Vec::new();
            for vp in &mut self.vps {
                let board = board.clone();
                threads.push(scope.spawn(move || -> Result<(), EngineError> {
                    if prepare {
                        vp.prepare();
                    }
                    while !board.finished.load(Ordering::SeqCst) {
                        if vp.run(&*board)? == RunExit::TripleFault {
                            let s = vp.state()?;
                            eprintln!("triple fault of VP {}: {s:x?}", vp.index());
                            board.finish(0xdead_0003);
                        }
                    }
                    Ok(())
                }));
            }
            let start = Instant::now();
            while !board.finished.load(Ordering::SeqCst) && start.elapsed() < limit {
                std::thread::sleep(Duration::from_micros(500));
            }
            if !board.finished.load(Ordering::SeqCst) {
                failure = Some(format!("the guest did not finish within {limit:?}"));
                board.finish(0xdead_0001);
            }
            for vp in 0..64 {
                partition.kick(vp);
            }
            for t in threads {
                if let Err(error) = t.join().unwrap() {
                    failure = Some(error.to_string());
                }
            }
        });
        self.clock.stop();
        if let Some(failure) = failure {
            for vp in &mut self.vps {
                let s = vp.state().unwrap();
                eprintln!(
                    "VP {} at {:#x} flags {:#x} {:?} gprs {:x?}",
                    vp.index(),
                    s.rip,
                    s.rflags,
                    s.activity,
                    s.gprs
                );
            }
            panic!("{failure}; log {:x?}", self.board.log.lock().unwrap());
        }
        self.board.done.lock().unwrap().unwrap()
    }

    pub fn read_u64(&self, gpa: u64) -> u64 {
        self.memory.read_plain(Gpa(gpa)).unwrap()
    }

    pub fn log(&self) -> Vec<u32> {
        self.board.log.lock().unwrap().iter().map(|(_, v)| *v).collect()
    }
}
