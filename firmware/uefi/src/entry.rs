//! The first instructions, and what an exception or a panic comes to.
//!
//! The firmware starts in 64-bit mode with the first 4 GiB mapped to themselves, at the image's first byte, with the
//! configuration blob at [`crate::config::BLOB`]. It brings its own stack, relocates itself, and goes on in Rust.

use crate::arch::{self, Frame};
use core::arch::global_asm;

const STACK_SIZE: usize = 256 << 10;

#[repr(C, align(4096))]
struct Stack([u8; STACK_SIZE]);
static STACK: crate::cell::Global<Stack> = crate::cell::Global::new(Stack([0; STACK_SIZE]));

global_asm!(
    ".section .text.start, \"ax\"",
    ".globl _start",
    "_start:",
    "cli",
    "cld",
    // CR4.OSFXSR and OSXMMEXCPT, CR0.MP without EM and TS: `core` uses SSE2.
    "mov rax, cr4",
    "or eax, 0x600",
    "mov cr4, rax",
    "mov rax, cr0",
    "and eax, 0xfffffff3",
    "or eax, 2",
    "mov cr0, rax",
    // .bss is zero already: guest memory is. Stack, then self-relocation, then Rust.
    "lea rsp, [rip + {stack}]",
    "add rsp, {size}",
    "lea rdi, [rip + __image_start]",
    "lea rsi, [rip + __rela_start]",
    "lea rdx, [rip + __rela_end]",
    "xor ebp, ebp",
    // Elf64_Rela: offset, info (8 = R_X86_64_RELATIVE), addend.
    "2: cmp rsi, rdx",
    "jae 3f",
    "mov rax, [rsi]",
    "mov rcx, [rsi + 16]",
    "add rcx, rdi",
    "mov [rdi + rax], rcx",
    "add rsi, 24",
    "jmp 2b",
    "3: call {main}",
    "ud2",
    ".text",
    stack = sym STACK,
    size = const STACK_SIZE,
    main = sym main,
);

unsafe extern "C" {
    static __image_start: u8;
    static __rodata_start: u8;
    static __data_start: u8;
    static __image_end: u8;
    static __rela_start: [u64; 3];
    static __rela_end: [u64; 3];
}

/// Where the firmware's image is: start, read-only data, data, end.
pub fn image() -> [u64; 4] {
    [&raw const __image_start, &raw const __rodata_start, &raw const __data_start, &raw const __image_end]
        .map(|p| p as u64)
}

/// The relocated places of the image (offset from its start, addend).
pub fn relocations() -> impl Iterator<Item = (u64, u64)> {
    // SAFETY: the linker puts the whole table between the two symbols.
    let table = unsafe {
        let (start, end) = (&raw const __rela_start, &raw const __rela_end);
        core::slice::from_raw_parts(start, end.offset_from(start) as usize)
    };
    table.iter().map(|r| (r[0], r[2]))
}

extern "C" fn main() -> ! {
    crate::memory::init();
    arch::init_time();
    crate::console::init_serial();
    arch::start_interrupts();
    crate::tables::init();
    crate::runtime::init();
    crate::acpi::init();
    crate::misc::init();
    crate::hii::init();
    crate::console::init();
    crate::vmbus::init();
    crate::boot::run()
}

/// Every interrupt and exception of the firmware comes here.
pub extern "C" fn interrupt(frame: &mut Frame) {
    match frame.vector as u8 {
        arch::TICK_VECTOR => {
            arch::eoi();
            arch::arm_tick();
            crate::event::tick();
        }
        arch::VMBUS_VECTOR => arch::eoi(),
        v if v >= 32 => arch::eoi(),
        v => {
            let cr2: u64;
            // SAFETY: reads a register.
            unsafe { core::arch::asm!("mov {}, cr2", out(reg) cr2, options(nomem, nostack, preserves_flags)) }
            panic!(
                "processor exception {v}, error code {:#x}, at {:#x} (image {:#x}), address {cr2:#x}, stack {:#x}",
                frame.error,
                frame.rip,
                image()[0],
                frame.rsp
            );
        }
    }
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    arch::interrupts_off();
    crate::bios::log_line(format_args!("firmware failure: {info}"));
    crate::console::emergency(format_args!("\r\nViridian firmware failure: {info}\r\n"));
    arch::stop()
}

/// The prebuilt `core` and `alloc` refer to it; nothing unwinds here.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

/// As `rust_eh_personality`.
#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume() -> ! {
    arch::stop()
}
