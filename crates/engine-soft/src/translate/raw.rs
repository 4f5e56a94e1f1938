//! Instructions as bytes: taking one apart and putting it together again with other registers or another memory operand.

/// Where a memory operand goes when an instruction is put together again.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    /// As it was: a register, by number.
    Register(u8),
    /// `[host register]`; the register's number must not be 4 or 5 modulo 8.
    Memory(u8),
    /// `[base + index + disp]`, both host registers.
    Indexed(u8, u8, i32),
    /// `[base + disp]`; the register's number must not be 4 modulo 8.
    Based(u8, i32),
}

/// An instruction, taken apart.
#[derive(Clone, Copy, Debug)]
pub struct Raw {
    /// 0x66 prefix (legacy encodings).
    pub p66: bool,
    /// F2 or F3, or 0.
    pub rep: u8,
    /// F0.
    pub lock: bool,
    /// REX byte or 0. For VEX, W is kept in bit 3.
    pub rex: u8,
    /// VEX: the third byte of the long form (W vvvv L pp); `None` for legacy.
    pub vex: Option<u8>,
    /// 0: one byte; 1: 0F; 2: 0F 38; 3: 0F 3A.
    pub map: u8,
    /// Opcode byte.
    pub opcode: u8,
    /// ModRM byte, if there is one.
    pub modrm: Option<u8>,
    /// Immediate bytes.
    pub imm: [u8; 8],
    /// How many.
    pub imm_len: u8,
}

impl Raw {
    /// Takes an instruction apart. `imm_len` and `has_modrm` follow from the decoder's knowledge: `modrm` says whether
    /// the opcode has one. `None` for encodings that are not handled here (EVEX, XOP, 3DNow).
    pub fn parse(bytes: &[u8], modrm: bool) -> Option<Self> {
        Self::parse_mode(bytes, modrm, None)
    }

    /// As [`Raw::parse`], of 32-bit (`big`) or 16-bit code. Operand-size prefixes are as they were there.
    pub fn parse_legacy(bytes: &[u8], modrm: bool, big: bool) -> Option<Self> {
        Self::parse_mode(bytes, modrm, Some(big))
    }

    fn parse_mode(bytes: &[u8], modrm: bool, legacy: Option<bool>) -> Option<Self> {
        let mut r = Raw {
            p66: false,
            rep: 0,
            lock: false,
            rex: 0,
            vex: None,
            map: 0,
            opcode: 0,
            modrm: None,
            imm: [0; 8],
            imm_len: 0,
        };
        let mut at = 0;
        let mut address = false;
        loop {
            let b = *bytes.get(at)?;
            match b {
                0x66 => r.p66 = true,
                0xf2 | 0xf3 => r.rep = b,
                0xf0 => r.lock = true,
                0x26 | 0x2e | 0x36 | 0x3e | 0x64 | 0x65 => {}
                0x67 => address = true,
                0x40..=0x4f if legacy.is_none() => {
                    r.rex = b;
                    at += 1;
                    // A prefix behind REX annuls it.
                    if matches!(
                        bytes.get(at)?,
                        0x66 | 0x67 | 0xf0 | 0xf2 | 0xf3 | 0x26 | 0x2e | 0x36 | 0x3e | 0x64 | 0x65 | 0x40..=0x4f
                    ) {
                        r.rex = 0;
                        continue;
                    }
                    break;
                }
                _ => break,
            }
            at += 1;
        }
        let word = legacy.is_some_and(|big| big == address);
        let b = *bytes.get(at)?;
        at += 1;
        match b {
            0xc4 => {
                let (p1, p2) = (*bytes.get(at)?, *bytes.get(at + 1)?);
                at += 2;
                r.map = p1 & 0x1f;
                r.rex = 0x40 | (!p1 >> 7 & 1) << 2 | (!p1 >> 6 & 1) << 1 | (!p1 >> 5 & 1) | (p2 >> 7) << 3;
                r.vex = Some(p2);
                r.opcode = *bytes.get(at)?;
                at += 1;
            }
            0xc5 => {
                let p = *bytes.get(at)?;
                at += 1;
                r.map = 1;
                r.rex = 0x40 | (!p >> 7 & 1) << 2;
                r.vex = Some(p & 0x7f);
                r.opcode = *bytes.get(at)?;
                at += 1;
            }
            0x0f => {
                let b = *bytes.get(at)?;
                at += 1;
                match b {
                    0x38 | 0x3a => {
                        r.map = if b == 0x38 { 2 } else { 3 };
                        r.opcode = *bytes.get(at)?;
                        at += 1;
                    }
                    _ => {
                        r.map = 1;
                        r.opcode = b;
                    }
                }
            }
            0x62 => return None,
            _ => r.opcode = b,
        }
        if modrm {
            let m = *bytes.get(at)?;
            at += 1;
            r.modrm = Some(m);
            let mode = m >> 6;
            if mode != 3 {
                let mut displacement = match mode {
                    0 => 0,
                    1 => 1,
                    _ => 4,
                };
                if word {
                    displacement = match mode {
                        0 if m & 7 == 6 => 2,
                        0 => 0,
                        1 => 1,
                        _ => 2,
                    };
                } else if m & 7 == 4 {
                    let sib = *bytes.get(at)?;
                    at += 1;
                    if mode == 0 && sib & 7 == 5 {
                        displacement = 4;
                    }
                } else if mode == 0 && m & 7 == 5 {
                    displacement = 4;
                }
                at += displacement;
            }
        }
        let imm = bytes.get(at..)?;
        if imm.len() > 8 {
            return None;
        }
        r.imm[..imm.len()].copy_from_slice(imm);
        r.imm_len = imm.len() as u8;
        Some(r)
    }

    /// ModRM.reg with REX.R.
    pub fn reg(&self) -> u8 {
        self.modrm.unwrap_or(0) >> 3 & 7 | (self.rex & 4) << 1
    }
    /// Changes ModRM.reg.
    pub fn set_reg(&mut self, number: u8) {
        if let Some(m) = &mut self.modrm {
            *m = *m & 0xc7 | (number & 7) << 3;
        }
        self.set_rex_bit(4, number >= 8);
    }
    /// ModRM.rm with REX.B (a register if mod is 3).
    pub fn rm(&self) -> u8 {
        self.modrm.unwrap_or(0) & 7 | (self.rex & 1) << 3
    }
    /// Is the ModRM operand memory?
    pub fn is_memory(&self) -> bool {
        self.modrm.is_some_and(|m| m >> 6 != 3)
    }
    /// Register in the opcode, with REX.B.
    pub fn opcode_reg(&self) -> u8 {
        self.opcode & 7 | (self.rex & 1) << 3
    }
    /// Changes the register in the opcode.
    pub fn set_opcode_reg(&mut self, number: u8) {
        self.opcode = self.opcode & 0xf8 | number & 7;
        self.set_rex_bit(1, number >= 8);
    }
    /// VEX.vvvv.
    pub fn vvvv(&self) -> u8 {
        !self.vex.unwrap_or(0) >> 3 & 15
    }
    /// Changes VEX.vvvv.
    pub fn set_vvvv(&mut self, number: u8) {
        if let Some(v) = &mut self.vex {
            *v = *v & 0x87 | (!number & 15) << 3;
        }
    }
    fn set_rex_bit(&mut self, bit: u8, on: bool) {
        if on {
            self.rex |= 0x40 | bit;
        } else {
            self.rex &= !bit;
        }
    }

    /// Puts the instruction together. `place` is what ModRM.rm becomes (ignored without ModRM). Segment and address-size
    /// prefixes are gone.
    pub fn emit(&self, out: &mut Vec<u8>, place: Place) {
        let mut rex = self.rex;
        let mut tail = [0u8; 8];
        let mut tail_len = 0;
        let mut push = |b: &[u8]| {
            tail[tail_len..tail_len + b.len()].copy_from_slice(b);
            tail_len += b.len();
        };
        if let Some(m) = self.modrm {
            let reg = m & 0x38;
            rex &= !3;
            match place {
                Place::Register(n) => {
                    push(&[0xc0 | reg | n & 7]);
                    rex |= n >> 3 & 1;
                }
                Place::Memory(n) => {
                    debug_assert!(n & 7 != 4 && n & 7 != 5);
                    push(&[reg | n & 7]);
                    rex |= n >> 3 & 1;
                }
                Place::Based(base, disp) => {
                    debug_assert!(base & 7 != 4);
                    rex |= base >> 3 & 1;
                    if disp == 0 && base & 7 != 5 {
                        push(&[reg | base & 7]);
                    } else if let Ok(d) = i8::try_from(disp) {
                        push(&[0x40 | reg | base & 7, d as u8]);
                    } else {
                        push(&[0x80 | reg | base & 7]);
                        push(&disp.to_le_bytes());
                    }
                }
                Place::Indexed(base, index, disp) => {
                    rex |= base >> 3 & 1 | (index >> 3 & 1) << 1;
                    let sib = (index & 7) << 3 | base & 7;
                    if disp == 0 && base & 7 != 5 {
                        push(&[reg | 4, sib]);
                    } else if let Ok(d) = i8::try_from(disp) {
                        push(&[0x44 | reg, sib, d as u8]);
                    } else {
                        push(&[0x84 | reg, sib]);
                        push(&disp.to_le_bytes());
                    }
                }
            }
            if rex & 0xf != 0 {
                rex |= 0x40;
            }
        }
        if let Some(v) = self.vex {
            let short = rex & 0xb == 0 && self.map == 1;
            if short {
                out.extend_from_slice(&[0xc5, (!rex << 5) & 0x80 | v & 0x7f, self.opcode]);
            } else {
                let p1 = (!rex << 5) & 0x80 | (!rex << 5) & 0x40 | (!rex & 1) << 5 | self.map;
                out.extend_from_slice(&[0xc4, p1, v & 0x7f | (rex << 4) & 0x80, self.opcode]);
            }
        } else {
            if self.lock {
                out.push(0xf0);
            }
            if self.p66 {
                out.push(0x66);
            }
            if self.rep != 0 {
                out.push(self.rep);
            }
            if rex != 0 {
                out.push(rex);
            }
            match self.map {
                0 => {}
                1 => out.push(0x0f),
                2 => out.extend_from_slice(&[0x0f, 0x38]),
                _ => out.extend_from_slice(&[0x0f, 0x3a]),
            }
            out.push(self.opcode);
        }
        out.extend_from_slice(&tail[..tail_len]);
        out.extend_from_slice(&self.imm[..self.imm_len as usize]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions};

    fn text(bytes: &[u8]) -> String {
        let mut d = Decoder::with_ip(64, bytes, 0, DecoderOptions::NONE);
        let i = d.decode();
        assert_eq!(i.len(), bytes.len(), "{bytes:x?}");
        i.to_string()
    }

    #[test]
    fn operands_are_replaced() {
        for (bytes, to_memory, to_register) in [
            (&[0x48, 0x8b, 0x44, 0x24, 0x08][..], "mov (%r9),%rax", "mov %r9,%rax"),
            (&[0x8b, 0x04, 0x8d, 1, 2, 3, 4], "mov (%r9),%eax", "mov %r9d,%eax"),
            (&[0xf0, 0x44, 0x0f, 0xb1, 0x27], "lock cmpxchg %r12d,(%r9)", ""),
            (&[0x66, 0x81, 0x05, 1, 2, 3, 4, 0x34, 0x12], "addw $0x1234,(%r9)", "add $0x1234,%r9w"),
            (&[0xc5, 0xf1, 0xfe, 0x10], "vpaddd (%r9),%xmm1,%xmm2", "vpaddd %xmm9,%xmm1,%xmm2"),
            (&[0xc4, 0xe2, 0xeb, 0xf6, 0x08], "mulx (%r9),%rdx,%rcx", "mulx %r9,%rdx,%rcx"),
            (&[0x66, 0x0f, 0x3a, 0x22, 0x00, 3], "pinsrd $3,(%r9),%xmm0", "pinsrd $3,%r9d,%xmm0"),
            (&[0xf3, 0x0f, 0x10, 0x02], "movss (%r9),%xmm0", "movss %xmm9,%xmm0"),
        ] {
            let raw = Raw::parse(bytes, true).unwrap();
            let mut out = Vec::new();
            raw.emit(&mut out, Place::Memory(9));
            assert_eq!(text(&out), to_memory);
            if !to_register.is_empty() {
                out.clear();
                raw.emit(&mut out, Place::Register(9));
                assert_eq!(text(&out), to_register);
            }
            out.clear();
            raw.emit(&mut out, Place::Indexed(13, 11, 0x40));
            assert!(text(&out).contains("0x40(%r13,%r11)"), "{}", text(&out));
        }
    }
}
