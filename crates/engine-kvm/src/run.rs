//! The loop around `KVM_RUN`.

use crate::partition::{KvmPartition, Running, Shared, cpu_time};
use crate::sys::{self, host};
use kvm_bindings::{KVM_MP_STATE_HALTED, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, kvm_mp_state, kvm_run};
use kvm_ioctls::{SyncReg, VcpuExit, VcpuFd};
use partition::{
    EngineError, Gpa, HypercallContext, HypercallOutcome, MsrOutcome, RunExit, Vp, VpExits, VpIndex, VpState,
};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use x86::regs::{cr0, efer, gpr, rflags};

/// A VP on KVM.
pub struct KvmVp {
    pub(crate) partition: Arc<KvmPartition>,
    pub(crate) index: VpIndex,
    pub(crate) fd: VcpuFd,
    run: NonNull<kvm_run>,
    /// Guest TSC minus the partition's clock.
    pub(crate) tsc_delta: u64,
    /// What was last given to KVM as the clock's part of the TSC offset.
    clock_offset: Option<u64>,
}

// SAFETY: `run` points into the mapping that `fd` owns; whoever has the VP has both.
unsafe impl Send for KvmVp {}

/// What an exit leaves to do when its borrow of the vCPU is over.
enum Then {
    Continue,
    Hypercall,
    Idle,
    Return(RunExit),
}

/// Length of `OUT imm8, AL`.
const OUT_LENGTH: u64 = 2;
/// Completing an instruction makes at most this many further exits (a string instruction that touches devices).
const MAX_COMPLETIONS: u32 = 10_000;

impl KvmVp {
    pub(crate) fn new(partition: Arc<KvmPartition>, index: VpIndex, mut fd: VcpuFd) -> Result<Self, EngineError> {
        for register in [SyncReg::Register, SyncReg::SystemRegister] {
            fd.set_sync_valid_reg(register);
        }
        let run = NonNull::from(fd.get_kvm_run());
        let signature = partition.signatures[index as usize];
        let mut vp = Self { partition, index, fd, run, tsc_delta: 0, clock_offset: None };
        let mut reset = VpState::reset(index, signature);
        reset.set_msr(x86::msr::TSC, vp.partition.clock.tsc());
        vp.load(&reset)?;
        Ok(vp)
    }

    fn field<T: Copy>(&self, pick: impl Fn(*mut kvm_run) -> *mut T) -> T {
        // SAFETY: the mapping is alive as long as `fd`; KVM writes to it only inside KVM_RUN, on this thread.
        unsafe { pick(self.run.as_ptr()).read_volatile() }
    }

    fn immediate_exit(&self) -> NonNull<AtomicU8> {
        // SAFETY: a field of the live mapping; it is a byte that any thread may store to.
        unsafe { NonNull::new_unchecked((&raw mut (*self.run.as_ptr()).immediate_exit).cast()) }
    }

    fn set_immediate_exit(&self, on: bool) {
        // SAFETY: as in `immediate_exit`.
        unsafe { self.immediate_exit().as_ref() }.store(on.into(), Ordering::SeqCst);
    }

    /// Guest TSC follows the partition's clock.
    fn sync_tsc(&mut self) -> Result<(), EngineError> {
        if !self.partition.clock.is_running() {
            return Ok(());
        }
        let offset = self.partition.clock.tsc_offset();
        if self.clock_offset == Some(offset) {
            return Ok(());
        }
        // A deadline timer is set in terms of the offset, so it is set again.
        let deadline = self.get_msr(x86::msr::TSC_DEADLINE).unwrap_or(0);
        if !self.set_tsc_offset(offset.wrapping_add(self.tsc_delta)) {
            let tsc = self.partition.clock.tsc().wrapping_add(self.tsc_delta);
            self.set_msr(x86::msr::TSC, tsc);
        }
        self.clock_offset = Some(offset);
        if deadline != 0 {
            self.set_msr(x86::msr::TSC_DEADLINE, deadline);
        }
        Ok(())
    }

    fn set_tsc_offset(&self, offset: u64) -> bool {
        sys::set_vcpu_attribute(&self.fd, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET.into(), offset).is_ok()
    }

    /// After the clock stopped: what the guest itself has added to its TSC.
    pub(crate) fn note_tsc(&mut self) {
        if let (Some(clock), Ok(offset)) =
            (self.clock_offset, sys::get_vcpu_attribute(&self.fd, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET.into()))
        {
            self.tsc_delta = offset.wrapping_sub(clock);
        }
    }

    /// A loaded state has another TSC: KVM is told at the next `run`.
    pub(crate) fn replace_tsc(&mut self, tsc: u64) {
        self.tsc_delta = tsc.wrapping_sub(self.partition.clock.tsc());
        self.clock_offset = None;
    }

    fn run_loop(&mut self, exits: &dyn VpExits) -> Result<RunExit, EngineError> {
        let partition = self.partition.clone();
        let shared = partition.shared(self.index);
        loop {
            // Cleared before the flags are read: who sets a flag now sets this again, and KVM_RUN ends at once.
            self.set_immediate_exit(false);
            if shared.kicked.swap(false, Ordering::SeqCst) {
                return self.settle(exits).map(|down| if down { RunExit::TripleFault } else { RunExit::Kicked });
            }
            self.start_if_asked(shared)?;
            if self.index == 0 {
                self.external_interrupt(exits)?;
            }
            match self.enter(exits)? {
                Then::Continue => {}
                Then::Hypercall => self.hypercall(exits)?,
                Then::Idle => self.idle(exits)?,
                Then::Return(exit) => return Ok(exit),
            }
        }
    }

    fn start_if_asked(&mut self, shared: &Shared) -> Result<(), EngineError> {
        let state = shared.start.lock().unwrap_or_else(|e| e.into_inner()).take();
        let Some(mut state) = state else { return Ok(()) };
        // The caller gives registers; the APIC is the VP's own.
        state.lapic = self.save()?.lapic;
        state.activity = partition::Activity::Running;
        self.load(&state)?;
        self.sync_tsc()
    }

    /// The PIC's interrupt: given to KVM when the VP can take it, else asked to be told when.
    fn external_interrupt(&mut self, exits: &dyn VpExits) -> Result<(), EngineError> {
        let wanted = self.partition.extint.load(Ordering::SeqCst);
        // SAFETY: fields of the live mapping.
        let ready = self.field(|r| unsafe { &raw mut (*r).ready_for_interrupt_injection }) != 0;
        if wanted
            && ready
            && let Some(vector) = exits.acknowledge_extint(self.index)
        {
            sys::interrupt(&self.fd, vector).map_err(|source| EngineError::Host { call: "KVM_INTERRUPT", source })?;
            // One at a time.
            // SAFETY: as above.
            unsafe { (&raw mut (*self.run.as_ptr()).ready_for_interrupt_injection).write_volatile(0) };
        }
        let more = self.partition.extint.load(Ordering::SeqCst);
        // SAFETY: as above.
        unsafe { (&raw mut (*self.run.as_ptr()).request_interrupt_window).write_volatile(more.into()) };
        Ok(())
    }

    /// One KVM_RUN and its exit.
    fn enter(&mut self, exits: &dyn VpExits) -> Result<Then, EngineError> {
        let run = self.run.as_ptr();
        let (vp, hypercall_port) = (self.index, self.partition.hypercall_port.map(u16::from));
        self.partition.shared(vp).exits.fetch_add(1, Ordering::Relaxed);
        let internal = |what: String| Err(EngineError::Internal { vp, what });
        let exit = match self.fd.run() {
            Ok(exit) => exit,
            Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => return Ok(Then::Continue),
            Err(e) => return Err(host("KVM_RUN")(e)),
        };
        match exit {
            VcpuExit::IoIn(port, data) => {
                // SAFETY: after this exit the union holds `io`.
                let size = usize::from(unsafe { (*run).__bindgen_anon_1.io.size }.max(1));
                for item in data.chunks_mut(size) {
                    exits.io_read(vp, port, item);
                }
            }
            VcpuExit::IoOut(port, data) => {
                if Some(port) == hypercall_port && data.len() == 1 {
                    return Ok(Then::Hypercall);
                }
                // SAFETY: as above.
                let size = usize::from(unsafe { (*run).__bindgen_anon_1.io.size }.max(1));
                for item in data.chunks(size) {
                    exits.io_write(vp, port, item);
                }
            }
            VcpuExit::MmioRead(address, data) => {
                let len = data.len();
                for (at, size) in pieces(address, len) {
                    exits.mmio_read(vp, Gpa(address + at as u64), &mut data[at..at + size]);
                }
            }
            VcpuExit::MmioWrite(address, data) => {
                for (at, size) in pieces(address, data.len()) {
                    exits.mmio_write(vp, Gpa(address + at as u64), &data[at..at + size]);
                }
            }
            VcpuExit::X86Rdmsr(msr) => {
                let outcome = exits.msr_read(vp, msr.index);
                match outcome {
                    MsrOutcome::Value(value) | MsrOutcome::ValueThenIdle(value) => {
                        *msr.data = value;
                        *msr.error = 0;
                    }
                    MsrOutcome::Fault => *msr.error = 1,
                }
                if matches!(outcome, MsrOutcome::ValueThenIdle(_)) {
                    return Ok(Then::Idle);
                }
            }
            VcpuExit::X86Wrmsr(msr) => {
                let outcome = exits.msr_write(vp, msr.index, msr.data);
                *msr.error = u8::from(outcome == MsrOutcome::Fault);
                if matches!(outcome, MsrOutcome::ValueThenIdle(_)) {
                    return Ok(Then::Idle);
                }
            }
            VcpuExit::IoapicEoi(vector) => exits.eoi(vp, vector),
            VcpuExit::Shutdown => return Ok(Then::Return(RunExit::TripleFault)),
            VcpuExit::IrqWindowOpen | VcpuExit::Intr | VcpuExit::Hlt => {}
            VcpuExit::FailEntry(reason, cpu) => {
                return internal(format!(
                    "the processor refused the guest's state: reason {reason:#x} on host CPU {cpu}"
                ));
            }
            VcpuExit::InternalError => {
                // SAFETY: after this exit the union holds `internal`.
                let (suberror, data) = unsafe {
                    let e = &(*run).__bindgen_anon_1.internal;
                    (e.suberror, e.data)
                };
                let place = self.place();
                return internal(format!("KVM internal error {suberror}, data {:x?}, {place}", &data[..4]));
            }
            other => {
                let text = format!("unexpected exit {other:?}");
                return internal(text);
            }
        }
        Ok(Then::Continue)
    }

    fn place(&self) -> String {
        let regs = self.fd.sync_regs();
        format!("at {:#x}:{:#x}", regs.sregs.cs.selector, regs.regs.rip)
    }

    /// Completes the instruction of the last exit without entering the guest. Returns whether the VP is in shutdown.
    fn settle(&mut self, exits: &dyn VpExits) -> Result<bool, EngineError> {
        for _ in 0..MAX_COMPLETIONS {
            self.set_immediate_exit(true);
            match self.enter(exits)? {
                Then::Continue if self.interrupted() => break,
                Then::Continue | Then::Idle => {}
                Then::Hypercall => self.hypercall(exits)?,
                Then::Return(_) => return Ok(true),
            }
        }
        self.set_immediate_exit(false);
        Ok(false)
    }

    /// Did the last KVM_RUN end for no reason but the immediate exit?
    fn interrupted(&self) -> bool {
        // SAFETY: a field of the live mapping.
        self.field(|r| unsafe { &raw mut (*r).exit_reason }) == kvm_bindings::KVM_EXIT_INTR
    }

    fn hypercall(&mut self, exits: &dyn VpExits) -> Result<(), EngineError> {
        // The OUT is completed first, so that RIP is behind it whatever way KVM took.
        self.settle(exits)?;
        let regs = self.fd.sync_regs();
        let mut context = Context { vp: self, regs: regs.regs, sregs: regs.sregs, fpu: None, changed: false };
        let outcome = exits.hypercall(context.vp.index, &mut context);
        let Context { mut regs, fpu, mut changed, .. } = context;
        if let Some((fpu, true)) = fpu {
            self.fd.set_fpu(&fpu).map_err(host("KVM_SET_FPU"))?;
        }
        if outcome != HypercallOutcome::Complete {
            regs.rip = regs.rip.wrapping_sub(OUT_LENGTH);
            changed = true;
        }
        if changed {
            self.fd.sync_regs_mut().regs = regs;
            self.fd.set_sync_dirty_reg(SyncReg::Register);
        }
        if outcome == HypercallOutcome::InvalidOpcode {
            let mut events = self.fd.get_vcpu_events().map_err(host("KVM_GET_VCPU_EVENTS"))?;
            events.exception.injected = 1;
            events.exception.nr = x86::exception::UD;
            events.exception.has_error_code = 0;
            self.fd.set_vcpu_events(&events).map_err(host("KVM_SET_VCPU_EVENTS"))?;
        }
        Ok(())
    }

    /// The guest-idle MSR. With interrupts disabled KVM could not be woken by one, so that the VP only makes way for
    /// others: a guest must expect to be woken early (TLFS section 10.1.4).
    fn idle(&mut self, exits: &dyn VpExits) -> Result<(), EngineError> {
        self.settle(exits)?;
        if self.fd.sync_regs().regs.rflags & rflags::IF != 0 {
            let halted = kvm_mp_state { mp_state: KVM_MP_STATE_HALTED };
            self.fd.set_mp_state(halted).map_err(host("KVM_SET_MP_STATE"))?;
        } else {
            std::thread::yield_now();
        }
        Ok(())
    }
}

/// Splits an access at 8-byte boundaries.
fn pieces(address: u64, len: usize) -> impl Iterator<Item = (usize, usize)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let left = len.checked_sub(done).filter(|l| *l > 0)?;
        let size = left.min(8 - ((address + done as u64) & 7) as usize);
        let piece = (done, size);
        done += size;
        Some(piece)
    })
}

/// A hypercall's view of its caller.
struct Context<'a> {
    vp: &'a mut KvmVp,
    regs: kvm_bindings::kvm_regs,
    sregs: kvm_bindings::kvm_sregs,
    /// The vector registers, once asked for, and whether they were changed.
    fpu: Option<(kvm_bindings::kvm_fpu, bool)>,
    changed: bool,
}

impl Context<'_> {
    fn fpu(&mut self) -> &mut (kvm_bindings::kvm_fpu, bool) {
        let vp = &self.vp;
        self.fpu.get_or_insert_with(|| (vp.fd.get_fpu().unwrap_or_default(), false))
    }
}

impl HypercallContext for Context<'_> {
    fn gpr(&self, number: usize) -> u64 {
        let mut regs = self.regs;
        *gpr_field(&mut regs, number)
    }
    fn set_gpr(&mut self, number: usize, value: u64) {
        *gpr_field(&mut self.regs, number) = value;
        self.changed = true;
    }
    fn xmm(&mut self, number: usize) -> u128 {
        u128::from_le_bytes(self.fpu().0.xmm[number & 15])
    }
    fn set_xmm(&mut self, number: usize, value: u128) {
        let fpu = self.fpu();
        fpu.0.xmm[number & 15] = value.to_le_bytes();
        fpu.1 = true;
    }
    fn is_64bit(&self) -> bool {
        self.sregs.efer & efer::LMA != 0 && self.sregs.cs.l != 0
    }
    fn cpl(&self) -> u8 {
        if !self.is_protected() && self.sregs.cr0 & cr0::PE == 0 { 0 } else { self.sregs.ss.dpl }
    }
    fn is_protected(&self) -> bool {
        self.sregs.cr0 & cr0::PE != 0 && self.regs.rflags & rflags::VM == 0
    }
}

/// A general-purpose register by its encoding number.
pub(crate) fn gpr_field(regs: &mut kvm_bindings::kvm_regs, number: usize) -> &mut u64 {
    match number & 15 {
        gpr::RAX => &mut regs.rax,
        gpr::RCX => &mut regs.rcx,
        gpr::RDX => &mut regs.rdx,
        gpr::RBX => &mut regs.rbx,
        gpr::RSP => &mut regs.rsp,
        gpr::RBP => &mut regs.rbp,
        gpr::RSI => &mut regs.rsi,
        gpr::RDI => &mut regs.rdi,
        gpr::R8 => &mut regs.r8,
        gpr::R9 => &mut regs.r9,
        gpr::R10 => &mut regs.r10,
        gpr::R11 => &mut regs.r11,
        gpr::R12 => &mut regs.r12,
        gpr::R13 => &mut regs.r13,
        gpr::R14 => &mut regs.r14,
        _ => &mut regs.r15,
    }
}

impl Vp for KvmVp {
    fn index(&self) -> VpIndex {
        self.index
    }

    fn run(&mut self, exits: &dyn VpExits) -> Result<RunExit, EngineError> {
        sys::unblock_kick_signal();
        self.sync_tsc()?;
        let partition = self.partition.clone();
        let shared = partition.shared(self.index);
        {
            let cpu_clock = libc::CLOCK_THREAD_CPUTIME_ID;
            let mut clock = cpu_clock;
            // SAFETY: the calling thread exists; writes to a local variable.
            let thread = unsafe {
                let thread = libc::pthread_self();
                libc::pthread_getcpuclockid(thread, &mut clock);
                thread
            };
            let running =
                Running { thread, immediate_exit: self.immediate_exit(), cpu_clock: clock, cpu_start: cpu_time(clock) };
            *shared.running.lock().unwrap_or_else(|e| e.into_inner()) = Some(running);
        }
        let result = self.run_loop(exits);
        let was = shared.running.lock().unwrap_or_else(|e| e.into_inner()).take();
        if let Some(r) = was {
            shared.runtime_ns.fetch_add(cpu_time(r.cpu_clock).saturating_sub(r.cpu_start), Ordering::Relaxed);
        }
        result
    }

    fn state(&mut self) -> Result<VpState, EngineError> {
        self.save()
    }

    fn set_state(&mut self, state: &VpState) -> Result<(), EngineError> {
        self.load(state)
    }
}

#[cfg(test)]
mod tests {
    use super::pieces;

    #[test]
    fn accesses_split_at_eight_bytes() {
        assert_eq!(pieces(0x1000, 8).collect::<Vec<_>>(), [(0, 8)]);
        assert_eq!(pieces(0x1006, 4).collect::<Vec<_>>(), [(0, 2), (2, 2)]);
        assert_eq!(pieces(0x1001, 2).collect::<Vec<_>>(), [(0, 2)]);
    }
}
