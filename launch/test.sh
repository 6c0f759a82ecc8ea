#!/bin/sh
# Everything a change has to pass: lint, format, types, tests.
#
#   launch/test.sh [ARGUMENT...]              the arguments of pytest, e.g. tests/unit -k server
#
# The first run installs what is needed: see setup.sh for what it may be told.
set -eu

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
python=$("$here/setup.sh" examples test)
cd -- "$here/.."

failed=
stage() { # NAME COMMAND...
    name=$1
    shift
    printf '\n== %s\n' "$name"
    "$@" || failed="$failed $name"
}

stage lint "$python" -m ruff check .
stage format "$python" -m ruff format --check .
stage types "$python" -m mypy

# Two at once: many wait for their processes. A file stays with one of them, for what its tests
# share. What measures time comes after, one by one, and what needs a GPU. Where nothing of what was
# asked for is of one kind, pytest's code is 5.
tests() {
    codes=
    run() {
        code=0
        "$python" -m pytest "$@" || code=$?
        codes=$codes,$code
    }
    run --numprocesses 2 --dist loadfile --no-loadscope-reorder -m "not alone and not gpu" "$@"
    run -m alone "$@"
    run -m gpu "$@"
    case $codes in
        ,5,5,5 | *[!05,]*) return 1 ;;
    esac
}
stage tests tests "$@"

if [ -n "$failed" ]; then
    printf '\nFAILED:%s\n' "$failed" >&2
    exit 1
fi
