//! The other end of a serial port: where its bytes go and come from.
//!
//! A backend never blocks the VP that writes: what it cannot pass on at once it queues, up to a bound, and then says that
//! it is full; the port then shows a busy transmitter.

use crate::lock;
use std::collections::VecDeque;
use std::io::{Read, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::time::{Duration, Instant};

/// Bytes that a stream backend queues for a slow reader.
const OUTPUT_QUEUE: usize = 64 << 10;

/// The port's side, as a backend sees it. No call may be made from inside [`SerialBackend::transmit`].
pub trait SerialReceiver: Send + Sync {
    /// Bytes have come in; says how many were taken. The rest is to be offered again later.
    fn receive(&self, data: &[u8]) -> usize;
    /// A break has come in.
    fn receive_break(&self);
    /// The backend has room again after it was full.
    fn transmit_ready(&self);
    /// Somebody has connected or gone away: the modem lines follow.
    fn connection(&self, connected: bool);
}

/// The other end of a serial port.
pub trait SerialBackend: Send + Sync {
    /// Takes a byte, or says that there is no room ([`SerialReceiver::transmit_ready`] follows). Called with the port's
    /// lock held: it must not block and must not call the port.
    fn transmit(&self, byte: u8) -> bool;
    /// The guest sends a break.
    fn send_break(&self) {}
    /// Is anybody there?
    fn connected(&self) -> bool {
        true
    }
    /// Makes the port known.
    fn attach(&self, port: Weak<dyn SerialReceiver>);
    /// Waits until what was taken has been passed on, at most this long.
    fn flush(&self, _timeout: Duration) {}
}

/// Nothing is plugged in: bytes vanish.
pub struct NullBackend;

impl SerialBackend for NullBackend {
    fn transmit(&self, _byte: u8) -> bool {
        true
    }
    fn connected(&self) -> bool {
        false
    }
    fn attach(&self, _port: Weak<dyn SerialReceiver>) {}
}

/// Keeps what the guest writes, up to a bound.
pub struct MemoryBackend {
    limit: usize,
    bytes: Mutex<VecDeque<u8>>,
}

impl MemoryBackend {
    /// A backend that holds at most `limit` bytes.
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { limit, bytes: Mutex::default() })
    }

    /// Takes what has come.
    pub fn take(&self) -> Vec<u8> {
        lock(&self.bytes).drain(..).collect()
    }
}

impl SerialBackend for MemoryBackend {
    fn transmit(&self, byte: u8) -> bool {
        let mut bytes = lock(&self.bytes);
        let room = bytes.len() < self.limit;
        if room {
            bytes.push_back(byte);
        }
        room
    }
    fn attach(&self, _port: Weak<dyn SerialReceiver>) {}
}

#[derive(Default)]
struct Output {
    queue: VecDeque<u8>,
    /// A byte was refused: the port must be told when there is room.
    refused: bool,
    writing: bool,
    ended: bool,
}

/// A byte stream: what the guest writes goes to a writer, on a thread of its own, and somebody feeds input
/// ([`StreamBackend::input`]).
pub struct StreamBackend {
    output: Mutex<Output>,
    changed: Condvar,
    port: Mutex<Option<Weak<dyn SerialReceiver>>>,
    connected: AtomicBool,
    /// Output without anybody connected is dropped.
    closed: AtomicBool,
}

impl StreamBackend {
    /// A backend that writes to `writer`.
    pub fn new(writer: impl Write + Send + 'static) -> std::io::Result<Arc<Self>> {
        let backend = Self::unconnected(true);
        backend.spawn_writer(writer)?;
        Ok(backend)
    }

    /// A backend that writes to a file, which is created or emptied.
    pub fn file(path: &Path) -> std::io::Result<Arc<Self>> {
        Self::new(std::fs::File::create(path)?)
    }

    fn unconnected(connected: bool) -> Arc<Self> {
        Arc::new(Self {
            output: Mutex::default(),
            changed: Condvar::new(),
            port: Mutex::default(),
            connected: AtomicBool::new(connected),
            closed: AtomicBool::new(!connected),
        })
    }

    fn spawn_writer(self: &Arc<Self>, writer: impl Write + Send + 'static) -> std::io::Result<()> {
        let this = self.clone();
        std::thread::Builder::new().name("serial-out".into()).spawn(move || this.write_all(writer))?;
        Ok(())
    }

    /// A backend behind a Unix socket at `path`, for one client after the other. The path must not exist. What the guest
    /// writes while no client is connected is lost, as on a cable that is not plugged in.
    pub fn unix_socket(path: &Path) -> std::io::Result<Arc<Self>> {
        let listener = std::os::unix::net::UnixListener::bind(path)?;
        let backend = Self::unconnected(false);
        let this = backend.clone();
        std::thread::Builder::new().name("serial-socket".into()).spawn(move || {
            for client in listener.incoming() {
                let Ok(client) = client else {
                    // Out of descriptors, for example: try again later, without a busy loop.
                    std::thread::sleep(Duration::from_millis(100));
                    continue;
                };
                this.serve(client);
            }
        })?;
        Ok(backend)
    }

    fn serve(self: &Arc<Self>, client: std::os::unix::net::UnixStream) {
        let Ok(writer) = client.try_clone() else { return };
        {
            let mut output = lock(&self.output);
            output.queue.clear();
            output.ended = false;
        }
        self.closed.store(false, Ordering::SeqCst);
        let this = self.clone();
        let thread = std::thread::Builder::new().name("serial-out".into()).spawn(move || this.write_all(writer));
        self.set_connected(true);
        self.input(client);
        self.closed.store(true, Ordering::SeqCst);
        lock(&self.output).ended = true;
        self.changed.notify_all();
        if let Ok(thread) = thread {
            let _ = thread.join();
        }
        self.set_connected(false);
    }

    fn set_connected(&self, connected: bool) {
        self.connected.store(connected, Ordering::SeqCst);
        if let Some(port) = self.receiver() {
            port.connection(connected);
        }
    }

    fn receiver(&self) -> Option<Arc<dyn SerialReceiver>> {
        lock(&self.port).as_ref().and_then(Weak::upgrade)
    }

    /// Feeds everything that `reader` gives to the port; returns at its end. Call it on a thread of its own.
    pub fn input(&self, mut reader: impl Read) {
        let mut buffer = [0; 1024];
        loop {
            match reader.read(&mut buffer) {
                Ok(0) => return,
                Ok(count) => self.feed(&buffer[..count]),
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    }

    /// Feeds bytes to the port, as fast as it takes them.
    pub fn feed(&self, mut data: &[u8]) {
        while !data.is_empty() {
            let Some(port) = self.receiver() else {
                if lock(&self.port).is_some() {
                    return; // it has gone
                }
                // A client may be here before the machine is.
                std::thread::sleep(Duration::from_millis(2));
                continue;
            };
            let taken = port.receive(data);
            data = &data[taken..];
            if taken == 0 {
                std::thread::sleep(Duration::from_millis(2));
            }
        }
    }

    fn write_all(&self, mut writer: impl Write) {
        let mut output = lock(&self.output);
        loop {
            if output.queue.is_empty() {
                if output.ended {
                    return;
                }
                output = self.changed.wait(output).unwrap_or_else(|e| e.into_inner());
                continue;
            }
            let bytes: Vec<u8> = output.queue.drain(..).collect();
            let refused = std::mem::take(&mut output.refused);
            output.writing = true;
            drop(output);
            if refused && let Some(port) = self.receiver() {
                port.transmit_ready();
            }
            let failed = writer.write_all(&bytes).and_then(|()| writer.flush()).is_err();
            output = lock(&self.output);
            output.writing = false;
            self.changed.notify_all();
            if failed {
                // The reader is gone (a closed pipe): the guest goes on, its output is lost.
                self.closed.store(true, Ordering::SeqCst);
                output.queue.clear();
                let refused = std::mem::take(&mut output.refused);
                drop(output);
                if refused && let Some(port) = self.receiver() {
                    port.transmit_ready();
                }
                return;
            }
        }
    }
}

impl SerialBackend for StreamBackend {
    fn transmit(&self, byte: u8) -> bool {
        if self.closed.load(Ordering::SeqCst) {
            return true;
        }
        let mut output = lock(&self.output);
        if output.queue.len() >= OUTPUT_QUEUE {
            output.refused = true;
            return false;
        }
        output.queue.push_back(byte);
        let wake = output.queue.len() == 1;
        drop(output);
        if wake {
            self.changed.notify_all();
        }
        true
    }

    fn connected(&self) -> bool {
        self.connected.load(Ordering::SeqCst)
    }

    fn attach(&self, port: Weak<dyn SerialReceiver>) {
        *lock(&self.port) = Some(port);
    }

    fn flush(&self, timeout: Duration) {
        let until = Instant::now() + timeout;
        let mut output = lock(&self.output);
        while (!output.queue.is_empty() || output.writing) && !self.closed.load(Ordering::SeqCst) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            output = self.changed.wait_timeout(output, left).unwrap_or_else(|e| e.into_inner()).0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    struct Port(Mutex<Vec<u8>>, AtomicBool);
    impl SerialReceiver for Port {
        fn receive(&self, data: &[u8]) -> usize {
            lock(&self.0).push(data[0]);
            1
        }
        fn receive_break(&self) {}
        fn transmit_ready(&self) {}
        fn connection(&self, connected: bool) {
            self.1.store(connected, Ordering::SeqCst);
        }
    }

    #[test]
    fn a_file_gets_every_byte() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        let backend = StreamBackend::file(&path).unwrap();
        let text: Vec<u8> = (0..10_000u32).map(|i| i as u8).collect();
        for byte in &text {
            while !backend.transmit(*byte) {
                std::thread::yield_now();
            }
        }
        backend.flush(Duration::from_secs(5));
        assert_eq!(std::fs::read(&path).unwrap(), text);
    }

    #[test]
    fn a_socket_serves_one_client_after_the_other() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("serial");
        let backend = StreamBackend::unix_socket(&path).unwrap();
        let port = Arc::new(Port(Mutex::default(), AtomicBool::new(false)));
        let receiver: Arc<dyn SerialReceiver> = port.clone();
        backend.attach(Arc::downgrade(&receiver));
        assert!(backend.transmit(b'?'), "lost, not refused");
        let until = Instant::now() + Duration::from_secs(10);
        let wait = |what: &dyn Fn() -> bool| {
            while !what() {
                assert!(Instant::now() < until, "timed out");
                std::thread::sleep(Duration::from_millis(1));
            }
        };
        for round in 0..2u8 {
            let mut client = UnixStream::connect(&path).unwrap();
            wait(&|| port.1.load(Ordering::SeqCst));
            backend.transmit(b'a' + round);
            let mut byte = [0];
            client.read_exact(&mut byte).unwrap();
            assert_eq!(byte[0], b'a' + round);
            client.write_all(b"xyz").unwrap();
            wait(&|| lock(&port.0).len() == 3);
            assert_eq!(*std::mem::take(&mut *lock(&port.0)), *b"xyz");
            drop(client);
            wait(&|| !port.1.load(Ordering::SeqCst));
        }
    }
}
