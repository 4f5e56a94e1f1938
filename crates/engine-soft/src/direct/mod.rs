//! Direct execution: 64-bit user code of the guest, executed by the host's processor in user mode as it is.
//!
//! Code that stays in ring 3 for long gains most from it, and gains everything: it runs at the processor's own speed, in
//! a [`process::Process`] whose memory is the guest's user half. [`mirror`] holds what is mapped there, [`scan`] says
//! which code may be executed, [`run`] goes in and comes back, [`policy`] decides for which address spaces it pays.

pub mod mirror;
pub mod policy;
pub mod process;
pub mod run;
pub mod scan;

use partition::Engine;
use partition::memory::Mapping;
use process::{Process, Tsc};
use std::collections::HashMap;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

/// Processes that a VP has: address spaces that it executes directly at a time.
const PROCESSES: usize = 2;

/// One of a VP's processes.
struct Seat {
    process: Process,
    /// The address space that it executes: an index of [`crate::mmu::Mmu`]'s user spaces, and when it was used last.
    owner: Option<usize>,
    used: u64,
    /// RFLAGS bits that cannot be set from outside, as guest code has left them.
    sticky: u64,
    /// The vector state as it was taken from there last.
    state: Box<[u8; x86::xsave::AREA_SIZE]>,
}

/// A page of code and what lies around it: guest physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Place {
    gpa: u64,
    before: Option<u64>,
    /// If it is executable.
    after: Option<u64>,
    /// The page before is executable.
    seam: bool,
}

/// What a VP has for direct execution.
pub struct Direct {
    seats: Vec<Seat>,
    /// Blocks of guest memory that the processes can map, in their order.
    blocks: Vec<Arc<partition::MemoryBlock>>,
    /// Pages of code that have been looked through: the generations of the page and its neighbours then, and whether it may be
    /// executed directly. (A neighbour that is not executable is not tracked: its bytes only help to find where instructions
    /// begin.)
    looked_at: HashMap<Place, ([u32; 3], bool)>,
    /// Uses of seats.
    turns: u64,
    /// The last interrupt that was looked at: when it came (host TSC ticks), and how many exits from user mode there had been.
    last_interrupt: (u64, u64),
    /// Host TSC ticks of going in and coming back.
    overhead: u64,
}

impl Direct {
    /// Makes the processes, on the VP's own thread.
    ///
    /// # Errors
    /// When the host refuses (ptrace, above all), or when the guest's memory cannot be shared with a process.
    pub fn new(mappings: &[Mapping]) -> std::io::Result<Self> {
        let mut blocks: Vec<Arc<partition::MemoryBlock>> = Vec::new();
        for m in mappings {
            if m.block.fd().is_some() && !blocks.iter().any(|b| Arc::ptr_eq(b, &m.block)) {
                blocks.push(m.block.clone());
            }
        }
        let fds: Vec<BorrowedFd<'_>> = blocks.iter().filter_map(|b| b.fd()).collect();
        if fds.is_empty() {
            return Err(std::io::Error::other("the guest's memory is not in a memory file"));
        }
        let mut seats = Vec::new();
        for _ in 0..PROCESSES {
            seats.push(Seat {
                process: Process::spawn(&fds, Tsc::Host)?,
                owner: None,
                used: 0,
                sticky: 0,
                state: Box::new([0; x86::xsave::AREA_SIZE]),
            });
        }
        let mut direct =
            Self { seats, blocks, looked_at: HashMap::new(), turns: 0, last_interrupt: (0, 0), overhead: 0 };
        direct.overhead = direct.measure()?;
        Ok(direct)
    }

    /// Where a physical page is that the processes can map: the block's number, and the offset there.
    fn place_of(&self, vp: &mut crate::vp::SoftVp, gpa: u64) -> Option<(usize, u64)> {
        let (address, offset) = vp.mmu.block_of(gpa)?;
        Some((self.blocks.iter().position(|b| Arc::as_ptr(b).addr() == address)?, offset))
    }

    /// The seat of an address space: its own, a free one, or that which was not used for longest. The second value: whom it
    /// belonged to.
    fn seat_for(&mut self, space: usize) -> Option<(usize, Option<usize>)> {
        if let Some(i) = self.seats.iter().position(|s| s.owner == Some(space)) {
            return Some((i, None));
        }
        let free = self.seats.iter().position(|s| s.owner.is_none());
        let i = free.or_else(|| (0..self.seats.len()).min_by_key(|i| self.seats[*i].used))?;
        let before = self.seats[i].owner.replace(space);
        Some((i, before))
    }

    /// Nobody's seat any more.
    pub(crate) fn leave(&mut self, space: usize) {
        for seat in self.seats.iter_mut().filter(|s| s.owner == Some(space)) {
            seat.owner = None;
        }
    }
}

impl crate::vp::SoftVp {
    /// Makes the processes, if they are wanted.
    pub(crate) fn prepare_direct(&mut self) {
        if !crate::partition_impl::SoftEngine.uses_processes(&self.partition.options) {
            return;
        }
        match Direct::new(&self.partition.memory.mappings()) {
            Ok(direct) => self.direct = Some(Box::new(direct)),
            Err(error) => tracing::info!("VP {}: no direct execution: {error}", self.index),
        }
    }
}
