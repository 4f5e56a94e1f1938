//! Guests as files: for what loads a kernel instead of being given memory.

/// Size of the file's header and of one program header.
const HEADERS: usize = 64 + 56;

/// A 64-bit ELF image (System V ABI, chapters 4 and 5, and its supplement for x86-64) of one segment: `code`, at the physical
/// address `load`, where it is entered, and `zeros` bytes of memory behind it.
pub fn image(load: u64, code: &[u8], zeros: u64) -> Vec<u8> {
    let mut file = vec![0; HEADERS];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"\x7fELF\x02\x01\x01");
    // An executable for x86-64, version 1; its entry.
    put(16, &[2, 0, 62, 0, 1]);
    put(24, &load.to_le_bytes());
    // Offset of the program headers; sizes of both kinds of headers; one.
    put(32, &64u64.to_le_bytes());
    put(52, &[64, 0, 56, 0, 1]);
    // PT_LOAD that may be read, written and executed; offset, addresses, sizes.
    put(64, &[1, 0, 0, 0, 7]);
    put(72, &(HEADERS as u64).to_le_bytes());
    put(80, &load.to_le_bytes());
    put(88, &load.to_le_bytes());
    put(96, &(code.len() as u64).to_le_bytes());
    put(104, &(code.len() as u64 + zeros).to_le_bytes());
    file.extend(code);
    file
}
