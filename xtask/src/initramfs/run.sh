# Runs one test script (with the functions below) and prints the verdict.
#   check NAME COMMAND...       the command must succeed
#   expect NAME WANT GOT        two strings must be equal
#   note TEXT...                a line for the reader of the log
# A test passes when it made at least one check, none failed, and the script itself ended with status 0.
checks=0 failures=
check() {
    name=$1
    shift
    checks=$((checks + 1))
    if output=$("$@" 2>&1); then
        echo "VIRIDIAN-CHECK: ok $name"
    else
        echo "VIRIDIAN-CHECK: FAIL $name (status $?): $(echo "$output" | tail -n 3 | tr '\n' ' ')"
        failures="$failures $name"
    fi
}
expect() {
    checks=$((checks + 1))
    if [ "$2" = "$3" ]; then
        echo "VIRIDIAN-CHECK: ok $1"
    else
        echo "VIRIDIAN-CHECK: FAIL $1: want '$2', got '$3'"
        failures="$failures $1"
    fi
}
note() { echo "VIRIDIAN-NOTE: $*"; }

script=$1
shift
. "$script"
status=$?
if [ -n "$failures" ]; then
    echo "VIRIDIAN-VERDICT: FAIL$failures"
elif [ $status -ne 0 ]; then
    echo "VIRIDIAN-VERDICT: FAIL the script ended with status $status"
elif [ $checks -eq 0 ]; then
    echo "VIRIDIAN-VERDICT: FAIL the script checked nothing"
else
    echo "VIRIDIAN-VERDICT: PASS $checks checks"
fi
