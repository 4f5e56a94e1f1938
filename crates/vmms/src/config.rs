//! What a VM is: its configuration file, in TOML, for people and programs.

use crate::error::{Error, Result};
use crate::{name, size};
use machine::{BootSource, IoLimits, MachineConfig, StorageUnit, UnitKind};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::path::{Path, PathBuf};
use uuid::Uuid;
use x86::cpuid::CpuModel;

/// Version of the file's form that this program writes, and the only one that it reads.
pub const SCHEMA: u32 = 1;
/// Largest file that is read.
const MOST_BYTES: usize = 1 << 20;
/// Most units: 4 controllers with 64 each.
pub const CONTROLLERS: u32 = 4;
/// Units of a controller.
pub const UNITS: u8 = 64;

/// A VM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// [`SCHEMA`].
    pub schema: u32,
    /// Its identity, which never changes.
    pub id: Uuid,
    /// Its name.
    pub name: String,
    /// 2: UEFI and synthetic devices. (1 is not built yet.)
    #[serde(default = "two")]
    pub generation: u32,
    /// When it was made.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub created: String,
    /// Whatever its owner wants to remember.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub notes: String,
    /// What executes it.
    #[serde(default)]
    pub engine: Engine,
    /// Memory.
    #[serde(default)]
    pub memory: Memory,
    /// Processors.
    #[serde(default)]
    pub processor: Processor,
    /// Firmware.
    #[serde(default)]
    pub firmware: Firmware,
    /// With a kernel, the machine boots it directly, and has no firmware.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<Kernel>,
    /// Disks.
    #[serde(default, rename = "disk", skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<Disk>,
    /// DVD drives.
    #[serde(default, rename = "dvd", skip_serializing_if = "Vec::is_empty")]
    pub drives: Vec<Drive>,
}

fn two() -> u32 {
    2
}

/// What executes a VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Engine {
    /// KVM where the processor has VT-x or AMD-V.
    #[default]
    Auto,
    /// The software processor.
    Soft,
    /// KVM.
    Kvm,
}

/// A size, which the file says as `512M` or `2G`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size(pub u64);

impl Serialize for Size {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.serialize_str(&size::show(self.0))
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        size::parse(&text).map(Self).map_err(|e| serde::de::Error::custom(format!("the size \"{text}\": {e}")))
    }
}

/// Memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Memory {
    /// RAM.
    pub size: Size,
    /// Taken from the host as a whole at the start, not on demand.
    pub reserve: bool,
}

impl Default for Memory {
    fn default() -> Self {
        Self { size: Size(1 << 30), reserve: false }
    }
}

/// Which of the host's processors execute which VP.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Affinity {
    /// A rule.
    Rule(AffinityRule),
    /// These, VP 0 on the first.
    Processors(Vec<usize>),
}

/// A rule for [`Affinity`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AffinityRule {
    /// The host's scheduler decides.
    None,
    /// Each VP on a processor of its own, as far as there are enough.
    OneCorePerVp,
}

/// Processors.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Processor {
    /// Virtual processors.
    pub count: u32,
    /// Model; without one, the newest that the host has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Share of the host's processors against other VMs, 1 to 10000; 100 is usual.
    pub weight: u32,
    /// Most that it uses of its processors, in percent.
    pub cap: u32,
    /// Which of the host's processors.
    pub affinity: Affinity,
}

impl Default for Processor {
    fn default() -> Self {
        Self { count: 1, model: None, weight: 100, cap: 100, affinity: Affinity::Rule(AffinityRule::None) }
    }
}

/// Firmware.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Firmware {
    /// Secure Boot.
    pub secure_boot: bool,
    /// Keys of the first start: `microsoft`, `windows`, `uefi-ca`, `none`, or a file.
    pub template: String,
}

impl Default for Firmware {
    fn default() -> Self {
        Self { secure_boot: true, template: "microsoft".into() }
    }
}

/// What is booted directly.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kernel {
    /// The image.
    pub image: PathBuf,
    /// Initial RAM disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<PathBuf>,
    /// Command line.
    #[serde(default = "console")]
    pub command_line: String,
}

fn console() -> String {
    "console=ttyS0".into()
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// Controller.
    #[serde(default)]
    pub controller: u32,
    /// Unit.
    pub lun: u8,
    /// Image.
    pub image: PathBuf,
    /// Limits, in operations of 8 KiB a second: `minimum` (less is an alert) and `maximum` (enforced).
    #[serde(default, skip_serializing_if = "unlimited")]
    pub limits: IoLimits,
}

fn unlimited(limits: &IoLimits) -> bool {
    *limits == IoLimits::default()
}

/// A DVD drive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Drive {
    /// Controller.
    #[serde(default)]
    pub controller: u32,
    /// Unit.
    pub lun: u8,
    /// The disc.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<PathBuf>,
}

/// What is wrong, and with which key.
type Wrong = (&'static str, String);

impl VmConfig {
    /// A VM with the usual values.
    pub fn new(name: &str) -> Self {
        Self {
            schema: SCHEMA,
            id: Uuid::new_v4(),
            name: name.into(),
            generation: 2,
            created: crate::time::now(),
            notes: String::new(),
            engine: Engine::default(),
            memory: Memory::default(),
            processor: Processor::default(),
            firmware: Firmware::default(),
            kernel: None,
            disks: Vec::new(),
            drives: Vec::new(),
        }
    }

    /// Reads a file's text.
    ///
    /// # Errors
    /// [`Error::Damaged`] with the line.
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<Self> {
        let damaged = |line, reason: String| Error::Damaged { path: path.into(), line, reason };
        if bytes.len() > MOST_BYTES {
            return Err(damaged(0, format!("{} bytes are no configuration", bytes.len())));
        }
        let text = std::str::from_utf8(bytes).map_err(|e| {
            damaged(1 + bytes[..e.valid_up_to()].iter().filter(|b| **b == b'\n').count(), "not UTF-8 text".into())
        })?;
        if text.trim_matches(['\0', ' ', '\n']).is_empty() {
            return Err(damaged(1, "the file is empty".into()));
        }
        // A newer form is said to be one, whatever else this program does not understand in it.
        if let Ok(Versioned { schema }) = toml::from_str(text)
            && schema != SCHEMA
        {
            let reason = format!("schema {schema} is of another Viridian; this one reads schema {SCHEMA}");
            return Err(damaged(line_of(text, "schema"), reason));
        }
        let config: Self = toml::from_str(text).map_err(|e| {
            let at = e.span().map_or(0, |s| s.start).min(text.len());
            damaged(1 + text.as_bytes()[..at].iter().filter(|b| **b == b'\n').count(), e.message().replace('\n', " "))
        })?;
        config.wrong().map_err(|(key, reason)| damaged(line_of(text, key), reason))?;
        Ok(config)
    }

    /// The file's text.
    ///
    /// # Errors
    /// When a path is not text.
    pub fn text(&self) -> Result<String> {
        let body = toml::to_string(self).map_err(|e| Error::Config(format!("this cannot be written as TOML: {e}")))?;
        Ok(format!(
            "# A virtual machine of Viridian. Edit it while the machine is off; `viridian vm show` checks it.\n{body}"
        ))
    }

    /// Checks what the form cannot say.
    ///
    /// # Errors
    /// [`Error::Config`] or [`Error::BadName`].
    pub fn check(&self) -> Result<()> {
        name::check(&self.name)?;
        self.wrong().map_err(|(_, reason)| Error::Config(reason))
    }

    fn wrong(&self) -> std::result::Result<(), Wrong> {
        name::check(&self.name).map_err(|e| ("name", e.to_string()))?;
        match self.generation {
            2 => {}
            1 => return Err(("generation", "generation 1 machines are not built yet: use generation 2".into())),
            n => return Err(("generation", format!("there is no generation {n}: use 2"))),
        }
        let bytes = self.memory.size.0;
        size::memory(&size::show(bytes))
            .map_err(|e| ("memory.size", format!("memory of {}: {e}", size::show(bytes))))?;
        let p = &self.processor;
        if !(1..=partition::engine::MAX_VPS).contains(&p.count) {
            return Err(("processor.count", format!("{} processors: from 1 to 64 are possible", p.count)));
        }
        if let Some(model) = &p.model
            && !CpuModel::NAMES.contains(&model.as_str())
        {
            let names = CpuModel::NAMES.join(", ");
            return Err(("processor.model", format!("there is no processor model '{model}': {names}")));
        }
        if !(1..=10_000).contains(&p.weight) {
            return Err(("processor.weight", format!("a processor weight of {}: from 1 to 10000", p.weight)));
        }
        if !(1..=100).contains(&p.cap) {
            return Err(("processor.cap", format!("a processor cap of {} %: from 1 to 100", p.cap)));
        }
        match &p.affinity {
            Affinity::Rule(_) => {}
            Affinity::Processors(list) if list.is_empty() => {
                return Err(("processor.affinity", "an empty list of processors: name some, or \"none\"".into()));
            }
            Affinity::Processors(list) => {
                if let Some(number) = list.iter().find(|n| **n >= 1024) {
                    return Err(("processor.affinity", format!("the host has no processor {number}")));
                }
            }
        }
        let template: std::result::Result<bios::templates::Template, _> = self.firmware.template.parse();
        template.map_err(|e| ("firmware.template", e.to_string()))?;
        let mut taken = Vec::new();
        for unit in self.storage() {
            let place = (unit.controller, unit.lun);
            if unit.controller >= CONTROLLERS || unit.lun >= UNITS {
                let reason = format!(
                    "controller {}, unit {}: there are controllers 0 to 3 with units 0 to 63",
                    place.0, place.1
                );
                return Err(("disk", reason));
            }
            if taken.contains(&place) {
                return Err(("disk", format!("unit {} of controller {} is there twice", place.1, place.0)));
            }
            taken.push(place);
        }
        Ok(())
    }

    /// Disks and drives as the machine wants them.
    pub fn storage(&self) -> Vec<StorageUnit> {
        let disk = |d: &Disk| StorageUnit {
            controller: d.controller,
            lun: d.lun,
            kind: UnitKind::Disk,
            image: Some(d.image.clone()),
            limits: d.limits,
        };
        let drive = |d: &Drive| StorageUnit {
            controller: d.controller,
            lun: d.lun,
            kind: UnitKind::Dvd,
            image: d.image.clone(),
            limits: IoLimits::default(),
        };
        self.disks.iter().map(disk).chain(self.drives.iter().map(drive)).collect()
    }

    /// The first free unit of a controller.
    pub fn free_unit(&self, controller: u32) -> Option<u8> {
        let units = self.storage();
        (0..UNITS).find(|lun| !units.iter().any(|u| u.controller == controller && u.lun == *lun))
    }

    /// The machine that this describes.
    pub fn machine(&self) -> MachineConfig {
        MachineConfig {
            memory_bytes: self.memory.size.0,
            processors: self.processor.count,
            cpu_model: self.processor.model.clone().unwrap_or_else(default_model),
            hyperv: true,
            boot: match &self.kernel {
                Some(k) => BootSource::Kernel {
                    kernel: k.image.clone(),
                    initrd: k.initrd.clone(),
                    command_line: k.command_line.clone(),
                },
                None => BootSource::Firmware {
                    name: self.name.clone(),
                    pause_after_failure: false,
                    first: None,
                    image: None,
                },
            },
            storage: self.storage(),
        }
    }
}

#[derive(Deserialize)]
struct Versioned {
    schema: u32,
}

/// The newest processor model that this host has.
pub fn default_model() -> String {
    let newest = "x86-64-v3";
    if CpuModel::by_name(newest).is_ok() { newest } else { "x86-64-v2" }.into()
}

/// The line on which a key (`name`, `processor.count`) stands; 1 if it does not.
fn line_of(text: &str, key: &str) -> usize {
    let (section, key) = key.rsplit_once('.').unwrap_or(("", key));
    let mut current = "";
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if let Some(name) = line.strip_prefix('[') {
            current = name.trim_matches(['[', ']']);
            if section.is_empty() && current == key {
                return number + 1;
            }
        } else if current == section && line.split('=').next().is_some_and(|k| k.trim() == key) {
            return number + 1;
        }
    }
    1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<VmConfig> {
        VmConfig::parse(Path::new("/x/config.toml"), text.as_bytes())
    }

    const LEAST: &str = "schema = 1\nid = \"6a8b4f60-4c0e-4f3c-8f7e-0d6c1d0a7a11\"\nname = \"a\"\n";

    #[test]
    fn round_trip_and_defaults() {
        let mut config = VmConfig::new("Müller \"1\"");
        config.disks.push(Disk { controller: 0, lun: 0, image: "/a b.vhdx".into(), limits: IoLimits::default() });
        config.drives.push(Drive { controller: 3, lun: 63, image: None });
        config.processor.affinity = Affinity::Processors(vec![1, 0]);
        config.kernel = Some(Kernel { image: "/k".into(), initrd: None, command_line: "x=\"y\"".into() });
        config.notes = "two\nlines".into();
        assert_eq!(parse(&config.text().unwrap()).unwrap(), config);
        let least = parse(LEAST).unwrap();
        assert_eq!((least.memory.size.0, least.processor.count, least.firmware.secure_boot), (1 << 30, 1, true));
        assert_eq!(config.free_unit(0), Some(1));
    }

    #[test]
    fn damage_has_a_line_and_a_reason() {
        for (extra, line, word) in [
            ("[memory]\nsize = \"1.5G\"\n", 5, "whole number"),
            ("[memory]\nsize = \"0\"\n", 5, "2M"),
            ("[memory]\nsize = 5\n", 5, "string"),
            ("[processor]\ncount = 65\n", 5, "64"),
            ("[processor]\ncount = -1\n", 5, "-1"),
            ("[processor]\nmodel = \"486\"\n", 5, "486"),
            ("[processor]\n\ncap = 101\n", 6, "cap"),
            ("[[disk]]\nlun = 64\nimage = \"/x\"\n", 4, "63"),
            ("[[disk]]\nlun = 1\n", 4, "image"),
            ("[[disk]]\nlun = 1\nimage = \"/x\"\n[[dvd]]\nlun = 1\n", 4, "twice"),
            ("colour = \"red\"\n", 4, "colour"),
            ("generation = 1\n", 4, "generation 1"),
            ("[firmware]\ntemplate = \"mine\"\n", 5, "mine"),
            ("broken", 4, ""),
        ] {
            let error = parse(&format!("{LEAST}{extra}")).unwrap_err();
            let Error::Damaged { line: found, reason, .. } = &error else { panic!("{error}") };
            assert_eq!(*found, line, "{extra}: {error}");
            assert!(reason.contains(word) && !reason.contains('\n'), "{error}");
        }
        let newer = parse("schema = 2\ncolour = \"red\"\n").unwrap_err().to_string();
        assert!(newer.contains("schema 2"), "{newer}");
        for bad in ["", "\0\0\0\0", "schema = 1\n"] {
            assert!(parse(bad).is_err());
        }
        assert!(VmConfig::parse(Path::new("x"), b"schema = 1\n\xff").unwrap_err().to_string().starts_with("x:2:"));
    }
}
