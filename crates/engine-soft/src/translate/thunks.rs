//! The fixed pieces of generated code: into it, out of it, and from it to Rust and back.
//!
//! Inside, the host's stack pointer stays where [`Thunks::enter`] left it (16-byte aligned), the GS base is the VP
//! block, and the guest's registers are where [`super::lower`] says.

use super::emit::{A, Asm, B, C, SP, cc};
use super::flow;
use super::lower::jit;
use crate::native::host_components;
use crate::vp::VpBlock;
use std::mem::offset_of;
use x86::regs::rflags::STATUS;
use x86::xsave::legacy;

/// Why translated code came back.
pub mod code {
    #![allow(missing_docs)]
    /// A direct exit that is not patched: the value is its number.
    pub const DIRECT: u64 = 0;
    /// The value is the RIP of an instruction for the interpreter.
    pub const INTERPRET: u64 = 1;
    /// Attention at a direct jump: the value is RIP.
    pub const RESUME: u64 = 2;
    /// Not in the jump table, or attention: the value is RIP.
    pub const TABLE: u64 = 3;
    /// The interpreter was called and execution cannot go on in the block; the VP block's RIP is right.
    pub const STATE: u64 = 4;
    /// A link that is not entered, or attention: the value is RIP; the bits from 8 on are the link's number.
    pub const LINK: u64 = 5;
}

/// Addresses of the pieces.
#[derive(Clone, Copy, Debug, Default)]
pub struct Thunks {
    /// `extern "C" fn(*mut VpBlock, entry) -> code`.
    pub enter: u64,
    /// A: number of the exit; flags in the host's register.
    pub exit_direct: u64,
    /// A: RIP; flags in the host's register.
    pub exit_interpret: u64,
    /// A: RIP; flags in the host's register.
    pub exit_resume: u64,
    /// A: RIP; flags in the host's register.
    pub exit_table: u64,
    /// A: RIP, B: number of the link; flags in the host's register.
    pub exit_link: u64,
    /// Called behind an instruction that was executed on a copy of its operand: writes the copy back.
    pub put_back: u64,
    /// A: RIP; flags in the host's register. Where a return without its call comes to.
    pub unpaired: u64,
    /// Called with A: linear address, B: bytes, bit 16 for a write, bit 17 if a copy of the operand will do, bit 18
    /// if the access follows at once. Gives in B a
    /// [`super::memory::Filled`], in C an addend. Keeps all other registers; destroys the flags.
    pub fill: u64,
    /// A: RIP of an instruction of the kernel's that does not touch the vector state; flags in the host's register.
    /// Executed by a call; execution goes on at what follows without leaving translated code.
    pub exit_system: u64,
    /// Called with A: RIP, B: length. Returns if the block can go on.
    pub call_interpreter: u64,
    /// The same for an instruction that does not touch the vector state.
    pub call_interpreter_light: u64,
    /// Called with A: RIP, C: level. Returns with the vector state loaded.
    pub call_vector: u64,
    /// The host has BMI2.
    pub bmi2: bool,
    /// The host lets us set the GS base in user mode.
    pub fsgsbase: bool,
    /// Bytes of all pieces.
    pub len: usize,
}

/// `extern "C" fn(vp: *mut SoftVp, len) -> go on?`.
pub type InterpretHelper = unsafe extern "C" fn(*mut crate::vp::SoftVp, u64) -> u64;
/// `extern "C" fn(vp: *mut SoftVp, value, code) -> where to go on (0: leave)`, and the same with other meanings.
pub type AdvanceHelper = unsafe extern "C" fn(*mut crate::vp::SoftVp, u64, u64) -> u64;

/// What generated code calls.
#[derive(Clone, Copy)]
pub struct Helpers {
    /// Executes one instruction; 1: the block can go on.
    pub interpret: InterpretHelper,
    /// May the vector state be used?
    pub vector: InterpretHelper,
    /// Tries to make an access possible; gives a [`super::memory::Filled`].
    pub fill: AdvanceHelper,
    /// Writes a copied operand back.
    pub put_back: unsafe extern "C" fn(*mut crate::vp::SoftVp),
    /// Finds (and makes) what is executed next, after doing what the [`code`] asks for.
    pub advance: AdvanceHelper,
}

/// The host's stack pointer.
const RSP: u8 = 4;

/// Guest registers that live in host registers: (guest, host).
const HELD: [(u8, u8); 12] =
    [(0, 0), (1, 1), (2, 2), (3, 3), (5, 5), (6, 6), (7, 7), (8, 8), (12, 12), (13, 13), (14, 14), (4, SP)];

fn rflags() -> usize {
    offset_of!(VpBlock, rflags)
}
fn xsave() -> usize {
    offset_of!(VpBlock, xsave)
}

/// Registers and flags (which must be in the host's register) into the VP block. Destroys RAX, RCX and the flags. LAHF
/// and SETO cost a third of PUSHFQ.
fn save_state(a: &mut Asm) {
    store_registers(a);
    const { assert!(STATUS == 0x8d5) };
    a.bs(&[0x9f, 0x0f, 0x90, 0xc0]); // lahf; seto al
    a.bs(&[0x0f, 0xb6, 0xcc, 0x0f, 0xb6, 0xc0]); // movzx ecx, ah; movzx eax, al
    a.bs(&[0xc1, 0xe0, 11]); // shl eax, 11
    a.bs(&[0x09, 0xc8]); // or eax, ecx
    merge_status(a);
}

fn store_registers(a: &mut Asm) {
    for (guest, host) in HELD {
        a.store_gs(host, 8 * guest as usize);
    }
}

/// Status flags in RAX (and nothing else but RFLAGS bit 1) into the VP block's RFLAGS.
fn merge_status(a: &mut Asm) {
    a.load_gs(1, rflags());
    a.alu_imm(true, 4, 1, !(STATUS as i32));
    a.bs(&[0x48, 0x09, 0xc8]); // or rax, rcx
    a.store_gs(0, rflags());
}

fn load_registers(a: &mut Asm) {
    for (guest, host) in HELD {
        a.load_gs(host, 8 * guest as usize);
    }
}

fn load_state(a: &mut Asm) {
    a.load_gs32(0, rflags());
    a.bs(&[0x89, 0xc1, 0xc1, 0xe9, 11]); // mov ecx, eax; shr ecx, 11
    a.bs(&[0x83, 0xe1, 1]); // and ecx, 1
    a.bs(&[0x88, 0xc4]); // mov ah, al
    a.bs(&[0x80, 0xc1, 0x7f]); // add cl, 0x7f: OF
    a.b(0x9e); // sahf
    load_registers(a);
}

/// Guest registers and flags from the VP block, the stack of return addresses, and on to C.
fn resume(a: &mut Asm) {
    load_state(a);
    a.load_gs(RSP, jit!(shadow_rsp));
    a.bs(&[0x41, 0xff, 0xe3]); // jmp r11
}

/// As [`resume`], to the code that called.
fn give_back(a: &mut Asm) {
    load_state(a);
    a.load_gs(RSP, jit!(shadow_rsp));
    a.b(0xc3);
}

/// From the stack of return addresses to the thread's own, as [`Thunks::enter`] left it: 16-byte aligned.
fn to_host_stack(a: &mut Asm) {
    a.store_gs(RSP, jit!(shadow_rsp));
    a.load_gs(RSP, jit!(host_rsp));
}

/// Forgets the return address into the code that called: it is not gone back to.
fn drop_return(a: &mut Asm) {
    a.bs(&[0x65, 0x48, 0x83, 0x04, 0x25]); // add qword gs:[shadow_rsp], 8
    a.d(jit!(shadow_rsp) as u32);
    a.b(8);
}

/// Notes the level of the vector state that is loaded: that in a register (RCX is destroyed), or none.
fn set_level(a: &mut Asm, register: Option<u8>) {
    match register {
        None => {
            a.store_gs_imm(jit!(vector), 0);
            a.store_gs_imm(jit!(no_sse), 1);
            a.store_gs_imm(jit!(no_avx), 1);
        }
        Some(level) => {
            a.store_gs(level, jit!(vector));
            a.store_gs_imm(jit!(no_sse), 0);
            a.mov_imm(1, 2);
            a.bs(&[0x48, 0x29, 0xc1 | level << 3]); // sub rcx, level
            a.store_gs(1, jit!(no_avx));
        }
    }
}

/// Does the host have AVX?
fn host_avx() -> bool {
    host_components() & 4 != 0
}

/// Moves the vector registers to or from [`JitState::vectors`].
fn move_vectors(a: &mut Asm, store: bool) {
    for n in 0..16u8 {
        let op = if store { 0x11 } else { 0x10 };
        if host_avx() {
            a.bs(&[0x65, 0xc5, if n < 8 { 0xfc } else { 0x7c }, op]); // vmovups ymm
        } else {
            a.b(0x65);
            if n >= 8 {
                a.b(0x44);
            }
            a.bs(&[0x0f, op]); // movups xmm
        }
        a.bs(&[(n & 7) << 3 | 4, 0x25]);
        a.d((jit!(vectors) + 32 * usize::from(n)) as u32);
    }
}

/// Keeps what Rust code may destroy of a vector state that is loaded: the registers and MXCSR. The x87 unit, which Rust
/// code does not use, keeps the guest's state; the image in the VP block stays out of date. A tenth of [`spill`]'s cost.
fn spill_light(a: &mut Asm) {
    a.cmp_gs32(jit!(vector), 0);
    let skip = a.jcc(cc::E, 0);
    state_op(a, false, 3, jit!(guest_mxcsr)); // stmxcsr
    move_vectors(a, true);
    if host_avx() {
        a.bs(&[0xc5, 0xf8, 0x77]); // vzeroupper
    }
    state_op(a, false, 2, jit!(host_mxcsr)); // ldmxcsr
    let here = a.here();
    a.patch(skip, here);
}

/// Undoes [`spill_light`].
fn reload_light(a: &mut Asm) {
    a.cmp_gs32(jit!(vector), 0);
    let skip = a.jcc(cc::E, 0);
    move_vectors(a, false);
    state_op(a, false, 2, jit!(guest_mxcsr)); // ldmxcsr
    let here = a.here();
    a.patch(skip, here);
}

/// `op gs:[offset]` for the 0F AE group.
fn state_op(a: &mut Asm, wide: bool, ext: u8, offset: usize) {
    a.b(0x65);
    if wide {
        a.b(0x48);
    }
    a.bs(&[0x0f, 0xae, ext << 3 | 4, 0x25]);
    a.d(offset as u32);
}

/// Stores the vector state if it is loaded, and gives the host its own. Destroys RAX, RDX. `forget`: it is then not
/// loaded any more.
fn spill(a: &mut Asm, forget: bool) {
    a.cmp_gs32(jit!(vector), 0);
    let skip = a.jcc(cc::E, 0);
    a.mov_imm(0, host_components());
    a.bs(&[0x31, 0xd2]); // xor edx, edx
    state_op(a, true, 4, xsave());
    // The last x87 instruction's address would be a host address.
    a.store_gs_imm(xsave() + legacy::FIP, 0);
    a.store_gs_imm(xsave() + legacy::FDP, 0);
    a.bs(&[0x65, 0x66, 0xc7, 0x04, 0x25]);
    a.d((xsave() + legacy::FOP) as u32);
    a.bs(&[0, 0]);
    if host_components() & 4 != 0 {
        a.bs(&[0xc5, 0xf8, 0x77]); // vzeroupper
    }
    a.bs(&[0xdb, 0xe3]); // fninit
    state_op(a, false, 2, jit!(host_mxcsr)); // ldmxcsr
    if forget {
        set_level(a, None);
    }
    let here = a.here();
    a.patch(skip, here);
}

fn reload_vector(a: &mut Asm) {
    a.mov_imm(0, host_components());
    a.bs(&[0x31, 0xd2]);
    state_op(a, true, 5, xsave()); // xrstor64
}

/// Ends with the return to Rust; the code is in RAX's slot of the argument.
fn leave(a: &mut Asm, code: u64) {
    spill(a, true);
    a.load_gs(RSP, jit!(host_rsp));
    a.mov_imm(0, code);
    a.alu_imm(true, 0, 4, 8);
    a.bs(&[0x41, 0x5f, 0x41, 0x5e, 0x41, 0x5d, 0x41, 0x5c, 0x5d, 0x5b, 0xc3]);
}

/// Calls a helper with the VP and the two arguments that are in RSI and RDX.
fn call_helper(a: &mut Asm, helper: usize) {
    a.load_gs(7, jit!(vp));
    a.mov_imm(0, helper as u64);
    a.bs(&[0xff, 0xd0]); // call rax
}

/// Generates the pieces for an address.
pub fn build(base: u64, helpers: Helpers) -> (Vec<u8>, Thunks) {
    let mut a = Asm::new(base);
    let mut t = Thunks { bmi2: std::arch::is_x86_feature_detected!("bmi2"), fsgsbase: fsgsbase(), ..Thunks::default() };

    t.enter = a.here();
    // push rbx, rbp, r12-r15; sub rsp, 8
    a.bs(&[0x53, 0x55, 0x41, 0x54, 0x41, 0x55, 0x41, 0x56, 0x41, 0x57, 0x48, 0x83, 0xec, 8]);
    if t.fsgsbase {
        a.bs(&[0xf3, 0x48, 0x0f, 0xae, 0xdf]); // wrgsbase rdi
    }
    a.store_gs(RSP, jit!(host_rsp));
    a.mov(C, 6);
    resume(&mut a);

    let exit = |a: &mut Asm, code: u64| {
        let at = a.here();
        save_state(a);
        a.store_gs(A, jit!(exit_value));
        a.store_gs(RSP, jit!(shadow_rsp));
        leave(a, code);
        at
    };
    t.exit_interpret = exit(&mut a, code::INTERPRET);
    t.exit_resume = exit(&mut a, code::RESUME);

    // Registers are in the VP block, the vector state is lightly spilled, the stack is the host's; RDX: code, RSI: value.
    let advance = a.here();
    call_helper(&mut a, helpers.advance as usize);
    a.mov(C, 0);
    reload_light(&mut a);
    a.bs(&[0x4d, 0x85, 0xdb]); // test r11, r11
    let leaves = a.jcc(cc::E, 0);
    a.load_gs(A, offset_of!(VpBlock, rip));
    resume(&mut a);
    let here = a.here();
    a.patch(leaves, here);
    leave(&mut a, code::STATE);

    let exit = |a: &mut Asm, code: u64| {
        let at = a.here();
        save_state(a);
        to_host_stack(a);
        spill_light(a);
        a.mov(6, A);
        a.mov_imm(2, code);
        a.jmp(advance);
        at
    };
    t.exit_direct = exit(&mut a, code::DIRECT);
    t.exit_table = exit(&mut a, code::TABLE);
    t.exit_system = exit(&mut a, code::INTERPRET);
    t.exit_link = a.here();
    save_state(&mut a);
    to_host_stack(&mut a);
    spill_light(&mut a);
    a.mov(6, A);
    a.mov(2, B);
    a.bs(&[0xc1, 0xe2, 8]); // shl edx, 8
    a.bs(&[0x83, 0xca, code::LINK as u8]); // or edx, LINK
    a.jmp(advance);

    // A return without its call: the stack of return addresses is emptied.
    t.unpaired = a.here();
    a.load_gs(RSP, jit!(shadow_top));
    flow::table_jump(&mut a, &t, false);

    t.call_interpreter = a.here();
    save_state(&mut a);
    a.store_gs(A, offset_of!(VpBlock, rip));
    to_host_stack(&mut a);
    spill(&mut a, false);
    a.mov(6, B);
    call_helper(&mut a, helpers.interpret as usize);
    a.bs(&[0x85, 0xc0]); // test eax, eax
    let failed = a.jcc(cc::E, 0);
    a.cmp_gs32(jit!(vector), 0);
    let not_loaded = a.jcc(cc::E, 0);
    reload_vector(&mut a);
    let here = a.here();
    a.patch(not_loaded, here);
    give_back(&mut a);
    let here = a.here();
    a.patch(failed, here);
    set_level(&mut a, None);
    drop_return(&mut a);
    leave(&mut a, code::STATE);

    t.call_interpreter_light = a.here();
    save_state(&mut a);
    a.store_gs(A, offset_of!(VpBlock, rip));
    to_host_stack(&mut a);
    spill_light(&mut a);
    a.mov(6, B);
    call_helper(&mut a, helpers.interpret as usize);
    a.bs(&[0x85, 0xc0]); // test eax, eax
    let failed = a.jcc(cc::E, 0);
    reload_light(&mut a);
    give_back(&mut a);
    let here = a.here();
    a.patch(failed, here);
    drop_return(&mut a);
    a.mov_imm(2, code::STATE);
    a.jmp(advance);

    t.call_vector = a.here();
    save_state(&mut a);
    a.store_gs(A, jit!(exit_value));
    to_host_stack(&mut a);
    spill(&mut a, true);
    a.mov(6, C);
    call_helper(&mut a, helpers.vector as usize);
    a.bs(&[0x85, 0xc0]);
    let refused = a.jcc(cc::E, 0);
    set_level(&mut a, Some(0));
    reload_vector(&mut a);
    give_back(&mut a);
    let here = a.here();
    a.patch(refused, here);
    drop_return(&mut a);
    leave(&mut a, code::INTERPRET);

    t.fill = a.here();
    a.store_gs(A, jit!(scratch));
    to_host_stack(&mut a);
    a.bs(&[0x50, 0x51, 0x52, 0x56, 0x57, 0x41, 0x50]); // push rax, rcx, rdx, rsi, rdi, r8
    spill_light(&mut a);
    a.mov(6, A);
    a.mov(2, B);
    call_helper(&mut a, helpers.fill as usize);
    a.mov(B, 0);
    reload_light(&mut a);
    a.bs(&[0x41, 0x58, 0x5f, 0x5e, 0x5a, 0x59, 0x58]); // pop r8, rdi, rsi, rdx, rcx, rax
    a.load_gs(RSP, jit!(shadow_rsp));
    a.load_gs(A, jit!(scratch));
    a.load_gs(C, jit!(addend));
    a.b(0xc3);

    t.put_back = a.here();
    save_state(&mut a);
    to_host_stack(&mut a);
    spill_light(&mut a);
    call_helper(&mut a, helpers.put_back as usize);
    reload_light(&mut a);
    give_back(&mut a);

    t.len = a.bytes.len();
    (a.bytes, t)
}

/// May user mode write the GS base (HWCAP2 bit 1, kernels since 5.9)?
fn fsgsbase() -> bool {
    // SAFETY: getauxval reads a process constant.
    unsafe { libc::getauxval(libc::AT_HWCAP2) & 2 != 0 }
}

/// Sets the GS base where the instruction may not be used.
///
/// # Safety
/// `block` must live as long as translated code may be executed by this thread.
pub unsafe fn set_gs_base(block: *mut VpBlock) {
    const ARCH_SET_GS: libc::c_int = 0x1001;
    // SAFETY: nothing in this process uses GS but translated code.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_SET_GS, block) };
}
