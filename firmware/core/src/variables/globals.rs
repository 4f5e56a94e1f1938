//! The names that the specification defines under its own vendor GUIDs (UEFI 2.10, sections 3.3 and 32.6). Others may not be
//! made there, so that they never meet a variable of a later edition.

use crate::guid::{GLOBAL_VARIABLE, Guid, IMAGE_SECURITY_DATABASE};

/// Under the global vendor GUID; `####` stands for four upper-case hexadecimal digits.
const GLOBALS: [&str; 46] = [
    "AuditMode",
    "Boot####",
    "BootCurrent",
    "BootNext",
    "BootOptionSupport",
    "BootOrder",
    "ConIn",
    "ConInDev",
    "ConOut",
    "ConOutDev",
    "CryptoIndications",
    "CryptoIndicationsActivated",
    "CryptoIndicationsSupported",
    "dbDefault",
    "dbrDefault",
    "dbtDefault",
    "dbxDefault",
    "DeployedMode",
    "Driver####",
    "DriverOrder",
    "ErrOut",
    "ErrOutDev",
    "HwErrRecSupport",
    "KEK",
    "KEKDefault",
    "Key####",
    "Lang",
    "LangCodes",
    "OsIndications",
    "OsIndicationsSupported",
    "OsRecovery####",
    "OsRecoveryOrder",
    "PK",
    "PKDefault",
    "PlatformLang",
    "PlatformLangCodes",
    "PlatformRecovery####",
    "SecureBoot",
    "SetupMode",
    "SignatureSupport",
    "SysPrep####",
    "SysPrepOrder",
    "Timeout",
    "VendorKeys",
    "devAuthBoot",
    "devdbDefault",
];
const DATABASES: [&str; 4] = ["db", "dbr", "dbt", "dbx"];

/// Whether the specification defines a name under a vendor GUID of its own; nothing for other vendors.
pub fn is_defined(name: &[u16], vendor: &Guid) -> Option<bool> {
    let names: &[&str] = match *vendor {
        GLOBAL_VARIABLE => &GLOBALS,
        IMAGE_SECURITY_DATABASE => &DATABASES,
        _ => return None,
    };
    Some(names.iter().any(|pattern| matches(name, pattern)))
}

fn matches(name: &[u16], pattern: &str) -> bool {
    let digit = |c: u16| matches!(c, 0x30..=0x39 | 0x41..=0x46);
    name.len() == pattern.len()
        && name.iter().zip(pattern.bytes()).all(|(c, p)| if p == b'#' { digit(*c) } else { *c == u16::from(p) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    #[test]
    fn only_defined_names() {
        let wide = |t: &str| t.encode_utf16().collect::<Vec<u16>>();
        for name in ["BootOrder", "Boot00FF", "PK", "OsRecovery1234"] {
            assert_eq!(is_defined(&wide(name), &GLOBAL_VARIABLE), Some(true), "{name}");
        }
        for name in ["BootOrdeR", "Boot00ff", "Boot001", "Mine", ""] {
            assert_eq!(is_defined(&wide(name), &GLOBAL_VARIABLE), Some(false), "{name}");
        }
        assert_eq!(is_defined(&wide("dbx"), &IMAGE_SECURITY_DATABASE), Some(true));
        assert_eq!(is_defined(&wide("dby"), &IMAGE_SECURITY_DATABASE), Some(false));
        assert_eq!(is_defined(&wide("Anything"), &Guid([7; 16])), None);
    }
}
