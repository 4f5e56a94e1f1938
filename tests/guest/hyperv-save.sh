# Saved with everything in use: fio --verify on all channels, a hot-added disk, a file copy in flight.
host attach
check hot-add within 20 test -d /sys/class/scsi_device/0:0:0:5/device/block
hot=/dev/$(ls /sys/class/scsi_device/0:0:0:5/device/block)
/sbin/mke2fs -q -t ext4 "$hot"
mount -t ext4 "$hot" /mnt
mkdir -p /var/lib/hyperv
mount -t tmpfs tmp /tmp
hv_fcopy_daemon -n > /tmp/fcopy.log 2>&1 &
host connected

load() {
    fio --name="$1" --directory="$2" --size=6m --numjobs=4 --group_reporting --ioengine=libaio --iodepth=8 --direct=1 \
        --rw=randrw --bsrange=4k-64k --verify=crc32c --verify_fatal=1 --loops=6 --output="/tmp/$1.out"
    echo $? > "/tmp/$1.status"
}
load system / &
load hot /mnt &
sleep 1
check fio-runs [ ! -e /tmp/system.status -a ! -e /tmp/hot.status ]
host save-while-copying
check fio-still-ran [ ! -e /tmp/system.status ]
check fio-ends within 120 test -e /tmp/system.status -a -e /tmp/hot.status
for job in system hot; do
    [ "$(cat /tmp/$job.status)" = 0 ] || grep -v '^ ' "/tmp/$job.out" | head -n 20
done
expect fio-system 0 "$(cat /tmp/system.status)"
expect fio-hot 0 "$(cat /tmp/hot.status)"
host copy-sum
sum=$answer
check copy-arrives within 60 sh -c "[ \"\$(sha256sum < /mnt/copied)\" = '$sum' ]"
host heartbeat ok
host tick
host clock-now "$(now)"
host hot-disk-known
killall hv_fcopy_daemon
sleep 0.3
umount /mnt
expect no-errors "" "$(dmesg | grep -E 'I/O error|hv_storvsc.*status|EXT4-fs error|BUG:|WARNING:|soft lockup' | head -n 3)"
