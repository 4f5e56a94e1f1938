//! The hypercall interface: registers in, checks, registers out (TLFS chapter 3). What the calls do is in `calls`.

use crate::calls::{self, Input, Output};
use crate::defs::{HvStatus, PAGE_ENABLE, call};
use crate::hv::{Counters, HvPartition};
use partition::{Access, Gpa, HypercallContext, HypercallOutcome, VpIndex};
use x86::regs::gpr;

/// Bytes of registers that a fast hypercall has: RDX, R8, XMM0 to XMM5.
const FAST_BYTES: usize = 16 + 6 * 16;
const PAGE: usize = 0x1000;

/// Shape of a hypercall.
pub(crate) struct CallInfo {
    pub(crate) code: u16,
    /// Fixed input bytes.
    header: usize,
    /// It may have a variable header.
    variable: bool,
    /// Bytes of an input and of an output element; a rep hypercall if one of them is not zero.
    rep_in: usize,
    rep_out: usize,
    /// Fixed output bytes.
    out: usize,
    /// Memory only.
    no_fast: bool,
}

const CALLS: &[CallInfo] = &[
    info(call::FLUSH_VIRTUAL_ADDRESS_SPACE, 24, false, 0),
    info(call::FLUSH_VIRTUAL_ADDRESS_LIST, 24, false, 8),
    info(call::NOTIFY_LONG_SPIN_WAIT, 8, false, 0),
    info(call::SEND_SYNTHETIC_CLUSTER_IPI, 16, false, 0),
    info(call::FLUSH_VIRTUAL_ADDRESS_SPACE_EX, 32, true, 0),
    info(call::FLUSH_VIRTUAL_ADDRESS_LIST_EX, 32, true, 8),
    info(call::SEND_SYNTHETIC_CLUSTER_IPI_EX, 24, true, 0),
    CallInfo { no_fast: true, ..info(call::POST_MESSAGE, 256, false, 0) },
    info(call::SIGNAL_EVENT, 8, false, 0),
    CallInfo { no_fast: true, ..info(call::START_VIRTUAL_PROCESSOR, 240, false, 0) },
    CallInfo { rep_out: 4, ..info(call::GET_VP_INDEX_FROM_APIC_ID, 16, false, 4) },
    CallInfo { out: 8, ..info(call::QUERY_EXTENDED_CAPABILITIES, 0, false, 0) },
];

const fn info(code: u16, header: usize, variable: bool, rep_in: usize) -> CallInfo {
    CallInfo { code, header, variable, rep_in, rep_out: 0, out: 0, no_fast: false }
}

impl CallInfo {
    fn is_rep(&self) -> bool {
        self.rep_in != 0 || self.rep_out != 0
    }
}

/// The hypercall input value (TLFS section 3.7).
#[derive(Clone, Copy)]
struct InputValue(u64);

impl InputValue {
    /// Bits 27 to 30, 44 to 47 and 60 to 63; bit 31 (nested) is not offered and so reserved too.
    const RESERVED: u64 = 0xf8 << 24 | 0xf << 44 | 0xf << 60;

    fn code(self) -> u16 {
        self.0 as u16
    }
    fn fast(self) -> bool {
        self.0 & 1 << 16 != 0
    }
    /// Bytes of the variable header.
    fn variable(self) -> usize {
        (self.0 >> 17 & 0x3ff) as usize * 8
    }
    fn rep_count(self) -> usize {
        (self.0 >> 32 & 0xfff) as usize
    }
    fn rep_start(self) -> usize {
        (self.0 >> 48 & 0xfff) as usize
    }
    fn with_rep_start(self, start: usize) -> u64 {
        self.0 & !(0xfff << 48) | (start as u64 & 0xfff) << 48
    }
}

/// The three 64-bit values that a caller passes (TLFS section 3.8: pairs of registers outside 64-bit mode).
struct Registers {
    value: InputValue,
    input: u64,
    output: u64,
}

fn registers(context: &dyn HypercallContext) -> Registers {
    if context.is_64bit() {
        let value = InputValue(context.gpr(gpr::RCX));
        return Registers { value, input: context.gpr(gpr::RDX), output: context.gpr(gpr::R8) };
    }
    let pair = |high, low| (context.gpr(high) & 0xffff_ffff) << 32 | context.gpr(low) & 0xffff_ffff;
    Registers {
        value: InputValue(pair(gpr::RDX, gpr::RAX)),
        input: pair(gpr::RBX, gpr::RCX),
        output: pair(gpr::RDI, gpr::RSI),
    }
}

fn set_pair(context: &mut dyn HypercallContext, high: usize, low: usize, value: u64) {
    context.set_gpr(high, value >> 32);
    context.set_gpr(low, value & 0xffff_ffff);
}

/// What a call leaves behind.
enum Done {
    /// Status and the number of elements that are complete (from the first, not from the start index).
    Result(HvStatus, usize),
    /// Time is up: go on at this element after interrupts were taken.
    Restart(usize),
}

impl HvPartition {
    /// The instruction of the hypercall page was executed by this VP.
    pub fn hypercall(&self, vp: VpIndex, context: &mut dyn HypercallContext) -> HypercallOutcome {
        if !context.is_protected() || context.cpl() != 0 || self.global().hypercall & PAGE_ENABLE == 0 {
            return HypercallOutcome::InvalidOpcode;
        }
        Counters::count(&self.counters().hypercalls);
        let regs = registers(context);
        match self.dispatch(vp, &regs, context) {
            Done::Result(status, reps) => {
                let result = status as u64 | (reps as u64) << 32;
                if context.is_64bit() {
                    context.set_gpr(gpr::RAX, result);
                } else {
                    set_pair(context, gpr::RDX, gpr::RAX, result);
                }
                HypercallOutcome::Complete
            }
            Done::Restart(at) => {
                let value = regs.value.with_rep_start(at);
                if context.is_64bit() {
                    context.set_gpr(gpr::RCX, value);
                } else {
                    set_pair(context, gpr::RDX, gpr::RAX, value);
                }
                HypercallOutcome::Restart
            }
        }
    }

    fn dispatch(&self, vp: VpIndex, regs: &Registers, context: &mut dyn HypercallContext) -> Done {
        let value = regs.value;
        let fail = |status| Done::Result(status, 0);
        let Some(info) = CALLS.iter().find(|i| i.code == value.code()).filter(|i| self.offers(i.code)) else {
            return fail(HvStatus::InvalidHypercallCode);
        };
        if value.0 & InputValue::RESERVED != 0 || (!info.variable && value.variable() != 0) {
            return fail(HvStatus::InvalidHypercallInput);
        }
        // A rep hypercall has a count and a start below it; another has neither.
        let (count, start) = (value.rep_count(), value.rep_start());
        if if info.is_rep() { start >= count } else { count != 0 || start != 0 } {
            // Linux passes the number of banks as the rep count of the simple call HvCallSendSyntheticClusterIpiEx;
            // Hyper-V takes it.
            if !(info.code == call::SEND_SYNTHETIC_CLUSTER_IPI_EX && start == 0) {
                return fail(HvStatus::InvalidHypercallInput);
            }
        }
        let reps = if info.is_rep() { count } else { 0 };
        let in_len = info.header + value.variable() + reps * info.rep_in;
        let out_len = info.out + reps * info.rep_out;

        let mut input = [0u8; PAGE];
        let mut output = [0u8; PAGE];
        if value.fast() {
            // Output follows the input, from the next register pair or XMM register on.
            let out_at = in_len.next_multiple_of(16);
            if info.no_fast || in_len > FAST_BYTES || (out_len != 0 && out_at + out_len > FAST_BYTES) {
                return fail(HvStatus::InvalidHypercallInput);
            }
            read_fast(regs, context, &mut input[..in_len]);
        } else {
            if let Err(status) = self.check_memory(regs.input, in_len, Access::Rom) {
                return fail(status);
            }
            if let Err(status) = self.check_memory(regs.output, out_len, Access::Ram) {
                return fail(status);
            }
            if self.config.memory.read(Gpa(regs.input), &mut input[..in_len]).is_err() {
                return fail(HvStatus::InvalidAlignment);
            }
        }
        let (head, elements) = input[..in_len].split_at(info.header + value.variable());
        let (header, variable) = head.split_at(info.header);
        let call_input = Input { vp, header, variable, elements, start, count: reps };
        let mut out = Output { bytes: &mut output[..out_len], fixed: info.out };
        let (status, done, restart) = calls::execute(self, info.code, &call_input, &mut out);
        let first = if start == 0 { 0 } else { info.out + start * info.rep_out };
        let last = info.out + done * info.rep_out;
        if first < last && (status == HvStatus::Success || info.is_rep()) {
            let bytes = &output[first..last];
            if value.fast() {
                write_fast(context, in_len.next_multiple_of(16) + first, bytes);
            } else if self.config.memory.write(Gpa(regs.output + first as u64), bytes).is_err() {
                return fail(HvStatus::InvalidAlignment);
            }
        }
        if restart { Done::Restart(done) } else { Done::Result(status, done) }
    }

    fn offers(&self, code: u16) -> bool {
        use call::*;
        match code {
            FLUSH_VIRTUAL_ADDRESS_SPACE
            | FLUSH_VIRTUAL_ADDRESS_LIST
            | FLUSH_VIRTUAL_ADDRESS_SPACE_EX
            | FLUSH_VIRTUAL_ADDRESS_LIST_EX => self.config.abilities.remote_tlb_flush,
            _ => true,
        }
    }

    /// A parameter list is 8-byte aligned, inside one page, and inside guest memory (TLFS section 3.8).
    fn check_memory(&self, gpa: u64, len: usize, access: Access) -> Result<(), HvStatus> {
        if len == 0 {
            return Ok(());
        }
        let inside = (gpa % PAGE as u64) as usize;
        if gpa % 8 != 0 || inside + len > PAGE || !self.config.memory.is_mapped(Gpa(gpa), len as u64, access) {
            return Err(HvStatus::InvalidAlignment);
        }
        Ok(())
    }
}

fn read_fast(regs: &Registers, context: &mut dyn HypercallContext, input: &mut [u8]) {
    let mut bytes = [0u8; FAST_BYTES];
    bytes[..8].copy_from_slice(&regs.input.to_le_bytes());
    bytes[8..16].copy_from_slice(&regs.output.to_le_bytes());
    let used = input.len().saturating_sub(16).div_ceil(16);
    for register in 0..used {
        let at = 16 + register * 16;
        bytes[at..at + 16].copy_from_slice(&context.xmm(register).to_le_bytes());
    }
    input.copy_from_slice(&bytes[..input.len()]);
}

/// Writes output bytes into the registers at this offset of the register area (16-byte units that are only partly
/// covered keep the rest).
fn write_fast(context: &mut dyn HypercallContext, at: usize, bytes: &[u8]) {
    let mut done = 0;
    while done < bytes.len() {
        let (unit, inside) = ((at + done) / 16, (at + done) % 16);
        let len = (16 - inside).min(bytes.len() - done);
        let old = match unit {
            0 => {
                let regs = registers(context);
                u128::from(regs.output) << 64 | u128::from(regs.input)
            }
            n => context.xmm(n - 1),
        };
        let mut value = old.to_le_bytes();
        value[inside..inside + len].copy_from_slice(&bytes[done..done + len]);
        let value = u128::from_le_bytes(value);
        match unit {
            0 if context.is_64bit() => {
                context.set_gpr(gpr::RDX, value as u64);
                context.set_gpr(gpr::R8, (value >> 64) as u64);
            }
            0 => {
                set_pair(context, gpr::RBX, gpr::RCX, value as u64);
                set_pair(context, gpr::RDI, gpr::RSI, (value >> 64) as u64);
            }
            n => context.set_xmm(n - 1, value),
        }
        done += len;
    }
}
