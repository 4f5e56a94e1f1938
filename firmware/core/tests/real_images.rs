//! Secure Boot's rule against real images and real databases: shim, GRUB and efitools as Debian ships them, and the
//! databases of its `ovmf` package.
//!
//! The packages are unpacked (`dpkg-deb -x`) into one folder, which `VIRIDIAN_EFI_TREE` names; without it the tests say
//! that they are skipped. `cargo xtask test` fetches the packages and sets it.

use std::path::PathBuf;
use uefi_core::bytes::{array, u16_at, u32_at};
use uefi_core::guid::{CERT_SHA256, Guid, IMAGE_SECURITY_DATABASE};
use uefi_core::pe::PeImage;
use uefi_core::secure::hash::HashAlgorithm;
use uefi_core::secure::image::{Allowed, Refused, check, digest};
use uefi_core::secure::{sigdb, x509};

fn tree() -> Option<PathBuf> {
    let tree = std::env::var_os("VIRIDIAN_EFI_TREE").map(PathBuf::from);
    if tree.is_none() {
        eprintln!(
            "skipped: VIRIDIAN_EFI_TREE does not name a folder with shim-signed, grub-efi-amd64-signed, efitools and ovmf"
        );
    }
    tree
}

/// Value of a variable in an OVMF variable store (the authenticated variable format of its flash image).
fn variable(store: &[u8], name: &str, vendor: Guid) -> Option<Vec<u8>> {
    let wide: Vec<u8> = name.encode_utf16().chain([0]).flat_map(u16::to_le_bytes).collect();
    (0..store.len().saturating_sub(60)).find_map(|at| {
        let added = u16_at(store, at) == Some(0x55aa) && store[at + 2] & 0x40 == 0 || store[at + 2] == 0x3f;
        if !added || u32_at(store, at + 36)? as usize != wide.len() || Guid::read(store, at + 44) != Some(vendor) {
            return None;
        }
        let data = at + 60 + wide.len();
        (store.get(at + 60..data)? == wide)
            .then(|| store.get(data..data + u32_at(store, at + 40)? as usize).map(<[u8]>::to_vec))?
    })
}

fn databases(tree: &std::path::Path) -> (Vec<u8>, Vec<u8>) {
    let store = std::fs::read(tree.join("usr/share/OVMF/OVMF_VARS_4M.ms.fd")).unwrap();
    let get = |name| variable(&store, name, IMAGE_SECURITY_DATABASE).unwrap_or_default();
    (get("db"), get("dbx"))
}

#[test]
fn shim_runs_and_unsigned_tools_do_not() {
    let Some(tree) = tree() else { return };
    let (db, dbx) = databases(&tree);
    let names: Vec<_> =
        sigdb::certificates(&db).iter().filter_map(|c| c.common_name().map(String::from_utf8_lossy)).collect();
    assert!(names.iter().any(|n| n.contains("UEFI CA 2011")), "db holds {names:?}");
    let shim = std::fs::read(tree.join("usr/lib/shim/shimx64.efi.signed")).unwrap();
    let image = PeImage::parse(&shim).unwrap();
    let verdict = check(&image, &db, &dbx);
    assert!(matches!(&verdict, Ok(Allowed::Certificate(by)) if by.contains("UEFI CA")), "{verdict:?}");
    for entry in std::fs::read_dir(tree.join("usr/lib/efitools/x86_64-linux-gnu")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "efi") {
            let bytes = std::fs::read(&path).unwrap();
            let image = PeImage::parse(&bytes).unwrap();
            assert_eq!(check(&image, &db, &dbx), Err(Refused::Unsigned), "{}", path.display());
            // Enrolled by its hash it runs; with the hash in dbx too it does not.
            let hash = digest(&image, HashAlgorithm::Sha256).unwrap();
            let mine = sigdb::append(&db, &sigdb::list(CERT_SHA256, Guid::default(), &[&hash]));
            assert_eq!(check(&image, &mine, &dbx), Ok(Allowed::Hash));
            let never = sigdb::list(CERT_SHA256, Guid::default(), &[&hash]);
            assert_eq!(check(&image, &mine, &never), Err(Refused::HashForbidden));
        }
    }
}

#[test]
fn grub_is_signed_by_nobody_in_db_but_by_debian() {
    let Some(tree) = tree() else { return };
    let (db, dbx) = databases(&tree);
    let grub = std::fs::read(tree.join("usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed")).unwrap();
    let image = PeImage::parse(&grub).unwrap();
    let verdict = check(&image, &db, &dbx);
    assert!(matches!(&verdict, Err(Refused::UnknownSigner(name)) if name.contains("Debian")), "{verdict:?}");
}

#[test]
fn a_changed_byte_anywhere_is_noticed() {
    let Some(tree) = tree() else { return };
    let (db, dbx) = databases(&tree);
    let shim = std::fs::read(tree.join("usr/lib/shim/shimx64.efi.signed")).unwrap();
    let pe = u32_at(&shim, 0x3c).unwrap() as usize;
    let table = u32_at(&shim, pe + 24 + 112 + 32).unwrap() as usize;
    // Header (DOS stub, optional header's stack reserve), code, first and middle of the signature.
    for at in [0x50, pe + 24 + 72, 0x1000, 0x20_000, table - 1, table + 0x100, table + 0x400] {
        let mut changed = shim.clone();
        changed[at] ^= 1;
        let Ok(image) = PeImage::parse(&changed) else { continue };
        // shim may carry more than one signature: with one damaged in itself another may still be good, so only bytes that
        // the digest covers must make it fail.
        let verdict = check(&image, &db, &dbx);
        if at < table {
            assert_eq!(verdict, Err(Refused::BadSignature), "byte {at:#x}");
        } else if array::<2>(&shim, at).is_some() {
            assert_ne!(verdict, Ok(Allowed::Hash));
        }
    }
}

#[test]
fn a_forbidden_signer_refuses_the_image() {
    let Some(tree) = tree() else { return };
    let (db, _) = databases(&tree);
    let shim = std::fs::read(tree.join("usr/lib/shim/shimx64.efi.signed")).unwrap();
    let image = PeImage::parse(&shim).unwrap();
    for anchor in sigdb::certificates(&db).iter().filter(|c: &&x509::Certificate<'_>| {
        check(&image, &sigdb::list(uefi_core::guid::CERT_X509, Guid::default(), &[c.raw]), &[]).is_ok()
    }) {
        let dbx = sigdb::list(uefi_core::guid::CERT_X509, Guid::default(), &[anchor.raw]);
        assert!(matches!(check(&image, &db, &dbx), Err(Refused::CertificateForbidden(_))));
        let mut tbs = HashAlgorithm::Sha256.digest(anchor.tbs);
        tbs.extend([0; 16]);
        let dbx = sigdb::list(uefi_core::guid::CERT_X509_SHA256, Guid::default(), &[&tbs]);
        assert!(matches!(check(&image, &db, &dbx), Err(Refused::CertificateForbidden(_))));
    }
}
