//! Executes the same instructions on the software processor.

use crate::native::{BASE16, CODE, CODE16, DATA, DATA_LEN, DATA16, End, Mode, Outcome, READ_ONLY, START, State, XSAVE};
use partition::{Clock, EngineOptions, Gpa, GuestMemory, PartitionConfig};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use viridian_engine_soft::interp;
use viridian_engine_soft::partition_impl::SoftPartition;
use viridian_engine_soft::vp::{Fault, SoftVp, attention};
use x86::cpuid::CpuModel;
use x86::paging::{A, D, NX, P, RW, US};
use x86::regs::{cr0, cr4, efer};
use x86::segment::{Segment, attr, sreg};

const DATA_GPA: u64 = 0x10_0000;
const CODE_GPA: u64 = 0x20_0000;

/// A VP in user mode whose linear addresses are those of the tester.
pub struct Guest {
    pub vp: Box<SoftVp>,
    memory: Arc<GuestMemory>,
}

fn flat(selector: u16, code: bool, long: bool) -> Segment {
    let kind = if code { attr::TYPE_CODE } else { 0 } | attr::TYPE_WRITABLE | attr::TYPE_ACCESSED;
    let size = if long { attr::L } else { attr::DB };
    Segment {
        base: 0,
        limit: 0xffff_ffff,
        attr: attr::P | attr::S | attr::G | 3 << attr::DPL_SHIFT | kind | size,
        selector,
    }
}

impl Guest {
    pub fn new(model: &str) -> Self {
        let memory = GuestMemory::with_ram(4 << 20, 0xc000_0000..1 << 32, false).expect("memory");
        let model = CpuModel::by_name(model).expect("the host can offer the model");
        let config = PartitionConfig {
            vp_count: 1,
            memory: memory.clone(),
            clock: Arc::new(Clock::new()),
            cpuid: vec![model.table(0, 1, 1_000_000_000)],
            msr_exits: Vec::new(),
            hypercall_port: None,
            options: EngineOptions::default(),
        };
        let partition = SoftPartition::new(config).expect("a partition");
        let mut vp = Box::new(SoftVp::new(partition, 0));
        let table = |at: u64, entry: u64, value: u64| {
            memory.write(Gpa(at + entry * 8), &value.to_le_bytes()).expect("RAM");
        };
        let link = P | RW | US | A;
        table(0x1000, 0, 0x2000 | link);
        table(0x2000, DATA >> 30, 0x3000 | link);
        table(0x2000, (DATA - 1) >> 30, 0x6000 | link);
        table(0x3000, DATA >> 21 & 511, 0x4000 | link);
        table(0x3000, CODE >> 21 & 511, 0x5000 | link);
        for page in 0..DATA_LEN as u64 / 0x1000 {
            table(0x4000, page, (DATA_GPA + page * 0x1000) | link | D | NX);
        }
        table(0x4000, (READ_ONLY - DATA) >> 12, (DATA_GPA + READ_ONLY - DATA) | P | US | A | NX);
        table(0x5000, CODE >> 12 & 511, CODE_GPA | link | D);
        memory.write(Gpa(CODE_GPA), &[0xcc; 0x1000]).expect("RAM");
        let s = &mut *vp.s;
        s.cr0 = cr0::PE | cr0::MP | cr0::ET | cr0::NE | cr0::WP | cr0::AM | cr0::PG;
        s.cr3 = 0x1000;
        s.cr4 = (cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE | cr4::FSGSBASE) & vp.features.cr4_mask();
        s.efer = efer::SCE | efer::LME | efer::LMA | efer::NXE;
        s.xcr0 = 7;
        s.segments = [flat(0x2b, false, false); 6];
        for seg in [sreg::FS, sreg::GS] {
            s.segments[seg] = Segment { attr: attr::UNUSABLE, ..Segment::default() };
        }
        // No task: every port is refused.
        s.tr = Segment { limit: 0, attr: attr::P | 0xb, ..Segment::default() };
        Self { vp, memory }
    }

    /// Puts an instruction into the page of code and chooses the mode.
    pub fn prepare(&mut self, code: &[u8], mode: Mode) {
        let mut bytes = [0xcc; 0x1000];
        let start = (START - CODE) as usize;
        bytes[start..start + code.len()].copy_from_slice(code);
        self.memory.write(Gpa(CODE_GPA), &bytes).expect("RAM");
        let s = &mut *self.vp.s;
        let small = |selector, base, code| Segment {
            base,
            limit: 0xffff,
            attr: flat(0, code, false).attr & !(attr::DB | attr::G),
            selector,
        };
        s.segments[sreg::CS] = match mode {
            Mode::Long => flat(0x33, true, true),
            Mode::Compat32 => flat(0x23, true, false),
            Mode::Compat16 => small(CODE16, CODE, true),
        };
        for seg in [sreg::DS, sreg::ES] {
            s.segments[seg] =
                if mode == Mode::Compat16 { small(DATA16, BASE16, false) } else { flat(0x2b, false, false) };
        }
        self.vp.activity = partition::Activity::Running;
        self.vp.state_loaded();
    }

    /// Executes the instruction from a state.
    pub fn run(&mut self, case: &State, memory: &[u8]) -> Outcome {
        self.memory.write(Gpa(DATA_GPA), memory).expect("RAM");
        let s = &mut *self.vp.s;
        s.gprs = case.gprs;
        s.rip = case.rip;
        s.rflags = case.rflags | 0x202;
        s.xsave.0[..XSAVE].copy_from_slice(&case.xsave);
        s.xsave.0[512..576].fill(0);
        s.xsave.0[512] = 7;
        let repeats = |vp: &SoftVp| vp.s.rip == case.rip;
        let mut result = interp::try_step(&mut self.vp);
        // A repetition may be interrupted between elements; no branch of the tester goes to itself.
        while result.is_ok() && repeats(&self.vp) {
            if self.vp.s.attention.load(Ordering::Relaxed) & attention::REQUEST != 0 {
                SoftPartition::process_requests(&mut self.vp);
                self.vp.s.attention.fetch_and(!attention::REQUEST, Ordering::Relaxed);
            }
            result = interp::try_step(&mut self.vp);
        }
        let end = match result {
            Ok(()) => End::Done,
            Err(Fault::Exception { vector, error }) => End::Fault(vector, error, 0),
            Err(Fault::Page { address, error }) => End::Fault(14, error, address),
            Err(Fault::Restart) => End::Fault(255, 0, 0),
        };
        let s = &self.vp.s;
        let mut state = State { gprs: s.gprs, rip: s.rip, rflags: s.rflags & 0xcd5, xsave: [0; XSAVE] };
        state.xsave.copy_from_slice(&s.xsave.0[..XSAVE]);
        let mut memory = vec![0; DATA_LEN];
        self.memory.read(Gpa(DATA_GPA), &mut memory).expect("RAM");
        Outcome { end, state, memory }
    }
}
