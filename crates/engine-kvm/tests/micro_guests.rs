//! The micro-guests on KVM: what they say of the architecture must hold there too. Skipped, with a message, where there
//! is no `/dev/kvm`.

use partition::EngineError;
use viridian_engine_kvm::{KvmEngine, kvm_is_usable};

/// KVM hands an unaligned device access over in one piece.
const NOT_ON_KVM: &[&str] = &["paging: devices see aligned pieces"];

/// What an emulated KVM (no VT-x or AMD-V behind it) does not do right: it executes guests by an instruction emulator without
/// far gates, task switches, privilege changes by SYSCALL, data breakpoints, or page-crossing checks. Nothing that
/// `engine-kvm` could change.
const NOT_ON_EMULATED_KVM: &[&str] = &[
    "paging: faults of the user",
    "paging: a crossing write touches nothing if the second page faults",
    "paging: PAE",
    "paging: 32-bit with 4 MiB pages",
    "control: an interrupt through IST switches and aligns the stack",
    "control: SYSCALL and SYSRET",
    "control: a 64-bit call gate to ring 0 and back",
    "control: IRET to ring 3 drops data segments that ring 3 may not have",
    "control: the shadow of STI holds for one instruction",
    "legacy: segment limits and expand-down segments",
    "legacy: a 32-bit call gate copies parameters",
    "legacy: virtual-8086 mode",
    "legacy: task switches by JMP, CALL, IRET and a task gate",
    "debug: a data breakpoint traps after the access",
    "debug: ICEBP and general detect",
    "debug: MOV SS holds single step back",
    "strings: a fault leaves the registers at the element",
    "system: control registers refuse what they must",
    "system: UMIP, TSD and privileged instructions at ring 3",
    "system: LDT, LAR, LSL, VERR, VERW",
    "system: POPF changes IF and IOPL only with the right",
    "system: SYSENTER and SYSEXIT in protected mode",
    "system: 16-bit gates and stacks",
];

#[test]
fn micro_guests() {
    let engine = match KvmEngine::new() {
        Ok(engine) => engine,
        Err(error @ EngineError::Unavailable { .. }) => {
            eprintln!("skipped: {error}");
            return;
        }
        Err(error) => panic!("{error}"),
    };
    let offers = KvmEngine::new().expect("it was there a moment ago");
    micro_guests::limit_model(move |table| offers.offered_part(&table).expect("KVM answers"));
    let mut failed = Vec::new();
    for (name, guest) in micro_guests::chapters::all() {
        if let Ok(only) = std::env::var("MICRO_GUEST")
            && !name.contains(&only)
        {
            continue;
        }
        if NOT_ON_KVM.contains(&name) || (!kvm_is_usable() && NOT_ON_EMULATED_KVM.contains(&name)) {
            println!("{name}: left out here");
            continue;
        }
        let start = std::time::Instant::now();
        let run = std::panic::AssertUnwindSafe(|| guest(&engine));
        let verdict = if std::panic::catch_unwind(run).is_ok() { "ok" } else { "FAILED" };
        println!("{name}: {verdict} ({} ms)", start.elapsed().as_millis());
        if verdict != "ok" {
            failed.push(name);
        }
    }
    assert!(failed.is_empty(), "{} micro-guests failed: {failed:#?}", failed.len());
}
