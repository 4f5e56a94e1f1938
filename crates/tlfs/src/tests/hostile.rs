//! A guest that does anything: registers, hypercalls, time, in any order.

use super::*;
use fuzzing::Rng;
use std::time::Duration;

/// Calls that are known, by their codes.
const CODES: [u64; 12] = [2, 3, 8, 0xb, 0x13, 0x14, 0x15, 0x5c, 0x5d, 0x99, 0x9a, 0x8001];
const REGISTERS: [u32; 11] = [
    msr::GUEST_OS_ID,
    msr::HYPERCALL,
    msr::REFERENCE_TSC,
    msr::SCONTROL,
    msr::SIMP,
    msr::SIEFP,
    msr::EOM,
    msr::CRASH_CTL,
    msr::VP_ASSIST_PAGE,
    msr::CRASH_P0 + 3,
    msr::CRASH_P4,
];

/// MSR numbers with a bias to those that exist.
fn any_msr(rng: &mut Rng) -> u32 {
    match rng.below(9) {
        0..4 => rng.pick(&REGISTERS),
        4..8 => msr::SINT0 + rng.below(u64::from(msr::STIMER3_COUNT - msr::SINT0) + 1) as u32,
        _ => 0x4000_0000 + rng.below(0x2000) as u32,
    }
}

/// Numbers with a bias to addresses of pages, enabled.
fn any_value(rng: &mut Rng) -> u64 {
    match rng.below(4) {
        0 => rng.next(),
        1 => rng.below(0x20_0000),
        2 => (rng.below(0x110) << 12) | 1,
        _ => rng.odd(),
    }
}

fn hypercall(w: &World, vp: VpIndex, rng: &mut Rng) {
    let code = if rng.one_in(16) { rng.next() & 0xffff } else { rng.pick(&CODES) };
    let control = match rng.below(3) {
        0 => rng.next() & !0xffff,
        1 => reps(rng.below(64), rng.below(8)),
        _ => (FAST * rng.below(2)) | (rng.below(32) << 17),
    };
    let mut input = any_value(rng);
    if rng.one_in(2) {
        input &= 0xf_fff8;
    }
    let words_in: Vec<u64> = (0..rng.below(40)).map(|_| any_value(rng)).collect();
    let _ = w.memory.write(Gpa(input), &words(&words_in));
    let mut caller = Caller::new(control | code, input, any_value(rng));
    caller.xmm = std::array::from_fn(|_| (u128::from(any_value(rng)) << 64) | u128::from(any_value(rng)));
    caller.long = !rng.one_in(4);
    // A restart makes progress, so that it ends.
    let mut turns = 0;
    while w.hv.hypercall(vp, &mut caller) == HypercallOutcome::Restart {
        turns += 1;
        assert!(turns < 4096, "{caller:x?}");
    }
}

#[test]
fn no_guest_breaks_us() {
    fuzzing::rounds("hypercalls and registers", Duration::from_secs(2), |rng| {
        let w = world();
        w.enable_hypercalls();
        for _ in 0..1 + rng.below(100) {
            let vp = rng.below(4) as u32;
            match rng.below(6) {
                0 | 1 => {
                    w.hv.msr_write(vp, any_msr(rng), any_value(rng));
                }
                2 => {
                    w.hv.msr_read(vp, any_msr(rng));
                }
                3 => hypercall(&w, vp, rng),
                4 => {
                    let _ = w.hv.post_message(vp, rng.next() as u8, message(any_value(rng)));
                    w.hv.signal_event(vp, rng.next() as u8, rng.next() as u16);
                }
                _ => {
                    w.clock.set(any_value(rng) >> 8);
                    w.hv.timer_expired(TimerId { vp, timer: rng.next() as u8 });
                }
            }
            *w.seen.full.lock().unwrap() = rng.one_in(4);
        }
        let state = w.hv.save();
        assert!(w.hv.restore(&state).is_ok());
    });
}
