//! A byte emitter for the fixed sequences around guest instructions. Register arguments are encoding numbers.

/// Scratch registers of translated code: host registers that hold no guest register.
pub const A: u8 = 9;
/// Second scratch register.
pub const B: u8 = 10;
/// Third scratch register.
pub const C: u8 = 11;
/// Holds the guest's RSP.
pub const SP: u8 = 15;
/// Host RAX, which holds the guest's.
pub const RAX: u8 = 0;
/// Host RCX.
pub const RCX: u8 = 1;

/// Condition codes, as in the low bits of Jcc.
pub mod cc {
    #![allow(missing_docs)]
    pub const B: u8 = 2;
    pub const E: u8 = 4;
    pub const NE: u8 = 5;
    pub const A: u8 = 7;
}

/// Code under construction, to be placed at a known address.
#[derive(Default)]
pub struct Asm {
    /// Bytes so far.
    pub bytes: Vec<u8>,
    /// Executable address of the first byte.
    pub base: u64,
}

impl Asm {
    /// Empty code for this address.
    pub fn new(base: u64) -> Self {
        Self { bytes: Vec::with_capacity(1024), base }
    }
    /// Where the next byte goes.
    pub fn here(&self) -> u64 {
        self.base + self.bytes.len() as u64
    }
    /// One byte.
    #[inline]
    pub fn b(&mut self, byte: u8) {
        self.bytes.push(byte);
    }
    /// Some bytes.
    #[inline]
    pub fn bs(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }
    /// 32 bits.
    #[inline]
    pub fn d(&mut self, value: u32) {
        self.bs(&value.to_le_bytes());
    }

    /// REX for reg (modrm.reg) and rm/base, with W.
    fn rex(w: bool, reg: u8, index: u8, base: u8) -> u8 {
        0x40 | u8::from(w) << 3 | (reg >> 3 & 1) << 2 | (index >> 3 & 1) << 1 | (base >> 3 & 1)
    }

    /// `op reg, gs:[offset]` or `op gs:[offset], reg` by the opcode; 64-bit if `w`.
    pub fn gs(&mut self, w: bool, op: u8, reg: u8, offset: usize) {
        self.bs(&[0x65, Self::rex(w, reg, 0, 0), op, (reg & 7) << 3 | 4, 0x25]);
        self.d(offset as u32);
    }
    /// `mov reg, gs:[offset]`.
    pub fn load_gs(&mut self, reg: u8, offset: usize) {
        self.gs(true, 0x8b, reg, offset);
    }
    /// `mov reg32, gs:[offset]`.
    pub fn load_gs32(&mut self, reg: u8, offset: usize) {
        self.gs(false, 0x8b, reg, offset);
    }
    /// `mov gs:[offset], reg`.
    pub fn store_gs(&mut self, reg: u8, offset: usize) {
        self.gs(true, 0x89, reg, offset);
    }
    /// `cmp dword gs:[offset], imm8`.
    pub fn cmp_gs32(&mut self, offset: usize, imm: u8) {
        self.bs(&[0x65, 0x83, 0x3c, 0x25]);
        self.d(offset as u32);
        self.b(imm);
    }
    /// `mov qword gs:[offset], sign-extended imm32`.
    pub fn store_gs_imm(&mut self, offset: usize, imm: i32) {
        self.bs(&[0x65, 0x48, 0xc7, 0x04, 0x25]);
        self.d(offset as u32);
        self.d(imm as u32);
    }
    /// `push qword gs:[offset]`.
    pub fn push_gs(&mut self, offset: usize) {
        self.bs(&[0x65, 0xff, 0x34, 0x25]);
        self.d(offset as u32);
    }
    /// `pop qword gs:[offset]`.
    pub fn pop_gs(&mut self, offset: usize) {
        self.bs(&[0x65, 0x8f, 0x04, 0x25]);
        self.d(offset as u32);
    }
    /// `mov to, from` (64 bits).
    pub fn mov(&mut self, to: u8, from: u8) {
        self.bs(&[Self::rex(true, from, 0, to), 0x89, 0xc0 | (from & 7) << 3 | to & 7]);
    }
    /// `mov to, value`, in the shortest form.
    pub fn mov_imm(&mut self, to: u8, value: u64) {
        if let Ok(v) = u32::try_from(value) {
            if to >= 8 {
                self.b(0x41);
            }
            self.b(0xb8 | to & 7);
            self.d(v);
        } else if let Ok(v) = i32::try_from(value as i64) {
            self.bs(&[Self::rex(true, 0, 0, to), 0xc7, 0xc0 | to & 7]);
            self.d(v as u32);
        } else {
            self.bs(&[Self::rex(true, 0, 0, to), 0xb8 | to & 7]);
            self.bs(&value.to_le_bytes());
        }
    }
    /// ModRM, SIB and displacement of `[base + index * scale + disp]` for `reg`. `index` 4 means none.
    fn mem(&mut self, reg: u8, base: Option<u8>, index: u8, scale: u8, disp: i32) {
        let ss = scale.trailing_zeros() as u8;
        let Some(base) = base else {
            self.bs(&[(reg & 7) << 3 | 4, ss << 6 | (index & 7) << 3 | 5]);
            self.d(disp as u32);
            return;
        };
        let need_sib = index != 4 || base & 7 == 4;
        let mode = if disp == 0 && base & 7 != 5 {
            0
        } else if i8::try_from(disp).is_ok() {
            0x40
        } else {
            0x80
        };
        self.b(mode | (reg & 7) << 3 | if need_sib { 4 } else { base & 7 });
        if need_sib {
            self.b(ss << 6 | (index & 7) << 3 | base & 7);
        }
        match mode {
            0 => {}
            0x40 => self.b(disp as u8),
            _ => self.d(disp as u32),
        }
    }
    /// `lea to, [base + index * scale + disp]`; 32-bit result if not `w`. `index` 4: none.
    pub fn lea(&mut self, w: bool, to: u8, base: Option<u8>, index: u8, scale: u8, disp: i32) {
        self.b(Self::rex(w, to, index, base.unwrap_or(0)));
        self.b(0x8d);
        self.mem(to, base, index, scale, disp);
    }
    /// ModRM (and displacement) of `[base + disp]` for `reg`, whose fourth bits are in a prefix already.
    pub fn operand(&mut self, reg: u8, base: u8, disp: i32) {
        self.mem(reg, Some(base), 4, 1, disp);
    }
    /// `op reg, [base + disp]` (64-bit), by opcode.
    pub fn op_mem(&mut self, op: u8, reg: u8, base: u8, disp: i32) {
        self.b(Self::rex(true, reg, 0, base));
        self.b(op);
        self.mem(reg, Some(base), 4, 1, disp);
    }
    /// `mov to, [base + disp]`.
    pub fn load(&mut self, to: u8, base: u8, disp: i32) {
        self.op_mem(0x8b, to, base, disp);
    }
    /// `mov [base + disp], from`.
    pub fn store(&mut self, from: u8, base: u8, disp: i32) {
        self.op_mem(0x89, from, base, disp);
    }
    /// `mov to, [base + index + disp]`.
    pub fn load_indexed(&mut self, to: u8, base: u8, index: u8, disp: i32) {
        self.bs(&[Self::rex(true, to, index, base), 0x8b]);
        self.mem(to, Some(base), index, 1, disp);
    }
    /// `mov [base + index + disp], from`.
    pub fn store_indexed(&mut self, from: u8, base: u8, index: u8, disp: i32) {
        self.bs(&[Self::rex(true, from, index, base), 0x89]);
        self.mem(from, Some(base), index, 1, disp);
    }
    /// `mov qword [base + index + disp], sign-extended imm32`.
    pub fn store_indexed_imm(&mut self, base: u8, index: u8, disp: i32, imm: i32) {
        self.bs(&[Self::rex(true, 0, index, base), 0xc7]);
        self.mem(0, Some(base), index, 1, disp);
        self.d(imm as u32);
    }
    /// `rorx to, from, count`.
    pub fn rorx(&mut self, to: u8, from: u8, count: u8) {
        let p1 = (!to >> 3 & 1) << 7 | 1 << 6 | (!from >> 3 & 1) << 5 | 3;
        self.bs(&[0xc4, p1, 0xfb, 0xf0, 0xc0 | (to & 7) << 3 | from & 7, count]);
    }
    /// `op reg, imm32` (group 1: `ext` is the operation), 64-bit if `w`.
    pub fn alu_imm(&mut self, w: bool, ext: u8, reg: u8, imm: i32) {
        self.b(Self::rex(w, 0, 0, reg));
        if let Ok(i) = i8::try_from(imm) {
            self.bs(&[0x83, 0xc0 | ext << 3 | reg & 7, i as u8]);
        } else {
            self.bs(&[0x81, 0xc0 | ext << 3 | reg & 7]);
            self.d(imm as u32);
        }
    }
    /// `pushfq`.
    pub fn pushf(&mut self) {
        self.b(0x9c);
    }
    /// `popfq`.
    pub fn popf(&mut self) {
        self.b(0x9d);
    }
    /// `jmp target`; gives the address of the displacement.
    pub fn jmp(&mut self, target: u64) -> u64 {
        self.b(0xe9);
        self.rel(target)
    }
    /// `call target`.
    pub fn call(&mut self, target: u64) {
        self.b(0xe8);
        self.rel(target);
    }
    /// `jcc target`; gives the address of the displacement.
    pub fn jcc(&mut self, condition: u8, target: u64) -> u64 {
        self.bs(&[0x0f, 0x80 | condition]);
        self.rel(target)
    }
    /// A displacement of 32 bits to `target`, the last part of an instruction; gives its address.
    pub fn relative(&mut self, target: u64) -> u64 {
        self.rel(target)
    }
    fn rel(&mut self, target: u64) -> u64 {
        let at = self.here();
        self.d(target.wrapping_sub(at + 4) as u32);
        at
    }
    /// Points the displacement at `at` to `target`.
    pub fn patch(&mut self, at: u64, target: u64) {
        let offset = (at - self.base) as usize;
        self.bytes[offset..offset + 4].copy_from_slice(&(target.wrapping_sub(at + 4) as u32).to_le_bytes());
    }
    /// A short forward jump (`op rel8`), to be closed by [`Asm::close`].
    pub fn short(&mut self, op: u8) -> usize {
        self.bs(&[op, 0]);
        self.bytes.len()
    }
    /// Ends a [`Asm::short`] here.
    pub fn close(&mut self, from: usize) {
        let distance = self.bytes.len() - from;
        debug_assert!(distance < 128);
        self.bytes[from - 1] = distance as u8;
    }
}
