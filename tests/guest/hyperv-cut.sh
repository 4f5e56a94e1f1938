# Writes until the host pulls the plug: a file system with a mixed load, and a disk whose every record is flushed
# before it is told. Arguments: number of the first record. Units: 0 ext4, 1 records of 4 KiB.
record=$2
# Names are given in the order in which disks are found, which is not always the same.
unit() { ls "/sys/class/scsi_device/0:0:0:$1/device/block"; }
within 10 unit 0
within 10 unit 1
system=/dev/$(unit 0) records=/dev/$(unit 1)
[ "$record" -gt 0 ] || /sbin/mke2fs -q -t ext4 "$system"
mount -t ext4 "$system" /mnt || return 1
rm -rf /mnt/*
mount -t tmpfs tmp /tmp
fio --name=mixed --directory=/mnt --size=8m --numjobs=2 --ioengine=libaio --iodepth=8 --direct=1 --rw=randrw \
    --bsrange=4k-256k --fsync=32 --loops=100 --output=/tmp/fio.out &
(while :; do dd if=/dev/urandom of=/mnt/buffered bs=64k count=32 conv=fsync; fstrim /mnt; done) 2> /dev/null &
size=$(blockdev --getsz $records)
while [ $record -lt $((size / 8)) ]; do
    # Spread over the disk, so that most records take a new block.
    at=$(((record * 2654435761) % (size / 8)))
    # The record says its number 64 times.
    line=$(printf '%015d' $record)
    n=0 text=
    while [ $n -lt 8 ]; do text="$text$line$line$line$line$line$line$line$line"; n=$((n + 1)); done
    printf '%s' "$text" | dd of=$records bs=4k seek=$at conv=sync,notrunc,fsync 2> /dev/null
    echo "VIRIDIAN-RECORD: $record $at"
    record=$((record + 1))
done
check never-reached false
