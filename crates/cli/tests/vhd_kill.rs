//! `viridian vhd convert | compact | resize | merge`, killed (SIGKILL) at moments all over their run: the image that
//! there was is whole, or the new one is, and the work can be done again.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Kills of each operation, spread over the time that it takes.
const KILLS: u32 = 6;
const SIZE: usize = 48 << 20;

fn vhd(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_viridian"));
    command.arg("vhd").args(arguments).stdin(Stdio::null());
    command
}

fn must(arguments: &[&str]) {
    let output = vhd(arguments).output().unwrap();
    let said = |bytes| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "vhd {arguments:?}: {}{}", said(&output.stdout), said(&output.stderr));
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The disk's bytes, as a chain shows them, cut or filled to the first size.
fn content(image: &Path, raw: &Path) -> Vec<u8> {
    let _ = std::fs::remove_file(raw);
    must(&["check", text(image)]);
    must(&["convert", text(image), text(raw)]);
    let mut bytes = std::fs::read(raw).unwrap();
    bytes.resize(SIZE, 0);
    bytes
}

/// Data with holes: every fourth mebibyte is empty.
fn pattern(seed: u8) -> Vec<u8> {
    let mut bytes = vec![0; SIZE];
    for (i, block) in bytes.chunks_mut(1 << 20).enumerate().filter(|(i, _)| i % 4 != 3) {
        for (j, byte) in block.iter_mut().enumerate() {
            *byte = (i * 31 + j / 512 + j % 251) as u8 ^ seed;
        }
    }
    bytes
}

/// Prepares, starts and kills the operation again and again; `check` sees what was left each time.
fn killed(arguments: &[&str], prepare: impl Fn(), check: impl Fn(bool)) {
    prepare();
    let began = Instant::now();
    must(arguments);
    check(true);
    let whole = began.elapsed();
    for turn in 0..KILLS {
        prepare();
        let mut child = vhd(arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(whole.mul_f64(f64::from(turn) / f64::from(KILLS)).min(Duration::from_secs(5)));
        child.kill().unwrap();
        child.wait().unwrap();
        check(false);
    }
}

struct Images {
    _dir: tempfile::TempDir,
    raw: PathBuf,
    out: PathBuf,
    data: Vec<u8>,
}

fn images() -> (Images, impl Fn(&str) -> PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let at = {
        let base = dir.path().to_path_buf();
        move |name: &str| base.join(name)
    };
    let (raw, out, data) = (at("data.img"), at("out.img"), pattern(0));
    std::fs::write(&raw, &data).unwrap();
    (Images { _dir: dir, raw, out, data }, at)
}

#[test]
fn convert() {
    let (i, at) = images();
    let (source, target) = (at("s.vhdx"), at("t.vhd"));
    must(&["convert", text(&i.raw), text(&source)]);
    killed(
        &["convert", text(&source), text(&target)],
        || drop(std::fs::remove_file(&target)),
        |done| {
            assert!(content(&source, &i.out) == i.data, "the source has changed");
            assert!(target.exists() || !done);
            // What appears under the target's name is complete.
            if target.exists() {
                assert!(content(&target, &i.out) == i.data);
            }
        },
    );
}

#[test]
fn compact_and_resize() {
    let (i, at) = images();
    for (name, arguments) in [("c.vhdx", "compact"), ("c.vhd", "compact"), ("r.vhdx", "resize"), ("r.vhd", "resize")] {
        let (original, image) = (at(&format!("original-{name}")), at(name));
        must(&["convert", text(&i.raw), text(&original)]);
        let size = ["resize", text(&image), "80M"];
        let arguments = if arguments == "resize" { &size[..] } else { &["compact", text(&image)][..] };
        killed(
            arguments,
            || {
                std::fs::copy(&original, &image).unwrap();
            },
            |_| assert!(content(&image, &i.out) == i.data, "{arguments:?}"),
        );
    }
}

#[test]
fn merge() {
    let (i, at) = images();
    let (parent, child, other) = (at("p.vhdx"), at("k.vhdx"), at("other.img"));
    let want = pattern(0x55);
    std::fs::write(&other, &want).unwrap();
    let (old_parent, old_child) = (at("old-p.vhdx"), at("old-k.vhdx"));
    must(&["convert", text(&i.raw), text(&parent)]);
    must(&["new", "--parent", text(&parent), text(&child)]);
    fill(&child, &want);
    std::fs::copy(&parent, &old_parent).unwrap();
    std::fs::copy(&child, &old_child).unwrap();
    killed(
        &["merge", text(&child)],
        || {
            std::fs::copy(&old_parent, &parent).unwrap();
            std::fs::copy(&old_child, &child).unwrap();
        },
        |done| {
            if child.exists() {
                assert!(!done);
                assert!(content(&child, &i.out) == want, "the chain shows something else");
                must(&["merge", text(&child)]);
            }
            assert!(content(&parent, &i.out) == want);
        },
    );
}

fn fill(image: &Path, data: &[u8]) {
    let disk = vhd::Disk::open(image, &vhd::OpenOptions { write: true, ..Default::default() }).unwrap();
    for (n, part) in data.chunks(1 << 20).enumerate() {
        disk.write_at((n << 20) as u64, part).unwrap();
    }
    disk.close().unwrap();
}
