//! # Viridian's UEFI
//!
//! The firmware of generation 2 virtual machines: UEFI 2.10 boot and runtime services over VMBus devices, with no legacy
//! device at all. `docs/firmware.md` of the project is its map.
//!
//! | module | holds |
//! | --- | --- |
//! | [`entry`], [`arch`] | the first instructions, interrupts, ports, MSRs |
//! | [`bios`] | the host's BiosDevice and configuration blob |
//! | [`memory`], [`heap`], [`paging`] | the memory map, pages, pools; page tables and memory attributes |
//! | [`event`] | events, timers, task priority levels |
//! | [`handle`] | the protocol database, drivers and controllers |
//! | [`image`] | loading, starting and ending images; Secure Boot |
//! | [`tables`], [`runtime`] | system table, boot services, runtime services |
//! | [`console`] | text in and out on the screen and COM1, graphics |
//! | [`disk`], [`fs`] | block devices, partitions, file systems |
//! | [`vmbus`] | guest side of VMBus: storage, keyboard |
//! | [`boot`] | boot options and the boot manager |
//!
//! One processor runs the firmware. Interrupts only count time and dispatch events; state is in [`cell::Global`]s, which
//! hold interrupts off while they are borrowed.
#![no_std]
#![no_main]

extern crate alloc;

mod acpi;
mod arch;
mod bios;
mod boot;
mod cell;
mod config;
mod console;
mod disk;
mod entry;
mod event;
mod fs;
mod handle;
mod heap;
mod hii;
mod image;
mod memory;
mod memory_functions;
mod misc;
mod paging;
mod runtime;
mod tables;
mod vmbus;
