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
# share. What measures time comes after, one by one. Where nothing of what was asked for is of one
# kind, pytest's code is 5.
tests() {
    code=0
    "$python" -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder \
        -m "not alone" "$@" || code=$?
    alone=0
    "$python" -m pytest -m alone "$@" || alone=$?
    case $code,$alone in
        0,0 | 0,5 | 5,0) ;;
        *) return 1 ;;
    esac
}
stage tests tests "$@"

if [ -n "$failed" ]; then
    printf '\nFAILED:%s\n' "$failed" >&2
    exit 1
fi
