//! Device paths in bytes and text.

use super::*;
use crate::partition::{Identity, Partition};
use proptest::prelude::*;

#[test]
fn real_paths_round_trip() {
    for t in [
        "PciRoot(0x0)/Pci(0x1F,0x2)/HD(1,GPT,6D6F8B5E-3C2F-4F4E-9B3A-0123456789AB,0x800,0x100000)/\\EFI\\debian\\shimx64.efi",
        "VenHw(9B17E5A2-0891-42DD-B653-80B5C22809BA,D96361BAA104294DB60572E2FFB1DC7F)/Scsi(0x0,0x1)",
        "HD(2,MBR,0xDEADBEEF,0x3F,0x1000)/\\EFI\\BOOT\\BOOTX64.EFI",
        "PciRoot(0x0)/CDROM(0x1,0x5A,0x1000)",
        "MAC(001122334455,0x1)",
        "Serial(0x0)/Uart(115200,8,N,1)/VenMsg(E0C14753-F9BE-11D2-9A0C-0090273FC14D)",
        "Acpi(PNP0A06,0x1),Fv(6D6F8B5E-3C2F-4F4E-9B3A-0123456789AB)/FvFile(6D6F8B5E-3C2F-4F4E-9B3A-0123456789AB)",
    ] {
        let path = text::from_text(t).unwrap_or_else(|| panic!("{t}"));
        assert_eq!(text::to_text(&path), t);
        let bytes = path.to_bytes();
        assert_eq!(DevicePath::parse(&bytes), Some((path, bytes.len())));
    }
}

#[test]
fn short_form_finds_its_partition() {
    let unique = Guid([7; 16]);
    let p =
        Partition { number: 1, first: 2048, blocks: 999, identity: Identity::Gpt { kind: Guid::default(), unique } };
    let full = DevicePath::new().scsi(0, 1).partition(&p).file("\\EFI\\x.efi");
    let short = full.from_hard_drive().unwrap();
    assert!(short.starts_with_partition(&p));
    assert!(short.starts_with_partition(&Partition { first: 4096, ..p }), "the partition may have moved");
    let other = Identity::Gpt { kind: Guid::default(), unique: Guid([8; 16]) };
    assert!(!short.starts_with_partition(&Partition { identity: other, ..p }));
    assert_eq!(short.tail().file_path().as_deref(), Some("\\EFI\\x.efi"));
    assert_eq!(full.strip_prefix(&DevicePath::new().scsi(0, 1)), Some(short));
}

proptest! {
    #[test]
    fn any_bytes_parse_or_not_and_texts_round_trip(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = DevicePath::parse(&bytes);
        let mut path = DevicePath::new();
        for chunk in bytes.chunks(23) {
            path = path.with(chunk[0] % 5 + 1, chunk[chunk.len() - 1] % 25, chunk);
        }
        let t = text::to_text(&path);
        prop_assert_eq!(text::from_text(&t), Some(path), "{}", t);
    }

    #[test]
    fn any_text_is_survived(t in ".{0,80}") {
        let _ = text::from_text(&t);
    }
}
