//! The machine's own apt sources: which entry is Debian's, and the same entry under another suite's name.
//!
//! Nothing here knows an archive's address. Whatever mirror, proxy or snapshot the machine uses for Debian is what the
//! guests come from; only the suite's name changes. Both formats of sources.list(5) are read: one line (`.list`) and
//! deb822 (`.sources`).

use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};

/// Suites of Debian's main archive, by code name and by role. An entry with another suite is somebody else's archive.
const DEBIAN_SUITES: &[&str] = &[
    "bullseye",
    "bookworm",
    "trixie",
    "forky",
    "duke",
    "sid",
    "oldoldstable",
    "oldstable",
    "stable",
    "testing",
    "unstable",
];

/// Which of Debian's archives an entry names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Archive {
    /// The main archive, suites such as `bookworm` and `bookworm-updates`.
    Main,
    /// The security archive, suites such as `bookworm-security`.
    Security,
}

/// One source that carries Debian binary packages: where it is and how its signature is checked.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    archive: Archive,
    uris: String,
    /// Options that must be kept, as deb822 fields (`Signed-By`, possibly with a whole key in it).
    kept_fields: Vec<(String, String)>,
}

/// The Debian entries of this machine.
#[derive(Clone, Debug)]
pub struct HostSources {
    main: Entry,
    security: Option<Entry>,
}

impl HostSources {
    /// Reads `/etc/apt/sources.list` and `/etc/apt/sources.list.d`.
    ///
    /// # Errors
    /// When the machine has no entry for Debian's archive (Ubuntu, or no apt at all).
    pub fn read() -> Result<Self> {
        Self::read_from(Path::new("/etc/apt"))
    }

    fn read_from(etc_apt: &Path) -> Result<Self> {
        let mut entries = Vec::new();
        let mut files = vec![etc_apt.join("sources.list")];
        if let Ok(dir) = fs::read_dir(etc_apt.join("sources.list.d")) {
            let mut more: Vec<PathBuf> = dir.filter_map(|e| e.ok().map(|e| e.path())).collect();
            more.sort();
            files.extend(more);
        }
        for file in files {
            let Ok(text) = fs::read_to_string(&file) else { continue };
            match file.extension().and_then(|e| e.to_str()) {
                Some("sources") => entries.extend(parse_deb822(&text)),
                Some("list") => entries.extend(parse_one_line(&text)),
                _ => {}
            }
        }
        let pick = |archive| entries.iter().find(|e| e.archive == archive).cloned();
        let Some(main) = pick(Archive::Main) else {
            bail!(
                "{} names no Debian archive (on Ubuntu and others: add an entry for Debian's `bookworm main` with its \
                 keyring, from package debian-archive-keyring); guest kernels and tools are Debian's packages",
                etc_apt.display()
            );
        };
        Ok(Self { main, security: pick(Archive::Security) })
    }

    /// A deb822 sources file for `suite`: the main archive, its updates, and the security archive when the machine
    /// has one. The suite in which Debian is made has neither.
    pub fn for_suite(&self, suite: &str) -> String {
        if suite == "sid" {
            return self.release_only(suite);
        }
        let mut text = stanza(&self.main, &format!("{suite} {suite}-updates"));
        if let Some(security) = &self.security {
            text.push('\n');
            text.push_str(&stanza(security, &format!("{suite}-security")));
        }
        text
    }

    /// A deb822 sources file for `suite` with the release itself only.
    pub fn release_only(&self, suite: &str) -> String {
        stanza(&self.main, suite)
    }

    /// The main archive's address, for messages.
    pub fn address(&self) -> &str {
        &self.main.uris
    }
}

fn stanza(entry: &Entry, suites: &str) -> String {
    let mut text = format!("Types: deb\nURIs: {}\nSuites: {suites}\nComponents: main\n", entry.uris);
    for (name, value) in &entry.kept_fields {
        text.push_str(&format!("{name}: {value}\n"));
    }
    text
}

/// What archive a suite's name belongs to; `None` for suites that are not Debian's (or that we never want, as
/// backports).
fn classify(suite: &str) -> Option<Archive> {
    // Before bullseye the security suite was spelled `buster/updates`; nothing that old is a host here.
    let base = suite.strip_suffix("-security").unwrap_or(suite);
    if !DEBIAN_SUITES.contains(&base) {
        return None;
    }
    Some(if base == suite { Archive::Main } else { Archive::Security })
}

fn parse_deb822(text: &str) -> Vec<Entry> {
    let mut entries = Vec::new();
    let mut paragraph: Vec<(String, String)> = Vec::new();
    for line in text.lines().chain([""]) {
        if line.starts_with('#') {
            continue;
        }
        if line.trim().is_empty() {
            entries.extend(paragraph_entries(&paragraph));
            paragraph.clear();
        } else if line.starts_with([' ', '\t']) {
            if let Some((_, value)) = paragraph.last_mut() {
                value.push('\n');
                value.push_str(line);
            }
        } else if let Some((name, value)) = line.split_once(':') {
            paragraph.push((name.trim().to_owned(), value.trim().to_owned()));
        }
    }
    entries
}

fn paragraph_entries(paragraph: &[(String, String)]) -> Vec<Entry> {
    let field = |name: &str| paragraph.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, v)| v.as_str());
    let words = |name: &str| field(name).unwrap_or_default().split_whitespace().collect::<Vec<_>>();
    if field("Enabled").is_some_and(|v| matches!(v.to_ascii_lowercase().as_str(), "no" | "false" | "0" | "off")) {
        return Vec::new();
    }
    if !words("Types").contains(&"deb") || !words("Components").contains(&"main") {
        return Vec::new();
    }
    let kept_fields: Vec<_> = paragraph
        .iter()
        .filter(|(n, _)| ["Signed-By", "Trusted", "Check-Valid-Until"].iter().any(|k| n.eq_ignore_ascii_case(k)))
        .cloned()
        .collect();
    entries_for(&words("Suites"), &words("URIs").join(" "), &kept_fields)
}

fn entries_for(suites: &[&str], uris: &str, kept_fields: &[(String, String)]) -> Vec<Entry> {
    suites
        .iter()
        .filter_map(|s| classify(s))
        .map(|archive| Entry { archive, uris: uris.to_owned(), kept_fields: kept_fields.to_vec() })
        .collect()
}

fn parse_one_line(text: &str) -> Vec<Entry> {
    text.lines().flat_map(|line| parse_line(line).unwrap_or_default()).collect()
}

/// `deb [option=value ...] URI SUITE COMPONENT...`
fn parse_line(line: &str) -> Option<Vec<Entry>> {
    let line = line.split('#').next()?.trim();
    let mut rest = line.strip_prefix("deb")?;
    if !rest.starts_with([' ', '\t', '[']) {
        return None; // deb-src
    }
    rest = rest.trim_start();
    let mut kept_fields = Vec::new();
    if let Some(after) = rest.strip_prefix('[') {
        let (options, tail) = after.split_once(']')?;
        rest = tail;
        for option in options.split_whitespace() {
            match option.split_once('=') {
                Some(("signed-by", v)) => kept_fields.push(("Signed-By".to_owned(), v.replace(',', " "))),
                Some(("trusted", v)) => kept_fields.push(("Trusted".to_owned(), v.to_owned())),
                Some(("check-valid-until", v)) => kept_fields.push(("Check-Valid-Until".to_owned(), v.to_owned())),
                _ => {}
            }
        }
    }
    let words: Vec<&str> = rest.split_whitespace().collect();
    let [uri, suite, components @ ..] = words.as_slice() else { return None };
    components.contains(&"main").then(|| entries_for(&[suite], uri, &kept_fields))
}

/// The settings of the machine's own apt that reaching its archive may need (proxies, certificates, retries).
///
/// # Errors
/// When `apt-config` is not there.
pub fn host_acquire_settings() -> Result<Vec<String>> {
    let output = std::process::Command::new("apt-config")
        .arg("dump")
        .output()
        .context("cannot run apt-config: guest kernels and tools are fetched with apt (Debian or Ubuntu host)")?;
    let wanted = ["Acquire::http", "Acquire::https", "Acquire::ForceIP", "Acquire::Check-Valid-Until"];
    Ok(String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter(|l| wanted.iter().any(|w| l.starts_with(w)))
        .map(str::to_owned)
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sources(files: &[(&str, &str)]) -> Result<HostSources> {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("sources.list.d")).unwrap();
        for (name, text) in files {
            fs::write(dir.path().join(name), text).unwrap();
        }
        HostSources::read_from(dir.path())
    }

    #[test]
    fn deb822_entry_keeps_mirror_and_key() {
        let found = sources(&[(
            "sources.list.d/debian.sources",
            "# comment\nTypes: deb deb-src\nURIs: http://mirror.example/debian\nSuites: bookworm bookworm-updates\n\
             Components: main contrib\nSigned-By:\n -----BEGIN\n .\n abc\n\nTypes: deb\n\
             URIs: http://mirror.example/sec\nSuites: bookworm-security\nComponents: main\n",
        )])
        .unwrap();
        let text = found.for_suite("trixie");
        assert!(text.contains("URIs: http://mirror.example/debian\nSuites: trixie trixie-updates\n"), "{text}");
        assert!(text.contains("Signed-By: \n -----BEGIN\n .\n abc\n"), "{text}");
        assert!(text.contains("URIs: http://mirror.example/sec\nSuites: trixie-security\n"), "{text}");
    }

    #[test]
    fn one_line_entry_with_options() {
        let found = sources(&[(
            "sources.list",
            "deb-src http://a/debian bookworm main\n#deb http://no/debian bookworm main\n\
             deb [arch=amd64 signed-by=/k.gpg] http://b/debian bookworm main contrib # mine\n",
        )])
        .unwrap();
        let text = found.for_suite("bookworm");
        assert!(text.contains("URIs: http://b/debian\nSuites: bookworm bookworm-updates\n"), "{text}");
        assert!(text.contains("Signed-By: /k.gpg\n"), "{text}");
        assert!(!text.contains("security"), "{text}");
    }

    #[test]
    fn foreign_archives_are_not_debian() {
        let error = sources(&[
            ("sources.list", "deb http://u/ubuntu noble main universe\ndeb http://x/apt nodistro main\n"),
            ("sources.list.d/off.sources", "Enabled: no\nTypes: deb\nURIs: http://d\nSuites: sid\nComponents: main\n"),
        ])
        .unwrap_err();
        assert!(error.to_string().contains("names no Debian archive"), "{error}");
    }
}
