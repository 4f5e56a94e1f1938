//! The folder of all VMs.
//!
//! ```text
//! STORE/lock              held by who adds, renames or removes
//!       index.json        a cache for listing
//!       vms/ID/           one folder a VM (crate::vm says what is in it)
//!       vms/.new-ID/      a VM that is being made
//!       vms/.removed-ID/  a VM that is being removed
//! ```

use crate::atomic::{self, Lock};
use crate::config::VmConfig;
use crate::error::{Error, Result, shortened};
use crate::events::EventLog;
use crate::index::{Index, Stamp, Summary};
use crate::name;
use crate::vm::{STATE, Vm};
use std::io::ErrorKind;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use uuid::Uuid;

/// The inventory.
#[derive(Clone, Debug)]
pub struct Store {
    root: PathBuf,
}

/// One VM of a list: what is known of it, or why that is not much.
#[derive(Debug)]
pub struct Entry {
    /// The VM.
    pub vm: Vm,
    /// What its file says.
    pub summary: Result<Summary>,
}

impl Store {
    /// The store that a user has without `--store`: `/var/lib/viridian` for root, `viridian` in the XDG data folder for
    /// others.
    ///
    /// # Errors
    /// When the user has no home.
    pub fn usual() -> Result<PathBuf> {
        if rustix::process::geteuid().is_root() {
            return Ok("/var/lib/viridian".into());
        }
        let set = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        let data = set("XDG_DATA_HOME").filter(|d| d.is_absolute());
        let data = data.or_else(|| set("HOME").map(|home| home.join(".local/share")));
        data.map(|d| d.join("viridian")).ok_or_else(|| {
            Error::Config("neither XDG_DATA_HOME nor HOME is set: say where the VMs are with --store".into())
        })
    }

    /// The store in this folder, which need not exist yet.
    ///
    /// # Errors
    /// When the path cannot be made absolute.
    pub fn at(root: &Path) -> Result<Self> {
        let root = std::path::absolute(root).map_err(Error::io(root, "find the store"))?;
        Ok(Self { root })
    }

    /// Its folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    fn vms(&self) -> PathBuf {
        self.root.join("vms")
    }

    /// Makes the folders, and keeps everybody else from adding, renaming and removing.
    fn lock(&self) -> Result<Lock> {
        let vms = self.vms();
        let mut builder = std::fs::DirBuilder::new();
        builder.recursive(true).mode(0o700).create(&vms).map_err(Error::io(&vms, "make the store"))?;
        atomic::lock(&self.root.join("lock"), "the store")
    }

    fn ids(&self) -> Result<Vec<Uuid>> {
        let vms = self.vms();
        let entries = match std::fs::read_dir(&vms) {
            Ok(entries) => entries,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(Error::io(&vms, "list the VMs")(e)),
        };
        let mut ids = Vec::new();
        for entry in entries {
            let entry = entry.map_err(Error::io(&vms, "list the VMs"))?;
            ids.extend(entry.file_name().to_str().and_then(|name| Uuid::try_parse(name).ok()));
        }
        Ok(ids)
    }

    fn vm(&self, id: Uuid) -> Vm {
        Vm::new(self.clone(), id, self.vms().join(id.to_string()))
    }

    /// All VMs, by name.
    ///
    /// # Errors
    /// When the folder cannot be read. A damaged VM is an entry with an error.
    pub fn list(&self) -> Result<Vec<Entry>> {
        let ids = self.ids()?;
        let path = self.root.join("index.json");
        let mut index = Index::read(&path);
        index.keep(&ids);
        let mut entries = Vec::with_capacity(ids.len());
        for id in ids {
            let vm = self.vm(id);
            let summary = match std::fs::metadata(vm.config_path()) {
                Ok(metadata) => {
                    let stamp = Stamp::of(&metadata);
                    match index.get(id, stamp) {
                        Some(summary) => Ok(summary.clone()),
                        None => vm.load().map(|config| {
                            let summary = Summary::of(&config);
                            index.put(stamp, summary.clone());
                            summary
                        }),
                    }
                }
                // Removed by somebody else a moment ago.
                Err(e) if e.kind() == ErrorKind::NotFound && !vm.folder().exists() => continue,
                Err(e) => Err(Error::Damaged {
                    path: vm.config_path(),
                    line: 0,
                    reason: format!("the configuration cannot be read: {e}"),
                }),
            };
            entries.push(Entry { vm, summary });
        }
        index.write(&path);
        let key = |e: &Entry| e.summary.as_ref().map_or_else(|_| "\u{10ffff}".to_string(), |s| s.name.clone());
        entries.sort_by_cached_key(|e| (key(e), e.vm.id()));
        Ok(entries)
    }

    /// The VM with this name or id.
    ///
    /// # Errors
    /// [`Error::NoSuchVm`], with what may have been meant.
    pub fn find(&self, wanted: &str) -> Result<Vm> {
        if let Ok(id) = Uuid::try_parse(wanted) {
            let vm = self.vm(id);
            if vm.folder().is_dir() {
                return Ok(vm);
            }
        }
        let entries = self.list()?;
        let (mut damaged, mut alike) = (0, None);
        for entry in entries {
            match &entry.summary {
                Ok(summary) if summary.name == wanted => return Ok(entry.vm),
                Ok(summary) if summary.name.eq_ignore_ascii_case(wanted) => alike = Some(summary.name.clone()),
                Ok(_) => {}
                Err(_) => damaged += 1,
            }
        }
        let hint = match (alike, damaged) {
            (Some(name), _) => format!("; there is '{name}'"),
            (None, 0) => " (`viridian vm list` shows what there is)".into(),
            (None, n) => format!("; {n} VMs have damaged files (`viridian vm list` names them)"),
        };
        Err(Error::NoSuchVm { name: shortened(wanted), hint })
    }

    fn name_is_free(&self, name: &str, but: Option<Uuid>) -> Result<()> {
        let taken =
            self.list()?.iter().any(|e| Some(e.vm.id()) != but && e.summary.as_ref().is_ok_and(|s| s.name == name));
        if taken { Err(Error::NameTaken(name.into())) } else { Ok(()) }
    }

    /// Makes a VM. `fill` may put files into its folder, which has its final name only afterwards; what it returns is
    /// the configuration that is written.
    ///
    /// # Errors
    /// When the name is taken or the configuration of no use; nothing is left then.
    pub fn create(
        &self,
        mut config: VmConfig,
        fill: impl FnOnce(&Path, &Path, &mut VmConfig) -> Result<()>,
    ) -> Result<Vm> {
        config.check()?;
        let _lock = self.lock()?;
        self.sweep();
        self.name_is_free(&config.name, None)?;
        let vm = self.vm(config.id);
        let new = self.vms().join(format!(".new-{}", config.id));
        let made = std::fs::DirBuilder::new().mode(0o700).create(&new).map_err(Error::io(&new, "make the VM's folder"));
        let state = new.join(STATE);
        let made = made.and_then(|()| {
            std::fs::DirBuilder::new().mode(0o700).create(&state).map_err(Error::io(&state, "make the VM's folder"))?;
            fill(&new, vm.folder(), &mut config)?;
            config.check()?;
            atomic::write(&new.join("config.toml"), config.text()?.as_bytes(), true)?;
            EventLog::of(&state).append("created", &format!("'{}' was created", config.name))?;
            std::fs::rename(&new, vm.folder()).map_err(Error::io(&new, "name the VM's folder"))?;
            atomic::sync_folder(&self.vms())
        });
        if made.is_err() {
            let _ = std::fs::remove_dir_all(&new);
        }
        made.map(|()| vm)
    }

    /// Gives a VM another name.
    pub(crate) fn rename(&self, vm: &Vm, name: &str) -> Result<()> {
        name::check(name)?;
        let _lock = self.lock()?;
        self.name_is_free(name, Some(vm.id()))?;
        let old = vm.load()?.name;
        vm.change(|config| {
            config.name = name.into();
            Ok(())
        })?;
        vm.events().note("renamed", &format!("'{old}' is called '{name}' now"));
        Ok(())
    }

    /// Removes a VM's folder. It is gone for everybody as soon as it has lost its name.
    pub(crate) fn remove(&self, vm: &Vm) -> Result<()> {
        let _lock = self.lock()?;
        let removed = self.vms().join(format!(".removed-{}", vm.id()));
        let _ = std::fs::remove_dir_all(&removed);
        std::fs::rename(vm.folder(), &removed).map_err(Error::io(vm.folder(), "remove the VM"))?;
        atomic::sync_folder(&self.vms())?;
        std::fs::remove_dir_all(&removed).map_err(Error::io(&removed, "remove the VM's files"))
    }

    /// Clears away what commands have left that were killed. Called with the lock held, so none of it is in use.
    fn sweep(&self) {
        let Ok(entries) = std::fs::read_dir(self.vms()) else { return };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if name.starts_with(".new-") || name.starts_with(".removed-") {
                let _ = std::fs::remove_dir_all(entry.path());
            }
        }
    }
}
