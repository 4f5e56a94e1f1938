//! Kernel modules: which file a name stands for, what it depends on, and its contents decompressed.
//!
//! Debian's packages carry no `modules.dep` (the host's `depmod` makes it at installation), so dependencies are read
//! where `depmod` would find most of them: the `depends=` line in each module's `.modinfo` section.

use anyhow::{Context, Result, bail};
use object::{Object, ObjectSection};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Cursor;
use std::path::{Path, PathBuf};

/// The modules of one kernel.
pub struct Modules {
    /// Canonical name (with `_`) to file.
    files: BTreeMap<String, PathBuf>,
    builtin: BTreeSet<String>,
}

/// A module ready to be loaded.
pub struct Module {
    /// File name without path and compression, as `hv_vmbus.ko`.
    pub file_name: String,
    /// The ELF file.
    pub data: Vec<u8>,
}

impl Modules {
    /// Reads the folder `modules/` of a kernel.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn open(dir: &Path) -> Result<Self> {
        let mut files = BTreeMap::new();
        let mut folders = vec![dir.join("kernel")];
        while let Some(folder) = folders.pop() {
            let entries = fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))?;
            for entry in entries {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    folders.push(entry.path());
                } else if let Some(name) = module_name(&entry.path()) {
                    files.insert(name, entry.path());
                }
            }
        }
        let builtin = fs::read_to_string(dir.join("modules.builtin"))
            .unwrap_or_default()
            .lines()
            .filter_map(|l| module_name(Path::new(l)))
            .collect();
        Ok(Self { files, builtin })
    }

    /// The named modules and what they need, each after what it depends on. Modules that are built into the kernel
    /// are left out.
    ///
    /// # Errors
    /// When the kernel has no such module, or a file is damaged.
    pub fn closure(&self, names: &[String]) -> Result<Vec<Module>> {
        let mut loaded = Vec::new();
        let mut seen = BTreeSet::new();
        for name in names {
            self.visit(&canonical(name), &mut seen, &mut loaded)?;
        }
        Ok(loaded)
    }

    fn visit(&self, name: &str, seen: &mut BTreeSet<String>, loaded: &mut Vec<Module>) -> Result<()> {
        if !seen.insert(name.to_owned()) || self.builtin.contains(name) {
            return Ok(());
        }
        let Some(file) = self.files.get(name) else { bail!("this kernel has no module {name}") };
        let data = decompressed(file)?;
        for dependency in depends(&data).with_context(|| format!("damaged module {}", file.display()))? {
            self.visit(&dependency, seen, loaded)?;
        }
        let file_name = format!("{name}.ko");
        loaded.push(Module { file_name, data });
        Ok(())
    }
}

fn canonical(name: &str) -> String {
    name.replace('-', "_")
}

fn module_name(path: &Path) -> Option<String> {
    let name = path.file_name()?.to_str()?;
    let (stem, rest) = name.split_once(".ko")?;
    matches!(rest, "" | ".xz" | ".zst" | ".gz").then(|| canonical(stem))
}

fn decompressed(file: &Path) -> Result<Vec<u8>> {
    let raw = fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
    let mut data = Vec::new();
    match file.extension().and_then(|e| e.to_str()) {
        Some("xz") => {
            lzma_rs::xz_decompress(&mut Cursor::new(&raw), &mut data)
                .map_err(|e| anyhow::anyhow!("{}: {e:?}", file.display()))?;
        }
        Some("zst") => {
            let mut decoder = ruzstd::decoding::StreamingDecoder::new(Cursor::new(&raw))
                .with_context(|| format!("damaged {}", file.display()))?;
            std::io::copy(&mut decoder, &mut data).with_context(|| format!("damaged {}", file.display()))?;
        }
        Some("gz") => {
            std::io::copy(&mut flate2::read::GzDecoder::new(Cursor::new(&raw)), &mut data)
                .with_context(|| format!("damaged {}", file.display()))?;
        }
        _ => return Ok(raw),
    }
    Ok(data)
}

/// The names in `depends=` of a module's `.modinfo` section (NUL-separated `key=value` strings).
fn depends(elf: &[u8]) -> Result<Vec<String>> {
    let file = object::File::parse(elf)?;
    let section = file.section_by_name(".modinfo").context("no .modinfo section")?;
    Ok(section
        .data()?
        .split(|b| *b == 0)
        .filter_map(|s| std::str::from_utf8(s).ok()?.strip_prefix("depends="))
        .flat_map(|list| list.split(',').filter(|n| !n.is_empty()).map(canonical))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        assert_eq!(module_name(Path::new("kernel/drivers/hv/hv-utils.ko.xz")).as_deref(), Some("hv_utils"));
        assert_eq!(module_name(Path::new("x/e1000.ko")).as_deref(), Some("e1000"));
        assert_eq!(module_name(Path::new("x/modules.order")), None);
        assert_eq!(module_name(Path::new("x/a.ko.txt")), None);
    }
}
