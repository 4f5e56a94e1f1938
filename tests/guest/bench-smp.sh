# `cargo xtask bench smp`: as many compiler runs as there are work items, so many at a time.
# Arguments: tree of Debian's programs, folder of inputs (writable), the micro program, runs, runs at a time.
tree=$1 work=$2 micro=$3 runs=$4 jobs=$5
cd "$work" || exit
export LC_ALL=C TMPDIR="$work"
cat > one.sh <<END
exec $tree/lib64/ld-linux-x86-64.so.2 --library-path $tree/lib/x86_64-linux-gnu:$tree/usr/lib/x86_64-linux-gnu \\
    $tree/usr/lib/gcc/x86_64-linux-gnu/12/cc1 -quiet -ffreestanding -nostdinc -O2 $work/program.c -o $work/out.\$1
END
echo "seq $runs | xargs -P $jobs -n 1 sh $work/one.sh; for n in \$(seq $runs); do cmp -s out.1 out.\$n || exit 1; done" > all.sh
# Once without being counted: the first run reads and translates everything.
sh one.sh 0
"$micro" --time "compile-j$jobs" "$work/output" /bin/busybox sh "$work/all.sh"
checks=$((checks + 1)) # the reader of the figures judges them
