//! Changing a VM's configuration: `vm set`, and the parts of it as nouns of their own (`vm processor set`, ...).

use super::target::absolute;
use crate::failure::{Failure, Outcome, print_json};
use crate::options::{EngineArg, OnOff};
use crate::table;
use bios::templates::Template;
use clap::{Args as ClapArgs, Subcommand};
use std::path::PathBuf;
use vmms::config::{Affinity, AffinityRule, Kernel, Size, VmConfig};
use vmms::{Store, Vm, size};

/// What may be set at the start of a VM's life, and later.
#[derive(ClapArgs, Default)]
pub struct Settings {
    #[command(flatten)]
    memory: MemorySettings,
    #[command(flatten)]
    processor: ProcessorSettings,
    #[command(flatten)]
    firmware: FirmwareSettings,
    /// What executes the VM; auto is KVM where the processor has VT-x or AMD-V
    #[arg(long, value_enum, value_name = "NAME")]
    engine: Option<EngineArg>,
    /// Whatever you want to remember of it
    #[arg(long, value_name = "TEXT")]
    notes: Option<String>,
}

#[derive(ClapArgs, Default)]
pub struct MemorySettings {
    /// RAM: a number with M or G (without a letter: MiB)
    #[arg(long, value_name = "SIZE", value_parser = size::memory, allow_hyphen_values = true)]
    memory: Option<u64>,
    /// Take all memory from the host at the start, or on demand
    #[arg(long, value_enum, value_name = "on|off")]
    reserve_memory: Option<OnOff>,
}

#[derive(ClapArgs, Default)]
pub struct ProcessorSettings {
    /// Number of virtual processors, 1 to 64
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = clap::value_parser!(u32).range(1..=64))]
    processors: Option<u32>,
    /// Processor model: x86-64-v2, x86-64-v3, host, or `default` for the newest that the host has
    #[arg(long, value_name = "NAME")]
    cpu_model: Option<String>,
    /// Share of the host's processors against other VMs, 1 to 10000; 100 is usual
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    cpu_weight: Option<u32>,
    /// Most that the VM uses of its processors, in percent
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u32).range(1..=100))]
    cpu_cap: Option<u32>,
    /// The host's processors: none (the scheduler decides), one-core-per-vp, or a list such as 0,2
    #[arg(long, value_name = "RULE")]
    affinity: Option<String>,
}

#[derive(ClapArgs, Default)]
pub struct FirmwareSettings {
    /// Secure Boot
    #[arg(long, value_enum, value_name = "on|off")]
    secure_boot: Option<OnOff>,
    /// Keys of the first start: microsoft, windows, uefi-ca, none, or a file of PEM certificates
    #[arg(long, value_name = "NAME")]
    secure_boot_template: Option<Template>,
}

impl Settings {
    /// Puts what was given into a configuration.
    pub fn apply(&self, config: &mut VmConfig) -> Result<(), Failure> {
        self.memory.apply(config);
        self.processor.apply(config)?;
        self.firmware.apply(config)?;
        if let Some(engine) = self.engine {
            config.engine = engine.into();
        }
        if let Some(notes) = &self.notes {
            config.notes.clone_from(notes);
        }
        Ok(())
    }

    /// Was something given that a running machine cannot take?
    fn needs_off(&self) -> bool {
        self.memory.memory.is_some()
            || self.memory.reserve_memory.is_some()
            || self.processor.is_some()
            || self.firmware.secure_boot.is_some()
            || self.firmware.secure_boot_template.is_some()
            || self.engine.is_some()
    }
}

impl MemorySettings {
    fn apply(&self, config: &mut VmConfig) {
        if let Some(bytes) = self.memory {
            config.memory.size = Size(bytes);
        }
        if let Some(reserve) = self.reserve_memory {
            config.memory.reserve = reserve.is_on();
        }
    }
}

impl ProcessorSettings {
    fn is_some(&self) -> bool {
        let numbers = [self.processors, self.cpu_weight, self.cpu_cap];
        numbers.iter().any(Option::is_some) || self.cpu_model.is_some() || self.affinity.is_some()
    }

    fn apply(&self, config: &mut VmConfig) -> Result<(), Failure> {
        let p = &mut config.processor;
        p.count = self.processors.unwrap_or(p.count);
        p.weight = self.cpu_weight.unwrap_or(p.weight);
        p.cap = self.cpu_cap.unwrap_or(p.cap);
        match self.cpu_model.as_deref() {
            Some("default") => p.model = None,
            Some(name) => p.model = Some(name.into()),
            None => {}
        }
        match self.affinity.as_deref() {
            Some("none") => p.affinity = Affinity::Rule(AffinityRule::None),
            Some("one-core-per-vp") => p.affinity = Affinity::Rule(AffinityRule::OneCorePerVp),
            Some(list) => {
                let numbers: Result<Vec<usize>, _> = list.split(',').map(|n| n.trim().parse()).collect();
                let bad =
                    |_| Failure::usage(format!("'{list}': expected none, one-core-per-vp, or numbers such as 0,2"));
                p.affinity = Affinity::Processors(numbers.map_err(bad)?);
            }
            None => {}
        }
        Ok(())
    }
}

impl FirmwareSettings {
    fn apply(&self, config: &mut VmConfig) -> Result<(), Failure> {
        if let Some(on) = self.secure_boot {
            config.firmware.secure_boot = on.is_on();
        }
        if let Some(template) = &self.secure_boot_template {
            config.firmware.template = match template {
                Template::File(path) => absolute(path.clone())?.display().to_string(),
                named => named.to_string(),
            };
        }
        Ok(())
    }
}

/// Arguments of `vm set`.
#[derive(ClapArgs)]
pub struct Args {
    /// The VM
    name: String,
    #[command(flatten)]
    settings: Settings,
    /// Boot this kernel directly; an empty name: boot with the firmware
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Its initial RAM disk; an empty name: none
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// Its command line
    #[arg(long, value_name = "TEXT")]
    append: Option<String>,
}

/// `vm set`.
pub fn run(store: &Store, args: Args) -> Outcome {
    let vm = store.find(&args.name)?;
    let boot = args.kernel.is_some() || args.initrd.is_some() || args.append.is_some();
    if !boot && !args.settings.needs_off() && args.settings.notes.is_none() {
        return Err(Failure::usage("nothing to set: `viridian vm set --help` lists what there is"));
    }
    change(&vm, boot || args.settings.needs_off(), |config| {
        args.settings.apply(config)?;
        let empty = |path: &PathBuf| path.as_os_str().is_empty();
        match &args.kernel {
            Some(path) if empty(path) => config.kernel = None,
            Some(path) => {
                let image = absolute(path.clone())?;
                let (initrd, command_line) = match config.kernel.take() {
                    Some(old) => (old.initrd, old.command_line),
                    None => (None, "console=ttyS0".into()),
                };
                config.kernel = Some(Kernel { image, initrd, command_line });
            }
            None => {}
        }
        if args.initrd.is_some() || args.append.is_some() {
            let none = || Failure::usage("--initrd and --append are of a VM that boots a kernel directly (--kernel)");
            let kernel = config.kernel.as_mut().ok_or_else(none)?;
            match &args.initrd {
                Some(path) if empty(path) => kernel.initrd = None,
                Some(path) => kernel.initrd = Some(absolute(path.clone())?),
                None => {}
            }
            if let Some(append) = &args.append {
                kernel.command_line.clone_from(append);
            }
        }
        Ok(())
    })
}

/// Changes a configuration, while the VM is off if it must be.
fn change(vm: &Vm, off: bool, change: impl FnOnce(&mut VmConfig) -> Result<(), Failure>) -> Outcome {
    if off {
        vm.must_be_off("this can be changed")?;
    }
    let mut refused = None;
    let result = vm.change(|config| {
        change(config).map_err(|failure| {
            let message = failure.message.clone();
            refused = Some(failure);
            vmms::Error::Config(message)
        })
    });
    match (result, refused) {
        (_, Some(failure)) => Err(failure),
        (Ok(_), None) => {
            vm.events().note("changed", "its configuration was changed");
            Ok(())
        }
        (Err(error), None) => Err(error.into()),
    }
}

/// A VM for programs: its configuration, id and folder.
pub fn described(vm: &Vm) -> Result<serde_json::Value, Failure> {
    let config = vm.load()?;
    let mut value = serde_json::to_value(&config).map_err(|e| Failure::host(e.to_string()))?;
    if let Some(fields) = value.as_object_mut() {
        fields.insert("folder".into(), vm.folder().display().to_string().into());
        // Programs count in bytes.
        fields.insert("memory_bytes".into(), config.memory.size.0.into());
    }
    Ok(value)
}

/// `vm firmware`.
#[derive(Subcommand)]
pub enum FirmwareCommand {
    /// Show the firmware's settings
    Show(PartArgs),
    /// Change them
    Set {
        /// The VM
        name: String,
        #[command(flatten)]
        settings: FirmwareSettings,
        /// Forget all variables (boot entries, keys): the next start makes them anew from the template
        #[arg(long)]
        reset_variables: bool,
    },
}

/// `vm processor`.
#[derive(Subcommand)]
pub enum ProcessorCommand {
    /// Show the virtual processors
    Show(PartArgs),
    /// Change them
    Set {
        /// The VM
        name: String,
        #[command(flatten)]
        settings: ProcessorSettings,
    },
}

/// `vm memory`.
#[derive(Subcommand)]
pub enum MemoryCommand {
    /// Show the memory
    Show(PartArgs),
    /// Change it
    Set {
        /// The VM
        name: String,
        #[command(flatten)]
        settings: MemorySettings,
    },
}

/// Arguments of the `show` commands.
#[derive(ClapArgs)]
pub struct PartArgs {
    /// The VM
    name: String,
    /// Answer in JSON
    #[arg(long)]
    json: bool,
}

fn show_part(
    store: &Store,
    args: &PartArgs,
    json: impl FnOnce(&VmConfig) -> serde_json::Value,
    pairs: impl FnOnce(&Vm, &VmConfig) -> Vec<(String, String)>,
) -> Outcome {
    let vm = store.find(&args.name)?;
    let config = vm.load()?;
    if args.json {
        return print_json(&json(&config));
    }
    table::print_pairs(&pairs(&vm, &config));
    Ok(())
}

/// Names and values of the firmware.
pub fn firmware_pairs(vm: &Vm, config: &VmConfig) -> Vec<(String, String)> {
    if config.kernel.is_some() {
        return vec![("Firmware".into(), "none: the machine boots a kernel directly".into())];
    }
    let variables = match std::fs::metadata(vm.variables_path()) {
        Ok(m) => format!("{} bytes", m.len()),
        Err(_) => "none yet: the first start makes them from the template".into(),
    };
    vec![
        ("Secure Boot".into(), if config.firmware.secure_boot { "on" } else { "off" }.into()),
        ("Template".into(), config.firmware.template.clone()),
        ("Variables".into(), variables),
    ]
}

/// Names and values of the processors.
pub fn processor_pairs(config: &VmConfig) -> Vec<(String, String)> {
    let p = &config.processor;
    let affinity = match &p.affinity {
        Affinity::Rule(AffinityRule::None) => "none".into(),
        Affinity::Rule(AffinityRule::OneCorePerVp) => "one-core-per-vp".into(),
        Affinity::Processors(list) => list.iter().map(ToString::to_string).collect::<Vec<_>>().join(","),
    };
    let model = p.model.clone().unwrap_or_else(|| format!("default ({})", vmms::config::default_model()));
    vec![
        ("Processors".into(), p.count.to_string()),
        ("Processor model".into(), model),
        ("Weight".into(), p.weight.to_string()),
        ("Cap".into(), format!("{} %", p.cap)),
        ("Affinity".into(), affinity),
    ]
}

/// Names and values of the memory.
pub fn memory_pairs(config: &VmConfig) -> Vec<(String, String)> {
    let reserve = if config.memory.reserve { "reserved at the start" } else { "taken on demand" };
    vec![("Memory".into(), format!("{}, {reserve}", size::show(config.memory.size.0)))]
}

/// `vm firmware`.
pub fn firmware(store: &Store, command: FirmwareCommand) -> Outcome {
    match command {
        FirmwareCommand::Show(args) => show_part(store, &args, |c| serde_json::json!(c.firmware), firmware_pairs),
        FirmwareCommand::Set { name, settings, reset_variables } => {
            let nothing = settings.secure_boot.is_none() && settings.secure_boot_template.is_none();
            if nothing && !reset_variables {
                return Err(Failure::usage("nothing to set: --secure-boot, --secure-boot-template, --reset-variables"));
            }
            let vm = store.find(&name)?;
            change(&vm, true, |config| settings.apply(config))?;
            if reset_variables {
                let path = vm.variables_path();
                match std::fs::remove_file(&path) {
                    Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                        return Err(Failure::host(format!("{}: {e}", path.display())));
                    }
                    _ => vm.events().note("changed", "the firmware's variables were thrown away"),
                }
            } else if settings.secure_boot_template.is_some() && vm.variables_path().exists() {
                eprintln!(
                    "note: the keys of '{name}' were made at its first start and stay; --reset-variables makes new ones"
                );
            }
            Ok(())
        }
    }
}

/// `vm processor`.
pub fn processor(store: &Store, command: ProcessorCommand) -> Outcome {
    match command {
        ProcessorCommand::Show(args) => {
            show_part(store, &args, |c| serde_json::json!(c.processor), |_, c| processor_pairs(c))
        }
        ProcessorCommand::Set { name, settings } => {
            if !settings.is_some() {
                return Err(Failure::usage("nothing to set: `viridian vm processor set --help` lists what there is"));
            }
            change(&store.find(&name)?, true, |config| settings.apply(config))
        }
    }
}

/// `vm memory`.
pub fn memory(store: &Store, command: MemoryCommand) -> Outcome {
    match command {
        MemoryCommand::Show(args) => show_part(store, &args, |c| serde_json::json!(c.memory), |_, c| memory_pairs(c)),
        MemoryCommand::Set { name, settings } => {
            if settings.memory.is_none() && settings.reserve_memory.is_none() {
                return Err(Failure::usage("nothing to set: --memory, --reserve-memory"));
            }
            change(&store.find(&name)?, true, |config| {
                settings.apply(config);
                Ok(())
            })
        }
    }
}
