//! The two headers (MS-VHDX 2.2.2) and the way they are updated.

use uuid::Uuid;
use zerocopy::{FromBytes, IntoBytes};

use crate::error::{Error, Result, Structure};
use crate::format::vhdx as fmt;
use crate::storage::Storage;

/// The current header and the place of it.
#[derive(Debug, Clone)]
pub(crate) struct HeaderState {
    pub header: fmt::Header,
    /// Index in [`fmt::HEADER_OFFSETS`] of the current one.
    pub current: usize,
    /// How many of the two were valid.
    pub valid: usize,
}

/// CRC-32C of `bytes` as if the four bytes at `field` were zero.
pub(crate) fn checksum(bytes: &[u8], field: usize) -> u32 {
    let crc = crc32c::crc32c(&bytes[..field]);
    let crc = crc32c::crc32c_append(crc, &[0; 4]);
    crc32c::crc32c_append(crc, &bytes[field + 4..])
}

fn parse(bytes: &[u8]) -> std::result::Result<fmt::Header, String> {
    let (h, _) = fmt::Header::read_from_prefix(bytes).map_err(|_| "too short".to_string())?;
    if h.signature != *b"head" {
        return Err("no `head` signature".into());
    }
    let sum = checksum(bytes, 4);
    if sum != h.checksum.get() {
        return Err(format!("checksum {:#010x}, computed {sum:#010x}", h.checksum));
    }
    if h.version.get() != 1 {
        return Err(format!("version {}, expected 1", h.version));
    }
    Ok(h)
}

impl HeaderState {
    /// Reads both headers and takes the newer valid one.
    pub fn read(storage: &dyn Storage) -> Result<Self> {
        let mut found: Vec<(usize, fmt::Header)> = Vec::new();
        let mut problems = Vec::new();
        for (i, &offset) in fmt::HEADER_OFFSETS.iter().enumerate() {
            let mut buf = [0; fmt::HEADER_SIZE];
            match storage.read_at(&mut buf, offset) {
                Ok(()) => match parse(&buf) {
                    Ok(h) => found.push((i, h)),
                    Err(e) => problems.push(format!("header {}: {e}", i + 1)),
                },
                Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => {
                    problems.push(format!("header {}: the file ends before it", i + 1));
                }
                Err(e) => return Err(Error::io(storage.path(), "read the header")(e)),
            }
        }
        let valid = found.len();
        if let [(_, a), (_, b)] = &found[..]
            && a.sequence_number == b.sequence_number
            && a.as_bytes() != b.as_bytes()
        {
            return Err(Error::malformed(
                Structure::Header,
                format!("both headers have sequence number {} but differ", a.sequence_number),
            ));
        }
        let Some((current, header)) = found.into_iter().max_by_key(|(_, h)| h.sequence_number.get()) else {
            return Err(Error::malformed(Structure::Header, problems.join("; ")));
        };
        if header.log_version.get() != 0 {
            return Err(Error::Unsupported(format!("VHDX log version {}, expected 0", header.log_version)));
        }
        Ok(Self { header, current, valid })
    }

    pub fn log_guid(&self) -> Uuid {
        self.header.log_guid.into()
    }

    pub fn data_write_guid(&self) -> Uuid {
        self.header.data_write_guid.into()
    }

    /// Changes the header crash-safely: writes the header that is not current with the next sequence number, makes it
    /// durable, then does the same with the other, so that afterwards either alone would do.
    pub fn update(&mut self, storage: &dyn Storage, change: impl FnOnce(&mut fmt::Header)) -> Result<()> {
        let mut h = self.header.clone();
        change(&mut h);
        for _ in 0..2 {
            let next = h.sequence_number.get().checked_add(1).ok_or_else(|| {
                Error::malformed(Structure::Header, "the sequence number has reached its end; convert the image")
            })?;
            h.sequence_number = next.into();
            let slot = 1 - self.current;
            storage
                .write_at(&encode(&mut h), fmt::HEADER_OFFSETS[slot])
                .and_then(|()| storage.sync())
                .map_err(Error::io(storage.path(), "write the header"))?;
            self.current = slot;
            self.header = h.clone();
        }
        self.valid = 2;
        Ok(())
    }
}

/// The 4 KiB of a header, with its checksum.
pub(crate) fn encode(h: &mut fmt::Header) -> [u8; fmt::HEADER_SIZE] {
    let mut buf = [0; fmt::HEADER_SIZE];
    h.checksum = 0.into();
    buf[..size_of::<fmt::Header>()].copy_from_slice(h.as_bytes());
    h.checksum = crc32c::crc32c(&buf).into();
    buf[4..8].copy_from_slice(h.checksum.as_bytes());
    buf
}
