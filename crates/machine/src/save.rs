//! The state file of a machine.
//!
//! ```text
//! magic "VRDNSTAT" | format u32 | header length u32 | header CRC-32C u32 | header (CBOR of [`Header`])
//! then memory: records of   gpa u64 | length u32 | CRC-32C u32 | bytes      with zero pages left out; the checksum is
//!                           that of gpa, length and bytes
//! at the end:               u64::MAX | number of records u32 | CRC-32C of the record count u32
//! ```
//! Numbers are little-endian. A record is at most [`RECORD`] bytes of whole pages that lie in one range of RAM, and
//! records ascend. The file is untrusted: everything is checked before it is used, and nothing is allocated by a size
//! that the file says before that size is checked.

use crate::config::MachineConfig;
use chipset::SavedState;
use partition::{Gpa, GuestMemory, MemoryError, VpState};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::{Read, Write};
use thiserror::Error;
use x86::cpuid::CpuidTable;
use x86::paging::PAGE_SIZE;

const MAGIC: [u8; 8] = *b"VRDNSTAT";
const FORMAT: u32 = 1;
/// Largest header that is read: 64 VPs need less than 2 MiB, the rest of a file that is being copied 64.
const HEADER_MAX: u32 = 96 << 20;
/// Largest memory record.
const RECORD: usize = 1 << 20;
const PAGE: usize = PAGE_SIZE as usize;

/// Everything but memory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Header {
    /// The machine's configuration.
    pub config: MachineConfig,
    /// CPUID tables that the guest has seen.
    pub cpuid: Vec<CpuidTable>,
    /// Guest TSC at which the clock stood.
    pub tsc: u64,
    /// Frequency of the guest's TSC in Hz.
    pub tsc_hz: u64,
    /// VPs.
    pub vps: Vec<VpState>,
    /// Devices by name.
    pub devices: BTreeMap<String, SavedState>,
    /// State of the paravirtual interface.
    pub guest_interface: Option<SavedState>,
}

/// Why a state file cannot be written or read.
#[derive(Debug, Error)]
pub enum SaveError {
    /// Reading or writing failed.
    #[error("{0}")]
    Io(#[from] std::io::Error),
    /// The file is not a state file.
    #[error("this is not a saved machine (expected it to begin with \"VRDNSTAT\")")]
    Magic,
    /// Another version.
    #[error("the saved machine has format {found}, this program reads format {FORMAT}")]
    Format {
        /// Format number in the file.
        found: u32,
    },
    /// Damage or malice.
    #[error("the saved machine is damaged: {0}")]
    Damaged(String),
    /// Guest memory does not take it.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

fn damaged(what: impl Into<String>) -> SaveError {
    SaveError::Damaged(what.into())
}

/// Writes a machine.
pub fn write(mut out: impl Write, header: &Header, memory: &GuestMemory) -> Result<(), SaveError> {
    let mut body = Vec::new();
    ciborium::into_writer(header, &mut body).map_err(|e| damaged(format!("header: {e}")))?;
    let len = u32::try_from(body.len()).ok().filter(|len| *len <= HEADER_MAX).ok_or_else(|| damaged("header size"))?;
    out.write_all(&MAGIC)?;
    for value in [FORMAT, len, crc32c::crc32c(&body)] {
        out.write_all(&value.to_le_bytes())?;
    }
    out.write_all(&body)?;

    let mut records = 0u32;
    let mut chunk = vec![0u8; RECORD];
    for range in ram(memory) {
        let mut at = range.start;
        while at < range.end {
            let len = ((range.end - at) as usize).min(RECORD);
            memory.read(Gpa(at), &mut chunk[..len])?;
            for (first, pages) in used(&chunk[..len]) {
                let bytes = &chunk[first * PAGE..(first + pages) * PAGE];
                let gpa = at + (first * PAGE) as u64;
                out.write_all(&gpa.to_le_bytes())?;
                out.write_all(&(bytes.len() as u32).to_le_bytes())?;
                out.write_all(&record_crc(gpa, bytes).to_le_bytes())?;
                out.write_all(bytes)?;
                records += 1;
            }
            at += len as u64;
        }
    }
    out.write_all(&u64::MAX.to_le_bytes())?;
    out.write_all(&records.to_le_bytes())?;
    out.write_all(&crc32c::crc32c(&records.to_le_bytes()).to_le_bytes())?;
    out.flush()?;
    Ok(())
}

/// Checksum of a memory record: of its place too, so that a page cannot end up elsewhere.
fn record_crc(gpa: u64, bytes: &[u8]) -> u32 {
    let place = crc32c::crc32c_append(crc32c::crc32c(&gpa.to_le_bytes()), &(bytes.len() as u32).to_le_bytes());
    crc32c::crc32c_append(place, bytes)
}

/// RAM of a machine.
fn ram(memory: &GuestMemory) -> Vec<std::ops::Range<u64>> {
    let mappings = memory.mappings();
    mappings.iter().filter(|m| m.access == partition::Access::Ram).map(partition::memory::Mapping::range).collect()
}

/// Runs of pages that are not all zero: first page, number of pages.
fn used(chunk: &[u8]) -> Vec<(usize, usize)> {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for (page, bytes) in chunk.chunks(PAGE).enumerate() {
        if bytes.iter().all(|b| *b == 0) {
            continue;
        }
        match runs.last_mut() {
            Some((first, pages)) if *first + *pages == page => *pages += 1,
            _ => runs.push((page, 1)),
        }
    }
    runs
}

fn read_array<const N: usize>(input: &mut impl Read) -> Result<[u8; N], SaveError> {
    let mut bytes = [0; N];
    input.read_exact(&mut bytes).map_err(|e| match e.kind() {
        std::io::ErrorKind::UnexpectedEof => damaged("the file is cut off"),
        _ => e.into(),
    })?;
    Ok(bytes)
}

fn read_u32(input: &mut impl Read) -> Result<u32, SaveError> {
    read_array(input).map(u32::from_le_bytes)
}

/// Reads `len` bytes, which the caller has checked.
fn read_bytes(input: &mut impl Read, len: u32) -> Result<Vec<u8>, SaveError> {
    let mut bytes = Vec::new();
    input.by_ref().take(len.into()).read_to_end(&mut bytes)?;
    if bytes.len() != len as usize {
        return Err(damaged("the file is cut off"));
    }
    Ok(bytes)
}

/// Reads the header; memory follows ([`read_memory`]).
pub fn read_header(mut input: impl Read) -> Result<Header, SaveError> {
    if read_array::<8>(&mut input).map_err(|_| SaveError::Magic)? != MAGIC {
        return Err(SaveError::Magic);
    }
    let found = read_u32(&mut input)?;
    if found != FORMAT {
        return Err(SaveError::Format { found });
    }
    let (len, crc) = (read_u32(&mut input)?, read_u32(&mut input)?);
    if len > HEADER_MAX {
        return Err(damaged(format!("a header of {len} bytes")));
    }
    let body = read_bytes(&mut input, len)?;
    if crc32c::crc32c(&body) != crc {
        return Err(damaged("wrong checksum of the header"));
    }
    ciborium::from_reader(body.as_slice()).map_err(|e| damaged(format!("header: {e}")))
}

/// Reads memory into a machine whose RAM is zero.
pub fn read_memory(mut input: impl Read, memory: &GuestMemory) -> Result<(), SaveError> {
    let ranges = ram(memory);
    let (mut records, mut next) = (0u32, 0u64);
    loop {
        let at = u64::from_le_bytes(read_array(&mut input)?);
        let (len, crc) = (read_u32(&mut input)?, read_u32(&mut input)?);
        if at == u64::MAX {
            if len != records || crc != crc32c::crc32c(&records.to_le_bytes()) {
                return Err(damaged("memory records are missing"));
            }
            return Ok(());
        }
        let end = at.checked_add(len.into()).ok_or_else(|| damaged("a memory record wraps around"))?;
        let whole = (at | u64::from(len)) % PAGE_SIZE == 0 && len > 0 && len as usize <= RECORD;
        if !whole || at < next || !ranges.iter().any(|r| r.start <= at && end <= r.end) {
            return Err(damaged(format!("a memory record of {len:#x} bytes at {at:#x}")));
        }
        let bytes = read_bytes(&mut input, len)?;
        if record_crc(at, &bytes) != crc {
            return Err(damaged(format!("wrong checksum of memory at {at:#x}")));
        }
        memory.write(Gpa(at), &bytes)?;
        (records, next) = (records.wrapping_add(1), end);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{BootSource, EntryMode};

    fn sample() -> (Header, std::sync::Arc<GuestMemory>) {
        let memory = GuestMemory::with_ram(8 << 20, crate::layout::HOLE, false).unwrap();
        memory.unmap(Gpa(0xa_0000), 0x2_0000).unwrap();
        memory.write(Gpa(0x9_fffe), &[1, 2]).unwrap();
        memory.write(Gpa(0x30_0ffe), &[3, 4, 5, 6]).unwrap();
        memory.write(Gpa((8 << 20) - 1), &[7]).unwrap();
        let config = MachineConfig {
            memory_bytes: 8 << 20,
            processors: 1,
            cpu_model: "x86-64-v2".into(),
            hyperv: false,
            boot: BootSource::Flat { image: vec![0xf4], address: 0x1000, mode: EntryMode::Real },
            storage: Vec::new(),
        };
        let header = Header {
            config,
            cpuid: vec![CpuidTable::default()],
            tsc: 5,
            tsc_hz: 1_000_000_000,
            vps: vec![VpState::reset(0, 0)],
            devices: [("x".to_string(), SavedState::new(1, &(1u8, "y")).unwrap())].into(),
            guest_interface: None,
        };
        (header, memory)
    }

    fn image() -> (Header, Vec<u8>) {
        let (header, memory) = sample();
        let mut file = Vec::new();
        write(&mut file, &header, &memory).unwrap();
        (header, file)
    }

    fn fresh() -> std::sync::Arc<GuestMemory> {
        let memory = GuestMemory::with_ram(8 << 20, crate::layout::HOLE, false).unwrap();
        memory.unmap(Gpa(0xa_0000), 0x2_0000).unwrap();
        memory
    }

    fn read(mut file: &[u8]) -> Result<(Header, std::sync::Arc<GuestMemory>), SaveError> {
        let header = read_header(&mut file)?;
        let memory = fresh();
        read_memory(&mut file, &memory)?;
        Ok((header, memory))
    }

    #[test]
    fn round_trip_without_zero_pages() {
        let (header, file) = image();
        assert!(file.len() < 64 << 10, "{} bytes for four used pages", file.len());
        let (back, memory) = read(&file).unwrap();
        assert_eq!(back, header);
        let byte = |at: u64| memory.read_plain::<u8>(Gpa(at)).unwrap();
        assert_eq!([0x9_fffe, 0x30_0fff, 0x30_1001, (8 << 20) - 1, 0x5000].map(byte), [1, 4, 6, 7, 0]);
    }

    #[test]
    fn damage_is_found() {
        let (_, file) = image();
        for len in (0..file.len()).step_by(97).chain(file.len() - 20..file.len()) {
            assert!(read(&file[..len]).is_err(), "cut to {len}");
        }
        for at in (0..file.len()).step_by(17) {
            let mut bad = file.clone();
            bad[at] ^= 0x10;
            assert!(read(&bad).is_err(), "bit turned at {at}");
        }
    }

    #[test]
    fn records_outside_ram_are_refused() {
        let (header, _) = sample();
        let memory = GuestMemory::new();
        let mut empty = Vec::new();
        write(&mut empty, &header, &memory).unwrap();
        let head = empty.len() - 16;
        for at in [8u64 << 20, 0xa_0000, 0x9_f000, 1 << 63, u64::MAX - 4095, 0x1001] {
            let mut bad = empty[..head].to_vec();
            bad.extend(at.to_le_bytes());
            bad.extend(8192u32.to_le_bytes());
            bad.extend(record_crc(at, &[9; 8192]).to_le_bytes());
            bad.extend([9; 8192]);
            bad.extend(u64::MAX.to_le_bytes());
            bad.extend(1u32.to_le_bytes());
            bad.extend(crc32c::crc32c(&1u32.to_le_bytes()).to_le_bytes());
            assert!(read(&bad).is_err(), "{at:#x}");
        }
    }
}
