//! What a worker opens before it confines itself.
//!
//! A confined worker has the rights of its user and no privileges, root's neither. Root may open an image in another user's
//! private folder, a confined worker of root's may not. So images, and what a machine boots from, are opened before; and
//! what is opened or replaced only later ([`Reach`]) is looked at before and after, so that a start fails with a reason
//! instead of a running machine that cannot write its variables.

use crate::control::client::open_images;
use crate::run::{Start, WorkerError, open_state};
use crate::sandbox::Files;
use crate::units::{Given, image_error};
use machine::boot::BootFiles;
use machine::save::Header;
use machine::{BootSource, MachineConfig, UnitKind};
use rustix::fs::{Access, AtFlags, CWD, accessat};
use std::collections::BTreeSet;
use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};

/// A machine's configuration and its open files.
pub struct Opened {
    /// The configuration, a saved machine's if it goes on from a file.
    pub config: MachineConfig,
    /// The file that it goes on from, read to the end of its header.
    pub restore: Option<(PathBuf, Header, BufReader<File>)>,
    /// Images of each unit of the configuration, in the same order; none where the worker does not confine itself.
    pub images: Vec<Given>,
    /// What it boots from.
    pub boot: BootFiles,
}

impl Opened {
    /// Opens what `start` needs; images and boot files only for a worker that confines itself.
    ///
    /// # Errors
    /// When a state file or an image is of no use. (What is wrong with a boot file is said where it is loaded.)
    pub fn new(start: &Start, confined: bool) -> Result<Self, WorkerError> {
        let (config, restore) = match start {
            Start::Boot(config) => (config.clone(), None),
            Start::Restore { file: path, storage } => {
                let (header, file) = open_state(path)?;
                let mut config = header.config.clone();
                if let Some(storage) = storage {
                    config.storage.clone_from(storage);
                }
                (config, Some((path.clone(), header, file)))
            }
        };
        let (mut images, mut boot) = (Vec::new(), Vec::new());
        if confined {
            for unit in &config.storage {
                let given = unit.image.as_ref().map(|path| {
                    open_images(path, unit.kind == UnitKind::Disk)
                        .map_err(|e| WorkerError::Setup(image_error(path, &e)))
                });
                images.push(given.transpose()?.unwrap_or_default());
            }
            let files = boot_files(&config.boot).into_iter().filter(|path| path.is_file());
            boot.extend(files.filter_map(|path| Some((path.clone(), File::open(path).ok()?))));
        }
        Ok(Self { config, restore, images, boot: BootFiles::new(boot) })
    }

    /// Paths that need not be opened any more.
    fn paths(&self) -> BTreeSet<&Path> {
        let images = self.images.iter().flatten().map(|(path, _)| path.as_path());
        images.chain(self.boot.paths()).collect()
    }
}

fn boot_files(boot: &BootSource) -> Vec<&PathBuf> {
    match boot {
        BootSource::Kernel { kernel, initrd, .. } => std::iter::once(kernel).chain(initrd).collect(),
        BootSource::Firmware { image, .. } => image.iter().collect(),
        BootSource::Flat { .. } => Vec::new(),
    }
}

/// What a worker reaches by path.
pub struct Reach(Vec<(PathBuf, Access)>);

impl Reach {
    /// What of `files` is not open already and may be used now.
    pub fn now(files: &Files, opened: &Opened) -> Self {
        let change = Access::WRITE_OK | Access::EXEC_OK;
        let write = |path: &Path| if path.is_dir() { change } else { Access::WRITE_OK };
        let open = opened.paths();
        let read = files.read.iter().map(|path| (path, Access::READ_OK));
        let written = files.write.iter().map(|path| (path, write(path)));
        let folders = files.replace.iter().chain(&files.sockets).map(|path| (path, change));
        let mut list: Vec<_> = read.chain(written).chain(folders).map(|(p, access)| (p.clone(), access)).collect();
        list.retain(|(path, access)| !open.contains(path.as_path()) && may(path, *access));
        Self(list)
    }

    /// Fails when some of it is lost, now that the worker has confined itself.
    ///
    /// # Errors
    /// The first path that is lost, and what to do.
    pub fn is_kept(&self) -> Result<(), WorkerError> {
        let Some((path, _)) = self.0.iter().find(|(path, access)| !may(path, *access)) else { return Ok(()) };
        Err(WorkerError::Setup(format!(
            "{}: only a privilege of this user's gives access to it, and a worker gives its privileges up before the guest \
             runs: give the user itself access (chown, chmod), choose another folder, or start it as the owner",
            path.display()
        )))
    }
}

/// What the host cannot say is found out where the path is used; so is a path that does not exist (yet).
fn may(path: &Path, access: Access) -> bool {
    accessat(CWD, path, access, AtFlags::EACCESS) != Err(rustix::io::Errno::ACCESS)
}
