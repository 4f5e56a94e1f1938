//! Memory order between VPs: the classic litmus tests, many thousand times each. Loads and stores are the host's, so what
//! the architecture forbids must not be seen (SDM volume 3, section 9.2).

mod common;

use common::{Bench, CODE, PORT_DONE};
use iced_x86::code_asm::*;
use partition::{DirectMode, EngineOptions, Gpa, GuestMemory, TranslateMode};
use std::time::Duration;
use viridian_engine_soft::partition_impl::SoftEngine;

/// Slots: one for each round, of 256 bytes: x, y (a line each), then what each VP read (two words each).
const SLOTS: u64 = 4 << 20;
const SLOT: u64 = 256;
const X: i32 = 0;
const Y: i32 = 64;
const READ: i32 = 128;
/// Counts arrivals.
const BARRIER: u64 = 0x8_0000;
const ROUNDS: u32 = 2500;
const LIMIT: Duration = Duration::from_secs(120);

/// What one VP does in a round: RBX points to the slot, R8 may be read into first, R9 second.
type Body = fn(&mut CodeAssembler);

/// All VPs meet, then each executes its body; after the last round VP 0 ends the run.
fn program(a: &mut CodeAssembler, vp: u32, vps: u32, body: Body) {
    let mut round = a.create_label();
    let mut wait = a.create_label();
    let mut go = a.create_label();
    a.mov(rbx, SLOTS).unwrap();
    a.mov(rsi, BARRIER).unwrap();
    a.xor(ecx, ecx).unwrap();
    a.set_label(&mut round).unwrap();
    a.add(ecx, vps as i32).unwrap();
    a.lock().inc(dword_ptr(rsi)).unwrap();
    a.set_label(&mut wait).unwrap();
    a.cmp(dword_ptr(rsi), ecx).unwrap();
    a.jae(go).unwrap();
    a.pause().unwrap();
    a.jmp(wait).unwrap();
    a.set_label(&mut go).unwrap();
    a.xor(r8d, r8d).unwrap();
    a.xor(r9d, r9d).unwrap();
    body(a);
    a.mov(dword_ptr(rbx + READ + 8 * vp as i32), r8d).unwrap();
    a.mov(dword_ptr(rbx + READ + 8 * vp as i32 + 4), r9d).unwrap();
    a.add(rbx, SLOT as i32).unwrap();
    a.cmp(rbx, (SLOTS + u64::from(ROUNDS) * SLOT) as i32).unwrap();
    a.jb(round).unwrap();
    let mut end = a.create_label();
    a.lock().inc(dword_ptr(rsi)).unwrap();
    a.set_label(&mut end).unwrap();
    a.pause().unwrap();
    a.cmp(dword_ptr(rsi), ((ROUNDS + 1) * vps) as i32).unwrap();
    a.jb(end).unwrap();
    if vp == 0 {
        a.mov(al, 1).unwrap();
        a.mov(dx, u32::from(PORT_DONE)).unwrap();
        a.out(dx, al).unwrap();
    }
    let mut forever = a.create_label();
    a.set_label(&mut forever).unwrap();
    a.pause().unwrap();
    a.jmp(forever).unwrap();
}

/// Runs the bodies against each other; gives for each round what each VP read.
fn litmus(mode: TranslateMode, bodies: &[Body]) -> Vec<Vec<(u32, u32)>> {
    let memory = GuestMemory::with_ram(16 << 20, 0xc000_0000..1 << 32, false).unwrap();
    let options = EngineOptions { translate: mode, code_cache_bytes: 8 << 20, direct: DirectMode::Off };
    let mut b = Bench::with_options(&SoftEngine::new(), "x86-64-v2", bodies.len() as u32, memory, options);
    for (n, body) in bodies.iter().enumerate() {
        let at = CODE + 0x1000 * n as u64;
        b.code(at, |a| program(a, n as u32, bodies.len() as u32, *body));
        let state = b.long_state(n as u32, at);
        b.vps[n].set_state(&state).unwrap();
    }
    assert_eq!(b.run(LIMIT), 1);
    (0..u64::from(ROUNDS))
        .map(|round| {
            (0..bodies.len() as u64)
                .map(|vp| {
                    let v = b.read_u64(SLOTS + round * SLOT + READ as u64 + 8 * vp);
                    (v as u32, (v >> 32) as u32)
                })
                .collect()
        })
        .collect()
}

fn store_x(a: &mut CodeAssembler) {
    a.mov(dword_ptr(rbx + X), 1).unwrap();
}
fn store_y(a: &mut CodeAssembler) {
    a.mov(dword_ptr(rbx + Y), 1).unwrap();
}
fn first_x(a: &mut CodeAssembler) {
    a.mov(r8d, dword_ptr(rbx + X)).unwrap();
}
fn first_y(a: &mut CodeAssembler) {
    a.mov(r8d, dword_ptr(rbx + Y)).unwrap();
}
fn second_x(a: &mut CodeAssembler) {
    a.mov(r9d, dword_ptr(rbx + X)).unwrap();
}
fn second_y(a: &mut CodeAssembler) {
    a.mov(r9d, dword_ptr(rbx + Y)).unwrap();
}

/// Both modes; gives how many rounds had an outcome.
fn count(name: &str, bodies: &[Body], outcome: impl Fn(&[(u32, u32)]) -> bool) -> usize {
    let mut seen = 0;
    for mode in [TranslateMode::On, TranslateMode::Off] {
        let n = litmus(mode, bodies).iter().filter(|r| outcome(r)).count();
        println!("{name}, {mode:?}: {n} of {ROUNDS}");
        seen += n;
    }
    seen
}

#[test]
fn message_passing() {
    let writer: Body = |a| {
        store_x(a);
        store_y(a);
    };
    let reader: Body = |a| {
        first_y(a);
        second_x(a);
    };
    assert_eq!(count("MP: y new, x old", &[writer, reader], |r| r[1] == (1, 0)), 0);
}

#[test]
fn load_buffering() {
    let one: Body = |a| {
        first_x(a);
        store_y(a);
    };
    let other: Body = |a| {
        first_y(a);
        store_x(a);
    };
    assert_eq!(count("LB: both new", &[one, other], |r| r[0].0 == 1 && r[1].0 == 1), 0);
}

#[test]
fn store_buffering() {
    // Allowed without a fence: x86's one relaxation. Whether it shows depends on the host; it is printed only.
    let one: Body = |a| {
        store_x(a);
        first_y(a);
    };
    let other: Body = |a| {
        store_y(a);
        first_x(a);
    };
    count("SB: both old (allowed)", &[one, other], |r| r[0].0 == 0 && r[1].0 == 0);
    let one: Body = |a| {
        store_x(a);
        a.mfence().unwrap();
        first_y(a);
    };
    let other: Body = |a| {
        store_y(a);
        a.mfence().unwrap();
        first_x(a);
    };
    assert_eq!(count("SB with MFENCE: both old", &[one, other], |r| r[0].0 == 0 && r[1].0 == 0), 0);
    let one: Body = |a| {
        a.mov(eax, 1).unwrap();
        a.xchg(dword_ptr(rbx + X), eax).unwrap();
        first_y(a);
    };
    let other: Body = |a| {
        store_y(a);
        a.lock().add(dword_ptr(rsp - 64), 0).unwrap();
        first_x(a);
    };
    assert_eq!(count("SB with XCHG and LOCK: both old", &[one, other], |r| r[0].0 == 0 && r[1].0 == 0), 0);
}

#[test]
fn independent_reads_of_independent_writes() {
    let xy: Body = |a| {
        first_x(a);
        second_y(a);
    };
    let yx: Body = |a| {
        first_y(a);
        second_x(a);
    };
    let seen =
        count("IRIW: the two readers disagree", &[store_x, store_y, xy, yx], |r| r[2] == (1, 0) && r[3] == (1, 0));
    assert_eq!(seen, 0);
}

#[test]
fn locked_additions_are_not_lost() {
    // Aligned, across a line, across a page.
    for at in [0x8_1000u64, 0x8_103e, 0x8_1ffe] {
        let add: Body = match at {
            0x8_1000 => |a| _ = a.lock().add(dword_ptr(0x8_1000), 3),
            0x8_103e => |a| _ = a.lock().add(dword_ptr(0x8_103e), 3),
            _ => |a| _ = a.lock().add(dword_ptr(0x8_1ffe), 3),
        };
        for mode in [TranslateMode::On, TranslateMode::Off] {
            let memory = GuestMemory::with_ram(16 << 20, 0xc000_0000..1 << 32, false).unwrap();
            let options = EngineOptions { translate: mode, code_cache_bytes: 8 << 20, direct: DirectMode::Off };
            let mut b = Bench::with_options(&SoftEngine::new(), "x86-64-v2", 2, memory, options);
            for n in 0..2 {
                let place = CODE + 0x1000 * n;
                b.code(place, |a| program(a, n as u32, 2, add));
                let state = b.long_state(n as u32, place);
                b.vps[n as usize].set_state(&state).unwrap();
            }
            assert_eq!(b.run(LIMIT), 1);
            let sum: u32 = b.memory.read_plain(Gpa(at)).unwrap();
            assert_eq!(sum, 2 * 3 * ROUNDS, "{mode:?}, at {at:#x}");
        }
    }
}
