#!/bin/busybox sh
# The first process of every test guest. The harness reads the lines that begin with VIRIDIAN-.
#
# Kernel command line:
#   viridian.test=NAME        run /tests/NAME (tests/guest/NAME.sh of the repository)
#   viridian.run=BASE64       run this script
#   viridian.args=A,B,...     arguments of the script
#   viridian.after=poweroff|reboot|shell|wait    what follows (default: poweroff); wait: for the host to do something
#   viridian.root=DEVICE      go on in the root file system on this device
# With neither test nor run: a shell on the console.
export PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM="${TERM:-vt100}"
echo "VIRIDIAN-INIT"
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev 2>/dev/null
mkdir -p /dev/pts /dev/shm /run /tmp
mount -t devpts devpts /dev/pts
mount -t tmpfs shm /dev/shm
mount -t tmpfs run /run
hostname viridian
ip link set lo up 2>/dev/null

test_name= run= args= after=poweroff root=
for word in $(cat /proc/cmdline); do
    case $word in
    viridian.test=*) test_name=${word#*=} ;;
    viridian.run=*) run=${word#*=} ;;
    viridian.args=*) args=$(echo "${word#*=}" | tr , ' ') ;;
    viridian.after=*) after=${word#*=} ;;
    viridian.root=*) root=${word#*=} ;;
    esac
done

while read -r module; do
    insmod "/lib/viridian/modules/$module" || echo "VIRIDIAN-MODULE: FAIL $module"
done < /lib/viridian/modules.list

# In the initramfs the root is a tmpfs or ramfs, and the mark of the real root file system is not there.
if [ -n "$root" ] && [ ! -e /lib/viridian/root ]; then
    tries=0
    while [ $tries -lt 100 ]; do
        # The disk with LUN 0: Linux looks at several disks at once, and any of them may become sda.
        [ "$root" = lun0 ] && for disk in /sys/class/scsi_device/0:0:0:0/device/block/*; do
            [ -e "$disk" ] && root=/dev/${disk##*/}
        done
        [ -b "$root" ] && break
        sleep 0.1
        tries=$((tries + 1))
    done
    mkdir -p /root.new
    if mount -t ext4 "$root" /root.new; then
        umount /dev/pts /dev/shm /run /dev /sys /proc
        exec switch_root /root.new /init
    fi
    echo "VIRIDIAN-VERDICT: FAIL there is no root file system on $root"
    poweroff -f
fi

script=
if [ -n "$test_name" ]; then
    script=/tests/$test_name
elif [ -n "$run" ]; then
    script=/run/script
    echo "$run" | base64 -d > $script
fi

if [ -z "$script" ]; then
    read -r up _ < /proc/uptime
    echo
    echo "Linux $(uname -r), $(nproc) processor(s), up ${up} s. Type poweroff to end."
    # Job control needs a controlling terminal, which the console device itself cannot be.
    setsid cttyhack sh -l
elif [ ! -r "$script" ]; then
    echo "VIRIDIAN-VERDICT: FAIL there is no test $test_name in this image"
else
    # shellcheck disable=SC2086
    sh /lib/viridian/run.sh "$script" $args < /dev/null
fi
# What the console has not sent yet would be lost.
sleep 0.2
case $after in
reboot) reboot -f ;;
wait) sleep 600 ;;
shell) setsid cttyhack sh -l ;;
esac
poweroff -f
