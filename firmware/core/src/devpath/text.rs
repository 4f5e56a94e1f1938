//! The text form of device paths (UEFI 2.10, section 10.6).
//!
//! Nodes without a form of their own are written as `Path(type,subtype,hex)` and read back from it, so that every path
//! survives the round trip.

use super::{DevicePath, Node, kind};
use crate::bytes::{u16_at, u32_at, u64_at};
use crate::guid::Guid;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;

/// The text of a path.
pub fn to_text(path: &DevicePath) -> String {
    let mut out = String::new();
    for node in path.iter() {
        if node.kind == (kind::END, kind::END_INSTANCE) {
            out.push(',');
            continue;
        }
        if !out.is_empty() && !out.ends_with(',') {
            out.push('/');
        }
        out += &node_text(&node);
    }
    out
}

/// The text of one node.
pub fn node_text(node: &Node<'_>) -> String {
    known(node).unwrap_or_else(|| format!("Path({},{},{})", node.kind.0, node.kind.1, hex(node.data)))
}

fn hex(data: &[u8]) -> String {
    data.iter().map(|b| format!("{b:02X}")).collect()
}

/// Stop bits by their number in a UART node.
const STOP_BITS: [&str; 4] = ["D", "1", "1.5", "2"];

fn guid(data: &[u8], at: usize) -> Option<String> {
    Guid::read(data, at).map(|g| g.to_string().to_ascii_uppercase())
}

fn known(node: &Node<'_>) -> Option<String> {
    let d = node.data;
    // A node with bytes that its form cannot tell is written in the general form.
    let exact = |len: usize| (d.len() == len).then_some(());
    Some(match node.kind {
        (kind::HARDWARE, kind::HW_PCI) => {
            exact(2)?;
            format!("Pci(0x{:X},0x{:X})", d[1], d[0])
        }
        (kind::HARDWARE, kind::HW_MEMORY_MAPPED) => {
            exact(20)?;
            format!("MemoryMapped(0x{:X},0x{:X},0x{:X})", u32_at(d, 0)?, u64_at(d, 4)?, u64_at(d, 12)?)
        }
        (kind::HARDWARE, kind::HW_VENDOR) => vendor("VenHw", d)?,
        (kind::HARDWARE, kind::HW_CONTROLLER) => {
            exact(4)?;
            format!("Ctrl(0x{:X})", u32_at(d, 0)?)
        }
        (kind::ACPI, kind::ACPI_HID) => {
            exact(8)?;
            let (hid, uid) = (u32_at(d, 0)?, u32_at(d, 4)?);
            match hid {
                0x0a03_41d0 => format!("PciRoot(0x{uid:X})"),
                0x0a08_41d0 => format!("PcieRoot(0x{uid:X})"),
                0x0303_41d0 => format!("Keyboard(0x{uid:X})"),
                0x0501_41d0 => format!("Serial(0x{uid:X})"),
                _ if hid & 0xffff == 0x41d0 => format!("Acpi(PNP{:04X},0x{uid:X})", hid >> 16),
                _ => format!("Acpi(0x{hid:08X},0x{uid:X})"),
            }
        }
        (kind::ACPI, kind::ACPI_ADR) => {
            exact(4)?;
            format!("AcpiAdr(0x{:X})", u32_at(d, 0)?)
        }
        (kind::MESSAGING, kind::MSG_SCSI) => {
            exact(4)?;
            format!("Scsi(0x{:X},0x{:X})", u16_at(d, 0)?, u16_at(d, 2)?)
        }
        (kind::MESSAGING, kind::MSG_USB) => {
            exact(2)?;
            format!("USB(0x{:X},0x{:X})", d[0], d[1])
        }
        (kind::MESSAGING, kind::MSG_SATA) => {
            exact(6)?;
            format!("Sata(0x{:X},0x{:X},0x{:X})", u16_at(d, 0)?, u16_at(d, 2)?, u16_at(d, 4)?)
        }
        (kind::MESSAGING, kind::MSG_VENDOR) => vendor("VenMsg", d)?,
        (kind::MESSAGING, kind::MSG_MAC) => {
            exact(33)?;
            let len = if d[32] <= 1 { 6 } else { 32 };
            d[len..32].iter().all(|b| *b == 0).then_some(())?;
            format!("MAC({},0x{:X})", hex(&d[..len]), d[32])
        }
        (kind::MESSAGING, kind::MSG_UART) => {
            exact(15)?;
            if u32_at(d, 0)? != 0 {
                return None;
            }
            let parity = b"DNEOMS".get(usize::from(d[13]))?;
            let stop = STOP_BITS.get(usize::from(d[14]))?;
            format!("Uart({},{},{},{stop})", u64_at(d, 4)?, d[12], char::from(*parity))
        }
        (kind::MEDIA, kind::MEDIA_HARD_DRIVE) => {
            exact(38)?;
            let (number, start, size) = (u32_at(d, 0)?, u64_at(d, 4)?, u64_at(d, 12)?);
            match (d[36], d[37]) {
                (2, 2) => format!("HD({number},GPT,{},0x{start:X},0x{size:X})", guid(d, 20)?),
                (1, 1) if d[24..36].iter().all(|b| *b == 0) => {
                    format!("HD({number},MBR,0x{:08X},0x{start:X},0x{size:X})", u32_at(d, 20)?)
                }
                _ => return None,
            }
        }
        (kind::MEDIA, kind::MEDIA_CDROM) => {
            exact(20)?;
            format!("CDROM(0x{:X},0x{:X},0x{:X})", u32_at(d, 0)?, u64_at(d, 4)?, u64_at(d, 12)?)
        }
        (kind::MEDIA, kind::MEDIA_VENDOR) => vendor("VenMedia", d)?,
        (kind::MEDIA, kind::MEDIA_FILE) => file_text(d)?,
        (kind::MEDIA, kind::MEDIA_FV_FILE) => {
            exact(16)?;
            format!("FvFile({})", guid(d, 0)?)
        }
        (kind::MEDIA, kind::MEDIA_FV) => {
            exact(16)?;
            format!("Fv({})", guid(d, 0)?)
        }
        _ => return None,
    })
}

fn vendor(name: &str, d: &[u8]) -> Option<String> {
    let id = guid(d, 0)?;
    Some(if d.len() == 16 { format!("{name}({id})") } else { format!("{name}({id},{})", hex(&d[16..])) })
}

/// A file name stands for itself, if it can be told from the forms with parentheses.
fn file_text(d: &[u8]) -> Option<String> {
    let units: Vec<u16> = d.chunks_exact(2).map(|c| u16::from_le_bytes([c[0], c[1]])).collect();
    let (last, name) = units.split_last()?;
    let text = String::from_utf16(name).ok()?;
    let plain = *last == 0 && d.len() % 2 == 0 && !text.is_empty() && !text.contains(['(', ')', '/', ',', '\0']);
    plain.then_some(text)
}

/// Reads the text form. `None` if it is not one.
pub fn from_text(text: &str) -> Option<DevicePath> {
    let mut path = DevicePath::new();
    for (i, instance) in split_outside(text, ',').into_iter().enumerate() {
        if i > 0 {
            path = path.with(kind::END, kind::END_INSTANCE, &[]);
        }
        for part in split_outside(instance, '/').into_iter().filter(|p| !p.is_empty()) {
            path = node_from_text(path, part)?;
        }
    }
    (path.nodes.len() <= super::MAX_PATH - 4).then_some(path)
}

/// Splits at a separator outside parentheses.
fn split_outside(text: &str, separator: char) -> Vec<&str> {
    let (mut depth, mut start, mut parts) = (0i32, 0, Vec::new());
    for (i, c) in text.char_indices() {
        match c {
            '(' => depth += 1,
            ')' => depth -= 1,
            _ if c == separator && depth <= 0 => {
                parts.push(&text[start..i]);
                start = i + c.len_utf8();
            }
            _ => {}
        }
    }
    parts.push(&text[start..]);
    parts
}

fn number(text: &str) -> Option<u64> {
    let text = text.trim();
    match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

fn bytes(text: &str) -> Option<Vec<u8>> {
    let raw = text.trim().as_bytes();
    if raw.len() % 2 != 0 || !raw.is_ascii() {
        return None;
    }
    raw.chunks_exact(2).map(|c| u8::from_str_radix(core::str::from_utf8(c).ok()?, 16).ok()).collect()
}

/// A GUID from its usual notation.
pub fn guid_from_text(text: &str) -> Option<Guid> {
    let parts: Vec<&str> = text.trim().split('-').collect();
    let [a, b, c, d, e] = parts[..] else { return None };
    if [a.len(), b.len(), c.len(), d.len(), e.len()] != [8, 4, 4, 4, 12] {
        return None;
    }
    let tail: [u8; 8] = [bytes(d)?, bytes(e)?].concat().try_into().ok()?;
    let h = |t: &str| u32::from_str_radix(t, 16).ok();
    Some(Guid::new(h(a)?, h(b)? as u16, h(c)? as u16, tail))
}

fn node_from_text(path: DevicePath, part: &str) -> Option<DevicePath> {
    let Some((name, rest)) = part.split_once('(') else {
        return Some(path.file(part));
    };
    let inside = rest.strip_suffix(')')?;
    let args: Vec<&str> = inside.split(',').map(str::trim).collect();
    let n = |i: usize| args.get(i).map_or(Some(0), |t| if t.is_empty() { Some(0) } else { number(t) });
    let n32 = |i: usize| n(i).and_then(|v| u32::try_from(v).ok());
    let n16 = |i: usize| n(i).and_then(|v| u16::try_from(v).ok());
    let n8 = |i: usize| n(i).and_then(|v| u8::try_from(v).ok());
    let acpi = |path: DevicePath, hid: u32, uid: u32| {
        path.with(kind::ACPI, kind::ACPI_HID, &[hid.to_le_bytes(), uid.to_le_bytes()].concat())
    };
    let vendor = |path: DevicePath, kind: u8, subtype: u8| -> Option<DevicePath> {
        let id = guid_from_text(args.first()?)?;
        let data = args.get(1).map_or(Some(vec![]), |t| bytes(t))?;
        Some(path.with(kind, subtype, &[&id.0[..], &data].concat()))
    };
    Some(match name {
        "Path" => path.with(n8(0)?, n8(1)?, &args.get(2).map_or(Some(vec![]), |t| bytes(t))?),
        "Pci" => path.with(kind::HARDWARE, kind::HW_PCI, &[n8(1)?, n8(0)?]),
        "MemoryMapped" => {
            let d = [&n32(0)?.to_le_bytes()[..], &n(1)?.to_le_bytes(), &n(2)?.to_le_bytes()].concat();
            path.with(kind::HARDWARE, kind::HW_MEMORY_MAPPED, &d)
        }
        "Ctrl" => path.with(kind::HARDWARE, kind::HW_CONTROLLER, &n32(0)?.to_le_bytes()),
        "VenHw" => vendor(path, kind::HARDWARE, kind::HW_VENDOR)?,
        "VenMsg" => vendor(path, kind::MESSAGING, kind::MSG_VENDOR)?,
        "VenMedia" => vendor(path, kind::MEDIA, kind::MEDIA_VENDOR)?,
        "PciRoot" => acpi(path, 0x0a03_41d0, n32(0)?),
        "PcieRoot" => acpi(path, 0x0a08_41d0, n32(0)?),
        "Keyboard" => acpi(path, 0x0303_41d0, n32(0)?),
        "Serial" => acpi(path, 0x0501_41d0, n32(0)?),
        "Acpi" => {
            let hid = match args.first()?.strip_prefix("PNP") {
                Some(id) => u32::from_str_radix(id, 16).ok().filter(|_| id.len() == 4)? << 16 | 0x41d0,
                None => n32(0)?,
            };
            acpi(path, hid, n32(1)?)
        }
        "AcpiAdr" => path.with(kind::ACPI, kind::ACPI_ADR, &n32(0)?.to_le_bytes()),
        "Scsi" => path.scsi(n16(0)?, n16(1)?),
        "USB" => path.with(kind::MESSAGING, kind::MSG_USB, &[n8(0)?, n8(1)?]),
        "Sata" => {
            let words = [n16(0)?, n16(1)?, n16(2)?].map(u16::to_le_bytes);
            path.with(kind::MESSAGING, kind::MSG_SATA, &words.concat())
        }
        "MAC" => {
            let mut d = bytes(args.first()?)?;
            if d.len() > 32 {
                return None;
            }
            d.resize(32, 0);
            d.push(n8(1)?);
            path.with(kind::MESSAGING, kind::MSG_MAC, &d)
        }
        "Uart" => {
            let parity = "DNEOMS".find(*args.get(2)?).filter(|_| args[2].len() == 1)? as u8;
            let stop = STOP_BITS.iter().position(|s| Some(s) == args.get(3))? as u8;
            let mut d = [&[0; 4][..], &n(0)?.to_le_bytes()].concat();
            d.extend([n8(1)?, parity, stop]);
            path.with(kind::MESSAGING, kind::MSG_UART, &d)
        }
        "HD" => {
            let mut d = n32(0)?.to_le_bytes().to_vec();
            d.extend(n(3)?.to_le_bytes());
            d.extend(n(4)?.to_le_bytes());
            match *args.get(1)? {
                "GPT" => {
                    d.extend(guid_from_text(args.get(2)?)?.0);
                    d.extend([2, 2]);
                }
                "MBR" => {
                    d.extend(n32(2)?.to_le_bytes());
                    d.extend([0; 12]);
                    d.extend([1, 1]);
                }
                _ => return None,
            }
            path.with(kind::MEDIA, kind::MEDIA_HARD_DRIVE, &d)
        }
        "CDROM" => {
            let d = [&n32(0)?.to_le_bytes()[..], &n(1)?.to_le_bytes(), &n(2)?.to_le_bytes()].concat();
            path.with(kind::MEDIA, kind::MEDIA_CDROM, &d)
        }
        "Fv" => path.with(kind::MEDIA, kind::MEDIA_FV, &guid_from_text(args.first()?)?.0),
        "FvFile" => path.with(kind::MEDIA, kind::MEDIA_FV_FILE, &guid_from_text(args.first()?)?.0),
        _ => return None,
    })
}
