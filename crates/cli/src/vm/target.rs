//! Which machine a name means: a VM of the inventory; or one that `viridian run --name` runs; or a control socket's path.

use crate::failure::Failure;
use std::path::PathBuf;
use vmms::{Error, Store, Vm};
use worker::control::{Client, socket_path};

/// A machine.
pub enum Target {
    /// Of the inventory.
    Vm(Vm),
    /// Of no inventory.
    Machine(Client),
}

impl Target {
    /// Finds it.
    pub fn find(store: &Store, name: &str) -> Result<Self, Failure> {
        if name.contains('/') {
            return Ok(Self::Machine(Client::new(PathBuf::from(name))));
        }
        match store.find(name) {
            Ok(vm) => Ok(Self::Vm(vm)),
            Err(error @ Error::NoSuchVm { .. }) => {
                // A name of an inventory may be one that no file can have.
                let path = socket_path(name);
                if name.len() < 200 && path.exists() {
                    return Ok(Self::Machine(Client::new(path)));
                }
                Err(error.into())
            }
            Err(error) => Err(error.into()),
        }
    }

    /// A client of the running machine.
    pub fn client(&self) -> Result<Client, Failure> {
        match self {
            Self::Machine(client) => Ok(client.clone()),
            Self::Vm(vm) => {
                let status = vm.status(std::time::Duration::from_secs(5));
                if let Some(trouble) = status.trouble {
                    if status.record.is_some() {
                        let advice = "`vm stop --turn-off` ends it if it stays so";
                        return Err(Error::Timeout(format!("'{}': {trouble}; {advice}", vm.label())).into());
                    }
                    eprintln!("note: {trouble}");
                }
                if status.record.is_none() {
                    return Err(vm.wrong_state(status.state, "start it first (`viridian vm start`)").into());
                }
                Ok(vm.client())
            }
        }
    }
}

/// A path as the inventory keeps it.
pub fn absolute(path: PathBuf) -> Result<PathBuf, Failure> {
    let absolute = std::path::absolute(&path).map_err(|e| Failure::usage(format!("{}: {e}", path.display())))?;
    // TOML and JSON are text.
    if absolute.to_str().is_none() {
        return Err(Failure::usage(format!("{}: a path must be UTF-8 text", absolute.display())));
    }
    Ok(absolute)
}
