//! The decode cache: pre-digested instructions, by physical page, offset and code size, and how it learns that code
//! has changed.
//!
//! Instructions are kept in [`Block`]s: runs of instructions inside one page that are executed one after the other. A
//! block is found by the physical address of its first byte, the code size, and the generation of its page
//! ([`CodeGenerations`]): after the page has been written, its blocks are never found again. Nothing is freed one by one;
//! when the cache has grown to its bound, all of it goes.

use crate::features::Features;
use crate::interp::op::{Op, bare, flag};
use crate::interp::{Handler, Insn, lower, misc};
use crate::vp::CodeSize;
use iced_x86::{Decoder, DecoderError, DecoderOptions, Instruction};
use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::cell::Cell;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

/// Number of counters; pages share a counter by the low bits of their number, which only costs a needless re-decoding.
const GENERATIONS: usize = 1 << 16;

/// A change counter for each physical page that holds code, one table a partition.
///
/// Protocol. A cache of something derived from code bytes calls [`crate::partition_impl::SoftPartition::track_code`],
/// then reads the page's generation, then the bytes, and keeps the generation with what it derived. Whoever writes to a
/// tracked page calls `SoftPartition::code_written`, which [bumps](Self::bump) the generation and then sets
/// [`crate::vp::attention::CODE`] for every VP. Seeing CODE (or entering a page), a cache compares generations.
pub struct CodeGenerations(Box<[AtomicU32]>);

impl CodeGenerations {
    /// All zero.
    pub fn new() -> Self {
        Self((0..GENERATIONS).map(|_| AtomicU32::new(0)).collect())
    }
    /// The counter of a page (`gpa_page` is the address divided by 4096).
    #[inline]
    pub fn of(&self, gpa_page: u64) -> &AtomicU32 {
        &self.0[gpa_page as usize % GENERATIONS]
    }
    /// The present generation.
    #[inline]
    pub fn get(&self, gpa_page: u64) -> u32 {
        self.of(gpa_page).load(Ordering::Acquire)
    }
    /// The page has been (or is about to be) written: everything derived from it is stale.
    pub fn bump(&self, gpa_page: u64) {
        self.of(gpa_page).fetch_add(1, Ordering::AcqRel);
    }
}

impl Default for CodeGenerations {
    fn default() -> Self {
        Self::new()
    }
}

/// Bytes of decoded instructions that a VP keeps before it drops them all.
const CACHE_BYTES: usize = 12 << 20;
/// Bytes of an arena chunk.
const CHUNK: usize = 64 << 10;
/// Most instructions in a block. Bounds the time between two looks at `attention` when nothing asks for a look.
pub const BLOCK_MAX: usize = 48;
const BUCKETS: usize = 1 << 15;
const NONE: u32 = u32::MAX;

/// What a block is found by.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Key {
    /// Physical address of the first byte, and the code size in bits 62 and 63.
    at: u64,
    generation: u32,
}

impl Key {
    /// Key of code at a physical address.
    #[inline]
    pub fn new(gpa: u64, size: CodeSize, generation: u32) -> Self {
        Self { at: gpa | (size as u64) << 62, generation }
    }
    #[inline]
    fn bucket(self) -> usize {
        (self.at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 49) as usize & (BUCKETS - 1)
    }
}

/// A run of instructions.
#[derive(Clone, Copy)]
pub struct Block {
    key: Key,
    /// The instructions, in the arena.
    pub ops: *const Op,
    /// How many.
    pub count: u32,
    /// Length of the code in bytes.
    pub bytes: u16,
    /// Where execution went from here inside the page: offset and block.
    links: [(u16, u32); 2],
    /// Next block of the same bucket.
    next: u32,
}

/// Memory that is given out piece by piece and freed as a whole.
struct Arena {
    chunks: Vec<NonNull<u8>>,
    used: usize,
}

impl Arena {
    const LAYOUT: Layout = match Layout::from_size_align(CHUNK, 64) {
        Ok(layout) => layout,
        Err(_) => panic!("a constant"),
    };

    /// A place for `bytes` bytes, aligned to 8; at most one chunk.
    fn take(&mut self, bytes: usize) -> NonNull<u8> {
        let bytes = bytes.next_multiple_of(8);
        if self.chunks.is_empty() || self.used + bytes > CHUNK {
            // SAFETY: the layout's size is not zero.
            let p = unsafe { alloc(Self::LAYOUT) };
            self.chunks.push(NonNull::new(p).unwrap_or_else(|| handle_alloc_error(Self::LAYOUT)));
            self.used = 0;
        }
        let chunk = self.chunks[self.chunks.len() - 1];
        let at = self.used;
        self.used += bytes;
        // SAFETY: at + bytes <= CHUNK.
        unsafe { chunk.add(at) }
    }

    fn bytes(&self) -> usize {
        self.chunks.len() * CHUNK
    }

    fn clear(&mut self) {
        for p in self.chunks.drain(..) {
            // SAFETY: allocated with this layout, and nobody uses what was given out (`DecodeCache::clear`).
            unsafe { dealloc(p.as_ptr(), Self::LAYOUT) };
        }
        self.used = 0;
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        self.clear();
    }
}

/// The page that is being executed.
#[derive(Clone, Copy)]
pub struct Current {
    /// Linear address of the page; odd if there is none.
    pub page: u64,
    /// [`crate::mmu::TlbPointers::code_epoch`] when it was looked up.
    pub epoch: u64,
    /// Physical address of the page.
    pub gpa: u64,
    /// Host address; null if it is not plain memory.
    pub host: *const u8,
    /// Generation of the page.
    pub generation: u32,
}

/// A VP's decoded instructions.
pub struct DecodeCache {
    arena: Arena,
    blocks: Vec<Block>,
    buckets: Vec<u32>,
    /// The page that is being executed.
    pub current: Current,
    /// An instruction that is not kept (it crosses a page, or its page is not memory), and its [`Insn`].
    pub scratch: Box<(Op, Insn)>,
    /// Times that everything was dropped.
    pub drops: u64,
    /// Blocks decoded.
    pub decoded: u64,
}

// SAFETY: the raw pointers point into the cache's own arena and into guest memory.
unsafe impl Send for DecodeCache {}

impl Default for DecodeCache {
    fn default() -> Self {
        Self::new()
    }
}

impl DecodeCache {
    /// Empty.
    pub fn new() -> Self {
        let insn = Insn {
            handler: |_, _| Err(crate::vp::Fault::UD),
            iced: Instruction::default(),
            bytes: [0; 15],
            cache: Cell::new(0),
        };
        let op = bare(misc::undefined, &insn.iced, CodeSize::Bits64);
        Self {
            arena: Arena { chunks: Vec::new(), used: 0 },
            blocks: Vec::new(),
            buckets: Vec::new(),
            current: Current { page: 1, epoch: 0, gpa: 0, host: std::ptr::null(), generation: 0 },
            scratch: Box::new((op, insn)),
            drops: 0,
            decoded: 0,
        }
    }

    /// Drops everything. No instruction of the cache may be executing.
    pub fn clear(&mut self) {
        self.arena.clear();
        self.blocks = Vec::new();
        self.buckets.clear();
        self.current.page = 1;
        self.drops += 1;
    }

    /// Is it so full that it must be cleared before more is added?
    pub fn full(&self) -> bool {
        self.arena.bytes() + self.blocks.len() * size_of::<Block>() >= CACHE_BYTES
    }

    /// Bytes that it holds.
    pub fn held(&self) -> usize {
        self.arena.bytes() + self.blocks.capacity() * size_of::<Block>()
    }

    /// The block with this number.
    #[inline(always)]
    pub fn block(&self, number: u32) -> &Block {
        &self.blocks[number as usize]
    }

    /// Finds a block.
    pub fn find(&self, key: Key) -> Option<u32> {
        let mut n = *self.buckets.get(key.bucket())?;
        while n != NONE {
            let b = &self.blocks[n as usize];
            if b.key == key {
                return Some(n);
            }
            n = b.next;
        }
        None
    }

    /// Where execution goes on after `block` at `offset` of the same page, if it has gone there before.
    #[inline(always)]
    pub fn follow(&self, block: u32, offset: u16) -> Option<u32> {
        let b = self.block(block);
        if b.links[0].0 == offset {
            return Some(b.links[0].1);
        }
        (b.links[1].0 == offset).then_some(b.links[1].1)
    }

    /// Remembers that execution went from `block` to `to` at `offset`, if both are of one page, code size and generation.
    pub fn link(&mut self, block: u32, offset: u16, to: u32) {
        let key = self.blocks[to as usize].key;
        // The cache may have been cleared since `block` was executed.
        let Some(b) = self.blocks.get_mut(block as usize) else { return };
        if b.key.at >> 12 != key.at >> 12 || b.key.generation != key.generation {
            return;
        }
        b.links[0] = b.links[1];
        b.links[1] = (offset, to);
    }

    /// Keeps a block.
    pub fn add(&mut self, key: Key, ops: &[Op], bytes: u16) -> u32 {
        if self.buckets.is_empty() {
            self.buckets = vec![NONE; BUCKETS];
        }
        let place = self.arena.take(size_of_val(ops)).cast::<Op>();
        // SAFETY: `place` has room for `ops`, is aligned to 8, and is nobody else's.
        unsafe { std::ptr::copy_nonoverlapping(ops.as_ptr(), place.as_ptr(), ops.len()) };
        let number = self.blocks.len() as u32;
        let bucket = &mut self.buckets[key.bucket()];
        self.blocks.push(Block {
            key,
            ops: place.as_ptr(),
            count: ops.len() as u32,
            bytes,
            links: [(u16::MAX, NONE); 2],
            next: *bucket,
        });
        *bucket = number;
        self.decoded += 1;
        number
    }

    /// Keeps an instruction for an [`Op`] that refers to it.
    fn keep(&mut self, insn: Insn) -> *const Insn {
        let place = self.arena.take(size_of::<Insn>()).cast::<Insn>();
        // SAFETY: `place` has room for an `Insn`, is aligned to 8, and is nobody else's.
        unsafe { place.write(insn) };
        place.as_ptr()
    }

    /// The compact form of a decoded instruction, with its `Insn` in the arena if it needs one.
    pub fn digest(&mut self, d: &Decoded, size: CodeSize, features: &Features) -> Op {
        if let Some(mut op) = own_form(d, size, features) {
            op.len = d.iced.len() as u8;
            return op;
        }
        let (insn, flags) = foreign(d);
        let mut op = bare(run_insn, &d.iced, size);
        op.flags = op.flags & flag::LONG | flags;
        op.imm = self.keep(insn) as u64;
        op
    }

    /// As [`DecodeCache::digest`], into [`DecodeCache::scratch`].
    pub fn digest_scratch(&mut self, d: &Decoded, size: CodeSize, features: &Features) -> *const Op {
        match own_form(d, size, features) {
            Some(op) => self.scratch.0 = op,
            None => {
                let (insn, flags) = foreign(d);
                let mut op = bare(run_insn, &d.iced, size);
                op.flags = op.flags & flag::LONG | flags;
                self.scratch.1 = insn;
                op.imm = &raw const self.scratch.1 as u64;
                self.scratch.0 = op;
            }
        }
        self.scratch.0.len = d.iced.len() as u8;
        &raw const self.scratch.0
    }
}

/// Runs an instruction that is not in compact form.
fn run_insn(vp: &mut crate::vp::SoftVp, op: &Op) -> crate::vp::Exec {
    // SAFETY: `digest` and `digest_scratch` stored the address of an `Insn` that lives as long as the `Op`: the cache is
    // only cleared between instructions.
    let insn = unsafe { &*(op.imm as *const Insn) };
    (insn.handler)(vp, insn)
}

fn own_form(d: &Decoded, size: CodeSize, features: &Features) -> Option<Op> {
    if d.undefined {
        let mut op = bare(misc::undefined, &d.iced, size);
        op.flags |= flag::END;
        return Some(op);
    }
    lower::lower(&d.iced, size, features)
}

/// The instruction and block flags for a handler of another module.
fn foreign(d: &Decoded) -> (Insn, u8) {
    let i = &d.iced;
    let (handler, flags): (Handler, u8) = if let Some(h) = crate::native::handler(i) {
        (h, 0)
    } else if let Some(h) = crate::xstate::handler(i) {
        (h, flag::END)
    } else if let Some(h) = crate::control::handler(i).or_else(|| crate::system::handler(i)) {
        (h, flag::END)
    } else {
        (|_, _| Err(crate::vp::Fault::UD), flag::END)
    };
    (Insn { handler, iced: *i, bytes: d.bytes, cache: Cell::new(0) }, flags)
}

/// What the decoder made of some bytes.
pub struct Decoded {
    /// The instruction, at IP 0.
    pub iced: Instruction,
    /// Its bytes.
    pub bytes: [u8; 15],
    /// It is #UD: an invalid encoding, or not part of the model.
    pub undefined: bool,
}

/// Longest instruction.
pub const MAX_LEN: usize = 15;

/// Decodes instructions from a piece of code.
pub struct CodeReader<'a> {
    decoder: Decoder<'a>,
    bytes: &'a [u8],
    features: &'a Features,
}

/// Decoder options for a processor model: encodings that a processor without the feature executes as another
/// instruction.
fn options(features: &Features) -> u32 {
    let mut o = DecoderOptions::NONE;
    if !features.is_intel() {
        o |= DecoderOptions::AMD;
    }
    if !features.bmi1() {
        o |= DecoderOptions::NO_MPFX_0FBC;
    }
    if !features.lzcnt() {
        o |= DecoderOptions::NO_MPFX_0FBD;
    }
    o | DecoderOptions::NO_WBNOINVD
}

impl<'a> CodeReader<'a> {
    /// Decodes from the start of `bytes`.
    pub fn new(bytes: &'a [u8], size: CodeSize, features: &'a Features) -> Self {
        let bits = match size {
            CodeSize::Bits16 => 16,
            CodeSize::Bits32 => 32,
            CodeSize::Bits64 => 64,
        };
        Self { decoder: Decoder::with_ip(bits, bytes, 0, options(features)), bytes, features }
    }

    /// Offset of the next instruction.
    pub fn position(&self) -> usize {
        self.decoder.position()
    }

    /// Decodes the next instruction; `None` if the bytes end inside it.
    pub fn decode(&mut self) -> Option<Decoded> {
        let start = self.decoder.position();
        self.decoder.set_ip(0);
        let iced = self.decoder.decode();
        let undefined = iced.is_invalid();
        if undefined && self.decoder.last_error() == DecoderError::NoMoreBytes {
            return None;
        }
        let mut bytes = [0; MAX_LEN];
        let len = iced.len().min(MAX_LEN);
        bytes[..len].copy_from_slice(&self.bytes[start..start + len]);
        Some(Decoded { iced, bytes, undefined: undefined || !self.features.allows(&iced) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn op() -> Op {
        bare(misc::undefined, &Instruction::default(), CodeSize::Bits64)
    }

    #[test]
    fn a_block_is_found_by_place_size_and_generation() {
        let mut cache = DecodeCache::new();
        let key = Key::new(0x1234, CodeSize::Bits32, 7);
        assert!(cache.find(key).is_none());
        let n = cache.add(key, &[op(), op()], 9);
        assert_eq!(cache.find(key), Some(n));
        assert_eq!((cache.block(n).count, cache.block(n).bytes), (2, 9));
        for other in [
            Key::new(0x1235, CodeSize::Bits32, 7),
            Key::new(0x1234, CodeSize::Bits16, 7),
            Key::new(0x1234, CodeSize::Bits32, 8),
        ] {
            assert!(cache.find(other).is_none());
        }
    }

    #[test]
    fn blocks_are_linked_only_inside_a_page_a_size_and_a_generation() {
        let mut cache = DecodeCache::new();
        let from = cache.add(Key::new(0x1000, CodeSize::Bits64, 1), &[op()], 1);
        let same = cache.add(Key::new(0x1800, CodeSize::Bits64, 1), &[op()], 1);
        let others = [
            Key::new(0x2800, CodeSize::Bits64, 1),
            Key::new(0x1800, CodeSize::Bits32, 1),
            Key::new(0x1800, CodeSize::Bits64, 2),
        ];
        for key in others {
            let to = cache.add(key, &[op()], 1);
            cache.link(from, 0x800, to);
            assert_eq!(cache.follow(from, 0x800), None);
        }
        cache.link(from, 0x800, same);
        assert_eq!(cache.follow(from, 0x800), Some(same));
        assert_eq!(cache.follow(from, 0x801), None);
        // Three successors: the last two are remembered.
        for offset in [0x10, 0x20] {
            let to = cache.add(Key::new(0x1000 + offset, CodeSize::Bits64, 1), &[op()], 1);
            cache.link(from, offset as u16, to);
        }
        assert_eq!(cache.follow(from, 0x800), None);
        assert!(cache.follow(from, 0x10).is_some() && cache.follow(from, 0x20).is_some());
    }

    #[test]
    fn the_cache_is_bounded_and_starts_again() {
        let mut cache = DecodeCache::new();
        let ops = [op(); BLOCK_MAX];
        let mut at = 0;
        while !cache.full() {
            cache.add(Key::new(at, CodeSize::Bits64, 0), &ops, 48);
            at += 64;
            assert!(at < 64 * (CACHE_BYTES / size_of_val(&ops)) as u64 + 64, "never full");
        }
        // What is in the arena is intact: every block still has its own instructions.
        for (n, b) in cache.blocks.iter().enumerate() {
            assert_eq!(b.count as usize, BLOCK_MAX);
            assert!(n == 0 || b.ops != cache.blocks[n - 1].ops);
        }
        cache.clear();
        assert!(!cache.full() && cache.find(Key::new(0, CodeSize::Bits64, 0)).is_none());
        let n = cache.add(Key::new(0, CodeSize::Bits64, 0), &ops, 48);
        assert_eq!(cache.find(Key::new(0, CodeSize::Bits64, 0)), Some(n));
    }

    #[test]
    fn a_reader_stops_where_the_bytes_end_and_knows_the_model() {
        let model = x86::cpuid::CpuModel::by_name("x86-64-v2").expect("every host has it");
        let features = Features::from_table(&model.table(0, 1, 1_000_000_000));
        let code = [0x90, 0xc4, 0xe2, 0x78, 0xf2, 0xc1, 0x48, 0xb8, 1, 2];
        let mut reader = CodeReader::new(&code, CodeSize::Bits64, &features);
        assert!(reader.decode().is_some_and(|d| !d.undefined && d.iced.len() == 1));
        // ANDN: not in x86-64-v2.
        assert!(reader.decode().is_some_and(|d| d.undefined && d.bytes[..5] == code[1..6]));
        assert!(reader.decode().is_none(), "MOV r64, imm64 is cut off");
    }

    #[test]
    fn a_page_has_its_own_generation() {
        let g = CodeGenerations::new();
        let before = (g.get(5), g.get(6));
        g.bump(5);
        assert_eq!((g.get(5), g.get(6)), (before.0 + 1, before.1));
    }
}
