//! `viridian vm new`.

use super::set::{self, Settings};
use super::target::absolute;
use crate::failure::{Failure, Outcome, print_json};
use clap::Args as ClapArgs;
use machine::IoLimits;
use std::path::PathBuf;
use vmms::config::{Disk, Drive, Kernel, VmConfig};
use vmms::{Store, size};

/// Arguments.
#[derive(ClapArgs)]
#[command(after_help = "Without a kernel, the machine's UEFI boots from its disks and DVDs, with Secure Boot on.")]
pub struct Args {
    /// The name: free, unique, at most 100 characters
    name: String,
    /// Generation: 2 (UEFI, synthetic devices); 1 is not built yet
    #[arg(long, default_value_t = 2)]
    generation: u32,
    /// Disk image (VHDX, VHD, raw); may be given several times
    #[arg(long, value_name = "FILE")]
    disk: Vec<PathBuf>,
    /// Make a dynamic VHDX of this size in the VM's folder, and add it
    #[arg(long, value_name = "SIZE", value_parser = size::parse, allow_hyphen_values = true)]
    new_disk: Option<u64>,
    /// DVD image; an empty name is an empty drive; may be given several times
    #[arg(long, value_name = "FILE")]
    dvd: Vec<PathBuf>,
    /// Boot this Linux kernel or ELF image directly
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Its initial RAM disk
    #[arg(long, value_name = "FILE", requires = "kernel")]
    initrd: Option<PathBuf>,
    /// Its command line
    #[arg(long, value_name = "TEXT", default_value = "console=ttyS0", requires = "kernel")]
    append: String,
    #[command(flatten)]
    settings: Settings,
    /// Answer in JSON
    #[arg(long)]
    json: bool,
}

/// Carries the command out.
pub fn run(store: &Store, args: Args) -> Outcome {
    let mut config = VmConfig::new(&args.name);
    config.generation = args.generation;
    args.settings.apply(&mut config)?;
    if let Some(kernel) = args.kernel {
        let image = existing(kernel)?;
        let initrd = args.initrd.map(existing).transpose()?;
        config.kernel = Some(Kernel { image, initrd, command_line: args.append });
    }
    let mut lun = 0u8;
    let mut next = || {
        lun += 1;
        (lun <= vmms::config::UNITS).then(|| lun - 1).ok_or_else(|| Failure::usage("more than 64 disks and DVDs"))
    };
    let new_disk_lun = args.new_disk.map(|_| next()).transpose()?;
    for disk in args.disk {
        let image = absolute(disk)?;
        vmms::lifecycle::chain(&image).map_err(Failure::from)?;
        config.disks.push(Disk { controller: 0, lun: next()?, image, limits: IoLimits::default() });
    }
    for dvd in args.dvd {
        let image = if dvd.as_os_str().is_empty() { None } else { Some(absolute(dvd)?) };
        if let Some(image) = &image {
            vmms::lifecycle::chain(image).map_err(Failure::from)?;
        }
        config.drives.push(Drive { controller: 0, lun: next()?, image });
    }
    let vm = store.create(config, |new, last, config| {
        let (Some(bytes), Some(lun)) = (args.new_disk, new_disk_lun) else { return Ok(()) };
        let folder = new.join("disks");
        std::fs::create_dir(&folder).map_err(|source| vmms::Error::Io {
            path: folder.clone(),
            what: "make the folder for disks",
            source,
        })?;
        let options = vhd::CreateOptions::dynamic_vhdx(bytes);
        let image = folder.join("disk0.vhdx");
        vhd::create(&image, &options).map_err(|e| (image.as_path(), e))?;
        // Where it will be when the folder has its name.
        config
            .disks
            .insert(0, Disk { controller: 0, lun, image: last.join("disks/disk0.vhdx"), limits: IoLimits::default() });
        Ok(())
    })?;
    if args.json {
        return print_json(&set::described(&vm)?);
    }
    println!("{}  {}", vm.id(), args.name);
    Ok(())
}

/// An absolute path of a file that can be read.
fn existing(path: PathBuf) -> Result<PathBuf, Failure> {
    let path = absolute(path)?;
    std::fs::File::open(&path).map_err(|e| Failure::usage(format!("{}: {e}", path.display())))?;
    Ok(path)
}
