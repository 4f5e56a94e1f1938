# Synthetic storage in use: root on a dynamic VHDX, three channels, DVD, hot add and remove, growing, trim, limits.
# Arguments: number of processors. Units: 0 root; from `host units` on, 1 DVD drive, 2 data disk of 256 MiB.
processors=$1

errors() {
    # A unit that is gone answers the last SYNCHRONIZE CACHE (35h) with "invalid LUN" (20h), and the driver says so.
    dmesg | grep -E 'I/O error|hv_storvsc.*status|EXT4-fs error|BUG:|WARNING:|soft lockup' | grep -v 'cmd 0x35.*srb 0x20' |
        head -n 3
}
lun_disk() { ls "/sys/class/scsi_device/0:0:0:$1/device/block" 2> /dev/null; }

if [ -e /second-boot ]; then
    expect data-after-restart "$(cat /second-boot)" "$(sha256sum < /fio.0.0)"
    expect no-errors "" "$(errors)"
    return 0
fi

check root-on-vhdx sh -c "grep -q '^/dev/$(lun_disk 0) / ext4 rw' /proc/mounts"
expect clocksource hyperv_clocksource_tsc_page "$(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"
expect channels "$processors" "$(ls /sys/bus/vmbus/devices/56697264-5343-0000-*/channels | wc -l)"

# Four writers on all channels, everything read back and checked; then memory that is shared by threads is mapped and
# unmapped through the page cache, which asks the hypervisor for remote TLB flushes.
fio_verify() {
    fio --name=fio --directory="$1" --filename_format='fio.$jobnum.$filenum' --size="$2" --numjobs=4 --group_reporting \
        --ioengine=libaio --iodepth=8 --direct=1 --rw=randrw --bsrange=4k-64k --verify=crc32c --verify_fatal=1 \
        --end_fsync=1 --output=/tmp/fio.out
}
mount -t tmpfs tmp /tmp
check fio-verify fio_verify / 8m
check fio-mmap fio --name=map --directory=/ --ioengine=mmap --thread --numjobs=4 --rw=randwrite --bs=4k --size=2M \
    --fsync=16 --time_based --runtime=1 --output=/tmp/fio.out
rm -f /map.*

# DVD.
host units
check drive-added within 20 test -b /dev/sr0
check dvd-mount mount -t iso9660 -o ro /dev/sr0 /mnt
host sum-first
expect dvd-content "$answer" "$(sha256sum < /mnt/first)"
host disc-locked
umount /mnt
check dvd-eject eject /dev/sr0
check dvd-empty sh -c '! mount -t iso9660 -o ro /dev/sr0 /mnt'
host disc-second
check dvd-new-disc within 10 mount -t iso9660 -o ro /dev/sr0 /mnt
host sum-second
expect dvd-new-content "$answer" "$(sha256sum < /mnt/second)"
umount /mnt
host disc-none
check dvd-empty-again sh -c '! mount -t iso9660 -o ro /dev/sr0 /mnt'

# Hot add and remove.
host attach
check hot-add within 20 test -d /sys/class/scsi_device/0:0:0:5/device/block
hot=/dev/$(lun_disk 5)
expect hot-size 131072 "$(blockdev --getsz "$hot")"
check hot-mkfs /sbin/mke2fs -q -t ext4 "$hot"
check hot-mount mount -t ext4 "$hot" /mnt
check hot-fio fio_verify /mnt 2m
umount /mnt
host detach
check hot-remove within 20 test ! -d /sys/class/scsi_device/0:0:0:5

# Growing while mounted.
check data-disk-added within 20 test -d /sys/class/scsi_device/0:0:0:2/device/block
data=/dev/$(lun_disk 2)
/sbin/mke2fs -q -t ext4 "$data"
mount -t ext4 -o nodiscard "$data" /mnt
echo before > /mnt/before
host grow
check grow-seen within 20 sh -c "[ \$(blockdev --getsz $data) = 786432 ]"
check grow-resize /sbin/resize2fs "$data"
check grow-used [ "$(df -m /mnt | awk 'NR == 2 { print $2 }')" -gt 300 ]
expect grow-data before "$(cat /mnt/before)"

# Trim.
host used
empty=$answer
dd if=/dev/urandom of=/mnt/big bs=1M count=64 2> /dev/null
sync
host used
full=$answer
check trim-filled [ $((full - empty)) -ge 60000000 ]
rm /mnt/big
sync
check trim fstrim /mnt
echo x > /mnt/x
sync
host used-below $((empty + 16777216))

# Limits: operations of 8 KiB a second, as the guest counts them. A mounted ext4 would write on its own (it zeroes its
# tables in the background).
umount /mnt
iops() { fio --name=q --filename="$data" --readonly --direct=1 --rw=randread --ioengine=libaio --iodepth=16 --time_based \
    --runtime=2 --minimal "$@" | cut -d';' -f8; }
free=$(iops --bs=8k)
check unlimited [ "$free" -gt 1200 ]
host limit 400
eight=$(iops --bs=8k)
sixteen=$(iops --bs=16k)
note "IOPS: $free without a limit; at most 400 units: $eight of 8 KiB, $sixteen of 16 KiB"
check limit-8k [ "$eight" -ge 340 -a "$eight" -le 440 ]
check limit-16k [ "$sixteen" -ge 170 -a "$sixteen" -le 220 ]
host no-alert
host limit 400 800
iops --bs=8k --runtime=4 > /dev/null
host alert
host limit

expect no-errors "" "$(errors)"
sha256sum < /fio.0.0 > /second-boot
sync
