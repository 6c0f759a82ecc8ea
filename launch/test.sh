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
stage tests "$python" -m pytest "$@"

if [ -n "$failed" ]; then
    printf '\nFAILED:%s\n' "$failed" >&2
    exit 1
fi
