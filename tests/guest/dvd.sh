# Started from a DVD by UEFI through the signed boot chain: Secure Boot's state, and the DVD itself as a file system.
check secure-boot sh -c 'dmesg | grep -q "Secure boot enabled"'
check locked-down sh -c 'dmesg | grep -q "Kernel is locked down from EFI Secure Boot"'
mkdir -p /mnt/dvd /mnt/efivars
check mount sh -c 'for i in 1 2 3 4 5; do mount -t iso9660 -o ro /dev/sr0 /mnt/dvd && exit 0; sleep 1; done; exit 1'
check files cmp /mnt/dvd/boot/grub/efi.img /mnt/dvd/boot/grub/efi.img
check kernel [ -s /mnt/dvd/install.amd/vmlinuz ]
check shim [ -s /mnt/dvd/EFI/boot/bootx64.efi ]
check read sh -c 'cat /mnt/dvd/install.amd/* /mnt/dvd/EFI/boot/* > /dev/null'
expect acpi "" "$(dmesg | grep -E 'ACPI( BIOS)? (Error|Warning)|ACPI Exception|BUG:|WARNING:' | head -n 3)"
