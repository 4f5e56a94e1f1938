//! UEFI variables (UEFI 2.10, section 8.2): the rules of GetVariable, GetNextVariableName, SetVariable and
//! QueryVariableInfo, quotas, Secure Boot's modes, and authenticated writes ([`auth`]). How the non-volatile part is
//! kept is in [`file`].
//!
//! The store is used by whoever keeps the variables: in Viridian the host's BiosDevice, which the firmware calls.

pub mod auth;
pub mod file;
mod globals;

use crate::guid::{GLOBAL_VARIABLE, Guid, IMAGE_SECURITY_DATABASE};
use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use auth::{AuthTime, SecureName};

/// Attribute bits.
pub mod attribute {
    #![allow(missing_docs)]
    pub const NON_VOLATILE: u32 = 1;
    pub const BOOTSERVICE_ACCESS: u32 = 2;
    pub const RUNTIME_ACCESS: u32 = 4;
    pub const HARDWARE_ERROR_RECORD: u32 = 8;
    pub const AUTHENTICATED_WRITE_ACCESS: u32 = 0x10;
    pub const TIME_BASED_AUTHENTICATED_WRITE_ACCESS: u32 = 0x20;
    pub const APPEND_WRITE: u32 = 0x40;
    pub const ENHANCED_AUTHENTICATED_ACCESS: u32 = 0x80;
    /// All bits that the specification defines.
    pub const ALL: u32 = 0xff;
}
use attribute::*;

/// Why a call fails: the `EFI_STATUS` codes that variable services return.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VariableError {
    /// `EFI_INVALID_PARAMETER`.
    InvalidParameter,
    /// `EFI_UNSUPPORTED`.
    Unsupported,
    /// `EFI_WRITE_PROTECTED`.
    WriteProtected,
    /// `EFI_OUT_OF_RESOURCES`.
    OutOfResources,
    /// `EFI_NOT_FOUND`.
    NotFound,
    /// `EFI_SECURITY_VIOLATION`.
    SecurityViolation,
}

impl VariableError {
    /// The `EFI_STATUS` value (UEFI 2.10, appendix D).
    pub const fn status(self) -> u64 {
        (1 << 63)
            | match self {
                Self::InvalidParameter => 2,
                Self::Unsupported => 3,
                Self::WriteProtected => 8,
                Self::OutOfResources => 9,
                Self::NotFound => 14,
                Self::SecurityViolation => 26,
            }
    }
}

/// Bounds of a store. All sizes count name (with its terminator) and data.
#[derive(Clone, Copy, Debug)]
pub struct Quota {
    /// Bytes of all non-volatile variables.
    pub non_volatile: usize,
    /// Bytes of all volatile variables.
    pub volatile: usize,
    /// Bytes of one variable.
    pub variable: usize,
}

impl Default for Quota {
    fn default() -> Self {
        // The largest real variable is dbx: 443 hashes are 21 KiB, and the list grows every year.
        Self { non_volatile: 512 << 10, volatile: 256 << 10, variable: 128 << 10 }
    }
}

/// A variable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Variable {
    /// Attributes, without APPEND_WRITE.
    pub attributes: u32,
    /// Value.
    pub data: Vec<u8>,
    /// Time of the last authenticated write.
    pub time: AuthTime,
    /// For private authenticated variables: who may write (see [`auth`]).
    pub writer: Option<[u8; 32]>,
}

type Key = (Guid, Vec<u16>);

/// All variables of a machine.
#[derive(Clone, Debug)]
pub struct VariableStore {
    variables: BTreeMap<Key, Variable>,
    quota: Quota,
    /// ExitBootServices was called: only variables with runtime access are seen.
    runtime: bool,
}

/// What QueryVariableInfo returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StorageInfo {
    /// Bytes for variables with the attributes asked for.
    pub maximum_storage: u64,
    /// Of these, how many are free.
    pub remaining_storage: u64,
    /// Most bytes of one variable.
    pub maximum_variable: u64,
}

/// Global variables that only the firmware writes (UEFI 2.10, section 3.3).
const READ_ONLY_GLOBALS: [&str; 6] =
    ["SetupMode", "SecureBoot", "AuditMode", "DeployedMode", "SignatureSupport", "VendorKeys"];

/// Of the others these, which the part of the firmware in the guest makes at every start: no rule hangs on them, so the
/// host takes them as long as boot services are there. Callers of the firmware's services are refused by
/// [`is_firmware_variable`].
const FIRMWARE_GLOBALS: [&str; 5] =
    ["BootCurrent", "BootOptionSupport", "OsIndicationsSupported", "PlatformLangCodes", "LangCodes"];

/// Is it a variable that only the firmware itself writes? `name` has no terminator.
pub fn is_firmware_variable(name: &[u16], vendor: &Guid) -> bool {
    *vendor == GLOBAL_VARIABLE && READ_ONLY_GLOBALS.iter().chain(&FIRMWARE_GLOBALS).any(|n| is(name, n))
}

fn is(name: &[u16], text: &str) -> bool {
    name.iter().copied().eq(text.encode_utf16())
}

fn wide(text: &str) -> Vec<u16> {
    text.encode_utf16().collect()
}

fn size(name: &[u16], data: &[u8]) -> usize {
    (name.len() + 1) * 2 + data.len()
}

impl VariableStore {
    /// An empty store.
    pub fn new(quota: Quota) -> Self {
        Self { variables: BTreeMap::new(), quota, runtime: false }
    }

    /// GetVariable. `name` has no terminator.
    pub fn get(&self, name: &[u16], vendor: Guid) -> Result<&Variable, VariableError> {
        let found = self.variables.get(&(vendor, name.to_vec())).ok_or(VariableError::NotFound)?;
        if self.runtime && found.attributes & RUNTIME_ACCESS == 0 {
            return Err(VariableError::NotFound);
        }
        Ok(found)
    }

    /// GetNextVariableName: the variable behind this one; an empty name starts.
    pub fn next(&self, name: &[u16], vendor: Guid) -> Result<(&[u16], Guid), VariableError> {
        use core::ops::Bound::{Excluded, Unbounded};
        let start = if name.is_empty() {
            Unbounded
        } else {
            self.get(name, vendor).map_err(|_| VariableError::InvalidParameter)?;
            Excluded((vendor, name.to_vec()))
        };
        self.variables
            .range((start, Unbounded))
            .find(|(_, v)| !self.runtime || v.attributes & RUNTIME_ACCESS != 0)
            .map(|((vendor, name), _)| (&name[..], *vendor))
            .ok_or(VariableError::NotFound)
    }

    /// QueryVariableInfo.
    pub fn query(&self, attributes: u32) -> Result<StorageInfo, VariableError> {
        if attributes == 0 || attributes & !ALL != 0 {
            return Err(VariableError::InvalidParameter);
        }
        if attributes & (AUTHENTICATED_WRITE_ACCESS | ENHANCED_AUTHENTICATED_ACCESS) != 0 {
            return Err(VariableError::Unsupported);
        }
        if attributes & RUNTIME_ACCESS != 0 && attributes & BOOTSERVICE_ACCESS == 0
            || attributes & (BOOTSERVICE_ACCESS | RUNTIME_ACCESS) == 0
            || self.runtime && attributes & RUNTIME_ACCESS == 0
        {
            return Err(VariableError::InvalidParameter);
        }
        let persistent = attributes & NON_VOLATILE != 0;
        let total = if persistent { self.quota.non_volatile } else { self.quota.volatile };
        Ok(StorageInfo {
            maximum_storage: total as u64,
            remaining_storage: total.saturating_sub(self.used(persistent)) as u64,
            maximum_variable: self.quota.variable as u64,
        })
    }

    fn used(&self, persistent: bool) -> usize {
        let counted = |v: &Variable| (v.attributes & NON_VOLATILE != 0) == persistent;
        self.variables.iter().filter(|(_, v)| counted(v)).map(|((_, name), v)| size(name, &v.data)).sum()
    }

    /// SetVariable, as a caller outside the firmware makes it. `name` has no terminator.
    pub fn set(&mut self, name: &[u16], vendor: Guid, attributes: u32, data: &[u8]) -> Result<(), VariableError> {
        use VariableError::*;
        if name.is_empty() || attributes & !ALL != 0 {
            return Err(InvalidParameter);
        }
        if attributes & ENHANCED_AUTHENTICATED_ACCESS != 0 {
            return Err(Unsupported);
        }
        if attributes & AUTHENTICATED_WRITE_ACCESS != 0 {
            // Deprecated since 2.3.1; with the time-based bit it contradicts itself.
            let both = attributes & TIME_BASED_AUTHENTICATED_WRITE_ACCESS != 0;
            return Err(if both { InvalidParameter } else { Unsupported });
        }
        if attributes & (RUNTIME_ACCESS | BOOTSERVICE_ACCESS) == RUNTIME_ACCESS {
            return Err(InvalidParameter);
        }
        if attributes & HARDWARE_ERROR_RECORD != 0
            && attributes & (NON_VOLATILE | BOOTSERVICE_ACCESS | RUNTIME_ACCESS) != 7
        {
            return Err(InvalidParameter);
        }
        if vendor == GLOBAL_VARIABLE && READ_ONLY_GLOBALS.iter().any(|n| is(name, n)) {
            return Err(WriteProtected);
        }
        if (self.runtime || attributes != BOOTSERVICE_ACCESS | RUNTIME_ACCESS) && is_firmware_variable(name, &vendor) {
            return Err(WriteProtected);
        }
        let key = (vendor, name.to_vec());
        let old = self.variables.get(&key);
        // One that an earlier version has let in can still be removed.
        if old.is_none() && globals::is_defined(name, &vendor) == Some(false) {
            return Err(InvalidParameter);
        }
        if self.runtime {
            if old.is_some_and(|v| v.attributes & RUNTIME_ACCESS == 0) {
                return Err(WriteProtected);
            }
            // Volatile ones can only be read now.
            if old.is_some_and(|v| v.attributes & NON_VOLATILE == 0) {
                return Err(WriteProtected);
            }
            let deletes = data.is_empty() || attributes & (BOOTSERVICE_ACCESS | RUNTIME_ACCESS) == 0;
            if !deletes && attributes & (NON_VOLATILE | RUNTIME_ACCESS) != NON_VOLATILE | RUNTIME_ACCESS {
                return Err(InvalidParameter);
            }
        }
        let secure = SecureName::of(name, vendor);
        if secure.is_some() || attributes & TIME_BASED_AUTHENTICATED_WRITE_ACCESS != 0 {
            return self.set_authenticated(key, secure, attributes, data);
        }
        let append = attributes & APPEND_WRITE != 0;
        let kept = attributes & !APPEND_WRITE;
        match old {
            // Once authenticated, always authenticated.
            Some(v) if v.attributes & TIME_BASED_AUTHENTICATED_WRITE_ACCESS != 0 => return Err(WriteProtected),
            None if kept & (BOOTSERVICE_ACCESS | RUNTIME_ACCESS) == 0 || data.is_empty() => {
                return if append && kept & BOOTSERVICE_ACCESS != 0 { Ok(()) } else { Err(NotFound) };
            }
            Some(_) if kept & (BOOTSERVICE_ACCESS | RUNTIME_ACCESS) == 0 => {
                self.variables.remove(&key);
                return Ok(());
            }
            Some(v) if v.attributes != kept => return Err(InvalidParameter),
            Some(_) if data.is_empty() => {
                if !append {
                    self.variables.remove(&key);
                }
                return Ok(());
            }
            _ => {}
        }
        let value = match old {
            Some(v) if append => [&v.data[..], data].concat(),
            _ => data.to_vec(),
        };
        self.store(key, Variable { attributes: kept, data: value, time: AuthTime::default(), writer: None })
    }

    /// Stores a value if the quota allows it.
    fn store(&mut self, key: Key, variable: Variable) -> Result<(), VariableError> {
        let persistent = variable.attributes & NON_VOLATILE != 0;
        let new = size(&key.1, &variable.data);
        let old = self.variables.get(&key).map_or(0, |v| size(&key.1, &v.data));
        let total = if persistent { self.quota.non_volatile } else { self.quota.volatile };
        if new > self.quota.variable {
            return Err(VariableError::InvalidParameter);
        }
        if self.used(persistent) - old.min(self.used(persistent)) + new > total {
            return Err(VariableError::OutOfResources);
        }
        self.variables.insert(key, variable);
        Ok(())
    }

    /// Sets a variable as the firmware itself, with no rule but the quota. An empty value deletes.
    pub fn set_internal(
        &mut self,
        name: &str,
        vendor: Guid,
        attributes: u32,
        data: &[u8],
    ) -> Result<(), VariableError> {
        let key = (vendor, wide(name));
        if data.is_empty() {
            self.variables.remove(&key);
            return Ok(());
        }
        let time = self.variables.get(&key).map(|v| v.time).unwrap_or_default();
        self.store(key, Variable { attributes, data: data.to_vec(), time, writer: None })
    }

    /// Is a platform key enrolled? Without one the machine is in setup mode.
    pub fn setup_mode(&self) -> bool {
        !self.variables.contains_key(&(GLOBAL_VARIABLE, wide("PK")))
    }

    /// What power-on and reset do: volatile variables go, boot services are back, and the variables that tell
    /// Secure Boot's state are made anew. `secure_boot` is the machine's setting; without a platform key it has no effect.
    pub fn reset(&mut self, secure_boot: bool) {
        self.runtime = false;
        self.variables.retain(|_, v| v.attributes & NON_VOLATILE != 0);
        let visible = BOOTSERVICE_ACCESS | RUNTIME_ACCESS;
        let setup = self.setup_mode();
        let flags = [
            ("SetupMode", setup),
            ("SecureBoot", secure_boot && !setup),
            ("AuditMode", false),
            ("DeployedMode", false),
            ("VendorKeys", false),
        ];
        for (name, on) in flags {
            self.put(name, visible, &[u8::from(on)]);
        }
        let support: Vec<u8> = [crate::guid::CERT_SHA256, crate::guid::CERT_SHA384, crate::guid::CERT_SHA512]
            .into_iter()
            .chain([crate::guid::CERT_X509, crate::guid::CERT_X509_SHA256])
            .chain([crate::guid::CERT_X509_SHA384, crate::guid::CERT_X509_SHA512])
            .flat_map(|g| g.0)
            .collect();
        self.put("SignatureSupport", visible, &support);
    }

    fn put(&mut self, name: &str, attributes: u32, data: &[u8]) {
        let v = Variable { attributes, data: data.to_vec(), time: AuthTime::default(), writer: None };
        self.variables.insert((GLOBAL_VARIABLE, wide(name)), v);
    }

    /// Is Secure Boot in force (as of the last [`VariableStore::reset`])?
    pub fn secure_boot(&self) -> bool {
        self.get(&wide("SecureBoot"), GLOBAL_VARIABLE).is_ok_and(|v| v.data == [1])
    }

    /// A signature database's value, empty if it does not exist.
    pub fn database(&self, name: &str) -> &[u8] {
        self.variables.get(&(IMAGE_SECURITY_DATABASE, wide(name))).map_or(&[], |v| &v.data)
    }

    /// ExitBootServices was called.
    pub fn enter_runtime(&mut self) {
        self.runtime = true;
    }

    /// Has ExitBootServices been called?
    pub fn is_runtime(&self) -> bool {
        self.runtime
    }

    /// All variables, for [`file`] and for tools.
    pub fn iter(&self) -> impl Iterator<Item = (&Guid, &[u16], &Variable)> {
        self.variables.iter().map(|((vendor, name), v)| (vendor, &name[..], v))
    }
}

#[cfg(test)]
mod tests;
