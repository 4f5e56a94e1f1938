//! # engine-kvm: the engine contract on Linux's KVM
//!
//! For hosts with VT-x or AMD-V. The local APICs are KVM's; PIC, PIT and I/O APIC are the machine's (split irqchip).
//! Synthetic MSRs come out through the MSR filter, hypercalls as an OUT to a reserved port, doorbells are ioeventfds.
//! No kernel option of KVM's own Hyper-V emulation is used.
//!
//! | file | holds |
//! | --- | --- |
//! | `engine.rs` | [`KvmEngine`]: opens `/dev/kvm`, checks what it can do, makes partitions |
//! | `partition.rs` | the partition: interrupts, kicks, doorbells |
//! | `slots.rs` | guest memory as KVM's memory slots; dirty pages |
//! | `run.rs` | the loop around `KVM_RUN` and its exits |
//! | `state.rs` | `VpState` from and to KVM's many pieces |
//! | `cpuid.rs` | the model's tables against what this KVM supports |
//! | `sys.rs` | the calls that `kvm-ioctls` does not have |
//!
//! It may use: `x86`, `partition`, KVM. It must never know: devices, machines, Hyper-V.

mod cpuid;
mod engine;
mod partition;
mod run;
mod slots;
mod state;
mod sys;

pub use engine::{KvmEngine, kvm_is_usable};
