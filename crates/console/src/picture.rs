//! A frame buffer as a PNG (W3C PNG specification, third edition): eight bits a channel, no alpha.

use flate2::Compression;
use flate2::write::ZlibEncoder;
use std::io::Write;

/// How a frame buffer is laid out: 32 bits a pixel, blue in the lowest byte, the highest byte unused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Pixels in a line.
    pub width: u32,
    /// Lines.
    pub height: u32,
    /// Bytes from one line to the next.
    pub stride: u32,
}

impl Layout {
    /// Bytes that a picture takes; `None` if the numbers make no sense.
    pub fn bytes(&self) -> Option<usize> {
        let line = self.width.checked_mul(4)?;
        let sensible = self.width != 0 && self.height != 0 && self.stride >= line;
        (self.stride as usize).checked_mul(self.height as usize).filter(|_| sensible)
    }
}

/// Encodes a picture; `None` if the pixels are fewer than the layout says.
pub fn png(layout: Layout, pixels: &[u8]) -> Option<Vec<u8>> {
    let pixels = pixels.get(..layout.bytes()?)?;
    // A filter byte of zero before each line.
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::fast());
    let mut line = Vec::with_capacity(1 + layout.width as usize * 3);
    for row in pixels.chunks_exact(layout.stride as usize) {
        line.clear();
        line.push(0);
        for p in row[..layout.width as usize * 4].as_chunks::<4>().0 {
            line.extend([p[2], p[1], p[0]]);
        }
        // Writing into memory does not fail.
        encoder.write_all(&line).ok()?;
    }
    let data = encoder.finish().ok()?;
    let mut out = b"\x89PNG\r\n\x1a\n".to_vec();
    let mut header = Vec::from(layout.width.to_be_bytes());
    header.extend(layout.height.to_be_bytes());
    // Eight bits, true colour, the one compression, the one filter method, not interlaced.
    header.extend([8, 2, 0, 0, 0]);
    chunk(&mut out, b"IHDR", &header);
    chunk(&mut out, b"IDAT", &data);
    chunk(&mut out, b"IEND", &[]);
    Some(out)
}

fn chunk(out: &mut Vec<u8>, kind: &[u8; 4], data: &[u8]) {
    out.extend((data.len() as u32).to_be_bytes());
    out.extend(kind);
    out.extend(data);
    let mut crc = flate2::Crc::new();
    crc.update(kind);
    crc.update(data);
    out.extend(crc.sum().to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn pixels_come_back() {
        let layout = Layout { width: 3, height: 2, stride: 16 };
        let mut pixels = vec![0xee; 32];
        for (i, p) in [0x01_02_03u32, 0x0a_0b_0c, 0xff_00_80].into_iter().enumerate() {
            pixels[i * 4..i * 4 + 4].copy_from_slice(&p.to_le_bytes());
            pixels[16 + i * 4..20 + i * 4].copy_from_slice(&(!p & 0xff_ffff).to_le_bytes());
        }
        let file = png(layout, &pixels).unwrap();
        assert_eq!(&file[..8], b"\x89PNG\r\n\x1a\n");
        assert_eq!(&file[12..24], b"IHDR\0\0\0\x03\0\0\0\x02");
        let at = file.windows(4).position(|w| w == b"IDAT").unwrap();
        let len = u32::from_be_bytes(file[at - 4..at].try_into().unwrap()) as usize;
        let mut raw = Vec::new();
        flate2::read::ZlibDecoder::new(&file[at + 4..at + 4 + len]).read_to_end(&mut raw).unwrap();
        assert_eq!(raw[..10], [0, 1, 2, 3, 10, 11, 12, 255, 0, 128]);
        assert_eq!(raw[10..13], [0, 0xfe, 0xfd]);
        assert_eq!(file[file.len() - 8..], *b"IEND\xae\x42\x60\x82", "the check sum that the specification gives");
    }

    #[test]
    fn nonsense_is_refused() {
        assert!(png(Layout { width: 3, height: 2, stride: 16 }, &[0; 31]).is_none());
        assert!(png(Layout { width: 5, height: 1, stride: 16 }, &[0; 64]).is_none());
        assert!(png(Layout { width: 0, height: 1, stride: 16 }, &[0; 64]).is_none());
        assert!(png(Layout { width: u32::MAX, height: u32::MAX, stride: u32::MAX }, &[0; 64]).is_none());
    }
}
