//! One VM: its folder.
//!
//! ```text
//! config.toml            what it is (crate::config)
//! lock                   held by who changes the VM
//! worker.lock            held by its worker (crate::record)
//! worker.log             what its workers had to say
//! disks/                 images that were made with it
//! state/                 what the worker writes, and the only folder in which it may:
//!   firmware.vars        the firmware's variables
//!   events.jsonl         what happened to it (crate::events)
//!   saved.state          its state, if it was saved
//!   worker.json          the worker (crate::record)
//!   control.sock         its control socket
//! ```

use crate::atomic::{self, Lock};
use crate::config::VmConfig;
use crate::error::{Error, Result};
use crate::events::EventLog;
use crate::store::Store;
use std::path::{Path, PathBuf};
use uuid::Uuid;

/// Name of the folder in which a worker writes.
pub(crate) const STATE: &str = "state";

/// A VM of the inventory.
#[derive(Clone, Debug)]
pub struct Vm {
    store: Store,
    id: Uuid,
    folder: PathBuf,
}

impl Vm {
    pub(crate) fn new(store: Store, id: Uuid, folder: PathBuf) -> Self {
        Self { store, id, folder }
    }

    /// Its identity.
    pub fn id(&self) -> Uuid {
        self.id
    }

    /// The store that it belongs to.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Its folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Its configuration file.
    pub fn config_path(&self) -> PathBuf {
        self.folder.join("config.toml")
    }

    /// The folder in which the worker writes.
    pub fn state_folder(&self) -> PathBuf {
        self.folder.join(STATE)
    }

    /// Images that were made with it.
    pub fn disks_folder(&self) -> PathBuf {
        self.folder.join("disks")
    }

    /// The firmware's variables.
    pub fn variables_path(&self) -> PathBuf {
        self.state_folder().join("firmware.vars")
    }

    /// Its saved state.
    pub fn state_path(&self) -> PathBuf {
        self.state_folder().join("saved.state")
    }

    /// Its state while it is being saved.
    pub fn partial_state_path(&self) -> PathBuf {
        self.state_folder().join("saved.state.partial")
    }

    /// What its workers had to say.
    pub fn log_path(&self) -> PathBuf {
        self.folder.join("worker.log")
    }

    /// Its control socket.
    pub fn socket_path(&self) -> PathBuf {
        self.state_folder().join("control.sock")
    }

    pub(crate) fn record_path(&self) -> PathBuf {
        self.state_folder().join("worker.json")
    }

    /// Which control group its worker has, or had: a process cannot remove the group that it is in.
    pub(crate) fn group_path(&self) -> PathBuf {
        self.state_folder().join("worker.group")
    }

    pub(crate) fn worker_lock_path(&self) -> PathBuf {
        self.folder.join("worker.lock")
    }

    /// What happened to it.
    pub fn events(&self) -> EventLog {
        EventLog::of(&self.state_folder())
    }

    /// Reads its configuration.
    ///
    /// # Errors
    /// [`Error::Damaged`] with line and reason.
    pub fn load(&self) -> Result<VmConfig> {
        let path = self.config_path();
        let bytes = std::fs::read(&path).map_err(Error::io(&path, "read the configuration"))?;
        let config = VmConfig::parse(&path, &bytes)?;
        if config.id != self.id {
            let reason = format!("the id is {}, but the folder is that of {}", config.id, self.id);
            return Err(Error::Damaged { path, line: 1, reason });
        }
        Ok(config)
    }

    /// Its name, or its id if that cannot be read.
    pub fn label(&self) -> String {
        self.load().map_or_else(|_| self.id.to_string(), |c| c.name)
    }

    /// Keeps other commands from changing it.
    ///
    /// # Errors
    /// [`Error::Busy`] when one does and does not end.
    pub fn lock(&self) -> Result<Lock> {
        atomic::lock(&self.folder.join("lock"), &format!("'{}'", self.label()))
    }

    pub(crate) fn try_lock(&self) -> Result<Option<Lock>> {
        atomic::try_lock(&self.folder.join("lock"))
    }

    /// Changes its configuration under its lock.
    ///
    /// # Errors
    /// When the new configuration is of no use; then nothing is changed.
    pub fn change(&self, change: impl FnOnce(&mut VmConfig) -> Result<()>) -> Result<VmConfig> {
        let _lock = self.lock()?;
        self.change_locked(change)
    }

    /// [`Vm::change`] for who holds the lock.
    pub(crate) fn change_locked(&self, change: impl FnOnce(&mut VmConfig) -> Result<()>) -> Result<VmConfig> {
        let old = self.load()?;
        let mut config = old.clone();
        change(&mut config)?;
        config.check()?;
        if config != old {
            atomic::write(&self.config_path(), config.text()?.as_bytes(), true)?;
        }
        Ok(config)
    }

    /// Gives it another name.
    ///
    /// # Errors
    /// When the name is taken or of no use.
    pub fn rename(&self, name: &str) -> Result<()> {
        self.store.rename(self, name)
    }
}
