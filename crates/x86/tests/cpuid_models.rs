//! The CPUID tables of every model, against files that were looked through by a person. After a change that is meant,
//! `UPDATE_GOLDEN=1 cargo test -p viridian-x86` writes them anew.
#![allow(missing_docs)]

use std::fmt::Write;
use std::path::PathBuf;
use viridian_x86::cpuid::bits::{self, Bit};
use viridian_x86::cpuid::{CpuModel, CpuidResult, CpuidTable, ModelError, Vendor};

/// A host that has everything, with this vendor.
fn rich_host(vendor: &'static [u8; 4]) -> impl Fn(u32, u32) -> CpuidResult {
    move |leaf, _| match leaf {
        0 => CpuidResult { eax: 0x1f, ebx: u32::from_le_bytes(*vendor), ecx: 0, edx: 0 },
        _ => CpuidResult { eax: u32::MAX, ebx: u32::MAX, ecx: u32::MAX, edx: u32::MAX },
    }
}

fn print(table: &CpuidTable) -> String {
    let mut out = String::new();
    for e in &table.entries {
        let sub = e.subleaf.map_or("-".to_owned(), |s| s.to_string());
        let r = e.result;
        let regs = format!("{:08x} {:08x} {:08x} {:08x}", r.eax, r.ebx, r.ecx, r.edx);
        writeln!(out, "{:08x} {sub} {regs}", e.leaf).unwrap();
    }
    out.push_str("features:");
    for bit in bits::ALL.iter().filter(|b| b.in_table(table)) {
        write!(out, " {}", bit.name.to_lowercase()).unwrap();
    }
    out.push('\n');
    out
}

#[test]
fn tables_are_as_kept() {
    for (vendor, id) in [("intel", b"Genu"), ("amd", b"Auth")] {
        for name in CpuModel::NAMES {
            let model = CpuModel::by_name_on(name, rich_host(id)).unwrap();
            let text = print(&model.table(2, 6, 2_596_090_000));
            let path =
                PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/cpuid-{name}-{vendor}.txt"));
            if std::env::var_os("UPDATE_GOLDEN").is_some() {
                std::fs::write(&path, &text).unwrap();
            }
            let kept = std::fs::read_to_string(&path).unwrap_or_default();
            assert_eq!(text, kept, "{} differs; UPDATE_GOLDEN=1 writes it anew if that is meant", path.display());
        }
    }
}

#[test]
fn tables_agree_with_themselves() {
    for id in [b"Genu", b"Auth"] {
        for name in CpuModel::NAMES {
            let model = CpuModel::by_name_on(name, rich_host(id)).unwrap();
            for (vps, hz) in [(1, 1_000_000_000), (2, 2_400_000_000), (5, 3_999_999_999), (64, 5_700_000_000u64)] {
                for vp in [0, vps - 1] {
                    let t = model.table(vp, vps, hz);
                    let max = t.get(0, 0).eax;
                    let max_extended = t.get(0x8000_0000, 0).eax;
                    for e in &t.entries {
                        assert!(e.leaf <= if e.leaf >= 1 << 31 { max_extended } else { max }, "leaf {:#x}", e.leaf);
                    }
                    assert_eq!(t.get(1, 0).ebx >> 24, vp);
                    for leaf in [0xb, 0x1f] {
                        let (smt, core) = (t.get(leaf, 0), t.get(leaf, 1));
                        if leaf <= max && core.ebx != 0 {
                            assert_eq!((smt.edx, core.edx), (vp, vp));
                            assert_eq!(core.ebx, vps);
                            assert!(1u32 << core.eax >= vps);
                        }
                    }
                    let tsc = t.get(0x15, 0);
                    let exact = u128::from(tsc.ecx) * u128::from(tsc.ebx) / u128::from(tsc.eax);
                    assert!(exact.abs_diff(hz.into()) <= u128::from(hz) / 1_000_000, "{hz} Hz came out as {exact}");
                    assert!(u64::from(tsc.ecx) / 1000 * u64::from(tsc.ebx) <= u32::MAX.into(), "Linux would overflow");
                    // No feature without what it stands on.
                    let needs: &[(Bit, Bit)] = &[
                        (bits::AVX, bits::XSAVE),
                        (bits::AVX2, bits::AVX),
                        (bits::FMA, bits::AVX),
                        (bits::F16C, bits::AVX),
                        (bits::VAES, bits::AVX),
                        (bits::XSAVEC, bits::XSAVE),
                        (bits::XSAVES, bits::XSAVEC),
                        (bits::INVPCID, bits::PCID),
                        (bits::TSC_DEADLINE, bits::X2APIC),
                        (bits::AES, bits::SSE2),
                    ];
                    for (feature, base) in needs {
                        assert!(!feature.in_table(&t) || base.in_table(&t), "{} without {}", feature.name, base.name);
                    }
                    let xsave = t.get(0xd, 0);
                    assert_eq!(xsave.eax == 7, bits::AVX.in_table(&t));
                    if xsave.eax != 0 {
                        let avx = t.get(0xd, 2);
                        assert_eq!(xsave.ecx, avx.ebx + avx.eax);
                    }
                }
            }
        }
    }
}

#[test]
fn a_poor_host_is_refused_with_names() {
    let host = |leaf, sub| {
        let mut r = rich_host(b"Genu")(leaf, sub);
        if leaf == 7 {
            r.ebx &= !(1 << bits::AVX2.bit);
        }
        r
    };
    assert!(CpuModel::by_name_on("x86-64-v2", host).is_ok());
    match CpuModel::by_name_on("x86-64-v3", host) {
        Err(ModelError::HostLacks { missing, .. }) => assert_eq!(missing, "AVX2"),
        other => panic!("{other:?}"),
    }
    let own = CpuModel::by_name_on("host", host).unwrap();
    assert!(!own.features().contains(&bits::AVX2) && own.features().contains(&bits::FMA));
    assert!(matches!(CpuModel::by_name("pentium"), Err(ModelError::Unknown(_))));
    assert_eq!(own.vendor(), Vendor::Intel);
}

#[test]
fn no_model_offers_what_nobody_executes() {
    for id in [b"Genu", b"Auth"] {
        for name in CpuModel::NAMES {
            let t = CpuModel::by_name_on(name, rich_host(id)).unwrap().table(0, 1, 2_000_000_000);
            for bit in [bits::MONITOR, bits::PKU, bits::LA57, bits::SVM, bits::SSE4A, bits::CLZERO, bits::FFXSR] {
                assert!(!bit.in_table(&t), "{name} offers {}", bit.name);
            }
            // AVX-512 (leaf 7 EBX 16, 17, 21, 28, 30, 31), AMX and CET (EDX 20, 22, 24, 25; ECX 7).
            assert_eq!(t.get(7, 0).ebx & 0xd023_0000, 0);
            assert_eq!(t.get(7, 0).edx & 0x0350_0000, 0);
            assert_eq!(t.get(7, 0).ecx & 0x80, 0);
        }
    }
}
