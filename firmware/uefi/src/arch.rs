//! The processor: ports, MSRs, interrupts, time.

use core::arch::asm;
use core::sync::atomic::{AtomicU64, Ordering};

pub fn out32(port: u16, value: u32) {
    // SAFETY: port output has no effect on memory that Rust knows; callers address the machine's own devices.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack, preserves_flags)) }
}
pub fn out8(port: u16, value: u8) {
    // SAFETY: as `out32`.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nostack, preserves_flags)) }
}
pub fn out16(port: u16, value: u16) {
    // SAFETY: as `out32`.
    unsafe { asm!("out dx, ax", in("dx") port, in("ax") value, options(nostack, preserves_flags)) }
}
pub fn in8(port: u16) -> u8 {
    let value;
    // SAFETY: as `out32`.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nostack, preserves_flags)) }
    value
}

/// Reads an MSR that is known to exist.
pub fn rdmsr(msr: u32) -> u64 {
    let (lo, hi): (u32, u32);
    // SAFETY: reading the MSRs that this firmware uses has no side effect on memory.
    unsafe { asm!("rdmsr", in("ecx") msr, out("eax") lo, out("edx") hi, options(nostack, preserves_flags)) }
    u64::from(hi) << 32 | u64::from(lo)
}
/// Writes an MSR that is known to exist.
pub fn wrmsr(msr: u32, value: u64) {
    // SAFETY: callers write the synthetic MSRs and the APIC's, whose effects are the firmware's own.
    unsafe {
        asm!("wrmsr", in("ecx") msr, in("eax") value as u32, in("edx") (value >> 32) as u32, options(nostack));
    }
}

pub fn rdtsc() -> u64 {
    // SAFETY: RDTSC exists on every x86-64 processor.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Disables interrupts; returns whether they were on.
pub fn interrupts_off() -> bool {
    let flags: u64;
    // SAFETY: reads the flags and clears IF.
    unsafe { asm!("pushfq", "pop {}", "cli", out(reg) flags) }
    flags & 0x200 != 0
}
/// Enables interrupts if they were on.
pub fn interrupts_restore(on: bool) {
    if on {
        // SAFETY: the IDT is loaded before interrupts are first enabled.
        unsafe { asm!("sti") }
    }
}
/// Waits for the next interrupt, with interrupts enabled.
pub fn wait() {
    // SAFETY: interrupts are dispatched through the firmware's IDT, or the caller's own.
    unsafe { asm!("sti", "hlt") }
}
/// Stops for good.
pub fn stop() -> ! {
    loop {
        // SAFETY: nothing wakes the processor but an NMI, after which it sleeps again.
        unsafe { asm!("cli", "hlt") }
    }
}

/// Frequency of the TSC in Hz.
static TSC_HZ: AtomicU64 = AtomicU64::new(1_000_000_000);

pub fn tsc_hz() -> u64 {
    TSC_HZ.load(Ordering::Relaxed)
}

/// Time since the processor started, in 100 ns units.
pub fn now() -> u64 {
    (u128::from(rdtsc()) * 10_000_000 / u128::from(tsc_hz())) as u64
}

/// Waits a number of microseconds.
pub fn stall(microseconds: u64) {
    let end = rdtsc() + (u128::from(microseconds) * u128::from(tsc_hz()) / 1_000_000) as u64;
    while rdtsc() < end {
        core::hint::spin_loop();
    }
}

/// Hyper-V's MSRs (TLFS, appendix B).
pub mod hv {
    pub const GUEST_OS_ID: u32 = 0x4000_0000;
    pub const HYPERCALL: u32 = 0x4000_0001;
    pub const TSC_FREQUENCY: u32 = 0x4000_0022;
    pub const SCONTROL: u32 = 0x4000_0080;
    pub const SIEFP: u32 = 0x4000_0082;
    pub const SIMP: u32 = 0x4000_0083;
    pub const EOM: u32 = 0x4000_0084;
    pub const SINT0: u32 = 0x4000_0090;
}

const APIC_BASE: u32 = 0x1b;
/// Vector of the tick, and of VMBus's SINT.
pub const TICK_VECTOR: u8 = 0x40;
pub const VMBUS_VECTOR: u8 = 0x41;
const SPURIOUS_VECTOR: u8 = 0xff;
/// Ticks a second.
const TICK_HZ: u64 = 100;

/// Access to the local APIC in whichever mode it is.
mod apic {
    use super::{APIC_BASE, rdmsr, wrmsr};
    fn x2apic() -> bool {
        rdmsr(APIC_BASE) & 1 << 10 != 0
    }
    fn register(offset: u32) -> *mut u32 {
        ((rdmsr(APIC_BASE) & 0xf_ffff_f000) + u64::from(offset)) as *mut u32
    }
    pub fn write(offset: u32, value: u32) {
        if x2apic() {
            wrmsr(0x800 + offset / 16, u64::from(value));
        } else {
            // SAFETY: the APIC's page is mapped to itself and is no memory.
            unsafe { register(offset).write_volatile(value) }
        }
    }
    pub const TPR: u32 = 0x80;
    pub const EOI: u32 = 0xb0;
    pub const SVR: u32 = 0xf0;
    pub const LVT_TIMER: u32 = 0x320;
    pub const TIMER_INITIAL: u32 = 0x380;
}

pub fn eoi() {
    apic::write(apic::EOI, 0);
}

/// Arms the next tick.
pub fn arm_tick() {
    const TSC_DEADLINE: u32 = 0x6e0;
    wrmsr(TSC_DEADLINE, rdtsc() + tsc_hz() / TICK_HZ);
}

/// A frame as the processor pushes it, above what the stub pushed.
#[repr(C)]
pub struct Frame {
    pub registers: [u64; 15],
    pub vector: u64,
    pub error: u64,
    pub rip: u64,
    pub cs: u64,
    pub rflags: u64,
    pub rsp: u64,
    pub ss: u64,
}

core::arch::global_asm!(
    // 256 stubs of 16 bytes each: push an error code where the processor does not, then the vector.
    ".balign 16",
    "interrupt_stubs:",
    ".set vector, 0",
    ".rept 256",
    ".balign 16",
    ".if (vector == 8) || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21 || vector == 29 || vector == 30",
    ".else",
    "push 0",
    ".endif",
    "push vector",
    "jmp interrupt_common",
    ".set vector, vector + 1",
    ".endr",
    "interrupt_common:",
    "push rax; push rcx; push rdx; push rbx; push rbp; push rsi; push rdi; push r8",
    "push r9; push r10; push r11; push r12; push r13; push r14; push r15",
    "cld",
    "mov rdi, rsp",
    // Vector registers: what was interrupted may be in the middle of using them.
    "mov rbx, rsp",
    "sub rsp, 528",
    "and rsp, -16",
    "fxsave64 [rsp]",
    "call {handler}",
    "fxrstor64 [rsp]",
    "mov rsp, rbx",
    "pop r15; pop r14; pop r13; pop r12; pop r11; pop r10; pop r9",
    "pop r8; pop rdi; pop rsi; pop rbp; pop rbx; pop rdx; pop rcx; pop rax",
    "add rsp, 16",
    "iretq",
    handler = sym crate::entry::interrupt,
);

unsafe extern "C" {
    safe static interrupt_stubs: [[u8; 16]; 256];
}

#[repr(C, align(16))]
struct Idt([[u64; 2]; 256]);

static IDT: crate::cell::Global<Idt> = crate::cell::Global::new(Idt([[0; 2]; 256]));

/// Loads the IDT and starts the tick. The code segment is the one that the firmware was started with.
pub fn start_interrupts() {
    let cs: u16;
    // SAFETY: reads a segment register.
    unsafe { asm!("mov {:x}, cs", out(reg) cs, options(nomem, nostack, preserves_flags)) }
    let pointer = IDT.with(|idt| {
        for (entry, stub) in idt.0.iter_mut().zip(&interrupt_stubs) {
            let at = stub.as_ptr() as u64;
            // Present, 64-bit interrupt gate (SDM volume 3, figure 6-8).
            entry[0] = at & 0xffff | u64::from(cs) << 16 | 0x8e00 << 32 | (at >> 16 & 0xffff) << 48;
            entry[1] = at >> 32;
        }
        (idt as *const Idt) as u64
    });
    #[repr(C, packed)]
    struct Pointer {
        limit: u16,
        base: u64,
    }
    let idtr = Pointer { limit: (size_of::<Idt>() - 1) as u16, base: pointer };
    // SAFETY: the IDT is a static that lives as long as the firmware, and every entry leads to a stub.
    unsafe { asm!("lidt [{}]", in(reg) &idtr, options(nostack, preserves_flags)) }
    apic::write(apic::SVR, 0x100 | u32::from(SPURIOUS_VECTOR));
    apic::write(apic::TPR, 0);
    // LVT timer: TSC-deadline mode.
    apic::write(apic::LVT_TIMER, 2 << 17 | u32::from(TICK_VECTOR));
    // SAFETY: a fence; WRMSR to the deadline must not pass the LVT write (SDM volume 3, section 10.5.4.1).
    unsafe { asm!("mfence", options(nostack, preserves_flags)) }
    arm_tick();
    interrupts_restore(true);
}

/// Stops the tick, for ExitBootServices: no interrupt of the firmware arrives after it.
pub fn stop_interrupts() {
    interrupts_off();
    apic::write(apic::LVT_TIMER, 0x1_0000);
    apic::write(apic::TIMER_INITIAL, 0);
}

/// Finds the TSC's frequency: from the hypervisor, else from CPUID.
pub fn init_time() {
    use core::arch::x86_64::__cpuid;
    let hyperv = __cpuid(1).ecx & 1 << 31 != 0 && __cpuid(0x4000_0000).ebx == 0x7263_694d;
    let hz = if hyperv && __cpuid(0x4000_0003).eax & 1 << 11 != 0 {
        rdmsr(hv::TSC_FREQUENCY)
    } else if __cpuid(0).eax >= 0x15 {
        let l = __cpuid(0x15);
        u64::from(l.ecx) * u64::from(l.ebx) / u64::from(l.eax.max(1))
    } else {
        0
    };
    if hz > 1_000_000 {
        TSC_HZ.store(hz, Ordering::Relaxed);
    }
}
