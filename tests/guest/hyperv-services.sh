# The six integration services with the kernel's drivers and the real daemons.
daemons() {
    mkdir -p /var/lib/hyperv
    mount -t tmpfs tmp /tmp
    for daemon in hv_kvp_daemon hv_vss_daemon hv_fcopy_daemon; do
        $daemon -n > "/tmp/$daemon.log" 2>&1 &
    done
}
# A record of a pool: a key of 512 bytes and a value of 2048.
record() {
    printf %s "$1" | dd bs=512 count=1 conv=sync 2> /dev/null
    printf %s "$2" | dd bs=2048 count=1 conv=sync 2> /dev/null
}

for service in Heartbeat Shutdown TimeSync; do
    check "service-$service" sh -c "dmesg | grep -q '$service IC version'"
done
# A card that nobody is on the other end of, so that there are addresses to tell.
ip link set dummy0 up
ip addr add 192.0.2.7/24 dev dummy0
ip addr add 2001:db8::7/64 dev dummy0
daemons
host connected
host heartbeat ok

# Data exchange, both ways.
host kvp-addresses "$(uname -r)"
host kvp-set
check kvp-from-host within 10 grep -q 'hello from the host' /var/lib/hyperv/.kvp_pool_0
host kvp-delete
check kvp-deleted within 10 sh -c '! grep -q "hello from the host" /var/lib/hyperv/.kvp_pool_0'
record colour green > /var/lib/hyperv/.kvp_pool_1
host kvp-from-guest

# Backup: a writer waits while the file systems are frozen.
/sbin/mke2fs -q -t ext4 /dev/sda
mount -t ext4 /dev/sda /mnt
host freeze
(
    echo data > /mnt/written
    sync /mnt/written
    echo > /tmp/write-ended
) &
sleep 1.5
check frozen-writer-waits [ ! -e /tmp/write-ended ]
host thaw
check thawed-writer-ends within 10 test -e /tmp/write-ended
expect thawed-data data "$(cat /mnt/written)"

# File copy.
host copy
expect copy-checksum "$answer" "$(sha256sum < /mnt/in/copied)"
expect copy-size 10485760 "$(stat -c %s /mnt/in/copied)"
host copy-again

# Heartbeat: the driver goes away and comes back.
beat=$(ls -d /sys/bus/vmbus/drivers/hv_utils/fd149e91-* | head -n 1)
basename "$beat" > /sys/bus/vmbus/drivers/hv_utils/unbind
host heartbeat no
basename "$beat" > /sys/bus/vmbus/drivers/hv_utils/bind
host heartbeat ok

# The machine stands still for half a minute; it is saved and goes on in another process: the clock is right soon after.
host tick
host clock-now "$(now)"
note "before: $answer"
host pause 30
sleep 1
host tick
host clock-now "$(now)"
note "after a pause of 30 s: $answer"
host save 5
sleep 1
host tick
host clock-now "$(now)"
note "after 5 s in a file: $answer"
host connected
host heartbeat ok
umount /mnt
expect no-errors "" "$(dmesg | grep -E 'I/O error|BUG:|WARNING:|soft lockup|timeout waiting for daemon' | head -n 3)"
