//! # engine-soft: x86-64 in software
//!
//! Executes a partition's VPs on a host without VT-x or AMD-V. The *interpreter* executes every instruction in every
//! mode with exact faults; the *translator* executes most of it fast. Both work on the same state ([`vp::SoftVp`]), the
//! same decoder (`iced-x86`) and the same soft MMU ([`mmu`]). `docs/engine-soft.md` is the design.
//!
//! It may use: `x86`, `partition`, the host's memory and signal calls. It must never know: devices, machines, Hyper-V.

pub mod apic;
pub mod code;
pub mod control;
pub mod direct;
pub mod exception;
pub mod features;
mod glue;
pub mod interp;
pub mod mmu;
pub mod msrs;
pub mod native;
pub mod partition_impl;
pub mod rest;
pub mod run;
pub mod segmentation;
pub mod signals;
pub mod stack;
pub mod state;
pub mod stats;
pub mod system;
pub mod task;
pub mod timers;
pub mod translate;
pub mod vp;
pub mod wake;
pub mod xstate;
