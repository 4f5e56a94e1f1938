//! The boot manager (UEFI 2.10, chapter 3): boot options in their order, one attempt each with a reason if it fails, the
//! removable-media path, and the screen that says what was tried.

use crate::config::{self, flags};
use crate::image::{self, take_refusal};
use crate::runtime::{get_variable, set_variable, variable_names};
use crate::{console, disk, event, fs, log, print, tables};
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use r_efi::efi::{self, Status};
use uefi_core::bytes::{u16_at, u32_at};
use uefi_core::devpath::{DevicePath, text};
use uefi_core::guid::GLOBAL_VARIABLE;

const NV_BS_RT: u32 = 7;
const BS_RT: u32 = 6;
/// `LOAD_OPTION_ACTIVE`.
const ACTIVE: u32 = 1;
const DEFAULT_FILE: &str = "\\EFI\\BOOT\\BOOTX64.EFI";

/// A boot option (`EFI_LOAD_OPTION`).
struct BootOption {
    number: Option<u16>,
    attributes: u32,
    description: String,
    path: DevicePath,
    data: Vec<u8>,
}

impl BootOption {
    fn parse(number: u16, d: &[u8]) -> Option<Self> {
        let attributes = u32_at(d, 0)?;
        let path_len = usize::from(u16_at(d, 4)?);
        let units: Vec<u16> =
            d[6..].chunks_exact(2).map(|c| u16::from_le_bytes([c[0], c[1]])).take_while(|u| *u != 0).collect();
        let at = 6 + (units.len() + 1) * 2;
        let (path, _) = DevicePath::parse(d.get(at..at + path_len)?)?;
        Some(Self {
            number: Some(number),
            attributes,
            description: String::from_utf16_lossy(&units),
            path,
            data: d[at + path_len..].to_vec(),
        })
    }
}

/// What came of an attempt.
struct Attempt {
    what: String,
    why: String,
}

fn option_name(number: u16) -> String {
    format!("Boot{number:04X}")
}

fn load_option(number: u16) -> Option<BootOption> {
    BootOption::parse(number, &get_variable(&option_name(number), &GLOBAL_VARIABLE)?)
}

fn numbers(variable: &str) -> Vec<u16> {
    let d = get_variable(variable, &GLOBAL_VARIABLE).unwrap_or_default();
    d.chunks_exact(2).map(|c| u16::from_le_bytes([c[0], c[1]])).collect()
}

/// Runs the boot manager; never returns.
pub fn run() -> ! {
    loop {
        let mut attempts = Vec::new();
        for option in first_options() {
            attempt(&option, &mut attempts);
        }
        if let Some(next) = numbers("BootNext").first() {
            let _ = set_variable("BootNext", &GLOBAL_VARIABLE, NV_BS_RT, &[]);
            if let Some(option) = load_option(*next) {
                attempt(&option, &mut attempts);
            }
        }
        for number in numbers("BootOrder") {
            match load_option(number) {
                Some(option) if option.attributes & ACTIVE != 0 => attempt(&option, &mut attempts),
                Some(_) => {}
                None => attempts.push(Attempt {
                    what: option_name(number),
                    why: "the boot option does not exist or is damaged".to_string(),
                }),
            }
        }
        // Then everything that could be booted by the removable-media path.
        for option in default_options() {
            attempt(&option, &mut attempts);
        }
        failed(&attempts);
    }
}

/// What the host wants tried before everything else: disks, DVDs, or one file wherever it is.
fn first_options() -> Vec<BootOption> {
    match config::text(config::kind::BOOT_FIRST).as_deref() {
        None => Vec::new(),
        Some("disk") => on_media(|d| !d.removable, DEFAULT_FILE),
        Some("dvd") => on_media(|d| d.removable, DEFAULT_FILE),
        Some(path) => on_media(|_| true, path),
    }
}

/// The removable-media path on every medium: disks in the order of the host, then DVDs.
fn default_options() -> Vec<BootOption> {
    on_media(|_| true, DEFAULT_FILE)
}

fn on_media(wanted: impl Fn(&disk::Found) -> bool, file: &str) -> Vec<BootOption> {
    disk::found(|all| {
        let mut list: Vec<&disk::Found> = all
            .iter()
            .filter(|d| crate::handle::get(d.handle, &fs::SIMPLE_FILE_SYSTEM).is_ok())
            .filter(|d| wanted(d))
            .collect();
        list.sort_by_key(|d| d.removable);
        list.iter()
            .map(|d| BootOption {
                number: None,
                attributes: ACTIVE,
                description: String::from(if d.removable { "DVD" } else { "Disk" }),
                path: d.path.clone().file(file),
                data: Vec::new(),
            })
            .collect()
    })
}

/// Full paths for an option's path: itself, or what its short form means on this machine.
fn expand(path: &DevicePath) -> Vec<DevicePath> {
    let first = path.iter().next().map(|n| n.kind);
    let with_default = |p: DevicePath| if p.file_path().is_some() { p } else { p.file(DEFAULT_FILE) };
    disk::found(|all| match first {
        // HD(...): the partition wherever it is.
        Some((4, 1)) => all
            .iter()
            .filter(|d| d.partition.is_some_and(|p| path.starts_with_partition(&p)))
            .map(|d| with_default(d.path.clone().join(&path.tail())))
            .collect(),
        // A file without a device: on every file system.
        Some((4, 4)) => all.iter().map(|d| d.path.clone().join(path)).collect(),
        _ => {
            // A whole device: the removable-media path on its file systems.
            let under: Vec<DevicePath> = all
                .iter()
                .filter(|d| path.file_path().is_none() && d.path.strip_prefix(path).is_some())
                .filter(|d| crate::handle::get(d.handle, &fs::SIMPLE_FILE_SYSTEM).is_ok())
                .map(|d| d.path.clone().file(DEFAULT_FILE))
                .collect();
            if under.is_empty() { [path.clone()].to_vec() } else { under }
        }
    })
}

fn attempt(option: &BootOption, attempts: &mut Vec<Attempt>) {
    let paths = expand(&option.path);
    let label = match option.number {
        Some(n) => format!("{} \"{}\"", option_name(n), option.description),
        None => format!("{} {}", option.description, text::to_text(&option.path)),
    };
    if paths.is_empty() {
        attempts.push(Attempt { what: label.clone(), why: "its disk or partition is not there".to_string() });
    }
    for path in paths {
        if let Some(why) = boot(option, &path) {
            log!("boot: {label}: {why}");
            attempts.push(Attempt { what: label.clone(), why });
        }
    }
}

/// Boots a path; returns why it failed (or `None` if it was not there and need not be told).
fn boot(option: &BootOption, path: &DevicePath) -> Option<String> {
    let current = option.number.unwrap_or(0xffff);
    let _ = set_variable("BootCurrent", &GLOBAL_VARIABLE, BS_RT, &current.to_le_bytes());
    take_refusal();
    let bytes = match image::read_path(path, true) {
        Ok(b) => b,
        Err(Status::NOT_FOUND) if option.number.is_none() => return None,
        Err(Status::NOT_FOUND) => return Some(format!("{} is not there", text::to_text(path))),
        Err(s) => return Some(format!("{} cannot be read ({:#x})", text::to_text(path), s.as_usize())),
    };
    let (status, handle) = image::load(image::firmware(), Some(path), &bytes);
    let name = path.file_path().unwrap_or_else(|| text::to_text(path));
    if status == Status::SECURITY_VIOLATION {
        if let Some(h) = handle {
            // SAFETY: the image was just loaded and never started.
            unsafe { image::unload_image(h) };
        }
        let why = take_refusal().map(|(_, why)| why.to_string()).unwrap_or_default();
        let line = format!("Secure Boot refused {name}: {why}");
        print!("{line}\n");
        return Some(line);
    }
    let Some(h) = handle else { return Some(format!("{name} is not an image for this machine")) };
    image::set_options(h, &option.data);
    event::signal_group(event::GROUP_READY_TO_BOOT);
    log!("boot: starting {}", text::to_text(path));
    // An operating system that hangs in its loader is reset after five minutes (UEFI 2.10, section 3.1.2).
    crate::misc::watchdog(300);
    let (mut size, mut data) = (0, core::ptr::null_mut());
    // SAFETY: the image was just loaded; the pointers are to locals.
    let status = unsafe { image::start_image(h, &mut size, &mut data) };
    crate::misc::watchdog(0);
    let said = if data.is_null() { None } else { crate::misc::string(data) };
    Some(match (status, said) {
        (Status::SUCCESS, _) => format!("{name} ended without booting"),
        (s, Some(text)) => format!("{name} ended with status {:#x}: {text}", s.as_usize()),
        (s, None) => format!("{name} ended with status {:#x}", s.as_usize()),
    })
}

/// Says what was tried, and waits or powers off.
fn failed(attempts: &[Attempt]) {
    console::output::clear();
    let name = config::text(config::kind::NAME).unwrap_or_else(|| String::from("This virtual machine"));
    print!("{name} could not boot an operating system.\n\n");
    if attempts.is_empty() {
        print!("There is nothing to boot: no disk or DVD with a boot loader was found.\n");
    }
    for (i, a) in attempts.iter().enumerate() {
        print!("{:2}. {}\n    {}\n", i + 1, a.what, a.why);
    }
    let secure = get_variable("SecureBoot", &GLOBAL_VARIABLE).is_some_and(|v| v == [1]);
    let options = variable_names(&GLOBAL_VARIABLE).iter().filter(|n| is_option(n)).count();
    print!("\nSecure Boot is {}. {options} boot option(s) are stored.\n", if secure { "on" } else { "off" });
    if config::flags() & flags::PAUSE_AFTER_BOOT_FAILURE == 0 {
        log!("boot: nothing could be booted; powering off");
        crate::runtime::reset(efi::RESET_SHUTDOWN);
    }
    log!("boot: nothing could be booted; waiting for a key");
    print!("Press any key to try again.\n");
    while console::input::next().is_none() {
        crate::arch::wait();
    }
    tables::seal();
}

fn is_option(name: &str) -> bool {
    name.len() == 8 && name.starts_with("Boot") && name[4..].bytes().all(|b| b.is_ascii_hexdigit())
}
