# Runs one test script (with the functions below) and prints the verdict.
#   check NAME COMMAND...       the command must succeed
#   expect NAME WANT GOT        two strings must be equal
#   note TEXT...                a line for the reader of the log
#   host WORD...                asks the host's side of the test for something and waits; its answer is in $answer
#   within SECONDS COMMAND...   tries until the command succeeds
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
#   now                         prints the clock, to the microsecond
now() { adjtimex | awk '/tv_sec/ { s = $2 } /tv_usec/ { u = $2 } END { printf "%d.%06d", s, u }'; }
note() { echo "VIRIDIAN-NOTE: $*"; }
host() {
    checks=$((checks + 1))
    echo "VIRIDIAN-HOST: $*"
    answer=
    IFS= read -r answer < /dev/console
    case $answer in
    ok*)
        answer=${answer#ok}
        answer=${answer# }
        echo "VIRIDIAN-CHECK: ok host-$1"
        ;;
    *)
        echo "VIRIDIAN-CHECK: FAIL host-$1: $answer"
        failures="$failures host-$1"
        ;;
    esac
}
within() {
    tries=$(($1 * 10))
    shift
    while ! "$@" > /dev/null 2>&1; do
        tries=$((tries - 1))
        [ $tries -gt 0 ] || return 1
        sleep 0.1
    done
}

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
