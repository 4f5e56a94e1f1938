# A running computation that is saved in its middle and must come to the right end; time must go on, not start again.
# Argument: number of processors.
processors=$1

# A chain of checksums: each link depends on all before it. The end of the chain is computed twice, in different order.
chain() {
    link=$1
    step=0
    while [ $step -lt "$2" ]; do
        link=$(echo "$link-$step" | sha256sum | cut -c 1-16)
        step=$((step + 1))
    done
    echo "$link"
}

read -r before _ < /proc/uptime
first=$(chain start 100)
rest=$(
    note half >&2
    chain "$first" 200
)
read -r after _ < /proc/uptime
# The saved machine's own memory holds `first`; the reference begins anew.
expect chain-link "$first" "$(chain start 100)"
expect chain-end "$rest" "$(chain "$first" 200)"
expect processors "$processors" "$(nproc)"
check uptime-goes-on [ "$(echo "$before $after" | awk '{ print ($2 > $1) }')" = 1 ]
check processes-start [ "$(seq 1 50 | wc -l)" = 50 ]
read -r now _ < /proc/uptime
sleep 1
read -r later _ < /proc/uptime
check timers-go-on [ "$(echo "$now $later" | awk '{ print ($2 - $1 >= 0.99 && $2 - $1 < 5) }')" = 1 ]
expect no-warnings "" "$(dmesg | grep -E 'BUG:|WARNING:|Oops|soft lockup' | head -n 3)"
