//! The translator: guest code becomes host code for the same instruction set. `docs/engine-soft.md` has the design.

pub mod cache;
pub mod classify;
pub mod code_memory;
pub mod emit;
pub mod flags;
pub mod jump_table;
pub mod kernel;
pub mod lower;
pub mod raw;
pub mod run;
pub mod thunks;
pub mod verify;

pub use cache::Translator;

/// The translator's part of [`crate::vp::VpBlock`].
#[repr(C)]
pub struct JitState {
    /// Host RSP inside translated code.
    pub host_rsp: u64,
    /// The guest's status flags where the host's register does not hold them.
    pub lazy: u64,
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
    /// Not zero: each block is executed alone, and faults are not delivered ([`verify`]).
    pub verify: u64,
    /// Not zero: additions are translated as subtractions, for the test that [`verify`] sees it.
    pub sabotage: u64,
}

impl Default for JitState {
    fn default() -> Self {
        Self {
            host_rsp: 0,
            lazy: 2,
            rax: 0,
            temporary: 0,
            vector: 0,
            exit_value: 0,
            jump_table: 0,
            vp: 0,
            host_mxcsr: u64::from(x86::xsave::MXCSR_INIT),
            guest_mxcsr: u64::from(x86::xsave::MXCSR_INIT),
            vectors: [[0; 4]; 16],
            translator: 0,
            assumed: 0,
            verify: 0,
            sabotage: 0,
        }
    }
}
