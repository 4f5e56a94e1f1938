//! What can be fetched, by name.

/// How a catalogue item is laid out after extraction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A kernel: `kernels/NAME/{vmlinuz,config,version,modules}`.
    Kernel,
    /// Anything else: `tools/NAME/` is a tree of files.
    Tool,
    /// A bootable disk made of the packages (`disks/NAME.vhdx`), see [`super::disk`].
    Disk,
    /// A bootable DVD image (`disks/NAME.iso`), see [`super::disk`].
    Dvd,
}

/// One name of the catalogue.
#[derive(Debug)]
pub struct Item {
    /// The name that is typed and that the folder has.
    pub name: &'static str,
    /// Kernel or tool.
    pub kind: Kind,
    /// Debian suite.
    pub suite: &'static str,
    /// Debian architecture.
    pub arch: &'static str,
    /// Packages asked for.
    pub packages: &'static [&'static str],
    /// Whether everything that they depend on (shared libraries) is fetched too.
    pub dependencies: bool,
    /// Packages of the closure that nobody needs here.
    pub without: &'static [&'static str],
    /// One line for `cargo xtask guests --list`.
    pub about: &'static str,
}

impl Item {
    /// One line that changes when the item must be fetched anew. The number counts changes of the layout.
    pub fn recipe(&self) -> String {
        if matches!(self.kind, Kind::Disk | Kind::Dvd) {
            return super::disk::recipe(self);
        }
        format!(
            "1 {:?} {} {} {} {} -{}",
            self.kind,
            self.suite,
            self.arch,
            self.dependencies,
            self.packages.join(","),
            self.without.join(",")
        )
    }
}

const fn kernel(
    name: &'static str,
    suite: &'static str,
    packages: &'static [&'static str],
    about: &'static str,
) -> Item {
    Item { name, kind: Kind::Kernel, suite, arch: "amd64", packages, dependencies: false, without: &[], about }
}

/// A tool of Bookworm with its shared libraries.
const fn program(name: &'static str, packages: &'static [&'static str], about: &'static str) -> Item {
    Item {
        name,
        kind: Kind::Tool,
        suite: "bookworm",
        arch: "amd64",
        packages,
        dependencies: true,
        without: MAINTAINER_ONLY,
        about,
    }
}

/// Files that are used as they are: firmware, boot loaders, static programs.
const fn files(
    name: &'static str,
    suite: &'static str,
    packages: &'static [&'static str],
    about: &'static str,
) -> Item {
    Item { name, kind: Kind::Tool, suite, arch: "amd64", packages, dependencies: false, without: &[], about }
}

/// A Debian system on a disk (or an installer-style DVD) that UEFI boots through the signed chain.
const fn system(
    name: &'static str,
    kind: Kind,
    suite: &'static str,
    packages: &'static [&'static str],
    about: &'static str,
) -> Item {
    Item { name, kind, suite, arch: "amd64", packages, dependencies: true, without: &[], about }
}

/// What a Debian system on a disk consists of beyond Debian's essential packages.
const SYSTEM: &[&str] = &[
    "systemd-sysv",
    "udev",
    "dbus",
    "kmod",
    "zstd",
    "e2fsprogs",
    "linux-image-cloud-amd64",
    "hyperv-daemons",
    "mokutil",
    "efibootmgr",
    "efivar",
];

/// What programs depend on only for being installed.
const MAINTAINER_ONLY: &[&str] = &[
    "adduser",
    "debconf",
    "dpkg",
    "passwd",
    "login",
    "libpam-modules",
    "libpam-modules-bin",
    "perl-base",
    "init-system-helpers",
];

/// What `cargo xtask guests` fetches when no name is given: what `demo`, `test` and `bench boot` need.
pub const DEFAULT: &[&str] =
    &["bookworm-cloud", "bookworm-generic", "trixie-cloud", "busybox", "stress-ng", "seabios", "qemu"];

/// Everything that can be fetched by name.
pub const CATALOGUE: &[Item] = &[
    kernel("bookworm-cloud", "bookworm", &["linux-image-cloud-amd64"], "Debian 12 kernel for clouds (6.1)"),
    kernel("bookworm-generic", "bookworm", &["linux-image-amd64"], "Debian 12 kernel with every driver (6.1)"),
    kernel("trixie-cloud", "trixie", &["linux-image-cloud-amd64"], "Debian 13 kernel for clouds (6.12)"),
    kernel("trixie-generic", "trixie", &["linux-image-amd64"], "Debian 13 kernel with every driver (6.12)"),
    Item {
        name: "bookworm-686",
        kind: Kind::Kernel,
        suite: "bookworm",
        arch: "i386",
        packages: &["linux-image-686"],
        dependencies: false,
        without: &[],
        about: "Debian 12 kernel for 32-bit processors",
    },
    files("busybox", "bookworm", &["busybox-static"], "the guest's shell and small commands"),
    Item {
        arch: "i386",
        ..files(
            "busybox-i386",
            "bookworm",
            &["busybox-static"],
            "the same of 32 bits: for 32-bit kernels, and beside others",
        )
    },
    program("stress-ng", &["stress-ng"], "load and verify: stress-ng with its libraries"),
    program("qemu", &["qemu-system-x86"], "QEMU, the yardstick of `bench`; not needed to run guests"),
    program("programs", PROGRAMS, "compiler, Python and text tools that `bench cpu` runs"),
    program("eject", &["eject"], "opens the guest's DVD drive"),
    program("qemu-img", &["qemu-utils"], "QEMU's disk images: what ours are compared with"),
    program("libvhdi", &["python3-libvhdi", "python3-minimal"], "an independent reader of VHD and VHDX chains"),
    program("fio", &["fio"], "disk load with verification"),
    program("hyperv-daemons", &["hyperv-daemons"], "guest daemons for KVP, VSS and file copy"),
    Item {
        suite: "sid",
        ..program("fcopy-uio-daemon", &["hyperv-daemons"], "the guest daemon for file copy from Linux 6.10 on")
    },
    program("network", &["iproute2", "iperf3", "isc-dhcp-client", "ethtool"], "network tools for guests"),
    program(
        "disk-tools",
        &["e2fsprogs", "util-linux", "gdisk", "dosfstools", "mtools", "xorriso"],
        "make disks and file systems",
    ),
    program("mmdebstrap", &["mmdebstrap"], "make root file systems"),
    files("fakeroot", "bookworm", &["fakeroot", "libfakeroot"], "owners of files, for those who are not root"),
    program(
        "efitools",
        &["efitools", "sbsigntool", "openssl"],
        "sign and inspect EFI images; unsigned images for refusals",
    ),
    files("seabios", "bookworm", &["seabios"], "generation 1 BIOS and video BIOS images"),
    Item {
        suite: "trixie",
        ..program("mke2fs", &["e2fsprogs", "libarchive13t64"], "mke2fs that takes a file system's contents from a tar")
    },
    files("ovmf", "trixie", &["ovmf"], "reference UEFI with Microsoft's keys in its variables"),
    files("shim-signed", "bookworm", &["shim-signed", "shim-helpers-amd64-signed"], "first boot loader (Microsoft)"),
    files("grub-efi", "bookworm", &["grub-efi-amd64-signed"], "second boot loader, signed by Debian"),
    files("shim-signed-13", "trixie", &["shim-signed", "shim-helpers-amd64-signed"], "the same of Debian 13"),
    files("grub-efi-13", "trixie", &["grub-efi-amd64-signed"], "the same of Debian 13"),
    files(
        "efi-images",
        "trixie",
        &["shim-signed", "grub-efi-amd64-signed", "efitools", "ovmf"],
        "signed and unsigned images and key databases for tests of Secure Boot's rule",
    ),
    system("debian-12-disk", Kind::Disk, "bookworm", SYSTEM, "Debian 12 on a GPT disk with the signed chain (VHDX)"),
    system("debian-13-disk", Kind::Disk, "trixie", SYSTEM, "Debian 13 on a GPT disk with the signed chain (VHDX)"),
    system("debian-12-dvd", Kind::Dvd, "bookworm", &[], "installer-style ISO of Debian 12 with the signed chain"),
    files("grub-rescue", "bookworm", &["grub-rescue-pc"], "BIOS boot CD and floppy images"),
    files("isolinux", "bookworm", &["isolinux", "syslinux-common"], "BIOS boot loader for CDs"),
    files("memtest86", "bookworm", &["memtest86+"], "a guest without an operating system"),
    files("efi-shell", "trixie", &["efi-shell-x64"], "the UEFI shell, unsigned"),
    files("systemd-boot", "bookworm", &["systemd-boot-efi"], "a boot menu that lists kernels, unsigned"),
    files("ipxe", "bookworm", &["ipxe"], "network boot loaders"),
    files("netboot", "bookworm", &["debian-installer-12-netboot-amd64"], "the installer's network boot tree"),
];

/// The busybox for a kernel of the catalogue.
pub fn busybox_for(kernel: &str) -> &'static str {
    let of_32_bits = CATALOGUE.iter().any(|i| i.name == kernel && i.arch == "i386");
    if of_32_bits { "busybox-i386" } else { "busybox" }
}

/// Real programs for `bench cpu`.
const PROGRAMS: &[&str] = &[
    "cpp-12",
    "gcc-12",
    "binutils",
    "libc6-dev",
    "python3-minimal",
    "libpython3-stdlib",
    "gzip",
    "coreutils",
    "gawk",
    "grep",
    "dash",
    "findutils",
];
