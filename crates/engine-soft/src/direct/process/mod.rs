//! A process that holds a guest's user memory, and nothing else, and executes a guest's user code under ptrace.
//!
//! Its address space is the user half of an address space of the guest: pages of guest memory at the guest's own virtual
//! addresses. The thread that has made it traces it. Guest code runs natively until it does something that enters the
//! host's kernel with a result: a system call (which is never executed: `PTRACE_SYSEMU`), a fault, or
//! [`Interrupter::interrupt`].
//!
//! **Mapping.** Two more pieces of memory lie at [`Process::RESERVED`]: a stub, and a list of commands that is shared with
//! the parent. Each command is a system call; the parent writes the list and has the stub make the calls, with
//! `PTRACE_CONT`: the only time that the process makes any. Guest code that jumps into the stub gets no further than
//! to its SYSCALL instruction, which stops like every other one.
//!
//! **Confinement.** The process has no descriptors but those of the guest's memory, no memory but that and the stub, and
//! a seccomp filter that lets it map files shared, unmap, and nothing more. The filter has a second purpose: the kernel
//! executes the system calls of its vsyscall page itself, unseen by ptrace, but not unseen by seccomp.
//!
//! **What guest code sees that is not the guest's.** What [`super::scan`] finds in code (CPUID faults on some processors:
//! [`Process::cpuid_faults`]; RDTSC and RDTSCP do if that is asked for: [`Tsc`]); the selectors; the stub and the (emptied)
//! commands, which can be read and not written.

mod child;
mod sys;
#[cfg(test)]
mod tests;

use child::{Command, DONE, Plan, STEPS, Talk};
use partition::clock::host_tsc;
use std::io;
use std::marker::PhantomData;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use x86::paging::PAGE_SIZE;

/// Where the stub lies: an address that neither Linux nor Windows nor usual libraries give to programs (away from
/// stacks, mmap areas, executables, and the multiples that garbage collectors and sanitizers like). Nothing else is in the
/// 512 GiB that one entry of a top-level page table covers.
const STUB: u64 = 0x6b9e_3d52_0000;
/// Where the commands lie.
const COMMANDS: u64 = STUB + PAGE_SIZE;
/// Most commands of one round trip.
const BATCH: usize = 128;
/// Bytes of the commands.
const SHARED: usize = BATCH * size_of::<Command>();
/// End of user space with four-level page tables: the kernel keeps the last page free.
pub(super) const USER_END: u64 = 0x7fff_ffff_f000;
/// The lowest address that an ordinary process may map (vm.mmap_min_addr).
pub(super) const USER_START: u64 = 64 << 10;
/// What ends [`Process::run`] early.
const INTERRUPT: i32 = libc::SIGUSR1;
/// `PTRACE_GET_RSEQ_CONFIGURATION` (linux/ptrace.h).
const PTRACE_GET_RSEQ_CONFIGURATION: libc::c_uint = 0x420f;
/// `NT_X86_XSTATE` (linux/elf.h).
const NT_X86_XSTATE: u64 = 0x202;
/// Status of a stop at a system call, with PTRACE_O_TRACESYSGOOD.
const SYSCALL_STOP: i32 = libc::SIGTRAP | 0x80;
/// Status of the stop at [`DONE`].
const STUB_STOP: i32 = libc::SIGTRAP | libc::PTRACE_EVENT_SECCOMP << 8;
/// Not bound to a processor.
const ANYWHERE: i32 = -1;
/// A long run, in ticks of the TSC: some 0.3 to 0.5 ms.
const LONG: u64 = 1 << 20;
/// Bytes of the FXSAVE image that the kernel uses for itself.
const SOFTWARE: Range<usize> = 464..512;

/// What may be done with a mapped page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prot {
    /// Read.
    Read,
    /// Read and write.
    ReadWrite,
    /// Read and execute.
    ReadExecute,
    /// All three.
    ReadWriteExecute,
}

impl Prot {
    fn bits(self) -> u64 {
        (match self {
            Self::Read => libc::PROT_READ,
            Self::ReadWrite => libc::PROT_READ | libc::PROT_WRITE,
            Self::ReadExecute => libc::PROT_READ | libc::PROT_EXEC,
            Self::ReadWriteExecute => libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC,
        }) as u64
    }
}

/// A change of the process's memory. All numbers are multiples of 4096; addresses lie above 64 KiB, below the last page of
/// the lower half, and outside [`Process::RESERVED`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapOp {
    /// Maps guest memory, in place of what is there.
    Map {
        /// Virtual address.
        at: u64,
        /// Bytes.
        len: u64,
        /// Which of the blocks given to [`Process::spawn`].
        block: usize,
        /// Offset in the block's file.
        offset: u64,
        /// Permissions.
        prot: Prot,
    },
    /// Unmaps.
    Unmap {
        /// Virtual address.
        at: u64,
        /// Bytes.
        len: u64,
    },
    /// Unmaps everything.
    UnmapAll,
}

/// What RDTSC and RDTSCP do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tsc {
    /// They read the host's counter.
    Host,
    /// They raise SIGSEGV. The host's kernel then writes CR4 at each switch between this process and another: on a host that
    /// is a guest itself, that may double the costs of a run (measured: 18 us instead of 8).
    Faults,
}

/// Why guest code has stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// At an instruction that makes a system call of the host (SYSCALL, INT 0x80, SYSENTER). RIP is behind it; RCX and
    /// R11 are already what SYSCALL makes of them; `orig_rax` is RAX, and `rax` is -ENOSYS.
    Syscall,
    /// A signal by an instruction. RIP is where the host's kernel leaves it: on the instruction for faults, behind it for
    /// INT3 and single steps.
    ///
    /// SIGSYS: a call of the host's vsyscall page, at `address`. The return has been made: RIP is the caller's, RSP is 8
    /// above what it was, and RAX is lost.
    Fault {
        /// SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP or SIGSYS.
        signal: i32,
        /// `si_code`.
        code: i32,
        /// `si_addr`.
        address: u64,
    },
    /// [`Interrupter::interrupt`].
    Interrupted,
}

/// Ends a [`Process::run`], from any thread.
#[derive(Clone, Debug)]
pub struct Interrupter(Arc<OwnedFd>);

impl Interrupter {
    /// Makes the current or the next [`Process::run`] return [`Stop::Interrupted`] soon. If it is ending for another
    /// reason just now, the one after it does. Interrupts do not add up. Does nothing if the process has ended.
    pub fn interrupt(&self) {
        let _ = send(&self.0, INTERRUPT);
    }
}

/// By its descriptor, which never means another process, as a number could.
fn send(pidfd: &OwnedFd, signal: i32) -> io::Result<u64> {
    // SAFETY: without a siginfo the call uses no memory.
    unsafe { sys::call(libc::SYS_pidfd_send_signal, [pidfd.as_raw_fd() as u64, signal as u64, 0, 0, 0, 0]) }
}

/// One traced process whose user memory is a guest's. Only to be used on the thread that has made it: the kernel
/// knows that thread as its tracer. (It may be dropped anywhere.)
pub struct Process {
    pid: i32,
    pidfd: Arc<OwnedFd>,
    shared: Shared,
    first_fd: u64,
    blocks: usize,
    /// An interrupt arrived while the stub was at work.
    interrupted: bool,
    /// It has been reaped, so its number may be somebody else's.
    ended: bool,
    cpuid_faults: bool,
    /// The host's processor that it is bound to, or [`ANYWHERE`].
    processor: i32,
    /// How long runs are, in ticks of the host's TSC: a moving mean.
    length: u64,
    /// As large as the kernel wants it.
    xstate: Box<[u8]>,
    /// Neither `Send` nor `Sync`.
    thread: PhantomData<*const ()>,
}

/// The command list, mapped. Once guest code has run it is only written: what is in it then may be anybody's.
struct Shared(NonNull<Command>);

impl Shared {
    fn new() -> io::Result<Self> {
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
        // SAFETY: new memory where the kernel likes.
        let memory = unsafe { libc::mmap(std::ptr::null_mut(), SHARED, prot, flags, -1, 0) };
        match NonNull::new(memory.cast::<Command>()) {
            Some(commands) if memory != libc::MAP_FAILED => Ok(Self(commands)),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn write(&self, commands: &[Command]) {
        assert!(commands.len() <= BATCH);
        // SAFETY: there is room for BATCH commands.
        unsafe { std::ptr::copy_nonoverlapping(commands.as_ptr(), self.0.as_ptr(), commands.len()) }
    }

    fn clear(&self, count: usize) {
        assert!(count <= BATCH);
        // SAFETY: as in `write`.
        unsafe { std::ptr::write_bytes(self.0.as_ptr(), 0, count) }
    }

    /// The last bytes.
    fn talk(&self) -> *mut Talk {
        // SAFETY: inside the mapping; both sizes are multiples of 8.
        unsafe { self.0.as_ptr().byte_add(SHARED - size_of::<Talk>()).cast() }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`; nobody has another pointer.
        unsafe { libc::munmap(self.0.as_ptr().cast(), SHARED) };
    }
}

fn command(number: i64, arguments: [u64; 6]) -> Command {
    Command { number: number as u64, arguments, unused: 0 }
}

fn unmap(range: Range<u64>) -> Command {
    command(libc::SYS_munmap, [range.start, range.end - range.start, 0, 0, 0, 0])
}

/// How guest memory is mapped.
const MAP_FLAGS: u64 = (libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_POPULATE) as u64;

/// Where the filter lies when it is set: in the second half of the commands.
const FILTER_AT: usize = SHARED / 2;

/// Instructions of the filter.
type Filter = [libc::sock_filter; 11];

/// The process's filter: mmap as [`MAP_FLAGS`] say, munmap, and a stop at [`DONE`].
fn filter() -> Filter {
    const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    /// `AUDIT_ARCH_X86_64` (linux/audit.h).
    const ARCH: u32 = 0xc000_003e;
    let step = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    // `struct seccomp_data`: number, architecture, address, arguments from byte 16.
    [
        step(LOAD, 0, 0, 4),
        step(EQUAL, 0, 6, ARCH),
        step(LOAD, 0, 0, 0),
        step(EQUAL, 6, 0, DONE as u32),
        step(EQUAL, 4, 0, libc::SYS_munmap as u32),
        step(EQUAL, 0, 2, libc::SYS_mmap as u32),
        // The flags: no memory of its own.
        step(LOAD, 0, 0, 16 + 3 * 8),
        step(EQUAL, 1, 0, MAP_FLAGS as u32),
        step(RETURN, 0, 0, libc::SECCOMP_RET_TRAP),
        step(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW),
        step(RETURN, 0, 0, libc::SECCOMP_RET_TRACE),
    ]
}

/// The last part of the child's way: everything is unmapped, and the filter set.
fn first_commands(shared: &Shared) -> Vec<Command> {
    let filter = filter();
    let at = COMMANDS + FILTER_AT as u64;
    // `struct sock_fprog`: length, address.
    let program = [filter.len() as u64, at + 16];
    // SAFETY: inside the mapping, and aligned: it is a page's start.
    unsafe {
        let here = shared.0.as_ptr().byte_add(FILTER_AT);
        here.cast::<[u64; 2]>().write(program);
        here.byte_add(16).cast::<Filter>().write(filter);
    }
    let reserved = Process::RESERVED;
    vec![
        command(libc::SYS_mprotect, [COMMANDS, SHARED as u64, libc::PROT_READ as u64, 0, 0, 0]),
        unmap(0..reserved.start),
        unmap(reserved.end..USER_END),
        command(
            libc::SYS_seccomp,
            [libc::SECCOMP_SET_MODE_FILTER.into(), libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW, at, 0, 0, 0],
        ),
    ]
}

/// Stops of children are not announced by SIGCHLD: each would wake a thread of the process that does not block it.
fn silence_stops() -> io::Result<()> {
    // SAFETY: reads and writes one signal's action, whose handler stays what it is.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        if libc::sigaction(libc::SIGCHLD, std::ptr::null(), &mut action) != 0 {
            return Err(io::Error::last_os_error());
        }
        if action.sa_flags & libc::SA_NOCLDSTOP == 0 {
            action.sa_flags |= libc::SA_NOCLDSTOP;
            if libc::sigaction(libc::SIGCHLD, &action, std::ptr::null_mut()) != 0 {
                return Err(io::Error::last_os_error());
            }
        }
    }
    Ok(())
}

impl Process {
    /// Addresses at which nothing can be mapped, because the stub and its commands lie there.
    pub const RESERVED: Range<u64> = STUB..COMMANDS + SHARED as u64;

    /// Makes a process with nothing mapped, traced by the calling thread. `blocks` are the files of the guest's memory.
    ///
    /// # Errors
    /// Where ptrace is refused, or something else that it needs (Linux 5.13). Nothing is left behind.
    pub fn spawn(blocks: &[BorrowedFd<'_>], tsc: Tsc) -> io::Result<Self> {
        silence_stops()?;
        let shared = Shared::new()?;
        let commands = first_commands(&shared);
        shared.write(&commands);
        let fds: Vec<i32> = blocks.iter().map(AsRawFd::as_raw_fd).collect();
        let first_fd = fds.iter().max().map_or(0, |fd| fd + 1);
        let plan = Plan {
            blocks: &fds,
            first_fd,
            tsc_faults: tsc == Tsc::Faults,
            parent: std::process::id() as i32,
            shared: shared.0.as_ptr(),
            commands: commands.len() as u64,
            talk: shared.talk(),
        };
        let (mut pidfd, mut all, mut before) = (-1i32, u64::MAX, 0u64);
        let mask = |to: &mut u64, old: &mut u64| {
            let arguments =
                [libc::SIG_SETMASK as u64, &raw mut *to as u64, &raw mut *old as u64, size_of::<u64>() as u64, 0, 0];
            // SAFETY: both are sets of the kernel's size.
            unsafe { sys::call(libc::SYS_rt_sigprocmask, arguments) }
        };
        // No handler of this process may run in the child.
        mask(&mut all, &mut before)?;
        // SAFETY: a copy of this process that goes its own way at once, on a copy of this stack. Its end sends no signal.
        let forked = unsafe {
            let pid = sys::raw(libc::SYS_clone, [libc::CLONE_PIDFD as u64, 0, &raw mut pidfd as u64, 0, 0, 0]);
            if pid == 0 {
                child::enter(&plan)
            }
            pid
        };
        mask(&mut before, &mut all)?;
        if forked < 0 {
            return Err(io::Error::from_raw_os_error(-forked as i32));
        }
        // SAFETY: the kernel has just given it to us.
        let pidfd = Arc::new(unsafe { OwnedFd::from_raw_fd(pidfd) });
        let mut process = Self {
            pid: forked as i32,
            pidfd,
            shared,
            first_fd: first_fd as u64,
            blocks: blocks.len(),
            interrupted: false,
            ended: false,
            cpuid_faults: false,
            processor: ANYWHERE,
            length: 0,
            xstate: Box::default(),
            thread: PhantomData,
        };
        match process.set_up() {
            Ok(()) => Ok(process),
            Err(error) => {
                let talk = process.shared.talk();
                // SAFETY: in the mapping; any bits are numbers.
                let [step, code] = unsafe { (&raw const (*talk).failed).read_volatile() };
                Err(match STEPS.get(step as usize) {
                    Some(step) if code != 0 => {
                        let cause = io::Error::from_raw_os_error(code as i32);
                        io::Error::new(cause.kind(), format!("process for direct execution: {step}: {cause}"))
                    }
                    _ => io::Error::new(error.kind(), format!("process for direct execution: {error}")),
                })
            }
        }
    }

    /// The parent's side of the child's way into the stub.
    fn set_up(&mut self) -> io::Result<()> {
        while self.wait()? != libc::SIGSTOP {
            sys::ptrace_number(libc::PTRACE_CONT, self.pid, 0)?;
        }
        let options = libc::PTRACE_O_EXITKILL | libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_TRACESECCOMP;
        sys::ptrace_number(libc::PTRACE_SETOPTIONS, self.pid, options as u64)?;
        // `struct ptrace_rseq_configuration`: pointer, size and signature, flags.
        let mut rseq = [0u64; 3];
        // SAFETY: the structure has 24 bytes.
        unsafe { sys::ptrace(PTRACE_GET_RSEQ_CONFIGURATION, self.pid, 24, &raw mut rseq) }?;
        let rseq = [rseq[0], rseq[1] & 0xffff_ffff, rseq[1] >> 32];
        let talk = self.shared.talk();
        // SAFETY: in the mapping.
        unsafe { (&raw mut (*talk).rseq).write_volatile(rseq) };
        self.finish_stub()?;
        // SAFETY: in the mapping; any bits are a number. No guest code has run.
        self.cpuid_faults = unsafe { (&raw const (*talk).cpuid_faults).read_volatile() } == 1;
        self.shared.clear(BATCH);
        // How large the kernel wants the vector state: more than any processor's.
        let mut state = vec![0u8; 64 << 10];
        let len = self.regset(libc::PTRACE_GETREGSET, &mut state)?;
        state.truncate(len);
        self.xstate = state.into_boxed_slice();
        Ok(())
    }

    /// CPUID raises [`Stop::Fault`]; otherwise guest code sees the host's.
    pub fn cpuid_faults(&self) -> bool {
        self.cpuid_faults
    }

    /// Number of the process.
    pub fn id(&self) -> u32 {
        self.pid as u32
    }

    /// Ends runs from other threads.
    pub fn interrupter(&self) -> Interrupter {
        Interrupter(self.pidfd.clone())
    }

    /// Changes the process's memory, in this order.
    ///
    /// # Errors
    /// `InvalidInput` for a change that is not allowed: nothing is done. What the host refuses, above all ENOMEM for too
    /// many pieces (vm.max_map_count): what came before it is done, and nothing behind it. Anything else when the process
    /// is gone.
    pub fn apply(&mut self, ops: &[MapOp]) -> io::Result<()> {
        let mut commands = Vec::with_capacity(ops.len() + 1);
        for op in ops {
            match *op {
                MapOp::Map { at, len, block, offset, prot } => {
                    let range = user_range(at, len)?;
                    if block >= self.blocks || offset % PAGE_SIZE != 0 || offset.checked_add(len).is_none() {
                        return Err(invalid());
                    }
                    let len = range.end - range.start;
                    let fd = self.first_fd + block as u64;
                    commands.push(command(libc::SYS_mmap, [at, len, prot.bits(), MAP_FLAGS, fd, offset]));
                }
                MapOp::Unmap { at, len } => commands.push(unmap(user_range(at, len)?)),
                MapOp::UnmapAll => {
                    commands.push(unmap(0..Self::RESERVED.start));
                    commands.push(unmap(Self::RESERVED.end..USER_END));
                }
            }
        }
        commands.chunks(BATCH).try_for_each(|batch| self.execute(batch))
    }

    /// Has the stub make these calls.
    fn execute(&mut self, commands: &[Command]) -> io::Result<()> {
        self.check_alive()?;
        self.shared.write(commands);
        let mut regs = user_regs();
        regs.rip = STUB;
        regs.rbx = COMMANDS;
        regs.r12 = commands.len() as u64;
        self.set_regs(&mut regs)?;
        let done = self.finish_stub();
        // They tell physical addresses of the guest, and guest code can read them.
        self.shared.clear(commands.len());
        done
    }

    /// Lets the stub run to its end.
    fn finish_stub(&mut self) -> io::Result<()> {
        loop {
            self.resume(libc::PTRACE_CONT)?;
            match self.wait()? {
                STUB_STOP => break,
                INTERRUPT => self.interrupted = true,
                signal => {
                    if self.fault(signal)?.is_some() {
                        break;
                    }
                }
            }
        }
        let regs = self.regs()?;
        // Behind its SYSCALL, or behind the INT3 that follows.
        let end = STUB + child::stub().len() as u64;
        if !(end - 1..=end).contains(&regs.rip) {
            return Err(io::Error::other(format!("the stub has stopped at {:#x}", regs.rip)));
        }
        match regs.r12 {
            0 => Ok(()),
            _ => Err(io::Error::from_raw_os_error((regs.r13 as i64).unsigned_abs() as i32)),
        }
    }

    /// Executes guest code with these registers until something stops it, and gives back the registers. `orig_rax` is
    /// not looked at. The selectors must be those of a 64-bit process of Linux ([`user_regs`]); the bases of FS and GS and RIP
    /// must lie in the lower half. NT and ID in RFLAGS cannot be set from outside: they stay what guest code has made them.
    ///
    /// # Errors
    /// `InvalidInput` when the host does not take the registers: nothing has been executed. Anything else when the process
    /// is gone.
    pub fn run(&mut self, regs: &mut libc::user_regs_struct) -> io::Result<Stop> {
        self.check_alive()?;
        if std::mem::take(&mut self.interrupted) {
            return Ok(Stop::Interrupted);
        }
        self.set_regs(regs)?;
        let begun = host_tsc();
        let stop = loop {
            self.resume(libc::PTRACE_SYSEMU)?;
            match self.wait()? {
                SYSCALL_STOP => break Stop::Syscall,
                INTERRUPT => break Stop::Interrupted,
                // A signal from outside (or SIGSTOP) is not delivered: the process knows none.
                signal => {
                    if let Some(fault) = self.fault(signal)? {
                        break fault;
                    }
                }
            }
        };
        let length = host_tsc().saturating_sub(begun).min(4 * LONG);
        self.length = self.length - self.length / 4 + length / 4;
        *regs = self.regs()?;
        Ok(stop)
    }

    /// Is this stop an instruction's own doing?
    fn fault(&self, signal: i32) -> io::Result<Option<Stop>> {
        if !matches!(signal, libc::SIGSEGV | libc::SIGBUS | libc::SIGFPE | libc::SIGILL | libc::SIGTRAP | libc::SIGSYS)
        {
            return Ok(None);
        }
        // SAFETY: the structure is the kernel's; all of its fields are numbers.
        let info = unsafe {
            let mut info: libc::siginfo_t = std::mem::zeroed();
            sys::ptrace(libc::PTRACE_GETSIGINFO, self.pid, 0, &raw mut info)?;
            info
        };
        // Others than the kernel cannot give a positive code.
        if info.si_code <= 0 {
            return Ok(None);
        }
        // SAFETY: for each of these signals the kernel stores an address there.
        let address = unsafe { info.si_addr() } as u64;
        Ok(Some(Stop::Fault { signal, code: info.si_code, address }))
    }

    /// Loads the vector and x87 state: an XSAVE area in the standard format, as far as it goes. What is beyond it, or not in
    /// its `XSTATE_BV`, becomes initial.
    ///
    /// # Errors
    /// `InvalidInput` for a header or an MXCSR that the host does not take.
    pub fn set_xstate(&mut self, area: &[u8]) -> io::Result<()> {
        self.check_alive()?;
        let mut state = std::mem::take(&mut self.xstate);
        let len = area.len().min(state.len());
        state[..len].copy_from_slice(&area[..len]);
        state[len..].fill(0);
        let done = self.regset(libc::PTRACE_SETREGSET, &mut state);
        self.xstate = state;
        done.map(drop)
    }

    /// The vector and x87 state, in the standard format, as far as there is room. Components that `XSTATE_BV` does not
    /// name hold their initial values.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn get_xstate(&mut self, area: &mut [u8]) -> io::Result<()> {
        self.check_alive()?;
        let len = self.regset(libc::PTRACE_GETREGSET, area)?;
        area[len..].fill(0);
        if let Some(software) = area.get_mut(SOFTWARE) {
            software.fill(0);
        }
        Ok(())
    }

    fn regset(&self, request: libc::c_uint, area: &mut [u8]) -> io::Result<usize> {
        let mut vector = libc::iovec { iov_base: area.as_mut_ptr().cast(), iov_len: area.len() };
        // SAFETY: the vector says where and how long the area is.
        unsafe { sys::ptrace(request, self.pid, NT_X86_XSTATE, &raw mut vector) }.map_err(gone_or_invalid)?;
        Ok(vector.iov_len)
    }

    fn regs(&self) -> io::Result<libc::user_regs_struct> {
        // SAFETY: the structure is what the request fills, and consists of numbers.
        unsafe {
            let mut regs: libc::user_regs_struct = std::mem::zeroed();
            sys::ptrace(libc::PTRACE_GETREGS, self.pid, 0, &raw mut regs)?;
            Ok(regs)
        }
    }

    fn set_regs(&mut self, regs: &mut libc::user_regs_struct) -> io::Result<()> {
        // No system call is to be started again.
        regs.orig_rax = u64::MAX;
        // SAFETY: the structure is what the request reads.
        unsafe { sys::ptrace(libc::PTRACE_SETREGS, self.pid, 0, &raw mut *regs) }.map(drop).map_err(gone_or_invalid)
    }

    /// Are runs short, so that it pays to hold the calling thread ([`Hold`])?
    pub fn is_brief(&self) -> bool {
        self.length < LONG
    }

    /// Binds the process to the processor of the calling thread while runs are short. The two take turns; on two processors
    /// each turn would wake an idle one (measured: 20 to 100 us a round trip instead of 8). When the scheduler moves the
    /// thread, the process follows at its next turn. While runs are long the scheduler is to place the process where it
    /// likes: two bound to one processor would stay there, because their threads hardly run.
    fn follow(&mut self) {
        let here = if self.is_brief() { current_processor() } else { ANYWHERE };
        if here == self.processor {
            return;
        }
        self.processor = here;
        // What is refused costs time only.
        let set = match usize::try_from(here) {
            Ok(here) => Some(only(here)),
            // Wherever the thread may be.
            Err(_) => affinity(0).ok(),
        };
        if let Some(set) = set {
            let _ = set_affinity(self.pid, &set);
        }
    }

    fn resume(&mut self, request: libc::c_uint) -> io::Result<()> {
        self.follow();
        match sys::ptrace_number(request, self.pid, 0) {
            // It is not stopped any more: it has been killed, which the wait finds.
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            result => result,
        }
    }

    /// Waits for the next stop; gives its signal, and above it the event.
    fn wait(&mut self) -> io::Result<i32> {
        loop {
            let mut status = 0i32;
            let arguments = [self.pid as u64, &raw mut status as u64, libc::__WALL as u64, 0, 0, 0];
            // SAFETY: the status is written there.
            match unsafe { sys::call(libc::SYS_wait4, arguments) } {
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                Err(error) => return Err(error),
                Ok(_) if libc::WIFSTOPPED(status) => return Ok(status >> 8),
                Ok(_) => {
                    self.ended = true;
                    let how = match libc::WIFSIGNALED(status) {
                        true => format!("signal {}", libc::WTERMSIG(status)),
                        false => format!("exit code {}", libc::WEXITSTATUS(status)),
                    };
                    return Err(io::Error::new(io::ErrorKind::BrokenPipe, format!("it has ended by itself ({how})")));
                }
            }
        }
    }

    fn check_alive(&self) -> io::Result<()> {
        match self.ended {
            true => Err(io::Error::new(io::ErrorKind::BrokenPipe, "the process for direct execution has ended")),
            false => Ok(()),
        }
    }
}

/// Holds the calling thread on the processor that it is on, until it is dropped. When the process stops, the scheduler would wake the
/// thread on an idle processor, and the process would have to follow: 20 to 28 us a round trip instead of 8 to 10 (measured).
pub struct Hold {
    before: libc::cpu_set_t,
    held: libc::cpu_set_t,
}

impl Hold {
    /// `None`: there is no choice, or the host refuses (which costs time only).
    pub fn here() -> Option<Self> {
        let before = affinity(0).ok()?;
        // SAFETY: counts bits.
        if unsafe { libc::CPU_COUNT(&before) } < 2 {
            return None;
        }
        let held = only(usize::try_from(current_processor()).ok()?);
        set_affinity(0, &held).ok()?;
        Some(Self { before, held })
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        // Somebody else may have moved the thread meanwhile, for good.
        // SAFETY: compares bits.
        if affinity(0).is_ok_and(|now| unsafe { libc::CPU_EQUAL(&now, &self.held) }) {
            let _ = set_affinity(0, &self.before);
        }
    }
}

/// The processor of the calling thread.
fn current_processor() -> i32 {
    // SAFETY: asks for a number.
    unsafe { libc::sched_getcpu() }
}

/// This processor and no other one. (Beyond the structure's 1024: none, which the host refuses.)
fn only(processor: usize) -> libc::cpu_set_t {
    // SAFETY: a structure of bits; `CPU_SET` checks its bounds.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(processor, &mut set);
        set
    }
}

/// The processors on which a thread may be (0: the calling one).
fn affinity(thread: i32) -> io::Result<libc::cpu_set_t> {
    // SAFETY: the call writes at most the structure's size, and any bits are a set.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        let arguments = [thread as u64, size_of_val(&set) as u64, &raw mut set as u64, 0, 0, 0];
        sys::call(libc::SYS_sched_getaffinity, arguments)?;
        Ok(set)
    }
}

/// Says on which processors a thread may be.
fn set_affinity(thread: i32, set: &libc::cpu_set_t) -> io::Result<()> {
    let arguments = [thread as u64, size_of_val(set) as u64, std::ptr::from_ref(set) as u64, 0, 0, 0];
    // SAFETY: the call reads the structure.
    unsafe { sys::call(libc::SYS_sched_setaffinity, arguments) }.map(drop)
}

impl Drop for Process {
    fn drop(&mut self) {
        if !self.ended && send(&self.pidfd, libc::SIGKILL).is_ok() {
            // Stops that were under way are reported before the end.
            while !self.ended && self.wait().is_ok() {}
        }
    }
}

/// The host takes these registers from no tracer (EIO, EINVAL), or the process is gone (ESRCH).
fn gone_or_invalid(error: io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(libc::EIO | libc::EINVAL | libc::EFAULT) => io::Error::new(io::ErrorKind::InvalidInput, error),
        _ => error,
    }
}

fn invalid() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, "not a piece of user memory that can be mapped")
}

/// Checks that whole pages are named that may be mapped.
fn user_range(at: u64, len: u64) -> io::Result<Range<u64>> {
    let end = at.checked_add(len).ok_or_else(invalid)?;
    let reserved = Process::RESERVED;
    let clear = end <= reserved.start || at >= reserved.end;
    let inside = at >= USER_START && end <= USER_END && len > 0;
    if (at | len) % PAGE_SIZE != 0 || !inside || !clear {
        return Err(invalid());
    }
    Ok(at..end)
}

/// Registers of a 64-bit program, all zero but for the selectors and the bits of RFLAGS that are always set.
pub fn user_regs() -> libc::user_regs_struct {
    // SAFETY: a structure of numbers.
    let mut regs: libc::user_regs_struct = unsafe { std::mem::zeroed() };
    // `__USER_CS` and `__USER_DS` (asm/segment.h).
    (regs.cs, regs.ss) = (0x33, 0x2b);
    regs.eflags = 0x202;
    regs
}
