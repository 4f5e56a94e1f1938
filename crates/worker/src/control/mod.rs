//! The control socket of a running machine: HTTP/1.1 with JSON over a Unix socket. docs/control.md is its reference.
//!
//! * [`schema`]: what is asked and answered, for both sides;
//! * [`http`]: the little of HTTP that this needs, with strict bounds, and files passed along with a request;
//! * [`server`]: the worker's side; [`client`]: the side of those who ask.
//!
//! Only the user who runs the machine can reach the socket: it belongs to them alone, and so does its folder.

pub mod client;
pub mod http;
pub mod schema;
pub mod server;

pub use client::Client;
pub use server::{Context, Control};

use std::path::PathBuf;

/// Folder of the sockets of machines that are in no inventory (`viridian run --name`).
pub fn runtime_folder() -> PathBuf {
    std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| !dir.is_empty()).map_or_else(
        || std::env::temp_dir().join(format!("viridian-{}", rustix::process::getuid().as_raw())),
        |dir| PathBuf::from(dir).join("viridian"),
    )
}

/// Where the socket of a machine with this name is; a name with a slash is a path.
pub fn socket_path(name: &str) -> PathBuf {
    if name.contains('/') {
        return name.into();
    }
    runtime_folder().join(format!("{name}.sock"))
}
