//! Tests of the whole interface against TLFS, with a fake engine.

mod hostile;

use crate::cpuid;
use crate::defs::*;
use crate::hv::*;
use crate::ports::*;
use partition::*;
use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use x86::regs::gpr;

#[derive(Default)]
struct Recorder {
    msis: Mutex<Vec<Msi>>,
    flushes: Mutex<Vec<(Option<VpIndex>, VpSet, String)>>,
    started: Mutex<Vec<(VpIndex, Box<VpState>)>>,
    apic: Mutex<HashMap<u32, u64>>,
    auto_eoi: Mutex<HashMap<VpIndex, [u64; 4]>>,
    armed: Mutex<HashMap<TimerId, Option<u64>>>,
    resets: Mutex<u32>,
    crashes: Mutex<Vec<CrashReport>>,
    messages: Mutex<Vec<(u32, Vec<u8>)>>,
    events: Mutex<Vec<u16>>,
    full: Mutex<bool>,
}

const ABILITIES: Abilities = Abilities { remote_tlb_flush: true, doorbells: false, auto_eoi: true, apic_access: true };

impl Partition for Recorder {
    fn abilities(&self) -> Abilities {
        ABILITIES
    }
    fn take_vp(&self, _: VpIndex) -> Result<Box<dyn Vp>, EngineError> {
        Err(EngineError::Config("no VPs here".into()))
    }
    fn kick(&self, _: VpIndex) {}
    fn signal_msi(&self, msi: Msi) {
        self.msis.lock().unwrap().push(msi);
    }
    fn set_extint(&self, _: bool) {}
    fn nmi(&self, _: VpIndex) {}
    fn init(&self, _: VpIndex) {}
    fn sipi(&self, _: VpIndex, _: u8) {}
    fn start_vp(&self, vp: VpIndex, state: Box<VpState>) -> Result<(), EngineError> {
        self.started.lock().unwrap().push((vp, state));
        Ok(())
    }
    fn set_ioapic_routes(&self, _: &[Option<Msi>]) {}
    fn flush_tlb(&self, from: Option<VpIndex>, targets: VpSet, what: TlbFlush<'_>) {
        self.flushes.lock().unwrap().push((from, targets, format!("{what:?}")));
    }
    fn set_auto_eoi(&self, vp: VpIndex, vectors: [u64; 4]) {
        self.auto_eoi.lock().unwrap().insert(vp, vectors);
    }
    fn apic_read(&self, _: VpIndex, register: u32) -> u64 {
        self.apic.lock().unwrap().get(&register).copied().unwrap_or(0)
    }
    fn apic_write(&self, _: VpIndex, register: u32, value: u64) {
        self.apic.lock().unwrap().insert(register, value);
    }
    fn register_doorbell(&self, _: Gpa, _: std::os::fd::BorrowedFd<'_>) -> Result<(), EngineError> {
        Err(EngineError::Config("none".into()))
    }
    fn track_dirty(&self, _: bool) -> Result<(), EngineError> {
        Ok(())
    }
    fn take_dirty(&self, _: Gpa, _: u64) -> Result<DirtyPages, EngineError> {
        Ok(DirtyPages::default())
    }
    fn vp_runtime(&self, vp: VpIndex) -> Ticks100ns {
        1000 + u64::from(vp)
    }
    fn stats(&self) -> EngineStats {
        EngineStats::default()
    }
}

/// One recorder plays every outside role.
struct Roles(Arc<Recorder>);
impl HvHost for Roles {
    fn reset(&self, _: VpIndex) {
        *self.0.resets.lock().unwrap() += 1;
    }
    fn crashed(&self, report: CrashReport) {
        self.0.crashes.lock().unwrap().push(report);
    }
}
impl TimerService for Roles {
    fn arm(&self, timer: TimerId, deadline: Option<u64>) {
        self.0.armed.lock().unwrap().insert(timer, deadline);
    }
}
impl MessagePort for Roles {
    fn post(&self, _: VpIndex, message_type: u32, payload: &[u8]) -> Result<(), PortFull> {
        if *self.0.full.lock().unwrap() {
            return Err(PortFull);
        }
        self.0.messages.lock().unwrap().push((message_type, payload.to_vec()));
        Ok(())
    }
}
impl EventPort for Roles {
    fn signal(&self, flag: u16) {
        self.0.events.lock().unwrap().push(flag);
    }
}

struct World {
    hv: Arc<HvPartition>,
    seen: Arc<Recorder>,
    memory: Arc<GuestMemory>,
    clock: Arc<Clock>,
}

const PORT: u8 = 0xe4;
const RAM: u64 = 1 << 20;

fn world() -> World {
    let memory = GuestMemory::with_ram(RAM, 0xc000_0000..1 << 32, false).unwrap();
    world_with(memory, Arc::new(Clock::new()))
}

fn world_with(memory: Arc<GuestMemory>, clock: Arc<Clock>) -> World {
    let seen = Arc::new(Recorder::default());
    let hv = HvPartition::new(HvConfig {
        vp_count: 4,
        memory: memory.clone(),
        clock: clock.clone(),
        abilities: ABILITIES,
        hypercall_port: PORT,
        apic_frequency_hz: 200_000_000,
        cpu_signature: 0x806e9,
        host: Arc::new(Roles(seen.clone())),
        timers: Arc::new(Roles(seen.clone())),
    });
    hv.attach(seen.clone());
    hv.set_message_port(1, Some(Arc::new(Roles(seen.clone()))));
    hv.set_event_port(0x2001, Some((Arc::new(Roles(seen.clone())), 4)));
    World { hv, seen, memory, clock }
}

impl World {
    fn read(&self, vp: VpIndex, number: u32) -> u64 {
        match self.hv.msr_read(vp, number) {
            MsrOutcome::Value(v) | MsrOutcome::ValueThenIdle(v) => v,
            MsrOutcome::Fault => panic!("MSR {number:#x} faults"),
        }
    }
    fn write(&self, vp: VpIndex, number: u32, value: u64) {
        assert_eq!(self.hv.msr_write(vp, number, value), MsrOutcome::Value(0), "MSR {number:#x} = {value:#x}");
    }
    fn refuses(&self, number: u32, value: u64) {
        assert_eq!(self.hv.msr_write(0, number, value), MsrOutcome::Fault, "MSR {number:#x} = {value:#x}");
    }
    fn enable_hypercalls(&self) {
        self.write(0, msr::GUEST_OS_ID, 0x8100_0006_0001_0000);
        self.write(0, msr::HYPERCALL, 0x5001);
    }
    /// SIMP at 0x8000, SIEFP at 0x9000, SINT 2 with vector 0xf3.
    fn enable_synic(&self) {
        self.write(0, msr::SIMP, 0x8001);
        self.write(0, msr::SIEFP, 0x9001);
        self.write(0, msr::SINT0 + 2, 0xf3);
        self.write(0, msr::SCONTROL, 1);
    }
    fn take_vectors(&self) -> Vec<u32> {
        self.seen.msis.lock().unwrap().drain(..).map(|m| m.data).collect()
    }
    fn set_time(&self, time: Ticks100ns) {
        self.clock.set(self.hv.time.tsc_at(time));
    }
    /// A memory hypercall: input at 0x6000, output at 0x7000.
    fn call(&self, value: u64, input: &[u8]) -> (u64, HypercallOutcome) {
        self.memory.write(Gpa(0x6000), input).unwrap();
        let mut c = Caller::new(value, 0x6000, 0x7000);
        let outcome = self.hv.hypercall(0, &mut c);
        (c.gprs[gpr::RAX], outcome)
    }
    fn status(&self, value: u64, input: &[u8]) -> u64 {
        self.call(value, input).0
    }
}

#[derive(Clone, Debug)]
struct Caller {
    gprs: [u64; 16],
    xmm: [u128; 16],
    long: bool,
    cpl: u8,
}
impl Caller {
    fn new(value: u64, input: u64, output: u64) -> Self {
        let mut gprs = [0; 16];
        (gprs[gpr::RCX], gprs[gpr::RDX], gprs[gpr::R8]) = (value, input, output);
        Self { gprs, xmm: [0; 16], long: true, cpl: 0 }
    }
}
impl HypercallContext for Caller {
    fn gpr(&self, number: usize) -> u64 {
        self.gprs[number]
    }
    fn set_gpr(&mut self, number: usize, value: u64) {
        self.gprs[number] = value;
    }
    fn xmm(&mut self, number: usize) -> u128 {
        self.xmm[number]
    }
    fn set_xmm(&mut self, number: usize, value: u128) {
        self.xmm[number] = value;
    }
    fn is_64bit(&self) -> bool {
        self.long
    }
    fn cpl(&self) -> u8 {
        self.cpl
    }
    fn is_protected(&self) -> bool {
        true
    }
}

const FAST: u64 = 1 << 16;
fn reps(count: u64, start: u64) -> u64 {
    count << 32 | start << 48
}
fn words(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}
const OK: u64 = HvStatus::Success as u64;
const BAD_CODE: u64 = HvStatus::InvalidHypercallCode as u64;
const BAD_INPUT: u64 = HvStatus::InvalidHypercallInput as u64;
const BAD_ALIGNMENT: u64 = HvStatus::InvalidAlignment as u64;
const BAD_PARAMETER: u64 = HvStatus::InvalidParameter as u64;

#[test]
fn hypercall_page_needs_an_identity() {
    let w = world();
    w.write(0, msr::HYPERCALL, 0x5001);
    assert_eq!(w.read(0, msr::HYPERCALL), 0x5000, "not enabled without guest OS id");
    let mut c = Caller::new(0, 0, 0);
    assert_eq!(w.hv.hypercall(0, &mut c), HypercallOutcome::InvalidOpcode);
    w.enable_hypercalls();
    let mut page = [0; 4];
    w.memory.read(Gpa(0x5000), &mut page).unwrap();
    assert_eq!(page, [0xe6, PORT, 0xc3, 0xcc]);
    assert_eq!(w.hv.hypercall(0, &mut c), HypercallOutcome::Complete);
    c.cpl = 3;
    assert_eq!(w.hv.hypercall(0, &mut c), HypercallOutcome::InvalidOpcode);
    w.refuses(msr::HYPERCALL, RAM | 1);
    w.write(0, msr::GUEST_OS_ID, 0);
    assert_eq!(w.read(0, msr::HYPERCALL) & 1, 0, "clearing the identity disables the page");
    w.enable_hypercalls();
    w.write(0, msr::HYPERCALL, 0x5003);
    w.write(0, msr::HYPERCALL, 0x4000);
    assert_eq!(w.read(0, msr::HYPERCALL), 0x5003, "locked");
}

#[test]
fn input_value_is_checked() {
    let w = world();
    w.enable_hypercalls();
    assert_eq!(w.status(0x7fff, &[]), BAD_CODE);
    assert_eq!(w.status(0x5d | 1 << 27, &[0; 8]), BAD_INPUT, "reserved bits");
    assert_eq!(w.status(0x5d | 1 << 60, &[0; 8]), BAD_INPUT);
    assert_eq!(w.status(0x5d | 1 << 31, &[0; 8]), BAD_INPUT, "nested");
    assert_eq!(w.status(0x5d | reps(1, 0), &[0; 8]), BAD_INPUT, "a count for a simple call");
    assert_eq!(w.status(0x03, &[0; 24]), BAD_INPUT, "a rep call without a count");
    assert_eq!(w.status(0x03 | reps(2, 2), &[0; 40]), BAD_INPUT, "start beyond count");
    assert_eq!(w.status(0x02 | 1 << 17, &[0; 32]), BAD_INPUT, "a variable header where there is none");
    assert_eq!(w.status(0x5c | FAST, &[]), BAD_INPUT, "too long for registers");
    let at = |gpa| {
        let mut c = Caller::new(0x02, gpa, 0);
        w.hv.hypercall(0, &mut c);
        c.gprs[gpr::RAX]
    };
    assert_eq!(at(0x6004), BAD_ALIGNMENT);
    assert_eq!(at(0x6ff0), BAD_ALIGNMENT, "crosses a page");
    assert_eq!(at(RAM), BAD_ALIGNMENT, "outside memory");
    assert_eq!(at(!7), BAD_ALIGNMENT);
    assert_eq!(at(0x6fe8), OK);
}

#[test]
fn flushes() {
    let w = world();
    w.enable_hypercalls();
    assert_eq!(w.status(0x02, &words(&[0x1000, 8, 1])), BAD_PARAMETER, "unknown flag");
    assert_eq!(w.status(0x02, &words(&[0x1000, 4, 0b1010])), OK);
    assert_eq!(w.status(0x02, &words(&[0x1000, 2 | 4, u64::MAX])), OK);
    assert_eq!(w.status(0x02, &words(&[0x1000, 1, 0])), OK);
    assert_eq!(w.status(0x13 | 1 << 17, &words(&[0x1000, 2, 0, 1, 0b100])), OK);
    assert_eq!(w.status(0x13, &words(&[0x1000, 2, 1, 0])), OK);
    assert_eq!(w.status(0x13, &words(&[0x1000, 2, 0, 1])), BAD_INPUT, "a bank is missing");
    assert_eq!(w.status(0x03 | reps(2, 0), &words(&[0x1000, 0, 1, 0x5002, 0x9000])), OK | 2 << 32);
    assert_eq!(w.status(0x03 | reps(2, 1), &words(&[0x1000, 0, 1, 0x5002, 0x9000])), OK | 2 << 32);
    assert_eq!(w.status(0x14 | 1 << 17 | reps(1, 0), &words(&[0, 2, 0, 1, 2, 0x7000])), OK | 1 << 32);
    let mut many = words(&[0, 2, 1]);
    many.extend(words(&[0x1fff, 0xffff_ffff_8000_0fff]));
    assert_eq!(w.status(0x03 | reps(2, 0), &many), OK | 2 << 32);
    let seen: Vec<_> = w.seen.flushes.lock().unwrap().iter().map(|(_, t, f)| (t.0, f.clone())).collect();
    let expected: Vec<(u64, String)> = [
        (0b1010, "AddressSpace(4096)"),
        (0b1111, "NonGlobal"),
        (0b1111, "All"),
        (0b100, "All"),
        (0b1111, "All"),
        (1, "Ranges([(20480, 3), (36864, 1)])"),
        (1, "Ranges([(36864, 1)])"),
        (2, "Ranges([(28672, 1)])"),
        (1, "All"),
    ]
    .map(|(t, f)| (t, f.to_string()))
    .into();
    assert_eq!(seen, expected);
}

#[test]
fn xmm_fast_input() {
    let w = world();
    w.enable_hypercalls();
    let mut c = Caller::new(0x02 | FAST, 0x3000, 4);
    c.xmm[0] = 0b110;
    w.hv.hypercall(1, &mut c);
    assert_eq!(c.gprs[gpr::RAX], OK);
    assert_eq!(*w.seen.flushes.lock().unwrap(), [(Some(1), VpSet(6), "AddressSpace(12288)".to_string())]);
}

#[test]
fn cluster_ipi() {
    let w = world();
    w.enable_hypercalls();
    let fast = |value, rdx, r8| {
        let mut c = Caller::new(value | FAST, rdx, r8);
        w.hv.hypercall(0, &mut c);
        c.gprs[gpr::RAX]
    };
    assert_eq!(fast(0x0b, 0x0f, 1), BAD_PARAMETER, "vector too low");
    assert_eq!(fast(0x0b, 0x100, 1), BAD_PARAMETER);
    assert_eq!(fast(0x0b, 0x1_0000_0030, 1), BAD_PARAMETER, "another VTL");
    assert_eq!(fast(0x0b, 0x30, 0b1001), OK);
    assert_eq!(*w.seen.msis.lock().unwrap(), [Msi::fixed(0, 0x30), Msi::fixed(3, 0x30)]);
    w.take_vectors();
    // Linux's way: banks as the variable header's count or as the rep count.
    assert_eq!(w.status(0x15 | 1 << 17 | reps(1, 0), &words(&[0x31, 0, 1, 0b10])), OK);
    assert_eq!(w.status(0x15, &words(&[0x31, 1, 0])), OK);
    assert_eq!(w.take_vectors().len(), 5);
}

#[test]
fn thirty_two_bit_callers() {
    let w = world();
    w.enable_hypercalls();
    let mut c = Caller::new(0, 0, 0);
    c.long = false;
    // EDX:EAX input value, EBX:ECX first, EDI:ESI second input; upper halves are ignored.
    c.gprs[gpr::RAX] = 0xdead_0000_0000_0000 | 0x0b | FAST;
    (c.gprs[gpr::RCX], c.gprs[gpr::RSI]) = (0x44, 0b10);
    assert_eq!(w.hv.hypercall(0, &mut c), HypercallOutcome::Complete);
    assert_eq!((c.gprs[gpr::RDX], c.gprs[gpr::RAX]), (0, OK));
    assert_eq!(*w.seen.msis.lock().unwrap(), [Msi::fixed(1, 0x44)]);
}

#[test]
fn messages_from_the_guest() {
    let w = world();
    w.enable_hypercalls();
    let message = |connection: u32, kind: u32, len: u32| {
        let mut m = vec![0x5a; 256];
        m[..16].copy_from_slice(&words(&[u64::from(connection), u64::from(kind) | u64::from(len) << 32]));
        m
    };
    assert_eq!(w.status(0x5c, &message(1, 1, 12)), OK);
    assert_eq!(*w.seen.messages.lock().unwrap(), [(1, vec![0x5a; 12])]);
    assert_eq!(w.status(0x5c, &message(1, 1, 241)), BAD_PARAMETER);
    assert_eq!(w.status(0x5c, &message(1, 0, 8)), BAD_PARAMETER);
    assert_eq!(w.status(0x5c, &message(1, 0x8000_0010, 8)), BAD_PARAMETER, "the hypervisor's own types");
    assert_eq!(w.status(0x5c, &message(7, 1, 8)), HvStatus::InvalidConnectionId as u64);
    assert_eq!(w.status(0x5c, &message(0x0100_0001, 1, 8)), HvStatus::InvalidConnectionId as u64);
    *w.seen.full.lock().unwrap() = true;
    assert_eq!(w.status(0x5c, &message(1, 1, 12)), HvStatus::InsufficientBuffers as u64);
}

#[test]
fn events_from_the_guest() {
    let w = world();
    w.enable_hypercalls();
    let signal = |value: u64| {
        let mut c = Caller::new(0x5d | FAST, value, 0);
        w.hv.hypercall(0, &mut c);
        c.gprs[gpr::RAX]
    };
    assert_eq!(signal(0x2001), OK);
    assert_eq!(signal(0x2001 | 3 << 32), OK);
    assert_eq!(signal(0x2001 | 4 << 32), BAD_PARAMETER);
    assert_eq!(signal(0x2002), HvStatus::InvalidConnectionId as u64);
    assert_eq!(*w.seen.events.lock().unwrap(), [0, 3]);
    w.hv.set_event_port(0x2001, None);
    assert_eq!(signal(0x2001), HvStatus::InvalidConnectionId as u64);
}

#[test]
fn start_vp() {
    let w = world();
    w.enable_hypercalls();
    let mut input = vec![0u8; 240];
    let mut put = |at: usize, v: u64| input[at..at + 8].copy_from_slice(&v.to_le_bytes());
    put(0, u64::MAX);
    put(8, 2);
    put(16, 0xffff_ffff_8100_0000);
    put(24, 0x8888);
    put(32, 2);
    // CS: limit, selector 0x10, 64-bit code.
    put(48, 0xffff_ffff | 0x10 << 32 | 0xa09b << 48);
    put(40 + 128, 0xfff << 48);
    put(40 + 136, 0xabcd_e000);
    put(200, 0xd01);
    put(208, 0x8005_0033);
    put(216, 0x1000);
    put(224, 0x20);
    put(232, 0x0007_0406_0007_0406);
    let status = |at: usize, byte: u8| {
        let mut changed = input.clone();
        changed[at] = byte;
        w.status(0x99, &changed)
    };
    assert_eq!(status(0, 1), HvStatus::InvalidPartitionId as u64);
    assert_eq!(status(8, 4), HvStatus::InvalidVpIndex as u64);
    assert_eq!(status(8, 0), HvStatus::InvalidVpState as u64, "the caller itself");
    assert_eq!(status(12, 1), BAD_PARAMETER, "another VTL");
    assert_eq!(status(232, 2), HvStatus::InvalidRegisterValue as u64, "memory type 2");
    assert!(w.seen.started.lock().unwrap().is_empty());
    assert_eq!(w.status(0x99, &input), OK);
    let started = w.seen.started.lock().unwrap();
    let (vp, state) = &started[0];
    assert_eq!((*vp, state.rip, state.gprs[gpr::RSP]), (2, 0xffff_ffff_8100_0000, 0x8888));
    let cs = state.segments[x86::segment::sreg::CS];
    assert_eq!((cs.selector, cs.attr, cs.limit), (0x10, 0xa09b, 0xffff_ffff));
    assert_eq!((state.idtr.limit, state.idtr.base), (0xfff, 0xabcd_e000));
    assert_eq!((state.efer, state.cr0, state.cr3, state.cr4), (0xd01, 0x8005_0033, 0x1000, 0x20));
    assert_eq!(state.activity, Activity::Running);
}

#[test]
fn vp_index_from_apic_id() {
    let w = world();
    w.enable_hypercalls();
    let mut input = words(&[u64::MAX, 0]);
    for id in [3u32, 0, 2] {
        input.extend(id.to_le_bytes());
    }
    assert_eq!(w.status(0x9a | reps(3, 0), &input), OK | 3 << 32);
    let mut out = [0; 12];
    w.memory.read(Gpa(0x7000), &mut out).unwrap();
    assert_eq!(out, [3, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0]);
    input[20] = 9;
    assert_eq!(w.status(0x9a | reps(3, 0), &input), BAD_PARAMETER | 1 << 32, "one element is complete");
    // XMM-fast, with output in the register after the input (16 + 4 bytes: XMM0; output in XMM1).
    let mut c = Caller::new(0x9a | FAST | reps(1, 0), u64::MAX, 0);
    (c.xmm[0], c.xmm[1]) = (1, u128::MAX);
    w.hv.hypercall(0, &mut c);
    assert_eq!((c.gprs[gpr::RAX], c.xmm[1]), (OK | 1 << 32, u128::MAX << 32 | 1));
}

#[test]
fn extended_capabilities() {
    let w = world();
    w.enable_hypercalls();
    w.memory.write(Gpa(0x7000), &[0xff; 8]).unwrap();
    assert_eq!(w.status(0x8001, &[]), OK);
    let mut out = [1; 8];
    w.memory.read(Gpa(0x7000), &mut out).unwrap();
    assert_eq!(out, [0; 8]);
    let mut c = Caller::new(0x8001 | FAST, 77, 78);
    w.hv.hypercall(0, &mut c);
    assert_eq!((c.gprs[gpr::RAX], c.gprs[gpr::RDX], c.gprs[gpr::R8]), (OK, 0, 78));
}

fn slot(w: &World, sint: u64) -> (u32, u8, u8, u64) {
    let mut header = [0; 24];
    w.memory.read(Gpa(0x8000 + sint * 256), &mut header).unwrap();
    let word = |at: usize| u64::from_le_bytes(header[at..at + 8].try_into().unwrap());
    (word(0) as u32, header[4], header[5], word(16))
}
fn message(n: u64) -> Message {
    Message { message_type: 1, sender: 4, payload: n.to_le_bytes().to_vec() }
}

#[test]
fn messages_wait_for_their_slot() {
    let w = world();
    w.hv.post_message(0, 2, message(1)).unwrap();
    assert!(w.take_vectors().is_empty());
    w.enable_synic();
    assert_eq!(slot(&w, 2), (1, 8, 0, 1), "delivered as soon as the guest is ready");
    assert_eq!(w.take_vectors(), [0xf3]);
    w.hv.post_message(0, 2, message(2)).unwrap();
    w.hv.post_message(0, 2, message(3)).unwrap();
    assert_eq!(slot(&w, 2), (1, 8, 1, 1), "the slot is full: flagged pending");
    assert!(w.take_vectors().is_empty());
    w.memory.store_u32(Gpa(0x8200), 0, std::sync::atomic::Ordering::SeqCst).unwrap();
    w.write(0, msr::EOM, 0);
    assert_eq!(slot(&w, 2), (1, 8, 1, 2), "the next, with more behind it");
    w.memory.store_u32(Gpa(0x8200), 0, std::sync::atomic::Ordering::SeqCst).unwrap();
    w.write(0, msr::EOM, 0);
    assert_eq!(slot(&w, 2), (1, 8, 0, 3));
    assert_eq!(w.take_vectors(), [0xf3, 0xf3]);
    assert!(w.hv.post_message(0, 16, message(1)).is_err());
    assert!(w.hv.post_message(9, 2, message(1)).is_err());
    let bound = (0..).take_while(|n| w.hv.post_message(0, 3, message(*n)).is_ok()).count();
    assert_eq!(bound, 4096, "a guest that takes nothing costs bounded memory");
}

#[test]
fn masked_and_polled_sints() {
    let w = world();
    w.enable_synic();
    w.write(0, msr::SINT0 + 2, 0xf3 | sint::MASKED);
    w.hv.post_message(0, 2, message(1)).unwrap();
    assert_eq!(slot(&w, 2).0, 0);
    w.write(0, msr::SINT0 + 2, 0xf3 | sint::POLLING);
    assert_eq!(slot(&w, 2).0, 1, "polling: delivered without an interrupt");
    assert!(w.take_vectors().is_empty());
    w.refuses(msr::SINT0, 15);
    w.write(0, msr::SINT0, 15 | sint::MASKED);
    w.write(0, msr::SINT0 + 5, 0x41 | sint::AUTO_EOI);
    assert_eq!(w.seen.auto_eoi.lock().unwrap()[&0], [0, 2, 0, 0]);
}

#[test]
fn event_flags() {
    let w = world();
    assert!(!w.hv.signal_event(0, 2, 77), "no page yet");
    w.enable_synic();
    assert!(w.hv.signal_event(0, 2, 77));
    assert!(w.hv.signal_event(0, 2, 77));
    assert_eq!(w.take_vectors(), [0xf3], "one interrupt for a flag that was set already");
    let mut flags = [0; 16];
    w.memory.read(Gpa(0x9200), &mut flags).unwrap();
    assert_eq!(flags[77 / 8], 1 << (77 % 8));
    assert!(!w.hv.signal_event(0, 2, 2048));
    assert!(!w.hv.signal_event(0, 16, 1));
}

#[test]
fn pages_read_as_zero_when_enabled() {
    let w = world();
    w.memory.fill(Gpa(0x8000), 0xee, 0x2000).unwrap();
    w.enable_synic();
    assert_eq!(slot(&w, 0), (0, 0, 0, 0));
    w.memory.write(Gpa(0x8300), &[1]).unwrap();
    w.write(0, msr::SIMP, 0x8001);
    assert_eq!(slot(&w, 3).0, 1, "writing the same value again clears nothing");
    w.refuses(msr::SIMP, RAM | 1);
    w.refuses(msr::VP_ASSIST_PAGE, RAM | 1);
}

const T0: TimerId = TimerId { vp: 0, timer: 0 };
const DIRECT: u64 = stimer::DIRECT | 0xed << stimer::VECTOR_SHIFT;

#[test]
fn one_shot_direct_timer() {
    let w = world();
    // As Linux does: configure with auto-enable, then write counts.
    w.write(0, msr::STIMER0_CONFIG, stimer::ENABLE | stimer::AUTO_ENABLE | DIRECT);
    w.write(0, msr::STIMER0_CONFIG + 1, 5000);
    assert_eq!(w.seen.armed.lock().unwrap()[&T0], Some(w.hv.time.tsc_at(5000)));
    w.set_time(4999);
    w.hv.timer_expired(T0);
    assert!(w.take_vectors().is_empty(), "too early is harmless");
    w.set_time(5000);
    w.hv.timer_expired(T0);
    assert_eq!(w.take_vectors(), [0xed]);
    assert_eq!(w.read(0, msr::STIMER0_CONFIG) & 1, 0, "a one-shot disables itself");
    w.hv.timer_expired(T0);
    assert!(w.take_vectors().is_empty());
    w.write(0, msr::STIMER0_CONFIG + 1, 3000);
    assert_eq!(w.take_vectors(), [0xed], "a time that has passed expires at once");
    w.write(0, msr::STIMER0_CONFIG + 1, 9000);
    w.write(0, msr::STIMER0_CONFIG + 1, 0);
    assert_eq!(w.seen.armed.lock().unwrap()[&T0], None, "a count of zero stops it");
    w.refuses(msr::STIMER0_CONFIG, 1 << 13);
}

#[test]
fn timers_that_cannot_deliver_stay_disabled() {
    let w = world();
    w.write(0, msr::STIMER0_CONFIG + 1, 1);
    w.write(0, msr::STIMER0_CONFIG, stimer::ENABLE);
    assert_eq!(w.read(0, msr::STIMER0_CONFIG) & 1, 0, "SINT 0");
    w.write(0, msr::STIMER0_CONFIG, stimer::ENABLE | stimer::DIRECT | 15 << 4);
    assert_eq!(w.read(0, msr::STIMER0_CONFIG) & 1, 0, "vector 15");
}

#[test]
fn message_timer_and_its_payload() {
    let w = world();
    w.enable_synic();
    w.write(0, msr::STIMER0_CONFIG + 3, 700);
    w.write(0, msr::STIMER0_CONFIG + 2, stimer::ENABLE | 2 << 16);
    w.set_time(800);
    w.hv.timer_expired(TimerId { vp: 0, timer: 1 });
    assert_eq!(slot(&w, 2), (MESSAGE_TIMER_EXPIRED, 24, 0, 1));
    let mut times = [0; 16];
    w.memory.read(Gpa(0x8200 + 24), &mut times).unwrap();
    assert_eq!(times[..], words(&[700, w.hv.reference_time()])[..]);
    assert_eq!(w.take_vectors(), [0xf3]);
}

#[test]
fn periodic_timers() {
    let w = world();
    w.write(0, msr::STIMER0_CONFIG + 1, 10_000);
    w.write(0, msr::STIMER0_CONFIG, stimer::ENABLE | stimer::PERIODIC | DIRECT);
    for n in 1..=5 {
        w.set_time(n * 10_000 + 5);
        w.hv.timer_expired(T0);
    }
    assert_eq!(w.take_vectors().len(), 5);
    // Three periods missed: the timer catches up at half its period.
    w.set_time(90_000);
    w.hv.timer_expired(T0);
    assert_eq!(w.seen.armed.lock().unwrap()[&T0], Some(w.hv.time.tsc_at(95_000)));
    w.write(0, msr::STIMER0_CONFIG, stimer::ENABLE | stimer::PERIODIC | stimer::LAZY | DIRECT);
    w.set_time(145_000);
    w.hv.timer_expired(T0);
    assert_eq!(w.seen.armed.lock().unwrap()[&T0], Some(w.hv.time.tsc_at(150_000)), "a lazy one skips");
    // A period of 100 ns must not keep the host busy.
    w.write(0, msr::STIMER0_CONFIG + 1, 1);
    assert_eq!(w.seen.armed.lock().unwrap()[&T0], Some(w.hv.time.tsc_at(145_500)));
}

#[test]
fn a_periodic_message_timer_waits_for_its_slot() {
    let w = world();
    w.enable_synic();
    w.write(0, msr::STIMER0_CONFIG + 1, 10_000);
    w.write(0, msr::STIMER0_CONFIG, stimer::ENABLE | stimer::PERIODIC | 2 << 16);
    w.set_time(10_000);
    w.hv.timer_expired(T0);
    w.set_time(20_000);
    w.hv.timer_expired(T0);
    assert_eq!(slot(&w, 2).2, 1, "pending");
    assert_eq!(w.seen.armed.lock().unwrap()[&T0], None, "nothing wakes the host until the guest takes the message");
    w.memory.store_u32(Gpa(0x8200), 0, std::sync::atomic::Ordering::SeqCst).unwrap();
    w.write(0, msr::EOM, 0);
    assert_eq!(slot(&w, 2).0, MESSAGE_TIMER_EXPIRED);
    assert!(w.seen.armed.lock().unwrap()[&T0].is_some());
}

#[test]
fn reference_time_msrs_and_page() {
    let w = world();
    w.write(0, msr::REFERENCE_TSC, 0xa001);
    let mut page = [0; 24];
    w.memory.read(Gpa(0xa000), &mut page).unwrap();
    let word = |at: usize| u64::from_le_bytes(page[at..at + 8].try_into().unwrap());
    assert_ne!(word(0) as u32, 0);
    for tsc in [0u64, 12345, 1 << 45] {
        w.clock.set(tsc);
        let by_page = ((u128::from(tsc) * u128::from(word(8))) >> 64) as u64 + word(16);
        assert_eq!(w.read(0, msr::TIME_REF_COUNT), by_page, "MSR and page agree to the tick");
    }
    assert_eq!(w.read(0, msr::TSC_FREQUENCY), w.clock.tsc_frequency_hz());
    assert_eq!(w.read(0, msr::APIC_FREQUENCY), 200_000_000);
    w.refuses(msr::TIME_REF_COUNT, 1);
    w.refuses(msr::REFERENCE_TSC, RAM | 1);
}

#[test]
fn small_registers() {
    let w = world();
    assert_eq!(w.read(3, msr::VP_INDEX), 3);
    w.refuses(msr::VP_INDEX, 0);
    assert_eq!(w.read(2, msr::VP_RUNTIME), 1002);
    assert_eq!(w.read(0, msr::SVERSION), 1);
    w.refuses(msr::SVERSION, 1);
    assert_eq!(w.hv.msr_read(0, msr::GUEST_IDLE), MsrOutcome::ValueThenIdle(0));
    w.refuses(msr::GUEST_IDLE, 0);
    w.write(0, msr::RESET, 0);
    assert_eq!(*w.seen.resets.lock().unwrap(), 0);
    w.write(0, msr::RESET, 1);
    assert_eq!(*w.seen.resets.lock().unwrap(), 1);
    assert_eq!(w.hv.msr_read(0, 0x4000_0118), MsrOutcome::Fault);
}

#[test]
fn apic_registers() {
    let w = world();
    w.write(0, msr::EOI, 0);
    w.write(0, msr::TPR, 0x40);
    w.write(0, msr::ICR, 3 << 56 | 0x30);
    let apic = w.seen.apic.lock().unwrap().clone();
    assert_eq!((apic[&0x0b], apic[&0x08], apic[&0x30]), (0, 0x40, 3 << 32 | 0x30));
    assert_eq!(w.read(0, msr::ICR), 3 << 56 | 0x30);
    w.refuses(msr::TPR, 0x100);
}

#[test]
fn crash_is_reported() {
    let w = world();
    for p in 0..5 {
        w.write(1, msr::CRASH_P0 + p, u64::from(p) + 10);
    }
    w.write(1, msr::CRASH_CTL, crash::NOTIFY);
    w.memory.write(Gpa(0xb000), b"Kernel panic\x1b[0m\n").unwrap();
    w.write(1, msr::CRASH_P0 + 3, 0xb000);
    w.write(1, msr::CRASH_P4, 17);
    w.write(1, msr::CRASH_CTL, crash::NOTIFY | crash::MESSAGE);
    let crashes = w.seen.crashes.lock().unwrap().clone();
    assert_eq!(crashes[0], CrashReport { vp: 1, parameters: [10, 11, 12, 13, 14], message: None });
    assert_eq!(crashes[1].message.as_deref(), Some("Kernel panic\u{fffd}[0m\n"));
    for _ in 0..100 {
        w.write(1, msr::CRASH_CTL, crash::NOTIFY);
    }
    assert_eq!(w.seen.crashes.lock().unwrap().len(), 16, "a guest cannot fill the log");
}

#[test]
fn save_and_restore() {
    let w = world();
    w.enable_hypercalls();
    w.enable_synic();
    w.write(0, msr::REFERENCE_TSC, 0xa001);
    w.write(0, msr::STIMER0_CONFIG, stimer::AUTO_ENABLE | DIRECT);
    w.write(0, msr::STIMER0_CONFIG + 1, 50_000);
    for n in 0..3 {
        w.hv.post_message(0, 2, message(n)).unwrap();
    }
    w.set_time(20_000);
    let state = w.hv.save();
    // A host that starts anew: its clock has another TSC value for the same reference time.
    let clock = Arc::new(Clock::new());
    clock.set(999);
    let n = world_with(w.memory.clone(), clock);
    n.hv.restore(&state).unwrap();
    assert_eq!(n.hv.reference_time(), w.hv.reference_time());
    assert_eq!(n.seen.armed.lock().unwrap()[&T0], Some(n.hv.time.tsc_at(50_000)));
    let mut page = [0; 24];
    n.memory.read(Gpa(0xa000), &mut page).unwrap();
    assert_eq!(page, n.hv.time.page());
    for expected in 1..3 {
        n.memory.store_u32(Gpa(0x8200), 0, std::sync::atomic::Ordering::SeqCst).unwrap();
        n.write(0, msr::EOM, 0);
        assert_eq!(slot(&n, 2).3, expected, "queued messages survive");
    }
    assert_eq!(n.hv.guest_os_id(), 0x8100_0006_0001_0000);
    n.hv.reset();
    assert_eq!((n.read(0, msr::SIMP), n.read(0, msr::SINT0)), (0, sint::RESET));
    assert_eq!(n.hv.guest_os_id(), 0);
}

#[test]
fn every_offered_privilege_has_its_register() {
    let w = world();
    let eax = cpuid::leaves(ABILITIES)[3].1.eax;
    let registers = [
        (cpuid::privilege::VP_RUNTIME, msr::VP_RUNTIME),
        (cpuid::privilege::REFERENCE_COUNTER, msr::TIME_REF_COUNT),
        (cpuid::privilege::SYNIC, msr::SCONTROL),
        (cpuid::privilege::SYNTHETIC_TIMERS, msr::STIMER0_CONFIG),
        (cpuid::privilege::APIC, msr::TPR),
        (cpuid::privilege::HYPERCALL, msr::HYPERCALL),
        (cpuid::privilege::VP_INDEX, msr::VP_INDEX),
        (cpuid::privilege::RESET, msr::RESET),
        (cpuid::privilege::REFERENCE_TSC, msr::REFERENCE_TSC),
        (cpuid::privilege::GUEST_IDLE, msr::GUEST_IDLE),
        (cpuid::privilege::FREQUENCY, msr::TSC_FREQUENCY),
    ];
    let mut known = 0;
    for (bit, register) in registers {
        assert_ne!(eax & bit, 0);
        assert_ne!(w.hv.msr_read(0, register), MsrOutcome::Fault, "{register:#x}");
        known |= bit;
    }
    assert_eq!(eax, known, "a privilege is offered that this test does not know");
}
