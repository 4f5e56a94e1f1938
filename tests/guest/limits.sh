# Weight and cap of VMs, on a kernel with control groups of version 2: Viridian runs here, in a guest of its own, and its VMs'
# guests do nothing but compute.
groups=/sys/fs/cgroup spinning=/lib/viridian/spinning
v() { viridian "$@" --store /run/store; }
# Microseconds that a VM's group has computed.
used() { awk '$1 == "usage_usec" { print $2 }' "$1/cpu.stat"; }
group() { echo "$groups/user/viridian-$(v vm show "$1" --json | sed -n 's/^ *"id": "\(.*\)".*/\1/p' | head -n 1)"; }
# It goes when somebody looks, as soon as the worker's process is gone.
gone() {
    v vm list
    [ ! -e "$1" ]
}
new() {
    name=$1
    shift
    check "new-$name" v vm new "$name" --kernel $spinning --memory 16M --engine soft "$@"
}

# A session of its own below the root, as a service manager makes them: a group that has processes gives none below it.
mount -t cgroup2 cgroup $groups
echo +cpu > $groups/cgroup.subtree_control
mkdir -p $groups/user/session
check session sh -c "echo $$ > $groups/user/session/cgroup.procs"
check host-show sh -c "viridian host show --store /run/store | grep 'available (cgroup v2)'"

# A cap: a quarter of its one processor.
new capped --cpu-cap 25
check start-capped v vm start capped
capped=$(group capped)
expect cpu.max "25000 100000" "$(cat "$capped/cpu.max")"
check in-its-group grep -q . "$capped/cgroup.procs"
check not-in-the-session sh -c "! grep -qx $(head -n 1 "$capped/cgroup.procs") $groups/user/session/cgroup.procs"
sleep 1
read -r begin _ < /proc/uptime
before=$(used "$capped")
sleep 4
after=$(used "$capped")
read -r end _ < /proc/uptime
percent=$(echo "$before $after $begin $end" | awk '{ print int(($2 - $1) / ($4 - $3) / 10000) }')
note "a cap of 25 %: $percent %; $(grep nr_throttled "$capped/cpu.stat")"
check cap-is-kept [ "$percent" -le 28 ]
check cap-is-given [ "$percent" -ge 15 ]
check stop-capped v vm stop capped --turn-off
check group-is-gone within 10 gone "$capped"

# Weights on one processor: 300 against 100.
new heavy --cpu-weight 300 --affinity 0
new light --cpu-weight 100 --affinity 0 --cpu-cap 99
check start-heavy v vm start heavy
check start-light v vm start light
heavy=$(group heavy) light=$(group light)
expect cpu.weight "300 100" "$(cat "$heavy/cpu.weight") $(cat "$light/cpu.weight")"
sleep 2
h=$(used "$heavy") l=$(used "$light")
sleep 6
h=$(($(used "$heavy") - h)) l=$(($(used "$light") - l))
note "weights of 300 and 100: $h and $l microseconds"
check weights-count [ $((h * 10)) -ge $((l * 20)) ]
check the-light-one-runs [ $((h * 10)) -le $((l * 45)) ]
# Changed while it is off, in force at the next start.
check stop-heavy v vm stop heavy --turn-off
check set-heavy v vm processor set heavy --cpu-weight 50
check start-heavy-again v vm start heavy
expect new-weight 50 "$(cat "$(group heavy)/cpu.weight")"
# A worker that is killed leaves its group to those who find it.
pid=$(v vm show light --json | sed -n 's/^ *"pid": \([0-9]*\).*/\1/p' | head -n 1)
check kill kill -9 "$pid"
check group-of-the-dead-is-gone within 10 gone "$light"
check stop-all v vm stop heavy --turn-off

# Where nothing may be made, it is said, and the VM runs.
mount -o remount,ro $groups
check start-without v vm start capped
check it-is-said sh -c "viridian vm events capped --store /run/store | grep limits-missing"
check stop-without v vm stop capped --turn-off
