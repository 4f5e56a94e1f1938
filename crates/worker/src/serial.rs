//! What a serial port is plugged into.

use crate::terminal;
use chipset::serial::{SerialBackend, StreamBackend};
use std::io::Read;
use std::path::PathBuf;
use std::sync::Arc;

/// The other end of a serial port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SerialTarget {
    /// Standard input and output.
    Stdio,
    /// A file that gets the output.
    File(PathBuf),
    /// A Unix socket that is made at this path, for one client at a time.
    Unix(PathBuf),
}

impl std::str::FromStr for SerialTarget {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "stdio" => Ok(Self::Stdio),
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(path.into())),
            Some(("unix", path)) if !path.is_empty() => Ok(Self::Unix(path.into())),
            _ => Err("expected stdio, file:PATH or unix:PATH".into()),
        }
    }
}

impl std::fmt::Display for SerialTarget {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Stdio => write!(f, "stdio"),
            Self::File(path) => write!(f, "file:{}", path.display()),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// A plugged-in port: its backend, and what must be undone at the end.
pub struct Plugged {
    /// For the machine.
    pub backend: Arc<dyn SerialBackend>,
    /// Restores the terminal when it is dropped.
    pub terminal: Option<terminal::RawTerminal>,
    /// Standard input is to be read ([`read_stdin`]).
    input: Option<Arc<StreamBackend>>,
    socket: Option<PathBuf>,
}

impl Plugged {
    /// Plugs a port in. A terminal is made raw later ([`Plugged::start`]), so that errors until then look as usual.
    pub fn new(target: &SerialTarget) -> std::io::Result<Self> {
        let (backend, socket) = match target {
            SerialTarget::Stdio => (StreamBackend::new(std::io::stdout())?, None),
            SerialTarget::File(path) => (StreamBackend::file(path)?, None),
            SerialTarget::Unix(path) => (StreamBackend::unix_socket(path)?, Some(path.clone())),
        };
        let input = (*target == SerialTarget::Stdio).then(|| backend.clone());
        Ok(Self { backend, terminal: None, input, socket })
    }

    /// Gives the terminal to the guest and starts to read it. `escape` is called when the key that leaves was pressed.
    pub fn start(&mut self, escape: impl Fn() + Send + 'static) -> std::io::Result<()> {
        let Some(backend) = self.input.take() else { return Ok(()) };
        self.terminal = terminal::RawTerminal::enter()?;
        let is_terminal = self.terminal.is_some();
        std::thread::Builder::new()
            .name("serial-in".into())
            .spawn(move || read_stdin(&backend, is_terminal, &escape))?;
        Ok(())
    }
}

impl Drop for Plugged {
    fn drop(&mut self) {
        if let Some(path) = &self.socket {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Reads standard input to its end. A closed input is no reason to end: the guest simply gets no more.
fn read_stdin(backend: &StreamBackend, is_terminal: bool, escape: &dyn Fn()) {
    let mut stdin = std::io::stdin().lock();
    let mut buffer = [0; 1024];
    loop {
        match stdin.read(&mut buffer) {
            Ok(0) => return,
            Ok(count) => {
                let bytes = &buffer[..count];
                // Only a person has a key to press; a pipe may carry any byte.
                match bytes.iter().position(|b| is_terminal && *b == terminal::ESCAPE) {
                    Some(at) => {
                        backend.feed(&bytes[..at]);
                        escape();
                        return;
                    }
                    None => backend.feed(bytes),
                }
            }
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets() {
        assert_eq!("stdio".parse(), Ok(SerialTarget::Stdio));
        assert_eq!("file:/a:b".parse(), Ok(SerialTarget::File("/a:b".into())));
        assert_eq!("unix:s".parse(), Ok(SerialTarget::Unix("s".into())));
        for bad in ["", "pigeon", "file:", "unix", "stdio:x"] {
            assert!(bad.parse::<SerialTarget>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_socket_goes_away_with_its_port() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let plugged = Plugged::new(&SerialTarget::Unix(path.clone())).unwrap();
        assert!(path.exists());
        drop(plugged);
        assert!(!path.exists());
    }
}
