//! One ring in guest memory, from the host's side.
//!
//! Every value that the guest can change is read once; indices are checked before they are used. What does not hold
//! makes the ring fail: [`RingError`].

use crate::gpadl::PageList;
use partition::{Gpa, GuestMemory, MemoryError};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use vmbus_protocol::PAGE;
use vmbus_protocol::ring::{PacketHeader, TRAILER, control};
use zerocopy::{FromBytes, IntoBytes};

/// What the guest did to a ring that no guest may do.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// An index outside the ring or not a multiple of 8.
    #[error("{which} index {value:#x} is outside the ring of {size:#x} bytes or unaligned")]
    Index {
        /// "read" or "write".
        which: &'static str,
        /// The index.
        value: u32,
        /// Bytes of the ring.
        size: u32,
    },
    /// A packet that contradicts itself or its ring.
    #[error("packet of {len:#x} bytes with payload at {offset:#x}, in {available:#x} bytes that were written")]
    Packet {
        /// Its length.
        len: usize,
        /// Its payload's offset.
        offset: usize,
        /// What the ring holds.
        available: usize,
    },
    /// Its pages are not memory.
    #[error("ring memory: {0}")]
    Memory(#[from] MemoryError),
    /// Too few pages.
    #[error("a ring needs a control page and a data page")]
    TooSmall,
}

struct Ring {
    memory: Arc<GuestMemory>,
    control: Gpa,
    data: PageList,
    size: u32,
}

impl Ring {
    fn new(memory: Arc<GuestMemory>, pages: &[u64]) -> Result<Self, RingError> {
        let (control, data) = pages.split_first().filter(|(_, d)| !d.is_empty()).ok_or(RingError::TooSmall)?;
        let control = PageList { pages: vec![*control] }.address(0).ok_or(RingError::TooSmall)?;
        let size = u32::try_from(data.len() * PAGE).map_err(|_| RingError::TooSmall)?;
        Ok(Self { memory, control, data: PageList { pages: data.to_vec() }, size })
    }

    fn load(&self, field: u64) -> Result<u32, RingError> {
        Ok(self.memory.load_u32(self.control + field, Ordering::Acquire)?)
    }

    fn store(&self, field: u64, value: u32) -> Result<(), RingError> {
        Ok(self.memory.store_u32(self.control + field, value, Ordering::Release)?)
    }

    fn index(&self, field: u64, which: &'static str) -> Result<u32, RingError> {
        let value = self.load(field)?;
        if value >= self.size || value % 8 != 0 {
            return Err(RingError::Index { which, value, size: self.size });
        }
        Ok(value)
    }

    /// Bytes from one index to another.
    fn distance(&self, from: u32, to: u32) -> u32 {
        if to >= from { to - from } else { self.size - from + to }
    }

    fn advance(&self, index: u32, bytes: usize) -> u32 {
        ((u64::from(index) + bytes as u64) % u64::from(self.size)) as u32
    }

    fn copy_out(&self, at: u32, bytes: &mut [u8]) -> Result<(), RingError> {
        let head = bytes.len().min((self.size - at) as usize);
        let (first, second) = bytes.split_at_mut(head);
        self.data.read(&self.memory, u64::from(at), first)?;
        Ok(self.data.read(&self.memory, 0, second)?)
    }

    fn copy_in(&self, at: u32, bytes: &[u8]) -> Result<(), RingError> {
        let head = bytes.len().min((self.size - at) as usize);
        let (first, second) = bytes.split_at(head);
        self.data.write(&self.memory, u64::from(at), first)?;
        Ok(self.data.write(&self.memory, 0, second)?)
    }
}

/// The ring from guest to host.
pub struct Incoming {
    ring: Ring,
    read: u32,
}

impl Incoming {
    /// Goes on where the ring's read index says.
    pub fn new(memory: Arc<GuestMemory>, pages: &[u64]) -> Result<Self, RingError> {
        let ring = Ring::new(memory, pages)?;
        let read = ring.index(control::READ_INDEX, "read")?;
        Ok(Self { ring, read })
    }

    /// Takes the next packet: header and everything behind it, in one copy. `None`: the ring is empty. The second
    /// value says that the guest waits for room and must be signalled.
    pub fn take(&mut self) -> Result<Option<(PacketHeader, Vec<u8>, bool)>, RingError> {
        let write = self.ring.index(control::WRITE_INDEX, "write")?;
        let available = self.ring.distance(self.read, write) as usize;
        if available == 0 {
            return Ok(None);
        }
        let bad = |len, offset| RingError::Packet { len, offset, available };
        let mut head = [0u8; size_of::<PacketHeader>()];
        if available < head.len() + TRAILER {
            return Err(bad(0, 0));
        }
        self.ring.copy_out(self.read, &mut head)?;
        let header = PacketHeader::read_from_bytes(&head).map_err(|_| bad(0, 0))?;
        let (len, offset) = (usize::from(header.len8) * 8, usize::from(header.offset8) * 8);
        if offset < head.len() || offset > len || len + TRAILER > available {
            return Err(bad(len, offset));
        }
        let mut body = vec![0; len - head.len()];
        self.ring.copy_out(self.ring.advance(self.read, head.len()), &mut body)?;
        self.read = self.ring.advance(self.read, len + TRAILER);
        self.ring.store(control::READ_INDEX, self.read)?;
        // The index must be visible before the guest's wish is read: one of the two sees the other.
        fence(Ordering::SeqCst);
        let wanted = self.ring.load(control::PENDING_SEND_SIZE)?;
        let signal = if wanted == 0 {
            false
        } else {
            let write = self.ring.index(control::WRITE_INDEX, "write")?;
            let free = self.ring.size - self.ring.distance(self.read, write);
            let before = free.saturating_sub((len + TRAILER) as u32);
            before <= wanted && free > wanted
        };
        Ok(Some((header, body, signal)))
    }

    /// Asks the guest to signal (or not) when it writes into the empty ring.
    pub fn set_interrupt_mask(&mut self, masked: bool) -> Result<(), RingError> {
        self.ring.store(control::INTERRUPT_MASK, u32::from(masked))?;
        // Before the ring is looked at again.
        fence(Ordering::SeqCst);
        Ok(())
    }

    /// Is there something to take?
    pub fn is_empty(&self) -> Result<bool, RingError> {
        Ok(self.ring.index(control::WRITE_INDEX, "write")? == self.read)
    }
}

/// The ring from host to guest.
pub struct Outgoing {
    ring: Ring,
    write: u32,
}

/// What a write came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Written {
    /// Done; the guest must be signalled or not.
    Done {
        /// Signal it.
        signal: bool,
    },
    /// No room: the guest will signal when there is.
    Full,
}

impl Outgoing {
    /// Goes on where the ring's write index says.
    pub fn new(memory: Arc<GuestMemory>, pages: &[u64]) -> Result<Self, RingError> {
        let ring = Ring::new(memory, pages)?;
        let write = ring.index(control::WRITE_INDEX, "write")?;
        // We use the pending send size, so that the guest signals when it has made room.
        let features = ring.load(control::FEATURE_BITS)?;
        ring.store(control::FEATURE_BITS, features | control::FEATURE_PENDING_SEND_SIZE)?;
        Ok(Self { ring, write })
    }

    /// Bytes of packet that ever fit.
    pub fn capacity(&self) -> usize {
        self.ring.size as usize - TRAILER - 8
    }

    /// Writes a packet; its parts together are a multiple of 8 bytes.
    pub fn put(&mut self, parts: &[&[u8]]) -> Result<Written, RingError> {
        let len: usize = parts.iter().map(|p| p.len()).sum();
        debug_assert!(len % 8 == 0, "packets are padded by the channel");
        let need = len + TRAILER;
        let read = match self.room(need)? {
            Some(read) => read,
            None => {
                // Tell what is missing, then look again: the guest may have made room meanwhile.
                self.ring.store(control::PENDING_SEND_SIZE, u32::try_from(need).unwrap_or(u32::MAX))?;
                fence(Ordering::SeqCst);
                match self.room(need)? {
                    Some(read) => read,
                    None => return Ok(Written::Full),
                }
            }
        };
        self.ring.store(control::PENDING_SEND_SIZE, 0)?;
        let start = self.write;
        let mut at = start;
        for part in parts {
            self.ring.copy_in(at, part)?;
            at = self.ring.advance(at, part.len());
        }
        self.ring.copy_in(at, (u64::from(start) << 32).as_bytes())?;
        self.write = self.ring.advance(at, TRAILER);
        self.ring.store(control::WRITE_INDEX, self.write)?;
        fence(Ordering::SeqCst);
        let masked = self.ring.load(control::INTERRUPT_MASK)? != 0;
        // Only a guest that had emptied the ring may be asleep. Its index is read again, after our write.
        let read_now = self.ring.load(control::READ_INDEX)?;
        Ok(Written::Done { signal: !masked && (read_now == start || read == start) })
    }

    /// The guest's read index, if `need` bytes fit: the ring is never filled to the last byte.
    fn room(&self, need: usize) -> Result<Option<u32>, RingError> {
        let read = self.ring.index(control::READ_INDEX, "read")?;
        let free = self.ring.size - self.ring.distance(read, self.write);
        Ok((need < free as usize).then_some(read))
    }
}
