# The programs of `cargo xtask bench cpu`, the same on the bare machine and in every guest.
# Arguments: tree of Debian's programs, folder of inputs (writable), the micro program, names of the only programs to run
# (joined by +, or `all`), then micro, programs or both.
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

names=
[ "$only" = all ] || names=$(echo "$only" | tr + ' ')
for part in "$@"; do
    case $part in
    micro) check micro-ends eval '"$micro" $names >&3' 3>&1 ;;
    programs) programs ;;
    *) expect part "micro or programs" "$part" ;;
    esac
done
checks=$((checks + 1)) # the reader of the figures judges them
