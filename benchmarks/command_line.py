"""What the commands of all benchmarks have in common."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from benchmarks.harness import Report, environment

T = TypeVar("T")


def command_line(
    name: str, doc: str | None, quick: str, rounds: int | None = None
) -> argparse.ArgumentParser:
    """A parser with --quick, --table and --check, and --rounds where there are such.

    Args:
        name: of the benchmark's module.
        doc: of that, which is the help.
        quick: what --quick does.
        rounds: how many are usual.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if rounds is not None:
        add_count(parser, "rounds", rounds, "each in fresh processes")
    parser.add_argument("--quick", action="store_true", help=f"{quick}; nothing is stored")
    parser.add_argument("--table", action="store_true", help="write README.md's table anew")
    parser.add_argument("--check", action="store_true", help="see that README.md's table is right")
    return parser


def add_some(
    parser: argparse.ArgumentParser, option: str, known: Sequence[str] | Mapping[str, Any]
) -> None:
    """An option that takes some of these names, with commas between; without it, all.

    With a mapping the option is a list of what the names stand for.
    """
    values = known if isinstance(known, Mapping) else {name: name for name in known}
    parser.add_argument(
        f"--{option}",
        type=_some_of(option, values),
        default=list(values.values()),
        metavar="NAME,...",
        help=f"some of: {', '.join(values)}",
    )


def _some_of(option: str, known: Mapping[str, T]) -> Callable[[str], list[T]]:
    def parse(text: str) -> list[T]:
        asked = [name for name in text.split(",") if name]
        for name in asked:
            if name not in known:
                raise argparse.ArgumentTypeError(
                    f"--{option} {name}: it can be some of {', '.join(known)}"
                )
        return [known[name] for name in asked] or list(known.values())

    return parse


def add_count(parser: argparse.ArgumentParser, option: str, default: int | None, told: str) -> None:
    """An option that counts something."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"--{option} {text}: it is a whole number, at least 1")
        return int(text)

    if default is not None:
        told = f"{told} (default {default})"
    parser.add_argument(f"--{option}", type=parse, default=default, help=told)


def carry_out(
    options: argparse.Namespace,
    report: Report,
    packages: Sequence[str],
    settings: Mapping[str, Any],
    measure: Callable[[Sequence[Any], bool], Iterable[Any]],
) -> int:
    """Do what a command asks for.

    That is --check or --table; with --quick a little is measured and shown; without them
    everything is measured and stored, record by record, and README.md's table is made from it.

    Args:
        options: what `command_line`'s parser read.
        report: of the benchmark.
        packages: whose versions matter.
        settings: what is measured, as far as no option says it; stored with the results.
        measure: (the records that are stored already, whether to be quick) -> new records.

    Returns:
        The exit status.
    """
    if options.check:
        return report.check()
    if options.table:
        report.write()
        return 0
    where = environment(packages, settings)
    if options.quick:
        print(report.render(list(measure([], True)), where))
        return 0
    folder = report.open(where, _resolved(options))
    for record in measure(folder.read(report.kind), False):
        folder.add(record)
    report.write()
    return 0


def _resolved(options: argparse.Namespace) -> dict[str, Any]:
    """What each option came to, also those that were not given; not what a command does."""
    return {
        name: value
        for name, value in vars(options).items()
        if name not in ("quick", "table", "check") and name.partition("_")[0] != "work"
    }
