//! Which pages of code may be executed directly.
//!
//! A few instructions neither trap in ring 3 nor do there what they do on the guest's processor: they tell of the host.
//! A page is executed directly only if none of them is in it. (Segment loads are found out at the next
//! stop; that selectors are the same ones, [`super::run`] has seen to.)

use iced_x86::{Decoder, DecoderOptions, Instruction};

/// May all code in these bytes (a page, or the end of one) be executed directly? `before`: the end of what precedes it in the
/// address space, as far as it is known, which helps to find where instructions begin. `next`: the first bytes of the page
/// that follows, if it is executable already: an instruction that begins at the end goes on there. Whoever maps that page later
/// looks at the [`TAIL`] of this one again.
pub fn is_direct(before: &[u8], code: &[u8], next: &[u8]) -> bool {
    let all = [before, code, next].concat();
    let byte = |at: usize| all.get(at).copied();
    let own = before.len()..before.len() + code.len();
    let mut places = own.filter(|at| all[*at] == 0x0f);
    places.all(|at| !tells(byte(at + 1), byte(at + 2), || is_repeated(&all, at)) || !is_instruction(&all, at))
}

/// Bytes at the end of a page that matter to the next one.
pub const TAIL: usize = 64;

/// Where decoding begins before a place that is suspected: far enough that it finds the instructions' boundaries, wherever
/// it begins.
const LEAD: usize = 48;

/// Is the opcode at this place one of an instruction's, rather than bytes of a displacement or an immediate? Code is decoded
/// from several places before it: most of them soon agree on where instructions begin. (Code that hides an instruction in
/// another one finds out about the host; it gets no further.)
fn is_instruction(code: &[u8], at: usize) -> bool {
    let from = at.saturating_sub(LEAD + 15);
    let bytes = &code[from..code.len().min(at + 16)];
    let at = at - from;
    let (mut hits, mut tries) = (0, 0);
    for start in 0..=at.min(15) {
        let mut decoder = Decoder::new(64, &bytes[start..], DecoderOptions::NONE);
        let mut instruction = Instruction::default();
        while decoder.can_decode() && start + decoder.position() <= at {
            decoder.decode_out(&mut instruction);
            let end = start + decoder.position();
            let begin = end - instruction.len();
            if begin <= at && at < end {
                // Prefixes stand before the opcode; operands behind it.
                let prefixes = &bytes[begin..at];
                hits += u32::from(prefixes.iter().all(|b| is_prefix(*b)));
            }
        }
        tries += 1;
    }
    hits * 3 > tries
}

fn is_prefix(byte: u8) -> bool {
    matches!(byte, 0x40..=0x4f | 0x26 | 0x2e | 0x36 | 0x3e | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3)
}

/// Does an F3 prefix stand before the opcode, with a REX prefix between them perhaps?
fn is_repeated(page: &[u8], at: usize) -> bool {
    let byte = |back: usize| at.checked_sub(back).map(|i| page[i]);
    // An instruction that begins in the page before may have its prefix there.
    matches!(byte(1), Some(0xf3) | None)
        || matches!(byte(1), Some(0x40..=0x4f)) && matches!(byte(2), Some(0xf3) | None)
        // Other prefixes may stand between them.
        || matches!(byte(1), Some(0x66 | 0x67 | 0x2e | 0x36 | 0x3e | 0x26 | 0x64 | 0x65 | 0xf2))
}

/// Do these bytes behind 0F tell of the host? (`None`: they are not there to be executed.)
fn tells(opcode: Option<u8>, modrm: Option<u8>, repeated: impl Fn() -> bool) -> bool {
    let Some(opcode) = opcode else { return false };
    let register = |m: u8| m >> 3 & 7;
    match (opcode, modrm) {
        // CPUID; RDTSC, which could be made to trap, but then each switch to the process costs more; SYSENTER; LAR, LSL.
        (0xa2 | 0x31 | 0x34 | 0x02 | 0x03, _) => true,
        (_, None) => false,
        // SLDT, STR, VERR, VERW.
        (0x00, Some(m)) => matches!(register(m), 0 | 1 | 4 | 5),
        // SGDT, SIDT, SMSW; XGETBV, MONITOR and what else has no operand, but for XEND and XTEST, which are #UD.
        (0x01, Some(m)) if m < 0xc0 => matches!(register(m), 0 | 1 | 4),
        (0x01, Some(m)) => !matches!(m, 0xd5 | 0xd6 | 0xf8),
        // XSAVEC, whose image names all components that the host has on; RDPID.
        (0xc7, Some(m)) => m < 0xc0 && register(m) == 4 || m >= 0xf8 && repeated(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(at: usize, bytes: &[u8]) -> Vec<u8> {
        let mut page = vec![0x90; 4096];
        page[at..at + bytes.len()].copy_from_slice(bytes);
        page
    }

    #[test]
    fn what_tells_of_the_host_is_found_wherever_it_stands() {
        let telling: [&[u8]; 15] = [
            &[0x0f, 0x31],
            &[0x0f, 0x01, 0xf9],
            &[0x0f, 0xa2],
            &[0x0f, 0x00, 0xc0],
            &[0x0f, 0x01, 0x00],
            &[0x0f, 0x01, 0xe0],
            &[0x0f, 0x01, 0xd0],
            &[0x0f, 0x01, 0xfd],
            &[0x0f, 0x02, 0xc0],
            &[0x0f, 0x03, 0xc0],
            &[0x0f, 0x34],
            &[0xf3, 0x0f, 0xc7, 0xf8],
            &[0x0f, 0xc7, 0x64, 0x24, 0x40],
            &[0x48, 0x0f, 0xc7, 0x22],
            &[0xf3, 0x48, 0x0f, 0xc7, 0xf9],
        ];
        for bytes in telling {
            for at in [0, 77, 4096 - bytes.len()] {
                assert!(!is_direct(&[], &page(at, bytes), &[0; 16]), "{bytes:x?} at {at}");
            }
        }
        let harmless: [&[u8]; 8] = [
            &[0xb8, 0x0f, 0xa2, 0x00, 0x00],
            // JMP [RIP + ...], as linkers make them.
            &[0xff, 0x25, 0x4a, 0x0f, 0x02, 0x00, 0x68, 0x12, 0, 0, 0],
            &[0x0f, 0x1f, 0x00],
            &[0x0f, 0x84, 0, 0, 0, 0],
            &[0x0f, 0x01, 0xd6],
            &[0x0f, 0xae, 0xf8],
            &[0x0f, 0xc7, 0xf0],
            &[0x0f, 0x05],
        ];
        for bytes in harmless {
            assert!(is_direct(&[], &page(77, bytes), &[0; 16]), "{bytes:x?}");
        }
    }

    #[test]
    fn an_instruction_from_the_page_before_is_known() {
        // MOV ESI, 0x020F.... and AND RSI, -16.
        let code = page(0, &[0x0f, 0x02, 0x00, 0x00, 0x48, 0x83, 0xe6, 0xf0]);
        assert!(!is_direct(&[], &code, &[]));
        let mut before = page(4095, &[0xbe]);
        assert!(is_direct(&before[4096 - TAIL..], &code, &[]));
        before[4095] = 0x90;
        assert!(!is_direct(&before[4096 - TAIL..], &code, &[]));
    }

    #[test]
    fn the_end_of_a_page_goes_on_in_the_next() {
        assert!(!is_direct(&[], &page(4095, &[0x0f]), &[0xa2]));
        assert!(is_direct(&[], &page(4095, &[0x0f]), &[0x1f, 0x00]));
        assert!(is_direct(&[], &page(4095, &[0x0f]), &[]), "there is no more");
        assert!(!is_direct(&[], &page(4094, &[0x0f, 0x01])[4096 - TAIL..], &[0xd0]));
        assert!(!is_direct(&[], &page(0, &[0x0f, 0xc7, 0xf8]), &[]), "the prefix may stand before");
    }
}
