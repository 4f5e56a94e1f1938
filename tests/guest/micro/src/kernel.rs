//! What the guest's kernel does for a program: calls, faults, processes, pipes.

use crate::sys::{self, Mapping, Pipe, Turn};
use crate::{Bench, Done, Work};
use std::fs::File;
use std::hint::black_box;
use std::io::Read;

const fn bench(name: &'static str, unit: &'static str, make: fn() -> Option<Work>) -> Bench {
    Bench { group: "kernel", name, unit, make }
}

/// All measurements of this group.
pub const ALL: &[Bench] = &[
    bench("getppid", "call", || simple(|| _ = black_box(sys::parent()))),
    bench("read-4k-zero", "call", read_zero),
    bench("page-fault", "page", page_fault),
    bench("mmap-touch-munmap", "call", || simple(|| _ = Mapping::new(4096).touch())),
    bench("fork-wait", "process", || simple(|| sys::wait(sys::child(|| ())))),
    bench("fork-exec", "process", || simple(|| sys::wait(sys::child(sys::execute_self)))),
    bench("pipe-ping-pong", "round", ping_pong),
    bench("context-switch", "switch", context_switch),
];

fn simple(mut once: impl FnMut() + 'static) -> Option<Work> {
    Some(Box::new(move |n| {
        for _ in 0..n {
            once();
        }
        Done { units: n, check: 0 }
    }))
}

fn read_zero() -> Option<Work> {
    let mut zero = File::open("/dev/zero").ok()?;
    let mut buffer = vec![1_u8; 4096];
    simple(move || zero.read_exact(black_box(&mut buffer)).expect("/dev/zero never ends"))
}

fn page_fault() -> Option<Work> {
    Some(Box::new(|n| {
        let mut units = 0;
        for _ in 0..n {
            // Small against huge pages: each page has a fault of its own.
            units += Mapping::new(64 * 4096).touch();
        }
        Done { units, check: 0 }
    }))
}

/// Two processes on one processor, each waiting for the other's byte.
fn ping_pong() -> Option<Work> {
    Some(Box::new(|n| {
        sys::stay_on_first_processor();
        let (there, back) = (Pipe::open(), Pipe::open());
        let pid = sys::child(|| {
            there.close_end(1);
            while there.receive() {
                back.send();
            }
        });
        for _ in 0..n {
            there.send();
            back.receive();
        }
        there.close_end(1);
        sys::wait(pid);
        there.close_end(0);
        back.close_end(0);
        back.close_end(1);
        Done { units: n, check: 0 }
    }))
}

/// Two processes on one processor that wait for each other's turn by futex: a switch without a pipe's work.
fn context_switch() -> Option<Work> {
    Some(Box::new(|n| {
        sys::stay_on_first_processor();
        let turn = Turn::new();
        let pid = sys::child(|| {
            for _ in 0..n {
                turn.wait_for(1);
                turn.give(0);
            }
        });
        for _ in 0..n {
            turn.give(1);
            turn.wait_for(0);
        }
        sys::wait(pid);
        Done { units: 2 * n, check: 0 }
    }))
}
