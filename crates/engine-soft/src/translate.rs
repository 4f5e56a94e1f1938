//! The translator: guest code becomes host code for the same instruction set. `docs/engine-soft.md` has the design.

mod bounds;
pub mod cache;
pub mod classify;
pub mod code_memory;
pub mod emit;
pub mod facts;
pub mod flags;
mod flow;
pub mod jump_table;
pub mod kernel;
pub mod legacy;
pub mod lower;
pub mod memory;
pub mod plan;
pub mod raw;
mod recall;
pub mod run;
mod segmented;
mod shadow;
pub mod thunks;
pub mod verify;

pub use cache::Translator;

/// The translator's part of [`crate::vp::VpBlock`].
#[repr(C)]
pub struct JitState {
    /// Host RSP inside translated code.
    pub host_rsp: u64,
    /// Linear page of the code that is executed: what code addresses are computed from.
    pub page: u64,
    /// The host's RSP while translated code uses it: see [`flow`].
    pub shadow_rsp: u64,
    /// RSP of the empty stack of return addresses.
    pub shadow_top: u64,
    /// [`crate::mmu::TlbPointers::code_epoch`] that the return addresses belong to.
    pub shadow_epoch: u64,
    /// Addends of groups of accesses: see [`plan`].
    pub addends: [u64; plan::ADDENDS],
    /// Pages of those groups of a loop whose addresses move.
    pub tags: [u64; plan::ADDENDS],
    /// Addend that [`memory::Filled`] speaks of.
    pub addend: u64,
    /// Linear address and length of what [`JitState::copy`] is a copy of.
    pub copied: [u64; 2],
    /// A copy of an operand that reaches into the next page, at the operand's own alignment.
    pub copy: OperandCopy,
    /// A scratch register across a call of Rust.
    pub scratch: u64,
    /// Not zero: the vector state is not loaded, or cannot be used by SSE.
    pub no_sse: u64,
    /// Not zero: the vector state is not loaded, or cannot be used by AVX.
    pub no_avx: u64,
    /// RAX while it holds flags.
    pub rax: u64,
    /// A value across two checks of one instruction.
    pub temporary: u64,
    /// The vector state is in the host's registers: 0 no, 1 yes (SSE, x87 usable), 2 yes (AVX too).
    pub vector: u64,
    /// What an exit has to say.
    pub exit_value: u64,
    /// First slot of the jump table in use.
    pub jump_table: u64,
    /// First link that goes with it.
    pub links: u64,
    /// The VP, for calls to Rust.
    pub vp: u64,
    /// MXCSR of Rust code.
    pub host_mxcsr: u64,
    /// The guest's MXCSR while Rust code runs with the guest's vector state half loaded.
    pub guest_mxcsr: u64,
    /// The vector registers then.
    pub vectors: [[u64; 4]; 16],
    /// The translator, for calls to Rust.
    pub translator: u64,
    /// What translations rely on ([`kernel::assumed`]).
    pub assumed: u64,
    /// What blocks of 16- or 32-bit code are made for ([`cache::Key::mode`]); 0: 64-bit code.
    pub mode: u64,
    /// Offsets behind the segments' last bytes, outside 64-bit mode ([`facts`]).
    pub ends: [u64; 6],
    /// The same for 16-bit addresses: at most 64 KiB.
    pub ends16: [u64; 6],
    /// Not zero: each block is executed alone, and faults are not delivered ([`verify`]).
    pub verify: u64,
    /// Not zero: additions are translated as subtractions, for the test that [`verify`] sees it.
    pub sabotage: u64,
}

/// Room for an operand of 64 bytes at any offset in a cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct OperandCopy(pub [u8; 128]);

impl Default for JitState {
    fn default() -> Self {
        Self {
            host_rsp: 0,
            page: 0,
            shadow_rsp: 0,
            shadow_top: 0,
            shadow_epoch: 0,
            addends: [0; plan::ADDENDS],
            tags: [0; plan::ADDENDS],
            addend: 0,
            copied: [0; 2],
            copy: OperandCopy([0; 128]),
            scratch: 0,
            no_sse: 1,
            no_avx: 1,
            rax: 0,
            temporary: 0,
            vector: 0,
            exit_value: 0,
            jump_table: 0,
            links: 0,
            vp: 0,
            host_mxcsr: u64::from(x86::xsave::MXCSR_INIT),
            guest_mxcsr: u64::from(x86::xsave::MXCSR_INIT),
            vectors: [[0; 4]; 16],
            translator: 0,
            assumed: 0,
            mode: 0,
            ends: [0; 6],
            ends16: [0; 6],
            verify: 0,
            sabotage: 0,
        }
    }
}
