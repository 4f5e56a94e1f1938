//! The io_uring driver: one ring a disk. Whoever submits a request puts its operations on the ring himself; one
//! thread a disk waits for completions.

use std::collections::VecDeque;
use std::io;
use std::os::fd::RawFd;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use io_uring::{IoUring, opcode, squeue, types};

use super::{Driver, Files, Ops, Shared};
use crate::state::{Memory, Op, OpKind};

/// Entries of the submission queue.
const ENTRIES: u32 = 256;
/// `user_data` of the operation that ends the thread.
const STOP: u64 = u64::MAX;
/// Bytes in one operation; Linux takes just under 2 GiB, and what is left is issued again.
const MAX_LEN: usize = 1 << 30;

pub(crate) struct Uring {
    ring: IoUring,
    fds: Vec<RawFd>,
    /// Operations for which the queue had no room.
    backlog: Mutex<VecDeque<Op>>,
    /// One thread drives the disk: what it has queued goes to the host when it next waits.
    inline: bool,
    /// Keeps the descriptors open.
    _files: Files,
}

impl Uring {
    /// Makes a ring; fails where the host refuses io_uring. With `inline`, only the calling thread may use the disk,
    /// and it drives it itself.
    pub fn new(files: Files, inline: bool) -> io::Result<Self> {
        let fds = files
            .iter()
            .map(|f| f.fd().ok_or_else(|| io::Error::from(io::ErrorKind::Unsupported)))
            .collect::<io::Result<Vec<_>>>()?;
        let mut builder = IoUring::builder();
        builder.setup_cqsize(ENTRIES * 8);
        let ring = if inline {
            builder.setup_single_issuer().setup_defer_taskrun();
            builder.build(ENTRIES).or_else(|_| IoUring::builder().setup_cqsize(ENTRIES * 8).build(ENTRIES))?
        } else {
            builder.build(ENTRIES)?
        };
        let mut probe = io_uring::Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        for code in [opcode::Read::CODE, opcode::Writev::CODE, opcode::Fsync::CODE, opcode::Fallocate::CODE] {
            if !probe.is_supported(code) {
                return Err(io::ErrorKind::Unsupported.into());
            }
        }
        Ok(Self { ring, fds, backlog: Mutex::new(VecDeque::new()), inline, _files: files })
    }

    /// Puts operations on the queue. The caller holds the core's lock, so that there is one writer.
    pub fn push(&self, ops: Ops) {
        let mut backlog = self.backlog.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if ops.is_empty() && backlog.is_empty() {
            return;
        }
        backlog.extend(ops);
        while let Some(op) = backlog.pop_front() {
            let entry = self.entry(&op);
            // SAFETY: the core's lock is held, nobody else touches the submission queue; the memory of the operation
            // stays valid until its completion has been given to the core (see `Op`).
            let full = unsafe { self.ring.submission_shared().push(&entry) }.is_err();
            if full {
                backlog.push_front(op);
                if self.ring.submit().is_err() {
                    // Busy (the completion queue is full): the completion thread pushes the rest.
                    return;
                }
            }
        }
    }

    pub fn submit(&self) {
        if self.inline {
            return;
        }
        loop {
            match self.ring.submit() {
                Err(e) if e.raw_os_error() == Some(libc::EINTR) => {}
                // EBUSY, EAGAIN: the entries stay on the queue; the completion thread's next call takes them.
                _ => return,
            }
        }
    }

    fn entry(&self, op: &Op) -> squeue::Entry {
        let fd = types::Fd(self.fds[op.layer]);
        let e = match (op.kind, op.memory) {
            (OpKind::Read, Memory::One(p, n)) => {
                opcode::Read::new(fd, p, n.min(MAX_LEN) as u32).offset(op.offset).build()
            }
            (OpKind::Write, Memory::One(p, n)) => {
                opcode::Write::new(fd, p, n.min(MAX_LEN) as u32).offset(op.offset).build()
            }
            (OpKind::Read, Memory::Many(p, n)) => opcode::Readv::new(fd, p, n as u32).offset(op.offset).build(),
            (OpKind::Write, Memory::Many(p, n)) => opcode::Writev::new(fd, p, n as u32).offset(op.offset).build(),
            (OpKind::Punch, _) => opcode::Fallocate::new(fd, op.len)
                .offset(op.offset)
                .mode(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE)
                .build(),
            (OpKind::Sync, _) => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
            (OpKind::Read | OpKind::Write, Memory::None) => opcode::Nop::new().build(),
        };
        e.user_data(op.id as u64)
    }

    /// Waits for at least one completion (`wait`) and gives all there are to the core. False when told to stop.
    pub fn reap(&self, shared: &Shared, wait: bool) -> bool {
        let result = if wait { self.ring.submit_and_wait(1) } else { self.ring.submit() };
        if let Err(e) = result
            && !matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY))
        {
            tracing::error!(error = %e, "io_uring_enter failed");
        }
        let mut go_on = true;
        let mut core = shared.lock();
        // SAFETY: only this thread (or, inline, the only thread) takes completions.
        let completions = unsafe { self.ring.completion_shared() };
        for c in completions {
            if c.user_data() == STOP {
                go_on = false;
                continue;
            }
            let result = match c.result() {
                r if r < 0 => Err(io::Error::from_raw_os_error(-r)),
                r => Ok(r as u64),
            };
            core.complete(c.user_data() as usize, result);
        }
        shared.pump(core);
        go_on
    }

    /// Tells the completion thread to end. Nothing is in flight.
    pub fn stop(&self, shared: &Shared) {
        let core = shared.lock();
        // SAFETY: the core's lock is held; a NOP refers to no memory.
        while unsafe { self.ring.submission_shared().push(&opcode::Nop::new().build().user_data(STOP)) }.is_err() {
            self.submit();
        }
        drop(core);
        self.submit();
    }
}

/// Starts the completion thread.
pub(crate) fn start(shared: Arc<Shared>) -> io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name("vhd-io".into()).spawn(move || {
        let Driver::Uring(u) = shared.driver() else { return };
        while u.reap(&shared, true) {}
    })
}
