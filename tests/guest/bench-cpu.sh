# The programs of `cargo xtask bench cpu`, the same on the bare machine and in every guest.
# Arguments: tree of Debian's programs, folder of inputs (writable), the micro program, names of the only programs to run
# (joined by +, or `all`), then some of micro, programs, programs32.
tree=$1 work=$2 micro=$3 only=$4
shift 4
cd "$work" || exit
export PYTHONHOME="$tree/usr" PYTHONPYCACHEPREFIX="$work/pycache" PYTHONHASHSEED=0 LC_ALL=C TMPDIR="$work"
libraries=$tree/lib/x86_64-linux-gnu:$tree/usr/lib/x86_64-linux-gnu

# run NAME PROGRAM ARGUMENTS...: the tree's own loader and libraries, so that nothing of the host is used.
run() {
    name=$1 program=$tree/$2
    shift 2
    case +$only+ in *+all+* | *+$name+*) ;; *) return ;; esac
    "$micro" --time "$name" "$work/output" "$tree/lib64/ld-linux-x86-64.so.2" --library-path "$libraries" "$program" "$@"
}

programs() {
    run cc1-cold usr/lib/gcc/x86_64-linux-gnu/12/cc1 -quiet -ffreestanding -nostdinc -O2 "$work/program.c" -o -
    run cc1-warm usr/lib/gcc/x86_64-linux-gnu/12/cc1 -quiet -ffreestanding -nostdinc -O2 "$work/program.c" -o -
    # Compiled modules are written by a first start, which is not counted.
    run python-first usr/bin/python3.11 -c 'import random, re, json' > /dev/null
    run python-start usr/bin/python3.11 -c 'import random, re, json'
    run python usr/bin/python3.11 "$work/program.py"
    run gzip bin/gzip -6 -c -n "$work/text"
    run sort usr/bin/sort "$work/text"
    run awk usr/bin/gawk -f "$work/program.awk" "$work/text"
    run grep bin/grep -E -c '([a-f]+x|qu)[a-z ]*[k-t]{3}.*[02468]$' "$work/text"
    run sha256sum usr/bin/sha256sum text
    run sh-arithmetic bin/dash -c 'i=0 s=0; while [ $i -lt 60000 ]; do s=$(((s * 31 + i) % 65521)); i=$((i + 1)); done; echo $s'
    run sh-forks bin/dash -c 'i=0; while [ $i -lt 200 ]; do (exit 0); i=$((i + 1)); done; echo $i'
    library=$tree/usr/lib/python3.11
    run find usr/bin/find "$library" "$library" "$library" "$library" "$library" "$library" "$library" -name '*a*.py' -newermt 1969-01-01 -size +1k -printf x
}

# The same with the applets of a static program of 32 bits.
run32() {
    name=$1
    shift
    case +$only+ in *+all+* | *+$name+*) ;; *) return ;; esac
    "$micro" --time "$name" "$work/output" "$work/busybox32" "$@"
}

# shellcheck disable=SC2016 # $0 is the program's
programs32() {
    run32 sha256sum-32 sha256sum text
    run32 gzip-32 sh -c '"$0" gzip -c < text' "$work/busybox32"
    run32 sort-32 sort text
    run32 awk-32 awk '{ n += NF; for (i = 1; i <= NF; i++) c[length($i)]++ } END { for (i = 1; i < 20; i++) n = (n * 31 + c[i]) % 1000003; print n }' text
    run32 grep-32 grep -E -c '([a-f]+x|qu)[a-z ]*[k-t]{3}.*[02468]$' text
    run32 sed-32 sed -e 's/[aeiou]\+/<&>/g' text
    run32 sh-arithmetic-32 sh -c 'i=0 s=0; while [ $i -lt 60000 ]; do s=$(((s * 31 + i) % 65521)); i=$((i + 1)); done; echo $s'
    run32 sh-forks-32 sh -c 'i=0; while [ $i -lt 200 ]; do (exit 0); i=$((i + 1)); done; echo $i'
    run32 sh-execs-32 sh -c 'i=0; while [ $i -lt 100 ]; do "$0" echo; i=$((i + 1)); done' "$work/busybox32"
}

names=
[ "$only" = all ] || names=$(echo "$only" | tr + ' ')
for part in "$@"; do
    case $part in
    micro) check micro-ends eval '"$micro" $names >&3' 3>&1 ;;
    programs) programs ;;
    programs32) programs32 ;;
    *) expect part "micro, programs or programs32" "$part" ;;
    esac
done
checks=$((checks + 1)) # the reader of the figures judges them
