//! System calls that the worker's threads may make (seccomp).
//!
//! Three filters lie over each other, and the strictest answer counts: an allow-list whose default is EPERM, so that a
//! library that tries something new goes on without it; ENOSYS for `clone3`, whose flags a filter cannot see, so that the
//! C library makes threads with `clone`; and death for calls that only an attacker makes.

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};
use std::collections::BTreeMap;

/// What every thread may do, those of VPs too: nothing that names a file, a socket or another process.
const ALL: &[i64] = &[
    // Memory.
    libc::SYS_brk,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    // The translator's code: a memory file, mapped twice.
    libc::SYS_memfd_create,
    libc::SYS_ftruncate,
    libc::SYS_membarrier,
    // Threads, time, signals.
    libc::SYS_futex,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_gettimeofday,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_getrandom,
    // What is open already: the log, event descriptors.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_close,
    libc::SYS_poll,
    libc::SYS_ppoll,
];

/// What threads do that serve devices and the host, but not VPs.
const DEVICES: &[i64] = &[
    libc::SYS_sched_setaffinity,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_timerfd_gettime,
    libc::SYS_arch_prctl,
    // Files that are open, and (as far as Landlock allows) its own.
    libc::SYS_readv,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_lseek,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_sync_file_range,
    libc::SYS_fallocate,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_openat,
    libc::SYS_open,
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_readlink,
    libc::SYS_readlinkat,
    libc::SYS_getdents64,
    libc::SYS_rename,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
    libc::SYS_flock,
    libc::SYS_getcwd,
    libc::SYS_dup,
    libc::SYS_dup3,
    // Waiting for events; rings that exist already (new ones are not made: io_uring knows calls that this list does not).
    libc::SYS_eventfd2,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_io_uring_enter,
];

/// What VPs do whose guest code is executed in processes of their own: those exist already, and no other can be traced.
/// (And `ptrace` with [`TRACING`], `pidfd_send_signal` with [`TO_PROCESSES`].)
const PROCESSES: &[i64] = &[libc::SYS_wait4, libc::SYS_sched_setaffinity];

/// `ptrace` requests to a process that is traced already, of which none reads or writes memory.
const TRACING: &[libc::c_uint] = &[
    libc::PTRACE_CONT,
    libc::PTRACE_SYSEMU,
    libc::PTRACE_GETREGS,
    libc::PTRACE_SETREGS,
    libc::PTRACE_GETREGSET,
    libc::PTRACE_SETREGSET,
    libc::PTRACE_GETSIGINFO,
];

/// What interrupts such a process, and what ends it. The descriptors say which one: none can be made for another process.
const TO_PROCESSES: &[i32] = &[libc::SIGUSR1, libc::SIGKILL];

/// What the thread does that replaces a file for a VP, beyond [`ALL`].
const WRITER: &[i64] = &[libc::SYS_openat, libc::SYS_fsync, libc::SYS_rename];

/// What only threads that serve the host do: the control socket and the console.
const SERVICE: &[i64] = &[
    libc::SYS_accept4,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_shutdown,
    libc::SYS_setsockopt,
    libc::SYS_getsockname,
    // Filters of the VPs' threads are put over the process's.
    libc::SYS_seccomp,
];

/// Calls that have no use here but an attacker's (`ptrace`: see [`deadly`]).
const DEADLY: &[i64] = &[
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_setns,
    libc::SYS_unshare,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_keyctl,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_userfaultfd,
    libc::SYS_setuid,
    libc::SYS_setgid,
    libc::SYS_setresuid,
    libc::SYS_setresgid,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_iopl,
    libc::SYS_ioperm,
    libc::SYS_open_by_handle_at,
];

/// `ioctl`s: KVM's ('\xAE'), and those by which the runtime asks whether something is a terminal.
const KVM_IOCTL: u64 = 0xae00;
/// `TCGETS` (asm-generic/ioctls.h).
const TCGETS: u64 = 0x5401;
/// What reads a terminal's settings, and puts them back at the end: `TCSETSW`, `TCGETS2`, `TCSETSW2`. (Not what types for
/// the user: `TIOCSTI`.)
const TERMINAL: [u64; 3] = [0x5403, 0x802c_542a, 0x402c_542c];
/// `prctl` options that are in use: names of threads, their timer slack, and no new privileges (which `seccomp` sets).
const PRCTLS: &[i32] = &[libc::PR_SET_NAME, libc::PR_GET_NAME, libc::PR_SET_TIMERSLACK, libc::PR_SET_NO_NEW_PRIVS];

fn condition(argument: u8, op: SeccompCmpOp, value: u64, wide: bool) -> Result<SeccompCondition, String> {
    let len = if wide { SeccompCmpArgLen::Qword } else { SeccompCmpArgLen::Dword };
    SeccompCondition::new(argument, len, op, value).map_err(|e| e.to_string())
}

fn rule(conditions: Vec<SeccompCondition>) -> Result<SeccompRule, String> {
    SeccompRule::new(conditions).map_err(|e| e.to_string())
}

fn compile(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    otherwise: SeccompAction,
    on_match: SeccompAction,
) -> Result<BpfProgram, String> {
    let filter = SeccompFilter::new(rules, otherwise, on_match, TargetArch::x86_64).map_err(|e| e.to_string())?;
    BpfProgram::try_from(filter).map_err(|e| e.to_string())
}

/// The deadly calls: `ptrace` too, but for [`TRACING`] if the engine uses processes.
fn deadly(processes: bool) -> Result<BpfProgram, String> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = DEADLY.iter().map(|call| (*call, Vec::new())).collect();
    let others = TRACING.iter().map(|request| condition(0, SeccompCmpOp::Ne, u64::from(*request), true));
    let ptrace = if processes { vec![rule(others.collect::<Result<_, _>>()?)?] } else { Vec::new() };
    rules.insert(libc::SYS_ptrace, ptrace);
    compile(rules, SeccompAction::Allow, SeccompAction::KillProcess)
}

/// The allow-list: these calls, and a few with certain arguments only; `processes`: those that go to processes of the engine.
fn allowed(lists: &[&[i64]], ioctls: &[u64], processes: bool) -> Result<BpfProgram, String> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        lists.iter().flat_map(|list| list.iter()).map(|call| (*call, Vec::new())).collect();
    // Threads, not processes.
    let thread = (libc::CLONE_THREAD | libc::CLONE_VM) as u64;
    let clone = rule(vec![condition(0, SeccompCmpOp::MaskedEq(thread), thread, true)?])?;
    rules.insert(libc::SYS_clone, vec![clone]);
    // Signals to itself only: kicks of VPs.
    let own = u64::from(std::process::id());
    rules.insert(libc::SYS_tgkill, vec![rule(vec![condition(0, SeccompCmpOp::Eq, own, false)?])?]);
    let mut numbers = vec![rule(vec![condition(1, SeccompCmpOp::MaskedEq(0xff00), KVM_IOCTL, false)?])?];
    for number in ioctls.iter().chain(&[TCGETS]) {
        numbers.push(rule(vec![condition(1, SeccompCmpOp::Eq, *number, false)?])?);
    }
    rules.insert(libc::SYS_ioctl, numbers);
    let fcntls = [libc::F_GETFL, libc::F_SETFL, libc::F_GETFD, libc::F_SETFD, libc::F_DUPFD_CLOEXEC];
    let with = |argument, values: &[i32]| -> Result<Vec<SeccompRule>, String> {
        values.iter().map(|v| rule(vec![condition(argument, SeccompCmpOp::Eq, *v as u64, false)?])).collect()
    };
    rules.insert(libc::SYS_fcntl, with(1, &fcntls)?);
    rules.insert(libc::SYS_prctl, with(0, PRCTLS)?);
    if processes {
        rules.extend(PROCESSES.iter().map(|call| (*call, Vec::new())));
        // The deadly list is the one that looks at the request.
        rules.insert(libc::SYS_ptrace, Vec::new());
        let to = TO_PROCESSES.iter().map(|signal| {
            let signal = condition(1, SeccompCmpOp::Eq, *signal as u64, false)?;
            rule(vec![signal, condition(2, SeccompCmpOp::Eq, 0, true)?, condition(3, SeccompCmpOp::Eq, 0, false)?])
        });
        rules.insert(libc::SYS_pidfd_send_signal, to.collect::<Result<_, _>>()?);
    }
    compile(rules, SeccompAction::Errno(libc::EPERM as u32), SeccompAction::Allow)
}

/// Puts the filters over all threads of the process.
pub fn restrict_process(processes: bool) -> Result<(), String> {
    let no_clone3 = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    // The allow-list comes last: it would not let the others be set.
    for program in [
        deadly(processes)?,
        compile(no_clone3, SeccompAction::Allow, SeccompAction::Errno(libc::ENOSYS as u32))?,
        // `clone3` and what is deadly must be let through here, or this list's milder answer would not be the one: the
        // kernel takes the strictest, and among two error numbers the newest filter's.
        allowed(&[ALL, DEVICES, SERVICE, &[libc::SYS_clone3]], &TERMINAL, processes)?,
    ] {
        seccompiler::apply_filter_all_threads(&program).map_err(|e| e.to_string())?;
    }
    Ok(())
}

/// Puts the VP's shorter list over the calling thread, and the threads that it will make (the engine's timers).
pub fn restrict_vp(processes: bool) -> Result<(), String> {
    let program = allowed(&[ALL, &[libc::SYS_clone3]], &[], processes)?;
    seccompiler::apply_filter(&program).map_err(|e| e.to_string())
}

/// Puts the list of a thread that writes files over the calling thread.
pub fn restrict_writer() -> Result<(), String> {
    let program = allowed(&[ALL, WRITER, &[libc::SYS_clone3]], &[], false)?;
    seccompiler::apply_filter(&program).map_err(|e| e.to_string())
}
