# What every boot must give: the processors asked for, a working clock, memory, files, processes and pipes.
# Arguments: number of processors, least memory in MiB.
processors=$1 memory=$2

expect processors "$processors" "$(nproc)"
expect processors-in-cpuinfo "$processors" "$(grep -c '^processor' /proc/cpuinfo)"
check memory [ "$(awk '/^MemTotal/ { print int($2 / 1024) }' /proc/meminfo)" -ge "$memory" ]

# Every processor runs a process of its own.
cpu=0
while [ "$cpu" -lt "$processors" ]; do
    expect "runs-on-$cpu" 4950 "$(taskset -c $cpu sh -c 'i=0 s=0; while [ $i -lt 100 ]; do s=$((s + i)); i=$((i + 1)); done; echo $s')"
    cpu=$((cpu + 1))
done

# Timer interrupts arrive: a sleep lasts as long as it says, by the guest's own clock.
read -r before _ < /proc/uptime
sleep 1
read -r after _ < /proc/uptime
elapsed=$(echo "$before $after" | awk '{ print int(($2 - $1) * 1000) }')
note "sleep 1 took $elapsed ms"
check sleep-not-short [ "$elapsed" -ge 990 ]
check sleep-not-long [ "$elapsed" -le 3000 ]
check date [ "$(date +%Y)" -ge 2024 ]

# Files, pipes, checksums: the sums are known.
head -c 1048576 /dev/zero > /tmp/zeros
expect sha256-of-zeros 30e14955ebf1352266dc2ff8067e68104607e750abb9d3b36582b8af909fcb58 "$(sha256sum < /tmp/zeros | cut -d' ' -f1)"
expect gzip-round-trip 0 "$(gzip -c /tmp/zeros | gunzip -c | cmp - /tmp/zeros; echo $?)"
expect sort 5 "$(seq 1 2000 | sort -rn | sed -n 1996p)"
expect floating-point 0.285714 "$(awk 'BEGIN { printf "%.6f", 2 / 7 }')"
expect processes 200 "$(i=0; while [ $i -lt 200 ]; do (echo x); i=$((i + 1)); done | wc -l)"

# What the kernel complains about.
expect no-warnings "" "$(dmesg | grep -E 'BUG:|WARNING:|Oops|soft lockup|rcu_sched.*stall|Clocksource.*unstable|Marking clocksource' | head -n 3)"
note "clocksource $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"
