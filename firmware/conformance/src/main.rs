//! # The conformance program
//!
//! An EFI application that calls the boot services, the runtime services and the main protocols of the firmware that started
//! it, with right and with wrong parameters, and says of each answer what the status tables of the UEFI specification 2.10
//! allow. `cargo xtask test --only firmware/conformance` runs it under Viridian's firmware, where every answer must be an
//! allowed one, and under OVMF, where it must be the same one unless the difference is explained.
//!
//! | module | checks |
//! | --- | --- |
//! | [`events`] | events, timers, task priority levels |
//! | [`memory`] | pages, pools, the memory map |
//! | [`services`] | small services, the tables themselves |
//! | [`handles`] | the protocol database: install, open, locate, notify |
//! | [`drivers`] | ConnectController with driver bindings of the program's own |
//! | [`images`] | LoadImage, StartImage, Exit, UnloadImage with copies of itself |
//! | [`variables`], [`runtime`] | variables; time, capsules, counters |
//! | [`console`] | text in and out, graphics |
//! | [`media`], [`files`] | block and disk I/O; the file protocol |
//! | [`paths`], [`small`] | device path utilities; random numbers, collation, HII |
//! | [`devices`] | SCSI pass thru, serial I/O, memory attributes |
//! | [`loader`] | nothing: says from where it was started, for tests of the boot manager |
//! | [`farewell`] | ExitBootServices, virtual addresses, and what works after them |
//!
//! The whole program is calls through raw pointers that the firmware gave, many of them wrong on purpose: what is wrong in each
//! is chosen so that the specification says what must come of it. That is what makes the `unsafe` functions sound, and is
//! not repeated at each.
#![no_std]
#![no_main]
#![allow(unsafe_op_in_unsafe_fn)]

mod console;
mod devices;
mod drivers;
mod env;
mod events;
mod farewell;
mod files;
mod handles;
mod images;
mod loader;
mod media;
mod memory;
#[path = "../../uefi/src/memory_functions.rs"]
mod memory_functions;
mod paths;
mod report;
mod runtime;
mod services;
mod small;
mod variables;

use r_efi::efi::{Handle, Status, SystemTable};

/// Where the firmware enters the program.
///
/// # Safety
/// Called once by the firmware with an image handle and the system table.
#[unsafe(no_mangle)]
pub unsafe extern "efiapi" fn efi_main(image: Handle, table: *mut SystemTable) -> Status {
    env::init(image, table);
    if let Some(status) = images::role() {
        return status;
    }
    if files::exists("\\watchdog") {
        return services::bite();
    }
    if files::exists("\\say") {
        return loader::run();
    }
    report::text("\r\nCONFORMANCE-BEGIN\r\n");
    services::run();
    memory::run();
    events::run();
    handles::run();
    drivers::run();
    images::run();
    variables::run();
    runtime::run();
    console::run();
    media::run();
    files::run();
    paths::run();
    small::run();
    devices::run();
    farewell::run()
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    report::text("\r\nCONFORMANCE-PANIC\r\n");
    loop {
        core::hint::spin_loop();
    }
}

/// The prebuilt `core` refers to it; nothing unwinds here.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}
