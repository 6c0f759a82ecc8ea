#!/bin/sh
# Makes the environment that the other scripts here run in, and prints the path of its python.
#
#   python=$(launch/setup.sh [EXTRA...])      extras of pyproject.toml, e.g. examples test
#
# A run that finds everything in place takes a fraction of a second. An installation that was cut
# off is made anew by the next run. What it may be told through the environment:
#
#   SCALEDTRAIN_VENV   where the environment goes (default: .venv beside pyproject.toml)
#   PYTHON             the python, 3.10 or later, to make it with (default: the first one found)
#
# Where torch comes from, a CPU build say, is told to pip: PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS.
set -eu

say() { printf 'setup: %s\n' "$*" >&2; }
fail() {
    say "$@"
    exit 1
}

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
venv=${SCALEDTRAIN_VENV:-$root/.venv}
case $venv in
    /*) ;;
    *) venv=$PWD/$venv ;;
esac
python=$venv/bin/python
stamps=$venv/.scaledtrain # there: this script made the environment, so it may delete it
unfinished=$stamps/unfinished

for extra in "$@"; do
    case $extra in
        '' | *[!a-z]*) fail "'$extra' is not the name of an extra. Usage: setup.sh [EXTRA...]" ;;
    esac
done

# What a python is, in words that change when it does; nothing if it is missing, broken or too old.
identity() {
    "$1" -I -S -c '
import sys
if sys.version_info >= (3, 10):
    print(sys.base_prefix, sys.version)' 2>/dev/null || true
}

find_python() {
    for candidate in python3 python python3.14 python3.13 python3.12 python3.11 python3.10; do
        if [ -n "$(identity "$candidate")" ]; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    fail "no Python 3.10 or later found. Install one, or name it: PYTHON=/path/to/python"
}

# Sets `base` and `wanted`: an extra whose stamp is not `wanted` has to be installed again.
look() {
    base=$(identity "${PYTHON:-$python}")
    wanted=$(
        {
            cat -- "$root/pyproject.toml" "$root/constraints.txt"
            printf '%s\n' "$root" "$venv" "$base"
        } | cksum
    )
}

is_complete() { # EXTRA...
    [ ! -e "$unfinished" ] || return 1
    for extra in core "$@"; do
        [ "$(cat "$stamps/$extra" 2>/dev/null)" = "$wanted" ] || return 1
    done
}

stage() { # WHAT COMMAND...
    what=$1
    shift
    began=$(date +%s)
    say "$what ..."
    status=0
    "$@" >"$stamps/log" 2>&1 || status=$?
    if [ -n "$interrupted" ]; then
        fail "interrupted; the next run starts anew"
    elif [ "$status" -ne 0 ]; then
        cat "$stamps/log" >&2
        # pip undoes what it could not complete, unless a signal ended it.
        [ "$status" -gt 2 ] || rm -f -- "$unfinished"
        fail "$what: failed after $(($(date +%s) - began)) s, for the reason above"
    fi
    say "$what: $(($(date +%s) - began)) s"
}

make_venv() {
    if [ -e "$venv" ] && [ ! -d "$stamps" ] && [ -n "$(ls -A -- "$venv")" ]; then
        fail "$venv is there and was not made by this script, which therefore leaves it alone." \
            "Remove it, or choose another place: SCALEDTRAIN_VENV=/path/to/new"
    fi
    [ -n "$PYTHON" ] || PYTHON=$(find_python)
    "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$PYTHON lacks its modules venv and ensurepip. On Debian and Ubuntu:" \
            "apt-get install python3-venv. Or name another: PYTHON=/path/to/python"
    rm -rf -- "$venv"
    mkdir -p -- "$stamps"
    : >"$unfinished"
    stage "environment in $venv" "$PYTHON" -m venv "$venv"
    look
    printf '%s\n' "$venv" "$base" >"$stamps/made"
}

install() { # EXTRA...
    extras=$(printf '%s' "$*" | tr ' ' ',')
    : >"$unfinished"
    rm -f -- "$stamps/core"
    cd -- "$root"
    # torch alone and first, so that no other requirement chooses its build.
    stage "torch" "$python" -m pip install --quiet -c constraints.txt torch
    stage "scaledtrain${extras:+[$extras]}" \
        "$python" -m pip install --quiet -c constraints.txt -e ".${extras:+[$extras]}"
    for extra in core "$@"; do
        printf '%s\n' "$wanted" >"$stamps/$extra"
    done
    rm -f -- "$unfinished"
}

PYTHON=${PYTHON:-}
if [ -n "$PYTHON" ] && [ -z "$(identity "$PYTHON")" ]; then
    fail "PYTHON=$PYTHON is not a Python 3.10 or later: $("$PYTHON" --version 2>&1 || true)"
fi

look
if ! is_complete "$@"; then
    mkdir -p -- "$(dirname -- "$venv")"
    if command -v flock >/dev/null; then
        exec 9>"$venv.lock"
        if ! flock -n 9; then
            say "waiting for another setup of $venv"
            flock 9
            look
        fi
    fi
    if ! is_complete "$@"; then
        interrupted=
        trap 'interrupted=yes' INT
        export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
        made=$(cat "$stamps/made" 2>/dev/null || true)
        if [ -e "$unfinished" ] || [ -z "$base" ] || [ "$made" != "$(printf '%s\n' "$venv" "$base")" ]; then
            make_venv
        fi
        install "$@"
    fi
fi
printf '%s\n' "$python"
