//! Device paths (UEFI 2.10, chapter 10): walking, building, comparing, and the text form ([`text`]).
//!
//! A path is a byte string of nodes: type, subtype, 16-bit length, data; it ends with an end-entire node (7F FF 04 00).
//! Paths come from variables, images and disks: [`DevicePath::parse`] checks the lengths once.

pub mod text;

use crate::bytes::{slice, u16_at};
use crate::guid::Guid;
use crate::partition::{Identity, Partition};
use alloc::vec::Vec;

/// Node types and subtypes.
pub mod kind {
    #![allow(missing_docs)]
    pub const HARDWARE: u8 = 1;
    pub const ACPI: u8 = 2;
    pub const MESSAGING: u8 = 3;
    pub const MEDIA: u8 = 4;
    pub const BBS: u8 = 5;
    pub const END: u8 = 0x7f;
    pub const HW_PCI: u8 = 1;
    pub const HW_MEMORY_MAPPED: u8 = 3;
    pub const HW_VENDOR: u8 = 4;
    pub const HW_CONTROLLER: u8 = 5;
    pub const ACPI_HID: u8 = 1;
    pub const ACPI_ADR: u8 = 3;
    pub const MSG_SCSI: u8 = 2;
    pub const MSG_USB: u8 = 5;
    pub const MSG_VENDOR: u8 = 10;
    pub const MSG_MAC: u8 = 11;
    pub const MSG_IPV4: u8 = 12;
    pub const MSG_IPV6: u8 = 13;
    pub const MSG_UART: u8 = 14;
    pub const MSG_SATA: u8 = 18;
    pub const MSG_URI: u8 = 24;
    pub const MEDIA_HARD_DRIVE: u8 = 1;
    pub const MEDIA_CDROM: u8 = 2;
    pub const MEDIA_VENDOR: u8 = 3;
    pub const MEDIA_FILE: u8 = 4;
    pub const MEDIA_FV_FILE: u8 = 6;
    pub const MEDIA_FV: u8 = 7;
    pub const END_INSTANCE: u8 = 1;
    pub const END_ENTIRE: u8 = 0xff;
}

/// Longest path that is accepted, in bytes.
pub const MAX_PATH: usize = 8192;
const END: [u8; 4] = [kind::END, kind::END_ENTIRE, 4, 0];

/// One node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Node<'a> {
    /// Type and subtype.
    pub kind: (u8, u8),
    /// Data behind the header.
    pub data: &'a [u8],
}

/// A path, without its end-entire node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DevicePath {
    nodes: Vec<u8>,
}

impl DevicePath {
    /// An empty path.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes a path from the start of `bytes`; returns it and how many bytes it has with its end node. `None` if a
    /// node's length is wrong or there is no end.
    pub fn parse(bytes: &[u8]) -> Option<(Self, usize)> {
        let mut at = 0;
        while at < MAX_PATH {
            let header = slice(bytes, at, 4)?;
            let len = usize::from(u16_at(header, 2)?);
            slice(bytes, at, len).filter(|_| len >= 4)?;
            if header[0] & 0x7f == kind::END && header[1] == kind::END_ENTIRE {
                return Some((Self { nodes: bytes[..at].to_vec() }, at + len));
            }
            at += len;
        }
        None
    }

    /// The bytes, with the end node.
    pub fn to_bytes(&self) -> Vec<u8> {
        [&self.nodes[..], &END].concat()
    }

    /// Its nodes.
    pub fn iter(&self) -> impl Iterator<Item = Node<'_>> {
        let mut rest = &self.nodes[..];
        core::iter::from_fn(move || {
            let len = usize::from(u16_at(rest, 2)?);
            let (node, tail) = rest.split_at_checked(len.max(4))?;
            rest = tail;
            Some(Node { kind: (node[0], node[1]), data: &node[4..] })
        })
    }

    /// Is there no node?
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// Adds a node. Data that no node can hold is cut.
    #[must_use]
    pub fn with(mut self, kind: u8, subtype: u8, data: &[u8]) -> Self {
        let data = &data[..data.len().min(usize::from(u16::MAX) - 4)];
        self.nodes.extend([kind, subtype]);
        self.nodes.extend((data.len() as u16 + 4).to_le_bytes());
        self.nodes.extend_from_slice(data);
        self
    }

    /// Adds a vendor-defined hardware node.
    #[must_use]
    pub fn vendor_hardware(self, guid: Guid, data: &[u8]) -> Self {
        self.with(kind::HARDWARE, kind::HW_VENDOR, &[&guid.0[..], data].concat())
    }
    /// Adds a SCSI target and unit.
    #[must_use]
    pub fn scsi(self, target: u16, lun: u16) -> Self {
        self.with(kind::MESSAGING, kind::MSG_SCSI, &[target.to_le_bytes(), lun.to_le_bytes()].concat())
    }
    /// Adds a file name.
    #[must_use]
    pub fn file(self, path: &str) -> Self {
        let units: Vec<u8> = path.encode_utf16().chain([0]).flat_map(u16::to_le_bytes).collect();
        self.with(kind::MEDIA, kind::MEDIA_FILE, &units)
    }
    /// Adds a partition.
    #[must_use]
    pub fn partition(self, p: &Partition) -> Self {
        let mut d = Vec::with_capacity(38);
        match p.identity {
            Identity::ElTorito { entry } => {
                d.extend(entry.to_le_bytes());
                d.extend(p.first.to_le_bytes());
                d.extend(p.blocks.to_le_bytes());
                self.with(kind::MEDIA, kind::MEDIA_CDROM, &d)
            }
            Identity::Gpt { unique, .. } => {
                d.extend(p.number.to_le_bytes());
                d.extend(p.first.to_le_bytes());
                d.extend(p.blocks.to_le_bytes());
                d.extend(unique.0);
                d.extend([2, 2]);
                self.with(kind::MEDIA, kind::MEDIA_HARD_DRIVE, &d)
            }
            Identity::Mbr { disk, .. } => {
                d.extend(p.number.to_le_bytes());
                d.extend(p.first.to_le_bytes());
                d.extend(p.blocks.to_le_bytes());
                d.extend(disk.to_le_bytes());
                d.extend([0; 12]);
                d.extend([1, 1]);
                self.with(kind::MEDIA, kind::MEDIA_HARD_DRIVE, &d)
            }
        }
    }

    /// Adds all nodes of another path.
    #[must_use]
    pub fn join(mut self, tail: &DevicePath) -> Self {
        self.nodes.extend_from_slice(&tail.nodes);
        self
    }

    /// If this path starts with all nodes of `prefix`: the rest.
    pub fn strip_prefix(&self, prefix: &DevicePath) -> Option<DevicePath> {
        // Nodes carry their length, so a prefix of bytes that ends at a node's end is a prefix of nodes.
        self.nodes.strip_prefix(&prefix.nodes[..]).map(|rest| DevicePath { nodes: rest.to_vec() })
    }

    /// The path from its first hard-drive node on (the short form of boot options: UEFI 2.10, section 3.1.2).
    pub fn from_hard_drive(&self) -> Option<DevicePath> {
        let mut at = 0;
        for node in self.iter() {
            if node.kind == (kind::MEDIA, kind::MEDIA_HARD_DRIVE) {
                return Some(DevicePath { nodes: self.nodes[at..].to_vec() });
            }
            at += node.data.len() + 4;
        }
        None
    }

    /// Does its first node, a hard-drive node, mean this partition? GPT partitions are compared by their GUID, MBR ones by
    /// disk signature and number; start and size may have changed since the boot option was made.
    pub fn starts_with_partition(&self, p: &Partition) -> bool {
        let Some(node) = self.iter().next() else { return false };
        if node.kind != (kind::MEDIA, kind::MEDIA_HARD_DRIVE) || node.data.len() < 38 {
            return false;
        }
        match p.identity {
            Identity::Gpt { unique, .. } => node.data[37] == 2 && node.data[20..36] == unique.0,
            Identity::Mbr { disk, .. } => {
                node.data[37] == 1
                    && node.data[20..24] == disk.to_le_bytes()
                    && node.data[..4] == p.number.to_le_bytes()
            }
            Identity::ElTorito { .. } => false,
        }
    }

    /// The path without its first node.
    pub fn tail(&self) -> DevicePath {
        let first = self.iter().next().map_or(0, |n| n.data.len() + 4);
        DevicePath { nodes: self.nodes[first..].to_vec() }
    }

    /// The file that the path's file nodes name together, with `\` between them.
    pub fn file_path(&self) -> Option<alloc::string::String> {
        let mut path = alloc::string::String::new();
        for node in self.iter().filter(|n| n.kind == (kind::MEDIA, kind::MEDIA_FILE)) {
            if !path.is_empty() && !path.ends_with('\\') {
                path.push('\\');
            }
            let units = node.data.chunks_exact(2).map(|c| u16::from_le_bytes([c[0], c[1]])).take_while(|u| *u != 0);
            path.extend(char::decode_utf16(units).map(|c| c.unwrap_or('\u{fffd}')));
        }
        (!path.is_empty()).then_some(path)
    }
}

#[cfg(test)]
mod tests;
