//! The serial console of a machine without a terminal: it remembers the end of what the guest wrote, and several people
//! may look on and type.

use chipset::serial::{SerialBackend, SerialReceiver};
use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Weak};
use std::time::{Duration, Instant};

/// Bytes of the guest's output that are kept for who comes later.
const HISTORY: usize = 64 << 10;
/// How long typed bytes wait for a guest that does not take them.
const INPUT_TIME: Duration = Duration::from_secs(30);

#[derive(Default)]
struct Output {
    kept: VecDeque<u8>,
    /// Bytes that were written in all: the place of the end of `kept`.
    written: u64,
    /// Clients, by the place up to which they have read.
    readers: Vec<(u64, u64)>,
    next_reader: u64,
    ended: bool,
}

/// A serial port's other end ([`SerialBackend`]). The guest never waits for a reader: who is slow loses bytes.
#[derive(Default)]
pub struct Console {
    output: Mutex<Output>,
    changed: Condvar,
    port: Mutex<Option<Weak<dyn SerialReceiver>>>,
}

impl Console {
    /// A console without output.
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    fn output(&self) -> MutexGuard<'_, Output> {
        self.output.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Lets a client have the console until it goes away or the machine ends. `typed` has come already.
    pub fn serve(self: &Arc<Self>, client: &UnixStream, typed: &[u8], history: bool) {
        let Ok(writer) = client.try_clone() else { return };
        let (number, from) = {
            let mut output = self.output();
            let from = if history { output.written - output.kept.len() as u64 } else { output.written };
            let number = output.next_reader;
            output.next_reader += 1;
            output.readers.push((number, from));
            (number, from)
        };
        let this = self.clone();
        let thread = std::thread::Builder::new().name("console-out".into()).spawn(move || {
            this.pass_on(&writer, number, from);
            // Wakes the thread that reads.
            let _ = writer.shutdown(std::net::Shutdown::Both);
        });
        if let Ok(thread) = thread {
            self.take_input(client, typed);
            self.output().readers.retain(|(n, _)| *n != number);
            self.changed.notify_all();
            let _ = client.shutdown(std::net::Shutdown::Both);
            let _ = thread.join();
        }
        self.output().readers.retain(|(n, _)| *n != number);
    }

    /// Writes output to a client until it is gone or the console has ended.
    fn pass_on(&self, mut client: &UnixStream, number: u64, mut place: u64) {
        loop {
            let bytes: Vec<u8> = {
                let mut output = self.output();
                loop {
                    let Some(reader) = output.readers.iter_mut().find(|(n, _)| *n == number) else { return };
                    reader.1 = place;
                    if output.written > place {
                        break;
                    }
                    if output.ended {
                        return;
                    }
                    output = self.changed.wait(output).unwrap_or_else(|e| e.into_inner());
                }
                // Bytes that are no longer there are lost for this reader.
                let first = output.written - output.kept.len() as u64;
                let skip = place.saturating_sub(first) as usize;
                place = output.written;
                output.kept.iter().skip(skip).copied().collect()
            };
            if client.write_all(&bytes).is_err() {
                return;
            }
            self.changed.notify_all();
        }
    }

    fn take_input(&self, mut client: &UnixStream, typed: &[u8]) {
        self.feed(typed);
        let mut buffer = [0; 1024];
        loop {
            match client.read(&mut buffer) {
                Ok(0) => return,
                Ok(count) => self.feed(&buffer[..count]),
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    }

    fn feed(&self, mut bytes: &[u8]) {
        let until = Instant::now() + INPUT_TIME;
        while !bytes.is_empty() && Instant::now() < until {
            let port = self.port.lock().unwrap_or_else(|e| e.into_inner()).as_ref().and_then(Weak::upgrade);
            let Some(port) = port else { return };
            let taken = port.receive(bytes);
            bytes = &bytes[taken..];
            if taken == 0 {
                std::thread::sleep(Duration::from_millis(2));
            }
        }
    }

    /// No more output comes: clients are let go when they have it all, at most after `limit`.
    pub fn end(&self, limit: Duration) {
        let until = Instant::now() + limit;
        let mut output = self.output();
        output.ended = true;
        self.changed.notify_all();
        while !output.readers.is_empty() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            output = self.changed.wait_timeout(output, left).unwrap_or_else(|e| e.into_inner()).0;
        }
    }
}

impl SerialBackend for Console {
    fn transmit(&self, byte: u8) -> bool {
        let mut output = self.output();
        if output.kept.len() == HISTORY {
            output.kept.pop_front();
        }
        output.kept.push_back(byte);
        output.written += 1;
        let watched = !output.readers.is_empty();
        drop(output);
        if watched {
            self.changed.notify_all();
        }
        true
    }

    fn attach(&self, port: Weak<dyn SerialReceiver>) {
        *self.port.lock().unwrap_or_else(|e| e.into_inner()) = Some(port);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[derive(Default)]
    struct Port {
        got: Mutex<Vec<u8>>,
        calls: AtomicUsize,
    }

    impl SerialReceiver for Port {
        fn receive(&self, data: &[u8]) -> usize {
            // Takes one byte at a time, and none at every second call.
            if self.calls.fetch_add(1, Ordering::SeqCst) % 2 == 1 {
                return 0;
            }
            self.got.lock().unwrap().push(data[0]);
            1
        }
        fn receive_break(&self) {}
        fn transmit_ready(&self) {}
        fn connection(&self, _: bool) {}
    }

    #[test]
    fn history_then_live_then_the_end() {
        let console = Console::new();
        let port = Arc::new(Port::default());
        let weak: Weak<Port> = Arc::downgrade(&port);
        console.attach(weak);
        b"before ".iter().for_each(|b| assert!(console.transmit(*b)));
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let server = {
            let console = console.clone();
            std::thread::spawn(move || console.serve(&theirs, b"ab", true))
        };
        ours.write_all(b"c").unwrap();
        let mut seen = [0; 7];
        ours.read_exact(&mut seen).unwrap();
        assert_eq!(&seen, b"before ");
        b"after".iter().for_each(|b| assert!(console.transmit(*b)));
        let mut seen = [0; 5];
        ours.read_exact(&mut seen).unwrap();
        assert_eq!(&seen, b"after");
        let until = Instant::now() + Duration::from_secs(10);
        while port.got.lock().unwrap().as_slice() != b"abc" {
            assert!(Instant::now() < until, "typed bytes do not arrive");
            std::thread::sleep(Duration::from_millis(1));
        }
        console.end(Duration::from_secs(10));
        assert_eq!(ours.read(&mut seen).unwrap(), 0, "the client hears of the end");
        server.join().unwrap();
    }

    #[test]
    fn nobody_holds_the_guest_up() {
        let console = Console::new();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let server = {
            let console = console.clone();
            std::thread::spawn(move || console.serve(&theirs, b"", false))
        };
        // The client reads nothing: far more than the socket holds.
        for i in 0..(4 << 20) {
            assert!(console.transmit(i as u8));
        }
        assert_eq!(console.output().kept.len(), HISTORY);
        drop(ours);
        server.join().unwrap();
        assert!(console.output().readers.is_empty());
    }
}
