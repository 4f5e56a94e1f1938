#!/bin/busybox sh
# The first process of every test guest. The harness reads the lines that begin with VIRIDIAN-.
#
# Kernel command line:
#   viridian.test=NAME        run /tests/NAME (tests/guest/NAME.sh of the repository)
#   viridian.run=BASE64       run this script
#   viridian.args=A,B,...     arguments of the script
#   viridian.after=poweroff|reboot|shell    what follows (default: poweroff)
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

test_name= run= args= after=poweroff
for word in $(cat /proc/cmdline); do
    case $word in
    viridian.test=*) test_name=${word#*=} ;;
    viridian.run=*) run=${word#*=} ;;
    viridian.args=*) args=$(echo "${word#*=}" | tr , ' ') ;;
    viridian.after=*) after=${word#*=} ;;
    esac
done

while read -r module; do
    insmod "/lib/viridian/modules/$module" || echo "VIRIDIAN-MODULE: FAIL $module"
done < /lib/viridian/modules.list

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
shell) setsid cttyhack sh -l ;;
esac
poweroff -f
