//! The child's side: from fork until nothing is left in its address space but the stub and its commands.

use super::sys::raw;
use super::{BATCH, COMMANDS, STUB};
use std::arch::{asm, global_asm};

/// A system call that the stub makes: number and arguments.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Command {
    pub(super) number: u64,
    pub(super) arguments: [u64; 6],
    pub(super) unused: u64,
}

/// The system call by which the stub says that it is done: the filter has it stop. (An INT3 costs twice as much on a host that
/// is a guest itself.)
pub(super) const DONE: i64 = libc::SYS_getpid;

// The stub needs no stack. RBX: the next command, R12: how many are left (not zero). It stops with R13: what the last command
// has given, R12: how many have not succeeded.
global_asm!(
    ".pushsection .rodata.viridian_direct, \"a\", @progbits",
    ".hidden viridian_direct_stub",
    ".hidden viridian_direct_stub_end",
    ".globl viridian_direct_stub",
    ".globl viridian_direct_stub_end",
    "viridian_direct_stub:",
    "2: mov rax, [rbx]",
    "mov rdi, [rbx + 8]",
    "mov rsi, [rbx + 16]",
    "mov rdx, [rbx + 24]",
    "mov r10, [rbx + 32]",
    "mov r8, [rbx + 40]",
    "mov r9, [rbx + 48]",
    "syscall",
    "cmp rax, -4095",
    "jae 3f",
    "add rbx, 64",
    "dec r12",
    "jnz 2b",
    "3: mov r13, rax",
    "mov eax, {done}",
    "syscall",
    // Here only if the filter could not be set.
    "int3",
    "viridian_direct_stub_end:",
    ".popsection",
    done = const DONE,
);

unsafe extern "C" {
    static viridian_direct_stub: u8;
    static viridian_direct_stub_end: u8;
}

/// The stub's code.
pub(super) fn stub() -> &'static [u8] {
    // SAFETY: the two symbols are the start and the end of the same constant bytes.
    unsafe {
        let (start, end) = (&raw const viridian_direct_stub, &raw const viridian_direct_stub_end);
        std::slice::from_raw_parts(start, end.addr() - start.addr())
    }
}

/// What parent and child tell each other before there is guest code: the last bytes of the shared memory, which later
/// hold commands.
#[repr(C)]
pub(super) struct Talk {
    /// From the parent, after the first stop: the address of `struct rseq` (0: none), its size and signature.
    pub(super) rseq: [u64; 3],
    /// From the child: which step failed ([`STEPS`]), and with which error.
    pub(super) failed: [u64; 2],
    /// From the child: CPUID faults.
    pub(super) cpuid_faults: u64,
}

/// Names of the child's steps, for error messages.
pub(super) const STEPS: &[&str] = &[
    "starting",
    "the parent has ended",
    "ptrace(PTRACE_TRACEME)",
    "resetting signals",
    "stopping",
    "rseq",
    "keeping the guest memory's descriptors",
    "close_range",
    "prctl(PR_SET_TSC)",
    "prctl(PR_SET_NO_NEW_PRIVS)",
    "mapping the stub",
    "mapping the commands",
];

/// What the child needs, prepared by the parent.
pub(super) struct Plan<'a> {
    /// Descriptors of the guest's memory. They become `first_fd`, `first_fd + 1`, ...
    pub(super) blocks: &'a [i32],
    /// Above all of `blocks`.
    pub(super) first_fd: i32,
    /// RDTSC is to fault.
    pub(super) tsc_faults: bool,
    /// The parent's process id.
    pub(super) parent: i32,
    /// The commands, shared; they are remapped.
    pub(super) shared: *mut Command,
    /// How many commands are there already.
    pub(super) commands: u64,
    /// Where the parent is told, in the shared memory.
    pub(super) talk: *mut Talk,
}

/// `ARCH_SET_CPUID` (asm/prctl.h): with 0, CPUID faults.
const ARCH_SET_CPUID: u64 = 0x1012;
/// `RSEQ_FLAG_UNREGISTER` (linux/rseq.h).
const RSEQ_FLAG_UNREGISTER: u64 = 1;

/// Ends the child with a message to the parent.
///
/// # Safety
/// In the child only.
unsafe fn fail(plan: &Plan<'_>, step: u64, error: i64) -> ! {
    // SAFETY: the shared memory is mapped here until the last step, which cannot fail after it has moved it.
    unsafe {
        (&raw mut (*plan.talk).failed).write_volatile([step, error.unsigned_abs()]);
        loop {
            raw(libc::SYS_exit_group, [1, 0, 0, 0, 0, 0]);
        }
    }
}

/// The child's whole life before the stub. Makes raw system calls only: other threads of the parent may hold any lock.
///
/// # Safety
/// In a child that shares no memory with its parent but `plan.shared`, with all signals blocked.
pub(super) unsafe fn enter(plan: &Plan<'_>) -> ! {
    let mut step = 0;
    // SAFETY: calls that concern only this process, which has one thread and no code but this.
    unsafe {
        let mut check = |result: i64| {
            step += 1;
            if result < 0 {
                fail(plan, step, result);
            }
            result
        };
        // Gone with the thread that traces it, should PTRACE_O_EXITKILL not be set yet.
        raw(libc::SYS_prctl, [libc::PR_SET_PDEATHSIG as u64, libc::SIGKILL as u64, 0, 0, 0, 0]);
        let parent = raw(libc::SYS_getppid, [0; 6]);
        check(if parent == i64::from(plan.parent) { 0 } else { -i64::from(libc::ESRCH) });
        // Terminals signal groups; names are for people who look at lists of processes.
        raw(libc::SYS_setpgid, [0; 6]);
        raw(libc::SYS_prctl, [libc::PR_SET_NAME as u64, c"viridian-direct".as_ptr() as u64, 0, 0, 0, 0]);
        check(raw(libc::SYS_ptrace, [libc::PTRACE_TRACEME.into(), 0, 0, 0, 0, 0]));
        // `struct sigaction` of the kernel: handler, flags, restorer, mask; all zero is the default action.
        let (default, none) = ([0u64; 4], 0u64);
        for signal in 1..=64 {
            if signal != libc::SIGKILL && signal != libc::SIGSTOP {
                raw(libc::SYS_rt_sigaction, [signal as u64, default.as_ptr() as u64, 0, 8, 0, 0]);
            }
        }
        let empty = &raw const none as u64;
        check(raw(libc::SYS_rt_sigprocmask, [libc::SIG_SETMASK as u64, empty, 0, 8, 0, 0]));
        // The parent sets its options here, and looks for what the C library has registered.
        let me = raw(libc::SYS_getpid, [0; 6]) as u64;
        check(raw(libc::SYS_kill, [me, libc::SIGSTOP as u64, 0, 0, 0, 0]));
        let [rseq, size, signature] = (&raw const (*plan.talk).rseq).read_volatile();
        check(match rseq {
            0 => 0,
            _ => raw(libc::SYS_rseq, [rseq, size, RSEQ_FLAG_UNREGISTER, signature, 0, 0]),
        });
        // The descriptors of the blocks, moved above all others of them; then everything else is closed.
        let first = plan.first_fd as u64;
        let mut moved = 0;
        for (to, block) in (first..).zip(plan.blocks) {
            moved = raw(libc::SYS_dup3, [*block as u64, to, 0, 0, 0, 0]).min(moved);
        }
        check(moved);
        let behind = first + plan.blocks.len() as u64;
        let below = if first > 0 { raw(libc::SYS_close_range, [0, first - 1, 0, 0, 0, 0]) } else { 0 };
        check(below.min(raw(libc::SYS_close_range, [behind, u32::MAX.into(), 0, 0, 0, 0])));
        let tsc = if plan.tsc_faults { libc::PR_TSC_SIGSEGV } else { libc::PR_TSC_ENABLE };
        check(raw(libc::SYS_prctl, [libc::PR_SET_TSC as u64, tsc as u64, 0, 0, 0, 0]));
        // Only some processors can.
        let faults = raw(libc::SYS_arch_prctl, [ARCH_SET_CPUID, 0, 0, 0, 0, 0]) == 0;
        (&raw mut (*plan.talk).cpuid_faults).write_volatile(faults.into());
        check(raw(libc::SYS_prctl, [libc::PR_SET_NO_NEW_PRIVS as u64, 1, 0, 0, 0, 0]));
        // The stub's page, with room for the commands behind it.
        let rw = (libc::PROT_READ | libc::PROT_WRITE) as u64;
        let fixed = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE) as u64;
        let len = COMMANDS - STUB + (BATCH * size_of::<Command>()) as u64;
        let mapped = raw(libc::SYS_mmap, [STUB, len, rw, fixed, u64::MAX, 0]);
        let code = stub();
        let ready = if mapped == STUB as i64 {
            std::ptr::copy_nonoverlapping(code.as_ptr(), STUB as *mut u8, code.len());
            let rx = (libc::PROT_READ | libc::PROT_EXEC) as u64;
            raw(libc::SYS_mprotect, [STUB, COMMANDS - STUB, rx, 0, 0, 0])
        } else {
            mapped.min(-i64::from(libc::EEXIST))
        };
        check(ready);
        let len = (BATCH * size_of::<Command>()) as u64;
        let flags = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
        check(raw(libc::SYS_mremap, [plan.shared as u64, len, len, flags, COMMANDS, 0]));
        // The commands take away all other memory, this code and its stack too.
        asm!(
            "mov rbx, rdi", "mov r12, rsi", "jmp rdx",
            in("rdi") COMMANDS, in("rsi") plan.commands, in("rdx") STUB,
            options(noreturn),
        )
    }
}
