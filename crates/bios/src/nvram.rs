//! UEFI variables for the firmware: the command descriptor in guest memory (mu_msvm `BiosInterface.h`,
//! `NVRAM_COMMAND_DESCRIPTOR`), and the file in which the non-volatile ones live.
//!
//! A write that is answered with success has reached the file: it is written anew beside the old one, made durable, and
//! renamed over it.

use partition::{Gpa, GuestMemory, MemoryError};
use std::io::Write;
use std::path::{Path, PathBuf};
use thiserror::Error;
use uefi_core::bytes::{u32_at, u64_at};
use uefi_core::guid::Guid;
use uefi_core::variables::{Quota, VariableError, VariableStore, attribute, file};

/// `EFI_MAX_VARIABLE_NAME_SIZE`: bytes of a name.
const MAX_NAME: u32 = 2 * 1024;
/// Most bytes of a value that are read from the guest: what the store's quota allows.
const MAX_DATA: u32 = 128 << 10;
/// Largest variable file that is read.
const MAX_FILE: u64 = 4 << 20;

/// Offsets in the descriptor, which is packed.
mod descriptor {
    pub const COMMAND: u64 = 0;
    pub const STATUS: u64 = 4;
    pub const ATTRIBUTES: usize = 12;
    pub const NAME_ADDRESS: usize = 16;
    pub const NAME_BYTES: usize = 24;
    pub const VENDOR: usize = 28;
    pub const DATA_ADDRESS: usize = 44;
    pub const DATA_BYTES: usize = 52;
    pub const SIZE: usize = 56;
    /// QueryInfo: three 64-bit results.
    pub const QUERY_RESULTS: u64 = 16;
}

/// `EFI_STATUS` values that the store's errors do not have.
mod status {
    const ERROR: u64 = 1 << 63;
    pub const SUCCESS: u64 = 0;
    pub const INVALID_PARAMETER: u64 = ERROR | 2;
    pub const UNSUPPORTED: u64 = ERROR | 3;
    pub const BUFFER_TOO_SMALL: u64 = ERROR | 5;
    pub const DEVICE_ERROR: u64 = ERROR | 7;
}

/// What goes wrong with the variable file.
#[derive(Debug, Error)]
pub enum NvramError {
    /// The file cannot be read or written.
    #[error("firmware variables {path}: {source}")]
    Io {
        /// Which file.
        path: PathBuf,
        /// What the host said.
        source: std::io::Error,
    },
    /// The file is not what it should be.
    #[error("firmware variables {path}: {why}; remove the file to start with fresh variables")]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        why: file::FileError,
    },
}

/// Makes a file with this content durable, in the place of the old one, before it returns.
pub type Save = Box<dyn Fn(&Path, Vec<u8>) -> std::io::Result<()> + Send>;

/// The usual [`Save`], on the calling thread.
///
/// # Errors
/// What the host says; the old file is still there then.
pub fn save(path: &Path, bytes: Vec<u8>) -> std::io::Result<()> {
    let new = path.with_extension("new");
    let mut out = std::fs::File::create(&new)?;
    out.write_all(&bytes)?;
    out.sync_all()?;
    std::fs::rename(&new, path)?;
    // The rename itself must be durable too.
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::File::open(folder).and_then(|d| d.sync_all())
}

/// The variables of a VM.
pub struct Nvram {
    store: VariableStore,
    path: Option<PathBuf>,
    save: Save,
}

impl Nvram {
    /// Variables that live as long as the process.
    pub fn volatile() -> Self {
        Self { store: VariableStore::new(Quota::default()), path: None, save: Box::new(save) }
    }

    /// Opens the file; a missing one means that there are no variables yet.
    pub fn open(path: &Path) -> Result<Self, NvramError> {
        let io = |source| NvramError::Io { path: path.to_owned(), source };
        let store = match std::fs::metadata(path) {
            Ok(m) if m.len() > MAX_FILE => {
                return Err(NvramError::Damaged { path: path.to_owned(), why: file::FileError::NotAStore });
            }
            Ok(_) => {
                let bytes = std::fs::read(path).map_err(io)?;
                file::decode(&bytes, Quota::default())
                    .map_err(|why| NvramError::Damaged { path: path.to_owned(), why })?
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => VariableStore::new(Quota::default()),
            Err(e) => return Err(io(e)),
        };
        Ok(Self { store, path: Some(path.to_owned()), save: Box::new(save) })
    }

    /// The variables.
    pub fn store(&self) -> &VariableStore {
        &self.store
    }

    /// From now on the file is written in this way: the thread on which the guest changes a variable may have no right to.
    pub fn save_by(&mut self, save: Save) {
        self.save = save;
    }

    /// Changes variables as the machine (not the guest) and writes the file.
    pub fn change<R>(&mut self, f: impl FnOnce(&mut VariableStore) -> R) -> Result<R, NvramError> {
        let result = f(&mut self.store);
        self.persist()?;
        Ok(result)
    }

    /// Power-on or reset; see [`VariableStore::reset`].
    pub fn reset(&mut self, secure_boot: bool) {
        self.store.reset(secure_boot);
    }

    /// All variables, volatile ones too, for a saved machine.
    pub(crate) fn snapshot(&self) -> VariableStore {
        self.store.clone()
    }

    pub(crate) fn restore(&mut self, store: VariableStore) {
        self.store = store;
    }

    fn persist(&self) -> Result<(), NvramError> {
        let Some(path) = &self.path else { return Ok(()) };
        (self.save)(path, file::encode(&self.store)).map_err(|source| NvramError::Io { path: path.clone(), source })
    }

    /// Carries out the command whose descriptor is at `gpa`. A descriptor outside memory is ignored: there is nowhere
    /// to put a status.
    pub fn command(&mut self, memory: &GuestMemory, gpa: Gpa) {
        let mut d = [0; descriptor::SIZE];
        if memory.read(gpa, &mut d).is_err() {
            return;
        }
        let result = self.dispatch(memory, gpa, &d).unwrap_or(status::INVALID_PARAMETER);
        let _ = memory.write(gpa + descriptor::STATUS, &result.to_le_bytes());
    }

    fn dispatch(&mut self, memory: &GuestMemory, gpa: Gpa, d: &[u8]) -> Result<u64, MemoryError> {
        let request = Request::read(d);
        match u32_at(d, descriptor::COMMAND as usize) {
            Some(0) => self.get(memory, gpa, &request),
            Some(1) => self.set(memory, &request),
            Some(2) => self.next(memory, gpa, &request, true),
            Some(3) => self.next(memory, gpa, &request, false),
            Some(4) => self.query(memory, gpa, &request),
            Some(5) => {
                self.store.enter_runtime();
                Ok(status::SUCCESS)
            }
            // NvramDebugStringCommand: nothing to do with the text here.
            Some(6) => Ok(status::SUCCESS),
            _ => Ok(status::UNSUPPORTED),
        }
    }

    fn get(&mut self, memory: &GuestMemory, gpa: Gpa, r: &Request) -> Result<u64, MemoryError> {
        let Some(name) = r.name(memory)? else { return Ok(status::INVALID_PARAMETER) };
        let variable = match self.store.get(&name, r.vendor) {
            Ok(v) => v,
            Err(e) => return Ok(e.status()),
        };
        let len = variable.data.len() as u32;
        memory.write(gpa + descriptor::ATTRIBUTES as u64, &variable.attributes.to_le_bytes())?;
        memory.write(gpa + descriptor::DATA_BYTES as u64, &len.to_le_bytes())?;
        if r.data_bytes < len {
            return Ok(status::BUFFER_TOO_SMALL);
        }
        memory.write(r.data, &variable.data)?;
        Ok(status::SUCCESS)
    }

    fn set(&mut self, memory: &GuestMemory, r: &Request) -> Result<u64, MemoryError> {
        let Some(name) = r.name(memory)? else { return Ok(status::INVALID_PARAMETER) };
        if r.data_bytes > MAX_DATA {
            return Ok(VariableError::OutOfResources.status());
        }
        let mut data = vec![0; r.data_bytes as usize];
        memory.read(r.data, &mut data)?;
        let before = self.store.clone();
        if let Err(e) = self.store.set(&name, r.vendor, r.attributes, &data) {
            return Ok(e.status());
        }
        // Only what is in the file counts; a volatile variable needs no file.
        let persistent =
            |s: &VariableStore| s.get(&name, r.vendor).is_ok_and(|v| v.attributes & attribute::NON_VOLATILE != 0);
        if (persistent(&before) || persistent(&self.store))
            && let Err(e) = self.persist()
        {
            tracing::error!("{e}");
            self.store = before;
            return Ok(status::DEVICE_ERROR);
        }
        Ok(status::SUCCESS)
    }

    fn next(&mut self, memory: &GuestMemory, gpa: Gpa, r: &Request, first: bool) -> Result<u64, MemoryError> {
        let from = if first { Some(Vec::new()) } else { r.name(memory)? };
        let Some(from) = from else { return Ok(status::INVALID_PARAMETER) };
        let (name, vendor) = match self.store.next(&from, r.vendor) {
            Ok(found) => found,
            Err(e) => return Ok(e.status()),
        };
        let bytes: Vec<u8> = name.iter().chain(&[0]).flat_map(|c| c.to_le_bytes()).collect();
        memory.write(gpa + descriptor::NAME_BYTES as u64, &(bytes.len() as u32).to_le_bytes())?;
        if (r.name_bytes as usize) < bytes.len() {
            return Ok(status::BUFFER_TOO_SMALL);
        }
        memory.write(r.name, &bytes)?;
        memory.write(gpa + descriptor::VENDOR as u64, &vendor.0)?;
        Ok(status::SUCCESS)
    }

    fn query(&mut self, memory: &GuestMemory, gpa: Gpa, r: &Request) -> Result<u64, MemoryError> {
        match self.store.query(r.attributes) {
            Ok(info) => {
                let values = [info.maximum_storage, info.remaining_storage, info.maximum_variable];
                let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
                memory.write(gpa + descriptor::QUERY_RESULTS, &bytes)?;
                Ok(status::SUCCESS)
            }
            Err(e) => Ok(e.status()),
        }
    }
}

/// The fields of a variable command.
struct Request {
    attributes: u32,
    name: Gpa,
    name_bytes: u32,
    vendor: Guid,
    data: Gpa,
    data_bytes: u32,
}

impl Request {
    fn read(d: &[u8]) -> Self {
        let u32_of = |at| u32_at(d, at).unwrap_or(0);
        Self {
            attributes: u32_of(descriptor::ATTRIBUTES),
            name: Gpa(u64_at(d, descriptor::NAME_ADDRESS).unwrap_or(0)),
            name_bytes: u32_of(descriptor::NAME_BYTES),
            vendor: Guid::read(d, descriptor::VENDOR).unwrap_or_default(),
            data: Gpa(u64_at(d, descriptor::DATA_ADDRESS).unwrap_or(0)),
            data_bytes: u32_of(descriptor::DATA_BYTES),
        }
    }

    /// The name up to its terminator; `None` if it is too long or has no terminator in its buffer.
    fn name(&self, memory: &GuestMemory) -> Result<Option<Vec<u16>>, MemoryError> {
        let mut bytes = vec![0; self.name_bytes.min(MAX_NAME) as usize & !1];
        memory.read(self.name, &mut bytes)?;
        let units: Vec<u16> = bytes.chunks_exact(2).map(|c| u16::from_le_bytes([c[0], c[1]])).collect();
        Ok(units.iter().position(|c| *c == 0).map(|end| units[..end].to_vec()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RAM: u64 = 1 << 20;

    struct Guest(std::sync::Arc<GuestMemory>);

    impl Guest {
        fn new() -> Self {
            Self(GuestMemory::with_ram(RAM, 0xc000_0000..1 << 32, false).unwrap())
        }
        /// Issues a command as the firmware does: descriptor at 0x1000, name at 0x2000, data at 0x3000.
        fn call(&self, nvram: &mut Nvram, command: u32, name: &str, attributes: u32, data: &[u8], room: u32) -> u64 {
            let wide: Vec<u8> = name.encode_utf16().chain([0]).flat_map(u16::to_le_bytes).collect();
            self.0.write(Gpa(0x2000), &wide).unwrap();
            self.0.write(Gpa(0x3000), data).unwrap();
            let mut d = command.to_le_bytes().to_vec();
            d.extend([0xaa; 8]);
            d.extend(attributes.to_le_bytes());
            d.extend(0x2000u64.to_le_bytes());
            d.extend((if command == 3 { room } else { wide.len() as u32 }).to_le_bytes());
            d.extend([7; 16]);
            d.extend(0x3000u64.to_le_bytes());
            d.extend((if command == 1 { data.len() as u32 } else { room }).to_le_bytes());
            self.0.write(Gpa(0x1000), &d).unwrap();
            nvram.command(&self.0, Gpa(0x1000));
            let mut status = [0; 8];
            self.0.read(Gpa(0x1004), &mut status).unwrap();
            u64::from_le_bytes(status)
        }
        fn u32(&self, gpa: u64) -> u32 {
            self.0.load_u32(Gpa(gpa), std::sync::atomic::Ordering::Relaxed).unwrap()
        }
    }

    #[test]
    fn variables_survive_power_off() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("nvram");
        let guest = Guest::new();
        let mut nvram = Nvram::open(&path).unwrap();
        assert_eq!(guest.call(&mut nvram, 1, "Kept", 7, &[1, 2, 3], 0), 0);
        assert_eq!(guest.call(&mut nvram, 1, "Volatile", 6, &[9], 0), 0);
        assert_eq!(guest.call(&mut nvram, 0, "Kept", 0, &[], 2), status::BUFFER_TOO_SMALL);
        assert_eq!(guest.u32(0x1000 + descriptor::DATA_BYTES as u64), 3);
        drop(nvram);
        let mut nvram = Nvram::open(&path).unwrap();
        assert_eq!(guest.call(&mut nvram, 0, "Kept", 0, &[], 16), 0);
        let mut back = [0; 3];
        guest.0.read(Gpa(0x3000), &mut back).unwrap();
        assert_eq!(back, [1, 2, 3]);
        assert_eq!(guest.call(&mut nvram, 0, "Volatile", 0, &[], 16), VariableError::NotFound.status());
        assert_eq!(guest.call(&mut nvram, 3, "", 0, &[], 64), 0, "the first name");
        assert_eq!(guest.call(&mut nvram, 4, "", 7, &[], 0), 0);
        assert_eq!(guest.call(&mut nvram, 5, "", 0, &[], 0), 0);
        assert_eq!(guest.call(&mut nvram, 99, "", 0, &[], 0), status::UNSUPPORTED);
    }

    #[test]
    fn a_failed_write_is_not_acknowledged() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("gone").join("nvram");
        let mut nvram = Nvram { path: Some(path), ..Nvram::volatile() };
        let guest = Guest::new();
        assert_eq!(guest.call(&mut nvram, 1, "Lost", 7, &[1], 0), status::DEVICE_ERROR);
        assert_eq!(guest.call(&mut nvram, 0, "Lost", 0, &[], 16), VariableError::NotFound.status());
    }

    #[test]
    fn damaged_files_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("nvram");
        std::fs::write(&path, b"VIRNVRAM but not really").unwrap();
        let text = Nvram::open(&path).err().unwrap().to_string();
        assert!(text.contains("nvram") && text.contains("remove the file"), "{text}");
    }

    proptest::proptest! {
        #[test]
        fn any_descriptor_is_survived(bytes in proptest::collection::vec(proptest::num::u8::ANY, 56), command in 0u32..8, gpa in 0u64..RAM + 64) {
            let guest = Guest::new();
            let mut nvram = Nvram::volatile();
            let _ = guest.0.write(Gpa(gpa), &bytes);
            let _ = guest.0.write(Gpa(gpa), &command.to_le_bytes());
            nvram.command(&guest.0, Gpa(gpa));
        }
    }
}
