//! `viridian run` as a user starts it, with micro-guests: exit statuses, what the guest's reset does, signals, serial
//! targets, save and restore in another process.

mod common;

use common::{image, out, power_off, print};
use iced_x86::code_asm::*;
use rustix::process::{Pid, Signal, kill_process};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(60);

/// Prints "run", then counts for ever.
fn spinner(dir: &Path) -> PathBuf {
    image(dir, "spinner", |a| {
        print(a, "run\n")?;
        let mut top = a.create_label();
        a.set_label(&mut top)?;
        a.inc(rbx)?;
        a.jmp(top)
    })
}

fn viridian(kernel: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_viridian"));
    command.arg("run").arg("--kernel").arg(kernel).args(["--memory", "16M", "--engine", "soft"]);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn finish(mut child: Child) -> Output {
    let until = Instant::now() + LIMIT;
    while child.try_wait().unwrap().is_none() {
        if Instant::now() > until {
            let _ = child.kill();
            panic!("still runs after {LIMIT:?}: {:?}", child.wait_with_output());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    child.wait_with_output().unwrap()
}

fn run(mut command: Command) -> (i32, String, String) {
    let output = finish(command.spawn().unwrap());
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().expect("an exit status"), text(&output.stdout), text(&output.stderr))
}

/// Reads standard output up to and with a text.
fn wait_for(child: &mut Child, text: &str) {
    let stdout = child.stdout.as_mut().unwrap();
    let mut seen = Vec::new();
    while !seen.ends_with(text.as_bytes()) {
        let mut byte = [0];
        assert_eq!(stdout.read(&mut byte).unwrap(), 1, "output ended: {}", String::from_utf8_lossy(&seen));
        seen.push(byte[0]);
    }
}

fn signal(child: &Child, signal: Signal) {
    kill_process(Pid::from_raw(child.id() as i32).unwrap(), signal).unwrap();
}

#[test]
fn power_off_is_status_0_and_reset_boots_again() {
    let dir = tempfile::tempdir().unwrap();
    let kernel = image(dir.path(), "kernel", |a| {
        // A byte of CMOS memory, which a battery keeps, counts the boots.
        let mut last = a.create_label();
        out(a, 0x70, 0x60)?;
        a.mov(edx, 0x71)?;
        a.in_(al, dx)?;
        a.inc(al)?;
        a.out(dx, al)?;
        a.mov(bl, al)?;
        a.add(al, b'0' as i32)?;
        a.mov(edx, 0x3f8)?;
        a.out(dx, al)?;
        a.cmp(bl, 3)?;
        a.je(last)?;
        out(a, 0xcf9, 6)?;
        print(a, "not reached")?;
        a.set_label(&mut last)?;
        power_off(a)?;
        print(a, "nor this")
    });
    let mut command = viridian(&kernel);
    command.arg("--stats");
    let (status, text, errors) = run(command);
    assert_eq!((status, text.as_str()), (0, "123"), "{errors}");
    assert!(errors.contains("guest instructions:") && errors.contains("com1"), "{errors}");
}

#[test]
fn a_triple_fault_is_an_error_with_the_state() {
    let dir = tempfile::tempdir().unwrap();
    let kernel = image(dir.path(), "kernel", |a| {
        a.mov(rbx, 0x1234_5678_9abc_def0u64)?;
        // There is no interrupt table.
        a.ud2()
    });
    let (status, _, errors) = run(viridian(&kernel));
    assert_eq!(status, 1, "{errors}");
    for text in ["triple fault", "rbx 123456789abcdef0", "rip 000000000020000a", "bytes at rip: 0f 0b", "cr0 80000011"]
    {
        assert!(errors.contains(text), "{text} is not in: {errors}");
    }
}

/// Signals that a thread of the process blocks (proc(5)).
fn blocked_by(child: &Child, thread: &str) -> u64 {
    let field = |status: &str, name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        Some(line.trim().to_owned())
    };
    std::fs::read_dir(format!("/proc/{}/task", child.id()))
        .unwrap()
        .filter_map(|task| std::fs::read_to_string(task.unwrap().path().join("status")).ok())
        .find(|status| field(status, "Name:").as_deref() == Some(thread))
        .and_then(|status| u64::from_str_radix(&field(&status, "SigBlk:")?, 16).ok())
        .expect("there is such a thread")
}

#[test]
fn signals_end_it_with_their_status() {
    let dir = tempfile::tempdir().unwrap();
    let kernel = spinner(dir.path());
    for (which, status) in [(Signal::TERM, 143), (Signal::INT, 130), (Signal::HUP, 129)] {
        let mut child = viridian(&kernel).spawn().unwrap();
        wait_for(&mut child, "run\n");
        // The thread of a VP may not report a signal, so it must not be the one that gets it.
        let blocked = blocked_by(&child, "vp0");
        assert_ne!(blocked & 1 << (which.as_raw() - 1), 0, "VP 0 blocks {blocked:#x}");
        signal(&child, which);
        assert_eq!(finish(child).status.code(), Some(status));
    }
}

#[test]
fn serial_input_goes_to_file_and_socket() {
    let dir = tempfile::tempdir().unwrap();
    // Echoes each byte, plus one; ends on 'q'.
    let kernel = image(dir.path(), "kernel", |a| {
        let (mut top, mut done) = (a.create_label(), a.create_label());
        print(a, "ready ")?;
        a.set_label(&mut top)?;
        a.mov(edx, 0x3fd)?;
        a.in_(al, dx)?;
        a.test(al, 1)?;
        a.je(top)?;
        a.mov(edx, 0x3f8)?;
        a.in_(al, dx)?;
        a.cmp(al, b'q' as i32)?;
        a.je(done)?;
        a.inc(al)?;
        a.out(dx, al)?;
        a.jmp(top)?;
        a.set_label(&mut done)?;
        power_off(a)
    });
    // Standard input is a pipe: the escape byte is a byte like any other.
    let mut command = viridian(&kernel);
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"HAL\x1dq").unwrap();
    let output = finish(child);
    assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(0), b"ready IBM\x1e".as_slice()));

    let socket = dir.path().join("serial");
    let mut command = viridian(&kernel);
    let child = command.arg("--serial").arg(format!("unix:{}", socket.display())).spawn().unwrap();
    let until = Instant::now() + LIMIT;
    let mut client = loop {
        match UnixStream::connect(&socket) {
            Ok(client) => break client,
            Err(_) => assert!(Instant::now() < until, "no socket"),
        }
    };
    client.write_all(b"HAL").unwrap();
    let mut echo = Vec::new();
    while !echo.ends_with(b"IBM") {
        let mut byte = [0];
        client.read_exact(&mut byte).unwrap();
        echo.push(byte[0]);
    }
    client.write_all(b"q").unwrap();
    assert_eq!(finish(child).status.code(), Some(0));
    assert!(!socket.exists(), "the socket goes away");

    let kernel = image(dir.path(), "short", |a| {
        print(a, "to the file\n")?;
        power_off(a)
    });
    let file = dir.path().join("log");
    let mut command = viridian(&kernel);
    command.arg("--serial").arg(format!("file:{}", file.display()));
    let (status, text, _) = run(command);
    assert_eq!((status, text.as_str()), (0, ""));
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "to the file\n");
}

#[test]
fn a_saved_machine_goes_on_in_another_process() {
    let dir = tempfile::tempdir().unwrap();
    // Sums 0 to 6e7 (which takes a while) and prints "ok" if the sum is right.
    let kernel = image(dir.path(), "kernel", |a| {
        let (mut top, mut bad) = (a.create_label(), a.create_label());
        let count = 60_000_000u64;
        print(a, "run\n")?;
        a.xor(eax, eax)?;
        a.xor(ecx, ecx)?;
        a.mov(rsi, count)?;
        a.set_label(&mut top)?;
        a.inc(rcx)?;
        a.add(rax, rcx)?;
        a.cmp(rcx, rsi)?;
        a.jne(top)?;
        a.mov(rbx, count * (count + 1) / 2)?;
        a.cmp(rax, rbx)?;
        a.jne(bad)?;
        print(a, "ok")?;
        a.set_label(&mut bad)?;
        power_off(a)
    });
    let state = dir.path().join("state");
    let mut command = viridian(&kernel);
    command.args(["--processors", "2", "--save"]).arg(&state);
    let mut child = command.spawn().unwrap();
    wait_for(&mut child, "run\n");
    signal(&child, Signal::USR1);
    let output = finish(child);
    assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(0), b"".as_slice()), "{output:?}");
    // The kernel is not needed any more.
    std::fs::remove_file(&kernel).unwrap();
    let restore = |state: &Path| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_viridian"));
        command.args(["run", "--engine", "soft", "--restore"]).arg(state);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        run(command)
    };
    assert_eq!(restore(&state), (0, "ok".into(), String::new()));
    assert_eq!(restore(&state).1, "ok", "as often as one likes");
    let mut bytes = std::fs::read(&state).unwrap();
    let at = bytes.len() - 100;
    bytes[at] ^= 1;
    std::fs::write(&state, bytes).unwrap();
    let (status, _, errors) = restore(&state);
    assert!(status == 2 && errors.starts_with("error: ") && errors.contains("damaged"), "{status}: {errors}");
    std::fs::write(&state, "something else").unwrap();
    assert_eq!(restore(&state).0, 2);
}
