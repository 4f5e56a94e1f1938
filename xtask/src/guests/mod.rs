//! Guest kernels and tools: Debian's packages, fetched once into a folder of our own.
//!
//! What lies where, under the guests folder (`target/guests`, or `VIRIDIAN_GUESTS_DIR`):
//!
//! ```text
//! kernels/NAME/vmlinuz config version modules/    one kernel; modules/ is its lib/modules/VERSION
//! tools/NAME/                                     one tool's packages, extracted side by side
//! disks/NAME.vhdx, disks/NAME.iso                 bootable systems, built on this machine
//! stamps/NAME                                     the package files that NAME was made from
//! initramfs/HASH.cpio[.gz]                        images, by content
//! apt/SUITE-ARCH/                                 the private apt state
//! ```

pub mod apt;
mod catalogue;
pub mod disk;
pub mod sources;

pub use catalogue::{CATALOGUE, DEFAULT, Item, Kind, busybox_for};

use anyhow::{Context, Result, bail};
use apt::{Apt, Package, spinner};
use sources::HostSources;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The folder that holds everything fetched.
#[derive(Clone, Debug)]
pub struct Guests {
    root: PathBuf,
}

/// A kernel as it lies in the guests folder.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// Catalogue name, as `bookworm-cloud`.
    pub name: String,
    /// `uname -r` of it.
    pub version: String,
    /// The bzImage.
    pub image: PathBuf,
    /// Contents of `/lib/modules/VERSION`.
    pub modules: PathBuf,
}

impl Guests {
    /// The guests folder of this checkout, or the one that `VIRIDIAN_GUESTS_DIR` names.
    pub fn locate() -> Self {
        let root = match std::env::var_os("VIRIDIAN_GUESTS_DIR") {
            Some(dir) if !dir.is_empty() => PathBuf::from(dir),
            _ => crate::workspace_root().join("target/guests"),
        };
        Self { root }
    }

    /// The folder itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The extracted tree of a tool.
    pub fn tool(&self, name: &str) -> PathBuf {
        self.root.join("tools").join(name)
    }

    /// The image of a bootable disk or DVD of the catalogue, as `debian-12-disk`. Guests write to disks: give them a
    /// differencing image (`viridian vhd new --parent`) or a copy.
    pub fn image(&self, name: &str) -> PathBuf {
        let dvd = CATALOGUE.iter().any(|i| i.name == name && i.kind == Kind::Dvd);
        self.root.join("disks").join(name).with_extension(if dvd { "iso" } else { "vhdx" })
    }

    /// Where a kernel lies.
    ///
    /// # Errors
    /// When it has not been fetched.
    pub fn kernel(&self, name: &str) -> Result<Kernel> {
        let dir = self.root.join("kernels").join(name);
        let version = fs::read_to_string(dir.join("version"))
            .with_context(|| format!("kernel {name} is not fetched: run `cargo xtask guests {name}`"))?;
        Ok(Kernel {
            name: name.to_owned(),
            version: version.trim().to_owned(),
            image: dir.join("vmlinuz"),
            modules: dir.join("modules"),
        })
    }

    /// Fetches what is missing of `names`. Does nothing, and asks nobody, for what is there already.
    ///
    /// # Errors
    /// For an unknown name, an unreachable archive, or a folder that cannot be written.
    pub fn ensure(&self, names: &[&str]) -> Result<()> {
        self.fetch(names, false)
    }

    /// Fetches what is missing of `names`; with `refresh` also what the archive has newer versions of.
    ///
    /// # Errors
    /// As [`Guests::ensure`].
    pub fn fetch(&self, names: &[&str], refresh: bool) -> Result<()> {
        let mut items = Vec::new();
        for name in names {
            let Some(item) = CATALOGUE.iter().find(|i| i.name == *name) else {
                let known: Vec<_> = CATALOGUE.iter().map(|i| i.name).collect();
                bail!("there is no guest or tool named {name}; known: {}", known.join(", "));
            };
            if refresh || !self.is_current(item) {
                items.push(item);
            }
        }
        if items.is_empty() {
            return Ok(());
        }
        fs::create_dir_all(&self.root).with_context(|| format!("cannot create {}", self.root.display()))?;
        // What builds the disks comes first: the lock below is not taken twice.
        let builders: Vec<&str> = items.iter().flat_map(|i| disk::needs(i)).copied().collect();
        if !builders.is_empty() {
            self.fetch(&builders, false)?;
        }
        // Several checkouts may share the folder.
        let lock = fs::File::create(self.root.join("lock"))?;
        lock.lock().context("cannot lock the guests folder")?;

        let sources = HostSources::read()?;
        let mut states: BTreeMap<(&str, &str), Apt> = BTreeMap::new();
        for item in items {
            if !refresh && self.is_current(item) {
                continue; // another process was faster
            }
            if matches!(item.kind, Kind::Disk | Kind::Dvd) {
                disk::build(self, item, &sources)?;
                fs::create_dir_all(self.root.join("stamps"))?;
                fs::write(self.stamp(item), item.recipe() + "\n")?;
                continue;
            }
            let key = (item.suite, item.arch);
            if let std::collections::btree_map::Entry::Vacant(entry) = states.entry(key) {
                let apt = Apt::open(&self.root, &sources, item.suite, item.arch)?;
                if refresh || !apt.has_lists() {
                    apt.update()?;
                }
                entry.insert(apt);
            }
            let apt = &states[&key];
            if let Err(first) = self.install(apt, item) {
                // Lists grow old: the archive drops a version when it takes a newer one. Once more with fresh lists.
                if apt.update().is_err() {
                    return Err(first);
                }
                self.install(apt, item)?;
            }
        }
        Ok(())
    }

    fn stamp(&self, item: &Item) -> PathBuf {
        self.root.join("stamps").join(item.name)
    }

    /// Whether an item is there. The first line of a stamp is the recipe, the others are the package files: a changed recipe fetches again.
    pub fn is_current(&self, item: &Item) -> bool {
        fs::read_to_string(self.stamp(item)).is_ok_and(|s| s.lines().next() == Some(item.recipe().as_str()))
    }

    fn install(&self, apt: &Apt, item: &Item) -> Result<()> {
        let bar = spinner(format!("{}: looking up packages", item.name));
        let mut packages = apt.resolve(item.packages, item.dependencies || item.kind == Kind::Kernel)?;
        bar.finish_and_clear();
        if item.kind == Kind::Kernel {
            // The package asked for is empty and depends on the one with the kernel of today.
            packages.retain(|p| is_kernel_package(&p.name));
        }
        packages.retain(|p| !item.without.contains(&p.name.as_str()));
        let stamp = stamp_text(item, &packages);
        if fs::read_to_string(self.stamp(item)).is_ok_and(|s| s == stamp) {
            return Ok(());
        }
        let files = apt.download(&packages, item.name)?;
        let temporary = self.root.join(format!("new-{}", item.name));
        let _ = fs::remove_dir_all(&temporary);
        fs::create_dir_all(&temporary)?;
        let bar = spinner(format!("{}: extracting", item.name));
        for file in &files {
            extract(file, &temporary)?;
        }
        let target = match item.kind {
            Kind::Kernel => {
                arrange_kernel(&temporary)?;
                self.root.join("kernels").join(item.name)
            }
            Kind::Tool => self.tool(item.name),
            Kind::Disk | Kind::Dvd => bail!("{} is built, not extracted", item.name),
        };
        fs::create_dir_all(target.parent().expect("a joined path"))?;
        let _ = fs::remove_file(self.stamp(item));
        if target.exists() {
            fs::remove_dir_all(&target).with_context(|| format!("cannot replace {}", target.display()))?;
        }
        fs::rename(&temporary, &target)?;
        fs::create_dir_all(self.root.join("stamps"))?;
        fs::write(self.stamp(item), stamp)?;
        apt.clean();
        bar.finish_and_clear();
        println!("{:16} {}", item.name, describe(&packages));
        Ok(())
    }
}

fn stamp_text(item: &Item, packages: &[Package]) -> String {
    let mut text = item.recipe();
    for package in packages {
        text.push('\n');
        text.push_str(&package.file);
    }
    text.push('\n');
    text
}

fn describe(packages: &[Package]) -> String {
    let size: u64 = packages.iter().map(|p| p.size).sum();
    match packages {
        [one] => one.file.clone(),
        many => format!("{} packages, {} MiB", many.len(), size >> 20),
    }
}

fn is_kernel_package(name: &str) -> bool {
    // linux-image-686 is a name for today's linux-image-6.1.0-50-686.
    let version = name.strip_prefix("linux-image-").and_then(|rest| rest.split('-').next());
    version.is_some_and(|v| v.contains('.') && v.starts_with(|c: char| c.is_ascii_digit()))
}

fn extract(package: &Path, into: &Path) -> Result<()> {
    let output = Command::new("dpkg-deb").arg("-x").arg(package).arg(into).output().context("cannot run dpkg-deb")?;
    if !output.status.success() {
        let reason = String::from_utf8_lossy(&output.stderr);
        bail!("cannot extract {}: {}", package.display(), reason.lines().next().unwrap_or("dpkg-deb failed"));
    }
    Ok(())
}

/// Turns an extracted kernel package into the stable names that everybody uses.
fn arrange_kernel(dir: &Path) -> Result<()> {
    let boot = dir.join("boot");
    let version = fs::read_dir(&boot)?
        .filter_map(|e| e.ok()?.file_name().into_string().ok())
        .find_map(|n| n.strip_prefix("vmlinuz-").map(str::to_owned))
        .context("the kernel package has no /boot/vmlinuz-*")?;
    fs::rename(boot.join(format!("vmlinuz-{version}")), dir.join("vmlinuz"))?;
    fs::rename(boot.join(format!("config-{version}")), dir.join("config"))?;
    let modules = ["lib/modules", "usr/lib/modules"]
        .iter()
        .map(|m| dir.join(m).join(&version))
        .find(|m| m.is_dir())
        .with_context(|| format!("the kernel package has no lib/modules/{version}"))?;
    fs::rename(modules, dir.join("modules"))?;
    for rest in ["boot", "lib", "usr"] {
        let _ = fs::remove_dir_all(dir.join(rest));
    }
    fs::write(dir.join("version"), format!("{version}\n"))?;
    Ok(())
}

/// Removes images and extracted trees of names that the catalogue no longer has. Images are rebuilt on demand.
///
/// # Errors
/// When something cannot be removed.
pub fn prune(guests: &Guests) -> Result<()> {
    let _ = fs::remove_dir_all(guests.root().join("initramfs"));
    for kind in ["kernels", "tools"] {
        let Ok(dir) = fs::read_dir(guests.root().join(kind)) else { continue };
        for entry in dir {
            let entry = entry?;
            if !CATALOGUE.iter().any(|i| entry.file_name() == i.name) {
                fs::remove_dir_all(entry.path())
                    .with_context(|| format!("cannot remove {}", entry.path().display()))?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn catalogue_names_are_unique_and_safe() {
        for (i, item) in CATALOGUE.iter().enumerate() {
            assert!(!item.name.contains(['/', '.']), "{}", item.name);
            assert!(CATALOGUE[..i].iter().all(|other| other.name != item.name), "{} twice", item.name);
        }
        for name in DEFAULT {
            assert!(CATALOGUE.iter().any(|i| i.name == *name), "{name}");
        }
    }

    #[test]
    fn kernel_packages() {
        assert!(is_kernel_package("linux-image-6.1.0-50-cloud-amd64"));
        assert!(!is_kernel_package("linux-image-cloud-amd64"));
        assert!(!is_kernel_package("linux-image-686"));
        assert!(!is_kernel_package("linux-base"));
    }
}
