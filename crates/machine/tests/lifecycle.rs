//! A machine's life with a scripted engine: what the guest does to devices becomes an event, pausing waits for all VPs,
//! reset reloads, a saved machine goes on in another.

mod common;

use common::{FakeEngine, Script};
use partition::{EngineError, EngineOptions, Gpa, RunExit};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use viridian_machine::boot::BootFiles;
use viridian_machine::config::EntryMode;
use viridian_machine::machine::Parts;
use viridian_machine::{BootSource, Event, Machine, MachineConfig, Serial, save};
use x86::cpuid::CpuidTable;

const IMAGE: [u8; 4] = [0xeb, 0xfe, 0x12, 0x34];

fn config(processors: u32) -> MachineConfig {
    MachineConfig {
        memory_bytes: 4 << 20,
        processors,
        cpu_model: "none".into(),
        hyperv: false,
        storage: Vec::new(),
        boot: BootSource::Flat { image: IMAGE.to_vec(), address: 0x8000, mode: EntryMode::Real },
    }
}

fn make(config: MachineConfig, script: Script) -> (Machine, Receiver<Event>) {
    let (sender, events) = channel();
    let sender = Mutex::new(sender);
    let parts = Parts {
        engine: &FakeEngine(script),
        options: EngineOptions::default(),
        cpuid: vec![CpuidTable::default(); config.processors as usize],
        serial: Serial::default(),
        debug: None,
        guest_interface: None,
        generation2: Vec::new(),
        vp_started: None,
        base: None,
        boot: BootFiles::default(),
        events: Arc::new(move |event| drop(sender.lock().unwrap().send(event))),
    };
    (Machine::new(config, parts).unwrap(), events)
}

fn event(events: &Receiver<Event>) -> Event {
    events.recv_timeout(Duration::from_secs(20)).expect("an event")
}

fn idle() -> Script {
    Arc::new(|_, _, _| None)
}

#[test]
fn a_machine_is_made_when_all_vps_are_prepared() {
    let (machine, _events) = make(config(4), idle());
    let counters = machine.engine_stats().counters;
    assert!(counters.contains(&("prepared", 4)), "{counters:?}");
}

#[test]
fn power_off_and_reset_come_as_events() {
    let calls = Arc::new(AtomicU32::new(0));
    let count = calls.clone();
    let script: Script = Arc::new(move |vp, exits, _| {
        if vp == 1 {
            match count.fetch_add(1, Ordering::SeqCst) {
                0 => exits.io_write(vp, 0xcf9, &[6]),
                5 => exits.io_write(vp, 0x404, &(5u16 << 10 | 1 << 13).to_le_bytes()),
                _ => {}
            }
        }
        None
    });
    let (machine, events) = make(config(2), script);
    machine.boot().unwrap();
    machine.resume().unwrap();
    assert!(matches!(event(&events), Event::Reset));
    machine.pause().unwrap();
    assert_eq!(calls.load(Ordering::SeqCst), 1, "the VP stops before its next instruction");
    // What the guest did to its image is undone, and the VPs begin anew.
    machine.memory().write(Gpa(0x8000), &[0; 4]).unwrap();
    machine.reset().unwrap();
    assert_eq!(machine.memory().read_plain::<[u8; 4]>(Gpa(0x8000)).unwrap(), IMAGE);
    assert_eq!(machine.vp_state(0).unwrap().rip, 0);
    assert_eq!(machine.vp_state(0).unwrap().segments[1].base, 0x8000);
    let tsc = machine.clock().tsc();
    assert!(tsc > 0, "the clock goes on over a reset");
    assert_eq!(machine.vp_state(1).unwrap().msr(x86::msr::TSC), Some(tsc), "and the TSCs with it");
    machine.resume().unwrap();
    assert!(matches!(event(&events), Event::PowerOff));
    machine.pause().unwrap();
    let stood = machine.clock().tsc();
    std::thread::sleep(Duration::from_millis(5));
    assert_eq!(machine.clock().tsc(), stood, "the clock stands");
}

#[test]
fn faults_of_guest_and_engine_are_told_apart() {
    let (machine, events) = make(config(1), Arc::new(|_, _, _| Some(Ok(RunExit::TripleFault))));
    machine.boot().unwrap();
    machine.resume().unwrap();
    assert!(matches!(event(&events), Event::TripleFault(0)));
    machine.pause().unwrap();
    let text = machine.describe_vp(0).unwrap();
    assert!(text.contains("bytes at rip: eb fe 12 34"), "{text}");

    let broken = || EngineError::Internal { vp: 0, what: "broken".into() };
    let (machine, events) = make(config(1), Arc::new(move |_, _, _| Some(Err(broken()))));
    machine.boot().unwrap();
    machine.resume().unwrap();
    assert!(matches!(event(&events), Event::EngineFailed(_)));
    machine.pause().unwrap();

    let (machine, events) = make(config(2), Arc::new(|vp, _, _| if vp == 1 { panic!("on purpose") } else { None }));
    machine.boot().unwrap();
    machine.resume().unwrap();
    match event(&events) {
        Event::EngineFailed(error) => assert!(error.to_string().contains("on purpose"), "{error}"),
        other => panic!("{other:?}"),
    }
    machine.pause().unwrap();
}

fn counter(machine: &Machine, name: &str) -> u64 {
    machine.engine_stats().counters.iter().find(|(n, _)| *n == name).unwrap().1
}

/// Runs until the condition holds.
fn wait(what: &str, mut condition: impl FnMut() -> bool) {
    let until = std::time::Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(std::time::Instant::now() < until, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Programs PIT and I/O APIC on the first call: 100 Hz on vector 0x30.
fn timer_script() -> Script {
    let first = AtomicU32::new(0);
    Arc::new(move |vp, exits, _| {
        if first.fetch_add(1, Ordering::SeqCst) == 0 {
            for (index, value) in [(0x15u8, 0u32), (0x14, 0x30)] {
                exits.mmio_write(vp, Gpa(0xfec0_0000), &[index]);
                exits.mmio_write(vp, Gpa(0xfec0_0010), &value.to_le_bytes());
            }
            for (port, value) in [(0x43u16, 0x34u8), (0x40, 0x9c), (0x40, 0x2e)] {
                exits.io_write(vp, port, &[value]);
            }
        }
        None
    })
}

#[test]
fn timers_run_with_the_machine_and_go_on_elsewhere() {
    let (machine, _events) = make(config(2), timer_script());
    machine.boot().unwrap();
    machine.resume().unwrap();
    wait("ten timer interrupts", || counter(&machine, "msis") >= 10);
    machine.pause().unwrap();
    let before = counter(&machine, "msis");
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(counter(&machine, "msis"), before, "none while it is paused");

    machine.memory().write(Gpa(0x10_0000), b"remember").unwrap();
    let mut file = Vec::new();
    machine.save(&mut file).unwrap();
    let (rip, tsc) = (machine.vp_state(1).unwrap().rip, machine.clock().tsc());

    let mut input = file.as_slice();
    let header = save::read_header(&mut input).unwrap();
    let (other, _events) = make(header.config.clone(), idle());
    other.restore(&header, input).unwrap();
    assert_eq!((other.vp_state(1).unwrap().rip, other.clock().tsc()), (rip, tsc));
    assert_eq!(&other.memory().read_plain::<[u8; 8]>(Gpa(0x10_0000)).unwrap(), b"remember");
    let mut again = Vec::new();
    other.save(&mut again).unwrap();
    assert!(again == file, "saved again, it is the same file");
    other.resume().unwrap();
    wait("timer interrupts after the restore", || counter(&other, "msis") >= 10);
    other.pause().unwrap();
}

#[test]
fn states_that_do_not_fit_are_refused() {
    let (machine, _events) = make(config(2), idle());
    machine.boot().unwrap();
    let mut file = Vec::new();
    machine.save(&mut file).unwrap();
    let mut memory = file.as_slice();
    let good = save::read_header(&mut memory).unwrap();
    let refuse = |header: &save::Header| {
        let (other, _events) = make(config(2), idle());
        other.restore(header, memory).expect_err("refused").to_string()
    };
    let mut header = good.clone();
    header.vps.pop();
    assert!(refuse(&header).contains("1 processor states"));
    let mut header = good.clone();
    header.devices.remove("pit");
    assert!(refuse(&header).contains("pit"));
    let mut header = good.clone();
    header.devices.get_mut("pic").unwrap().version = 7;
    assert!(refuse(&header).contains("version 7"));
    let mut header = good.clone();
    header.tsc_hz *= 2;
    assert!(refuse(&header).contains("Hz"));
    let mut header = good.clone();
    header.cpuid[0].set(1, None, Default::default());
    assert!(refuse(&header).contains("model"));
}

#[test]
fn the_external_interrupt_reaches_the_processor() {
    let vector = Arc::new(AtomicU32::new(0));
    let (taken, first) = (vector.clone(), AtomicU32::new(0));
    let script: Script = Arc::new(move |vp, exits, _| {
        if first.fetch_add(1, Ordering::SeqCst) == 0 {
            for (port, value) in [(0x20u16, 0x11u8), (0x21, 0x40), (0x21, 4), (0x21, 1), (0x21, 0xef)] {
                exits.io_write(vp, port, &[value]);
            }
            // COM1: OUT2, transmitter-empty interrupt.
            exits.io_write(vp, 0x3fc, &[8]);
            exits.io_write(vp, 0x3f9, &[2]);
        } else if let Some(v) = exits.acknowledge_extint(vp) {
            taken.store(v.into(), Ordering::SeqCst);
        }
        None
    });
    let (machine, _events) = make(config(1), script);
    machine.boot().unwrap();
    machine.resume().unwrap();
    wait("the interrupt", || vector.load(Ordering::SeqCst) != 0);
    assert_eq!(vector.load(Ordering::SeqCst), 0x44);
    wait("the line falls", || counter(&machine, "extint") == 0);
    machine.pause().unwrap();
}

#[test]
fn nonsense_configurations_are_refused() {
    for (memory, processors) in [(0, 1), (1 << 20, 1), ((4 << 20) + 1, 1), (1 << 40, 1), (4 << 20, 0), (4 << 20, 65)] {
        let config = MachineConfig { memory_bytes: memory, ..config(processors) };
        let base = viridian_machine::machine::Base::new(&config, false);
        assert!(base.is_err(), "{memory} bytes, {processors} processors");
    }
}
