//! INQUIRY with its vital product data pages, and READ CAPACITY.

use super::Inner;
use crate::cdb::Cdb;
use crate::protocol::Sense;

/// Most blocks that one WRITE SAME with a pattern may write: 32 MiB of 512-byte blocks.
pub(crate) const MAX_WRITE_SAME: u64 = 65536;
/// Most descriptors of one UNMAP.
pub(crate) const MAX_UNMAP_DESCRIPTORS: u32 = 256;
/// VPD pages, ascending (SPC-4 7.8.13).
const PAGES: [u8; 6] = [0x00, 0x80, 0x83, 0xb0, 0xb1, 0xb2];

impl Inner {
    pub(super) fn inquiry(&self, cdb: &Cdb) -> Result<Vec<u8>, Sense> {
        let (evpd, page) = (cdb.u8(1) & 1 != 0, cdb.u8(2));
        // CMDDT has been obsolete since SPC-3.
        if cdb.u8(1) & 2 != 0 || (!evpd && page != 0) {
            return Err(Sense::INVALID_FIELD_IN_CDB);
        }
        if !evpd {
            return Ok(self.standard_inquiry());
        }
        let body = match page {
            0x00 => PAGES.to_vec(),
            0x80 => self.disk.info().disk_id.simple().to_string().into_bytes(),
            0x83 => self.identification(),
            0xb0 => self.block_limits(),
            0xb1 => block_characteristics(),
            0xb2 => self.provisioning(),
            _ => return Err(Sense::INVALID_FIELD_IN_CDB),
        };
        let mut out = vec![0, page];
        out.extend_from_slice(&(body.len() as u16).to_be_bytes());
        out.extend_from_slice(&body);
        Ok(out)
    }

    /// SPC-4 6.6.2.
    fn standard_inquiry(&self) -> Vec<u8> {
        let mut b = vec![0u8; 36];
        b[2] = 5; // SPC-3, as Hyper-V's disks say
        b[3] = 2; // response data format
        b[4] = 31; // bytes that follow
        b[7] = 2; // CMDQUE
        b[8..16].copy_from_slice(&self.config.vendor);
        b[16..32].copy_from_slice(&self.config.product);
        b[32..36].copy_from_slice(&self.config.revision);
        b
    }

    /// Device identification, SPC-4 7.8.6: a T10 vendor name and an NAA name under Microsoft's OUI, 00-22-48.
    fn identification(&self) -> Vec<u8> {
        let id = self.disk.info().disk_id.into_bytes();
        let mut b = Vec::new();
        let mut name = self.config.vendor.to_vec();
        name.extend_from_slice(&id);
        b.extend_from_slice(&[0x01, 0x01, 0, name.len() as u8]); // binary, T10 vendor ID
        b.extend_from_slice(&name);
        let mut naa = [0; 16];
        // NAA 6: four bits of type, 24 of OUI, 36 + 64 of our own.
        naa[..4].copy_from_slice(&[0x60, 0x02, 0x24, 0x80]);
        naa[3] |= id[0] & 0x0f;
        naa[4..].copy_from_slice(&id[4..]);
        b.extend_from_slice(&[0x01, 0x03, 0, 16]); // binary, NAA
        b.extend_from_slice(&naa);
        b
    }

    /// Block limits, SBC-3 6.6.3. Zero means no limit or not reported.
    fn block_limits(&self) -> Vec<u8> {
        let mut b = vec![0u8; 0x3c];
        let info = self.disk.info();
        let put = |b: &mut Vec<u8>, at: usize, v: u32| b[at - 4..at].copy_from_slice(&v.to_be_bytes());
        b[0] = 1; // WSNZ: a WRITE SAME of zero blocks is refused
        if info.can_unmap {
            put(&mut b, 20, u32::MAX);
            put(&mut b, 24, MAX_UNMAP_DESCRIPTORS);
            // Holes are punched inside of blocks, so the host's page is the granularity, not the image's block.
            put(&mut b, 28, 4096 / info.logical_sector_size.min(4096));
            put(&mut b, 32, 0x8000_0000);
        }
        b[32..40].copy_from_slice(&MAX_WRITE_SAME.to_be_bytes());
        b
    }

    /// Logical block provisioning, SBC-3 6.6.4.
    fn provisioning(&self) -> Vec<u8> {
        let info = self.disk.info();
        let mut b = vec![0u8; 4];
        if info.can_unmap {
            b[1] = 0xe0; // LBPU, LBPWS, LBPWS10
            if info.unmap_zeroes {
                b[1] |= 0x04; // LBPRZ
            }
            b[2] = 2; // thin
        }
        b
    }

    pub(super) fn read_capacity_10(&self, cdb: &Cdb) -> Result<Vec<u8>, Sense> {
        // PMI is obsolete; without it the address must be zero (SBC-3 5.15.1).
        if cdb.u8(8) & 1 == 0 && cdb.u32(2) != 0 {
            return Err(Sense::INVALID_FIELD_IN_CDB);
        }
        let last = u32::try_from(self.blocks() - 1).unwrap_or(u32::MAX);
        let mut b = last.to_be_bytes().to_vec();
        b.extend_from_slice(&(self.sector() as u32).to_be_bytes());
        Ok(b)
    }

    /// SBC-3 5.16.2.
    pub(super) fn read_capacity_16(&self) -> Vec<u8> {
        let info = self.disk.info();
        let mut b = vec![0u8; 32];
        b[..8].copy_from_slice(&(self.blocks() - 1).to_be_bytes());
        b[8..12].copy_from_slice(&info.logical_sector_size.to_be_bytes());
        // Logical blocks per physical block, as an exponent.
        b[13] = (info.physical_sector_size / info.logical_sector_size).max(1).trailing_zeros() as u8;
        if info.can_unmap {
            b[14] |= 0x80; // LBPME
            if info.unmap_zeroes {
                b[14] |= 0x40; // LBPRZ
            }
        }
        b
    }
}

/// Block device characteristics, SBC-3 6.6.2: not rotating.
fn block_characteristics() -> Vec<u8> {
    let mut b = vec![0u8; 0x3c];
    b[1] = 1;
    b
}
