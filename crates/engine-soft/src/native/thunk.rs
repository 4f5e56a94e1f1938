//! Calling one instruction on the host's own unit: load the guest's registers, call the stub, save them.

use crate::vp::XsaveArea;
use std::cell::Cell;
use std::sync::OnceLock;

/// Registers around a stub. Field offsets are known to the assembly below.
#[repr(C)]
pub struct Context {
    /// By register number; RSP's slot is not loaded.
    pub gprs: [u64; 16],
    /// Status flags only.
    pub rflags: u64,
    /// The guest's vector state: loaded before and stored after the stub.
    pub xsave: *mut XsaveArea,
    /// Components to load and store (bits of XCR0).
    pub mask: u64,
    /// Zero, or the signal that the instruction raised.
    pub fault: u64,
    /// The stub.
    pub stub: *const u8,
    host_mxcsr: u32,
    host_fcw: u32,
}

impl Context {
    /// An empty context.
    pub fn new(xsave: *mut XsaveArea, stub: *const u8) -> Self {
        let mask = host_components();
        Self { gprs: [0; 16], rflags: 2, xsave, mask, fault: 0, stub, host_mxcsr: 0, host_fcw: 0 }
    }

    /// Executes the stub.
    ///
    /// # Safety
    /// `stub` must be `[one instruction; ret]` whose memory operand, if any, lies in host memory that the caller owns,
    /// that writes no register that the caller does not expect and not RSP; `xsave` must be a valid standard-format
    /// image.
    pub unsafe fn run(&mut self) {
        CURRENT.with(|c| c.set(self));
        // SAFETY: the caller's promise.
        unsafe { viridian_native_run(self) };
        CURRENT.with(|c| c.set(std::ptr::null_mut()));
    }
}

thread_local! {
    /// The context whose stub this thread is executing, for the signal handler.
    static CURRENT: Cell<*mut Context> = const { Cell::new(std::ptr::null_mut()) };
}

/// Components among x87, SSE and AVX that the host has enabled.
pub fn host_components() -> u64 {
    static MASK: OnceLock<u64> = OnceLock::new();
    *MASK.get_or_init(|| {
        if core::arch::x86_64::__cpuid(1).ecx & 1 << 27 == 0 {
            return 0;
        }
        // SAFETY: OSXSAVE is set, so XGETBV exists.
        unsafe { xgetbv0() & 7 }
    })
}

/// XCR0 of the host.
///
/// # Safety
/// CPUID must report OSXSAVE.
unsafe fn xgetbv0() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: the caller checked OSXSAVE; XGETBV(0) only reads.
    unsafe { std::arch::asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high, options(nomem, nostack)) };
    u64::from(high) << 32 | u64::from(low)
}

unsafe extern "C" {
    fn viridian_native_run(context: *mut Context);
    fn viridian_native_after();
}

// The stack inside a stub: return address, stub, context.
std::arch::global_asm!(
    ".globl viridian_native_run",
    ".globl viridian_native_after",
    "viridian_native_run:",
    "push rbx",
    "push rbp",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "push rdi",
    "push qword ptr [rdi+{stub}]",
    "stmxcsr [rdi+{mxcsr}]",
    "fnstcw [rdi+{fcw}]",
    "mov rax, [rdi+{mask}]",
    "xor edx, edx",
    "mov rcx, [rdi+{xsave}]",
    "xrstor64 [rcx]",
    "push qword ptr [rdi+{rflags}]",
    "popfq",
    "mov rax, [rdi]",
    "mov rcx, [rdi+8]",
    "mov rdx, [rdi+16]",
    "mov rbx, [rdi+24]",
    "mov rbp, [rdi+40]",
    "mov rsi, [rdi+48]",
    "mov r8, [rdi+64]",
    "mov r9, [rdi+72]",
    "mov r10, [rdi+80]",
    "mov r11, [rdi+88]",
    "mov r12, [rdi+96]",
    "mov r13, [rdi+104]",
    "mov r14, [rdi+112]",
    "mov r15, [rdi+120]",
    "mov rdi, [rdi+56]",
    "call qword ptr [rsp]",
    "viridian_native_after:",
    "pushfq",
    "push rdi",
    "mov rdi, [rsp+24]",
    "mov [rdi], rax",
    "mov [rdi+8], rcx",
    "mov [rdi+16], rdx",
    "mov [rdi+24], rbx",
    "mov [rdi+40], rbp",
    "mov [rdi+48], rsi",
    "mov [rdi+64], r8",
    "mov [rdi+72], r9",
    "mov [rdi+80], r10",
    "mov [rdi+88], r11",
    "mov [rdi+96], r12",
    "mov [rdi+104], r13",
    "mov [rdi+112], r14",
    "mov [rdi+120], r15",
    "pop rax",
    "mov [rdi+56], rax",
    "pop rax",
    "mov [rdi+{rflags}], rax",
    "mov rax, [rdi+{mask}]",
    "xor edx, edx",
    "mov rcx, [rdi+{xsave}]",
    "xsave64 [rcx]",
    "test al, 4",
    "jz 2f",
    "vzeroupper",
    "2:",
    "fninit",
    "fldcw [rdi+{fcw}]",
    "ldmxcsr [rdi+{mxcsr}]",
    "add rsp, 16",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbp",
    "pop rbx",
    "ret",
    rflags = const std::mem::offset_of!(Context, rflags),
    xsave = const std::mem::offset_of!(Context, xsave),
    mask = const std::mem::offset_of!(Context, mask),
    stub = const std::mem::offset_of!(Context, stub),
    mxcsr = const std::mem::offset_of!(Context, host_mxcsr),
    fcw = const std::mem::offset_of!(Context, host_fcw),
);

/// Called first by the process's handler of SIGFPE and SIGILL: if the signal was raised by a stub of this thread, makes
/// the thread go on behind it with [`Context::fault`] set. Says whether it was.
///
/// # Safety
/// Only from a signal handler, with its `ucontext`.
pub unsafe fn take_signal(signal: i32, context: *mut libc::ucontext_t) -> bool {
    let current = CURRENT.with(Cell::get);
    if current.is_null() {
        return false;
    }
    // SAFETY: a non-null `current` is the live context of the run on this thread; the handler's caller gives a valid
    // ucontext. The first instruction of a stub is its only one that can fault, with the return address on top.
    unsafe {
        let gregs = &mut (*context).uc_mcontext.gregs;
        if gregs[libc::REG_RIP as usize] as usize != (*current).stub as usize {
            return false;
        }
        (*current).fault = signal as u64;
        gregs[libc::REG_RIP as usize] = viridian_native_after as *const () as i64;
        gregs[libc::REG_RSP as usize] += 8;
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::translate::code_memory::CodeMemory;
    use crate::xstate;
    use x86::xsave::legacy;

    /// Runs an instruction given by its bytes on an image.
    fn run(bytes: &[u8], image: &mut XsaveArea, prepare: impl FnOnce(&mut Context)) -> Context {
        crate::signals::install();
        let mut memory = CodeMemory::new(4096).unwrap();
        assert!(memory.put(0, bytes) && memory.put(bytes.len(), &[0xc3]));
        let mut context = Context::new(image, memory.exec(0));
        prepare(&mut context);
        // SAFETY: every test below gives one instruction without a memory operand, and `ret` follows it.
        unsafe { context.run() };
        context
    }

    #[test]
    fn an_instruction_sees_and_changes_only_the_image() {
        let mut image = xstate::import(&[]);
        xstate::set_xmm(&mut image, 1, u128::from(1.5f64.to_bits()));
        xstate::set_xmm(&mut image, 2, u128::from(2.0f64.to_bits()));
        // mulsd xmm1, xmm2
        let c = run(&[0xf2, 0x0f, 0x59, 0xca], &mut image, |_| {});
        assert_eq!((c.fault, f64::from_bits(xstate::xmm(&image, 1) as u64)), (0, 3.0));
        // movd ebx, xmm2 ; flags unchanged
        let c = run(&[0x66, 0x48, 0x0f, 0x7e, 0xd3], &mut image, |c| c.rflags = 0x8d7);
        assert_eq!((c.gprs[3], c.rflags & 0x8d5), (2.0f64.to_bits(), 0x8d5));
        // fldpi; the image keeps it
        run(&[0xd9, 0xeb], &mut image, |_| {});
        assert_eq!(xstate::get_u64(&image, legacy::ST0), 0xc90f_daa2_2168_c235);
        assert_eq!(image.0[legacy::FTW], 0x80);
    }

    #[test]
    fn an_unmasked_exception_leaves_the_destination_and_sets_the_flag() {
        let mut image = xstate::import(&[]);
        let one = u128::from(1.0f64.to_bits());
        xstate::set_xmm(&mut image, 1, one);
        let unmasked = x86::xsave::MXCSR_INIT & !(1 << 9);
        image.0[legacy::MXCSR..legacy::MXCSR + 4].copy_from_slice(&unmasked.to_le_bytes());
        // divsd xmm1, xmm0 (zero)
        let c = run(&[0xf2, 0x0f, 0x5e, 0xc8], &mut image, |c| c.gprs[13] = 77);
        assert_eq!((c.fault, c.gprs[13]), (libc::SIGFPE as u64, 77));
        assert_eq!(xstate::xmm(&image, 1), one);
        assert_eq!(xstate::get_u32(&image, legacy::MXCSR), unmasked | 4);
        // The host's own unit is not affected.
        assert!((1.0f64 / std::hint::black_box(0.0)).is_infinite());
    }
}
