//! Finds code that must not run natively, because the host's processor would answer for itself where the guest's is asked.
//!
//! Most of what concerns the system faults in user mode. Not these: CPUID, XGETBV, RDTSC, RDTSCP, RDPID, RDPRU, RDPKRU and
//! WRPKRU, and (without UMIP, or by the host kernel's emulation) SGDT, SIDT, SLDT, STR, SMSW; moves from segment registers
//! and LAR, LSL, VERR, VERW show selectors and descriptors that are the same in any 64-bit Linux, and are let through.
//!
//! Instructions have no fixed boundaries, so every place counts where their bytes stand, as part of another instruction or
//! of data too.

/// Does this piece of code hold, or begin at its end, an instruction that shows the host? A false alarm is possible.
pub fn shows_host(code: &[u8]) -> bool {
    let mut rest = code;
    while let Some(at) = rest.iter().position(|b| *b == 0x0f) {
        rest = &rest[at + 1..];
        let [opcode, behind @ ..] = rest else { return true };
        let modrm = behind.first();
        let register = |modrm: &u8| modrm >> 3 & 7;
        let found = match opcode {
            // CPUID, RDTSC.
            0xa2 | 0x31 => true,
            // SLDT, STR.
            0x00 => modrm.is_none_or(|m| register(m) < 2),
            // XGETBV, RDPKRU, WRPKRU, RDTSCP, RDPRU; with memory SGDT, SIDT; with either SMSW.
            0x01 => modrm.is_none_or(|m| match m {
                0xd0 | 0xee | 0xef | 0xf9 | 0xfd => true,
                m => register(m) == 4 || *m < 0xc0 && register(m) < 2,
            }),
            // RDPID (RDSEED and VMPTRST otherwise, by the prefix, which need not stand right before it).
            0xc7 => modrm.is_none_or(|m| *m >= 0xf8),
            _ => false,
        };
        if found {
            return true;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::shows_host;

    #[test]
    fn what_shows_the_host_is_found() {
        for code in [
            &b"\x90\x0f\xa2\x90"[..],
            b"\x0f\x31",
            b"\x0f\x01\xf9\xc3",
            b"\x0f\x01\xd0\xc3",
            b"\x0f\x01\xee\xc3",
            b"\x0f\x01\x00\xc3",
            b"\x0f\x01\x4c\x24\x08",
            b"\x0f\x01\xe0\xc3",
            b"\x0f\x01\xfd\xc3",
            b"\x0f\x00\xc0\xc3",
            b"\xf3\x0f\xc7\xf8\xc3",
            // Inside another instruction: mov eax, 0x310f.
            b"\xb8\x0f\x31\x00\x00",
            b"\x0f\x0f\x0f\x31",
            // At the end.
            b"\x90\x90\x0f",
            b"\x90\x0f\x01",
            b"\x90\xf3\x0f\xc7",
        ] {
            assert!(shows_host(code), "{code:x?}");
        }
    }

    #[test]
    fn usual_code_is_let_through() {
        for code in [
            &b""[..],
            b"\x0f\x05\x90\x90",
            b"\x0f\x84\x31\xa2\x00\x00",
            b"\x0f\x1f\x44\x00\x00",
            b"\x48\x0f\xc7\x4f\x10",
            b"\x0f\xc7\xf0\x90",
            b"\xf3\x0f\x1e\xfa\x31\xc0\xc3",
        ] {
            assert!(!shows_host(code), "{code:x?}");
        }
    }
}
