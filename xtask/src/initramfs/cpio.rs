//! The `newc` cpio format of an initramfs (Linux `Documentation/driver-api/early-userspace/buffer-format.rst`).
//!
//! Entries are written in a fixed order with a zero time stamp and root's ownership, so that the same contents give
//! the same bytes on every machine, and no root is needed for device nodes.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// File type bits of `st_mode`.
const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;
const CHARACTER: u32 = 0o020_000;

/// What a path of the archive is.
#[derive(Clone, Debug)]
pub enum Node {
    /// A folder.
    Directory,
    /// A file with its permission bits.
    File {
        /// Contents.
        data: Vec<u8>,
        /// Permission bits.
        mode: u32,
    },
    /// A symbolic link.
    Link(String),
    /// A character device.
    Character {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
}

/// An archive under construction. Paths have no leading slash.
#[derive(Debug, Default)]
pub struct Archive {
    nodes: BTreeMap<String, Node>,
}

impl Archive {
    /// Adds one path and the folders above it. A later addition replaces an earlier one.
    pub fn add(&mut self, path: &str, node: Node) {
        let path = path.trim_matches('/');
        let mut end = 0;
        while let Some(slash) = path[end..].find('/') {
            end += slash;
            self.nodes.entry(path[..end].to_owned()).or_insert(Node::Directory);
            end += 1;
        }
        self.nodes.insert(path.to_owned(), node);
    }

    /// Adds a file.
    pub fn file(&mut self, path: &str, mode: u32, data: impl Into<Vec<u8>>) {
        self.add(path, Node::File { data: data.into(), mode });
    }

    /// Adds a symbolic link.
    pub fn link(&mut self, path: &str, target: &str) {
        self.add(path, Node::Link(target.to_owned()));
    }

    /// Whether a path is there already.
    pub fn contains(&self, path: &str) -> bool {
        self.nodes.contains_key(path.trim_matches('/'))
    }

    /// Writes the archive. `BTreeMap` order puts each folder before what is in it.
    ///
    /// # Errors
    /// When the output cannot be written, or a file passes the format's 4 GiB.
    pub fn write(&self, out: &mut impl Write) -> io::Result<()> {
        for (index, (path, node)) in self.nodes.iter().enumerate() {
            let (mode, device, data): (u32, (u32, u32), &[u8]) = match node {
                Node::Directory => (DIRECTORY | 0o755, (0, 0), &[]),
                Node::File { data, mode } => (REGULAR | mode, (0, 0), data),
                Node::Link(target) => (SYMLINK | 0o777, (0, 0), target.as_bytes()),
                Node::Character { major, minor } => (CHARACTER | 0o600, (*major, *minor), &[]),
            };
            let number = u32::try_from(index + 1).map_err(io::Error::other)?;
            entry(out, path, number, mode, device, data)?;
        }
        entry(out, "TRAILER!!!", 0, 0, (0, 0), &[])
    }

    /// Writes the tree into a folder. Device nodes are left out: they need root, and the guest's kernel makes its own.
    ///
    /// # Errors
    /// When something cannot be written.
    pub fn write_tree(&self, folder: &Path) -> io::Result<()> {
        for (path, node) in &self.nodes {
            let path = folder.join(path);
            match node {
                Node::Directory => fs::create_dir_all(&path)?,
                Node::File { data, mode } => {
                    fs::write(&path, data)?;
                    fs::set_permissions(&path, fs::Permissions::from_mode(*mode))?;
                }
                Node::Link(target) => std::os::unix::fs::symlink(target, &path)?,
                Node::Character { .. } => {}
            }
        }
        Ok(())
    }
}

fn entry(out: &mut impl Write, path: &str, inode: u32, mode: u32, device: (u32, u32), data: &[u8]) -> io::Result<()> {
    let size = u32::try_from(data.len()).map_err(io::Error::other)?;
    let links = if mode & DIRECTORY != 0 { 2 } else { 1 };
    write!(out, "070701")?;
    let name_size = path.len() as u32 + 1;
    // inode, mode, uid, gid, links, time, size, device of the file, device number, name size, checksum
    for field in [inode, mode, 0, 0, links, 0, size, 0, 0, device.0, device.1, name_size, 0] {
        write!(out, "{field:08x}")?;
    }
    out.write_all(path.as_bytes())?;
    out.write_all(&[0])?;
    const HEADER: usize = 110;
    pad(out, HEADER + path.len() + 1)?;
    out.write_all(data)?;
    pad(out, data.len())
}

/// Names and contents end on a multiple of four bytes.
fn pad(out: &mut impl Write, written: usize) -> io::Result<()> {
    out.write_all(&[0; 3][..written.wrapping_neg() & 3])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layout() {
        let mut archive = Archive::default();
        archive.file("a/b/c", 0o644, "hello");
        archive.link("bin", "usr/bin");
        let mut bytes = Vec::new();
        archive.write(&mut bytes).unwrap();
        assert_eq!(bytes.len() % 4, 0);
        let text = String::from_utf8_lossy(&bytes);
        assert_eq!(text.matches("070701").count(), 5, "a, a/b, a/b/c, bin and the trailer");
        assert!(text.find("a/b\0").unwrap() < text.find("a/b/c\0").unwrap());
        // The file's header: type and permissions, and its size.
        let file = text.find("a/b/c\0").unwrap() - 110;
        assert_eq!(&text[file + 14..file + 22], "000081a4");
        assert_eq!(&text[file + 54..file + 62], "00000005");
        assert!(text.ends_with("TRAILER!!!\0\0\0\0"), "{text:?}");
    }
}
