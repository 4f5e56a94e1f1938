//! Liveness of the status flags. They are in the host's register wherever a block is entered or left, and inside a block
//! wherever something may still read them.

use super::classify::Kind;
use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind, Register};

/// The six status flags in iced's numbering.
pub const ALL: u8 = 0x3f;

/// Which flags an instruction reads, may write, and surely overwrites.
#[derive(Clone, Copy, Debug, Default)]
pub struct Effect {
    /// Read.
    pub reads: u8,
    /// Written, perhaps.
    pub writes: u8,
    /// Overwritten in every case.
    pub kills: u8,
}

/// The effect of an instruction.
pub fn effect(i: &Instruction, kind: Kind) -> Effect {
    let reads = (i.rflags_read() & u32::from(ALL)) as u8;
    let writes = (i.rflags_modified() & u32::from(ALL)) as u8;
    use Mnemonic as M;
    match i.mnemonic() {
        M::Pushfq | M::Pushfd | M::Pushf | M::Lahf => return Effect { reads: ALL, writes: 0, kills: 0 },
        _ => {}
    }
    if matches!(kind, Kind::Stop) {
        return Effect { reads: ALL, writes: ALL, kills: 0 };
    }
    // Shifts by CL change nothing if the count is zero; repeated string comparisons neither.
    let variable = match i.mnemonic() {
        M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror | M::Rcl | M::Rcr => {
            i.op1_kind() == OpKind::Register && i.op1_register() == Register::CL
        }
        M::Shld | M::Shrd => i.op2_kind() == OpKind::Register,
        M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq | M::Scasb | M::Scasw | M::Scasd | M::Scasq => true,
        _ => false,
    };
    Effect { reads, writes, kills: if variable { 0 } else { writes } }
}

/// Flags that are read later, at some place of a block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Need {
    /// A mask of them.
    pub hard: u8,
}

/// Flags that the code at `bytes` may read before it overwrites them, as far as a short look tells. `bits`: of the code.
pub fn peek(bytes: &[u8], bits: u32) -> u8 {
    let mut decoder = Decoder::with_ip(bits, bytes, 0, DecoderOptions::NONE);
    let (mut live, mut open) = (0, ALL);
    for _ in 0..8 {
        if !decoder.can_decode() {
            break;
        }
        let i = decoder.decode();
        if i.is_invalid() || i.flow_control() != FlowControl::Next {
            break;
        }
        let e = effect(&i, Kind::Plain);
        live |= e.reads & open;
        open &= !e.kills;
        if open == 0 {
            return live;
        }
    }
    live | open
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peeks() {
        // push rbp; mov rbp,rsp; sub rsp,16
        assert_eq!(peek(&[0x55, 0x48, 0x89, 0xe5, 0x48, 0x83, 0xec, 0x10], 64), 0);
        // setc al; test eax,eax
        assert_eq!(peek(&[0x0f, 0x92, 0xc0, 0x85, 0xc0], 64), 0x10);
        // shl eax,cl; ret
        assert_eq!(peek(&[0xd3, 0xe0, 0xc3], 64), ALL);
        // inc eax; add eax,eax: CF is not overwritten by INC but by ADD
        assert_eq!(peek(&[0xff, 0xc0, 0x01, 0xc0], 64), 0);
        assert_eq!(peek(&[0xc3], 64), ALL);
    }
}
