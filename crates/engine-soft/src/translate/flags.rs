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
    // What may raise an exception, and is slow anyway, has the flags at hand that it pushes.
    let reads = match i.mnemonic() {
        M::Div | M::Idiv => ALL,
        _ if kind == Kind::Interpret => ALL,
        _ => reads,
    };
    // Shifts by CL change nothing if the count is zero; repeated string comparisons neither.
    let variable = match i.mnemonic() {
        M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror | M::Rcl | M::Rcr => {
            i.op1_kind() == OpKind::Register && i.op1_register() == Register::CL
        }
        M::Shld | M::Shrd => i.op2_kind() == OpKind::Register,
        M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq | M::Scasb | M::Scasw | M::Scasd | M::Scasq => {
            i.has_rep_prefix() || i.has_repne_prefix()
        }
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

/// Instructions that one look follows at most.
const LOOK: u32 = 16;

/// Flags that the code at an offset in a page may read before it overwrites them, as far as a short look tells. In 64-bit code it
/// follows direct jumps inside the page. (Elsewhere offsets in the page do not wrap as addresses do.)
pub fn peek(page: &[u8], offset: usize, bits: u32) -> u8 {
    look(page, offset, bits, ALL, &mut { LOOK })
}

/// Which of the flags in `open` may be read from an offset on.
fn look(page: &[u8], offset: usize, bits: u32, mut open: u8, left: &mut u32) -> u8 {
    let Some(bytes) = page.get(offset..) else { return open };
    let mut decoder = Decoder::with_ip(bits, bytes, offset as u64, DecoderOptions::NONE);
    let mut live = 0;
    while open & !live != 0 && *left > 0 && decoder.can_decode() {
        *left -= 1;
        let i = decoder.decode();
        if i.is_invalid() {
            break;
        }
        let target = || usize::try_from(i.near_branch64()).unwrap_or(usize::MAX);
        match i.flow_control() {
            FlowControl::Next => {
                let e = effect(&i, Kind::Plain);
                live |= e.reads & open;
                open &= !e.kills;
            }
            FlowControl::ConditionalBranch if bits == 64 && i.is_jcc_short_or_near() => {
                live |= (i.rflags_read() & u32::from(open)) as u8;
                live |= look(page, target(), bits, open & !live, left);
            }
            FlowControl::UnconditionalBranch if bits == 64 && i.is_jmp_short_or_near() => {
                return live | look(page, target(), bits, open & !live, left);
            }
            _ => break,
        }
    }
    live | open
}

#[cfg(test)]
mod tests {
    use super::*;

    const CF: u8 = iced_x86::RflagsBits::CF as u8;
    const ZF: u8 = iced_x86::RflagsBits::ZF as u8;

    #[test]
    fn peeks() {
        let peek = |code: &[u8]| super::peek(code, 0, 64);
        // push rbp; mov rbp,rsp; sub rsp,16
        assert_eq!(peek(&[0x55, 0x48, 0x89, 0xe5, 0x48, 0x83, 0xec, 0x10]), 0);
        // setc al; test eax,eax
        assert_eq!(peek(&[0x0f, 0x92, 0xc0, 0x85, 0xc0]), 0x10);
        // shl eax,cl; ret
        assert_eq!(peek(&[0xd3, 0xe0, 0xc3]), ALL);
        // inc eax; add eax,eax: CF is not overwritten by INC but by ADD
        assert_eq!(peek(&[0xff, 0xc0, 0x01, 0xc0]), 0);
        assert_eq!(peek(&[0xc3]), ALL);
        // jz over (ZF); add eax,eax; over: add eax,eax
        assert_eq!(peek(&[0x74, 0x02, 0x01, 0xc0, 0x01, 0xc0]), ZF);
        assert_eq!(super::peek(&[0x74, 0x02, 0x01, 0xc0, 0x01, 0xc0], 0, 32), ALL);
        // jz over; add eax,eax; over: setc al; add eax,eax
        assert_eq!(peek(&[0x74, 0x02, 0x01, 0xc0, 0x0f, 0x92, 0xc0, 0x01, 0xc0]), ZF | CF);
        // jmp over; setc al; over: add eax,eax
        assert_eq!(peek(&[0xeb, 0x03, 0x0f, 0x92, 0xc0, 0x01, 0xc0]), 0);
        // jmp to itself, and out of the page
        assert_eq!(peek(&[0xeb, 0xfe]), ALL);
        assert_eq!(peek(&[0xeb, 0x70]), ALL);
    }
}
