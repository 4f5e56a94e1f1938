//! PE32+ images: parsing, checking, laying out and relocating (Microsoft PE/COFF specification; UEFI 2.10, section 2.1).
//!
//! [`PeImage::parse`] checks everything that loading relies on, so that [`PeImage::load`] can only fail for lack of space.

use crate::bytes::{slice, u16_at, u32_at, u64_at};
use alloc::vec::Vec;
use authenticode::{PeOffsetError, PeOffsets, PeTrait};
use core::fmt;
use core::ops::Range;

/// Machine type of x86-64 images.
pub const MACHINE_X64: u16 = 0x8664;
/// Largest image that is loaded.
const MAX_IMAGE: u32 = 512 << 20;
/// Most sections (the format allows 65,535; loaders stop at 96).
const MAX_SECTIONS: usize = 96;

/// Why an image is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeError {
    /// A structure lies outside the file, or two numbers contradict each other; names which.
    Malformed(&'static str),
    /// A well-formed image for another processor (its machine type).
    WrongMachine(u16),
    /// A well-formed image of a subsystem that firmware does not start.
    WrongSubsystem(u16),
    /// Relocation of this type is not defined for x86-64.
    Relocation(u8),
    /// The image has no relocations and cannot be loaded at its preferred address.
    NotRelocatable,
    /// The destination is smaller than `SizeOfImage`.
    NoSpace,
}

impl fmt::Display for PeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Malformed(what) => write!(f, "not a valid PE32+ image: {what}"),
            Self::WrongMachine(m) => {
                write!(f, "image is for machine {m:#06x}, this one is x86-64 ({MACHINE_X64:#06x})")
            }
            Self::WrongSubsystem(s) => write!(f, "subsystem {s} is not an EFI application or driver"),
            Self::Relocation(t) => write!(f, "unknown base relocation type {t}"),
            Self::NotRelocatable => write!(f, "image has no relocations"),
            Self::NoSpace => write!(f, "no space for the image"),
        }
    }
}

/// What kind of EFI image it is (optional header's subsystem).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subsystem {
    /// Application (10): its memory is loader code/data.
    Application,
    /// Boot-service driver (11).
    BootDriver,
    /// Runtime driver (12): stays after ExitBootServices.
    RuntimeDriver,
}

/// A section of the image.
#[derive(Clone, Copy, Debug)]
pub struct Section {
    /// Name, padded with zeros.
    pub name: [u8; 8],
    /// Where it is loaded, relative to the image.
    pub virtual_address: u32,
    /// Bytes in memory.
    pub virtual_size: u32,
    /// Where it is in the file.
    pub raw_offset: u32,
    /// Bytes in the file.
    pub raw_size: u32,
    /// Flags (code 0x20, discardable 0x02000000, execute 0x20000000, read, write 0x80000000).
    pub characteristics: u32,
}

impl Section {
    /// May the section be executed?
    pub fn executable(&self) -> bool {
        self.characteristics & 0x2000_0000 != 0
    }
    /// May the section be written?
    pub fn writable(&self) -> bool {
        self.characteristics & 0x8000_0000 != 0
    }
}

/// A checked PE32+ image in a file's bytes.
#[derive(Clone, Debug)]
pub struct PeImage<'a> {
    data: &'a [u8],
    /// Subsystem.
    pub subsystem: Subsystem,
    /// Preferred address.
    pub image_base: u64,
    /// Entry point relative to the image.
    pub entry: u32,
    /// Bytes in memory, a multiple of [`PeImage::section_alignment`].
    pub size_of_image: u32,
    /// Bytes of all headers.
    pub size_of_headers: u32,
    /// Alignment of sections in memory, a power of two.
    pub section_alignment: u32,
    /// `DllCharacteristics` bit 0x100: the image runs with NX data and never writes code.
    pub nx_compatible: bool,
    /// Sections in file order.
    pub sections: Vec<Section>,
    checksum_offset: usize,
    security_dir_offset: usize,
    certificates: Option<Range<usize>>,
    relocations: Option<Range<u32>>,
    stripped: bool,
}

fn bad<T>(what: &'static str) -> impl FnOnce() -> Result<T, PeError> {
    move || Err(PeError::Malformed(what))
}

impl<'a> PeImage<'a> {
    /// Parses and checks.
    pub fn parse(data: &'a [u8]) -> Result<Self, PeError> {
        let short = PeError::Malformed("the file ends inside its headers");
        if data.get(..2) != Some(b"MZ") {
            return bad("no MZ signature")();
        }
        let pe = u32_at(data, 0x3c).ok_or(short)? as usize;
        if slice(data, pe, 4) != Some(b"PE\0\0") {
            return bad("no PE signature")();
        }
        let coff = pe + 4;
        let machine = u16_at(data, coff).ok_or(short)?;
        let section_count = u16_at(data, coff + 2).ok_or(short)? as usize;
        let optional_size = u16_at(data, coff + 16).ok_or(short)? as usize;
        let stripped = u16_at(data, coff + 18).ok_or(short)? & 1 != 0;
        let opt = coff + 20;
        if machine != MACHINE_X64 {
            return Err(PeError::WrongMachine(machine));
        }
        if u16_at(data, opt).ok_or(short)? != 0x20b {
            return bad("not PE32+")();
        }
        let field32 = |offset: usize| u32_at(data, opt + offset).ok_or(short);
        let directories = field32(108)? as usize;
        // Fewer than five would leave no field for the certificate table, which the Authenticode digest skips: eight
        // bytes of something else would then escape the digest.
        if !(5..=16).contains(&directories) || optional_size < 112 + directories * 8 {
            return bad("the optional header does not hold 5 to 16 data directories")();
        }
        let subsystem = match u16_at(data, opt + 68).ok_or(short)? {
            10 => Subsystem::Application,
            11 => Subsystem::BootDriver,
            12 => Subsystem::RuntimeDriver,
            other => return Err(PeError::WrongSubsystem(other)),
        };
        let section_alignment = field32(32)?;
        let size_of_image = field32(56)?;
        let size_of_headers = field32(60)?;
        if !section_alignment.is_power_of_two() {
            return bad("section alignment is not a power of two")();
        }
        if size_of_image == 0 || size_of_image > MAX_IMAGE {
            return bad("image size is zero or above 512 MiB")();
        }
        if size_of_headers > size_of_image || size_of_headers as usize > data.len() {
            return bad("headers are larger than the image")();
        }
        let section_table = opt + optional_size;
        if section_count == 0 || section_count > MAX_SECTIONS {
            return bad("no sections, or more than 96")();
        }
        if section_table + section_count * 40 > size_of_headers as usize {
            return bad("the section table is outside the headers")();
        }
        let directory = |index: usize| -> Result<(u32, u32), PeError> {
            if index < directories { Ok((field32(112 + index * 8)?, field32(116 + index * 8)?)) } else { Ok((0, 0)) }
        };
        let mut sections = Vec::with_capacity(section_count);
        let mut end = u64::from(size_of_headers);
        for at in (0..section_count).map(|i| section_table + i * 40) {
            let f = |offset: usize| u32_at(data, at + offset).ok_or(short);
            let mut name = [0; 8];
            name.copy_from_slice(slice(data, at, 8).ok_or(short)?);
            let s = Section {
                name,
                virtual_size: f(8)?,
                virtual_address: f(12)?,
                raw_size: f(16)?,
                raw_offset: f(20)?,
                characteristics: f(36)?,
            };
            let size = if s.virtual_size == 0 { s.raw_size } else { s.virtual_size };
            if u64::from(s.virtual_address) + u64::from(size) > u64::from(size_of_image) {
                return bad("a section reaches beyond the image")();
            }
            if size != 0 && u64::from(s.virtual_address) < end {
                return bad("sections overlap or are not ascending")();
            }
            if s.raw_size != 0 && slice(data, s.raw_offset as usize, s.raw_size as usize).is_none() {
                return bad("a section's data is outside the file")();
            }
            end = end.max(u64::from(s.virtual_address) + u64::from(size));
            sections.push(Section { virtual_size: size, ..s });
        }
        let entry = field32(16)?;
        let inside = sections.iter().any(|s| entry >= s.virtual_address && entry - s.virtual_address < s.virtual_size);
        if !inside {
            return bad("the entry point is in no section")();
        }
        let (reloc_at, reloc_size) = directory(5)?;
        let relocations = if reloc_size == 0 {
            None
        } else if u64::from(reloc_at) + u64::from(reloc_size) > u64::from(size_of_image) {
            return bad("relocations reach beyond the image")();
        } else {
            Some(reloc_at..reloc_at + reloc_size)
        };
        let (cert_at, cert_size) = directory(4)?;
        let certificates = if cert_size == 0 {
            None
        } else if slice(data, cert_at as usize, cert_size as usize).is_none() {
            return bad("the certificate table is outside the file")();
        } else if (cert_at as usize) < size_of_headers as usize {
            return bad("the certificate table overlaps the headers")();
        } else {
            Some(cert_at as usize..cert_at as usize + cert_size as usize)
        };
        Ok(Self {
            data,
            subsystem,
            image_base: u64_at(data, opt + 24).ok_or(short)?,
            entry,
            size_of_image,
            size_of_headers,
            section_alignment,
            nx_compatible: u16_at(data, opt + 70).ok_or(short)? & 0x100 != 0,
            sections,
            checksum_offset: opt + 64,
            security_dir_offset: opt + 112 + 4 * 8,
            certificates,
            relocations,
            stripped,
        })
    }

    /// The attribute certificate table's bytes.
    pub fn certificate_table(&self) -> Option<&'a [u8]> {
        self.certificates.clone().and_then(|r| self.data.get(r))
    }

    /// Lays the image out in `memory` (which will be seen at address `base`) and relocates it. `memory` is at least
    /// [`PeImage::size_of_image`] bytes; what no section fills is zero.
    pub fn load(&self, memory: &mut [u8], base: u64) -> Result<(), PeError> {
        let memory = memory.get_mut(..self.size_of_image as usize).ok_or(PeError::NoSpace)?;
        memory.fill(0);
        let headers = self.size_of_headers as usize;
        memory[..headers].copy_from_slice(&self.data[..headers]);
        for s in &self.sections {
            let len = s.raw_size.min(s.virtual_size) as usize;
            // A section without data may say any offset.
            if len == 0 {
                continue;
            }
            let (to, from) = (s.virtual_address as usize, s.raw_offset as usize);
            memory[to..to + len].copy_from_slice(&self.data[from..from + len]);
        }
        let delta = base.wrapping_sub(self.image_base);
        match (&self.relocations, delta) {
            (_, 0) => Ok(()),
            (Some(range), _) => relocate(memory, range.clone(), delta),
            (None, _) if self.stripped => Err(PeError::NotRelocatable),
            // Position-independent: nothing to change.
            (None, _) => Ok(()),
        }
    }
}

/// Applies the base relocations in `range` of the laid-out image.
fn relocate(memory: &mut [u8], range: Range<u32>, delta: u64) -> Result<(), PeError> {
    let mut at = range.start as usize;
    let end = range.end as usize;
    while at + 8 <= end {
        let page = u32_at(memory, at).unwrap_or(0) as usize;
        let size = u32_at(memory, at + 4).unwrap_or(0) as usize;
        // The table may be padded with zeros to its section's end.
        if size == 0 {
            break;
        }
        if size < 8 || size % 2 != 0 || at + size > end {
            return bad("a relocation block has a wrong size")();
        }
        for entry_at in (at + 8..at + size).step_by(2) {
            let entry = u16_at(memory, entry_at).unwrap_or(0);
            let target = page + usize::from(entry & 0xfff);
            let add = |memory: &mut [u8], bytes: usize| -> Result<(), PeError> {
                let field =
                    memory.get_mut(target..target + bytes).ok_or(PeError::Malformed("a relocation is outside"))?;
                let mut value = [0u8; 8];
                value[..bytes].copy_from_slice(field);
                let sum = u64::from_le_bytes(value).wrapping_add(delta);
                field.copy_from_slice(&sum.to_le_bytes()[..bytes]);
                Ok(())
            };
            match (entry >> 12) as u8 {
                0 => {}
                3 => add(memory, 4)?,
                10 => add(memory, 8)?,
                other => return Err(PeError::Relocation(other)),
            }
        }
        at += size;
    }
    Ok(())
}

impl PeTrait for PeImage<'_> {
    fn data(&self) -> &[u8] {
        self.data
    }
    fn num_sections(&self) -> usize {
        self.sections.len()
    }
    fn section_data_range(&self, index: usize) -> Result<Range<usize>, PeOffsetError> {
        let s = index.checked_sub(1).and_then(|i| self.sections.get(i)).ok_or(PeOffsetError)?;
        let start = s.raw_offset as usize;
        Ok(start..start.checked_add(s.raw_size as usize).ok_or(PeOffsetError)?)
    }
    fn certificate_table_range(&self) -> Result<Option<Range<usize>>, PeOffsetError> {
        Ok(self.certificates.clone())
    }
    fn offsets(&self) -> Result<PeOffsets, PeOffsetError> {
        Ok(PeOffsets {
            check_sum: self.checksum_offset,
            after_check_sum: self.checksum_offset + 4,
            security_data_dir: self.security_dir_offset,
            after_security_data_dir: self.security_dir_offset + 8,
            after_header: self.size_of_headers as usize,
        })
    }
}
