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
    let places = memchr::memchr_iter(0x0f, code).map(|at| before.len() + at);
    let mut suspects = places.filter(|at| tells(byte(at + 1), byte(at + 2), || is_repeated(&all, *at))).peekable();
    suspects.peek().is_none() || {
        let boundaries = Boundaries::new(&all);
        suspects.all(|at| !boundaries.is_opcode(at))
    }
}

/// As [`is_direct`], for an instruction that begins in a page (of which this is the last [`TAIL`] bytes) and ends in the next.
pub fn is_direct_seam(tail: &[u8; TAIL], next: &[u8]) -> bool {
    // Two bytes of an opcode and a ModRM byte tell.
    let (before, own) = tail.split_at(TAIL - 2);
    is_direct(before, own, &next[..next.len().min(4)])
}

/// Bytes at the end of a page that matter to the next one.
pub const TAIL: usize = 64;

/// Decoders that begin at the first bytes.
const STARTS: usize = 16;
/// Bytes of the longest instruction.
const LONGEST: usize = 15;

/// Where instructions begin, as far as one can tell: decoders begin at several places, and those that come to the same place go on
/// as one. Soon nearly all have; what they agree on is what the processor executes. (Code that hides an instruction in
/// another one finds out about the host; it gets no further.)
struct Boundaries<'a> {
    code: &'a [u8],
    /// For each byte: how many of the decoders come to an instruction that begins there, and its length.
    found: Vec<(u8, u8)>,
}

impl<'a> Boundaries<'a> {
    fn new(code: &'a [u8]) -> Self {
        let mut found = vec![(0, 0); code.len()];
        for start in found.iter_mut().take(STARTS) {
            start.0 = 1;
        }
        let mut decoder = Decoder::new(64, code, DecoderOptions::NONE);
        let mut instruction = Instruction::default();
        for at in 0..code.len() {
            let (decoders, _) = found[at];
            if decoders == 0 || decoder.set_position(at).is_err() {
                continue;
            }
            decoder.decode_out(&mut instruction);
            // Data between instructions may be none.
            let len = if instruction.is_invalid() { 1 } else { instruction.len() };
            found[at].1 = len as u8;
            if let Some(next) = found.get_mut(at + len) {
                next.0 += decoders;
            }
        }
        Self { code, found }
    }

    /// Is this place the opcode of an instruction, rather than a byte of a displacement or an immediate? Where decoders do not
    /// agree, a third of them is enough.
    fn is_opcode(&self, at: usize) -> bool {
        let (mut hits, mut all) = (0, 0);
        for begin in at.saturating_sub(LONGEST)..=at {
            let (decoders, len) = self.found[begin];
            if decoders > 0 && begin + usize::from(len) > at {
                all += u32::from(decoders);
                // Prefixes stand before the opcode; operands behind it.
                if self.code[begin..at].iter().all(|b| is_prefix(*b)) {
                    hits += u32::from(decoders);
                }
            }
        }
        hits * 3 > all
    }
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
        let tail = |bytes: &[u8]| <[u8; TAIL]>::try_from(&page(4096 - bytes.len(), bytes)[4096 - TAIL..]).unwrap();
        assert!(!is_direct_seam(&tail(&[0x0f, 0x01]), &[0xd0]));
        assert!(!is_direct_seam(&tail(&[0x0f]), &[0xa2]));
        // What ends in its own page is that page's.
        assert!(is_direct_seam(&tail(&[0x0f, 0xa2, 0x90]), &[0x90]));
        // CALL with a displacement that looks like SLDT, which is at the start of the tail: nothing tells where it begins.
        let mut call = tail(&[]);
        call[..5].copy_from_slice(&[0x0f, 0x00, 0x48, 0x89, 0x84]);
        assert!(is_direct_seam(&call, &[0x90]));
        assert!(!is_direct(&[], &page(0, &[0x0f, 0xc7, 0xf8]), &[]), "the prefix may stand before");
    }

    /// Of the pages of a real program's code (`VIRIDIAN_SCAN`: ELF files), how many are refused, and how many of those for
    /// nothing that a decoder finds which begins at the section's start?
    #[test]
    #[ignore = "a tool"]
    fn pages_of_real_programs() {
        for file in std::env::var("VIRIDIAN_SCAN").unwrap_or_default().split_whitespace() {
            let bytes = std::fs::read(file).unwrap();
            let word = |at: usize, n: usize| (0..n).rev().fold(0u64, |v, i| v << 8 | u64::from(bytes[at + i]));
            let (table, count) = (word(0x20, 8) as usize, word(0x38, 2) as usize);
            for at in (0..count).map(|n| table + n * 56) {
                if word(at, 4) != 1 || word(at + 4, 4) & 1 == 0 {
                    continue;
                }
                let (offset, address, len) =
                    (word(at + 8, 8) as usize & !4095, word(at + 16, 8) & !4095, word(at + 32, 8) as usize);
                let code = &bytes[offset..((offset + len + 4095) & !4095).min(bytes.len())];
                let mut real = std::collections::HashSet::new();
                let mut decoder = Decoder::with_ip(64, code, address, DecoderOptions::NONE);
                while decoder.can_decode() {
                    let i = decoder.decode();
                    let text = &code[(i.ip() - address) as usize..][..i.len().max(1)];
                    let op = text.iter().position(|b| !is_prefix(*b)).unwrap_or(0);
                    if !i.is_invalid()
                        && text[op] == 0x0f
                        && tells(text.get(op + 1).copied(), text.get(op + 2).copied(), || text[0] == 0xf3)
                    {
                        real.insert((i.ip() - address) / 4096);
                    }
                }
                let pages = code.len().div_ceil(4096);
                let mut wrong = Vec::new();
                let mut refused = 0;
                for page in 0..pages {
                    let own = &code[page * 4096..((page + 1) * 4096).min(code.len())];
                    let before = if page == 0 { &[][..] } else { &code[page * 4096 - TAIL..page * 4096] };
                    let next = code.get((page + 1) * 4096..(page + 1) * 4096 + 4).unwrap_or_default();
                    if !is_direct(before, own, next) {
                        refused += 1;
                        if !real.contains(&(page as u64)) {
                            wrong.push(page);
                        }
                    } else if real.contains(&(page as u64)) {
                        println!("  missed {:x}", address + page as u64 * 4096);
                    }
                }
                println!(
                    "{file}: {pages} pages, {} with such instructions, {refused} refused, wrongly {}: {:x?}",
                    real.len(),
                    wrong.len(),
                    wrong.iter().take(8).map(|p| address + *p as u64 * 4096).collect::<Vec<_>>()
                );
            }
        }
    }
}
