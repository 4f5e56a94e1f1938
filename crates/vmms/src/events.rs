//! What happened to a VM: a file of JSON lines that only grows, and is put aside when it is large.

use crate::error::{Error, Result};
use crate::time;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// A log that has grown beyond this becomes the old one, and the one before is gone.
const MOST_BYTES: u64 = 1 << 20;
/// Most characters of one message: a guest's crash report may have kilobytes.
const MOST_CHARACTERS: usize = 8 << 10;

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// When, RFC 3339 in UTC.
    pub time: String,
    /// What, as one word: `started`, `stopped`, `worker-died` ... (docs/management.md lists them).
    pub event: String,
    /// In words for people.
    pub message: String,
}

/// The log of one VM.
#[derive(Clone, Debug)]
pub struct EventLog {
    path: PathBuf,
}

impl EventLog {
    /// The log in a VM's folder.
    pub fn of(folder: &Path) -> Self {
        Self { path: folder.join("events.jsonl") }
    }

    fn old(&self) -> PathBuf {
        self.path.with_file_name("events.1.jsonl")
    }

    /// Adds an event.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn append(&self, event: &str, message: &str) -> Result<()> {
        if std::fs::metadata(&self.path).is_ok_and(|m| m.len() > MOST_BYTES) {
            let _ = std::fs::rename(&self.path, self.old());
        }
        let message: String = message.chars().take(MOST_CHARACTERS).collect();
        let event = Event { time: time::now(), event: event.into(), message };
        let io = |source| Error::Io { path: self.path.clone(), what: "write the event log", source };
        let mut line = serde_json::to_vec(&event).map_err(|e| io(e.into()))?;
        line.push(b'\n');
        let mut options = File::options();
        let mut file = options.read(true).append(true).create(true).mode(0o600).open(&self.path).map_err(io)?;
        // A writer that was killed may have left half a line, which must stay alone.
        if !ends_a_line(&file).map_err(io)? {
            line.insert(0, b'\n');
        }
        // One call: lines of several writers do not mix.
        file.write_all(&line).map_err(io)
    }

    /// Adds an event; if that cannot be done, only the program's own log says so. For what has happened already.
    pub fn note(&self, event: &str, message: &str) {
        if let Err(error) = self.append(event, message) {
            tracing::warn!("the event '{event}: {message}' is not in the log: {error}");
        }
    }

    /// All events, oldest first, and how many lines could not be read.
    ///
    /// # Errors
    /// When the file cannot be read; a missing one is empty.
    pub fn read(&self) -> Result<(Vec<Event>, usize)> {
        let (mut events, mut bad) = (Vec::new(), 0);
        for path in [self.old(), self.path.clone()] {
            let file = match File::open(&path) {
                Ok(file) => file,
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
                Err(e) => return Err(Error::io(&path, "read the event log")(e)),
            };
            for line in BufReader::new(file.take(4 * MOST_BYTES)).split(b'\n') {
                let line = line.map_err(Error::io(&path, "read the event log"))?;
                match serde_json::from_slice(&line) {
                    Ok(event) => events.push(event),
                    Err(_) if line.is_empty() => {}
                    Err(_) => bad += 1,
                }
            }
        }
        Ok((events, bad))
    }
}

fn ends_a_line(file: &File) -> std::io::Result<bool> {
    use std::os::unix::fs::FileExt;
    let length = file.metadata()?.len();
    let mut last = [b'\n'];
    if length > 0 {
        file.read_exact_at(&mut last, length - 1)?;
    }
    Ok(last[0] == b'\n')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_a_line_spoils_only_itself() {
        let dir = tempfile::tempdir().unwrap();
        let log = EventLog::of(dir.path());
        assert_eq!(log.read().unwrap(), (vec![], 0));
        log.append("created", "one\ntwo").unwrap();
        let mut file = File::options().append(true).open(&log.path).unwrap();
        file.write_all(b"{\"time\":\"2026").unwrap();
        log.append("started", "x").unwrap();
        let (events, bad) = log.read().unwrap();
        let kinds: Vec<_> = events.iter().map(|e| e.event.as_str()).collect();
        assert_eq!((kinds, bad), (vec!["created", "started"], 1));
        assert_eq!(events[0].message, "one\ntwo");
    }

    #[test]
    fn the_log_stays_small() {
        let dir = tempfile::tempdir().unwrap();
        let log = EventLog::of(dir.path());
        for _ in 0..600 {
            log.append("x", &"m".repeat(MOST_CHARACTERS)).unwrap();
        }
        let bytes: u64 = std::fs::read_dir(dir.path()).unwrap().map(|f| f.unwrap().metadata().unwrap().len()).sum();
        assert!(bytes < 3 * MOST_BYTES, "{bytes}");
        assert!(log.read().unwrap().0.len() > 100);
    }
}
