//! Numbers of SPC-4, SBC-3 and MMC-6.

#![allow(missing_docs, reason = "the names are the standards' own")]

/// Operation codes.
pub mod op {
    pub const TEST_UNIT_READY: u8 = 0x00;
    pub const REQUEST_SENSE: u8 = 0x03;
    pub const READ_6: u8 = 0x08;
    pub const WRITE_6: u8 = 0x0a;
    pub const INQUIRY: u8 = 0x12;
    pub const MODE_SELECT_6: u8 = 0x15;
    pub const MODE_SENSE_6: u8 = 0x1a;
    pub const START_STOP_UNIT: u8 = 0x1b;
    pub const SEND_DIAGNOSTIC: u8 = 0x1d;
    pub const PREVENT_ALLOW_MEDIUM_REMOVAL: u8 = 0x1e;
    pub const READ_CAPACITY_10: u8 = 0x25;
    pub const READ_10: u8 = 0x28;
    pub const WRITE_10: u8 = 0x2a;
    pub const SEEK_10: u8 = 0x2b;
    pub const WRITE_AND_VERIFY_10: u8 = 0x2e;
    pub const VERIFY_10: u8 = 0x2f;
    pub const SYNCHRONIZE_CACHE_10: u8 = 0x35;
    pub const WRITE_SAME_10: u8 = 0x41;
    pub const UNMAP: u8 = 0x42;
    pub const READ_TOC_PMA_ATIP: u8 = 0x43;
    pub const GET_CONFIGURATION: u8 = 0x46;
    pub const GET_EVENT_STATUS_NOTIFICATION: u8 = 0x4a;
    pub const READ_DISC_INFORMATION: u8 = 0x51;
    pub const READ_TRACK_INFORMATION: u8 = 0x52;
    pub const MODE_SELECT_10: u8 = 0x55;
    pub const MODE_SENSE_10: u8 = 0x5a;
    pub const PERSISTENT_RESERVE_IN: u8 = 0x5e;
    pub const PERSISTENT_RESERVE_OUT: u8 = 0x5f;
    pub const READ_16: u8 = 0x88;
    pub const WRITE_16: u8 = 0x8a;
    pub const WRITE_AND_VERIFY_16: u8 = 0x8e;
    pub const VERIFY_16: u8 = 0x8f;
    pub const SYNCHRONIZE_CACHE_16: u8 = 0x91;
    pub const WRITE_SAME_16: u8 = 0x93;
    pub const SERVICE_ACTION_IN_16: u8 = 0x9e;
    pub const REPORT_LUNS: u8 = 0xa0;
    pub const MAINTENANCE_IN: u8 = 0xa3;
    pub const READ_12: u8 = 0xa8;
    pub const WRITE_12: u8 = 0xaa;
    pub const READ_DVD_STRUCTURE: u8 = 0xad;
    pub const WRITE_AND_VERIFY_12: u8 = 0xae;
    pub const VERIFY_12: u8 = 0xaf;
    pub const SET_CD_SPEED: u8 = 0xbb;
    pub const MECHANISM_STATUS: u8 = 0xbd;
    pub const READ_CD: u8 = 0xbe;
    /// Service action of SERVICE ACTION IN (16).
    pub const SA_READ_CAPACITY_16: u8 = 0x10;
    /// Service action of MAINTENANCE IN.
    pub const SA_REPORT_SUPPORTED_OPCODES: u8 = 0x0c;
}

/// Status codes (SAM-5 5.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    Good = 0x00,
    CheckCondition = 0x02,
    ReservationConflict = 0x18,
}

/// Sense key, additional sense code and its qualifier (SPC-4 4.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct Sense {
    pub key: u8,
    pub asc: u8,
    pub ascq: u8,
}

const fn s(key: u8, asc: u8, ascq: u8) -> Sense {
    Sense { key, asc, ascq }
}

impl Sense {
    pub const NONE: Self = s(0, 0, 0);
    pub const STOPPED: Self = s(2, 0x04, 0x02);
    pub const MEDIUM_NOT_PRESENT_CLOSED: Self = s(2, 0x3a, 0x01);
    pub const MEDIUM_NOT_PRESENT_OPEN: Self = s(2, 0x3a, 0x02);
    pub const WRITE_ERROR: Self = s(3, 0x0c, 0x00);
    pub const UNRECOVERED_READ_ERROR: Self = s(3, 0x11, 0x00);
    pub const INTERNAL_TARGET_FAILURE: Self = s(4, 0x44, 0x00);
    pub const PARAMETER_LIST_LENGTH_ERROR: Self = s(5, 0x1a, 0x00);
    pub const INVALID_OPCODE: Self = s(5, 0x20, 0x00);
    pub const LBA_OUT_OF_RANGE: Self = s(5, 0x21, 0x00);
    pub const INVALID_FIELD_IN_CDB: Self = s(5, 0x24, 0x00);
    pub const LUN_NOT_SUPPORTED: Self = s(5, 0x25, 0x00);
    pub const INVALID_FIELD_IN_PARAMETER_LIST: Self = s(5, 0x26, 0x00);
    pub const INVALID_RELEASE_OF_RESERVATION: Self = s(5, 0x26, 0x04);
    pub const SAVING_PARAMETERS_NOT_SUPPORTED: Self = s(5, 0x39, 0x00);
    pub const MEDIUM_REMOVAL_PREVENTED: Self = s(5, 0x53, 0x02);
    pub const INSUFFICIENT_REGISTRATION_RESOURCES: Self = s(5, 0x55, 0x04);
    pub const ILLEGAL_MODE_FOR_THIS_TRACK: Self = s(5, 0x64, 0x00);
    pub const MEDIUM_MAY_HAVE_CHANGED: Self = s(6, 0x28, 0x00);
    pub const POWER_ON_OR_RESET: Self = s(6, 0x29, 0x00);
    pub const MODE_PARAMETERS_CHANGED: Self = s(6, 0x2a, 0x01);
    pub const RESERVATIONS_PREEMPTED: Self = s(6, 0x2a, 0x03);
    pub const RESERVATIONS_RELEASED: Self = s(6, 0x2a, 0x04);
    pub const REGISTRATIONS_PREEMPTED: Self = s(6, 0x2a, 0x05);
    pub const CAPACITY_DATA_HAS_CHANGED: Self = s(6, 0x2a, 0x09);
    pub const REPORTED_LUNS_DATA_HAS_CHANGED: Self = s(6, 0x3f, 0x0e);
    pub const WRITE_PROTECTED: Self = s(7, 0x27, 0x00);
    pub const SPACE_ALLOCATION_FAILED: Self = s(7, 0x27, 0x07);
    pub const MISCOMPARE: Self = s(0xe, 0x1d, 0x00);

    /// Fixed format sense data, current error (SPC-4 4.5.3).
    pub fn to_fixed(self) -> [u8; 18] {
        let mut b = [0; 18];
        b[0] = 0x70;
        b[2] = self.key;
        b[7] = 10;
        b[12] = self.asc;
        b[13] = self.ascq;
        b
    }

    /// Descriptor format sense data, current error, without descriptors (SPC-4 4.5.2).
    pub fn to_descriptor(self) -> [u8; 8] {
        [0x72, self.key, self.asc, self.ascq, 0, 0, 0, 0]
    }
}
