//! What every target is to a transport.

use vhd::IoBuffer;

use crate::cdb::Cdb;
use crate::protocol::{Sense, Status};

/// Who sends commands: an I_T nexus. Transports number theirs; a single guest on a controller is 0.
pub type Initiator = u64;

/// A command.
#[derive(Debug)]
pub struct Request {
    /// The command descriptor block.
    pub cdb: Cdb,
    /// Data-out, or the place for data-in; absent if the command has no data.
    pub data: Option<IoBuffer>,
    /// Who sent it.
    pub initiator: Initiator,
}

/// The end of a command.
#[derive(Debug)]
pub struct Response {
    /// Status.
    pub status: Status,
    /// Sense data, with CHECK CONDITION.
    pub sense: Option<Sense>,
    /// Bytes moved, into or out of the buffer.
    pub transferred: usize,
    /// The request's buffer.
    pub data: Option<IoBuffer>,
}

impl Response {
    pub(crate) fn good(data: Option<IoBuffer>, transferred: usize) -> Self {
        Self { status: Status::Good, sense: None, transferred, data: data.map(restore) }
    }

    pub(crate) fn check(sense: Sense, data: Option<IoBuffer>) -> Self {
        Self { status: Status::CheckCondition, sense: Some(sense), transferred: 0, data: data.map(restore) }
    }

    pub(crate) fn conflict(data: Option<IoBuffer>) -> Self {
        Self { status: Status::ReservationConflict, sense: None, transferred: 0, data: data.map(restore) }
    }
}

fn restore(mut b: IoBuffer) -> IoBuffer {
    b.set_len(b.capacity());
    b
}

/// Called exactly once for a command, on any thread; must not block.
pub type Done = Box<dyn FnOnce(Response) + Send>;

/// A logical unit.
pub trait Target: Send + Sync {
    /// Executes a command. `done` may be called before this returns.
    fn execute(&self, request: Request, done: Done);
    /// A logical unit or bus reset: unit attention for everybody, no medium lock.
    fn reset(&self);
}

/// Copies a response into the data-in buffer, cut to the allocation length and to the buffer.
pub(crate) fn data_in(data: Option<IoBuffer>, allocation: usize, bytes: &[u8]) -> Response {
    let Some(mut b) = data else {
        // No buffer at all: the transport moves nothing, which is what an allocation length of zero means.
        return Response::good(None, 0);
    };
    let n = bytes.len().min(allocation).min(b.len());
    b.write(0, &bytes[..n]);
    Response::good(Some(b), n)
}

/// A parameter list of `len` bytes from the data-out buffer; `limit` bounds what is copied.
pub(crate) fn data_out(data: Option<&IoBuffer>, len: usize, limit: usize) -> Result<Vec<u8>, Sense> {
    if len == 0 {
        return Ok(Vec::new());
    }
    let b = data.ok_or(Sense::PARAMETER_LIST_LENGTH_ERROR)?;
    if len > b.len() || len > limit {
        return Err(Sense::PARAMETER_LIST_LENGTH_ERROR);
    }
    let mut v = vec![0; len];
    b.read(0, &mut v);
    Ok(v)
}

/// The parameter data of REPORT LUNS (SPC-4 6.33) for a transport's list of LUNs below 256.
pub fn report_luns(luns: &[u8]) -> Vec<u8> {
    let mut out = vec![0; 8 + luns.len() * 8];
    out[..4].copy_from_slice(&((luns.len() * 8) as u32).to_be_bytes());
    for (i, &l) in luns.iter().enumerate() {
        // Peripheral device addressing: bus 0, the LUN in the second byte (SAM-5 4.7.7.2).
        out[8 + i * 8 + 1] = l;
    }
    out
}
