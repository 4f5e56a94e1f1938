//! A channel: two rings in memory shared with the host.

use crate::memory::{self, PAGE, Placement};
use alloc::vec;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU32, Ordering, fence};
use r_efi::efi;
use vmbus_protocol::message::{GpaRange, Offer};
use vmbus_protocol::ring::{PacketHeader, TRAILER, control, packet};
use zerocopy::{FromBytes, IntoBytes};

/// Data pages of each ring.
const RING_PAGES: usize = 8;

/// One direction.
struct Ring {
    base: u64,
    size: u32,
}

impl Ring {
    fn index(&self, offset: u64) -> &AtomicU32 {
        // SAFETY: the control page belongs to the channel for as long as it lives; both sides use atomic accesses.
        unsafe { AtomicU32::from_ptr((self.base + offset) as *mut u32) }
    }
    fn data(&self) -> *mut u8 {
        (self.base + PAGE) as *mut u8
    }
    fn copy_in(&self, at: u32, bytes: &[u8]) -> u32 {
        let at = at as usize;
        let first = bytes.len().min(self.size as usize - at);
        // SAFETY: both parts lie inside the ring's data.
        unsafe {
            self.data().add(at).copy_from(bytes.as_ptr(), first);
            self.data().copy_from(bytes[first..].as_ptr(), bytes.len() - first);
        }
        ((at + bytes.len()) % self.size as usize) as u32
    }
    fn copy_out(&self, at: u32, bytes: &mut [u8]) -> u32 {
        let at = at as usize;
        let first = bytes.len().min(self.size as usize - at);
        let len = bytes.len();
        // SAFETY: both parts lie inside the ring's data.
        unsafe {
            bytes.as_mut_ptr().copy_from(self.data().add(at), first);
            bytes[first..].as_mut_ptr().copy_from(self.data(), len - first);
        }
        ((at + len) % self.size as usize) as u32
    }
}

/// An open channel.
pub struct Channel {
    offer: Offer,
    out: Ring,
    inn: Ring,
}

/// A packet from the host.
pub struct Packet {
    pub kind: u16,
    pub transaction: u64,
    pub payload: Vec<u8>,
}

impl Channel {
    /// Opens the channel of an offer.
    pub fn open(offer: &Offer) -> Option<Self> {
        let pages = 2 * (1 + RING_PAGES);
        let base = memory::allocate(Placement::Any, efi::BOOT_SERVICES_DATA, pages as u64).ok()?;
        // SAFETY: fresh pages.
        unsafe { (base as *mut u8).write_bytes(0, pages * PAGE as usize) };
        let size = (RING_PAGES * PAGE as usize) as u32;
        let channel = Self {
            offer: *offer,
            out: Ring { base, size },
            inn: Ring { base: base + (1 + RING_PAGES as u64) * PAGE, size },
        };
        // The firmware polls: it wants no interrupts.
        channel.inn.index(control::INTERRUPT_MASK).store(1, Ordering::Relaxed);
        let relid = offer.relid;
        let gpadl = super::make_gpadl(relid, base, pages)?;
        super::open(relid, gpadl, 1 + RING_PAGES as u32).then_some(channel)
    }

    /// Sends a packet made of a header's extension (GPA ranges) and a payload. `false` if the ring is full.
    fn put(&self, kind: u16, transaction: u64, completion: bool, extension: &[u8], payload: &[u8]) -> bool {
        let header_len = 16 + extension.len();
        let len = (header_len + payload.len()).next_multiple_of(8);
        let (write, read) = (
            self.out.index(control::WRITE_INDEX).load(Ordering::Relaxed),
            self.out.index(control::READ_INDEX).load(Ordering::Acquire),
        );
        let size = self.out.size;
        if read >= size || write >= size {
            return false;
        }
        let free = if read > write { read - write } else { size - write + read };
        // A full ring must not look empty.
        if (len + TRAILER) as u32 >= free {
            return false;
        }
        let header = PacketHeader {
            kind,
            offset8: (header_len / 8) as u16,
            len8: (len / 8) as u16,
            flags: if completion { packet::FLAG_COMPLETION_REQUESTED } else { 0 },
            transaction_id: transaction,
        };
        let mut at = self.out.copy_in(write, header.as_bytes());
        at = self.out.copy_in(at, extension);
        at = self.out.copy_in(at, payload);
        at = self.out.copy_in(at, &vec![0; len - header_len - payload.len()]);
        at = self.out.copy_in(at, &(u64::from(write) << 32).to_le_bytes());
        fence(Ordering::SeqCst);
        self.out.index(control::WRITE_INDEX).store(at, Ordering::SeqCst);
        // The host is told only if it had read everything and wants to be told.
        fence(Ordering::SeqCst);
        let masked = self.out.index(control::INTERRUPT_MASK).load(Ordering::Relaxed) != 0;
        if !masked && self.out.index(control::READ_INDEX).load(Ordering::Relaxed) == write {
            super::signal(&self.offer);
        }
        true
    }

    /// Sends data.
    pub fn send(&self, transaction: u64, completion: bool, payload: &[u8]) -> bool {
        self.put(packet::IN_BAND, transaction, completion, &[], payload)
    }

    /// Sends data with a buffer that the host reads or writes. Memory is mapped to itself.
    pub fn send_with_buffer(&self, transaction: u64, payload: &[u8], buffer: u64, len: u32) -> bool {
        if len == 0 {
            return self.send(transaction, true, payload);
        }
        let mut e = Vec::new();
        e.extend([0; 4]);
        e.extend(1u32.to_le_bytes());
        let offset = (buffer & (PAGE - 1)) as u32;
        e.extend_from_slice(GpaRange { byte_count: len, byte_offset: offset }.as_bytes());
        let last = (buffer + u64::from(len) - 1) >> 12;
        (buffer >> 12..=last).for_each(|n| e.extend(n.to_le_bytes()));
        self.put(packet::GPA_DIRECT, transaction, true, &e, payload)
    }

    /// Takes the next packet.
    pub fn receive(&self) -> Option<Packet> {
        let read = self.inn.index(control::READ_INDEX).load(Ordering::Relaxed);
        let write = self.inn.index(control::WRITE_INDEX).load(Ordering::Acquire);
        let size = self.inn.size;
        if read == write || read >= size || write >= size {
            return None;
        }
        let available = if write > read { write - read } else { size - read + write } as usize;
        let mut raw = [0; 16];
        self.inn.copy_out(read, &mut raw);
        let header = PacketHeader::read_from_bytes(&raw).ok()?;
        let (offset, len) = (usize::from(header.offset8) * 8, usize::from(header.len8) * 8);
        if offset < 16 || len < offset || len + TRAILER > available {
            // The ring makes no sense: take everything and go on with what comes.
            self.inn.index(control::READ_INDEX).store(write, Ordering::Release);
            return None;
        }
        let mut whole = vec![0; len];
        let mut at = self.inn.copy_out(read, &mut whole);
        at = (at + TRAILER as u32) % size;
        fence(Ordering::SeqCst);
        self.inn.index(control::READ_INDEX).store(at, Ordering::SeqCst);
        // The host may wait for room.
        fence(Ordering::SeqCst);
        let pending = self.inn.index(control::PENDING_SEND_SIZE).load(Ordering::Relaxed);
        if pending != 0 {
            let free = if at > write { at - write } else { size - write + at };
            if free > pending {
                super::signal(&self.offer);
            }
        }
        Some(Packet { kind: header.kind, transaction: header.transaction_id, payload: whole.split_off(offset) })
    }
}
