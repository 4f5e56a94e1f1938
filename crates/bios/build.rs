//! Builds the firmware (`firmware/uefi`) for the guest and leaves its flat image in `OUT_DIR`, where `src/firmware.rs` embeds
//! it: the bytes as they lie in memory, and how many more (zeros) follow them.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

fn main() {
    let here = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    let firmware = here.join("../../firmware/uefi");
    for watched in
        ["firmware/uefi/src", "firmware/uefi/Cargo.toml", "firmware/uefi/Cargo.lock", "firmware/uefi/link.ld"]
            .into_iter()
            .chain(["firmware/uefi/.cargo/config.toml", "firmware/core/src", "crates/vmbus-protocol/src"])
    {
        println!("cargo:rerun-if-changed={}", here.join("../..").join(watched).display());
    }
    let target = out.join("firmware");
    let mut cargo = Command::new(env::var_os("CARGO").expect("cargo sets it"));
    // From its own folder, so that its own .cargo/config.toml (target, linker, code model) counts.
    cargo.current_dir(&firmware).args(["build", "--release", "--locked", "--target-dir"]).arg(&target);
    // What the outer cargo (or clippy, or a coverage run) set for the host must not reach the guest's code.
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        let ours = text.starts_with("CARGO_ENCODED_")
            || text.starts_with("CARGO_PROFILE_")
            || text.starts_with("CARGO_TARGET_")
            || text.starts_with("CARGO_BUILD_")
            || matches!(&*text, "RUSTFLAGS" | "RUSTC_WRAPPER" | "RUSTC_WORKSPACE_WRAPPER" | "CLIPPY_ARGS" | "TARGET");
        if ours {
            cargo.env_remove(&name);
        }
    }
    let status = cargo.status().unwrap_or_else(|e| panic!("cargo cannot be started for the firmware: {e}"));
    assert!(status.success(), "the firmware does not build: run `cargo build --release` in {}", firmware.display());
    let elf = fs::read(target.join("x86_64-unknown-linux-gnu/release/viridian-uefi")).expect("cargo has built it");
    let (flat, memory) = flatten(&elf).expect("the linker has made a well-formed image");
    write(&out.join("firmware.bin"), &flat);
    write(&out.join("firmware_memory.rs"), format!("{memory}\n").as_bytes());
}

fn write(path: &Path, bytes: &[u8]) {
    fs::write(path, bytes).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
}

/// The bytes of all PT_LOAD segments at their addresses, and the number of bytes in memory.
fn flatten(elf: &[u8]) -> Option<(Vec<u8>, u64)> {
    let u64_at = |at: usize| Some(u64::from_le_bytes(elf.get(at..at + 8)?.try_into().ok()?));
    let u16_at = |at: usize| Some(u16::from_le_bytes(elf.get(at..at + 2)?.try_into().ok()?));
    let u32_at = |at: usize| Some(u32::from_le_bytes(elf.get(at..at + 4)?.try_into().ok()?));
    let (mut flat, mut memory) = (Vec::new(), 0);
    let headers = u64_at(32)? as usize;
    for i in 0..usize::from(u16_at(56)?) {
        let at = headers + i * usize::from(u16_at(54)?);
        if u32_at(at)? != 1 {
            continue;
        }
        let (offset, address) = (u64_at(at + 8)? as usize, u64_at(at + 16)? as usize);
        let (file, mem) = (u64_at(at + 32)? as usize, u64_at(at + 40)?);
        if flat.len() < address + file {
            flat.resize(address + file, 0);
        }
        flat[address..address + file].copy_from_slice(elf.get(offset..offset + file)?);
        memory = memory.max(address as u64 + mem);
    }
    (u64_at(24)? == 0).then_some((flat, memory))
}
