//! `HV_VP_SET` (TLFS section 7.8.7.3.6).

use crate::defs::HvStatus;
use partition::VpSet;

/// Decodes format, bank mask and banks (`var` is what the hypercall's variable header holds). VPs that do not exist
/// are dropped.
pub(crate) fn decode(format: u64, bank_mask: u64, var: &[u8], existing: VpSet) -> Result<VpSet, HvStatus> {
    match format {
        // HvGenericSetSparse4k: 64 banks of 64 VPs, of which only the valid ones are present. We have 64 VPs: bank 0.
        0 => {
            if var.len() / 8 != bank_mask.count_ones() as usize {
                return Err(HvStatus::InvalidHypercallInput);
            }
            if bank_mask & 1 == 0 {
                return Ok(VpSet(0));
            }
            let bank: [u8; 8] = var[..8].try_into().map_err(|_| HvStatus::InvalidHypercallInput)?;
            Ok(VpSet(u64::from_le_bytes(bank) & existing.0))
        }
        // HvGenericSetAll.
        1 => Ok(existing),
        _ => Err(HvStatus::InvalidParameter),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats() {
        let existing = VpSet(0xf);
        assert_eq!(decode(1, 0, &[], existing), Ok(existing));
        assert_eq!(decode(0, 1, &0x36u64.to_le_bytes(), existing), Ok(VpSet(6)));
        assert_eq!(decode(0, 2, &0x36u64.to_le_bytes(), existing), Ok(VpSet(0)));
        assert_eq!(decode(0, 3, &[0; 8], existing), Err(HvStatus::InvalidHypercallInput));
        assert_eq!(decode(2, 0, &[], existing), Err(HvStatus::InvalidParameter));
    }
}
