# Hyper-V's interface and a VHDX on synthetic SCSI, with the kernel's own drivers.
# Arguments: number of processors.
processors=$1

sleep 1
expect clocksource hyperv_clocksource_tsc_page "$(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"
check detected sh -c 'dmesg | grep -q "Hypervisor detected: Microsoft Hyper-V"'
expect vmbus-version 5.3 "$(dmesg | sed -n 's/.*Vmbus version:\([0-9.]*\).*/\1/p')"
check synthetic-timers [ "$(awk '/^ *HVS:/ { print $2 }' /proc/interrupts)" -gt 10 ]
check vmbus-interrupts [ "$(awk '/^ *HYP:/ { for (i = 2; i <= NF; i++) s += $i; print s }' /proc/interrupts)" -gt 10 ]
[ "$processors" -gt 1 ] && check ipi-hypercalls sh -c 'dmesg | grep -q "Using IPI hypercalls"'
for service in Heartbeat Shutdown TimeSync; do
    check "service-$service" sh -c "dmesg | grep -q '$service IC version'"
done

# Threads that share memory and map, unmap and write-protect it: the others' TLBs are flushed by hypercalls, which the
# host's side of the test sees in the engine's counters, and not by the kernel's own interrupts.
if [ "$processors" -gt 1 ]; then
    check flush-hypercalls sh -c 'dmesg | grep -q "Using hypercall for remote TLB flush"'
    cd /tmp
    check shared-memory stress-ng --quiet --malloc 1 --malloc-pthreads 4 --malloc-thresh 4096 --malloc-max 64 \
        --malloc-bytes 64K --timeout 2
    cd /
    expect own-shootdowns 0 "$(awk '/^ *TLB:/ { for (i = 2; i <= NF; i++) s += $i; print s + 0 }' /proc/interrupts)"
fi

# The disk: what is written is there after the caches are dropped, from all processors at once.
expect disk-sectors 262144 "$(cat /sys/block/sda/size)"
n=0
while [ "$n" -lt "$processors" ]; do
    head -c 4194304 /dev/urandom > "/tmp/data.$n"
    dd if="/tmp/data.$n" of=/dev/sda bs=64k seek=$((n * 256)) conv=notrunc,fsync 2> /dev/null &
    n=$((n + 1))
done
wait
echo 3 > /proc/sys/vm/drop_caches
n=0
while [ "$n" -lt "$processors" ]; do
    dd if=/dev/sda of=/tmp/back bs=64k skip=$((n * 256)) count=64 2> /dev/null
    check "disk-data-$n" cmp "/tmp/data.$n" /tmp/back
    n=$((n + 1))
done
expect no-errors "" "$(dmesg | grep -E 'I/O error|hv_storvsc.*status|BUG:|WARNING:|soft lockup' | head -n 3)"
