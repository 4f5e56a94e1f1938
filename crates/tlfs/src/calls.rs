//! What the hypercalls do. Inputs have been read and sized by `hypercall`.

use crate::defs::{HvStatus, MESSAGE_PAYLOAD, MESSAGE_TYPE_HYPERVISOR, PARTITION_ID_SELF, VP_INDEX_SELF, call};
use crate::hv::{Counters, HvPartition};
use crate::vpset;
use partition::engine::MAX_VPS;
use partition::{Activity, Msi, TlbFlush, VpIndex, VpSet, VpState};
use std::time::{Duration, Instant};
use x86::segment::{Segment, TableRegister, attr, sreg};

/// Input of a hypercall.
pub(crate) struct Input<'a> {
    pub(crate) vp: VpIndex,
    pub(crate) header: &'a [u8],
    pub(crate) variable: &'a [u8],
    pub(crate) elements: &'a [u8],
    /// First element to do, and their number.
    pub(crate) start: usize,
    pub(crate) count: usize,
}

/// Output of a hypercall.
pub(crate) struct Output<'a> {
    pub(crate) bytes: &'a mut [u8],
    /// Bytes before the output elements.
    pub(crate) fixed: usize,
}

impl Input<'_> {
    fn u64_at(&self, at: usize) -> u64 {
        read_u64(self.header, at)
    }
    fn u32_at(&self, at: usize) -> u32 {
        self.u64_at(at) as u32
    }
}

/// Eight bytes of a little-endian block; what lies behind its end reads as zero.
fn read_u64(bytes: &[u8], at: usize) -> u64 {
    let mut value = [0; 8];
    let len = bytes.len().saturating_sub(at).min(8);
    value[..len].copy_from_slice(&bytes[at.min(bytes.len())..][..len]);
    u64::from_le_bytes(value)
}

/// A hypercall gives the VP back after this time (TLFS section 3.4), between two elements.
const TIME_BOUND: Duration = Duration::from_micros(50);
/// Elements of a flush list that are handed to the engine at once.
const FLUSH_BATCH: usize = 64;
/// Beyond so many pages the whole TLB goes.
const FLUSH_PAGES: u64 = 4096;

/// Status, elements complete, restart wanted.
type Outcome = (HvStatus, usize, bool);

pub(crate) fn execute(hv: &HvPartition, code: u16, input: &Input<'_>, output: &mut Output<'_>) -> Outcome {
    let simple = |result: Result<(), HvStatus>| (result.err().unwrap_or(HvStatus::Success), 0, false);
    match code {
        call::FLUSH_VIRTUAL_ADDRESS_SPACE | call::FLUSH_VIRTUAL_ADDRESS_SPACE_EX => {
            simple(flush_targets(hv, code, input).map(|flush| flush_space(hv, input.vp, &flush)))
        }
        call::FLUSH_VIRTUAL_ADDRESS_LIST | call::FLUSH_VIRTUAL_ADDRESS_LIST_EX => {
            match flush_targets(hv, code, input) {
                Ok(flush) => flush_list(hv, input, &flush),
                Err(status) => (status, 0, false),
            }
        }
        call::NOTIFY_LONG_SPIN_WAIT => {
            std::thread::yield_now();
            simple(Ok(()))
        }
        call::SEND_SYNTHETIC_CLUSTER_IPI => {
            let targets = VpSet(input.u64_at(8) & hv.all_vps().0);
            simple(send_ipi(hv, input.u64_at(0), targets))
        }
        call::SEND_SYNTHETIC_CLUSTER_IPI_EX => {
            let targets = vpset::decode(input.u64_at(8), input.u64_at(16), input.variable, hv.all_vps());
            simple(targets.and_then(|targets| send_ipi(hv, input.u64_at(0), targets)))
        }
        call::POST_MESSAGE => simple(post_message(hv, input)),
        call::SIGNAL_EVENT => simple(signal_event(hv, input)),
        call::START_VIRTUAL_PROCESSOR => simple(start_vp(hv, input)),
        call::GET_VP_INDEX_FROM_APIC_ID => vp_index_from_apic_id(hv, input, output),
        call::QUERY_EXTENDED_CAPABILITIES => {
            // None of the extended hypercalls beyond this one.
            output.bytes.fill(0);
            simple(Ok(()))
        }
        _ => (HvStatus::InvalidHypercallCode, 0, false),
    }
}

/// Flags of the flush hypercalls (TLFS section 9.4.4).
const FLUSH_ALL_PROCESSORS: u64 = 1;
const FLUSH_ALL_SPACES: u64 = 2;
const FLUSH_NON_GLOBAL: u64 = 4;

struct Flush {
    targets: VpSet,
    space: u64,
    flags: u64,
}

fn flush_targets(hv: &HvPartition, code: u16, input: &Input<'_>) -> Result<Flush, HvStatus> {
    Counters::count(&hv.counters().flush_hypercalls);
    let (space, flags) = (input.u64_at(0), input.u64_at(8));
    if flags & !(FLUSH_ALL_PROCESSORS | FLUSH_ALL_SPACES | FLUSH_NON_GLOBAL) != 0 {
        return Err(HvStatus::InvalidParameter);
    }
    let existing = hv.all_vps();
    let targets = match code {
        call::FLUSH_VIRTUAL_ADDRESS_SPACE | call::FLUSH_VIRTUAL_ADDRESS_LIST => VpSet(input.u64_at(16) & existing.0),
        _ => vpset::decode(input.u64_at(16), input.u64_at(24), input.variable, existing)?,
    };
    let targets = if flags & FLUSH_ALL_PROCESSORS != 0 { existing } else { targets };
    Ok(Flush { targets, space, flags })
}

fn flush_space(hv: &HvPartition, vp: VpIndex, flush: &Flush) {
    let what = match (flush.flags & FLUSH_ALL_SPACES != 0, flush.flags & FLUSH_NON_GLOBAL != 0) {
        (true, true) => TlbFlush::NonGlobal,
        (false, true) => TlbFlush::AddressSpace(flush.space),
        // One address space with its global pages: those are in every space.
        (_, false) => TlbFlush::All,
    };
    if let Some(partition) = hv.partition()
        && flush.targets.0 != 0
    {
        partition.flush_tlb(Some(vp), flush.targets, what);
    }
}

fn flush_list(hv: &HvPartition, input: &Input<'_>, flush: &Flush) -> Outcome {
    let began = Instant::now();
    let Some(partition) = hv.partition() else { return (HvStatus::Success, input.count, false) };
    // Each element: page address, and in the low 12 bits the number of pages after the first.
    let range = |i: usize| {
        let value = read_u64(input.elements, i * 8);
        (value & !0xfff, (value & 0xfff) + 1)
    };
    let pages: u64 = (input.start..input.count).map(|i| range(i).1).sum();
    if flush.targets.0 == 0 {
        return (HvStatus::Success, input.count, false);
    }
    if pages > FLUSH_PAGES {
        partition.flush_tlb(Some(input.vp), flush.targets, TlbFlush::All);
        return (HvStatus::Success, input.count, false);
    }
    let mut at = input.start;
    while at < input.count {
        let end = (at + FLUSH_BATCH).min(input.count);
        let ranges: Vec<_> = (at..end).map(range).collect();
        partition.flush_tlb(Some(input.vp), flush.targets, TlbFlush::Ranges(&ranges));
        at = end;
        if at < input.count && began.elapsed() > TIME_BOUND {
            return (HvStatus::Success, at, true);
        }
    }
    (HvStatus::Success, input.count, false)
}

fn send_ipi(hv: &HvPartition, vector_word: u64, targets: VpSet) -> Result<(), HvStatus> {
    Counters::count(&hv.counters().ipi_hypercalls);
    let vector = match vector_word as u32 {
        v @ 0x10..=0xff => v as u8,
        _ => return Err(HvStatus::InvalidParameter),
    };
    // Behind the vector: target VTL (there is only our own) and padding.
    if vector_word >> 32 != 0 {
        return Err(HvStatus::InvalidParameter);
    }
    if let Some(partition) = hv.partition() {
        for vp in targets.iter() {
            partition.signal_msi(Msi::fixed(vp, vector));
        }
    }
    Ok(())
}

/// Connection ids have 24 bits.
fn connection_id(value: u32) -> Result<u32, HvStatus> {
    if value >> 24 == 0 { Ok(value) } else { Err(HvStatus::InvalidConnectionId) }
}

fn post_message(hv: &HvPartition, input: &Input<'_>) -> Result<(), HvStatus> {
    Counters::count(&hv.counters().messages_from_guest);
    let (message_type, len) = (input.u32_at(8), input.u32_at(12) as usize);
    if message_type == 0 || message_type & MESSAGE_TYPE_HYPERVISOR != 0 || len > MESSAGE_PAYLOAD {
        return Err(HvStatus::InvalidParameter);
    }
    let port = hv.ports.message(connection_id(input.u32_at(0))?).ok_or(HvStatus::InvalidConnectionId)?;
    let payload = &input.header[16..16 + len];
    port.post(input.vp, message_type, payload).map_err(|_| HvStatus::InsufficientBuffers)
}

fn signal_event(hv: &HvPartition, input: &Input<'_>) -> Result<(), HvStatus> {
    Counters::count(&hv.counters().events_from_guest);
    let (port, flags) = hv.ports.event(connection_id(input.u32_at(0))?).ok_or(HvStatus::InvalidConnectionId)?;
    let flag = input.u32_at(4) as u16;
    if flag >= flags || input.u32_at(4) >> 16 != 0 {
        return Err(HvStatus::InvalidParameter);
    }
    port.signal(flag);
    Ok(())
}

/// Offsets in `HV_INITIAL_VP_CONTEXT` (TLFS section 7.8.1): RIP, RSP, RFLAGS; CS, DS, ES, FS, GS, SS, TR, LDTR; IDTR,
/// GDTR; EFER, CR0, CR3, CR4, PAT.
mod context {
    pub(super) const START: usize = 16;
    pub(super) const SEGMENTS: usize = START + 24;
    pub(super) const TABLES: usize = SEGMENTS + 8 * 16;
    pub(super) const CONTROL: usize = TABLES + 2 * 16;
    const _: () = assert!(CONTROL + 5 * 8 == 240);
}

fn start_vp(hv: &HvPartition, input: &Input<'_>) -> Result<(), HvStatus> {
    Counters::count(&hv.counters().start_vp_hypercalls);
    if input.u64_at(0) != PARTITION_ID_SELF {
        return Err(HvStatus::InvalidPartitionId);
    }
    // The caller runs, so that "self" is not a VP that can be started.
    let vp = input.u32_at(8);
    if vp == VP_INDEX_SELF || vp == input.vp {
        return Err(HvStatus::InvalidVpState);
    }
    if vp >= hv.config.vp_count.min(MAX_VPS) {
        return Err(HvStatus::InvalidVpIndex);
    }
    // Target VTL and padding.
    if input.u32_at(12) != 0 {
        return Err(HvStatus::InvalidParameter);
    }
    let state = initial_state(hv, vp, input)?;
    let partition = hv.partition().ok_or(HvStatus::InvalidVpState)?;
    partition.start_vp(vp, Box::new(state)).map_err(|error| {
        tracing::debug!(%error, vp, "the engine refuses to start a VP");
        HvStatus::InvalidVpState
    })
}

fn initial_state(hv: &HvPartition, vp: VpIndex, input: &Input<'_>) -> Result<VpState, HvStatus> {
    let mut state = VpState::reset(vp, hv.config.cpu_signature);
    state.activity = Activity::Running;
    state.rip = input.u64_at(context::START);
    state.gprs[x86::regs::gpr::RSP] = input.u64_at(context::START + 8);
    // Bit 1 is always set, bits 3, 5, 15 and above 21 never.
    state.rflags = input.u64_at(context::START + 16) & 0x3f_7fd5 | 2;
    let segment = |index: usize| {
        let at = context::SEGMENTS + index * 16;
        let tail = input.u64_at(at + 8);
        let rights = (tail >> 48) as u32 & 0xf0ff;
        let unusable = if rights & attr::P == 0 { attr::UNUSABLE } else { 0 };
        Segment { base: input.u64_at(at), limit: tail as u32, selector: (tail >> 32) as u16, attr: rights | unusable }
    };
    for (index, register) in [sreg::CS, sreg::DS, sreg::ES, sreg::FS, sreg::GS, sreg::SS].into_iter().enumerate() {
        state.segments[register] = segment(index);
    }
    state.tr = segment(6);
    state.ldtr = segment(7);
    // Each: six bytes of padding, limit, base.
    let table = |index: usize| {
        let at = context::TABLES + index * 16;
        TableRegister { base: input.u64_at(at + 8), limit: (input.u64_at(at) >> 48) as u16 }
    };
    state.idtr = table(0);
    state.gdtr = table(1);
    let control = |index: usize| input.u64_at(context::CONTROL + index * 8);
    state.efer = control(0);
    state.cr0 = control(1);
    state.cr3 = control(2);
    state.cr4 = control(3);
    let pat = control(4);
    // Memory types 0, 1, 4, 5, 6 and 7 exist (SDM volume 3, section 11.12.2).
    if pat.to_le_bytes().iter().any(|t| !matches!(t, 0 | 1 | 4..=7)) {
        return Err(HvStatus::InvalidRegisterValue);
    }
    state.set_msr(x86::msr::PAT, pat);
    Ok(state)
}

fn vp_index_from_apic_id(hv: &HvPartition, input: &Input<'_>, output: &mut Output<'_>) -> Outcome {
    if input.u64_at(0) != PARTITION_ID_SELF {
        return (HvStatus::InvalidPartitionId, 0, false);
    }
    // Target VTL and padding.
    if input.u64_at(8) != 0 {
        return (HvStatus::InvalidParameter, 0, false);
    }
    for i in input.start..input.count {
        let apic_id = read_u64(input.elements, i * 4) as u32;
        // A VP's index is its APIC id.
        if apic_id >= hv.config.vp_count {
            return (HvStatus::InvalidParameter, i, false);
        }
        let at = output.fixed + i * 4;
        output.bytes[at..at + 4].copy_from_slice(&apic_id.to_le_bytes());
    }
    (HvStatus::Success, input.count, false)
}
