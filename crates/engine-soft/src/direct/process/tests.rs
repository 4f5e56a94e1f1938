use super::*;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// Where tests put code and data: pages 0 to 15 of the file.
const CODE: u64 = 0x40_0000;
const DATA: u64 = 0x7fff_0000_0000;

/// A file of guest memory, mapped here too.
struct Memory {
    fd: OwnedFd,
    here: *mut u8,
}

const PAGES: usize = 256;

impl Memory {
    fn new() -> Self {
        // SAFETY: a new descriptor, and new memory of the file's size.
        unsafe {
            let fd = OwnedFd::from_raw_fd(libc::memfd_create(c"test-guest".as_ptr(), libc::MFD_CLOEXEC));
            assert_eq!(libc::ftruncate(fd.as_raw_fd(), (PAGES * 4096) as i64), 0);
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            let here = libc::mmap(std::ptr::null_mut(), PAGES * 4096, prot, libc::MAP_SHARED, fd.as_raw_fd(), 0);
            assert_ne!(here, libc::MAP_FAILED);
            Self { fd, here: here.cast() }
        }
    }

    fn write(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= PAGES * 4096);
        // SAFETY: inside the mapping.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.here.add(at), bytes.len()) }
    }

    fn read(&self, at: usize) -> u64 {
        assert!(at + 8 <= PAGES * 4096);
        // SAFETY: inside the mapping.
        unsafe { self.here.add(at).cast::<u64>().read_unaligned() }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`.
        unsafe { libc::munmap(self.here.cast(), PAGES * 4096) };
    }
}

/// Whether this host lets no child be traced (a container's filter, Yama's highest level), which is said. A child that can be
/// traced is enough: what else goes wrong is a failure.
fn left_out() -> bool {
    // SAFETY: the child calls nothing but these two, which a process forked from one with threads may; the status is
    // written there.
    let status = unsafe {
        let pid = libc::fork();
        if pid == 0 {
            let refused = libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) != 0;
            libc::_exit(if refused { *libc::__errno_location() } else { 0 });
        }
        let mut status = 0;
        if libc::waitpid(pid, &raw mut status, 0) == pid { status } else { 0 }
    };
    let refused = libc::WIFEXITED(status) && libc::WEXITSTATUS(status) != 0;
    if refused {
        let error = io::Error::from_raw_os_error(libc::WEXITSTATUS(status));
        println!("left out: this host lets no child be traced (PTRACE_TRACEME: {error})");
    }
    refused
}

fn map(at: u64, page: u64, pages: u64, prot: Prot) -> MapOp {
    MapOp::Map { at, len: pages * 4096, block: 0, offset: page * 4096, prot }
}

/// A process with page 0 as code and page 1 as data.
fn process() -> (Memory, Process) {
    process_with(Tsc::Host)
}

fn process_with(tsc: Tsc) -> (Memory, Process) {
    let memory = Memory::new();
    let mut process = Process::spawn(&[memory.fd.as_fd()], tsc).unwrap();
    process.apply(&[map(CODE, 0, 1, Prot::ReadExecute), map(DATA, 1, 1, Prot::ReadWrite)]).unwrap();
    (memory, process)
}

fn at(rip: u64) -> libc::user_regs_struct {
    libc::user_regs_struct { rip, rsp: DATA + 0x800, ..user_regs() }
}

/// Runs this code from its start.
fn run(memory: &Memory, process: &mut Process, code: &[u8]) -> (Stop, libc::user_regs_struct) {
    memory.write(0, code);
    let mut regs = at(CODE);
    let stop = process.run(&mut regs).unwrap();
    (stop, regs)
}

fn signal(stop: Stop) -> (i32, u64) {
    match stop {
        Stop::Fault { signal, address, .. } => (signal, address),
        other => panic!("{other:?}"),
    }
}

fn kill(pid: i32, signal: i32) {
    // SAFETY: uses no memory; the process is this test's.
    assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
}

#[test]
fn registers_go_in_and_out() {
    if left_out() {
        return;
    }
    let (memory, mut process) = process();
    // lea rax,[rax+rbx]; mov [rdi],rax; lea r15,[r8+r9]; rdfsbase rcx; wrgsbase r9; std; int3
    let code = b"\x48\x8d\x04\x18\x48\x89\x07\x4f\x8d\x3c\x08\xf3\x48\x0f\xae\xc1\xf3\x49\x0f\xae\xd9\xfd\xcc";
    memory.write(0, code);
    for i in 0..100u64 {
        let mut regs = at(CODE);
        (regs.rax, regs.rbx, regs.rdi, regs.r8, regs.r9) = (i, 1000, DATA + 8 * i, i << 40, 5 * i);
        regs.fs_base = 0x1234_5678 + i;
        let stop = process.run(&mut regs).unwrap();
        assert_eq!(signal(stop).0, libc::SIGTRAP);
        assert_eq!(regs.rip, CODE + code.len() as u64);
        assert_eq!((regs.rax, regs.r15, regs.rcx), (i + 1000, (i << 40) + 5 * i, 0x1234_5678 + i));
        assert_eq!((regs.gs_base, regs.eflags & 0x400), (5 * i, 0x400));
        assert_eq!(memory.read(4096 + 8 * i as usize), i + 1000);
    }
    // What no tracer may load harms nothing.
    let mut regs = at(CODE);
    regs.fs_base = 1 << 63;
    assert_eq!(process.run(&mut regs).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    assert_eq!(signal(run(&memory, &mut process, code).0).0, libc::SIGSEGV);
}

#[test]
fn vector_state_goes_in_and_out() {
    if left_out() {
        return;
    }
    if !std::is_x86_feature_detected!("avx2") {
        return;
    }
    let (memory, mut process) = process();
    let mut area = vec![0u8; x86::xsave::AREA_SIZE];
    process.get_xstate(&mut area).unwrap();
    area[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
    for i in 0..16 {
        area[160 + i] = i as u8;
        area[576 + i] = 0x40 + i as u8;
    }
    area[512..520].copy_from_slice(&7u64.to_le_bytes());
    process.set_xstate(&area).unwrap();
    // vpaddb ymm1,ymm0,ymm0; fld1; int3
    let (stop, _) = run(&memory, &mut process, b"\xc5\xfd\xfc\xc8\xd9\xe8\xcc");
    assert_eq!(signal(stop).0, libc::SIGTRAP);
    let mut after = vec![0xffu8; x86::xsave::AREA_SIZE];
    process.get_xstate(&mut after).unwrap();
    let twice = |at: usize| area[at..at + 16].iter().map(|b| b * 2).collect::<Vec<_>>();
    assert_eq!(after[176..192], twice(160)[..]);
    assert_eq!(after[592..608], twice(576)[..]);
    assert_eq!(after[512] & 7, 7);
    assert_eq!(after[32..42], [0, 0, 0, 0, 0, 0, 0, 0x80, 0xff, 0x3f]);
    assert!(after[SOFTWARE].iter().all(|b| *b == 0));
    // Changing memory does not touch it.
    process.apply(&[map(DATA + 4096, 3, 1, Prot::Read)]).unwrap();
    let mut again = vec![0xffu8; x86::xsave::AREA_SIZE];
    process.get_xstate(&mut again).unwrap();
    assert!(after == again);
    // Reserved bits of MXCSR.
    area[24..28].fill(0xff);
    assert_eq!(process.set_xstate(&area).unwrap_err().kind(), io::ErrorKind::InvalidInput);
}

#[test]
fn every_way_into_the_kernel_stops() {
    if left_out() {
        return;
    }
    let (memory, mut process) = process();
    // syscall, with the number of exit_group: it is not executed.
    memory.write(0, b"\x0f\x05");
    let mut regs = at(CODE);
    (regs.rax, regs.rdi) = (libc::SYS_exit_group as u64, 5);
    assert_eq!(process.run(&mut regs).unwrap(), Stop::Syscall);
    assert_eq!((regs.rip, regs.rcx, regs.orig_rax), (CODE + 2, CODE + 2, libc::SYS_exit_group as u64));
    // Nor is it when the stub works next.
    process.apply(&[map(DATA + 4096, 2, 1, Prot::Read)]).unwrap();
    // int 0x80: exit.
    memory.write(0, b"\xcd\x80");
    let mut regs = at(CODE);
    regs.rax = 1;
    assert_eq!(process.run(&mut regs).unwrap(), Stop::Syscall);
    assert_eq!(regs.rip, CODE + 2);
    // Two in a row, without touching the registers between them but RAX: nothing is started again.
    memory.write(0, b"\x0f\x05\x0f\x05\xcc");
    let mut regs = at(CODE);
    for rip in [2, 4] {
        assert_eq!(process.run(&mut regs).unwrap(), Stop::Syscall);
        assert_eq!(regs.rip, CODE + rip);
        regs.rax = (-512i64) as u64;
    }
    assert_eq!(signal(process.run(&mut regs).unwrap()).0, libc::SIGTRAP);
    assert_eq!(regs.rax, (-512i64) as u64);
    for (code, expected, ip) in [
        (&b"\x90\xcc"[..], libc::SIGTRAP, 2),
        (b"\x90\x0f\x0b", libc::SIGILL, 1),
        (b"\xf4", libc::SIGSEGV, 0),
        (b"\xfa", libc::SIGSEGV, 0),
        (b"\xe4\x60", libc::SIGSEGV, 0),
        (b"\x0f\x32", libc::SIGSEGV, 0),
        (b"\xcd\x21", libc::SIGSEGV, 0),
        (b"\x31\xc9\xf7\xf1", libc::SIGFPE, 2),
        (b"\x0f\x06", libc::SIGSEGV, 0),
    ] {
        let (stop, regs) = run(&memory, &mut process, code);
        assert_eq!((signal(stop).0, regs.rip - CODE), (expected, ip), "{code:x?}");
    }
    // A single step: pushfq; or dword [rsp],0x100; popfq; nop; nop. The flag does not outlive the run.
    let (stop, regs) = run(&memory, &mut process, b"\x9c\x81\x0c\x24\x00\x01\x00\x00\x9d\x90\x90\xcc");
    assert_eq!((signal(stop).0, regs.rip - CODE), (libc::SIGTRAP, 10));
    let (stop, regs) = run(&memory, &mut process, b"\x90\x90\xcc");
    assert_eq!((signal(stop).0, regs.rip - CODE), (libc::SIGTRAP, 3));
    // cpuid
    if process.cpuid_faults() {
        assert_eq!(signal(run(&memory, &mut process, b"\x0f\xa2").0).0, libc::SIGSEGV);
    }
}

#[test]
fn the_time_stamp_counter_faults_if_asked() {
    if left_out() {
        return;
    }
    for tsc in [Tsc::Faults, Tsc::Host] {
        let (memory, mut process) = process_with(tsc);
        for code in [&b"\x0f\x31\xcc"[..], b"\x0f\x01\xf9\xcc"] {
            let expected = if tsc == Tsc::Faults { (libc::SIGSEGV, 0) } else { (libc::SIGTRAP, code.len() as u64) };
            let (stop, regs) = run(&memory, &mut process, code);
            assert_eq!((signal(stop).0, regs.rip - CODE), expected);
        }
    }
}

#[test]
fn faults_say_where() {
    if left_out() {
        return;
    }
    let (memory, mut process) = process();
    // mov rax,[rbx]; int3 and mov [rbx],rax; int3
    let (load, store) = (b"\x48\x8b\x03\xcc", b"\x48\x89\x03\xcc");
    let mut access = |code: &[u8], address: u64| {
        memory.write(0, code);
        let mut regs = at(CODE);
        regs.rbx = address;
        let stop = process.run(&mut regs).unwrap();
        (stop, regs.rip)
    };
    let unmapped = Stop::Fault { signal: libc::SIGSEGV, code: 1, address: DATA + 4096 };
    assert_eq!(access(load, DATA + 4096), (unmapped, CODE));
    let read_only = Stop::Fault { signal: libc::SIGSEGV, code: 2, address: CODE + 8 };
    assert_eq!(access(store, CODE + 8), (read_only, CODE));
    // Not canonical: no address.
    assert_eq!(signal(access(load, 1 << 63).0), (libc::SIGSEGV, 0));
    assert_eq!(signal(access(load, DATA).0).0, libc::SIGTRAP);
    // Neither the stub nor the commands can be written.
    for address in [STUB, COMMANDS, Process::RESERVED.end - 8] {
        assert_eq!(signal(access(store, address).0), (libc::SIGSEGV, address));
    }
    // Data is not executed.
    let mut regs = at(DATA);
    assert_eq!(signal(process.run(&mut regs).unwrap()), (libc::SIGSEGV, DATA));
}

#[test]
fn the_stub_and_the_vsyscall_page_help_nobody() {
    if left_out() {
        return;
    }
    let (memory, mut process) = process();
    // A command that would map the code writable, where the stub looks for its commands.
    let mut bytes = Vec::new();
    for word in [libc::SYS_mprotect as u64, CODE, 4096, 7, 0, 0, 0] {
        bytes.extend(word.to_le_bytes());
    }
    memory.write(4096, &bytes);
    let mut regs = at(STUB);
    (regs.rbx, regs.r12) = (DATA, 1);
    assert_eq!(process.run(&mut regs).unwrap(), Stop::Syscall);
    assert!(Process::RESERVED.contains(&regs.rip));
    let code = b"\x48\x89\x03\xcc";
    memory.write(0, code);
    let mut regs = at(CODE);
    regs.rbx = CODE;
    assert_eq!(signal(process.run(&mut regs).unwrap()), (libc::SIGSEGV, CODE));
    // gettimeofday of the vsyscall page: RDI says where to.
    memory.write(4096 + 0x7f8, &(CODE + 0x100).to_le_bytes());
    memory.write(4096, &[0; 16]);
    let mut regs = at(0xffff_ffff_ff60_0000);
    (regs.rsp, regs.rdi) = (DATA + 0x7f8, DATA);
    let (number, address) = signal(process.run(&mut regs).unwrap());
    assert_eq!(address, 0xffff_ffff_ff60_0000);
    if number == libc::SIGSYS {
        assert_eq!((regs.rip, regs.rsp), (CODE + 0x100, DATA + 0x800));
    }
    assert_eq!(memory.read(4096), 0);
}

#[test]
fn the_filter_holds() {
    if left_out() {
        return;
    }
    // Guest code with PTRACE_CONT: what would happen if the tracer were not there to forbid it.
    let (memory, mut process) = process();
    let mut natively = |call: &[u64]| {
        memory.write(0, b"\x0f\x05\xcc");
        let mut regs = at(CODE);
        regs.rax = call[0];
        let arguments = [&mut regs.rdi, &mut regs.rsi, &mut regs.rdx, &mut regs.r10, &mut regs.r8, &mut regs.r9];
        for (register, value) in arguments.into_iter().zip(&call[1..]) {
            *register = *value;
        }
        process.set_regs(&mut regs).unwrap();
        process.resume(libc::PTRACE_CONT).unwrap();
        let stopped = process.wait().unwrap();
        (stopped, process.regs().unwrap().rax as i64)
    };
    for call in [
        libc::SYS_getppid,
        libc::SYS_exit_group,
        libc::SYS_read,
        libc::SYS_mprotect,
        libc::SYS_execve,
        libc::SYS_mmap | 0x4000_0000,
    ] {
        assert_eq!(natively(&[call as u64]).0, libc::SIGSYS, "{call}");
    }
    let anonymous = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
    assert_eq!(natively(&[libc::SYS_mmap as u64, 0, 4096, 3, anonymous, u64::MAX, 0]).0, libc::SIGSYS);
    assert_eq!(natively(&[libc::SYS_munmap as u64, DATA, 4096]), (libc::SIGTRAP, 0));
}

#[test]
fn interrupts_end_an_endless_loop_and_are_not_lost() {
    if left_out() {
        return;
    }
    let (memory, mut process) = process();
    memory.write(0, b"\xff\xc0\xeb\xfc");
    let interrupter = process.interrupter();
    // Before.
    interrupter.interrupt();
    let mut regs = at(CODE);
    assert_eq!(process.run(&mut regs).unwrap(), Stop::Interrupted);
    // Before a change of memory, which it does not disturb.
    interrupter.interrupt();
    process.apply(&[map(DATA + 4096, 2, 1, Prot::Read)]).unwrap();
    let mut regs = at(CODE);
    assert_eq!(process.run(&mut regs).unwrap(), Stop::Interrupted);
    assert_eq!(regs.rip, CODE);
    // From another thread, at any moment.
    let rounds = 200;
    let (sender, receiver) = std::sync::mpsc::channel::<()>();
    let other = std::thread::spawn(move || {
        for i in 0..rounds {
            receiver.recv().unwrap();
            for _ in 0..(i % 20) * 100 {
                std::hint::spin_loop();
            }
            interrupter.interrupt();
        }
    });
    for i in 0..rounds {
        sender.send(()).unwrap();
        let mut regs = at(CODE);
        assert_eq!(process.run(&mut regs).unwrap(), Stop::Interrupted, "{i}");
        assert!((CODE..CODE + 4).contains(&regs.rip));
    }
    other.join().unwrap();
}

#[test]
fn signals_from_outside_are_swallowed() {
    if left_out() {
        return;
    }
    let (memory, mut process) = process();
    memory.write(0, b"\xff\xc0\xeb\xfc");
    let (interrupter, pid) = (process.interrupter(), process.pid);
    let other = std::thread::spawn(move || {
        for signal in [libc::SIGTERM, libc::SIGSTOP, libc::SIGCONT, libc::SIGSEGV, libc::SIGTRAP, libc::SIGTSTP] {
            std::thread::sleep(Duration::from_millis(2));
            kill(pid, signal);
        }
        std::thread::sleep(Duration::from_millis(5));
        interrupter.interrupt();
    });
    let mut regs = at(CODE);
    assert_eq!(process.run(&mut regs).unwrap(), Stop::Interrupted);
    assert!(regs.rax > 1000);
    other.join().unwrap();
}

#[test]
fn memory_is_mapped_and_unmapped() {
    if left_out() {
        return;
    }
    let (memory, mut process) = process();
    // add rbx,[rdi] over pages; the pages of the file hold their numbers.
    for page in 2..PAGES {
        memory.write(page * 4096, &(page as u64).to_le_bytes());
    }
    // 1: add rax,[rdi]; add rdi,4096; dec rcx; jnz 1b; int3
    let code = b"\x48\x03\x07\x48\x81\xc7\x00\x10\x00\x00\x48\xff\xc9\x75\xf1\xcc";
    memory.write(0, code);
    // More than a batch, and in reverse order.
    let ops: Vec<_> = (0..200).map(|i| map(DATA + 0x10000 + i * 4096, 201 - i, 1, Prot::Read)).collect();
    process.apply(&ops).unwrap();
    let sum = |process: &mut Process, pages: u64| {
        let mut regs = at(CODE);
        (regs.rdi, regs.rcx) = (DATA + 0x10000, pages);
        let stop = process.run(&mut regs).unwrap();
        (signal(stop), regs.rax)
    };
    assert_eq!(sum(&mut process, 200), ((libc::SIGTRAP, 0), (2..=201).sum()));
    assert_eq!(sum(&mut process, 201).0, (libc::SIGSEGV, DATA + 0x10000 + 200 * 4096));
    process.apply(&[MapOp::Unmap { at: DATA + 0x10000 + 4096, len: 4096 }]).unwrap();
    assert_eq!(sum(&mut process, 201).0, (libc::SIGSEGV, DATA + 0x10000 + 4096));
    process.apply(&[MapOp::UnmapAll]).unwrap();
    assert_eq!(sum(&mut process, 1).0, (libc::SIGSEGV, CODE));
    // Many pages in one piece, and again.
    process.apply(&[map(CODE, 0, 1, Prot::ReadExecute), map(DATA + 0x10000, 2, 100, Prot::ReadWrite)]).unwrap();
    assert_eq!(sum(&mut process, 100), ((libc::SIGTRAP, 0), (2..=101).sum()));
}

#[test]
fn bad_changes_are_refused() {
    if left_out() {
        return;
    }
    let (_memory, mut process) = process();
    let reserved = Process::RESERVED;
    for op in [
        map(0, 0, 1, Prot::Read),
        map(0xf000, 0, 1, Prot::Read),
        map(CODE + 1, 0, 1, Prot::Read),
        map(CODE, 0, 0, Prot::Read),
        map(USER_END, 0, 1, Prot::Read),
        map(1 << 63, 0, 1, Prot::Read),
        map(u64::MAX - 4095, 0, 1, Prot::Read),
        map(reserved.start, 0, 1, Prot::Read),
        map(reserved.end - 4096, 0, 1, Prot::Read),
        map(reserved.start - 4096, 0, 2, Prot::Read),
        MapOp::Map { at: CODE, len: 4096, block: 1, offset: 0, prot: Prot::Read },
        MapOp::Map { at: CODE, len: 4096, block: 0, offset: 1, prot: Prot::Read },
        MapOp::Unmap { at: reserved.start, len: 4096 },
        MapOp::Unmap { at: 0x1_0000, len: USER_END },
    ] {
        assert_eq!(process.apply(&[op]).unwrap_err().kind(), io::ErrorKind::InvalidInput, "{op:?}");
    }
    // What the kernel refuses: an offset that no file has.
    let op = MapOp::Map { at: CODE + 4096, len: 4096, block: 0, offset: 1 << 63, prot: Prot::Read };
    let error = process.apply(&[op]).unwrap_err();
    assert!(error.raw_os_error().is_some(), "{error}");
    // More pieces than the kernel allows a process, and the way on.
    let most: u64 = std::fs::read_to_string("/proc/sys/vm/max_map_count").unwrap().trim().parse().unwrap();
    if most < 100_000 {
        let ops: Vec<_> = (0..most + 10).map(|i| map(DATA + 0x10000 + i * 8192, i % 200, 1, Prot::Read)).collect();
        assert_eq!(process.apply(&ops).unwrap_err().raw_os_error(), Some(libc::ENOMEM));
    }
    process.apply(&[MapOp::UnmapAll, map(CODE, 0, 1, Prot::ReadExecute)]).unwrap();
}

#[test]
fn a_killed_process_is_an_error() {
    if left_out() {
        return;
    }
    let (memory, mut process) = process();
    memory.write(0, b"\xeb\xfe");
    let pid = process.pid;
    let other = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(5));
        kill(pid, libc::SIGKILL);
    });
    let mut regs = at(CODE);
    assert_eq!(process.run(&mut regs).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    other.join().unwrap();
    assert!(process.run(&mut regs).is_err());
    assert!(process.apply(&[MapOp::UnmapAll]).is_err());
    assert!(process.get_xstate(&mut [0; 512]).is_err());
    process.interrupter().interrupt();
    // Between two runs.
    let (_memory, mut process) = self::process();
    kill(process.pid, libc::SIGKILL);
    std::thread::sleep(Duration::from_millis(5));
    assert!(process.apply(&[MapOp::UnmapAll]).is_err());
    assert!(process.run(&mut regs).is_err());
}

#[test]
fn nothing_is_left_of_a_process() {
    if left_out() {
        return;
    }
    let (_memory, process) = process();
    let pid = process.pid;
    assert!(std::fs::exists(format!("/proc/{pid}")).unwrap());
    drop(process);
    assert!(!std::fs::exists(format!("/proc/{pid}")).unwrap());
    // With its thread, too.
    let pid = std::thread::spawn(|| {
        let (_memory, process) = self::process();
        let pid = process.pid;
        std::mem::forget(process);
        pid
    })
    .join()
    .unwrap();
    // Not reaped by anybody but this test.
    let mut status = 0;
    // SAFETY: the status is written there.
    assert_eq!(unsafe { libc::waitpid(pid, &mut status, libc::__WALL) }, pid);
    assert!(libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGKILL);
}

#[test]
fn it_may_be_dropped_by_another_thread() {
    if left_out() {
        return;
    }
    struct Sent(Process);
    // SAFETY: dropping is allowed anywhere.
    unsafe impl Send for Sent {}
    let (_memory, process) = process();
    let (pid, process) = (process.pid, Sent(process));
    std::thread::spawn(move || drop({ process }.0)).join().unwrap();
    assert!(!std::fs::exists(format!("/proc/{pid}")).unwrap());
}

#[test]
fn nothing_of_this_process_is_in_it() {
    if left_out() {
        return;
    }
    let (_memory, process) = process();
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", process.pid)).unwrap();
    let mut lines: Vec<_> = maps
        .lines()
        .filter(|line| !line.ends_with("[vsyscall]"))
        .map(|line| line.split_whitespace().take(2).collect::<Vec<_>>().join(" "))
        .collect();
    lines.sort();
    let range = |start: u64, end: u64, prot: &str| format!("{start:08x}-{end:08x} {prot}");
    let expected = [
        range(CODE, CODE + 4096, "r-xs"),
        range(STUB, COMMANDS, "r-xp"),
        range(COMMANDS, Process::RESERVED.end, "r--s"),
        range(DATA, DATA + 4096, "rw-s"),
    ];
    assert_eq!(lines, expected, "{maps}");
    let fds: Vec<_> = std::fs::read_dir(format!("/proc/{}/fd", process.pid))
        .unwrap()
        .map(|fd| std::fs::read_link(fd.unwrap().path()).unwrap().display().to_string())
        .collect();
    assert_eq!(fds, ["/memfd:test-guest (deleted)"]);
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.pid)).unwrap();
    for line in ["Seccomp:\t2", "NoNewPrivs:\t1", "SigBlk:\t0000000000000000", "SigCgt:\t0000000000000000"] {
        assert!(status.contains(line), "{line}: {status}");
    }
}

#[test]
fn a_host_that_refuses_is_an_error_that_says_so() {
    if left_out() {
        return;
    }
    let refuse = |number: i64| {
        let step = |code: u32, jt, jf, k| libc::sock_filter { code: code as u16, jt, jf, k };
        let mut filter = [
            step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
            step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, number as u32),
            step(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32),
            step(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
        ];
        let program = libc::sock_fprog { len: 4, filter: filter.as_mut_ptr() };
        // SAFETY: concerns this thread only; the program is read.
        unsafe {
            assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
            assert_eq!(libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program), 0);
        }
    };
    for (call, says) in [
        (libc::SYS_clone, "ermitted"),
        (libc::SYS_ptrace, "PTRACE_TRACEME"),
        (libc::SYS_close_range, "close_range"),
        (libc::SYS_seccomp, "ermitted"),
        (libc::SYS_wait4, "ermitted"),
    ] {
        let thread = std::thread::spawn(move || {
            let memory = Memory::new();
            refuse(call);
            Process::spawn(&[memory.fd.as_fd()], Tsc::Host).err().expect("no process")
        });
        let error = thread.join().unwrap();
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{error}");
        assert!(error.to_string().contains(says), "{call}: {error}");
    }
}

#[test]
fn several_blocks() {
    if left_out() {
        return;
    }
    let (one, two) = (Memory::new(), Memory::new());
    one.write(0, b"\x48\x8b\x03\xcc");
    two.write(4096, &77u64.to_le_bytes());
    let mut process = Process::spawn(&[one.fd.as_fd(), two.fd.as_fd()], Tsc::Host).unwrap();
    let second = MapOp::Map { at: DATA, len: 4096, block: 1, offset: 4096, prot: Prot::Read };
    process.apply(&[map(CODE, 0, 1, Prot::ReadExecute), second]).unwrap();
    let mut regs = at(CODE);
    regs.rbx = DATA;
    assert_eq!(signal(process.run(&mut regs).unwrap()).0, libc::SIGTRAP);
    assert_eq!(regs.rax, 77);
}

/// `cargo test --release -p viridian-engine-soft process::tests::costs -- --ignored --nocapture`
#[test]
#[ignore = "a measurement"]
fn costs() {
    let made = Instant::now();
    let (memory, mut process) = process();
    println!("made in {:?}", made.elapsed());
    let (memory_faults, mut faults) = process_with(Tsc::Faults);
    let median = |what: &str, f: &mut dyn FnMut()| {
        let mut times: Vec<_> = (0..200)
            .map(|_| {
                let start = Instant::now();
                for _ in 0..10 {
                    f();
                }
                start.elapsed() / 10
            })
            .collect();
        times.sort();
        println!("{what}: {:?} (a tenth: less than {:?})", times[100], times[20]);
    };
    memory.write(0, b"\x0f\x05\xeb\xfc");
    let mut regs = at(CODE);
    median("a run to a SYSCALL", &mut || assert_eq!(process.run(&mut regs).unwrap(), Stop::Syscall));
    memory_faults.write(0, b"\x0f\x05\xeb\xfc");
    let mut regs = at(CODE);
    median("the same if RDTSC faults", &mut || assert_eq!(faults.run(&mut regs).unwrap(), Stop::Syscall));
    memory.write(0, b"\x0f\x0b");
    let mut regs = at(CODE);
    median("a run to a fault", &mut || assert_eq!(signal(process.run(&mut regs).unwrap()).0, libc::SIGILL));
    // MOV EAX, [0x100000], where nothing is.
    memory.write(0, b"\x8b\x04\x25\x00\x00\x10\x00");
    let mut regs = at(CODE);
    median("a run to a page fault", &mut || assert_eq!(signal(process.run(&mut regs).unwrap()).0, libc::SIGSEGV));
    let mut area = vec![0u8; x86::xsave::AREA_SIZE];
    median("vector state out", &mut || process.get_xstate(&mut area).unwrap());
    median("vector state in", &mut || process.set_xstate(&area).unwrap());
    median("general registers out and in", &mut || {
        let mut regs = process.regs().unwrap();
        process.set_regs(&mut regs).unwrap();
    });
    median("1 page mapped", &mut || process.apply(&[map(DATA + 0x10000, 5, 1, Prot::ReadWrite)]).unwrap());
    let ops: Vec<_> = (0..64).map(|i| map(DATA + 0x20000 + i * 4096, i * 7 % 200, 1, Prot::ReadWrite)).collect();
    median("64 pages mapped", &mut || process.apply(&ops).unwrap());
    median("64 pages mapped as one", &mut || {
        process.apply(&[map(DATA + 0x100000, 10, 64, Prot::ReadWrite)]).unwrap();
    });
    median("all unmapped", &mut || process.apply(&[MapOp::UnmapAll]).unwrap());
}

/// `cargo test --release -p viridian-engine-soft process::tests::two_at_once -- --ignored --nocapture`
#[test]
#[ignore = "a measurement"]
fn two_at_once() {
    // What so many processes, interrupted every 4 ms, get done in a second.
    let rounds = |threads: usize| -> Vec<u64> {
        let work = || {
            let (memory, mut process) = process();
            memory.write(0, b"\x48\xff\xc0\xeb\xfb");
            let (interrupter, stop) = (process.interrupter(), Arc::new(std::sync::atomic::AtomicBool::new(false)));
            let (seen, ordering) = (stop.clone(), std::sync::atomic::Ordering::SeqCst);
            let timer = std::thread::spawn(move || {
                while !seen.load(ordering) {
                    std::thread::sleep(Duration::from_millis(4));
                    interrupter.interrupt();
                }
            });
            let start = Instant::now();
            let (mut regs, mut moves, mut before) = (at(CODE), 0, -1);
            while start.elapsed() < Duration::from_secs(1) {
                assert_eq!(process.run(&mut regs).unwrap(), Stop::Interrupted);
                moves += i32::from(process.processor != before);
                before = process.processor;
            }
            stop.store(true, ordering);
            timer.join().unwrap();
            println!("{} rounds, {moves} times on another processor, at last {before}", regs.rax);
            regs.rax
        };
        let all: Vec<_> = (0..threads).map(|_| std::thread::spawn(work)).collect();
        all.into_iter().map(|t| t.join().unwrap()).collect()
    };
    for threads in [1, 2, 1, 2] {
        println!("{threads} at once: {:?}", rounds(threads));
    }
}
