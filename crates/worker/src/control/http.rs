//! The little of HTTP/1.1 (RFC 9112) that the control socket needs: requests and answers with a `Content-Length`, no
//! chunks, no continuation. Everything is bounded; whoever sends more, or too slowly, is turned away.
//!
//! Files travel beside the bytes of a request (`SCM_RIGHTS`), so that a worker that may open nothing can be given a disk.

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};
use std::io::{IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};
use thiserror::Error;

/// Most bytes of a request line or status line with its header fields.
pub const MOST_HEAD: usize = 8 << 10;
/// Most bytes of a body.
pub const MOST_BODY: usize = 1 << 20;
/// Most files beside a request: a disk and its parents.
pub const MOST_FILES: usize = 64;
/// Most header fields.
const MOST_FIELDS: usize = 32;
/// How long a whole request may take to arrive, once its first byte has.
pub const REQUEST_TIME: Duration = Duration::from_secs(10);

/// Why a message cannot be read.
#[derive(Debug, Error)]
pub enum HttpError {
    /// The stream failed, or nothing came in time.
    #[error("{0}")]
    Io(#[from] std::io::Error),
    /// It ended between two messages.
    #[error("the other side has closed the connection")]
    Closed,
    /// It is not what this reads.
    #[error("{0}")]
    Malformed(String),
    /// It is longer than allowed.
    #[error("{0}")]
    TooLarge(String),
}

/// A request.
#[derive(Debug, Default)]
pub struct Request {
    /// Method.
    pub method: String,
    /// Path, without the query.
    pub path: String,
    /// What follows the question mark.
    pub query: String,
    /// Body.
    pub body: Vec<u8>,
    /// Files that came along.
    pub files: Vec<OwnedFd>,
    /// The client wants the connection to become something else.
    pub upgrade: Option<String>,
    /// The connection ends after the answer.
    pub close: bool,
}

/// An answer.
#[derive(Debug)]
pub struct Answer {
    /// Status code.
    pub status: u16,
    /// Body.
    pub body: Vec<u8>,
    /// Bytes behind an answer that upgrades the connection.
    pub rest: Vec<u8>,
}

/// What is common to both.
struct Fields {
    length: usize,
    close: bool,
    upgrade: Option<String>,
}

fn malformed(what: impl Into<String>) -> HttpError {
    HttpError::Malformed(what.into())
}

fn fields(headers: &[httparse::Header<'_>]) -> Result<Fields, HttpError> {
    let mut found = Fields { length: 0, close: false, upgrade: None };
    let mut seen_length = false;
    for header in headers {
        let value = std::str::from_utf8(header.value).map_err(|_| malformed("a header field is not text"))?.trim();
        if header.name.eq_ignore_ascii_case("content-length") {
            // Two lengths are how requests are smuggled past one another: neither is believed.
            if std::mem::replace(&mut seen_length, true) || !value.bytes().all(|b| b.is_ascii_digit()) {
                return Err(malformed("bad Content-Length"));
            }
            found.length = value.parse().map_err(|_| malformed("bad Content-Length"))?;
            if found.length > MOST_BODY {
                return Err(HttpError::TooLarge(format!("a body of {value} bytes; {MOST_BODY} are allowed")));
            }
        } else if header.name.eq_ignore_ascii_case("transfer-encoding") {
            return Err(malformed("Transfer-Encoding is not supported: send a Content-Length"));
        } else if header.name.eq_ignore_ascii_case("connection") {
            found.close = value.split(',').any(|v| v.trim().eq_ignore_ascii_case("close"));
        } else if header.name.eq_ignore_ascii_case("upgrade") {
            found.upgrade = Some(value.to_owned());
        }
    }
    Ok(found)
}

/// Reads from a stream and keeps what belongs to the next message.
pub struct Reader<'a> {
    stream: &'a UnixStream,
    buffer: Vec<u8>,
    files: Vec<OwnedFd>,
}

impl<'a> Reader<'a> {
    /// A reader of this stream.
    pub fn new(stream: &'a UnixStream) -> Self {
        Self { stream, buffer: Vec::new(), files: Vec::new() }
    }

    /// Takes more bytes, and files; false at the end of the stream.
    fn fill(&mut self, deadline: Option<Instant>) -> Result<bool, HttpError> {
        if let Some(deadline) = deadline {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(HttpError::Io(std::io::ErrorKind::TimedOut.into()));
            }
            self.stream.set_read_timeout(Some(left))?;
        }
        let mut bytes = [0; 4096];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FILES))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = loop {
            match rustix::net::recvmsg(
                self.stream,
                &mut [IoSliceMut::new(&mut bytes)],
                &mut control,
                RecvFlags::CMSG_CLOEXEC,
            ) {
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => return Err(HttpError::Io(std::io::ErrorKind::TimedOut.into())),
                other => break other.map_err(std::io::Error::from)?,
            }
        };
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(files) = message {
                self.files.extend(files);
            }
        }
        if self.files.len() > MOST_FILES {
            return Err(HttpError::TooLarge(format!("more than {MOST_FILES} files with a request")));
        }
        self.buffer.extend_from_slice(&bytes[..received.bytes]);
        Ok(received.bytes > 0)
    }

    /// Takes bytes until `parse` finds a complete head, and then the body.
    fn message<T>(
        &mut self,
        mut deadline: Option<Instant>,
        parse: impl Fn(&[u8]) -> Result<Option<(usize, T, Fields)>, HttpError>,
    ) -> Result<(T, Fields, Vec<u8>), HttpError> {
        let (head, found, fields) = loop {
            if let Some(done) = parse(&self.buffer)? {
                break done;
            }
            if self.buffer.len() > MOST_HEAD {
                return Err(HttpError::TooLarge(format!("a head of more than {MOST_HEAD} bytes")));
            }
            let nothing_yet = self.buffer.is_empty();
            if !self.fill(deadline)? {
                return Err(if nothing_yet { HttpError::Closed } else { malformed("the message is cut off") });
            }
            // A connection may idle between requests; a request may not.
            deadline = deadline.or_else(|| Some(Instant::now() + REQUEST_TIME));
        };
        if head > MOST_HEAD {
            return Err(HttpError::TooLarge(format!("a head of more than {MOST_HEAD} bytes")));
        }
        while self.buffer.len() < head + fields.length {
            if !self.fill(deadline)? {
                return Err(malformed("the body is cut off"));
            }
        }
        let rest = self.buffer.split_off(head + fields.length);
        let body = self.buffer.split_off(head);
        self.buffer = rest;
        Ok((found, fields, body))
    }

    /// The next request; waits for its first byte as long as it takes.
    ///
    /// # Errors
    /// [`HttpError::Closed`] when the client is done.
    pub fn request(&mut self) -> Result<Request, HttpError> {
        self.stream.set_read_timeout(None)?;
        let ((method, target), fields, body) = self.message(None, |bytes| {
            let mut headers = [httparse::EMPTY_HEADER; MOST_FIELDS];
            let mut request = httparse::Request::new(&mut headers);
            match request.parse(bytes).map_err(|e| malformed(format!("this is not an HTTP request: {e}")))? {
                httparse::Status::Partial => Ok(None),
                httparse::Status::Complete(length) => {
                    let line = (request.method.unwrap_or_default().into(), request.path.unwrap_or_default().into());
                    Ok(Some((length, line, fields(request.headers)?)))
                }
            }
        })?;
        let target: String = target;
        let (path, query) = target.split_once('?').unwrap_or((&target, ""));
        Ok(Request {
            method,
            path: path.into(),
            query: query.into(),
            body,
            files: std::mem::take(&mut self.files),
            upgrade: fields.upgrade,
            close: fields.close,
        })
    }

    /// The answer to a request, within `limit`.
    ///
    /// # Errors
    /// When it does not come, or is no answer.
    pub fn answer(&mut self, limit: Duration) -> Result<Answer, HttpError> {
        let (status, _, body) = self.message(Some(Instant::now() + limit), |bytes| {
            let mut headers = [httparse::EMPTY_HEADER; MOST_FIELDS];
            let mut response = httparse::Response::new(&mut headers);
            match response.parse(bytes).map_err(|e| malformed(format!("this is not an HTTP answer: {e}")))? {
                httparse::Status::Partial => Ok(None),
                httparse::Status::Complete(length) => {
                    Ok(Some((length, response.code.unwrap_or(0), fields(response.headers)?)))
                }
            }
        })?;
        Ok(Answer { status, body, rest: std::mem::take(&mut self.buffer) })
    }

    /// Bytes that came behind the last message.
    pub fn take_rest(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.buffer)
    }
}

fn reason(status: u16) -> &'static str {
    match status {
        101 => "Switching Protocols",
        200 => "OK",
        400 => "Bad Request",
        404 => "Not Found",
        405 => "Method Not Allowed",
        409 => "Conflict",
        413 => "Content Too Large",
        503 => "Service Unavailable",
        _ => "Internal Server Error",
    }
}

/// Writes an answer.
///
/// # Errors
/// When the stream does.
pub fn write_answer(mut stream: &UnixStream, status: u16, body: &[u8]) -> std::io::Result<()> {
    let mut bytes = format!(
        "HTTP/1.1 {status} {}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        reason(status),
        body.len()
    )
    .into_bytes();
    bytes.extend_from_slice(body);
    stream.write_all(&bytes)
}

/// Answers that the connection becomes something else now.
///
/// # Errors
/// When the stream does.
pub fn write_upgrade(mut stream: &UnixStream, protocol: &str) -> std::io::Result<()> {
    write!(stream, "HTTP/1.1 101 {}\r\nConnection: Upgrade\r\nUpgrade: {protocol}\r\n\r\n", reason(101))
}

/// Writes a request, with files beside its first byte.
///
/// # Errors
/// When the stream does, or there are too many files.
pub fn write_request(
    mut stream: &UnixStream,
    method: &str,
    target: &str,
    upgrade: Option<&str>,
    body: &[u8],
    files: &[BorrowedFd<'_>],
) -> std::io::Result<()> {
    let connection = match upgrade {
        Some(protocol) => format!("Connection: Upgrade\r\nUpgrade: {protocol}\r\n"),
        None => "Connection: close\r\n".into(),
    };
    let mut bytes = format!(
        "{method} {target} HTTP/1.1\r\nHost: viridian\r\n{connection}Content-Type: application/json\r\nContent-Length: \
         {}\r\n\r\n",
        body.len()
    )
    .into_bytes();
    bytes.extend_from_slice(body);
    if files.is_empty() {
        return stream.write_all(&bytes);
    }
    if files.len() > MOST_FILES {
        return Err(std::io::Error::other(format!("{} files; a request takes {MOST_FILES}", files.len())));
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FILES))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(files));
    let sent = rustix::net::sendmsg(stream.as_fd(), &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL)?;
    stream.write_all(&bytes[sent..])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    fn pair() -> (UnixStream, UnixStream) {
        UnixStream::pair().unwrap()
    }

    fn read(bytes: &[u8]) -> Result<Request, HttpError> {
        let (ours, theirs) = pair();
        let bytes = bytes.to_vec();
        let writer = std::thread::spawn(move || {
            let mut stream = &theirs;
            // The reader may turn away before everything is written.
            let _ = stream.write_all(&bytes);
        });
        let request = Reader::new(&ours).request();
        drop(ours);
        writer.join().unwrap();
        request
    }

    #[test]
    fn a_request_in_pieces_and_one_behind_it() {
        let (ours, theirs) = pair();
        let writer = std::thread::spawn(move || {
            let mut stream = &theirs;
            for byte in
                b"POST /a?b=c HTTP/1.1\r\ncontent-length: 3\r\n\r\nxyzGET /d HTTP/1.1\r\nConnection: close\r\n\r\n"
            {
                stream.write_all(&[*byte]).unwrap();
            }
        });
        let mut reader = Reader::new(&ours);
        let first = reader.request().unwrap();
        assert_eq!((first.method.as_str(), first.path.as_str(), first.query.as_str()), ("POST", "/a", "b=c"));
        assert_eq!((first.body.as_slice(), first.close), (b"xyz".as_slice(), false));
        let second = reader.request().unwrap();
        assert_eq!((second.path.as_str(), second.close), ("/d", true));
        writer.join().unwrap();
        assert!(matches!(reader.request(), Err(HttpError::Closed)));
    }

    #[test]
    fn bounds() {
        let long = format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(MOST_HEAD));
        assert!(matches!(read(long.as_bytes()), Err(HttpError::TooLarge(_))));
        let endless = "x".repeat(2 * MOST_HEAD);
        assert!(matches!(read(endless.as_bytes()), Err(HttpError::TooLarge(_) | HttpError::Malformed(_))));
        let many: String = (0..100).map(|i| format!("f{i}: x\r\n")).collect();
        assert!(read(format!("GET / HTTP/1.1\r\n{many}\r\n").as_bytes()).is_err());
        for bad in [
            "GET / HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n",
            "GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
            "GET / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\nx",
            "GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n",
            "GET / HTTP/1.1\r\nContent-Length: 5\r\n\r\nx",
            "{\"request\":\"status\"}\n",
            "\0\u{1}\u{2}\r\n\r\n",
            "GET / HT",
        ] {
            assert!(read(bad.as_bytes()).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn files_come_along() {
        let (ours, theirs) = pair();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, "content").unwrap();
        let file = std::fs::File::open(&path).unwrap();
        write_request(&theirs, "POST", "/x", None, b"{}", &[file.as_fd(), file.as_fd()]).unwrap();
        let request = Reader::new(&ours).request().unwrap();
        assert_eq!((request.files.len(), request.body.as_slice()), (2, b"{}".as_slice()));
        let text = std::io::read_to_string(std::fs::File::from(request.files.into_iter().next().unwrap())).unwrap();
        assert_eq!(text, "content");
    }

    #[test]
    fn an_answer_that_does_not_come() {
        let (ours, _theirs) = pair();
        let begun = Instant::now();
        let error = Reader::new(&ours).answer(Duration::from_millis(50)).unwrap_err();
        assert!(matches!(error, HttpError::Io(e) if e.kind() == std::io::ErrorKind::TimedOut));
        assert!(begun.elapsed() < Duration::from_secs(10));
    }
}
