//! ELF images: program headers and notes.
//!
//! Source: System V ABI, chapters 4 and 5 (object files), ELF-64 object file format 1.5. Numbers are little-endian.

/// A segment that is to be loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Offset in the file.
    pub offset: u64,
    /// Physical address.
    pub address: u64,
    /// Bytes in the file.
    pub file_size: u64,
    /// Bytes in memory; the rest is zero.
    pub memory_size: u64,
}

/// What a loader needs of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Entry point.
    pub entry: u64,
    /// Segments of type PT_LOAD.
    pub segments: Vec<Segment>,
    /// Entry of the PVH note, if there is one (Xen `XEN_ELFNOTE_PHYS32_ENTRY`).
    pub pvh_entry: Option<u32>,
}

const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const EM_X86_64: u16 = 62;
const XEN_PHYS32_ENTRY: u32 = 18;
/// A kernel has about ten; more than this is nobody's image.
const MAX_HEADERS: u16 = 256;

fn field<const N: usize>(data: &[u8], at: u64) -> Option<[u8; N]> {
    let at = usize::try_from(at).ok()?;
    data.get(at..at.checked_add(N)?)?.try_into().ok()
}

fn u16_at(data: &[u8], at: u64) -> Option<u16> {
    field(data, at).map(u16::from_le_bytes)
}

fn u32_at(data: &[u8], at: u64) -> Option<u32> {
    field(data, at).map(u32::from_le_bytes)
}

fn u64_at(data: &[u8], at: u64) -> Option<u64> {
    field(data, at).map(u64::from_le_bytes)
}

/// Reads the headers of a 64-bit image. The error says what is wrong.
pub fn parse(data: &[u8]) -> Result<Image, &'static str> {
    if !data.starts_with(b"\x7fELF\x02\x01") {
        return Err("not a 64-bit little-endian ELF image");
    }
    let cut = "the ELF header is cut off";
    if u16_at(data, 18).ok_or(cut)? != EM_X86_64 {
        return Err("an ELF image for another processor than x86-64");
    }
    let entry = u64_at(data, 24).ok_or(cut)?;
    let table = u64_at(data, 32).ok_or(cut)?;
    let (size, count) = (u16_at(data, 54).ok_or(cut)?, u16_at(data, 56).ok_or(cut)?);
    if size < 56 || count > MAX_HEADERS {
        return Err("damaged ELF program header table");
    }
    let mut image = Image { entry, segments: Vec::new(), pvh_entry: None };
    for i in 0..count {
        let header = table.saturating_add(u64::from(i) * u64::from(size));
        let get = |at: u64| u64_at(data, header.saturating_add(at)).ok_or("the ELF program headers are cut off");
        let kind = get(0)? as u32;
        let segment = Segment { offset: get(8)?, address: get(24)?, file_size: get(32)?, memory_size: get(40)? };
        let end = segment.offset.checked_add(segment.file_size);
        if (kind == PT_LOAD || kind == PT_NOTE) && end.is_none_or(|end| end > data.len() as u64) {
            return Err("an ELF segment lies outside the file");
        }
        match kind {
            PT_LOAD if segment.file_size > segment.memory_size => {
                return Err("an ELF segment is larger than its memory");
            }
            PT_LOAD if segment.memory_size > 0 => image.segments.push(segment),
            PT_NOTE => {
                // Inside the file: checked above.
                let notes = &data[segment.offset as usize..][..segment.file_size as usize];
                image.pvh_entry = image.pvh_entry.or(find_pvh(notes));
            }
            _ => {}
        }
    }
    if image.segments.is_empty() {
        return Err("an ELF image without anything to load");
    }
    Ok(image)
}

fn find_pvh(notes: &[u8]) -> Option<u32> {
    let mut at = 0u64;
    // Each round goes at least 12 bytes on, so a damaged note cannot loop.
    loop {
        let name_len = u64::from(u32_at(notes, at)?);
        let value_len = u64::from(u32_at(notes, at + 4)?);
        let kind = u32_at(notes, at + 8)?;
        let name = at + 12;
        let value = name + name_len.next_multiple_of(4);
        if kind == XEN_PHYS32_ENTRY && name_len == 4 && field(notes, name)? == *b"Xen\0" {
            return if value_len >= 4 { u32_at(notes, value) } else { None };
        }
        at = value + value_len.next_multiple_of(4);
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// An image with one loaded segment of `code` at `address`, and a PVH note if asked for.
    pub fn image(address: u64, code: &[u8], pvh: bool) -> Vec<u8> {
        let mut data = vec![0u8; 0x200];
        let mut put = |at: usize, bytes: &[u8]| data[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, b"\x7fELF\x02\x01\x01");
        put(18, &62u16.to_le_bytes());
        put(24, &address.to_le_bytes());
        put(32, &64u64.to_le_bytes());
        put(54, &56u16.to_le_bytes());
        put(56, &(1 + u16::from(pvh)).to_le_bytes());
        let mut header = |i: usize, kind: u32, offset: u64, address: u64, size: u64| {
            let at = 64 + 56 * i;
            put(at, &kind.to_le_bytes());
            put(at + 8, &offset.to_le_bytes());
            put(at + 24, &address.to_le_bytes());
            put(at + 32, &size.to_le_bytes());
            put(at + 40, &(size + 16).to_le_bytes());
        };
        header(0, PT_LOAD, 0x200, address, code.len() as u64);
        header(1, PT_NOTE, 0x100, 0, 52);
        // Some other note, then Xen's.
        put(0x100, &[4, 0, 0, 0, 5, 0, 0, 0, 1, 0, 0, 0, b'G', b'N', b'U', 0, 1, 2, 3, 4, 5, 0, 0, 0]);
        put(0x118, &[4, 0, 0, 0, 8, 0, 0, 0, 18, 0, 0, 0, b'X', b'e', b'n', 0]);
        put(0x128, &address.wrapping_add(0x10).to_le_bytes());
        data.extend(code);
        data
    }

    #[test]
    fn reads_segments_and_notes() {
        let parsed = parse(&image(0x10_0000, &[1; 100], true)).unwrap();
        assert_eq!((parsed.entry, parsed.pvh_entry), (0x10_0000, Some(0x10_0010)));
        assert_eq!(parsed.segments, [Segment { offset: 0x200, address: 0x10_0000, file_size: 100, memory_size: 116 }]);
        assert_eq!(parse(&image(0x10_0000, &[1; 100], false)).unwrap().pvh_entry, None);
    }

    #[test]
    fn damaged_images_are_refused() {
        let whole = image(0x10_0000, &[1; 100], true);
        for len in 0..whole.len() {
            assert!(parse(&whole[..len]).is_err(), "{len} bytes");
        }
        // Every single byte turned over: anything but a panic or a loop.
        for at in 0..0x200 {
            let mut bad = whole.clone();
            bad[at] ^= 0xff;
            let _ = parse(&bad);
        }
    }
}
