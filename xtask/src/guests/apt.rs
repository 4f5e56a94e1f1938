//! A private apt: its own lists, cache, status and configuration under the guests folder.
//!
//! The host's apt is asked only for its sources and proxies; its state is neither read nor changed, and no root is
//! needed. apt itself checks signatures and checksums of everything that is fetched.

use super::sources::{HostSources, host_acquire_settings};
use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// One package as the archive offers it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Package {
    /// Package name.
    pub name: String,
    /// File name in the archive, `NAME_VERSION_ARCH.deb`: it stands for the version.
    pub file: String,
    /// Size of the file in bytes.
    pub size: u64,
}

/// A private apt state for one suite and one architecture.
pub struct Apt {
    root: PathBuf,
    suite: String,
    address: String,
    /// Sources without updates and security, for when those cannot be had.
    release_only: String,
}

impl Apt {
    /// Prepares the state under `guests/apt/SUITE-ARCH` (created when missing).
    ///
    /// # Errors
    /// When the folder cannot be written or the host has no usable apt.
    pub fn open(guests: &Path, sources: &HostSources, suite: &str, arch: &str) -> Result<Self> {
        let root = std::path::absolute(guests)?.join("apt").join(format!("{suite}-{arch}"));
        for dir in ["lists/partial", "cache/archives/partial", "sources", "empty", "download"] {
            fs::create_dir_all(root.join(dir))
                .with_context(|| format!("cannot create {}", root.join(dir).display()))?;
        }
        fs::write(root.join("status"), "")?;
        fs::write(root.join("empty.conf"), "")?;
        fs::write(root.join("sources/debian.sources"), sources.for_suite(suite))?;
        let r = root.display();
        let mut conf = format!(
            "Dir::Etc::main \"{r}/empty.conf\";\nDir::Etc::parts \"{r}/empty\";\n\
             Dir::Etc::sourcelist \"{r}/empty.conf\";\nDir::Etc::sourceparts \"{r}/sources\";\n\
             Dir::Etc::preferences \"{r}/empty.conf\";\nDir::Etc::preferencesparts \"{r}/empty\";\n\
             Dir::State \"{r}\";\nDir::State::lists \"{r}/lists/\";\nDir::State::status \"{r}/status\";\n\
             Dir::Cache \"{r}/cache/\";\nDir::Log \"{r}\";\n\
             APT::Architecture \"{arch}\";\nAPT::Architectures {{ \"{arch}\"; }};\n\
             APT::Install-Recommends \"false\";\nAPT::Sandbox::User \"root\";\nAPT::Update::Error-Mode \"any\";\n\
             Acquire::Languages \"none\";\nAcquire::Retries \"2\";\nAcquire::http::Timeout \"30\";\n"
        );
        for line in host_acquire_settings()? {
            conf.push_str(&line);
            conf.push('\n');
        }
        fs::write(root.join("apt.conf"), conf)?;
        Ok(Self {
            root,
            suite: suite.to_owned(),
            address: sources.address().to_owned(),
            release_only: sources.release_only(suite),
        })
    }

    fn apt_get(&self, args: &[&str]) -> Command {
        let mut command = Command::new("apt-get");
        command
            .args(args)
            .env("APT_CONFIG", self.root.join("apt.conf"))
            .env("LC_ALL", "C")
            .env("DEBIAN_FRONTEND", "noninteractive")
            .current_dir(self.root.join("download"))
            .stdin(Stdio::null());
        command
    }

    /// Whether package lists were ever fetched.
    pub fn has_lists(&self) -> bool {
        self.root.join("updated").exists()
    }

    /// Fetches the package lists. An archive that is just being changed is asked again a little later, and then only
    /// for the release itself, without updates and security: guests are for tests.
    ///
    /// # Errors
    /// One line that names the archive, when it cannot be reached or its signature is not trusted.
    pub fn update(&self) -> Result<()> {
        let bar = spinner(format!("{}: package lists", self.suite));
        let mut pauses = [Duration::from_secs(3), Duration::from_secs(10)].into_iter();
        let mut all = true;
        loop {
            let output = self.apt_get(&["-q", "update"]).output().context("cannot run apt-get")?;
            if output.status.success() {
                break;
            }
            if !is_changing(&output.stderr) || !all {
                bar.finish_and_clear();
                bail!("cannot fetch Debian's package lists: {}", self.explain(&output.stderr));
            }
            match pauses.next() {
                Some(pause) => std::thread::sleep(pause),
                None => {
                    bar.suspend(|| {
                        eprintln!(
                            "note: going on without {0}-updates and {0}-security, which are being changed",
                            self.suite
                        )
                    });
                    fs::write(self.root.join("sources/debian.sources"), &self.release_only)?;
                    all = false;
                }
            }
        }
        bar.finish_and_clear();
        fs::write(self.root.join("updated"), "")?;
        Ok(())
    }

    /// The archive, the suite and apt's own first error in one line.
    fn explain(&self, stderr: &[u8]) -> String {
        let text = String::from_utf8_lossy(stderr);
        let lines = || text.lines().filter_map(|l| l.strip_prefix("E: ").or(l.strip_prefix("W: ")));
        let reason = lines()
            .find(|l| l.contains("Failed to fetch") || l.contains("is not signed") || l.contains("GPG error"))
            .or_else(|| lines().next())
            .unwrap_or("apt-get gave no reason");
        format!(
            "{} (suite {}): {}; check the network, proxy and apt sources of this machine",
            self.address,
            self.suite,
            reason.trim()
        )
    }

    /// The packages that `names` stand for today: themselves only, or with everything that they depend on.
    ///
    /// # Errors
    /// When the archive does not have one of them.
    pub fn resolve(&self, names: &[&str], with_dependencies: bool) -> Result<Vec<Package>> {
        let mut args = if with_dependencies {
            vec!["-qq", "-y", "--print-uris", "install"]
        } else {
            vec!["-qq", "--print-uris", "download"]
        };
        args.extend_from_slice(names);
        let output = self.apt_get(&args).output().context("cannot run apt-get")?;
        if !output.status.success() {
            bail!("cannot resolve {}: {}", names.join(" "), self.explain(&output.stderr));
        }
        let mut packages: Vec<Package> =
            String::from_utf8_lossy(&output.stdout).lines().filter_map(parse_uri_line).collect();
        packages.sort();
        if packages.is_empty() {
            bail!("{} (suite {}) has no package for {}", self.address, self.suite, names.join(" "));
        }
        Ok(packages)
    }

    /// Downloads packages, checked by apt, and gives their files. Call [`Apt::clean`] after using them.
    ///
    /// # Errors
    /// One line that names the archive, when a download fails or a checksum is wrong.
    pub fn download(&self, packages: &[Package], what: &str) -> Result<Vec<PathBuf>> {
        let download = self.root.join("download");
        let total: u64 = packages.iter().map(|p| p.size).sum();
        let bar = ProgressBar::new(total).with_style(
            ProgressStyle::with_template("{msg:32} {bar:30} {bytes:>10}/{total_bytes} {bytes_per_sec} {eta}")
                .expect("a constant template"),
        );
        bar.set_message(what.to_owned());
        let mut args = vec!["-qq", "download"];
        args.extend(packages.iter().map(|p| p.name.as_str()));
        let mut child = self
            .apt_get(&args)
            .stdout(Stdio::null())
            .stderr(fs::File::create(self.root.join("download.err"))?)
            .spawn()
            .context("cannot run apt-get")?;
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break status;
            }
            bar.set_position(folder_size(&download).min(total));
            std::thread::sleep(Duration::from_millis(100));
        };
        bar.finish_and_clear();
        if !status.success() {
            bail!("cannot download {what}: {}", self.explain(&fs::read(self.root.join("download.err"))?));
        }
        packages
            .iter()
            .map(|p| {
                let path = download.join(&p.file);
                let size = fs::metadata(&path).map(|m| m.len()).unwrap_or(0);
                if size != p.size {
                    bail!("{} has {size} bytes after download, expected {}", path.display(), p.size);
                }
                Ok(path)
            })
            .collect()
    }

    /// Removes downloaded package files: what is kept is what was extracted.
    pub fn clean(&self) {
        let _ = fs::remove_dir_all(self.root.join("download"));
        let _ = fs::create_dir_all(self.root.join("download"));
    }
}

/// Whether apt says that index and contents of the archive do not belong together, as while a mirror is updated.
fn is_changing(stderr: &[u8]) -> bool {
    let text = String::from_utf8_lossy(stderr);
    ["unexpected size", "Hash Sum mismatch", "Mirror sync"].iter().any(|sign| text.contains(sign))
}

/// `'URI' FILE SIZE HASH` of `apt-get --print-uris`.
fn parse_uri_line(line: &str) -> Option<Package> {
    let rest = line.strip_prefix('\'')?;
    let (_, rest) = rest.split_once("' ")?;
    let mut words = rest.split(' ');
    let file = words.next()?.to_owned();
    let size = words.next()?.parse().ok()?;
    let name = file.split('_').next()?.to_owned();
    // The name becomes part of paths: an archive must not be able to lead out of our folder.
    (!file.contains('/')).then_some(Package { name, file, size })
}

fn folder_size(dir: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(dir) else { return 0 };
    entries.filter_map(|e| e.ok()?.metadata().ok()).map(|m| m.len()).sum()
}

/// A spinner with a message, for steps without a known length.
pub fn spinner(message: String) -> ProgressBar {
    let bar = ProgressBar::new_spinner().with_message(message);
    bar.enable_steady_tick(Duration::from_millis(120));
    bar
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changing_archive_is_told_from_an_unreachable_one() {
        assert!(is_changing(
            b"E: Failed to fetch http://m/x  File has unexpected size (1 != 2). Mirror sync in progress?"
        ));
        assert!(!is_changing(b"E: Failed to fetch http://m/x  Could not resolve 'm'"));
    }

    #[test]
    fn uri_lines() {
        let p = parse_uri_line("'http://m/b_1.2_amd64.deb' b_1%3a1.2_amd64.deb 955316 SHA256:59").unwrap();
        assert_eq!((p.name.as_str(), p.file.as_str(), p.size), ("b", "b_1%3a1.2_amd64.deb", 955316));
        assert!(parse_uri_line("Reading package lists...").is_none());
        assert!(parse_uri_line("'http://m/x' ../evil_1_amd64.deb 5 SHA256:59").is_none());
    }
}
