//! `viridian vm connect`: the serial console of a running VM on this terminal.

use crate::failure::{Failure, Outcome};
use rustix::event::{PollFd, PollFlags, poll};
use std::io::{IsTerminal, Read, Write};
use std::os::unix::net::UnixStream;
use worker::terminal::{ESCAPE, RawTerminal};

/// How a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The user left.
    Detached,
    /// The other side is gone.
    Machine,
}

/// Passes bytes to and fro until the machine ends or the key that leaves is pressed. Standard input that is no terminal
/// may end without ending the connection.
pub fn console(mut stream: UnixStream, first: &[u8]) -> Result<Ended, Failure> {
    let failed = |what: &str, e: &dyn std::fmt::Display| Failure::host(format!("the console: {what}: {e}"));
    let person = std::io::stdin().is_terminal();
    let _raw = RawTerminal::enter().map_err(|e| failed("preparing the terminal", &e))?;
    let mut out = std::io::stdout().lock();
    let mut show = |bytes: &[u8]| out.write_all(bytes).and_then(|()| out.flush());
    show(first).map_err(|e| failed("writing", &e))?;
    let stdin = std::io::stdin();
    let mut typing = true;
    let mut buffer = [0; 4096];
    loop {
        let mut waits = vec![PollFd::new(&stream, PollFlags::IN)];
        if typing {
            waits.push(PollFd::new(&stdin, PollFlags::IN));
        }
        match poll(&mut waits, None) {
            Err(rustix::io::Errno::INTR) => continue,
            other => other.map_err(|e| failed("waiting", &e))?,
        };
        let ready: Vec<bool> = waits.iter().map(|w| !w.revents().is_empty()).collect();
        if ready[0] {
            match stream.read(&mut buffer) {
                Ok(0) => return Ok(Ended::Machine),
                Ok(count) => show(&buffer[..count]).map_err(|e| failed("writing", &e))?,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(_) => return Ok(Ended::Machine),
            }
        }
        if typing && ready.get(1) == Some(&true) {
            let count = rustix::io::read(&stdin, &mut buffer).map_err(|e| failed("reading", &e))?;
            if count == 0 {
                typing = false;
                if person {
                    return Ok(Ended::Detached);
                }
                continue;
            }
            let bytes = &buffer[..count];
            // Only a person has a key to press; a pipe may carry any byte.
            let leave = bytes.iter().position(|b| person && *b == ESCAPE);
            if stream.write_all(&bytes[..leave.unwrap_or(count)]).is_err() {
                return Ok(Ended::Machine);
            }
            if leave.is_some() {
                return Ok(Ended::Detached);
            }
        }
    }
}

/// Connects to a VM.
pub fn vm(vm: &vmms::Vm, history: bool) -> Outcome {
    let status = vm.status(std::time::Duration::from_secs(5));
    if let Some(trouble) = &status.trouble {
        eprintln!("note: {trouble}");
    }
    if status.record.is_none() {
        return Err(vm.wrong_state(status.state, "start it first").into());
    }
    let (stream, first) = vm.client().console(history)?;
    let label = vm.label();
    if std::io::stdin().is_terminal() {
        eprintln!("Connected to '{label}'; Ctrl-] leaves, and the VM runs on.");
    }
    match console(stream, &first)? {
        Ended::Detached => eprintln!("\nLeft; '{label}' runs on."),
        Ended::Machine => {
            vm.await_end(std::time::Duration::from_secs(5));
            // What became of it is in its log, or noticed now.
            let _ = vm.status(std::time::Duration::from_secs(1));
            let last = vm.events().read().ok().and_then(|(events, _)| events.last().cloned());
            let how = last.map_or_else(String::new, |e| format!(": {}", e.message.lines().next().unwrap_or("")));
            eprintln!("\n'{label}' has ended{how}");
        }
    }
    Ok(())
}
