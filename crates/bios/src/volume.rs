//! A firmware image in a file, in the layout of Hyper-V's own generation 2 firmware (MSVM.fd of mu_msvm).
//!
//! The file is as large as the place that is kept for it and lies in memory as it is. It is entered in its security core: the
//! first file of that type in the firmware volume at [`SEC_VOLUME`] (volumes and files: PI specification 1.8, volume 3, section
//! 3.2; PE and TE images: volume 3, appendix of the TE format).

use thiserror::Error;
use uefi_core::bytes::{u16_at, u32_at, u64_at};

/// Bytes of such an image.
pub const SIZE: usize = 6 << 20;
/// Where the volume with the security core begins.
pub const SEC_VOLUME: usize = 0x5e_0000;

/// Why a file is no image of this layout.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum VolumeError {
    /// Another size.
    #[error("it has {0} bytes, a firmware image of Hyper-V's layout (MSVM.fd) has {SIZE}")]
    Size(usize),
    /// No firmware volume where the security core must be.
    #[error("there is no firmware volume at {SEC_VOLUME:#x}, where the security core must be")]
    NoVolume,
    /// The volume's headers make no sense.
    #[error("the firmware volume at {SEC_VOLUME:#x} is damaged: {0}")]
    Damaged(&'static str),
    /// No security core in the volume, or none that could be entered.
    #[error("the firmware volume at {SEC_VOLUME:#x} holds no security core with a 64-bit image that could be entered")]
    NoCore,
}

/// Offset in the image at which it is entered.
///
/// # Errors
/// When the image has not this layout.
pub fn entry(image: &[u8]) -> Result<u64, VolumeError> {
    use VolumeError::*;
    if image.len() != SIZE {
        return Err(Size(image.len()));
    }
    let rest = &image[SEC_VOLUME..];
    if rest.get(40..44) != Some(b"_FVH") {
        return Err(NoVolume);
    }
    let length = u64_at(rest, 32).and_then(|n| usize::try_from(n).ok()).ok_or(NoVolume)?;
    let header = usize::from(u16_at(rest, 48).ok_or(NoVolume)?);
    let volume = rest.get(..length).ok_or(Damaged("it is longer than the file"))?;
    let words =
        volume.get(..header).filter(|h| h.len() >= 56 && h.len() % 2 == 0).ok_or(Damaged("its header's length"))?;
    // The header's words add up to nothing.
    let sum = words.chunks_exact(2).fold(0u16, |sum, w| sum.wrapping_add(u16::from_le_bytes([w[0], w[1]])));
    if sum != 0 {
        return Err(Damaged("its header's checksum"));
    }
    let mut at = header;
    while let Some(file) = volume.get(at.next_multiple_of(8)..).filter(|f| f.len() >= FILE_HEADER) {
        at = at.next_multiple_of(8);
        let size = three_bytes(file, 20);
        // Free space up to the volume's end is all ones.
        if size == 0xff_ffff {
            break;
        }
        let body =
            file.get(..size).filter(|f| f.len() >= FILE_HEADER).ok_or(Damaged("a file is longer than the volume"))?;
        if body[18] == SECURITY_CORE {
            return in_file(body).map(|offset| (SEC_VOLUME + at + offset) as u64).ok_or(NoCore);
        }
        at += size;
    }
    Err(NoCore)
}

const FILE_HEADER: usize = 24;
/// `EFI_FV_FILETYPE_SECURITY_CORE`.
const SECURITY_CORE: u8 = 3;

fn three_bytes(d: &[u8], at: usize) -> usize {
    usize::from(d[at]) | usize::from(d[at + 1]) << 8 | usize::from(d[at + 2]) << 16
}

/// Offset of the entry point in a file with sections.
fn in_file(file: &[u8]) -> Option<usize> {
    const PE32: u8 = 0x10;
    const TE: u8 = 0x12;
    let mut at = FILE_HEADER;
    loop {
        at = at.next_multiple_of(4);
        let header = file.get(at..at + 4)?;
        let size = three_bytes(header, 0);
        let section = file.get(at..at + size).filter(|s| s.len() > 4)?;
        if matches!(header[3], PE32 | TE) {
            let entry = in_image(&section[4..])?;
            return Some(at + 4 + entry);
        }
        at += size;
    }
}

/// Offset of the entry point in a PE32+ or TE image for x86-64, which is executed where it lies.
fn in_image(image: &[u8]) -> Option<usize> {
    const X86_64: u16 = 0x8664;
    const TE_HEADER: usize = 40;
    let entry = if image.starts_with(b"VZ") {
        // What was stripped of the original headers is counted in its addresses.
        let stripped = usize::from(u16_at(image, 6)?);
        (u16_at(image, 2)? == X86_64).then_some(())?;
        (u32_at(image, 8)? as usize + TE_HEADER).checked_sub(stripped)?
    } else {
        let pe = if image.starts_with(b"MZ") { u32_at(image, 0x3c)? as usize } else { 0 };
        let header = image.get(pe..)?;
        let good = header.starts_with(b"PE\0\0") && u16_at(header, 4)? == X86_64 && u16_at(header, 24)? == 0x20b;
        good.then_some(())?;
        u32_at(header, 40)? as usize
    };
    (entry < image.len()).then_some(entry)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An image whose security core is a TE image with `code` as all there is of it.
    pub fn wrapped(code: &[u8]) -> Vec<u8> {
        let mut te = b"VZ\x64\x86\x01\x0b".to_vec();
        te.extend(0x100u16.to_le_bytes());
        te.extend(0x100u32.to_le_bytes());
        te.resize(40, 0);
        te.extend(code);
        let mut file = vec![0; FILE_HEADER];
        let size = FILE_HEADER + 4 + te.len();
        (file[18], file[20], file[21]) = (SECURITY_CORE, size as u8, (size >> 8) as u8);
        let section = 4 + te.len();
        file.extend([section as u8, (section >> 8) as u8, 0, 0x12]);
        file.extend(te);
        let mut volume = vec![0xff; SIZE - SEC_VOLUME];
        volume[..56].fill(0);
        volume[32..40].copy_from_slice(&((SIZE - SEC_VOLUME) as u64).to_le_bytes());
        volume[40..44].copy_from_slice(b"_FVH");
        volume[48..50].copy_from_slice(&56u16.to_le_bytes());
        let sum = volume[..56].chunks_exact(2).fold(0u16, |s, w| s.wrapping_add(u16::from_le_bytes([w[0], w[1]])));
        volume[50..52].copy_from_slice(&0u16.wrapping_sub(sum).to_le_bytes());
        // Another file comes first, a pad of 32 bytes.
        let mut pad = [0; 32];
        (pad[18], pad[20]) = (0xf0, 32);
        volume[56..88].copy_from_slice(&pad);
        volume[88..88 + file.len()].copy_from_slice(&file);
        let mut image = vec![0; SEC_VOLUME];
        image.extend(volume);
        image
    }

    #[test]
    fn the_security_core_is_found() {
        let image = wrapped(&[0xf4; 8]);
        // Volume header, pad file, file header, section header, TE header; 0x100 bytes were stripped, and the entry is at 0x100.
        let wanted = SEC_VOLUME + 56 + 32 + 24 + 4 + 40;
        assert_eq!(entry(&image), Ok(wanted as u64));
        assert_eq!(image[wanted], 0xf4);
    }

    #[test]
    fn what_is_wrong_is_said() {
        let good = wrapped(&[0xf4; 8]);
        assert_eq!(entry(&good[1..]), Err(VolumeError::Size(SIZE - 1)));
        let with = |at: usize, value: u8| {
            let mut image = good.clone();
            image[SEC_VOLUME + at] = value;
            entry(&image)
        };
        assert_eq!(with(40, b'x'), Err(VolumeError::NoVolume));
        assert_eq!(with(52, 1), Err(VolumeError::Damaged("its header's checksum")));
        assert_eq!(with(88 + 18, 4), Err(VolumeError::NoCore), "no file of the type");
        assert_eq!(with(88 + 22, 9), Err(VolumeError::Damaged("a file is longer than the volume")));
        assert_eq!(with(88 + 24 + 4 + 2, 0x4c), Err(VolumeError::NoCore), "an image for another machine");
        assert!(entry(&vec![0; SIZE]).is_err());
    }

    proptest::proptest! {
        #[test]
        fn damage_is_survived(at in 0usize..256, value in proptest::num::u8::ANY, more in 0usize..256) {
            let mut image = wrapped(&[0xf4; 8]);
            image[SEC_VOLUME + at] = value;
            image[SEC_VOLUME + more] ^= value;
            if let Ok(entry) = entry(&image) {
                assert!(entry < SIZE as u64);
            }
        }
    }
}
