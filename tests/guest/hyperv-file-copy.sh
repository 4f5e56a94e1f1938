# File copy with the daemon of Linux 6.10 and later: the kernel's part is only uio_hv_generic, which gives the daemon the
# channel's rings.
mount -t tmpfs tmp /mnt
check uio-device within 10 test -c /dev/uio0
hv_fcopy_uio_daemon -n > /dev/console 2>&1 &
host file-copy
host copy
expect copy-checksum "$answer" "$(sha256sum < /mnt/in/copied)"
expect copy-size 10485760 "$(stat -c %s /mnt/in/copied)"
host copy-again
expect no-errors "" "$(dmesg | grep -E 'BUG:|WARNING:|soft lockup' | head -n 3)"
