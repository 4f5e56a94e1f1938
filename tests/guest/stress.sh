# Each stressor in turn on all processors, with its results verified. Argument: seconds for all of them together.
seconds=$1
set -- cpu vm memcpy vecmath atomic switch futex
share=$(((seconds + $# - 1) / $#))
for stressor in "$@"; do
    options=
    # The guest has little memory, and the file system is memory too.
    [ "$stressor" = vm ] && options="--vm-bytes 64M"
    # shellcheck disable=SC2086
    check "$stressor" stress-ng --verify --metrics-brief --temp-path /tmp --timeout "${share}s" "--$stressor" "$(nproc)" $options
    note "$(echo "$output" | grep -E "metrc|info" | grep -E " $stressor +[0-9]" | tail -n 1)"
done
expect no-warnings "" "$(dmesg | grep -E 'BUG:|WARNING:|Oops|soft lockup|segfault|general protection|invalid opcode|trap ' | head -n 3)"
