//! Memory that requests read from and write to.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::any::Any;
use std::ptr::NonNull;

use partition::PinnedRange;

/// Zeroed memory with the alignment of a page, as direct I/O wants it.
pub struct AlignedBuf {
    ptr: NonNull<u8>,
    len: usize,
}

// SAFETY: the buffer owns its memory alone, as a `Box<[u8]>` does.
unsafe impl Send for AlignedBuf {}
// SAFETY: shared references only read.
unsafe impl Sync for AlignedBuf {}

impl AlignedBuf {
    /// The alignment in bytes.
    pub const ALIGN: usize = 4096;

    /// `len` zero bytes.
    pub fn zeroed(len: usize) -> Self {
        if len == 0 {
            return Self { ptr: NonNull::dangling(), len };
        }
        let layout = Self::layout(len);
        // SAFETY: the layout's size is not zero.
        let ptr = unsafe { alloc_zeroed(layout) };
        let Some(ptr) = NonNull::new(ptr) else { handle_alloc_error(layout) };
        Self { ptr, len }
    }

    fn layout(len: usize) -> Layout {
        Layout::from_size_align(len, Self::ALIGN).expect("a buffer is smaller than the address space")
    }

    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.ptr.as_ptr()
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        if self.len != 0 {
            // SAFETY: allocated in `zeroed` with the same layout.
            unsafe { dealloc(self.ptr.as_ptr(), Self::layout(self.len)) }
        }
    }
}

impl std::ops::Deref for AlignedBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: `len` initialised bytes that this object owns (dangling and empty if `len` is 0).
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }
}

impl std::ops::DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }
}

enum Segments {
    One((*mut u8, usize)),
    Many(Vec<(*mut u8, usize)>),
}

enum Owner {
    Vec(Vec<u8>),
    Aligned(AlignedBuf),
    Other(#[allow(dead_code, reason = "held only to keep the memory alive")] Box<dyn Any + Send>),
}

/// A scatter list with whatever keeps its memory alive. A request owns it until it completes and then gives it back.
pub struct IoBuffer {
    segments: Segments,
    /// What a request may use, at most `total`.
    len: usize,
    total: usize,
    owner: Owner,
}

// SAFETY: the memory belongs to `owner`, which is Send; the pointers are only used while `self` lives.
unsafe impl Send for IoBuffer {}

impl IoBuffer {
    /// A buffer over a vector's bytes.
    pub fn from_vec(mut v: Vec<u8>) -> Self {
        let seg = (v.as_mut_ptr(), v.len());
        Self { segments: Segments::One(seg), len: v.len(), total: v.len(), owner: Owner::Vec(v) }
    }

    /// `len` zero bytes, aligned for direct I/O.
    pub fn aligned(len: usize) -> Self {
        Self::from_aligned(AlignedBuf::zeroed(len))
    }

    /// A buffer over aligned memory.
    pub fn from_aligned(b: AlignedBuf) -> Self {
        let seg = (b.as_ptr(), b.len());
        Self { segments: Segments::One(seg), len: b.len(), total: b.len(), owner: Owner::Aligned(b) }
    }

    /// A scatter list over memory that `owner` keeps alive: guest memory.
    ///
    /// # Safety
    /// Every segment must stay valid for reads and writes until `owner` is dropped, and must not be covered by a Rust
    /// reference while a request is in flight. Others (the guest) may change the bytes at any time.
    pub unsafe fn from_raw(segments: impl IntoIterator<Item = (*mut u8, usize)>, owner: Box<dyn Any + Send>) -> Self {
        let list: Vec<_> = segments.into_iter().filter(|s| s.1 != 0).collect();
        let len = list.iter().map(|s| s.1).sum();
        let segments = if list.len() == 1 { Segments::One(list[0]) } else { Segments::Many(list) };
        Self { segments, len, total: len, owner: Owner::Other(owner) }
    }

    /// A scatter list over pinned guest memory. Ranges that a request reads into must have been pinned for writing; the
    /// caller tells the guest memory when the request has ended.
    pub fn from_guest(ranges: Vec<PinnedRange>) -> Self {
        let segments: Vec<_> = ranges
            .iter()
            .map(|r| {
                let v = r.as_iovec();
                (v.iov_base.cast(), v.iov_len)
            })
            .collect();
        // SAFETY: a pinned range's address stays valid while it lives, and the owner holds all of them; guest memory is
        // never behind a Rust reference.
        unsafe { Self::from_raw(segments, Box::new(ranges)) }
    }

    /// Length of all segments in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Length of the memory behind, whatever [`set_len`](Self::set_len) said.
    pub fn capacity(&self) -> usize {
        self.total
    }

    /// Makes the buffer as long as a request needs it: its first `len` bytes count, at most all that there are.
    pub fn set_len(&mut self, len: usize) {
        self.len = len.min(self.total);
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn segments(&self) -> &[(*mut u8, usize)] {
        match &self.segments {
            Segments::One(s) => std::slice::from_ref(s),
            Segments::Many(v) => v,
        }
    }

    /// The bytes as a vector; a copy, unless the buffer was made from one.
    pub fn into_vec(self) -> Vec<u8> {
        match self.owner {
            Owner::Vec(v) => v,
            Owner::Aligned(b) => b.to_vec(),
            Owner::Other(_) => {
                let mut v = vec![0; self.len];
                self.read(0, &mut v);
                v
            }
        }
    }

    /// The bytes, if the buffer is memory of our own (not a guest's).
    pub fn as_slice(&self) -> Option<&[u8]> {
        match &self.owner {
            Owner::Vec(v) => Some(v),
            Owner::Aligned(b) => Some(b),
            Owner::Other(_) => None,
        }
    }

    /// The bytes for writing, if the buffer is memory of our own.
    pub fn as_mut_slice(&mut self) -> Option<&mut [u8]> {
        match &mut self.owner {
            Owner::Vec(v) => Some(v),
            Owner::Aligned(b) => Some(b),
            Owner::Other(_) => None,
        }
    }

    /// Calls `f` for each piece of `offset..offset + len`, which must lie inside.
    pub(crate) fn for_range(&self, offset: usize, len: usize, mut f: impl FnMut(*mut u8, usize)) {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.len), "range outside of the buffer");
        let (mut skip, mut left) = (offset, len);
        for &(ptr, n) in self.segments() {
            if skip >= n {
                skip -= n;
                continue;
            }
            if left == 0 {
                break;
            }
            let take = (n - skip).min(left);
            f(ptr.wrapping_add(skip), take);
            skip = 0;
            left -= take;
        }
    }

    /// Copies bytes out, from `offset`.
    ///
    /// # Panics
    /// If the range is not inside the buffer.
    pub fn read(&self, offset: usize, to: &mut [u8]) {
        let mut at = 0;
        self.for_range(offset, to.len(), |p, n| {
            // SAFETY: `p..p+n` is inside a segment, valid by the constructor's contract; `to` is ours and distinct.
            unsafe { std::ptr::copy_nonoverlapping(p, to.as_mut_ptr().add(at), n) };
            at += n;
        });
    }

    /// Copies bytes in, at `offset`.
    ///
    /// # Panics
    /// If the range is not inside the buffer.
    pub fn write(&mut self, offset: usize, from: &[u8]) {
        let mut at = 0;
        self.for_range(offset, from.len(), |p, n| {
            // SAFETY: as in `read`, in the other direction.
            unsafe { std::ptr::copy_nonoverlapping(from.as_ptr().add(at), p, n) };
            at += n;
        });
    }

    pub(crate) fn fill_zero(&self, offset: usize, len: usize) {
        self.for_range(offset, len, |p, n| {
            // SAFETY: `p..p+n` is inside a segment, valid for writes by the constructor's contract.
            unsafe { std::ptr::write_bytes(p, 0, n) };
        });
    }
}

impl std::fmt::Debug for IoBuffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "IoBuffer({} bytes in {} segments)", self.len, self.segments().len())
    }
}
