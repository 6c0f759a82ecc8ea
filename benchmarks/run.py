"""Runs the benchmarks: one by its name, or all of them one after another.

python -m benchmarks.run NAME [ARGUMENT...]    what python -m benchmarks.NAME does
python -m benchmarks.run --list                the names, and what each asks
python -m benchmarks.run --all                 all of them, stored: hours on a machine that is quiet
python -m benchmarks.run --all --quick         does each run? Less than 30 minutes, stores nothing
python -m benchmarks.run --check               fail if a table is not that of the newest results
python -m benchmarks.run --table               write all tables anew from the newest results
"""

from __future__ import annotations

import argparse
import ast
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from benchmarks.command_line import add_count
from benchmarks.harness import ROOT, BenchmarkError, python_module

FOLDER = Path(__file__).parent
QUICK_MINUTES, MINUTES = 6, 240
LINES_OF_FAILURES = 20


def questions(folder: Path = FOLDER) -> dict[str, str]:
    """What each benchmark asks, by its name: the first line of every module that has a ``main``.

    They are read, not imported: a list should not load all that the benchmarks compare.
    """
    found = {}
    for file in sorted(folder.glob("*.py")):
        module = ast.parse(file.read_text(encoding="utf-8"))
        functions = {node.name for node in module.body if isinstance(node, ast.FunctionDef)}
        if "main" in functions and file.stem != Path(__file__).stem:
            found[file.stem] = (ast.get_docstring(module) or "").partition("\n")[0]
    return found


def run_all(
    commands: Mapping[str, Sequence[str]], asked: Mapping[str, str], limit_seconds: float
) -> list[str]:
    """Each in a process of its own, also after one that failed; two lines for each.

    Args:
        commands: by names.
        asked: their questions.
        limit_seconds: for each of them; it is ended after that, with all that it started.

    Returns:
        The names of those that failed.
    """
    failed, began = [], time.monotonic()
    for name, command in commands.items():
        print(f"{name:18} {asked[name]}", flush=True)
        start = time.monotonic()
        wrong, said = _run(command, limit_seconds)
        print(f"{'':18} {time.monotonic() - start:.0f} s: {wrong or 'ok'}", flush=True)
        if wrong:
            failed.append(name)
            print("\n".join(f"    {line}" for line in said.splitlines()[-LINES_OF_FAILURES:]))
    minutes = (time.monotonic() - began) / 60
    print(f"{len(commands) - len(failed)} of {len(commands)} ran, in {minutes:.1f} minutes")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return failed


def _run(command: Sequence[str], limit_seconds: float) -> tuple[str | None, str]:
    """What went wrong, and what it said."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that it can be ended with its ranks
        )
        try:
            status = process.wait(limit_seconds)
            wrong = f"FAILED with status {status}" if status else None
        except subprocess.TimeoutExpired:
            wrong = f"FAILED: longer than {limit_seconds:g} s"
        finally:
            with suppress(ProcessLookupError):  # as a rule nothing is left
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        return wrong, output.read().decode(errors="replace")


def refresh(names: Sequence[str], option: str) -> list[str]:
    """Have all tables checked or written, in this process; the names of the wrong ones."""
    wrong = []
    for name in names:
        try:
            status = importlib.import_module(f"benchmarks.{name}").main([option])
        except BenchmarkError as error:
            print(f"benchmarks.{name}: {error}")
            status = 1
        if status:
            wrong.append(name)
    return wrong


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--all", action="store_true", help="run all of them")
    what.add_argument("--list", action="store_true", help="show their names")
    what.add_argument("--check", action="store_true", help="see that all tables are right")
    what.add_argument("--table", action="store_true", help="write all tables anew")
    parser.add_argument("--quick", action="store_true", help="with --all: little of each")
    told = f"with --all: the most for one of them (default {MINUTES}, with --quick {QUICK_MINUTES})"
    add_count(parser, "minutes", None, told)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    known, parser = questions(), _parser()
    if given and not given[0].startswith("-"):
        name, *rest = given
        if name not in known:
            parser.error(f"there is no benchmark {name!r}; there are: {', '.join(known)}")
        return subprocess.run(python_module(f"benchmarks.{name}", *rest), cwd=ROOT).returncode
    options = parser.parse_args(given)
    if not options.all and (options.quick or options.minutes):
        parser.error("--quick and --minutes go with --all, or after the name of a benchmark")
    if options.list:
        print("\n".join(f"{name:18} {question}" for name, question in known.items()))
        return 0
    if options.check or options.table:
        return bool(refresh(list(known), "--check" if options.check else "--table"))
    minutes = options.minutes or (QUICK_MINUTES if options.quick else MINUTES)
    quick = ["--quick"] if options.quick else []
    commands = {name: python_module(f"benchmarks.{name}", *quick) for name in known}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends what runs, too
    return bool(run_all(commands, known, minutes * 60))


if __name__ == "__main__":
    sys.exit(main())
