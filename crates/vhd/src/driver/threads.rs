//! The fallback where io_uring is refused (containers, old kernels): a few threads with blocking calls.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;

use super::{Driver, Files, Ops, Shared};
use crate::state::{Memory, Op, OpKind};
use crate::storage::Storage;

/// Threads a disk: enough to keep a device busy.
const THREADS: usize = 8;

pub(crate) struct Threads {
    queue: Mutex<Queue>,
    wake: Condvar,
    files: Files,
}

#[derive(Default)]
struct Queue {
    ops: VecDeque<Op>,
    stop: bool,
}

impl Threads {
    pub fn new(files: Files) -> Self {
        Self { queue: Mutex::default(), wake: Condvar::new(), files }
    }

    pub fn push(&self, ops: Ops) {
        if ops.is_empty() {
            return;
        }
        let n = ops.len();
        let mut q = self.queue.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        q.ops.extend(ops);
        drop(q);
        if n == 1 { self.wake.notify_one() } else { self.wake.notify_all() }
    }

    pub fn stop(&self) {
        self.queue.lock().unwrap_or_else(std::sync::PoisonError::into_inner).stop = true;
        self.wake.notify_all();
    }

    fn next(&self) -> Option<Op> {
        let mut q = self.queue.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        loop {
            if let Some(op) = q.ops.pop_front() {
                return Some(op);
            }
            if q.stop {
                return None;
            }
            q = self.wake.wait(q).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
    }
}

/// Starts the threads.
pub(crate) fn start(shared: &Arc<Shared>) -> io::Result<Vec<JoinHandle<()>>> {
    (0..THREADS)
        .map(|_| {
            let shared = shared.clone();
            std::thread::Builder::new().name("vhd-io".into()).spawn(move || {
                let Driver::Threads(t) = shared.driver() else { return };
                while let Some(op) = t.next() {
                    let result = perform(&*t.files[op.layer], &op);
                    let mut core = shared.lock();
                    core.complete(op.id, result);
                    shared.pump(core);
                }
            })
        })
        .collect()
}

/// Carries out one operation, blocking.
pub(crate) fn perform(file: &dyn Storage, op: &Op) -> io::Result<u64> {
    match op.kind {
        OpKind::Sync => return file.sync().map(|()| 0),
        OpKind::Punch => return file.punch(op.offset, op.len).map(|()| 0),
        OpKind::Read | OpKind::Write => {}
    }
    let one;
    let (iov, count): (*const libc::iovec, usize) = match op.memory {
        Memory::None => return Ok(0),
        Memory::One(p, n) => {
            one = libc::iovec { iov_base: p.cast(), iov_len: n };
            (&one, 1)
        }
        Memory::Many(p, n) => (p, n),
    };
    let Some(fd) = file.fd() else { return perform_by_trait(file, op, iov, count) };
    let offset = libc::off_t::try_from(op.offset).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))?;
    let count = count as libc::c_int;
    // SAFETY: the list and its memory stay valid until the operation has been completed (see `Op`).
    let n = unsafe {
        match op.kind {
            OpKind::Read => libc::preadv(fd, iov, count, offset),
            _ => libc::pwritev(fd, iov, count, offset),
        }
    };
    if n < 0 { Err(io::Error::last_os_error()) } else { Ok(n as u64) }
}

/// For storage that is not a file of the host: through a buffer.
fn perform_by_trait(file: &dyn Storage, op: &Op, iov: *const libc::iovec, count: usize) -> io::Result<u64> {
    // SAFETY: as above; the list has `count` entries.
    let list = unsafe { std::slice::from_raw_parts(iov, count) };
    let total: usize = list.iter().map(|v| v.iov_len).sum();
    let mut buf = vec![0; total];
    if op.kind == OpKind::Read {
        let available = file.length()?.saturating_sub(op.offset).min(total as u64) as usize;
        if available > 0 {
            file.read_at(&mut buf[..available], op.offset)?;
        }
        buf.truncate(available);
    }
    let mut at = 0;
    for v in list {
        let n = v.iov_len.min(buf.len() - at);
        let p = v.iov_base.cast::<u8>();
        // SAFETY: memory of a live operation; `buf` is ours.
        unsafe {
            if op.kind == OpKind::Read {
                std::ptr::copy_nonoverlapping(buf.as_ptr().add(at), p, n);
            } else {
                std::ptr::copy_nonoverlapping(p, buf.as_mut_ptr().add(at), n);
            }
        }
        at += n;
    }
    if op.kind == OpKind::Write {
        file.write_at(&buf, op.offset)?;
    }
    Ok(buf.len() as u64)
}
