//! Programs of an extracted package tree with the shared libraries that they need.

use super::cpio::{Archive, Node};
use anyhow::{Context, Result, bail};
use object::LittleEndian;
use object::read::elf::{Dyn, FileHeader, ProgramHeader};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// Where Debian's dynamic loader looks for libraries, in the tree.
const LIBRARY_DIRS: &[&str] =
    &["lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu", "lib64", "usr/lib64", "lib", "usr/lib"];

/// What an ELF program asks of the loader.
#[derive(Debug, Default)]
struct Needs {
    libraries: Vec<String>,
    /// Folders of `DT_RUNPATH` and `DT_RPATH`, relative to the root. (`$ORIGIN` is not expanded: no package needs it.)
    folders: Vec<String>,
    interpreter: Option<String>,
}

/// Adds one program of `tree` (path relative to it, as `usr/bin/stress-ng`), its loader and libraries, below the folder
/// `under` of the archive.
///
/// # Errors
/// When the program or one of its libraries is not in the tree.
pub fn add_program(archive: &mut Archive, under: &str, tree: &Path, path: &str) -> Result<()> {
    let data = copy(archive, under, tree, path)?;
    let mut queue = vec![(path.to_owned(), data)];
    while let Some((user, data)) = queue.pop() {
        let needs = needs(&data).with_context(|| format!("{} is not an ELF program", tree.join(&user).display()))?;
        if let Some(interpreter) = needs.interpreter {
            let interpreter = interpreter.trim_start_matches('/').to_owned();
            if !archive.contains(&join(under, &interpreter)) {
                copy(archive, under, tree, &interpreter)?;
            }
        }
        for library in needs.libraries {
            let folders = LIBRARY_DIRS.iter().copied().chain(needs.folders.iter().map(String::as_str));
            let Some(found) = folders.map(|d| format!("{d}/{library}")).find(|p| exists(tree, p)) else {
                bail!("{user} needs {library}, which is not in {}", tree.display());
            };
            if !archive.contains(&join(under, &found)) {
                let data = copy(archive, under, tree, &found)?;
                queue.push((found, data));
            }
        }
    }
    Ok(())
}

fn join(under: &str, path: &str) -> String {
    if under.is_empty() { path.to_owned() } else { format!("{under}/{path}") }
}

/// Adds everything below the folder `top` of `tree`, links as links, at the same path below `under`.
///
/// # Errors
/// When something cannot be read.
pub fn add_folder(archive: &mut Archive, under: &str, tree: &Path, top: &str) -> Result<()> {
    let mut folders = vec![top.to_owned()];
    while let Some(folder) = folders.pop() {
        let dir = tree.join(&folder);
        for entry in fs::read_dir(&dir).with_context(|| format!("cannot read {}", dir.display()))? {
            let entry = entry?;
            let Ok(name) = entry.file_name().into_string() else { continue };
            let path = join(&folder, &name);
            let kind = entry.file_type()?;
            if kind.is_dir() {
                folders.push(path);
            } else if kind.is_symlink() {
                archive.link(&join(under, &path), &fs::read_link(entry.path())?.to_string_lossy());
            } else if kind.is_file() {
                let data = fs::read(entry.path())?;
                let mode = entry.metadata()?.permissions().mode() & 0o7777;
                archive.add(&join(under, &path), Node::File { data, mode });
            }
        }
    }
    Ok(())
}

fn exists(tree: &Path, path: &str) -> bool {
    fs::symlink_metadata(tree.join(path)).is_ok()
}

/// Copies a file under its own name; a link is followed (within the tree) and its contents stored under both names.
fn copy(archive: &mut Archive, under: &str, tree: &Path, path: &str) -> Result<Vec<u8>> {
    let source = follow(tree, path)?;
    let data = fs::read(&source).with_context(|| format!("cannot read {}", source.display()))?;
    archive.file(&join(under, path), 0o755, data.clone());
    Ok(data)
}

/// Follows links, taking absolute ones as relative to the tree. Newer packages have everything below `usr`, and leave it to
/// another package to make `lib64` and the like links.
fn follow(tree: &Path, path: &str) -> Result<PathBuf> {
    let merged = format!("usr/{path}");
    let mut at = tree.join(if !exists(tree, path) && exists(tree, &merged) { &merged } else { path });
    for _ in 0..8 {
        let Ok(target) = fs::read_link(&at) else { return Ok(at) };
        at = match target.strip_prefix("/") {
            Ok(inside) => tree.join(inside),
            Err(_) => at.parent().unwrap_or(tree).join(target),
        };
    }
    bail!("{} is a chain of too many links", tree.join(path).display())
}

fn needs(data: &[u8]) -> Result<Needs> {
    type Header = object::elf::FileHeader64<LittleEndian>;
    let header = Header::parse(data)?;
    let endian = header.endian()?;
    let mut needs = Needs::default();
    let segments = header.program_headers(endian, data)?;
    for segment in segments {
        if let Some(path) = segment.interpreter(endian, data)? {
            needs.interpreter = Some(String::from_utf8_lossy(path).into_owned());
        }
        let Some(entries) = segment.dynamic(endian, data)? else { continue };
        let value = |tag| entries.iter().find(|e| e.tag(endian) == tag).map(|e| e.d_val(endian));
        let Some(strings) = value(object::elf::DT_STRTAB) else { continue };
        // The string table is given by address: find the segment that maps it.
        let table = segments
            .iter()
            .find_map(|s| s.data_range(endian, data, strings, value(object::elf::DT_STRSZ)?).ok()?)
            .context("no dynamic string table")?;
        for entry in entries {
            let tag = entry.tag(endian);
            if !matches!(tag, object::elf::DT_NEEDED | object::elf::DT_RUNPATH | object::elf::DT_RPATH) {
                continue;
            }
            let start = usize::try_from(entry.d_val(endian))?;
            let text =
                table.get(start..).and_then(|t| t.split(|b| *b == 0).next()).context("bad string of a library")?;
            let text = String::from_utf8_lossy(text).into_owned();
            if tag == object::elf::DT_NEEDED {
                needs.libraries.push(text);
            } else {
                needs.folders.extend(text.split(':').map(|f| f.trim_start_matches('/').to_owned()));
            }
        }
    }
    Ok(needs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_test_binary_needs_libc() {
        let data = fs::read(std::env::current_exe().unwrap()).unwrap();
        let needs = needs(&data).unwrap();
        assert!(needs.libraries.iter().any(|l| l == "libc.so.6"), "{needs:?}");
        assert!(needs.interpreter.is_some_and(|i| i.contains("ld-linux")));
    }

    #[test]
    fn links_stay_in_the_tree() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("lib")).unwrap();
        fs::write(dir.path().join("lib/real"), "x").unwrap();
        std::os::unix::fs::symlink("/lib/real", dir.path().join("a")).unwrap();
        std::os::unix::fs::symlink("loop", dir.path().join("loop")).unwrap();
        fs::create_dir_all(dir.path().join("usr/lib64")).unwrap();
        fs::write(dir.path().join("usr/lib64/loader"), "x").unwrap();
        assert_eq!(follow(dir.path(), "lib64/loader").unwrap(), dir.path().join("usr/lib64/loader"));
        assert_eq!(follow(dir.path(), "a").unwrap(), dir.path().join("lib/real"));
        assert!(follow(dir.path(), "loop").is_err());
    }
}
