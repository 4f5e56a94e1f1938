//! Executes instructions on the host's processor, each from a complete register state, and catches what comes of it.
//!
//! The instruction sits alone in a page that is full of INT3. A signal frame is the way to load and read every register:
//! the handler of the first INT3 replaces the interrupted state by the first case's; whatever signal the case ends with
//! (the next INT3, or a fault) saves the outcome and loads the next case. Data and code have the same linear addresses as in
//! the guest.

use std::sync::atomic::{AtomicPtr, Ordering};

/// First of the readable and writable pages.
pub const DATA: u64 = 0x4000_0000;
/// Bytes that can be written.
pub const DATA_LEN: usize = 0x2000;
/// A page behind them that can only be read. Before the first and behind this one there is nothing.
pub const READ_ONLY: u64 = DATA + DATA_LEN as u64;
/// The page of code.
pub const CODE: u64 = 0x4100_0000;
/// Where in it the instruction is: not at an offset that [`crate::random::Random::value`] likes, because an indirect jump
/// to itself never ends.
pub const START: u64 = CODE + 0x5a6;
/// In 16-bit code, the base of DS and ES; SS stays flat and 32-bit, CS starts at [`CODE`].
pub const BASE16: u64 = DATA - 0x1000;
/// Selectors of the 16-bit segments, in the local descriptor table.
pub const CODE16: u16 = 0x07;
pub const DATA16: u16 = 0x0f;

/// What kind of code is executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Long,
    Compat32,
    Compat16,
}

impl Mode {
    pub fn bits(self) -> u32 {
        match self {
            Mode::Long => 64,
            Mode::Compat32 => 32,
            Mode::Compat16 => 16,
        }
    }
    /// Offset of the instruction in the code segment.
    pub fn start(self) -> u64 {
        if self == Mode::Compat16 { START - CODE } else { START }
    }
}

/// Bytes of the register image: FXSAVE area, XSAVE header, upper halves of YMM.
pub const XSAVE: usize = 832;

/// A register state.
#[derive(Clone)]
pub struct State {
    pub gprs: [u64; 16],
    pub rip: u64,
    pub rflags: u64,
    pub xsave: [u8; XSAVE],
}

/// What an execution ended with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// The instruction completed.
    Done,
    /// It faulted: vector, error code, CR2 (for #PF).
    Fault(u8, u32, u64),
}

/// What became of a case.
pub struct Outcome {
    pub end: End,
    pub state: State,
    pub memory: Vec<u8>,
}

struct Batch {
    cases: Vec<State>,
    outcomes: Vec<Outcome>,
    memory: Vec<u8>,
    mode: Mode,
    /// Interrupted state of the tester itself.
    own: Option<([libc::greg_t; 23], Vec<u8>)>,
}

static BATCH: AtomicPtr<Batch> = AtomicPtr::new(std::ptr::null_mut());

/// Register numbers in `gregset_t`, in the order of instruction encoding.
const ORDER: [i32; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

const RFLAGS_KEPT: i64 = 0xcd5;

unsafe fn load(batch: &Batch, uc: &mut libc::ucontext_t, n: usize) {
    let case = &batch.cases[n];
    let g = &mut uc.uc_mcontext.gregs;
    for (reg, value) in ORDER.iter().zip(case.gprs) {
        g[*reg as usize] = value as i64;
    }
    g[libc::REG_RIP as usize] = case.rip as i64;
    g[libc::REG_EFL as usize] = case.rflags as i64 | 0x202;
    let cs: i64 = match batch.mode {
        Mode::Long => 0x33,
        Mode::Compat32 => 0x23,
        Mode::Compat16 => CODE16.into(),
    };
    g[libc::REG_CSGSFS as usize] = g[libc::REG_CSGSFS as usize] & !0xffff | cs;
    // SAFETY: the kernel's frame holds an XSAVE area in the standard format; bytes 464-511 are the kernel's.
    unsafe {
        let fp = uc.uc_mcontext.fpregs.cast::<u8>();
        std::ptr::copy_nonoverlapping(case.xsave.as_ptr(), fp, 464);
        std::ptr::copy_nonoverlapping(case.xsave.as_ptr().add(576), fp.add(576), 256);
        *fp.add(512).cast::<u64>() |= 7;
        std::ptr::copy_nonoverlapping(batch.memory.as_ptr(), DATA as *mut u8, DATA_LEN);
    }
}

unsafe fn save(uc: &libc::ucontext_t, start: u64) -> Outcome {
    let g = &uc.uc_mcontext.gregs;
    let mut state = State { gprs: [0; 16], rip: 0, rflags: 0, xsave: [0; XSAVE] };
    for (to, reg) in state.gprs.iter_mut().zip(ORDER) {
        *to = g[reg as usize] as u64;
    }
    state.rip = g[libc::REG_RIP as usize] as u64;
    state.rflags = (g[libc::REG_EFL as usize] & RFLAGS_KEPT) as u64;
    // SAFETY: as in `load`.
    unsafe {
        let fp = uc.uc_mcontext.fpregs.cast::<u8>();
        let present = *fp.add(512).cast::<u64>();
        std::ptr::copy_nonoverlapping(fp, state.xsave.as_mut_ptr(), 464);
        std::ptr::copy_nonoverlapping(fp.add(576), state.xsave.as_mut_ptr().add(576), 256);
        // Components in their initial configuration are not written.
        if present & 1 == 0 {
            state.xsave[..24].fill(0);
            state.xsave[0..2].copy_from_slice(&0x37fu16.to_le_bytes());
            state.xsave[32..160].fill(0);
        }
        if present & 2 == 0 {
            state.xsave[160..416].fill(0);
        }
        if present & 4 == 0 {
            state.xsave[576..].fill(0);
        }
    }
    let vector = g[libc::REG_TRAPNO as usize] as u8;
    let end = if vector == 3 {
        state.rip -= 1;
        End::Done
    } else if state.rip != start {
        // The instruction completed, and what it jumped to cannot be fetched.
        End::Done
    } else {
        let cr2 = if vector == 14 { g[libc::REG_CR2 as usize] as u64 } else { 0 };
        End::Fault(vector, g[libc::REG_ERR as usize] as u32, cr2)
    };
    let mut memory = vec![0; DATA_LEN];
    // SAFETY: the data pages are mapped.
    unsafe { std::ptr::copy_nonoverlapping(DATA as *const u8, memory.as_mut_ptr(), DATA_LEN) };
    Outcome { end, state, memory }
}

extern "C" fn handler(signal: i32, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel gives a valid context. `run` keeps the batch alive while signals of its own making can arrive. The
    // allocations here are safe because the interrupted code is never inside the allocator: it is a tested instruction, or
    // the INT3 in `run`.
    unsafe {
        let uc = &mut *context.cast::<libc::ucontext_t>();
        let batch = BATCH.load(Ordering::SeqCst);
        if batch.is_null() {
            // Not ours: let it kill the process.
            libc::signal(signal, libc::SIG_DFL);
            return;
        }
        let batch = &mut *batch;
        let fp = uc.uc_mcontext.fpregs.cast::<u8>();
        match batch.own {
            None => {
                batch.own = Some((uc.uc_mcontext.gregs, std::slice::from_raw_parts(fp, XSAVE).to_vec()));
            }
            Some(_) => batch.outcomes.push(save(uc, batch.mode.start())),
        }
        let next = batch.outcomes.len();
        if next < batch.cases.len() {
            load(batch, uc, next);
            return;
        }
        if let Some((gregs, xsave)) = batch.own.take() {
            uc.uc_mcontext.gregs = gregs;
            std::ptr::copy_nonoverlapping(xsave.as_ptr(), fp, XSAVE);
        }
        BATCH.store(std::ptr::null_mut(), Ordering::SeqCst);
    }
}

unsafe fn map(at: u64, len: usize, protection: i32) {
    // SAFETY: the range is refused if anything is mapped there.
    let p = unsafe {
        libc::mmap(
            at as *mut libc::c_void,
            len,
            protection,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE,
            -1,
            0,
        )
    };
    assert_eq!(p as u64, at, "the tester needs the addresses around {at:#x}: {}", std::io::Error::last_os_error());
}

/// Prepares the process. Call once.
pub fn init() {
    // SAFETY: fresh mappings, our own alternate stack, handlers that keep to what is allowed (see `handler`), and data
    // segment selectors that every Linux process may load.
    unsafe {
        map(DATA - 0x1000, 0x5000, libc::PROT_NONE);
        let writable = libc::PROT_READ | libc::PROT_WRITE;
        assert_eq!(libc::mprotect(DATA as *mut libc::c_void, DATA_LEN + 0x1000, writable), 0);
        std::ptr::write_bytes(DATA as *mut u8, 0, DATA_LEN + 0x1000);
        assert_eq!(libc::mprotect(READ_ONLY as *mut libc::c_void, 0x1000, libc::PROT_READ), 0);
        map(CODE, 0x1000, writable | libc::PROT_EXEC);
        std::ptr::write_bytes(CODE as *mut u8, 0xcc, 0x1000);
        let stack = Box::leak(vec![0u8; 256 << 10].into_boxed_slice());
        let alternate = libc::stack_t { ss_sp: stack.as_mut_ptr().cast(), ss_flags: 0, ss_size: stack.len() };
        assert_eq!(libc::sigaltstack(&raw const alternate, std::ptr::null_mut()), 0);
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        for signal in [libc::SIGTRAP, libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL] {
            assert_eq!(libc::sigaction(signal, &raw const action, std::ptr::null_mut()), 0);
        }
        local_descriptor(CODE16 >> 3, CODE, 2);
        local_descriptor(DATA16 >> 3, BASE16, 0);
        load_data_segments(0x2b);
    }
}

/// Loads DS and ES, which 64-bit code does not look at.
unsafe fn load_data_segments(selector: u16) {
    // SAFETY: every selector that is given is valid in this process.
    unsafe { std::arch::asm!("mov ds, {0:x}", "mov es, {0:x}", in(reg) selector) }
}

/// Makes a 16-bit segment of 64 KiB: contents 0 is data, 2 is code (modify_ldt(2)).
fn local_descriptor(entry: u16, base: u64, contents: u32) {
    let descriptor = [u32::from(entry), base as u32, 0xffff, contents << 1];
    // SAFETY: a `user_desc` of 16 bytes, as the kernel wants it.
    let result = unsafe { libc::syscall(libc::SYS_modify_ldt, 1, descriptor.as_ptr(), 16usize) };
    assert_eq!(result as i32, 0, "modify_ldt: {}", std::io::Error::last_os_error());
}

/// Executes one instruction from each of the states, with this memory.
pub fn run(code: &[u8], cases: Vec<State>, memory: Vec<u8>, mode: Mode) -> Vec<Outcome> {
    assert!(memory.len() == DATA_LEN && !cases.is_empty());
    let n = cases.len();
    let mut batch = Batch { cases, outcomes: Vec::with_capacity(n), memory, mode, own: None };
    // SAFETY: the code page is ours; the handler takes it from the INT3 and comes back to behind it.
    unsafe {
        // All of it: a store of an earlier case may have found it.
        std::ptr::write_bytes(CODE as *mut u8, 0xcc, 0x1000);
        std::ptr::copy_nonoverlapping(code.as_ptr(), START as *mut u8, code.len());
        BATCH.store(&raw mut batch, Ordering::SeqCst);
        let data = if mode == Mode::Compat16 { DATA16 } else { 0x2b };
        load_data_segments(data);
        std::arch::asm!("int3");
        load_data_segments(0x2b);
    }
    batch.outcomes
}
