//! The firmware tables against kept ones, and against ACPICA's own compiler where the host has it.

use std::path::{Path, PathBuf};
use std::process::Command;
use viridian_machine::acpi;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

/// The tables as text that a reader can compare: hexadecimal, 16 bytes a line.
fn text(processors: u32) -> String {
    let mut text = String::new();
    for (address, name, bytes) in acpi::tables(processors, false).tables {
        text += &format!("{name} at {address:#x}, {} bytes\n", bytes.len());
        for line in bytes.chunks(16) {
            let hex: Vec<String> = line.iter().map(|b| format!("{b:02x}")).collect();
            let ascii: String = line.iter().map(|b| if b.is_ascii_graphic() { char::from(*b) } else { '.' }).collect();
            text += &format!("  {:48} {ascii}\n", hex.join(" "));
        }
    }
    text
}

#[test]
fn tables_are_the_kept_ones() {
    for processors in [1, 4] {
        let path = golden(&format!("acpi-{processors}.txt"));
        let now = text(processors);
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            std::fs::create_dir_all(golden("")).unwrap();
            std::fs::write(&path, &now).unwrap();
        }
        let kept = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(
            kept == now,
            "{} differs from what is built now; if that is wanted, run the test with UPDATE_GOLDEN=1\n{now}",
            path.display()
        );
    }
}

/// `iasl` disassembles every table, compiles what it got, and must find no error and no warning.
#[test]
fn iasl_accepts_them() {
    if Command::new("iasl").arg("-v").output().is_err() {
        eprintln!("skipped: there is no iasl here (Debian package acpica-tools)");
        return;
    }
    for processors in [1, 64] {
        let dir = tempfile::tempdir().unwrap();
        for (_, name, bytes) in acpi::tables(processors, false).tables {
            if name == "RSDP" {
                continue;
            }
            let file = dir.path().join(format!("{name}.aml"));
            std::fs::write(&file, &bytes).unwrap();
            let run = |arguments: &[&str], file: &Path| {
                let output = Command::new("iasl").args(arguments).arg(file).current_dir(dir.path()).output().unwrap();
                let text =
                    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
                assert!(output.status.success(), "{name}: {text}");
                text
            };
            let text = run(&["-d"], &file);
            assert!(!text.contains("Warning") && !text.contains("Invalid"), "{name}: {text}");
            let text = run(&["-we"], &dir.path().join(format!("{name}.dsl")));
            assert!(text.contains(" 0 Errors") || !text.contains("Errors"), "{name}: {text}");
            assert!(!text.contains("Warning  "), "{name}: {text}");
        }
    }
}
